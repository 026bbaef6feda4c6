"""T-PPO's worked numbers, what a window leaves open, the pool of slots and its order of prompts, and what a run logs."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import common.batch
from algos import ppo, t_ppo
from common import UserError, rollout, settings, tasks
from common.batch import Batch, Meter, collate
from tests.helpers import checkpoints, contents, lines, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
NAN = float("nan")
VALUES = torch.tensor([[0.5, 0.4, 0.7, 0.2]])
ALL = torch.ones(1, 4).bool()


def last_reward(value):
    return torch.tensor([[0.0, 0.0, 0.0, value]])


@pytest.mark.parametrize(
    "gamma, truncated, reward, terminal, row",
    [
        (1.0, True, 0.0, "bootstrap", [-0.235, -0.15, -0.5, 0.0]),
        (1.0, True, 0.0, "zero", [-0.3808, -0.312, -0.68, -0.2]),
        (1.0, False, 0.0, "bootstrap", [-0.3808, -0.312, -0.68, -0.2]),
        (1.0, False, 1.0, "bootstrap", [0.3482, 0.498, 0.22, 0.8]),
        (1.0, False, 1.0, "zero", [0.3482, 0.498, 0.22, 0.8]),
        (0.9, True, 0.0, "bootstrap", [-0.305501, -0.204322, -0.5362, -0.02]),
    ],
)
def test_extended_gae(gamma, truncated, reward, terminal, row):
    """Also beside a row of the other kind, and with garbage in two padded columns; and what it does to the loss."""
    args, cut = t_ppo.Args(gamma=gamma, lam=0.9, terminal=terminal), torch.tensor([truncated])
    adv = t_ppo.gae(last_reward(reward), VALUES, ALL, cut, args)
    torch.testing.assert_close(adv, torch.tensor([row]), **CLOSE)
    rewards, values = (torch.nn.functional.pad(x, (0, 2), value=NAN) for x in (last_reward(reward), VALUES))
    mask = torch.nn.functional.pad(ALL, (0, 2))
    both = t_ppo.gae(*(torch.cat([x, x]) for x in (rewards, values, mask)), torch.tensor([truncated, not truncated]), args)
    assert torch.equal(both[0, :4], adv[0]) and not both[:, 4:].any()
    assert torch.equal(both[1], both[0]) == (terminal == "zero")
    logp = torch.zeros(1, 4, requires_grad=True)
    objective, _ = t_ppo.surrogate(logp, torch.zeros(1, 4), adv, ALL, args)
    loss = -(objective * t_ppo.token_weights(ALL, args)).sum()
    loss.backward()
    assert loss.item() == pytest.approx(-sum(row) / 4, abs=1e-6)
    torch.testing.assert_close(logp.grad, -torch.tensor([row]) / 4, **CLOSE)


def test_the_critic_s_targets_are_the_score_of_finished_responses():
    """Two of them, a right one and a wrong one, and one that waits, whose values may be what they like."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    finished = mask & torch.tensor([True, True, False])[:, None]
    scores = ppo.token_rewards(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, 4), None, mask, t_ppo.Args())
    returns = t_ppo.value_targets(scores, mask, t_ppo.Args())
    assert returns.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    discounted = t_ppo.value_targets(scores, mask, t_ppo.Args(gamma=0.9))
    torch.testing.assert_close(discounted[0], torch.tensor([0.729, 0.81, 0.9, 1.0]), **CLOSE)
    values = torch.cat([VALUES, VALUES, 9 * VALUES]).requires_grad_()
    losses = t_ppo.value_loss(values, values.detach(), returns, mask, t_ppo.Args())
    loss = (losses * t_ppo.token_weights(finished, t_ppo.Args()))[mask].sum()
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 0.36 + 0.09 + 0.64 + 0.25 + 0.16) / 12, abs=1e-6)
    torch.testing.assert_close(values.grad[0], (VALUES[0] - 1) / 6, **CLOSE)
    torch.testing.assert_close(values.grad[1], torch.tensor([0.5, 0.4, 0, 0]) / 6, **CLOSE)
    assert not values.grad[2].any()


def test_monte_carlo_is_lambda_one():
    """Penalties on the way, a discount, a hole in the mask, garbage in it."""
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    rewards, values = (torch.randn(3, 5, generator=g).masked_fill(~mask, NAN) for _ in range(2))
    args = t_ppo.Args(gamma=0.9, lam=1.0)
    adv = t_ppo.gae(rewards, values, mask, torch.zeros(3).bool(), args)
    returns = t_ppo.value_targets(rewards, mask, args)
    torch.testing.assert_close(returns[mask], (adv + values)[mask])
    assert not returns[~mask].any()


def case(B=6, T=9, seed=0):
    """A rollout of ragged rows, of which every second is cut, and in each a first token that is not new."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(B, T, generator=g) for _ in range(2))
    mask = torch.arange(T) < torch.tensor([T - i for i in range(B)])[:, None]
    return rewards, values, mask, torch.arange(B) % 2 == 0, mask & (torch.arange(T) > 0)


def test_whitened_over_the_trained_tokens_alone():
    """At lambda 0 a token that is not trained on reaches no other one's advantage: not by the mean, not by the spread."""
    rewards, values, mask, cut, trained = case()
    args = t_ppo.Args(lam=0.0)
    adv, returns = t_ppo.advantages(rewards, values, mask, cut, trained, args)
    plain = t_ppo.gae(rewards, values, mask, cut, args)[trained]
    torch.testing.assert_close(adv[trained], (plain - plain.mean()) / plain.std(), rtol=1e-5, atol=1e-6)
    assert not adv[~trained].any() and torch.equal(returns, t_ppo.value_targets(rewards, mask, args))
    rewards[:, 0] = 1e6
    other, _ = t_ppo.advantages(rewards, values, mask, cut, trained, args)
    assert torch.equal(other, adv)


def test_earlier_windows_need_no_advantages_of_their_own():
    """Those of the new tokens do not depend on older ones, so nothing of them has to be kept."""
    rewards, values, mask, cut, _ = case()
    adv = t_ppo.gae(rewards, values, mask, cut, t_ppo.Args())
    later = t_ppo.gae(rewards[:, 3:], values[:, 3:], mask[:, 3:], cut, t_ppo.Args())
    assert torch.equal(adv[:, 3:], later)


def test_nothing_to_learn_from_is_zero():
    rewards, values, mask, cut, trained = case()
    for none in (mask & False, mask):
        adv, returns = t_ppo.advantages(0 * rewards, 0 * values, none, cut, none, t_ppo.Args())
        assert not adv.any() and not returns.any()
    adv, _ = t_ppo.advantages(rewards, values, mask, cut, trained & False, t_ppo.Args())
    assert not adv.any()


def test_without_a_cut_row_it_is_ppo():
    """The advantages, bit for bit."""
    rewards, values, mask, cut, _ = case()
    for more in (dict(), dict(gamma=0.9, lam=0.8), dict(lam=1.0)):
        theirs, _ = ppo.advantages(rewards, values, mask, ppo.Args(**more))
        for terminal in ("bootstrap", "zero"):
            args = t_ppo.Args(**more, terminal=terminal)
            mine, _ = t_ppo.advantages(rewards, values, mask, cut & False, mask, args)
            assert torch.equal(mine, theirs)
            assert torch.equal(t_ppo.advantages(rewards, values, mask, cut, mask, args)[0], theirs) == (terminal == "zero")


# ---------------------------------------------------------------- the pool


ARGS = SimpleNamespace(max_new_tokens=6, group_size=1, seed=3, policy_tokens="new", window=3)


def pool():
    """Ended; cut by the window of 3; at the cap of 6; cut by the window after one token; ended, right."""
    rows = [([5], [8, 2]), ([5, 6], [7, 8, 9]), ([5], [7] * 6), ([6, 7, 8], [4]), ([9], [3, 1, 2])]
    batch = collate(rows)
    batch.truncated = torch.tensor([False, True, True, True, False])
    batch.accuracy = torch.tensor([0.0, -2.0, -2.0, -2.0, 1.0])
    batch.reward = batch.accuracy + torch.tensor([0.0, 0.1, 0.0, 0.0, 0.1])  # one that waits was paid for its form
    batch.prompt_id = torch.tensor([20, 21, 22, 23, 24])
    batch.old_logp, batch.sampler_logp = -torch.rand(5, 6), -torch.rand(5, 6)
    batch.texts, batch.answers, batch.gold = list("abcde"), list("abcde"), list("vwxyz")
    return batch


def test_at_the_cap_of_all_a_response_is_finished():
    assert t_ppo.waiting(pool(), ARGS).tolist() == [False, True, False, True, False]


def test_who_waits_has_no_reward_and_teaches_no_critic():
    batch = pool()
    batch.trained = batch.mask & (torch.arange(6) > 0)
    new = batch.trained
    t_ppo.carry(batch, None, ARGS)
    torch.testing.assert_close(batch.reward, torch.tensor([0.0, 0.0, -2.0, 0.0, 1.1]))  # at the cap: what it was scored
    assert batch.columns["finished"].sum(1).tolist() == [2, 0, 6, 0, 3]
    assert torch.equal(batch.trained, new) and torch.equal(batch.columns["new"], new)
    batch.trained = new
    t_ppo.carry(batch, None, SimpleNamespace(**vars(ARGS) | dict(policy_tokens="all")))
    assert torch.equal(batch.trained, batch.mask) and torch.equal(batch.columns["new"], new)


@pytest.mark.parametrize("T", [4, 6, 8])
def test_old_tokens_keep_their_log_probs(T):
    """The batch is wider or narrower than the pool was, whose garbage behind a row's end is not carried."""
    before = pool()
    before.old_logp = before.old_logp.masked_fill(~before.mask, NAN)
    batch = collate([([5], [4]), ([5, 6], [7, 8, 9, 1][:T]), ([5], [1] * T), ([6, 7, 8], [4, 2]), ([9], [3])])
    begun = torch.tensor([0, 3, 0, 1, 0])[:, None]
    batch.trained = batch.mask & (torch.arange(T) >= begun)
    batch.truncated, batch.reward = torch.zeros(5).bool(), torch.zeros(5)
    fresh = torch.full((5, T), -9.0)
    batch.old_logp, batch.sampler_logp = fresh, 2 * fresh
    t_ppo.carry(batch, before, ARGS)
    for name, own in (("old_logp", -9.0), ("sampler_logp", -18.0)):
        found = getattr(batch, name)
        assert torch.equal(found[1, :3], getattr(before, name)[1, :3]) and found[3, 0] == getattr(before, name)[3, 0]
        assert (found[torch.arange(T) >= begun] == own).all()


def test_free_slots_get_the_next_prompts():
    """In the order of all slots, over two processes as in one; with groups each prompt as often as the group is large."""
    before = pool()
    free = ~t_ppo.waiting(before, ARGS)
    order = [SimpleNamespace(id=40 + i) for i in range(12)]
    known = [SimpleNamespace(id=i) for i in range(19, 30)]
    task = SimpleNamespace(train=known, order=lambda cursor, n, seed: order[cursor : cursor + n] if seed == 3 else None)
    for G, expected in ((1, [7, 8, 9]), (2, [3, 4, 4])):
        args = SimpleNamespace(**vars(ARGS) | dict(group_size=G))
        places = 7 + free.cumsum(0) - 1
        prompts, given = t_ppo.slots(before, free, places, task, args)
        assert [p.id for p in prompts] == [40 + expected[0], 21, 40 + expected[1], 23, 40 + expected[2]]
        assert given == [[], [7, 8, 9], [], [4], []]
        for part in (slice(0, 2), slice(2, 5)):
            mine = before.take(torch.arange(5)[part])
            some = t_ppo.slots(mine, free[part], places[part], task, args)
            assert [p.id for p in some[0]] == [p.id for p in prompts[part]] and some[1] == given[part]
        both = Batch.join([before.take(torch.arange(2)), before.take(torch.arange(2, 5))])  # as a resume with fewer processes
        assert t_ppo.slots(both, free, places, task, args)[1] == given
    first = t_ppo.slots(None, torch.ones(4).bool(), torch.arange(4), task, args)
    assert [p.id for p in first[0]] == [40, 40, 41, 41] and first[1] == [[]] * 4


def test_what_is_logged_is_of_finished_responses():
    batch = pool()
    batch.trained = batch.mask & (torch.arange(6) >= torch.tensor([0, 2, 3, 0, 0])[:, None])
    t_ppo.carry(batch, None, ARGS)
    batch.adv = torch.ones(5, 6)
    values, returns = torch.zeros(5, 6), torch.rand(5, 6)
    for rows in (torch.arange(5), torch.tensor([1, 3])):
        meter, some = Meter(), batch.take(rows)
        T = some.mask.shape[1]
        t_ppo.measure(meter, some, values[rows, :T], returns[rows, :T], ARGS, lambda x: x)
        found = meter.result()
        if len(rows) == 2:  # none is finished
            assert all(math.isnan(found[k]) for k in ("accuracy", "reward", "length", "versions"))
            assert "explained_variance" not in found and found["waiting"] == 1
    meter = Meter()
    t_ppo.measure(meter, batch, values, returns, ARGS, lambda x: x)
    found = meter.result()
    expected = dict(accuracy=-1 / 3, reward=-0.9 / 3, length=11 / 3, versions=4 / 3, generated=10, trained=10, waiting_tokens=4)
    expected |= dict(waiting=0.4, clock=3, utilisation=10 / 15)
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    mask = batch.columns["finished"]
    assert found["explained_variance"] == pytest.approx(ppo.explained_variance(values, returns, mask).item())
    seen = t_ppo.shown(batch)
    assert seen.texts == list("acebd") and seen.mask.sum(1).tolist() == [2, 3, 3, 1, 1]
    assert batch.texts == list("abcde") and batch.mask.sum(1).tolist() == [2, 3, 6, 1, 3]  # the pool is as it was


def test_flags_that_make_no_sense(tiny):
    for flags, word in ((dict(stale=1), "newest policy"), (dict(window=0), "--window must be at least 1")):
        with pytest.raises(UserError, match=word):
            settings.resolve(t_ppo.Args(**flags))
    assert settings.resolve(t_ppo.Args())[0].max_new_tokens == 38  # 13, 13 and 12 of them


# ---------------------------------------------------------------- runs


SMALL = dict(task="addition", steps=2, prompts_per_step=16, minibatches=2, eval_prompts=4, checkpoint_every=0)


def trained(script, folder, **flags):
    script.train(script.Args(**SMALL | flags, run_dir=str(folder)))
    return lines(folder / "metrics.jsonl")


def test_responses_go_on_in_the_next_step(tiny, tmp_path, monkeypatch):
    collect, seen, order = rollout.collect, [], []

    @functools.wraps(collect)
    def watched(engine, scorer, tokenizer, examples, args, step, given, *more):
        batch = collect(engine, scorer, tokenizer, examples, args, step, given, *more)
        order.extend(e.id for e, tokens in zip(examples, given) if not tokens)
        seen.append((examples, given, batch))
        return batch

    def weighed(batch, *more, value_weights):
        assert torch.equal(value_weights, batch.mask & ~t_ppo.waiting(batch, args)[:, None])
        return minibatches(batch, *more, value_weights=value_weights)

    args, minibatches = SimpleNamespace(max_new_tokens=28), common.batch.minibatches
    monkeypatch.setattr(rollout, "collect", watched)
    monkeypatch.setattr(common.batch, "minibatches", weighed)
    rows = trained(t_ppo, tmp_path / "run", steps=5, window=5, lr=1e-3, value_warmup=0)
    assert order == [e.id for e in tasks.load("addition").order(0, len(order), 1)]
    state = contents(checkpoints(tmp_path / "run")[-1])
    assert state["state"]["cursor"] == len(order) and len(state["queue"][0]) == 1
    assert torch.equal(state["queue"][0][0].ids, seen[-1][2].ids)
    went_on = 0
    for (_, _, old), (examples, given, new), row in zip(seen, seen[1:], rows[1:]):
        wait, T = t_ppo.waiting(old, args), old.mask.shape[1]
        assert [bool(tokens) for tokens in given] == wait.tolist()
        for i in wait.nonzero()[:, 0].tolist():
            n, tokens = len(given[i]), new.ids[i, -new.mask.shape[1] :]
            assert old.ids[i, -T:][: old.mask[i].sum()].tolist() == given[i] == tokens[:n].tolist()
            assert examples[i].id == old.prompt_id[i] and n < new.mask[i].sum() <= n + 5
            assert torch.equal(new.old_logp[i, :n], old.old_logp[i, :n]) and (new.columns["new"][i].nonzero() >= n).all()
            went_on += 1
        assert row["generated"] == new.columns["new"].sum() == row["tokens"] == row["trained"]
        assert row["waiting"] == t_ppo.waiting(new, args).float().mean() and row["clock"] <= 5
    assert went_on > 20 and max(r["versions"] or 0 for r in rows) > 1 and all(r["sampler_gap_max"] < 1e-4 for r in rows)
    done = ~t_ppo.waiting(seen[-1][2], args)
    assert rows[-1]["accuracy"] == pytest.approx(seen[-1][2].accuracy[done].mean().item())
    assert rows[-1]["length"] == pytest.approx(seen[-1][2].mask.sum(1)[done].float().mean().item())
    assert 0 < done.sum() < 16 and rows[-1]["truncated"] > rows[-1]["waiting"] - 1e-9


def test_a_window_as_long_as_the_cap_is_ppo(tiny, tmp_path, monkeypatch):
    """A whole run, bit for bit, once the critic's targets are made PPO's; and nobody waits."""
    gae, seen = t_ppo.gae, {}

    def remembered(rewards, values, *more):
        adv = gae(rewards, values, *more)
        seen["returns"] = adv + values
        return adv

    monkeypatch.setattr(t_ppo, "gae", remembered)
    monkeypatch.setattr(t_ppo, "value_targets", lambda rewards, mask, args: seen["returns"].masked_fill(~mask, 0.0))
    mine = trained(t_ppo, tmp_path / "mine", window=28, value_warmup=0)
    theirs = trained(ppo, tmp_path / "theirs")
    keys = [k for k in theirs[0] if not k.startswith("time/")]
    assert [{k: row[k] for k in keys} for row in mine] == [{k: row[k] for k in keys} for row in theirs]
    assert {row["waiting"] for row in mine} == {0} and {row["versions"] for row in mine} == {1} and theirs[1]["accuracy"] > 0
    weights = [(checkpoints(tmp_path / n)[-1] / "model.safetensors").read_bytes() for n in ("mine", "theirs")]
    assert weights[0] == weights[1]


def critic_head(folder):
    state = contents(checkpoints(folder)[-1])
    return next(w for name, w in state["critic"][0].items() if name.endswith("lm_head.weight"))


def test_in_the_warm_up_the_critic_alone_is_trained(tiny, tmp_path):
    for steps, still in ((1, True), (2, False)):
        folder = tmp_path / str(steps)
        row = trained(t_ppo, folder, steps=steps, value_warmup=1, lr=1e-3)[-1]
        a, b = load_file(f"{tiny}/model.safetensors"), load_file(checkpoints(folder)[-1] / "model.safetensors")
        assert all(torch.equal(a[k], b[k]) for k in a) == still and row["grad_norm"] > 0
    assert critic_head(tmp_path / "2").any()


def test_where_no_response_is_finished_the_critic_rests(tiny, tmp_path):
    """Neither its weights move, nor does its optimizer, which has made no step."""
    (row,) = trained(t_ppo, tmp_path / "run", steps=1, window=1, value_warmup=0)
    assert row["waiting"] == 1 and row["accuracy"] is row["reward"] is row["length"] is None
    assert row["value_loss"] == row["value_grad_norm"] == 0 and row["clock"] == 1 and row["tokens"] == 16
    assert not critic_head(tmp_path / "run").any()
    state = contents(checkpoints(tmp_path / "run")[-1])
    assert not state["critic"][1] and row["skipped_updates"] == 0
