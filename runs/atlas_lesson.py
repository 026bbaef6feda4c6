"""What a page of the atlas says of a script: its docstring as text, and its code beside its base's, part by part."""

import functools
import html
import itertools
import re
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from tests import parts

STYLES = dict(light="xcode", dark="github-dark")  # of Pygments; their colours can be read on a changed line's ground
CONTEXT = 3  # unchanged lines that stay in sight above and below a changed one
# Rulers of a script without a base; what stands below them is open on its page.
OPEN = ("the objective", "the rule", "the score", "the judges", "the search")
FIELD = re.compile(r"^(Family|Differs from \w+\.py in|Same as \w+\.py|Measures|World|Base|Stand-alone|Costs|Run): +(.*)$")
ABOVE = re.compile(r"\s*(?:# -{9,} .*)?$")  # blank lines and rulers, which a part begins with
COMMAND = re.compile(r"^(?:python|torchrun|\w+=)")
LEXER, FORMATTER = PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True)
UNSTYLED = re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>')  # half of what Pygments writes, and without a colour


@dataclass
class Note:
    """A docstring, taken apart; texts are HTML."""

    label: str
    """what the method is called"""
    title: str
    """of the paper, short and plain"""
    cite: str
    arxiv: list
    blocks: list = field(default_factory=list)
    """("heading", "p" or "pre", text) in order"""
    fields: dict = field(default_factory=dict)
    runs: list = field(default_factory=list)
    """(command, what is said of it)"""


def prose(text, names=()):
    """Plain text -> HTML: arXiv ids and scripts as links, flags and what stands between backticks as code."""
    out = html.escape(text, quote=False)
    out = re.sub(r"`([^`]+)`", r"<code>\1</code>", out)
    out = re.sub(r"(?<![\w>-])(--[a-z][\w-]*)", r"<code>\1</code>", out)
    out = re.sub(r"arXiv:? (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv&nbsp;\1</a>', out)
    return re.sub(r"\b(\w+)\.py\b", lambda m: f'<a href="{m[1]}.html">{m[0]}</a>' if m[1] in names else m[0], out)


def read(text, names=()):
    """A script's text -> its Note. `names`: of the scripts that have a page."""
    said = parts.note(text)
    above, _, below = said.partition("\n\nFamily: ")
    head, *paragraphs = above.split("\n\n")
    head = " ".join(head.split())
    label, rest = re.match(r"((?:Dr\. )?[^.:\"]+)[:.] (.*)", head).groups()
    quoted = re.search(r'"([^"]+)"', rest)
    title = quoted[1] if quoted else re.split(r"\. |, arXiv", rest)[0]
    title = title.removeprefix(f"{label}: ")
    cite = re.sub(r'(?<!=)"([^"<>]+)"(?!>)', r"<cite>\1</cite>", prose(rest, names))
    note = Note(label, title[:1].upper() + title[1:], cite[:1].upper() + cite[1:], re.findall(r"\d{4}\.\d{5}", head))
    seen = set()
    for paragraph in paragraphs:
        heading = "Idea" if paragraph.startswith("Idea: ") else "Notes" if "Formulas" in seen else ""
        heading = "Formulas" if not heading and "\n    " in paragraph else heading
        lines = paragraph.removeprefix("Idea: ").splitlines()
        for indented, run in itertools.groupby(lines, lambda line: line.startswith("    ")):
            words = [line[4:] if indented else line for line in run]
            shown = html.escape("\n".join(words), quote=False) if indented else prose(" ".join(words), names)
            shown = shown if indented else shown[:1].upper() + shown[1:]
            note.blocks.append(("" if heading in seen else heading, "pre" if indented else "p", shown))
            seen.add(heading)
    _fields(note, "Family: " + below, names)
    return note


def _fields(note, below, names):
    """Fills in fields and runs from the last paragraph of a docstring."""
    key = None
    for line in below.splitlines():
        if match := FIELD.match(line):
            key = match[1]
            line = match[2]
        line = line.strip()
        if key != "Run":
            note.fields[key] = f"{note.fields[key]} {line}" if key in note.fields else line
        elif COMMAND.match(line):
            note.runs.append(re.match(r"(.+?)(?:\s{2,}(.*))?$", line).groups(""))
        else:
            command, said = note.runs.pop()
            note.runs.append((command, f"{said} {line}"))
    for name in ("Costs", "Base", "Stand-alone"):
        if name in note.fields:
            note.fields[name] = prose(note.fields[name][:1].upper() + note.fields[name][1:], names)


@functools.cache
def highlighted(chunk):
    """A part of a script -> its lines as HTML, as many as it has."""
    lines = UNSTYLED.sub(r"\1", highlight(chunk, LEXER, FORMATTER)).split("\n")
    return lines[: len(chunk.splitlines())]


@dataclass
class Segment:
    """Neighbouring parts of a script that are shown alike."""

    state: str
    """same, changed, or apart (no part of the lesson)"""
    names: list
    note: str = ""
    other: str = ""
    """the script that this is word for word"""
    function: bool = True
    pieces: list = field(default_factory=list)
    """of a changed one: ("rows", base's lines, own lines) or ("fold", lines); a line is (HTML, "same", "changed" or "pad")"""
    code: list = field(default_factory=list)
    """of any other: its lines as HTML"""
    open: bool = False

    @property
    def title(self):
        """What a fold is called where that is no name of a part."""
        if self.names == ["own fields"]:
            return "Its own flags"
        if self.names[-1].startswith("if __name__"):
            return "Where it starts"
        return "" if self.fields else "Imports"

    @property
    def fields(self):
        """Names of the parts, without imports and the head of Args."""
        return [name for name in self.names if name.isidentifier() and name != "Args"]


def anchor(name):
    """A part's name -> the id of its place on the page."""
    return "part-" + re.sub(r"\W+", "-", name).strip("-")


def is_function(chunk):
    """Is a part a function or a class, and not a field, an import or the head of Args?"""
    return bool(re.match(r"(?:@.*\n)*(?:def|class) (?!Args\b)", parts.split(chunk)[1]))


def order(mine, theirs):
    """Names of the parts of two scripts: the first one's order, what only the second has before what followed it there."""
    out, left = [], list(theirs)
    for name in mine:
        if name in left:
            at = left.index(name)
            out += [n for n in left[:at] if n not in mine]
            left = left[at + 1 :]
        out.append(name)
    return out + [n for n in left if n not in mine]


def marked(text, base_text):
    """-> {(part, line)} of the base that are gone, and of the script that are new: the lines of tests.parts.changes()."""
    skipped, found = parts.apart(text), (set(), set())

    def numbered(script):
        kept = [(part, chunk) for part, chunk in parts.chunks(script).items() if part not in skipped]
        return [(part, i, line) for part, chunk in kept for i, line in enumerate(chunk.splitlines())]

    sides = numbered(base_text), numbered(text)
    for tag, i, j, k, n in SequenceMatcher(None, *[[line for *_, line in side] for side in sides]).get_opcodes():
        if tag != "equal":
            for side, place, (start, end) in zip(sides, found, ((i, j), (k, n))):
                place |= {(part, number) for part, number, line in side[start:end] if line.strip()}
    return found


def beside(left, right, gone, new):
    """Two lists of lines, numbers of those that are gone and new -> rows of (number left or None, number right or None): what
    is the same in both is level, as far as can be."""
    kept = [i for i in range(len(left)) if i not in gone], [j for j in range(len(right)) if j not in new]
    lines = [left[i] for i in kept[0]], [right[j] for j in kept[1]]
    blocks = SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks()
    level = [(kept[0][of.a + k], kept[1][of.b + k]) for of in blocks for k in range(of.size)]
    rows, i, j = [], 0, 0
    for a, b in [*level, (len(left), len(right))]:
        rows += itertools.zip_longest(range(i, a), range(j, b))
        rows += [(a, b)] * (a < len(left))
        i, j = a + 1, b + 1
    return rows


def pieces(part, base_chunk, chunk, gone, new):
    """A part of both scripts -> the pieces of a Segment: changed lines with their context, and what is folded between."""
    left, right = base_chunk.splitlines(), chunk.splitlines()
    shown = highlighted(base_chunk), highlighted(chunk)
    out = {i for p, i in gone if p == part}, {i for p, i in new if p == part}
    # A part's own ruler and blank lines above it are left out: on one side alone they would push that side down.
    starts = [
        next((n for n, text in enumerate(side) if n in of or not ABOVE.match(text)), 0) for side, of in zip((left, right), out)
    ]
    a, b = starts
    rows = beside(left[a:], right[b:], {n - a for n in out[0]}, {n - b for n in out[1]})
    rows = [(n if n is None else n + a, m if m is None else m + b) for n, m in rows]

    def line(n, side):
        if n is None:
            return ("", "pad")
        return (shown[side][n], "changed" if n in out[side] else "same")

    touched = [any(n in of for n, of in zip(row, out)) for row in rows]
    near = [any(touched[max(0, i - CONTEXT) : i + CONTEXT + 1]) for i in range(len(rows))]
    found = []
    for is_near, run in itertools.groupby(zip(near, rows), lambda pair: pair[0]):
        run = [row for _, row in run]
        if is_near or len(run) < 4 or not any(near):
            both = [[line(row[side], side) for row in run] for side in (0, 1)]
            if found and found[-1][0] == "rows":
                both = [a + b for a, b in zip(found.pop()[1:], both)]
            found.append(("rows", *both))
        else:
            found.append(("fold", [shown[1][j] if j is not None else shown[0][i] for i, j in run]))
    return found


def lesson(text, base_text=None):
    """A script's Segments, in order, without the docstring; neighbours that are no functions are one."""
    mine, theirs = parts.chunks(text), parts.chunks(base_text) if base_text else {}
    third, measures, world = parts.same(text), parts.measures(text), parts.world(text)
    gone, new = marked(text, base_text) if base_text else (set(), set())
    out, ruler = [], ""
    for part in order(mine, theirs):
        chunk = mine.get(part, theirs.get(part))
        ruler = (re.findall(r"^# -{3,} (.+)$", chunk, re.M) or [ruler])[-1]
        if part == "docstring" or part == "own fields" and part not in mine:
            continue
        said = "word for word as in" * (part in third) or "only looks, never touches the training" * (part in measures)
        said = said or "a task of its own" * (part in world)
        state = "same" if not base_text or mine.get(part) == theirs.get(part) else "changed"
        state = "apart" if said or part == "own fields" else state
        function = is_function(chunk) or part == "own fields"
        segment = Segment(state, [part], said, third.get(part, ""), function)
        if state == "changed":
            segment.pieces = pieces(part, theirs.get(part, ""), mine.get(part, ""), gone, new)
            said = "" if part in mine and part in theirs else "new" if part in mine else "gone"
            segment.note = said
        else:
            above = list(itertools.takewhile(ABOVE.match, chunk.splitlines()))
            segment.code = highlighted(chunk)[len(above) :]
        segment.open = not base_text and state == "same" and function and any(ruler.startswith(name) for name in OPEN)
        if out and not function and not out[-1].function and (out[-1].state, out[-1].note) == (state, segment.note):
            out[-1].names.append(part)
            out[-1].code += segment.code
            out[-1].pieces += segment.pieces
        else:
            out.append(segment)
    return out
