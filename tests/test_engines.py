"""The sampler: what it draws, what it says of it, budgets, prefixes, and the decoder that it stands on."""

import random
from types import SimpleNamespace

import pytest
import torch

from common import engines, gpu, rollout
from common.batch import collate, read
from tests.batches import args, sample, scorer, tiny

__all__ = ["tiny"]


def test_the_sampler_says_the_log_probs_that_the_policy_has(tiny):
    a, batch = sample(tiny)
    logp = read(tiny[1], batch, a)[0]
    assert ((logp - batch.sampler_logp).abs() * batch.mask).max() < 2e-5


def test_sampling_follows_the_distribution(tiny):
    """First tokens of 4,000 samples of one prompt against the model's own probabilities, temperature included."""
    tokenizer, policy, task = tiny
    prompt = task.train[0].ids
    with torch.no_grad():
        probs = torch.softmax(policy.lm(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.7, -1)
    done = engines.HF(policy, tokenizer).generate([prompt] * 40, 100, 1, 1.7, list(range(40)))
    counts = torch.bincount(torch.tensor([d[0][0] for d in done]), minlength=len(probs)).float() / len(done)
    assert ((counts - probs).abs() < 5 * (probs * (1 - probs) / len(done)).sqrt() + 1e-4).all()


def test_a_completion_depends_on_its_seed_alone(tiny):
    tokenizer, policy, task = tiny
    engine = engines.HF(policy, tokenizer, rows=8)
    prefixes = [e.ids for e in task.train[:5]]
    together = engine.generate(prefixes, 4, 28, 2.0, [10, 11, 12, 13, 14])  # hot, so that they end at different times
    assert len({len(ids) for ids, _, _ in together}) > 3
    for i, prefix in enumerate(prefixes):
        alone = engine.generate([prefix], 4, 28, 2.0, [10 + i])
        assert [c[0] for c in together[4 * i : 4 * i + 4]] == [c[0] for c in alone]
    other = engine.generate(prefixes[4:], 4, 28, 2.0, [99])
    assert [c[0] for c in other] != [c[0] for c in alone]


def test_large_layers_are_packed_while_sampling():
    """The same numbers as the plain product, of the weights as they are now; small ones and other types stay."""
    torch.manual_seed(0)
    lm = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 8), torch.nn.Linear(512, 512).bfloat16())
    x = torch.randn(3, 5, 512)
    for _ in range(2):
        expected = lm[0](x)
        with engines.HF.whole(SimpleNamespace(lm=lm, device=torch.device("cpu"))), torch.no_grad():
            assert ["forward" in vars(m) for m in lm] == [torch.backends.mkldnn.is_available(), False, False]
            torch.testing.assert_close(lm[0](x), expected, rtol=1e-5, atol=1e-5)
            assert not lm[0](x).requires_grad
        assert not any("forward" in vars(m) for m in lm) and lm[0](x).requires_grad
        lm[0].weight.data.mul_(-2.0)


def test_tokens_in_tokens_out(tiny):
    """What is trained on is what was sampled: EOS inside the mask, nothing after it, truncation said and scored as wrong."""
    tokenizer, _, task = tiny
    a, batch = sample(tiny, max_new_tokens=6)
    assert batch.mask.shape[1] <= 6 and batch.truncated.any() and not batch.truncated.all()
    for i, row in enumerate(batch.ids[:, -batch.mask.shape[1] :]):
        tokens = row[batch.mask[i]].tolist()
        assert (tokenizer.eos_token_id in tokens) == (not batch.truncated[i])
        assert tokenizer.eos_token_id not in tokens[:-1]
        prompt = batch.ids[i][batch.attention_mask[i]].tolist()[: -len(tokens)]
        assert prompt == task.train[i // 4].ids
    assert not batch.accuracy[batch.truncated].any()


class Said:
    """An engine that says what it is told to."""

    device = torch.device("cpu")

    def __init__(self, *done):
        self.done = list(done)

    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        return self.done


def test_a_truncated_completion_is_wrong_even_where_its_text_is_right(tiny):
    tokenizer, _, task = tiny
    ids = tokenizer(":" + task.train[0].answer)["input_ids"]
    engine = Said((ids, [0.0] * len(ids), False), (ids + [tokenizer.eos_token_id], [0.0] * (len(ids) + 1), True))
    batch = rollout.collect(engine, scorer, tokenizer, task.train[:1], args(group_size=2), 0)
    assert batch.accuracy.tolist() == [0.0, 1.0]


def test_seeds_differ():
    seeds = {gpu.hash_seed(s, step, i) for s in range(5) for step in range(40) for i in range(64)}
    assert len(seeds) == 5 * 40 * 64 and all(0 <= s < 2**63 for s in seeds)


# ---------------------------------------------------------------- budgets and prefixes


def middles(tiny, n, seed=5):
    """n prompts, each with the first tokens of a sampled completion: between none and all but one of them."""
    tokenizer, policy, task = tiny
    examples = (task.train * 2)[:n]
    done = engines.HF(policy, tokenizer).generate([e.ids for e in examples], 1, 28, 1.0, list(range(n)))
    g = torch.Generator().manual_seed(seed)
    return examples, [ids[: int(torch.randint(len(ids), (1,), generator=g))] for ids, _, _ in done]


def test_completions_go_on_from_the_middle(tiny):
    """64 prefixes x 3 continuations: the sampler's log-probs are those of the training pass, through small micro-batches; only
    what is new is trained; the whole completion is there and is what is scored."""
    tokenizer, policy, _ = tiny
    examples, given = middles(tiny, 64)
    a = args(micro_batch_tokens=64)
    seeds = [gpu.hash_seed(1, 2, i) for i in range(64)]
    batch = rollout.collect(
        engines.HF(policy, tokenizer), scorer, tokenizer, examples, a, 0, given=given, n=3, budget=9, seeds=seeds
    )
    logp, _ = read(policy, batch, a)
    new = batch.trained
    assert new.any() and ((logp - batch.sampler_logp).abs() * new).max() < 5e-5
    begun = torch.tensor([len(g) for g in given for _ in range(3)])
    assert torch.equal(batch.mask.sum(1) - new.sum(1), begun) and new.sum(1).max() <= 9
    assert not (batch.sampler_logp * ~new).any() and (begun > 0).any()
    for i, text in enumerate(batch.texts):
        row = batch.ids[i, -batch.mask.shape[1] :][batch.mask[i]].tolist()
        assert row[: begun[i]] == given[i // 3] and tokenizer.decode(row, skip_special_tokens=True) == text
    summary = rollout.summary(batch_with(batch, old_logp=logp, adv=torch.zeros_like(logp)))
    assert summary["length"] == pytest.approx(batch.mask.sum(1).double().mean().item())
    adv = (torch.arange(new.shape[1]) + 1.0).expand(new.shape)  # its mean is of trained tokens, whatever stands elsewhere
    mean = torch.tensor([row[some].mean() if some.any() else 0.0 for row, some in zip(adv, new)]).mean().item()
    for outside in (0.0, 7.0):
        summary = rollout.summary(batch_with(batch, adv=adv.where(new, torch.tensor(outside))))
        assert summary["adv_mean"] == pytest.approx(mean)


def batch_with(batch, **fields):
    for name, value in fields.items():
        setattr(batch, name, value)
    return batch


@pytest.mark.parametrize("dtype, close", [(torch.float32, 5e-5), (torch.float64, 1e-6)])
def test_a_prefix_as_prompt_is_a_prefix_as_untrained_part(tiny, dtype, close):
    """The same log-probs and the same gradient, whichever way the beginning of a completion is carried."""
    tokenizer, policy, _ = tiny
    examples, given = middles(tiny, 8)
    policy.to(dtype)
    a = args()
    batch = rollout.collect(engines.HF(policy, tokenizer), scorer, tokenizer, examples, a, 0, given=given, n=2)
    as_prompt = rollout.collect(
        Said(*[(batch.ids[i, -batch.mask.shape[1] :][batch.trained[i]].tolist(), [0.0] * int(batch.trained[i].sum()), True)
               for i in range(16)]),
        scorer, tokenizer, [type(e)(e.id, e.prompt, e.answer, e.ids + g) for e, g in zip(examples, given)], a, 0, n=2,
    )  # fmt: skip
    found = []
    for b in (batch, as_prompt):
        policy.zero_grad()
        logp, _ = policy(b.ids, b.attention_mask, b.mask)
        logp[b.trained].sum().backward()
        found.append((logp[b.trained].detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    policy.float()
    assert (found[0][0] - found[1][0]).abs().max() < close
    assert (found[0][1] - found[1][1]).abs().max() < 10 * close * found[0][1].abs().max()


def test_every_prefix_has_its_own_budget_and_numbers(tiny):
    """Budgets of 0 to 28, two completions each: nobody exceeds his own, and each is what it is alone."""
    tokenizer, policy, task = tiny
    engine = engines.HF(policy, tokenizer, rows=6)
    prefixes, budgets = [e.ids for e in task.train[:5]], [28, 1, 7, 0, 12]
    done = engine.generate(prefixes, 2, budgets, 1.5, [3, 4, 5, 6, 7])
    for i, (prefix, budget) in enumerate(zip(prefixes, budgets)):
        mine = done[2 * i : 2 * i + 2]
        assert all(len(ids) <= budget and len(ids) == len(logp) for ids, logp, _ in mine)
        alone = engine.generate([prefix], 2, budget, 1.5, [3 + i])
        assert [c[0] for c in mine] == [c[0] for c in alone] and [c[2] for c in mine] == [c[2] for c in alone]
    assert done[6:8] == [([], [], False)] * 2 and any(len(ids) == 7 and not ended for ids, _, ended in done[4:6])


def test_greedy_in_three_windows_is_greedy_in_one(tiny):
    tokenizer, policy, task = tiny
    engine, rng = engines.HF(policy, tokenizer), random.Random(0)
    begun = tokenizer([task.demonstrate(rng, e, 1.0)[:5] for e in task.test[:16]])["input_ids"]  # the long, careful way
    prompts = [e.ids + ids for e, ids in zip(task.test, begun)]
    whole = engine.generate(prompts, 1, 27, 0.0, [0] * 16)
    parts = [[] for _ in prompts]
    for _ in range(3):
        going = [i for i, y in enumerate(parts) if tokenizer.eos_token_id not in y]
        more = engine.generate([prompts[i] + parts[i] for i in going], 1, 9, 0.0, [0] * len(going))
        for i, (ids, _, _) in zip(going, more):
            parts[i] += ids
    assert parts == [ids for ids, _, _ in whole] and max(map(len, parts)) > 9


# ---------------------------------------------------------------- the decoder


def whole_pass(lm, rows):
    """Logits behind the last token of each row, each by a pass of its own."""
    return torch.stack([lm(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows])


@torch.no_grad()
def test_the_decoder_is_the_model(tiny):
    """Ragged prefixes, rows dropped, doubled and mixed, several tokens at once, positions forgotten again."""
    _, policy, task = tiny
    lm, g = policy.lm, torch.Generator().manual_seed(0)
    rows = [[5, 9, 30], [7, 8, 9, 10, 11, 12], [40]]
    decoder = engines.Decoder(lm, rows, n=2)
    rows = [row for row in rows for _ in range(2)]
    close = dict(rtol=1e-4, atol=1e-5)

    def tokens(*shape):
        return torch.randint(3, 70, shape, generator=g)

    torch.testing.assert_close(decoder.logits, whole_pass(lm, rows), **close)
    assert decoder.rows.tolist() == [0, 1, 2, 3, 4, 5]
    for index in ([5, 0, 0, 3], [1, 1, 3, 0], [2, 0]):
        decoder.keep(torch.tensor(index))
        fed = tokens(len(index))
        decoder.feed(fed)
        rows = [rows[i] + [t] for i, t in zip(index, fed.tolist())]
        torch.testing.assert_close(decoder.logits, whole_pass(lm, rows), **close)
    assert decoder.rows.tolist() == [3, 0]
    several = tokens(2, 4)
    laws = decoder.feed(several, every=True)
    for k in range(4):
        expected = whole_pass(lm, [row + several[i, : k + 1].tolist() for i, row in enumerate(rows)])
        torch.testing.assert_close(laws[:, k], expected, **close)
    decoder.crop(3)
    decoder.crop(0)
    fed = tokens(2)
    decoder.feed(fed)
    rows = [[*row, several[i, 0].item(), fed[i].item()] for i, row in enumerate(rows)]
    torch.testing.assert_close(decoder.logits, whole_pass(lm, rows), **close)


@torch.no_grad()
def test_what_was_read_stays_where_it_is(tiny):
    """Without gradients a position is written into its place, also when rows leave, until the room of 64 is used up; the logits
    are those of whole passes on both sides of that, and after positions were forgotten and rows came twice."""
    lm, g, close = tiny[1].lm, torch.Generator().manual_seed(0), dict(rtol=1e-4, atol=1e-5)
    rows, places = [[5, 9, 30], [7, 8, 9, 10], [40]], []
    decoder = engines.Decoder(lm, rows)

    def feed():
        fed = torch.randint(3, 70, (len(rows),), generator=g)
        decoder.feed(fed)
        for row, token in zip(rows, fed.tolist()):
            row.append(token)
        return decoder.cache.layers[1].values.data_ptr()

    def moves():
        return sum(a != b for a, b in zip(places, places[1:]))

    for t in range(64):
        if t == 20:
            decoder.keep(torch.tensor([0, 2]))
            rows = [rows[0], rows[2]]
        if t == 30:
            decoder.crop(5)
            rows = [row[:-5] for row in rows]
        places.append(feed())
        if t % 9 == 0:
            torch.testing.assert_close(decoder.logits, whole_pass(lm, rows), **close)
    assert moves() == 0 and decoder.rows.tolist() == [0, 2]
    for _ in range(8):
        places.append(feed())
        torch.testing.assert_close(decoder.logits, whole_pass(lm, rows), **close)
    assert moves() == 1
    decoder.keep(torch.tensor([1, 0, 1]))  # more rows than there were
    rows = [list(rows[i]) for i in (1, 0, 1)]
    for _ in range(2):
        places.append(feed())
        torch.testing.assert_close(decoder.logits, whole_pass(lm, rows), **close)
    assert moves() == 2


def test_gradients_pass_through_what_was_read(tiny):
    """Of embeddings that are fed one by one: those of a single pass; also where the beginning was read without gradients."""
    lm = tiny[1].lm
    ids, x = [5, 9, 30], torch.randn(1, 4, lm.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 0.05
    x.requires_grad_()
    with torch.no_grad():
        decoder = engines.Decoder(lm, [ids])
        decoder.feed(torch.tensor([11]))
    for t in range(4):
        decoder.feed(x[:, t])
    begun = lm.get_input_embeddings()(torch.tensor([[*ids, 11]])).detach()
    logits = lm(inputs_embeds=torch.cat([begun, x], 1), use_cache=False).logits[:, -1]
    found, expected = (torch.autograd.grad(z[0, 7], x)[0] for z in (decoder.logits, logits))
    assert expected[:, 0].abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_an_embedding_may_be_fed(tiny):
    """That of a token is the token; a mixture is what transformers makes of it, and the hidden states are there."""
    _, policy, _ = tiny
    lm, embed = policy.lm, policy.lm.get_input_embeddings()
    prefixes, fed = [[5, 9, 30], [7, 8]], torch.tensor([11, 12])
    by_id, by_embedding = (engines.Decoder(lm, prefixes, layers=(0, 1, 2, "normed")) for _ in range(2))
    by_id.feed(fed)
    by_embedding.feed(embed(fed))
    assert torch.equal(by_id.logits, by_embedding.logits)
    torch.testing.assert_close(by_id.states[0], embed(fed))
    torch.testing.assert_close(lm.lm_head(by_id.states["normed"]), by_id.logits)
    torch.testing.assert_close(lm.model.norm(by_id.states[2]), by_id.states["normed"])
    mixture = 0.3 * embed(torch.tensor([20, 21])) + 0.7 * embed(torch.tensor([40, 41]))
    by_embedding.feed(mixture)
    for i, prefix in enumerate(prefixes):
        x = torch.cat([embed(torch.tensor([*prefix, fed[i].item()])), mixture[i : i + 1]])
        torch.testing.assert_close(by_embedding.logits[i], lm(inputs_embeds=x[None]).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_thoughts_that_are_fed_are_replayed_in_one_packed_pass(tiny):
    """Two soft positions, then tokens, three completions a prompt: what the decoder saw is what the trainer computes."""
    _, policy, task = tiny
    lm, embed, g = policy.lm, policy.lm.get_input_embeddings(), torch.Generator().manual_seed(1)
    prompts = [e.ids for e in task.train[:2]] + [[9, 9]]
    B, T, close = 9, 5, 5e-5
    mix, written = torch.rand(B, 2, 78, generator=g).softmax(-1) ** 2, torch.randint(3, 70, (B, T), generator=g)
    with torch.no_grad():
        decoder, said = engines.Decoder(lm, prompts, n=3), []
        for t in range(T):
            said.append(decoder.logits.log_softmax(-1).gather(1, written[:, t : t + 1])[:, 0])
            decoder.feed(mix[:, t] @ embed.weight[:78] if t < 2 else written[:, t])
    batch = collate([(prompts[i // 3], written[i].tolist()) for i in range(B)])
    soft = torch.zeros(B, T, dtype=torch.bool)
    soft[:, :2] = True

    def make(embedding):
        return mix.flatten(0, 1) @ embedding.weight[:78]

    for packs in (True, False):
        policy.packs = packs
        logp, _ = policy(batch.ids, batch.attention_mask, batch.mask, thoughts=(soft, make))
        assert (logp - torch.stack(said, 1)).abs().max() < close
    policy.packs = True
    plain, _ = policy(batch.ids, batch.attention_mask, batch.mask)
    assert (plain - logp).abs().max() > 0.1
    lm.zero_grad()
    logp.sum().backward()  # what is fed is detached: its words get a gradient as outputs and as tokens only
    assert all(p.grad is not None for p in policy.parameters())
