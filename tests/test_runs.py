"""Runs: the same seed gives the same run, whatever interrupts it; folders, checkpoints and files hold what they should."""

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from tests import helpers
from tests.helpers import (
    GRPO,
    ROOT,
    SMALL,
    Child,
    checkpoints,
    contents,
    die_at,
    lines,
    outcome,
    run,
    same,
    start,
    tiny,
    user_error,
)

__all__ = ["tiny"]
SCRIPTS = sorted(p.stem for p in (ROOT / "algos").glob("*.py") if p.stem != "__init__")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A run that nothing interrupts, by `python algos/grpo.py` itself: folder, what it printed, outcome."""
    top = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [sys.executable, str(GRPO), *SMALL, "--run-dir", str(top / "run")],
        cwd=top, capture_output=True, text=True, timeout=400, env=os.environ | dict(PYTHONPATH=""),
        preexec_fn=lambda: os.sched_setaffinity(0, helpers.CORE),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return top / "run", done, outcome(top / "run")


def copy(whole, tmp_path):
    """A copy of the whole run's folder, and where it came from as the same shape of checkpoints: steps 4 and 6."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------- the seed decides


def test_same_seed_same_run(whole, tmp_path):
    """Also says that a forked child is as good as a process of its own, which the other tests rely on."""
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    same(outcome(tmp_path / "run"), whole[2])
    assert len(whole[2].metrics) == 6 and whole[2].last == "step-000006"


def test_another_seed_another_run(whole, tmp_path):
    assert run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", "--seed", 2).code == 0
    other = outcome(tmp_path / "run")
    assert len(other.metrics) == 6 and not set(other.metrics) & set(whole[2].metrics)
    assert other.weights != whole[2].weights


# ---------------------------------------------------------------- what a run leaves behind


def test_what_is_printed(whole):
    _, done, _ = whole
    assert done.stderr == ""
    printed = done.stdout.splitlines()
    assert re.fullmatch(r"greedy accuracy \d\.\d\d -> \d\.\d\d on 32 held-out prompts", printed[-1])
    # What was given, and what is always of interest; a flag that was left open is not there.
    first, given = printed[:2]
    assert first == "grpo: loading transformers"  # a sign of life
    assert given.startswith("grpo: model=tiny task=addition seed=1 steps=6 prompts_per_step=8 group_size=4 minibatches=2 ")
    assert "lr=" not in given and "None" not in given and given.endswith("its preset's (config.json)")
    checkpoint = whole[0] / "checkpoints" / "step-000006"
    assert f"curves: tensorboard --logdir {whole[0]}" in printed and f"talk to it: python -m runs.talk {whole[0]}" in printed
    assert printed[-2].endswith(f"from_pretrained: {checkpoint}")
    assert f"run folder {whole[0]}" in printed


def test_config_json(whole):
    import transformers

    config = json.loads((whole[0] / "config.json").read_text())
    assert config["script"] == "grpo" and config["world_size"] == 1 and config["device"] == "cpu"
    expected = dict(model="tiny", task="addition", steps=6, lr=1e-4, dtype="float32", optimizer="adamw", eps=0.2, resume=None)
    assert expected.items() <= config["args"].items()
    none = [k for k, v in config["args"].items() if v is None]
    assert none == ["reward", "prompt_template", "system_prompt", "resume", "push_to_hub", "lora_alpha"]
    assert config["versions"] == dict(
        python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__
    )
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert config["git_commit"] == (head or None)


def test_metrics_are_consistent(whole):
    rows = lines(whole[0] / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for r in rows:
        assert r["reward"] == r["accuracy"] == pytest.approx(round(r["reward"] * 32) / 32, abs=1e-12)
        assert r["length"] * 32 == pytest.approx(r["tokens"])
        assert r["skipped_updates"] == 0 and r["sampler_gap_max"] < 1e-4
        assert r["time/step"] == pytest.approx(r["time/rollout"] + r["time/old_logp"] + r["time/update"])
    samples = lines(whole[0] / "samples.jsonl")
    assert [s["step"] for s in samples] == [step for step in range(1, 7) for _ in range(4)]


def test_every_evaluation_is_recorded(whole):
    """Before, every third step, and after: the last line of stdout is not the only place where the result is."""
    rows = lines(whole[0] / "evals.jsonl")
    assert [r["step"] for r in rows] == [0, 3, 6] and {r["prompts"] for r in rows} == {32}
    said = re.search(r"greedy accuracy (\S+) -> (\S+) on", whole[1].stdout.splitlines()[-1]).groups()
    assert said == tuple(f"{rows[i]['greedy_accuracy']:.2f}" for i in (0, -1))


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_tensorboard(whole):
    rows = lines(whole[0] / "metrics.jsonl")
    for tag in ("reward", "entropy", "grad_norm", "time/tokens_per_s"):
        assert scalars(whole[0], tag) == [(r["step"], pytest.approx(r[tag], rel=1e-6)) for r in rows]
    assert [step for step, _ in scalars(whole[0], "greedy_accuracy")] == [0, 3, 6]


def test_two_checkpoints_stay_and_are_whole(whole):
    folders = checkpoints(whole[0])
    assert [f.name for f in folders] == ["step-000004", "step-000006"]
    assert [p.name for p in (whole[0] / "checkpoints").iterdir() if p.name.endswith(".tmp")] == []
    for folder in folders:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"} == set(files)
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    a, b = (load_file(f / "model.safetensors") for f in folders)
    assert a.keys() == b.keys() and any(not torch.equal(a[k], b[k]) for k in a)


def test_a_checkpoint_is_a_model(whole, tmp_path):
    """For transformers, and for --model: the run goes on from the accuracy that it ended with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoints(whole[0])[-1]
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("12+34=", return_tensors="pt").input_ids
    text = tokenizer.decode(lm.generate(ids, max_new_tokens=28, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "2+4=06 1+3+0=04:46"
    argv = "--task addition --dtype float32 --optimizer adamw --steps 0 --eval-prompts 32 --max-new-tokens 28".split()
    done = run(tmp_path, "--model", folder, *argv, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    after = lines(whole[0] / "evals.jsonl")
    accuracy = float(re.search(r"-> (\S+) on", whole[1].stdout.splitlines()[-1])[1])
    assert lines(tmp_path / "run" / "evals.jsonl")[0]["greedy_accuracy"] == pytest.approx(accuracy, abs=0.005), after
    assert done.out.splitlines()[-1].startswith("evaluation only (no steps): greedy accuracy ")
    assert len(lines(tmp_path / "run" / "evals.jsonl")) == 1
    assert "memory plan per process" in done.out and ": fits" in done.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert (config["group_size"], config["lr"], config["minibatches"]) == (8, 1e-4, 8)  # the tiny preset, by what the folder is


def test_a_second_run_does_not_write_into_the_first(whole, tmp_path):
    before = {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()}
    said = user_error(run(tmp_path, *SMALL, "--run-dir", whole[0]))
    assert "already holds a run" in said and f"--resume {whole[0]}" in said
    assert before == {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()}


def test_without_git(whole, tmp_path):
    """A machine without git, or a copy without .git: the commit is then not known, and that is all."""
    done = run(tmp_path, *SMALL[2:], "--steps", 0, "--run-dir", tmp_path / "run", env=dict(PATH=str(tmp_path)))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git_commit"] is None


# ---------------------------------------------------------------- killed, and resumed


def killed(child, result=None):
    result = child.wait()
    assert result.code == -signal.SIGKILL, (result.code, result.err)
    return result


def resumed(tmp_path, whole, *argv):
    """`--resume DIR` alone must end as the run that nothing interrupted."""
    done = run(tmp_path, "--resume", tmp_path / "run", *argv)
    assert done.code == 0, done.err
    assert done.err == "" and "resumed from" in done.out
    same(outcome(tmp_path / "run"), whole[2])
    assert done.out.splitlines()[-1] == whole[1].stdout.splitlines()[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    assert [c.name for c in checkpoints(tmp_path / "run")][-2:] == ["step-000004", "step-000006"]
    return done


def test_killed_after_the_first_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    child = start(tmp_path, *SMALL, "--run-dir", folder)
    assert child.until(lambda: checkpoints(folder)), child.wait()
    child.process.kill()
    killed(child)
    resumed(tmp_path, whole)


def test_killed_in_a_step(whole, tmp_path):
    """And with a line of metrics cut short, as a kill in the middle of writing leaves it."""
    folder = tmp_path / "run"
    child = start(tmp_path, *SMALL, "--run-dir", folder)
    assert child.until(lambda: helpers.logged(folder) == 5), child.wait()
    child.process.kill()
    killed(child)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 0.0')
    assert helpers.logged(folder) == 5
    assert "step-000004" in resumed(tmp_path, whole).out
    # what was logged before the kill is on the board, every step once
    rows = lines(folder / "metrics.jsonl")
    assert scalars(folder, "reward") == [(r["step"], pytest.approx(r["reward"], rel=1e-6)) for r in rows]


@pytest.mark.parametrize(
    "function, argument, after, left",
    [
        ("safetensors.torch.save_file", "step-000004.tmp", False, ["step-000002"]),
        ("os.rename", "step-000004.tmp/state/.metadata", False, ["step-000002"]),
        ("os.rename", "step-000004.tmp')", False, ["step-000002"]),
        ("os.rename", "step-000006.tmp')", True, ["step-000002", "step-000004", "step-000006"]),
    ],
)
def test_killed_while_a_checkpoint_is_written(whole, tmp_path, function, argument, after, left):
    folder = tmp_path / "run"
    killed(start(tmp_path, *SMALL, "--run-dir", folder, before=functools.partial(die_at, function, argument, after)))
    assert [c.name for c in checkpoints(folder)] == left
    half = [] if (function, after) == ("os.rename", True) else ["step-000004.tmp"]
    assert [p.name for p in (folder / "checkpoints").glob("*.tmp")] == half
    resumed(tmp_path, whole)


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    """Nothing to continue from: the same command must then be able to start again, or --resume to start at step 0."""
    folder = tmp_path / "run"
    killed(start(tmp_path, *SMALL, "--run-dir", folder, before=functools.partial(die_at, "os.rename", "step-000002.tmp/state")))
    done = run(tmp_path, "--resume", folder)
    if done.code:
        assert "no checkpoint yet" in user_error(done)
        done = run(tmp_path, *SMALL, "--run-dir", folder)
    assert done.code == 0, done.err
    same(outcome(folder), whole[2])


def test_asked_to_stop(whole, tmp_path):
    """Ctrl-C; SIGTERM has the same handler."""
    folder = tmp_path / "run"
    child = start(tmp_path, *SMALL, "--run-dir", folder)
    assert child.until(lambda: helpers.logged(folder) == 3), child.wait()
    os.kill(child.pid, signal.SIGINT)
    done = child.wait()
    assert done.code == 0 and "Traceback" not in done.err
    assert done.err == "\nstopping after this step (once more to stop at once)\n"
    step = len(lines(folder / "metrics.jsonl"))
    assert 3 <= step < 6 and checkpoints(folder)[-1].name == f"step-{step:06d}"
    assert done.out.splitlines()[-1] == f"stopped after step {step}; continue with --resume {folder}"
    done = run(tmp_path, "--resume", folder)
    assert done.code == 0, done.err
    same(outcome(folder), whole[2])
    rows = lines(folder / "metrics.jsonl")
    assert scalars(folder, "reward") == [(r["step"], pytest.approx(r["reward"], rel=1e-6)) for r in rows]


def test_asked_to_stop_in_the_last_step(whole, tmp_path):
    """By SIGTERM; the last evaluation is made up for by the resume."""
    folder = tmp_path / "run"
    child = start(tmp_path, *SMALL, "--run-dir", folder)
    assert child.until(lambda: helpers.logged(folder) == 5), child.wait()
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait().code == 0
    resumed_or_done = run(tmp_path, "--resume", folder)
    assert resumed_or_done.code == 0, resumed_or_done.err
    same(outcome(folder), whole[2])
    assert resumed_or_done.out.splitlines()[-1] == whole[1].stdout.splitlines()[-1]


def noisy():
    """Stands for stochastic rounding and dropout: every update draws from torch's own generator."""
    from common import gpu

    real = gpu.clip_gradients

    def clip(policy, max_norm):
        for p in policy.parameters():
            p.grad += 1e-3 * torch.randn_like(p)
        return real(policy, max_norm)

    gpu.clip_gradients = clip


def test_resumed_with_randomness_in_the_update(whole, tmp_path):
    assert run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", before=noisy).code == 0
    expected = outcome(tmp_path / "run")
    assert expected.weights != whole[2].weights
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    assert run(tmp_path, "--resume", tmp_path / "run", before=noisy).code == 0
    same(outcome(tmp_path / "run"), expected)


# ---------------------------------------------------------------- damaged checkpoints


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: cut(f / "model.safetensors"),
        lambda f: flip(f / "model.safetensors"),
        lambda f: cut(f / "state" / "__0_0.distcp"),
        lambda f: (f / "manifest.json").unlink(),
    ],
    ids=["weights cut", "a bit of the weights", "state cut", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, damage):
    """It is said, the one before is used, and in the end a whole one stands in its place."""
    folder = copy(whole, tmp_path)
    damage(folder / "checkpoints" / "step-000006")
    done = resumed(tmp_path, whole)
    said = [line for line in done.out.splitlines() if line.startswith("checkpoint ")]
    assert len(said) == 1 and "step-000006 is damaged (" in said[0] and "using the one before it" in said[0]
    assert f"resumed from {folder / 'checkpoints' / 'step-000004'}" in done.out


def test_no_whole_checkpoint(whole, tmp_path):
    folder = copy(whole, tmp_path)
    for c in checkpoints(folder):
        cut(c / "model.safetensors")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert "no whole checkpoint is left" in user_error(run(tmp_path, "--resume", folder))
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_full_disk_is_said(whole, tmp_path):
    """No file may grow over 300 KB (the weights have 900): one line, and the run can be resumed afterwards."""
    folder = copy(whole, tmp_path)
    for name in ("step-000006",):
        shutil.rmtree(folder / "checkpoints" / name)
    said = user_error(run(tmp_path, "--resume", folder, before=small_files))
    assert "cannot write the checkpoint" in said and "step-000006" in said
    resumed(tmp_path, whole)


def small_files():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


# ---------------------------------------------------------------- what a resumed run may change


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (("--model", "tiny-small"), "the checkpoint is of another model (qwen2 2 x 96, vocabulary 78)"),
        (("--group-size", "8"), "--group-size is 4 there, not 8"),
        (("--epochs", "2"), "--epochs is 1 there, not 2"),
        (("--beta", "0.0", "--minibatches", "8"), "--minibatches is 2 there, not 8"),
        (("--seed", "5"), "--seed is 1 there, not 5"),
        (("--lr", "1e-3"), "--lr is 0.0001 there, not 0.001"),
        (("--eps", "0.1"), "--eps is 0.2 there, not 0.1"),
    ],
)
def test_a_resumed_run_keeps_its_settings(whole, tmp_path, argv, complaint):
    before = {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()}
    assert complaint in user_error(run(tmp_path, "--resume", whole[0], *argv))
    assert before == {p: p.read_bytes() for p in whole[0].rglob("*") if p.is_file()}


def test_settings_that_are_repeated_are_no_change(whole, tmp_path):
    copy(whole, tmp_path)
    resumed(tmp_path, whole, "--group-size", 4, "--lr", "1e-4", "--task", "addition")


def test_resume_of_another_script(whole, tmp_path):
    other = next(s for s in SCRIPTS if s != "grpo")
    said = user_error(run(tmp_path, "--resume", whole[0], script=ROOT / "algos" / f"{other}.py"))
    assert f"a run of grpo.py, not of {other}.py" in said


@pytest.mark.parametrize("what", ["nothing", "empty", "a model", "a checkpoint", "a list", "no json"])
def test_resume_of_what_is_no_run(whole, tiny, tmp_path, what):
    folder = {"a model": tiny, "a checkpoint": checkpoints(whole[0])[-1]}.get(what, tmp_path / "folder")
    if what not in ("nothing", "a model", "a checkpoint"):
        folder.mkdir()
    if what in ("a list", "no json"):
        (folder / "config.json").write_text("[1]" if what == "a list" else "{")
    assert f"--resume {folder}: no run there" in user_error(run(tmp_path, "--resume", folder))


def test_more_steps(whole, tmp_path):
    """A finished run goes on; the steps that it had stay as they were, and further ones are those of a longer run. Killed
    there, it still knows how far it was to go."""
    folder = copy(whole, tmp_path)
    killed(start(tmp_path, "--resume", folder, "--steps", 10, before=functools.partial(die_at, "os.rename", "step-000010")))
    assert [r["step"] for r in lines(folder / "metrics.jsonl")] == list(range(1, 11))
    done = run(tmp_path, "--resume", folder)
    assert done.code == 0, done.err
    longer = [*SMALL, "--run-dir", tmp_path / "longer"]
    longer[1] = "10"
    assert run(tmp_path, *longer).code == 0
    a, b = outcome(folder), outcome(tmp_path / "longer")
    assert a.metrics[:6] == whole[2].metrics
    assert a.metrics == b.metrics and a.last == b.last == "step-000010" and a.weights == b.weights


# ---------------------------------------------------------------- updates that are not finite


def poison(*updates):
    """Makes the gradient of the updates with these numbers (from 1) not finite."""
    from common import gpu

    real, count = gpu.clip_gradients, [0]

    def clip(policy, max_norm):
        count[0] += 1
        if count[0] in updates:
            next(iter(policy.parameters())).grad.view(-1)[count[0]] = float("nan")
        return real(policy, max_norm)

    gpu.clip_gradients = clip


def test_an_update_that_is_not_finite_is_skipped(tiny, tmp_path):
    """All updates of one step poisoned: the weights are those of the start, bit for bit, and so is the optimizer."""
    argv = "--task addition --steps 1 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --run-dir".split()
    done = run(tmp_path, *argv, tmp_path / "run", before=functools.partial(poison, 1, 2))
    assert done.code == 0, done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["skipped_updates"] == 2
    folder = checkpoints(tmp_path / "run")[-1]
    a, b = load_file(f"{tiny}/model.safetensors"), load_file(folder / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    saved = contents(folder)
    assert saved["state"]["skipped"] == 2 and not saved["optimizer"]  # it has made no step


def test_the_run_goes_on_after_a_skipped_update(tiny, tmp_path):
    """4, then 1, then 4 bad ones, never five in a row."""
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", before=functools.partial(poison, 1, 2, 3, 4, 6, 9, 10, 11, 12))
    assert done.code == 0, done.err
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["skipped_updates"] for r in rows] == [2, 4, 5, 5, 7, 9]
    a, b = load_file(f"{tiny}/model.safetensors"), load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert any(not torch.equal(a[k], b[k]) for k in a) and all(v.isfinite().all() for v in b.values())


def test_five_in_a_row_stop_the_run(tiny, tmp_path):
    """End to end: a rate of 1e30 makes the first update finite and everything after it not."""
    said = user_error(run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", "--lr", "1e30"))
    assert "not finite in 5 updates in a row (step 3)" in said and "smaller --lr" in said
    assert str(tmp_path / "run" / "metrics.jsonl") in said
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["skipped_updates"] for r in rows] == [1, 3]


def test_metrics_are_json_even_where_numbers_are_not(tiny, tmp_path):
    """NaN is no JSON: other readers than Python's refuse the whole file."""
    argv = "--steps 1 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --task addition --run-dir".split()
    run(tmp_path, *argv, tmp_path / "run", before=functools.partial(poison, 1))

    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_finite():
    from common import UserError, runlog

    one = runlog.Run.__new__(runlog.Run)
    one.bad_in_a_row, one.state, one.dir = 0, dict(step=6, skipped=0), ROOT / "runs" / "nowhere"
    nan, inf = float("nan"), float("inf")
    assert one.finite(1.0, 2.0) and one.finite(0.0) and one.state["skipped"] == 0
    assert not one.finite(nan, 1.0) and not one.finite(1.0, inf) and not one.finite(-inf, nan) and not one.finite(nan)
    assert one.state["skipped"] == 4 and one.finite(1.0) and one.state["skipped"] == 4
    for _ in range(4):
        assert one.finite(1.0, nan) is False
    with pytest.raises(UserError, match=r"5 updates in a row \(step 7\)"):
        one.finite(1.0, nan)
    assert one.state["skipped"] == 9


# ---------------------------------------------------------------- two at once


def make_tiny(cache):
    """In a child: a warm start of few steps."""
    from common import tasks
    from common.worlds import tiny

    tiny.RECIPE |= dict(steps=6, careful_steps=3, batch=8)
    print(tiny.warm_start(tasks.load("addition"), cache=cache))


def test_two_processes_make_one_model(tmp_path):
    """Both start in an empty cache; one model, its folder whole at all times, and nothing else left but the lock."""
    cache = tmp_path / "cache"
    children = [Child(functools.partial(make_tiny, str(cache)), tmp_path) for _ in range(2)]
    done = [c.wait() for c in children]
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    folders = [p for p in cache.iterdir() if p.is_dir()]
    assert len(folders) == 1 and all(d.out.splitlines()[-1] == str(folders[0]) for d in done)
    assert sum("making a tiny model for addition:2" in d.out for d in done) == 1
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".lock"]
    made = (folders[0] / "model.safetensors").stat().st_mtime_ns
    weights = (folders[0] / "model.safetensors").read_bytes()
    again = Child(functools.partial(make_tiny, str(cache)), tmp_path).wait()
    assert again.out == f"{folders[0]}\n" and (folders[0] / "model.safetensors").stat().st_mtime_ns == made
    shutil.rmtree(cache)
    Child(functools.partial(make_tiny, str(cache)), tmp_path, env=dict(TOKENPO_CACHE="/proc/nowhere")).wait()
    assert (folders[0] / "model.safetensors").read_bytes() == weights


def test_the_cache_may_be_elsewhere(tmp_path):
    """$TOKENPO_CACHE, and a warm start that was killed leaves nothing that the next one trips over."""
    cache = tmp_path / "cache"
    target = functools.partial(make_tiny, None)
    dead = Child(functools.partial(dying, target), tmp_path, env=dict(TOKENPO_CACHE=str(cache))).wait()
    assert dead.code == -signal.SIGKILL and [p.suffix for p in cache.iterdir() if p.is_dir()] == [".tmp"]
    done = Child(target, tmp_path, env=dict(TOKENPO_CACHE=str(cache))).wait()
    assert done.code == 0, done.err
    (folder,) = [p for p in cache.iterdir() if p.is_dir()]
    assert done.out.endswith(f"\n{folder}\n")
    assert (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()


def dying(target):
    die_at("os.rename", ".tmp")
    target()


# ---------------------------------------------------------------- without a language model, without training


@dataclass
class Scores:
    """Args of a script that trains nothing."""

    seed: int = 1
    items: int = 6
    resume: str | None = None
    run_dir: str | None = None


@dataclass
class ScoresOfAModel(Scores):
    model: str = "tiny"
    task: str | None = None
    dtype: str | None = None
    max_new_tokens: int | None = None


def scoring(args):
    """In a child: a script that measures and does not train; with a model, if its Args have one."""
    from common import models, runlog, settings, tasks

    args, config, device = settings.prepare("scores.py", args)
    more = ()
    if "model" in vars(args):
        tokenizer = models.load_tokenizer(args)
        task = tasks.load(args.task, tokenizer)
        more = (config, tokenizer, models.check_context(config, task, args))
        policy = models.load(args, device, trainable=False)
        assert not any(p.requires_grad for p in policy.parameters())
    run = runlog.Run("scores.py", args, *more, trained=0, frozen=int(bool(more)))
    for item in range(args.items):
        run.timed("score")
        run.write(dict(auroc=item / 8), 3, dict(auroc="AUROC"))
    run.measured(dict(auroc=0.75, prompts=6))
    run.finish("AUROC 0.75 on 6 prompts")


def scored(folder, done):
    assert done.code == 0 and done.err == "", done.err
    rows = lines(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and [r["auroc"] for r in rows] == [i / 8 for i in range(6)]
    assert lines(folder / "evals.jsonl") == [dict(step=6, auroc=0.75, prompts=6)]
    assert done.out.startswith("scores: seed=1 run_dir=") and f"run folder {folder}" in done.out
    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "scores" and config["args"]["items"] == 6
    return config


def test_a_run_without_a_model(tmp_path):
    done = Child(functools.partial(scoring, Scores(run_dir=str(tmp_path / "run"))), tmp_path).wait()
    assert scored(tmp_path / "run", done)["model_config"] is None
    assert scalars(tmp_path / "run", "auroc") == [(i + 1, i / 8) for i in range(6)] + [(6, 0.75)]


def test_a_run_without_a_model_ends_with_its_sentence(tmp_path):
    done = Child(functools.partial(scoring, Scores(run_dir=str(tmp_path / "run"))), tmp_path).wait()
    assert done.out.splitlines()[-1] == "AUROC 0.75 on 6 prompts"


@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_a_run_that_trains_nothing(tmp_path, tiny, model):
    """Its Args have no rate, no optimizer, no engine: the memory plan of a real model must not want them."""
    if model == "folder":  # one that is not known to be a tiny model
        model = shutil.copytree(tiny, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | dict(warm_started_on=None)))
    model = str(model)
    args = ScoresOfAModel(run_dir=str(tmp_path / "run"), model=model, task="addition", dtype="float32", max_new_tokens=28)
    done = Child(functools.partial(scoring, args), tmp_path).wait()
    config = scored(tmp_path / "run", done)
    assert config["model_config"]["vocab_size"] == 78 and "lr" not in config["args"]
    assert ("memory plan per process" in done.out) == (model != "tiny")
    assert "gradients" not in done.out and "optimizer" not in done.out


@dataclass
class Fit:
    """Args of a script that trains a module of its own."""

    seed: int = 1
    steps: int = 6
    eval_every: int = 3
    checkpoint_every: int = 2
    lr: float | None = None
    weight_decay: float = 0.0
    optimizer: str | None = None
    resume: str | None = None
    run_dir: str | None = None


def fitting(folder, resume=False, steps=6, dropout=0.2, width=8, before=None):
    """A regression by a small network, and beside it another, in float64; dropout draws from torch's own generator."""
    from torch import nn

    from common import gpu, runlog, settings

    if before:
        before()
    args, config, _ = settings.prepare("fit.py", Fit(steps=steps, **{"resume" if resume else "run_dir": str(folder)}))
    assert config is None and args.lr == 1e-4 and args.optimizer == "adamw"  # the preset's
    run = runlog.Run("fit.py", args)
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, 4, dtype=torch.float64).unbind()
    module = gpu.shard(nn.Sequential(nn.Linear(4, width), nn.Dropout(dropout), nn.Tanh(), nn.Linear(width, 4)).double())
    module.register_buffer("passes", torch.zeros(()))  # what is no parameter is state as well
    beside = gpu.shard(nn.Linear(4, 4).double())
    optimizer, own = gpu.make_optimizer(module, args), gpu.make_optimizer(beside, args)
    run.extra["beside"] = (beside, own)
    run.restore(module, optimizer)
    mine = gpu.local(torch.arange(8))

    def evaluate():
        module.eval()
        with torch.no_grad():
            error = gpu.total((module(x[mine]) - y[mine]).square().sum().item()) / 8
        module.train()
        return dict(error=error, prompts=8)

    for _ in run.steps(module, optimizer, evaluate):
        loss = ((module(x[mine]) - y[mine]).square().sum() + (beside(x[mine]) - y[mine]).abs().sum()) / 8
        loss.backward()
        norms = gpu.clip_gradients(module, 1.0), gpu.clip_gradients(beside, 1.0)
        loss = gpu.total(loss.item())
        if run.finite(loss, *norms):
            optimizer.step(), own.step()
        optimizer.zero_grad(), own.zero_grad()
        module.passes += 1
        run.state["seen"] = run.state.get("seen", 0) + 8
        run.timed("update")
        run.write(dict(loss=loss, norm=norms[0], passes=module.passes.item()), 8, dict(loss="loss"))
    run.finish()
    gpu.finish()


def fit(tmp_path, folder, **kwargs):
    return Child(functools.partial(fitting, str(folder), **kwargs), tmp_path).wait()


def fitted(folder):
    """What must be the same bit for bit; floats as their bits."""
    last = checkpoints(folder)[-1]
    state = contents(last)
    assert {"own", "beside", "optimizer", "state"} <= state.keys() and len(state["own"]) >= 4
    rows = [{k: v for k, v in r.items() if not k.startswith("time/")} for r in lines(folder / "metrics.jsonl")]
    return last.name, rows, lines(folder / "evals.jsonl"), plain(state)


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture(scope="module")
def whole_fit(tmp_path_factory):
    top = tmp_path_factory.mktemp("fit")
    done = fit(top, top / "run")
    assert done.code == 0 and done.err == "", done.err
    return top / "run", done, fitted(top / "run")


def test_any_module_can_be_trained(whole_fit):
    folder, done, (last, rows, evals, state) = whole_fit
    assert last == "step-000006" and [r["step"] for r in rows] == [r["passes"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in evals] == [0, 3, 6] and state["state"]["seen"] == 48
    first, after = evals[0]["error"], evals[-1]["error"]
    assert done.out.splitlines()[-1] == f"error {first:.2f} -> {after:.2f} on 8 held-out prompts" and after < first
    assert json.loads((folder / "config.json").read_text())["model_config"] is None
    assert {p.name for p in checkpoints(folder)[-1].iterdir()} == {"state", "manifest.json"}  # no model folder


@pytest.mark.parametrize(
    "function, argument, after",
    [("os.rename", "000002.tmp/state", False), ("os.rename", "000004.tmp/state", False), ("os.rename", "000004.tmp')", True)],
)
def test_any_module_survives_a_kill(whole_fit, tmp_path, function, argument, after):
    dead = fit(tmp_path, tmp_path / "run", before=functools.partial(die_at, function, argument, after))
    assert dead.code == -signal.SIGKILL
    done = fit(tmp_path, tmp_path / "run", resume=True)
    assert done.code == 0 and done.err == "", done.err
    assert fitted(tmp_path / "run") == whole_fit[2]
    assert done.out.splitlines()[-1] == whole_fit[1].out.splitlines()[-1]


def test_a_damaged_checkpoint_of_any_module(whole_fit, tmp_path):
    shutil.copytree(whole_fit[0], tmp_path / "run")
    flip(checkpoints(tmp_path / "run")[-1] / "state" / "__0_0.distcp")
    done = fit(tmp_path, tmp_path / "run", resume=True)
    assert done.code == 0 and "step-000006 is damaged (" in done.out, done.err
    assert fitted(tmp_path / "run") == whole_fit[2]


def test_a_checkpoint_of_another_module(whole_fit, tmp_path):
    shutil.copytree(whole_fit[0], tmp_path / "run")
    said = user_error(fit(tmp_path, tmp_path / "run", resume=True, width=9))
    assert f"--resume {tmp_path / 'run'}: the checkpoint is of another model" in said


# ---------------------------------------------------------------- importing


IMPORT = """
import sys, importlib
sys.path.insert(0, {root!r})
for name in {names!r}:
    importlib.import_module("algos." + name)
"""

COPIED = """
import dataclasses, importlib, inspect, sys
for name in ("common", "tyro", "transformers", "tqdm", "tests", "algos"):
    sys.modules[name] = None  # an import of it fails
sys.path.insert(0, {folder!r})
import torch
done = []
for name in {names!r}:
    script = importlib.import_module(name)
    assert script.__file__.startswith({folder!r}), script.__file__
    args = script.Args(max_new_tokens=3) if "max_new_tokens" in script.Args.__annotations__ else script.Args()
    assert getattr(args, "model", "tiny") in ("tiny", "tiny-deep", "tiny-small") and dataclasses.is_dataclass(args)
    plain = lambda f, n: callable(f) and sum(
        p.default is p.empty for p in inspect.signature(f).parameters.values()) == n
    if not (plain(getattr(script, "surrogate", None), 5) and plain(getattr(script, "advantages", None), 2)):
        continue
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    adv = script.advantages(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), args)
    adv = adv.reshape(-1, 1).expand(4, 3) if adv.shape == (2, 2) else adv
    old = torch.full((4, 3), -1.0)
    logp = (old + 0.01).requires_grad_()
    objective, stats = script.surrogate(logp, old, adv, mask, args)
    more = list(inspect.signature(script.token_weights).parameters)[2:]
    weights = script.token_weights(mask, args, *(torch.rand(4, 3) for _ in more))
    loss = -(objective * weights)[mask].sum()
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all() and objective.shape == weights.shape == (4, 3)
    done.append(name)
print(" ".join(done))
"""


def isolated(code, cwd):
    done = subprocess.run([sys.executable, "-I", "-B", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_importing_a_script_does_nothing(tmp_path):
    before = {p: p.stat().st_mtime_ns for p in ROOT.rglob("*") if ".git" not in p.parts and "__pycache__" not in p.parts}
    here = [p for p in before if p.parts[len(ROOT.parts)] in ("algos", "common")]
    assert isolated(IMPORT.format(root=str(ROOT), names=SCRIPTS), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert all(p.stat().st_mtime_ns == before[p] for p in here if p.is_file())


def test_a_script_can_be_copied_out(tmp_path):
    """Each alone, by its own file, in a place where there is no common/: its pure functions work."""
    for name in SCRIPTS:
        shutil.copy(ROOT / "algos" / f"{name}.py", tmp_path)
    done = isolated(COPIED.format(folder=str(tmp_path), names=SCRIPTS), tmp_path).split()
    assert "grpo" in done
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{n}.py" for n in SCRIPTS]
