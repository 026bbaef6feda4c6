"""HAPO's worked numbers, its four parts one at a time, the heated sampler by enumeration, and what a run logs."""

import itertools
import math
from collections import Counter

import pytest
import torch

from algos import dapo, hapo
from common.engines import draw
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
ENTROPY = torch.tensor([[1.0, 0.1, 0.5, 2.0]])
RATIO = torch.tensor([[1.15, 0.95, 0.75, 1.4]])
ADV = torch.tensor([[1.732047, -0.577349, -0.577349, -1.0 * 0.577349]])
MASK = torch.ones(1, 4).bool()
OFF = dict(ats=False, tga=False, dar=False, aac=False)


def signal(args):
    return hapo.entropy_signal(ENTROPY, hapo.entropy_scale(ENTROPY.flatten(), args), args)


def loss(h=None, adv=ADV, ratio=RATIO, **changes):
    args = hapo.Args(**dict(rho=0.5) | changes)
    logp = ratio.log().requires_grad_()
    objective, _ = hapo.surrogate(logp, torch.zeros_like(ratio), adv, MASK, args, signal(args) if h is None else h)
    value = -(objective * hapo.token_weights(MASK, args)).sum()
    value.backward()
    return value.item(), logp.grad


def test_worked_numbers():
    args = hapo.Args(rho=0.5, tau=0.05)
    torch.testing.assert_close(signal(args), torch.tensor([[0, -1, -0.301030, 1]]), **CLOSE)
    value, gradient = loss()
    assert value == pytest.approx(0.014434, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-0.497963, 0, 0.108253, 0.404144]]), **CLOSE)
    # The released code's signal is never negative: the third token is then cut on the left, the second pushed.
    value, gradient = loss(h=signal(args).abs())
    assert value == pytest.approx(0.193531, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-0.497963, 0.137120, 0, 0.404144]]), **CLOSE)


def test_the_groups_average_is_over_tokens():
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 3]])
    adv = hapo.advantages(rewards, lengths, hapo.Args())
    torch.testing.assert_close(adv, torch.tensor([[1.732047, -0.577349]]), **CLOSE)
    assert (adv * lengths).sum().abs() < 1e-5
    plain = torch.tensor([[0.707106, -0.707106]])
    torch.testing.assert_close(hapo.advantages(rewards, lengths, hapo.Args(tga=False)), plain, **CLOSE)


def test_a_group_with_a_giant_advantage_falls_back():
    """One right token among 30 has the advantage sqrt(29) = 5.4; among 26 it is 5, and among 25 it stays below."""
    rewards = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    adv = hapo.advantages(rewards, torch.tensor([[1, 20, 9], [1, 16, 8]]), hapo.Args())
    torch.testing.assert_close(adv[0], dapo.advantages(rewards, dapo.Args())[0])
    assert adv[1, 0].item() == pytest.approx(math.sqrt(24), abs=1e-4)


def test_empty_completions_and_equal_rewards():
    args = hapo.Args()
    assert not hapo.advantages(torch.ones(1, 3), torch.tensor([[3, 7, 11]]), args).any()
    assert not hapo.advantages(torch.full((1, 3), 0.1), torch.tensor([[3, 7, 11]]), args).any()
    adv = hapo.advantages(torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1, 3).long(), args)
    assert adv.isfinite().all()


def test_all_four_off_is_dapo_but_for_the_dual_clip():
    g = torch.Generator().manual_seed(0)
    old, adv, h = torch.randn(4, 6, generator=g), torch.randn(4, 1, generator=g).expand(4, 6), torch.rand(4, 6, generator=g)
    mask = torch.ones(4, 6).bool()
    logp = (old + 0.4 * torch.randn(4, 6, generator=g)).requires_grad_()
    theirs, _ = dapo.surrogate(logp, old, adv, mask, dapo.Args())
    for args in (hapo.Args(**OFF), hapo.Args()):
        mine, _ = hapo.surrogate(logp, old, adv, mask, args, h)
        same = torch.equal(mine, theirs)
        assert same == (not args.dar)
    far, _ = hapo.surrogate(old + 3, old, -torch.ones(4, 6), mask, hapo.Args(**OFF), h)  # a ratio of 20
    torch.testing.assert_close(far, torch.full((4, 6), -10.0))


@pytest.mark.parametrize("part", ["dar", "aac"])
def test_each_part_alone_moves_the_worked_example(part):
    values = {name: loss(**{p: p in parts for p in ("dar", "aac")}) for name, parts in
              dict(none=(), one=(part,), both=("dar", "aac")).items()}  # fmt: skip
    assert len({round(v, 6) for v, _ in values.values()}) == 3


def test_uniform_intervals_where_only_the_advantage_is_redistributed():
    """C alone: neutral zone (0.9, 1.14), so the first and the last two are outside, the second inside."""
    _, gradient = loss(aac=False)
    torch.testing.assert_close(gradient, -torch.tensor([[1.15 * 1.732047, 0, 0, 1.4 * 2 * -0.577349]]) / 4, **CLOSE)


def test_the_neutral_zone_is_as_wide_as_the_interval_is():
    """At h = -1 the interval reaches down to 0.6 and the zone to 0.8; at h = 1 up to 1.56 and 1.28."""
    h = torch.tensor([[-1.0, -1.0, 1.0, 1.0]])
    _, gradient = loss(h=h, adv=torch.ones(1, 4), ratio=torch.tensor([[0.85, 0.75, 1.2, 1.3]]))
    torch.testing.assert_close(gradient, -torch.tensor([[0, 0.75, 1.2, 2 * 1.3]]) / 4, **CLOSE)
    _, gradient = loss(h=h, adv=torch.ones(1, 4), ratio=torch.tensor([[0.85, 0.75, 1.2, 1.3]]), aac=False)
    torch.testing.assert_close(gradient, -torch.tensor([[0.85, 0.75, 2 * 1.2, 0]]) / 4, **CLOSE)


def test_at_ratio_1_sure_tokens_learn_less():
    _, gradient = loss(ratio=torch.ones(1, 4))
    h = signal(hapo.Args(rho=0.5))
    torch.testing.assert_close(gradient, -ADV * (1 + h.clamp(max=0)) / 4, **CLOSE)


def test_the_scale_of_entropies():
    args = hapo.Args()
    Q, above, below = hapo.entropy_scale(torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0, 2.0]), args)
    assert (Q, above, below) == pytest.approx((0.0, math.log(2), -math.log(1e-4)))  # 0.8 of 5 steps: the fifth
    exact = hapo.entropy_scale(torch.tensor([0.0, 0.01, 0.1, 0.5, 1.0, 2.0]), hapo.Args(entropy_floor=1e-8))
    assert exact[2] == pytest.approx(-math.log(1e-8))
    for entropy in (torch.zeros(0), torch.zeros(5), torch.full((5,), 0.7)):
        scale = hapo.entropy_scale(entropy, args)
        h = hapo.entropy_signal(torch.tensor([0.0, 0.7, 3.0]), scale, args)
        assert h.isfinite().all() and h.abs().max() <= 1
    g = torch.Generator().manual_seed(0)
    entropy = torch.rand(1000, generator=g) ** 4
    h = hapo.entropy_signal(entropy, hapo.entropy_scale(entropy, args), args)
    assert h.max() == 1 and h.min() == -1 and (h > 0).float().mean() == pytest.approx(0.2, abs=0.002)


def test_the_temperature():
    args = hapo.Args(rho=0.5, tau=0.05)
    scale = hapo.entropy_scale(ENTROPY.flatten(), args)
    # Two-token laws with the entropies of the worked example, as far as two tokens have them; the last has eight.
    logits = torch.full((2, 8), -1e4)
    logits[0, :] = 0.0  # ln 8 = 2.08 nat: more than any, and clipped
    logits[1, 0] = 0.0  # certain
    torch.testing.assert_close(hapo.heat(logits, scale, args), torch.tensor([1.05, 0.95]), **CLOSE)
    three = torch.zeros(1, 8)
    three[:, 3:] = -1e4
    h = math.log(math.log(3)) / math.log(2)
    assert hapo.heat(three, scale, args).item() == pytest.approx(1 + 0.05 * h, abs=1e-6)
    assert hapo.heat(three, scale, hapo.Args(rho=0.5, tau=0)).item() == 1
    assert hapo.heat(three, scale, hapo.Args(rho=0.5, tau=0.05, temperature=0.5)).item() == pytest.approx(0.5 + 0.025 * h)


def test_a_heated_token_has_the_law_of_its_own_temperature():
    """All quantiles of the uniform number, by enumeration, for rows of different temperatures; and its log-prob."""
    logits, n = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), 3000
    heat = torch.tensor([2.0, 0.5])
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row, other in itertools.pairwise([0, 1, 0]):
        tokens, logp = draw(logits[[row] * n], uniform, lambda z, row=row: heat[[row] * len(z)])
        law = (logits[row] / heat[row]).softmax(-1)
        count = Counter(tokens.tolist())
        torch.testing.assert_close(torch.tensor([count[i] / n for i in range(3)]), law, rtol=0, atol=1 / n)
        torch.testing.assert_close(logp, law.log()[tokens])
        assert (law - (logits[other] / heat[other]).softmax(-1)).abs().max() > 0.1


def test_a_run_is_heated_from_its_second_rollout_on(tiny, tmp_path):
    """The first rollout is sampled plainly; the others at other temperatures, so that the sampler's log-probs differ from the
    policy's by intent. Without A they never do. And what B keeps at 0 is 0."""
    argv = "--task addition --steps 3 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    argv += "--overlong-weight 0".split()
    for name, more in dict(plain=["--no-ats"], hot=["--tau", "0.3"]).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "hapo.py")
        assert done.code == 0, done.err
        rows = lines(tmp_path / name / "metrics.jsonl")
        assert rows[0]["sampler_gap_max"] < 1e-4 and all((r["sampler_gap_max"] > 0.01) == (name == "hot") for r in rows[1:])
        assert all(abs(r["adv_per_token"]) < 1e-5 for r in rows) and all(r["generated"] == 32 for r in rows)
        assert all(r["unsure"] == pytest.approx(0.2, abs=0.01) and r["h_min"] == -1 for r in rows)
        assert rows[0]["heat"] == 1 and all(0.7 <= r["heat"] < 1 if name == "hot" else r["heat"] == 1 for r in rows[1:])
    done = run(tmp_path, *argv, "--no-tga", "--run-dir", tmp_path / "no-tga", script=ROOT / "algos" / "hapo.py")
    assert any(abs(r["adv_per_token"]) > 1e-3 for r in lines(tmp_path / "no-tga" / "metrics.jsonl"))
