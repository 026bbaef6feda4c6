"""SPO: a prompt's tree with the values of its nodes, a chain with its segments, how far the advantages are off; and the score
over all tokens that were sampled for it."""

import dataclasses
import statistics

import torch

from algos import spo
from common import gpu, rollout
from common.batch import read
from runs import pictures
from runs.panels import metrics, start

SIZE = (16, 5.6)
FIRST, LAST = slice(None, 10), slice(-10, None)  # steps
MANY = 200  # completions from a state: what its value is held to be


def worth(s, prompts, states, n, noise):
    """{(prompt's number, *tokens): mean reward of n completions from there}."""
    states = list(dict.fromkeys(states))
    given, asked = [list(y) for _, *y in states], [prompts[q] for q, *_ in states]
    seeds = [gpu.hash_seed(s.args.seed, noise, q, 23, *y) for q, *y in states]
    more = rollout.collect(s.engine, s.scorer, s.tokenizer, asked, s.args, 0, given, n, seeds=seeds)
    return dict(zip(states, more.reward.view(-1, n).mean(1).tolist()))


def chains(s, prompts, many, intervals=(1, 2, 5)):
    """-> {interval: mean squared error of the segments' advantages, and of R - mean R of the group for the same segments}, both
    against those by `many` completions; and one chain to be shown."""
    batch, out = rollout.collect(s.engine, s.scorer, s.tokenizer, prompts, s.args, 0), {}
    batch.old_logp, _ = read(s.policy, batch, s.args)
    group = batch.reward.view(len(prompts), -1)
    group = (group - group.mean(1, keepdim=True)).view(-1, 1).expand_as(batch.old_logp)
    for interval in intervals:
        found = []
        for n, noise in ((s.args.mc_rollouts, 1), (many, 2)):
            args = dataclasses.replace(s.args, interval=interval, mc_rollouts=n)
            found.append(dataclasses.replace(batch, columns={}))
            spo.chain(s.engine, s.scorer, s.tokenizer, prompts, found[-1], args, noise)
        starts = spo.cutpoints(batch.old_logp, batch.mask, args)
        mine, true = (b.adv[starts] for b in found)
        out[interval] = dict(
            segments=starts.sum(1).float().mean().item(), mse=(mine - true).square().mean().item(),
            mse_group=(group[starts] - true).square().mean().item(), mean_square=true.square().mean().item(),
        )  # fmt: skip
        if interval == 1:
            shown, oracle, cuts = *found, starts
    i = int(((shown.adv.abs() * cuts).sum(1) + 10 * (cuts.sum(1) > 1)).argmax())  # with the most to see
    n = int(batch.mask[i].sum())
    row = dict(p=batch.old_logp[i].exp(), V=shown.columns["values"][i], V_many=oracle.columns["values"][i], A=shown.adv[i])
    row = {name: x[:n].tolist() for name, x in row.items()} | dict(start=cuts[i, :n].tolist(), R=batch.reward[i].item())
    ids = batch.ids[i, -batch.mask.shape[1] :][:n].tolist()
    row["tokens"] = [s.tokenizer.decode([t]).replace("<eos>", "end") for t in ids]
    return out, row | dict(prompt=prompts[i // batch.group].prompt)


def grown(s, prompts, branches):
    """-> (all edges of the prompts' trees, a Batch whose reward is the value of an edge's end; the prompt of each; values of
    the roots)."""
    found, dealt = [], spo.dealt

    def watched(edge, mean, *more):
        found.append((edge, edge.columns["question"].tolist(), mean[:, 0].tolist()))
        return dealt(edge, mean, *more)

    spo.dealt = watched
    try:
        args = dataclasses.replace(s.args, mode="tree", branches=branches)
        spo.tree(s.engine, s.scorer, s.tokenizer, prompts, args, 3)
    finally:
        spo.dealt = dealt
    return found[0]


def states(edge, questions):
    """-> [(prompt's number, *tokens)] before and behind every edge."""
    T, before, behind = edge.mask.shape[1], [], []
    for i, q in enumerate(questions):
        whole = edge.ids[i, -T:][edge.attention_mask[i, -T:]].tolist()
        behind.append((q, *whole))
        before.append((q, *whole[: len(whole) - int(edge.mask[i].sum())]))
    return before, behind


def tree_error(s, prompts, many):
    """The mean squared error of the edges' advantages of 6-6-6 trees against those by `many` completions."""
    edge, questions, _ = grown(s, prompts, (6, 6, 6))
    before, behind = states(edge, questions)
    inner = [y for y, cut in zip(behind, edge.truncated.tolist()) if cut]
    true = worth(s, prompts, before + inner, many, 4)
    best = [true.get(y, r) - true[x] for x, y, r in zip(before, behind, edge.reward.tolist())]
    best, mine = torch.tensor(best), edge.adv.gather(1, edge.mask.byte().argmax(1, keepdim=True))[:, 0].cpu()
    return dict(edges=len(best), mse=(mine - best).square().mean().item(), mean_square=best.square().mean().item())


def small_tree(s, prompt):
    """A 3-3-3 tree as [dict(parent, text, value, adv)], parents first (-1: the root), and the root's value."""
    edge, questions, roots = grown(s, [prompt], (3, 3, 3))
    before, behind = states(edge, questions)
    nodes, open_now, level = [], [-1], []
    for i, (x, y) in enumerate(zip(before, behind)):
        if i and len(x) > len(before[i - 1]):
            open_now, level = [n for n in level if nodes[n]["open"]], []
        level.append(len(nodes))
        text = s.tokenizer.decode(y[len(x) :]).replace("<eos>", "")
        adv = edge.adv[i][edge.mask[i]].tolist()
        nodes.append(dict(
            parent=open_now[(len(level) - 1) // 3], text=text, value=edge.reward[i].item(), adv=adv[0] if adv else 0.0,
            open=bool(edge.truncated[i]) and len(y) - 1 < s.args.max_new_tokens,
        ))  # fmt: skip
    return dict(prompt=prompt.prompt, root=roots[0], nodes=nodes)


# Arms of the comparison: script, what is in its folders' names, colour.
COMMON = "eval-every-10-{}minibatches-2-{}prompts-per-step-8-steps-{}-task-chain"
ARMS = {
    "grpo": ("grpo", COMMON.format("", "", 184), pictures.GREY), "chain": ("spo", COMMON.format("", "", 80), "tab:blue"),
    "chain, interval 5": ("spo", COMMON.format("interval-5-", "", 80), "tab:cyan"),
    "chain, no mask": ("spo", COMMON.format("", "no-prob-mask-", 80), "tab:purple"),
    "tree": ("spo", COMMON.format("", "mode-tree-", 80), "tab:green"),
}  # fmt: skip


def over_tokens(script, flags, every=10):
    """[(tokens sampled so far, continuations included, sampled score)] of every seed, means over so many steps."""
    out = []
    for rows in metrics(script, flags):
        total, points = 0, []
        for i in range(0, len(rows), every):
            part = rows[i : i + every]
            total += sum(row.get("sampled_tokens", row["tokens"]) for row in part)
            points.append((total, statistics.mean(row["accuracy"] for row in part)))
        out.append(points)
    return out


def numbers(seed, many=MANY):
    s = start(spo, seed=seed)
    prompts = s.task.order(0, 4, seed)
    chain, row = chains(s, prompts, many)
    trees = [small_tree(s, p) for p in prompts]
    most = min(trees, key=lambda t: abs(t["root"] - 0.5))  # with the most to see
    over = {arm: over_tokens(script, flags) for arm, (script, flags, _) in ARMS.items()}
    found = dict(prompts=len(prompts), many=many, chain=chain, tree=tree_error(s, prompts, many), shown=most, row=row)
    trained = [[row["trained"] for row in rows] for rows in metrics(*ARMS["chain"][:2])]  # shares of the tokens
    parts = dict(first=FIRST, last=LAST).items()
    ends = {name: statistics.mean(statistics.mean(x[part]) for x in trained) for name, part in parts}
    return found | dict(over_tokens=over, trained=ends)


def draw(figure, data):
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    colours, scale = colormaps["RdBu"], Normalize(-1, 1)
    left, right, over = figure.subplots(1, 3, width_ratios=[1.1, 1.1, 0.9])
    for arm, (_, _, colour) in ARMS.items():
        pictures.curve(over, data["over_tokens"][arm], colour, lw=1.6, marker="o", ms=3, label=arm)
    over.set_xscale("log")
    over.set_title("sampled score, means over ten steps", fontsize=10)
    over.set_xlabel("tokens sampled, continuations included", fontsize=9)
    over.legend(fontsize=8)
    over.grid(alpha=0.25)
    nodes, children, place = data["shown"]["nodes"], {}, {}
    slots = iter(range(len(nodes)))
    for i, node in enumerate(nodes):
        children.setdefault(node["parent"], []).append(i)

    def put(i, depth):
        below = [put(c, depth + 1) for c in children.get(i, [])]
        place[i] = depth, sum(below) / len(below) if below else next(slots)
        return place[i][1]

    put(-1, 0)
    for i, node in enumerate(nodes):
        xs, ys = zip(place[node["parent"]], place[i])
        colour = colours(scale(node["adv"])) if node["adv"] else "0.8"
        left.plot(xs, ys, color=colour, lw=1 + 2.5 * abs(node["adv"]), zorder=1, solid_capstyle="round")
    for i, (x, y) in place.items():
        value = data["shown"]["root"] if i < 0 else nodes[i]["value"]
        if i >= 0 and i not in children:
            left.text(x + 0.08, y, nodes[i]["text"], va="center", fontsize=6.5, family="monospace")
            left.scatter([x], [y], s=26, color="tab:green" if value else "0.55", zorder=2)
            continue
        box = dict(boxstyle="round,pad=0.25", fc="white", ec="0.3", lw=0.8)
        left.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7.5, zorder=3, bbox=box)
        if i >= 0:
            left.text(x, y - 0.95, nodes[i]["text"], ha="center", va="center", fontsize=6.5, family="monospace", color="0.35")
    left.set_title(f"tree of {data['shown']['prompt']} (3-3-3): values; edges, blue A > 0, red A < 0", fontsize=10)
    left.set_xlabel("depth (three tokens an edge)", fontsize=9)
    left.set_ylabel("sampled nodes (dot: end, green if right)", fontsize=9)
    left.set_xticks(range(4))
    left.set_xlim(-0.25, 3.45)
    left.set_yticks([])
    left.invert_yaxis()
    row = data["row"]
    for t, p in enumerate(row["p"]):
        begun = [u for u in range(t + 1) if row["start"][u]]
        if begun:
            gain = colours(scale(row["A"][begun[-1]]))
            right.axvspan(t - 0.5, t + 0.5, ymax=1 / 1.3, color=gain, alpha=0.45, lw=0, zorder=0)
        right.bar(t, p, width=0.5, color="0.35" if p < 0.9 else "0.8", zorder=2)
        if row["start"][t]:
            right.axvline(t - 0.5, color="black", lw=1)
            right.text(t - 0.42, 1.06, f"V {row['V'][t]:.2f}\n({row['V_many'][t]:.2f})", fontsize=7.5, va="bottom")
    right.axhline(0.9, color="0.3", lw=0.8, ls="--", zorder=3)
    right.text(len(row["tokens"]) - 0.5, 1.06, f"R {row['R']:.0f}", fontsize=7.5, va="bottom")
    right.set_xticks(range(len(row["tokens"])), row["tokens"], family="monospace")
    right.set_ylim(0, 1.3)
    right.set_yticks([0, 0.25, 0.5, 0.9])
    right.set_xlim(-0.6, len(row["tokens"]) + 0.1)
    right.set_title(f"chain of {row['prompt']}: segments, blue where A > 0, red where A < 0", fontsize=10)
    right.set_xlabel(f"token of the completion, dark: unsure (V by 9 completions, by {data['many']} in brackets)", fontsize=9)
    right.set_ylabel("probability of the token", fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
