"""Reward checking: what is equal, what is not, and that no completion can hang, crash, fool or run code in a scorer."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import answers, rewards

ROOT = Path(__file__).resolve().parents[1]


def odd(text, answer):
    """A check with every way to fail; the text says which."""
    if text == "sleep":
        time.sleep(1000)
    if text == "spin":
        9**9**9**9
    if text == "exit":
        os._exit(3)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "memory":
        bytearray(rewards.MEMORY + (1 << 30))  # untouched pages: costs nothing where no limit stops it
    if text == "raise":
        raise ValueError(text)
    if text == "recurse":
        odd(text, answer) + odd(text, answer)
    if text in ("nan", "inf", "7"):
        return text, float(text)
    if text == "wrong type":
        return [text], "much"
    if text == "pid":
        return str(os.getpid()), 1.0
    if text == "torch":
        return str("torch" in sys.modules), 1.0
    if text == "count":
        Path(answer).open("a").write("x")
    return text, float(text == answer)


def scaled(factor, text, answer):
    return text, factor * (text == answer)


@pytest.fixture(scope="module")
def scorer():
    scorer = rewards.Scorer(answers.maths, timeout_s=1.5)
    yield scorer
    scorer.close()


def gone(pid, within_s):
    """Whether no process `pid` is left (a zombie that waits for a foreign parent counts as gone) within the time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if ") Z" in Path(f"/proc/{pid}/stat").read_text():
                return True
        except ProcessLookupError:
            return True
        except FileNotFoundError:  # macOS, or gone since the line before
            pass
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- what a completion states


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{8}", "8"),
        (r"use \boxed{} at the end: \boxed{9}", "9"),
        (r"\boxed{6} #### 7", "6"),
        ("1 2\n#### 7\nand 8", "7"),
        ("#### 5 and then #### 6", "6"),
        ("The answer is 72 apples. I checked 3 times.", "72 apples"),
        ("The answer is 3.5", "3.5"),
        ("Answer: 12\n\n", "12"),
        ("The answer is 4, no: the answer is 5!", "5"),
        ("3 + 4 = 7", "7"),
        ("10-5", "5"),
        ("it fell to -5", "-5"),
        ("it costs $1,234.50.", "$1,234.50"),
        ("so 3/4", "3/4"),
        ("about 50%", "50%"),
        (r"\boxed{72", None),
        (r"\boxed{5} or rather \boxed{72", None),
        (r"\boxed{}", None),
        ("#### ", None),
        ("no number", None),
        ("", None),
        (r"\boxed{" + "7" * 5000 + "}", None),
    ],
)
def test_extract(text, stated):
    assert answers.extract(text) == stated


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        (r"\boxed{72}", True),
        ("work\n#### 72", True),
        ("  #### -3\n", True),
        (r"\boxed{72", False),
        (r"\boxed{}", False),
        (r"\boxed{5} \boxed{6", False),
        ("the answer is 72", False),
        ("####", False),
        ("####\n72", False),
        ("##### Step", False),
        ("", False),
    ],
)
def test_has_format(text, formatted):
    assert answers.has_format(text) is formatted


def test_reading_hostile_text_takes_linear_time():
    pieces = ["\\boxed{", "{", "}", "\n", " ", "#### ", "#", "answer is", "answer ", "1", "1,", "\\", "\\\\", "**", "$", "-"]
    start = time.monotonic()
    for piece in pieces:
        text = piece * (400_000 // len(piece))
        answers.extract(text), answers.has_format(text)
    answers.extract("\\boxed{" * 50_000 + "}" * 50_000)
    assert time.monotonic() - start < 15


# ---------------------------------------------------------------- what is equal

EQUAL = [
    ("72", "72"), ("72", "72.0"), ("72", "072"), ("72", "+72"), ("72", "72."), ("#### 72", "72"), (r"\boxed{72}", "72"),
    ("She has <<48+24=72>>72 left.\n#### 72", "72"), ("1234", "1,234"), ("$1,234.50", "1234.5"), ("1,000,000", "1000000"),
    ("1234", "1{,}234"), ("1234", r"1\,234"), ("1234", r"1{,}234\text{ dollars}"), ("18", r"\$18"), ("18", "€18"),
    ("-5", "-5"), ("-5", "\u22125"), ("-5", "$-5$"), ("-5", "- 5"), ("-5", "-$5"), ("0", "-0"),
    (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", "0.5"), ("1/2", r"\dfrac{1}{2}"), ("1/2", r"\frac12"), ("1/2", "2/4"),
    ("1/2", ".5"), ("0.25", r"\frac{1}{4}"), ("-1/2", r"-\frac{1}{2}"), ("-1/2", r"\frac{-1}{2}"), ("1.5", "1 1/2"),
    (r"1\frac{1}{2}", "3/2"), (r"\frac{3}{2}", r"1\tfrac{1}{2}"), ("1/3", "0.333333"), ("1500", "1.5e3"),
    ("50%", "50 %"), ("50%", r"50\%"), ("50%", r"50 \%"), ("50%", "50 percent"), ("50%", "0.5"), ("50%", "1/2"),
    ("0.5", "50%"), ("50", "50%"), ("50%", "50"),
    ("3 km", "3"), ("3", "3 km"), ("3 km", "3km"), ("3 km", r"3\text{ km}"), ("3 km", r"3\ \mathrm{km}"),
    ("3 km", "3.0 KM"), ("72", "72 apples"), ("5 apples", "5 apple"), ("12", "12 square miles"), ("12", r"12 \text{ cm}^2"),
    ("90", r"90^\circ"), (r"90^{\circ}", "90"), ("60", "60 miles per hour"), ("72", "**72**"), ("72", "72**"),
    ("72", "72~apples"), ("72", "**72** dollars"),
    ("72", r"\(72\)"), ("72", r"\text{72}"), ("72", "x = 72"), ("72", "48+24=72"), ("1000", "10^3"), ("120", "5!"),
    ("x^2+1", "1 + x^2"), (r"2\sqrt{2}", r"\sqrt{8}"), (r"10\pi", r"10\pi \text{ cm}"), (r"20\sqrt{3}", r"20\sqrt{3} inches"),
    (r"\{1,2\}", r"\{2, 1\}"), ("[0,1)", "[0, 1)"), ("(1,2)", r"\left(1, 2\right)"), ("2, 3", "3, 2"),
    (r"\text{Monday}", "Monday"), ("Monday", "monday"), (r"\text{(A)}", "A"), (r"\frac{x}{2}", r"\frac{1}{2}x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]  # fmt: skip
UNEQUAL = [
    ("72", "720"), ("7", "72"), ("72", "7"), ("72", "72.5"), ("72", "72.0000001"), ("-5", "5"), ("5", "-5"), ("1/2", "2"),
    ("1/2", "1"), ("1/2", "0.51"), ("1/3", "0.33"), ("1/3", "3/1"), ("1234", "1,23,4"), ("1234", "1, 234"), ("1.5", "11/2"),
    ("11", "6 5"), ("65", "6 5"), ("11", "1 1"), ("5", "1/0"), ("0", "1/0"), ("72", "72 72"),
    ("50%", "5%"), ("50%", "500"), ("50%", "0.05"), ("50", "0.5"), ("3 km", "4 km"), ("3 km", "3 m"), ("3 km", "3%"),
    ("3 km", "km"), ("5", "5 million"), ("5", "5 hundred"), ("5", "5 dozen"), ("5", "5 or 6"), ("5", r"5 \text{ or } 6"),
    ("5", "5 and 6"), ("5", "5, 6"), ("5", "6; 5"), ("5", r"\{5, 6\}"), ("5", "5 to 6"), ("5", r"5 \neq 6"), ("5", "5 < 6"),
    ("5", "5=6"), ("5", "5x"), ("5", "5 pi"), ("5", r"5\pi"), ("5", "5^2"), ("5", "5!"), ("5", "5e1"),
    ("5", "[4, 6]"), ("5", "x"), ("x", "5"), ("x", "y"), ("5", "2=2"), ("23", "2**3**"), ("5", "five or six"),
    ("x^2+1", "x^2-1"), (r"\sqrt{2}", "2"), (r"\pi", "3.14"), ("[0,1)", "[0,1]"), ("(1,2)", "(2,1)"), (r"\{1,2\}", r"\{1,3\}"),
    ("listen", "silent"), ("even", "odd"), ("Monday", "Tuesday"), ("A", "B"), ("72", ""), ("72", " "), ("72", r"\frac{"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), ("#### 5", "6"), ("4\n#### 5", "4"), (r"\boxed{5} or 6", "6"),
]  # fmt: skip


@pytest.mark.parametrize(("pairs", "score"), [(EQUAL, 1.0), (UNEQUAL, 0.0)])
def test_values(scorer, pairs, score):
    texts, before = [rf"Thus \boxed{{{given}}}." for _, given in pairs], scorer.timeouts
    _, scores = scorer(texts, [gold for gold, _ in pairs])
    assert [pair for pair, s in zip(pairs, scores, strict=True) if s != score] == []
    assert scorer.timeouts == before


def test_every_way_to_state_an_answer(scorer):
    texts = [
        r"\boxed{72}",
        "#### 72",
        "the answer is 72.",
        "Final answer: $72",
        "**Final Answer:** 72",
        r"9 \boxed{72} 9",
        "#### 5",
    ]
    texts += ["5\n#### 6", r"\boxed{5} #### 72", "72 and 5", r"\boxed{72", "nothing"]
    extracted, scores = scorer(texts, ["#### 72"] * len(texts))
    assert scores == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert extracted == ["72", "72", "72", "$72", "** 72", "72", "5", "6", "5", "5", None, None]
    assert all(type(score) is float for score in scores)


# Invented for this test, in the form of GSM8K.
ROWS = [
    "Mira bakes 4*6=<<4*6=24>>24 rolls.\nShe keeps 24-5=<<24-5=19>>19 rolls.\n#### 19",
    "Two crates weigh 2*95=<<2*95=190>>190 kg.\n#### 190",
    "The tram runs 190/10=<<190/10=19>>19 times, less 20 makes 19-20=<<19-20=-1>>-1.\n#### -1",
    "One lamp is left: 3-2=<<3-2=1>>1.\n#### 1",
    "The hall seats 41*25=<<41*25=1025>>1025 guests.\n#### 1,025",
    "He saves $10.25*4=$<<10.25*4=41>>41 a month.\n#### 41",
    "Half of 41 is 41/2=<<41/2=20.5>>20.5 litres.\n#### 20.5",
    "The farm sells 205*10*1000=<<205*10*1000=2050000>>2,050,000 seeds.\n#### 2,050,000",
    "A fifth stays: 100/5=<<100/5=20>>20%.\n#### 20",
    "The rope is 2*100=<<2*100=200>>200 cm long.\n#### 200",
]


def test_rows_of_gsm8k_shape(scorer):
    assert scorer(ROWS, ROWS)[1] == [1.0] * len(ROWS)
    for shift in range(1, len(ROWS)):
        assert scorer(ROWS, ROWS[shift:] + ROWS[:shift])[1] == [0.0] * len(ROWS)


def run_module(*arguments):
    command = [sys.executable, "-m", "tests.gsm8k_gold", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_command_on_good_and_bad_files(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": "?", "answer": row}) + "\n" for row in [*ROWS, ROWS[-1]]))
    done = run_module(path)
    assert done.stdout.startswith(
        "11 of 11 gold solutions score 1 against their own answer; 0 of 9 score 1 against the next row's ("
    )
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(json.dumps({"answer": r"\boxed{3} #### 4"}))  # states 3, which is not its own answer
    assert run_module(path).returncode == 1
    for content in ("not json", "[]", '{"answer": 4}', '{"answer": "#### four"}', "", b"\xff\xfe"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert_one_line(run_module(path))
    assert_one_line(run_module(tmp_path / "missing"))
    assert_one_line(run_module())


def assert_one_line(done):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


# ---------------------------------------------------------------- hostile completions

HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "tower of stars": r"\boxed{10**10**10**10}",
    "tower of factors": r"\boxed{(9^{9999}+1)^{9999}\cdot 72}",
    "big exponent": r"\boxed{72^{999999999999}}",
    "factorial": r"\boxed{99999999!}",
    "factorials": r"\boxed{((9!)!)!}",
    "binomial": r"\boxed{\binom{999999999}{499999999}}",
    "sum": r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n}}",
    "integral": r"\boxed{\int_0^1 x^{x^x} \sin(x^{-x}) dx}",
    "open box": r"\boxed{72",
    "open braces": r"\boxed{{{{72}",
    "closing braces": r"}}}}\boxed{}}}",
    "digits": "72" * 500_000,
    "digits in a box": r"\boxed{" + "7" * 1_000_000 + "}",
    "digits after zeros": "7" * 1_000_000 + "0" * 4000,
    "null bytes": "\0\\boxed{7\0002}\0",
    "surrogates": "\ud800\\boxed{\udfff72\ud83d}",
    "brackets": r"\boxed{" + "(" * 10_000 + "}",
    "some brackets": r"\boxed{" + "(x" * 300 + "}",
    "balanced brackets": r"\boxed{" + "(" * 400 + "71" + ")" * 400 + "}",
    "fractions": r"\boxed{" + r"\frac{" * 10_000 + "}" * 10_001,
    "fractions, not in a box": r"\frac{" * 10_000,
    "powers": r"\boxed{" + "2^{" * 200 + "2" + "}" * 201,
    "boxes": r"\boxed{" * 20_000,
    "code": r"\boxed{__import__('os').system('touch FILE')}",
    "code without box": "The answer is __import__('os').system('touch FILE')",
    "code as number": "#### (lambda: open('FILE', 'w'))() or 72",
    "code in text": r"\boxed{\text{__import__('os').system('touch FILE')}}",
    "code with sympy": r"\boxed{sympify(\"open('FILE','w')\")}",
    "pickle": "cos\nsystem\n(S'touch FILE'\ntR.",
    "json": '", 1.0]\n["72", 1.0]',
}


def test_hostile_completions_score_0_and_harm_nobody(scorer):
    file = Path(tempfile.gettempdir()) / "made-by-a-completion"  # no number in its name, which would be the answer stated
    file.unlink(missing_ok=True)
    scorer([r"\boxed{1}"] * 2, ["1", "2"])  # both workers are up
    for name, text in HOSTILE.items():
        start = time.monotonic()
        _, scores = scorer([text.replace("FILE", str(file)), r"\boxed{72}"], ["72", "72"])
        assert scores == [0.0, 1.0], name
        assert time.monotonic() - start < 8, name  # 1.5 s for the check, the rest to start a worker on a busy machine
        assert scorer([r"\boxed{1/2}"], ["0.5"])[1] == [1.0], name
    assert not file.exists()
    assert len(scorer.idle) <= 2


def test_prefilters_spare_the_common_towers(scorer):
    before, names = scorer.timeouts, ["tower", "tower of stars", "big exponent", "factorial", "brackets", "digits"]
    start = time.monotonic()
    assert scorer([HOSTILE[name] for name in names], ["72"] * len(names))[1] == [0.0] * len(names)
    assert scorer.timeouts == before
    assert time.monotonic() - start < 4


# ---------------------------------------------------------------- the scorer


def test_checks_that_hang_or_crash_are_killed_and_counted():
    texts = ["a", "sleep", "b", "spin", "exit", "c", "kill", "raise", "recurse", "nan", "inf", "7", "wrong type", "memory", "d"]
    scorer = rewards.Scorer(odd, timeout_s=0.5)
    pids = {int(pid) for pid in scorer(["pid"], ["1"])[0]}
    start = time.monotonic()
    extracted, scores = scorer(texts, texts)
    assert time.monotonic() - start < 20  # two deadlines and four starts of half a second and up
    assert scorer.timeouts == 4
    good = {"a", "b", "c", "d"} | ({"memory"} if sys.platform != "linux" else set())
    assert scores == [float(text in good) for text in texts]
    odd_scores = {"nan": "nan", "inf": "inf", "7": "7"}  # stated, but no score in 0..1
    assert extracted == [text if text in good else odd_scores.get(text) for text in texts]
    pids |= {worker.pid for worker, _ in scorer.idle}
    scorer.close()
    assert all(gone(pid, 1) for pid in pids)


def test_one_hanging_check_is_killed_in_time():
    scorer = rewards.Scorer(odd, timeout_s=0.5, workers=1)
    pid = int(scorer(["pid"], ["1"])[0][0])
    start = time.monotonic()
    assert scorer(["a", "b", "sleep"], ["a", "c", "d"]) == (["a", "b", None], [1.0, 0.0, 0.0])
    assert 0.5 <= time.monotonic() - start < 2.5
    assert scorer.timeouts == 1
    assert gone(pid, 1)
    assert scorer(["a"], ["a"])[1] == [1.0]
    scorer.close()


def test_order_duplicates_partials_and_lengths(tmp_path):
    scorer = rewards.Scorer(odd)
    texts = [str(i % 7) + "x" for i in range(200)]
    assert scorer(texts, ["3x"] * 200) == (texts, [float(text == "3x") for text in texts])
    scorer(["count"] * 50, [str(tmp_path / "count")] * 50)
    assert (tmp_path / "count").read_text() == "x"
    assert scorer([], []) == ([], [])
    with pytest.raises(ValueError):
        scorer(["a"], [])
    assert scorer(["torch"] * 2, ["1", "2"])[0] == ["False", "False"]
    os.kill(scorer.idle[-1][0].pid, signal.SIGKILL)  # between two calls: replaced, and not counted
    scorer.idle[-1][0].wait()
    assert scorer(["a", "b"], ["a", "b"])[1] == [1.0, 1.0]
    assert scorer.timeouts == 0
    scorer.close()
    scorer = rewards.Scorer(functools.partial(scaled, 0.25), workers=1)
    assert scorer(["a", "b"], ["a", "a"])[1] == [0.25, 0.0]
    scorer.close()


def test_inline():
    scorer = rewards.Scorer(odd, inline=True)
    texts = ["a", "raise", "recurse", "nan", "wrong type", "b"]
    assert scorer(texts, ["a"] * 6) == (["a", None, None, "nan", None, "b"], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert scorer.idle == []
    assert int(scorer(["pid"], [""])[0][0]) == os.getpid()


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "breaks.py").write_text("import os\nif os.getpid() != int(os.environ['PARENT']): raise ImportError('no')\n"
                                        "def check(text, answer): return text, 1.0\n")  # fmt: skip
    monkeypatch.setenv("PARENT", str(os.getpid()))
    monkeypatch.syspath_prepend(tmp_path)
    import breaks

    with pytest.raises(RuntimeError, match="did not start"):
        rewards.Scorer(breaks.check)(["a"], ["a"])


SCRIPT = """
import sys, time
sys.path.insert(0, ROOT)
from common import answers, rewards

def slow(text, answer):
    if text == "spin":
        9**9**9**9
    if text == "sleep":
        time.sleep(1000)
    return text, 1.0

if __name__ == "__main__":
    scorer = rewards.Scorer(slow, timeout_s=2.0, workers=3)
    scorer(["a", "b", "c"], ["d"] * 3)
    print(*[worker.pid for worker, _ in scorer.idle], flush=True)
    scorer(["spin", "sleep"], ["e"] * 2) if sys.argv[1] == "busy" else None
"""


def test_workers_die_with_their_parent(tmp_path):
    """Killed in the middle of checks that hang, and at a normal end without close(); the check lives in the script."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("ROOT", repr(str(ROOT))))
    for mode in ("busy", "idle"):
        with subprocess.Popen([sys.executable, script, mode], stdout=subprocess.PIPE, text=True) as parent:
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert 1 <= len(pids) <= 3
            if mode == "busy":
                time.sleep(0.3)
                parent.kill()
            parent.wait(20)
        assert all(gone(pid, 6) for pid in pids)


def test_importing_does_not_import_torch_or_sympy():
    code = "import sys, common.rewards; print({'torch', 'sympy', 'math_verify'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


# ---------------------------------------------------------------- properties

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
characters = st.characters() | st.sampled_from(list("0123456789\\{}()^$%#.,/-+ \n\0"))
prose = st.lists(characters | st.sampled_from(["\\boxed{", "\\frac{", "####", "answer is", "\ud800"])).map("".join)


@quick
@given(prose)
def test_arbitrary_text_never_raises_and_never_scores_a_value_it_cannot_state(scorer, text):
    extracted, scores = scorer([text, text], ["123456789123456789", "\\text{Wednesday}"])
    assert scores == [0.0, 0.0]
    assert extracted == [answers.extract(text)] * 2
    assert answers.has_format(text) in (True, False)


@quick
@given(st.text(characters, max_size=200), st.integers(-(10**12), 10**12), st.booleans())
def test_a_boxed_integer_scores_1_after_any_prose(scorer, prefix, value, comma):
    written = f"{value:,}" if comma else str(value)
    prefix = prefix.replace("\\", "")  # a backslash could escape the box
    texts = [rf"{prefix}\boxed{{{written}}}"] * 2
    assert scorer(texts, [str(value), str(value + 1)])[1] == [1.0, 0.0]
    assert answers.has_format(texts[0])


def test_a_trusted_check_may_give_any_finite_score():
    """The gold rewards of the built-in games; a worker's scores stay shares of 1."""
    scorer = rewards.Scorer(lambda text, answer: (text, float(answer) * len(text)), inline=True)
    assert scorer(["abcdefgh", "ab", "", "a"], ["2", "-3", "1", "nan"]) == (["abcdefgh", "ab", "", "a"], [16.0, -6.0, 0.0, 0.0])
    assert rewards._guarded(lambda text, answer: (text, 2.0), "a", "b") == ("a", 0.0)
