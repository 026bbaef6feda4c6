"""What `python algos/grpo.py` promises: without any argument it learns, in front of the user."""

import os
import re
import subprocess
import sys

from tests.helpers import GRPO, ROOT, lines, tiny

__all__ = ["tiny"]


def test_the_default_run_learns(tmp_path, tiny):
    """Seed 1, as given out. What is learnt is the careful way: completions grow, and entropy falls at the fork."""
    done = subprocess.run(
        [sys.executable, str(GRPO), "--run-dir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = re.fullmatch(
        r"greedy accuracy (\S+) -> (\S+) on 512 held-out prompts", done.stdout.splitlines()[-1]
    ).groups()
    assert float(before) < 0.6 and float(after) >= 0.95
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == len(rows) == 40
    mean = lambda key, part: sum(r[key] for r in part) / len(part)  # noqa: E731
    assert mean("accuracy", rows[-10:]) > mean("accuracy", rows[:1]) + 0.4
    assert mean("length", rows[-10:]) > 1.8 * mean("length", rows[:1])
    assert mean("entropy", rows[-10:]) < 0.3 * mean("entropy", rows[:1])
    assert rows[0]["clip_fraction"] > 0.01  # the updates within a rollout are off-policy, or most methods would be the same
