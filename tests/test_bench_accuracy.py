"""Time to accuracy: its arithmetic on made-up curves, and that our side of a pair still runs. TRL's needs an environment of its
own."""

import copy
import json
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest

from common import UserError
from tests.bench import accuracy
from tests.helpers import ROOT, run, tiny

__all__ = ["tiny"]

# (rollouts, seconds, tokens, greedy accuracy): eight rollouts, so that the last quarter is 7 and 8.
FAST = [[0, 0, 0, 0.1], [2, 4.0, 200, 0.5], [4, 8.0, 390, 0.75], [6, 12.0, 580, 0.6], [7, 14.0, 700, 0.9], [8, 16.0, 800, 0.7]]
SLOW = [[0, 0, 0, 0.1], [2, 10.0, 210, 0.3], [4, 20.0, 400, 0.6], [6, 30.0, 600, 0.72], [7, 35.0, 710, 1], [8, 40.0, 810, 0.8]]


def line(side, curve, first=0.3):
    settings = dict(prompts_per_step=32, group_size=8, lr=1e-4)
    return dict(side=side, task="route", seed=1, model="tiny-route", settings=settings, curve=curve, rewards=[first, 0.5])


def test_a_curve_counts_from_the_start():
    rollouts = [dict(seconds=s, tokens=t, reward=0.5) for s, t in ((1.5, 10), (2.0, 20), (4.0, 50))]
    found = accuracy.curve(rollouts, [(0, 0.1), (2, 0.2), (3, 0.3)])
    assert found == [[0, 0, 0, 0.1], [2, 3.5, 30, 0.2], [3, 7.5, 80, 0.3]]


def test_a_plateau_is_the_mean_of_the_last_quarter():
    assert accuracy.plateau(FAST) == pytest.approx(0.8) and accuracy.plateau(SLOW) == pytest.approx(0.9)
    for rollouts, every in accuracy.RUNS.values():
        curve = [[n, 0, 0, float(n)] for n in range(0, rollouts + 1, every)]
        last = [n for n, *_ in curve if 4 * n > 3 * rollouts]
        assert accuracy.plateau(curve) == mean(last) and len(last) >= 6 and last[-1] == rollouts


def test_the_threshold_is_that_of_the_lower_plateau_and_the_first_evaluation_at_or_above_it_counts():
    pair = accuracy.compare(line("ours", FAST), line("trl", SLOW))
    assert pair["threshold"] == pytest.approx(0.72) and pair["start"] == 0.1
    ours, trl = ({k: pair[s][k] for k in ("rollouts", "seconds", "tokens", "reached")} for s in ("ours", "trl"))
    assert ours == dict(rollouts=4, seconds=8.0, tokens=390, reached=True)  # also where it falls below once more
    assert trl == dict(rollouts=6, seconds=30.0, tokens=600, reached=True)
    assert [pair[k] for k in ("seconds", "tokens", "whole")] == pytest.approx([8 / 30, 390 / 600, 16 / 40])
    assert accuracy.reach(SLOW, 0.72)[0] == (6, 30.0, 600) and accuracy.reach(SLOW, 0.7201)[0] == (7, 35.0, 710)


def test_a_side_that_never_gets_there_counts_with_its_whole_run_and_is_marked(monkeypatch):
    assert accuracy.reach(FAST, 0.95) == ((8, 16.0, 800), False)
    monkeypatch.setattr(accuracy, "SHARE", 1.15)  # 0.92: with the real share the last quarter itself holds one
    pair = accuracy.compare(line("ours", FAST), line("trl", SLOW))
    assert not pair["ours"]["reached"] and pair["trl"]["reached"]
    assert [pair[k] for k in ("seconds", "tokens")] == pytest.approx([16 / 35, 800 / 710])
    found = {"route": dict(pairs=[pair])}
    assert "| route | 0.46 (0.46 to 0.46) * | 1.13 (1.13 to 1.13) * | 0.40 (0.40 to 0.40) | 0.100 |" in accuracy.table(found)
    told = "route: seconds 0.46, goal 0.5: missed; ours never reached the threshold in 1 of 1"
    assert accuracy.verdict("route", [pair]) == told


def test_table_and_verdict():
    pairs = [accuracy.compare(line("ours", FAST), line("trl", SLOW)) for _ in range(3)]
    for pair, seconds in zip(pairs, (0.3, 0.6, 0.5)):
        pair["seconds"] = seconds
    rows = accuracy.table({"route": dict(pairs=pairs)}).splitlines()
    assert rows[2].startswith("| route | 0.50 (0.30 to 0.60) | 0.65 (0.65 to 0.65) | 0.40 (0.40 to 0.40) | 0.100 | 0.720 ")
    assert rows[7].startswith("| route | trl | 30.0 (30.0 to 30.0) | 600 (600 to 600) | 6 (6 to 6) | 0.900 ")
    assert rows[7].endswith("| 3 of 3 |")
    assert accuracy.verdict("route", pairs) == "route: seconds 0.50, goal 0.5: reached"
    pairs[0]["seconds"] = 0.51
    assert accuracy.verdict("route", pairs) == "route: seconds 0.51, goal 0.5: missed"


def test_a_pair_that_does_not_begin_alike_is_refused():
    a, b = line("ours", FAST), line("trl", SLOW, first=0.4)
    accuracy.same_start(a, b)  # 0.1 is within 4 * sqrt(2 * 0.35 * 0.65 / 256) = 0.169
    with pytest.raises(AssertionError, match=r"\(0.3, 0.5\)"):
        accuracy.same_start(a, line("trl", SLOW, first=0.5))
    other = dict(b["settings"], lr=1e-3)
    for change in (dict(model="tiny-other"), dict(curve=[[0, 0, 0, 0.102], *SLOW[1:]]), dict(settings=other)):
        with pytest.raises(AssertionError):
            accuracy.same_start(a, copy.deepcopy(b) | change)


def test_a_threshold_at_the_start_is_refused():
    start = [[0, 0, 0, 0.8], *FAST[1:]]
    with pytest.raises(UserError, match="route, seed 1: the start's accuracy is at the threshold, 0.720"):
        accuracy.compare(line("ours", start), line("trl", SLOW))


def test_a_task_without_a_number_of_rollouts_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(accuracy, "environment", lambda: pytest.fail("it was about to make the environment"))
    with pytest.raises(UserError, match="--tasks gsm8k: how many rollouts"):
        accuracy.main(accuracy.Options(tasks=("gsm8k",)))


def test_pairs_run_in_turn_and_are_written_as_they_come(monkeypatch, tmp_path, capsys):
    calls, out = [], tmp_path / "new" / "accuracy"

    def one(python, side, task, seed, options):
        assert seed == 1 or json.loads(out.with_suffix(".json").read_text())["results"]["route"]["pairs"]  # pair 1 is there
        calls.append((python, side, task, seed))
        return line(side, FAST if side == "ours" else SLOW) | dict(seed=seed, core=0.5)

    monkeypatch.setattr(accuracy, "environment", lambda: "an interpreter")
    monkeypatch.setattr(accuracy, "run", one)
    monkeypatch.setattr(accuracy.subprocess, "run", lambda argv, **kwargs: SimpleNamespace(stdout="2.13 5.19 1.16.0\n"))
    accuracy.main(accuracy.Options(tasks=("route",), pairs=2, out=str(out)))
    assert calls == [("an interpreter", side, "route", seed) for seed in (1, 2) for side in ("ours", "trl")]
    record, told = json.loads(out.with_suffix(".json").read_text()), capsys.readouterr().out
    assert record["versions"] == dict(torch="2.13", transformers="5.19", trl="1.16.0") and record["share"] == 0.9
    found = record["results"]["route"]
    assert [p["seconds"] for p in found["pairs"]] == pytest.approx([8 / 30] * 2)
    assert found["trl"][1]["curve"] == SLOW and found["ours"][0]["curve"] == FAST
    assert "route 2/2 trl: 8 rollouts, 40.0 s, 810 tokens, had a core for 50%; greedy accuracy 0.100 -> 0.800" in told
    ending = out.with_suffix(".md").read_text().partition("\n\n")[2]
    assert told.endswith(ending) and ending.endswith("route: seconds 0.27, goal 0.5: reached\n")
    unlike = dict(ours=line("ours", FAST), trl=line("trl", SLOW, first=0.9))
    monkeypatch.setattr(accuracy, "run", lambda python, side, *others: unlike[side] | dict(core=1.0))
    with pytest.raises(AssertionError, match=r"\(0.3, 0.9\)"):
        accuracy.main(accuracy.Options(tasks=("route",), pairs=1))


def test_our_side_runs_through_the_script_itself(tmp_path, tiny):
    argv = "--side ours --tasks addition --rollouts 2 --prompts 64 --seed 3".split()
    done = run(tmp_path, *argv, script=ROOT / "tests" / "bench" / "accuracy.py")
    assert done.code == 0, done.err
    found = json.loads(done.out)  # this line alone
    assert (found["side"], found["task"], found["seed"], found["model"]) == ("ours", "addition", 3, Path(tiny).name)
    some = dict(steps=2, eval_every=1, eval_prompts=64, prompts_per_step=32, group_size=8, minibatches=8, lr=1e-4, eps=0.2)
    assert found["settings"].items() >= some.items() and found["settings"]["max_new_tokens"] == 28
    (zero, first, second), rewards = found["curve"], found["rewards"]
    assert zero[:3] == [0, 0, 0] and [first[0], second[0]] == [1, 2] and 0 < first[1] < second[1]
    assert 2 * 256 <= first[2] and first[2] + 2 * 256 <= second[2] <= 2 * 28 * 256  # tokens add up over rollouts
    assert all(64 * accuracy % 1 == 0 for *_, accuracy in found["curve"]) and second[3] > zero[3]
    assert 0 < found["core"] < 1.1 and len(rewards) == 2 and all(0 < 256 * r < 256 and 256 * r % 1 == 0 for r in rewards)
