"""UQAC's worked numbers, chains and variants of random models, the pass that gives attention, and whole runs."""

import json
import random
from dataclasses import replace

import pytest
import torch

from algos import uqac
from common.worlds import tiny as tiny_models
from tests.helpers import ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
SCRIPT = ROOT / "algos" / "uqac.py"
ARGS = uqac.Args(heads=2)
A = torch.tensor([[0.6, 0.2, 0.2, 0, 0, 0, 0], [0.10, 0, 0.55, 0.35, 0, 0, 0], [0.1, 0.1, 0.3, 0.4, 0.1, 0, 0],
                  [0.30, 0.05, 0.25, 0.08, 0.32, 0, 0], [0.2, 0.1, 0.1, 0.1, 0.2, 0.1, 0.2]])  # fmt: skip
STOPS = [False, False, False, True, False]


def law(*shape, seed=0):
    """Causal attention [H, R, N + R] of shape (H, R, N)."""
    H, R, N = shape
    logits = torch.randn(H, R, N + R, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(torch.ones(R, N + R).triu(N + 1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    "buffer, threshold, shortest, chain",
    [(3, 0.5, 5, {-1: 0.25, 0: 0.08, 1: 0.32, 3: 0}), (1, 0.5, 5, {-1: 0.55, 1: 0.32, 3: 0}),
     (2, 0.1, 0, {-1: 0.25, 1: 0.32, 3: 0}), (2, 0.3, 0, {-1: 0.55, 1: 0.32, 3: 0}), (3, 0.1, 0, {-1: 0.25, 1: 0.32, 3: 0}),
     (3, 0.5, 0, {3: 0})],
)  # fmt: skip
def test_worked_chains(buffer, threshold, shortest, chain):
    """The first three are the card's; then: "7" waits for the second step, "+" is below the threshold, all are."""
    found = uqac.backtrack(A, (4, 5), STOPS, replace(ARGS, buffer=buffer, threshold=threshold, min_length=shortest))
    assert list(found) == list(chain) and found == pytest.approx(chain, abs=1e-6)


def test_chains():
    """Whatever the attention: no stop word, nothing of the prompt or of the future, the answer's sources with 0; one that is
    taken had the score; a row's sixth entry counts where none of five did and the chain is short."""
    for seed in range(30):
        rng, N, R = random.Random(seed), seed % 7 + 1, 24
        stops = [rng.random() < 0.4 for _ in range(R)]
        attention = uqac.calibrate(law(3, R, N, seed=seed)).amax(0)
        chain = uqac.backtrack(attention, (20, 22), stops, ARGS)
        assert list(chain) == sorted(chain) and chain[19] == chain[20] == 0 and max(chain) == 20
        assert all(not stops[s + 1] and s >= -1 and x > 0 for s, x in chain.items() if s not in (19, 20))
        assert len(chain) > 3
    far = torch.zeros(3, 12)
    far[1, :9] = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1])
    far[1, 9] = 0.5
    assert uqac.backtrack(far, (2, 3), [False] * 3, ARGS) == {-1: 0.5, 1: 0}
    assert uqac.backtrack(far, (2, 3), [False] * 3, replace(ARGS, min_length=0, threshold=0.1)) == {1: 0}
    assert uqac.backtrack(far, (0, 1), [False] * 3, ARGS) == {-1: 0}
    # A token that two sources lean on has both.
    for shortest, most in ((3, 5), (2, 4), (1, 3)):  # the answer's two do not count
        both = uqac.backtrack(A, (3, 5), STOPS, replace(ARGS, min_length=shortest))
        best = {-1: 0.55, 0: 0.48, 1: 0.32}
        expected = dict(sorted([*list(best.items())[: most - 2], (2, 0), (3, 0)]))
        assert list(both) == list(expected) and both == pytest.approx(expected, abs=1e-6)


def test_worked_calibration():
    N, R = 12, 3
    uniform = torch.ones(R, N + R).tril(N)
    uniform = (uniform / uniform.sum(1, keepdim=True)).double()
    found = uqac.calibrate(uniform[None])[0]
    row = [0, 0.128213, 0.128213, 0.120425, 0.112031, 0.104205, 0.094768, 0.086607, 0.076036, 0.059057, 0.042258, 0.026846,
           0.021340, 0, 0]  # fmt: skip
    assert found[1].tolist() == pytest.approx(row, abs=1e-6)
    entropy = -(found * (found + 1e-12).log()).sum(-1)
    assert entropy.tolist() == pytest.approx([2.283385, 2.373601, 2.457923], abs=1e-6)
    # A prompt that is shorter than the window: nothing wraps around.
    short = uqac.calibrate(law(2, 4, 2))
    assert short[..., 0].abs().max() == 0 and short.sum(-1).tolist() == [pytest.approx([1.0] * 4, abs=1e-5)] * 2
    assert all(short[:, i, 2 + i :].abs().max() == 0 for i in range(4))


@pytest.mark.parametrize("m", [1, 3, 4, 99])
def test_heads_of_least_entropy(m):
    """Row by row, of all layers together; what was given stays as it was."""
    N, R = 5, 6
    layers = [torch.cat([torch.zeros(3, N, N + R), law(3, R, N, seed=s)], 1) * (1 + s % 2 * 0.5) for s in range(3)]
    before = [x.clone() for x in layers]
    found = uqac.reduce_attention(layers, R, replace(ARGS, heads=m))
    assert all(torch.equal(x, y) for x, y in zip(layers, before))
    heads = uqac.calibrate(torch.cat(layers)[:, N:])
    for i in range(R):
        entropy = [-sum(float(x) * float((x + 1e-12).log()) for x in row) for row in heads[:, i]]
        best = sorted(range(9), key=lambda h: entropy[h])[:m]
        torch.testing.assert_close(found[i], heads[best, i].amax(0))


def test_worked_similarity():
    states = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [-1, 0, 0], [1, 1, 1]])
    kept, cosine = uqac.similar(states, (4, 5), range(5), ARGS)
    assert cosine.tolist() == pytest.approx([0.577350, 0.816497, 0.816497, -0.577350, 1], abs=1e-6)
    assert kept == [0, 1, 2]
    assert uqac.similar(states, (4, 5), range(5), replace(ARGS, min_similarity=-1.0))[0] == [0, 1, 2, 3]
    assert uqac.similar(states, (4, 5), [0, 1, 3], replace(ARGS, kept=1))[0] == [1]
    _, two = uqac.similar(states, (3, 5), [0, 1], ARGS)
    assert two[0].item() == pytest.approx((0.577350 - 1) / 2, abs=1e-6)
    assert uqac.similar(states, (4, 5), [4], ARGS)[0] == []


def test_worked_marginal():
    """Later tokens have the probabilities that they have behind the exchanged one."""
    p = torch.tensor([[0.8, 0.6, 0.9], [0.15, 0.5, 0.1], [0.04, 0.55, 0.05], [0.8, 0.3, 0.02], [0.8, 0.09, 0.03]]).double()
    assert uqac.marginal(p.log(), [0, 1], (2, 3)).exp().item() == pytest.approx(0.447560, abs=1e-6)
    stale = p.clone()
    stale[1:3, 1] = 0.6
    assert uqac.marginal(stale.log(), [0, 1], (2, 3)).exp().item() == pytest.approx(0.449160, abs=1e-6)
    assert uqac.marginal(p[:1].log(), [], (2, 3)).exp().item() == pytest.approx(0.9, abs=1e-6)


def test_variants():
    ids, kept = [4, 5, 6, 7, 8], [1, 3]
    laws = torch.tensor([[0.0, 0, 0.3, 0, 0.1, 0.55, 0.03, 0.015, 0.005], [0.2, 0.4, 0.15, 0.1, 0.08, 0.07, 0, 0, 0]])
    found = uqac.variants(ids, kept, laws, ARGS)
    assert found[0] == ids and len({tuple(x) for x in found}) == len(found)
    changed = [[(t, y) for t, (x, y) in enumerate(zip(ids, other)) if x != y] for other in found[1:]]
    # By probability; the 7 of place 3 is not among its place's likeliest, so that all of these are variants.
    assert changed == [[(3, 1)], [(1, 2)], [(3, 0)], [(3, 2)], [(3, 3)], [(1, 4)], [(3, 4)], [(1, 6)], [(1, 7)]]
    assert uqac.variants(ids, [], laws[:0], ARGS) == [ids]
    sizes = {name: len(uqac.variants(ids, kept, laws, replace(ARGS, **{name: x})))
             for name, x in dict(candidates=2, min_probability=0.25, substitutes=1).items()}  # fmt: skip
    assert sizes == dict(candidates=4, min_probability=3, substitutes=3)  # the original 5 is none


def test_a_marginal_is_a_probability():
    """Variants are different sequences: their probabilities and the answer's make no more than 1, and no less than the
    original's alone. The model is a table of bigrams."""
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(3)).mul(2).log_softmax(-1)
    for seed in range(20):
        ids = torch.randint(9, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
        before = torch.tensor([0, *ids[:-1]])
        kept = [1, 2, 5]
        some = torch.tensor(uqac.variants(ids, kept, table[before].exp()[kept], ARGS))
        logp = table[torch.cat([torch.zeros(len(some), 1).long(), some[:, :-1]], 1), some]
        total = uqac.marginal(logp, kept, (6, 8)).item()
        assert logp[0, [*kept, 6, 7]].sum().item() <= total + 1e-6 and total <= 1e-6


def test_scores():
    logp, entropy = torch.tensor([-0.1, -2.0, -0.3, -0.4]), torch.tensor([0.2, 0.9, 0.3, 0.1])
    found = uqac.scores(logp, entropy, [0, 1, 2], [1], (2, 3), torch.tensor(-1.5))
    expected = {"UQAC": -1.5, "conditional": -0.3, "chain product": -2.4, "filtered product": -2.3, "response product": -2.8}
    expected |= {"chain mean": -0.8, "filtered mean": -1.15, "response mean": -0.7}
    expected |= dict(minimum=-2.0, entropy=-0.9, length=-4)
    assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-6)


def test_where_an_answer_stands():
    pieces = ["It", " is", " 4", "2", ",", " so", " \\", "boxed{", "42", "}.", " 142", " 4.25", ""]
    assert uqac.located("42", pieces) == (8, 9) and uqac.located("42", pieces[:6]) == (2, 4)
    assert uqac.located("is 42", pieces) == (1, 4) and uqac.located("7", pieces) is None and uqac.located(None, pieces) is None
    assert uqac.located("4", pieces) is None and uqac.located("25", pieces) is None and uqac.located("42", []) is None


def test_attention_needs_the_switch():
    """As policies are loaded, transformers hands back nothing; switched, all layers' rows of 1, and states by which the head
    predicts the token that follows."""
    from transformers import Qwen2ForCausalLM

    from common.policy import Policy

    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(tiny_models.config()).eval()
    policy, ids, R = Policy(lm), list(range(20, 40)), 8
    with pytest.raises(SystemExit, match="attention of 0 of its layers"):
        uqac.attend(policy, ids, R)
    policy.pad()
    policy.lm.set_attn_implementation("eager")
    layers, states = uqac.attend(policy, ids, R)
    assert len(layers) == 2 and all(x.shape == (3, 20, 20) for x in layers) and states.shape[0] == R + 1
    for x in layers:
        torch.testing.assert_close(x.sum(-1), torch.ones(3, 20))
        assert x.triu(1).abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(lm.lm_head(states[:-1]), lm(torch.tensor([ids])).logits[0, -R - 1 : -1])


def test_the_sums():
    """Slips are of nine pairs and of nothing else, what follows one is consistent, and the last digit is the last sum."""
    task = uqac.sums(uqac.Args(seed=3))
    told, slips = {}, 0
    for k in range(810):
        e = task.train[k % 81]
        text = task.demonstrate(random.Random(k), e, 1.0)
        steps = text[:-3].split(",")
        value, right = int(e.prompt[0]), True
        for step, n in zip(steps, e.prompt[2::2], strict=True):
            assert step[:4] == f"{value}+{n}="
            told.setdefault((value, n), []).append(int(step[4:]) == (value + int(n)) % 10)
            value = int(step[4:])
        assert text[-3:] == f",{value}."
        found, right = task.check(text, e.answer)
        assert found == str(value) and right == (found == e.answer)
        slips += not right
    wrong = {pair: 1 - sum(x) / len(x) for pair, x in told.items() if not all(x)}
    assert 0 < len(wrong) <= 9 and slips and all(0.25 < x < 0.75 for pair, x in wrong.items() if len(told[pair]) > 80)
    assert task.check("3+2=5,5.", "5") == ("5", 1.0) and task.check("3+2=5,5", "5") == (None, 0.0)
    for seed in (3, 4):
        other = uqac.sums(uqac.Args(seed=seed))
        alike = [t.demonstrate(random.Random(1), e, 1.0) for e in other.train for t in (task, other)]
        assert (alike[::2] == alike[1::2]) == (seed == 3)


def test_responses_of_a_file(tmp_path, tiny):
    """Scores are those of plain passes, for each variant too; a response without an answer has none and is left out. With
    digits for stop words nothing is kept, and what is left is the conditional probability."""
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    said = [("3+2+1+3=", "3+2=5,5+1=6,6+3=9,9.", 1), ("1+1+1+1=", "1+1=2,2+1=4,4+1=5,5.", 0), ("1+1+1+2=", "no", 0)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=x, response=y, label=z)) + "\n" for x, y, z in said))
    argv = ["--model", tiny, "--task", "sums", "--heads", 4, "--responses", path]
    for name, more in dict(plain=("--batch", 2), other=("--batch", 3, "--stop-words", " ".join("0123456789"))).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=SCRIPT)
        assert done.code == 0, done.err
    rows, other = (lines(tmp_path / name / "items.jsonl") for name in ("plain", "other"))
    assert rows[2]["scores"] == {} and set(rows[2]["chain"]) == {0} and [r["right"] for r in rows] == [1, 0, 0]
    assert json.loads((tmp_path / "plain" / "results.json").read_text())["table"]["chance"]["average precision"] == 0.5
    for row, alone in zip(rows[:2], other):
        assert sum(x > 0 for x in row["chain"]) > 1 == sum(x > 0 for x in alone["chain"])
        same = [alone["scores"][name] for name in ("UQAC", "conditional", "chain product", "filtered mean")]
        assert same == pytest.approx([row["scores"]["conditional"]] * 4, abs=1e-5)

    lm = Qwen2ForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    tokenizer, args = PreTrainedTokenizerFast.from_pretrained(tiny), uqac.Args(heads=4)
    for row, (x, y, _) in zip(rows[:2], said):
        x, y = tokenizer(x).input_ids, tokenizer(y).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            out = lm(torch.tensor([x + y]), output_attentions=True, output_hidden_states=True)
        R, answer = len(y), (len(y) - 3, len(y) - 2)
        laws, states = out.logits[0, len(x) - 1 : -1].softmax(-1), out.hidden_states[-1][0, len(x) :]
        stops = [piece in "+=,.<eos>" for piece, _ in row["pieces"]]
        reduced = uqac.reduce_attention([a[0] for a in out.attentions], R, args)
        chain = [s + 1 for s in uqac.backtrack(reduced, answer, stops, args)]
        assert [t for t, n in enumerate(row["chain"]) if n] == chain and row["chain"][answer[0]] == 1
        kept, _ = uqac.similar(states, answer, chain, args)
        total = 0.0
        for z in uqac.variants(y, kept, laws[kept], args):
            with torch.no_grad():
                p = lm(torch.tensor([x + z])).logits[0, len(x) - 1 : -1].softmax(-1)
            total += p[kept + [answer[0]], [z[t] for t in kept] + [y[answer[0]]]].double().prod().item()
        own = laws[range(R), y].double().log()
        assert row["scores"]["UQAC"] == pytest.approx(torch.tensor(total).log().item(), abs=1e-3)
        assert row["scores"]["conditional"] == pytest.approx(own[answer[0]].item(), abs=1e-3)
        assert row["scores"]["chain product"] == pytest.approx(own[chain].sum().item(), abs=1e-3)
        assert row["scores"]["response product"] == pytest.approx(own.sum().item(), abs=1e-3)


def test_sampled_responses(tmp_path, tiny):
    """Half precision will do; a response that was cut has no answer."""
    argv = ["--model", tiny, "--task", "addition", "--heads", 3, "--items", 4]
    for name, more in dict(half=("--dtype", "bfloat16"), cut=("--max-new-tokens", 2)).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=SCRIPT)
        assert done.code == 0, done.err
    half, cut = (lines(tmp_path / name / "items.jsonl") for name in ("half", "cut"))
    assert any(row["scores"] for row in half) and not any(row["scores"] for row in cut)
    assert all(row["scores"]["UQAC"] < 0.05 for row in half if row["scores"])
    assert "no answer found" in done.out.splitlines()[-1]


def test_mistakes(tmp_path):
    assert "--heads must be at least 1" in user_error(run(tmp_path, "--heads", 0, script=SCRIPT))
    wrong = run(tmp_path, "--min-similarity", 2, script=SCRIPT)
    assert "--min-similarity must be at least -1 and at most 1" in user_error(wrong)
    (tmp_path / "x.jsonl").write_text('{"prompt": "1"}\n')
    assert "jsonl:1: needs prompt" in user_error(run(tmp_path, "--model", "tiny", "--task", "addition", "--responses",
                                                  tmp_path / "x.jsonl", script=SCRIPT))  # fmt: skip


def test_results():
    made = dict(asked="a", right=1, chain=[0.0, 1.0], pieces=[["x", 0.1], ["y", 0.2]])
    rows = [made | dict(scores=dict(UQAC=-0.1 * i, length=-2.0), right=int(i < 5)) for i in range(12)]
    found = uqac.results([*rows, made | dict(scores={})], ARGS)
    assert found["table"]["UQAC"]["AUROC"] == 1 and found["table"]["length"]["AUROC"] == 0.5
    assert found["table"]["chance"]["average precision"] == pytest.approx(5 / 12)
    kinds = ["bars", "bars", "lines", "tokens", "tokens"]
    assert [p["kind"] for p in found["panels"]] == kinds and list(found["panels"][3]["of"])[3] == "wrong, 1"
    alike = uqac.results([row | dict(right=1) for row in rows], ARGS)
    assert alike["table"]["UQAC"]["AUROC"] is None
    nothing = uqac.results([made | dict(scores={})], ARGS)
    json.dumps([alike, nothing], allow_nan=False)
    assert [p["kind"] for p in nothing["panels"]] == ["bars"]
