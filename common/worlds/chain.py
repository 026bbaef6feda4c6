"""chain: running sums. One slip makes a response wrong, what follows it is innocent."""

import random

from common.worlds import preference_world

HAS = ("demonstrations", "pairs")


def task():
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

    recipe = dict(steps=1500, careful_steps=1200)  # after 600 steps its sums are still guesses
    return preference_world("chain", prompts, demonstrate, pair, reward, worth, recipe=recipe)
