"""ARES: "Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping", its RL stage AEPO (Adaptive Entropy
Policy Optimization). Chen et al., arXiv 2510.08457 (2025).

Idea: hesitate less on easy prompts and more on hard ones. Windows in which the policy stays unsure are counted, and a wrong
completion loses reward for more of them than usual where its group is mostly right, for fewer where it is mostly wrong, for
either in between. Inside such windows the penalty that holds the policy to the starting model is relaxed.

Objective, to be maximised (DAPO's, with another reward and a weighted penalty; equation numbers not at hand):
    J = 1/sum_i |y_i| sum_i sum_t [ min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) - beta beta_d rho_t k3(pi, pi_ref) ]
    R = 1 where right, else -lambda_d g_d(D),   D = N - target_d,   N = number of windows with (H_t + ... + H_{t+w-1}) / w > tau
    g = max(0, D) easy, |D| medium, max(0, -D) hard;   lambda_d = clip((mean N - target_d) / (var N + 1e-6), 0, 1), - if hard
    d: easy if at least 6/8 of the group is right (a score above 0.5), medium if 3/8, else hard; mean, var: of completions in d
    rho_t = rho inside a window above tau, 1 elsewhere

The reward is the paper's; the authors' code has another one, no rho, and a beta_d that adapts. The paper also branches;
that code does not, nor does this script, which has no images and no dual clip either. If target_d were this rollout's mean N,
lambda would be 0: target and tau are running means over the rollouts before. For hard groups the difference in lambda is turned
round, so that too few windows activate it (our reading). tau averages, over completions, a quantile of window means, as in the
code; the paper takes it of single entropies (--tau-of tokens). On route unsure tokens stand alone: N would be 0.

Family: tokens
Differs from dapo.py in: beta, window_entropy, quantiles, threshold, difficulty, assigned, shaping, kl_weights, train
Measures: measure
Costs: DAPO's, and a frozen reference model; the scoring pass has the entropies.
Run:   python algos/ares.py                                     tiny model, CPU, about two minutes
       python algos/ares.py --buckets shuffled                  the control
       python algos/ares.py --model qwen2.5-1.5b                GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/ares.py --model qwen2.5-7b
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
    beta: float = 0.01
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

    # ARES
    limits = dict(group_size="2 <= x: the completions of a prompt are compared with each other", rho="0 <= x <= 1")
    limits |= dict(window="1 <= x", percentile="0 <= x <= 1", decay="0 <= x < 1")
    eps_low: float = 0.2
    """the clip interval's reach below 1 (the authors' code)"""
    eps_high: float = 0.3
    """its reach above 1 (the authors' code)"""
    overlong_share: float = 0.25
    """L_c / L_max: the last part of max_new_tokens, in which DAPO's length penalty grows (arXiv 2503.14476)"""
    overlong_weight: float = 0.0
    """the length penalty at L_max, for rewards of 0 and 1; 0: no penalty (the authors' code)"""
    max_gen_batches: int = 10
    """at most so many times P groups are sampled for an update (arXiv 2503.14476); 0: no filter, P groups as they come"""
    window: int = 4
    """w, tokens in a window (the authors' code; the paper: 4 to 8 do best)"""
    percentile: float = 0.95
    """which quantile of a completion's entropies enters tau (the paper)"""
    tau_of: Literal["windows", "tokens"] = "windows"
    """whose quantile: the windows' (the authors' code), or the single tokens' (the paper)"""
    decay: float = 0.9
    """share of the old mean that stays in target and tau at a rollout (ours; the authors' code: 0.99, for tau)"""
    rho: float = 0.5
    """factor of the KL penalty inside windows above tau (the paper: below 1, its value could not be found); 1: none"""
    bucket_beta: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """beta_d: factors of the KL penalty for easy, medium and hard groups (the paper's could not be found)"""
    buckets: Literal["accuracy", "shuffled"] = "accuracy"
    """shuffled: the groups exchange their difficulties at random, a control"""


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


def window_entropy(entropy, mask, args):
    """[B, T] each -> [B, T]: the mean over a token and the w - 1 after it; -inf where the completion ends before the window."""
    more, w = (0, args.window - 1), args.window
    mean = torch.nn.functional.pad(entropy, more).unfold(1, w, 1).mean(-1)
    return mean.masked_fill(~torch.nn.functional.pad(mask, more).unfold(1, w, 1).all(-1), float("-inf"))


def quantiles(entropy, windows, mask, args):
    """[B, T] each -> the quantile of each row, as a list; rows without a window (or token) are left out."""
    none = float("-inf")
    values = windows if args.tau_of == "windows" else entropy.masked_fill(~mask, none)
    return [row[row > none].quantile(args.percentile).item() for row in values if (row > none).any()]


def threshold(before, total, count, args):
    """tau so far (None: there is none), sum and number of this rollout's quantiles -> (tau for it, tau for the next)."""
    if not count:
        return before or float("inf"), before
    tau = before or total / count
    return tau, args.decay * tau + (1 - args.decay) * total / count


def difficulty(right):
    """[P, G], 1 where right -> [P]: 0 easy, 1 medium, 2 hard; of 8 at least 6, 3 and 0 are right."""
    share = right.mean(1) + 1e-6
    return 2 - (share >= 3 / 8).long() - (share >= 6 / 8).long()


def assigned(bucket, args, seed):
    """[P] -> [P]: as it is, or with --buckets shuffled permuted by the seed."""
    order = torch.randperm(len(bucket), generator=torch.Generator().manual_seed(seed)).to(bucket.device)
    return bucket if args.buckets == "accuracy" else bucket[order]


def shaping(counts, right, bucket, targets, args):
    """N [P, G], right [P, G], bucket [P], {bucket: target} -> (what rewards lose [P, G], lambda [P], the next targets)."""
    taken, lam, after = torch.zeros_like(counts), torch.zeros_like(counts[:, 0]), dict(targets)
    for d in bucket.unique().tolist():
        at, n = bucket == d, counts[bucket == d]
        target = targets.get(d, n.mean().item())  # at first its own mean: lambda is 0
        delta = n - target
        surplus = (n.mean() - target) * (-1 if d == 2 else 1)
        lam[at] = (surplus / (delta.var(correction=0) + 1e-6)).clamp(0, 1)
        taken[at] = lam[at][:, None] * (delta.clamp(min=0), delta.abs(), (-delta).clamp(min=0))[d]
        after[d] = args.decay * target + (1 - args.decay) * n.mean().item()
    return taken * (1 - right), lam, after


def kl_weights(high, bucket, args):
    """High [B, T] bool, at a window's first token, and buckets [B] -> beta_d rho_t [B, T]: rho in all of a high window."""
    inside = torch.nn.functional.pad(high, (args.window - 1, 0)).unfold(1, args.window, 1).any(-1)
    return torch.tensor(args.bucket_beta, device=bucket.device)[bucket][:, None] * (1 - (1 - args.rho) * inside.float())


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


def measure(meter, batch, state):
    """Of groups that are easy, medium and hard by their accuracy: their share, N, lambda, accuracy, length and KL weight; 0 of
    those that there are none of. And the tau of the next rollout."""
    columns = dict(n_he=batch.columns["n_he"], lam=batch.columns["lam"], accuracy=batch.accuracy)
    columns |= dict(length=batch.mask.sum(1).float())
    bucket = difficulty((batch.accuracy > 0.5).float().view(-1, batch.group)).repeat_interleave(batch.group)
    for d, name in enumerate(("easy", "medium", "hard")):
        meter.add({f"{key}_{name}": value for key, value in columns.items()}, bucket == d)
        meter.add({f"kl_weight_{name}": batch.columns["kl_weight"]}, batch.mask & (bucket == d)[:, None])
        meter.add({f"share_{name}": (bucket == d).float()}, bucket >= 0)
    meter.note(tau=state.get("tau") or 0.0)


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
        batch.old_logp, entropy = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        run.timed("old_logp")

        # Reward by difficulty, all ranks' groups together, against statistics of the rollouts before this one.
        windows = window_entropy(entropy, batch.mask, args)
        found = quantiles(entropy, windows, batch.mask, args)
        tau, after = threshold(run.state.get("tau"), gpu.total(sum(found)), gpu.total(len(found)), args)
        high = windows > tau
        solved, counts = (gpu.gather(x.float()).view(-1, batch.group) for x in (batch.accuracy > 0.5, high.sum(1)))
        bucket = assigned(difficulty(solved), args, gpu.hash_seed(args.seed, step, 17))
        taken, lam, targets = shaping(counts, solved, bucket, run.state.setdefault("targets", {}), args)
        lam, bucket = (gpu.local(x.repeat_interleave(batch.group)) for x in (lam, bucket))
        batch.columns |= dict(n_he=high.sum(1).float(), lam=lam, kl_weight=kl_weights(high, bucket, args))
        if n:  # else no group teaches, and none counts
            batch.reward = batch.reward - gpu.local(taken.flatten())
            run.state |= dict(targets=targets, tau=after)

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
        measure(meter, batch, run.state)
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * mb.columns["kl_weight"] * stats["ref_kl"]
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
