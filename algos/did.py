"""DID: Differential Information Distribution. Won, Lee, Hwang, Seo, arXiv 2505.23761 (2025).

Idea: read training as Bayes' rule, with the reference as prior and the trained policy as posterior: q, the
normalised ratio of the two, is what the evidence says by itself. DPO learns a q from pairs, and the wanted
one if the rejected responses come from the opposite step, from the reference with the same evidence taken
away. A concentrated q reinforces a few responses; a spread one smooths the policy, and typical responses lose
likelihood.

For one prompt (derived anew; equation numbers not at hand), ~ for equality up to a factor common to all y:
    pi_ref   the reference: frozen, where training starts, and what chosen responses y_w are drawn from
    pi_l     what rejected responses y_l are drawn from
    pi, pi*  the policy in training, and the target, which it should become
    q(y) = pi(y) / pi_ref(y) / sum_y' pi(y') / pi_ref(y'),  so that pi ~ pi_ref q;  q* is that of pi*
Objective, to be minimised, dpo.py's:  L = mean over pairs of -log sigmoid(beta log q(y_w) - beta log q(y_l))
    P(y_1 is the chosen one) = sigmoid(log pi_ref/pi_l (y_1) - log pi_ref/pi_l (y_2)),  as pairs are made
                             = sigmoid(beta log q(y_1) - beta log q(y_2)),              as DPO fits it
    the two agree at q*, and DPO ends at pi*, if and only if  pi_l ~ pi_ref / q*^beta
    E_ref log pi* / pi_ref = -KL(pi_ref || pi*) <= 0:  then chosen responses lose likelihood, on average
Part A, exact, on 32 outcomes, before the training: which loss finds pi* with that pi_l (recovery.json)? DPO,
DPO with a wrong beta and SimPO without a margin end at the same loss, and only the first at pi*: the loss
does not say what was learnt.
Part B, a language model, after the training: exact entropies of pi and q on a game whose 4,096 responses per
prompt can all be listed (did.json). Here a reward labels the pairs; there is no pi_l.
--projected, the default, is the paper's DPO-PG: where <g, h> < 0, with g the gradient of the loss and h that
of the chosen responses' negative log-likelihood, an update would make them less likely, and
g - <g, h> / |h|^2 h takes the place of g. Unconfirmed; per minibatch and over all weights is ours. AdamW
rescales what is left, and other pairs are not asked: chosen responses lose less, not nothing.

Family: preference
Differs from dpo.py in: project, train
Measures: differential_information, rejected_sampler, entropy, divergence, spread, recovery, measure_losses,
    sampled_entropy, measure
Costs: --projected: a forward and backward pass of the chosen responses and a second gradient in memory. Part
       A takes seconds. No official code is public.
Run:   python algos/did.py                                               tiny model, CPU, about a minute
       python algos/did.py --no-projected                                DPO itself, measured
       python algos/did.py --model qwen2.5-1.5b-instruct --beta 0.1      UltraFeedback on one GPU
       torchrun --nproc-per-node 8 algos/did.py --model qwen2.5-7b-instruct --data pairs.jsonl
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

    # DID
    limits = dict(beta="0 < x", label_smoothing="0 <= x <= 1")
    tiny_preset = dict(data="letters4")  # whose responses can all be listed
    beta: float = 0.5
    """how strongly the KL to the reference is held, in both parts (ours; the paper's is unconfirmed)"""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """of the margin beta z"""
    label_smoothing: float = 0.0
    """share of the pairs whose label is taken to be wrong (conservative DPO)"""
    projected: bool = True
    """the gradient never lowers the chosen responses' likelihood (the paper's DPO-PG); --no-projected: DPO"""
    recovery_steps: int = 3000
    """of Adam in part A (ours); 0: leave it out"""
    did_prompts: int = 4
    """held-out prompts whose entropies are measured after training (ours); 0: none"""
    did_samples: int = 32
    """per prompt, where the responses cannot be listed (paper, from a review); the estimate is rough; 0: leave it out"""


# ---------------------------------------------------------------- the objective


def pair_loss(logp, ref_logp, mask, args):
    """[2B, T] each, the B chosen rows first -> (loss per pair [B], to be minimised, stats per pair [B])."""
    log_ratio = (logp - ref_logp).masked_fill(~mask, 0.0)
    chosen, rejected = log_ratio.sum(1).chunk(2)  # a sum: a mean would make beta T times weaker
    z = chosen - rejected

    def loss(z):
        if args.loss == "hinge":
            return torch.relu(1 - args.beta * z)
        if args.loss == "ipo":
            return (z - 1 / (2 * args.beta)).square()
        return -torch.nn.functional.logsigmoid(args.beta * z)

    losses = (1 - args.label_smoothing) * loss(z) + args.label_smoothing * loss(-z)
    return losses, dict(chosen_ratio=chosen, rejected_ratio=rejected, margin=z, reward_accuracy=(z > 0).float())


def project(grads, chosen_grads):
    """Gradients of the loss, changed in place, and of the chosen responses' negative log-likelihood (lists of tensors, or of
    this process's shards of them) -> the cosine between the two before."""

    def dot(a, b):
        wide = [torch.promote_types(x.dtype, torch.float32) for x in a]
        total = sum((x.to(w) * y.to(w)).sum() for x, y, w in zip(a, b, wide))
        return (total.full_tensor() if hasattr(total, "full_tensor") else total).item()  # of shards: over all processes

    inner, square = dot(grads, chosen_grads), dot(chosen_grads, chosen_grads)
    cosine = inner / max((square * dot(grads, grads)) ** 0.5, 1e-30)
    if inner < 0:
        for g, h in zip(grads, chosen_grads):
            g.sub_(h, alpha=inner / square)
    return cosine


# ---------------------------------------------------------------- part A: distributions over K outcomes


def differential_information(logp, ref_logp):
    """Log-probs [..., K] of all K outcomes -> log q [..., K], the normalised log-ratio."""
    return (logp - ref_logp).log_softmax(-1)


def rejected_sampler(ref_logp, target_logp, beta):
    """[..., K] each -> log pi_l [..., K], pi_ref / q*^beta normalised: with it DPO's optimum is the target."""
    return (ref_logp + beta * (ref_logp - target_logp)).log_softmax(-1)


def entropy(logp):
    """Log-probs [..., K] -> nats [...]."""
    return torch.special.entr(logp.exp()).sum(-1)


def divergence(logp, other):
    """Log-probs [..., K] each -> their Jensen-Shannon divergence in nats [...]."""
    return entropy((logp.exp() / 2 + other.exp() / 2).log()) - (entropy(logp) + entropy(other)) / 2


def spread(logp, ref_logp):
    """Log-probs [..., K] each -> {name: [...]}: the entropies of the policy and of q, in nats, and E_ref log pi / pi_ref."""
    return dict(
        entropy=entropy(logp),
        entropy_q=entropy(differential_information(logp, ref_logp)),
        ref_log_ratio=(ref_logp.exp() * (logp - ref_logp)).sum(-1),
    )


def recovery(ref_logp, target_logp, rejected_logp, beta, steps, lr=0.02):
    """Trains a table of K logits [K], from the reference, on the exact expectation of each loss over pairs of an outcome of
    the reference (chosen) and one of the rejected sampler -> {name of the loss: {measure: number}}."""
    K, softplus = len(ref_logp), torch.nn.functional.softplus
    weights = (ref_logp[:, None] + rejected_logp).exp().flatten()
    i, j = torch.arange(K).repeat_interleave(K), torch.arange(K).repeat(K)
    rows, mask = torch.cat([i, j]), torch.ones(2 * K * K, 1, dtype=torch.bool)

    def ratio(**options):  # a loss of this script, on responses of one token
        return lambda logp: pair_loss(logp[rows, None], ref_logp[rows, None], mask, Args(**dict(beta=beta) | options))[0]

    def simpo(beta, gamma):  # arXiv 2405.14734, Eq. 6
        return lambda logp: softplus(gamma - beta * (logp[i] - logp[j]))

    def odds(logp):
        return logp - torch.log1p(-logp.exp())

    arms = {
        "DPO": ratio(),
        "DPO, 2 beta": ratio(beta=2 * beta),
        "IPO": ratio(loss="ipo"),
        "hinge": ratio(loss="hinge"),
        "SimPO, no margin": simpo(beta, 0.0),
        "SimPO": simpo(2.0, 1.0),  # its usual setting
        "SLiC": lambda logp: torch.relu(1 - (logp[i] - logp[j])) - 0.1 * logp[i],  # arXiv 2305.10425, Eq. 1
        "ORPO": lambda logp: softplus(odds(logp)[j] - odds(logp)[i]) * 0.1 - logp[i],  # arXiv 2403.07691, Eq. 6 and 7
    }
    logits = ref_logp.repeat(len(arms), 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = torch.stack([weights @ arm(row) for arm, row in zip(arms.values(), logits.log_softmax(-1))])
        losses.sum().backward()
        optimizer.step()
    logp, information = logits.detach().log_softmax(-1), differential_information(ref_logp, rejected_logp)
    found = dict(
        loss=torch.stack([weights @ arm(row) for arm, row in zip(arms.values(), logp)]),
        js_target=divergence(logp, target_logp),
        js_information=divergence((beta * differential_information(logp, ref_logp)).log_softmax(-1), information),
        **spread(logp, ref_logp),
    )
    return {name: {k: v[n].item() for k, v in found.items()} for n, name in enumerate(arms)}


def measure_losses(run):
    """Part A: which loss finds the target among 32 outcomes, whose log-probs are standard normal up to the normalisation ->
    recovery.json. Before the training, on rank 0; a resumed run has done it."""
    import json

    args, path = run.args, run.dir / "recovery.json"
    if not args.recovery_steps or not run.main or path.exists():
        return
    normal = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcomes, target = normal.log_softmax(-1)
    rejected = rejected_sampler(outcomes, target, args.beta)
    found = recovery(outcomes, target, rejected, args.beta, args.recovery_steps)
    said = f"which loss finds the target? JS to the reference {divergence(outcomes, target):.4f}"
    for name, value in spread(target, outcomes).items():
        said += f", {name.replace('_', ' ')} {value:.4f}"
    run.bar.write(said)
    run.bar.write(" " * 18 + "".join(f"{name.replace('_', ' '):>16}" for name in found["DPO"]))
    for name, row in found.items():
        run.bar.write(f"  {name:<16}" + "".join(f"{value:>16.5f}" for value in row.values()))
    path.write_text(json.dumps(found, indent=1))


# ---------------------------------------------------------------- part B: a language model


def sampled_entropy(logp, ref_logp):
    """Log-probs [..., K] of K responses sampled from the policy, under policy and reference -> estimate of H(q) [...]: q / pi
    is 1 / pi_ref up to a constant. Its variance is huge for long responses, where one weight outgrows all others."""
    log_z = (-ref_logp).logsumexp(-1, keepdim=True) - torch.zeros_like(logp).logsumexp(-1, keepdim=True)  # of the mean
    return -((-ref_logp).softmax(-1) * (logp - ref_logp - log_z)).sum(-1)


def measure(run, data, tokenizer, engine, policy, reference):
    """Part B, after the training: entropies over the responses to a prompt, exact given that the response is one of those that
    can be listed, elsewhere from samples -> did.json. reference() -> the frozen start."""
    import json

    from common import encoding, judge, pairs

    args, listed = run.args, data.responses is not None
    prompts = list({p.text: p for p in data.test}.values())[: args.did_prompts]
    if not prompts or not (listed or args.did_samples):
        return
    if listed:
        every = encoding.response_ids(data.responses(), tokenizer, data.name, args.max_new_tokens)
        rows = [(p.prompt, ids) for p in prompts for ids in every]
    else:
        drawn, _ = judge.sample(engine, prompts, data, tokenizer, args, args.did_samples, 2)
        rows = [(prompts[i].prompt, ids) for i, ids, _ in drawn]
    both = (pairs.logp_of(model, rows, args) for model in (policy, reference()))
    logp, ref_logp = (torch.stack([x.double().sum() for x in some]).view(len(prompts), -1) for some in both)
    if listed:
        found, ref = dict(mass=logp.logsumexp(1).exp()), ref_logp.log_softmax(1)
        found |= spread(logp.log_softmax(1), ref) | dict(reference_entropy=entropy(ref))
    else:
        found = dict(entropy=-logp.mean(1), entropy_q=sampled_entropy(logp, ref_logp))
    if run.main:
        said = ", ".join(f"{name.replace('_', ' ')} {v.mean():.3f}" for name, v in found.items())
        what = "responses" if listed else "samples (a rough estimate)"
        run.bar.write(f"  over {logp.shape[1]:,} {what} to {len(prompts)} prompts: {said}")
        record = dict(exact=listed, prompts=[p.text for p in prompts])
        record |= {name: v.tolist() for name, v in found.items()}
        (run.dir / "did.json").write_text(json.dumps(record))


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
    context = pairs.context(data, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.ref == "live"))
    measure_losses(run)
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
        if args.projected:  # h, of the same pairs
            for mb in pairs.micro_batches(some, data, args):
                b = len(mb.weights)
                logp, _ = policy(mb.ids[:b], mb.attention_mask[:b], mb.mask[:b])
                (-logp.masked_fill(~mb.mask[:b], 0.0).sum(1) * mb.weights).sum().backward()
            chosen_grads = [p.grad for p in policy.parameters() if p.grad is not None]
            optimizer.zero_grad()
        for mb in pairs.micro_batches(some, data, args):
            logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask)
            ref_logp = pairs.logp_now(reference, mb) if reference else mb.columns["ref_logp"]
            losses, stats = pair_loss(logp, ref_logp, mb.mask, args)
            micro_loss = (losses * mb.weights).sum()
            micro_loss.backward()
            loss += micro_loss.item()
            tokens += int(mb.mask[mb.real.repeat(2)].sum())
            meter.add(stats, mb.real)
            meter.add(dict(entropy=entropy), mb.mask & mb.real.repeat(2)[:, None])
        if args.projected:
            cosine = project([p.grad for p in policy.parameters() if p.grad is not None], chosen_grads)
            meter.note(chosen_cosine=cosine, projections=float(cosine < 0))
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        if run.finite(gpu.total(loss), grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        run.write(meter.result(), int(gpu.total(tokens)), judge.SHOWN)

    if run.after:
        measure(run, data, tokenizer, engine, policy, lambda: reference or frozen())
    run.finish(judge.sentence(run))
    engine.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
