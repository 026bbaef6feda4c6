"""Rank-GRPO: how often each line of the list is a hit, over the training and at its end, beside GRPO and GSPO."""

import statistics
from types import SimpleNamespace

from common import engines, gpu, models, tasks
from runs import launch, pictures
from runs.panels import SEEDS, columns, metrics

SIZE = (8.6, 3.4)
LINES, WORLD = range(1, 6), "titles"
STYLES = dict(start=("0.55", ":"), grpo=("tab:orange", "--"), gspo=("tab:green", "-."), rank_grpo=("tab:blue", "-"))


def by_rank(model, seed, n=8, prompts=None):
    """Hit rates of n sampled lists for each held-out prompt, by line; and the share of lists with exactly as many lines."""
    args = SimpleNamespace(model=model, task=WORLD, dtype="float32", lora_rank=0, gradient_checkpointing=False, seed=seed)
    gpu.init(args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(WORLD, tokenizer)
    test = task.test[:prompts]
    seeds = [gpu.hash_seed(seed, i, 13) for i in range(len(test))]
    engine = engines.HF(models.load(args, gpu.device()), tokenizer)
    out = engine.generate([e.ids for e in test], n, task.max_new_tokens, 1.0, seeds)
    texts = tokenizer.batch_decode([ids for ids, _, _ in out], skip_special_tokens=True)
    hits, exact = [0] * len(LINES), 0
    for i, (text, (_, _, ended)) in enumerate(zip(texts, out)):
        rows, right = text.split("\n"), test[i // n].answer.split("\t")
        exact += ended and len(rows) == len(LINES)
        for k, row in enumerate(rows[: len(LINES)]):
            hits[k] += row in right and row not in rows[:k]
    return dict(hits=[h / len(texts) for h in hits], exact=exact / len(texts))


def numbers(seed):
    """Of rank_grpo's runs: hit rates on training prompts. Of the start and the last checkpoints: on held-out ones."""
    runs = metrics("rank_grpo", f"task-{WORLD}")
    curves = columns(runs, None, *(f"hit_{k}" for k in LINES))
    ends = dict(start=[by_rank("tiny", seed)])
    for name in [name for name in STYLES if name != "start"]:
        folders = [launch.ROOT / "runs" / "compare" / f"{name}-{s}-task-{WORLD}" for s in SEEDS]
        ends[name] = [by_rank(str(folder), seed) for folder in folders]
    return dict(curves=curves, ends=ends, steps=len(runs[0]))


def smooth(curve, n=9):
    """[(x, y)] -> y as the mean over the n points around."""
    ys, half = [y for _, y in curve], n // 2
    return [(x, statistics.mean(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(curve)]


def draw(figure, data):
    left, right = figure.subplots(1, 2)
    for (name, runs), colour in zip(data["curves"].items(), ["#08306b", "#2171b5", "#4292c6", "#74a9d8", "#a6c8e8"]):
        pictures.curve(left, [smooth(run) for run in runs], colour, lw=1.8, label=name.replace("hit_", "line "))
    left.set_title("rank_grpo: hit rate of each line", fontsize=10)
    left.set_xlabel("rollout (mean over nine)", fontsize=9)
    left.set_ylabel("share of lists whose line is a new hit", fontsize=9)
    for name, (colour, line) in STYLES.items():
        ends = [list(zip(LINES, of["hits"])) for of in data["ends"][name]]
        pictures.curve(right, ends, colour, ls=line, marker="o", ms=4, label=name)
    right.set_title(f"after {data['steps']} rollouts, on held-out prompts", fontsize=10)
    right.set_xlabel("line of the list", fontsize=9)
    right.set_xticks(LINES)
    for axis in (left, right):
        axis.set_ylim(0.25, 1.02)
        axis.legend(fontsize=8, frameon=False, loc="lower right" if axis is left else "lower left")
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
