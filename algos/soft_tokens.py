"""Soft tokens. Butt, Kwiatkowski, Labiad, Kempe and Ollivier, "Soft Tokens, Hard Truths", arXiv 2509.19170 (2025).

Idea: think in the mean embedding of the next token, with Gaussian noise on it, and train this by reinforcement learning. The
noise makes the thought a random draw with a density, so that REINFORCE applies as it stands. What is trained softly is meant
to be used in tokens.

Objective, to be maximised (equation numbers not at hand, but for the reward, Eq. 11; no code is public):
    J = 1/B sum_i A_i sum_t log pi(y_t),   A as in rloo.py
    of a thought: fed = h + sigma xi,   h = sum_v p_v e_v,   p = softmax(logits / tau),   xi ~ N(0, I)
                  log pi = -|fed - h|^2 / (2 sigma^2) + const,   fed a constant, h the policy's

sigma is --noise-scale times the root mean square of the entries of the first embeddings, once and for all (our reading; of rows
it would be larger by the root of their width). Embeddings in h are constants unless --grad-emb (ours, too: the target of the
noise shall not move them). --cot soft has tau 0.5, fuzzy 1e-4, and hard thinks in tokens: rloo.py on policy. There is no ratio,
so minibatches is 1 by default; --minibatches, --epochs and --stale work as elsewhere, without a correction. A thought is shown
in the text as its likeliest token, and --marker, or an end token, shown so, is written as a token and ends the thinking.

Family: latent
Differs from rloo.py in: surrogate, token_weights, graded, mean_embedding, think, density, replay, position_logp, thinker, train
Measures: readings, measure
Costs: sampling by transformers, a position at a time (vLLM feeds no embeddings while decoding), so that real models are slow;
    an embedding for every thought; evaluation twice, in tokens and in thoughts; every tenth step two passes more, for norms.
Run:   python algos/soft_tokens.py                              tiny model, CPU, about a minute
       python algos/soft_tokens.py --cot hard                   the same in tokens
       python algos/soft_tokens.py --model qwen2.5-1.5b         GSM8K on one GPU, slowly
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
    tis_level: Literal["token", "sequence"] = "sequence"
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

    # Soft tokens
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", noise_scale="0 < x", sigma="0 < x",
    )  # fmt: skip
    hf_only = "embeddings fed while decoding"
    tiny_preset = dict(
        task="chain:slips", steps=150, prompts_per_step=16, group_size=16, minibatches=1, lr=3e-4, max_new_tokens=9,
        eval_every=25, checkpoint_every=50, thoughts=7,
    )  # fmt: skip
    real_preset = dict(group_size=32, minibatches=1, thoughts=128, prefill="The final answer is: \\boxed{")
    cot: Literal["soft", "fuzzy", "hard"] = "soft"
    """how it thinks: in mixtures, in what is nearly one token's embedding with noise, in tokens (the paper's three)"""
    thoughts: int | None = None
    """most thoughts that a completion begins with (the paper: 128 on GSM8K)"""
    marker: str | None = None
    """token that ends the thinking where a thought is shown as it, as end tokens do; None: </think>, where there is one"""
    prefill: str | None = None
    """text that follows the thinking, neither drawn nor trained (the paper)"""
    noise_scale: float = 0.33
    """sigma over the root mean square of the embeddings' entries (the paper; 3 is too much)"""
    sigma: float | None = None
    """standard deviation of the noise in every entry; None: by noise_scale"""
    grad_emb: bool = False
    """let the embeddings in h have a gradient"""
    wrong_reward: float = 0.1
    """of a wrong answer that could be read; a right one has 1, none 0 (Eq. 11, over 100)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: minus the mean of the group's other rewards; 0 where all rewards are equal."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, rewards - others, torch.zeros_like(rewards))


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    objective = logp.masked_fill(~mask, 0.0) * adv
    return objective, dict()


def token_weights(mask, args):
    """[B, T] -> [B, T]: sum over a completion's tokens, mean over completions; empty completions do not count."""
    return mask / mask.any(1).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k1 estimate of KL(pi, pi_ref); summed over a completion it is part of the reward."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return -log_ratio


def graded(batch, args):
    """Rewards [B], where a wrong answer that could be read gets its part."""
    read = torch.tensor([answer is not None for answer in batch.answers], device=batch.reward.device)
    return batch.reward + args.wrong_reward * (read & (batch.accuracy <= 0))


# ---------------------------------------------------------------- thoughts


def mean_embedding(z, weight, args):
    """Logits [n, V], embeddings [V, H] -> h [n, H]."""
    tau = dict(soft=0.5, fuzzy=1e-4)[args.cot]
    return (z / tau).softmax(-1) @ weight.to(z.dtype)


def think(z, embedding, noise, args, closing):
    """Logits [b, V], uniform numbers [b, H] or None, tokens that end thinking -> what is fed [b, H], shown [b], kept (what is
    fed) [b, H], its log-density [b], and where thinking ends [b]."""
    h, shown = mean_embedding(z, embedding.weight, args), z.argmax(-1)
    xi = torch.zeros_like(h) if noise is None else torch.special.ndtri(noise.clamp(min=1e-12)).to(h)
    fed, ends = h + args.sigma * xi, torch.isin(shown, closing)
    token = z.log_softmax(-1).gather(1, shown[:, None])[:, 0]
    return fed, shown, fed, torch.where(ends, token, density(fed, h, args)), ends


def density(fed, h, args):
    """[n, H] each -> [n], without the constant."""
    return -(fed - h).square().sum(1) / (2 * args.sigma**2)


def replay(mb, args):
    """What the policy is told of a micro-batch, to feed and to read what the sampler did: log-probs and entropies."""
    given, weight = mb.columns["given"], []
    soft = given[:, :, 0] > 0

    def make(embedding):  # inside the forward pass, where a sharded model has the embeddings whole
        weight[:] = [embedding.weight if args.grad_emb else embedding.weight.detach()]
        return given[soft][:, 2:]

    return dict(read=lambda given, z: position_logp(given, z, weight[0], args), given=given, thoughts=(soft, make))


def position_logp(given, z, weight, args):
    """Thought or token: given [n, 2 + H], logits [n, V], embeddings [V, H] -> log-probs and entropies of the next token [n]."""
    logp = z.log_softmax(-1)
    token, entropy = logp.gather(1, given[:, 1:2].long())[:, 0], -(logp.exp() * logp).sum(1).detach()
    if args.cot == "hard":
        return token, entropy
    thought = density(given[:, 2:], mean_embedding(z, weight, args), args)
    return torch.where(given[:, 0] > 0, thought, token), entropy


def thinker(policy, tokenizer, args):
    """The engine, with the tokens that end thinking and those that follow it."""
    from common import UserError, models, thoughts

    marker = [tokenizer.convert_tokens_to_ids(args.marker or "</think>")]
    if marker in ([None], [tokenizer.unk_token_id]):
        marker = []
        if args.marker:
            raise UserError(f"--marker {args.marker}: that is no token of the model's")
    closing = torch.tensor(models.end_tokens(policy.lm, tokenizer) + marker, device=next(policy.parameters()).device)
    text, H = tokenizer(args.prefill or "", add_special_tokens=False)["input_ids"], policy.lm.config.hidden_size
    one = lambda *x: think(*x, closing)  # noqa: E731
    engine = thoughts.Thinker(policy, tokenizer, args, one, args.thoughts, numbers=H, m=H, forced=(text, marker + text))
    engine.on = args.cot != "hard"
    return engine


# ---------------------------------------------------------------- what is only looked at


def readings(engine, evaluate):
    """What evaluate() gives in tokens, which is what a model is trained for; and, as soft_..., in thoughts."""
    on, engine.on = engine.on, False
    found = evaluate()
    engine.on = on
    soft = evaluate() if on else {}
    return found | {f"soft_{name}": value for name, value in soft.items() if name != "prompts"}


def measure(meter, policy, batch, args, step):
    """Every tenth step: the norms of the gradients of the thoughts' part and of the tokens', over the whole rollout."""
    from common import gpu

    soft, weights = batch.columns["given"][:, :, 0] > 0, gpu.local(token_weights(gpu.gather(batch.trained), args))
    for name, part in (dict(thoughts=soft, tokens=~soft) if step % 10 == 0 else {}).items():
        batch.weights, rows = (weights * part)[:, : part.shape[1]], torch.arange(len(part), device=part.device)
        for mb in batch.micro_batches(rows, args.micro_batch_tokens):
            logp, _ = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **replay(mb, args))
            objective, _ = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
            (objective * mb.weights)[mb.trained].sum().backward()
        meter.note(**{f"grad_norm_{name}": gpu.clip_gradients(policy, float("inf"))})
        policy.zero_grad()


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
    policy = models.load(args, device)
    rms = policy.lm.get_input_embeddings().weight.float().square().mean().sqrt().item()
    policy = gpu.shard(policy)
    reference = gpu.shard(models.load(args, device, trainable=False)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    args.sigma = run.state.setdefault("sigma", args.sigma or args.noise_scale * rms)
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
        batch.reward = graded(batch, args)
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, _ = read(policy, batch, args, how=replay)
        batch.ref_logp = read(reference, batch, args, how=replay)[0] if reference else None
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        kl = kl_penalty(batch.old_logp, batch.ref_logp, batch.mask).sum(1) if reference else 0.0
        adv = advantages(gpu.gather(batch.reward - args.beta * kl).view(-1, args.group_size), args)
        batch.adv = gpu.local(adv.flatten())[:, None].expand_as(batch.old_logp)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, policy, batch, args, step)
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **replay(mb, args))
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
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
