"""SPO's worked numbers, advantages by their definition, trees and chains of an engine that is made up, and what runs log."""

import dataclasses
import functools
import shutil
from types import SimpleNamespace

import pytest
import torch

from algos import spo
from common import models, tasks, worlds
from common.batch import collate, minibatches
from common.tasks import Example
from tests.helpers import contents, lines, outcome, same, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
SMALL = dict(task="addition", steps=1, prompts_per_step=4, group_size=4, minibatches=2, eval_prompts=4, checkpoint_every=0)
PROBS = torch.tensor([[0.95, 0.5, 0.97, 0.3, 0.8, 0.99, 0.2, 0.96]], dtype=torch.float64)
ALL = torch.ones(1, 8).bool()


def card(R=1.0, **changes):
    """The card's chain -> its advantages, and the mask that it is trained on."""
    args = spo.Args(**dict(interval=2) | changes)
    starts = spo.cutpoints(PROBS.log(), ALL, args)
    values = torch.full_like(PROBS, float("nan"))  # only what is said of a start is read
    values[0, starts[0]] = torch.tensor([0.25, 0.75], dtype=torch.float64)[: starts.sum()]
    adv = spo.advantages(values, starts, torch.tensor([R], dtype=torch.float64), PROBS.log(), ALL, args)
    return starts, adv, spo.unsure(PROBS.log(), ALL, args)


def loss(adv, trained):
    """-> value and gradient at the card's log-ratios."""
    old_logp = PROBS.log()
    ratio = torch.tensor([[0.1, 0.3, -0.2, -0.3, 0.1, 0.05, 0.4, -0.1]], dtype=torch.float64)
    logp = (old_logp + ratio).requires_grad_()
    objective, _ = spo.surrogate(logp, old_logp, adv, trained, spo.Args())
    value = -(objective * spo.token_weights(trained, spo.Args()))[trained].sum()
    value.backward()
    return value.item(), logp.grad[0].tolist()


# ---------------------------------------------------------------- chain


def test_worked_numbers_of_a_chain():
    starts, adv, trained = card()
    assert starts[0].nonzero()[:, 0].tolist() == [1, 4]  # prefixes of 1 and 4 tokens
    assert adv[0].tolist() == pytest.approx([0, 0.5, 0, 0.5, 0.25, 0, 0.25, 0], abs=1e-12)
    assert trained[0].nonzero()[:, 0].tolist() == [1, 3, 4, 6]
    value, gradient = loss(adv, trained)
    assert value == pytest.approx(-0.386675, abs=1e-6)
    assert gradient == pytest.approx([0, 0, 0, -0.092602, -0.069073, 0, 0, 0], abs=1e-6)
    white = spo.whiten(adv, trained)
    wanted = [0, 0.866025, 0, 0.866025, -0.866025, 0, -0.866025, 0]
    assert white[0].tolist() == pytest.approx(wanted, abs=1e-6)
    value, gradient = loss(white, trained)
    assert value == pytest.approx(0.142067, abs=1e-6)
    assert gradient == pytest.approx([0, 0, 0, -0.160392, 0.239276, 0, 0.322989, 0], abs=1e-6)


def test_a_token_at_the_threshold_is_no_choice_but_keeps_its_advantage():
    """pi < rho is trained on, pi > rho is set to 0: what lies between is neither."""
    args, logp = spo.Args(threshold=0.5, interval=1), torch.tensor([[0.25, 0.5, 0.75]]).log()
    mask = torch.ones(1, 3).bool()
    assert logp.exp().tolist() == [[0.25, 0.5, 0.75]]
    assert spo.unsure(logp, mask, args).tolist() == [[True, False, False]] == spo.cutpoints(logp, mask, args).tolist()
    starts = spo.cutpoints(logp, mask, args)
    adv = spo.advantages(torch.zeros(1, 3), starts, torch.ones(1), logp, mask, args)
    assert adv.tolist() == [[1, 1, 0]]


def test_one_segment_is_the_reward_less_the_value():
    """An interval above every number of choices: A = R - V of the state before the first of them, on all that is trained on."""
    for R in (0.0, 1.0):
        starts, adv, trained = card(R, interval=100)
        assert starts.sum() == 1 and starts[0, 1]
        assert adv[trained].tolist() == [R - 0.25] * 4 and not adv[~trained].any()


def slowly(probs, values, R, args):
    """The card's walk along the boundaries."""
    low = [t for t, p in enumerate(probs) if p < args.threshold]
    points = [(t - 1, values[t]) for t in low[:: args.interval]] + [(len(probs) - 1, R)]
    out = []
    for t, p in enumerate(probs):
        before = [v for b, v in points if b < t]
        after = [v for b, v in points if b >= t]
        out.append(after[0] - before[-1] if before and p <= args.threshold else 0.0)
    return out


def test_advantages_by_their_definition():
    g, lengths = torch.Generator().manual_seed(0), torch.tensor([0, 1, 2, 5, 7, 9, 9, 9])
    mask = torch.arange(9) < lengths[:, None]
    for interval in (1, 2, 3, 50):
        args = spo.Args(interval=interval, threshold=0.6)
        probs, values = (torch.rand(8, 9, generator=g, dtype=torch.float64) for _ in range(2))
        probs[5], probs[6] = 0.99, 0.01
        R = torch.rand(8, generator=g, dtype=torch.float64)
        logp = probs.log().masked_fill(~mask, float("nan"))
        starts = spo.cutpoints(logp, mask, args)
        assert not starts[~mask].any() and not starts[5].any()
        adv = spo.advantages(values, starts, R, logp, mask, args)
        for b, n in enumerate(lengths.tolist()):
            wanted = slowly(probs[b, :n].tolist(), values[b].tolist(), R[b].item(), args)
            assert adv[b, :n].tolist() == pytest.approx(wanted, abs=1e-12) and not adv[b, n:].any()
    equal = spo.advantages(torch.full((8, 9), 0.3), starts, torch.full((8,), 0.3), logp, mask, args)
    assert not equal.any()


def test_whitening():
    adv = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), float("nan")]])
    trained = torch.tensor([[True, True, False], [True, False, False]])
    white = spo.whiten(adv, trained)
    x = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(white[trained], (x - x.mean()) / x.std(), **CLOSE)
    assert white[trained].sum().abs() < 1e-6 and not white[~trained].any()
    assert not spo.whiten(adv, trained & False).any()
    one = trained & torch.tensor([[True, False, False], [False] * 3])
    assert not spo.whiten(adv, one).any()  # the unbiased variance of one number
    assert not spo.whiten(torch.full((2, 3), 0.25), trained).any()
    zero = spo.whiten(torch.tensor([[0.0, 1.0, 1.0]]), torch.ones(1, 3).bool())
    assert zero[0, 0] < -1  # a token without a raw advantage gets one


# ---------------------------------------------------------------- tree


def test_worked_numbers_of_a_tree():
    value = torch.tensor([[0.5, 1.0, 0.0]], dtype=torch.float64)
    leaves = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert spo.edges(value.mean(1), value, spo.Args()).tolist() == [[0, 0.5, -0.5]]
    assert spo.edges(value[0, ::2], leaves, spo.Args()).tolist() == [[0.5, -0.5], [0, 0]]
    scaled = spo.edges(value.mean(1), value, spo.Args(sibling_std=True))
    assert scaled[0].tolist() == pytest.approx([0, 1.224745, -1.224745], abs=1e-6)
    assert spo.edges(value[0, ::2], leaves, spo.Args(sibling_std=True))[1].tolist() == [0, 0]


def test_rounding_is_no_advantage():
    """Equal values whose mean is another number in float32: divided by their own std it would be as large as any."""
    value = torch.full((1, 6), 1 / 3)
    value[0, 0] += 3e-8
    for scaled in (False, True):
        assert not spo.edges(value.mean(1) + 3e-8, value, spo.Args(sibling_std=scaled)).any()


class Made:
    """An engine whose completions are made up: what(prompt, given, child, seed) -> (tokens, ended); and all of its calls."""

    name, device = "made", torch.device("cpu")

    def __init__(self, what):
        self.what, self.calls, self.awake = what, [], 0

    def wake(self):
        self.awake += 1

    def sleep(self):
        self.awake -= 1

    def generate(self, prefixes, n, budgets, temperature, seeds):
        self.calls.append(SimpleNamespace(prefixes=prefixes, n=n, budgets=budgets, seeds=seeds))
        out = [self.what(p[0], p[1:], j, s) for p, s in zip(prefixes, seeds) for j in range(n)]
        assert all(0 < len(y) <= budgets[i // n] for i, (y, _) in enumerate(out))
        return [(y, [-0.5] * len(y), ended) for y, ended in out]


TOKENIZER = SimpleNamespace(pad_token_id=0, batch_decode=lambda rows, **_: [" ".join(map(str, y)) for y in rows])
END = 2


def scorer(texts, gold):
    """Right is what ends in 20 2."""
    return texts, [float(t.endswith("20 2")) for t in texts]


def asked(*numbers):
    return [Example(i, "", "", [i]) for i in numbers]


TREE = dict(mode="tree", max_new_tokens=6, branches=(3, 2), segment_tokens=1, edges_now=4)


def plant(what, prompts=(5,), **changes):
    """-> (the edges of trees, the engine, args)."""
    args = spo.Args(**TREE | changes)
    engine = Made(what)
    return spo.tree(engine, scorer, TOKENIZER, asked(*prompts), args, 0), engine, args


def the_card_s(prompt, given, j, seed):
    """a goes on to a right and a wrong leaf, b ends, c goes on to two wrong ones. b's only token is its end: right here."""
    if not given:
        return ([10], [END], [12])[j], j == 1
    return ([20, END] if (given, j) == ([10], 0) else [21, END]), True


def right_b(texts, gold):
    return texts, [float(t.endswith("20 2") or t == "2") for t in texts]


def edge_rows(batch):
    """{(tokens of the whole, tokens of the segment): advantage}, and how often each stands there."""
    T, found = batch.mask.shape[1], []
    for i in range(len(batch.ids)):
        row, seen = batch.ids[i, -T:], batch.attention_mask[i, -T:]
        if batch.mask[i].any():
            found.append((tuple(row[seen].tolist()), tuple(row[batch.mask[i]].tolist()), *batch.adv[i][batch.mask[i]].tolist()))
            assert not batch.adv[i][~batch.mask[i]].any()
    return found


def test_a_tree_by_hand():
    engine, args = Made(the_card_s), spo.Args(**TREE)
    batch = spo.tree(engine, right_b, TOKENIZER, asked(5), args, 0)
    wanted = {((END,), (END,), 0.5), ((12,), (12,), -0.5)}  # a's edge is worth nothing, and c's leaves
    wanted |= {((10, 20, END), (20, END), 0.5, 0.5), ((10, 21, END), (21, END), -0.5, -0.5)}
    assert set(edge_rows(batch)) == wanted and len(edge_rows(batch)) == 4 == batch.group
    assert torch.equal(batch.mask, batch.trained) and batch.columns["reward"].tolist() == [0.5] * 4
    assert batch.columns["sampled"].tolist() == [11, 0, 0, 0] and batch.columns["length"][0] == pytest.approx(7 / 3)
    first, second = engine.calls
    assert (first.n, first.budgets, second.n, second.budgets) == (3, [1], 2, [5, 5])
    assert second.prefixes == [[5, 10], [5, 12]] and len({*first.seeds, *second.seeds}) == 3
    # c's node was cut when collect() scored it: its value is its children's, also where they are right
    better = Made(lambda p, given, j, s: ([20, END], True) if given == [12] else the_card_s(p, given, j, s))
    found = {row[:2]: row[2] for row in edge_rows(spo.tree(better, right_b, TOKENIZER, asked(5), args, 0))}
    assert found[(12,), (12,)] == pytest.approx(1 - 2.5 / 3) and ((12, 20, END), (20, END)) not in found


def test_the_siblings_std_scales_edges():
    batch = spo.tree(Made(the_card_s), right_b, TOKENIZER, asked(5), spo.Args(**TREE, sibling_std=True), 0)
    assert sorted(round(row[2], 5) for row in edge_rows(batch)) == [-1.22474, -1.0, 1.0, 1.22474]


def test_a_node_at_the_cap_is_a_leaf():
    """Never an end: where max_new_tokens is used up nothing goes on, and it is worth 0 as a completion that is cut."""
    batch, engine, _ = plant(lambda *_: ([7, 7], False), max_new_tokens=4, branches=(2, 2, 2), segment_tokens=2)
    assert [c.budgets for c in engine.calls] == [[2], [2, 2], [4]]  # the third level: nothing is open, one call to keep in step
    assert edge_rows(batch) == [] and batch.columns["truncated"].tolist() == [1.0] * 4 and not batch.mask.any()
    assert batch.columns["sampled"].sum() == 12 and batch.columns["informative_groups"].tolist() == [0] * 4
    ended, engine, _ = plant(lambda p, g, j, s: ([20, END] if j else [END], True), segment_tokens=2)
    assert len(engine.calls) == 2 and engine.calls[1].prefixes == [[5]] and len(edge_rows(ended)) == 3
    assert ended.columns["sampled"].sum() == 5 and ended.columns["accuracy"][0] == pytest.approx(2 / 3)


def random_tree(prompt, given, j, seed):
    """Half of the leaves are right; no two edges have the same tokens."""
    g = torch.Generator().manual_seed(seed + j)
    token = int(torch.randint(100, 10**6, (1,), generator=g))
    if len(given) < 2:
        return [token], False
    return [token, 20 if token % 2 else 21, END], True


def test_edges_are_dealt_out():
    """39 edges of each question, in groups of the largest number that has an advantage, in any order, none twice; the same with
    other questions beside them, and another order with other noise."""
    batch, engine, args = plant(random_tree, (5, 9, 7), branches=(3, 3, 3), edges_now=8)
    assert [len(c.seeds) for c in engine.calls] == [3, 9, 27] and len({s for c in engine.calls for s in c.seeds}) == 39
    rows = edge_rows(batch)
    assert len(set(rows)) == len(rows) > 60 and batch.group % 8 == 0 and len(batch.ids) == 3 * batch.group
    count = batch.mask.any(1).view(3, -1).sum(1)
    assert 0 <= batch.group - count.max() < 8 and (batch.prompt_id.view(3, -1) == torch.tensor([[5], [9], [7]])).all()
    assert (batch.columns["sampled"] > 0).sum() == 3 and batch.columns["sampled"].sum() == 3 * (3 + 9 + 27 * 3)
    empty = ~batch.mask.any(1)
    assert empty.any() and not batch.adv[empty].any() and not batch.attention_mask[empty, -batch.mask.shape[1] :].any()
    assert batch.attention_mask[empty].sum(1).tolist() == [1] * int(empty.sum())  # the prompt alone
    alone, _, _ = plant(random_tree, (5,), branches=(3, 3, 3), edges_now=8)
    n = int(count[0])
    assert edge_rows(alone) == rows[:n]
    lengths = [len(row[0]) for row in rows[:n]]
    assert lengths != sorted(lengths)
    other = spo.tree(Made(random_tree), scorer, TOKENIZER, asked(5), args, 1)
    assert not set(edge_rows(other)) & set(rows)
    few, _, _ = plant(random_tree, (5, 9, 7), branches=(3, 3, 3), edges_now=8, edge_life=2)
    assert few.group == 16 and set(edge_rows(few)) < set(rows)


def test_edges_wait_and_are_used_once():
    """Three rollouts of two questions: a part of each is due at once, the next one a step later, behind the older edges of the
    same question."""
    queue, used, all_of_them, ages = [], [], [], []
    for step in range(9):
        batch, _, args = plant(random_tree, (10 + 2 * step, 11 + 2 * step), branches=(3, 3, 3), edges_now=8)
        batch.policy_version.fill_(step)
        if step < 3:
            all_of_them += edge_rows(batch)
            queue.append(batch)
        now, queue = spo.due(queue, args)
        used += edge_rows(now)
        ages.append((step - now.policy_version).view(2, -1, 8)[:, :, 0].tolist())  # five parts each
        assert now.group == 8 and all(b.group % 8 == 0 for b in queue)
        if not queue:
            break
    assert sorted(used) == sorted(all_of_them) and len(set(used)) == len(used)
    assert ages == [[[0]] * 2, [[1, 0]] * 2, [[2, 1, 0]] * 2, [[3, 2, 1]] * 2, [[4, 3, 2]] * 2, [[4, 3]] * 2, [[4]] * 2]


def test_stale_edges():
    """With --stale 1 the newest rollout is not touched."""
    args = spo.Args(mode="tree", stale=1, edges_now=8)
    batches = [plant(random_tree, (i,), branches=(3, 3, 3), edges_now=8)[0] for i in (10, 11)]
    now, later = spo.due(list(batches), args)
    assert now.prompt_id.unique().tolist() == [10] and later[-1] is batches[1] and later[0].group == batches[0].group - 8
    chain = spo.Args(stale=1, group_size=batches[0].group)
    now, later = spo.due(list(batches), chain)
    assert edge_rows(now) == edge_rows(batches[0]) and later == [batches[1]]


# ---------------------------------------------------------------- the values of a chain


def test_values_of_distinct_states():
    """Two prompts, groups of two. Segments of the first start behind [], [10], [10]; of the second behind [10]."""
    batch = collate([([5], [10, 11, END]), ([5], [10, 12, END]), ([6], [10, 11, END]), ([6], [10, END])])
    batch.group, batch.reward = 2, torch.tensor([1.0, 0.0, 1.0, 0.0])
    p = torch.tensor([[0.2, 0.3, 0.95], [0.99, 0.3, 0.99], [0.95, 0.5, 0.99], [0.95, 0.99, 1.0]])
    batch.old_logp = p.log()
    args = spo.Args(interval=1, mc_rollouts=4, max_new_tokens=5)

    def what(prompt, given, j, seed):
        return ([20, END], True) if j < len(given) + prompt - 4 else ([21] * (5 - len(given)), False)

    engine = Made(what)
    spo.chain(engine, scorer, TOKENIZER, asked(5, 6), batch, args, 3)
    (call,) = engine.calls
    assert call.prefixes == [[5], [5, 10], [6, 10]] and call.n == 4 and call.budgets == [5, 4, 4] and engine.awake == 0
    assert len(set(call.seeds)) == 3
    values = [[0.25, 0.5, 0], [0, 0.5, 0], [0, 0.75, 0], [0, 0, 0]]
    assert batch.columns["values"].tolist() == values
    assert batch.adv.tolist() == [[0.25, 0.5, 0], [0, -0.5, 0], [0, 0.25, 0], [0, 0, 0]]
    mc = (2 + 3 * 5) + (2 * 2 + 2 * 4) + (3 * 2 + 4)
    assert batch.columns["sampled"].sum() == 3 + 3 + 3 + 2 + mc
    again = Made(what)
    spo.chain(again, scorer, TOKENIZER, asked(5, 6), dataclasses.replace(batch, columns={}), args, 4)
    assert not set(again.calls[0].seeds) & set(call.seeds)  # other noise


def test_killed_checks_of_continuations_are_said():
    """Else they would be values of 0 without a word."""
    batch = collate([([5], [10, END]), ([5], [END])])
    batch.group, batch.reward, batch.old_logp = 2, torch.tensor([1.0, 0.0]), torch.full((2, 2), -0.7)

    class Slow:
        timeouts = 3

        def __call__(self, texts, gold):
            self.timeouts += 2
            return scorer(texts, gold)

    batch.timeouts = 1
    args = spo.Args(interval=1, mc_rollouts=2, max_new_tokens=5)
    spo.chain(Made(lambda *_: ([20, END], True)), Slow(), TOKENIZER, asked(5), batch, args, 0)
    assert batch.timeouts == 1 + 2


def test_a_process_without_a_choice_keeps_in_step():
    batch = collate([([5], [10, END]), ([5], [END])])
    batch.group, batch.reward, batch.old_logp = 2, torch.tensor([1.0, 0.0]), torch.full((2, 2), -0.01)
    engine = Made(lambda *_: ([20, END], True))
    spo.chain(engine, scorer, TOKENIZER, asked(5), batch, spo.Args(interval=1, max_new_tokens=5), 0)
    assert len(engine.calls) == 1 and len(engine.calls[0].prefixes) == 1
    assert not batch.adv.any() and batch.columns["sampled"].tolist() == [2, 1]


# ---------------------------------------------------------------- the loop


def test_weights_of_a_minibatch():
    """1 / B for each sequence, B without the rows that have no token; A' over all that is trained on in the minibatch."""
    batch = collate([([5], [10, 11, END]), ([5], [10]), ([6], [10, 12]), ([6], [11, END])])
    batch.mask[1] = False
    batch.mask[3, 0] = False  # an edge, that begins behind its prefix
    batch.trained = batch.mask.clone()
    batch.trained[0, 1] = False
    batch.adv = torch.arange(12.0).view(4, 3)
    args = SimpleNamespace(seed=1, minibatches=1, epochs=1, tis_cap=0)
    one = batch.mask & (batch.mask.cumsum(1) == 1)
    ((rows, weights),) = minibatches(batch, args, 0, spo.token_weights, normalise=spo.whiten, sequences=one)
    assert sorted(rows.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(batch.columns["sequences"].sum(1), torch.tensor([1, 0, 1, 1]) / 3)
    torch.testing.assert_close(weights, batch.trained / 5)
    x = torch.tensor([0.0, 2, 6, 7, 10])
    torch.testing.assert_close(batch.adv[batch.trained], (x - x.mean()) / x.std())


@pytest.fixture(scope="module")
def train(tiny):
    """train(folder, ...) -> rows of the metrics, and the weights. The prompts are made and encoded once for all runs."""
    once = functools.cache(lambda name, load=tasks.load: load(name, models.load_tokenizer(spo.Args(model=str(tiny)))))

    def trained(folder, **changes):
        spo.train(spo.Args(**SMALL | dict(run_dir=str(folder)) | changes))
        *_, last = sorted((folder / "checkpoints").glob("step-*"))
        return lines(folder / "metrics.jsonl"), (last / "model.safetensors").read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load", lambda name, *_: once(name))
        patch.setattr(worlds.tiny, "warm_start", lambda *_, **__: str(tiny))
        yield trained


@pytest.fixture(scope="module")
def plain(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("plain"))


def test_micro_batches_change_nothing(train, plain, tmp_path):
    """Whitening and weights are of the minibatch."""
    (row,), _ = train(tmp_path / "run", micro_batch_tokens=40)
    for key in ("loss", "grad_norm", "ref_kl", "ratio", "clip_fraction", "adv_abs"):
        assert row[key] == pytest.approx(plain[0][0][key], rel=1e-4, abs=1e-6), key


def test_the_penalty_is_a_sum(train, tmp_path):
    """Two passes over one minibatch. Whitened advantages add up to 0, so the loss is that of the second pass, all penalty."""
    (row,), _ = train(tmp_path / "run", epochs=2, minibatches=1, beta=1e4, lr=1e-3)
    per_sequence = row["trained_tokens"] / 16
    assert row["ref_kl"] > 1e-4 and per_sequence > 1.5
    assert row["loss"] == pytest.approx(1e4 * row["ref_kl"] * per_sequence, rel=1e-2)


@pytest.mark.parametrize("changes", [dict(prob_mask=False), dict(whiten=False), dict(beta=0.5), dict(eps=0.01)], ids=str)
def test_flags_of_the_loop(train, plain, tmp_path, changes):
    (row,), weights = train(tmp_path / "run", **changes)
    assert weights != plain[1] and row["grad_norm"] > 0
    if "prob_mask" in changes:
        assert row["trained"] == 1 and row["adv_abs"] < plain[0][0]["adv_abs"]
    if "whiten" in changes:
        assert row["adv_max"] == plain[0][0]["adv_max"] and row["adv_mean"] == plain[0][0]["adv_mean"]  # what is logged is raw


def test_updates_that_are_not_made(train, tmp_path, monkeypatch):
    """Without a token that is trained on, or with a mean ratio above 10, not even the weight decay moves anything."""
    _, before = train(tmp_path / "still", lr=0.0)
    (row,), weights = train(tmp_path / "sure", threshold=1e-9, weight_decay=0.1)
    assert weights == before and row["trained_tokens"] == row["mc_tokens"] == row["segments"] == 0
    surrogate = spo.surrogate

    @functools.wraps(surrogate)
    def moved(*args, mean):
        objective, stats = surrogate(*args)
        return objective, stats | dict(ratio=torch.full_like(objective, mean))

    for mean, made in ((10.5, False), (9.5, True)):
        monkeypatch.setattr(spo, "surrogate", functools.partial(moved, mean=mean))
        (row,), weights = train(tmp_path / str(mean), weight_decay=0.1)
        assert (weights != before) == made and row["grad_norm"] > 0 and row["skipped_updates"] == 0


def test_what_a_chain_logs(plain):
    ((row,), _) = plain
    assert row["tokens"] == 16 * row["length"] and row["sampled_tokens"] == row["tokens"] + row["mc_tokens"]
    assert row["mc_tokens"] > 9 * 4 and row["trained"] * row["tokens"] == pytest.approx(row["trained_tokens"])
    assert 1 < row["segments"] == row["trained_tokens"] / 16 and 0 < row["adv_abs"] < 1  # interval 1
    assert row["staleness"] == 0 and row["ref_kl"] > 0 and 0.9 < row["ratio"] < 1.1


def test_a_tree_in_two_halves(train, tmp_path):
    """Bit for bit, with edges that wait: 8 of them a question at once."""
    more = dict(mode="tree", edges_now=8, branches=(3, 3, 3), segment_tokens=5, checkpoint_every=1)
    train(tmp_path / "whole", steps=2, **more)
    train(tmp_path / "parts", **more)
    state = contents(tmp_path / "parts" / "checkpoints" / "step-000001")
    (waits,) = state["queue"][0]
    assert waits.group in (8, 16, 24) and (waits.policy_version == 0).all() and waits.old_logp.any()
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")  # this process may hold the lock of the first one
    spo.train(spo.Args(resume=str(tmp_path / "copy"), steps=2))
    a, b = (outcome(tmp_path / name) for name in ("whole", "copy"))
    a.evals = b.evals = ""  # the first half evaluates at its own end, too
    same(a, b)
    rows = lines(tmp_path / "whole" / "metrics.jsonl")
    assert [r["staleness"] for r in rows] == [0, 1] and min(r["edges"] for r in rows) > 8
    for row in rows:
        assert row["sampled_tokens"] > row["tokens"] > row["trained_tokens"] > 0 and "mc_tokens" not in row
        assert 0 < row["accuracy"] == row["reward"] < 1 and 8 < row["length"] < 29 and row["informative_groups"] >= 0.5
        assert row["sampler_gap_max"] < 1e-4


def test_stale_runs(train, tmp_path):
    for mode in ("chain", "tree"):
        rows, _ = train(tmp_path / mode, mode=mode, stale=1, steps=2, branches=(2, 2))
        assert [r["staleness"] for r in rows] == [0, 1]


def test_equal_children_of_large_values_have_no_advantage():
    """Means of six equal numbers are not equal to them to the last bit."""
    value = torch.full((1, 6), 77.7)
    for sibling_std in (False, True):
        assert not spo.edges(value[:, 0].nextafter(torch.zeros(1)), value, spo.Args(sibling_std=sibling_std)).any()
    assert spo.edges(torch.tensor([0.5]), torch.tensor([[0.50001, 0.49999]]), spo.Args()).abs().min() > 0


def test_killed_checks_are_said_once():
    """Those of a tree with the first of its edges, and what is logged are rows that have a token."""
    batch = collate([([1, 2], [3, 4]), ([1, 2], [5]), ([1, 2], []), ([1, 2], [])])
    batch.group, batch.timeouts = 4, 3
    now, rest = spo.due([batch], spo.Args(mode="tree", edges_now=2))
    assert now.timeouts == 3 and [b.timeouts for b in rest] == [0] and len(rest[0].ids) == 2
    assert len(spo.shown(batch).ids) == 2 and len(spo.shown(rest[0]).ids) == 2
