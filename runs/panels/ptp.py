"""PTP: where four policies go on a line, after training with a long or a short context, with and without past tokens in the
loss, and of four plans the best; how often that is right, and what it is where demonstrations or steps are few."""

import json
import statistics

import torch

from algos import ptp
from common import UserError, checkpoint, gpu
from runs import launch
from runs.panels import SEEDS, rows

SIZE = (13, 6.4)
SHOWN = 24  # roll-outs in a panel
ARMS = {
    "short context, 2": ("context-2-past-0", "0.6"),
    "long context, 16": ("past-0", "#9ecae1"),
    "long, PTP": ("", "#4292c6"),
    "long, PTP, best of 4 plans": ("samples-4", "#08306b"),
}
PARTS = dict(success="success", one_visit="one visit to the top,\nthen down", end="at the bottom\nat the end")
LONG = [name for name in ARMS if name.startswith("long")]
OTHERS = {"15 demonstrations,\nrate 1e-2": ("demonstrations-15", LONG), "60 demonstrations,\nrate 1e-3": ("lr-1e-3", LONG[:2])}


def played(flags, seed):
    """The last checkpoint of a run that runs.compare has made -> where its roll-outs go [n, steps], and which succeed."""
    folder = launch.ROOT / "runs" / "compare" / "-".join(["ptp", str(seed), *([flags] if flags else [])])
    found = sorted((folder / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(f"{folder} is missing: the comparisons of runs/reference/README.md make it")
    args = ptp.Args(**json.loads((folder / "config.json").read_text())["args"])
    policy = ptp.DiffusionPolicy(args, torch.zeros(1))
    policy.load_state_dict(checkpoint.weights(found[-1]))
    _, states, _ = ptp.roll_out(policy, args, gpu.hash_seed(seed, 2))  # as the evaluation's
    return states, ptp.judged(states)["success"]


def ends(flags):
    """{number of the last evaluation: [of every seed]}"""
    last = [rows("ptp", flags, "evals", seed)[-1] for seed in SEEDS]
    return {part: [row[part] for row in last] for part in PARTS}


def numbers(seed):
    shown = {}
    for name, (flags, _) in ARMS.items():
        states, right = played(flags, seed)
        shown[name] = dict(states=states[:SHOWN].tolist(), right=right[:SHOWN].tolist(), share=right.double().mean().item())
    hard = {}
    for title, (more, arms) in OTHERS.items():
        words = {name: sorted(x for x in (more, ARMS[name][0]) if x) for name in arms}
        hard[title] = {name: ends("-".join(x))["success"] for name, x in words.items()}
    return dict(shown=shown, ends={name: ends(flags) for name, (flags, _) in ARMS.items()}, hard=hard)


def bars(axis, groups, of):
    """Groups of bars, one an arm, with a point a seed. `groups`: what stands below; of: {arm: [seeds, one a group]}."""
    width = 0.8 / len(of)
    for i, (name, seeds) in enumerate(of.items()):
        where = [x + (i - (len(of) - 1) / 2) * width for x in range(len(groups))]
        axis.bar(where, [statistics.mean(s or [0]) for s in seeds], width * 0.94, color=ARMS[name][1], label=name)
        for x, some in zip(where, seeds):
            axis.plot([x + (k - 1) * width / 5 for k in range(len(some))], some, "o", color="black", ms=2.5)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(0, 1.03)
    axis.grid(axis="y", alpha=0.25)


def draw(figure, data):
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1])
    above.suptitle(f"roll-outs of seed {data['seed']}: where the point is (blue: a success, red: none)", fontsize=10)
    for axis, (name, of) in zip(above.subplots(1, len(ARMS), sharey=True), data["shown"].items()):
        for states, right in sorted(zip(of["states"], of["right"]), key=lambda pair: pair[1]):
            axis.plot([0, *states], color="tab:blue" if right else "tab:red", lw=0.8, alpha=0.55)
        for level in (-0.85, 0.85):
            axis.axhline(level, ls=":", color="black", lw=0.8)
        axis.set_title(f"{name}: {of['share']:.2f} of 200", fontsize=9)
        axis.set_ylim(-1.6, 1.6)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
    left, right = below.subplots(1, 2, width_ratios=[3, 2])
    bars(left, list(PARTS.values()), {name: [of[part] for part in PARTS] for name, of in data["ends"].items()})
    left.plot([-0.45, 1.45], [0.25, 0.25], ls="--", color="tab:red", lw=1.0)
    left.set_title("share of 200 roll-outs, mean and seeds; dashed: the most that two observations allow", fontsize=9)
    groups = {"60 demonstrations,\nrate 1e-2": {name: data["ends"][name]["success"] for name in LONG}} | data["hard"]
    bars(right, list(groups), {name: [of.get(name, []) for of in groups.values()] for name in LONG})
    right.set_title("success with less to learn from, and at a lower rate (two arms run)", fontsize=9)
    handles, names = left.get_legend_handles_labels()
    below.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
