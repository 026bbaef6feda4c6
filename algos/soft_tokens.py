"""Soft Tokens: "Soft Tokens, Hard Truths". Butt, Kwiatkowski, Labiad, Kempe and Ollivier, arXiv 2509.19170 (2025).

Idea: think in mixtures of all tokens, explore by noise on what is fed, and learn from rewards as from any other action. A
thought is the mean embedding under the next-token distribution plus Gaussian noise, so that it has a density, whose gradient
moves that mean towards noise that led to high rewards. Tokens are drawn in the answer alone; what is deployed may be the same
model in plain tokens.

Objective, to be maximised (Eq. 11 for the reward; the other equation numbers not at hand):
    J = 1/B sum_i A_i sum_t log pi(. | what was fed before),   A_i = R_i - 1/(G-1) sum_{j != i} R_j
    thought:  fed = h0 + sigma xi,   xi ~ N(0, I),   h0 = softmax(z / tau) E,   log pi = -|fed - h0|^2 / (2 sigma^2) + const
    token:    log pi as ever
    R = 1 if right, 0.1 if it is wrong and in a recognised form, else 0 (the paper: 100, 10, 0)
    z = logits, E = embeddings, sigma = 0.33 of the root mean square of the numbers in E at the start

What was fed is a constant; h0 is computed anew from the model of now, behind the thoughts as they were fed. Tokens are summed,
not averaged, and there is neither ratio nor clip: with more updates than one a rollout, the later ones are off policy. No code
is public, and two readings are ours: sigma is of single numbers (from the norm of rows it would be ten times larger on the
tiny model), and E gets no gradient from h0 (--grad-emb). At greedy evaluations there is no noise; samples of it draw answers,
too, where the paper's are greedy.

--cot soft has tau 0.5, fuzzy 0.0001: nearly one token. --cot hard draws tokens from the first position on, as the base does.
A thought is shown as its likeliest token. Thinking ends where that is the first token of --marker or an end token, which is
then fed as a token; nothing is drawn there, so that its log-prob counts as 0. (The paper looks for the whole text, "The final
answer is: ".) The marker's other tokens and --prefill follow, after --thoughts all of both; they are not trained. Hard
thoughts and the discrete reading end by themselves.

A thought's density is a sum over all channels divided by sigma^2, so that its gradient is many times the answer's. Both norms
are logged, and clipped as one, as in the paper: the answer has little say then. Fuzzy thoughts have a gradient at near ties
only, and learn by the answer.

Family: latent
Differs from rloo.py in: warmup_steps, lr_schedule, format_reward, surrogate, token_weights, mean_thought, thought_logp,
    deviation, think, make_engine, replay, train
Same as soft_grpo.py: readings
Measures: readings, measure
Costs: a vector as wide as an embedding for every thought, in float32, and the whole vocabulary's mean there and in training;
       decoding by transformers, since vLLM feeds tokens alone. The evaluation reads the policy twice, softly and in tokens
       (discrete_...). Every tenth rollout is read and differentiated twice more, for the two norms.
Run:   python algos/soft_tokens.py                              running sums that slip, tiny model, CPU, about a minute
       python algos/soft_tokens.py --cot hard                   the same in tokens
       python algos/soft_tokens.py --model qwen2.5-7b           GSM8K on one GPU, slowly; a model that writes </think> is apt
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
    warmup_steps: int = 20
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
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
    format_reward: float = 0.1
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
        group_size="2 <= x: the completions of a prompt are compared with each other", tau="0 < x", noise_scale="0 < x",
    )  # fmt: skip
    tiny_preset = dict(task="chain:slips", steps=150, minibatches=1, lr=3e-4, thoughts=7, marker="", prefill="")
    real_preset = dict(minibatches=1, thoughts=128, marker="</think>", prefill="\n\nThe final answer is: \\boxed{")
    hf_only = "embeddings fed while decoding"
    cot: Literal["soft", "fuzzy", "hard"] = "soft"
    """what a thought is: a mixture of tokens, or nearly one token, both with noise; or a token (the paper's three arms)"""
    thoughts: int | None = None
    """thoughts that a completion begins with, at most (the paper: 128 on GSM8K, 512 on MATH)"""
    marker: str | None = None
    """text whose first token, being shown, closes the thinking; empty: an end token alone; None: that, else </think> (ours)"""
    prefill: str | None = None
    """text that is written behind the marker; None: none on the tiny model, else the paper's words and an open box"""
    tau: float | None = None
    """temperature of the mixtures; None: the paper's, 0.5 of soft and 0.0001 of fuzzy ones"""
    noise_scale: float = 0.33
    """the noise's deviation over the root mean square of the numbers in the starting model's embeddings (the paper)"""
    grad_emb: bool = False
    """whether the embeddings that are mixed learn from the thoughts, too (ours; the paper does not say)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: minus the mean of the group's other rewards; 0 where all rewards are equal."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, rewards - others, torch.zeros_like(rewards))


def surrogate(logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    return adv * logp.masked_fill(~mask, 0.0), {}


def token_weights(mask, args):
    """[B, T] -> [B, T]: sum over a completion's tokens, then mean over completions; empty completions do not count."""
    return mask / mask.any(1).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k1 estimate of KL(pi, pi_ref); summed over a completion it is part of the reward."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return -log_ratio


def mean_thought(z, E, args):
    """Logits [n, V], embeddings [V, H] -> h0 [n, H], the mean of the embeddings by the probabilities at tau."""
    return (z / (args.tau or dict(soft=0.5, fuzzy=1e-4)[args.cot])).softmax(-1) @ E.to(z.dtype)


def thought_logp(fed, z, E, sigma, args):
    """What was fed [n, H], for thoughts from logits z [n, V] -> its log-density [n] but for a constant."""
    return -(fed - mean_thought(z, E, args)).square().sum(-1) / (2 * sigma**2)


def deviation(E, args):
    """Embeddings [V, H] -> sigma, a number: noise_scale times the root mean square of all numbers in E, those of the start."""
    return args.noise_scale * E.to(torch.promote_types(E.dtype, torch.float32)).square().mean().sqrt().item()


def think(z, embedding, u, closing, sigma, args):
    """Logits z [n, V], numbers u [n, H] in [0, 1) or None, token ids that close -> of n thoughts: fed [n, H], shown [n], record
    [n, H], log-density [n], and whether it closes [n]: then it is the token that is shown, of which nothing was drawn."""
    noise = 0.0 if u is None else torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7)).to(z.dtype)
    fed, shown = mean_thought(z, embedding.weight, args) + sigma * noise, z.argmax(-1)
    closes = torch.isin(shown, closing)
    return fed, shown, fed, thought_logp(fed, z, embedding.weight, sigma, args).masked_fill(closes, 0.0), closes


def readings(engine, evaluate):
    """evaluate() with thoughts, and discrete_...: of the same policy in tokens."""
    values, engine.on = evaluate(), False
    tokens, engine.on = evaluate(), True
    return values | {f"discrete_{k.removeprefix('greedy_')}": v for k, v in tokens.items() if k != "prompts"}


def measure(meter, policy, batch, args, how):
    """Every tenth rollout: the gradient's norm and the entropy, of thoughts and of tokens apart."""
    from common import gpu

    if batch.policy_version[0] % 10:
        return
    soft = batch.columns["given"][:, :, 0] > 0
    batch.weights = gpu.local(token_weights(gpu.gather(batch.trained), args))[:, : soft.shape[1]]
    for kind, where in dict(thought=soft, token=~soft).items():
        batch.columns["part"] = where
        for mb in batch.micro_batches(torch.arange(len(soft), device=soft.device), args.micro_batch_tokens):
            logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **how(mb, args))
            part = mb.trained & mb.columns["part"]
            objective, _ = surrogate(logp, mb.adv, part, args)
            (objective * mb.weights)[part].sum().backward()
            meter.add({f"{kind}_entropy": entropy}, part)
        meter.note(**{f"{kind}_grad_norm": gpu.clip_gradients(policy, float("inf"))})
        policy.zero_grad()
    del batch.columns["part"]


# ---------------------------------------------------------------- the loop


def make_engine(policy, tokenizer, args, sigma):
    """The engine that samples thoughts. After the marker's first token its others are fed, after the last thought all of it."""
    from common import encoding, gpu, models
    from common.thoughts import Thinker

    texts, H = [args.marker, args.prefill], policy.lm.config.hidden_size
    marker, prefill = encoding.tokenize(texts, tokenizer, "--marker, --prefill", add_special_tokens=False)
    closing = torch.tensor([*models.end_tokens(policy.lm, tokenizer), *marker[:1]], device=gpu.device())
    one, most = lambda z, embedding, u, args: think(z, embedding, u, closing, sigma, args), args.thoughts * (args.cot != "hard")
    return Thinker(policy, tokenizer, args, one, most, numbers=H, m=H, forced=(marker[1:] + prefill, marker + prefill))


def replay(mb, args, sigma):
    """What policy() gets of a micro-batch besides: thoughts are fed as they were, and read by their density."""
    given, E = mb.columns["given"], []
    thought = given[:, :, 0] > 0
    if not thought.any():
        return {}

    def make(embedding):
        E[:] = [embedding.weight if args.grad_emb else embedding.weight.detach()]
        return given[thought][:, 2:]

    def read(given, z):
        logp, soft = z.log_softmax(-1), given[:, 0] > 0
        token = logp.gather(-1, given[:, 1:2].long())[:, 0].masked_fill(given[:, 2:].any(-1), 0.0)  # what closes was not drawn
        density = thought_logp(given[soft, 2:], z[soft], E[0], sigma, args)
        return token.index_put((soft,), density), -(logp.exp() * logp).sum(-1).detach()

    return dict(read=read, given=given, thoughts=(thought, make))


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
    sigma = run.state.setdefault("sigma", deviation(gpu.whole(policy.lm.get_input_embeddings().weight), args))
    engine = make_engine(policy, tokenizer, args, sigma)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return readings(engine, lambda: rollout.evaluate(engine, scorer, tokenizer, task, args))

    def how(mb, args):
        return replay(mb, args, sigma)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        engine.attach(batch)
        batch.reward = batch.accuracy.where(batch.accuracy > 0, batch.reward)  # Eq. 11: a right one's format earns nothing
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, _ = read(policy, batch, args, how=how)
        batch.ref_logp = read(reference, batch, args, how=how)[0] if reference else None
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
        measure(meter, policy, batch, args, how)
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **how(mb, args))
                objective, stats = surrogate(logp, mb.adv, mb.trained, args)
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
