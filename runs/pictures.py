"""Pictures and tables of numbers over seeds: small multiples with the base in grey, rows of panels with a legend each.

A curve is a list of [(x, y), ...], one list a seed; drawn are its mean and the band from the least to the greatest.
"""

import statistics
from dataclasses import dataclass, field

from common.figures import curve, markdown, pyplot, wrapped

GREY, OWN, WIDE, DPI = "0.55", "tab:blue", 10.6, 110  # WIDE: inches, as wide as a page shows a picture


# Sections of the picture of scripts that learn from rewards or demonstrations, of what their curves have; sampled accuracy
# only where greedy has no curve.
ONLINE = dict(
    greedy_accuracy="greedy {measure} on held-out prompts",
    accuracy="sampled {measure}",
    perplexity="perplexity of held-out demonstrations",
    entropy="entropy, nats",
    approx_kl="KL(rollout policy, policy), nats",
    length="completion length, tokens",
)
# Panels of scripts that learn from pairs, a row for every data set.
PAIRS = dict(
    win_rate="win rate against the reference",
    kl="KL to the reference, nats (lower is better)",
    credit="credit of single tokens",
)
SHARES = ("win_rate", "credit")  # of PAIRS: 1 is all there is


@dataclass
class Panel:
    """One of small multiples."""

    title: str
    own: list
    """the curve: points per seed"""
    base: list | None = None
    """the curve in grey behind it; None: this is the base, itself in grey"""
    failed: list = field(default_factory=list)
    """where on the x axis there is no number because a run failed"""


@dataclass
class Section:
    """Panels that share their axes, below a title."""

    title: str
    panels: list
    columns: int = 5
    high: float = 1.6  # inches, of a row of panels
    log: bool = False
    level: float | None = None  # a dotted line
    ticks: list | None = None  # what stands at x = 0, 1, 2, ...


def multiples(sections, path, x, head):
    """Sections of small multiples, one below the other. `x`: what is on every x axis; `head`: the line on top."""
    plt = pyplot()
    rows = [-(-len(s.panels) // s.columns) for s in sections]
    heights = [n * s.high + 0.25 for n, s in zip(rows, sections)]
    most = max(min(s.columns, len(s.panels)) for s in sections)
    figure = plt.figure(figsize=(max(6.0, WIDE * min(1, most / 5)), sum(heights) + 0.6), layout="constrained")
    figure.suptitle(head, fontsize=9)
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, n, section in zip(parts, rows, sections):
        part.suptitle(section.title, fontsize=10, fontweight="bold", x=0.01, ha="left")
        columns = min(section.columns, len(section.panels))
        axes = part.subplots(n, columns, sharex=True, sharey=True, squeeze=False)
        small = 7 if section.columns > 5 else 9
        for i, axis in enumerate(axes.flat):
            if i >= len(section.panels):
                axis.set_axis_off()
                axes.flat[i - columns].tick_params(labelbottom=True)  # nothing stands below it
                continue
            _panel(axis, section, section.panels[i], small)
    parts[-1].supxlabel(x, fontsize=8)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _panel(axis, section, panel, small):
    marker = dict(marker="o", ms=3) if section.ticks else {}
    if panel.base:
        curve(axis, panel.base, GREY, lw=1.2, **marker)
    curve(axis, panel.own, OWN if panel.base else GREY, lw=1.5, **marker)
    if section.level is not None:
        axis.axhline(section.level, ls=":", color="black", lw=0.9)
    for x in panel.failed:
        axis.text(x, 0.5, "failed", color="tab:red", fontsize=8, ha="center", transform=axis.get_xaxis_transform())
    axis.set_title(wrapped(panel.title, 24), fontsize=small, pad=3)
    if section.log:
        axis.set_yscale("log")
    if section.ticks:
        axis.set_xticks(range(len(section.ticks)), section.ticks)
        axis.set_xlim(-0.4, len(section.ticks) - 0.6)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)


def points(curves, metric):
    """{item: [rows, one list a seed]} -> {item: curve of a metric over the rows' step}."""
    return {item: [[(r["step"], r[metric]) for r in rows if metric in r] for rows in seeds] for item, seeds in curves.items()}


def over(curves):
    """The line on top: what line and band are."""
    seeds = len(next(iter(curves.values())))
    return f"mean over {seeds} seeds; the band spans the seeds" if seeds > 1 else "one seed"


def online(curves, labels, data, measure, path, x="rollout"):
    """Of scripts that learn from rewards or demonstrations: greedy accuracy, a panel an item with the first on the same data
    behind it, and below, smaller, the same of the other metrics. `curves` {item: [rows, one list a seed]}, `labels` and
    `data` {item: word}."""
    bases = {name: next(i for i in curves if data[i] == name) for name in dict.fromkeys(data.values())}
    shown = {m: of for m in ONLINE if any(map(any, (of := points(curves, m)).values()))}
    if "greedy_accuracy" in shown:
        shown.pop("accuracy", None)
    sections = []
    for metric, of in shown.items():
        panels = []
        for item in curves:
            base = bases[data[item]]
            title = labels[item] + (f"@{data[item]}" if len(bases) > 1 else "")
            panels.append(Panel(title, of[item], None if item == base else of[base]))
        columns, high = (5 if len(curves) <= 5 else 7, 1.05) if sections else (5, 1.75)
        sections.append(Section(ONLINE[metric].format(measure=measure), panels, columns, high, log=metric == "approx_kl"))
    multiples(sections, path, x, f"{over(curves)}; grey: {', '.join(dict.fromkeys(labels[b] for b in bases.values()))}")


def pairs(curves, labels, data, path):
    """Of scripts that learn from pairs: a row of panels a data set, without those where all end at 1.00."""
    found, gone = [], {}
    for name in dict.fromkeys(data.values()):
        mine = {item: seeds for item, seeds in curves.items() if data[item] == name}
        of = {m: {labels[i]: c for i, c in points(mine, m).items()} for m in PAIRS}
        of = {m: seeds for m, seeds in of.items() if all(map(any, seeds.values()))}
        full = [m for m in SHARES if m in of and all(ends(c) == "1.00" for c in of[m].values())]
        for m in full:
            gone.setdefault(PAIRS[m], []).append(name)
        found.append((name, {m: PAIRS[m] for m in of if m not in full}, of))
    left = "".join(f"; left out, 1.00 for all: {title} on {' and '.join(names)}" for title, names in gone.items())
    rows(found, path, "update", over(curves) + left)


def alone(curves, labels, data, names, lower, path):
    """Of scripts that stand alone: a section for each of the `names` that an evaluation has, a panel an item with the first
    on the same data behind it; `lower`: those, with " after", that are the better the less they are."""
    bases = {name: next(i for i in curves if data[i] == name) for name in dict.fromkeys(data.values())}
    sections = []
    for name in names:
        of = points(curves, name.replace(" ", "_"))
        panels = [Panel(labels[i], of[i], None if i == bases[data[i]] else of[bases[data[i]]]) for i in curves]
        title = f"{name} (lower is better)" if f"{name} after" in lower else name
        sections.append(Section(title, panels, 7, 1.4))
    multiples(sections, path, "update", f"{over(curves)}; grey: {', '.join(labels[b] for b in bases.values())}")


def ends(seeds):
    """The mean of a curve's last points, to two digits."""
    return f"{statistics.mean(points[-1][1] for points in seeds):.2f}"


def rows(rows, path, x, head):
    """A row of panels for every data set, its legend at the right, the first of its scripts in grey. `rows`:
    [(title, {metric: its title}, {metric: {label: curve}})]."""
    plt = pyplot()
    labels = dict.fromkeys(label for *_, curves in rows for of in curves.values() for label in list(of)[1:])
    colours = dict(zip(labels, [c for c in plt.get_cmap("tab10").colors if c[0] != c[1]] * 3))  # without its grey
    columns = max(len(metrics) for _, metrics, _ in rows)
    figure = plt.figure(figsize=(WIDE, 2.5 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(head, fontsize=9)
    grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=[1] * columns + [0.55])
    for i, (title, metrics, curves) in enumerate(rows):
        lines = {}
        for j, (metric, name) in enumerate(metrics.items()):
            axis = figure.add_subplot(grid[i, j])
            for k, (label, seeds) in enumerate(curves[metric].items()):
                colour = colours.get(label, GREY) if k else GREY
                line = curve(axis, seeds, colour, lw=2.2 if k == 0 else 1.6)
                lines |= {label: line} if line else {}
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.25)
            axis.set_xlabel(x, fontsize=8)
            if j == 0:
                axis.set_ylabel(title, fontsize=11, fontweight="bold")
        beside = figure.add_subplot(grid[i, len(metrics) :])
        beside.set_axis_off()
        names = [wrapped(label, 20) for label in lines]
        beside.legend(lines.values(), names, loc="center left", fontsize=9, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def table(summaries, differences):
    """Markdown: a line an item, mean and span over the seeds, and the difference to the first on the same data."""

    def cell(v):
        if v is None:
            return ""
        if "mean" not in v:
            return ", ".join("never" if s is None else str(s) for s in v["seeds"])
        return f"{v['mean']:.3f} ({v['min']:.3f} to {v['max']:.3f})"

    heads = list(dict.fromkeys(head for s in summaries.values() for head in s))
    rows = [[name, *(cell(s.get(head)) for head in heads)] for name, s in summaries.items()]
    if differences:
        heads += ["against", *APART]
        rows = [[*row, differences.get(row[0], {}).get("against", ""), *apart(differences.get(row[0]))] for row in rows]
    return markdown(["", *heads], rows)


APART = ("difference, 95% interval", "verdict")


def apart(found):
    """An entry of compare.differences() -> its cells under APART; empty for a base."""
    if not found:
        return ["", ""]
    interval = "" if found["low"] is None else f" ({found['low']:+.3f} to {found['high']:+.3f})"
    return [f"{found['mean']:+.3f}{interval}", found["verdict"]]
