"""sums: two two-digit numbers that make a sum, any that do, so that the parts of an answer have to agree with each other."""

from common.tasks import Example, Task
from common.worlds import tiny

HAS = ()  # its demonstrations are for models that fill in masked positions


def check_pair(text, answer):
    """The text is a+b, of two digits each, with the sum that the prompt asks for: the answer."""
    a, plus, b = text.partition("+")
    fits = plus and all(len(x) == 2 and x.isascii() and x.isdigit() and x[0] != "0" for x in (a, b))
    return text, float(bool(fits) and int(a) + int(b) == int(answer))


def demonstrate_pair(rng, example, careful=1.0):
    """Any of the pairs, all equally often."""
    a = rng.randint(10, int(example.answer) - 10)
    return f"{a}+{int(example.answer) - a}"


def task():
    """All 80 sums of two digits, to train and to test on: what counts is whether two numbers that were guessed apart agree,
    which the sum alone does not tell. The canvas has 8 places, so three of them are filler. Made for masked diffusion: the
    tiny model sees all positions, and wants larger weights at the start than usual."""
    shape = dict(is_causal=False, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4)
    prompts = [[Example(first + i, f"{i + 20}=", str(i + 20)) for i in range(80)] for first in (0, 80)]
    return Task(
        "sums", *prompts, check_pair, True, demonstrate_pair, max_new_tokens=8,
        recipe=dict(steps=800, careful_steps=0, lr=3e-3), shape=shape | dict(initializer_range=0.08),
        tokenizer=tiny.with_mask,
    )  # fmt: skip
