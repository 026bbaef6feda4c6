"""ATP-Latent: "Beyond Imitation: Reinforcement Learning for Active Latent Planning". Zheng and Lee, arXiv 2601.21598 (2026).

Idea: think in vectors instead of words, and learn from reward which vectors. A curriculum first replaces written steps by
latents, one after another: each is drawn from a Gaussian that a small head predicts, fed as it is, and held to mean something
by a decoder that has to write the step from it. GRPO then trains the latents, when to stop, and the answer.

Objective (equation numbers not at hand; that of the released code), for latents z_1 to z_n of at most K, behind a question:
    z_i = mu_i + sigma_i e,   (mu_i, sigma_i) = head(h_i), h_i the last hidden state before;   stop or go on: from z_i itself
    curriculum, to be minimised, the first k steps by latents, k = 1 to K:
        L = L_text + lambda KL(N(mu, sigma^2), N(0, 1)) + 1/k L_decoder + 1/k L_stop
    then, to be maximised:   J = J_latents + J_answer, each 1/B sum_i 1/n_i sum_t min(r A, clip(r, 1 - eps, 1 + eps) A)
        latent: log pi = sum_d log N(z_d; mu_d, sigma_d^2) + log p(go on);   answer: log p(stop), then its tokens
        log r = log pi - log pi_old in [-c, c];   A = (R - mean R) / std R over the group
        R = w_a accuracy + w_f format + w_c coherence accuracy;   where w_a = 0: w_f format + w_c coherence
    coherence: share of decoded steps whose result a later step contains, of the last step the answer; 1 without steps

z is a constant in J: the gradient goes through mu, sigma, the stop head and the model. The latent that stops is dropped, and
its density counts for nothing; after K latents the end mark is fed, untrained. In L a latent beyond a question's steps is seen
by nothing but its stop. Greedily z is mu; the code samples it there, too, which is here avg@N.

One run has both stages: --sft-steps 0 leaves out the first, --steps 0 the second. Unlike the code: one latent a step, not two;
log sigma^2 within -8 and 2; a step without a result is incoherent (--no-strict-coherence: it coheres with anything); gradients
of model and heads are clipped apart; lambda is larger on the tiny model, whose sums take a wide sigma. What the noise of the
densities does to the rest is in the log: latent_capped is the share of log-ratios at c, whose gradient is 0.

Its own world, chains, adds digits modulo 10. Its demonstrations for the curriculum are hurried in 40%: they leave out the last
step and answer with the result before it, which is wrong but coherent. Only reward can tell.

Family: latent
Differs from grpo.py in: task, reward, beta, format_reward, eval_samples, latent_logp, kl_to_prior, coherence, total_reward,
    surrogate, token_weights, kl_penalty, Heads, think, make_engine, replay, with_latents, decode, scored, cut, sft_losses,
    summed, sft_stage, make_parts, questions, train
Measures: look, measure, heard, evaluated, show
World: chains
Costs: heads, and a decoder of up to the model's size. An update of the curriculum is k + 1 passes, one for each latent and one
       for all, with gradients through the whole chain; every process has the model whole then. Rollouts are decoded by
       transformers, as vLLM feeds tokens alone.
Run:   python algos/atp_latent.py                               both stages, tiny model, CPU, about a minute
       python algos/atp_latent.py --accuracy-weight 0 --coherence-weight 1      no answer is looked at
       python algos/atp_latent.py --model qwen2.5-0.5b --sft-steps 3000         GSM8K on one GPU; a 7B by the same loop, slowly
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
    """chains, or a task whose answers are worked solutions, a step a line: gsm8k, a .jsonl file; None: preset"""
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
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 1.0
    """of sampling, and of every log-prob; no top-p: samples of a cut distribution are not those that log-probs are of"""
    format_reward: float = 0.5
    """w_f, added to the reward of a completion that ends and has an answer (code)"""
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

    # ATP-Latent
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", most_steps="1 <= x",
        demos_per_step="1 <= x", log_ratio_cap="0 < x",
    )  # fmt: skip
    tiny_preset = dict(
        task="chains", steps=40, lr=5e-5, max_new_tokens=8, eval_every=10, eval_samples=4, most_steps=3, sft_steps=500,
        sft_lr=2e-3, kl_weight=0.1, decoder_layers=1, marks=("<start>", "<end>"),
    )  # fmt: skip
    real_preset = dict(
        prompts_per_step=16, minibatches=8, lr=1e-6, max_new_tokens=32, eval_samples=0, most_steps=10, sft_steps=0,
        sft_lr=1e-4, kl_weight=1e-3, decoder_layers=0, marks=("<|box_start|>", "<|box_end|>"),
    )  # fmt: skip
    hf_only = "embeddings fed while decoding"
    eps: float = 0.2
    """half-width of the clip interval (code)"""
    log_ratio_cap: float = 3.0
    """c, largest log-ratio either way: those of densities over hundreds of dimensions are large (code)"""
    most_steps: int | None = None
    """K, latents at most, one a step (tiny: ours; code: 10 steps)"""
    accuracy_weight: float = 1.0
    """w_a, what a right answer is worth (code); 0: nothing, and coherence is paid for without one"""
    coherence_weight: float = 0.1
    """w_c, what coherent steps are worth (code: 0.1; where w_a is 0, 1)"""
    strict_coherence: bool = True
    """whether a step without a result is incoherent (ours; code: no)"""
    sft_steps: int | None = None
    """updates of the curriculum, all stages together (tiny: ours); 0: none, as for a model that has been through it"""
    sft_lr: float | None = None
    """AdamW's rate there, which falls to 0 (tiny: ours; code: 1e-4)"""
    demos_per_step: int = 32
    """demonstrations per update there, over all processes (code)"""
    kl_weight: float | None = None
    """lambda, weight of the KL to the prior, a mean over dimensions, there (tiny: ours; code: 1e-3)"""
    fixed_sigma: float = 0.0
    """above 0: every sigma, in place of a learned one; with --kl-weight 0 nearly without chance (ours, a control)"""
    decoder_layers: int | None = None
    """layers of the decoder, a copy of the model's lowest (tiny: ours); 0: all (code)"""
    marks: tuple[str, str] | None = None
    """tokens that begin and end the latents (ours)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def latent_logp(mu, logvar, z, stop, stopped):
    """[n, H] each, logits [n, 2] of going on and stopping, stopped [n] -> [n]: density of a latent and of going on behind it;
    of one that is dropped, since it stops, the probability of that alone."""
    density = torch.distributions.Normal(mu, (0.5 * logvar).exp(), validate_args=False).log_prob(z).sum(-1)
    go_on, end = stop.log_softmax(-1).unbind(-1)
    return torch.where(stopped, end, density + go_on)


def kl_to_prior(mu, logvar):
    """KL of a Gaussian to the standard one, dimension by dimension."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def coherence(steps, answer, args):
    """Texts of steps -> the share of them whose result is taken up."""
    results = [step.partition("=")[2].partition(">>")[0].strip() for step in steps]
    later = [steps[s + 1 :] or [answer] for s in range(len(steps))]
    fits = [any(r in text for text in texts) and bool(r or not args.strict_coherence) for r, texts in zip(results, later)]
    return sum(fits) / len(fits) if fits else 1.0


def total_reward(accuracy, form, coherent, args):
    """[B] each -> R [B]."""
    coherent = coherent * accuracy if args.accuracy_weight > 0 else coherent
    return args.accuracy_weight * accuracy + args.format_reward * form + args.coherence_weight * coherent


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)
    capped = log_ratio.clamp(-args.log_ratio_cap, args.log_ratio_cap)
    ratio = capped.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float(), capped=(capped != log_ratio).float())


def token_weights(mask, args, latent):
    """[B, T] -> [B, T]: latents and tokens apart, means over a completion's, then over completions; empty ones do not count."""
    parts = [(mask & some, (mask & some).sum(1, keepdim=True)) for some in (latent > 0, latent <= 0)]
    return sum(part / lengths.clamp(min=1) for part, lengths in parts) / mask.any(1).sum().clamp(min=1)


# ---------------------------------------------------------------- latents: drawn, fed, read again, and put into words


class Heads(torch.nn.Module):
    """forward(h [..., H]) -> mu and log sigma^2 of the next latent; stop(z) -> logits [..., 2] of going on and of stopping."""

    def __init__(self, H, args):
        super().__init__()
        torch.manual_seed(args.seed)  # the same on every process
        linear, chain, gelu = torch.nn.Linear, torch.nn.Sequential, torch.nn.GELU()
        self.trunk = chain(linear(H, H), gelu, linear(H, H), torch.nn.LayerNorm(H))
        self.mu, self.logvar, self.stop = linear(H, H), linear(H, H), chain(linear(H, H), gelu, linear(H, 2))
        self.sigma = args.fixed_sigma

    def forward(self, h):
        x = self.trunk(h.to(self.mu.weight.dtype))
        logvar = self.logvar(x).clamp(-8, 2)
        return self.mu(x), logvar if self.sigma == 0 else torch.full_like(logvar, self.sigma).log() * 2


def think(h, embedding, noise, heads, marks):
    """Hidden states [n, H], numbers [n, 1 + H] in [0, 1) or None, for the mean and the likelier decision -> of n latents: fed
    [n, H], shown [n], record [n, H], log-prob [n], and whether it stops [n]: then the end mark is fed in its place."""
    mu, logvar = heads(h)
    z = mu if noise is None else mu + (0.5 * logvar).exp() * torch.special.ndtri(noise[:, 1:].clamp(min=1e-12)).to(mu)
    stop = heads.stop(z)
    stopped = stop[:, 1] > stop[:, 0] if noise is None else noise[:, 0] < stop.softmax(-1)[:, 1]
    return z, torch.where(stopped, marks[1], marks[0]), z, latent_logp(mu, logvar, z, stop, stopped), stopped


def make_engine(policy, heads, tokenizer, marks, args):
    """The engine that samples latents; where the limit ends them, the end mark is fed as well, but was not drawn."""
    from common.thoughts import Thinker

    one, H = lambda h, embedding, noise, args: think(h, embedding, noise, heads, marks), heads.mu.in_features
    most, forced = args.most_steps, ([], marks[1:])
    return Thinker(policy, tokenizer, args, one, most, numbers=1 + H, m=H, layer="normed", forced=forced)


def replay(mb, args):
    """What policy() gets of a micro-batch besides: the latents are fed as they were, and it gives what the heads read."""
    given = mb.columns["given"]
    latent = given[:, :, 0] > 0
    return dict(thoughts=(latent, lambda embedding: given[latent][:, 2:]), layers=["normed"])


def with_latents(heads, logp, h, mb):
    """Log-probs of tokens [b, T], hidden states [b, T, H] -> log-probs of what was drawn: latents, the stop, tokens."""
    drawn = mb.columns["drawn"] & mb.mask
    z = mb.columns["given"][:, :, 2:][drawn]
    found = latent_logp(*heads(h[drawn]), z, heads.stop(z), ~mb.columns["latent"][drawn])
    return logp.masked_scatter(drawn, found.to(logp.dtype))


@torch.no_grad()
def decode(decoder, z, tokenizer, longest=16):
    """Latents [n, H] -> n texts: the step that the decoder reads in each, greedily."""
    from common import encoding

    end, embedding, ids = encoding.turn_end(tokenizer), decoder.get_input_embeddings(), z.new_zeros(len(z), 0).long()
    while len(z) and ids.shape[1] < longest and not (ids == end).any(1).all():
        x = torch.cat([z[:, None].to(embedding.weight.dtype), embedding(ids)], 1)
        ids = torch.cat([ids, decoder(inputs_embeds=x, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    texts = tokenizer.batch_decode(ids.masked_fill((ids == end).cumsum(1) > 0, end), skip_special_tokens=True)
    return texts if len(z) else []


def scored(batch, decoder, tokenizer, args):
    """Marks in a rollout what is a latent and what the heads drew, puts latents into words, and gives rewards."""
    given, columns = batch.columns["given"], batch.columns
    columns["latent"], columns["drawn"] = given[:, :, 0] > 0, given[:, :, 2:].ne(0).any(2)
    words, counts = iter(decode(decoder, given[:, :, 2:][columns["latent"]], tokenizer)), columns["latent"].sum(1).tolist()
    found = [coherence([next(words) for _ in range(n)], text, args) for n, text in zip(counts, batch.texts)]
    form = [bool(text.strip()) for text in batch.texts]
    columns["coherence"], form = (torch.tensor(x, device=given.device).float() for x in (found, form))
    batch.reward = total_reward(batch.accuracy, form * ~batch.truncated, columns["coherence"], args)


# ---------------------------------------------------------------- the curriculum


def cut(text, args):
    """A worked solution, a line a step and one for the answer -> its steps, the last one of all that are left; the answer."""
    *steps, answer = text.strip().split("\n")
    first = steps[: args.most_steps - 1]
    return first + ["\n".join(steps[len(first) :])] * (len(steps) > len(first)), answer


def sft_losses(parts, rows, noise, marks, tokenizer):
    """rows [(prompt ids, (steps, answer))], noise [b, k, H], for the first k steps -> L_text, KL, L_decoder, L_stop: the sum
    and the number of what it is a mean over, b k but in L_text. Each latent is a pass of its own over all before it."""
    from common import encoding
    from common.batch import collate

    def ids(texts):
        return encoding.response_ids(texts, tokenizer, "a solution", 1024)

    def entropy(logits, targets):
        return torch.nn.functional.cross_entropy(logits.to(z.dtype), targets, reduction="sum")

    def states(x):
        more = dict(attention_mask=seen[:, : x.shape[1]].long(), position_ids=places[:, : x.shape[1]], use_cache=False)
        return lm.model(inputs_embeds=x, **more).last_hidden_state

    (policy, heads, decoder), k = parts, noise.shape[1]
    lm, pad, embedding = policy.lm, tokenizer.pad_token_id, policy.lm.get_input_embeddings()
    said = ids(["\n".join([*steps[k:], answer]) for _, (steps, answer) in rows])
    batch = collate([(prompt, [marks[1], *y]) for (prompt, _), y in zip(rows, said)], pad, noise.device)
    T, answers = batch.mask.shape[1], batch.mask[:, 1:]
    kept = torch.tensor([[i < len(steps) for i in range(k)] for _, (steps, _) in rows], device=noise.device)
    seen = torch.cat([batch.attention_mask[:, :-T], kept, batch.mask], 1)
    places = (seen.long().cumsum(1) - 1).clamp(min=0)
    x, drawn = embedding(batch.ids[:, :-T]), []
    for i in range(k):
        mu, logvar = heads(states(x)[:, -1])
        drawn.append((mu, logvar, mu + (0.5 * logvar).exp() * noise[:, i].to(mu)))
        x = torch.cat([x, drawn[i][2][:, None].to(x.dtype)], 1)
    mu, logvar, z = (torch.stack(some, 1) for some in zip(*drawn))
    x = torch.cat([x, embedding(batch.ids[:, -T:])], 1)
    text = entropy(lm.lm_head(states(x)[:, -T:-1][answers]), batch.ids[:, 1 - T :][answers])
    stop = entropy(heads.stop(z).flatten(0, 1), (~kept).long().flatten())
    told = collate([([], y) for y in ids([step for _, (steps, _) in rows for step in steps[:k]])], pad, noise.device)
    x = torch.cat([z[kept][:, None].to(x.dtype), decoder.get_input_embeddings()(told.ids[:, :-1])], 1)
    words = entropy(decoder(inputs_embeds=x, use_cache=False).logits[told.mask], told.ids[told.mask])
    return zip((text, kl_to_prior(mu, logvar).mean(2).sum(), words, stop), (answers.sum().item(), *[kept.numel()] * 3))


def summed(module):
    """Makes the gradients those of all processes, each of which has the module whole."""
    from common import gpu

    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        weight.grad.copy_(gpu.total(weight.grad))


def sft_stage(parts, task, marks, tokenizer, args, run):
    """Trains policy, heads and decoder; the last of K stages is three times as long as the others."""
    import random
    from dataclasses import replace

    from tqdm import tqdm

    from common import UserError, gpu

    n, H = args.sft_steps, parts[1].mu.in_features
    stage = replace(args, lr=args.sft_lr, steps=n, lr_schedule="cosine", warmup_steps=n // 10)
    optimizers, log = [gpu.make_optimizer(module, stage) for module in parts], []
    schedules = gpu.make_schedules(optimizers, stage)
    for step in tqdm(range(n), desc="curriculum", disable=None, leave=False):
        k = min(args.most_steps, 1 + step * (args.most_steps + 2) // n)
        rng, chance = random.Random(gpu.hash_seed(args.seed, step, 37)), torch.Generator()
        some = rng.choices(task.train, k=args.demos_per_step)
        texts = [task.demonstrate(rng, e, 0.0) if task.demonstrate else e.answer for e in some]
        rows = [(e.ids, cut(text, args)) for e, text in zip(some, texts)]
        noise = torch.randn(len(rows), k, H, generator=chance.manual_seed(gpu.hash_seed(args.seed, step, 41)))
        found = sft_losses(parts, gpu.local(rows), gpu.local(noise).to(gpu.device()), marks, tokenizer)
        means = [loss / max(1, gpu.total(count)) for loss, count in found]
        (means[0] + args.kl_weight * means[1] + means[2] + means[3]).backward()
        for module, optimizer, schedule in zip(parts, optimizers, schedules):
            summed(module)
            gpu.clip_gradients(module, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        log.append([gpu.total(loss.item()) for loss in means])
        if gpu.maximum(int(bool(run.stop))):
            raise UserError("stopped during the curriculum: nothing is lost but that; start again")
    if run.main and n:
        text, prior, words, stop = (sum(x) / len(x) for x in zip(*log[-20:]))
        run.bar.write(f"curriculum, losses: text {text:.2f}, KL {prior:.2f}, decoder {words:.2f}, stop {stop:.2f}")


# ---------------------------------------------------------------- what is only looked at


def look(meter, stats, mb, heads, h):
    """What is logged of a micro-batch: of the answer's tokens, of latents, and of stops; and of latents their KL to the prior
    and sigma, means over dimensions."""
    latent, drawn = mb.columns["latent"], mb.columns["drawn"]
    for name, where in {"": ~drawn, "latent_": latent, "stop_": drawn & ~latent}.items():
        meter.add({name + k: x for k, x in stats.items()}, mb.trained & where)
    with torch.no_grad():
        mu, logvar = heads(h)
    meter.add(dict(prior_kl=kl_to_prior(mu, logvar).mean(2), sigma=(0.5 * logvar).exp().mean(2)), mb.trained & latent)


def measure(meter, batch):
    """Of a rollout: latents used and coherence."""
    found = dict(latents=batch.columns["latent"].sum(1).float(), coherence=batch.columns["coherence"])
    meter.add(found, torch.ones_like(batch.truncated))


def heard(engine, decoder, examples, tokenizer, args):
    """-> of every example's greedy completion its latents [n, H], their steps in words, and the answer."""
    out = engine.generate([e.ids for e in examples], 1, args.max_new_tokens, 0.0, [0] * len(examples))
    latents = [row[row[:, 0] > 0][:, 2:] for given, _ in engine.given for row in given]
    words = iter(decode(decoder, torch.cat(latents), tokenizer) if out else ())
    texts = tokenizer.batch_decode([ids for ids, _, _ in out], skip_special_tokens=True) if out else []
    return [(z, [next(words) for _ in z], text) for z, text in zip(latents, texts)]


def evaluated(found, engine, decoder, task, tokenizer, args):
    """What an evaluation found, and of its greedy completions the latents used and the coherence, over all processes."""
    from common import gpu

    some = heard(engine, decoder, task.test[: args.eval_prompts][gpu.rank() :: gpu.world()], tokenizer, args)
    latents = gpu.total(float(sum(len(steps) for _, steps, _ in some))) / found["prompts"]
    fit = gpu.total(float(sum(coherence(steps, text, args) for _, steps, text in some))) / found["prompts"]
    return found | dict(latents=latents, coherence=fit, prompts=found["prompts"])


def show(run, engine, decoder, task, tokenizer, args):
    """Prints what the latents of three questions say."""
    for e, (_, steps, text) in zip(task.test[:3], heard(engine, decoder, task.test[:3], tokenizer, args)):
        if run.main:
            run.bar.write(f"{e.prompt!r:.60}: {'; '.join(steps)} -> {text!r} (right: {e.answer!r:.40})")


# ---------------------------------------------------------------- the world: chains of sums


def chains(name):
    """The Task of three or four digits to be added modulo 10, a step at a time, the summands of a step in either order. Careful
    demonstrations have all steps; of the others 40% leave out the last one and answer as if that were right. Of another name:
    the built-in world, if there is one."""
    from random import Random

    from common import tasks
    from common.worlds import tiny

    if name != "chains":
        return tasks.world(name)
    digits = [f"{i:0{n}d}" for n in (3, 4) for i in Random(0).sample(range(10**n), 1000)]
    Random(1).shuffle(digits)
    every = [tasks.Example(i, d + "=", str(sum(map(int, d)) % 10)) for i, d in enumerate(digits)]

    def demonstrate(rng, example, careful):
        total, *more = map(int, example.prompt[:-1])
        lines = []
        for x in more[: len(more) - (careful < 1 and rng.random() < 0.4)]:
            a, b = rng.sample((total, x), 2)
            total = (a + b) % 10
            lines.append(f"{a}+{b}={total}")
        return "\n".join([*lines, str(total)])

    def tokenizer():
        made = tiny.characters()
        made.add_special_tokens(dict(additional_special_tokens=["<start>", "<end>"]))
        return made

    more = dict(recipe=dict(steps=600, careful_steps=600, lr=3e-3), shape=dict(initializer_range=0.08), tokenizer=tokenizer)
    return tasks.Task("chains", every[400:], every[:400], lambda text, a: (text, float(text == a)), True, demonstrate, **more)


# ---------------------------------------------------------------- the loop


def make_parts(policy, args, run):
    """-> the policy, the heads and the decoder; the last two go into run.extra."""
    import copy

    from common import gpu

    lm, decoder = policy.lm, copy.deepcopy(policy.lm)
    heads = Heads(lm.config.hidden_size, args).to(lm.device, torch.promote_types(lm.dtype, torch.float32))
    layers = args.decoder_layers or lm.config.num_hidden_layers
    decoder.config.num_hidden_layers, decoder.model.layers = layers, decoder.model.layers[:layers]
    run.extra |= {name: (x, gpu.make_optimizer(x, args)) for name, x in dict(heads=heads, decoder=decoder).items()}
    return policy, heads, decoder


def questions(args, tokenizer):
    """-> the Task, whose prompts end with the mark that latents follow, and the ids of both marks."""
    from common import UserError, tasks

    marks = tokenizer.convert_tokens_to_ids(list(args.marks))
    if None in marks or tokenizer.unk_token_id in marks:
        raise UserError(f"--marks {' '.join(args.marks)}: must be tokens of --model {args.model}")
    task = tasks.encode(chains(args.task) or tasks.load(args.task), tokenizer, args.prompt_template, args.system_prompt)
    for e in task.train + task.test:
        e.ids = [*e.ids, marks[0]]
    return task, marks


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import gpu, models, rewards, rollout, runlog, settings
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args, chains)
    tokenizer = models.load_tokenizer(args, chains)
    task, marks = questions(args, tokenizer)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=1)
    policy, heads, decoder = parts = make_parts(models.load(args, device, warm=chains).to(device), args, run)
    if not run.found:
        sft_stage(parts, task, marks, tokenizer, args, run)
    policy, (_, heads_optimizer) = gpu.shard(policy), run.extra["heads"]
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = make_engine(policy, heads, tokenizer, marks, args)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        found = rollout.evaluate(engine, scorer, tokenizer, task, args)
        return evaluated(found, engine, decoder, task, tokenizer, args)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        engine.attach(batch)
        engine.sleep()
        scored(batch, decoder, tokenizer, args)
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled.
        logp, _, h = read(policy, batch, args, how=replay)
        batch.old_logp = with_latents(heads, logp, h, batch).detach()
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
        measure(meter, batch)
        for rows, weights in minibatches(batch, args, step, token_weights, columns=["latent"]):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy, h = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **replay(mb, args))
                logp = with_latents(heads, logp, h, mb)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                look(meter, stats | rollout.diagnostics(logp, mb, entropy), mb, heads, h)
            summed(heads)
            grad_norm, heads_norm = (gpu.clip_gradients(x, args.max_grad_norm) for x in (policy, heads))
            if run.finite(gpu.total(loss), grad_norm, heads_norm):
                optimizer.step()
                heads_optimizer.step()
            optimizer.zero_grad()
            heads_optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm, heads_grad_norm=heads_norm)
        engine.sync()
        run.timed("update")
        run.log(meter.result() | rollout.summary(batch), batch)

    show(run, engine, decoder, task, tokenizer, args)
    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
