"""EAST: the vector and its entropies, what the hook shifts, rows that are decoded at once, the bandit, what a run leaves."""

import json
import math
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos import decode, east
from common import UserError, engines, figures, gpu, models
from common.worlds import tiny
from tests.helpers import ROOT, lines, run, user_error

SCRIPT = ROOT / "algos" / "east.py"
Z = [[[1.0, 0], [2, 0], [3, 3]], [[0.0, 4], [0, 2], [6, 0]]]
H = [[0.69, 0.5, 0], [0.6, 0.1, 0]]


def args(**changes):
    preset = dict(max_new_tokens=3) | east.Args.tiny_preset
    return east.Args(**preset | dict(layer=1, samples=6, runs=3, pulls=4, skip=1, items=3) | changes)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def lm():
    """A model that has learnt nothing, and says different things."""
    shape = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3)
    shape |= dict(vocab_size=3 + len(tiny.CHARACTERS), max_position_embeddings=256, bos_token_id=None, eos_token_id=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Qwen2ForCausalLM(Qwen2Config(**shape, pad_token_id=0, initializer_range=0.4)).double().eval()
    return made.requires_grad_(False)


# ---------------------------------------------------------------- the rule


def test_worked_vector():
    z, h = [double(x) for x in Z], [double(x) for x in H]
    assert east.steering_vector(z, h).tolist() == pytest.approx([-1.105820, 0.005291], abs=1e-6)
    assert east.steering_vector(z, h, centred=False).tolist() == pytest.approx([0.894180, 1.375661], abs=1e-6)
    # Of several layers at once, each as if alone; of a run that came to fewer pulls, by those that it came to.
    both = east.steering_vector([torch.stack([x, 2 * x], 1) for x in z], h)
    torch.testing.assert_close(both, torch.stack([east.steering_vector(z, h), 2 * east.steering_vector(z, h)]))
    short = east.steering_vector([z[0], z[1][:2]], [h[0], h[1][:2]])
    away = [z[0] - z[0].mean(0), z[1][:2] - z[1][:2].mean(0)]
    torch.testing.assert_close(short, sum((w[:, None] * x).sum(0) for w, x in zip([h[0], h[1][:2]], away)) / 1.89)


def test_a_run_s_own_constant_does_not_enter():
    """Why it is centred: what all activations of a run share, its history, is taken away."""
    z, h = [double(x) for x in Z], [double(x) for x in H]
    moved = [x + 10 * k for k, x in enumerate(z, 1)]
    torch.testing.assert_close(east.steering_vector(moved, h), east.steering_vector(z, h))
    assert (east.steering_vector(moved, h, centred=False) - east.steering_vector(z, h, centred=False)).abs().min() > 5


def test_worked_entropies():
    found = east.action_entropy(double([[25, 0], [20, 5], [13, 12], [1, 1]])).tolist()
    assert found == pytest.approx([0, 0.500402, 0.692347, math.log(2)], abs=1e-6)
    assert east.action_entropy(double([0, 0])).isnan()  # none named an arm: not a certain action


def test_only_the_last_position_is_shifted():
    output, v = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 4, dtype=torch.float64)
    found = east.shift(output, v)
    assert found.dtype == torch.bfloat16 and torch.equal(found[:, :-1], output[:, :-1])
    torch.testing.assert_close(found[:, -1], output[:, -1] + v.bfloat16())


def test_rows_are_picked_as_one_is():
    numbers = torch.Generator().manual_seed(0)
    p = torch.rand(50, 7, generator=numbers, dtype=torch.float64) * (torch.rand(50, 7, generator=numbers) < 0.6)
    p[:, 3] += 0.01
    u = torch.rand(50, generator=numbers, dtype=torch.float64)
    u[:2], p[0, :3] = double([0.0, 1 - 1e-16]), 0  # a token that cannot be drawn is not drawn by 0 either
    assert east.pick(p, u).tolist() == [decode.pick(row, x) for row, x in zip(p, u.tolist())]


def test_rows_are_decoded_as_one_is(lm):
    """Those that end early leave, and nothing of another row changes."""
    a, ids = args(max_new_tokens=8), [5, 9, 4]
    uniforms = torch.rand(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    end = [1, *range(10, 25)]
    found, _ = east.ask(lm, ids, {}, uniforms, end, a)
    assert len(set(map(len, found))) > 3 and max(map(len, found)) == 8
    for row, u in zip(found, uniforms.tolist()):
        assert row == decode.decode(engines.Decoder(lm, [ids]), end, u, a)[0]
    v = 2 * torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    steered, _ = east.ask(lm, ids, {2: v}, uniforms, end, a)
    assert steered != found
    for i, row in enumerate(steered):  # each by its own vector, whoever has left
        assert row == east.ask(lm, ids, {2: v[i : i + 1]}, uniforms[i : i + 1], end, a)[0][0]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_what_is_shifted(lm, layer):
    """The last token of the prompt and every token behind it, each by its row's own vector, at one layer: as in one pass over
    the whole text that is shifted from there on."""
    a, ids = args(max_new_tokens=5), [5, 9, 4, 30]
    uniforms = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    v[2] = 0
    seen, law = [], east.law
    try:
        east.law = lambda logits, a: seen.append(logits) or law(logits, a)
        found, z = east.ask(lm, ids, {layer: v}, uniforms, [], a, layers=[layer])
    finally:
        east.law = law
    assert found[2] == east.ask(lm, ids, {}, uniforms[2:], [], a)[0][0]  # where nothing is added

    def hook(module, given, output):
        moved = output.clone()
        moved[:, len(ids) - 1 :] += v[:, None]
        return moved

    handle = lm.model.layers[layer - 1].register_forward_hook(hook)
    logits = lm(torch.tensor([ids + row for row in found])).logits[:, len(ids) - 1 : -1]
    handle.remove()
    torch.testing.assert_close(torch.stack(seen, 1), logits, rtol=1e-8, atol=1e-8)
    assert (logits[0] - lm(torch.tensor([ids + found[0]])).logits[0, len(ids) - 1 : -1]).abs().max() > 0.1
    # z is the layer's output there: the same layer, counted alike, that is shifted.
    plain = east.ask(lm, ids, {}, uniforms, [], a, layers=[layer])[1][layer]
    torch.testing.assert_close(z[layer], plain + v[0])


def test_no_hook_is_left(lm):
    v = {1: torch.ones(1, 16)}
    east.ask(lm, [5, 9], v, torch.rand(1, 3).double(), [], args())
    with pytest.raises(IndexError):
        east.ask(lm, [5, 9], v, torch.rand(1, 1).double(), [], args())  # a number for one token of three
    assert not any(layer._forward_hooks for layer in lm.model.layers)


# ---------------------------------------------------------------- the bandit


def test_transcripts_say_what_the_player_did():
    a, rng, seen = args(), random.Random(0), []
    for example in east.transcripts(a).train * 100:
        turns = east.transcripts(a).demonstrate(rng, example, 1.0).split()
        text, names = example.prompt, dict(zip(example.prompt, "01"))
        own = replace(a, wording="digits" if "0" in names else "letters")
        assert len(turns) == 12 and text == east.prompt([], own)
        points, history = ([], []), []
        for turn in turns:
            said, r = turn.split(":")
            arm, counts = east.arm_of(said, own), [len(x) for x in points]
            better = [sum(x) / len(x) if x else None for x in points]
            if said.startswith("gr"):
                assert better[arm] == max(better)
            else:
                assert counts[arm] == min(counts)
            seen.append((min(counts) == 0, said[:2]))
            points[arm].append(int(r))
            history.append((said, r))
        assert east.prompt(history, own) == example.prompt + " ".join(turns) + " "
    assert ("gr" not in {s for forced, s in seen if forced}) and {s for forced, s in seen if not forced} == {"gr", "ex"}
    tokenizer = tiny.characters()
    assert tokenizer.unk_token_id not in tokenizer(east.prompt([("ex1", 9), ("gr0", 0)], a))["input_ids"]


@pytest.mark.parametrize("wording, text, arm", [
    ("digits", "gr0", 0), ("digits", "ex1", 1), ("digits", "gra", None), ("digits", "xx1", None), ("digits", "gr1:", None),
    ("letters", "grb", 1), ("letters", "gr1", None), ("buttons", "Blue pays more.\nAction: blue", 0),
    ("buttons", "I said Action: blue, but no.\n**action**: GREEN.", 1), ("buttons", "I take blue", None),
    ("buttons", "Action: blue or green", None), ("machines", "Action: right", 1), ("machines", "Action: blue", None),
])  # fmt: skip
def test_what_names_an_arm(wording, text, arm):
    assert east.arm_of(text, args(wording=wording)) == arm


def test_the_prompt_in_words():
    said = east.prompt([("I try.\nAction: left", 97)], args(wording="machines", pulls=50))
    assert "left and right" in said and "50 times" in said and "Round 1: I try. Action: left\nPoints: 97" in said
    assert "This is round 2" in said and "blue" not in said
    assert "blue and green" in east.prompt([], args(wording="buttons"))


def test_points():
    assert [east.points(x, args()) for x in (-9, -1, 0.3, 1, 9)] == [0, 2, 5, 6, 9]
    assert [east.points(x, args(wording="buttons")) for x in (-0.5, 0.5, 2.04)] == [95, 105, 120]


def arms_of_anything(text, a):
    """Of what a model says that has learnt nothing: most of it names an arm."""
    return (None, None, 1, *[0] * 7)[sum(map(ord, text)) % 10]


@pytest.fixture
def names_arms(monkeypatch):
    monkeypatch.setattr(east, "arm_of", arms_of_anything)


def played(lm, a, vectors=None, stream=(1, 0), layers=(), means=(0.0, 1.0)):
    return east.play(lm, tiny.characters(), [1], means, stream, a, vectors, layers)


def test_an_episode(lm, names_arms):
    a = args(samples=12)
    pulls, tokenizer = played(lm, a, layers=[1, 2]), tiny.characters()
    assert len(pulls) == 4 and all(p["arm"] in (0, 1) for p in pulls) and pulls[0]["z"].keys() == {1, 2}
    texts = [tokenizer.decode(p["ids"]) for p in pulls]
    assert texts[0] == "01 " and all(b.startswith(c) for c, b in zip(texts, texts[1:]))
    for before, after, pull in zip(texts, texts[1:], pulls):  # the action that is played is a completion's
        said = after[len(before) :].rpartition(":")[0]
        assert arms_of_anything(said, a) == pull["arm"]
    # What was said, once more by hand: invalid completions are no third action.
    numbers = torch.Generator().manual_seed(gpu.hash_seed(a.seed, 1, 0))
    said, z = east.ask(lm, pulls[0]["ids"], {}, torch.rand(12, 3, dtype=torch.float64, generator=numbers), [1], a, [1])
    said = tokenizer.batch_decode(said, skip_special_tokens=True)
    named = [arms_of_anything(t, a) for t in said]
    assert 0 < named.count(None) < 12 and pulls[0]["valid"] == 1 - named.count(None) / 12
    p = named.count(0) / (12 - named.count(None))
    assert pulls[0]["h"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    torch.testing.assert_close(pulls[0]["z"][1], z[1])
    # Any of the valid ones is played, and pays what its arm does.
    valid, which = [t for t, arm in zip(said, named) if arm is not None], torch.rand(1, generator=numbers).item()
    taken, noise = valid[int(which * len(valid))], torch.randn(1, generator=numbers).item()
    assert taken != valid[0] and texts[1] == f"01 {taken}:{east.points((0.0, 1.0)[pulls[0]['arm']] + noise, a)} "
    # The same numbers give the same episode; steering changes it, and so does every setting that it reads.
    assert [p["ids"] for p in played(lm, a)] == [p["ids"] for p in pulls]
    v = {1: 3 * torch.ones(16, dtype=torch.float64)}
    others = [played(lm, a, v), played(lm, a, stream=(1, 1)), played(lm, a, means=(8.0, 9.0))]
    changed = (dict(seed=2), dict(temperature=3.0), dict(wording="letters"), dict(samples=11), dict(max_new_tokens=2))
    others += [played(lm, replace(a, **c)) for c in changed]
    assert len(played(lm, replace(a, pulls=3))) == 3
    assert all([p["ids"] for p in other] != [p["ids"] for p in pulls] for other in others)


def test_an_episode_ends_where_none_names_an_arm(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(east, "arm_of", lambda text, a: asked.append(text) or (0 if len(asked) <= 12 else None))
    assert len(played(lm, args())) == 2  # of six completions each
    assert not played(lm, args())


def test_an_episode_that_is_too_long(lm, names_arms, capsys):
    with pytest.raises(UserError, match="positions; the model has 256"):
        played(lm, args(max_new_tokens=254))


# ---------------------------------------------------------------- the first phase


def runs_of(entropies, states):
    """play() that gives what is told, a run after the other."""
    left = iter(zip(entropies, states))

    def play(lm, tokenizer, end, means, stream, a, vectors=None, layers=()):
        assert means == (0.0, 0.0) and vectors is None
        return [dict(h=h, z={1: double(z), 2: double(z) * 2}) for h, z in zip(*next(left))]

    return play


def test_the_first_phase(lm, monkeypatch):
    """By the worked runs, behind a first pull that does not enter; the second run ends early."""
    h = [[0.69, *H[0]], [0.69, *H[1]]]
    monkeypatch.setattr(east, "play", runs_of(h, [[[99.0, 99], *z] for z in Z]))
    found = east.first_phase(lm, None, None, args(runs=2))
    wanted = double([-1.105820, 0.005291])
    torch.testing.assert_close(found["u"], torch.stack([wanted, 2 * wanted]), rtol=0, atol=2e-6)
    torch.testing.assert_close(found["plain"][0], double([0.894180, 1.375661]), rtol=0, atol=1e-6)
    size = sum(math.hypot(*z) for z in Z[0] + Z[1]) / 6
    assert found["size"].tolist() == pytest.approx([size, 2 * size])
    monkeypatch.setattr(east, "play", runs_of(h, [[[99.0, 99], *z] for z in Z]))
    assert (east.first_phase(lm, None, None, args(runs=2, skip=0))["u"] - found["u"]).abs().max() > 1


def test_where_there_is_nothing_to_find(lm, monkeypatch, capsys):
    monkeypatch.setattr(east, "play", runs_of([[0.69, 0, 0, 0]] * 2, [[[1.0, 1]] * 4] * 2))
    with pytest.raises(UserError, match="no direction to be found"):
        east.first_phase(lm, None, None, args(runs=2))
    monkeypatch.setattr(east, "play", runs_of([[]] * 2, [[]] * 2))
    with pytest.raises(UserError, match="no direction to be found"):
        east.first_phase(lm, None, None, args(runs=2))
    monkeypatch.setattr(east, "play", runs_of([[0.69, 0.6, 0.66, 0.62]] * 2, [[[1.0, 1]] * 4] * 2))
    with pytest.raises(UserError, match="not learnt to tell the arms apart.*still 0.64"):
        east.first_phase(lm, None, None, args(runs=2))


def test_wording_of_the_runs(lm, monkeypatch):
    asked = []
    monkeypatch.setattr(east, "play", lambda *x, **y: asked.append(x[5].wording) or [dict(h=0.1, z={1: double([1.0])})] * 2)
    for own in ("same", "letters"):
        east.first_phase(lm, None, None, args(built_on=own, runs=1))
    assert asked == ["digits", "letters"]


# ---------------------------------------------------------------- what is measured


def found_by(lm):
    numbers = torch.Generator().manual_seed(0)
    u, plain = (torch.randn(3, 16, generator=numbers, dtype=torch.float64) for _ in "up")
    return dict(u=u, plain=plain, size=double([1.0, 2.0, 3.0]))


def test_controls(lm):
    found = found_by(lm)
    of = east.controls(found, torch.Generator().manual_seed(5))
    assert list(of) == ["steering vector", "shuffled", "random", "not centred", "not steered"]
    for kind, v in of.items():
        assert v.norm(dim=-1).tolist() == pytest.approx([float(kind != "not steered")] * 3)
    for layer in range(3):
        torch.testing.assert_close(of["shuffled"][layer].sort()[0], of["steering vector"][layer].sort()[0])
    assert not torch.allclose(of["shuffled"], of["steering vector"])
    other = east.controls(found, torch.Generator().manual_seed(6))
    for kind in ("shuffled", "random"):
        assert not torch.allclose(of[kind], other[kind])


def test_the_sweep_adds_what_it_says(lm, names_arms):
    """Every condition, however many are asked at once, is what it is alone, by the same numbers."""
    a, tokenizer, found = args(rows=40), tiny.characters(), found_by(lm)
    directions = east.controls(found, torch.Generator().manual_seed(5))
    uniforms = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    ids, size = tokenizer("01 ex0:3 ")["input_ids"], found["size"]
    rows = east.sweep(lm, tokenizer, [1], ids, directions, size, [1, 3], uniforms, a)
    for rows_at_once in (1, 1000):
        assert east.sweep(lm, tokenizer, [1], ids, directions, size, [1, 3], uniforms, replace(a, rows=rows_at_once)) == rows
    assert len(rows) == 1 + 2 * (6 + 3 * 5) + 4  # five strengths above 0, one below, of u alone; four temperatures
    assert {(k, s) for k, _, s, _, _ in rows if s < 0} == {("steering vector", -0.2)}
    own = replace(a, strength=0.25, strengths=(0.7,), temperatures=(1.7,))
    other = east.sweep(lm, tokenizer, [1], ids, directions, size, [2], uniforms, own)
    assert {s for k, _, s, _, _ in other if k == "random"} == {0.25, 0.7} and other[-1][2] == 1.7 and len(other) == 10
    for kind, layer, x, h, valid in rows:
        v = {} if kind == "temperature" else {layer: (x * size[layer - 1] * directions[kind][layer - 1]).expand(6, -1)}
        own = replace(a, temperature=x) if kind == "temperature" else a
        texts = tokenizer.batch_decode(east.ask(lm, ids, v, uniforms, [1], own)[0], skip_special_tokens=True)
        named = [arms_of_anything(t, a) for t in texts]
        assert valid == pytest.approx(1 - named.count(None) / 6)
        entropy = east.action_entropy(double([named.count(0), named.count(1)])).item()
        assert (h is None and math.isnan(entropy)) or h == pytest.approx(entropy)
    assert len({(h, valid) for *_, h, valid in rows}) > 5


def test_worked_results():
    a = args(strength=0.2, strengths=(0.4,), temperatures=(2.0,))
    kinds = ("steering vector", "shuffled", "random", "not centred")

    def row(i, plus):
        asked = [["not steered", 1, 0.0, 0.2 + plus, 1.0]]
        for kind in kinds:
            up = 0.1 if kind == "steering vector" else 0.0
            asked += [[kind, 1, 0.2, 0.2 + up + plus, 0.98], [kind, 1, 0.4, None if i else 0.6, 0.5]]
        asked += [["temperature", 0, 0.5, 0.1, 1.0], ["temperature", 0, 2.0, 0.4, 0.9]]
        plain, steered = [[1, 0.6, 1.0], [1, 0.2, 1.0], [1, 0.1, 1.0]], [[0, 0.6, 1.0], [1, 0.4, 1.0], [0, 0.5, 1.0]][: 3 - i]
        told = {"not steered": plain, "steering vector": steered, "shuffled": plain}
        return dict(item=i, layer=1, beta={"1": 1.5}, means=[0.0, 0.5], episodes=told, asked=asked)

    of = east.results([row(0, 0.0), row(1, 0.1)], a)
    json.dumps(of, allow_nan=False)
    table, panels = of["table"], {p["title"]: p["of"] for p in of["panels"]}
    assert list(table) == ["not steered", *(f"{kind}, layer 1" for kind in kinds), "temperature 0.5", "temperature 2"]
    assert table["not steered"] == pytest.approx(dict(entropy=0.25, valid=1.0, switches=0.0, regret=0.0))
    wanted = {"entropy": 0.35, "valid": 0.98, "beta": 1.5, "last with 95% valid": 0.2, "entropy there": 0.35}
    # Two switches and one; two pulls of the worse arm in three, and one in the two of an episode that ended there.
    assert table["steering vector, layer 1"] == pytest.approx(wanted | dict(switches=1.5, regret=0.75))
    assert table["shuffled, layer 1"] == pytest.approx(dict(entropy=0.25, valid=0.98, switches=0.0, regret=0.0))
    assert table["temperature 2"] == dict(entropy=0.4, valid=0.9)
    entropies = panels["action entropy, layer 1"]["steering vector"]
    assert [x for x, _ in entropies] == [0.0, 0.2, 0.4] and entropies[2][1] == 0.6  # of the prompt that has one
    assert panels["what more entropy costs"]["temperature"] == [[1.0, 0.1], [1.0, pytest.approx(0.25)], [0.9, 0.4]]
    assert panels["episodes: regret so far, layer 1"]["steering vector"] == [[1, 0.5], [2, 0.5], [3, 1.0]]
    assert panels["episodes: action entropy, layer 1"]["not steered"] == [[1, 0.6], [2, 0.2], [3, 0.1]]


# ---------------------------------------------------------------- a run


def small(**changes):
    own = dict(items=2, runs=2, pulls=4, skip=1, samples=8, device="cpu", strengths=(0.4,), temperatures=(2.0,), strength=0.5)
    return east.Args(**own | changes)


@pytest.fixture
def untrained(monkeypatch, names_arms, tmp_path):
    """A tiny model that has its first weights, whatever the seed."""
    real, handlers = east.transcripts, [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]

    def quick(a):
        task = real(a)
        task.recipe, task.shape = dict(tiny.UNTRAINED, seed=0), task.shape | dict(initializer_range=0.4)
        return task

    monkeypatch.setattr(east, "transcripts", quick)
    monkeypatch.setenv("TOKENPO_CACHE", str(tmp_path / "cache"))
    yield
    for number, handler in handlers:
        signal.signal(number, handler)


def done(folder, **changes):
    """A run in this process -> what it left of items.jsonl."""
    east.main(small(run_dir=str(folder), **changes))
    return (folder / "items.jsonl").read_bytes()


def test_a_run_and_its_flags(tmp_path, untrained, monkeypatch, capsys):
    whole = done(tmp_path / "a")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("action entropy 0.") and "at strength 0.5 steering vector 0." in said and "regret" in said
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results == json.loads(json.dumps(east.results(lines(tmp_path / "a" / "items.jsonl"), small())))
    assert (tmp_path / "a" / "picture.png").exists() and len(lines(tmp_path / "a" / "items.jsonl")) == 2
    assert {row["layer"] for row in lines(tmp_path / "a" / "items.jsonl")} == {2}  # of four
    # As it would be if it had been killed: the vectors are read again, and nothing else changes.
    shutil.copytree(tmp_path / "a", tmp_path / "c", ignore=shutil.ignore_patterns(".lock", "results.json"))
    (tmp_path / "c" / "items.jsonl").write_bytes(whole[: len(whole) // 2])
    first_phase, east.first_phase = east.first_phase, None
    try:
        east.main(small(resume=str(tmp_path / "c")))
    finally:
        east.first_phase = first_phase
    assert (tmp_path / "c" / "items.jsonl").read_bytes() == whole
    assert results == json.loads((tmp_path / "c" / "results.json").read_text())
    monkeypatch.setattr(figures, "draw", lambda *x: None)  # which takes a second
    # Others: test_an_episode, test_the_first_phase, test_the_sweep_adds_what_it_says.
    flags = [dict(seed=2), dict(skip=2), dict(layer=3), dict(strength=0.4), dict(built_on="letters")]
    for k, flag in enumerate(flags):
        assert done(tmp_path / f"b{k}", items=1, **flag) != whole[: whole.index(b"\n") + 1], flag
    assert lines(tmp_path / "b0" / "items.jsonl")[0]["means"] != lines(tmp_path / "a" / "items.jsonl")[0]["means"]


def test_a_seed_is_a_warm_start():
    one, two = (east.transcripts(east.Args(seed=s)).recipe for s in (1, 2))
    assert one != two and one | dict(seed=2) == two


def test_a_model_from_its_folder(tmp_path, untrained, monkeypatch, capsys):
    """Of the shape of a real one: a chat template, bfloat16, the buttons in words."""
    alphabet = "".join(sorted({*tiny.CHARACTERS, *"'<>|", *east.prompt([("a", 1)], args(wording="buttons"))}))
    tokenizer = tiny.characters(alphabet)
    turns = "{% for m in messages %}<|{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}<|assistant>{% endif %}"
    shape = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3)
    shape |= dict(vocab_size=len(tokenizer), max_position_embeddings=2048, bos_token_id=None, eos_token_id=1)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape, pad_token_id=0, initializer_range=0.4)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = []
    ask = east.ask
    monkeypatch.setattr(east, "ask", lambda lm, ids, *x, **y: asked.append((lm.dtype, ids)) or ask(lm, ids, *x, **y))
    own = dict(model=str(tmp_path / "model"), max_new_tokens=6, items=1, rows=40, system_prompt="Be brief.")
    rows = [json.loads(line) for line in done(tmp_path / "run", **own).splitlines()]
    assert rows[0]["layer"] == 1 and {layer for _, layer, *_ in rows[0]["asked"]} == {0, 1, 2}
    texts = {tokenizer.decode(ids) for _, ids in asked}
    assert {dtype for dtype, _ in asked} == {torch.bfloat16}
    assert all(t.startswith("<|system>Be brief.<eos><|user>There are two buttons.") for t in texts)
    assert all(t.endswith("or 'Action: green'.<eos><|assistant>") for t in texts) and any("Points: " in t for t in texts)
    # What names no arm at all is said in one line.
    monkeypatch.setattr(east, "arm_of", lambda text, a: None)
    with pytest.raises(UserError, match="no direction to be found"):
        done(tmp_path / "other", **own)


@pytest.mark.parametrize("flag, words", [
    (dict(layer=5), "--layer is from 1 to 4; it is 5"), (dict(layer=0), "--layer must be at least 1"),
    (dict(pulls=2), "--pulls must be two more than --skip at least; it is 2"),
    (dict(samples=1), "--samples must be at least 2"), (dict(strengths=(2.0,)), "--strengths must be"),
    (dict(strength=0.0), "--strength must be above 0"),
    (dict(temperatures=(0.0,)), "--temperatures must be above 0"), (dict(wording="doors"), "--wording must be one of"),
])  # fmt: skip
def test_mistakes(tmp_path, flag, words, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_tokenizer", None)  # they are seen before a warm start is made
    with pytest.raises(UserError):
        east.main(small(run_dir=str(tmp_path / "r"), **flag))
    assert capsys.readouterr().err.startswith(f"error: {words}") and not (tmp_path / "r").exists()


def test_a_mistake_is_one_line(tmp_path):
    words = "--layer is from 1 to 4; it is 9"
    assert user_error(run(tmp_path, "--layer", "9", "--run-dir", tmp_path / "r", script=SCRIPT)) == words
