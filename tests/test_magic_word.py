"""Magic words: what searches find against all prompts, one by one; the searches step by step; the theorem's worked numbers and
its limits; and the script as a user runs it."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from algos import magic_word as script
from common import UserError, figures, tasks
from common.worlds import tiny as worlds
from tests.helpers import ROOT, lines, run, tiny, user_error  # noqa: F401 (a fixture)

SCRIPT = ROOT / "algos" / "magic_word.py"
CLOSE = dict(rtol=0, atol=1e-6)
DOUBLE = torch.float64
WQ, WK, WV = torch.tensor([[[1, 0], [0, 0.5]], [[1, 0.2], [0, 1]], [[1, 0], [0, 2]]], dtype=DOUBLE)
X = torch.tensor([[1, 0], [0.6, 0.8]], dtype=DOUBLE)
U = torch.tensor([[[0, 1], [-0.6, 0.8]]], dtype=DOUBLE)


def stream(*numbers):
    return torch.Generator().manual_seed(hash(numbers))


def told(table):
    """A reader of a language that is a function: table(prompt as a tuple) -> logits."""

    def read(prompts, targets):
        return script.asked(torch.stack([torch.as_tensor(table(tuple(p))).float() for p in prompts.tolist()]), targets)

    return read


def small(shape="tiny-small", dtype=DOUBLE, seed=0, **changes):
    """A model with random weights and biases."""
    lm = AutoModelForCausalLM.from_config(worlds.config(shape), dtype=dtype)
    made = script.random_weights(lm, stream(seed))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=stream(seed, 1)) * 0.3)
    return made


# ---------------------------------------------------------------- the theorem


def test_worked_numbers():
    sigma = [torch.linalg.matrix_norm(w, 2).item() for w in (WQ, WK, WV)]
    assert sigma == pytest.approx([1, 1.104988, 2], abs=1e-6)
    theorem, tighter = (b.exp() for b in script.attention_bound(X, 2, torch.tensor(1.0, dtype=DOUBLE), WQ, WK, WV))
    torch.testing.assert_close(theorem, torch.tensor([2.456749, 2.655264], dtype=DOUBLE), **CLOSE)
    torch.testing.assert_close(tighter, torch.tensor([1.102485, 1.140758], dtype=DOUBLE), **CLOSE)
    plain, steered = script.attend(X, U[:, :0], WQ, WK, WV), script.attend(X, U, WQ, WK, WV)
    torch.testing.assert_close(plain[0], torch.tensor([[0.828097, 0.687611], [0.796606, 0.813575]], dtype=DOUBLE), **CLOSE)
    torch.testing.assert_close(steered[0], torch.tensor([[0.489873, 1.054025], [0.370250, 1.229832]], dtype=DOUBLE), **CLOSE)
    length = script.orthogonal(steered, plain)
    torch.testing.assert_close(length[0], torch.tensor([0.497968, 0.595859], dtype=DOUBLE), **CLOSE)


def test_no_prompt_is_beyond_the_bound():
    """20,000 random ones, of rows as long as may be; a bound of half the size would not hold."""
    angle = 2 * math.pi * torch.rand(20000, 2, generator=stream(3), dtype=DOUBLE)
    length = script.orthogonal(script.attend(X, torch.stack([angle.cos(), angle.sin()], -1), WQ, WK, WV),
                               script.attend(X, U[:, :0], WQ, WK, WV))  # fmt: skip
    theorem, tighter = (b.exp() for b in script.attention_bound(X, 2, torch.tensor(1.0, dtype=DOUBLE), WQ, WK, WV))
    assert (length <= tighter).all() and (tighter < theorem).all()
    assert (length > tighter / 2).any(0).all()


def test_limits_of_the_theorem():
    one = torch.tensor(1.0, dtype=DOUBLE)
    near, far = (script.attention_bound(X, k, one, WQ, WK, WV) for k in (1, 10**9))
    assert (far[0] - near[0]).tolist() == pytest.approx([math.log(10**9)] * 2)
    assert far[1].exp().tolist() == pytest.approx([2, 2], abs=1e-6)  # s_v M_u: nothing but control is left
    none = script.attention_bound(X, 1, one, 0 * WQ, WK, WV)  # alpha 0, g = m: equal weights
    assert none[1].exp().tolist() == pytest.approx([2 / 3, 2 / 3]) and none[0].exp().tolist() == pytest.approx([1, 1])
    y = torch.tensor([3.0, 4.0])
    assert script.orthogonal(y, torch.zeros(2)) == 5  # no direction: all of it
    assert script.orthogonal(y, torch.tensor([0.0, -7.0])) == 3


def test_the_head_is_the_models():
    """With a column of ones for its biases; a head that is alone in its sequence gives its values."""
    lm = small()
    rows, wq, wk, wv = script.head(lm)
    layer, ids = lm.model.layers[0], torch.tensor([[5, 60, 7]])
    x = layer.input_layernorm(lm.model.embed_tokens(ids))
    n = layer.self_attn.head_dim
    assert rows(ids).shape == (1, 3, lm.config.hidden_size + 1)
    for name, w in (("q_proj", wq), ("k_proj", wk), ("v_proj", wv)):
        torch.testing.assert_close(rows(ids[0]) @ w, getattr(layer.self_attn, name)(x)[0, :, :n])
    alone = rows(ids[0])[:1]
    torch.testing.assert_close(script.attend(alone, alone[None, :0], wq, wk, wv)[0], alone @ wv)
    shape = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4)
    normed = AutoConfig.for_model("qwen3", num_key_value_heads=1, **shape)
    assert script.head(AutoModelForCausalLM.from_config(normed)) is None


def test_beyond_counts():
    layer, controls = script.head(small()), torch.arange(3, 17)
    found = script.beyond(layer, [20, 21, 22], controls, 203, 10, stream(1))
    assert [sum(x["bins"].values()) for x in found.values()] == [203, 203]
    assert all(x["beyond"] == 0 and x["greatest"] < 0 for x in found.values())
    assert found["theorem"]["greatest"] < found["tighter"]["greatest"]
    for x in found.values():
        assert max(map(int, x["bins"])) == max(-40, math.floor(2 * x["greatest"]))
    rows, wq, wk, wv = layer
    again = script.beyond((rows, wq, wk, wv * 10), [20, 21, 22], controls, 203, 10, stream(1))
    assert again["tighter"]["greatest"] == pytest.approx(found["tighter"]["greatest"])  # both sides are ten times as long
    with pytest.MonkeyPatch.context() as patch:  # counted where it is: with a bound of nothing
        patch.setattr(script, "attention_bound", lambda x, k, m_u, *maps: 2 * [torch.full((len(x),), -math.inf)])
        assert script.beyond(layer, [20, 21], controls, 50, 10, stream(1))["tighter"]["beyond"] == 50


# ---------------------------------------------------------------- what is asked


def test_asked():
    logits = torch.tensor([[1.0, 3, 3, 0], [0, 0, 0, 0], [-1, 2, 5, 5]], requires_grad=True)
    winner, loss = script.asked(logits, torch.tensor([[0, 1], [3, 3], [2, 0]]))
    assert winner.tolist() == [1, 0, 2]  # of equals the lowest id
    p = logits.detach().softmax(1)
    torch.testing.assert_close(loss.detach(), -torch.stack([p[0, [0, 1]], p[1, [3, 3]], p[2, [2, 0]]]).log())
    (slope,) = torch.autograd.grad(loss[0, 0], logits)
    torch.testing.assert_close(slope[0], p[0] - torch.tensor([1.0, 0, 0, 0]))
    wide = torch.zeros(3, 151936)
    wide[:, [140000, 9000, 77]] = 1.0
    assert script.asked(wide, torch.zeros(3, 0, dtype=torch.int64))[0].tolist() == [77] * 3


def test_all_prompts_are_asked():
    """Each once, against a language of a hundred tokens where few prompts make a token the likeliest."""
    controls, seen = torch.tensor([4, 9, 11]), []

    def table(prompt):
        seen.append(prompt)
        logits = torch.zeros(100)
        logits[{(9, 4): 50, (11, 11, 4): 60, (4,): 50, (): 70}.get(prompt, 2)] = 1
        return logits

    needed = script.reachable(told(table), controls, 3, 100)
    assert sorted(seen) == sorted(p for k in range(4) for p in itertools.product((4, 9, 11), repeat=k))
    expected = {70: 0, 50: 1, 2: 1, 60: 3}
    assert needed.tolist() == [expected.get(v, 4) for v in range(100)]


def brute(lm, state, controls, most):
    """{token: length of its shortest prompt}, by transformers and loops alone."""
    out = {}
    for k in range(most + 1):
        prompts = torch.tensor([[*p, *state] for p in itertools.product(controls, repeat=k)])
        logits = torch.cat([lm(input_ids=x).logits[:, -1] for x in prompts.split(256)])
        top = logits.max(1, keepdim=True).values
        for v in {min(i for i, hit in enumerate(row) if hit) for row in (logits == top).tolist()}:
            out.setdefault(v, k)
    return out


def a_search(read, lm, controls, y, **changes):
    args = script.Args(**dict(exact=3, iterations=3, candidates=8, top_k=3) | changes)
    table = lm.get_input_embeddings().weight
    arms = script.searches(read, table, torch.tensor(controls), stream, args)
    return {arm: script.sought(read, y, *search) for arm, search in arms.items()}


@torch.no_grad()
def test_searches_against_the_exact_set():
    """Whatever token is sought: none is found sooner than it can be, and what is said to be found is, by the model alone."""
    lm, state, controls = small("tiny"), [8], [5, 7, 9, 13, 14, 15, 16]
    read = script.reader(lm, [], state, 64)
    needed = script.reachable(read, torch.tensor(controls), 3, lm.config.vocab_size)
    exact = brute(lm, state, controls, 3)
    assert {v: k for v, k in enumerate(needed.tolist()) if k < 4} == exact
    assert len(exact) > 8 and {*exact.values()} == {0, 1, 2, 3}
    y = torch.tensor([*exact, next(v for v in range(78) if v not in exact)])
    for arm, found in a_search(read, lm, controls, y, lengths=(4,)).items():
        for v, (k, loss, prompt) in zip(y.tolist(), found):
            assert k is None or k >= exact.get(v, 4) and len(prompt) == k
            logits = lm(input_ids=torch.tensor([[*prompt, *state]])).logits[0, -1]
            assert loss == pytest.approx(-logits.log_softmax(-1)[v].item()) and (logits.argmax() == v) == (k is not None)
        assert found[0][0] == 0 and any(k for k, _, _ in found), arm


def test_the_addition_model_exactly(tiny):  # noqa: F811
    """All prompts of up to three of the 14 characters before a sum with nothing to add."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny, dtype=DOUBLE), worlds.characters()
    args = script.Args(control="0123456789+=: ", exact=3, likely=10, iterations=4, candidates=16, top_k=8)
    allowed, controls = script.words(tokenizer, len(tokenizer), args)
    assert len(controls) == 14 and allowed == controls and tokenizer.decode(controls) != ""
    state, controls = tokenizer("12=")["input_ids"], torch.tensor(controls)
    with torch.no_grad():
        exact = brute(lm, state, controls.tolist(), 3)
        read = script.reader(lm, [], state, 1024)
        needed, of = script.enumerated(read, controls, controls, len(tokenizer), args)
        assert {v: k for v, k in enumerate(needed.tolist()) if k < 4} == exact
        assert of["reached"] == [sum(k <= most for k in exact.values()) for most in range(4)]
        assert of["needed"][0] == 0 and of["likely"][0] == 0.9  # one of ten is there without a prompt
        missed = [sum(exact.get(v, 4) > k for v in controls.tolist()) / 14 for k in range(4)]
        assert of["uniform"] == pytest.approx(missed)
        y = controls[[0, 4, 9]]
        for found in a_search(read, lm, controls.tolist(), y, lengths=(4,), iterations=2).values():
            assert all(k is None or k >= exact.get(v, 4) for v, (k, _, _) in zip(y.tolist(), found))


# ---------------------------------------------------------------- the searches, step by step


def test_greedy_puts_before_and_keeps():
    """The card's order: 7, then 2, then 5 reads 5 2 7; of equally good tokens the lowest."""
    wish = {(7,): 3.0, (2, 7): 4.0, (5, 2, 7): 5.0, (1, 1): 9.0}

    def table(prompt):
        return [0.0, wish.get(prompt, 0.0)]

    prompts = torch.empty(1, 0, dtype=torch.int64)
    for expected in ([7], [2, 7], [5, 2, 7], [1, 5, 2, 7]):
        prompts = script.greedy_step(told(table), prompts, torch.arange(1, 9), torch.tensor([1]))
        assert prompts.tolist() == [expected]


def test_greedy_is_for_each_target():
    def table(prompt):
        return torch.eye(4)[prompt[0]] if len(prompt) == 1 else torch.eye(4)[(prompt[0] + prompt[1]) % 4]

    prompts = torch.tensor([[1], [3]])
    found = script.greedy_step(told(table), prompts, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1]))
    assert found.tolist() == [[3, 1], [2, 3]]


def test_swaps():
    slope = torch.tensor([[[0.0, -5, 2, -5, 1], [3, 2, 1, 0, -1]]])
    controls, prompts = torch.tensor([10, 11, 12, 13, 14]), torch.tensor([[10, 10]])
    u = torch.tensor([[[0.0, 0.0], [0.49, 0.34], [0.49, 0.99], [0.5, 0.0], [0.99, 0.5], [0.999, 0.99]]])
    found = script.swaps(slope, prompts, controls, u, 3)
    # Of equal slopes the lower id; one place each.
    assert found.tolist() == [[[11, 10], [13, 10], [10, 10], [10, 14], [10, 13], [10, 12]]]
    assert script.swaps(slope, prompts, controls, u, 50).shape == (1, 6, 2)  # no more tokens than there are


def test_the_gradient_is_of_a_one_hot_place(monkeypatch):
    """By differences of the loss along a mixture with a token's embedding; and each prompt's is its own."""
    lm, state, controls = small(), [20, 33], torch.tensor([5, 9, 30, 31])
    table, read, seen = lm.get_input_embeddings().weight, script.reader(lm, [], state, 64), []
    prompts, y = torch.tensor([[5, 30, 9], [31, 31, 5]]), torch.tensor([40, 12])
    real = script.swaps
    monkeypatch.setattr(script, "swaps", lambda slope, *rest: (seen.append(slope), real(slope, *rest))[1])
    found, loss = script.gcg_step(read, table, prompts, controls, y, torch.rand(2, 5, 2, generator=stream(1)), 2)
    for i, place, v in ((0, 0, 2), (0, 2, 0), (1, 1, 3), (1, 2, 1)):
        around = []
        for h in (-0.01, 0.01):  # the norms are in float32
            x = table[prompts].clone()
            x[i, place] += h * table[controls[v]]
            around.append(read(x, y[:, None])[1][i, 0].item())
        assert (around[1] - around[0]) / 0.02 == pytest.approx(seen[0][i, place, v].item(), rel=0.02, abs=1e-3)
    assert ((found != prompts).sum(1) <= 1).all()
    torch.testing.assert_close(loss, read(found, y[:, None])[1][:, 0])
    alone = script.gcg_step(read, table, prompts[1:], controls, y[1:], torch.zeros(1, 1, 2), 2)
    torch.testing.assert_close(seen[1][0], seen[0][1])
    assert alone[0].shape == (1, 3) and not table.requires_grad


def gcg(read, lm, start, controls, y, k, **changes):
    args = script.Args(**dict(iterations=20, candidates=6, top_k=4) | changes)
    table = lm.get_input_embeddings().weight
    streams = [stream(7, i) for i in range(len(start))]
    return script.gcg(read, table, torch.tensor(start), torch.tensor(controls), y, k, streams, args)


def test_gcg_begins_with_the_last_prompt_at_its_right_end():
    lm, controls = small(), [*range(5, 25)]
    read, y = script.reader(lm, [], [20, 33], 64), torch.tensor([40])
    begun = gcg(read, lm, [[50, 51]], controls, y, 5, iterations=0)
    assert begun[0, 3:].tolist() == [50, 51] and set(begun[0, :3].tolist()) <= {*controls}
    seen = {tuple(gcg(read, lm, [[50, 51]] * 40, controls, y.expand(40), 5, iterations=0)[i, :3].tolist()) for i in range(40)}
    assert len(seen) > 30  # generators of their own, and no token left out
    assert {v for row in seen for v in row} == {*controls}


def test_gcg_takes_worse_prompts_and_may_keep_the_best():
    lm, controls = small(), [*range(5, 15)]
    read, y = script.reader(lm, [], [20, 33], 64), torch.tensor([40])
    losses, real = [], script.gcg_step

    def watched(*of):
        found = real(*of)
        losses.append(found[1].item())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "gcg_step", watched)
        last = gcg(read, lm, [[5]], controls, y, 3)
        assert any(b > a for a, b in zip(losses, losses[1:]))
        assert read(last, y[:, None])[1].item() == pytest.approx(losses[-1])
        best = gcg(read, lm, [[5]], controls, y, 3, keep_best=True)
    assert read(best, y[:, None])[1].item() == pytest.approx(min(losses))
    begin = gcg(read, lm, [[5]], controls, y, 3, iterations=0)
    assert min(losses) < read(begin, y[:, None])[1].item()  # it descends


def test_sought_stops_at_the_first_length():
    """No prompt is tried first; who is found leaves, and the others keep their own prompts."""
    asked = []

    def table(prompt):
        return torch.eye(9)[{(): 0, (5,): 1, (5, 5, 5): 2}.get(prompt, 8)]

    def propose(k, prompts, targets, which):
        asked.append((k, prompts.tolist(), targets.tolist(), which))
        found = {(1, 1), (3, 2)}
        return torch.tensor([[5 if (k, y) in found else 6 + w] * k for y, w in zip(targets.tolist(), which)])

    found = script.sought(told(table), torch.tensor([3, 0, 2, 1]), (1, 3, 4), propose)
    assert [k for k, _, _ in found] == [None, 0, 3, 1] and [u for _, _, u in found] == [[6] * 4, [], [5] * 3, [5]]
    assert asked[0] == (1, [[], [], []], [3, 2, 1], [0, 2, 3])
    assert asked[1:] == [(3, [[6], [8]], [3, 2], [0, 2]), (4, [[6] * 3], [3], [0])]
    assert all(loss > 0 for _, loss, _ in found)


def test_arms():
    def arms(**flags):
        args = script.Args(**dict(exact=3, iterations=2, candidates=2, top_k=2) | flags)
        return {arm: list(lengths) for arm, (lengths, _) in script.searches(None, None, None, None, args).items()}

    paper = {"greedy then GCG": [1, 2, 3, 4, 6, 8, 10], "GCG alone": [1, 2, 3]}
    assert arms() == paper | {"random prompts": [1, 2, 3, 4, 6, 8, 10]}
    assert arms(policy="paper") == paper and list(arms(policy="random")) == ["random prompts"]
    assert list(arms(exact=0)) == ["greedy then GCG", "random prompts"]
    assert arms(greedy=1, exact=5)["random prompts"] == [1, 2, 3, 4, 5, 6, 8, 10]
    assert arms(greedy=1)["greedy then GCG"] == [1, 4, 6, 8, 10]


# ---------------------------------------------------------------- the model and the texts


@torch.no_grad()
def test_reader():
    """Rows in one pass do not matter, embeddings are as good as tokens, what begins a text stays first."""
    lm = small()
    prompts, y = torch.randint(3, 70, (7, 2), generator=stream(2)), torch.arange(21).view(7, 3)
    whole = script.reader(lm, [2], [20, 33], 100)(prompts, y)
    logits = lm(input_ids=torch.cat([torch.full((7, 1), 2), prompts, torch.tensor([[20, 33]] * 7)], 1)).logits[:, -1]
    torch.testing.assert_close(whole, script.asked(logits, y))
    for rows, fed in ((3, prompts), (100, lm.model.embed_tokens(prompts)), (2, lm.model.embed_tokens(prompts))):
        torch.testing.assert_close(script.reader(lm, [2], [20, 33], rows)(fed, y), whole)
    assert not torch.equal(script.reader(lm, [], [20, 33], 100)(prompts, y)[1], whole[1])


@torch.no_grad()
def test_the_control_model():
    """Its weights are drawn so that what stands before a text matters; at transformers' own initialisation it does not."""
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(worlds.config())
    made, controls = script.random_weights(own, stream(5)), torch.arange(3, 17)
    assert torch.equal(own.lm_head.weight, own.model.embed_tokens.weight)
    assert not torch.equal(made.lm_head.weight, made.model.embed_tokens.weight) and not made.config.tie_word_embeddings
    up = made.model.layers[1].mlp.down_proj.weight
    assert up.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert made.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    again, other = script.random_weights(own, stream(5)), script.random_weights(own, stream(6))
    assert torch.equal(again.lm_head.weight, made.lm_head.weight) and not torch.equal(other.lm_head.weight, made.lm_head.weight)
    counts = []
    for lm in (own, made):
        reads = [script.reader(lm, [], [20, 33, v], 512) for v in (8, 30, 50, 70)]
        counts.append([int((script.reachable(read, controls, 2, 78) < 3).sum()) for read in reads])
    assert sum(counts[0]) <= 8 and sum(counts[1]) >= 2 * sum(counts[0]), counts


def test_words():
    tokenizer = worlds.characters()

    def found(**flags):
        return script.words(tokenizer, 78, script.Args(**dict(exact=0) | flags))

    allowed, controls = found(control="=10:0")
    assert [tokenizer.decode([v]) for v in allowed] == ["=", ":", "0", "1"] and controls == allowed
    assert found(control=None) == (list(range(3, 78)),) * 2  # no special token
    assert found(control=None, top_tokens=5) == (list(range(3, 78)), [3, 4, 5, 6, 7])
    assert script.words(tokenizer, 50, script.Args(exact=0))[0][-1] == 49  # a token that the model has not
    for flags, why in ((dict(control="1~"), "'~' is no token of the model"), (dict(control=""), "needs a character"),
                       (dict(exact=4), "75 control tokens have 31,640,625 prompts of 4")):  # fmt: skip
        with pytest.raises(UserError, match=why):
            found(**flags)


def test_states():
    task, tokenizer, args = tasks.load("addition"), worlds.characters(), script.Args(longest=12)
    seen = set()
    for i in range(60):
        ids, true = script.state_of(task, tokenizer, random.Random(i), i, args)
        text = tokenizer.decode([*ids, true])
        whole = task.test[i].prompt + task.demonstrate(random.Random(i), task.test[i], 1.0)
        assert whole.startswith(text) and 3 <= len(ids) <= 12
        seen.add(len(ids))
    assert seen == {*range(3, 13)}
    said = SimpleNamespace(name="t", demonstrate=None, test=[SimpleNamespace(prompt="ab", answer="c")])
    assert script.state_of(said, tokenizer, random.Random(0), 5, script.Args(longest=4))[0] in (
        tokenizer("a")["input_ids"], tokenizer("ab")["input_ids"], tokenizer("ab\n")["input_ids"])  # fmt: skip
    with pytest.raises(UserError, match="a state has 4 tokens at least; a text of t has 4"):
        script.state_of(said, tokenizer, random.Random(0), 0, script.Args(longest=16))


# ---------------------------------------------------------------- results


def row(ks, **changes):
    """An item where the three targets are found at ks = {arm: (k, k, k)}."""
    text = dict(token="7", before="1", rank=2, base=3.0, loss=1.0, prompt=["a"], state=["4", "+"])
    targets = {kind: text | {arm: k[j] for arm, k in ks.items()} for j, kind in enumerate(("true next", "likely", "uniform"))}
    model = dict(reached=[1, 3], needed=[0, 1, 2], likely=[0.9, 0.7], uniform=[1.0, 0.5])
    bound = {form: dict(beyond=1, greatest=0.5, bins={"1": 1, "-3": 4}) for form in ("theorem", "tighter")}
    return dict(item=0, targets=targets, exact=dict(trained=model), bound=bound) | changes


def test_results():
    args = script.Args(exact=1, greedy=1, lengths=(4, 10), iterations=2, candidates=2, top_k=2)
    ks = {"exact": (0, 1, None), "greedy then GCG": (0, 4, None), "GCG alone": (0, None, None), "random prompts": (0, 1, 10)}
    other = ks | {"exact": (1, 1, 1), "greedy then GCG": (1, 1, 1)}
    found = script.results([row(ks), row(other)], args)
    table = found["table"]
    assert table["epsilon, all targets: exact"] == {"k = 0": 5 / 6, "k = 1": 1 / 6}
    assert table["epsilon, all targets: greedy then GCG"] == {"k = 0": 5 / 6, "k = 1": 2 / 6, "k = 10": 1 / 6}
    assert table["epsilon, uniform: random prompts"] == {"k = 0": 1, "k = 1": 1, "k = 10": 0}
    assert table["epsilon, every likely token, trained: exact"] == {"k = 0": 0.9, "k = 1": 0.7}
    assert table["tokens reached, trained: exact"] == {"k = 0": 1, "k = 1": 3}
    assert table["orthogonal part / bound, theorem"] == {"prompts": 10, "beyond it": 2, "greatest log10": 0.5}
    panels = {p["title"]: p["of"] for p in found["panels"]}
    assert panels["targets not reached by greedy then GCG"]["likely"] == [[0, 1], [1, 0.5], [4, 0], [10, 0]]
    by_rank = panels["reachable, by rank without a prompt"]
    assert by_rank == {"k = 0": [[1, 1], [2, 0], [3, 0]], "k = 1": [[1, 1], [2, 1], [3, 0]]}
    ratio = dict(panels["length of the orthogonal part / its bound"]["tighter"])
    assert ratio[0.75] == 0.2 and ratio[-1.25] == 0.8 and sum(ratio.values()) == 1
    paper = "greedy then GCG 0.17 at k = 10; GCG alone 0.67 at k = 1; random prompts 0.00 at k = 10"
    assert script.told(found) == f"epsilon: exact 0.17 at k = 1; {paper}; 2 of 10 prompts beyond the bound"
    json.dumps(found, allow_nan=False)


def test_results_of_one_arm():
    args = script.Args(policy="random", exact=0, iterations=2, candidates=2, top_k=2)
    found = script.results([row({"random prompts": (None, 4, 4)}, exact={}, bound=None)], args)
    assert found["table"]["epsilon, all targets: random prompts"]["k = 10"] == pytest.approx(1 / 3)
    assert not any("bound" in name or "exact" in name for name in found["table"]) and len(found["panels"]) == 3
    shown = found["panels"][-1]["of"]
    assert shown["true next"][-1][0].strip() == "not found" and shown["likely"][-1] == ["1", 0.5]


# ---------------------------------------------------------------- runs

QUICK = dict(items=2, exact=1, iterations=2, candidates=4, top_k=3, lengths=(2, 3), greedy=1, bound_prompts=40, likely=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of the tiny one's shape with random weights, that is asked about sums."""
    place, task = tmp_path_factory.mktemp("model"), tasks.load("addition")
    config = worlds.config("tiny-small", task)
    lm = script.random_weights(AutoModelForCausalLM.from_config(config), stream(3))
    lm.save_pretrained(place)
    worlds.characters().save_pretrained(place)
    return str(place)


def measured(place, folder, **flags):
    with pytest.MonkeyPatch.context() as patch:  # the picture takes longer than the rest
        patch.setattr(figures, "draw", lambda *of: None)
        script.main(script.Args(**QUICK | dict(model=folder, run_dir=str(place / "run")) | flags))
    return lines(place / "run" / "items.jsonl")


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return measured(tmp_path_factory.mktemp("plain"), folder)


@pytest.mark.parametrize("flags", [
    dict(policy="paper"), dict(policy="random"), dict(control="01:="), dict(top_tokens=5), dict(longest=11), dict(likely=2),
    dict(exact=0), dict(exact=2), dict(greedy=0), dict(lengths=(3, 4)), dict(iterations=3), dict(candidates=5), dict(top_k=1),
    dict(keep_best=True), dict(bound_prompts=41), dict(bound_prompts=0), dict(seed=2), dict(items=3), dict(task="addition:3"),
], ids=str)  # fmt: skip
def test_every_flag_counts(plain, folder, tmp_path, flags):
    if "keep_best" in flags:
        flags |= dict(iterations=8, candidates=1, items=4, greedy=0, lengths=(4, 5))
        kept, last = (measured(tmp_path / str(x), folder, **flags | dict(keep_best=x)) for x in (True, False))
        assert kept != last
        return
    assert measured(tmp_path, folder, **flags) != plain


def test_what_may_not_count(plain, folder, tmp_path):
    """Prompts in one pass; and an item is its own, whatever was asked before."""
    again = measured(tmp_path, folder, rows=3, dtype="float64")
    for a, b in zip(plain, again):
        assert a["exact"] == b["exact"]
        for kind, x in a["targets"].items():
            assert {k: v for k, v in x.items() if k not in ("base", "loss")} == {
                k: v for k, v in b["targets"][kind].items() if k not in ("base", "loss")}  # fmt: skip
    more = measured(tmp_path / "more", folder, items=3, bound_prompts=60)
    assert json.dumps(more[:2]) == json.dumps(plain)


def test_a_model_of_the_users_own(tmp_path):
    """A Llama with a beginning of text, which stays before the prompt, asked about a file of texts; the big models' preset."""
    from tokenizers import processors

    shape = dict(vocab_size=90, hidden_size=48, intermediate_size=64, num_hidden_layers=2, head_dim=16)
    config = AutoConfig.for_model("llama", num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    tokenizer = worlds.characters()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.save_pretrained(tmp_path / "llama")
    texts = [dict(prompt=f"What is {n} and {n} and some more words behind?", answer=f"{2 * n}") for n in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, texts)))
    seen, real = [], script.reader

    def watched(lm, first, state, rows):
        seen.append((first, rows))
        return real(lm, first, state, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "reader", watched)
        small = dict(items=2, iterations=1, candidates=8, lengths=(2,), greedy=1, bound_prompts=20)
        places = dict(model=tmp_path / "llama", task=tmp_path / "t.jsonl", run_dir=tmp_path / "run")
        script.main(script.Args(**small, **{k: str(v) for k, v in places.items()}))
    assert seen == [([0], 256)] * 2
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert config["dtype"] == "bfloat16" and config["top_tokens"] == 5000 and config["likely"] == 75 and config["exact"] == 0
    rows = lines(tmp_path / "run" / "items.jsonl")
    assert all("exact" not in x["targets"]["likely"] and x["exact"] == {} for x in rows)
    assert all(8 <= len(x["targets"]["likely"]["state"]) <= 32 and x["bound"]["tighter"]["beyond"] == 0 for x in rows)


def test_a_run(folder, tmp_path):
    argv = "--items 2 --exact 1 --iterations 2 --lengths 4 5 --run-dir run --model"
    done = run(tmp_path, *argv.split(), folder, script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    said = done.out.splitlines()[-1]
    assert said.startswith("epsilon: exact ") and said.endswith("; 0 of 20,000 prompts beyond the bound")
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {p["kind"] for p in found["panels"]} == {"lines", "tokens"} and (tmp_path / "run" / "picture.png").exists()


def test_mistakes(folder, tmp_path):
    done = run(tmp_path, *"--lengths 4 3 --model".split(), folder, script=SCRIPT)
    assert user_error(done) == "--lengths 4 3: they have to rise, from above --greedy 3"
    for flags, why in (
        (dict(lengths=(3, 6), greedy=3), "--lengths 3 6: they have to rise, from above --greedy 3"),
        (dict(control="é"), "--control 'é': 'é' is no token of the model"),
        (dict(exact=6), "14 control tokens have 7,529,536 prompts of 6; no more than a million are asked"),
        (dict(candidates=0), "--candidates must be at least 1, is 0"), (dict(lengths=()), "--lengths needs a number at least"),
        (dict(policy="greedy"), "--policy must be one of both, paper, random"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            measured(tmp_path, folder, **flags)
