"""PF-PPO: Policy Filtration for PPO, "Policy Filtration for RLHF to Mitigate Noise in Reward Models". Zhang, Shen et al.,
arXiv 2409.06957 (2024).

Idea: score several completions of a prompt, and train on the best and the worst alone, since a reward model errs most about
those in between. The filter is chosen before the training: the one with the highest R2 of a regression of true scores on
rewards. The loss is PPO's, as if the kept completions were all that the policy wrote.

Objective, to be maximised (PPO's, see ppo.py, over kept completions; equation numbers not at hand):
    J = mean of min(r A, clip(r, 1 - eps, 1 + eps) A) over the tokens of kept completions,   A whitened over these
    kept: of the N completions of a prompt, by weights w on their rewards R; pow draws, the others take --keep of the heaviest
        bon  1 for the best       br  1/2 for the best, 1/(2(N-1)) for each other       bw  1/2 for the best, 1/2 for the worst
        pow  |R|^power / sum |R|^power       none  1/N
    R2 = 1 - sum w (s - a R - b)^2 / sum w (s - mean s)^2,   a, b of least squares,   s the true score

This ranks within a prompt and keeps exactly --keep of it, like the authors' first release. The version in verl takes the best
and worst of the whole batch, gives all that tie the same weight, and draws after advantages were whitened over everything.
Neither corrects for the choice. The paper fits its line to means of completions of similar reward, here each is a point.
With --keep 2, the paper's, the shares of what is kept are w; with more, br and bw fill up at random.
The tiny model's reward model is artificial: R = q + sigma (1 - q^2) xi, cut to [-1, 1], xi normal, q the share of right digits
from the right, scaled to -1 to 1 (--noise uniform: without (1 - q^2)). Accuracy and all evaluations stay true: look at the gap
between the two, and at R2. Other models use the task's score or --reward's; for pow, centre it at 0.

Family: credit
Differs from ppo.py in: prompts_per_step, group_size, selection_weights, selection, train
Measures: r_squared, measure
World: quality, noisy_reward
Costs: N completions of a prompt are sampled and scored; old log-probs, values and the update are of the kept ones alone.
Run:   python algos/pf_ppo.py                                   tiny model, CPU, about a minute
       python algos/pf_ppo.py --steps 1 --noise uniform         R2 of every filter; once more with --noise middle
       python algos/pf_ppo.py --filter none --keep 5            PPO on all five
       python algos/pf_ppo.py --model qwen2.5-1.5b --reward mine.py:score
       torchrun --nproc-per-node 8 algos/pf_ppo.py --model qwen2.5-7b --prompts-per-step 256
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
    prompts_per_step: int | None = 52
    """P, over all processes; 52 x 5 completions are scored, about as many as PPO's 256 x 1"""
    group_size: int | None = 5
    """N, completions per prompt, all of them scored (the paper)"""
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

    # PF-PPO
    limits = dict(gamma="0 <= x <= 1", lam="0 <= x <= 1", keep="1 <= x", power="0 <= x <= 8")
    tiny_preset = dict(task="addition", noise="middle")
    real_preset = dict(noise="none")
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
    filter: Literal["none", "bon", "br", "bw", "pow"] = "bw"
    """best alone, best and others at random, best and worst (highest R2 in the paper), by |R|^power; none: at random"""
    keep: int = 2
    """completions of a prompt that are trained on (the paper), N at most; bon has one; bw adds others at random"""
    power: float = 2.0
    """of pow, which draws with replacement and wants rewards around 0 (verl)"""
    noise: Literal["none", "middle", "uniform"] | None = None
    """the reward model: an artificial one that errs most about middling answers or equally about all; none: the task's score"""
    sigma: float = 0.8
    """how far it errs (ours)"""


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


def selection_weights(rewards, kind, power=2.0):
    """Rewards [P, N] -> [P, N]: how often each of a prompt's completions is trained on, in proportion. Of equal rewards the
    last is the best and the first the worst, so that there is one of either."""
    N, order = rewards.shape[1], rewards.argsort(dim=1, stable=True)
    best, worst = (torch.zeros_like(rewards).scatter(1, order[:, i : i + 1], 1.0) for i in (N - 1, 0))
    if kind == "bon":
        return best
    if kind == "br":
        return best / 2 + (1 - best) / (2 * max(1, N - 1))
    if kind == "bw":
        return (best + worst) / 2
    weights = rewards.abs() ** (power if kind == "pow" else 0.0)
    return weights.masked_fill(weights.sum(1, keepdim=True) == 0, 1.0)


def selection(rewards, chance, args):
    """Rewards [P, N], a random generator for each prompt -> numbers of the completions kept [P, keep], in ascending order. pow
    draws by the weights, and may draw one twice; the others take the heaviest, and of equally heavy ones any."""
    rewards = rewards.cpu().double()  # MPS has no doubles, and generators are the CPU's
    weights, N = selection_weights(rewards, args.filter, args.power), rewards.shape[1]
    keep = 1 if args.filter == "bon" else min(args.keep, N)
    if args.filter == "pow":
        index = torch.stack([torch.multinomial(w, keep, True, generator=g) for w, g in zip(weights, chance)])
    else:
        index = (weights + 1e-3 * torch.stack([torch.rand(N, generator=g) for g in chance])).topk(keep, 1).indices
    return index.sort(1).values


# ---------------------------------------------------------------- the world: a reward model that errs


def quality(batch):
    """-> q [B] in [-1, 1]. Where the gold answer is a number: the share of its characters that the answer has, from the right,
    rescaled. Elsewhere accuracy rescaled, about which --noise middle never errs; what is right has 1 in any spelling."""
    share = []
    for answer, gold in zip(batch.answers, batch.gold):
        answer, gold = answer or "", gold.rpartition("####")[2].strip() if isinstance(gold, str) else ""
        same = sum(a == b for a, b in zip(answer[::-1], gold[::-1]))
        number = gold.removeprefix("-").replace(".", "", 1).isdigit()
        share.append(same / max(len(answer), len(gold)) if number else 0.0)
    share = torch.tensor(share, dtype=batch.accuracy.dtype, device=batch.accuracy.device)
    return 2 * torch.maximum(share, batch.accuracy).clamp(0, 1) - 1


def noisy_reward(batch, chance, args):
    """-> R [B] in [-1, 1]: q plus noise that --noise middle makes widest at q = 0; what --format-reward adds comes on top."""
    if args.noise == "none":
        return batch.reward
    q, xi = quality(batch), torch.cat([torch.randn(batch.group, generator=g) for g in chance])
    width = 1 - q.square() if args.noise == "middle" else 1.0
    return (q + args.sigma * width * xi.to(q)).clamp(-1, 1) + batch.reward - batch.accuracy


# ---------------------------------------------------------------- what is only looked at


def r_squared(rewards, scores, weights):
    """[P, N] each -> R2 of the least squares line from rewards to scores, a prompt's completions weighing as selection_weights
    says and each prompt alike; nan where all scores that count are equal."""
    R, s, w = (x.cpu().double() for x in (rewards, scores, weights / weights.sum(1, keepdim=True)))
    R, s, w = (x[w > 0] for x in (R, s, w / w.sum()))
    if not len(s) or (s == s[0]).all():
        return float("nan")
    R, s = R - (w * R).sum(), s - (w * s).sum()
    spread = (w * R * R).sum()
    return ((w * R * s).sum() ** 2 / (spread * (w * s * s).sum())).item() if (R != R[0]).any() else 0.0


def measure(run, batch, index):
    """Of all completions that were scored, kept or not -> what is logged: their mean reward and true accuracy, and the gap
    between the two on one scale; prompts whose rewards are all equal; different completions kept. Of the first rollout, before
    any update, R2 of every filter into r2.json."""
    import json

    from common import gpu

    args, rewards, scores = run.args, batch.reward.view(-1, batch.group), batch.accuracy.view(-1, batch.group)
    numbers = dict(reward=rewards, accuracy=scores, equal_prompts=(rewards == rewards[:, :1]).all(1))
    numbers |= dict(distinct_kept=torch.zeros(rewards.shape).scatter(1, index, 1.0))
    out = {k: gpu.total(gpu.double(v).sum().item()) for k, v in numbers.items()}
    out |= {k: out[k] / (args.prompts_per_step * batch.group) for k in ("reward", "accuracy")}
    out["gap"] = out["reward"] - (out["accuracy"] if args.noise == "none" else 2 * out["accuracy"] - 1)
    if run.state["step"] + len(run.queue) == 0:
        rewards, scores = gpu.gather(rewards), gpu.gather(scores)
        kinds = dict(none="no filter", bon="best of N", br="best and random", bw="best and worst", pow="by |R|^power")
        found = {k: r_squared(rewards, scores, selection_weights(rewards.cpu().double(), k, args.power)) for k in kinds}
        if run.main:
            run.bar.write(f"R2 of reward and accuracy, noise {args.noise}, {args.prompts_per_step} x {batch.group} completions")
            for kind, name in kinds.items():
                run.bar.write(f"  --filter {kind:<5} {name:<16} {found[kind]:.3f}")
            (run.dir / "r2.json").write_text(json.dumps({k: v if v == v else None for k, v in found.items()}) + "\n")
    return out


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

        # The reward model scores them all; what the filter keeps is trained on as if it were all, without a correction.
        seeds = [gpu.hash_seed(args.seed, step + len(run.queue), i, 19) for i in batch.prompt_id[:: batch.group].tolist()]
        chance = [torch.Generator().manual_seed(seed) for seed in seeds]
        batch.reward = noisy_reward(batch, chance, args)
        index = selection(batch.reward.view(-1, batch.group), chance, args)
        sampled = measure(run, batch, index)
        batch = batch.pick(index)
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
        run.log(meter.result() | rollout.summary(batch) | sampled, batch)

    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
