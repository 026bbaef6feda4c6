"""DC-PDD's worked numbers, the scores beside it by hand, nothing found in a model that was not trained, texts of files."""

import json
import math

import pytest
import torch

from algos import dc_pdd
from common import measures
from tests.helpers import ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
SCRIPT = ROOT / "algos" / "dc_pdd.py"
P = torch.tensor([[0.02, 0.60, 0.90, 0.30, 0.60, 0.001]], dtype=torch.float64)
IDS = torch.tensor([[3, 1, 0, 2, 1, 4]])
MASK = torch.ones(1, 6).bool()
F = dc_pdd.frequencies(torch.tensor([900, 80, 15, 4, 0, 0]))


def wide(x, value):
    """With two more places, which the mask leaves out."""
    return torch.nn.functional.pad(x, (0, 2), value=value)


def test_worked_numbers():
    assert F.tolist() == pytest.approx([0.896517, 0.080597, 0.015920, 0.004975, 0.000995, 0.000995], abs=1e-6)
    assert F.sum().item() == pytest.approx(1)
    assert dc_pdd.first_occurrences(IDS, MASK).tolist() == [[True, True, True, True, False, True]]
    for cap, value in ((0.01, 0.009383), (1.0, 0.442259), (1e9, 0.592863)):
        assert dc_pdd.divergence(P.log(), F, IDS, MASK, cap)[0].item() == pytest.approx(value, abs=1e-6)
        padded = (wide(P.log(), -0.1), F, wide(IDS, 5), wide(MASK, False), cap)
        assert dc_pdd.divergence(*padded)[0].item() == pytest.approx(value, abs=1e-6)
    assert dc_pdd.divergence(P.log(), F, IDS, MASK, 0.01)[1].item() == pytest.approx(4 / 5)
    # Over all places, without the rule of first occurrences, the mean would be another.
    assert (-P * F[IDS].log()).clamp(max=1).mean().item() == pytest.approx(0.535215, abs=1e-6)
    assert dc_pdd.least(P.log(), MASK, 2 / 6).item() == pytest.approx(-5.409889, abs=1e-6)
    assert dc_pdd.least(P.log(), MASK, 1.0).item() == pytest.approx(-2.191794, abs=1e-6)


def test_the_least_of_each_row():
    """floor(k n) of a row's own length, one at least; what the mask leaves out is never among them."""
    x = torch.tensor([[-1.0, -2, -3, -4, -5, -99], [-7.0, -8, -99, -99, -99, -99]])
    mask = x > -50
    assert dc_pdd.least(x, mask, 0.4).tolist() == [-4.5, -8] and dc_pdd.least(x, mask, 0.2).tolist() == [-5, -8]
    assert dc_pdd.least(x[:1], mask[:1], 0.6).item() == -4


def test_tpr_at_fpr():
    label, score = [1, 0, 1, 0, 0], [0.9, 0.8, 0.7, 0.3, 0.3]
    assert dc_pdd.tpr_at_fpr(score, label) == 0.5 and dc_pdd.tpr_at_fpr(score, label, 0.34) == 1.0
    assert dc_pdd.tpr_at_fpr([1, 1, 1, 1, 1], label, 0.99) == 0 and dc_pdd.tpr_at_fpr(score, [1] * 5) is None


def test_moments():
    """Against the definition; a token of probability 0 adds nothing."""
    logits = torch.tensor([[2.0, 1, 0, -1], [0.0, 0, 0, -torch.inf]], dtype=torch.float64)
    logp, mean, deviation = dc_pdd.moments(torch.tensor([1, 2]), logits)
    p = logits.softmax(-1)
    first = (p[0] * p[0].log()).sum()
    assert logp.tolist() == pytest.approx([p[0, 1].log().item(), math.log(1 / 3)])
    assert mean.tolist() == pytest.approx([first.item(), math.log(1 / 3)])
    assert deviation.tolist() == pytest.approx([((p[0] * (p[0].log() - first) ** 2).sum() ** 0.5).item(), 0], abs=1e-7)


def test_scores_point_to_members():
    """A text that is likelier throughout has a greater score by each, length apart; order and padding change nothing."""
    args = dc_pdd.Args(caps=(1.0, 0.5))
    logp = torch.stack([wide(P.log(), -9.0)[0], wide((P * 0.9).log(), -9.0)[0]])
    ids, mask = wide(IDS, 0).expand(2, -1), wide(MASK, False).expand(2, -1)
    mean, deviation = torch.full_like(logp, -2.0), torch.full_like(logp, 0.5)
    found = dc_pdd.scores(logp, mean, deviation, ids, mask, F, args)
    assert list(found)[:2] == ["DC-PDD, a = 1", "DC-PDD, a = 0.5"]
    for name, (high, low) in found.items():
        assert high > low or name == "length" and high == low == 6
    again = dc_pdd.scores(logp.flip(0), mean, deviation, ids, mask, F, args)
    assert all(torch.equal(x, again[name].flip(0)) for name, x in found.items())
    assert found["ratio"][0].item() == pytest.approx((P.log() - F[IDS].log()).mean().item())
    assert found["Min-K++"][0].item() == pytest.approx((-6.907755 + 2) / 0.5, abs=1e-5)


def test_the_texts():
    """Members and others from one source: styles half and half, nobody's text another's, and the same for the same seed."""
    task, found, reference = dc_pdd.texts(dc_pdd.Args(seed=3))
    learnt = [e.answer for e in task.train]
    for row in found:
        assert learnt.count(row["text"]) == row["seen"] and (row["seen"] > 0) == row["label"]
        assert len(row["text"].split()) == 40 and row["text"] not in reference
    for y in (0, 1):
        styles = [row["style"] for row in found if row["label"] == y]
        assert styles.count(0.6) == styles.count(1.6) == 75
    assert [sum(row["seen"] == n for row in found) for n in (0, 1, 2, 4)] == [150, 50, 50, 50]
    assert dc_pdd.texts(dc_pdd.Args(seed=3))[1] == found != dc_pdd.texts(dc_pdd.Args(seed=4))[1]


def test_nothing_is_detected_where_nothing_was_learnt(tmp_path):
    """A leak by the way texts are made would show: every score is at chance for a model with random weights."""
    done = run(tmp_path, "--untrained", "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    rows = lines(tmp_path / "run" / "items.jsonl")
    label = [row["label"] for row in rows]
    for name in rows[0]["scores"]:
        assert abs(measures.auroc([row["scores"][name] for row in rows], label) - 0.5) < 0.1, name
    found = dc_pdd.results(rows, dc_pdd.Args())
    assert found["table"]["length"]["AUROC"] == 0.5 and [p["kind"] for p in found["panels"]].count("heat") == 2


def test_texts_of_files(tmp_path, tiny):
    """Counted, cut and scored as by hand; the model is any folder's."""
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    rows = [dict(input=f"{i}+{i}= {i}", label=i % 2) for i in range(5)] + [dict(text="1+2 3 4 5", label=1)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text('{"text": "11+1"}\n' + '{"text": "2"}\n' * 50)  # a single token counts nothing
    argv = ["--model", tiny, "--texts", tmp_path / "texts.jsonl", "--reference", tmp_path / "other.jsonl", "--words", 2]
    done = run(tmp_path, *argv, "--batch", 4, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    lm, tokenizer = Qwen2ForCausalLM.from_pretrained(tiny), PreTrainedTokenizerFast.from_pretrained(tiny)
    counts = torch.zeros(lm.config.vocab_size)
    for c in "1+1":
        counts[tokenizer(c).input_ids] += 1
    f = dc_pdd.frequencies(counts)
    for row, asked in zip(lines(tmp_path / "run" / "items.jsonl"), rows, strict=True):
        ids = tokenizer(" ".join(asked.get("input", asked.get("text")).split(" ")[:2])).input_ids
        with torch.no_grad():
            logp = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).T
        own = torch.tensor([ids[1:]])
        beta, _ = dc_pdd.divergence(logp, f, own, torch.ones(own.shape).bool(), 0.01)
        assert row["scores"]["DC-PDD, a = 0.01"] == pytest.approx(beta.item(), abs=1e-5) and row["label"] == asked["label"]
        assert row["scores"]["loss"] == pytest.approx(logp.mean().item(), abs=1e-4) and row["scores"]["length"] == len(ids) - 1


def test_mistakes(tmp_path, tiny):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "1+1", "label": 2}\n')
    said = user_error(run(tmp_path, "--model", tiny, "--texts", path, "--reference", path, script=SCRIPT))
    assert "jsonl:1: needs a text and a label of 0 or 1" in said
    assert "--texts and --reference go together" in user_error(run(tmp_path, "--texts", path, script=SCRIPT))
    assert "--k must be above 0 and at most 1" in user_error(run(tmp_path, "--k", 0, script=SCRIPT))
    path.write_text('{"text": "1", "label": 1}\n')
    said = user_error(run(tmp_path, "--model", tiny, "--texts", path, "--reference", path, script=SCRIPT))
    assert "text 1 has 1 tokens; there have to be two" in said
