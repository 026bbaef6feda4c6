"""DC-PDD: "Pretraining Data Detection for Large Language Models: A Divergence-based Calibration Method". Zhang, Zhang, Guo, de
Rijke, Fan and Cheng, arXiv 2409.14781 (EMNLP 2024).

Idea: whether a text was in a model's training data shows in the probabilities that the model gives to its tokens, but a common
word is likely in any text. Each token's probability is therefore weighed by how rare the token is in other text, and the mean
is taken over first occurrences, with a cap so that a few rare and certain tokens do not decide. All that is needed besides
the model is a count of tokens in some large text that need not be its own.

Score (equation numbers not at hand), p_i: probability of token i of a text, f_v: frequency of token v in a reference corpus.
Larger = more likely a member of the training data:
    beta = 1/|F| sum_(i in F) min(a, -p_i log f_(x_i)),   f_v = (count_v + 1) / (N + V)
    F: the places whose token did not stand before, N: tokens of the corpus, V: of the vocabulary
Beside it stand, from the same pass and pointing the same way,
    loss = 1/n sum_i log p_i               Min-K = mean of the floor(k n) least log p_i (arXiv 2310.16789)
    Min-K++ = the same of (log p_i - mu_i) / sigma_i, mean and deviation of the law's own log-probs (arXiv 2404.02936)
    ratio = 1/n sum_i (log p_i - log f_(x_i)), the calibration without a product; length = n

The released script mixes up raw and smoothed counts and reads a as a string; this is the formula it stands for. A text's first
token has no probability and is not scored. Left out: the scores by zlib, lower case and a second model.

The built-in texts: 400 words with Zipf frequencies, a third of the words after a rule; every text is of rare or of common
words, in members and others alike, so that the loss alone is misled. A tiny model is trained on background texts and on
members, seen once, twice or four times as often. Of a model trained later than a benchmark was made, a score by date of
writing detects the date (WikiMIA): members and others have to be from one source.

Family: audit
Differs from score.py in: task, prompt_template, system_prompt, seed, items, max_new_tokens, stop, temperature, engine,
    vllm_memory, vllm_tp, scores, given, results, main, frequencies, moments, first_occurrences, divergence, least
Measures: results, tpr_at_fpr
World: texts
Costs: one forward pass over each text, and one count of the reference corpus.
Run:   python algos/dc_pdd.py                                   CPU, seconds and a warm start
       python algos/dc_pdd.py --untrained                       nothing to detect
       python algos/dc_pdd.py --model qwen2.5-0.5b --texts path/to/texts.jsonl --reference path/to/other.jsonl
       python algos/dc_pdd.py --model qwen2.5-0.5b --texts swj0419/WikiMIA:WikiMIA_length64 --reference path/to/other.jsonl
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
    seed: int = 1
    """of the built-in texts, and of what the model is trained on"""
    items: int = 300
    """texts in all"""
    batch: int = 32
    """items in one step"""
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

    # DC-PDD
    limits = dict(items="1 <= x", batch="1 <= x", caps="0 < x", k="0 < x <= 1", words="2 <= x")
    texts: str | None = None
    """.jsonl file of text (or input) and label (1: member), or a data set on the hub as owner/name:split; None: built in"""
    reference: str | None = None
    """.jsonl file of text that tokens are counted in; None: built in (code: part of C4)"""
    caps: tuple[float, ...] = (0.01, 0.001, 0.1, 1.0, 10.0)
    """a: the first is DC-PDD's, all are compared (code: 0.01)"""
    k: float = 0.2
    """share of a text's tokens that Min-K looks at (its paper and code)"""
    words: int = 512
    """of a text at most, the first (code)"""
    untrained: bool = False
    """a model with random weights, for which no text is a member (ours)"""


# ---------------------------------------------------------------- the score


def frequencies(counts):
    """Counts of tokens [V] -> their smoothed frequencies [V]: one more each."""
    return (counts.double() + 1) / (counts.sum() + len(counts))


def moments(targets, logits):
    """Tokens [n], logits [n, V] -> log-probs of the tokens [n], mean and deviation [n] of a log-prob under its own law."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    mean = (p * logp).nan_to_num().sum(-1)
    square = (p * logp * logp).nan_to_num().sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], mean, (square - mean**2).clamp(min=0).sqrt()


def first_occurrences(ids, mask):
    """Tokens [B, T], mask [B, T] -> F [B, T]: tokens that did not stand before in their row."""
    alike = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]
    return mask & ~alike.tril(-1).any(2)


def divergence(logp, f, ids, mask, cap):
    """Log-probs, tokens [B, T], frequencies [V], mask [B, T] -> beta [B], and the share of F that was capped [B]."""
    at = first_occurrences(ids, mask)
    alpha = -logp.double().exp() * f[ids].log()
    n = at.sum(1).clamp(min=1)
    return (alpha.clamp(max=cap) * at).sum(1) / n, ((alpha > cap) & at).sum(1) / n


def least(x, mask, k):
    """Numbers [B, T], mask [B, T] -> mean of the floor(k n) least of each row's n, of one at least [B]."""
    n = mask.sum(1)
    kept = torch.arange(x.shape[1], device=x.device) < (k * n + 1e-9).long().clamp(min=1)[:, None]
    ordered = x.masked_fill(~mask, torch.inf).sort(1).values
    return ordered.masked_fill(~kept, 0.0).sum(1) / kept.sum(1)


def scores(logp, mean, deviation, ids, mask, f, args):
    """Log-probs, moments and tokens [B, T], mask [B, T], frequencies [V] -> {name: [B]}, larger = member."""
    n, own = mask.sum(1), logp.double().masked_fill(~mask, 0.0)
    found = {f"DC-PDD, a = {cap:g}": divergence(logp, f, ids, mask, cap)[0] for cap in args.caps}
    found |= dict(loss=own.sum(1) / n)
    found |= {"Min-K": least(logp, mask, args.k), "Min-K++": least((logp - mean) / deviation.clamp(min=1e-6), mask, args.k)}
    return found | dict(ratio=(own - f[ids].log().masked_fill(~mask, 0.0)).sum(1) / n, length=n.double())


# ---------------------------------------------------------------- the world: words of two styles


def texts(args):
    """-> Task whose train texts a tiny model learns (members as often as they are seen), the candidates [{text, label, seen,
    style}], and reference texts. A text of style s draws words with probability ~ rank^-s, and follows a rule, one of eight
    successors of the word before, with probability 0.35; 0.6: rare words are usual, 1.6: common ones."""
    from functools import partial

    from common import gpu, tasks
    from common.worlds import tiny

    g = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 21))
    V, T = 400, 40
    after = torch.randint(V, (V, 8), generator=g).tolist()
    laws = {s: (torch.arange(1, V + 1).double() ** -s) for s in (0.6, 1.6)}

    def text(style):
        free = torch.multinomial(laws[style], T, replacement=True, generator=g).tolist()
        rule, which = (torch.rand(T, generator=g) < 0.35).tolist(), torch.randint(8, (T,), generator=g).tolist()
        said = free[:1]
        for i in range(1, T):
            said.append(after[said[-1]][which[i]] if rule[i] else free[i])
        return " ".join(f"w{w}" for w in said)

    def some(n):
        return [(text(style), style) for style in (0.6, 1.6) for _ in range(n // 2)]

    members, others, background, reference = some(150), some(150), some(1500), some(1500)
    seen = [(1, 2, 4)[i % 3] for i in range(150)]
    found = [dict(text=t, label=1, seen=n, style=s) for (t, s), n in zip(members, seen)]
    found += [dict(text=t, label=0, seen=0, style=s) for t, s in others]
    found = [found[i] for i in torch.randperm(300, generator=g).tolist()]
    learnt = [t for t, _ in background] + [t for (t, _), n in zip(members, seen) for _ in range(n)]
    examples = [tasks.Example(i, ":", t) for i, t in enumerate(learnt)]
    shape = dict(hidden_size=64, intermediate_size=192, num_attention_heads=2, num_key_value_heads=2)
    recipe = dict(steps=8 * len(learnt) // 64, careful_steps=10**6, batch=64, lr=3e-3, seed=args.seed)
    own = dict(shape=shape, recipe=recipe, tokenizer=partial(tiny.words, [":", *(f"w{w}" for w in range(V))]))
    demonstrate = dict(demonstrate=lambda rng, e, careful: e.answer)
    return tasks.Task(f"memory-{args.seed}", examples, [], None, **demonstrate, **own), found, [t for t, _ in reference]


# ---------------------------------------------------------------- what is measured


def tpr_at_fpr(score, label, most=0.05):
    """The greatest share of the 1s that a threshold finds while at most `most` of the 0s are taken for them."""
    from sklearn.metrics import roc_curve

    if len(set(map(int, label))) < 2:
        return None
    false, true, _ = roc_curve(label, score, drop_intermediate=False)
    return float(true[false <= most].max())


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    import math

    from common import measures

    label, table = [row["label"] for row in rows], {}
    of = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    for name, score in of.items():
        low, high = measures.interval(measures.auroc, score, label)
        table[name] = {"AUROC": measures.auroc(score, label), "low": low, "high": high}
        table[name] |= {"TPR at 5% FPR": tpr_at_fpr(score, label)}
    capped = f"DC-PDD, a = {args.caps[0]:g}"
    table[capped] |= {"share capped": sum(row["capped"] for row in rows) / len(rows)}
    ranks = {name: row["AUROC"] for name, row in table.items() if row["AUROC"] is not None}
    panels = [dict(title="AUROC of members", kind="bars", x="0.5: chance", of=ranks)]

    def among(name, seen):
        """AUROC of members that were seen so often against all others."""
        kept = [(s, row["label"]) for s, row in zip(of[name], rows) if row.get("seen") in (0, seen)]
        return measures.auroc(*zip(*kept)) if kept else None

    times = sorted({row["seen"] for row in rows if row.get("seen")})
    if times:
        sweep = {f"seen {n} times" if n > 1 else "seen once": sorted(
            [math.log10(cap), among(f"DC-PDD, a = {cap:g}", n)] for cap in args.caps) for n in times}  # fmt: skip
        panels.append(dict(title="DC-PDD over its cap", kind="lines", x="log10 a", y="AUROC", of=sweep))
    styles = {0.6: "rare words", 1.6: "common words"} if times else {}
    for name in (capped, "Min-K") if styles else ():
        middle = sorted(of[name])[len(rows) // 2]
        heat = {said: {word: sum(s >= middle for s, row in zip(of[name], rows) if (row["style"], row["label"]) == (style, y))
                       / max(1, sum((row["style"], row["label"]) == (style, y) for row in rows))
                       for word, y in (("member", 1), ("other", 0))} for style, said in styles.items()}  # fmt: skip
        panels.append(dict(title=f"{name}: above the median", kind="heat", of=heat))
    for y, word in ((1, "member"), (0, "other")):
        shown = {f"{word} {i}": row["pieces"] for i, row in enumerate([row for row in rows if row["label"] == y][:2])}
        panels.append(dict(title=f"share of the cap that a token has: {word}", kind="tokens", of=shown))
    return dict(table=table, panels=[p for p in panels if p["of"]])


# ---------------------------------------------------------------- the loop


def given(path, n=None, labelled=True):
    """The first n texts (None: all) of a .jsonl file, or of a data set on the hub as owner/name:split, as dicts; text may be
    called input. UserError where one has no text, or no label of 0 or 1 though it is to be `labelled`."""
    from common import UserError, tables

    def checked(row, where):
        found = dict(text=row.get("text", row.get("input")), label=row.get("label")) if isinstance(row, dict) else {}
        if not isinstance(found.get("text"), str) or labelled and found["label"] not in (0, 1):
            raise UserError(f"{where}: needs a text" + " and a label of 0 or 1" * labelled)
        return found

    if Path(path).suffix == ".jsonl":
        rows, _ = tables.read_rows(path, checked)
    else:
        name, _, part = path.partition(":")
        data = tables.read_hub(name, "give a local .jsonl file of text and label")[0]
        if part not in data:
            raise UserError(f"{path}: say which split as {name}:SPLIT; there are {', '.join(data)}")
        rows = [checked(dict(row), f"{path}[{i}]") for i, row in enumerate(data[part])]
    if not rows:
        raise UserError(f"{path}: no rows there")
    return rows[:n]


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import functools

    from common import UserError, items, models, settings
    from common.batch import collate, read

    made = functools.cache(lambda seed: texts(args))

    def world(name):  # the seed of a resumed run is known when this is called
        return made(args.seed)[0]

    args, config, device = settings.prepare(__file__, args, world)
    if (args.texts is None) != (args.reference is None):
        raise UserError("--texts and --reference go together: tokens are counted in other text of the same kind")
    _, candidates, reference = made(args.seed)
    if args.texts:
        candidates = given(args.texts, args.items)
        reference = [row["text"] for row in given(args.reference, labelled=False)]
    candidates = candidates[: args.items]
    tokenizer = models.load_tokenizer(args, world)
    run = items.Items(__file__, args, config)
    policy = models.load(args, device, trainable=False, warm=world, fresh=args.untrained)

    def encode(text):
        short = " ".join(text.split(" ")[: args.words])
        ids = tokenizer(f": {short}" if not args.texts else short, add_special_tokens=False).input_ids
        return ids[: policy.lm.config.max_position_embeddings]

    told = [(encode(text), f"text {i} of --reference") for i, text in enumerate(reference, 1)]
    models.check_tokens([*told, *((encode(e["text"]), "a text of --texts") for e in candidates)], policy.lm.config)
    counts = torch.zeros(policy.lm.config.vocab_size, dtype=torch.int64)
    for text in reference:
        counts += torch.tensor(encode(text)[1:], dtype=torch.int64).bincount(minlength=len(counts))
    f = frequencies(counts).to(device)

    for some in run.left(len(candidates), args.batch):
        rows = [encode(candidates[i]["text"]) for i in some]
        for i, ids in zip(some, rows):
            if len(ids) < 2:
                raise UserError(f"text {i + 1} has {len(ids)} tokens; there have to be two")
        batch = collate([(ids[:1], ids[1:]) for ids in rows], tokenizer.pad_token_id, device)
        with torch.no_grad():
            logp, mean, deviation = read(policy, batch, args, temperature=1.0, read=moments)
        ids = batch.ids[:, -batch.mask.shape[1] :]
        found = {name: x.tolist() for name, x in scores(logp, mean, deviation, ids, batch.mask, f, args).items()}
        _, capped = divergence(logp, f, ids, batch.mask, args.caps[0])
        alpha = (-logp.double().exp() * f[ids].log()).clamp(max=args.caps[0]) / args.caps[0]
        pieces = [[[tokenizer.decode([y]) + " ", a] for y, a in zip(x[1:], row)] for x, row in zip(rows, alpha.tolist())]
        own = [{k: v for k, v in candidates[i].items() if k != "text"} for i in some]
        run.write(*(own[j] | dict(item=i, scores={k: x[j] for k, x in found.items()}, capped=capped[j].item(),
                                  pieces=pieces[j][:40]) for j, i in enumerate(some)))  # fmt: skip

    found = results(run.rows(), args)
    of = {name: f"{row['AUROC']:.2f}" for name, row in found["table"].items() if row["AUROC"] is not None}
    said = ", ".join(f"{name} {x}" for name, x in of.items() if not name.startswith("DC") or name == next(iter(of)))
    run.finish(found, f"AUROC of members: {said or 'not defined: one class alone'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
