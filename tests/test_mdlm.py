"""MDLM: what is masked and how it is weighted, the bound, and how a canvas is filled."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from algos import mdlm
from common import diffusion, settings
from common.batch import collate
from tests import test_gpu
from tests.helpers import ROOT, killed, lines, outcome, run, same

MDLM = ROOT / "algos" / "mdlm.py"
SMALL = "--steps 3 --batch-size 8 --warmup-steps 0 --eval-prompts 6 --eval-every 0 --checkpoint-every 1".split()
MASK = 77


def noise(n, L, seed=0):
    return torch.rand(n, L + 1, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- corrupt, and the loss


def test_levels_are_spread_evenly_over_the_rows():
    L = 8
    masked, weight = mdlm.corrupt(noise(16, L), mdlm.Args())
    assert masked.sum(1).tolist() == sorted(list(range(1, L + 1)) * 2)  # two rows of sixteen at each of eight levels
    torch.testing.assert_close(weight[:, 0], L / masked.sum(1))
    masked, weight = mdlm.corrupt(noise(5000, L), mdlm.Args(levels="bernoulli"))
    t = 1 / weight[:, 0]
    assert (t.sort().values - (torch.arange(5000) + 0.5) / 5000).abs().max() < 1e-3
    for low, high in ((0.1, 0.3), (0.6, 0.8)):
        some = (t > low) & (t < high)
        assert masked[some].float().mean().item() == pytest.approx(t[some].mean().item(), abs=0.02)


def test_masks_of_a_level_are_equally_likely():
    """All sets of k of four positions, at k = 2 six."""
    n, L = 24000, 4
    masked, _ = mdlm.corrupt(noise(n, L), mdlm.Args())
    for k in range(1, L + 1):
        sets = [tuple(row.nonzero()[:, 0].tolist()) for row in masked[masked.sum(1) == k]]
        share = [sets.count(s) / len(sets) for s in itertools.combinations(range(L), k)]
        assert len(set(sets)) == math.comb(L, k) and share == pytest.approx([1 / math.comb(L, k)] * len(share), abs=0.025)


@pytest.mark.parametrize("levels", ["count", "bernoulli"])
def test_the_loss_has_the_mean_of_the_exact_bound(levels):
    """Of a made-up model, whose log-prob of a position depends on all that is seen: sum over all masks in closed form, by
    k masked of L with 1 / (L C(L, k)) L / k, which the integral over t of t^k (1 - t)^(L - k) / t comes to as well."""
    L, n = 4, 80000
    table = {m: -torch.rand(L, generator=torch.Generator().manual_seed(sum(2**i for i in m))) - 0.1
             for k in range(L + 1) for m in itertools.combinations(range(L), k)}  # fmt: skip
    exact = -sum(table[m][list(m)].sum().item() / len(m) / math.comb(L, len(m)) for m in table if m) / L
    masked, weight = mdlm.corrupt(noise(n, L), mdlm.Args(levels=levels))
    logp = torch.stack([table[tuple(row.nonzero()[:, 0].tolist())] for row in masked])
    losses = mdlm.diffusion_loss(logp, masked, weight)
    assert losses.shape == (n, L) and losses.mean().item() == pytest.approx(exact, rel=0.01)


def test_worked_numbers_with_gradient():
    """L = 5, two masked: weight 5 / 2 of each; what is seen has neither loss nor gradient, whatever stands there."""
    logp = torch.tensor([[-0.5, float("nan"), -0.2, -3.0, float("-inf")]], dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[True, False, True, False, False]])
    losses = mdlm.diffusion_loss(logp, masked, torch.tensor([[2.5]]))
    assert losses.tolist() == [[1.25, 0, 0.5, 0, 0]]
    losses.sum().backward()
    assert logp.grad.tolist() == [[-2.5, 0, -2.5, 0, 0]]


# ---------------------------------------------------------------- unmask


@pytest.mark.parametrize("masked, steps, schedule", [(5, 2, [3, 2]), (3, 2, [2, 1]), (1, 2, [1, 0]), (8, 3, [3, 3, 2])])
def test_schedule(masked, steps, schedule):
    assert mdlm.schedule(masked, steps) == schedule


def filled(steps, order, block=0, L=6, rows=2, temperature=0.0):
    """unmask() with a guess that says when it was asked: token = 10 (passes so far) + position, surest from the right."""
    asked, numbers = [], noise(rows, L * (steps + 1) - 1).view(rows, steps + 1, L)

    def guess(tokens, masked, uniform, heat):
        assert heat == temperature and torch.equal(uniform, numbers[:, len(asked)])
        asked.append((tokens.clone(), masked.clone()))
        place = torch.arange(L).expand(rows, -1)
        return (10 * len(asked) + place).where(masked, torch.tensor(-1)), (place / L).where(masked, torch.tensor(9.0))

    args = SimpleNamespace(order=order, denoising_steps=steps, block_length=block)
    return mdlm.unmask(guess, torch.ones(rows, L, dtype=torch.bool), numbers, temperature, args), asked, numbers


@pytest.mark.parametrize("steps, order, block, reveals", [
    (3, "confidence", 0, [3, 3, 2, 2, 1, 1]), (3, "left", 0, [1, 1, 2, 2, 3, 3]), (6, "confidence", 0, [6, 5, 4, 3, 2, 1]),
    (1, "random", 0, [1] * 6), (4, "left", 0, [1, 1, 2, 2, 3, 4]), (3, "confidence", 2, [1, 1, 2, 2, 3, 3]),
    (6, "confidence", 3, [3, 2, 1, 6, 5, 4]), (2, "confidence", 3, [1, 1, 1, 2, 2, 2]),
])  # fmt: skip
def test_which_position_is_revealed_when(steps, order, block, reveals):
    tokens, asked, _ = filled(steps, order, block)
    assert (tokens // 10).tolist() == [reveals] * 2 and (tokens % 10).tolist() == [list(range(6))] * 2
    for step, (seen, masked) in enumerate(asked):  # what was revealed before is seen, and is not touched again
        assert torch.equal(masked, torch.tensor([reveals] * 2) > step) and torch.equal(seen[~masked], tokens[~masked])


def test_a_random_order_is_of_its_own_numbers():
    tokens, _, numbers = filled(6, "random")
    assert torch.equal((tokens // 10).argsort(1), numbers[:, -1].argsort(1, descending=True))
    assert not torch.equal(tokens[0], tokens[1])


def test_a_canvas_is_filled_up_with_the_end():
    batch = collate([([5, 6], [7, 1]), ([5], [8, 9, 1])])
    full = diffusion.fill(batch, 5, 1)
    assert full.ids.tolist() == [[5, 6, 7, 1, 1, 1, 1], [0, 5, 8, 9, 1, 1, 1]]
    assert full.attention_mask.long().tolist() == [[1] * 7, [0] + [1] * 6]
    assert full.mask.all() and full.mask.shape == (2, 5) and torch.equal(full.trained, full.mask)
    assert batch.mask.shape == (2, 3)


# ---------------------------------------------------------------- runs


def test_presets():
    tiny, _ = settings.resolve(mdlm.Args(), diffusion.world)
    assert (tiny.task, tiny.max_new_tokens, tiny.denoising_steps, tiny.from_scratch) == ("sums", 8, 8, True)
    assert tiny.eval_steps == (1, 2, 4, 8) and tiny.block_length == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mdlm")
    done = run(folder, *SMALL, "--eval-steps", 2, 4, "--run-dir", folder / "whole", script=MDLM)
    assert done.code == 0, done.err
    return folder / "whole", done


def test_what_a_run_says_and_logs(whole):
    folder, done = whole
    assert "sums: two two-digit numbers" in done.out and "runs.talk" not in done.out
    assert done.out.splitlines()[-1].startswith("greedy accuracy 0.00 -> 0.00 on 6 prompts")
    rows = lines(folder / "metrics.jsonl")
    assert [r["tokens"] for r in rows] == [64] * 3
    for row in rows:
        assert 3 < row["entropy"] < math.log(79) and 2.5 < row["loss"] < 5.5 and row["grad_norm"] > 0
    before, after = lines(folder / "evals.jsonl")
    assert {f"{order}_{n}" for order in ("confidence", "random", "left") for n in (2, 4)} < before.keys()
    assert after["bound"] < before["bound"] < 5
    config = json.loads((folder / "checkpoints" / "step-000003" / "config.json").read_text())
    assert config["is_causal"] is False


def test_killed_and_resumed(tmp_path):
    """Of another task than the preset's, with its own length and tokenizer."""
    more = "--task route --steps 2 --eval-steps 4 --denoising-steps 6 --max-new-tokens 24 --block-length 12".split()
    done = run(tmp_path, *SMALL, *more, "--run-dir", tmp_path / "whole", script=MDLM)
    assert done.code == 0, done.err
    killed(tmp_path / "whole", tmp_path / "parts", 1)
    done = run(tmp_path, "--resume", tmp_path / "parts", script=MDLM)
    assert done.code == 0, done.err
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


def test_micro_batches_and_processes_change_nothing(tmp_path):
    exact = [*SMALL, "--dtype", "float64", "--steps", 2, "--levels", "bernoulli", "--run-dir"]
    done = run(tmp_path, *exact, tmp_path / "1", "--micro-batch-tokens", 40, script=MDLM)
    assert done.code == 0, done.err
    test_gpu.launch(2, *exact, tmp_path / "2", script="algos/mdlm.py")
    for a, b in zip(*(test_gpu.metrics(tmp_path / r) for r in "12")):
        assert b == pytest.approx(a, rel=1e-6, abs=1e-6)
    a, b = (lines(tmp_path / r / "evals.jsonl")[-1] for r in "12")
    assert b == pytest.approx(a, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("flags, why", [
    (["--block-length", 3], "--block-length 3 must divide the canvas"), (["--denoising-steps", 0], "--denoising-steps must be"),
    (["--denoising-steps", 9], "--denoising-steps 9 is more than the canvas has positions, 8"),
    (["--max-new-tokens", 1030], "needs"), (["--task", "addition", "--model", "nobody"], "unknown model"),
    (["--eval-steps", 0], "--eval-steps must be"),
])  # fmt: skip
def test_mistakes(tmp_path, flags, why):
    done = run(tmp_path, *flags, "--steps", 1, script=MDLM)
    assert done.code == 2 and why in done.err and done.err.count("\n") == 1
