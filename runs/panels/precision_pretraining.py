"""Precision pre-training: perplexity and entropy of five ways to pre-train, and what GRPO makes of each."""

import statistics

from runs import pictures
from runs.panels import rows

SIZE = (12, 6.4)
EVERY = 20  # updates, or rollouts, that a point of the entropy is the mean of
# The flags of python -m runs.compare in the folder's name, colour, line.
ARMS = {
    "cross-entropy": ("beta-0", "0.35", "-"),
    "beta -0.25": ("beta--0.25", "tab:blue", "-"),
    "beta 0.5": ("beta-0.5", "tab:orange", "-"),
    "lambda_top 0.1": ("beta-0-lambda-top-0.1", "tab:red", "--"),
    "lambda_tail -0.1": ("beta-0-lambda-tail--0.1", "tab:green", "--"),
}
SEED = 1  # the one that was run: a run of the second stage takes minutes
GRPO = "eval-every-20-eval-prompts-128-eval-samples-16-model-runs_compare_precision_pretraining-{seed}-{arm}-steps-60"
PANELS = dict(
    perplexity="pre-training: perplexity, held out",
    entropy="pre-training: entropy, nats",
    greedy="GRPO: greedy accuracy, held out",
    average="GRPO: avg@16, held out",
    best="GRPO: pass@16, held out",
    later="GRPO: entropy, nats",
)


def means(some, key):
    """Rows of metrics.jsonl -> [(step, mean over the last EVERY steps)]."""
    return [(i, statistics.mean(row[key] for row in some[i - EVERY : i])) for i in range(EVERY, len(some) + 1, EVERY)]


def points(some, key, first=0):
    """Rows of evals.jsonl from a step on -> [(step, number)]."""
    return [(row["step"], row[key]) for row in some if row["step"] >= first]


def numbers(seed):
    """{panel: {arm: a curve a seed}}, of runs that are there."""
    out = {name: {} for name in PANELS}
    for arm, (flags, *_) in ARMS.items():
        for s in (SEED,):
            later = GRPO.format(seed=s, arm=flags)
            before, after = (rows(*of, "evals", s) for of in (("precision_pretraining", flags), ("grpo", later)))
            curves = dict(perplexity=points(before, "perplexity", 1), greedy=points(after, "greedy_accuracy"))
            curves |= dict(average=points(after, "avg@16"), best=points(after, "pass@16"))
            curves["entropy"] = means(rows("precision_pretraining", flags, "metrics", s), "entropy")
            curves["later"] = means(rows("grpo", later, "metrics", s), "entropy")
            for name, curve in curves.items():
                out[name].setdefault(arm, []).append(curve)
    return out


def draw(figure, data):
    for axis, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for arm, (_, colour, line) in ARMS.items():
            pictures.curve(axis, data[name][arm], colour, ls=line, lw=1.6, label=arm)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update" if title.startswith("pre") else "rollout", fontsize=9)
        if name in ("perplexity", "entropy"):
            axis.set_yscale("log")
        if name == "perplexity":
            axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.25, which="both")
        axis.tick_params(labelsize=8)
