"""events[:careful]: which things moved, stayed or left between the two frames of a video? Several may have, and half the
questions are inverted (not moved). The tiny model can say what became of every option first, and mostly guesses at once."""

import functools
import random

import numpy as np

from common import UserError
from common.tasks import Example, Task
from common.worlds import tiny_vision

HAS = ("pictures",)  # demonstrations of prompts with pictures
TRAIN, TEST = 4096, 256
THINGS = dict(zip("ABCD", tiny_vision.COLOURS))  # boxes: A red, B green, C blue, D gold
EVENTS = ("moved", "stayed", "left")


def _neighbours(cell):
    """The cells beside a cell, above and below it."""
    row, column = divmod(cell, tiny_vision.CELLS)
    beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return [tiny_vision.CELLS * r + c for r, c in beside if 0 <= r < tiny_vision.CELLS and 0 <= c < tiny_vision.CELLS]


@functools.cache
def scene(number):
    """Of example `number`: {letter: (cell before, cell after or None, event)}, the event that is asked for, whether the
    question is inverted, and 2 to 4 letters asked about. Drawn anew where none is the answer, or one has nowhere to go."""
    rng = random.Random(f"events {number}")
    while True:
        before = rng.sample(range(tiny_vision.CELLS**2), len(THINGS))
        taken, things = set(before), {}
        for letter, cell in zip(THINGS, before):
            event, free = rng.choice(EVENTS), [c for c in _neighbours(cell) if c not in taken]
            after = dict(moved=rng.choice(free or [None]), stayed=cell, left=None)[event]
            taken.add(after)
            things[letter] = (cell, after, event)
        asked, inverted = rng.choice(EVENTS), rng.random() < 0.5
        options = sorted(rng.sample([*THINGS], rng.randint(2, len(THINGS))))
        stuck = any(event == "moved" and after is None for _, after, event in things.values())
        if not stuck and any((things[x][2] == asked) != inverted for x in options):
            return things, asked, inverted, options


def frames(number):
    """-> the video [2, 16, 16, 3], uint8: before and after."""
    things = scene(number)[0]
    seen = [[("box", THINGS[x], cells[i]) for x, cells in things.items() if cells[i] is not None] for i in (0, 1)]
    return np.stack([tiny_vision.render(frame) for frame in seen])


def answer(number):
    """The options asked for, as A,D."""
    things, asked, inverted, options = scene(number)
    return ",".join(x for x in options if (things[x][2] == asked) != inverted)


def check(text, answer):
    """Right: behind the last semicolon just the options of the answer, in any order."""
    _, mark, found = text.rpartition(";")
    return (found, float(set(found.split(",")) == set(answer.split(",")))) if mark else (None, 0.0)


def demonstrate(rng, example, careful=0.3):
    """The share `careful` looks: 'Am,Bs,Dm;A,D', of every option the first letter of what became of it, then the answer; the
    rest names some of the options at once."""
    things, _, _, options = scene(example.id)
    if rng.random() >= careful:
        return ";" + ",".join(sorted(rng.sample(options, rng.randint(1, len(options)))))
    return ",".join(x + things[x][2][0] for x in options) + ";" + answer(example.id)


@functools.cache
def _examples():
    out = []
    for i in range(TRAIN + TEST):
        _, asked, inverted, options = scene(i)
        prompt = f"{'not ' * inverted}{asked}?{''.join(options)}"
        out.append(Example(i, prompt, answer(i), pictures=[frames(i)]))
    return out


def task(option):
    """4,096 scenes and 256 held out; events:careful: a model that always looks, and has not learnt for long."""
    if option not in ("", "careful"):
        raise UserError(f"task events:{option}: there is events and events:careful")
    shared = dict(check=check, inline=True, makers=tiny_vision, tokenizer=tiny_vision.tokenizer)
    recipe = dict(steps=200, careful_steps=200, careful=1.0) if option else dict(steps=880, careful_steps=800)
    train, test = _examples()[:TRAIN], _examples()[TRAIN:]
    shared |= dict(demonstrate=demonstrate, max_new_tokens=24, recipe=recipe)
    return Task("events" + (f":{option}" if option else ""), train, test, **shared)
