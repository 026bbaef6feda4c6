"""Log-probs in little memory against the naive way, rollouts, micro-batches, and the loop's own arithmetic."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from algos import grpo
from common import models, rollout, tasks


def args(**changes):
    values = dict(model="tiny", task="addition", dtype="float32", lora_rank=0, gradient_checkpointing=False, seed=3,
                  temperature=0.8, micro_batch_tokens=4096, group_size=4, max_new_tokens=28, format_reward=0.0,
                  minibatches=3, epochs=2)  # fmt: skip
    return SimpleNamespace(**values | changes)


@pytest.fixture(scope="module")
def tiny():
    a = args()
    tokenizer = models.load_tokenizer(a)
    return tokenizer, models.load(a, torch.device("cpu")), tasks.load("addition:2", tokenizer)


def scorer(texts, answers):
    return list(texts), [float(t.endswith(a)) for t, a in zip(texts, answers)]


def sample(tiny, n=6, **changes):
    tokenizer, policy, task = tiny
    a = args(**changes)
    batch = rollout.collect(rollout.HF(policy, tokenizer), scorer, tokenizer, task.train[:n], a, 0)
    return a, batch


# ---------------------------------------------------------------- the head


def naive(hidden, weight, targets, temperature):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.log_softmax((hidden @ weight.T).to(wide) / temperature, -1)
    return logits.gather(-1, targets[:, None]).squeeze(-1), -(logits.exp() * logits).sum(-1)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_equals_the_naive_way(rows, temperature, dtype, monkeypatch):
    monkeypatch.setattr(models, "head_rows", lambda n_vocabulary: rows)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 24, generator=g).to(dtype), torch.randn(301, 24, generator=g).to(dtype)
    targets, upstream = torch.randint(301, (50,), generator=g), torch.randn(50, generator=g)
    results = []
    for head in (naive, models.HeadLogp.apply):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = head(h, w, targets, temperature)
        (logp * upstream).sum().backward()
        results.append((logp.detach(), entropy.detach(), h.grad, w.grad))
    for expected, found in zip(*results):  # log-probs are float32 for both; bfloat16 gradients have 8 bits
        close = 1e-5 if found.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_head_keeps_no_logits(monkeypatch):
    """Between forward and backward nothing of size V per token is saved, whatever is read."""
    monkeypatch.setattr(models, "head_rows", lambda n_vocabulary: 16)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    targets, saved = torch.zeros(64, dtype=torch.long), []
    for head in (
        lambda: models.HeadLogp.apply(hidden, weight, targets, 1.0),
        lambda: models.head_read(lambda y, z: (z.logsumexp(-1),), targets, (hidden, weight)),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            head()
        assert sum(saved) < 64 * 5000 / 2 + 4 * weight.numel()


def test_head_keeps_its_chunks_in_one_place(monkeypatch):
    """Whatever the number of chunks: two numbers per logit of one chunk in the forward pass, one in the backward pass."""
    monkeypatch.setattr(models, "head_rows", lambda n_vocabulary: 16)
    hidden, weight = torch.randn(60, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)

    class Large(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = {}

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() >= 4 * 12 * 500:  # the last chunk has 12 rows
                self.found[out.untyped_storage().data_ptr()] = out  # kept, so that no other can come to lie there
            return out

    with Large() as forward:
        loss = models.HeadLogp.apply(hidden, weight, torch.zeros(60, dtype=torch.long))[0].sum()
    with Large() as backward:
        loss.backward()
    assert len(forward.found) == 2 and len(backward.found) == 1


def test_head_of_a_certain_token():
    """A logit so far above the others that their probabilities are 0: entropy 0, no NaN."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1e6], [0.0], [-1e6]])
    logp, entropy = models.HeadLogp.apply(hidden, weight, torch.tensor([0]))
    assert logp.item() == 0 and entropy.item() == 0


@pytest.mark.parametrize("rows", [3, 1000])
def test_reading_two_models_equals_the_naive_way(tiny, rows, monkeypatch):
    """A divergence between two models' distributions, with its gradient, by chunks and from transformers' logits."""
    monkeypatch.setattr(models, "head_rows", lambda n_vocabulary: rows)
    _, policy, _ = tiny
    a, batch = sample(tiny, n=2)
    other = models.load(a, torch.device("cpu"), trainable=False)
    with torch.no_grad():
        other.lm.model.norm.weight.mul_(0.7)

    def kl(targets, logits, other_logits):
        p, q = other_logits.log_softmax(-1), logits.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1), q.gather(-1, targets[:, None]).squeeze(-1)

    policy.zero_grad()
    found, logp = policy(batch.ids, batch.attention_mask, batch.mask, read=kl, beside=[other])
    found.sum().backward()
    grads = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    positions = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    inputs = dict(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=positions)
    both = [m.lm(**inputs).logits for m in (policy, other)]
    T = batch.mask.shape[1]
    q, p = (logits[:, -T - 1 : -1].log_softmax(-1) for logits in both)
    expected = (p.exp() * (p - q)).sum(-1).masked_fill(~batch.mask, 0.0)
    expected.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logp, policy(batch.ids, batch.attention_mask, batch.mask)[0], rtol=1e-5, atol=1e-6)
    for name, weight in policy.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, rtol=1e-3, atol=1e-4)
    policy.zero_grad()


def test_policy_equals_transformers_logits(tiny):
    _, policy, _ = tiny
    a, batch = sample(tiny)
    logp, entropy = policy(batch.ids, batch.attention_mask, batch.mask, a.temperature)
    T = batch.mask.shape[1]
    for i in range(len(batch.ids)):
        row = batch.ids[i][batch.attention_mask[i]]  # no padding at all
        n = int(batch.mask[i].sum())
        logits = torch.log_softmax(policy.lm(input_ids=row[None]).logits[0].float() / a.temperature, -1)
        expected = logits[:-1].gather(-1, row[1:, None]).squeeze(-1)[-n:]
        torch.testing.assert_close(logp[i, :n], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy[i, :n], -(logits.exp() * logits).sum(-1)[:-1][-n:], rtol=1e-5, atol=1e-5)
    assert not logp[~batch.mask].any() and logp.shape == (24, T)


# ---------------------------------------------------------------- packing


def wide_model(kind="qwen2", **changes):
    """A random float64 Policy with fewer key than query heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **sizes | changes)
    return models.Policy(AutoModelForCausalLM.from_config(config).double())


def ragged_batch(groups=(0, 0, 1, 1, 1, 2, 0), lengths=(9, 1, 30, 5, 5, 0, 22), prompts=(7, 3, 12)):
    """Rows in any order whose prompts are shared, the second prompt the end of the first, with garbage in the padding."""
    g = torch.Generator().manual_seed(0)
    S0, T = max(prompts), max(lengths)
    text = [torch.randint(3, 60, (n,), generator=g) for n in prompts]
    text[1] = text[0][-prompts[1] :]
    ids = torch.randint(3, 60, (len(groups), S0 + T), generator=g)
    attention, mask = torch.zeros(ids.shape).bool(), torch.arange(T) < torch.tensor(lengths)[:, None]
    for i, group in enumerate(groups):
        ids[i, S0 - prompts[group] : S0] = text[group]
        attention[i, S0 - prompts[group] : S0] = True
    attention[:, S0:] = mask
    return ids, attention, mask


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("waste", [0, 256, 10**6])
def test_a_packed_pass_equals_the_padded_one(kind, waste, monkeypatch):
    """Log-probs, entropies and every gradient, with attention in buckets of one row, of like rows, and of all rows."""
    buckets = models.buckets
    monkeypatch.setattr(models, "buckets", lambda sizes, **_: buckets(sizes, waste))
    policy, close = wide_model(kind), dict(rtol=1e-5, atol=2e-6)  # transformers' norms work in 32 bits
    if kind == "qwen3_moe":  # torch multiplies groups of matrices in 32 bits at most
        policy = wide_model(kind, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).float()
        close = dict(rtol=1e-3, atol=1e-5)
    ids, attention, mask = ragged_batch()
    upstream = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for policy.packs in (True, False):
        policy.zero_grad()
        logp, entropy = policy(ids, attention, mask, 0.7)
        (logp * upstream).sum().backward()
        results.append((logp, entropy, *(p.grad.clone() for p in policy.parameters())))
    assert results[0][0].abs().max() > 1 and all(x.abs().max() > 0 for x in results[0])
    for packed, padded in zip(*results):
        torch.testing.assert_close(packed, padded, **close)


def test_what_passes_through_the_layers():
    """Each prompt once, each completion token once, no padding."""
    policy, seen = wide_model(), []
    policy.lm.model.layers[0].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    ids, attention, mask = ragged_batch()
    policy(ids, attention, mask)
    assert seen == [(1, 7 + 3 + 12 + int(mask.sum()), 32)]


def test_a_sliding_window_is_not_packed():
    """Where a model's attention forgets, the padded way is taken: a token's log-prob must not depend on what lies outside."""
    policy = wide_model("mistral", sliding_window=4)
    ids, attention, mask = ragged_batch()
    assert not policy.packs and wide_model("mistral", sliding_window=None).packs
    other = ids.clone()
    other[:, 5] = (ids[:, 5] + 1) % 50 + 3  # the first token of the first prompt: two layers of windows reach 6 tokens on
    before, after = (policy(x, attention, mask)[0] for x in (ids, other))
    moved = (before - after).abs().max(0).values > 0
    assert moved[0] and not moved[1:].any()


def test_the_packed_attention_is_not_written_into_a_saved_model(tmp_path):
    policy = wide_model()
    policy.lm.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


# ---------------------------------------------------------------- rollouts


def test_the_sampler_says_the_log_probs_that_the_policy_has(tiny):
    a, batch = sample(tiny)
    logp = rollout.logp_of(tiny[1], batch, a)
    assert ((logp - batch.sampler_logp).abs() * batch.mask).max() < 2e-5


def test_sampling_follows_the_distribution(tiny):
    """First tokens of 4,000 samples of one prompt against the model's own probabilities, temperature included."""
    tokenizer, policy, task = tiny
    prompt = task.train[0].ids
    with torch.no_grad():
        probs = torch.softmax(policy.lm(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.7, -1)
    done = rollout.HF(policy, tokenizer).generate([prompt] * 40, 100, 1, 1.7, list(range(40)))
    counts = torch.bincount(torch.tensor([d[0][0] for d in done]), minlength=len(probs)).float() / len(done)
    assert ((counts - probs).abs() < 5 * (probs * (1 - probs) / len(done)).sqrt() + 1e-4).all()


def test_a_completion_depends_on_its_seed_alone(tiny):
    tokenizer, policy, task = tiny
    engine = rollout.HF(policy, tokenizer, rows=8)
    prefixes = [e.ids for e in task.train[:5]]
    together = engine.generate(prefixes, 4, 28, 2.0, [10, 11, 12, 13, 14])  # hot, so that they end at different times
    assert len({len(ids) for ids, _, _ in together}) > 3
    for i, prefix in enumerate(prefixes):
        alone = engine.generate([prefix], 4, 28, 2.0, [10 + i])
        assert [c[0] for c in together[4 * i : 4 * i + 4]] == [c[0] for c in alone]
    other = engine.generate(prefixes[4:], 4, 28, 2.0, [99])
    assert [c[0] for c in other] != [c[0] for c in alone]


def test_the_growing_cache_is_transformers_own():
    """Any order of appending, repeating and selecting: the same keys and values; room is made before a write, not after."""
    from transformers import DynamicCache

    g = torch.Generator().manual_seed(0)
    config = models.tiny_config()
    caches = rollout.growing_cache(config, 400), DynamicCache(config=config)

    def both(method, *a):
        out = [getattr(c, method)(*a) for c in caches]
        for layer in range(2):
            found, expected = (c.layers[layer] for c in caches)
            if expected.is_initialized:
                assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values), method
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        return out

    def append(rows, n):
        for layer in range(2):
            keys, values = torch.randn(2, rows, 3, n, 8, generator=g)
            (a, b), (c, d) = both("update", keys, values, layer)
            assert torch.equal(a, c) and torch.equal(b, d)

    append(3, 5)
    both("batch_repeat_interleave", 4)
    for n in (1, 1, 90, 1):
        append(12, n)
    both("batch_select_indices", torch.tensor([0, 11, 2, 3, 10, 5, 6, 7, 8]))
    for _ in range(70):
        append(9, 1)
    both("batch_select_indices", torch.tensor([4, 1, 0]))  # places that are read after they have been written over
    append(3, 1)
    both("batch_repeat_interleave", 3)  # fits into what was there before, which must not be written to
    append(9, 1)
    append(9, 200)  # 370 tokens: room for half as many again, but not for more than was said
    assert caches[0].layers[0].buffers[0].shape[2] == 400


def test_large_layers_are_packed_while_sampling():
    """The same numbers as the plain product, of the weights as they are now; small ones and other types stay."""
    torch.manual_seed(0)
    lm = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 8), torch.nn.Linear(512, 512).bfloat16())
    x = torch.randn(3, 5, 512)
    for _ in range(2):
        expected = lm[0](x)
        with rollout.packed_linears(lm), torch.no_grad():
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
    assert not batch.accuracy.flatten()[batch.truncated].any()


def test_a_truncated_completion_is_wrong_even_where_its_text_is_right(tiny):
    tokenizer, _, task = tiny
    ids = tokenizer(":" + task.train[0].answer)["input_ids"]
    done = [(ids, [0.0] * len(ids), False), (ids + [tokenizer.eos_token_id], [0.0] * (len(ids) + 1), True)]
    batch = rollout.assemble(done, [task.train[0]] * 2, 2, scorer, tokenizer, args(), 0, torch.device("cpu"))
    assert batch.accuracy.tolist() == [[0.0, 1.0]]


def test_micro_batches_hold_every_row_once_within_the_budget(tiny):
    a, batch = sample(tiny)
    rows = torch.tensor([5, 0, 17, 9, 23, 3, 11])
    for budget in (40, 90, 10**6):
        seen = []
        for mb in batch.micro_batches(rows, budget):
            T = mb.mask.shape[1]
            prompts = {tuple(i[m].tolist()) for i, m in zip(mb.ids[:, :-T], mb.attention_mask[:, :-T])}
            assert sum(map(len, prompts)) + int(mb.mask.sum()) <= budget or len(mb.ids) == 1
            assert mb.attention_mask.any(0).all() and mb.mask.any(0).all()  # trimmed: no column is all padding
            seen += [tuple(i[m].tolist()) for i, m in zip(mb.ids, mb.attention_mask)]
        assert sorted(seen) == sorted(tuple(batch.ids[r][batch.attention_mask[r]].tolist()) for r in rows)


def test_gradient_does_not_depend_on_micro_batches(tiny):
    _, policy, _ = tiny
    a, batch = sample(tiny)
    batch.old_logp = rollout.logp_of(policy, batch, a)
    batch.adv = torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).expand(batch.mask.shape)
    gradients = []
    for budget in (10**6, 300, 30):
        policy.zero_grad()
        rows, batch.weights = next(iter(rollout.minibatches(batch, a, 0, grpo.token_weights)))
        for mb in batch.micro_batches(rows, budget):
            logp, _ = policy(mb.ids, mb.attention_mask, mb.mask, a.temperature)
            objective, _ = grpo.surrogate(logp, mb.old_logp, mb.adv, mb.mask, grpo.Args())
            (-(objective * mb.weights)[mb.mask].sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for g in gradients[1:]:
        torch.testing.assert_close(g, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_rank_that_runs_out_repeats_a_row_that_counts_for_nothing(tiny, monkeypatch):
    """Sharded ranks must make equally many passes: the extra ones add nothing to gradients or means, and reach every weight."""
    _, policy, _ = tiny
    a, batch = sample(tiny)
    batch.old_logp = rollout.logp_of(policy, batch, a)
    batch.adv = torch.ones(batch.mask.shape)
    batch.weights = grpo.token_weights(batch.mask, a)
    rows = torch.arange(24)
    real = len(list(batch.micro_batches(rows, 300)))
    monkeypatch.setattr(rollout.gpu, "maximum", lambda n: n + 2)
    every = list(batch.micro_batches(rows, 300))
    assert len(every) == real + 2 and all(mb.mask.any() for mb in every[:real])
    for idle in every[real:]:
        assert not idle.mask.any() and not idle.weights.any()
        policy.zero_grad()
        logp, _ = policy(idle.ids, idle.attention_mask, idle.mask, a.temperature)
        objective, _ = grpo.surrogate(logp, idle.old_logp, idle.adv, idle.mask, grpo.Args())
        (-(objective * idle.weights)[idle.mask].sum()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_minibatches_cut_the_rollout_into_parts_whose_weights_sum_to_one(tiny):
    a, batch = sample(tiny)
    parts = list(rollout.minibatches(batch, a, 0, grpo.token_weights))
    assert len(parts) == a.minibatches * a.epochs
    for epoch in (parts[:3], parts[3:]):
        assert sorted(torch.cat([rows for rows, _ in epoch]).tolist()) == list(range(24))
    for rows, weights in parts:
        assert weights.sum().item() == pytest.approx(1.0) and set(weights.nonzero()[:, 0].tolist()) == set(rows.tolist())
    again = list(rollout.minibatches(batch, a, 1, grpo.token_weights))
    assert not torch.equal(parts[0][0], again[0][0])


def test_join_undoes_groups(tiny):
    _, batch = sample(tiny)
    parts = [batch.groups(torch.tensor(g)) for g in ([0, 2], [1], [3, 4, 5])]
    joined = rollout.Rollout.join(parts)
    order = torch.tensor([0, 2, 1, 3, 4, 5])
    expected = batch.groups(order)
    for name, value in expected._tensors():
        assert torch.equal(getattr(joined, name), value), name
    assert torch.equal(joined.reward, batch.reward[order]) and joined.texts == expected.texts


def test_seeds_differ():
    seeds = {rollout.hash_seed(s, step, i) for s in range(5) for step in range(40) for i in range(64)}
    assert len(seeds) == 5 * 40 * 64 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize(
    "sizes, prompts, budget, expected",
    [
        ([(2, 8)] * 5, "abcde", 20, [[0, 1], [2, 3], [4]]),  # prompts of their own: 10 tokens each
        ([(2, 8)] * 5, "aaaaa", 20, [[0, 1], [2, 3], [4]]),  # 18 tokens, and a third completion would make 26
        ([(2, 8)] * 5, "aaaaa", 26, [[0, 1, 2], [3, 4]]),
        ([(2, 8)] * 5, "ababa", 26, [[0, 2, 4], [1, 3]]),  # completions of a prompt come together
        ([(2, 5), (4, 50), (2, 9)], "aba", 10**6, [[1, 2, 0]]),  # the longest prompt's first, longest first
        ([(2, 500), (2, 8)], "aa", 100, [[0], [1]]),  # an item larger than the budget goes alone
        ([], "", 100, []),
    ],
)
def test_where_micro_batches_end(sizes, prompts, budget, expected):
    assert rollout.cuts(sizes, prompts, budget) == expected


@pytest.mark.parametrize(
    "sizes, waste, expected",
    [
        ([8, 98, 8], 100, [[1, 0], [2]]),  # one is padded by 90
        ([8, 98, 8], 180, [[1, 0, 2]]),
        ([5, 5, 4], 0, [[0, 1], [2]]),
        ([], 100, []),
    ],
)
def test_buckets(sizes, waste, expected):
    assert models.buckets(sizes, waste) == expected


# ---------------------------------------------------------------- the loop


def run(tmp_path, name, script=grpo, **changes):
    small = dict(steps=2, prompts_per_step=8, group_size=4, eval_prompts=8, checkpoint_every=0, run_dir=str(tmp_path / name))
    script.train(script.Args(**small | changes))
    return [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]


def test_truncated_importance_sampling(tmp_path, monkeypatch):
    """A sampler that reports log-probs off by ln 1.5: every token weighs 1.5 times as much, or the cap; 0 turns it off."""
    plain = run(tmp_path, "plain", steps=1, minibatches=1)[0]["grad_norm"]
    monkeypatch.setattr(rollout.HF, "name", "vllm")
    assemble = rollout.assemble

    def shifted(*a):
        batch = assemble(*a)
        batch.sampler_logp = batch.sampler_logp - torch.tensor(1.5).log()
        return batch

    monkeypatch.setattr(rollout, "assemble", shifted)
    for cap, factor in ((2.0, 1.5), (1.2, 1.2), (0.0, 1.0)):
        found = run(tmp_path, f"cap{cap}", steps=1, minibatches=1, tis_cap=cap)[0]["grad_norm"]
        assert found == pytest.approx(factor * plain, rel=1e-4)


def test_kl_penalty_holds_the_policy_back(tmp_path):
    """A heavy penalty keeps the distance to the starting model small; a light one lets the same rate run off."""
    runs = [run(tmp_path, f"beta{b}", lr=3e-4, steps=8, beta=b) for b in (1e-6, 2.0)]
    light, heavy = (sum(row["ref_kl"] for row in rows) / len(rows) for rows in runs)
    assert 0 < heavy < light / 3 and light > 0.05


def test_first_minibatch_is_on_policy(tmp_path):
    rows = run(tmp_path, "one", steps=1, minibatches=1)
    assert rows[0]["ratio_max"] == pytest.approx(1.0, abs=1e-4) and rows[0]["clip_fraction"] == 0
    rows = run(tmp_path, "eight", steps=1, minibatches=8, lr=1e-3)
    assert rows[0]["ratio_max"] > 1.05


def test_lora_trains_and_syncs_merged_weights(tmp_path):
    rows = run(tmp_path, "lora", lora_rank=4, lr=1e-2, steps=2)
    assert rows[1]["sampler_gap_max"] < 1e-4 and rows[1]["approx_kl"] > 0
    from safetensors.torch import load_file

    folder = tmp_path / "lora" / "checkpoints" / "step-000002"
    start = load_file(models.warm_start("addition") + "/model.safetensors")
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == start.keys()
    moved = [k for k in merged if not torch.equal(merged[k], start[k])]
    assert moved and all("proj.weight" in k for k in moved)
