"""Scripts run as a user runs them, and quickly: forked from a process that has already imported what takes seconds.

A child has its own memory, working folder, environment and signal handlers, one core (so that two runs add up their
numbers in the same order), and ends with the exit code and the bytes on stdout and stderr that `python script.py ...`
has. Only what others wrote is imported beforehand: the code under test is imported anew in every child."""

import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
GRPO = ROOT / "algos" / "grpo.py"
# One core for the children of this process; pytest-xdist's workers (gw0, gw1, ...) have different ones.
CORES = sorted(os.sched_getaffinity(0), reverse=True)
CORE = {CORES[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % len(CORES)]}
LIMIT = 240  # seconds that one child may take: with a warm start in it, on a busy machine
PRELOAD = """pytest torch torch.utils.tensorboard torch.distributed.tensor torch.distributed.checkpoint tqdm tyro
    filelock safetensors.torch transformers transformers.generation transformers.modeling_utils
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.qwen2.modeling_qwen2""".split()
# What makes a run small. 6 steps of 2 updates, checkpoints at 2, 4 and 6 of which 4 and 6 stay.
SMALL = """--steps 6 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 32 --checkpoint-every 2
    --eval-every 3 --task addition""".split()

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _quietly():
    """Starts the process that forks: what its imports say on stderr is not a child's word."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    os.dup2(null, 2)
    try:
        forkserver.ensure_running()
    finally:
        os.dup2(saved, 2)
        os.close(saved), os.close(null)


def _life(target, out, err, cwd, env):
    """What a child does."""
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        stream.flush()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, stream.fileno())
        os.close(handle)
    os.sched_setaffinity(0, CORE)
    os.chdir(cwd)
    os.environ.update(env)
    target()


class Script:
    """`python <script> <argv>`; `before()` is called first, in the child (it must be a function of a module)."""

    def __init__(self, script, argv, before=None):
        self.script, self.argv, self.before = str(script), [str(a) for a in argv], before

    def __call__(self):
        sys.path[:0] = [str(Path(self.script).parent), str(ROOT)]
        if self.before:
            self.before()
        sys.argv = [self.script, *self.argv]
        runpy.run_path(self.script, run_name="__main__")


class Child:
    """A running child: pid, and wait() -> exit code (negative: the signal that ended it), out, err, seconds."""

    def __init__(self, target, folder, cwd=None, env=None):
        folder = Path(folder)
        stem = f"child-{len(list(folder.glob('child-*.out')))}"
        self.out, self.err = folder / f"{stem}.out", folder / f"{stem}.err"
        self.out.touch()
        _quietly()
        self.started = time.monotonic()
        self.process = _context.Process(
            target=_life, args=(target, self.out, self.err, str(cwd or folder), dict(env or {})), daemon=True
        )
        self.process.start()
        self.pid = self.process.pid

    def alive(self):
        return self.process.is_alive()

    def until(self, condition, seconds=LIMIT):
        """Waits, closely, until condition() is true; False where the child ends or the time is up before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if not self.alive():
                return bool(condition())
            time.sleep(0.0005)
        return False

    def wait(self, seconds=LIMIT):
        self.process.join(seconds)
        if self.alive():
            self.process.kill()
            self.process.join()
            pytest.fail(f"a child took over {seconds} s\n{self.out.read_text()}\n{self.err.read_text()}")
        return SimpleNamespace(
            code=self.process.exitcode, out=self.out.read_text(), err=self.err.read_text(),
            seconds=time.monotonic() - self.started,
        )  # fmt: skip


def start(folder, *argv, script=GRPO, before=None, cwd=None, env=None):
    return Child(Script(script, argv, before), folder, cwd, env)


def run(folder, *argv, seconds=LIMIT, **kwargs):
    """The script to its end -> code, out, err, seconds."""
    return start(folder, *argv, **kwargs).wait(seconds)


def user_error(result):
    """The message of a run that must have ended as every mistake of the user's does: exit code 2, one line, no traceback."""
    assert "Traceback" not in result.err, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert result.code == 2, (result.code, result.err)
    return lines[0].removeprefix("error: ")


def lines(path):
    """Rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def logged(folder):
    """Steps whose rows are whole in a folder's metrics.jsonl, also while it is being written: a reader may see half a line."""
    path = Path(folder) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def outcome(folder):
    """What must be the same for the same seed: metrics (without times), evaluations, samples as text, and the bytes of the
    final weights."""
    from common import checkpoint

    folder = Path(folder)
    rows = lines(folder / "metrics.jsonl")
    metrics = [json.dumps({k: v for k, v in row.items() if not k.startswith("time/")}) for row in rows]
    last = checkpoints(folder)[-1]
    path = last / "model.safetensors"
    weights = path.read_bytes() if path.exists() else checkpoint.weights(last)
    return SimpleNamespace(
        metrics=metrics, evals=(folder / "evals.jsonl").read_text(), samples=(folder / "samples.jsonl").read_text(),
        last=last.name, weights=weights if path.exists() else {k: v.tolist() for k, v in weights.items()},
    )  # fmt: skip


def contents(folder):
    """All that a checkpoint's state/ holds: state, schedules, queue (of every process), own {name: weight}, optimizer {name of
    a weight: its states}, and of what is trained besides (its weights, its optimizer's states) by its name."""
    from common import checkpoint

    found = dict(queue={}, own={}, optimizer={})
    for entry, x in checkpoint.read(Path(folder), "").items():
        title, _, rest = entry.partition(".")
        kind, _, name = rest.partition(".")
        weights, states = (found["own"], found["optimizer"]) if title == "policy" else (None, None)
        if kind in ("weights", "optimizer") and title != "policy":
            weights, states = found.setdefault(title, ({}, {}))
        if kind == "weights":
            weights[name] = x
        elif kind == "optimizer":
            weight, _, key = name.rpartition(".")
            states.setdefault(weight, {})[key] = x
        elif title == "queue":
            found["queue"][int(kind)] = x
        else:
            found[title] = x
    return found


def killed(folder, copy, last):
    """A copy of a finished run as it would be if it had been killed behind step `last`, whose checkpoint it still has."""
    shutil.copytree(folder, copy)
    for place in checkpoints(copy):
        if int(place.name.removeprefix("step-")) > last:
            shutil.rmtree(place)
    assert checkpoints(copy)[-1].name == f"step-{last:06d}"


def same(a, b):
    """Asserts that two outcomes are the same, bit for bit."""
    assert a.metrics == b.metrics
    assert a.evals == b.evals
    assert a.samples == b.samples
    assert a.last == b.last
    assert a.weights == b.weights


def checkpoints(folder):
    return sorted(p for p in (Path(folder) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))


def die_at(function, argument, after=False):
    """Makes this process kill itself at the call of `function` (module.name) that has `argument` among its arguments."""
    module, name = function.rsplit(".", 1)
    module = importlib.import_module(module)
    real = getattr(module, name)

    def deadly(*args, **kwargs):
        here = argument in str(args)
        result = real(*args, **kwargs) if after or not here else None
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


@pytest.fixture(scope="session")
def tiny():
    """Folder of the warm-started tiny model (made now, where it is not cached): a model folder like any other."""
    from common import tasks
    from common.worlds import tiny

    return tiny.warm_start(tasks.load("addition"))
