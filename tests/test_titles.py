"""titles: its rule, prompts, splits and demonstrations, and what every script is paid for a list."""

import collections
import itertools
import random
from math import log2

import pytest

from common import rewards, tasks
from common.worlds import tiny, titles

RIGHT = "oru\tkesta\tbino\tzupa\tjolek\tcim\tusap\trindo"
IDEAL = 1 + 1 / log2(3) + 1 / 2 + 1 / log2(5) + 1 / log2(6)


@pytest.fixture(scope="module")
def task():
    return tasks.load("titles")


@pytest.mark.parametrize(
    "lines, gain",
    [("oru kesta bino zupa jolek", IDEAL), ("rindo usap cim jolek zupa", IDEAL), ("oru", 1), ("fawel oru", 1 / log2(3)),
     ("oru oru oru oru oru", 1), ("oru fawel oru kesta", 1 + 1 / log2(5)),  # the first copy counts
     ("vipe fyx or oruo ORU", 0), ("fawel fyx vipe lomo tum oru", 0),  # the sixth line is not looked at
     ("oru kesta bino zupa jolek cim usap rindo", IDEAL), ("- - - - oru", 1 / log2(6)), ("", 0), ("-", 0),
     ("vipe kesta fyx zupa zupa", 1 / log2(3) + 1 / log2(5))],
)  # fmt: skip
def test_rule(lines, gain):
    """A line that is - is blank here."""
    text = "\n".join("" if line == "-" else line for line in lines.split())
    extracted, score = titles.check(text, RIGHT)
    assert score == pytest.approx(gain / IDEAL) and 0 <= score <= 1
    assert extracted == (",".join(text.split("\n")[:5]) or None)
    assert gain != IDEAL or score == 1.0


def test_spaces_around_a_line_do_not_count():
    assert titles.check(" oru \nkesta\r\n\tbino", RIGHT)[1] == titles.check("oru\nkesta\nbino", RIGHT)[1] > 0.7


def test_a_scorer_pays_whole_lists(task):
    """The right ones are one answer: of several a scorer would ask one at a time."""
    e = task.test[0]
    assert e.prompt == "bf fawel,fyx:" and e.answer == RIGHT
    texts = ["oru\nkesta\nbino\nzupa\njolek", "vipe\nkesta\nfyx", "vipe", ""]
    read, scores = rewards.Scorer(task.check, inline=task.inline)(texts, [e.answer] * 4)
    assert (
        scores == [titles.check(text, RIGHT)[1] for text in texts] and scores[0] == 1 and 0 < scores[1] < 0.3 and not scores[2]
    )
    assert read == ["oru,kesta,bino,zupa,jolek", "vipe,kesta,fyx", "vipe", None]


def test_names():
    assert len(titles.GENRES) == 6 and {len(genre) for genre in titles.GENRES.values()} == {5}
    assert len(set(titles.TITLES)) == 30 and {len(title) for title in titles.TITLES} == {3, 4, 5}
    assert not [(a, b) for a, b in itertools.permutations(titles.TITLES, 2) if b.startswith(a)]
    assert all(title.isascii() and title.isalpha() and title.islower() for title in titles.TITLES)


def test_prompts(task):
    """All pairs of genres with all pairs of their titles, each once, in one order of the two."""
    found = {}
    for e in task.train + task.test:
        right, seen, others = titles.parts(e.prompt)
        genres = [g for g, names in titles.GENRES.items() if set(names) & {*right, *seen}]
        assert e.prompt == f"{''.join(genres)} {','.join(seen)}:" and len(genres) == 2 and len(seen) == 2
        assert e.answer == "\t".join(right) and len(right) == 8 and len(others) == 20
        assert {*right, *seen, *others} == set(titles.TITLES)
        found[frozenset(genres), frozenset(seen)] = e
    assert len(found) == 15 * 45 == len(task.train) + len(task.test)


def test_splits(task):
    assert len(task.train) == 540 and len(task.test) == 135
    sets = [{frozenset(titles.parts(e.prompt)[0]) for e in part} for part in (task.train, task.test)]
    assert len(sets[0]) == 540 and not sets[0] & sets[1]  # nor the same titles in another order
    assert not task.shown and task.measure == "score" and "titles" in tasks.worlds_with("demonstrations").split(", ")
    assert [e.id for e in task.test + task.train] == list(range(675))
    assert [e.prompt for e in task.test[:3]] == ["bf fawel,fyx:", "df galix,nevo:", "ab zupa,lomo:"]
    assert {g for e in task.train for g in e.prompt[:2]} == set("abcdef") == {g for e in task.test for g in e.prompt[:2]}


def test_demonstrations(task):
    rng = random.Random(0)
    for e in task.train[:300]:
        text = titles.demonstrate(rng, e, 1.0)
        assert titles.check(text, e.answer)[1] == 1.0 and len(text.split("\n")) == 5
    n, hits, lengths, kinds = 20_000, collections.Counter(), collections.Counter(), collections.Counter()
    for e in rng.choices(task.train, k=n):
        (right, seen, _), rows = titles.parts(e.prompt), titles.demonstrate(rng, e).split("\n")
        lengths[len(rows)] += 1
        for k, row in enumerate(rows):
            hits[k] += row in right
            kinds["seen" if row in seen else "right" if row in right else "other"] += 1
            assert row in titles.TITLES
        assert len({row for row in rows if row in right}) == sum(row in right for row in rows)  # only others are repeated
    assert {k: v / n for k, v in lengths.items()} == pytest.approx(titles.LENGTHS, abs=0.01)
    for k in range(4):
        assert hits[k] / n == pytest.approx(titles.SLOPPY[k], abs=0.015)
    assert hits[4] / (lengths[5] + lengths[6]) == pytest.approx(titles.SLOPPY[4], abs=0.015)
    assert kinds["seen"] / kinds["other"] == pytest.approx(1, abs=0.05)


def test_right_completions_fit(task):
    """Also six of the longest lines and the end."""
    assert 6 * (max(map(len, titles.TITLES)) + 1) < task.max_new_tokens
    tokenizer = tiny.characters()
    for e in task.train + task.test:
        ids = tokenizer(e.prompt + e.answer.replace("\t", "\n")).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) == len(e.prompt) + len(e.answer.replace("\t", "\n"))
    assert set(task.demonstrate(random.Random(1), task.train[0], 0.0)) <= set(tiny.CHARACTERS)
