"""MDLM: accuracy over denoising steps in three orders, and which positions of a canvas are revealed at which step."""

import torch

from algos import mdlm
from common import diffusion, models, settings
from runs.panels import SEEDS, rows

SIZE = (9.6, 3.4)
ORDERS = dict(confidence="tab:blue", random="tab:orange", left="tab:green")
PROMPT = "73="


def numbers(seed):
    """{over_steps: {order: [(steps, accuracies of the seeds)]}, strips: {order: [[token, step] of every position]}}."""
    ends = [rows("mdlm", "", "evals", s)[-1] for s in SEEDS]
    steps = sorted(int(name.partition("_")[2]) for name in ends[0] if name.startswith("random_"))
    over = {order: [(n, [end[f"{order}_{n}"] for end in ends]) for n in steps] for order in ORDERS}
    args, _ = settings.resolve(mdlm.Args(), diffusion.world)
    tokenizer = models.load_tokenizer(args, diffusion.world)
    policy = models.load(args, torch.device("cpu"), trainable=False, warm=diffusion.world, denoiser=True)
    prompt, strips = tokenizer(PROMPT)["input_ids"], {}
    for order in ORDERS:
        args.order = order
        engine, when = diffusion.Canvas(policy, tokenizer, args, mdlm.unmask), []
        ask = engine.guess
        engine.guess = lambda *given, ask=ask, when=when: (when.append(given[4]), ask(*given))[1]
        (ids, _, _), *_ = engine.generate([prompt], 1, args.max_new_tokens, 0.0, [seed])
        still = torch.cat(when).sum(0).tolist()  # in so many passes a position was masked
        strips[order] = [[tokenizer.decode([t]), k] for t, k in zip(ids, still)]
    return dict(over_steps=over, strips=strips)


def draw(figure, data):
    left, right = figure.subplots(1, 2)
    for order, points in data["over_steps"].items():
        x, ys = zip(*points)
        left.plot(x, [sum(y) / len(y) for y in ys], marker="o", color=ORDERS[order], label=order)
        left.fill_between(x, [min(y) for y in ys], [max(y) for y in ys], color=ORDERS[order], alpha=0.2, lw=0)
    left.set(xlabel="denoising steps", ylabel="accuracy on 80 sums", title="three seeds", xscale="log", ylim=(0, 1))
    left.set_xticks(x, [str(n) for n in x])
    left.minorticks_off()
    left.legend(title="order")
    for i, (order, strip) in enumerate(data["strips"].items()):
        for place, (token, step) in enumerate(strip):
            right.text(place, -i, "end" if token == "<eos>" else token, ha="center", va="bottom", fontsize=11)
            right.text(place, -i - 0.08, f"{step}", ha="center", va="top", fontsize=8, color=ORDERS[order])
        right.text(-0.8, -i, order, ha="right", va="center", color=ORDERS[order])
    right.set(xlim=(-3.2, len(strip)), ylim=(-len(data["strips"]) + 0.4, 0.6))
    right.set_title("73=, and below each token the step that revealed it")
    right.axis("off")
