"""Dr. GRPO's worked example, and the two biases that it removes."""

import pytest
import torch

from algos import dr_grpo, grpo
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=8))
    assert loss == pytest.approx(-0.112047, abs=1e-6)
    expected = torch.tensor([[0, -0.031037, -0.061262, 0], [0, 0.080252, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_the_budget_is_a_constant_of_the_run_and_not_the_padded_width():
    """Only a budget that happens to be T = 4 gives what dividing by the padded width would give."""
    loss, grad = loss_and_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=4))
    assert loss == pytest.approx(-0.224095, abs=1e-6)
    _, other = loss_and_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=8))
    torch.testing.assert_close(grad, 2 * other)


def test_with_completions_as_long_as_the_budget_it_is_grpo():
    logp, old_logp, adv, _ = example()
    mask, results = torch.ones(2, 4, dtype=torch.bool), []
    for script, args in ((dr_grpo, dr_grpo.Args(max_new_tokens=4)), (grpo, grpo.Args())):
        objective, _ = script.surrogate(logp, old_logp, adv, mask, args)
        loss = (objective * script.token_weights(mask, args)).sum()
        results.append((loss, *torch.autograd.grad(loss, logp)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "rewards, expected", [([0, 0, 0, 1], [-0.25, -0.25, -0.25, 0.75]), ([1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5])]
)
def test_advantages(rewards, expected):
    adv = dr_grpo.advantages(torch.tensor([rewards]).float(), dr_grpo.Args())
    torch.testing.assert_close(adv, torch.tensor([expected]), **CLOSE)


def test_a_prompt_counts_by_the_spread_of_its_rewards():
    """GRPO blows a group of nearly equal rewards up to the size of any other."""
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.1, 0, 0, 0.1]])
    ratio = {s: (a := s.advantages(rewards, None))[1, 0] / a[0, 0] for s in (dr_grpo, grpo)}
    assert ratio[dr_grpo].item() == pytest.approx(0.1, abs=1e-6) and ratio[grpo].item() == pytest.approx(1.0, abs=1e-4)


def test_a_token_weighs_the_same_in_a_short_and_in_a_long_completion():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    weights = dr_grpo.token_weights(mask, dr_grpo.Args(max_new_tokens=8))
    torch.testing.assert_close(weights, mask / 16)
    assert grpo.token_weights(mask, grpo.Args())[1, 0] == 4 * grpo.token_weights(mask, grpo.Args())[0, 0]


def expected_gradient(script, args, G=3):
    """Exact expectation, over all groups of G completions, of the on-policy gradient with respect to the logits of a policy
    whose completions are `a` (reward 1), `b` (0) and `c c` (0.3); and the gradient of the expected reward."""
    logits = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    rewards, lengths = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64), torch.tensor([1, 1, 2])
    groups, total = torch.cartesian_prod(*[torch.arange(3)] * G), 0.0
    for group in groups:
        logp = logits.log_softmax(0)[group]
        chance = logp.detach().sum().exp()
        mask = torch.arange(2) < lengths[group][:, None]
        logp = torch.stack([logp, torch.zeros_like(logp)], 1)  # a second token is certain
        adv = script.advantages(rewards[group][None], args).reshape(-1, 1).expand(G, 2)
        objective, _ = script.surrogate(logp, logp.detach(), adv, mask, args)
        (gradient,) = torch.autograd.grad((objective * script.token_weights(mask, args)).sum(), logits)
        total = total + chance * gradient
    (true,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    return total, true


def test_the_expected_gradient_is_the_true_one_times_a_constant():
    mine, true = expected_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=8))
    torch.testing.assert_close(mine, true * (3 - 1) / 3 / 8)
    biased, true = expected_gradient(grpo, grpo.Args())
    assert torch.cosine_similarity(biased, true, dim=0) < 0.95


def test_clip_width_matters():
    _, a = loss_and_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=8))
    _, b = loss_and_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=8, eps=0.7))
    assert a[0, 0] == 0 != b[0, 0]
