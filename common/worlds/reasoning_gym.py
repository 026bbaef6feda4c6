"""reasoning_gym:<name>: a generated task of the library reasoning-gym, scored by the library's own verifier."""

import difflib
import functools

from common import UserError, answers, reason
from common.tasks import HELD_OUT, from_rows

N_TRAIN = 4096


def check_reasoning_gym(name, text, answer):
    """`answer`: the number of an entry of data set `name`, and its answer."""
    extracted, data = answers.extract(text), _data(name)
    return extracted, float(data.score_answer(extracted, data[int(answer.partition(":")[0])]) >= 1.0)


@functools.cache
def _data(name):
    """Made anew in the process that checks: an entry holds objects, such as tuples, that do not survive being sent as text."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=N_TRAIN + HELD_OUT, seed=0)


def task(option):
    """Data set `option`, generated from seed 0."""
    from reasoning_gym.factory import DATASETS

    if option not in DATASETS:
        near = difflib.get_close_matches(option, DATASETS, 3, 0.3)
        raise UserError(f"unknown reasoning_gym task {option!r}; nearest: {', '.join(near) or 'none'}")
    try:
        entries = list(_data(option))
    except Exception as error:
        raise UserError(f"task reasoning_gym:{option} cannot be made without settings of its own ({reason(error)})") from None
    rows = [(e["question"], f"{i}: {e['answer']}", f"reasoning_gym:{option}, entry {i}") for i, e in enumerate(entries)]
    check = functools.partial(check_reasoning_gym, option)
    check.warm_up = functools.partial(_data, option)  # by the checking process, off the clock
    return from_rows(f"reasoning_gym:{option}", rows[HELD_OUT:], rows[:HELD_OUT], check=check)
