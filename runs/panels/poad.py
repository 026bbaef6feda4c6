"""POAD: the return of an episode over environment steps, with and without a discount inside an action; and how far the critic
is from the exact value, by the length of the actions."""

import itertools
import statistics

from runs import pictures
from runs.panels import metrics

SIZE = (10.6, 4)
ARMS = {"poad": ("POAD, gamma_w 1", "tab:blue", ()), "ntpo": ("NTPO, gamma_w 0.95", "tab:red", ("gamma-w-0.95",))}
TIMES = {1: "", 2: "task-door:2", 4: "task-door:4"}
LAST = 5  # rollouts


def numbers(seed, episodes=96):
    out = {}
    for (arm, (_, _, own)), (times, task) in itertools.product(ARMS.items(), TIMES.items()):
        runs = metrics("poad", "-".join([*own, *([task] if task else [])]))
        curves = []
        for rows in runs:
            steps = itertools.accumulate(episodes * row["steps"] for row in rows)
            curves.append([(round(x), row["accuracy"]) for x, row in zip(steps, rows)])
        late = [statistics.mean(row[k] for row in rows[-LAST:]) for k in ("value_error", "length") for rows in runs]
        out[f"{arm} x{times}"] = dict(returns=curves, value_error=late[: len(runs)], length=statistics.mean(late[len(runs) :]))
    return dict(arms=out)


def draw(figure, data):
    *tops, right = figure.subplots(1, len(TIMES) + 1, width_ratios=[1] * len(TIMES) + [1.2])
    for axis, times in zip(tops, TIMES):
        for arm, (label, colour, _) in ARMS.items():
            pictures.curve(axis, data["arms"][f"{arm} x{times}"]["returns"], colour, lw=1.5, label=label)
        axis.set_title(f"actions x{times}", fontsize=10)
        axis.set_xlabel("environment steps", fontsize=9)
        axis.set_ylim(-1.05, 1.05)
        axis.grid(alpha=0.25)
    tops[0].set_ylabel("mean return of a rollout", fontsize=9)
    tops[0].legend(fontsize=7, loc="upper left")
    for shift, (arm, (label, colour, _)) in zip((-0.18, 0.18), ARMS.items()):
        for i, times in enumerate(TIMES):
            errors = data["arms"][f"{arm} x{times}"]["value_error"]
            right.bar(i + shift, statistics.mean(errors), 0.34, color=colour, label=label if not i else None)
            right.plot([i + shift] * len(errors), errors, ".", color="black", ms=4)
    right.set_xticks(range(len(TIMES)), [f"x{times}" for times in TIMES])
    right.set_title(f"|V - exact value|, last {LAST} rollouts", fontsize=10)
    right.set_xlabel("length of an action (dots: seeds)", fontsize=9)
