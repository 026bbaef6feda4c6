"""A sweep on scripts that do nothing: what is run, what the table says of what failed, and the panels of the picture."""

import json

import pytest

from common import UserError
from runs import launch, sweep
from tests.test_compare import drawn

SCRIPT = """import json, pathlib, sys
class Args:
    lr: float = 1.0
    warmup_steps: int = 0
def surrogate():
    pass
def flag(name):
    return sys.argv[sys.argv.index(name) + 1]
name, lr, seed = pathlib.Path(sys.argv[0]).stem, float(flag("--lr")), int(flag("--seed"))
with open("log", "a") as log: print(name, flag("--lr"), seed, file=log)
folder = pathlib.Path(flag("--run-dir"))
folder.mkdir(parents=True)
if (name, lr, seed) in FAILS:
    sys.exit("error: the loss was not finite (step 3); the weights are those before. Metrics: /somewhere")
greedy = [0.25, 0.75, GAIN + 10 * lr + seed / 100]
clip = dict(clip_fraction=0.5) if name != "gate" else {}
rows = [dict(step=s, accuracy=0.5, entropy=1, length=5, approx_kl=s * lr, skipped_updates=s - 1, **clip) for s in (1, 2)]
evals = [dict(step=s, greedy_accuracy=g, prompts=8) for s, g in enumerate(greedy)]
args = dict(task="route", lr=lr)
(folder / "config.json").write_text(json.dumps(dict(versions=dict(torch="2"), args=args)))
for file, lines in (("metrics", rows), ("evals", evals)):
    (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
print(f"greedy accuracy {greedy[0]:.2f} -> {greedy[-1]:.2f} on 8 held-out prompts")
"""
FAILS = "[('clip', 0.03, 2), ('clip', 0.03, 3), ('base', 0.09, 1), ('base', 0.09, 2), ('base', 0.09, 3)]"
OVER = ("lr", "1e-2", "3e-2", "9e-2")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "common").mkdir()
    (tmp_path / "algos").mkdir()
    for name, gain in (("base", 0.1), ("clip", 0.2), ("gate", 0.1)):
        (tmp_path / "algos" / f"{name}.py").write_text(SCRIPT.replace("GAIN", str(gain)).replace("FAILS", FAILS))
    (tmp_path / "algos" / "pairs.py").write_text("class Args:\n    pairs_per_step: int = 1\n    lr: float = 1.0\n")
    return tmp_path


def test_a_sweep(root, monkeypatch, capsys):
    seen = drawn(monkeypatch)
    options = sweep.Options(("base", "clip", "gate"), OVER, jobs=2, out=str(root / "out"))
    sweep.main(options, ["--minibatches", "8"])
    assert len((root / "log").read_text().split("\n")[:-1]) == 27  # each script, value and seed once
    assert (root / "runs" / "compare" / "clip-2-lr-1e-2-minibatches-8" / "done").exists()
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    rows = {tuple(cells[:2]): cells[2:] for cells in lines[2:]}
    assert len(rows) == 9
    # 0.1 + 0.1 + seed / 100; 0.75 on the way; the last KL is 2 lr; nothing against itself
    steady = ["0.750 (0.750 to 0.750)", "0.500 (0.500 to 0.500)", "0.02 (0.02 to 0.02)"]
    same = ["0.220 (0.210 to 0.230)", *steady]
    assert rows["base", "1e-2"] == [*same, "0.5 (0.5 to 0.5)", "1 (1 to 1)", "", ""]
    last = ["0.5 (0.5 to 0.5)", "1 (1 to 1)", "+0.100 (+0.100 to +0.100)", "better (one warm start)"]
    assert rows["clip", "1e-2"] == ["0.320 (0.310 to 0.330)", *steady, *last]
    assert rows["gate", "1e-2"] == [*same, "", "1 (1 to 1)", "+0.000 (+0.000 to +0.000)", "equal"]
    assert rows["clip", "3e-2"] == ["failed: the loss was not finite (step 3) (seeds 2, 3)"] + [""] * 7
    assert rows["base", "9e-2"][0].endswith("(seeds 1, 2, 3)")
    assert rows["gate", "9e-2"][0] == "1.020 (1.010 to 1.030)" and rows["gate", "9e-2"][-2:] == ["", "base failed"]
    # the picture: a panel a script, no point where a run failed, the base in grey behind the others, the start dotted
    [axes] = seen
    assert [axis.get_title() for axis in axes] == ["base", "clip", "gate"]
    base, clip, gate = ([[round(y, 6) for y in line.get_ydata()] for line in axis.lines] for axis in axes)
    assert base[0][:2] == [0.22, 0.42] and base[0][2] != base[0][2] and base[1] == [0.25, 0.25] and len(base) == 2
    assert clip[0][:2] == base[0][:2] and clip[1][0] == 0.32 and clip[1][1] != clip[1][1] and clip[1][2] == 1.12
    assert gate[1] == [0.22, 0.42, 1.02]
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == list(OVER[1:])
    assert [text.get_position()[0] for text in axes[1].texts] == [1] and axes[1].texts[0].get_text() == "failed"
    record = json.loads((root / "out.json").read_text())
    assert (record["flag"], record["values"]) == ("lr", list(OVER[1:])) and record["versions"] == dict(torch="2")
    assert record["failed"]["clip,lr=3e-2"] == dict.fromkeys("23", "the loss was not finite (step 3)")
    assert [row["step"] for row in record["curves"]["clip,lr=1e-2"][0]] == [0, 1, 2]
    assert record["differences"]["clip,lr=1e-2"]["against"] == "base,lr=1e-2"
    page = (root / "out.md").read_text()
    assert page.startswith("`python -m runs.sweep") and page.split("\n\n")[1] in printed
    # again: only what failed is tried again; redrawn: nothing is, and all comes out the same
    (root / "log").unlink()
    sweep.main(options, ["--minibatches", "8"])
    assert len((root / "log").read_text().split("\n")[:-1]) == 5
    (root / "log").unlink()
    (root / "out.png").unlink()
    sweep.main(sweep.Options(redraw=True, out=str(root / "out")), [])
    assert not (root / "log").exists() and (root / "out.png").exists() and (root / "out.md").read_text() == page


def test_a_base_that_failed_everywhere_is_still_the_base():
    data = {"b,lr=1": "route", "c,lr=1": "route", "c,lr=2": "route"}
    assert sweep.bases(data, ["a", "b", "c"], "lr", ["1", "2"]) == dict(a="a", b="a", c="a")
    data = {"a@route,lr=1": "route", "b@route:1,lr=1": "route:1"}
    scripts = ["a@route", "a@route:1", "b@route", "b@route:1"]
    assert sweep.bases(data, scripts, "lr", ["1"]) == dict(zip(scripts, scripts[:2] * 2))
    summaries = {item: {"greedy accuracy after": dict(seeds=[0.5])} for item in ("b,lr=1", "c,lr=1")}
    assert sweep.against(summaries, dict.fromkeys(summaries, "x"), ["a", "b", "c"], "lr", ["1"]) == {}


def test_scripts_that_learn_from_demonstrations(root, capsys):
    """The table has what there is of them: no KL, but perplexity and the log-prob of the demonstrations."""
    text = (
        SCRIPT.replace("GAIN", "0.1")
        .replace("FAILS", "[]")
        .replace("lr: float = 1.0", "lr: float = 1.0\n    batch_size: int = 1")
    )
    text = text.replace("accuracy=0.5, entropy=1", "logp=-lr, entropy=1").replace("prompts=8)", "prompts=8, perplexity=3 - s)")
    for name in ("told", "other"):
        (root / "algos" / f"{name}.py").write_text(text)
    sweep.main(sweep.Options(("told", "other"), OVER, seeds=1, out=str(root / "out")), [])
    head, _, first, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (head, first))))
    assert cells["lr"] == "1e-2" and cells["greedy accuracy"] == "0.210 (0.210 to 0.210)"
    assert (
        cells["perplexity"] == "1.000 (1.000 to 1.000)" and cells["log-prob of demonstrations"] == "-0.010 (-0.010 to -0.010)"
    )
    assert not any("KL" in cell or "sampled" in cell for cell in cells)
    with pytest.raises(UserError, match="of kinds online and supervised have no common curves"):
        sweep.checked(sweep.Options(("told", "base"), OVER), [])


MISTAKES = [
    (dict(scripts=("base",), over=("lr",)), [], "--over needs a flag and its values"),
    (dict(scripts=("base",), over=("rate", "1")), [], "base.py has no flag --rate"),
    (dict(scripts=("base",), over=OVER), ["--lr=1"], "--lr is swept"),
    (dict(scripts=("pairs",), over=OVER), [], "learns from pairs"),
    (dict(scripts=("none",), over=OVER), [], "no script algos/none.py"),
    (dict(scripts=("base",), over=("lr", "9e-2")), [], "ended well on every seed; the first failure: the loss was not finite"),
    (dict(redraw=True, out="nowhere"), [], "--redraw needs the numbers in nowhere.json"),
]


@pytest.mark.parametrize("options, extra, complaint", MISTAKES)
def test_mistakes(root, options, extra, complaint):
    with pytest.raises(UserError, match=complaint):
        sweep.main(sweep.Options(**options), extra)


def test_flags_with_dashes(root):
    assert sweep.checked(sweep.Options(("base",), ("warmup-steps", "1", "2")), ["--lr", "1"]) == ["base"]
