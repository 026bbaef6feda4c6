"""XGuard's worked numbers, what a first token says and decides, the harmless world, results, and what a run leaves."""

import ast
import copy
import functools
import hashlib
import json
import re
import shutil
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from algos import xguard
from common import UserError, demonstrations, figures, models, rewards, settings
from common.engines import HF
from common.worlds import tiny
from tests.helpers import ROOT, checkpoints, lines, outcome, run, same, user_error

SCRIPT = ROOT / "algos" / "xguard.py"
SMALL = "--batch-size 8 --eval-prompts 14 --checkpoint-every 1 --eval-every 1".split()
RISKY = dict(d="drinks", m="mammals", t="tools")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@functools.cache
def world(**changes):
    return xguard.guard(xguard.Args(**changes))


# ---------------------------------------------------------------- the first token

LOGITS = double([[1.0, 2, 0.5, -1, 0]])  # sec, dw, med, a, another token


def test_worked_scores():
    """Of the whole vocabulary, and not of the ids alone, which would be 0.609460 for dw."""
    s = xguard.first_token(LOGITS, torch.tensor([0, 1, 2, 3]))
    assert s[0].tolist() == pytest.approx([0.207124, 0.563021, 0.125627, 0.028031, 0.076197], abs=1e-6)
    assert s[0, :4].sum() < 1 and (s[0, 1] / s[0, [0, 1, 2, 3]].sum()).item() == pytest.approx(0.609460, abs=1e-6)
    # a is in the vocabulary, and no category where no line has added it
    three = xguard.first_token(LOGITS, torch.tensor([0, 1, 2]))
    assert three[0].tolist() == pytest.approx([0.207124, 0.563021, 0.125627, 0.076197], abs=1e-6)
    masked = xguard.first_token(LOGITS, torch.tensor([0, 1, 2, 3]), torch.tensor([[1.0, 1, 1, 0]]))
    assert masked[0].tolist() == pytest.approx([0.207124, 0.563021, 0.125627, 0, 0.076197], abs=1e-6)


@pytest.mark.parametrize("threshold, flagged", [(0.5, True), (0.563, True), (0.564, False), (0.6, False)])
def test_worked_decision(threshold, flagged):
    s = xguard.first_token(LOGITS, torch.tensor([0, 1, 2]))
    assert xguard.decide(double([[0.25, 0.5, 0.25]]), double([0.0, 0.5]))[1].item()  # from the threshold on
    category, flag = xguard.decide(s, double([0.0, threshold, 0.0]))  # med's threshold is never asked
    assert category.tolist() == [1] and flag.tolist() == [flagged]


def test_what_is_no_id_is_undecided_and_what_is_safe_is_safe():
    s = double([[0.2, 0.3, 0.1, 0.4], [0.3, 0.3, 0.2, 0.0], [0.1, 0.3, 0.3, 0.0], [0.2, 0.1, 0.6, 0.1]])
    category, flag = xguard.decide(s, double([0.0, 0.0, 0.0]))
    assert category.tolist() == [3, 0, 1, 2]  # of two that are alike the first
    assert flag.tolist() == [False, False, True, True]  # although the risks of the second have more than half
    known, unknown = torch.ones(1, 2), torch.tensor([[1.0, 0.0]])
    logits, ids = double([[0.0, 3.0, -1.0]]), torch.tensor([0, 1])
    assert xguard.decide(xguard.first_token(logits, ids, known), double([0, 0]))[0].item() == 1
    category, flag = xguard.decide(xguard.first_token(logits, ids, unknown), double([0, 0]))
    assert category.item() == 2 and not flag.item()


def test_scores_have_gradients_and_no_row_knows_of_another():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([7, 2, 9])
    s = xguard.first_token(logits, ids)
    torch.testing.assert_close(s[2:3], xguard.first_token(logits[2:3], ids))
    s[3].sum().backward()
    assert logits.grad[3].abs().sum() > 0 and not logits.grad[[0, 1, 2, 4]].any()


# ---------------------------------------------------------------- distillation, reward, texts


@pytest.mark.parametrize("forward, value, gradient", [
    (1.0, 0.649626, [-0.488058, 0.011942, 0.476117]), (0.0, 0.767931, [-0.415978, -0.150465, 0.566443]),
    (0.5, 0.708779, [-0.452018, -0.069262, 0.521280]),
])  # fmt: skip
def test_worked_distillation(forward, value, gradient):
    logits = double([[0.0, 0, 1]]).requires_grad_()
    loss = xguard.distill(logits, double([[0.7, 0.2, 0.1]]).log() + 3, forward)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-6) and logits.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)
    assert xguard.distill(logits, logits, forward).item() == pytest.approx(0, abs=1e-12)


def test_worked_reward():
    """Also as --reward of grpo.py, where the whole path is common's."""
    gold, end = "dw\n<explanation>x</explanation>", "\n<explanation>because</explanation>"
    own = rewards.Own(f"{SCRIPT}:policy_reward")
    for text, value in (("dw" + end, 1.0), ("ter" + end, 0.5), ("sec" + end, 0.0), ("dw\n<explanation>no end", -0.2)):
        assert xguard.policy_reward(text, gold) == value and own(text, gold)[1] == value
    assert xguard.policy_reward("sec", "sec") == xguard.policy_reward("s", "s") == 1.0
    assert xguard.policy_reward("dw", "sec") == 0.0 and xguard.policy_reward("s", "q", safe=("q",)) == 0.0


NO = (None, None)


@pytest.mark.parametrize("text, found", [
    ("dw", ("dw", None)), (" dw \n", ("dw", None)), ("dw\n<explanation> it is so </explanation>", ("dw", "it is so")),
    ("dw <explanation>two\nlines</explanation>\n", ("dw", "two\nlines")), ("<explanation>so</explanation> dw", ("dw", "so")),
    ("", NO), ("dw so", NO), ("dw <explanation> cut", NO), ("<explanation>so</explanation>", NO),
    ("<explanation>a</explanation> dw <explanation>b</explanation>", NO), ("a <explanation>b</explanation> c", NO),
    ("a <explanation>b</explanation> c <explanation>d</explanation>", NO),
])  # fmt: skip
def test_what_can_be_read(text, found):
    assert xguard.parse(text) == found


def test_no_policy_and_an_empty_one_are_the_same_prompt():
    assert xguard.prompt(None, "tea cat") == xguard.prompt("", "tea cat") == xguard.prompt("  ", "tea cat")
    bare, lined = xguard.prompt("", "tea cat"), xguard.prompt("a new trees", "tea cat")
    assert bare == "policy : text : tea cat verdict :" and lined == "policy : a new trees text : tea cat verdict :"
    assert [w for w in lined.split() if w not in "a new trees".split()] == bare.split()
    assert "policy : text : verdict :" == xguard.prompt("", "")


# ---------------------------------------------------------------- the world


def told(fact):
    """The right category and that of a guard that is blind to the line, by rules of their own."""
    known, twofold = xguard.families()
    of = {w: f for f, words in known.items() for w in words}
    there, code = [of.get(w) for w in fact["text"].split()], {f: c for c, f in RISKY.items()}
    blind = next((code[f] for f in there if f in code), "s")
    line = fact["line"].split()
    if "also" in line or "new" in line:
        return (line[0] if line[-1] in there else blind), blind
    if "only" in line:
        return ("s" if blind == line[0] and line[-1] not in fact["text"].split() else blind), blind
    return blind, blind


def test_labels_are_functions_of_text_and_line():
    task, seen = world(), set()
    for e in task.train + task.test:
        fact = task.tier(e)
        if "said" in fact:
            continue
        assert e.prompt == xguard.prompt(fact["line"], fact["text"])
        if fact["chance"] is None:
            right, blind = told(fact)
            assert (fact["right"][0], fact["blind"][0]) == (right, blind), e.prompt
            assert fact["flip"] == (right != blind) and xguard.parse(e.answer) == fact["right"]
        else:
            assert not fact["line"]  # a word of two meanings stands under no line
        category, reason = xguard.parse(e.answer)
        assert (category == "s") == (reason == "nothing" or "without" in reason)
        assert reason == "nothing" or reason.split()[0] in fact["text"].split()
        seen.add((fact["kind"], fact["flip"]))
    assert len(seen) == 9 and len(task.train) == 20000 and len(task.test) == 1200


def test_words_of_two_meanings_are_flagged_as_often_as_they_are_meant():
    task, twofold = world(), xguard.families()[1]
    assert sorted(chance for _, chance in twofold.values()) == pytest.approx([i / 10 for i in range(1, 10)])
    e = next(e for e in task.test if task.tier(e)["chance"] == 0.8)
    texts = [task.demonstrate(Random(i), e, 1.0) for i in range(2000)]
    assert sum(not t.startswith("s ") for t in texts) / 2000 == pytest.approx(0.8, abs=0.04)


def test_a_family_is_kept_from_lines():
    task = world()
    trained = {task.tier(e).get("line", "").split(" ")[-1] for e in task.train}
    assert "instruments" not in trained and {"fruits", "trees", "outside"} <= trained
    unseen = [task.tier(e)["line"].split()[-1] for e in task.test if task.tier(e)["kind"] == "unseen"]
    assert set(unseen) == {"instruments"} and len(unseen) == 200


def test_flags_of_the_world():
    def shares(**changes):
        task = world(**changes)
        facts = [task.tier(e) for e in task.train]
        lined = [f for f in facts if f.get("line")]
        return [sum(x) / 20000 for x in (["said" in f for f in facts], [1] * len(lined), [f["flip"] for f in lined])]

    assert shares() == pytest.approx([0.2, 0.4, 0.2], abs=0.02)
    assert shares(lines="keep") == pytest.approx([0.2, 0.4, 0.0], abs=0.02)
    assert shares(lines="none") == pytest.approx([0.2, 0.0, 0.0], abs=0.02)
    assert shares(naming=0.0)[0] == 0
    assert [world(lines=x).test[5].prompt for x in ("keep", "none")] and len(world(lines="none").test) == 1200
    e = next(e for e in world().test if world().tier(e)["flip"])
    blind, right = (world().tier(e)[k][0] for k in ("blind", "right"))
    for careful, wanted in ((0.0, blind), (1.0, right)):  # from habit: blind to the line
        assert xguard.parse(world().demonstrate(Random(1), e, careful))[0] == wanted
    texts = {order: world(order=order).demonstrate(Random(1), e, 1.0) for order in ("label", "only", "reason")}
    first, *reason = texts["label"].split()
    assert texts["only"] == first == right and texts["reason"].split() == [*reason, first]


def test_nothing_real_is_judged():
    """The words are those of ten harmless families, written out in the script; none come from a file, the net or a package; and
    the script has no category of a real guard but the name of its safe one."""
    known, twofold = xguard.families()
    assert list(known) == "drinks mammals tools fruits games clothes birds trees colours instruments".split()
    words = [w for of in known.values() for w in of]
    assert all(len(of) == 8 for of in known.values()) and len(set(words) | set(twofold)) == 89
    digest = hashlib.sha256(" ".join([*words, *twofold]).encode()).hexdigest()[:12]
    assert digest == "369ac3bc972b"  # who changes a word looks at all of them
    structure = "policy text verdict families : also only with new without nothing is a d m t s <explanation> </explanation>"
    vocabulary = set(world().tokenizer().get_vocab()) - {"<pad>", "<eos>", "<unk>"}
    assert vocabulary == {*words, *twofold, *known, *structure.split(), "today", "indoors", "twice", "outside"}
    tree = ast.parse(SCRIPT.read_text())
    for name in ("families", "sample", "guard"):
        of = next(n for n in tree.body if getattr(n, "name", "") == name)
        called = {ast.unparse(n.func).rpartition(".")[2] for n in ast.walk(of) if isinstance(n, ast.Call)}
        assert not called & {"open", "read_text", "urlopen", "get_json", "load_dataset", "from_pretrained", "read_rows"}
        found = {a.name for n in ast.walk(of) if isinstance(n, ast.ImportFrom | ast.Import) for a in n.names}
        assert found <= {"Random", "tasks", "tiny"}
    assert sorted(set(re.findall(r"\b(?:sec|dw|ter|med)\b", SCRIPT.read_text()))) == ["sec"]


# ---------------------------------------------------------------- categories and thresholds


def parts(tokenizer, answers, **changes):
    args = xguard.Args(**dict(safe="s", task="rows.jsonl") | changes)
    rows = [SimpleNamespace(answer=a, where=f"rows.jsonl:{i + 1}") for i, a in enumerate(answers)]
    return xguard.categories(SimpleNamespace(train=rows[:1], test=rows[1:]), tokenizer, args)


def test_categories_are_one_token_each():
    tokenizer = tiny.characters(tiny.CHARACTERS + "<>")
    names, ids, limits = parts(tokenizer, ["d\n<explanation>x</explanation>", "s", "m"], ids="q", thresholds="0.5,m=0.75")
    assert names == ["s", "d", "m", "q"] and ids == tokenizer.convert_tokens_to_ids(names)
    assert limits.tolist() == [0.5, 0.5, 0.75, 0.5]
    with pytest.raises(UserError, match="the category 'dw' is not one token of"):
        parts(tokenizer, ["dw", "s"])
    with pytest.raises(UserError, match="the category '§' is not one token of"):
        parts(tokenizer, ["§", "s"])
    tokenizer.add_tokens(["dw"])
    assert parts(tokenizer, ["dw", "s"])[0] == ["s", "dw"]
    tokenizer.add_tokens(["s\n"])  # a token that swallows the line break: in a completion s is another one
    with pytest.raises(UserError, match="the category 's' is not one token of"):
        parts(tokenizer, ["dw", "s"])
    with pytest.raises(UserError, match=r"^rows.jsonl:2: needs a category, and <explanation> behind or before it"):
        parts(tokenizer, ["d", "d so"])


@pytest.mark.parametrize("given", ["x", "0.5,d", "0.5,d=x", "1.5", "-0.1", "0.5,q=0.5", "nan", ""])
def test_thresholds_that_cannot_be_read(given):
    with pytest.raises(UserError, match="needs a number from 0 to 1, and behind it others, name=number, of s, d$"):
        parts(tiny.characters(tiny.CHARACTERS + "<>"), ["d", "s"], thresholds=given)


# ---------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def untrained():
    """-> (args, task, tokenizer, policy, known) of a small model with large random weights, so that its scores differ."""
    args, _ = settings.resolve(xguard.Args(model="tiny-small", eval_prompts=24), lambda name: world())
    task, tokenizer = world(), world().tokenizer()
    config = tiny.config("tiny-small", task)
    config.initializer_range = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = models.Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    xguard.load(args, config, tokenizer, lambda name: task)
    return args, task, tokenizer, policy, xguard.categories(task, tokenizer, args)


def test_a_row_is_what_one_pass_over_its_prompt_says(untrained):
    args, task, tokenizer, policy, (names, ids, limits) = untrained
    rows = xguard.measure(HF(policy, tokenizer), policy, task, tokenizer, untrained[4], args)
    assert [r["item"] for r in rows] == list(range(24)) and [r["calls"] for r in rows] == [1] * 24
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(policy.lm.config), dtype=torch.float64, attn_implementation="eager")
    plain.load_state_dict(policy.lm.state_dict())
    for r, e in zip(rows, task.test):
        p = plain(torch.tensor([e.ids])).logits[0, -1].softmax(-1).tolist()
        added = r["line"].startswith("a ")
        some = {n: p[i] for n, i in zip(names, ids) if n != "a" or added}
        assert {n: r["scores"][n] for n in some} == pytest.approx(some, abs=1e-6) and (added or r["scores"]["a"] == 0)
        outside = max(x for i, x in enumerate(p) if i not in [ids[names.index(n)] for n in some])
        best = max(some, key=some.get)
        assert r["outside"] == pytest.approx(outside, abs=1e-6)
        assert r["category"] == (None if outside > some[best] else best)
    few = xguard.measure(HF(policy, tokenizer), policy, task, tokenizer, untrained[4], replace(args, eval_prompts=5))
    for a, b in zip(few, rows):  # whoever is beside it
        assert {**a, "scores": 0, "outside": 0} == {**b, "scores": 0, "outside": 0}
        assert a["scores"] == pytest.approx(b["scores"], abs=1e-6) and a["outside"] == pytest.approx(b["outside"], abs=1e-6)
    assert len(few) == 5


def test_the_token_that_is_the_category():
    """Of the completion's own place: first, or last but the end."""
    ids = torch.tensor([[9, 5, 1, 7, 5, 2, 0], [9, 7, 5, 6, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    mb = SimpleNamespace(ids=ids, mask=mask, trained=mask)
    assert xguard.spoken(mb, [5, 6], xguard.Args()).tolist() == [[True] + [False] * 5, [False] * 6]
    late = xguard.spoken(mb, [5, 6], xguard.Args(order="reason"))
    assert late.nonzero().tolist() == [[0, 3], [1, 2]]


def row(i, gold, scores, kind="none", flip=False, line="", chance=None, blind=None, said=None, outside=0.0):
    best = max(scores, key=scores.get)
    category, end = best if scores[best] >= outside else None, "<explanation> x </explanation>"
    out = dict(item=i, kind=kind, flip=flip, line=line, text="tea", chance=chance, blind=blind or gold, gold=gold)
    out |= dict(told=f"{gold} {end}", said=said or f"{category} {end}", category=category)
    out |= dict(flagged=category not in ("s", None) and scores[best] >= 0.5, outside=outside, calls=1, tokens=6)
    return out | dict(scores={n: scores.get(n, 0.0) for n in "sdmta"})


# kind, flip, the right category, the model's, the blind one
LINED = """widen flips d d s, widen stays s d s, narrow flips s s d, narrow stays d d d,
    add flips a s s, add stays s s s, unseen flips a a s, unseen stays s a s"""
ROWS = [
    row(0, "s", dict(s=0.9, d=0.1)), row(1, "d", dict(s=0.1, d=0.9)), row(2, "d", dict(s=0.3, d=0.4, m=0.3)),
    row(3, "s", dict(s=0.2, m=0.8), chance=0.3), row(4, "t", dict(t=0.2), outside=0.8, said="t"),
]  # fmt: skip
for kind, flip, gold, best, blind in map(str.split, LINED.split(",")):
    ROWS.append(row(len(ROWS), gold, {best: 1.0}, kind, flip == "flips", "a new trees", blind=blind))
EVALS = [dict(step=s, no_line_right=s / 4, flips_right=0.5, stays_right=0.25, prompts=13) for s in (0, 2, 4)]


def test_results_of_rows_by_hand(tmp_path):
    found = xguard.results(ROWS + EVALS, xguard.Args())
    table = found["table"]
    first = table["first token, threshold 0.5"]
    # flagged: 1 rightly, 3 wrongly; 2 is below the threshold, 4 undecided
    assert (first["precision"], first["recall"], first["F1"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert first["category right"] == 3 / 5 and first["undecided"] == 1 / 13 and first["calls"] == 1
    chances, unsafe = [0.1, 0.9, 0.7, 0.8, 0.2], [0, 1, 1, 0, 1]
    assert first["ECE"] == pytest.approx(sum(abs(c - u) for c, u in zip(chances, unsafe)) / 5)
    assert table["first token, no threshold"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3})
    assert table["all risks together, 0.5 (ours)"]["recall"] == 2 / 3  # 2 of them: together 0.7
    assert table["every text flagged"] == pytest.approx({"precision": 3 / 5, "recall": 1.0, "F1": 6 / 8})
    whole = table["whole completion"]
    assert whole["calls"] == 6 and whole["reason right"] == pytest.approx(8 / 9)  # of nine whose category is right one has none
    kinds, ends = ("widen", "narrow", "add", "new family"), ("flips", "stays")
    cells = [[table[f"line: {kind}"][f"right, verdict {end}"] for end in ends] for kind in kinds]
    assert cells == [[1, 0], [1, 1], [0, 1], [1, 0]]
    assert table["blind to lines"] == {"right, verdict flips": 0.0, "right, verdict stays": 1.0}
    assert xguard.progress(ROWS) == {"no_line_right": 3 / 5, "flips_right": 3 / 4, "stays_right": 2 / 4}
    kinds = [p["kind"] for p in found["panels"]]
    assert kinds == ["lines", "heat", "lines", "lines", "points", "bars", "tokens"]
    assert found["panels"][0]["of"]["no line"] == [[0, 0.0], [2, 0.5], [4, 1.0]]
    assert found["panels"][2]["of"] == {"texts": [[0.3, 0.8]]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    figures.draw({"": figures.merge([found, found])}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000
    # a threshold only ever lets go: recall never rises, and what is undecided is never flagged
    recall = [y for _, y in found["panels"][3]["of"]["recall"]]
    assert recall == sorted(recall, reverse=True) and recall[0] == 2 / 3


def test_results_of_a_file_and_of_few_rows():
    rows = [r | dict(kind="rows", blind=None, line="", flip=False) for r in ROWS]
    found = xguard.results(rows, xguard.Args(thresholds="0.8", order="only"))
    assert list(found["table"])[0] == "first token, threshold 0.8"
    assert [panel["kind"] for panel in found["panels"]] == ["lines", "points"]
    assert not any("line" in name for name in found["table"]) and found["table"]["whole completion"]["reason right"] is None
    for few in (ROWS[:1], ROWS[5:6] + ROWS[:1]):
        assert xguard.results(few + EVALS, xguard.Args())["table"]["first token, threshold 0.5"]["recall"] is None


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xguard")
    done = run(folder, *SMALL, "--steps", 2, "--run-dir", folder / "run", script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    return folder / "run", done


def test_what_a_run_leaves(whole):
    folder, done = whole
    rows, evals = lines(folder / "items.jsonl"), lines(folder / "evals.jsonl")
    assert [r["item"] for r in rows] == list(range(14)) and [e["step"] for e in evals] == [0, 1, 2]
    assert {"no_line_right", "flips_right", "stays_right", "greedy_accuracy", "perplexity"} <= set(evals[0])
    args = xguard.Args(**json.loads((folder / "config.json").read_text())["args"])
    found = json.loads((folder / "results.json").read_text())
    assert found == json.loads(json.dumps(xguard.results(rows + evals, args)))  # of these lines alone
    assert (folder / "picture.png").exists() and "| blind to lines |" in done.out
    assert re.fullmatch(
        r"F1 of the first token 0\.\d\d \(every text flagged: 0\.\d\d\), category right where a line flips the verdict "
        r"\d\.\d\d \(blind to lines: 0\), where it does not \d\.\d\d \(1\), on 14 held-out prompts", done.out.splitlines()[-1]
    )  # fmt: skip
    logged = lines(folder / "metrics.jsonl")
    assert all(r["category_logp"] < 0 and r["loss"] == pytest.approx(-r["logp"], rel=1e-6) for r in logged)


def test_killed_and_resumed(whole, tmp_path):
    """The same results to the byte, of what was killed behind its first step."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    for name in ("items.jsonl", "results.json", "picture.png"):
        (tmp_path / "run" / name).unlink()
    done = run(tmp_path, "--resume", tmp_path / "run", script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    same(outcome(tmp_path / "run"), outcome(whole[0]))
    for name in ("items.jsonl", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()
    assert done.out.splitlines()[-1] == whole[1].out.splitlines()[-1]


def test_its_own_teacher_has_nothing_to_teach(whole, tmp_path):
    """A run of the guard goes on as a model; what is distilled from itself has a loss of 0, and a reason first is read late."""
    args = [*SMALL, "--model", whole[0], "--teacher", whole[0], "--steps", 1, "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *args, "--forward", 0.3, script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert abs(row["loss"]) < 1e-6 < -row["logp"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Folder of a small Qwen3 with a chat template, whose categories are tokens, and a file of judged texts."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = tiny.characters(tiny.CHARACTERS + "<>")
    tokenizer.add_tokens(["sec", "dw", "ter"])
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(head_dim=16, vocab_size=len(tokenizer), max_position_embeddings=256)
    config = Qwen3Config(pad_token_id=0, eos_token_id=1, bos_token_id=None, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    said = ["sec\n<explanation>no animal</explanation>", "dw\n<explanation>a cat</explanation>"]
    rows = [dict(prompt=f"{'a cat' if i % 2 else 'an oak'} {i}", completion=said[i % 2]) for i in range(15)]
    rows += [dict(messages=[dict(role="user", content="a cat"), dict(role="assistant", content=said[1])])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


LOCAL = "--max-new-tokens 40 --dtype float32 --optimizer adamw --batch-size 4 --eval-prompts 8".split()


def test_a_guard_by_name_is_judged_as_it_is(real, tmp_path):
    """Without a step: nothing but the measurements. An id that no row has is a category where --ids names it."""
    args = ["--model", real / "model", "--task", real / "rows.jsonl", *LOCAL, "--steps", 0, "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *args, "--ids", "ter", script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    rows = lines(tmp_path / "run" / "items.jsonl")
    assert list(rows[0]["scores"]) == ["sec", "dw", "ter"] and {r["gold"] for r in rows} <= {"sec", "dw"}
    assert done.out.splitlines()[-1].startswith("F1 of the first token 0.")
    # the same as by hand
    tokenizer = models.load_tokenizer(SimpleNamespace(model=str(real / "model"), task="x.jsonl"))
    plain = AutoModelForCausalLM.from_pretrained(real / "model")
    a = xguard.Args(model=str(real / "model"), task=str(real / "rows.jsonl"), max_new_tokens=40)
    task, _ = demonstrations.load(a, plain.config, tokenizer)
    p = plain(torch.tensor([task.test[0].ids])).logits[0, -1].softmax(-1)
    wanted = {n: p[tokenizer.convert_tokens_to_ids(n)].item() for n in rows[0]["scores"]}
    assert rows[0]["scores"] == pytest.approx(wanted, abs=1e-6)


def test_a_real_model_learns_from_a_file(real, tmp_path):
    args = ["--model", real / "model", "--task", real / "rows.jsonl", *LOCAL, "--steps", 12, "--lr", 1e-2, "--warmup-steps", 1]
    done = run(tmp_path, *args, "--run-dir", tmp_path / "run", "--eval-every", 0, "--checkpoint-every", 0, script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    before, after = lines(tmp_path / "run" / "evals.jsonl")
    assert after["perplexity"] < before["perplexity"] and len(lines(tmp_path / "run" / "items.jsonl")) == 3
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("argv, complaint", [
    (["--thresholds", "2"], "--thresholds 2: needs a number from 0 to 1"),
    (["--ids", "zz"], "the category 'zz' is not one token of"),
    (["--safe", "ok"], "the category 'ok' is not one token of"),
    (["--forward", "1.5"], "--forward must be at least 0 and at most 1"),
    (["--task", "addition"], "is not one token of tiny: no first token could be its score"),
])  # fmt: skip
def test_mistakes_are_one_line(argv, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["xguard.py", *argv])
    monkeypatch.setattr(xguard, "guard", lambda args: world())
    flags = {k.removeprefix("--"): float(v) if k == "--forward" else v for k, v in zip(argv[::2], argv[1::2])}
    with pytest.raises(UserError, match=re.escape(complaint)) as caught:
        xguard.train(xguard.Args(run_dir=str(tmp_path / "run"), **flags))
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_no_teacher(real, whole, tmp_path):
    args = ["--model", real / "model", "--task", real / "rows.jsonl", *LOCAL, "--steps", 1, "--run-dir", tmp_path / "run"]
    said = user_error(run(tmp_path, *args, "--teacher", whole[0], script=SCRIPT))
    assert said.startswith("--teacher ") and "tokens, the model " in said
