"""Several scripts over several seeds, side by side: one picture, one table.

python -m runs.compare grpo sapo --seeds 3                        runs/compare/grpo-sapo.{png,json}
python -m runs.compare grpo sapo --seeds 3 --out runs/reference/x -- --steps 60 --lr 3e-4
python -m runs.compare dpo@letters simpo@letters dpo@chain cdpo@chain,kappa=0 -- --eval-every 50

What follows -- goes to every script. What follows @ is the --data of a script that learns from pairs, or the
--task of another, and what follows a comma a further flag of that script alone. A finished run is not made
again, unless the code has changed since.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError
from runs import launch

PANELS = dict(
    accuracy="sampled {measure}",
    length="completion length, tokens",
    entropy="entropy, nats",
    approx_kl="KL(rollout policy, policy), nats",
)
# The same for scripts that learn from pairs, from their evaluations; a row of panels for every data set.
PAIR_PANELS = dict(
    win_rate="win rate against the reference",
    kl="KL to the reference, nats",
    chosen_shift="log-ratio of the chosen response",
    credit="credit of single tokens",
)


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]]
    """scripts in algos/, each with @<data or task> and ,<flag>=<value> where these are not to be its own"""
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


def kind(item):
    """How an item's runs are summarised: "pairs" or "online"; None: not at all."""
    text = (launch.ROOT / "algos" / f"{parts(item)[0]}.py").read_text()
    if "\n    pairs_per_step:" in text:
        return "pairs"
    return "online" if "\ndef surrogate(" in text else None


def run(item, seed, extra, share):
    """One run -> its folder."""
    script, data, _, flags = parts(item)
    extra = [*([("--data" if kind(item) == "pairs" else "--task"), data] if data else []), *flags, *extra]
    given = [i for i, word in enumerate(extra) if word.startswith("--")]
    settings = sorted(extra[i:j] for i, j in zip(given, [*given[1:], None]))
    words = [word.lstrip("-").replace("/", "_") for setting in settings for word in setting]
    name = "-".join([script, str(seed), *words])
    folder = launch.ROOT / "runs" / "compare" / name
    mark, now = folder / "done", launch.code(script)
    finished = mark.read_text().splitlines() if mark.exists() else []
    if finished[1:] != [now]:
        done = launch.complete(script, ["--seed", str(seed), *extra], folder, share)
        if done.returncode:
            raise UserError(f"{script}.py with seed {seed} failed: {launch.last_line(done.stderr)}")
        finished = [launch.last_line(done.stdout), now]
        mark.write_text("\n".join(finished) + "\n")
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
    """One number per seed -> mean, least and greatest."""
    return dict(mean=statistics.mean(values), min=min(values), max=max(values), seeds=values)


def summarise_pairs(runs):
    """As summarise(), of the last evaluation and the last 10 updates. `runs`: (metrics rows, evaluation rows)
    per seed."""
    names = "win_rate gold_reward kl reward_accuracy margin chosen_shift rejected_shift credit".split()
    last = [evals[-1] for _, evals in runs]
    out = {k: band([e[k] for e in last]) for k in names if all(k in e for e in last)}
    return out | {"entropy": band([statistics.mean(r["entropy"] for r in rows[-10:]) for rows, _ in runs])}


def summarise(runs, measure="accuracy"):
    """Mean, least and greatest over seeds of what the table shows. `runs`: what read() gives, per seed."""
    metrics = [rows for rows, _, _ in runs]

    def mean(key, part=slice(None)):
        return [statistics.mean(r[key] for r in rows[part]) for rows in metrics]

    late = slice(-10, None)
    values = {
        f"greedy {measure} before": [before for _, before, _ in runs],
        f"greedy {measure} after": [after for _, _, after in runs],
        f"sampled {measure}, last 10 steps": mean("accuracy", late),
        f"sampled {measure}, mean of all steps": mean("accuracy"),
        "entropy, last 10 steps": mean("entropy", late),
        "greatest KL in a step": [max(r["approx_kl"] for r in rows) for rows in metrics],
    }
    out = {k: band(v) for k, v in values.items()}
    if measure == "accuracy":
        first = [next((r["step"] for r in rows if r["accuracy"] >= 0.7), None) for rows in metrics]
        out["first step with sampled accuracy 0.7"] = dict(seeds=first)
    return out


# Both take {item: [run folders, one a seed]} and give (summaries {item: {name: band}}, curves
# {item: [rows, one list a seed]}, the rows of panels for draw(), what the curves' "step" counts).


def online(folders):
    """Of scripts that learn from rewards."""
    runs = {item: [read(f) for f in fs] for item, fs in folders.items()}
    measure = (next(iter(folders.values()))[0] / "done").read_text().split()[1]
    titles = [(k, title.format(measure=measure)) for k, title in PANELS.items()]
    panels = [("", list(runs), dict(some)) for some in (titles[:2], titles[2:])]
    curves = {item: [rows for rows, _, _ in rs] for item, rs in runs.items()}
    return {item: summarise(rs, measure) for item, rs in runs.items()}, curves, panels, "rollout"


def pairs(folders):
    """Of scripts that learn from pairs."""
    curves = {item: [rows_of(f / "evals.jsonl") for f in fs] for item, fs in folders.items()}
    metrics = {item: [rows_of(f / "metrics.jsonl") for f in fs] for item, fs in folders.items()}
    summaries = {item: summarise_pairs(list(zip(metrics[item], curves[item]))) for item in folders}
    data = {i: json.loads((fs[0] / "config.json").read_text())["args"]["data"] for i, fs in folders.items()}
    names = dict.fromkeys(data.values())
    panels = [(name, [i for i in data if data[i] == name], PAIR_PANELS) for name in names]
    return summaries, curves, panels, "update"


def draw(results, rows, path, x):
    """One panel per metric: the mean over seeds, and the band from the least to the greatest. `results`
    {item: [rows of numbers, one list a seed]}; `rows` of panels, each (title, items shown, {metric: title});
    `x`: what their "step" counts."""
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
                if not n:
                    continue
                steps = [s for s, _ in curves[0][:n]]
                values = list(zip(*([v for _, v in c[:n]] for c in curves)))
                means = [statistics.mean(v) for v in values]
                least, most = [min(v) for v in values], [max(v) for v in values]
                labels[label] = axis.plot(steps, means, line, color=colour, lw=1.6)[0]
                axis.fill_between(steps, least, most, color=colour, alpha=0.12)
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
        if v is None:
            return ""
        if "mean" not in v:
            return ", ".join("never" if s is None else str(s) for s in v["seeds"])
        return f"{v['mean']:.3f} ({v['min']:.3f} to {v['max']:.3f})"

    heads = list(dict.fromkeys(head for s in summaries.values() for head in s))
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, s in summaries.items():
        rows.append(f"| {name} | " + " | ".join(cell(s.get(h)) for h in heads) + " |")
    return "\n".join(rows)


def main(options, extra):
    """Makes the runs that are missing, and writes picture and table. `extra`: flags for every script."""
    known = sorted(p.stem for p in (launch.ROOT / "algos").glob("*.py") if kind(p.stem))
    items = list(dict.fromkeys(options.scripts))
    for item in items:
        if parts(item)[0] not in known:
            raise UserError(f"no script algos/{parts(item)[0]}.py; there are: {', '.join(known)}")
    if not items or min(options.seeds, options.jobs) < 1:
        raise UserError("needs a script at least, and --seeds and --jobs of at least 1")
    kinds = {kind(item) for item in items}
    if len(kinds) > 1:
        raise UserError("scripts that learn from pairs and others have no common curves: compare them apart")
    cores = launch.cores() if options.jobs > 1 else []
    shares = [set(cores[i :: options.jobs]) for i in range(options.jobs)]
    todo = [(item, seed, extra) for item in items for seed in range(1, options.seeds + 1)]
    folders = {}
    for (item, *_), folder in zip(todo, launch.spread(run, todo, shares)):
        folders.setdefault(item, []).append(folder)
    summaries, curves, panels, x = (pairs if kinds == {"pairs"} else online)(folders)
    out = Path(options.out or launch.ROOT / "runs" / "compare" / "-".join(items).replace("/", "_"))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, panels, out.with_suffix(".png"), x)
    names = dict.fromkeys(["step", *(metric for *_, metrics in panels for metric in metrics)])
    kept = {
        item: [[{k: round(r[k], 5) for k in names if k in r} for r in rows] for rows in seeds]
        for item, seeds in curves.items()
    }
    versions = json.loads((folders[items[0]][0] / "config.json").read_text())["versions"]
    command = "python -m runs.compare " + " ".join(sys.argv[1:])
    record = dict(command=command, versions=versions, summary=summaries, curves=kept)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(table(summaries))
    print(f"wrote {out.with_suffix('.png')} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Options, args=sys.argv[1:split]), sys.argv[split + 1 :])
