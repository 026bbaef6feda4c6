"""T-PPO: Truncated Proximal Policy Optimization. Fan et al., arXiv 2506.15050 (2025).

Idea: every response is written in windows, and each window is trained on at once, so that no step waits for the longest
response. Where a window cuts a response, the critic's last value stands for what is still to come; the response goes on in the
next step, by the newer policy. A finished one leaves its slot to the next prompt, and it alone teaches the critic.

Objective, to be maximised (equation numbers not at hand; no code is public); the critic is trained beside it on L_V:
    J = 1/|S| sum_S min(r A, clip(r, 1 - eps, 1 + eps) A),   S: the tokens of this window, of all responses,   r = pi / pi_old
    A_t = d_t + gamma lambda A_{t+1},  d_t = R_t + gamma V_{t+1} - V_t,  A = 0 behind the last token l;  then A is whitened on S
    V_{l+1} = V_l where the window cut the response (EGAE), so that d_l = 0 at gamma 1;   V_{l+1} = 0 where it is finished
    L_V = 1/2 mean (V_t - G)^2 over all tokens of finished responses, clipped as in ppo.py;   G = sum of gamma^k R_{t+k}

R is the score at the last token of a finished response. One that reaches max_new_tokens is finished, and wrong. That S leaves
out earlier windows is how the abstract is read here; a reviewer says that all tokens are trained on: --policy-tokens all. Not
found in the paper, so ours: clip and lambda as in ppo.py, and --value-warmup steps at the start that train the critic alone.
With --beta above 0 its penalty is in R of every token, as in ppo.py.

Family: credit
Differs from ppo.py in: prompts_per_step, gae, value_targets, advantages, waiting, slots, carry, train
Measures: measure, shown
Costs: ppo.py's critic. A step samples at most a window, and reads every response again from its first token.
Run:   python algos/t_ppo.py                                    tiny model, CPU, about two minutes
       python algos/t_ppo.py --terminal zero                    without EGAE: a response that is cut is worth nothing
       python algos/t_ppo.py --model qwen2.5-1.5b               GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/t_ppo.py --model qwen2.5-7b --prompts-per-step 1024
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
    prompts_per_step: int | None = 768
    """P, over all processes; 768 x 1 slots write as many tokens in a window as PPO's 256 completions do from end to end"""
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

    # T-PPO
    limits = dict(
        gamma="0 <= x <= 1", lam="0 <= x <= 1", window="1 <= x",
        stale="0 <= x <= 0: the newest policy goes on with what older ones began",
    )  # fmt: skip
    tiny_preset = dict(task="addition:3", steps=40, eval_every=10)  # guesses end in the first window, workings in the third
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
    window: int | None = None
    """tokens that a response may grow by in a step; None: a third of max_new_tokens (the paper: 8K of 24K). A --stop
    string that two windows share is not seen"""
    terminal: Literal["bootstrap", "zero"] = "bootstrap"
    """what is to come where a window cuts a response: the critic's last value (the paper), or nothing"""
    policy_tokens: Literal["new", "all"] = "new"
    """which of a response's tokens the policy is trained on: this window's (the paper, as we read it), or all so far"""
    value_warmup: int = 5
    """steps at the start in which the critic alone is trained (ours)"""


# ---------------------------------------------------------------- the objective


def token_rewards(scores, old_logp, ref_logp, mask, args):
    """scores [B], log-probs [B, T] (ref_logp None: no penalty) -> [B, T]: k1 penalty at every token, the score at the last."""
    penalty = torch.zeros_like(old_logp) if ref_logp is None else args.beta * (old_logp - ref_logp)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (last * scores[:, None] - penalty).masked_fill(~mask, 0.0)


def gae(rewards, values, mask, truncated, args):
    """[B, T] each, truncated [B] -> [B, T]: generalised advantage estimates; behind the last valid token of a truncated row its
    value comes once more (EGAE), behind that of a finished one nothing."""
    adv, next_adv, next_value = torch.zeros_like(values), values.new_zeros(len(values)), values.new_zeros(len(values))
    if args.terminal == "bootstrap":
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        next_value = values.masked_fill(~(last & truncated[:, None]), 0.0).sum(1)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + args.gamma * next_value - values[:, t]
        adv[:, t] = delta + args.gamma * args.lam * next_adv
        next_adv = torch.where(mask[:, t], adv[:, t], next_adv)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return adv.masked_fill(~mask, 0.0)


def value_targets(rewards, mask, args):
    """[B, T] each -> [B, T]: what came from each token on, with no critic in it: at gamma 1 the score, at every token."""
    returns, to_come = torch.zeros_like(rewards), rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        to_come = torch.where(mask[:, t], rewards[:, t] + args.gamma * to_come, to_come)
        returns[:, t] = to_come
    return returns.masked_fill(~mask, 0.0)


def advantages(rewards, values, mask, truncated, trained, args):
    """[B, T] each, truncated [B], of the whole rollout -> advantages [B, T], whitened over the trained tokens, and returns."""
    adv, n = gae(rewards, values, mask, truncated, args).masked_fill(~trained, 0.0), trained.sum()
    returns = value_targets(rewards, mask, args)
    centred = (adv - adv.sum() / n.clamp(min=1)).masked_fill(~trained, 0.0)
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


def waiting(batch, args):
    """-> [B]: responses that the window cut, and neither their end nor the cap of all."""
    return batch.truncated & (batch.mask.sum(1) < args.max_new_tokens)


def slots(pool, free, places, task, args):
    """free, places [B] -> (prompt, tokens so far) of every slot. A free one begins with the prompt at its place in the order,
    where each comes group_size times; the others go on with what they have in the pool, a Batch."""
    prompts = [task.order(place // args.group_size, 1, args.seed)[0] for place in places.tolist()]
    given, known = [[] for _ in prompts], {e.id: e for e in task.train}
    for i in (~free).nonzero()[:, 0].tolist():
        prompts[i] = known[pool.prompt_id[i].item()]
        given[i] = pool.ids[i, -pool.mask.shape[1] :][pool.mask[i]].tolist()
    return prompts, given


def carry(batch, pool, args):
    """A response that waits has no reward yet; the tokens of earlier windows keep the log-probs of the policies that sampled
    them. Columns: `new`, the window's tokens, and `finished`, those of finished responses, on which the critic is trained."""
    new, T, wait = batch.trained, batch.mask.shape[1], waiting(batch, args)
    batch.columns["new"], batch.columns["finished"] = new, batch.mask & ~wait[:, None]
    batch.reward = batch.reward.masked_fill(wait, 0.0)
    batch.trained = new if args.policy_tokens == "new" else batch.mask
    for name in ("old_logp", "sampler_logp") if pool else ():
        before = torch.nn.functional.pad(getattr(pool, name), (0, T - getattr(pool, name).shape[1]))
        setattr(batch, name, torch.where(batch.mask & ~new, before, getattr(batch, name)))


def measure(meter, batch, values, returns, args, gather):
    """Of all ranks: accuracy, reward and length of finished responses alone (null where there are none), and the policies that
    wrote them; tokens generated, trained on and waiting; the longest window, which is what a step takes, and how full it is."""
    wait, finished = gather(waiting(batch, args)), gather(batch.columns["finished"])
    new, length, trained = (gather(x.sum(1)).float() for x in (batch.columns["new"], batch.mask, batch.trained))
    done = dict(accuracy=gather(batch.accuracy), reward=gather(batch.reward), length=length)
    done["versions"] = (length / args.window).ceil()
    meter.note(**{name: x[~wait].mean().item() for name, x in done.items()})
    meter.note(generated=new.sum().item(), trained=trained.sum().item(), waiting_tokens=length[wait].sum().item())
    meter.note(waiting=wait.float().mean().item(), clock=new.max().item(), utilisation=(new.mean() / new.max()).item())
    if finished.any():
        meter.note(explained_variance=explained_variance(values, returns, finished).item())


def shown(batch):
    """What is logged of the rollout: finished responses first, and of all of them the tokens of this window."""
    batch = batch.take(batch.columns["finished"].any(1).byte().argsort(descending=True, stable=True))
    batch.mask = batch.columns["new"]
    return batch


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dataclasses import replace

    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    args.window = args.window or -(-args.max_new_tokens // 3)
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
        # Rollout: P x G slots over all processes; a free one gets the next prompt, the others go on where they are.
        engine.wake()
        pool = run.queue.pop() if run.queue else None
        free = gpu.gather(~waiting(pool, args)) if pool else torch.ones(args.prompts_per_step * args.group_size) > 0
        places = run.state["cursor"] + free.cumsum(0) - 1
        prompts, given = slots(pool, gpu.local(free), gpu.local(places), task, args)
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue), given, 1, args.window)
        engine.sleep()
        run.state["cursor"] += int(free.sum())
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference; values of the critic, read in the same way.
        batch.old_logp, _ = read(policy, batch, args)
        carry(batch, pool, args)
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
        cut, trained = gpu.gather(waiting(batch, args)), gpu.gather(batch.trained)
        adv, returns = advantages(scores, values, mask, cut, trained, args)
        batch.adv, batch.columns["returns"] = (gpu.local(x)[:, : batch.mask.shape[1]] for x in (adv, returns))

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch, values, returns, args, gpu.gather)
        for rows, weights in minibatches(batch, args, step, token_weights, value_weights=batch.columns["finished"]):
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
                if step >= args.value_warmup:
                    optimizer.step()
                if critic_norm > 0:  # else no response of the minibatch is finished
                    critic_optimizer.step()
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
            meter.note(value_loss=gpu.total(critic_loss), value_grad_norm=critic_norm)
        engine.sync()
        run.timed("update")
        run.queue.append(batch)  # the pool of the next step
        run.log(rollout.summary(batch) | meter.result(), shown(batch))

    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
