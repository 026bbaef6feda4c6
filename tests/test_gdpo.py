"""GDPO's worked numbers, its masks, estimators against the exact ELBO, what the policy is shown, and what a run logs."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from algos import gdpo
from common import UserError, batch, diffusion, gpu, models, rollout, settings
from common.worlds import tiny as worlds
from tests.helpers import lines, outcome, same

CLOSE = dict(rtol=0, atol=1e-6)
MASK = 99
WAYS = [
    dict(), dict(nodes=1), dict(nodes=3), dict(draws=2), dict(exact_count=False), dict(likelihood="double_mc"),
    dict(likelihood="double_mc", exact_count=False), dict(likelihood="diffu"),
]  # fmt: skip


def args(**changes):
    return settings.resolve(gdpo.Args(**dict(prompts_per_step=1, group_size=2) | changes))[0]


def weights(rows=1, L=8, seed=0, **changes):
    """Of that many rows [rows, passes, L]."""
    a = args(**changes)
    noise = torch.rand(rows, a.nodes * a.draws, 1 + L, generator=torch.Generator().manual_seed(seed))
    return gdpo.mask_weights(noise, a), noise


# ---------------------------------------------------------------- worked numbers


@pytest.mark.parametrize("exact, value, ratio", [(False, -2.670577, 1.180437), (True, -3.083333, 1.086904)])
def test_worked_numbers(exact, value, ratio):
    """L = 5, two nodes: the first masks one token, the second three."""
    a = args(exact_count=exact, max_new_tokens=5)
    noise = torch.tensor([[[0.9, 0.5, 0.6, 0.1, 0.7, 0.8], [0.9, 0.1, 0.7, 0.2, 0.8, 0.3]]])  # the first is double_mc's t
    w = gdpo.mask_weights(noise, a)
    counted = [[5.0, 5 / 3], [2.366025, 0.633975]][not exact]
    share = [x / 2 for x in counted] if exact else counted
    wanted = torch.tensor([[[0, 0, 1.0, 0, 0], [1, 0, 1, 0, 1]]]) * torch.tensor(share)[:, None]
    torch.testing.assert_close(w, wanted, **CLOSE)
    leaves = torch.tensor([-0.7, -0.5, -0.9, -0.2], requires_grad=True)
    shown = []

    def policy(ids, attention_mask, masked, temperature, given):
        shown.append(ids[0].tolist())
        found = leaves[:1] if len(shown) == 1 else leaves[1:]
        return torch.zeros(1, 5).masked_scatter(masked, found), 2.0 * masked

    ids = torch.arange(1, 9)[None]
    columns = dict(weights=w.movedim(-1, 1)[:, :, None], hidden=torch.zeros(1, 1, 1, 3).bool())
    mb = SimpleNamespace(ids=ids, attention_mask=ids > 0, mask=ids[:, 3:] > 0, columns=columns)
    logp, entropy = gdpo.likelihood(policy, mb, 0, MASK, a)
    assert shown == [[1, 2, 3, 4, 5, MASK, 7, 8], [1, 2, 3, MASK, 5, MASK, 7, MASK]]
    torch.testing.assert_close(logp.detach(), torch.full((1, 5), value / 5), **CLOSE)
    assert torch.equal(entropy, torch.full((1, 5), 2.0))
    objective, stats = gdpo.surrogate(logp, torch.full((1, 5), -3.5 / 5), torch.full((1, 5), 0.75), mb.mask, a)
    loss = -(objective * gdpo.token_weights(mb.mask, a))[mb.mask].sum()
    loss.backward()
    assert loss.item() == pytest.approx(-0.75 * ratio, abs=2e-6) and not stats["clip_fraction"].any()
    gradient = [-0.75 * ratio / 5 * x for x in [share[0], *[share[1]] * 3]]
    torch.testing.assert_close(leaves.grad, torch.tensor(gradient), **CLOSE)
    if not exact:
        assert loss.item() == pytest.approx(-0.885328, abs=1e-6)
        torch.testing.assert_close(leaves.grad, torch.tensor([-0.418942, -0.112255, -0.112255, -0.112255]), **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nodes_integrate_what_gauss_promises(n):
    """Polynomials up to degree 2n - 1, and no higher."""
    t, w = (x.double() for x in gdpo.quadrature(n))
    for power in range(2 * n):
        assert (w * t**power).sum().item() == pytest.approx(1 / (power + 1), abs=1e-6)
    assert abs((w * t ** (2 * n)).sum().item() - 1 / (2 * n + 1)) > 1e-4
    nodes = {1: [0.5], 2: [0.211325, 0.788675], 3: [0.112702, 0.5, 0.887298]}[n]
    assert t.tolist() == pytest.approx(nodes, abs=1e-6) and t.tolist() == sorted(t.tolist())


# ---------------------------------------------------------------- masks


def test_counts_of_masks():
    """floor(t L) positions, one at least; 1/t each, or L / |m|; K masks of each node."""
    for n, L, counts in ((1, 8, [4]), (2, 8, [1, 6]), (3, 8, [1, 4, 7]), (2, 256, [54, 201]), (2, 3, [1, 2]), (1, 1, [1])):
        t, w = gdpo.quadrature(n)
        for exact in (False, True):
            found, _ = weights(5, L, nodes=n, draws=2, exact_count=exact)
            assert (found > 0).sum(2).tolist() == [counts * 2] * 5
            share = torch.tensor(counts) / L if exact else t
            torch.testing.assert_close(found.amax(2), (w / 2 / share).repeat(2).expand(5, -1))
            assert all(len(row[row > 0].unique()) == 1 for row in found.flatten(0, 1))
    found, _ = weights(4000, 8, nodes=2)
    share = (found > 0).float().mean(0)
    torch.testing.assert_close(share, torch.tensor([[1 / 8], [6 / 8]]).expand(2, 8), rtol=0, atol=0.03)
    assert len({tuple(row) for row in (found[:, 1] > 0).tolist()}) == 28  # every set of six


def test_masks_of_double_monte_carlo():
    found, noise = weights(4000, 8, nodes=2, draws=2, likelihood="double_mc")
    counts = (found > 0).sum(2)
    torch.testing.assert_close(counts.flatten().bincount()[1:] / 16000, torch.full((8,), 1 / 8), rtol=0, atol=0.01)
    assert torch.equal(counts, 1 + (8 * noise[..., 0]).long())
    torch.testing.assert_close(found.sum(2), torch.full((4000, 4), 8 / 4))  # k times L / k, over four
    found, noise = weights(4000, 8, nodes=2, draws=2, likelihood="double_mc", exact_count=False)
    t = noise[..., :1].clamp(min=1e-3)
    assert torch.equal(found > 0, noise[..., 1:] < t)
    torch.testing.assert_close(found, (noise[..., 1:] < t) / t / 4)
    least = gdpo.mask_weights(torch.zeros(1, 2, 9), args(likelihood="double_mc", exact_count=False))
    torch.testing.assert_close(least, torch.full((1, 2, 8), 500.0))  # t = 1e-3


def test_estimators_and_the_exact_bound():
    """Where a log-prob depends on how many are masked, g(k), the ELBO is the sum of g: what double Monte Carlo has on average,
    and the quadrature for a polynomial of the right degree, but for the floor."""
    L, g = 8, lambda k: -0.2 - 0.03 * k - 0.01 * k**2
    exact = sum(map(g, range(1, L + 1)))

    def estimates(**changes):
        found, _ = weights(20000, L, **changes)
        count = (found > 0).sum(2, keepdim=True)
        return (found * g(count)).sum((1, 2))

    for changes in (dict(), dict(draws=3), dict(exact_count=False)):
        found = estimates(likelihood="double_mc", **changes)
        assert found.mean().item() == pytest.approx(exact, abs=5 * found.std().item() / 20000**0.5)
    assert estimates(likelihood="double_mc", draws=4).std() < 0.6 * estimates(likelihood="double_mc").std()
    by_hand = 8 / 2 * (g(1) + g(6))
    assert (estimates() - by_hand).abs().max() < 1e-4
    assert (estimates(exact_count=False) - (g(1) / 0.211325 + 6 * g(6) / 0.788675) / 2).abs().max() < 1e-4


# ---------------------------------------------------------------- canvases


def rolled(seed=0, rows=4, **changes):
    """A batch of canvases of 8 behind prompts of 3 and 2 tokens, with its masks; context is 12: there is a longer prompt."""
    a = args(prompts_per_step=rows // 2, max_new_tokens=8, **changes)
    pairs = [([5, 6, 7][i % 2 :], [10 + i, 11, 1, 12, 13, 1, 1, 14]) for i in range(rows)]
    b = batch.collate(pairs)
    b.sampler_logp = torch.zeros(rows, 8)
    gdpo.mask_sets(b, 12, [1], seed, a)
    return b, a


class Recorder:
    """Stands for a policy: a log-prob is -0.01 times the token's number, and what it is shown is kept."""

    def __init__(self):
        self.calls = []

    def __call__(self, ids, attention_mask, masked, temperature, given):
        self.calls.append((ids, attention_mask, masked, temperature, given))
        return (-0.01 * given).masked_fill(~masked, 0.0), masked * 1.0


@pytest.mark.parametrize("changes", WAYS)
def test_what_the_policy_is_shown(changes):
    """The masks of the sets, everything else clean; the prompt as it is, but for diffu; the log-probs asked for are those of
    what stood there."""
    b, a = rolled(**changes)
    policy = Recorder()
    logp, entropy = gdpo.likelihood(policy, b, 1, MASK, a)
    w, hidden = b.columns["weights"][:, :, 1], b.columns["hidden"][:, 0, 1]
    diffu = a.likelihood == "diffu"
    assert len(policy.calls) == w.shape[2] == (1 if diffu else a.nodes * a.draws)
    assert b.columns["weights"].shape[2] == a.epochs == 2
    for i, (ids, seen, masked, _, given) in enumerate(policy.calls):
        assert torch.equal(masked, w[:, :, i] > 0) and torch.equal(seen, b.attention_mask)
        assert torch.equal(given, b.ids[:, 3:]) and torch.equal(ids[:, 3:], given.masked_fill(masked, MASK))
        assert torch.equal(ids[:, :3], b.ids[:, :3].masked_fill(hidden[:, 1:], MASK))
    assert hidden.any() == diffu
    if diffu:
        torch.testing.assert_close(logp, -0.01 * b.ids[:, 3:])
        assert b.trained.tolist() == [[True] * 3 + [False] * 5] * 4
    else:
        assert (
            torch.equal(b.trained, b.mask) and (logp == logp[:, :1]).all() and (entropy == (w > 0).any((1, 2))[:, None]).all()
        )
        torch.testing.assert_close(8 * logp[:, 0], (w * -0.01 * b.ids[:, 3:, None]).sum((1, 2)))


def test_the_temperature_is_of_log_probs_as_well():
    b, a = rolled(temperature=0.7)
    policy = Recorder()
    gdpo.likelihood(policy, b, 0, MASK, a)
    assert {call[3] for call in policy.calls} == {0.7}


def test_masks_are_a_row_s_own():
    """New in every pass over the rollout and for another seed; and for two processes those that one has."""
    whole, a = rolled(rows=8)
    w, again = whole.columns["weights"], rolled(rows=8)[0].columns
    assert torch.equal(w, again["weights"]) and torch.equal(whole.columns["hidden"], again["hidden"])
    assert not torch.equal(w[:, :, 0], w[:, :, 1]) and not torch.equal(w, rolled(1, rows=8)[0].columns["weights"])
    assert len({tuple(row.flatten().tolist()) for row in w}) == 8
    hidden = rolled(rows=400, likelihood="diffu", p_mask_prompt=0.3)[0].columns["hidden"]
    assert hidden.shape == (400, 1, 2, 4) and hidden.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert not rolled(likelihood="diffu", p_mask_prompt=0.0)[0].columns["hidden"].any()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_has_its_rows_of_all_masks(monkeypatch, rank):
    whole, a = rolled(rows=8)
    part = whole.take(torch.arange(4) + 4 * rank)
    monkeypatch.setattr(gpu, "world", lambda: 2)
    monkeypatch.setattr(gpu, "rank", lambda: rank)
    part.columns = {}
    gdpo.mask_sets(part, 12, [1], 0, a)
    for name in ("weights", "hidden"):
        assert torch.equal(part.columns[name], whole.columns[name][4 * rank : 4 * rank + 4])


def test_old_and_new_share_their_masks():
    """Before an update the ratio is 1 in every pass, by whatever micro-batches; columns go with their rows."""
    b, a = rolled(likelihood="double_mc")
    a.micro_batch_tokens = 20
    gdpo.score(b, dict(old=Recorder(), ref=None), MASK, a)
    assert b.columns["old"].shape == (4, 8, 2) and "ref" not in b.columns and b.ref_logp is None
    for epoch in range(2):
        assert gdpo.turn(b, epoch) == epoch and b.sampler_logp is b.old_logp
        for mb in b.micro_batches(torch.tensor([3, 1]), 11):
            logp, _ = gdpo.likelihood(Recorder(), mb, epoch, MASK, a)
            torch.testing.assert_close(logp, mb.old_logp, rtol=1e-6, atol=1e-7)
    assert not torch.equal(b.columns["old"][..., 0], b.columns["old"][..., 1])
    gdpo.score(b, dict(old=Recorder(), ref=Recorder()), MASK, a)
    assert torch.equal(b.ref_logp, b.old_logp)


# ---------------------------------------------------------------- flags, runs


def test_presets_and_limits(tmp_path):
    small, _ = settings.resolve(gdpo.Args())
    assert (small.task, small.max_new_tokens, small.denoising_steps, small.block_length, small.epochs) == ("sums", 8, 8, 0, 2)
    real = gdpo.Args.real_preset
    assert (real["max_new_tokens"], real["denoising_steps"], real["block_length"], real["epochs"]) == (256, 128, 32, 8)
    for flag, value in dict(nodes=4, draws=0, p_mask_prompt=1.5, denoising_steps=0, likelihood="mc", order="right").items():
        with pytest.raises(UserError, match="--" + flag.replace("_", "-")):
            settings.resolve(gdpo.Args(**{flag: value}))


def test_a_causal_model_is_refused(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = worlds.with_mask()
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is a causal model; this script needs one that sees all positions"):
        trained(tmp_path, "run", model=str(tmp_path / "model"), task="sums", dtype="float32", optimizer="adamw")


@pytest.fixture
def seen(monkeypatch):
    """Of a run in this process: the batches that it logged, and for every likelihood with a gradient which pass over the
    rollout it is in, and the positions of its canvases."""
    found, summary, likelihood = SimpleNamespace(batches=[], epochs=[], tokens=[]), rollout.summary, gdpo.likelihood

    def summed(b):
        found.batches.append(dataclasses.replace(b))
        return summary(b)

    def measured(policy, mb, epoch, *more):
        if torch.is_grad_enabled():
            found.epochs.append(epoch)
            found.tokens.append(mb.mask.numel())
        return likelihood(policy, mb, epoch, *more)

    monkeypatch.setattr(rollout, "summary", summed)
    monkeypatch.setattr(gdpo, "likelihood", measured)
    return found


def trained(tmp_path, name, **changes):
    small = dict(steps=1, prompts_per_step=4, group_size=4, eval_prompts=8, checkpoint_every=0, run_dir=str(tmp_path / name))
    gdpo.train(gdpo.Args(**small | changes))
    return lines(tmp_path / name / "metrics.jsonl")


def test_a_run(seen, tmp_path):
    """Canvases as they were sampled; advantages without a std; ratios of sequences, 1 but for the second pass. Of 16 rows five
    minibatches are four of four rows. Masks are new in every rollout, also where one waits."""
    row, second = trained(tmp_path, "run", minibatches=5, steps=2, stale=1)
    b, other = seen.batches
    assert b.mask.shape == (16, 8) and b.mask.all() and row["length"] == 8 and row["truncated"] == 0
    assert seen.epochs == [0, 0, 0, 0, 1, 1, 1, 1] * 2 and second["staleness"] == 1
    assert not torch.equal(b.columns["weights"], other.columns["weights"])
    rewards = b.reward.view(4, 4)
    torch.testing.assert_close(b.adv.view(4, 4, 8), (rewards - rewards.mean(1, keepdim=True))[:, :, None].expand(4, 4, 8))
    assert rewards.any() and not rewards.all() and row["accuracy"] == rewards.mean().item()
    assert torch.equal(b.old_logp, b.columns["old"][:, :, 1]) and row["sampler_gap"] == row["sampler_gap_max"] == 0
    assert 0.1 < row["ratio_min"] < 0.99 and 1.01 < row["ratio_max"] < 2 and row["grad_norm"] > 0 and 0.1 < row["entropy"] < 2
    (one,) = trained(tmp_path, "one", epochs=1)
    assert one["ratio_min"] == pytest.approx(1, abs=1e-5) and one["loss"] == pytest.approx(0, abs=1e-5)


def test_micro_batches_change_nothing(seen, tmp_path):
    """And all passes of a likelihood together are within the tokens of one."""
    (one,) = trained(tmp_path, "one", dtype="float64", nodes=3)
    assert seen.tokens == [16 * 8] * 2
    (many,) = trained(tmp_path, "many", dtype="float64", nodes=3, micro_batch_tokens=130)
    assert max(seen.tokens[2:]) * 3 <= 130 and len(seen.tokens) == 2 + 2 * 4
    assert {k: v for k, v in many.items() if "time" not in k} == pytest.approx(
        {k: v for k, v in one.items() if "time" not in k}, rel=1e-6, abs=1e-9
    )


def test_every_way_is_another(tmp_path, monkeypatch):
    """The first update's gradient, of the same rollout."""
    monkeypatch.setattr(rollout, "evaluate", lambda *_: dict(greedy_accuracy=0.0, prompts=1))
    norms = {}
    ways = [dict(), dict(likelihood="double_mc"), dict(likelihood="diffu"), dict(likelihood="diffu", p_mask_prompt=0.9)]
    for i, changes in enumerate(ways):
        (row,) = trained(tmp_path, str(i), minibatches=1, epochs=1, **changes)
        norms[i] = row["grad_norm"]
        assert row["reward"] == norms.setdefault("reward", row["reward"])
    assert len({round(norms[i], 6) for i in range(4)}) == 4
    (row,) = trained(tmp_path, "beta", beta=0.1, lr=1e-2)
    assert row["ref_kl"] > 1e-4
    (wide,), (narrow,) = (trained(tmp_path, str(eps), eps=eps) for eps in (0.9, 0.001))
    assert narrow["clip_fraction"] > wide["clip_fraction"]


def test_flags_of_the_sampler(tmp_path):
    a, config = settings.resolve(gdpo.Args())
    gpu.init(a)
    tokenizer = models.load_tokenizer(a)
    policy = models.load(a, gpu.device(), denoiser=True)
    prompts = [tokenizer(f"{s}=").input_ids for s in range(30, 80)]

    def completions(**changes):
        changed = dataclasses.replace(a, **changes)
        return diffusion.Canvas(policy, tokenizer, changed, gdpo.unmask).generate(prompts, 1, 8, 1.0, range(50))

    ways = [dict(), dict(denoising_steps=4), dict(block_length=4), dict(order="random"), dict(order="left")]
    found = [completions(**changes) for changes in ways]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert all(len(y) == 8 and tokenizer.mask_token_id not in y for way in found for y, _, _ in way)


def resumed(tmp_path, name, steps):
    """A copy of a run's folder, whose lock this process still holds, to its end."""
    shutil.copytree(tmp_path / name, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    gdpo.train(gdpo.Args(resume=str(tmp_path / "copy"), steps=steps))
    return outcome(tmp_path / "copy")


def test_waiting_rollouts_keep_their_masks(tmp_path, monkeypatch):
    """Resumed with one in the queue, and a reference."""
    monkeypatch.setattr("sys.argv", ["gdpo.py"])
    flags = dict(stale=1, beta=0.1, likelihood="double_mc", lr=1e-2, checkpoint_every=1)
    rows = trained(tmp_path, "whole", steps=2, **flags)
    trained(tmp_path, "half", **flags)
    a, b = outcome(tmp_path / "whole"), resumed(tmp_path, "half", 2)
    a.evals = b.evals = ""  # the first half evaluates at its own end, too
    same(a, b)
    assert [row["staleness"] for row in rows] == [0, 1] and rows[1]["approx_kl"] > 1e-5


def test_another_built_in_task(tmp_path, monkeypatch):
    """Made for a model that sees all positions, also where the run is resumed and the task is not said again."""
    monkeypatch.setenv("TOKENPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["gdpo.py"])
    for name, steps in dict(steps=4, careful_steps=0).items():
        monkeypatch.setitem(worlds.RECIPE, name, steps)
    trained(tmp_path, "run", task="addition", checkpoint_every=1)
    assert resumed(tmp_path, "run", 2).last == "step-000002"
