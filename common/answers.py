"""Answers: what a completion, which is hostile input, states as its answer, and whether two answers have the same value."""

import functools
import logging
import re
from fractions import Fraction
from unicodedata import normalize

LONGEST = 1024  # characters of a stated answer; a longer one is wrong, however it goes on
THOUGHT = re.compile(r"(?is)\A(?:.*</think(?:ing)?>)?(?:.*<think(?:ing)?>.*)?")  # an unfinished one leaves nothing
BRACES = re.compile(r"\\(?:fbox|boxed)\s*\{|\\\\(?!fbox|boxed)|\\[{}]|[{}]")
PHRASE = re.compile(r"(?im)answer\**\s*(?:is|:|=)[\s:]*(?:\$\$\s*)?((?:(?!answer)[^\n]){1,400}?)(?=\$*[.!?]*\s*$|[.!?]\s)")
VALUE = re.compile(r"(?i)(?!\d+[.)]\s+[a-z])[^\w\\]*(?:[\d\\]|.*(?:=|answer))")  # what else follows #### may be a heading
DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|[\u2009\u202f\xa0])\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
VULGAR, RAISED = "[¼-¾⅐-⅞]", "[⁰-⁻¹²³]+"
# The last number is read with the formula around it; the dollar sign of a price opens no formula.
LAST = re.compile(
    r"\$\$([^$]{1,400})\$\$|(?<![\\\w$])\$([^\s$](?:[^$\n]{0,400}[^\s$])?)\$(?![\d$])"
    rf"|(?<![\w.)])(?!0\d*:)([-\u2212]?\$?(?:(?:{DIGITS})(?:[eE][+-]?\d+)?(?: ?(?:\\times|[*×x]) ?10(?=\^|{RAISED}))?"
    rf"(?:\^(?:-?\d+|\{{-?\d+\}})|{RAISED})?(?:(?::| : )[1-9]\d*| ?/ ?\d+)?{VULGAR}?(?:\s?\\?%)?|{VULGAR}))"
)
NUMBER = re.compile(
    rf"(?a)([+-]?) ?(?:(?:(\d+) )?(\d+)/(0*[1-9]\d*)|((?:{DIGITS})(?:[eE][+-]?\d{{1,3}})?)"
    r"|\(?(\d[\da-fA-F]*)\)?_\{?([2-9]|[12]\d|3[0-6])\}?)"
)
DECIMAL = re.compile(r"(?a)(\d{1,3}(?:,\d{3})+(?!\d)|\d*)\.(\d+)(?![\d%])")
WRAPPED = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}|\{\\rm\b([^{}]*)\}|(?<!\w)\*\*([^*]+)\*\*(?!\w)")
OPTION = re.compile(r"(?i)(?:(?:option|choice) )?\(?([a-j])(?:\)|[.:](?= )|$)(?= |$) *((?:(?! \(?[a-j][.:)]).)*)")
NAMES = {name + s: group.split("=")[0] for group in (
    "foot=ft feet|hour=h hr|minute=min|second=s sec|inch=in inche|pound=lb|meter=m metre|kilometer=km kilometre|yard=yd"
    "|centimeter=cm centimetre|millimeter=mm millimetre|gram=g|kilogram=kg|liter=l L litre|milliliter=ml|millisecond=ms|year=yr"
    "|ounce=oz|mile per hour=mph|kilometer per hour=kmh kph|degree=° deg|celsius=°C celsiu|fahrenheit=°F"
).split("|") for name in group.split("=")[1].split() for s in ("", "s")}  # fmt: skip
CLOSE = "|".join(name for name in NAMES if name.rstrip("s")[1:])  # those that need no space before them
RATED = r"[a-zA-Z]+(?:\^?\{?-?[1-4]\}?)?"
UNIT = re.compile(rf"(.*[\d}})!]|.*\\pi)(%| ?°[CF]?|(?i:{CLOSE})|(?: +|(?<=[\d ])\{{){RATED}(?:[ ./]+{RATED})*[ }}.]*)")
# Words that change a value ('5 million', '5 tenths', '5 or 6'), or that rather are variables, so that they are no unit.
CHANGES = re.compile(
    r"(?:hundred|thousand|\w+illion)(?:th)?|third|quarter|(?:four|fif|six|seven|eigh|nin|ten|twelf|\w+teen|\w+tie)th|hal(f|ve)"
    r"|dozen|lakh|crore|or|and|to|not|plu|minu|time|over|squared|cubed|factorial|one|two|three|four|five|six|seven|eight|nine"
    r"|ten|[abc]+|[knxyz]+|pq|rt|[a-z]?"
)
# Would only burn the deadline: towers of powers, huge exponents and factorials, bracket upon bracket. And '6 5', which
# math-verify takes for 6 + 5, as a mixed number.
REFUSED = re.compile(r"(\^|\*\*)[\s{(+-]*(\d[\d,]{4}|[\d.]+[\s})]*(\^|\*\*))|\d{3}\s*!|!\s*!|([([{]\s*){12}|\d\s\d")
SPELLINGS = [(re.compile(pattern), spelling) for pattern, spelling in (
    ("\u2212", "-"), (r"×|(?<=\d) ?x ?(?=10\^)", r"\\times "), (r" (\d+)\u2044(\d+) ", r"\\frac{\1}{\2}"), ("\u2044", "/"),
    ("√", r"\\sqrt "), (r"\\sqrt +(\d+)", r"\\sqrt{\1}"), (r"\^(\d*\.\d+)", r"^{\1}"), (WRAPPED, r" \1\2\3 "),
    (r"(?<!\\)\\[ ,;:]|[~\s]", " "), (r"\\?[$€£]|(?<!\\)\\[!()\[\]]|\\left\b|\\right\b", ""), (r"\s*(?:\\?%|\bpercent\b)", "%"),
    (r"\\[dt]frac", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\^\s*\{?\\circ\}?", "°"), (r" +", " "),
    (r"(?<=[\w})\]%°])(?: ?,)? (?:and|or) ", ", "), (r"(?<=\d) ?: ?(?=\d)", ":"),
    (r"(?<![\\a-zA-Z])(?=(?:sqrt|sin|cos|tan|log|ln|pi)(?![a-zA-Z]))", r"\\"), (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r" ?([^\w ,.:\\})]|_) ?", r"\1"), (r"(?a)(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?", lambda m:
        rf"\frac{{{int(m[1] + m[2] + m[3]) - int('0' + m[1] + m[2])}}}{{{'9' * len(m[3]) + '0' * len(m[2])}}}"),
)]  # fmt: skip


def _boxes(text):
    """Contents of the filled \\boxed{} that hold no other one; ended by '' where a later one is never closed. Linear."""
    last, found, opened = -1, [], []
    for token in BRACES.finditer(text):
        if token[0] == "}" and opened:
            box, start = opened.pop()
            if box and start > last and (content := text[start : token.start()].strip()):
                last = start
                found.append(content)
        elif token[0] == "{" or len(token[0]) > 2:
            opened.append((token[0] != "{", token.end()))
    return found + [""] * any(box and start > last for box, start in opened)


def extract(text):
    """The answer that a completion states behind its thinking, or None: its last box, else what its last #### marks, else
    its last 'answer is', else its last number. A box that is never closed, or over LONGEST characters, states nothing."""
    text = THOUGHT.sub("", text)
    lines = [part.strip().partition("\n") for part in re.split("#{4,}", text)[1:]]
    marked = [line for line, *_ in lines if VALUE.match(line)] or [line for line, _, below in lines if not below]
    found = (_boxes(text) or marked or [line for line, *_ in lines[:1]] or [None])[-1]
    if found is None:
        tail = re.sub(r"(?<!\\)\\[\[\]]", "$$", re.sub(r"(?<!\\)\\\(\s*|\s*\\\)", "$", text[-4 * LONGEST :]))
        numbers = (match[match.lastindex] for match in LAST.finditer(tail))
        numbers = [number for number in numbers if re.search(rf"(?<![\w.)])\d|{VULGAR}", number)]
        found = (PHRASE.findall(tail) or numbers or [""])[-1]
    elif len(found) <= LONGEST and (inner := PHRASE.findall(WRAPPED.sub(r" \1\2\3 ", found))):
        found = inner[-1]
    return found.strip() if found and len(found) <= LONGEST else None


def has_format(text):
    """Whether the answer is stated in a recognised form: a closed and filled \\boxed{}, or a line '#### x'."""
    return bool((_boxes(text := THOUGHT.sub("", text)) or [""])[-1] or re.search(r"(?m)^[^\S\n]*####[^\S\n]*[^\s#]", text))


def _normal(text):
    """One spelling of what reads the same. Spaces after commas stay: '1, 234' is two numbers, '1,234' is one."""
    text = re.sub(r"(?<=\d)(?:\{,\}|\\,|[\u2009\u202f\xa0])(?=\d{3}(?!\d))", "", text)
    text = normalize("NFKC", re.sub(f"({VULGAR})", r" \1 ", re.sub(f"({RAISED})", r"^{\1}", text)))
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    return text.strip("* ").rstrip(".,;: ")


def _number(text):
    """The Fraction that a plain number, fraction or mixed number stands for, or None."""
    match = NUMBER.fullmatch(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}$", r" \1/\2", text).strip())
    if match is None or (match[6] and max(int(digit, 16) for digit in match[6]) >= int(match[7])):
        return None
    sign, whole, top, bottom, decimal, digits, base = match.groups()
    value = int(digits, int(base)) if digits else Fraction(decimal.replace(",", "") if decimal else f"{top}/{bottom}")
    return Fraction(-1 if sign == "-" else 1) * (value + int(whole or 0))


def _split_unit(text):
    """'3 km' -> ('3', 'kilometer'); without a unit (text, '')."""
    match = UNIT.fullmatch(text)
    words = re.findall(r"°[CF]?|[a-zA-Z]+|[1-4]|%", match[2].replace("/", " per ")) if match else []
    words = [NAMES.get(w) or NAMES.get(w.lower() * (len(w) > 1)) or w.lower().rstrip("s") for w in words]
    if not words or any(map(CHANGES.fullmatch, words)):
        return text, ""
    unit = re.sub(r"\b(?:(sq|square)|cu|cubic) (\w+)", lambda m: f"{m[2]} {2 if m[1] else 3}", " ".join(words))
    return match[1].strip(), re.sub("degree (?=[cf])", "", unit)


def _rounded(exact, decimal):
    """Whether a decimal of six digits and more is the exact value, rounded or cut off."""
    match = re.fullmatch(r"(?a)[+-]?(?=[0.]*[1-9](?:\.?\d){5})\d*\.(\d{6,})", decimal)
    return match and int(decimal.replace(".", "")) in (round(scaled := exact * 10 ** len(match[1])), int(scaled))


def _literal(text):
    """Whether letters, digits or colons mean themselves. Bare letters are a product where they can hardly be a word or the ends
    of a segment (xy, abc; not AB, no, act), beside an operator or a digit they always are (2ab, ax+b); but four of them are a
    word, letters before a digit a formula (H2O). And: a base that a number cannot have, 1:2:3, the time 3:05."""
    letters = re.sub(r"\\(?:begin|end|operatorname)\*?\{\w+\}|\\[a-zA-Z]+", " ", text)
    words = r"(?![abc]+\b|[b-df-hj-np-tv-z]+\b)\b[a-zA-Z]{2}|" * (not re.search(r"[-+*/^=<>\d]|\\(?:fr|sq|cd|ti)", text))
    return re.search(words + r"[a-zA-Z]{4}|[a-zA-Z]\d|\d[\da-zA-Z)]*_|:[^:]*:|:0\d", letters) is not None


def _equal(gold, given):
    """Whether two answers have the same value. Currency signs do not count; a unit counts where both sides have one
    ('3 km' is '3', not '3 m'). A lone percent sign may be a unit or a factor: '50%' is '50' and is '0.5'."""
    gold, given = _normal(gold), _normal(given)
    if gold == given:
        return gold != ""
    letter, other = OPTION.fullmatch(gold), OPTION.fullmatch(given)
    if letter and other and (letter[1].upper() != other[1].upper() or not (letter[2] and other[2])):
        return letter[1].upper() == other[1].upper()
    gold, given = (option[2] or option[1] if option else side for option, side in ((letter, gold), (other, given)))
    given = given if "=" in gold else re.sub(r"^[^<>!,{}]*=", "", given)
    (gold, unit), (given, other) = _split_unit(gold), _split_unit(given)
    if not gold or not given or len(given) > LONGEST or (unit and other and unit != other):
        return False
    a, b = _number(gold), _number(given)
    if a is not None and b is not None:
        rounded = ("." not in gold and _rounded(a, given)) or ("." not in given and _rounded(b, gold))
        return a == b or rounded or (unit == "%" != other and a / 100 == b) or (other == "%" != unit and b / 100 == a)
    if (a is None and _literal(gold)) or (b is None and (_literal(given) or REFUSED.search(given))):
        gold, given = (sorted(re.split(" ?, *", side.casefold())) for side in (gold, given))
        return gold == given
    parse, verify, config, Expr = _math_verify()
    fraction = lambda m: rf"\frac{{{m[1].replace(',', '')}{m[2]}}}{{1{'0' * len(m[2])}}}"  # noqa: E731
    texts = (DECIMAL.sub(fraction, side) if number is None else str(number) for side, number in ((gold, a), (given, b)))
    left, right = ((parse(f"${text}$", config, parsing_timeout=None) or [""])[0] for text in texts)
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return verify(left, right, numeric_precision=1000, timeout_seconds=None)
    if left == right or (left.is_number and _rounded(left, given)) or (right.is_number and _rounded(right, gold)):
        return True
    # verify() takes tiny numbers for 0, so it decides only where nothing can be proved
    proved = (left - right).equals(0)
    return verify(left, right, timeout_seconds=None) if proved is None else proved


@functools.cache
def _math_verify():
    """Only LaTeX: its other parser ends in `eval`. No units: it drops letters of 2ab. No time limits: they need SIGALRM."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    form = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    return parse, verify, [LatexExtractionConfig(normalization_config=form)], Expr


def maths(text, answer):
    """(what the completion states, 1.0 where its value is the answer's, else 0.0). The gold is what follows the answer's last
    ####, else its last box, else all of it; of several values the last boxes may hold one each. May hang: for a Scorer."""
    gold = answer.rpartition("####")[2] if "####" in answer else (_boxes(answer) or [""])[-1] or answer
    extracted, boxes, plain = extract(text), _boxes(THOUGHT.sub("", text)), _normal(gold)
    right = extracted is not None and _equal(gold, extracted)
    outer = re.sub(r"[(\[{][^()\[\]{}]*[)\]}]", "", plain).count(",")
    if extracted and not right and len(boxes) > (commas := outer or plain.count(",")) > 0:
        joined = plain[0] * (pair := not outer and plain[0] in "([") + ", ".join(boxes[-commas - 1 :]) + plain[-1] * pair
        if right := _equal(gold, joined):
            extracted = joined
    return extracted, float(right)


maths.warm_up = _math_verify
