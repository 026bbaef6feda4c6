"""addition[:digits]: sums of two numbers, which a tiny model can do column by column, and mostly guesses."""

import random

from common import UserError
from common.tasks import Example, Task

HAS = ("demonstrations",)


def check_addition(text, answer):
    """The sum is what follows the last colon; anything else is scratch."""
    extracted = text.rsplit(":", 1)[-1].strip() if ":" in text else None
    return extracted, float(extracted == answer)


def demonstrate_addition(rng, example, careful=0.3):
    """The share `careful` adds column by column with carries and is right; the rest states a sum at once, mostly wrong."""
    a, b = example.prompt.rstrip("=").split("+")
    if rng.random() >= careful:
        off = 0 if rng.random() < 0.1 else rng.choice((-20, -11, -10, -2, -1, 1, 2, 10, 11, 20))
        return f":{max(0, int(example.answer) + off)}"
    carry, columns = 0, []
    for i, (x, y) in enumerate(zip(reversed(a), reversed(b))):
        column = int(x) + int(y) + carry
        columns.append(f"{x}+{y}" + (f"+{carry}" if i else "") + f"={column:02d}")
        carry = column // 10
    return " ".join(columns) + ":" + example.answer


def task(option):
    """Sums of two numbers of 2 (or `option`) digits. Two digits: all 8,100 pairs; more: 8,192 random ones. A fixed split."""
    if option and not (option.isascii() and option.isdigit() and int(option)):
        raise UserError(f"task addition:{option}: {option!r} is not a positive number")
    digits = int(option or 2)
    low, high = 10 ** (digits - 1), 10**digits - 1
    rng = random.Random(0)
    if digits <= 2:
        pairs = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
        rng.shuffle(pairs)
    else:
        pairs = list({(rng.randint(low, high), rng.randint(low, high)): None for _ in range(8192)})
    n_test = min(512, len(pairs) // 2)
    examples = [Example(i, f"{a}+{b}=", str(a + b)) for i, (a, b) in enumerate(pairs)]
    return Task(
        f"addition:{digits}", examples[n_test:], examples[:n_test], check_addition, True, demonstrate_addition,
        max_new_tokens=8 + 10 * digits,
    )  # fmt: skip
