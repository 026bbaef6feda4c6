"""TW-GRPO: two scenes with what a group says of them, each character coloured by the weight of its place; the weights beside
entropy and beside the share of completions that have ended, by place and by kind of character; and what the arms came to."""

import dataclasses
import statistics

from algos import tw_grpo
from common import rollout
from common.batch import read
from common.worlds import events
from runs.panels import SEEDS, rows, sighted

SIZE = (13.5, 7.6)
SCENES, SHOWN = 64, 5  # held-out questions that are looked at; completions of a group that are shown
RUN = "eval-every-15{}-steps-45-task-events"
# The script and the flags in its run folders' names, before and behind RUN's first; the colour.
ARMS = {
    "GRPO": ("grpo_vision", RUN.format(""), "0.55"),
    "binary, w = 1": ("tw_grpo", "alpha-1-" + RUN.format("-no-soft-reward"), "tab:cyan"),
    "soft, w = 1": ("tw_grpo", "alpha-1-" + RUN.format(""), "tab:green"),
    "soft, w": ("tw_grpo", RUN.format(""), "tab:blue"),
    "soft, w shuffled": ("tw_grpo", RUN.format("-shuffle"), "tab:orange"),
    "soft, w of KL": ("tw_grpo", "divergence-kl-" + RUN.format(""), "tab:purple"),
}
KINDS = ("option", "event", "separator", "answer", "end")


def kinds(text, n):
    """What the n characters of a completion are, its end included."""
    out, told = [], True
    for c in text:
        told = told and c != ";"
        out.append("separator" if c in ",;" else ("option" if told else "answer") if c in events.THINGS else "event")
    return (out + ["end"])[:n]


def looked_at(seed):
    """A rollout on held-out questions at the warm start -> args, its batch with weights of both kinds, and the examples."""
    s = sighted(tw_grpo, seed=seed)
    args, policy, examples = s.args, s.policy, s.task.test[:SCENES]
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, examples, args, 0)
    batch.reward = tw_grpo.graded(batch)
    for kind in ("k3_log_mean", "kl"):
        batch.columns[kind] = tw_grpo.importance(policy, batch, dataclasses.replace(args, divergence=kind), 0)[1]
    batch.columns["entropy"] = read(policy, batch, args)[1]
    return args, batch, examples


def by_place(batch):
    """Means over groups of weights and of the share of rows that have ended, as far as the group's longest row; of entropy over
    the rows that go on. Places that fewer than a quarter of the groups reach are left out."""
    living = batch.mask.view(-1, batch.group, batch.mask.shape[1])
    reached, out = living.any(1), {}
    n = int((reached.float().mean(0) >= 0.25).sum())
    for kind in ("k3_log_mean", "kl"):
        w = batch.columns[kind].view_as(living)[:, 0]
        out[kind] = [w[reached[:, t], t].mean().item() for t in range(n)]
    out["entropy"] = [batch.columns["entropy"][batch.mask[:, t], t].mean().item() for t in range(n)]
    out["ended"] = [1 - living[reached[:, t], :, t].float().mean().item() for t in range(n)]
    return out


def by_kind(batch):
    """{kind of character: [mean weight by k3, by KL, mean entropy, share of the tokens]}."""
    found = {kind: [] for kind in KINDS}
    columns = [batch.columns[name] for name in ("k3_log_mean", "kl", "entropy")]
    for i, text in enumerate(batch.texts):
        for t, kind in enumerate(kinds(text, int(batch.mask[i].sum()))):
            found[kind].append([column[i, t].item() for column in columns])
    n = sum(map(len, found.values()))
    return {kind: [*map(statistics.mean, zip(*values)), len(values) / n] for kind, values in found.items() if values}


def numbers(seed):
    args, batch, examples = looked_at(seed)
    groups = batch.reward.view(-1, batch.group)
    mixed = (groups.max(1).values > groups.min(1).values).nonzero()[:2, 0].tolist()  # the first two that teach something
    scenes = []
    for g in mixed:
        of, e = range(g * batch.group, g * batch.group + SHOWN), examples[g]
        said = [dict(text=batch.texts[i], n=int(batch.mask[i].sum()), reward=batch.reward[i].item()) for i in of]
        w = batch.columns["k3_log_mean"][of[0]].tolist()
        scenes.append(dict(number=e.id, question=e.prompt, answer=e.answer, said=said, w=w))
    arms = {}
    for name, (script, flags, _) in ARMS.items():
        evals = [[e["greedy_accuracy"] for e in rows(script, flags, "evals", seed)] for seed in SEEDS]
        steps = [rows(script, flags, "metrics", seed) for seed in SEEDS]
        dead = [statistics.mean(r.get("dead_groups", 1 - r["informative_groups"]) for r in of) for of in steps]
        arms[name] = dict(before=evals[0][0], after=[of[-1] for of in evals], dead=dead)
    return dict(alpha=args.alpha, scenes=scenes, place=by_place(batch), kind=by_kind(batch), arms=arms)


def scene(part, of, alpha):
    """Both frames, and the first completions of the group."""
    axes = part.subplots(1, 3, width_ratios=[1, 1, 2.9])
    for axis, frame, word in zip(axes, events.frames(of["number"]), ("before", "after")):
        axis.imshow(frame)
        axis.set_xticks([x - 0.5 for x in range(0, 17, 4)], [])
        axis.set_yticks([x - 0.5 for x in range(0, 17, 4)], [])
        axis.grid(color="0.35", lw=0.6)
        axis.tick_params(length=0)
        axis.set_title(word, fontsize=10)
    told, longest = axes[2], max(s["n"] for s in of["said"])
    image = None
    for y, s in enumerate(of["said"]):
        image = told.imshow([of["w"][: s["n"]]], cmap="YlOrRd", vmin=1, vmax=alpha, extent=(0, s["n"], y + 0.92, y + 0.08))
        for t, c in enumerate((s["text"] + "¶")[: s["n"]]):
            dark = "white" if of["w"][t] > 1 + 0.7 * (alpha - 1) else "black"
            told.text(t + 0.5, y + 0.5, c, ha="center", va="center", fontsize=10, family="monospace", color=dark)
        told.text(longest + 0.4, y + 0.5, f"R = {s['reward']:.2g}", va="center", fontsize=9)
    told.set_xlim(0, longest + 4)
    told.set_ylim(len(of["said"]), 0)
    told.set_aspect("auto")
    told.axis("off")
    told.set_title(f"{of['question']}   right: {of['answer']}", fontsize=10, family="monospace", loc="left")
    return image, told


def draw(figure, data):
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    words = "A red, B green, C blue, D gold. Five of a group's eight completions at the warm start; colour: w, ¶: the end"
    above.suptitle(words, fontsize=10)
    for part, of in zip(above.subfigures(1, 2), data["scenes"]):
        image, axis = scene(part, of, data["alpha"])
    above.colorbar(image, ax=axis, shrink=0.8, label="w")
    place, kind, exact, dead = below.subplots(1, 4, width_ratios=[1.25, 1.1, 1, 1])
    other = place.twinx()
    for name, colour, label in (("k3_log_mean", "tab:red", "w, k3"), ("kl", "tab:purple", "w, KL")):
        place.plot(data["place"][name], color=colour, lw=1.6, label=label)
    for name, colour, label in (("entropy", "black", "entropy, nats"), ("ended", "0.6", "share that has ended")):
        other.plot(data["place"][name], color=colour, lw=1.2, ls="--", label=label)
    place.set_ylim(1, data["alpha"] + 0.35)
    other.set_ylim(0, 1)
    lines = place.get_lines() + other.get_lines()
    place.legend(lines, [line.get_label() for line in lines], fontsize=7, frameon=False, loc="upper left")
    place.set_xticks(range(0, len(data["place"]["kl"]), 3))
    place.set_ylabel("w", fontsize=9)
    place.set_title("by place in the completion (dashed: right)", fontsize=10)
    found = data["kind"]
    for k, (label, colour) in enumerate((("w - 1, k3", "tab:red"), ("w - 1, KL", "tab:purple"), ("entropy, nats", "black"))):
        heights = [values[k] - (k < 2) for values in found.values()]
        kind.bar([x + 0.27 * (k - 1) for x in range(len(found))], heights, 0.25, color=colour, label=label)
    kind.set_xticks(range(len(found)), [f"{name}\n{values[3]:.0%}" for name, values in found.items()], fontsize=8)
    kind.set_title("by kind of character (share of tokens)", fontsize=10)
    kind.set_ylim(0, 1.35 * kind.get_ylim()[1])
    kind.legend(fontsize=7, frameon=False)
    for axis, of, title in ((exact, "after", "exact, held out, greedy"), (dead, "dead", "groups with equal rewards")):
        for y, (name, (*_, colour)) in enumerate(ARMS.items()):
            values = data["arms"][name][of]
            axis.barh(y, statistics.mean(values), color=colour, alpha=0.55)
            axis.plot(values, [y] * len(values), "o", color="black", ms=3)
        axis.set_yticks(range(len(ARMS)), ARMS if axis is exact else [], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    exact.axvline(data["arms"]["GRPO"]["before"], color="black", lw=0.8, ls=":")
    exact.set_xlabel("dotted: the start", fontsize=8)
    dead.set_xlabel("mean of all steps", fontsize=8)
    for axis in (place, kind, exact, dead):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
