"""D3S: Dynamic Dual-Level Down-Sampling. Wang et al., "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework
for Efficient Policy Optimization", Tsinghua and WeChat, arXiv 2509.22115 (2025).

Idea: sample many completions and train on those few whose advantages lie furthest apart, and in these on the tokens at which
much was at stake: a large advantage, and a policy that was not sure. The rest carries little gradient and costs as much. Both
shares grow during training, since what is left out for ever is never learnt and what is seen too often is learnt by heart.

Objective, to be maximised (equation numbers not at hand; no code is public):
    J = 1/Z sum_{(i,t) in U} min(r A, clip(r, 1 - eps, 1 + eps) A),   A as in grpo.py, not centred or scaled again on S
    S = the N completions of the rollout whose A have the largest variance: the k largest and the N - k smallest, at the best k
    U = the share K of the tokens of S, rounded up, with the largest |A_i| H_it,   H = entropy of pi_old
    N and K go linearly from their first to their last values, from step to step;   Z: tokens of U in the minibatch

The shares' values and Z could not be found: they are ours; with --token-norm all Z is the number of all tokens of S. Ties in A
are broken at random. Where too few completions have A != 0, those with A = 0 would fill S up: they are dropped, and N is less
in that step. H is read once, before the first update, so that the whole rollout has one ranking. A resumed run keeps the
schedule of the --steps that it began with. The paper's ablations: --select group (S within each group), both token shares 1
(no U), last shares equal to the first (no schedule); --select random is the control.

Family: tokens
Differs from grpo.py in: shares, widest, chosen, stakes, token_weights, train
Measures: measure
Costs: less: the update reads N of the completions. All are sampled, and read once before it (their entropies and old_logp).
Run:   python algos/d3s.py                                      tiny model, CPU, about a minute
       python algos/d3s.py --model qwen2.5-1.5b                 GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/d3s.py --model qwen2.5-7b
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

    # D3S
    limits = dict.fromkeys(("rows_first", "rows_last", "tokens_first", "tokens_last"), "0 < x <= 1")
    limits |= dict(group_size="2 <= x: the completions of a prompt are compared with each other")
    tiny_preset = dict(prompts_per_step=16, group_size=16)  # as many completions as elsewhere, to choose from
    eps: float = 0.2
    """half-width of the clip interval (verl, TRL; the paper's could not be found)"""
    rows_first: float = 0.25
    """N at the first step, as a share of the rollout's completions (ours)"""
    rows_last: float = 0.75
    """the same at the last one (ours)"""
    tokens_first: float = 0.2
    """K at the first step, a share of the tokens of these (ours)"""
    tokens_last: float = 0.8
    """the same at the last one (ours)"""
    select: Literal["batch", "group", "random"] = "batch"
    """who is in S: the widest of the rollout; of each group alone; any (a control)"""
    token_norm: Literal["selected", "all"] = "selected"
    """Z: the tokens that are selected (ours), or all tokens of S"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def shares(step, planned, args):
    """The number of a step, from 0, of so many -> N as a share of the completions, and K."""
    p = min(step / max(1, planned - 1), 1.0)
    return (1 - p) * args.rows_first + p * args.rows_last, (1 - p) * args.tokens_first + p * args.tokens_last


def widest(adv, n, shuffle):
    """A [m], a permutation that breaks ties -> the indices [n] of those whose variance is largest."""
    value = adv.cpu().double().round(decimals=4)  # equal, but for the last bits, is equal
    order = shuffle[value[shuffle].argsort(descending=True, stable=True)]
    i, j = torch.arange(n + 1)[:, None], torch.arange(n)
    splits = order[j + (len(adv) - n) * (j >= i)]  # [n + 1, n]: the i largest and the n - i smallest
    spread = value[splits].var(1, correction=0).round(decimals=6)
    best = (spread == spread.max()).nonzero()[:, 0]
    best = best[(off := (2 * best - n).abs()) == off.min()]  # nearest to as many of either end, else by chance
    return splits[best[shuffle[0] % len(best)]]


def chosen(adv, share, args, chance):
    """A [P, G], N as a share, a generator -> S [P, G] bool: that share of all, or of each group."""
    rows = adv if args.select == "group" else adv.view(1, -1)
    found, n = torch.zeros_like(rows, dtype=torch.bool), max(1, round(share * rows.shape[1]))
    for taken, row in zip(found, rows):
        shuffle = torch.randperm(len(row), generator=chance)
        taken[(shuffle[:n] if args.select == "random" else widest(row, n, shuffle)).to(adv.device)] = True
    return found.view_as(adv)


def stakes(adv, entropy, mask, share):
    """A, H, S's mask [B, T] -> U [B, T]: 1 for the share of S's tokens with the largest |A| H; none if all are 0."""
    key = (adv.abs() * entropy).masked_fill(~mask, float("-inf")).flatten()
    k = int(share * mask.sum().item() + 1 - 1e-6) if (key > 0).any() else 0
    order = key.argsort(descending=True, stable=True)
    return torch.zeros_like(key).index_fill(0, order[:k], 1.0).view_as(mask)


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args, selected):
    """[B, T] each -> [B, T]: mean over the minibatch's selected tokens, or their sum over the number of all; 0 elsewhere."""
    selected = selected.masked_fill(~mask, 0.0)
    return selected / (mask if args.token_norm == "all" else selected).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def measure(meter, adv, sample, keep, selected, mask):
    """Numbers of completions and prompts trained on, variance of their A, share of S with A != 0, share of tokens trained."""
    kept = adv[keep]
    meter.note(kept=len(kept), prompts=int(keep.any(1).sum()), adv_var=kept.var(correction=0).nan_to_num().item())
    meter.note(useful=len(kept) / int(sample.sum()), trained=int(selected.sum()) / max(1, int(mask.sum())))


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
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
        batch.old_logp, batch.columns["old_entropy"] = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
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

        # Down-sampling over the whole rollout: completions, then their tokens.
        rows_share, tokens_share = shares(step, run.state.setdefault("planned", args.steps), args)
        chance = torch.Generator().manual_seed(gpu.hash_seed(args.seed, step, 17))
        sample = chosen(adv, rows_share, args, chance)
        keep = sample & (adv.abs() > 1e-6)
        mask, entropy = gpu.gather(batch.mask), gpu.gather(batch.columns["old_entropy"])
        selected = stakes(adv.view(-1, 1), entropy, mask & keep.view(-1, 1), tokens_share)
        batch.columns["selected"] = gpu.local(selected)[:, : batch.mask.shape[1]]

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, adv, sample, keep, selected, mask)
        for rows, weights in minibatches(batch, args, step, token_weights, ["selected"], gpu.local(keep.flatten())):
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
