"""Answers: what a completion, which is hostile input, states as its answer, and whether two answers have the same value."""

import functools
import logging
import re
from fractions import Fraction

LONGEST = 1024  # characters of a stated answer; a longer one is wrong, however it goes on
BRACES = re.compile(r"\\(?:fbox|boxed)\s*\{|\\\\(?!fbox|boxed)|\\[{}]|[{}]")
PHRASE = re.compile(r"(?i)answer\s*(?:is|:|=)[\s:]*((?:(?!answer)[^\n]){1,400}?)(?=[.!?]*\s*(?:\n|$)|[.!?]\s)")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
LAST = re.compile(rf"(?<![\w.)])-?\$?(?:{DIGITS})(?:/\d+)?(?:\s?\\?%)?")
NUMBER = re.compile(rf"(?ai)([+-]?) ?(?:(?:(\d+) )?(\d+)/(0*[1-9]\d*)|((?:{DIGITS})(?:e[+-]?\d\d?)?))")
WRAPPED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{([^{}]*)\}|(?<!\w)\*\*([^*]+)\*\*(?!\w)")
UNIT = re.compile(r"(?i)(.*[\d})]|.*\\pi)(%|°[CF]?|[kcm]m|kg|ml| (?:[a-z]{2}|[mgslh]\b)[a-z ./]*(?:\^?[23])?)")
# Words that change a value ('5 million', '5 or 6'), so that they are no unit.
WORDS = r"hundred|thousand|[mbtr]+illion|dozen|or|and|to|not|plus|minus|times|over|pi|half|squared|cubed"
# Would only burn the deadline: towers of powers, huge exponents and factorials, bracket upon bracket. And '6 5', which
# math-verify takes for 6 + 5, as a mixed number.
REFUSED = re.compile(r"(\^|\*\*)[\s{(+-]*(\d[\d,]{4}|[\d.]+[\s})]*(\^|\*\*))|\d{3}\s*!|!\s*!|([([{]\s*){12}|\d\s\d")


def _boxed(text):
    """Content of the last filled \\boxed{}: None where there is none, '' where the last is never closed. Linear."""
    last, found, opened = -1, None, []
    for token in BRACES.finditer(text):
        if token[0] == "}" and opened:
            box, start = opened.pop()
            if box and start > last and (content := text[start : token.start()].strip()):
                last, found = start, content
        elif token[0] == "{" or len(token[0]) > 2:
            opened.append((token[0] != "{", token.end()))
    return "" if any(box and start > last for box, start in opened) else found


def extract(text):
    """The answer that a completion states, or None: its last box, else what follows its last ####, else its last
    'answer is', else its last number. A box that is never closed, or over LONGEST characters, states nothing."""
    found = _boxed(text)
    if found is None and "####" in text:
        found = text.rpartition("####")[2].strip().partition("\n")[0]
    if found is None:
        tail = text[-4 * LONGEST :]
        found = (PHRASE.findall(tail) or LAST.findall(tail) or [""])[-1]
    return found.strip() if found and len(found) <= LONGEST else None


def has_format(text):
    """Whether the answer is stated in a recognised form: a closed and filled \\boxed{}, or a line '#### x'."""
    return bool(_boxed(text)) or re.search(r"(?m)^[^\S\n]*####[^\S\n]*[^\s#]", text) is not None


def _normal(text):
    """One spelling of what reads the same. Spaces after commas stay: '1, 234' is two numbers, '1,234' is one."""
    text = WRAPPED.sub(lambda m: f" {m[1] or m[2] or ''} ", text.replace("\u2212", "-").replace("{,}", ","))
    text = re.sub(r"\\?[$€£]|(?<!\\)\\[!,;()\[\]]|\\left\b|\\right\b", "", re.sub(r"(?<!\\)\\ |~", " ", text))
    text = re.sub(r"\s*\\?%|\s*\bpercent\b", "%", re.sub(r"\\[dt]frac", r"\\frac", text))
    text = re.sub(r"\^\s*\{?\\circ\}?", "°", re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text))
    return re.sub(r"\s*([^\w\s,\\})])\s*", r"\1", re.sub(r"\s+", " ", text)).strip("* ").rstrip(".,;: ")


def _number(text):
    """The Fraction that a plain number, fraction or mixed number stands for, or None."""
    match = NUMBER.fullmatch(re.sub(r"\\frac\{(\d+)\}\{(\d+)\}$", r" \1/\2", text).strip()[:400])
    if match is None:
        return None
    sign, whole, top, bottom, decimal = match.groups()
    value = Fraction(decimal.replace(",", "")) if decimal else Fraction(int(top), int(bottom)) + int(whole or 0)
    return -value if sign == "-" else value


def _split_unit(text):
    """'3 km' -> ('3', 'km'); without a unit (text, '')."""
    match = UNIT.fullmatch(text)
    if match is None or re.search(rf"(?i)\b(?:{WORDS})\b", match[2]):
        return text, ""
    return match[1].strip(), match[2].strip().lower().rstrip("s")


def _equal(gold, given):
    """Whether two answers have the same value. Currency signs do not count; a unit counts where both sides have one
    ('3 km' is '3', not '3 m'). A lone percent sign may be a unit or a factor: '50%' is '50' and is '0.5'."""
    gold, given = _normal(gold), _normal(given)
    if gold == given:
        return gold != ""
    (gold, unit), (given, other) = _split_unit(gold), _split_unit(given)
    if not gold or not given or (unit and other and unit != other):
        return False
    a, b = _number(gold), _number(given)
    if a is not None and b is not None:
        if a == b or (unit == "%" != other and a / 100 == b) or (other == "%" != unit and b / 100 == a):
            return True
        if ("." in gold) == ("." in given) or 1 in (a.denominator, b.denominator):
            return False  # a fraction against decimals goes on: math-verify takes 0.333333 for 1/3
    if REFUSED.search(given):
        return False
    # Letters would be multiplied as variables, so that 'listen' is 'silent': words are compared as words.
    if any(re.search(r"(?i)(?<![\\a-z{])[a-z]{4}", side) for side in (gold, given)):
        return gold.casefold() == given.casefold()
    parse, verify, config = _math_verify()
    sides = [parse(f"${side}$", config, parsing_timeout=None) for side in (gold, given)]
    return verify(*sides, timeout_seconds=None)


@functools.cache
def _math_verify():
    """Without its own time limits, which need SIGALRM in the main thread; only LaTeX, since its other parser ends in `eval`."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify, [LatexExtractionConfig()]


def maths(text, answer):
    """(what the completion states, 1.0 where its value is the answer's, else 0.0). The gold answer may be a whole
    solution: what follows its last #### counts, else its last box, else all of it. May hang: run it in a Scorer."""
    gold = answer.rpartition("####")[2] if "####" in answer else _boxed(answer) or answer
    extracted = extract(text)
    return extracted, float(extracted is not None and _equal(gold, extracted))


maths.warm_up = _math_verify
