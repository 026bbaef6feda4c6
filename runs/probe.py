"""What models can do on a task, and where they are unsure: pass@k, groups, entropies.

python -m runs.probe tiny runs/grpo-1-20260101-120000 --task route           runs/probe/route.{png,json}
python -m runs.probe tiny runs/grpo-1-20260101-120000 --ceiling 0.875 --out runs/reference/route-probe
python -m runs.probe runs/grpo-1-20260101-120000 --colour logp --step 101 --html step.html

Right is a completion that ended and has a score of 1 at least. All models draw with the same noise, a prompt's own. --colour
shows what a run has logged instead: the first prompt's completions of a step, each token on the colour of its number.
"""

import contextlib
import html
import json
import math
import re
import shlex
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
import tyro
from tqdm import tqdm

from common import ROOT, UserError, checkpoint, engines, gpu, models, rewards, rollout, tasks
from common.batch import read
from runs import pictures, talk

ROWS = 1024  # completions at a time
SHOWN = 32  # positions in the table; file and picture have all of them
HEAT = (255, 255, 255), (255, 205, 100), (235, 80, 60)  # white, orange, red: from the least number to the greatest


@dataclass
class Options:
    models: tyro.conf.Positional[tuple[str, ...]]
    """run folders (their last checkpoint), checkpoints or other model folders, tiny, aliases, hub ids"""
    task: str = "route"
    """as a script's --task; tiny is its warm start"""
    n: int = 64
    """completions of a prompt"""
    group: int = 8
    """completions of a group; n must be a multiple of it"""
    prompts: int = 512
    """held-out prompts, at most"""
    temperature: float = 1.0
    """of the sampling, and of the entropies"""
    max_new_tokens: int | None = None
    """longest completion; None: the task's, else the run's, else the preset's"""
    prompt_template: str | None = None
    """this, system_prompt and reward are as in the scripts"""
    system_prompt: str | None = None
    reward: str | None = None
    engine: Literal["auto", "hf", "vllm"] = "hf"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    seed: int = 1
    """of the sampling"""
    ceiling: float | None = None
    """an accuracy to draw as a line, labelled supervised"""
    out: str | None = None
    """picture and numbers without ending; None: runs/probe/<task>"""
    colour: str | None = None
    """column of the run's samples.jsonl (logp, adv, a script's own) to show"""
    step: int | None = None
    """whose completions are shown; None: the last that was logged token by token"""
    html: str | None = None
    """file for the same as a page"""


def powers(n):
    """The k of pass@k: 1, 2, 4, ... below n, and n."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def pass_at_k(correct, n, k):
    """correct [P]: how many of a prompt's n completions are right -> how often one at least of k drawn from them is: the mean
    of 1 - C(n - c, k) / C(n, k), in whole numbers up to the division. ValueError unless 1 <= k <= n and 0 <= c <= n."""
    if not 1 <= k <= n or any(not 0 <= c <= n for c in correct):
        raise ValueError(f"pass@{k} of {n} completions: k must be 1 to n, and right ones 0 to n")
    ways = math.comb(n, k)
    return sum(m * ((ways - math.comb(n - c, k)) / ways) for c, m in sorted(Counter(correct).items())) / len(correct)


def accuracy(right, greedy, group):
    """right [P, n] and greedy [P], bool -> {name: share}: greedy, pass@k, and of the groups of `group` completions those that
    are mixed and all wrong."""
    found, groups = right.sum(1).tolist(), right.view(-1, group).sum(1)
    out = {"prompts": len(right), "greedy": greedy.double().mean().item()}
    out |= {f"pass@{k}": pass_at_k(found, right.shape[1], k) for k in powers(right.shape[1])}
    mixed, wrong = (groups > 0) & (groups < group), groups == 0
    return out | {"mixed": mixed.double().mean().item(), "all wrong": wrong.double().mean().item()}


def distinct(values, group):
    """A list of values, group behind group -> the mean number of different ones in a group."""
    return statistics.mean(len(set(values[i : i + group])) for i in range(0, len(values), group))


def entropies(values):
    """Entropies of tokens [N], numpy, nats -> {name: number}: the share of tokens below 0.05, quantiles, and the share of all
    entropy that the top fifth of the tokens holds."""
    falling = np.sort(values.astype(np.float64))[::-1]
    quantiles = dict(zip(("median", "80%", "95%"), np.quantile(falling, (0.5, 0.8, 0.95)).tolist()))
    top = falling[: max(1, len(falling) // 5)].sum() / max(falling.sum(), 1e-12)
    return {"below 0.05 nat": float((falling < 0.05).mean())} | quantiles | {"held by the top fifth": float(top)}


def by_position(values, places):
    """Values [N] of tokens and their places [N] in their completions -> the mean at each place, and how many are there."""
    counts = np.bincount(places)
    return dict(mean=(np.bincount(places, values) / np.maximum(counts, 1)).tolist(), tokens=counts.tolist())


def reached(curve):
    """What by_position() gives -> the means at the places that one completion in a hundred reaches: the rest is noise."""
    return [x for x, n in zip(curve["mean"], curve["tokens"]) if 100 * n >= curve["tokens"][0]]


def chance(examples, task, ks):
    """pass@k of a blind draw, which is right as often as task.chance says -> {name: share}."""
    p = [task.chance(e) for e in examples]
    return {"prompts": len(p)} | {f"pass@{k}": statistics.mean(1 - (1 - x) ** k for x in p) for k in ks}


def tiers(examples, task):
    """{tier: the places of its examples}, in order; empty where the task has none."""
    of = [task.tier(e) for e in examples] if task.tier else []
    return {t: [i for i, x in enumerate(of) if x == t] for t in sorted(set(of))}


def probe(name, o):
    """One model's part of the record, by the Options o."""
    fields = ("task", "engine", "seed", "temperature", "max_new_tokens")
    args, config, tokenizer, policy = talk.open_model(name, **{f: getattr(o, f) for f in fields})
    task = tasks.load(o.task, tokenizer, o.prompt_template, o.system_prompt, o.reward)
    args.max_new_tokens = o.max_new_tokens or task.max_new_tokens or args.max_new_tokens
    engine = engines.make_engine(policy, tokenizer, args, models.check_context(config, task, args))
    scorer = rewards.Scorer(task.check, inline=task.inline)
    examples, parts, answers, texts, at = task.test[: o.prompts], [], [], [], max(1, ROWS // o.n)
    seeds = [gpu.hash_seed(o.seed, e.id) for e in examples]  # of the prompt alone: how many there are changes nothing
    with contextlib.closing(engine), contextlib.closing(scorer):
        best = rollout.collect(engine, scorer, tokenizer, examples, replace(args, temperature=0.0), 0, n=1, seeds=seeds)
        for i in tqdm(range(0, len(examples), at), desc=name, disable=None, leave=False):
            batch = rollout.collect(engine, scorer, tokenizer, examples[i : i + at], args, 0, n=o.n, seeds=seeds[i : i + at])
            entropy, mask = read(policy, batch, args)[1], batch.mask
            found = (batch.accuracy >= 1, batch.truncated, mask.sum(1), entropy[mask].float(), mask.nonzero()[:, 1])
            parts.append([x.cpu() for x in found])
            answers += batch.answers
            texts += batch.texts
    right, truncated, lengths, entropy, places = (torch.cat(x) for x in zip(*parts))
    right, greedy, values = right.view(-1, o.n), best.accuracy.cpu() >= 1, entropy.numpy()
    numbers = accuracy(right, greedy, o.group)
    numbers |= {"distinct answers": distinct(answers, o.group), "distinct texts": distinct(texts, o.group)}
    numbers |= {"tokens": lengths.double().mean().item(), "truncated": truncated.double().mean().item()} | entropies(values)
    return dict(
        model=args.model, engine=engine.name, dtype=args.dtype, max_new_tokens=args.max_new_tokens, numbers=numbers,
        tiers={t: accuracy(right[rows], greedy[rows], o.group) for t, rows in tiers(examples, task).items()},
        entropy=by_position(values, places.numpy()), right=right.sum(1).tolist(), right_greedy=greedy.int().tolist(),
    )  # fmt: skip


def table(rows):
    """[{head: number or text}] -> Markdown."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in line) + " |" for line in lines)


def tables(record):
    """What is printed: a row per model, the same by tier, entropies by position."""
    everyone = record["models"] | ({"chance": record["chance"]} if record["chance"] else {})
    by_tier = [{"tier": t, "": name} | x for name, m in everyone.items() for t, x in m["tiers"].items()]
    curves = {name: reached(m["entropy"])[:SHOWN] for name, m in record["models"].items()}
    longest = range(max(map(len, curves.values())))
    positions = [{"entropy at": name} | {i: c[i] if i < len(c) else "" for i in longest} for name, c in curves.items()]
    rows = [{"": name} | m["numbers"] for name, m in everyone.items()]
    return [table(x) for x in (rows, sorted(by_tier, key=lambda row: row["tier"]), positions) if x]


def draw(record, path):
    """pass@k over k with chance and ceiling, and entropy over the position in a completion."""
    plt = pictures.pyplot()
    ks, ceiling = powers(record["options"]["n"]), record["options"]["ceiling"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(pictures.WIDE, 3.8), layout="constrained")
    for name, m in record["models"].items():
        left.plot(ks, [m["numbers"][f"pass@{k}"] for k in ks], marker="o", ms=3.5, label=name)
        right.plot(reached(m["entropy"]), marker=".", ms=5, lw=1.2)
    if record["chance"]:
        left.plot(ks, [record["chance"]["numbers"][f"pass@{k}"] for k in ks], "--", color=pictures.GREY, label="chance")
    if ceiling is not None:
        left.axhline(ceiling, ls=":", color="black", lw=1, label="supervised")
    left.set_xscale("log", base=2)
    left.set_xticks(ks, map(str, ks))
    left.set(xlabel="k", ylabel="pass@k", ylim=(0, 1.03))
    right.set(xlabel="position in the completion, tokens", ylabel="mean entropy, nats", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    figure.suptitle(record["about"], fontsize=9)
    figure.savefig(path, dpi=pictures.DPI)
    plt.close(figure)


def colour(o):
    """Prints the completions of a run's step, a line each behind its reward, every token on the colour of its number in a
    column; where there are no colours the numbers stand below. Raises UserError where the run has not logged that."""
    source, name, page = Path(o.models[0]) / "samples.jsonl", o.colour, []
    logged = [row for row in checkpoint.rows(source) if "tokens" in row]
    steps = sorted({row["step"] for row in logged})
    rows = [row for row in logged if row["step"] == (steps[-1] if o.step is None else o.step)]
    if not rows:
        raise UserError(f"{source}: no such step; those with tokens are: {', '.join(map(str, steps)) or 'none'}")
    if name not in rows[0]["columns"]:
        raise UserError(f"--colour {name}: {source} has the columns {', '.join(rows[0]['columns'])}")
    numbers = [x for row in rows for x in row["columns"][name]]
    low, high = min(numbers), max(numbers)
    scale = [low + (high - low) * i / 4 for i in range(5)]
    title = f"{name} at step {rows[0]['step']}, prompt {rows[0]['prompt_id']}, {low:.3g} to {high:.3g}"
    lines = [(title, [f" {x:.3g} " for x in scale], scale)]
    lines += [(f"{row['reward']:6.2f}", row["tokens"], row["columns"][name]) for row in rows]
    for head, texts, values in lines:
        texts = [talk.harmless(t).replace("\n", "\N{RETURN SYMBOL}") for t in texts]
        page.append(f"{head} {talk.painted(texts, [(x - low) / ((high - low) or 1.0) for x in values], HEAT)}")
        if talk.in_colour():
            print(page[-1])
        elif head == title:
            print(head)
        else:
            cells = [(t, f"{x:.2f}") for t, x in zip(texts, values)]
            for start, row in zip((head, " " * len(head)), zip(*cells)):
                print(start, " ".join(text.rjust(max(map(len, pair))) for text, pair in zip(row, cells)))
    if o.html:
        span = r'<span style="background: rgb(\1, \2, \3)">\4</span>'
        body = re.sub(r"\x1b\[30;48;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m", span, html.escape("\n".join(page)))
        writable(o.html).write_text(f'<!doctype html><meta charset="utf-8"><pre>{body}</pre>\n', encoding="utf-8")
        print(f"wrote {o.html}")


def writable(name):
    """The path of a file to be written, its folder made. Raises UserError where it cannot be."""
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(name).parent).close()
    except OSError as error:
        raise UserError(f"cannot write {name}: {error.strerror or error}") from None
    return Path(name)


def labels(names):
    """{name: what it is called}: <run> step-N of a checkpoint, the last part of another folder; the whole, were two the same.
    Raises UserError where there is no such model."""
    places = {name: Path(models.locate(name)) for name in names}
    short = {n: f"{p.parents[1].name} {p.name}" if p.parent.name == "checkpoints" else p.name for n, p in places.items()}
    short = {n: short[n] if p.is_dir() else n for n, p in places.items()}
    return short if len(set(short.values())) == len(short) else {n: n for n in names}


def main(o):
    """Probes every model, prints the tables, and writes <out>.json and <out>.png; or shows a step in colour."""
    if not o.models:
        raise UserError("needs a model at least: tiny, a run, a folder")
    if o.colour:
        return colour(o)
    if min(o.n, o.group, o.prompts) < 1 or o.n % o.group:
        raise UserError(f"--n {o.n} must be a multiple of --group {o.group}, and they and --prompts at least 1")
    task, ks, names = tasks.load(o.task, reward=o.reward), powers(o.n), labels(dict.fromkeys(o.models))
    if task.measure != "accuracy" and not o.reward:
        raise UserError(f"task {o.task}: its completions have a gold reward, none is right or wrong")
    out = str(o.out or ROOT / "runs" / "probe" / re.sub(r"\W+", "-", Path(o.task).stem))
    files, blind, examples = [writable(f"{out}.{kind}") for kind in ("png", "json")], None, task.test[: o.prompts]
    if task.chance:
        parts = {t: chance([examples[i] for i in rows], task, ks) for t, rows in tiers(examples, task).items()}
        blind = dict(numbers=chance(examples, task, ks), tiers=parts)
    found = {label: probe(name, o) for name, label in names.items()}
    about = f"{o.task}: {len(examples)} held-out prompts, {o.n} completions each at temperature {o.temperature:g}"
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
    record = dict(command="python -m runs.probe " + shlex.join(sys.argv[1:]), versions=versions, about=about)
    record |= dict(options=vars(o), prompts=[e.id for e in examples], chance=blind, models=found)
    files[1].write_text(json.dumps(json.loads(json.dumps(record), parse_float=lambda x: round(float(x), 6))) + "\n")
    draw(record, files[0])
    print("\n\n".join([f"{about}; groups of {o.group}; pass@1 is avg@{o.n}", *tables(record)]))
    print(f"wrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    main(tyro.cli(Options))
