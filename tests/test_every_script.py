"""Each online script as a user runs it: one that was killed and resumed gives the whole run's numbers, to the last bit."""

import json

import pytest

from tests.helpers import ROOT, killed, lines, outcome, run, same, tiny
from tests.test_objectives import SCRIPTS

__all__ = ["tiny"]
# What makes a script's own part small, or lets it come up at all.
OWN = dict(
    rto="--dpo-steps 3 --dpo-pairs-per-step 8".split(),
    rlfr="--flow-steps 8 --demos-per-step 4".split(),
    atp_latent="--sft-steps 12 --demos-per-step 8".split(),  # until answers end, or nothing is paid
    bupo="--task addition".split(),
    cot2="--csft-steps 40 --csft-batch 32".split(),
    # A window that ends some right responses and cuts others: those wait in the checkpoint, with log-probs that are needed.
    t_ppo="--task addition --window 19 --value-warmup 0 --policy-tokens all".split(),
)
SMALL = "--prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --checkpoint-every 1".split()


def halves(name, tmp_path, steps, *argv):
    """A run, and one that was killed behind its last but one step and resumed -> the metrics, equal to the last bit."""
    script, whole, parts = ROOT / "algos" / f"{name}.py", tmp_path / "whole", tmp_path / "parts"
    done = run(tmp_path, *SMALL, *argv, "--steps", steps, "--run-dir", whole, script=script)
    assert done.code == 0, done.err
    killed(whole, parts, steps - 1)
    done = run(tmp_path, "--resume", parts, script=script)
    assert done.code == 0, done.err
    same(outcome(whole), outcome(parts))
    return lines(whole / "metrics.jsonl")


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_the_whole(name, tmp_path, tiny):
    rows = halves(name, tmp_path, 2, *OWN.get(name, ()))
    assert [r["step"] for r in rows] == [1, 2]
    assert any(r["grad_norm"] > 0 for r in rows) and rows[0]["entropy"] > 0


def test_statistics_of_prompts_that_come_back_survive(tmp_path, tiny):
    """DCPO on 16 prompts, 8 a step: every prompt comes twice, and some after the resume."""
    rows = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a, b in zip(range(12, 60, 3), range(81, 33, -3))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    held_out = [dict(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(9)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
    local = f"--model {tiny} --dtype float32 --optimizer adamw --max-new-tokens 28 --prompt-template {{prompt}}".split()
    rows = halves("dcpo", tmp_path, 4, *local, "--task", tmp_path / "train.jsonl")
    groups = [r["informative_groups"] for r in rows]
    used = [r["responses_used"] for r in rows]
    assert used[:2] == groups[:2] and (used[2] > groups[2] or used[3] > groups[3])  # history makes equal groups teach
