"""BuPO: Bottom-up Policy Optimization. Tan et al., "Your Language Model Policy Secretly Contains Internal Policies",
arXiv 2512.19673 (2025).

Idea: for the first few steps train a policy that sits inside the model, then the model itself. The head can read the residual
stream after any layer l, and what it reads there is a distribution over the next token as well: the inner policy of layer l.
Lower layers are so made ready for what the whole is then trained to do.

Objective, to be maximised (Eq. 5 for the inner policy; other equation numbers not at hand), in steps s = 1, 2, ...:
    s <= inner_steps:  J = 1/B sum_i 1/|y_i| sum_t min(r A, clip(r, 1 - eps, 1 + eps) A),   r = pi_l / pi_l,old
    s > inner_steps:   GRPO's, the same with r = pi / pi_old
    pi_l = softmax(E h_l),   h_l = the residual stream after layer l, without the final norm,   E = the head's weight
    boundary layer: the last l with dH > 0,   dH = entropy of softmax(E y) - entropy of softmax(E x),
    y = what layer l's feed-forward part puts out,   x = what it reads, behind its norm

Completions are sampled from the whole model throughout, and rewards and advantages are GRPO's. So r of an inner policy is no
importance weight: it only says how far pi_l may go, and nothing bounds how far pi goes with it. Layers above l and the final
norm get no gradient, so AdamW leaves them alone. For l = the number of layers pi_l stands for pi. l is chosen once, by the
first completion of every prompt of the first rollout.

A token's weight is the paper's here, a mean over each completion; the authors' code takes the mean over all tokens, has a dual
clip at 10, and counts layers from 0. Control: --inner-steps as many as --steps; in the paper 50 of 300 are too many already.

In the first inner_steps steps inner_entropy, inner_kl, inner_ratio_max, inner_ratio_min and clip_fraction are pi_l's; entropy
and approx_kl are pi's, behind the step's updates. Later all is as in grpo.py. Every fourth step has the entropy of softmax(E h)
at every depth, entropy_0 (embeddings), entropy_1, ..., and the cosine of h_l and the last h.

Family: latent
Differs from grpo.py in: model, boundary, layer_at, train
Measures: seen, measure
Costs: in the first inner_steps steps two more passes without gradient over the rollout, for pi_l,old and for what became of
       pi (layers above l are passed through, too); once, two passes a layer over one completion of every prompt; every fourth
       step, one a layer over these.
Run:   python algos/bupo.py                                     tiny model of four layers, CPU, about two minutes
       python algos/bupo.py --inner-steps 120                   the control: the inner policy to the end
       python algos/bupo.py --model qwen2.5-1.5b                GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/bupo.py --model qwen3-8b --inner-layer 6
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

    # GRPO
    limits = dict(group_size="2 <= x: the completions of a prompt are compared with each other")
    eps: float = 0.2
    """half-width of the clip interval (verl, TRL; the paper gives none)"""

    # BuPO
    tiny_preset = dict(inner_steps=12)  # of 120
    real_preset = dict(inner_steps=30)
    inner_layer: int = 0
    """l, from 1: the layer whose policy is trained first; the number of layers, or more: the whole; 0: the boundary layer"""
    inner_steps: int | None = None
    """s_inter, the steps in which it is; 0: GRPO (the paper: 30 of 300; 50 and 70 were much worse)"""


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


def boundary(policy, batch, args):
    """The last layer, from 1, whose feed-forward part raises the entropy; the first one where none does."""
    from common import gpu
    from common.batch import read

    rows, ends, H, dH = torch.arange(0, len(batch.ids), batch.group, device=batch.ids.device), {}, {}, []
    for l, layer in enumerate(policy.lm.model.layers, 1):
        with layer.mlp.register_forward_hook(lambda module, x, y: ends.update(x=x[0], y=y)):
            for end in ("x", "y"):
                with layer.register_forward_hook(lambda *_, end=end: ends[end]):  # so the head reads it in place of h_l
                    H[end] = read(policy, batch, args, rows, layer=l)[1].sum().item()
        dH.append(gpu.total(H["y"] - H["x"]) / max(1, gpu.total(int(batch.mask[rows].sum()))))
    found = max((l for l, change in enumerate(dH, 1) if change > 0), default=1)
    if gpu.rank() == 0:
        print(f"boundary layer {found}: feed-forward parts change the entropy by", *(f"{x:+.2f}" for x in dH), flush=True)
    return found


def layer_at(step, l, args, config):
    """The layer whose policy is trained at a step, which is counted from 0; None: the final policy."""
    return l if step < args.inner_steps and l < config.num_hidden_layers else None


def seen(logp, mb, entropy, layer):
    """What every script logs of each token; what is an inner policy's has names of its own."""
    from dataclasses import replace

    from common import rollout

    if layer is None:
        return rollout.diagnostics(logp, mb, entropy)
    names = dict(entropy="inner_entropy", approx_kl="inner_kl", ratio_max="inner_ratio_max", ratio_min="inner_ratio_min")
    inner = rollout.diagnostics(logp, replace(mb, old_logp=mb.columns["own_logp"]), entropy)
    final = rollout.diagnostics(mb.old_logp, mb, entropy)
    return {name: inner[k] for k, name in names.items()} | {k: final[k] for k in ("sampler_gap", "sampler_gap_max")}


def measure(meter, policy, batch, args, step, l, layer):
    """After the updates: the final policy's entropy and its distance from the one that sampled, where an inner one was trained;
    every fourth step, on the first completion of every prompt, the entropies of the inner policies and the cosine of h_l."""
    from common import rollout
    from common.batch import read

    if layer is not None:
        logp, entropy = read(policy, batch, args)
        final = rollout.diagnostics(logp, batch, entropy)
        meter.add({k: final[k] for k in ("entropy", "approx_kl")}, batch.trained)
    if step % 4 == 0:
        L, rows = policy.lm.config.num_hidden_layers, torch.arange(0, len(batch.ids), batch.group, device=batch.ids.device)
        for i in range(L):
            meter.add({f"entropy_{i}": read(policy, batch, args, rows, layer=i)[1]}, batch.mask[rows])
        *_, inner, last = read(policy, batch, args, rows, layers=[min(l, L), L])
        meter.add(dict(cosine=torch.cosine_similarity(inner.float(), last.float(), dim=-1)), batch.mask[rows])


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
        batch.old_logp, _ = read(policy, batch, args)
        l = run.state["inner_layer"] = run.state.get("inner_layer") or args.inner_layer or boundary(policy, batch, args)
        layer = layer_at(step + len(run.queue), l, args, config)
        batch.columns["own_logp"] = batch.old_logp if layer is None else read(policy, batch, args, layer=layer)[0]
        batch.ref_logp = read(reference, batch, args, layer=layer)[0] if reference else None
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
        layer = layer_at(step, l, args, config)
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, layer=layer)
                objective, stats = surrogate(logp, mb.columns["own_logp"], mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | seen(logp, mb, entropy, layer), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm, partial=layer is not None)
            if run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        measure(meter, policy, batch, args, step, l, layer)
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
