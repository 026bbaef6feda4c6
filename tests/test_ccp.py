"""CCP's worked numbers, labels of pairs, claims in a text, scores whatever stands outside a claim, and texts of files."""

import json
from types import SimpleNamespace

import pytest
import torch

from algos import ccp
from common.worlds import tiny as tiny_models
from tests.helpers import ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
SCRIPT = ROOT / "algos" / "ccp.py"
E, C, N = ccp.NLI.ENTAILS, ccp.NLI.CONTRADICTS, ccp.NLI.NEUTRAL
PROBABILITY = torch.tensor([[0.40, 0.25, 0.10, 0.15, 0.05], [0.30, 0.30, 0.20, 0.10, 0.05]], dtype=torch.float64)
FORWARD = torch.tensor([[E, C, E, N, N], [E, C, E, E, N]])
BACKWARD = torch.tensor([[E, C, E, N, N], [E, N, N, C, N]])


def test_worked_numbers():
    labels = ccp.combine(FORWARD, BACKWARD)
    assert labels.tolist() == [[E, C, E, N, N], [E, C, E, N, N]]
    log_ccp = ccp.ccp(PROBABILITY.log(), labels)
    assert log_ccp.exp().tolist() == pytest.approx([0.666667, 0.625000], abs=1e-6)
    whole = torch.ones(1, 2).bool()
    found = ccp.scores(PROBABILITY[:, 0].log(), torch.tensor([0.3, 0.9]).double(), log_ccp, whole, ccp.Args())
    assert found["CCP"].exp().item() == pytest.approx(0.416667, abs=1e-6)
    assert found["probability"].item() == pytest.approx(-2.120264, abs=1e-6)
    assert found["mean"].item() == pytest.approx(-1.060132, abs=1e-6) and found["entropy"].item() == pytest.approx(-0.9)
    # With one direction alone, or with neutral ones in the denominator, it would be another number.
    assert ccp.ccp(PROBABILITY.log(), FORWARD)[1].exp().item() == pytest.approx(0.666667, abs=1e-6)
    assert (0.5 / PROBABILITY[0].sum()).item() == pytest.approx(0.526316, abs=1e-6)


def test_labels_of_both_directions():
    """All nine pairs."""
    found = {(a, b): int(ccp.combine(torch.tensor(a), torch.tensor(b))) for a in (E, C, N) for b in (E, C, N)}
    assert found == {(E, E): E, (C, C): C, (N, N): N, (E, C): N, (C, E): N, (E, N): E, (N, E): E, (C, N): C, (N, C): C}


def test_what_leaves_a_score_alone():
    """The K probabilities' common factor; tokens outside the claim; one alternative makes CCP 1."""
    labels = ccp.combine(FORWARD, BACKWARD)
    torch.testing.assert_close(ccp.ccp((PROBABILITY / 7).log(), labels), ccp.ccp(PROBABILITY.log(), labels))
    assert ccp.ccp(PROBABILITY[:, :1].log(), labels[:, :1]).tolist() == [0, 0]
    at = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.tensor([-0.1, -5.0, -0.3])
    found = ccp.scores(x, -x, x, at, ccp.Args())
    assert found["CCP"].tolist() == pytest.approx([-0.4, -5]) and found["mean"].tolist() == pytest.approx([-0.2, -5])
    assert found["entropy"].tolist() == pytest.approx([-0.3, -5]) and found["length"].tolist() == [-2, -1]


def test_alternatives():
    """The token first, whatever its rank, then the others by rank; log-probs of the whole law."""
    logits = torch.tensor([[2.0, 1, 0, -1], [0.0, 3, 1, 2]])
    logp, entropy, *others = ccp.alternatives(torch.tensor([2, 1]), logits, 3)
    best, ids = torch.stack(others[:3], 1), torch.stack(others[3:], 1)
    assert ids.tolist() == [[2, 0, 1], [1, 3, 2]]
    torch.testing.assert_close(best, logits.log_softmax(-1).gather(1, ids))
    torch.testing.assert_close(logp, best[:, 0])
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert len(ccp.alternatives(torch.tensor([2, 1]), logits, 9)) == 2 + 2 * 4
    one = ccp.alternatives(torch.tensor([2, 1]), logits, 1)
    assert len(one) == 4 and one[3].tolist() == [2, 1]


def test_claims_in_a_text():
    text = "Ada was born in 1815 in London, and in 1852 she died."
    assert [text[a:b] for a, b in ccp.aligned("Ada born 1815", text)] == ["Ada", "born", "1815"]
    assert ccp.aligned("in London in 1852", text)[2] == (36, 38) and ccp.aligned("ada DIED", text)
    assert ccp.aligned("died Ada", text) is None and ccp.aligned("Lon", text) is None and ccp.aligned("", text) == []


def test_function_words_and_the_same_text():
    words = [["paris", "london", "paris", "of"], ["the", "a", "paris", "the"]]
    labels = {(a, b): C for a in words[0] for b in words[0]} | {("paris", "of"): N, ("of", "paris"): N}
    assert ccp.judge(words, labels, ccp.Args()).tolist() == [[E, C, E, N], [E, N, N, E]]
    every = ccp.judge(words, labels | {(a, b): C for a in words[1] for b in words[1]}, ccp.Args(function_words="x"))
    assert every[1].tolist() == [E, C, C, E]


def test_the_persons():
    """Values of a class mean the same, of two classes contradict each other; a text's claims are read back and judged."""
    task, nli, told = ccp.persons(ccp.Args(seed=2))
    pairs = [("v2.3.0", "v2.3.5"), ("v2.3.0", "v2.4.0"), ("v2.3.0", "v1.3.0"), ("r2.0", "r2.4"), ("r2.0", "r1.0"), (";", "n3")]
    assert nli(pairs) == [E, C, N, E, N, N]
    import random

    right = {}
    for k in range(300):
        e = task.train[k % 60]
        text = task.demonstrate(random.Random(k), e, 1.0)
        found = told(text, e.id)
        assert [claim for _, claim, _ in found] == [c.strip() for c in text.split(";")[:3]]
        for r, _, y in found:
            right.setdefault((e.id, r), []).append(y)
    always = sum(all(y) for y in right.values())
    assert 60 <= always <= 75 and told("r0.0 v1.0.0 ; r0.0", 0) == []
    assert ccp.persons(ccp.Args(seed=2))[2](text, e.id) == found


def classifier(folder, labels):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = tiny_models.characters()
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), **sizes, id2label=dict(enumerate(labels)), num_labels=len(labels))
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_of_files(tmp_path, tiny):
    """Claims that do not stand in a text are left out; the judge is a model's folder; the tokens of a claim are its words'."""
    nli = classifier(tmp_path / "nli", ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"])
    rows = [dict(prompt="12+34=", response="ab is 46", claims=[["is 46", 1], ["gone", 0]]),
            dict(prompt="1+1=", response="it was 3", claims=[["3", 0], ["it was 3", 1]])]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", tiny, "--responses", tmp_path / "x.jsonl", "--nli", nli, "--alternatives", 4]
    done = run(tmp_path, *argv, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    first, second = lines(tmp_path / "run" / "items.jsonl")
    assert [c["claim"] for c in first["claims"]] == ["is 46"] and [c["right"] for c in second["claims"]] == [0, 1]
    assert [-c["scores"]["length"] for c in first["claims"] + second["claims"]] == [4, 1, 6]
    (tmp_path / "y.jsonl").write_text(json.dumps(rows[0] | dict(claims=[["gone", 0]])) + "\n")
    argv[3] = tmp_path / "y.jsonl"
    assert "no claim could be scored" in user_error(run(tmp_path, *argv, "--run-dir", tmp_path / "none", script=SCRIPT))
    assert all(c["scores"]["probability"] < 0 >= c["scores"]["CCP"] for c in first["claims"] + second["claims"])
    with torch.no_grad():
        judge = ccp.classifier(str(nli), "cpu")
        assert set(judge([("a", "b"), ("c", "d")] * 70)) <= {E, C, N} and len(judge([("a", "b")] * 130)) == 130


def test_mistakes(tmp_path, tiny):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "1", "response": "2", "claims": [["2", 3]]}\n')
    argv = ["--model", tiny, "--responses", path]
    assert "jsonl:1: needs prompt, response and claims" in user_error(run(tmp_path, *argv, "--nli", "x", script=SCRIPT))
    assert "--responses and --nli go together" in user_error(run(tmp_path, "--nli", "x/y", script=SCRIPT))
    path.write_text('{"prompt": "1", "response": "2", "claims": [["2", 1]]}\n')
    two = classifier(tmp_path / "two", ["yes", "no"])
    assert "its classes are yes, no" in user_error(run(tmp_path, *argv, "--nli", two, script=SCRIPT))
    assert "could not be loaded" in user_error(run(tmp_path, *argv, "--nli", tmp_path, script=SCRIPT))
    assert "--alternatives must be at least 1" in user_error(run(tmp_path, "--alternatives", 0, script=SCRIPT))


def test_results_of_one_class():
    claim = dict(claim="x", relation=None, right=1, probability=0.5, ccp=0.9, scores=dict(CCP=-0.1, length=-1.0))
    found = ccp.results([dict(asked="a", claims=[claim] * 3, pieces=[["x", 0.1]])], SimpleNamespace())
    assert found["table"]["CCP"]["AUROC"] is None and len(found["panels"]) == 2
    json.dumps(found, allow_nan=False)
