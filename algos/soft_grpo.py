"""SofT-GRPO. Zheng, Lee, Gu, Liu and Teh, "SofT-GRPO: Surpassing Discrete-Token LLM Reinforcement Learning via
Gumbel-Reparameterized Soft-Thinking Policy Optimization", arXiv 2511.06411 (2025).

Idea: think in mixtures of tokens in place of single ones, and train this by GRPO. Noise on the log-probs of the few likeliest
tokens makes a thought a random draw, and the noise has a density, which takes the place of a token's probability in the
ratio. The answer behind the thoughts is written in tokens.

Objective, to be maximised: that of grpo.py, with these numbers at thoughts (Eq. 3 to 8):
    g_i = log p_i + noise_i,   noise ~ Gumbel(0, 1),   p renormalised over the top-k, top-p tokens i
    fed: sum_i softmax(g / tau_g)_i e_i
    log pi(thought) = mean over i of f(g_i - log p_i),   f(x) = -x - e^-x,   g a constant, p the policy's on the same tokens

The paper sums over i; the released code, and this script, takes the mean, of the tokens with log p above -3 under the policy
that is read, clamps noise to [-1.5, 3], and adds 1e-6 to p. --logp-agg sum is the paper's. What is fed is a constant in the
backward pass, too. A thought is shown in the text as its likeliest token; --marker, or an end token, shown so, is written as a
token and ends the thinking. With --beta the penalty on a thought is k3 of two densities, no KL of distributions.

Family: latent
Differs from grpo.py in: shares, think, mixture, thought_logp, position_logp, replay, thinker, train
Measures: readings, measure
Costs: sampling by transformers, a position at a time (vLLM feeds no embeddings while decoding), so that real models are slow;
    2 k numbers a thought; evaluation twice, in thoughts and in tokens.
Run:   python algos/soft_grpo.py                                tiny model, CPU, about a minute
       python algos/soft_grpo.py --task route --thoughts 28     all of a route in thoughts
       python algos/soft_grpo.py --model qwen2.5-1.5b           GSM8K on one GPU, slowly
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

    # SofT-GRPO
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", top_k="1 <= x", top_p="0 < x <= 1",
        tau_g="0 < x",
    )  # fmt: skip
    hf_only = "embeddings fed while decoding"
    tiny_preset = dict(task="chain:slips", steps=20, max_new_tokens=9, eval_every=5, thoughts=7)
    real_preset = dict(thoughts=512)
    eps: float = 0.2
    """half-width of the clip interval (verl, TRL; the paper gives none)"""
    thoughts: int | None = None
    """most thoughts that a completion begins with (ours; the paper lets them fill the response)"""
    marker: str | None = None
    """token that ends the thinking where a thought is shown as it, as end tokens do; None: </think>, where there is one"""
    top_k: int = 5
    """tokens that a thought mixes (the paper)"""
    top_p: float = 0.95
    """of them those that make up this probability (the paper)"""
    tau_g: float = 0.1
    """temperature of the mixture: the nearer to 0, the nearer a thought is to one token (the paper)"""
    logp_agg: Literal["mean", "sum"] = "mean"
    """over a thought's tokens: mean of those above log p = -3 (the released code), or sum of all (the paper)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


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


# ---------------------------------------------------------------- thoughts


def shares(chosen, kept):
    """Logits of some tokens [n, k], which of them count -> their log-probs among these, as the released code has it."""
    return (chosen.masked_fill(~kept, -1e30).softmax(-1) + 1e-6).log()


def think(z, embedding, noise, args, closing):
    """Logits [b, V], uniform numbers [b, k] or None, tokens that end thinking -> what is fed [b, H], shown [b], kept [b, 2 k],
    its log-density [b], and where thinking ends [b]."""
    top = z.log_softmax(-1).topk(args.top_k)
    kept = top.values.exp().cumsum(-1) - top.values.exp() < args.top_p
    g = shares(top.values, kept)
    if noise is not None:
        g = g - (-noise.clamp(min=1e-12).log()).log().to(g).clamp(-3.0, 1.5)  # Gumbel noise in [-1.5, 3]
    g, order = g.masked_fill(~kept, -1e30).sort(descending=True)
    ids = top.indices.gather(1, order)
    record = torch.cat([ids.to(g), g], 1)
    ends = torch.isin(ids[:, 0], closing)
    logp = torch.where(ends, z.log_softmax(-1).gather(1, ids[:, :1])[:, 0], thought_logp(record, z, args)[0])
    return mixture(embedding, record, args), ids[:, 0], record, logp, ends


def mixture(embedding, record, args):
    """Tokens and their noisy log-probs g [n, 2 k] -> the embedding that is fed [n, H]."""
    ids, g = record[:, : args.top_k].long(), record[:, args.top_k :]
    return torch.einsum("nk,nkh->nh", (g / args.tau_g).softmax(-1).to(embedding.weight.dtype), embedding(ids))


def thought_logp(record, z, args):
    """[n, 2 k], logits [n, V] -> log-densities of the thoughts [n], the share of noise at a bound [n], entropies of p [n]."""
    ids, g = record[:, : args.top_k].long(), record[:, args.top_k :]
    kept = g > -1e29
    logp = shares(z.gather(1, ids), kept)
    x = (g - logp).masked_fill(~kept, 0.0).clamp(-1.5, 3.0)
    f, n = -x - (-x).exp(), kept.sum(1)
    clamped = (((x <= -1.4999) | (x >= 2.9999)) & kept).sum(1) / n
    entropy = -(logp.exp() * logp * kept).sum(1).detach()
    if args.logp_agg == "sum":
        return (f * kept).sum(1), clamped, entropy
    counted = kept & (logp > -3)
    return (f * counted).sum(1) / counted.sum(1).clamp(min=1), clamped, entropy


def position_logp(given, z, args):
    """Thought or token: given [n, 2 + 2 k], logits [n, V] -> log-probs, entropies of the next token, and of thoughts what
    thought_logp() gives beside, [n] each."""
    logp = z.log_softmax(-1)
    token, entropy = logp.gather(1, given[:, 1:2].long())[:, 0], -(logp.exp() * logp).sum(1).detach()
    thought, *seen = thought_logp(given[:, 2:], z, args)
    return torch.where(given[:, 0] > 0, thought, token), entropy, *seen


def replay(mb, args):
    """What the policy is told of a micro-batch, to feed and to read what the sampler did."""
    given = mb.columns["given"]
    soft = given[:, :, 0] > 0
    make = lambda embedding: mixture(embedding, given[soft][:, 2:], args)  # noqa: E731
    return dict(read=lambda given, z: position_logp(given, z, args), given=given, thoughts=(soft, make))


def thinker(policy, tokenizer, args):
    """The engine, with the tokens that end thinking."""
    from common import UserError, models, thoughts

    marker = [tokenizer.convert_tokens_to_ids(args.marker or "</think>")]
    if marker in ([None], [tokenizer.unk_token_id]):
        marker = []
        if args.marker:
            raise UserError(f"--marker {args.marker}: that is no token of the model's")
    closing = torch.tensor(models.end_tokens(policy.lm, tokenizer) + marker, device=next(policy.parameters()).device)
    one = lambda *x: think(*x, closing)  # noqa: E731
    return thoughts.Thinker(policy, tokenizer, args, one, args.thoughts, numbers=args.top_k, m=2 * args.top_k)


# ---------------------------------------------------------------- what is only looked at


def readings(engine, evaluate):
    """What evaluate() gives of thoughts, and, as discrete_..., of the same policy in tokens."""
    found = evaluate()
    engine.on = False
    tokens = evaluate()
    engine.on = True
    return found | {f"discrete_{name}": value for name, value in tokens.items() if name != "prompts"}


def measure(meter, mb, stats, seen, args):
    """Of thoughts: the greatest weight, noise at a bound, entropy of p; and clipped shares of thoughts and tokens apart."""
    given = mb.columns["given"]
    soft, weight = given[:, :, 0] > 0, (given[:, :, 2 + args.top_k :] / args.tau_g).softmax(-1).amax(-1)
    clamped, entropy = seen
    meter.add(dict(thought_weight=weight, noise_clamped=clamped, thought_entropy=entropy), soft & mb.trained)
    meter.add(dict(clip_fraction_thoughts=stats["clip_fraction"]), soft & mb.trained)
    meter.add(dict(clip_fraction_tokens=stats["clip_fraction"]), ~soft & mb.trained)


# ---------------------------------------------------------------- the loop


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
    engine = thinker(policy, tokenizer, args)
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
                logp, entropy, *seen = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **replay(mb, args))
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                measure(meter, mb, stats, seen, args)
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
