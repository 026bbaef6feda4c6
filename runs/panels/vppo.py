"""VPPO: what half of a picture made black says of each character, how much signal the kept tokens carry, and the arms."""

import re
import statistics
from types import SimpleNamespace

import torch

from algos import vppo
from common import rollout
from common.worlds import tiny_vision
from runs import compare, launch
from runs.panels import sighted

SIZE = (13, 8.6)
RECORD = launch.ROOT / "runs" / "reference" / "vision-vppo"
# Items of the comparison, and what they are called here.
ARMS = {
    "grpo_vision": "GRPO",
    "vppo,kappa=1,beta-min=1": "all tokens, all alike",
    "vppo,kappa=1": "shaping only",
    "vppo,beta-min=1": "mask only",
    "vppo": "VPPO",
    "vppo,mask=random": "VPPO, mask at random",
    "vppo,mask=entropy": "VPPO, mask by entropy",
    "vppo,penalty=0": "VPPO without the penalty",
}
KINDS = dict(count="a count", sum="the sum", text="any other")
COLOURS = dict(dependency="tab:blue", entropy="tab:orange", random="0.55", lowest="tab:red")


def rolled(s, examples, step):
    """A rollout of the start, read twice -> the batch with its columns."""
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, examples, s.args, step)
    batch.old_logp, entropy, S, chance = vppo.read_twice(s.policy, batch, step, s.args)
    batch.columns |= dict(dependency=S, entropy=entropy, random=chance, lowest=-S)
    return batch


def kinds(texts, mask):
    """[B, T] each, one token a character -> {kind: bool [B, T]}."""
    of = {k: torch.zeros_like(mask) for k in KINDS}
    for i, text in enumerate(texts):
        for match in re.finditer(r"=(\d+)|;(\d+)", text):
            kind = "count" if match[1] else "sum"
            of[kind][i, match.start() + 1 : match.end()] = True
    of["text"] = mask & ~of["count"] & ~of["sum"]
    return of


def ratio(gradients):
    """[n, weights], a gradient per rollout -> |mean|^2, by the products of different ones, over what else one has."""
    gram = gradients @ gradients.T
    n, single = len(gram), gram.diagonal().mean()
    signal = (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    return (signal / (single - signal)).item()


def signals(s, batches):
    """{arm: signal to noise of the policy gradient, and its standard error by leaving out one rollout each time}."""
    gradients, weights = {}, [p for p in s.policy.parameters() if p.requires_grad]
    for batch in batches:
        adv = vppo.advantages(batch.reward.view(-1, batch.group), s.args).flatten()[:, None] * batch.mask
        S, mask = batch.columns["dependency"], batch.mask
        arms = {"all tokens": adv, "VPPO": adv * vppo.pivotal(S, mask, 0.4) * vppo.shaping(S, mask, s.args)[:, None]}
        for score in COLOURS:
            for kappa in (0.4, 0.15):
                arms[f"{score} {kappa}"] = adv * vppo.pivotal(batch.columns[score], mask, kappa)
        logp, _ = s.policy(batch.ids, batch.attention_mask, mask, s.args.temperature)
        for name, a in arms.items():
            loss = -(logp * a * vppo.token_weights(mask, s.args)).sum()
            found = torch.autograd.grad(loss, weights, retain_graph=True)
            gradients.setdefault(name, []).append(torch.cat([g.flatten() for g in found]).double())
    out = {}
    for name, found in gradients.items():
        found, n = torch.stack(found), len(found)
        left = [ratio(found[torch.arange(n) != i]) for i in range(n)]
        mean = statistics.mean(left)
        out[name] = dict(ratio=ratio(found), error=((n - 1) / n * sum((x - mean) ** 2 for x in left)) ** 0.5)
    return out


def pixels(patches):
    """[16, channels * times * y * x], values -1 to 1 -> rows of pixels, 0 to 255."""
    n, p = tiny_vision.CELLS, tiny_vision.PIXELS
    x = patches.view(n, n, 3, 2, p, p)[:, :, :, 0].permute(0, 3, 1, 4, 2).reshape(n * p, n * p, 3)
    return ((x + 1) * 127.5).round().int().tolist()


def shown(s, examples):
    """Of held-out scenes: the picture, what was left of it, and a completion with S of every character."""
    out, s = [], SimpleNamespace(**vars(s) | dict(args=SimpleNamespace(**vars(s.args) | dict(group_size=1))))
    for i, e in enumerate(examples):
        batch = rolled(s, [e], i)
        ((dark, *_),) = s.policy.pictures.own.values()
        S, M = batch.columns["dependency"], vppo.pivotal(batch.columns["dependency"], batch.mask, s.args.kappa)
        out.append(dict(asked=e.prompt, right=e.answer, said=batch.texts[0], dependency=S[0].tolist(), kept=M[0].tolist(),
                        true=pixels(s.policy.pictures[-2 - min(e.ids)][0]), dark=pixels(dark)))  # fmt: skip
    return out


def numbers(seed, rollouts=8, scenes=3):
    s = sighted(vppo, seed=seed)
    P, out = s.args.prompts_per_step, dict(scenes=[])
    out["scenes"] = shown(s, s.task.test[:scenes])
    batches = [rolled(s, s.task.order(i * P, P, seed), i) for i in range(rollouts)]
    s.args.dependency = "kl"
    kl = [vppo.read_twice(s.policy, batch, i, s.args)[2] for i, batch in enumerate(batches)]
    out["kinds"] = {}
    of = [kinds(batch.texts, batch.mask) for batch in batches]
    kept = [vppo.pivotal(batch.columns["dependency"], batch.mask, s.args.kappa) for batch in batches]
    for kind in KINDS:
        where = [k[kind] for k in of]
        k3 = torch.cat([b.columns["dependency"][w] for b, w in zip(batches, where)])
        out["kinds"][kind] = dict(
            k3=k3.mean().item(), kl=torch.cat([x[w] for x, w in zip(kl, where)]).mean().item(),
            kept=torch.cat([m[w] for m, w in zip(kept, where)]).float().mean().item(),
            tokens=len(k3) / sum(int(b.mask.sum()) for b in batches),
        )  # fmt: skip
    out["signals"] = signals(s, batches)
    record = compare.recorded(RECORD)
    ends = {name: [rows[-1] for rows in record["curves"][item]] for item, name in ARMS.items()}
    out["arms"] = {
        name: dict(greedy=[r["greedy_accuracy"] for r in rows], sampled=[r["avg@4"] for r in rows])
        for name, rows in ends.items()
    }
    before = record["curves"]["grpo_vision"][0][0]
    out["before"] = dict(greedy=before["greedy_accuracy"], sampled=before["avg@4"])
    return out


def letter(axis, x, y, character, S, kept, colours):
    """One character on the colour of its S, underlined where it is kept."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), 1, 1.5, color=colours((S / 3) ** 0.5 if S < 3 else 1.0), lw=0))
    ink = "white" if S > 1.2 else "black"
    axis.text(x + 0.5, y + 0.7, character, ha="center", va="center", fontsize=12, family="monospace", color=ink)
    if kept:
        axis.plot([x + 0.1, x + 0.9], [y - 0.25] * 2, color="black", lw=2, solid_capstyle="butt")


def draw(figure, data):
    import matplotlib.pyplot as plt

    colours = plt.get_cmap("Blues")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.6, 1])
    grid = top.add_gridspec(len(data["scenes"]), 3, width_ratios=[1, 1, 5])
    for i, scene in enumerate(data["scenes"]):
        for j, k in enumerate(("true", "dark")):
            axis = top.add_subplot(grid[i, j])
            axis.imshow(scene[k], interpolation="nearest")
            axis.set_xticks([x - 0.5 for x in range(0, 17, 4)], [])
            axis.set_yticks([x - 0.5 for x in range(0, 17, 4)], [])
            axis.grid(color="0.35", lw=0.6)
            axis.tick_params(length=0)
            if not i:
                axis.set_title(("the picture", "in the dark")[j], fontsize=10)
        axis = top.add_subplot(grid[i, 2])
        said = [*scene["said"], "⏎"]
        for x, (character, S, kept) in enumerate(zip(said, scene["dependency"], scene["kept"])):
            letter(axis, x, 0, character, S, kept, colours)
            if S > 0.05:
                axis.text(x + 0.5, 1.62, f"{S:.1f}", ha="center", va="bottom", fontsize=8)
        axis.text(0, 2.7, f"{scene['asked']}  (right: {scene['right']})", fontsize=10)
        axis.set_xlim(-0.3, 40)
        axis.set_ylim(-1.2, 3.6)
        axis.set_axis_off()
        if not i:
            axis.set_title("S of every character; underlined: kept at kappa 0.4", fontsize=10, loc="left")
    by_kind, signal, arms = bottom.subplots(1, 3, width_ratios=[1, 1.25, 1.5])
    for i, (k, name) in enumerate((("k3", "S"), ("kl", "KL"))):
        values = [of[k] for of in data["kinds"].values()]
        bars = by_kind.bar([x + 0.38 * i for x in range(len(values))], values, 0.36, color=("tab:blue", "0.6")[i], label=name)
        by_kind.bar_label(bars, [f"{v:.1g}" for v in values], fontsize=7)
    labels = [f"{KINDS[k]}:\n{of['tokens']:.0%} of\ntokens,\n{of['kept']:.0%} kept" for k, of in data["kinds"].items()]
    by_kind.set_xticks([x + 0.19 for x in range(len(labels))], labels, fontsize=8)
    by_kind.set_yscale("log")
    by_kind.set_ylim(top=5)
    by_kind.set_title("mean dependency by kind, nats", fontsize=10)
    by_kind.legend(fontsize=8, frameon=False)
    for i, (name, of) in enumerate(reversed(data["signals"].items())):
        colour = COLOURS.get(name.split()[0], "tab:blue" if name == "VPPO" else "black")
        signal.barh(i, of["ratio"], 0.7, xerr=of["error"], color=colour, error_kw=dict(ecolor="0.3", lw=0.8))
    names = [n if n in ("all tokens", "VPPO") else n.replace(" ", " mask, kappa ") for n in reversed(data["signals"])]
    signal.set_yticks(range(len(names)), names, fontsize=8)
    signal.set_title("signal to noise of the start's gradient", fontsize=10)
    signal.axvline(0, color="black", lw=0.6)
    signal.set_xlabel("|mean|² over the rest, 8 rollouts; line: jackknife error", fontsize=8)
    for i, of in enumerate(reversed(data["arms"].values())):
        for k, marker, colour in (("greedy", "o", "tab:blue"), ("sampled", "s", "tab:orange")):
            arms.plot(of[k], [i] * len(of[k]), marker, ms=4, color=colour, alpha=0.45)
            arms.plot([statistics.mean(of[k])] * 2, [i - 0.3, i + 0.3], color=colour, lw=2, label=k if not i else None)
    arms.set_yticks(range(len(data["arms"])), list(reversed(data["arms"])), fontsize=8)
    for k, colour in (("greedy", "tab:blue"), ("sampled", "tab:orange")):
        arms.axvline(data["before"][k], color=colour, lw=0.8, ls=":")
    arms.set_title("accuracy after 40 rollouts (dotted: before)", fontsize=10)
    arms.set_xlabel("held-out scenes; points: seeds, bars: their mean", fontsize=8)
    arms.legend(fontsize=8, frameon=False, loc="lower left")
    for axis in (by_kind, signal, arms):
        axis.grid(alpha=0.25)
        axis.tick_params(axis="x", labelsize=8)
