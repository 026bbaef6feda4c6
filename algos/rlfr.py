"""RLFR: "Extending Reinforcement Learning for LLMs with Flow Environment". Zhang et al., arXiv 2510.10201 (2025).

Idea: charge the policy for tokens whose hidden states are unlike those of correct solutions. A small network, the flow, learns
from correct solutions how noise becomes a token's hidden state, given the state one token before; where it predicts badly, the
state is strange. The strangest tokens of a completion pay a little, and the outcome is paid at its last token.

Objective, to be maximised (GRPO's, with a return for each token; equation numbers not at hand):
    J = 1/B sum_i 1/|y_i| sum_t min(r A_it, clip(r, 1 - eps, 1 + eps) A_it),   r = min(pi / pi_old, 3)
    A_it = z_i - beta_f sum_{s >= t} n_is,   z = (R - mean R) / std R over the group
    n = min-max of D over the completion, if above eta and among its top_k largest, else 0
    D_t = mean over layers and times of tau / (1 - tau) |v(x, tau, c) - (a - e)|^2 / H,   x = tau a + (1 - tau) e
    a = hidden state at token t, c = that one token before, e = noise, tau = 0.8,
    v = the flow's velocity

The flow is fitted to |v - (a - e)|^2: first on correct solutions, read by the starting model, at random times (the sigmoid of
a normal number); later at tau = 0.8, on the policy's own correct completions. The authors' code differs: it fits with the
state one token after as c and scores with the one before; here it is the one before in both. It debiases all times by the
last one's factor, and in rows without padding takes the second smallest D for the minimum (--minmax official). Here the flow
learns from the states that it scored, before the policy's update, which saves a pass. Controls: --shuffle deals out the D of
a completion to its tokens at random; --flow frozen stops after the first fit, --flow scratch has only the policy's own
completions.

Family: credit
Differs from grpo.py in: model, sinusoidal, mlp, Block, Flow, draws, velocity_error, deviation, shuffled,
    flow_rewards, advantages, surrogate, experts, make_flow, readings, flow_stage, score, train
Measures: auc, measure
Costs: the flow and its optimizer (as wide as the policy; with 6 blocks at 7B half a billion weights), and fitting it once,
       before the first step. Three hidden states of a micro-batch's tokens come from the pass that gives old_logp, noise for
       them from the CPU: there is no further pass of the policy.
Run:   python algos/rlfr.py                                     tiny model, CPU, about two minutes
       python algos/rlfr.py --task route --shuffle              the control, where methods can be told apart
       python algos/rlfr.py --model qwen2.5-1.5b --expert solutions.jsonl    GSM8K on one GPU; rows {prompt, answer}, each
                                                                answer a whole correct solution
       torchrun --nproc-per-node 8 algos/rlfr.py --model qwen2.5-7b --expert solutions.jsonl --flow-depth 6
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny-deep"
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

    # RLFR
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", eta="0 <= x < 1",
        layers="0 <= x <= 1", timesteps="0 < x < 1", top_k="1 <= x", ratio_cap="1 <= x", flow_width="1 <= x",
        demos_per_step="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(task="addition", steps=30, eval_every=10, flow_depth=2, flow_steps=400, demos_per_step=16, flow_lr=1e-3)
    real_preset = dict(flow_depth=4, flow_steps=1000, demos_per_step=64, flow_lr=1e-4)
    eps: float = 0.2
    """half-width of the clip interval (authors' scripts)"""
    ratio_cap: float = 3.0
    """largest ratio that counts where the advantage is negative (authors' code)"""
    beta_f: float = 0.01
    """what the strangest token of a completion pays (authors' scripts); 0: GRPO"""
    eta: float = 0.6
    """share of a completion's range of D that is free (authors' scripts)"""
    top_k: int = 15
    """tokens of a completion that pay, at most (authors' scripts)"""
    minmax: Literal["plain", "official"] = "plain"
    """official: the least D of the longest completions is the second smallest one, as in the authors' code"""
    timesteps: tuple[float, ...] = (0.8,)
    """times tau at which D is taken; near 1 the state is seen almost without noise (authors' scripts)"""
    layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    """depths at which hidden states are read, as shares of the model's layers (authors' configs)"""
    flow: Literal["online", "frozen", "scratch"] = "online"
    """online: fitted first, then trained along (the paper); frozen: fitted only; scratch: trained along only"""
    shuffle: bool = False
    """the control: the D of each completion in random order"""
    expert: str | None = None
    """.jsonl file to fit the flow to, rows with prompt and answer, the answer a correct solution; None: the task's own"""
    flow_width: int | None = None
    """channels inside the flow; None: as many as the policy's hidden states have (the paper)"""
    flow_depth: int | None = None
    """its blocks; None: 2 on the tiny model, else 4 (the paper: 4, at 7B 6)"""
    flow_steps: int | None = None
    """updates of the first fit; None: 400 on the tiny model, else 1000 (ours; the paper: two epochs)"""
    demos_per_step: int | None = None
    """solutions in such an update, over all processes; None: 16 on the tiny model, else 64 (ours)"""
    flow_lr: float | None = None
    """AdamW's rate for the flow, falling to 0 in the first fit; None: 1e-3 on the tiny model (ours), else 1e-4 (the paper)"""


# ---------------------------------------------------------------- the objective


def sinusoidal(number, size=256):
    """[..., 1] -> [..., size]: sinusoidal embedding, frequencies from 1 down to 1/10000."""
    angle = number * 10000.0 ** -torch.arange(0, 1, 2 / size, device=number.device)
    return torch.cat([angle.cos(), angle.sin()], -1)


def mlp(*widths):
    """Two linear layers with SiLU between them."""
    return torch.nn.Sequential(torch.nn.Linear(*widths[:2]), torch.nn.SiLU(), torch.nn.Linear(*widths[1:]))


class Block(torch.nn.Module):
    """x + g MLP(RMSNorm(x) (1 + s) + b); b, s, g are linear in y, and 0 at first."""

    def __init__(self, width):
        super().__init__()
        self.modulation, self.mlp = torch.nn.Linear(width, 3 * width), mlp(width, width, width)

    def forward(self, x, y):
        b, s, g = self.modulation(y).chunk(3, -1)
        return x + g * self.mlp(torch.nn.functional.rms_norm(x, x.shape[-1:]) * (1 + s) + b)


class Flow(torch.nn.Module):
    """The velocity v of a hidden state of H channels, at L layers of these depths (shares of all); 0 at first (adaLN-Zero)."""

    def __init__(self, H, width, blocks, depths):
        super().__init__()
        self.depths, linear = depths, torch.nn.Linear
        self.x, self.c, self.t, self.layer = linear(H, width), linear(H, width), mlp(256, width, width), mlp(256, width, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.modulation, self.out = linear(width, 2 * width), linear(width, H)
        for layer in (self.modulation, self.out, *(block.modulation for block in self.blocks)):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x, t, c):
        """x, c [n, L, H], t [n or 1, L or 1, 1] -> [n, L, H]. A block's insides are made again in the backward pass."""
        layer = sinusoidal(t.new_tensor(self.depths)[:, None])
        x, c, t, layer = (z.to(self.out.weight.dtype) for z in (x, c, sinusoidal(t), layer))
        x, y = self.x(x), torch.nn.functional.silu(self.c(c) + self.t(t) + self.layer(layer))
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, y, use_reentrant=False, preserve_rng_state=False)
        b, s = self.modulation(y).chunk(2, -1)
        return self.out(torch.nn.functional.rms_norm(x, x.shape[-1:]) * (1 + s) + b)


def draws(mask, seeds, like):
    """mask [b, T] of n tokens, a seed for each row -> noise like `like` [n, L, H], and one number more for each, [n, L, 1]:
    normal, from the CPU, and a row's own in any batch."""
    L, H = like.shape[1:]
    made = (torch.Generator().manual_seed(seed) for seed in seeds)
    rows = [torch.randn(n, L, H + 1, generator=g) for n, g in zip(mask.sum(1).tolist(), made)]
    return torch.cat(rows).to(like.device).split([H, 1], -1)


def velocity_error(flow, target, condition, noise, t):
    """Hidden states and noise [n, L, H], t [n or 1, L or 1, 1] -> [n]: squared error of v, mean over channels and layers."""
    v = flow(t * target + (1 - t) * noise, t, condition)
    return (v - (target - noise)).square().mean((1, 2))


def deviation(flow, target, condition, noise, args):
    """[n, L, H] each -> D [n], no gradient, with tau / (1 - tau) of each time; and the error [n] that the flow learns from."""
    errors = [velocity_error(flow, target, condition, noise, noise.new_full((1, 1, 1), t)) for t in args.timesteps]
    debiased = [t / (1 - t) * error.detach() for t, error in zip(args.timesteps, errors)]
    return sum(debiased) / len(errors), sum(errors) / len(errors)


def shuffled(deviations, mask, keys):
    """[B, T] each -> [B, T]: a completion's deviations in the order of its random keys."""
    return deviations.gather(1, keys.masked_fill(~mask, float("inf")).argsort(dim=1, stable=True))


def flow_rewards(deviations, mask, args):
    """D, mask [B, T] of a whole rollout -> [B, T]: -beta_f n, never positive; 0 where a completion's D are all equal."""
    inf, lengths = float("inf"), mask.sum(1, keepdim=True)
    low = deviations.masked_fill(~mask, inf).amin(1, keepdim=True)
    high = deviations.masked_fill(~mask, -inf).amax(1, keepdim=True)
    if args.minmax == "official":
        second = deviations.masked_fill(~mask | (deviations <= low), inf).amin(1, keepdim=True)
        low = torch.where(lengths == lengths.max(), second, low)
    n = ((deviations - low) / (high - low)).masked_fill(~mask | ~(high > low), 0.0)
    n = n.masked_fill(n <= args.eta, 0.0)
    top = n.argsort(dim=1, descending=True, stable=True)[:, : args.top_k]
    return -args.beta_f * torch.zeros_like(n).scatter(1, top, n.gather(1, top))


def advantages(rewards, penalties, mask, args):
    """[P, G], flow rewards [B, T] -> [B, T]: sums from a token on; the last one has the z-score, sample std, too."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    z = torch.where(std > 1e-6, centred / (std + 1e-9), torch.zeros_like(rewards))
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    received = penalties + last * z.view(-1, 1)
    return received.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp().clamp(max=args.ratio_cap)
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


def auc(higher, lower):
    """[n], [m] -> how often one of the first is above one of the second, ties half: 0.5 by chance; nan of nothing."""
    gap = higher[:, None] - lower
    return ((gap > 0).float() + 0.5 * (gap == 0)).mean().item()


def measure(meter, batch, flow_loss, fit):
    """D and what is paid; at the first rollout the flow's error before and after its fit, and how well wrong completions are
    told from right ones by the mean of D, by that of -log p and by being short: all, and those longer than half the longest."""
    from common import UserError, gpu

    if not max(flow_loss, *fit[-1:], -float("inf")) < float("inf"):
        raise UserError("the flow has diverged: its error is not finite; try a smaller --flow-lr")
    deviations, paid, lengths = batch.columns["deviation"], batch.columns["flow_reward"], batch.mask.sum(1)
    meter.add(dict(deviation=deviations), batch.mask)
    meter.add(dict(flow_reward=paid.sum(1), penalised=(paid < 0).float().sum(1)), lengths > 0)
    meter.note(flow_loss=flow_loss)
    if batch.policy_version[0] > 0:
        return
    meter.note(**dict(flow_before=fit[0], flow_after=sum(fit[-20:]) / len(fit[-20:])) if fit else {})
    means = (-x.masked_fill(~batch.mask, 0.0).sum(1) / lengths.clamp(min=1) for x in (-deviations, batch.old_logp))
    right, *signs = map(gpu.gather, (batch.accuracy >= 1, *means, -lengths))
    for where, some in dict(all=signs[2] <= 0, long=2 * signs[2] < signs[2].min()).items():
        for name, x in zip(("flow", "logp", "short"), signs):
            if (some & right).any() and (some & ~right).any():
                meter.note(**{f"auc_{name}_{where}": auc(x[some & ~right], x[some & right])})


# ---------------------------------------------------------------- the loop


def experts(task, tokenizer, args):
    """-> a Task whose demonstrations are correct solutions: the task itself, or args.expert. UserError where there are none."""
    from dataclasses import replace

    from common import UserError, tables, tasks

    if args.expert:
        rows, _ = tables.read_rows(args.expert, tables.prompt_and_answer)
        train = [tasks.Example(i, prompt, answer, where=where) for i, (prompt, answer, where) in enumerate(rows)]
        task = replace(task, train=train, test=[], shown=[])
        task.demonstrate = lambda rng, e, _: e.answer if isinstance(e.answer, str) else rng.choice(e.answer)
        tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt)
    if args.flow != "scratch" and not (task.train and task.demonstrate):
        raise UserError(f"task {task.name}: no correct solutions to fit the flow to; give some by --expert file.jsonl")
    return task


def make_flow(policy, args):
    """-> the flow, in the policy's precision, and the optimizer that trains it along."""
    from dataclasses import replace

    from common import gpu

    lm, H = policy.lm, policy.lm.config.hidden_size
    flow = gpu.shard(Flow(H, args.flow_width or H, args.flow_depth, args.layers).to(lm.device, lm.dtype))
    return flow, gpu.make_optimizer(flow, replace(args, lr=args.flow_lr))


def readings(policy, batch, args, *numbers):
    """Reads a batch by micro-batches: yields rows [b], mask and log-probs [b, T], the hidden states [n, L, H] at the n tokens
    of the mask and one before each, and draws for them, seeded by `numbers` and the row."""
    from common import gpu
    from common.batch import Batch, read

    pad, layers = torch.nn.functional.pad, [round(p * policy.lm.config.num_hidden_layers) for p in args.layers]
    ids, seen = pad(batch.ids, (1, 0)), pad(batch.attention_mask, (1, 0))
    wide = Batch(ids, seen, pad(batch.mask, (1, 0), value=True), prompt_id=batch.prompt_id)  # from the prompt's last token on
    for mb in wide.micro_batches(torch.arange(len(ids), device=ids.device), args.micro_batch_tokens):
        logp, _, *states = read(policy, mb, args, layers=layers, at=True)
        mask, states = mb.mask[:, 1:], torch.stack(states, 2)
        seeds = [gpu.hash_seed(args.seed, *numbers, gpu.rank() * len(ids) + i) for i in mb.row.tolist()]
        target, condition = states[:, 1:][mask], states[:, :-1][mask]
        yield mb.row, mask, logp[:, 1:], target, condition, *draws(mask, seeds, target)


def flow_stage(policy, flow, expert, tokenizer, args, run):
    """Fits the flow to correct solutions as the starting policy reads them -> its error at every update."""
    import random
    from dataclasses import replace

    from tqdm import tqdm

    from common import UserError, encoding, gpu
    from common.batch import collate

    stage = replace(args, lr=args.flow_lr, steps=args.flow_steps, lr_schedule="cosine", warmup_steps=0)
    optimizer, fit = gpu.make_optimizer(flow, stage), []
    (schedule,) = gpu.make_schedules([optimizer], stage)
    for step in tqdm(range(0 if args.flow == "scratch" else args.flow_steps), desc="flow", disable=None, leave=False):
        rng, error = random.Random(gpu.hash_seed(args.seed, step, 31)), 0.0
        some = rng.choices(expert.train, k=args.demos_per_step)
        texts = [expert.demonstrate(rng, e, 1.0) for e in some]
        told = encoding.response_ids(texts, tokenizer, "a solution", args.max_new_tokens)
        batch = collate(gpu.local([(e.ids, y) for e, y in zip(some, told)]), tokenizer.pad_token_id, gpu.device())
        for _, _, _, target, condition, noise, n in readings(policy, batch, args, 31, step):
            loss = velocity_error(flow, target, condition, noise, n.sigmoid()).sum() / max(1, sum(map(len, told)))
            loss.backward()
            error += loss.item()
        gpu.clip_gradients(flow, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        fit.append(gpu.total(error))
        if gpu.maximum(int(bool(run.stop))):
            raise UserError("stopped while the flow was fitted: nothing is lost but that; start again")
    return fit


def score(policy, flow, optimizer, batch, args, step):
    """Reads a rollout: its column deviation becomes D -> log-probs [B, T], and the flow's error on correct completions, mean
    over the tokens of each: the loss from which it then learns. The policy has no part in that gradient."""
    from common import gpu

    right, learns, loss = batch.mask & (batch.accuracy >= 1)[:, None], args.flow != "frozen", 0.0
    weights = gpu.local(token_weights(gpu.gather(right), args))[:, : right.shape[1]]
    wide = torch.promote_types(policy.lm.dtype, torch.float32)
    logp, batch.columns["deviation"] = (torch.zeros_like(weights, dtype=wide) for _ in range(2))
    for rows, mask, found, target, condition, noise, keys in readings(policy, batch, args, 23, step):
        with torch.set_grad_enabled(learns):
            D, error = deviation(flow, target, condition, noise, args)
            micro_loss = (error * weights[rows, : mask.shape[1]][mask]).sum()
        if learns:
            micro_loss.backward()
        loss += micro_loss.item()
        D, keys = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (D, keys[:, 0]))
        if mask.any():  # else a row that only keeps ranks in step
            logp[rows, : mask.shape[1]] = found
            batch.columns["deviation"][rows, : mask.shape[1]] = shuffled(D, mask, keys) if args.shuffle else D
    if learns:
        norm = gpu.clip_gradients(flow, args.max_grad_norm)
        if gpu.total(int(right.sum())) and norm < float("inf"):
            optimizer.step()
        optimizer.zero_grad()
    return logp, gpu.total(loss)


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    expert = experts(task, tokenizer, args)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.beta > 0))
    policy = gpu.shard(models.load(args, device))
    reference = gpu.shard(models.load(args, device, trainable=False)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    flow, flow_optimizer = run.extra["flow"] = make_flow(policy, args)
    run.restore(policy, optimizer)
    if "fit" not in run.state:
        run.state["fit"] = flow_stage(policy, flow, expert, tokenizer, args, run)
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

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, flow_loss = score(policy, flow, flow_optimizer, batch, args, step + len(run.queue))
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        scores, mask = gpu.gather(batch.reward).view(-1, args.group_size), gpu.gather(batch.mask)
        paid = flow_rewards(gpu.gather(batch.columns["deviation"]), mask, args)
        adv = advantages(scores, paid, mask, args)
        batch.adv, batch.columns["flow_reward"] = (gpu.local(x)[:, : batch.mask.shape[1]] for x in (adv, paid))

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch, flow_loss, run.state["fit"])
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
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
