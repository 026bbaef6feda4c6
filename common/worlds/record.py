"""record: two fields, functions of the prompt; pairs differ in one token."""

import random

from common.worlds import preference_world

HAS = ("demonstrations", "pairs")
STATES = "uvwxyz"


def task():
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

    return preference_world("record", prompts, demonstrate, pair, reward, worth)
