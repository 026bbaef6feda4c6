"""The draw by one uniform number, temperature 0, the cache against one pass, and what is counted."""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from algos import decode
from common import engines
from common.worlds import tiny
from tests.helpers import ROOT, lines, run


@pytest.fixture(scope="module")
def lm():
    """Untrained, with weights large enough that what was read matters."""
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(tiny.config("tiny-small")).eval()
    for weight in made.parameters():
        weight.data.mul_(6 if weight.dim() > 1 else 1)
    return made.double()


def test_law():
    logits = torch.tensor([[2.0, 1, 0, -1]])
    torch.testing.assert_close(
        decode.law(logits, decode.Args()), torch.tensor([[0.643914, 0.236883, 0.087144, 0.032059]]).double(), rtol=0, atol=1e-6
    )
    half = decode.law(logits, decode.Args(temperature=0.5))
    torch.testing.assert_close(half, (2 * logits.double()).softmax(-1))
    assert decode.law(logits, decode.Args(temperature=0)).tolist() == [[1, 0, 0, 0]]


def test_pick():
    """Where the running sum passes the number: intervals that are closed below."""
    p = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    picked = [decode.pick(p, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)]
    assert picked == [0, 0, 2, 2, 3, 3]
    grid = torch.tensor([decode.pick(p, (i + 0.5) / 1000) for i in range(1000)]).bincount(minlength=4)
    assert grid.tolist() == [250, 0, 500, 250]
    assert decode.pick(3 * p, 0.5) == 2  # a law that is not normalised is the law it is in proportion to


def test_a_text_is_that_of_one_pass_a_token(lm):
    """The cache changes nothing: by hand, everything is read anew for every token."""
    args = decode.Args(max_new_tokens=12)
    uniforms, prompt = torch.rand(12, generator=torch.Generator().manual_seed(3)).tolist(), [5, 20, 33]
    with torch.no_grad():
        ids, chances = decode.decode(engines.Decoder(lm, [prompt]), [1], uniforms, args)
        text = list(prompt)
        for u, y, chance in zip(uniforms, ids, chances):
            p = decode.law(lm(torch.tensor([text])).logits[0, -1], args)
            assert decode.pick(p, u) == y and p[y].item() == pytest.approx(chance, abs=1e-10)
            text.append(y)
    assert len(ids) == 12 or ids[-1] == 1
    greedy, _ = decode.decode(engines.Decoder(lm, [prompt]), [1], [0.9] * 12, decode.Args(max_new_tokens=12, temperature=0))
    assert greedy[0] == lm(torch.tensor([prompt])).logits[0, -1].argmax()


def test_it_ends_where_an_end_is_drawn(lm):
    first, _ = decode.decode(engines.Decoder(lm, [[5, 6]]), [], [0.3] * 9, decode.Args(max_new_tokens=9))
    at = first.index(first[4])
    ids, chances = decode.decode(engines.Decoder(lm, [[5, 6]]), [first[4]], [0.3] * 9, decode.Args(max_new_tokens=9))
    assert ids == first[: at + 1] and len(chances) == len(ids)


def test_what_is_counted(tmp_path):
    done = run(tmp_path, "--items", 3, "--run-dir", tmp_path / "run", script=ROOT / "algos" / "decode.py")
    assert done.code == 0, done.err
    rows = lines(tmp_path / "run" / "items.jsonl")
    for row in rows:
        n, x = row["tokens"], row["prompt"]
        assert x == 6 and row["calls"] == n and row["read"] == x + n - 1
        assert row["read_anew"] == sum(x + t for t in range(n)) and 0 <= row["gap"] < 1e-4
    found = decode.results(rows, decode.Args())
    tokens = sum(row["tokens"] for row in rows)
    assert found["table"]["without"]["positions read per token"] == sum(r["read_anew"] for r in rows) / tokens
    assert found["table"]["with a cache"]["accuracy"] == sum(r["right"] for r in rows) / 3
    other = run(tmp_path, "--items", 3, "--seed", 2, "--run-dir", tmp_path / "other", script=ROOT / "algos" / "decode.py")
    assert [r["text"] for r in lines(tmp_path / "other" / "items.jsonl")] != [r["text"] for r in rows] and other.code == 0
