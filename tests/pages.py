"""The pages that python -m tests.sync writes: algos/README.md and the table of families in README.md."""

import json
import re
import statistics
from dataclasses import dataclass, field

from runs import claims
from tests.parts import lines_of, measures, note, world

# Of a verdict: the first that there is.
MEASURES = ("greedy accuracy after", "greedy score after", "greedy return after", "win_rate")
MARGIN = 0.03  # means that are nearer to each other than this are equal, whatever the spans
PRESET = dict(task="route", data="letters", demonstrations="addition")  # the tiny model's, where a script has none of its own
HEAD = """*Written by `python -m tests.sync`, never by hand; the reading order stands in tests/pages.py.*

# The scripts

## Ten to read first

In this order a script needs only those before it. What to look at is named as it is in the script.

"""
# {script: what to look at in it}, in the order of reading. What stands between backticks is in the script.
READING = {
    "reinforce": "the baseline is the whole method: `returns` adds up the reward that is still to come, and "
    "`advantages` subtracts nothing from it, the mean over all tokens, or before that the group's mean "
    "(its `surrogate` is grpo's: leave it for the next).",
    "grpo": "the frame of all that follows: read `train` once from top to bottom, then the functions that "
    "make its loss; in `advantages` the group is its own baseline, in `surrogate` the `torch.min` takes the "
    "gradient from a token that has moved far enough in the direction of its advantage.",
    "dr_grpo": "two divisions fewer: hold the last lines of `advantages` (no division by `std`) and of "
    "`token_weights` (`args.max_new_tokens` where a completion's own length stood) against those of grpo.",
    "dapo": "four repairs in four places: `args.eps_high` in `surrogate`, `token_weights`, "
    "`overlong_penalty`, and in `train` the `while` that samples until enough groups are `informative`.",
    "gspo": "one ratio per completion: `mean` in `surrogate` is the mean log-ratio of its tokens, so that "
    "all of them are clipped or none is; `straight` has the same value, but each token's own gradient.",
    "sapo": "the clip made smooth: in `surrogate` a sigmoid, `gate`, stands where grpo clips and takes the "
    "minimum, and `gate_weight` says how much of a token's gradient is left.",
    "ppo": "credit for every token: `gae` goes backwards from the end and makes advantages out of rewards "
    "and values, which `Critic`, a second network with an optimizer of its own, learns by `value_loss`.",
    "dpo": "learning from pairs, without sampling: `pair_loss` sums the log-ratios to the reference over a "
    "response, and the difference of chosen and rejected, `z`, goes into a logistic loss.",
    "tdpo": "the KL at every token: `token_kl` takes it over the whole vocabulary, and where `pair_loss` "
    "sets `delta`, `args.alpha` and a `detach` are all that sets the second variant apart from the first.",
    "rto": "where the two families meet: `dpo_rewards` makes a reward per token out of DPO's log-ratio, "
    "`token_rewards` adds it to PPO's, and `gae` does the rest.",
}
LEGEND = """
## All of them

A script stands below its base and differs from it in what is named, and in nothing else. Lines are those
added and removed, without docstring, own flags, what is word for word in a third script, and functions that
only measure (counted apart); `python -m tests.sync sapo` prints them. *Better* and *worse*: the spans over the
seeds do not overlap and the means differ by 0.03 or more, in the greedy accuracy or score after training, for
pairs in the win rate against the start. All else is *equal*. On route all started from one warm start: to claim
a difference takes a second (`python -m runs.compare grpo@route:1 ...`). A paper's claim and how it was tried stand in
[claims.md](../runs/reference/claims.md).
"""


@dataclass
class Lesson:
    """What the pages say of a script."""

    name: str
    text: str
    family: str
    base: str | None = None
    parts: list = field(default_factory=list)  # in which it differs from its base
    copies: dict = field(default_factory=dict)  # {part: the third script where it stands word for word}
    lines: int = 0


def idea(said):
    """The first sentence of the Idea in a docstring."""
    match = re.search(r"^Idea: (.+?[.?!])(?=\s+[A-Z(]|\n\n|$)", said, re.M | re.S)
    sentence = " ".join(match[1].split()) if match else ""
    return sentence[:1].upper() + re.sub(r"([*<])", r"\\\1", sentence[1:])


def records(folder):
    """[(command, {item: {measure: numbers}})] of the results that runs.compare has written into a folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [r for r in found if isinstance(r, dict) and isinstance(r.get("summary"), dict)]
    return [(r.get("command") or "", r["summary"]) for r in found]


def setting(command, text):
    """A recorded command -> (the data of its items without @, its other flags that touch the training)."""
    flags, name = {}, ""
    for word in command.partition(" -- ")[2].replace("=", " ").split():
        if word.startswith("--"):
            name = word[2:]
            flags[name] = []
        else:
            flags[name].append(word)
    kind = "data" if re.search(r"^    data: ", text, re.M) else "task"
    default = re.search(rf"^    {kind}: .*= \"(\w+)\"$", text, re.M)
    default = default or re.search(rf"^    tiny_preset = dict\([^)]*?\b{kind}=\"(\w+)\"", text, re.M)
    preset = PRESET["demonstrations" if re.search(r"^    batch_size: ", text, re.M) else kind]
    data = " ".join(flags.pop(kind, [])) or (default[1] if default else preset)
    others = [f"--{name} {' '.join(values)}".strip() for name, values in flags.items() if name[:4] != "eval"]
    return data, " ".join(others)


def verdict(lesson, base_text, found):
    """better, worse or equal on which data, by what records() has found. Both sides stand in the same record
    and ran on the same data; a script that has flags of its own there is told with them."""
    words = {"better": [], "worse": [], "equal": []}
    for command, summary in found:
        sides = []
        for script, text in ((lesson.name, lesson.text), (lesson.base, base_text)):
            data, others = setting(command, text)
            sides.append({i.partition("@")[2] or data: i for i in items(summary, script)})
        sides[1] = {place.partition(",")[0]: i for place, i in sides[1].items()}
        after = f" with {others}" if others else ""
        for place, item in sides[0].items():
            data, _, own = place.partition(",")
            if data not in sides[1]:
                continue
            mine, theirs = summary[item], summary[sides[1][data]]
            said = data + after + (f" ({own.replace(',', ', ')})" if own else "")
            said += f" (against {lesson.base} with flags of its own)" if "," in sides[1][data] else ""
            for measure in [m for m in MEASURES if m in mine and m in theirs][:1]:
                words[compare(mine[measure], theirs[measure])].append(said)
    said = [f"{word} on {' and '.join(dict.fromkeys(data))}" for word, data in words.items() if data]
    return ", ".join(said) or "not compared"


def items(summary, script):
    """A script's items without flags of their own; where there are none the first on each data."""
    mine = [i for i in summary if re.fullmatch(rf"{script}(@.*)?", i)]
    first = {i.partition(",")[0]: i for i in reversed(mine)}.values()
    return [i for i in mine if "," not in i] or [i for i in mine if i in first]


def compare(mine, theirs):
    """Two measures, each {mean, min, max} over seeds -> better, worse or equal."""
    if abs(mine["mean"] - theirs["mean"]) < MARGIN - 1e-9:
        return "equal"
    if mine["min"] > theirs["max"]:
        return "better"
    return "worse" if mine["max"] < theirs["min"] else "equal"


def index(lessons, found, tried):
    """algos/README.md. `lessons`: {name: Lesson}; `found`: what records() gives; `tried`: what runs.claims has, or None."""
    first = [f"{i}. [{name}]({name}.py): {look}" for i, (name, look) in enumerate(READING.items(), 1)]
    out = [HEAD + "\n".join(first), LEGEND]

    def entry(lesson, depth):
        says = f"{'  ' * depth}- [{lesson.name}]({lesson.name}.py): {idea(note(lesson.text))}"
        if lesson.base:
            names = [f"`{part}`" for part in lesson.parts]
            names += [f"`{part}` as in [{other}]({other}.py)" for part, other in lesson.copies.items()]
            result = verdict(lesson, lessons[lesson.base].text, found)
            beside = {"that measure": measures(lesson.text), "of a world": world(lesson.text)}
            beside = "".join(f" and {lines_of(names, lesson.text)} {what}" for what, names in beside.items() if names)
            says += f" Changes {', '.join(names)}; {lesson.lines} lines{beside}; {result}."
        if tried and lesson.name in tried["claims"]:
            says += f" Its claim: {tried['claims'][lesson.name]['verdict']}."
        out.append(says)
        for child in below(lesson.name, lesson.family):
            entry(child, depth + 1)

    def below(base, family):
        children = [x for x in lessons.values() if (x.base, x.family) == (base, family)]
        return sorted(children, key=lambda x: x.name)

    for family in families(lessons):
        out.append(f"## {family}\n")
        for root in below(None, family):
            entry(root, 0)
        for base in [b for b in bases(lessons, family) if lessons[b].family != family]:
            out.append(f"- from [{base}]({base}.py):")
            for child in below(base, family):
                entry(child, 1)
        out.append("")
    return "\n".join(out)


def families(lessons):
    """Names of the families, the largest first."""
    names = [x.family for x in lessons.values()]
    return sorted(set(names), key=lambda n: (-names.count(n), n))


def bases(lessons, family):
    """Scripts that those of a family differ from, the most frequent first."""
    names = [x.base for x in lessons.values() if x.family == family and x.base]
    return sorted(set(names), key=lambda n: (-names.count(n), n))


def table(lessons):
    """README's table of families."""

    def links(names):
        return ", ".join(f"[{n}](algos/{n}.py)" for n in names)

    rows = ["| family | base | methods | changed lines, median |", "|---|---|---|---|"]
    for family in families(lessons):
        members = sorted((x for x in lessons.values() if x.family == family), key=lambda x: x.name)
        alone = [x for x in members if "\nStand-alone: " in x.text]
        methods = [x for x in members if x.base or x in alone]
        roots = [x.name for x in members if not x.base and x not in alone]
        roots += [b for b in bases(lessons, family) if lessons[b].family != family]
        lines = [x.lines for x in methods if x.base]
        median = f"{statistics.median(lines):g}" if lines else "they stand alone"
        rows.append(f"| {family} | {links(roots)} | {links(x.name for x in methods)} | {median} |")
    return "\n".join(rows)


def readme(text, lessons, tried):
    """README's text with its table of families made anew, where it has the place for it, below what has become of the papers'
    claims. `tried`: what runs.claims has recorded, or None."""
    block = r"(<!-- families -->\n).*?(<!-- end families -->)"
    said = "[The central claim of every paper, tried in miniature](runs/reference/claims.md): "
    above = f"{said}{claims.sentence(tried['counts']).lower()}\n\n" if tried else ""
    return re.sub(block, lambda m: m[1] + above + table(lessons) + "\n" + m[2], text, flags=re.S)
