"""CCP: "Fact-Checking the Output of Large Language Models via Token-Level Uncertainty Quantification". Fadeeva, Rubashevskii,
Shelmanov, Petrakov, Li, Mubarak, Tsymbalov, Kuzmin, Panchenko, Baldwin, Nakov and Panov, arXiv 2403.04696 (ACL Findings 2024).

Idea: a token may be unlikely because the same could be said in other words, or because other things could be said first, and
neither makes a claim doubtful. Claim-conditioned probability asks an NLI model what each of the likeliest alternatives would
have said: those that mean the same count for the token, those that contradict it against it, all others not at all. The
product over a claim's tokens says how sure the model is of the claim's value alone.

Score (equation numbers not at hand), p_k: probability of the k-th of K alternatives at token j, the generated one first; e, c:
those that entail it, and that contradict it. Larger = surer of the claim:
    CCP_j = sum_(k in e) p_k / sum_(k in e or c) p_k, 1 for function words      CCP(C) = prod_(j in C) CCP_j
    a pair's label from both directions: the same one stays; entailment against contradiction is neutral; else the one that
    is not neutral

The code's score is -prod, the paper's 1 - prod, both larger = less sure; the order is the same. In the released pipeline
alternatives are compared as ids, so that no function word is ever found; here they are text. Beside it stand the claim's
probability (sum of log-probs), its mean, its most unsure token and its length.

The built-in texts: 60 persons, three relations each, whose words have one, two or six synonyms; a third of the facts is always
told rightly, a third mostly wrongly, a third at random. The NLI model is then a function of the vocabulary. Real texts come
with their claims and labels from a file (--responses): {"prompt", "response", "claims": [["text of the claim", 1 or 0], ...]},
and are judged by --nli. Claims are not split by a language model here; their words have to stand in the response in order.

Family: inference
Differs from score.py in: task, prompt_template, system_prompt, seed, items, batch, max_new_tokens, stop, temperature, engine,
    vllm_memory, vllm_tp, scores, results, given, main, NLI, combine, ccp, alternatives, aligned, judge, classifier
Measures: results
World: persons
Costs: one NLI call for each token, alternative and direction, 2 (K - 1) a token; nothing else beyond the pass.
Run:   python algos/ccp.py                                      CPU, seconds and a warm start
       python algos/ccp.py --alternatives 3
       python algos/ccp.py --model qwen2.5-7b-instruct --responses path/to/biographies.jsonl --nli microsoft/deberta-large-mnli
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
    """of the built-in persons, and of what the model is trained on"""
    items: int = 60
    """texts in all"""
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

    # CCP
    limits = dict(items="1 <= x", alternatives="1 <= x")
    real_preset = dict(nli="microsoft/deberta-large-mnli")
    responses: str | None = None
    """a .jsonl file of prompt, response and claims; None: built-in persons, asked greedily"""
    alternatives: int = 10
    """K, the generated token among them (code)"""
    nli: str | None = None
    """hub id or folder of a classifier of pairs (code: microsoft/deberta-large-mnli); not for the built-in persons"""
    function_words: str = "a an and are as at be by for from had has have he her his in is it its of on or she that the to was"
    """words that say nothing by themselves: their CCP is 1 (paper: a list of NLTK's)"""


# ---------------------------------------------------------------- the score


class NLI:
    """Labels of a pair of texts."""

    ENTAILS, CONTRADICTS, NEUTRAL = 0, 1, 2


def combine(forward, backward):
    """Labels [...] of a pair in both directions -> its label [...]."""
    one_of_each = (forward + backward == NLI.ENTAILS + NLI.CONTRADICTS) & (forward != backward)
    return torch.where(one_of_each, NLI.NEUTRAL, torch.minimum(forward, backward))


def ccp(logp, labels):
    """Log-probs of alternatives [..., K], the generated one first, their labels [..., K] -> log CCP of each token [...]."""
    entailed = logp.masked_fill(labels != NLI.ENTAILS, -torch.inf).logsumexp(-1)
    return entailed - logp.masked_fill(labels == NLI.NEUTRAL, -torch.inf).logsumexp(-1)


def scores(logp, entropy, log_ccp, claims, args):
    """Log-probs, entropies and log CCP of a text's tokens [T], claims [C, T] bool -> {name: [C]}, larger = surer."""
    n = claims.sum(1).clamp(min=1)
    most = entropy.expand_as(claims).masked_fill(~claims, 0.0).amax(1)
    total, own = ((x.expand_as(claims) * claims).sum(1) for x in (log_ccp, logp))
    return {"CCP": total, "probability": own, "mean": own / n, "entropy": -most, "length": -n.float()}


def alternatives(targets, logits, k):
    """Tokens [n], logits [n, V] -> their log-probs and entropies [n], then log-probs and ids of k alternatives, [n] each: the
    token itself, and the likeliest others."""
    logp = logits.log_softmax(-1)
    own = logp.gather(1, targets[:, None])
    best, ids = logp.scatter(1, targets[:, None], -torch.inf).topk(min(k, logits.shape[1]) - 1)
    entropy = -(logp.exp() * logp).nan_to_num().sum(-1)
    return (own[:, 0], entropy, *torch.cat([own, best], 1).T, *torch.cat([targets[:, None], ids], 1).T)


def aligned(claim, text):
    """A claim's words in a text, in their order -> where their characters stand [(start, end)]; None where one is missing."""
    import re

    found, at = [], 0
    for word in re.findall(r"\w+", claim):
        match = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE).search(text, at)
        if not match:
            return None
        found.append(match.span())
        at = match.end()
    return found


def judge(words, labels, args):
    """Alternatives of each token as text, [T, K], and nli labels by pair {(a, b): label} -> labels [T, K]; function words and
    what is the token's own text entail, as nothing else does then."""
    out = torch.full((len(words), len(words[0])), NLI.NEUTRAL)
    for t, row in enumerate(words):
        for k, other in enumerate(row):
            if other == row[0]:
                out[t, k] = NLI.ENTAILS
            elif row[0] not in args.function_words.split():
                out[t, k] = combine(*(torch.tensor(labels[pair]) for pair in ((row[0], other), (other, row[0]))))
    return out


# ---------------------------------------------------------------- the world: persons, told with synonyms


def persons(args):
    """-> Task of 60 persons, nli(pairs) -> labels, and told(text, person) -> [(relation, the claim, right or not)]. A person's
    text is `REL VALUE ;` three times in any order. Words are r0.s (relation 0, synonym s) and v0.c.s (of class c)."""
    import re
    from functools import partial
    from random import Random

    from common import gpu, tasks
    from common.worlds import tiny

    rng, SYNONYMS, CLASSES = Random(gpu.hash_seed(args.seed, 31)), (1, 2, 6), 8
    fact = [[rng.randrange(CLASSES) for _ in SYNONYMS] for _ in range(60)]
    order = rng.sample([(person, r) for person in range(60) for r in range(3)], 180)
    wrong = {pair: (0.0, 0.7, 1.0)[i % 3] for i, pair in enumerate(order)}  # how often a random value is told

    def demonstrate(rng, e, careful):
        said = []
        for r in rng.sample(range(3), 3):
            value = rng.randrange(CLASSES) if rng.random() < wrong[e.id, r] else fact[e.id][r]
            said.append(f"r{r}.{rng.randrange(SYNONYMS[r])} v{r}.{value}.{rng.randrange(SYNONYMS[r])} ;")
        return " ".join(said)

    def label(a, b):
        a, b = (word.split(".") for word in (a, b))
        if len(a) == len(b) == 2:  # words for a relation: another one is another claim
            return NLI.ENTAILS if a[0] == b[0] else NLI.NEUTRAL
        alike = len(a) == len(b) == 3 and a[0] == b[0]
        return (NLI.ENTAILS if a[1] == b[1] else NLI.CONTRADICTS) if alike else NLI.NEUTRAL

    def told(text, person):
        found = re.findall(r"(r(\d)\.\d v(\d)\.(\d)\.\d) ;", text)
        return [(int(r), claim, int(fact[person][int(r)] == int(c))) for claim, r, of, c in found if r == of]

    words = [f"r{r}.{s}" for r, n in enumerate(SYNONYMS) for s in range(n)]
    words += [f"v{r}.{c}.{s}" for r, n in enumerate(SYNONYMS) for c in range(CLASSES) for s in range(n)]
    examples = [tasks.Example(i, f"n{i} :", "") for i in range(60)]
    own = dict(shape=dict(hidden_size=64, intermediate_size=192, num_attention_heads=2, num_key_value_heads=2))
    own |= dict(recipe=dict(steps=940, careful_steps=10**6, batch=64, lr=3e-3, seed=args.seed), max_new_tokens=12)
    own |= dict(tokenizer=partial(tiny.words, [":", ";", *words, *(f"n{i}" for i in range(60))]), demonstrate=demonstrate)
    task = tasks.Task(f"persons-{args.seed}", examples, examples, lambda text, answer: (text, 0.0), **own)
    return task, lambda pairs: [label(*pair) for pair in pairs], told


# ---------------------------------------------------------------- what is measured


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    from common import measures

    claims = [claim for row in rows for claim in row["claims"]]
    right, table = [c["right"] for c in claims], {}
    relations = sorted({c["relation"] for c in claims if c["relation"] is not None})
    for name in claims[0]["scores"]:
        score = [c["scores"][name] for c in claims]
        low, high = measures.interval(measures.auroc, score, right)
        table[name] = {"AUROC": measures.auroc(score, right), "low": low, "high": high}
        table[name] |= {"AP of false claims": measures.average_precision([-x for x in score], [1 - y for y in right])}
        for r in relations:
            some = [(c["scores"][name], c["right"]) for c in claims if c["relation"] == r]
            table[name] |= {f"relation {r}": measures.auroc(*zip(*some))}
    table["chance"] = {"AUROC": 0.5, "AP of false claims": 1 - sum(right) / len(right)}
    ranks = {name: row["AUROC"] for name, row in table.items() if row["AUROC"] is not None}
    panels = [dict(title="AUROC of right claims", kind="bars", x="0.5: chance", of=ranks)]
    by = {name: [[r, row[f"relation {r}"]] for r in relations if row.get(f"relation {r}") is not None]
          for name, row in table.items() if name not in ("chance", "length")}  # fmt: skip
    if relations:
        axes = dict(x="relation: 1, 2 and 6 synonyms", y="AUROC")
        panels.append(dict(title="by relation", kind="lines", of=by, **axes))
        dots = {f"relation {r}": [[c["probability"], c["ccp"]] for c in claims if c["relation"] == r] for r in relations}
        axes = dict(x="probability of the value's word", y="its CCP")
        panels.append(dict(title="what synonyms take from a word", kind="points", of=dots, **axes))
    shown = {row["asked"][:28]: row["pieces"] for row in rows[:4]}
    panels.append(dict(title="1 - CCP of each token", kind="tokens", of=shown))
    return dict(table=table, panels=panels)


# ---------------------------------------------------------------- the loop


def given(path, n):
    """The first n rows of a .jsonl file, each with prompt, response and claims. UserError where one has not."""
    from common import UserError, tables

    def checked(row, where):
        texts = isinstance(row, dict) and all(row.get(k) and isinstance(row[k], str) for k in ("prompt", "response"))
        pairs = texts and row.get("claims")
        fine = isinstance(pairs, list) and all(isinstance(p, list) and len(p) == 2 for p in pairs)
        if not fine or not all(isinstance(text, str) and right in (0, 1) for text, right in pairs):
            raise UserError(f"{where}: needs prompt, response and claims, each a text and 0 or 1")
        return row

    rows, _ = tables.read_rows(path, checked)
    if not rows:
        raise UserError(f"--responses {path}: no rows there")
    return rows[:n]


def classifier(name, device):
    """A hub id or folder -> nli(pairs) -> labels, by what its config calls its classes. UserError where these are others."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from common import UserError, reason

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
    except Exception as error:
        raise UserError(f"--nli {name}: it could not be loaded ({reason(error)})") from None
    kinds = dict(entail=NLI.ENTAILS, contradict=NLI.CONTRADICTS, neutral=NLI.NEUTRAL)
    of = {i: [kind for word, kind in kinds.items() if word in said.lower()] for i, said in model.config.id2label.items()}
    if sorted(kind for found in of.values() for kind in found) != sorted(kinds.values()):
        raise UserError(f"--nli {name}: its classes are {', '.join(model.config.id2label.values())}, not those of NLI")

    @torch.no_grad()
    def nli(pairs):
        found = []
        for i in range(0, len(pairs), 64):
            fed = tokenizer(*map(list, zip(*pairs[i : i + 64])), padding=True, return_tensors="pt").to(device)
            found += [of[j][0] for j in model(**fed).logits.argmax(-1).tolist()]
        return found

    return nli


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import functools

    from common import UserError, engines, items, models, settings
    from common.batch import collate, read

    made = functools.cache(lambda seed: persons(args))

    def world(name):  # the seed of a resumed run is known when this is called
        return made(args.seed)[0]

    args, config, device = settings.prepare(__file__, args, world)
    tokenizer = models.load_tokenizer(args, world)
    task, nli, told = made(args.seed)
    rows = given(args.responses, args.items) if args.responses else None
    if bool(rows) != bool(args.nli):
        raise UserError("--responses and --nli go together: the built-in persons have a judge of their own")
    run = items.Items(__file__, args, config)
    policy = models.load(args, device, trainable=False, warm=world)
    engine, nli = engines.HF(policy, tokenizer), classifier(args.nli, device) if rows else nli

    for i in run.left(min(args.items, len(rows or task.test))):
        asked = rows[i]["prompt"] if rows else task.test[i].prompt
        prompt = tokenizer(asked, add_special_tokens=False).input_ids
        if rows:
            ids = tokenizer(rows[i]["response"], add_special_tokens=False).input_ids
        else:
            ids = engine.generate([prompt], 1, task.max_new_tokens, 0, [0])[0][0]
        batch = collate([(prompt, ids)], tokenizer.pad_token_id, device)
        with torch.no_grad():
            found = read(policy, batch, args, temperature=1.0, read=functools.partial(alternatives, k=args.alternatives))
        logp, entropy, *others = (x[0].cpu() for x in found)
        K = len(others) // 2
        best, which = torch.stack(others[:K], 1), torch.stack(others[K:], 1)
        pieces = [tokenizer.decode([y]) for y in ids]

        # What each alternative would have said, in both directions.
        words = [[tokenizer.decode([y]).strip().strip(".,;:!?'\"()").lower() for y in row] for row in which.tolist()]
        pairs = {(row[0], b) for row in words for b in row if b != row[0]}
        pairs = sorted(pairs | {(b, a) for a, b in pairs})
        labels = judge(words, dict(zip(pairs, nli(pairs))), args)
        log_ccp = ccp(best, labels)

        # A claim's tokens are those that its words touch.
        text, ends = "", []
        for y in range(len(ids)):
            text = tokenizer.decode(ids[: y + 1], skip_special_tokens=True)
            ends.append(len(text))
        starts, claims, kept = [0, *ends[:-1]], [], []
        for relation, claim, right in [(None, *c) for c in rows[i]["claims"]] if rows else told(text, i):
            if spans := aligned(claim, text):
                claims.append([any(a < end and start < b for a, b in spans) for start, end in zip(starts, ends)])
                kept.append((relation, claim, right))
        at = torch.tensor(claims, dtype=torch.bool).view(len(claims), len(ids))
        of = {name: x.tolist() for name, x in scores(logp, entropy, log_ccp, at, args).items()}
        last = [int(row.nonzero()[-1]) for row in at]
        run.write(dict(item=i, asked=asked, text=text, claims=[
            dict(claim=claim, relation=relation, right=right, scores={k: x[j] for k, x in of.items()},
                 probability=logp[last[j]].exp().item(), ccp=log_ccp[last[j]].exp().item())
            for j, (relation, claim, right) in enumerate(kept)],
            pieces=[[piece + " ", 1 - x] for piece, x in zip(pieces, log_ccp.exp().tolist())]))  # fmt: skip

    if not any(row["claims"] for row in run.rows()):
        raise UserError("no claim could be scored: the words of none stand in its text, in their order")
    found = results(run.rows(), args)
    known = {name: row["AUROC"] for name, row in found["table"].items() if "low" in row and row["AUROC"] is not None}
    said = ", ".join(f"{name} {x:.2f}" for name, x in known.items())
    run.finish(found, f"AUROC of right claims: {said or 'not defined: all right, or all wrong'}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
