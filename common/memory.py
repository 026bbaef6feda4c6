"""The memory plan: what one process needs, by arithmetic, before anything is loaded."""

import os

import torch

from common import gpu

GIB = 2**30
SMALLER = "--gradient-checkpointing True, --micro-batch-tokens 4096, --optimizer adamw_8bit, --lora-rank 32, more devices"
HEAD_ROWS = 2**27  # logits that policy.HeadLogp holds at a time on a GPU


def memory_plan(config, args, n_parameters, context, trained=1, frozen=0, capacity=None, ranks=None):
    """{part: bytes} of what one process needs, and 'needed' and 'capacity'. `trained`, `frozen`: models of the policy's size
    that the script holds with and without gradients, shared out over the ranks. Activations of a micro-batch: what a layer
    keeps of a token, in its weights' numbers, is 15 hidden widths (two norms, in float32, 8; attention 7) and 4 inner widths;
    with checkpointing only the input of every layer, and one open layer."""
    ranks, config = ranks or gpu.world(), config.get_text_config()
    size = getattr(torch, args.dtype).itemsize
    H, L, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    head = getattr(config, "head_dim", None) or H // config.num_attention_heads
    plan, cuda = dict(weights=(trained + frozen) * n_parameters * size / ranks), gpu.device().type == "cuda"
    if trained:
        learnt = 2 * args.lora_rank * 7 * 2 * H * L if args.lora_rank else n_parameters
        state = 2 + 2 * 4 / 256 if args.optimizer == "adamw_8bit" else 2 * size  # 8 bits have a scale for 256
        plan["gradients"] = trained * learnt * size / ranks
        plan["optimizer"] = trained * learnt * state / ranks
        layer = (15 * H + 4 * config.intermediate_size) * size * args.micro_batch_tokens
        inputs = L * H * size * args.micro_batch_tokens
        plan["activations"] = inputs + layer if args.gradient_checkpointing else L * layer
        plan["logits chunk"] = (2 * 4 + size) * HEAD_ROWS + 4 * H * V  # with the head's gradient in float32
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    capacity = capacity or (torch.cuda.get_device_properties(gpu.device()).total_memory if cuda else ram)
    flags = vars(args)
    if flags.get("engine", "hf") != "hf" and cuda:  # vLLM sleeps during updates, so the two phases do not add up
        vllm = args.vllm_memory * capacity
        needed = max(sum(plan.values()), plan["weights"] + plan.get("optimizer", 0) + vllm)
        return plan | {"vLLM (while sampling)": vllm, "needed": needed, "capacity": capacity}
    rows = flags.get("prompts_per_step", 0) * flags.get("group_size", 0) or 4 * flags.get("eval_prompts", 0)
    plan["KV cache"] = 2 * L * config.num_key_value_heads * head * size * context * min(rows / ranks, 1024)
    plan["sampler's copy"] = n_parameters * size if ranks > 1 else 0
    return plan | dict(needed=sum(plan.values()), capacity=capacity)


def explain_plan(config, args, n_parameters, context, **models):
    """The plan as text: its parts, a verdict, and, where it does not fit, what makes it smaller."""
    plan = memory_plan(config, args, n_parameters, context, **models)
    needed, capacity = plan.pop("needed"), plan.pop("capacity")
    text = f"memory plan per process, GiB ({n_parameters / 1e6:,.1f} M parameters): "
    text += ", ".join(f"{k} {v / GIB:.2f}" for k, v in plan.items() if v)
    verdict = "fits" if needed <= 0.92 * capacity else f"does not fit; what makes it smaller: {SMALLER}"
    return text + f"\n  needs {needed / GIB:.2f} of {capacity / GIB:.1f}: {verdict}"
