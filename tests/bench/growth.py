"""How the seconds of a GRPO step grow with the group, with the completions' length, and with the vocabulary.

python -m tests.bench.growth --out runs/reference/growth          one core, five rounds
The work is tests/bench/worker.py's, our side of it, on a random model of width 96 and two layers: every completion has exactly
the length asked for, so that the tokens of a batch are in proportion to group and length. From the point that all three lines
have in common (the first group, length and vocabulary) one of the three grows at a time. One process on one core goes through
all points in turn, round by round, and of each visit the second rollout counts. Seconds are the process's own, since
others may want it, too; a number is the median over the rounds. A trainer's pass has as many tokens everywhere, about those of
eight of the longest completions. The slope is that of the least-squares line through the logarithms of the medians; beside it
stands the one between the last two points, where what a step costs at any size weighs least. Over group and length 1 is linear
in tokens; what is above 1.1 in either is called out.
"""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import tyro

from common import engines, tasks
from common.figures import DPI, WIDE, markdown, pyplot
from tests.bench import worker
from tests.bench.__main__ import band, processor

STAGES = dict(rollout="tab:blue", scoring="tab:green", update="tab:orange")
AXES = dict(groups="completions per prompt (G)", lengths="tokens per completion", vocabularies="vocabulary")
WORST = 1.1  # slope in tokens


@dataclass
class Options:
    groups: tuple[int, ...] = (8, 16, 32, 64)
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    """tokens of every completion"""
    vocabularies: tuple[int, ...] = (78, 1024, 8192, 32768, 151936)
    prompts: int = 4
    rounds: int = 5
    out: str | None = None
    """table (.md), numbers (.json) and picture (.png), without ending"""


def points(options):
    """-> {name of an axis: its points (group, length, vocabulary)}; the first of each is the same."""
    start = [getattr(options, name)[0] for name in AXES]
    return {name: [tuple(start[:i] + [x] + start[i + 1 :]) for x in getattr(options, name)] for i, name in enumerate(AXES)}


def make(vocabulary, folder, options):
    """Writes a random model of this vocabulary into the folder -> its prompts. It may write as far as it is asked to."""
    with mock.patch.dict(worker.SIZES, growth=(96, 2, vocabulary)), contextlib.redirect_stdout(io.StringIO()):
        prompts, _ = worker.make_model(worker.Work(size="growth", prompts=options.prompts), folder)
    path = Path(folder, "config.json")
    positions = dict(max_position_embeddings=worker.PROMPT + max(options.lengths))
    path.write_text(json.dumps(json.loads(path.read_text()) | positions))
    return prompts


def measure(group, length, folder, prompts, options, seed):
    """-> {tokens, and the process's seconds of each stage} of the second rollout of a run."""
    rows = 8 * (worker.PROMPT + max(options.lengths)) // (worker.PROMPT + length)
    work = worker.Work(prompts=options.prompts, group=group, rows=rows, seed=seed)
    lengths = itertools.repeat([length] * options.prompts * group)
    # ours() puts a loader and a sampler of its own in the place of these, and leaves them there.
    kept = [mock.patch.object(tasks, "load"), mock.patch.object(engines.HF, "_generate", engines.HF._generate)]
    kept += [mock.patch("time.perf_counter", time.process_time)]
    kept += [mock.patch.object(worker, "MOST", length), mock.patch.object(worker, "draw_lengths", lambda work: lengths)]
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
        for patch in kept:
            stack.enter_context(patch)
        shutil.rmtree(Path(folder, "run"), ignore_errors=True)
        (row,) = worker.ours(work, folder, prompts)
    assert row["tokens"] == options.prompts * group * length, row
    return {k: row[k] for k in ("tokens", *STAGES)}


def slope(x, y):
    """Of the least-squares line through (log x, log y)."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def fit(options, found):
    """found {point: [what measure() gives, one a round]} -> {axis: {stage: dict(slope, last)}}."""
    out = {}
    for name, some in points(options).items():
        x = getattr(options, name)
        y = {stage: [statistics.median(r[stage] for r in found[p]) for p in some] for stage in STAGES}
        out[name] = {stage: dict(slope=slope(x, y[stage]), last=slope(x[-2:], y[stage][-2:])) for stage in STAGES}
    return out


def table(options, found, slopes):
    """Markdown: the seconds of every point, then the slopes."""
    rows = []
    for p, runs in found.items():
        rows.append([*(f"{x:,}" for x in (*p, runs[0]["tokens"])), *(band([r[s] for r in runs], "{:.3f}") for s in STAGES)])
    text = markdown(["G", "tokens each", "vocabulary", "tokens of the batch", *(f"{s}, s" for s in STAGES)], rows)
    rows = [[AXES[name], *(f"{f['slope']:.2f} ({f['last']:.2f})" for f in of.values())] for name, of in slopes.items()]
    return text + "\n\n" + markdown(["slope over (last two points)", *STAGES], rows)


def over(slopes):
    """Sentences on what grows faster than tokens do."""
    return [f"{stage} over {AXES[name]}: slope {f['slope']:.2f}, at the end {f['last']:.2f}, above {WORST}"
            for name in ("groups", "lengths") for stage, f in slopes[name].items() if max(f.values()) > WORST]  # fmt: skip


def draw(options, found, slopes, path):
    """A panel an axis, a line a stage, with the band from the least to the greatest."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(WIDE, 3.4), layout="constrained", sharey=True)
    for axis, (name, some) in zip(axes, points(options).items()):
        x = getattr(options, name)
        for stage, colour in STAGES.items():
            y = [[r[stage] for r in found[p]] for p in some]
            label = f"{stage}, slope {slopes[name][stage]['slope']:.2f}"
            axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=colour, alpha=0.2, lw=0)
            axis.plot(x, [statistics.median(v) for v in y], color=colour, marker="o", ms=3, label=label)
        if name != "vocabularies":
            first = statistics.median(r["update"] for r in found[some[0]]) / 3
            axis.plot(x, [first * v / x[0] for v in x], ":", color="0.55", lw=1, label="linear in tokens")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(x, [f"{v:,}" for v in x])
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.set_xlabel(AXES[name], fontsize=8)
        axis.legend(fontsize=7, frameon=False, loc="upper left")
    axes[0].set_ylabel("seconds", fontsize=8)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def main(options):
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])  # as many threads as it has cores
    found = {p: [] for some in points(options).values() for p in some}
    with tempfile.TemporaryDirectory() as folder:
        models = {V: make(V, f"{folder}/{V}", options) for V in options.vocabularies}
        for seed in range(options.rounds):
            for group, length, V in found:
                row = measure(group, length, f"{folder}/{V}", models[V], options, seed)
                found[group, length, V].append(row)
                said = ", ".join(f"{stage} {row[stage]:.3f} s" for stage in STAGES)
                print(f"{seed + 1}/{options.rounds} G {group}, length {length}, vocabulary {V:,}: {said}", flush=True)
    slopes = fit(options, found)
    text = "\n".join([table(options, found, slopes), "", *(over(slopes) or ["Nothing grows faster than tokens do."])])
    print(text)
    if options.out:
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        command = ("python -m tests.bench.growth " + " ".join(sys.argv[1:])).strip()
        device = f"one core of {processor()}"
        visits = [dict(group=G, length=T, vocabulary=V, rounds=rows) for (G, T, V), rows in found.items()]
        record = dict(command=command, device=device, torch=torch.__version__, slopes=slopes, found=visits)
        out.with_suffix(".json").write_text(json.dumps(record) + "\n")
        out.with_suffix(".md").write_text(f"`{command}` on {device}\n\n{text}\n")
        draw(options, found, slopes, out.with_suffix(".png"))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(tyro.cli(Options))
