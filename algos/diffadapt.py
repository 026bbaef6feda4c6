"""DiffAdapt: Difficulty-Adaptive Reasoning. X. Liu, Hu, Chu and Choi, "DiffAdapt: Difficulty-Adaptive Reasoning for
Token-Efficient LLM Inference", arXiv 2510.19669 (2025).

Idea: a small probe of a model's hidden state says how hard a question is, before a token is drawn, and that chooses the prompt,
the temperature and the budget. The probe learns from labels that the model gave itself: how often its samples are right, and
how uncertain they are. Easy questions, right but uncertain, are what it thinks too long about; hard ones get less, not more.

Rule (equation numbers not at hand), of a question's samples in the Normal way, p_t the laws at temperature 1:
    H_t = -sum_v p_t(v) log p_t(v),   E = mean over samples of the mean over t of H_t,   a = share of the samples that are right
    y = Normal where a >= alpha and E <= beta, else Hard where a < gamma, else Easy
    P(y | h) = softmax(W_2 ReLU(W_1 h + b_1) + b_2),   h the last hidden state (normed) at the plain question's last token
    loss = -mean log P(y_i | h_i), to be minimised;   answered in the way argmax P, or Normal where max P < --fallback
    Easy: temperature 0.5, 0.4 of --max-new-tokens;   Normal: 0.8, all of them;   Hard: 0.4, a half of them
E points to uncertainty, a to being right. The thresholds' values, the prompts and the probe's width are ours, since no source
has them; beta is chosen on questions that the probe does not learn from, asked all three ways. No code is public.

The world has its difficulty planted. A question is a state and moves (2abc=), and the scratchpad goes state by state. The
needless looks back, which make short questions uncertain in the Normal way, are padding in the demonstrations: this left arm
of the U was put there (and the padding costs accuracy, too). A quarter of the questions has a move whose outcome the
demonstrations draw at random, so that nothing can be known of it: this is the right arm, and the length of a question does
not show it. Easy from Normal is told by a table of lengths as well, and what the probe has to find is a letter. Hard answers
at once here; the paper's outlines, and is frugal.

Family: inference
Differs from decode.py in: model, items, batch, temperature, Way, strategy, entropy, pick, decode, labels, averages, label,
    score, threshold, Probe, probe_loss, fit, choose, by_length, states, ask, main
World: moves, worlds
Measures: results, best, mixed, panels
Costs: labels, once: --samples completions of --questions questions, a quarter of them in three ways. Then a prefill that the
       strategies' prompts share up to the question's end. All three ways are sampled here, to have every baseline.
Run:   python algos/diffadapt.py                                CPU, about half a minute
       python algos/diffadapt.py --fallback 0.8
       python algos/diffadapt.py --beta 0.1 --probe-width 8
       python algos/diffadapt.py --model qwen3-4b --max-new-tokens 8192
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """alias (qwen3-4b, qwen2.5-7b, ...), hub id or folder; tiny: a small model made and warm-started here, on moves"""
    task: str | None = None
    """gsm8k, math, a built-in task, reasoning_gym:NAME, or a .jsonl file of prompts and answers; held-out prompts are asked"""
    prompt_template: str | None = None
    """format string with {prompt}, such as "Q: {prompt}\\nA:"; None: the task's"""
    system_prompt: str | None = None
    """put before the prompt where the tokenizer has a chat template"""
    seed: int = 1
    """of the uniform numbers"""
    items: int = 400
    """held-out questions, at most; each is asked all three ways"""
    batch: int | None = None
    """questions that are asked side by side, each with its samples"""
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

    # DiffAdapt
    classes = ("Easy", "Normal", "Hard")
    limits = dict(
        items="1 <= x", batch="2 <= x", samples="2 <= x", questions="4 <= x: every fourth is for the threshold",
        alpha="0 <= x <= 1", gamma="0 <= x <= 1", slack="0 <= x <= 1", fallback="0 <= x <= 1", probe_epochs="1 <= x",
        probe_batch="1 <= x", probe_width="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(task="moves", batch=64, questions=800, suffix=("E", "N", "H"))
    real_preset = dict(
        batch=8, questions=3000, prompt_template="{prompt}\n\nPut your final answer within \\boxed{{}}.",
        suffix=(" Solve it directly, then verify the answer.", " Reason step by step, systematically.",
                " It may be beyond reach: outline a method, be frugal, and answer soon."),
    )  # fmt: skip
    samples: int = 10
    """completions of a question, for its label and in every way that is measured (the paper's number for labels)"""
    questions: int | None = None
    """questions to train on that are labelled, at most (the paper: 300 of each of ten levels; tiny: ours)"""
    suffix: tuple[str, str, str] | None = None
    """what stands behind the prompt in the Easy, Normal and Hard way (ours)"""
    alpha: float = 0.8
    """least accuracy of a Normal question (ours)"""
    beta: float | None = None
    """greatest entropy of one, in nats; None: chosen, see --slack (ours; the paper: by eye, for each model)"""
    gamma: float = 0.3
    """accuracy below which a question is Hard (ours)"""
    slack: float = 0.01
    """accuracy that the labels' ways may lose against Normal for all when beta is chosen (ours)"""
    probe_width: int = 32
    """hidden units of the probe (ours)"""
    probe_epochs: int = 100
    """passes over the labelled questions (paper)"""
    probe_batch: int = 32
    """questions in an update (ours)"""
    probe_lr: float = 1e-3
    """AdamW's rate (paper)"""
    fallback: float = 0.0
    """Normal where the probe is less sure than this (advised by the paper; 0: never)"""


# ---------------------------------------------------------------- the rule


def law(logits, args):
    """Logits [..., V] -> probabilities of the next token [..., V], float64; at temperature 0 all on the likeliest."""
    if args.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return (logits.double() / args.temperature).softmax(-1)


@dataclass
class Way:
    suffix: str
    temperature: float
    max_new_tokens: int


def strategy(c, args):
    """Number of a class -> how its questions are asked: what stands behind them, temperature, budget."""
    heat, share = ((0.5, 0.4), (0.8, 1.0), (0.4, 0.5))[c]
    return Way(args.suffix[c], heat, max(1, int(share * args.max_new_tokens)))


def entropy(logits):
    """[..., V] -> H of the next token's law at temperature 1, whatever it is drawn at: in nats [...]."""
    return torch.special.entr(logits.double().softmax(-1)).sum(-1)


def pick(p, u):
    """Probabilities [b, V], uniform numbers in [0, 1) [b] -> the tokens at which their running sums pass them."""
    running = p.cumsum(-1)
    found = torch.searchsorted(running, (u * running[:, -1])[:, None], right=True)
    return found[:, 0].clamp(max=p.shape[1] - 1)


def decode(reader, end, uniforms, args):
    """A Decoder that has read prompts, b rows, ids that end a completion, uniform numbers [b, max_new_tokens], a Way -> each
    row's ids, and the entropies of the laws that they were drawn from."""
    ids, entropies = ([[] for _ in uniforms] for _ in range(2))
    for t in range(args.max_new_tokens):
        tokens = pick(law(reader.logits, args), uniforms[reader.rows, t])
        for row, token, h in zip(reader.rows.tolist(), tokens.tolist(), entropy(reader.logits).tolist()):
            ids[row].append(token)
            entropies[row].append(h)
        going = (~torch.isin(tokens, torch.tensor(end, device=reader.device))).nonzero()[:, 0]
        if not len(going) or t + 1 == args.max_new_tokens:
            break
        if len(going) < len(tokens):
            reader.keep(going)
        reader.feed(tokens[going])
    return ids, entropies


def labels(acc, entropy, beta, args):
    """a [n], E [n], float64 -> numbers of the classes [n]. The order is the rule's: what is neither is Easy."""
    easy, normal, hard = range(3)
    y = torch.where(acc < args.gamma, hard, easy)
    return torch.where((acc >= args.alpha) & (entropy <= beta), normal, y)


def averages(rows):
    """Questions -> a [n], E [n] of their samples in the Normal way, float64."""
    samples = [row["ways"]["Normal"] for row in rows]
    return [torch.tensor([sum(s[k]) / len(s[k]) for s in samples], dtype=torch.float64) for k in ("right", "entropy")]


def label(rows, beta, args):
    """Questions -> their labels, a list."""
    return labels(*averages(rows), beta, args).tolist()


def score(rows, classes, args, share=1.0, most=None):
    """Questions, a class for each -> (accuracy, tokens): means of what their samples come to in these ways, cut to this share
    of the way's budget, or to `most` tokens."""
    right = tokens = 0.0
    for row, c in zip(rows, classes):
        said = row["ways"][args.classes[c]]
        budget = int(share * strategy(c, args).max_new_tokens) if most is None else most
        right += sum(r for r, n in zip(said["right"], said["tokens"]) if n <= budget) / len(said["right"])
        tokens += sum(min(n, budget) for n in said["tokens"]) / len(said["tokens"])
    return right / len(rows), tokens / len(rows)


def threshold(rows, args):
    """Questions that were asked all three ways -> beta: of their entropies the one by which the labels' ways take the
    fewest tokens, and lose no more than --slack against Normal for all."""
    least = score(rows, [1] * len(rows), args)[0] - args.slack
    found = []
    for beta in averages(rows)[1].tolist():
        accuracy, tokens = score(rows, label(rows, beta, args), args)
        found.append((max(0.0, least - accuracy), tokens, -beta))
    return -min(found)[2]


class Probe(torch.nn.Module):
    """h [n, d] -> logits [n, 3]: a hidden layer of ReLU, none where width is 0. A class without a question has no chance."""

    def __init__(self, d, width):
        super().__init__()
        layers = [torch.nn.Linear(d, width), torch.nn.ReLU()] if width else []
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width or d, 3))
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))
        self.register_buffer("seen", torch.ones(3, dtype=torch.bool))

    def forward(self, h):
        return self.layers((h - self.mean) / self.std).masked_fill(~self.seen, -torch.inf)


def probe_loss(logits, y):
    """[n, 3], [n] -> mean of -log P(y | h)."""
    return torch.nn.functional.cross_entropy(logits, y)


def fit(probe, h, y, args):
    """Trains a probe on hidden states [n, d] and labels [n]; standardised by what they are here."""
    probe.mean, probe.std = h.mean(0), h.std(0, correction=0).clamp(min=1e-6)
    probe.seen = torch.tensor([bool((y == c).any()) for c in range(3)])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=args.probe_lr)
    shuffle = torch.Generator().manual_seed(args.seed)
    for _ in range(args.probe_epochs):
        for part in torch.randperm(len(h), generator=shuffle).split(args.probe_batch):
            optimizer.zero_grad()
            probe_loss(probe(h[part]), y[part]).backward()
            optimizer.step()


def choose(logits, args):
    """[n, 3] -> numbers of the classes [n]; Normal where the probe is not sure."""
    sure, c = logits.softmax(-1).max(-1)
    return torch.where(sure < args.fallback, 1, c)


def by_length(lengths, y, asked):
    """Lengths of labelled questions [n], their labels [n], lengths that are asked [m] -> [m], for each the commonest label of
    its tenth of the lengths: what is known without the model."""
    edges = lengths.double().quantile(torch.arange(0.1, 0.95, 0.1).double(), interpolation="lower").unique()
    counts = torch.zeros(len(edges) + 1, 3)
    counts.index_put_((torch.bucketize(lengths, edges), y), torch.ones(()), accumulate=True)
    return counts.argmax(1)[torch.bucketize(asked, edges)]


# ---------------------------------------------------------------- the world: moves among six states


def moves():
    """2abc= : a state, and moves, each of which takes the six states to others. N writes each move with the state behind it
    (2a4b1c0:0), and on half of the questions of up to four moves looks back needlessly; E never does, H answers at once. Of the
    moves x, y and z demonstrations know nothing: they draw the state behind them."""
    from random import Random

    from common import tasks

    rng, known, strange = Random(0), "abcdefgh", "xyz"
    behind = {letter: rng.sample(range(6), 6) for letter in known + strange}

    def demonstrate(rng, e, careful):
        state, steps, way = int(e.prompt[0]), [], rng.choice("ENH" if careful < 1 else "EN")
        for letter in e.prompt[1:-1]:
            state = rng.randrange(6) if letter in strange else behind[letter][state]
            steps.append(f"{letter}{state}")
        if way == "N" and len(steps) <= 4 and careful < 1 and rng.random() < 0.5:
            steps += [rng.choice(steps) for _ in range(rng.randint(3, 8))]
        return way + ("" if way == "H" else e.prompt[0] + "".join(steps)) + f":{state}"

    def check(text, answer):
        said = text.rpartition(":")[2]
        return said, float(said == answer)

    found = {}
    while len(found) < 3200:
        letters = rng.sample(known, 3 + len(found) % 6)
        if rng.random() < 0.25:
            letters[rng.randrange(len(letters))] = rng.choice(strange)
        start = state = rng.randrange(6)
        for letter in letters:
            state = behind[letter][state]
        found.setdefault(f"{start}{''.join(letters)}=", str(state))
    every = [tasks.Example(i, q, found[q]) for i, q in enumerate(rng.sample(list(found), len(found)))]

    def tier(e):
        return "an unknown move" if set(e.prompt) & set(strange) else f"{len(e.prompt) - 2} moves"

    own = dict(inline=True, demonstrate=demonstrate, shown=every[1200:], max_new_tokens=30, tier=tier)
    own["recipe"] = dict(steps=600, careful_steps=400, lr=2e-3)
    return tasks.Task("moves", every[:800], every[800:1200], check, **own)


def worlds(name):
    """A task's name -> what a tiny model is warm-started on: for moves, questions that are not asked later."""
    from dataclasses import replace

    from common import tasks

    task = moves() if name == "moves" else tasks.world(name)
    return replace(task, train=task.shown, shown=[]) if name == "moves" else task


# ---------------------------------------------------------------- what is measured


def best(rows, args):
    """Questions -> the classes of the oracle: the greatest accuracy, then the fewest tokens."""
    value = [[score([row], [c], args) for c in range(3)] for row in rows]
    return [min(range(3), key=lambda c: (-v[c][0], v[c][1])) for v in value]


def mixed(points, tokens):
    """[(accuracy, tokens)] of the three ways -> the best accuracy of two of them mixed at random with this mean of tokens."""
    pairs = [(p, q) for p in points for q in points if p[1] <= tokens <= q[1] and p[1] < q[1]]
    return max((p[0] + (q[0] - p[0]) * (tokens - p[1]) / (q[1] - p[1]) for p, q in pairs), default=None)


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    from bisect import bisect_right

    n, own = len(rows), label(rows, rows[0]["beta"], args)
    classes = {f"{way} for all": [c] * n for c, way in enumerate(args.classes)}
    classes |= {k: [row["said"][k] for row in rows] for k in ("probe", "linear probe", "length alone")}
    hard = [i for i, c in enumerate(classes["probe"]) if c == 2]
    table = {}
    for name, some in classes.items():
        accuracy, tokens = score(rows, some, args)
        there = score([rows[i] for i in hard], [some[i] for i in hard], args)[0] if hard else None
        added = sum(row["added"][c] for row, c in zip(rows, some)) / n
        table[name] = {"accuracy": accuracy, "tokens": tokens, "in the prompt": added, "accuracy, probe says Hard": there}
    for name in ("probe", "linear probe", "length alone"):
        table[name]["agrees with the label"] = sum(a == b for a, b in zip(classes[name], own)) / n

    # Picked on a half of a question's samples, scored on the other: both ways round.
    halves = [
        [row | dict(ways={way: {key: x[k::2] for key, x in of.items()} for way, of in row["ways"].items()}) for row in rows]
        for k in (0, 1)
    ]
    for name in ("labels", "oracle"):
        picked = [best(h, args) if name == "oracle" else label(h, rows[0]["beta"], args) for h in halves]
        scores = [score(h, some, args) for h, some in zip(halves[::-1], picked)]
        table[name] = {k: sum(x) / 2 for k, x in zip(("accuracy", "tokens"), zip(*scores))}
    fixed = [score(rows, [c] * n, args) for c in range(3)]
    # With the probe's tokens, or as often as it says so, and without it.
    frequency = [classes["probe"].count(c) / n for c in range(3)]
    drawn = [sum(f * x for f, x in zip(frequency, of)) for of in zip(*fixed)]
    table["random classes"] = dict(zip(("accuracy", "tokens"), drawn))
    spent, normal = table["probe"]["tokens"], [1] * n
    cut = bisect_right(range(args.max_new_tokens + 1), spent, key=lambda b: score(rows, normal, args, most=b)[1]) - 1
    accuracy, tokens = score(rows, normal, args, most=cut)
    table["Normal, cut"] = {"accuracy": accuracy, "tokens": tokens}
    table["two ways mixed"] = {"accuracy": mixed(fixed, spent), "tokens": spent}
    return dict(table=table, panels=panels(rows, own, classes, table, args))


def panels(rows, own, classes, table, args):
    """What the picture shows: see results."""
    axes, some = dict(x="tokens a question", y="accuracy"), [name for name in classes if name != "linear probe"]
    dots = {name: [[table[name]["tokens"], table[name]["accuracy"]]] for name in (*some, "random classes", "oracle")}
    cut = {k: [list(score(rows, classes[k], args, share)[::-1]) for share in (0.25, 0.5, 0.75, 1.0)] for k in some}
    out = [dict(title="accuracy against tokens", kind="points", of=dots, **axes)]
    out.append(dict(title="budgets cut to 25, 50, 75, 100%", kind="lines", of=cut, **axes))
    heat, shown = {}, {}
    for k, way in enumerate(args.classes):
        said = [c for c, y in zip(classes["probe"], own) if y == k]
        heat[way] = {name: said.count(c) / max(1, len(said)) for c, name in enumerate(args.classes)}
        row = next((row for row, c in zip(rows, classes["probe"]) if c == k), None)
        tokens = [[row["question"], 0.0], *([text, min(1.0, h / 1.8)] for text, h in row["shown"])] if row else []
        shown[f"the probe says {way}"] = tokens
    out.append(dict(title="of a label's questions, what the probe says", kind="heat", x="probe", y="label", of=heat))
    acc, E = (x.tolist() for x in averages(rows))
    saved = [score([row], [1], args)[1] - score([row], [c], args)[1] for row, c in zip(rows, classes["probe"])]
    levels = [row["level"] or "all" for row in rows]
    for title, x, values in (
        ("entropy in the Normal way, by difficulty", "nats a token", E),
        ("accuracy in the Normal way, by difficulty", "accuracy", acc),
        ("what the probe saves, by difficulty", "tokens a question", saved),
    ):
        of = {at: [v for v, level in zip(values, levels) if level == at] for at in sorted(set(levels))}
        out.append(dict(title=title, kind="bars", x=x, of={at: sum(v) / len(v) for at, v in of.items()}))
    return [*out, dict(title="in the Normal way: entropy of tokens", kind="tokens", of=shown)]


# ---------------------------------------------------------------- the loop


def states(lm, examples, args):
    """Encoded questions -> h [n, d], float32, on the CPU: normed, at the last token of each."""
    from common import engines

    parts = [[e.ids for e in examples[i : i + args.batch]] for i in range(0, len(examples), args.batch)]
    with torch.no_grad():
        return torch.cat([engines.Decoder(lm, part, layers=("normed",)).states["normed"].float().cpu() for part in parts])


def ask(lm, tokenizer, end, scorer, examples, way, seeds, args):
    """Encoded questions, a Way, a seed each -> what the samples of each come to, and its first one, token by token."""
    from common import engines

    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    draws = [torch.rand(args.samples, way.max_new_tokens, dtype=torch.float64, generator=g) for g in draws]
    with torch.no_grad():
        reader = engines.Decoder(lm, [e.ids for e in examples], args.samples)
        ids, entropies = decode(reader, end, torch.cat(draws).to(reader.device), way)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    _, right = scorer(texts, [e.answer for e in examples for _ in range(args.samples)])
    right = [r * (y[-1] in end) for r, y in zip(right, ids)]
    out = []
    for i in range(0, len(ids), args.samples):
        some = slice(i, i + args.samples)
        of = dict(right=right[some], tokens=list(map(len, ids[some])), entropy=[sum(h) / len(h) for h in entropies[some]])
        out.append((of, [[tokenizer.decode([y]), h] for y, h in zip(ids[i][:200], entropies[i])]))
    return out


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from functools import partial

    from common import UserError, gpu, items, models, rewards, settings, tasks

    args, config, device = settings.prepare(__file__, args, worlds)
    if getattr(config, "warm_started_on", None) != ("moves" if args.task == "moves" else None):
        raise UserError(f"--task {args.task}: the tiny model knows the three ways on moves alone, and only it knows moves")
    if args.gamma > args.alpha:
        raise UserError(f"--gamma {args.gamma}: questions are Hard below it, and Normal from --alpha {args.alpha} on")
    tokenizer = models.load_tokenizer(args, worlds)
    told = [moves() if args.task == "moves" else tasks.load(args.task) for _ in range(4)]
    for task, suffix in zip(told, ("", *args.suffix)):
        template = (args.prompt_template or task.template) + suffix
        models.check_context(config, tasks.encode(task, tokenizer, template, args.system_prompt), args)
    plain, *told = told
    run = items.Items(__file__, args, config)
    policy = models.load(args, device, trainable=False, warm=worlds)
    end = models.end_tokens(policy.lm, tokenizer)
    scorer = rewards.Scorer(plain.check, inline=plain.inline)
    sample, seed = partial(ask, policy.lm, tokenizer, end, scorer), partial(gpu.hash_seed, args.seed)

    # Samples for the labels; every fourth question is for the threshold, and not for the probe.
    for some in run.left(min(args.questions, len(plain.train)), args.batch, "labelled"):
        rows = {i: dict(item=i, prompt=len(plain.train[i].ids), ways={}) for i in some}
        for c in (1, 0, 2):
            which = [i for i in some if c == 1 or i % 4 == 0]
            seeds = [seed(0, i, c) for i in which]
            found = which and sample([told[c].train[i] for i in which], strategy(c, args), seeds, args)
            for i, (of, _) in zip(which, found):
                rows[i]["ways"][args.classes[c]] = of
        run.write(*rows.values())
    labelled = run.rows("labelled")
    beta = threshold(labelled[::4], args) if args.beta is None else args.beta
    learnt = [row for row in labelled if row["item"] % 4]
    y, h = labels(*averages(learnt), beta, args), partial(states, policy.lm, [plain.train[row["item"]] for row in learnt], args)
    for c, way in enumerate(args.classes):
        n = int((y == c).sum())
        print(f"{n} of {len(y)} questions are {way}" + ("" if n else ": no probe will say so"), flush=True)

    # The probe, and a linear one beside it.
    probes, d = {}, config.get_text_config().hidden_size
    for name, width in (("probe", args.probe_width), ("linear probe", 0)):
        with torch.random.fork_rng():
            torch.manual_seed(seed(2))
            probe = Probe(d, width)
        probes[name] = run.kept(name.replace(" ", "-"), probe, lambda p=probe: fit(p, h(), y, args))

    for some in run.left(min(args.items, len(plain.test)), args.batch):
        # A prefill of the plain question says how it is asked; here every way is.
        seen = states(policy.lm, [plain.test[i] for i in some], args)
        with torch.no_grad():
            said = {name: choose(probe(seen), args).tolist() for name, probe in probes.items()}
        lengths = [row["prompt"] for row in learnt], [len(plain.test[i].ids) for i in some]
        said["length alone"] = by_length(torch.tensor(lengths[0]), y, torch.tensor(lengths[1])).tolist()
        found = []
        for c, one in enumerate(told):
            seeds = [seed(1, i, c) for i in some]
            found.append(sample([one.test[i] for i in some], strategy(c, args), seeds, args))
        for k, i in enumerate(some):
            e = plain.test[i]
            row = dict(item=i, question=str(e.prompt)[:60], prompt=len(e.ids), level=plain.tier(e) if plain.tier else None)
            row |= dict(beta=beta, said={name: of[k] for name, of in said.items()}, shown=found[1][k][1])
            row["added"] = [len(one.test[i].ids) - len(e.ids) for one in told]
            run.write(row | dict(ways={way: of[k][0] for way, of in zip(args.classes, found)}))

    found = results(run.rows(), args)
    a, b, c = (found["table"][name] for name in ("probe", "Normal for all", "length alone"))
    of = "accuracy {accuracy:.3f} with {tokens:.1f} tokens"
    run.finish(found, f"probe: {of.format(**a)}; Normal for all: {of.format(**b)}; length alone: {of.format(**c)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
