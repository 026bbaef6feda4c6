"""Asking a model: what is refused, which model is taken, and that the probabilities shown are the model's own."""

import io
import json
import math
import re
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common import UserError, models
from common.worlds import tiny as worlds
from runs import talk
from tests.helpers import ROOT, run, tiny, user_error

__all__ = ["tiny"]
CODE = r"\x1b\[30;48;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m"


def test_the_pieces_of_a_text_are_what_each_token_adds():
    words = worlds.words(["red", "fox", "ran"])
    ids = words("red fox ran")["input_ids"]
    assert talk.pieces(ids, words) == ["red", " fox", " ran"] and words.decode(ids[1]) == "fox"
    assert talk.pieces([3, 1], words) == ["red", " <eos>"] and talk.pieces([], words) == []
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(kinds.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    of_bytes = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = of_bytes("aé €")["input_ids"]
    assert len(ids) == 7 and talk.pieces(ids, of_bytes) == ["a", "", "é", " ", "", "", "€"]
    assert talk.pieces(ids[:2], of_bytes) == ["a", "\N{REPLACEMENT CHARACTER}"]  # the rest of it was cut off


def test_colours():
    stops = (0, 10, 200), (100, 20, 100), (200, 220, 0)
    found = [talk.tint(x, stops) for x in (0.0, 0.25, 0.5, 0.75, 1.0, -3.0, 7.0)]
    assert found == [(0, 10, 200), (50, 15, 150), (100, 20, 100), (150, 120, 50), (200, 220, 0), stops[0], stops[2]]
    red, green = talk.tint(0.0, talk.SURE), talk.tint(1.0, talk.SURE)
    assert red[0] > 2 * red[1] and green[1] > red[1] and green[0] < red[0]
    text = talk.painted(["7", "a\x1b[2J\n"], [0.0, 1.0], stops)
    on, off = "\x1b[30;48;2;200;220;0m", "\x1b[0m"
    assert text == f"\x1b[30;48;2;0;10;200m7{off}{on}a\\x1b[2J\N{RETURN SYMBOL}{off}\n{on}{off}"
    assert talk.bracketed(["1", "7", "\r", "\n"], [0.5, 0.3249, 0.499, 1.0]) == "17[0.32]\\r[0.50]\n"


def test_a_run_is_its_last_checkpoint(tmp_path):
    assert models.locate("tiny") == "tiny" and models.locate(str(tmp_path)) == str(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no checkpoint yet"):
        models.locate(str(tmp_path))
    for name in ("step-999999", "step-1000000", "step-000020", "step-1000001.partial", "last"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    last = str(tmp_path / "checkpoints" / "step-1000000")
    assert models.locate(str(tmp_path)) == last == models.locate(last)


def test_prompts_go_through_the_chat_template():
    tokenizer = worlds.characters()
    plain = tokenizer("1+1=")["input_ids"]
    assert talk.encode("1+1=", tokenizer) == plain
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}?{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}a:{% endif %}"
    assert tokenizer.decode(talk.encode("1+1=", tokenizer)) == "u:1+1=?a:" and talk.encode("1+1=", tokenizer, True) == plain
    with pytest.raises(UserError, match="the prompt: the tokenizer does not know the character '%' of 'u:1%1="):
        talk.encode("1%1=", tokenizer)
    with pytest.raises(UserError, match="no tokens of the prompt ''"):
        talk.encode("", tokenizer, True)


@pytest.fixture
def trained(tiny, tmp_path):
    """A run folder with that model as its checkpoint; its completions were of at most 20 tokens."""
    shutil.copytree(tiny, tmp_path / "run" / "checkpoints" / "step-000007")
    (tmp_path / "run" / "config.json").write_text(json.dumps(dict(args=dict(max_new_tokens=20, stop=["9", ":1"]))))
    return tmp_path / "run"


def test_a_model_is_opened_as_it_was_stored_and_ran(tiny, trained):
    args, config, _, policy = talk.open_model(tiny, engine="hf")
    assert args.dtype == "float32" == str(next(policy.parameters()).dtype)[6:] and not policy.lm.training
    assert args.max_new_tokens == 28 and args.task == "addition:2" and args.stop == ()  # a tiny model's preset
    assert not any(p.requires_grad for p in policy.parameters())
    args = talk.open_model(str(trained))[0]
    assert args.max_new_tokens == 20 and args.stop == ("9", ":1") and args.model.endswith("step-000007")
    assert talk.open_model(str(trained), max_new_tokens=5)[0].max_new_tokens == 5
    path = trained / "checkpoints" / "step-000007" / "config.json"
    for stored, dtype in (("float64", torch.float64), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(dtype=stored, warm_started_on=None)))
        assert next(talk.open_model(str(trained))[3].parameters()).dtype == dtype


def ask(monkeypatch, capsys, text, tty=False, **options):
    """What main() prints for what is typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setattr(talk.sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    talk.main(talk.Options(engine="hf", **options))
    return capsys.readouterr()


def probabilities(folder, prompt, text, temperature):
    """Of each character of a text, and of the end, by transformers alone; and of the likeliest in its place."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), worlds.characters()
    start, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        laws = torch.softmax(lm(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1] / temperature, -1)
    return laws[range(len(ids)), ids].tolist(), laws.max(1).values.tolist()


def test_what_is_shown_is_the_models_own_probability(tiny, monkeypatch, capsys):
    """Without colours in brackets, with them as the ground; at the temperature of the sampling."""
    given = dict(model=tiny, temperature=2.0, n=4)
    plain = ask(monkeypatch, capsys, "12+34=\n\n56+78=\n", **given).out.splitlines()
    assert plain[:2] == ["probability of a token: in [brackets] where below 0.5", "> 12+34="] and len(plain) == 6
    lit = ask(monkeypatch, capsys, "12+34=\n", tty=True, **given).out.splitlines()
    assert re.findall(CODE, lit[0])[::4] == [("248", "105", "107", " 0.0 "), ("110", "195", "125", " 1.0 ")]
    lit = [line for line in lit if "<eos>" in line]
    shown = []
    for line, coloured in zip(plain[2:], lit, strict=True):
        parts = re.findall(r"(<eos>|.)(?:\[(\d\.\d\d)\])?", line)
        text = "".join(token for token, _ in parts[:-1])
        p, _ = probabilities(tiny, "12+34=", text, 2.0)
        expected = [f"{x:.2f}" if x < 0.5 else "" for x in p]
        assert [number for _, number in parts] == expected and parts[-1][0] == "<eos>"
        painted = [(token, (int(r), int(g), int(b))) for r, g, b, token in re.findall(CODE, coloured)]
        assert [token for token, _ in painted] == [*text, "<eos>"]
        for (_, colour), x in zip(painted, p):
            assert max(abs(a - b) for a, b in zip(colour, talk.tint(x, talk.SURE))) <= 1
        shown += expected
    assert len(set(shown)) > 5 and len(set(plain[2:])) > 1


def test_the_likeliest_answer_comes_once(tiny, monkeypatch, capsys):
    (line,) = ask(monkeypatch, capsys, "", model=tiny, temperature=0.0, n=3, prompt="12+34=").out.splitlines()[1:]
    p, most = probabilities(tiny, "12+34=", re.sub(r"\[.*?\]|<eos>", "", line), 1.0)
    assert p == most and re.findall(r"\[(.*?)\]", line) == [f"{x:.2f}" for x in p if x < 0.5] and min(p) < 0.4


def test_no_color_and_cut_answers(tiny, monkeypatch, capsys):
    given = dict(model=str(tiny), temperature=0.01, max_new_tokens=2, prompt="12+34=")  # no answer is as short
    lit = ask(monkeypatch, capsys, "", tty=True, **given).out.splitlines()[-1]
    assert lit.endswith(" (cut after 2 tokens)") and len(re.findall(CODE, lit)) == 2
    monkeypatch.setattr(talk.sys.stdout, "isatty", lambda: True, raising=False)
    for value, colours in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", value)
        talk.main(talk.Options(engine="hf", **given))
        assert ("\x1b" in capsys.readouterr().out) == colours


def test_a_prompt_that_cannot_be_read_is_refused_and_the_next_one_asked_for(tiny, monkeypatch, capsys):
    found = ask(monkeypatch, capsys, f"1%1=\n{'1' * 1000}\n12+34=\n", model=tiny)
    refused = found.err.splitlines()
    assert len(refused) == 2 and "does not know the character '%' of '1%1='" in refused[0]
    assert refused[1] == "error: a prompt of 1000 tokens and --max-new-tokens 28 exceed 1024 positions"
    assert found.out.splitlines()[-1].count("<eos>") == 1
    with pytest.raises(UserError, match="character '%'"):
        ask(monkeypatch, capsys, "", model=tiny, prompt="1%1=")


def test_ctrl_c_ends_it(tiny, monkeypatch, capsys):
    def typed(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", typed)
    assert ask(monkeypatch, capsys, "", model=tiny).out.splitlines()[1:] == []


MISTAKES = [
    (dict(model="tiny"), "tiny needs --task, the task that it is warm-started on: .*route"),
    (dict(model="tiny", task="gsm"), "unknown task 'gsm'; nearest: gsm8k"),
    (dict(model="tiny", task="route", n=0), "--n must be at least 1"),
    (dict(model="tiny", task="route", temperature=-1.0), "--temperature at least 0"),
    (dict(model="tiny", task="route", temperature=math.nan), "--temperature at least 0"),
    (dict(model="/no/such/folder"), "no such folder '/no/such/folder'"),
    (dict(model="qwen2.5-0.7b"), "unknown model 'qwen2.5-0.7b'; nearest names: qwen2.5-0.5b"),
]


@pytest.mark.parametrize("options, complaint", MISTAKES)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        talk.main(talk.Options(prompt="1", **options))


def test_the_command(tiny, tmp_path):
    done = run(tmp_path, tiny, "--prompt", "12+34=", "--n", "2", "--engine", "hf", script=ROOT / "runs" / "talk.py")
    assert done.code == 0 and len(done.out.splitlines()) == 3 and not done.err
    done = run(tmp_path, tiny, "--prompt", "12_34=", "--engine", "hf", script=ROOT / "runs" / "talk.py")
    assert "does not know the character '_'" in user_error(done)
