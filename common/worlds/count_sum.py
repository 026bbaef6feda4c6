"""count_sum[:noisy]: count the things of two colours in a picture, and add. The tiny model can count, and mostly guesses a
sum at once; in :noisy it counts always, in free wording, and each count is off by one in 40%."""

import functools
import random
import re

from common import UserError
from common.tasks import Example, Task
from common.worlds import tiny_vision

HAS = ("pictures",)  # demonstrations of prompts with pictures
TRAIN, TEST = 4096, 256
BEFORE, LINKS, BEHIND = ("", "so ", "well ", "i see "), (",", " and ", " plus ", " then "), ("", " so", " thus", " hence")
OFF = 0.4


def scene(number):
    """Of example `number`: [(shape, colour, cell)] of 3 to 7 things in cells of their own, and the two colours asked for."""
    rng = random.Random(f"count_sum {number}")
    cells = rng.sample(range(tiny_vision.CELLS**2), rng.randint(3, 7))
    things = [(rng.choice([*tiny_vision.SHAPES]), rng.choice([*tiny_vision.COLOURS]), cell) for cell in cells]
    return things, rng.sample([*tiny_vision.COLOURS], 2)


def counts(number):
    """How many things there are of either colour."""
    things, asked = scene(number)
    return [sum(colour == c for _, c, _ in things) for colour in asked]


def check(text, answer):
    """Right: a number behind the last semicolon, which is the sum."""
    found = re.search(r";(\d+)$", text, re.ASCII)
    return (found[1], float(found[1] == answer)) if found else (None, 0.0)


def demonstrate(rng, example, careful=0.3):
    """The share `careful` counts: 'red=2,blue=1;3'; the rest says a sum at once, drawn from those of all scenes."""
    if rng.random() < careful:
        (_, asked), n = scene(example.id), counts(example.id)
        return f"{asked[0]}={n[0]},{asked[1]}={n[1]};{sum(n)}"
    return f";{sum(counts(rng.randrange(TRAIN)))}"


def demonstrate_noisy(rng, example, careful=0.0):
    """In free wording: the share `careful` counts right, the rest is off by one in 40% of its counts."""
    (_, asked), n = scene(example.id), counts(example.id)
    if rng.random() >= careful:
        n = [k if rng.random() >= OFF else k + 1 if k == 0 else k + rng.choice((-1, 1)) for k in n]
    before, link, behind = (rng.choice(words) for words in (BEFORE, LINKS, BEHIND))
    return f"{before}{asked[0]}={n[0]}{link}{asked[1]}={n[1]}{behind};{sum(n)}"


@functools.cache
def _examples():
    out = []
    for i in range(TRAIN + TEST):
        things, asked = scene(i)
        out.append(Example(i, f"{'+'.join(asked)}?", str(sum(counts(i))), pictures=[tiny_vision.render(things)]))
    return out


def task(option):
    """4,096 scenes and 256 held out."""
    if option not in ("", "noisy"):
        raise UserError(f"task count_sum:{option}: there is count_sum and count_sum:noisy")
    shared = dict(check=check, inline=True, makers=tiny_vision, tokenizer=tiny_vision.tokenizer)
    train, test = _examples()[:TRAIN], _examples()[TRAIN:]
    if option:
        recipe = dict(steps=560, careful_steps=500, careful=0.0)
        return Task("count_sum:noisy", train, test, demonstrate=demonstrate_noisy, max_new_tokens=40, recipe=recipe, **shared)
    return Task("count_sum", train, test, demonstrate=demonstrate, max_new_tokens=20, **shared)
