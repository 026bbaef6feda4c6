"""Speculative decoding is exact: its law by enumeration, three broken ones that are not, and texts that are the target's."""

import itertools

import pytest
import torch
from transformers import Qwen2ForCausalLM

from algos import decode, specdec
from common import engines
from common.worlds import tiny
from tests.helpers import ROOT, lines, run, user_error

V, L = 3, 3  # tokens, length of the texts whose law is enumerated


def laws(seed):
    """text -> law [V], random for every text up to a length; some tokens have probability 0."""
    g, made = torch.Generator().manual_seed(seed), {}

    def of(text):
        if text not in made:
            p = torch.rand(V, dtype=torch.float64, generator=g) ** 3
            p[int(torch.randint(2 * V, (), generator=g)) % (2 * V) :][:1] = 0
            made[text] = p / p.sum()
        return made[text]

    return of


def one_round(text, target, draft, K):
    """[(what is appended, its probability)] of a round, every draw and every decision listed."""
    out = []
    for y in itertools.product(range(V), repeat=K):
        q = torch.stack([draft(text + y[:i]) for i in range(K)])
        weight = torch.stack([q[i, y[i]] for i in range(K)]).prod().item()
        if not weight:
            continue
        p = torch.stack([target(text + y[:i]) for i in range(K + 1)])
        *_, chance = specdec.verify(p, q, list(y), [2.0] * K)
        for kept in range(K + 1):  # rejected behind so many; a number of 0 is below every chance that is not 0
            decided = weight * chance[:kept].prod().item() * (1 if kept == K else 1 - chance[kept].item())
            if decided:
                n, behind, _ = specdec.verify(p, q, list(y), [0.0] * kept + [2.0] * (K - kept))
                assert n == kept
                out += [(y[:n] + (v,), decided * behind[v].item()) for v in range(V)]
    return out


def gap(seed, K):
    """The greatest difference between the law of texts of L tokens made by rounds, and the target's."""
    target, draft = laws(seed), laws(1000 + seed)
    made, going = {}, {(): 1.0}
    while going:
        text, weight = going.popitem()
        if len(text) >= L:
            made[text[:L]] = made.get(text[:L], 0) + weight
            continue
        for more, chance in one_round(text, target, draft, K):
            if chance:
                going[text + more] = going.get(text + more, 0) + weight * chance
    worst = 0
    for text in itertools.product(range(V), repeat=L):
        true = 1.0
        for i in range(L):
            true *= target(text[:i])[text[i]].item()
        worst = max(worst, abs(true - made.get(text, 0)))
    return worst


@pytest.mark.parametrize("K", [1, 2, 3])
def test_the_law_is_the_targets(K):
    assert max(gap(seed, K) for seed in range(20)) < 1e-12


BROKEN = dict(
    all_kept=("acceptance", lambda p, q: torch.ones_like(p)),
    the_targets_law_behind_a_rejection=("residual", lambda p, q: p),
    never_more_than_half=("acceptance", lambda p, q: (p / q).clamp(max=0.5)),
)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_ones_are_seen(name, monkeypatch):
    monkeypatch.setattr(specdec, *BROKEN[name])
    assert max(gap(seed, 2) for seed in range(20)) > 1e-2


def test_worked_numbers():
    """By the card of specdec_pp."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.3, 0.2], [0.2, 0.6, 0.2]))
    assert specdec.acceptance(p, q).tolist() == pytest.approx([1, 0.5, 1])
    assert specdec.residual(p, q).tolist() == [1, 0, 0] and torch.equal(specdec.residual(p, p), p)
    n, behind, chance = specdec.verify(torch.stack([p, p, q]), torch.stack([q, q]), [0, 1], [0.99, 0.5])
    assert n == 1 and behind.tolist() == [1, 0, 0] and chance.tolist() == pytest.approx([1, 0.5])
    n, behind, _ = specdec.verify(torch.stack([p, p, q]), torch.stack([q, q]), [0, 1], [0.99, 0.49])
    assert n == 2 and torch.equal(behind, q)


def test_stop():
    args = specdec.Args(most=5)
    assert [specdec.stop(("fixed", 2), [7] * n, [0.1] * n, args) for n in (1, 2, 3)] == [False, True, True]
    assert [specdec.stop(("confidence", 0.6), [7], [c], args) for c in (0.5, 0.6, 0.9)] == [True, False, False]
    assert specdec.stop(("confidence", 0.6), [7] * 5, [0.9] * 5, args)
    newest = [specdec.stop(("confidence", 0.6), [7, 7], chances, args) for chances in ([0.9, 0.5], [0.5, 0.9])]
    assert newest == [True, False]
    assert list(specdec.arms(specdec.Args(lengths=(3,), confidences=(0.25,)))) == ["K = 3", "confidence 0.25"]


def model(seed, name="tiny-small"):
    torch.manual_seed(seed)
    made = Qwen2ForCausalLM(tiny.config(name)).eval().double()
    for weight in made.parameters():
        weight.data.mul_(4 if weight.dim() > 1 else 1)
    return made


@pytest.fixture(scope="module")
def both():
    return model(1), model(2)


PROMPT = [5, 20, 33, 41]


def text_of(target, draft, arm, seed=0, end=(), **flags):
    args = specdec.Args(max_new_tokens=24, **flags)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        readers = (engines.Decoder(lm, [PROMPT[:-1]]) for lm in (target, draft))
        return specdec.decode(*readers, PROMPT, arm, end, draws, target.config.vocab_size, args)


ARMS = [("fixed", 1), ("fixed", 3), ("fixed", 8), ("confidence", 0.5)]


@pytest.mark.parametrize("arm", ARMS)
def test_at_temperature_0_it_is_the_targets_greedy_text(both, arm):
    """Whatever the draft says, with the caches cropped behind every rejection."""
    args = decode.Args(max_new_tokens=24, temperature=0)
    with torch.no_grad():
        expected, _ = decode.decode(engines.Decoder(both[0], [PROMPT]), [], [0.5] * 24, args)
    ids, kept, count = text_of(*both, arm, temperature=0)
    assert ids == expected and len(kept) == 24 and count["thrown"] > 0
    assert set(kept) <= {1.0, None} and count["drafted"] >= count["rounds"]


@pytest.mark.parametrize("arm", ARMS)
def test_a_draft_that_is_the_target_is_always_kept(both, arm):
    ids, kept, count = text_of(both[0], both[0], arm)
    assert count["thrown"] == 0 and len(ids) == 24
    assert [a for a in kept if a is not None] == pytest.approx([1.0] * (24 - kept.count(None)))
    if arm == ("fixed", 3):
        assert count == dict(rounds=6, drafted=18, thrown=0)


def test_first_tokens_have_the_targets_law(both):
    """4,000 rounds of the loop itself: within four standard errors of the target's law for every token."""
    target, draft = both
    args = specdec.Args(max_new_tokens=1)
    with torch.no_grad():
        p = decode.law(target(torch.tensor([PROMPT])).logits[0, -1], args)
        q = decode.law(draft(torch.tensor([PROMPT])).logits[0, -1], args)
    draws, seen = torch.Generator().manual_seed(0), torch.zeros(len(p))
    for _ in range(4000):
        y = decode.pick(q, specdec.uniform(draws))
        n, behind, _ = specdec.verify(torch.stack([p, p]), q[None], [y], [specdec.uniform(draws)])
        seen[y if n else decode.pick(behind, specdec.uniform(draws))] += 1
    error = (p * (1 - p) / 4000).sqrt()
    assert ((seen / 4000 - p).abs() < 4 * error + 1e-3).all() and 0.5 * (p - q).abs().sum() > 0.1


def test_an_end_ends_it(both):
    ids, _, _ = text_of(*both, ("fixed", 4), seed=5)
    ended = 0
    for seed, end in enumerate(ids[:12]):
        again, kept, count = text_of(*both, ("fixed", 4), seed=seed, end=(end,))
        ended += again[-1] == end
        assert (again[-1] == end or len(again) == 24) and end not in again[:-1] and len(kept) == len(again)
        assert count["drafted"] - count["thrown"] + kept.count(None) == len(again)
    assert ended > 3


def test_a_reader_that_was_cropped_reads_the_same(both):
    """Laws behind any text, after any other was tried, are those of a fresh reader."""
    g, reader = torch.Generator().manual_seed(0), engines.Decoder(both[0], [PROMPT[:-1]])
    text = list(PROMPT)
    for _ in range(12):
        tried = text + torch.randint(3, 60, (int(torch.randint(1, 5, (), generator=g)),), generator=g).tolist()
        n = int(torch.randint(len(tried) - len(text), len(tried) - len(PROMPT) + 2, (), generator=g))
        with torch.no_grad():
            found = specdec.read_on(reader, tried, n, 50)
            expected = both[0](torch.tensor([tried])).logits[0, -n:, :50]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        text = tried[: len(tried) - int(torch.randint(0, 2, (), generator=g))]


def test_mistakes(tmp_path):
    script = ROOT / "algos" / "specdec.py"
    assert "--lengths needs a number" in user_error(run(tmp_path, "--lengths", script=script))
    assert "--confidences must be at most 1" in user_error(run(tmp_path, "--confidences", 1.5, script=script))
    other = tiny.words(["a", "b"])
    lm = Qwen2ForCausalLM(tiny.config("tiny-small"))
    lm.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    assert "its tokens are not those of --model tiny" in user_error(run(tmp_path, "--draft", tmp_path / "other", script=script))


def test_flags(tmp_path):
    """What is compared, how it is counted, and that a smaller bound drafts less."""
    script, found = ROOT / "algos" / "specdec.py", {}
    for name, more in dict(plain=(), bound=("--most", 2), cost=("--costs", 0.5)).items():
        argv = ["--items", 3, "--lengths", 2, "--confidences", 0.05, *more, "--run-dir", tmp_path / name]
        done = run(tmp_path, *argv, script=script)
        assert done.code == 0, done.err
        found[name] = lines(tmp_path / name / "items.jsonl")
    for row in found["plain"]:
        for name, count in row["counts"].items():
            kept = [p for p in row["pieces"][name] if p[1] != 1]
            assert count["tokens"] == len(row["pieces"][name]) and count["drafted"] - count["thrown"] == len(kept)
    drafts = {name: sum(r["counts"]["confidence 0.05"]["drafted"] for r in rows) for name, rows in found.items()}
    rounds = {name: sum(r["counts"]["confidence 0.05"]["rounds"] for r in rows) for name, rows in found.items()}
    assert drafts["bound"] <= 2 * rounds["bound"] and drafts["plain"] > 2 * rounds["plain"]
    assert found["cost"] == found["plain"]
    table = specdec.results(found["cost"], specdec.Args(lengths=(2,), confidences=(0.05,), costs=(0.5,)))["table"]
    row = table["K = 2"]
    assert row["time at 0.5"] == pytest.approx(row["target calls"] + 0.5 * row["drafted"])
