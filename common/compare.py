"""Several scripts over several seeds, side by side: one picture, one table.

python -m common.compare grpo sapo --seeds 3                        runs/compare/grpo-sapo.{png,json}
python -m common.compare grpo sapo --seeds 3 --out runs/reference/x -- --steps 60 --lr 3e-4
python -m common.compare dpo@letters simpo@letters dpo@chain cdpo@chain cdpo@chain,kappa=0 -- --eval-every 50
What follows -- goes to every script. What follows @ is the --data of a script that learns from pairs, or the --task of an
online one, and what follows a comma another flag of that script alone. A run that is there and finished is not made again,
unless the code has changed since.
"""

import hashlib
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
PANELS = dict(accuracy="sampled {measure}", length="completion length, tokens", entropy="entropy, nats",
              approx_kl="KL(rollout policy, policy), nats")  # fmt: skip
# The same for scripts that learn from pairs, from their evaluations; a row of panels for every data set.
PAIR_PANELS = dict(win_rate="win rate against the reference", kl="KL to the reference, nats",
                   chosen_shift="log-ratio of the chosen response", credit="credit of single tokens")  # fmt: skip


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]]
    """scripts in algos/, each with @<data or task> and ,<flag>=<value> where these are not to be the script's own"""
    seeds: int = 3
    """seeds 1 to this"""
    jobs: int = 1
    """runs at a time, each on its own share of the cores"""
    out: str | None = None
    """picture and table without ending; None: runs/compare/<scripts>"""


def parts(item):
    """script@data,flag=value,... -> script, data or "", its label in a picture, its own flags."""
    head, *flags = item.split(",")
    script, _, data = head.partition("@")
    return script, data, ",".join([script, *flags]), [x for f in flags for x in ("--" + f).split("=", 1)]


def from_pairs(item):
    return "\n    pairs_per_step:" in (ROOT / "algos" / f"{parts(item)[0]}.py").read_text()


def code(script):
    """Digest of what makes a run: the script and common/."""
    digest = hashlib.sha256()
    for path in (ROOT / "algos" / f"{script}.py", *sorted((ROOT / "common").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(item, seed, extra, core):
    """One run in a process of its own -> its folder. `core`: the CPU cores it may use, or None for all."""
    script, data, _, flags = parts(item)
    extra = [*([("--data" if from_pairs(item) else "--task"), data] if data else []), *flags, *extra]
    name = "-".join([script, str(seed), *[a.lstrip("-").replace("/", "_") for a in extra]])
    folder = ROOT / "runs" / "compare" / name
    finished, now = (folder / "done").read_text().splitlines() if (folder / "done").exists() else [], code(script)
    if finished[1:] != [now]:
        if folder.exists():
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        command = [sys.executable, f"algos/{script}.py", "--seed", str(seed), *extra, "--run-dir", str(folder)]
        pin = (lambda: os.sched_setaffinity(0, core)) if core else None
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=pin)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{script}.py with seed {seed} failed: {last}")
        finished = [done.stdout.strip().splitlines()[-1], now]
        (folder / "done").write_text("\n".join(finished) + "\n")
    print(f"{name}: {finished[0]}", flush=True)
    return folder


def rows_of(path):
    """Rows of a .jsonl file; what was not finite is NaN."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return [{k: float("nan") if v is None else v for k, v in row.items()} for row in rows]


def read(folder):
    """-> (rows of metrics.jsonl, greedy accuracy, or score, before, after)."""
    words = (folder / "done").read_text().split()
    return rows_of(folder / "metrics.jsonl"), float(words[2]), float(words[4])


def band(values):
    return dict(mean=statistics.mean(values), min=min(values), max=max(values), seeds=values)


def summarise_pairs(runs):
    """As summarise(), of the last evaluation and the last 10 updates. `runs`: (metrics rows, evaluation rows), one per seed."""
    names = ["win_rate", "gold_reward", "kl", "reward_accuracy", "margin", "chosen_shift", "rejected_shift", "credit"]
    last = [evals[-1] for _, evals in runs]
    out = {k: band([e[k] for e in last]) for k in names if all(k in e for e in last)}
    return out | {"entropy": band([statistics.mean(r["entropy"] for r in rows[-10:]) for rows, _ in runs])}


def summarise(runs, measure="accuracy"):
    """Mean, least and greatest over seeds of what the table shows. `runs`: what read() gives, one per seed."""
    first = [next((r["step"] for r in rows if r["accuracy"] >= 0.7), None) for rows, _, _ in runs]
    values = {
        f"greedy {measure} before": [before for _, before, _ in runs],
        f"greedy {measure} after": [after for _, _, after in runs],
        f"sampled {measure}, last 10 steps": [statistics.mean(r["accuracy"] for r in rows[-10:]) for rows, _, _ in runs],
        f"sampled {measure}, mean of all steps": [statistics.mean(r["accuracy"] for r in rows) for rows, _, _ in runs],
        "entropy, last 10 steps": [statistics.mean(r["entropy"] for r in rows[-10:]) for rows, _, _ in runs],
        "greatest KL in a step": [max(r["approx_kl"] for r in rows) for rows, _, _ in runs],
    }
    out = {k: band(v) for k, v in values.items()}
    if measure == "accuracy":
        out["first step with sampled accuracy 0.7"] = dict(seeds=first)
    return out


def draw(results, rows, path, x):
    """`rows`: of panels, each (title, items shown, {metric: title}); one panel per metric: the mean over seeds, and the band
    from the least to the greatest. `results` {item: [rows of numbers, one list a seed]}, x: what their "step" counts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = [(c, s) for s in ("-", "--") for c in plt.get_cmap("tab10").colors]
    looks = dict(zip(dict.fromkeys(parts(item)[2] for item in results), styles))
    beside = 0.7 + 0.08 * max(map(len, looks))  # inches for the legend
    wide, high = (3.4, 2.9) if len(rows[0][2]) > 2 else (5.4, 3.6)
    size = (wide * len(rows[0][2]) + beside, high * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(rows[0][2]), figsize=size, squeeze=False)
    labels = {}
    for line_of_axes, (title, items, panels) in zip(axes, rows):
        for axis, (metric, name) in zip(line_of_axes, panels.items()):
            for item in items:
                label = parts(item)[2]
                colour, line = looks[label]
                curves = [[(r["step"], r[metric]) for r in rs if metric in r] for rs in results[item]]
                n = min(map(len, curves))
                steps, values = [s for s, _ in curves[0][:n]], list(zip(*([v for _, v in c[:n]] for c in curves)))
                if not n:
                    continue
                labels[label] = axis.plot(steps, [statistics.mean(v) for v in values], line, color=colour, lw=1.6)[0]
                axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12)
            axis.set_title(f"{title}: {name}" if title else name, fontsize=9)
            axis.grid(alpha=0.25)
            if metric == "approx_kl":
                axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel(x)
    seeds = len(next(iter(results.values())))
    figure.suptitle(f"mean over {seeds} seed{'s' * (seeds > 1)}; the band spans the seeds", fontsize=10)
    figure.legend(labels.values(), labels, loc="center right", fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - beside / size[0], 1))
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
    scripts = {p.stem: p.read_text() for p in (ROOT / "algos").glob("*.py")}
    known = {n for n, text in scripts.items() if "\ndef surrogate(" in text or "\n    pairs_per_step:" in text}
    for item in options.scripts:
        if parts(item)[0] not in known:
            raise UserError(f"no script algos/{parts(item)[0]}.py; there are: {', '.join(sorted(known))}")
    pairs = from_pairs(options.scripts[0])
    if any(from_pairs(item) != pairs for item in options.scripts):
        raise UserError("scripts that learn from pairs and online scripts have no curves in common: compare them apart")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [set(cores[i :: options.jobs]) if options.jobs > 1 and cores else None for i in range(options.jobs)]
    todo = [(item, seed) for item in options.scripts for seed in range(1, options.seeds + 1)]
    free = list(shares)

    def work(job):
        core = free.pop()
        try:
            return run(*job, extra, core)
        finally:
            free.append(core)

    with ThreadPoolExecutor(options.jobs) as pool:
        folders = dict(zip(todo, pool.map(work, todo)))
    of = {item: [folders[item, seed] for seed in range(1, options.seeds + 1)] for item in options.scripts}
    if pairs:
        curves = {item: [rows_of(f / "evals.jsonl") for f in fs] for item, fs in of.items()}
        runs = {i: [(rows_of(f / "metrics.jsonl"), evals) for f, evals in zip(fs, curves[i])] for i, fs in of.items()}
        summaries, names = {i: summarise_pairs(r) for i, r in runs.items()}, PAIR_PANELS
        data = {i: json.loads((fs[0] / "config.json").read_text())["args"]["data"] for i, fs in of.items()}
        panels = [(name, [i for i in data if data[i] == name], PAIR_PANELS) for name in dict.fromkeys(data.values())]
    else:
        runs = {item: [read(f) for f in fs] for item, fs in of.items()}
        curves = {item: [rows for rows, _, _ in rs] for item, rs in runs.items()}
        measure = (folders[todo[0]] / "done").read_text().split()[1]
        summaries, names = {i: summarise(r, measure) for i, r in runs.items()}, PANELS
        titles = [(k, title.format(measure=measure)) for k, title in PANELS.items()]
        first, second = dict(titles[:2]), dict(titles[2:])
        panels = [("", list(of), first), ("", list(of), second)]
    out = Path(options.out or ROOT / "runs" / "compare" / "-".join(options.scripts).replace("/", "_"))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, panels, out.with_suffix(".png"), "update" if pairs else "rollout")
    names = ["step", *names]
    kept = {i: [[{k: round(r[k], 5) for k in names if k in r} for r in rows] for rows in c] for i, c in curves.items()}
    versions = json.loads((folders[todo[0]] / "config.json").read_text())["versions"]
    command = "python -m common.compare " + " ".join(sys.argv[1:])
    record = dict(command=command, versions=versions, summary=summaries, curves=kept)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(table(summaries))
    print(f"wrote {out.with_suffix('.png')} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Options, args=sys.argv[1:split]), sys.argv[split + 1 :])
