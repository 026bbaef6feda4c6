"""TGDPO: Token-level reward Guidance for DPO. Zhu et al., "Harnessing Token-Level Reward Guidance", arXiv 2506.14574 (2025).

Idea: DPO pushes all tokens of a response alike. A guide, a frozen model that has been through DPO before, says by its log-ratio
to the reference which tokens made a response good or bad; the KL strength then depends on the token, and what is left of the
derivation is DPO with a weight on every token's log-ratio. The policy starts from the SFT model again, not from the guide.

Objective, to be minimised (the official code; equation numbers not at hand; no gradient through r_hat):
    L = mean over pairs of -log sigmoid(beta z),   z = sum_t f_t^w d_t^w - sum_t f_t^l d_t^l,   d_t = log pi / pi_ref (y_t)
    f_t^w = 1 + alpha r_hat_t^w,   f_t^l = 1 - alpha r_hat_t^l,   r_hat_t = beta log pi_guide / pi_ref (y_t)
The proof needs f > 0; the official code does not enforce it, nor does this one: see negative_weights. As there, the beta inside
r_hat is the loss's; in the paper it is the guide's. A guide that has made both responses less likely, as DPO does, weights the
rejected one more (rejected_weight, chosen_weight): then the loss also falls when everything becomes less likely. The tiny model
shows it on letters, where it does worse than DPO; a small alpha is the remedy that the proof asks for.

Family: preference
Differs from dpo.py in: pair_loss, train
Costs: a run of DPO for the guide, here a short one; one forward pass of it over the data, kept like the reference's.
Run:   python algos/tgdpo.py                                             tiny model, CPU, about a minute
       python algos/tgdpo.py --model qwen2.5-1.5b-instruct --beta 0.1 --guide runs/<a run of dpo.py>/checkpoints/step-000900
       torchrun --nproc-per-node 8 algos/tgdpo.py --model qwen2.5-7b-instruct --data pairs.jsonl
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
    ref: Literal["cached", "live"] = "cached"
    """log-probs of the reference: computed once and kept in the run folder, or by a frozen model in every step"""
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

    # TGDPO
    limits = dict(beta="0 < x")
    beta: float = 0.3
    """how strongly the KL to the reference is held (dpo.py's; official example: 0.1; paper: 0.01, unconfirmed)"""
    alpha: float = 0.5
    """how far the guide's token rewards move the weights from 1; 0 is DPO (paper and official code: 0.5)"""
    guide: str | None = None
    """folder or hub id of the guide, e.g. a checkpoint of dpo.py's; None: one is trained by DPO on the same pairs first"""
    guide_steps: int = 60
    """updates of that training (ours: short, since a guide that has gone far makes weights far from 1; paper: a full run)"""


# ---------------------------------------------------------------- the objective


def pair_loss(logp, ref_logp, guide_logp, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    log_ratio = (logp - ref_logp).masked_fill(~mask, 0.0)
    chosen, rejected = log_ratio.sum(1).chunk(2)  # a sum: a mean would make beta T times weaker
    z = chosen - rejected

    r_hat = args.beta * (guide_logp - ref_logp).masked_fill(~mask, 0.0).detach()
    good, bad = r_hat.chunk(2)
    weight = torch.cat([1 + args.alpha * good, 1 - args.alpha * bad])  # f^w and f^l: their signs are opposite
    weighted_chosen, weighted_rejected = (weight * log_ratio).sum(1).chunk(2)
    weighted_z = weighted_chosen - weighted_rejected
    losses = -torch.nn.functional.logsigmoid(args.beta * weighted_z)

    length = mask.sum(1).clamp(min=1)
    chosen_weight, rejected_weight = (1 + (weight - 1).sum(1) / length).chunk(2)  # r_hat is 0, so f is 1, outside the mask
    lowest = torch.minimum(*weight.masked_fill(~mask, torch.inf).amin(1).chunk(2)).nan_to_num(posinf=1.0)  # no token: 1
    negative = sum(((weight < 0).sum(1) / length).chunk(2)) / 2
    stats = dict(chosen_weight=chosen_weight, rejected_weight=rejected_weight, weight_min=lowest, negative_weights=negative)
    stats["weighted_margin"] = weighted_z
    return losses, stats | dict(chosen_ratio=chosen, rejected_ratio=rejected, margin=z, reward_accuracy=(z > 0).float())


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
    context = pairs.context(data, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, trained=2, frozen=int(args.ref == "live"))
    policy = gpu.shard(models.load(args, device))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    engine.sleep()

    # The reference is the start: all its log-probs now, or the model itself beside the policy.
    def frozen():
        return gpu.shard(models.load(args, device, trainable=False))

    reference = frozen() if args.ref == "live" else None
    if args.ref == "cached":
        data.columns["ref_logp"] = pairs.cached(run, "reference", frozen, data)

    # The guide: given, or the start after updates on this loss with the reference as its own guide, which is DPO.
    def guide():
        if args.guide:
            other = Args(**vars(args) | dict(model=args.guide))
            if models.load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
                raise UserError(f"--guide {args.guide}: its tokenizer is another one than that of --model {args.model}")
            return gpu.shard(models.load(other, device, trainable=False))

        def loss(logp, mb):
            ref_logp = pairs.logp_now(reference, mb) if reference else mb.columns["ref_logp"]
            return pair_loss(logp, ref_logp, ref_logp, mb.mask, args)[0]

        return pairs.fit("guide", loss, data, args, run, args.guide_steps, args.lr)

    data.columns["guide_logp"] = pairs.cached(run, "guide", guide, data)

    def evaluate():
        engine.sync()
        return judge.evaluate(engine, policy, reference or frozen(), data, tokenizer, run)

    for step in run.steps(policy, optimizer, evaluate):
        # Update: one pass over the step's pairs, of which every process has its share.
        some = gpu.local(data.order(step * args.pairs_per_step, args.pairs_per_step, args.seed))
        meter, loss, tokens = Meter(), 0.0, 0
        for mb in pairs.micro_batches(some, data, args):
            logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask)
            ref_logp = pairs.logp_now(reference, mb) if reference else mb.columns["ref_logp"]
            losses, stats = pair_loss(logp, ref_logp, mb.columns["guide_logp"], mb.mask, args)
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
