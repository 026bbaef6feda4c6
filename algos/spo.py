"""SPO: Segment Policy Optimization. Guo et al., "Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL
for Large Language Models", arXiv 2505.23564 (2025).

Idea: give each stretch of a completion an advantage of its own: how much better the state behind it is than the state before
it. A state is worth the mean reward of completions that are sampled from there, so no critic is trained. A chain cuts each
completion where the policy was unsure and samples on from the cuts; a tree samples in segments, and a node is worth the mean
of its children.

Objective, to be maximised (equation numbers not at hand):
    J = 1/|M| sum_{t in M} min(r A', clip(r, 1 - eps, 1 + eps) A') - beta/B sum_{t in M} (e^l - l - 1)
    A_t = V(end of t's segment) - V(its start),   V(end of the completion) = R
    M = {t: pi_old,t < rho},   A' = (A - mean_M A) / sqrt(var_M A + 1e-8),   l = log pi_ref - log pi

M, mean and variance are of the minibatch, which has B sequences; the penalty is a sum over a sequence's tokens, not a mean.
Chain: segments start at every interval-th token of M, A is 0 before the first and where pi_old > rho. Tree: every edge is a
sequence, trained on its own segment; edges with A = 0 are left out. A question's edges are used --edges-now a step, for
--edge-life steps, so that they are up to 7 steps old, each with the log-probs of the policy that wrote it; what is left then is
dropped. As in the released code, an update without a token, or whose mean ratio is above 10, is not made, and whitening moves
tokens with A = 0 away from 0. Unlike it: no top-p, no encoding of decoded prefixes, log-ratios clamped at 20 (there 10), no cap
on a step's edges over all questions.

Family: credit
Differs from grpo.py in: beta, unsure, cutpoints, advantages, edges, whiten, chain, tree, dealt, due, surrogate,
    token_weights, train
Measures: tally, shown, measure
Costs: chain: mc_rollouts completions for every segment, from where it starts; tree: nothing but its own nodes, and its edges
       wait with their log-probs. A frozen reference model where beta > 0.
Run:   python algos/spo.py                                      tiny model, CPU, about a minute
       python algos/spo.py --mode tree                          the tree instead
       python algos/spo.py --model qwen2.5-1.5b                 GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/spo.py --model qwen2.5-7b --mode tree --prompts-per-step 32
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
    beta: float = 1e-4
    """weight of the KL penalty to the starting model (the paper's), summed over tokens; above 0 a frozen reference is kept"""
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

    # SPO
    limits = dict(
        interval="1 <= x", mc_rollouts="1 <= x", threshold="0 < x <= 1", branches="1 <= x", segment_tokens="1 <= x",
        edges_now="1 <= x", edge_life="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(
        task="chain", steps=80, prompts_per_step=8, minibatches=2, eval_every=10, interval=1, segment_tokens=3
    )  # fmt: skip
    real_preset = dict(prompts_per_step=64, minibatches=8, interval=5, segment_tokens=100)
    eps: float = 0.2
    """half-width of the clip interval (the paper)"""
    mode: Literal["chain", "tree"] = "chain"
    """chain: segments of whole completions, with fresh ones from their starts; tree: branches in place of group_size"""
    threshold: float = 0.9
    """rho: a token at least as likely for the policy that sampled is no choice (the paper)"""
    prob_mask: bool = True
    """trains on the unsure tokens alone (the paper); else on all, though in a chain A is 0 at sure ones before the whitening"""
    whiten: bool = True
    """whitens the advantages of a minibatch (the released configs)"""
    interval: int | None = None
    """chain: unsure tokens in a segment (the paper: 5; tiny: 1, a completion has few)"""
    mc_rollouts: int = 9
    """chain: completions that a state's value is the mean of (the released configs: 9, and 4 for long answers)"""
    branches: tuple[int, ...] = (6, 6, 6)
    """tree: children of a node at each depth (the paper)"""
    segment_tokens: int | None = None
    """tree: M, tokens of an edge at most, at the last depth any number (the released configs: 30 to 600; tiny: a third)"""
    sibling_std: bool = False
    """tree: divides an edge's advantage by the population std of its siblings' values (an option of the released code)"""
    edges_now: int = 32
    """tree: edges of a question in one step at most, the others wait (the released code)"""
    edge_life: int = 8
    """tree: steps in which a question's edges are used, the first one included (the released code)"""


# ---------------------------------------------------------------- the objective


def unsure(logp, mask, args):
    """log pi_old, mask [B, T] -> [B, T]: the tokens that were a choice."""
    return mask & (logp.exp() < args.threshold)


def cutpoints(logp, mask, args):
    """log pi_old, mask [B, T] -> [B, T]: the tokens that segments start with, equally many choices in each."""
    low = unsure(logp, mask, args)
    return low & ((low.cumsum(1) - 1) % args.interval == 0)


def advantages(values, starts, scores, logp, mask, args):
    """V of the state before each start, starts [B, T], R [B], log pi_old, mask [B, T] -> A [B, T]."""
    segment = starts.cumsum(1)  # 0: before the first
    points = values.new_zeros(len(values), values.shape[1] + 2)
    points = points.scatter(1, segment * starts, values.where(starts, 0.0)).scatter(1, segment[:, -1:] + 1, scores[:, None])
    gain = points.gather(1, segment + 1) - points.gather(1, segment)
    return gain.where(mask & (segment > 0) & ~(logp.exp() > args.threshold), 0.0)


def edges(parent, value, args):
    """V of nodes [n], of their children [n, k] -> A of the edges between them [n, k]; 0 where it is rounding."""
    gain = value - parent[:, None]
    gain = gain.where(gain.abs() > 1e-6 * value.abs().amax(1, keepdim=True).clamp(min=1), 0.0)
    return gain / (value.std(1, correction=0, keepdim=True) + 1e-8) if args.sibling_std else gain


def whiten(adv, trained):
    """A, M [B, T] of a whole minibatch -> A' [B, T]; of equal ones all are 0."""
    n, x = trained.sum(), adv.where(trained, 0.0)
    x = (x - x.sum() / n.clamp(min=1)).where(trained, 0.0)
    return x / (x.square().sum() / (n - 1).clamp(min=1) + 1e-8).sqrt()


def chain(engine, scorer, tokenizer, prompts, batch, args, noise):
    """Gives completions their advantages: samples on from the distinct states that their segments start in."""
    from common import gpu, rollout

    starts, ids = cutpoints(batch.old_logp, batch.mask, args), batch.ids[:, -batch.mask.shape[1] :].tolist()
    states = [(i // batch.group, *ids[i][:t]) for i, t in starts.nonzero().tolist()]
    distinct = list(dict.fromkeys(states)) or [(0,)]  # a process without any keeps in step
    asked, given = [prompts[q] for q, *_ in distinct], [y for _, *y in distinct]
    seeds = [gpu.hash_seed(args.seed, noise, e.id, 17, *y) for e, y in zip(asked, given)]
    engine.wake()
    more = rollout.collect(engine, scorer, tokenizer, asked, args, noise, given, args.mc_rollouts, seeds=seeds)
    engine.sleep()
    worth = dict(zip(distinct, more.reward.view(-1, more.group).mean(1).tolist()))
    values = torch.zeros_like(batch.mask, dtype=batch.reward.dtype)
    values[starts] = values.new_tensor([worth[state] for state in states])
    batch.columns |= dict(values=values, sampled=batch.mask.sum(1))
    batch.columns["sampled"][0] += more.trained.sum() * bool(states)
    batch.timeouts += more.timeouts
    batch.adv = advantages(values, starts, batch.reward, batch.old_logp, batch.mask, args)


def tree(engine, scorer, tokenizer, prompts, args, noise):
    """A tree below each prompt -> Batch of edges with an advantage, as rows whose mask is the edge's own segment."""
    from common import gpu, rollout

    def grow(nodes, depth):
        """[(prompt's number, tokens, path)] -> (the mean of each one's children [n, 4], [Batch of a level's edges])."""
        here = nodes or [(0, [], ())]  # a process without any keeps in step
        k, last = args.branches[depth], depth + 1 == len(args.branches)
        asked, given = [prompts[q] for q, _, _ in here], [y for _, y, _ in here]
        seeds = [gpu.hash_seed(args.seed, noise, prompts[q].id, 17, *path) for q, _, path in here]
        budget = None if last else args.segment_tokens
        edge = rollout.collect(engine, scorer, tokenizer, asked, args, noise, given, k, budget, seeds)
        edge, deeper, T = edge.take(torch.arange(k * len(nodes))), [], edge.mask.shape[1]
        length = edge.mask.sum(1)
        node = torch.stack([edge.reward, edge.accuracy, length.float(), edge.truncated.float()], 1)
        if not last:  # where it goes on, collect() has scored a completion that was cut: the children say what it is worth
            on = edge.truncated & (length < args.max_new_tokens)
            rows = [(i, *nodes[i // k]) for i in on.nonzero()[:, 0].tolist()]
            rows = [(q, edge.ids[i, -T:][: length[i]].tolist(), (*path, i % k)) for i, q, _, path in rows]
            node[on], deeper = grow(rows, depth + 1)
        mean = node.view(-1, k, 4).mean(1)
        gain = edges(mean[:, 0], node[:, 0].view(-1, k), args).view(-1, 1)
        edge.reward, edge.accuracy = node[:, 0], node[:, 1]
        edge.mask, edge.adv, edge.group = edge.trained, gain * edge.trained, 1
        edge.columns["question"] = length.new_tensor([q for q, _, _ in nodes for _ in range(k)])
        return mean, [edge, *deeper]

    first = gpu.rank() * len(prompts)
    mean, levels = grow([(q, [], (first + q,)) for q in range(len(prompts))], 0)
    return dealt(levels[0].join(levels), mean, args, noise)


def dealt(edge, mean, args, noise):
    """Batch of all edges -> those with an advantage, a group for each question, in random order; shorter groups are padded
    with empty rows up to the longest of all processes. mean [P, 4]: of the trees, for the log."""
    from common import gpu

    question, rows, P = edge.columns.pop("question"), [], len(mean)
    for q in range(P):
        mine = ((question == q) & edge.adv.any(1)).nonzero()[:, 0]
        chance = torch.Generator().manual_seed(gpu.hash_seed(args.seed, noise, gpu.rank() * P + q, 19))
        rows.append(mine[torch.randperm(len(mine), generator=chance).to(mine.device)])
    steps = -(-gpu.maximum(max(map(len, rows))) // args.edges_now)
    width = args.edges_now * min(max(steps, 1), args.edge_life)  # what would wait for longer is dropped
    index = torch.nn.utils.rnn.pad_sequence(rows, True, -1)
    index = torch.nn.functional.pad(index, (0, width - index.shape[1]), value=-1)
    own = args.branches[0] * torch.arange(P, device=index.device)[:, None]  # an edge of the same question
    batch = edge.take(index.where(index >= 0, own).flatten())
    for x in (batch.mask, batch.trained, batch.adv, batch.attention_mask[:, -batch.mask.shape[1] :]):
        x[(index < 0).flatten()] = 0
    batch.group = width
    return tally(batch, edge, question, mean)


def due(queue, args):
    """Batches that wait, the oldest first -> (rows of this step, what waits on). Of a tree's edges args.edges_now of each
    question, question by question: the same order on any number of processes."""
    ready, waiting = queue[: len(queue) - args.stale], queue[len(queue) - args.stale :]
    n = args.edges_now if args.mode == "tree" else args.group_size

    def some(batch, first, last):
        part = batch.pick(torch.arange(first, last).expand(len(batch.ids) // batch.group, -1))
        part.timeouts = batch.timeouts * (first == 0)  # said once
        return part

    now = ready[0].join([some(b, 0, n) for b in ready])
    order = torch.arange(len(now.ids) // n).view(len(ready), -1).T.flatten()
    return now.groups(order), [some(b, n, b.group) for b in ready if b.group > n] + waiting


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float(), ratio=ratio)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch that are trained on."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def tally(batch, edge, question, mean):
    """Writes down of each tree, at its first row, what its leaves are on average and how many tokens were sampled."""
    sampled = torch.zeros(len(mean), batch.group, dtype=torch.int64, device=question.device)
    sampled[:, 0] = sampled[:, 0].index_add(0, question, edge.trained.sum(1))
    mean = torch.cat([mean, batch.mask.any(1).view(-1, batch.group).any(1, keepdim=True)], 1)
    names = ("reward", "accuracy", "length", "truncated", "informative_groups")
    batch.columns |= {name: x.repeat_interleave(batch.group) for name, x in zip(names, mean.T)}
    batch.columns["sampled"] = sampled.flatten()
    return batch


def shown(batch):
    """The rows that have a token: a tree's questions are padded to one number of edges, and what is left is in no groups."""
    some = batch.mask.any(1).nonzero()[:, 0]
    if 0 < len(some) < len(batch.ids):
        batch = batch.take(some)
        batch.group = 1
    return batch


def measure(meter, batch, args):
    """Segments of a completion, the share of tokens that is trained on, A and |A| there; and all the tokens that were sampled
    for it, continuations included. In a tree: edges, and of its leaves what else is of completions."""
    from common import gpu

    sampled = gpu.total(int(batch.columns["sampled"].sum()))
    meter.note(sampled_tokens=sampled, trained_tokens=gpu.total(int(batch.trained.sum())))
    meter.add(dict(trained=batch.trained.float()), batch.mask)
    meter.add(dict(adv_mean=batch.adv, adv_abs=batch.adv.abs()), batch.trained)
    if args.mode == "chain":
        starts = cutpoints(batch.old_logp, batch.mask, args)
        meter.add(dict(segments=starts.sum(1).float()), batch.mask.any(1))
        meter.note(mc_tokens=sampled - gpu.total(int(batch.mask.sum())))
    else:
        names = ("reward", "accuracy", "length", "truncated", "informative_groups")
        meter.add({name: batch.columns[name] for name in names}, batch.columns["sampled"] > 0)
        meter.note(edges=gpu.total(int(batch.mask.any(1).sum())))


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
        sample = rollout.collect if args.mode == "chain" else tree
        batch = sample(engine, scorer, tokenizer, prompts, args, run.state["cursor"])
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        run.timed("old_logp")

        # Values where the segments of a chain start, by the policy that sampled; a tree has them.
        if args.mode == "chain":
            chain(engine, scorer, tokenizer, prompts, batch, args, run.state["cursor"])
        if args.prob_mask:
            batch.trained = unsure(batch.old_logp, batch.trained, args)
        run.timed("values")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch, run.queue = due(run.queue, args)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch, args)
        adv, normalise = batch.adv, whiten if args.whiten else None
        one = batch.mask & (batch.mask.cumsum(1) == 1)  # whose token_weights are 1/B, for the penalty
        for rows, weights in minibatches(batch, args, step, token_weights, normalise=normalise, sequences=one):
            batch.weights, loss, moved, penalty = weights, 0.0, 0.0, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    penalty = args.beta * mb.columns["sequences"].sum(1, keepdim=True) * stats["ref_kl"]
                micro_loss = (penalty - objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                moved += (stats["ratio"] * mb.weights)[mb.trained].sum().item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            if run.finite(gpu.total(loss), grad_norm) and 0 < gpu.total(moved) <= 10:
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        engine.sync()
        run.timed("update")
        batch.adv = adv  # what is logged is not whitened
        run.log(rollout.summary(batch) | meter.result(), shown(batch))

    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
