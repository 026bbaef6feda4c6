"""T-PPO: what a step generates, trains on and leaves waiting; how long finished responses are, whatever stands for what a
window cuts off; and accuracy over the time that a step takes on hardware where the longest response decides."""

import itertools

from runs import pictures
from runs.panels import SEEDS, columns, metrics, rows

SIZE = (10.6, 3.4)
TASK, PPO = "task-addition:3", "eval-every-10-steps-40-task-addition:3"
ARMS = {"ppo": ("PPO", pictures.GREY), "bootstrap": ("T-PPO", "tab:blue"), "zero": ("--terminal zero", "tab:red"),
        "all": ("--policy-tokens all", "tab:green")}  # fmt: skip
FLAGS = dict(bootstrap=TASK, zero=f"{TASK}-terminal-zero", all=f"policy-tokens-all-{TASK}")


def over_clock(script, flags, runs, longest=None):
    """Greedy accuracy over the simulated clock: steps take as long as the longest new part of a response in them."""
    out = []
    for seed, steps in zip(SEEDS, runs):
        clock = [0, *itertools.accumulate(row["clock"] if longest is None else longest for row in steps)]
        out.append([(clock[row["step"]], row["greedy_accuracy"]) for row in rows(script, flags, "evals", seed)])
    return out


def numbers(seed, cap=38):
    """From the runs of the comparison. PPO's steps take as long as its cap, which a rollout of hundreds always reaches."""
    runs = {name: metrics("t_ppo", flags) for name, flags in FLAGS.items()}
    ppo = metrics("ppo", PPO)
    over = dict(ppo=over_clock("ppo", PPO, ppo, cap)) | {n: over_clock("t_ppo", FLAGS[n], of) for n, of in runs.items()}
    tokens = columns(runs["bootstrap"], None, "generated", "trained", "waiting_tokens")
    lengths = dict(ppo=columns(ppo, None, "length")["length"]) | {
        n: columns(of, None, "length")["length"] for n, of in runs.items()
    }
    return dict(tokens=tokens, lengths=lengths, over=over)


def draw(figure, data):
    tokens, lengths, over = figure.subplots(1, 3)
    for (name, runs), colour in zip(data["tokens"].items(), ("tab:blue", "tab:orange", "tab:purple")):
        style = "--" if name == "trained" else "-"
        pictures.curve(tokens, runs, colour, ls=style, lw=1.5, label=name.replace("_tokens", " (of earlier windows)"))
    tokens.set_title("T-PPO: tokens of a step", fontsize=10)
    for name, runs in data["lengths"].items():
        pictures.curve(lengths, runs, ARMS[name][1], lw=1.5, label=ARMS[name][0])
    lengths.set_title("mean length of finished responses", fontsize=10)
    for name, runs in data["over"].items():
        pictures.curve(over, runs, ARMS[name][1], lw=1.5, marker="o", ms=3, label=ARMS[name][0])
    over.set_title("greedy accuracy", fontsize=10)
    over.set_xlabel("simulated clock: longest new part, summed", fontsize=9)
    for axis in (tokens, lengths, over):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.set_ylim(bottom=0)
    for axis in (tokens, lengths):
        axis.set_xlabel("step", fontsize=9)
