"""PF-PPO: how well a reward model that errs tells the truth, under every filter and both kinds of noise."""

import torch

from algos import pf_ppo
from common import gpu, rollout
from runs.panels import start

SIZE = (12, 3.8)
NAMES = dict(none="no filter", bon="best of N", br="best + random", bw="best + worst", pow="by |R|²")
NOISES = dict(middle="widest in the middle", uniform="the same everywhere")
SHOWN = 600  # points


def numbers(seed, prompts=512):
    """Five completions each of that many training prompts -> R2 of every filter under both noises, and what the points are."""
    s = start(pf_ppo, seed=seed)
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, s.task.order(0, prompts, seed), s.args, 0)
    scores = batch.accuracy.view(-1, batch.group)
    out = dict(quality=pf_ppo.quality(batch)[:SHOWN].tolist(), accuracy=batch.accuracy[:SHOWN].tolist(), reward={}, r2={})
    for noise in NOISES:
        s.args.noise = noise
        seeds = [gpu.hash_seed(seed, 0, i, 19) for i in batch.prompt_id[:: batch.group].tolist()]
        R = pf_ppo.noisy_reward(batch, [torch.Generator().manual_seed(x) for x in seeds], s.args)
        out["reward"][noise], R = R[:SHOWN].tolist(), R.view(scores.shape).double().cpu()
        weights = {kind: pf_ppo.selection_weights(R, kind, s.args.power) for kind in NAMES}
        out["r2"][noise] = {kind: pf_ppo.r_squared(R, scores, w) for kind, w in weights.items()}
    return out | dict(sigma=s.args.sigma, prompts=prompts, group=batch.group)


def draw(figure, data):
    table, *clouds = figure.subplots(1, 3, width_ratios=[1.15, 1, 1])
    table.axis("off")
    table.set_title(f"R² of reward and accuracy\n{data['prompts']} prompts × {data['group']}, before training", fontsize=10)
    rows = [[name, *(f"{data['r2'][noise][kind]:.2f}" for noise in NOISES)] for kind, name in NAMES.items()]
    grid = table.table(
        rows, colLabels=["filter", "noise in\nthe middle", "noise\neverywhere"], cellLoc="center", bbox=[0, 0.02, 1, 0.9],
        colWidths=[0.4, 0.3, 0.3],
    )  # fmt: skip
    grid.auto_set_font_size(False)
    grid.set_fontsize(9.5)
    best = [max(column) for column in zip(*rows)]
    for (row, column), cell in grid.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if row == 0:
            cell.set_facecolor("#eeeeee")
        elif column and rows[row - 1][column] == best[column]:
            cell.set_text_props(weight="bold")
    shift = (torch.rand(len(data["quality"]), generator=torch.Generator().manual_seed(0)) - 0.5) * 0.12
    for axis, (noise, words) in zip(clouds, NOISES.items()):
        for right, colour, label in ((0, "#d1495b", "wrong"), (1, "#2e86ab", "right")):
            some = [i for i, a in enumerate(data["accuracy"]) if (a > 0.5) == bool(right)]
            x, y = [data["quality"][i] + shift[i].item() for i in some], [data["reward"][noise][i] for i in some]
            axis.scatter(x, y, s=7, alpha=0.5, color=colour, label=label, linewidths=0)
        axis.plot([-1, 1], [-1, 1], color="#888888", linewidth=0.8)
        axis.set_title(f"noise {words}", fontsize=10)
        axis.set_xlabel("quality: share of right digits, −1 to 1", fontsize=9)
        axis.set_xlim(-1.15, 1.15)
        axis.set_ylim(-1.1, 1.1)
    clouds[0].set_ylabel("reward R", fontsize=9)
    clouds[0].legend(loc="upper left", fontsize=8, framealpha=0.9)
