"""TDPO: Token-level Direct Preference Optimization (TDPO1 and TDPO2). Zeng et al., arXiv 2404.11999 (2024).

Idea: DPO holds the KL to the reference over whole responses. TDPO holds it at every token: the best policy of that problem
gives a token the advantage beta (log-ratio + KL of the reference to the policy at its prefix), so that beside the log-ratio of
a response the KLs along it enter the sum. TDPO1 is what follows from the derivation; it is rewarded for drifting away on the
chosen response's prefixes, which TDPO2 removes by a stop-gradient: what is left pulls the policy back on the rejected ones.

Objective, to be minimised (the authors' code; equation numbers not at hand), u DPO's margin, y_w chosen, y_l rejected:
    L = mean over pairs of -log sigmoid(beta (u - delta)),   D(y) = sum_t KL(pi_ref || pi) over the vocabulary, after y_<t
    TDPO1: delta = D(y_l) - D(y_w)      TDPO2: delta = alpha (D(y_l) - stop_gradient(D(y_w)))   (alpha = 0: DPO)
The authors' configuration defaults to TDPO1, also under their README's command for TDPO2; their log of a softmax may give NaN.

Family: preference
Differs from dpo.py in: ref, token_kl, pair_loss, train
Costs: the frozen reference runs beside the policy in every step, for its whole distributions are too much to keep; both are
       read some positions at a time, and again in the backward pass.
Run:   python algos/tdpo.py                                              tiny model, CPU, about a minute
       python algos/tdpo.py --model qwen2.5-1.5b-instruct --beta 0.1     UltraFeedback on one GPU
       torchrun --nproc-per-node 8 algos/tdpo.py --model qwen2.5-7b-instruct --data pairs.jsonl
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
    data: str | None = None
    """letters, chain, record (built in, with a gold reward), a .jsonl file with prompt, chosen, rejected, or a hub id"""
    seed: int = 1
    """of the pairs' order and the evaluation's samples"""
    steps: int | None = None
    """updates in all; None here and below: the preset of the model"""
    pairs_per_step: int | None = None
    """pairs in one update, over all processes"""
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
    """longest response: of the pairs (a longer one is cut) and of the evaluation's samples"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples for the evaluation: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
    eval_every: int | None = None
    """steps between evaluations; 0: only before and after"""
    eval_prompts: int = 512
    """held-out pairs, at most"""
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

    # TDPO
    limits = dict(beta="0 < x")
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2"
    """with TDPO1 the gradient reaches the KL of both responses; TDPO2 (the paper's choice) detaches the chosen one's"""
    beta: float = 0.3
    """how strongly the KL to the reference is held (as in dpo.py; paper and the authors' code: 0.1)"""
    alpha: float = 0.5
    """weight of the difference of the KLs, of TDPO2 alone (paper and the authors' code: 0.5; the paper sweeps 0.5 to 2)"""


# ---------------------------------------------------------------- the objective


def token_kl(targets, logits, ref_logits):
    """targets [n], logits [n, V] of policy and reference -> log-probs of the targets under either, KL(pi_ref || pi) and the
    policy's entropy (nats, detached), [n] each. The gradient is the policy's alone."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.detach().log_softmax(-1)
    kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)  # forward: the reference's weights
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    logp, ref_logp = (x.gather(-1, targets[:, None]).squeeze(-1) for x in (logp, ref_logp))
    return logp, ref_logp, kl, entropy


def pair_loss(logp, ref_logp, kl, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    log_ratio = (logp - ref_logp).masked_fill(~mask, 0.0)
    chosen, rejected = log_ratio.sum(1).chunk(2)  # a sum: a mean would make beta T times weaker
    z = chosen - rejected
    chosen_kl, rejected_kl = kl.masked_fill(~mask, 0.0).sum(1).chunk(2)
    if args.variant == "tdpo1":
        delta = rejected_kl - chosen_kl  # drifting away after the chosen prefixes is rewarded
    else:
        delta = args.alpha * (rejected_kl - chosen_kl.detach())
    losses = -torch.nn.functional.logsigmoid(args.beta * (z - delta))
    chosen_reward, rejected_reward = args.beta * (chosen + chosen_kl), args.beta * (rejected + rejected_kl)
    return losses, dict(
        chosen_ratio=chosen, rejected_ratio=rejected, margin=z, chosen_reward=chosen_reward, rejected_reward=rejected_reward,
        reward_accuracy=(chosen_reward > rejected_reward).float(), chosen_kl=chosen_kl, rejected_kl=rejected_kl,
        kl_gap=rejected_kl - chosen_kl,
    )  # fmt: skip


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
    context = pairs.context(data, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=1)
    policy = gpu.shard(models.load(args, device))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    engine.sleep()

    # The reference is the start, beside the policy: the KL needs its whole distributions.
    def frozen():
        return gpu.shard(models.load(args, device, trainable=False))

    reference = frozen()

    def evaluate():
        engine.sync()
        return judge.evaluate(engine, policy, reference or frozen(), data, tokenizer, run)

    for step in run.steps(policy, optimizer, evaluate):
        # Update: one pass over the step's pairs, of which every process has its share.
        some = gpu.local(data.order(step * args.pairs_per_step, args.pairs_per_step, args.seed))
        meter, loss, tokens = Meter(), 0.0, 0
        for mb in pairs.micro_batches(some, data, args):
            logp, ref_logp, kl, entropy = policy(mb.ids, mb.attention_mask, mb.mask, read=token_kl, beside=[reference])
            losses, stats = pair_loss(logp, ref_logp, kl, mb.mask, args)
            micro_loss = (losses * mb.weights).sum()
            micro_loss.backward()
            loss += micro_loss.item()
            tokens += int(mb.mask[mb.real.repeat(2)].sum())
            meter.add(stats, mb.real)
            meter.add(dict(entropy=entropy), mb.mask & mb.real.repeat(2)[:, None])
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        if run.finite(gpu.total(loss), grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        run.write(meter.result(), int(gpu.total(tokens)), judge.SHOWN)

    run.finish(judge.sentence(run))
    engine.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
