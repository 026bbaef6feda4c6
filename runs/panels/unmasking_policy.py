"""Unmasking policy: accuracy over denoising steps, beside a threshold on the confidence and orders that are not learned; and at
which step each position of a canvas is revealed."""

import statistics
from functools import partial
from types import SimpleNamespace

import torch

from algos import mdlm, unmasking_policy
from common import UserError, checkpoint, diffusion, gpu, models, settings, tasks
from runs import launch
from runs.panels import SEEDS

SIZE = (13, 4)
ALPHAS, ADDED, THRESHOLDS, STEPS = (0, 0.3, 1, 3), (1, 3), (0.15, 0.2, 0.3, 0.4, 0.9), (2, 4, 8)
CANVASES = {"whole canvas": 0, "blocks of 4": 4}
ORDERS = dict(random="random order", left="left to right")
LOOKS = {"threshold": ("0.3", "s"), "random order": ("tab:orange", "^"), "left to right": ("tab:green", "<")}
COLOURS = dict(zip(map(str, ALPHAS), ("#9ecae1", "#4292c6", "#08519c", "#08306b")))


def begun(seed):
    """What the script begins with, and the task's prompts."""
    args, _ = settings.resolve(unmasking_policy.Args(seed=seed))
    args.denoising_steps = args.max_new_tokens
    gpu.init(args)
    tokenizer = models.load_tokenizer(args, diffusion.world(args.task))
    task = tasks.load(args.task, tokenizer)
    denoiser = models.load(args, gpu.device(), trainable=False, denoiser=True)
    return SimpleNamespace(args=args, tokenizer=tokenizer, task=task, denoiser=denoiser)


def threshold(guess, masked, noise, temperature, args):
    """Reveals what the model is surer of than args.threshold, one position at least, in a canvas's first block with masks."""
    width, place = args.block_length or masked.shape[1], torch.arange(masked.shape[1])
    tokens = torch.zeros_like(masked, dtype=torch.int64)
    while masked.any():
        valid = masked & (place // width == masked.int().argmax(1, keepdim=True) // width)
        found, sure = guess(tokens, masked, noise[:, 0], 0)
        sure = sure.masked_fill(~valid, -1.0)
        revealed = valid & ((sure > args.threshold) | (sure == sure.amax(1, keepdim=True)))
        tokens, masked = torch.where(revealed, found, tokens), masked & ~revealed
    return tokens


def filled(s, unmask, n=1, **changes):
    """n canvases for each prompt -> share that is right, mean steps, and the mean step at which each position was revealed."""
    args, masks, trace = SimpleNamespace(**vars(s.args) | changes), [], []

    def watched(guess, masked, *rest):
        def asked(tokens, masked, *rest):
            masks.append(masked)
            return guess(tokens, masked, *rest)

        masks.clear()
        tokens = unmask(asked, masked, *rest)
        trace.append(torch.stack(masks, 1))  # [b, passes, L]
        return tokens

    engine = diffusion.Canvas(s.denoiser, s.tokenizer, args, watched)
    seeds = [gpu.hash_seed(args.seed, i, 13) for i in range(len(s.task.test))]
    out = engine.generate([e.ids for e in s.task.test], n, args.max_new_tokens, 0.0, seeds)
    texts = s.tokenizer.batch_decode([ids for ids, _, _ in out], skip_special_tokens=True)
    right = [s.task.check(text, s.task.test[i // n].answer)[1] and out[i][2] for i, text in enumerate(texts)]
    at = torch.cat([masked.sum(1).float() for masked in trace])  # passes in which a position was masked
    return dict(accuracy=sum(right) / len(right), steps=at.amax(1).mean().item(), places=at.mean(0).tolist())


def learned(s, name, n, **changes):
    """filled() by the network in the last checkpoint of a run that runs.compare has made."""
    found = sorted((launch.ROOT / "runs" / "compare" / name / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(f"runs/compare/{name} is missing: the comparisons of runs/reference/README.md make it")
    policy, trace = unmasking_policy.UnmaskingPolicy(s.args).eval(), []
    policy.load_state_dict(checkpoint.weights(found[-1]))
    out = filled(s, partial(unmasking_policy.unmask, policy, trace), n, **changes)
    steps = torch.cat([saw["valid"].any(2).sum(1) for saw in trace]).double()  # in blocks, canvases wait for each other
    return out | dict(steps=steps.mean().item())


def numbers(seed, n=6):
    """{canvas: {arm: [points]}}, of which those of the network are one a seed."""
    s, out = begun(seed), {}
    for canvas, width in CANVASES.items():
        of = dict(block_length=width)
        arms = dict(threshold=[filled(s, threshold, **of, threshold=x) for x in THRESHOLDS])
        for order, name in ORDERS.items():
            times = n if order == "random" else 1
            arms[name] = [filled(s, mdlm.unmask, times, **of, order=order, denoising_steps=steps) for steps in STEPS]
        more = f"-block-length-{width}" if width else ""
        names = {f"alpha {alpha}": f"alpha-{alpha}{more}" for alpha in ALPHAS}
        names |= {f"additive, alpha {alpha}": f"alpha-{alpha}-reward-form-additive" for alpha in ADDED if not width}
        for arm, flags in names.items():
            arms[arm] = [learned(s, f"unmasking_policy-{x}-{flags}", n, **of) for x in SEEDS]
        out[canvas] = arms
    return dict(canvases=out, prompts=len(s.task.test), samples=n)


def arms(seed, n=6):
    """For runs.claims, on the whole canvas -> {row: {accuracy, steps}}, of the network that was trained with this seed."""
    s, of = begun(1), dict(block_length=0)
    return {
        "threshold 0.15": filled(s, threshold, **of, threshold=THRESHOLDS[0]),
        "policy, alpha 0.3": learned(s, f"unmasking_policy-{seed}-alpha-0.3", n, **of),
        "random order, 2 steps": filled(s, mdlm.unmask, n, **of, order="random", denoising_steps=2),
        "left to right, 2 steps": filled(s, mdlm.unmask, 1, **of, order="left", denoising_steps=2),
    }


def draw(figure, data):
    *axes, strip = figure.subplots(1, 3, width_ratios=[1, 1, 1.15])
    for axis, (canvas, arms) in zip(axes, data["canvases"].items()):
        for name, points in arms.items():
            x, y = [p["steps"] for p in points], [p["accuracy"] for p in points]
            if name in LOOKS:
                colour, marker = LOOKS[name]
                axis.plot(x, y, color=colour, marker=marker, ms=4, lw=1.2, label=name)
            else:
                look = dict(marker="x", mew=1.6) if "additive" in name else dict(marker="o", mec="white", mew=0.6)
                axis.plot(x, y, ls="", color=COLOURS[name.split()[-1]], ms=7, label=f"policy, {name}", zorder=3, **look)
        axis.set_title(canvas, fontsize=10)
        axis.set_xlabel("mean denoising steps", fontsize=9)
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel(f"share right, {data['prompts']} prompts", fontsize=9)
    axes[0].legend(fontsize=6.5, frameon=False, loc="lower right")
    whole = data["canvases"]["whole canvas"]
    rows = {f"policy, alpha {a}": whole[f"alpha {a}"] for a in ALPHAS}
    rows |= {f"threshold {t}": [p] for t, p in zip(THRESHOLDS, whole["threshold"]) if t in (0.2, 0.9)}
    rows |= {f"left to right, {n} steps": [p] for n, p in zip(STEPS, whole["left to right"]) if n == 4}
    places = [[statistics.mean(p["places"][k] for p in of) for k in range(len(of[0]["places"]))] for of in rows.values()]
    strip.imshow(places, cmap="viridis_r", vmin=1, vmax=8, aspect="auto")
    for i, row in enumerate(places):
        for k, value in enumerate(row):
            strip.text(k, i, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if value > 4 else "black")
    strip.set_yticks(range(len(rows)), list(rows), fontsize=8)
    strip.set_xticks(range(len(places[0])), [*"aa+bb", *["end"] * (len(places[0]) - 5)], fontsize=8)
    strip.set_title("whole canvas: mean step at which a position is revealed", fontsize=9)
