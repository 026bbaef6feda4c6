"""R2Q: From r to Q*: Your Language Model is Secretly a Q-Function. Rafailov, Hejna, Park, Finn, arXiv 2404.12358 (2024).

Idea: read a response as a path in a token MDP (state: the prefix, action: the next token, transitions certain). There the
optimal policy's logits are soft Q-values, so DPO's sequence loss, unchanged, has also learnt an advantage for every token. Two
things follow without any further training: log-ratios say which tokens deserve the praise (credit), and beam search on the
policy is search guided by a value function. And samples of the reference must lose likelihood, by how much is a KL.

Objective, to be minimised: that of dpo.py. What its optimum means, with V* = 0 after the last token of a response:
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

Differs from dpo.py in: token_advantages, alignment, beam_search, decoder, train
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
    """AdamW's rate, constant"""
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
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of weights and gradients"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] | None = None
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""
    lora_rank: int = 0
    """train LoRA layers of this rank instead of all weights; 0: all weights"""
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass of the trainer; a prompt that its completions share counts once"""

    # R2Q
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


def beam_search(next_logp, prompts, width, end, max_new_tokens, length_penalty=0.0):
    """For each prompt (token ids) its best `width` responses found, best first: (score, sum of log-probs, token ids), with
    score = sum / length^length_penalty. next_logp(prefixes [n], parents [n]) -> [n, V] gives the log-probs of the next token; a
    parent is the row in the call before of the prefix that is one token shorter (None: there was none). The token that ends a
    response, one in `end`, is scored like any other, and must be among the `width` best of its step; at max_new_tokens a
    response is cut and counts as finished. Stops early where `width` finished ones cannot be beaten any more."""
    beams = [[(0.0, [], None)] for _ in prompts]  # open: (sum, token ids, parent)
    finished = [[] for _ in prompts]
    for length in range(1, max_new_tokens + 1):
        rows = [(i, *beam) for i, some in enumerate(beams) for beam in some]
        if not rows:
            break
        logp = next_logp([prompts[i] + ids for i, _, ids, _ in rows], [parent for *_, parent in rows])
        best = logp.topk(min(logp.shape[1], width + len(end)))  # enough for `width` that go on, whatever ends
        candidates = [[] for _ in prompts]
        for n, ((i, total, ids, _), values, tokens) in enumerate(zip(rows, best.values.tolist(), best.indices.tolist())):
            candidates[i] += [(total + v, ids + [token], n) for v, token in zip(values, tokens) if v > -float("inf")]
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


def decoder(lm):
    """A causal language model of transformers -> next_logp for beam_search. Prompts are padded on the left; keys and values
    of the prefixes are kept and follow them, so that every call but the first reads one token per prefix."""
    cache = None

    @torch.no_grad()
    def next_logp(prefixes, parents):
        nonlocal cache
        if parents[0] is None:
            cache, width = None, max(map(len, prefixes))
            ids = [[0] * (width - len(p)) + p for p in prefixes]
        else:
            cache.reorder_cache(torch.tensor(parents, device=lm.device))
            ids, width = [p[-1:] for p in prefixes], cache.get_seq_length() + 1
        ids, lengths = torch.tensor(ids, device=lm.device), torch.tensor([[len(p)] for p in prefixes], device=lm.device)
        attention = torch.arange(width, device=lm.device) >= width - lengths
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = lm(input_ids=ids, attention_mask=attention.long(), position_ids=positions, past_key_values=cache, use_cache=True,
                 logits_to_keep=1)  # fmt: skip
        cache, logits = out.past_key_values, out.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    return next_logp


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import json

    from common import UserError, gpu, judge, models, preferences, rollout, runlog

    args, config, device = runlog.prepare(__file__, args)
    widths = args.beams.split(",") if args.beams else []
    sound = all(w.isdecimal() and int(w) for w in widths)
    if not sound or args.beam_prompts < 1 or not 0 <= args.length_penalty < float("inf"):
        raise UserError("--beams: widths of at least 1 with commas; --beam-prompts: at least 1; --length-penalty: at least 0")
    tokenizer = models.load_tokenizer(args)
    data = preferences.load(args, config, tokenizer)
    context = preferences.context(data, args)
    run = runlog.Run(__file__, args, config, tokenizer, context)
    policy = gpu.shard(models.load(args, device))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = rollout.make_engine(policy, tokenizer, args, context)
    engine.sleep()

    # The reference is the start: all its log-probs now, or the model itself beside the policy.
    def frozen():
        return gpu.shard(models.load(args, device, trainable=False))

    reference = frozen() if args.ref == "live" else None
    if args.ref == "cached":
        data.columns["ref_logp"] = preferences.cached(run, "reference", frozen, data)
    if "before" not in run.state:
        run.state["before"] = judge.evaluate(engine, policy, reference or frozen(), data, tokenizer, run)

    while run.state["step"] < args.steps:
        step = run.state["step"]
        run.start_step()

        # Update: one pass over the step's pairs, of which every process has its share.
        pairs = gpu.local(data.order(step * args.pairs_per_step, args.pairs_per_step, args.seed))
        meter, loss, tokens = runlog.Meter(), 0.0, 0
        for mb in preferences.micro_batches(pairs, data, args):
            logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask)
            ref_logp = preferences.logp_now(reference, mb) if reference else mb.columns["ref_logp"]
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

        run.state["step"] = step + 1
        run.write(meter.result(), int(gpu.total(tokens)), judge.SHOWN)
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            engine.sync()
            judge.evaluate(engine, policy, reference or frozen(), data, tokenizer, run)
        if args.checkpoint_every and (step + 1) % args.checkpoint_every == 0:
            run.save(policy, optimizer)
        if run.stopping(policy, optimizer):
            break
    else:
        engine.sync()
        after = judge.evaluate(engine, policy, reference or frozen(), data, tokenizer, run)
        run.save(policy, optimizer)

        # Credit: the advantages of all tokens of the held-out pairs, beside their true worth where that is known.
        pairs = data.test[: args.eval_prompts]
        rows = [(p.prompt, y) for p in pairs for y in (p.chosen, p.rejected)]
        both = zip(*(preferences.logp_of(model, rows, args) for model in (policy, reference or frozen())))
        credit = [token_advantages(a, b, torch.ones_like(a).bool(), args) for a, b in both]
        gold = [torch.tensor(w) for p in pairs for w in p.gold or ()]
        known = {}
        if len(gold) == len(credit):
            rejected = [torch.full(c.shape, i % 2 == 1) for i, c in enumerate(credit)]
            known = alignment(torch.cat(credit), torch.cat(gold), torch.cat(rejected))
        table = []
        for i, (_, y) in enumerate(rows[:32]):  # a heat map's numbers
            tokens = [tokenizer.decode([token]) for token in y]
            table.append(dict(prompt=pairs[i // 2].text, response=("chosen", "rejected")[i % 2], tokens=tokens))
            table[i] |= dict(c=credit[i].tolist()) | (dict(worth=gold[i].tolist()) if known else {})
        if run.main:
            (run.dir / "credit.json").write_text(json.dumps(dict(known, responses=table)))
            for row in table[:2]:
                shown = " ".join(f"{token!r} {c:+.2f}" for token, c in zip(row["tokens"][:12], row["c"]))
                run.bar.write(f"  credit, {row['response']}: {shown}")
            said = [f"{k.replace('_', ' ')} {v:.3f}" for k, v in known.items() if v is not None]
            run.bar.write("  credit: " + ", ".join([*said, "see credit.json"]))

        # Search: what wider beams find by the log-probs of the policy, and by those of the reference.
        whole = policy.lm if gpu.world() == 1 else getattr(engine, "lm", None)
        if widths and whole is None and run.main:
            run.bar.write("  note: no beam search: under torchrun it needs the whole copy of the policy that --engine hf has")
        prompts, found = list({p.text: p for p in data.test}.values())[: args.beam_prompts], {}
        mine = prompts[gpu.rank() :: gpu.world()]
        for name in ("policy", "reference") if widths and whole is not None else ():
            lm = (whole if name == "policy" else models.load(args, device, trainable=False).lm.to(device)).eval()
            for width in map(int, widths):
                some, best = max(1, min(1024, models.head_rows(config.vocab_size)) // width), []  # some prompts at a time
                for i in range(0, len(mine), some):
                    ids, end = [p.prompt for p in mine[i : i + some]], models.end_tokens(lm, tokenizer)
                    with gpu.no_checkpointing(lm):
                        out = beam_search(decoder(lm), ids, width, end, args.max_new_tokens, args.length_penalty)
                    best += [responses[0] for responses in out]
                values = dict(logp=[logp for _, logp, _ in best], length=[len(ids) for *_, ids in best])
                if data.reward:
                    texts = [tokenizer.decode(ids, skip_special_tokens=True) for *_, ids in best]
                    values["gold_reward"] = [data.reward(p.text, text) for p, text in zip(mine, texts)]
                means = {k: gpu.total(sum(v)) / len(prompts) for k, v in values.items()}
                found.setdefault(name, {})[width] = means
                if run.main:
                    said = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in means.items())
                    run.bar.write(f"  {name}, width {width}: {said}")
        if found and run.main:
            (run.dir / "beams.json").write_text(json.dumps(dict(prompts=len(prompts), **found), indent=1))
        run.end(judge.sentence(run.state["before"], after))
    engine.close()
    gpu.finish()


if __name__ == "__main__":
    import tyro

    train(tyro.cli(Args))
