"""OTR: the card's numbers, the closed form that the guesses are a sample of, and what its flags change."""

import pytest
import torch

from algos import grpo, otr, sft
from common import UserError, settings
from tests import sync
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]

LOGITS = [2.0, 1, 0, -1]
GUESSES = [0, 0, 1, 0, 2, 1, 0, 0]  # of the card's example, whose next token is 1


def noise_of(ids, kappa=1.3):
    """[1, K] numbers that lead to these tokens: the middles of their parts of the cumulative distribution."""
    q = (torch.tensor(LOGITS) / kappa).softmax(-1)
    return (q.cumsum(-1) - q / 2)[ids][None]


def value(noise=None, dtype=torch.float32, **flags):
    """-> (loss, its gradient, hits) at the card's position."""
    noise = noise_of(GUESSES) if noise is None else noise
    logits = torch.tensor([LOGITS], dtype=dtype, requires_grad=True)
    loss, _, _, hits = otr.token_loss(torch.tensor([1]), logits, otr.Args(samples=noise.shape[1], **flags), noise)
    loss.sum().backward()
    return loss.item(), logits.grad[0].tolist(), hits.item()


@pytest.mark.parametrize(
    "flags, loss, gradient",
    [
        (dict(), 0.302033, [0.175185, -0.208546, 0.027750, 0.005610]),
        (dict(tempered_logprob=True), 0.273745, [0.123807, -0.157217, 0.025875, 0.007534]),
        (dict(exact=True), 0.301929, [0.176503, -0.216439, 0.028353, 0.011584]),
        (dict(exact=True, kappa=1.0), 0.280518, [0.167785, -0.198846, 0.022707, 0.008354]),
        (dict(exact=True, kappa=1.0, beta=0.0), 0.341156, [0.152532, -0.180769, 0.020643, 0.007594]),  # DFT
    ],
)
def test_worked_example(flags, loss, gradient):
    found, grad, hits = value(**flags)
    assert found == pytest.approx(loss, abs=1e-6) and grad == pytest.approx(gradient, abs=1e-6)
    q = (torch.tensor(LOGITS) / flags.get("kappa", 1.3)).softmax(-1)[1].item()
    assert hits == pytest.approx(q if flags.get("exact") else 2 / 8)


def test_the_closed_form_of_the_gradient():
    """(1 - beta) q(x) (e_x - pi) + beta (q - pi), of -L; at kappa 1 that is (1 - beta) times DFT's."""
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 9, generator=draw, dtype=torch.float64), torch.arange(5)
    for kappa, beta in ((1.3, -0.1), (0.7, 0.4), (1.0, -2.0)):
        leaf = logits.clone().requires_grad_()
        args = otr.Args(exact=True, kappa=kappa, beta=beta)
        otr.token_loss(targets, leaf, args, torch.zeros(5, 256))[0].sum().backward()
        pi, q, e = leaf.detach().softmax(-1), (leaf.detach() / kappa).softmax(-1), torch.eye(9, dtype=torch.float64)[:5]
        of_target = q.gather(1, targets[:, None])
        torch.testing.assert_close(-leaf.grad, (1 - beta) * of_target * (e - pi) + beta * (q - pi))
        if kappa == 1:
            torch.testing.assert_close(leaf.grad, (1 - beta) * of_target * (pi - e))


@pytest.mark.parametrize("tempered", [False, True])
def test_many_guesses_are_the_closed_form(tempered):
    """On a grid of numbers, as fine as one likes, every token is guessed as often as it is likely."""
    fine = (torch.arange(100_000) + 0.5)[None] / 100_000
    sampled = value(fine, torch.float64, tempered_logprob=tempered)
    exact = value(fine, torch.float64, tempered_logprob=tempered, exact=True)
    assert sampled[0] == pytest.approx(exact[0], abs=1e-4) and sampled[1] == pytest.approx(exact[1], abs=1e-4)
    assert sampled[2] == pytest.approx(exact[2], abs=1e-4)


def test_guesses_are_where_the_noise_falls():
    """A token that cannot be is not guessed, not even by the ends of [0, 1); one guessed twice counts twice."""
    logits = torch.tensor([[-1e4, 0.0, 0.0, -1e4]])
    for noise, hits in ((0.0, 1.0), (0.49, 1.0), (0.51, 0.0), (1 - 2**-24, 0.0)):
        args = otr.Args(samples=2)
        loss, _, _, found = otr.token_loss(torch.tensor([1]), logits, args, torch.full((1, 2), noise))
        assert found.item() == hits and loss.item() == pytest.approx((1 if hits else -0.1) * 0.693147, abs=1e-6)


def test_a_token_that_no_guess_meets_is_pushed_down_on_nothing_but_the_misses():
    loss, gradient, hits = value(noise_of([0] * 8))
    assert hits == 0 and loss == pytest.approx(0.1 * torch.tensor(LOGITS).log_softmax(-1)[0].item(), abs=1e-6)
    assert gradient[0] > 0 > max(gradient[1:])  # the guess goes down, and what it loses goes to all others
    assert otr.measure(torch.tensor([0.0, 0.5]))["no_hit"].tolist() == [1, 0]


def test_the_weights_are_grpo_s():
    parts = [sync.chunks((ROOT / "algos" / f"{n}.py").read_text())["token_weights"].strip() for n in ("otr", "grpo")]
    assert parts[0] == parts[1] and otr.token_weights is not grpo.token_weights
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert otr.token_weights(mask, None).tolist() == [[0.125] * 4, [0.5, 0, 0, 0]]
    assert sft.token_weights(mask, None)[1, 0].item() == pytest.approx(0.2)


LIMITS = [
    (dict(beta=1.0), "--beta must be below 1, is 1.0: a hit must be worth more"),
    (dict(samples=0), "--samples must be at least 1"),
    (dict(kappa=0.0), "--kappa must be above 0"),
]


@pytest.mark.parametrize("flags, said", LIMITS)
def test_limits(flags, said):
    with pytest.raises(UserError, match=said):
        settings.resolve(otr.Args(**flags))


# ---------------------------------------------------------------- runs


def test_what_a_run_logs(tmp_path):
    """Where the model is sure nearly all guesses hit; the loss says nothing of how well the demonstrations do, logp does."""
    small = "--steps 2 --batch-size 8 --eval-prompts 8 --checkpoint-every 0".split()
    done = run(tmp_path, *small, "--run-dir", tmp_path / "run", script=ROOT / "algos" / "otr.py")
    assert done.code == 0 and done.err == "", done.err
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(0.7 < r["hit_rate"] < 1 and 0 <= r["no_hit"] < 0.1 and abs(r["loss"]) < -r["logp"] for r in rows)
    assert done.out.splitlines()[-1].startswith("greedy accuracy ")


def test_every_update_guesses_anew(tiny, tmp_path, monkeypatch):
    """By (seed, update): the same numbers for the same, others for others."""
    made, loss = [], otr.token_loss

    def remembered(targets, logits, args, noise):
        if noise.requires_grad is False and logits.requires_grad:
            made.append(noise.flatten())
        return loss(targets, logits, args, noise)

    monkeypatch.setattr(otr, "token_loss", remembered)
    monkeypatch.setattr("sys.argv", ["otr.py"])
    small = dict(model=str(tiny), steps=2, batch_size=4, eval_prompts=2, eval_every=0, checkpoint_every=0, samples=5)
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        otr.train(otr.Args(seed=seed, run_dir=str(tmp_path / name), **small))
    n = len(made) // 3
    a, b, c = made[:n], made[n : 2 * n], made[2 * n :]
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and a[0].std() > 0.2
    assert not torch.isin(a[-1], a[0]).any() and not torch.isin(c[0], a[0]).any()
