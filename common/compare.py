"""Several scripts over several seeds, side by side: one picture, one table.

python -m common.compare grpo sapo --seeds 3                        runs/compare/grpo-sapo.{png,json}
python -m common.compare grpo sapo --seeds 3 --out runs/reference/x -- --steps 60 --lr 3e-4
What follows -- goes to every script. A run that is there and finished is not made again.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError

ROOT = Path(__file__).resolve().parents[1]
PANELS = dict(accuracy="sampled accuracy", length="completion length, tokens", entropy="entropy, nats",
              approx_kl="KL(rollout policy, policy), nats")  # fmt: skip


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]]
    """names of scripts in algos/"""
    seeds: int = 3
    """seeds 1 to this"""
    jobs: int = 1
    """runs at a time, each on its own share of the cores"""
    out: str | None = None
    """picture and table without ending; None: runs/compare/<scripts>"""


def run(script, seed, extra, core):
    """One run in a process of its own -> its folder. `core`: the CPU cores it may use, or None for all."""
    name = "-".join([script, str(seed), *[a.lstrip("-").replace("/", "_") for a in extra]])
    folder = ROOT / "runs" / "compare" / name
    if not (folder / "done").exists():
        if folder.exists():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        command = [sys.executable, f"algos/{script}.py", "--seed", str(seed), *extra, "--run-dir", str(folder)]
        pin = (lambda: os.sched_setaffinity(0, core)) if core else None
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=pin)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{script}.py with seed {seed} failed: {last}")
        (folder / "done").write_text(done.stdout.strip().splitlines()[-1] + "\n")
    print(f"{name}: {(folder / 'done').read_text().strip()}", flush=True)
    return folder


def read(folder):
    """-> (rows of metrics.jsonl, greedy accuracy before, after)."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    rows = [{k: float("nan") if v is None else v for k, v in row.items()} for row in rows]  # what was not finite
    words = (folder / "done").read_text().split()
    return rows, float(words[2]), float(words[4])


def summarise(runs):
    """Mean, least and greatest over seeds of what the table shows. `runs`: what read() gives, one per seed."""
    first = [next((r["step"] for r in rows if r["accuracy"] >= 0.7), None) for rows, _, _ in runs]
    values = {
        "greedy accuracy before": [before for _, before, _ in runs],
        "greedy accuracy after": [after for _, _, after in runs],
        "sampled accuracy, last 10 steps": [statistics.mean(r["accuracy"] for r in rows[-10:]) for rows, _, _ in runs],
        "sampled accuracy, mean of all steps": [statistics.mean(r["accuracy"] for r in rows) for rows, _, _ in runs],
        "entropy, last 10 steps": [statistics.mean(r["entropy"] for r in rows[-10:]) for rows, _, _ in runs],
        "greatest KL in a step": [max(r["approx_kl"] for r in rows) for rows, _, _ in runs],
    }
    out = {k: dict(mean=statistics.mean(v), min=min(v), max=max(v), seeds=v) for k, v in values.items()}
    out["first step with sampled accuracy 0.7"] = dict(seeds=first)
    return out


def draw(results, path):
    """One panel per metric: the mean over seeds, and the band from the least to the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = [(c, s) for s in ("-", "--") for c in plt.get_cmap("tab10").colors]
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), sharex=True)
    for axis, (metric, title) in zip(axes.flat, PANELS.items()):
        for (script, runs), (colour, line) in zip(results.items(), styles):
            n = min(len(rows) for rows, _, _ in runs)
            curves = [[r[metric] for r in rows[:n]] for rows, _, _ in runs]
            steps = [r["step"] for r in runs[0][0][:n]]
            axis.plot(steps, [statistics.mean(v) for v in zip(*curves)], line, color=colour, label=script, lw=1.6)
            axis.fill_between(steps, [min(v) for v in zip(*curves)], [max(v) for v in zip(*curves)], color=colour, alpha=0.12)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        if metric == "approx_kl":
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("rollout")
    seeds = len(next(iter(results.values())))
    figure.suptitle(f"mean over {seeds} seed{'s' * (seeds > 1)}; the band spans the seeds", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="center right", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.9, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(summaries):
    """Markdown: a line a script, mean and span over the seeds."""

    def cell(v):
        if "mean" not in v:
            return ", ".join("never" if s is None else str(s) for s in v["seeds"])
        return f"{v['mean']:.3f} ({v['min']:.3f} to {v['max']:.3f})"

    heads = list(next(iter(summaries.values())))
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    rows += [f"| {name} | " + " | ".join(cell(s[h]) for h in heads) + " |" for name, s in summaries.items()]
    return "\n".join(rows)


def main(options, extra):
    known = {p.stem for p in (ROOT / "algos").glob("*.py") if "\ndef surrogate(" in p.read_text()}
    for script in options.scripts:
        if script not in known:
            raise UserError(f"no online script algos/{script}.py; there are: {', '.join(sorted(known))}")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [set(cores[i :: options.jobs]) if options.jobs > 1 and cores else None for i in range(options.jobs)]
    todo = [(script, seed) for script in options.scripts for seed in range(1, options.seeds + 1)]
    free = list(shares)

    def work(job):
        core = free.pop()
        try:
            return run(*job, extra, core)
        finally:
            free.append(core)

    with ThreadPoolExecutor(options.jobs) as pool:
        folders = dict(zip(todo, pool.map(work, todo)))
    results = {s: [read(folders[s, seed]) for seed in range(1, options.seeds + 1)] for s in options.scripts}
    out = Path(options.out or ROOT / "runs" / "compare" / "-".join(options.scripts))
    out.parent.mkdir(parents=True, exist_ok=True)
    summaries = {s: summarise(runs) for s, runs in results.items()}
    draw(results, out.with_suffix(".png"))
    curves = {
        s: [[{k: round(r[k], 5) for k in ("step", *PANELS)} for r in rows] for rows, _, _ in runs]
        for s, runs in results.items()
    }
    versions = json.loads((folders[todo[0]] / "config.json").read_text())["versions"]
    command = "python -m common.compare " + " ".join(sys.argv[1:])
    record = dict(command=command, versions=versions, summary=summaries, curves=curves)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(table(summaries))
    print(f"wrote {out.with_suffix('.png')} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Options, args=sys.argv[1:split]), sys.argv[split + 1 :])
