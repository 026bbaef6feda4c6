"""Runs that can be watched, compared and survived: folder, steps, metrics, samples, the bar, stop and resume."""

import dataclasses
import importlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from common import ROOT, UserError, checkpoint, gpu, memory, models, reason, samples, settings, tasks
from common.worlds import tiny

IDLE = 5  # rollouts in a row without a group that teaches anything: time to say so


class Run:
    """One run's folder: config.json, metrics.jsonl, evals.jsonl, samples.jsonl, TensorBoard events, checkpoints/step-N/. Only
    rank 0 writes. A script without a language model leaves out config, tokenizer and context. `trained` and `frozen`: models
    of the policy's size that the script holds, for the memory plan; where none is trained, checkpoints hold what is. `state` is
    what a checkpoint carries besides weights and optimizer, plain numbers and dicts, equal on all ranks; `queue` holds Batches
    of this rank that wait, `extra` {name: (module, optimizer)} what is trained besides the policy."""

    def __init__(self, script, args, config=None, tokenizer=None, context=None, trained=1, frozen=0):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.args, self.tokenizer, self.main, self.stop = args, tokenizer, gpu.rank() == 0, None
        self.name, world = Path(script).stem, tasks.world(tasks.source(args))
        # What accuracy is called in words: a gold reward is a score, and one of the user's own.
        self.measure = "score" if vars(args).get("reward") else world.measure if world else "accuracy"
        known = world and world.test and not world.test[0].pictures and world.test[0].prompt in [e.prompt for e in world.train]
        self.talks = getattr(config, "is_causal", True) is not False and not hasattr(config, "vision_config")
        self.asked = "prompts" if known else "held-out prompts"
        self.state, self.queue, self.extra, self.after = dict(step=0, cursor=0, skipped=0), [], {}, None
        self.bad_in_a_row, self.clock, self.times, self.schedules, self.tracker = 0, time.perf_counter(), {}, [], None
        self.idle, self.total = 0, vars(args).get("steps", vars(args).get("items"))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.dir = Path(args.resume or args.run_dir or ROOT / "runs" / f"{self.name}-{args.seed}-{stamp}")
        if vars(args).get("push_to_hub"):
            checkpoint.may_push(args.push_to_hub)
        self.found = checkpoint.find(self, config if trained else None) if args.resume else None
        start = self.found[2]["step"] if self.found else 0
        if self.main:
            self._write_config(config, start)
            checkpoint.rewind(self.dir, start if self.found else -1)
            paths = [self.dir / f"{name}.jsonl" for name in ("metrics", "evals", "samples")]
            self.metrics, self.evals, self.samples = (open(p, "a", 1, encoding="utf-8") for p in paths)  # line by line
            self.board = SummaryWriter(str(self.dir), purge_step=start + bool(start) if args.resume else None)
            if config is not None and args.model not in tiny.SHAPES:
                _, size = models.architecture(args)
                print(memory.explain_plan(config, args, size, context, trained=trained, frozen=frozen), flush=True)
            self._track()
            if world and world.demonstrate:
                shown = world.test[0]
                right = world.demonstrate(random.Random(0), shown, 1.0)
                rule = sys.modules[f"common.worlds.{world.name.partition(':')[0]}"].__doc__.partition(": ")[2].partition(".")[0]
                print(f"task {world.name}: {rule}; {shown.prompt!r} -> {right!r}", flush=True)
            print(f"run folder {self.dir}", flush=True)
            self.bar = tqdm(total=self.total, initial=start, desc=self.name, disable=None, dynamic_ncols=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def _track(self):
        """Joins trackio or wandb, whose functions have the same names, where args.tracker asks for one."""
        name = vars(self.args).get("tracker", "none")
        if name != "none":
            try:
                self.tracker = importlib.import_module(name)
            except ImportError:
                raise UserError(f"--tracker {name}: it is not installed (pip install {name})") from None
            try:
                self.tracker.init(project="one-paper-one-file", name=self.dir.name, config=vars(self.args))
            except Exception as error:  # not logged in, no network
                raise UserError(f"--tracker {name}: {reason(error)}") from None

    def _write_config(self, config, start):
        import transformers

        # Empty where there is no git or no repository.
        commit = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.dir / ".lock")  # until this process ends, however it ends
            self.lock.acquire(timeout=0)
            metrics = self.dir / "metrics.jsonl"
            if not self.args.resume and metrics.exists() and metrics.stat().st_size:
                raise UserError(f"--run-dir {self.dir} already holds a run; continue it with --resume {self.dir}")
            record = dict(
                script=self.name, args=dataclasses.asdict(self.args), world_size=gpu.world(), device=str(gpu.device()),
                model_config=config.to_diff_dict() if config else None, git_commit=commit.stdout.strip() or None,
                versions=dict(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__),
            )  # fmt: skip
            name = f"config-resumed-{start}.json" if self.found else "config.json"
            (self.dir / name).write_text(json.dumps(record, indent=1, default=str) + "\n")
        except Timeout:
            raise UserError(f"another process is running in the folder {self.dir}") from None
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.dir}: {error.strerror or error}") from None

    def restore(self, policy, optimizer):
        """Starts the optimizers' schedules; a resumed run gets what the checkpoint found at the start holds."""
        self.schedules = gpu.make_schedules([optimizer, *(o for _, o in self.extra.values())], self.args)
        if self.found:
            self.state = self.found[2]
            checkpoint.restore(self, self.found, policy, optimizer)

    def steps(self, policy, optimizer, evaluate):
        """The numbers of the steps that are left; a step is done when it is logged, and comes again where it was not. What
        evaluate() gives, {name: number}, is recorded before the first step, every args.eval_every steps and after the last;
        a checkpoint is written every args.checkpoint_every steps, after the last, and when a signal asks to stop."""
        args = self.args
        if "before" not in self.state:
            self.state["before"] = self.measured(evaluate())
        while (step := self.state["step"]) < args.steps:
            # Randomness outside the rollout (stochastic rounding, dropout) is a function of (seed, step, rank), too.
            torch.manual_seed(gpu.hash_seed(args.seed, step, gpu.rank(), 11))
            self.clock, self.times = time.perf_counter(), {}
            yield step
            done = self.state["step"]
            if done > step and args.eval_every and done % args.eval_every == 0 and done < args.steps:
                self.measured(evaluate())
            if done > step and args.checkpoint_every and done % args.checkpoint_every == 0:
                checkpoint.save(self, policy, optimizer)
            if gpu.maximum(int(bool(self.stop))):
                checkpoint.save(self, policy, optimizer)
                self._close(f"stopped after step {done}; continue with --resume {self.dir}")
                return
        self.after = self.measured(evaluate()) if self.state["step"] else self.state["before"]
        checkpoint.save(self, policy, optimizer)

    def _ask_to_stop(self, number, frame):
        if self.stop:  # the second time means now
            settings.stop_now(number, frame)
        self.stop = number
        if self.main:
            print("\nstopping after this step (once more to stop at once)", file=sys.stderr, flush=True)

    def finite(self, *numbers):
        """Whether the update may be made. One that may not is counted; five in a row stop the run."""
        good = all(map(math.isfinite, numbers))
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        self.state["skipped"] += not good
        if self.bad_in_a_row >= 5:
            what = f"the loss or its gradient was not finite in 5 updates in a row (step {self.state['step'] + 1})"
            advice = f"Try a smaller --lr. Metrics: {self.dir / 'metrics.jsonl'}"
            raise UserError(f"{what}; the weights are those of the last finite update. {advice}")
        return good

    def finish(self, sentence=None):
        """Ends a run that came to its end with its last line: `sentence`, or evaluate()'s first number before and after."""
        if self.after:
            name, after = next(iter(self.after.items()))
            change = f"{self._words(name)} {self.state['before'][name]:.2f} -> {after:.2f}"
            if self.state["step"] == 0:
                change = f"evaluation only (no steps): {self._words(name)} {after:.2f}"
            sentence = sentence or f"{change} on {self.after['prompts']} {self.asked}"
        if sentence:
            if self.main and self.tokenizer and self.after:
                model = sorted((self.dir / "checkpoints").glob("step-*"))[-1]
                print(f"curves: tensorboard --logdir {self.dir}", flush=True)
                if self.talks:
                    print(f"talk to it: python -m runs.talk {self.dir}", flush=True)
                if (model / "config.json").exists():
                    print(f"the model, for --model or transformers' from_pretrained: {model}", flush=True)
            self._close(sentence)
            if self.main and vars(self.args).get("push_to_hub"):
                checkpoint.push(self)

    def _close(self, sentence):
        if self.main:
            for part in (self.bar, self.board, self.metrics, self.evals, self.samples):
                part.close()
            if self.tracker:
                self.tracker.finish()
            print(sentence, flush=True)

    def timed(self, stage):
        """Seconds since the last call go to `stage`."""
        if gpu.device().type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + now - self.clock
        self.clock = now

    def log(self, metrics, batch):
        """Ends a step with a Batch of completions: write(), and the first prompt's into samples.jsonl, every 20 steps token by
        token, now and then two of them on the terminal. `metrics` are plain numbers."""
        tokens, t = int(gpu.total(int(batch.mask.sum()))), self.times
        metrics["time/rollout_tokens_per_s"] = tokens / max(t.get("rollout", 0.0), 1e-9)
        metrics["time/update_tokens_per_s"] = tokens * self.args.epochs / max(t.get("update", 0.0), 1e-9)
        accuracy = "acc" if self.measure == "accuracy" else self.measure
        self.write(metrics, tokens, dict(reward="reward", accuracy=accuracy, length="len", entropy="H"))
        if not self.main:
            return
        self.idle = 0 if batch.group == 1 or metrics["adv_max"] or metrics["adv_min"] else self.idle + 1
        if self.idle == IDLE:
            cut = f"{metrics['truncated']:.0%} of the last completions were cut at --max-new-tokens {self.args.max_new_tokens}"
            self.bar.write(f"note: in {IDLE} rollouts no completion had an advantage over another: nothing is learnt; {cut}")
        for i in range(min(len(batch.texts), max(2, batch.group))):
            row = dict(step=self.state["step"]) | samples.record(self.tokenizer, batch, i, self.state["step"] % 20 == 1)
            self.samples.write(json.dumps(row) + "\n")
        for line in samples.contrast(self.tokenizer, batch) if self.aloud else ():
            self.bar.write(line)

    def write(self, metrics, tokens, keys):
        """Ends a step: its metrics and timing to file and TensorBoard, and to the bar those of them that `keys` {metric: its
        short name} names. `tokens`: trained on, of all ranks."""
        self.state["step"] += 1
        if self.schedules:
            metrics = dict(metrics, lr=float(self.schedules[0].get_last_lr()[0]))
        for schedule in self.schedules:
            schedule.step()
        seconds = sum(self.times.values())
        metrics = dict(metrics, tokens=tokens, skipped_updates=self.state["skipped"])
        metrics |= {f"time/{stage}": t for stage, t in self.times.items()}
        metrics |= {"time/step": seconds, "time/tokens_per_s": tokens / max(seconds, 1e-9)}
        self.times = {}
        if self.main:
            self._record(self.metrics, metrics)
            text = " ".join(f"{short} {metrics[k]:.2f}" for k, short in keys.items() if k in metrics)
            text += f" {metrics['time/tokens_per_s']:,.0f} tok/s"
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1)
            self.aloud = (self.state["step"] - 1) % max(1, self.total // 6) == 0  # six times a run
            if self.aloud:
                self.bar.write(f"  step {self.state['step']:>4}  {text}")

    def measured(self, values):
        """Records {name: number}, with `prompts` they were measured on, unless this step has some; returns them."""
        step = self.state["step"]
        if self.main and step not in [row["step"] for row in checkpoint.rows(self.dir / "evals.jsonl")]:
            numbers = {k: v for k, v in values.items() if k != "prompts"}
            self._record(self.evals, numbers, prompts=values["prompts"])
            text = ", ".join(f"{self._words(k)} {v:.3g}" for k, v in numbers.items())
            first = next(iter(numbers.values()))
            curve = "#" * round(40 * first) if self.measure == "accuracy" and 0 <= first <= 1 else ""
            self.bar.write(f"  step {step:>4}  {text} on {values['prompts']:,} {self.asked}  {curve}")
        return values

    def _record(self, file, numbers, **more):
        """A line of a .jsonl file, and its numbers on the board."""
        line = {k: v if math.isfinite(v) else None for k, v in numbers.items()}  # JSON has no NaN
        file.write(json.dumps(dict(step=self.state["step"], **line, **more)) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(name, value, self.state["step"])
        if self.tracker:
            self.tracker.log(numbers, step=self.state["step"])

    def _words(self, name):
        """A number's name in words."""
        return name.replace("_", " ").replace("greedy accuracy", f"greedy {self.measure}")
