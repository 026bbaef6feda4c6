"""Names, presets, and the whole path of a real model from a local folder of Qwen2.5-0.5B's shape with random weights."""

import copy
import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config

from algos import grpo
from common import UserError, models, settings, tasks
from common.worlds import tiny
from tests.helpers import ROOT, Child, checkpoints, die_at, lines, outcome, run, same


def test_aliases():
    assert models.locate("qwen2.5-7b") == models.locate("Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    assert models.locate("qwen2.5-math-1.5b-instruct") == "Qwen/Qwen2.5-Math-1.5B-Instruct"
    assert models.locate("qwen2.5-7b-math") == "Qwen/Qwen2.5-Math-7B"
    assert models.locate("qwen3-8b-base") == "Qwen/Qwen3-8B-Base"
    assert models.locate("llama-3.1-8b-instruct") == "meta-llama/Llama-3.1-8B-Instruct"
    assert models.locate("someone/something") == "someone/something"
    for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b"):
        assert {f"qwen2.5-{size}", f"qwen2.5-{size}-instruct"} <= models.ALIASES.keys()


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="qwen2.5-7b"):
        models.locate("qwen2.5-7")
    with pytest.raises(UserError, match="no such folder"):
        models.locate("./nowhere/at/all")


SHAPES = {  # layers, hidden, mlp, heads, kv heads, vocabulary, tied
    "0.5b": (24, 896, 4864, 14, 2, 151936, True),
    "1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "7b": (28, 3584, 18944, 28, 4, 152064, False),
    "32b": (64, 5120, 27648, 40, 8, 152064, False),
}


def qwen(shape):
    L, H, M, heads, kv, V, tied = SHAPES[shape]
    return Qwen2Config(num_hidden_layers=L, hidden_size=H, intermediate_size=M, num_attention_heads=heads,
                       num_key_value_heads=kv, vocab_size=V, tie_word_embeddings=tied, max_position_embeddings=32768,
                       bos_token_id=None, eos_token_id=1, pad_token_id=0)  # fmt: skip


@pytest.mark.parametrize(
    "shape, optimizer, checkpointing",
    [("0.5b", "adamw_sr", False), ("1.5b", "adamw_sr", True), ("7b", "adamw_8bit", True), ("32b", "adamw_8bit", True)],
)
def test_presets_follow_the_size(tmp_path, shape, optimizer, checkpointing):
    qwen(shape).save_pretrained(tmp_path)
    args, _ = settings.resolve(grpo.Args(model=str(tmp_path)))
    assert (args.optimizer, args.gradient_checkpointing, args.dtype) == (optimizer, checkpointing, "bfloat16")
    assert args.task == "gsm8k" and args.lr <= 2e-6
    args, _ = settings.resolve(grpo.Args(model=str(tmp_path), lr=3e-5, task="addition"))
    assert args.lr == 3e-5 and args.task == "addition"  # what is given stays


def test_tiny_preset_leaves_nothing_open():
    args, _ = settings.resolve(grpo.Args())
    left = {k for k, v in vars(args).items() if v is None}
    assert left == {"prompt_template", "system_prompt", "reward", "resume", "run_dir", "push_to_hub", "lora_alpha"}


# ---------------------------------------------------------------- what a flag may be


@dataclass
class Limited:
    """Args without a model and without any training."""

    share: float | None = None
    count: int | None = 3
    plain: float = 0.5
    flag: bool | None = True
    kind: Literal["a", "b"] = "a"
    limits = dict(share="0 < x <= 1", count="2 <= x: one is compared with nothing", flag="5 <= x")


def refused(args, **limits):
    args.limits = args.limits | limits
    with pytest.raises(UserError) as caught:
        settings.resolve(args)
    assert caught.value.code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    "limit, good, bad, words",
    [
        ("0 < x <= 1", [1e-9, 0.5, 1, 1.0], [0, 0.0, -1, 1.0001, 2], "above 0 and at most 1"),
        ("0 <= x < 1", [0, 0.0, 0.999], [-0.001, 1, 1.0], "at least 0 and below 1"),
        ("0 < x < 1", [0.001, 0.999], [0, 1], "above 0 and below 1"),
        ("-1 <= x <= 1", [-1, 0, 1], [-1.001, 1.001], "at least -1 and at most 1"),
        ("0 < x", [1e-9, 1e9], [0, -1], "above 0"),
        ("0.5 <= x", [0.5, 7], [0.499], "at least 0.5"),
        ("x < 2", [-1e9, 1.999], [2, 3], "below 2"),
        ("x <= 2", [-1e9, 2], [2.001], "at most 2"),
        ("x", [-1e9, 0, 1e9], [], "finite"),
    ],
)
def test_limits(limit, good, bad, words):
    nan, inf = float("nan"), float("inf")
    for value in good:
        args = Limited(share=value)
        args.limits = dict(share=limit)
        assert settings.resolve(args) == (args, None) and args.share == value
    for value in [*bad, nan, inf, -inf]:
        assert refused(Limited(share=value), share=limit) == f"--share must be {words}, is {value}"
        assert refused(Limited(share=value), share=f"{limit}: so it is") == f"--share must be {words}, is {value}: so it is"


def test_limits_leave_alone_what_is_no_number():
    """None, True and words; and a script's limits do not end those of the house."""
    args, config = settings.resolve(Limited(flag=False))
    assert config is None and args == Limited(share=None, flag=False)
    settings.resolve(Limited(flag=None, count=None))
    assert refused(Limited(count=1)) == "--count must be at least 2, is 1: one is compared with nothing"
    assert refused(Limited(plain=-0.1)) == "--plain must be at least 0, is -0.1"  # any other number
    assert refused(Limited(plain=float("inf"))) == "--plain must be at least 0, is inf"
    assert refused(Limited(kind="c")) == "--kind must be one of a, b; it is 'c'"


def test_a_flag_is_named_as_it_is_typed():
    assert refused(grpo.Args(max_grad_norm=-1.0)).startswith("--max-grad-norm must be at least 0, is -1.0")
    assert "--group-size must be at least 2, is 1: the completions" in refused(grpo.Args(group_size=1))  # grpo's own
    assert "--epochs must be at least 1, is 0" in refused(grpo.Args(epochs=0))


def test_a_script_without_training_gets_what_it_has():
    """Only fields that are there are filled in, and the preset's optimizer is none of its business."""

    @dataclass
    class Scores:
        model: str = "tiny"
        task: str | None = None
        dtype: str | None = None
        max_new_tokens: int | None = None
        micro_batch_tokens: int | None = None

    args, config = settings.resolve(Scores())
    assert vars(args) == dict(model="tiny", task="route", dtype="float32", max_new_tokens=28, micro_batch_tokens=16384)
    assert config.vocab_size == 79
    args, _ = settings.resolve(Scores(task="countdown:4"))
    assert args.max_new_tokens == 48


# ---------------------------------------------------------------- the tiny models


def test_tokenizer_round_trip():
    tokenizer = tiny.characters()
    text = "47+85=\n3+8=11 5+9+1=15:151, Hello?"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("~")["input_ids"] == [tokenizer.unk_token_id] and len(tokenizer) == tiny.config().vocab_size


def test_end_tokens_are_those_of_tokenizer_and_model(tmp_path):
    lm = AutoModelForCausalLM.from_config(tiny.config())
    lm.generation_config.eos_token_id = [5, 9]
    assert models.end_tokens(lm, tiny.characters()) == [1, 5, 9]


def test_a_model_of_the_shape_of_qwen_0_5b_trains_from_its_folder(tmp_path):
    """Two real steps in bfloat16 with stochastic rounding: chat template, GSM8K-shaped file, memory plan, checkpoint."""
    folder = tmp_path / "qwen"
    config = qwen("0.5b")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = tiny.characters(tiny.CHARACTERS + "<>\\{}#")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    rows = [
        {"question": f"Ann has {i} apples and buys 2. How many?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}
        for i in range(20)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [
        sys.executable, "algos/sapo.py", "--model", str(folder), "--task", str(tmp_path / "train.jsonl"), "--steps", "1",
        "--prompts-per-step", "2", "--group-size", "2", "--minibatches", "1", "--max-new-tokens", "8", "--eval-prompts", "2",
        "--eval-every", "0", "--run-dir", str(tmp_path / "run"), "--engine", "hf", "--format-reward", "0.5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory plan per process, GiB (494.0 M parameters): weights 0.92" in done.stdout
    assert "greedy accuracy" in done.stdout.splitlines()[-1]
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["args"]["dtype"] == "bfloat16" and saved["args"]["optimizer"] == "adamw_sr"
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["sampler_gap"] < 0.1 and row["entropy"] > 5  # random weights over 151,936 tokens: up to ln V = 11.9
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "model.safetensors").stat().st_size > 9e8


def test_a_folder_with_a_tokenizer_of_its_own_kind():
    """Spaces and line ends are tokens of the tiny model in a folder as they are of the built-in one."""
    text, folder = "ab c\nd, e", tiny.warm_start(tasks.load("addition"))
    ids = models.load_tokenizer(SimpleNamespace(model=folder))(text)["input_ids"]
    assert ids == tiny.characters()(text)["input_ids"] and len(ids) == 9


def brief():
    """In a child: a warm start of few steps."""
    tiny.RECIPE |= dict(steps=6, careful_steps=3, batch=8)


@pytest.mark.parametrize("name", ["tiny-small", "tiny-deep", "tiny-large"])
def test_the_other_tiny_models(tmp_path, name):
    """Any of them by name, from warm start to checkpoint."""
    argv = "--task addition --steps 2 --prompts-per-step 4 --group-size 4 --minibatches 2 --eval-prompts 8 --run-dir".split()
    env = dict(TOKENPO_CACHE=str(tmp_path / "cache"))
    done = run(tmp_path, "--model", name, *argv, tmp_path / "run", before=brief, env=env)
    assert done.code == 0 and done.err == "", done.err
    assert [r["step"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2] and "memory plan" not in done.out
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert re.fullmatch(rf"{name}-addition-2-[0-9a-f]{{10}}", folder.name)
    layers, width, inner, heads = tiny.SHAPES[name]
    for place in (folder, checkpoints(tmp_path / "run")[-1]):
        c = json.loads((place / "config.json").read_text())
        assert (c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]) == (
            layers, width, inner, heads,
        )  # fmt: skip
    size = models.architecture(SimpleNamespace(model=name))[1]
    assert sum(v.numel() for v in load_file(folder / "model.safetensors").values()) == size


def test_the_sizes_of_the_tiny_models():
    sizes = {name: models.architecture(SimpleNamespace(model=name))[1] for name in tiny.SHAPES}
    assert {n: round(s, -4) for n, s in sizes.items()} == {
        "tiny": 230_000, "tiny-small": 30_000, "tiny-deep": 450_000, "tiny-large": 800_000,
    }  # fmt: skip
    with pytest.raises(UserError, match="unknown model 'tiny-huge'; nearest names: tiny-large"):
        models.locate("tiny-huge")


def test_pairs_with_another_tiny_model(tmp_path):
    argv = "--model tiny-small --steps 2 --pairs-per-step 4 --eval-prompts 4 --run-dir".split()
    env = dict(TOKENPO_CACHE=str(tmp_path / "cache"))
    done = run(tmp_path, *argv, tmp_path / "run", script=ROOT / "algos" / "dpo.py", before=brief, env=env)
    assert done.code == 0 and done.err == "", done.err
    assert [p.name[:19] for p in (tmp_path / "cache").iterdir() if p.is_dir()] == ["tiny-small-letters-"]


# ---------------------------------------------------------------- a task of a script's own

COLOURS, NUMBERS = "red green blue".split(), "one two three".split()
VOCABULARY = [*COLOURS, *NUMBERS, "say", ":"]
SHAPE = dict(num_hidden_layers=3, hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2)


def parrot(answer=lambda colour, n: " ".join([colour] * n), extra=(), **changes):
    """'say two red :' -> 'red red', with a tokenizer of words, a shape, a recipe and a length of its own."""
    rows = [(f"say {n} {c} :", answer(c, i + 1)) for i, n in enumerate(NUMBERS) for c in COLOURS]
    rows += [(f"say say {q.removeprefix('say ')}", a) for q, a in rows]
    examples = [tasks.Example(i, *row) for i, row in enumerate(rows)]
    calls = []

    def demonstrate(rng, example, careful):
        calls.append(careful)
        return example.answer if rng.random() < careful else rng.choice(COLOURS)

    fields = dict(
        recipe=dict(steps=7, careful_steps=5, batch=6, careful=0.5), max_new_tokens=5,
        shape=SHAPE, tokenizer=lambda: tiny.words([*VOCABULARY, *extra]),
    )  # fmt: skip
    check = lambda text, answer: (text, float(text == answer))  # noqa: E731
    task = tasks.Task("parrot", examples[4:], examples[:4], check, True, demonstrate, **fields | changes)
    task.calls = calls
    return task


def test_words_are_a_tokenizer():
    tokenizer = tiny.words(VOCABULARY)
    ids = tokenizer("say  two red :\n")["input_ids"]
    assert len(ids) == 4 and tokenizer.decode(ids) == "say two red :" and len(tokenizer) == 3 + len(VOCABULARY)
    assert tokenizer("two redred")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "say two red :"


def test_a_warm_start_of_ones_own(tmp_path):
    """By the task's recipe, shape and tokenizer; made once."""
    task = parrot()
    folder = Path(tiny.warm_start(task, cache=tmp_path))
    assert folder.parent == tmp_path and folder.name.startswith("tiny-parrot-")
    careful = task.calls[-7 * 6 :]
    assert careful == [1.0] * 30 + [0.5] * 12  # 7 steps of 6 rows, the careful way alone in the first 5
    c = json.loads((folder / "config.json").read_text())
    assert (c["vocab_size"], c["num_hidden_layers"], c["hidden_size"], c["num_key_value_heads"]) == (11, 3, 48, 2)
    tokenizer = models.load_tokenizer(SimpleNamespace(model=str(folder)))
    assert all(tokenizer.decode(e.ids) == e.prompt for e in task.train) and all(not e.ids for e in task.test)
    again = parrot()
    assert tiny.warm_start(again, cache=tmp_path) == str(folder) and len(again.calls) == len(task.calls) - 7 * 6


@pytest.mark.parametrize(
    "changes",
    [
        dict(answer=lambda colour, n: " ".join([colour] * (4 - n))),  # demonstrates something else
        dict(extra=["yellow"]),
        dict(recipe=dict(steps=8, careful_steps=5, batch=6, careful=0.5)),
        dict(recipe=dict(steps=7, careful_steps=5, batch=6, careful=0.5, seed=1)),
        dict(shape=SHAPE | dict(num_hidden_layers=2)),
        dict(template="say {prompt}"),
        dict(shown=[tasks.Example(99, "say say say two blue :", "blue blue")]),
        dict(shape={}, name="tiny-deep"),
    ],
    ids=["demonstration", "vocabulary", "steps", "seed", "shape", "template", "prompts", "size"],
)
def test_it_is_cached_by_what_it_is_made_of(tmp_path, changes):
    changes, name = {k: v for k, v in changes.items() if k != "name"}, changes.get("name", "tiny")
    first, other = tiny.warm_start(parrot(), cache=tmp_path), tiny.warm_start(parrot(**changes), name, cache=tmp_path)
    assert first != other and len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2
    assert (Path(first) / "model.safetensors").read_bytes() != (Path(other) / "model.safetensors").read_bytes()


def test_what_does_not_make_it_is_not_in_its_key(tmp_path):
    first = tiny.warm_start(parrot(), cache=tmp_path)
    assert tiny.warm_start(parrot(max_new_tokens=9, measure="score"), cache=tmp_path) == first


OWN = dataclasses.make_dataclass(
    "OwnArgs",
    [(f.name, f.type, f) for f in map(copy.copy, dataclasses.fields(grpo.Args)) if f.name not in ("task", "prompt_template")],
    namespace=dict(limits=grpo.Args.limits),
)


def own_script(folder, resume=False, before=None, **changes):
    """In a child: a script with a task that only it has, and grpo's functions."""
    from common import engines, gpu, rewards, rollout, runlog
    from common.batch import Meter, minibatches, read

    if before:
        before()
    task = parrot(**changes)
    args = OWN(**{"resume" if resume else "run_dir": str(folder)}, **({} if resume else dict(
        steps=4, prompts_per_step=4, group_size=4, minibatches=2, lr=1e-3, checkpoint_every=2, eval_prompts=4)))  # fmt: skip
    args, config, device = settings.prepare("own.py", args, warm=task)
    tokenizer = models.load_tokenizer(args, warm=task)
    tasks.encode(task, tokenizer)
    run = runlog.Run("own.py", args, config, tokenizer, models.check_context(config, task, args))
    policy = models.load(args, device, warm=task)
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine, scorer = engines.make_engine(policy, tokenizer, args, 20), rewards.Scorer(task.check, inline=task.inline)
    for step in run.steps(policy, optimizer, lambda: rollout.evaluate(engine, scorer, tokenizer, task, args)):
        batch = rollout.collect(engine, scorer, tokenizer, task.order(4 * step, 4, args.seed), args, step)
        batch.old_logp, _ = read(policy, batch, args)
        adv = grpo.advantages(batch.reward.view(-1, args.group_size), args)
        batch.adv, meter = adv.flatten()[:, None].expand_as(batch.old_logp), Meter()
        for rows, weights in minibatches(batch, args, step, grpo.token_weights):
            batch.weights = weights
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = grpo.surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                (-(objective * mb.weights)[mb.trained].sum()).backward()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            if run.finite(gpu.clip_gradients(policy, args.max_grad_norm)):
                optimizer.step()
            optimizer.zero_grad()
        run.log(meter.result() | rollout.summary(batch), batch)
    run.finish()


def test_a_task_of_ones_own_trains(tmp_path):
    """Warm-started, trained, killed and resumed; its length, vocabulary and shape are those of the task."""
    env = dict(TOKENPO_CACHE=str(tmp_path / "cache"))

    def child(name, **kwargs):
        return Child(functools.partial(own_script, str(tmp_path / name), **kwargs), tmp_path, env=env).wait()

    done = child("run")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["max_new_tokens"] == 5 and config["args"]["model"] == "tiny" and "task" not in config["args"]
    assert config["model_config"]["vocab_size"] == 11 and config["model_config"]["num_hidden_layers"] == 3
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and all(0 < r["length"] <= 5 for r in rows)
    assert re.fullmatch(r"greedy accuracy \S+ -> \S+ on 4 held-out prompts", done.out.splitlines()[-1])
    assert "memory plan" not in done.out
    texts = {w for s in lines(tmp_path / "run" / "samples.jsonl") for w in s["completion"].split()}
    assert texts and texts <= set(VOCABULARY)
    last = checkpoints(tmp_path / "run")[-1]
    assert len(models.load_tokenizer(SimpleNamespace(model=str(last)))) == 11

    assert child("cut", before=functools.partial(die_at, "os.rename", "step-000004")).code == -signal.SIGKILL
    again = child("cut", resume=True)
    assert again.code == 0 and "resumed from" in again.out, again.err
    same(outcome(tmp_path / "cut"), outcome(tmp_path / "run"))
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def told(answer, alphabet=""):
    """A task on characters, whose demonstrations may have others than the tiny tokenizer's."""
    examples = [tasks.Example(i, f"{i}?", answer) for i in range(30)]
    return tasks.Task(
        "told", examples[5:], examples[:5], lambda text, answer: (text, float(text == answer)), True,
        lambda rng, e, careful: e.answer, recipe=dict(steps=4, careful_steps=2, batch=4),
        tokenizer=(lambda: tiny.characters(tiny.CHARACTERS + alphabet)) if alphabet else None,
    )  # fmt: skip


def test_characters_of_ones_own(tmp_path):
    """A character that no token stands for is refused in one line; with a tokenizer that has it, it is learnt."""
    with pytest.raises(UserError, match="told: the tokenizer does not know the character 'é' of 'café~'") as caught:
        tiny.warm_start(told("café~"), cache=tmp_path)
    assert str(caught.value).count("\n") == 0 and caught.value.code == 2
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]
    task = told("café~", alphabet="é~")
    args = SimpleNamespace(model="tiny", dtype="float32", lora_rank=0, gradient_checkpointing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENPO_CACHE", str(tmp_path))
        tokenizer = models.load_tokenizer(args, warm=task)
        config, _ = models.architecture(args, warm=task)
        policy = models.load(args, torch.device("cpu"), warm=task)
    ids = tokenizer("café~")["input_ids"]
    assert len(ids) == 5 and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == "café~"
    assert config.vocab_size == policy.lm.config.vocab_size == len(tokenizer) == 80
    assert policy.lm.get_input_embeddings().weight.shape == (80, 96)


@pytest.mark.parametrize("where", ["prompt", "shown", "template"])
def test_a_character_of_a_prompt_is_refused(tmp_path, where):
    task = told("1")
    if where == "template":
        task.template = "<{prompt}"
    else:
        {"prompt": task.train, "shown": task.shown}[where].append(tasks.Example(77, "<", "1"))
    with pytest.raises(UserError, match="told: the tokenizer does not know the character '<'"):
        tiny.warm_start(task, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_word_that_no_token_stands_for_is_refused(tmp_path):
    """Also where every one of its letters is a word."""
    with pytest.raises(UserError, match="parrot: the tokenizer does not know .* of"):
        tiny.warm_start(parrot(answer=lambda colour, n: f"{colour}{colour}"), cache=tmp_path)
    with pytest.raises(UserError, match="parrot: the tokenizer does not know .*ab"):
        tiny.warm_start(parrot(answer=lambda colour, n: "ab", extra=["a", "b"]), cache=tmp_path)
