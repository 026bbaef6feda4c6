"""One flag of several scripts over some values: a picture with a panel a script, a table with a line a script and value.

python -m runs.sweep grpo reinforce sapo --over lr 1e-4 3e-4 1e-3 --seeds 3 --jobs 2 --out runs/reference/lr \
    -- --minibatches 8 --stale 0                        runs/reference/lr.{png,md,json}
python -m runs.sweep grpo minpro --over stale 0 1 2 4 -- --minibatches 8 --lr 1e-4
python -m runs.sweep --redraw --out runs/reference/lr   picture and table again from the numbers, nothing is run

Scripts are items of runs.compare and share its finished runs. The first is the base: every other script is compared
with it at the same value. Where a run fails, its script has no number at that value and is shown as failed; the next
call tries again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError
from runs import compare, launch, pictures

# Of the table, beside the greedy accuracy, what there is: {heading: (what of the summary, how its numbers are written)}.
COLUMNS = {
    "best on the way": ("best evaluation", ".3f"),
    "perplexity": ("perplexity after", ".3f"),
    "log-prob of demonstrations": ("log-prob of demonstrations, last 10 steps", ".3f"),
    "sampled, last 10 steps": ("sampled {measure}, last 10 steps", ".3f"),
    "greatest KL in a step": ("greatest KL in a step", ".2g"),
    "clip fraction": ("clip fraction, mean of all steps", ".2g"),
    "skipped updates": ("skipped updates", ".3g"),
}


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]] = ()
    """scripts in algos/ that learn from rewards, or all from demonstrations, as in runs.compare; the first is the base"""
    over: tuple[str, ...] = ()
    """the flag that is swept, without its dashes, and its values"""
    seeds: int = 3
    """seeds 1 to this"""
    jobs: int = 1
    """runs at a time, each on its own share of the cores"""
    out: str | None = None
    """picture, table and numbers without ending; None: runs/compare/<flag>-<scripts>"""
    redraw: bool = False
    """nothing is run: the picture and the table of what OUT.json has"""


def attempt(item, seed, extra, share):
    """As compare.run(), but of a run that fails its reason, a str."""
    try:
        return compare.run(item, seed, extra, share)
    except UserError as error:
        return reason(str(error))


def reason(message):
    """What compare.run() says of a failed run -> what its script said, without the advice."""
    said = message.partition(" failed: ")[2] or message
    return said.removeprefix("error: ").partition(";")[0]


def at(script, flag, value):
    """The item of a script at a value."""
    return f"{script},{flag}={value}"


def further(folders):
    """What the table shows besides what compare.summarise() gives, of an item's folders, one a seed."""
    rows = [compare.rows_of(f / "metrics.jsonl") for f in folders]
    best = [max(e["greedy_accuracy"] for e in compare.rows_of(f / "evals.jsonl")) for f in folders]
    out = {"best evaluation": compare.band(best), "skipped updates": compare.band([r[-1]["skipped_updates"] for r in rows])}
    if all("clip_fraction" in r[0] for r in rows):  # a gate clips nothing
        clipped = [[c for r in of if (c := r["clip_fraction"]) == c] for of in rows]
        out["clip fraction, mean of all steps"] = compare.band([sum(c) / max(1, len(c)) for c in clipped])
    return out


def bases(data, scripts, flag, values):
    """{script: the first on the same data}. `data` {item: what it ran on}; a script without an item there, since it failed
    at every value, counts as on what it names, or else as on the first's."""
    named = {s: compare.parts(s)[1] for s in scripts}
    known = {s: next((data[i] for v in values if (i := at(s, flag, v)) in data), named[s]) for s in scripts}
    own = next((known[s] for s in scripts if known[s] and not named[s]), "")
    known = {s: known[s] or own for s in scripts}
    return {s: next(other for other in scripts if known[other] == known[s]) for s in scripts}


def against(summaries, data, scripts, flag, values):
    """compare.differences() at every value apart, of the items that finished there and whose base did."""
    base, out = bases(data, scripts, flag, values), {}
    for value in values:
        items = [at(s, flag, value) for s in scripts if at(base[s], flag, value) in summaries]
        out |= compare.differences({i: summaries[i] for i in items if i in summaries}, data)
    return out


def made(options, scripts, extra):
    """Makes the runs that are missing -> the record."""
    flag, *values = dict.fromkeys(options.over)
    items = [at(script, flag, value) for script in scripts for value in values]
    found = compare.each(attempt, items, options, extra)
    failed = {i: {n: r for n, r in enumerate(rs, 1) if isinstance(r, str)} for i, rs in found.items()}
    good = {i: rs for i, rs in found.items() if not failed[i]}
    if not good:
        first = next(r for seeds in failed.values() for r in seeds.values())
        raise UserError(f"at no value has a script ended well on every seed; the first failure: {first}")
    configs = {i: json.loads((fs[0] / "config.json").read_text()) for i, fs in good.items()}
    data = {i: config["args"]["task"] for i, config in configs.items()}
    kind = compare.kind(items[0])
    summaries = {i: compare.summary(fs, kind) | further(fs) for i, fs in good.items()}
    curves = {i: [compare.curve(f, kind) for f in fs] for i, fs in good.items()}
    return dict(
        command="python -m runs.sweep " + " ".join(sys.argv[1:]),
        versions=next(iter(configs.values()))["versions"],
        lessons=compare.lessons(items),
        flag=flag,
        values=values,
        scripts=scripts,
        data=data,
        summary=summaries,
        differences=against(summaries, data, scripts, flag, values),
        failed={i: f for i, f in failed.items() if f},
        curves={i: [[r for r in rows if "greedy_accuracy" in r] for rows in seeds] for i, seeds in curves.items()},
    )


def table(record):
    """Markdown: a line a script and value."""
    flag, summaries, found, measure = record["flag"], record["summary"], record["differences"], measure_of(record)
    columns = {f"greedy {measure}": (f"greedy {measure} after", ".3f")}
    columns |= {head: c for head, c in COLUMNS.items() if any(c[0].format(measure=measure) in s for s in summaries.values())}
    base, rows = bases(record["data"], record["scripts"], flag, record["values"]), []

    def cell(band, form):
        return f"{band['mean']:{form}} ({band['min']:{form}} to {band['max']:{form}})" if band else ""

    for script in record["scripts"]:
        for value in record["values"]:
            item = at(script, flag, value)
            if item not in summaries:
                cells = [failure(record["failed"][item])] + [""] * (len(columns) + 1)
            else:
                cells = [cell(summaries[item].get(key.format(measure=measure)), form) for key, form in columns.values()]
                missing = base[script] != script and item not in found
                cells += ["", f"{base[script]} failed"] if missing else pictures.apart(found.get(item))
            rows.append([script, value, *cells])
    return pictures.markdown(["", flag, *columns, *pictures.APART], rows)


def failure(seeds):
    """{seed: reason} -> the cell of an item."""
    first = next(iter(seeds.values())).replace("|", "\\|")
    return f"failed: {first} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"


def measure_of(record):
    """What greedy decoding was measured by: accuracy, or a score."""
    return next(key.split()[1] for s in record["summary"].values() for key in s if key.startswith("greedy "))


def draw(record, path):
    """A panel a script, greedy accuracy after training over the values, the base in grey behind it."""
    flag, values, summaries, scripts = (record[k] for k in ("flag", "values", "summary", "scripts"))
    measure = measure_of(record)
    seeds = len(next(iter(summaries.values()))[f"greedy {measure} after"]["seeds"])

    def line(script):
        """A curve over the places of the values; NaN, a gap, where runs failed."""
        gap = dict(seeds=[float("nan")] * seeds)
        bands = [summaries.get(at(script, flag, v), {}).get(f"greedy {measure} after", gap) for v in values]
        return [[(i, b["seeds"][seed]) for i, b in enumerate(bands)] for seed in range(seeds)]

    panels, base = [], bases(record["data"], scripts, flag, values)
    for script in scripts:
        failed = [i for i, v in enumerate(values) if at(script, flag, v) not in summaries]
        behind = None if base[script] == script else line(base[script])
        panels.append(pictures.Panel(script, line(script), behind, failed))
    start = next(iter(summaries.values()))[f"greedy {measure} before"]["mean"]
    section = pictures.Section(f"greedy {measure} after training", panels, 5, 1.9, level=start, ticks=values)
    head = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    head += f"; the band spans the seeds; grey: {', '.join(dict.fromkeys(base.values()))}; dotted: before training"
    pictures.multiples([section], path, flag, head)


def main(options, extra):
    """Writes picture, table and record, and prints the table. `extra`: flags for every script."""
    if options.redraw and options.out:
        out, record = Path(options.out), compare.recorded(Path(options.out))
    else:
        scripts = checked(options, extra)
        name = "-".join([options.over[0], *scripts]).replace("/", "_")
        out = Path(options.out or launch.ROOT / "runs" / "compare" / name)
        record = compare.recorded(out) if options.redraw else made(options, scripts, extra)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not options.redraw:
        Path(f"{out}.json").write_text(json.dumps(record) + "\n")
    draw(record, f"{out}.png")
    text = table(record)
    Path(f"{out}.md").write_text(f"`{record['command']}`\n\n{text}\n")
    print(text)
    print(f"wrote {out}.png, .md and .json")


def checked(options, extra):
    """The scripts of a command. UserError where the sweep makes no sense."""
    scripts = compare.checked(options)
    if len(options.over) < 2:
        raise UserError("--over needs a flag and its values: --over lr 1e-4 3e-4")
    flag = options.over[0]
    for script in scripts:
        if compare.kind(script) == "pairs":
            raise UserError(f"{script} learns from pairs: a sweep is of scripts that learn from rewards or demonstrations")
        text = (launch.ROOT / "algos" / f"{compare.parts(script)[0]}.py").read_text()
        if f"\n    {flag.replace('-', '_')}: " not in text:
            raise UserError(f"{compare.parts(script)[0]}.py has no flag --{flag}")
    if f"--{flag}".replace("_", "-") in [word.partition("=")[0].replace("_", "-") for word in extra]:
        raise UserError(f"--{flag} is swept: it cannot stand after -- as well")
    return scripts


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Options, args=sys.argv[1:split]), sys.argv[split + 1 :])
