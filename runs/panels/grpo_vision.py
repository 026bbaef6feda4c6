"""GRPO with pictures: held-out scenes with what the model says of them, before training and after; accuracy and length."""


from algos import grpo_vision
from common import UserError
from common.worlds import tiny_vision
from runs import launch, pictures
from runs.panels import SEEDS, columns, metrics, sighted

SIZE = (13, 5.6)
SHOWN = 6


def said(s, examples):
    """[(greedy completion, whether it is right)]."""
    out = s.engine.generate([e.ids for e in examples], 1, s.args.max_new_tokens, 0.0, [0] * len(examples))
    texts = [s.tokenizer.decode(ids, skip_special_tokens=True) for ids, _, _ in out]
    return [(text, s.task.check(text, e.answer)[1]) for text, e in zip(texts, examples)]


def numbers(seed):
    trained = launch.ROOT / "runs" / "compare" / f"grpo_vision-{seed}"
    if not trained.exists():
        raise UserError(f"{trained} is missing: the comparisons of runs/reference/README.md make it")
    before = sighted(grpo_vision)
    examples = before.task.test[:SHOWN]
    after = said(sighted(grpo_vision, model=str(trained), task="count_sum"), examples)
    scenes = [
        dict(picture=e.pictures[0].tolist(), prompt=e.prompt, right=e.answer, before=b, after=a)
        for e, b, a in zip(examples, said(before, examples), after)
    ]
    return dict(scenes=scenes, curves=columns(metrics("grpo_vision"), None, "accuracy", "length"))


def draw(figure, data):
    above, below = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    for axis, scene in zip(above.subplots(1, SHOWN), data["scenes"]):
        axis.imshow(scene["picture"])
        for k in range(1, tiny_vision.CELLS):
            axis.axhline(tiny_vision.PIXELS * k - 0.5, color="0.35", lw=0.5)
            axis.axvline(tiny_vision.PIXELS * k - 0.5, color="0.35", lw=0.5)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"{scene['prompt']}   ({scene['right']})", fontsize=10)
        for i, when in enumerate(("before", "after")):
            text, score = scene[when]
            colour = "tab:green" if score else "tab:red"
            axis.text(0, 17 + 1.8 * i, f"{when}:", fontsize=8, color="0.4", va="center")
            axis.text(5, 17 + 1.8 * i, text, fontsize=8, family="monospace", color=colour, va="center")
    for axis, (name, runs) in zip(below.subplots(1, 2), data["curves"].items()):
        pictures.curve(axis, runs, "tab:blue", lw=1.6)
        words = dict(accuracy="share right of sampled completions", length="tokens of a completion")
        axis.set_title(f"{words[name]}, {len(SEEDS)} seeds", fontsize=10)
        axis.set_xlabel("rollout", fontsize=9)
        axis.set_ylim(0)
        axis.grid(alpha=0.25)
