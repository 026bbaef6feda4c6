"""Log-probs in little memory against the naive way, packing, hidden states of any depth, embeddings in place of tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common import models
from common import policy as policies
from tests.batches import ragged_batch, sample, tiny

__all__ = ["tiny"]


# ---------------------------------------------------------------- the head


def naive(hidden, weight, targets, temperature):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.log_softmax((hidden @ weight.T).to(wide) / temperature, -1)
    return logits.gather(-1, targets[:, None]).squeeze(-1), -(logits.exp() * logits).sum(-1)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_equals_the_naive_way(rows, temperature, dtype, monkeypatch):
    monkeypatch.setattr(policies, "head_rows", lambda n_vocabulary: rows)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 24, generator=g).to(dtype), torch.randn(301, 24, generator=g).to(dtype)
    targets, upstream = torch.randint(301, (50,), generator=g), torch.randn(50, generator=g)
    results = []
    for head in (naive, policies.HeadLogp.apply):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = head(h, w, targets, temperature)
        (logp * upstream).sum().backward()
        results.append((logp.detach(), entropy.detach(), h.grad, w.grad))
    for expected, found in zip(*results):  # log-probs are float32 for both; bfloat16 gradients have 8 bits
        close = 1e-5 if found.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_head_keeps_no_logits(monkeypatch):
    """Between forward and backward nothing of size V per token is saved, whatever is read."""
    monkeypatch.setattr(policies, "head_rows", lambda n_vocabulary: 16)
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    targets, saved = torch.zeros(64, dtype=torch.long), []
    for head in (
        lambda: policies.HeadLogp.apply(hidden, weight, targets, 1.0),
        lambda: policies._head_read(lambda y, z: (z.logsumexp(-1),), targets, (hidden, weight)),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            head()
        assert sum(saved) < 64 * 5000 / 2 + 4 * weight.numel()


def test_head_keeps_its_chunks_in_one_place(monkeypatch):
    """Whatever the number of chunks: two numbers per logit of one chunk in the forward pass, one in the backward pass."""
    monkeypatch.setattr(policies, "head_rows", lambda n_vocabulary: 16)
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
        loss = policies.HeadLogp.apply(hidden, weight, torch.zeros(60, dtype=torch.long))[0].sum()
    with Large() as backward:
        loss.backward()
    assert len(forward.found) == 2 and len(backward.found) == 1


def test_head_of_a_certain_token():
    """A logit so far above the others that their probabilities are 0: entropy 0, no NaN."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1e6], [0.0], [-1e6]])
    logp, entropy = policies.HeadLogp.apply(hidden, weight, torch.tensor([0]))
    assert logp.item() == 0 and entropy.item() == 0


@pytest.mark.parametrize("rows", [3, 1000])
def test_reading_two_models_equals_the_naive_way(tiny, rows, monkeypatch):
    """A divergence between two models' distributions, with its gradient, by chunks and from transformers' logits."""
    monkeypatch.setattr(policies, "head_rows", lambda n_vocabulary: rows)
    _, policy, _ = tiny
    a, batch = sample(tiny, n=2)
    other = models.load(a, torch.device("cpu"), trainable=False)
    with torch.no_grad():
        other.lm.model.norm.weight.mul_(0.7)

    def kl(targets, logits, other_logits):
        p, q = other_logits.log_softmax(-1), logits.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1), q.gather(-1, targets[:, None]).squeeze(-1)

    policy.zero_grad()
    asked = batch.ids, batch.attention_mask, batch.mask
    found, logp = policy(*asked, read=kl, beside=[other])
    found.sum().backward()
    grads = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    with torch.no_grad():  # asked before, the same model says the same
        again = policy(*asked, read=kl, beside=[(other, other(*asked, states=True))])
    assert torch.equal(again[0], found.detach()) and torch.equal(again[1], logp.detach())
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
    return policies.Policy(AutoModelForCausalLM.from_config(config).double())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("waste", [0, 256, 10**6])
def test_a_packed_pass_equals_the_padded_one(kind, waste, monkeypatch):
    """Log-probs, entropies and every gradient, with attention in buckets of one row, of like rows, and of all rows."""
    buckets = policies._buckets
    monkeypatch.setattr(policies, "_buckets", lambda sizes, **_: buckets(sizes, waste))
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
    assert policies._buckets(sizes, waste) == expected


# ---------------------------------------------------------------- hidden states


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("at", [False, True])
def test_hidden_states_have_one_meaning(packs, at):
    """0: embeddings; l: what a hook on layer l sees; the last before the norm; of the position before a token, or its own.
    With them the log-probs of the same pass, unchanged."""
    policy = wide_model()
    policy.packs = packs
    ids, attention, mask = ragged_batch()
    T = mask.shape[1]
    logp, entropy, *states = policy(ids, attention, mask, 0.7, layers=[2, 0, 1], at=at)
    plain = policy(ids, attention, mask, 0.7)
    assert torch.equal(logp, plain[0]) and torch.equal(entropy, plain[1])
    seen, handles = {}, []
    places = [policy.lm.model.embed_tokens, *policy.lm.model.layers]
    for depth, module in enumerate(places):
        handles.append(module.register_forward_hook(lambda m, i, out, d=depth: seen.__setitem__(d, out)))
    for i in range(len(ids)):
        row = ids[i][attention[i]]
        policy.lm.model(input_ids=row[None])
        n = int(mask[i].sum())
        first = len(row) - n - (0 if at else 1)
        for depth, state in zip([2, 0, 1], states):
            torch.testing.assert_close(state[i, :n], seen[depth][0, first : first + n], rtol=1e-5, atol=1e-5)
            assert state.shape == (len(ids), T, 32) and not state[i, n:].any()
    for handle in handles:
        handle.remove()


def test_gradients_reach_hidden_states_and_checkpointing_changes_nothing():
    policy = wide_model()
    ids, attention, mask = ragged_batch()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
            policy.train()
        policy.zero_grad()
        logp, _, state = policy(ids, attention, mask, layers=[1])
        (logp.sum() + state.square().sum()).backward()
        found.append([p.grad.clone() for p in policy.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_the_head_reads_an_inner_layer():
    """Without the final norm; what is above it gets no gradient. The last layer and the norm are the policy itself."""
    policy = wide_model()
    ids, attention, mask = ragged_batch()
    logp, _ = policy(ids, attention, mask, layer=1)
    _, _, state = policy(ids, attention, mask, layers=[1])
    z = state @ policy.lm.lm_head.weight.T
    expected = z.log_softmax(-1).gather(-1, ids[:, -mask.shape[1] :, None]).squeeze(-1).masked_fill(~mask, 0.0)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-6)
    policy.zero_grad()
    logp.sum().backward()
    above = [*policy.lm.model.layers[1].parameters(), *policy.lm.model.norm.parameters()]
    assert all(p.grad is None for p in above) and policy.lm.model.layers[0].mlp.up_proj.weight.grad.any()


def test_what_is_read_may_be_given():
    """read's first argument is the target ids, or numbers of the caller's own, [n, m]."""
    policy = wide_model()
    ids, attention, mask = ragged_batch()
    own = torch.rand(*mask.shape, 3, dtype=torch.float64)

    def dot(given, logits):
        return ((given * logits[:, :3]).sum(-1),)

    (found,) = policy(ids, attention, mask, read=dot, given=own)
    (a,) = policy(ids, attention, mask, read=lambda targets, logits: (logits[:, 0],))
    (b,) = policy(ids, attention, mask, read=lambda targets, logits: (logits[:, 1],))
    (c,) = policy(ids, attention, mask, read=lambda targets, logits: (logits[:, 2],))
    expected = (own * torch.stack([a, b, c], -1)).sum(-1).masked_fill(~mask, 0.0)
    torch.testing.assert_close(found, expected)
