"""PPO's worked examples, its estimator against closed forms, and its critic."""

import pytest
import torch

from algos import grpo, ppo
from common.policy import Policy
from common.worlds import tiny as tiny_models
from tests.card import example, loss_and_gradient
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
PPO = ROOT / "algos" / "ppo.py"
CLOSE = dict(rtol=0, atol=1e-6)
NAN = float("nan")
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
REWARDS = torch.tensor([[-0.02, 0.01, 1.0], [-0.03, 0.0, NAN]])
VALUES = torch.tensor([[0.2, 0.5, 0.4], [0.3, 0.1, NAN]])


@pytest.mark.parametrize(
    "gamma, lam, row", [(1, 1, [0.79, 0.51, 0.6]), (1, 0.95, [0.736, 0.48, 0.6]), (0.99, 0.9, [0.667575, 0.4406, 0.6])]
)
def test_gae(gamma, lam, row):
    adv = ppo.gae(REWARDS, VALUES, MASK, ppo.Args(gamma=gamma, lam=lam))
    torch.testing.assert_close(adv[0], torch.tensor(row), **CLOSE)
    if lam == 0.95:
        torch.testing.assert_close(adv[1], torch.tensor([-0.325, -0.1, 0]), **CLOSE)


def test_lambda_one_is_reward_to_go_and_lambda_zero_one_step():
    to_go = REWARDS.nan_to_num().flip(1).cumsum(1).flip(1)
    adv = ppo.gae(REWARDS, VALUES, MASK, ppo.Args(lam=1))
    torch.testing.assert_close(adv[MASK], (to_go - VALUES)[MASK], **CLOSE)
    adv = ppo.gae(REWARDS, VALUES, MASK, ppo.Args(lam=0))
    torch.testing.assert_close(adv[0], torch.tensor([-0.02 + 0.5 - 0.2, 0.01 + 0.4 - 0.5, 1 - 0.4]), **CLOSE)


def test_advantages_are_whitened_and_returns_are_not():
    adv, returns = ppo.advantages(REWARDS, VALUES, MASK, ppo.Args())
    torch.testing.assert_close(adv, torch.tensor([[0.98689, 0.435025, 0.693711], [-1.300332, -0.815294, 0]]), **CLOSE)
    torch.testing.assert_close(returns, torch.tensor([[0.936, 0.98, 1.0], [-0.025, 0, 0]]), **CLOSE)


def test_a_hole_in_the_mask_is_stepped_over():
    """Tokens that the policy did not write, in the middle of a row, change nothing for the others."""
    keep = torch.tensor([0, 1, 3])
    holed = torch.full((1, 4), NAN)
    rewards, values, mask = holed.clone(), holed.clone(), torch.zeros(1, 4).bool()
    rewards[:, keep], values[:, keep], mask[:, keep] = REWARDS[:1], VALUES[:1], True
    adv = ppo.gae(rewards, values, mask, ppo.Args())
    torch.testing.assert_close(adv, torch.tensor([[0.736, 0.48, 0, 0.6]]), **CLOSE)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_rollouts_are_finite(value):
    """No valid token, one valid token, and a critic that is right everywhere: advantage 0."""
    for mask in (MASK & False, torch.tensor([[1, 0, 0], [0, 0, 0]]).bool(), MASK):
        scores = ppo.token_rewards(torch.full((2,), value), torch.zeros(2, 3), None, mask, ppo.Args())
        adv, returns = ppo.advantages(scores, torch.full((2, 3), value), mask, ppo.Args())
        assert not adv.any() and torch.equal(returns, mask * value)


def test_score_at_the_last_token_and_penalty_at_every_one():
    old_logp = torch.tensor([[-0.5, -1.2, -0.1], [-0.7, -0.3, NAN]])
    ref_logp = torch.tensor([[-0.9, -1.0, -0.1], [-1.3, -0.3, NAN]])
    scores = torch.tensor([1.0, 0.5])
    rewards = ppo.token_rewards(scores, old_logp, ref_logp, MASK, ppo.Args(beta=0.05))
    torch.testing.assert_close(rewards, torch.tensor([[-0.02, 0.01, 1.0], [-0.03, 0.5, 0]]), **CLOSE)
    rewards = ppo.token_rewards(scores, old_logp, None, MASK, ppo.Args(beta=0.05))
    assert torch.equal(rewards, torch.tensor([[0, 0, 1.0], [0, 0.5, 0]]))


def critic_loss(args):
    values = torch.tensor([[0.5, 0.5, 0.1], [0.3, 0.4, NAN]], requires_grad=True)
    returns = torch.tensor([[0.936, 0.98, 1.0], [-0.025, 0.0, NAN]])
    loss = (ppo.value_loss(values, VALUES, returns, MASK, args) * ppo.token_weights(MASK, args)).sum()
    loss.backward()
    return loss.item(), values.grad


def test_value_loss():
    loss, grad = critic_loss(ppo.Args())
    assert loss == pytest.approx(0.159332, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[0, -0.096, -0.18], [0.065, 0.08, 0]]), **CLOSE)
    wide, wide_grad = critic_loss(ppo.Args(eps_value=0.5))
    assert wide < loss and wide_grad[0, 0].item() == pytest.approx((0.5 - 0.936) / 5, abs=1e-6)


def test_policy_loss():
    args = ppo.Args()
    loss, grad = loss_and_gradient(ppo, args)
    expected = torch.tensor([[0, -0.082764, -0.163366, 0], [0, 0.214004, 0, 0]])
    assert loss == pytest.approx(-0.298793, abs=1e-6)
    torch.testing.assert_close(grad, expected, **CLOSE)
    _, wide = loss_and_gradient(ppo, ppo.Args(eps=0.7))
    assert not torch.equal(grad, wide)


def test_surrogate_is_grpo_s():
    logp, old_logp, adv, mask = example()
    assert torch.equal(*(s.surrogate(logp, old_logp, adv, mask, s.Args())[0] for s in (ppo, grpo)))


def test_explained_variance():
    returns = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, NAN]])
    assert ppo.explained_variance(returns, returns, MASK) == 1
    assert ppo.explained_variance(torch.full((2, 3), 0.7), returns, MASK).item() == pytest.approx(0, abs=1e-6)
    assert ppo.explained_variance(-returns, returns, MASK).item() == pytest.approx(-3, abs=1e-6)
    same = torch.full((2, 3), 0.25)  # returns that do not vary: a number all the same
    assert ppo.explained_variance(same, same, MASK) == 1


def test_critic_reads_the_position_before_the_token():
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    critic = ppo.Critic(Policy(AutoModelForCausalLM.from_config(tiny_models.config())))
    ids = torch.randint(3, 78, (2, 9))
    attention, mask = torch.ones(2, 9).bool(), torch.ones(2, 4).bool()
    attention[1, :2], attention[1, 8], mask[1, 3] = False, False, False
    assert not critic(ids, attention, mask)[0].any()
    torch.nn.init.normal_(critic.lm.lm_head.weight)
    values, _ = critic(ids, attention, mask)
    assert values.dtype == torch.float32 and values[mask].all() and not values[~mask].any()
    other = ids.clone()
    other[:, 7] = (ids[:, 7] + 1) % 70 + 3  # the third completion token
    moved = (critic(other, attention, mask)[0] - values).abs() > 1e-6
    assert moved.tolist() == [[False, False, False, True], [False, False, False, False]]
    alone, _ = critic(ids[1:, 2:], attention[1:, 2:], mask[1:])
    torch.testing.assert_close(alone, values[1:], rtol=1e-5, atol=1e-6)


SMALL = "--prompts-per-step 16 --minibatches 2 --eval-prompts 4 --beta 0.02".split()


def test_the_critic_learns_at_its_own_rate(tmp_path, tiny):
    losses = []
    for name, rate in (("none", []), ("same", ["--value-lr", 1e-3]), ("zero", ["--value-lr", 0])):
        done = run(tmp_path, *SMALL, "--steps", 1, *rate, "--run-dir", tmp_path / name, script=PPO)
        assert done.code == 0, done.err
        losses.append(lines(tmp_path / name / "metrics.jsonl")[0]["value_loss"])
    assert 0 < losses[0] == losses[1] != losses[2]  # none: ten times 1e-4


def test_the_critic_is_in_the_checkpoint(tmp_path, tiny):
    for argv in (["--steps", 3, "--run-dir", "whole"], ["--steps", 1, "--run-dir", "cut"], ["--steps", 3, "--resume", "cut"]):
        done = run(tmp_path, *SMALL, *argv, script=PPO)
        assert done.code == 0, done.err
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    for key in ("loss", "value_loss", "value_grad_norm", "explained_variance"):
        assert [row[key] for row in a] == [row[key] for row in b] and len({row[key] for row in a}) == 3
