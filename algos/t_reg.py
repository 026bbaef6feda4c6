"""T-REG: Preference Optimization with Token-Level Reward Regularization. Zhou et al., arXiv 2412.02685 (2024).

Idea: DPO's implicit reward of a token is only as good as what the pairs say about whole responses. The reference model itself
can say more: asked once for a better and once for a worse version of a response, it gives that response's tokens different
probabilities, and their ratio is a reward per token that no one had to label. A regulariser draws the policy's token rewards
towards it, on pairs that DPO has not told apart yet.

Objective, to be minimised (from a summary of the paper, no official code could be read; equation numbers not at hand;
unconfirmed: R's sum over tokens, and w's having no gradient):
    L = mean over pairs of -log sigmoid(beta z) + alpha w (R(y_w) + R(y_l)),   z = D(y_w) - D(y_l) as in dpo.py
    R(y) = -beta sum_t r_hat_t log pi(y_t),   r_hat_t = sigmoid(log pi_ref(y_t | x_better) / pi_ref(y_t | x_worse)) - 1/2
    w = sigmoid(-beta z), no gradient through w and r_hat; R is, up to a constant, minus r_hat times the policy's token rewards
Gradient of log pi(y_t): -beta w (1 + alpha r_hat_t) where chosen, beta w (1 - alpha r_hat_t) where rejected. That is tgdpo.py's
form: r_hat comes from prompts instead of a guide, and w from the margin without weights.

Family: preference
Differs from dpo.py in: token_reward, revision, pair_loss, has_tags, revision_columns, train
Costs: two more forward passes of the frozen reference over the data, once, with prompts that quote the response.
Run:   python algos/t_reg.py                                             tiny model, CPU, about a minute
       python algos/t_reg.py --model qwen2.5-1.5b-instruct --beta 0.1    UltraFeedback on one GPU
       torchrun --nproc-per-node 8 algos/t_reg.py --model qwen2.5-7b-instruct --data pairs.jsonl
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

    # T-REG
    limits = dict(beta="0 < x")
    beta: float = 0.3
    """how strongly the KL to the reference is held (dpo.py's; what the paper takes is unconfirmed)"""
    alpha: float = 0.25
    """strength of the regulariser; 0 is DPO (paper: the best of 0.1, 0.25 and 0.5)"""
    static_weight: bool = False
    """w = 1: the regulariser does not fade on pairs that are told apart already (the paper's ablation)"""


# ---------------------------------------------------------------- the objective


def token_reward(better_logp, worse_logp, mask):
    """Log-probs [2B, T] after the two revision prompts -> r_hat [2B, T] in (-0.5, 0.5), no gradient; 0 outside the mask."""
    return (torch.sigmoid(better_logp - worse_logp) - 0.5).masked_fill(~mask, 0.0).detach()


def revision(question, answer, better, tagged=False):
    """The prompt that asks for a better or a worse version of an answer, texts; a tagged one ('1nabc:') has a letter for it."""
    if tagged:
        return question[:1] + "-+"[better] + question[2:]
    worse = "less helpful, with mistakes, hard to follow and long-winded"
    aim = "more helpful, more correct, easier to follow and more concise" if better else worse
    return (
        f"Below are a question and an answer to it. Rewrite the answer so that it becomes {aim}.\n\n"
        f"Question:\n{question}\n\nAnswer:\n{answer}\n\nRewritten answer:\n"
    )


def pair_loss(logp, ref_logp, better_logp, worse_logp, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    log_ratio = (logp - ref_logp).masked_fill(~mask, 0.0)
    chosen, rejected = log_ratio.sum(1).chunk(2)  # a sum: a mean would make beta T times weaker
    z = chosen - rejected

    r_hat = token_reward(better_logp, worse_logp, mask)
    R_chosen, R_rejected = (-args.beta * r_hat * logp.masked_fill(~mask, 0.0)).sum(1).chunk(2)  # r_hat's sign on both sides
    R = R_chosen + R_rejected
    w = torch.sigmoid(-args.beta * z).detach()  # the weight of a pair in DPO's own gradient
    losses = -torch.nn.functional.logsigmoid(args.beta * z) + args.alpha * (1.0 if args.static_weight else w) * R

    chosen_r_hat, rejected_r_hat = (r_hat.sum(1) / mask.sum(1).clamp(min=1)).chunk(2)
    stats = dict(chosen_r_hat=chosen_r_hat, rejected_r_hat=rejected_r_hat, w=w, R=R)
    return losses, stats | dict(chosen_ratio=chosen, rejected_ratio=rejected, margin=z, reward_accuracy=(z > 0).float())


# ---------------------------------------------------------------- the loop


def has_tags(data):
    """Whether the prompts are a built-in task's, with a tag for the version that is wanted; UserError where they have none."""
    from common import UserError, tasks

    tagged = tasks.world(data.name) is not None
    if tagged and data.train[0].text[1] != "n":
        raise UserError(f"--data {data.name}: its prompts have no better and worse variants; letters, letters4 and files do")
    return tagged


def revision_columns(run, frozen, data, config, tokenizer, tagged):
    """Log-probs of all responses under the model of frozen(), after either revision prompt: the columns better and worse. Where
    one of the two is too long, after its own prompt twice: r_hat is 0."""
    from common import encoding, pairs

    too_long = set()

    def revisions(pair, response):
        answer = tokenizer.decode(response, skip_special_tokens=True)
        texts = [revision(pair.text, answer, better, tagged) for better in (True, False)]
        prompts = encoding.prompt_ids(texts, tokenizer, "a revision")
        if max(map(len, prompts)) + len(response) <= config.max_position_embeddings:
            return prompts
        too_long.add((pair.id, response is pair.chosen))
        return pair.prompt, pair.prompt

    better = pairs.cached(run, "better", frozen, data, lambda *row: revisions(*row)[0])
    worse = pairs.cached(run, "worse", frozen, data, lambda *row: revisions(*row)[1])
    if too_long and run.main:
        print(f"note: {len(too_long):,} responses have no token reward: their revision prompts are too long", flush=True)
    return dict(better=better, worse=worse)


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
    tagged = has_tags(data)
    context = pairs.context(data, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.ref == "live"))
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

    data.columns |= revision_columns(run, frozen, data, config, tokenizer, tagged)

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
            losses, stats = pair_loss(logp, ref_logp, mb.columns["better"], mb.columns["worse"], mb.mask, args)
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
