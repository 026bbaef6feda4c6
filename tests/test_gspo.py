"""GSPO's worked example, its band, and the token form."""

import pytest
import torch

from algos import gspo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)
WIDE = dict(eps_low=0.2, eps_high=0.2)
TOKEN_ADV = torch.tensor([[1, 0.5, -1, 2], [-1, 1, 0, 0]])


@pytest.mark.parametrize("variant", ["seq", "token"])
@pytest.mark.parametrize(
    "band, loss, rows",
    [({}, 0.002344, [[-0.124377] * 4, [0, 0, 0, 0]]), (WIDE, -0.009851, [[-0.124377] * 4, [0.243827, 0.243827, 0, 0]])],
)
def test_worked_example(variant, band, loss, rows):
    """With one advantage per completion the token form is the same, in value and in gradient."""
    found, grad = loss_and_gradient(gspo, gspo.Args(variant=variant, **band))
    assert found == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(rows), **CLOSE)


def test_the_ratio_is_the_geometric_mean_over_valid_tokens():
    logp, old_logp, _, mask = example()
    objective, _ = gspo.surrogate(logp, old_logp, torch.ones(2, 4), mask, gspo.Args(eps_low=9.0, eps_high=9.0))
    torch.testing.assert_close(objective.detach()[:, 0], torch.tensor([0.995012, 0.975310]), **CLOSE)


def test_token_form_with_token_advantages():
    loss, grad = loss_and_gradient(gspo, gspo.Args(variant="token", **WIDE), adv=TOKEN_ADV)
    assert loss == pytest.approx(-0.310941, abs=1e-6)
    expected = torch.tensor([[-0.124377, -0.062188, 0.124377, -0.248753], [0.243827, -0.243827, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_sequence_form_spreads_token_advantages_evenly():
    """The same loss, but every token is pushed by the completion's mean advantage: why the token form exists."""
    loss, grad = loss_and_gradient(gspo, gspo.Args(**WIDE), adv=TOKEN_ADV)
    assert loss == pytest.approx(-0.310941, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[-0.077735] * 4, [0, 0, 0, 0]]), **CLOSE)


def test_token_form_keeps_the_ratio_exact_where_tokens_are_far_off():
    """The ratio's value must survive a token whose log-ratio is thousands of times the band."""
    _, old_logp, _, mask = example()
    logp = (old_logp + torch.tensor([[9.0, -9.0, 5.0, -5.0002], [0, 0, 0, 0]])).requires_grad_()
    values = [gspo.surrogate(logp, old_logp, torch.ones(2, 4), mask, gspo.Args(variant=v))[0] for v in ("seq", "token")]
    assert torch.equal(values[0].expand(2, 4), values[1])


@pytest.mark.parametrize("field, adv", [("eps_high", 1.0), ("eps_low", -1.0)])
def test_each_end_of_the_band_clips_the_whole_completion_of_its_sign(field, adv):
    """A completion that has moved by 1% in the direction of its advantage is kept if the band is wider, and dropped if not."""
    _, old_logp, _, mask = example()
    grads = {}
    for eps in (0.005, 0.02):
        logp = (old_logp + adv * torch.tensor([0.03, -0.01, 0.01, 0.01])).requires_grad_()
        args = gspo.Args(**{"eps_low": 0.5, "eps_high": 0.5, field: eps})
        objective, stats = gspo.surrogate(logp, old_logp, torch.full((2, 4), adv), mask, args)
        objective.mul(mask).sum().backward()
        grads[eps] = logp.grad
        assert stats["clip_fraction"].unique().tolist() == [float(eps == 0.005)]
    assert not grads[0.005].any() and (grads[0.02][mask] * adv > 0).all()


@pytest.mark.parametrize("sign, kept, dropped", [(1.0, 3.5e-4, 4.5e-4), (-1.0, 2.5e-4, 3.5e-4)])
def test_the_default_band_is_the_papers(sign, kept, dropped):
    _, old_logp, _, mask = example()
    for step, share in ((kept, 0.0), (dropped, 1.0)):
        _, stats = gspo.surrogate(old_logp + sign * step, old_logp, torch.full((2, 4), sign), mask, gspo.Args())
        assert stats["clip_fraction"].unique().tolist() == [share]


def test_an_unknown_variant_is_refused():
    with pytest.raises(KeyError, match="sequence"):
        loss_and_gradient(gspo, gspo.Args(variant="sequence"))
