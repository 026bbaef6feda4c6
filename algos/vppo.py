"""VPPO: Visually-Perceptive Policy Optimization, "Spotlight on Token Perception for Multimodal Reinforcement Learning". Huang
et al., Shanghai AI Lab, arXiv 2510.09285 (2025).

Idea: learn from the tokens that need the picture, and more from completions that need it more. A token needs it as far as its
probability changes where half of the picture's patches are black. Of each completion the 40% of tokens with the greatest such
dependency carry the policy gradient, and its advantage is scaled by its mean dependency, by a factor whose mean is 1.

Objective, to be maximised (equation numbers not at hand), I the picture and I' the same with patches made black:
    J = 1/sum_i |y_i| sum_i sum_t [ M_it m_it + penalty log pi(y_t | q, I, y_<t) ]
    m = min(r A', clip(r, 1 - eps_low, 1 + eps_high) A'), at least 3 A' where A' < 0,   A'_i = alpha_i A_i
    S_it = e^d - d - 1, at most 10,   d = log pi_old(y_t | q, I', y_<t) - log pi_old(y_t | q, I, y_<t)
    M_it = 1 for the ceil(kappa |y_i|) tokens of completion i with the greatest S_it, else 0
    alpha_i = beta_min + (1 - beta_min) x_i / mean x,   x_i = (s_i - min s) / (max s - min s),   s_i = mean_t S_it
    A = (R - mean R) / std R over the group,   r = pi / pi_old,   min, max and mean over the minibatch

The penalty is on entropy: it makes all tokens that were sampled likelier. As in the authors' code, S is estimated from the
token that was sampled (--dependency kl: the KL of whole distributions, the paper's own definition), the mean is over all
tokens, kept or not (the paper's equation averages per completion), and there is the dual clip at 3 A'. In that code min and max
are of the minibatch and mean x is of a micro-batch; here all three are of the minibatch of all processes. Where a prompt has no
picture, M and alpha are 1; videos lose patches as pictures do, which there they do not. The authors also sample groups of equal
rewards anew, as dapo.py does; here these teach nothing. --mask random, entropy and lowest are controls. What is black in the
built-in scenes is where nothing is: there a patch made black takes a thing away.

Family: vision
Differs from grpo_vision.py in: dependency, pivotal, shaping, surrogate, read_twice, train
Same as dapo.py: token_weights
Measures: measure
Costs: one forward pass more per rollout, in which every completion has a picture of its own: G times the eyes' work there.
Run:   python algos/vppo.py                                     tiny model, CPU, about a minute
       python algos/vppo.py --kappa 1 --beta-min 1              all tokens, all alike: the paper's baseline
       python algos/vppo.py --model qwen2.5-vl-3b --task path/to/train.jsonl     rows with image, prompt, answer
       torchrun --nproc-per-node 8 algos/vppo.py --model qwen2.5-vl-7b --task path/to/train.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """tiny, an alias (qwen2.5-7b, qwen3-8b-base, llama-3.1-8b-instruct, ...), a hub id, or a local folder"""
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
    epochs: int = 1
    """passes over each rollout"""
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
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 1.0
    """of sampling, and of every log-prob; no top-p: samples of a cut distribution are not those that log-probs are of"""
    format_reward: float = 0.0
    """added to the reward of a completion that states its answer in a recognised form"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    tis_cap: float = 2.0
    """truncated importance sampling: cap of pi_old / pi_sampler where the engine is vLLM; 0: off"""
    tis_level: Literal["token", "sequence"] = "token"
    """token: a ratio for each; sequence: one for the whole completion, where the objective moves it as one"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
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

    # VPPO
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other",
        kappa="0 < x <= 1", beta_min="0 <= x <= 1", blacken="0 <= x <= 1", image_tokens="4 <= x",
    )  # fmt: skip
    sees = True
    hf_only = "pictures in its prompts"
    tiny_preset = dict(task="count_sum:noisy", steps=40, prompts_per_step=16, minibatches=2, lr=3e-4, eval_every=10)
    real_preset = dict(task=None)
    eps_low: float = 0.2
    """the clip interval's reach below 1 (the authors' script)"""
    eps_high: float = 0.28
    """its reach above 1 (the authors' script)"""
    image_tokens: int = 1280
    """a picture of more tokens is made smaller (Qwen2.5-VL's own advice)"""
    freeze_vision: bool = False
    """leave the eyes as they are, and train what reads their embeddings (ours)"""
    kappa: float = 0.4
    """share of a completion's tokens that carry the policy gradient (the paper); 1: all"""
    mask: Literal["dependency", "random", "entropy", "lowest"] = "dependency"
    """which tokens these are: those of most dependency (the paper), any, of most entropy, or of least dependency: controls"""
    beta_min: float = 0.9
    """what a completion of least dependency has its advantage multiplied by (the paper); 1: all alike"""
    blacken: float = 0.5
    """probability that a patch is made black (the paper)"""
    dependency: Literal["k3", "kl"] = "k3"
    """S: an estimate from the sampled token (the authors' code), or the KL over the vocabulary (the paper's definition)"""
    penalty: float = 0.06
    """weight of the entropy's penalty (the paper, its baseline too); 0: none"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def dependency(targets, logits, dark, args):
    """targets [n], logits [n, V] on the pictures and on darkened ones -> log-probs on the pictures, entropy, S, [n] each."""
    dark, logp = dark.log_softmax(-1), logits.log_softmax(-1)
    old_logp, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    if args.dependency == "kl":
        return old_logp, entropy, (logp.exp() * (logp - dark)).sum(1).clamp(min=0)
    d = (dark.gather(1, targets[:, None])[:, 0] - old_logp).clamp(-20, 20)
    return old_logp, entropy, (d.exp() - d - 1).clamp(0, 10)


def pivotal(score, mask, kappa):
    """[B, T] each -> M [B, T] bool: the share kappa, rounded up, of a row's tokens that score most, of equal ones the first."""
    rank = score.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return mask & (rank < (kappa * mask.sum(1, keepdim=True) - 1e-4).ceil())


def shaping(S, mask, args):
    """[B, T] each, of a whole minibatch -> alpha [B], of mean 1; 1 where nothing is to tell apart, and of empty rows."""
    lengths, alpha = mask.sum(1), S.new_ones(len(S))
    some = lengths > 0
    s = S.masked_fill(~mask, 0.0).sum(1)[some] / lengths[some]
    if len(s) < 2 or s.max() - s.min() <= 1e-6:
        return alpha
    x = (s - s.min()) / (s.max() - s.min())
    return alpha.masked_scatter(some, args.beta_min + (1 - args.beta_min) * x / (x.mean() + 1e-8))


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high)
    objective = torch.min(ratio * adv, clipped * adv)
    objective = torch.where(adv < 0, torch.max(objective, 3 * adv), objective)  # the authors' dual clip
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch. Eq. 12."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def read_twice(policy, batch, step, args):
    """-> log-probs, entropy and S of a rollout's tokens, and a random number of each, [B, T]. What is drawn is a function of
    (seed, step, prompt, completion)."""
    from dataclasses import replace

    from common import gpu
    from common.batch import read

    numbers = [(prompt, row % batch.group) for row, prompt in enumerate(batch.prompt_id.tolist())]
    draws = [torch.Generator().manual_seed(gpu.hash_seed(args.seed, step, *n, 19)) for n in numbers]
    chance = torch.stack([torch.rand(args.max_new_tokens, generator=g) for g in draws])[:, : batch.mask.shape[1]]

    def dark(mb, args):
        look = policy.pictures.processor.image_processor
        black = -torch.tensor(look.image_mean) / torch.tensor(look.image_std)

        def change(patches, grid, row):
            gone = torch.rand(len(patches), 1, generator=draws[mb.row[row]]) < args.blacken
            return torch.where(gone, black.repeat_interleave(patches.shape[1] // len(black)), patches)

        unlike = policy.pictures.varied(mb, change)
        states = policy(unlike.ids, unlike.attention_mask, unlike.mask, states=True)
        return dict(read=lambda *x: dependency(*x, args), beside=[(policy, states)])

    # Cut row by row: in the dark no two rows share their prompt.
    return *read(policy, replace(batch, prompt_id=None), args, how=dark), chance.to(batch.ids.device)


def measure(meter, mb):
    """Dependency in the mean and of the tokens kept (their sum over all tokens), the share that is kept, and the shaping."""
    S, M = mb.columns["dependency"], mb.columns["pivotal"].float()
    alpha = mb.columns["shaping"][:, None].expand_as(S)
    meter.add(dict(dependency=S, dependency_kept=S * M, kept=M, shaping=alpha, shaping_max=alpha), mb.trained)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, vision
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    processor = vision.load_processor(args, args.image_tokens)
    tokenizer = processor.tokenizer
    task, pictures = vision.load(args, processor)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, processor, context, frozen=int(args.beta > 0))
    policy = gpu.shard(vision.look(models.load(args, device), task, pictures, args.freeze_vision))
    reference = None
    if args.beta > 0:
        reference = gpu.shard(vision.look(models.load(args, device, trainable=False), task, pictures))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
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

        # Log-probs of the policy that sampled, with the pictures and beside darkened ones, and of the reference.
        batch.old_logp, entropy, S, chance = read_twice(policy, batch, step + len(run.queue), args)
        score = dict(dependency=S, lowest=-S, entropy=entropy, random=chance)[args.mask]
        blind = ~(batch.ids < -1).any(1, keepdim=True)
        batch.columns |= dict(dependency=S, pivotal=pivotal(score, batch.mask, args.kappa) | blind & batch.mask)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
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
        batch.adv = A = batch.adv * batch.columns["pivotal"]

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        for rows, weights in minibatches(batch, args, step, token_weights):
            # Shaping is over the minibatch of all processes: rows outside it have weight 0.
            sighted = (weights > 0) & (batch.ids < -1).any(1, keepdim=True)
            alpha = gpu.local(shaping(gpu.gather(batch.columns["dependency"]), gpu.gather(sighted), args))
            batch.adv, batch.columns["shaping"] = batch.adv.where(weights == 0, A * alpha[:, None]), alpha
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                objective = objective + args.penalty * logp  # the mean of -log pi is penalised: gradient through it
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
                measure(meter, mb)
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
