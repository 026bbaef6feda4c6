"""CoT2's worked numbers, what is drawn and seen again, its world, CSFT, both evaluations, and what a run leaves."""

import copy
import functools
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from algos import cot2, grpo
from common import UserError, gpu, models, rewards, rollout, settings, tasks
from common.batch import read
from common.engines import HF
from tests.helpers import ROOT, lines, outcome, run, same, user_error

SCRIPT = ROOT / "algos" / "cot2.py"
SMALL = """--steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --eval-samples 2 --width 16
    --csft-steps 30 --csft-batch 24""".split()
WAYS = [dict(), dict(ratio="code"), dict(k=1), dict(sampler="dirichlet"), dict(sampler="dirichlet", gamma=20.0)]
ids = ["-".join(map(str, way.values())) or "mts" for way in WAYS]
each_way = pytest.mark.parametrize("way", WAYS, ids=ids)


def args(**changes):
    return cot2.Args(**dict(max_new_tokens=4, thoughts=3, group_size=8, width=16, micro_batch_tokens=256) | changes)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the objective

OLD, NEW = double([[1.0, 0, -1]]), double([[1.4, -0.2, -0.6]])


def loss_of(record, old, new, adv, a):
    """-> ratio, loss of one step of one completion, and its gradient with respect to the new logits."""
    new = new.clone().requires_grad_()
    logp, old_logp = (cot2.thought_logp(record, z, a)[:, None] for z in (new, old))
    mask = torch.ones(1, 1).bool()
    objective, _ = cot2.surrogate(logp, old_logp.detach(), double([[adv]]), mask, a)
    loss = -(objective * cot2.token_weights(mask, replace(a, max_new_tokens=1))).sum()
    loss.backward()
    return (logp - old_logp).exp().item(), loss.item(), new.grad[0].tolist()


@pytest.mark.parametrize("ratio, value, gradient", [
    ("code", 1.180498, [-0.059373, -0.291894, 0.351267]), ("paper", 1.124124, [-0.278573, -0.169721, 0.448295]),
])  # fmt: skip
def test_worked_mts(ratio, value, gradient):
    a, record = args(k=2, ratio=ratio), double([[0, 2, 0.5, 0.5]])
    found, loss, grad = loss_of(record, OLD, NEW, -1.0, a)
    assert found == pytest.approx(value, abs=1e-6) and loss == pytest.approx(value, abs=1e-6)
    assert grad == pytest.approx(gradient, abs=1e-6)
    _, loss, grad = loss_of(record, OLD, NEW, 1.0, a)
    assert loss == pytest.approx(-1.1, abs=1e-6) and grad == [0, 0, 0]
    _, loss, _ = loss_of(record, OLD, NEW, 1.0, replace(a, eps=0.05))
    assert loss == pytest.approx(-1.05, abs=1e-6)


def test_drawn_twice_counts_twice():
    for ratio, wanted in (("code", 2 * (NEW / 2).log_softmax(-1)[0, 2]), ("paper", NEW.log_softmax(-1)[0, 2])):
        found = cot2.thought_logp(double([[2, 2, 0.5, 0.5]]), NEW, args(k=2, ratio=ratio))
        assert found.item() == pytest.approx(wanted.item(), abs=1e-12)


@pytest.mark.parametrize("gamma, ratio", [(1.0, 0.994522), (20.0, 2.333333)])
def test_worked_dirichlet(gamma, ratio):
    a, record = args(sampler="dirichlet", gamma=gamma), double([[0, 1, 2, 0.6, 0.3, 0.1]])
    new, old = (double([p]).log() for p in ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2]))
    found, loss, grad = loss_of(record, old, new, -1.0, a)
    assert found == pytest.approx(ratio, abs=1e-6) and loss == pytest.approx(max(ratio, 0.9), abs=1e-6)
    # d log f / d a_i = gamma (log x_i - psi(gamma a_i)), through a softmax.
    p, x = double([0.5, 0.3, 0.2]), double([0.6, 0.3, 0.1])
    d = gamma * (x.log() - torch.digamma(gamma * p))
    assert grad == pytest.approx((found * p * (d - (p * d).sum())).tolist(), abs=1e-6)
    # The density is torch's own.
    density = cot2.thought_logp(record, new, a)
    assert density.item() == pytest.approx(torch.distributions.Dirichlet(gamma * p).log_prob(x).item(), abs=1e-9)


def test_a_support_is_the_rollout_s():
    """Tokens of it that have become rarer than 0.001 count as 0.001; others' share is dealt out, whatever it has become."""
    a = args(sampler="dirichlet")
    z = double([[0.9, 0.0999, 1e-4]]).log()
    p = cot2.restricted(z, torch.tensor([[0, 2]]), torch.tensor([[True, True]]))
    torch.testing.assert_close(p, double([[0.9, 1e-3]]) / 0.901)
    p = cot2.restricted(z, torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]]))
    assert p[0, 2] == 0 and p.sum().item() == pytest.approx(1)
    z.requires_grad_()
    cot2.thought_logp(double([[0, 1, 2, 0.7, 0.3, 0.0]]), z, a).backward()
    assert z.grad.isfinite().all() and z.grad[0, :2].abs().min() > 1e-3


def test_worked_csft():
    z, target = double([1.0, 0, -1]).requires_grad_(), double([0.5, 0.5, 0])
    loss = cot2.csft_loss(target, z)
    loss.backward()
    assert loss.item() == pytest.approx(0.214459, abs=1e-6) and loss.item() + math.log(2) == pytest.approx(0.907606, abs=1e-6)
    torch.testing.assert_close(z.grad, z.detach().softmax(0) - target)
    assert cot2.csft_loss(target, target.clamp(min=1e-300).log()).item() == pytest.approx(0, abs=1e-9)


def test_worked_advantages():
    wanted = [1.224745, -0.816497, -0.816497, 1.224745, -0.816497]
    rewards_ = double([[1, 0, 0, 1, 0], [0.1 + 0.2] * 5])
    adv = cot2.advantages(rewards_, args())
    assert adv[0].tolist() == pytest.approx(wanted, abs=1e-6) and not adv[1].any()
    sample = grpo.advantages(rewards_, args())[0]
    torch.testing.assert_close(adv[0], sample * math.sqrt(5 / 4), rtol=1e-5, atol=0)


def test_every_completion_is_divided_by_m():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(cot2.token_weights(mask, args()), mask / 8)


# ---------------------------------------------------------------- the world, and its targets


def test_worked_traces_and_targets():
    assert cot2.traces("D3 D1") == ["S-3 =-2", "S3 =2", "S-3 =-4", "S3 =4"][1::-1] + ["S3 =4", "S-3 =-4"]
    some = [t.split() for t in cot2.traces("D3 D1")]
    assert cot2.targets(some, args()) == [{"S3": 0.5, "S-3": 0.5}, {"=2": 1.0}]
    assert cot2.targets(some, args(traces=1)) == [{"S3": 1.0}, {"=2": 1.0}]
    assert cot2.targets(some, args(traces=3))[0] == {"S3": pytest.approx(2 / 3), "S-3": pytest.approx(1 / 3)}
    some = [t.split() for t in cot2.traces("D2 D2 D4 D5")]  # sums that coincide add up
    assert len(some) == 16 and cot2.targets(some, args())[1] == {"S4": 0.25, "S0": 0.5, "S-4": 0.25}
    assert cot2.targets(some, args(traces=2)) == cot2.targets(some[:2], args()) and some[0][-1] == "=1"


def test_the_world():
    task = cot2.mnns(args())
    known = task.tokenizer().get_vocab()
    seen = [{tuple(sorted(e.prompt)) for e in part} for part in (task.train, task.test)]
    assert not seen[0] & seen[1] and len(task.train) + len(task.test) == 9**4 and len(seen[1]) == 99
    for e in task.train[:200] + task.test[:200]:
        digits = [int(word[1:]) for word in e.prompt.split()]
        right = min(abs(sum(s * d for s, d in zip(signs, digits))) for signs in product((-1, 1), repeat=4))
        assert e.answer == f"={right}" and task.check(task.demonstrate(None, e, 1.0), e.answer) == (e.answer, 1.0)
        states = {word for t in cot2.traces(e.prompt) for word in t.split()[:-1]}
        assert states | {e.answer} | set(e.prompt.split()) <= set(known)
    assert max(int(e.answer[1:]) for e in task.train + task.test) <= 9
    assert task.check("", "=1") == (None, 0.0) and task.check("S1 =1 S1", "=1")[1] == 0 and task.check("S3 =1", "=1")[1] == 1
    assert Counter(e.answer for e in task.test).most_common(1)[0][1] / len(task.test) < 0.45  # the floor of a guess


# ---------------------------------------------------------------- what is drawn


def test_draws_of_a_dirichlet():
    """Means and variances, small shapes and large; a function of the numbers; nothing outside the support."""
    g = torch.Generator().manual_seed(0)
    p = double([[0.6, 0.3, 0.0, 0.1]])
    for gamma in (0.05, 1.0, 30.0):
        a = args(sampler="dirichlet", gamma=gamma)
        noise = torch.rand(40000, 8, dtype=torch.float64, generator=g)
        x = cot2.dirichlet(p.expand(40000, -1), noise, a)
        assert torch.equal(x, cot2.dirichlet(p.expand(40000, -1), noise, a))
        torch.testing.assert_close(x.mean(0), p[0], atol=0.01, rtol=0)
        torch.testing.assert_close(x.var(0), p[0] * (1 - p[0]) / (gamma + 1), atol=0.004, rtol=0)
        assert not x[:, 2].any() and x[:, [0, 1, 3]].min() >= 9e-7
    assert cot2.dirichlet(p, torch.zeros(1, 8, dtype=torch.float64), args(gamma=1e-3)).isfinite().all()


def embedding_of(V, H=6):
    torch.manual_seed(0)
    return torch.nn.Embedding(V, H).double()


def test_tokens_of_mts_are_drawn_where_k_divides_and_where_not():
    g, z, E = torch.Generator().manual_seed(0), double([2.0, 1, -1, 0]), embedding_of(4)
    noise = torch.rand(20000, 6, dtype=torch.float64, generator=g)
    for ratio, p in (("paper", z.softmax(0)), ("code", (z / 3).softmax(0))):
        a = args(ratio=ratio)
        fed, shown, record, logp, closes = cot2.think(z.expand(20000, -1), E, noise, a)
        drawn, x = record.chunk(2, -1)
        for column in drawn.T:
            torch.testing.assert_close(column.long().bincount(minlength=4) / 20000, p.float(), atol=0.012, rtol=0)
        assert torch.equal(shown, drawn[:, 0].long()) and not closes.any() and (x == 1 / 3).all()
        torch.testing.assert_close(fed, E(drawn.long()).mean(1))
        torch.testing.assert_close(logp, p.log()[drawn.long()].sum(1) / (1 if ratio == "code" else 3))


def test_without_noise_the_mixture_is_fed_and_k_divides_it():
    z, E = double([[2.0, 1, -1, 0]]), embedding_of(4)
    for changes, heat in ((dict(), 1), (dict(ratio="code"), 3), (dict(ratio="code", k=6), 6), (dict(sampler="dirichlet"), 1)):
        fed, shown, record, *_ = cot2.think(z, E, None, args(**changes))
        torch.testing.assert_close(fed, (z / heat).softmax(-1) @ E.weight)
        assert shown.item() == 0 and not record.any()


def test_a_support_is_what_is_likely_enough():
    z, E = double([[5.0, 4, 3, -4]]), embedding_of(4)
    _, shown, record, logp, _ = cot2.think(z, E, torch.full((1, 8), 0.5, dtype=torch.float64), args(sampler="dirichlet"))
    assert record[0, 7] == 0 and record[0, 4:7].min() > 0 and record[0, 4:].sum().item() == pytest.approx(1)
    assert shown.item() == record[0, 4:].argmax() and cot2.entries(1000, args(sampler="dirichlet")) == 128


# ---------------------------------------------------------------- rollouts


@functools.cache
def world():
    """-> the tokenizer and the task, with token ids."""
    a = args()
    warm = cot2.worlds(a)
    settings.resolve(a, warm)
    tokenizer = models.load_tokenizer(a, warm, fresh=True)
    return tokenizer, tasks.encode(cot2.mnns(a), tokenizer)


@functools.cache
def untrained(dtype, seed):
    a, _ = settings.resolve(args(dtype=dtype, seed=seed), lambda name: world()[1])
    gpu.init(a)
    return models.load(a, gpu.device(), warm=lambda name: world()[1], fresh=True)


def made(a, dtype="float32"):
    """A model without training, its task and tokenizer, and args in full."""
    a = replace(a, dtype=dtype)
    settings.resolve(a, lambda name: world()[1])
    tokenizer, task = world()
    return SimpleNamespace(args=a, tokenizer=tokenizer, task=task, policy=copy.deepcopy(untrained(dtype, a.seed)))


QUIET = SimpleNamespace(stop=None, main=True)


@pytest.fixture(scope="module")
def start():
    """In float64: a log-density on many tokens is several hundred, whose parts float32 rounds by 1e-4 and more."""
    s = made(args(csft_steps=60, csft_batch=64), "float64")
    cot2.stage(s.policy, s.task, s.tokenizer, s.args, QUIET)
    return s


def rollouts(s, n=16, policy=None, **changes):
    a = replace(s.args, **changes)
    engine = cot2.make_engine(policy or s.policy, s.tokenizer, a)
    scorer = rewards.Scorer(s.task.check, inline=True)
    batch = rollout.collect(engine, scorer, s.tokenizer, s.task.train[:n], a, 0)
    engine.attach(batch)
    return batch, a, engine


@each_way
def test_the_training_pass_sees_what_was_fed(start, way):
    """128 rollouts, in micro-batches; and where the thoughts are not fed, others' log-probs come out."""
    batch, a, _ = rollouts(start, **way)
    logp, entropy = read(start.policy, batch, a, how=cot2.replay)
    soft = batch.columns["given"][:, :, 0] > 0
    assert len(batch.ids) == 128 and soft[:, :3].all() and not soft[:, 3:].any() and batch.mask.all()
    assert ((logp - batch.sampler_logp).abs() < 5e-5).all() and (entropy > 0).all()
    if way.get("k") != 1:
        plain, _ = read(start.policy, batch, a)
        assert (plain - logp)[:, 3].abs().max() > 0.01


@each_way
def test_in_float64_to_the_ninth_digit(start, way):
    policy = made(start.args, "float64").policy
    policy.load_state_dict({k: v.double() for k, v in start.policy.state_dict().items()})
    batch, a, engine = rollouts(start, 4, policy, **way)
    logp, _ = read(policy, batch, a, how=cot2.replay)
    out = engine.generate([e.ids for e in start.task.train[:4]], 8, 4, 1.0, [gpu.hash_seed(a.seed, 0, i) for i in range(4)])
    wanted = double([p for _, p, _ in out])
    assert (logp - wanted)[:, :3].abs().max() < 1e-9 and logp.dtype == torch.float64


def test_the_entropy_is_that_of_what_is_drawn(start):
    batch, a, _ = rollouts(start, ratio="code")
    _, entropy = read(start.policy, batch, a, how=cot2.replay)
    _, flat = read(start.policy, batch, replace(a, ratio="paper"), how=cot2.replay)
    assert (entropy > flat)[:, :3].all() and torch.equal(entropy[:, 3], flat[:, 3])


@pytest.mark.parametrize("way", [dict(), dict(sampler="dirichlet")], ids=["mts", "dirichlet"])
def test_a_thought_changes_what_comes_behind_it(start, way):
    batch, a, _ = rollouts(start, 4, **way)
    logp, _ = read(start.policy, batch, a, how=cot2.replay)
    given = batch.columns["given"].clone()
    w = (given.shape[2] - 2) // 2
    batch.columns["given"][:, 1, 2 + w :] = given[:, 1, 2 + w :].roll(1, -1) * torch.linspace(0.5, 1.5, w)
    other, _ = read(start.policy, batch, a, how=cot2.replay)
    assert torch.equal(other[:, 0], logp[:, 0]) and ((other - logp).abs() > 1e-6)[:, 2:].float().mean() > 0.9


def test_a_prompt_in_common_changes_nothing(start):
    batch, a, _ = rollouts(start, 2)
    logp, _ = read(start.policy, batch, a, how=cot2.replay)
    alone = [read(start.policy, batch.take(torch.tensor([i])), a, how=cot2.replay)[0] for i in range(len(logp))]
    torch.testing.assert_close(torch.cat(alone), logp, rtol=1e-4, atol=1e-5)


def gradients(policy, mb, a, **how):
    policy.zero_grad()
    logp, _ = policy(mb.ids, mb.attention_mask, mb.mask, 1.0, **how)
    weight = cot2.token_weights(mb.mask, a)
    objective, _ = cot2.surrogate(logp, mb.old_logp, mb.adv, mb.mask, a)
    (-(objective * weight)[mb.mask].sum()).backward()
    return logp.detach(), {n: p.grad.clone() for n, p in policy.named_parameters()}


def test_one_token_a_thought_is_grpo(start):
    """Log-probs and gradients of the tokens that are shown, all but the embeddings': what is fed is a constant here, and in
    grpo.py it is not. Advantages are grpo.py's but for the std. With logits over K = 1, or not, it is the same."""
    s = made(start.args, "float64")
    s.policy.load_state_dict({k: v.double() for k, v in start.policy.state_dict().items()})
    batch, a, _ = rollouts(s, 4, k=1)
    batch.old_logp, _ = read(s.policy, batch, a)
    batch.old_logp += 0.1 * torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    batch.adv = torch.randn(len(batch.ids), 1, generator=torch.Generator().manual_seed(1)).double().expand_as(batch.old_logp)
    plain, wanted = gradients(s.policy, batch, a)
    for ratio in ("paper", "code"):
        logp, grad = gradients(s.policy, batch, a, **cot2.replay(batch, replace(a, ratio=ratio)))
        assert (logp - plain).abs().max() < 1e-10
        for name in wanted:
            gap = (grad[name] - wanted[name]).abs().max() / wanted[name].abs().max()
            assert gap > 1e-3 if "embed" in name else gap < 1e-8, name


def test_by_one_trace_thoughts_are_tokens(start):
    batch, a, engine = rollouts(start, 4, traces=1)
    prefixes, seeds = [e.ids for e in start.task.train[:4]], [1, 2, 3, 4]
    wanted = HF(start.policy, start.tokenizer).generate(prefixes, 3, 4, 1.0, seeds)
    assert [x[::2] for x in engine.generate(prefixes, 3, 4, 1.0, seeds)] == [x[::2] for x in wanted]
    assert not batch.columns["given"][:, :, 0].any() and not batch.columns["given"][:, :, 2:].any()
    logp, _ = read(start.policy, batch, a, how=cot2.replay)
    plain, _ = read(start.policy, batch, a)
    torch.testing.assert_close(logp, plain, rtol=1e-5, atol=1e-5)


def test_both_evaluations(start):
    """Where K divides logits the first one is without it, the second one with it; the answer is never divided: that would not
    change the greedy one, but its log-prob."""
    batch, a, engine = rollouts(start, ratio="code", k=6)
    asked = []

    def evaluate(changed):
        asked.append((changed.eval_samples, engine.args.ratio))
        return dict(greedy_accuracy=float(len(asked)), prompts=8) | ({"avg@8": 0.5} if changed.eval_samples else {})

    found = cot2.readings(engine, evaluate, a)
    assert asked == [(8, "code"), (0, "paper")] and engine.args is a
    assert found == {"greedy_accuracy": 2.0, "prompts": 8, "avg@8": 0.5, "greedy_divided": 1.0}
    for changes in (dict(), dict(sampler="dirichlet"), dict(ratio="code", traces=1)):
        _, a, engine = rollouts(start, 2, **changes)
        assert "greedy_divided" not in cot2.readings(engine, evaluate, a)
    logp, _ = read(start.policy, batch, replace(a, ratio="code", k=6, traces=0), how=cot2.replay)
    with torch.no_grad():
        E = start.policy.lm.get_input_embeddings()
        fed = cot2.mixture(E, batch.columns["given"][0, :3, 2:])
        z = start.policy.lm(inputs_embeds=torch.cat([E(batch.ids[0, :4]), fed])[None]).logits[0]
    assert logp[0, 3].item() == pytest.approx(z[-1].log_softmax(-1)[batch.ids[0, -1]].item(), abs=1e-4)
    tokens = batch.columns["given"][0, 2, 2:8].long()
    assert logp[0, 2].item() == pytest.approx((z[-2] / 6).log_softmax(-1)[tokens].sum().item(), abs=1e-4)


def test_a_completion_ends_with_its_answer(start):
    """In tokens as well; one without an answer at the last step is cut, and wrong."""
    ends = {start.tokenizer.eos_token_id, *start.tokenizer.convert_tokens_to_ids([f"={n}" for n in range(10)])}
    for changes in (dict(), dict(traces=1)):
        batch, *_ = rollouts(start, **changes)
        last = [row[m][-1].item() for row, m in zip(batch.ids[:, 4:], batch.mask)]
        assert [i in ends for i in last] == (~batch.truncated).tolist() and batch.truncated.any()
        assert not batch.accuracy[batch.truncated].any() and batch.mask.sum(1).max() == 4


# ---------------------------------------------------------------- CSFT


def test_csft_s_gradient(monkeypatch):
    """Of the first update: that of the sum over steps, mean over prompts, through what is fed, step by step."""
    seen, s = {}, made(args(csft_steps=1, csft_batch=3), "float64")
    real = gpu.clip_gradients
    before = {n: p.detach().clone() for n, p in s.policy.named_parameters()}

    def clip(policy, norm):
        seen.update({n: p.grad.clone() for n, p in policy.named_parameters()})
        return real(policy, norm)

    monkeypatch.setattr(gpu, "clip_gradients", clip)
    cot2.stage(s.policy, s.task, s.tokenizer, s.args, QUIET)
    for n, p in s.policy.named_parameters():
        p.data.copy_(before[n])
    s.policy.zero_grad()
    E, number, total = s.policy.lm.get_input_embeddings(), s.tokenizer.get_vocab(), 0.0
    for e in s.task.order(0, 3, f"CSFT {s.args.seed}"):
        inputs = [E.weight[i] for i in e.ids]
        for shares in cot2.targets([t.split() for t in cot2.traces(e.prompt)], s.args):
            logits = s.policy.lm(inputs_embeds=torch.stack(inputs)[None]).logits[0, -1]
            total = total - sum(q * (logits.log_softmax(-1)[number[word]] - math.log(q)) for word, q in shares.items()) / 3
            inputs.append(sum(q * E.weight[number[word]] for word, q in shares.items()))
    total.backward()
    for n, p in s.policy.named_parameters():
        torch.testing.assert_close(seen[n], p.grad, rtol=1e-4, atol=1e-6)  # the norms are in float32


def test_csft_learns_and_every_flag_changes_it(start):
    scorer = rewards.Scorer(start.task.check, inline=True)
    engine, a = cot2.make_engine(start.policy, start.tokenizer, start.args), replace(start.args, eval_prompts=128)
    found = rollout.evaluate(engine, scorer, start.tokenizer, start.task, a)
    assert found["greedy_accuracy"] > 0.25
    weights = set()
    for changes in (dict(), dict(csft_steps=3), dict(csft_batch=5), dict(csft_lr=1e-3), dict(traces=4), dict(seed=2)):
        s = made(replace(start.args, **dict(csft_steps=2, csft_batch=4) | changes))
        cot2.stage(s.policy, s.task, s.tokenizer, s.args, QUIET)
        weights.add(s.policy.lm.get_input_embeddings().weight.sum().item())
    assert len(weights) == 6
    with pytest.raises(UserError, match="stopped during CSFT"):
        cot2.stage(s.policy, s.task, s.tokenizer, s.args, SimpleNamespace(stop=2, main=True))


# ---------------------------------------------------------------- runs


def test_a_run_and_what_goes_on_from_it(tmp_path):
    """From the model behind CSFT GRPO is the run that does both; one that is killed between them does no second CSFT."""
    both, then, killed = (tmp_path / name for name in ("both", "then", "killed"))
    more = [*SMALL, "--ratio", "code", "--beta", 0.1]
    done = run(tmp_path, *more, "--run-dir", both, script=SCRIPT)
    assert done.code == 0, done.err
    shutil.copytree(both, killed)
    shutil.rmtree(killed / "checkpoints")
    for name in ("metrics", "evals", "samples"):
        (killed / f"{name}.jsonl").write_text("")
    made_at = (killed / "csft" / "model.safetensors").stat().st_mtime_ns
    for argv in ([*more, "--model", both / "csft", "--run-dir", then], ["--resume", killed]):
        done = run(tmp_path, *argv, script=SCRIPT)
        assert done.code == 0, done.err
    same(outcome(both), outcome(then))
    same(outcome(both), outcome(killed))
    assert not (then / "csft").exists() and (killed / "csft" / "model.safetensors").stat().st_mtime_ns == made_at
    (row, last), evals = lines(both / "metrics.jsonl"), lines(both / "evals.jsonl")
    assert set(evals[0]) == {"greedy_accuracy", "greedy_divided", "avg@2", "pass@2", "prompts", "step"}
    for kind in ("thoughts", "tokens"):
        assert {f"{x}_{kind}" for x in ("entropy", "log_ratio", "clip_fraction")} <= set(row)
    assert (
        row["sampler_gap_max"] < 5e-5
        and row["entropy_thoughts"] > 1.02 * row["entropy_tokens"]
        and row["ref_kl"] < last["ref_kl"] < 0.1
    )


def test_vllm_is_refused(tmp_path):
    assert "embeddings fed while decoding" in user_error(run(tmp_path, "--engine", "vllm", script=SCRIPT))


def test_other_tasks_go_without_csft(tmp_path):
    """From the tiny model's own start, with thoughts before an answer in tokens."""
    small = "--task chain --steps 1 --prompts-per-step 4 --group-size 4 --minibatches 1 --eval-prompts 4 --thoughts 2".split()
    done = run(tmp_path, *small, "--sampler", "dirichlet", "--run-dir", tmp_path / "x", script=SCRIPT)
    assert done.code == 0, done.err
    row = json.loads((tmp_path / "x" / "metrics.jsonl").read_text())
    assert not (tmp_path / "x" / "csft").exists() and row["sampler_gap_max"] < 5e-5
