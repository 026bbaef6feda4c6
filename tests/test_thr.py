"""THR's worked numbers, its definition as a double sum, what an update does to right answers, and what a run logs."""

from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from algos import grpo, thr
from common.batch import collate, read
from common.policy import Policy
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)


def card():
    """A right completion of the tokens 0, 1 and a wrong one of 0, 2, with these distributions and hidden states. No head of two
    columns has them: four more make each position's logits, and are too small to be seen in an inner product."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.5, 0.3, 0.2], [0.3, 0.4, 0.3]])
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 1.0]])
    hidden = torch.cat([h, 1e-4 * torch.eye(4)], 1).view(2, 2, 6)
    head = torch.cat([torch.zeros(3, 2), 1e4 * p.log().T], 1)
    ids = torch.tensor([[0, 1], [0, 2]])
    logp = p.log().gather(1, ids.view(4, 1)).view(2, 2)
    return logp, hidden, ids, torch.ones(2, 2).bool(), torch.tensor([True, False]), head


def rewards(group, **changes):
    return thr.hidden_rewards(*group, thr.Args(**changes))


def loss(script, adv, old_logp, mask, args):
    logp = old_logp.clone().requires_grad_()
    objective, _ = script.surrogate(logp, old_logp, adv, mask, args)
    value = -(objective * script.token_weights(mask, args))[mask].sum()
    return value.item(), torch.autograd.grad(value, logp)[0]


@pytest.mark.parametrize("p, right, wrong", [(0.0, 1.0, (-1.0, -1.0)), (0.1, 1.1, (-0.9, -1.1)), (-0.1, 0.9, (-1.1, -0.9))])
def test_worked_numbers(p, right, wrong):
    group, args = card(), thr.Args(p=p)
    value, tau = rewards(group)
    torch.testing.assert_close(value, torch.tensor([[0.19, 0.12], [-0.19, 0.1625]]), **CLOSE)
    torch.testing.assert_close(tau, torch.tensor([0.155, 0.155]), **CLOSE)
    adv = thr.token_advantages(torch.tensor([[1.0], [-1.0]]).expand(2, 2), value, tau, args)
    torch.testing.assert_close(adv, torch.tensor([[right, 0.0], wrong]), **CLOSE)
    found, gradient = loss(thr, adv, group[0], group[3], args)
    assert found == pytest.approx(-(right + sum(wrong)) / 4, abs=1e-6)
    torch.testing.assert_close(gradient, -adv / 4, **CLOSE)  # those left out stay in the divisor


def group(G=5, T=6, V=7, H=4, right=(1, 0, 1, 0, 0), temperature=1.0, seed=0, lengths=(6, 4, 3, 6, 1)):
    g = torch.Generator().manual_seed(seed)
    head, hidden = torch.randn(V, H, generator=g), torch.randn(G, T, H, generator=g)
    ids = torch.randint(V, (G, T), generator=g)
    logits = (hidden @ head.T / temperature).log_softmax(-1)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return logits.gather(2, ids[:, :, None])[:, :, 0], hidden, ids, mask, torch.tensor(right).bool(), head


def definition(logp, hidden, ids, mask, right, head, temperature=1.0):
    """The double sum, token by token, over the columns of ids that occur."""
    seen, V = ids[mask].unique(), len(head)
    error = torch.eye(V)[ids] - (hidden @ head.T / temperature).softmax(-1)
    out = torch.zeros(mask.shape)
    for j, t in mask.nonzero().tolist():
        for i, k in (mask & right[:, None]).nonzero().tolist():
            alpha = error[i, k, seen] @ error[j, t, seen]
            out[j, t] += alpha * (hidden[i, k] @ hidden[j, t]) / mask[i].sum()
    means = [out[i][mask[i]].mean().item() for i in right.nonzero()[:, 0].tolist() if mask[i].any()]
    return out * (2 * right[:, None] - 1), max(0.0, min(means, default=0.0))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("V", [7, 60])
@pytest.mark.parametrize("right", [(1, 0, 1, 0, 0), (0, 1, 0, 0, 0), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0)])
def test_it_is_the_definition(right, V, temperature):
    """With a vocabulary of which all ids occur, and with one of which most do not, whose columns are left out of g alone."""
    some = group(V=V, right=right, temperature=temperature)
    assert V > 7 or len(some[2][some[3]].unique()) == 7
    wanted, tau = definition(*some, temperature)
    value, found = rewards(some, temperature=temperature)
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, torch.full((5,), tau), rtol=1e-4, atol=1e-4)
    assert torch.equal(rewards(some, temperature=temperature, tau_scale=0.5)[1], found / 2)


def test_groups_without_a_right_one_and_empty_completions():
    value, tau = rewards(group(right=(0, 0, 0, 0, 0)))
    assert not value.any() and not tau.any()
    assert not thr.token_advantages(torch.ones(5, 6), value, tau, thr.Args(tau_scale=0.0)).any()
    with_none = group(lengths=(6, 4, 0, 6, 1))  # a right one is empty
    value, tau = rewards(with_none)
    torch.testing.assert_close(value, definition(*with_none)[0], rtol=1e-4, atol=1e-4)
    assert value.isfinite().all() and tau.isfinite().all() and tau[0] > 0
    value, tau = rewards(group(lengths=(0,) * 5))
    assert not value.any() and not tau.any() and value.shape == (5, 6) and tau.shape == (5,)


def test_garbage_and_padding_change_nothing():
    logp, hidden, ids, mask, right, head = group()
    value, tau = rewards((logp, hidden, ids, mask, right, head))
    for garbage in (float("inf"), float("nan"), -1e4):
        bad = torch.where(mask, logp, torch.tensor(garbage)), torch.where(mask[:, :, None], hidden, torch.tensor(garbage))
        other = rewards((*bad, ids.masked_fill(~mask, 10**6), mask, right, head))
        assert torch.equal(other[0], value) and torch.equal(other[1], tau)
    wide = [torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 3)) for x in (logp, hidden, ids, mask)]
    other = rewards((*wide, right, head))
    assert torch.equal(other[0][:, :6], value) and not other[0][:, 6:].any()
    torch.testing.assert_close(other[1], tau)
    assert torch.equal(thr.shuffled(other[0], wide[3], 5)[:, :6], thr.shuffled(value, mask, 5))


def test_tau_is_not_below_zero():
    """The mean of the only right completion is the norm of M, squared; of two that oppose each other one may be below 0."""
    for seed in range(20):
        logp, hidden, ids, mask, right, head = group(right=(0, 0, 1, 0, 0), seed=seed)
        assert rewards((logp, hidden, ids, mask, right, head))[1][0] > 0
    head = torch.zeros(2, 1)
    ids, mask = torch.tensor([[0], [0]]), torch.ones(2, 1).bool()
    hidden, logp = torch.tensor([[[3.0]], [[-1.0]]]), torch.full((2, 1), 0.5).log()
    value, tau = rewards((logp, hidden, ids, mask, torch.tensor([True, True]), head))
    assert value[1] < 0 and not tau.any()
    assert thr.token_advantages(torch.ones(2, 1), value, tau, thr.Args(p=0.0)).all()


def test_without_threshold_and_p_it_is_grpo():
    some = group()
    adv = torch.randn(5, 1).expand(5, 6)
    args = thr.Args(p=0.0, tau_scale=0.0)
    mine = loss(thr, thr.token_advantages(adv, *rewards(some, p=0.0, tau_scale=0.0), args), some[0], some[3], args)
    base = loss(grpo, adv, some[0], some[3], grpo.Args())
    assert mine[0] == base[0] and torch.equal(mine[1], base[1])


def rise(p, seed, step=1e-3):
    """By how much an update of a linear policy's head raises the mean log-prob of the right completions, and by how much it
    should to first order: its right side is made of THR."""
    logp, hidden, ids, mask, right, head = (x.double() if x.is_floating_point() else x for x in group(V=5, seed=seed))
    assert len(ids[mask].unique()) == 5
    args, weight = thr.Args(p=p), head.clone().requires_grad_()
    value, tau = thr.hidden_rewards(logp, hidden, ids, mask, right, head, args)
    base = thr.advantages(right[None].double(), args).flatten()[:, None].expand(5, 6)

    def logps(w):
        return (hidden @ w.T).log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]

    def likelihood(w):
        return (logps(w).masked_fill(~mask, 0.0).sum(1) / mask.sum(1))[right].sum()

    adv, weights = thr.token_advantages(base, value, tau, args), thr.token_weights(mask, args)
    objective, _ = thr.surrogate(logps(weight), logp, adv, mask, args)
    (gradient,) = torch.autograd.grad((objective * weights)[mask].sum(), weight)
    kept = value.abs() > tau[:, None]
    first_order = (weights * base.abs() * value * kept * (1 + p * value.sign())).sum()
    return ((likelihood(head + step * gradient) - likelihood(head - step * gradient)) / (2 * step)).item(), first_order.item()


@pytest.mark.parametrize("seed", range(5))
def test_an_update_raises_right_answers_more_for_a_larger_p(seed):
    found = [rise(p, seed) for p in (-0.5, -0.1, 0.0, 0.1, 0.5)]
    for measured, first_order in found:
        assert measured == pytest.approx(first_order, rel=1e-4)
    assert [m for m, _ in found] == sorted(m for m, _ in found) and found[-1][0] > found[0][0] + 1e-3


def test_the_control_has_as_many_tokens_of_either_sign():
    value, mask = rewards(group())[0], group()[3]
    other = thr.shuffled(value, mask, 3)
    assert torch.equal(other[mask].sort().values, value[mask].sort().values) and not other[~mask].any()
    assert torch.equal(other, thr.shuffled(value, mask, 3))
    assert not torch.equal(other, value) and not torch.equal(other, thr.shuffled(value, mask, 4))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_hidden_states_are_what_the_head_reads_where_a_token_is_predicted(tied, packed):
    """logits = W h, whatever the padding, with a final norm that is not the identity; and with the gradient."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=tied)  # fmt: skip
    policy = Policy(Qwen2ForCausalLM(config))
    torch.nn.init.uniform_(policy.lm.model.norm.weight, 0.3, 2.0)
    if not packed:
        policy.pad()
    g = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(3, 60, (n,), generator=g).tolist() for n in size) for size in ((4, 7), (2, 9), (5, 1))]
    batch = collate(rows)
    args = SimpleNamespace(temperature=0.7, micro_batch_tokens=20)
    logp, entropy, hidden = read(policy, batch, args, layers=["normed"])
    assert hidden.shape == (3, 9, 32) and not hidden[~batch.mask].any()
    every = (hidden @ policy.lm.lm_head.weight.T / 0.7).log_softmax(-1)
    found = every.gather(2, batch.ids[:, -9:, None])[:, :, 0]
    torch.testing.assert_close(found[batch.mask], logp[batch.mask])
    torch.testing.assert_close(-(every.exp() * every).sum(-1)[batch.mask], entropy[batch.mask])
    policy.pad()
    for (prompt, completion), h in zip(rows, hidden):
        logits = policy.lm(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(h[: len(completion)] @ policy.lm.lm_head.weight.T, logits, rtol=1e-4, atol=1e-5)
    *_, hidden = policy(batch.ids, batch.attention_mask, batch.mask, layers=["normed"])
    hidden.sum().backward()
    assert policy.lm.model.norm.weight.grad.any()


def scored(folder, rows):
    """THR of the completions in samples.jsonl, all of one prompt, by transformers alone."""
    lm, tokenizer = Qwen2ForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    group = [tokenizer.convert_tokens_to_ids(row["tokens"]) for row in rows]
    prompt, T = tokenizer(rows[0]["prompt"], add_special_tokens=False).input_ids, max(map(len, group))
    ids, hidden = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, lm.config.hidden_size)
    for i, y in enumerate(group):
        ids[i, : len(y)] = torch.tensor(y)
        with torch.no_grad():
            hidden[i, : len(y)] = lm.model(torch.tensor([prompt + y])).last_hidden_state[0, len(prompt) - 1 : -1]
    mask, right = torch.arange(T) < torch.tensor([[len(y)] for y in group]), torch.tensor([row["reward"] == 1 for row in rows])
    value, tau = definition(None, hidden, ids, mask, right, lm.lm_head.weight.detach())
    return value[mask], tau


def test_a_run_and_its_arms(tiny, tmp_path):
    """The same rollout: p changes advantages by its factors, the control which tokens are kept."""
    argv = "--task addition --steps 1 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    arms = dict(base=(), less=("--p", -0.1), random=("--select", "random"))
    rows, weights, samples = {}, {}, {}
    for name, more in arms.items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "thr.py")
        assert done.code == 0, done.err
        (rows[name],) = lines(tmp_path / name / "metrics.jsonl")
        weights[name] = (tmp_path / name / "checkpoints" / "step-000001" / "model.safetensors").read_bytes()
        group = lines(tmp_path / name / "samples.jsonl")
        samples[name] = {k: torch.tensor([x for row in group for x in row["columns"][k]]) for k in group[0]["columns"]}
    assert len(set(weights.values())) == 3
    one = rows["base"]
    assert 0.05 < one["kept"] < 0.9 and one["tau"] > 0 and 0 < one["kept_forks"] <= 1
    for key in ("kept", "tau", "thr_positive"):
        assert one[key] == rows["less"][key] == rows["random"][key]
    assert rows["random"]["kept_forks"] != one["kept_forks"]
    base, less = samples["base"], samples["less"]
    assert set(base) == {"logp", "adv", "old_entropy", "thr"} and torch.equal(base["thr"], less["thr"])
    wanted, tau = scored(tiny, lines(tmp_path / "base" / "samples.jsonl"))
    torch.testing.assert_close(base["thr"], wanted, rtol=1e-4, atol=2e-4)
    kept, clear = base["adv"] != 0, base["thr"].abs() > 1e-3  # samples have four decimals: the sign of less is not in them
    assert torch.equal(kept, wanted.abs() > tau)
    assert torch.equal(kept, less["adv"] != 0) and kept.any()
    ratio, positive = (base["adv"] / less["adv"])[kept & clear], base["thr"][kept & clear] > 0
    torch.testing.assert_close(ratio, torch.where(positive, 1.1 / 0.9, 0.9 / 1.1), rtol=1e-3, atol=0)
