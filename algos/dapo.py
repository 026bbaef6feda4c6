"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization. Yu et al., ByteDance Seed, arXiv 2503.14476 (2025).

Idea: four repairs of GRPO for long chains of thought: a higher clip, one weight for all tokens, groups that teach, and a soft
limit of length. The clip interval is wider above than below, so that unlikely tokens
can grow and entropy does not collapse, and every token of the batch weighs the same, so that long completions are not
diluted. Groups that are all right or all wrong have no advantage and are replaced by freshly sampled ones, and a
completion that comes close to the length limit loses reward gradually before it is cut.

Objective, to be maximised (Eq. 10 and 12), subject to 0 < number of right completions < G in every group (Eq. 11):
    J = 1/sum_i |y_i| sum_i sum_t min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
    A = (R - mean R) / std R over the group,   R = right or wrong + penalty(|y|)
    penalty(|y|) = clip((L_max - L_c - |y|) / L_c, -1, 0)   (Eq. 13; L_c = overlong_share L_max)
The paper averages over the tokens of a group; this is the authors' code: over those of the minibatch. Its reward is +1 or -1,
here 1 or 0 with half the penalty, which are the same advantages.

Family: ratio
Differs from grpo.py in: overlong_penalty, informative, surrogate, token_weights, train
Costs: up to max_gen_batches times the sampling per update; what is sampled beyond the P groups is thrown away. Each of W
       processes keeps P / W groups of its own; if one has fewer when the cap is reached, all go on with as many as it has.
Run:   python algos/dapo.py                                     tiny model, CPU, about two minutes
       python algos/dapo.py --model qwen2.5-1.5b                GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/dapo.py --model qwen2.5-7b
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

    # DAPO
    limits = dict(group_size="2 <= x: the completions of a prompt are compared with each other")
    eps_low: float = 0.2
    """the clip interval's reach below 1 (DAPO, Section 4.1)"""
    eps_high: float = 0.28
    """its reach above 1 (DAPO, Section 4.1)"""
    overlong_share: float = 0.25
    """L_c / L_max: the last part of max_new_tokens, in which the length penalty grows (DAPO: 4,096 of 20,480)"""
    overlong_weight: float = 0.5
    """the length penalty at L_max, for rewards of 0 and 1 (DAPO: 1, for rewards of -1 and 1); 0: no penalty"""
    max_gen_batches: int = 10
    """at most so many times P groups are sampled for an update (DAPO's script); 0: no filter, P groups as they come"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def overlong_penalty(lengths, args):
    """Tokens per completion -> penalty in [-1, 0], of the same shape. Eq. 13 of arXiv 2503.14476."""
    L_c = max(1.0, args.overlong_share * args.max_new_tokens)
    return ((args.max_new_tokens - L_c - lengths) / L_c).clamp(-1, 0)


def informative(accuracy, args):
    """[P, G] -> [P]: groups neither all right nor all wrong. Eq. 11, of the accuracy: the penalty sets wrong ones apart too."""
    return (accuracy.max(1).values > accuracy.min(1).values) | (args.max_gen_batches == 0)


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch. Eq. 12."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.beta > 0))
    policy = gpu.shard(models.load(args, device))
    reference = gpu.shard(models.load(args, device, trainable=False)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return rollout.evaluate(engine, scorer, tokenizer, task, args)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each, until every process has its share of informative groups.
        engine.wake()
        share, kept, n, rounds, right = args.prompts_per_step // gpu.world(), [], 0, 0, 0
        while not rounds or n < share and rounds < args.max_gen_batches:
            prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
            batch = rollout.collect(engine, scorer, tokenizer, prompts, args, run.state["cursor"])  # new noise every round
            run.state["cursor"] += args.prompts_per_step
            kept.append(batch.groups(informative(batch.accuracy.view(-1, batch.group), args).nonzero()[:, 0]))
            n = -gpu.maximum(-sum(len(b.reward) for b in kept) // args.group_size)  # of the process that has fewest
            rounds, right = rounds + 1, right + batch.accuracy.sum().item()
        n = min(n, share)
        if n:
            batch = batch.join(kept).groups(torch.arange(n))
            batch.reward = batch.reward + args.overlong_weight * overlong_penalty(batch.mask.sum(1), args)
        else:  # the last round is measured: of equal rewards all advantages are 0, and no update is made
            batch.reward = batch.reward.mean().expand_as(batch.reward)
        engine.sleep()
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, _ = read(policy, batch, args)
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

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            if adv.any() and run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        engine.sync()
        run.timed("update")
        generated = rounds * args.prompts_per_step * args.group_size
        sampled = dict(accuracy=gpu.total(right) / generated, generated=generated, groups=n * gpu.world())
        run.log(meter.result() | rollout.summary(batch) | sampled, batch)  # accuracy before the filter, as elsewhere

    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
