"""The base's worked example, and its parts against closed forms."""

import math

import pytest
import torch

from algos import grpo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(grpo, grpo.Args())
    assert loss == pytest.approx(0.036408, abs=1e-6)
    expected = torch.tensor([[0, -0.062073, -0.122525, 0], [0, 0.321006, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_worked_example_with_kl():
    logp, old_logp, adv, mask = example()
    ref_logp = torch.tensor([[-0.6, -1.0, -0.1, -1.8], [-0.9, -0.3, -1.0, -1.0]])
    args = grpo.Args(beta=0.04)
    k3 = grpo.kl_penalty(logp, ref_logp, mask)
    expected = torch.tensor([[0.040818, 0.559603, 0.000201, 0.040818], [0.005171, 0.028801, 0, 0]])
    torch.testing.assert_close(k3.detach(), expected, **CLOSE)
    objective, _ = grpo.surrogate(logp, old_logp, adv, mask, args)
    loss = -((objective - args.beta * k3) * grpo.token_weights(mask, args)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.039955, abs=1e-6)
    expected = torch.tensor([[0.001296, -0.069371, -0.122626, 0.001296], [-0.001052, 0.323218, 0, 0]])
    torch.testing.assert_close(logp.grad, expected, **CLOSE)


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """Its expectation under pi is KL(pi, ref), exactly, on a categorical distribution."""
    pi, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    k3 = grpo.kl_penalty(pi.log(), ref.log(), torch.ones(3, dtype=torch.bool))
    assert (pi * k3).sum().item() == pytest.approx((pi * (pi / ref).log()).sum().item(), abs=1e-7)
    assert (k3 >= 0).all()


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([0, 0, 0, 1], [-0.499999, -0.499999, -0.499999, 1.499997]),
        ([1, 0, 0, 1], [0.866024, -0.866024, -0.866024, 0.866024]),
        ([2, 2, 2, 2], [0, 0, 0, 0]),
    ],
)
def test_advantages(rewards, expected):
    adv = grpo.advantages(torch.tensor([rewards], dtype=torch.float32), grpo.Args())
    torch.testing.assert_close(adv, torch.tensor([expected], dtype=torch.float32), rtol=0, atol=2e-6)


def test_clip_width_matters_and_is_counted():
    a, grad_a = loss_and_gradient(grpo, grpo.Args(eps=0.2))
    b, grad_b = loss_and_gradient(grpo, grpo.Args(eps=0.7))
    assert a != b and not torch.equal(grad_a, grad_b)
    logp, old_logp, adv, mask = example()
    _, stats = grpo.surrogate(logp, old_logp, adv, mask, grpo.Args())
    assert stats["clip_fraction"][mask].tolist() == [1, 0, 0, 1, 1, 0]


def test_log_ratios_end_at_20():
    far, near, mask = torch.full((1, 2), 25.0), torch.zeros(1, 2), torch.ones(1, 2).bool()
    objective, _ = grpo.surrogate(far, near, torch.tensor([[1.0, -1.0]]), mask, grpo.Args())
    torch.testing.assert_close(objective, torch.tensor([[1.2, -math.exp(20)]]))
    for sign in (1, -1):
        k3 = grpo.kl_penalty(near, sign * far, mask)
        torch.testing.assert_close(k3, torch.full((1, 2), math.exp(20 * sign) - 20 * sign - 1))


def test_weights_are_a_mean_of_means():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    weights = grpo.token_weights(mask, grpo.Args())
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[0].tolist() == [0.125] * 4 and weights[1].tolist() == [0.5, 0, 0, 0] and not weights[2].any()
