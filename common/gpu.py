"""Devices and processes: torchrun with FSDP2, sums over ranks, seeds, optimizers, gradient norms."""

import datetime
import math
import os

import torch
import torch.distributed as dist

from common import UserError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


_kind = None  # of device(); None: cuda where there is one, else cpu


def choose(kind):
    """Makes every device() of this process of this kind: auto, cpu, cuda or mps. UserError where torch finds none."""
    global _kind
    there = dict(auto=True, cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not there[kind]:
        raise UserError(f"--device {kind}: torch finds none here; there is: {', '.join(k for k in there if there[k])}")
    _kind = None if kind == "auto" else kind


def device():
    if (_kind or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(_kind or "cpu")


def init(args, small=False):
    """Joins torchrun's process group, seeds torch, shares the CPU's cores out to processes (one for a `small` model). Gives
    the device. Raises UserError where a number called *_per_step, over all processes, cannot be shared evenly by them."""
    cuda = device().type == "cuda"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=10))
    if not cuda:  # the tiny models' matrices are too small to share out: threads would only wait
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        tiny = small or getattr(args, "model", "tiny").startswith("tiny")
        torch.set_num_threads(1 if tiny else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        if tiny:  # MKL rounds products alike on all CPUs then: a warm start, and what it leads to, are the same on most
            os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    torch.manual_seed(args.seed)
    for name, value in vars(args).items():
        if name.endswith("_per_step") and value % world():
            raise UserError(f"--{name.replace('_', '-')} {value} cannot be shared evenly by {world()} processes")
    return device()


def finish():
    """Leaves the process group that init() joined, unless vLLM has ended it already; one of vLLM's own is vLLM's to end."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def total(value, op=dist.ReduceOp.SUM):
    """Sum over ranks of a number or a tensor (as float64)."""
    if world() == 1:
        return value
    tensor = torch.as_tensor(value, dtype=torch.float64).to(device())
    dist.all_reduce(tensor, op)
    return tensor.item() if tensor.dim() == 0 else tensor


def maximum(value):
    """Maximum over ranks of a number, of the same type."""
    return type(value)(total(value, dist.ReduceOp.MAX))


def double(tensor):
    """float64, on the CPU where the device has none (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def gather(tensor):
    """[b, ...] on every rank, the same b -> [world * b, ...] in rank order; a second dimension that differs gets zeros."""
    if world() == 1:
        return tensor
    if tensor.dim() > 1:
        right = maximum(tensor.shape[1]) - tensor.shape[1]
        tensor = torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, right))
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


def hash_seed(*numbers):
    """One 63-bit seed from several integers, so that a resumed run and one on more ranks sample the same completions."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        state = ((state ^ (n & (1 << 64) - 1)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        state ^= state >> 29
    return state >> 1


def body(lm):
    """The part of a model that has its layers and the final norm: all but the head, and the eyes, where it has some."""
    return getattr(getattr(lm, "model", None), "language_model", None) or getattr(lm, "model", None)


def shard(policy):
    """FSDP2 over all ranks, a Policy a layer at a time, any other module in one piece; gradients are summed, not averaged:
    the loss's weights are already global. One process: the policy as it is."""
    if world() == 1:
        return policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device().type, (world(),))
    precision = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(next(policy.parameters()).dtype, torch.float32))
    layers = body(policy.lm).layers if hasattr(policy, "lm") else ()
    for module in (*layers, policy):
        fully_shard(module, mesh=mesh, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    return policy


def whole(tensor):
    """A tensor, or the one that a rank's shard is a part of (a collective)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make_optimizer(policy, args):
    """AdamW over the trainable weights. adamw: states in their precision; adamw_sr: bfloat16 weights updated with stochastic
    rounding; adamw_8bit: the same with 8-bit states. The last two are torchao's."""
    weights = [p for p in policy.parameters() if p.requires_grad]
    settings = dict(lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.999))
    if args.optimizer == "adamw":
        return torch.optim.AdamW(weights, **settings, fused=True)  # on a CPU as well: without copies of the weights
    if args.optimizer == "adamw_8bit" and world() > 1:
        why = "torchao 0.18 cannot shard its states"
        raise UserError(f"--optimizer adamw_8bit runs in one process only ({why}): use adamw_sr")
    from torchao import optim

    kind = optim.AdamW8bit if args.optimizer == "adamw_8bit" else optim._AdamW
    return kind(weights, **settings, bf16_stochastic_round=args.dtype == "bfloat16")


def make_schedules(optimizers, args):
    """The rate of each optimizer over the run's steps: up over args.warmup_steps of them, then args.lr_schedule, which falls to
    0 at the last (linear, cosine). None are made for a constant rate."""
    warm, left = vars(args).get("warmup_steps", 0), vars(args).get("steps")
    kind = vars(args).get("lr_schedule", "constant")

    def rate(step):
        if step < warm:
            return (step + 1) / (warm + 1)
        gone = min(1.0, (step - warm) / max(1, left - warm))
        return dict(constant=1.0, linear=1.0 - gone, cosine=(1 + math.cos(math.pi * gone)) / 2)[kind]

    return [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers if warm or kind != "constant"]


def set_rate(schedule):
    """Gives a schedule's optimizer the rate of the step that it is at."""
    for group, base, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
        now = float(base) * rate(schedule.last_epoch)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(now)
        else:
            group["lr"] = now
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def clip_gradients(policy, max_norm, partial=False):
    """Scales the gradients to a norm of at most max_norm, over all ranks; returns the norm before. RuntimeError where a trained
    weight has none, unless partial says that this is meant: under FSDP2 a forward pass after backward() hides some."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    weights = [p for p in trained if p.grad is not None]
    if len(weights) < len(trained) and not partial:
        few = f"{len(trained) - len(weights)} of {len(trained)} trained weights have no gradient"
        why = "was there a forward pass of the policy between backward() and clip_gradients()"
        raise RuntimeError(f"{few}: {why}, or a part of it that the loss does not reach (partial=True)?")
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in weights]))
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm.item()
