"""Checks the checker on GSM8K's own solutions: each against its own answer and against the next row's.

python -m tests.gsm8k_gold path/to/gsm8k/train.jsonl
"""

import json
import sys
import time
from decimal import Decimal, InvalidOperation

from common import UserError, answers, rewards


def read(path):
    """-> (solutions, the numbers that they end in)."""
    golds, values = [], []
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                golds.append(json.loads(line)["answer"])
                values.append(Decimal(golds[-1].rpartition("####")[2].strip().replace(",", "")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, InvalidOperation) as error:
        where = f"{path}:{len(values) + 1}"
        raise UserError(f"{where}: needs an 'answer' that ends in '#### number' ({error!r})") from None
    if not golds:
        raise UserError(f"{path} is empty")
    return golds, values


def main(arguments):
    """-> the exit code: 0 where every solution is right for its own answer and for no other."""
    if len(arguments) != 1:
        raise UserError("usage: python -m tests.gsm8k_gold path/to/gsm8k/train.jsonl")
    started = time.monotonic()
    golds, values = read(arguments[0])
    others = [i for i in range(len(golds) - 1) if values[i] != values[i + 1]]
    scorer = rewards.Scorer(answers.maths)
    own = int(sum(scorer(golds, golds)[1]))
    false = int(sum(scorer([golds[i] for i in others], [golds[i + 1] for i in others])[1]))
    scorer.close()
    print(
        f"{own:,} of {len(golds):,} gold solutions score 1 against their own answer; "
        f"{false:,} of {len(others):,} score 1 against the next row's ({time.monotonic() - started:.1f} s)"
    )
    return int(own < len(golds) or false > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
