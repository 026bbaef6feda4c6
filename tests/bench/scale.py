"""One and two processes of torchrun on the same machine, each with one core and the same work: tokens/s of a process.

python -m tests.bench.scale                      five pairs, A B A B; a random model of 10 million parameters
With FSDP2 over gloo every layer's weights are gathered, and its gradients summed, over the machine's memory: this measures that
the path works and what it costs here. What links a GPU has is another matter: tests/bench/plan.py.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from tests.bench.worker import MOST, Work, make_model

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    size: str = "10M"
    """of tests/bench/worker.py"""
    prompts: int = 4
    """per process and rollout"""
    pairs: int = 5
    out: str | None = None
    """a .json file for the result"""


def run(model, task, processes, options):
    """-> rows of metrics.jsonl without the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "taskset", "-c", ",".join(map(str, range(processes))),
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            "algos/grpo.py", "--model", model, "--task", task, "--prompt-template", "{prompt}", "--steps", "3",
            "--prompts-per-step", str(options.prompts * processes), "--group-size", "8", "--minibatches", "2", "--lr", "1e-6",
            "--max-new-tokens", str(MOST // 2), "--eval-every", "0", "--eval-prompts", "2", "--checkpoint-every", "0",
            "--dtype", "float32", "--optimizer", "adamw", "--gradient-checkpointing", "False", "--engine", "hf",
            "--micro-batch-tokens", "1280", "--run-dir", f"{folder}/run",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")][1:]


def main(options):
    found = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        prompts, _ = make_model(Work(size=options.size, prompts=64), folder)
        rows = [json.dumps(dict(prompt=p, answer="0")) for p in prompts]
        Path(folder, "train.jsonl").write_text("\n".join(rows[:-8]) + "\n")
        Path(folder, "test.jsonl").write_text("\n".join(rows[-8:]) + "\n")
        for _ in range(options.pairs):
            for processes, results in found.items():
                steps = run(folder, f"{folder}/train.jsonl", processes, options)
                total = {k: sum(r[k] for r in steps) for k in ("tokens", "time/rollout", "time/update", "time/step")}
                each = total["tokens"] / processes
                results.append({k: each / total[f"time/{k}"] for k in ("rollout", "update", "step")})
                said = ", ".join(f"{k} {v:,.0f}" for k, v in results[-1].items())
                print(f"{processes} process{'es' * (processes > 1)}: tokens/s of each: {said}", flush=True)
    ratio = {k: [b[k] / a[k] for a, b in zip(found[1], found[2])] for k in ("rollout", "update", "step")}
    for k, v in ratio.items():
        print(f"{k}: a process of two does {statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f}) of one alone")
    if options.out:
        command = "python -m tests.bench.scale " + " ".join(sys.argv[1:])
        record = dict(command=command.strip(), torch=torch.__version__, settings=vars(options), found=found, ratio=ratio)
        Path(options.out).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
