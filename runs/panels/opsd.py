"""OPSD: accuracy over the tokens that were generated, and over updates, beside GRPO; and what a cap on its entries does."""

from pathlib import Path

from algos import opsd
from common import settings
from common.worlds import tiny
from runs import pictures
from runs.panels import SEEDS, columns, metrics, rows
from runs.panels.rank_grpo import smooth

SIZE = (13, 3.7)
# The folders of runs.compare: script, flags, updates of a rollout.
PAIR = {
    "GRPO, 32 × 8": ("grpo", "eval-every-10-model-runs_cache_{start}-steps-100-task-addition", 8, "tab:orange", "--"),
    "OPSD, 32 × 1": ("opsd", "task-addition", 1, "tab:blue", "-"),
}
ARMS = {
    "forward": ("task-addition", "tab:blue", "-"),
    "forward, entries at most 0.05": ("entry-clip-0.05-task-addition", "0.5", "--"),
}


def learning(script, flags, updates):
    """Of every seed's evaluations behind the first: greedy accuracy, by generated tokens and by updates so far."""
    out = dict(tokens=[], updates=[])
    for seed in SEEDS:
        steps = rows(script, flags, "metrics", seed)
        points = [e for e in rows(script, flags, "evals", seed) if e["step"]]
        out["tokens"].append([(sum(r["tokens"] for r in steps[: e["step"]]), e["greedy_accuracy"]) for e in points])
        out["updates"].append([(e["step"] * updates, e["greedy_accuracy"]) for e in points])
    return out


def numbers(seed):
    start = Path(tiny.warm_start(opsd.sums(settings.resolve(opsd.Args())[0]))).name
    pair = {name: learning(script, flags.format(start=start), k) for name, (script, flags, k, *_) in PAIR.items()}
    arms = {name: columns(metrics("opsd", flags), None, "accuracy", "teacher_kl") for name, (flags, *_) in ARMS.items()}
    before = rows("opsd", "task-addition", "evals", SEEDS[0])[0]
    return dict(pair=pair, arms=arms, before={k: before[k] for k in ("greedy_accuracy", "teacher_accuracy")})


def draw(figure, data):
    tokens, updates, over, kl = figure.subplots(1, 4)
    for name, (*_, colour, line) in PAIR.items():
        for axis, x in ((tokens, "tokens"), (updates, "updates")):
            pictures.curve(axis, data["pair"][name][x], colour, ls=line, lw=1.6, marker=".", label=name)
    for axis, words in ((tokens, "generated tokens"), (updates, "updates")):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(lambda *_: "")
        axis.set_xlabel(words, fontsize=9)
        axis.set_title(f"greedy accuracy over {words.split()[-1]}", fontsize=10)
        for k, word in (("teacher_accuracy", "the teacher"), ("greedy_accuracy", "the start")):
            axis.axhline(data["before"][k], color="0.6", lw=0.8, ls=":")
            axis.annotate(word, (0.02, data["before"][k]), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    for name, (_, colour, line) in ARMS.items():
        arm = data["arms"][name]
        pictures.curve(over, [smooth(run) for run in arm["accuracy"]], colour, ls=line, lw=1.6, label=name)
        pictures.curve(kl, [smooth(run) for run in arm["teacher_kl"]], colour, ls=line, lw=1.6)
    over.set_title("OPSD's sampled accuracy", fontsize=10)
    kl.set_title("KL(teacher, student), nats a token", fontsize=10)
    kl.set_yscale("log")
    for axis in (over, kl):
        axis.set_xlabel("rollout (mean over nine)", fontsize=9)
    for axis in (tokens, updates, over):
        axis.set_ylim(-0.03, 1.08)
    for axis in (tokens, updates, over, kl):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    tokens.legend(fontsize=7, frameon=False)
    over.legend(fontsize=7, frameon=False, loc="upper left")
