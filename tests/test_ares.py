"""ARES' worked numbers, its statistics, who is penalised, what relaxes the KL penalty, and what a run logs."""

import math

import pytest
import torch

from algos import ares, dapo
from common import UserError, settings
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
INF = float("inf")
BUCKETS = ("easy", "medium", "hard")
ENTROPY = torch.tensor([[0.1, 0.2, 1.5, 1.4, 1.6, 0.3, 0.1, 1.2, 0.2, 0.1]])
COUNTS = torch.tensor([[2.0, 6.0, 4.0, 8.0]])
WRONG = torch.zeros(1, 4)


def shaped(d, target, counts=COUNTS, right=WRONG, **changes):
    """Of one group in bucket d."""
    targets = {} if target is None else {d: target}
    taken, lam, after = ares.shaping(counts, right, torch.tensor([d]), targets, ares.Args(**changes))
    return taken[0].tolist(), lam.item(), after[d]


def test_windows_and_their_threshold():
    args, mask = ares.Args(), torch.ones(1, 10).bool()
    windows = ares.window_entropy(ENTROPY, mask, args)
    torch.testing.assert_close(windows[0, :7], torch.tensor([0.8, 1.175, 1.2, 0.85, 0.8, 0.45, 0.4]), **CLOSE)
    assert (windows[0, 7:] == -INF).all()
    (tau,) = ares.quantiles(ENTROPY, windows, mask, args)
    assert tau == pytest.approx(1.1925, abs=1e-6) and (windows > tau).sum() == 1
    (tau,) = ares.quantiles(ENTROPY, windows, mask, ares.Args(tau_of="tokens"))
    assert tau == pytest.approx(1.555, abs=1e-6) and not (windows > tau).any()
    (tau,) = ares.quantiles(ENTROPY, windows, mask, ares.Args(percentile=0.5))
    assert tau == pytest.approx(0.8, abs=1e-6)
    two = ares.window_entropy(ENTROPY, mask, ares.Args(window=2))
    assert two[0, 2].item() == pytest.approx(1.45, abs=1e-6) and (two > -INF).sum() == 9
    assert torch.equal(ares.window_entropy(ENTROPY, mask, ares.Args(window=1)), ENTROPY)


@pytest.mark.parametrize("garbage", [INF, float("nan"), 1e4])
def test_short_and_empty_completions_have_no_window(garbage):
    """Nor does what stands behind a completion's end enter one."""
    mask = torch.arange(10) < torch.tensor([[10], [6], [4], [3], [0]])
    entropy = torch.where(mask, ENTROPY.expand(5, 10), torch.tensor(garbage))
    windows = ares.window_entropy(entropy, mask, ares.Args())
    assert (windows > -INF).sum(1).tolist() == [7, 3, 1, 0, 0] and windows[1, 2].item() == pytest.approx(1.2, abs=1e-6)
    found = ares.quantiles(entropy, windows, mask, ares.Args())
    assert found == pytest.approx([1.1925, 1.1975, 0.8], abs=1e-6)
    tokens = ares.quantiles(entropy, windows, mask, ares.Args(tau_of="tokens"))
    assert len(tokens) == 4 and tokens[3] == pytest.approx(0.2 + 0.9 * 1.3, abs=1e-6)
    short = ares.window_entropy(ENTROPY[:, :2], torch.ones(1, 2).bool(), ares.Args())
    assert short.shape == (1, 2) and (short == -INF).all() and ares.quantiles(ENTROPY, short, mask, ares.Args()) == []


@pytest.mark.parametrize("d, target, lam, taken", [
    (0, 4.0, 0.2, (0, 0.4, 0, 0.8)), (1, 4.0, 0.2, (0.4, 0.4, 0, 0.8)), (2, 6.0, 0.2, (0.8, 0, 0.4, 0)),
    (2, 4.0, 0.0, (0, 0, 0, 0)), (0, 6.0, 0.0, (0, 0, 0, 0)), (1, 6.0, 0.0, (0, 0, 0, 0)),
])  # fmt: skip
def test_worked_numbers(d, target, lam, taken):
    """A hard group is penalised where it hesitates less than it used to, an easy or medium one where it does more."""
    found, weight, after = shaped(d, target)
    assert found == pytest.approx(taken, abs=1e-6) and weight == pytest.approx(lam, abs=1e-6)
    assert after == pytest.approx(0.9 * target + 0.1 * 5, abs=1e-6)


def test_the_whole_objective_and_its_gradient():
    """Four completions of one token of an easy group, the first right; reference log-probs differ, the third is in a window."""
    args, mask = ares.Args(window=1), torch.ones(4, 1).bool()
    right = torch.tensor([[1.0, 0, 0, 0]])
    reward = right - ares.shaping(COUNTS, right, torch.tensor([0]), {0: 4.0}, args)[0]
    torch.testing.assert_close(reward, torch.tensor([[1.0, -0.4, 0.0, -0.8]]), **CLOSE)
    adv = ares.advantages(reward, args).view(4, 1)
    torch.testing.assert_close(adv[:, 0], torch.tensor([1.359324, -0.453108, 0.064730, -0.970945]), **CLOSE)
    logp = torch.full((4, 1), -1.0, requires_grad=True)
    kl = ares.kl_penalty(logp, torch.tensor([[-1.0], [-1.5], [-1.5], [-0.5]]), mask)
    weight = ares.kl_weights(torch.tensor([[False], [False], [True], [False]]), torch.zeros(4).long(), args)
    objective, _ = ares.surrogate(logp, logp.detach(), adv, mask, args)
    loss = -((objective - 0.1 * weight * kl) * ares.token_weights(mask, args)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (0.106531 + 0.5 * 0.106531 + 0.148721) / 4, abs=1e-6)
    wanted = torch.tensor([1.359324, -0.453108 - 0.1 * 0.393469, 0.064730 - 0.05 * 0.393469, -0.970945 + 0.1 * 0.648721])
    torch.testing.assert_close(logp.grad[:, 0], -wanted / 4, **CLOSE)


def test_statistics_lag_and_are_bounded():
    """The first rollout of a bucket seeds its target and is not penalised; those that are absent keep theirs."""
    for d in (0, 1, 2):
        found, lam, after = shaped(d, None)
        assert found == [0.0] * 4 and lam == 0 and after == 5.0
        assert shaped(d, 4.0, decay=0.0)[2] == 5.0 and shaped(d, 4.0, decay=0.5)[2] == 4.5
        flat = torch.full((1, 4), 3.0)
        assert shaped(d, 3.0, flat)[:2] == ([0.0] * 4, 0.0)
        assert shaped(d, 2.0 if d < 2 else 4.0, flat)[:2] == ([1.0] * 4, 1.0)  # no variance: lambda is cut at 1
    targets = {0: 4.0, 2: 7.0}
    counts = torch.cat([COUNTS, COUNTS + 2, COUNTS])
    _, lam, after = ares.shaping(counts, torch.zeros(3, 4), torch.tensor([0, 1, 0]), targets, ares.Args())
    assert targets == {0: 4.0, 2: 7.0} and after == pytest.approx({0: 4.1, 1: 7.0, 2: 7.0})
    assert lam.tolist() == pytest.approx([0.2, 0.0, 0.2], abs=1e-6)
    together = ares.shaping(counts[[0, 2]], torch.zeros(2, 4), torch.tensor([0, 0]), {0: 4.0}, ares.Args())[0]
    assert together[0].tolist() == together[1].tolist() == pytest.approx([0, 0.4, 0, 0.8], abs=1e-6)


def test_right_completions_lose_nothing():
    right = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert shaped(1, 4.0, right=right)[0] == pytest.approx([0, 0, 0, 0.8], abs=1e-6)
    assert shaped(1, 4.0, right=torch.ones(1, 4))[0] == [0.0] * 4 and shaped(1, 4.0, right=right)[1] == shaped(1, 4.0)[1]


def test_difficulty():
    eight = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    assert ares.difficulty(eight).tolist() == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    four = torch.tensor([[1.0] * k + [0.0] * (4 - k) for k in range(5)])
    assert ares.difficulty(four).tolist() == [2, 2, 1, 0, 0]


def test_the_control_exchanges_difficulties():
    bucket = torch.tensor([0, 1, 2] * 7)
    assert torch.equal(ares.assigned(bucket, ares.Args(), 3), bucket)
    a, b, c = (ares.assigned(bucket, ares.Args(buckets="shuffled"), seed) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, bucket)
    assert torch.equal(a.sort().values, bucket.sort().values)


def test_the_penalty_is_relaxed_inside_windows_and_by_difficulty():
    high = torch.zeros(3, 8).bool()
    high[0, 2] = high[1, 0] = high[1, 1] = high[2, 7] = True
    bucket = torch.tensor([0, 1, 2])
    weight = ares.kl_weights(high, bucket, ares.Args(rho=0.25))
    inside = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
    assert torch.equal(weight, 1 - 0.75 * inside)
    assert torch.equal(ares.kl_weights(high, bucket, ares.Args(rho=1.0)), torch.ones(3, 8))
    scaled = ares.kl_weights(high, bucket, ares.Args(rho=0.25, bucket_beta=(2.0, 1.0, 0.5)))
    assert torch.equal(scaled, weight * torch.tensor([[2.0], [1.0], [0.5]]))
    two = ares.kl_weights(high, bucket, ares.Args(window=2))
    assert (two[0] < 1).tolist() == [False, False, True, True] + [False] * 4


def test_a_run_is_dapo_until_there_are_statistics(tiny, tmp_path):
    """Bit for bit in the first rollout, without rho; then lambda, N and the KL weight are logged."""
    argv = "--task addition --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --beta 0.01".split()
    argv += "--eps-high 0.28 --overlong-weight 0 --checkpoint-every 1".split()
    arms = dict(base=("dapo", "--steps", 1), plain=("ares", "--steps", 1, "--rho", 1), mine=("ares", "--steps", 5))
    weights, rows = {}, {}
    for name, (script, *more) in arms.items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / f"{script}.py")
        assert done.code == 0, done.err
        rows[name] = lines(tmp_path / name / "metrics.jsonl")
        first = tmp_path / name / "checkpoints" / "step-000001" / "model.safetensors"
        weights[name] = first.read_bytes() if first.exists() else None
    assert weights["base"] == weights["plain"]
    base, plain = ({k: v for k, v in rows[name][0].items() if not k.startswith("time/")} for name in ("base", "plain"))
    assert base.items() < plain.items()
    assert ares.Args().eps_high != dapo.Args().eps_high
    names = [f"{key}_{d}" for key in ("n_he", "lam", "accuracy", "length", "kl_weight", "share") for d in BUCKETS]
    for row in rows["mine"]:
        assert set(names) < set(row) and row["tau"] > 0
        assert sum(row[f"share_{d}"] for d in BUCKETS) == pytest.approx(1)
        assert all(0.5 <= row[f"kl_weight_{d}"] <= 1 for d in BUCKETS if row[f"share_{d}"])
        assert row["accuracy_hard"] < 0.375
    assert any(row["n_he_hard"] > 0 and row["kl_weight_hard"] < 1 for row in rows["mine"])
    first, *later = rows["mine"]
    assert first["reward"] == rows["plain"][0]["reward"]
    assert not any(first[f"lam_{d}"] for d in BUCKETS)
    assert any(row[f"lam_{d}"] > 0 for row in later for d in BUCKETS)


def test_what_is_shaped_and_weighed_is_trained_on(tmp_path):
    """Two rollouts with targets of the first: its flags change the second's rewards, or its gradient alone."""

    def second(**flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        small = dict(task="addition", steps=2, prompts_per_step=8, group_size=8, minibatches=1, eval_prompts=4, decay=0.0)
        small |= dict(checkpoint_every=0, max_gen_batches=0, lr=1e-3, beta=0.5, percentile=0.8, run_dir=str(folder))
        ares.train(ares.Args(**small | flags))
        row = lines(folder / "metrics.jsonl")[1]
        return row["reward"] - row["accuracy"], row["grad_norm"]

    mine = second()
    assert mine[0] < -0.003
    for flags in (dict(rho=1.0), dict(bucket_beta=(9.0, 9.0, 9.0))):
        found = second(**flags)
        assert found[0] == mine[0] and found[1] != mine[1], flags
    shuffled = second(buckets="shuffled")
    assert shuffled[0] != mine[0] and shuffled[1] != mine[1]


def test_limits_hold_within_a_tuple():
    with pytest.raises(UserError, match="--bucket-beta must be at least 0, is -5.0"):
        settings.resolve(ares.Args(bucket_beta=(1.0, -5.0, 1.0)))


def test_tau_begins_with_the_first_windows():
    args = ares.Args(decay=0.9)
    assert ares.threshold(None, 0.0, 0, args) == (math.inf, None)
    assert ares.threshold(None, 3.0, 2, args) == (1.5, pytest.approx(1.5))
    assert ares.threshold(1.0, 4.0, 2, args) == (1.0, pytest.approx(1.1))
    assert ares.threshold(1.0, 0.0, 0, args) == (1.0, 1.0)
