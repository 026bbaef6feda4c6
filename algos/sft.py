"""SFT: supervised fine-tuning on demonstrations, as in Ouyang et al., arXiv 2203.02155 (2022).

Idea: make every token of a demonstration likelier where it stands, given all that stands before it. The prompt is read but not
learnt, and all tokens of the completions count alike, the one that ends them too. It is what most post-training begins with:
no sampling, no reward, no reference model.

Objective, to be minimised (equation numbers not at hand), over all completion tokens of the update's demonstrations:
    L = -1/N sum_i sum_t log pi(y_i,t | x_i, y_i,<t),   N = sum_i |y_i|

Family: supervised
Base: this is the script that methods on demonstrations are diffed against: they change `token_loss`, which sees the whole
      distribution of the next token, or `token_weights`.
Costs: a forward and a backward pass; sampling for the evaluation alone. The loss goes through policy's `read`, which children
       use for more: the head then takes longer than for policy's own log-probs, and holds one gradient of its size.
Run:   python algos/sft.py                                      tiny model, CPU, seconds
       python algos/sft.py --model qwen2.5-1.5b                 GSM8K's worked solutions on one GPU
       torchrun --nproc-per-node 8 algos/sft.py --model qwen2.5-7b --task conversations.jsonl
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
    warmup_steps: int = 0
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
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


# ---------------------------------------------------------------- the objective


def token_loss(targets, logits, args):
    """Next tokens [n], logits [n, V] -> (loss [n], to be minimised, and for the log: the tokens' log-probs, entropies [n])."""
    logp = logits.log_softmax(-1)
    of_target, fixed = logp.gather(-1, targets[:, None]).squeeze(-1), logp.detach()
    return -of_target, of_target.detach(), -(fixed.exp() * fixed).sum(-1)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the update, so that long completions count more than short ones."""
    return mask / mask.sum().clamp(min=1)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import demonstrations, engines, gpu, models, rewards, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    task, context = demonstrations.load(args, config, tokenizer)
    run = runlog.Run(__file__, args, config, tokenizer, context)
    policy = gpu.shard(models.load(args, device))
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
            losses, logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, read=loss_of)
            micro_loss = (losses * mb.weights)[mb.trained].sum()
            micro_loss.backward()
            loss += micro_loss.item()
            meter.add(dict(logp=logp, entropy=entropy), mb.trained)
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
