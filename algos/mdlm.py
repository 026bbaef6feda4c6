"""MDLM: a masked diffusion language model. Sahoo et al., arXiv 2406.07524 (2024); as LLaDA trains it, Nie et al., arXiv
2502.09992 (2025).

Idea: hide a random share of a completion and guess all hidden tokens at once, each from everything that is seen on both sides.
To write, such a model fills a canvas of masked positions, a few of them a step, in any order. Tokens of one step are guessed
without knowing of each other, so fewer steps are quicker and agree less.

Objective, to be minimised (LLaDA, Eq. 3; Eq. 12 for k), of a completion y of L tokens, filled up with EOS, q its prompt:
    L = -E_t E_m 1/t 1/L sum_(i in m) log pi(y_i | y without m, q)
    t uniform in (0, 1], every position in m with probability t; or k uniform in 1..L, k positions in m, L / k for 1/t

The second has the same mean with less noise, and is the default. -L times the number of tokens is a bound of log pi(y | q) from
below. The levels of an update's rows are spread evenly over the range.

Family: diffusion
Base: this is the script that the models of diffusion papers come from: `corrupt`, `diffusion_loss`, `unmask`.
Costs: a forward and a backward pass over whole canvases, filler included; to write, as many passes as --denoising-steps,
       each over the whole canvas, since nothing can be cached. No engine serves such models: transformers samples.
Run:   python algos/mdlm.py                                     tiny model from random weights, CPU, about a minute
       python algos/mdlm.py --model qwen3-0.6b-mdlm             GSM8K's worked solutions on one GPU
       torchrun --nproc-per-node 8 algos/mdlm.py --model llada-8b --task conversations.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """tiny, an alias (qwen3-0.6b-mdlm, dream-7b, llada-8b), a hub id, or a local folder"""
    task: str | None = None
    """sums, addition[:digits], ... (built in), gsm8k, math, a .jsonl of messages, or prompt and completion; None: preset"""
    reward: str | None = None
    """file.py:function of your own: (text, answer) -> score, or (answer that was read, score); a cut completion scores 0"""
    prompt_template: str | None = None
    """format string with the field {prompt}, applied before the tokenizer's chat template; None: the task's"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    seed: int = 1
    """of the demonstrations' order, what is random in them, and the evaluation's samples"""
    steps: int | None = None
    """updates in all; None here and below: the preset of the model"""
    batch_size: int | None = None
    """demonstrations in one update, of all processes together"""
    lr: float | None = None
    """AdamW's rate"""
    warmup_steps: int = 0
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    max_new_tokens: int | None = None
    """L, positions of the canvas: a longer demonstration is cut, a shorter one filled up with EOS"""
    eval_every: int | None = None
    """steps between evaluations; 0: only before and after"""
    eval_prompts: int = 512
    """held-out prompts, at most"""
    eval_samples: int = 0
    """also samples N canvases of each: avg@N (their mean) and pass@N (whether one is right); 0: the likeliest tokens only"""
    eval_temperature: float = 1.0
    """temperature of these samples"""
    checkpoint_every: int | None = None
    """steps between checkpoints; 0: only at the end"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    push_to_hub: str | None = None
    """owner/name on the Hugging Face hub that the last checkpoint goes to at the end"""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """who gets the metrics besides TensorBoard"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of weights and gradients"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] | None = None
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""
    lora_rank: int = 0
    """train LoRA layers of this rank instead of all weights; 0: all weights"""
    lora_alpha: float | None = None
    """their updates are scaled by alpha / rank; None: twice the rank"""
    lora_targets: str = "all-linear"
    """which layers get them: names with commas (q_proj,v_proj), or all-linear"""
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass"""
    careful: float = 0.9
    """share of a built-in task's demonstrations that are right; the rest is from habit, and mostly wrong"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass of the trainer; a prompt that its completions share counts once"""

    # MDLM
    limits = dict(careful="0 <= x <= 1", denoising_steps="1 <= x", eval_steps="1 <= x")
    tiny_preset = dict(
        task="sums", steps=1600, batch_size=64, lr=3e-3, lr_schedule="cosine", warmup_steps=320, max_new_tokens=8,
        eval_every=400, checkpoint_every=400, denoising_steps=8, block_length=0, from_scratch=True, eval_steps=(1, 2, 4, 8),
    )  # fmt: skip
    real_preset = dict(max_new_tokens=256, denoising_steps=128, block_length=32, from_scratch=False, eval_steps=())
    from_scratch: bool | None = None
    """begin with random weights"""
    levels: Literal["count", "bernoulli"] = "count"
    """count: k masked positions, weighted by L / k (LLaDA, Eq. 12); bernoulli: each with probability t, by 1 / t (Eq. 3)"""
    denoising_steps: int | None = None
    """passes of the model over which a canvas is filled"""
    block_length: int | None = None
    """positions of a block; blocks are filled from the left; 0: the whole canvas at once"""
    order: Literal["confidence", "random", "left"] = "confidence"
    """which masked positions of a block a step reveals: those with the likeliest tokens (LLaDA), random ones, or the first"""
    eval_steps: tuple[int, ...] | None = None
    """denoising steps with which evaluations try all three orders, on the whole canvas"""


# ---------------------------------------------------------------- the objective


def corrupt(noise, args):
    """noise [B, L + 1] in [0, 1), of the positions and, last, of the level -> (masked [B, L], weight [B, 1]: 1/t, or L / k)."""
    B, L = noise.shape[0], noise.shape[1] - 1
    t = (torch.arange(B, device=noise.device)[:, None] + noise[:, L:]) / B  # spread over the rows
    if args.levels == "bernoulli":
        t = t.clamp(min=1e-3)
        return noise[:, :L] < t, 1 / t
    k = 1 + (t * L).long()
    return noise[:, :L].argsort(1).argsort(1) < k, L / k


def diffusion_loss(logp, masked, weight):
    """log pi [B, L] of the tokens at masked positions -> loss per position [B, L]; its mean bounds -log pi(y | q) / L."""
    return -weight * logp.masked_fill(~masked, 0.0)


def schedule(masked, steps):
    """How many of so many masked positions each step reveals: as equal as can be, the larger first."""
    return [masked // steps + (i < masked % steps) for i in range(steps)]


def unmask(guess, masked, noise, temperature, args):
    """Fills a canvas block by block, from the left, a few positions a step: those with the likeliest tokens, or random ones, or
    the first. guess(tokens, masked, noise [b, L], temperature) -> tokens and their probabilities [b, L]; masked [b, L], all
    True; noise [b, denoising_steps + 1, L] in [0, 1), the last for the order -> tokens [b, L]."""
    b, L = masked.shape
    width = args.block_length or L
    tokens, step = torch.zeros_like(masked, dtype=torch.int64), 0
    place = torch.arange(L, device=masked.device).expand(b, L)
    for first in range(0, L, width):
        inside = (place >= first) & (place < first + width)
        for k in schedule(width, args.denoising_steps * width // L):
            found, confidence = guess(tokens, masked, noise[:, step], temperature)
            score = dict(confidence=confidence, random=noise[:, -1], left=-place.double())[args.order]
            top = score.masked_fill(~(masked & inside), -torch.inf).topk(k).indices
            tokens = tokens.scatter(1, top, found.gather(1, top))
            masked, step = masked.scatter(1, top, False), step + 1
    return tokens


def over_steps(engine, args, evaluate):
    """evaluate() with every number of args.eval_steps and in each order, on the whole canvas -> {name: greedy accuracy}."""
    from dataclasses import replace

    found = {}
    for order in ("confidence", "random", "left"):
        for n in args.eval_steps:
            engine.args = replace(args, order=order, denoising_steps=n, block_length=0, eval_samples=0)
            found[f"{order}_{n}"] = evaluate(engine.args)["greedy_accuracy"]
    engine.args = args
    return found


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import demonstrations, diffusion, gpu, models, rewards, rollout, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args, diffusion.world)
    tokenizer = models.load_tokenizer(args, diffusion.world, args.from_scratch)
    task, context = demonstrations.load(args, config, tokenizer)
    run = runlog.Run(__file__, args, config, tokenizer, context)
    policy = gpu.shard(models.load(args, device, warm=diffusion.world, denoiser=True, fresh=args.from_scratch))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = diffusion.Canvas(policy, tokenizer, args, unmask)
    scorer = rewards.Scorer(task.check, inline=task.inline) if task.check else None

    def canvases(examples, seed, first):
        """Demonstrations of these examples, the same on all ranks, with what is masked in them and its weight."""
        batch = demonstrations.batch(task, examples, tokenizer, args, seed, first)
        batch = diffusion.fill(batch, args.max_new_tokens, tokenizer.eos_token_id)
        keys = [gpu.hash_seed(seed, first + i, 23) for i in range(len(examples))]
        noise = [torch.rand(args.max_new_tokens + 1, generator=torch.Generator().manual_seed(key)) for key in keys]
        batch.trained, weight = corrupt(torch.stack(noise).to(device), args)
        batch.columns["weight"] = weight.expand(batch.mask.shape)
        return batch

    def losses(mb):
        """Of a micro-batch -> loss, log-probs and entropies at its positions [b, L] each."""
        ids = mb.ids.clone()
        ids[:, -mb.mask.shape[1] :].masked_fill_(mb.trained, engine.mask_id)
        logp, entropy = policy(ids, mb.attention_mask, mb.trained, given=mb.ids[:, -mb.mask.shape[1] :])
        return diffusion_loss(logp, mb.trained, mb.columns["weight"]), logp, entropy

    def share(batch):
        return torch.arange(len(batch.ids), device=device)[gpu.rank() :: gpu.world()]

    @torch.no_grad()
    def bound():
        """The loss of held-out demonstrations, always masked alike."""
        batch = canvases(task.test[: args.eval_prompts], 0, 0)
        total = sum(losses(mb)[0].sum().item() for mb in batch.micro_batches(share(batch), args.micro_batch_tokens))
        return gpu.total(total) / batch.mask.numel()

    def evaluate():
        engine.sync()
        found = {}
        if scorer:
            found = rollout.evaluate(engine, scorer, tokenizer, task, args)
            found |= over_steps(engine, args, lambda changed: rollout.evaluate(engine, scorer, tokenizer, task, changed))
        return found | dict(bound=bound(), prompts=len(task.test[: args.eval_prompts]))

    for step in run.steps(policy, optimizer, evaluate):
        cursor = step * args.batch_size
        batch = canvases(task.order(cursor, args.batch_size, args.seed), args.seed, cursor)

        # Update: every process takes its share of the rows, cut into micro-batches.
        meter, loss = Meter(), 0.0
        for mb in batch.micro_batches(share(batch), args.micro_batch_tokens):
            loss_, logp, entropy = losses(mb)
            micro_loss = loss_.sum() / batch.mask.numel()
            micro_loss.backward()
            loss += micro_loss.item()
            meter.add(dict(logp=logp, entropy=entropy), mb.trained)
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        if run.finite(gpu.total(loss), grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        run.write(meter.result(), batch.mask.numel(), dict(loss="loss", entropy="H"))

    run.finish()
    engine.close()
    if scorer:
        scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
