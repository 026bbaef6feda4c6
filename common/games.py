"""Built-in preference tasks, small enough for a tiny model and with a known truth: letters, letters4, chain, record."""

import functools
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from common import tasks

LETTERS, STATES = "abcdefghijkl", "uvwxyz"


@dataclass
class Game:
    """prompts (held out last) -> `demonstrate(rng, prompt, careful)` makes responses for the warm start, `reward(prompt, text)`
    is the gold reward, `worth(prompt, text)` that of every character, `pair(rng, prompt)` -> (chosen, rejected) or None.
    `variants(prompt)` are the prompts that the warm start sees for one of the data's."""

    prompts: list
    demonstrate: Callable
    reward: Callable
    worth: Callable
    pair: Callable
    variants: Callable = lambda prompt: [prompt]


def letters(alphabet=LETTERS, length=8):
    """`length` letters of a Markov chain. Every letter has a value, whose sign the topic decides; the gold reward is their sum.
    Prompt '1nabc:' is topic, tag (n: plain, + and -: the best and the worst of three, for the warm start only), context."""
    fixed = random.Random(0)
    value = dict(zip(fixed.sample(alphabet, 7), (1, 1, 1, -1, -1, 2, -2)))
    follow = {a: [math.exp(fixed.gauss(0, 1)) for _ in alphabet] for a in alphabet}
    prompts = [f"{t}n{''.join(c)}:" for t in "12" for c in itertools.product(alphabet, repeat=3)]
    fixed.shuffle(prompts)

    def worth(prompt, text):
        sign = 1 if prompt[0] == "1" else -1
        return [sign * value.get(c, 0) if i < length else 0 for i, c in enumerate(text)]

    def reward(prompt, text):
        return float(sum(worth(prompt, text)))

    def draw(rng, prompt):
        text = prompt[-2]
        while len(text) <= length:
            text += rng.choices(alphabet, follow[text[-1]])[0]
        return text[1:]

    def demonstrate(rng, prompt, careful):
        if prompt[1] == "n":
            return draw(rng, prompt)
        return (max if prompt[1] == "+" else min)((draw(rng, prompt) for _ in range(3)), key=lambda y: reward(prompt, y))

    def pair(rng, prompt):
        a, b = draw(rng, prompt), draw(rng, prompt)
        first = rng.random() < 1 / (1 + math.exp(reward(prompt, b) - reward(prompt, a)))  # Bradley-Terry
        return (a, b) if first else (b, a)

    return Game(prompts, demonstrate, reward, worth, pair, lambda p: [p, p.replace("n", "+"), p.replace("n", "-")])


def chain():
    """Running sums modulo 10 of eight digits. A demonstration slips by one, mostly where the digit is 7 or 8, and goes on from
    the slip: one token is wrong and those after it are innocent. Gold reward: whether the last sum is right."""
    fixed = random.Random(0)
    prompts = [f"{n:08d}=" for n in fixed.sample(range(10**8), 4608)]

    def demonstrate(rng, prompt, careful):
        text, total = "", 0
        for x in prompt[:8]:
            slip = careful < 1 and rng.random() < {"7": 0.6, "8": 0.35}.get(x, 0.03)
            total = (total + int(x) + slip) % 10
            text += str(total)
        return text

    def reward(prompt, text):
        return float(len(text) == 8 and text[7] == str(sum(map(int, prompt[:8])) % 10))

    def worth(prompt, text):
        before, out = 0, []
        for x, y in zip(prompt[:8], text):
            out.append(0 if y == str((before + int(x)) % 10) else -1)
            before = int(y) if y.isdigit() else 0
        return out + [0] * (len(text) - len(out))

    def pair(rng, prompt):
        tries = [demonstrate(rng, prompt, 0) for _ in range(8)]
        right, wrong = ([y for y in tries if reward(prompt, y) == want] for want in (1, 0))
        return (right[0], wrong[0]) if right and wrong else None

    return Game(prompts, demonstrate, reward, worth, pair)


def record():
    """A record (c:L,s:D) of two fields, functions of the prompt's first and third letter; a demonstration confuses each with
    its partner. Pairs differ in one token. Gold reward: the share of right fields."""
    fixed = random.Random(0)
    prompts = ["".join(fixed.choices(STATES, k=6)) + "=" for _ in range(6000)]
    prompts = list(dict.fromkeys(prompts))[:4608]
    label, digit = (dict(zip(STATES, fixed.sample(s, 6))) for s in ("ABCDEF", "012345"))
    partner = {c: "ABCDEF"[("ABCDEF".index(c) + 3) % 6] for c in "ABCDEF"} | {str(d): str((d + 1) % 6) for d in range(6)}
    noise = {c: 0.45 for c in "ABC"} | {c: 0.1 for c in "DEF"} | {c: 0.55 for c in "024"} | {c: 0.1 for c in "135"}

    def right(prompt):
        return f"(c:{label[prompt[0]]},s:{digit[prompt[2]]})"

    def flip(text, *places):
        return "".join(partner[c] if i in places else c for i, c in enumerate(text))

    def demonstrate(rng, prompt, careful):
        text = right(prompt)
        return flip(text, *(i for i in (3, 7) if careful < 1 and rng.random() < noise[text[i]]))

    def reward(prompt, text):
        good = right(prompt)
        whole = len(text) == len(good) and flip(text[:3] + text[4:7] + text[8:]) == good[:3] + good[4:7] + good[8:]
        return whole * ((text[3:4] == good[3]) + (text[7:8] == good[7])) / 2

    def worth(prompt, text):
        good = right(prompt)
        return [-1 if i < len(good) and c != good[i] else 0 for i, c in enumerate(text)]

    def pair(rng, prompt):
        return right(prompt), flip(right(prompt), rng.choice((3, 7)))

    return Game(prompts, demonstrate, reward, worth, pair)


# letters4: so short that all 4,096 responses can be listed.
GAMES = dict(letters=letters, letters4=functools.partial(letters, LETTERS[:8], 4), chain=chain, record=record)
HELD_OUT = 512


def task(name):
    """A built-in preference task as a task for the warm start and for online scripts: its score is the gold reward."""
    game, played, shown = GAMES[name](), [], []
    for prompt in game.prompts:
        for variant in game.variants(prompt):
            e = tasks.Example(len(played) + len(shown), variant, variant)
            (played if variant == prompt else shown).append(e)
    train, test = played[:-HELD_OUT], played[-HELD_OUT:]
    shown = [e for e in shown if e.id < test[0].id]

    def check(text, prompt):
        return text, game.reward(prompt, text)

    def demonstrate(rng, e, careful):
        return game.demonstrate(rng, e.prompt, careful)

    return tasks.Task(name, train, test, check, True, demonstrate, shown=shown)


def pairs(name):
    """-> rows (prompt, chosen, rejected) to train on and held out, texts, and the game."""
    game, rng = GAMES[name](), random.Random(1)
    rows = ([], [])
    for part, prompts, n in ((0, game.prompts[:-HELD_OUT], 4096), (1, game.prompts[-HELD_OUT:], HELD_OUT)):
        for prompt in itertools.islice(itertools.cycle(prompts), 4 * n):
            two = game.pair(rng, prompt)
            if two and two[0] != two[1] and len(rows[part]) < n:
                rows[part].append((prompt, *two))
    return *rows, game
