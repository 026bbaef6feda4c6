"""The default runs of all scripts, on scripts that do nothing."""

import json
import re

import pytest

from common import UserError
from runs import defaults, launch

SCRIPT = """import os, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True)
if hasattr(os, "sched_getaffinity"): assert len(os.sched_getaffinity(0)) == 1
with open("log", "a") as log: print(pathlib.Path(sys.argv[0]).stem, *sys.argv[1:-2], file=log)
print("first")
"""
GOOD = SCRIPT + "print('greedy a|b 0.1 -> {}')\n"
BAD = SCRIPT + "print('noise', file=sys.stderr)\nsys.exit('error: no such task')\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    for name, text in {"a": GOOD.format(0.5), "b": BAD, "c": GOOD.format(0.6), "__init__": ""}.items():
        write(tmp_path / "algos" / f"{name}.py", text)
    write(tmp_path / "common" / "worlds" / "game.py", "")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def ran(root):
    """What has been run since the last call."""
    log = root / "log"
    names = sorted(log.read_text().splitlines()) if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def test_who_runs_again_and_what_the_table_says(root, capsys):
    assert defaults.main(defaults.Options()) == 1
    assert ran(root) == ["a", "b", "c"]
    reference = root / "runs" / "reference"
    rows = json.loads((reference / "defaults.json").read_text())
    assert {s: (r["last_line"], r["exit_code"]) for s, r in rows.items()} == {
        "a": ("greedy a|b 0.1 -> 0.5", 0),
        "b": ("error: no such task", 1),
        "c": ("greedy a|b 0.1 -> 0.6", 0),
    }
    table = (reference / "defaults.md").read_text().splitlines()
    assert re.match(r"\| \[a\]\(../../algos/a.py\) \| greedy a\\\|b 0.1 -> 0.5 \| \d \| 0 \|", table[-3])  # seconds
    assert table[-2].endswith("| 1 |") and len(table) == 8
    assert table[-1] in capsys.readouterr().out
    assert defaults.main(defaults.Options(("a",))) == 0 and ran(root) == []  # it has ended well
    assert defaults.main(defaults.Options()) == 1 and ran(root) == ["b"]  # what failed is tried again
    write(root / "algos" / "b.py", GOOD.format(0.7))
    write(root / "algos" / "c.py", GOOD.format(0.8))
    assert defaults.main(defaults.Options(jobs=1)) == 0 and ran(root) == ["b", "c"]
    write(root / "common" / "worlds" / "game.py", "x = 1\n")
    assert defaults.main(defaults.Options(("c",))) == 0 and ran(root) == ["c"]
    (root / "algos" / "a.py").unlink()
    assert defaults.main(defaults.Options()) == 0 and ran(root) == ["b"]
    assert list(json.loads((reference / "defaults.json").read_text())) == ["b", "c"]
    assert "[a]" not in (reference / "defaults.md").read_text()


MISTAKES = [(dict(scripts=("x",)), "no script algos/x.py"), (dict(jobs=0), "--jobs")]


@pytest.mark.parametrize("options, complaint", MISTAKES)
def test_mistakes(root, options, complaint):
    with pytest.raises(UserError, match=complaint):
        defaults.main(defaults.Options(**options))
    assert ran(root) == [] and not (root / "runs").exists()
