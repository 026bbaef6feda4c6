"""TAB-PO's worked examples, its weights on texts, its barrier's limits, and the script run as a user runs it."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from algos import tab_po
from tests.helpers import ROOT, lines, run, user_error
from tests.test_dpo import example, pair
from tests.test_tables import sentencepiece

PLAIN = dict(args=dict(barrier=0.0))

TAB_PO = ROOT / "algos" / "tab_po.py"
SMALL = "--steps 4 --pairs-per-step 8 --eval-prompts 16".split()
CLOSE = dict(rtol=0, atol=1e-6)
WEIGHT = torch.tensor([[1, 1, 1.44], [1, 1.2, 0]])


def loss_and_gradient(logp, ref_logp, weight, mask, **changes):
    leaf = logp.detach().clone().requires_grad_()
    losses, stats = tab_po.pair_loss(leaf, ref_logp, weight, mask, tab_po.Args(**changes))
    losses.sum().backward()
    return losses.detach(), leaf.grad, stats


def random_pairs():
    logp, ref_logp, mask = pair([(5, 2), (1, 4), (3, 3)])
    return logp, ref_logp, 1 + torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)), mask


# ---------------------------------------------------------------- the weights


def test_differences_are_of_places_not_aligned():
    args = tab_po.Args()
    chosen, rejected = tab_po.token_weights([1, 2, 3, 4], [5, 1, 2, 3, 4], str, {}, args)
    torch.testing.assert_close(chosen, torch.tensor([1.2] * 4))
    torch.testing.assert_close(rejected, torch.tensor([1.2] * 4 + [1.0]))  # what has no counterpart does not differ
    chosen, rejected = tab_po.token_weights([1, 2, 3], [1, 9, 3], str, {}, tab_po.Args(difference_weight=3.0))
    assert chosen.tolist() == rejected.tolist() == [1, 3, 1]
    assert [w.tolist() for w in tab_po.token_weights([], [7], str, {}, args)] == [[], [1]]


def test_weights_of_a_record():
    """Both factors meet on the flipped label: 1.1 x 1.2 there, 1.2 on the other field, 1 on the scaffold."""
    chosen, rejected = tab_po.token_weights("(c:A,s:3)", "(c:D,s:3)", str, dict(c=1.1, s=1.2), tab_po.Args())
    expected = torch.tensor([1, 1, 1, 1.32, 1, 1, 1, 1.2, 1])
    torch.testing.assert_close(chosen, expected, **CLOSE)
    torch.testing.assert_close(rejected, expected, **CLOSE)


def heavy(text, fields, width=1):
    """The characters that weigh more than 1, where tokens are `width` characters long, with their weight."""
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    weights = tab_po.value_weights(pieces, fields)
    assert len(weights) == len(pieces)
    found = {}
    for piece, w in zip(pieces, weights):
        if w != 1:
            found[w] = found.get(w, "") + piece
    return found


FIELDS = {"Code": 1.1, "Sub-code": 1.2, "Span": 1.3}


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"Code": "A1", "Sub-code": "b c", "Span": "he said, \\"no\\" (x)"}',
         {1.1: "A1", 1.2: "b c", 1.3: 'he said, \\"no\\" (x)'}),
        ('[{"Code":"A"},{"Code" : "B"}]', {1.1: "AB"}),  # every record of a list
        ('{"Code": 17, "Span": ""}', {1.1: "17"}),
        ("Code: pain in rest, Span: two\nwords", {1.1: "pain in rest", 1.3: "two"}),
        ("(Code:A;Span:B)", {1.1: "A", 1.3: "B"}),
        ('{"Barcode": "A", "XSpan": "B", "My-Code": "C", "Spanner": "D", "code": "E"}', {}),  # other names
        ('"Code" is a word, Code', {}),
        ('{"Span": "the A", "Code": "A"}', {1.3: "the A", 1.1: "A"}),  # the A of the span is not weighed as a code
        ("", {}),
    ],
)  # fmt: skip
def test_values_of_fields(text, expected):
    assert heavy(text, FIELDS) == expected


def test_tokens_that_touch_a_value_weigh_and_the_largest_weight_counts():
    text = "(c:A,s:3)"
    assert tab_po.value_weights(["(c:", "A", ",s:", "3", ")", ""], dict(c=1.1, s=1.2)) == [1, 1.1, 1, 1.2, 1, 1]
    assert tab_po.value_weights([text, ""], dict(c=1.1, s=1.2)) == tab_po.value_weights([text], dict(s=1.2, c=1.1)) + [1]
    assert tab_po.value_weights([text], dict(s=1.2, c=1.1)) == [1.2]
    assert tab_po.value_weights(["(c", ":A", ",s", ":3", ")"], dict(c=1.1, s=0.5)) == [1, 1.1, 1, 0.5, 1]  # less is allowed
    assert tab_po.value_weights(["c:A", "B", "", "C"], dict(c=2.0)) == [2, 2, 2, 2]  # the empty one lies inside
    assert tab_po.value_weights(["c:A", "", ")"], dict(c=2.0)) == [2, 1, 1]
    assert heavy('{"a.b": "X", "aab": "Y"}', {"a.b": 2.0}) == {2.0: "X"}  # a name is no pattern


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example(dtype):
    logp, ref_logp, mask = example()
    losses, grad, stats = loss_and_gradient(logp.to(dtype), ref_logp.to(dtype), WEIGHT.to(dtype), mask)
    assert losses.dtype == dtype and losses.item() == pytest.approx(1.101013, abs=1e-6)
    expected = torch.tensor([[-0.321418, -0.321418, -0.102843], [0.111673, 0.134007, 0]], dtype=dtype)
    torch.testing.assert_close(grad, expected, **CLOSE)
    assert stats["pref_loss"].item() == pytest.approx(0.676013, abs=1e-6)
    assert abs(stats["pref_loss"].item() - 0.649129) > 0.02  # sums instead of means
    assert stats["barrier"].item() == pytest.approx(0.85, abs=1e-6)
    assert stats["gated_share"].item() == pytest.approx(2 / 3)
    assert 0.5 * stats["margin"].item() == pytest.approx(0.034567, abs=1e-6) and stats["reward_accuracy"].item() == 1
    w = [0.872093, 0.872093, 1.255814]
    mean = sum(a * b for a, b in zip(w, (-0.5, -1.2, -0.3))) / 3
    assert stats["chosen_prob"].item() == pytest.approx(math.exp(mean), abs=1e-6)
    ratio = sum(a * b for a, b in zip(w, (0.2, -0.2, 0.1))) / 3
    assert stats["chosen_ratio"].item() == pytest.approx(ratio, abs=1e-6)
    assert stats["rejected_ratio"].item() == pytest.approx((0.909091 * -0.3 + 1.090909 * 0.2) / 2, abs=1e-6)


def test_every_option_changes_the_loss():
    z, barrier = 0.069134, 0.85

    def loss(**changes):
        logp, ref_logp, mask = example()
        return loss_and_gradient(logp, ref_logp, WEIGHT, mask, **changes)[0].item()

    def pref(beta):
        return math.log1p(math.exp(-beta * z))

    assert loss(beta=2.0) == pytest.approx(pref(2.0) + 0.5 * barrier, abs=2e-6)
    assert loss(barrier=0.0) == pytest.approx(pref(0.5), abs=2e-6)
    assert loss(barrier=2.0) == pytest.approx(pref(0.5) + 2 * barrier, abs=2e-6)
    assert loss(tau=0.5) == pytest.approx(pref(0.5) + 0.5 * 1.2 * 0.872093, abs=2e-6)  # one gated token of weight below 1:
    assert loss(tau=0.1) == pytest.approx(pref(0.5), abs=2e-6)  # its loss is not blown up to a mean; here none is gated
    every = 0.872093 * 0.5 + 0.872093 * 1.2 + 1.255814 * 0.3
    assert loss(tau=1.0) == pytest.approx(pref(0.5) + 0.5 * every / 3, abs=2e-6)


def test_the_gate_is_strict_and_of_the_policy():
    logp = torch.tensor([[0.5, 0.49, 0.51], [0.01, 0.01, 0.01]], dtype=torch.float64).log()
    weight, mask = torch.ones(2, 3), torch.ones(2, 3).bool()
    for ref_logp in (logp, logp - 3):
        _, grad, stats = loss_and_gradient(logp, ref_logp, weight, mask, tau=0.5, beta=1e-9, barrier=1.0)
        assert stats["gated_share"].item() == pytest.approx(1 / 3)
        expected = torch.tensor([[0, -1, 0], [0, 0, 0]], dtype=torch.float64)  # the chosen side alone
        torch.testing.assert_close(grad, expected, **CLOSE)


def test_at_the_start_the_preference_loss_is_ln_2():
    _, ref_logp, weight, mask = random_pairs()
    _, _, stats = loss_and_gradient(ref_logp, ref_logp, weight, mask)
    torch.testing.assert_close(stats["pref_loss"], torch.full((3,), math.log(2)), **CLOSE)
    assert not stats["margin"].any() and not stats["reward_accuracy"].any()


def test_equal_weights_without_barrier_are_dpo_of_means():
    logp, ref_logp, _, mask = random_pairs()
    losses, _, _ = loss_and_gradient(logp, ref_logp, torch.full(mask.shape, 7.0), mask, barrier=0.0)
    mean = [(logp - ref_logp)[i][mask[i]].mean() for i in range(6)]
    expected = torch.stack([-torch.nn.functional.logsigmoid(0.5 * (a - b)) for a, b in zip(mean[:3], mean[3:])])
    torch.testing.assert_close(losses, expected.detach(), **CLOSE)


def test_only_the_proportions_of_a_responses_weights_count():
    logp, ref_logp, weight, mask = random_pairs()
    losses, grad, _ = loss_and_gradient(logp, ref_logp, weight, mask)
    scale = torch.tensor([[2.0], [0.5], [10.0], [3.0], [0.1], [1.0]])
    again, again_grad, _ = loss_and_gradient(logp, ref_logp, weight * scale, mask)
    torch.testing.assert_close(again, losses, **CLOSE)
    torch.testing.assert_close(again_grad, grad, **CLOSE)
    other, _, _ = loss_and_gradient(logp, ref_logp, weight.flip(1), mask)
    assert (other - losses).abs()[[0, 2]].min() > 1e-4


def test_weights_and_gate_are_constants():
    logp, ref_logp, weight, mask = random_pairs()
    weight.requires_grad_()
    losses, _ = tab_po.pair_loss(logp, ref_logp, weight, mask, tab_po.Args())
    losses.sum().backward()
    assert weight.grad is None and logp.grad.any()


def test_weights_of_zero_are_finite():
    """A response that was not found in its text, as the authors have it."""
    logp, ref_logp, weight, mask = random_pairs()
    weight[[0, 3]] = 0
    losses, grad, stats = loss_and_gradient(logp, ref_logp, weight, mask)
    assert stats["pref_loss"][0].item() == pytest.approx(math.log(2)) and not grad[[0, 3]].any()
    assert losses.isfinite().all() and grad.isfinite().all()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def tiny():
    from common import tasks
    from common.worlds import tiny

    return tiny.warm_start(tasks.load("record"))


def spy():
    """Writes the weights of the first micro-batch, with its texts, beside the run."""
    from common import pairs
    from common.worlds import tiny

    real, tokenizer = pairs.micro_batches, tiny.characters()

    def watched(*args):
        for n, mb in enumerate(real(*args)):
            if n == 0:
                T = mb.mask.shape[1]
                texts = [tokenizer.decode(row[-T:][m]) for row, m in zip(mb.ids, mb.mask)]
                with open("seen.jsonl", "a") as file:
                    file.write(json.dumps(dict(texts=texts, weight=mb.columns["weight"].tolist())) + "\n")
            yield mb

    pairs.micro_batches = watched


def test_a_run(tmp_path, tiny):
    folder = tmp_path / "run"
    done = run(tmp_path, *SMALL, "--run-dir", folder, script=TAB_PO, before=spy)
    assert done.code == 0 and done.err == "" and "data=record" in done.out and "note" not in done.out
    for seen in lines(tmp_path / "seen.jsonl"):
        b = len(seen["texts"]) // 2
        for i, (text, weight) in enumerate(zip(seen["texts"], seen["weight"])):
            other = seen["texts"][(i + b) % (2 * b)]
            assert re.fullmatch(r"\(c:[A-F],s:[0-5]\)<eos>", text) and sum(x != y for x, y in zip(text, other)) == 1
            expected = [1.0] * 10
            expected[3], expected[7] = 1.1, 1.2
            expected[next(t for t in range(9) if text[t] != other[t])] *= 1.2
            assert weight == pytest.approx(expected)
    first, *_, last = rows = lines(folder / "metrics.jsonl")
    assert first["pref_loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-5)
    for r in rows:
        assert r["loss"] == pytest.approx(r["pref_loss"] + 0.5 * r["barrier"], rel=1e-5)
        assert 0 < r["gated_share"] < 0.5 < r["chosen_prob"] < 1
    assert last["margin"] > 0


def test_a_run_on_a_file(tmp_path, tiny):
    """Sides of different lengths keep their own weights; a field that no response has is named."""
    rows = [dict(prompt=f"{i}=", chosen="a:xy,b", rejected="c:z") for i in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = ["--model", tiny, "--data", path, "--dtype", "float32", "--optimizer", "adamw", "--lr", 1e-4, "--steps", 1,
                "--pairs-per-step", 2, "--max-new-tokens", 8, "--eval-prompts", 2]  # fmt: skip
    done = run(tmp_path, *settings, "--field-weights", "a=3, c=4,", "--difference-weight", 2, "--run-dir", tmp_path / "a",
               script=TAB_PO, before=spy)  # fmt: skip
    assert done.code == 0 and "note" not in done.out, done.err
    chosen, rejected = [2, 1, 6, 6, 1, 1, 1], [2, 1, 8, 2, 0, 0, 0]  # `z` and `x`, the end and `y` stand at one place
    assert lines(tmp_path / "seen.jsonl")[0]["weight"] == [chosen] * 2 + [rejected] * 2
    done = run(tmp_path, *settings, "--field-weights", "d=3", "--run-dir", tmp_path / "b", script=TAB_PO)
    assert "note: no field of --field-weights d=3 is found" in done.out


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--field-weights", "Code"], "--field-weights must be like Code=1.1,Span=1.2, above 0, is Code"),
        (["--field-weights", "Code=much"], "--field-weights must be like"),
        (["--field-weights", "Code=0"], "above 0, is Code=0"),
        (["--difference-weight", "-1"], "--difference-weight must be above 0, is -1"),
        (["--tau", "0"], "--tau must be above 0 and at most 1, is 0"),
        (["--barrier", "-1"], "--barrier must be at least 0, is -1"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, tiny, argv, complaint):
    assert complaint in user_error(run(tmp_path, *argv, script=TAB_PO))


def test_the_blank_before_a_word_is_in_its_piece(monkeypatch):
    """SentencePiece, where a token decoded alone would lose it: then no name behind a blank is a word of its own."""
    told = []
    monkeypatch.setattr(tab_po, "token_weights", lambda chosen, _, piece, *more: told.append("".join(map(piece, chosen))) or [])
    tokenizer = sentencepiece()
    pair = SimpleNamespace(chosen=tokenizer("ab. cd x")["input_ids"], rejected=[])
    tab_po.weight_column(SimpleNamespace(train=[pair], test=[]), tokenizer, tab_po.Args(field_weights=""))
    assert told == [" ab. cd x"]
