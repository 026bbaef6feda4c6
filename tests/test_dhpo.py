"""DHPO's worked examples, its limits and its readings."""

import pytest
import torch

from algos import dhpo, grpo, gspo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)
ENTROPY = torch.tensor([[0.4, 1.6, 0.1, 2.0], [0.9, 0.5, 3.0, 3.0]])


def card(**own):
    """Loss and gradient with the card's intervals."""
    return loss_and_gradient(dhpo, dhpo.Args(**dict(eps_token_high=0.2) | own), entropy=ENTROPY)


@pytest.mark.parametrize(
    "own, loss, grad",
    [
        (dict(), 0.015741, [[0, -0.093225, -0.123451, 0], [0, 0.282417, 0, 0]]),
        (dict(seq_grad="plain"), 0.015741, [[-0.031094, -0.062131, -0.092357, -0.031094], [0.060957, 0.221460, 0, 0]]),
        (dict(min="branch"), 0.019376, [[-0.062188, -0.093225, -0.123451, -0.062188], [0, 0.160503, 0, 0]]),
        (dict(mix="entropy"), -0.028486, [[-0.128845, -0.075190, -0.124377, 0], [0, 0, 0, 0]]),
        (dict(mix="entropy", min="branch"), -0.028064, [[-0.104738, -0.075190, -0.124377, 0], [0, 0, 0, 0]]),
    ],
)
def test_worked_examples(own, loss, grad):
    found, found_grad = card(**own)
    assert found == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(found_grad, torch.tensor(grad), **CLOSE)


def test_entropy_weights_are_of_the_completion_and_ignore_padding():
    mask = example()[3]
    expected = torch.tensor([[0.157895, 0.789474, 0, 1], [1, 0, 0, 0]])
    w = dhpo.mixing_weight(ENTROPY, mask, dhpo.Args(mix="entropy"))
    torch.testing.assert_close(w, expected, **CLOSE)
    other = dhpo.mixing_weight(ENTROPY, mask, dhpo.Args(mix="entropy", entropy_to="seq"))
    torch.testing.assert_close((w + other)[mask], torch.ones(6))
    assert not dhpo.mixing_weight(ENTROPY.clone().requires_grad_(), mask, dhpo.Args(mix="entropy")).requires_grad


def test_constant_entropy_is_the_sequence_branch_alone():
    own = dict(eps_token_high=0.2, mix="entropy")
    loss, grad = loss_and_gradient(dhpo, dhpo.Args(**own), entropy=torch.full((2, 4), 0.7))
    expected, expected_grad = loss_and_gradient(gspo, gspo.Args())
    assert loss == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(grad, expected_grad, **CLOSE)


@pytest.mark.parametrize("min_", ["mix", "branch"])
@pytest.mark.parametrize("w, parent, parent_loss", [(1.0, grpo, 0.036408), (0.0, gspo, 0.002344)])
def test_the_limits_are_the_parents(monkeypatch, w, parent, parent_loss, min_):
    monkeypatch.setattr(dhpo, "mixing_weight", lambda entropy, mask, args: torch.full_like(entropy, w))
    loss, grad = card(min=min_)
    expected, expected_grad = loss_and_gradient(parent, parent.Args())
    assert loss == pytest.approx(expected, abs=1e-6) and loss == pytest.approx(parent_loss, abs=1e-6)
    torch.testing.assert_close(grad, expected_grad, **CLOSE)


def test_the_sequence_ratio_and_the_clip_shares_are_logged():
    logp, old_logp, adv, mask = example()
    _, stats = dhpo.surrogate(logp, old_logp, adv, mask, dhpo.Args(), ENTROPY)
    assert stats["clip_fraction"][mask].tolist() == [0, 0, 0, 1, 1, 0]
    assert stats["clip_fraction_seq"][mask].tolist() == [0, 0, 0, 0, 1, 1]
    gap = torch.tensor([0.226391, 0.498427, 0.014813, 0.653709, 0.234492, 0.308715])
    torch.testing.assert_close(stats["ratio_gap"].detach()[mask], gap, **CLOSE)


@pytest.mark.parametrize(
    "own",
    [
        dict(eps_token_low=0.3),
        dict(eps_token_high=0.5),
        dict(eps_seq_low=0.1),
        dict(eps_seq_high=0.5),
        dict(mix="entropy"),
        dict(mix="entropy", entropy_to="seq"),
        dict(min="branch"),
        dict(seq_grad="plain"),
    ],
)
def test_every_hyperparameter_acts(own):
    """On the card's rows and their mirror image, whose ratios leave the intervals on the other side."""
    base = {"mix": "entropy"} if "entropy_to" in own else {}
    logp, old_logp, adv, mask = example()
    grads = []
    for settings in (base, own):
        total = torch.zeros_like(logp)
        for sign in (1, -1):
            new = (old_logp + sign * (logp.detach() - old_logp)).requires_grad_()
            objective, _ = dhpo.surrogate(new, old_logp, adv, mask, dhpo.Args(**settings), ENTROPY)
            (objective * dhpo.token_weights(mask, dhpo.Args())).sum().backward()
            total = total + new.grad.abs()
        grads.append(total)
    assert not torch.allclose(*grads)
