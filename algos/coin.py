"""CoIn: "CoIn: Counting the Invisible Reasoning Tokens in Commercial Opaque LLM APIs". Sun, Wang, Tian, Liu, Shen, He, He, Ye,
Wang and Li, arXiv 2505.13778.

Idea: who sells the answers of a reasoning model bills hidden tokens, and an auditor who may not read them checks two things:
that so many were committed to, and that they look like reasoning about this answer. The seller publishes the root of a hash
tree over embeddings, one leaf for each token, and opens some leaves; small classifiers judge whether opened tokens belong to
their block of text, and the block to the answer. A set classifier turns the scores of the opened blocks into a verdict.

Rule (equation numbers not at hand); E an agreed embedding, r_i the i-th of m tokens, B_j its block, A the answer, H SHA-256:
    leaf_i = H(E(B_j) || E(r_i)), float32, little-endian;   node = H(left || right);   published: H(root || m)
    forged leaves, a share phi of them, are met by q independent challenges with probability 1 - (1 - phi)^q
    s_A = sigma(f(mean_i E(r_i), E(B_j))) for some tokens of a block,   s_B = sigma(f(E(B_j), E(A)))
    heads: focal loss -(1 - p)^gamma ln p, p: what the head gives the right label (1: a genuine pair)
    verdict: sigma(rho(1/k sum_j phi(s_A,j, s_B,j))), cross-entropy; or by a rule, the lower of the two mean scores' ranks

Every score points the same way: larger = more genuine; what is below a threshold is flagged. Thresholds are set on honest
traces of problems that neither heads nor verifier have seen, so that --false-alarms of them are flagged, for all auditors.
Against them stands the plain audit, length alone: flag whoever bills too many tokens for so short an answer.

What no source at hand fixes is ours: f, a small network on [u; v; |u - v|; u v] (released: cosine, --head cosine), gamma, the
fillers' exact form, and m hashed with the root, without which trees of 5 and of 6 leaves can share one. Left out: rounds that
stop early, the variant with a recurrent verifier, and tuning an --embedder, which stays as it is.
Filler that repeats the seller's own genuine blocks passes, by construction: each of its blocks is genuine, and the verdict
takes a mean. It is a row of the table, as are fillers that length alone finds and the heads do not.

Family: audit
Stand-alone: nothing is generated and no policy scored; the plain arm is the count-only audit, a row of the table.
World: problem
Measures: results, block_auroc
Costs: for the seller an encoding for every block and every distinct token, and two hashes a token.
Run:   python algos/coin.py                                     CPU, a minute
       python algos/coin.py --frozen --head cosine              a random embedding, and the released kind of head
       python algos/coin.py --junk 0                            heads that never saw junk
       python algos/coin.py --traces traces.jsonl --embedder sentence-transformers/all-MiniLM-L6-v2 --block-size 256
"""

import hashlib
import math
import random
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    seed: int = 1
    """of problems, weights, fillers and what is opened"""
    items: int = 500
    """held-out problems that are audited, honest and with every filler; of --traces a sixth at most"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""

    # CoIn
    limits = dict(items="2 <= x: fillers come from others", problems="8 <= x", verified="8 <= x", block_size="2 <= x")
    limits |= dict(opened="1 <= x", exposure="0 < x <= 1", challenges="1 <= x", false_alarms="0 <= x <= 1", hard="0 <= x <= 1")
    limits |= dict(junk="0 <= x <= 1", fit_steps="1 <= x", verifier_steps="1 <= x", pairs="2 <= x")
    traces: str | None = None
    """.jsonl file with reasoning and answer, or with response (reasoning</think>answer); None: sums of letters, made here"""
    embedder: str | None = None
    """hub id or folder of a sentence encoder, mean-pooled; None: hashed n-grams of characters (released: all-MiniLM-L6-v2)"""
    problems: int = 2000
    """to fit the heads on (ours); of --traces it is half"""
    verified: int = 1000
    """to fit the verifier on, and as many again for thresholds (ours); of --traces it is a sixth each"""
    block_size: int = 16
    """tokens in a block: characters, or an --embedder's (ours; among the released heads: 256)"""
    opened: int = 4
    """tokens that are opened in an audited block (ours)"""
    exposure: float = 0.3
    """share of the blocks that is audited (ours; paper: under 0.4 of the embeddings)"""
    challenges: int = 10
    """q, leaves that are asked for to find forged ones (ours)"""
    false_alarms: float = 0.05
    """share of honest traces that may be flagged (ours)"""
    head: Literal["mlp", "cosine"] = "mlp"
    """f: a small network, or w cos(u, v) + b (released)"""
    frozen: bool = False
    """leave the n-grams' random embedding as it is; an --embedder always is (released: tuned)"""
    hard: float = 0.5
    """share of hard negatives: another block of the same problem, or an eighth of the tokens changed (released: half)"""
    junk: float = 0.3
    """share of junk, random or one repeated token, among the easy negatives of the block-answer head (ours)"""
    gamma: float = 2.0
    """of the focal loss; 0: cross-entropy (ours)"""
    fit_steps: int = 1000
    """updates of the heads (ours; released: 3 epochs)"""
    pairs: int = 128
    """for each head in an update (released)"""
    lr: float = 2e-3
    """Adam's, of heads and verifier (ours; released: 2e-5, of a whole encoder)"""
    verifier_steps: int = 400
    """updates of a verifier (ours)"""


# ---------------------------------------------------------------- the commitment


def fingerprint(block, token):
    """Embeddings [d] of a block and of a token -> their bytes, float32 little-endian whatever the machine is."""
    return b"".join(struct.pack(f"<{len(x)}f", *x.tolist()) for x in (block, token))


def leaf(data):
    return hashlib.sha256(data).digest()


def tree(leaves):
    """Digests, one at least -> levels from the leaves, padded to a power of two by repeating the last, to [root]."""
    levels = [leaves + [leaves[-1]] * ((1 << (len(leaves) - 1).bit_length()) - len(leaves))]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append([leaf(below[i] + below[i + 1]) for i in range(0, len(below), 2)])
    return levels


def root(levels, m):
    """-> what is published: the padding would let m and m + 1 leaves have the same top, so m is hashed with it."""
    return leaf(levels[-1][0] + struct.pack("<Q", m))


def proof(levels, i):
    """-> the siblings on the way from leaf i to the top."""
    return [level[(i >> depth) ^ 1] for depth, level in enumerate(levels[:-1])]


def verify(data, i, m, siblings, published):
    """Whether `data` is what leaf i of m was made of. A path of another length would open a node as if it were a leaf."""
    if not 0 <= i < m or len(siblings) != (m - 1).bit_length():
        return False
    node = leaf(data)
    for depth, other in enumerate(siblings):
        node = leaf(other + node if i >> depth & 1 else node + other)
    return leaf(node + struct.pack("<Q", m)) == published


def catch(phi, q):
    """The chance that q independent challenges meet a forged leaf."""
    return 1 - (1 - phi) ** q


# ---------------------------------------------------------------- the judges


def match_score(u, v, w, b):
    """u, v [n, d] -> w cos(u, v) + b [n], the logit of "they belong together"."""
    return w * torch.nn.functional.cosine_similarity(u, v, -1) + b


def focal(logits, label, gamma):
    """Logits, labels 0 or 1 [n] -> -(1 - p)^gamma ln p [n], p: what the head gives the label. Right and sure counts little."""
    logp = torch.nn.functional.logsigmoid(torch.where(label.bool(), logits, -logits))
    return -((1 - logp.exp()) ** gamma) * logp


class Head(torch.nn.Module):
    """u, v [n, d] -> logits [n]."""

    def __init__(self, d, kind):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(torch.tensor(5.0)), torch.nn.Parameter(torch.tensor(0.0))
        layers = torch.nn.Linear(4 * d, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)
        self.net = torch.nn.Sequential(*layers) if kind == "mlp" else None

    def forward(self, u, v):
        if self.net is None:
            return match_score(u, v, self.w, self.b)
        return self.net(torch.cat([u, v, (u - v).abs(), u * v], -1))[:, 0]


class DeepSets(torch.nn.Module):
    """Scores [B, K, 2] of blocks, mask [B, K] -> logits [B] of "honest", whatever the blocks' order."""

    def __init__(self, width=32):
        super().__init__()
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        self.phi = torch.nn.Sequential(linear(2, width), relu(), linear(width, width), relu())
        self.rho = torch.nn.Sequential(linear(width, width), relu(), linear(width, 1))

    def forward(self, scores, mask):
        there, h = mask.bool(), self.phi(scores[mask.bool()])  # most of it is padding
        total = h.new_zeros(len(mask), h.shape[1]).index_add(0, there.nonzero()[:, 0], h)
        return self.rho(total / mask.sum(1, keepdim=True))[:, 0]


def threshold(scores, share):
    """Scores of honest traces [n] -> what at most `share` of them are below."""
    return scores.sort().values[int(share * len(scores))] if share < 1 else scores.new_tensor(torch.inf)


def rank_score(means, honest):
    """Mean scores [n, 2], those of honest traces [h, 2] -> [n]: the share of honest traces below it, of the worse score."""
    return torch.stack([torch.searchsorted(h.sort().values, x) for h, x in zip(honest.T, means.T.contiguous())]).amin(0).float()


# ---------------------------------------------------------------- the embedding


PRIME = 2**31 - 1


class Grams(torch.nn.Module):
    """Texts -> [n, 64], the mean of a table's rows for their 1- to 3-grams of characters."""

    def __init__(self, frozen, rows=2048, d=64):
        super().__init__()
        self.rows, self.d, self.table = rows, d, torch.nn.Parameter(torch.randn(rows, d), requires_grad=not frozen)

    def forward(self, texts):
        flat = "".join(text + "\0\0\0" for text in texts).encode("utf-32-le", "surrogatepass")
        code = torch.frombuffer(bytearray(flat), dtype=torch.int32).long()
        grams, ids = code.unfold(0, 3, 1), []
        for n in (1, 2, 3):
            key = sum(grams[:, i] * p for i, p in zip(range(n), (1_000_003, 19_349_663, 83_492_791)))
            ids.append(torch.where((grams[:, :n] > 0).all(1), (key + n) % PRIME * 48_271 % PRIME % self.rows, -1))
        ids = torch.stack(ids, 1)
        ends = torch.tensor([len(text) + 3 for text in texts]).cumsum(0)
        counts = torch.cat([torch.zeros(1, dtype=torch.long), (ids >= 0).sum(1).cumsum(0)])
        offsets = torch.cat([counts[:1], counts[ends[:-1]]])
        return torch.nn.functional.embedding_bag(ids[ids >= 0], self.table, offsets, mode="mean")

    def tokens(self, text):
        return list(text)


class Sentences:
    """Texts -> [n, d] by a sentence encoder, frozen: its last states' mean over all positions, of length 1."""

    def __init__(self, name, block_size, device):
        from transformers import AutoModel, AutoTokenizer

        from common import UserError, reason, tables

        if not Path(name).is_dir():
            tables.ask_hub(name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.lm = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        except Exception as error:
            raise UserError(f"--embedder {name}: transformers cannot load it ({reason(error)})") from None
        if not self.tokenizer.is_fast or self.lm.config.is_encoder_decoder:
            raise UserError(f"--embedder {name}: needs an encoder, and a tokenizer that says where its tokens stand in a text")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.longest = min(self.tokenizer.model_max_length, getattr(self.lm.config, "max_position_embeddings", 512))
        if block_size + self.tokenizer.num_special_tokens_to_add() > self.longest:
            raise UserError(f"--block-size {block_size}: --embedder {name} reads {self.longest} tokens at once")
        self.d, self.seen, self.device = self.lm.config.hidden_size, {}, device

    def __call__(self, texts):
        new = list(dict.fromkeys(text for text in texts if text not in self.seen))
        for i in range(0, len(new), 64):
            part = self.tokenizer(new[i : i + 64], padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            part = part.to(self.device)
            with torch.no_grad():
                states = self.lm(**part).last_hidden_state
            mask = part["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            self.seen |= zip(new[i : i + 64], torch.nn.functional.normalize(mean, dim=-1).cpu())
        return torch.stack([self.seen[text] for text in texts])

    def tokens(self, text):
        """A text -> the pieces of it that the tokenizer's tokens begin at; together they are the text."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        starts = sorted({a for a, b in spans if b > a})[1:]
        return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)])] if text else []


class Matcher(torch.nn.Module):
    """The embedding and both heads."""

    def __init__(self, encode, args):
        super().__init__()
        self.encode = encode
        self.tokens_block, self.block_answer = Head(encode.d, args.head), Head(encode.d, args.head)

    def embed(self, texts):
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        return self.encode(list(place))[[place[text] for text in texts]]

    def a(self, tokens, blocks):
        """Tokens [n][r], blocks' texts [n] -> logits [n]."""
        flat = self.embed([t for some in tokens for t in some])
        return self.tokens_block(flat.view(len(blocks), -1, flat.shape[-1]).mean(1), self.embed(blocks))

    def b(self, blocks, answers):
        return self.block_answer(self.embed(blocks), self.embed(answers))


# ---------------------------------------------------------------- the world: sums of letters, with their running sums


def problem(k, args):
    """The k-th of a seed -> (tokens of its reasoning, its answer): letters with values are added up, once to four times, each
    time in another order. What a letter is worth stands in the reasoning alone."""
    from common import gpu

    draws = random.Random(gpu.hash_seed(args.seed, k, 0))
    letters = draws.sample("abcdefghijklmnopqrstuvwxyz", draws.randint(5, 9))
    worth, steps = {x: draws.randint(1, 29) for x in letters}, []
    for _ in range(draws.randint(1, 4)):
        total = 0
        for x in draws.sample(letters, len(letters)):
            steps.append(f"{total}+{x}={total}+{worth[x]}={total + worth[x]} ")
            total += worth[x]
    return list("".join(steps)), "+".join(sorted(letters)) + f"={total}"


# ---------------------------------------------------------------- the seller


FILLERS = ["random tokens", "one token repeated", "own tokens shuffled", "own pieces shuffled", "foreign under own blocks",
           "own steps, digits altered", "another's trace", "nearest of 60 traces", "own blocks repeated"]  # fmt: skip
RATES = (0.25, 0.5, 1, 2, 5)  # tokens added, for each that is true
CASES = [("no filler", 0), *((kind, rate) for kind in FILLERS for rate in RATES)]
FORGED = (0.01, 0.02, 0.05, 0.1, 0.2)  # shares of a tree's leaves that nothing stands behind


def blocks_of(tokens, size):
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def filler(kind, tokens, n, others, vocabulary, draws, size):
    """A kind of FILLERS, the true tokens, other traces' tokens -> n tokens that were never needed."""
    whole, out, turn = [b for b in blocks_of(tokens, size) if len(b) == size] or [tokens], [], 0
    one = draws.choice(vocabulary)
    while len(out) < n:
        if kind == "random tokens":
            out += draws.choices(vocabulary, k=n)
        elif kind == "one token repeated":
            out += [one] * n
        elif kind == "own tokens shuffled":
            out += draws.sample(tokens, len(tokens))
        elif kind == "own pieces shuffled":
            pieces = blocks_of(tokens, 4)
            out += [t for piece in draws.sample(pieces, len(pieces)) for t in piece]
        elif kind == "own steps, digits altered":
            out += [re.sub(r"\d", lambda _: draws.choice("0123456789"), t) for t in tokens]
        elif kind == "own blocks repeated":
            out += draws.choice(whole)
        else:
            out += others[turn % len(others)]
            turn += 1
    return out[:n]


def inflate(kind, rate, k, split, near, vocabulary, draws, size):
    """Problem k of a split -> (blocks of tokens as billed, texts whose embeddings stand for them, whether each is filler).
    Filler comes behind the last whole block, so that repeated blocks stand where blocks are cut."""
    tokens = split[k][0]
    n, cut = round(rate * len(tokens)), len(tokens) // size * size
    others = draws.sample([i for i in range(len(split)) if i != k], min(60, len(split) - 1))
    if kind == "nearest of 60 traces":
        others.sort(key=lambda i: -near[k, i].item())
    added = filler(kind, tokens, n, [split[i][0] for i in others], vocabulary, draws, size)
    blocks = blocks_of(tokens[:cut] + added + tokens[cut:], size)
    false = [2 * max(0, min(cut + n, (j + 1) * size) - max(cut, j * size)) > len(b) for j, b in enumerate(blocks)]
    shown = ["".join(b) for b in blocks]
    if kind == "foreign under own blocks":  # nothing in the tree ties a block's embedding to its tokens: the head must
        own = ["".join(b) for b in blocks_of(tokens, size)]
        shown = [draws.choice(own) if f else text for f, text in zip(false, shown)]
    return blocks, shown, false


# ---------------------------------------------------------------- the auditor


def some(tokens, draws, n):
    """n of a block's tokens; some of them twice where it has fewer."""
    return draws.sample(tokens, n) if len(tokens) >= n else draws.choices(tokens, k=n)


def examples(split, vocabulary, draws, args):
    """-> args.pairs of (tokens, block, label) and of (block, answer, label), half of them genuine."""
    first, second = [], []
    for _ in range(args.pairs):
        k, other = draws.sample(range(len(split)), 2)
        cut, foreign = (blocks_of(split[i][0], args.block_size) for i in (k, other))
        block, genuine = draws.choice(cut), draws.random() < 0.5
        shown = block
        if not genuine:
            own = [b for b in cut if b != block]
            shown = draws.choice(own if own and draws.random() < args.hard else foreign)
        first.append((some(block, draws, args.opened), "".join(shown), genuine))
        block, genuine = draws.choice(cut), draws.random() < 0.5
        if not genuine and draws.random() < args.hard:
            changed = set(draws.sample(range(len(block)), math.ceil(len(block) / 8)))
            block = [draws.choice(vocabulary) if i in changed else t for i, t in enumerate(block)]
        elif not genuine and draws.random() < args.junk:
            block = draws.choices(draws.choice([vocabulary, [draws.choice(vocabulary)]]), k=args.block_size)
        elif not genuine:
            block = draws.choice(foreign)
        second.append(("".join(block), split[k][1], genuine))
    return first, second


@torch.no_grad()
def judged(matcher, claims, args):
    """Claims (blocks, texts shown for them, answer, share that is audited, draws) -> for each the numbers of its audited
    blocks, in the order of the audit, and their scores [k, 2]."""
    picked, tokens, shown, answers = [], [], [], []
    for blocks, texts, answer, share, draws in claims:
        picked.append(draws.sample(range(len(blocks)), math.ceil(share * len(blocks))))
        tokens += [some(blocks[j], draws, args.opened) for j in picked[-1]]
        shown += [texts[j] for j in picked[-1]]
        answers += [answer] * len(picked[-1])
    scores = torch.stack([matcher.a(tokens, shown), matcher.b(shown, answers)], 1).sigmoid()
    return list(zip(picked, scores.split([len(p) for p in picked])))


def first_of(scores, share):
    """Of scores of all blocks in the order of an audit those that are seen where it opens a share of them."""
    return scores[: math.ceil(share * len(scores))]


EXPOSURES = (0.1, 0.3, 0.6, 1.0)


class Verifiers(torch.nn.Module):
    """A DeepSets fitted on all fillers, then for each filler one that has not seen it; and what is flagged by all auditors."""

    def __init__(self, honest):
        super().__init__()
        self.nets = torch.nn.ModuleList(DeepSets() for _ in range(1 + len(FILLERS)))
        for name, shape in dict(least=[1 + len(FILLERS)], at=[len(EXPOSURES)], rule=[], bill=[], honest=[honest, 2]).items():
            self.register_buffer(name, torch.zeros(shape))

    def scores(self, sets, net=0):
        """Scores [k, 2] of several audits -> [B]."""
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in sets], batch_first=True)
        return self.nets[net](torch.nn.utils.rnn.pad_sequence(sets, batch_first=True), mask)

    def rank(self, sets):
        return rank_score(torch.stack([s.mean(0) for s in sets]), self.honest)

    def set(self, sets, bills, args):
        """Thresholds from honest traces: scores of all their blocks, tokens billed for each character of an answer [n]."""
        seen = [first_of(s, args.exposure) for s in sets]
        self.honest.copy_(torch.stack([s.mean(0) for s in seen]))
        for i in range(len(self.nets)):
            self.least[i] = threshold(self.scores(seen, i), args.false_alarms)
        for i, share in enumerate(EXPOSURES):
            self.at[i] = threshold(self.scores([first_of(s, share) for s in sets]), args.false_alarms)
        self.rule.copy_(threshold(self.rank(seen), args.false_alarms))
        self.bill.copy_(threshold(-bills, args.false_alarms))


def fit_nets(nets, sets, labels, args):
    """Scores of audits, labels (0: honest, i: FILLERS[i - 1]) -> nothing; net i is fitted without the filler i. Cross-entropy,
    as many honest as inflated."""
    from common import gpu

    labels = torch.tensor(labels)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in sets], batch_first=True)
    scores = torch.nn.utils.rnn.pad_sequence(sets, batch_first=True)
    for i, net in enumerate(nets):
        draws = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 7, i))
        optimizer = torch.optim.Adam(net.parameters(), args.lr)
        of = [(labels == 0).nonzero()[:, 0], ((labels != 0) & (labels != i)).nonzero()[:, 0]]
        for _ in range(args.verifier_steps):
            rows = torch.cat([x[torch.randint(len(x), (64,), generator=draws)] for x in of])
            honest = (labels[rows] == 0).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(scores[rows], mask[rows]), honest)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def parse(row, where):
    """An object of --traces -> (reasoning, answer, what it is asked by or its answer)."""
    from common import UserError

    row = row if isinstance(row, dict) else {}
    reasoning, answer = row.get("reasoning"), row.get("answer")
    if reasoning is None and isinstance(row.get("response"), str):
        before, end, answer = row["response"].partition("</think>")
        reasoning = before.strip().removeprefix("<think>") if end else None
    if not isinstance(reasoning, str) or not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: needs text for reasoning and answer, or a response with </think> in it")
    return reasoning.strip(), answer.strip(), str(row.get("prompt", answer))


def load(args, tokens):
    """-> four splits of problems (tokens, answer): for heads, verifiers, thresholds, and those that are audited."""
    from common import UserError, gpu, tables

    if args.traces is None:
        sizes = (args.problems, args.verified, args.verified, args.items)
        return [[problem(k, args) for k in range(sum(sizes[:i]), sum(sizes[: i + 1]))] for i in range(4)]
    rows = tables.read_rows(args.traces, parse)[0]
    thought = {asked: (tokens(r), a) for r, a, asked in rows if r}  # one a prompt, or splits would share some
    once, none = list(thought.values()), sum(not r for r, _, _ in rows)  # m = 0 is a bill of nothing
    if len(once) < 48:
        raise UserError(f"--traces {args.traces}: {len(once)} prompts have reasoning; 48 are needed to fit and to test")
    random.Random(gpu.hash_seed(args.seed, 1)).shuffle(once)
    n = len(once) // 6
    print(f"traces: of {len(once)} prompts; left out: {none} rows without reasoning", flush=True)
    return [once[: -3 * n], once[-3 * n : -2 * n], once[-2 * n : -n], once[-n:][: args.items]]


# ---------------------------------------------------------------- what is measured


def block_auroc(genuine, false, head):
    """Pairs of scores of genuine and of false blocks -> AUROC of one head, 0: tokens-block, 1: block-answer."""
    from common import measures

    return measures.auroc([pair[head] for pair in genuine + false], [1] * len(genuine) + [0] * len(false))


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    def flagged(auditor, kind, rate):
        return mean(row[auditor][CASES.index((kind, rate))] for row in rows)

    def every(auditor, kind):
        return [[rate, flagged(auditor, kind, rate)] for rate in RATES]

    names, table, heads = {rate: f"+{rate:.0%}" for rate in RATES}, {}, {}
    for auditor, title in (("length", "length alone"), ("rule", "rule"), ("verifier", "DeepSets")):
        over = {names[rate]: mean(flagged(auditor, kind, rate) for kind in FILLERS) for rate in RATES}
        table[f"{title}, mean of the fillers"] = {"false alarms": flagged(auditor, "no filler", 0)} | over
    table["hash tree"] = {"false alarms": mean(row["refused"] for row in rows)}
    genuine = [pair for row in rows for pair in row["blocks"]["no filler"]]
    for i, kind in enumerate(FILLERS):
        false = [pair for row in rows for pair in row["blocks"][kind]]
        heads[kind] = {name: block_auroc(genuine, false, j) for j, name in enumerate(("tokens-block", "block-answer"))}
        others = {"+100%, unseen": mean(row["unseen"][i] for row in rows), "+100%, rule": flagged("rule", kind, 1)}
        table[f"DeepSets: {kind}"] = {names[rate]: y for rate, y in every("verifier", kind)} | others
        table[f"DeepSets: {kind}"] |= {f"AUROC {name}": y for name, y in heads[kind].items()}

    axes, panels = dict(kind="lines", x="tokens added for each true one", y="flagged"), []
    for title, kinds in (("is no reasoning", FILLERS[:5]), ("looks like reasoning", FILLERS[5:])):
        of = {"length alone": every("length", kinds[0])} | {kind: every("verifier", kind) for kind in kinds}
        panels.append(axes | dict(title=f"filler that {title}, DeepSets", of=of))
    of = {k: [[x, mean(row["exposed"][k][i] for row in rows)] for i, x in enumerate(EXPOSURES)] for k in rows[0]["exposed"]}
    panels.append(axes | dict(title="twice the tokens, by what is audited", x="share of the blocks", of=of))
    if all(y is not None for of in heads.values() for y in of.values()):
        panels.append(dict(title="AUROC of genuine blocks against filler", kind="heat", of=heads))
    shares = [[row["forged"][i] / row["tokens"] for row in rows] for i in range(len(FORGED))]
    of = {"measured": [[mean(x), mean(row["met"][i] for row in rows)] for i, x in enumerate(shares)]}
    of["1 - (1 - phi)^q"] = [[mean(x), mean(catch(phi, args.challenges) for phi in x)] for x in shares]
    panels.append(dict(title=f"forged leaves, q = {args.challenges}", kind="lines", x="share forged", y="caught", of=of))
    shown = min((row for row in rows if row["shown"]), key=lambda row: row["tokens"])["shown"]
    title = "filler between the bars; the darker a block, the more the block-answer head doubts it"
    return dict(table=table, panels=[*panels, dict(title=title, kind="tokens", of=shown)])


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import gpu, items, settings

    args, _, device = settings.prepare(__file__, args)
    torch.manual_seed(gpu.hash_seed(args.seed, 2))
    encode = Sentences(args.embedder, args.block_size, device) if args.embedder else Grams(args.frozen)
    splits = load(args, encode.tokens)
    run = items.Items(__file__, args)
    vocabulary = sorted({token for tokens, _ in splits[0] for token in tokens})
    matcher, verifiers, size = Matcher(encode, args), Verifiers(len(splits[2])), args.block_size

    def drawn(*numbers):
        return random.Random(gpu.hash_seed(args.seed, *numbers))

    def fit_heads():
        optimizer = torch.optim.Adam([p for p in matcher.parameters() if p.requires_grad], args.lr)
        for step in range(args.fit_steps):
            first, second = (list(zip(*x)) for x in examples(splits[0], vocabulary, drawn(3, step), args))
            logits = matcher.a(*first[:2]), matcher.b(*second[:2])
            losses = [focal(x, torch.tensor(of[2]), args.gamma).mean() for x, of in zip(logits, (first, second))]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            if (step + 1) % 250 == 0:
                print(f"heads, step {step + 1}: focal loss {losses[0]:.4f}, {losses[1]:.4f}", flush=True)

    run.kept("heads", matcher, fit_heads)

    def audit(cases, k, split, near, *stream):
        """Problem k as billed in these cases -> [(what is billed, numbers of the audited blocks, their scores)]; all blocks
        of the honest bill and of that with twice the tokens, so that an exposure is a part of them."""
        made, claims = [], []
        for i, (kind, rate) in enumerate(cases):
            draws = drawn(*stream, k, i)
            made.append(inflate(kind, rate, k, split, near, vocabulary, draws, size))
            claims.append((*made[-1][:2], split[k][1], 1 if rate in (0, 1) else args.exposure, draws))
        return [(bill, *found) for bill, found in zip(made, judged(matcher, claims, args))]

    def seen(cases, audits):
        return [first_of(s, args.exposure) if rate in (0, 1) else s for (_, rate), (_, _, s) in zip(cases, audits)]

    @torch.no_grad()
    def nearness(split):
        e = torch.nn.functional.normalize(matcher.embed([answer for _, answer in split]), dim=-1)
        return e @ e.T

    def fit_verifiers():
        near, sets, labels = nearness(splits[1]), [], []
        for k in range(len(splits[1])):  # three audits of the honest bill, one with each filler
            cases = CASES[:1] * 3 + list(zip(FILLERS, drawn(4, k).choices(RATES, k=len(FILLERS))))
            sets += seen(cases, audit(cases, k, splits[1], near, 5))
            labels += [0] * 3 + list(range(1, 1 + len(FILLERS)))
        fit_nets(verifiers.nets, sets, labels, args)
        honest = [audit(CASES[:1], k, splits[2], None, 6)[0][2] for k in range(len(splits[2]))]
        bills = torch.tensor([len(tokens) / len(answer) for tokens, answer in splits[2]])
        with torch.no_grad():
            verifiers.set(honest, bills, args)

    run.kept("verifiers", verifiers, fit_verifiers).requires_grad_(False)
    test, near = splits[3], nearness(splits[3])

    for k in run.left(len(test)):
        (tokens, answer), draws = test[k], drawn(7, k)
        # The seller's tree, the auditor's challenges; then trees of which the seller cannot open every leaf.
        m, texts = len(tokens), ["".join(block) for block in blocks_of(tokens, size)]
        with torch.no_grad():
            blocks, words = matcher.embed(texts), matcher.embed(tokens)
        prints = [fingerprint(blocks[i // size], words[i]) for i in range(m)]
        leaves, met, forged = [leaf(data) for data in prints], [], [round(share * m) for share in (0, *FORGED)]
        for n in forged:
            bad, asked = set(draws.sample(range(m), n)), draws.choices(range(m), k=args.challenges)
            levels = tree([leaf(b"nothing" + x) if i in bad else x for i, x in enumerate(leaves)])
            top = root(levels, m)
            met.append(int(not all(verify(prints[i], i, m, proof(levels, i), top) for i in asked)))
        row = dict(item=k, tokens=m, refused=met[0], forged=forged[1:], met=met[1:])
        # What all auditors say of the honest bill and of every filler.
        audits = audit(CASES, k, test, near, 8)
        sets = seen(CASES, audits)
        bills = torch.tensor([(m + round(rate * m)) / len(answer) for _, rate in CASES])
        row |= dict(verifier=(verifiers.scores(sets) < verifiers.least[0]).int().tolist())
        row |= dict(rule=(verifiers.rank(sets) < verifiers.rule).int().tolist())
        row |= dict(length=(-bills < verifiers.bill).int().tolist(), unseen=[], exposed={}, blocks={}, shown={})
        whole = {kind: (i, *audits[i]) for i, (kind, rate) in enumerate(CASES) if rate in (0, 1)}
        for net, (kind, (i, (billed, _, false), picked, scores)) in enumerate(whole.items()):
            parts = [first_of(scores, share) for share in EXPOSURES]
            if kind in ("no filler", *(FILLERS[j] for j in (0, 5, 6, 8))):
                row["exposed"][kind] = (verifiers.scores(parts) < verifiers.at).int().tolist()
            pairs = [[round(x, 4) for x in pair] for pair in scores.tolist()]
            row["blocks"][kind] = [p for p, j in zip(pairs, picked) if false[j] or not net]
            if net:
                row["unseen"].append(int(verifiers.scores(sets[i : i + 1], net) < verifiers.least[net]))
            if k < 8 and kind in (FILLERS[0], FILLERS[6], FILLERS[8]):
                of = dict(zip(picked, pairs))
                bill = [["".join(billed[j])[:24], round(1 - of[j][1], 4)] for j in range(len(billed))]
                row["shown"][kind] = [*bill[: m // size], [" | ", 0], *bill[m // size : sum(false) + m // size], [" | ", 0]]
        run.write(row)

    found = results(run.rows(), args)
    first = list(found["table"].items())[:3]
    said = "; ".join(f"{name} {of['+100%']:.2f} (false alarms {of['false alarms']:.3f})" for name, of in first)
    passes = found["table"][f"DeepSets: {FILLERS[-1]}"]["+100%"]
    run.finish(found, f"flagged of bills with twice the tokens: {said}; {FILLERS[-1]} pass: {passes:.2f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
