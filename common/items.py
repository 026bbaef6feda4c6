"""Runs of scripts that train no policy: a folder with a line per item, results, a picture. Killed, they go on by items."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

from common import ROOT, UserError, checkpoint, figures, gpu, memory, models, runlog
from common.worlds import tiny


class Items(runlog.Run):
    """The run folder of such a script: config.json, a .jsonl file with a line per item, results.json, picture.png. All that is
    random has to be a function of (seed, item), so that the state of a run is the number of its lines: what was killed and
    resumed has the bytes of what was not. One process: items are independent, so two machines take two seeds."""

    def __init__(self, script, args, config=None):
        if gpu.world() > 1:
            raise UserError(f"{Path(script).stem}.py runs in one process: start it once for each GPU, with a --seed of its own")
        self.args, self.name, self.main, self.stop, self.found = args, Path(script).stem, True, None, args.resume
        stamp = time.strftime("%Y%m%d-%H%M%S")
        self.dir = Path(args.resume or args.run_dir or ROOT / "runs" / f"{self.name}-{args.seed}-{stamp}")
        before = self.dir / "items.jsonl"
        told = json.loads((self.dir / "config.json").read_text())["args"] if args.resume else vars(args)
        if told.get("model") != vars(args).get("model"):  # there are no weights in the folder: the lines are the model's
            raise UserError(f"--resume {args.resume}: --model is {told['model']} there, not {args.model}")
        if not args.resume and any(self.dir.glob("*.jsonl")):
            raise UserError(f"--run-dir {self.dir} already holds a run; continue it with --resume {self.dir}")
        self._write_config(config, before.read_bytes().count(b"\n") if before.exists() else 0)
        if config is not None and args.model not in tiny.SHAPES:
            size = models.architecture(args)[1]
            print(memory.explain_plan(config, args, size, 0, trained=0, frozen=1), flush=True)
        print(f"run folder {self.dir}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    def left(self, n, batch=None, name="items"):
        """The numbers from 0 to n - 1 that <name>.jsonl has no line for, each the one to be measured next; with `batch` lists
        of so many. Ends the process where it was asked to stop."""
        from tqdm import tqdm

        path = self.dir / f"{name}.jsonl"
        size = batch or 1
        done = _whole_lines(path, size, n)
        with open(path, "a", 1, encoding="utf-8") as self.file, tqdm(
            total=n, initial=done, desc=f"{self.name}: {name}", disable=None, leave=False
        ) as bar:
            for first in range(done, n, size):
                some = list(range(first, min(n, first + size)))
                yield some if batch else first
                bar.update(len(some))
                if self.stop:
                    print(f"stopped after item {some[-1] + 1} of {n}; continue with --resume {self.dir}", flush=True)
                    raise SystemExit(0)

    def write(self, *rows):
        """A line for each item that left() asked for, in its order: plain numbers, strings, lists; None for what is not there.
        ValueError for NaN and infinity, which JSON has not."""
        self.file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        self.file.flush()

    def rows(self, name="items"):
        """What the file has, a dict a line: the same after a resume."""
        return checkpoint.rows(self.dir / f"{name}.jsonl")

    def kept(self, name, module, fit):
        """A small module that fit() trains, once: what it learnt lies in checkpoints/<name>.safetensors, and is read from there
        where it does."""
        from safetensors.torch import load_file, save_file

        path = self.dir / "checkpoints" / f"{name}.safetensors"
        if path.exists():
            module.load_state_dict(load_file(path))
            return module
        fit()
        path.parent.mkdir(exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
        return module

    def finish(self, results, sentence):
        """Writes results.json (see figures.publish) and picture.png, prints the table, and `sentence` as the last line."""
        figures.publish(self.dir, results)
        print(sentence, flush=True)


def _whole_lines(path, batch, n):
    """Cuts a file behind its last whole batch of lines -> their number. A batch that was half written is measured again."""
    text = path.read_bytes() if path.exists() else b""
    lines = text.split(b"\n")[:-1]
    kept = n if len(lines) >= n else len(lines) // batch * batch
    with contextlib.suppress(FileNotFoundError):
        os.truncate(path, sum(len(line) + 1 for line in lines[:kept]))
    return kept
