"""The comparison of runs: what an item names, differences and verdicts, what a table says, and the panels of a picture."""

import itertools
import json
import statistics
import warnings
from types import SimpleNamespace

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
    assert compare.kind("sft") == "supervised"
    assert compare.kind("ppo") == "online" and compare.kind("fourier_head,head=linear") == "alone"
    assert compare.kind("decode") == compare.kind("xguard,steps=9") == compare.kind("coin") == "results"


def test_difference():
    found = compare.difference([0.70, 0.72, 0.69], [0.60, 0.61, 0.62])
    assert found == dict(mean=pytest.approx(0.28 / 3), low=pytest.approx(0.07), high=pytest.approx(0.11))  # three: their span
    # more seeds: the interval is inside the span, around the mean, and about the normal one: 1.96 * 0.0229 / sqrt(8)
    mine, base = [0.61, 0.62, 0.63, 0.64, 0.65, 0.66, 0.67, 0.68], [0.6] * 8
    found = compare.difference(mine, base)
    assert found["mean"] == pytest.approx(0.045) and found == compare.difference(mine, base)
    assert [found["low"], found["high"]] == pytest.approx([0.045 - 0.0159, 0.045 + 0.0159], abs=0.002)


def test_difference_is_paired_and_has_no_order_of_seeds():
    mine, base = [0.70, 0.82, 0.95, 0.6], [0.60, 0.70, 0.80, 0.61]
    found = {json.dumps(compare.difference(*zip(*order))) for order in itertools.permutations(zip(mine, base))}
    assert len(found) == 1
    assert compare.difference(mine, base[::-1]) != json.loads(found.pop())


def test_difference_without_a_spread():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compare.difference([0.5, 0.75, 0.25], [0.25, 0.5, 0.0]) == dict(mean=0.25, low=0.25, high=0.25)
        assert compare.difference([1.0, 1.0], [1.0, 1.0]) == dict(mean=0.0, low=0.0, high=0.0)
        assert compare.difference([0.5], [0.25]) == dict(mean=0.25, low=None, high=None)  # one seed has no interval


def test_what_stands_alone_is_summarised_by_all_that_it_measures():
    """And where less is better, less wins."""
    runs = [[dict(step=0, kl=1.5, width=0.3, prompts=9), dict(step=4, kl=k, width=0.1, prompts=9)] for k in (0.2, 0.3)]
    found = compare.summarise_alone(runs)
    assert list(found) == ["kl before", "kl after", "width before", "width after"]
    assert found["kl after"]["seeds"] == [0.2, 0.3] and found["kl after"]["mean"] == pytest.approx(0.25)
    other = compare.summarise_alone([[row | dict(kl=row["kl"] + 0.5) for row in rows] for rows in runs])
    for mine, base, verdict in ((found, other, "better"), (other, found, "worse")):
        said = compare.differences(dict(a=base, b=mine), dict(a="", b=""))["b"]
        assert said["verdict"] == verdict and said["measure"] == "kl after" and abs(said["mean"]) == pytest.approx(0.5)


LOW, HIGH, OVER = [0.60, 0.61, 0.62], [0.70, 0.71, 0.72], [0.615, 0.73, 0.74]
VERDICTS = [
    ([(HIGH, LOW)], {}, "better"),
    ([(LOW, HIGH)], {}, "worse"),
    ([(OVER, LOW)], {}, "equal"),  # the spans overlap
    ([([0.65, 0.66, 0.67], [0.62, 0.63, 0.64])], {}, "better"),  # 0.03 counts
    ([([0.649, 0.66, 0.67], [0.62, 0.63, 0.64])], {}, "equal"),  # less does not, whatever the spans
    ([(HIGH, LOW)], dict(several=True), "better (one warm start)"),
    ([(OVER, LOW)], dict(several=True), "equal"),
    ([(HIGH, LOW), (HIGH, LOW)], dict(several=True), "better"),
    ([(HIGH, LOW), (OVER, LOW)], dict(several=True), "equal"),  # it has to hold on each
    ([(HIGH, LOW), (LOW, HIGH)], dict(several=True), "equal"),
    ([([0.5], [0.5])], {}, "equal (one seed)"),
    ([(LOW, HIGH), (LOW, HIGH)], dict(several=True), "worse"),
    ([([0.9], [0.5])], dict(several=True), "better (one seed, one warm start)"),
]


@pytest.mark.parametrize("starts, how, word", VERDICTS)
def test_verdict(starts, how, word):
    assert compare.verdict(*starts, **how) == word


def differences(measure="greedy accuracy after", data=None, **values):
    """Of items a__b, for a@b; the data they ran on are what they name, unless `data` says otherwise."""
    summaries = {item.replace("__", "@").replace("_1", ":1"): {measure: compare.band(v)} for item, v in values.items()}
    found = compare.differences(summaries, data or {item: compare.parts(item)[1] for item in summaries})
    return {item: (f["against"], f["verdict"]) for item, f in found.items()}


def test_an_item_is_compared_with_the_first_on_its_data():
    assert differences(grpo=LOW, sapo=HIGH, data=dict(grpo="gsm8k", sapo="gsm8k")) == {"sapo": ("grpo", "better")}
    assert differences("win_rate", dpo__letters=LOW, tdpo__letters=HIGH, dpo__chain=HIGH, tdpo__chain=LOW) == {
        "tdpo@letters": ("dpo@letters", "better"),
        "tdpo@chain": ("dpo@chain", "worse"),
    }
    found = compare.differences({"a": dict(kl=1), "b": dict(kl=2)}, dict(a="", b=""))
    assert found == {}  # nothing to compare by
    summaries = {i: {"greedy accuracy after": compare.band(v)} for i, v in dict(grpo=LOW, sapo=OVER).items()}
    found = compare.differences(summaries, dict(grpo="x", sapo="x"))["sapo"]
    numbers = [found.pop(key) for key in ("mean", "low", "high")]
    assert numbers == pytest.approx([0.085, 0.015, 0.12])
    assert found == dict(against="grpo", measure="greedy accuracy after", verdict="equal")


def test_two_warm_starts():
    one = dict(grpo="route", sapo="route")  # the preset's task, which the item does not name
    assert differences(grpo=LOW, sapo=HIGH, data=one) == {"sapo": ("grpo", "better (one warm start)")}
    both = differences(grpo__route=LOW, sapo__route=HIGH, grpo__route_1=LOW, sapo__route_1=HIGH)
    assert both == {"sapo@route": ("grpo@route", "better"), "sapo@route:1": ("grpo@route:1", "better")}
    mixed = differences(grpo__route=LOW, sapo__route=HIGH, grpo__route_1=LOW, sapo__route_1=OVER)
    assert [v for _, v in mixed.values()] == ["equal", "equal"]
    # one that ran on one start only, and another base there: not the same comparison
    lone = differences(grpo__route=LOW, sapo__route=HIGH, ppo__route=HIGH, grpo__route_1=LOW, sapo__route_1=HIGH)
    assert lone["ppo@route"] == ("grpo@route", "better (one warm start)") and lone["sapo@route"][1] == "better"
    other = differences(grpo__route=LOW, sapo__route=HIGH, ppo__route_1=LOW, sapo__route_1=OVER)
    assert other["sapo@route"] == ("grpo@route", "better (one warm start)")
    # of another task the option is no warm start
    digits = differences(grpo__addition=LOW, sapo__addition=HIGH, grpo__addition_1=LOW, sapo__addition_1=OVER)
    assert digits["sapo@addition"] == ("grpo@addition", "better") and digits["sapo@addition:1"][1] == "equal"


MISTAKES = [
    ("dpo grpo", "of kinds online and pairs have no common curves: compare them apart"),
    ("nothing", "no script algos/nothing.py; there are: .*, grpo, "),
    ("", "needs a script"),
]


def drawn(monkeypatch):
    """The panels of every picture that will be written, a list each."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def watched(figure, path, **how):
        seen.append([axis for axis in figure.axes if axis.axison])
        save(figure, path, **how)

    monkeypatch.setattr(Figure, "savefig", watched)
    return seen


def titles(pictures):
    return [[axis.get_title().replace("\n", "") for axis in axes] for axes in pictures]


@pytest.mark.parametrize("scripts, complaint", MISTAKES)
def test_mistakes(scripts, complaint):
    with pytest.raises(UserError, match=complaint):
        compare.main(compare.Options(tuple(scripts.split())), [])


def fake(folder, last, metrics, evals, **args):
    folder.mkdir(parents=True)
    (folder / "done").write_text(f"{last}\n{launch.code(folder.name.partition('-')[0])}\n")
    (folder / "config.json").write_text(json.dumps(dict(versions=dict(torch="2"), args=args)))
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
            rows = [dict(step=0, greedy_accuracy=0.1), dict(step=1, greedy_accuracy=after)]
            (folder / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            assert compare.read(folder) == ([], 0.1, after) and f"-> {after}" in (folder / "done").read_text()
            assert (tmp_path / "log").read_text().split() == expected


def test_pairs(tmp_path, monkeypatch, capsys):
    """Two seeds that are there and finished: nothing is run, and table, picture and file say what the rows say."""
    pictures = drawn(monkeypatch)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "algos").mkdir()
    for script, gain in (("dpo", 100), ("tdpo", 50)):
        (tmp_path / "algos" / f"{script}.py").write_text("class Args:\n    pairs_per_step: int\n")
        for seed in (1, 2):
            metrics = [dict(step=s, entropy=s * seed) for s in range(1, 21)]
            values = dict(kl=1.0, reward_accuracy=1, margin=2, chosen_shift=-1, rejected_shift=-3, credit=0.998)
            evals = [dict(step=s, win_rate=0.5 + s * seed / gain, gold_reward=0.1 * seed, **values) for s in (0, 10, 20)]
            folder = tmp_path / "runs" / "compare" / f"{script}-{seed}-data-chain-steps-20"
            fake(folder, "win rate 0.5 -> 0.7", metrics, evals, data="chain")
    compare.main(compare.Options(("dpo@chain", "tdpo@chain"), seeds=2, out=str(tmp_path / "out")), ["--steps", "20"])
    record = json.loads((tmp_path / "out.json").read_text())
    found = record["summary"]["dpo@chain"]
    assert found["win_rate"] == dict(mean=pytest.approx(0.8), min=pytest.approx(0.7), max=pytest.approx(0.9), seeds=[0.7, 0.9])
    assert found["entropy"]["mean"] == statistics.mean([15.5, 31])  # the last ten updates
    assert record["curves"]["dpo@chain"][1][1] == dict(step=10, win_rate=0.7, kl=1.0, chosen_shift=-1, credit=0.998)
    difference = dict(against="dpo@chain", measure="win_rate", mean=pytest.approx(0.3), verdict="equal")
    assert record["differences"] == {"tdpo@chain": difference | dict(low=pytest.approx(0.2), high=pytest.approx(0.4))}
    table = capsys.readouterr().out
    assert "| dpo@chain | 0.800 (0.700 to 0.900) |" in table and "| dpo@chain | +0.300 (+0.200 to +0.400) | equal |" in table
    # credit ends at 1.00 for both: no panel
    shown = ["win rate against the reference", "KL to the reference, nats (lower is better)"]
    assert titles(pictures) == [shown] and (tmp_path / "out.png").stat().st_size > 10_000
    # again, from the numbers alone; of an older record, which has no differences, too
    del record["differences"], record["data"]
    old = json.dumps(record)
    (tmp_path / "out.json").write_text(old)
    (tmp_path / "out.png").unlink()
    compare.main(compare.Options(redraw=True, out=str(tmp_path / "out")), [])
    again = capsys.readouterr().out
    assert again.splitlines()[:4] == [line for line in table.splitlines() if line.startswith("|")]
    assert titles(pictures) == [shown, shown] and (tmp_path / "out.png").exists() and (tmp_path / "out.json").read_text() == old


def test_a_redrawing_needs_a_record(tmp_path):
    with pytest.raises(UserError, match="--redraw needs the numbers in .*nowhere.json"):
        compare.main(compare.Options(redraw=True, out=str(tmp_path / "nowhere")), [])


@pytest.mark.parametrize("measure", ["accuracy", "score"])  # "score" is what a run on a task with a gold reward says
def test_online(tmp_path, monkeypatch, capsys, measure):
    pictures = drawn(monkeypatch)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "rto.py").write_text("\ndef surrogate(logp):\n    pass\n")
    rows = [dict(step=s, accuracy=s / 20, length=9, entropy=1.0, approx_kl=None if s == 3 else 0.1) for s in range(1, 21)]
    evals = [dict(step=s, greedy_accuracy=g, prompts=8) for s, g in ((0, 0.1523), (10, 9.0), (20, 16.0))]
    items = [f"rto,scale={i}" for i in range(6 if measure == "accuracy" else 2)]
    for i in range(len(items)):
        folder = tmp_path / "runs" / "compare" / f"rto-1-scale-{i}"
        fake(folder, f"greedy {measure} 0.15 -> 16.00 on 8", rows, evals, task="route")
    compare.main(compare.Options(tuple(items), seeds=1, out=str(tmp_path / "out")), [])
    record = json.loads((tmp_path / "out.json").read_text())
    found = record["summary"][items[0]]
    assert found[f"greedy {measure} before"]["mean"] == 0.1523  # of evals.jsonl, which has more digits than the last line
    assert found[f"greedy {measure} after"]["mean"] == 16 and found[f"sampled {measure}, last 10 steps"]["mean"] == 0.775
    assert found["greatest KL in a step"]["mean"] == 0.1  # of those that are finite
    first = found.get("first step with sampled accuracy 0.7", {}).get("seeds")
    assert first == ([14] if measure == "accuracy" else None)  # the gold rewards have scales of their own
    curve = record["curves"][items[1]][0]
    assert curve[0] == dict(step=0, greedy_accuracy=0.1523) and curve[10]["greedy_accuracy"] == 9 and len(curve) == 21
    table = capsys.readouterr().out
    assert "| rto,scale=0 | 0.152" in table and "| rto,scale=0 | +0.000 | equal (one seed) |" in table
    # greedy, entropy, KL and length of every item, but no sampled accuracy
    assert titles(pictures) == [items * 4] and record["data"] == dict.fromkeys(items, "route")



def test_evaluation_only(tmp_path, monkeypatch, capsys):
    """By --steps 0: one evaluation, no step; and avg@N and pass@N are kept of every one."""
    drawn(monkeypatch)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "grpo.py").write_text("\ndef surrogate(logp): pass\n")
    evals = [{"step": 0, "greedy_accuracy": 0.25, "avg@4": 0.125, "discrete_pass@4": 0.5, "latents": 2.0}]
    said = "evaluation only (no steps): greedy score 0.25 on 8 held-out prompts"
    fake(tmp_path / "runs" / "compare" / "grpo-1-steps-0", said, [], evals, task="route")
    compare.main(compare.Options(("grpo",), seeds=1, out=str(tmp_path / "out")), ["--steps", "0"])
    record = json.loads((tmp_path / "out.json").read_text())
    found = {k: v["mean"] for k, v in record["summary"]["grpo"].items()}
    assert found == {"greedy score before": 0.25, "greedy score after": 0.25}
    assert record["curves"]["grpo"] == [[{"step": 0, "greedy_accuracy": 0.25, "avg@4": 0.125, "discrete_pass@4": 0.5}]]
    assert "| grpo | 0.250" in capsys.readouterr().out


def test_supervised(tmp_path, monkeypatch, capsys):
    """Of demonstrations: greedy accuracy, where there is one, and perplexity, before and after."""
    pictures = drawn(monkeypatch)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "sft.py").write_text("class Args:\n    batch_size: int\n")
    rows = [dict(step=s, loss=1.0, logp=-s / 10, entropy=1.0, train_perplexity=2.0) for s in range(1, 21)]
    evals = [dict(step=s, greedy_accuracy=s / 40, perplexity=3.0 - s / 20, also_greedy_accuracy=0.5) for s in (0, 10, 20)]
    for lr in ("1", "2"):
        fake(tmp_path / "runs" / "compare" / f"sft-1-lr-{lr}", "greedy accuracy 0 -> 0.5", rows, evals, task="addition")
    compare.main(compare.Options(("sft,lr=1", "sft,lr=2"), seeds=1, out=str(tmp_path / "out")), [])
    record = json.loads((tmp_path / "out.json").read_text())
    assert {k: v["mean"] for k, v in record["summary"]["sft,lr=2"].items()} == {
        "greedy accuracy before": 0, "greedy accuracy after": 0.5, "perplexity before": 3, "perplexity after": 2,
        "also greedy accuracy before": 0.5, "also greedy accuracy after": 0.5,
        "log-prob of demonstrations, last 10 steps": pytest.approx(-1.55), "entropy, last 10 steps": 1,
    }  # fmt: skip
    assert record["curves"]["sft,lr=1"][0][10] == dict(step=10, greedy_accuracy=0.25, perplexity=2.5, entropy=1.0)
    assert record["data"] == {"sft,lr=1": "addition", "sft,lr=2": "addition"}
    assert titles(pictures) == [["sft,lr=1", "sft,lr=2"] * 3] and "| +0.000 | equal (one seed) |" in capsys.readouterr().out
    # where nothing can be checked the runs have perplexity alone, and nothing to be compared by
    for lr in ("1", "2"):
        without = [{k: v for k, v in e.items() if "greedy" not in k} for e in evals]
        path = tmp_path / "runs" / "compare" / f"sft-1-lr-{lr}" / "evals.jsonl"
        path.write_text("".join(json.dumps(e) + "\n" for e in without))
    compare.main(compare.Options(("sft,lr=1", "sft,lr=2"), seeds=1, out=str(tmp_path / "out")), [])
    assert titles(pictures)[1] == ["sft,lr=1", "sft,lr=2"] * 2 and "verdict" not in capsys.readouterr().out


def test_an_item_s_own_flag_comes_before_that_for_all(tmp_path, monkeypatch):
    """Once on the command line, and once in the folder's name."""
    calls = []
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "code", lambda script: "x")
    monkeypatch.setattr(compare, "kind", lambda item: "online")

    def complete(script, arguments, folder, share):
        calls.append(arguments)
        folder.mkdir(parents=True)
        return SimpleNamespace(returncode=0, stdout="greedy accuracy 0.1 -> 0.5\n")

    monkeypatch.setattr(launch, "complete", complete)
    folder = compare.run("toy@route,steps=9,plain", 2, ["--steps", "5", "--lr", "1e-3"], None)
    assert calls == [["--seed", "2", "--lr", "1e-3", "--plain", "--steps", "9", "--task", "route"]]
    assert folder.name == "toy-2-lr-1e-3-plain-steps-9-task-route"
    signs = [compare.run(f"toy,beta={x}", 1, [], None).name for x in ("0.5", "-0.5")]
    assert signs == ["toy-1-beta-0.5", "toy-1-beta--0.5"]  # two runs


def test_results_are_merged_over_seeds(tmp_path, monkeypatch, capsys):
    """What scripts that train nothing write: a table and a picture for each item, again from the record, or one line."""

    def ran(item, seed, extra, share):
        folder = tmp_path / f"{item}-{seed}"
        folder.mkdir(exist_ok=True)
        panel = dict(title="p", kind="lines", x="x", y="y", of={"a": [[0, seed], [1, 2.0]]})
        rows = {"odd": {"n": 1.0}} if (item, seed) == ("score", 2) else {"row": {"n": float(seed + len(item)), "m": None}}
        (folder / "results.json").write_text(json.dumps(dict(table=rows, panels=[panel])))
        (folder / "config.json").write_text(json.dumps(dict(versions=dict(python="3"))))
        return folder

    monkeypatch.setattr(compare, "run", ran)
    options = compare.Options(("decode", "decode,items=9"), 2, 1, str(tmp_path / "out"))
    compare.main(options, [])
    said = capsys.readouterr().out
    assert "decode,items=9" in said and "| row | 7.500 (7.000 to 8.000) | not defined |" in said
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["results"]["decode"]["table"] == {"row": {"n": [7.0, 8.0], "m": [None, None]}}
    (tmp_path / "out.png").unlink()
    compare.main(compare.Options(redraw=True, out=str(tmp_path / "out")), [])
    assert (tmp_path / "out.png").exists() and "| row | 15.500 (15.000 to 16.000) |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="score: its seeds have different rows or panels"):
        compare.main(compare.Options(("score",), 2, 1, str(tmp_path / "x")), [])
    with pytest.raises(SystemExit, match="kinds online and results have no common curves"):
        compare.main(compare.Options(("grpo", "decode")), [])
