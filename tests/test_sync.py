"""The guard itself, and that it bites."""

import pytest

from tests import parts, sync

TEXTS = {name: (sync.ALGOS / f"{name}.py").read_text() for name in sync.scripts()}
BASE, SAPO = TEXTS["grpo"], TEXTS["sapo"]


def fields(*lines):
    """A script with these lines in its Args."""
    body = [f"    {line}".rstrip() for line in lines]
    return "\n".join(['"""A script."""', "", "class Args:", *body, ""])


@pytest.mark.parametrize("name", TEXTS)
def test_in_step(name):
    complaints = sync.problems(name, TEXTS)
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)


def test_every_exception_is_one_of_a_script():
    assert set(sync.EXCEPTIONS) <= set(TEXTS)
    assert all(reason for _, _, reason in sync.EXCEPTIONS.values())


def test_pages_are_current():
    assert sync.stale(TEXTS) == []


@pytest.mark.parametrize("name", TEXTS)
def test_chunks_cover_the_file(name):
    assert "".join(sync.chunks(TEXTS[name]).values()) == TEXTS[name]


def test_chunks_of_a_base():
    names = {"docstring", "Args", "model", "own fields", "advantages", "surrogate", "token_weights", "train"}
    assert names <= set(sync.chunks(BASE))


def test_chunks_of_args():
    shared = ("lr: float = 1", '"""rate"""', "limits = dict(", "    lr=1,", ")", "seed: int = 1", "", "n = 2")
    own = ("", "# OURS", "tiny_preset = dict(lr=2)", "eps: float = 0.2")
    text = fields(*shared, *own) + "\n\ndef f():\n    pass\n"
    found = sync.chunks(text)
    assert "".join(found.values()) == text
    assert list(found) == ["docstring", "Args", "lr", "limits", "seed", "n", "own fields", "f"]
    assert found["limits"] == "    limits = dict(\n        lr=1,\n    )\n"
    assert found["seed"] == "    seed: int = 1\n" and "eps" in found["own fields"]
    # a text of the class itself, a body without fields
    assert list(sync.chunks(fields('"""of Args"""', "lr: float = 1.0"))) == ["docstring", "Args", "lr"]
    assert list(sync.chunks(fields("pass"))) == ["docstring", "Args", "pass"]
    with pytest.raises(ValueError, match="two parts have the name lr"):
        sync.chunks(fields("lr: float = 1.0", "lr = 2"))


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("(lengths > 0).sum()", "(lengths >= 0).sum()", "token_weights differs"),
        ('model: str = "tiny"', 'model: str = "small"', "model differs"),
        ("class Args:\n", "class Args:\n    limits = dict(lr=1)\n", "limits differs"),
        ("def train(args):\n", "def train(args):\n    pass\n", "train differs"),
        ("def kl_penalty", "def helper():\n    pass\n\n\ndef kl_penalty", "helper differs"),
        ("import torch\n", "import torch as t\n", "import torch as t differs"),
        ("in: surrogate", "in: surrogate, advantages", "says that advantages differs"),
        ("Differs from grpo.py", "Differs from grop.py", "there is no base grop.py"),
        ("Differs from grpo.py in: surrogate", "", "needs a line 'Differs from <base>.py in:', 'Base:'"),
        ("Family: ratio\n", "", "needs a line 'Family: ...'"),
        ("Costs: ", "Takes: ", "needs a line 'Costs: ...'"),
        ("Run: ", "Start: ", "needs a line 'Run: ...'"),
        ("Idea: ", "Thought: ", "needs an 'Idea: ...'"),
        ("in: surrogate", "in: surrogate\nSame as grpo.py: surrogate", "surrogate is not the same as in"),
        ("in: surrogate", "in: surrogate\nSame as ppo.py: gae", "same as in ppo.py, but sapo.py has none"),
        ("in: surrogate", "in: surrogate\nSame as popo.py: advantages", "but popo.py has none"),
    ],
)
def test_the_guard_bites(old, new, complaint):
    assert old in SAPO
    found = sync.problems("sapo", TEXTS | {"sapo": SAPO.replace(old, new, 1)})
    assert any(complaint in f for f in found), found


def test_a_script_needs_a_test():
    assert sync.unwritten("nothing", SAPO) == ["nothing.py has no tests/test_nothing.py"]


PLACES = ["Eq. 3", "Eqs. (3) and (4)", "Section 4.2", "sections 3 and 4", "Algorithm 1", "appendix B"]


@pytest.mark.parametrize("place", [*PLACES, sync.UNSAID])
def test_a_docstring_says_where_in_the_paper(place):
    docstring = "Idea: it is so.\n\nFamily: ratio\nBase: of many.\nCosts: nothing.\nRun: it."
    complaint = f"its docstring needs an equation's or a section's number, or the words '{sync.UNSAID}'"
    assert sync.unwritten("grpo", f'"""{docstring}"""') == [f"grpo.py: {complaint}"]
    wrapped = place.replace(" ", "\n", 1)
    assert sync.unwritten("grpo", f'"""{docstring} (the table, {wrapped})"""') == []


def lesson_and_third():
    """A script that takes `gae` from ppo.py and, unsaid, a changed surrogate."""
    gae = parts.split(sync.chunks(TEXTS["ppo"])["gae"])[1]
    text = SAPO.replace("in: surrogate", "in: surrogate\nSame as ppo.py: gae", 1)
    return text.replace("def kl_penalty", gae + "\n\ndef kl_penalty", 1)


def test_same_as_is_held_to_the_third_script():
    text = lesson_and_third()
    texts = TEXTS | {"sapo": text}
    assert parts.same(text) == {"gae": "ppo"} and sync.problems("sapo", texts) == []
    assert sync.changed_lines(text, BASE) == (7, 0)
    assert "gae: same as in ppo.py" in sync.lesson("sapo", texts)
    # where the third script changes, or the copy does, it is said, with the lines, and mended
    for edited, other in (("sapo", text), ("ppo", TEXTS["ppo"])):
        changed = texts | {edited: other.replace("def gae(", "def gae(extra, ", 1)}
        complaints, mended = sync.copies("sapo", changed["sapo"], changed)
        assert "gae is not the same as in ppo.py" in complaints[0] and "def gae(extra, " in complaints[0]
        assert sync.copies("sapo", mended, changed) == ([], mended)
    # the base's changes pass a copy by
    merged, conflicts = sync.merge("sapo", text, BASE, BASE)
    assert merged == text and conflicts == []


def test_what_only_measures_is_counted_apart():
    """Its lines are no lesson, it needs no mention as different, it stays in a merge, and it must be there."""
    body = "def measure(x):\n    return x\n\n\n"
    text = SAPO.replace("def kl_penalty", body + "def kl_penalty").replace(
        "Differs from grpo.py in: surrogate", "Differs from grpo.py in: surrogate\nMeasures: measure"
    )
    assert sync.out_of_step("sapo", text, BASE) == [] and sync.changed_lines(text, BASE) == sync.changed_lines(SAPO, BASE)
    assert parts.lines_of(parts.measures(text), text) == 2 and sync.merge("sapo", text, BASE, BASE) == (text, [])
    gone = text.replace(body, "")
    assert ["sapo.py: the docstring says that measure measures, but there is none"] == sync.out_of_step("sapo", gone, BASE)


def test_a_part_that_the_docstring_forgot_is_kept_and_complained_of():
    """What the base had and lost goes; what is the script's own is never thrown away."""
    body = "def helper(x):\n    return x\n\n\n"
    text = SAPO.replace("def kl_penalty", body + "def kl_penalty")
    assert sync.merge("sapo", text, BASE, BASE) == (text, [])
    (complaint,) = sync.out_of_step("sapo", text, BASE)
    assert complaint.startswith("sapo.py: helper differs from grpo.py and the docstring does not say so")
    assert sync.merge("sapo", text, BASE, BASE.replace("def kl_penalty", body + "def kl_penalty")) == (SAPO, [])


def test_a_world_is_counted_apart():
    """No lesson either, at most 60 lines, and it must be there."""
    body = "class Door:\n" + "    x = 1\n" * 59 + "\n\n"
    text = SAPO.replace("def kl_penalty", body + "def kl_penalty").replace(
        "Differs from grpo.py in: surrogate", "Differs from grpo.py in: surrogate\nWorld: Door"
    )
    assert sync.out_of_step("sapo", text, BASE) == [] and sync.changed_lines(text, BASE) == sync.changed_lines(SAPO, BASE)
    assert sync.merge("sapo", text, BASE, BASE) == (text, []) and sync.problems("sapo", {"sapo": text, "grpo": BASE}) == []
    long = text.replace("    x = 1\n", "    x = 1\n    x = 2\n", 1)
    assert sync.problems("sapo", {"sapo": long, "grpo": BASE}) == ["sapo.py: its world has 61 lines, more than 60"]
    gone = text.replace(body, "")
    assert ["sapo.py: the docstring says that Door is its world, but there is none"] == sync.out_of_step("sapo", gone, BASE)


def test_scripts_come_after_what_they_are_held_to(tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "ALGOS", tmp_path)
    for name, line in dict(a="Differs from c.py in: f", b="Base: x", c="Same as b.py: f").items():
        (tmp_path / f"{name}.py").write_text(f'"""{name}\n\n{line}\n"""\n')
    assert sync.scripts() == ["b", "c", "a"]
    (tmp_path / "b.py").write_text('"""b\n\nSame as a.py: f\n"""\n')
    with pytest.raises(ValueError, match="in a circle"):
        sync.scripts()


@pytest.mark.parametrize(
    "lines, exception, complaint",
    [
        ((60, 20), None, None),
        ((61, 0), None, "more than 60, or than 20 there"),
        ((30, 21), None, "more than 60, or than 20 there"),
        ((76, 39), (76, 39), None),
        ((30, 25), (60, 25), None),
        ((77, 39), (76, 39), "more than 76, or than 39 there"),
        ((70, 39), (76, 39), "its exception should be 70 and 39"),
        ((76, 10), (76, 39), "its exception should be 76 and 20"),
        ((60, 20), (76, 39), "it needs no exception any more"),
    ],
)
def test_budget(lines, exception, complaint):
    found = sync.over_budget("x", lines, {"x": (*exception, "why")} if exception else {})
    assert [complaint in f for f in found] == [True] * bool(complaint), found


def test_merge_carries_the_base_into_every_part():
    changed = BASE.replace("def train(args):\n", "def train(args):\n    # new\n")
    changed = changed.replace("of the prompts' order", "of the order")
    merged, conflicts = sync.merge("sapo", SAPO, changed, BASE)
    assert conflicts == [] and sync.out_of_step("sapo", merged, changed) == []
    assert "    # new\n" in merged and "tau_pos" in merged and "args.eps" not in merged
    # a part that is new in the base
    changed = BASE.replace("    seed: int", "    limits = dict(lr=1)\n    seed: int", 1)
    merged, conflicts = sync.merge("sapo", SAPO, changed, BASE)
    assert conflicts == [] and sync.out_of_step("sapo", merged, changed) == []
    assert "limits = dict(lr=1)" in merged
    # a part that the script is allowed to change keeps its change and takes the base's elsewhere in it
    changed = BASE.replace(".clamp(-20, 20)\n    ratio = ", ".clamp(-30, 30)\n    ratio = ", 1)
    merged, conflicts = sync.merge("sapo", SAPO, changed, BASE)
    assert conflicts == [] and "clamp(-30, 30)" in sync.chunks(merged)["surrogate"] and "gate" in merged
    changed = BASE.replace("clipped = ratio.clamp(", "clipped = ratio.clip(", 1)
    assert "surrogate needs a hand" in sync.merge("sapo", SAPO, changed, BASE)[1][0]


def test_the_lesson_is_the_changed_lines(capsys):
    assert sync.main(False, "sapo") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["sapo.py against grpo.py: 7 changed lines, 0 of them in its loop", "", "surrogate"]
    assert len(lines) == 10 and all(line[:3] in ("  +", "  -") for line in lines[3:])
    assert sync.lesson("grpo", TEXTS) == "grpo.py is a base"
    assert sync.changed_lines(SAPO.replace("    tau = ", "\n    tau = "), BASE) == (7, 0)


def test_stale_pages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "ALGOS", tmp_path / "algos")
    (tmp_path / "algos").mkdir()
    page, readme = tmp_path / "algos" / "README.md", tmp_path / "README.md"
    readme.write_text("<!-- families -->\n<!-- end families -->\n")
    (tmp_path / "runs" / "reference").mkdir(parents=True)
    assert [c.split(" is ")[0] for c in sync.stale(TEXTS)] == ["README.md", "algos/README.md"]
    for path, text in sync.written(TEXTS).items():
        path.write_text(text)
    assert sync.stale(TEXTS) == []
    page.write_text(page.read_text() + "by hand\n")
    assert [c.split(" is ")[0] for c in sync.stale(TEXTS)] == ["algos/README.md"]


def test_writing_brings_everything_in_step(tmp_path, monkeypatch, capsys):
    algos = tmp_path / "algos"
    algos.mkdir()
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    monkeypatch.setattr(sync, "ALGOS", algos)
    texts = {"grpo": BASE, "ppo": TEXTS["ppo"], "sapo": lesson_and_third()}
    for name, text in texts.items():
        (algos / f"{name}.py").write_text(text)
        (tmp_path / "tests" / f"test_{name}.py").write_text("")
    allowed = map(max, sync.changed_lines(TEXTS["ppo"], BASE), sync.BUDGET)
    exceptions = {"ppo": (*allowed, "why")}
    monkeypatch.setattr(sync, "EXCEPTIONS", exceptions | {"gone": (70, 20, "why")})
    assert sync.main(check=True) == 1
    assert capsys.readouterr().out.splitlines() == [
        "EXCEPTIONS of tests/sync.py: there is no gone.py",
        "algos/README.md is not what python -m tests.sync makes",
    ]
    monkeypatch.setattr(sync, "EXCEPTIONS", exceptions)
    (algos / "ppo.py").write_text(TEXTS["ppo"].replace("def gae(", "def gae(extra, ", 1))
    (algos / "sapo.py").write_text(texts["sapo"].replace("(lengths > 0)", "(lengths >= 0)", 1))
    assert sync.main(check=False) == 0 and sync.main(check=True) == 0
    sapo = (algos / "sapo.py").read_text()
    assert "def gae(extra, " in sapo and "(lengths > 0)" in sapo
    assert "[sapo](sapo.py)" in (algos / "README.md").read_text()
