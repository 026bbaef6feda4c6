"""Precision pre-training. Wu et al., "Diversity or Precision? A Deep Dive into Next Token Prediction", arXiv 2512.22955 (2025).

Idea: cross-entropy is a policy gradient of one step, whose reward is one over the probability of the right token and nothing
elsewhere; give that reward another shape, and pre-training ends with another spread of its guesses, which is what reinforcement
learning then starts from. One knob is the right token's reward: beta below 0 pushes on where the model is sure already, above 0
it lets go there. The others are what wrong tokens earn, among the k likeliest and in the tail behind them.

Objective, to be minimised, at each token x (Eq. 11 for the first factor, the other equation numbers not at hand):
    L = -sg[(1 - pi(x))^beta] log pi(x) - sum_{a != x} sg[pi(a) lambda(a)] log pi(a)
    lambda(a) = lambda_top for the k likeliest tokens, lambda_tail for the others

beta = lambda_top = lambda_tail = 0 is cross-entropy. The paper's arms turn one knob each: beta -0.25 (the default) or 0.5,
lambda_top 0.1, lambda_tail -0.1. Two notes on the paper read the right token's reward differently: as (1/pi) (1 - pi)^beta,
which is here, or as (1/pi)^((1 - pi)^beta), --positive power, whose push is cross-entropy's again where pi goes to 1. No code
is public. A tiny model starts from random weights; any other from its own, as continued pre-training, unless --from-scratch.

Family: supervised
Differs from sft.py in: warmup_steps, lr_schedule, token_loss, train
Costs: a topk and two more numbers for every token of the vocabulary, chunk by chunk.
Run:   python algos/precision_pretraining.py                                       tiny model, CPU, about a minute
       python algos/precision_pretraining.py --beta 0 --lambda-tail -0.1           another arm
       python algos/grpo.py --model runs/precision_pretraining-1-...               its second stage, on the same task
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
    """addition[:digits], route, ... (built in), gsm8k, math, a .jsonl of messages, or prompt and completion; None: preset"""
    reward: str | None = None
    """file.py:function of your own: (text, answer) -> score, or (answer that was read, score); a cut completion scores 0"""
    prompt_template: str | None = None
    """format string with the field {prompt}, applied before the tokenizer's chat template; None: the task's"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    careful: float = 0.9
    """share of a built-in task's demonstrations that are right; the rest is from habit, and mostly wrong"""
    seed: int = 1
    """of the demonstrations' order, what is random in them, and the evaluation's samples"""
    steps: int | None = None
    """updates in all; None here and below: the preset of the model"""
    batch_size: int | None = None
    """demonstrations in one update, of all processes together"""
    lr: float | None = None
    """AdamW's rate"""
    warmup_steps: int = 30
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    max_new_tokens: int | None = None
    """longest completion: of the demonstrations (a longer one is cut) and of the evaluation's samples"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples for the evaluation: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
    eval_every: int | None = None
    """steps between evaluations; 0: only before and after"""
    eval_prompts: int = 512
    """held-out prompts, at most"""
    eval_samples: int = 0
    """also samples N completions of each: avg@N (their mean) and pass@N (whether one is right); 0: the greedy one only"""
    eval_temperature: float = 1.0
    """temperature of these samples"""
    also_evaluate: str | None = None
    """another task whose greedy accuracy is measured besides: what is forgotten, or carried over"""
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

    # Precision pre-training
    limits = dict(beta="x", lambda_top="x", lambda_tail="x", top_k="1 <= x")
    tiny_preset = dict(task="route", steps=600, batch_size=64, lr=3e-3, eval_every=100, checkpoint_every=100, top_k=5,
                       from_scratch=True)  # fmt: skip
    real_preset = dict(top_k=100, from_scratch=False)
    beta: float = -0.25
    """exponent of the right token's reward; 0: cross-entropy's (the paper's best)"""
    lambda_top: float = 0.0
    """what a wrong token among the k likeliest earns (its arm: 0.1)"""
    lambda_tail: float = 0.0
    """what any other wrong token earns (its arm: -0.1)"""
    top_k: int | None = None
    """k (100 in the paper; 5 of the tiny model's 78 tokens)"""
    positive: Literal["product", "power"] = "product"
    """reward of the right token: (1/pi) (1 - pi)^beta, or (1/pi)^((1 - pi)^beta)"""
    from_scratch: bool | None = None
    """begin with random weights, drawn from the seed"""


# ---------------------------------------------------------------- the objective


def token_loss(targets, logits, args):
    """Next tokens [n], logits [n, V] -> (loss, to be minimised; for the log: log-prob, entropy, mass in the tail), [n] each."""
    logp = logits.log_softmax(-1)
    of_target, fixed = logp.gather(-1, targets[:, None]).squeeze(-1), logp.detach()
    pi, right = fixed.exp(), of_target.detach()
    top = torch.zeros_like(pi).scatter(-1, pi.topk(min(args.top_k, pi.shape[1])).indices, 1.0)
    miss = (-torch.expm1(right)).clamp(min=1e-4 if args.beta < 0 else 0.0) ** args.beta
    own = miss if args.positive == "product" else (right * (1 - miss)).exp()
    weight = (pi * (args.lambda_tail + (args.lambda_top - args.lambda_tail) * top)).scatter(-1, targets[:, None], own[:, None])
    return -(weight * logp).sum(-1), right, -(pi * fixed).sum(-1), (pi * (1 - top)).sum(-1)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the update, so that long completions count more than short ones."""
    return mask / mask.sum().clamp(min=1)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import demonstrations, engines, gpu, models, rewards, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args, fresh=args.from_scratch)
    task, context = demonstrations.load(args, config, tokenizer)
    run = runlog.Run(__file__, args, config, tokenizer, context)
    policy = gpu.shard(models.load(args, device, fresh=args.from_scratch))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    engine.sleep()
    scorer = rewards.Scorer(task.check, inline=task.inline) if task.check else None

    def evaluate():
        return demonstrations.evaluate(engine, scorer, policy, task, tokenizer, run)

    def loss_of(targets, logits):
        return token_loss(targets, logits, args)

    for step in run.steps(policy, optimizer, evaluate):
        # The demonstrations of the update: all processes know all of them, so that the weights are the whole batch's.
        cursor = step * args.batch_size
        examples = task.order(cursor, args.batch_size, args.seed)
        batch = demonstrations.batch(task, examples, tokenizer, args, args.seed, cursor)
        batch.weights = token_weights(batch.trained, args)

        # Update: every process takes its share of the rows, cut into micro-batches.
        meter, loss = Meter(), 0.0
        rows = torch.arange(args.batch_size, device=device)[gpu.rank() :: gpu.world()]
        for mb in batch.micro_batches(rows, args.micro_batch_tokens):
            losses, logp, entropy, tail = policy(mb.ids, mb.attention_mask, mb.mask, read=loss_of)
            micro_loss = (losses * mb.weights)[mb.trained].sum()
            micro_loss.backward()
            loss += micro_loss.item()
            meter.add(dict(logp=logp, entropy=entropy, tail_mass=tail), mb.trained)
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        if run.finite(gpu.total(loss), grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        metrics = meter.result()
        metrics["train_perplexity"] = demonstrations.perplexity(metrics["logp"])
        run.write(metrics, int(batch.mask.sum()), demonstrations.SHOWN)

    run.finish()
    engine.close()
    if scorer:
        scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
