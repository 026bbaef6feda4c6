"""Tasks: stable and disjoint splits, checkers that cannot be fooled, demonstrations, orders, files, templates."""

import builtins
import json
import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algos import grpo
from common import UserError, answers, rewards, tasks
from common import settings as house
from common.worlds import addition as sums
from common.worlds import countdown as problems
from common.worlds import tiny
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def addition():
    return tasks.load("addition")


@pytest.fixture(scope="module")
def countdown():
    return tasks.load("countdown")


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("name", ["addition", "countdown"])
def test_splits_are_disjoint(name, request):
    task = request.getfixturevalue(name)
    train, test = {e.prompt for e in task.train}, {e.prompt for e in task.test}
    assert 300 <= len(test) == len(task.test) <= 512 and len(train) == len(task.train) > 4000 and not train & test
    ids = [e.id for e in task.train + task.test]
    assert sorted(ids) == list(range(len(ids)))
    assert task.inline


def test_addition_is_all_pairs(addition):
    assert len(addition.train) == 8100 - 512 and addition.name == "addition:2"
    pairs = {tuple(map(int, e.prompt.rstrip("=").split("+"))) for e in addition.train + addition.test}
    assert pairs == {(a, b) for a in range(10, 100) for b in range(10, 100)}
    assert all(sum(map(int, e.prompt.rstrip("=").split("+"))) == int(e.answer) for e in addition.train + addition.test)


def test_splits_are_stable(addition, countdown):
    """The same in another process, whatever the hash seed: held-out prompts must stay held out over resumes and versions.
    If these change, every stored curve and the tiny model's warm start (its folder's key) change with them."""
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1]); from common import tasks\n"
        "for t in (tasks.load('addition'), tasks.load('addition:3')):\n"
        "    print(hashlib.sha256(repr([(e.id, e.prompt, e.answer) for e in t.train + t.test]).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s}
        ).stdout
        for s in ("1", "2")
    }
    assert len(seen) == 1
    assert [e.prompt for e in addition.test[:3]] == [e.prompt for e in tasks.load("addition").test[:3]] == FIRST
    again = tasks.load("countdown")
    assert [(e.id, e.prompt) for e in again.test] == [(e.id, e.prompt) for e in countdown.test]


FIRST = ["25+60=", "31+51=", "53+98="]


@pytest.mark.parametrize("digits, train, test", [(1, 41, 40), (2, 7588, 512), (3, None, 512), (5, None, 512)])
def test_digits(digits, train, test):
    task = tasks.load(f"addition:{digits}")
    assert len(task.test) == test and (len(task.train) == train if train else 7000 < len(task.train) < 7681)
    low, high = 10 ** (digits - 1), 10**digits - 1
    numbers = [int(x) for e in task.train for x in e.prompt.rstrip("=").split("+")]
    assert low <= min(numbers) and max(numbers) <= high
    rng = random.Random(0)
    assert all(sums.check_addition(sums.demonstrate_addition(rng, e, 1.0), e.answer)[1] == 1.0 for e in task.train[:200])


def test_countdown_can_be_solved(countdown):
    for e in countdown.train[:300] + countdown.test[:100]:
        numbers, target = e.answer.split("=")
        assert e.prompt == e.answer + "?" and 0 <= int(target) < 100 and len(numbers.split()) == 3
        assert any(value == int(target) for _, value in problems._expressions([int(n) for n in numbers.split()]))


def test_countdown_holds_out_problems_and_not_only_their_order(countdown):
    """'3 5 8=16' and '8 3 5=16' are one problem with one solution."""

    def problem(e):
        numbers, target = e.answer.split("=")
        return tuple(sorted(numbers.split())), target

    assert not {problem(e) for e in countdown.train} & {problem(e) for e in countdown.test}


@pytest.mark.parametrize("name", ["addition", "addition:3", "countdown"])
def test_careful_demonstrations_fit_the_preset(name):
    """A completion that is cut counts as wrong: the way that is right must fit into what the tiny preset samples."""
    task, rng = tasks.load(name), random.Random(0)
    lengths = [len(task.demonstrate(rng, e, 1.0)) + 1 for e in task.train[:500]]
    args, _ = house.resolve(grpo.Args(task=name))
    limit = args.max_new_tokens
    assert max(lengths) <= limit, f"{sum(n > limit for n in lengths)} of {len(lengths)} right ways are over {limit} tokens"


# ---------------------------------------------------------------- demonstrations


@pytest.mark.parametrize("name", ["addition", "countdown"])
def test_careful_demonstrations_are_right(name, request):
    task, rng = request.getfixturevalue(name), random.Random(1)
    for e in task.train[:400] + task.test[:50]:
        text = task.demonstrate(rng, e, 1.0)
        extracted, score = task.check(text, e.answer)
        assert score == 1.0 and text.endswith(":" + extracted), text


def test_share_of_right_demonstrations(addition):
    """30% careful and right, 70% guesses of which a tenth is right: 0.37, within five standard deviations. The two are told
    apart by their first character."""
    rng, n = random.Random(2), 4000
    done = [(sums.demonstrate_addition(rng, e), e.answer) for e in addition.train[:n]]
    guesses = [(t, a) for t, a in done if t.startswith(":")]

    def within(hits, n, p):
        return abs(hits - n * p) < 5 * math.sqrt(n * p * (1 - p))

    assert within(len(guesses), n, 0.7)
    assert within(sum(sums.check_addition(t, a)[1] for t, a in guesses), len(guesses), 0.1)
    assert all(sums.check_addition(t, a)[1] == 1.0 for t, a in done if not t.startswith(":"))
    assert all(int(t[1:]) >= 0 for t, _ in guesses)


def test_share_of_right_countdowns(countdown):
    rng, n = random.Random(3), 1500
    right = careful = 0
    for e in countdown.train[:n]:
        text = problems.demonstrate_countdown(rng, e, 0.3)
        careful += not text.startswith(":")
        right += problems.check_countdown(text, e.answer)[1]
    assert abs(careful - 0.3 * n) < 5 * math.sqrt(n * 0.21) and careful < right < 0.6 * n


def test_demonstrations_by_hand(addition):
    e = tasks.Example(0, "57+68=", "125")
    assert sums.demonstrate_addition(random.Random(0), e, 1.0) == "7+8=15 5+6+1=12:125"
    e = tasks.Example(0, "907+95=".replace("95", "095"), "1002")
    assert sums.demonstrate_addition(random.Random(0), e, 1.0) == "7+5=12 0+9+1=10 9+0+1=10:1002"
    tokenizer = tiny.characters()
    ids = tokenizer("7+8=15 5+6+1=12:125").input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == "7+8=15 5+6+1=12:125"


# ---------------------------------------------------------------- checkers


@pytest.mark.parametrize(
    "text, extracted, score",
    [
        ("4+2=06 1+3+0=04:46", "46", 1),
        (":46", "46", 1),
        (":46\n", "46", 1),
        (": 46 ", "46", 1),
        (":45:46", "46", 1),
        (":46:45", "45", 0),
        ("46", None, 0),
        ("", None, 0),
        (":", "", 0),
        (":046", "046", 0),
        (":+46", "+46", 0),
        (":46.0", "46.0", 0),
        (":46 46", "46 46", 0),
        (":４６", "４６", 0),
        (":46\x00", "46\x00", 0),
        (":" * 100_000, "", 0),
        (":" + "4" * 100_000, "4" * 100_000, 0),
    ],
)
def test_check_addition(text, extracted, score):
    assert sums.check_addition(text, "46") == (extracted, float(score))


@pytest.mark.parametrize(
    "text, score",
    [
        ("3*8-8=16:3*8-8", 1),
        (":3*8-8", 1),
        (": 8 * 3 - 8 ", 1),
        (":(3*8)-8", 1),
        (":8*(3-1)", 0),  # a number that was not given
        (":8+8", 0),  # not all numbers
        (":3*8-8+0", 0),
        (":3*8-8-8", 0),  # one used too often
        (":16", 0),
        (":8+8*3-16+3*0", 0),
        (":3*8-8=16", 0),
        ("3*8-8", 0),
        (":38-8", 0),
        (":3**8-8", 0),
        (":8-8//3", 0),
        (":-8+3*8", 0),  # unary minus is none of the operators
        (":+3*8-8", 0),
        (":3.0*8-8", 0),
        (":True*8+8", 0),
        (":'3'*8", 0),
        (":[3*8-8][0]", 0),
        (":(lambda: 3*8-8)()", 0),
        (":__import__('os').system('touch /tmp/pwned')", 0),
        (":print(3*8-8)", 0),
        (":(x:=3)*8-8", 0),
        (":3*8-8 if 1 else 0", 0),
        (":3*8-8;3", 0),
        (":3*8-8#", 1),
        (":3*8\x00-8", 0),
        (":９*８-８", 0),
        (":" + "(" * 5000 + "3*8-8" + ")" * 5000, 0),
        (":" + "-" * 5000 + "3", 0),
        (":999*999*999*999*999*999*999*999*999*999*999*999", 0),
        (":9**9**9**9", 0),
        (":" + "1" * 60, 0),
        (":" + "+".join("8" * 100_000), 0),
        ("", 0),
        (":", 0),
    ],
)
def test_check_countdown(text, score, recwarn):
    assert problems.check_countdown(text, "3 8 8=16")[1] == float(score)
    assert not recwarn.list  # nothing that the parser says about hostile text reaches the terminal


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80) | st.text("0123456789+-*/()=:. \n'\"\\x[]", max_size=80))
def test_checkers_never_raise(text):
    for check, answer in ((sums.check_addition, "46"), (problems.check_countdown, "3 8 8=16")):
        extracted, score = check(text, answer)
        assert score in (0.0, 1.0) and (extracted is None or extracted in text)


def bracket(parts):
    return f"({''.join(parts)})"


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.integers(0, 999).map(str), lambda e: st.tuples(e, st.sampled_from("+-*"), e).map(bracket)))
def test_evaluate_agrees_with_python(expression):
    """On the grammar that is allowed; here `eval` may judge, for the text is ours."""
    result = problems.evaluate(expression)
    if len(expression) > 64:
        assert result is None
    else:
        import re

        assert result == (eval(expression), [int(n) for n in re.findall(r"\d+", expression)])


def test_evaluate_never_evals(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("eval, exec or compile to code was called")

    real = builtins.compile

    def only_parse(source, filename, mode, flags=0, *args, **kwargs):
        import ast

        assert flags & ast.PyCF_ONLY_AST, "compiled to code"
        return real(source, filename, mode, flags, *args, **kwargs)

    monkeypatch.setattr(builtins, "eval", never)
    monkeypatch.setattr(builtins, "exec", never)
    monkeypatch.setattr(builtins, "compile", only_parse)
    assert problems.evaluate("3*8-8") == (16, [3, 8, 8])
    assert problems.evaluate("open('x','w')") is None
    assert problems.evaluate("1000") is None and problems.evaluate("999") == (999, [999])


# ---------------------------------------------------------------- order


def some(n):
    return tasks.Task("t", [tasks.Example(i, str(i), str(i)) for i in range(n)], [], answers.maths)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 200), st.integers(1, 90))
def test_order(size, seed, cursor, n):
    """Every epoch is a permutation; what is at a position depends on nothing but (seed, position)."""
    task = some(size)
    long = [e.id for e in task.order(0, cursor + n, seed)]
    assert [e.id for e in task.order(cursor, n, seed)] == long[cursor:]
    assert [e.id for i in range(n) for e in task.order(cursor + i, 1, seed)] == long[cursor:]
    whole = [e.id for e in task.order(0, 4 * size, seed)]
    for epoch in range(4):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_orders_differ():
    task = some(50)
    orders = [tuple(e.id for e in task.order(epoch * 50, 50, seed)) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert task.order(0, 0, 1) == []


# ---------------------------------------------------------------- files


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("fields", [("prompt", "answer"), ("question", "answer"), ("problem", "solution")])
def test_jsonl(tmp_path, fields):
    rows = [{fields[0]: f"p{i}", fields[1]: str(i), "other": [1]} for i in range(20)]
    task = tasks.load(write(tmp_path / "data.jsonl", rows))
    assert len(task.test) == 4 and len(task.train) == 16
    assert sorted(e.prompt for e in task.train + task.test) == sorted(f"p{i}" for i in range(20))
    assert all(e.prompt == f"p{e.answer}" for e in task.train + task.test)
    assert [e.id for e in task.train + task.test] == list(range(20))
    again = tasks.load(str(tmp_path / "data.jsonl"))
    assert [e.prompt for e in again.test] == [e.prompt for e in task.test]
    assert not task.inline and task.demonstrate is None and task.check is answers.maths


def test_jsonl_with_a_test_file(tmp_path):
    train = write(tmp_path / "train.jsonl", [dict(prompt=f"p{i}", answer=i) for i in range(3)])
    (tmp_path / "train.jsonl").write_text((tmp_path / "train.jsonl").read_text() + "\n \n")  # blank lines are no rows
    write(tmp_path / "test.jsonl", [dict(question=f"q{i}", answer=str(i)) for i in range(2)])
    task = tasks.load(train)
    assert [(e.id, e.prompt, e.answer) for e in task.train] == [(0, "p0", "0"), (1, "p1", "1"), (2, "p2", "2")]
    assert [(e.id, e.prompt, e.answer) for e in task.test] == [(3, "q0", "0"), (4, "q1", "1")]
    write(tmp_path / "test.jsonl", [dict(question=f"q{i}", answer=str(i)) for i in range(600)])
    assert len(tasks.load(train).test) == 512


def test_jsonl_errors_name_the_line(tmp_path):
    good = json.dumps(dict(prompt="p", answer="a"))
    missing = r"needs the fields prompt and answer .*\['prompt'\]"
    for bad, part in (("{", "not JSON"), ('{"prompt": 1}', missing), ("3", "an object")):
        (tmp_path / "x.jsonl").write_text(f"{good}\n\n{bad}\n{good}\n")
        with pytest.raises(UserError, match=rf"x\.jsonl:3: .*{part}"):
            tasks.load(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"prompt": null, "answer": "a"}\n' * 9)
    with pytest.raises(UserError, match=r"x\.jsonl:1: "):
        tasks.load(str(tmp_path / "x.jsonl"))


GSM = [
    ("A crate holds 12 pears and 3 of them are bad. How many are good?", "12 - 3 = <<12-3=9>>9 pears.\n#### 9", "9", "8"),
    ("A van costs $1,250. Two cost?", "2 * 1250 = <<2*1250=2500>>2500 dollars.\n#### 2,500", "$2500.00", "2,50"),
    ("Half of 7?", "7 / 2 = 3.5\n#### 3.5", "7/2", "3"),
    ("It was 4 degrees and fell by 9. Now?", "4 - 9 = -5\n#### -5", "-5", "5"),
    ("How many cents are 2 dollars?", "2 * 100 = 200\n#### 200", "\\text{200 cents}", "2"),
]


def test_rows_shaped_like_gsm8k(tmp_path):
    rows = [dict(question=q, answer=a) for q, a, _, _ in GSM]
    task = tasks.load(write(tmp_path / "rows.jsonl", rows))
    assert len(task.train) == 4 and len(task.test) == 1
    by_question = {q: (right, wrong) for q, _, right, wrong in GSM}
    for e in task.train + task.test:
        right, wrong = by_question[e.prompt]
        for form in ("So it is \\boxed{{{}}}.", "Thinking.\n#### {}", "The answer is {}."):
            if "text" not in right:
                assert task.check(form.format(right), e.answer)[1] == 1.0, (form, right)
            assert task.check(form.format(wrong), e.answer)[1] == 0.0, (form, wrong)
        assert task.check(f"\\boxed{{{right}}}", e.answer)[1] == 1.0
        assert task.check(e.answer, e.answer)[1] == 1.0
        assert task.check("", e.answer) == (None, 0.0)


# ---------------------------------------------------------------- templates


def test_prompt_template(addition):
    tokenizer = tiny.characters()
    task = tasks.load("addition", tokenizer)
    e = task.train[0]
    assert e.prompt == addition.train[0].prompt and tokenizer.decode(e.ids) == e.prompt and len(e.ids) == 6
    task = tasks.load("addition", tokenizer, "Sum {prompt} so ")
    e = task.test[0]
    assert tokenizer.decode(e.ids) == f"Sum {FIRST[0]} so " and e.prompt == FIRST[0]
    assert all(e.ids for e in task.train + task.test)


def test_default_template_asks_for_a_box(tmp_path):
    path = write(tmp_path / "x.jsonl", [dict(prompt=f"{i} {{x}} %s?", answer=str(i)) for i in range(9)])
    tokenizer = tiny.characters(tiny.CHARACTERS + "\\{}%")
    task = tasks.load(path, tokenizer)
    e = task.train[0]
    asked = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert tokenizer.decode(e.ids) == e.prompt + asked and e.prompt == f"{e.answer} {{x}} %s?"
    assert tasks.CHAT_TEMPLATE.format(prompt="P") == f"P{asked}" and len(e.ids) == len(e.prompt + asked)


@pytest.mark.parametrize(
    "template", ["no field", "{prompt} {x}", "{prompt} {0}", "{prompt", "{{prompt}}", "{prompt.x}", "{prompt[0]}"]
)
def test_bad_templates(template):
    with pytest.raises(UserError, match=r"--prompt-template needs the field \{prompt\} and no other"):
        tasks.load("addition:1", tiny.characters(), template)


def test_chat_template():
    """Applied after the prompt's template, with the turn of the assistant opened, and no special tokens added twice."""
    tokenizer = tiny.characters()
    tokenizer.chat_template = (
        "{{ eos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    task = tasks.load("addition:1", tokenizer, "what is {prompt}?")
    e = task.train[0]
    assert e.ids[0] == tokenizer.eos_token_id and e.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(e.ids[1:]) == f"user: what is {e.prompt}?\nassistant: "
    plain = tasks.load("addition:1", tokenizer)
    assert tokenizer.decode(plain.train[0].ids[1:]) == f"user: {e.prompt}\nassistant: "


# ---------------------------------------------------------------- reasoning-gym


def test_reasoning_gym(gym_of):
    import reasoning_gym as gym

    task = gym_of(train=30, test=10).task("chain_sum")
    assert len(task.train) == 30 and len(task.test) == 10 and task.name == "reasoning_gym:chain_sum"
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
    entry = gym.create_dataset("chain_sum", size=40, seed=0)[0]
    assert entry["question"] == task.test[0].prompt and task.test[0].answer == f"0: {entry['answer']}"
    scorer = rewards.Scorer(task.check, timeout_s=30, workers=1)
    right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
    both = f"\\boxed{{{right}}} no, \\boxed{{{wrong}}}"
    texts = [f"So \\boxed{{{right}}}", f"So \\boxed{{{wrong}}}", both, "nothing", "", right]
    extracted, scores = scorer(texts, [task.test[0].answer] * len(texts))
    scorer.close()
    assert scores == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert extracted == [right, wrong, wrong, None, None, right] and scorer.timeouts == 0
    with pytest.raises(UserError, match="unknown reasoning_gym task 'chain_sums'; nearest: chain_sum"):
        tasks.load("reasoning_gym:chain_sums")


def test_reasoning_gym_is_imported_off_the_clock(gym_of):
    """The library's import takes a second or more on a loaded machine; the deadline of a check must not pay for it."""
    task = gym_of(train=4, test=2).task("chain_sum")
    scorer = rewards.Scorer(task.check, timeout_s=0.25, workers=1)
    right = task.test[0].answer.partition(": ")[2]
    assert scorer([f"\\boxed{{{right}}}"], [task.test[0].answer])[1] == [1.0] and scorer.timeouts == 0
    scorer.close()
