"""The guard itself, and that it bites."""

import pytest

from tests import sync

BASE, SAPO = ((sync.ALGOS / f"{n}.py").read_text() for n in ("grpo", "sapo"))


BASES = {"grpo", "dpo"}


@pytest.mark.parametrize("name", [n for n in sync.scripts() if n not in BASES])
def test_in_step(name):
    text = (sync.ALGOS / f"{name}.py").read_text()
    base, allowed = sync.differs(text)
    assert base and allowed, f"{name}.py needs a line 'Differs from <base>.py in: ...'"
    assert sync.out_of_step(name, text, (sync.ALGOS / f"{base}.py").read_text()) == []


def test_chunks_cover_the_file():
    assert "".join(sync.chunks(BASE).values()) == BASE
    assert {"docstring", "Args", "model", "own fields", "advantages", "surrogate", "token_weights", "train"} <= set(
        sync.chunks(BASE)
    )


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("(lengths > 0).sum()", "(lengths >= 0).sum()", "token_weights differs"),
        ('model: str = "tiny"', 'model: str = "small"', "model differs"),
        ("meter = runlog.Meter()", "meter  = runlog.Meter()", "train differs"),
        ("def kl_penalty", "def helper():\n    pass\n\n\ndef kl_penalty", "helper differs"),
        ("import torch\n", "import torch as t\n", "import torch as t differs"),
        ("in: surrogate", "in: surrogate, advantages", "says that advantages differs"),
    ],
)
def test_the_guard_bites(old, new, complaint):
    assert old in SAPO
    found = sync.out_of_step("sapo", SAPO.replace(old, new, 1), BASE)
    assert any(complaint in f for f in found), found


def test_merge_carries_the_base_into_every_part():
    changed = BASE.replace("meter = runlog.Meter()", "meter = runlog.Meter(1)").replace("of the prompts' order", "of the order")
    merged, conflicts = sync.merge("sapo", SAPO, changed, BASE)
    assert conflicts == [] and sync.out_of_step("sapo", merged, changed) == []
    assert "Meter(1)" in merged and "tau_pos" in merged and "args.eps" not in merged
    # a part that the script is allowed to change keeps its change and takes the base's elsewhere in it
    changed = BASE.replace(".clamp(-20, 20)\n    ratio = ", ".clamp(-30, 30)\n    ratio = ", 1)
    merged, conflicts = sync.merge("sapo", SAPO, changed, BASE)
    assert conflicts == [] and "clamp(-30, 30)" in sync.chunks(merged)["surrogate"] and "gate" in merged


def test_readme_table_is_current():
    text = (sync.ROOT / "README.md").read_text()
    assert sync.readme(text) == text and "| [`sapo`](algos/sapo.py) |" in text
