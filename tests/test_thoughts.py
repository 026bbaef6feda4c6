"""Completions that begin with thoughts: what is fed, shown, kept and drawn, and that the training pass sees the same again."""

import pytest
import torch

from common import rollout, settings
from common.batch import read
from common.engines import HF
from common.thoughts import Thinker
from tests.batches import args, scorer, tiny

__all__ = ["tiny"]
K, CLOSE = 3, 5e-5


def think(z, embedding, noise, args):
    """Mixes the K likeliest tokens by random weights; the density is a made-up one that hangs on the logits."""
    logp, ids = z.log_softmax(-1).topk(K)
    weights = logp.exp() if noise is None else noise.to(logp) + 0.1
    mixed, record = mixture(embedding, torch.cat([ids.to(weights), weights], -1)), torch.cat([ids.to(weights), weights], -1)
    return mixed, ids[:, 0], record, density(record, z), ids[:, 0] == args.marker


def mixture(embedding, record):
    ids, weights = record[:, :K].long(), record[:, K:]
    return torch.einsum("nk,nkh->nh", weights.to(embedding.weight.dtype), embedding(ids))


def density(record, z):
    return (record[:, K:] * z.log_softmax(-1).gather(1, record[:, :K].long())).sum(-1)


def replay(mb, args):
    given = mb.columns["given"]
    soft = given[:, :, 0] > 0

    def logp(given, z):
        token = z.log_softmax(-1).gather(1, given[:, 1:2].long())[:, 0]
        kept = given[:, 2 + K :].sum(-1) > 0
        return torch.where(kept, density(given[:, 2:], z), token), token

    return dict(read=logp, given=given, thoughts=(soft, lambda embedding: mixture(embedding, given[soft][:, 2:])))


def engine(tiny, a, thoughts=4, marker=-1, **more):
    tokenizer, policy, _ = tiny
    a.thoughts, a.marker, a.stop = thoughts, marker, ()
    return Thinker(policy, tokenizer, a, think, a.thoughts, numbers=K, m=2 * K, **more)


def rollouts(tiny, a, e, n=6):
    tokenizer, _, task = tiny
    batch = rollout.collect(e, scorer, tokenizer, task.train[:n], a, 0)
    e.attach(batch)
    return batch


def test_the_training_pass_sees_what_was_fed(tiny):
    a = args(max_new_tokens=28, micro_batch_tokens=256)
    batch = rollouts(tiny, a, engine(tiny, a))
    logp, _ = read(tiny[1], batch, a, how=replay)
    soft = batch.columns["given"][:, :, 0] > 0
    assert soft.sum(1).eq(4).all() and torch.equal(batch.columns["given"][:, :, 1].long(), batch.ids[:, -soft.shape[1] :])
    assert ((logp - batch.sampler_logp).abs() * batch.mask).max() < CLOSE
    plain, _ = read(tiny[1], batch, a)
    assert ((plain - batch.sampler_logp).abs() * batch.mask)[:, 4:].max() > 0.01


def test_a_completion_depends_on_its_own_numbers_alone(tiny):
    """Cut into calls or not, alone or not, whatever others' budgets; thoughts of other seeds are others."""
    a = args()
    e, prefixes = engine(tiny, a), [x.ids for x in tiny[2].train[:5]]
    together = e.generate(prefixes, 3, 20, 1.5, [10, 11, 12, 13, 14])
    given = [x.clone() for x, _ in e.given]
    e.rows = 6
    cut = e.generate(prefixes, 3, 20, 1.5, [10, 11, 12, 13, 14])
    assert [x[0] for x in cut] == [x[0] for x in together] and len(e.given) == 3
    alone = e.generate(prefixes[3:4], 3, [20], 1.5, [13])
    assert [x[0] for x in alone] == [x[0] for x in together[9:12]]
    torch.testing.assert_close(e.given[0][0][:, :4], given[0][9:12, :4])
    other = [x[0] for x in e.generate(prefixes, 3, [2, 20, 9, 20, 1], 1.5, [10, 11, 12, 13, 14])]
    assert other[9:12] == [x[0] for x in alone] and [len(x) for x in other[:3]] == [2, 2, 2] and len(other[12]) == 1
    e.generate(prefixes[3:4], 3, [20], 1.5, [99])
    assert (e.given[0][0][:, 0, 2 + K :] - given[0][9:12, 0, 2 + K :]).abs().min() > 1e-6


def test_without_thoughts_it_is_the_plain_engine(tiny):
    tokenizer, policy, task = tiny
    prefixes, seeds = [x.ids for x in task.train[:4]], [1, 2, 3, 4]
    expected = HF(policy, tokenizer).generate(prefixes, 3, 28, 1.0, seeds)
    a = args()
    off = engine(tiny, a)
    off.on = False
    for e in (engine(tiny, args(), thoughts=0), off):
        assert [x[::2] for x in e.generate(prefixes, 3, 28, 1.0, seeds)] == [x[::2] for x in expected]
        assert all((given == 0).all() for given, _ in e.given)
    off.on = True
    assert off.generate(prefixes, 3, 28, 1.0, seeds) != expected


def test_thoughts_end_where_a_token_closes_them_and_forced_tokens_follow(tiny):
    """The closing token is a token, those that are forced depend on what ended the thinking, and no loss is on them."""
    tokenizer, policy, task = tiny
    a = args(max_new_tokens=28)
    free = rollouts(tiny, a, engine(tiny, a, thoughts=6))
    shown = free.ids[:, -free.mask.shape[1] :][:, :6]
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    some = {int(x): (shown == x).any(1).sum().item() for x in shown.unique() if x not in ends}
    marker = max((n, x) for x, n in some.items() if n < len(shown))[1]  # in most, and not in all
    e = engine(tiny, a, thoughts=6, marker=marker, forced=([20, 21], [22]))
    batch = rollouts(tiny, a, e)
    T = batch.mask.shape[1]
    ids, given = batch.ids[:, -T:], batch.columns["given"]
    seen = set()
    for i in range(len(ids)):
        where = (shown[i] == marker).nonzero()
        n = int(where[0]) if len(where) else 6
        more = [20, 21] if len(where) else [22]
        first = n + 1 if len(where) else 6
        seen.add(len(where) > 0)
        assert given[i, :, 0].tolist() == [1.0] * n + [0.0] * (T - n)
        assert ids[i, :n].tolist() == shown[i, :n].tolist() and ids[i, first : first + len(more)].tolist() == more
        forced = torch.zeros(T, dtype=torch.bool)
        forced[first : first + len(more)] = True
        assert torch.equal(batch.trained[i], batch.mask[i] & ~forced)
        assert (given[i, first:, 2:] == 0).all() and (batch.sampler_logp[i][forced] == 0).all()
    assert seen == {True, False}
    logp, _ = read(policy, batch, a, how=replay)
    gap = (logp - batch.sampler_logp).abs() * batch.trained
    closing = (torch.arange(T)[None] == given[:, :, 0].sum(1, keepdim=True)) & (ids == marker)
    assert gap[~closing].max() < CLOSE  # of the closing one, this test's think() has a density of its own


def test_an_end_token_ends_a_completion_where_it_closes_and_is_a_thought_elsewhere(tiny):
    tokenizer, _, task = tiny
    a, prefixes, eos = args(), [x.ids for x in task.train[:8]], tokenizer.eos_token_id
    hot = dict(n=8, max_new_tokens=8, temperature=4.0, seeds=list(range(8)))
    shown = [x[0] for x in engine(tiny, a, thoughts=8).generate(prefixes, **hot)]
    assert any(eos in y for y in shown) and all(len(y) == 8 for y in shown)
    closed = engine(tiny, a, thoughts=8, marker=eos).generate(prefixes, **hot)
    for before, (after, _, ended) in zip(shown, closed):
        n = before.index(eos) + 1 if eos in before else 8
        assert after == before[:n] and ended == (eos in before)


def test_greedily_nothing_is_drawn(tiny):
    tokenizer, policy, task = tiny
    e, prefixes = engine(tiny, args()), [x.ids for x in task.train[:3]]
    one, two = (e.generate(prefixes, 1, 20, 0.0, seeds) for seeds in ([1, 2, 3], [4, 5, 6]))
    assert one == two
    embed, lm = policy.lm.get_input_embeddings(), policy.lm
    z = lm(input_ids=torch.tensor([prefixes[0]])).logits[:, -1]
    fed, shown, record, logp, _ = think(z, embed, None, e.args)
    torch.testing.assert_close(e.given[0][0][0, 0, 2:], record[0].detach(), rtol=1e-4, atol=1e-5)
    assert one[0][0][0] == shown.item() and one[0][1][0] == pytest.approx(logp.item(), rel=1e-4)


def test_hidden_states_may_be_thought_from(tiny):
    a, (_, policy, task) = args(), tiny
    a.thoughts, a.marker, a.stop, said = 2, -1, (), []

    def hidden(h, embedding, noise, args):
        said.append(h)
        return h, torch.full((len(h),), 7), h, h.sum(-1), torch.zeros(len(h)).bool()

    e = Thinker(policy, tiny[0], a, hidden, 2, numbers=1, m=96, layer="normed")
    e.generate([task.train[0].ids], 2, 6, 1.0, [3])
    with torch.no_grad():
        x = policy.lm.get_input_embeddings()(torch.tensor([task.train[0].ids]))
        first = policy.lm.model(inputs_embeds=x).last_hidden_state[:, -1]
        second = policy.lm.model(inputs_embeds=torch.cat([x, first[:, None]], 1)).last_hidden_state[:, -1]
    torch.testing.assert_close(said[0], first.expand(2, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said[1], second.expand(2, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(e.given[0][0][0, :2, 2:], torch.cat([first, second]), rtol=1e-4, atol=1e-4)


def test_vllm_is_refused_where_a_script_needs_more_than_it_gives(capsys):
    class Args:
        hf_only = "embeddings fed while decoding"

        def __init__(self):
            self.engine = "vllm"

    with pytest.raises(SystemExit) as stop:
        settings._check(Args())
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and "embeddings fed while decoding" in line and "--engine hf" in line
