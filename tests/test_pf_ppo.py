"""PF-PPO's worked numbers, its filters against their weights, the artificial reward model, PPO as a limit, what runs log."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from algos import pf_ppo
from common import gpu, settings
from tests.helpers import ROOT, lines, outcome, run, tiny
from tests.test_every_script import halves

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
FILTERS = ("none", "bon", "br", "bw", "pow")
REWARDS = torch.tensor([[0.9, 0.2, -0.1, -0.8, 0.4], [0.85, 0.1, -0.2, -0.9, 0.3]], dtype=torch.float64)
SCORES = torch.tensor([[1.0, 0, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.float64)
SMALL = "--task addition --steps 2 --prompts-per-step 8 --minibatches 2 --eval-prompts 8 --checkpoint-every 0".split()


def chance(n, seed=0):
    return [torch.Generator().manual_seed(gpu.hash_seed(seed, i)) for i in range(n)]


def keep(rewards, seed=0, **changes):
    return pf_ppo.selection(rewards, chance(len(rewards), seed), pf_ppo.Args(**changes))


def test_worked_numbers():
    weights = {kind: pf_ppo.selection_weights(REWARDS, kind) for kind in FILTERS}
    torch.testing.assert_close(weights["br"][0], torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125]).double(), **CLOSE)
    assert weights["bw"].tolist() == [[0.5, 0, 0, 0.5, 0]] * 2 and weights["bon"].tolist() == [[1, 0, 0, 0, 0]] * 2
    torch.testing.assert_close(weights["pow"][0], torch.tensor([0.81, 0.04, 0.01, 0.64, 0.16]).double(), **CLOSE)
    cubes = torch.tensor([0.729, 0.008, 0.001, 0.512, 0.064]).double()
    torch.testing.assert_close(pf_ppo.selection_weights(REWARDS, "pow", 3)[0], cubes, **CLOSE)
    assert weights["none"].tolist() == [[1.0] * 5] * 2
    found = {kind: pf_ppo.r_squared(REWARDS, SCORES, w) for kind, w in weights.items()}
    assert found["none"] == pytest.approx(0.389482, abs=1e-6) and found["bw"] == pytest.approx(0.997904, abs=1e-6)
    assert found["br"] == pytest.approx(0.591667, abs=1e-6) and math.isnan(found["bon"])


def test_r_squared_is_that_of_a_least_squares_fit_of_repeated_points():
    """Weights of 1/5 and 4/5 are points that are there once and four times; prompts weigh alike, whatever theirs add up to."""
    R, s = torch.tensor([[0.3, -0.7], [0.5, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    x = torch.tensor([0.3, -0.7, -0.7, -0.7, -0.7, 0.5, 0.5, 0.5, 0.5, 0.1])
    y = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5])
    line = torch.stack([x, torch.ones(10)], 1).double()
    fit = torch.linalg.lstsq(line, y.double()[:, None]).solution
    expected = 1 - (y - (line @ fit)[:, 0]).square().sum() / (y - y.mean()).square().sum()
    weights = torch.tensor([[1.0, 4.0], [0.8, 0.2]])
    assert pf_ppo.r_squared(R, s, weights) == pytest.approx(expected.item(), abs=1e-6)


def test_r_squared_of_what_has_none():
    same, ones = torch.full((2, 5), 0.1 + 0.2), torch.ones(2, 5)
    assert math.isnan(pf_ppo.r_squared(REWARDS, same, ones))
    assert pf_ppo.r_squared(same, SCORES, ones) == 0  # the line is level and leaves all the spread
    assert math.isnan(pf_ppo.r_squared(*[torch.zeros(0, 5)] * 3))
    assert pf_ppo.r_squared(-REWARDS, REWARDS, ones) == pytest.approx(1)


@pytest.mark.parametrize("row, best, worst", [([0, -1, 0, -1, 0], 4, 1), ([0.5] * 5, 4, 0), ([1, 1, 1, 0, 1], 4, 3)])
def test_of_equal_rewards_one_is_best_and_one_worst(row, best, worst):
    """The last and the first of them."""
    rewards = torch.tensor([row], dtype=torch.float32)
    assert pf_ppo.selection_weights(rewards, "bw").nonzero()[:, 1].tolist() == sorted([best, worst])
    assert pf_ppo.selection_weights(rewards, "bon").nonzero()[:, 1].tolist() == [best]
    assert keep(rewards, filter="bw").tolist() == [sorted([best, worst])] and keep(rewards, filter="bon").tolist() == [[best]]
    for seed in range(8):
        assert best in keep(rewards, seed, filter="br")[0]


@pytest.mark.parametrize("kind", FILTERS)
def test_a_filter_keeps_what_its_weights_say(kind):
    """On average over prompts; and none but pow keeps one completion twice."""
    rewards = REWARDS[:1].expand(4000, 5)
    index = keep(rewards, filter=kind)
    assert index.shape == (4000, 1 if kind == "bon" else 2) and torch.equal(index, index.sort(1).values)
    weights = pf_ppo.selection_weights(REWARDS[:1], kind)[0]
    share = torch.bincount(index.flatten(), minlength=5) / index.numel()
    torch.testing.assert_close(share.double(), weights / weights.sum(), rtol=0, atol=0.02)
    if kind != "bon":
        assert (index[:, 0] == index[:, 1]).any() == (kind == "pow")


def test_a_choice_depends_on_its_own_prompt_alone():
    for kind in FILTERS:
        both = keep(REWARDS, filter=kind)
        second = pf_ppo.selection(REWARDS[1:], chance(2)[1:], pf_ppo.Args(filter=kind))
        assert torch.equal(both[1:], second)
    many = REWARDS[:1].expand(64, 5)
    for kind in ("none", "br", "pow"):
        assert not torch.equal(keep(many, 0, filter=kind), keep(many, 1, filter=kind))


def test_numbers_kept():
    everything = [[0, 1, 2, 3, 4]] * 2
    for kind in ("none", "br", "bw"):
        assert keep(REWARDS, filter=kind, keep=5).tolist() == keep(REWARDS, filter=kind, keep=9).tolist() == everything
    for seed in range(8):
        assert {0, 3} < set(keep(REWARDS[:1], seed, filter="bw", keep=4)[0].tolist())
    assert keep(REWARDS, filter="bon", keep=4).tolist() == [[0], [0]]
    assert {tuple(keep(REWARDS[:1], seed, filter="bw", keep=1)[0].tolist()) for seed in range(20)} == {(0,), (3,)}
    assert keep(REWARDS[:, :1], filter="bw").tolist() == [[0], [0]]  # a group of one
    assert keep(REWARDS.expand(2, 5), filter="br", keep=3).shape == (2, 3)


def test_pow_of_rewards_that_are_nothing_or_very_much():
    """All 0: any of them; a score of one's own may be large."""
    zeros = torch.zeros(400, 5)
    assert pf_ppo.selection_weights(zeros, "pow").tolist() == [[1.0] * 5] * 400
    assert torch.bincount(keep(zeros, filter="pow").flatten(), minlength=5).min() > 100
    huge = torch.tensor([[1e29, 0.0, -1.0, 0.0, 0.0]])
    assert keep(huge, filter="pow", power=8.0).tolist() == [[0, 0]]
    flat = keep(REWARDS[:1].expand(2000, 5), filter="pow", power=0.0).flatten().bincount(minlength=5)
    assert flat.min() > 700  # power 0: no preference
    assert keep(REWARDS[:1].expand(2000, 5), filter="pow", power=8.0).flatten().bincount(minlength=5)[4] < 40


def scored(rows, group=1, bonus=0.0):
    """(answer, gold, accuracy) of every completion -> what of a batch is read."""
    answers, gold, accuracy = zip(*rows)
    accuracy = torch.tensor(accuracy)
    return SimpleNamespace(answers=answers, gold=gold, accuracy=accuracy, reward=accuracy + bonus, group=group)


@pytest.mark.parametrize(
    "answer, gold, accuracy, q",
    [
        ("123", "123", 1.0, 1.0), ("122", "123", 0.0, 1 / 3), ("113", "123", 0.0, 1 / 3), ("999", "123", 0.0, -1.0),
        ("23", "123", 0.0, 1 / 3), ("0123", "123", 0.0, 0.5), ("3", "123", 0.0, -1 / 3), ("", "123", 0.0, -1.0),
        (None, "123", 0.0, -1.0), ("-7", "-7", 1.0, 1.0), ("7", "-7", 0.0, 0.0), ("1.5", "2.5", 0.0, 1 / 3),
        ("13", "so 5 + 7 = 12\n#### 12", 0.0, 0.0), ("12.0", "12", 1.0, 1.0),  # gsm8k's gold; another spelling
        ("72", "40>72:", 0.0, -1.0), ("72", "40>72:", 1.0, 1.0), ("x+1", "x+2", 0.0, -1.0), ("12", ("12", "21"), 1.0, 1.0),
        ("12", "12", 0.0, 1.0),  # cut before its end: it reads well
        ("9", "12", -3.0, -1.0), ("9", "12", 7.0, 1.0), ("9", "12", 0.5, 0.0),  # scores of one's own
    ],
)  # fmt: skip
def test_quality(answer, gold, accuracy, q):
    found = pf_ppo.quality(scored([(answer, gold, accuracy)]))
    assert found.tolist() == pytest.approx([q], abs=1e-6) and found.dtype == torch.float32


def test_the_noise_is_widest_in_the_middle():
    """q = 1, 0 and -1 for a thousand prompts each."""
    batch = scored([("12", "12", 1.0), ("13", "12", 0.0), ("99", "12", 0.0)] * 1000, group=3)

    def rewards(seed=0, batch=batch, **changes):
        return pf_ppo.noisy_reward(batch, chance(1000, seed), pf_ppo.Args(**changes)).view(-1, 3).T

    assert pf_ppo.noisy_reward(batch, chance(1000), pf_ppo.Args(noise="none")) is batch.reward
    best, middle, worst = rewards(noise="middle", sigma=0.2)
    assert (best == 1).all() and (worst == -1).all()
    assert middle.std().item() == pytest.approx(0.2, rel=0.1) and abs(middle.mean().item()) < 0.03
    thirds = scored([("113", "123", 0.0)] * 3000, group=3)  # q = 1/3: the noise is 8/9 as wide
    near = pf_ppo.noisy_reward(thirds, chance(1000), pf_ppo.Args(noise="middle", sigma=0.2)).view(-1, 3)[:, 1]
    torch.testing.assert_close(near, 1 / 3 + 8 / 9 * middle, rtol=0, atol=1e-5)
    uniform = rewards(noise="uniform", sigma=0.2)
    assert torch.equal(uniform[1], middle) and uniform[0].min() < 0.7 and uniform.max() == 1 and uniform.min() == -1
    assert (rewards(noise="uniform", sigma=0.0).T == torch.tensor([1.0, 0, -1])).all()
    wide = rewards(noise="middle", sigma=0.8)[1]
    assert wide.max() == 1 and wide.min() == -1 and not torch.equal(wide, rewards(1, noise="middle", sigma=0.8)[1])
    praised = scored([("12", "12", 1.0), ("13", "12", 0.0), ("99", "12", 0.0)] * 1000, group=3, bonus=0.25)
    torch.testing.assert_close(rewards(0, praised, noise="middle", sigma=0.8)[1], wide + 0.25)
    two = SimpleNamespace(**{k: v[3:6] if k != "group" else v for k, v in vars(batch).items()})
    alone = pf_ppo.noisy_reward(two, chance(2)[1:], pf_ppo.Args(noise="middle", sigma=0.2))
    assert torch.equal(alone[1], middle[1])


def test_presets():
    args, _ = settings.resolve(pf_ppo.Args())
    assert (args.task, args.noise, args.prompts_per_step, args.group_size) == ("addition", "middle", 52, 5)
    assert pf_ppo.Args.real_preset == dict(noise="none")
    for flag, value in dict(keep=0, power=9.0, sigma=-1.0, filter="best").items():
        with pytest.raises(settings.UserError, match=f"--{flag}"):
            settings.resolve(pf_ppo.Args(**{flag: value}))


def test_all_of_them_with_their_true_rewards_is_ppo(tiny, tmp_path):
    ours = ["--filter", "none", "--keep", 5, "--noise", "none", "--format-reward", 0.1]
    theirs = ["--group-size", 5, "--format-reward", 0.1]
    for name, argv in (("pf_ppo", ours), ("ppo", theirs)):
        done = run(tmp_path, *SMALL, *argv, "--run-dir", tmp_path / name, script=ROOT / "algos" / f"{name}.py")
        assert done.code == 0, done.err
    a, b = outcome(tmp_path / "pf_ppo"), outcome(tmp_path / "ppo")
    more = {"equal_prompts", "distinct_kept", "gap"}
    rows = [[json.loads(row) for row in x.metrics] for x in (a, b)]
    assert all(p.keys() - q.keys() == more and q.keys() <= p.keys() for p, q in zip(*rows))
    assert [{k: v for k, v in row.items() if k not in more} for row in rows[0]] == rows[1]
    assert (a.evals, a.samples, a.weights) == (b.evals, b.samples, b.weights) and rows[1][0]["grad_norm"] > 0
    assert [row["distinct_kept"] for row in rows[0]] == [40, 40]


@pytest.fixture
def watched(monkeypatch):
    """What seeds, measure and advantages had in a run in this process."""
    seen = SimpleNamespace(seeds=[], chosen=[], adv=[])
    hash_seed, measure, advantages = gpu.hash_seed, pf_ppo.measure, pf_ppo.advantages

    def hashed(*numbers):
        if numbers[-1] == 19:
            seen.seeds.append(numbers)
        return hash_seed(*numbers)

    def measured(run, batch, index):
        seen.chosen.append((dataclasses.replace(batch), index))
        return measure(run, batch, index)

    def advised(scores, values, mask, args):
        seen.adv.append((scores, mask, *advantages(scores, values, mask, args)))
        return seen.adv[-1][2:]

    monkeypatch.setattr(gpu, "hash_seed", hashed)
    monkeypatch.setattr(pf_ppo, "measure", measured)
    monkeypatch.setattr(pf_ppo, "advantages", advised)
    return seen


@pytest.mark.parametrize("kind", ["bw", "pow"])
def test_a_run_is_on_what_is_kept(watched, tiny, tmp_path, kind):
    """Advantages are whitened over the kept completions, which have the rewards of the noisy model; the log is of all."""
    small = dict(task="addition", steps=2, prompts_per_step=8, minibatches=2, eval_prompts=8, checkpoint_every=0)
    pf_ppo.train(pf_ppo.Args(**small, filter=kind, run_dir=str(tmp_path / "run")))
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(watched.adv) == len(rows) == 2
    for row, (batch, index), (scores, mask, adv, _) in zip(rows, watched.chosen, watched.adv):
        assert len(batch.reward) == 40 and len(mask) == 16 == index.numel()
        assert adv[mask].mean().item() == pytest.approx(0, abs=1e-5) and adv[mask].var().item() == pytest.approx(1, abs=1e-3)
        groups, accuracy = batch.reward.view(8, 5), batch.accuracy
        torch.testing.assert_close(scores.sum(1), groups.gather(1, index).flatten())
        assert set(accuracy.tolist()) <= {0.0, 1.0} and not torch.equal(groups.flatten(), accuracy)
        assert row["accuracy"] == pytest.approx(accuracy.mean().item()) and row["reward"] == pytest.approx(groups.mean().item())
        assert row["gap"] == pytest.approx(row["reward"] - 2 * row["accuracy"] + 1)
        assert row["equal_prompts"] == sum(len(set(g.tolist())) == 1 for g in groups)
        assert row["distinct_kept"] == sum(len(set(i.tolist())) for i in index)
        if kind == "bw":
            kept = groups.gather(1, index).sort(1).values
            assert torch.equal(kept[:, 0], groups.min(1).values) and torch.equal(kept[:, 1], groups.max(1).values)
            assert row["distinct_kept"] == 16
    ids = [batch.prompt_id[::5].tolist() for batch, _ in watched.chosen]
    assert watched.seeds == [(1, step, i, 19) for step in (0, 1) for i in ids[step]]
    first = watched.chosen[0][0]
    table = json.loads((tmp_path / "run" / "r2.json").read_text())
    for name in FILTERS:
        weights = pf_ppo.selection_weights(first.reward.view(8, 5).double(), name)
        expected = pf_ppo.r_squared(first.reward.view(8, 5), first.accuracy.view(8, 5), weights)
        assert table[name] == (None if math.isnan(expected) else pytest.approx(expected))


def test_what_waits_in_the_queue_survives(tiny, tmp_path):
    rows = halves("pf_ppo", tmp_path, 2, "--task", "addition", "--stale", 1)
    assert [row["staleness"] for row in rows] == [0, 1] and all(row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / "parts" / "r2.json").read_bytes() == (tmp_path / "whole" / "r2.json").read_bytes()
