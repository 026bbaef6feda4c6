"""What a completion states, and what a mathematician calls equal: further tables to those of test_rewards, by kind."""

import time

import pytest

from common import answers, rewards


@pytest.fixture(scope="module")
def scorer():
    scorer = rewards.Scorer(answers.maths, timeout_s=3)
    yield scorer
    scorer.close()


# ---------------------------------------------------------------- what a completion states

STATED = {
    "thinking": [
        (r"<think>Maybe \boxed{5}? no.</think> The answer is 7.", "7"),
        (r"\boxed{5}</think>\boxed{7}", "7"),
        ("<think>a</think> 5 <think>b</think> 8", "8"),
        ("<THINKING>9</THINKING>\n#### 8", "8"),
        ("<think>The answer is 5", None),
        (r"<think>\boxed{5}", None),
        (r"<think>\boxed{5}</think>", None),
        ("so 5</think> \n", None),
        (r"Of 3 pens. <think>\boxed{5}", None),
        (r"<think>a</think>\boxed{6}<think>\boxed{7}", None),
    ],
    "display maths": [
        ("The answer is\n$$\n72\n$$", "72"),
        ("The answer is:\n\n\\[\n\\frac{1}{2}\n\\]", r"\frac{1}{2}"),
        ("The answer is $$72$$.", "72"),
        ("Hence\n$$\nx = \\frac{1}{2}\n$$", r"x = \frac{1}{2}"),
        (r"so \[\frac{1}{2}\]", r"\frac{1}{2}"),
    ],
    "formulas": [
        (r"so $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"so \( \frac{1}{2} \) of it", r"\frac{1}{2}"),
        ("it is $72$", "72"),
        ("72, as $x_1$ says", "72"),
        ("He had $5 and spent $3, which left $2", "$2"),
        ("from $5 to $3", "$3"),
        ("for $5, now 3 for $", "3"),
        ("priced $4,$5", "$5"),
    ],
    "the phrase inside": [
        (r"\boxed{The answer is 7}", "7"),
        (r"\boxed{\text{The answer is } 7}", "7"),
        (r"\boxed{\text{The answer is 7}}", "7"),
        ("#### The answer is 72", "72"),
        ("#### Final answer: 72 apples", "72 apples"),
        ("#### **Answer:** 72", "72"),
        ("**Answer**: 72 of 80", "72 of 80"),
    ],
    "headings": [
        ("#### 72\n\n#### Explanation\nWe add 3 and 4", "72"),
        ("#### 72\n#### Explanation", "72"),
        ("#### Step 1\nadd\n#### 72\n#### Step 2: check\nfine", "72"),
        ("#### 72\n#### 2. Check\nright, 3", "72"),
        ("#### Monday\n\n#### Explanation\nafter 3 days", "Monday"),
        ("#### Monday\nafter 3 days", "Monday"),
        ("#### Solution\nadd\n#### x = 5\nfor sure", "x = 5"),
        ("#### Solution\nadd\n#### Answer: Monday\nfor sure", "Monday"),
        ("#### Explanation\nadd 3\n#### C) 15", "C) 15"),
        ("#### Explanation\nadd 3\n#### Monday", "Monday"),
        ("#### 5\n####", "5"),
    ],
    "numbers without a box": [
        ("it is 5e3", "5e3"),
        ("it is 2E-3.", "2E-3"),
        ("it is 10^3", "10^3"),
        ("it is 10^{-3}.", "10^{-3}"),
        ("a ratio of 3:4", "3:4"),
        ("2+4=06 1+3+0=04:46", "46"),
        ("step 2: 7", "7"),
        ("it fell to \u22125", "\u22125"),
        (r"6.02\times 10^{23}", r"6.02\times 10^{23}"),
        ("6.02 × 10^23 atoms", "6.02 × 10^23"),
        ("6 × 10", "10"),
        ("10³ or so", "10³"),
        ("about ½", "½"),
        ("about 3½", "3½"),
        ("1\u202f234\u202f567 people", "1\u202f234\u202f567"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("text", "stated"), [row for rows in STATED.values() for row in rows])
def test_extract(text, stated):
    assert answers.extract(text) == stated


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        (r"<think>\boxed{5}</think>\boxed{7}", True),
        ("<think>x</think>\n#### 7", True),
        (r"<think>\boxed{5}</think> 7", False),
        (r"<think>\boxed{5}", False),
        ("<think>\n#### 5\n</think>", False),
    ],
)
def test_has_format(text, formatted):
    assert answers.has_format(text) is formatted


def test_reading_hostile_text_takes_linear_time():
    pieces = ["<think>", "</think>", "<", "$", "$$", "$1", r"\(", r"\[", "#### x\n", "\u2009", "\\text{", "answer is $$"]
    pieces += ["½", "√", "²"]
    start = time.monotonic()
    for piece in pieces:
        text = piece * (400_000 // len(piece))
        answers.extract(text), answers.has_format(text)
        answers.maths(r"\boxed{" + text[:1000] + "}", "#### 72")
    assert time.monotonic() - start < 15


# ---------------------------------------------------------------- what is equal

EQUAL = {
    "letters": [
        ("AB", "AB"), ("AB", "ab"), ("xy", "yx"), ("abc", "cba"), ("2ab", "2ba"), ("2 ab", "2ba"), ("x+y", "y+x"),
        ("ax+b", "b+ax"), ("a(b+c)", "ab+ac"), ("PV/RT", r"\frac{VP}{TR}"), ("no", "No"), ("AB, CD", "CD, AB"),
        ("Tom and Ann", "Ann and Tom"), ("H2O", "h2o"),
    ],
    "bases": [
        ("1010_2", "1010_{2}"), ("1010_2", r"\text{1010}_2"), ("1010_2", "(1010)_2"), ("10", "1010_2"), ("1010", "1010_{10}"),
        ("FF_{16}", "ff_{16}"), ("1A_{16}", "26"),
    ],
    "exact": [
        (r"\frac{1}{2^{99}}", "2^{-99}"), ("1e-99", "10^{-99}"), ("2^{2024}", "4^{1012}"), (r"\frac{1}{2^{2024}}", "2^{-2024}"),
        (r"\frac{x}{2^{99}}", "2^{-99}x"), ("1.50", "3/2"), ("x/10", "0.1x"), (r"\frac{5\pi}{2}", r"2.5\pi"),
        ("x/8", r"12.5\%x"),
        (r"\sqrt{x}", "x^.5"), (r"\frac{2469\pi}{2}", r"1,234.5\pi"), (r"\{0.5, 1\}", r"1, \frac12"),
        ("(0.5,1)", r"(\frac12,1.0)"),
        (r"\frac{1+\sqrt5}{4}", r"\cos\frac{\pi}{5}"), (r"\frac{3\pi}{4}", r"\arctan 2+\arctan 3"),
        (r"1+\sqrt{2}", r"\sqrt{3+2\sqrt{2}}"),
        ("(0, 2^{-99})", r"(0, \frac{1}{2^{99}})"), ("1,000,001", "1000001.0"), (r"\infty", r"+\infty"),
    ],
    "rounded": [
        ("1/3", "0.3333333"), ("2/3", "0.666667"), ("2/3", "0.6666666"), ("-1/3", "-0.333333"), ("-1/3", "\u22120.333333"),
        ("100/3", "33.333333"),
        (r"\sqrt{2}", "1.414214"), ("1.414214", r"\sqrt{2}"), ("0.333333", "1/3"), ("1/3", "x = 0.333333"),
    ],
    "exponents and ratios": [
        ("5000", "5e3"), ("5e3", "5000"), ("0.005", "5e-3"), ("6.02e23", r"6.02\times 10^{23}"), ("6.02e23", "6.02 × 10^23"),
        ("6.02e23", "6.02 x 10^{23}"),
        (r"6.02 \times 10^{23}", "602000000000000000000000"), ("1.5e-3", r"1.5\times10^{-3}"), ("3e8", r"3\cdot10^8"),
        ("3:4", "3 : 4"), ("3:4", "6:8"), ("3/4", "3:4"), ("1:2:3", "1 : 2 : 3"), ("3:05", "3:05 pm"),
    ],
    "units": [
        ("5 ft", "5 feet"), ("5 ft", "5ft"), ("5 ft", "5 foot"), ("5 hrs", "5 hours"), ("5 hours", "5 h"), ("5.5", "5.5hrs"),
        ("5 min", "5mins"), ("5 inches", "5 in"), ("5 lbs", "5 pounds"), ("90", r"90 \text{ degrees}"), ("90°", "90 degrees"),
        ("5 km", r"5{\rm km}"), ("5 km", r"5\,{\rm km}"), ("5 cm", "5 {cm}"), ("5 cm", r"5\text{cm}"),
        ("12", r"12\text{ cm}^{2}"),
        ("12 cm^2", r"12 \text{ square centimeters}"), ("12 m³", "12 cubic metres"), ("12 sq ft", "12 ft²"),
        ("60 mph", "60 miles per hour"), ("60 km/h", "60 kilometers per hour"), ("5 m/s", r"5\ \text{m}/\text{s}"),
        ("3", r"3 \, \mathrm{m\,s^{-1}}"), ("20 °C", "20 degrees Celsius"), ("20", r"20^\circ\text{C}"),
        ("72", "Total cost = 72 dollars"),
        ("3 km", "x = 3 kilometers"),
    ],
    "repeating": [
        ("1/3", r"0.\overline{3}"), ("1/3", r"0.\bar{3}"), (r"0.1\overline{6}", r"\frac{1}{6}"), ("1", r"0.\overline{9}"),
        (r"0.\overline{3}", r"0.\overline{33}"), ("7/3", r"2.\overline{3}"), ("1/7", r"0.\overline{142857}"),
        ("-1/3", r"-0.\overline3"),
        (r"0.\overline{3}", "0.333333"),
    ],
    "signs": [
        (r"\sqrt{2}", "√2"), (r"2\sqrt{3}", "2√3"), (r"\sqrt{12}", "√12"), (r"\sqrt{x+1}", "√(x+1)"), (r"\sqrt{2}", "√{2}"),
        (r"\sqrt{2}", "sqrt(2)"), (r"10\pi", "10 pi"), ("1/2", "½"), ("3.5", "3½"), ("x/2", "½x"), ("7/8", "⅞"),
        ("x^2+1", "1+x²"),
        ("x^{12}", "x¹²"), ("0.001", "10⁻³"), ("1000", "10³"), ("-5", "\u22125"), ("5", "５"), ("1/2", "1\u20442"),
        (r"\sin x", "sin x"), (r"\ln 4", "2 ln 2"), (r"\sqrt{2}", "2^0.5"),
    ],
    "thin spaces": [
        ("1234567", "1\u202f234\u202f567"), ("1234567", "1\u2009234\u2009567"), ("1234567", r"1\,234\,567"),
        ("1234.5", "1\u202f234.5"), ("5 cm", "5\u202fcm"),
    ],
    "options": [
        ("15", "C) 15"), ("C", "C) 15"), ("15", "(C) 15"), ("C", "(C) 15"), ("C", "C. 15"), ("15", "C: 15"), ("C", "Option C"),
        ("15", r"\textbf{(C)}\ 15"), ("C", r"\textbf{(C)}\ 15"), ("C", "(c)"), ("C) 15", "C"), ("C) 15", "15"),
        ("C) 15", "(C) 15.0"),
        ("Monday", "B) Monday"), ("A, C", "C and A"),
    ],
    "statements": [
        ("72", "$$72$$"), ("72", "\n$$\n72\n$$\n"), ("72", "The answer is 72"), ("x = 3, y = 4", "y=4, x=3"),
        ("3 and 4", "4 and 3"),
        ("15", r"\sum_{n=1}^{5} n"), ("15", r"\sum_{n=1}^{5} n = 15"), ("x>1", "1<x"),
    ],
}  # fmt: skip
UNEQUAL = {
    "letters": [
        ("AB", "BA"), ("DNA", "AND"), ("no", "on"), ("NO", "ON"), ("cat", "act"), ("was", "saw"), ("ABC", "BAC"),
        ("Tom", "Mot"),
        (r"\text{no}", "on"), (r"\angle ABC", r"\angle BAC"), ("H2O", "2OH"), ("to be", "be to"), ("it", "ti"), ("2", "2ab"),
        ("2", "2 ab"), ("5", "5 xy"), ("5", "5t"), ("5", "5 x"), ("xy", "xz"), ("2ab", "2ac"), ("(AB, CD)", "(CD, AB)"),
        ("AB, CD", "AB, CE"), ("team+1", "meat+1"), ("sin(x)", "nis(x)"), ("x^2", "x2"),
    ],
    "bases": [
        ("1010_2", "1010_3"), ("1010_2", "1010"), ("1010", "1010_2"), ("1012_2", "1012_3"), ("1012_2", "1012"),
        ("17_8", "17_9"),
        ("FF_{16}", "FF_{17}"), ("5", "5_2"),
    ],
    "exact": [
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), ("1e-99", "1e-98"), ("10^{-99}", "0"), ("0", "10^{-99}"),
        ("10^{99}", "10^{99}+1"),
        ("1e99", "1.0000001e99"), ("2^{2024}", "2^{2024}+1"), ("2^{-2024}", "2^{-2023}"), (r"\sqrt{2}", r"\sqrt{2}+10^{-99}"),
        (r"\sqrt{2}", r"\sqrt{2}+10^{-999}"), (r"10^{-30}\pi", r"10^{-31}\pi"), ("2^{-99}x", "2^{-98}x"),
        ("0.0000001", "0.0000002"),
        (r"(1, \frac{1}{2^{99}})", r"(1, \frac{1}{2^{98}})"), (r"\{1, 2^{-99}\}", r"\{1, 2^{-98}\}"), ("7" * 400, "7" * 500),
    ],
    "rounded": [
        ("1/3", "0.33333"), ("1/3", "0.333334"), ("2/3", "0.666665"), ("-1/3", "0.333333"), (r"\sqrt2", "1.41421"),
        ("1/3000000000", "0.0000000004"), ("1/999999", "0.000001"), ("0.000001", "0"), ("72", "72.00000001"),
        ("1/2", "0.500000001"),
        ("0.3333333", "0.333333"),
    ],
    "exponents and ratios": [
        ("5000", "5e4"), ("15", "5e3"), ("15e", "5e3"), (r"6.02\times10^{23}", r"6.02\times10^{22}"), ("3:4", "4:3"),
        ("1:2:3", "1:3:2"),
        ("3:5", "3:05"), ("45", "3:45"),
    ],
    "no units": [
        ("5", "5 tenths"), ("5", "5 hundredths"), ("5", "5 thousandths"), ("5", "5 millionths"), ("5", "5 halves"),
        ("5", "5 quarters"), ("5", "5 thirds"), ("5", "5 twelfths"), ("5", "5 twentieths"), ("5", "5 hundreds"),
        ("5", "5 billion"),
        ("5", "5 squared"), ("5", "5 M"), ("5", "5 six"), ("5", "5 lakh"), ("5", "5 dozens"), ("5", "5 point five"),
        ("5", "5 times"),
    ],
    "units": [
        ("5 ft", "5 in"), ("5 ft", "6 feet"), ("5 hrs", "5 min"), ("5 cm^2", "5 cm"), ("5 m^2", "5 m^3"), ("60 mph", "60 km/h"),
        ("5 miles per hour", "5 hours per mile"), ("20 °C", "20 °F"), ("5 ft", "5 feet and 6 inches"), ("5", "5 ft 6 in"),
    ],
    "repeating": [
        ("1/3", r"0.\overline{4}"), ("0.3", r"0.\overline{3}"), ("1/6", r"0.\overline{16}"), ("3", r"\overline{3}"),
        ("0", r"0.\overline{" + "3" * 900 + "}"),
    ],
    "signs": [
        ("2", "√2"), (r"\sqrt{12}", "√1 2"), ("2", "½"), ("12", "½"), ("31/2", "3½"), ("2", "x²"), ("12", "1²"), ("102", "10²"),
        ("2", "½x"),
    ],
    "thin spaces": [("12", r"1\,2"), ("12", "1\u20092"), ("12345", r"1\,23\,45"), ("1234", "12\u202f34")],
    "options": [
        ("15", "C) 16"), ("C", "D) 15"), ("C) 15", "D) 15"), ("C) 15", "C) 16"), ("C", "15"), ("15", "C"), ("B", "A:B"),
        ("b", "(a)b"),
        ("C", "CD"), ("A", "A) 1, B) 2"), ("A", "A) 1 B) 2"), ("1", "A) 1, B) 2"), ("A", "A or B"), ("5", "5 C) 6"),
    ],
    "statements": [
        ("5", r"x \neq 5"), ("5", "x > 5"), ("5", "x = 5, 6"), ("6", "x = 5, y = 6"), ("x=3, y=4", "x=4, y=3"),
        ("(3, 4)", "(4, 3)"), ("3, 4", "3"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kinds", "score"), [(EQUAL, 1.0), (UNEQUAL, 0.0)])
def test_values(scorer, kinds, score):
    pairs, before = [pair for rows in kinds.values() for pair in rows], scorer.timeouts
    _, scores = scorer([rf"Thus \boxed{{{given}}}." for _, given in pairs], [gold for gold, _ in pairs])
    assert [pair for pair, s in zip(pairs, scores, strict=True) if s != score] == []
    assert scorer.timeouts == before


@pytest.mark.parametrize(
    ("text", "gold", "stated", "score"),
    [
        (r"x = \boxed{3} and y = \boxed{4}", "3, 4", "3, 4", 1),
        (r"x = \boxed{3} and y = \boxed{4}", "(3, 4)", "(3, 4)", 1),
        (r"x = \boxed{3} and y = \boxed{4}", "(4, 3)", "4", 0),
        (r"x = \boxed{3} and y = \boxed{4}", "x=3, y=4", "3, 4", 1),
        (r"\boxed{4}, \boxed{3}", r"\{3, 4\}", "4, 3", 1),
        (r"\boxed{\frac12} or \boxed{2}", r"\frac{1}{2}, 2", r"\frac12, 2", 1),
        (r"\boxed{(1,2)} and \boxed{(3,4)}", "(1,2), (3,4)", "(1,2), (3,4)", 1),
        (r"\boxed{5}? No, \boxed{3} and \boxed{4}", "3 and 4", "3, 4", 1),
        (r"\boxed{3} and \boxed{4}", "3 or 4", "3, 4", 1),
        (r"\boxed{3}, \boxed{4}, so \boxed{3, 4}", "3, 4", "3, 4", 1),
        (r"\boxed{3}, \boxed{4}, so \boxed{3, 5}", "3, 4", "3, 5", 0),
        (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4}", "1, 2", "4", 0),
        (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4}", "2", "4", 0),
        (r"\boxed{3}, no, \boxed{4}", "4", "4", 1),
        (r"\boxed{3}, no, \boxed{4}", "3", "4", 0),
        (r"\boxed{3} \boxed{4", "3, 4", None, 0),
        (r"<think>\boxed{3}</think>\boxed{4}", "3, 4", "4", 0),
        (r"\boxed{1} and \boxed{234}", "1,234", "234", 0),
        (r"\boxed{3}", "3, 4", "3", 0),
        (r"\boxed{3}", "", "3", 0),
        (r"\boxed{1012_2}", "12", "1012_2", 0),
    ],
)
def test_several_boxes_are_one_answer_of_several_values(scorer, text, gold, stated, score):
    assert scorer([text], [gold]) == ([stated], [score])


HOSTILE = {
    "tower of raised digits": "9⁹^{9⁹}",
    "huge raised exponent": "72" + "⁹" * 900,
    "huge exponent of ten": "1e999999999",
    "huge power of ten": r"1 \times 10^{999999999}",
    "long repetend": r"0.\overline{" + "9" * 990 + "}",
    "roots": "√" * 1000,
    "vulgar fractions": "½" * 1000,
    "a ligature of eighteen letters": "\ufdfa" * 1000,
    "texts": r"\text{" * 150 + "}" * 100,
    "bases": "1" * 1000 + "_{36}",
    "units": "72 " + "m/" * 400 + "1",
    "options": "C) " * 300,
    "equations": "x=" * 500,
}


def test_new_notations_do_not_burn_the_deadline(scorer):
    before = scorer.timeouts
    for name, text in HOSTILE.items():
        start = time.monotonic()
        assert scorer([rf"\boxed{{{text}}}"], ["72"])[1] == [0.0], name
        assert time.monotonic() - start < 2, name
    assert scorer.timeouts == before
