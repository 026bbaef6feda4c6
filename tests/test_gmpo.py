"""GMPO's worked example, its one-sided clip before the mean, and its kinship with GSPO."""

import pytest
import torch

from algos import gmpo, gspo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(gmpo, gmpo.Args())
    assert loss == pytest.approx(0.002432, abs=1e-6)
    expected = torch.tensor([[-0.121306, -0.121306, -0.121306, 0], [0.243827, 0.243827, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_without_the_clip_it_is_gspo_without_its_clip():
    loss, grad = loss_and_gradient(gmpo, gmpo.Args(eps=10.0))
    assert loss == pytest.approx(-0.009851, abs=1e-6)
    torch.testing.assert_close(grad[0], torch.full((4,), -0.124377), **CLOSE)
    loss2, grad2 = loss_and_gradient(gspo, gspo.Args(eps_low=0.9, eps_high=10.0))
    assert loss == pytest.approx(loss2, abs=1e-7)
    torch.testing.assert_close(grad, grad2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_only_steps_along_the_advantage_are_clipped(sign):
    """One token far along the advantage loses its gradient and counts as eps; as far against it, it keeps both."""
    _, old_logp, _, mask = example()
    along = torch.tensor([[3.0, 0, 0, 0], [0, 0, 0, 0]]) * sign
    for step, counted in ((along, 0.4 * sign), (-along, -3.0 * sign)):
        logp = (old_logp + step).requires_grad_()
        objective, stats = gmpo.surrogate(logp, old_logp, torch.full((2, 4), sign), mask, gmpo.Args(eps=0.4))
        objective[:, 0].sum().backward()
        ratio = torch.tensor(counted / 4).exp()
        assert objective[0, 0].item() == pytest.approx(sign * ratio.item(), abs=1e-6)
        clipped = step is along
        assert stats["clip_fraction"].nonzero().tolist() == ([[0, 0]] if clipped else [])
        expected = (sign * ratio / 4).repeat(4)
        expected[0] *= not clipped
        torch.testing.assert_close(logp.grad[0], expected, **CLOSE)


def test_eps_matters():
    """0.1 clips two more tokens of the example: (0, 0), d = .2, and (1, 0), d = -.3."""
    loss, grad = loss_and_gradient(gmpo, gmpo.Args(eps=0.1))
    default, _ = loss_and_gradient(gmpo, gmpo.Args())
    assert loss != pytest.approx(default, abs=1e-3)
    assert grad.nonzero().tolist() == [[0, 1], [0, 2], [1, 1]]
