"""What each method of the tokens family is about, on one picture: from the runs that the family's comparisons have left, and
from three probes of the untrained tiny model.

python -m runs.points                         runs/reference/tokens-points.{png,json}
python -m runs.points --out runs/points/mine

The runs: those on route of grpo, steer, lp_reg, thr, gtpo, d3s, rng, forking_tokens, hapo and ares, by the commands in
runs/reference/README.md; a missing one is named. The probes: does STEER's estimate tell how a step changes the entropy; do a
completion's first tokens decide whether it comes out right (PPPO); how sure are groups of answers to easy and hard prompts
(SEED-GRPO).
"""

import contextlib
import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from algos import grpo, pppo, seed_grpo, steer
from common import gpu, rollout
from common.batch import read
from common.worlds import route
from runs import panels, pictures
from runs.panels import SEEDS, rows

KINDS = {"move": "+-*", "digit": "0123456789", "=": "="}  # of characters; what is left is the end
PLAIN, WITHOUT_FILTER = "task-route", "max-gen-batches-0-task-route"


@dataclass
class Options:
    out: str = "runs/reference/tokens-points"
    """picture and numbers without ending"""
    seed: int = 1
    """of the probes' sampling"""


def metric(script, key, flags=PLAIN):
    """[[(rollout, number)] of every seed], averaged over ten rollouts."""
    out = []
    for seed in SEEDS:
        of = [row[key] for row in rows(script, flags, "metrics", seed)]
        out.append([(i + 10, statistics.mean(of[i : i + 10])) for i in range(0, len(of), 10)])
    return out


# ---------------------------------------------------------------- from the runs


def ends(script, keys, flags=PLAIN):
    """{key: [mean over the first 20 rollouts, over the last 20]} of all seeds."""
    of = [rows(script, flags, "metrics", seed) for seed in SEEDS]
    parts = slice(None, 20), slice(-20, None)
    return {key: [statistics.mean(row[key] for run in of for row in run[part]) for part in parts] for key in keys}


def sparks(script):
    """How often the first move is the rare one, among logged completions of prompts that all shortest routes begin with it."""
    out = []
    for seed in SEEDS:
        found = {}
        for row in rows(script, PLAIN, "samples", seed):
            start, target = route.ends(row["prompt"])
            left = {m: route.distances(n).get(target, 99) for m in route.MOVES if (n := route.after(start, m)) is not None}
            if [m for m in left if left[m] == min(left.values())] == ["*2"]:
                found.setdefault((row["step"] - 1) // 20, []).append(row["completion"].startswith("*2"))
        out.append([(20 * i + 20, statistics.mean(of)) for i, of in sorted(found.items())])
    return out


def logged(script, column, flags=PLAIN):
    """[(characters, numbers of a column)] of all completions that the runs have logged token by token."""
    found = [row for seed in SEEDS for row in rows(script, flags, "samples", seed) if "tokens" in row]
    return [(row["tokens"], row["columns"][column]) for row in found]


def by_kind(pairs, counts):
    """{kind of character: share of its tokens whose number counts}."""
    seen = [(next((k for k, of in KINDS.items() if t in of), "end"), counts(x)) for ts, xs in pairs for t, x in zip(ts, xs)]
    return {kind: statistics.mean(yes for k, yes in seen if k == kind) for kind in dict(seen)}


def over_tokens(script):
    """[[(thousands of tokens trained on so far, greedy accuracy)] of every seed]."""
    out = []
    for seed in SEEDS:
        total, at = 0.0, {0: 0.0}
        for row in rows(script, PLAIN, "metrics", seed):
            total += row.get("trained", 1.0) * row["tokens"] / 1e3
            at[row["step"]] = total
        out.append([(at[r["step"]], r["greedy_accuracy"]) for r in rows(script, PLAIN, "evals", seed)])
    return out


# ---------------------------------------------------------------- probes of the start


def start(o):
    """The tiny model of route, as panels.start() gives it."""
    return panels.start(grpo, task="route", seed=o.seed)


def sampled(s, n):
    """A rollout of n training prompts, with its log-probs, old entropies and advantages."""
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, s.task.train[:n], s.args, 0)
    batch.old_logp, batch.columns["old_entropy"] = read(s.policy, batch, s.args)
    adv = steer.advantages(batch.reward.view(-1, s.args.group_size), steer.Args())
    batch.adv = adv.view(-1, 1).expand_as(batch.old_logp)
    return batch


def entropy_changes(o, minibatches=48, size=32, step=0.02):
    """[(predicted, measured)] change of the mean entropy at a minibatch's own positions, by one gradient step on it alone."""
    s = start(o)
    policy = s.policy
    batch, out = sampled(s, minibatches * size // s.args.group_size), []
    weights = [p.detach().clone() for p in policy.parameters()]
    for rows_ in torch.randperm(len(batch.ids), generator=torch.Generator().manual_seed(o.seed)).split(size):
        mb = batch.take(rows_)
        logp, before = policy(mb.ids, mb.attention_mask, mb.mask)
        omega = steer.entropy_change(mb.old_logp, mb.old_logp, mb.columns["old_entropy"], mb.adv)
        (-(logp * mb.adv)[mb.mask].mean()).backward()
        with torch.no_grad():
            for p in policy.parameters():
                p.sub_(step * p.grad)
            _, after = policy(mb.ids, mb.attention_mask, mb.mask)
            for p, kept in zip(policy.parameters(), weights):
                p.copy_(kept)
        policy.zero_grad()
        out.append((-omega[mb.mask].mean().item(), (after - before)[mb.mask].mean().item()))
    return out


def lock_in(o, etas=(0.15, 0.25, 0.35, 0.5, 0.75), prompts=256, n=16):
    """{of right ones, of wrong ones: [(eta, how often n continuations of the first eta come out right)]}."""
    s = start(o)
    batch, out = sampled(s, prompts), {"right": [], "wrong": []}
    mixed = (batch.adv[:, 0] != 0).nonzero()[:, 0]  # right and wrong ones of the same prompts
    batch = batch.take(mixed)
    by_id = {e.id: e for e in s.task.train[:prompts]}
    asked = [by_id[i] for i in batch.prompt_id.tolist()]
    for i, eta in enumerate(etas):
        given = pppo.prefixes(batch, eta)
        more = rollout.collect(s.engine, s.scorer, s.tokenizer, asked, s.args, gpu.hash_seed(o.seed, i), given, n)
        share = more.accuracy.view(-1, n).mean(1)
        for name, of in (("right", batch.accuracy > 0.5), ("wrong", batch.accuracy < 0.5)):
            out[name].append((eta, share[of].mean().item()))
    return out


def scales(o, prompts=512):
    """{tier: the mean scale of SEED-GRPO at alpha 1 of prompts so many moves away}."""
    s = start(o)
    task, batch = s.task, sampled(s, prompts)
    args = seed_grpo.Args(alpha=1.0, group_size=batch.group)
    factor = seed_grpo.scale(seed_grpo.semantic_entropy(batch.old_logp, batch.mask, batch.answers, args), args).tolist()
    of = [task.tier(e) for e in task.train[:prompts]]
    return {t: statistics.mean(f for f, x in zip(factor, of) if x == t) for t in sorted(set(of))}


# ---------------------------------------------------------------- the picture


def gathered(o):
    """All that is drawn, as numbers."""
    with contextlib.redirect_stdout(sys.stderr):
        probes = dict(entropy_change=entropy_changes(o), lock_in=lock_in(o), scale=scales(o))
    thr = [x for _, xs in logged("thr", "thr") for x in xs]
    low, high = -4.0, 4.0
    counts = Counter(min(39, max(0, int((x - low) / (high - low) * 40))) for x in thr)
    means = dict(
        steer=["damping"], lp_reg=["proxy_kl"], thr=["kept", "kept_forks"], gtpo=["delta", "conflict"], d3s=["trained"]
    )
    return probes | dict(
        ends={name: ends(name, keys) for name, keys in means.items()}
        | dict(ares=ends("ares", ["lam_easy", "lam_medium", "lam_hard"], WITHOUT_FILTER)),
        sparks={name: sparks(name) for name in ("grpo", "lp_reg")},
        thr=[[low + (i + 0.5) / 40 * (high - low), counts[i] / len(thr)] for i in range(40)],
        conflict=by_kind(logged("gtpo", "conflict"), lambda x: x != 1),
        forks=by_kind(logged("d3s", "selected"), lambda x: x > 0),
        over_tokens={name: over_tokens(name) for name in ("grpo", "d3s")},
        entropy={"grpo": metric("grpo", "entropy"), "rng (N)": metric("rng", "entropy"),
                 "rng, nsr": metric("rng", "entropy", f"{PLAIN}-variant-nsr"),
                 "rng, psr": metric("rng", "entropy", f"{PLAIN}-variant-psr")},
        fork_entropy={"the fifth": metric("forking_tokens", "entropy_selected", WITHOUT_FILTER),
                      "its threshold": metric("forking_tokens", "entropy_selected_min", WITHOUT_FILTER),
                      "the rest": metric("forking_tokens", "entropy_rest", WITHOUT_FILTER)},
        left={"sure, on the left": metric("hapo", "left_of_sure", f"lr-3e-4-{PLAIN}"),
              "unsure, on the right": metric("hapo", "right_of_unsure", f"lr-3e-4-{PLAIN}")},
        stretches={f"{kind} groups": metric("ares", f"n_he_{kind}", WITHOUT_FILTER) for kind in ("easy", "medium", "hard")},
    )  # fmt: skip


def draw(record, path):
    """Twelve panels."""
    plt = pictures.pyplot()
    figure, axes = plt.subplots(4, 3, figsize=(pictures.WIDE, 12), layout="constrained")
    at = iter(axes.flat)

    def panel(title, x, y):
        axis = next(at)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x, fontsize=8)
        axis.set_ylabel(y, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        return axis

    def curves(title, x, y, of):
        axis = panel(title, x, y)
        colours = [pictures.GREY, "tab:blue", "tab:orange", "tab:green"]
        for (name, seeds), colour in zip(of.items(), colours if "grpo" in of else colours[1:]):
            pictures.curve(axis, seeds, colour, lw=1.5, label=name)
        axis.legend(fontsize=7)

    def bars(title, y, of):
        panel(title, "", y).bar(list(map(str, of)), list(of.values()), color=pictures.OWN)

    curves("forking_tokens: how unsure the fifth is that learns", "rollout", "entropy, nats", record["fork_entropy"])
    curves("hapo at 3e-4: ratios beyond a uniform interval", "rollout", "share of such tokens", record["left"])
    axis = panel("steer: entropy's change by one step", "predicted: mean of -Omega", "measured, nats")
    axis.plot(*zip(*record["entropy_change"]), ".", color=pictures.OWN)
    axis.locator_params(axis="x", nbins=5)
    curves("lp_reg: first move *2 where it is needed", "rollout", "share of completions", record["sparks"])
    axis = panel("thr: hidden rewards of tokens", "THR (the ends hold all beyond)", "share, logarithmic")
    axis.bar(*zip(*record["thr"]), width=0.2, color=pictures.OWN)
    axis.set_yscale("log")
    bars("gtpo: tokens in conflict", "share of such characters", record["conflict"])
    bars("d3s: tokens that are trained on", "share of such characters", record["forks"])
    curves("d3s: accuracy over what is trained on", "tokens, thousands", "greedy accuracy", record["over_tokens"])
    curves("rng: entropy", "rollout", "nats", record["entropy"])
    bars("seed_grpo at alpha 1: scale at the start", "mean scale", {f"{k} moves": v for k, v in record["scale"].items()})
    axis = panel("pppo: continuations of a beginning, at the start", "eta", "come out right")
    for (name, points), colour in zip(record["lock_in"].items(), ("tab:green", "tab:red")):
        axis.plot(*zip(*points), marker="o", ms=3, color=colour, label=f"of {name} completions")
    axis.legend(fontsize=7)
    curves("ares: unsure stretches in a completion", "rollout", "number", record["stretches"])
    figure.suptitle("bands span three seeds; warm start 0 of route", fontsize=9)
    figure.savefig(path, dpi=pictures.DPI)
    plt.close(figure)


def main(o):
    """Writes <out>.json and <out>.png, prints STEER's correlation."""
    record = dict(command="python -m runs.points " + " ".join(sys.argv[1:])) | gathered(o)
    predicted, measured = zip(*record["entropy_change"])
    record["correlation"] = statistics.correlation(predicted, measured)
    Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(record), parse_float=lambda x: round(float(x), 6))
    Path(f"{o.out}.json").write_text(json.dumps(rounded) + "\n")
    draw(record, f"{o.out}.png")
    print(f"steer: the correlation of predicted and measured changes is {record['correlation']:.2f}")
    print(f"wrote {o.out}.png and {o.out}.json")


if __name__ == "__main__":
    main(tyro.cli(Options))
