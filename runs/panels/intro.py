"""InTRO: what being told an answer does to the start; accuracy, length and w over the training, beside RAFT and GRPO."""

from dataclasses import replace
from pathlib import Path

from algos import intro
from common import engines, gpu, models, settings, tasks
from common.worlds import tiny
from runs import pictures
from runs.panels import columns, metrics
from runs.panels.rank_grpo import smooth

SIZE = (12.6, 3.7)
STEPS = "eval-every-10-max-new-tokens-48-minibatches-1-model-runs_cache_{start}-steps-60-task-addition"
# The folders of runs.compare, by script and flags.
ARMS = {
    "GRPO": ("grpo", STEPS, "tab:orange", "--"),
    "RAFT: n 1, w = 1": ("intro", "candidates-1-task-addition-weights-ones", "tab:green", "-."),
    "InTRO, n 1": ("intro", "candidates-1-task-addition", "#9ecae1", "-"),
    "InTRO, n 5": ("intro", "task-addition", "tab:blue", "-"),
    "InTRO, n 10": ("intro", "candidates-10-task-addition", "#08306b", "-"),
    "--exact": ("intro", "exact-task-addition", "tab:purple", ":"),
    "n 5, told 10 more": ("intro", "hint-wrong-task-addition", "tab:red", ":"),
}
PLACES = dict(w_first=("first token", "tab:orange"), w_answer=("answer", "tab:red"), w_elsewhere=("elsewhere", "tab:blue"))
TOLD = dict(nothing="told\nnothing", right="told the\nanswer", wrong="told\n10 more")


def beginning():
    """-> args, tokenizer, the world's folder: what the script starts with."""
    args, _ = settings.resolve(intro.Args(engine="hf"))
    gpu.init(args)
    return args, models.load_tokenizer(args, intro.sums(args)), tiny.warm_start(intro.sums(args))


def told(seed, prompts=256, n=4):
    """{what is told: (share of right ones, share of guesses) of n sampled texts for each held-out prompt} at the start."""
    args, tokenizer, folder = beginning()
    task = tasks.load(args.task, tokenizer)
    engine = engines.HF(models.load(replace(args, model=folder), gpu.device()), tokenizer)
    examples, out = task.test[:prompts], {}
    for kind in TOLD:
        asked = examples
        if kind != "nothing":
            asked = tasks.encode(intro.hinted(replace(task, train=examples), replace(args, hint=kind)), tokenizer).train
        seeds = [gpu.hash_seed(seed, i, 13) for i in range(len(asked))]
        found = engine.generate([e.ids for e in asked], n, args.max_new_tokens, 1.0, seeds)
        texts = tokenizer.batch_decode([ids for ids, _, _ in found], skip_special_tokens=True)
        right = [task.check(text, examples[i // n].answer)[1] for i, text in enumerate(texts)]
        out[kind] = sum(right) / len(right), sum(text.startswith(":") for text in texts) / len(texts)
    return out


def numbers(seed):
    start, arms = Path(beginning()[2]).name, {}
    for name, (script, flags, _, _) in ARMS.items():
        names = ("accuracy", *(("right_length",) if script == "intro" else ()))
        arms[name] = columns(metrics(script, flags.format(start=start)), None, *names)
    return dict(told=told(seed), arms=arms, w=columns(metrics("intro", "task-addition"), None, *PLACES))


def draw(figure, data):
    first, over, long, w = figure.subplots(1, 4, width_ratios=[0.8, 1.2, 1, 1])
    for i, (shift, colour, label) in enumerate(((-0.2, "tab:blue", "right"), (0.2, "0.7", "guesses"))):
        first.bar(
            [k + shift for k in range(len(TOLD))], [data["told"][kind][i] for kind in TOLD], 0.38, color=colour, label=label
        )
    first.set_xticks(range(len(TOLD)), TOLD.values())
    first.set_title("the start, sampled", fontsize=10)
    for name, (_, _, colour, line) in ARMS.items():
        arm = data["arms"][name]
        pictures.curve(over, [smooth(run) for run in arm["accuracy"]], colour, ls=line, lw=1.6, label=name)
        if "right_length" in arm:
            pictures.curve(long, [smooth([p for p in run if p[1]]) for run in arm["right_length"]], colour, ls=line, lw=1.6)
    over.set_ylim(0, 1.05)
    over.set_title("sampled accuracy, not told", fontsize=10)
    long.set_title("tokens of a right completion", fontsize=10)
    for place, (label, colour) in PLACES.items():
        pictures.curve(w, [smooth(run) for run in data["w"][place]], colour, lw=1.6, label=label)
    w.axhline(1, color="0.5", lw=0.8)
    w.set_title("InTRO, n 5: w of written tokens", fontsize=10)
    for axis in (over, long, w):
        axis.set_xlabel("rollout (mean over nine)", fontsize=9)
    for axis in (first, over, long, w):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in (first, over, w):
        axis.legend(fontsize=7, frameon=False)
