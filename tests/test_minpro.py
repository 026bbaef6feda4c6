"""MinPRO's worked example, its prefix minimum, its limits and its queue of rollouts."""

import pytest
import torch

from algos import cispo, minpro
from tests.card import example, loss_and_gradient
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(minpro, minpro.Args())
    assert loss == pytest.approx(0.336159, abs=1e-6)
    expected = torch.tensor([[-0.203567, -0.101088, -0.081125, -0.136455], [0.123470, 0.158538, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)
    loss, grad = loss_and_gradient(minpro, minpro.Args(eps_high=0.2))
    expected[0, 0] = -0.2
    assert loss == pytest.approx(0.335089, abs=1e-6)
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_hard_clip():
    loss, grad = loss_and_gradient(minpro, minpro.Args(hard_clip=True, eps_low=0.2, eps_high=0.28))
    assert loss == pytest.approx(-0.230365, abs=1e-6)
    torch.testing.assert_close(grad[1], torch.tensor([0, 0.158538, 0, 0]), **CLOSE)


def test_prefix_minimum():
    logp, old_logp, _, mask = example()
    prefix = minpro.prefix_minimum((logp - old_logp).masked_fill(~mask, 0.0), mask).exp()
    torch.testing.assert_close(prefix[0], torch.tensor([1, 1.221403, 0.496585, 0.496585]), **CLOSE)
    torch.testing.assert_close(prefix[1, :2], torch.tensor([1, 0.740818]), **CLOSE)
    assert not prefix.requires_grad


def test_tokens_that_the_policy_did_not_write_are_skipped():
    log_ratio = torch.tensor([[-9.0, 0.3, -9.0, -0.2, 0.1]])
    mask = torch.tensor([[0, 1, 0, 1, 1]]).bool()
    prefix = minpro.prefix_minimum(log_ratio, mask)
    torch.testing.assert_close(prefix[mask], torch.tensor([0, 0.3, -0.2]))


def test_on_policy_and_on_one_token_it_is_cispo():
    logp, old_logp, adv, mask = example()
    first = torch.zeros_like(mask)
    first[:, 0] = True
    for new, rows in ((old_logp, mask), (logp, first)):
        a, b = (s.surrogate(new, old_logp, adv, rows, s.Args())[0] for s in (minpro, cispo))
        assert torch.equal(a[rows], b[rows])


def test_an_unlikely_token_damps_those_after_it_only():
    _, old_logp, adv, mask = example()
    new = old_logp + torch.tensor([[0, -3.0, 0, 0], [0, 0, 0, 0]])
    _, stats = minpro.surrogate(new, old_logp, adv, mask, minpro.Args())
    low = torch.tensor(-3.0).exp().item()
    torch.testing.assert_close(stats["weight"][0], torch.tensor([1, low, low, low]), **CLOSE)
    torch.testing.assert_close(stats["weight"][1], torch.ones(4))
    for name in ("prefix", "prefix_min"):
        torch.testing.assert_close(stats[name][0], torch.tensor([1, 1, low, low]), **CLOSE)
    _, bounded = minpro.surrogate(new, old_logp, adv, mask, minpro.Args(eps_low=0.2))
    torch.testing.assert_close(bounded["weight"][0], torch.tensor([1, 0.8, 0.8, 0.8]), **CLOSE)


def test_rollouts_age_in_the_queue_and_survive_a_restart(tmp_path, tiny):
    """Steps train on rollouts of age 0, 1, 2, 2; a run that is continued goes on as if it had not stopped."""
    small = "--prompts-per-step 4 --minibatches 2 --eval-prompts 4 --stale 2".split()
    for argv in (["--steps", 4, "--run-dir", "whole"], ["--steps", 2, "--run-dir", "cut"], ["--steps", 4, "--resume", "cut"]):
        done = run(tmp_path, *small, *argv, script=ROOT / "algos" / "minpro.py")
        assert done.code == 0, done.err
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [row["staleness"] for row in a] == [0, 1, 2, 2]
    assert [row["loss"] for row in a] == [row["loss"] for row in b] and len({row["loss"] for row in a}) == 4
