"""Byte-level: "Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model Ensembles". Phan, Amos,
Gat, Havasi, Muckley and Ullrich, arXiv 2410.09303 (2024).

Idea: a model of tokens is a model of bytes as well, exactly and without training: the chance of some bytes is a sum over the
few sequences of tokens that they can have begun. A prompt that ends where its text, had it gone on, would have had a longer
token is otherwise read as if that token were excluded: tokenization bias. Bytes are common to all models, so that models with
different tokens can be averaged.

Rule (equation numbers not at hand). A sequence of tokens t is valid where enc(dec(t)) = t; a model of encoded texts gives
others no mass. A cover of the bytes x is a valid t that spells x and begins its last token within x: that alone hangs over, by
rest(t).
    P(x) = sum_(t in cover(x)) prod_i P(t_i | t_<i)                         (the byte-token representation lemma)
    P(x, b) = sum_(t: rest(t)_1 = b) P(t)  +  P(enc(x)) sum_(v: bytes(v)_1 = b, enc(x) v valid) P(v | enc(x))
    P(b | x) = P(x, b) / sum_b' P(x, b'),   b: a byte, or the end;   ensemble: the mean of the models' P(b | x)
A real model gives invalid tokens some mass. It is dropped, never shared out within a sum, since that would break the ratio of
the two terms; the table has its amount.

Beside it: plain tokens, whose next byte is that of v by P(v | enc(x)), and token healing, which takes the last token back and
draws one that begins with it. The released code has SentencePiece's tokens; this is for byte-level BPE, where a token may end
inside a character: valid is then what is so for one of the characters that may come of it, of which each category is tried.
Ours: no blank need stand in a prompt, as the start of the text bounds it; a temperature without the code's 1e-7, which draws
bytes that cannot be. Taken for granted, as in the lemma: what is valid begins with what is valid. In the built-in world texts
end by its law and none is cut to a length: the last token of a cut text would teach where texts were cut.

Smaller = closer to the truth: the distance is total variation, half the sum of |P(b | x) - truth(b | x)|.

Family: inference
Differs from decode.py in: decode, results, main, max_new_tokens, likely, covers, plain, healing, grow, next_byte, push,
                           ensemble, complete, Reader, endings, Tokens, arms,
                           drawn
World: lexicon, truth, words, worlds
Measures: results, shown
Costs: a call of the model for every byte or so, instead of every token, and a re-encoding of a few words for every token
       that may come next: --top-mass looks at the likeliest alone.
Run:   python algos/byte_level.py                                      CPU, a minute or two; once, two warm starts
       python algos/byte_level.py --pieces 120 --second-pieces 26
       python algos/byte_level.py --model qwen2.5-7b --second llama-3.1-8b --items 50
       python algos/byte_level.py --model path/to/folder --task path/to/test.jsonl --temperature 0
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
    items: int = 256
    """completions in all, one a prompt, from the first held-out prompt on"""
    max_new_tokens: int | None = None
    """longest completion, in bytes; a longer one is cut (real models: the code's 500)"""
    temperature: float = 1.0
    """of sampling; 0: the likeliest token"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the weights"""

    # Byte-level
    limits = dict(items="1 <= x", temperature="0 <= x", top_mass="0 < x <= 1", pieces="20 <= x", second_pieces="20 <= x")
    tiny_preset = dict(task="words", second="tiny", top_mass=1.0)
    real_preset = dict(max_new_tokens=500, top_mass=0.999)
    second: str | None = None
    """a model to average with, by bytes (None: none; tiny: one with other pieces)"""
    top_mass: float | None = None
    """of what may come next the likeliest are looked at that have this mass together (tiny: all; else 0.999: ours)"""
    pieces: int = 80
    """vocabulary of the tiny model, learnt by BPE (ours)"""
    second_pieces: int = 40
    """vocabulary of a second tiny model (ours)"""


# ---------------------------------------------------------------- the rule


def law(logits, args):
    """Logits [..., V] -> probabilities of the next token [..., V], float64; at temperature 0 all on the likeliest."""
    if args.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return (logits.double() / args.temperature).softmax(-1)


def pick(p, u):
    """Probabilities [V], a uniform number in [0, 1) -> the token at which their running sum passes it."""
    running = p.cumsum(-1)
    return int(torch.searchsorted(running, u * running[-1], right=True).clamp(max=len(p) - 1))


def likely(some, p, mass):
    """Token ids [n], probabilities [V] -> [(id, probability)] of the likeliest of them that have the share `mass` of theirs."""
    some = torch.as_tensor(some, device=p.device)
    if mass < 1:
        order = p[some].argsort(descending=True, stable=True)
        running = p[some[order]].cumsum(0)
        some = some[order[: int((running < mass * running[-1]).sum()) + 1]]
    return [(v, q) for v, q in zip(some.tolist(), p[some].tolist()) if q > 0]


def covers(x, tokens, reader, mass):
    """Symbols x -> its covers, (ids, rest, P), each P without the factors that all have in common; [] of what is no text."""
    ended = list(tokens.encode(x))
    begun = [(ids, m, some) for m, some in tokens.openings(x) for ids in tokens.encode(x[:m])]
    reader.begin([*ended, *(ids for ids, *_ in begun)])

    def chance(ids):
        p = 1.0
        for i in range(reader.base, len(ids)):
            p *= reader(ids[:i])[ids[i]].item()
        return p

    found = [(ids, (), chance(ids)) for ids in ended]
    for ids, m, some in begun:
        before, window = chance(ids), tokens.window(ids)
        for v, q in likely(some, reader(ids), mass):
            if tokens.valid(window, v):
                found.append((ids + (v,), tokens.pieces[v][len(x) - m :], before * q))
    return found


def plain(x, tokens, reader, mass):
    """The plain arm: of the covers the ids of x alone."""
    ids = next(iter(tokens.encode(x)))
    reader.begin([ids])
    return [(ids, (), 1.0)]


def healing(x, tokens, reader, mass):
    """Token healing: the last of the ids of x is taken back, and one that begins with it is to follow."""
    ids = next(iter(tokens.encode(x)))
    reader.begin([ids[:-1]])
    last = tokens.decode(ids[-1:])
    some = likely(tokens.starting(last), reader(ids[:-1]), mass) if ids else []
    return [(ids[:-1] + (v,), tokens.pieces[v][len(last) :], q) for v, q in some] or [(ids, (), 1.0)]


def grow(found, tokens, reader, mass, valid=True):
    """Covers -> (covers that all hang over: one that ends with x is replaced by what may follow it, at a call of the model;
    the share of that on tokens that are invalid or have no bytes). valid=False: all that have bytes may follow."""
    grown, lost, ended = [cover for cover in found if cover[1]], 0.0, [cover for cover in found if not cover[1]]
    for ids, _, weight in ended:
        p, window = reader(ids), tokens.window(ids)
        for v, q in likely(torch.arange(len(p)), p, mass):
            if tokens.pieces[v] and (not valid or tokens.valid(window, v)):
                grown.append((ids + (v,), tokens.pieces[v], weight * q))
            else:
                lost += weight * q
    if not grown and mass < 1:  # none of the likeliest is valid
        return grow(found, tokens, reader, 1.0, valid)
    return grown, lost / max(sum(weight for *_, weight in ended), 1e-300)


def next_byte(grown):
    """Covers that hang over -> P of the next symbol [257]: a byte, or 256, the end."""
    p = torch.zeros(257, dtype=torch.float64)
    for _, rest, weight in grown:
        p[rest[0]] += weight
    return p / p.sum()


def push(grown, b):
    """Covers that hang over, a symbol -> those of what now is one longer, the heaviest of weight 1."""
    kept = [(ids, rest[1:], weight) for ids, rest, weight in grown if rest[0] == b]
    most = max((weight for *_, weight in kept), default=1.0)
    return [(ids, rest, weight / most) for ids, rest, weight in kept]


def ensemble(grown):
    """Covers that hang over, a list for each model -> the mean of the models' P of the next symbol [257]. A model without any,
    for which what was read is impossible, is left out. ValueError where all are."""
    laws = [next_byte(some) for some in grown if some]
    if not laws:
        raise ValueError("no cover is left: what was read has probability 0")
    return torch.stack(laws).mean(0)


# ---------------------------------------------------------------- decoding


def decode(found, models, uniforms, args):
    """Covers of the prompt, a list for each of the models (x, tokens, reader), uniform numbers -> the bytes drawn."""
    out = []
    for u in uniforms[: args.max_new_tokens]:
        grown = [grow(some, *model[1:], args.top_mass)[0] for some, model in zip(found, models)]
        out.append(pick(law(ensemble(grown).log(), args), u))
        if out[-1] == 256:
            return out[:-1]
        # Where it is none of the likeliest of one of the models, all the tokens that spell it are looked at.
        found = [
            push(some, out[-1]) or some and covers((*x, *out), *model, args.top_mass)
            for some, (x, *model) in zip(grown, models)
        ]
    return out


def complete(found, tokens, reader, uniforms, args):
    """decode.py's loop, whose first token is drawn from covers -> the bytes that hang over it and follow."""
    first = torch.tensor([weight for *_, weight in found], dtype=torch.float64)
    ids, out, _ = found[pick(law(first.log(), args), uniforms[0])]
    for u in uniforms[1:]:
        if 256 in out or len(out) >= args.max_new_tokens:
            break
        ids += (pick(law(reader(ids).log(), args), u),)
        out += tokens.pieces[ids[-1]]
    return [b for b in out if b != 256][: args.max_new_tokens]


class Reader:
    """reader(ids) -> P of the next token [V], float64, behind a prompt's head and ids; what was read before is kept.

    begin(ways): says what ids will be asked for, or the beginnings of those; the first `base` are common to all, and nothing
    is asked before them. calls: of the model, so far."""

    def __init__(self, lm, head):
        self.lm, self.head, self.calls = lm, list(head), 0

    def begin(self, ways):
        from os.path import commonprefix

        from common import engines

        self.ids = tuple(commonprefix(ways))
        self.base, self.calls = len(self.ids), self.calls + 1
        self.decoder = engines.Decoder(self.lm, [[*self.head, *self.ids]])
        self.laws = [self.decoder.logits[0].double().softmax(-1)]

    def __call__(self, ids):
        same = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        if same < len(ids):
            self.decoder.crop(len(self.ids) - same)
            logits = self.decoder.feed(torch.tensor([ids[same:]], device=self.lm.device), every=True)[0]
            self.laws = [*self.laws[: same - self.base + 1], *logits.double().softmax(-1)]
            self.ids, self.calls = tuple(ids), self.calls + 1
        return self.laws[len(ids) - self.base]


def endings(begun):
    """The first bytes of a character -> characters that begin so, one for each kind. Slow: to be kept."""
    import unicodedata

    n, found = 2 if begun[0] < 0xE0 else 3 if begun[0] < 0xF0 else 4, {}
    known, free = begun[0] & 0x7F >> n, 6 * (n - len(begun))
    for byte in begun[1:]:
        known = known << 6 | byte & 0x3F
    for point in range(known << free, min((known + 1) << free, 0x110000)):
        c = chr(point)
        if c.encode(errors="replace").startswith(begun):
            found.setdefault((unicodedata.category(c), c.isspace()), c)
    return list(found.values())


class Tokens:
    """A tokenizer of byte-level BPE as it is for bytes. `pieces`: the symbols of each of `size` tokens: bytes, (256,) of those
    that end a text, () of other special ones."""

    def __init__(self, tokenizer, size, end):
        import functools
        import json

        from common import UserError

        backend = getattr(tokenizer, "backend_tokenizer", None)
        made = json.loads(backend.to_str()) if backend else dict(pre_tokenizer=None, model=dict(type="Python"))
        split, kind = made["pre_tokenizer"] or {}, made["model"]["type"]
        last = split.get("pretokenizers", [split])[-1]
        if kind != "BPE" or last.get("type") != "ByteLevel" or last["add_prefix_space"]:
            what = f"its tokenizer is {kind} behind {last.get('type', 'no splitting')}"
            raise UserError(f"model {tokenizer.name_or_path}: {what}; this script needs byte-level BPE (Qwen, Llama 3)")
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are letters from 256 on
        byte = {chr(b) if b in shown else chr(256 + b - sum(s < b for s in shown)): b for b in range(256)}
        self.pieces, special = [()] * max(size, len(tokenizer)), {*tokenizer.added_tokens_decoder, *end}
        for token, v in tokenizer.get_vocab().items():
            if v not in special:
                self.pieces[v] = tuple(byte[c] for c in token)
        for v in end:
            self.pieces[v] = (256,)
        self.order = sorted((piece, v) for v, piece in enumerate(self.pieces[:size]) if piece)
        self.longest, self.known, self.plain = max(map(len, self.pieces)), {}, backend.normalizer
        self.split, self.endings = backend.pre_tokenizer.pre_tokenize_str, functools.cache(endings)
        self.bpe = functools.lru_cache(2**18)(lambda word: tuple(token.id for token in backend.model.tokenize(word)))

    def decode(self, ids):
        """Ids -> symbols."""
        return tuple(b for v in ids for b in self.pieces[v])

    def encode(self, x):
        """Symbols -> {ids: where in them the words begin}: one, or where x ends inside a character one for each way to split;
        none where x is no text, or one that the tokenizer would change."""
        try:
            text, begun = bytes(x).decode(), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return {}
            text, begun = bytes(x[: error.start]).decode(), bytes(x[error.start :])
        except ValueError:  # an end
            return {}
        if self.plain and self.plain.normalize_str(text) != text:
            return {}
        found = {}
        for c in self.endings(begun) if begun else [""]:
            words, ids, starts = [word for word, _ in self.split(text + c)], (), []
            if begun:
                words[-1] = words[-1][: len(begun) - len(c.encode())]
            for word in words:
                starts.append(len(ids))
                ids += self.bpe(word)
            if self.decode(ids) == tuple(x):
                found[ids] = starts
        return found

    def divide(self, ids, start):
        """A prompt's ids, the token that a text starts with -> (the ids up to the last special one, the symbols behind it)."""
        from common import UserError

        n = max((i + 1 for i, v in enumerate(ids) if self.pieces[v] in ((), (256,))), default=0)
        x = self.decode(ids[n:])
        if not self.encode(x):
            raise UserError(f"the prompt {bytes(x).decode(errors='replace')[-60:]!r}: its tokenizer would change it")
        return ids[:n] or [start], x

    def window(self, ids):
        """Valid ids -> their end, from where the third last word begins: what follows does not change the split before."""
        starts = self.encode(self.decode(ids))[ids]
        return ids[starts[-3] if len(starts) > 2 else 0 :]

    def valid(self, window, v):
        """Whether v may follow valid ids, whose window() this is."""
        some = window + (v,)
        if some not in self.known:
            if len(self.known) >= 2**20:
                self.known.clear()
            x = self.decode(some)
            if ended := x[-1:] == (256,):  # where a character does
                x = x[:-1]
            self.known[some] = bytes(x).decode(errors="ignore").encode() == bytes(x) if ended else some in self.encode(x)
        return self.known[some]

    def starting(self, x):
        """Tokens that begin with the symbols x."""
        from bisect import bisect

        return [v for _, v in self.order[bisect(self.order, (x,)) : bisect(self.order, (x + (257,),))]]

    def openings(self, x):
        """[(m, tokens that begin with all that x has from m on, and hang over)]."""
        for m in range(max(0, len(x) - self.longest), len(x)):
            some = [v for v in self.starting(x[m:]) if len(self.pieces[v]) > len(x) - m]
            if some:
                yield m, some


# ---------------------------------------------------------------- what is measured


def arms(n):
    """What n models are asked by: {name: (rule, which of them)}."""
    of = {"tokens": (plain, [0]), "token healing": (healing, [0]), "bytes": (covers, [0])}
    return of | ({"bytes, second": (covers, [1]), "bytes, averaged": (covers, [0, 1])} if n > 1 else {})


def drawn(rule, models, uniforms, args):
    """A rule of arms(); models (lm, tokens, head of the prompt, x) -> law of the next byte, text drawn, covers by the first
    model, what is told of it."""
    asked = [(x, tokens, Reader(lm, head)) for lm, tokens, head, x in models]
    found = [rule(*model, args.top_mass) for model in asked]
    grown, lost = zip(*(grow(some, *model[1:], args.top_mass, rule is covers) for some, model in zip(found, asked)))
    out = decode(found, asked, uniforms, args) if rule is covers else complete(found[0], *asked[0][1:], uniforms, args)
    told = dict(lost=lost[0], calls=sum(reader.calls for *_, reader in asked), bytes=len(out))
    return ensemble(grown), bytes(out).decode(errors="replace"), found[0], told


def shown(found, laws, tokens):
    """Of an item's covers: the share of those that hang over, and the five heaviest; and each law's four likeliest symbols."""

    def text(x):
        text = "end" if 256 in x else bytes(x).decode(errors="replace").replace(" ", "\u2423")
        return "".join(c if c.isprintable() else "\ufffd" for c in text)

    total = sum(weight for *_, weight in found)
    five = sorted(found, key=lambda cover: -cover[2])[:5]
    five = [["|".join(text(tokens.pieces[v]) for v in ids[-6:]), text(rest), weight / total] for ids, rest, weight in five]
    firsts = {name: [[text([b]), p[b].item()] for b in p.topk(4).indices.tolist() if p[b]] for name, p in laws.items()}
    return dict(inside=sum(weight for _, rest, weight in found if rest) / total, covers=five, laws=firsts)


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    of, table, known = {k: rule for k, rule in arms(2).items() if k in rows[0]}, {}, rows[0]["tokens"]["far"] is not None
    parts = {"all": rows, "a token may go on": [row for row in rows if row["inside"] >= 0.01]}
    parts["none may"] = [row for row in rows if row["inside"] < 0.01]

    def mean(some, arm, key):
        return sum(row[arm][key] for row in some) / len(some) if some else None

    for arm, (rule, which) in of.items():
        table[arm] = {f"distance, {part}": mean(some, arm, "far") for part, some in parts.items()} if known else {}
        table[arm] |= dict(right=mean(rows, arm, "right"))
        table[arm] |= {"calls per byte": mean(rows, arm, "calls") / max(mean(rows, arm, "bytes"), 1e-9)}
        if rule is covers and len(which) == 1:
            table[arm] |= {"mass on invalid tokens": mean(rows, arm, "lost"), "most": max(row[arm]["lost"] for row in rows)}
    panels = []
    if known:
        bars = {arm: table[arm]["distance, all"] for arm in of}
        panels.append(dict(title="next byte: distance to the truth", kind="bars", of=bars))
        points = {arm: sorted([row["inside"], row[arm]["far"]] for row in rows) for arm in list(of)[:3]}
        axes = dict(x="share of P(prompt) in covers that hang over", y="distance to the truth")
        panels.append(dict(title="by whether the last token may go on", kind="points", of=points) | axes)
    panels.append(dict(title="completions that are right", kind="bars", of={arm: table[arm]["right"] for arm in of}))
    best = max(rows, key=lambda row: (len(row["covers"]), row["token healing"]["far"] or 0.0))
    ids, rest, _ = best["covers"][0]
    title = f"a prompt of many covers, the worst for token healing: {ids.replace('|', '').removesuffix(rest)}"
    of = {f"cover {n + 1}": [["", 0.0]] for n in range(5)}
    for label, (ids, rest, share) in zip(of, best["covers"]):
        of[label] = [[f"{share:.3f} ", share], [f" {ids} ", 0.0], [f" hangs over: {rest}" if rest else "", 0.0]]
    of |= {f"next, {name}": [[f"{b} {q:.3f}  ", q] for b, q in some] for name, some in best["laws"].items()}
    return dict(table=table, panels=[*panels, dict(title=title, kind="tokens", of=of)])


# ---------------------------------------------------------------- the world


def lexicon():
    """{word: probability}: 48 made-up words, stems with endings, whose probabilities differ by up to a hundred times."""
    from random import Random

    rng, stems = Random(0), "ban dorm kel mist tur lap gran shel".split()
    heavy = {stem + end: 100 ** rng.random() for stem in stems for end in ["", "s", "er", "ed", "ing", "ion"]}
    return {word: weight / sum(heavy.values()) for word, weight in heavy.items()}


def truth(begun, stop=0.4):
    """What there is of a word -> P of the next symbol [257]."""
    p = torch.zeros(257, dtype=torch.float64)
    for word, q in lexicon().items():
        if word == begun:
            p[32], p[256] = (1 - stop) * q, stop * q
        elif word.startswith(begun):
            p[ord(word[len(begun)])] += q
    return p / p.sum()


def words(size, seed, stop=0.4):
    """The task words: a prompt is a text of words cut anywhere, the last of which is to be completed. Its tokenizer is
    byte-level BPE of `size` tokens, learnt on such texts. seed: of the model; stop: chance that a text ends behind a word."""
    from random import Random

    from common import tasks

    law = lexicon()

    def text(rng):
        n = 1
        while rng.random() >= stop:
            n += 1
        return "".join(f" {word}" for word in rng.choices(list(law), list(law.values()), k=n))

    def tokenizer():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        rng, made = Random(1), Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>"], show_progress=False)
        made.train_from_iterator([text(rng) for _ in range(2000)], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", model_max_length=1024)

    def check(text, answer):
        word = (answer + text).split(" ")[0]
        return word, float(word in law)

    rng, test = Random(2), []
    for i, whole in enumerate(text(rng) for _ in range(512)):
        prompt = whole[: rng.randint(1, len(whole))]
        test.append(tasks.Example(i, "<eos>" + prompt, prompt.rpartition(" ")[2]))
    own = dict(demonstrate=lambda rng, e, careful: text(rng), tokenizer=tokenizer, max_new_tokens=12, inline=True)
    own |= dict(recipe=dict(steps=500, careful_steps=500, batch=32, lr=3e-3, seed=seed))
    return tasks.Task("words", [tasks.Example(512, "<eos>", "")], test, check, **own)


def worlds(args, second):
    """-> a function of a task's name: the Task that a tiny model, the first or the second, is made for."""
    from common import tasks

    def task(name):
        return words(args.second_pieces if second else args.pieces, int(second)) if name == "words" else tasks.world(name)

    return task


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dataclasses import replace

    from common import UserError, gpu, items, models, rewards, settings, tasks

    warm = [worlds(args, False), worlds(args, True)]
    args, config, device = settings.prepare(__file__, args, warm[0])
    named = [models.locate(name) and name for name in (args.model, args.second) if name]
    asked = []  # (lm, tokens, start of a text, examples) of each model
    for own, world in zip([replace(args, model=name) for name in named], warm):
        shape, _ = models.architecture(own, world)
        tokenizer = models.load_tokenizer(own, world)
        if args.task == "words" and getattr(shape, "warm_started_on", None) != "words":
            raise UserError(f"--task words is the tiny models' own: {own.model} needs another")
        task = world(args.task) or tasks.load(args.task)
        task = tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt)
        models.check_context(shape, task, args)
        lm, start = models.load(own, device, trainable=False, warm=world).lm, tokenizer.bos_token_id
        tokens = Tokens(tokenizer, shape.get_text_config().vocab_size, models.end_tokens(lm, tokenizer))
        asked.append((lm, tokens, tokenizer.eos_token_id if start is None else start, task.test))
    run = items.Items(__file__, args, config)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    for i in run.left(args.items):
        # An item's numbers are its own: whatever was asked before, its text is the same.
        draws = torch.Generator().manual_seed(gpu.hash_seed(args.seed, i))
        uniforms = torch.rand(args.max_new_tokens + 1, dtype=torch.float64, generator=draws).tolist()
        k, row = i % len(task.test), dict(item=i)
        prompts = [(lm, tokens, *tokens.divide(examples[k].ids, start)) for lm, tokens, start, examples in asked]
        laws, answer = dict(truth=truth(task.test[k].answer)) if args.task == "words" else {}, task.test[k].answer
        for arm, (rule, which) in arms(len(asked)).items():
            with torch.no_grad():
                laws[arm], out, found, of = drawn(rule, [prompts[n] for n in which], uniforms, args)
            _, (of["right"],) = scorer([out], [answer])
            of["far"] = (laws[arm] - laws["truth"]).abs().sum().item() / 2 if "truth" in laws else None
            row[arm] = of | dict(text=out)
            row |= shown(found, laws, prompts[0][1]) if arm == "bytes" else {}
        run.write(row)

    found = results(run.rows(), args)
    right = ", ".join(f"{arm} {of['right']:.3f}" for arm, of in found["table"].items())
    lost = found["table"]["bytes"]["mass on invalid tokens"]
    run.finish(found, f"right, by {right}; mass on invalid tokens {lost:.4f}; {args.items} held-out prompts")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
