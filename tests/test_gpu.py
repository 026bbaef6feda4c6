"""Two processes against one, the memory plan against arithmetic and a real model, optimizers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config

from algos import grpo
from common import UserError, gpu, memory, models, settings, tasks
from common.worlds import tiny
from tests.helpers import ROOT, checkpoints, contents, run

GIB = memory.GIB
SMALL = (
    "--task addition --steps 3 --prompts-per-step 8 --group-size 4 --eval-prompts 16 --checkpoint-every 1 "
    "--micro-batch-tokens 256 --dtype float64"
).split()


def launch(ranks, *arguments, script="algos/grpo.py", env=None):
    one = [sys.executable]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*(one if ranks == 1 else many), str(script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
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
        start = load_file(tiny.warm_start(tasks.load("addition")) + "/model.safetensors")
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
from common import tasks
from common.worlds import tiny
tiny.RECIPE |= dict(steps=4, careful_steps=2)
dist.init_process_group("gloo")
if dist.get_rank() == 1:  # whoever gets the lock first makes the model, and that may be any rank
    print(tiny.warm_start(tasks.load("addition"), cache=sys.argv[1]))
dist.destroy_process_group()
"""


def test_any_rank_can_make_the_warm_start(tmp_path):
    (tmp_path / "warm.py").write_text(WARM)
    out = launch(2, tmp_path / "cache", script=tmp_path / "warm.py", env=dict(PYTHONPATH="."))
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert out.split()[-1] == str(folder)
    saved = load_file(folder / "model.safetensors")
    assert sum(v.numel() for v in saved.values()) == count_parameters(tiny.config())


def test_prompts_that_cannot_be_shared_evenly(monkeypatch):
    monkeypatch.setattr(gpu, "world", lambda: 3)
    with pytest.raises(UserError, match="cannot be shared evenly by 3"):
        gpu.init(SimpleNamespace(model="tiny", seed=0, prompts_per_step=8))


# ---------------------------------------------------------------- memory plan

QWEN_7B = Qwen2Config(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                      num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768)  # fmt: skip


def needs(**changes):
    values = dict(dtype="bfloat16", optimizer="adamw_8bit", lora_rank=0, beta=0.0, micro_batch_tokens=16384, engine="hf",
                  gradient_checkpointing=True, prompts_per_step=8, group_size=8, vllm_memory=0.45)  # fmt: skip
    return SimpleNamespace(**values | changes)


def count_parameters(config):
    """What the plan is told: counted on a model without storage."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return models.architecture(SimpleNamespace(model=folder))[1]


def test_counting_parameters():
    assert count_parameters(QWEN_7B) == 7_615_616_512
    V, H, I = 78, 96, 256  # embeddings; per layer q, k, v with biases, o, the MLP, two norms; the last norm
    n = V * H + 2 * (4 * H * H + 3 * H + 3 * H * I + 2 * H) + H
    assert count_parameters(tiny.config()) == models.architecture(SimpleNamespace(model="tiny"))[1] == n


def test_plan_is_the_arithmetic():
    n = count_parameters(QWEN_7B)
    plan = memory.memory_plan(QWEN_7B, needs(), n, context=1000, capacity=80 * GIB, ranks=1)
    assert plan["weights"] == plan["gradients"] == 2 * n
    assert plan["optimizer"] == pytest.approx(2 * n, rel=0.02)
    assert plan["KV cache"] == 2 * 28 * 4 * 128 * 2 * 1000 * 64
    float32 = memory.memory_plan(QWEN_7B, needs(dtype="float32", optimizer="adamw"), n, 1000, capacity=80 * GIB, ranks=1)
    assert float32["weights"] + float32["gradients"] + float32["optimizer"] == 16 * n
    eight = memory.memory_plan(QWEN_7B, needs(optimizer="adamw_sr"), n, 1000, capacity=80 * GIB, ranks=8)
    assert eight["weights"] == 2 * n / 8 and eight["optimizer"] == 4 * n / 8


def test_plan_says_what_makes_it_fit():
    """And what it says is true: every flag lowers the need, and so do more devices."""
    n = count_parameters(QWEN_7B)

    def explain(capacity, ranks=1, **changes):
        text = memory.explain_plan(QWEN_7B, needs(**changes), n, 1500, capacity=capacity * GIB, ranks=ranks)
        _, verdict = text.splitlines()
        needed, verdict = re.fullmatch(rf"  needs (\S+) of {capacity}\.0: (.*)", verdict).groups()
        return float(needed), verdict

    assert explain(80)[1] == "fits"
    wasteful = dict(optimizer="adamw_sr", gradient_checkpointing=False)
    most, verdict = explain(64, **wasteful)
    assert verdict.startswith("does not fit") and "devices" in verdict
    advice = {
        "--gradient-checkpointing True": dict(gradient_checkpointing=True),
        "--micro-batch-tokens 4096": dict(micro_batch_tokens=4096),
        "--optimizer adamw_8bit": dict(optimizer="adamw_8bit"),
        "--lora-rank 32": dict(lora_rank=32),
    }
    assert re.findall(r"--[a-z-]+ \w+", verdict) == list(advice)
    assert all(explain(64, **wasteful | change)[0] < most for change in advice.values())
    assert explain(64, optimizer="adamw_8bit", gradient_checkpointing=True)[1] == "fits"
    assert explain(24)[1].startswith("does not fit")
    assert explain(48)[1].startswith("does not fit") and explain(48, ranks=8)[1] == "fits"


def test_plan_against_what_a_model_really_takes():
    """Weights, gradients and AdamW states of a real model, counted tensor by tensor."""
    config = tiny.config()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    states = size(s for state in optimizer.state.values() for k, s in state.items() if k != "step")
    args = needs(dtype="float32", optimizer="adamw", gradient_checkpointing=False)
    plan = memory.memory_plan(config, args, count_parameters(config), 100, capacity=GIB, ranks=1)
    assert plan["weights"] == size(model.parameters()) and plan["optimizer"] == states
    assert plan["gradients"] == size(p.grad for p in model.parameters())


def test_plan_counts_every_model():
    """What is held with gradients, and what is held without: a critic, a frozen reference, a model that only scores."""
    n = count_parameters(QWEN_7B)

    def plan(ranks=1, **models):
        return memory.memory_plan(QWEN_7B, needs(), n, 1000, capacity=80 * GIB, ranks=ranks, **models)

    one = plan()
    assert one == plan(trained=1, frozen=0)
    reference = plan(frozen=1)
    assert reference["weights"] == 2 * one["weights"] == 4 * n and reference["needed"] == one["needed"] + 2 * n
    assert all(reference[k] == one[k] for k in one.keys() - {"weights", "needed"})
    critic = plan(trained=2, frozen=1)
    assert critic["weights"] == 6 * n and critic["gradients"] == 2 * one["gradients"]
    assert critic["optimizer"] == 2 * one["optimizer"] and critic["activations"] == one["activations"]  # one after the other
    score = plan(trained=0, frozen=1)
    assert score["weights"] == 2 * n and not {"gradients", "optimizer", "activations"} & score.keys()
    assert score["needed"] == 2 * n + score["KV cache"] + score["sampler's copy"]
    assert plan(ranks=4, frozen=3)["weights"] == one["weights"]  # frozen ones are shared out like the policy
    assert f"weights {critic['weights'] / GIB:.2f}," in memory.explain_plan(
        QWEN_7B, needs(), n, 1000, capacity=80 * GIB, ranks=1, trained=2, frozen=1
    )


def tell_plan():
    """In a child: instead of the plan, what it is told."""
    memory.explain_plan = lambda *args, **models: f"plan of {sorted(models.items())}"


@pytest.mark.parametrize(
    "script, argv, trained, frozen",
    [
        ("grpo", [], 1, 0),
        ("grpo", ["--beta", "0.1"], 1, 1),
        ("ppo", [], 2, 0),
        ("dpo", ["--data", "letters"], 1, 0),
        ("dpo", ["--data", "letters", "--ref", "live"], 1, 1),
    ],
)
def test_scripts_say_what_they_hold(tmp_path, script, argv, trained, frozen):
    world = "letters" if script == "dpo" else "addition"
    argv = [*argv, "--model", tiny.warm_start(tasks.load(world)), *"--steps 0 --eval-prompts 4 --max-new-tokens 12".split()]
    argv += ["--task", "addition"] * (script != "dpo") + "--dtype float32 --optimizer adamw --run-dir".split()
    done = run(tmp_path, *argv, tmp_path / "run", script=ROOT / "algos" / f"{script}.py", before=tell_plan)
    assert done.code == 0, done.err
    assert f"plan of [('frozen', {frozen}), ('trained', {trained})]" in done.out.splitlines()


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
    with pytest.raises(UserError, match="adamw_sr"):
        settings.resolve(grpo.Args(dtype="bfloat16"))


def test_gradient_clipping_returns_the_norm_before():
    policy = torch.nn.Linear(3, 1, bias=False)
    policy.weight.grad = torch.tensor([[3.0, 0.0, 4.0]])
    assert gpu.clip_gradients(policy, 1.0) == 5.0
    torch.testing.assert_close(policy.weight.grad, torch.tensor([[0.6, 0.0, 0.8]]), rtol=1e-5, atol=0)
    policy.weight.grad[0, 0] = float("nan")
    assert gpu.clip_gradients(policy, 1.0) != gpu.clip_gradients(policy, 1.0)  # NaN is passed on, for Run.finite to see


def test_a_gradient_that_is_missing_is_noticed():
    """Under FSDP2 a forward pass after backward() hides gradients: the norm would be too small, and the update wrong."""
    policy = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    policy[0](torch.ones(1, 3)).sum().backward()
    expected = torch.stack([p.grad.norm() for p in policy[0].parameters()]).norm().item()
    with pytest.raises(RuntimeError, match="2 of 4 trained weights have no gradient"):
        gpu.clip_gradients(policy, 1.0)
    assert policy[0].bias.grad.eq(1).all()  # nothing was scaled
    assert gpu.clip_gradients(policy, 1.0, partial=True) == pytest.approx(expected)
    assert policy[0].weight.grad.norm() < 1
    policy[1].requires_grad_(False)  # what is not trained needs none
    assert gpu.clip_gradients(policy, 1e9) == pytest.approx(1, rel=1e-5)


def test_a_part_that_is_not_reached_is_noticed_in_a_policy(tiny_policy):
    """The same where the loss leaves out the last layer and the final norm."""
    ids = torch.arange(3, 11).view(1, 8)
    *_, inner = tiny_policy(ids, torch.ones_like(ids).bool(), torch.ones(1, 4).bool(), layers=[1])
    inner.sum().backward()
    with pytest.raises(RuntimeError, match="trained weights have no gradient"):
        gpu.clip_gradients(tiny_policy, 1.0)
    assert gpu.clip_gradients(tiny_policy, 1.0, partial=True) > 0


@pytest.fixture
def tiny_policy():
    from transformers import Qwen2ForCausalLM

    from common.policy import Policy

    return Policy(Qwen2ForCausalLM(tiny.config()))


# ---------------------------------------------------------------- a module that is no language model

PLAIN = """
import sys
from tests.test_runs import fitting
folder, steps, resume = sys.argv[1:]
fitting(folder, resume=resume == "resume", steps=int(steps), dropout=0.0)
"""


def test_two_ranks_train_any_module(tmp_path):
    """Sharded in one piece; the same numbers as one process, and its checkpoint goes on in one."""
    script, env = tmp_path / "fit.py", dict(PYTHONPATH=".")
    script.write_text(PLAIN)
    for name, ranks in (("one", 1), ("two", 2)):
        launch(ranks, tmp_path / name, 4, "start", script=script, env=env)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-12)
    cut = shutil.copytree(tmp_path / "two", tmp_path / "cut", ignore=shutil.ignore_patterns(".lock"))
    for name in ("one", "two"):
        launch(1, tmp_path / name, 8, "resume", script=script, env=env)
    one, two = (contents(checkpoints(tmp_path / name)[-1]) for name in ("one", "two"))
    assert one["own"].keys() == two["own"].keys() and one["own"]
    for name, value in one["own"].items():
        torch.testing.assert_close(two["own"][name], value, rtol=0, atol=1e-9)
    # Each of two processes wrote a part: without one of them both go back to the checkpoint before, and write it anew.
    before, last = checkpoints(cut)
    assert sorted(p.name for p in (last / "state").iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    whole, rows = contents(last), metrics(cut)
    (last / "state" / "__1_0.distcp").unlink()
    out = launch(2, cut, 4, "resume", script=script, env=env)
    assert out.count(f"checkpoint {last} is damaged (state/__1_0.distcp is not what was written)") == 1
    assert f"resumed from {before}" in out and metrics(cut) == rows
    assert all(torch.equal(x, contents(last)["own"][name]) for name, x in whole["own"].items())
