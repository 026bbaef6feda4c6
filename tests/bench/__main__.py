"""This repository's GRPO against TRL's, on the same work, model and machine: speed, memory, and distance from the limit.

python -m tests.bench                                       all CPU sizes, five pairs: about an hour on two idle cores
python -m tests.bench --sizes 230k --pairs 2                a quick look
python -m tests.bench --sizes qwen2.5-0.5b qwen2.5-1.5b --dtype bfloat16 --prompts 64      on a GPU
An environment of its own with trl 1.16.0 beside the pinned torch and transformers is made once under runs/cache/bench; both
sides run in it, one process at a time, A B A B. What the work is: tests/bench/worker.py. A pair's number is its seed: both of
its sides have the same prompts and completion lengths. Ratios are ours to TRL's (of bytes TRL's to ours, so that more is better
everywhere), one for every pair; median, least and greatest are printed.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
TRL = "trl==1.16.0"
CPU_SIZES = ("230k", "10M", "60M", "15M-vocabulary", "60M-vocabulary")
# What a size's ratio may not fall below, as far as it is a goal: update, whole step, peak memory.
GOALS = dict(update_tokens_per_s=2.0, step=2.5, peak=2.0)


@dataclass
class Options:
    sizes: tuple[str, ...] = CPU_SIZES
    """of tests/bench/worker.py"""
    pairs: int = 5
    """runs of each side, in turn"""
    prompts: int = 0
    """per rollout; 0: 8 for 230k, 4 for 10M, else 2"""
    rollouts: int = 0
    """that are measured in a run, after one that is not; 0: 8 for 230k, whose steps take a second, else 2"""
    dtype: str = "float32"
    profile: bool = False
    """instead of comparing: where the time of one of our updates goes, by operation"""
    out: str | None = None
    """table (.md) and numbers (.json), or profile (.txt), without ending"""


def environment():
    """The interpreter of the environment with TRL."""
    folder = ROOT / "runs" / "cache" / "bench"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making {folder} (once)", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", ROOT / "requirements.txt", TRL], check=True)
        (folder / "ready").touch()
    return str(python)


def run(python, side, size, options, work):
    """`work`: fields of worker.Work beside those of the options."""
    argv = [python, "-m", "tests.bench.worker", "--side", side, "--size", size, "--dtype", options.dtype]
    argv += [x for name, value in work.items() for x in (f"--{name}", str(value))]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE="1"))
    if done.returncode:
        sys.exit(f"{side} failed on {size}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(ours, trl):
    """One per pair, more is better."""
    memory = "gpu_peak" if ours[0]["gpu_peak"] else "peak"
    out = {k: [a[k] / b[k] for a, b in zip(ours, trl)] for k in ("rollout_tokens_per_s", "update_tokens_per_s")}
    out["step"] = [a["step_tokens_per_s"] / b["step_tokens_per_s"] for a, b in zip(ours, trl)]
    out["peak"] = [b[memory] / a[memory] for a, b in zip(ours, trl)]
    return out


def band(values, form="{:.2f}"):
    return f"{form} ({form} to {form})".format(statistics.median(values), min(values), max(values))


def table(results):
    """Markdown: the ratios, then the numbers themselves."""
    rows = ["| model | rollout tokens/s | update tokens/s | whole step | peak memory |", "|---|---|---|---|---|"]
    for size, found in results.items():
        r = found["ratios"]
        cells = [band(r[k]) for k in ("rollout_tokens_per_s", "update_tokens_per_s", "step", "peak")]
        rows.append(f"| {size} | " + " | ".join(cells) + " |")
    heads = ["model", "side", "rollout tokens/s", "update tokens/s", "step tokens/s", "rollout, scoring, update", "GiB", "6 N"]
    rows += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for size, found in results.items():
        for side in ("ours", "trl"):
            runs = found[side]
            at = {k: statistics.median(r[k] for r in runs) for k in runs[0] if k.endswith(("per_s", "share")) and k != "share"}
            share = [statistics.median(r["share"][k] for r in runs) for k in ("rollout", "scoring", "update")]
            peak = statistics.median(r["gpu_peak"] or r["peak"] for r in runs) / 2**30
            rates = [f"{at[f'{k}_tokens_per_s']:,.0f}" for k in ("rollout", "update", "step")]
            cells = [size, side, *rates, ", ".join(f"{s:.0%}" for s in share), f"{peak:.2f}", f"{at['update_flops_share']:.0%}"]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(options):
    python = environment()
    if options.profile:
        argv = [python, "-m", "tests.bench.worker", "--size", options.sizes[0], "--dtype", options.dtype, "--profile"]
        text = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        print(text)
        if options.out:
            command = "python -m tests.bench " + " ".join(sys.argv[1:])
            Path(options.out).with_suffix(".txt").write_text(f"{command} on {processor()}, {os.cpu_count()} cores\n\n{text}")
        return
    results = {}
    for size in options.sizes:
        prompts = options.prompts or {"230k": 8, "10M": 4}.get(size, 2)
        rollouts = 1 + (options.rollouts or {"230k": 8}.get(size, 2))
        sides = dict(ours=[], trl=[])
        for pair in range(options.pairs):
            for side, runs in sides.items():
                runs.append(run(python, side, size, options, dict(prompts=prompts, rollouts=rollouts, seed=pair + 1)))
                r = runs[-1]
                rates = ", ".join(f"{k} {r[f'{k}_tokens_per_s']:,.0f}" for k in ("rollout", "update", "step"))
                more = f"{r['length']:.0f} tokens a completion, peak {r['peak'] / 2**30:.2f} GiB"
                print(f"{size} {pair + 1}/{options.pairs} {side}: tokens/s {rates}; {more}; matmul {r['matmul'] / 1e9:,.0f} "
                      "GFLOP/s", flush=True)  # fmt: skip
        results[size] = dict(sides, ratios=ratios(**sides))
    text = table(results)
    print(text)
    for size, found in results.items():
        for name, goal in GOALS.items():
            if name != "peak" or "vocabulary" in size:
                got = statistics.median(found["ratios"][name])
                print(f"{size}: {name} {got:.2f}, goal {goal}: {'reached' if got >= goal else 'missed'}")
    if options.out:
        command = "python -m tests.bench " + " ".join(sys.argv[1:])
        ask = "from importlib.metadata import version as v; print(*map(v, ('torch', 'transformers', 'trl')))\n"
        ask += "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
        versions, device = subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.splitlines()
        versions, device = versions.split(), device or f"{processor()}, {os.cpu_count()} cores"
        record = dict(command=command, device=device, results=results,
                      versions=dict(zip(("torch", "transformers", "trl"), versions)))  # fmt: skip
        out = Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(record) + "\n")
        out.with_suffix(".md").write_text(f"`{command.strip()}` on {device}\n\n{text}\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
