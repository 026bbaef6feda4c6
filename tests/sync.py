"""Keeps the scripts in step: what a script's `Differs from <base>.py in:` line does not name is byte-identical to the base.

python -m tests.sync            rewrites every script from its base, after the base has changed, and README's table
python -m tests.sync REVISION   the same for a change of the base since a git revision that is older than the last commit
python -m tests.sync --check    says what is out of step, changes nothing (the guard of tests/test_sync.py)
"""

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALGOS = ROOT / "algos"
OWN = re.compile(r"^    # [A-Z]", re.M)  # the heading above a method's own fields in Args


def scripts():
    """All scripts, bases before what differs from them."""
    found = {p.stem: p.read_text() for p in sorted(ALGOS.glob("*.py")) if p.name != "__init__.py"}

    def depth(name):
        base = differs(found[name])[0]
        return 0 if base is None or base not in found else 1 + depth(base)

    return sorted(found, key=lambda n: (depth(n), n))


def differs(text):
    """-> (base or None, names that may differ) from the docstring of a script's text."""
    match = re.search(r"^Differs from (\w+)\.py in: (.+(?:\n +.+)*)$", ast.get_docstring(ast.parse(text)) or "", re.M)
    return (match[1], [n.strip() for n in match[2].split(",")]) if match else (None, [])


def chunks(text):
    """A script as an ordered {name: lines}, each with the blank lines and comments above it: `docstring`, functions and
    classes by name, fields of Args by name, `own fields`, and anything else by its first line."""
    tree, lines, out, end = ast.parse(text), text.splitlines(keepends=True), {}, 0

    def put(name, last):
        nonlocal end
        assert name not in out, f"{name} twice"
        out[name] = "".join(lines[end:last])
        end = last

    for i, node in enumerate(tree.body):
        if i == 0 and isinstance(node, ast.Expr):
            put("docstring", node.end_lineno)
        elif isinstance(node, ast.ClassDef) and node.name == "Args":
            body = node.body
            put("Args", body[0].lineno - 1)
            for field, doc in zip(body[::2], body[1::2]):
                if OWN.search("".join(lines[end : field.lineno - 1])):
                    put("own fields", node.end_lineno)
                    break
                put(field.target.id, doc.end_lineno)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            put(node.name, node.end_lineno)
        else:
            put(lines[node.lineno - 1].strip(), node.end_lineno)
    if end < len(lines):
        put("end", len(lines))
    return out


def out_of_step(name, text, base_text):
    """Complaints, one a line, about a script's text against its base's."""
    base, allowed = differs(text)
    mine, theirs, complaints = chunks(text), chunks(base_text), []
    for chunk in [c for c in {**theirs, **mine} if c not in ("docstring", "own fields")]:
        if mine.get(chunk) != theirs.get(chunk) and chunk not in allowed:
            diff = difflib.unified_diff(
                theirs.get(chunk, "").splitlines(), mine.get(chunk, "").splitlines(), f"{base}.py", f"{name}.py", "", "", 0, ""
            )
            complaints.append(
                f"{name}.py: {chunk} differs from {base}.py and the docstring does not say so\n" + "\n".join(diff)
            )
    for chunk in allowed:
        if mine.get(chunk) == theirs.get(chunk):
            complaints.append(f"{name}.py: the docstring says that {chunk} differs from {base}.py, but it does not")
    shared = [c for c in mine if c in theirs]
    if shared != [c for c in theirs if c in mine]:
        complaints.append(f"{name}.py: its parts stand in another order than in {base}.py")
    return complaints


def changed_lines(text, base_text):
    """Added plus removed lines against the base, without docstring, own fields and blank lines."""
    sides = []
    for side in (base_text, text):
        kept = (t for c, t in chunks(side).items() if c not in ("docstring", "own fields"))
        sides.append("".join(kept).splitlines())
    rows = difflib.unified_diff(*sides, lineterm="", n=0)
    return sum(1 for r in rows if r[:1] in "+-" and r[:3] not in ("+++", "---") and r[1:].strip())


def merge(name, text, base_text, old_base_text):
    """The script's text with every unnamed part taken from the base, and the base's changes since `old_base_text` merged
    into the named parts. -> (text, conflicts)."""
    _, allowed = differs(text)
    mine, theirs, old = chunks(text), chunks(base_text), chunks(old_base_text)
    conflicts, out = [], []
    order = [c for c in mine]
    for i, chunk in enumerate(theirs):  # a part that is new in the base goes after its neighbour there
        if chunk not in mine and chunk not in allowed and chunk != "own fields":
            before = [c for c in list(theirs)[:i] if c in order]
            order.insert(order.index(before[-1]) + 1 if before else 0, chunk)
    for chunk in order:
        if chunk in ("docstring", "own fields") or (chunk in allowed and chunk not in theirs):
            out.append(mine[chunk])
        elif chunk not in allowed:
            out.append(theirs.get(chunk, ""))
        elif old.get(chunk) in (None, theirs[chunk]):
            out.append(mine[chunk])
        else:
            merged, clean = _three_way(mine[chunk], old[chunk], theirs[chunk])
            out.append(merged if clean else mine[chunk])
            conflicts += [] if clean else [f"{name}.py: {chunk} needs a hand: the base changed the same lines"]
    return "".join(out), conflicts


def _three_way(mine, old, theirs):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / n for n in ("mine", "old", "theirs")]
        for path, text in zip(paths, (mine, old, theirs)):
            path.write_text(text)
        done = subprocess.run(["git", "merge-file", "-p", *map(str, paths)], capture_output=True, text=True)
    return done.stdout, done.returncode == 0


def table():
    """README's table of methods."""

    def family(name):
        base = differs((ALGOS / f"{name}.py").read_text())[0]
        return family(base) if base else name

    rows = ["| script | paper | differs from | in | changed lines |", "|---|---|---|---|---|"]
    for name in sorted(scripts(), key=lambda n: (family(n) != "grpo", family(n), n != family(n), n)):
        text = (ALGOS / f"{name}.py").read_text()
        title = ast.get_docstring(ast.parse(text)).splitlines()[0].rstrip(".")
        title = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", title)
        base, names = differs(text)
        lines = changed_lines(text, (ALGOS / f"{base}.py").read_text()) if base else ""
        changed = ", ".join(f"`{n}`" for n in names)
        rows.append(f"| [`{name}`](algos/{name}.py) | {title} | {f'`{base}`' if base else 'a base'} | {changed} | {lines} |")
    return "\n".join(rows)


def readme(text):
    """README's text with its table of methods made anew."""
    return re.sub(r"(<!-- methods -->\n).*?(<!-- end -->)", lambda m: m[1] + table() + "\n" + m[2], text, flags=re.S)


def main(check, since="HEAD"):
    problems = []
    for name in scripts():
        path = ALGOS / f"{name}.py"
        text = path.read_text()
        base, _ = differs(text)
        if base is None:
            continue
        base_path = ALGOS / f"{base}.py"
        if not check:
            old = subprocess.run(["git", "show", f"{since}:algos/{base}.py"], capture_output=True, text=True, cwd=ROOT).stdout
            text, conflicts = merge(name, text, base_path.read_text(), old or base_path.read_text())
            path.write_text(text)
            problems += conflicts
        problems += out_of_step(name, text, base_path.read_text())
    page = ROOT / "README.md"
    if page.exists() and readme(page.read_text()) != page.read_text():
        if check:
            problems.append("README.md: its table of methods is not what python -m tests.sync makes")
        else:
            page.write_text(readme(page.read_text()))
    print("\n".join(problems) or "all scripts are in step")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv, *[a for a in sys.argv[1:] if not a.startswith("-")]))
