"""RLFR's worked numbers, its flow, what is read of the policy and what learns from it, its controls, and what a run logs."""

import copy
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from algos import grpo, rlfr
from common import UserError, engines, gpu, models, rollout, tasks
from common.batch import Meter, collate, read
from tests.helpers import ROOT, checkpoints, contents, lines, outcome, run, same, tiny, user_error

__all__ = ["tiny"]

CLOSE = dict(rtol=0, atol=5e-6)
SMALL = """--task addition --steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8
    --flow-steps 12 --demos-per-step 4""".split()
SCRIPT = ROOT / "algos" / "rlfr.py"


def args(**changes):
    return rlfr.Args(**changes)


def fixed(output):
    """A flow that says this, whatever it is asked."""
    return lambda x, t, c: torch.zeros_like(x) + torch.tensor(output, dtype=x.dtype)


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("output, error, debiased", [((0.0, 0, 0), 0.59, 2.36), ((0.5, -0.5, 1.0), 0.056667, 0.226667)])
def test_worked_deviations(output, error, debiased):
    a, e = (torch.tensor([[row]], dtype=torch.float64) for row in ([0.3, -0.6, 1.2], [-0.5, 0.1, 0.4]))
    seen = []

    def flow(x, t, c):
        seen.append((x, t, c))
        return fixed(output)(x, t, c)

    found = rlfr.deviation(flow, a, 7 * a, e, args())
    assert [x.item() for x in found] == pytest.approx([debiased, error], abs=1e-6)
    (x, t, c), *more = seen
    assert x.flatten().tolist() == pytest.approx([0.14, -0.46, 1.04], abs=1e-6) and not more
    assert t.shape == (1, 1, 1) and t.item() == pytest.approx(0.8) and torch.equal(c, 7 * a)


def test_every_time_has_its_own_debias_and_layers_count_alike():
    g = torch.Generator().manual_seed(0)
    a, c, e = (torch.randn(5, 3, 4, generator=g) for _ in range(3))
    alone = {t: rlfr.deviation(fixed(0.3), a, c, e, args(timesteps=(t,))) for t in (0.5, 0.8)}
    both = rlfr.deviation(fixed(0.3), a, c, e, args(timesteps=(0.5, 0.8)))
    for i in range(2):
        torch.testing.assert_close(both[i], (alone[0.5][i] + alone[0.8][i]) / 2)
    u = (a - e - 0.3).square().mean(2)
    torch.testing.assert_close(alone[0.8][0], 4 * u.mean(1))
    torch.testing.assert_close(alone[0.5][0], u.mean(1))
    torch.testing.assert_close(both[1], u.mean(1))


def test_the_deviation_has_no_gradient_and_the_error_has():
    weight = torch.tensor(0.5, requires_grad=True)
    a = torch.ones(2, 1, 3)
    D, error = rlfr.deviation(lambda x, t, c: weight * x, a, a, 0 * a, args())
    assert not D.requires_grad and error.requires_grad


SCORES = [0.5, 2.0, 1.1, 0.8, 1.9]
WORKED = dict(plain=([0, 1, 0, 0, 0.933333], [0.680667, 0.680667, 0.690667, 0.690667, 0.690667]),
              official=([0, 1, 0, 0, 0.916667], [0.680833, 0.680833, 0.690833, 0.690833, 0.690833]))  # fmt: skip


@pytest.mark.parametrize("minmax", WORKED)
def test_worked_rewards_and_advantages(minmax):
    """z = 0.7 is that of 1 against a fellow of which nothing is left: a group of two has sqrt(1/2) and -sqrt(1/2)."""
    kept, wanted = WORKED[minmax]
    a, mask = args(minmax=minmax), torch.tensor([[1] * 5, [0] * 5]).bool()
    D = torch.tensor([SCORES, [math.nan] * 5], dtype=torch.float64)
    paid = rlfr.flow_rewards(D, mask, a)
    assert paid[0].tolist() == pytest.approx([-0.01 * n for n in kept], abs=1e-8) and not paid[1].any()
    adv = rlfr.advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64), paid, mask, a)
    assert (adv[0] - math.sqrt(0.5) + 0.7).tolist() == pytest.approx(wanted, abs=1e-6) and not adv[1].any()
    # And the gradient that it gives, at ratio 1: -A over the five tokens.
    logp = torch.full((2, 5), -1.0, dtype=torch.float64, requires_grad=True)
    objective, _ = rlfr.surrogate(logp, logp.detach(), adv, mask, a)
    (-(objective * rlfr.token_weights(mask, a))[mask].sum()).backward()
    torch.testing.assert_close(logp.grad, -adv / 5)


def test_the_official_minimum_is_that_of_the_longest_alone():
    """It is the padding's 0 that the others' second smallest is behind. What is padded further is as it was."""
    D = torch.tensor([SCORES, [0.5, 2.0, 1.7, 0.8, 9.0]])
    mask = torch.tensor([[1] * 5, [1] * 4 + [0]]).bool()
    official = rlfr.flow_rewards(D, mask, args(minmax="official"))
    plain = rlfr.flow_rewards(D, mask, args())
    assert torch.equal(official[1], plain[1]) and not torch.equal(official[0], plain[0])
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (D, mask)]
    assert torch.equal(rlfr.flow_rewards(*wide, args(minmax="official"))[:, :5], official)
    equal = rlfr.flow_rewards(torch.ones(1, 3), torch.ones(1, 3).bool(), args(minmax="official"))
    assert not equal.any()


def test_only_the_largest_pay():
    D = torch.linspace(0, 1, 101)[None]
    mask = torch.ones(1, 101).bool()
    paid = rlfr.flow_rewards(D, mask, args())
    assert (paid < 0).nonzero()[:, 1].tolist() == list(range(86, 101))
    torch.testing.assert_close(paid[0, 86:], -0.01 * D[0, 86:])
    assert (rlfr.flow_rewards(D, mask, args(top_k=101)) < 0).sum() == 40  # those above 0.6, and 0.6 itself is not
    assert (rlfr.flow_rewards(D, mask, args(eta=0.9)) < 0).sum() == 10
    torch.testing.assert_close(rlfr.flow_rewards(D, mask, args(beta_f=0.5)), 50 * paid)
    tied = torch.tensor([[0.0, 1, 1, 1, 1]])
    assert rlfr.flow_rewards(tied, mask[:, :5], args(top_k=2)).tolist() == [
        [0, pytest.approx(-0.01), pytest.approx(-0.01), 0, 0]
    ]


def test_nothing_to_compare_pays_nothing():
    """0/0 of one token and of equal ones; no token at all; whatever stands in the padding."""
    D = torch.tensor([[3.0, 9, 9], [2, 2, 2], [1, 2, 3], [5, 5, 5]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]]).bool()
    for minmax in ("plain", "official"):
        for garbage in (0.0, math.nan, math.inf, -math.inf):
            paid = rlfr.flow_rewards(torch.where(mask, D, garbage), mask, args(minmax=minmax))
            assert torch.equal(paid, torch.zeros(4, 3))
    g = torch.Generator().manual_seed(0)
    D, mask = torch.rand(4, 6, generator=g), torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    wanted = rlfr.flow_rewards(D, mask, args())
    adv = rlfr.advantages(rewards, wanted, mask, args())
    assert wanted[0].any() and wanted[1].any() and not wanted[2:].any() and not adv[~mask].any()
    for garbage in (math.nan, math.inf, -math.inf):
        paid = rlfr.flow_rewards(torch.where(mask, D, garbage), mask, args())
        assert torch.equal(paid, wanted) and torch.equal(rlfr.advantages(rewards, paid, mask, args()), adv)
    for many in (rewards, torch.full((2, 2), 0.3), torch.zeros(2, 2)):
        empty = rlfr.advantages(many, torch.zeros(4, 6), torch.zeros(4, 6).bool(), args())
        assert torch.equal(empty, torch.zeros(4, 6))


def test_without_what_the_flow_charges_it_is_grpo():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0.2, 0.7, 0.1, 0.1], [1, 1, 1, 1], [0.1 + 0.2, 0.3, 0.3, 0.3]])
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.randint(1, 8, (16, 1), generator=g)
    a = args(beta_f=0.0)
    adv = rlfr.advantages(rewards, rlfr.flow_rewards(torch.rand(16, 7, generator=g), mask, a), mask, a)
    base = grpo.advantages(rewards, grpo.Args()).flatten()[:, None] * mask
    torch.testing.assert_close(adv, base, rtol=1e-5, atol=1e-5)


def test_groups_with_equal_rewards_still_pay():
    D, mask = torch.tensor([SCORES, SCORES]), torch.ones(2, 5).bool()
    for value in (0.0, 1.0):
        adv = rlfr.advantages(torch.full((1, 2), value), rlfr.flow_rewards(D, mask, args()), mask, args())
        torch.testing.assert_close(adv[0], torch.tensor([-0.01933333, -0.01933333, -0.00933333, -0.00933333, -0.00933333]))
        assert torch.equal(adv[0], adv[1])


def test_the_ratio_is_capped():
    ratio = torch.tensor([[1.0, 2.9, 3.1, 9.0]], dtype=torch.float64)
    logp, mask = ratio.log().requires_grad_(), torch.ones(1, 4).bool()
    for adv, wanted in ((-1.0, [-1, -2.9, -3, -3]), (1.0, [1, 1.2, 1.2, 1.2])):
        objective, _ = rlfr.surrogate(logp, 0 * logp.detach(), torch.full_like(ratio, adv), mask, args())
        assert objective[0].tolist() == pytest.approx(wanted)
        (grad,) = torch.autograd.grad(objective.sum(), logp)
        assert grad[0].tolist() == pytest.approx([-1, -2.9, 0, 0] if adv < 0 else [1, 0, 0, 0])
    wide, _ = rlfr.surrogate(logp, 0 * logp.detach(), -torch.ones_like(ratio), mask, args(ratio_cap=5.0))
    base, _ = grpo.surrogate(logp, 0 * logp.detach(), -torch.ones_like(ratio), mask, grpo.Args())
    assert wide[0].tolist() == pytest.approx([-1, -2.9, -3.1, -5]) and torch.equal(wide[0, :3], base[0, :3])


def test_the_control_deals_out_what_a_completion_has():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(8) < torch.tensor([[8], [5], [1], [0]])
    D, keys = torch.rand(4, 8, generator=g), torch.randn(4, 8, generator=g)
    for garbage in (0.0, math.nan, -math.inf):
        found = rlfr.shuffled(torch.where(mask, D, 0.0), mask, torch.where(mask, keys, garbage))
        for i, n in enumerate((8, 5, 1, 0)):
            assert torch.equal(found[i, :n], D[i, keys[i, :n].argsort()])
        assert not found[~mask].any() and not torch.equal(found[:2], D[:2] * mask[:2])


# ---------------------------------------------------------------- the flow


def test_a_flow_is_zero_at_first_and_has_a_gradient_everywhere_soon():
    torch.manual_seed(0)
    flow = rlfr.Flow(6, 8, 2, (0.25, 0.5, 0.75))
    x, c, t = torch.randn(4, 3, 6), torch.randn(4, 3, 6), torch.rand(4, 3, 1)
    assert torch.equal(flow(x, t, c), torch.zeros(4, 3, 6))
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (flow(x, t, c) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in flow.parameters())
    out = flow(x, t, c)
    for k in range(3):  # it hears all that it is told: layer, time, condition; and another token's say nothing
        other = torch.where(torch.arange(3)[:, None] == k, c + 1, c)
        changed = (flow(x, t, other) != out).any(2)
        assert changed[:, k].all() and changed.sum() == 4
    assert (flow(x, t.flip(0), c) != out).any() and (flow(x[:, [0]], t[:, [0]], c[:, [0]])[:, 0] != out[:, 1]).any()
    torch.testing.assert_close(flow(x[1:2], t[1:2], c[1:2])[0], out[1])
    torch.testing.assert_close(flow(x, torch.full((1, 1, 1), 0.8), c), flow(x, torch.full((4, 3, 1), 0.8), c))
    flow.depths = (0.25, 0.25, 0.75)
    assert (flow(x, t, c)[:, 1] != out[:, 1]).any() and torch.equal(flow(x, t, c)[:, [0, 2]], out[:, [0, 2]])


def test_a_flow_learns_a_field():
    """States that are twice the one before, and a little noise: much less than 1 of the error is left, at any time."""
    torch.manual_seed(0)
    flow = rlfr.Flow(4, 32, 2, (0.5,))
    optimizer, errors = torch.optim.AdamW(flow.parameters(), lr=3e-3), []
    for _ in range(150):
        c = torch.randn(64, 1, 4)
        a, e, t = 2 * c + 0.1 * torch.randn_like(c), torch.randn_like(c), torch.randn(64, 1, 1).sigmoid()
        loss = rlfr.velocity_error(flow, a, c, e, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[0] > 4 and sum(errors[-20:]) / 20 < 1


def test_draws_are_a_row_s_own():
    like, mask = torch.zeros(9, 3, 5), torch.arange(6) < torch.tensor([[4], [0], [5]])
    noise, more = rlfr.draws(mask, [3, 4, 5], like)
    assert noise.shape == (9, 3, 5) and more.shape == (9, 3, 1)
    alone = rlfr.draws(mask[2:, :5], [5], like[:5])
    assert torch.equal(alone[0], noise[4:]) and torch.equal(alone[1], more[4:])
    assert not torch.equal(rlfr.draws(mask[2:], [6], like[:5])[0], noise[4:])
    many, _ = rlfr.draws(torch.ones(1, 4000).bool(), [1], torch.zeros(1, 3, 5))
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.02
    assert rlfr.draws(mask[1:2], [1], like[:0])[0].shape == (0, 3, 5)


# ---------------------------------------------------------------- what is read of the policy


@pytest.fixture(scope="module")
def start():
    """args, tokenizer, policy, task and a rollout of the default's start."""
    a = args(task="addition", dtype="float32", group_size=4, max_new_tokens=28, micro_batch_tokens=4096, flow_depth=2,
             flow_lr=1e-2, optimizer="adamw", gradient_checkpointing=False, demos_per_step=8, flow_steps=40)  # fmt: skip
    tokenizer = models.load_tokenizer(a)
    task, policy = tasks.load("addition", tokenizer), models.load(a, torch.device("cpu"))

    def scorer(texts, gold):
        return list(texts), [float(t.endswith(":" + g)) for t, g in zip(texts, gold)]

    batch = rollout.collect(engines.HF(policy, tokenizer), scorer, tokenizer, task.train[:8], a, 0)
    assert 0 < batch.accuracy.mean() < 1
    return SimpleNamespace(fits={}, args=a, tokenizer=tokenizer, policy=policy, task=task, batch=batch)


@pytest.mark.parametrize("budget", [40, 200, 4096])
def test_states_are_those_of_a_token_and_the_one_before(start, budget):
    """Against transformers' own, row by row; with a prompt of one token, an empty completion and garbage in the padding."""
    a = replace(start.args, micro_batch_tokens=budget)
    g = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(3, 60, (n,), generator=g).tolist() for n in size) for size in ((1, 5), (4, 0), (6, 9), (2, 1))]
    batch = collate(rows)
    batch.ids[~batch.attention_mask] = 33
    logp, seen = torch.zeros(batch.mask.shape), set()
    for index, mask, found, target, condition, noise, _ in rlfr.readings(start.policy, batch, a, 23, 5):
        seen |= set(index.tolist())
        logp[index, : mask.shape[1]] = found
        at = 0
        for i in index.tolist():
            prompt, completion = rows[i]
            out = start.policy.lm(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
            states, n = torch.stack(out, 2)[0, :, 1:4].detach(), len(completion)  # behind layers 1, 2 and 3 of four
            torch.testing.assert_close(target[at : at + n], states[len(prompt) :], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(condition[at : at + n], states[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4)
            one = torch.ones(1, n).bool()
            own, _ = rlfr.draws(one, [gpu.hash_seed(a.seed, 23, 5, i)], target)
            assert torch.equal(noise[at : at + n], own)
            at += n
        assert at == len(target) and not target.requires_grad
    assert seen == {0, 1, 2, 3}
    wanted, _ = read(start.policy, batch, a)
    torch.testing.assert_close(logp, wanted, **CLOSE)


def scored(start, **changes):
    """score() of the rollout by a flow that was fitted a little -> log-probs, D, loss, the flow before and after."""
    a = replace(start.args, **changes)
    torch.manual_seed(0)
    flow, optimizer = rlfr.make_flow(start.policy, a)
    key = str([(k, v) for k, v in changes.items() if k not in ("shuffle", "flow") or v == "scratch"])
    if key not in start.fits:
        fit = rlfr.flow_stage(start.policy, flow, start.task, start.tokenizer, a, SimpleNamespace(stop=None))
        start.fits[key] = fit, copy.deepcopy(flow.state_dict())
    fit, weights = start.fits[key]
    flow.load_state_dict(weights)
    assert all(p.grad is None for p in start.policy.parameters())
    before = [p.detach().clone() for p in flow.parameters()]
    batch = replace(start.batch, columns={})
    gradients, step = [], optimizer.step
    optimizer.step = lambda: (gradients.extend(p.grad.abs().sum().item() for p in flow.parameters()), step())
    logp, loss = rlfr.score(start.policy, flow, optimizer, batch, a, 3)
    moved = [not torch.equal(p, q) for p, q in zip(before, flow.parameters())]
    return SimpleNamespace(logp=logp, D=batch.columns["deviation"], loss=loss, moved=moved, gradients=gradients, fit=fit)


@pytest.fixture(scope="module")
def plain(start):
    return scored(start)


def test_old_logp_is_what_read_gives(start, plain):
    """But for rounding: the prompt's last token stands among the completion's, so sums run in another order."""
    torch.testing.assert_close(plain.logp, read(start.policy, start.batch, start.args)[0], **CLOSE)
    assert not plain.logp[~start.batch.mask].any() and not plain.D[~start.batch.mask].any()


def test_the_flow_learns_and_the_policy_does_not(start, plain):
    assert all(plain.moved) and len(plain.gradients) == len(plain.moved) and all(g > 0 for g in plain.gradients)
    assert all(p.grad is None for p in start.policy.parameters())
    assert plain.fit[0] > 10 and sum(plain.fit[-10:]) < 5 * plain.fit[0] and len(plain.fit) == 40


def test_a_frozen_flow_scores_alike_and_stays(start, plain):
    frozen = scored(start, flow="frozen")
    assert torch.equal(frozen.D, plain.D) and frozen.loss == plain.loss and not any(frozen.moved)


def test_a_flow_from_scratch_has_seen_nothing(start, plain):
    """It says 0, so that D is the states' own distance from the noise."""
    scratch = scored(start, flow="scratch")
    assert scratch.fit == [] and any(scratch.moved) and scratch.loss > 3 * plain.loss


def test_micro_batches_are_one_batch(start):
    few, small = scored(start, flow_steps=1), scored(start, flow_steps=1, micro_batch_tokens=60)
    assert small.fit == pytest.approx(few.fit, rel=1e-5) and small.loss == pytest.approx(few.loss, rel=1e-4)
    torch.testing.assert_close(small.D, few.D, rtol=1e-3, atol=1e-3)  # the fit's update rounds otherwise
    assert small.gradients == pytest.approx(few.gradients, rel=1e-2)


def test_the_loss_is_that_of_correct_completions(start, plain):
    """Mean over the tokens of each, then over them; at 0.8 the error is D / 4."""
    right = start.batch.accuracy == 1
    per_row = (plain.D / 4).sum(1) / start.batch.mask.sum(1)
    assert plain.loss == pytest.approx(per_row[right].mean().item(), rel=1e-5)
    assert plain.loss < per_row[~right].mean()


def test_no_correct_completion_teaches_nothing(start):
    wrong = SimpleNamespace(**vars(start) | dict(batch=replace(start.batch, accuracy=0 * start.batch.accuracy)))
    nothing = scored(wrong)
    assert nothing.loss == 0 and nothing.gradients == [] and nothing.D[start.batch.mask].all()


def test_shuffling_keeps_what_a_completion_has(start, plain):
    control = scored(start, shuffle=True)
    for x, y, m in zip(control.D, plain.D, start.batch.mask):
        assert torch.equal(x[m].sort().values, y[m].sort().values)
    assert not torch.equal(control.D, plain.D) and control.loss == plain.loss


@pytest.mark.parametrize("changes", [
    dict(timesteps=(0.5,)), dict(timesteps=(0.8, 0.5)), dict(layers=(0.5,)), dict(flow_width=16), dict(flow_depth=1),
    dict(flow_steps=2), dict(demos_per_step=2), dict(flow_lr=1e-3), dict(seed=2), dict(max_new_tokens=4),
])  # fmt: skip
def test_every_flag_of_the_flow_changes_the_deviations(start, plain, changes):
    few = dict(flow_steps=2) | changes
    base = plain if "flow_steps" in changes else scored(start, flow_steps=2)
    assert not torch.allclose(scored(start, **few).D, base.D, rtol=1e-4)


def test_what_is_measured_at_the_start(start, plain):
    batch = replace(start.batch, columns=dict(deviation=plain.D))
    batch.old_logp, mask, lengths = plain.logp, batch.mask, batch.mask.sum(1)
    batch.columns["flow_reward"] = rlfr.flow_rewards(plain.D, mask, args())
    meter = Meter()
    rlfr.measure(meter, batch, 1.5, [8.0] + 30 * [2.0])
    found = meter.result()
    assert found["flow_loss"] == 1.5 and found["flow_before"] == 8 and found["flow_after"] == 2
    assert found["penalised"] == pytest.approx((batch.columns["flow_reward"] < 0).sum().item() / len(mask))
    assert found["flow_reward"] == pytest.approx(batch.columns["flow_reward"].sum().item() / len(mask))
    right = batch.accuracy == 1
    wins = [w > r for w in (plain.D.sum(1) / lengths)[~right] for r in (plain.D.sum(1) / lengths)[right]]
    assert found["auc_flow_all"] == pytest.approx(sum(wins).item() / len(wins)) and found["auc_flow_all"] > 0.6
    assert found["auc_logp_all"] > 0.8 and found["auc_short_all"] > 0.8
    some = lengths > lengths.max() / 2
    if (some & ~right).any():
        wins = [
            w > r for w in (-plain.logp.sum(1) / lengths)[some & ~right] for r in (-plain.logp.sum(1) / lengths)[some & right]
        ]
        assert found["auc_logp_long"] == pytest.approx(sum(wins).item() / len(wins))
    batch.policy_version.fill_(1)
    rlfr.measure(later := Meter(), batch, 1.5, [8.0])
    assert set(later.result()) == {"flow_loss", "deviation", "flow_reward", "penalised"}
    batch.policy_version.fill_(0)
    batch.accuracy = torch.ones_like(batch.accuracy)
    rlfr.measure(all_right := Meter(), batch, 1.5, [])
    assert set(all_right.result()) == {"flow_loss", "deviation", "flow_reward", "penalised"}
    assert rlfr.auc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == 0.875


# ---------------------------------------------------------------- where correct solutions come from


def test_solutions_of_a_file(start, tmp_path):
    rows = [dict(prompt="12+34=", answer="2+4=06 1+3+0=04:46"), dict(question="50+11=", answer="0+1=01 5+1+0=06:61")]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = rlfr.experts(start.task, start.tokenizer, args(expert=str(path)))
    assert [task.demonstrate(None, e, 1.0) for e in task.train] == [row["answer"] for row in rows]
    assert start.tokenizer.decode(task.train[1].ids) == "50+11="
    path.write_text(json.dumps(rows[0] | dict(answer=["46", "the 46"])) + "\n")  # any of several
    several = rlfr.experts(start.task, start.tokenizer, args(expert=str(path)))
    assert {several.demonstrate(random.Random(i), several.train[0], 1.0) for i in range(9)} == {"46", "the 46"}
    flow, _ = rlfr.make_flow(start.policy, start.args)
    a, run = replace(start.args, flow_steps=1), SimpleNamespace(stop=None)
    fit = [rlfr.flow_stage(start.policy, flow, t, start.tokenizer, a, run) for t in (task, start.task)]
    assert fit[0] != fit[1]


def test_a_task_without_solutions_is_refused(start, tmp_path):
    bare = replace(start.task, demonstrate=None)
    with pytest.raises(UserError, match="no correct solutions to fit the flow to; give some by --expert"):
        rlfr.experts(bare, start.tokenizer, args())
    assert rlfr.experts(bare, start.tokenizer, args(flow="scratch")) is bare
    rows = [dict(prompt=f"{i}+1=", answer=str(i + 1)) for i in range(9)]  # with answers, but not how to come by them
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="train.jsonl: no correct solutions"):
        rlfr.experts(tasks.load(str(tmp_path / "train.jsonl"), start.tokenizer, "{prompt}"), start.tokenizer, args())
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="no correct solutions"):
        rlfr.experts(start.task, start.tokenizer, args(expert=str(tmp_path / "none.jsonl")))


def test_the_fit_is_at_all_times_and_on_correct_solutions(start):
    """t = sigmoid(n) has its median at 1/2, and 0.269 and 0.731 one deviation away; each state has its own."""
    seen, told = [], []

    def demonstrate(rng, example, careful):
        told.append((start.task.demonstrate(rng, example, careful), example.answer))
        return told[-1][0]

    flow, _ = rlfr.make_flow(start.policy, start.args)
    flow.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    task, a = replace(start.task, demonstrate=demonstrate), replace(start.args, flow_steps=4)
    rlfr.flow_stage(start.policy, flow, task, start.tokenizer, a, SimpleNamespace(stop=None))
    assert len(told) == 32 and all(start.task.check(text, answer)[1] == 1 for text, answer in told)
    t = torch.cat(seen).flatten()
    assert len(t) == 3 * sum(len(text) + 1 for text, _ in told) == len(t.unique())
    wanted = torch.tensor([0.2689, 0.5, 0.7311])
    torch.testing.assert_close(t.quantile(torch.tensor([0.1587, 0.5, 0.8413])), wanted, atol=0.03, rtol=0)


def test_stopping_while_the_flow_is_fitted(start):
    flow, _ = rlfr.make_flow(start.policy, start.args)
    with pytest.raises(UserError, match="stopped"):
        rlfr.flow_stage(start.policy, flow, start.task, start.tokenizer, start.args, SimpleNamespace(stop=2))


# ---------------------------------------------------------------- runs


def test_a_run_and_grpo(tmp_path):
    """What is logged; and with nothing to pay it is GRPO, whatever the flow says."""
    arms = dict(it=(), free=("--flow", "scratch", "--beta-f", 0))
    rows, weights = {}, {}
    for name, more in arms.items():
        done = run(tmp_path, *SMALL, *more, "--run-dir", tmp_path / name, script=SCRIPT)
        assert done.code == 0, done.err
        rows[name] = lines(tmp_path / name / "metrics.jsonl")
        weights[name] = (tmp_path / name / "checkpoints" / "step-000002" / "model.safetensors").read_bytes()
    assert weights["it"] != weights["free"]
    one = rows["it"][0]
    assert one["flow_before"] > one["flow_after"] > 0 and one["flow_loss"] > 0 and 0 < one["penalised"] < 15
    assert -0.15 < one["flow_reward"] < 0 and {"auc_flow_all", "auc_logp_all", "auc_short_all"} <= set(one)
    assert "auc_flow_all" not in rows["it"][1] and "flow_before" not in rows["free"][0]
    assert one["deviation"] < rows["free"][0]["deviation"]
    assert one["accuracy"] == rows["free"][0]["accuracy"] and rows["free"][0]["flow_reward"] == 0
    done = run(tmp_path, *SMALL[:-4], "--model", "tiny-deep", "--run-dir", tmp_path / "grpo", script=ROOT / "algos" / "grpo.py")
    assert done.code == 0, done.err
    base = lines(tmp_path / "grpo" / "metrics.jsonl")
    for k in ("loss", "grad_norm", "accuracy", "entropy"):
        assert [r[k] for r in rows["free"]] == pytest.approx([r[k] for r in base], rel=1e-4, abs=1e-6)
    columns = lines(tmp_path / "it" / "samples.jsonl")[0]["columns"]
    assert set(columns) == {"logp", "adv", "deviation", "flow_reward"} and min(columns["flow_reward"]) < 0


def test_the_flow_and_its_optimizer_survive_a_resume(tmp_path):
    """With a rollout that waits, too: its deviations are those of the flow that it was sampled beside."""
    argv = [*SMALL, "--stale", 1, "--checkpoint-every", 1]
    for arguments in ([*argv, "--run-dir", tmp_path / "whole"], [*argv, "--steps", 1, "--run-dir", tmp_path / "parts"],
                      ["--resume", tmp_path / "parts", "--steps", 2]):  # fmt: skip
        done = run(tmp_path, *arguments, script=SCRIPT)
        assert done.code == 0, done.err
    a, b = outcome(tmp_path / "whole"), outcome(tmp_path / "parts")
    a.evals = b.evals = ""
    same(a, b)
    one, two = (contents(checkpoints(tmp_path / n)[-1]) for n in ("whole", "parts"))
    (weights, states), (again, same_states) = one["flow"], two["flow"]
    assert all(torch.equal(weights[k], again[k]) for k in weights) and len(one["state"]["fit"]) == 12
    assert one["state"]["fit"] == two["state"]["fit"] and len(one["queue"][0]) == len(two["queue"][0]) == 1
    for name, state in states.items():
        assert all(torch.equal(state[k], same_states[name][k]) for k in state)
        assert state["step"] == 3  # two rollouts before the first update, one before the second: the first fit's is another's


def test_a_flow_that_diverges_stops_the_run(tiny, tmp_path):
    """Its D would all be nan, and nothing would be paid, in silence."""
    small = "--prompts-per-step 4 --group-size 2 --eval-prompts 4 --steps 2 --flow-steps 8 --flow-lr 1e20".split()
    done = run(tmp_path, "--model", tiny, "--task", "addition", *small, script=ROOT / "algos" / "rlfr.py")
    assert "the flow has diverged" in user_error(done)
