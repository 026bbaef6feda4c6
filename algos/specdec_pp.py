"""SpecDec++: "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths". Huang, Guo and Wang, arXiv 2405.19715
(COLM 2025).

Idea: in speculative decoding the draft model should stop as soon as one of its candidates has probably been rejected, which
a small head can tell from the states that the draft has anyway. The head reads the draft's last state at each candidate and
says how probable it is that the target keeps it, and drafting ends where the product over the round has become too small.
How a candidate is verified does not change, so the text still has exactly the target's law, whatever the head says.

Rule (equation numbers not at hand), with u_i: the draft's last state where Y_i is its input, a_i = min(1, p_i(Y_i) / q_i(Y_i)):
    stop behind s candidates where 1 - prod_(i < s) a^_i > h, s >= --least,   or where s = --most;   a^_i = softmax(f(u_i))_1
    f: D times u <- u + SiLU(W u + b), then two logits;   loss of f, l^0 and l^1 its log-softmax, w = 6, over labelled tokens:
    L = sum_i (-w (1 - a_i) l^0_i - a_i l^1_i) / sum_i (w (1 - a_i) + a_i)
a^ and a are probabilities to be kept: larger = surer. To stop is best where the chance of a rejection is at least
(c2 + Delta) / (c1 + c2 + Delta), c1 and c2 the costs of a candidate in vain and of a call of the target: h stands for that.

Labels: texts X of the target, Y_i drawn by the draft behind X_(<i), a_i from both laws there. The draft then reads X with Y_i
in X_i's place but for a share r = 0.15, which has no label. A label lies on the token's own position, as in decoding, where
the state at a candidate is there only when the next one is drafted: the newest is sent unjudged. A head with w > 1 says less
than a: w undone is a^ w / (1 - a^ + a^ w). Beside fixed K and the confidence rule, which the paper does not compare, stands
an oracle: the same stopping rule with the true a_i, by calls of the target that are not counted; the head's are not, either.

The released head repeats one block, so that all D have the same weights (--tie-head-layers); here each has its own. Ours:
a minibatch is the same --head-batch texts in every epoch, and for the tiny model the rate and the number of epochs.

Family: inference
Differs from specdec.py in: items, AcceptanceHead, head_loss, labelled, fit_head, judge, stop, propose, decode, arms, main
Measures: results, rates, products
Costs: once, --label-samples texts of the target, and two passes of the draft and one of the target over them, whose states
       are kept in memory; then the small head for each candidate.
Run:   python algos/specdec_pp.py                               CPU, two minutes
       python algos/specdec_pp.py --rejection-weight 1          a head whose loss is not weighted
       python algos/specdec_pp.py --thresholds 0.7 --tie-head-layers True
       python algos/specdec_pp.py --model qwen2.5-7b-instruct --draft qwen2.5-0.5b-instruct
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """alias (qwen2.5-7b, llama-3.2-1b, ...), hub id or folder; tiny: a small model made and warm-started here"""
    task: str | None = None
    """gsm8k, math, a built-in task, reasoning_gym:NAME, or a .jsonl file of prompts and answers; held-out prompts are asked"""
    prompt_template: str | None = None
    """format string with {prompt}, such as "Q: {prompt}\\nA:"; None: the task's"""
    system_prompt: str | None = None
    """put before the prompt where the tokenizer has a chat template"""
    seed: int = 1
    """of the uniform numbers"""
    items: int = 128
    """completions in all, one a prompt, from the first held-out prompt on"""
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    temperature: float = 1.0
    """of sampling; 0: the likeliest token"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the weights"""

    # SpecDec++
    limits = dict(
        items="1 <= x", temperature="0 <= x", lengths="1 <= x", confidences="x <= 1", most="1 <= x", thresholds="x <= 1",
        least="1 <= x", head_depth="1 <= x", rejection_weight="0 < x", mixing="0 <= x < 1", label_samples="1 <= x",
        head_epochs="1 <= x", head_batch="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(task="addition", draft="tiny-small", label_samples=4000, head_epochs=20, head_lr=3e-3)
    real_preset = dict(draft="qwen2.5-0.5b-instruct", label_samples=4000, head_epochs=3, head_lr=5e-5)
    draft: str | None = None
    """the small model, whose tokens have to be the target's (ours; paper: Llama-2-chat 7B for 70B)"""
    lengths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """K of the fixed rule, each compared (ours; paper: the best K of each data set)"""
    confidences: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.95)
    """c of the confidence rule, each compared (ours)"""
    thresholds: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """h of the head and of the oracle, each compared (paper: swept, 0.7 for all data; code: 0.3 and 0.7)"""
    costs: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """what a call of the draft costs, in calls of the target: for the modelled times (ours)"""
    least: int = 2
    """candidates in a round at least, for head and oracle (code)"""
    most: int = 20
    """candidates in a round at most, where the rule gives no number (code)"""
    head_depth: int = 3
    """D, residual blocks of the head (paper: swept, 3 for all data)"""
    tie_head_layers: bool = False
    """one block's weights for all D (code)"""
    rejection_weight: float = 6.0
    """w of the loss (paper: of 1, 3, 6, 12)"""
    mixing: float = 0.15
    """r, share of the target's own tokens in what the draft reads for the labels (paper)"""
    label_samples: int | None = None
    """texts of the target for the labels (ours; paper: 40,000)"""
    head_epochs: int | None = None
    """passes over the labels (paper: 3; tiny: ours)"""
    head_lr: float | None = None
    """AdamW's rate, warmed up over 3%, then a cosine (code: its library's 5e-5; tiny: ours)"""
    head_batch: int = 32
    """texts in a minibatch (code)"""


# ---------------------------------------------------------------- the rule


def law(logits, args):
    """Logits [..., V] -> probabilities of the next token [..., V], float64; at temperature 0 all on the likeliest."""
    if args.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return (logits.double() / args.temperature).softmax(-1)


def pick(p, u):
    """Probabilities [V], a uniform number in [0, 1) -> the token at which their running sum passes it."""
    running = p.cumsum(-1)
    return int(torch.searchsorted(running, u * running[-1], right=True).clamp(max=len(p) - 1))


def acceptance(p, q):
    """Probabilities that target and draft give to a drafted token -> the probability to keep it."""
    return (p / q).clamp(max=1.0)


def residual(p, q):
    """Laws [V] of target and draft behind the same text -> the law [V] of the token in a rejected one's place."""
    more = (p - q).clamp(min=0)
    return more / more.sum() if more.any() else p


def verify(p, q, ids, uniforms):
    """Laws of the target [k + 1, V] and of the draft [k, V], candidates [k], k uniform numbers -> how many are kept, the law of
    the token behind them [V], and the probability to keep each [k]."""
    at = torch.tensor(ids)
    chance = acceptance(p[:-1].gather(1, at[:, None])[:, 0], q.gather(1, at[:, None])[:, 0])
    for i, u in enumerate(uniforms):
        if u >= chance[i]:
            return i, residual(p[i], q[i]), chance
    return len(ids), p[-1], chance


def read_on(reader, text, n, V):
    """A Decoder that has read a beginning of a text, and perhaps something else than its last n tokens behind that -> the
    logits [n, V] behind each of these, after reading what it had not."""
    there = reader.attention.shape[1]
    reader.crop(max(0, there - (len(text) - n)))
    new = text[reader.attention.shape[1] :]
    return reader.feed(torch.tensor([new], device=reader.device), every=True)[0, -n:, :V]


class AcceptanceHead(torch.nn.Module):
    """f: the draft's last states [..., H] -> two logits [..., 2], of rejected and kept."""

    def __init__(self, width, args):
        super().__init__()
        self.depth, own = args.head_depth, 1 if args.tie_head_layers else args.head_depth
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(own))
        self.out = torch.nn.Linear(width, 2)

    def forward(self, u):
        u = u.float()
        for i in range(self.depth):
            u = u + torch.nn.functional.silu(self.blocks[i % len(self.blocks)](u))
        return self.out(u)


def head_loss(logits, a, mask, weight):
    """Logits [..., 2], labels a [...], which of them count [...] -> L, 0 where none does."""
    rejected, kept = logits.log_softmax(-1).unbind(-1)
    w0, w1 = weight * (1 - a) * mask, a * mask
    return -(w0 * rejected + w1 * kept).sum() / (w0 + w1).sum().clamp(min=1e-12)


def labelled(target, draft, batch, uniforms, V, args):
    """Policies; texts X of the target, uniform numbers [b, T, 2] -> the draft's states [b, T, H], labels a [b, T], and which
    positions have one [b, T]."""

    def candidates(u, q, p):
        q, p = law(q[:, :V], args), law(p[:, :V], args)
        running = q.cumsum(-1)
        y = torch.searchsorted(running, u[:, :1] * running[:, -1:], right=True).clamp(max=V - 1)
        return y[:, 0], acceptance(p.gather(1, y), q.gather(1, y))[:, 0]

    how, x = (batch.attention_mask, batch.mask), batch.ids[:, -batch.mask.shape[1] :]
    y, a = draft(batch.ids, *how, read=candidates, beside=[target], given=uniforms)
    own = batch.mask & (uniforms[:, :, 1] >= args.mixing)
    mixed = torch.cat([batch.ids[:, : -x.shape[1]], y.where(own, x)], 1)
    # "normed": behind the final norm, what the draft's own head reads; at: at the token's own position. As in judge().
    return draft(mixed, *how, layers=["normed"], at=True)[-1], a.float(), own


def fit_head(head, parts, order, args):
    """Minimises the loss over minibatches of (states, labels, which count), in this order [epochs, minibatches]."""
    optimizer, steps = torch.optim.AdamW(head.parameters(), lr=args.head_lr), order.numel()
    pace = dict(total_steps=steps, pct_start=0.03, cycle_momentum=False)  # warm-up, then a cosine
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.head_lr, **pace)
    for i in order.flatten().tolist():
        states, a, mask = parts[i]
        head_loss(head(states), a, mask, args.rejection_weight).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def judge(rule, head, target, draft, text, y, q, V, args):
    """How probable it is that the candidate y behind a text, which the draft has just read, and gave q, is kept."""
    if rule == "head":
        return head(draft.states["normed"][0]).softmax(-1)[1].item()
    return acceptance(law(read_on(target, text, 1, V)[0], args)[y], q).item()  # the oracle asks the target


def stop(arm, ids, chances, whole, args):
    """Whether drafting ends behind candidates with these probabilities under the draft; whole: how probable it is that all but
    the newest are kept; arm: (rule, its number)."""
    rule, number = arm
    if rule in ("head", "oracle") and len(ids) >= args.least and 1 - whole > number:
        return True
    return len(ids) >= (number if rule == "fixed" else args.most) or rule == "confidence" and chances[-1] < number


def propose(target, draft, head, text, arm, end, room, draws, V, args):
    """Candidates behind a text, at most `room` -> their ids [k], the draft's laws [k, V], and, where the rule judges them, how
    probable it found each but the newest."""
    ids, laws, chances, judged, whole = [], [], [], [], 1.0
    while True:
        laws.append(law(read_on(draft, text + ids, 1, V)[0], args).cpu())
        if ids and arm[0] in ("head", "oracle"):
            judged.append(judge(arm[0], head, target, draft, text + ids[:-1], ids[-1], chances[-1], V, args))
            whole *= judged[-1]
        ids.append(pick(laws[-1], uniform(draws)))
        chances.append(laws[-1][ids[-1]].item())
        if ids[-1] in end or len(ids) >= room or stop(arm, ids, chances, whole, args):
            return ids, torch.stack(laws), judged


def uniform(draws):
    """One number in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=draws).item()


def decode(target, draft, head, prompt, arm, end, draws, V, args):
    """Two Decoders that have read all of a prompt but its last token -> the completion's ids; for each the probability by
    which it was kept (None: the target's own); how often both were called; and of each round what its candidates were judged
    to be and how many were kept."""
    ids, kept, count, rounds = [], [], dict(rounds=0, drafted=0, thrown=0), []
    while len(ids) < args.max_new_tokens and not (ids and ids[-1] in end):
        room = args.max_new_tokens - len(ids)
        candidates, q, judged = propose(target, draft, head, prompt + ids, arm, end, room, draws, V, args)
        k = len(candidates)
        p = law(read_on(target, prompt + ids + candidates, k + 1, V), args).cpu()
        n, behind, chance = verify(p, q, candidates, [uniform(draws) for _ in candidates])
        ids, kept, rounds = ids + candidates[:n], kept + chance[:n].tolist(), [*rounds, [judged, n]]
        count = dict(rounds=count["rounds"] + 1, drafted=count["drafted"] + k, thrown=count["thrown"] + k - n)
        if len(ids) < args.max_new_tokens and not (n and ids[-1] in end):
            ids, kept = [*ids, pick(behind, uniform(draws))], [*kept, None]
    return ids, kept, count, rounds


def arms(args):
    """{name: (rule, its number)} of what is compared."""
    fixed = {f"K = {k}": ("fixed", k) for k in args.lengths}
    fixed |= {f"confidence {c:g}": ("confidence", c) for c in args.confidences}
    return fixed | {f"{rule} {h:g}": (rule, h) for rule in ("head", "oracle") for h in args.thresholds}


# ---------------------------------------------------------------- what is measured


def rates(counts, args):
    """[{rounds, drafted, thrown, tokens}] of an arm's items -> its row of the table."""
    total = {key: sum(c[key] for c in counts) for key in counts[0]}
    found = {name: total[key] / total["tokens"] for name, key in (("target calls", "rounds"), ("thrown away", "thrown"))}
    found["drafted"] = total["drafted"] / total["tokens"]
    found |= {f"time at {c:g}": found["target calls"] + c * found["drafted"] for c in args.costs}
    return found


def products(rounds, w):
    """[[what its candidates were judged to be, how many were kept]] of rounds -> [(product, whether all are kept)] of every
    beginning of a round, each factor with the loss's weight w undone."""
    out = []
    for judged, n in rounds:
        whole = 1.0
        for i, a in enumerate(judged):
            whole *= a * w / (1 - a + a * w)
            out.append((whole, n > i))
    return out


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py. Rates and times are for each token of the text."""
    from common import measures

    names = arms(args)
    table = {name: rates([row["counts"][name] for row in rows], args) for name in names}
    plain = {"target calls": 1.0, "thrown away": 0.0, "drafted": 0.0} | {f"time at {c:g}": 1.0 for c in args.costs}
    rules = {rule: [name for name, arm in names.items() if arm[0] == rule] for rule, _ in names.values()}
    plane = {rule: [[table[n]["target calls"], table[n]["thrown away"]] for n in of] for rule, of in rules.items()}
    by_h = {f"{c:g}": [[names[n][1], table[n][f"time at {c:g}"]] for n in rules["head"]] for c in args.costs}
    right = {name: {"accuracy": sum(row["right"][name] for row in rows) / len(rows)} for name in names}
    alike = {"as fitted": [], f"w = {args.rejection_weight:g} undone": []}
    for name in rules["head"]:
        rounds = [x for row in rows for x in row["rounds"][name]]
        of = [products(rounds, w) for w in (1, args.rejection_weight)]
        table[name] |= {c: measures.ece(*zip(*x)) if x else None for c, x in zip(("ECE", "ECE, w undone"), of)}
        alike = {label: before + x for (label, before), x in zip(alike.items(), of)}
    lines = {label: [[x, y] for x, y, _ in measures.reliability(*zip(*of))] if of else [] for label, of in alike.items()}
    middle = [of[len(of) // 2] for of in rules.values()]
    shown = {f"{name}: {row['asked']}"[:28]: row["pieces"][name] for row in rows[:2] for name in middle}
    price, whole = "modelled time of the head, by a draft call's cost", "the head's product, and rounds that are still whole"
    panels = [
        dict(title="what a rule costs, per token", kind="lines", x="target calls", y="drafted and thrown away", of=plane),
        dict(title=price, kind="lines", x="threshold h", y="time, plain decoding = 1", of=by_h),
        dict(title=whole, kind="lines", x="product", y="share with all kept", of=lines, diagonal=True),
        dict(title="how likely a token was kept (dark: written by the target)", kind="tokens", of=shown),
    ]
    return dict(table={"plain decoding": plain} | {n: right[n] | table[n] for n in names}, panels=panels)


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, batch, engines, gpu, items, models, rewards, settings, tasks

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt)
    models.check_context(config, task, args)
    small = Args(**vars(args) | dict(model=args.draft))
    if models.load_tokenizer(small).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--draft {args.draft}: its tokens are not those of --model {args.model}")
    if short := [e.prompt for e in task.test if len(e.ids) < 2]:
        raise UserError(f"the prompt {short[0]!r} is one token; there have to be two")
    run = items.Items(__file__, args, config)
    policy, draft = (models.load(which, device, trainable=False) for which in (args, small))
    V = min(policy.lm.config.vocab_size, draft.lm.config.vocab_size)  # rows behind the last token are padding
    end = models.end_tokens(policy.lm, tokenizer)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    with torch.random.fork_rng():
        torch.manual_seed(gpu.hash_seed(args.seed, 0))
        head = AcceptanceHead(draft.lm.config.hidden_size, args)

    def fit():
        asked = [task.train[i % len(task.train)].ids for i in range(args.label_samples)]
        streams = [[gpu.hash_seed(args.seed, i, 0, k) for i in range(len(asked))] for k in (1, 2)]
        told = engines.HF(policy, tokenizer).generate(asked, 1, args.max_new_tokens, args.temperature, streams[0])
        rows, parts = [(x, y, s) for x, (y, *_), s in zip(asked, told, streams[1]) if max(y) < V], []
        for first in range(0, len(rows), args.head_batch):
            *texts, numbers = zip(*rows[first : first + args.head_batch])
            some = batch.collate(list(zip(*texts)), tokenizer.pad_token_id, device)
            draws = [torch.Generator().manual_seed(s) for s in numbers]
            uniforms = torch.stack([torch.rand(some.mask.shape[1], 2, dtype=torch.float64, generator=g) for g in draws])
            with torch.no_grad():
                parts.append(labelled(policy, draft, some, uniforms.to(device), V, args))
        draws = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 1))
        order = torch.stack([torch.randperm(len(parts), generator=draws) for _ in range(args.head_epochs)])
        fit_head(head, parts, order, args)

    head = run.kept("head", head.to(device), fit)
    for i in run.left(args.items):
        example, counts, texts, pieces, right, rounds = task.test[i % len(task.test)], {}, {}, {}, {}, {}
        for j, (name, arm) in enumerate(arms(args).items()):
            draws = torch.Generator().manual_seed(gpu.hash_seed(args.seed, i, j))
            with torch.no_grad():
                both = (engines.Decoder(p.lm, [example.ids[:-1]], layers=["normed"]) for p in (policy, draft))
                ids, kept, count, judged = decode(*both, head, example.ids, arm, end, draws, V, args)
            counts[name] = dict(count, tokens=len(ids))
            texts[name] = tokenizer.decode(ids, skip_special_tokens=True)
            pieces[name] = [[tokenizer.decode([y]), 1 if a is None else (1 - a) / 2] for y, a in zip(ids, kept)]
            _, (score,) = scorer([texts[name]], [example.answer])
            right[name] = score * (ids[-1] in end)
            rounds |= {name: judged} if arm[0] == "head" else {}
        run.write(dict(item=i, asked=example.prompt, texts=texts, right=right, counts=counts, pieces=pieces, rounds=rounds))

    found = results(run.rows(), args)
    cost = args.costs[len(args.costs) // 2]
    time = {name: row[f"time at {cost:g}"] for name, row in found["table"].items()}
    rules = ("head", "fixed", "confidence", "oracle")
    best = [min((name for name, arm in arms(args).items() if arm[0] == rule), key=time.get) for rule in rules]
    said = "; ".join(f"{name}: {time[name]:.3f}" for name in best)
    run.finish(found, f"modelled time where a draft call costs {cost:g} of the target's, each rule at its best: {said}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
