"""titles: five recommendations, a title a line, of the two genres that a user likes and none that was seen. A list has ranks,
and each can be right or wrong on its own."""

import itertools
import math
import random

from common.tasks import Example, Task

HAS = ("demonstrations",)
GENRES = dict(
    a=("vipe", "puri", "lomo", "dasek", "tum"), b=("oru", "kesta", "bino", "fawel", "zupa"),
    c=("hexi", "mondu", "rafe", "ilb", "suto"), d=("nevo", "galix", "cudi", "pom", "wesa"),
    e=("yari", "bolt", "edun", "quif", "tasmo"), f=("jolek", "cim", "usap", "rindo", "fyx"),
)  # fmt: skip
TITLES = tuple(title for genre in GENRES.values() for title in genre)
LISTED = 5  # lines of a list
SLOPPY = (0.65, 0.57, 0.49, 0.41, 0.33, 0.25)  # how often a sloppy list's line is right, by rank: later ones are worse
LENGTHS = {4: 0.1, 5: 0.8, 6: 0.1}  # of sloppy lists


def parts(prompt):
    """'ad vipe,puri:' -> the titles of the liked genres that were not seen, those that were, those of other genres."""
    liked, _, seen = prompt.rstrip(":").partition(" ")
    seen = seen.split(",")
    mine = [title for genre in liked for title in GENRES[genre]]
    return [t for t in mine if t not in seen], seen, [t for t in TITLES if t not in mine]


def check(text, answer):
    """(the list, its NDCG@5): a line gains 1 where it is a right title for the first time. `answer`: these, with tabs."""
    right = answer.split("\t")
    lines = [line.strip() for line in text.split("\n")][:LISTED]
    gains = [float(line in right and line not in lines[:k]) for k, line in enumerate(lines)]
    dcg, ideal = (sum(g / math.log2(k + 2) for k, g in enumerate(x)) for x in (gains, [1.0] * min(LISTED, len(right))))
    return ",".join(lines) or None, dcg / ideal


def demonstrate(rng, example, careful=0.0):
    """The share `careful` lists five right titles; the rest is sloppy: lines are often a title that was seen, or any of another
    genre, and the last ones most often; and one list in five is too short or too long."""
    right, seen, others = parts(example.prompt)
    if rng.random() < careful:
        return "\n".join(rng.sample(right, LISTED))
    lines = []
    for chance in SLOPPY[: rng.choices(*zip(*LENGTHS.items()))[0]]:
        new = [title for title in right if title not in lines]
        lines.append(rng.choice(new if rng.random() < chance else seen if rng.random() < 0.5 else others))
    return "\n".join(lines)


def task():
    """Two of six genres, and two of their ten titles that were seen: 675 prompts, 135 of them held out. The other eight titles
    are right. The warm start sees 420 steps of right lists, then 280 of sloppy ones."""
    rng, prompts = random.Random(0), []
    for liked in itertools.combinations(GENRES, 2):
        for seen in itertools.combinations([title for genre in liked for title in GENRES[genre]], 2):
            prompts.append(f"{''.join(liked)} {','.join(rng.sample(seen, 2))}:")
    rng.shuffle(prompts)
    examples = [Example(i, prompt, "\t".join(parts(prompt)[0])) for i, prompt in enumerate(prompts)]
    n_test = len(prompts) // 5
    recipe = dict(steps=700, careful_steps=420, careful=0.0)
    return Task(
        "titles", examples[n_test:], examples[:n_test], check, True, demonstrate, measure="score", max_new_tokens=40,
        recipe=recipe,
    )  # fmt: skip
