"""The seams under FSDP2, two processes beside one: hidden states, embeddings fed for tokens, and what hides gradients."""

import json
import os
import subprocess
import sys

import pytest

WORKER = """
import json, sys, torch
sys.path.insert(0, {root!r})
from types import SimpleNamespace
from transformers import Qwen2Config, Qwen2ForCausalLM
from common import gpu
from common.batch import collate, read
from common.policy import Policy

args = SimpleNamespace(model="tiny", seed=1, temperature=0.7, micro_batch_tokens=64)
gpu.init(args)
config = Qwen2Config(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
torch.manual_seed(1)
policy = gpu.shard(Policy(Qwen2ForCausalLM(config).double()))
g = torch.Generator().manual_seed(0)
rows = [(torch.randint(3, 60, (n,), generator=g).tolist(), torch.randint(3, 60, (m,), generator=g).tolist())
        for n, m in ((4, 7), (2, 9), (5, 3), (3, 8))]
mix = torch.rand(4, 9, 60, generator=g, dtype=torch.float64).softmax(-1)
rank, world = gpu.rank(), gpu.world()
mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
batch = collate(rows[mine])
mix = mix[mine, : batch.mask.shape[1]]
soft = batch.mask & (torch.arange(batch.mask.shape[1]) < 2)


def make(embedding):
    return mix[soft] @ embedding.weight


out = {{}}
logp, entropy, inner, last = read(policy, batch, args, layers=[1, 2])
out["states"] = gpu.total(inner.square().sum().item() + last.abs().sum().item())
out["logp"] = gpu.total(logp.sum().item())


def gradients(thoughts=None):
    policy.zero_grad()
    logp, _, inner = policy(batch.ids, batch.attention_mask, batch.mask, 0.7, layers=[1], thoughts=thoughts)
    (logp.sum() + inner.square().sum()).backward()


gradients((soft, make))
out["thoughts"] = gpu.clip_gradients(policy, 1e9)
gradients()
out["norm"] = gpu.clip_gradients(policy, 1e9)
gradients()
read(policy, batch, args)
out["norm after a scoring pass"] = gpu.clip_gradients(policy, 1e9)
gradients()
with torch.no_grad():
    policy(batch.ids, batch.attention_mask, batch.mask)
try:
    gpu.clip_gradients(policy, 1e9)
    out["hidden"] = False
except RuntimeError as error:
    out["hidden"] = "have no gradient" in str(error)
if rank == 0:
    print(json.dumps(out))
gpu.finish()
"""


def work(ranks, path):
    one = [sys.executable]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run([*(one if ranks == 1 else many), str(path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_ranks_see_what_one_sees(tmp_path):
    """And a forward pass between backward() and clip_gradients(), which hides embedding and final norm from the norm in
    silence, is noticed; the scoring pass leaves the shards in order."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(root=os.getcwd()))
    one, two = work(1, path), work(2, path)
    for name in ("states", "logp", "thoughts", "norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-6), name  # norms of layers work in float32
    assert two["norm after a scoring pass"] == pytest.approx(two["norm"], rel=1e-12)
    assert one["thoughts"] != pytest.approx(one["norm"], rel=1e-3)
    assert two["hidden"] and not one["hidden"]  # one process has nothing to gather
