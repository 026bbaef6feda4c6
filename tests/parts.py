"""What a script says of itself, its parts, and in how many lines two scripts differ."""

import ast
import difflib
import functools
import re

OWN = re.compile(r"^    # [A-Z]", re.M)  # the heading above a method's own fields in Args
LOOPS = ("train", "main")
UNCOMPARED = ("docstring", "own fields")


@functools.cache
def note(text):
    """The docstring of a script's text."""
    return ast.get_docstring(ast.parse(text)) or ""


def differs(text):
    """-> (base or None, names of the parts that may differ from it), by the line `Differs from`."""
    match = re.search(r"^Differs from (\w+)\.py in: (.+(?:\n +.+)*)$", note(text), re.M)
    return (match[1], [n.strip() for n in match[2].split(",")]) if match else (None, [])


def same(text):
    """{part: the script where it stands word for word}, by the lines `Same as`."""
    rows = re.findall(r"^Same as (\w+)\.py: (.+(?:\n +.+)*)$", note(text), re.M)
    return {n.strip(): script for script, names in rows for n in names.split(",")}


def measures(text, line="Measures"):
    """Names of the parts that only look and never touch the training, by the line `Measures`."""
    match = re.search(rf"^{line}: (.+(?:\n +.+)*)$", note(text), re.M)
    return [n.strip() for n in match[1].split(",")] if match else []


def world(text):
    """Names of the parts that are a task or an environment of the script's own, by the line `World`."""
    return measures(text, "World")


def apart(text):
    """Names of the parts that are no part of the lesson."""
    return (*UNCOMPARED, *same(text), *measures(text), *world(text))


def family(text):
    """The family, or None."""
    match = re.search(r"^Family: (\w[\w -]*)$", note(text), re.M)
    return match[1] if match else None


def chunks(text):
    """A script as an ordered {name: lines}, each with the blank lines and comments above it: `docstring`,
    functions and classes by name, fields of Args and assignments between them by name, `own fields` from the
    method's heading to the end of Args, and anything else by its first line."""
    tree, lines, out, end = ast.parse(text), text.splitlines(keepends=True), {}, 0

    def put(name, last):
        nonlocal end
        if name in out:
            raise ValueError(f"two parts have the name {name}")
        out[name] = "".join(lines[end:last])
        end = last

    def put_args(node):
        fields = []  # each with the last line of the text below it
        for statement in node.body:
            if not is_text(statement):
                fields.append((statement, statement.end_lineno))
            elif fields:
                fields[-1] = (fields[-1][0], statement.end_lineno)
        put("Args", fields[0][0].lineno - 1 if fields else node.end_lineno)
        for field, last in fields:
            if OWN.search("".join(lines[end : field.lineno - 1])):
                put("own fields", node.end_lineno)
                return
            put(name_of(field, lines), last)

    for i, node in enumerate(tree.body):
        if i == 0 and is_text(node):
            put("docstring", node.end_lineno)
        elif isinstance(node, ast.ClassDef) and node.name == "Args":
            put_args(node)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            put(node.name, node.end_lineno)
        else:
            put(lines[node.lineno - 1].strip(), node.end_lineno)
    if end < len(lines):
        put("end", len(lines))
    return out


def is_text(node):
    """Is a statement nothing but a string?"""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def name_of(node, lines):
    """Name of a statement in the body of Args."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if isinstance(target, ast.Name):
        return target.id
    return getattr(node, "name", lines[node.lineno - 1].strip())


def split(chunk):
    """-> (blank lines and comments above a part, the part itself)."""
    above = re.match(r"(?:[ \t]*(?:#.*)?\n)*", chunk).end()
    return chunk[:above], chunk[above:]


def difference(theirs, mine, *names):
    """The changed lines of two texts, without context; names: of theirs and mine."""
    rows = difflib.unified_diff(theirs.splitlines(), mine.splitlines(), *names, n=0, lineterm="")
    return "\n".join(rows)


def changes(text, base_text):
    """{part: its added and removed lines against the base}, without docstring, own fields, copies of a third
    script, what only measures, a world, and blank lines; an empty line where lines are left out."""
    skipped, out = apart(text), {}

    def numbered(script):
        return [(p, line) for p, c in chunks(script).items() if p not in skipped for line in c.splitlines()]

    theirs, mine = numbered(base_text), numbered(text)
    lines = [[line for _, line in side] for side in (theirs, mine)]
    for tag, i, j, k, n in difflib.SequenceMatcher(None, *lines).get_opcodes():
        rows = [(part, f"-{line}") for part, line in theirs[i:j]]
        rows += [(part, f"+{line}") for part, line in mine[k:n]]
        touched = []
        for part, row in rows if tag != "equal" else ():
            if row[1:].strip():
                out.setdefault(part, [])
                out[part] += [""] * (bool(out[part]) and part not in touched) + [row]
                touched.append(part)
    return out


def changed_lines(text, base_text):
    """-> (all changed lines of a script, those inside its loop)."""
    counts = {part: sum(map(bool, rows)) for part, rows in changes(text, base_text).items()}
    return sum(counts.values()), sum(counts.get(loop, 0) for loop in LOOPS)


def lines_of(names, text):
    """Lines of these parts of a script, without blank ones."""
    parts = [chunk for part, chunk in chunks(text).items() if part in names]
    return sum(bool(line.strip()) for part in parts for line in part.splitlines())
