"""CaCoVID's worked numbers, the law of its sampling, the selector, what pruning leaves as it was, its world, and whole runs."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from algos import cacovid as script
from common import UserError, gpu, policy, vision
from common.worlds import tiny_vision
from tests.helpers import ROOT, contents, killed, lines, outcome, run, same, user_error

CACOVID = ROOT / "algos" / "cacovid.py"
P = torch.tensor([0.02, 0.40, 0.05, 0.20, 0.03, 0.15, 0.10, 0.05])
OLD = [[0.2, 0.4], [0.0, 1.0], [0.5, -0.5], [0.3, 0.3]]
NEW = [[0.1, 0.6], [0.1, 0.8], [0.9, -0.6], [0.3, 0.3]]
MASKS, REWARDS = torch.eye(4)[:3].bool(), torch.tensor([1.0, 0, 0]).double()


def arguments(**changes):
    return script.Args(**dict(rate=0.0625, rate_min=0.0625, rate_max=0.125, budget=8.0, important=1.0) | changes)


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("balance, loss, gradient", [
    (True, -0.074571, [-0.115724, 0.055616, 0.006543, 0]), (False, -0.058925, [-0.091345, 0.054246, 0.009814, 0]),
])  # fmt: skip
def test_worked_numbers(balance, loss, gradient):
    old, new = (torch.tensor(x, dtype=torch.float64) for x in (OLD, NEW))
    new.requires_grad_()
    weights = script.token_weights(MASKS, balance).double()
    objective, stats = script.objective_of(new, old, MASKS, REWARDS, weights, arguments())
    (-objective).backward()
    assert -objective.item() == pytest.approx(loss, abs=1e-6)
    expected = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(new.grad, torch.stack([-expected, expected], 1), rtol=0, atol=1e-6)
    assert script.advantages(REWARDS).tolist() == pytest.approx([1.154501, -0.577250, -0.577250], abs=1e-6)
    ratio = (script.choice_logp(new, MASKS) - script.choice_logp(old, MASKS)).exp()[0]
    assert ratio.tolist() == pytest.approx([1.132086, 1.233771, 1.118343, 1], abs=1e-6)
    assert stats["clip_fraction"].sum() == 1 and stats["approx_kl"].shape == MASKS.shape  # e^0.3 below


def test_the_clip():
    """The ratio counts as far as 1.28 where it pays and 0.8 where it does not; each end is a flag's."""
    one, mask = torch.ones(1, 1), torch.ones(1, 1).bool()
    for ratio, adv, flags, value in (
        (1.5, 1.0, {}, 1.28), (0.5, -1.0, {}, -0.8), (1.5, -1.0, {}, -1.5), (0.5, 1.0, {}, 0.5),
        (1.5, 1.0, dict(eps_high=0.1), 1.1), (0.5, -1.0, dict(eps_low=0.4), -0.6),
    ):  # fmt: skip
        objective, _ = script.surrogate(math.log(ratio) * one, 0 * one, adv * one, mask, arguments(**flags))
        assert objective.item() == pytest.approx(value, abs=1e-6)


def test_kept_and_dropped_weigh_alike():
    """The card's w, up to their sum; all of a group, or none, is no division by 0; and without balance 1 / N."""
    weights = script.token_weights(MASKS, True)
    torch.testing.assert_close(weights[0], torch.tensor([0.75, 0.25, 0.25, 0.25]) / 1.5)
    many = torch.rand(6, 50, generator=noise()) < 0.2
    weights = script.token_weights(many, True)
    torch.testing.assert_close((weights * many).sum(1), torch.full((6,), 0.5))
    torch.testing.assert_close((weights * ~many).sum(1), torch.full((6,), 0.5))
    torch.testing.assert_close(script.token_weights(many, False), torch.full((6, 50), 0.02))
    assert not script.token_weights(torch.ones(1, 4).bool(), True).any()


def test_advantages():
    """One combination, or equal rewards: nothing is learnt."""
    assert script.advantages(torch.ones(1)).tolist() == [0] and not script.advantages(torch.ones(7)).any()
    found = script.advantages(torch.tensor([1.0, 0, 1, 1]))
    assert found.sum().abs() < 1e-6 and found[1] == pytest.approx(-0.75 / (0.5 + 1e-4))


# ---------------------------------------------------------------- which tokens


def test_groups_and_their_caps():
    order = P.argsort(descending=True, stable=True)
    assert script.groups(8, 1, 1 / 8, arguments()) == [2, 2, 2, 2]
    assert [set(x.tolist()) for x in order.split(2)] == [{1, 3}, {5, 6}, {2, 7}, {4, 0}]
    sums = torch.stack([P[x].sum() for x in order.split(2)])
    torch.testing.assert_close(sums, torch.tensor([0.6, 0.25, 0.1, 0.05]))
    found = script.capped(sums, 0.5)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.3125, 0.125, 0.0625]))
    found = script.capped(sums, 0.5, 1 / 16)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.302454, 0.120986, 0.076560]), rtol=0, atol=1e-4)
    a = arguments()
    assert script.groups(196, 4, 0.02, a) == [8] * 21 + [7] * 4  # the paper's frames: 25 groups
    assert script.groups(16, 1, 0.02, a) == [1] * 16 and script.groups(16, 1, 0.0625, a) == [2] * 8
    assert script.groups(16, 2, 0.125, a) == [4] * 4 and script.groups(16, 12, 0.75, a) == [16]
    assert script.groups(16, 1, 0.0625, arguments(group_tokens=4.0)) == [4] * 4
    assert script.groups(10, 2, 0.15, arguments(group_tokens=1.0)) == [2] * 5  # and not 6: a group has k
    for n, k in itertools.product(range(1, 30), range(1, 9)):
        if k <= n:
            sizes = script.groups(n, k, k / n, a)
            assert sum(sizes) == n and min(sizes) >= k and max(sizes) - min(sizes) <= 1


def test_capped():
    """None above the cap, ranks as before, what is below it in proportion; many rows at once, and caps that do not bind."""
    p = torch.rand(50, 12, generator=noise()).pow(6)
    p = p / p.sum(1, keepdim=True)
    found = script.capped(p, 1 / 6)
    torch.testing.assert_close(found.sum(1), torch.ones(50))
    assert found.max() < 1 / 6 + 1e-5 and (found.max(1).values > p.max(1).values - 1).all()
    for row, mine in zip(p, found):
        torch.testing.assert_close(script.capped(row, 1 / 6), mine)
        free = mine < 1 / 6 - 1e-5
        ratio = (mine / row)[free & (row > 1e-6)]
        assert (ratio / ratio[0] - 1).abs().max() < 1e-3 and ratio[0] >= 1 - 1e-5
    torch.testing.assert_close(script.capped(p, 1.0), p, rtol=0, atol=1e-6)


def frequencies(masks):
    """{kept tokens: share} of masks [draws, n]."""
    found, many = masks.unique(dim=0, return_counts=True)
    return {tuple(m.nonzero()[:, 0].tolist()): c / len(masks) for m, c in zip(found, many.tolist())}


def without_replacement(p, k):
    """{set: chance} of k draws from {token: p}."""
    out = {}
    for path in itertools.permutations(p, k):
        chance, left = 1.0, sum(p.values())
        for j in path:
            chance, left = chance * p[j] / left, left - p[j]
        out[tuple(sorted(path))] = out.get(tuple(sorted(path)), 0) + chance
    return out


def by_hand(p, k, C, cap):
    """The law of OCSS in one frame, by its four steps, in plain numbers."""
    ranked, n = sorted(range(len(p)), key=lambda j: -p[j]), len(p)
    sizes = [n // C + (i < n % C) for i in range(C)]
    parts = [ranked[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(C)]
    chances = script.capped(torch.tensor([sum(p[j] for j in part) for part in parts]), cap, 1 / C**2).tolist()
    out, s = {}, n // C
    for part, chance in zip(parts, chances):
        total = sum(p[j] for j in part)
        inside = {j: min(max(p[j] / total, 1 / (2 * s)), 2 / s) for j in part}
        for which, x in without_replacement(inside, k).items():
            out[which] = out.get(which, 0) + chance * x
    return out


@pytest.mark.parametrize("k, C, cap", [(1, 4, 0.5), (2, 2, 0.9), (4, 1, 1.0)])
def test_the_law_of_ocss(k, C, cap):
    """Enumerated, against 40,000 draws; two frames with the same tokens in another order are drawn apart."""
    turned, draws = torch.arange(7, -1, -1), 40_000
    score = torch.stack([P.log(), P.log()[turned] + 3])
    masks = script.ocss(score, k, k / 8, draws, noise(), arguments())
    assert masks.shape == (draws, 2, 8) and (masks.sum(2) == k).all()
    law = by_hand(P.tolist(), k, C, cap)
    assert sum(law.values()) == pytest.approx(1)
    for found in (frequencies(masks[:, 0]), frequencies(masks[:, 1][:, turned])):
        assert set(found) <= set(law)
        for which, chance in law.items():
            assert found.get(which, 0) == pytest.approx(chance, abs=4.5 * math.sqrt(chance / draws) + 1e-4), which
    if k == 1:  # each frame has a group of its own: the same one by chance alone
        group = P.argsort(descending=True).argsort().long() // 2
        one, other = (group[m.int().argmax(1)] for m in (masks[:, 0], masks[:, 1][:, turned]))
        q = script.capped(torch.tensor([0.6, 0.25, 0.1, 0.05]), 0.5, 1 / 16)
        assert (one == other).float().mean().item() == pytest.approx(q.square().sum().item(), abs=0.015)


def test_max_group():
    """A cap of 4 / C lets 0.6 pass, and one of 1 / C makes the groups alike."""
    shares = {}
    for most, cap in ((4.0, 0.9), (1.0, 0.25), (2.0, 0.5)):
        masks = script.ocss(P.log()[None], 1, 1 / 8, 20_000, noise(), arguments(max_group=most))
        shares[most] = masks[:, 0, [1, 3]].float().sum(1).mean().item()
        expected = script.capped(torch.tensor([0.6, 0.25, 0.1, 0.05]), cap, 1 / 16)[0].item()
        assert shares[most] == pytest.approx(expected, abs=0.02)
    assert shares[1.0] < 0.3 < 0.45 < shares[2.0] < 0.55 < shares[4.0]


def test_the_law_of_the_plain_arm():
    masks = script.drawn(P.log().expand(40_000, 8), 2, noise())
    law, found = without_replacement(dict(enumerate(P.tolist())), 2), frequencies(masks)
    for which, chance in law.items():
        assert found.get(which, 0) == pytest.approx(chance, abs=4.5 * math.sqrt(chance / 40_000) + 1e-4), which


def test_density_peaks_by_hand():
    x = torch.randn(2, 7, 5, generator=noise(), dtype=torch.float64)
    found = script.density_peaks(x, noise())
    for frame in range(2):
        apart = [[math.dist(a, b) / 5**0.5 for b in x[frame].tolist()] for a in x[frame].tolist()]
        density = [math.exp(-sum(d * d for d in sorted(row)[:4]) / 4) for row in apart]
        for j in range(7):
            denser = [apart[j][i] for i in range(7) if density[i] > density[j]]
            expected = density[j] * (min(denser) if denser else max(apart[j]))
            assert found[frame, j].item() == pytest.approx(expected, abs=1e-5)
    assert script.density_peaks(torch.zeros(1, 3, 4), noise()).abs().max() == 0  # all alike, and fewer than four


@pytest.mark.parametrize("sampling", ["ocss", "multinomial"])
def test_combinations(sampling):
    """1 + 23 + 8 of 32, all with the budget of k T: by density peaks, the plain top, drawn ones; few frames with all of it."""
    T, n, a = 32, 12, arguments(sampling=sampling)
    token, frame, peaks = (torch.randn(*s, generator=noise(i)) for i, s in enumerate([(T, n), (T,), (T, n)]))
    masks, frames = script.combinations(token, frame, peaks, 0.0625, noise(), a)
    assert masks.shape == (32, T, n) and frames.shape == (8, T)
    assert (masks.sum((1, 2)) == T).all() and (masks[:24].sum(2) == 1).all() and (frames.sum(1) == 4).all()
    assert torch.equal(masks[0].int().argmax(1), peaks.argmax(1)) and torch.equal(masks[1].int().argmax(1), token.argmax(1))
    assert set(frames[0].nonzero()[:, 0].tolist()) == set(frame.topk(4).indices.tolist())
    for mask, chosen in zip(masks[24:], frames):
        assert torch.equal(mask.any(1), chosen)
        for t in chosen.nonzero()[:, 0].tolist():
            assert set(mask[t].nonzero()[:, 0].tolist()) == set(peaks[t].topk(8).indices.tolist())
    again, _ = script.combinations(token, frame, peaks, 0.0625, noise(), a)
    other, _ = script.combinations(token, frame, peaks, 0.0625, noise(1), a)
    assert torch.equal(masks, again) and not torch.equal(masks, other)
    few, one = script.combinations(token, frame, peaks, 0.0625, noise(), arguments(combinations=16, frame_ratio=0.03))
    assert few.shape == (16, T, n) and (one.sum(1) == 1).all() and (few[-4:].sum((1, 2)) == n).all()  # a frame has no more


def test_frames_are_drawn_below_their_cap():
    """Of eight frames one with all the probability is drawn in 3/8 of the cases, whatever its lead."""
    frame = torch.tensor([50.0, *[0.0] * 7])
    args = arguments(combinations=8000)
    _, frames = script.combinations(torch.zeros(8, 4), frame, torch.rand(8, 4), 0.25, noise(), args)
    shares = frames[1:].float().mean(0)
    assert shares[0] == pytest.approx(3 / 8, abs=0.05) and shares[1:].sum() == pytest.approx(5 / 8, abs=0.05)


def test_the_rate_adapts():
    a, one = script.Args(rate_min=0.01, rate_max=0.12), torch.ones(8)
    for rewards, rate, then in (
        (one, 0.02, 0.01), (one, 0.015, 0.01), (one, 0.005, 0.005), (0 * one, 0.02, 0.04), (0 * one, 0.1, 0.12),
        (0 * one, 0.3, 0.3), (torch.tensor([1.0] * 7 + [0]), 0.04, 0.02), (torch.tensor([0.0] * 7 + [1]), 0.04, 0.08),
        (torch.tensor([1.0] * 6 + [0] * 2), 0.04, 0.04), (torch.tensor([1.0, 0]), 0.04, 0.04),
    ):  # fmt: skip
        assert script.next_rate(rate, rewards, a) == pytest.approx(then)


def test_what_an_evaluation_keeps():
    T, n = 4, 16
    token, frame = torch.randn(T, n, generator=noise()), torch.tensor([3.0, 0, -3, 0])
    for budget, important in itertools.product((1, 3, 4, 8, 13, 16, 32, 63, 64), (0.0, 0.5, 1.0)):
        a = arguments(important=important)
        mask = script.kept(token, frame, budget, a)
        assert mask.shape == (T, n) and mask.sum() == budget
        if important == 1:
            each = mask.sum(1)
            assert each.max() <= math.ceil(1.5 * budget / T) and (budget < T or each.min() >= 1)
            assert budget in (1, 3, 4, 63, 64) or each[0] > each[2]
            for t in range(T):
                assert set(mask[t].nonzero()[:, 0].tolist()) == set(token[t].topk(int(each[t])).indices.tolist())
        if important == 0 and budget in (8, 16, 32):
            assert mask.flatten().nonzero()[:, 0].diff().unique().tolist() == [64 // budget]
    assert script.kept(token, torch.tensor([1.0, 1, 1, -1]), 4, arguments()).sum(1).tolist() == [1, 1, 1, 1]  # none is left out
    half = script.kept(token, frame, 16, arguments(important=0.5))
    first = script.kept(token, frame, 8, arguments())
    assert (half | ~first).all()
    assert script.kept(token, frame, 8, arguments(per_frame=4.0)).sum(1).tolist()[0] > 3  # a frame's most is per_frame's


# ---------------------------------------------------------------- the selector, and what it chooses for


@pytest.fixture(scope="module")
def s():
    """A model with random weights that sees needles, and its pictures."""
    task = script.needle()
    task.train, task.test = task.train[:6], task.test[:4]
    processor = tiny_vision.processor(task.tokenizer())
    pictures = vision.encode(task, processor)
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    lm = Qwen2_5_VLForConditionalGeneration(tiny_vision.config("tiny", task)).double().eval().requires_grad_(False)
    args = arguments(max_new_tokens=8, micro_batch_tokens=4096, eval_prompts=4)
    answer = script.answer_ids(task, pictures, args)
    return SimpleNamespace(task=task, pictures=pictures, policy=policy.Policy(lm), args=args, answer=answer)


def asked(s, number=0):
    e = s.task.train[number]
    return script.question(s.policy, s.pictures, e, s.answer[e.id])


def test_a_question(s):
    q, e = asked(s), s.task.train[0]
    assert (q.T, q.n, q.asked, len(q.video)) == (4, 16, len(e.ids), 64)
    own = s.pictures.processor.tokenizer
    text = own.decode(q.labels[0, q.asked :])
    assert text == e.answer + "<eos>" and (q.labels[0, : q.asked] == -100).all()
    assert q.positions.shape == (3, 1, q.x.shape[1])
    assert q.positions[0, 0, q.video].view(4, 16).float().std(1).max() == 0  # a token's time, row and column
    grid = q.positions[:, 0, q.video].view(3, 4, 4, 4)
    assert (grid[1].diff(dim=1) == 1).all() and (grid[2].diff(dim=2) == 1).all()
    q.remember(token=(torch.ones(2, 64), torch.zeros(2)))
    q.remember(token=(torch.ones(3, 64), torch.ones(3)))
    assert [len(x) for x in q.memory["token"]] == [5, 5] and q.memory["token"][1].tolist() == [0, 0, 1, 1, 1]


def test_what_is_remembered_is_learnt_from(s):
    """All combinations so far, tokens and frames with advantages of their own; frames weigh alike, whatever --balance."""
    q, g = asked(s), noise()
    q.old = torch.randn(64, 2, generator=g).double(), torch.randn(4, 2, generator=g).double()
    new = [x + 0.3 * torch.randn(x.shape, generator=g) for x in q.old]
    masks, frames = torch.rand(9, 64, generator=g) < 0.2, torch.rand(6, 4, generator=g) < 0.5
    rewards = [(torch.rand(n, generator=g) < 0.5).double() for n in (9, 6)]
    for part in (slice(0, 4), slice(4, None)):
        q.remember(token=(masks[part], rewards[0][part]), frame=(frames[part], rewards[1][part]))
    for balance in (True, False):
        expected = 0.0
        for i, chosen in enumerate((masks, frames)):
            a = script.advantages(rewards[i])
            for g, b in enumerate(chosen):
                ratio = (script.choice_logp(new[i], b[None]) - script.choice_logp(q.old[i], b[None])).exp()[0]
                each = torch.min(ratio * a[g], ratio.clamp(0.8, 1.28) * a[g])
                mu = b.double().mean()
                w = torch.where(b, 1 - mu, mu) if balance and i == 0 else torch.ones_like(mu).expand(len(b))
                expected = expected + (w * each).sum() / (w.sum() + 1e-7) / len(chosen)
        found, stats = script.remembered(q, new, arguments(balance=balance))
        assert found.item() == pytest.approx(expected.item(), abs=1e-6) and stats["approx_kl"].shape == (9, 64)


def test_pruned_is_masked(s):
    """What is dropped is as if it had never been looked at, and what is left stands where it stood: the same as attention that
    is barred from it; renumbering would be another answer. Rows of several lengths are apart."""
    q, lm = asked(s), s.policy.lm
    keep = torch.ones(3, q.x.shape[1], dtype=torch.bool)
    keep[1, q.video] = torch.rand(64, generator=noise()) < 0.3
    keep[2, q.video] = False
    logits, targets, rows = script.answers(lm, q.x, q.positions, q.labels, keep)
    A = int((q.labels >= 0).sum())
    assert rows.tolist() == [r for r in range(3) for _ in range(A)] and targets.view(3, A).unique(dim=0).shape[0] == 1
    plain = lm.model.language_model
    for row in range(3):
        S = q.x.shape[1]
        barred = keep[row][None, None, None].expand(1, 1, S, S) & torch.ones(S, S).tril().bool()
        barred = barred | torch.eye(S).bool()  # a row that sees nothing would be NaN
        hidden = plain(inputs_embeds=q.x, position_ids=q.positions, attention_mask=barred, use_cache=False).last_hidden_state
        torch.testing.assert_close(logits[rows == row], lm.lm_head(hidden[0, -A - 1 : -1]))
    renumbered, *_ = script.answers(lm, q.x, torch.arange(keep[1].numel()).expand(3, 1, -1), q.labels, keep)
    assert (renumbered - logits)[rows == 1].abs().max() > 1e-3


def test_pruned_by_nothing_is_transformers(s):
    q, e, lm = asked(s), s.task.train[0], s.policy.lm
    logits, *_ = script.answers(lm, q.x, q.positions, q.labels, torch.ones(1, q.x.shape[1]).bool())
    pixels, grid, _ = s.pictures[0]
    ids = torch.tensor([e.ids + s.answer[e.id]])
    pad, types = s.pictures.processor.special[1], (ids < -1).long() * 2
    plain = lm(
        input_ids=ids.where(ids >= 0, pad), mm_token_type_ids=types, pixel_values_videos=pixels.double(),
        video_grid_thw=grid[None], attention_mask=torch.ones_like(ids),
    ).logits  # fmt: skip
    torch.testing.assert_close(logits, plain[0, q.asked - 1 : -1])


def test_right_is_greedy(s):
    """Right: what the model says itself, token by token; and no more once a token is another. By parts it is the same."""
    q, lm = asked(s), s.policy.lm
    masks = torch.rand(5, 4, 16, generator=noise()) < torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0])[:, None, None]
    A = int((q.labels >= 0).sum())
    x, own = q.x.clone(), q.labels.clone()
    for place in range(A):  # of the first mask
        keep = torch.ones(1, x.shape[1], dtype=torch.bool)
        keep[:, q.video] = masks[:1].flatten(1)
        said = script.answers(lm, x, q.positions, q.labels, keep)[0].argmax(-1)[place]
        own[0, q.asked + place], x[0, q.asked + place] = said, lm.get_input_embeddings()(said)
    told = SimpleNamespace(**vars(q) | dict(x=x, labels=own))
    found = script.answered(s.policy, told, masks, s.args)
    assert found[0] == 1 and found.dtype == torch.float32
    few = arguments(micro_batch_tokens=1)
    assert torch.equal(found, script.answered(s.policy, told, masks, few))
    for place in range(A):
        wrong = own.clone()
        wrong[0, q.asked + place] = (wrong[0, q.asked + place] + 1) % len(s.pictures.processor.tokenizer)
        assert script.answered(s.policy, SimpleNamespace(**vars(told) | dict(labels=wrong)), masks[:1], s.args).item() == 0


def test_masks_are_of_the_video_alone(s, monkeypatch):
    """Text is always read, and of the video what a mask keeps."""
    q, masks = asked(s), torch.rand(3, 4, 16, generator=noise()) < 0.4
    monkeypatch.setattr(script, "right", lambda policy, x, positions, labels, keep, args: keep)
    keep = script.answered(s.policy, q, masks, s.args)
    assert torch.equal(keep[:, q.video], masks.flatten(1))
    assert keep.sum() == masks.sum() + 3 * (q.x.shape[1] - 64)


def selector(s):
    return script.Selector(gpu.body(s.policy.lm).layers, 1).double()


def test_the_selector(s):
    """It starts as the model's first layer, which it leaves alone; sees question and video both ways, and not the answer."""
    before, net, q = {k: v.clone() for k, v in s.policy.lm.state_dict().items()}, selector(s), asked(s)
    token, frame = net(q)
    assert token.shape == (64, 2) and frame.shape == (4, 2)
    first = gpu.body(s.policy.lm).layers[0]
    assert all(torch.equal(a, b) for a, b in zip(net.layer.parameters(), first.parameters()))
    assert all(p.requires_grad for p in net.parameters()) and not any(p.requires_grad for p in first.parameters())
    for place, reaches in ((q.asked - 1, True), (int(q.video[-1]), True), (q.asked, False)):
        other = SimpleNamespace(**vars(q) | dict(x=q.x.index_fill(1, torch.tensor([place]), 0.3)))
        moved = (net(other)[0][:60] - token[:60]).abs().amax(1)
        assert (moved > 0).all() if reaches else not moved.any()
    causal = selector(s)
    causal.layer.self_attn.is_causal = True
    assert (causal(q)[0] - token)[:60].abs().max() > 1e-6
    assert torch.equal(selector(s)(q)[0], token)
    assert not torch.equal(script.Selector(gpu.body(s.policy.lm).layers, 2).double()(q)[0], token)
    (token.sum() + frame.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in s.policy.lm.state_dict().items())
    sizes = [m.out_features for m in script.head(64) if isinstance(m, torch.nn.Linear)]
    assert sizes == [32, 16, 8, 4, 2]


def test_an_evaluation(s, monkeypatch):
    found = script.evaluated(s.policy, selector(s), s.pictures, s.task, s.answer, s.args)
    assert list(found) == ["greedy_accuracy", "recall", "prompts"] and found["prompts"] == 4
    asked_of = []
    monkeypatch.setattr(script, "answered", lambda p, q, masks, args: asked_of.append(masks.sum().item()) or torch.ones(1))
    everything = script.evaluated(s.policy, selector(s), s.pictures, s.task, s.answer, s.args, everything=True)
    assert everything == dict(greedy_accuracy=1.0, recall=1.0, prompts=4)
    for budget, important in ((8.0, 1.0), (5.4, 1.0), (0.25, 1.0), (1.0, 1.0), (500.0, 0.5)):
        a = arguments(budget=budget, important=important, eval_prompts=1)
        script.evaluated(s.policy, selector(s), s.pictures, s.task, s.answer, a)
    assert asked_of == [64] * 4 + [8, 5, 16, 1, 64]
    left = script.told(dict(greedy_accuracy=0.3, recall=0.1, prompts=4), dict(greedy_accuracy=0.8, recall=0.7, prompts=4),
                       dict(greedy_accuracy=0.96), s.args)  # fmt: skip
    assert left == "answers right from 8 tokens 0.30 -> 0.80 (from all 0.96), needles among these 0.10 -> 0.70, " \
                   "on 4 held-out questions"  # fmt: skip


def test_blind(s, monkeypatch):
    """What is asked without the video is text alone; questions that are answered right then are left out, each asked once."""
    seen = []

    def right(policy, x, positions, labels, keep, args):
        seen.append((x.shape[1], labels[labels >= 0].tolist()))
        return torch.tensor([float(len(seen) == 1)])

    monkeypatch.setattr(script, "right", right)
    kinds = list(dict.fromkeys((e.prompt, e.answer) for e in s.task.train))
    left = script.unanswered(s.policy, s.task, s.answer, s.args)
    assert len(seen) == len(kinds) and [e for e in s.task.train if (e.prompt, e.answer) != kinds[0]] == left
    e = s.task.train[0]
    assert seen[0] == (len(e.ids) - 64 + len(s.answer[e.id]), s.answer[e.id])
    seen.clear()
    with pytest.raises(UserError, match="answers all of it right without a video"):
        monkeypatch.setattr(script, "right", lambda *x: torch.ones(1))
        script.unanswered(s.policy, s.task, s.answer, s.args)


# ---------------------------------------------------------------- the world


def test_the_world(s):
    """One thing of its shape, in 8 frames of which two and two are alike; the eyes see every cell alone."""
    task = s.task
    for e in task.train[:4] + task.test[:2]:
        things, place = script.scene(e.id)
        shape, colour = things[place]
        assert e.prompt == f"{shape}?" and e.answer == f";{colour}"
        assert sum(other == shape for other, _ in things.values()) == 1
        clip = e.pictures[0]
        assert clip.shape == (8, 16, 16, 3) and (clip[::2] == clip[1::2]).all()
        for t in range(4):
            at = [(*thing, cell % 16) for cell, thing in things.items() if cell // 16 == t]
            assert (clip[2 * t] == tiny_vision.render(at)).all()
    assert np.mean([len(script.scene(i)[0]) for i in range(200)]) == pytest.approx(1 + 0.4 * 63, abs=1)
    q, number = asked(s), -2 - s.task.train[0].ids[1]
    patches, grid, kind = s.pictures[number]
    changed = patches.clone()
    changed[37] = 1 - changed[37]
    s.pictures.own = {number: (changed, grid, kind)}
    moved = (asked(s).x - q.x).abs().amax(2)[0]
    s.pictures.own = {}
    assert moved.nonzero()[:, 0].tolist() == [int(q.video[37])]
    assert script.worlds("needle").name == "needle" and script.worlds("count_sum").name == "count_sum"
    assert script.worlds("rows.jsonl") is None


# ---------------------------------------------------------------- runs


SMALL = "--steps 2 --prompts-per-step 4 --combinations 8 --repetitions 3 --eval-prompts 8 --checkpoint-every 1".split()


def test_a_run_killed_and_resumed(tmp_path):
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "whole", script=CACOVID)
    assert done.code == 0, done.err
    said = done.out.splitlines()[-1]
    assert said.startswith("answers right from 8 tokens 0.") and said.endswith("on 8 held-out questions")
    rows = lines(tmp_path / "whole" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and 0 < row["accuracy"] < 1 for row in rows)
    assert all(row["tokens"] >= 4 * 3 * 8 * 4 and 0.0625 <= row["rate"] <= 0.125 for row in rows)
    assert rows[0]["approx_kl"] > 0 and 0 <= rows[0]["dead_groups"] < 1
    last = sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1]
    assert sorted(p.name for p in last.iterdir()) == ["manifest.json", "state"]  # the selector alone
    killed(tmp_path / "whole", tmp_path / "parts", 1)
    done = run(tmp_path, "--resume", tmp_path / "parts", script=CACOVID)
    assert done.code == 0, done.err
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


def test_what_a_run_trains(tmp_path, monkeypatch):
    """--layer-lr 0 leaves the layer as it is, --repetitions are updates, --blind-filter False asks nothing beforehand."""
    monkeypatch.setattr(script, "unanswered", lambda *x: pytest.fail("asked"))
    flags = dict(steps=2, prompts_per_step=2, combinations=8, repetitions=2, eval_prompts=4, checkpoint_every=0)
    script.train(script.Args(**flags, layer_lr=0.0, blind_filter=False, run_dir=str(tmp_path / "run")))
    saved = contents(next((tmp_path / "run" / "checkpoints").iterdir()))
    lm = gpu.body(AutoModelForImageTextToText.from_pretrained(script.needle().makers.warm_start(script.needle())))
    for name, weight in lm.layers[0].state_dict().items():
        assert torch.equal(saved["own"][f"layer.{name}"], weight)
    fresh = script.Selector(lm.layers, 1).state_dict()
    assert all(not torch.equal(saved["own"][k], w) for k, w in fresh.items() if k.startswith("heads.token"))
    assert {int(x["step"]) for x in saved["optimizer"].values()} == {4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen2.5-VL with random weights that merges patches by two, as a real one, and rows of videos of two sizes."""
    from PIL import Image
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    place, own = tmp_path_factory.mktemp("real"), tiny_vision.tokenizer()
    eyes = dict(spatial_merge_size=2, depth=2, fullatt_block_indexes=[1], window_size=16)
    shape = tiny_vision.config("tiny", SimpleNamespace(tokenizer=tiny_vision.tokenizer, shape=eyes, name=None))
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(shape).save_pretrained(place / "model")
    size = dict(shortest_edge=64, longest_edge=2**16)
    made = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    vision.Processor(own, made).save_pretrained(place / "model")
    rng, rows = np.random.default_rng(0), []
    for i in range(10):
        frames = []
        for t in range(5):  # an odd number: the last one twice
            pixels = rng.integers(0, 255, (32, 32 if i % 2 else 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}-{t}.png")
            frames.append(f"{i}-{t}.png")
        rows.append(dict(video=frames, prompt=f"what is {i}?", answer="ab"[i % 2]))
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


REAL = """--steps 1 --prompts-per-step 2 --combinations 8 --repetitions 2 --dtype float32 --optimizer adamw
          --micro-batch-tokens 64 --eval-prompts 2""".split()


def test_videos_of_a_users_own(folder, tmp_path):
    before = (folder / "model" / "model.safetensors").read_bytes()
    argv = ["--model", folder / "model", "--task", folder / "rows.jsonl", *REAL]
    done = run(tmp_path, *argv, "--run-dir", tmp_path / "run", script=CACOVID)
    assert done.code == 0, done.err
    said = done.out.splitlines()[-1]
    assert said.startswith("answers right from 0.1 of the tokens") and "needles" not in said
    assert "memory plan" in done.out and (folder / "model" / "model.safetensors").read_bytes() == before
    row = lines(tmp_path / "run" / "metrics.jsonl")[0]
    # One token a frame of 8 or 16, in three times; 0.02 of a frame would be none. Two repetitions, 8 combinations each.
    assert row["tokens"] == 2 * 2 * 8 * 3 and row["rate"] == pytest.approx(0.03)  # nothing is right: doubled for the second
    assert set(lines(tmp_path / "run" / "evals.jsonl")[0]) == {"step", "greedy_accuracy", "prompts"}


def test_mistakes(folder, tmp_path):
    """One line each, before anything is trained."""
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    for name, change in (("none", dict(video=[])), ("two", dict(image="0-0.png"))):
        changed = [row | (change if i < 5 else {}) | dict(prompt=f"{i}?") for i in range(6)]  # one has a picture
        text = "".join(json.dumps(row) + "\n" for row in changed)
        (folder / f"{name}.jsonl").write_text(text)
    real = dict(model=str(folder / "model"), run_dir=str(tmp_path / "run"), dtype="float32", optimizer="adamw")
    for flags, why in (
        (real | dict(task=str(folder / "none.jsonl")), r"none.jsonl:\d+: needs one video, or one image; has 0"),
        (real | dict(task=str(folder / "two.jsonl")), r"two.jsonl:\d+: needs one video, or one image; has 2"),
        (real, "--task None: this script takes needle, or a .jsonl file"),
        (dict(task="count_sum"), "--task count_sum: this script takes needle"),
        (dict(combinations=7), "--combinations must be at least 8, is 7: one for the log"),
        (dict(rate=0.0), "--rate must be above 0"), (dict(per_frame=0.5), "--per-frame must be at least 1"),
        (dict(important=1.5), "--important must be at least 0 and at most 1"),
        (dict(prompts_per_step=0), "--prompts-per-step must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            script.train(script.Args(**flags))
    done = run(tmp_path, "--sampling", "uniform", script=CACOVID)
    assert done.code == 2 and "Traceback" not in done.err
    assert "reads no pictures" in user_error(run(tmp_path, "--task", "route", script=CACOVID))
