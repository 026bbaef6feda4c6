"""ATP-Latent: accuracy, coherence and latents used over the training, by what is paid for; what the decoder reads in the
latents of a question, and between those of two questions."""

import re

import torch

from algos import atp_latent
from common import checkpoint, gpu, models, settings
from runs import launch, pictures
from runs.panels import SEEDS, columns, rows

SIZE = (12.4, 6.6)
# The flags in a run folder's name, colour, line.
ARMS = {
    "accuracy + coherence": ("", "tab:blue", "-"),
    "accuracy": ("coherence-weight-0", "tab:orange", "--"),
    "coherence": ("accuracy-weight-0-coherence-weight-1", "tab:red", "-."),
    "both, sigma 0.02": ("fixed-sigma-0.02-kl-weight-0", "tab:green", ":"),
}
SHOWN = {"avg@4": "right, sampled (held out)", "coherence": "coherence, greedy", "latents": "latents used, greedy"}
PATHS = {"learned sigma": "accuracy + coherence", "sigma 0.02": "both, sigma 0.02"}
POINTS, PAIRS = 11, 100


def trained(flags, seed):
    """The end of a run -> engine, decoder, task, tokenizer, args."""
    folder = launch.ROOT / "runs" / "compare" / "-".join(["atp_latent", str(seed), *([flags] if flags else [])])
    args, _ = settings.resolve(atp_latent.Args(model=str(folder), task="chains", seed=seed), atp_latent.chains)
    gpu.init(args)
    tokenizer, run = models.load_tokenizer(args), type("Run", (), dict(extra={}))
    task, marks = atp_latent.questions(args, tokenizer)
    policy, heads, decoder = atp_latent.make_parts(models.load(args, gpu.device()), args, run)
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    for name, module in dict(heads=heads, decoder=decoder).items():
        module.load_state_dict(checkpoint.weights(last, name))
    return atp_latent.make_engine(policy, heads, tokenizer, marks, args), decoder, task, tokenizer, args


def valid(step):
    """Whether it is a sum modulo 10."""
    found = re.fullmatch(r"(\d)\+(\d)=(\d)", step)
    return bool(found) and (int(found[1]) + int(found[2])) % 10 == int(found[3])


def between(flags, seed):
    """First latents of two questions, and points on the line between them -> the share of valid steps at each, and one line."""
    engine, decoder, task, tokenizer, args = trained(flags, seed)
    some = atp_latent.heard(engine, decoder, task.test[: 2 * PAIRS], tokenizer, args)
    first = torch.stack([z[0] for z, _, _ in some if len(z)])
    a, b = first[: len(first) // 2 * 2].chunk(2)
    steps = [atp_latent.decode(decoder, a + (b - a) * i / (POINTS - 1), tokenizer) for i in range(POINTS)]
    shown = [dict(prompt=e.prompt, gold=e.answer, steps=s, text=text) for e, (_, s, text) in zip(task.test, some[:5])]
    share = [[i / (POINTS - 1), sum(map(valid, step)) / len(step)] for i, step in enumerate(steps)]
    return dict(valid=share, line=[step[0] for step in steps], shown=shown)


def numbers(seed):
    evals = {name: [rows("atp_latent", flags, "evals", s) for s in SEEDS] for name, (flags, _, _) in ARMS.items()}
    curves = {name: columns(of, None, *SHOWN) for name, of in evals.items()}
    return dict(curves=curves, paths={name: [between(ARMS[arm][0], s) for s in SEEDS] for name, arm in PATHS.items()})


def draw(figure, data):
    axes = figure.subplot_mosaic([list(SHOWN), ["path", "words", "words"]], height_ratios=(1, 1.05))
    for name, (_, colour, line) in ARMS.items():
        for y in SHOWN:
            pictures.curve(axes[y], data["curves"][name][y], colour, ls=line, lw=1.5, label=name)
    for name, arm in PATHS.items():
        seeds = [of["valid"] for of in data["paths"][name]]
        pictures.curve(axes["path"], seeds, ARMS[arm][1], ls=ARMS[arm][2], marker="o", ms=3, label=name)
    titles = SHOWN | dict(path="valid steps between two questions' first latents")
    for y, title in titles.items():
        axes[y].set_title(title, fontsize=10)
        axes[y].set_xlabel("share of the way" if y == "path" else "rollout", fontsize=9)
        axes[y].grid(alpha=0.25)
        axes[y].tick_params(labelsize=8)
        axes[y].legend(fontsize=7, frameon=False)
    axes["path"].set_ylim(0, 1.05)
    lines = ["greedy latents, in the decoder's words (learned sigma, seed 1)", ""]
    for row in data["paths"]["learned sigma"][0]["shown"]:
        lines.append(f"{row['prompt']:<6} {'  '.join(row['steps']):<24} -> {row['text']:<2} (right: {row['gold']})")
    lines += ["", "on the way from one latent to another, 0 to 1"]
    for name in PATHS:
        line = data["paths"][name][0]["line"]
        lines.append(f"{name + ':':<15}{' '.join(line[:: max(1, len(line) // 5)])}")
    axes["words"].axis("off")
    axes["words"].text(0.02, 0.95, "\n".join(lines), family="monospace", fontsize=8.5, va="top")
