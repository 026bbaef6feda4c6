"""Language model cascades: "Language Model Cascades: Token-Level Uncertainty and Beyond". Gupta, Narasimhan, Jitkrittum, Rawat,
Menon and Kumar, arXiv 2404.10136 (ICLR 2024).

Idea: a small model answers, and a large one is asked in its place where the small one is not sure. The sum of the answer's
log-probs defers what is long, their mean what is short; a quantile of them is less misled, and which one differs by task. A
small network that reads all quantiles learns what is to be gained by asking, which is not the same as being unsure: where
both models fail nothing is gained.

Score (equation numbers not at hand), l_1 ... l_L: log-probs of the small model's greedy answer, its end included. Larger = the
small model is kept; those with the least scores are deferred:
    sum = sum_t l_t        mean = 1/L sum_t l_t        quantile a = quantile_a(l_1 ... l_L), linear between neighbours
    post-hoc = -phi(features),   phi fitted by squared error to the gain Q(large) - Q(small), Q: 1 where an answer is right
    features: quantiles 0, 0.1 ... 1, sum, mean, whether it was cut; 1: with the mean of the small model's last states over the
    answer; 1+2: with that of the large model's first layer over the prompt as well
    deferral curve: quality over the share that is deferred; AUC-DF: its area. Random deferral is a straight line.

Grid, target and loss of the network are not known from a source; --target small-right has it guess whether the small model is
right instead. Chosen on validation items, apart from those that the network is fitted to and those that are shown: the
quantile, the sign of the length (a score that needs no model), and the epoch. Quality at the right end is the large model's
alone, but costs a call of both.

The built-in task has three families: letters to recite (long, easy), sums without scratch, digit sums (short, hard).

Family: inference
Differs from score.py in: model, seed, items, stop, temperature, engine, vllm_memory, vllm_tp, scores, results, given, main,
    quantiles, chow, Router, router_loss, deferral, fit
Measures: results
World: families
Costs: the large model's call where it is deferred to, beside the small one's; the network is of 32 units. Here both answer all.
Run:   python algos/lm_cascades.py                              CPU, a minute and two warm starts
       python algos/lm_cascades.py --target small-right
       python algos/lm_cascades.py --model qwen2.5-0.5b-instruct --large qwen2.5-7b-instruct
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny-small"
    """the small model: alias (qwen2.5-7b, llama-3.2-1b, ...), hub id or folder; tiny-small: one made and warm-started here"""
    task: str | None = None
    """gsm8k, math, a built-in task, reasoning_gym:NAME, or a .jsonl file of prompts and answers; held-out prompts are asked"""
    prompt_template: str | None = None
    """format string with {prompt}, such as "Q: {prompt}\\nA:"; None: the task's"""
    system_prompt: str | None = None
    """put before the prompt where the tokenizer has a chat template"""
    seed: int = 1
    """of the built-in items, and of the network"""
    items: int = 2400
    """prompts in all: half for the network, a sixth for validation, a third to be shown"""
    batch: int = 32
    """items in one step"""
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the weights"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass"""

    # Cascades
    limits = dict(items="12 <= x", batch="1 <= x", epochs="1 <= x", lr="0 < x")
    tiny_preset = dict(task="families", large="tiny")
    real_preset = dict(large="qwen2.5-7b-instruct")
    large: str | None = None
    """the large model, with a tokenizer of its own (paper: FLAN-T5 of 250 and 780 million parameters)"""
    target: Literal["gain", "small-right"] = "gain"
    """what the network is fitted to: Q(large) - Q(small), or Q(small) (ours: the paper's is not known)"""
    epochs: int = 200
    """passes over the network's items (paper)"""
    lr: float = 1e-3
    """AdamW's rate for the network (ours)"""


# ---------------------------------------------------------------- the score


def quantiles(logp, mask):
    """Log-probs [B, T], mask [B, T] -> [B, 11]: quantiles 0, 0.1 ... 1 of each row's own; 0 where it has none."""
    own = logp.double().masked_fill(~mask, torch.nan)
    return own.nanquantile(torch.arange(11, dtype=torch.float64, device=logp.device) / 10, 1).T.nan_to_num(0.0)


def chow(logp, mask):
    """Log-probs [B, T], mask [B, T] -> their sums and means [B]."""
    total = logp.double().masked_fill(~mask, 0.0).sum(1)
    return total, total / mask.sum(1).clamp(min=1)


def scores(logp, cut, mask, args):
    """Log-probs [B, T], which answers were cut [B], mask [B, T] -> features [B, 14]: quantiles, sum, mean, cut."""
    return torch.cat([quantiles(logp, mask), torch.stack([*chow(logp, mask), cut.double()], 1)], 1).float()


class Router(torch.nn.Module):
    """phi: features [B, F] -> [B], five layers of 32 units with batch norm, on features that are standardised first."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        widths = [features, *[32] * 5]
        layers = [(torch.nn.Linear(a, b), torch.nn.BatchNorm1d(b), torch.nn.ReLU()) for a, b in zip(widths, widths[1:])]
        self.layers = torch.nn.Sequential(*[x for layer in layers for x in layer], torch.nn.Linear(32, 1))

    def forward(self, x):
        return self.layers((x - self.mean) / self.std.clamp(min=1e-6))[:, 0]


def router_loss(guess, small, large, args):
    """phi [B], qualities of both models [B] -> squared error to the target."""
    return ((guess - (large - small if args.target == "gain" else -small)) ** 2).mean()


def deferral(score, small, large):
    """What is gained by asking a large model: score [n], the greater the surer of the small one, quality [n] of both ->
    ([[share that is deferred, mean quality], ...] from none to all, the least sure first, and its area). Equal scores are
    deferred by the mean of all their orders."""
    import numpy

    score, small, large = (numpy.asarray(x, float) for x in (score, small, large))
    gain = large - small
    order = numpy.argsort(score, kind="stable")
    _, group, n = numpy.unique(score[order], return_inverse=True, return_counts=True)
    gain = (numpy.bincount(group, gain[order]) / n)[group]
    quality = (small.sum() + numpy.concatenate([[0.0], numpy.cumsum(gain)])) / len(score)
    share = numpy.linspace(0, 1, len(score) + 1)
    return [[float(x), float(y)] for x, y in zip(share, quality)], float(numpy.trapezoid(quality, share))


def fit(router, features, small, large, fitted, chosen, seed, args):
    """Trains a router on the rows `fitted`, and leaves it as it was in the epoch with the best AUC-DF on the rows `chosen`."""
    torch.manual_seed(seed)
    for layer in router.layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    router.mean.copy_(features[fitted].mean(0))
    router.std.copy_(features[fitted].std(0))
    optimizer = torch.optim.AdamW(router.parameters(), lr=args.lr, weight_decay=1e-4)
    best, kept = -1.0, None
    for _ in range(args.epochs):
        router.train()
        for rows in fitted[torch.randperm(len(fitted))].split(128):
            if len(rows) > 1:  # a batch norm has no deviation of one
                optimizer.zero_grad()
                router_loss(router(features[rows]), small[rows], large[rows], args).backward()
                optimizer.step()
        router.eval()
        with torch.no_grad():
            _, area = deferral(-router(features[chosen]), small[chosen], large[chosen])
        if area > best:
            best, kept = area, {k: v.clone() for k, v in router.state_dict().items()}
    router.load_state_dict(kept)


# ---------------------------------------------------------------- the world: three families of prompts


def families(args, steps):
    """-> Task: cF= gives the letters up to F, s12+34= the sum, d123= the sum of the digits modulo 10. Its train prompts are
    for the warm start, of so many steps, its test prompts the items, args.items by the seed, of which some were trained on."""
    from random import Random

    from common import gpu, tasks

    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def answer(prompt):
        kind, rest = prompt[0], prompt[1:-1]
        if kind == "c":
            return letters[: letters.index(rest) + 1]
        return str(sum(map(int, rest.split("+")))) if kind == "s" else str(sum(map(int, rest)) % 10)

    def make(rng):
        kind = rng.choice("csd")
        if kind == "c":
            return f"c{rng.choice(letters)}="
        a, b = (rng.randrange(10 ** rng.choice((1, 2))) for _ in range(2))
        return f"d{rng.randrange(1000):03d}=" if kind == "d" else f"s{a}+{b}="

    def some(rng, n):
        return [tasks.Example(i, p, answer(p)) for i, p in enumerate(make(rng) for _ in range(n))]

    train, shown = some(Random(0), 6000), some(Random(gpu.hash_seed(args.seed, 41)), args.items)
    return tasks.Task(
        "families", train, shown, lambda text, gold: (text, float(text == gold)), True,
        lambda rng, e, careful: e.answer, max_new_tokens=28,
        recipe=dict(steps=steps, careful_steps=10**6, careful=1.0, batch=64, lr=3e-3),
    )  # fmt: skip


# ---------------------------------------------------------------- what is measured


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    from common import measures

    small, large = ([row[k] for row in rows] for k in ("small", "large"))
    of = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    of["oracle"] = [a - b for a, b in zip(small, large)]
    random_area = (sum(small) + sum(large)) / 2 / len(rows)
    kinds = sorted({row["family"] for row in rows if row["family"]})
    table, curves, heat = {}, {}, {}
    for name, score in of.items():
        curve, area = deferral(score, small, large)
        low, high = measures.interval(lambda *x: deferral(*x)[1], score, small, large, resamples=200)
        table[name] = {"AUC-DF": area, "low": low, "high": high}
        table[name] |= {"over random, %": 100 * (area / random_area - 1) if random_area else 0.0}
        curves[name] = curve[:: max(1, len(curve) // 40)]
        least = sorted(range(len(rows)), key=lambda i: score[i])[: round(0.3 * len(rows))]
        heat[name] = {k: sum(rows[i]["family"] == k for i in least) / max(1, sum(row["family"] == k for row in rows))
                      for k in kinds}  # fmt: skip
    curves["random"] = [[0.0, sum(small) / len(rows)], [1.0, sum(large) / len(rows)]]
    table["random"] = {"AUC-DF": random_area, "over random, %": 0.0}
    table["small alone"], table["large alone"] = ({"quality": sum(x) / len(x)} for x in (small, large))
    few = [n for n in curves if n in ("sum", "mean", "length", "oracle", "random") or n.startswith("post-hoc, 1+2")]
    panels = [
        dict(title="deferral", kind="lines", x="share that is deferred", y="quality", of={n: curves[n] for n in few}),
        dict(title="AUC-DF over random, %", kind="bars", of={n: table[n]["over random, %"] for n in of}),
    ]
    if kinds:
        panels.append(dict(title="at 30%: share of a family that is deferred", kind="heat", of=heat))
    return dict(table=table, panels=panels)


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import functools

    from common import UserError, engines, gpu, items, models, rewards, settings, tasks
    from common.batch import collate, read

    def warm(steps):
        return lambda name: families(args, steps) if name == "families" else tasks.world(name)

    args, config, device = settings.prepare(__file__, args, warm(300))
    own = args.task == "families"
    run = items.Items(__file__, args, config)
    first, last = args.items // 2, args.items // 2 + args.items // 6

    # Both models answer everything greedily, one after the other, so that one is in memory at a time.
    for which, name, steps in (("small", args.model, 300), ("large", args.large, 1100)):
        mine = Args(**vars(args) | dict(model=name))
        tokenizer = models.load_tokenizer(mine, warm(steps))
        task = families(args, steps) if own else tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt)
        if own:
            tasks.encode(task, tokenizer)
        asked = task.test if len(task.test) >= args.items else task.train[:last] + task.test[: args.items - last]
        if len(asked) < args.items:
            raise UserError(f"--items {args.items}: task {args.task} has {len(asked)} that can be asked")
        models.check_context(models.architecture(mine, warm(steps))[0], task, args)
        policy = models.load(mine, device, trainable=False, warm=warm(steps))
        engine, scorer = engines.HF(policy, tokenizer), rewards.Scorer(task.check, inline=task.inline)
        for some in run.left(args.items, args.batch, which):
            examples = [asked[i] for i in some]
            out = engine.generate([e.ids for e in examples], 1, args.max_new_tokens, 0, [0] * len(some))
            texts = tokenizer.batch_decode([y for y, _, _ in out], skip_special_tokens=True)
            _, right = scorer(texts, [e.answer for e in examples])
            batch = collate([(e.ids, y) for e, (y, _, _) in zip(examples, out)], tokenizer.pad_token_id, device)
            depth = 1 if which == "large" else policy.lm.config.num_hidden_layers
            with torch.no_grad():
                *_, states = read(policy, batch, args, temperature=1.0, layers=[depth])
            # Of the large model's prompt the last position, which its first layer has read all of.
            states = states[:, 0] if which == "large" else (states * batch.mask[:, :, None]).sum(1) / batch.mask.sum(1, True)
            rows = zip(examples, out, right, states.tolist())
            run.write(*(dict(asked=e.prompt, answer=str(e.answer), logp=p, cut=not ended, right=y * ended,
                             state=[float(f"{x:.4g}") for x in state])
                        for e, (_, p, ended), y, state in rows))  # fmt: skip

    answers, others = run.rows("small"), run.rows("large")
    small, large = (torch.tensor([float(row["right"]) for row in rows]) for rows in (answers, others))
    if small[:last].mean() >= large[:last].mean():
        print(f"note: --large {args.large} is right no more often than --model {args.model}: there is nothing to defer to")
    width = max(len(row["logp"]) for row in answers)
    logp = torch.tensor([row["logp"] + [0.0] * (width - len(row["logp"])) for row in answers])
    mask = torch.arange(width) < torch.tensor([[len(row["logp"])] for row in answers])
    features = {"post-hoc": scores(logp, torch.tensor([row["cut"] for row in answers]), mask, args)}
    features["post-hoc, 1"] = torch.cat([features["post-hoc"], torch.tensor([row["state"] for row in answers])], 1)
    features["post-hoc, 1+2"] = torch.cat([features["post-hoc, 1"], torch.tensor([row["state"] for row in others])], 1)

    # What is chosen is chosen on the validation items.
    chosen, shown = torch.arange(first, last), range(last, args.items)
    every = quantiles(logp, mask)

    def area(score):
        return deferral(score[chosen], small[chosen], large[chosen])[1]

    best = max(range(11), key=lambda k: area(every[:, k]))
    length = -mask.sum(1).double()
    total, mean = chow(logp, mask)
    found = dict(sum=total, mean=mean) | {"quantile 0": every[:, 0], "quantile": every[:, best]}
    found["length"] = length if area(length) >= area(-length) else -length
    for j, (name, x) in enumerate(features.items()):
        router, rows = Router(x.shape[1]), (torch.arange(first), chosen)
        learn = functools.partial(fit, router, x, small, large, *rows, gpu.hash_seed(args.seed, 42, j), args)
        router = run.kept(f"router-{j}", router, learn).eval()
        with torch.no_grad():
            found[name] = -router(x)
    kind = [row["asked"][:1] if own else None for row in answers]
    for i in run.left(len(shown)):
        at = shown[i]
        run.write(dict(item=i, asked=answers[at]["asked"], family=kind[at], small=small[at].item(), large=large[at].item(),
                       scores={name: float(x[at]) for name, x in found.items()}))  # fmt: skip

    made = results(run.rows(), args)
    said = ", ".join(f"{name} {row['over random, %']:+.1f}%" for name, row in made["table"].items() if "low" in row)
    run.finish(made, f"AUC-DF over random deferral (quantile {best / 10:g} chosen): {said}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
