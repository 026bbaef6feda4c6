"""RMT: the length of thoughts beside what is asked for, the loss of the text, and how often the sum of all digits is right in
the end, by the budget that is asked for; each with a part of the method left out."""

import statistics

from algos import rmt
from common import engines, gpu, models, settings
from runs import launch, pictures
from runs.panels import SEEDS, columns, metrics

SIZE = (11.4, 3.6)
# The flags in a run folder's name, colour, line.
ARMS = {
    "RMT": ("", "tab:blue", "-"),
    "w = 0": ("length-weight-0", "tab:cyan", "--"),
    "no budget": ("gamma-1-length-weight-0", "tab:red", "-"),
    "no curriculum": ("no-curriculum", "tab:green", "-."),
    "no text": ("ntp-weight-0", "tab:orange", "--"),
}
BUDGETS = (5, 7, 9)


def by_budget(model, seed, prompts=64, n=3):
    """Sampled at held-out places of the sum of all digits -> {B asked for: [share of right ones, mean length of thoughts]}."""
    args, _ = settings.resolve(rmt.Args(model=model, seed=seed))
    gpu.init(args)
    world, _, rows = rmt.corpus(args.task)
    tokenizer = models.load_tokenizer(args, warm=world)
    corpus = rmt.Corpus(rows, tokenizer, args)
    last = max(p for _, p in corpus.places) - 1
    numbers = [k for k, (_, p) in enumerate(corpus.places) if p == last][:prompts]
    engine, found = engines.HF(models.load(args, gpu.device(), warm=world), tokenizer), {}
    for B in BUDGETS:
        asked = corpus.ask(numbers, B)
        seeds = [gpu.hash_seed(seed, e.id, 13) for e in asked]
        out = engine.generate([e.ids for e in asked], n, args.max_new_tokens, 1.0, seeds)
        read = [rmt.parse(ids, corpus.tags) for ids, _, _ in out]
        right = [str(token) == asked[i // n].answer for i, (_, token) in enumerate(read)]
        found[str(B)] = [statistics.mean(right), statistics.mean(length for length, _ in read)]
    return found


def numbers(seed):
    runs = {name: metrics("rmt", flags) for name, (flags, _, _) in ARMS.items()}
    curves = {name: columns(of, None, "thought", "budget", "ntp_loss") for name, of in runs.items()}
    ends = {"start": [by_budget("tiny", seed)]}
    for name, (flags, _, _) in ARMS.items():
        folders = ["-".join(["rmt", str(s), *([flags] if flags else [])]) for s in SEEDS]
        ends[name] = [by_budget(str(launch.ROOT / "runs" / "compare" / folder), seed) for folder in folders]
    return dict(curves=curves, ends=ends)


def draw(figure, data):
    left, middle, right = figure.subplots(1, 3)
    for name, (_, colour, line) in ARMS.items():
        curves = data["curves"][name]
        pictures.curve(left, curves["thought"], colour, ls=line, lw=1.5, label=name)
        pictures.curve(middle, curves["ntp_loss"], colour, ls=line, lw=1.5, label=name)
    asked = data["curves"]["RMT"]["budget"][0]
    left.step(*zip(*asked), where="mid", color="black", lw=0.8, ls=":", label="B_t")
    for name, of in data["ends"].items():
        colour, line = ARMS[name][1:] if name in ARMS else ("0.55", ":")
        ends = [[(B, end[str(B)][0]) for B in BUDGETS] for end in of]
        pictures.curve(right, ends, colour, ls=line, marker="o", ms=4, label=name)
    for axis, title, x in (
        (left, "tokens of a thought", "rollout"), (middle, "next-token loss of the text, nats", "rollout"),
        (right, "right sums at the end, sampled", "B that is asked for"),
    ):  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x, fontsize=9)
        axis.legend(fontsize=7, frameon=False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    middle.set_ylim(bottom=0)
    right.set_xticks(BUDGETS)
    right.set_ylim(0.2, 1.02)
