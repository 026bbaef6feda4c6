"""CoT2: what CSFT learns at every width, beside one trace in tokens; that model's pass@k; and both accuracies over GRPO."""

from types import SimpleNamespace

from algos import cot2
from common import engines, gpu, models, tasks
from runs import launch, pictures
from runs.panels import SEEDS, rows
from runs.probe import pass_at_k, powers

SIZE = (14.5, 3.8)
N = 16
WIDTHS = {24: "", 32: "width-32"}
# --traces: how many, label, colour. The folders of runs.compare, by their flags.
TRACES = {0: ("CSFT, all 16 traces", "tab:blue"), 1: ("one trace, in tokens", "tab:orange")}
ARMS = {"K = 1": ("k-1", "#fdae6b"), "K = 3": ("", "tab:blue"), "K = 6": ("k-6", "#08306b")}
FLOOR = 0.56  # the most frequent answer, given whether the sum of the digits is even


def flags(traces, width):
    """In a folder's name."""
    return "-".join(["steps-0", *([f"traces-{traces}"] if traces else []), *([WIDTHS[width]] if WIDTHS[width] else [])])


def passes(folder, seed, prompts=None):
    """{k: pass@k} of N completions in tokens for each held-out prompt, by the model behind CSFT in a run's folder."""
    args = SimpleNamespace(model=str(folder / "csft"), task="mnns", dtype="float32", lora_rank=0, seed=seed, reward=None)
    args.gradient_checkpointing, args.width = False, 24
    gpu.init(args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.encode(cot2.mnns(args), tokenizer)
    test = task.test[:prompts]
    engine = engines.HF(models.load(args, gpu.device()), tokenizer)
    out = engine.generate([e.ids for e in test], N, 4, 1.0, [gpu.hash_seed(seed, i, 13) for i in range(len(test))])
    texts = tokenizer.batch_decode([ids for ids, _, _ in out], skip_special_tokens=True)
    right = [task.check(text, test[i // N].answer)[1] for i, text in enumerate(texts)]
    counts = [int(sum(right[i : i + N])) for i in range(0, len(right), N)]
    return {k: pass_at_k(counts, N, k) for k in powers(N)}


def numbers(seed):
    greedy, tokens, over, entropy = {}, {}, {}, {}
    for traces in TRACES:
        runs = {w: [rows("cot2", flags(traces, w), "evals", s)[0]["greedy_accuracy"] for s in SEEDS] for w in WIDTHS}
        greedy[str(traces)] = [[(w, runs[w][i]) for w in WIDTHS] for i in range(len(SEEDS))]
    for width in WIDTHS:
        folders = ["-".join(["cot2", str(s), flags(1, width)]) for s in SEEDS]
        found = [passes(launch.ROOT / "runs" / "compare" / folder, seed) for folder in folders]
        tokens[str(width)] = [list(of.items()) for of in found]
    for name, (own, _) in ARMS.items():
        evals = [rows("cot2", own, "evals", s) for s in SEEDS]
        over[name] = {of: [[(e["step"], e[key]) for e in run] for run in evals]
                      for of, key in dict(mixture="greedy_accuracy", drawn="avg@8").items()}  # fmt: skip
        metrics = [rows("cot2", own, "metrics", s) for s in SEEDS]
        entropy[name] = [[(r["step"], r["entropy_thoughts"]) for r in run] for run in metrics]
    return dict(greedy=greedy, tokens=tokens, over=over, entropy=entropy)


def draw(figure, data):
    first, second, third, fourth = figure.subplots(1, 4)
    for traces, (label, colour) in TRACES.items():
        pictures.curve(first, data["greedy"][str(traces)], colour, marker="o", ms=4, label=label)
    first.axhline(FLOOR, color="0.5", lw=0.8, ls=":")
    first.set_xticks(list(WIDTHS))
    first.set_title("one greedy pass after CSFT", fontsize=10)
    first.set_xlabel("width", fontsize=9)
    first.set_ylabel("accuracy on held-out multisets", fontsize=9)
    for (width, runs), style in zip(data["tokens"].items(), (":", "--", "-")):
        pictures.curve(second, runs, "tab:orange", ls=style, marker="o", ms=3, label=f"tokens, pass@k, width {width}")
        mean = sum(dict(map(tuple, run))[int(width)] for run in data["greedy"]["0"]) / len(data["greedy"]["0"])
        second.axhline(mean, color="tab:blue", ls=style, lw=1.2, label=f"CSFT, one pass, width {width}")
    second.set_xscale("log", base=2)
    second.set_xticks(powers(N), powers(N))
    second.set_title("samples in tokens beside one pass", fontsize=10)
    second.set_xlabel("k", fontsize=9)
    for name, (_, colour) in ARMS.items():
        for of, style in dict(drawn="-", mixture="--").items():
            pictures.curve(third, data["over"][name][of], colour, ls=style, lw=1.4, label=name if of == "drawn" else None)
        pictures.curve(fourth, data["entropy"][name], colour, lw=1.2)
    third.set_title("over GRPO: as drawn (solid)\nand by whole mixtures (dashed)", fontsize=10)
    fourth.set_title("entropy of what thoughts\nare drawn from, nats", fontsize=10)
    for axis in (third, fourth):
        axis.set_xlabel("rollout", fontsize=9)
    for axis in (first, second, third, fourth):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in (first, second, third):
        axis.legend(fontsize=6.5, frameon=False, loc="lower right")
