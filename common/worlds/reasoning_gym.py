"""reasoning_gym:<name>: a generated task of the library reasoning-gym, scored by the library's own verifier."""

import difflib
import functools
import json

from common import UserError, answers
from common.tasks import HELD_OUT, from_rows

N_TRAIN = 4096


def check_reasoning_gym(name, text, answer):
    """`answer` is the entry of data set `name` as JSON."""
    import reasoning_gym

    extracted = answers.extract(text)
    scorer = reasoning_gym.get_score_answer_fn(name)
    return extracted, float(scorer(answer=extracted, entry=json.loads(answer)) >= 1.0)


def _import_reasoning_gym():
    import reasoning_gym  # noqa: F401


def task(option):
    """Data set `option`, generated from seed 0."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if option not in DATASETS:
        near = difflib.get_close_matches(option, DATASETS, 3, 0.3)
        raise UserError(f"unknown reasoning_gym task {option!r}; nearest: {', '.join(near) or 'none'}")
    entries = reasoning_gym.create_dataset(option, size=N_TRAIN + HELD_OUT, seed=0)
    rows = [(e["question"], json.dumps(e, default=str)) for e in entries]
    check = functools.partial(check_reasoning_gym, option)
    check.warm_up = _import_reasoning_gym  # by the checking process, off the clock
    return from_rows(f"reasoning_gym:{option}", rows[HELD_OUT:], rows[:HELD_OUT], check=check)
