"""chain: running sums. One slip makes a response wrong, what follows it is innocent."""

import random

from common import UserError
from common.worlds import preference_world

HAS = ("demonstrations", "pairs")


def task(option=""):
    """Running sums modulo 10 of eight digits. A demonstration slips by one, mostly where the digit is 7 or 8, and goes on from
    the slip: one token is wrong and those after it are innocent. Gold reward: whether the last sum is right. chain:slips: it
    slips nearly always at 18 pairs of a digit and the sum before it, so that wrong answers come again and again, and many
    samples of one prompt do not help."""
    if option not in ("", "slips"):
        raise UserError(f"task chain:{option}: the only variant is chain:slips")
    fixed, pairs = random.Random(0), random.Random(0)
    prompts = [f"{n:08d}=" for n in fixed.sample(range(10**8), 4608)]
    systematic = {(str(x), total) for x in range(10) for total in range(10) if pairs.random() < 0.3}

    def demonstrate(rng, prompt, careful):
        text, total = "", 0
        for x in prompt[:8]:
            often = {"7": 0.6, "8": 0.35}.get(x, 0.03)
            if option:
                often = 0.8 if (x, total) in systematic else 0.02
            slip = careful < 1 and rng.random() < often
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

    recipe = dict(steps=1500, careful_steps=1200)  # after 600 steps its sums are still guesses
    return preference_world(":".join(filter(None, ("chain", option))), prompts, demonstrate, pair, reward, worth, recipe=recipe)
