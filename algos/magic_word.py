"""Magic words: "What's the Magic Word? A Control Theory of LLM Prompting". Aman Bhargava, Cameron Witkowski, Shi-Zhuo Looi and
Matt Thomson, arXiv 2310.04444.

Idea: a frozen language model is a system to be steered: of a text that is given, which next tokens can a few tokens put before
it bring about? A next token is reachable within k tokens if some prompt of so many makes it the likeliest, and the share
of targets that are not is a curve over k. In a large model a search looks for prompts, and what it does not find may still
exist; a model of 14 characters can be asked with every prompt of up to three, so that searches meet the exact curve.

Rule (equation numbers not at hand), with the state x_0, a prompt u before it, the next token y, temperature 0:
    R^k(x_0) = {y: some u with |u| <= k has y = arg max_v p(v | u, x_0)};   of equally likely tokens the lowest id is it
    epsilon(k) = the share of the pairs (x_0, y) with y not in R^k(x_0);   a search gives an upper bound of it
    search, minimising -log p(y | u, x_0), until y is the arg max; k = 0 first
      greedy, k = 1, 2, 3: u <- [v, u] with the best token v; what was put stays
      GCG, k = 4, 6, 8, 10: random tokens with the last prompt at their right end; an iteration's candidates have one token
      changed, the place drawn, the token drawn from the --top-k where the loss has the least slope in a one-hot place; the
      best candidate is the next prompt, also where it is worse than the last
Theorem, one head without a mask over [U; X_0] (k and m rows, norms of M_u and M_x at most; s_q, s_k, s_v: the maps' norms):
row i of the X_0 block's output has a part orthogonal to the same output without U. It cannot be longer than
    k gamma_i,   gamma_i = e^alpha / g_i s_v M_u,   alpha = s_q s_k M_u M_x / sqrt(d),
    g_i = sum_j e^(x_i W_q W_k' x_j / sqrt(d))
    and, by the same argument (ours), s_v M_u k e^alpha / (g_i + k e^alpha)
It is tried on the first head of the model's first layer, with a column of ones in X for its biases, without its rotary
positions; where the model has no head of that form it is not defined.

epsilon, loss and rank: the smaller, the easier a target. Three kinds of target, as in the paper: the text's true next token,
one that the model ranks high, and a uniformly random one (there of all tokens, here of those of --control). Ours are the
exact set, GCG from k = 1 on, the plain arm, and the control model: the same shape with random weights, of variance 1 / fan-in
and with a head of its own, since at the initialisation that training starts from the last token is repeated whatever
stands before it. Left out: targets of several tokens.

Family: audit
Stand-alone: nothing is trained, and the paper compares with no other search; --policy random, the best of as many random
             prompts of every length, is the plain arm.
World: words, state_of
Measures: head, random_weights, beyond, enumerated, results, told
Costs: exact: V + V^2 + V^3 prompts for V control tokens, asked once for all targets. Greedy: V prompts a token. GCG: a gradient
       and --candidates prompts an iteration. What is sought stands first, so that no cache helps.
Run:   python algos/magic_word.py                               CPU, two minutes
       python algos/magic_word.py --policy random
       python algos/magic_word.py --keep-best --exact 2
       python algos/magic_word.py --model qwen2.5-0.5b --task path/to/file.jsonl
"""

import math
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
    """gsm8k, math, a built-in task, reasoning_gym:NAME, or a .jsonl file of prompts and answers; states are cut from them"""
    seed: int = 1
    """of the states, the targets and the searches"""
    items: int = 24
    """states in all, one a text, from the first held-out text on"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the weights"""

    # Magic words
    limits = dict(items="1 <= x", longest="1 <= x", likely="1 <= x", lengths="1 <= x", iterations="1 <= x", candidates="1 <= x",
                  top_k="1 <= x", top_tokens="1 <= x", rows="1 <= x")  # fmt: skip
    tiny_preset = dict(task="addition", control="0123456789+=: ", longest=12, likely=10, exact=3, iterations=12, candidates=16,
                       top_k=8, rows=1024)  # fmt: skip
    real_preset = dict(top_tokens=5000, longest=32, likely=75, exact=0, iterations=34, candidates=768, top_k=128, rows=256)
    policy: Literal["both", "paper", "random"] = "both"
    """who looks for prompts: the paper's searches; random prompts, the plain arm; or both"""
    control: str | None = None
    """prompts have only the tokens of these characters; None: all tokens that are not special (paper)"""
    top_tokens: int | None = None
    """so many of them, those with the lowest ids; None: all (paper)"""
    longest: int | None = None
    """tokens of a state, at most; it has a quarter of that at least (paper: 8 to 32)"""
    likely: int | None = None
    """a likely target is one of so many that the model ranks highest (paper: 75)"""
    exact: int | None = None
    """all prompts up to this length are asked, and the control model too; 0: none"""
    greedy: int = 3
    """greedy prompts up to this length (code)"""
    lengths: tuple[int, ...] = (4, 6, 8, 10)
    """of GCG's prompts, in turn (code)"""
    iterations: int | None = None
    """of GCG at each length (code: 34)"""
    candidates: int | None = None
    """prompts that an iteration asks (code: 768)"""
    top_k: int | None = None
    """tokens for each place that a candidate's may be drawn from (code: 128)"""
    keep_best: bool = False
    """GCG returns the best prompt it came by; else the last (code)"""
    bound_prompts: int = 20000
    """random prompts that the theorem is tried on, of 1 to the last of --lengths tokens, over all states; 0: none (ours)"""
    rows: int | None = None
    """prompts in one pass"""


# ---------------------------------------------------------------- the rule


def asked(logits, targets):
    """Logits [n, V], targets [n, j] -> the likeliest token [n], of equals the lowest id, and -log p of each target [n, j]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.argmax(-1), -logits.log_softmax(-1).gather(1, targets)


def prepended(prompts, controls):
    """Prompts [n, k], control tokens [V] -> every prompt behind every token [n, V, k + 1]."""
    (n, k), V = prompts.shape, len(controls)
    return torch.cat([controls.view(1, V, 1).expand(n, V, 1), prompts.view(n, 1, k).expand(n, V, k)], 2)


def reachable(read, controls, most, size):
    """-> [size]: of every token of the vocabulary the length of the shortest prompt that makes it the likeliest, most + 1 where
    none of up to `most` does. All prompts are asked. read(prompts [n, k], targets [n, j]) -> what asked() gives."""
    needed, prompts = torch.full((size,), most + 1, device=controls.device), controls.new_empty(1, 0)
    for k in range(most + 1):
        prompts = prepended(prompts, controls).flatten(0, 1) if k else prompts
        reached = read(prompts, prompts.new_empty(len(prompts), 0))[0].unique()
        needed[reached] = needed[reached].clamp(max=k)
    return needed


def least(read, candidates, targets):
    """Candidates [n, c, k], targets [n] -> of each row the prompt with the least loss [n, k], the first of equals; it [n]."""
    n, c, k = candidates.shape
    losses = read(candidates.reshape(n * c, k), targets.repeat_interleave(c)[:, None])[1].view(n, c)
    best = losses.argmin(1)
    rows = torch.arange(n, device=best.device)
    return candidates[rows, best], losses[rows, best]


def greedy_step(read, prompts, controls, targets):
    """Prompts [n, k], targets [n] -> [n, k + 1]: each with the best token before it."""
    return least(read, prepended(prompts, controls), targets)[0]


def swaps(slope, prompts, controls, uniforms, top_k):
    """d loss / d one-hot [n, k, V], uniform numbers [n, c, 2] -> candidates [n, c, k]: a place and one of its tokens each."""
    (n, k), c = prompts.shape, uniforms.shape[1]
    kept = slope.argsort(dim=-1, stable=True)[..., :top_k]
    place, rank = (uniforms[..., 0] * k).long(), (uniforms[..., 1] * kept.shape[-1]).long()
    tokens = controls[kept[torch.arange(n, device=kept.device)[:, None], place, rank]]
    return prompts[:, None].repeat(1, c, 1).scatter(2, place[..., None], tokens[..., None])


def gcg_step(read, table, prompts, controls, targets, uniforms, top_k):
    """Prompts [n, k], targets [n], uniform numbers [n, c, 2] -> the best candidates [n, k], whatever the prompt's own loss, and
    theirs [n]. table [vocabulary, H]: the embeddings, which read() takes for tokens too."""
    with torch.enable_grad():
        x = table[prompts].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(read(x, targets[:, None])[1].sum(), x)
    slope = gradient @ table[controls].T.to(gradient)
    return least(read, swaps(slope, prompts, controls, uniforms, top_k), targets)


def gcg(read, table, prompts, controls, targets, k, streams, args):
    """Prompts [n, < k] -> [n, k], by steps from random tokens with the prompts at their right end; a generator for each."""
    new = torch.stack([torch.randint(len(controls), (k - prompts.shape[1],), generator=g) for g in streams])
    uniforms = torch.stack([torch.rand(args.iterations, args.candidates, 2, generator=g) for g in streams], 1)
    prompts = torch.cat([controls[new.to(prompts.device)], prompts], 1)
    best, lowest = prompts, read(prompts, targets[:, None])[1][:, 0]
    for u in uniforms.to(prompts.device):
        prompts, loss = gcg_step(read, table, prompts, controls, targets, u, args.top_k)
        best, lowest = torch.where((loss < lowest)[:, None], prompts, best), torch.minimum(loss, lowest)
    return best if args.keep_best else prompts


def sought(read, targets, lengths, propose):
    """Targets [n], lengths of prompts -> of each target (length at which it became the likeliest or None, loss, last prompt).
    propose(k, prompts [b, < k], targets [b], which [b]) -> prompts [b, k], of the targets that are left."""
    out, left = [None] * len(targets), torch.arange(len(targets), device=targets.device)
    prompts = targets.new_empty(len(targets), 0)
    for k in (0, *lengths):
        prompts = propose(k, prompts, targets[left], left.tolist()) if k else prompts
        winner, loss = read(prompts, targets[left, None])
        hit = winner == targets[left]
        for i, done, x, u in zip(left.tolist(), hit.tolist(), loss[:, 0].tolist(), prompts.tolist()):
            out[i] = (k if done else None, x, u)
        left, prompts = left[~hit], prompts[~hit]
        if not len(left):
            break
    return out


def searches(read, table, controls, stream, args):
    """-> {arm: (lengths, propose)} for sought(); stream(...): a generator for some numbers."""

    def by_gcg(arm):
        def propose(k, prompts, targets, which):
            return gcg(read, table, prompts, controls, targets, k, [stream(arm, j, k) for j in which], args)

        return propose

    def back_off(k, prompts, targets, which):
        if k <= args.greedy:
            return greedy_step(read, prompts, controls, targets)
        return by_gcg(2)(k, prompts, targets, which)

    def at_random(k, prompts, targets, which):
        asked_in_all = (args.iterations * args.candidates, k)
        some = controls[torch.randint(len(controls), asked_in_all, generator=stream(4, k)).to(controls.device)]
        return some[read(some, targets.expand(len(some), -1))[1].argmin(0)]

    short = range(1, max(args.greedy, args.exact) + 1)
    arms = {"greedy then GCG": ((*range(1, args.greedy + 1), *args.lengths), back_off)}
    arms |= {"GCG alone": (range(1, args.exact + 1), by_gcg(3))} if args.exact else {}
    plain = {"random prompts": (sorted({*short, *args.lengths}), at_random)}
    return dict(both=arms | plain, paper=arms, random=plain)[args.policy]


# ---------------------------------------------------------------- the theorem


def attend(x, u, wq, wk, wv):
    """One head without a mask over [u; x]: x [m, d], u [n, k, d] -> the rows of x [n, m, d_v]."""
    rows = torch.cat([u, x.expand(len(u), *x.shape)], 1)
    scores = (x @ wq) @ (rows @ wk).transpose(1, 2) / wq.shape[1] ** 0.5
    return scores.softmax(-1) @ (rows @ wv)


def orthogonal(y, along):
    """y [..., d] -> the norm [...] of its part orthogonal to `along`; of all of it where that is 0."""
    unit = torch.nn.functional.normalize(along, dim=-1)
    return (y - (y * unit).sum(-1, keepdim=True) * unit).norm(dim=-1)


def attention_bound(x, k, m_u, wq, wk, wv):
    """x [m, d], k control rows of norm m_u at most -> logarithms of k gamma_i and of the tighter form, [m] each."""
    sq, sk, sv = (torch.linalg.matrix_norm(w, 2) for w in (wq, wk, wv))
    root = wq.shape[1] ** 0.5
    log_g = ((x @ wq) @ (x @ wk).T / root).logsumexp(1)
    odds = math.log(k) + sq * sk * m_u * x.norm(dim=1).max() / root - log_g
    value = (sv * m_u).log()
    return value + odds, value + torch.nn.functional.logsigmoid(odds)


# ---------------------------------------------------------------- the world: texts that are cut


def words(tokenizer, size, args):
    """-> token ids that a uniform target may be, those that a prompt may have. UserError for a character that is no token."""
    from common import UserError

    special = set(tokenizer.all_special_ids)
    allowed = [i for i in range(min(len(tokenizer), size)) if i not in special]
    if args.control is not None:
        own = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in args.control}
        bad = [c for c, ids in own.items() if len(ids) != 1 or ids[0] in special]
        if bad or not own:
            what = f"{bad[0]!r} is no token of the model" if bad else "needs a character at least"
            raise UserError(f"--control {args.control!r}: {what}")
        allowed = sorted({ids[0] for ids in own.values()})
    count = len(allowed[: args.top_tokens])
    if args.exact and count**args.exact > 10**6:
        prompts = f"{count:,} control tokens have {count**args.exact:,} prompts of {args.exact}"
        raise UserError(f"--exact {args.exact}: {prompts}; no more than a million are asked")
    return allowed, allowed[:count]


def state_of(task, tokenizer, draws, i, args):
    """-> (ids of a held-out text up to somewhere, the next one): the prompt and a careful demonstration, or the answer."""
    from common import UserError, encoding

    example = task.test[i % len(task.test)]
    turns = [example.prompt] if isinstance(example.prompt, str) else [turn["content"] for turn in example.prompt]
    behind = task.demonstrate(draws, example, 1.0) if task.demonstrate else f"\n{example.answer}"
    (ids,) = encoding.tokenize(["\n".join(turns) + behind], tokenizer, f"task {task.name}", add_special_tokens=False)
    fewest = max(1, args.longest // 4)
    if len(ids) <= fewest:
        raise UserError(f"--longest {args.longest}: a state has {fewest} tokens at least; a text of {task.name} has {len(ids)}")
    cut = draws.randint(fewest, min(args.longest, len(ids) - 1))
    return ids[:cut], ids[cut]


# ---------------------------------------------------------------- what is measured


def head(lm):
    """-> (rows(ids) [..., d + 1], what the first layer's attention reads of tokens; W_q, W_k, W_v of its first head), float64,
    the biases as the row for a column of ones; None where its form is another (no such layers, normed queries)."""
    from common import gpu

    layer = gpu.body(lm).layers[0]
    maps = [getattr(layer.self_attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if None in maps or hasattr(layer.self_attn, "q_norm") or not hasattr(layer, "input_layernorm"):
        return None

    def rows(ids):
        x = gpu.double(layer.input_layernorm(lm.get_input_embeddings()(ids)))
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)

    weights = [gpu.double(m.weight[: layer.self_attn.head_dim]) for m in maps]
    biases = [w.new_zeros(len(w)) if m.bias is None else gpu.double(m.bias[: len(w)]) for m, w in zip(maps, weights)]
    return rows, *(torch.cat([w, b[:, None]], 1).T for w, b in zip(weights, biases))


def random_weights(lm, generator):
    """A model of the same shape with a head of its own: embeddings N(0, 1), every other matrix N(0, 1 / fan-in)."""
    import copy

    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(lm.config)
    config.tie_word_embeddings = False
    made = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() == 2:
                spread = 1.0 if name.endswith("embed_tokens.weight") else weight.shape[1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return made.requires_grad_(False).eval().to(lm.device)


BINS = range(-40, 3)  # half powers of ten


def beyond(layer, state, controls, n, most, generator):
    """n random prompts of 1 to `most` control tokens before a state; for both forms of the bound how many of them have a row
    beyond it, and of |orthogonal part| / bound, the greatest of a prompt's rows, log10: the greatest, {its bin: prompts}."""
    rows, *maps = layer
    x, m_u = rows(torch.tensor(state, device=controls.device)), rows(controls).norm(dim=1).max()
    plain, found = attend(x, x[None, :0], *maps), [[], []]
    for k in range(1, min(n, most) + 1):
        drawn = torch.randint(len(controls), (len(range(k - 1, n, most)), k), generator=generator)
        length = orthogonal(attend(x, rows(controls[drawn.to(controls.device)]), *maps), plain).log()
        for ratios, bound in zip(found, attention_bound(x, k, m_u, *maps)):
            ratios.append((length - bound).amax(1) / math.log(10))
    out = {}
    for name, ratios in zip(("theorem", "tighter"), map(torch.cat, found)):
        bins = (2 * ratios).floor().clamp(BINS[0], BINS[-1]).long().tolist()
        count = {str(b): bins.count(b) for b in BINS if b in bins}
        out[name] = dict(beyond=int((ratios > 1e-9).sum()), greatest=max(ratios.max().item(), -300.0), bins=count)
    return out


def enumerated(read, controls, allowed, size, args):
    """-> (needed [size], see reachable(); for k = 0 to --exact how many tokens are reached and which share of the likely and of
    the allowed ones is not; needed of the likeliest tokens, in their order without a prompt)."""
    needed, upto = reachable(read, controls, args.exact, size), range(args.exact + 1)
    every = torch.arange(size, device=controls.device)[None]
    ranked = read(controls.new_empty(1, 0), every)[1][0].argsort(stable=True)
    out = dict(reached=[int((needed <= k).sum()) for k in upto], needed=needed[ranked[: len(controls)]].tolist())
    of = dict(likely=needed[ranked[: args.likely]], uniform=needed[allowed])
    return needed, out | {kind: [int((x > k).sum()) / len(x) for k in upto] for kind, x in of.items()}


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    kinds, bound = list(rows[0]["targets"]), rows[0]["bound"]
    steps = {"exact": range(args.exact + 1)} if args.exact else {}
    steps |= {arm: (0, *x[0]) for arm, x in searches(None, None, None, None, args).items()}
    searched, table, panels = next(arm for arm in steps if arm != "exact"), {}, []

    def panel(title, x, y, of, kind="lines"):
        panels.append(dict(title=title, kind=kind, x=x, y=y, of=of))

    def epsilon(arm, kinds):
        found = [row["targets"][kind][arm] for row in rows for kind in kinds]
        return [[k, sum(x is None or x > k for x in found) / len(found)] for k in steps[arm]]

    def exactly(model, what):
        return [[k, sum(x) / len(rows)] for k, x in enumerate(zip(*(row["exact"][model][what] for row in rows)))]

    def line(points):
        return {f"k = {k}": y for k, y in points if k <= 3 or k == args.lengths[-1]}

    for some, name in [(kinds, "all targets"), *(([kind], kind) for kind in kinds)]:
        table |= {f"epsilon, {name}: {arm}": line(epsilon(arm, some)) for arm in steps}
    panel("targets not reached, all three kinds", "k", "epsilon(k)", {arm: epsilon(arm, kinds) for arm in steps})
    panel(f"targets not reached by {searched}", "k", "epsilon(k)", {kind: epsilon(searched, [kind]) for kind in kinds})
    if args.exact:
        models = rows[0]["exact"]
        for model in models:
            table |= {f"epsilon, every {x} token, {model}: exact": line(exactly(model, x)) for x in ("likely", "uniform")}
            table |= {f"tokens reached, {model}: exact": line(exactly(model, "reached"))}
        panel("next tokens that all prompts reach", "k", "tokens", {model: exactly(model, "reached") for model in models})
        needed = [*zip(*(row["exact"]["trained"]["needed"] for row in rows))]
        ranks = {f"k = {k}": [[r, sum(x <= k for x in of) / len(of)] for r, of in enumerate(needed, 1)] for k in steps["exact"]}
        panel("reachable, by rank without a prompt", "rank", "share of states", ranks)
    for form in bound or ():
        of = [row["bound"][form] for row in rows]
        n = sum(sum(x["bins"].values()) for x in of)
        row = {"prompts": n, "beyond it": sum(x["beyond"] for x in of), "greatest log10": max(x["greatest"] for x in of)}
        table[f"orthogonal part / bound, {form}"] = row
        bound[form] = [[b / 2 + 0.25, sum(x["bins"].get(str(b), 0) for x in of) / n] for b in BINS]
    if bound:
        panel("length of the orthogonal part / its bound", "log10", "share of prompts", bound)
    shown = {}
    for kind in kinds:
        x = max((row["targets"][kind] for row in rows), key=lambda x: -1 if x[searched] is None else x[searched])
        end = [["   not found", 0]] if x[searched] is None else [["   without: ", 0], [x["before"], 0.5]]
        shown[kind] = [*([c, 0.9] for c in x["prompt"]), *([c, 0.2] for c in x["state"]), [" -> ", 0], [x["token"], 0.5], *end]
    panel(f"longest prompts by {searched} (dark), states behind them -> next token", "", "", shown, kind="tokens")
    return dict(table=table, panels=panels)


def told(found):
    """results() -> the last line of a run."""
    start = "epsilon, all targets: "
    arms = {name.removeprefix(start): row for name, row in found["table"].items() if name.startswith(start)}
    late = {arm: [*row.items()][3:] or [*row.items()][-1:] for arm, row in arms.items()}  # from k = 3 on
    said = [f"{arm} " + ", ".join(f"{y:.2f} at {k}" for k, y in some) for arm, some in late.items()]
    if bound := found["table"].get("orthogonal part / bound, tighter"):
        said.append(f"{bound['beyond it']} of {bound['prompts']:,} prompts beyond the bound")
    return "epsilon: " + "; ".join(said)


# ---------------------------------------------------------------- the loop


def reader(lm, first, state, rows):
    """-> read(prompts [n, k] or their embeddings [n, k, H], targets [n, j]) -> what asked() gives of the token behind
    [first, prompt, state], `rows` of them in one pass; all have one length, so that there is no padding."""
    embed = lm.get_input_embeddings()
    first, state = (torch.tensor(x, dtype=torch.int64, device=lm.device) for x in (first, state))

    def read(prompts, targets):
        found = []
        for u, y in zip(prompts.split(rows), targets.split(rows)):
            before, behind = (x.expand(len(u), -1) for x in (first, state))
            if u.is_floating_point():
                fed = dict(inputs_embeds=torch.cat([embed(before), u, embed(behind)], 1))
            else:
                fed = dict(input_ids=torch.cat([before, u, behind], 1))
            found.append(asked(lm(**fed, use_cache=False, logits_to_keep=1).logits[:, -1], y))
        return tuple(map(torch.cat, zip(*found)))

    return read


@torch.no_grad()
def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from random import Random

    from common import UserError, gpu, items, models, settings, tasks

    args, config, device = settings.prepare(__file__, args)
    if list(args.lengths) != sorted({*args.lengths}) or args.lengths[0] <= args.greedy:
        raise UserError(f"--lengths {' '.join(map(str, args.lengths))}: they have to rise, from above --greedy {args.greedy}")
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(args.task)
    size = config.get_text_config().vocab_size
    allowed, controls = (torch.tensor(x, device=device) for x in words(tokenizer, size, args))
    run = items.Items(__file__, args, config)
    lm = models.load(args, device, trainable=False).lm
    table, layer = lm.get_input_embeddings().weight, head(lm) if args.bound_prompts else None
    first = tokenizer("")["input_ids"]  # a beginning of text, where the tokenizer writes one

    def stream(*numbers):
        return torch.Generator().manual_seed(gpu.hash_seed(args.seed, *numbers))

    systems = {"trained": lm} | ({"random weights": random_weights(lm, stream(-1))} if args.exact else {})

    for i in run.left(args.items):
        state, true = state_of(task, tokenizer, Random(gpu.hash_seed(args.seed, i, 0)), i, args)
        models.check_tokens([([*state, true], f"a text of {task.name}")], config)
        read, draws = reader(lm, first, state, args.rows), stream(i, 1)
        before, losses = read(controls.new_empty(1, 0), torch.arange(size, device=device)[None])
        ranked = losses[0].argsort(stable=True)
        likely, uniform = (x[torch.randint(len(x), (), generator=draws)] for x in (ranked[: args.likely], allowed))
        targets = torch.tensor([true, likely, uniform], device=device)

        exact, found, last = {}, {}, None
        for name, system in systems.items() if args.exact else ():
            needed, exact[name] = enumerated(reader(system, first, state, args.rows), controls, allowed, size, args)
            if system is lm:
                found["exact"] = [k if k <= args.exact else None for k in needed[targets].tolist()]
        for arm, search in searches(read, table, controls, lambda *numbers, i=i: stream(i, *numbers), args).items():
            ended = sought(read, targets, *search)
            found[arm], last = [k for k, _, _ in ended], last or ended

        row, text = dict(item=i, targets={}, exact=exact), tokenizer.decode
        for j, kind in enumerate(("true next", "likely", "uniform")):
            y, (_, loss, prompt) = targets[j].item(), last[j]
            of = dict(token=text([y]), before=text(before), rank=1 + int((ranked == y).nonzero()), base=losses[0, y].item())
            of |= dict(loss=loss, prompt=[text([v]) for v in prompt], state=[text([v]) for v in state])
            row["targets"][kind] = of | {arm: ks[j] for arm, ks in found.items()}
        share = len(range(i, args.bound_prompts, args.items))
        row["bound"] = beyond(layer, state, controls, share, args.lengths[-1], stream(i, 5)) if layer and share else None
        run.write(row)

    found = results(run.rows(), args)
    run.finish(found, told(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
