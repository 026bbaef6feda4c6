"""What must hold for the pair loss of every preference script, and for each as a user runs it, parametrised over algos/."""

import importlib
import inspect
import math

import pytest
import torch

from tests import sync
from tests.helpers import ROOT, killed, lines, outcome, run, same

SCRIPTS = [n for n in sync.scripts() if "def pair_loss(" in (sync.ALGOS / f"{n}.py").read_text()]
each = pytest.mark.parametrize("script", [importlib.import_module(f"algos.{n}") for n in SCRIPTS], ids=SCRIPTS)
# A script whose loss is more than the contrast of a pair says in its own tests with what it is that alone:
# PLAIN = dict(args={field: value}, columns={name: (value at the chosen tokens, at the rejected)}). The limits of the papers.


def own_tests(script):
    return importlib.import_module("tests.test_" + script.__name__.removeprefix("algos."))


def plain(script, v):
    """-> (the values, the arguments) with which the script is the contrast of a pair, and nothing else."""
    own = getattr(own_tests(script), "PLAIN", {})
    changed = {
        name: torch.cat([torch.full_like(x, c) for x, c in zip(v[name].chunk(2), both)])
        for name, both in own.get("columns", {}).items()
    }
    return v | changed, script.Args(**own.get("args", {}))


def pairs(lengths, seed=0, dtype=torch.float32):
    """Log-probs of pairs with these (chosen, rejected) lengths, and anything else per token that a script asks for by name:
    another model's log-probs for *logp, numbers in (0, 1) otherwise."""
    g = torch.Generator().manual_seed(seed)
    sides = [n for n, _ in lengths] + [n for _, n in lengths]
    mask = torch.arange(max(1, *sides)) < torch.tensor(sides)[:, None]
    ref_logp = -torch.rand(mask.shape, generator=g, dtype=dtype) * 3 - 0.01

    def column(name):
        own = torch.Generator().manual_seed(sum(map(ord, name)))
        if name.endswith("logp"):
            return ref_logp - 0.3 * torch.rand(mask.shape, generator=own, dtype=dtype)
        return 0.05 + 0.9 * torch.rand(mask.shape, generator=own, dtype=dtype)

    logp = ref_logp + 0.3 * torch.randn(mask.shape, generator=g, dtype=dtype)
    return dict(logp=logp, ref_logp=ref_logp, mask=mask), column


def names(script):
    return [n for n in inspect.signature(script.pair_loss).parameters if n != "args"]


def values(script, lengths, **kwargs):
    given, column = pairs(lengths, **kwargs)
    return {n: given[n] if n in given else column(n) for n in names(script)}


def loss_and_gradient(script, v, args=None):
    leaf = v["logp"].clone().requires_grad_()
    losses, stats = script.pair_loss(**v | dict(logp=leaf), args=args or script.Args())
    assert losses.shape == (len(leaf) // 2,)
    assert all(s.shape == losses.shape and s.isfinite().all() for s in stats.values()), stats
    losses.sum().backward()
    return losses.detach(), leaf.grad


@each
@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0), (1, 1), (4096, 1), (1, 4096)])
def test_lengths(script, lengths):
    v = values(script, [lengths, (2, 2)])
    losses, grad = loss_and_gradient(script, v)
    assert losses.isfinite().all() and grad.isfinite().all() and not grad[~v["mask"]].any()
    alone, _ = loss_and_gradient(script, {k: x[1::2, :2] for k, x in v.items()})
    torch.testing.assert_close(losses[1:], alone)  # a pair's loss is its own affair


@each
def test_garbage_at_the_padding_changes_nothing(script):
    v = values(script, [(5, 2), (1, 4), (3, 3)])
    losses, grad = loss_and_gradient(script, v)
    for garbage in (1e4, -1e4, float("inf"), float("nan")):
        spoilt = {k: x if k == "mask" else torch.where(v["mask"], x, torch.tensor(garbage)) for k, x in v.items()}
        losses2, grad2 = loss_and_gradient(script, spoilt)
        assert torch.equal(losses, losses2) and torch.equal(grad, grad2), garbage


@each
def test_padding_order_and_precision_change_nothing(script):
    v = values(script, [(5, 2), (1, 4), (3, 3)])
    losses, grad = loss_and_gradient(script, v)
    wide, grad2 = loss_and_gradient(script, {k: torch.nn.functional.pad(x, (0, 3)) for k, x in v.items()})
    torch.testing.assert_close(wide, losses), torch.testing.assert_close(grad2[:, :5], grad)
    order = torch.tensor([2, 0, 1])
    rows = torch.cat([order, order + 3])
    mixed, grad3 = loss_and_gradient(script, {k: x[rows] for k, x in v.items()})
    torch.testing.assert_close(mixed, losses[order]), torch.testing.assert_close(grad3, grad[rows])
    double, _ = loss_and_gradient(script, {k: x if k == "mask" else x.double() for k, x in v.items()})
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), losses)


@each
def test_the_gradient_is_that_of_the_loss(script):
    """Against finite differences in float64, with what a script detaches on purpose switched off (SMOOTH in its own tests)."""
    v, step = values(script, [(3, 2), (1, 2)], dtype=torch.float64), 1e-6
    args = script.Args(**getattr(own_tests(script), "SMOOTH", {}))
    _, grad = loss_and_gradient(script, v, args)
    for row, t in v["mask"].nonzero().tolist():
        total = []
        for sign in (1, -1):
            moved = v["logp"].clone()
            moved[row, t] += sign * step
            total.append(script.pair_loss(**v | dict(logp=moved), args=args)[0].sum().item())
        assert (total[0] - total[1]) / (2 * step) == pytest.approx(grad[row, t].item(), abs=1e-6)


@each
def test_the_chosen_is_raised_against_the_rejected(script):
    """On a pair of equal lengths far from saturation: up for the chosen tokens on the whole, down for the rejected."""
    v = values(script, [(4, 4)])
    _, grad = loss_and_gradient(script, v)
    assert grad[0].sum() < 0 < grad[1].sum()


@each
def test_identical_responses(script):
    """Twice the same response, with the same columns: no contrast. Where a loss is nothing else, the gradients of the two sides
    cancel for the shared log-probs, and no accuracy is claimed."""
    v = {k: x[:1].repeat(2, 1) for k, x in values(script, [(4, 4)]).items()}
    for given, args in ((v, script.Args()), plain(script, v)):
        leaf = v["logp"][:1].clone().requires_grad_()
        losses, stats = script.pair_loss(**given | dict(logp=leaf.expand(2, -1)), args=args)
        losses.sum().backward()
        assert losses.isfinite().all() and leaf.grad.isfinite().all()
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=1e-7)
    assert stats["reward_accuracy"].item() == 0 and stats["margin"].item() == pytest.approx(0, abs=1e-6)


@each
def test_policy_equal_to_reference(script):
    """Every method that has a reference starts at ln 2 for its contrast."""
    v = values(script, [(4, 2), (1, 3)])
    if "ref_logp" not in v:
        return
    v |= {k: v["ref_logp"] if k.endswith("logp") else torch.zeros_like(v[k]) for k in v if k.endswith(("logp", "kl"))}
    v, args = plain(script, v)
    losses, stats = script.pair_loss(**v, args=args)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
    assert not stats["reward_accuracy"].any()


@each
def test_every_own_field_is_read(script):
    source, base = inspect.getsource(script), importlib.import_module("algos.grpo").Args
    for field in script.Args.__dataclass_fields__:
        if field not in base.__dataclass_fields__ or field == "beta":
            assert f"args.{field}" in source or field in ("data",), f"--{field} is read nowhere"


# ---------------------------------------------------------------- runs

SMALL = "--pairs-per-step 8 --eval-prompts 8 --checkpoint-every 1".split()
# What makes small what a method does before and after its steps stands in its own tests: FEW = [flags].


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_the_whole(name, tmp_path):
    script, whole, parts = ROOT / "algos" / f"{name}.py", tmp_path / "whole", tmp_path / "parts"
    small = [*SMALL, *getattr(importlib.import_module(f"tests.test_{name}"), "FEW", [])]
    done = run(tmp_path, *small, "--checkpoint-every", 1, "--steps", 2, "--run-dir", whole, script=script)
    assert done.code == 0, done.err
    killed(whole, parts, 1)
    done = run(tmp_path, "--resume", parts, script=script)
    assert done.code == 0, done.err
    same(outcome(whole), outcome(parts))
    rows = lines(whole / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2] and all(r["grad_norm"] > 0 for r in rows)
