"""What `python algos/grpo.py` promises: without any argument it learns, in front of the user."""

import os
import re
import subprocess
import sys

from tests.helpers import GRPO, ROOT, lines, tiny

__all__ = ["tiny"]


def test_the_default_run_learns(tmp_path, tiny):
    """Seed 1, as given out. What is learnt is which move leads on; the curve on the screen shows it as it goes."""
    done = subprocess.run(
        [sys.executable, str(GRPO), "--run-dir", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = re.fullmatch(
        r"greedy accuracy (\S+) -> (\S+) on 512 held-out prompts", done.stdout.splitlines()[-1]
    ).groups()
    assert 0.30 <= float(before) <= 0.38 and float(after) >= 0.66
    rows, evals = (lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "evals"))
    assert rows[-1]["step"] == len(rows) == 120 and [e["step"] for e in evals] == list(range(0, 121, 20))
    assert evals[1]["greedy_accuracy"] > evals[0]["greedy_accuracy"] + 0.1  # most of it comes early, and it goes on
    assert evals[-1]["greedy_accuracy"] > evals[1]["greedy_accuracy"] + 0.05
    mean = lambda key, part: sum(r[key] for r in part) / len(part)  # noqa: E731
    assert 0.08 <= rows[0]["accuracy"] <= 0.16 and mean("accuracy", rows[-10:]) > 0.55
    assert mean("entropy", rows[-10:]) < 0.5 * mean("entropy", rows[:1])
    assert mean("informative_groups", rows[-10:]) > 0.3  # there is still something to learn
    assert mean("clip_fraction", rows) > 5e-4  # the updates within a rollout are off-policy
    assert "task route: lead one number to another by +7, -4 and *2; '07>49:' -> '" in done.stdout
    curve = [line for line in done.stdout.splitlines() if line.endswith("#")]
    assert len(curve) == 7 and len(curve[-1].split()[-1]) > len(curve[0].split()[-1])
