"""The comparison of runs: what an item names, what a table says, and a picture of both kinds of scripts."""

import json
import statistics

import pytest

from common import UserError
from runs import compare, launch


def test_what_an_item_names():
    assert compare.parts("grpo") == ("grpo", "", "grpo", [])
    assert compare.parts("dpo@chain") == ("dpo", "chain", "dpo", [])
    assert compare.parts("dpo@chain,beta=0.1,loss=ipo") == (
        "dpo", "chain", "dpo,beta=0.1,loss=ipo", ["--beta", "0.1", "--loss", "ipo"]
    )  # fmt: skip
    assert compare.parts("did,no-projected")[3] == ["--no-projected"]
    assert compare.kind("tdpo@chain,alpha=1") == "pairs" and compare.kind("rto") == "online"


MISTAKES = [
    ("dpo grpo", "learn from pairs and others .*compare them apart"),
    ("nothing", "no script algos/nothing.py; there are: .*, grpo, "),
    ("", "needs a script"),
]


@pytest.mark.parametrize("scripts, complaint", MISTAKES)
def test_mistakes(scripts, complaint):
    with pytest.raises(UserError, match=complaint):
        compare.main(compare.Options(tuple(scripts.split())), [])


def fake(folder, last, metrics, evals):
    folder.mkdir(parents=True)
    (folder / "done").write_text(f"{last}\n{launch.code(folder.name.partition('-')[0])}\n")
    (folder / "config.json").write_text(json.dumps(dict(versions=dict(torch="2"), args=dict(data="chain"))))
    for name, rows in (("metrics", metrics), ("evals", evals)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_finished_run_is_made_again_where_the_code_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    script, other = tmp_path / "algos" / "toy.py", tmp_path / "common" / "worlds" / "game.py"
    for path in (script, other):
        path.parent.mkdir(parents=True)
    other.write_text("")
    toy = "import pathlib, sys\nfolder = pathlib.Path(sys.argv[-1])\nfolder.mkdir(parents=True, exist_ok=True)\n"
    toy += "with open('log', 'a') as log: print(1, file=log)\nprint('greedy accuracy 0.1 -> {} on 8')\n"
    expected = []
    for text, library, after in ((toy.format(0.5), "", 0.5), (toy.format(0.7), "", 0.7), (toy.format(0.7), "x = 1", 0.7)):
        script.write_text(text)
        other.write_text(library)
        expected.append("1")
        for _ in range(2):  # the second time it is there
            folder = compare.run("toy", 1, [], None)
            (folder / "metrics.jsonl").touch()
            assert compare.read(folder) == ([], 0.1, after)
            assert (tmp_path / "log").read_text().split() == expected


def test_pairs(tmp_path, monkeypatch, capsys):
    """Two seeds that are there and finished: nothing is run, and table, picture and file say what the rows say."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "dpo.py").write_text("class Args:\n    pairs_per_step: int\n")
    for seed in (1, 2):
        metrics = [dict(step=s, entropy=s * seed) for s in range(1, 21)]
        values = dict(kl=1.0, reward_accuracy=1, margin=2, chosen_shift=-1, rejected_shift=-3, credit=0.9)
        evals = [dict(step=s, win_rate=0.5 + s * seed / 100, gold_reward=0.1 * seed, **values) for s in (0, 10, 20)]
        fake(tmp_path / "runs" / "compare" / f"dpo-{seed}-data-chain-steps-20", "win rate 0.5 -> 0.7", metrics, evals)
    compare.main(compare.Options(("dpo@chain",), seeds=2, out=str(tmp_path / "out")), ["--steps", "20"])
    record = json.loads((tmp_path / "out.json").read_text())
    found = record["summary"]["dpo@chain"]
    assert found["win_rate"] == dict(mean=pytest.approx(0.8), min=pytest.approx(0.7), max=pytest.approx(0.9), seeds=[0.7, 0.9])
    assert found["entropy"]["mean"] == statistics.mean([15.5, 31])  # the last ten updates
    assert record["curves"]["dpo@chain"][1][1] == dict(step=10, win_rate=0.7, kl=1.0, chosen_shift=-1, credit=0.9)
    assert "| dpo@chain | 0.800 (0.700 to 0.900) |" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.parametrize("measure", ["accuracy", "score"])  # "score" is what a run on a task with a gold reward says
def test_online(tmp_path, monkeypatch, capsys, measure):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "rto.py").write_text("\ndef surrogate(logp):\n    pass\n")
    rows = [dict(step=s, accuracy=s / 20, length=9, entropy=1.0, approx_kl=None if s == 3 else 0.1) for s in range(1, 21)]
    fake(tmp_path / "runs" / "compare" / "rto-1-shape-last", f"greedy {measure} 0.15 -> 16.00 on 8", rows, [])
    compare.main(compare.Options(("rto,shape=last",), seeds=1, out=str(tmp_path / "out")), [])
    found = json.loads((tmp_path / "out.json").read_text())["summary"]["rto,shape=last"]
    assert found[f"greedy {measure} after"]["mean"] == 16 and found[f"sampled {measure}, last 10 steps"]["mean"] == 0.775
    first = found.get("first step with sampled accuracy 0.7", {}).get("seeds")
    assert first == ([14] if measure == "accuracy" else None)  # the gold rewards have scales of their own
    assert "| rto,shape=last | 0.150" in capsys.readouterr().out and (tmp_path / "out.png").exists()
