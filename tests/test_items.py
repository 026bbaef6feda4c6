"""Scripts that train no policy, as a user runs them: killed at any moment and resumed they write the bytes of a whole run."""

import json
import os
import random
import shutil
import signal

import pytest
import torch

from common import figures, items
from tests.helpers import ROOT, lines, run, start, user_error

TEXTS = {p.stem: p.read_text() for p in sorted((ROOT / "algos").glob("*.py"))}
ELSEWHERE = ("east",)  # its own tests cut and resume it: without a long warm start it has nothing to steer
SCRIPTS = [name for name, text in TEXTS.items() if "\ndef main(args)" in text and name not in ELSEWHERE]
UNTRAINED = ("byte_level", "diffadapt")  # whose warm starts take long
FILES = ("items.jsonl", "results.json")
# What makes a script's run small.
OWN = dict(
    decode="--items 6",
    specdec="--items 4 --lengths 2 5 --confidences 0.8",
    byte_level="--items 6",
    ccp="--items 5",
    coin="--items 3 --problems 12 --verified 8 --fit-steps 2 --verifier-steps 1",
    dc_pdd="--items 40 --batch 16 --untrained",
    diffadapt="--items 12 --batch 4 --questions 24 --samples 2",
    lm_cascades="--items 96 --epochs 2 --task addition",
    magic_word="--items 2 --exact 1 --lengths 4 --iterations 2 --candidates 4 --bound-prompts 50",
    score="--items 9 --batch 4 --task addition",
    specdec_pp="--items 4 --lengths 2 --confidences 0.8 --thresholds 0.5 --label-samples 64 --head-epochs 1",
    uqac="--items 24 --batch 8",
    tokenprober="--items 3 --budget 20 --examples 2000 --copies 1 --fresh 4",
)


def flags(name):
    return OWN[name].split()


def fresh():
    """In a child, before its script: no warm start trains anything."""
    from common.worlds import tiny

    made = tiny.warm_start
    tiny.warm_start = lambda *args, **how: made(*args, **how | dict(fresh=True))


def how(name):
    return dict(script=ROOT / "algos" / f"{name}.py", before=fresh if name in UNTRAINED else None)


def read(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """name -> (folder of a whole run, what it printed), made once."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            done = run(folder, *flags(name), "--run-dir", folder / "run", **how(name))
            assert done.code == 0, done.err
            made[name] = folder / "run", done.out
        return made[name]

    return of


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_run_leaves(name, whole):
    """Lines, results by the contract, a picture, a last line; and results() needs nothing but the lines."""
    folder, out = whole(name)
    found = json.loads((folder / "results.json").read_text())
    assert found["table"] and found["panels"] and (folder / "picture.png").read_bytes()[:4] == b"\x89PNG"
    kinds = {"lines", "points", "bars", "heat", "tokens"}
    assert {p["kind"] for p in found["panels"]} <= kinds and all(p["title"] and p["of"] for p in found["panels"])
    numbers = [v for row in found["table"].values() for v in row.values()]
    assert numbers and all(v is None or isinstance(v, (int, float)) for v in numbers)
    assert figures.table(figures.merge([found, found])).count("\n") == len(found["table"]) + 1
    assert any(c.isdigit() for c in out.splitlines()[-1]) and "| --- |" in out


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed_it_writes_the_same_bytes(name, whole, tmp_path):
    """Killed when it has written so many lines, at a moment of its own, perhaps in the middle of one."""
    folder, _ = whole(name)
    path = tmp_path / "run" / "items.jsonl"
    n = len(lines(folder / "items.jsonl"))
    enough = random.Random(name).randrange(1, n) if n > 1 else 1
    child = start(tmp_path, *flags(name), "--run-dir", path.parent, **how(name))
    child.until(lambda: path.exists() and path.read_bytes().count(b"\n") >= enough)
    os.kill(child.pid, signal.SIGKILL)
    child.process.join()
    if not (path.parent / "results.json").exists():  # else it was quicker
        with open(path, "a") as file:
            file.write('{"item": ')
    done = run(tmp_path, "--resume", path.parent, **how(name))
    assert done.code == 0, done.err
    assert read(path.parent) == read(folder)


def test_a_batch_that_is_half_there_is_measured_again(whole, tmp_path):
    """Three lines of a batch of four are gone, and the next batch begins where it would have begun."""
    folder, _ = whole("score")
    for kept in (3, 4, 7, 8):
        copy = tmp_path / str(kept)
        shutil.copytree(folder, copy)
        rows = (copy / "items.jsonl").read_bytes().splitlines(keepends=True)
        (copy / "items.jsonl").write_bytes(b"".join(rows[:kept]) + rows[kept][:9])
        assert items._whole_lines(copy / "items.jsonl", 4, 9) == kept // 4 * 4
        assert (copy / "items.jsonl").read_bytes() == b"".join(rows[: kept // 4 * 4])


def test_ctrl_c_stops_behind_an_item(whole, tmp_path):
    folder, _ = whole("decode")
    script, path = ROOT / "algos" / "decode.py", tmp_path / "run" / "items.jsonl"
    child = start(tmp_path, "--items", 200, "--run-dir", path.parent, script=script)
    assert child.until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 2)
    os.kill(child.pid, signal.SIGINT)
    done = child.wait()
    assert done.code == 0 and done.out.splitlines()[-1].startswith("stopped after item ")
    n = len(lines(path))
    assert 2 <= n < 200 and path.read_bytes()[-1:] == b"\n" and not (path.parent / "results.json").exists()
    assert lines(path)[:2] == lines(folder / "items.jsonl")[:2]


def test_mistakes(whole, tmp_path):
    folder, _ = whole("decode")
    script = ROOT / "algos" / "decode.py"
    assert "already holds a run" in user_error(run(tmp_path, "--run-dir", folder, script=script))
    assert "--items is 6 there, not 7" in user_error(run(tmp_path, "--resume", folder, "--items", 7, script=script))
    said = user_error(run(tmp_path, "--resume", folder, "--model", "tiny-small", script=script))
    assert "--model is tiny there, not tiny-small" in said
    assert "--items must be at least 1" in user_error(run(tmp_path, "--items", 0, script=script))
    assert "--temperature must be at least 0" in user_error(run(tmp_path, "--temperature", "-1", script=script))


def test_numbers_that_json_has_not_are_refused(tmp_path):
    made = items.Items.__new__(items.Items)
    with open(tmp_path / "x", "w") as made.file, pytest.raises(ValueError):
        made.write(dict(x=float("nan")))


def test_what_is_fitted_is_read_again(tmp_path):
    """A module is fitted once: a resumed run reads it back, and half a file never stands there."""
    made, calls = items.Items.__new__(items.Items), []
    made.dir = tmp_path

    def fit(module):
        calls.append(1)
        torch.nn.init.constant_(module.weight, 3.0)

    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    assert made.kept("probe", first, lambda: fit(first)) is first and first.weight.tolist() == [[3.0, 3.0]]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["probe.safetensors"]
    assert made.kept("probe", second, lambda: fit(second)) is second and len(calls) == 1
    assert torch.equal(second.weight, first.weight) and torch.equal(second.bias, first.bias)


def test_it_runs_in_one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(items.gpu, "world", lambda: 2)
    with pytest.raises(SystemExit, match="decode.py runs in one process: start it once for each GPU"):
        items.Items("algos/decode.py", None)
