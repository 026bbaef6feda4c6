"""SofT-GRPO: "Surpassing Discrete-Token LLM Reinforcement Learning via Gumbel-Reparameterized Soft-Thinking Policy
Optimization". Zheng, Lee et al., arXiv 2511.06411 (2025).

Idea: think in mixtures of tokens, and learn from the noise that mixed them. At a thought the k likeliest tokens get Gumbel
noise on their log-probs, and the softmax of the sums weighs the embeddings that are fed in place of one token's. The noisy
log-probs are the action: their density under the policy of now, against that of the one that sampled, is GRPO's ratio there.

Objective, to be maximised (Eq. 3 to 12; GRPO's, over thoughts and tokens alike):
    J = 1/B sum_i 1/|y_i| sum_t min(r A, clip(r, 1 - eps, 1 + eps) A),   A = (R - mean R) / std R over the group
    token:    log r = log pi(y_t) - log pi_old(y_t)
    thought:  log r = f(x) - f(x_old),   f(x) = sum_i (-x_i - e^-x_i)   over the kept entries i
              p_i = pi(i) / sum of pi over the kept,   x_i = g_i - log p_i
    rollout:  g_i = log p_i - log(-log u_i),   fed: sum_i y_i e_i,   y = softmax(g / tau_g)

Kept are the top_k likeliest tokens, of these the likeliest that make up top_p. The ids and g of a thought are constants: the
training pass feeds the same mixture of today's embeddings, without a gradient through it, and finds the noise x that today's
policy would have needed. An entry drawn high is pushed up if A > 0, one drawn low is pushed down, several tokens at a time.

By default f is that of the released code (--logp-agg mean): x clamped to [-1.5, 3], where a clamped entry has no gradient,
and the mean over the entries with log p > -3 under the policy of now, so that f and f_old may be means over other entries;
--logp-agg sum is the paper's f. In both p gains 1e-6, and the noise of the rollout is clamped to the same interval: 6% of it
lies on a bound, where in the code rounding decides whether it has a gradient; here f's interval is narrower by 0.001 on
either side, and it has none. As in the paper, the mean is over a completion's positions and then over completions, and there
is no dual clip. With --beta the reference is read with the same thoughts: the penalty on them is k3 of a density, not a KL.

A thought is shown as its heaviest token. Thinking ends where that is the first token of --marker or an end token: it is then
a token, fed and scored as one. It ends after --thoughts as well, and then the marker is fed, untrained. --thoughts 0 is GRPO.
The paper's Gaussian control is left out.

Family: latent
Differs from grpo.py in: eval_samples, kept_logp, noise, thought_logp, mixture, think, make_engine, replay, train
Measures: seen, measure, readings
Costs: k numbers and k ids a position; decoding by transformers, since vLLM feeds tokens alone. The evaluation reads the
       policy twice, softly and in tokens (discrete_...), with 32 samples each.
Run:   python algos/soft_grpo.py                                running sums that slip, tiny model, CPU, about a minute
       python algos/soft_grpo.py --task route --thoughts 28     a soft route: the shown tokens are the text
       python algos/soft_grpo.py --model qwen2.5-7b             GSM8K on one GPU, slowly; a model that writes </think> is apt
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
    eval_samples: int | None = None
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

    # SofT-GRPO
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", top_k="1 <= x", top_p="0 < x <= 1",
        tau_g="0 < x",
    )  # fmt: skip
    hf_only = "embeddings fed while decoding"
    tiny_preset = dict(task="chain:slips", steps=20, eval_every=5, eval_samples=32, thoughts=7, marker="")
    real_preset = dict(eval_samples=0, thoughts=512, marker="</think>")
    eps: float = 0.2
    """half-width of the clip interval (authors' script)"""
    thoughts: int | None = None
    """most thoughts of a completion; None: 7 on the tiny model, all sums of the chain but the last, else 512 (ours)"""
    marker: str | None = None
    """text whose first token, being shown, closes the thinking; empty: an end token alone; None: that, else </think>"""
    top_k: int = 5
    """entries of a thought, at most (section 4.1)"""
    top_p: float = 0.95
    """of these only the likeliest, which have this probability together (section 4.1)"""
    tau_g: float = 0.1
    """temperature of the mixture; below 1 it is nearly one token (section 4.1)"""
    logp_agg: Literal["mean", "sum"] = "mean"
    """of a thought's entries: mean (released code, masked and clamped) or sum (the paper)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def kept_logp(logits, kept):
    """[n, k] each -> log p [n, k], renormalised over the kept entries, with the code's 1e-6; -1e30: -inf has NaN gradients."""
    return (logits.masked_fill(~kept, -1e30).softmax(-1) + 1e-6).log()


def noise(record, z):
    """record [n, 2 k], logits z [n, V] -> the noise x that would give g, log p, and which entries are kept, [n, k] each."""
    ids, g = record.chunk(2, -1)
    kept = g > -1e29
    logp = kept_logp(z.gather(-1, ids.long()), kept)
    return (g - logp).masked_fill(~kept, 0.0), logp, kept


def thought_logp(record, z, args):
    """record [n, 2 k], logits z [n, V] -> log-density of g [n]. Its gradient by log p_i is 1 - e^-x_i, 0 on average."""
    x, logp, counted = noise(record, z)
    if args.logp_agg == "mean":
        x, counted = x.clamp(-1.499, 2.999), counted & (logp > -3)  # what lies on a bound has no gradient
    f = (-x - (-x).exp()).masked_fill(~counted, 0.0).sum(-1)
    return f / counted.sum(-1).clamp(min=1) if args.logp_agg == "mean" else f


def mixture(embedding, record, args):
    """record [n, 2 k], the ids and g of thoughts -> what is fed for them [n, H]."""
    ids, g = record.chunk(2, -1)
    y = (g / args.tau_g).softmax(-1).to(embedding.weight.dtype)
    return torch.einsum("nk,nkh->nh", y, embedding(ids.long()))


def think(z, embedding, u, closing, args):
    """Logits z [n, V], numbers u [n, k] in [0, 1) or None, token ids that close -> of n thoughts: fed [n, H], shown [n], record
    [n, 2 k], log-density [n], and whether it closes [n]: then it is the token that is shown, with a token's log-prob."""
    top = z.softmax(-1).topk(args.top_k)
    kept = top.values.cumsum(-1) - top.values < args.top_p
    gumbel = 0.0 if u is None else -(-u.log()).log().clamp(-3.0, 1.5).to(z.dtype)  # in [-1.5, 3], u = 0 too
    g = (kept_logp(z.gather(-1, top.indices), kept) + gumbel).masked_fill(~kept, -1e30)
    shown, record = top.indices.gather(-1, g.argmax(-1, keepdim=True)), torch.cat([top.indices.to(g), g], -1)
    closes, token = torch.isin(shown[:, 0], closing), z.log_softmax(-1).gather(-1, shown)[:, 0]
    density = torch.where(closes, token, thought_logp(record, z, args))
    return mixture(embedding, record, args), shown[:, 0], record, density, closes


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over a completion's tokens, then over completions; empty completions do not count."""
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def seen(record, z, args):
    """What is logged of thoughts [n]: greatest weight, nats of p, share of its noise at a bound or beyond, entries kept."""
    x, logp, kept = noise(record, z.detach())
    weight = (record.chunk(2, -1)[1] / args.tau_g).softmax(-1).amax(-1)
    entropy, bound = -(logp.exp() * logp * kept).sum(-1), x != x.clamp(-1.499, 2.999)
    return weight, entropy, (bound & kept).sum(-1) / kept.sum(-1), kept.sum(-1).to(z.dtype)


def measure(meter, mb, logp, stats, found):
    """How far ratios move and are clipped at thoughts and at tokens apart, and what seen() says of the thoughts."""
    thought = mb.columns["given"][:, :, 0] > 0
    both = dict(clip_fraction=stats["clip_fraction"], log_ratio=(logp.detach() - mb.old_logp).abs())
    for name, mask in dict(thoughts=mb.trained & thought, tokens=mb.trained & ~thought).items():
        meter.add({f"{k}_{name}": x for k, x in both.items()}, mask)
    names = ("thought_weight", "thought_entropy", "noise_clamped", "thought_entries")
    meter.add(dict(zip(names, found)), mb.trained & thought)


def readings(engine, evaluate):
    """evaluate() with thoughts, and discrete_...: of the same policy in tokens."""
    values, engine.on = evaluate(), False
    tokens, engine.on = evaluate(), True
    return values | {f"discrete_{k.removeprefix('greedy_')}": v for k, v in tokens.items() if k != "prompts"}


# ---------------------------------------------------------------- the loop


def make_engine(policy, tokenizer, args):
    """The engine that samples thoughts. After the marker's first token its others are fed, after the last thought all of it."""
    from common import encoding, gpu, models
    from common.thoughts import Thinker

    (marker,) = encoding.tokenize([args.marker], tokenizer, "--marker", add_special_tokens=False)
    closing = torch.tensor([*models.end_tokens(policy.lm, tokenizer), *marker[:1]], device=gpu.device())
    one, k = lambda z, embedding, u, args: think(z, embedding, u, closing, args), args.top_k
    return Thinker(policy, tokenizer, args, one, args.thoughts, numbers=k, m=2 * k, forced=(marker[1:], marker))


def replay(mb, args):
    """What policy() gets of a micro-batch besides: thoughts are fed as they were, and read by their density."""
    if not args.thoughts:
        return {}
    given = mb.columns["given"]
    thought = given[:, :, 0] > 0

    def read(given, z):
        logp, record = z.log_softmax(-1), given[:, 2:]
        token = logp.gather(-1, given[:, 1:2].long())[:, 0]
        density = torch.where(given[:, 0] > 0, thought_logp(record, z, args), token)
        return density, -(logp.exp() * logp).sum(-1).detach(), *seen(record, z, args)

    return dict(read=read, given=given, thoughts=(thought, lambda embedding: mixture(embedding, given[thought][:, 2:], args)))


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import gpu, models, rewards, rollout, runlog, settings, tasks
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
    engine = make_engine(policy, tokenizer, args)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return readings(engine, lambda: rollout.evaluate(engine, scorer, tokenizer, task, args))

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        engine.attach(batch)
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, *_ = read(policy, batch, args, how=replay)
        batch.ref_logp = read(reference, batch, args, how=replay)[0] if reference else None
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
                how = replay(mb, args)
                logp, entropy, *found = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **how)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
                measure(meter, mb, logp, stats, found)
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
