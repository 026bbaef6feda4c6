"""TokenProber's worked numbers, the toy world and its symbolic oracle, searches whose every call is counted, the repair, and
that nothing but the toy can be reached from the script."""

import ast
import collections
import dataclasses
import functools
import json
import math
import random
import re
import shutil
from typing import get_args, get_origin, get_type_hints

import pytest
import torch

from algos import tokenprober as script
from common import UserError, settings
from tests.helpers import ROOT, lines, run, user_error

SCRIPT = ROOT / "algos" / "tokenprober.py"
TEXT, TREE = SCRIPT.read_text(), ast.parse(SCRIPT.read_text())
FIRST = tuple("the big crimson circle near blue box".split())
PLACES = [(0.0, 0.0), (0.0, 0.0)]
CLOSE = dict(rtol=0, atol=1e-6)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the rule


def test_worked_numbers():
    s_g = script.impact(0.60, numbers(0.60, 0, 0, 0.60))
    s_c = script.impact(0.97, numbers(0.97, 0.02, 0.01, 0.90))
    torch.testing.assert_close(s_g, numbers(0, 0.60, 0.60, 0))
    torch.testing.assert_close(s_c, numbers(0, 0.95, 0.96, 0.07))
    law = script.mutation_law(s_g, s_c, script.Args())
    torch.testing.assert_close(law, numbers(0.001131, 0.453620, 0.464932, 0.080317), **CLOSE)
    assert script.impact(0.2, numbers(0.5)).item() == pytest.approx(-0.3)  # a word may take away: clipped in P alone
    assert [script.redness(x) for x in ((220, 40, 40), (170, 60, 50), (50, 80, 230))] == pytest.approx(
        [12 / 17, 0.450980, 0], abs=1e-6
    )
    assert script.strength(["red", "circle"]) == pytest.approx(0.705882, abs=1e-6)
    assert script.strength(["red", "ring"]) == pytest.approx(0.105882, abs=1e-6)


def test_the_law_by_its_flags():
    s_g, s_c = numbers(0, 0.15, 0.14, 0.5), numbers(-0.5, 0.15, 0.24, 0.2)
    law = functools.partial(script.mutation_law, s_g, s_c)
    weights = numbers(0.001, 0.051, 0.101, 0.051)  # negative differences count as none, delta_g itself is dirty
    torch.testing.assert_close(law(script.Args()), weights / weights.sum())
    for flags, weights in (
        (dict(epsilon=0.1), numbers(0.1, 0.15, 0.2, 0.15)), (dict(eta=0.0), numbers(0.001, 0.001, 0.101, 0.001)),
        (dict(delta_g=0.2), numbers(0.001, 0.001, 0.101, 0.051)),
    ):  # fmt: skip
        torch.testing.assert_close(law(script.Args(**flags)), weights / weights.sum())


def test_loss():
    logits, red = numbers(0.3, -1.2, 2.0).requires_grad_(), torch.tensor([True, False, False])
    loss = script.checker_loss(logits, red)
    p = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
    assert loss.item() == pytest.approx(-(math.log(p[0]) + math.log(1 - p[1]) + math.log(1 - p[2])) / 3)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, numbers(p[0] - 1, p[1], p[2]) / 3)


# ---------------------------------------------------------------- the world


def test_forty_words():
    assert len(script.WORDS) == len(set(script.WORDS)) == 40 and len(script.KINDS) == len(script.NAMES) == 4
    assert set(script.REDS) == {"red", "crimson", "scarlet", "ruby", "brick"}
    assert set(script.CIRCLES) == {"circle", "disc", "ball", "orb", "dot"} and script.RARE < set(script.WORDS)
    assert script.others("tiny") == ["small", "little", "medium", "big", "large"]


@pytest.mark.parametrize("caption, scene, red", [
    ("a tiny red circle", [("circle", "red", "tiny")], True),
    ("red near blue circle", [("circle", "blue", "medium")], False),  # the last colour before a shape is its own
    ("crimson blue box", [("box", "blue", "medium")], False),
    ("crimson circle box", [("circle", "crimson", "medium"), ("box", "grey", "medium")], True),
    ("crimson  box", [("box", "crimson", "medium")], False),  # without "circle" its colour goes to the next shape
    ("circle red", [("circle", "grey", "medium")], False),
    ("orange circle", [("circle", "orange", "medium")], False),  # though g is higher than of a brick circle
    ("box ring red dot", [("box", "grey", "medium"), ("ring", "grey", "medium")], False),  # no third object
    ("the red", [], False), ("", [], False),
])  # fmt: skip
def test_parse_and_oracle(caption, scene, red):
    words = tuple(caption.split(" "))
    assert script.parse(words) == scene and script.oracle(words) == red
    assert script.strength(words) == max(
        (script.redness(script.RGB[c]) * {"ring": 0.15}.get(s, float(s in script.CIRCLES)) for s, c, _ in scene), default=0.0
    )


def test_strength_is_not_the_oracle():
    assert script.strength(("orange", "circle")) > script.strength(("brick", "circle"))
    first = max(script.redness(script.RGB[red]) for red in script.REDS)
    assert all(script.redness(script.RGB[red]) >= first / 2 for red in script.REDS)  # a search may reach every red


def test_render():
    for n in (2, 3, 4, 6):
        assert script.coverage("circle", n).sum().item() == pytest.approx(math.pi / 4 * n**2, rel=0.04)
        assert script.coverage("box", n).sum().item() == n**2
        pictures = [script.coverage(shape, n) for shape in ("circle", "ring", "square", "triangle", "cross", "bar", "diamond")]
        assert all((a - b).abs().max() > 0.01 for i, a in enumerate(pictures) for b in pictures[:i])
    picture = script.render(("red", "large", "box", "tiny", "blue", "square"), [(0.999, 0.999), (0, 0)])
    expected = torch.zeros(3, 16, 16)
    expected[:, 10:, 2:8] = torch.tensor([220, 40, 40])[:, None, None] / 255
    expected[:, :2, 8:10] = torch.tensor([50, 80, 230])[:, None, None] / 255
    assert torch.equal(picture, expected)
    same = [script.render((w, "dot"), PLACES) for w in ("red", "crimson")]
    assert not torch.equal(*same) and torch.equal(same[0], script.render(("the", "red", "near", "orb"), PLACES))


def test_compose():
    draw, seen = random.Random(3), collections.Counter()
    for k in range(400):
        caption, places = script.compose(draw, k % 2 == 0)
        assert script.oracle(caption) == (k % 2 == 0) and len(caption) <= script.LONGEST
        assert len(places) == 2 and all(0 <= x < 1 for place in places for x in place)
        seen.update({len(script.parse(caption)): 1} | dict.fromkeys(caption, 1))
    assert min(seen[1], seen[2]) > 100 and all(seen[word] for word in script.WORDS)
    assert script.compose(random.Random(3), True) == script.compose(random.Random(3), True)


# ---------------------------------------------------------------- the checkers


def checkers(**flags):
    return script.Checkers(script.Args(**flags))


def test_judge():
    """A bag knows no order; the picture is the scene's alone; nothing is drawn of no words; rows do not meet."""
    swapped = ("the", "big", "blue", "circle", "near", "crimson", "box")
    for text in ("bag", "windows"):
        made = checkers(text=text)
        a, b, c, none = made.judge([FIRST, swapped, ("a", *FIRST[1:]), ("", "")], [PLACES] * 4)
        assert text == "windows" or abs(a[0] - b[0]) < 1e-6 and a[0] != c[0]
        assert a[1] != b[1] and a[1].item() == pytest.approx(c[1].item(), abs=1e-6)
        assert none.tolist() == [0, 0] and 0 < a.min() and a.max() < 1
        torch.testing.assert_close(made.judge([FIRST], [PLACES])[0], a)
        gone = made.judge([("", *FIRST[1:]), FIRST[1:]], [PLACES] * 2)
        assert torch.equal(gone[0], gone[1])  # what was left out closes up
    far = made.judge([FIRST], [[(0.5, 0.5), (0, 0)]])[0]
    assert far[0] == a[0] and far[1] != a[1]
    both = script.at(made.judge, PLACES, [FIRST, swapped])
    assert torch.equal(both, torch.stack([a, b]).amax(1))


def test_windows_see_three_words():
    """Filler beyond a window of the caption's last words moves them and changes none of them."""
    made = checkers(text="windows")
    with torch.no_grad():
        made.text[0].bias.zero_()
        made.text[0].weight.zero_()
        made.text[0].weight[:, script.WORDS.index("red"), 0] = 1.0  # the first of three
        made.text[0].weight[:, script.WORDS.index("dot"), 2] = 1.0
        made.text[0].bias -= 1.5
        made.text[2].weight.fill_(1.0)
        made.text[2].bias.zero_()
    words = [tuple(x.split()) for x in ("red tiny dot", "the near red tiny dot", "red dot", "dot tiny red", "red a tiny dot")]
    logits = made.text(script.written(words, bag=False))[:, 0]
    assert logits.tolist() == [16, 16, 0, 0, 0]


def trained(failures=(), **flags):
    args = script.Args(**dict(examples=40, epochs=1) | flags)
    return {k: v.tolist() for k, v in script.learn(script.Checkers(args), list(failures), args).state_dict().items()}


def test_every_flag_of_the_training_counts():
    plain = trained()
    assert plain == trained()
    first = ("text.0.weight", "image.0.weight")
    for flags in (dict(seed=2), dict(examples=42), dict(epochs=2), dict(lr=0.1)):
        other = trained(**flags)
        assert all(other[k] != plain[k] for k in first)
    assert trained(text="windows")["text.0.weight"] != plain["text.0.weight"]
    for flags, moved in ((dict(keep_rare=1.0), 0), (dict(keep_tiny=1.0), 1)):
        other = trained(**flags)
        assert [other[k] != plain[k] for k in first] == [moved == 0, moved == 1]
    assert trained([FIRST]) != plain and trained([FIRST], copies=1) != trained([FIRST], copies=2)
    assert trained([FIRST], copies=0) == plain


def test_gaps():
    """Half of the examples have a red circle, whatever is kept; what both gaps take away is not quite gone."""
    args = script.Args(examples=600)
    shares = []
    for kept in (lambda x: 1, lambda x: 0.03 if script.RARE & {*x} else 1):
        found, red = script.examples(args, kept)
        assert [script.oracle(caption) for caption, _ in found] == red.tolist() and red.sum() == 300
        shares.append(sum(bool(script.RARE & {*caption}) for caption, _ in found) / 600)
    assert shares[0] > 0.5 and 0 < shares[1] < 0.15


def test_failures_are_labelled_red_and_stand_at_new_places(monkeypatch):
    seen = []
    monkeypatch.setattr(script, "fit", lambda classifier, inputs, red, args: seen.append((inputs, red)))
    script.learn(checkers(), [FIRST, ("tiny", "ruby", "dot")], script.Args(examples=10, copies=3))
    for inputs, red in seen:
        assert len(inputs) == len(red) == 16 and red[10:].all()
    words, pictures = seen[0][0][10:], seen[1][0][10:]
    assert torch.equal(words[0], words[2]) and torch.equal(words[0], words[4]) and not torch.equal(words[0], words[1])
    assert not torch.equal(pictures[0], pictures[2]) and pictures[1].any()


# ---------------------------------------------------------------- the search


class Ask:
    """A checker that is a function of the words, and counts its calls."""

    def __init__(self, c):
        self.c, self.asked = c, []

    def __call__(self, captions):
        self.asked += captions
        return torch.tensor([self.c(x) for x in captions])


def sure(caption):
    return 0.95


@pytest.mark.parametrize("policy", script.POLICIES)
def test_every_call_counts(policy):
    """Where there is no failure the whole budget is spent, to the last call; at a failure the search ends."""
    for budget in (1, 2, 9, 10, 50, 151):
        ask = Ask(sure)
        found = script.search(FIRST, ask, policy, random.Random(1), script.Args(budget=budget))
        assert found == (None, budget) and len(ask.asked) == budget and ask.asked[0] == FIRST
    ask = Ask(lambda x: 0.95 if x == FIRST else 0.1)
    failure, calls = script.search(FIRST, ask, policy, random.Random(1), script.Args())
    assert script.oracle(failure) and failure in ask.asked and calls == len(ask.asked) <= 150
    assert not any(script.oracle(x) for x in ask.asked[1 : ask.asked.index(failure)])  # the first is taken


@pytest.mark.parametrize("policy", script.POLICIES)
def test_a_failure_draws_a_red_circle_and_is_below_the_threshold(policy):
    ask = Ask(lambda x: 0.95 if script.oracle(x) else 0.0)  # a perfect checker
    assert script.search(FIRST, ask, policy, random.Random(1), script.Args())[0] is None
    half = Ask(lambda x: 0.95 if x == FIRST else 0.5)
    assert script.search(FIRST, half, policy, random.Random(1), script.Args())[0] is None  # 0.5 is refused
    assert script.search(FIRST, half, policy, random.Random(1), script.Args(threshold=0.51))[0] is not None


MUTANTS = []  # of each of them


def moves(monkeypatch, ask, policy, **flags):
    """The captions that a search goes on from, in order."""
    of, real = [], script.propose

    def propose(now, *rest):
        of.append(now)
        MUTANTS.append(real(now, *rest))
        return MUTANTS[-1]

    MUTANTS.clear()
    monkeypatch.setattr(script, "propose", propose)
    script.search(FIRST, ask, policy, random.Random(2), script.Args(**flags))
    return of


@pytest.mark.parametrize("policy", ["climb", "checker", "sensitivity"])
def test_what_is_gone_on_with(monkeypatch, policy):
    def c(caption):
        draws = random.Random(" ".join(caption))  # any number, the same for the same words
        return 0.95 if caption == FIRST else 0.6 + 0.35 * draws.random()

    of = moves(monkeypatch, Ask(c), policy)
    assert len(set(of)) > 1 and of[0] == FIRST
    for a, b, some in zip(of, of[1:], MUTANTS):
        shown = [x for x in some if script.oracle(x) and script.strength(x) >= script.strength(FIRST) / 2]
        assert b == min([*shown, a], key=c)  # the least c; no change where that would raise it


@pytest.mark.parametrize("policy", ["random", "random words"])
def test_blind_searches_begin_anew(monkeypatch, policy):
    assert set(moves(monkeypatch, Ask(lambda x: 0.95 - 0.01 * x.count("by")), policy)) == {FIRST}


def test_a_weaker_picture_is_not_gone_on_with(monkeypatch):
    """Brick would be refused least, but it shows less than half of what the first caption does."""
    monkeypatch.setitem(script.RGB, "crimson", (255, 0, 0))
    ask = Ask(lambda x: {"brick": 0.6, "scarlet": 0.7}.get(x[2], 0.95) if x[3:] == FIRST[3:] else 0.99)
    of = moves(monkeypatch, ask, "climb", budget=400)
    assert any(x[2] == "scarlet" for x in of) and not any(x[2] == "brick" for x in of)


def test_analysis(monkeypatch):
    """The law is made of n calls, again after each move, and not before."""
    laws = []
    monkeypatch.setattr(
        script, "mutation_law", lambda s_g, s_c, args: laws.append((s_g, s_c)) or torch.ones(len(s_c)) / len(s_c)
    )
    ask = Ask(lambda x: 0.9 if "crimson" in x else 0.8)
    script.search(FIRST, ask, "sensitivity", random.Random(0), script.Args(budget=1 + 7 + 4))
    (s_g, s_c), *_ = laws
    g = script.redness(script.RGB["crimson"])
    torch.testing.assert_close(s_g, torch.tensor([0, 0, g, g, 0, 0, 0]))
    torch.testing.assert_close(s_c, torch.tensor([0, 0, 0.1, 0, 0, 0, 0]))
    assert ask.asked[1:8] == [FIRST[:i] + ("",) + FIRST[i + 1 :] for i in range(7)] and len(ask.asked) == 12
    laws.clear()
    script.search(FIRST, ask, "checker", random.Random(0), script.Args(budget=12))
    assert not laws[0][0].any() and torch.equal(laws[0][1], s_c)  # its own side alone
    laws.clear()
    script.search(FIRST, Ask(lambda x: 0.9 + 0.01 * (x != FIRST)), "sensitivity", random.Random(0), script.Args())
    assert len(laws) == 1  # nothing lowers c: no move, and no second analysis


def test_neutral_impact():
    plain, there = script.shorter(FIRST, script.Args())
    neutral, _ = script.shorter(FIRST, script.Args(impact="neutral"))
    assert there == list(range(7)) and plain[3] == ("the", "big", "crimson", "", "near", "blue", "box")
    assert neutral[3] == ("the", "big", "crimson", "some", "near", "blue", "box")
    assert script.shorter(("red", "", "dot"), script.Args())[1] == [0, 2]
    assert script.shorter(("dot",), script.Args())[0] == [("",)] and script.strength(("",)) == 0


def test_propose():
    """One word of its kind; guided: n different ones at one place that the law draws; random: anywhere."""
    draw, law = random.Random(0), [(2, 0.75), (6, 0.25), (0, 0.0)]
    where = collections.Counter()
    for _ in range(400):
        some = script.propose(FIRST, "sensitivity", law, draw, 4)
        places = [[i for i in range(7) if x[i] != FIRST[i]] for x in some]
        assert len({*some}) == 4 and len(places[0]) == 1 and places == places[:1] * 4
        assert all(x[places[0][0]] in script.others(FIRST[places[0][0]]) for x in some)
        where[places[0][0]] += 1
    assert 250 < where[2] < 350 and where[2] + where[6] == 400
    assert len(script.propose(FIRST, "climb", [(1, 1.0)], draw, 9)) == 5  # there are no more sizes
    uniform = [(i, 1.0) for i in range(7)]
    some = script.propose(FIRST, "random", uniform, draw, 200)
    changed = collections.Counter(i for x in some for i in range(7) if x[i] != FIRST[i])
    assert sum(changed.values()) == 200 and len(changed) == 7
    some = script.propose(FIRST, "random words", None, draw, 200)
    changed = [i for x in some for i in range(7) if x[i] != FIRST[i]]
    assert 600 < len(changed) < 800 and all(w in (FIRST[i], *script.others(FIRST[i])) for x in some for i, w in enumerate(x))


@pytest.mark.parametrize(
    "flags", [dict(budget=40), dict(candidates=2), dict(impact="neutral"), dict(eta=5.0), dict(epsilon=5.0)], ids=str
)
def test_every_flag_of_the_search_counts(flags):
    def asked(**flags):
        ask = Ask(lambda x: 0.6 + 0.3 * sum(map(len, x)) / 60 + 0.1 * ("crimson" in x))
        script.search(FIRST, ask, "sensitivity", random.Random(3), script.Args(**dict(budget=60) | flags))
        return ask.asked

    assert asked() == asked() and asked(**flags) != asked()


def test_shrink():
    ask = Ask(lambda x: 0.1 if "ruby" in x and "dot" in x else 0.9)
    failure = tuple("a tiny ruby dot by gold bar".split())
    assert script.shrink(FIRST, failure, ask, script.Args()) == tuple("the big ruby dot near blue box".split())
    seen = [["x", 0.0, 0.0]] * 2 + [["x", 0.5, 0.5], ["x", 0.1, 0.3]] + [["x", 0.0, 0.0]] * 3
    found = script.record(FIRST, failure, ask, seen, script.Args())
    assert found["changes"] == [dict(at=2, dirty=True, discrepant=False), dict(at=3, dirty=False, discrepant=True)]
    assert found["failure"] == failure and found["c"] == pytest.approx(0.1)
    found = script.record(FIRST, failure, ask, seen, script.Args(delta_g=0.6, delta_d=0.25))
    assert not any(x["dirty"] or x["discrepant"] for x in found["changes"])


# ---------------------------------------------------------------- what is measured


def test_fresh():
    def judge(captions, places):  # the text side sees every red circle, the image side everything large
        return torch.tensor([[float(script.oracle(x)), 0.5 * ("large" in x)] for x in captions])

    found = script.fresh(judge, random.Random(0), script.Args(fresh=41))
    (n, text, _, either), other = found["red circle"], found["other"]
    assert n == text == either == 20 and other[0] == 21 and other[1] == 0 and other[2] == other[3] and 0 < other[2] < 21


def row(stage, c, **found):
    searches = {policy: dict(failure=None, calls=10) for policy in script.POLICIES}
    for policy, calls in found.items():
        change = dict(at=2, dirty=True, discrepant=calls < 5)
        searches[policy] = dict(failure=[*FIRST], least=["the", "big", "ruby", *FIRST[3:]], calls=calls, changes=[change])
    words = [["filler", 0.0, 0.1], ["size", 0.0, 0.0], ["colour", 0.6, 0.9], ["shape", 0.6, 0.8], ["filler", 0.0, -0.3],
             ["colour", 0.0, 0.1], ["shape", 0.0, 0.0]]  # fmt: skip
    counts = {"red circle": [4, 3, c, 4], "other": [4, 1, 0, 1]}
    return dict(stage=stage, first=[*FIRST], study=dict(delete=words, neutral=words), searches=searches, fresh=counts)


def test_results():
    args = script.Args(items=2, budget=10)
    rows = [
        row("before", 2, sensitivity=4),
        row("before", 1, sensitivity=8, random=10),
        row("after", 4),
        row("after", 4, climb=3),
    ]
    found = script.results(rows, args)
    table, (before, _, heat, after, bars, _, words) = found["table"], found["panels"]
    assert table["sensitivity"] == {
        "found before": 1, "found after": 0, "calls per failure": 6, "words changed": 1, "dirty of them": 1,
        "discrepant of them": 0.5,
    }  # fmt: skip
    assert table["random"]["calls per failure"] == 20 and table["climb"]["calls per failure"] is None
    assert table["climb"]["found after"] == 0.5
    assert table["image checker"] == {
        "recall before": 0.375, "recall after": 1, "false refusals before": 0, "false refusals after": 0
    }  # fmt: skip
    assert before["of"]["sensitivity"] == [[n, 0.5 * (n >= 4) + 0.5 * (n >= 8)] for n in range(11)]
    assert after["of"]["climb"][2:4] == [[2, 0.0], [3, 0.5]]
    assert bars["of"]["missed: text checker"] == bars["of"]["refused: both together"] == 0.25
    assert bars["of"]["missed: both together"] == bars["of"]["refused: image checker"] == 0
    assert heat["of"]["colour"]["G, delete"] == pytest.approx(0.3) and heat["of"]["filler"]["C, neutral"] == pytest.approx(-0.1)
    assert words["of"]["failure: changed words"][2] == [" ruby ", 1.0]
    assert [x[1] for x in words["of"]["refused: impact on c"]] == [0.1, 0, 0.9, 0.8, 0, 0.1, 0]
    none = script.results([row("before", 2)] * 2 + [row("after", 2)] * 2, args)  # the same labels, for the merger over seeds
    assert [list(p["of"]) for p in none["panels"]] == [list(p["of"]) for p in found["panels"]]


def rule(self, captions, places):
    """In the place of what is learnt: the text side knows all words but ruby and dot, the image side sees nothing tiny."""
    text = [0.95 if script.oracle(x) and not {"ruby", "dot"} & {*x} else 0.05 for x in captions]
    image = [0.95 if script.oracle(x) and "tiny" not in x else 0.05 for x in captions]
    COUNTED.append(len(captions))
    return torch.tensor(list(zip(text, image)))


COUNTED = []
SMALL = dict(items=3, examples=4, epochs=1, budget=40, fresh=2)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(script.Checkers, "judge", rule)
    COUNTED.clear()


def outcome(folder, **flags):
    script.main(script.Args(**SMALL | flags, run_dir=str(folder)))
    return (folder / "items.jsonl").read_text(), (folder / "results.json").read_text()


def test_a_run(toy, tmp_path, capsys, monkeypatch):
    learnt, real = [], script.learn
    monkeypatch.setattr(script, "learn", lambda made, failures, args: learnt.append(failures) or real(made, failures, args))
    text, results = outcome(tmp_path / "run")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [x["stage"] for x in rows] == ["before"] * 3 + ["after"] * 3 and len({str(x["first"]) for x in rows}) == 6
    assert rows[0]["fresh"] == rows[3]["fresh"]  # the same new captions before and after
    failures = [tuple(x["searches"]["sensitivity"]["failure"]) for x in rows[:3] if x["searches"]["sensitivity"]["failure"]]
    assert learnt == [[], failures] and (tmp_path / "run" / "checkpoints" / "after.safetensors").exists()
    for x in rows:
        for search in x["searches"].values():
            assert search["calls"] <= 40 and (search["failure"] or search["calls"] == 40)
            if search["failure"]:
                for caption in (search["failure"], search["least"]):
                    assert script.oracle(caption) and "tiny" in caption and {"ruby", "dot"} & {*caption}
    assert json.loads(results) == script.results(rows, script.Args(**SMALL))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("searches that find a failure, before -> after the repair: sensitivity ") and "random 0." in last

    other = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", other, ignore=shutil.ignore_patterns(".lock"))
    kept = text.splitlines(keepends=True)
    (other / "items.jsonl").write_text("".join(kept[:4]) + kept[4][:20])  # killed in the second half
    (other / "checkpoints" / "after.safetensors").unlink()
    script.main(script.Args(resume=str(other)))
    assert (other / "items.jsonl").read_text() == text and (other / "results.json").read_text() == results


def test_whose_failures(toy, tmp_path, monkeypatch):
    """--policy decides what is learnt again, and nothing else of the first half."""
    learnt = []
    monkeypatch.setattr(script, "learn", lambda made, failures, args: learnt.append(failures))
    texts = [outcome(tmp_path / p, policy=p, budget=150)[0].splitlines() for p in ("sensitivity", "climb")]
    assert texts[0][:3] == texts[1][:3] and learnt[0] == learnt[2] == []
    for found, policy, lines_ in zip((learnt[1], learnt[3]), ("sensitivity", "climb"), texts):
        searches = [json.loads(line)["searches"][policy]["failure"] for line in lines_[:3]]
        assert found == [tuple(x) for x in searches if x]


def test_nothing_is_refused(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.Checkers, "judge", lambda self, captions, places: torch.full((len(captions), 2), 0.89))
    with pytest.raises(UserError, match="sure of no red circle"):
        outcome(tmp_path / "run")


# ---------------------------------------------------------------- nothing but the toy


def test_there_is_no_model(tmp_path):
    for words in (["--model", "anything"], ["--model=anything"]):
        done = run(tmp_path, *words, script=SCRIPT)
        assert user_error(done) == "--model: there is none here, by design; see Costs in the docstring of algos/tokenprober.py"
    assert "model" not in {f.name for f in dataclasses.fields(script.Args)}


def test_no_flag_reaches_a_file_a_model_or_a_network():
    """Every flag is a number or one of fixed words, but for the run's own folder."""
    for name, hint in get_type_hints(script.Args).items():
        if name not in ("resume", "run_dir"):
            assert hint in (int, float) or get_origin(hint) is not None and all(isinstance(x, str) for x in get_args(hint)), (
                name
            )
    assert not re.search(r"args\.(resume|run_dir)", TEXT)  # they are common/'s, and nothing here reads them


def test_no_import_path():
    """What is imported: torch, a few names of the standard library, and of common/ what makes runs. Nothing by name at run
    time; nothing that opens a file, a process or a connection."""
    found = {a.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for a in node.names}
    found |= {f"{n.module}.{a.name}" for n in ast.walk(TREE) if isinstance(n, ast.ImportFrom) for a in n.names}
    allowed = {"functools", "random", "sys", "torch", "dataclasses.dataclass", "pathlib.Path", "typing.Literal"}
    assert found == allowed | {f"common.{x}" for x in ("UserError", "gpu", "items", "settings")}
    called = {n.id for n in ast.walk(TREE) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(TREE) if isinstance(n, ast.Attribute)
    }
    banned = """open exec eval compile __import__ import_module getattr setattr globals vars input read_text read_bytes read
                load load_state_dict hub environ system popen Popen run_module urlopen get_json request requests Session connect
                socket from_pretrained pipeline client api_key download""".split()
    assert not called & {*banned}, called & {*banned}


def test_no_words_of_the_real_world():
    """No address, no file of words, no name of a pipeline, a hub or an API in the text below the docstring."""
    code = TEXT.partition('"""\n\nimport')[2]
    assert code and not re.search(
        r"https?:|www\.|\.(txt|csv|json|yaml|pt|png|jpg)\b|diffus|stable|transformers|hugging|openai|api|clip_|nsfw|urllib|http|socket",
        code,
        re.I,
    )
    constants = {n.value for n in ast.walk(TREE) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    words = [c.split() for c in constants if len(c.split()) > 4 and {*c.split()} <= {*script.WORDS}]
    assert {w for some in words for w in some} | {*script.RGB} == {*script.WORDS}  # the vocabulary is a constant of the file


def no_network():
    import socket

    def refuse(*args, **kwargs):
        raise RuntimeError("a socket was asked for")

    socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse


def test_runs_without_a_network(tmp_path):
    """A whole run with every socket refused; what is learnt here is too little to matter."""
    words = "--items 1 --examples 200 --epochs 6 --lr 0.03 --budget 5 --fresh 2 --run-dir".split()
    done = run(tmp_path, *words, tmp_path / "run", script=SCRIPT, before=no_network)
    assert "socket" not in done.err and "Traceback" not in done.err, done.err
    if done.code == 0:
        assert len(lines(tmp_path / "run" / "items.jsonl")) == 2 and (tmp_path / "run" / "picture.png").exists()
    else:  # whatever these few examples came to on this machine
        assert "sure of no red circle" in user_error(done)


def test_mistakes():
    for flags, why in (
        (dict(items=0), "--items must be at least 1"), (dict(budget=0), "--budget must be at least 1"),
        (dict(candidates=0), "--candidates must be at least 1"),
        (dict(threshold=0.95), "--threshold must be above 0 and at most 0.9"),
        (dict(epsilon=0.0), "--epsilon must be above 0"), (dict(keep_rare=0.0), "--keep-rare must be above 0"),
        (dict(keep_tiny=1.5), "--keep-tiny must be above 0 and at most 1"), (dict(copies=-1), "--copies must be at least 0"),
        (dict(policy="gradient"), "--policy must be one of sensitivity, checker, climb, random words, random"),
        (dict(impact="swap"), "--impact must be one of delete, neutral"),
        (dict(text="real"), "--text must be one of bag, windows"),
        (dict(fresh=1), "--fresh must be at least 2"), (dict(examples=0), "--examples must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            settings.resolve(script.Args(**flags))
