"""POAD's worked numbers and limits, the door and its exact values, written episodes, the critic, and what a run logs."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch

from algos import grpo, poad, ppo
from common import UserError, gpu, models, settings
from common.worlds import tiny as tiny_models
from tests.card import loss_and_gradient
from tests.helpers import ROOT, checkpoints, contents, lines, run

CLOSE = dict(rtol=0, atol=1e-6)
NAN = float("nan")


def args(**changes):
    return poad.Args(**dict(gamma_a=0.9, lam=0.5, horizon=2) | changes)


def episode(*steps, width=4, last=NAN, **changes):
    """Steps (values of its tokens, reward, goes on) of one episode -> its advantages, a list a step. The rest is garbage."""
    S = len(steps)
    mask = torch.tensor([[j < len(v) for j in range(width)] for v, _, _ in steps])
    values, rewards = (torch.full((S, width), NAN, dtype=torch.float64) for _ in range(2))
    for s, (v, r, _) in enumerate(steps):
        values[s, : len(v)], rewards[s, : len(v)] = torch.tensor(v, dtype=torch.float64), 0.0
        if v:
            rewards[s, len(v) - 1] = r
    cont, last = torch.tensor([[c for _, _, c in steps]]), torch.tensor([last], dtype=torch.float64)
    adv = poad.gae(rewards[None], values[None], last, cont, mask[None], args(**changes))[0]
    assert adv.shape == mask.shape and not adv[~mask].any()
    return [row[: len(v)].tolist() for row, (v, _, _) in zip(adv, steps)]


def near(found, wanted):
    assert len(found) == len(wanted)
    for row, right in zip(found, wanted):
        assert row == pytest.approx(right, abs=1e-6)


# ---------------------------------------------------------------- the two discounts

FIRST, SECOND = ([0.2, 0.5, 0.4], 0.0, True), ([0.1, 0.6], 1.0, False)


def test_worked_numbers():
    near(episode(FIRST, SECOND), [[0.25125, -0.0975, 0.005], [0.7, 0.4]])
    near(episode(FIRST, SECOND, gamma_w=0.9), [[0.180723, -0.15395, -0.031], [0.62, 0.4]])
    near(episode((FIRST[0], 0.0, False), SECOND)[:1], [[0.15, -0.3, -0.4]])  # what comes after an end is another's


def test_worked_returns():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    values = torch.tensor([[0.2, 0.5, 0.4, NAN], [0.1, 0.6, NAN, NAN]])
    logp, cont, last = torch.full((2, 4), -1.0), torch.tensor([True, False]), torch.tensor([NAN, NAN])
    rewards = poad.token_rewards(torch.tensor([0.0, 1.0]), logp, None, mask, args())
    adv, returns = poad.advantages(rewards, values, last, cont, mask, args())
    torch.testing.assert_close(adv, torch.tensor([[0.25125, -0.0975, 0.005, 0], [0.7, 0.4, 0, 0]]), **CLOSE)
    torch.testing.assert_close(returns, torch.tensor([[0.45125, 0.4025, 0.405, 0], [0.8, 1.0, 0, 0]]), **CLOSE)
    on, half = (
        torch.tensor([True, True]),
        torch.tensor([0.5, 0.5]),
    )  # a second episode, which goes on, and does not meet the first
    both = [torch.cat(x) for x in ((rewards, rewards), (values, values), (last, half), (cont, on), (mask, mask))]
    more = torch.tensor([[0.276563, -0.046875, 0.10625, 0], [0.925, 0.85, 0, 0]])
    torch.testing.assert_close(poad.advantages(*both, args())[0], torch.cat([adv, more]), **CLOSE)


@pytest.mark.parametrize("lengths", [(1, 1), (4, 2), (2, 4)])
def test_without_a_critic_an_action_is_worth_the_same_however_long_it_is(lengths):
    """Zero values and lambda 1: r everywhere in the last action, gamma_a r in the one before; NTPO has gamma to the tokens."""
    n, m = lengths
    steps = ([0.0] * n, 0.0, True), ([0.0] * m, 1.0, False)
    near(episode(*steps, lam=1), [[0.9] * n, [1.0] * m])
    near(
        episode(*steps, lam=1, gamma_w=0.9),
        [[0.9 ** (n + m - 1 - j) for j in range(n)], [0.9 ** (m - 1 - j) for j in range(m)]],
    )


def test_what_comes_after_the_window():
    """Bootstrapped from V of the next observation where the episode goes on, and only there."""
    more = [0.1, 0.6], 1.0, True
    near(episode(FIRST, more, last=0.5), [[0.276563, -0.046875, 0.10625], [0.925, 0.85]])
    over = episode(FIRST, SECOND, last=123.0)
    assert over == episode(FIRST, SECOND, last=NAN)


def test_steps_that_were_not_made_and_padding_change_nothing():
    near(episode(FIRST, SECOND, ([], NAN, False), ([], NAN, False), width=7), [*episode(FIRST, SECOND), [], []])
    none = torch.zeros(2, 3, 4).bool()
    garbage = torch.full((2, 3, 4), NAN)
    adv = poad.gae(garbage, garbage, torch.tensor([NAN, NAN]), none.any(2), none, args())
    assert not adv.any() and adv.shape == none.shape


@pytest.mark.parametrize("gamma_a, gamma_w", [(0.3, 1.0), (0.95, 0.8)])
def test_episodes_of_one_action_are_ppo_s(gamma_a, gamma_w):
    """Where time never passes it is PPO, with the discount of tokens: bit for bit."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(2, 6, 5, generator=g)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 0, 2, 4])[:, None]
    over, last = torch.zeros(6).bool(), torch.full((6,), NAN)
    mine, returns = poad.advantages(rewards, values, last, over, mask, args(horizon=1, gamma_a=gamma_a, gamma_w=gamma_w))
    theirs = ppo.gae(rewards, values, mask, ppo.Args(gamma=gamma_w, lam=0.5))
    assert torch.equal(mine, theirs) and torch.equal(returns, (theirs + values).masked_fill(~mask, 0.0))


# ---------------------------------------------------------------- losses


def test_advantages_are_standardised_over_tokens_zeros_among_them():
    adv, mask = torch.tensor([[1.0, 0.0, -3.0], [6.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    centred = torch.tensor([[0.0, -1.0, -4.0], [5.0, 0.0, 0.0]])
    found = poad.standardised(adv, mask, args())
    torch.testing.assert_close(found, centred / 10.5**0.5, **CLOSE)
    small = poad.standardised(0.01 * adv, mask, args())
    torch.testing.assert_close(small, 0.01 * centred / 0.2, **CLOSE)  # the floor
    torch.testing.assert_close(poad.standardised(0.01 * adv, mask, args(std_floor=0.0)), found, rtol=0, atol=1e-5)
    shifted = poad.standardised((adv + 5).masked_fill(~mask, 0.0), mask, args())
    torch.testing.assert_close(shifted, found, **CLOSE)
    for floor in (0.0, 0.2):
        equal = poad.standardised(mask * 0.5, mask, args(std_floor=floor))
        assert not equal.any() and not poad.standardised(mask * 0.0, mask & False, args(std_floor=floor)).any()


def test_policy_loss_is_ppo_s():
    loss, grad = loss_and_gradient(poad, poad.Args())
    assert loss == pytest.approx(-0.298793, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[0, -0.082764, -0.163366, 0], [0, 0.214004, 0, 0]]), **CLOSE)
    assert not torch.equal(grad, loss_and_gradient(poad, poad.Args(eps=0.7))[1])


def test_the_law_and_its_gradient():
    """Entropy of (1/2, 1/4, 1/4): 1.5 ln 2. Its gradient with respect to a logit is -p (ln p + H)."""
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    logp, entropy = poad.logp_and_entropy(torch.tensor([1]), logits)
    assert logp.item() == pytest.approx(-1.386294, abs=1e-6) and entropy.item() == pytest.approx(1.039721, abs=1e-6)
    (grad,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    torch.testing.assert_close(grad, torch.tensor([[-0.173287, 0.086643, 0.086643]], dtype=torch.float64), **CLOSE)
    (grad,) = torch.autograd.grad(logp, logits)
    torch.testing.assert_close(grad, torch.tensor([[-0.5, 0.75, -0.25]], dtype=torch.float64), **CLOSE)


def test_value_loss():
    """The larger of plain and clipped, like PPO's; without clipping the plain one."""
    values = torch.tensor([[0.5, 0.5, NAN]], requires_grad=True)
    old, returns, mask = torch.tensor([[0.2, 0.45, NAN]]), torch.tensor([[0.9, 0.0, NAN]]), torch.tensor([[1, 1, 0]]).bool()
    for eps, wanted, slope in ((0.2, [0.125, 0.125, 0], [0, 0.5, 0]), (0.0, [0.08, 0.125, 0], [-0.4, 0.5, 0])):
        loss = poad.value_loss(values, old, returns, mask, args(eps_value=eps))
        torch.testing.assert_close(loss, torch.tensor([wanted]), **CLOSE)
        (grad,) = torch.autograd.grad(loss.sum(), values)
        torch.testing.assert_close(grad, torch.tensor([slope]), **CLOSE)


def test_the_kl_estimate_is_of_the_rollout_s_policy():
    """k3 of samples of pi_old: r - 1 - ln r."""
    old, new, mask = torch.tensor([[-1.0, -2.0, NAN]]), torch.tensor([[-1.5, -1.5, NAN]]), torch.tensor([[1, 1, 0]]).bool()
    found = poad.kl_penalty(old, new, mask)
    torch.testing.assert_close(found, torch.tensor([[0.106531, 0.148721, 0.0]]), **CLOSE)
    assert torch.equal(found, grpo.kl_penalty(old, new, mask))


# ---------------------------------------------------------------- the door


def test_the_door():
    door = poad.Door()
    assert door.reset(7) == "door closed item out 5:"
    assert door.step("put") == ("door closed item out 4:", 0.0, False)
    assert door.step("open") == ("door open item out 3:", 0.0, False)
    assert door.step("open") == ("door open item out 2:", 0.0, False) and door.step("put")[0] == "door open item in 1:"
    assert door.step("close") == ("done", 1.0, True)
    assert door.reset(7) == "door closed item out 5:" and [door.step("")[1] for _ in range(5)] == [0, 0, 0, 0, -1]
    long = poad.Door(2)
    assert long.step("open")[0] == "door closed item out 4:" and long.step("open open")[0] == "door open item out 3:"
    assert len(poad.Door.STATES) == 12


def test_exact_values():
    """An action in three at random: three moves within five steps in 51 of 243 cases."""
    seen = [poad.Door(1, *state).seen() for state in poad.Door.STATES]
    third, sure, never = ({text: p for text in seen} for p in (1 / 3, 1.0, 0.0))
    assert poad.Door().value(third, 1.0) == pytest.approx(2 * 51 / 243 - 1)
    assert poad.Door().value(sure, 0.95) == pytest.approx(0.95**2)
    assert poad.Door().value(never, 0.95) == pytest.approx(-(0.95**4))
    assert poad.Door(4, 2, 1).value(third, 0.5) == pytest.approx(1 / 3 - 2 / 3)
    assert poad.Door(4, 1, 2).value(third, 0.9) == pytest.approx(0.9 * (1 / 3 * (1 / 3 - 2 / 3) - 2 / 3))


@pytest.mark.parametrize("times", [1, 2, 4])
def test_the_task_of_the_door(times):
    make, task = poad.environment(f"door:{times}" if times > 1 else "door")
    assert make().moves[1] == " ".join(["put"] * times) and len(task.train) == 12 and make() is not make()
    told = [task.demonstrate(random.Random(i), e, 1.0) for i in range(60) for e in task.train]
    assert set("".join(told) + "".join(e.prompt for e in task.train)) <= set(tiny_models.CHARACTERS)
    actions = [text.split("\n")[0] for text in told]
    assert {actions.count(a) / len(actions) for a in make().moves} <= {x / 720 for x in range(200, 280)}
    assert {text.split("\n")[1] for text in told} >= {"late", "done", "door open item in 2:"}
    assert max(map(len, actions)) + 1 <= settings.TINY["max_new_tokens"]


ROOM = """
import door_words

class Room:
    def reset(self, seed):
        self.n = door_words.START
        return f"n {seed % 10}:"

    def step(self, text):
        self.n += 1
        return f"said {len(text)}:", self.n / 10, self.n == 3

class Broken:
    def reset(self, seed):
        raise ValueError("no rooms left")
"""


def test_an_environment_of_ones_own(tmp_path):
    (tmp_path / "door_words.py").write_text("START = 1\n")
    (tmp_path / "room.py").write_text(ROOM)
    make, task = poad.environment(f"{tmp_path}/room.py:Room")
    room = make()
    assert (room.reset(13), room.step("ab"), room.step("")) == ("n 3:", ("said 2:", 0.2, False), ("said 0:", 0.3, True))
    assert [e.prompt for e in task.train] == ["n 0:"] and task.demonstrate is None
    wrong = {"room.py:Hall": "Hall", "none.py:Room": "No such file", "room.py:Broken": "no rooms left"}
    wrong = {f"{tmp_path}/{spec}": why for spec, why in wrong.items()}
    for spec, why in (wrong | dict.fromkeys(["door:0", "door:5", "door:x", "addition"], "")).items():
        with pytest.raises(UserError, match=f"--task {spec}: needs door, door:2 to door:4, or file.py:Class .*{why}"):
            poad.environment(spec)


# ---------------------------------------------------------------- episodes

TOKENIZER, CUT = tiny_models.characters(), ("open", "op")


class Written:
    """An engine whose actions are written down, the texts of each call. They end by a line break or <eos>; some were cut."""

    name, device = "hf", torch.device("cpu")

    def __init__(self, *calls):
        self.calls, self.asked = list(calls), []

    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        self.asked.append(([TOKENIZER.decode(p) for p in prefixes], n, temperature, seeds))
        texts = self.calls.pop(0) if prefixes else []
        assert len(texts) == len(prefixes)
        ids = [TOKENIZER(text)["input_ids"] + [1] * (text not in CUT and text[-1:] != "\n") for text in texts]
        return [(y, [-0.5] * len(y), text not in CUT) for y, text in zip(ids, texts)]


def encode(texts):
    return [TOKENIZER(text)["input_ids"] for text in texts]


def played(engine, numbers=(0, 1, 2), **changes):
    a = args(**dict(horizon=5, max_new_tokens=8, seed=1) | changes)
    return a, *poad.play(poad.Door, engine, encode, TOKENIZER, numbers, a, 4, 0.7)


SCRIPT = (
    ["open\n", "open", ""],
    ["put\n", "put\n", "put open"],
    ["close\n", "no\n", "open\n"],
    ["x\n", "put\n"],
    ["close\n", "op"],
)


def test_episodes():
    """The first ends after three steps; the second's `open` was cut, and is carried out; the third begins with none."""
    engine = Written(*SCRIPT)
    a, rows, seen = played(engine)
    assert len(rows) == 15 and seen == encode(["done", "done", "late"])
    batch, after = poad.assemble(rows, seen, TOKENIZER, engine, a, 9)
    assert after.mask.tolist() == [[True]] * 3 and after.ids[:, -1].tolist() == [1] * 3
    assert batch.group == 5 and batch.mask.sum(1).tolist() == [5, 4, 6, 0, 0, 4, 4, 3, 2, 6, 1, 9, 5, 4, 2]
    assert batch.reward.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1]
    assert batch.accuracy.tolist() == [1.0] * 10 + [-1.0] * 5
    assert batch.columns["cont"].tolist() == [True, True, False, False, False] + [True, True, True, True, False] * 2
    assert batch.truncated.tolist() == [i in (5, 14) for i in range(15)] and not batch.trained[batch.mask.sum(1) == 0].any()
    prompts, actions = (TOKENIZER.batch_decode(x) for x in batch.ids.split([23, 9], 1))
    seen = [p.replace("<pad>", "") for p in prompts]
    assert seen[:4] == ["door closed item out 5:", "door open item out 4:", "door open item in 3:", "done"]
    assert actions[1] == "put\n" + "<pad>" * 5 and actions[3] == "<pad>" * 9 and actions[10] == "<eos>" + "<pad>" * 8
    assert batch.sampler_logp[0].tolist() == [-0.5] * 5 + [0.0] * 4 and batch.policy_version.tolist() == [9] * 15
    assert batch.prompt_id[0] == batch.prompt_id[5] != batch.prompt_id[1] and batch.texts[1] == "put\n" and batch.texts[3] == ""
    assert [len(asked) for asked, *_ in engine.asked] == [3, 3, 3, 2, 2]
    assert all(call[1:3] == (1, 0.7) for call in engine.asked)
    assert len({seed for *_, seeds in engine.asked for seed in seeds}) == 13


def test_an_episode_depends_on_its_number_alone():
    """Not on which process it is on, nor on who plays beside it; G episodes have one start and noise of their own."""
    both, alone = Written(*SCRIPT), Written(*[[texts[1] if len(texts) == 3 else texts[0]] for texts in SCRIPT])
    _, rows, _ = played(both)
    _, mine, _ = played(alone, numbers=(1,))
    assert mine == rows[5:10]
    assert [seeds[0] for *_, seeds in alone.asked] == [seeds[1 if len(seeds) == 3 else 0] for *_, seeds in both.asked]
    starts = []

    class Room(poad.Door):
        def reset(self, seed):
            starts.append(seed)
            return "here:"

    poad.play(Room, Written(["x\n"] * 4), encode, TOKENIZER, range(2, 6), args(horizon=1, group_size=2, seed=1), 4, 1.0)
    assert starts[0] == starts[1] != starts[2] == starts[3]


def test_a_window_that_ends_before_the_episode():
    engine = Written(["open\n"], ["put\n"])
    a, rows, seen = played(engine, numbers=(3,), horizon=2)
    assert [row[-1] for row in rows] == [True, True] and seen == encode(["door open item in 3:"])
    a, rows, seen = played(Written(), numbers=())
    assert rows == seen == []


# ---------------------------------------------------------------- the critic, and runs


def start(tmp_path, **changes):
    """Args of a run of two small steps, with the door's warm start."""
    small = dict(steps=2, prompts_per_step=8, minibatches=2, epochs=1, eval_prompts=2, eval_every=0, checkpoint_every=0,
                 critic_first=0, critic_first_epochs=2, critic_epochs=1)  # fmt: skip
    return poad.Args(**small | dict(run_dir=str(tmp_path / "run")) | changes)


def trained(folder, **changes):
    poad.train(start(folder, **changes))
    return lines(folder / "run" / "metrics.jsonl")


@pytest.fixture(scope="module")
def policy():
    _, task = poad.environment("door")
    a = SimpleNamespace(model="tiny", task="door", dtype="float32")
    return models.load(a, gpu.device(), trainable=False, warm=task)


def test_the_critic_stands_on_frozen_states(policy):
    critic = poad.Critic(policy, args(critic_width=(16, 8), seed=3))
    ids, attention = torch.randint(3, 70, (2, 9), generator=torch.Generator().manual_seed(0)), torch.ones(2, 9).bool()
    mask = torch.ones(2, 4).bool()
    attention[1, 8], mask[1, 3] = False, False
    assert not critic(ids, attention, mask)[0].any()
    again = poad.Critic(policy, args(critic_width=(16, 8), seed=3))
    other = poad.Critic(policy, args(critic_width=(16, 8), seed=4))
    mine, same, another = (c.layers[0].weight for c in (critic, again, other))
    assert torch.equal(mine, same) and not torch.equal(mine, another)
    assert [tuple(p.shape) for p in critic.parameters()] == [(16, 96), (16,), (8, 16), (8,), (1, 8), (1,)]
    torch.nn.init.normal_(critic.layers[-1].weight)
    values, _ = critic(ids, attention, mask)
    assert values[mask].all() and not values[~mask].any()
    values.sum().backward()
    assert all(p.grad.any() for p in critic.parameters()) and not any(p.requires_grad for p in policy.parameters())
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % 60 + 3  # the third token of the action
    moved = (critic(changed, attention, mask)[0] - values).abs() > 1e-6
    assert moved.tolist() == [[False, False, False, True], [False, False, False, False]]


@pytest.fixture(scope="module")
def plain(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder / "run", trained(folder, eval_prompts=16)


def test_a_run(plain):
    folder, rows = plain
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0 and row["entropy"] > 0 for row in rows)
    for row in rows:  # over the steps that were made
        assert -1 <= row["accuracy"] <= 1 and 3 <= row["steps"] <= 5 and 4 < row["length"] < 6.5 and row["sampler_gap"] < 1e-4
        assert row["reward"] == pytest.approx(row["accuracy"] / row["steps"], abs=1e-6)
        assert row["tokens"] == pytest.approx(8 * row["steps"] * row["length"])
    assert rows[0]["steps"] == 5 > rows[1]["steps"]
    row = rows[0]
    assert row["exact_value"] == pytest.approx(-0.466, abs=0.1)
    assert row["start_bias"] == pytest.approx(-row["exact_value"], abs=1e-6)  # V is 0 at first
    assert -1 <= row["adv_min"] < row["adv_max"] <= 1  # as they were before they were standardised
    assert row["value_error"] >= abs(row["value_bias"]) and row["adv_first"] > 0 < row["adv_others"]
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=1e-5) and rows[1]["explained_variance"] != 0
    evals = lines(folder / "evals.jsonl")
    assert [set(e) for e in evals] == [{"step", "greedy_accuracy", "prompts"}] * 2 and evals[0]["prompts"] == 16
    assert all(abs(e["greedy_accuracy"]) == 1 for e in evals)  # greedy episodes are all alike
    shown = [s for s in lines(folder / "samples.jsonl") if s["step"] == 1]
    assert len(shown) == 5 and shown[0]["prompt"] == "door closed item out 5:"  # a whole episode
    saved = contents(checkpoints(folder)[-1])
    assert set(saved["critic"][0]) == {f"layers.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}  # no trunk
    assert json.loads((folder / "config.json").read_text())["args"]["stop"] == ["\n"]


FLAGS = [
    dict(gamma_a=0.5), dict(gamma_w=0.9), dict(lam=0.5), dict(std_floor=5.0), dict(entropy=0.1), dict(eps=0.01),
    dict(eps_value=0.001), dict(value_lr=1e-5), dict(critic_width=(8,)), dict(critic_epochs=2), dict(kl_stop=1e-12),
    dict(critic_first=1), dict(critic_first=1, critic_first_epochs=3), dict(horizon=3),
]  # fmt: skip


@pytest.mark.parametrize("changes", FLAGS, ids=lambda c: "-".join(c))
def test_every_flag_changes_something(plain, tmp_path, changes):
    base = trained(tmp_path, critic_first=1) if "critic_first_epochs" in changes else plain[1]
    (tmp_path / "other").mkdir()
    rows = trained(tmp_path / "other", **changes)
    keys = ("loss", "value_loss", "grad_norm", "approx_kl", "clip_fraction")
    assert [r[k] for r in rows for k in keys] != [r[k] for r in base for k in keys]
    if "entropy" in changes:
        assert rows[0]["grad_norm"] != base[0]["grad_norm"]  # it is no constant
    if "kl_stop" in changes:
        assert rows[0]["stopped"] > 0 == base[0]["stopped"]
    if changes == dict(critic_first=1):
        assert rows[0]["approx_kl"] == 0 < base[0]["approx_kl"] and rows[1]["approx_kl"] > 0


def test_a_run_in_two_halves_is_the_whole(tmp_path):
    """With a rollout that waits, its values and what comes after its window in the queue."""
    same = dict(stale=1, horizon=3, checkpoint_every=1, prompts_per_step=4, beta=0.1)
    (tmp_path / "cut").mkdir()
    whole = trained(tmp_path, **same)
    small = {k: v for k, v in vars(start(tmp_path / "cut", **same | dict(steps=1))).items() if v != getattr(poad.Args, k)}
    argv = [word for k, v in small.items() for word in ("--" + k.replace("_", "-"), v)]
    for words in (argv, ["--resume", tmp_path / "cut" / "run", "--steps", 2]):
        done = run(tmp_path, *words, script=ROOT / "algos" / "poad.py")
        assert done.code == 0, done.err
    cut = lines(tmp_path / "cut" / "run" / "metrics.jsonl")
    timeless = [[{k: v for k, v in r.items() if not k.startswith("time")} for r in rows] for rows in (whole, cut)]
    assert timeless[0] == timeless[1] and whole[1]["staleness"] == 1
    a, b = (checkpoints(folder / "run")[-1] / "model.safetensors" for folder in (tmp_path, tmp_path / "cut"))
    assert a.read_bytes() == b.read_bytes()


def test_one_s_own_environment_in_a_run(policy, tmp_path):
    """A checkpoint of the tiny model in a room of one's own, whose episodes have two steps of three: no exact values."""
    (tmp_path / "door_words.py").write_text("START = 1\n")
    (tmp_path / "room.py").write_text(ROOM)
    _, task = poad.environment("door")
    folder = tiny_models.warm_start(task)
    (row,) = trained(tmp_path, model=folder, task=f"{tmp_path}/room.py:Room", horizon=3, steps=1)
    assert row["accuracy"] == pytest.approx(0.5) and row["steps"] == 2 and "value_error" not in row


def test_observations_that_a_model_cannot_read(policy, tmp_path):
    """No text at the start, which is seen before a model is made; and one too long in the middle of an episode."""
    (tmp_path / "rooms.py").write_text(
        "class Pair:\n    def reset(self, seed):\n        return 'here:', {}\n\n\n"
        "class Long:\n    def reset(self, seed):\n        return 'here:'\n\n"
        "    def step(self, text):\n        return 'x' * 1010, 0.0, False\n"
    )
    with pytest.raises(UserError, match="reset\\(\\) must return a text"):
        poad.environment(f"{tmp_path}/rooms.py:Pair")
    folder = tiny_models.warm_start(poad.environment("door")[1])
    with pytest.raises(UserError, match="1010 tokens.*needs 1038 positions; the model has 1024"):
        poad.train(start(tmp_path, model=folder, task=f"{tmp_path}/rooms.py:Long"))


def test_evaluation_has_a_start_of_its_own_for_every_episode(tmp_path, monkeypatch):
    """Those of a group share one."""
    asked, play = [], poad.play

    def remembered(make, engine, encode, tokenizer, numbers, args, noise, temperature):
        if not temperature:
            asked.append([n // args.group_size for n in numbers])
        return play(make, engine, encode, tokenizer, numbers, args, noise, temperature)

    monkeypatch.setattr(poad, "play", remembered)
    trained(tmp_path, group_size=2, prompts_per_step=4, steps=1, eval_prompts=3)
    assert asked == [[0, 1, 2]] * 2


def test_presets():
    tiny, _ = settings.resolve(poad.Args())
    assert (tiny.task, tiny.max_new_tokens, tiny.lr, tiny.eps_value, tiny.critic_first) == ("door", 28, 1e-4, 0.0, 4)
    real = dataclasses.asdict(poad.Args()) | poad.Args.real_preset
    assert real["critic_width"] == (1024, 512) and real["value_lr"] == 5e-5 and real["eps_value"] == 0.2
    assert real["critic_first"] == real["critic_epochs"] == 0 and real["epochs"] == 5
    with pytest.raises(UserError, match="--critic-width must be at least 1"):
        settings.resolve(poad.Args(critic_width=(4, 0)))
