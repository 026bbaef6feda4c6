"""Rewards: checks of completions, run in worker processes that are killed at a deadline."""

import contextlib
import functools
import inspect
import json
import math
import pickle
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, connection, spawn
from pathlib import Path

from common import ROOT, UserError, reason
from common.answers import extract

START_S = 60.0  # seconds in which a worker must have imported its check
MEMORY = 2 << 30  # bytes of address space that a check may take on top of what the imports took (Linux)


class Own:
    """The check of --reward file.py:function, called with (text, answer) in worker processes like every other: a finite score,
    or (the answer that was read, score). What it raises is shown once per worker and scores 0. UserError where it cannot be
    loaded."""

    trusted = True  # its scores may be any finite numbers

    def __init__(self, spec):
        self.path, _, self.name = spec.rpartition(":")
        try:
            inspect.signature(_function(self.path, self.name)).bind("text", "answer")
        except (Exception, SystemExit) as error:
            why = f"no function {self.name}" if isinstance(error, KeyError) else reason(error)
            raise UserError(f"--reward {spec}: needs file.py:function ({why})") from None

    def __call__(self, text, answer):
        try:
            found = _function(self.path, self.name)(text, answer)
            found = found if isinstance(found, tuple) else (extract(text), found)
            read, score = found
            if not abs(float(score)) < 1e30:
                raise ValueError(f"{score} is no finite number")
            return read, float(score)
        except Exception as error:
            if not vars(self).get("told"):
                print(f"note: --reward {self.path}:{self.name} raised {error!r}; that scores 0", file=sys.stderr, flush=True)
            self.told = True
            raise

    def warm_up(self):
        _function(self.path, self.name)


@functools.cache
def _function(path, name):
    sys.path.append(str(Path(path).parent.resolve()))  # for what the file imports
    return runpy.run_path(path)[name]


def _guarded(check, text, answer, trusted=False):
    """(extracted or None, score in 0..1, of a trusted check any finite one); whatever the check raises: (None, 0.0). Of several
    answers the best counts."""
    if not isinstance(answer, str):
        return max((_guarded(check, text, one, trusted) for one in answer), key=lambda found: found[1])
    try:
        extracted, score = check(text, answer)
        fine = math.isfinite(score) if trusted else 0 <= score <= 1
        return extracted if extracted is None else str(extracted), float(score) if fine else 0.0
    except Exception:
        return None, 0.0


def _work(handle):
    """The life of a worker. JSON in and out, so that the parent unpickles nothing. It ends when the parent does: at
    the end of the pipe or, inside a check that hangs, by the alarm, whose default action is to kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = connection.Connection(handle)
    with contextlib.suppress(EOFError, ConnectionError):
        timeout_s, setup, check = pickle.loads(pipe.recv_bytes())
        spawn.prepare(setup)
        check = pickle.loads(check)
        getattr(check, "warm_up", bool)()
        with contextlib.suppress(ImportError, OSError, ValueError):  # macOS has no /proc: there the deadline must do
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send_bytes(b"ready")
        while True:
            text, answer = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
            result = _guarded(check, text, answer, getattr(check, "trusted", False))
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(json.dumps(result).encode())


class Scorer:
    """Runs `check(text, answer) -> (extracted, score in 0..1)` over batches, in `workers` processes that live on. A check that
    takes over `timeout_s` seconds, or crashes its process, scores 0 and counts in `timeouts`; the process is replaced. A
    function `check.warm_up` runs at a worker's start, off the clock. inline: trusted, fast checks, here, of any score."""

    def __init__(self, check, timeout_s=5.0, workers=2, inline=False):
        self.check, self.timeout_s, self.workers, self.inline = check, timeout_s, workers, inline
        self.timeouts, self.idle = 0, []  # idle: (Popen, pipe) of every worker that waits for work

    def __call__(self, texts, answers):
        """Extracted answers and scores, in order; equal pairs are checked once. RuntimeError where no worker starts."""
        pairs = list(zip(texts, answers, strict=True))
        todo = list(dict.fromkeys(pairs))
        if self.inline:
            results = dict(zip(todo, [_guarded(self.check, *pair, trusted=True) for pair in todo], strict=True))
        else:
            with ThreadPoolExecutor(self.workers) as threads:  # each of them waits for one worker at a time
                results = dict(zip(todo, threads.map(self._in_worker, todo), strict=True))
            self.timeouts += sum(result is None for result in results.values())
        done = [results[pair] or (None, 0.0) for pair in pairs]
        return [extracted for extracted, _ in done], [score for _, score in done]

    def _in_worker(self, pair):
        """(extracted, score), or None where the worker had to be killed or died."""
        try:
            process, pipe = self.idle.pop()
        except IndexError:
            process, pipe = self._start()
        if process.poll() is not None:  # died between two checks, which is not this pair's fault
            pipe.close()
            process, pipe = self._start()
        with contextlib.suppress(EOFError, OSError):
            pipe.send_bytes(json.dumps(pair).encode())
            if pipe.poll(self.timeout_s):
                result = json.loads(pipe.recv_bytes())
                self.idle.append((process, pipe))
                return result
        self._kill(process, pipe)
        return None

    def _start(self):
        """A bare interpreter: a multiprocessing.Process would import the training script, and torch with it, anew."""
        pipe, theirs = Pipe()
        handle = theirs.fileno()
        boot = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.rewards import _work; _work({handle})"
        process = subprocess.Popen([sys.executable, "-P", "-c", boot], pass_fds=[handle], stdin=subprocess.DEVNULL)
        theirs.close()
        setup, check = {"sys_path": sys.path}, pickle.dumps(self.check)
        if b"__main__" in check:
            main = sys.modules["__main__"]
            setup |= {"init_main_from_name": main.__spec__.name} if main.__spec__ else {"init_main_from_path": main.__file__}
        with contextlib.suppress(EOFError, OSError):
            pipe.send_bytes(pickle.dumps((self.timeout_s, setup, check)))
            if pipe.poll(START_S) and pipe.recv_bytes() == b"ready":
                return process, pipe
        self._kill(process, pipe)
        raise RuntimeError(f"a worker process for {self.check} did not start within {START_S:.0f} s; see above")

    def _kill(self, process, pipe):
        process.kill()
        pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # nothing survives SIGKILL: this only collects the exit status

    def close(self):
        """Kills the workers. A later call starts new ones."""
        while self.idle:
            self._kill(*self.idle.pop())
