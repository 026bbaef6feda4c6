"""Several scripts over several seeds, side by side: one picture, one table.

python -m runs.compare grpo sapo --seeds 3                        runs/compare/grpo-sapo.{png,json}
python -m runs.compare grpo sapo --seeds 3 --out runs/reference/x -- --steps 60 --lr 3e-4
python -m runs.compare grpo@route sapo@route grpo@route:1 sapo@route:1            two warm starts
python -m runs.compare dpo@letters simpo@letters dpo@chain cdpo@chain,kappa=0 -- --eval-every 50
python -m runs.compare --redraw --out runs/reference/x            the picture again, and the table

What follows -- goes to every script. What follows @ is the --data of a script that learns from pairs, or the
--task of another, and what follows a comma a further flag of that script alone, in place of one for all. In
flags {seed} is the seed: grpo,model=runs/compare/sft-{seed}. A finished run is not made again, unless the code
has changed since. An item is compared with the first one on the same data. Of scripts that write results.json the tables
of their rows are merged over seeds; what a method is compared with stands in its own table.
"""

import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError, figures, reason
from runs import launch, pictures

# Of a difference: the first that there is.
MEASURES = ("greedy accuracy after", "greedy score after", "greedy return after", "win_rate")
MEASURES += ("kl after", "valid after", "success after")
LOWER = ("kl after",)  # of what a script that stands alone measures: the less the better
MARGIN = 0.03  # means that are nearer to each other than this are equal, whatever the spans
WARM_STARTS = ("route",)  # tasks whose option, route:1, is the seed of another warm start
KEPT = ("step", *pictures.ONLINE, *pictures.PAIRS, "chosen_shift")  # of a curve


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]] = ()
    """scripts in algos/, each with @<data or task> and ,<flag>=<value> where these are not to be its own"""
    seeds: int = 3
    """seeds 1 to this"""
    jobs: int = 1
    """runs at a time, each on its own share of the cores"""
    out: str | None = None
    """picture and table without ending; None: runs/compare/<scripts>"""
    redraw: bool = False
    """nothing is run: the picture and the table of what OUT.json has"""


def parts(item):
    """script@data,flag=value,... -> script, data or "", its label in a picture, its own flags."""
    head, *flags = item.split(",")
    script, _, data = head.partition("@")
    return script, data, ",".join([script, *flags]), [x for f in flags for x in ("--" + f).split("=", 1)]


def kind(item):
    """How an item's runs are summarised: "results", "alone", "pairs", "supervised" or "online"; None: not at all."""
    text = (launch.ROOT / "algos" / f"{parts(item)[0]}.py").read_text()
    if "\ndef results(rows, args)" in text:
        return "results"
    if "\nStand-alone: " in text:
        return "alone"
    if "\n    pairs_per_step:" in text:
        return "pairs"
    if "\n    batch_size:" in text:
        return "supervised"
    return "online" if "\ndef surrogate(" in text or "rollout.summary(" in text else None


def place(item, seed, extra):
    """-> (a run's folder, its flags)."""
    script, data, _, flags = parts(item)
    extra = [*([("--data" if kind(item) == "pairs" else "--task"), data] if data else []), *extra, *flags]
    extra = [word.replace("{seed}", str(seed)) for word in extra]
    given = [i for i, word in enumerate(extra) if word.startswith("--")]
    settings = sorted({extra[i]: extra[i:j] for i, j in zip(given, [*given[1:], None])}.values())  # its own before all's
    words = [word.removeprefix("--").replace("/", "_") for setting in settings for word in setting]
    return launch.ROOT / "runs" / "compare" / "-".join([script, str(seed), *words]), sum(settings, [])


def finished(folder):
    """What the mark of a finished run says: its last line, the code's digest, and (in later ones) how long it took. Empty where
    there is none, or the code has changed since."""
    mark = folder / "done"
    lines = mark.read_text().splitlines() if mark.exists() else []
    return lines if lines[1:2] == [launch.code(folder.name.partition("-")[0])] else []


def run(item, seed, extra, share):
    """One run -> its folder."""
    (folder, words), script = place(item, seed, extra), parts(item)[0]
    said, begun = finished(folder), time.monotonic()
    if not said:
        done = launch.complete(script, ["--seed", str(seed), *words], folder, share)
        if done.returncode:
            raise UserError(f"{script}.py with seed {seed} failed: {launch.last_line(done.stderr)}")
        said = [launch.last_line(done.stdout), launch.code(script), f"{time.monotonic() - begun:.3f} seconds"]
        (folder / "done").write_text("\n".join(said) + "\n")
    print(f"{folder.name}: {said[0]}", flush=True)
    return folder


def rows_of(path):
    """Rows of a .jsonl file; what was not finite is NaN."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    return [{k: float("nan") if v is None else v for k, v in row.items()} for row in rows]


def read(folder):
    """-> (rows of metrics.jsonl, greedy accuracy, or score, before, after)."""
    evals = rows_of(folder / "evals.jsonl")
    return rows_of(folder / "metrics.jsonl"), evals[0]["greedy_accuracy"], evals[-1]["greedy_accuracy"]


def band(values):
    """One number per seed -> mean, least and greatest."""
    return dict(mean=statistics.mean(values), min=min(values), max=max(values), seeds=values)


def difference(mine, base):
    """Two lists, a number per seed -> the mean of the paired differences and their 95% bootstrap interval (percentile,
    seeds resampled); low and high are None with one seed.

    What the interval is worth: with three seeds it is the span of the three differences, since each of them is drawn
    three times in 1 of 27 resamples, more than 1 in 40; a span of three holds a distribution's median in 75% of cases,
    not 95%. From about eight seeds on it is an interval to speak of. BCa's correction would be estimated from the same
    few numbers, and has no value where they are equal. Seeds of one warm start share what that start has learned:
    the interval does not speak of other starts."""
    from scipy import stats

    deltas = sorted(m - b for m, b in zip(mine, base, strict=True))  # sorted: the order of seeds changes nothing
    mean = statistics.mean(deltas)
    if len(deltas) < 2:
        return dict(mean=mean, low=None, high=None)
    low, high = stats.bootstrap((deltas,), lambda x, axis: x.mean(axis), method="percentile", rng=0).confidence_interval
    return dict(mean=mean, low=float(low), high=float(high))


def verdict(*starts, several=False, margin=MARGIN):
    """Of (mine, base), two lists of a number per seed, once for each warm start -> "better" or "worse" where on every
    one of them the means differ by `margin` or more and the spans over seeds do not overlap, else "equal". `several`:
    the task has further warm starts, which is said where only one was run."""

    def word(mine, base):
        if abs(statistics.mean(mine) - statistics.mean(base)) < margin - 1e-9:
            return "equal"
        if min(mine) > max(base):
            return "better"
        return "worse" if max(mine) < min(base) else "equal"

    words = {word(*start) for start in starts}
    said = words.pop() if len(words) == 1 else "equal"
    doubts = ["one seed"] * (len(starts[0][0]) == 1)
    doubts += ["one warm start"] * (several and len(starts) == 1 and said != "equal")
    return f"{said} ({', '.join(doubts)})" if doubts else said


def differences(summaries, data):
    """{item: summary}, {item: what it ran on} -> {item: {against, measure, mean, low, high, verdict}}: every item against
    the first one on the same data."""
    measure = next((m for m in MEASURES if all(m in s for s in summaries.values())), None)
    if not summaries or not measure:
        return {}
    values = {item: s[measure]["seeds"] for item, s in summaries.items()}
    sign, bases, out = -1 if measure in LOWER else 1, {}, {}
    for item in values:
        bases.setdefault(data[item], item)

    def spot(item):
        """What an item and its twins on other warm starts have in common."""
        world = data[item].partition(":")[0]
        return parts(item)[2], parts(bases[data[item]])[2], world if world in WARM_STARTS else data[item]

    for item in [i for i in values if bases[data[i]] != i]:
        twins = [i for i in values if spot(i) == spot(item)]
        starts = {data[i]: [[sign * x for x in values[of]] for of in (i, bases[data[i]])] for i in twins}
        said = verdict(*starts.values(), several=spot(item)[2] in WARM_STARTS)
        against = bases[data[item]]
        out[item] = dict(against=against, measure=measure, **difference(values[item], values[against]), verdict=said)
    return out


def summarise_pairs(runs):
    """As summarise(), of the last evaluation and the last 10 updates. `runs`: (metrics rows, evaluation rows)
    per seed."""
    names = "win_rate gold_reward kl reward_accuracy margin chosen_shift rejected_shift credit".split()
    last = [evals[-1] for _, evals in runs]
    out = {k: band([e[k] for e in last]) for k in names if all(k in e for e in last)}
    return out | {"entropy": band([statistics.mean(r["entropy"] for r in rows[-10:]) for rows, _ in runs])}


def summarise_supervised(runs, measure="accuracy"):
    """As summarise(), of the first and the last evaluation and the last 10 updates. `runs`: (metrics rows, evaluation rows)
    per seed."""
    names = {"greedy_accuracy": f"greedy {measure}", "perplexity": "perplexity", "also_greedy_accuracy": "also greedy accuracy"}
    out = {}
    for key, name in names.items():
        if all(key in evals[0] for _, evals in runs):
            out[f"{name} before"], out[f"{name} after"] = (band([evals[i][key] for _, evals in runs]) for i in (0, -1))
    for key, name in dict(logp="log-prob of demonstrations", entropy="entropy").items():
        out[f"{name}, last 10 steps"] = band([statistics.mean(row[key] for row in rows[-10:]) for rows, _ in runs])
    return out


def summarise_alone(runs):
    """As summarise(), of all that the first and the last evaluation have. `runs`: evaluation rows per seed."""
    names = [name for name in runs[0][0] if name not in ("step", "prompts")]
    ends = [(name, i, when) for name in names for i, when in ((0, "before"), (-1, "after"))]
    return {f"{name.replace('_', ' ')} {when}": band([rows[i][name] for rows in runs]) for name, i, when in ends}


def summarise(runs, measure="accuracy"):
    """Mean, least and greatest over seeds of what the table shows. `runs`: what read() gives, per seed; by --steps 0 there is
    but an evaluation."""
    metrics = [rows for rows, _, _ in runs]
    ends = {f"greedy {measure} {when}": band([run[i] for run in runs]) for i, when in ((1, "before"), (2, "after"))}
    if not all(metrics):
        return ends

    def mean(key, part=slice(None)):
        return [statistics.mean(r[key] for r in rows[part]) for rows in metrics]

    def greatest(key):
        return [max((r[key] for r in rows if r[key] == r[key]), default=float("nan")) for rows in metrics]

    late = slice(-10, None)
    values = {
        f"sampled {measure}, last 10 steps": mean("accuracy", late),
        f"sampled {measure}, mean of all steps": mean("accuracy"),
        "entropy, last 10 steps": mean("entropy", late),
        "greatest KL in a step": greatest("approx_kl"),
    }
    out = ends | {k: band(v) for k, v in values.items()}
    if measure == "accuracy":
        first = [next((r["step"] for r in rows if r["accuracy"] >= 0.7), None) for rows in metrics]
        out["first step with sampled accuracy 0.7"] = dict(seeds=first)
    return out


def curve(folder, of):
    """A run's curve: rows of metrics.jsonl with the evaluation of the same step in them, for pairs and what stands alone the
    evaluations; what KEPT names, avg@N and pass@N, for what stands alone all of it, to five digits. `of`: its kind."""
    steps, quiet = {}, of in ("pairs", "alone")
    for row in [*(rows_of(folder / "metrics.jsonl") if not quiet else ()), *rows_of(folder / "evals.jsonl")]:
        steps.setdefault(row["step"], {}).update(row)
    if of == "alone":
        return [{k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in row.items()} for row in steps.values()]
    kept = [{k: row[k] for k in [*KEPT, *(k for k in row if "@" in k)] if k in row} for _, row in sorted(steps.items())]
    return [{k: v if isinstance(v, int) else float(f"{v:.5g}") for k, v in row.items()} for row in kept]


def summary(folders, of):
    """[folder, one a seed] of an item -> what the table shows of it. `of`: its kind."""
    if of == "alone":
        return summarise_alone([rows_of(f / "evals.jsonl") for f in folders])
    said = re.search(r"greedy (\w+)", (folders[0] / "done").read_text())
    measure = said[1] if said else "accuracy"
    if of == "online":
        return summarise([read(f) for f in folders], measure)
    runs = [(rows_of(f / "metrics.jsonl"), rows_of(f / "evals.jsonl")) for f in folders]
    return summarise_pairs(runs) if of == "pairs" else summarise_supervised(runs, measure)


def data_of(record):
    """{item: what it ran on}; older records have what the items name."""
    return record.get("data") or {item: parts(item)[1] for item in record["summary"]}


def draw(record, path):
    """The picture of a record."""
    curves, data = record["curves"], data_of(record)
    labels = {item: parts(item)[2] for item in curves}
    measure = next((key.split()[1] for s in record["summary"].values() for key in s if key.startswith("greedy ")), None)
    supervised = any("perplexity after" in s for s in record["summary"].values())
    ends = [key.removesuffix(" after") for key in next(iter(record["summary"].values())) if key.endswith(" after")]
    if ends and not measure and not supervised:
        pictures.alone(curves, labels, data, ends, LOWER, path)
    elif measure or supervised:
        pictures.online(curves, labels, data, measure, path, "update" if supervised else "rollout")
    else:
        pictures.pairs(curves, labels, data, path)


def checked(options):
    """The items of a command, each once. UserError where they cannot be run side by side."""
    known = sorted(p.stem for p in (launch.ROOT / "algos").glob("*.py") if kind(p.stem))
    items = list(dict.fromkeys(options.scripts))
    for item in items:
        if parts(item)[0] not in known:
            raise UserError(f"no script algos/{parts(item)[0]}.py; there are: {', '.join(known)}")
    if not items or min(options.seeds, options.jobs) < 1:
        raise UserError("needs a script at least, and --seeds and --jobs of at least 1")
    if len(kinds := {kind(item) for item in items}) > 1:
        raise UserError(f"scripts of kinds {' and '.join(sorted(kinds))} have no common curves: compare them apart")
    return items


def each(work, items, options, extra):
    """{item: [what work(item, seed, extra, share of the cores) gives, for every seed]}, --jobs at a time."""
    cores = launch.cores() if options.jobs > 1 else []
    shares = [set(cores[i :: options.jobs]) for i in range(options.jobs)]
    todo = [(item, seed, extra) for item in items for seed in range(1, options.seeds + 1)]
    found = {}
    for (item, *_), result in zip(todo, launch.spread(work, todo, shares)):
        found.setdefault(item, []).append(result)
    return found


def recorded(out):
    """What OUT.json has. UserError where it is no record."""
    try:
        return json.loads(Path(f"{out}.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--redraw needs the numbers in {out}.json: {reason(error)}") from None


def made(items, options, extra):
    """Makes the runs that are missing -> the record."""
    folders, of = each(run, items, options, extra), kind(items[0])
    configs = {i: json.loads((fs[0] / "config.json").read_text()) for i, fs in folders.items()}
    data = {i: config["args"].get("data" if of == "pairs" else "task", "") for i, config in configs.items()}
    summaries = {i: summary(fs, of) for i, fs in folders.items()}
    return dict(
        command=command(),
        versions=configs[items[0]]["versions"],
        lessons=lessons(items),
        data=data,
        summary=summaries,
        differences=differences(summaries, data),
        curves={i: [curve(f, of) for f in fs] for i, fs in folders.items()},
    )


def merged(items, options, extra):
    """As made(), of scripts that write results.json: the record {command, versions, results {item: merged}}."""
    folders = each(run, items, options, extra)
    found = {}
    for item, of in folders.items():
        try:
            found[item] = figures.merge([json.loads((f / "results.json").read_text()) for f in of])
        except LookupError as error:
            raise UserError(f"{item}: its seeds have different rows or panels ({reason(error)})") from None
    config = json.loads((folders[items[0]][0] / "config.json").read_text())
    return dict(command=command(), versions=config["versions"], lessons=lessons(items), results=found)


def lessons(items):
    """{script: digest of its code}, which says later whether a record is still this code's."""
    return {script: launch.lesson(script) for script in sorted({parts(i)[0] for i in items})}


def command():
    """What was typed."""
    return "python -m runs.compare " + " ".join(sys.argv[1:])


def show(record, out):
    """Draws the picture of a record, prints its tables."""
    if "results" in record:
        several = len(record["results"]) > 1
        figures.draw({parts(i)[2] if several else "": found for i, found in record["results"].items()}, f"{out}.png")
        for item, found in record["results"].items():
            print(f"{item}\n\n{figures.table(found)}\n")
        return
    draw(record, f"{out}.png")
    print(pictures.table(record["summary"], differences(record["summary"], data_of(record))))


def main(options, extra):
    """Writes picture and record, prints the table. `extra`: flags for every script."""
    items = [] if options.redraw and options.out else checked(options)
    out = Path(options.out or launch.ROOT / "runs" / "compare" / "-".join(items).replace("/", "_"))
    if options.redraw:
        record = recorded(out)
    else:
        record = (merged if kind(items[0]) == "results" else made)(items, options, extra)
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.json").write_text(json.dumps(record) + "\n")
    show(record, out)
    print(f"wrote {out}.png" + ("" if options.redraw else f" and {out}.json"))


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Options, args=sys.argv[1:split]), sys.argv[split + 1 :])
