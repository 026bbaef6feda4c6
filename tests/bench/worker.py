"""One run of GRPO on a random model, by this repository's script or by TRL's trainer, on the same work; started by
tests/bench/__main__.py in a process of its own. Prints one line of JSON.

The work: prompts of 32 characters; completion lengths uniform in 16..256, drawn with the seed before anything runs, so that
both sides write and train on as many tokens, and the logits of the end token are set so that completions end there. Both sample
from the model with a plain forward pass of transformers, and train it as it is.
"""

import contextlib
import io
import itertools
import json
import operator
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
PROMPT, LEAST, MOST = 32, 16, 256
# name -> width, layers, vocabulary: 78 is the tiny tokenizer's, 151,936 Qwen2.5's
SIZES = {
    "230k": (96, 2, 78), "10M": (384, 6, 78), "60M": (768, 8, 78),
    "15M-vocabulary": (96, 2, 151936), "60M-vocabulary": (384, 1, 151936),
    "qwen2.5-0.5b": (896, 24, 151936), "qwen2.5-1.5b": (1536, 28, 151936),
}  # fmt: skip


@dataclass
class Work:
    side: str = "ours"
    """ours or trl"""
    size: str = "230k"
    prompts: int = 8
    group: int = 8
    updates: int = 2
    """optimizer steps on each rollout"""
    rollouts: int = 2
    """the first one is not measured"""
    rows: int = 8
    """completions in a forward pass of the trainer, at their longest"""
    dtype: str = "float32"
    seed: int = 0
    checkpointing: bool = False
    engine: str = "hf"
    profile: bool = False
    """print where the time of our updates goes, by operation, instead of the line of JSON"""


def make_model(work, folder):
    """A random Qwen2 with a tokenizer that fills its vocabulary."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from common.worlds import tiny

    width, layers, V = SIZES[work.size]
    filling = [f"<{i}>" for i in range(3 + len(tiny.CHARACTERS), V)]
    tiny.characters([*tiny.CHARACTERS, *filling]).save_pretrained(folder)
    heads = width // (64 if width in (384, 768, 896) else 128 if width == 1536 else 32)
    inner, kv_heads = {896: (4864, 2), 1536: (8960, 2)}.get(width, (width * 8 // 3, heads))  # Qwen2.5's own
    config = Qwen2Config(
        vocab_size=V, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(config).to(getattr(torch, work.dtype))
    lm.save_pretrained(folder)
    rng = random.Random(work.seed)
    prompts = ["".join(rng.choices("abcdefghij", k=PROMPT)) for _ in range(work.prompts * (work.rollouts + 2))]
    N = lm.num_parameters()
    return prompts, N


def draw_lengths(work):
    """Yields the completion lengths of every rollout in turn."""
    rng = random.Random(work.seed)
    while True:
        yield [rng.randint(LEAST, MOST) for _ in range(work.prompts * work.group)]


@contextlib.contextmanager
def ragged(lm, lengths, end=1):
    """Inside, `lm` writes one completion of each of these lengths. Which row has which is left to chance: a sampler may
    keep the rows that have ended, in their places, or drop them and move the others."""
    ending, going, rng, caches = Counter(lengths), set(range(len(lengths))), random.Random(0), []

    def seen(module, args, kwargs):
        caches[:] = [kwargs["past_key_values"]]

    def written(module, args, logits):
        t = caches[0].get_seq_length() - PROMPT + 1
        logits[..., end] = -torch.inf
        if ending[t]:
            kept = len(logits) == len(lengths)
            rows = rng.sample(sorted(going) if kept else range(len(logits)), ending[t])
            logits[rows], logits[rows, :, end] = -1e4, 0.0
            going.difference_update(rows)
        return logits

    hooks = [lm.model.register_forward_pre_hook(seen, with_kwargs=True), lm.lm_head.register_forward_hook(written)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ours(work, folder, prompts):
    from algos import grpo
    from common import engines, tasks

    examples = [tasks.Example(i, p, "") for i, p in enumerate(prompts)]
    split = len(prompts) - work.prompts

    def check(text, answer):
        return None, float(hash(text) % 2)

    def load(name, tokenizer, *others):
        task = tasks.Task("bench", examples[:split], examples[split:], check, inline=True)
        tasks.encode(task, tokenizer)
        return task

    tasks.load = load
    generate, lengths = engines.HF._generate, draw_lengths(work)

    def uneven(self, lm, prefixes, n, *args):
        with ragged(lm, next(lengths) if n == work.group else [LEAST] * len(prefixes)):  # an evaluation is short
            return generate(self, lm, prefixes, n, *args)

    engines.HF._generate = uneven
    run = Path(folder) / "run"
    grpo.train(tyro.cli(grpo.Args, args=[
        "--model", folder, "--task", "bench", "--steps", str(work.rollouts), "--prompts-per-step", str(work.prompts),
        "--group-size", str(work.group), "--minibatches", str(work.updates), "--max-new-tokens", str(MOST), "--lr", "1e-6",
        "--eval-every", "0", "--eval-prompts", "1", "--checkpoint-every", "0", "--dtype", work.dtype,
        "--optimizer", "adamw" if work.dtype == "float32" else "adamw_sr", "--engine", work.engine,
        "--micro-batch-tokens", str(work.rows * (PROMPT + MOST)), "--run-dir", str(run),
        "--gradient-checkpointing", str(work.checkpointing), "--seed", str(work.seed),
    ]))  # fmt: skip
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")][1:]
    return [
        dict(tokens=r["tokens"], rollout=r["time/rollout"], scoring=r["time/old_logp"], update=r["time/update"],
             step=r["time/step"], length=r["length"]) for r in rows
    ]  # fmt: skip


def theirs(work, folder, prompts):
    import datasets
    import trl
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    assert trl.__version__ == "1.16.0", trl.__version__
    clock, found, lengths = time.perf_counter, [], draw_lengths(work)

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            start = clock()
            with ragged(self.accelerator.unwrap_model(self.model), next(lengths)):
                out = super()._generate_single_turn(*args, **kwargs)
            sync()
            found[-1] |= dict(rollout=clock() - start, tokens=sum(map(len, out[0])), length=sum(map(len, out[0])) / len(out[0]))
            return out

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            sync(), (start := clock())
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            sync()
            if not torch.is_grad_enabled():
                found[-1]["scoring"] = clock() - start
            return out

        def _generate_and_score_completions(self, inputs):
            sync()
            if found:
                found[-1]["step"] = clock() - found[-1].pop("start")
            found.append(dict(start=clock()))
            out = super()._generate_and_score_completions(inputs)
            sync()
            found[-1]["before"] = clock() - found[-1]["start"]
            return out

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == args.max_steps:
                sync()
                found[-1]["step"] = clock() - found[-1].pop("start")

    def sync():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    completions = work.prompts * work.group
    config = GRPOConfig(
        output_dir=str(Path(folder) / "trl"), max_steps=work.rollouts * work.updates, per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=completions // work.rows // work.updates, steps_per_generation=completions // work.rows,
        num_generations=work.group, max_completion_length=MOST, learning_rate=1e-6, lr_scheduler_type="constant", beta=0.0,
        loss_type="grpo", temperature=1.0, bf16=work.dtype == "bfloat16", gradient_checkpointing=work.checkpointing,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, use_vllm=work.engine == "vllm",
        vllm_mode="colocate", max_grad_norm=1.0, seed=work.seed, model_init_kwargs=dict(dtype=work.dtype),
    )  # fmt: skip

    def reward(completions, **kwargs):
        return [float(hash(c) % 2) for c in completions]

    trainer = Timed(
        model=folder, reward_funcs=reward, args=config, callbacks=[End()],
        train_dataset=datasets.Dataset.from_list([dict(prompt=p) for p in prompts]),
    )  # fmt: skip
    trainer.train()
    assert len(found) == work.rollouts, found
    for row in found:
        row["update"] = row["step"] - row.pop("before")
    return found[1:]


def matmul_rate(dtype, seconds=2.0):
    """FLOP/s of square matrix products in this process."""
    device, n = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a = torch.randn(n, n, dtype=getattr(torch, dtype), device=device)
    a @ a
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(8):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        done += 8
    return done * 2 * n**3 / (time.perf_counter() - start)


def profiler(work):
    """Records the passes of the trainer, not the sampling."""
    if not work.profile:
        return contextlib.nullcontext()
    from common import batch

    profile = torch.profiler.profile(activities=torch.profiler.supported_activities(), acc_events=True)
    minibatches = batch.minibatches

    def recorded(*args):
        profile.start()
        yield from minibatches(*args)
        profile.stop()

    batch.minibatches = recorded
    return contextlib.nullcontext(profile)


def main(work):
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rate = matmul_rate(work.dtype)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prompts, N = make_model(work, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with profiler(work) as profile:
            rows = dict(ours=ours, trl=theirs)[work.side](work, folder, prompts)
    if profile:
        own = operator.attrgetter(f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total")
        # Kernels have rows of their own beside those of the operations that launch them.
        rows = [row for row in profile.key_averages() if row.device_type == torch.autograd.DeviceType.CPU]
        rows.sort(key=own, reverse=True)
        whole = sum(map(own, rows))
        for row in rows[:16]:
            print(f"{own(row) / whole:6.1%} {row.count:7,} calls of {row.key}")
        return
    drawn = list(itertools.islice(draw_lengths(work), work.rollouts))
    assert work.engine == "vllm" or [r["tokens"] for r in rows] == list(map(sum, drawn[1:])), (rows, drawn)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu_peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    total = {k: sum(r[k] for r in rows) for k in rows[0]}
    print(json.dumps(dict(
        side=work.side, size=work.size, parameters=N, matmul=rate, peak=peak, start=before, gpu_peak=gpu_peak,
        rollout_tokens_per_s=total["tokens"] / total["rollout"], update_tokens_per_s=total["tokens"] / total["update"],
        step_tokens_per_s=total["tokens"] / total["step"],
        share={k: total[k] / total["step"] for k in ("rollout", "scoring", "update")},
        tokens=total["tokens"], length=total["length"] / len(rows),
        update_flops_share=6 * N * total["tokens"] / total["update"] / rate,
    )))  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(tyro.cli(Work))
