"""DPO's worked example, its limits, and the script run as a user runs it."""

import json
import math
import re

import pytest
import torch

from algos import dpo
from common import tasks
from common.worlds import tiny
from tests import test_gpu
from tests.helpers import ROOT, die_at, lines, outcome, run, same

DPO = ROOT / "algos" / "dpo.py"
SMALL = """--steps 4 --pairs-per-step 8 --eval-prompts 16 --checkpoint-every 2 --eval-every 2""".split()


def example():
    """The pair of the card: three tokens chosen, two rejected -> logp (a leaf), ref_logp, mask."""
    logp = torch.tensor([[-0.5, -1.2, -0.3], [-0.9, -2.0, 0.0]], requires_grad=True)
    ref_logp = torch.tensor([[-0.7, -1.0, -0.4], [-0.6, -2.2, 0.0]])
    return logp, ref_logp, torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()


def pair(lengths, seed=0):
    """Random log-probs of pairs with these (chosen, rejected) lengths."""
    g = torch.Generator().manual_seed(seed)
    sides = [n for n, _ in lengths] + [n for _, n in lengths]
    mask = torch.arange(max(1, *sides)) < torch.tensor(sides)[:, None]
    ref_logp = -torch.rand(mask.shape, generator=g) * 3
    return (ref_logp + 0.3 * torch.randn(mask.shape, generator=g)).requires_grad_(), ref_logp, mask


def test_worked_example():
    logp, ref_logp, mask = example()
    losses, stats = dpo.pair_loss(logp, ref_logp, mask, dpo.Args(beta=0.5))
    losses.sum().backward()
    assert losses.item() == pytest.approx(0.644397, abs=1e-6)
    assert stats["chosen_ratio"].item() == pytest.approx(0.1, abs=1e-6)
    assert stats["rejected_ratio"].item() == pytest.approx(-0.1, abs=1e-6)
    expected = torch.tensor([[-0.237510] * 3, [0.237510, 0.237510, 0.0]])
    torch.testing.assert_close(logp.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes, expected",
    [(dict(label_smoothing=0.1), 0.654397), (dict(loss="ipo"), 0.64), (dict(loss="hinge"), 0.9), (dict(beta=1.0), 0.598139)],
)
def test_every_option_changes_the_loss(changes, expected):
    losses, _ = dpo.pair_loss(*example(), dpo.Args(**dict(beta=0.5) | changes))
    assert losses.item() == pytest.approx(expected, abs=1e-6)


def test_identical_responses_teach_nothing():
    logp, ref_logp, mask = pair([(4, 4)])
    same_logp = logp.detach()[:1].repeat(2, 1)
    leaf = same_logp[:1].clone().requires_grad_()
    losses, stats = dpo.pair_loss(leaf.expand(2, -1), ref_logp[:1].expand(2, -1), mask, dpo.Args())
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(2), abs=1e-7) and not leaf.grad.any()
    assert stats["reward_accuracy"].item() == 0


def test_policy_equal_to_reference():
    _, ref_logp, mask = pair([(4, 2), (1, 3)])
    losses, stats = dpo.pair_loss(ref_logp, ref_logp, mask, dpo.Args())
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
    assert not stats["margin"].any()


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0), (1, 1), (4096, 1), (1, 4096)])
def test_lengths(lengths):
    logp, ref_logp, mask = pair([lengths])
    losses, _ = dpo.pair_loss(logp, ref_logp, mask, dpo.Args())
    losses.sum().backward()
    assert losses.isfinite().all() and logp.grad.isfinite().all() and not logp.grad[~mask].any()
    every = logp.grad[mask]
    torch.testing.assert_close(every.abs(), every.abs()[:1].expand_as(every))  # all tokens of a pair alike


def test_a_hopeless_pair_costs_what_it_should():
    logp = torch.tensor([[-94.5], [0.0]])
    losses, _ = dpo.pair_loss(logp, torch.zeros(2, 1), torch.ones(2, 1).bool(), dpo.Args(beta=1.0))
    assert losses.item() == pytest.approx(94.5)


def test_garbage_at_the_padding_and_wider_padding_change_nothing():
    logp, ref_logp, mask = pair([(5, 2), (1, 4), (3, 3)])
    losses, _ = dpo.pair_loss(logp, ref_logp, mask, dpo.Args())
    for garbage in (1e4, float("inf"), float("nan")):
        leaf = torch.where(mask, logp.detach(), torch.tensor(garbage)).requires_grad_()
        again, _ = dpo.pair_loss(leaf, torch.where(mask, ref_logp, torch.tensor(garbage)), mask, dpo.Args())
        again.sum().backward()
        assert torch.equal(again, losses) and not leaf.grad[~mask].any()
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (logp, ref_logp, mask)]
    torch.testing.assert_close(dpo.pair_loss(*wide, dpo.Args())[0], losses)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def letters():
    return tiny.warm_start(tasks.world("letters"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, letters):
    folder = tmp_path_factory.mktemp("dpo")
    done = run(folder, *SMALL, "--run-dir", folder / "run", script=DPO)
    assert done.code == 0, done.err
    return folder / "run", done, outcome(folder / "run")


def test_what_a_run_says(whole):
    folder, done, _ = whole
    assert done.err == ""
    last = r"win rate 0\.\d\d -> \d\.\d\d against the reference on 16 held-out prompts \(gold reward\), KL \d+\.\d nats"
    assert re.fullmatch(last, done.out.splitlines()[-1])
    before, middle, after = lines(folder / "evals.jsonl")
    assert (before["step"], middle["step"], after["step"]) == (0, 2, 4)
    assert 0.4 < before["win_rate"] < 0.6 and before["margin"] == before["reward_accuracy"] == 0 and before["credit"] == 0.5
    assert abs(before["kl"]) < 1e-4 < after["kl"]
    first = lines(folder / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)


def test_same_seed_same_run(whole, tmp_path):
    assert run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", script=DPO).code == 0
    same(outcome(tmp_path / "run"), whole[2])


def kill_in_step_3():
    """After the checkpoint of step 2, in the evaluation that follows step 4's update."""
    die_at("os.rename", "step-000004")


def test_killed_and_resumed(whole, tmp_path):
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", script=DPO, before=kill_in_step_3)
    assert done.code == -9 and len(list((tmp_path / "run" / "checkpoints").glob("step-00000?"))) == 1
    made = (tmp_path / "run" / "reference.safetensors").stat().st_mtime_ns
    done = run(tmp_path, "--resume", tmp_path / "run", script=DPO)
    assert done.code == 0, done.err
    same(outcome(tmp_path / "run"), whole[2])
    assert (tmp_path / "run" / "reference.safetensors").stat().st_mtime_ns == made  # and not made again


def test_a_live_reference_gives_the_same_losses(whole, tmp_path):
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", "--ref", "live", script=DPO)
    assert done.code == 0 and not (tmp_path / "run" / "reference.safetensors").exists()
    for a, b in zip(lines(whole[0] / "metrics.jsonl"), lines(tmp_path / "run" / "metrics.jsonl")):
        for k in ("loss", "margin", "chosen_ratio", "grad_norm"):
            assert b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-4), k


def test_micro_batches_change_nothing(whole, tmp_path):
    settings = "--dtype", "float64", "--steps", 3
    for name, tokens in (("one", 16384), ("many", 60)):
        done = run(tmp_path, *SMALL, *settings, "--micro-batch-tokens", tokens, "--run-dir", tmp_path / name, script=DPO)
        assert done.code == 0, done.err
    for a, b in zip(lines(tmp_path / "one" / "metrics.jsonl"), lines(tmp_path / "many" / "metrics.jsonl")):
        for k in ("loss", "margin", "entropy", "grad_norm"):
            assert b[k] == pytest.approx(a[k], rel=1e-6, abs=1e-9), k


def test_two_ranks_are_one_process(tmp_path, letters):
    for ranks in (1, 2):
        test_gpu.launch(ranks, *SMALL, "--dtype", "float64", "--micro-batch-tokens", 60, "--run-dir", tmp_path / str(ranks),
                        script="algos/dpo.py")  # fmt: skip
    for a, b in zip(*(test_gpu.metrics(tmp_path / r) for r in "12")):
        assert a.keys() == b.keys()
        for k in a:
            assert b[k] == pytest.approx(a[k], rel=1e-6, abs=1e-6), k
    a, b = (test_gpu.weights(tmp_path / r, 4) for r in "12")
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-9)
    a, b = (json.loads((tmp_path / r / "evals.jsonl").read_text().splitlines()[-1]) for r in "12")
    assert b == pytest.approx(a, rel=1e-6, abs=1e-6)
