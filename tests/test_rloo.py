"""RLOO's worked examples, and that leaving oneself out of the baseline leaves the gradient unbiased."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from algos import dr_grpo, grpo, rloo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(rloo, rloo.Args())
    assert loss == pytest.approx(-0.014485, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[-0.490099] * 4, [0.475615, 0.475615, 0, 0]]), **CLOSE)


def test_on_policy_it_is_reinforce():
    """The gradient of -1/B sum_i A_i sum_t log pi, whose loss on this example is 1.385."""
    logp, _, adv, mask = example()
    reinforce = -(adv * logp * mask).sum() / 2
    assert reinforce.item() == pytest.approx(1.385, abs=1e-6)
    (expected,) = torch.autograd.grad(reinforce, logp)
    torch.testing.assert_close(expected, torch.tensor([[-0.5] * 4, [0.5, 0.5, 0, 0]]))
    objective, _ = rloo.surrogate(logp, logp.detach(), adv, mask, rloo.Args())
    (grad,) = torch.autograd.grad(-(objective * rloo.token_weights(mask, rloo.Args())).sum(), logp)
    torch.testing.assert_close(grad, expected)


def test_a_completion_is_clipped_as_a_whole():
    """Four tokens that each moved by 6% make a product beyond 1.2, though GRPO would clip none of them."""
    _, old_logp, _, mask = example()
    logp = (old_logp + 0.06).requires_grad_()
    adv = torch.ones(2, 4)
    for script, clipped in ((rloo, [1, 1, 1, 1, 0, 0]), (grpo, [0] * 6)):
        objective, stats = script.surrogate(logp, old_logp, adv, mask, script.Args())
        (grad,) = torch.autograd.grad(objective[mask].sum(), logp)
        assert stats["clip_fraction"][mask].tolist() == clipped == (grad[mask] == 0).tolist()


def test_clip_width_matters():
    loss, grad = loss_and_gradient(rloo, rloo.Args())
    other, other_grad = loss_and_gradient(rloo, rloo.Args(eps=0.03))  # ratios .980 and .951: row 1 is beyond it
    assert other != pytest.approx(loss, abs=1e-4)
    assert torch.equal(other_grad[0], grad[0]) and not other_grad[1].any()


def test_a_product_beyond_all_numbers_does_no_harm():
    old_logp, mask = torch.full((2, 40), -3.0), torch.ones(2, 40, dtype=torch.bool)
    logp = (old_logp + 2.9).requires_grad_()  # e^116
    objective, _ = rloo.surrogate(logp, old_logp, torch.tensor([[1.0], [-1.0]]).expand(2, 40), mask, rloo.Args())
    objective.sum().backward()
    assert torch.isfinite(objective).all() and torch.isfinite(logp.grad).all()


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 1], [0.666667, -0.666667, -0.666667, 0.666667]),
        ([0, 0, 0, 1], [-0.333333, -0.333333, -0.333333, 1]),
        ([1, 0], [1, -1]),
    ],
)
def test_advantages(rewards, expected):
    adv = rloo.advantages(torch.tensor([rewards]).float(), rloo.Args())
    torch.testing.assert_close(adv, torch.tensor([expected]).float(), **CLOSE)


def expected_gradient(advantages, G=3):
    """Exact expectation, over all groups of G one-token completions, of RLOO's on-policy gradient with respect to the logits,
    with `advantages` for its own; and the gradient of the expected reward."""
    logits = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    rewards, args, total = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64), rloo.Args(), 0.0
    mask = torch.ones(G, 1, dtype=torch.bool)
    for group in torch.cartesian_prod(*[torch.arange(3)] * G):
        logp = logits.log_softmax(0)[group][:, None]
        chance = logp.detach().sum().exp()
        adv = advantages(rewards[group][None], args).reshape(-1, 1)
        objective, _ = rloo.surrogate(logp, logp.detach(), adv, mask, args)
        (gradient,) = torch.autograd.grad((objective * rloo.token_weights(mask, args)).sum(), logits)
        total = total + chance * gradient
    (true,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    return total, true


def test_the_gradient_is_unbiased():
    mine, true = expected_gradient(rloo.advantages)
    torch.testing.assert_close(mine, true)
    with_itself, _ = expected_gradient(dr_grpo.advantages)  # the group's whole mean as baseline
    torch.testing.assert_close(with_itself, true * (3 - 1) / 3)
    with_std, _ = expected_gradient(grpo.advantages)
    assert torch.cosine_similarity(with_std, true, dim=0) < 0.9


def test_kl_is_k1():
    _, old_logp, _, mask = example()
    ref_logp = torch.tensor([[-0.6, -1.0, -0.1, -1.8], [-0.9, -0.3, math.nan, math.inf]])
    expected = torch.tensor([[0.1, -0.2, 0, -0.2], [0.2, 0, 0, 0]])
    torch.testing.assert_close(rloo.kl_penalty(old_logp, ref_logp, mask), expected, **CLOSE)


def test_kl_costs_reward_and_not_objective(tmp_path, monkeypatch):
    """A run of one step in which the reference is made 0.5 nat less likely to say every token than the policy."""
    from common import batch as batches

    real, seen = batches.read, SimpleNamespace()

    def read(policy, batch, args):
        (logp, entropy), seen.batch = real(policy, batch, args), batch
        return logp if batch.old_logp is None else logp - 0.5 * batch.mask, entropy

    monkeypatch.setattr(batches, "read", read)
    small = dict(steps=1, prompts_per_step=16, minibatches=1, eval_prompts=4, beta=0.1)
    rloo.train(rloo.Args(run_dir=str(tmp_path / "run"), **small))
    shaped = seen.batch.reward - 0.1 * 0.5 * seen.batch.mask.sum(1)
    expected = rloo.advantages(shaped.view(16, 8), rloo.Args()).reshape(-1, 1).expand_as(seen.batch.mask)
    torch.testing.assert_close(seen.batch.adv, expected, rtol=0, atol=1e-5)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["ref_kl"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["loss"] == pytest.approx(-expected[:, 0].mean().item(), abs=1e-5)  # nothing else is subtracted
