"""The pages about the scripts, and the verdicts in them."""

import json
import re

import pytest

from tests import pages, sync

BASE, SAPO = ((sync.ALGOS / f"{name}.py").read_text() for name in ("grpo", "sapo"))


def band(low, high):
    return dict(mean=(low + high) / 2, min=low, max=high)


@pytest.mark.parametrize(
    "mine, theirs, word",
    [
        ((0.8, 0.9), (0.6, 0.7), "better"),
        ((0.6, 0.7), (0.8, 0.9), "worse"),
        ((0.7, 0.9), (0.6, 0.7), "equal"),
        ((0.71, 0.72), (0.69, 0.70), "equal"),
        ((0.73, 0.73), (0.70, 0.70), "better"),
    ],
)
def test_compare(mine, theirs, word):
    assert pages.compare(band(*mine), band(*theirs)) == word


def results(folder, name, command, measure="win_rate", **summary):
    values = {item.replace("_at_", "@"): {measure: band(*v)} for item, v in summary.items()}
    (folder / f"{name}.json").write_text(json.dumps(dict(command=command, summary=values)))
    return pages.records(folder)


def test_verdicts(tmp_path):
    lesson = pages.Lesson("sapo", SAPO, "ratio", "grpo")
    greedy = dict(measure="greedy accuracy after", sapo=(0.9, 0.9), grpo=(0.8, 0.8))
    (tmp_path / "other.json").write_text(json.dumps([1]))
    assert pages.verdict(lesson, BASE, pages.records(tmp_path)) == "not compared"
    found = results(tmp_path, "a", "python -m runs.compare grpo sapo --seeds 3", **greedy)
    assert pages.verdict(lesson, BASE, found) == "better on route"
    found = results(tmp_path, "b", "... -- --task addition --eval-every=5", sapo=(0.5, 0.6), grpo=(0.8, 0.8))
    assert pages.verdict(lesson, BASE, found) == "better on route, worse on addition"
    found = results(tmp_path, "c", "... -- --lr 1e-3", sapo_at_route=(0.5, 0.6), grpo_at_route=(0.5, 0.6))
    assert pages.verdict(lesson, BASE, found).endswith("worse on addition, equal on route with --lr 1e-3")
    # what never ran without flags of its own is told with them
    (tmp_path / "c.json").unlink()
    flagged = {"sapo_at_route,lr=1,tau=2": (0.5, 0.5), "sapo_at_route,lr=2": (1, 1), "grpo_at_route": (0.8, 0.8)}
    found = results(tmp_path, "c", "... -- --epochs 2", **flagged)
    assert pages.verdict(lesson, BASE, found).endswith("worse on addition and route with --epochs 2 (lr=1, tau=2)")
    # other data, or another record: not compared; a base with flags is told
    (tmp_path / "a.json").unlink(), (tmp_path / "b.json").unlink()
    found = results(tmp_path, "c", "...", sapo_at_a=(1, 1), grpo_at_b=(0, 0), grpo=(0, 0))
    assert pages.verdict(lesson, BASE, found) == "not compared"
    found = results(tmp_path, "d", "...", **{"sapo_at_b,lr=1": (1, 1), "sapo_at_b": (1, 1), "grpo_at_b,lr=1": (0, 0)})
    assert pages.verdict(lesson, BASE, found) == "better on b (against grpo with flags of its own)"


def test_data_of_a_script():
    task, data = "    task: str | None = None\n", "    data: str | None = None\n"
    assert pages.setting("", task) == ("route", "") and pages.setting("", data) == ("letters", "")
    assert pages.setting("", '    task: str = "route"\n') == ("route", "")
    assert pages.setting("", task + "    batch_size: int\n") == ("addition", "")
    preset = '    tiny_preset = dict(\n        lr=1,\n        data="record",\n    )\n'
    assert pages.setting("", data + preset) == ("record", "")
    command = "python -m runs.compare dpo -- --data chain --lr 1e-3 --flag --eval-every=9"
    assert pages.setting(command, data) == ("chain", "--lr 1e-3 --flag")


def test_ten_to_read_first():
    names = "reinforce grpo dr_grpo dapo gspo sapo ppo dpo tdpo rto".split()
    assert list(pages.READING) == names and set(names) <= set(sync.scripts())
    texts = {name: (sync.ALGOS / f"{name}.py").read_text() for name in sync.scripts()}
    page = sync.written(texts)[sync.ALGOS / "README.md"].splitlines()
    start, end = page.index("## Ten to read first"), page.index("## All of them")
    rows = [row for row in page[start:end] if row[:1].isdigit()]
    assert start < end < min(i for i, row in enumerate(page) if row.startswith("- ["))
    for i, (name, row) in enumerate(zip(names, rows, strict=True), 1):
        assert row.startswith(f"{i}. [{name}]({name}.py): ") and row.endswith(".")
        assert ". " not in row.removeprefix(f"{i}. ")  # one sentence
        said, there = re.findall(r"`([^`]+)`", row), code(texts[name])
        assert said and [word for word in said if not re.search(rf"\b{re.escape(word)}\b", there)] == []


def code(text):
    """A script's text without its docstring."""
    return text.replace(sync.note(text), "", 1)


def test_pages_say_what_scripts_say(tmp_path):
    found = results(tmp_path, "a", "...", measure="greedy score after", sapo=(1, 1), grpo=(0, 0))
    lessons = {
        "grpo": pages.Lesson("grpo", BASE, "ratio"),
        "sapo": pages.Lesson("sapo", SAPO, "ratio", "grpo", ["surrogate"], {"gae": "ppo"}, 7),
        "far": pages.Lesson("far", SAPO, "tokens", "sapo", ["surrogate"], {}, 8),
    }
    counts = {"holds here": 1, "no difference here": 2, "the other way round here": 3, "not tried": 0}
    tried = dict(claims=dict(sapo=dict(verdict="holds here")), counts=counts)
    index = pages.index(lessons, found, tried).splitlines()
    assert index[0].startswith("*Written by `python -m tests.sync`, never by hand")
    ratio, tokens = index.index("## ratio"), index.index("## tokens")
    assert index[ratio + 2].startswith("- [grpo](grpo.py): Sample a group of completions per prompt")
    idea = "GRPO's clip is a cliff: a token counts fully until its ratio has left the interval in the direction of its "
    idea += "advantage, then not at all."
    changes = "Changes `surrogate`, `gae` as in [ppo](ppo.py); 7 lines; better on route. Its claim: holds here."
    assert index[ratio + 3] == f"  - [sapo](sapo.py): {idea} {changes}"
    assert index[tokens + 2] == "- from [sapo](sapo.py):"
    assert index[tokens + 3].startswith("  - [far](far.py): ")
    table = pages.table(lessons).splitlines()
    assert table[2] == "| ratio | [grpo](algos/grpo.py) | [sapo](algos/sapo.py) | 7 |"
    assert table[3] == "| tokens | [sapo](algos/sapo.py) | [far](algos/far.py) | 8 |"
    alone = dict(one=pages.Lesson("one", "Family: x\nStand-alone: it has no base", "x"))
    assert pages.table(alone).splitlines()[2] == "| x |  | [one](algos/one.py) | they stand alone |"
    page = "a\n<!-- families -->\nold\n<!-- end families -->\nb\n"
    made = ["a", "<!-- families -->", *table, "<!-- end families -->", "b"]
    assert pages.readme(page, lessons, None).splitlines() == made
    said = "[The central claim of every paper, tried in miniature](runs/reference/claims.md): of 6 claims, 1 holds here, "
    said += "2 show no difference here, 3 go the other way round here."
    assert pages.readme(page, lessons, tried).splitlines() == [*made[:2], said, "", *made[2:]]
    assert pages.readme("no block\n", lessons, None) == "no block\n"
