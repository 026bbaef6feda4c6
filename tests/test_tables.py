"""Whatever a file holds is understood, or refused with file and line; what ends a response."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from algos import dpo
from common import UserError, answers, encoding, pairs, rewards, tables, tasks
from common.worlds import tiny
from tests.test_preferences import CONFIG, assistant, load, user, write

TURNS = (
    "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}<later>\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)


def system(text):
    return dict(role="system", content=text)


def chat(template=TURNS):
    """A tokenizer whose template ends a turn by another token than its end of sequence, like Gemma's."""
    tokenizer = tiny.characters(tiny.CHARACTERS + "()\\{}<>")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<later>"]))
    tokenizer.chat_template = template
    return tokenizer


def task(tmp_path, rows, tokenizer=None, name="data.jsonl", **kwargs):
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return tasks.load(str(path), tokenizer, **kwargs)


def rows(n=10, **more):
    return [dict(prompt=f"p{i}", answer=str(i)) | more for i in range(n)]


# ---------------------------------------------------------------- messages


def test_messages_are_a_prompt(tmp_path):
    """System turns, few-shot turns; the task's template is not for them, one that is given is for the last."""
    talk = [system("be brief"), user("1?"), assistant("one"), user("2?")]
    loaded = task(tmp_path, [*rows(9), dict(prompt=talk, answer="two")], chat())
    (e,) = [e for e in loaded.train + loaded.test if e.answer == "two"]
    text = "(system)be brief<later>\n(user)1?<later>\n(assistant)one<later>\n(user)2?<later>\n(assistant)"
    assert chat().decode(e.ids) == text
    assert "Please" not in text and any("Please reason" in chat().decode(e.ids) for e in loaded.train)
    loaded = task(tmp_path, [*rows(9), dict(prompt=talk, answer="two")], chat(), prompt_template="say {prompt}")
    (e,) = [e for e in loaded.train + loaded.test if e.answer == "two"]
    assert chat().decode(e.ids) == text.replace("(user)2?", "(user)say 2?")
    loaded = task(tmp_path, [dict(prompt=talk, answer="two")] + rows(9), tiny.characters(), prompt_template="{prompt}")
    (e,) = [e for e in loaded.train + loaded.test if e.answer == "two"]
    assert tiny.characters().decode(e.ids) == "be brief\n\n1?\n\none\n\n2?"  # without a template


def test_a_system_turn_of_its_own_and_one_that_is_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"data.jsonl:10: begins with a system turn of its own"):
        task(tmp_path, [*rows(9), dict(prompt=[system("a"), user("b")], answer="1")], chat(), system_prompt="s")


@pytest.mark.parametrize("template, why", [
    ("{{ raise_exception('roles must alternate') if messages|length > 1 }}(user)", "roles must alternate"),
    ("{% for m in messages %}", "chat template refuses the prompt"),
    ("{{ messages[1]['content'] }}", "chat template refuses the prompt"),
])  # fmt: skip
def test_a_template_that_refuses_is_said_with_file_and_line(tmp_path, template, why):
    prompts = [[user(f"a{i}"), user("b")] if "[1]" not in template else f"c{i}" for i in range(9)]
    with pytest.raises(UserError, match=why) as caught:
        task(tmp_path, [dict(prompt=p, answer="1") for p in prompts], chat(template))
    assert re.search(r"data.jsonl:\d: the tokenizer's chat", str(caught.value)) and str(caught.value).count("\n") == 0
    path = write(tmp_path / "pairs.jsonl", [dict(prompt=p, chosen="c", rejected="d") for p in prompts])
    with pytest.raises(UserError, match=r"pairs.jsonl:\d: the tokenizer's chat template refuses the prompt"):
        pairs.load(dpo.Args(data=str(path), max_new_tokens=12), CONFIG, chat(template))


# ---------------------------------------------------------------- what a row may be


@pytest.mark.parametrize("row, why", [
    (dict(prompt=dict(text="a"), answer="1"), "prompt must be text, or messages"),
    (dict(prompt=["a", "b"], answer="1"), "prompt must be text, or messages"),
    (dict(prompt=[], answer="1"), "prompt must be text, or messages"),
    (dict(prompt=[user("a"), assistant("b")], answer="1"), "the last is not the assistant's"),
    (dict(prompt=[user(" ")], answer="1"), "prompt must be"), (dict(prompt=" \n", answer="1"), "prompt must be"),
    (dict(prompt=3, answer="1"), "prompt must be"), (dict(question="", answer="1"), "question must be"),
    (dict(prompt="a", answer=""), "answer must be text or a number"), (dict(prompt="a", answer=" "), "answer must be"),
    (dict(prompt="a", answer=True), "answer must be"), (dict(prompt="a", answer=[]), "answer must be"),
    (dict(prompt="a", answer=["1", ""]), "answer must be"), (dict(prompt="a", answer=[["1"]]), "answer must be"),
    (dict(prompt="a", answer=dict(x=1)), "answer must be"), (dict(problem="a", solution={}), "solution must be"),
    ('{"prompt": "a", "answer": NaN}', "not JSON (NaN is no number)"), ('{"prompt": "a", "answer": -Infinity}', "is no number"),
    ('{"prompt": "a", "answer": 1e999}', "is no number"), ('{"prompt": "a\\ud800", "answer": "1"}', "not JSON"),
    ('{"prompt": "a", "answer": ' + "7" * 5000 + "}", "not JSON"), ("[" * 100_000, "not JSON"),
    ('{"prompt": "a", "answer": ' + "[" * 100_000, "not JSON"), ("{'prompt': 'a'}", "not JSON"),
])  # fmt: skip
def test_what_is_no_row_is_refused_with_its_line(tmp_path, row, why):
    with pytest.raises(UserError) as caught:
        task(tmp_path, [*rows(3), "", row, *rows(5)])
    assert str(caught.value).startswith(f"{tmp_path / 'data.jsonl'}:5: ") and why in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path)) and "\n" not in str(caught.value)


def test_numbers_byte_order_marks_and_arrays_are_read(tmp_path):
    data = [dict(prompt=f"p{i}", answer=[i, i + 0.5, f"{i}!"] if i % 2 else i) for i in range(10)]
    found = {}
    for name, text in {
        "a.jsonl": "\n".join(map(json.dumps, data)), "b.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, data)),
        "c.json": json.dumps(data, indent=2), "d.json": "\ufeff\n" + json.dumps(data),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(text.encode())
        loaded = tasks.load(str(tmp_path / name))
        found[name] = sorted((e.prompt, e.answer) for e in loaded.train + loaded.test)
    assert all(rows == found["a.jsonl"] for rows in found.values())
    assert found["a.jsonl"][:2] == [("p0", "0"), ("p1", ("1", "1.5", "1!"))]
    (tmp_path / "e.json").write_text(json.dumps([*data, dict(prompt="p", answer="")]))
    with pytest.raises(UserError, match=r"e.json\[10\]: answer must be"):
        tasks.load(str(tmp_path / "e.json"))


@pytest.mark.parametrize("workers", [0, 1])
def test_of_several_answers_any_is_right(workers):
    scorer = rewards.Scorer(answers.maths, timeout_s=30, workers=1, inline=not workers)
    texts = [f"so \\boxed{{{x}}}" for x in ("4", "2", "5", "-2")]
    assert scorer(texts, [("2", "-2"), ("2", "-2"), "5", ("2", "-2")]) == (["4", "2", "5", "-2"], [0.0, 1.0, 1.0, 1.0])
    scorer.close()


# ---------------------------------------------------------------- held out


def test_a_prompt_that_stands_twice_is_on_one_side(tmp_path, capsys):
    loaded = task(tmp_path, [dict(prompt=f"p{i % 20}", answer=str(i % 20)) for i in range(60)])
    sides = [{e.prompt for e in part} for part in (loaded.train, loaded.test)]
    assert not sides[0] & sides[1] and len(sides[1]) == 4 and len(loaded.train) == 48 and len(loaded.test) == 12
    write(tmp_path / "test.jsonl", rows(3)), write(tmp_path / "train.jsonl", rows(9) + [dict(prompt=[user("p1")], answer="1")])
    loaded = tasks.load(str(tmp_path / "train.jsonl"))
    assert capsys.readouterr().out == "note: 3 rows are not trained on: their prompts are held out as well\n"
    assert [e.prompt for e in loaded.train] == [*(f"p{i}" for i in range(3, 9)), [user("p1")]]
    assert [e.id for e in loaded.train + loaded.test] == list(range(10)) and len(loaded.test) == 3
    assert tables.split([("a", 1), ("b", 2)], [("b", 3)]) == ([("a", 1)], [("b", 3)])


# ---------------------------------------------------------------- ends and boundaries


def sentencepiece(end=False):
    """Tokens like Llama 2's: a blank is a letter, and one is put before every text; `end`: so is EOS behind it."""
    pieces = [chr(0x2581), *"abcdex\n.", chr(0x2581) + "ab", "cd"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *pieces])}
    tokenizer = Tokenizer(kinds.BPE(vocab, [(chr(0x2581), "a"), ("c", "d")][1:], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(chr(0x2581)), normalizers.Replace(" ", chr(0x2581))])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(chr(0x2581), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", "$A $B <eos>", [("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def test_a_response_follows_its_prompt_without_a_blank():
    tokenizer = sentencepiece()
    assert tokenizer.convert_ids_to_tokens(tokenizer("cd")["input_ids"])[0] == chr(0x2581)
    for text in ("cd", " cd", "a b", "\ncd", "."):
        (ids,) = encoding.response_ids([text], tokenizer, "here", 20)
        prompt = encoding.prompt_ids(["ab"], tokenizer, "here")[0]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(prompt + ids[:-1]) == "ab" + text
    assert encoding.response_ids(["", "e"], tokenizer, "here", 20)[0] == []


@pytest.mark.parametrize("text", ["ab", "ab cd"])
def test_a_tokenizer_that_ends_every_text_does_not_end_prompts(text):
    tokenizer = sentencepiece(end=True)
    assert tokenizer(text)["input_ids"][-1] == tokenizer.eos_token_id
    ids = encoding.prompt_ids([text, text + "<eos>"], tokenizer, "here")
    assert tokenizer.eos_token_id not in ids[0] and ids[1][-1] == tokenizer.eos_token_id


def test_a_response_ends_once_and_as_the_chat_template_ends_it():
    tokenizer = chat()
    later = tokenizer.convert_tokens_to_ids("<later>")
    assert encoding.turn_end(tokenizer) == later != tokenizer.eos_token_id
    for text in ("ab", "ab<later>", "ab<eos>", "ab<later><eos>"):
        assert encoding.response_ids([text], tokenizer, "here", 20) == [tokenizer("ab")["input_ids"] + [later]]
    long, short = tokenizer(["abc", "a"])["input_ids"]
    assert encoding.response_ids(["abc", "a"], tokenizer, "here", 3) == [long, [*short, later]]
    for template in (None, "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert encoding.turn_end(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    assert encoding.turn_end(tokenizer) == tokenizer.eos_token_id


def test_short_pairs_stay_however_long_a_response_may_be(tmp_path, capsys):
    rows = [dict(prompt=f"p{i}", chosen="yes", rejected="no") for i in range(10)]
    long = [dict(prompt="p" * 900, chosen="y" * 200, rejected="n")]
    data = load(write(tmp_path / "pairs.jsonl", rows + long), max_new_tokens=1020)
    assert len(data.train) + len(data.test) == 10 and "1 pairs left out" in capsys.readouterr().out
    assert pairs.context(data, SimpleNamespace(max_new_tokens=1020)) == 2 + 4
    data.reward = lambda prompt, text: 0.0  # then responses are sampled as well
    assert pairs.context(data, SimpleNamespace(max_new_tokens=1020)) == 2 + 1020


# ---------------------------------------------------------------- reasoning-gym


@pytest.mark.parametrize("name", ["arc_agi", "rearc", "calendar_arithmetic"])
def test_an_entry_s_own_answer_is_right(name, gym_of):
    """In a worker, to which entries go as text: tuples and dates must survive it."""
    world = gym_of(train=4, test=2)
    made, entries = world.task(name), list(world._data(name))
    world._data.cache_clear()
    scorer = rewards.Scorer(made.check, timeout_s=60, workers=1)
    answers_ = [entries[int(e.answer.partition(":")[0])]["answer"] for e in made.train]
    texts = [f"####{a}" if "\n" not in str(a) else f"\\boxed{{{a}}}" for a in answers_]
    _, scores = scorer(texts, [e.answer for e in made.train])
    scorer.close()
    told = [math.isclose(s, 1.0) for s, a in zip(scores, answers_) if a is not None]
    assert told and all(told)


def test_what_reasoning_gym_cannot_make_is_refused():
    with pytest.raises(UserError, match="task reasoning_gym:composite cannot be made without settings of its own"):
        tasks.load("reasoning_gym:composite")


def test_a_token_that_the_model_has_not(tmp_path):
    """Added to the tokenizer and not to the model: an embedding beyond the last one."""
    from common import models

    tokenizer = tiny.characters()
    tokenizer.add_tokens(["<new>"])
    loaded = task(tmp_path, [*rows(9), dict(prompt="say <new>", answer="1")], tokenizer, prompt_template="{prompt}")
    args = SimpleNamespace(max_new_tokens=8)
    with pytest.raises(UserError, match="'say <new>' of task .*: the tokenizer's token 78 is none of the model's 78"):
        models.check_context(CONFIG, loaded, args)
    assert models.check_context(CONFIG, task(tmp_path, rows(9), tokenizer, prompt_template="{prompt}"), args) == 10


def test_the_answer_of_a_problem_is_its_answer(tmp_path):
    """Rows with a whole solution as well: what is asked for is the answer, where there is one."""
    found = task(tmp_path, [dict(problem=f"p{i}", solution="think", answer=str(i)) for i in range(8)])
    assert {e.answer for e in found.train + found.test} == {str(i) for i in range(8)}
    found = task(tmp_path, [dict(problem=f"p{i}", solution=f"so \\boxed{{{i}}}") for i in range(8)])
    assert all(e.answer.startswith("so ") for e in found.train)
