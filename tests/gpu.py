"""What only a GPU can tell: values in bfloat16, time and memory at real shapes, every script on the device.

python -m tests.gpu                          one GPU with 80 GB, at most eight minutes; runs/reference/gpu-<device>.json
python -m tests.gpu --only head packed       some of the parts
python -m tests.gpu --dry                    the same code on a CPU with toy shapes: that it runs, nothing else
Models are random ones of Qwen2.5's shapes: nothing is downloaded. Exit code 1 where a part failed or a bound was broken.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import inspect
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import

import torch
import transformers
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

from algos import grpo
from common import ROOT, engines, gpu, memory, policy, reason, rollout, settings
from common.batch import Meter, collate, minibatches, read

BF16, FP32, GIB = torch.bfloat16, torch.float32, memory.GIB
# Bounds, fixed before the first run on a GPU. An error is the distance from float64 (a whole sampled model's: from float32);
# its bound is so many times the error of another way to compute the same, which rounds as often, in another order.
WORSE = dict(greatest=2.0, mean=1.5)  # the greatest of some thousand errors varies more than their mean
HEAD = 1.5  # one product and one sum: less to vary
VLLM = 2.0  # times WORSE: kernels of its own, that round at other places
FLOOR = 4e-6  # a few roundings of float32, below which the ratio of two errors says nothing
ROOM = 1 / 0.92  # times the memory plan, which says "fits" up to 92% of the card
NORM = 1e4  # of a gradient: anything finite
MOST = 460  # seconds of all parts; with the imports, eight minutes
LEAST = 60  # left for a script that is begun
# Qwen2.5's config.json: width, inner width, layers, heads, key-value heads, vocabulary, head tied; billions of parameters
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True, 0.5),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True, 1.5),
    "7b": (3584, 18944, 28, 28, 4, 152064, False, 7.6),
    "dry": (64, 128, 2, 4, 2, 300, True, 0),
}
SMALL = "--steps 2 --minibatches 2 --prompts-per-step 8 --eval-prompts 8 --checkpoint-every 1"
PAIRS = "--steps 2 --pairs-per-step 8 --eval-prompts 8 --checkpoint-every 1"
TOLD = "--steps 2 --batch-size 8 --eval-prompts 8 --checkpoint-every 1"  # scripts that learn from demonstrations
MAKERS = "grpo dpo cdpo did tab_po".split()  # of the warm starts: they go first, and others wait for their locks
FEW = dict(cdpo="--ce-steps 2", did="--recovery-steps 20 --did-prompts 1", r2q="--beams 1,3 --beam-prompts 6",
           tgdpo="--guide-steps 2", rto="--dpo-steps 3 --dpo-pairs-per-step 8", poad="--task door", rmt="--task digits",
           gdpo="--task sums", unmasking_policy="--task sums", training_free_grpo="--task rules",
           grpo_vision="--task count_sum", vppo="--task count_sum:noisy", tw_grpo="--task events",
           cacovid="--task needle")  # fmt: skip


def missing(package):
    return importlib.util.find_spec(package) is None


def wide(x):
    return x.to(torch.promote_types(x.dtype, FP32))


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


class Bench:
    """What the parts share: device, models and batches of random numbers, the clock, and the table."""

    def __init__(self, dry):
        self.dry, self.device, self.rows, self.part, self.until = dry, torch.device("cpu" if dry else "cuda"), [], "", 0

    def say(self, what, values, bounds=None, verdict=""):
        """{name: number or word} as rows, printed at once. A number that is not at most its bound (NaN is not) breaks it."""
        for name, value in values.items():
            bound = (bounds or {}).get(name)
            word = verdict or ("" if bound is None else "ok" if value <= bound else "BROKEN")
            whole = f"{what}, {name}" if name else what
            self.rows.append(dict(part=self.part, what=whole, value=value, bound=bound, verdict=word))
            a, b = (x if isinstance(x, str) else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in (value, bound or ""))
            print(f"{self.part:8} {whole:88} {a:>12} {b:>10}  {word}".rstrip(), flush=True)

    def near(self, what, ours, theirs, exact, factor=1.0):
        """Our error, bounded by that of another way, and how far we are from it. Tensors."""
        pairs = (ours - exact, theirs - exact, ours - theirs)
        error, other, apart = (dict(greatest=x.abs().max().item(), mean=x.abs().mean().item()) for x in pairs)
        self.say(f"{what}: error", error, {k: max(factor * WORSE[k] * other[k], FLOOR) for k in WORSE})
        self.say(f"{what}: distance", apart)

    def attempt(self, call, *args):
        """What goes wrong in it is a row."""
        try:
            call(self, *args)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.say(reason(error), {"": ""}, verdict="FAILED")
        if not self.dry:
            gc.collect()
            with contextlib.suppress(Exception):  # of a device that is lost
                torch.cuda.empty_cache()

    def measure(self, call, times=3):
        """-> seconds of call(), the median after one more, and GiB at its peak above what was there (0 on a CPU)."""
        sync, seconds, before = (lambda: None) if self.dry else torch.cuda.synchronize, [], 0
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(1 if self.dry else 1 + times):
            sync()
            start = time.perf_counter()
            call()
            sync()
            seconds.append(time.perf_counter() - start)
        return dict(seconds=statistics.median(seconds[-times:]), GiB=self.most() - before / GIB)

    def most(self):
        return 0 if self.dry else torch.cuda.max_memory_allocated() / GIB

    def policy(self, size, layers=None, checkpointing=False, scale=0.02):
        """A random Policy in bfloat16; with weights of Qwen2's own `scale` attention is nearly uniform."""
        H, inner, L, heads, kv_heads, V, tied, _ = SHAPES["dry" if self.dry else size]
        config = transformers.Qwen2Config(
            vocab_size=V, hidden_size=H, intermediate_size=inner, num_hidden_layers=layers or L, num_attention_heads=heads,
            num_key_value_heads=kv_heads, tie_word_embeddings=tied, max_position_embeddings=32768, initializer_range=scale,
        )  # fmt: skip
        torch.manual_seed(0)
        with self.device:
            lm = transformers.AutoModelForCausalLM.from_config(config, dtype=BF16)
        if checkpointing:
            lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        return policy.Policy(lm.to(self.device).train())

    def ragged(self, prompts, group, prompt=400, most=1050, seed=0):
        """Random prompts of half to all of `prompt` tokens, with `group` completions each of a third to all of `most`."""
        prompts, group, prompt, most = (3, 2, 8, 12) if self.dry else (prompts, group, prompt, most)
        rng, V = random.Random(seed), SHAPES["dry"][5]
        asked = [rng.choices(range(V), k=rng.randint(prompt // 2, prompt)) for _ in range(prompts)]
        rows = [(p, rng.choices(range(V), k=rng.randint(most // 3, most))) for p in asked for _ in range(group)]
        batch = collate(rows, device=self.device)
        batch.group, batch.prompt_id = group, torch.arange(prompts, device=self.device).repeat_interleave(group)
        return batch

    def normal(self, *shape, dtype=FP32, seed=0):
        return torch.randn(*shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device).to(dtype)


# ---------------------------------------------------------------- parts


def head(r):
    H, V, few, many = (32, 300, 40, 80) if r.dry else (1536, 151936, 2048, 8192)  # exact logits of the few: 2.3 GiB each

    def plain(hidden, weight, targets):
        logp = wide(hidden @ weight.T).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropy

    def both(way, hidden, weight, targets, g):
        hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
        logp, entropy = way(hidden, weight, targets)
        (logp * g).sum().backward()
        return dict(logp=logp.detach(), entropy=entropy.detach(), d_hidden=hidden.grad, d_weight=weight.grad)

    ways = dict(HeadLogp=policy.HeadLogp.apply, plain=plain)
    for dtype in (BF16, FP32):
        hidden, weight = r.normal(many, H, dtype=dtype), (r.normal(V, H, seed=1) / H**0.5).to(dtype)
        targets, g = torch.arange(many, device=r.device) * 7 % V, r.normal(many, seed=2)
        some = hidden[:few], weight, targets[:few], g[:few]
        exact = both(plain, *(x.double() for x in some[:2]), *some[2:])
        ours, theirs = ({k: relative(a, exact[k]) for k, a in both(way, *some).items()} for way in ways.values())
        r.say(f"{dtype} HeadLogp, greatest relative error", ours, {k: max(HEAD * v, FLOOR) for k, v in theirs.items()})
        del exact
        for name, way in ways.items():
            call = partial(both, way, hidden, weight, targets, g)
            r.say(f"{dtype} {name}, forward and backward of {many} tokens", r.measure(call))


def packed(r):
    def reading(model, batch, g, way):
        """-> log-probs of the completions [n], and the gradient of g times them to the first layer's weight of the keys."""
        lm, model.packs = model.lm, way == "packed"
        lm.zero_grad(set_to_none=True)
        if way == "row by row":
            lm.set_attn_implementation("sdpa")
            rows = [(ids[seen], int(m.sum())) for ids, seen, m in zip(batch.ids, batch.attention_mask, batch.mask)]
            z = [wide(lm(input_ids=ids[None], use_cache=False).logits[0, -t - 1 : -1]) for ids, t in rows]
            logp = torch.cat([x.log_softmax(-1).gather(-1, ids[-t:, None])[:, 0] for x, (ids, t) in zip(z, rows)])
            lm.set_attn_implementation("packed")
        else:
            logp = model(batch.ids, batch.attention_mask, batch.mask)[0][batch.mask]
        (logp * g).sum().backward()
        return logp.detach().double(), lm.model.layers[0].self_attn.k_proj.weight.grad.double()

    start, batch = r.policy("0.5b", layers=4, scale=0.05), r.ragged(6, 4, 120, 300)
    g = r.normal(int(batch.mask.sum()))
    exact, d_exact = reading(copy.deepcopy(start).double(), batch, g, "row by row")
    for model in (start, copy.deepcopy(start).float()):  # .to(bfloat16) would round the rotary frequencies, too
        (ours, d), (pads, d_pads), (rows, _) = (reading(model, batch, g, way) for way in ("packed", "padded", "row by row"))
        what, most = f"{model.lm.dtype} packed log-probs and", d_exact.abs().max()
        r.near(f"{what} padded ones", ours, pads, exact)
        r.near(f"{what} transformers' own, row by row", ours, rows, exact)
        # Row by row a sum of gradients is rounded at every row: no yardstick.
        r.near(f"{model.lm.dtype} packed gradient and a padded one", d / most, d_pads / most, d_exact / most)
    del start, model
    model, batch = r.policy("0.5b", checkpointing=True), r.ragged(8, 8)
    for model.packs in (True, False):
        what = f"{'packed' if model.packs else 'padded'}, {len(batch.ids)} rows, {int(batch.attention_mask.sum()):,} tokens"
        r.say(what, r.measure(lambda: model(batch.ids, batch.attention_mask, batch.mask)[0].sum().backward()))


def by_hand(q, k, v, cu_q, cu_k, *_, scale, **__):
    """What varlen_attn computes, on a CPU."""
    out = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        x, y, z = (t.transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        seen = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
        out.append(scaled_dot_product_attention(x, y, z, seen, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def varlen(r):
    """A row that shares another's prompt asks for its completion alone: queries are the packed tokens as they are."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return r.say("torch.nn.attention.varlen", {"": "skipped: not in this torch"})
    gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    attend, batch = by_hand if r.dry else varlen_attn, r.ragged(8, 8)
    packing = policy.Packing(batch.ids, batch.attention_mask, batch.mask.shape[1])
    index, lengths = packing.number[batch.attention_mask], (packing.keep.sum(1), batch.attention_mask.sum(1))
    ends, longest = [pad(n.cumsum(0), (1, 0)).int() for n in lengths], [int(n.max()) for n in lengths]

    def loop(module, scale, q, k, v):
        return policy._packed_attention(module, q, k, v, None, scaling=scale, packing=packing)[0]

    def flat(module, scale, q, k, v):
        k, v = (embedding(index, x[0].transpose(0, 1).flatten(1)).unflatten(-1, (-1, x.shape[3])) for x in (k, v))
        if not gqa:  # torch 2.11 may want as many heads of all
            k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
        more, q = dict(enable_gqa=True) if gqa else {}, q[0].transpose(0, 1).contiguous()
        return attend(q, k, v, *ends, *longest, scale=scale, window_size=(-1, 0), **more)[None]

    def run(way, module, xs, g):
        out = way(module, xs[0].shape[3] ** -0.5, *xs)
        return [out.detach(), *torch.autograd.grad(out, xs, g)]

    for heads, kv_heads, width in ((14, 2, 64), (28, 4, 128)):
        shapes = [(1, h, len(packing.positions), width) for h in (heads, kv_heads, kv_heads)]
        xs = [r.normal(*shape, dtype=BF16, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
        inputs = module, xs, r.normal(1, shapes[0][2], heads, width, dtype=BF16, seed=3)
        far = [relative(a, b) for a, b in zip(run(flat, *inputs), run(loop, *inputs))]
        ms = [1000 * r.measure(partial(run, way, *inputs), 10)["seconds"] for way in (loop, flat)]
        what = f"{heads} heads, {kv_heads} of keys, width {width}, {len(index):,} tokens{'' if gqa else ', keys repeated'}"
        r.say(f"{what}: relative distance", dict(output=far[0], gradients=max(far[1:])))
        r.say(what, {f"loop over {len(packing.rows)}, ms": ms[0], "varlen, ms": ms[1], "loop / varlen": ms[0] / ms[1]})


def compiled(r):
    """Three lengths, since one that is new may be compiled anew."""
    model, batches = r.policy("0.5b"), [r.ragged(4, 4, seed=seed) for seed in range(3)]

    def run():
        model.zero_grad(set_to_none=True)
        for b in batches:
            logp, _ = model(b.ids, b.attention_mask, b.mask)
            logp.sum().backward()
        return logp.detach()

    before, eager, layers = run(), r.measure(run), model.lm.model.layers
    r.say("eager, three micro-batches", eager)
    for what, modules in dict(MLPs=[layer.mlp for layer in layers], layers=layers).items():
        try:
            for module in modules:
                module.compile(dynamic=True, backend="eager" if r.dry else "inductor")
            first = r.measure(run, 0)["seconds"] - eager["seconds"]
            found = {"seconds to compile": first} | r.measure(run)
            found["eager / compiled"] = eager["seconds"] / found["seconds"]
            found["mean distance of log-probs"] = (run() - before)[batches[-1].mask].abs().mean().item()
            r.say(f"{what} compiled", found)
        except Exception as error:  # to be impossible is a result
            r.say(f"{what} compiled: {reason(error, 100)}", {"": "impossible"})
            if isinstance(error, TimeoutError):
                return
        for module in modules:
            module._compiled_call_impl = None
        torch._dynamo.reset()


def train(model, optimizer, batch, args):
    """The update of algos/grpo.py -> the gradient's norm."""
    meter = Meter()
    for rows, weights in minibatches(batch, args, 0, grpo.token_weights):
        batch.weights = weights
        for mb in batch.micro_batches(rows, args.micro_batch_tokens):
            logp, entropy = model(mb.ids, mb.attention_mask, mb.mask, args.temperature)
            objective, stats = grpo.surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
            micro_loss = -(objective * mb.weights)[mb.trained].sum()
            micro_loss.backward()
            micro_loss.item()
            meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
        grad_norm = gpu.clip_gradients(model, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return grad_norm


def update(r):
    n = 128 if r.dry else 8192
    square = r.normal(n, n, dtype=BF16)
    rate = 2 * n**3 / r.measure(partial(torch.mm, square, square), 10)["seconds"]
    del square
    r.say(f"bfloat16 product of matrices, {n} x {n}", {"TFLOP/s": rate / 1e12})
    for size, prompts in (("0.5b", 8), ("1.5b", 8), ("7b", 4)):
        if size == "7b" and missing("torchao"):
            r.say("7b, adamw_8bit", {"": "skipped: no torchao"})
        else:
            r.attempt(one_size, size, r.ragged(prompts, 8), rate)


def one_size(r, size, batch, rate):
    preset = next(p for limit, p in settings.PRESETS.items() if SHAPES[size][-1] <= limit)
    plain = dict(optimizer="adamw") if r.dry or missing("torchao") else {}  # it loses small steps, in as much time
    args = grpo.Args(**preset | dict(minibatches=1, engine="hf") | plain)
    model = r.policy(size, checkpointing=args.gradient_checkpointing)
    optimizer, config, N = gpu.make_optimizer(model, args), model.lm.config, sum(p.numel() for p in model.parameters())
    batch.old_logp = batch.sampler_logp = read(model, batch, args)[0]
    batch.adv, norms = r.normal(len(batch.ids), 1).expand_as(batch.old_logp), []
    seconds = r.measure(lambda: norms.append(train(model, optimizer, batch, args)))["seconds"]
    cut, most = batch.micro_batches(torch.arange(len(batch.ids), device=r.device), args.micro_batch_tokens), r.most()
    places = [policy.Packing(mb.ids, mb.attention_mask, mb.mask.shape[1]).positions for mb in cut]
    tokens, pairs = sum(map(len, places)), sum(int((p + 1).sum()) for p in places)  # a token and all before it
    used = N - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)  # rows are picked, not multiplied
    flops = 6 * used * tokens + 12 * config.num_hidden_layers * config.hidden_size * pairs
    plan = memory.memory_plan(config, args, N, 2048, ranks=1)
    plan = sum(plan[k] for k in ("weights", "gradients", "optimizer", "activations", "logits chunk"))  # not the sampler's
    found = {"s": seconds, "tokens/s": tokens / seconds, "share of the product's FLOP/s": flops / seconds / rate}
    found |= {"gradient's norm": norms[-1], "GiB at the peak (bound: the plan)": most}
    what = f"{size}, {args.optimizer}{', checkpointing' * args.gradient_checkpointing}, {tokens:,} tokens in {len(places)}"
    r.say(what, found, dict(zip(list(found)[-2:], (NORM, ROOM * plan / GIB))))


def questions(r):
    batch = r.ragged(64, 1, 128, 8)
    return [ids[seen][: -int(mask.sum())].tolist() for ids, seen, mask in zip(batch.ids, batch.attention_mask, batch.mask)]


def scored(r, who, model, prompts, out, factor=1.0):
    """The sampler's log-probs and the policy's own, each against a float32 copy of the policy."""
    n = len(out) // len(prompts)
    some = [(prompts[i // n], ids, logp) for i, (ids, logp, _) in enumerate(out[:64])]
    batch, args = collate([x[:2] for x in some], device=r.device), SimpleNamespace(temperature=1.0, micro_batch_tokens=16384)
    theirs = torch.tensor([p for *_, logp in some for p in logp], device=r.device)
    own, exact = (read(m, batch, args)[0][batch.mask] for m in (model, copy.deepcopy(model).float()))
    r.near(f"log-probs of {who} and of the policy", theirs, own, exact, factor)


def sampler(r):
    model, prompts, n, T, out = r.policy("0.5b"), questions(r), 8, 6 if r.dry else 256, []
    engine = engines.HF(model, SimpleNamespace(pad_token_id=0, eos_token_id=-1))  # an end that never comes
    found = r.measure(lambda: out.append(engine.generate(prompts, n, T, 1.0, list(range(len(prompts))))), 1)
    assert all(len(ids) == T for ids, *_ in out[-1])
    found["tokens/s"] = len(out[-1]) * T / found["seconds"]
    r.say(f"transformers, {len(prompts)} prompts x {n}, {T} tokens each", found)
    scored(r, "transformers", model, prompts, out[-1])


def vllm(r):
    if r.dry or missing("vllm"):
        return r.say("vLLM", {"": f"skipped: no {'vllm' if missing('vllm') else 'GPU'}"})
    from common.worlds import tiny

    model, prompts, start = r.policy("0.5b"), questions(r), 3 + len(tiny.CHARACTERS)
    tokenizer = tiny.characters([*tiny.CHARACTERS, *(f"<{i}>" for i in range(start, SHAPES["0.5b"][5]))])
    engine = engines.VLLM(model, tokenizer, grpo.Args(dtype="bfloat16", vllm_memory=0.4), 1024)
    for who in ("vLLM", "vLLM with other weights"):
        found, out = {"wake, s": r.measure(engine.wake, 0)["seconds"]}, []
        call = partial(engine.generate, prompts, 8, 256, 1.0, list(range(len(prompts))))
        seconds, free = r.measure(lambda out=out, call=call: out.extend(call()), 0)["seconds"], torch.cuda.mem_get_info()[0]
        found |= {"tokens/s": sum(len(ids) for ids, *_ in out) / seconds, "sleep, s": r.measure(engine.sleep, 0)["seconds"]}
        r.say(who, found | {"GiB that sleep gives": (torch.cuda.mem_get_info()[0] - free) / GIB})
        scored(r, who, model, prompts, out, VLLM)
        torch._foreach_mul_([p.data for p in model.parameters()], 1.25)
        r.say(f"{who}: weights replaced in its sleep", r.measure(engine.sync, 0))
    engine.close()


def checkpoints(r):
    """Written from the device, and read into it by another model: bit for bit, and what the host's memory grows by."""
    if absent := [package for package in ("tyro", "filelock") if missing(package)]:
        return r.say("checkpoints", {"": f"skipped: no {' and no '.join(absent)}"})
    from common import checkpoint, export
    from common.worlds import tiny
    from tests.bench.checkpoint import GOAL, everything, grown

    name = "adamw" if r.dry or missing("torchao") else "adamw_sr"
    args = grpo.Args(dtype="bfloat16", lr=1e-3, weight_decay=0.0, optimizer=name)

    def start(seed):
        model = r.policy("0.5b")
        optimizer = gpu.make_optimizer(model, args)
        for i, p in enumerate(model.parameters()):
            p.grad = r.normal(*p.shape, dtype=BF16, seed=seed + i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return model, optimizer

    with tempfile.TemporaryDirectory() as folder:
        run = SimpleNamespace(dir=Path(folder), main=True, tokenizer=tiny.characters(), args=args, queue=[], extra={},
                              state=dict(step=1), schedules=[])  # fmt: skip
        pair, other = start(1), start(1000)
        part = sum(x.nbytes for x in everything(*pair).values())
        bound = {"GiB of host memory more": (GOAL * part + export.FILE) / GIB}
        for what, call in {
            "written": lambda: checkpoint.save(run, *pair),
            "found and restored": lambda: checkpoint.restore(run, checkpoint.find(run), *other),
        }.items():
            with contextlib.redirect_stdout(io.StringIO()):
                more, seconds, _ = grown(call)
            found = {"s": seconds, "GiB of host memory more": more / GIB}
            r.say(f"checkpoint of 0.5b, {name}, {part / GIB:.2f} GiB, {what}", found, bound)
    a, b = everything(*pair), everything(*other)
    wrong = sum(not torch.equal(x, b[k].to(x.device)) for k, x in a.items())
    r.say("tensors that are not what they were", {"": wrong}, {"": 0})


def fitting(text, flags):
    """Those of the flags, each with a value, that a script has: its fields stand in its text."""
    words = flags.split()
    pairs = [words[i : i + 2] for i in range(0, len(words), 2)]
    return [word for flag, value in pairs if f"\n    {flag[2:].replace('-', '_')}: " in text for word in (flag, value)]


def scripts(r):
    if missing("tyro"):
        return r.say("algos/*.py", {"": "skipped: no tyro"})
    names = {p.stem: None for p in sorted((ROOT / "algos").glob("*.py")) if p.stem != "__init__"}
    names = ["grpo"] if r.dry else list(dict.fromkeys(MAKERS) | names)
    env = os.environ | dict(OMP_NUM_THREADS="1")

    def run(script):
        path, start = ROOT / "algos" / f"{script}.py", time.monotonic()
        has = re.search(r"^    (pairs_per_step|batch_size):", text := path.read_text(), re.M)
        flags = dict(pairs_per_step=PAIRS, batch_size=TOLD).get(has and has[1], SMALL)
        flags += " " + FEW.get(script, "--task addition --group-size 4" if flags == SMALL else "") + " --steps 1" * r.dry
        command = [sys.executable, path, *fitting(text, flags), "--device", r.device.type, "--run-dir", f"{folder}/{script}"]
        left = r.until - 5 - start
        if left < LEAST and not r.dry:
            return f"{script}: not begun, {max(0, left):.0f} s are left", 0.0, "skipped"
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=left)
            code, said = done.returncode, (done.stderr.strip().splitlines() or [""])[-1]
        except subprocess.TimeoutExpired:
            code, said = "none", "not over in time"
        return script + (f": exit code {code}, {said}" if code else ""), time.monotonic() - start, "FAILED" if code else "ok"

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(8) as pool:
        for what, seconds, verdict in pool.map(run, names):
            r.say(what, dict(s=seconds), verdict=verdict)


# name: the part, and the most seconds it may take
PARTS = dict(head=(head, 40), packed=(packed, 60), varlen=(varlen, 30), compile=(compiled, 60), update=(update, 110),
             checkpoint=(checkpoints, 40), sampler=(sampler, 60), vllm=(vllm, 120), scripts=(scripts, 300))  # fmt: skip


# ---------------------------------------------------------------- the command


def late(*_):
    raise TimeoutError("not over in time")


def main(argv=None):
    """-> the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, toy shapes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument("--out", type=Path, help="folder of the .json file; none: runs/reference, or with --dry nowhere")
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --dry runs the same code on a CPU", file=sys.stderr)
        return 2
    r, start, seconds = Bench(options.dry), time.monotonic(), {}
    gpu.choose(r.device.type)
    record = dict(device="cpu" if r.dry else torch.cuda.get_device_name(), python=sys.version.split()[0],
                  torch=torch.__version__, cuda=torch.version.cuda, transformers=transformers.__version__)  # fmt: skip
    with contextlib.suppress(OSError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        record["driver"] = subprocess.run(ask, capture_output=True, text=True).stdout.partition("\n")[0]
    print(", ".join(f"{k} {v}" for k, v in record.items() if v), flush=True)
    print(f"{'part':8} {'what':88} {'value':>12} {'bound':>10}  verdict")
    out = options.out or (None if r.dry else ROOT / "runs" / "reference")
    signal.signal(signal.SIGALRM, late)
    for r.part in options.only:
        (part, most), began = PARTS[r.part], time.monotonic()
        most = max(1, min(MOST if len(options.only) == 1 else most, MOST - (began - start)))
        signal.setitimer(signal.ITIMER_REAL, most, 15)  # and again, where something swallows it
        r.until = began + most
        r.attempt(part)
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds[r.part] = round(time.monotonic() - began, 1)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            file = out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', record['device'].lower())}.json"
            file.write_text(json.dumps(record | dict(seconds=seconds, rows=r.rows), indent=1) + "\n")
    bad = sum(row["verdict"] in ("FAILED", "BROKEN") for row in r.rows)
    print(f"{len(r.rows)} rows, {bad} failed or broken; seconds: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
