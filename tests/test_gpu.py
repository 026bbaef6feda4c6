"""Two processes against one, the memory plan against arithmetic and a real model, optimizers."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config

from common import UserError, gpu, models

GIB = 2**30
SMALL = (
    "--steps 3 --prompts-per-step 8 --group-size 4 --eval-prompts 16 --checkpoint-every 1 "
    "--micro-batch-tokens 256 --dtype float64"
).split()


def launch(ranks, *arguments, script="algos/grpo.py", env=None):
    one = [sys.executable]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(one if ranks == 1 else many), str(script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def metrics(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]


def test_two_ranks_are_one_process(tmp_path):
    """The whole script under torchrun with FSDP2: the same samples, metrics and parameters; and a checkpoint of two ranks
    goes on in one. In float64, because in float32 AdamW turns rounding noise into steps of up to lr wherever the true
    gradient is 0 (a key's bias cancels in the softmax)."""
    one, two = tmp_path / "one", tmp_path / "two"
    last = launch(1, *SMALL, "--run-dir", one).splitlines()[-1]
    out = launch(2, *SMALL, "--run-dir", two)
    assert out.count("run folder") == 1 and out.splitlines()[-1] == last  # rank 0 alone speaks
    for step in (2, 3):
        a, b = weights(one, step), weights(two, step)
        start = load_file(models.warm_start("addition") + "/model.safetensors")
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=0, atol=1e-9, msg=f"{name} at step {step}")
        assert max((a[n] - start[n]).abs().max() for n in a) > 1e-4  # it did move
    for a, b in zip(metrics(one), metrics(two)):
        assert a.keys() == b.keys()
        for k in a:
            assert b[k] == pytest.approx(a[k], rel=1e-6, abs=1e-6), k
    launch(1, "--resume", two, "--steps", 5)
    launch(1, "--resume", one, "--steps", 5)
    for name, value in weights(one, 5).items():
        torch.testing.assert_close(weights(two, 5)[name], value, rtol=0, atol=1e-9)


WARM = """
import sys
import torch.distributed as dist
from common import models
models.WARM_START |= dict(steps=4, careful_steps=2)
dist.init_process_group("gloo")
if dist.get_rank() == 1:  # whoever gets the lock first makes the model, and that may be any rank
    print(models.warm_start("addition", sys.argv[1]))
dist.destroy_process_group()
"""


def test_any_rank_can_make_the_warm_start(tmp_path):
    (tmp_path / "warm.py").write_text(WARM)
    out = launch(2, tmp_path / "cache", script=tmp_path / "warm.py", env=dict(PYTHONPATH="."))
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert out.split() == [str(folder)]
    saved = load_file(folder / "model.safetensors")
    assert sum(v.numel() for v in saved.values()) == models.count_parameters(models.tiny_config())


def test_prompts_that_cannot_be_shared_evenly(monkeypatch):
    monkeypatch.setattr(gpu, "world", lambda: 3)
    with pytest.raises(UserError, match="cannot be shared evenly by 3"):
        gpu.init(SimpleNamespace(model="tiny", seed=0, prompts_per_step=8))


# ---------------------------------------------------------------- memory plan

QWEN_7B = Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                      num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768)  # fmt: skip


def settings(**changes):
    values = dict(dtype="bfloat16", optimizer="adamw_8bit", lora_rank=0, beta=0.0, micro_batch_tokens=16384, engine="hf",
                  gradient_checkpointing=True, prompts_per_step=8, group_size=8, vllm_memory=0.45)  # fmt: skip
    return SimpleNamespace(**values | changes)


def test_counting_parameters():
    assert models.count_parameters(QWEN_7B) == 7_615_616_512
    V, H, I = 78, 96, 256  # embeddings; per layer q, k, v with biases, o, the MLP, two norms; the last norm
    assert models.count_parameters(models.tiny_config()) == V * H + 2 * (4 * H * H + 3 * H + 3 * H * I + 2 * H) + H


def test_plan_is_the_arithmetic():
    n = models.count_parameters(QWEN_7B)
    plan = gpu.memory_plan(QWEN_7B, settings(), n, context=1000, capacity=80 * GIB, ranks=1)
    assert plan["weights"] == plan["gradients"] == 2 * n
    assert plan["optimizer"] == pytest.approx(2 * n, rel=0.02)
    assert plan["KV cache"] == 2 * 28 * 4 * 128 * 2 * 1000 * 64
    float32 = gpu.memory_plan(QWEN_7B, settings(dtype="float32", optimizer="adamw"), n, 1000, 80 * GIB, 1)
    assert float32["weights"] + float32["gradients"] + float32["optimizer"] == 16 * n
    eight = gpu.memory_plan(QWEN_7B, settings(optimizer="adamw_sr"), n, 1000, 80 * GIB, 8)
    assert eight["weights"] == 2 * n / 8 and eight["optimizer"] == 4 * n / 8


def test_plan_says_what_makes_it_fit():
    n = models.count_parameters(QWEN_7B)
    fits = gpu.explain_plan(QWEN_7B, settings(), n, 1500, 80 * GIB, 1)
    assert fits.splitlines()[1].endswith("of 80.0: fits")
    text = gpu.explain_plan(QWEN_7B, settings(optimizer="adamw_sr", gradient_checkpointing=False), n, 1500, 64 * GIB, 1)
    assert "does not fit" in text and "--gradient-checkpointing True --optimizer adamw_8bit" in text
    assert text.splitlines()[-1].endswith(": fits")
    small = gpu.explain_plan(QWEN_7B, settings(), n, 1500, 24 * GIB, 1)
    assert "torchrun over" in small.splitlines()[-1]


def test_plan_against_what_a_model_really_takes():
    """Weights, gradients and AdamW states of a real model, counted tensor by tensor."""
    config = models.tiny_config()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    states = size(s for state in optimizer.state.values() for k, s in state.items() if k != "step")
    args = settings(dtype="float32", optimizer="adamw", gradient_checkpointing=False)
    plan = gpu.memory_plan(config, args, models.count_parameters(config), 100, GIB, 1)
    assert plan["weights"] == size(model.parameters()) and plan["optimizer"] == states
    assert plan["gradients"] == size(p.grad for p in model.parameters())


# ---------------------------------------------------------------- optimizers


def test_stochastic_rounding_keeps_small_updates():
    """1,000 steps of 1e-5 on bfloat16 weights of 1, whose last bit is 4e-3: plain AdamW loses them all; with stochastic
    rounding their sum of 1e-2 arrives, up to what the bfloat16 second moment is off (it stalls below its limit of 1)."""
    moved = {}
    for name in ("adamw", "adamw_sr"):
        policy = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        torch.nn.init.ones_(policy.weight)
        args = SimpleNamespace(lr=1e-5, weight_decay=0.0, optimizer=name, dtype="bfloat16")
        optimizer = gpu.make_optimizer(policy, args)
        torch.manual_seed(0)
        for _ in range(1000):
            policy.weight.grad = torch.ones_like(policy.weight)
            optimizer.step()
        moved[name] = 1 - policy.weight.float().mean().item()
    assert moved["adamw"] == 0.0 and 0.8e-2 < moved["adamw_sr"] < 1.4e-2


def test_bfloat16_with_plain_adamw_is_refused(capsys):
    from algos import grpo

    with pytest.raises(UserError, match="adamw_sr"):
        models.resolve(grpo.Args(dtype="bfloat16"))


def test_gradient_clipping_returns_the_norm_before():
    policy = torch.nn.Linear(3, 1, bias=False)
    policy.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    assert gpu.clip_gradients(policy, 1.0) == 5.0
    torch.testing.assert_close(policy.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), rtol=1e-5, atol=0)
    policy.weight.grad[0, 0] = float("nan")
    assert gpu.clip_gradients(policy, 1.0) != gpu.clip_gradients(policy, 1.0)  # NaN is passed on, for Run.finite to see
