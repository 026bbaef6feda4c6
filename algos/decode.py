"""Decoding: a causal language model sampled one token at a time, with what it has read kept in a cache. The root of papers
that change how a text is drawn, and not the model: no gradient is taken here.

Idea: a language model gives the law of the next token, one uniform number picks a token from it, and the token is read in
turn. A transformer's keys and values of what was read do not change, so they are kept, and a call reads the new token alone.
A text is then a function of its own numbers, one for each token, and papers can be compared number by number.

Rule (equation numbers not at hand), with uniform numbers u_1, u_2, ... of the item:
    y_t = pick(p_t, u_t) = min {v: sum_(w <= v) p_t(w) > u_t},   p_t = softmax(logits(x, y_<t) / temperature)
    until y_t ends the completion or t = --max-new-tokens;   temperature 0: p_t is 1 on the likeliest token

Measured for every item: the answer; how often the model was called and how many positions it read, with the cache and as
it would be without; and the greatest gap between a token's probability when it was drawn and the same from one pass over
the whole text, which the cache must leave at rounding.

Family: inference
Base: speculative decoding (specdec.py), and what steers or constrains the next token, stand on it.
Costs: a call of the model for every token, one after the other.
Run:   python algos/decode.py                                   CPU, seconds
       python algos/decode.py --temperature 0
       python algos/decode.py --model qwen2.5-0.5b
       python algos/decode.py --model path/to/folder --task path/to/test.jsonl --items 100
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

    # Decoding
    limits = dict(items="1 <= x", temperature="0 <= x")
    tiny_preset = dict(task="addition")


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


def decode(reader, end, uniforms, args):
    """A Decoder that has read a prompt, ids that end a completion, uniform numbers [max_new_tokens] -> the completion's ids
    and their probabilities."""
    ids, chances = [], []
    for u in uniforms:
        p = law(reader.logits[0], args)
        ids.append(pick(p, u))
        chances.append(p[ids[-1]].item())
        if ids[-1] in end or len(ids) == args.max_new_tokens:
            break
        reader.feed(torch.tensor([ids[-1]], device=reader.device))
    return ids, chances


# ---------------------------------------------------------------- what is measured


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    tokens, lengths = sum(row["tokens"] for row in rows), range(1, max(row["tokens"] for row in rows) + 1)
    prompt = sum(row["prompt"] for row in rows) / len(rows)
    table = {}
    for name in ("with a cache", "without"):
        read = sum(row["read"] if name == "with a cache" else row["read_anew"] for row in rows)
        table[name] = {"positions read per token": read / tokens, "calls per token": sum(r["calls"] for r in rows) / tokens}
    table["with a cache"] |= {"greatest gap to one pass": max(row["gap"] for row in rows)}
    table["with a cache"] |= {"accuracy": sum(row["right"] for row in rows) / len(rows), "tokens": tokens / len(rows)}
    kept = [[n, prompt + n - 1] for n in lengths]
    anew = [[n, n * prompt + n * (n - 1) / 2] for n in lengths]
    found = dict(title="positions read until the n-th token", kind="lines", x="n", y="positions")
    lasting = [[n, sum(row["tokens"] >= n for row in rows) / len(rows)] for n in lengths]
    going = dict(title="completions that have an n-th token", kind="lines", x="n", y="share", of={"share": lasting})
    return dict(table=table, panels=[found | dict(of={"with a cache": kept, "without": anew}), going])


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, items, models, rewards, settings, tasks

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt)
    models.check_context(config, task, args)
    run = items.Items(__file__, args, config)
    policy = models.load(args, device, trainable=False)
    end = models.end_tokens(policy.lm, tokenizer)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    for i in run.left(args.items):
        # An item's numbers are its own: whatever was asked before, its text is the same.
        example, draws = task.test[i % len(task.test)], torch.Generator().manual_seed(gpu.hash_seed(args.seed, i))
        uniforms = torch.rand(args.max_new_tokens, dtype=torch.float64, generator=draws).tolist()
        with torch.no_grad():
            ids, chances = decode(engines.Decoder(policy.lm, [example.ids]), end, uniforms, args)
            once = engines.Decoder(policy.lm, [example.ids])
            logits = torch.cat([once.logits[:, None], once.feed(torch.tensor([ids], device=device), every=True)], 1)[0]
        again = law(logits[: len(ids)], args).gather(1, torch.tensor(ids, device=device)[:, None])[:, 0].tolist()
        text, n, before = tokenizer.decode(ids, skip_special_tokens=True), len(ids), len(example.ids)
        _, (right,) = scorer([text], [example.answer])
        right *= ids[-1] in end
        gap = max(abs(a - b) for a, b in zip(chances, again))
        read = dict(calls=n, read=before + n - 1, read_anew=n * before + n * (n - 1) // 2)
        run.write(dict(item=i, text=text, right=right, prompt=before, tokens=n, **read, gap=gap))

    found = results(run.rows(), args)
    kept, anew = (found["table"][name]["positions read per token"] for name in ("with a cache", "without"))
    cached = found["table"]["with a cache"]
    read = f"{kept:.2f} positions read per token with the cache, {anew:.1f} without"
    gap = f"probabilities as in one pass to {cached['greatest gap to one pass']:.0e}"
    run.finish(found, f"{read}; {gap}; accuracy {cached['accuracy']:.2f} on {args.items} held-out prompts")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
