"""Scoring: how sure a language model is of its own response, read off the tokens' log-probs in one pass, and what that says of
whether the response is right. The root of papers that make a better score; no gradient is taken here.

Idea: every token of a response has a probability and its place an entropy, and a number made of these can rank responses. A
good score is high where the response is right: it orders responses (AUROC, average precision), and one that is a probability
is also right as often as it says (calibration). Sum, mean, least likely token and most unsure place are the plain ones.

Score (equation numbers not at hand), l_t: log-prob of token t of n, H_t: entropy of the law it came from. Larger = surer:
    sum = sum_t l_t    mean = 1/n sum_t l_t    minimum = min_t l_t    entropy = -max_t H_t    length = -n
Taken for a probability: exp of the score, but for length, which needs no model and stands there as what a score has to beat.

Responses are sampled and checked here, or come with their labels from a file (--responses): {"prompt", "response", "label"},
1 where it is right. A response that was cut is wrong. Log-probs are those of temperature 1, whatever they were sampled at.

Family: inference
Base: claims (ccp.py), chains of thought (uqac.py), training data (dc_pdd.py) and cascades (lm_cascades.py) are scored on it.
Costs: one forward pass over prompt and response; nothing where log-probs were kept while sampling.
Run:   python algos/score.py                                    CPU, seconds
       python algos/score.py --temperature 0.5
       python algos/score.py --model qwen2.5-0.5b-instruct
       python algos/score.py --model path/to/folder --responses path/to/responses.jsonl
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
    items: int = 512
    """responses in all, one a prompt, from the first held-out prompt on"""
    batch: int = 32
    """items in one step"""
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 1.0
    """of sampling; 0: the likeliest token"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
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

    # Scoring
    limits = dict(items="1 <= x", batch="1 <= x", temperature="0 <= x")
    responses: str | None = None
    """a .jsonl file of prompt, response and label, instead of sampling: its first --items rows (ours)"""


# ---------------------------------------------------------------- the score


def scores(logp, entropy, mask, args):
    """Log-probs and entropies of responses' tokens [B, T], mask [B, T] -> {name: [B]}, larger = surer."""
    n, logp = mask.sum(1).clamp(min=1), logp.masked_fill(~mask, 0.0)
    most = entropy.masked_fill(~mask, 0.0).amax(1)
    length = -mask.sum(1).float()
    return dict(sum=logp.sum(1), mean=logp.sum(1) / n, minimum=logp.amin(1), entropy=-most, length=length)


# ---------------------------------------------------------------- what is measured


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    import math

    from common import measures

    right, table, reliable = [row["right"] for row in rows], {}, {}
    for name in rows[0]["scores"]:
        score = [row["scores"][name] for row in rows]
        low, high = measures.interval(measures.auroc, score, right)
        table[name] = {"AUROC": measures.auroc(score, right), "low": low, "high": high}
        table[name] |= {"average precision": measures.average_precision(score, right)}
        if name != "length":
            chance = [math.exp(x) for x in score]
            table[name] |= {"ECE": measures.ece(chance, right)}
            reliable[name] = [[x, y] for x, y, _ in measures.reliability(chance, right)]
    share = sum(right) / len(right)
    table["chance"] = {"AUROC": 0.5, "average precision": share}
    ranks = {name: row["AUROC"] for name, row in table.items() if row["AUROC"] is not None}
    shown = {f"{'right' if y else 'wrong'}: {row['asked']}"[:28]: row["pieces"] for y in (1, 0)
             for row in [row for row in rows if row["right"] == y][:3]}  # fmt: skip
    fits = dict(title="taken for a probability", kind="lines", x="exp(score)", y="share that is right", diagonal=True)
    panels = [
        dict(title="AUROC of right responses", kind="bars", x="0.5: chance", of=ranks),
        fits | dict(of=reliable),
        dict(title="how unlikely a token was", kind="tokens", of=shown),
    ]
    return dict(table=table, panels=panels)


# ---------------------------------------------------------------- the loop


def given(path, n):
    """The first n rows of a .jsonl file, each with prompt, response and a label of 0 or 1. UserError where one has not."""
    from common import UserError, tables

    def checked(row, where):
        texts = isinstance(row, dict) and all(row.get(k) and isinstance(row[k], str) for k in ("prompt", "response"))
        if not texts or row.get("label") not in (0, 1):
            raise UserError(f"{where}: needs prompt, response and a label of 0 or 1")
        return row

    rows, _ = tables.read_rows(path, checked)
    if not rows:
        raise UserError(f"--responses {path}: no rows there")
    return rows[:n]


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, items, models, rewards, rollout, settings, tasks
    from common.batch import collate, read

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    rows = given(args.responses, args.items) if args.responses else None
    if rows:
        ids = [[tokenizer(row[k], add_special_tokens=False).input_ids for k in ("prompt", "response")] for row in rows]
        ids = [(p, r + [tokenizer.eos_token_id]) for p, r in ids]
        models.check_tokens([(p + r, f"row {i} of --responses") for i, (p, r) in enumerate(ids, 1)], config)
    else:
        task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt)
        context = models.check_context(config, task, args)
    run = items.Items(__file__, args, config)
    policy = models.load(args, device, trainable=False)
    engine = None if rows else engines.make_engine(policy, tokenizer, args, context)
    scorer = None if rows else rewards.Scorer(task.check, inline=task.inline)

    for some in run.left(len(rows or ()) or args.items, args.batch):
        if rows:
            batch = collate([ids[i] for i in some], tokenizer.pad_token_id, device)
            asked, right = [rows[i]["prompt"] for i in some], [rows[i]["label"] for i in some]
        else:
            examples = [task.test[i % len(task.test)] for i in some]
            seeds = [gpu.hash_seed(args.seed, i) for i in some]
            batch = rollout.collect(engine, scorer, tokenizer, examples, args, 0, n=1, seeds=seeds)
            asked, right = [e.prompt for e in examples], (batch.accuracy > 0.5).int().tolist()
        with torch.no_grad():
            logp, entropy = read(policy, batch, args, temperature=1.0)
        found = {name: x.tolist() for name, x in scores(logp, entropy, batch.mask, args).items()}
        tokens = [batch.ids[j, -batch.mask.shape[1] :][batch.mask[j]].tolist() for j in range(len(some))]
        pieces = [[[tokenizer.decode([y]), 1 - p] for y, p in zip(*x)] for x in zip(tokens, logp.exp().tolist())]
        run.write(*(dict(item=i, asked=asked[j], right=right[j], scores={k: x[j] for k, x in found.items()}, pieces=pieces[j])
                    for j, i in enumerate(some)))  # fmt: skip

    found = results(run.rows(), args)
    said = ", ".join(f"{name} {x['AUROC']:.2f}" for name, x in found["table"].items() if "low" in x and x["AUROC"] is not None)
    run.finish(found, f"AUROC of right responses: {said or 'not defined: all right, or all wrong'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
