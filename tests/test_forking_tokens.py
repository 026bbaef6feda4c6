"""Forking tokens' worked numbers, its controls, exact counts, and what a run logs."""

import math

import pytest
import torch

from algos import dapo, forking_tokens
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
OLD = torch.tensor([[-0.6, -1.0, -0.1], [-1.5, -0.3, 0.0]])
NEW = torch.tensor([[-0.5, -1.2, -0.1], [-2.0, -0.3, 0.0]])
ENTROPY = torch.tensor([[0.2, 1.1, 0.05], [0.9, 0.4, 9.0]])
ADV = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()


def loss(script=forking_tokens, **changes):
    args, logp = script.Args(**changes), NEW.clone().requires_grad_()
    objective, _ = script.surrogate(logp, OLD, ADV, MASK, args)
    more = (forking_tokens.fork_score(ENTROPY, args),) if script is forking_tokens else ()
    value = -(objective * script.token_weights(MASK, args, *more))[MASK].sum()
    value.backward()
    return value.item(), logp.grad


def test_worked_numbers():
    value, gradient = loss(rho=0.4)
    assert value == pytest.approx(-0.003746, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0, -0.163746, 0], [0, 0, 0]]), **CLOSE)  # (1, 0) is clipped
    value, gradient = loss(rho=0.4, entropy_norm="selected")
    assert value == pytest.approx(-0.009365, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0, -0.163746 / 0.4, 0], [0, 0, 0]]), **CLOSE)
    assert loss(rho=0.4, select="low")[0] == pytest.approx(-0.221034, abs=1e-6)


def test_the_two_parts_add_up_to_dapo():
    whole = loss(dapo)
    assert whole[0] == pytest.approx(-0.224780, abs=1e-6)
    high, low = loss(rho=0.4), loss(rho=0.4, select="low")
    assert high[0] + low[0] == pytest.approx(whole[0], abs=1e-7)
    torch.testing.assert_close(high[1] + low[1], whole[1])
    everything = loss(rho=1.0)
    assert everything[0] == pytest.approx(whole[0], abs=1e-7)
    torch.testing.assert_close(everything[1], whole[1])


@pytest.mark.parametrize("select", ["high", "low", "random"])
@pytest.mark.parametrize("rho", [0.2, 0.4, 0.05, 1.0])
@pytest.mark.parametrize("n", [0, 1, 4, 5, 10, 37])
def test_exactly_so_many_are_selected(n, rho, select):
    """Of a policy that has collapsed, too, all of whose entropies are 0; and never a token of the padding."""
    args = forking_tokens.Args(rho=rho, select=select)
    mask = (torch.arange(40) < n).view(4, 10)
    for entropy in (torch.zeros(4, 10), torch.rand(4, 10), torch.full((4, 10), 3.0)):
        entropy = entropy.masked_fill(~mask, 99.0)
        selected = forking_tokens.forks(mask, forking_tokens.fork_score(entropy, args), args)
        share = 1 - rho if select == "low" else rho
        assert selected.sum() == math.ceil(share * n - 1e-6) and not (selected & ~mask).any()
    if select == "high" and n:
        score = torch.rand(4, 10)
        selected = forking_tokens.forks(mask, score, args)
        assert score[selected].min() >= score[mask & ~selected].max() if (mask & ~selected).any() else selected.equal(mask)


def test_the_random_ones_are_drawn_anew():
    args = forking_tokens.Args(select="random")
    a, b = (forking_tokens.fork_score(torch.zeros(4, 10), args) for _ in range(2))
    assert not torch.equal(a, b) and a.unique().numel() == 40


def test_a_run_logs_the_forks(tiny, tmp_path):
    """A fifth is selected, the surest of them is less sure than the others on average; the same with the controls' words."""
    argv = "--task addition --steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    for name, more in dict(high=(), low=("--select", "low"), random=("--select", "random")).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "forking_tokens.py")
        assert done.code == 0, done.err
        for row in lines(tmp_path / name / "metrics.jsonl"):
            assert row["selected"] == pytest.approx(0.8 if name == "low" else 0.2, abs=0.02)
            if name == "high":
                assert row["entropy_selected_min"] > row["entropy_rest"] and row["entropy_selected"] > 3 * row["entropy_rest"]
            if name == "low":
                assert row["entropy_selected"] < row["entropy_rest"] / 3
            mean = row["selected"] * row["entropy_selected"] + (1 - row["selected"]) * row["entropy_rest"]
            if name == "random":
                assert 0.5 < row["entropy_selected"] / mean < 2
    columns = lines(tmp_path / "high" / "samples.jsonl")[0]["columns"]
    assert set(columns) == {"logp", "adv", "old_entropy", "score"} and columns["score"] == columns["old_entropy"]
