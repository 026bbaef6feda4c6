"""The claims: what may stand in claims.toml, the rule, what is taken from where, and that the committed pages say the same."""

import ast
import json

import pytest

from common import UserError
from runs import claims, compare, launch
from tests import sync

ROOTS = {"sft", "mdlm", "grpo_vision", "decode", "specdec", "score"}
BASELINES = {"grpo", "ppo", "dpo", "reinforce", "rloo", "dapo", "dr_grpo", "gspo", "gmpo", "cispo", "simpo"}
LOW, MIDDLE, HIGH = [0.50, 0.51, 0.52], [0.51, 0.52, 0.53], [0.60, 0.61, 0.63]
REFERENCE = sync.ROOT / "runs" / "reference"


def test_every_paper_has_a_claim():
    found = claims.load()
    assert set(found) == set(sync.scripts()) - ROOTS - BASELINES and len(found) == 60
    for slug, claim in found.items():
        assert claim["claim"].endswith(".") and claim["claim"].replace("Dr. ", "").count(". ") == 0, slug
        assert "why" in claim or any(slug == compare.parts(arm)[0] for arm in claims.items(slug, claim)) or "panel" in claim
        assert {compare.parts(i)[0] for i in claims.items(slug, claim)} <= set(sync.scripts())
        assert "record" not in claim or (REFERENCE / f"{claim['record']}.json").exists()
        claims.recorded(slug, claim, claims.Options())  # which would complain of other flags than the record's


def test_the_committed_table_is_what_the_rule_makes_of_the_committed_numbers(tmp_path):
    record = json.loads((REFERENCE / "claims.json").read_text())
    wanted, entries = claims.load(), record["claims"]
    assert list(entries) == list(wanted) and record["counts"] == claims.counted(entries)
    for slug, of in entries.items():
        assert (of["claim"], of["seeds"] >= 3) == (wanted[slug]["claim"], True)
        assert of["asked"] == claims.asked(wanted[slug])
        if of["arms"]:
            assert list(of["arms"]) == claims.everything(wanted[slug]) and of["metric"] == wanted[slug]["metric"]
            again = claims.judged(wanted[slug], of["arms"])
            assert {name: of[name] for name in again} == again, slug
        else:
            assert of["verdict"] == claims.UNTRIED and of["why"]
    claims.write(entries, tmp_path / "claims")
    for name in ("claims.md", "claims.json"):
        assert (tmp_path / name).read_text() == (REFERENCE / name).read_text()


def judged(better, base, method, *second, beats=None, control=LOW, margin=0.03):
    starts, arms = [["base", "method", "control"]], dict(base=base, method=method, control=control[: len(base)])
    if second:
        starts.append(["base:1", "method:1", "control:1"][: len(second)])
        arms |= dict(zip(["base:1", "method:1", "control:1"], second))
    claim = dict(starts=starts, better=better, margin=margin, **(dict(beats=beats) if beats else {}))
    return claims.judged(claim, arms)


@pytest.mark.parametrize(
    "better, values, verdict",
    [
        ("higher", (LOW, HIGH), claims.HOLDS),
        ("higher", (LOW, MIDDLE), claims.NONE),
        ("higher", (HIGH, LOW), claims.OTHER),
        ("lower", (HIGH, LOW), claims.HOLDS),
        ("lower", (LOW, HIGH), claims.OTHER),
        ("equal", (LOW, MIDDLE), claims.HOLDS),
        ("equal", (LOW, HIGH), claims.HOLDS),
        ("equal", (HIGH, LOW), claims.OTHER),
        ("equal", (LOW, MIDDLE, HIGH, LOW), claims.NONE),  # on one warm start something is lost
        ("equal", (HIGH, LOW, HIGH, LOW), claims.OTHER),
        ("higher", (LOW[:1], HIGH[:1]), claims.HOLDS),  # one seed
        ("equal", (HIGH[:1], LOW[:1]), claims.OTHER),
        ("higher", (LOW, HIGH, LOW, HIGH), claims.HOLDS),
        ("higher", (LOW, HIGH, LOW, MIDDLE), claims.NONE),
        ("higher", (LOW, HIGH, HIGH, LOW), claims.NONE),
        ("higher", (LOW, [0.4, 0.7, 0.9]), claims.NONE),  # further apart than the margin, but the spans overlap
    ],
)
def test_the_rule(better, values, verdict):
    assert judged(better, *values)["verdict"] == verdict


def test_a_control_has_to_be_beaten_and_a_margin_to_be_reached():
    assert judged("equal", LOW, LOW, beats="control", control=[0.4, 0.41, 0.42])["verdict"] == claims.HOLDS
    said = judged("equal", LOW, LOW, beats="control", control=MIDDLE)
    assert said["verdict"] == claims.NONE and said["note"] == "equal against control, which it has to beat"
    # who loses to a control alone is not worse than the baseline
    assert judged("higher", LOW, HIGH, beats="control", control=[0.8, 0.9, 0.9])["verdict"] == claims.NONE
    # on every warm start that has the control
    assert judged("equal", LOW, HIGH, LOW, HIGH, LOW, beats="control")["verdict"] == claims.HOLDS
    assert judged("equal", LOW, HIGH, LOW, HIGH, [0.9, 0.9, 0.9], beats="control")["verdict"] == claims.NONE
    assert judged("lower", HIGH, LOW, beats="control", control=HIGH)["verdict"] == claims.HOLDS
    assert judged("higher", HIGH, LOW, beats="control")["verdict"] == claims.OTHER  # lost already, whatever the control
    assert judged("higher", LOW, HIGH, margin=0.2)["verdict"] == claims.NONE


def test_the_numbers_beside_the_verdict():
    said = judged("equal", HIGH, LOW, LOW, MIDDLE)
    assert said["note"] == "worse and equal on the two warm starts, so that it does not hold"
    said = judged("higher", LOW, HIGH, LOW, MIDDLE, control=MIDDLE)
    first, second = said["starts"]
    assert (first["baseline"], first["method"], second["method"]) == ("base", "method", "method:1")
    assert first["mean"] == pytest.approx(0.31 / 3) and (first["low"], first["high"]) == pytest.approx((0.10, 0.11))
    assert second["mean"] == pytest.approx(0.01)
    assert said["note"].startswith("better and equal on the two warm starts")
    (control,) = said["controls"]
    assert control["item"] == "control" and control["word"] == "better" and control["mean"] == pytest.approx(0.28 / 3)


GOOD = 'claim = "x."\nmetric = "m"\nbetter = "higher"\narms = ["a", "b"]\n'
MISTAKES = {
    "has seeds, which is none of": GOOD + "seeds = 3\n",
    "needs a metric, a baseline and a method": GOOD.replace('"a", ', ""),
    "needs a metric, a baseline and a method, and": GOOD.replace("metric", "why = 'no'\nfile").replace("why = 'no'", ""),
    "better = higher, lower or equal": GOOD.replace("higher", "more"),
    "is to beat c, which is no arm of it": GOOD + 'beats = "c"\n',
}


@pytest.mark.parametrize("complaint", MISTAKES)
def test_mistakes_in_claims_toml(tmp_path, complaint):
    (tmp_path / "claims.toml").write_text("[sapo]\n" + MISTAKES[complaint])
    with pytest.raises(UserError, match=complaint):
        claims.load(tmp_path / "claims.toml")


def test_mistakes_of_the_command(tmp_path):
    for flags, complaint in (
        (dict(slugs=("sapa",)), "claims.toml has no sapa; it has: sapo, dcpo"),
        (dict(seeds=0), "at least 1"),
        (dict(recorded=True, fresh=True), "exclude each other"),
    ):
        with pytest.raises(UserError, match=complaint):
            claims.main(claims.Options(out=str(tmp_path / "claims"), **flags))


SCRIPT = """import json, pathlib, sys
{comment}
folder, gain, seed = pathlib.Path(sys.argv[-1]), {gain}, int(sys.argv[2])
with open("log", "a") as log: print(pathlib.Path(sys.argv[0]).stem, seed, *sys.argv[3:-2], file=log)
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps(dict(versions={{}}, args={{}})))
rows = [dict(step=s, greedy_accuracy=0.1 + s * gain + 0.01 * seed) for s in (0, 1)]
(folder / "evals.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in rows))
(folder / "metrics.jsonl").write_text("")
(folder / "results.json").write_text(json.dumps(dict(table=dict(plain=dict(x=seed), paper=dict(x=seed + 1)), panels=[])))
print("greedy accuracy 0.1 -> 0.2 on 8")
def surrogate(): pass
"""
TOML = """
[plus]
claim = "Plus is better."
arms = ["base", "plus"]
metric = "greedy accuracy after"
better = "higher"
record = "old"
[minus]
claim = "Minus is better."
arms = ["base", "minus"]
metric = "greedy accuracy after"
better = "higher"
[table]
claim = "A table's row is better."
rows = ["plain", "paper"]
metric = "x"
better = "higher"
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A house of three scripts -> f(slugs, flags): the command; ran() says what has been run since."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims.load, "__defaults__", (tmp_path / "claims.toml",))
    (tmp_path / "algos").mkdir()
    (tmp_path / "common").mkdir()
    (tmp_path / "runs" / "reference").mkdir(parents=True)
    (tmp_path / "claims.toml").write_text(TOML)
    for name, gain in dict(base=0.2, plus=0.6, minus=0.0, table=0.0).items():
        write(tmp_path, name, gain)

    def command(*slugs, **flags):
        (tmp_path / "log").unlink(missing_ok=True)
        claims.main(claims.Options(slugs, out=str(tmp_path / "runs" / "reference" / "claims"), **flags))
        log = tmp_path / "log"
        ran = sorted(log.read_text().splitlines()) if log.exists() else []
        return json.loads((tmp_path / "runs" / "reference" / "claims.json").read_text())["claims"], ran

    command.root = tmp_path
    return command


def write(root, name, gain, comment=""):
    """A script; of one that writes results.json the kind shows in its text."""
    text = SCRIPT.format(gain=gain, comment=comment)
    text += "\ndef results(rows, args): pass\n" if name == "table" else ""
    ast.parse(text)
    (root / "algos" / f"{name}.py").write_text(text)


def test_what_is_missing_is_run_once_and_a_change_of_the_code_runs_it_again(house):
    entries, ran = house()
    assert [of["verdict"] for of in entries.values()] == [claims.HOLDS, claims.OTHER, claims.NONE]
    assert entries["plus"]["arms"] == dict(base=pytest.approx([0.31, 0.32, 0.33]), plus=pytest.approx([0.71, 0.72, 0.73]))
    assert entries["table"]["arms"] == dict(plain=[1, 2, 3], paper=[2, 3, 4]) and entries["plus"]["seconds"] > 0
    assert ran == [f"{name} {seed}" for name in ("base", "minus", "plus", "table") for seed in (1, 2, 3)]
    assert house() == (entries, [])
    write(house.root, "minus", 0.0, comment="# says more")  # computes the same: what is in claims.json counts
    assert house() == (entries, [])
    write(house.root, "minus", 0.9)
    entries, ran = house()
    assert ran == ["minus 1", "minus 2", "minus 3"] and entries["minus"]["verdict"] == claims.HOLDS
    entries, ran = house("plus", fresh=True, seeds=4)  # three of the four lie in runs/compare
    assert ran == ["base 4", "plus 4"] and entries["plus"]["seeds"] == 4
    assert house("plus", seeds=3) == (entries, [])  # four are better than three
    claims.main(claims.Options(("plus",), out=str(house.root / "new" / "claims")))  # elsewhere: from what is recorded
    assert len(json.loads((house.root / "new" / "claims.json").read_text())["claims"]["plus"]["arms"]["plus"]) == 3
    toml = house.root / "claims.toml"
    toml.write_text(TOML.replace('record = "old"', 'flags = "--lr 2"'))  # another experiment: nothing is taken for it
    entries, ran = house("plus", "plus", jobs=3)
    assert ran == [f"{name} {seed} --lr 2" for name in ("base", "plus") for seed in (1, 2, 3)]
    toml.write_text(TOML.replace('"plus"]', '"plus", "minus"]').replace('record = "old"', 'flags = "--lr 2"'))
    entries, ran = house("plus")  # a further arm: it alone is run
    assert ran == [f"minus {seed} --lr 2" for seed in (1, 2, 3)] and list(entries["plus"]["arms"]) == ["base", "plus", "minus"]


def test_a_command_that_was_cut_short_does_only_what_is_left(house, monkeypatch):
    real = compare.run

    def cut(item, seed, *rest):
        if (item, seed) == ("minus", 2):
            raise KeyboardInterrupt
        return real(item, seed, *rest)

    monkeypatch.setattr(compare, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        house(jobs=1)
    monkeypatch.setattr(compare, "run", real)
    entries, ran = house()
    assert {"minus 2", "table 3"} <= set(ran) and not {"base 1", "plus 1", "plus 3", "minus 1"} & set(ran)
    assert len(entries) == 3


def test_a_family_record_counts_while_its_scripts_compute_the_same(house):
    numbers = {item: {"greedy accuracy after": dict(seeds=v)} for item, v in dict(base=LOW, plus=HIGH).items()}
    path = house.root / "runs" / "reference" / "old.json"
    record = dict(command="... -- --eval-every 5", summary=numbers, lessons=compare.lessons(["base", "minus", "plus"]))
    path.write_text(json.dumps(record))
    entries, ran = house("plus")
    assert ran == [] and entries["plus"]["source"] == "old.json" and entries["plus"]["arms"]["plus"] == HIGH
    assert entries["plus"]["changed"] == [] and entries["plus"]["seconds"] is None
    toml = house.root / "claims.toml"
    toml.write_text(TOML.replace('"plus"]', '"plus", "minus"]'))
    entries, ran = house("plus")  # an arm that the record has not
    assert ran == ["minus 1", "minus 2", "minus 3"] and entries["plus"]["source"] == "old.json and runs"
    toml.write_text(TOML)
    assert house("plus")[1] == []
    write(house.root, "plus", 0.5)
    entries, ran = house("plus", "minus", recorded=True)  # marked, and nothing is run
    assert ran == [] and entries["plus"]["changed"] == ["plus"] and entries["minus"]["verdict"] == claims.UNTRIED
    page = (house.root / "runs" / "reference" / "claims.md").read_text()
    assert "**holds here**†" in page and "Of 2 claims, 1 holds here, 0 show no difference here, 0 go the other way" in page
    entries, ran = house("plus")
    assert len(ran) == 6 and entries["plus"]["changed"] == [] and entries["plus"]["source"] == "runs"
    assert house("plus", recorded=True, seeds=5) == (entries, [])  # too few seeds anywhere: what is there stays
    path.write_text(json.dumps(record | dict(command="... -- --lr 1")))
    with pytest.raises(UserError, match="plus has other flags than the command of old.json"):
        house("plus")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"claims": {"plus": {}}}', '{"claims": [1]}'])
def test_a_file_of_another_kind_stays(house, text):
    path = house.root / "runs" / "reference" / "claims.json"
    path.write_text(text)
    with pytest.raises(UserError, match="claims.json (cannot be read|is not what runs.claims writes)"):
        house("plus", recorded=True)
    assert path.read_text() == text


def test_a_record_that_cannot_be_read(house):
    (house.root / "runs" / "reference" / "old.json").write_text("{")
    with pytest.raises(UserError, match="old.json cannot be read"):
        house("plus", recorded=True)


def test_what_a_script_computes_is_its_code_without_comments_and_docstrings():
    text = '"""Says."""\n\nx = 1  # one\n\n\ndef f():\n    """Says."""\n    return "# no comment"\n'
    same = text.replace("Says.", "Says\nmore.").replace("# one", "# 1").replace("\n\n\n", "\n")
    assert launch.lesson("x", text) == launch.lesson("x", same) != launch.lesson("x", text.replace("x = 1", "x = 2"))
    assert launch.lesson("x", text) != launch.lesson("x", text.replace("# no comment", "#"))
