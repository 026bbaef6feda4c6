"""TAB-PO: Preference Optimization with a Token-Level Adaptive Barrier. Fodeh et al., arXiv 2603.00025 (2026).

Idea: where responses are structured records, chosen and rejected differ in a few label tokens and share their scaffold, which
DPO tears down with the rejected one. TAB-PO gives the tokens of label values, and those that differ within the pair, a larger
weight, and compares weighted means. A barrier keeps the chosen response up: supervised learning on those of its tokens alone
that the policy gives less than the probability tau, so that it falls silent token by token.

Objective, to be minimised, y_w the chosen and y_l the rejected response, omega_t token weights, w_t = omega_t / mean omega:
    L = mean over pairs of -log sigmoid(beta z) + lambda B(y_w)
    z = S(y_w) - S_ref(y_w) - S(y_l) + S_ref(y_l),   S(y) = 1/|y| sum_t w_t log pi(y_t)   (S_ref: with the same weights)
    B(y) = sum_t g_t w_t (-log pi(y_t)) / max(1, sum_t g_t w_t),   g_t = [pi(y_t) < tau], no gradient
This is the authors' code; that the paper has the same is unconfirmed (equation numbers not at hand). The code weighs a value
wherever its text occurs, here it is weighed where it stands as the value of its field. Its negatives are gold records edited
by frequent confusions.

Family: preference
Differs from dpo.py in: value_weights, token_weights, pair_loss, weight_column, train
Costs: nothing beyond DPO; the weights are made once, of the data alone.
Run:   python algos/tab_po.py                                               tiny model, CPU, about a minute
       python algos/tab_po.py --model qwen2.5-1.5b-instruct --data train.jsonl --field-weights Code=1.1,Sub-code=1.2,Span=1.1
       torchrun --nproc-per-node 8 algos/tab_po.py --model qwen2.5-7b-instruct --data pairs.jsonl
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

    # TAB-PO
    limits = dict(beta="0 < x", tau="0 < x <= 1", difference_weight="0 < x")
    tiny_preset = dict(data="record")
    beta: float = 0.5
    """of the margin z of means, far weaker than the same beta of DPO's sums (the authors' code)"""
    tau: float = 0.66
    """the barrier acts on chosen tokens of less probability, up to 1: on all (the authors' code); near 0: on none"""
    barrier: float = 0.5
    """lambda, the barrier's weight (the authors' code)"""
    field_weights: str = "c=1.1,s=1.2"
    """name=weight of each field, as in `name: value` or JSON (record's; the authors' code: Code=1.1,Sub-code=1.2,Span=1.1)"""
    difference_weight: float = 1.2
    """factor of tokens that differ from the other response's at the same place, unaligned (the authors' code)"""


# ---------------------------------------------------------------- the objective


def value_weights(pieces, fields):
    """The texts of a response's tokens [T], {field: weight} -> weights [T] of tokens with a character of a field's value, the
    largest where there are several; 1 elsewhere. A field is "name": "value" (or a number), or name: value up to , ; ) ] }"""
    import re

    text, weights = "".join(pieces), [1.0] * len(pieces)
    token = [t for t, piece in enumerate(pieces) for _ in piece]  # that a character of the text is in
    for name, weight in sorted(fields.items(), key=lambda field: field[1]):
        value = r'"?\s*:\s*(?:"((?:[^"\\]|\\.)+)"|([^\s",;()\[\]{}][^\n",;()\[\]{}]*))'
        for match in re.finditer(rf"(?<![\w-]){re.escape(name)}{value}", text):
            start, end = match.span(match.lastindex)
            for t in range(token[start], token[end - 1] + 1):
                weights[t] = weight
    return weights


def token_weights(chosen, rejected, piece, fields, args):
    """Token ids of a pair [T_w], [T_l], the text of a token, {field: weight} -> omega_t of each, [T_w] and [T_l]."""
    weights = [torch.tensor(value_weights([piece(i) for i in y], fields)) for y in (chosen, rejected)]
    factor = torch.tensor([args.difference_weight if a != b else 1.0 for a, b in zip(chosen, rejected)])
    return [torch.cat([w[: len(factor)] * factor, w[len(factor) :]]) for w in weights]


def pair_loss(logp, ref_logp, weight, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    logp, ref_logp, weight = (x.masked_fill(~mask, 0.0) for x in (logp, ref_logp, weight.detach()))
    length = mask.sum(1).clamp(min=1)
    weight = weight / (weight.sum(1) / length).clamp(min=1e-8)[:, None]  # mean 1 over a response
    score, ref_score = ((weight * x).sum(1) / length for x in (logp, ref_logp))  # S, S_ref: means, not sums
    chosen, rejected = (score - ref_score).chunk(2)
    z = chosen - rejected
    pref_loss = -torch.nn.functional.logsigmoid(args.beta * z)
    gate = (mask & (logp.exp() < args.tau)).chunk(2)[0]
    gated = gate * weight.chunk(2)[0]
    barrier = -(gated * logp.chunk(2)[0]).sum(1) / gated.sum(1).clamp(min=1)
    stats = dict(pref_loss=pref_loss, barrier=barrier, gated_share=gate.sum(1) / length.chunk(2)[0])
    stats |= dict(chosen_prob=score.chunk(2)[0].exp(), chosen_ratio=chosen, rejected_ratio=rejected)  # ratios of means, too
    return pref_loss + args.barrier * barrier, stats | dict(margin=z, reward_accuracy=(z > 0).float())


# ---------------------------------------------------------------- the loop


def weight_column(data, tokenizer, args):
    """omega_t of all responses, of the data alone, by the text of single tokens. UserError where --field-weights is no list."""
    from common import UserError, gpu

    try:
        fields = {n.strip(): float(w) for n, w in (f.rsplit("=", 1) for f in filter(None, args.field_weights.split(",")))}
        if not all(0 < w < float("inf") for w in fields.values()):
            raise ValueError("not above 0")
    except ValueError:
        raise UserError(f"--field-weights must be like Code=1.1,Span=1.2, above 0, is {args.field_weights}") from None
    two = [[tokenizer.convert_tokens_to_ids("x"), i] for i in range(len(tokenizer))]  # SentencePiece drops a text's first blank
    piece = [text.removeprefix("x") for text in tokenizer.batch_decode(two, skip_special_tokens=True)].__getitem__
    seen = {w for p in data.train[:1000] for w in value_weights([piece(i) for i in p.chosen], fields)}
    if gpu.rank() == 0 and fields and not seen & set(fields.values()):
        print(f"note: no field of --field-weights {args.field_weights} is found in the first chosen responses", flush=True)
    return [w for p in data.train + data.test for w in token_weights(p.chosen, p.rejected, piece, fields, args)]


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
    data.columns["weight"] = weight_column(data, tokenizer, args)
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
            losses, stats = pair_loss(logp, ref_logp, mb.columns["weight"], mb.mask, args)
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
