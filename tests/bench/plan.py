"""What large models need, by arithmetic with named numbers: memory of a GPU by the plan of common/memory.py, and the seconds of
a step by what bounds each stage.

python -m tests.bench.plan
"""

import argparse
import math
from types import SimpleNamespace

from common.memory import GIB, memory_plan

# An H100 SXM and its node: NVIDIA's data sheet. The shares are assumptions: half of the peak in the update (the goal of this
# repository; large FSDP runs report 40 to 50%), 60% of the memory's bandwidth in decoding, 80% of a link's.
FLOPS, HBM, MEMORY = 989e12, 3.35e12, 80e9
NVLINK, NETWORK = 450e9, 50e9  # bytes/s of a GPU, one way: inside a node, and 400 Gbit/s to other nodes
MFU, DECODE, LINK = 0.5, 0.6, 0.8
# Work of a step: the preset's prompts and completions; a mean length, and the longest, which the rollout waits for.
PROMPTS, GROUP, MINIBATCHES, PROMPT, MEAN, LONGEST = 128, 8, 4, 200, 600, 1024
# name: parameters, widths, layers, heads, key-value heads, vocabulary (Qwen2.5's config.json), GPUs, vLLM's GPUs per engine
MODELS = {
    "7B": (7.6e9, 3584, 18944, 28, 28, 4, 152064, 8, 1),
    "32B": (32.8e9, 5120, 27648, 64, 40, 8, 152064, 16, 4),
    "72B": (72.7e9, 8192, 29568, 80, 64, 8, 152064, 32, 8),
}


def step(N, H, inner, L, heads, kv_heads, V, gpus, tp):
    """-> (plan of memory_plan, seconds by stage)."""
    config = SimpleNamespace(hidden_size=H, num_hidden_layers=L, num_attention_heads=heads, num_key_value_heads=kv_heads,
                             vocab_size=V, head_dim=128, intermediate_size=inner)  # fmt: skip
    config.get_text_config = lambda: config
    args = SimpleNamespace(
        micro_batch_tokens=8192, dtype="bfloat16", lora_rank=0, optimizer="adamw_sr", gradient_checkpointing=True,
        engine="vllm", vllm_memory=0.45, prompts_per_step=PROMPTS, group_size=GROUP,
    )  # fmt: skip
    plan = memory_plan(config, args, N, PROMPT + LONGEST, capacity=MEMORY, ranks=gpus)
    rows = PROMPTS * GROUP * tp / gpus  # completions that one engine writes
    cache = 2 * L * kv_heads * 128 * 2 * (PROMPT + MEAN / 2)  # bytes of one completion's keys and values, on average
    room = args.vllm_memory * MEMORY * tp - 2 * N  # for the cache, in an engine
    waves = max(1, math.ceil(rows * cache / room))
    together = rows / waves
    token = (2 * N + together * cache) / (tp * HBM * DECODE)  # a decoding step reads the weights and the cache once
    # The trainer reads a prompt once for those of its completions that are in the same minibatch (policy.Packing).
    read = MINIBATCHES * (1 - (1 - 1 / MINIBATCHES) ** GROUP)
    tokens = PROMPTS * (GROUP * MEAN + read * PROMPT)
    seconds = dict(
        rollout=waves * LONGEST * token,
        scoring=2 * N * PROMPTS * (GROUP * MEAN + PROMPT) / (gpus * FLOPS * MFU),
        update=8 * N * tokens / (gpus * FLOPS * MFU),  # 6 N, and 2 N more as activations are computed again
    )
    # Every pass gathers the sharded weights, and the gradients are summed; hidden behind the update where it is shorter.
    link = (NVLINK if gpus <= 8 else NETWORK) * LINK
    passes = math.ceil(tokens / gpus / args.micro_batch_tokens)
    seconds["FSDP traffic (hidden)"] = passes * 4 * 2 * N / link
    seconds["weight sync"] = 2 * N / link
    return plan, seconds, room


def main():
    print(f"{PROMPTS} prompts x {GROUP} completions, {PROMPT} + {MEAN} tokens on average, the longest {LONGEST}")
    print("| model | GPUs | vLLM | trainer, GiB per GPU | sampling, GiB per GPU | rollout | scoring | update | sync | step |")
    print("|---" * 10 + "|")
    for name, (N, *shape, gpus, tp) in MODELS.items():
        plan, t, room = step(N, *shape, gpus, tp)
        parts = ("weights", "gradients", "optimizer", "activations", "logits chunk")
        trainer = sum(plan[k] for k in parts) / GIB
        states = (plan["weights"] + plan["optimizer"] + 0.45 * MEMORY) / GIB
        update = max(t["update"], t["FSDP traffic (hidden)"])
        total = t["rollout"] + t["scoring"] + update + t["weight sync"]
        stages = f"{t['rollout']:.0f} s | {t['scoring']:.1f} s | {update:.0f} s | {t['weight sync']:.1f} s | {total:.0f} s"
        engine = f"tp {tp}, cache {room / tp / GIB:.0f} GiB/GPU"
        print(f"| {name} | {gpus} | {engine} | {trainer:.0f} | {states:.0f} | {stages} |")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
