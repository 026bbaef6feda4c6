"""GTPO: Group-relative Trajectory-based Policy Optimization. Simoni, Fontana, Rossolini and Saracino, arXiv 2508.03772 (2025).

Idea: where right and wrong completions of a prompt begin or end with the same tokens, do not let the wrong ones push these
tokens down, and let the right ones push them up twice. Without it a form that all completions share is damaged by those that
fail for another reason. Completions whose entropy is too high are left out, the others pay a little for theirs, and there is
neither clipping nor a reference model.

Objective, to be maximised (equation numbers not at hand):
    J = 1/B sum_i delta_i (A_i - gamma H_i) 1/|y_i| sum_t r lambda_it,   r = pi / sg[pi]: its value is 1, its gradient log pi's
    A = R - mean R over the group,   H_i = mean entropy of the policy over the tokens of y_i, in nats, a constant
    delta_i = 1[H_i <= ln 2], or 1 for all if the initial policy's mean H (that of the first rollout) was above ln 2
    lambda_it: a token is in conflict if a completion with A > 0 and one with A < 0 have it at the same place, counted from the
    start or from the end. Lambda is 2 (A > 0) or 0 (A < 0) in the unbroken run of conflicts at the start, and at the end; where
    the runs overlap it is squared; elsewhere 1

This is the formula; the authors' code sums over a group, divides by the number of conflict tokens too, has 0.7 for ln 2 and no
exception for the initial policy. Groups with equal rewards are left out here: the formula says only -gamma H of them. The paper
updates once per rollout (--minibatches 1). grpo.py's minibatches are kept: H and lambda stay those of the rollout, and nothing
corrects for pi moving on, since r is always 1. The paper's gamma is for rewards up to 20. With 0 and 1 a right completion has
A >= 1/G, so that its advantage stays positive if gamma ln 2 < 1/G and the filter is on: for G up to 14.

Family: tokens
Differs from grpo.py in: advantages, mean_entropy, admitted, shaped, shared_run, conflicts, surrogate, token_weights, train
Measures: measure
Costs: nothing extra: the scoring pass has the entropies.
Run:   python algos/gtpo.py                                     tiny model, CPU, about a minute
       python algos/gtpo.py --model qwen2.5-1.5b                GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/gtpo.py --model qwen2.5-7b
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

    # GTPO
    limits = dict(group_size="2 <= x: the completions of a prompt are compared with each other")
    gamma: float = 0.1
    """what a nat of mean entropy costs in advantage (the paper)"""
    max_entropy: float = 0.693147
    """a completion with more nats per token than this is left out (the paper: ln 2); none, if more is usual at the start"""
    conflict_right: float = 2.0
    """lambda of a right completion in a run that it shares with a wrong one (the paper); 1: none"""
    conflict_wrong: float = 0.0
    """the same of a wrong one (the paper); 1: none"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: centred in the group, not divided by its std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred, torch.zeros_like(rewards))


def mean_entropy(entropy, mask):
    """H_i, [B, T] each -> [B]: mean over a completion's tokens; 0 of an empty one."""
    return entropy.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def admitted(entropy, initial, args):
    """delta_i, H_i [P, G] and the initial policy's mean -> [P, G] bool."""
    return (entropy <= args.max_entropy) | (initial > args.max_entropy)


def shaped(adv, entropy, delta, args):
    """A_i, H_i, delta_i [P, G] -> [P, G]: delta (A - gamma H); 0 in groups with equal rewards."""
    return delta * (adv - args.gamma * entropy) * adv.any(1, keepdim=True)


def shared_run(ids, mask, adv):
    """ids, mask [P, G, T], A [P, G] -> [P, G, T]: 1 in the run of conflict tokens that begins at the first one, else 0."""
    same = (ids[:, :, None] == ids[:, None]) & mask[:, :, None] & mask[:, None]  # [P, G, G, T], each with each
    right, wrong = ((same & side[:, None, :, None]).any(2) for side in (adv > 1e-6, adv < -1e-6))
    return (right & wrong).cumprod(2)


def conflicts(ids, mask, adv, args):
    """ids, mask [B, T] of whole groups, A [P, G] -> lambda [B, T]; 1 in the padding."""
    ids, mask = (x.unflatten(0, adv.shape) for x in (ids, mask))
    mirror = (mask.sum(2, keepdim=True) - 1 - torch.arange(mask.shape[2], device=mask.device)).clamp(min=0)
    suffix = shared_run(ids.gather(2, mirror), mask, adv).gather(2, mirror) * mask  # reversed, and back
    weight = torch.where(adv > 1e-6, args.conflict_right, torch.where(adv < -1e-6, args.conflict_wrong, 1.0))
    return (weight[:, :, None] ** (shared_run(ids, mask, adv) + suffix)).flatten(0, 1)  # 0 ** 0 is 1: outside the runs


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token); old_logp has no part in it."""
    ratio = (logp - logp.detach()).masked_fill(~mask, 0.0).exp()
    return ratio * adv, {}


def token_weights(mask, args, conflict):
    """[B, T] each -> [B, T]: lambda / tokens of a completion, mean over completions; empty completions do not count."""
    lengths = mask.sum(1, keepdim=True)
    return conflict.masked_fill(~mask, 0.0) / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def measure(meter, batch, delta):
    """Shares of conflict tokens and of those lifted, the entropy of conflict tokens and of the others, mean delta."""
    conflict, old = batch.columns["conflict"], batch.columns["old_entropy"]
    meter.add(dict(conflict=(conflict != 1).float(), lifted=(conflict > 1).float()), batch.mask)
    meter.add(dict(entropy_conflict=old), batch.mask & (conflict != 1))
    meter.add(dict(entropy_rest=old), batch.mask & (conflict == 1))
    meter.note(delta=delta.float().mean().item())


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
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, batch.columns["old_entropy"] = read(policy, batch, args)
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
        completions = batch.ids[:, -batch.mask.shape[1] :]
        batch.columns["conflict"] = conflicts(completions, batch.mask, gpu.local(adv), args)
        entropy = gpu.gather(mean_entropy(batch.columns["old_entropy"], batch.mask)).view_as(adv)
        delta = admitted(entropy, run.state.setdefault("initial_entropy", entropy.mean().item()), args)
        adv = shaped(adv, entropy, delta, args)
        batch.adv = gpu.local(adv.flatten())[:, None].expand_as(batch.old_logp)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch, delta)
        for rows, weights in minibatches(batch, args, step, token_weights, ["conflict"]):
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
