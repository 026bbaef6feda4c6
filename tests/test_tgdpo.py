"""TGDPO's worked example, its limits, and where its guide comes from."""

import json
import shutil

import pytest
import torch

from algos import dpo, tgdpo
from common import pairs, tasks
from common.worlds import tiny
from tests.helpers import ROOT, lines, run, user_error
from tests.test_dpo import example, pair

PLAIN = dict(args=dict(alpha=0.0))  # DPO
FEW = ["--guide-steps", 2]

CLOSE = dict(rtol=0, atol=1e-6)
CARD = dict(beta=0.5, alpha=2.0)


def guided():
    """The pair of the card: logp (a leaf), ref_logp, guide_logp, mask."""
    logp, ref_logp, mask = example()
    return logp, ref_logp, torch.tensor([[-0.4, -1.5, -0.2], [-1.4, -1.9, 0.0]]), mask


def loss_and_gradient(script, *tensors, **settings):
    """-> losses, stats, gradient with respect to the first tensor."""
    leaf = tensors[0].detach().clone().requires_grad_()
    losses, stats = script.pair_loss(leaf, *tensors[1:], script.Args(**settings))
    losses.sum().backward()
    return losses.detach(), {k: v.detach() for k, v in stats.items()}, leaf.grad


def random_pairs(seed=0):
    logp, ref_logp, mask = pair([(5, 2), (1, 4), (3, 3)], seed)
    return logp, ref_logp, ref_logp + torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)), mask


def test_worked_example():
    losses, stats, grad = loss_and_gradient(tgdpo, *guided(), **CARD)
    assert losses.item() == pytest.approx(0.537528, abs=1e-6)
    assert abs(losses.item() - 0.673347) > 0.1  # what 1 + alpha r_hat on the rejected side, too, would give
    expected = torch.tensor([[-0.270276, -0.103952, -0.249486], [0.374229, 0.145533, 0.0]])
    torch.testing.assert_close(grad, expected, **CLOSE)
    found = {k: v.item() for k, v in stats.items()}
    assert found == pytest.approx(
        dict(chosen_weight=1.0, rejected_weight=1.25, weight_min=0.5, negative_weights=0.0, weighted_margin=0.68,
             chosen_ratio=0.1, rejected_ratio=-0.1, margin=0.2, reward_accuracy=1.0), abs=1e-6
    )  # fmt: skip


def test_alpha_0_is_dpo():
    logp, ref_logp, guide_logp, mask = random_pairs()
    losses, stats, grad = loss_and_gradient(tgdpo, logp, ref_logp, guide_logp, mask, alpha=0.0)
    expected, seen, slope = loss_and_gradient(dpo, logp, ref_logp, mask)
    assert torch.equal(losses, expected) and torch.equal(grad, slope)
    assert all(torch.equal(stats[k], v) for k, v in seen.items())


def test_the_reference_as_guide_is_dpo():
    """Which is how the guide is trained."""
    logp, ref_logp, _, mask = random_pairs()
    losses, _, grad = loss_and_gradient(tgdpo, logp, ref_logp, ref_logp, mask, alpha=2.0)
    expected, _, slope = loss_and_gradient(dpo, logp, ref_logp, mask)
    assert torch.equal(losses, expected) and torch.equal(grad, slope)


@pytest.mark.parametrize("beta, alpha", [(0.3, 0.5), (1.0, 0.2), (0.5, 3.0)])
def test_the_gradient_is_dpos_times_the_weight_of_the_token(beta, alpha):
    logp, ref_logp, guide_logp, mask = random_pairs()
    _, stats, grad = loss_and_gradient(tgdpo, logp, ref_logp, guide_logp, mask, beta=beta, alpha=alpha)
    side = torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]
    f = 1 + side * alpha * beta * (guide_logp - ref_logp)  # the beta of the loss, in r_hat too
    w = torch.sigmoid(-beta * stats["weighted_margin"]).repeat(2)[:, None]
    torch.testing.assert_close(grad, (-beta * side * w * f).masked_fill(~mask, 0.0))
    z = (side * f * (logp - ref_logp)).masked_fill(~mask, 0.0).sum(1).view(2, 3).sum(0)
    torch.testing.assert_close(stats["weighted_margin"], z.detach())


def test_no_gradient_reaches_the_guide_nor_the_weights():
    logp, ref_logp, guide_logp, mask = random_pairs()
    guide_logp.requires_grad_(), ref_logp.requires_grad_()
    losses, _ = tgdpo.pair_loss(logp, ref_logp, guide_logp, mask, tgdpo.Args(alpha=2.0))
    losses.sum().backward()
    assert guide_logp.grad is None
    torch.testing.assert_close(ref_logp.grad, -logp.grad)  # through the log-ratio alone


def test_a_strong_guide_reverses_the_push_and_is_counted():
    _, stats, grad = loss_and_gradient(tgdpo, *guided(), beta=0.5, alpha=10.0)  # f: 2.5, -1.5, 2.0 and 5.0, -0.5
    assert (grad > 0).tolist() == [[False, True, False], [True, False, False]]
    assert stats["negative_weights"].item() == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert stats["weight_min"].item() == pytest.approx(-1.5)


def test_what_is_logged_knows_no_padding():
    logp, ref_logp, _, mask = random_pairs()
    guide_logp = ref_logp + torch.tensor([[1.0], [1], [1], [-1], [-1], [-1]])  # every weight is above 1
    args = tgdpo.Args(beta=1.0, alpha=0.5)
    _, stats = tgdpo.pair_loss(logp, ref_logp, guide_logp, mask, args)
    for name in ("chosen_weight", "rejected_weight", "weight_min"):
        torch.testing.assert_close(stats[name], torch.full((3,), 1.5))
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (logp, ref_logp, guide_logp, mask)]
    for name, value in tgdpo.pair_loss(*wide, args)[1].items():
        torch.testing.assert_close(value, stats[name])
    _, stats = tgdpo.pair_loss(logp, ref_logp, guide_logp, torch.zeros_like(mask), args)
    assert all(stats[k].tolist() == [1.0] * 3 for k in ("chosen_weight", "rejected_weight", "weight_min"))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a few pairs of letters, and the arguments of a short run on them."""
    folder, letters = tmp_path_factory.mktemp("tgdpo"), tiny.warm_start(tasks.load("letters"))
    rows, _ = pairs._built_in(tasks.world("letters"))
    text = "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row))) + "\n" for row in rows[:200])
    (folder / "pairs.jsonl").write_text(text)
    small = "--steps 4 --pairs-per-step 8 --eval-prompts 8 --max-new-tokens 12 --lr 1e-4".split()
    return folder, [*small, "--model", letters, "--data", folder / "pairs.jsonl", "--dtype", "float32", "--optimizer", "adamw"]


def start(place, name, *argv, script="tgdpo"):
    """A short run -> its folder and its metrics."""
    folder, small = place
    done = run(folder, *small, *argv, "--run-dir", folder / name, script=ROOT / "algos" / f"{script}.py")
    assert done.code == 0, done.err
    return folder / name, lines(folder / name / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(place):
    return start(place, "plain", script="dpo")


def column(folder, name):
    return pairs._Cache(folder / f"{name}.safetensors")


def test_an_untrained_guide_is_the_reference_and_the_run_is_dpos(place, plain):
    _, rows = start(place, "untrained", "--guide-steps", 0, "--alpha", 2)
    for ours, theirs in zip(rows, plain[1]):
        assert ours["loss"] == theirs["loss"] and ours["grad_norm"] == theirs["grad_norm"]
        assert ours["chosen_weight"] == ours["rejected_weight"] == ours["weight_min"] == 1


def test_the_guide_is_trained_on_the_pairs_with_either_reference(place):
    (cached, rows), (live, others) = (start(place, ref, "--guide-steps", 12, "--ref", ref) for ref in ("cached", "live"))
    for a, b in zip(rows, others):
        for k in ("loss", "chosen_weight", "rejected_weight", "weight_min", "weighted_margin", "grad_norm"):
            assert b[k] == pytest.approx(a[k], rel=1e-3, abs=1e-4), k
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-4)  # the policy starts from the reference, not from the guide
    assert rows[0]["weight_min"] < 1 and not (live / "reference.safetensors").exists()
    reference, guide = column(cached, "reference"), column(cached, "guide")
    ratio = torch.stack([(guide[r] - reference[r]).sum() for r in range(320)])
    assert (ratio[::2] - ratio[1::2]).mean() > 0.05  # it has learnt from the pairs


def test_a_guide_that_is_given(place, plain):
    guide = plain[0] / "checkpoints" / "step-000004"
    found = column(start(place, "given", "--guide", guide)[0], "guide")
    again, _ = start(place, "again", "--model", guide, "--steps", 0, script="dpo")  # its reference is that guide
    expected, reference = column(again, "reference"), column(plain[0], "reference")
    for row in range(20):
        torch.testing.assert_close(found[row], expected[row], rtol=0, atol=1e-6)
    assert (found[10] - reference[10]).abs().max() > 1e-3


def test_a_guide_with_other_tokens(place, tmp_path):
    shutil.copytree(tiny.warm_start(tasks.load("letters")), tmp_path / "guide")
    tokenizer = tiny.characters()
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(tmp_path / "guide")
    argv = *place[1], "--guide", tmp_path / "guide", "--run-dir", tmp_path / "run"
    done = run(tmp_path, *argv, script=ROOT / "algos" / "tgdpo.py")
    assert f"--guide {tmp_path / 'guide'}: its tokenizer is another one than that of --model" in user_error(done)
