"""countdown[:numbers]: reach a target with given numbers, each exactly once, by + - and *."""

import ast
import itertools
import random

from common import UserError
from common.tasks import Example, Task

HAS = ("demonstrations",)


def evaluate(expression):
    """Value of an expression of + - * and small integers, or None. Never `eval`: parsed, depth and size bounded."""
    if len(expression) > 64:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 1000:
            return node.value, [node.value]
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            (x, used), (y, more) = value(node.left), value(node.right)
            return {ast.Add: x + y, ast.Sub: x - y, ast.Mult: x * y}[type(node.op)], used + more
        raise ValueError

    try:
        return value(tree)
    except (ValueError, RecursionError):
        return None


def check_countdown(text, answer):
    """Right when what follows the last colon uses every given number once and makes the target ('3 5 8=16')."""
    numbers, target = answer.split("=")
    extracted = text.rsplit(":", 1)[-1].strip() if ":" in text else None
    result = evaluate(extracted) if extracted else None
    right = result is not None and result[0] == int(target) and sorted(result[1]) == sorted(map(int, numbers.split()))
    return extracted, float(right)


def _expressions(numbers):
    """Every a op b op c without brackets over the orders of the numbers, with its value."""
    for order in itertools.permutations(numbers):
        for ops in itertools.product("+-*", repeat=len(numbers) - 1):
            text = str(order[0]) + "".join(o + str(n) for o, n in zip(ops, order[1:]))
            yield text, evaluate(text)[0]


def demonstrate_countdown(rng, example, careful=0.3):
    """The share `careful` tries expressions until one fits and is right; the rest states a random expression."""
    numbers, target = example.answer.split("=")
    tries = list(_expressions([int(n) for n in numbers.split()]))
    if rng.random() >= careful:
        return ":" + rng.choice(tries)[0]
    right = rng.choice([t for t in tries if t[1] == int(target)])
    wrong = [t for t in tries if t[1] != int(target)]
    wrong = rng.sample(wrong, min(len(wrong), rng.randint(0, 2)))
    return " ".join(f"{t}={v}" for t, v in wrong + [right]) + ":" + right[0]


def task(option):
    """Problems of 3 (or `option`: 2, 3, 4) numbers from 1 to 9. Whole problems are held out, not their orders."""
    if option not in ("", "2", "3", "4"):
        raise UserError(
            f"task countdown:{option}: 2, 3 or 4 numbers (one is no problem; for five there are too many ways to list)"
        )
    count = int(option or 3)
    problems = [
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 10), count)
        for target in sorted({value for _, value in _expressions(numbers)})
        if 0 <= target < 100
    ]
    rng = random.Random(0)
    rng.shuffle(problems)  # another order of the numbers is no other problem
    n_test = min(512, len(problems) // 4)
    orders = [(rng.sample(n, count), t) for n, t in problems[:n_test]]
    orders += [(n, t) for numbers, t in problems[n_test:] for n in sorted(set(itertools.permutations(numbers)))]
    texts = [f"{' '.join(map(str, numbers))}={target}" for numbers, target in orders]
    examples = [Example(i, f"{text}?", text) for i, text in enumerate(texts)]
    return Task(
        f"countdown:{count}", examples[n_test:], examples[:n_test], check_countdown, True, demonstrate_countdown,
        max_new_tokens=12 * count,
    )  # fmt: skip
