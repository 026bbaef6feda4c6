"""Names, presets, and the whole path of a real model from a local folder of Qwen2.5-0.5B's shape with random weights."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from algos import grpo
from common import UserError, models


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
    args, _ = models.resolve(grpo.Args(model=str(tmp_path)))
    assert (args.optimizer, args.gradient_checkpointing, args.dtype) == (optimizer, checkpointing, "bfloat16")
    assert args.task == "gsm8k" and args.lr <= 2e-6
    args, _ = models.resolve(grpo.Args(model=str(tmp_path), lr=3e-5, task="addition"))
    assert args.lr == 3e-5 and args.task == "addition"  # what is given stays


def test_tiny_preset_leaves_nothing_open():
    args, _ = models.resolve(grpo.Args())
    left = {k for k, v in vars(args).items() if v is None}
    assert left == {"prompt_template", "resume", "run_dir"}


def test_tokenizer_round_trip():
    tokenizer = models.tiny_tokenizer()
    text = "47+85=\n3+8=11 5+9+1=15:151, Hello?"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("~")["input_ids"] == [tokenizer.unk_token_id] and len(tokenizer) == models.tiny_config().vocab_size


def test_end_tokens_are_those_of_tokenizer_and_model(tmp_path):
    lm = AutoModelForCausalLM.from_config(models.tiny_config())
    lm.generation_config.eos_token_id = [5, 9]
    assert models.end_tokens(lm, models.tiny_tokenizer()) == [1, 5, 9]


def test_a_model_of_the_shape_of_qwen_0_5b_trains_from_its_folder(tmp_path):
    """Two real steps in bfloat16 with stochastic rounding: chat template, GSM8K-shaped file, memory plan, checkpoint."""
    folder = tmp_path / "qwen"
    config = qwen("0.5b")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = models.tiny_tokenizer()
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
    text, tiny = "ab c\nd, e", models.warm_start("addition")
    ids = models.load_tokenizer(SimpleNamespace(model=tiny))(text)["input_ids"]
    assert ids == models.tiny_tokenizer()(text)["input_ids"] and len(ids) == 9
