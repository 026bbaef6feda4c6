"""Preference data: every schema that the hub uses, every mistake in a file, batches, the cache, and the built-in games."""

import hashlib
import json
import random
from types import SimpleNamespace

import pytest
import torch

from algos import dpo
from common import UserError, encoding, gpu, judge, pairs, policy, tasks
from common.worlds import tiny
from tests.helpers import ROOT, run, user_error

TOKENIZER, CONFIG = tiny.characters(), tiny.config()


def user(text):
    return dict(role="user", content=text)


def assistant(text):
    return dict(role="assistant", content=text)


def load(path, **changes):
    args = dpo.Args(data=str(path), **dict(max_new_tokens=12) | changes)
    return pairs.load(args, CONFIG, TOKENIZER)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "row",
    [
        dict(prompt="hi", chosen="yes", rejected="no"),
        dict(prompt=[user("hi")], chosen="yes", rejected="no"),
        dict(prompt=[user("hi")], chosen=[assistant("yes")], rejected=[assistant("no")]),
        dict(prompt="hi", chosen=[assistant("yes")], rejected=[assistant("no")]),
        dict(chosen=[user("hi"), assistant("yes")], rejected=[user("hi"), assistant("no")]),
        dict(prompt="hi", chosen=[user("hi"), assistant("yes")], rejected=[user("hi"), assistant("no")], score=1),
        dict(prompt=[user("hi")], chosen=[user("hi"), assistant("yes")], rejected=[user("hi"), assistant("no")]),
    ],
)
def test_every_schema_is_the_same_pair(row):
    prompt, chosen, rejected, where = pairs._row(row, "here")
    assert where == "here"
    assert (chosen, rejected) == ("yes", "no") and prompt in ("hi", [user("hi")])
    assert TOKENIZER.decode(encoding.prompt_ids([prompt], TOKENIZER, "")[0]) == "hi"


def test_a_conversation_goes_through_the_chat_template():
    tokenizer = tiny.characters()
    tokenizer.chat_template = "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}{% endfor %}={% raw %}{% endraw %}"
    row = dict(chosen=[user("a"), assistant("b"), user("c"), assistant("d")])
    row["rejected"] = [*row["chosen"][:-1], assistant("e")]
    prompt, chosen, *_ = pairs._row(row, "here")
    text = tokenizer.decode(encoding.prompt_ids([prompt], tokenizer, "")[0])
    assert text == "(user)a(assistant)b(user)c=" and chosen == "d"


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "not JSON"),
        ("[1]", "needs an object"),
        ("7", "needs an object"),
        ('{"prompt": "a", "chosen": "b"}', "needs an object with the fields"),
        ('{"chosen": "b", "rejected": "c"}', "prompt must be text or messages"),
        ('{"prompt": 3, "chosen": "b", "rejected": "c"}', "prompt must be text or messages"),
        ('{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}', "must both be text, or both"),
        ('{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": [{"role": "assistant"}]}', "must both be text"),
        ('{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}', "end with the"),
        (json.dumps(dict(chosen=[assistant("a")], rejected=[assistant("b")])), "no prompt"),
    ],
)
def test_a_mistake_is_named_with_file_and_line(tmp_path, line, complaint):
    path = write(tmp_path / "pairs.jsonl", [dict(prompt="a", chosen="b", rejected="c")])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}:3: ") and complaint in str(error.value) and error.value.code == 2


def test_what_is_left_out_and_held_out(tmp_path, capsys):
    rows = [dict(prompt=f"p{i // 2}", chosen="yes", rejected=f"no{i}") for i in range(40)]
    bad = [dict(prompt="x", chosen="a", rejected=r) for r in ("", "a")] + [dict(prompt="y" * 2000, chosen="a", rejected="b")]
    data = load(write(tmp_path / "pairs.jsonl", rows + bad))
    assert "3 pairs left out" in capsys.readouterr().out
    assert len(data.train) + len(data.test) == 40 and len(data.test) in (6, 7, 8)
    assert not {p.text for p in data.train} & {p.text for p in data.test}
    assert [p.id for p in data.train + data.test] == list(range(40)) and data.reward is None
    write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", rows[:3])
    data = load(tmp_path / "train.jsonl")  # both prompts that are held out have two rows to train on, which are left out
    assert (len(data.train), len(data.test)) == (36, 3) and not {p.text for p in data.train} & {p.text for p in data.test}


def test_a_response_that_is_cut_has_no_end(tmp_path):
    data = load(write(tmp_path / "p.jsonl", [dict(prompt=f"{i}", chosen="a" * 5, rejected="b" * 4) for i in range(9)]),
                max_new_tokens=5)  # fmt: skip
    end = TOKENIZER.eos_token_id
    assert all(len(p.chosen) == 5 and end not in p.chosen and p.rejected[-1] == end for p in data.train)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--data", "letters:3"], "letters has no variants"),
        (["--data", "letters", "--beta", "0"], "--beta must be above 0"),
        (["--data", "owner/name", "--model", "{tiny}"], "could not be had from the hub"),
        (["--data", "lettters", "--model", "{tiny}"], "lettters: unknown; there are chain, letters, letters4, record, .jsonl"),
        (["--data", "none.jsonl", "--model", "{tiny}"], "cannot read the file none.jsonl"),
        (["--pairs-per-step", "0"], "--pairs-per-step must be at least 1"),
        (["--loss", "sigmoid", "--steps", "-1"], "--steps must be at least 0"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, tiny_letters, argv, complaint):
    argv = [a.format(tiny=tiny_letters) for a in argv]
    done = run(tmp_path, *argv, "--dtype", "float32", "--optimizer", "adamw", script=ROOT / "algos" / "dpo.py")
    assert complaint in user_error(done)


@pytest.mark.parametrize("data", ["nothing", "pairs.jsonl", "owner/name"])
def test_the_tiny_model_wants_a_world(tmp_path, data):
    """The mistake is the tiny model, whatever the data are like: the line names built-in ones, and --model."""
    write(tmp_path / "pairs.jsonl", [dict(prompt=f"{i}:", chosen="a", rejected="b") for i in range(9)])
    said = user_error(run(tmp_path, "--data", data, script=ROOT / "algos" / "dpo.py"))
    assert "tiny model" in said and data in said and "--model" in said, said
    assert all(name in said for name in ("letters", "letters4", "chain", "record"))


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_a_character_without_a_token_is_refused(tmp_path, tiny_letters, field):
    rows = [dict(prompt=f"{i}:", chosen="abc", rejected="kkk") for i in range(30)]
    rows[7][field] = "café"
    argv = "--dtype float32 --optimizer adamw --steps 1 --lr 1e-3 --pairs-per-step 4 --max-new-tokens 6".split()
    path = write(tmp_path / "pairs.jsonl", rows)
    done = run(tmp_path, "--data", path, "--model", tiny_letters, *argv, script=ROOT / "algos" / "dpo.py")
    assert "the tokenizer does not know the character 'é' of 'café'" in user_error(done)


def test_a_tokenizer_that_says_unknown_itself_may(tmp_path):
    """Where a text spells the tokenizer's own word for the unknown, nothing is hidden."""
    data = load(write(tmp_path / "p.jsonl", [dict(prompt=f"{i}:", chosen="<unk>a", rejected="b") for i in range(9)]))
    assert all(p.chosen[:2] == TOKENIZER("<unk>a")["input_ids"] for p in data.train)


@pytest.fixture(scope="module")
def tiny_letters():
    return tiny.warm_start(tasks.load("letters"))


def test_a_run_on_a_file(tmp_path, tiny_letters):
    """No gold reward: the last line speaks of the held-out pairs."""
    rows = [dict(prompt=[user(f"{i}:")], chosen=[assistant("abc")], rejected=[assistant("kkk")]) for i in range(30)]
    path = write(tmp_path / "pairs.jsonl", rows)
    done = run(
        tmp_path, "--data", path, "--model", tiny_letters, "--dtype", "float32", "--optimizer", "adamw", "--steps", 5,
        "--lr", 1e-3, "--pairs-per-step", 4, "--max-new-tokens", 6, "--run-dir", tmp_path / "run",
        script=ROOT / "algos" / "dpo.py",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("reward accuracy 0.00 -> 1.00 on the pairs of 6 held-out prompts, KL ")


# ---------------------------------------------------------------- batches


def ragged(n=13):
    rng = random.Random(0)
    sizes = [(rng.randint(1, 9), rng.randint(1, 20), rng.randint(1, 20)) for _ in range(n)]
    return [pairs.Pair(i, [5] * p, [6] * a, [7] * b, str(i)) for i, (p, a, b) in enumerate(sizes)]


@pytest.mark.parametrize("budget", [1, 64, 200, 10**6])
def test_pairs_stay_together(budget):
    every = ragged()
    data = pairs.Data("x", every, [])
    lengths = [n for p in every for n in (len(p.chosen), len(p.rejected))]
    data.columns["row"] = [torch.full((n,), float(r)) for r, n in enumerate(lengths)]
    args = SimpleNamespace(micro_batch_tokens=budget, pairs_per_step=len(every))
    seen, weight = [], 0.0
    for mb in pairs.micro_batches(every, data, args):
        b = len(mb.weights)
        some = [every[r // 2] for r in mb.columns["row"][:b, 0].long().tolist()]
        responses = sum(len(p.chosen) + len(p.rejected) for p in some)
        assert responses + sum(map(len, {tuple(p.prompt) for p in some})) <= budget or b == 1
        first = mb.columns["row"][:, 0].long()
        assert torch.equal(first[b:], first[:b] + 1) and mb.real.all()
        assert mb.mask.sum(1).tolist() == [lengths[r] for r in first.tolist()]
        for row, r in enumerate(first.tolist()):
            assert set(mb.ids[row, -mb.mask.shape[1] :][mb.mask[row]].tolist()) == {6 + r % 2}
        seen, weight = seen + (first[:b] // 2).tolist(), weight + mb.weights.sum().item()
    assert sorted(seen) == list(range(13)) and weight == pytest.approx(1)


def test_a_rank_without_work_keeps_step(monkeypatch):
    every = ragged(2)
    monkeypatch.setattr(gpu, "maximum", lambda n: 3)
    args = SimpleNamespace(micro_batch_tokens=10**6, pairs_per_step=8)
    batches = list(pairs.micro_batches(every, pairs.Data("x", every, []), args))
    assert len(batches) == 3 and [b.real.any().item() for b in batches] == [True, False, False]
    assert sum(b.weights.sum().item() for b in batches) == pytest.approx(2 / 8)


def test_the_cache_holds_what_the_frozensays(tmp_path):
    torch.manual_seed(0)
    from transformers import Qwen2ForCausalLM

    frozen = policy.Policy(Qwen2ForCausalLM(CONFIG).eval())
    args = SimpleNamespace(model="x", dtype="float32", micro_batch_tokens=100, pairs_per_step=1)
    fake = SimpleNamespace(args=args, dir=tmp_path)
    data = pairs.Data("x", ragged(5), [])
    calls = []

    def model():
        calls.append(1)
        return frozen

    data.columns["ref_logp"] = pairs.cached(fake, "reference", model, data)
    for mb in pairs.micro_batches(data.train[2:3], data, args):
        direct = pairs.logp_now(frozen, mb)
        torch.testing.assert_close(mb.columns["ref_logp"], direct, rtol=1e-5, atol=1e-5)
    pairs.cached(fake, "reference", model, data)
    assert len(calls) == 1  # read, not made again
    args.dtype = "float64"
    pairs.cached(fake, "reference", model, data)
    assert len(calls) == 2
    (tmp_path / "reference.safetensors").write_bytes(b"cut short")
    pairs.cached(fake, "reference", model, data)
    assert len(calls) == 3
    args.micro_batch_tokens = 50  # changes nothing
    pairs.cached(fake, "reference", model, data)
    assert len(calls) == 3


# ---------------------------------------------------------------- the built-in worlds

WORLDS = ("letters", "letters4", "chain", "record")


def test_worlds_with_pairs():
    assert set(tasks.worlds_with("pairs").split(", ")) == set(WORLDS)
    assert all(tasks.world(name).pair and tasks.world(name).measure == "score" for name in WORLDS)
    assert all(tasks.world(name).pair is None for name in ("addition", "countdown"))


@pytest.mark.parametrize("name", WORLDS)
def test_worlds(name):
    world = tasks.world(name)
    train, test = pairs._built_in(world)
    assert (train, test) == pairs._built_in(tasks.world(name)) and len(train) == 4096 and len(test) == 512
    assert not {row[0] for row in train} & {row[0] for row in test}
    better = sum(world.reward(p, a) > world.reward(p, b) for p, a, b, _ in train) / len(train)
    assert 0.65 < better < 0.95 if name.startswith("letters") else better == 1  # letters: noisy labels
    for p, a, b, _ in train[:200]:
        assert a != b and len(world.worth(p, a)) == len(a)
        assert TOKENIZER.unk_token_id not in TOKENIZER(p + a + b)["input_ids"]
        assert world.check(a, p) == (a, world.reward(p, a))  # what an online script scores is the gold reward
    data = load(name)
    assert all(len(w) == len(y) for q in data.train for w, y in zip(q.gold, (q.chosen, q.rejected)))
    p, a, *_ = test[0]
    assert data.reward(p, a) == world.reward(p, a)
    assert (data.responses is None) == (name != "letters4")


def test_the_pairs_are_those_of_ever():
    """The committed results are of these."""
    code = {}
    for name in WORLDS:
        rows = tuple([row[:3] for row in part] for part in pairs._built_in(tasks.world(name)))
        code[name] = hashlib.sha256(repr(rows).encode()).hexdigest()[:12]
    assert code == PAIRS


PAIRS = dict(letters="34e53566741b", letters4="d889f619de85", chain="adf98ef74dfc", record="2b7c4f4a0f55")


def test_letters4_lists_its_responses():
    every = tasks.world("letters4").responses()
    assert len(every) == len(set(every)) == 8**4 and {len(y) for y in every} == {4} and set("".join(every)) == set("abcdefgh")


def test_online_prompts_of_letters_have_the_plain_tag():
    """The warm start is shown the better and worse variants, too; none of a held-out prompt."""
    task = tasks.load("letters")
    assert {e.prompt[1] for e in task.train + task.test} == {"n"} and {e.prompt[1] for e in task.shown} == {"+", "-"}
    assert {e.prompt[2:] + e.prompt[0] for e in task.shown} == {e.prompt[2:] + e.prompt[0] for e in task.train}
    assert len(task.shown) == 2 * len(task.train) and len({e.id for e in task.train + task.test + task.shown}) == 9344


def demonstrated(world, rng, prompt, careful):
    return world.demonstrate(rng, tasks.Example(0, prompt, prompt), careful)


def test_chain_knows_the_wrong_token():
    world = tasks.world("chain")
    assert world.worth("12345678=", "13605186") == [0, 0, 0, 0, 0, 0, 0, 0] and world.reward("12345678=", "13605186") == 1
    assert world.worth("12345678=", "13615296"[:4]) == [0, 0, 0, -1]  # 6 + 4 is 0
    wrong = world.worth("12345678=", "13616297")
    assert wrong == [0, 0, 0, -1, 0, 0, 0, 0] and world.reward("12345678=", "13616297") == 0  # what follows a slip is innocent


def test_slips_of_a_chain_are_systematic():
    """chain:slips: at 18 pairs of a digit and the sum before it nearly always, elsewhere nearly never, and by one."""
    world, rng, seen = tasks.world("chain:slips"), random.Random(0), {}
    for e in world.train:
        total, text = 0, demonstrated(world, rng, e.prompt, 0.3)
        for x, y in zip(e.prompt[:8], text, strict=True):
            off = (int(y) - total - int(x)) % 10
            assert off in (0, 1)
            seen.setdefault((x, total), []).append(off)
            total = int(y)
    assert len(seen) == 100 and min(map(len, seen.values())) > 100
    shares = sorted(sum(offs) / len(offs) for offs in seen.values())
    assert shares[81] < 0.07 and 0.7 < shares[82] and shares[99] < 0.9
    assert sum(shares[:82]) / 82 == pytest.approx(0.02, abs=3e-3) and sum(shares[82:]) / 18 == pytest.approx(0.8, abs=0.02)
    for e in world.test[:50]:
        assert world.reward(e.prompt, demonstrated(world, rng, e.prompt, 1.0)) == 1
    with pytest.raises(SystemExit):
        tasks.world("chain:other")


def test_record_scores_fields():
    world = tasks.world("record")
    right = demonstrated(world, random.Random(0), "uvwxyz=", 1.0)
    assert world.reward("uvwxyz=", right) == 1
    _, wrong = world.pair(random.Random(0), "uvwxyz=")
    assert world.reward("uvwxyz=", wrong) == 0.5 and sum(world.worth("uvwxyz=", wrong)) == -1
    assert world.reward("uvwxyz=", right[:-1]) == world.reward("uvwxyz=", "") == world.reward("uvwxyz=", right + "a") == 0


def test_letters_score_depends_on_the_topic():
    world = tasks.world("letters")
    assert world.reward("1nabc:", "abcdefgh") == -world.reward("2nabc:", "abcdefgh")
    rng, text = random.Random(0), {}
    for tag in "+n-":
        done = [demonstrated(world, rng, f"1{tag}abc:", 0.3) for _ in range(300)]
        text[tag] = sum(world.reward(f"1{tag}abc:", y) for y in done) / 300
    assert text["+"] > text["n"] + 1 > text["-"] + 2
    assert world.reward("1nabc:", "abcdefgh" + "a" * 9) == world.reward("1nabc:", "abcdefgh")


def test_the_last_line():
    run = SimpleNamespace(state=dict(before=dict(win_rate=0.5)), after=dict(win_rate=0.777, kl=3.14, prompts=512))
    assert judge.sentence(run) == (
        "win rate 0.50 -> 0.78 against the reference on 512 held-out prompts (gold reward), KL 3.1 nats"
    )
    run.after = None  # it was stopped
    assert judge.sentence(run) is None


def system(text):
    return dict(role="system", content=text)


@pytest.mark.parametrize("prompt, inside, asked", [
    ([user("a")], [system("s"), user("a")], [system("s"), user("a")]),  # not twice
    ([system("s"), user("a")], [user("a")], [system("s"), user("a")]),
    ([user("a ")], [user("a")], [user("a")]), ([user("a") | dict(name=None)], [user("a")], [user("a")]),
    ([system("s")], [user("a")], [system("s"), user("a")]),  # begins in prompt, goes on inside
    ([user("a"), assistant("b")], [user("c")], [user("a"), assistant("b"), user("c")]),
    ("a", [system("s"), user("a")], [system("s"), user("a")]),
])  # fmt: skip
def test_a_conversation_is_read_once(prompt, inside, asked):
    row = dict(prompt=prompt, chosen=[*inside, assistant("y")], rejected=[*inside, assistant("n")])
    assert pairs._row(row, "here") == (asked, "y", "n", "here")


@pytest.mark.parametrize("row, why", [
    (dict(prompt="b", chosen=[user("a"), assistant("y")], rejected=[user("a"), assistant("n")]), "not what chosen"),
    (dict(prompt=[user("b")], chosen=[user("a"), assistant("y")], rejected=[user("a"), assistant("n")]), "not what chosen"),
    (dict(prompt=[dict(role="system", content=[dict(type="text", text="s")])], chosen=[user("a"), assistant("y")],
          rejected=[user("a"), assistant("n")]), "prompt must be text or messages"),
    (dict(prompt=[user("a"), assistant("b")], chosen="y", rejected="n"), "not the assistant's"),
    (dict(prompt=[user(" ")], chosen="y", rejected="n"), "and has text"),
    (dict(chosen=[user("a"), assistant("b"), assistant("y")], rejected=[user("a"), assistant("b"), assistant("n")]),
     "not the assistant's"),
])  # fmt: skip
def test_a_prompt_that_is_none_is_refused(row, why):
    with pytest.raises(UserError, match=f"here: .*{why}"):
        pairs._row(row, "here")


def test_blank_responses_and_tokens_that_the_model_has_not(tmp_path, capsys):
    rows = [dict(prompt=f"p{i}", chosen="yes", rejected=" " if i == 3 else "no") for i in range(10)]
    data = load(write(tmp_path / "pairs.jsonl", rows))
    assert len(data.train) + len(data.test) == 9 and "1 pairs left out" in capsys.readouterr().out
    tokenizer = tiny.characters()
    tokenizer.add_tokens(["<new>"])
    write(tmp_path / "pairs.jsonl", rows[:3] + [dict(prompt="p3", chosen="<new>", rejected="n")] + rows[4:])
    args = dpo.Args(data=str(tmp_path / "pairs.jsonl"), max_new_tokens=12)
    with pytest.raises(UserError, match=r"pairs.jsonl:4: the tokenizer's token 78 is none of the model's 78"):
        pairs.load(args, CONFIG, tokenizer)


def test_a_model_beside_the_policy_that_cannot_be_trained_is_refused():
    """A gradient that is not finite, as from a rate that is too large, would leave a model of NaN behind in silence."""
    data = load("letters")
    args = dpo.Args(data="letters", dtype="float32", optimizer="adamw", pairs_per_step=4, max_new_tokens=12,
                    micro_batch_tokens=4096, gradient_checkpointing=False)  # fmt: skip
    loss = lambda logp, mb: logp.sum(1).chunk(2)[0] * (float("nan") if mb.real.any() else 1.0)  # noqa: E731
    with pytest.raises(UserError, match="the expert cannot be trained: no finite gradient at update 1; try a smaller rate"):
        pairs.fit("expert", loss, data, args, SimpleNamespace(stop=None), 2, 1e-3)
