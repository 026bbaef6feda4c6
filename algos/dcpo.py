"""DCPO: Dynamic Clipping Policy Optimization. Yang et al., arXiv 2509.02333 (2025).

Idea: a fixed clip interval lets a rare token gain next to no probability and a common one far too much, so
each token gets its own interval, from its probability under the policy that sampled. Rewards are standardised
over the group and over all visits to the prompt so far, and the smaller of two blends is the advantage, so
that a group that is all right or all wrong still trains. Completions are averaged over their tokens and then
summed, since a mean over the group would blur their differences.

Objective, to be maximised (from the authors' README; equation numbers not at hand), q = pi_old of the token:
    J = sum_i 1/|y_i| sum_t min(r A, clip(r, lo, hi) A),   at least ratio_max A where A < 0
    lo = 1/2 + 1/2 sqrt(max(1 - 4 eps_low / q, 0)),   hi = min(1/2 + 1/2 sqrt(1 + 4 eps_high / q), ratio_max)
        (the roots of |r - 1| r q = eps)
    at the i-th visit to a prompt, A is the smaller in absolute value of
        (i-1)/i A_new + 1/i A_tot   and   1/i A_new + (i-1)/i A_tot,
    A_new = (R - mean) / std of the group,   A_tot the same over all visits, this one included
Why a blend: A_new rests on one group. By chance its rewards are all equal, and it is 0, or lopsided, and it
jumps from visit to visit. A_tot is steadier, but it remembers older policies: once all are right, all still
look better than usual. Each blend is one of the two with 1/i of the other.
Why the smaller: where they disagree, one is off, by chance or by age, and the smaller step is the safer one.
If they have one sign, as for rewards of 0 and 1, A is the smaller of A_new and A_tot with 1/i of the larger.
Where all rewards of the group are equal, A_new is 0 and A is A_tot / i: it trains, at each visit less. The
authors name chance alone; that A_tot ages is our reading.

Family: ratio
Differs from grpo.py in: advantages, bounds, surrogate, token_weights, train
Costs: three numbers per prompt, kept in the checkpoint. Before a prompt's second visit its advantages are GRPO's.
Run:   python algos/dcpo.py                                     tiny model, CPU, about a minute; no prompt comes twice
       python algos/dcpo.py --task addition:1                   41 prompts that come back every other step: see responses_used
       torchrun --nproc-per-node 8 algos/dcpo.py --model qwen2.5-7b
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

    # DCPO
    limits = dict(group_size="2 <= x: the completions of a prompt are compared with each other")
    eps_low: float = 0.16
    """how much probability, times the ratio, a token may lose (the authors' README)"""
    eps_high: float = 0.20
    """the same for a gain (the authors' README)"""
    ratio_max: float = 10.0
    """cap of the interval's upper end, and of the ratio where the advantage is negative (the authors' code)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, prompt_id, stats, args):
    """[P, G], [P] -> [P, G]: of two blends the one nearer to 0; a std of 0 makes its part 0. Counts one visit per
    group in stats, which is {id: (mean, std, visits)} and is changed in place."""
    adv = []
    for R, prompt in zip(rewards, prompt_id.tolist()):
        mean_tot, std_tot, i = stats.get(prompt, (0.0, 0.0, 0))
        mean, std, shift, i = R.mean().item(), R.std().item(), R.mean().item() - mean_tot, i + 1
        mean_tot = ((i - 1) * mean_tot + mean) / i
        std_tot = (((i - 1) * std_tot**2 + std**2 + (i - 1) / i * shift**2) / i) ** 0.5
        stats[prompt] = (mean_tot, std_tot, i)
        new = (R - mean) / std if std > 1e-6 else torch.zeros_like(R)
        tot = (R - mean_tot) / std_tot if std_tot > 1e-6 else torch.zeros_like(R)
        smooth_new, smooth_tot = ((i - 1) * new + tot) / i, (new + (i - 1) * tot) / i
        adv.append(torch.where(smooth_new.abs() < smooth_tot.abs(), smooth_new, smooth_tot))
    return torch.stack(adv)


def bounds(old_logp, args):
    """[B, T] -> lo, hi [B, T]: where |r - 1| r q meets eps_low and eps_high; a token of probability 0 gets 1/2 and the cap."""
    q = old_logp.exp()
    lo = 0.5 + 0.5 * (1 - 4 * args.eps_low / q).clamp(min=0).sqrt()
    hi = 0.5 + 0.5 * (1 + 4 * args.eps_high / q).sqrt()
    return lo, hi.clamp(max=args.ratio_max)


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    lo, hi = bounds(old_logp.masked_fill(~mask, 0.0), args)
    clipped = ratio.clamp(lo, hi)
    objective = torch.min(ratio * adv, clipped * adv)
    objective = torch.where(adv < 0, torch.max(objective, args.ratio_max * adv), objective)
    return objective, dict(clip_fraction=(objective != ratio * adv).float(), clip_low=lo, clip_high=hi)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over a completion's tokens, sum over completions: B times GRPO's. Adam does not see the factor,
    max_grad_norm does: the gradient is scaled down at nearly every update."""
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1)


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
    visited = run.state.setdefault("visited", {})  # mean, std and visits per prompt
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
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes: each of them keeps the same statistics.
        rewards_of, prompt_id = (gpu.gather(x).view(-1, args.group_size) for x in (batch.reward, batch.prompt_id))
        adv = advantages(rewards_of, prompt_id[:, 0], visited, args)
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
            if run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm, responses_used=(adv != 0).float().mean().item())
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
