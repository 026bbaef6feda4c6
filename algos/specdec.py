"""Speculative decoding: "Fast Inference from Transformers via Speculative Decoding". Leviathan, Kalman and Matias, arXiv
2211.17192 (ICML 2023); the same in "Accelerating Large Language Model Decoding with Speculative Sampling". Chen, Borgeaud,
Irving, Lespiau, Sifre and Jumper, arXiv 2302.01318.

Idea: a small draft model writes a few tokens ahead, and the large target model reads them all in one call. Each is kept with a
probability that depends on both laws, the first that is not kept is replaced by a draw from what the draft gave too little
to, and the text has exactly the target's law. How far to draft is the one choice: what is drafted behind a rejection is lost.

Rule (equation numbers not at hand), q_i and p_i: laws of draft and target behind the same text, Y_i drawn from q_i:
    keep Y_i where u_i < a_i = min(1, p_i(Y_i) / q_i(Y_i)), up to the first that is not kept
    behind a rejection at i the next token has the law (p_i - q_i)_+ / sum (p_i - q_i)_+, behind k kept ones p_(k+1)
    fixed: draft k = K tokens;   confidence: until q_i(Y_i) < c, and --most at most

Beside the two rates, calls of the target and drafted tokens thrown away, both for each token of the text, stands a modelled
time: calls of the target plus c times those of the draft, for each token; plain decoding has 1. Seconds are not measured: a
tiny target is no slower than its draft. The confidence rule is a common heuristic and in neither paper.

Family: inference
Differs from decode.py in: decode, acceptance, residual, verify, read_on, uniform, stop, propose, arms, rates, results, main
Measures: results, rates
Costs: the draft model beside the target; a call of the target for each round, of the draft for each candidate.
Run:   python algos/specdec.py                                  CPU, a minute
       python algos/specdec.py --temperature 0
       python algos/specdec.py --lengths 2 3 5 --confidences 0.3
       python algos/specdec.py --model qwen2.5-7b-instruct --draft qwen2.5-0.5b-instruct
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
    items: int = 256
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

    # Speculative decoding
    limits = dict(items="1 <= x", temperature="0 <= x", lengths="1 <= x", confidences="x <= 1", most="1 <= x")
    tiny_preset = dict(task="addition", draft="tiny-small")
    real_preset = dict(draft="qwen2.5-0.5b-instruct")
    draft: str | None = None
    """the small model, whose tokens have to be the target's (ours; papers: 100 times smaller and more)"""
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    """K of the fixed rule, each compared (paper: 1 to 10)"""
    confidences: tuple[float, ...] = (0.5, 0.8, 0.95)
    """c of the confidence rule, each compared (ours)"""
    costs: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """what a call of the draft costs, in calls of the target: for the modelled times (paper: 0.02 to 0.11)"""
    most: int = 20
    """candidates in a round at most, where the rule gives no number (ours)"""


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


def stop(arm, ids, chances, args):
    """Whether drafting ends behind candidates with these probabilities under the draft; arm: (rule, its number)."""
    rule, number = arm
    return len(ids) >= (number if rule == "fixed" else args.most) or rule == "confidence" and chances[-1] < number


def propose(draft, text, arm, end, room, draws, V, args):
    """Candidates behind a text, at most `room` -> their ids [k] and the draft's laws [k, V]."""
    ids, laws, chances = [], [], []
    while True:
        laws.append(law(read_on(draft, text + ids, 1, V)[0], args).cpu())
        ids.append(pick(laws[-1], uniform(draws)))
        chances.append(laws[-1][ids[-1]].item())
        if ids[-1] in end or len(ids) >= room or stop(arm, ids, chances, args):
            return ids, torch.stack(laws)


def uniform(draws):
    """One number in [0, 1)."""
    return torch.rand((), dtype=torch.float64, generator=draws).item()


def decode(target, draft, prompt, arm, end, draws, V, args):
    """Two Decoders that have read all of a prompt but its last token -> the completion's ids; for each the probability by
    which it was kept (None: the target's own); and how often both were called."""
    ids, kept, count = [], [], dict(rounds=0, drafted=0, thrown=0)
    while len(ids) < args.max_new_tokens and not (ids and ids[-1] in end):
        room = args.max_new_tokens - len(ids)
        candidates, q = propose(draft, prompt + ids, arm, end, room, draws, V, args)
        k = len(candidates)
        p = law(read_on(target, prompt + ids + candidates, k + 1, V), args).cpu()
        n, behind, chance = verify(p, q, candidates, [uniform(draws) for _ in candidates])
        ids, kept = ids + candidates[:n], kept + chance[:n].tolist()
        count = dict(rounds=count["rounds"] + 1, drafted=count["drafted"] + k, thrown=count["thrown"] + k - n)
        if len(ids) < args.max_new_tokens and not (n and ids[-1] in end):
            ids, kept = [*ids, pick(behind, uniform(draws))], [*kept, None]
    return ids, kept, count


def arms(args):
    """{name: (rule, its number)} of what is compared."""
    fixed = {f"K = {k}": ("fixed", k) for k in args.lengths}
    return fixed | {f"confidence {c:g}": ("confidence", c) for c in args.confidences}


# ---------------------------------------------------------------- what is measured


def rates(counts, args):
    """[{rounds, drafted, thrown, tokens}] of an arm's items -> its row of the table."""
    total = {key: sum(c[key] for c in counts) for key in counts[0]}
    found = {name: total[key] / total["tokens"] for name, key in (("target calls", "rounds"), ("thrown away", "thrown"))}
    found["drafted"] = total["drafted"] / total["tokens"]
    found |= {f"time at {c:g}": found["target calls"] + c * found["drafted"] for c in args.costs}
    return found


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py. All numbers are for each token of the text."""
    names = arms(args)
    table = {name: rates([row["counts"][name] for row in rows], args) for name in names}
    plain = {"target calls": 1.0, "thrown away": 0.0, "drafted": 0.0} | {f"time at {c:g}": 1.0 for c in args.costs}
    rules = {rule: [name for name, arm in names.items() if arm[0] == rule] for rule, _ in names.values()}
    plane = {rule: [[table[n]["target calls"], table[n]["thrown away"]] for n in of] for rule, of in rules.items()}
    times = {name: [[c, table[name][f"time at {c:g}"]] for c in args.costs] for name in names}
    right = {name: {"accuracy": sum(row["right"][name] for row in rows) / len(rows)} for name in names}
    shown = {f"{name}: {row['asked']}"[:28]: row["pieces"][name] for row in rows[:2] for name in list(names)[2:5:2]}
    panels = [
        dict(title="what a rule costs, per token", kind="lines", x="target calls", y="drafted and thrown away", of=plane),
        dict(title="modelled time, plain decoding = 1", kind="lines", x="a draft call, in target calls", y="time", of=times),
        dict(title="how likely a token was kept (dark: written by the target)", kind="tokens", of=shown),
    ]
    return dict(table={"plain decoding": plain} | {n: right[n] | table[n] for n in names}, panels=panels)


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, engines, gpu, items, models, rewards, settings, tasks

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

    for i in run.left(args.items):
        example, counts, texts, pieces, right = task.test[i % len(task.test)], {}, {}, {}, {}
        for j, (name, arm) in enumerate(arms(args).items()):
            draws = torch.Generator().manual_seed(gpu.hash_seed(args.seed, i, j))
            with torch.no_grad():
                both = (engines.Decoder(p.lm, [example.ids[:-1]]) for p in (policy, draft))
                ids, kept, count = decode(*both, example.ids, arm, end, draws, V, args)
            counts[name] = dict(count, tokens=len(ids))
            texts[name] = tokenizer.decode(ids, skip_special_tokens=True)
            pieces[name] = [[tokenizer.decode([y]), 1 if a is None else (1 - a) / 2] for y, a in zip(ids, kept)]
            _, (score,) = scorer([texts[name]], [example.answer])
            right[name] = score * (ids[-1] in end)
        run.write(dict(item=i, asked=example.prompt, texts=texts, right=right, counts=counts, pieces=pieces))

    found = results(run.rows(), args)
    cost = args.costs[len(args.costs) // 2]
    best = min(arms(args), key=lambda name: found["table"][name][f"time at {cost:g}"])
    row = found["table"][best]
    said = f"{best}: {row['target calls']:.2f} target calls and {row['thrown away']:.2f} thrown-away candidates per token"
    time = f"modelled time {row[f'time at {cost:g}']:.2f} of plain decoding's"
    run.finish(found, f"{said}; {time} where a draft call costs {cost:g} of the target's")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
