"""GDPO: Group Diffusion Policy Optimization. Rojas, Lin, Rasul, Schneider, Nevmyvaka, Tao and Deng, "Improving Reasoning for
Diffusion Language Models via Group Diffusion Policy Optimization", arXiv 2510.08554 (2025).

Idea: bring GRPO to a model that fills in masked positions in any order, and whose probability of a completion nobody can
compute. A lower bound of it, the ELBO, takes its place, an integral over the share t of what is masked. Most of the noise of
its estimates is t's, so t is not drawn but set to the two or three nodes of a quadrature, and only the masks are random.

Objective, to be maximised (equation numbers not at hand), of a completion y of L tokens, its filler behind EOS included:
    J = 1/B sum_i min(r A, clip(r, 1 - eps, 1 + eps) A) - beta (e^l - l - 1),   A = R - mean R over the group
    r = exp((E - E_old) / L),   l = (E_ref - E) / L,   all under the same masks, which are new in every pass over the rollout
    E = sum_n w_n/K sum_k 1/t_n sum_(j in m_nk) log pi(y_j | y without m_nk, q),   m_nk: floor(t_n L) random positions
    two nodes t = 1/2 -+ 1/12^.5, w = 1/2;   three: t = 1/2 -+ .15^.5, 1/2, w = 5/18, 5/18, 4/9
    double Monte Carlo (--likelihood double_mc): the t_n uniform in (0, 1), w_n = 1/N
    diffu-GRPO (--likelihood diffu, the baseline): r = pi(y_j | all of y masked, q with masks) / pi_old of every token, up to
    the first EOS; the mean over all of them

The weight 1/t is the code's. With --exact-count it is L / |m|: floor(t L) of 8 positions are not t of them. The clip is on the
sequence and never on single terms, which weigh up to 1/t. With beta > 0 the released code does not divide l by L; its runs have
beta = 0. d1's code samples at temperature 0.9 and scores at 1; here both are at --temperature. For a short canvas E is known
exactly: the mean over the sets of k positions of their sum of log-probs, divided by k, added up over k = 1..L.

Family: diffusion
Differs from grpo.py in: model, epochs, stop, engine, tis_cap, tis_level, vllm_memory, vllm_tp, quadrature,
    mask_weights, mask_sets, likelihood, score, turn, train
Same as dr_grpo.py: advantages
Same as dapo.py: token_weights
Same as mdlm.py: schedule, unmask
Costs: nodes x draws passes over whole canvases with a gradient, their activations held together, and as many without one for
       every pass over the rollout; to sample, as many as --denoising-steps, since nothing can be cached. No engine serves it.
Run:   python algos/gdpo.py                                     tiny model, CPU, about a minute
       python algos/gdpo.py --model qwen3-0.6b-mdlm             GSM8K on one GPU
       python algos/gdpo.py --model llada-8b --lora-rank 128 --lora-alpha 64 --lr 3e-6 --eps 0.5 --max-grad-norm 0.2     as d1
       torchrun --nproc-per-node 8 algos/gdpo.py --model dream-7b
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
    """route, titles, chain, addition[:digits], countdown[:n], gsm8k, math, reasoning_gym:<name>, a .jsonl file; None: preset"""
    reward: str | None = None
    """file.py:function of your own: (text, answer) -> score, or (answer that was read, score); a cut completion scores 0"""
    prompt_template: str | None = None
    """format string with the field {prompt}, applied before the tokenizer's chat template; None: the task's"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    seed: int = 1
    """seed of the prompts' order, the sampling and the minibatches"""
    steps: int | None = None
    """rollouts in all; None here and below: the preset of the model"""
    prompts_per_step: int | None = None
    """prompts in a rollout, of all processes together (P)"""
    group_size: int | None = None
    """G, completions per prompt"""
    minibatches: int | None = None
    """optimizer steps per pass over a rollout; with 1 and one epoch the ratio is 1 and most methods are the same"""
    epochs: int | None = None
    """passes over each rollout, the inner iterations: new masks for each"""
    stale: int = 0
    """train on rollouts that are this many steps old (0: fresh); the queue is filled before the first update"""
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
    beta: float = 0.0
    """weight of the KL penalty to the starting model; above 0 a frozen reference is kept"""
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    temperature: float = 1.0
    """of sampling, and of every log-prob; no top-p: samples of a cut distribution are not those that log-probs are of"""
    format_reward: float = 0.0
    """added to the reward of a completion that states its answer in a recognised form"""
    eval_every: int | None = None
    """steps between greedy evaluations; 0: only before and after"""
    eval_prompts: int = 512
    """held-out prompts, at most"""
    eval_samples: int = 0
    """also samples N completions of each: avg@N (their mean) and pass@N (whether one is right); 0: the greedy one only"""
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
    micro_batch_tokens: int | None = None
    """tokens in one forward pass of the trainer; a prompt that its completions share counts once"""

    # GDPO
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", nodes="1 <= x <= 3", draws="1 <= x",
        denoising_steps="1 <= x", p_mask_prompt="0 <= x <= 1",
    )  # fmt: skip
    tiny_preset = dict(
        task="sums", steps=80, prompts_per_step=16, minibatches=1, epochs=2, eval_every=10, denoising_steps=8, block_length=0
    )  # fmt: skip
    real_preset = dict(
        prompts_per_step=16, minibatches=1, epochs=8, max_new_tokens=256, denoising_steps=128, block_length=32
    )  # fmt: skip
    eps: float = 0.2
    """half-width of the clip interval (default of d1's code; its configs: 0.5)"""
    likelihood: Literal["sdmc", "double_mc", "diffu"] = "sdmc"
    """sdmc: t at fixed nodes; double_mc: as many random t; diffu: single tokens, in one pass with all masked (diffu-GRPO)"""
    nodes: int = 2
    """N, values of t, 1 to 3 (the paper: 2 or 3; its code: 2)"""
    draws: int = 1
    """K, masks for each t (the paper); nodes x draws passes of the model for a likelihood"""
    exact_count: bool = True
    """weighs by L / |m|, the share that is masked (ours: of 8 positions, with two nodes, half the bias and twice the variance);
    else by 1/t, as the code, and double_mc masks every position with probability t, not 1 + floor(t L) of them"""
    p_mask_prompt: float = 0.15
    """diffu: chance of a prompt's token to be masked (d1's configs; default of its code: 0.3)"""
    denoising_steps: int | None = None
    """passes of the model over which a canvas is filled"""
    block_length: int | None = None
    """positions of a block; blocks are filled from the left; 0: the whole canvas at once"""
    order: Literal["confidence", "random", "left"] = "confidence"
    """which masked positions of a block a step reveals: those with the likeliest tokens, random ones, or the first"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: centred in the group, not divided by its std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred, torch.zeros_like(rewards))


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch. Eq. 12."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def quadrature(n):
    """-> nodes t and weights w [n] of Gauss and Legendre's rule on [0, 1]."""
    x = {1: (0.0,), 2: (-((1 / 3) ** 0.5), (1 / 3) ** 0.5), 3: (-(0.6**0.5), 0.0, 0.6**0.5)}[n]
    w = {1: (2.0,), 2: (1.0, 1.0), 3: (5 / 9, 8 / 9, 5 / 9)}[n]
    return (torch.tensor(x) + 1) / 2, torch.tensor(w) / 2


def mask_weights(noise, args):
    """noise [..., N K, 1 + L] in [0, 1) -> [..., passes, L]: what a position's log-prob weighs, 0 where it is not masked."""
    place, (t, w) = noise[..., 1:], (x.repeat(args.draws)[:, None] for x in quadrature(args.nodes))
    if args.likelihood == "diffu":
        return torch.ones_like(place[..., :1, :])
    L, count = place.shape[-1], (t * place.shape[-1]).floor().clamp(min=1)
    if args.likelihood == "double_mc":
        t, w = noise[..., :1].clamp(min=1e-3), 1 / args.nodes  # else 1/t has no variance
        count = 1 + (t * L).floor() if args.exact_count else (place < t).sum(-1, keepdim=True)
    share = count / L if args.exact_count else t
    return torch.where(place.argsort(-1).argsort(-1) < count, w / args.draws / share, 0.0)


def mask_sets(batch, context, ends, seed, args):
    """Draws the canvases' masks for each pass over the rollout, by a row's number among those of all processes."""
    from common import gpu

    chance, n, L = torch.Generator().manual_seed(seed), args.prompts_per_step * args.group_size, args.max_new_tokens
    weights = mask_weights(torch.rand(n, args.epochs, args.nodes * args.draws, 1 + L, generator=chance), args)
    hidden = torch.rand(n, 1, args.epochs, context - L, generator=chance) < args.p_mask_prompt
    sets = dict(weights=weights.movedim(-1, 1), hidden=hidden & (args.likelihood == "diffu"))
    batch.columns |= {name: gpu.local(x).to(batch.ids.device) for name, x in sets.items()}
    if args.likelihood == "diffu":
        ended = torch.isin(batch.ids[:, -L:], batch.ids.new_tensor(ends)).long()
        batch.trained = batch.mask & (ended.cumsum(1) == ended)


def likelihood(policy, mb, epoch, mask_id, args):
    """-> [b, L] each: E / L of a canvas at all its positions, so that the ratio of each is the sequence's, and mean entropy
    of what was guessed; diffu: log-probs and entropies of single tokens."""
    L, weights = mb.mask.shape[1], mb.columns["weights"][:, :, epoch]
    prompt, clean, found = mb.ids[:, :-L], mb.ids[:, -L:], []
    prompt = prompt.masked_fill(mb.columns["hidden"][:, 0, epoch, -prompt.shape[1] :], mask_id)
    for masked in (weights > 0).unbind(2):
        canvas = torch.cat([prompt, clean.masked_fill(masked, mask_id)], 1)
        found.append(policy(canvas, mb.attention_mask, masked, args.temperature, given=clean))
    logp, entropy = (torch.stack(x, 2) for x in zip(*found))
    if args.likelihood == "diffu":
        return logp[:, :, 0], entropy[:, :, 0]
    mean = (weights * logp).sum((1, 2)) / L, entropy.sum((1, 2)) / (weights > 0).sum((1, 2)).clamp(min=1)
    return tuple(x[:, None].expand(-1, L) for x in mean)


@torch.no_grad()
def score(batch, models, mask_id, args):
    """Columns [B, L, epochs] of these names: likelihoods under those of the models that there are, and each pass's masks."""
    every = torch.arange(len(batch.ids), device=batch.ids.device)
    for name, policy in [pair for pair in models.items() if pair[1]]:
        for mb in batch.micro_batches(every, args.micro_batch_tokens):
            found = torch.stack([likelihood(policy, mb, epoch, mask_id, args)[0] for epoch in range(args.epochs)], 2)
            batch.columns.setdefault(name, found.new_zeros(len(every), *found.shape[1:]))[mb.row] = found
        if hasattr(policy, "reshard"):
            policy.reshard()
    turn(batch, 0)


def turn(batch, epoch):
    """Puts the likelihoods under the masks of this pass in their places. The sampler is the policy itself, and has no log-probs
    of whole canvases: the gap to it is 0 by definition."""
    batch.old_logp = batch.sampler_logp = batch.columns["old"][:, :, epoch]
    batch.ref_logp = batch.columns["ref"][:, :, epoch] if "ref" in batch.columns else None
    return epoch


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


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import diffusion, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches

    args, config, device = settings.prepare(__file__, args, diffusion.world)
    tokenizer = models.load_tokenizer(args, diffusion.world)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.beta > 0))
    policy = gpu.shard(models.load(args, device, warm=diffusion.world, denoiser=True))
    reference = gpu.shard(models.load(args, device, False, diffusion.world, denoiser=True)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = diffusion.Canvas(policy, tokenizer, args, unmask)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return rollout.evaluate(engine, scorer, tokenizer, task, args)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Masks for every pass over this rollout, and what the policy that sampled, and the reference, make of them.
        mask_sets(batch, context, engine.end, gpu.hash_seed(args.seed, step + len(run.queue), 17), args)
        score(batch, dict(old=policy, ref=reference), engine.mask_id, args)
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        adv = advantages(gpu.gather(batch.reward).view(-1, args.group_size), args)
        batch.adv = gpu.local(adv.flatten())[:, None].expand_as(batch.old_logp)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        parts = list(minibatches(batch, args, step, token_weights))
        for i, (rows, weights) in enumerate(parts):
            epoch = turn(batch, i * args.epochs // len(parts))
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens // (args.nodes * args.draws)):
                logp, entropy = likelihood(policy, mb, epoch, engine.mask_id, args)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            if run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        engine.sync()
        run.timed("update")
        run.log(meter.result() | rollout.summary(batch), batch)

    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
