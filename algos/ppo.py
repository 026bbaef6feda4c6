"""PPO: Proximal Policy Optimization, for language models. Schulman et al., arXiv 1707.06347 (2017); GAE: arXiv 1506.02438.

Idea: one completion per prompt, and a second network, the critic, that says at every token how much reward is still to
come. A token's advantage is how much better things went from there on than the critic had said, blurred over the tokens
ahead by lambda. The clip takes the incentive away from moving a token's probability far within one rollout.

Objective, to be maximised (as restated in arXiv 2402.03300, Eq. 1 and 2); V is trained beside it on the loss below:
    J = 1/N sum min(r A, clip(r, 1 - eps, 1 + eps) A) over all N tokens,   r = pi / pi_old
    A_t = d_t + gamma lambda A_{t+1},  d_t = R_t + gamma V_{t+1} - V_t,  V = 0 after the last token;  then A is whitened
    R_t = -beta log(pi_old / pi_ref) at every token, plus the score at the last one
    L_V = 1/2 1/N sum max((V - G)^2, (clip(V, V_old - eps_value, V_old + eps_value) - G)^2),   G = A + V_old, A not whitened

Family: ratio
Base: GRPO came out of this script by dropping the critic and letting a group of completions be the baseline.
Differs from grpo.py in: prompts_per_step, group_size, token_rewards, gae, advantages, token_weights, kl_penalty,
    value_loss, explained_variance, Critic, train
Costs: a critic as large as the policy: its weights, gradients and optimizer, and a forward and backward pass of its own.
Run:   python algos/ppo.py                                      tiny model, CPU, about a minute
       python algos/ppo.py --model qwen2.5-1.5b                 GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/ppo.py --model qwen2.5-7b --prompts-per-step 1024
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
    prompts_per_step: int | None = 256
    """P, over all processes; 256 x 1 samples as many completions as GRPO's 32 x 8 on the tiny model"""
    group_size: int | None = 1
    """G, completions per prompt; the critic needs no siblings to compare with"""
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

    # PPO
    limits = dict(gamma="0 <= x <= 1", lam="0 <= x <= 1")
    eps: float = 0.2
    """half-width of the clip interval (PPO paper)"""
    gamma: float = 1.0
    """discount per token (TRL, verl)"""
    lam: float = 0.95
    """lambda of GAE (TRL); 1 carries the score unblurred to the first of many tokens (verl)"""
    eps_value: float = 0.2
    """how far V may move from V_old within a rollout (TRL)"""
    value_lr: float | None = None
    """the critic's rate; None: ten times lr (verl: 1e-5 and 1e-6). With an optimizer of its own, L_V needs no coefficient"""


# ---------------------------------------------------------------- the objective


def token_rewards(scores, old_logp, ref_logp, mask, args):
    """scores [B], log-probs [B, T] (ref_logp None: no penalty) -> [B, T]: k1 penalty at every token, the score at the last."""
    penalty = torch.zeros_like(old_logp) if ref_logp is None else args.beta * (old_logp - ref_logp)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (last * scores[:, None] - penalty).masked_fill(~mask, 0.0)


def gae(rewards, values, mask, args):
    """[B, T] each -> [B, T]: generalised advantage estimates; nothing is to come after the last valid token."""
    adv, next_adv, next_value = torch.zeros_like(values), values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + args.gamma * next_value - values[:, t]
        adv[:, t] = delta + args.gamma * args.lam * next_adv
        next_adv = torch.where(mask[:, t], adv[:, t], next_adv)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return adv.masked_fill(~mask, 0.0)


def advantages(rewards, values, mask, args):
    """[B, T] each, of the whole rollout -> advantages [B, T], whitened over all valid tokens, and returns [B, T]."""
    adv, n = gae(rewards, values, mask, args), mask.sum()
    returns = (adv + values).masked_fill(~mask, 0.0)
    centred = (adv - adv.sum() / n.clamp(min=1)).masked_fill(~mask, 0.0)
    return centred * (centred.square().sum() / (n - 1).clamp(min=1) + 1e-8).rsqrt(), returns


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch."""
    return mask / mask.sum().clamp(min=1)


def value_loss(values, old_values, returns, mask, args):
    """[B, T] each -> loss per token [B, T], to be minimised: squared error, the larger of plain and clipped."""
    values = values.masked_fill(~mask, 0.0)
    clipped = values.clamp(old_values - args.eps_value, old_values + args.eps_value)
    error = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * error.masked_fill(~mask, 0.0)


def explained_variance(values, returns, mask):
    """[B, T] each -> 1 - Var(G - V) / Var(G) over the valid tokens: 1 for a perfect critic, 0 for a constant one."""
    error, spread = (returns - values)[mask], returns[mask]
    return 1 - error.var(correction=0) / spread.var(correction=0).clamp(min=1e-8)


class Critic(torch.nn.Module):
    """A language model whose head is replaced by one of width 1, zero at first: V_t is read where token t is predicted, like
    its log-prob. Called as the policy is; forward -> values [b, T], wide, 0 where mask is False, and None."""

    def __init__(self, policy):
        super().__init__()
        self.policy, lm = policy, policy.lm
        lm.lm_head = torch.nn.Linear(lm.config.hidden_size, 1, bias=False, device=lm.device, dtype=lm.dtype)
        torch.nn.init.zeros_(lm.lm_head.weight)

    @property
    def lm(self):
        return self.policy.lm

    def forward(self, ids, attention_mask, mask, temperature=1.0):
        values = self.lm.lm_head(self.policy(ids, attention_mask, mask, states=True)).squeeze(-1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.new_zeros(mask.shape).masked_scatter(mask, values), None


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dataclasses import replace

    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, trained=2, frozen=int(args.beta > 0))
    policy = gpu.shard(models.load(args, device))
    reference = gpu.shard(models.load(args, device, trainable=False)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    critic = gpu.shard(Critic(models.load(args, device)))
    critic_optimizer = gpu.make_optimizer(critic, replace(args, lr=10 * args.lr if args.value_lr is None else args.value_lr))
    run.extra["critic"] = critic, critic_optimizer
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

        # Log-probs of the policy that sampled, and of the reference; values of the critic, read in the same way.
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        batch.columns["values"], _ = read(critic, batch, args)
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        scores = token_rewards(batch.reward, batch.old_logp, batch.ref_logp, batch.mask, args)
        scores, values, mask = map(gpu.gather, (scores, batch.columns["values"], batch.mask))
        adv, returns = advantages(scores, values, mask, args)
        batch.adv, batch.columns["returns"] = (gpu.local(x)[:, : batch.mask.shape[1]] for x in (adv, returns))

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        meter.note(explained_variance=explained_variance(values, returns, mask).item())
        for rows, weights in minibatches(batch, args, step, token_weights, value_weights=batch.mask):
            batch.weights, loss, critic_loss = weights, 0.0, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                values, _ = critic(mb.ids, mb.attention_mask, mb.mask)
                losses = value_loss(values, mb.columns["values"], mb.columns["returns"], mb.mask, args)
                micro_loss = (losses * mb.columns["value_weights"])[mb.mask].sum()
                micro_loss.backward()
                critic_loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            critic_norm = gpu.clip_gradients(critic, args.max_grad_norm)
            if run.finite(gpu.total(loss), grad_norm, gpu.total(critic_loss), critic_norm):
                optimizer.step()
                critic_optimizer.step()
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
            meter.note(value_loss=gpu.total(critic_loss), value_grad_norm=critic_norm)
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
