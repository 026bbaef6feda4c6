"""R2Q: From r to Q*: Your Language Model is Secretly a Q-Function. Rafailov, Hejna, Park, Finn, arXiv 2404.12358 (2024).

Idea: read a response as a path in a token MDP (state: the prefix, action: the next token, transitions certain). There the
optimal policy's logits are soft Q-values, so DPO's sequence loss, unchanged, has also learnt an advantage for every token. Two
things follow without any further training: log-ratios say which tokens deserve the praise (credit), and beam search on the
policy is search guided by a value function. And samples of the reference must lose likelihood, by how much is a KL.

Objective: dpo.py's. What its optimum means, V* = 0 after the last token (derived anew; equation numbers not at hand):
    Q*(s, a) = r(s, a) + beta log pi_ref(a | s) + V*(s'),   V*(s) = beta log sum_a exp(Q*(s, a) / beta)
    pi*(a | s) = exp((Q*(s, a) - V*(s)) / beta)
    credit: c_t = beta (log pi*(y_t) - log pi_ref(y_t)) = r_t + V*(s_t+1) - V*(s_t): an advantage, not the reward itself, so it
        is not 0 before the token that is paid for; over a response it sums to its reward - V*(prompt)
    search: beta sum_t log pi*(y_t) = sum_t (r_t + beta log pi_ref(y_t)) + V*(leaf) - V*(prompt): the prefix that is likeliest
        under the policy is the one with the best return so far plus value of what is to come
    decline: E_ref log pi / pi_ref = -KL(pi_ref || pi) <= 0: the logged chosen_ratio must fall where chosen responses are
        samples of the reference
After training the script writes credit.json (tokens, c_t and true worth of held-out pairs) and beams.json (what wider beams
find, in the policy and in the reference). No official code is public; the paper's beams, 1 to about 10 with a gain up to 5, and
its 256 prompts are unconfirmed. Left out: training a second time from a start that has not seen the chosen responses (the
paper's other decline curve).

Family: preference
Differs from dpo.py in: train
Measures: token_advantages, alignment, measure_credit, beam_widths, beam_search, measure_beams, measure
Costs: a pass over the held-out pairs; searching decodes sum(beams) responses per prompt, twice, one token at a time over a
       key-value cache, with a whole copy of the reference in every process. Under torchrun with vLLM it is left out.
Run:   python algos/r2q.py                                               tiny model, CPU, about a minute and a half
       python algos/r2q.py --model qwen2.5-1.5b-instruct --beta 0.1      UltraFeedback on one GPU
       torchrun --nproc-per-node 8 algos/r2q.py --model qwen2.5-7b-instruct --data pairs.jsonl --engine hf
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

    # R2Q
    limits = dict(beta="0 < x", label_smoothing="0 <= x <= 1", beam_prompts="1 <= x")
    beta: float = 1.0
    """how strongly the KL to the reference is held (ours, for the tiny model; paper: as DPO, 0.1, unconfirmed)"""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """of the margin beta z"""
    label_smoothing: float = 0.0
    """share of the pairs whose label is taken to be wrong (conservative DPO)"""
    beams: str = "1,2,3,5,10"
    """widths of the beam search after training, with commas (paper: 1 to about 10, unconfirmed); "": no search"""
    beam_prompts: int = 256
    """held-out prompts that are searched, at most (paper: 256, unconfirmed)"""
    length_penalty: float = 0.0
    """p: finished beams are ranked by their log-prob over length^p; 0: by the log-prob itself (our reading of the paper)"""


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


# ---------------------------------------------------------------- what the policy knows about tokens


@torch.no_grad()
def token_advantages(logp, ref_logp, mask, args):
    """[B, T] each -> c [B, T], the implicit reward of every token: r + V*(next prefix) - V*(prefix), up to what is learnt."""
    return args.beta * (logp - ref_logp).masked_fill(~mask, 0.0)


def alignment(c, worth, rejected):
    """Of N tokens: c [N], true worth [N], whether the response is a rejected one [N] -> Pearson's correlation of c with the
    worth, and the AUC of -c for the tokens of negative worth inside rejected responses, ties half. None: not defined."""
    c, worth = c.double(), worth.double()
    pearson = torch.corrcoef(torch.stack([c, worth]))[0, 1].item()
    wrong, other = c[rejected & (worth < 0)], c[rejected & (worth >= 0)].sort().values
    below, upto = (torch.searchsorted(other, wrong, right=right).double() for right in (False, True))
    auc = (1 - (below + upto) / 2 / max(1, len(other))).mean().item()
    return dict(correlation=pearson if pearson == pearson else None, wrong_token_auc=auc if len(wrong) and len(other) else None)


def measure_credit(run, data, tokenizer, policy, reference):
    """The advantages of all tokens of the held-out pairs, beside their true worth where that is known -> credit.json."""
    import json

    from common import pairs

    args, held_out = run.args, data.test[: run.args.eval_prompts]
    rows = [(p.prompt, y) for p in held_out for y in (p.chosen, p.rejected)]
    both = zip(pairs.logp_of(policy, rows, args), pairs.logp_of(reference, rows, args))
    credit = [token_advantages(a, b, torch.ones_like(a).bool(), args) for a, b in both]
    gold = [torch.tensor(w) for p in held_out for w in p.gold or ()]
    known = {}
    if len(gold) == len(credit):
        rejected = [torch.full(c.shape, i % 2 == 1) for i, c in enumerate(credit)]
        known = alignment(torch.cat(credit), torch.cat(gold), torch.cat(rejected))
    if not run.main:
        return
    table = []
    for i, (_, y) in enumerate(rows[:32]):  # a heat map's numbers
        row = dict(prompt=held_out[i // 2].text, response=("chosen", "rejected")[i % 2])
        row |= dict(tokens=[tokenizer.decode([token]) for token in y], c=credit[i].tolist())
        table.append(row | (dict(worth=gold[i].tolist()) if known else {}))
    (run.dir / "credit.json").write_text(json.dumps(dict(known, responses=table)))
    for row in table[:2]:
        shown = " ".join(f"{token!r} {c:+.2f}" for token, c in zip(row["tokens"][:12], row["c"]))
        run.bar.write(f"  credit, {row['response']}: {shown}")
    said = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in known.items() if v is not None]
    run.bar.write("  credit: " + ", ".join([*said, "see credit.json"]))


def beam_widths(beams):
    """Text of --beams -> [width]. Raises UserError."""
    from common import UserError

    widths = beams.split(",") if beams else []
    if not all(w.isdecimal() and int(w) for w in widths):
        raise UserError(f"--beams: widths of at least 1 with commas, like 1,2,5; is {beams!r}")
    return [int(w) for w in widths]


def beam_search(decoder, width, end, max_new_tokens, length_penalty=0.0):
    """For each prompt its best `width` responses found, best first: (score, sum of log-probs, token ids), with score =
    sum / length^length_penalty. decoder: an engines.Decoder that has read the prompts, one row each. The token that ends a
    response, one in `end`, is scored like any other, and must be among the `width` best of its step; at max_new_tokens a
    response is cut and counts as finished. Stops early where `width` finished ones cannot be beaten any more."""
    prompts, device = range(len(decoder.logits)), decoder.logits.device
    beams = [[(0.0, [], None)] for _ in prompts]  # open: (sum, token ids, row of the prefix that is one token shorter)
    finished = [[] for _ in prompts]
    for length in range(1, max_new_tokens + 1):
        rows = [(i, *beam) for i in prompts for beam in beams[i]]
        if not rows:
            break
        if length > 1:
            decoder.keep(torch.tensor([parent for *_, parent in rows], device=device))
            decoder.feed(torch.tensor([ids[-1] for _, _, ids, _ in rows], device=device))
        logp = decoder.logits.to(torch.promote_types(decoder.logits.dtype, torch.float32)).log_softmax(-1)
        best = logp.topk(min(logp.shape[1], width + len(end)))  # enough for `width` that go on, whatever ends
        candidates = [[] for _ in prompts]
        for n, ((i, total, ids, _), *two) in enumerate(zip(rows, best.values.tolist(), best.indices.tolist())):
            candidates[i] += [(total + v, ids + [token], n) for v, token in zip(*two) if v > -float("inf")]
        for i, some in enumerate(candidates):
            some.sort(key=lambda c: -c[0])
            ended = [c for c in some[:width] if c[1][-1] in end or length == max_new_tokens]
            finished[i] += [(total / length**length_penalty, total, ids) for total, ids, _ in ended]
            finished[i] = sorted(finished[i], key=lambda f: -f[0])[:width]
            beams[i] = [c for c in some if c[1][-1] not in end][:width]
            # Log-probs are at most 0: an open prefix can at best keep its sum, and grow to the full length.
            if len(finished[i]) == width and beams[i]:
                if finished[i][-1][0] >= beams[i][0][0] / max_new_tokens**length_penalty:
                    beams[i] = []
    return finished


@torch.no_grad()
def measure_beams(run, widths, data, tokenizer, engine, policy):
    """What wider beams find by the log-probs of the policy, and by those of the reference -> beams.json."""
    import json

    from common import engines, gpu, models
    from common.policy import head_rows

    args = run.args
    prompts = list({p.text: p for p in data.test}.values())[: args.beam_prompts]
    mine = prompts[gpu.rank() :: gpu.world()]

    def search(name, lm, width):
        some, best = max(1, min(1024, head_rows(lm.config.vocab_size)) // width), []  # some prompts at a time
        for i in range(0, len(mine), some):
            ids, end = [p.prompt for p in mine[i : i + some]], models.end_tokens(lm, tokenizer)
            out = beam_search(engines.Decoder(lm, ids), width, end, args.max_new_tokens, args.length_penalty)
            best += [responses[0] for responses in out]
        values = dict(logp=[logp for _, logp, _ in best], length=[len(ids) for *_, ids in best])
        if data.reward:
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for *_, ids in best]
            values["gold_reward"] = [data.reward(p.text, text) for p, text in zip(mine, texts)]
        means = {k: gpu.total(sum(v)) / len(prompts) for k, v in values.items()}
        if run.main:
            said = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in means.items())
            run.bar.write(f"  {name}, width {width}: {said}")
        return means

    if gpu.world() == 1:
        engine = engines.HF(policy, tokenizer)  # the policy itself, whoever samples for the evaluation
    if widths and engine.name == "hf":
        with engine.whole() as lm:
            found = dict(policy={width: search("policy", lm, width) for width in widths})
        lm = models.load(args, gpu.device(), trainable=False).lm.to(gpu.device())
        found["reference"] = {width: search("reference", lm, width) for width in widths}
        if run.main:
            (run.dir / "beams.json").write_text(json.dumps(dict(prompts=len(prompts), **found), indent=1))
    elif widths and run.main:
        run.bar.write("  note: no beam search: under torchrun it needs the whole copy of the policy that --engine hf has")


def measure(run, widths, data, tokenizer, engine, policy, reference):
    """After the training: what the policy knows about tokens, without any more of it. reference() -> the frozen start."""
    measure_credit(run, data, tokenizer, policy, reference())
    measure_beams(run, widths, data, tokenizer, engine, policy)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, judge, models, pairs, runlog, settings
    from common.batch import Meter

    args, config, device = settings.prepare(__file__, args)
    widths = beam_widths(args.beams)
    tokenizer = models.load_tokenizer(args)
    data = pairs.load(args, config, tokenizer)
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
            losses, stats = pair_loss(logp, ref_logp, mb.mask, args)
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

    if run.after:
        measure(run, widths, data, tokenizer, engine, policy, lambda: reference or frozen())
    run.finish(judge.sentence(run))
    engine.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
