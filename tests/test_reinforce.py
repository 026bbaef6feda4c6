"""REINFORCE's worked examples: returns, whitening over tokens, and the three baselines."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from algos import grpo, reinforce
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def rows(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def advantages(rewards, mask, ref_logp=None, **fields):
    zeros = torch.zeros(mask.shape)
    return reinforce.advantages(torch.tensor(rewards).float(), zeros, ref_logp, mask, reinforce.Args(**fields))


def test_policy_loss():
    """PPO's worked example: the clipped objective, averaged over all tokens."""
    loss, grad = loss_and_gradient(reinforce, reinforce.Args())
    assert loss == pytest.approx(-0.298793, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[0, -0.082764, -0.163366, 0], [0, 0.214004, 0, 0]]), **CLOSE)
    _, wide = loss_and_gradient(reinforce, reinforce.Args(eps=0.7))
    assert wide[0, 0] < 0


def test_on_policy_it_is_williams_gradient():
    logp, _, _, mask = example()
    adv = torch.tensor([[1.0, 0.5, -1, 2], [-1, 1, 9, 9]])
    (expected,) = torch.autograd.grad(-(adv * logp)[mask].sum() / 6, logp)
    objective, _ = reinforce.surrogate(logp, logp.detach(), adv, mask, reinforce.Args())
    loss = -(objective * reinforce.token_weights(mask, reinforce.Args())).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected)


def test_whitening_is_over_tokens():
    """Over completions it would be 0.577350 and -1.154701."""
    mask = rows(3, 2, 1)
    adv = advantages([[1], [0], [1]], mask)
    torch.testing.assert_close(adv, torch.tensor([[0.645497], [-1.290994], [0.645497]]) * mask, **CLOSE)


def test_group_baseline():
    """The group that is all right gets an advantage too: the mean over tokens is not 0."""
    mask = rows(3, 2, 1, 2)
    adv = advantages([[1, 0], [1, 1]], mask, baseline="group")
    expected = torch.tensor([[1.048503], [-1.348076], [-0.149786], [-0.149786]]) * mask
    torch.testing.assert_close(adv, expected, **CLOSE)


def test_no_baseline():
    mask = rows(3, 2, 1, 2)
    adv = advantages([[1, 0], [1, 1]], mask, baseline="none")
    assert torch.equal(adv, torch.tensor([[1.0], [0], [1], [1]]) * mask)


def test_an_easy_prompt_is_credited_for_being_easy():
    mask = rows(2, 2, 2, 2)
    rewards = [[1, 0], [1, 1]]
    batch, group = (advantages(rewards, mask, baseline=b)[:, 0] for b in ("batch", "group"))
    assert batch[0] == batch[2] == batch[3] and group[0] > group[2] == group[3]


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_whitened_advantages_have_mean_0_and_variance_1_over_tokens(baseline):
    torch.manual_seed(0)
    mask = rows(5, 1, 3, 2, 4, 4)
    adv = advantages(torch.rand(3, 2).tolist(), mask, ref_logp=torch.randn(6, 5), beta=0.1, baseline=baseline)
    assert adv[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert adv[mask].var().item() == pytest.approx(1, abs=1e-5)
    assert not adv[~mask].any()


K1 = torch.tensor([[0.1, -0.05, 0.2]])


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(beta=0.1), [0.975, 0.985, 0.98]),
        (dict(beta=0.1, gamma=0.5), [0.2375, 0.495, 0.98]),  # .98; -.05 * -.1 + .49; -.01 + .2475
        (dict(beta=0.0, gamma=0.5), [0.25, 0.5, 1]),
    ],
)
def test_returns(fields, expected):
    """Completion tokens end before the padding does: the score is at the last one of them."""
    mask, pad = torch.tensor([[True, True, True, False]]), torch.tensor([[math.nan]])
    old_logp = torch.cat([torch.full((1, 3), -1.0), pad], 1)
    ref_logp = torch.cat([-1.0 - K1, pad], 1)
    found = reinforce.returns(torch.tensor([[1.0]]), old_logp, ref_logp, mask, reinforce.Args(**fields))
    torch.testing.assert_close(found, torch.tensor([expected + [0.0]]), **CLOSE)


def test_rewards_of_minus_1_and_1_are_those_of_0_and_1():
    mask = rows(3, 2, 1, 2)
    torch.testing.assert_close(advantages([[1], [0], [0], [1]], mask), advantages([[1], [-1], [-1], [1]], mask))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_equal_rewards_give_zero_advantage(value, baseline):
    """The mean of 0.3 is off in its last bit, which whitening would make 3e-4, with one sign for every token."""
    mask = rows(*[1 + i % 7 for i in range(256)])
    assert not advantages([[value] * 8] * 32, mask, baseline=baseline).any()


@pytest.mark.parametrize("baseline", ["batch", "group", "none"])
def test_garbage_and_width_of_the_padding_change_nothing(baseline):
    torch.manual_seed(0)
    mask, rewards = rows(3, 2, 1, 2), torch.tensor([[1.0, 0], [1, 1]])
    old_logp, ref_logp = -torch.rand(4, 3), -torch.rand(4, 3)
    args = reinforce.Args(baseline=baseline, beta=0.3, gamma=0.9)
    adv = reinforce.advantages(rewards, old_logp, ref_logp, mask, args)
    bad = torch.nn.functional.pad(torch.where(mask, old_logp, math.inf), (0, 2), value=math.nan)
    wide = [torch.nn.functional.pad(x, (0, 2)) for x in (ref_logp, mask)]
    torch.testing.assert_close(reinforce.advantages(rewards, bad, *wide, args)[:, :3], adv)


def test_k2():
    """Half the squared log-ratio; its on-policy gradient is the log-ratio itself."""
    logp, _, _, mask = example()
    ref_logp = torch.tensor([[-0.6, -1.0, -0.1, -1.8], [-0.9, -0.3, math.nan, -1.0]])
    k2 = reinforce.kl_penalty(logp, ref_logp, mask)
    gap = torch.tensor([[0.3, -0.9, -0.02, 0.3], [-0.1, 0.25, 0, 0]])
    torch.testing.assert_close(k2.detach(), gap**2 / 2, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(k2.sum(), logp)[0], gap, **CLOSE)


@pytest.mark.parametrize("baseline", ["batch", "group", "none"])
def test_the_loop_takes_the_penalty_from_the_reward_or_from_the_objective(tmp_path, monkeypatch, baseline):
    """A run of one step with a reference that is less likely, by more from token to token, to say what the policy says."""
    from common import batch as batches

    real, seen = batches.read, SimpleNamespace()

    def read(policy, batch, args):
        (logp, entropy), seen.batch = real(policy, batch, args), batch
        return logp if batch.old_logp is None else logp - 0.1 * batch.mask.cumsum(1) * batch.mask, entropy

    monkeypatch.setattr(batches, "read", read)
    args = reinforce.Args(
        steps=1, prompts_per_step=16, minibatches=1, eval_prompts=4, beta=0.1, baseline=baseline, run_dir=str(tmp_path / "run")
    )
    reinforce.train(args)
    batch, in_loss = seen.batch, baseline == "group"
    rewards, ref_logp = batch.reward.view(16, 8), None if in_loss else batch.ref_logp
    expected = reinforce.advantages(rewards, batch.old_logp, ref_logp, batch.mask, args)
    torch.testing.assert_close(batch.adv, expected)
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    k2 = (0.1 * batch.mask.cumsum(1))[batch.mask].square().mean().item() / 2
    assert metrics["ref_kl"] == pytest.approx(k2, rel=1e-3)
    loss = -expected[batch.mask].mean().item() + in_loss * 0.1 * k2
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)


def test_surrogate_is_grpo_s():
    logp, old_logp, adv, mask = example()
    assert torch.equal(*(s.surrogate(logp, old_logp, adv, mask, s.Args())[0] for s in (reinforce, grpo)))


@pytest.mark.parametrize("fields", [dict(baseline="mean"), dict(baseline="group", group_size=1)])
def test_what_is_refused(fields):
    from common import UserError

    with pytest.raises(UserError, match="baseline|group-size"):
        reinforce.train(reinforce.Args(**fields))
