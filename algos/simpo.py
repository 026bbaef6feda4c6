"""SimPO: Simple Preference Optimization with a Reference-Free Reward. Meng, Xia and Chen, arXiv 2405.14734 (2024).

Idea: DPO's reward is a log-ratio to a reference, while a model generates by its own likelihood alone, and a sum over tokens
grows with the length. SimPO takes the mean log-prob of a response under the policy as its reward, so that training and
generation rank responses alike and length buys nothing, and no reference is needed. The chosen response is to win by a target
margin, gamma; with no reference, nothing but the learning rate holds the policy near its start.

Objective, to be minimised (Eq. 6), y_w the chosen and y_l the rejected response:
    L = mean over pairs of -log sigmoid(beta z),   z = l(y_w) - l(y_l) - gamma / beta,   l(y) = 1/|y| sum_t log pi(y_t)
    so beta z = reward(y_w) - reward(y_l) - gamma, with the reward beta l(y), below 0 always
    with --loss hinge: max(0, 1 - beta z);   with --sft-weight c: - c l(y_w) is added
The margin is given as gamma / beta, as in the authors' code; TRL and LLaMA-Factory have a flag for gamma itself.

Family: preference
Differs from dpo.py in: ref, pair_loss, train
Costs: less than DPO: no reference in training. One is loaded for the evaluation alone, which measures the KL to the start.
Run:   python algos/simpo.py                                             tiny model, CPU, about a minute
       python algos/simpo.py --model qwen2.5-1.5b-instruct               UltraFeedback on one GPU
       torchrun --nproc-per-node 8 algos/simpo.py --model qwen2.5-7b-instruct --data pairs.jsonl
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

    # SimPO
    limits = dict(beta="0 < x", label_smoothing="0 <= x <= 1")
    beta: float = 2.0
    """scale of the mean log-probs (paper: 2 to 2.5, for two of its models 10; the authors' code: 2)"""
    gamma_beta_ratio: float = 0.5
    """gamma / beta: the margin to win by, in nats per token; gamma is beta times this (paper: 0.1 to 0.8, Llama-3-Base 0.5)"""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """of beta z"""
    label_smoothing: float = 0.0
    """share of the pairs whose label is taken to be wrong (the authors' code: 0); the wrong label turns gamma round, too"""
    sft_weight: float = 0.0
    """of the chosen response's mean negative log-prob, added to the loss (the authors' code: 0, mean over a batch's tokens)"""


# ---------------------------------------------------------------- the objective


def pair_loss(logp, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    logp = logp.masked_fill(~mask, 0.0)
    chosen, rejected = (logp.sum(1) / mask.sum(1).clamp(min=1)).chunk(2)  # a mean: a sum would be larger for longer ones
    z = chosen - rejected - args.gamma_beta_ratio

    def loss(z):
        if args.loss == "hinge":
            return torch.relu(1 - args.beta * z)
        return -torch.nn.functional.logsigmoid(args.beta * z)

    losses = (1 - args.label_smoothing) * loss(z) + args.label_smoothing * loss(-z)
    losses = losses - args.sft_weight * chosen
    chosen, rejected = args.beta * chosen, args.beta * rejected  # the rewards; their margin is logged without gamma
    return losses, dict(
        chosen_reward=chosen, rejected_reward=rejected, margin=chosen - rejected, reward_accuracy=(chosen > rejected).float()
    )


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

    # No reference: the start is loaded for the evaluation, which measures how far the policy has gone.
    def frozen():
        return gpu.shard(models.load(args, device, trainable=False))

    def evaluate():
        engine.sync()
        return judge.evaluate(engine, policy, frozen(), data, tokenizer, run)

    for step in run.steps(policy, optimizer, evaluate):
        # Update: one pass over the step's pairs, of which every process has its share.
        some = gpu.local(data.order(step * args.pairs_per_step, args.pairs_per_step, args.seed))
        meter, loss, tokens = Meter(), 0.0, 0
        for mb in pairs.micro_batches(some, data, args):
            logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask)
            losses, stats = pair_loss(logp, mb.mask, args)
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
