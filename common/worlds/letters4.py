"""letters4: four letters out of eight, so that all 4,096 responses to a prompt can be listed."""

import itertools

from common.worlds.letters import LETTERS, letters

HAS = ("demonstrations", "pairs")


def task():
    """As letters, but short."""
    every = ["".join(some) for some in itertools.product(LETTERS[:8], repeat=4)]
    return letters("letters4", LETTERS[:8], 4, responses=lambda: every)
