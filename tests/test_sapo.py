"""SAPO's worked example and the properties of its gate."""

import pytest
import torch

from algos import grpo, sapo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(sapo, sapo.Args())
    assert loss == pytest.approx(-0.083351, abs=1e-6)
    expected = torch.tensor([[-0.150820, -0.058301, -0.122513, -0.185842], [0.181817, 0.313973, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_gate_weight_is_what_the_log_calls_it():
    logp, old_logp, adv, mask = example()
    _, stats = sapo.surrogate(logp, old_logp, adv, mask, sapo.Args())
    expected = torch.tensor([0.987845, 0.939226, 0.999902, 0.901753, 0.981711, 0.978091])
    torch.testing.assert_close(stats["gate_weight"].detach()[mask], expected, **CLOSE)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_on_policy_it_is_grpo_in_gradient_for_every_temperature(tau):
    _, old_logp, adv, mask = example()
    args, grads = sapo.Args(tau_pos=tau, tau_neg=tau), []
    for script, own in ((sapo, args), (grpo, grpo.Args())):
        logp = old_logp.clone().requires_grad_()
        objective, _ = script.surrogate(logp, old_logp, adv, mask, own)
        loss = -(objective * script.token_weights(mask, own)).sum()
        loss.backward()
        grads.append((loss.item(), logp.grad))
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-6, atol=1e-7)
    assert grads[0][0] == pytest.approx(-(1 - 1) / 2 * 2 / tau, abs=1e-6)  # advantages +1 and -1 cancel


def test_one_wild_token_loses_only_its_own_gradient():
    _, old_logp, adv, mask = example()
    near, wild = old_logp.clone().requires_grad_(), (old_logp + torch.tensor([[0, 2.0, 0, 0], [0, 0, 0, 0]])).requires_grad_()
    for logp in (near, wild):
        objective, _ = sapo.surrogate(logp, old_logp, adv, mask, sapo.Args())
        (objective * sapo.token_weights(mask, sapo.Args())).sum().backward()
    same = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert torch.equal(near.grad[same], wild.grad[same]) and wild.grad[0, 1] < 0.1 * near.grad[0, 1]


@pytest.mark.parametrize("field, row", [("tau_pos", 0), ("tau_neg", 1)])
def test_each_temperature_acts_on_its_sign(field, row):
    _, grad = loss_and_gradient(sapo, sapo.Args())
    _, other = loss_and_gradient(sapo, sapo.Args(**{field: 3.0}))
    assert not torch.equal(grad[row], other[row]) and torch.equal(grad[1 - row], other[1 - row])
