"""What must hold for the loss of every script that learns from demonstrations, and for each as a user runs it."""

import importlib
import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.batch import Batch
from common.policy import Policy
from common.worlds import tiny
from tests import sync
from tests.batches import ragged_batch
from tests.helpers import ROOT, killed, lines, outcome, run, same

SCRIPTS = [n for n in sync.scripts() if "def token_loss(" in (sync.ALGOS / f"{n}.py").read_text()]
each = pytest.mark.parametrize("script", [importlib.import_module(f"algos.{n}") for n in SCRIPTS], ids=SCRIPTS)


def flags(script):
    """Its Args, with the tiny model's preset where a flag is open."""
    args = script.Args()
    for name, value in getattr(script.Args, "tiny_preset", {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def extra(script):
    """What a token_loss asks for besides targets, logits and args, by name: columns of the token."""
    return list(inspect.signature(script.token_loss).parameters)[3:]


def column(n):
    """Numbers in [0, 1) of n tokens, as many as any script asks for."""
    return torch.rand(n, 256, generator=torch.Generator().manual_seed(1))


def loss(script, targets, logits, args=None, first=0):
    """-> (loss [n], what is logged, [n] each) of the tokens from this number on."""
    columns = {name: column(first + len(targets))[first:] for name in extra(script)}
    return script.token_loss(targets, logits, args or flags(script), **columns)


def positions(n=7, V=11, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(V, (n,), generator=draw), 2 * torch.randn(n, V, generator=draw, dtype=dtype)


@each
def test_what_comes_back(script):
    """The loss has a gradient; what is logged has none, and begins with the plain log-prob and entropy, whatever the loss."""
    targets, logits = positions()
    leaf = logits.clone().requires_grad_()
    losses, logp, entropy, *more = loss(script, targets, leaf)
    for x in (losses, logp, entropy, *more):
        assert x.shape == targets.shape and x.isfinite().all() and x.requires_grad == (x is losses)
    plain = logits.log_softmax(-1)
    torch.testing.assert_close(logp, plain.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    losses.sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().sum(1).min() > 0


@each
def test_a_constant_of_the_logits_changes_nothing(script):
    """The loss is one of probabilities: the same for logits that are all greater by 3, so that its gradient adds up to 0."""
    targets, logits = positions(dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    losses, *_ = loss(script, targets, leaf)
    losses.sum().backward()
    assert losses.dtype == torch.float64
    torch.testing.assert_close(loss(script, targets, logits + 3)[0], losses.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(leaf.grad.sum(1), torch.zeros(len(targets), dtype=torch.float64), rtol=0, atol=1e-12)


@each
def test_a_position_is_its_own_affair(script):
    targets, logits = positions()
    leaf = logits.clone().requires_grad_()
    whole, *_ = loss(script, targets, leaf)
    whole[2].backward()
    assert not leaf.grad[[0, 1, 3, 4, 5, 6]].any() and leaf.grad[2].any()
    parts = [loss(script, targets[at], logits[at], first=at.start)[0] for at in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(torch.cat(parts), whole.detach())


@each
def test_sure_and_hopeless_positions(script):
    logits = torch.tensor([[80.0, 0, 0], [0, 80.0, 0], [0.0, 0, 0]]).requires_grad_()
    losses, *more = loss(script, torch.tensor([0, 0, 0]), logits)
    losses.sum().backward()
    assert losses.isfinite().all() and logits.grad.isfinite().all() and all(x.isfinite().all() for x in more)


@each
def test_no_position_at_all(script):
    """A process without rows of its own reads an empty chunk."""
    logits = torch.zeros(0, 11, requires_grad=True)
    out = loss(script, torch.zeros(0, dtype=torch.int64), logits)
    assert all(x.shape == (0,) for x in out)
    out[0].sum().backward()
    assert logits.grad.shape == (0, 11)


@each
def test_token_weights(script):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    weights = script.token_weights(mask, flags(script))
    assert weights.sum().item() == pytest.approx(1) and not weights[~mask].any() and (weights[mask] > 0).all()
    wide = script.token_weights(torch.nn.functional.pad(mask, (0, 3)), flags(script))
    torch.testing.assert_close(wide, torch.nn.functional.pad(weights, (0, 3)))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(script.token_weights(mask[order], flags(script)), weights[order])
    assert not script.token_weights(torch.zeros(2, 3).bool(), flags(script)).any()  # and no NaN


# ---------------------------------------------------------------- through a policy


@pytest.fixture(scope="module")
def policy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny.config("tiny-small")
        config.initializer_range = 0.3
        return Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float64))


def made(script, lengths=(9, 1, 30, 5, 0, 5, 22)):
    """A batch with prompts in common, an empty completion and garbage in the padding."""
    ids, attention, mask = ragged_batch(lengths=lengths)
    if not mask.shape[1]:
        ids, attention, mask = (torch.nn.functional.pad(x, (0, 1)) for x in (ids, attention, mask))
    batch = Batch(ids, attention, mask, prompt_id=torch.tensor([0, 0, 1, 1, 1, 2, 0]))
    batch.weights = script.token_weights(mask, flags(script))
    batch.columns = {name: column(mask.numel()).view(*mask.shape, -1) for name in extra(script)}
    return batch


def update(script, policy, batch, rows, budget):
    """As the loop: -> (loss, gradient of all weights) of these rows, cut into micro-batches."""
    args, total = flags(script), 0.0
    policy.zero_grad()

    def read(given, logits):
        return script.token_loss(given[:, 0].long(), logits, args, *[given[:, 1:]] * len(extra(script)))

    for mb in batch.micro_batches(torch.tensor(rows), budget):
        given = torch.cat([mb.ids[:, -mb.mask.shape[1] :, None], *mb.columns.values()], 2)
        losses, *_ = policy(mb.ids, mb.attention_mask, mb.mask, read=read, given=given)
        micro = (losses * mb.weights)[mb.trained].sum()
        micro.backward()
        total += micro.item()
    return total, torch.cat([p.grad.flatten() for p in policy.parameters()])


@each
def test_cuts_and_ranks_change_nothing(script, policy):
    batch, everyone = made(script), list(range(7))
    value, gradient = update(script, policy, batch, everyone, 16384)
    for parts, budget in (([everyone], 40), ([[0, 2, 4, 6], [1, 3, 5]], 60)):
        found = [update(script, policy, batch, rows, budget) for rows in parts]
        assert sum(v for v, _ in found) == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(sum(g for _, g in found), gradient, rtol=1e-5, atol=1e-6)  # norms are in float32


@each
def test_padding_and_what_is_in_it_change_nothing(script, policy):
    batch = made(script)
    value, gradient = update(script, policy, batch, range(7), 16384)
    batch.ids = torch.where(batch.attention_mask, batch.ids, 7)
    value2, gradient2 = update(script, policy, batch, range(7), 16384)
    assert value2 == value and torch.equal(gradient, gradient2)
    batch.ids[batch.attention_mask] = 7
    assert update(script, policy, batch, range(7), 16384)[0] != value


@each
def test_an_update_of_empty_completions_is_none(script, policy):
    value, gradient = update(script, policy, made(script, lengths=(0,) * 7), range(7), 16384)
    assert value == 0 and not gradient.any()


@each
def test_every_field_is_read(script):
    source, base = inspect.getsource(script), importlib.import_module("algos.sft").Args
    for field in set(script.Args.__dataclass_fields__) - set(base.__dataclass_fields__):
        assert f"args.{field}" in source, f"--{field} is read nowhere"


# ---------------------------------------------------------------- runs

SMALL = "--batch-size 8 --eval-prompts 8 --checkpoint-every 1".split()


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_is_the_whole(name, tmp_path):
    script, whole, parts = ROOT / "algos" / f"{name}.py", tmp_path / "whole", tmp_path / "parts"
    done = run(tmp_path, *SMALL, "--steps", 2, "--run-dir", whole, script=script)
    assert done.code == 0 and done.err == "", done.err
    killed(whole, parts, 1)
    done = run(tmp_path, "--resume", parts, script=script)
    assert done.code == 0 and done.err == "", done.err
    same(outcome(whole), outcome(parts))
    rows = lines(whole / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2] and all(r["grad_norm"] > 0 and r["entropy"] > 0 for r in rows)
    assert all(r["train_perplexity"] == pytest.approx(torch.tensor(-r["logp"]).exp().item()) for r in rows)
