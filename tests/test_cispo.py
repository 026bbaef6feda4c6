"""CISPO's worked example, its weight, and its mean over tokens."""

import pytest
import torch

from algos import cispo, grpo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "args, loss, rows",
    [
        (dict(eps_high=0.2), 0.403386, [[-0.2, -0.082764, -0.163366, -0.2], [0.12347, 0.2, 0, 0]]),
        (dict(), 0.515937, [[-0.203567, -0.082764, -0.163366, -0.274787], [0.12347, 0.214004, 0, 0]]),
    ],
)
def test_worked_example(args, loss, rows):
    found, grad = loss_and_gradient(cispo, cispo.Args(**args))
    assert found == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(rows), **CLOSE)


def test_no_token_is_dropped_where_the_clip_drops_three():
    """GRPO with the same mean over tokens has no gradient at three of the six tokens, and CISPO's at the other three."""
    logp, old_logp, adv, mask = example()
    objective, _ = grpo.surrogate(logp, old_logp, adv, mask, grpo.Args())
    (-objective * cispo.token_weights(mask, cispo.Args())).sum().backward()
    _, grad = loss_and_gradient(cispo, cispo.Args())
    dropped = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0]]).bool()
    assert not logp.grad[dropped].any() and grad[mask].all()
    torch.testing.assert_close(grad[~dropped], logp.grad[~dropped], **CLOSE)


def test_the_gradient_does_not_run_through_the_weight():
    """At logp = 0 the value is 0 whatever the weight, and the gradient is the weight times the advantage."""
    old_logp = torch.tensor([[-0.5, -1.0]])
    logp = torch.zeros(1, 2, requires_grad=True)
    objective, _ = cispo.surrogate(logp, old_logp, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), cispo.Args())
    objective.sum().backward()
    assert not objective.any()
    torch.testing.assert_close(logp.grad, (-old_logp).exp(), **CLOSE)


def test_each_bound_acts_on_its_side_whatever_the_sign_of_the_advantage():
    _, grad = loss_and_gradient(cispo, cispo.Args())
    for sign in (1, -1):
        adv = sign * example()[2]
        _, low = loss_and_gradient(cispo, cispo.Args(eps_low=0.1), adv=adv)
        _, high = loss_and_gradient(cispo, cispo.Args(eps_high=0.1), adv=adv)
        raised = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]]).bool()  # ratios .497, .741
        capped = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool()  # ratios 1.221, 1.649, 1.284
        torch.testing.assert_close(low, torch.where(raised, -adv * 0.9 / 6, sign * grad), **CLOSE)
        torch.testing.assert_close(high, torch.where(capped, -adv * 1.1 / 6, sign * grad), **CLOSE)


def test_by_default_there_is_no_lower_bound():
    _, old_logp, adv, mask = example()
    logp = (old_logp - 6).requires_grad_()
    objective, stats = cispo.surrogate(logp, old_logp, adv, mask, cispo.Args())
    objective[mask].sum().backward()
    torch.testing.assert_close(logp.grad, torch.exp(torch.tensor(-6.0)) * adv * mask, rtol=1e-5, atol=0)
    assert not stats["clip_fraction"].any()


def test_capped_tokens_are_counted():
    logp, old_logp, adv, mask = example()
    _, stats = cispo.surrogate(logp, old_logp, adv, mask, cispo.Args(eps_high=0.25))
    assert stats["clip_fraction"][mask].tolist() == [0, 0, 0, 1, 0, 1]


def test_every_token_of_the_minibatch_weighs_the_same():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    weights = cispo.token_weights(mask, cispo.Args())
    torch.testing.assert_close(weights, mask / 5)
