"""Results of scripts that train no policy, {table, panels}, their table and their picture; of one run or of several seeds.

table {row: {column: number or None}}; panels: a list of dicts with title, kind, x, y (what is on the axes) and `of`, by kind
    lines {label: [[x, y], ...]}   points: the same, as dots       bars {label: number}
    heat {row: {column: number}}   tokens {label: [[text, number from 0 to 1], ...]}
A panel with diagonal=True has y = x as a dotted line."""

import json
import statistics
import textwrap

WIDE, DPI = 10.6, 110  # inches: as wide as a page shows a picture


def pyplot():
    """matplotlib.pyplot, writing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def curve(axis, seeds, colour, **look):
    """Mean and band of a curve as far as all seeds go; nothing where a seed has no point. -> its line."""
    n = min(map(len, seeds))
    if not n:
        return None
    xs = [x for x, _ in seeds[0][:n]]
    values = list(zip(*([y for _, y in points[:n]] for points in seeds)))
    axis.fill_between(xs, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, lw=0)
    return axis.plot(xs, [statistics.mean(v) for v in values], color=colour, **look)[0]


def wrapped(label, width):
    """A label on several lines, broken at its commas."""
    return "\n".join(textwrap.wrap(label.replace(",", ", "), width, break_long_words=False)).replace(", ", ",")


def markdown(heads, rows):
    """A table of cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def publish(folder, results):
    """Writes results.json and picture.png into a run's folder, and prints the table."""
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    found = merge([results])
    draw({"": found}, folder / "picture.png")
    print(table(found), flush=True)


def merge(runs):
    """[results, one a seed] -> the same, with a list of numbers, one a seed, for every number of the table, and a list of what
    each seed has for every label of a panel, of tokens the first seed's. KeyError where seeds have other rows or labels."""
    first = runs[0]
    rows = {r: {c: [run["table"][r][c] for run in runs] for c in columns} for r, columns in first["table"].items()}
    panels = []
    for i, p in enumerate(first["panels"]):
        shown = runs[:1] if p["kind"] == "tokens" else runs
        panels.append(p | dict(of={k: [run["panels"][i]["of"][k] for run in shown] for k in p["of"]}))
    return dict(table=rows, panels=panels)


def table(found):
    """Markdown of merged results: mean, and least and greatest where there are several seeds."""

    def cell(values):
        if values is None or None in values:
            return "not defined" if values else ""
        mean, low, high = (f"{x:.3f}" if x == 0 or abs(x) >= 5e-4 else f"{x:.0e}"
                           for x in (statistics.mean(values), min(values), max(values)))  # fmt: skip
        return f"{mean} ({low} to {high})" if len(values) > 1 else mean

    heads = list(dict.fromkeys(c for columns in found["table"].values() for c in columns))
    return markdown(["", *heads], [[row, *(cell(of.get(c)) for c in heads)] for row, of in found["table"].items()])


def draw(items, path):
    """The picture of {title: merged results}: the panels of each below its title, tokens across the whole width."""
    plt = pyplot()
    plans = []  # (item's title or "", panels beside each other)
    for title, found in items.items():
        small = [p for p in found["panels"] if p["kind"] != "tokens"]
        rows = [small[i : i + 3] for i in range(0, len(small), 3)] + [[p] for p in found["panels"] if p["kind"] == "tokens"]
        plans += [(title if i == 0 else "", row) for i, row in enumerate(rows)]
    widest = max((len(row) for _, row in plans if row[0]["kind"] != "tokens"), default=1)
    heights = [2.9 if row[0]["kind"] != "tokens" else 0.35 + 0.28 * _lines(row[0]) for _, row in plans]
    figure = plt.figure(figsize=(WIDE, sum(heights) + 0.3), layout="constrained")
    parts = figure.subfigures(len(plans), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, row) in zip(parts, plans):
        if title:
            part.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
        columns = 1 if row[0]["kind"] == "tokens" else widest
        for axis, panel in zip(part.subplots(1, columns, squeeze=False)[0], [*row, *[None] * (columns - len(row))]):
            _panel(axis, panel) if panel else axis.set_axis_off()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _panel(axis, panel):
    of, kind = panel["of"], panel["kind"]
    axis.set_title(wrapped(panel["title"], 110 if kind == "tokens" else 44), fontsize=9, parse_math=False)
    if kind == "tokens":
        return _tokens(axis, of)
    colours = dict(zip(of, pyplot().get_cmap("tab10").colors * 3))
    if kind in ("lines", "points"):
        for label, seeds in of.items():
            marks = dict(marker="o", ms=3) if len(seeds[0]) < 30 else {}
            same = kind == "lines" and all([x for x, _ in s] == [x for x, _ in seeds[0]] for s in seeds)
            if same:
                curve(axis, seeds, colours[label], lw=1.5, label=label, **marks)
                continue
            for i, s in enumerate(seeds):  # seeds whose points lie elsewhere
                look = dict(lw=1.0, ms=3, marker="o") if kind == "lines" else dict(ls="", marker="o", ms=3.5)
                axis.plot(*zip(*s), color=colours[label], label=label if i == 0 else None, alpha=0.8, **look)
        if len(of) > 1:
            axis.legend(fontsize=7, framealpha=0.6)
    elif kind == "bars":
        for i, values in enumerate(of.values()):
            axis.barh(i, statistics.mean(values), color="0.75")
            axis.plot(values, [i] * len(values), ls="", marker="o", ms=3, color="tab:blue")
        axis.set_yticks(range(len(of)), [wrapped(label, 26) for label in of])
        axis.invert_yaxis()
    else:
        columns = list(next(iter(of.values()))[0])
        values = [[statistics.mean(s[c] for s in seeds) for c in columns] for seeds in of.values()]
        axis.imshow(values, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(of)), list(of))
        middle = (max(map(max, values)) + min(map(min, values))) / 2
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                axis.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=7, color="white" if v < middle else "black")
    if panel.get("diagonal"):
        axis.axline((0, 0), slope=1, ls=":", color="black", lw=0.9)
    axis.set_xlabel(panel.get("x", ""), fontsize=8)
    axis.set_ylabel(panel.get("y", ""), fontsize=8)
    axis.tick_params(labelsize=7)
    if kind != "heat":
        axis.grid(alpha=0.25)


ACROSS = 88  # characters in a line of tokens


def _broken(tokens):
    """[[text, number], ...] -> lines of them, none longer than ACROSS characters."""
    lines, used = [[]], 0
    for text, number in tokens:
        if used + len(text) > ACROSS and lines[-1]:
            lines, used = [*lines, []], 0
        lines[-1].append((text, number))
        used += len(text)
    return lines


def _lines(panel):
    """Lines that a panel of tokens takes: of the first seed."""
    return sum(len(_broken(seeds[0])) for seeds in panel["of"].values())


def _tokens(axis, of):
    """Tokens on a ground that is the darker the greater their number, a line or more for each label; of the first seed."""
    axis.set_xlim(0, ACROSS + 22)
    axis.set_ylim(sum(len(_broken(seeds[0])) for seeds in of.values()), 0)
    axis.set_axis_off()
    ground, y = pyplot().get_cmap("Oranges"), 0
    look = dict(fontsize=7, family="monospace", ha="center", va="center")
    for label, seeds in of.items():
        axis.text(21, y + 0.5, label[:28], fontsize=7, ha="right", va="center", color="0.3", parse_math=False)
        for line in _broken(seeds[0]):
            x = 22
            for text, number in line:
                shown = text.replace("\n", "\u21b5")
                axis.add_patch(pyplot().Rectangle((x, y + 0.06), len(shown), 0.88, color=ground(0.75 * number), lw=0))
                axis.text(x + len(shown) / 2, y + 0.5, shown, parse_math=False, **look)
                x += len(shown)
            y += 1
