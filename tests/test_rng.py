"""RNG's worked numbers, its arms, the dynamics of one step on a softmax, and a minibatch without negatives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from algos import grpo, rng
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
REWARDS = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
LENGTHS = torch.tensor([2, 3, 4, 3])


def loss(divisor="all", ratio=1.0, **changes):
    """Of one group with these lengths, as the loop forms it."""
    args = rng.Args(divisor=divisor, **changes)
    mask = torch.arange(4) < LENGTHS[:, None]
    adv = rng.advantages(REWARDS, args).flatten()[:, None].expand(4, 4)
    trained = mask & (adv != 0) if divisor == "taught" else mask
    old_logp = torch.full((4, 4), -1.0)
    logp = (old_logp + torch.tensor(ratio).log()).requires_grad_()
    objective, _ = rng.surrogate(logp, old_logp, adv, trained, args)
    value = -(objective * rng.token_weights(trained, args))[trained].sum()
    (gradient,) = torch.autograd.grad(value, logp)
    return value.item(), gradient


@pytest.mark.parametrize("divisor, variant, value", [
    ("all", "grpo_n", 0.505181), ("taught", "grpo_n", 0.866024), ("taught", "nsr", 1.0), ("all", "nsr", 7 / 12),
    ("taught", "psr", -1.0), ("all", "psr", -5 / 12), ("all", "w_reinforce", (7 - 0.5) / 12),
])  # fmt: skip
def test_worked_numbers(divisor, variant, value):
    found, gradient = loss(divisor, variant=variant)
    assert found == pytest.approx(value, abs=1e-6)
    n = {"all": 12, "taught": 5 if variant == "psr" else 7}[divisor]
    size = {"grpo_n": 0.866024}.get(variant, 1.0)
    wrong = gradient[2:][torch.arange(4) < LENGTHS[2:, None]]
    torch.testing.assert_close(wrong, torch.full((7,), 0.0 if variant == "psr" else size / n), **CLOSE)
    right = dict(psr=-1.0, w_reinforce=-0.1).get(variant, 0.0) / n
    torch.testing.assert_close(gradient[:2][torch.arange(4) < LENGTHS[:2, None]], torch.full((5,), right), **CLOSE)


def test_a_negative_has_a_gradient_only_above_the_interval_s_lower_end():
    assert not loss(ratio=0.79)[1].any() and loss(ratio=0.81)[1].any() and loss(ratio=3.0)[1].any()
    assert loss(ratio=0.79, eps=0.3)[1].any()


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [0.7] * 4, [0.3, 0.3 + 1e-8, 0.3, 0.3]])
def test_equal_rewards_teach_nothing(rewards):
    assert not rng.advantages(torch.tensor([rewards]), rng.Args()).any()


def test_the_sign_is_relative_to_the_group():
    """0.8 beside 1.0 is pushed down, and 0.2 beside 0.0 is not; nsr asks for right and wrong, all-wrong groups included."""
    rewards = torch.tensor([[1.0, 0.8, 1.0, 1.0], [0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    adv = rng.advantages(rewards, rng.Args())
    assert (adv < 0).tolist() == [[False, True, False, False], [False, True, True, True], [False] * 4] and not (adv > 0).any()
    torch.testing.assert_close(adv, grpo.advantages(rewards, grpo.Args()).clamp(max=0))
    assert rng.advantages(rewards, rng.Args(variant="nsr")).tolist() == [[0.0] * 4, [-1.0] * 4, [-1.0] * 4]
    assert rng.advantages(rewards, rng.Args(variant="psr")).tolist() == [[1.0] * 4, [0.0] * 4, [0.0] * 4]
    found = rng.advantages(rewards, rng.Args(variant="w_reinforce", positive=0.25))
    assert found.tolist() == [[0.25] * 4, [-1.0] * 4, [-1.0] * 4]


@pytest.mark.parametrize("right", [1, 3, 7])
def test_grpo_n_is_nsr_with_the_weight_of_the_group(right):
    """sqrt(p / (1 - p)), times the correction of the sample's std for 8."""
    rewards = torch.tensor([[1.0] * right + [0.0] * (8 - right)], dtype=torch.float64)
    p = right / 8
    weight = (p / (1 - p)) ** 0.5 * (7 / 8) ** 0.5
    found = rng.advantages(rewards, rng.Args())
    torch.testing.assert_close(found, weight * rng.advantages(rewards, rng.Args(variant="nsr")), rtol=1e-5, atol=0)


def step(pi, adv):
    """Expected gradient on the logits of a softmax policy, on policy, of actions that have these advantages."""
    z = pi.log().requires_grad_()
    logp = z.log_softmax(0)
    mask = torch.ones(len(pi), 1, dtype=torch.bool)
    objective, _ = rng.surrogate(logp[:, None], logp.detach()[:, None], adv[:, None], mask, rng.Args())
    return torch.autograd.grad((objective[:, 0] * pi).sum(), z)[0]


@pytest.mark.parametrize("pi, full, negative", [
    ((0.60, 0.05, 0.35), (0.162000, 0.023500, -0.185500), (0.111300, 0.009275, -0.120575)),
    ((0.90, 0.095, 0.005), (-0.013500, 0.017575, -0.004075), (0.002318, 0.001670, -0.003987)),
])  # fmt: skip
def test_two_stages(pi, full, negative):
    """The best token (the second) hardly moves at first; later full gradients move mass to it, and negative ones do not."""
    pi, mu = torch.tensor(pi, dtype=torch.float64), torch.tensor([0.8, 1.0, 0.0], dtype=torch.float64)
    adv = mu - (pi * mu).sum()
    torch.testing.assert_close(step(pi, adv), torch.tensor(full, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(step(pi, adv.clamp(max=0)), torch.tensor(negative, dtype=torch.float64), **CLOSE)
    c = -(pi * adv.clamp(max=0)).sum()
    torch.testing.assert_close(step(pi, adv.clamp(max=0)), pi * (adv.clamp(max=0) + c))


def test_without_negatives_there_is_no_step(tiny, tmp_path):
    """Weight decay and momentum would move the weights all the same. All rewards are 1 here; with psr they teach."""
    (tmp_path / "mine.py").write_text("def check(text, answer):\n    return 1.0\n")
    argv = ["--model", tiny, "--reward", f"{tmp_path}/mine.py:check", "--prompt-template", "{prompt}", "--eval-prompts", 8]
    argv += "--steps 2 --prompts-per-step 4 --group-size 4 --minibatches 2 --weight-decay 0.5".split()
    weights = dict(start=(Path(tiny) / "model.safetensors").read_bytes())
    for name, more in dict(n=(), nsr=("--variant", "nsr"), psr=("--variant", "psr")).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "rng.py")
        assert done.code == 0, done.err
        (last,) = (tmp_path / name / "checkpoints").glob("step-000002")
        weights[name] = (last / "model.safetensors").read_bytes()
        cut = sum(row["truncated"] for row in lines(tmp_path / name / "metrics.jsonl"))
        assert cut == 0 and [row["negatives"] for row in lines(tmp_path / name / "metrics.jsonl")] == [0.0, 0.0]
    weights = {name: load(data) for name, data in weights.items()}
    same = {n: all(torch.equal(w[k], weights["start"][k]) for k in weights["start"]) for n, w in weights.items()}
    assert same == dict(start=True, n=True, nsr=True, psr=False)


@pytest.mark.parametrize("changes", [dict(variant="nsr"), dict(eps=0.05), dict(divisor="taught"), dict(variant="w_reinforce")])
def test_every_flag_changes_the_loss(changes):
    assert loss(ratio=0.9, **changes)[0] != loss(ratio=0.9)[0]


def test_positive_is_the_weight_of_right_ones():
    assert loss(variant="w_reinforce", positive=0.5)[0] == pytest.approx((7 - 2.5) / 12, abs=1e-6)
