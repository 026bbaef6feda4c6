"""SofT-GRPO's worked numbers, what a thought draws and drops, that the training pass feeds it again, limits, runs."""

from types import SimpleNamespace

import pytest
import torch

from algos import soft_grpo
from common import UserError, engines, models, rollout, settings, tasks
from common.batch import Meter, read
from tests.batches import chain_scorer as scorer
from tests.batches import heard
from tests.helpers import ROOT, checkpoints, lines, run

CLOSE = dict(rtol=0, atol=1e-6)
SCRIPT = ROOT / "algos" / "soft_grpo.py"
SMALL = "--steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
OLD, NEW = (torch.tensor([z], dtype=torch.float64) for z in ([2, 1, -2.5, -4], [1.5, 1.4, -2.5, -4]))
NOISE = torch.tensor([[0.3, -0.5, 1.2]], dtype=torch.float64)
EYE = torch.nn.Embedding.from_pretrained(torch.eye(4, dtype=torch.float64))
NONE = torch.tensor([], dtype=torch.int64)


def args(**changes):
    return soft_grpo.Args(**dict(top_k=3, top_p=1.0) | changes)


def numbers(x):
    """The uniform numbers whose Gumbel noise is x."""
    return (-(-x).exp()).exp()


def thought(z=OLD, x=NOISE, closing=NONE, embedding=EYE, **changes):
    """-> SimpleNamespace of what think() gives."""
    found = soft_grpo.think(z, embedding, None if x is None else numbers(x), closing, args(**changes))
    return SimpleNamespace(**dict(zip(("fed", "shown", "record", "logp", "closes"), found)))


# ---------------------------------------------------------------- a thought and its density


def test_worked_thought():
    g = [-0.021349, -1.821346, -3.621226]
    it = thought()
    assert it.record[0].tolist() == pytest.approx([0, 1, 2, *g], abs=1e-6) and it.shown.tolist() == [0]
    x, logp, kept = soft_grpo.noise(it.record, OLD)
    torch.testing.assert_close(x, NOISE, **CLOSE)
    assert logp[0].tolist() == pytest.approx([-0.321349, -1.321346, -4.821226], abs=1e-6) and kept.all()
    assert it.fed[0].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)
    assert thought(tau_g=1.0).fed[0].tolist() == pytest.approx([0.838486, 0.138601, 0.022913, 0], abs=1e-6)


@pytest.mark.parametrize("agg, old, new, ratio, gradient", [
    ("mean", -1.094770, -1.502096, 0.665427, [-0.404921, 0.409481, -0.004560, 0]),
    ("sum", -3.690734, -4.392895, 0.495513, [-0.437157, 0.759952, -0.322796, 0]),
])  # fmt: skip
def test_worked_densities(agg, old, new, ratio, gradient):
    a, record, z = args(logp_agg=agg), thought().record, NEW.clone().requires_grad_()
    old_logp, logp = soft_grpo.thought_logp(record, OLD, a), soft_grpo.thought_logp(record, z, a)
    assert [old_logp.item(), logp.item()] == pytest.approx([old, new], abs=1e-6) and thought(logp_agg=agg).logp == old_logp
    one = torch.ones(1, 1, dtype=torch.float64)
    objective, _ = soft_grpo.surrogate(logp[None], old_logp[None], one, one.bool(), a)
    loss = -(objective * soft_grpo.token_weights(one.bool(), a)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(-ratio, abs=1e-6) and z.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_worked_entries():
    """f of the single entries, each as the only one of a top-1 density would be: -x - e^-x."""
    f = [-NOISE - (-NOISE).exp()][0][0]
    assert f.tolist() == pytest.approx([-1.040818, -1.148721, -1.501194], abs=1e-6)
    assert thought(logp_agg="sum").logp.item() == pytest.approx(f.sum().item(), abs=1e-6)
    assert thought().logp.item() == pytest.approx(f[:2].mean().item(), abs=1e-6)  # log p of the third is below -3


def test_the_noise_of_the_rollout_is_bounded():
    """Numbers next to 0 and 1, and 0 itself; None is no noise."""
    z = torch.zeros(1, 4)
    u = torch.tensor([[0.0, 0.5, 1 - 2.0**-53, 1e-300]], dtype=torch.float64)
    fed, shown, record, logp, _ = soft_grpo.think(z, EYE.float(), u, NONE, args(top_k=4))
    order = record[0, :4].long().argsort()
    x, _, _ = soft_grpo.noise(record, z)
    assert x[0].tolist() == pytest.approx([-1.5, 0.366513, 3.0, -1.5], abs=1e-5) and fed.isfinite().all() and logp.isfinite()
    assert shown == record[0, 2].long() and len(order.unique()) == 4
    EYE.double()
    still = thought(x=None)
    torch.testing.assert_close(still.record[0, 3:], (OLD[0, :3].softmax(0) + 1e-6).log())
    torch.testing.assert_close(thought(x=None, tau_g=1.0).fed[0, :3], OLD[0, :3].softmax(0), rtol=0, atol=2e-6)


def test_shown_tokens_are_samples_of_p():
    """Gumbel's maximum; the clamp moves a little."""
    u = torch.rand(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = torch.tensor([[1.0, 0.5, 0, -9]], dtype=torch.float64)
    _, shown, record, _, _ = soft_grpo.think(z.expand(20_000, 4), EYE, u, NONE, args())
    share = torch.bincount(shown, minlength=4) / 20_000
    torch.testing.assert_close(share[:3], z[0, :3].softmax(0).float(), rtol=0, atol=0.03)
    assert share[3] == 0
    slope = z.expand(20_000, 4).clone().requires_grad_()
    soft_grpo.thought_logp(record, slope, args()).sum().backward()
    assert slope.grad.mean(0).abs().max() < 0.01  # the score's mean is 0


def test_dropped_entries_count_for_nothing():
    """Neither in what is fed, nor in a density, whatever its logit becomes; and no gradient is NaN."""
    z = torch.tensor([[2.0, 1.9, -1, -2]], dtype=torch.float64)
    for agg in ("mean", "sum"):
        a = args(top_k=4, top_p=0.9, logp_agg=agg)
        _, shown, record, logp, _ = soft_grpo.think(z, EYE, numbers(torch.tensor([[0.1, 0.4, 3, 3]]).double()), NONE, a)
        assert (record[0, 4:] > -1e29).tolist() == [True, True, False, False] and shown == 1
        x = torch.tensor([0.1, 0.4], dtype=torch.float64)
        f = -x - (-x).exp()
        assert logp.item() == pytest.approx((f.sum() if agg == "sum" else f.mean()).item(), abs=1e-6)
        for far in (-2.0, 30.0, -1e4, 1e4):
            other = z.clone()
            other[0, 2:] = far
            other.requires_grad_()
            again = soft_grpo.thought_logp(record, other, a)
            again.sum().backward()
            assert again.item() == pytest.approx(logp.item(), abs=1e-12)
            assert other.grad.isfinite().all() and not other.grad[0, 2:].any() and other.grad[0, :2].any()
    mixed = soft_grpo.mixture(EYE, record, args(top_k=4, tau_g=1.0))
    assert not mixed[0, 2:].any() and mixed.sum().item() == pytest.approx(1)


def test_top_p_keeps_what_makes_it_up():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    for top_p, n in ((0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        it = thought(z, torch.zeros(1, 4), top_k=4, top_p=top_p)
        assert (it.record[0, 4:] > -1e29).sum() == n
    assert (thought(z, torch.zeros(1, 2), top_k=2).record[0, 2:].exp() - torch.tensor([0.625, 0.375])).abs().max() < 2e-6


def test_the_released_density_is_masked_and_clamped():
    """An entry with log p below -3 today counts in neither sum nor number; a noise beyond the bounds has no gradient."""
    record = thought().record
    for agg, silent in (("mean", True), ("sum", False)):
        z = torch.tensor([[9.0, -4, 0, 0]], dtype=torch.float64).requires_grad_()  # of the first alone is log p above -3
        value = soft_grpo.thought_logp(record, z, args(logp_agg=agg))
        value.sum().backward()
        assert value.isfinite() and z.grad.isfinite().all()
        if silent:
            x = record[0, 3] - z.detach()[0, :3].softmax(0)[0].log()
            assert value.item() == pytest.approx((-x - (-x).exp()).item(), abs=1e-5)
    z = torch.zeros(1, 2).double()
    high, x = thought(z, torch.tensor([[5.0, -5.0]]), top_k=2), torch.tensor([3.0, -1.5])
    assert high.logp.item() == pytest.approx((-x - (-x).exp()).mean().item(), abs=3e-3)
    for shift in (-1e-5, 0, 1e-5):  # noise that the rollout clamped lies on a bound, give or take rounding
        for agg in ("mean", "sum"):
            z = torch.zeros(1, 2).double().requires_grad_()
            soft_grpo.thought_logp(high.record + torch.tensor([0, 0, shift, shift]), z, args(top_k=2, logp_agg=agg)).backward()
            assert z.grad.all() if agg == "sum" else not z.grad.any()


def test_a_token_that_closes_is_a_token():
    it = thought(closing=torch.tensor([3, 0]))
    assert it.closes.tolist() == [True] and it.logp.item() == pytest.approx(OLD.log_softmax(-1)[0, 0].item(), abs=1e-12)
    assert thought(closing=torch.tensor([1])).closes.tolist() == [False]
    assert thought(x=NOISE.flip(1) * 3, closing=torch.tensor([1])).shown.tolist() == [0]
    assert thought(x=torch.tensor([[-1.4, 2.0, 0]]), closing=torch.tensor([1])).closes.tolist() == [True]


def test_one_entry_is_no_choice():
    """Top-1: the likeliest token's own embedding, and a density that no policy changes: the ratio is exactly 1."""
    g = torch.Generator().manual_seed(0)
    embedding = torch.nn.Embedding(40, 6)
    z, other = (3 * torch.randn(50, 40, generator=g) for _ in range(2))
    for agg in ("mean", "sum"):
        a = args(top_k=1, tau_g=1e-3, logp_agg=agg)
        fed, shown, record, logp, _ = soft_grpo.think(z, embedding, torch.rand(50, 1, generator=g).double(), NONE, a)
        assert torch.equal(shown, z.argmax(-1)) and torch.equal(fed, embedding(shown))
        assert torch.equal(soft_grpo.thought_logp(record, other, a), logp)


# ---------------------------------------------------------------- rollout and training pass


def begin(dtype="float32"):
    """args, tokenizer, policy, task of the default's start."""
    a = soft_grpo.Args(task="chain:slips", dtype=dtype, group_size=8, max_new_tokens=28, micro_batch_tokens=256, thoughts=7,
                       marker="", gradient_checkpointing=False)  # fmt: skip
    tokenizer = models.load_tokenizer(a)
    return SimpleNamespace(
        args=a, tokenizer=tokenizer, task=tasks.load(a.task, tokenizer), policy=models.load(a, torch.device("cpu"))
    )


def sampled(start, prompts=16, **changes):
    """-> batch, args, what the engine's generate() gave, the engine."""
    a = soft_grpo.Args(**vars(start.args) | changes)
    engine = soft_grpo.make_engine(start.policy, start.tokenizer, a)
    batch, said = heard(engine, scorer, start, prompts, a)
    return batch, a, said, engine


@pytest.fixture(scope="module")
def start():
    return begin()


@pytest.fixture(scope="module")
def rolled(start):
    return sampled(start)


def test_the_training_pass_finds_what_the_rollout_drew(start, rolled):
    batch, a, _, _ = rolled
    thought = batch.columns["given"][:, :, 0] > 0
    assert len(batch.ids) == 128 and thought[:, :7].float().mean() > 0.99 and not thought[:, 7:].any()
    for agg in ("mean", "sum"):
        here, a = (batch, a) if agg == "mean" else sampled(start, logp_agg=agg)[:2]
        logp, entropy, *more = read(start.policy, here, a, how=soft_grpo.replay)
        assert ((logp - here.sampler_logp).abs() * here.mask).max() < 5e-5
        assert (entropy[here.mask] >= 0).all() and len(more) == 4
    plain, _ = read(start.policy, batch, a)
    assert ((plain - batch.sampler_logp).abs() * batch.mask)[:, 7].max() > 1e-3  # the answer hangs on what was fed


def test_in_float64_it_is_the_same_number():
    batch, a, said, _ = sampled(start := begin("float64"))
    thought = batch.columns["given"][:, :, 0] > 0
    wanted = torch.nn.utils.rnn.pad_sequence([torch.tensor(p, dtype=torch.float64) for _, p, _ in said], batch_first=True)
    logp, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
    assert logp.dtype == torch.float64 and thought.sum() > 800
    assert (logp - wanted)[thought].abs().max() < 1e-9 and (logp - wanted)[batch.mask].abs().max() < 5e-6


def test_a_stored_number_changes_what_follows(start, rolled):
    """Of a thought with several entries: its own density and all that comes later, nothing before, no other row."""
    batch, a, _, _ = rolled
    given, t = batch.columns["given"], 3
    i = int((given[:, t, 2 + 5 + 1] > -1e29).nonzero()[0])
    before, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
    batch.columns["given"] = given.clone()
    batch.columns["given"][i, t, 2 + 5 + 1] = given[i, t, 2 + 5] + 0.01
    after, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
    batch.columns["given"] = given
    changed = (after - before).abs() > 1e-7
    assert changed[i, t] and changed[i, t + 1 : 8].any() and not changed[i, :t].any()
    changed[i] = False
    assert not changed.any()


def test_a_shared_prompt_changes_nothing(start, rolled):
    """Read once for its rows, or row by row."""
    batch, a, _, _ = rolled
    rows = torch.arange(16)
    together, *_ = read(start.policy, batch, a, rows, how=soft_grpo.replay)
    alone, *_ = read(start.policy, batch, soft_grpo.Args(**vars(a) | dict(micro_batch_tokens=1)), rows, how=soft_grpo.replay)
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)


def test_what_is_fed_has_no_gradient(start, rolled):
    """The same as if the mixtures were constants; embeddings learn through the head and the tokens that are fed."""
    batch, a, _, _ = rolled
    mb = batch.take(torch.arange(8))
    weight, gradients = start.policy.lm.get_input_embeddings().weight, []
    how = soft_grpo.replay(mb, a)
    where, make = how["thoughts"]
    with torch.no_grad():
        fixed = make(start.policy.lm.get_input_embeddings())
    for one in (make, lambda embedding: fixed):
        logp, *_ = start.policy(mb.ids, mb.attention_mask, mb.mask, a.temperature, **how | dict(thoughts=(where, one)))
        gradients.append(torch.autograd.grad((logp * mb.mask).sum(), weight)[0])
    assert torch.equal(*gradients) and gradients[0].any()


def test_one_likeliest_entry_is_greedy_thinking(start):
    """Whatever the noise, the shown tokens are those of the plain engine's greedy decoding, the end among them."""
    batch, a, said, engine = sampled(start, prompts=6, top_k=1, tau_g=1e-3, thoughts=28)
    prefixes = [e.ids for e in start.task.train[:6]]
    greedy = engines.HF(start.policy, start.tokenizer).generate(prefixes, 1, 28, 0.0, [0] * 6)
    assert [(y, done) for y, _, done in said] == [(y, done) for y, _, done in greedy for _ in range(8)]
    logp, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
    thought = batch.columns["given"][:, :, 0] > 0
    assert thought.sum(1).tolist() == [len(y) - 1 for y, _, _ in said]  # the end is a token
    with torch.no_grad():
        before = [p.clone() for p in start.policy.parameters()]
        for p in start.policy.parameters():
            p.mul_(0.5)
        moved, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
        for p, q in zip(start.policy.parameters(), before):
            p.copy_(q)
    assert torch.equal(moved[thought], logp[thought]) and (moved - logp)[batch.mask & ~thought].abs().max() > 1e-3


def test_every_flag_changes_what_is_sampled_or_how_it_is_read(start, rolled):
    batch, a, said, _ = rolled
    logp, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
    for changes in (dict(top_k=2), dict(top_p=0.5), dict(tau_g=1.0), dict(thoughts=3), dict(marker="0")):
        assert [x[0] for x in sampled(start, **changes)[2]] != [x[0] for x in said], changes
    summed, *_ = read(start.policy, batch, soft_grpo.Args(**vars(a) | dict(logp_agg="sum")), how=soft_grpo.replay)
    assert (summed - logp).abs().max() > 0.1


def test_a_marker_closes_and_its_rest_is_fed(start):
    """Its first token ends the thinking and the others follow; all follow the last thought. What follows is not trained."""
    batch, a, said, _ = sampled(start, thoughts=4, marker="7*")
    seven, star = start.tokenizer("7*")["input_ids"]
    given, T = batch.columns["given"], batch.mask.shape[1]
    seen = set()
    for i, (y, *_) in enumerate(said):
        n = int(given[i, :, 0].sum())
        early = seven in y[:4] and y.index(seven) == n
        more, first = ([star], n + 1) if early else ([seven, star], n)
        seen.add(early)
        assert (early or n == 4) and y[first : first + len(more)] == more
        assert (batch.mask[i] & ~batch.trained[i]).nonzero()[:, 0].tolist() == list(range(first, first + len(more)))
    assert seen == {True, False}
    logp, *_ = read(start.policy, batch, a, how=soft_grpo.replay)
    assert ((logp - batch.sampler_logp).abs() * batch.trained).max() < 5e-5 and T > 8


def test_the_reading_in_tokens_is_the_plain_engine_s(start):
    """readings(): of the same policy, and the thoughts are back on afterwards."""
    a = soft_grpo.Args(**vars(start.args) | dict(eval_prompts=24, eval_samples=4))
    engine = soft_grpo.make_engine(start.policy, start.tokenizer, a)
    plain = rollout.evaluate(engines.HF(start.policy, start.tokenizer), scorer, start.tokenizer, start.task, a)
    found = soft_grpo.readings(engine, lambda: rollout.evaluate(engine, scorer, start.tokenizer, start.task, a))
    assert list(found) == [
        "greedy_accuracy", "avg@4", "pass@4", "prompts", "discrete_accuracy", "discrete_avg@4", "discrete_pass@4"
    ]  # fmt: skip
    assert engine.on and found["discrete_accuracy"] == plain["greedy_accuracy"] and found["prompts"] == 24
    assert all(found[f"discrete_{k}"] == plain[k] for k in ("avg@4", "pass@4")) and found["avg@4"] != plain["avg@4"]


def test_what_is_measured():
    record = thought(tau_g=1.0).record
    weight, entropy, bound, entries = soft_grpo.seen(record, OLD, args(tau_g=1.0))
    p = OLD[0, :3].softmax(0)
    assert weight.item() == pytest.approx(0.838486, abs=1e-6)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
    assert bound.item() == 0 and entries.item() == 3
    high = thought(torch.zeros(1, 4).double(), torch.tensor([[5.0, -5, 0, 0]]), top_k=4)
    assert soft_grpo.seen(high.record, torch.zeros(1, 4).double(), args(top_k=4))[2].item() == 0.5
    given = torch.tensor([[[1.0, 5], [1, 6], [0, 7]]])
    mb = SimpleNamespace(columns=dict(given=given), trained=torch.ones(1, 3).bool(), old_logp=torch.zeros(1, 3))
    meter = Meter()
    stats = dict(clip_fraction=torch.tensor([[1.0, 0, 1]]))
    soft_grpo.measure(meter, mb, torch.tensor([[0.2, -0.4, 0.9]]), stats, [torch.tensor([[k, k, 99.0]]) for k in range(1, 5)])
    wanted = dict(clip_fraction_thoughts=0.5, clip_fraction_tokens=1, log_ratio_thoughts=0.3, log_ratio_tokens=0.9)
    wanted |= dict(thought_weight=1, thought_entropy=2, noise_clamped=3, thought_entries=4)
    assert meter.result() == pytest.approx(wanted)


# ---------------------------------------------------------------- runs


def finished(tmp_path, name, *argv, script=SCRIPT):
    done = run(tmp_path, *SMALL, *argv, "--run-dir", tmp_path / name, script=script)
    assert done.code == 0, done.err
    return lines(tmp_path / name / "metrics.jsonl"), lines(tmp_path / name / "evals.jsonl")


def test_what_a_run_logs(tmp_path):
    """And the reference is read with the thoughts: as long as the policy is the reference, the penalty is 0."""
    rows, evals = finished(tmp_path, "it", "--minibatches", 1, "--beta", 0.1)
    one, two = rows
    assert one["ref_kl"] == 0 and two["ref_kl"] > 0 and one["sampler_gap"] < 1e-6 and one["log_ratio_thoughts"] < 1e-6
    assert 0.9 < one["thought_weight"] < 1 and 0 < one["thought_entropy"] < 1 and 1 < one["thought_entries"] < 3
    assert 0.02 < one["noise_clamped"] < 0.15 and one["clip_fraction_thoughts"] == one["clip_fraction_tokens"] == 0
    names = ("greedy_accuracy", "avg@32", "pass@32", "discrete_accuracy", "discrete_avg@32", "discrete_pass@32")
    assert all(0 <= e[name] <= 1 for e in evals for name in names) and evals[0]["avg@32"] < evals[0]["pass@32"]


def test_without_thoughts_it_is_grpo(tmp_path):
    """Bit for bit: metrics, evaluations, weights."""
    rows, evals = finished(tmp_path, "it", "--thoughts", 0)
    base, told = finished(tmp_path, "grpo", "--task", "chain:slips", "--eval-samples", 32, script=ROOT / "algos" / "grpo.py")
    for mine, theirs in zip(rows + evals, base + told, strict=True):
        assert {k: mine[k] for k in theirs if not k.startswith("time/")} == {
            k: v for k, v in theirs.items() if not k.startswith("time/")
        }
    weights = [(checkpoints(tmp_path / name)[-1] / "model.safetensors").read_bytes() for name in ("it", "grpo")]
    assert weights[0] == weights[1]
    assert all(e[k] == e[f"discrete_{k}"] for e in evals for k in ("avg@32", "pass@32"))


def test_what_is_refused(start):
    with pytest.raises(UserError, match="embeddings fed while decoding"):
        settings.resolve(soft_grpo.Args(engine="vllm"))
    with pytest.raises(UserError, match="--marker: the tokenizer does not know the character '<'"):
        soft_grpo.make_engine(start.policy, start.tokenizer, soft_grpo.Args(marker="</think>"))
