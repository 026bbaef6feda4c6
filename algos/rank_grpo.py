"""Rank-GRPO. Zhu, Steck, Liang, He, Ostuni, Li and Kallus, "Rank-GRPO: Training LLM-based Conversational Recommender
Systems with Reinforcement Learning", arXiv 2510.20150 (2025).

Idea: where a completion is a list, an item a line, reward every rank by itself and compare it with the same rank of the
prompt's other lists. One reward for the whole list praises and blames all its lines alike, whichever of them earned it.
The ratio is a rank's as well: it lies between GRPO's, of a token, and GSPO's, of the sequence.

Objective, to be maximised (equation numbers not at hand), over the lists i and the ranks k from 1 to N:
    J = 1/sum_i |y_i| sum_i sum_k |y_ik| min(w A, clip(w, 1 - eps_low, 1 + eps_high) A) - beta k3 of every token
    w_ik = exp( 1/|y_ik| sum_t log r_t ),   r = pi / pi_old,   A_ik = (R_ik - mean R_k) / (std R_k + 1e-4) over the group
    rel_k = 1 where line k is a relevant item for the first time in the list, else 0
    R_ik = rel_k (exp_inf), sum_j>=k rel_j / log2(j + 1) (log_decay), sum_j>=k rel_j / gamma^(j - k) (exp; gamma = inf: exp_inf)
    y_ik: the tokens of rank k;   k3 = e^l - l - 1,  l = log pi_ref - log pi

This is the released code's mean, with a rank's term at each of its tokens, so that long lines weigh more. The paper's is over N
ranks (--average ranks). The length is paid after the normalisation, as in the code: 0.1 to an EOS behind line N, -0.1 to one
before, and to every token behind line N; these share one ratio. The 0.1 is for N = 20, where one line too few is a twentieth
of the list: here it is 20/N times as much. An EOS has this in place of A_ik, and shares its line's ratio.

A line that is no item, or blank, is a rank with R = 0. The code's parser drops it and counts it in the ratio, so that later
lines are paid for their neighbours. It updates once per rollout, where w is 1; grpo.py's minibatches are kept, and w matters.

Family: credit
Differs from grpo.py in: beta, newlines, segments, relevance, rank_rewards, advantages, token_advantages, rank_sums, surrogate,
    token_weights, train
World: written, ndcg, listed
Measures: measure
Costs: a frozen reference model (beta > 0). A line is looked up in the task's answers, which must be lists: a .jsonl file with
       {"prompt": ..., "answer": ["item", ...]}. --reward changes only the logged accuracy; its answer: all items, between tabs.
Run:   python algos/rank_grpo.py                                tiny model, CPU, about two minutes
       python algos/rank_grpo.py --model qwen2.5-1.5b --task lists.jsonl            on one GPU
       torchrun --nproc-per-node 8 algos/rank_grpo.py --model qwen2.5-7b --task lists.jsonl
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
    beta: float = 1e-3
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

    # Rank-GRPO
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", items="1 <= x", gamma="1 <= x",
        format_reward="0 <= x <= 0: a rank is paid for what its line says",
    )  # fmt: skip
    tiny_preset = dict(task="titles", items=5)
    real_preset = dict(items=20, prompt_template="{prompt}")
    items: int | None = None
    """N, the lines that are asked for; what comes behind them has no rank (the paper: 20)"""
    rank_reward: Literal["exp_inf", "exp", "log_decay"] = "exp_inf"
    """what a rank is paid for: its own hit (the best in the paper), or later ones too, less by gamma or by a DCG's discounts"""
    gamma: float = 2.0
    """exp: a hit d ranks later counts gamma^-d (ours)"""
    average: Literal["tokens", "ranks"] = "tokens"
    """what J is a mean of: the tokens of all lists (the code), or N ranks of each (the paper)"""
    eps_low: float = 0.06
    """the clip interval's reach below 1 (the authors' script)"""
    eps_high: float = 0.08
    """its reach above 1 (the authors' script)"""
    length_bonus: float = 0.1
    """what an EOS gains behind exactly N lines, at N = 20 (the code); 20/N times as much at another N (ours)"""
    length_penalty: float = 0.1
    """what an EOS loses behind fewer, and every token behind line N, likewise"""


# ---------------------------------------------------------------- the objective


def segments(newlines, mask, args):
    """[B, T] each -> rank ids [B, T], 0 to N - 1, and N behind line N; a line break belongs to the line that it ends."""
    newlines = newlines.long().masked_fill(~mask, 0)
    return (newlines.cumsum(1) - newlines).clamp(max=args.items)


def rank_rewards(rel, args):
    """rel [B, N] -> R [B, N]: no rank is paid for what stands before it."""
    k = torch.arange(rel.shape[1], device=rel.device)
    behind = k[:, None] - k  # [j, k]
    decay = dict(exp=args.gamma ** -behind.clamp(min=0).to(rel.dtype), log_decay=1 / (k[:, None] + 2).log2())
    return rel @ (decay.get(args.rank_reward, behind == 0) * (behind >= 0)).to(rel.dtype)


def advantages(rewards, args):
    """[P, G, N] -> [P, G, N]: z-score of a rank in the group, sample std; 0 where all its rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-4), torch.zeros_like(rewards))


def token_advantages(adv, rank_id, mask, eos, args):
    """A of ranks [B, N], the others [B, T] -> [B, T]: a rank's at its tokens; the length's at the EOS and behind line N."""
    bonus, penalty = (x * 20 / args.items for x in (args.length_bonus, args.length_penalty))
    lines = (rank_id + 1).masked_fill(~mask | eos, 0).amax(1, keepdim=True)
    own = torch.nn.functional.pad(adv, (0, 1), value=-penalty).gather(1, rank_id)
    return torch.where(eos, torch.where(lines == args.items, bonus, -penalty), own).masked_fill(~mask, 0.0)


def rank_sums(x, rank_id):
    """[B, T] each -> [B, T]: at every token the sum of x over the tokens of its rank."""
    bins = torch.nn.functional.one_hot(rank_id).to(x.dtype)  # scatter_add's sums would differ from run to run on a GPU
    return (bins * (bins * x[:, :, None]).sum(1, keepdim=True)).sum(2)


def surrogate(logp, old_logp, adv, mask, args, rank_id):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    lengths = rank_sums(mask.to(logp.dtype), rank_id)
    ratio = (rank_sums(log_ratio, rank_id) / lengths.clamp(min=1)).exp()  # w: its gradient reaches all tokens of the rank
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args, rank_id):
    """[B, T] each -> [B, T]: mean over all tokens; or over a rank's tokens, then N ranks, then lists that are not empty."""
    if args.average == "tokens":
        return mask / mask.sum().clamp(min=1)
    return mask / rank_sums(mask.float(), rank_id).clamp(min=1) / args.items / mask.any(1).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


# ---------------------------------------------------------------- lists: what a line says, and whether it is relevant


def newlines(ids, tokenizer):
    """Token ids [B, T] -> how many line breaks each token holds, [B, T]."""
    known, place = ids.unique(return_inverse=True)
    return torch.tensor([tokenizer.decode([i]).count("\n") for i in known.tolist()], device=ids.device)[place]


def written(ids, rank_id, mask, tokenizer, args):
    """[B, T] each -> B lists of what the tokens of the N ranks say, '' where a rank has none."""
    ids, rank_id = ids.cpu(), rank_id.masked_fill(~mask, -1).cpu()
    rows = [[y[r == k].tolist() for k in range(args.items)] for y, r in zip(ids, rank_id)]
    return [[text.strip() for text in tokenizer.batch_decode(row)] for row in rows]


def relevance(lines, gold):
    """B lists of N lines, B texts of relevant items between tabs -> rel [B, N]."""
    right = [set(items.split("\t")) for items in gold]
    return torch.tensor([[float(x in r and x not in row[:k]) for k, x in enumerate(row)] for row, r in zip(lines, right)])


def ndcg(rel, gold):
    """rel [B, N], B texts of relevant items -> [B, N]: DCG of the first k ranks over the highest that there is."""
    k, sizes = torch.arange(rel.shape[1], device=rel.device), [[items.count("\t") + 1] for items in gold]
    best = (k < torch.tensor(sizes, device=rel.device)).to(rel.dtype)
    return (rel / (k + 2).log2()).cumsum(1) / (best / (k + 2).log2()).cumsum(1)


def listed(task, args):
    """-> (the task, with NDCG@N for a check where there is no --reward; the set of all items). An answer's items become one
    text, with tabs between them: a Scorer shows a check one of several answers at a time. UserError where one is no list."""
    from common import UserError

    examples = task.train + task.test
    if not all(isinstance(e.answer, tuple) or "\t" in e.answer for e in examples):
        raise UserError(f"--task {task.name}: its answers are no lists of relevant items; titles has some, or a .jsonl file")
    for e in examples:
        items = e.answer.split("\t") if isinstance(e.answer, str) else e.answer
        e.answer = "\t".join(dict.fromkeys(item.strip() for item in items if item.strip()))

    def check(text, answer):
        lines = [line.strip() for line in text.split("\n")] + [""] * args.items
        return text or None, ndcg(relevance([lines[: args.items]], [answer]), [answer])[0, -1].item()

    if not args.reward:
        task.check, task.inline = check, True
    return task, {item for e in examples for item in e.answer.split("\t")}


def measure(meter, batch, lines, rel, eos, catalog):
    """Hit rate and NDCG at every rank (of more than five at the first and the last), and over all; lists of exactly N lines; of
    the lines that there are those that are no item, and repeated ones."""
    N, gain, each = rel.shape[1], ndcg(rel, batch.gold), torch.ones_like(rel, dtype=torch.bool)
    for k in range(N) if N <= 5 else (0, N - 1):
        meter.add({f"hit_{k + 1}": rel[:, k], f"ndcg_{k + 1}": gain[:, k]}, each[:, k])
    size = (batch.columns["rank_id"] + 1).masked_fill(~batch.mask | eos, 0).amax(1)
    meter.add(dict(hit_mean=rel), each)
    meter.add(dict(exact=((size == N) & eos.any(1)).float()), each[:, 0])
    there = torch.arange(N, device=rel.device) < size[:, None]
    invalid = torch.tensor([[x not in catalog for x in row] for row in lines], device=rel.device)
    again = torch.tensor([[x in row[:k] for k, x in enumerate(row)] for row in lines], device=rel.device)
    meter.add(dict(invalid=invalid.float(), repeats=(again & ~invalid).float()), there)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    task, catalog = listed(tasks.load(args.task, reward=args.reward), args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt)
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
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Lines by token ids: what the loss pushes is what is paid.
        ids = batch.ids[:, -batch.mask.shape[1] :]
        batch.columns["rank_id"] = rank_id = segments(newlines(ids, tokenizer), batch.mask, args)
        eos = batch.mask & torch.isin(ids, ids.new_tensor(models.end_tokens(policy.lm, tokenizer)))
        lines = written(ids, rank_id, batch.mask & ~eos, tokenizer, args)
        rel = relevance(lines, batch.gold).to(ids.device)

        # Advantages over the whole rollout, of all processes.
        adv = advantages(gpu.gather(rank_rewards(rel, args)).view(-1, args.group_size, args.items), args)
        batch.adv = token_advantages(gpu.local(adv.flatten(0, 1)), rank_id, batch.mask, eos, args)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch, lines, rel, eos, catalog)
        for rows, weights in minibatches(batch, args, step, token_weights, ["rank_id"]):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args, mb.columns["rank_id"])
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
