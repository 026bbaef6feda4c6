"""The command with the checks that only a GPU can do: on a CPU it runs, and what goes wrong is said."""

import json
from types import SimpleNamespace

import pytest

from tests import gpu
from tests.helpers import tiny

__all__ = ["tiny"]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(gpu.gpu, "_kind", None)  # what main() chooses ends with the test


def test_every_part_runs(tmp_path, tiny, capsys):
    code = gpu.main(["--dry", "--out", str(tmp_path)])
    assert code == 0, capsys.readouterr()
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert list(found["seconds"]) == list(gpu.PARTS) == list(dict.fromkeys(row["part"] for row in found["rows"]))
    assert found["device"] == "cpu" and sum(row["bound"] is not None for row in found["rows"]) >= 25


@pytest.mark.parametrize("name, flags, kept", [
    ("grpo", gpu.SMALL, gpu.SMALL), ("training_free_grpo", "--minibatches 2 --task rules", "--task rules"),
    ("mdlm", gpu.TOLD + " --group-size 4", gpu.TOLD),
])  # fmt: skip
def test_a_script_gets_the_flags_that_it_has(name, flags, kept):
    assert gpu.fitting((gpu.ROOT / "algos" / f"{name}.py").read_text(), flags) == kept.split()


def test_what_goes_wrong_is_said(monkeypatch, capsys):
    def part(r):
        r.say("not a number", dict(x=float("nan")), dict(x=1))
        raise SystemExit("no luck")

    monkeypatch.setitem(gpu.PARTS, "vllm", (part, 9))
    right = gpu.policy.HeadLogp.apply
    monkeypatch.setattr(gpu.policy, "HeadLogp", SimpleNamespace(apply=lambda *x: [1.1 * y for y in right(*x)]))
    assert gpu.main(["--dry", "--only", "vllm", "head"]) == 1
    found = capsys.readouterr()
    verdicts = [line.split()[-1] for line in found.out.splitlines()]
    assert verdicts.count("FAILED") == 1 and verdicts.count("BROKEN") == 9 and "ok" not in verdicts
    assert "no luck" in found.out and "Traceback" in found.err


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "error: torch finds no GPU here; --dry runs the same code on a CPU\n"
