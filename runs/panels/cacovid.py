"""CaCoVID: what is answered, and how many needles are kept, over budgets, beside attention, density peaks and chance; and some
held-out clips with what is kept of them."""

from functools import cache
from types import SimpleNamespace

import torch

from algos import cacovid
from common import UserError, checkpoint, gpu, models, settings, vision
from common.worlds import tiny_vision
from runs import launch, pictures
from runs.panels import SEEDS, rows

SIZE = (16, 9.5)
BUDGETS, SHOWN, STRIP = (4, 8, 16, 32), 8, 4  # of 64 tokens; the budget of the strip, and its clips
# Arms and their looks; of the first two the flags in the folders of runs.compare.
RUNS = {"selector, OCSS": "", "selector, multinomial": "sampling-multinomial"}
LOOKS = {
    "selector, OCSS": ("tab:blue", "-", "o"), "selector, multinomial": ("tab:orange", "-", "s"),
    "attention, layer 1": ("tab:green", "--", "^"), "attention, layer 2": ("tab:olive", "--", "v"),
    "density peaks": ("tab:red", ":", "D"), "random": ("0.5", ":", "x"),
}  # fmt: skip
ROWS = ("selector, OCSS", "attention, layer 1", "density peaks")


def begun(seed):
    """What the script begins with, and its model once more with attention that can be looked at."""
    warm = cache(cacovid.worlds)
    args, _ = settings.resolve(cacovid.Args(seed=seed), warm)
    gpu.init(args)
    processor = vision.load_processor(args, args.image_tokens, warm)
    task, pics = vision.load(args, processor, warm(args.task))
    policy, plain = (models.load(args, gpu.device(), trainable=False, warm=warm) for _ in range(2))
    vision.look(policy, task, pics)
    plain.lm.set_attn_implementation("eager")
    answer = cacovid.answer_ids(task, pics, args)
    return SimpleNamespace(args=args, task=task, pictures=pics, policy=policy, plain=plain, answer=answer)


def learned(s, flags, seed):
    """The selector in the last checkpoint of a run that runs.compare has made."""
    name = "-".join(["cacovid", str(seed), *([flags] if flags else [])])
    found = sorted((launch.ROOT / "runs" / "compare" / name / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(f"runs/compare/{name} is missing: the comparisons of runs/reference/README.md make it")
    selector = cacovid.Selector(gpu.body(s.policy.lm).layers, seed)
    selector.load_state_dict(checkpoint.weights(found[-1]))
    return selector


@torch.no_grad()
def scored(s, q, selectors, noise):
    """A question -> {arm: [(scores of tokens [T, n], of frames [T]), one a seed]}; without scores frames have equal shares."""
    even, shape = torch.zeros(q.T), (q.T, q.n)
    out = {name: [] for name in LOOKS}
    for name, of in selectors.items():
        for net in of:
            token, frame = (cacovid.keep_score(x) for x in net(q))
            out[name].append((token.view(shape), frame))
    fed = dict(inputs_embeds=q.x[:, : q.asked], position_ids=q.positions[..., : q.asked], use_cache=False)
    seen = gpu.body(s.plain.lm)(**fed, attention_mask=torch.ones(1, q.asked), output_attentions=True).attentions
    for layer, weights in enumerate(seen, 1):  # of the last question token, the mean over heads
        out[f"attention, layer {layer}"].append((weights[0, :, -1, q.video].mean(0).view(shape), even))
    for generator in noise:
        out["density peaks"].append((cacovid.density_peaks(q.x[0, q.video].view(*shape, -1), generator), even))
        out["random"].append((torch.rand(shape, generator=generator), even))
    return out


def numbers(seed):
    s = begun(seed)
    selectors = {name: [learned(s, flags, k) for k in SEEDS] for name, flags in RUNS.items()}
    found, strip = {}, []
    for e in s.task.test:
        q, place = cacovid.question(s.policy, s.pictures, e, s.answer[e.id]), cacovid.scene(e.id)[1]
        noise = [torch.Generator().manual_seed(gpu.hash_seed(seed, k, e.id)) for k in SEEDS]
        arms = scored(s, q, selectors, noise)
        which = [(name, k, b) for name, of in arms.items() for k in range(len(of)) for b in BUDGETS]
        masks = torch.stack([cacovid.kept(*arms[name][k], b, s.args) for name, k, b in which])
        everything = torch.ones_like(masks[:1])
        *right, whole, none = cacovid.answered(s.policy, q, torch.cat([masks, everything, ~everything]), s.args).tolist()
        for (name, k, b), mask, x in zip(which, masks, right):
            found.setdefault((name, b), [[] for _ in arms[name]])[k].append((x, float(mask.flatten()[place])))
        found.setdefault("all", []).append(whole)
        found.setdefault("none", []).append(none)
        if len(strip) < STRIP:
            at = {name: which.index((name, 0, SHOWN)) for name in ROWS}
            shown = {name: dict(kept=masks[i].flatten().nonzero()[:, 0].tolist(), right=right[i]) for name, i in at.items()}
            strip.append(dict(id=e.id, prompt=e.prompt, answer=e.answer, arms=shown, score=arms[ROWS[0]][0][0].tolist()))
    curves = dict(accuracy={}, recall={})
    for name, b in [key for key in found if isinstance(key, tuple)]:
        means = [torch.tensor(of).mean(0).tolist() for of in found[name, b]]
        for i, arms in enumerate(curves.values()):
            runs = arms.setdefault(name, [[] for _ in means])
            for run, mean in zip(runs, means):
                run.append((b, mean[i]))

    def points(flags, k):
        return [(e["step"] * s.args.repetitions, e["greedy_accuracy"]) for e in rows("cacovid", flags, "evals", k)]

    over = {name: [points(flags, k) for k in SEEDS] for name, flags in RUNS.items()}
    ends = {k: sum(found[k]) / len(found[k]) for k in ("all", "none")}
    return dict(curves=curves, over=over, ends=ends, clips=len(s.task.test), strip=strip, budget=s.args.budget)


def arms(seed, budget=8):
    """For runs.claims -> {row: {accuracy with so many tokens}}, of the selector and the draw of this seed."""
    found, out = numbers(1)["curves"]["accuracy"], {}
    for name, runs in found.items():  # attention has no draw of its own: one for all seeds
        out[name] = {f"accuracy, {budget} tokens": dict(runs[min(seed, len(runs)) - 1])[budget]}
    return out


def draw(figure, data):
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    *axes, over = above.subplots(1, 3)
    for axis, what in zip(axes, ("accuracy", "recall")):
        for name, runs in data["curves"][what].items():
            colour, line, marker = LOOKS[name]
            pictures.curve(axis, runs, colour, ls=line, lw=1.5, marker=marker, ms=4, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        axis.set_xlabel("tokens that are kept, of 64", fontsize=9)
    axes[0].set_title(f"answered right, {data['clips']} held-out clips", fontsize=10)
    axes[1].set_title("needles among what is kept", fontsize=10)
    for name, runs in data["over"].items():
        colour, line, _ = LOOKS[name]
        pictures.curve(over, runs, colour, ls=line, lw=1.5, marker=".", label=name)
    over.set_title(f"answered right from {data['budget']:g} tokens", fontsize=10)
    over.set_xlabel("updates", fontsize=9)
    for axis in (axes[0], over):
        for value, words in ((data["ends"]["all"], "from all 64"), (data["ends"]["none"], "from none")):
            axis.axhline(value, color="0.6", lw=0.8, ls=":")
            axis.annotate(words, (0.99, value), xycoords=("axes fraction", "data"), fontsize=7, va="bottom", ha="right")
    for axis in (*axes, over):
        axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    axes[1].legend(fontsize=7, frameon=False, loc="upper left")
    words = f"{SHOWN} of 64 tokens are kept: in white; the needle: in a circle; selector of seed {SEEDS[0]}"
    below.suptitle(f"the first held-out clips, each of four times; {words}", fontsize=10)
    grid = below.subplots(len(ROWS) + 1, len(data["strip"]))
    for column, clip in zip(grid.T, data["strip"]):
        things, place = cacovid.scene(clip["id"])
        at = [[(*thing, cell % 16) for cell, thing in things.items() if cell // 16 == t] for t in range(4)]
        scene = [tiny_vision.render(some) for some in at]
        for axis, name in zip(column, ROWS):
            arm = clip["arms"][name]
            show(axis, scene, place, arm["kept"])
            said = "right" if arm["right"] else "wrong"
            axis.set_title(f"{name}: {said}", fontsize=9, color="tab:green" if arm["right"] else "tab:red", pad=3)
        show(column[-1], clip["score"], place, ())
        column[-1].set_title("selector's score in each frame", fontsize=9, pad=3)
        asked = f"{clip['prompt']} → {clip['answer'][1:]}"
        column[0].annotate(asked, (0.5, 1.32), xycoords="axes fraction", ha="center", fontsize=11, weight="bold")


def show(axis, frames, place, kept):
    """The frames of four times, pictures or 16 scores each, with the needle in a circle and what is kept in white."""
    from matplotlib import patches

    for t, frame in enumerate(frames):
        around = (18 * t, 18 * t + 16, 16, 0)
        if isinstance(frame, list):
            low, high = min(frame), max(frame)
            frame = [[(x - low) / (high - low + 1e-9) for x in frame[4 * i : 4 * i + 4]] for i in range(4)]
        axis.imshow(frame, extent=around, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for cell in {place, *kept}:
        y, x = 4 * (cell % 16 // 4), 18 * (cell // 16) + 4 * (cell % 4)
        if cell in kept:
            axis.add_patch(patches.Rectangle((x, y), 4, 4, fill=False, ec="white", lw=2))
        if cell == place:
            axis.add_patch(patches.Circle((x + 2, y + 2), 3, fill=False, ec="magenta", lw=2, clip_on=False, zorder=3))
    axis.set_xlim(-5, 75)
    axis.set_ylim(16, 0)
    axis.set_aspect("equal")
    axis.set_axis_off()
