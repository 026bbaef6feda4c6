"""Built-in tasks, a file each, found by its name: `task()` or `task(option)` returns a common.tasks.Task. A world imports
common.tasks, and nothing imports a world. HAS says which have demonstrations, for a tiny model's warm start, which have
them with pictures, which have pairs, for preferences, and which have answers that are worked solutions."""

from common.tasks import HELD_OUT, Example, Task


def preference_world(name, prompts, demonstrate, pair, reward, worth, variants=lambda prompt: [prompt], **more):
    """A world whose score is a gold reward: prompts (held out last), `demonstrate(rng, prompt, careful)`, and pair, reward and
    worth as in Task. `variants(prompt)`, itself first, are the prompts that the warm start sees for one of the data's."""
    played, shown = [], []
    for prompt in prompts:
        for variant in variants(prompt):
            e = Example(len(played) + len(shown), variant, variant)
            (played if variant == prompt else shown).append(e)
    train, test = played[:-HELD_OUT], played[-HELD_OUT:]
    return Task(
        name, train, test, lambda text, prompt: (text, reward(prompt, text)), inline=True, measure="score",
        demonstrate=lambda rng, e, careful: demonstrate(rng, e.prompt, careful),
        shown=[e for e in shown if e.id < test[0].id], pair=pair, reward=reward, worth=worth, **more,
    )  # fmt: skip
