"""letters: texts whose every letter has a value, so that the true reward of each token is known. Its pairs are noisy."""

import itertools
import math
import random

from common.worlds import preference_world

HAS = ("demonstrations", "pairs")
LETTERS = "abcdefghijkl"


def letters(name, alphabet, length, **more):
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

    def variants(prompt):
        return [prompt, prompt.replace("n", "+"), prompt.replace("n", "-")]

    return preference_world(name, prompts, demonstrate, pair, reward, worth, variants, **more)


def task():
    """Eight letters out of twelve."""
    return letters("letters", LETTERS, 8)
