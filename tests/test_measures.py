"""Measures against counts by hand, ties, one class alone; and what the table and the picture make of results."""

import itertools
import json

import pytest

from common import figures, measures

LABEL = [1, 0, 1, 0, 0]
SCORE = [0.9, 0.8, 0.7, 0.3, 0.3]


def by_pairs(score, label):
    """The definition: the share of pairs (1, 0) in the right order, ties half."""
    pairs = [(a, b) for (a, x), (b, y) in itertools.product(zip(score, label), repeat=2) if x == 1 and y == 0]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def test_auroc():
    assert measures.auroc(SCORE, LABEL) == pytest.approx(5 / 6) == by_pairs(SCORE, LABEL)
    assert measures.auroc([1, 1, 1, 1, 1], LABEL) == 0.5 and measures.auroc(LABEL, LABEL) == 1
    assert measures.auroc(SCORE, [1 - y for y in LABEL]) == pytest.approx(1 / 6)
    tied = [0.5, 0.5, 0.7, 0.7, 0.1]
    assert measures.auroc(tied, LABEL) == pytest.approx(by_pairs(tied, LABEL))


def test_average_precision():
    assert measures.average_precision(SCORE, LABEL) == pytest.approx((1 + 2 / 3) / 2)


def test_one_class_alone_is_not_defined():
    for of in (measures.auroc, measures.average_precision):
        assert of(SCORE, [1] * 5) is None and of(SCORE, [0] * 5) is None
    assert measures.interval(measures.auroc, SCORE, [1] * 5) == (None, None)


def test_calibration():
    """By the card of uqac: right .9 .8 .55, wrong .6 .35, 10 bins."""
    chance, label = [0.9, 0.8, 0.55, 0.6, 0.35], [1, 1, 1, 0, 0]
    assert measures.ece(chance, label) == pytest.approx((0.1 + 0.2 + 0.45 + 0.6 + 0.35) / 5)
    assert measures.ece([0.25, 0.25, 0.25, 0.9], [0, 0, 1, 1]) == pytest.approx((3 * (1 / 3 - 0.25) + 0.1) / 4)
    assert measures.ece([1.0, 0.0], [1, 0]) == 0 and measures.ece([0.25] * 4, [1, 0, 0, 0]) == 0
    assert measures.reliability([0.1, 0.15, 1.0], [0, 1, 1]) == [pytest.approx((0.125, 0.5, 2)), (1.0, 1.0, 1)]


def test_interval():
    """A mean's: near 1.96 standard errors; constant: a point; the same for the same seed."""
    values = [i % 7 for i in range(400)]
    low, high = measures.interval(lambda x: x.mean(), values)
    error = 1.96 * (sum((v - sum(values) / 400) ** 2 for v in values) / 400) ** 0.5 / 20
    assert high - low == pytest.approx(2 * error, rel=0.15) and low < sum(values) / 400 < high
    assert measures.interval(lambda x: x.mean(), [3.0] * 9) == (3.0, 3.0)
    assert measures.interval(lambda x, y: (x - y).mean(), values, values) == (0.0, 0.0)  # rows stay together
    assert measures.interval(lambda x: x.mean(), values) == (low, high)
    assert measures.interval(lambda x: x.mean(), [1.0]) == (None, None) == measures.interval(lambda x: x.mean(), [])


RESULTS = dict(
    table={"a": {"x": 0.5, "y": 1.0}, "b": {"x": None}},
    panels=[
        dict(title="l", kind="lines", x="n", y="v", of={"u": [[0, 1.0], [1, 2.0]]}, diagonal=True),
        dict(title="p", kind="points", x="n", y="v", of={"u": [[0, 1.0]]}),
        dict(title="b", kind="bars", of={"u": 0.5, "v": 0.1}),
        dict(title="h", kind="heat", of={"r": {"c": 1.0, "d": 0.0}}),
        dict(title="t", kind="tokens", of={"text": [["word ", i / 60] for i in range(60)]}),
    ],
)


def test_results_of_seeds_are_merged(tmp_path, capsys):
    other = json.loads(json.dumps(RESULTS).replace("0.5", "0.7"))
    found = figures.merge([RESULTS, other])
    assert found["table"] == {"a": {"x": [0.5, 0.7], "y": [1.0, 1.0]}, "b": {"x": [None, None]}}
    assert found["panels"][2]["of"]["u"] == [0.5, 0.7] and found["panels"][0]["title"] == "l"
    lines = figures.table(found).splitlines()
    assert lines[2:] == ["| a | 0.600 (0.500 to 0.700) | 1.000 (1.000 to 1.000) |", "| b | not defined |  |"]
    figures.draw(dict(one=found, two=found), tmp_path / "x.png")
    figures.publish(tmp_path, RESULTS)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS and "| a | 0.500 |" in capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 5000 and (tmp_path / "x.png").stat().st_size > 10000
    with pytest.raises(KeyError):
        figures.merge([RESULTS, dict(table={"a": {"x": 1}}, panels=RESULTS["panels"])])
    assert figures.table(figures.merge([dict(table={"a": {"x": 3e-6}}, panels=[])])).endswith("| a | 3e-06 |")


def test_tokens_are_broken_into_lines():
    made = figures._broken([["abcd", 1]] * 50)
    assert [len(line) for line in made] == [22, 22, 6] and figures._broken([["x" * 200, 0]]) == [[("x" * 200, 0)]]
