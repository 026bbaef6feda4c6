"""BuPO: how unsure each layer's policy is at the start and while one of them is trained, and what becomes of the whole."""

import contextlib
import io
import re
import statistics

from algos import bupo
from common import rollout
from common.batch import read
from runs import pictures
from runs.panels import SEEDS, columns, metrics, rows, start

SIZE = (9.6, 6.6)
# Name: script, its own flags, colour, line.
ARMS = {
    "GRPO": ("grpo", "", "0.55", "--"),
    "BuPO, layer 1 for 10%": ("bupo", "inner-steps-6-", "tab:blue", "-"),
    "layer 1 for 30%": ("bupo", "inner-steps-18-", "tab:green", "-"),
    "layer 1 for 100%": ("bupo", "inner-steps-60-", "tab:red", "-"),
}
LAYERS = ("BuPO, layer 1 for 10%", "layer 1 for 100%")  # whose inner policies are shown
FLAGS = "eval-every-20-{}model-tiny-deep-steps-60-task-route"


def numbers(seed):
    return start_of(seed) | curves()


def start_of(seed, prompts=32, **flags):
    """The start: entropies of the policies of depths 0 to L - 1 and of the whole, and dH of the feed-forward parts."""
    s = start(bupo, seed=seed, **flags)
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, s.task.order(0, prompts, seed), s.args, 0)
    depths = [*range(s.policy.lm.config.num_hidden_layers), None]
    entropy = [read(s.policy, batch, s.args, layer=l)[1][batch.mask].mean().item() for l in depths]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = bupo.boundary(s.policy, batch, s.args)
    dH = [float(x) for x in re.findall(r"[+-]\d+\.\d+", said.getvalue())]
    return dict(entropy=entropy, dH=dH, boundary=found)


def curves():
    """Of the comparison's runs: greedy accuracy, entropy of the whole, and for LAYERS those of its inner policies."""
    out = dict(accuracy={}, whole={}, layers={})
    for name, (script, own, *_) in ARMS.items():
        flags = FLAGS.format(own)
        evals = [rows(script, flags, "evals", seed) for seed in SEEDS]
        out["accuracy"][name] = columns(evals, None, "greedy_accuracy")["greedy_accuracy"]
        out["whole"][name] = columns(metrics(script, flags), None, "entropy")["entropy"]
        if name in LAYERS:
            some = [[row for row in run if "entropy_0" in row] for run in metrics(script, flags)]
            out["layers"][name] = columns(some, None, *(f"entropy_{i}" for i in range(1, 4)))
    return out


def smooth(curve, n=5):
    """[(x, y)] -> y as the mean over the n points around."""
    ys, half = [y for _, y in curve], n // 2
    return [(x, statistics.mean(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(curve)]


def draw(figure, data):
    (first, inner), (whole, accuracy) = figure.subplots(2, 2)
    L = len(data["dH"])
    first.bar(range(L + 1), data["entropy"], width=0.55, color="#9ecae1", label="entropy of the policy at this depth")
    first.bar(
        [l + 0.32 for l in range(1, L + 1)],
        data["dH"],
        width=0.22,
        color="#e6550d",
        label="its feed-forward part changes it by",
    )
    first.axhline(0, color="black", lw=0.7)
    first.set_xticks(range(L + 1), ["embeddings", *(f"layer {l}" for l in range(1, L)), "whole"], fontsize=8)
    first.set_title(f"at the start: the boundary layer is {data['boundary']}", fontsize=10)
    for (name, of), line in zip(data["layers"].items(), ("--", "-")):
        for (l, seeds), colour in zip(of.items(), ("#08519c", "#3182bd", "#6baed6")):
            label = f"of layer {l[-1]} ({name.replace('BuPO, ', '')})"
            pictures.curve(inner, [[tuple(p) for p in run] for run in seeds], colour, ls=line, lw=1.5, label=label)
    inner.set_title("entropy of the inner policies", fontsize=10)
    inner.set_ylim(0, 1.5)
    for name, (*_, colour, line) in ARMS.items():
        pictures.curve(whole, [smooth(run) for run in data["whole"][name]], colour, ls=line, lw=1.5, label=name)
        pictures.curve(accuracy, data["accuracy"][name], colour, ls=line, lw=1.5, marker="o", ms=3, label=name)
    whole.set_title("entropy of the whole policy (mean over five)", fontsize=10)
    accuracy.set_title("greedy accuracy on held-out prompts", fontsize=10)
    for axis in (first, inner, whole, accuracy):
        axis.set_ylabel("accuracy" if axis is accuracy else "nats", fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if axis is not first:
            axis.set_xlabel("rollout", fontsize=9)
        if axis is not accuracy:
            axis.legend(fontsize=7, frameon=False, ncols=2 if axis is inner else 1)
