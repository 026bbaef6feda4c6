"""What a checkpoint's folder holds, and who may read it: models in several files, adapters in peft's format, optimizers of
every kind, parts that are missing, and the memory that all this takes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from common import UserError, checkpoint, export, gpu, models
from tests.helpers import ROOT, checkpoints, run, tiny

__all__ = ["tiny"]


def made(tiny, folder, **changes):
    """A run of nothing but a model and its optimizer, after one update."""
    args = dict(model=tiny, dtype="float32", lora_rank=0, lora_alpha=None, lora_targets="all-linear", lr=1e-3, weight_decay=0.0,
                gradient_checkpointing=False, seed=1, optimizer="adamw", resume=None)  # fmt: skip
    args = SimpleNamespace(**args | changes)
    policy = models.load(args, torch.device("cpu"))
    policy.lm.model.layers[0].register_buffer("correction", torch.zeros(3))  # as the routers of mixtures have one
    optimizer = gpu.make_optimizer(policy, args)
    run = SimpleNamespace(dir=folder, main=True, tokenizer=models.load_tokenizer(args), args=args, queue=[], extra={},
                          state=dict(step=1, table={3: (0.5, "x")}), schedules=[])  # fmt: skip
    return run, policy, optimizer


def update(policy, optimizer):
    g = torch.Generator().manual_seed(0)
    for p in policy.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype) if p.requires_grad else None
    with torch.compiler.set_stance("force_eager"):  # torchao would compile for ten seconds
        optimizer.step()


def states(optimizer):
    """[{state: its bytes, as a list}]"""
    plain = [{k: x.dequantize() if hasattr(x, "dequantize") and type(x) is not torch.Tensor else x for k, x in of.items()}
             for of in optimizer.state_dict()["state"].values()]  # fmt: skip
    return [{k: x.tolist() for k, x in of.items()} for of in plain]


@pytest.mark.parametrize("changes", [dict(), dict(dtype="bfloat16", optimizer="adamw_sr"),
                                     dict(dtype="bfloat16", optimizer="adamw_8bit"), dict(lora_rank=4)], ids=str)  # fmt: skip
def test_what_is_restored_is_what_was_saved(tiny, tmp_path, changes):
    run, policy, optimizer = made(tiny, tmp_path / "run", **changes)
    update(policy, optimizer)
    policy.lm.model.layers[0].correction += 0.5
    checkpoint.save(run, policy, optimizer)
    again, other, fresh = made(tiny, tmp_path / "run", **changes)
    found = checkpoint.find(again)
    assert found[2] == run.state
    checkpoint.restore(again, found, other, fresh)
    if "lora_rank" not in changes:  # beside adapters the model is the start's
        assert other.lm.model.layers[0].correction.eq(0.5).all()
    assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), other.parameters(), strict=True))
    assert states(optimizer) == states(fresh) != []
    update(policy, optimizer), update(other, fresh)
    if changes.get("dtype") != "bfloat16":  # stochastic rounding draws
        assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), other.parameters(), strict=True))


def test_a_weight_without_states(tiny, tmp_path):
    """Which had no gradient yet has none after resuming, and the others' counters are what they were."""
    run, policy, optimizer = made(tiny, tmp_path / "run")
    update(policy, optimizer)
    last = list(policy.parameters())[-1]
    del optimizer.state[last]
    checkpoint.save(run, policy, optimizer)
    again, other, fresh = made(tiny, tmp_path / "run")
    checkpoint.restore(again, checkpoint.find(again), other, fresh)
    assert list(other.parameters())[-1] not in fresh.state and len(fresh.state) == len(list(policy.parameters())) - 1
    assert {x["step"].item() for x in fresh.state.values()} == {1}


def test_a_model_in_several_files(tiny, tmp_path, monkeypatch):
    """No file above the limit but of one weight alone; transformers loads it, and so does a run that goes on."""
    monkeypatch.setattr(export, "FILE", 200_000)
    run, policy, optimizer = made(tiny, tmp_path / "run")
    update(policy, optimizer)
    checkpoint.save(run, policy, optimizer)
    (folder,) = checkpoints(tmp_path / "run")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    n = len(files)
    assert n > 3 and files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert all(p.stat().st_size < 210_000 for p in folder.glob("*.safetensors"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = {name for name, _ in policy.lm.named_parameters()}
    assert set(index.values()) == set(files) and set(index) == names | {"model.layers.0.correction"}
    lm = AutoModelForCausalLM.from_pretrained(folder)
    again, other, fresh = made(tiny, tmp_path / "run")
    checkpoint.restore(again, checkpoint.find(again), other, fresh)
    for loaded in (lm, other.lm):
        own = dict(loaded.named_parameters())
        assert all(torch.equal(p, own[name]) for name, p in policy.lm.named_parameters())
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        checkpoint.find(again)


def test_a_disk_that_is_not_shared(tiny, tmp_path):
    """A process that does not see the folder that another made says so, and writes nothing of its own elsewhere."""
    run, policy, optimizer = made(tiny, tmp_path / "run")
    run.main = False
    with pytest.raises(UserError, match=f"{tmp_path}/run/checkpoints: not all processes see it; give a --run-dir on a disk"):
        checkpoint.save(run, policy, optimizer)
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_peft_s_own(tiny, tmp_path):
    """A LoRA run's adapter/ on the model that it started from is the merged model of its checkpoint."""
    flags = "--steps 1 --lora-rank 4 --lr 0.05 --prompts-per-step 4 --group-size 4 --eval-prompts 4 --task addition"
    done = run(tmp_path, *flags.split(), "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    (folder,) = checkpoints(tmp_path / "run")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 8 and settings["task_type"] == "CAUSAL_LM"
    ids = torch.arange(3, 23)[None]
    base, merged = (AutoModelForCausalLM.from_pretrained(place) for place in (settings["base_model_name_or_path"], folder))
    with torch.no_grad():
        plain, whole = base(ids).logits, merged(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
    torch.testing.assert_close(adapted, whole, rtol=0, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.01


def test_memory_of_saving_and_resuming(tmp_path):
    """Two processes, 10 million parameters: as measured by the benchmark, within its goal."""
    command = [sys.executable, "-m", "tests.bench.checkpoint", "--size", "10M", "--repeats", "1", "--out", tmp_path / "x.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(tmp_path / "x.json").read_text())
    for row in record["rows"]:
        assert row["part"] == pytest.approx(3 * 4 * 10.66e6 / 2, rel=0.1)
        assert max(row["save"], row["resume"]) < 0.3 * row["part"] + record["file"]
