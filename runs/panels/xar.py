"""xAR: an image of every class by every kind of entity at the end of training, and the share that is valid, by entity."""

import json
import statistics

import torch

from algos import xar
from common import UserError, checkpoint, gpu
from runs import compare, launch, pictures
from runs.panels import SEEDS

SIZE = (13, 4.3)
ENTITIES = ("token", "cell", "subsample", "scale", "image")
COLOURS = dict(zip(ENTITIES, ("tab:blue", "tab:green", "tab:orange", "tab:purple", "0.5")))
VALID, NOT = (60, 200, 90), (70, 70, 70)  # of a frame
SHAPES, PAINTS = ("box", "ring", "plus", "bar"), ("red", "green", "blue", "gold")


def folder(flags, seed):
    """Of a run that runs.compare has made."""
    found = launch.ROOT / "runs" / "compare" / f"xar-{seed}-{flags}"
    if not (found / "evals.jsonl").exists():
        raise UserError(f"runs/compare/{found.name} is missing: the comparisons of runs/reference/README.md make it")
    return found


def evaluations(flags):
    """[rows of evals.jsonl] of every seed: step, valid and class_accuracy."""
    runs = [compare.rows_of(folder(flags, seed) / "evals.jsonl") for seed in SEEDS]
    return [[{k: row[k] for k in ("step", "valid", "class_accuracy", "calls")} for row in rows] for rows in runs]


def drawn(flags, seed):
    """One image of every class by the last checkpoint of a run -> pixels of 0 to 255, and whether each is valid."""
    place = folder(flags, seed)
    args = xar.Args(**json.loads((place / "config.json").read_text())["args"])
    policy, last = xar.Generator(args), sorted((place / "checkpoints").glob("step-*"))[-1]
    policy.load_state_dict(checkpoint.weights(last))
    label, g = torch.arange(xar.NULL), torch.Generator().manual_seed(gpu.hash_seed(seed, 2, 2))
    noise = torch.randn(xar.NULL, 1, len(policy.net.which), 12, generator=g)
    images = xar.joined(xar.sample(policy.ema.module, label, noise, args)[0], args.entity)
    world = xar.class_images()
    valid = [xar.judged(x[None], c[None], world)["valid"] == 1 for x, c in zip(images, label)]
    return dict(pixels=pixels(images), valid=valid)


def pixels(images):
    """[n, 3, 8, 8] in [-1, 1] -> nested lists [n][8][8][3] of 0 to 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().int().permute(0, 2, 3, 1).tolist()


def numbers(seed):
    """{part: {arm: ...}}; the images are of the run with this seed."""
    entities = {name: evaluations(f"entity-{name}") for name in ENTITIES}
    true = dict(pixels=pixels(xar.class_images()[12::25]), valid=[True] * xar.NULL)
    images = dict(data=true) | {name: drawn(f"entity-{name}", seed) for name in ENTITIES}
    return dict(entities=entities, images=images)


def framed(rows):
    """{name: pixels and valid} -> one picture [y, x, 3] of 0 to 255, a row a name."""
    rows = list(rows)
    out = torch.full((11 * len(rows) - 1, 11 * xar.NULL - 1, 3), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, (image, valid) in enumerate(zip(row["pixels"], row["valid"])):
            out[11 * i : 11 * i + 10, 11 * j : 11 * j + 10] = torch.tensor(VALID if valid else NOT, dtype=torch.uint8)
            out[11 * i + 1 : 11 * i + 9, 11 * j + 1 : 11 * j + 9] = torch.tensor(image, dtype=torch.uint8)
    return out.numpy()


def draw(figure, data):
    left, right = figure.subfigures(1, 2, width_ratios=[2.6, 1])
    grid, images, entities = left.subplots(), data["images"], data["entities"]
    grid.imshow(framed(images.values()), interpolation="nearest")
    grid.set_xticks([11 * j + 4.5 for j in range(xar.NULL)], [f"{c}\n{s}" for s in SHAPES for c in PAINTS], fontsize=7.5)
    ends = {name: [rows[-1] for rows in runs] for name, runs in entities.items()}
    names = [f"{name},\n{ends[name][0]['calls']:.0f} passes" if name in ends else "from the data" for name in images]
    grid.set_yticks([11 * i + 4.5 for i in range(len(images))], names, fontsize=8.5)
    grid.tick_params(length=0)
    grid.set_frame_on(False)
    steps = ends["cell"][0]["step"]
    grid.set_title(f"one image of every class after {steps} updates, by what is generated at once (green: valid)", fontsize=10)
    curves, bars = right.subplots(2, 1, sharey=True)
    for i, (name, runs) in enumerate(entities.items()):
        pictures.curve(curves, [[(r["step"], r["valid"]) for r in rows] for rows in runs], COLOURS[name], lw=1.5)
        last = [row["valid"] for row in ends[name]]
        bars.bar(i, statistics.mean(last), color=COLOURS[name], width=0.65)
        bars.plot([i] * len(last), last, ls="", marker="o", ms=3.5, color="black")
        bars.text(i, max(last) + 0.03, f"{statistics.mean(last):.2f}", ha="center", fontsize=8)
    curves.set_title("share valid, over updates (band: seeds)", fontsize=9)
    bars.set_title(f"after {steps} updates (dots: seeds)", fontsize=9)
    bars.set_xticks(range(len(entities)), list(entities))
    for axis in (curves, bars):
        axis.set_ylim(0, 1.1)
        axis.grid(alpha=0.25, axis="y")
        axis.tick_params(labelsize=8)
