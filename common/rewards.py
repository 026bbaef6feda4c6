"""Rewards: reading the stated answer out of a completion and comparing it, where completions are hostile input."""

import contextlib
import functools
import json
import logging
import math
import pickle
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from multiprocessing import Pipe, connection, spawn
from pathlib import Path

from common import ROOT

LONGEST = 1024  # characters of a stated answer; a longer one is wrong, however it goes on
START_S = 60.0  # seconds in which a worker must have imported its check
MEMORY = 2 << 30  # bytes of address space that a check may take on top of what the imports took (Linux)

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


def _guarded(check, text, answer, trusted=False):
    """(extracted or None, score in 0..1, of a trusted check any finite one); whatever the check raises: (None, 0.0)."""
    try:
        extracted, score = check(text, answer)
        fine = math.isfinite(score) if trusted else 0 <= score <= 1
        return extracted if extracted is None else str(extracted), float(score) if fine else 0.0
    except Exception:
        return None, 0.0


def _work(handle):
    """The life of a worker. JSON in and out, so that the parent unpickles nothing. It ends when the parent does: at
    the end of the pipe or, inside a check that hangs, by the alarm, whose default action is to kill."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = connection.Connection(handle)
    with contextlib.suppress(EOFError, ConnectionError):
        timeout_s, setup, check = pickle.loads(pipe.recv_bytes())
        spawn.prepare(setup)
        check = pickle.loads(check)
        getattr(check, "warm_up", bool)()
        with contextlib.suppress(ImportError, OSError, ValueError):  # macOS has no /proc: there the deadline must do
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send_bytes(b"ready")
        while True:
            text, answer = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
            result = _guarded(check, text, answer)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send_bytes(json.dumps(result).encode())


class Scorer:
    """Runs `check(text, answer) -> (extracted, score in 0..1)` over batches, in `workers` processes that live on. A check that
    takes over `timeout_s` seconds, or crashes its process, scores 0 and counts in `timeouts`; the process is replaced. A
    function `check.warm_up` runs at a worker's start, off the clock. inline: trusted, fast checks, here, of any score."""

    def __init__(self, check, timeout_s=5.0, workers=2, inline=False):
        self.check, self.timeout_s, self.workers, self.inline = check, timeout_s, workers, inline
        self.timeouts, self.idle = 0, []  # idle: (Popen, pipe) of every worker that waits for work

    def __call__(self, texts, answers):
        """Extracted answers and scores, in order; equal pairs are checked once. RuntimeError where no worker starts."""
        pairs = list(zip(texts, answers, strict=True))
        todo = list(dict.fromkeys(pairs))
        if self.inline:
            results = dict(zip(todo, [_guarded(self.check, *pair, trusted=True) for pair in todo], strict=True))
        else:
            with ThreadPoolExecutor(self.workers) as threads:  # each of them waits for one worker at a time
                results = dict(zip(todo, threads.map(self._in_worker, todo), strict=True))
            self.timeouts += sum(result is None for result in results.values())
        done = [results[pair] or (None, 0.0) for pair in pairs]
        return [extracted for extracted, _ in done], [score for _, score in done]

    def _in_worker(self, pair):
        """(extracted, score), or None where the worker had to be killed or died."""
        try:
            process, pipe = self.idle.pop()
        except IndexError:
            process, pipe = self._start()
        if process.poll() is not None:  # died between two checks, which is not this pair's fault
            pipe.close()
            process, pipe = self._start()
        with contextlib.suppress(EOFError, OSError):
            pipe.send_bytes(json.dumps(pair).encode())
            if pipe.poll(self.timeout_s):
                result = json.loads(pipe.recv_bytes())
                self.idle.append((process, pipe))
                return result
        self._kill(process, pipe)
        return None

    def _start(self):
        """A bare interpreter: a multiprocessing.Process would import the training script, and torch with it, anew."""
        pipe, theirs = Pipe()
        handle = theirs.fileno()
        boot = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from common.rewards import _work; _work({handle})"
        process = subprocess.Popen([sys.executable, "-P", "-c", boot], pass_fds=[handle], stdin=subprocess.DEVNULL)
        theirs.close()
        setup, check = {"sys_path": sys.path}, pickle.dumps(self.check)
        if b"__main__" in check:
            main = sys.modules["__main__"]
            setup |= {"init_main_from_name": main.__spec__.name} if main.__spec__ else {"init_main_from_path": main.__file__}
        with contextlib.suppress(EOFError, OSError):
            pipe.send_bytes(pickle.dumps((self.timeout_s, setup, check)))
            if pipe.poll(START_S) and pipe.recv_bytes() == b"ready":
                return process, pipe
        self._kill(process, pipe)
        raise RuntimeError(f"a worker process for {self.check} did not start within {START_S:.0f} s; see above")

    def _kill(self, process, pipe):
        process.kill()
        pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # nothing survives SIGKILL: this only collects the exit status

    def close(self):
        """Kills the workers. A later call starts new ones."""
        while self.idle:
            self._kill(*self.idle.pop())
