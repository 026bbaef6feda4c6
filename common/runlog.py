"""Runs that can be watched, compared and survived: folder, metrics, samples, checkpoints, resume."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from common import UserError, games, gpu, models, rollout

MAY_CHANGE = ("resume", "run_dir", "steps", "eval_every", "checkpoint_every", "engine", "vllm_memory", "vllm_tp",
              "micro_batch_tokens")  # fmt: skip


def prepare(script, args):
    """-> (args with every field filled in, the model's config, the device). Joins the process group, prints what will run."""
    if args.resume:
        args = inherit(Path(script).stem, args)
    args, config = models.resolve(args)
    device = gpu.init(args)
    if gpu.rank() == 0:
        print(f"{Path(script).stem}: " + " ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None), flush=True)
    return args, config, device


def inherit(script, args):
    """A resumed run keeps its settings: fields left at their defaults come from its config.json; one that is given and
    differs is refused, unless it is in MAY_CHANGE."""
    path = _config(Path(args.resume))
    try:
        before = json.loads(path.read_text())
        before["script"], before["args"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--resume {args.resume}: no run there ({path} cannot be read)") from None
    if before["script"] != script:
        raise UserError(f"--resume {args.resume}: that is a run of {before['script']}.py, not of {script}.py")
    for f in dataclasses.fields(args):
        given, old = getattr(args, f.name), before["args"].get(f.name, f.default)
        if given == f.default and f.name not in ("resume", "run_dir"):
            setattr(args, f.name, old)
        elif given != old and f.name not in MAY_CHANGE:
            flag = f.name.replace("_", "-")
            raise UserError(f"--resume {args.resume}: --{flag} is {old} there, not {given}; a resumed run keeps its settings")
    return args


def _config(folder):
    """The settings that hold: those of the last resume, or those of the start."""
    resumed = [p for p in folder.glob("config-resumed-*.json") if re.fullmatch(r"config-resumed-\d+", p.stem)]
    return max(resumed, key=lambda p: int(p.stem.rpartition("-")[2]), default=folder / "config.json")


class Meter:
    """Exact means over the masked tokens of a step, whatever the micro-batches and ranks. Names ending in _max or _min
    take the extreme instead."""

    def __init__(self):
        self.sums, self.extremes, self.notes = {}, {}, {}

    def note(self, **numbers):
        """Numbers of one update, the same on all ranks: the mean over the step's updates is logged."""
        for name, value in numbers.items():
            self.notes.setdefault(name, []).append(value)

    def add(self, stats, mask):
        """stats {name: [b, T]}, mask [b, T]."""
        for name, value in stats.items():
            value = value.detach()[mask]
            if name.endswith(("_max", "_min")):
                sign = 1 if name.endswith("_max") else -1
                best = (sign * value).max().item() if value.numel() else -math.inf
                self.extremes[name] = max(self.extremes.get(name, -math.inf), best)
            else:
                s, n = self.sums.get(name, (0.0, 0))
                self.sums[name] = s + value.double().sum().item(), n + value.numel()

    def result(self):
        out = {name: sum(values) / len(values) for name, values in self.notes.items()}
        for name, (s, n) in self.sums.items():
            s, n = gpu.total(s), gpu.total(n)
            out[name] = s / n if n else 0.0
        for name, value in self.extremes.items():
            best = gpu.maximum(value)
            out[name] = 0.0 if best == -math.inf else best if name.endswith("_max") else -best
        return out


class Run:
    """One run's folder: config.json, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoints/step-N/.
    Only rank 0 writes. `state` is what a checkpoint carries besides weights and optimizer; a script may add to it."""

    def __init__(self, script, args, config, tokenizer, context):
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.args, self.tokenizer, self.main, self.stop = args, tokenizer, gpu.rank() == 0, None
        self.name = Path(script).stem
        self.measure = "score" if getattr(args, "task", None) in games.GAMES else "accuracy"  # what the last line calls it
        self.state = dict(step=0, cursor=0, skipped=0, accuracy_before=None)
        self.queue = []  # Rollouts of this rank that wait to be trained on, for scripts that keep some
        self.extra = {}  # name -> (module, optimizer) that a script trains besides the policy
        self.bad_in_a_row, self.clock, self.times = 0, time.perf_counter(), {}
        if args.resume:
            self.dir = Path(args.resume)
        else:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            self.dir = Path(args.run_dir or models.ROOT / "runs" / f"{self.name}-{args.seed}-{stamp}")
        self.found = self._open_checkpoint() if args.resume else None
        if self.main:
            self._write_config(config)
            self._rewind(self.found[1]["step"] if self.found else -1)
            start = self.found[1]["step"] if self.found else 0
            evals = self.dir / "evals.jsonl"
            rows = evals.read_text(encoding="utf-8").splitlines() if evals.exists() else []
            self.measured_at = max((json.loads(row)["step"] for row in rows), default=-1)
            self.metrics = open(self.dir / "metrics.jsonl", "a", encoding="utf-8")
            self.samples = open(self.dir / "samples.jsonl", "a", encoding="utf-8")
            self.board = SummaryWriter(str(self.dir), purge_step=start + bool(start) if args.resume else None)
            if args.model != "tiny":
                print(gpu.explain_plan(config, args, models.count_parameters(config), context), flush=True)
            print(f"run folder {self.dir}", flush=True)
            self.bar = tqdm(total=args.steps, initial=start, desc=self.name, disable=None, dynamic_ncols=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    # ---- configuration

    def _write_config(self, config):
        import transformers

        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            metrics = self.dir / "metrics.jsonl"
            if not self.args.resume and metrics.exists() and metrics.stat().st_size:
                raise UserError(f"--run-dir {self.dir} already holds a run; continue it with --resume {self.dir}")
            record = dict(
                script=self.name, args=dataclasses.asdict(self.args), git_commit=_commit(),
                model_config=config.to_diff_dict(), world_size=gpu.world(), device=str(gpu.device()),
                versions=dict(python=sys.version.split()[0], torch=torch.__version__,
                              transformers=transformers.__version__),
            )  # fmt: skip
            name = f"config-resumed-{self.found[1]['step']}.json" if self.found else "config.json"
            (self.dir / name).write_text(json.dumps(record, indent=1, default=str) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.dir}: {error.strerror or error}") from None

    # ---- stop signals

    def _ask_to_stop(self, number, frame):
        if self.stop:  # the second time means now
            raise KeyboardInterrupt
        self.stop = number
        if self.main:
            print("\nstopping after this step (once more to stop at once)", file=sys.stderr, flush=True)

    def stopping(self, policy, optimizer):
        """True when a signal asked for a stop: then the checkpoint is written and the way to resume said."""
        if not gpu.maximum(int(bool(self.stop))):
            return False
        self.save(policy, optimizer)
        if self.main:
            self.bar.close()
            print(f"stopped after step {self.state['step']}; continue with --resume {self.dir}", flush=True)
        return True

    # ---- timing and logging

    def timed(self, stage):
        """Seconds since the last call go to `stage`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + now - self.clock
        self.clock = now

    def log(self, metrics, batch):
        """One line of metrics for the step just done, the bar, a few samples. `metrics` are plain numbers."""
        rollout_tokens, t = int(gpu.total(int(batch.mask.sum()))), self.times
        metrics["time/rollout_tokens_per_s"] = rollout_tokens / max(t.get("rollout", 0.0), 1e-9)
        metrics["time/update_tokens_per_s"] = rollout_tokens * self.args.epochs / max(t.get("update", 0.0), 1e-9)
        short = "acc" if self.measure == "accuracy" else self.measure
        self.write(metrics, rollout_tokens, dict(reward="reward", accuracy=short, length="len", entropy="H"))
        if self.main:
            self._show(batch)

    def write(self, metrics, tokens, keys):
        """The metrics of the step just done and its timing to file and TensorBoard, and to the bar those of them that
        `keys` {metric: its short name} names. `tokens`: trained on, of all ranks."""
        metrics, t = dict(metrics), self.times
        times = {k: metrics.pop(k) for k in [k for k in metrics if k.startswith("time/")]}
        metrics = dict(step=self.state["step"], **metrics, tokens=tokens, skipped_updates=self.state["skipped"])
        seconds = sum(t.values())
        metrics |= {f"time/{k}": v for k, v in t.items()} | {"time/step": seconds}
        metrics |= {"time/tokens_per_s": tokens / max(seconds, 1e-9)} | times
        self.times = {}
        if not self.main:
            return
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
        self.metrics.write(json.dumps(finite) + "\n")
        self.metrics.flush()
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name, value, metrics["step"])
        text = " ".join(f"{short} {metrics[k]:.2f}" for k, short in keys.items() if k in metrics)
        text += f" {metrics['time/tokens_per_s']:,.0f} tok/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(1)
        if self._now_and_then():
            self.bar.write(f"  step {self.state['step']:>4}  {text}")

    def _now_and_then(self):
        """Six times a run."""
        return (self.state["step"] - 1) % max(1, self.args.steps // 6) == 0

    def _show(self, batch, n=2):
        """The first prompt's completions into samples.jsonl; now and then n of them on the terminal."""
        rows = [
            dict(step=self.state["step"], prompt_id=int(batch.prompt_id[i]), completion=batch.texts[i],
                 answer=batch.answers[i], reward=batch.reward.flatten()[i].item(), truncated=bool(batch.truncated[i]))
            for i in range(min(len(batch.texts), max(n, batch.reward.shape[1])))
        ]  # fmt: skip
        self.samples.write("".join(json.dumps(r) + "\n" for r in rows))
        self.samples.flush()
        if self._now_and_then():
            for r in rows[:n]:
                sample = r["completion"]
                sample = sample if len(sample) < 300 else f"{sample[:140]} ... {sample[-140:]}"
                self.bar.write(f"             reward {r['reward']:.1f}  {sample!r}")

    def evaluated(self, accuracy, n):
        """Records a greedy evaluation on n held-out prompts."""
        if self.state["accuracy_before"] is None:
            self.state["accuracy_before"] = accuracy
        text = f"greedy {self.measure} {accuracy:.3f} on {n:,} held-out prompts"
        self.measured(dict(greedy_accuracy=accuracy, prompts=n), text)

    def measured(self, values, text):
        """Records numbers that are measured now and then, not in every step; of a step that has none yet."""
        step = self.state["step"]
        if self.main and step > self.measured_at:
            self.measured_at = step
            with open(self.dir / "evals.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(dict(step=step, **values)) + "\n")
            for name, value in values.items():
                if name != "prompts":
                    self.board.add_scalar(name, value, step)
            self.bar.write(f"  step {step:>4}  {text}")

    def start_step(self):
        """Randomness outside the rollout (stochastic rounding, dropout) is a function of (seed, step, rank), too."""
        torch.manual_seed(rollout.hash_seed(self.args.seed, self.state["step"], gpu.rank(), 11))
        self.clock, self.times = time.perf_counter(), {}

    def finite(self, *numbers):
        """Whether the update may be made. One that may not is counted; five in a row stop the run."""
        good = all(map(math.isfinite, numbers))
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        self.state["skipped"] += not good
        if self.bad_in_a_row >= 5:
            raise UserError(
                f"the loss or its gradient was not finite in 5 updates in a row (step {self.state['step'] + 1}); the "
                f"weights are those of the last finite update. Try a smaller --lr. Metrics: {self.dir / 'metrics.jsonl'}"
            )
        return good

    def finish(self, accuracy, n):
        self.evaluated(accuracy, n)
        self.end(f"greedy {self.measure} {self.state['accuracy_before']:.2f} -> {accuracy:.2f} on {n} held-out prompts")

    def end(self, sentence):
        """Closes the run with its last line."""
        if self.main:
            self.bar.close(), self.board.close(), self.metrics.close(), self.samples.close()
            print(sentence, flush=True)

    # ---- checkpoints

    def save(self, policy, optimizer):
        """Writes checkpoints/step-N atomically: a folder that transformers can load, plus state.pt. Keeps the last two."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        folder = self.dir / "checkpoints" / f"step-{self.state['step']:06d}"
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = {}
        for name, weight in gpu.full_weights(policy):  # all ranks take part, one keeps
            if self.main:
                weights[name] = weight.cpu().contiguous()
        saved = dict(state=self.state, queue=gpu.gather_objects(self.queue), adapter=whole(policy.lm, ".lora_"))
        saved["optimizer"] = get_optimizer_state_dict(policy, optimizer, options=options)
        for name, (module, own) in self.extra.items():
            saved[name] = whole(module), get_optimizer_state_dict(module, own, options=options)
        if not self.main or folder.exists():
            return
        scratch = folder.with_suffix(".tmp")
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            models.write_weights(policy.lm, weights, scratch)
            self.tokenizer.save_pretrained(scratch)
            torch.save(saved, scratch / "state.pt")
            sums = {p.name: _digest(p) for p in sorted(scratch.iterdir())}
            (scratch / "manifest.json").write_text(json.dumps(dict(model=model_key(policy.lm.config), files=sums)))
            for path in [*scratch.iterdir(), scratch]:
                handle = os.open(path, os.O_RDONLY)
                os.fsync(handle), os.close(handle)
            os.rename(scratch, folder)
        except Exception as error:  # torch, safetensors and tokenizers have errors of their own for a full disk
            shutil.rmtree(scratch, ignore_errors=True)
            reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot write the checkpoint {folder}: {reason}") from None
        for old in self._checkpoints()[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def _checkpoints(self):
        found = [p for p in (self.dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def _open_checkpoint(self):
        """The newest whole checkpoint: (folder, state, manifest)."""
        if not self._checkpoints():
            if self.main:
                print(f"{self.dir} has no checkpoint yet: starting from the first step", flush=True)
            return None
        for folder in reversed(self._checkpoints()):
            try:
                manifest = json.loads((folder / "manifest.json").read_text())
                for name, digest in manifest["files"].items():
                    if _digest(folder / name) != digest:
                        raise ValueError(f"{name} is not what was written")
                saved = torch.load(folder / "state.pt", weights_only=False, map_location="cpu")
                return folder, saved["state"], manifest, saved
            except Exception as error:
                if self.main:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    print(f"checkpoint {folder} is damaged ({reason}); using the one before it", flush=True)
        raise UserError(f"--resume {self.dir}: no whole checkpoint is left")

    def restore(self, policy, optimizer):
        """Loads weights, optimizer and state of the checkpoint found at the start, if the run is a resumed one."""
        if not self.found:
            return
        from safetensors.torch import load_file
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        folder, self.state, manifest, saved = self.found
        if manifest["model"] != model_key(policy.lm.config):
            raise UserError(f"--resume {self.dir}: the checkpoint is of another model ({manifest['model']})")
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        load_weights(policy.lm, saved["adapter"] or weights)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_optimizer_state_dict(policy, optimizer, saved["optimizer"], options=options)
        for name, (module, own) in self.extra.items():
            load_weights(module, saved[name][0])
            set_optimizer_state_dict(module, own, saved[name][1], options=options)
        if len(saved["queue"]) == gpu.world():
            self.queue = saved["queue"][gpu.rank()]
        elif saved["queue"][0]:  # another number of processes: the waiting rollouts are shared out anew
            from common.rollout import Rollout

            joined = [Rollout.join(parts) for parts in zip(*saved["queue"])]
            self.queue = [b.groups(gpu.local(torch.arange(len(b.reward)))) for b in joined]
        self.found = self.found[:3]
        if self.main:
            for newer in self._checkpoints():
                if int(newer.name[5:]) > int(folder.name[5:]):  # damaged: its step is run and saved again
                    shutil.rmtree(newer, ignore_errors=True)
            print(f"resumed from {folder}", flush=True)

    def _rewind(self, step):
        """Drops what was logged after the checkpoint: those steps are run again."""
        for name in ("metrics.jsonl", "samples.jsonl", "evals.jsonl"):
            path = self.dir / name
            if path.exists():
                kept = []
                for line in path.read_text(encoding="utf-8").splitlines():
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError:  # cut short by the kill
                        continue
                    if row["step"] <= step:
                        kept.append(line + "\n")
                scratch = path.with_suffix(".tmp")
                scratch.write_text("".join(kept), encoding="utf-8")
                os.replace(scratch, path)


def _commit():
    """The repository's commit, or None where there is no git or no repository."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=models.ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def whole(module, containing=""):
    """{name: whole tensor on the CPU} of a (possibly sharded) module's parameters. A collective."""
    return {k: gpu._full(v.detach()).cpu() for k, v in module.named_parameters() if containing in k}


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_key(config):
    """What two models must share for a checkpoint of one to fit the other."""
    return f"{config.model_type} {config.num_hidden_layers} x {config.hidden_size}, vocabulary {config.vocab_size}"


@torch.no_grad()
def load_weights(lm, weights):
    """Copies whole tensors into a (possibly sharded) model by name."""
    from torch.distributed.tensor import distribute_tensor

    own = dict(lm.named_parameters())
    for name, value in weights.items():
        target = own[name]
        if hasattr(target, "device_mesh"):
            value = distribute_tensor(value.to(gpu.device()), target.device_mesh, target.placements)
        target.copy_(value)
