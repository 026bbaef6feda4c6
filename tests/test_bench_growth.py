"""The arithmetic of tests.bench.growth and tests.bench.start, and that what they watch still runs."""

import json
import subprocess
import sys

import pytest

from tests.bench import growth, start, worker


def test_slope_of_powers():
    x = (8, 16, 32, 64)
    for power in (0.5, 1, 2):
        assert growth.slope(x, [3 * v**power for v in x]) == pytest.approx(power)


def options():
    return growth.Options(groups=(2, 4), lengths=(16, 32, 64), vocabularies=(78, 100), prompts=1)


def test_points_have_the_first_in_common():
    assert growth.points(options()) == dict(
        groups=[(2, 16, 78), (4, 16, 78)],
        lengths=[(2, 16, 78), (2, 32, 78), (2, 64, 78)],
        vocabularies=[(2, 16, 78), (2, 16, 100)],
    )


def quadratic():
    """The rollout's seconds go with the square of the length from 32 on; one round of three is off."""
    found = {p: None for some in growth.points(options()).values() for p in some}
    for G, T, V in found:
        row = dict(tokens=G * T, rollout=G * T * max(32, T), scoring=G * T, update=2.0 * G * T)
        found[G, T, V] = [row, row | dict(rollout=1e9, scoring=0.5), row]
    return found


def test_fit_table_and_what_is_called_out():
    found = quadratic()
    slopes = growth.fit(options(), found)
    assert slopes["lengths"]["scoring"] == pytest.approx(dict(slope=1, last=1))
    assert slopes["groups"]["rollout"] == pytest.approx(dict(slope=1, last=1))
    assert slopes["lengths"]["rollout"] == pytest.approx(dict(slope=1.5, last=2))
    assert slopes["vocabularies"]["update"] == pytest.approx(dict(slope=0, last=0), abs=1e-9)
    assert growth.over(slopes) == ["rollout over tokens per completion: slope 1.50, at the end 2.00, above 1.1"]
    lines = growth.table(options(), found, slopes).splitlines()
    assert lines[4].startswith("| 2 | 32 | 78 | 64 | 2048.000 (2048.000 to 1000000000.000) | 64.000 (0.500 to 64.000) |")
    assert lines[-2] == "| tokens per completion | 1.50 (2.00) | 1.00 (1.00) | 1.00 (1.00) |"


def test_picture(tmp_path):
    growth.draw(options(), quadratic(), growth.fit(options(), quadratic()), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes()[1:4] == b"PNG"


def test_a_visit_writes_the_tokens_asked_for_and_leaves_the_worker_as_it_was(tmp_path):
    kept = growth.engines.HF._generate, growth.tasks.load, worker.MOST, worker.draw_lengths, growth.time.perf_counter
    prompts = growth.make(78, str(tmp_path), options())
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == worker.PROMPT + 64
    for group, length in ((2, 16), (4, 32)):
        row = growth.measure(group, length, str(tmp_path), prompts, options(), seed=1)
        assert row["tokens"] == group * length and all(row[stage] > 0 for stage in growth.STAGES)
    assert kept == (growth.engines.HF._generate, growth.tasks.load, worker.MOST, worker.draw_lengths, growth.time.perf_counter)


def test_seconds_go_to_the_innermost_span():
    now = iter([1, 3, 4, 9, 10, 12, 20, 21])
    spans = start.Spans(lambda: next(now))  # 1
    spans.open("import", "big.part")  # 3
    spans.open("import", "small")  # 4
    spans.close()  # 9
    spans.open("import", "big.other")  # 10: of the same package
    spans.close()  # 12
    spans.close()  # 20
    assert spans.own == {("stage", start.STEP): 2, ("import", "big"): 12, ("import", "small"): 5}
    assert spans.asked == {("big", "the script"): 17, ("small", "big.part"): 5}


def seen(torch, small, cause):
    own = [["stage", start.START, 0.1], ["import", "torch", torch], ["import", "json", small], ["import", "re", small]]
    own += [["stage", "model", 0.2], ["stage", start.STEP, 0.3]]
    return dict(own=own, asked=[["scipy", "transformers.loss", cause]], lines=[["hello", 3.0, 4.0]], whole=5.0)


def test_report():
    runs = [seen(1.0, 0.01, 0.2), seen(3.0, 0.02, 0.4), seen(2.0, 0.03, 0.05)]
    lines = start.report(runs).splitlines()
    assert lines[2:7] == [
        "| interpreter, standard library | 0.10 (0.10 to 0.10) |",
        "| import: torch | 2.00 (1.00 to 3.00) |",
        "| import: 2 other packages and modules | 0.04 (0.02 to 0.06) |",
        "| model | 0.20 (0.20 to 0.20) |",
        "| first step: scoring, update | 0.30 (0.30 to 0.30) |",
    ]
    assert lines[10] == "| scipy | transformers.loss | 0.20 (0.05 to 0.40) |"
    assert "First line after 3.00 (3.00 to 3.00) s of the core, 4.00 (4.00 to 4.00) s by the clock: 'hello'" in lines
    assert start.causes([seen(1.0, 0.01, 0.09)]) == []


def test_every_stage_is_a_function_that_there_is():
    for place in start.STAGES:
        part, _, function = place.partition(".")
        assert callable(getattr(__import__(f"common.{part}", fromlist=[function]), function))


def test_a_process_that_is_watched(tmp_path):
    """Up to the first step that is logged, with what it imports, does and says."""
    (tmp_path / "common").mkdir()
    files = {
        "script": f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom common import rewards, runlog\nprint('first')\n"
        "rewards.Scorer()\nrunlog.Run().log()\nprint('never')\n",
        "small": "X = sum(range(10**6))\n",
        "common/rewards": "import small\nclass Scorer:\n    def __init__(self):\n        sum(range(10**6))\n",
        "common/__init__": "",
        "common/runlog": "class Run:\n    pass\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    call = f"from tests.bench import start; start.watch({str(tmp_path / 'script.py')!r}, [], {str(tmp_path / 'out')!r})"
    subprocess.run([sys.executable, "-c", call], cwd=start.ROOT, check=True)
    found = json.loads((tmp_path / "out").read_text())
    own = {name: seconds for _, name, seconds in found["own"]}
    assert [line[0] for line in found["lines"]] == ["first"]
    assert own["small"] > 0.002 and own["reward workers"] > 0.002
    assert sum(own.values()) == pytest.approx(found["whole"])
    asked = {(package, by) for package, by, _ in found["asked"]}
    assert {("small", "common.rewards"), ("common", "the script")} <= asked and ("common", "common") not in asked
