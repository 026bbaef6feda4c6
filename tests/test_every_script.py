"""Each online script as a user runs it: the same seed gives the same numbers, and a run in two halves is the run in one."""

import json

import pytest

from tests.helpers import ROOT, lines, outcome, run, same, tiny
from tests.test_objectives import SCRIPTS

__all__ = ["tiny"]
# Whose schedule is a share of the --steps that a run is begun with, which halves begin with fewer of: here without it.
STILL = dict(
    d3s="--rows-last 0.25 --tokens-last 0.2".split(),
    rlfr="--flow-steps 8 --demos-per-step 4".split(),
    # A window that ends some right responses and cuts others: those wait in the checkpoint, with log-probs that are needed.
    t_ppo="--task addition --window 19 --value-warmup 0 --policy-tokens all".split(),
)
SMALL = "--prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --checkpoint-every 1".split()


def halves(name, tmp_path, half, *argv):
    """Runs 2 * half steps at once, and in two halves with a resume between them -> the metrics, equal to the last bit."""
    script, whole, parts = ROOT / "algos" / f"{name}.py", tmp_path / "whole", tmp_path / "parts"
    for arguments in (
        [*SMALL, *argv, "--steps", 2 * half, "--run-dir", whole],
        [*SMALL, *argv, "--steps", half, "--run-dir", parts],
        ["--resume", parts, "--steps", 2 * half],
    ):
        done = run(tmp_path, *arguments, script=script)
        assert done.code == 0, done.err
    a, b = outcome(whole), outcome(parts)
    a.evals = b.evals = ""  # the first half evaluates at its own end, too
    same(a, b)
    return lines(whole / "metrics.jsonl")


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_halves_are_the_whole(name, tmp_path, tiny):
    rows = halves(name, tmp_path, 1, *STILL.get(name, ()))
    assert [r["step"] for r in rows] == [1, 2]
    assert any(r["grad_norm"] > 0 for r in rows) and rows[0]["entropy"] > 0


def test_statistics_of_prompts_that_come_back_survive(tmp_path, tiny):
    """DCPO on 16 prompts, 8 a step: every prompt comes twice, the second time after the resume."""
    rows = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a, b in zip(range(12, 60, 3), range(81, 33, -3))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    held_out = [dict(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(9)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
    local = f"--model {tiny} --dtype float32 --optimizer adamw --max-new-tokens 28 --prompt-template {{prompt}}".split()
    rows = halves("dcpo", tmp_path, 2, *local, "--task", tmp_path / "train.jsonl")
    groups = [r["informative_groups"] for r in rows]
    used = [r["responses_used"] for r in rows]
    assert used[:2] == groups[:2] and (used[2] > groups[2] or used[3] > groups[3])  # history makes equal groups teach
