"""Time to accuracy: this repository's GRPO and TRL's, from the same warm-started tiny model, on the same prompts.

python -m tests.bench.accuracy                              addition:3 and route, five pairs
python -m tests.bench.accuracy --tasks route --pairs 2      a quick look
Each side trains for a fixed number of rollouts (RUNS) with the settings of the tiny preset, and the same function measures its
greedy accuracy on 512 held-out prompts every few of them, with the clock stopped. A side's plateau is the mean of the
evaluations in the last quarter of its rollouts; a pair's threshold is SHARE of the lower of its two plateaus; a side is there
at its first evaluation at or above that. Counted until then: seconds of rollouts, scoring and updates, and generated tokens.
Both sides run in the environment of tests/bench/__main__.py, one process at a time, A B A B, with one thread each. A pair's
number is its seed. Ratios are ours to TRL's, one for every pair: less is better.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Literal

import tyro

from common import UserError
from tests.bench.__main__ import ROOT, band, environment, processor

# task -> rollouts, rollouts between evaluations: seven or eight evaluations in the last quarter.
RUNS = {"addition:3": (30, 1), "route": (100, 4)}
SHARE = 0.9  # of the lower plateau
GOAL = 0.5  # ratio of the seconds, at most


@dataclass
class Options:
    tasks: tuple[str, ...] = tuple(RUNS)
    """of RUNS"""
    pairs: int = 5
    """runs of each side, in turn"""
    out: str | None = None
    """table (.md) and numbers (.json), without ending"""
    side: Literal["", "ours", "trl"] = ""
    """one run in this process, of the first of the tasks, as one line of JSON: what the pairs are made of"""
    seed: int = 1
    """of that run"""
    rollouts: int = 0
    """of that run; 0: those of RUNS"""
    prompts: int = 512
    """held-out ones in an evaluation"""
    mkl: str = "COMPATIBLE"
    """MKL_CBWR of both sides: how MKL multiplies; COMPATIBLE, what our tiny models are pinned to, alike on all CPUs; AUTO"""


# ---------------------------------------------------------------- one run


def settings_of(options, run_dir=None):
    """The script's own Args, which both sides take their settings from, and the rollouts between evaluations."""
    from algos import grpo
    from common import tasks
    from common.worlds import tiny

    name = options.tasks[0]
    rollouts, every = RUNS.get(name, (options.rollouts, 1))
    folder = tiny.warm_start(tasks.load(name))
    return grpo.Args(
        model=folder, task=name, seed=options.seed, steps=options.rollouts or rollouts, eval_every=every,
        eval_prompts=options.prompts, checkpoint_every=0, engine="hf", device="cpu", run_dir=run_dir,
    )  # fmt: skip


def ours(options, folder):
    from algos import grpo

    args = settings_of(options, f"{folder}/run")
    grpo.train(args)
    steps, evals = ([json.loads(line) for line in open(f"{folder}/run/{n}.jsonl")] for n in ("metrics", "evals"))
    rollouts = [dict(seconds=r["time/step"], tokens=r["tokens"], reward=r["reward"]) for r in steps]
    return args, rollouts, [(r["step"], r["greedy_accuracy"]) for r in evals]


def theirs(options, folder):
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, TrainerCallback

    from common import engines, models, rewards, rollout, settings, tasks

    assert trl.__version__ == "1.16.0", trl.__version__
    args, _, _ = settings.prepare("grpo.py", settings_of(options))  # seeds and threads, too
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer)
    scorer = rewards.Scorer(task.check, inline=task.inline)
    rollouts, evals, N = [], [], args.minibatches
    examples = task.order(0, args.steps * args.prompts_per_step, args.seed)  # those of our rollouts, in their order

    def reward(completions, completion_ids, answer, **kwargs):
        _, scores = scorer(completions, answer)
        scores = [s if ids[-1] in engine.end else 0.0 for s, ids in zip(scores, completion_ids)]
        rollouts.append(dict(tokens=sum(map(len, completion_ids)), reward=mean(scores)))
        return scores

    class Watch(TrainerCallback):
        def evaluate(self, step):
            training = trainer.model.training
            evals.append((step, rollout.evaluate(engine, scorer, tokenizer, task, args)["greedy_accuracy"]))
            assert trainer.model.training == training

        def on_train_begin(self, *args, **kwargs):
            self.evaluate(0)

        def on_step_begin(self, _, state, control, **kwargs):
            if state.global_step % N == 0:
                self.start = time.perf_counter()

        def on_step_end(self, _, state, control, **kwargs):
            step, rest = divmod(state.global_step, N)
            if rest == 0:
                rollouts[-1]["seconds"] = time.perf_counter() - self.start
                if step % args.eval_every == 0 or step == args.steps:
                    self.evaluate(step)

    # A minibatch is one batch of the trainer, so that an update takes one backward pass. It logs once a rollout, as our side
    # does, and outside of the clock as there.
    config = trl.GRPOConfig(
        output_dir=f"{folder}/trl", max_steps=args.steps * N, num_generations=args.group_size, steps_per_generation=N,
        per_device_train_batch_size=args.prompts_per_step * args.group_size // N, gradient_accumulation_steps=1,
        max_completion_length=args.max_new_tokens, temperature=args.temperature, loss_type="grpo", epsilon=args.eps, beta=0.0,
        learning_rate=args.lr, lr_scheduler_type="constant", optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.999,
        weight_decay=args.weight_decay, max_grad_norm=args.max_grad_norm, seed=args.seed, shuffle_dataset=False,
        use_vllm=False, use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_steps=N, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    # By path TRL loads no model whose config leaves out `architectures`, as that of an older warm start does.
    lm = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    trainer = trl.GRPOTrainer(
        model=lm, reward_funcs=reward, args=config, callbacks=[Watch()],
        train_dataset=datasets.Dataset.from_list([dict(prompt=task.template.format(prompt=e.prompt), answer=e.answer)
                                                  for e in examples]),
    )  # fmt: skip
    engine = engines.HF(SimpleNamespace(lm=trainer.model, pictures=None), tokenizer)
    assert trainer._tokenize_prompts([x["prompt"] for x in trainer.train_dataset])[0] == [e.ids for e in examples]
    assert sorted(trainer.eos_token_ids) == engine.end, (trainer.eos_token_ids, engine.end)
    trainer.train()
    return args, rollouts, evals


def curve(rollouts, evals):
    """rollouts [{seconds, tokens}], evals [(rollouts before it, greedy accuracy)] -> [[rollouts, seconds, tokens, accuracy]],
    counted from the start."""
    return [[n, *(sum(r[k] for r in rollouts[:n]) for k in ("seconds", "tokens")), accuracy] for n, accuracy in evals]


def one_run(options):
    """-> the line of JSON; core is the share of the run's time that its thread had a core for: well below 1, the machine was
    busy with something else."""
    import torch

    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args, rollouts, evals = dict(ours=ours, trl=theirs)[options.side](options, folder)
    core = (time.process_time() - cpu) / (time.perf_counter() - wall)
    assert torch.get_num_threads() == 1 and len(rollouts) == args.steps == evals[-1][0], (rollouts, evals)
    kept = """prompts_per_step group_size minibatches epochs lr temperature max_new_tokens eps max_grad_norm weight_decay
              steps eval_every eval_prompts""".split()
    found = {k: v for k, v in asdict(args).items() if k in kept}
    return dict(side=options.side, task=args.task, seed=args.seed, model=Path(args.model).name, settings=found,
                curve=curve(rollouts, evals), rewards=[r["reward"] for r in rollouts], core=core)  # fmt: skip


# ---------------------------------------------------------------- pairs of runs


def plateau(curve):
    """Mean accuracy of the evaluations in the last quarter of the rollouts."""
    return mean(accuracy for n, *_, accuracy in curve if n > 0.75 * curve[-1][0])


def reach(curve, threshold):
    """-> (rollouts, seconds, tokens) until the first evaluation at or above the threshold, and whether there was one: where
    there was none, what the whole run took is a lower bound."""
    for n, seconds, tokens, accuracy in curve:
        if accuracy >= threshold:
            return (n, seconds, tokens), True
    return tuple(curve[-1][:3]), False


def compare(a, b):
    """Two runs' lines of JSON, ours and TRL's -> the pair's numbers. Ratios are ours to TRL's; `whole` is that of the seconds
    of all rollouts. UserError where the threshold is no higher than the start."""
    threshold = round(SHARE * min(plateau(a["curve"]), plateau(b["curve"])), 9)  # 0.9 * 0.8 is a little above 0.72
    if threshold <= a["curve"][0][3]:
        raise UserError(f"task {a['task']}, seed {a['seed']}: the start's accuracy is at the threshold, {threshold:.3f}")
    out = dict(threshold=threshold, start=a["curve"][0][3])
    for side, run in dict(ours=a, trl=b).items():
        (n, seconds, tokens), reached = reach(run["curve"], threshold)
        out[side] = dict(rollouts=n, seconds=seconds, tokens=tokens, reached=reached, plateau=plateau(run["curve"]))
    out |= {k: out["ours"][k] / out["trl"][k] for k in ("seconds", "tokens")}
    return out | dict(whole=a["curve"][-1][1] / b["curve"][-1][1])


def same_start(a, b):
    """Asserts that the runs of a pair begin alike: model, settings, greedy accuracy before training exactly; the reward of the
    first rollout (its prompts are the same) to within four standard errors of a difference of shares."""
    for what in ("model", "settings", "task", "seed"):
        assert a[what] == b[what], (what, a[what], b[what])
    assert a["curve"][0] == b["curve"][0], (a["curve"][0], b["curve"][0])
    n, (p, q) = a["settings"]["prompts_per_step"] * a["settings"]["group_size"], (x["rewards"][0] for x in (a, b))
    middle = (p + q) / 2
    assert abs(p - q) <= 4 * (2 * middle * (1 - middle) / n) ** 0.5, (p, q)


def table(results):
    """Markdown: the ratios, then the numbers themselves. A star: a side never reached the threshold in some of the pairs, its
    whole run was counted."""
    heads = ["task", "seconds, ours to TRL's", "tokens, ours to TRL's", "seconds of all rollouts", "start", "threshold"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for task, found in results.items():
        pairs = found["pairs"]
        star = "" if all(p[s]["reached"] for p in pairs for s in ("ours", "trl")) else " *"
        cells = [band([p[k] for p in pairs]) + star for k in ("seconds", "tokens")] + [band([p["whole"] for p in pairs])]
        cells += [f"{pairs[0]['start']:.3f}", band([p["threshold"] for p in pairs], "{:.3f}")]
        rows.append(f"| {task} | " + " | ".join(cells) + " |")
    heads = ["task", "side", "seconds", "tokens", "rollouts", "plateau", "reached"]
    rows += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for task, found in results.items():
        for side in ("ours", "trl"):
            at = [p[side] for p in found["pairs"]]
            forms = dict(seconds="{:.1f}", tokens="{:,.0f}", rollouts="{:.0f}", plateau="{:.3f}")
            cells = [task, side, *(band([x[k] for x in at], form) for k, form in forms.items())]
            rows.append("| " + " | ".join([*cells, f"{sum(x['reached'] for x in at)} of {len(at)}"]) + " |")
    return "\n".join(rows)


def verdict(task, pairs):
    """The goal's line. It is missed where our side did not get there in every pair: its ratios are lower bounds then."""
    got = median(p["seconds"] for p in pairs)
    never = {s: sum(not p[s]["reached"] for p in pairs) for s in ("ours", "trl")}
    words = "".join(f"; {s} never reached the threshold in {n} of {len(pairs)}" for s, n in never.items() if n)
    return f"{task}: seconds {got:.2f}, goal {GOAL}: {'reached' if got <= GOAL and not never['ours'] else 'missed'}{words}"


def run(python, side, task, seed, options):
    argv = [python, "-m", "tests.bench.accuracy", "--side", side, "--tasks", task, "--seed", str(seed)]
    argv += ["--rollouts", str(options.rollouts), "--prompts", str(options.prompts)]
    alike = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_CBWR=options.mkl)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | alike)
    if done.returncode:
        sys.exit(f"{side} failed on {task}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(options):
    if unknown := sorted(set(options.tasks) - RUNS.keys()):
        raise UserError(f"--tasks {' '.join(unknown)}: how many rollouts? there is: {', '.join(RUNS)}")
    python, results = environment(), {}
    for task in options.tasks:
        results[task] = found = dict(ours=[], trl=[], pairs=[])
        for pair in range(1, options.pairs + 1):
            for side in ("ours", "trl"):
                r = run(python, side, task, pair, options)
                found[side].append(r)
                n, seconds, tokens, last = r["curve"][-1]
                change = f"greedy accuracy {r['curve'][0][3]:.3f} -> {last:.3f}, plateau {plateau(r['curve']):.3f}"
                counted = f"{n} rollouts, {seconds:.1f} s, {tokens:,} tokens, had a core for {r['core']:.0%}"
                print(f"{task} {pair}/{options.pairs} {side}: {counted}; {change}", flush=True)
            a, b = found["ours"][-1], found["trl"][-1]
            same_start(a, b)
            found["pairs"].append(compare(a, b))
            p = found["pairs"][-1]
            print(f"  threshold {p['threshold']:.3f}: seconds {p['ours']['seconds']:.1f} and {p['trl']['seconds']:.1f}, ratio "
                  f"{p['seconds']:.2f}; tokens {p['tokens']:.2f}", flush=True)  # fmt: skip
            if options.out:
                write(options.out, results, python)
    print(report(results))


def report(results):
    return "\n".join([table(results), "", *(verdict(task, found["pairs"]) for task, found in results.items())])


def write(out, results, python):
    """Numbers and table of the pairs so far."""
    command = "python -m tests.bench.accuracy " + " ".join(sys.argv[1:])
    ask = "from importlib.metadata import version as v; print(*map(v, ('torch', 'transformers', 'trl')))"
    versions = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    device = f"{processor()}, one thread"
    record = dict(command=command.strip(), device=device, share=SHARE, results=results,
                  versions=dict(zip(("torch", "transformers", "trl"), versions)))  # fmt: skip
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    out.with_suffix(".md").write_text(f"`{command.strip()}` on {device}\n\n{report(results)}\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given = tyro.cli(Options)
    if given.side:
        print(json.dumps(one_run(given)))
    else:
        main(given)
