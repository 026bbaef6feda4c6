"""Fourier head: KL and smoothness over the number of frequencies, beside the linear head's; KL over the number of points; and
what both heads say of three held-out inputs."""

import statistics

import torch

from algos import fourier_head
from common import UserError, checkpoint
from runs import launch
from runs.panels import SEEDS, rows

SIZE = (13, 6.4)
FREQUENCIES, POINTS = (2, 4, 8, 12, 20), {800: "", 4000: "points-4000-steps-5000"}
APART = {"one number": (0.0, 0.05), "two that are near": (0.35, 0.5), "two far apart": (0.9, 2.0)}
LINEAR, FOURIER, EXACT = "tab:orange", "tab:blue", "0.3"
HEADS = {"linear head": (LINEAR, "s"), "Fourier, N = 12": (FOURIER, "o")}


def flags(*words):
    """Flags in the name of a run's folder, those that are its own defaults left out."""
    return "-".join(word for word in words if word not in ("", "frequencies-12"))


def ends(of):
    """{measure: [its last number, one a seed]} of the runs with these flags."""
    last = [rows("fourier_head", of, "evals", seed)[-1] for seed in SEEDS]
    return {name: [row[name] for row in last] for name in ("kl", "smoothness")}


def said(args, inputs):
    """The distributions of the network in the last checkpoint of the run with these Args and no others -> [n, bins]."""
    name = f"fourier_head-{args.seed}" + ("-head-linear" if args.head == "linear" else "")
    found = sorted((launch.ROOT / "runs" / "compare" / name / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(f"runs/compare/{name} is missing: the comparisons of runs/reference/README.md make it")
    net = fourier_head.Network(args)
    net.load_state_dict(checkpoint.weights(found[-1]))
    return net(inputs.float()).softmax(1)


@torch.no_grad()
def numbers(seed):
    """The held-out inputs that are shown are the first that have two numbers as far apart as APART says."""
    both = {head: fourier_head.Args(seed=seed, head=head) for head in ("linear", "fourier")}
    _, _, inputs, exact = fourier_head.two_modes(both["fourier"])
    apart = (inputs[:, 0] - inputs[:, 1]).abs()
    chosen = [int(((low <= apart) & (apart <= high)).nonzero()[0]) for low, high in APART.values()]
    shown = dict(exact=exact) | {head: said(args, inputs) for head, args in both.items()}
    own = [fourier_head.smoothness(fourier_head.two_modes(fourier_head.Args(seed=s))[3]).mean().item() for s in SEEDS]
    return dict(
        frequencies={n: ends(flags(f"frequencies-{n}")) for n in FREQUENCIES},
        penalised=ends(flags("frequencies-20", "gamma-1e-6")),
        linear=ends("head-linear"),
        exact=own,
        points={
            name: {n: ends(flags(head, more))["kl"] for n, more in POINTS.items()}
            for name, head in zip(HEADS, ("head-linear", ""))
        },
        inputs=inputs[chosen].tolist(),
        densities={name: q[chosen].tolist() for name, q in shown.items()},
    )


def band(axis, x, seeds, colour, marker, label):
    """Mean over seeds, and the span as a bar."""
    mean = [statistics.mean(v) for v in seeds]
    span = [[m - min(v) for m, v in zip(mean, seeds)], [max(v) - m for m, v in zip(mean, seeds)]]
    axis.errorbar(x, mean, span, color=colour, marker=marker, ms=5, lw=1.4, capsize=3, label=label)


def level(axis, values, colour, label):
    """A horizontal line, with the span over seeds."""
    axis.axhspan(min(values), max(values), color=colour, alpha=0.2, lw=0)
    axis.axhline(statistics.mean(values), color=colour, ls="--", lw=1.3, label=label)


def draw(figure, data):
    top, bottom = figure.subplots(2, 3)
    titles = dict(kl="KL of held-out inputs, nats (lower is better)", smoothness="smoothness s(q) (nearest to exact is best)")
    for axis, (name, title) in zip(top, titles.items()):
        level(axis, data["linear"][name], LINEAR, "linear head")
        if name == "smoothness":
            level(axis, data["exact"], EXACT, "exact distribution")
        band(axis, FREQUENCIES, [data["frequencies"][str(n)][name] for n in FREQUENCIES], FOURIER, "o", "Fourier head")
        band(axis, [20.6], [data["penalised"][name]], "tab:green", "^", "the same, gamma = 1e-6")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("N, frequencies; 800 points", fontsize=9)
        axis.set_xticks(FREQUENCIES)
        axis.set_ylim(0)
        axis.legend(fontsize=8, frameon=False)
    for name, (colour, marker) in HEADS.items():
        of = data["points"][name]
        band(top[2], range(len(of)), list(of.values()), colour, marker, name)
    top[2].set_xticks(range(len(POINTS)), [f"{n:,}" for n in POINTS])
    top[2].set_xlim(-0.3, len(POINTS) - 0.7)
    top[2].set_ylim(0)
    top[2].set_title("the same KL, nats, with more points", fontsize=10)
    top[2].set_xlabel("training points", fontsize=9)
    top[2].legend(fontsize=8, frameon=False)
    z, found = fourier_head.centres(len(data["densities"]["exact"][0])).tolist(), data["densities"]
    for i, (axis, name, x) in enumerate(zip(bottom, APART, data["inputs"])):
        axis.fill_between(z, found["exact"][i], step="mid", color="0.8", label="exact")
        axis.plot(z, found["linear"][i], color=LINEAR, lw=1.2, drawstyle="steps-mid", label="linear head")
        axis.plot(z, found["fourier"][i], color=FOURIER, lw=1.8, label="Fourier, N = 12")
        axis.plot(x, [0, 0], ls="", marker="^", color="black", ms=7, clip_on=False, label="the two inputs")
        axis.set_title(f"a held-out input: {name}", fontsize=10)
        axis.set_xlabel("z, centre of a bin", fontsize=9)
        axis.set_ylim(0)
    bottom[0].set_ylabel("probability of a bin", fontsize=9)
    bottom[0].legend(fontsize=8, frameon=False)
    for axis in (*top, *bottom):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    figure.suptitle("mean over 3 seeds, bars and bands from the least to the greatest; below: one seed", fontsize=9)
