"""SimPO's worked example, what its mean and its margin do, and the script run as a user runs it."""

import math
import sys

import pytest
import torch

from algos import dpo, simpo
from tests.helpers import ROOT, lines, run
from tests.test_dpo import example, pair

SIMPO = ROOT / "algos" / "simpo.py"
SMALL = "--steps 4 --pairs-per-step 8 --eval-prompts 16 --eval-every 2".split()
CLOSE = dict(rtol=0, atol=1e-6)


def loss_and_gradient(logp, mask, **changes):
    """Of the pairs' summed loss with respect to logp."""
    leaf = logp.detach().clone().requires_grad_()
    losses, _ = simpo.pair_loss(leaf, mask, simpo.Args(**changes))
    losses.sum().backward()
    return losses.sum().item(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example(dtype):
    logp, _, mask = example()
    logp = logp.detach().to(dtype).requires_grad_()
    losses, stats = simpo.pair_loss(logp, mask, simpo.Args())
    losses.sum().backward()
    assert losses.dtype == dtype and losses.item() == pytest.approx(0.449427, abs=1e-6)
    expected = torch.tensor([[-0.241338] * 3, [0.362006, 0.362006, 0.0]], dtype=dtype)
    torch.testing.assert_close(logp.grad, expected, **CLOSE)
    assert stats["chosen_reward"].item() == pytest.approx(-2 * 0.666667, abs=2e-6)
    assert stats["rejected_reward"].item() == pytest.approx(-2 * 1.45, abs=1e-6)
    assert stats["margin"].item() == pytest.approx(0.566667 + 1, abs=1e-6) and stats["reward_accuracy"].item() == 1
    for wrong in (0.933105, 0.371101):  # gamma multiplied by beta; a sum instead of a mean
        assert abs(losses.item() - wrong) > 0.05


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(beta=1.0), math.log1p(math.exp(-0.283333))),
        (dict(gamma_beta_ratio=1.0), 0.933105),  # so gamma is beta times the flag
        (dict(gamma_beta_ratio=0.0), math.log1p(math.exp(-1.566667))),
        (dict(loss="hinge"), 1 - 0.566667),
        (dict(loss="hinge", beta=5.0), 0.0),
        (dict(label_smoothing=0.1), 0.449427 + 0.1 * 0.566667),
        (dict(loss="hinge", label_smoothing=0.1), 0.9 * (1 - 0.566667) + 0.1 * (1 + 0.566667)),
        (dict(sft_weight=0.3), 0.449427 + 0.3 * 0.666667),
    ],
)
def test_every_option_changes_the_loss(changes, expected):
    logp, _, mask = example()
    assert loss_and_gradient(logp, mask, **changes)[0] == pytest.approx(expected, abs=1e-6)


def test_the_sft_term_pushes_the_chosen_response_alone():
    logp, _, mask = example()
    without, with_it = (loss_and_gradient(logp, mask, sft_weight=c)[1] for c in (0.0, 0.3))
    torch.testing.assert_close(with_it - without, torch.tensor([[-0.1] * 3, [0.0] * 3]), **CLOSE)


def test_twice_the_tokens_change_nothing_but_the_push_of_each():
    logp, _, mask = pair([(4, 2), (3, 4)])
    loss, grad = loss_and_gradient(logp, mask)
    loss2, grad2 = loss_and_gradient(logp.repeat_interleave(2, 1), mask.repeat_interleave(2, 1))
    assert loss2 == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(grad2, grad.repeat_interleave(2, 1) / 2)


def test_at_equal_lengths_without_a_margin_it_is_dpo_with_a_uniform_reference():
    T = 5
    logp, _, mask = pair([(T, T), (T, T)])
    loss, grad = loss_and_gradient(logp, mask, beta=2.0, gamma_beta_ratio=0.0)
    leaf = logp.detach().clone().requires_grad_()
    losses, _ = dpo.pair_loss(leaf, torch.full_like(leaf, -3.0), mask, dpo.Args(beta=2.0 / T))
    losses.sum().backward()
    assert loss == pytest.approx(losses.sum().item(), abs=1e-6)
    torch.testing.assert_close(grad, leaf.grad, **CLOSE)


def test_identical_responses_cost_the_margin_and_teach_nothing():
    logp, _, mask = pair([(4, 4)])
    leaf = logp.detach()[:1].clone().requires_grad_()
    losses, stats = simpo.pair_loss(leaf.expand(2, -1), mask, simpo.Args())
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log1p(math.e), abs=1e-6)  # gamma = 1
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-8)
    assert stats["margin"].item() == stats["reward_accuracy"].item() == 0


def test_a_hopeless_pair_costs_what_it_should():
    losses, _ = simpo.pair_loss(torch.tensor([[-94.5], [0.0]]), torch.ones(2, 1).bool(), simpo.Args(beta=1.0))
    assert losses.item() == pytest.approx(95.0)


# ---------------------------------------------------------------- runs


def tell_loads():
    """Tells on stderr of every model that is loaded and of every step."""
    from common import models, pairs

    load, cut = models.load, pairs.micro_batches

    def told(args, device, trainable=True):
        print("trained" if trainable else "frozen", file=sys.stderr)
        return load(args, device, trainable)

    def stepped(*args):
        print("step", file=sys.stderr)
        return cut(*args)

    models.load, pairs.micro_batches = told, stepped


def test_a_run_needs_no_reference_but_for_its_evaluations(tmp_path):
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", script=SIMPO, before=tell_loads)
    assert done.code == 0, done.err
    assert done.err.split() == "trained frozen step step frozen step step frozen".split()
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    for row in rows:
        assert row["rejected_reward"] < 0 and row["chosen_reward"] < 0 and "chosen_ratio" not in row
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-5)
        assert row["loss"] >= math.log1p(math.exp(1 - row["margin"])) - 1e-5  # Jensen; gamma is 1
    assert rows[0]["reward_accuracy"] > 0  # no tie with a reference at the start
    before, _, after = lines(tmp_path / "run" / "evals.jsonl")
    assert abs(before["kl"]) < 1e-4 < after["kl"] and before["margin"] == 0 < after["margin"]


def test_there_is_no_flag_for_a_reference(tmp_path):
    done = run(tmp_path, "--ref", "live", script=SIMPO)
    assert done.code == 2 and "--ref" in done.err
