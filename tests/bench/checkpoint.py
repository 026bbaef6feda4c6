"""Host memory of every process while a checkpoint is written and resumed from, on several processes of torchrun.

python -m tests.bench.checkpoint                    a random model of 60 million parameters, two processes, three repeats
What counts is anonymous memory (RssAnon): pages of files that are read can be dropped. A process's own part is its shards of
the weights and of AdamW's states; files of a model are cut at 32 MiB here, so that several are written. Growth is over what
the process held just before (`start`, loading and sharding the model: over what its imports take), the states that resuming
makes apart.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

from tests.bench.worker import Work, make_model

ROOT = Path(__file__).resolve().parents[2]
FILE = 32 * 2**20
GOAL = 0.3  # of a process's own part, and one file of the model: what saving and resuming may add


@dataclass
class Options:
    size: str = "60M"
    """of tests/bench/worker.py"""
    processes: int = 2
    repeats: int = 3
    folder: str | None = None
    """what the command sets in the processes that it starts"""
    out: str | None = None
    """a .json file for the result"""


def anonymous():
    """Bytes of this process that no file stands behind."""
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) * 1024


def grown(call):
    """-> (most bytes above those at the start while call() ran, by a look every 2 ms, its seconds, what it gave)."""
    start, most, over = anonymous(), [0], threading.Event()

    def look():
        while not over.wait(0.002):
            most[0] = max(most[0], anonymous() - start)

    thread = threading.Thread(target=look)
    thread.start()
    began = time.perf_counter()
    try:
        out = call()
    finally:
        seconds = time.perf_counter() - began
        over.set()
        thread.join()
    return max(most[0], anonymous() - start), seconds, out


def everything(policy, optimizer):
    """This process's own part: {name, name.state: tensor}."""
    names = {p: name for name, p in policy.named_parameters()}
    found = {name: p.detach() for p, name in names.items()}
    found |= {f"{names[p]}.{key}": x for p, of in optimizer.state.items() for key, x in of.items()}
    return {name: x.to_local() if hasattr(x, "to_local") else x for name, x in found.items()}


def worker(options):
    """One process: the model, an update of its optimizer, a checkpoint; then all anew from it."""
    from common import checkpoint, export, gpu, models

    export.FILE = FILE
    args = SimpleNamespace(model=f"{options.folder}/model", dtype="float32", lora_rank=0, gradient_checkpointing=False, seed=1,
                           lr=1e-3, weight_decay=0.0, optimizer="adamw", resume=None)  # fmt: skip
    gpu.init(args)
    tokenizer = models.load_tokenizer(args)
    run = SimpleNamespace(dir=Path(options.folder) / "run", main=gpu.rank() == 0, tokenizer=tokenizer, args=args, queue=[],
                          state=dict(step=1), extra={}, schedules=[])  # fmt: skip

    def start():
        policy = gpu.shard(models.load(args, gpu.device()))
        return policy, gpu.make_optimizer(policy, args)

    found = {}
    found["start"], found["start, s"], (policy, optimizer) = grown(start)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    found["part"] = sum(x.nbytes for x in everything(policy, optimizer).values())
    found["save"], found["save, s"], _ = grown(lambda: checkpoint.save(run, policy, optimizer))
    gpu.gather_objects(None)
    before = everything(policy, optimizer)
    policy, optimizer = start()
    found["resume"], found["resume, s"], _ = grown(lambda: checkpoint.restore(run, checkpoint.find(run), policy, optimizer))
    again = everything(policy, optimizer)
    found["resume"] -= sum(x.nbytes for name, x in again.items() if name not in dict(policy.named_parameters()))
    assert before.keys() == again.keys() and all(torch.equal(x, again[k]) for k, x in before.items())
    every = gpu.gather_objects(found)
    if run.main:
        print(json.dumps(every), flush=True)
    gpu.finish()


def main(options):
    if options.folder:
        return worker(options)
    rows = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            os.mkdir(f"{folder}/model")
            make_model(Work(size=options.size), f"{folder}/model")
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
            command = [*start, "-m", "tests.bench.checkpoint", "--folder", folder]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            rows += json.loads(done.stdout.strip().splitlines()[-1])
    part = statistics.median(r["part"] for r in rows)
    own, file = part / 2**20, FILE / 2**20
    print(f"{options.size}, {options.processes} processes: a process's own part {own:.0f} MiB, a file {file:.0f} MiB")
    for what in ("start", "save", "resume"):
        most = [r[what] for r in rows]
        times = [r[f"{what}, s"] for r in rows]
        verdict = "" if what == "start" else f"; {'met' if max(most) <= GOAL * part + FILE else 'MISSED'}"
        print(f"{what}: {statistics.median(most) / 2**20:.0f} MiB more ({min(most) / 2**20:.0f} to {max(most) / 2**20:.0f}), "
              f"{statistics.median(times):.2f} s{verdict}")  # fmt: skip
    if options.out:
        command = "python -m tests.bench.checkpoint " + " ".join(sys.argv[1:])
        record = dict(command=command.strip(), torch=torch.__version__, file=FILE, settings=vars(options), rows=rows)
        Path(options.out).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
