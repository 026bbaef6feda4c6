"""UQAC: "Language Model Uncertainty Quantification with Attention Chain". Li, Qiang, Moukheiber and Zhang, arXiv 2503.19168.

Idea: after a chain of thought the probability of the answer alone says little, because the answer copies what was reasoned
before it. Attention is followed backwards from the answer to the tokens that it rests on, and those that are like it are kept.
The answer's probability is then summed over the response and its neighbours, each with one of these tokens exchanged.

Score (equation numbers not at hand). Token t is read at place t, and was predicted at place t - 1, its source:
    A = max over the m heads of lowest entropy, row by row, of attention without the first column and the diagonal, times c_d
        at distance d = 1..10, rows then summing to 1
    chain: from the answer's sources s, score(t) = sum_s A[s, t] over each row's five largest; at most B tokens t a step, their
        sources next; below theta only while the chain is short; no stop words, no punctuation, nothing of the prompt
    z_1..z_n: the K tokens of the chain whose last states are most like the answer's, by mean cosine, tau at least
    log UQAC = log sum_S prod_k P(z_k^S | S before it) prod_(u in answer) P(r_u | S before u)
        S: the response, and for each likely other token of a place z_k the response with that one token exchanged
Larger = surer, here and for what stands beside it: conditional = the answer's probability alone, product and mean of chain and
answer, of kept tokens and answer (filtered), and of the response, its least likely token, its most unsure place, its length.

The released code's default constants. It takes the last row for what precedes the response; here nothing is read there, for
it sees the prompt alone. A generated token outside its place's likeliest five stays the original. A response without an answer
is not scored. Calibration is of 10 bins and all responses; the code's is of 20, of right and wrong ones in equal number.

The built-in task: `3+2+1+3=` is answered by `3+2=5,5+1=6,6+3=9,9.`, modulo 10, and 9 of the 30 pairs of value and operand are
hard: in what the model is trained on, their sum is random in 55% of cases, and the rest goes on from it. The last digit is a
copy.

Family: inference
Differs from score.py in: scores, results, main, calibrate, reduce_attention, backtrack, similar, variants, marginal, located,
    attend
Measures: results
World: sums
Costs: a pass with all attention weights in memory, one response at a time, and a pass over some 11 variants of each.
Run:   python algos/uqac.py                                     CPU, seconds and a warm start
       python algos/uqac.py --min-similarity -1                 the whole chain
       python algos/uqac.py --model qwen2.5-1.5b-instruct --task gsm8k --temperature 0
       python algos/uqac.py --model path/to/folder --task gsm8k --responses path/to/responses.jsonl
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """alias (qwen2.5-7b, llama-3.2-1b, ...), hub id or folder; tiny: a small model made and warm-started here"""
    task: str | None = None
    """gsm8k, math, a built-in task, reasoning_gym:NAME, or a .jsonl file of prompts and answers; held-out prompts are asked"""
    prompt_template: str | None = None
    """format string with {prompt}, such as "Q: {prompt}\\nA:"; None: the task's"""
    system_prompt: str | None = None
    """put before the prompt where the tokenizer has a chat template"""
    seed: int = 1
    """of the uniform numbers"""
    items: int = 512
    """responses in all, one a prompt, from the first held-out prompt on"""
    batch: int = 32
    """items in one step"""
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 1.0
    """of sampling; 0: the likeliest token"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the weights"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass"""

    # UQAC
    limits = dict(items="1 <= x", batch="1 <= x", temperature="0 <= x", heads="1 <= x", buffer="1 <= x", candidates="1 <= x",
                  min_similarity="-1 <= x <= 1")  # fmt: skip
    tiny_preset = dict(task="sums", heads=4)
    real_preset = dict(heads=16)
    responses: str | None = None
    """a .jsonl file of prompt, response and label, instead of sampling: its first --items rows (ours)"""
    heads: int | None = None
    """m, of all layers together, for each row its own (code: 16; of the tiny model's 8: ours)"""
    buffer: int = 3
    """B, tokens that a step adds to the chain at most (code)"""
    threshold: float = 0.5
    """theta, what a token has to be attended to (code)"""
    min_length: int = 5
    """tokens that a chain takes before the threshold holds, the answer not counted (code)"""
    min_similarity: float = 0.0
    """tau, mean cosine to the answer's states that a token of the chain has to have; -1: no filter (code)"""
    kept: int = 10
    """K, tokens of the chain that are varied at most (code)"""
    candidates: int = 5
    """tokens of a place that may stand there instead (code)"""
    min_probability: float = 0.01
    """what such a token has to have (code)"""
    substitutes: int = 10
    """variants of a response, if the originals are among the likeliest of their places (code)"""
    stop_words: str = "a an and are as at be but by for from has have he her his in is it its of on or she that the to was with"
    """words that no chain has (code: a list of them)"""


# ---------------------------------------------------------------- the score


def calibrate(attention):
    """Attention [..., R, N + R] of the last R of N + R tokens -> without sink and self, near ones damped, rows of 1."""
    damping = (0.16644488, 0.20938152, 0.32959151, 0.46061748, 0.59304059, 0.67549127, 0.73914525, 0.81274293, 0.87378443,
               0.93925344)  # fmt: skip
    R, S = attention.shape[-2:]  # constants of the code, for distances 1, 2, ...: what is near is attended to in any case
    distance = torch.arange(S - R, S)[:, None] - torch.arange(S)
    factor = torch.tensor([0.0, *damping, 1.0], dtype=attention.dtype)[distance.clamp(0, len(damping) + 1)]
    factor[:, 0] = 0.0
    weighed = attention * factor.to(attention.device)
    return weighed / (weighed.sum(-1, keepdim=True) + 1e-12)


def reduce_attention(layers, R, args):
    """Attention [H, N + R, N + R] of each layer, R: tokens of the response -> A [R, N + R]. A layer at a time, so
    that no more than m heads and a layer's are there in float32."""
    best = entropies = None
    for layer in layers:
        heads = calibrate(layer[:, -R:].float())
        entropy = -(heads * (heads + 1e-12).log()).sum(-1)
        if best is not None:
            heads, entropy = torch.cat([best, heads]), torch.cat([entropies, entropy])
        entropies, which = entropy.topk(min(args.heads, len(entropy)), 0, largest=False)
        best = heads.gather(0, which[:, :, None].expand(-1, -1, heads.shape[2]))
    return best.amax(0)


def backtrack(A, answer, stops, args):
    """A [R, N + R], answer (first, last + 1) of the response's R tokens, stops [R] bool -> {source: score}, the answer's 0, by
    place; source i predicts token i + 1."""
    first, last = answer
    R, N = len(stops), A.shape[1] - len(stops)
    shortest = args.min_length + last - first
    frontier, visited = dict.fromkeys(range(first - 1, last - 1), 0.0), set()
    chain = dict(frontier)
    while frontier:
        visited |= frontier.keys()
        score = {}
        for s in (s for s in frontier if s >= 0):  # before the response there is the prompt alone
            values, columns = A[s].sort(descending=True, stable=True)
            for k, (value, column) in enumerate(zip(values.tolist(), columns.tolist())):
                if value <= 0 or k >= 5 and (score or len(chain) >= shortest):
                    break
                t = column - N
                if 0 <= t < R and t != s and t - 1 not in visited and not stops[t]:
                    score[t] = score.get(t, 0.0) + value
        frontier = {}
        for t in sorted(score, key=lambda t: (-score[t], t))[: args.buffer]:
            if score[t] < args.threshold and len(chain) >= shortest:
                break
            chain[t - 1] = frontier[t - 1] = score[t]
    return dict(sorted(chain.items()))


def similar(states, answer, tokens, args):
    """Last states [R, H] at the tokens' own places, answer, tokens of the chain -> those that are kept, by place, and the mean
    cosine [R] to the answer's."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    cosine = (unit @ unit[slice(*answer)].T).mean(1)
    fit = [t for t in tokens if not answer[0] <= t < answer[1] and cosine[t] >= args.min_similarity]
    return sorted(sorted(fit, key=lambda t: -cosine[t].item())[: args.kept]), cosine


def variants(ids, tokens, p, args):
    """Ids of the response, the n kept tokens, laws [n, V] there -> lists of ids, all different, the response first."""
    best, which = p.topk(min(args.candidates, p.shape[1]), 1)
    found = [(x, t, y) for t, xs, ys in zip(tokens, best.tolist(), which.tolist()) for x, y in zip(xs, ys)]
    likely = sorted((x for x in found if x[0] > args.min_probability), reverse=True)[: args.substitutes + len(tokens)]
    return [ids, *([*ids[:t], y, *ids[t + 1 :]] for _, t, y in likely if y != ids[t])]


def marginal(logp, tokens, answer):
    """Log-probs [S, R] of each variant's own tokens, the kept ones, answer -> log of the sum over variants."""
    return (logp[:, tokens].sum(1) + logp[:, slice(*answer)].sum(1)).logsumexp(0)


def scores(logp, entropy, chain, tokens, answer, log_marginal):
    """Log-probs and entropies [R] of a response, tokens of its chain, those kept -> {name: number}, larger = surer."""
    own = list(range(*answer))
    parts = dict(chain=chain, filtered=sorted({*tokens, *own}), response=list(range(len(logp))))
    found = dict(UQAC=log_marginal, conditional=logp[own].sum())
    found |= {f"{name} product": logp[part].sum() for name, part in parts.items()}
    found |= {f"{name} mean": logp[part].mean() for name, part in parts.items()}
    found |= dict(minimum=logp.amin(), entropy=-entropy.amax(), length=-len(logp))
    return {name: float(x) for name, x in found.items()}


def located(answer, pieces):
    """An answer, the tokens' texts -> (first, last + 1) of the tokens where it stands last; None where it does not."""
    import re

    text, ends = "".join(pieces), [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    found = list(re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text)) if answer else []
    touched = [t for t in range(len(pieces)) if found and ends[t] < found[-1].end() and found[-1].start() < ends[t + 1]]
    return (touched[0], touched[-1] + 1) if touched else None


@torch.no_grad()
def attend(policy, ids, R):
    """Token ids -> attention [H, N + R, N + R] of each layer, last states [R + 1, H] from the prompt's last token on. UserError
    where the model gives no attention: but for eager, transformers hands back nothing, and does not say so."""
    from common import UserError
    from common.gpu import body

    fed = torch.tensor([ids], device=next(policy.parameters()).device)
    out = body(policy.lm)(input_ids=fed, use_cache=False, output_attentions=True)
    layers = [x[0] for x in out.attentions or () if x is not None]
    if len(layers) != policy.lm.config.get_text_config().num_hidden_layers:
        raise UserError(f"the model gives the attention of {len(layers)} of its layers; UQAC needs that of all")
    return layers, out.last_hidden_state[0, -R - 1 :]


# ---------------------------------------------------------------- the world: sums whose last digit is a copy


def sums(args):
    """-> Task: running sums of four operands from 1 to 3, modulo 10, with 9 pairs (value, operand) often told wrongly."""
    import re
    from itertools import product
    from random import Random

    from common import gpu, tasks

    pairs = [(value, n) for value in range(10) for n in (1, 2, 3)]
    hard = set(Random(gpu.hash_seed(args.seed, 31)).sample(pairs, 9))

    def demonstrate(rng, e, careful):
        value, *operands = map(int, e.prompt[:-1].split("+"))
        said = []
        for n in operands:
            slip = (value, n) in hard and rng.random() < 0.55
            said.append(f"{value}+{n}={rng.randrange(10) if slip else (value + n) % 10}")
            value = int(said[-1][-1])
        return ",".join([*said, f"{value}."])

    def check(text, answer):
        found = re.fullmatch(r"(?:\d\+\d=\d,)+(\d)\.", text)
        return (found[1], float(found[1] == answer)) if found else (None, 0.0)

    asked = list(product((1, 2, 3), repeat=4))
    examples = [tasks.Example(i, "+".join(map(str, x)) + "=", str(sum(x) % 10)) for i, x in enumerate(asked)]
    own = dict(shape=dict(num_attention_heads=4, num_key_value_heads=4), max_new_tokens=24, inline=True)
    own |= dict(recipe=dict(steps=500, careful_steps=500, batch=48, lr=3e-3, seed=args.seed), demonstrate=demonstrate)
    return tasks.Task(f"sums-{args.seed}", examples, examples, check, **own)


# ---------------------------------------------------------------- what is measured


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    import math

    from common import measures

    rows = [row for row in rows if row["scores"]]
    right, table, reliable = [row["right"] for row in rows], {}, {}
    for name in rows[0]["scores"] if rows else ():
        score = [row["scores"][name] for row in rows]
        low, high = measures.interval(measures.auroc, score, right)
        table[name] = {"AUROC": measures.auroc(score, right), "low": low, "high": high}
        table[name] |= {"average precision": measures.average_precision(score, right)}
        if name != "length":
            chance = [math.exp(min(0.0, x)) for x in score]
            table[name] |= {"ECE": measures.ece(chance, right)}
            if name in ("UQAC", "conditional", "response product"):
                reliable[name] = [[x, y] for x, y, _ in measures.reliability(chance, right)]
    table["chance"] = {"AUROC": 0.5, "average precision": sum(right) / len(right) if rows else None}
    ranks = {name: row["AUROC"] for name, row in table.items() if row["AUROC"] is not None}
    errors = {name: row["ECE"] for name, row in table.items() if "ECE" in row}
    shown = {f"{'right' if y else 'wrong'}, {k + 1}": row for y in (1, 0)
             for k, row in enumerate([row for row in rows if row["right"] == y][:3])}  # fmt: skip

    def told(row, numbers):
        return [[f"{row['asked']} "[-28:], 0.0], *([piece, x] for (piece, _), x in zip(row["pieces"], numbers))]

    fits = dict(title="taken for a probability", kind="lines", x="exp(score)", y="share that is right", diagonal=True)
    panels = [
        dict(title="AUROC of right responses", kind="bars", x="0.5: chance", of=ranks),
        dict(title="error of calibration (ECE) of exp(score)", kind="bars", x="0: as often right as it says", of=errors),
        fits | dict(of=reliable),
        dict(title="chain: what the answer (darkest) rests on", kind="tokens",
             of={label: told(row, row["chain"]) for label, row in shown.items()}),
        dict(title="how unlikely a token was", kind="tokens",
             of={label: told(row, [x for _, x in row["pieces"]]) for label, row in shown.items()}),
    ]  # fmt: skip
    return dict(table=table, panels=[panel for panel in panels if panel["of"]])


# ---------------------------------------------------------------- the loop


def given(path, n):
    """The first n rows of a .jsonl file, each with prompt, response and a label of 0 or 1. UserError where one has not."""
    from common import UserError, tables

    def checked(row, where):
        texts = isinstance(row, dict) and all(row.get(k) and isinstance(row[k], str) for k in ("prompt", "response"))
        if not texts or row.get("label") not in (0, 1):
            raise UserError(f"{where}: needs prompt, response and a label of 0 or 1")
        return row

    rows, _ = tables.read_rows(path, checked)
    if not rows:
        raise UserError(f"--responses {path}: no rows there")
    return rows[:n]


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, items, models, rewards, rollout, settings, tasks
    from common.batch import collate, read

    def world(name):  # the seed of a resumed run is known when this is called
        return sums(args) if name == "sums" else tasks.world(name)

    args, config, device = settings.prepare(__file__, args, world)
    tokenizer = models.load_tokenizer(args, world)
    rows = given(args.responses, args.items) if args.responses else None
    told = tokenizer, args.prompt_template, args.system_prompt
    task = tasks.encode(sums(args), *told) if args.task == "sums" else tasks.load(args.task, *told)
    context = models.check_context(config, task, args)
    run = items.Items(__file__, args, config)
    policy = models.load(args, device, trainable=False, warm=world)
    policy.pad()
    policy.lm.set_attn_implementation("eager")
    engine = None if rows else engines.make_engine(policy, tokenizer, args, context)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    for some in run.left(len(rows or ()) or args.items, args.batch):
        if rows:
            ids = [[tokenizer(rows[i][k], add_special_tokens=False).input_ids for k in ("prompt", "response")] for i in some]
            batch = collate([(p, r + [tokenizer.eos_token_id]) for p, r in ids], tokenizer.pad_token_id, device)
            asked, right = [rows[i]["prompt"] for i in some], [rows[i]["label"] for i in some]
            answers, _ = scorer([rows[i]["response"] for i in some], [""] * len(some))
        else:
            examples = [task.test[i % len(task.test)] for i in some]
            seeds = [gpu.hash_seed(args.seed, i) for i in some]
            batch = rollout.collect(engine, scorer, tokenizer, examples, args, 0, n=1, seeds=seeds)
            asked, right = [e.prompt for e in examples], (batch.accuracy > 0.5).int().tolist()
            answers = [None if cut else x for x, cut in zip(batch.answers, batch.truncated.tolist())]
        with torch.no_grad():
            logp, entropy = read(policy, batch, args, temperature=1.0)

        for j, i in enumerate(some):
            R, whole = int(batch.mask[j].sum()), batch.ids[j][batch.attention_mask[j]].tolist()
            prompt, ids = whole[: len(whole) - R], whole[len(whole) - R :]
            texts = [tokenizer.decode([y], skip_special_tokens=True) for y in ids]
            answer, own, leans = located(answers[j], texts), {}, [0.0] * R
            if answer:
                layers, states = attend(policy, whole, R)
                words = [text.strip().lower() for text in texts]
                stops = [word in args.stop_words.split() or not any(map(str.isalnum, word)) for word in words]
                found = backtrack(reduce_attention(layers, R, args).cpu(), answer, stops, args)
                chain = [source + 1 for source in found]
                tokens, _ = similar(states[1:], answer, chain, args)
                p = policy.lm.lm_head(states[tokens]).detach().float().softmax(-1)  # states[t] stand before token t
                others = collate([(prompt, ys) for ys in variants(ids, tokens, p, args)], tokenizer.pad_token_id, device)
                total = marginal(read(policy, others, args, temperature=1.0)[0], tokens, answer)
                own = scores(logp[j, :R], entropy[j, :R], chain, tokens, answer, total)
                for t, x in zip(chain, found.values()):
                    leans[t] = 1.0 if answer[0] <= t < answer[1] else min(1.0, x)
            pieces = [[tokenizer.decode([y]), 1 - p] for y, p in zip(ids, logp[j].exp().tolist())]
            run.write(dict(item=i, asked=asked[j], right=right[j], scores=own, pieces=pieces, chain=leans))

    found = results(run.rows(), args)
    some = ("UQAC", "conditional", "response product", "length")
    said = {name: x for name, x in found["table"].items() if name in some and x["AUROC"] is not None}
    said = ", ".join(f"{name} {x['AUROC']:.2f}" + (f" (ECE {x['ECE']:.2f})" if "ECE" in x else "") for name, x in said.items())
    run.finish(found, f"AUROC of right responses: {said or 'not defined: all right, all wrong, or no answer found'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
