"""Soft Tokens' worked numbers, what is drawn of a thought and fed again in training, limits, two gradients apart, and runs."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from algos import rloo, soft_tokens
from common import UserError, engines, models, rollout, settings, tasks
from common.batch import Meter, read
from tests import parts
from tests.batches import chain_scorer as scorer
from tests.batches import heard
from tests.card import example
from tests.helpers import ROOT, checkpoints, contents, lines, run

CLOSE = dict(rtol=0, atol=1e-6)
SCRIPT = ROOT / "algos" / "soft_tokens.py"
SMALL = "--steps 2 --prompts-per-step 8 --group-size 4 --eval-prompts 8".split()
E = torch.tensor([[1.0, 0], [0, 1], [-1, -1]], dtype=torch.float64)
OLD, NEW = (torch.tensor([z], dtype=torch.float64) for z in ([1, 0.5, -0.5], [1.2, 0.3, -0.5]))
NONE = torch.tensor([], dtype=torch.int64)
SIGMA = 0.2694438717
TABLE = torch.nn.Embedding.from_pretrained(E)


def args(**changes):
    return soft_tokens.Args(**changes)


def thought(z=OLD, u=None, closing=NONE, **changes):
    """-> SimpleNamespace of what think() gives."""
    found = soft_tokens.think(z, TABLE, u, closing, SIGMA, args(**changes))
    return SimpleNamespace(**dict(zip(("fed", "shown", "record", "logp", "closes"), found)))


def uniform(x):
    """The uniform numbers whose normal ones are x."""
    return torch.special.ndtr(torch.as_tensor(x, dtype=torch.float64))


# ---------------------------------------------------------------- a thought and its density


def test_worked_thought():
    assert soft_tokens.deviation(E, args()) == pytest.approx(0.269444, abs=1e-6)
    assert soft_tokens.deviation(E.bfloat16(), args(noise_scale=1.0)) == pytest.approx((4 / 6) ** 0.5, abs=1e-6)
    assert soft_tokens.mean_thought(OLD, E, args())[0].tolist() == pytest.approx([0.670265, 0.224377], abs=1e-6)
    it = thought(u=uniform([[0.2 / SIGMA, -0.1 / SIGMA]]))
    assert it.fed[0].tolist() == pytest.approx([0.870265, 0.124377], abs=1e-6) and torch.equal(it.record, it.fed)
    assert it.logp.item() == pytest.approx(-0.344353, abs=1e-6) and it.shown.tolist() == [0] and it.closes.tolist() == [False]
    assert torch.equal(thought().fed, soft_tokens.mean_thought(OLD, E, args())) and thought().logp.item() == 0


@pytest.mark.parametrize("sigma, value, gradient", [
    (SIGMA, -0.029490, [0.247859, -0.147203, -0.100656]),
    (SIGMA * 2**0.5, -0.014745, [0.123930, -0.073602, -0.050328]),  # from the norm of rows: another method
])  # fmt: skip
def test_worked_density(sigma, value, gradient):
    fed, z = torch.tensor([[0.870265, 0.124377]], dtype=torch.float64), NEW.clone().requires_grad_()
    logp = soft_tokens.thought_logp(fed, z, E, sigma, args())
    logp.backward()
    assert logp.item() == pytest.approx(value, abs=1e-6) and z.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_worked_advantages():
    """Rewards of Eq. 11; and with 1, 0.1 and 0 in their place a hundredth of it."""
    rewards = torch.tensor([[100.0, 10, 0, 100]])
    adv = soft_tokens.advantages(rewards, args())
    torch.testing.assert_close(adv, torch.tensor([[63.333333, -56.666667, -70, 63.333333]]), rtol=0, atol=1e-5)
    torch.testing.assert_close(soft_tokens.advantages(rewards / 100, args()), adv / 100)


def test_on_policy_it_is_rloo():
    """The same gradient where the ratio is 1: -1/B sum_i A_i sum_t log pi."""
    _, old_logp, adv, mask = example()
    gradients = []
    for script in (rloo, soft_tokens):
        logp = old_logp.clone().requires_grad_()
        own = (old_logp,) if script is rloo else ()
        objective, _ = script.surrogate(logp, *own, adv, mask, script.Args())
        gradients += torch.autograd.grad(-(objective * script.token_weights(mask, script.Args())).sum(), logp)
    assert torch.equal(*gradients) and torch.equal(gradients[0][0], torch.full((4,), -0.5))
    assert soft_tokens.token_weights(mask, args()).sum(1).tolist() == [2, 1]  # of two completions, a token each as one


def test_the_noise_is_normal():
    """Of its numbers are the mean 0 and the deviation sigma, in every channel; and no uniform number makes an infinite one."""
    u = torch.rand(20000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = thought(OLD.expand(20000, 3), u).fed - thought().fed
    assert noise.mean(0).abs().max() < 0.01 and (noise.std(0) - SIGMA).abs().max() < 0.005
    assert noise.T.corrcoef()[0, 1].abs() < 0.02
    ends = thought(OLD, torch.tensor([[0.0, 1.0]]))
    assert ends.fed.isfinite().all() and ends.logp.isfinite().all()


def test_fuzzy_is_nearly_one_token():
    """And moves by nothing but near ties."""
    for cot, wanted in (("soft", 0.705385), ("fuzzy", 1.0)):
        assert soft_tokens.mean_thought(OLD, torch.eye(3).double(), args(cot=cot))[0, 0].item() == pytest.approx(
            wanted, abs=1e-6
        )
    assert torch.equal(soft_tokens.mean_thought(OLD, E, args(tau=0.5)), soft_tokens.mean_thought(OLD, E, args()))
    fed = torch.tensor([[0.9, 0.3]], dtype=torch.float64)
    for z, moves in (([1.0, 0.5, -0.5], False), ([1.0, 0.99995, -0.5], True)):
        z = torch.tensor([z], dtype=torch.float64).requires_grad_()
        soft_tokens.thought_logp(fed, z, E, SIGMA, args(cot="fuzzy")).backward()
        assert z.grad.isfinite().all() and (z.grad.abs().max() > 1).item() == moves


def test_nothing_is_drawn_of_what_closes():
    u = uniform([[0.3, -0.4]])
    assert thought(u=u).logp.item() != 0
    closed = thought(u=u, closing=torch.tensor([2, 0]))
    assert closed.closes.tolist() == [True] and closed.logp.item() == 0


# ---------------------------------------------------------------- rollout and training pass


def begin(dtype="float32"):
    """args, tokenizer, policy, task, sigma of the default's start."""
    a = args(task="chain:slips", dtype=dtype, group_size=8, max_new_tokens=28, micro_batch_tokens=256, thoughts=7, marker="",
             prefill="", gradient_checkpointing=False, minibatches=1)  # fmt: skip
    tokenizer = models.load_tokenizer(a)
    policy, task = models.load(a, torch.device("cpu")), tasks.load(a.task, tokenizer)
    sigma = soft_tokens.deviation(policy.lm.get_input_embeddings().weight, a)
    return SimpleNamespace(args=a, tokenizer=tokenizer, task=task, policy=policy, sigma=sigma)


def sampled(start, prompts=16, **changes):
    """-> batch, args, what the engine's generate() gave, replay with args and sigma."""
    a = args(**vars(start.args) | changes)
    sigma = soft_tokens.deviation(start.policy.lm.get_input_embeddings().weight, a)
    engine = soft_tokens.make_engine(start.policy, start.tokenizer, a, sigma)
    batch, said = heard(engine, scorer, start, prompts, a)
    return batch, a, said, lambda mb, args: soft_tokens.replay(mb, args, sigma)


@pytest.fixture(scope="module")
def start():
    return begin()


@pytest.fixture(scope="module")
def rolled(start):
    return sampled(start)


def test_the_training_pass_finds_what_the_rollout_drew(start, rolled):
    """A density is a hundred squares over sigma^2, so that it has fewer digits than a token's log-prob."""
    batch, a, _, how = rolled
    soft = batch.columns["given"][:, :, 0] > 0
    assert soft.shape == (128, 9) and soft[:, :7].float().mean() > 0.99 and not soft[:, 7:].any()
    logp, entropy = read(start.policy, batch, a, how=how)
    gap = (logp - batch.sampler_logp).abs()
    assert gap[batch.mask & ~soft].max() < 5e-5 and gap[soft].max() < 2e-3 and gap[soft].mean() < 1e-5
    assert (entropy[batch.mask] >= 0).all() and -70 < logp[soft].mean() < -40  # half the number of channels
    plain, plain_entropy = read(start.policy, batch, a)
    assert ((plain - batch.sampler_logp).abs() * batch.mask)[:, 7].max() > 1e-3  # the answer hangs on what was fed
    torch.testing.assert_close(entropy[:, 0], plain_entropy[:, 0], rtol=1e-4, atol=1e-5)


def test_in_float64_it_is_the_same_number():
    batch, a, said, how = sampled(start := begin("float64"))
    soft = batch.columns["given"][:, :, 0] > 0
    wanted = torch.nn.utils.rnn.pad_sequence([torch.tensor(p, dtype=torch.float64) for _, p, _ in said], batch_first=True)
    logp, _ = read(start.policy, batch, a, how=how)
    assert logp.dtype == torch.float64 and soft.sum() > 880
    assert (logp - wanted)[soft].abs().max() < 1e-9 and (logp - wanted)[batch.mask].abs().max() < 5e-6


def test_a_stored_number_changes_what_follows(start, rolled):
    """Its own density and all that comes later, nothing before, no other row."""
    batch, a, _, how = rolled
    given, i, t = batch.columns["given"], 5, 3
    before, _ = read(start.policy, batch, a, how=how)
    batch.columns["given"] = given.clone()
    batch.columns["given"][i, t, 2 + 40] += 0.05
    after, _ = read(start.policy, batch, a, how=how)
    batch.columns["given"] = given
    changed = after != before
    assert changed[i, t] and changed[i, t + 1 : 7].all() and not changed[i, :t].any()
    changed[i] = False
    assert not changed.any()


def test_a_shared_prompt_changes_nothing(start, rolled):
    """Read once for its rows, or row by row."""
    batch, a, _, how = rolled
    rows = torch.arange(16)
    together, _ = read(start.policy, batch, a, rows, how=how)
    alone, _ = read(start.policy, batch, args(**vars(a) | dict(micro_batch_tokens=1)), rows, how=how)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)


def gradient(start, batch, how, a, where=None):
    """Of the policy's embeddings by the log-probs at these places of eight rows."""
    mb = batch.take(torch.arange(8))
    logp, _ = start.policy(mb.ids, mb.attention_mask, mb.mask, 1.0, **how(mb, a))
    return torch.autograd.grad(logp[:, where or slice(None)].sum(), start.policy.lm.get_input_embeddings().weight)[0]


def test_what_is_fed_has_no_gradient(start, rolled):
    """It is what was stored; and the embeddings that are mixed have a gradient by --grad-emb only."""
    batch, a, _, how = rolled
    mb = batch.take(torch.arange(8))
    told = how(mb, a)
    where, make = told["thoughts"]
    made = make(start.policy.lm.get_input_embeddings())
    assert not made.requires_grad and torch.equal(made, mb.columns["given"][where][:, 2:])
    plain, mixed = (gradient(start, batch, how, args(**vars(a) | dict(grad_emb=on)), slice(0, 7)) for on in (False, True))
    assert plain.any() and (mixed - plain).abs().max() > 1


def test_every_flag_changes_what_is_sampled_or_how_it_is_read(start, rolled):
    batch, _, said, _ = rolled
    given = batch.columns["given"]
    for changes in (dict(tau=1.0), dict(noise_scale=1.0), dict(cot="fuzzy"), dict(cot="hard"), dict(thoughts=3)):
        other = sampled(start, **changes)[0].columns["given"]
        assert other.shape != given.shape or not torch.equal(other, given), changes
    for changes in (dict(prefill="12"), dict(marker="7")):
        assert [x[0] for x in sampled(start, **changes)[2]] != [x[0] for x in said], changes


def test_a_marker_closes_and_what_follows_is_fed(start):
    """At its first token the thinking ends and the others follow, then the prefill; all of it follows the last thought. None of
    that is trained, and of what closes nothing was drawn: its log-prob is 0 and has no gradient."""
    batch, a, said, how = sampled(start, thoughts=4, marker="7*", prefill="5")
    seven, star, five = start.tokenizer("7*5")["input_ids"]
    given, seen, closing = batch.columns["given"], set(), torch.zeros_like(batch.mask)
    for i, (y, p, _) in enumerate(said):
        n = int(given[i, :, 0].sum())
        early = n < 4
        more, first = ([star, five], n + 1) if early else ([seven, star, five], n)
        seen.add(early)
        assert y[first : first + len(more)] == more and (not early or y[n] == seven and p[n] == 0)
        assert (batch.mask[i] & ~batch.trained[i]).nonzero()[:, 0].tolist() == list(range(first, first + len(more)))
        closing[i, n] = early
    assert seen == {True, False}
    logp, _ = read(start.policy, batch, a, how=how)
    assert not logp[closing].any() and ((logp - batch.sampler_logp).abs() * batch.trained).max() < 2e-3
    i = int(closing[:8].any(1).nonzero()[0])
    mb = batch.take(torch.tensor([i]))
    logp, _ = start.policy(mb.ids, mb.attention_mask, mb.mask, 1.0, **how(mb, a))
    grads = torch.autograd.grad(logp[closing[i : i + 1, : logp.shape[1]]].sum(), start.policy.lm.model.norm.weight)
    assert not grads[0].any()


def test_the_reading_in_tokens_is_the_plain_engine_s(start):
    """readings(): of the same policy; afterwards thoughts are what they were."""
    a = args(**vars(start.args) | dict(eval_prompts=24, eval_samples=4))
    plain = rollout.evaluate(engines.HF(start.policy, start.tokenizer), scorer, start.tokenizer, start.task, a)
    for cot in ("soft", "hard"):
        a.cot = cot
        engine = soft_tokens.make_engine(start.policy, start.tokenizer, a, start.sigma)
        found = soft_tokens.readings(engine, partial(rollout.evaluate, engine, scorer, start.tokenizer, start.task, a))
        assert engine.on and engine.most == (7 if cot == "soft" else 0)
        assert found["discrete_accuracy"] == plain["greedy_accuracy"]
        assert all(found[f"discrete_{k}"] == plain[k] for k in ("avg@4", "pass@4")) and found["prompts"] == 24
        assert (found["avg@4"] == plain["avg@4"]) == (cot == "hard") and "discrete_prompts" not in found


def test_two_gradients_make_the_whole(start, rolled):
    """The norms that are logged are those of the loss cut in two; nothing is left behind."""
    batch, a, _, how = rolled
    batch = dataclasses.replace(batch, adv=torch.randn(128, 1, generator=torch.Generator().manual_seed(0)).expand(128, 9))
    assert batch.mask.shape == (128, 9)
    batch.policy_version.fill_(10)
    meter, parts = Meter(), []
    soft_tokens.measure(meter, start.policy, batch, a, how)
    found = meter.result()
    assert "part" not in batch.columns and all(p.grad is None for p in start.policy.parameters())
    soft = batch.columns["given"][:, :, 0] > 0
    weights = list(start.policy.parameters())
    mb, now = batch.take(torch.arange(128)), how
    for where in (soft, ~soft):
        logp, _ = start.policy(mb.ids, mb.attention_mask, mb.mask, 1.0, **now(mb, a))
        loss = (logp * mb.adv)[where & batch.mask].sum() / 128
        parts.append(torch.nn.utils.get_total_norm(torch.autograd.grad(loss, weights)).item())
    assert [found["thought_grad_norm"], found["token_grad_norm"]] == pytest.approx(parts, rel=1e-3) and parts[0] > parts[1] > 0
    _, entropy = read(start.policy, batch, a, how=how)
    assert found["thought_entropy"] == pytest.approx(entropy[soft].mean().item(), rel=1e-4)
    assert found["token_entropy"] == pytest.approx(entropy[batch.mask & ~soft].mean().item(), rel=1e-4)
    batch.policy_version.fill_(11)
    soft_tokens.measure(later := Meter(), start.policy, batch, a, how)
    assert later.result() == {}


# ---------------------------------------------------------------- runs


def finished(tmp_path, name, *argv, script=SCRIPT, before=None):
    done = run(tmp_path, *SMALL, *argv, "--run-dir", tmp_path / name, script=script, before=before)
    assert done.code == 0, done.err
    return lines(tmp_path / name / "metrics.jsonl"), lines(tmp_path / name / "evals.jsonl")


def on_policy_rloo(tmp_path):
    """rloo.py with the objective that is its own where the ratio is 1 -> its path."""
    own, base = (parts.chunks(path.read_text()) for path in (SCRIPT, SCRIPT.with_name("rloo.py")))
    base |= {name: own[name] for name in ("surrogate", "token_weights")}
    base["train"] = base["train"].replace("surrogate(logp, mb.old_logp, mb.adv", "surrogate(logp, mb.adv")
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "rloo.py").write_text("".join(base.values()))
    return tmp_path / "algos" / "rloo.py"


def test_hard_thoughts_and_none_are_rloo(tmp_path):
    """Bit for bit with that objective: metrics, evaluations, weights. (In a run rloo.py's own ratio is 1 but for rounding.)"""
    like = ("--task", "chain:slips", "--lr", 3e-4, "--minibatches", 1, "--warmup-steps", 20, "--lr-schedule", "cosine")
    base, told = finished(tmp_path, "rloo", *like, script=on_policy_rloo(tmp_path))
    weights = (checkpoints(tmp_path / "rloo")[-1] / "model.safetensors").read_bytes()
    for name, flags in dict(hard=("--cot", "hard"), none=("--thoughts", 0)).items():
        rows, evals = finished(tmp_path, name, *flags)
        for mine, theirs in zip(rows + evals, base + told, strict=True):
            kept = [k for k in theirs if not k.startswith("time/")]
            assert {k: mine[k] for k in kept} == {k: theirs[k] for k in kept}
        assert (checkpoints(tmp_path / name)[-1] / "model.safetensors").read_bytes() == weights
        assert all(e["greedy_accuracy"] == e["discrete_accuracy"] for e in evals)


def test_what_a_run_logs(tmp_path):
    """The reference is read with the thoughts; the state keeps sigma; a right completion earns nothing by its format."""
    rows, evals = finished(tmp_path, "it", "--beta", 0.1)
    one, two = rows
    assert one["ref_kl"] == 0 and two["ref_kl"] != 0 and one["sampler_gap"] < 1e-5 and one["reward"] == one["accuracy"]
    assert one["thought_grad_norm"] > 2 * one["token_grad_norm"] > 0 and "thought_grad_norm" not in two
    assert one["grad_norm"] < one["thought_grad_norm"] + one["token_grad_norm"]
    assert 0.1 < one["thought_entropy"] < 0.5 and 0 < one["token_entropy"] < 0.5
    assert {"greedy_accuracy", "discrete_accuracy", "prompts", "step"} == set(evals[0])
    state = contents(checkpoints(tmp_path / "it")[-1])["state"]
    a = SimpleNamespace(model="tiny", task="chain:slips", dtype="float32", lora_rank=0, gradient_checkpointing=False, seed=1)
    weight = models.load(a, torch.device("cpu")).lm.get_input_embeddings().weight
    assert state["sigma"] == soft_tokens.deviation(weight, args()) > 0.03


def test_rewards_have_three_grades(tmp_path, monkeypatch):
    """Eq. 11: where every completion is well formed a wrong one has a tenth, and a right one no more than 1."""
    monkeypatch.setattr(rollout, "has_format", lambda text: True)
    small = dict(steps=1, prompts_per_step=8, eval_prompts=4)
    soft_tokens.train(args(run_dir=str(tmp_path / "run"), **small))
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert 0 < row["accuracy"] < 1 and row["reward"] == pytest.approx(row["accuracy"] + 0.1 * (1 - row["accuracy"]), abs=1e-6)


def test_what_is_refused(start):
    def replace(**changes):
        return dataclasses.replace(settings.resolve(args())[0], **changes)

    with pytest.raises(UserError, match="embeddings fed while decoding"):
        settings._check(replace(engine="vllm"))
    with pytest.raises(UserError, match="--tau must be above 0"):
        settings._check(replace(tau=0.0))
    with pytest.raises(UserError, match="--marker, --prefill: the tokenizer does not know the character '<'"):
        soft_tokens.make_engine(start.policy, start.tokenizer, args(marker="</think>", prefill=""), 1.0)
