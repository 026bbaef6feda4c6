"""The plain scores by hand and whatever the padding, responses from a file, and what a run makes of them."""

import json
import math

import pytest
import torch

from algos import score
from common import measures
from tests.helpers import ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
SCRIPT = ROOT / "algos" / "score.py"
LOGP = torch.tensor([[-0.1, -0.5, -0.2], [-0.3, -0.1, -7.0], [-9.0, -9.0, -9.0]])
ENTROPY = torch.tensor([[0.3, 0.9, 0.1], [0.4, 0.2, 5.0], [6.0, 6.0, 6.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()


def test_scores():
    """What stands behind a response's end counts nowhere; an empty one has none of anything."""
    found = {name: x.tolist() for name, x in score.scores(LOGP, ENTROPY, MASK, score.Args()).items()}
    expected = dict(sum=[-0.8, -0.4, 0], mean=[-0.8 / 3, -0.2, 0], minimum=[-0.5, -0.3, 0], entropy=[-0.9, -0.4, 0],
                    length=[-3, -2, 0])  # fmt: skip
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-6)
    wide = [torch.nn.functional.pad(x, (0, 4), value=v) for x, v in ((LOGP, -3.0), (ENTROPY, 9.0), (MASK, False))]
    order = torch.tensor([2, 0, 1])
    for name, x in score.scores(*(x[order] for x in wide), score.Args()).items():
        assert x.tolist() == pytest.approx([expected[name][i] for i in order.tolist()], abs=1e-6)


def rows(n=40):
    """Sum is the log of how often it is right; mean is upside down."""
    made = []
    for i in range(n):
        chance = (i + 0.5) / n
        values = dict(sum=math.log(chance), mean=math.log(1 - chance), length=-float(i % 3))
        made.append(dict(item=i, asked=f"{i}", right=int(i * 7 % n < i), scores=values, pieces=[["a", 0.5]]))
    return made


def test_results():
    found = score.results(rows(), score.Args())
    table, right = found["table"], [row["right"] for row in rows()]
    chance = [math.exp(row["scores"]["sum"]) for row in rows()]
    assert table["sum"]["AUROC"] == measures.auroc(chance, right) == pytest.approx(1 - table["mean"]["AUROC"])
    assert table["sum"]["low"] < table["sum"]["AUROC"] < table["sum"]["high"]
    assert table["sum"]["ECE"] == measures.ece(chance, right) < table["mean"]["ECE"] and "ECE" not in table["length"]
    assert table["chance"] == {"AUROC": 0.5, "average precision": sum(right) / 40}
    assert [p["kind"] for p in found["panels"]] == ["bars", "lines", "tokens"] and len(found["panels"][2]["of"]) == 6
    alike = score.results([row | dict(right=1) for row in rows()], score.Args())
    assert alike["table"]["sum"]["AUROC"] is None and alike["table"]["sum"]["low"] is None
    json.dumps(alike, allow_nan=False)


def given(tmp_path, n=10):
    said = [(f"{10 + i}+{20 + i}=", f":{30 + 2 * i + (i % 3 > 0)}", int(i % 3 == 0)) for i in range(n)]
    made = [dict(prompt=x, response=y, label=label) for x, y, label in said]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path, made


def test_responses_of_a_file(tmp_path, tiny):
    """Scores are those of a plain pass over prompt, response and end, whatever else is in the batch."""
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    path, made = given(tmp_path)
    argv = ["--model", tiny, "--responses", path, "--prompt-template", "{prompt}"]
    for name, more in dict(four=("--batch", 4), ten=("--batch", 10, "--micro-batch-tokens", 40)).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=SCRIPT)
        assert done.code == 0, done.err
    found, other = (lines(tmp_path / name / "items.jsonl") for name in ("four", "ten"))
    lm, tokenizer = Qwen2ForCausalLM.from_pretrained(tiny), PreTrainedTokenizerFast.from_pretrained(tiny)
    assert len(found) == 10 and [row["right"] for row in found] == [row["label"] for row in made]
    for row, again, asked in zip(found, other, made):
        x, y = tokenizer(asked["prompt"]).input_ids, tokenizer(asked["response"]).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            logp = lm(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
        own = logp.gather(1, torch.tensor(y)[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        expected = dict(sum=own.sum(), mean=own.mean(), minimum=own.min(), entropy=-entropy.max(), length=-len(y))
        assert row["scores"] == pytest.approx({k: float(v) for k, v in expected.items()}, abs=2e-4)
        assert again["scores"] == pytest.approx(row["scores"], abs=1e-5)
        assert [p for p, _ in row["pieces"]] == [*asked["response"], "<eos>"]
        assert [n for _, n in row["pieces"]] == pytest.approx((1 - own.exp()).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "row, said",
    [({}, "jsonl:2: needs prompt, response and a label"), (dict(prompt="1", response="2", label="yes"), "jsonl:2: needs"),
     (dict(prompt="1", response=2, label=1), "jsonl:2: needs"), ([1], "jsonl:2: needs"),
     (dict(prompt="", response="2", label=1), "jsonl:2: needs")],
)  # fmt: skip
def test_rows_that_are_none(tmp_path, tiny, row, said):
    path, made = given(tmp_path, 1)
    path.write_text("".join(json.dumps(r) + "\n" for r in (made[0], row)))
    with pytest.raises(SystemExit, match=said):
        score.given(path, 9)
    path.write_text(json.dumps(made[0]) + "\n" + json.dumps(made[0])[:-9] + "\n")  # no line is left out in silence
    with pytest.raises(SystemExit, match="jsonl:2: not JSON"):
        score.given(path, 9)
    path.write_text(2 * (json.dumps(made[0]) + "\n"))
    assert len(score.given(path, 1)) == 1 and len(score.given(path, 9)) == 2
    path.write_text("")
    with pytest.raises(SystemExit, match="no rows there"):
        score.given(path, 9)
    with pytest.raises(SystemExit, match="cannot read the file"):
        score.given(tmp_path / "none.jsonl", 9)


def test_sampled_responses(tmp_path):
    """An item's response is the same in any batch, and its scores are at temperature 1 whatever it was sampled at."""
    argv = "--task addition --items 6".split()
    arms = dict(plain=("--batch", 6), one=("--batch", 1), cold=("--batch", 6, "--temperature", "0.01"))
    for name, more in arms.items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=SCRIPT)
        assert done.code == 0, done.err
    plain, one, cold = (lines(tmp_path / name / "items.jsonl") for name in arms)
    for a, b in zip(plain, one, strict=True):
        assert [p for p, _ in a["pieces"]] == [p for p, _ in b["pieces"]] and a["right"] == b["right"]
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-5)
    assert all(row["scores"]["sum"] < -0.01 for row in cold)  # at 0.01 it would be 0
    assert "AUROC" in done.out.splitlines()[-1]


def test_texts_of_a_user(tmp_path, tiny):
    """They need no task, and a dollar in them is no mathematics of the picture's; a single one has no interval; of one class
    alone there is no AUROC."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(dict(prompt="$x^$", response="2", label=1)) + "\n")
    done = run(tmp_path, "--model", tiny, "--responses", path, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0 and "not defined: all right, or all wrong" in done.out.splitlines()[-1], done.err
    assert (tmp_path / "run" / "picture.png").exists()


def test_mistakes(tmp_path):
    assert "--batch must be at least 1" in user_error(run(tmp_path, "--batch", 0, script=SCRIPT))
    path = tmp_path / "bad.jsonl"
    path.write_text("{}\n")
    assert "bad.jsonl:1: needs prompt" in user_error(run(tmp_path, "--responses", path, script=SCRIPT))
