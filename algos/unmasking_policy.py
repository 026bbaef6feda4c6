"""Unmasking policy: "Learning Unmasking Policies for Diffusion Language Models". Jazbec, Olausson, Bethune, Ablin, Kirchhof,
Monteiro, Turrisi, Ramapuram and Cuturi, arXiv 2512.09106 (2025).

Idea: a masked-diffusion language model guesses all masked positions at once; a small network learns which of the guesses to
keep. At each step it sees how sure the model is of every guess, and draws for every masked position whether to reveal it.
The language model is the environment and stays as it is: GRPO trains the network alone, on being right in few steps.

Objective, to be maximised (equation numbers not at hand); m: what is masked, c: confidences, T of L steps were made:
    J = 1/B sum_i 1/T_i sum_t min(rho A, clip(rho, 1 - eps, 1 + eps) A),   rho = exp(l - l_old), one for each step t
    l = sum_k [u_k log sigma(b_k) + (1 - u_k) log(1 - sigma(b_k))] over the positions k that may be revealed;  u_k: k is
    b = f(c, m, t / L), the network's logits;   c_k = max_v p_k(v), and k is revealed as the v of this maximum
    R = correct ((L - T + 1) / L)^alpha,   A = R - mean R over the group

GRPO's formula, then, whose tokens are denoising steps: in what is [B, T] here, T counts them. A step in which nothing is drawn
is lost, and a canvas with masks left is wrong. Evaluations draw too, at --eval-temperature (the paper: 1, in blocks 0.5), but
reveal the likeliest position where none is drawn; greedy is the language model, always. R is as in the released code.
--reward-form additive is the paper's ablation that fails: R = correct - alpha T / L. Ours, for canvases as small as the tiny
model's: a learned embedding of the position (the paper has rotary positions only), and a bias of -1 in place of -2. Left out:
the paper's second kind of action (positions one after the other until a stop), and rollouts of an expert in the group.

Family: diffusion
Differs from grpo.py in: epochs, max_grad_norm, beta, stop, engine, tis_cap, tis_level, vllm_memory, vllm_tp, push_to_hub,
    lora_rank, lora_alpha, lora_targets, gradient_checkpointing, speed_reward, kl_penalty, step_logp, likelihood, turned,
    UnmaskingPolicy, unmask, kept, train
Same as dr_grpo.py: advantages
Measures: measure, counted, told
Costs: a forward pass of the language model for every denoising step, none in the update. No engine can fill a canvas: the
       trainer's own sampler does.
Run:   python algos/unmasking_policy.py                         tiny model, CPU, about a minute
       python algos/unmasking_policy.py --alpha 0               right, whatever it takes
       python algos/unmasking_policy.py --block-length 4        in blocks, from the left
       python algos/unmasking_policy.py --model llada-8b --lr-schedule cosine --warmup-steps 100 --weight-decay 0.1
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
    epochs: int = 2
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
    max_grad_norm: float = 0.2
    """the gradient is scaled down to this norm"""
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    temperature: float = 1.0
    """of sampling, and of every log-prob; no top-p: samples of a cut distribution are not those that log-probs are of"""
    format_reward: float = 0.0
    """added to the reward of a completion that states its answer in a recognised form"""
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
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """who gets the metrics besides TensorBoard"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of weights and gradients"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] | None = None
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass of the trainer; a prompt that its completions share counts once"""

    # Unmasking policy
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", denoising_steps="1 <= x",
        output_bias="-10 <= x <= 10",
    )  # fmt: skip
    tiny_preset = dict(
        task="sums", steps=100, prompts_per_step=16, minibatches=1, lr=2e-3, width=32, output_bias=-1.0, position_std=0.3,
    )  # fmt: skip
    real_preset = dict(
        prompts_per_step=32, group_size=4, minibatches=1, lr=3e-5, max_new_tokens=256, optimizer="adamw_sr",
        micro_batch_tokens=8192, width=128, output_bias=-2.0, position_std=0.0,
    )  # fmt: skip
    denoising_steps: int | None = None
    """passes of the model over which a canvas is filled, at most; None: as many as it has positions (the paper)"""
    block_length: int = 0
    """positions of a block; blocks are filled from the left; 0: the whole canvas at once"""
    alpha: float = 0.3
    """how much speed counts; 0: not at all (the paper: 0 to 10, a policy for each)"""
    reward_form: Literal["multiplicative", "additive"] = "multiplicative"
    """additive: steps are paid for whether the answer is right or not, as in the paper's ablation"""
    eps: float = 0.5
    """half-width of the clip interval (code)"""
    width: Literal[16, 32, 64, 128, 256] | None = None
    """d, channels of the network (tiny: ours; the paper: 128)"""
    output_bias: float | None = None
    """its logits at the start: -2 reveals an eighth of the positions in a step, -1 a quarter (tiny: ours; the paper: -2)"""
    position_std: float | None = None
    """of a learned embedding of each position at the start; 0: none (tiny: ours; the paper: 0)"""


# ---------------------------------------------------------------- the objective


def speed_reward(correct, steps, args):
    """correct, steps [B] -> R [B]: only a right answer is worth more where it came sooner."""
    if args.reward_form == "additive":
        return correct - args.alpha * steps / args.max_new_tokens
    return correct * ((args.max_new_tokens - steps + 1) / args.max_new_tokens) ** args.alpha


def advantages(rewards, args):
    """[P, G] -> [P, G]: centred in the group, not divided by its std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred, torch.zeros_like(rewards))


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


def step_logp(logits, revealed, valid):
    """[n, L] each -> [n]: the log-probability of revealing these of the valid positions and no others, and its entropy."""
    logits = logits.masked_fill(~valid, 0.0)
    yes, no = (torch.nn.functional.logsigmoid(x) for x in (logits, -logits))
    entropy = -(yes.exp() * yes + no.exp() * no).detach()
    return tuple(x.masked_fill(~valid, 0.0).sum(1) for x in (torch.where(revealed, yes, no), entropy))


def likelihood(policy, batch, args):
    """-> step_logp() and entropy of every step that was made, [B, T] each, 0 elsewhere."""
    made, columns = batch.trained, batch.columns
    time = (made.cumsum(1) - 1) / made.shape[1]
    confidence, masked, revealed, valid = (columns[name][made] for name in ("confidence", "masked", "revealed", "valid"))
    found = step_logp(policy(confidence, masked, time[made]) / args.temperature, revealed, valid)
    return tuple(x.new_zeros(made.shape).masked_scatter(made, x) for x in found)


# ---------------------------------------------------------------- the network, and what it does on a canvas


def turned(x):
    """[n, heads, L, k] -> the same: rotary positions."""
    half = x.shape[3] // 2
    place, k = (torch.arange(size, device=x.device) for size in (x.shape[2], half))
    angle = (place[:, None] * 10000.0 ** (-k / half)).to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class UnmaskingPolicy(torch.nn.Module):
    """One transformer block over the positions of a canvas. What it reads there is the confidence; whether the position is
    masked, and the time, scale and shift what passes through it. forward -> logits b of revealing, [n, L]."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(args.seed)  # the same network on every process
        d, linear, chain = args.width, torch.nn.Linear, torch.nn.Sequential
        self.confidence, self.masked = linear(1, d), torch.nn.Embedding(2, d)
        self.time, self.modulation = chain(linear(d, d), torch.nn.SiLU(), linear(d, d)), linear(d, 6 * d)
        self.qkv, self.heads = linear(d, 3 * d), linear(d, d)
        self.ffn = chain(linear(d, 4 * d), torch.nn.GELU(), linear(4 * d, d))
        self.norms, self.out = torch.nn.ModuleList(torch.nn.LayerNorm(d) for _ in range(3)), linear(d, 1)
        for weight in self.modulation.parameters():
            torch.nn.init.zeros_(weight)
        torch.nn.init.normal_(self.out.weight, std=0.02)  # ours
        torch.nn.init.constant_(self.out.bias, args.output_bias)
        self.place = None
        if args.position_std > 0:
            self.place = torch.nn.Parameter(args.position_std * torch.randn(args.max_new_tokens, d))

    def forward(self, confidence, masked, time):
        """confidence, masked [n, L], time [n] -> [n, L]."""
        x, time = (z[..., None].to(self.out.weight.dtype) for z in (confidence, time))
        time = torch.cat([time.cos(), time.sin()], 1)  # of one frequency, as in the code
        time = time.repeat_interleave(self.out.in_features // 2, 1)
        y = self.modulation(self.masked(masked.long()) + self.time(time)[:, None])
        scale, shift, gate, scale2, shift2, gate2 = y.chunk(6, -1)
        x = self.confidence(x) if self.place is None else self.confidence(x) + self.place
        q, k, v = self.qkv(self.norms[0](x) * (1 + scale) + shift).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(turned(q), turned(k), v)
        x = x + self.heads(seen.transpose(1, 2).flatten(2)) * (1 + gate)
        x = x + self.ffn(self.norms[1](x) * (1 + scale2) + shift2) * (1 + gate2)
        return self.out(self.norms[2](x)).squeeze(-1)


@torch.no_grad()
def unmask(policy, trace, guess, masked, noise, temperature, args):
    """Fills a canvas by what the policy draws, block by block, from the left. guess(tokens, masked, noise [b, L], 0) -> the
    likeliest tokens and their probabilities [b, L]; masked [b, L], all True; noise [b, T + 1, L] in [0, 1) -> tokens [b, L].
    temperature: the policy's; 0, in evaluations: --eval-temperature. Each step, seen and done, is written into `trace`."""
    (b, L), device = masked.shape, masked.device
    width, place = args.block_length or L, torch.arange(L, device=device)
    share = args.denoising_steps * width // L  # of a block
    saw = {name: masked.new_zeros(b, L, L) for name in ("masked", "revealed", "valid")}
    saw |= dict(confidence=torch.zeros(b, L, L, device=device), logp=torch.zeros(b, L, device=device))
    tokens, made = torch.zeros_like(masked, dtype=torch.int64), torch.zeros(b, device=device)
    for t in range(share * L // width):
        valid = masked & (place // width == t // share)
        if not valid.any():
            continue
        found, confidence = guess(tokens, masked, noise[:, t], 0)
        logits = policy(confidence, masked, made / L) / (temperature or args.eval_temperature)
        revealed = valid & (noise[:, t] < logits.sigmoid())
        if not policy.training:  # an action that is forced has no likelihood to learn from
            best = logits.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
            revealed |= valid & (place == best) & ~revealed.any(1, keepdim=True)
        now = dict(masked=masked, revealed=revealed, valid=valid, confidence=confidence)
        for name, x in (now | dict(logp=step_logp(logits, revealed, valid)[0])).items():
            saw[name][:, t] = x
        tokens, masked, made = torch.where(revealed, found, tokens), masked & ~revealed, made + valid.any(1)
    trace.append(saw)
    return tokens.masked_fill(masked.any(1, keepdim=True), 0)  # with masks left it says nothing


def kept(batch, trace, args):
    """What unmask() wrote down of a rollout into its batch: columns, steps that were made, their log-probs, rewards."""
    batch.columns = {name: torch.cat([saw[name] for saw in trace]) for name in trace[0]}
    trace.clear()
    batch.trained = batch.columns["valid"].any(2)
    batch.old_logp = batch.sampler_logp = batch.columns.pop("logp")
    batch.reward = speed_reward(batch.reward, batch.trained.sum(1), args)


def measure(meter, batch):
    """Of a completion: steps, and whether the canvas was filled; of a step: positions revealed."""
    revealed, made = batch.columns["revealed"], batch.trained
    of = dict(denoising_steps=made.sum(1).float(), filled=revealed.any(1).all(1).float())
    meter.add(of, made.any(1))
    meter.add(dict(revealed=revealed.sum(2).float()), made)
    batch.columns["revealed_at"] = (revealed.int().argmax(1) + 1) * revealed.any(1)  # for samples.jsonl; 0: never


def counted(trace, found):
    """What an evaluation found, with the mean steps of its canvases, over all ranks, by what unmask() wrote down."""
    from common import gpu

    steps = [n for saw in trace for n in saw["valid"].any(2).sum(1).tolist()]
    trace.clear()
    mean = gpu.total(float(sum(steps))) / gpu.total(len(steps))
    return found | dict(denoising_steps=mean, prompts=found["prompts"])


def told(before, after):
    """Two evaluations -> the last line of a run."""
    ends = [f"{x['greedy_accuracy']:.2f} in {x['denoising_steps']:.1f} steps" for x in (before, after)]
    return f"greedy accuracy {' -> '.join(ends)} on {after['prompts']} prompts"


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from functools import partial

    from common import diffusion, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches

    args, config, device = settings.prepare(__file__, args, diffusion.world)
    args.denoising_steps = min(args.denoising_steps or args.max_new_tokens, args.max_new_tokens)
    tokenizer = models.load_tokenizer(args, diffusion.world)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, trained=0, frozen=1)
    denoiser = gpu.shard(models.load(args, device, trainable=False, warm=diffusion.world, denoiser=True))
    policy = UnmaskingPolicy(args).to(device, torch.promote_types(denoiser.lm.dtype, torch.float32))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    trace = []
    engine = diffusion.Canvas(denoiser, tokenizer, args, partial(unmask, policy, trace))
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        policy.eval()
        found = rollout.evaluate(engine, scorer, tokenizer, task, args)
        policy.train()
        return counted(trace, found)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        kept(batch, trace, args)
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

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
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = likelihood(policy, mb, args)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            for weight in policy.parameters():  # it is so small that every process has all of it
                weight.grad.copy_(gpu.total(weight.grad))
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            if run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        run.log(meter.result() | rollout.summary(batch), batch)

    run.finish(run.after and told(run.state["before"], run.after))
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
