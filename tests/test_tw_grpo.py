"""TW-GRPO's worked numbers through the code that trains, its weights' limits, its rewards, the world, and what a run logs."""

import random
from types import SimpleNamespace

import pytest
import torch

from algos import dapo, tw_grpo
from common import policy as heads
from common.batch import collate, minibatches
from common.worlds import events, tiny_vision
from tests.helpers import ROOT, lines, run, user_error

CLOSE = dict(rtol=0, atol=1e-6)
P = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3]], [[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.9, 0.05, 0.05]]])
IDS, LENGTHS = [[0, 2, 1], [0, 0, 0]], [3, 2]


def arguments(**changes):
    return tw_grpo.Args(**dict(group_size=2, minibatches=1, micro_batch_tokens=64) | changes)


class Table(torch.nn.Module):
    """A policy whose logits are a table [B, T, V]: hidden states are unit vectors, the table is its head."""

    def __init__(self, logits):
        super().__init__()
        self.shape = logits.shape[:2]
        self.lm = torch.nn.Module()
        self.lm.lm_head = torch.nn.Linear(*logits.shape[:2], bias=False)
        self.lm.lm_head.weight = torch.nn.Parameter(logits.flatten(0, 1).T.clone())  # [V, B T]

    def forward(self, ids, attention_mask, mask, temperature=1.0, layers=None):
        row, T = ids[:, :-mask.shape[1]].amax(1) - 10, mask.shape[1]  # a prompt is one token: 10 and the row's number
        unit = torch.eye(self.shape.numel()).view(*self.shape, -1)[row, :T]
        logp = (unit @ self.lm.lm_head.weight.T / temperature).log_softmax(-1)
        own, entropy = logp.gather(2, ids[:, -T:, None])[:, :, 0], -(logp.exp() * logp).sum(-1).detach()
        found = (own.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0))
        return found + (unit,) * bool(layers)  # also where a row has ended


def rows(ids, lengths, group=2):
    batch = collate([([10 + i], y[:n]) for i, (y, n) in enumerate(zip(ids, lengths))])
    batch.group, batch.prompt_id = group, torch.arange(len(ids)) // group
    return batch


def loss_and_gradient(batch, policy, adv, args):
    """As the loop forms it."""
    batch.old_logp, batch.columns["importance"] = tw_grpo.importance(policy, batch, args, 1)
    batch.adv = adv
    ((_, weights),) = minibatches(batch, args, 1, tw_grpo.token_weights, columns=("importance",))
    logp, _ = policy(batch.ids, batch.attention_mask, batch.mask)
    objective, _ = tw_grpo.surrogate(logp, batch.old_logp, batch.adv, batch.trained, args)
    loss = -(objective * weights)[batch.trained].sum()
    loss.backward()
    return loss.item(), policy.lm.lm_head.weight.grad.T.view(*policy.shape, -1)


UNIFORM = -0.141381
KINDS = {
    "k3_log_mean": ([0.023593, 1.181981, 0.054804], [1.0, 1.7, 1.018861]),
    "kl": ([0.006959, 0.309884, 0.017251], [1.0, 1.7, 1.023783]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_worked_numbers(kind):
    """The third place of the second row has ended: its own distribution there does not matter."""
    args, logp = arguments(divergence=kind), P.log()
    logp[1, 2] = torch.tensor(1 / 3).log()
    D, w = (torch.tensor(x) for x in KINDS[kind])
    torch.testing.assert_close(tw_grpo.divergence(logp, args), D, **CLOSE)
    torch.testing.assert_close(tw_grpo.weigh(D, args), w, rtol=0, atol=2e-6)
    found = tw_grpo.importance(Table(P.log()), rows(IDS, LENGTHS), args, 1)[1]
    torch.testing.assert_close(found, w.expand(2, 3), **CLOSE)


def test_loss_and_its_gradient_hold_the_weights_still():
    """Were there gradient through the weights, that of the first place would be (-0.035513, 0.020847, 0.014666)."""
    adv = torch.tensor([[0.706907], [-0.706907]]).expand(2, 3)
    loss, gradient = loss_and_gradient(rows(IDS, LENGTHS), Table(P.log()), adv, arguments())
    assert loss == pytest.approx(-0.144048, abs=1e-6)
    first = [[-0.042414, 0.028276, 0.014138], [0.024035, 0.024035, -0.048070], [0.028810, -0.072024, 0.043214]]
    torch.testing.assert_close(gradient[0], torch.tensor(first), **CLOSE)
    assert not gradient[1, 2].any()
    loss, _ = loss_and_gradient(rows(IDS, LENGTHS), Table(P.log()), adv, arguments(alpha=1.0))
    assert loss == pytest.approx(UNIFORM, abs=1e-6)


def table(seed=0, G=4, T=5, V=6, lengths=(5, 3, 4, 2)):
    """A group of ragged rows, whose first distribution is the same -> (logits, batch)."""
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(G, T, V, generator=g)
    logits[:, 0] = logits[0, 0]
    return logits, rows(torch.randint(V, (G, T), generator=g).tolist(), lengths, G)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_group_s_one_for_a_place_from_1_to_alpha(kind):
    logits, batch = table()
    for alpha in (1.0, 1.7, 3.0):
        args = arguments(group_size=4, divergence=kind, alpha=alpha)
        logp, w = tw_grpo.importance(Table(logits), batch, args, 1)
        assert (w == w[0]).all() and w[0, 0] == pytest.approx(1, abs=1e-5) and w.max() == pytest.approx(alpha, abs=1e-6)
        own = logits.log_softmax(-1).gather(2, batch.ids[:, 1:, None])[:, :, 0].masked_fill(~batch.mask, 0.0)
        torch.testing.assert_close(logp, own)
        uniform = logits.masked_fill(~batch.mask[:, :, None], 7.0).log_softmax(-1)  # rows that have ended
        torch.testing.assert_close(w[0], tw_grpo.weigh(tw_grpo.divergence(uniform, args), args))


def test_divergences():
    """0 where all agree; of two rows far apart KL is log 2, and k3 grows to its clamp; the order of rows does not matter, the
    lot of the unlikely does for k3 alone."""
    k3, kl = arguments(), arguments(divergence="kl")
    same = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1).expand(5, 3, 6)
    apart = torch.tensor([[[0.0, -60.0]], [[-60.0, 0.0]]])
    torch.testing.assert_close(tw_grpo.divergence(apart, kl), torch.tensor([2.0]).log())
    e = torch.tensor(11.0)
    torch.testing.assert_close(tw_grpo.divergence(apart, k3), (e.exp() - e - 1 + (-e).exp() + e - 1)[None])
    for args in (k3, kl):
        torch.testing.assert_close(tw_grpo.divergence(same, args), torch.zeros(3), rtol=0, atol=1e-6)
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
        torch.testing.assert_close(tw_grpo.divergence(x.flip(0), args), tw_grpo.divergence(x, args))
        assert (tw_grpo.divergence(x, args) > 0.01).all()
    unlikely = torch.tensor([[[1 - 1e-6, 1e-6]], [[1 - 1e-9, 1e-9]]]).log()
    assert tw_grpo.divergence(unlikely, kl) < 1e-5 and tw_grpo.divergence(unlikely, k3) > 5
    assert (tw_grpo.weigh(tw_grpo.divergence(same, k3), k3) - 1).abs().max() < 1e-4  # all completions alike


def test_weights_do_not_see_scale_and_shift_of_D():
    D, args = torch.tensor([0.3, 2.0, 0.7, 0.3]), arguments()
    torch.testing.assert_close(tw_grpo.weigh(5 * D + 3, args), tw_grpo.weigh(D, args))
    assert (tw_grpo.weigh(torch.full((4,), 2.0), args) == 1).all()


def test_groups_padding_temperature_and_pieces(monkeypatch):
    """Weights are a group's own, whatever else is in the rollout and however wide it is padded; of the distributions that are
    sampled from; and the same where one place at a time is looked at."""
    (a, one), (b, two), args = table(1), table(2, T=3, lengths=(3, 1, 2, 3)), arguments(group_size=4, micro_batch_tokens=8)
    wide = torch.nn.functional.pad(b, (0, 0, 0, 2))
    both = rows([*one.ids[:, 1:].tolist(), *two.ids[:, 1:].tolist()], [5, 3, 4, 2, 3, 1, 2, 3], 4)
    w = tw_grpo.importance(Table(torch.cat([a, wide])), both, args, 1)[1]
    apart = [tw_grpo.importance(Table(x), batch, args, 1)[1] for x, batch in ((a, one), (b, two))]
    torch.testing.assert_close(w[:4], apart[0])
    torch.testing.assert_close(w[4:, :3], apart[1])
    hot = tw_grpo.importance(Table(a), one, arguments(group_size=4, temperature=2.0), 1)[1]
    torch.testing.assert_close(hot, tw_grpo.importance(Table(a / 2), one, args, 1)[1])
    assert (hot - apart[0]).abs().max() > 1e-3
    calls, real = [], tw_grpo.divergence
    monkeypatch.setattr(heads, "head_rows", lambda n: 4)
    monkeypatch.setattr(tw_grpo, "divergence", lambda logp, args: calls.append(logp.shape[1]) or real(logp, args))
    torch.testing.assert_close(tw_grpo.importance(Table(a), one, args, 1)[1], apart[0])
    assert calls == [1] * 5


def test_the_control_has_the_same_weights_elsewhere():
    """Those of a group's tokens, whatever the padding; by seed, step and prompt alone."""
    logits, batch = table(lengths=(5, 5, 4, 5))
    plain, own = arguments(group_size=4), arguments(group_size=4, shuffle=True)
    w, dealt = (tw_grpo.importance(Table(logits), batch, args, 3)[1] for args in (plain, own))
    assert torch.equal(w[batch.mask].sort().values, dealt[batch.mask].sort().values)
    assert (dealt != w)[batch.mask].any() and not (dealt == dealt[0])[batch.mask].all()
    again = tw_grpo.importance(Table(logits), batch, own, 3)[1]
    assert torch.equal(again, dealt)
    batch.prompt_id = batch.prompt_id + 5
    others = [tw_grpo.importance(Table(logits), batch, own, 3)[1]]
    batch.prompt_id = batch.prompt_id - 5
    others += [tw_grpo.importance(Table(logits), batch, args, step)[1] for args, step in
               ((own, 4), (arguments(group_size=4, shuffle=True, seed=2), 3))]  # fmt: skip
    assert not any(torch.equal(other, dealt) for other in others)


def test_uniform_weights_are_dapo_s_mean_over_tokens():
    """And the divisor is the number of tokens, not what the weights add up to."""
    mask = torch.arange(6) < torch.tensor([6, 2, 0, 4])[:, None]
    ones, args = torch.ones(4, 6), arguments()
    assert torch.equal(tw_grpo.token_weights(mask, args, ones), dapo.token_weights(mask, dapo.Args()))
    w = torch.linspace(1, 1.7, 24).view(4, 6)
    found = tw_grpo.token_weights(mask, args, w.masked_fill(~mask, float("nan")))
    torch.testing.assert_close(found, w * mask / 12)
    torch.testing.assert_close(tw_grpo.token_weights(mask, args, 2 * w), 2 * found)
    assert not tw_grpo.token_weights(mask & False, args, w).any()


@pytest.mark.parametrize("flag, ratio", [("eps_low", 0.7), ("eps_high", 1.35)])
def test_the_clip_s_flags(flag, ratio):
    adv = torch.tensor([[1.0 if ratio > 1 else -1.0]])
    logp, zero, mask = torch.tensor([[ratio]]).log(), torch.zeros(1, 1), torch.ones(1, 1).bool()
    values = [tw_grpo.surrogate(logp, zero, adv, mask, arguments(**c))[0].item() for c in (dict(), {flag: 0.5})]
    assert values == pytest.approx([{0.7: -0.8, 1.35: 1.28}[ratio], ratio * adv.item()])


@pytest.mark.parametrize("text, right, value", [
    ("A,B", "A,B,C", 2 / 3), ("C, A", "A,B,C", 2 / 3), ("A,D", "A,B,C", 0), ("A,B,C,D", "A,B,C", 0), ("", "A,B,C", 0),
    ("A,A", "A,B", 0.5), ("B,A", "A,B", 1), ("A", "A", 1), (None, "A", 0), ("A,", "A,B", 0), ("A,,B", "A,B", 0),
    ("42", "42", 1),
])  # fmt: skip
def test_soft_reward(text, right, value):
    assert tw_grpo.soft_reward(tw_grpo.options(text), tw_grpo.options(right)) == pytest.approx(value, abs=1e-6)


def graded(answers, gold, accuracy, reward=None, cut=()):
    accuracy = torch.tensor(accuracy)
    reward = accuracy if reward is None else torch.tensor(reward)
    truncated = torch.tensor([i in cut for i in range(len(accuracy))])
    return tw_grpo.graded(SimpleNamespace(answers=answers, gold=gold, accuracy=accuracy, reward=reward, truncated=truncated))


def test_rewards_of_a_rollout():
    """What the check calls right stays right, a cut completion stays wrong, what stands beside the score stays, the best of
    several golds counts, and scores of one's own are only ever raised."""
    values = graded(["A", "A,B", "A", None, "0.5"], ["A,B"] * 4 + ["1/2"], [0.0, 1.0, 0.0, 0.0, 1.0], cut=[2])
    assert values.tolist() == [0.5, 1.0, 0.0, 0.0, 1.0]
    assert graded(["A", "C"], ["A,B", "A"], [0.0, 0.0], [0.25, 0.0]).tolist() == [0.75, 0.0]
    assert graded(["A"], [("C,B,A", "A,D")], [0.0]).tolist() == [0.5]
    assert graded(["A", "B", "A"], ["A,B", "A", "A,B"], [-1.0, -1.0, 2.0], cut=[1]).tolist() == [0.5, -1.0, 2.0]


# ---------------------------------------------------------------- the world


def test_events_are_what_the_frames_show():
    """Told from the pixels alone, for every thing; a demonstration says it, and is right."""
    for example in events.task("").train[:150] + events.task("").test[:20]:
        (video,), told = example.pictures, {}
        for letter, colour in events.THINGS.items():
            where = [(frame == tiny_vision.COLOURS[colour]).all(-1).nonzero() for frame in video]
            first, second = ({(y // 4, x // 4) for y, x in zip(*at)} for at in where)
            assert len(first) == 1 and len(second) <= 1
            told[letter] = "stayed" if first == second else "moved" if second else "left"
            if told[letter] == "moved":
                ((y, x),), ((v, u),) = first, second
                assert abs(y - v) + abs(x - u) == 1
        question, _, options = example.prompt.rpartition("?")
        asked = [x for x in options if (told[x] == question.split()[-1]) != question.startswith("not ")]
        assert 2 <= len(options) <= 4 and asked and example.answer == ",".join(asked)
        said = events.demonstrate(random.Random(0), example, 1.0)
        assert said == ",".join(x + told[x][0] for x in options) + ";" + example.answer
        assert events.check(said, example.answer) == (example.answer, 1.0) and len(said) < 24


def test_events_has_all_kinds_of_questions_and_holds_out_scenes():
    task = events.task("")
    guessed = [events.demonstrate(random.Random(i), task.test[i], 0.0) for i in range(100)]
    right = [events.check(text, e.answer)[1] for text, e in zip(guessed, task.test)]
    assert all(text.startswith(";") for text in guessed) and 0.1 < sum(right) / 100 < 0.4
    shown = {(e.prompt, e.pictures[0].tobytes()) for e in task.train}
    assert len(task.train) == 4096 and len(task.test) == 256
    assert not any((e.prompt, e.pictures[0].tobytes()) in shown for e in task.test)
    assert {e.prompt.split("?")[0] for e in task.test} == {n + x for n in ("", "not ") for x in events.EVENTS}
    assert {len(e.answer.split(",")) for e in task.test} == {1, 2, 3, 4}


@pytest.mark.parametrize("text, score", [
    ("Am,Dm;A,D", 1), (";D,A", 1), ("Am;Dm;A,D", 1), (";A,A,D", 1), ("A,D", 0), (";A", 0), (";A,B,D", 0), (";", 0), ("", 0),
    (";A,D,", 0), (";A,D;", 0), (";AD", 0),
])  # fmt: skip
def test_an_answer_is_the_exact_set(text, score):
    found, value = events.check(text, "A,D")
    assert value == score and (found is None) == (";" not in text)


# ---------------------------------------------------------------- a run

SHORT = "--steps 1 --prompts-per-step 4 --group-size 4 --eval-prompts 4 --minibatches 1".split()


def test_a_run(tmp_path):
    """By default rewards are shares and weights differ; without the method's parts neither; and the same rollout has other
    weights behind it."""
    made, bare = {}, ("--no-soft-reward", "--alpha", 1)
    for name, more in dict(whole=(), bare=bare).items():
        done = run(tmp_path, *SHORT, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "tw_grpo.py")
        assert done.code == 0, done.err
        made[name] = (*lines(tmp_path / name / "metrics.jsonl"), lines(tmp_path / name / "samples.jsonl"))
    whole, plain = made["whole"][0], made["bare"][0]
    assert whole["accuracy"] == plain["accuracy"] == plain["reward"] < whole["reward"]
    assert plain["importance"] == 1 < whole["importance"] < 1.7 and whole["named"] == plain["named"] > 0.5
    assert 0 < whole["reward_std"] and 0 <= whole["dead_groups"] <= plain["dead_groups"] == 1 - plain["informative_groups"]
    w = [s["columns"]["importance"] for s in made["whole"][1]]
    assert w[0][0] == pytest.approx(1, abs=1e-4) and max(map(max, w)) > 1.01
    assert all(set(s["columns"]["importance"]) == {1.0} for s in made["bare"][1])
    weights = [(tmp_path / name / "checkpoints" / "step-000001" / "model.safetensors").read_bytes() for name in made]
    assert weights[0] != weights[1]


def test_mistakes_are_one_line(tmp_path):
    script, none = ROOT / "algos" / "tw_grpo.py", ("--steps", 0, "--eval-prompts", 4)
    assert "alpha" in user_error(run(tmp_path, "--alpha", 0.5, *none, script=script))
    assert "events" in user_error(run(tmp_path, "--task", "events:x", *none, script=script))
