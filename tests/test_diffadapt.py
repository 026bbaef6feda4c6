"""DiffAdapt's worked numbers, its rule, threshold and probe, rows that are decoded side by side, the world, what is measured on
rows made by hand, and the script as a user runs it."""

import itertools
import json
import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from algos import decode, diffadapt
from common import UserError, engines, figures, models, settings
from common.worlds import tiny
from tests.helpers import ROOT, lines, run, user_error

SCRIPT = ROOT / "algos" / "diffadapt.py"
EASY, NORMAL, HARD = range(3)


def args(**changes):
    own = dict(task="moves", max_new_tokens=40, suffix=("E", "N", "H"), batch=4, questions=16, dtype="float32")
    return diffadapt.Args(**own | changes)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the rule


def test_worked_entropies():
    laws = double([[0.7, 0.2, 0.1], [0.98, 0.01, 0.01], [0.4, 0.3, 0.3]])
    found = diffadapt.entropy(laws.log() + 3)
    assert found.tolist() == pytest.approx([0.801819, 0.111902, 1.088900], abs=1e-6)
    assert found.mean().item() == pytest.approx(0.667540, abs=1e-6)
    assert diffadapt.entropy(double([[0.0, -math.inf]])).tolist() == [0]


def test_worked_labels():
    acc, E = double([0.9, 0.9, 0.5, 0.1, 0.1]), double([0.2, 0.6, 0.2, 0.7, 0.1])
    assert diffadapt.labels(acc, E, 0.4, args()).tolist() == [NORMAL, EASY, EASY, HARD, HARD]


def test_labels_are_the_rule_in_its_order():
    """At the edges, too: alpha and beta belong to Normal, gamma does not belong to Hard."""
    for alpha, gamma in ((0.8, 0.3), (0.5, 0.5), (1.0, 0.0)):
        for acc, E in itertools.product([k / 10 for k in range(11)], (0.0, 0.4, 0.41)):
            wanted = NORMAL if acc >= alpha and E <= 0.4 else HARD if acc < gamma else EASY
            assert diffadapt.labels(double([acc]), double([E]), 0.4, args(alpha=alpha, gamma=gamma)).tolist() == [wanted]


def test_worked_probe():
    probe = diffadapt.Probe(3, 2).double()
    first, _, last = probe.layers
    with torch.no_grad():
        first.weight.copy_(double([[0.2, 0.1, -0.3], [-0.5, 0.4, 0.1]]))
        first.bias.copy_(double([0.1, 0]))
        last.weight.copy_(double([[1, -1], [0.3, 0.2], [-0.6, 0.9]]))
        last.bias.copy_(double([0.05, 0, -0.05]))
    h = double([[1, 2, -0.5]])
    logits = probe(h)
    assert logits.softmax(-1)[0].tolist() == pytest.approx([0.429383, 0.349796, 0.220821], abs=1e-6)
    loss = diffadapt.probe_loss(logits, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.845405, abs=1e-6)
    wanted = double([[-0.598170, -1.196340, 0.299085], [0.839314, 1.678629, -0.419657]])
    torch.testing.assert_close(first.weight.grad, wanted, rtol=0, atol=1e-6)
    assert diffadapt.probe_loss(logits.expand(2, 3), torch.tensor([0, 1])).item() == pytest.approx(
        (0.845405 - math.log(0.349796)) / 2, abs=1e-6
    )


def clouds(n=120):
    """Points on a line, Hard in the middle: no linear probe can say so; and their class."""
    x = torch.linspace(-1, 1, n)
    return x[:, None] * torch.tensor([[3.0, 100.0]]) + 7, torch.where(x.abs() < 0.4, HARD, NORMAL)


def test_the_probe_learns_what_a_line_cannot_tell_and_never_says_what_is_not_there():
    h, y = clouds()
    found = {}
    for width in (32, 0):
        torch.manual_seed(0)
        probe = diffadapt.Probe(2, width)
        diffadapt.fit(probe, h, y, args(probe_epochs=200, probe_lr=1e-2))
        found[width] = (probe(h).argmax(-1) == y).float().mean().item()
        assert probe(h).softmax(-1)[:, EASY].max() == 0 and probe(h).isnan().sum() == 0
    assert found[32] > 0.95 and found[0] < 0.75
    assert len(diffadapt.Probe(2, 0).layers) == 1


def test_every_flag_of_the_probe_counts():
    h, y = clouds()

    def learnt(**changes):
        a = args(**dict(probe_epochs=2) | changes)
        torch.manual_seed(0)
        probe = diffadapt.Probe(2, a.probe_width)
        diffadapt.fit(probe, h, y, a)
        return probe(h).tolist()

    every = [learnt(**c) for c in ({}, dict(probe_epochs=3), dict(probe_batch=60), dict(probe_lr=0.1), dict(seed=2))]
    assert learnt() == every[0] and all(a != b for a, b in itertools.combinations(every, 2))
    assert learnt(probe_width=8) != every[0]


def test_the_probe_does_not_see_the_scale_of_what_it_reads():
    h, y = clouds()
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        probe = diffadapt.Probe(2, 4).double()
        diffadapt.fit(probe, h.double() * scale, y, args(probe_epochs=3))
        found.append(probe(h.double() * scale))
    torch.testing.assert_close(*found)


def test_fallback():
    logits = double([[0.5, 0.2, 0.3], [0.1, 0.2, 0.7], [0.1, 0.8, 0.1]]).log()
    for p, wanted in ((0, [EASY, HARD, NORMAL]), (0.6, [NORMAL, HARD, NORMAL]), (0.9, [NORMAL] * 3)):
        assert diffadapt.choose(logits, args(fallback=p)).tolist() == wanted


def test_the_three_ways():
    ways = [diffadapt.strategy(c, args()) for c in range(3)]
    assert ways == [diffadapt.Way("E", 0.5, 16), diffadapt.Way("N", 0.8, 40), diffadapt.Way("H", 0.4, 20)]
    assert diffadapt.strategy(EASY, args(max_new_tokens=1)).max_new_tokens == 1


def test_by_length():
    lengths, y = torch.tensor([4, 4, 4, 5, 5, 6, 6, 9]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    found = diffadapt.by_length(lengths, y, torch.tensor([4, 5, 6, 9, 1, 100]))
    assert found.tolist() == [0, 1, 2, 2, 0, 2]
    assert diffadapt.by_length(torch.tensor([7, 7]), torch.tensor([1, 1]), torch.tensor([3, 7])).tolist() == [1, 1]


# ---------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model with its weights as they were drawn."""
    return tiny.warm_start(diffadapt.worlds("moves"), cache=tmp_path_factory.mktemp("models"), fresh=True)


@pytest.fixture(scope="module")
def lm(folder):
    a = args(model=folder, dtype="float64")
    lm = models.load(a, torch.device("cpu"), trainable=False).lm
    with torch.no_grad():  # sharper laws, so that completions end at different lengths
        lm.model.norm.weight.mul_(4)
    return lm


def test_rows_side_by_side_are_decode_py_one_by_one(lm):
    """Each row is what the base draws with the row's numbers; entropies are those of one pass at temperature 1."""
    prompts, n = [[5, 6, 7], [8, 9, 10, 11, 12], [13]], 3
    uniforms = torch.rand(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end, lengths = list(range(0, 30)), set()
    for way in (diffadapt.Way("", 0.8, 12), diffadapt.Way("", 0.0, 12), diffadapt.Way("", 3.0, 5)):
        with torch.no_grad():
            ids, entropies = diffadapt.decode(engines.Decoder(lm, prompts, n), end, uniforms, way)
            for row, (y, h) in enumerate(zip(ids, entropies)):
                prompt = prompts[row // n]
                numbers = uniforms[row, : way.max_new_tokens].tolist()
                assert y == decode.decode(engines.Decoder(lm, [prompt]), end, numbers, way)[0]
                logits = lm(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1]
                p = logits.softmax(-1)
                torch.testing.assert_close(double(h), -(p * p.log()).sum(-1), rtol=1e-9, atol=1e-9)
                assert len(h) == len(y)
                lengths.add(len(y))
    assert len(lengths) > 2


def test_pick_is_the_base_s():
    p = torch.rand(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p[:, 3], u = 0, torch.linspace(0, 1 - 1e-12, 50).double()
    assert diffadapt.pick(p, u).tolist() == [decode.pick(*row) for row in zip(p, u)]


# ---------------------------------------------------------------- the world


def test_the_world():
    task = diffadapt.moves()
    parts = [[e.prompt for e in part] for part in (task.train, task.test, task.shown, diffadapt.worlds("moves").train)]
    assert [len(p) for p in parts] == [800, 400, 2000, 2000] and parts[2] == parts[3]
    assert len(set(parts[0] + parts[1] + parts[2])) == 3200
    behind = {}  # move, state -> state, from all questions of two moves and the answers
    for e in task.train + task.test + task.shown:
        said, seen = [task.demonstrate(random.Random(f"{e.id} {i}"), e, 0.3) for i in range(6)], set(e.prompt) & set("xyz")
        assert len(set(e.prompt[1:-1])) == len(e.prompt) - 2 and len(seen) == (task.tier(e) == "an unknown move") < 2
        assert 3 <= len(e.prompt) - 2 <= 8 and (seen or task.tier(e) == f"{len(e.prompt) - 2} moves")
        for text in said:
            way, body, steps = text[0], text[1:].partition(":")[0], len(e.prompt) - 2
            body, begun = [body[i : i + 2] for i in range(1, len(body), 2)], body[:1]
            assert len(text) <= 30 and (way != "H" or not begun) and (way != "E" or len(body) == steps)
            if way != "H":
                assert begun == e.prompt[0] and [s[0] for s in body[:steps]] == list(e.prompt[1:-1])
                assert len(body) == steps or way == "N" and steps <= 4 and 3 <= len(body) - steps <= 8
                assert set(body[steps:]) <= set(body[:steps]) and body[steps - 1][1] == text[-1]
                assert way != "E" or steps > 4 or len(text) <= diffadapt.strategy(EASY, args(max_new_tokens=30)).max_new_tokens
            if not seen:
                assert task.check(text[1:], e.answer) == (e.answer, 1.0)
                for before, (move, after) in zip([e.prompt[0], *(s[1] for s in body)], body[:steps]):
                    assert behind.setdefault((move, before), after) == after
        first = task.demonstrate(random.Random(e.id), e, 1.0)  # to begin with, neither padding nor answers at once
        assert first[0] in "EN" and len(first) == 2 * len(e.prompt)
    assert len(behind) == 48 and all(len({behind[m, s] for s in "012345"}) == 6 for m in "abcdefgh")
    strange = next(e for e in task.train if task.tier(e) == "an unknown move")
    assert len({task.demonstrate(random.Random(i), strange, 1.0)[-1] for i in range(200)}) == 6
    assert task.check("a4", "4")[1] == 0 and diffadapt.worlds("x.jsonl") is None


# ---------------------------------------------------------------- what is measured


def question(i, said, easy, normal, hard, E=0.1, **changes):
    """A line of items.jsonl: (right, tokens) lists in the three ways."""
    ways = {}
    for way, (right, tokens) in zip(diffadapt.Args.classes, (easy, normal, hard)):
        ways[way] = dict(right=right, tokens=tokens, entropy=[E] * len(right))
    said = dict(zip(("probe", "linear probe", "length alone"), said))
    row = dict(item=i, question=f"q{i}", level=None, beta=0.2, said=said, shown=[["a", 0.0], ["b", 3.0]], added=[1, 2, 3])
    return row | dict(ways=ways) | changes


ROWS = [
    question(0, (0, 0, 1), ([1, 1], [4, 6]), ([1, 1], [20, 30]), ([0, 0], [2, 2]), E=0.5),
    question(1, (1, 1, 1), ([0, 0], [16, 16]), ([1, 1], [10, 10]), ([0, 1], [2, 2]), E=0.1),
    question(2, (2, 1, 1), ([0, 0], [16, 16]), ([0, 0], [40, 40]), ([0, 1], [2, 4]), E=0.9),
]


def test_a_table_by_hand():
    table = diffadapt.results(ROWS, args(samples=2))["table"]
    wanted = {
        "Easy for all": (1 / 3, 37 / 3), "Normal for all": (2 / 3, 25.0), "Hard for all": (1 / 3, 7 / 3),
        "probe": (2.5 / 3, 6.0), "linear probe": (2 / 3, 55 / 3), "length alone": (2 / 3, 25.0),
        "labels": (2.5 / 3, 6.0),
        "random classes": (4 / 9, (37 / 3 + 25 + 7 / 3) / 3),
    }  # fmt: skip
    for name, numbers in wanted.items():
        assert (table[name]["accuracy"], table[name]["tokens"]) == pytest.approx(numbers), name
    assert [table[k]["in the prompt"] for k in ("probe", "Hard for all")] == pytest.approx([2, 3])
    assert [table[k]["accuracy, probe says Hard"] for k in ("probe", "Normal for all")] == [0.5, 0]
    agrees = [table[k]["agrees with the label"] for k in ("probe", "linear probe", "length alone")]
    assert agrees == pytest.approx([1, 2 / 3, 1 / 3])
    # The oracle says Easy, Normal, Hard by the first samples, and has 1, 1, 1 right of the second; by these it says Easy, Hard,
    # Hard, and has 1, 0, 0 right of the first.
    assert (table["oracle"]["accuracy"], table["oracle"]["tokens"]) == pytest.approx((2 / 3, (6 + 10 + 4 + 4 + 2 + 2) / 6))
    # Cut at 6 tokens Normal costs 6 and is never right; Easy (12.33) and Hard (2.33) are equally right.
    assert table["Normal, cut"] == {"accuracy": 0, "tokens": 6}
    mixture = 1 / 3 + (2 / 3 - 1 / 3) * (6 - 7 / 3) / (25 - 7 / 3)
    assert table["two ways mixed"]["accuracy"] == pytest.approx(mixture)


def test_the_oracle_is_scored_on_samples_that_it_does_not_see():
    """A coin that nobody can foresee: the oracle is right on half, not on three quarters."""
    rows = []
    for i, coins in enumerate(itertools.product([0, 1], repeat=6)):
        ways = [(list(coins[k : k + 2]), [3, 3]) for k in (0, 2, 4)]
        rows.append(question(i, (0, 0, 0), *ways))
    assert diffadapt.results(rows, args(samples=2))["table"]["oracle"]["accuracy"] == pytest.approx(0.5)
    assert [diffadapt.best([row], args())[0] for row in ROWS] == [EASY, NORMAL, HARD]


def test_a_budget_cuts_what_is_longer():
    assert diffadapt.score(ROWS, [NORMAL] * 3, args(), share=0.5) == pytest.approx((0.5, (20 + 10 + 20) / 3))
    assert diffadapt.score(ROWS, [EASY] * 3, args(), share=0.25) == pytest.approx((1 / 6, 4.0))
    assert diffadapt.score(ROWS, [NORMAL] * 3, args(), most=0) == (0, 0)


def test_panels_and_their_picture(tmp_path):
    levels = [row | dict(level=f"{i} moves") for i, row in enumerate(ROWS)]
    found = diffadapt.results(levels, args(samples=2))
    bars = [list(p["of"].values()) for p in found["panels"] if p["kind"] == "bars"]
    assert bars[0] == pytest.approx([0.5, 0.1, 0.9]) and bars[1] == [1, 1, 0] and bars[2] == [20, 0, 37]
    dots = found["panels"][0]["of"]
    assert dots["probe"][0] == pytest.approx([6.0, 2.5 / 3]) and dots["oracle"][0] == pytest.approx([14 / 3, 2 / 3])
    heat = next(p for p in found["panels"] if p["kind"] == "heat")["of"]
    assert all(heat[c] == {k: float(k == c) for k in diffadapt.Args.classes} for c in diffadapt.Args.classes)
    tokens = next(p for p in found["panels"] if p["kind"] == "tokens")["of"]
    assert tokens["the probe says Hard"] == [["q2", 0.0], ["a", 0.0], ["b", 1.0]]
    curve = next(p for p in found["panels"] if p["kind"] == "lines")["of"]["probe"]
    assert curve[-1] == pytest.approx([6.0, 2.5 / 3]) and len(curve) == 4
    nobody = [row | dict(said=dict.fromkeys(row["said"], NORMAL)) for row in ROWS]
    nothing = diffadapt.results(nobody, args(samples=2))
    assert nothing["table"]["probe"]["accuracy, probe says Hard"] is None
    heat = next(p for p in nothing["panels"] if p["kind"] == "heat")["of"]
    assert all(row == dict(Easy=0, Normal=1, Hard=0) for row in heat.values())
    for i, one in enumerate((found, nothing)):
        (tmp_path / str(i)).mkdir()
        figures.publish(tmp_path / str(i), json.loads(json.dumps(one, allow_nan=False)))


def test_the_threshold():
    """Entropies 0.1 to 0.4 of questions that are right in both ways, Easy being shorter, but for 0.1 wrong in the Easy way:
    beta has to reach that one and no further."""

    def row(i, easy, normal=(1, 1), E=0.1):
        return question(i, (0, 0, 0), ([easy] * 2, [4, 4]), (list(normal), [20, 20]), ([0, 0], [2, 2]), E=E * (i + 1))

    rows = [row(i, int(i > 0)) for i in range(4)]
    assert diffadapt.threshold(rows, args()) == pytest.approx(0.1)
    # Where Easy is wrong everywhere, all have to be Normal; where it may lose everything, none.
    wrong = [row(i, 0) for i in range(4)]
    assert diffadapt.threshold(wrong, args()) == pytest.approx(0.4)
    assert diffadapt.threshold(wrong, args(slack=1.0)) == pytest.approx(0.1)
    # Where no beta keeps within the slack, the one that loses least: a question that is seldom right is never Normal.
    luck = [row(i, 0, normal=(1, int(i < 2))) for i in range(4)]
    assert diffadapt.threshold(luck, args()) == pytest.approx(0.4)
    assert diffadapt.score(luck, diffadapt.label(luck, 0.4, args()), args())[0] == 0.5
    # Of several as good the greatest.
    assert diffadapt.threshold([row(i, 1, normal=(0, 0)) for i in range(4)], args()) == pytest.approx(0.4)


# ---------------------------------------------------------------- the script

SMALL = "--questions 16 --items 6 --samples 2 --batch 4".split()


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    done = run(place, "--model", folder, *SMALL, "--run-dir", place / "run", script=SCRIPT)
    assert done.code == 0, done.err
    return place / "run", done.out


def test_a_run(plain):
    place, out = plain
    rows, labelled = lines(place / "items.jsonl"), lines(place / "labelled.jsonl")
    assert [r["item"] for r in rows] == list(range(6)) and [r["item"] for r in labelled] == list(range(16))
    assert [set(r["ways"]) for r in labelled] == [set(diffadapt.Args.classes) if i % 4 == 0 else {"Normal"} for i in range(16)]
    task = diffadapt.moves()
    assert [r["question"] for r in rows] == [e.prompt for e in task.test[:6]] and rows[0]["added"] == [1, 1, 1]
    assert [r["prompt"] for r in labelled] == [len(e.prompt) for e in task.train[:16]]
    config = json.loads((place / "config.json").read_text())["args"]
    a = diffadapt.Args(**config)
    found = json.loads((place / "results.json").read_text())
    assert found == json.loads(json.dumps(diffadapt.results(rows, a))) and (place / "picture.png").exists()
    assert rows[0]["beta"] == diffadapt.threshold(labelled[::4], a)
    assert {p.name for p in (place / "checkpoints").iterdir()} == {"probe.safetensors", "linear-probe.safetensors"}
    assert out.splitlines()[-1].startswith("probe: accuracy ")
    budgets = {way: diffadapt.strategy(c, a).max_new_tokens for c, way in enumerate(diffadapt.Args.classes)}
    assert all(max(r["ways"][way]["tokens"]) <= most for r in rows for way, most in budgets.items())


def test_flags_of_the_questions_count(plain, folder, tmp_path):
    place, _ = plain
    rows = lines(place / "items.jsonl")
    beta = str(sorted(diffadapt.averages(lines(place / "labelled.jsonl"))[1].tolist())[8])  # Normal below it, Easy above
    changed = ["--alpha", "0", "--gamma", "0", "--beta", beta, "--fallback", "1", "--samples", "3", "--suffix", "N", "E", "H"]
    changed += ["--items", "4", "--seed", "2"]
    done = run(tmp_path, "--model", folder, *SMALL, *changed, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    found = lines(tmp_path / "run" / "items.jsonl")
    assert len(found) == 4 and {r["beta"] for r in found} == {float(beta)} and len(found[0]["ways"]["Easy"]["right"]) == 3
    assert all(r["said"]["probe"] == r["said"]["linear probe"] == NORMAL for r in found)
    assert ": no probe will say so" in done.out and "0 of 12 questions are Hard" in done.out
    assert done.out.count(": no probe") == 1
    assert found[0]["ways"]["Hard"]["entropy"][0] != rows[0]["ways"]["Hard"]["entropy"][0]  # by the seed


def test_a_text_is_a_function_of_seed_and_question(plain, folder, tmp_path):
    """Other questions beside it, and other ones labelled, change nothing of what is drawn."""
    done = run(
        tmp_path, "--model", folder, *SMALL, "--batch", "2", "--items", "3", "--run-dir", tmp_path / "run", script=SCRIPT
    )
    assert done.code == 0, done.err
    for a, b in zip(lines(plain[0] / "items.jsonl"), lines(tmp_path / "run" / "items.jsonl")):
        for way in diffadapt.Args.classes:
            assert a["ways"][way]["tokens"] == b["ways"][way]["tokens"]
            assert a["ways"][way]["entropy"] == pytest.approx(b["ways"][way]["entropy"], rel=1e-4)


def test_mistakes_are_one_line(folder, tmp_path):
    for flags, words in (
        (["--task", "addition"], "--task addition: the tiny model knows the three ways on moves alone"),
        (["--model", folder, "--gamma", "0.9"], "--gamma 0.9: questions are Hard below it"),
    ):
        assert user_error(run(tmp_path, *flags, "--run-dir", tmp_path / "run", script=SCRIPT)).startswith(words)
    for field, bad in (("samples", 1), ("batch", 1), ("questions", 3), ("fallback", 1.1), ("probe_width", 0), ("slack", -0.1)):
        with pytest.raises(UserError, match=f"--{field.replace('_', '-')} must be"):
            settings.resolve(diffadapt.Args(**{field: bad}), diffadapt.worlds)


def test_a_model_of_the_hub_from_its_folder(tmp_path):
    """Chat template, a file of rows, bfloat16; the way's words stand in the user's turn, behind the prompt."""
    tokenizer = tiny.characters(tiny.CHARACTERS + "<>\\{}")
    config = tiny.config()
    config.vocab_size, config.warm_started_on = len(tokenizer), None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", tmp_path / "model", "--task", tmp_path / "rows.jsonl", "--max-new-tokens", "10"]
    done = run(tmp_path, *flags, *SMALL, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    found = lines(tmp_path / "run" / "items.jsonl")
    assert config["dtype"] == "bfloat16" and found[0]["added"] == [len(suffix) for suffix in config["suffix"]]
    asked = config["prompt_template"].format(prompt=found[0]["question"])
    assert "boxed{}" in asked and found[0]["prompt"] == len(f"<user>{asked}\n<assistant>")
    assert found[0]["level"] is None
    assert max(found[0]["ways"]["Normal"]["tokens"]) <= 10 and max(found[0]["ways"]["Easy"]["tokens"]) <= 4
    bars = json.loads((tmp_path / "run" / "results.json").read_text())["panels"][3]["of"]
    assert set(bars) == {"all"}
    # moves is the tiny model's alone
    said = user_error(
        run(tmp_path, "--model", tmp_path / "model", "--task", "moves", "--run-dir", tmp_path / "no", script=SCRIPT)
    )
    assert "only it knows moves" in said
