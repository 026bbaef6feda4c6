"""cDPO: contrastive DPO, of "Critical Tokens Matter: Token-Level Contrastive Estimation". Lin et al., arXiv 2411.19943 (2024).

Idea: a wrong response is mostly wrong at a few critical tokens, and what stands around them is innocent, yet DPO pushes all of
it down. Two copies of the start are fine-tuned, one on the chosen responses (pi_plus) and one on the rejected (pi_minus): where
the first finds a token unlikely that the second likes, the token is critical. The rejected response is then weighted by that,
token by token, and the chosen one is left as it is. (Not conservative DPO, which shares the abbreviation: that is
dpo.py --label-smoothing.)

Objective, to be minimised, y_w the chosen and y_l the rejected response, s_t from the logits z_plus and z_minus, a constant:
    L = mean over pairs of -log sigmoid(beta (D(y_w) - D_s(y_l))),   D(y) = sum_t d_t,   d_t = log pi(y_t) - log pi_ref(y_t)
    D_s(y) = sum_t (1 - s_t) d_t,   s_t = softmax((1 + kappa) z_plus - kappa z_minus) at y_t;   an end of sequence weighs 1
That L is the paper's is unconfirmed (equation numbers not at hand). The authors' code has no sum inside the sigmoid:
--aggregate per_token is the mean over positions t of -log sigmoid(beta (d_t(y_w) - (1 - s_t) d_t(y_l))), whatever the two
tokens are. Its mean counts prompt and padding, so that their width is a learning rate; here it is that over the positions
that either response of a pair has.

Family: preference
Differs from dpo.py in: contrastive_score, free_ends, pair_loss, check_folders, contrastive_column, train
Measures: measure, detection
Costs: two trainings of ce_steps before the run, beside the idle policy, and a forward pass of both models over the data, once:
       scores lie in a memory-mapped file, and the two models are gone afterwards.
Run:   python algos/cdpo.py                                               tiny model, CPU, about a minute and a half
       python algos/cdpo.py --model qwen2.5-1.5b-instruct                 UltraFeedback on one GPU
       torchrun --nproc-per-node 8 algos/cdpo.py --model qwen2.5-7b-instruct --data pairs.jsonl
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

    # CDPO
    limits = dict(beta="0 < x")
    tiny_preset = dict(data="chain")
    beta: float = 0.1
    """how strongly the KL to the reference is held (the authors' code)"""
    kappa: float = 1.0
    """how much of pi_minus is taken off pi_plus in the score (the authors' code); 0: pi_plus's own probability"""
    aggregate: Literal["sequence", "per_token"] = "sequence"
    """the sigmoid is of the difference of two sums (the paper), or of every position's difference (the authors' code)"""
    only_neg: bool = True
    """weigh the rejected response alone (the authors' code); else the tokens of the chosen one, too, by s_t"""
    ce_steps: int = 150
    """updates that make pi_plus, and as many for pi_minus, pairs_per_step responses each (ours; the authors: one epoch)"""
    ce_lr: float | None = None
    """learning rate of both; None: 5 lr (ours; the authors' code: LoRA at 3e-4, where its cDPO has 4e-5)"""
    positive: str | None = None
    """folder of a model that is to be pi_plus, with the tokenizer of `model`; none is trained"""
    negative: str | None = None
    """the same for pi_minus"""


# ---------------------------------------------------------------- the objective


def contrastive_score(targets, logits, other_logits, kappa):
    """targets [n], logits [n, V] of pi_plus and of pi_minus -> s_t of the targets [n], in (0, 1): low where critical."""
    return ((1 + kappa) * logits - kappa * other_logits).softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def free_ends(scores, responses, end):
    """Scores [T_i] and token ids of all responses, chosen and rejected in turn -> the scores with which an end of sequence (a
    response that was cut has none) weighs 1: 0 in a rejected response, 1 in a chosen one."""
    ends = [torch.arange(len(y)).eq(len(y) - 1) & (y[-1:] == [end]) for y in responses]
    return [s.masked_fill(at, 1.0 - i % 2) for i, (s, at) in enumerate(zip(scores, ends))]


def pair_loss(logp, ref_logp, score, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    log_ratio = (logp - ref_logp).masked_fill(~mask, 0.0)
    chosen, rejected = log_ratio.sum(1).chunk(2)  # a sum: a mean would make beta T times weaker
    s_chosen, s_rejected = score.detach().masked_fill(~mask, 0.0).chunk(2)
    weight = torch.cat([torch.ones_like(s_chosen) if args.only_neg else s_chosen, 1 - s_rejected])
    d_chosen, d_rejected = (weight * log_ratio).chunk(2)
    z = d_chosen.sum(1) - d_rejected.sum(1)
    losses = -torch.nn.functional.logsigmoid(args.beta * z)
    if args.aggregate == "per_token":
        cells = mask.chunk(2)[0] | mask.chunk(2)[1]
        losses = -torch.nn.functional.logsigmoid(args.beta * (d_chosen - d_rejected)).masked_fill(~cells, 0.0).sum(1)
        losses = losses / cells.sum(1).clamp(min=1)
    critical = (weight * mask).chunk(2)[1].sum(1) / mask.chunk(2)[1].sum(1).clamp(min=1)
    stats = dict(chosen_ratio=chosen, rejected_ratio=rejected, critical_ratio=d_rejected.sum(1), critical_weight=critical)
    return losses, stats | dict(margin=z, reward_accuracy=(z > 0).float())


# ---------------------------------------------------------------- the loop


def check_folders(args):
    """UserError where one of the two models is given and the other is not."""
    from common import UserError

    if (args.positive is None) != (args.negative is None):
        raise UserError("--positive and --negative go together: folders of both models, or of none")


def contrastive_column(run, data, config, tokenizer, args):
    """s_t of all responses, by a model of the chosen and one of the rejected, in memory until they have read them."""
    from common import UserError, encoding, gpu, models, pairs

    def expert(name, side, folder):
        def loss(logp, mb):
            return (-logp.sum(1) / mb.mask.sum(1)).chunk(2)[side]

        if folder is None:
            return pairs.fit(name, loss, data, args, run, args.ce_steps, 5 * args.lr if args.ce_lr is None else args.ce_lr)
        model = models.load(Args(**vars(args) | dict(model=folder)), gpu.device(), trainable=False)
        if model.lm.config.vocab_size != config.vocab_size:
            raise UserError(f"the vocabularies of {folder} and {args.model} have different sizes")
        return gpu.shard(model)

    def scores(pi, rows):
        found = pairs.logp_of(pi[0], rows, args, beside=pi[1:], read=lambda *x: (contrastive_score(*x, args.kappa),))
        return free_ends(found, [y for _, y in rows], encoding.turn_end(tokenizer))

    sides = ("positive model", 0, args.positive), ("negative model", 1, args.negative)
    return pairs.cached(run, "score", lambda: [expert(*side) for side in sides], data, values=scores)


def detection(value, wrong):
    """value [n], wrong [n] bool, of n tokens -> {the value's mean over the wrong tokens and over the innocent ones, auc: how
    often a wrong token has a higher value than an innocent one, ties half}."""
    higher = (value[wrong][:, None] - value[~wrong]).sign().mean().item()
    return dict(wrong=value[wrong].mean().item(), innocent=value[~wrong].mean().item(), auc=(1 + higher) / 2)


def measure(run, data):
    """How well 1 - s finds the wrong tokens of rejected responses, against the reference's 1 - p, where the data knows them.
    Once, before the first step, into detection.json."""
    import json

    told, found = [p for p in data.test[: run.args.eval_prompts] if p.gold], {}
    wrong = torch.tensor([worth < 0 for p in told for worth in p.gold[1][:-1]]).bool()  # all but the end of sequence
    if "before" in run.state or not run.main or not wrong.any() or wrong.all():
        return
    for name, column in data.columns.items():
        value = torch.cat([column[2 * p.id + 1][:-1] for p in told])
        found[name] = detection(1 - (value if name == "score" else value.exp()), wrong)
        text = ", ".join(f"{k} {v:.3f}" for k, v in found[name].items())
        run.bar.write(f"  wrong tokens by 1 - {'s' if name == 'score' else 'p_ref'}: {text}")
    (run.dir / "detection.json").write_text(json.dumps(found) + "\n")


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    check_folders(args)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
    context = pairs.context(data, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, trained=3, frozen=int(args.ref == "live"))
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

    data.columns["score"] = contrastive_column(run, data, config, tokenizer, args)
    measure(run, data)

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
            losses, stats = pair_loss(logp, ref_logp, mb.columns["score"], mb.mask, args)
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
