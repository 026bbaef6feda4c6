"""route[:warm start]: lead one number to another by +7, -4 and *2. A fork at every fifth token, arithmetic between them: here
methods can be told apart."""

import functools
import random
import re

from common import UserError
from common.tasks import HELD_OUT, Example, Task
from common.worlds import tiny

HAS = ("demonstrations",)
MOVES = ("+7", "-4", "*2")
HABIT = (0.50, 0.45, 0.05)  # how often the guesser takes each: the doubling that half of the prompts need is rare
LONGEST = 4  # moves


def after(number, move):
    """Where a move leads, or None: it must stay in 0 to 99."""
    n = {"+7": number + 7, "-4": number - 4, "*2": number * 2}[move]
    return n if 0 <= n <= 99 else None


@functools.cache
def distances(start):
    """{number: least moves from start}, by breadth first."""
    found, edge = {start: 0}, [start]
    for number in edge:
        for n in (after(number, move) for move in MOVES):
            if n is not None and n not in found:
                found[n] = found[number] + 1
                edge.append(n)
    return found


def ends(prompt):
    """'40>72:' -> 40, 72."""
    return int(prompt[:2]), int(prompt[3:5])


def tier(example):
    """How hard a prompt is: the moves of its shortest route, 1 to 4."""
    start, target = ends(example.prompt)
    return distances(start)[target]


def chance(example):
    """How often a walk that takes any of the legal moves alike, and stops at the target, meets it within four."""
    start, target = ends(example.prompt)

    def met(number, left):
        if number == target:
            return 1.0
        there = [n for n in (after(number, move) for move in MOVES) if n is not None] if left else []
        return sum(met(n, left - 1) for n in there) / max(1, len(there))

    return met(start, LONGEST)


def check(text, prompt):
    """Right: one to four moves of the three, every result right and of two digits, the last one the target. The answer is the
    last two-digit result, so that right completions of a prompt share it."""
    number, target = ends(prompt)
    results = re.findall(r"=(\d\d)(?!\d)", text)
    extracted = results[-1] if results else None
    if not re.fullmatch(rf"(?:(?:\+7|-4|\*2)=\d\d){{1,{LONGEST}}}", text, re.ASCII):
        return extracted, 0.0
    for i in range(0, len(text), 5):
        number = after(number, text[i : i + 2])
        if number is None or number != int(text[i + 3 : i + 5]):
            return extracted, 0.0
    return extracted, float(number == target)


def demonstrate(rng, example, careful=0.15):
    """The share `careful` takes a shortest route, any of the moves that come nearer; the rest walks 1 to 4 moves by habit and
    stops where it meets the target, which is right in 9%."""
    number, target = ends(example.prompt)
    shortest, text = rng.random() < careful, ""
    for _ in range(LONGEST if shortest else rng.randint(1, LONGEST)):
        legal = [(move, weight) for move, weight in zip(MOVES, HABIT) if after(number, move) is not None]
        if shortest:
            left = distances(number)[target]
            legal = [(move, 1) for move, _ in legal if distances(after(number, move)).get(target, 99) < left]
        move = rng.choices(*zip(*legal))[0]
        number = after(number, move)
        text += f"{move}={number:02d}"
        if number == target:
            break
    return text


def task(option):
    """Every start and target from 0 to 99 that one to four moves connect: 2,592, of which 512 are held out. The warm start sees
    900 steps of shortest routes, then 600 with 15% of them; `option` is its seed, for a second model with the same habit."""
    if option and not (option.isascii() and option.isdigit()):
        raise UserError(f"task route:{option}: {option!r} is no seed of a warm start")
    pairs = [(s, t) for s in range(100) for t, n in sorted(distances(s).items()) if 1 <= n <= LONGEST]
    random.Random(0).shuffle(pairs)
    prompts = [f"{s:02d}>{t:02d}:" for s, t in pairs]
    examples = [Example(i, prompt, prompt) for i, prompt in enumerate(prompts)]
    return Task(
        "route" + (f":{option}" if option else ""), examples[HELD_OUT:], examples[:HELD_OUT], check, True, demonstrate,
        max_new_tokens=28, recipe=dict(steps=1500, careful_steps=900, careful=0.15, lr=3e-3, seed=int(option or 0)),
        tokenizer=lambda: tiny.characters(tiny.CHARACTERS + ">"), tier=tier, chance=chance,
    )  # fmt: skip
