"""Devices and processes: torchrun with FSDP2, seeds, optimizers, gradient norms, and the memory plan."""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist

from common import UserError

GIB = 2**30


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def device():
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def init(args):
    """Joins the process group that torchrun made, if any (nccl on GPUs, gloo on CPUs), and seeds torch. Returns the device.
    The CPU's cores are shared out among the local processes. Every wait has a deadline of ten minutes."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    if not torch.cuda.is_available():  # the tiny model's matrices are too small to share out: threads would only wait
        torch.set_num_threads(1 if args.model == "tiny" else max(1, cores() // local))
    torch.manual_seed(args.seed)
    share = "pairs_per_step" if hasattr(args, "pairs_per_step") else "prompts_per_step"
    if getattr(args, share) % world():
        flag = share.replace("_", "-")
        raise UserError(f"--{flag} {getattr(args, share)} cannot be shared evenly by {world()} processes")
    return device()


def finish():
    """Leaves the process group that init() joined, unless vLLM has ended it already; one of vLLM's own is vLLM's to end."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------- numbers over ranks


def _reduce(value, op):
    if world() == 1:
        return value
    tensor = torch.as_tensor(value, dtype=torch.float64).to(device())
    dist.all_reduce(tensor, op)
    return tensor.item() if tensor.dim() == 0 else tensor


def total(value):
    """Sum over ranks of a number or a tensor (as float64)."""
    return _reduce(value, dist.ReduceOp.SUM)


def maximum(value):
    """Maximum over ranks of a number, of the same type."""
    return type(value)(_reduce(value, dist.ReduceOp.MAX))


def gather(tensor):
    """[b, ...] on every rank (the same b) -> [world * b, ...] in rank order. A second dimension that differs is padded
    on the right with zeros (False)."""
    if world() == 1:
        return tensor
    if tensor.dim() > 1:
        width = maximum(tensor.shape[1])
        tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(value):
    """Any picklable value on every rank -> the list of them in rank order."""
    out = [value] * world()
    if world() > 1:
        dist.all_gather_object(out, value)
    return out


def local(tensor):
    """The rows of a global tensor (or list) [world * b, ...] that are this rank's: [b, ...]."""
    b = len(tensor) // world()
    return tensor[rank() * b : (rank() + 1) * b]


# ---------------------------------------------------------------- the sharded model


def shard(policy):
    """FSDP2 over all ranks, a layer at a time; gradients are summed, not averaged: the loss's weights are already global.
    One process: the policy as it is."""
    if world() == 1:
        return policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device().type, (world(),))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(next(policy.parameters()).dtype, torch.float32))
    for layer in policy.lm.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    return policy


def _full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_weights(policy):
    """(name, whole tensor) of every weight of policy.lm under its Hugging Face name, LoRA merged, `lm_head.weight` also
    where it is tied to the embeddings. A collective: every rank must run through it."""
    lm, scale = policy.lm, {}
    for name, module in lm.named_modules():
        if hasattr(module, "lora_A"):
            scale[name] = module.scaling["default"]
    tensors = dict(lm.named_parameters())
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        weight = _full(tensor.detach())
        if ".base_layer." in name:
            module = name.split(".base_layer.")[0]
            name = name.replace(".base_layer.", ".")
            if name.endswith("weight"):
                a, b = (_full(tensors[f"{module}.lora_{x}.default.weight"].detach()) for x in "AB")
                weight = weight + (scale[module] * (b.float() @ a.float())).to(weight.dtype)
        yield name, weight
    if lm.config.tie_word_embeddings:
        yield "lm_head.weight", _full(lm.get_input_embeddings().weight.detach())


def make_optimizer(policy, args):
    """AdamW over the trainable weights. adamw: states in the weights' own precision (float32 states for float32 weights);
    adamw_sr: bfloat16 weights updated with stochastic rounding; adamw_8bit: the same with 8-bit states. The last two are
    torchao's."""
    weights = [p for p in policy.parameters() if p.requires_grad]
    settings = dict(lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.999))
    if args.optimizer == "adamw":
        return torch.optim.AdamW(weights, **settings, fused=True)  # on a CPU as well: without copies of the weights
    if args.optimizer == "adamw_8bit" and world() > 1:
        raise UserError("--optimizer adamw_8bit runs in one process only (torchao 0.18 cannot shard its states): use adamw_sr")
    from torchao import optim

    rounding = dict(bf16_stochastic_round=args.dtype == "bfloat16")
    return (optim.AdamW8bit if args.optimizer == "adamw_8bit" else optim._AdamW)(weights, **settings, **rounding)


def clip_gradients(policy, max_norm):
    """Scales the gradients to a global norm of at most max_norm; returns the norm before, over all ranks."""
    weights = [p for p in policy.parameters() if p.requires_grad and p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
    norm = _full(norm)
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm.item()


@contextlib.contextmanager
def no_checkpointing(lm):
    """Generation keeps a key-value cache, which gradient checkpointing forbids."""
    was = getattr(lm, "is_gradient_checkpointing", False)
    if was:
        lm.gradient_checkpointing_disable()
    try:
        yield
    finally:
        if was:
            lm.gradient_checkpointing_enable(dict(use_reentrant=False))


# ---------------------------------------------------------------- memory plan


def memory_plan(config, args, n_parameters, context, capacity=None, ranks=None):
    """Bytes that one process needs, by part, as {part: bytes}, 'capacity' and 'needed' included. Weights, gradients and
    optimizer states are shared out over the ranks. Activations are those of one micro-batch: per layer and token about
    34 hidden widths of 16-bit numbers without checkpointing (Korthikanti et al. 2022, eq. 2, without the attention
    matrix), the layer's input plus one open layer with it."""
    ranks, tokens = ranks or world(), args.micro_batch_tokens
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[args.dtype]
    H, L, V = config.hidden_size, config.num_hidden_layers, config.vocab_size
    head = getattr(config, "head_dim", None) or H // config.num_attention_heads
    trained = 2 * args.lora_rank * 7 * 2 * H * L if args.lora_rank else n_parameters
    state = {"adamw": 2 * size, "adamw_sr": 2 * size, "adamw_8bit": 2 + 2 * 4 / 256}[args.optimizer]
    per_layer = 17 * H * size * tokens
    plan = {
        "weights": n_parameters * size / ranks,
        "gradients": trained * size / ranks,
        "optimizer": trained * state / ranks,
        "activations": (H * size * tokens * L + per_layer) if args.gradient_checkpointing else per_layer * L,
        "logits chunk": (2 * 4 + size) * 2**27 + 4 * H * V,  # models.HeadLogp, with the head's gradient in float32
    }
    pairs = hasattr(args, "pairs_per_step")
    frozen = getattr(args, "ref", "live") == "live" if pairs else args.beta > 0  # a reference in memory
    if frozen:
        plan["reference"] = n_parameters * size / ranks
    if hasattr(args, "value_lr"):  # a critic of the policy's size, with states of its own
        plan["critic"] = plan["weights"] + plan["gradients"] + plan["optimizer"]
    if any(hasattr(args, f"{name}_steps") for name in ("guide", "ce", "dpo")):  # a model that is trained before the policy
        plan["trained first"] = plan["weights"] + plan["gradients"] + plan["optimizer"]
    length, rows = context, (4 * args.eval_prompts if pairs else args.prompts_per_step * args.group_size) / ranks
    cache = 2 * L * config.num_key_value_heads * head * size
    if args.engine == "hf" or not torch.cuda.is_available():
        plan["KV cache"] = cache * length * min(rows, 1024)
        if ranks > 1:
            plan["sampler's copy"] = n_parameters * size
    if capacity is None:
        if torch.cuda.is_available():
            capacity = torch.cuda.get_device_properties(device()).total_memory
        else:
            capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    plan["needed"] = sum(plan.values())
    if args.engine != "hf" and torch.cuda.is_available():  # vLLM sleeps during updates, so the two phases do not add up
        sampling = n_parameters * size / ranks * (2 if frozen else 1) + trained * state / ranks
        plan["vLLM (while sampling)"] = args.vllm_memory * capacity
        plan["needed"] = max(plan["needed"], sampling + args.vllm_memory * capacity)
    plan["capacity"] = capacity
    return plan


def explain_plan(config, args, n_parameters, context, capacity=None, ranks=None):
    """The plan as text: a line of parts, a verdict, and, where it does not fit, the options that make it fit."""
    import copy

    plan = memory_plan(config, args, n_parameters, context, capacity, ranks)
    parts = [f"{k} {v / GIB:.2f}" for k, v in plan.items() if k not in ("needed", "capacity")]
    lines = [
        f"memory plan per process, GiB ({n_parameters / 1e6:,.1f} M parameters): " + ", ".join(parts),
        f"  needs {plan['needed'] / GIB:.2f} of {plan['capacity'] / GIB:.1f}",
    ]
    usable = 0.92 * plan["capacity"]
    if plan["needed"] <= usable:
        lines[1] += ": fits"
        return "\n".join(lines)
    lines[1] += ": does not fit"
    options = [
        ("--gradient-checkpointing True", dict(gradient_checkpointing=True)),
        ("--optimizer adamw_8bit", dict(optimizer="adamw_8bit")),
        ("--micro-batch-tokens 4096", dict(micro_batch_tokens=min(4096, args.micro_batch_tokens))),
        ("--vllm-memory 0.3", dict(vllm_memory=min(0.3, args.vllm_memory))),
        ("--lora-rank 32", dict(lora_rank=args.lora_rank or 32)),
    ]
    other, flags = copy.copy(args), []
    for flag, change in options:
        if all(getattr(other, k) == v for k, v in change.items()):
            continue
        for k, v in change.items():
            setattr(other, k, v)
        flags.append(flag)
        needed = memory_plan(config, other, n_parameters, context, plan["capacity"], ranks)["needed"]
        lines.append(f"  with {' '.join(flags)}: {needed / GIB:.2f}" + (": fits" if needed <= usable else ""))
        if needed <= usable:
            return "\n".join(lines)
    n = ranks or world()
    while n < 1024 and memory_plan(config, other, n_parameters, context, plan["capacity"], n)["needed"] > usable:
        n *= 2
    lines.append(f"  with all of these and torchrun over {n} devices: fits" if n < 1024 else "  no option makes it fit")
    return "\n".join(lines)
