"""RTO: Reinforced Token Optimization, "DPO Meets PPO". Zhong et al., arXiv 2404.18922 (2024).

Idea: a reward model says one number at the end of a response, and PPO has to find out which tokens earned it. A policy that
DPO has trained on preference pairs knows more: its log-ratio to the reference is, token by token, the reward it was trained
on, up to a potential. RTO trains such a model first, freezes it, and adds its log-ratio to PPO's reward at every token.

Objective: PPO's, with another reward (Eq. 4.7); pi_dpo is frozen, pi_ref the start of both:
    R_t = clip(beta_1 log(pi_dpo / pi_ref), -c, c) - beta_2 log(pi_old / pi_ref) at every token,
          plus the score, clipped to +-score_clip, at the last one;   beta_1 = dpo_scale, c = dpo_clip, beta_2 = beta
    stage 1: DPO's loss, mean over pairs of -log sigmoid(dpo_beta z)
The clips are the authors' code, which also averages over a completion's tokens before it averages over completions and whitens
with the biased variance; here both are PPO's. Without c the DPO model's excesses are learnt (try --dpo-scale 1 --dpo-clip 0
--max-new-tokens 28). On built-in tasks the score is the gold reward (letters: up to 16).

Family: preference
Differs from ppo.py in: prompts_per_step, epochs, beta, dpo_rewards, token_rewards, dpo_loss, check_task,
    dpo_stage, dpo_model, train
Measures: measure
Costs: stage 1, once; then two frozen models, the reference and the DPO model, and a forward pass of each per rollout.
Run:   python algos/rto.py                                      tiny model on letters, CPU, about a minute
       python algos/rto.py --dpo-scale 0                        the same by PPO; --shape last: the whole DPO term at the end
       torchrun --nproc-per-node 8 algos/rto.py --model qwen2.5-7b-instruct --dpo-model runs/dpo-1-.../checkpoints/step-000900
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
    """P, over all processes; None: 6 on the tiny model (the gain shows where rollouts are few), else 1,024 (authors' script)"""
    group_size: int | None = 1
    """G, completions per prompt; the critic needs no siblings to compare with"""
    minibatches: int | None = None
    """optimizer steps per pass over a rollout; with 1 and one epoch the ratio is 1 and most methods are the same"""
    epochs: int | None = None
    """passes over each rollout; None: 2 on the tiny model, else 1 (authors' script)"""
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
    beta: float | None = None
    """beta_2, weight of the KL penalty to the starting model; None: 0.05 on the tiny model, else 0.01 (authors' script)"""
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

    # RTO
    limits = dict(gamma="0 <= x <= 1", lam="0 <= x <= 1", dpo_beta="0 < x", dpo_pairs_per_step="1 <= x")
    tiny_preset = dict(
        task="letters", steps=100, prompts_per_step=6, minibatches=1, epochs=2, lr=2e-4, value_lr=1e-3, beta=0.05,
        max_new_tokens=9, dpo_scale=0.3, dpo_clip=0.3, score_clip=0.0, checkpoint_every=50,
    )  # fmt: skip
    real_preset = dict(
        prompts_per_step=1024, minibatches=8, epochs=1, beta=0.01, dpo_scale=0.05, dpo_clip=0.05, score_clip=10.0
    )  # fmt: skip
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
    dpo_scale: float | None = None
    """beta_1; None: 0.3 on the tiny model, whose scores are larger, else 0.05 (paper); 0: PPO"""
    dpo_clip: float | None = None
    """c, limit of a token's scaled log-ratio; 0: none. None: 0.3 on the tiny model, else 0.05 (authors' script)"""
    score_clip: float | None = None
    """limit of the score; 0: none. None: 0 on the tiny model, else 10 (authors' code)"""
    shape: Literal["token", "last", "rs"] = "token"
    """where the DPO term goes (paper's ablations): to its tokens; summed onto the last token (DDPO); to its tokens, with its
    sum taken off the score, so that only the reward's place differs from PPO (RS-PPO)"""
    dpo_model: str | None = None
    """folder of a model that algos/dpo.py trained from the same start; None: trained first, on the task's built-in pairs"""
    dpo_steps: int = 150
    """updates of stage 1 (ours)"""
    dpo_beta: float = 1.0
    """DPO's beta in stage 1 (ours: with 1 the log-ratios have the scale of the gold reward)"""
    dpo_lr: float = 2e-4
    """AdamW's rate in stage 1 (ours, for the tiny model)"""
    dpo_pairs_per_step: int = 48
    """pairs per update in stage 1, over all processes (ours)"""


# ---------------------------------------------------------------- the objective


def dpo_rewards(dpo_ratio, mask, args):
    """log pi_dpo / pi_ref [B, T] -> [B, T]: the DPO term of Eq. 4.7, scaled before it is clipped; 0 outside the mask."""
    term = (args.dpo_scale * dpo_ratio).masked_fill(~mask, 0.0)
    return term.clamp(-args.dpo_clip, args.dpo_clip) if args.dpo_clip > 0 else term


def token_rewards(scores, old_logp, ref_logp, dpo_ratio, mask, args):
    """scores [B], log-probs [B, T] -> [B, T]: DPO term and k1 penalty at every token, the score at the last. Eq. 4.7."""
    term, penalty = dpo_rewards(dpo_ratio, mask, args), args.beta * (old_logp - ref_logp)
    if args.score_clip > 0:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    if args.shape == "last":
        term = last * term.sum(1, keepdim=True)
    if args.shape == "rs":
        scores = scores - term.sum(1)
    return (last * scores[:, None] + term - penalty).masked_fill(~mask, 0.0)


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


def dpo_loss(logp, ref_logp, mask, args):
    """[2B, T] each, the B chosen rows first -> loss per pair [B], to be minimised: stage 1, as in algos/dpo.py."""
    chosen, rejected = (logp - ref_logp).masked_fill(~mask, 0.0).sum(1).chunk(2)
    return -torch.nn.functional.logsigmoid(args.dpo_beta * (chosen - rejected))


# ---------------------------------------------------------------- the loop


def check_task(args):
    """UserError where the DPO model is to be trained on pairs of a task that has none."""
    from common import UserError, tasks

    if args.dpo_model is None and not getattr(tasks.world(args.task), "pair", None):
        raise UserError(f"--task {args.task} has no pairs for stage 1; give a model that algos/dpo.py trained by --dpo-model")


def dpo_stage(folder, args, config, tokenizer, run):
    """Stage 1: trains the DPO model on the task's built-in pairs and writes it to `folder`, whole or not at all."""
    from types import SimpleNamespace

    from common import export, gpu, models, pairs, whole_folder

    args = SimpleNamespace(**vars(args) | dict(data=args.task, pairs_per_step=args.dpo_pairs_per_step))
    data = pairs.load(args, config, tokenizer)
    reference = gpu.shard(models.load(args, gpu.device(), trainable=False))

    def loss(logp, mb):
        return dpo_loss(logp, pairs.logp_now(reference, mb), mb.mask, args)

    model = pairs.fit("DPO model", loss, data, args, run, args.dpo_steps, args.dpo_lr)
    with whole_folder(folder, "the DPO model", run.main) as scratch:
        export.write_weights(model.lm, export.full_weights(model), scratch if run.main else None)
        if run.main:
            tokenizer.save_pretrained(scratch)
    gpu.gather_objects(None)  # the others wait for the folder


def dpo_model(args, config, tokenizer, run):
    """The frozen DPO model: the one that is given, or stage 1's, in the run folder, where a resumed run finds it."""
    from common import UserError, gpu, models

    folder = args.dpo_model or gpu.gather_objects(run.dir)[0] / "dpo"
    if args.dpo_model is None and not (args.resume and folder.is_dir()):
        dpo_stage(folder, args, config, tokenizer, run)
    start = Args(**vars(args) | dict(model=str(folder)))
    if models.load_tokenizer(start).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--dpo-model {folder} has other tokens than --model {args.model}")
    return gpu.shard(models.load(start, gpu.device(), trainable=False))


def measure(meter, batch, args):
    """The DPO term of a rollout, the share of it at its limit, its sum over a completion, and the KL to the reference."""
    term = dpo_rewards(batch.columns["dpo_ratio"], batch.mask, args)
    clipped = (term.abs() >= args.dpo_clip).float() * (args.dpo_clip > 0)
    meter.add(dict(dpo_term=term, dpo_clipped=clipped, ref_kl=batch.old_logp - batch.ref_logp), batch.mask)
    meter.add(dict(dpo_sum=term.sum(1)), batch.mask.any(1))


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dataclasses import replace

    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    check_task(args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, trained=2, frozen=2)
    dpo = dpo_model(args, config, tokenizer, run)
    policy = gpu.shard(models.load(args, device))
    reference = gpu.shard(models.load(args, device, trainable=False))
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

        # Log-probs of the policy that sampled, of the reference and the DPO model; values of the critic, read in the same way.
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp, _ = read(reference, batch, args)
        ref_at_1 = batch.ref_logp if args.temperature == 1 else read(reference, batch, args, temperature=1.0)[0]
        batch.columns["dpo_ratio"] = read(dpo, batch, args, temperature=1.0)[0] - ref_at_1  # of the models as they were trained
        batch.columns["values"], _ = read(critic, batch, args)
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        scores = token_rewards(batch.reward, batch.old_logp, batch.ref_logp, batch.columns["dpo_ratio"], batch.mask, args)
        scores, values, mask = map(gpu.gather, (scores, batch.columns["values"], batch.mask))
        adv, returns = advantages(scores, values, mask, args)
        batch.adv, batch.columns["returns"] = (gpu.local(x)[:, : batch.mask.shape[1]] for x in (adv, returns))

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch, args)
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
