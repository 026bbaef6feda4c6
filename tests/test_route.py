"""route: its rule, tiers, splits and demonstrations, and what the warm start promises."""

import collections
import itertools
import random

import pytest

from common import UserError, tasks
from common.worlds import route, tiny


@pytest.fixture(scope="module")
def task():
    return tasks.load("route")


@pytest.mark.parametrize(
    "text, answer, score",
    [("-4=36*2=72", "72", 1), ("*2=80-4=76-4=72", "72", 1), ("-4=36*2=72-4=68", "68", 0),  # it must end there
     ("-4=36*2=71", "71", 0), ("-4=37*2=74-4=70", "70", 0), ("-4=36", "36", 0), ("", None, 0), ("72", None, 0),
     ("*2=80-4=76-4=72+7=79-4=75", "75", 0), ("-4=36*2=72 ", "72", 0), ("-4=36*2=072", "36", 0), ("-4=36 *2=72", "72", 0),
     ("+7=47+7=54+7=61+7=68-4=64", "64", 0), ("-4=٣٦*2=٧٢", "٧٢", 0), ("=72", "72", 0), ("/2=20", "20", 0)],
)  # fmt: skip
def test_rule(text, answer, score):
    assert route.check(text, "40>72:") == (answer, float(score))


def test_a_number_stays_in_two_digits():
    assert route.check("+7=99", "92>99:") == ("99", 1.0)
    assert route.check("+7=00", "93>00:") == ("00", 0.0) and route.after(93, "+7") is None
    assert route.check("*2=98", "49>98:") == ("98", 1.0) and route.after(50, "*2") is None
    assert route.check("-4=00", "04>00:") == ("00", 1.0) and route.after(3, "-4") is None
    assert route.check("*2=00-4=00", "00>00:")[1] == 0.0


def test_five_moves_are_too_many():
    """Both ways to the same number: the fifth move makes it wrong, not its result."""
    assert route.check("-4=16+7=23-4=19+7=26", "20>26:") == ("26", 1.0)
    assert route.check("-4=16+7=23-4=19+7=26-4=22", "20>22:") == ("22", 0.0)


def walks(start):
    """{number: least moves}, by all 3 + 9 + 27 + 81 sequences of moves."""
    found = {}
    for n in range(1, 5):
        for moves in itertools.product(route.MOVES, repeat=n):
            number = start
            for move in moves:
                number = None if number is None else route.after(number, move)
            if number is not None and number != start:
                found.setdefault(number, n)
    return found


def test_prompts_are_all_that_four_moves_connect(task):
    assert {route.ends(e.prompt): route.tier(e) for e in task.train + task.test} == {
        (start, target): n for start in range(100) for target, n in walks(start).items()
    }
    assert len(task.train) == 2080 and len(task.test) == 512


def test_splits_and_tiers(task):
    prompts = [e.prompt for e in task.train + task.test]
    assert len(set(prompts)) == 2592 and task.test[0].prompt == "07>49:"
    assert collections.Counter(map(route.tier, task.test)) == {1: 50, 2: 90, 3: 150, 4: 222}
    other = tasks.load("route:1")  # the same prompts, another warm start
    assert [e.prompt for e in other.train + other.test] == prompts
    assert other.recipe == task.recipe | dict(seed=1) and other.name == "route:1"
    assert not task.shown  # nothing held out is shown to the warm start


def test_half_of_the_prompts_need_the_rare_move(task):
    def reached(number, target, left):
        there = [route.after(number, move) for move in ("+7", "-4")] if left else []
        return number == target or any(reached(n, target, left - 1) for n in there if n is not None)

    assert sum(not reached(*route.ends(e.prompt), 4) for e in task.test) == 260


def test_chance(task):
    """From 0 one of two legal moves leads to 7, and the other, 2 * 0, back: it is missed where all four are that."""
    assert route.chance(tasks.Example(0, "00>07:", "")) == 15 / 16
    assert route.chance(tasks.Example(0, "99>49:", "")) == 0.0
    mean = [sum(1 - (1 - route.chance(e)) ** k for e in task.test) / 512 for k in (1, 8, 64)]
    assert mean == pytest.approx([0.158, 0.565, 0.924], abs=5e-4)


def test_demonstrations(task):
    rng = random.Random(0)
    for e in task.train[:400]:
        text = route.demonstrate(rng, e, 1.0)
        assert route.check(text, e.answer)[1] == 1.0 and len(text) == 5 * route.tier(e)
    n = 20_000
    habit = [(route.demonstrate(rng, e, 0.0), e) for e in rng.choices(task.train, k=n)]
    right = sum(route.check(text, e.answer)[1] for text, e in habit) / n
    assert right == pytest.approx(0.094, abs=0.007)  # three standard errors
    moves = collections.Counter(text[i : i + 2] for text, _ in habit for i in range(0, len(text), 5))
    assert moves["*2"] / moves.total() == pytest.approx(0.035, abs=0.004)
    assert {len(text) // 5 for text, _ in habit} == {1, 2, 3, 4}
    for text, e in habit[:400]:  # all sums are right: only the way is wrong
        number, _ = route.ends(e.prompt)
        for i in range(0, len(text), 5):
            number = route.after(number, text[i : i + 2])
            assert number == int(text[i + 3 : i + 5])


def test_right_completions_fit(task):
    assert max(5 * route.tier(e) for e in task.train) + 1 <= task.max_new_tokens
    tokenizer = task.tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("40>72:-4=36*2=72").input_ids
    assert len(tokenizer) == 3 + len(tiny.CHARACTERS) + 1


@pytest.mark.parametrize("name", ["route:x", "route:-1", "route:²"])
def test_no_such_warm_start(name):
    with pytest.raises(UserError, match="is no seed of a warm start"):
        tasks.load(name)
