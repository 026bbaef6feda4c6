"""TW-GRPO: "Reinforcing Video Reasoning with Focused Thinking". Dang et al., arXiv 2505.24718 (2025).

Idea: let a token count the more, the further apart the next-token distributions of the group's completions are at its place.
And of a question with several right answers, let some of them and no wrong one be worth their share, instead of nothing. All
else is GRPO with DAPO's mean over tokens and wide upper clip.

Objective, to be maximised (equation numbers not at hand), over the tokens of the minibatch; w is a constant:
    J = 1/sum_i |y_i| sum_i sum_t w_t min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
    w_t = 1 + (alpha - 1) (D_t - min D) / (max D - min D + 1e-8),   min and max over the places t of the group
    --divergence k3_log_mean: D_t = 1/G sum_i sum_v (e^d - d - 1),   d = 1/G sum_j log p_jt(v) - log p_it(v), within +-11
    --divergence kl:          D_t = 1/G sum_i KL(p_it, 1/G sum_j p_jt)
    A = (R - mean R) / std R over the group,   R = |named| / |right| where all that are named are right, else 0

p_it is what the policy that sampled predicts at place t of completion i: uniform where i has ended, so that late places seem to
matter. At the first, and as long as all completions begin alike, D is 0. k3_log_mean is the authors' code: every token of the
vocabulary weighs the same in it, so the unlikely ones decide. kl is what the paper is believed to say, with alpha less 1 for
alpha. In the code gradient flows through w as well; here it never does. Its advantages have std + 1e-4, here std + 1e-6. What
the task's check calls right is worth 1, however it is written. The paper makes part of its questions by inverting others, as
the world events does. --shuffle is a control: the group's weights, each on some other token.

Family: vision
Differs from grpo_vision.py in: options, soft_reward, graded, divergence, weigh, shuffled, importance, token_weights, train
Same as dapo.py: surrogate
Measures: measure
Costs: the scoring pass goes group by group and hands out hidden states [G, T, H]; then whole distributions, of one group and
       some places at a time. One number per token is kept.
Run:   python algos/tw_grpo.py                                  tiny model, CPU, about a minute
       python algos/tw_grpo.py --alpha 1                        the soft reward alone
       python algos/tw_grpo.py --model qwen2.5-vl-3b --task path/to/train.jsonl     rows with video, prompt and answer: A,C
       torchrun --nproc-per-node 8 algos/tw_grpo.py --model qwen2.5-vl-7b --freeze-vision --task path/to/train.jsonl
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

    # TW-GRPO
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", alpha="1 <= x", image_tokens="4 <= x",
    )  # fmt: skip
    sees = True
    hf_only = "pictures in its prompts"
    tiny_preset = dict(task="events", steps=45, prompts_per_step=16, minibatches=2, lr=3e-4, eval_every=15)
    real_preset = dict(task=None)
    eps_low: float = 0.2
    """the clip interval's reach below 1 (the authors' code, as DAPO)"""
    eps_high: float = 0.28
    """its reach above 1 (the authors' code, as DAPO)"""
    image_tokens: int = 1280
    """a picture of more tokens is made smaller (Qwen2.5-VL's own advice)"""
    freeze_vision: bool = False
    """leave the eyes as they are, and train what reads their embeddings (ours)"""
    alpha: float = 1.7
    """the weight of the place where the group is furthest apart (the authors' script); 1: all tokens weigh the same"""
    divergence: Literal["k3_log_mean", "kl"] = "k3_log_mean"
    """how far apart: from the mean of log-probs (the authors' code), or by KL from the mean (the paper, unconfirmed)"""
    soft_reward: bool = True
    """part of the right options, and no wrong one, is worth its share (the paper); False: right or wrong"""
    shuffle: bool = False
    """deal the weights of a group out to its tokens at random (a control, ours)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def options(text):
    """What an answer names, as "C, A" -> {"A", "C"}; of an empty one {""}, which is no option."""
    return {word.strip() for word in (text or "").split(",")}


def soft_reward(chosen, right):
    """Sets of options -> the share of the right ones that is chosen; 0 where a wrong one is."""
    return len(chosen) / max(1, len(right)) if chosen <= right else 0.0


def graded(batch):
    """-> rewards [B]: what is wrong, but not cut, gets its soft reward; of several golds the best."""
    golds = [(gold,) if isinstance(gold, str) else gold for gold in batch.gold]
    soft = [max(soft_reward(options(a), options(gold)) for gold in some) for a, some in zip(batch.answers, golds)]
    soft = torch.tensor(soft).to(batch.accuracy).where(~batch.truncated, batch.accuracy)
    return batch.reward + (soft - batch.accuracy).clamp(min=0)


def divergence(logp, args):
    """Log-probs of all tokens [G, t, V] of a group at t places -> D [t]: how far apart its rows are."""
    if args.divergence == "kl":
        centre = logp.logsumexp(0) - torch.tensor(len(logp)).log()
        return (logp.exp() * (logp - centre)).sum(2).mean(0)
    d = (logp.mean(0) - logp).clamp(-11, 11)
    return (d.expm1() - d).sum(2).mean(0)


def weigh(D, args):
    """D [T] of a group's places -> w [T], from 1 to alpha; 1 where all are the same."""
    return 1 + (args.alpha - 1) * (D - D.min()) / (D.max() - D.min() + 1e-8)


def shuffled(w, mask, seed):
    """[G, T] each -> [G, T]: the values of the mask in another order."""
    order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed))
    return w.masked_scatter(mask, w[mask][order.to(w.device)])


def importance(policy, batch, args, step):
    """-> log-probs [B, T] and w [B, T] by the policy as it is: a group at a time, and some of its places at a time."""
    from common import gpu
    from common.batch import read
    from common.policy import head_rows

    head, found = gpu.whole(policy.lm.lm_head.weight.detach()), []
    some = max(1, head_rows(len(head)) // batch.group)
    for rows in torch.arange(len(batch.ids), device=batch.ids.device).view(-1, batch.group):
        logp, _, hidden = read(policy, batch, args, rows=rows, layers=["normed"])
        mask, D = batch.mask[rows], []
        for h, living in zip(hidden.split(some, 1), mask.split(some, 1)):
            logits = (h @ head.T).to(logp.dtype).masked_fill(~living[:, :, None], 0.0)  # what has ended is uniform
            D.append(divergence((logits / args.temperature).log_softmax(2), args))
        w = weigh(torch.cat(D), args).expand_as(logp)
        if args.shuffle:
            w = shuffled(w, mask, gpu.hash_seed(args.seed, step, batch.prompt_id[rows[0]].item(), 19))
        found.append((logp, w))
    return [torch.cat(parts) for parts in zip(*found)]


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args, importance):
    """[B, T] each -> [B, T]: w over the number of all tokens of the minibatch, whatever the weights add up to."""
    return importance.masked_fill(~mask, 0.0) / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def measure(meter, batch):
    """Of completions the options named; of groups the share with equal rewards, and the rewards' std; of tokens that have an
    advantage the weight."""
    groups = batch.reward.view(-1, batch.group)
    values = dict(dead_groups=(groups.max(1).values == groups.min(1).values).float(), reward_std=groups.std(1))
    named = torch.tensor([float(len(options(a) - {""})) for a in batch.answers]).to(batch.reward)
    meter.add({k: v[:, None] for k, v in values.items()}, torch.ones_like(groups[:, :1]).bool())
    meter.add(dict(named=named[:, None]), torch.ones_like(named[:, None]).bool())
    meter.add(dict(importance=batch.columns["importance"]), batch.trained & (batch.adv != 0))


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, vision
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    processor = vision.load_processor(args, args.image_tokens)
    tokenizer = processor.tokenizer
    task, pictures = vision.load(args, processor)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, processor, context, frozen=int(args.beta > 0))
    policy = gpu.shard(vision.look(models.load(args, device), task, pictures, args.freeze_vision))
    reference = None
    if args.beta > 0:
        reference = gpu.shard(vision.look(models.load(args, device, trainable=False), task, pictures))
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
        batch.reward = graded(batch) if args.soft_reward else batch.reward
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs and weights by the policy that sampled. Log-probs of the reference.
        batch.old_logp, batch.columns["importance"] = importance(policy, batch, args, step)
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

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        measure(meter, batch)
        for rows, weights in minibatches(batch, args, step, token_weights, columns=("importance",)):
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
