"""The head alone: log-probs and entropy of N tokens, forward and backward, against the plain way; time and extra memory.

python -m tests.bench.head                                   8,192 tokens, vocabulary 151,936, width 896: needs 20 GiB
python -m tests.bench.head --tokens 1024
Every way runs in processes of its own, in turn, so that the peak of the resident memory is its own.
"""

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    tokens: int = 8192
    vocabulary: int = 151936
    width: int = 896
    pairs: int = 5
    """repeats of each way, in turn"""
    dtype: str = "float32"
    way: str | None = None
    """one way in this process: plain or chunked (what the command starts by itself)"""
    out: str | None = None
    """a .json file for the result"""


def plain(hidden, weight, targets):
    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), entropy


def measure(options):
    """-> seconds and peak bytes above the inputs' (gradients included in both) of one forward and backward pass."""
    from common.policy import HeadLogp

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    g = torch.Generator(device).manual_seed(0)
    settings = dict(generator=g, device=device, dtype=getattr(torch, options.dtype))
    hidden = torch.randn(options.tokens, options.width, **settings).requires_grad_()
    weight = (torch.randn(options.vocabulary, options.width, **settings) / options.width**0.5).requires_grad_()
    targets = torch.randint(options.vocabulary, (options.tokens,), generator=g, device=device)
    way = dict(plain=plain, chunked=HeadLogp.apply)[options.way]
    logp, _ = way(hidden[:16], weight, targets[:16])  # warms up the libraries
    logp.sum().backward()
    hidden.grad = weight.grad = None
    watch = Watch(device)
    start = time.perf_counter()
    logp, entropy = way(hidden, weight, targets)
    logp.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return dict(seconds=seconds, bytes=watch.peak(), check=[logp.sum().item(), entropy.sum().item()])


class Watch:
    """Peak memory above what is resident now: of the GPU's allocator, or sampled from /proc every 5 ms."""

    def __init__(self, device):
        self.cuda, self.most, self.stop = device.type == "cuda", 0, False
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = resident()
            self.thread = threading.Thread(target=self.look, daemon=True)
            self.thread.start()

    def look(self):
        while not self.stop:
            self.most = max(self.most, resident())
            time.sleep(0.005)

    def peak(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.start
        self.stop = True
        self.thread.join()
        return max(self.most, resident()) - self.start


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(options):
    if options.way:
        print(json.dumps(measure(options)))
        return
    found = dict(plain=[], chunked=[])
    for _ in range(options.pairs):
        for way, results in found.items():
            argv = [f"--{k}={getattr(options, k)}" for k in ("tokens", "vocabulary", "width", "dtype")]
            command = [sys.executable, "-m", "tests.bench.head", *argv, "--way", way]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    ratio = {k: [c[k] / p[k] for p, c in zip(found["plain"], found["chunked"])] for k in ("seconds", "bytes")}
    for k, v in ratio.items():
        print(f"{k}: chunked / plain {statistics.median(v):.3f} (least {min(v):.3f}, greatest {max(v):.3f})")
    for way, results in found.items():
        print(f"{way}: {statistics.median(r['seconds'] for r in results):.2f} s, "
              f"{statistics.median(r['bytes'] for r in results) / 2**30:.2f} GiB above the inputs")  # fmt: skip
    if options.out:
        command = "python -m tests.bench.head " + " ".join(sys.argv[1:])
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        record = dict(command=command, device=device, torch=torch.__version__, settings=vars(options), found=found, ratio=ratio)
        Path(options.out).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
