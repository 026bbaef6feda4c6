"""What is measured of models: pass@k against enumeration, groups and entropies by hand, the command, tokens in colour."""

import dataclasses
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import UserError, engines, rollout, tasks
from runs import probe, talk
from tests.helpers import ROOT, run, tiny
from tests.test_compare import drawn

__all__ = ["tiny"]


def test_pass_at_k_is_what_all_subsets_give():
    for n in (1, 2, 5, 7):
        for k in range(1, n + 1):
            shares = []
            for c in range(n + 1):
                right = [i < c for i in range(n)]
                found = [any(some) for some in itertools.combinations(right, k)]
                shares.append(sum(found) / len(found))
                assert probe.pass_at_k([c], n, k) == pytest.approx(shares[-1], abs=1e-15)
            assert probe.pass_at_k(range(n + 1), n, k) == pytest.approx(sum(shares) / (n + 1), abs=1e-15)


def test_pass_at_k_worked():
    assert probe.pass_at_k([3], 10, 2) == pytest.approx(1 - 21 / 45, abs=1e-15)
    assert probe.pass_at_k([1], 64, 32) == 0.5 and probe.pass_at_k([1, 0], 64, 8) == 1 / 16
    assert probe.pass_at_k([1], 10**4, 1) == 1e-4 and probe.pass_at_k([1], 10**4, 5000) == 0.5  # where factorials overflow
    assert probe.pass_at_k([9999], 10**4, 2) == 1 and probe.pass_at_k([9999], 10**4, 1) == 0.9999
    for n, k, c in ((4, 5, 1), (4, 0, 1), (4, 2, 5), (4, 2, -1)):
        with pytest.raises(ValueError, match=f"pass@{k} of {n} completions"):
            probe.pass_at_k([c], n, k)


def test_what_pass_at_k_does_not_depend_on():
    n, correct = 24, [0, 1, 1, 5, 12, 23, 24, 0, 2]
    curve = [probe.pass_at_k(correct, n, k) for k in range(1, n + 1)]
    assert curve[0] == pytest.approx(sum(correct) / n / 9) and curve[-1] == pytest.approx(7 / 9)
    gains = [b - a for a, b in zip(curve, curve[1:])]
    assert all(a >= b >= 0 for a, b in zip(gains, gains[1:])) and gains[0] > gains[-1] > 0
    assert [probe.pass_at_k(correct[::-1], n, k) for k in (1, 7)] == [curve[0], curve[6]]
    assert probe.pass_at_k(correct * 3, n, 7) == pytest.approx(curve[6], abs=1e-15)
    assert [probe.powers(n) for n in (1, 2, 8, 12)] == [[1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_groups_by_hand():
    """Three prompts, four completions, groups of two: of six groups two are all wrong, two mixed, two all right."""
    right = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]]).bool()
    found = probe.accuracy(right, torch.tensor([True, False, True]), 2)
    at = {"pass@1": 6 / 12, "pass@2": (1 / 2 + 1 + 5 / 6) / 3, "pass@4": 1.0}
    assert found == pytest.approx({"prompts": 3, "greedy": 2 / 3, **at, "mixed": 1 / 3, "all wrong": 1 / 3})
    whole = probe.accuracy(right, torch.tensor([True, False, True]), 4)
    assert (whole["mixed"], whole["all wrong"]) == (1, 0) and whole["pass@2"] == found["pass@2"]
    answers = ["72", None, None, None, "1", "2", "3", "1"]
    assert probe.distinct(answers, 4) == (2 + 3) / 2 and probe.distinct(answers, 2) == (2 + 1 + 2 + 2) / 4
    assert probe.distinct(["a"] * 8, 8) == 1


def test_entropies_by_hand():
    values = np.array([0.049, 0.0, 0.01, 1.0, 0.0, 0.051, 0.05, 0.5, 0.02, 0.2, 0.0], dtype=np.float32)
    found = probe.entropies(values)
    names = ("below 0.05 nat", "median", "80%", "95%", "held by the top fifth")
    assert found == pytest.approx(dict(zip(names, (6 / 11, 0.049, 0.2, 0.75, 1.5 / 1.88))), abs=1e-6)
    assert probe.entropies(values[::-1].copy()) == found
    assert probe.entropies(values * 3)["held by the top fifth"] == pytest.approx(1.5 / 1.88, abs=1e-6)
    flat = probe.entropies(np.full(50, 0.7))
    assert flat["held by the top fifth"] == pytest.approx(0.2) and (flat["median"], flat["95%"]) == (0.7, 0.7)
    assert probe.entropies(np.array([0.05, 0.01]))["below 0.05 nat"] == 0.5
    assert probe.entropies(np.zeros(3))["held by the top fifth"] == 0


def test_entropy_by_position():
    """A place that is reached by fewer than one completion in a hundred is in the record, and not in table and picture."""
    values, places = np.array([1.0, 2.0, 6.0, 4.0]), np.array([0, 1, 0, 3])
    assert probe.by_position(values, places) == dict(mean=[3.5, 2.0, 0.0, 4.0], tokens=[2, 1, 0, 1])
    curve = dict(mean=[0.1, 0.2, 0.3, 0.9], tokens=[300, 100, 3, 2])
    assert probe.reached(curve) == [0.1, 0.2, 0.3]


def test_tiers_and_chance():
    task = tasks.load("route")
    examples = task.test[:40]
    found = probe.tiers(examples, task)
    assert list(found) == [1, 2, 3, 4] and sorted(sum(found.values(), [])) == list(range(40))
    assert all(task.tier(examples[i]) == t for t, rows in found.items() for i in rows)
    assert probe.tiers(examples, dataclasses.replace(task, tier=None)) == {}
    blind = dataclasses.replace(task, chance=lambda e: e.id / 4)
    two = [e for e in task.train + task.test if e.id in (1, 2)]
    expected = {"prompts": 2, "pass@1": (1 / 4 + 1 / 2) / 2, "pass@3": (1 - 0.75**3 + 1 - 0.5**3) / 2}
    assert probe.chance(two, blind, [1, 3]) == pytest.approx(expected)


class Said:
    """An engine that says what it was told to: greedy texts, and n others of every prompt, given with whether they ended."""

    name, device = "said", torch.device("cpu")

    def __init__(self, tokenizer, greedy, sampled):
        self.tokenizer, self.greedy, self.sampled, self.closed = tokenizer, greedy, iter(sampled), False

    def generate(self, prefixes, n, most, temperature, seeds):
        assert len(set(seeds)) == len(prefixes)
        said = self.greedy if not temperature else [next(self.sampled) for _ in range(n * len(prefixes))]
        ids = [(self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id] * ended, ended) for text, ended in said]
        return [(tokens, [-1.0] * len(tokens), ended) for tokens, ended in ids]

    def close(self):
        self.closed = True


def test_a_probe_of_given_completions(tiny, monkeypatch):
    """Two prompts, four completions each; what was cut is wrong although its text is right. Entropies against transformers'."""
    task = tasks.load("addition")
    task.test = task.test[:2]
    a, b = (e.answer for e in task.test)
    greedy = [(f":{a}", True), (f":{b}", False)]
    sampled = [(f":{a}", True), (f":{a}", False), (":7", True), ("7", True), (f"x:{b}", True), (f":{b}", True)]
    sampled += [(f":{b}", True), (f":{b}", True)]
    said = []

    def make_engine(policy, tokenizer, args, context):
        said.append(Said(tokenizer, greedy, sampled))
        return said[0]

    load = tasks.encode
    monkeypatch.setattr(engines, "make_engine", make_engine)
    monkeypatch.setattr(tasks, "load", lambda name, tokenizer, *more: load(task, tokenizer))
    monkeypatch.setattr(probe, "ROWS", 4)  # a prompt at a time
    found = probe.probe(tiny, probe.Options((tiny,), task="addition", n=4, group=2, temperature=0.7))
    assert said[0].closed and found["engine"] == "said" and found["max_new_tokens"] == 28
    assert (found["right"], found["right_greedy"], found["tiers"]) == ([1, 4], [1, 0], {})
    numbers = found["numbers"]
    assert (numbers["greedy"], numbers["pass@1"], numbers["pass@2"], numbers["pass@4"]) == (0.5, 0.625, 0.75, 1.0)
    assert (numbers["mixed"], numbers["all wrong"], numbers["truncated"]) == (0.25, 0.25, 1 / 8)
    assert numbers["distinct answers"] == (1 + 2 + 1 + 1) / 4 and numbers["distinct texts"] == (1 + 2 + 2 + 1) / 4
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), said[0].tokenizer
    at = {}
    for i, (text, ended) in enumerate(sampled):
        start = tokenizer(task.test[i // 4].prompt)["input_ids"]
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended
        with torch.no_grad():
            logits = lm(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1].double() / 0.7
        for t, entropy in enumerate(torch.distributions.Categorical(logits=logits).entropy().tolist()):
            at.setdefault(t, []).append(entropy)
    assert found["entropy"]["tokens"] == [len(at[t]) for t in range(len(at))] and len(at) > 3
    assert found["entropy"]["mean"] == pytest.approx([sum(x) / len(x) for x in at.values()], abs=1e-5)
    every = [x for some in at.values() for x in some]
    assert numbers["tokens"] == len(every) / 8 and numbers["median"] == pytest.approx(np.median(every), abs=1e-5)


def options(*names, **changes):
    return probe.Options(names, **dict(task="addition", n=8, group=4, prompts=6) | changes)


def test_the_record_and_the_tables(tiny, tmp_path, monkeypatch, capsys):
    """Two names of one model have the same numbers, those of the scripts' evaluation; a prompt's draws are its own."""
    shutil.copytree(tiny, tmp_path / "run" / "checkpoints" / "step-000030")
    plain = tasks.load

    def load(*args, **kwargs):
        return dataclasses.replace(plain(*args, **kwargs), tier=lambda e: e.id % 2, chance=lambda e: (1 + e.id % 2) / 4)

    monkeypatch.setattr(tasks, "load", load)
    pictures = drawn(monkeypatch)
    probe.main(options(tiny, str(tmp_path / "run"), ceiling=0.75, out=str(tmp_path / "new" / "x")))
    record = json.loads((tmp_path / "new" / "x.json").read_text())
    first, second = record["models"].values()
    names = [tiny.rpartition("/")[2], "run step-000030"]
    assert list(record["models"]) == names and second["model"].endswith("run/checkpoints/step-000030")
    assert {k: v for k, v in first.items() if k != "model"} == {k: v for k, v in second.items() if k != "model"}
    args, _, tokenizer, policy = talk.open_model(tiny, seed=1, max_new_tokens=28)
    args.eval_prompts, task = 6, plain("addition", tokenizer)
    scorer = lambda texts, answers: zip(*map(task.check, texts, answers))  # noqa: E731
    assert first["numbers"]["greedy"] == pytest.approx(
        rollout.evaluate(engines.HF(policy, tokenizer), scorer, tokenizer, task, args)["greedy_accuracy"], abs=1e-6
    )
    odd = [i for i, e in enumerate(task.test[:6]) if e.id % 2]
    assert first["tiers"]["1"]["pass@1"] == pytest.approx(sum(first["right"][i] for i in odd) / 8 / len(odd), abs=1e-6)
    assert sum(first["right"]) > 0 and record["prompts"] == [e.id for e in task.test[:6]]
    blind = record["chance"]
    assert blind["tiers"]["0"]["pass@2"] == pytest.approx(1 - 0.75**2, abs=1e-6) and blind["tiers"]["1"]["prompts"] == len(odd)
    assert (record["options"]["seed"], record["options"]["group"], record["options"]["ceiling"]) == (1, 4, 0.75)
    assert record["command"].startswith("python -m runs.probe ") and record["versions"]["torch"] == torch.__version__

    (left, right), printed = pictures[0], capsys.readouterr().out
    curves = {line.get_label(): line.get_ydata() for line in left.get_lines()}
    assert list(curves) == [*names, "chance", "supervised"] and list(curves["supervised"]) == [0.75, 0.75]
    assert list(curves[names[0]]) == pytest.approx([first["numbers"][f"pass@{k}"] for k in (1, 2, 4, 8)], abs=1e-6)
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2", "4", "8"]
    assert list(right.get_lines()[1].get_ydata()) == pytest.approx(probe.reached(first["entropy"]), abs=1e-6)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0][:4] == ["", "prompts", "greedy", "pass@1"] and [r[0] for r in rows[2:5]] == [*names, "chance"]
    assert rows[2][1:] == [str(x) if x == 6 else f"{x:.3f}" for x in first["numbers"].values()]
    assert rows[4][1:4] == ["6", "", f"{blind['numbers']['pass@1']:.3f}"] and rows[4][-1] == ""
    assert [r[:2] for r in rows[7:13]] == [[t, name] for t in "01" for name in (*names, "chance")]
    assert rows[-1][:3] == [names[1], *(f"{x:.3f}" for x in first["entropy"]["mean"][:2])]

    monkeypatch.setattr(probe, "ROWS", 8)  # a prompt at a time
    probe.main(options(tiny, prompts=3, out=str(tmp_path / "few")))
    few = json.loads((tmp_path / "few.json").read_text())["models"][names[0]]
    assert few["right"] == first["right"][:3] and len(pictures) == 2


def test_a_file_as_a_task_and_a_reward_of_its_own(tiny, tmp_path, capsys):
    """The prompts of addition as a file, and a check that wants wrong answers: others are right. 0.9 is not right."""
    some = tasks.load("addition").test[:6]
    rows = [dict(prompt=e.prompt, answer=e.answer) for e in some]
    for name in ("train", "test"):
        other = dict(prompt="1+1=", answer="2")  # what is trained on must be others'
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (rows if name == "test" else [other])))
    (tmp_path / "mine.py").write_text("def check(text, answer):\n    return 0.9 if text.endswith(':' + answer) else 2.0\n")
    given = dict(max_new_tokens=28, out=str(tmp_path / "x"), n=4)
    probe.main(options(tiny, **given))
    own = dict(task=str(tmp_path / "train.jsonl"), reward=f"{tmp_path}/mine.py:check", prompt_template="{prompt}")
    built_in = json.loads((tmp_path / "x.json").read_text())["models"]
    probe.main(options(tiny, **given | own))
    found = json.loads((tmp_path / "x.json").read_text())
    (mine,), (theirs,) = found["models"].values(), built_in.values()
    assert mine["right_greedy"] == [1 - x for x in theirs["right_greedy"]] and 0 < sum(mine["right"]) < 24
    assert found["chance"] is None and "chance" not in capsys.readouterr().out


def logged(folder):
    """samples.jsonl of a run with two steps token by token."""
    folder.mkdir()
    rows = [dict(step=1, prompt_id=5, reward=1.0, tokens=["9"], columns=dict(adv=[0.5]))]
    rows += [dict(step=21, prompt_id=7, reward=1.0, tokens=["<b>", "\n"], columns=dict(adv=[-1.0, 1.0], entropy=[0.25, 0.75]))]
    rows += [dict(step=21, prompt_id=7, reward=-0.5, tokens=["\x1b7"], columns=dict(adv=[0.0], entropy=[1.25]))]
    rows += [dict(step=22, prompt_id=9, reward=1.0, completion="9")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_tokens_in_colour(tmp_path, monkeypatch, capsys):
    run, page = logged(tmp_path / "run"), tmp_path / "a" / "page.html"
    probe.main(options(run, colour="entropy", html=str(page)))
    plain = ["entropy at step 21, prompt 7, 0.25 to 1.25", "  1.00  <b>    \N{RETURN SYMBOL}", "       0.25 0.75"]
    assert capsys.readouterr().out.splitlines() == [*plain, " -0.50 \\x1b7", "        1.25", f"wrote {page}"]
    colours = [re.findall(r"\d+", x) for x in re.findall(r"rgb\((.*?)\)", page.read_text())]
    at = [talk.tint(x, probe.HEAT) for x in (0, 0.25, 0.5, 0.75, 1, 0, 0.5, 1)]
    assert [tuple(map(int, x)) for x in colours] == at and ">&lt;b&gt;</span>" in page.read_text()
    assert "\x1b" not in page.read_text()
    monkeypatch.setattr(talk.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    probe.main(options(run, colour="adv"))
    lit = capsys.readouterr().out.splitlines()
    texts, shares = ["<b>", "\N{RETURN SYMBOL}"], [0.0, 1.0]
    assert lit[1] == "  1.00 " + talk.painted(texts, shares, probe.HEAT) and len(lit) == 3
    marks = [" -1 ", " -0.5 ", " 0 ", " 0.5 ", " 1 "]
    assert lit[0] == "adv at step 21, prompt 7, -1 to 1 " + talk.painted(marks, [0, 0.25, 0.5, 0.75, 1], probe.HEAT)
    probe.main(options(run, colour="adv", step=1))  # all alike
    assert capsys.readouterr().out.splitlines()[1] == "  1.00 " + talk.painted(["9"], [0.0], probe.HEAT)
    for given, complaint in (
        (dict(colour="entropy", step=22), r"samples.jsonl: no such step; those with tokens are: 1, 21$"),
        (dict(colour="weight"), "--colour weight: .*samples.jsonl has the columns adv, entropy$"),
        (dict(colour="adv", html=str(tmp_path / "run" / "samples.jsonl" / "x")), "cannot write .*/x: File exists"),
    ):
        with pytest.raises(UserError, match=complaint):
            probe.main(options(run, **given))
    with pytest.raises(UserError, match="those with tokens are: none"):
        probe.main(options(str(tmp_path), colour="adv"))


def test_what_models_are_called(tmp_path):
    a, b = (str(tmp_path / x / "checkpoints" / "step-000001") for x in ("a", "b"))
    for folder in (a, b, tmp_path / "c" / "a"):
        (tmp_path / folder).mkdir(parents=True)
    named = probe.labels(["tiny", str(tmp_path / "a"), b, str(tmp_path / "c" / "a")])
    assert list(named.values()) == ["tiny", "a step-000001", "b step-000001", "a"]
    assert probe.labels([a, str(tmp_path / "a")]) == {a: a, str(tmp_path / "a"): str(tmp_path / "a")}


MISTAKES = [
    (dict(models=()), "needs a model at least"),
    (dict(n=12), "--n 12 must be a multiple of --group 8"),
    (dict(n=0), "--n 0 must be"),
    (dict(prompts=0), "--prompts at least 1"),
    (dict(temperature=0.0), "--temperature must be above 0"),
    (dict(task="rout"), "unknown task 'rout'; nearest: route"),
    (dict(task="letters4"), "task letters4: its completions have a gold reward, none is right or wrong"),
    (dict(models=("tiny", "/no/such")), "no such folder '/no/such'"),
    (dict(out="/dev/null/x"), "cannot write /dev/null/x.png: (File exists|Not a directory)"),
]


@pytest.mark.parametrize("given, complaint", MISTAKES)
def test_mistakes(given, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        probe.main(probe.Options(**dict(models=("tiny",), out=str(tmp_path / "x")) | given))
    assert not list(tmp_path.iterdir())


def test_the_command(tiny, tmp_path):
    command = [tiny, "--task", "addition", "--n", "8", "--prompts", "4", "--out", tmp_path / "x"]
    done = run(tmp_path, *command, script=ROOT / "runs" / "probe.py")
    assert done.code == 0 and not done.err and done.out.startswith("addition: 4 held-out prompts, 8 completions each")
    assert done.out.splitlines()[-1] == f"wrote {tmp_path / 'x.png'} and {tmp_path / 'x.json'}"
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["command"] == "python -m runs.probe " + " ".join(map(str, command))
    assert (tmp_path / "x.png").stat().st_size > 9999
