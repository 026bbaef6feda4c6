"""DCPO's worked examples: bounds per token, the summed loss, and advantages over three visits."""

import math

import pytest
import torch

from algos import dcpo, grpo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(dcpo, dcpo.Args())
    assert loss == pytest.approx(-0.074305, abs=1e-6)
    expected = torch.tensor([[-0.305351, -0.124146, -0.245050, -0.412180], [0.370409, 0.642013, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_bounds():
    _, old_logp, _, mask = example()
    lo, hi = dcpo.bounds(old_logp, dcpo.Args())
    expected = torch.tensor([0.5, 0.5, 0.770504, 0.5, 0.5, 0.684452])
    torch.testing.assert_close(lo[mask], expected, **CLOSE)
    expected = torch.tensor([1.261409, 1.456046, 1.186319, 1.814462, 1.307930, 1.221091])
    torch.testing.assert_close(hi[mask], expected, **CLOSE)
    lo, hi = dcpo.bounds(torch.tensor([0.01, 0.9, 0.001, 0.0]).log(), dcpo.Args())
    torch.testing.assert_close(lo, torch.tensor([0.5, 0.768742, 0.5, 0.5]), **CLOSE)
    torch.testing.assert_close(hi, torch.tensor([5, 1.187184, 10, 10]), rtol=0, atol=2e-6)
    assert dcpo.bounds(torch.tensor([0.001]).log(), dcpo.Args(ratio_max=99.0))[1].item() == pytest.approx(14.65, abs=0.01)


def test_at_its_bounds_a_token_meets_the_constraint():
    q, args = torch.tensor([0.05, 0.3, 0.7, 0.99], dtype=torch.float64), dcpo.Args(eps_low=0.01, eps_high=0.3)
    lo, hi = dcpo.bounds(q.log(), args)
    torch.testing.assert_close((1 - lo) * lo * q, torch.full_like(q, 0.01))
    torch.testing.assert_close((hi - 1) * hi * q, torch.full_like(q, 0.3))


def one_token(ratio, adv, q=0.5, **own):
    """-> (objective, its gradient with respect to logp, stats) of a token of old probability q."""
    old_logp = torch.tensor([[math.log(q)]])
    logp = (old_logp + math.log(ratio)).requires_grad_()
    mask, adv = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), adv)
    objective, stats = dcpo.surrogate(logp, old_logp, adv, mask, dcpo.Args(**own))
    objective.sum().backward()
    return objective.item(), logp.grad.item(), stats


@pytest.mark.parametrize(
    "ratio, adv, own, expected, gradient",
    [
        (1.5, 1.0, {}, 0.5 + 0.5 * 2.6**0.5, False),  # above hi
        (1.5, 1.0, dict(eps_high=0.5), 1.5, True),  # whose place eps_high decides
        (0.4, -1.0, {}, -0.5, False),  # below lo
        (0.8, -1.0, dict(eps_low=0.01), -(0.5 + 0.5 * 0.92**0.5), False),  # whose place eps_low decides
        (0.8, -1.0, {}, -0.8, True),
        (12.0, -1.0, {}, -10.0, False),  # the dual clip
        (12.0, -1.0, dict(ratio_max=20.0), -12.0, True),  # whose place ratio_max decides
        (12.0, 1.0, dict(eps_high=200.0), 10.0, False),  # as it does for hi
    ],
)
def test_where_a_token_is_clipped(ratio, adv, own, expected, gradient):
    objective, grad, stats = one_token(ratio, adv, **own)
    assert objective == pytest.approx(expected, rel=1e-5)
    assert grad == pytest.approx(ratio * adv if gradient else 0, rel=1e-5)
    assert stats["clip_fraction"].item() == (not gradient)


def test_a_rare_token_may_move_further():
    assert one_token(1.9, 1.0, q=0.05)[1] > 0 and one_token(1.9, 1.0, q=0.5)[1] == 0


def test_the_loss_is_a_sum_over_completions():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(dcpo.token_weights(mask, dcpo.Args()), 2 * grpo.token_weights(mask, grpo.Args()))


def visit(stats, *rewards, prompt=7):
    return dcpo.advantages(torch.tensor([rewards], dtype=torch.float32), torch.tensor([prompt]), stats, dcpo.Args())[0]


def test_three_visits():
    stats = {}
    torch.testing.assert_close(visit(stats, 1, 0, 0, 1), 0.866025 * torch.tensor([1.0, -1, -1, 1]), **CLOSE)
    torch.testing.assert_close(visit(stats, 0, 0, 0, 0), torch.full((4,), -0.261116), **CLOSE)
    assert stats[7] == (pytest.approx(0.25), pytest.approx(0.478714, abs=1e-6), 2)
    torch.testing.assert_close(visit(stats, 1, 1, 1, 0), torch.tensor([0.693374, 0.693374, 0.693374, -1.014344]), **CLOSE)
    assert stats[7] == (pytest.approx(0.416667, abs=1e-6), pytest.approx(0.540062, abs=1e-6), 3)


def test_the_smaller_blend_is_the_one_nearer_to_zero():
    """Third visit: for the 0s A_new = -0.5 and A_tot = -0.75 / 0.456435, for the 1 they are 1.5 and 0.25 / 0.456435."""
    stats = {}
    visit(stats, 1, 1, 1, 1), visit(stats, 1, 1, 1, 1)
    expected = torch.tensor([0.865148, -0.881056, -0.881056, -0.881056])
    torch.testing.assert_close(visit(stats, 1, 0, 0, 0), expected, **CLOSE)


def test_the_first_visit_is_grpo():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    ours = dcpo.advantages(rewards, torch.arange(3), {}, dcpo.Args())
    torch.testing.assert_close(ours, grpo.advantages(rewards, grpo.Args()), rtol=0, atol=5e-6)


def test_prompts_are_kept_apart_and_a_prompt_that_comes_twice_counts_twice():
    apart = {}
    first, second = visit(apart, 1, 0, 0, 1), visit(apart, 0, 0, 0, 0)
    other = visit(apart, 0, 0, 0, 1, prompt=8)
    at_once, rewards = {}, torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    adv = dcpo.advantages(rewards, torch.tensor([7, 8, 7]), at_once, dcpo.Args())
    assert torch.equal(adv, torch.stack([first, other, second])) and at_once == apart


def test_an_always_equal_reward_has_no_advantage():
    stats = {}
    assert not any(visit(stats, 0, 0, 0, 0).any() for _ in range(3)) and stats[7] == (0, 0, 3)
    assert (visit(stats, 1, 1, 1, 1) > 0).all()  # until it changes
