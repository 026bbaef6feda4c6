"""Soft Tokens: three kinds of thoughts read in tokens, the gradients of thoughts and answer, and how sure thoughts become."""

from algos import soft_tokens
from common import rollout
from common.batch import read
from runs import launch, pictures
from runs.panels import SEEDS, rows, start

SIZE = (9.6, 6.8)
FLAGS = "{}eval-every-30-eval-prompts-256-eval-samples-32"
# The arms of the comparison, by their flags in a folder's name.
ARMS = {
    "soft": (FLAGS.format(""), "tab:blue", "-"),
    "fuzzy": (FLAGS.format("cot-fuzzy-"), "tab:orange", "--"),
    "hard": (FLAGS.format("cot-hard-"), "tab:green", "-."),
}
SHOWN = {"discrete_accuracy": "right, greedily in tokens", "discrete_pass@32": "one right of 32 samples in tokens"}
NORMS = {("soft", "thought"): "soft: thoughts", ("soft", "token"): "soft: answer", ("hard", "token"): "hard: all tokens"}


def entropies(seed, prompts=128, **flags):
    """Mean entropy of the next token at the place of every thought, of completions that are sampled in tokens."""
    s = start(soft_tokens, seed=seed, **flags)
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, s.task.test[:prompts], s.args, 0)
    _, entropy = read(s.policy, batch, s.args)
    places = range(min(s.args.thoughts, entropy.shape[1]))
    return [entropy[:, t][batch.mask[:, t]].mean().item() for t in places]


def numbers(seed):
    evals, norms = {}, {}
    ends = dict(start=[entropies(seed)])
    for name, (flags, *_) in ARMS.items():
        runs = [rows("soft_tokens", flags, "evals", s) for s in SEEDS]
        evals[name] = {what: [[(row["step"], row[what]) for row in run] for run in runs] for what in SHOWN}
        folders = [launch.ROOT / "runs" / "compare" / f"soft_tokens-{s}-{flags}" for s in SEEDS]
        ends[name] = [entropies(seed, model=str(folder)) for folder in folders]
    for (name, kind), label in NORMS.items():
        runs = [rows("soft_tokens", ARMS[name][0], "metrics", s) for s in SEEDS]
        which = f"{kind}_grad_norm"
        norms[label] = [[(row["step"], row[which]) for row in run if which in row] for run in runs]
    return dict(evals=evals, norms=norms, entropy=ends)


def draw(figure, data):
    (greedy, best), (norm, entropy) = figure.subplots(2, 2)
    for axis, (what, title) in zip((greedy, best), SHOWN.items()):
        for name, (_, colour, line) in ARMS.items():
            pictures.curve(axis, data["evals"][name][what], colour, ls=line, lw=1.6, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.03)
    looks = {("soft", "thought"): "-", ("soft", "token"): ":", ("hard", "token"): "-."}
    for key, label in NORMS.items():
        pictures.curve(norm, data["norms"][label], ARMS[key[0]][1], ls=looks[key], lw=1.6, label=label)
    norm.set_yscale("log")
    norm.set_title("norm of the gradient, before it is clipped to 1", fontsize=10)
    for name, runs in data["entropy"].items():
        colour, line = ARMS[name][1:] if name in ARMS else ("black", "-")
        pictures.curve(entropy, [list(enumerate(run, 1)) for run in runs], colour, ls=line, marker="o", ms=3, label=name)
    entropy.set_title("entropy of thoughts that are sampled in tokens", fontsize=10)
    for axis in (greedy, best, norm, entropy):
        axis.set_xlabel("place of the thought" if axis is entropy else "rollout", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    entropy.set_ylabel("nats", fontsize=9)
