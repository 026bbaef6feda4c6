"""What a page of the atlas shows of a script's results: its claim, its curves, its gate, its picture, its section."""

import json
import re
import tomllib
from dataclasses import dataclass, field

from common import ROOT, figures
from runs import compare, pictures
from tests import pages

REFERENCE = ROOT / "runs" / "reference"
UNTRIED = "not tried yet"  # of a claim that claims.json does not know
VERDICTS = ("holds here", "no difference here", "the other way round here", "not tried", UNTRIED)
# What a claim compares -> the column of a curve, where it is not the same word.
COLUMNS = {"sampled": "accuracy", "greedy": "greedy_accuracy", "gold_reward": "win_rate"}
SHOWN = ("greedy_accuracy", "win_rate", "accuracy", "valid", "success", "kl")  # of a curve: the first that there is
LABELS = dict(pictures.ONLINE | pictures.PAIRS, valid="valid images", success="success", kl="KL")
SVG = {"svg.hashsalt": "atlas", "svg.fonttype": "path", "font.size": 9}
OWN, BASE = "#24527a", "0.6"


# What a claim's metric is, where its name alone does not say it.
METRICS = {
    "win_rate": "win rate against the start",
    "gold_reward": "true reward of the responses",
    "credit": "agreement of the tokens' rewards with their true worth",
    "chosen_shift": "log-prob of the chosen responses, after training less before",
    "+100%": "share of the bills with twice the tokens that are found",
    "k = 3": "share of the targets out of reach of three control characters",
    "AUC-DF": "area under accuracy over the share that the large model answers",
    "time at 0.1": "time per token, in calls of the target model, where a draft token costs a tenth of one",
    "distance, all": "distance of the next byte's law from the true one",
    "found before": "share of the searches that find a failure, before the checker is repaired",
}


@dataclass
class Curves:
    """Curves of a method and its base, a panel for each warm start."""

    record: str
    measure: str
    own: str
    """the item in blue"""
    base: str | None
    """the item in grey"""
    seeds: int
    panels: list = field(default_factory=list)
    """(title, own curve, the base's or None); a curve has points per seed"""


def claims(path=REFERENCE / "claims.json", written=ROOT / "runs" / "claims.toml"):
    """{script: its claim} of what is written down, with what was found, where it was tried, under "found"."""
    judged = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.exists() else {}
    said = tomllib.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    out = {}
    for name in [*said, *(n for n in judged if n not in said)]:
        found = judged.get(name) or {}
        out[name] = said.get(name, {}) | {k: found[k] for k in ("claim", "metric", "better", "why") if found.get(k)}
        out[name] |= dict(found=found or None, verdict=found.get("verdict", UNTRIED))
        out[name]["kind"] = ("holds", "none", "other", "untried", "untried")[VERDICTS.index(out[name]["verdict"])]
    return out


def records(folder=REFERENCE):
    """{name: record} of what runs.compare and runs.sweep have written into a folder."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    return {n: r for n, r in found.items() if isinstance(r, dict) and any(_items(r, kind) for kind in ("curves", "results"))}


def _items(record, kind):
    """{item: ...} of a record, where it has this kind."""
    of = record.get(kind)
    whole = isinstance(of, dict) and (kind == "curves" and "summary" in record or all("table" in x for x in of.values()))
    return of if whole else {}


def in_turn(claim, found):
    """[(name, record)]: the one that a claim names, then those of whole families, then by name."""
    first = (claim or {}).get("record")
    return sorted(found.items(), key=lambda pair: (pair[0] != first, "-" in pair[0], pair[0]))


def curves(name, base, claim, found):
    """-> Curves of the first record that has both sides, or None. Without a base or a claim the script is alone in it."""
    arms = (claim or {}).get("arms") or []
    arms = [pair[:2] for pair in (arms if arms and isinstance(arms[0], list) else [arms])]
    for record, of in in_turn(claim, found):
        items = _items(of, "curves")
        first = (claim or {}).get("first", [])[:2]  # of arms that start from others: these, if they are compared
        if len(arms[0]) == 2 and all(item in items for pair in arms for item in pair):
            pairs = arms
        elif len(first) == 2 and all(item in items for item in first):
            pairs = [first]
        else:
            pairs = _pairs(name, base, items, compare.data_of(of) if items else {})
        metric = str((claim or {}).get("metric", ""))
        wanted = COLUMNS.get(metric.split()[0] if metric else "", metric.removesuffix(" after"))
        for column in (wanted, *SHOWN):
            drawn = [[_points(items.get(item), column) for item in pair] for pair in pairs]
            if drawn and all(len(seed or ()) > 1 for pair in drawn for side in pair if side is not None for seed in side):
                own, data = pairs[0][1], compare.data_of(of)
                words = [key.split()[1] for key in of["summary"][own] if key.startswith("greedy ")]
                label = LABELS.get(column, column.replace("_", " ")).format(measure=(words or ["accuracy"])[0])
                panels = [(data.get(pair[1]) or "", mine, theirs) for pair, (theirs, mine) in zip(pairs, drawn)]
                return Curves(record, label, own, pairs[0][0], len(items[own]), panels)
    return None


def _pairs(name, base, items, data):
    """[(the base's item or None, the script's)] of a record, on the same data; the first of each."""
    mine = pages.items(items, name) or [i for i in items if compare.parts(i)[0] == name]
    theirs = pages.items(items, base) if base else []
    both = [(b, m) for m in mine for b in theirs if data.get(b) == data.get(m)]
    return both[:1] or ([(None, mine[0])] if mine and not base else [])


def _points(seeds, column):
    """Rows of a curve, a list a seed -> [[(step, number), ...]], or None where there are no rows."""
    return seeds and [[(row["step"], row[column]) for row in rows if column in row] for rows in seeds]


def table(name, claim, found):
    """-> (record, item, heads, rows) of the first record of results that has a script, or None: its table as text."""
    for record, of in in_turn(claim, found):
        for item, merged in _items(of, "results").items():
            if compare.parts(item)[0] == name:
                lines = [[cell.strip() for cell in line[2:-1].split(" | ")] for line in figures.table(merged).splitlines()]
                return record, item, lines[0], lines[2:]
    return None


def gates(path=REFERENCE / "gates.json", names=()):
    """-> (ratios, {script: {what is moved: {"+1" or "-1": [own push, push of later tokens]}}})."""
    if not path.exists():
        return [], {}
    record, out = json.loads(path.read_text(encoding="utf-8")), {}
    for title, of in record["gates"].items():
        script, how = None, {}
        for word in title.split(", "):
            if word in names:
                script = word
                how[script] = []
            elif script:
                how[script].append(word)
        for script, words in how.items():
            out.setdefault(script, {})[", ".join(words)] = of
    return record["ratios"], out


def draw_curves(found, path):
    """Draws Curves into an .svg file."""
    panels = found.panels
    figure, axes = _figure(len(panels), 1, 3.5 if len(panels) > 1 else 4.8, 2.7)
    for axis, (title, mine, theirs) in zip(axes, panels):
        if theirs:
            figures.curve(axis, theirs, BASE, lw=1.4)
        figures.curve(axis, mine, OWN, lw=1.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
    axes[0].set_ylabel(found.measure.partition(" on ")[0])
    _save(figure, path)


def draw_gate(ratios, mine, base, path):
    """Draws a script's gate into an .svg file, its base's in grey. `mine`, `base`: {what is moved: ...} as gates() has them."""
    figure, axes = _figure(2, len(mine), 3.5, 2.3)
    for row, (moved, signs) in enumerate(mine.items()):
        grey = base.get(moved) or next(iter(base.values()), None)
        for axis, (sign, (own, later)) in zip(axes[2 * row :], signs.items()):
            if grey:
                axis.plot(ratios, _numbers(grey[sign][0]), color=BASE, lw=2.6)
            axis.plot(ratios, _numbers(own), color=OWN, lw=1.6)
            if any(x is not None and abs(x - 1) > 1e-3 for x in later):
                axis.plot(ratios, _numbers(later), ":", color=OWN, lw=1.4)
            side = f"advantage {sign}".replace("-", "\N{MINUS SIGN}")
            axis.set_title(f"{side}, {moved}" if moved else side, fontsize=9)
            axis.axvline(1, color=BASE, lw=0.6)
            axis.set_xscale("log", base=2)
            axis.set_xticks([0.125, 0.25, 0.5, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
            axis.minorticks_off()
            axis.set_yscale("function", functions=(lambda y: y.clip(0) ** 0.5, lambda y: y**2))
            axis.set_yticks([0, 0.25, 1, 2, 4, 8], ["0", "1/4", "1", "2", "4", "8"])
            axis.set_ylim(0, 8.6)
            if row == len(mine) - 1:
                axis.set_xlabel("ratio")
        axes[2 * row].set_ylabel("push")
    _save(figure, path)


def _numbers(values):
    return [float("nan") if v is None else v for v in values]


def _figure(columns, rows, wide, high):
    """-> a figure and its axes, row by row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SVG):
        figure = Figure(figsize=(wide * columns, high * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path):
    """Writes a figure, the same bytes whenever it is the same."""
    from matplotlib import rc_context

    with rc_context(SVG):
        figure.savefig(path, metadata={"Date": None}, transparent=True)


def picture(name, folder=REFERENCE):
    """-> the file of a script's own picture, else of its run's, or None."""
    found = (folder / "panels" / f"{name}.png", folder / f"inference-{name}.png", folder / f"{name}.png")
    return next((path for path in found if path.exists()), None)


@dataclass
class Section:
    """A section of runs/reference/README.md."""

    title: str
    anchor: str
    text: str

    @property
    def commands(self):
        return " ".join(re.findall(r"^```\n(.*?)^```", self.text, re.M | re.S))


def sections(readme=REFERENCE / "README.md"):
    """The third-level sections of a page of results, in order."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    found = re.findall(r"^### (.+)\n((?:(?!^#{1,3} ).*\n?)*)", text, re.M)
    return [Section(title, re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"), body) for title, body in found]


def section(name, label, claim, found):
    """-> the section about a script: headed by its name, showing its picture, with its claim's record, or with its runs."""
    record = rf"/{(claim or {}).get('record', '-')}( |$)"
    tests = (
        lambda s: re.match(rf"{re.escape(label)}\b", s.title, re.I) and re.search(rf"\b{name}\b", s.text),
        lambda s: f"panels/{name}.png" in s.text or f"inference-{name}.png" in s.text,
        lambda s: re.search(record, s.commands, re.M),
        lambda s: re.search(rf"\b{name}\b", s.commands),
    )
    return next((s for test in tests for s in found if test(s)), None)


def alt(path, found):
    """What a page of results says of a picture, for who does not see it."""
    for s in found:
        if match := re.search(rf"!\[([^\]]+)\]\((?:panels/)?{re.escape(path.name)}\)", s.text):
            return match[1]
    return ""
