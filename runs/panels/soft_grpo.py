"""SofT-GRPO: the thoughts of one rollout, entry by entry, and the chance of one try and of 32 over the training."""

import torch

from algos import soft_grpo
from common import rollout
from common.batch import read
from runs import pictures
from runs.panels import SEEDS, columns, rows, start

SIZE = (12.6, 5.8)
FLAGS = "eval-every-5-eval-prompts-256-eval-samples-32-{}steps-20-task-chain:slips{}"
# The folders of runs.compare, by script and flags.
ARMS = {
    "GRPO": ("grpo", FLAGS.format("", ""), "tab:orange", "--"),
    "SofT-GRPO": ("soft_grpo", FLAGS.format("", ""), "tab:blue", "-"),
    "f summed (paper)": ("soft_grpo", FLAGS.format("logp-agg-sum-", ""), "tab:purple", "-."),
    "top_p 1": ("soft_grpo", FLAGS.format("", "-top-p-1.0"), "tab:red", ":"),
}
SHOWN = {"avg@32": "one sample, as trained", "discrete": "one sample, read in tokens", "pass@32": "one right of 32, as trained"}


def thoughts(seed, prompts=32):
    """Of the start's rollouts the completion whose thoughts keep the most entries -> its text, and of each thought the kept
    tokens, their p, and their weights in what was fed."""
    s = start(soft_grpo, seed=seed)
    engine = soft_grpo.make_engine(s.policy, s.tokenizer, s.args)
    batch = rollout.collect(engine, s.scorer, s.tokenizer, s.task.order(0, prompts, seed), s.args, 0)
    engine.attach(batch)
    k, given = s.args.top_k, batch.columns["given"]
    kept = (given[:, :, 2 + k :] > -1e29) & (given[:, :, :1] > 0)
    i = int(kept.sum((1, 2)).argmax())

    def entries(mb, args):
        return soft_grpo.replay(mb, args) | dict(read=lambda given, z: soft_grpo.noise(given[:, 2:], z)[1].unbind(-1))

    logp = torch.stack(read(s.policy, batch.take(torch.tensor([i])), s.args, how=entries), -1)[0]
    out = []
    for t in given[i, :, 0].nonzero()[:, 0].tolist():
        ids, g = given[i, t, 2:].chunk(2)
        some, y = kept[i, t], (g / s.args.tau_g).softmax(-1)
        tokens = [s.tokenizer.decode([token]) for token in ids[some].long().tolist()]
        out.append(dict(tokens=tokens, p=logp[t][some].exp().tolist(), y=y[some].tolist()))
    prompt = s.tokenizer.decode(batch.ids[i, : -batch.mask.shape[1]], skip_special_tokens=True)
    return dict(prompt=prompt, text=batch.texts[i], thoughts=out, tau_g=s.args.tau_g)


def numbers(seed):
    curves = {}
    for name, (script, flags, _, _) in ARMS.items():
        evals = [rows(script, flags, "evals", s) for s in SEEDS]
        read_in_tokens = "avg@32" if script == "grpo" else "discrete_avg@32"
        runs = [[row | dict(discrete=row[read_in_tokens]) for row in run] for run in evals]
        curves[name] = columns(runs, None, *SHOWN)
    return thoughts(seed) | dict(curves=curves)


def draw(figure, data):
    axes = figure.subplot_mosaic([["thoughts"] * 3, list(SHOWN)])
    top, ticks, labels = axes["thoughts"], [], []
    for t, thought in enumerate(data["thoughts"]):
        n = len(thought["tokens"])
        for j, (token, p, y) in enumerate(zip(thought["tokens"], thought["p"], thought["y"])):
            x = t + (j - (n - 1) / 2) * 0.18
            top.bar(x - 0.035, p, 0.07, color="0.7", label="p of the policy" if t == j == 0 else None)
            top.bar(x + 0.035, y, 0.07, color="tab:blue", label="weight y, fed" if t == j == 0 else None)
            ticks.append(x)
            labels.append(token)
    top.set_xticks(ticks, labels, fontsize=9)
    for t in range(len(data["thoughts"])):
        top.text(t, 1.1, f"+{data['prompt'][t]} → {data['text'][t]}", ha="center", fontsize=9, color="0.3")
    top.set_ylim(0, 1.22)
    title = f"thoughts of one rollout before training, {data['prompt']}{data['text']}: digit added → token shown"
    top.set_title(f"{title} (τ_g = {data['tau_g']})", fontsize=10)
    top.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    for name, words in SHOWN.items():
        axis = axes[name]
        for arm, (_, _, colour, line) in ARMS.items():
            pictures.curve(axis, data["curves"][arm][name], colour, ls=line, lw=1.8, marker="o", ms=3, label=arm)
        axis.set_title(words, fontsize=10)
        axis.set_xlabel("rollout", fontsize=9)
        axis.set_xticks([0, 5, 10, 15, 20])
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    axes["avg@32"].set_ylabel("right, on held-out prompts", fontsize=9)
    axes["avg@32"].legend(fontsize=8, frameon=False, loc="lower right")
