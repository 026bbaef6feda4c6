"""Bytes from models of tokens: worked numbers, sums over all sequences of tokens, tokenizers of real kinds and prompts that end
anywhere, the average of two models, the world, and the script as a user runs it."""

import functools
import itertools
import json
import random
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from algos import byte_level as script
from common import UserError, settings
from tests.helpers import ROOT, lines, run, user_error

SCRIPT = ROOT / "algos" / "byte_level.py"
TEXTS = """The cats' dream isn't 12345 or 67, it's naïve: où? Ça va bien, señor Müller!  Two blanks,   three.
Привет, мир! Как дела? 你好，世界。日本語のテキスト。 \n\n  An indent\tand a tab. 🙂🙃 emoji.
The theme there then. e\u0301 in two."""
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bpe(size, texts=(TEXTS,), split=SPLIT, bos=None, plain=None, alphabet=True, add_prefix_space=False):
    """Byte-level BPE of `size` tokens as Qwen and Llama 3 have it: their way to split, all the bytes."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    first = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([*first, level]), decoders.ByteLevel()
    special = ["<pad>", "<eos>"] + ([bos] if bos else [])
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(texts, trainer)
    if plain:
        made.normalizer = plain
    names = dict(pad_token="<pad>", eos_token="<eos>", model_max_length=512) | (dict(bos_token=bos) if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@functools.cache
def real():
    """(tokenizer, Tokens) of 300 tokens."""
    tokenizer = bpe(300)
    return tokenizer, script.Tokens(tokenizer, 310, [1])


class Hand(script.Tokens):
    """Tokens by hand: the pieces of all ids, and bytes -> ids."""

    def __init__(self, pieces, encoder):
        self.pieces = [p.encode() and tuple(p.encode()) if p != "end" else (256,) for p in pieces]
        self.order = sorted((piece, v) for v, piece in enumerate(self.pieces) if piece)
        self.longest, self.known, self.encoder = max(map(len, self.pieces)), {}, encoder

    def encode(self, x):
        return {} if 256 in x else {tuple(self.encoder(bytes(x).decode())): [0]}


class Law:
    """What a Reader is, of a function of ids."""

    base = 0

    def __init__(self, law):
        self.law = law

    def begin(self, ways):
        pass

    def __call__(self, ids):
        return torch.as_tensor(self.law(ids), dtype=torch.float64)


def next_byte(text, tokens, reader, rule=script.covers):
    """P of the next symbol behind a text, as {symbol: P} of those that have any."""
    x = tuple(text.encode()) if isinstance(text, str) else tuple(text)
    grown, _ = script.grow(rule(x, tokens, reader, 1.0), tokens, reader, 1.0, rule is script.covers)
    p = script.next_byte(grown)
    return {"end" if b == 256 else chr(b): q for b, q in enumerate(p.tolist()) if q}


def left_to_right(text):
    """A, B and AA of the chain of two letters."""
    ids = []
    while text:
        n = 2 if text.startswith("AA") else 1
        ids.append(2 if n == 2 else "AB".index(text[0]))
        text = text[n:]
    return ids


def chain(ids):
    """The first worked model of tokens A, B, AA."""
    return {(): [0, 1, 0], 1: [0.12, 0.6, 0.28], 0: [0, 1, 0], 2: [0.21, 0.3, 0.49]}[ids[-1] if ids else ()]


def merged(text):
    """a, b, c, bc, abc: bc is merged first, then abc."""
    ids = ["abc".index(c) for c in text]
    for pair, new in (((1, 2), 3), ((0, 3), 4)):
        i = 0
        while i + 1 < len(ids):
            if (ids[i], ids[i + 1]) == pair:
                ids[i : i + 2] = [new]
            i += 1
    return ids


def independent(ids):
    """The second worked model of tokens a, b, c, bc, abc: bytes of .5, .3, .2 alone."""
    first = [0.47, 0.24, 0.20, 0.06, 0.03]
    barred = {0: 3, 1: 2}.get(ids[-1] if ids else None)  # no bc behind a, no c behind b
    return [0 if v == barred else p / (1 - (0 if barred is None else first[barred])) for v, p in enumerate(first)]


# ---------------------------------------------------------------- the rule


def test_worked_chain():
    tokens, reader = Hand(["A", "B", "AA"], left_to_right), Law(chain)
    found = {ids: (bytes(rest), p) for ids, rest, p in script.covers(tuple(b"BA"), tokens, reader, 1.0)}
    assert found == {(1, 0): (b"", 0.12), (1, 2): (b"A", 0.28)}
    assert next_byte("BA", tokens, reader) == pytest.approx({"A": 0.7, "B": 0.3}, abs=1e-12)
    assert next_byte("BA", tokens, reader, script.plain) == {"B": 1.0}
    found = {ids: p for ids, _, p in script.covers(tuple(b"BAAA"), tokens, reader, 1.0)}
    assert found == pytest.approx({(1, 2, 0): 0.28 * 0.21, (1, 2, 2): 0.28 * 0.49}, abs=1e-12)
    assert next_byte("BAAA", tokens, reader) == pytest.approx({"A": 0.7, "B": 0.3}, abs=1e-12)


def test_worked_independent_bytes():
    tokens, reader = Hand(["a", "b", "c", "bc", "abc"], merged), Law(independent)
    found = {ids: p for ids, _, p in script.covers(tuple(b"ab"), tokens, reader, 1.0)}
    assert found == pytest.approx({(0, 1): 0.12, (4,): 0.03}, abs=1e-6)
    law = next_byte("ab", tokens, reader)
    assert law["c"] == pytest.approx(0.2, abs=1e-6)
    assert "c" not in next_byte(
        "ab", tokens, Law(lambda ids: [0.5, 0.3, 0, 0.1, 0.1] if ids else independent(ids)), script.plain
    )
    healed = script.healing(tuple(b"ab"), tokens, reader, 1.0)
    assert [(ids, bytes(rest)) for ids, rest, _ in healed] == [((0, 1), b"")]  # behind a lone a no bc
    assert "c" not in next_byte("ab", tokens, reader, script.healing)


def test_worked_ensemble_and_temperature():
    def grown(p):
        return [((), (ord("A"),), p), ((), (ord("B"),), 1 - p)]

    assert script.ensemble([grown(0.7), grown(0.5)])[[65, 66]].tolist() == pytest.approx([0.6, 0.4], abs=1e-12)
    assert script.ensemble([[], grown(0.5)])[[65, 66]].tolist() == [0.5, 0.5]  # one for which it is impossible
    with pytest.raises(ValueError, match="probability 0"):
        script.ensemble([[], []])
    p = torch.tensor([0.7, 0.3], dtype=torch.float64)
    heated = script.law(p.log(), SimpleNamespace(temperature=0.6)).tolist()
    assert heated == pytest.approx([0.804107, 0.195893], abs=1e-6)
    assert script.law(p.log(), SimpleNamespace(temperature=0)).tolist() == [1, 0]


def test_two_tokens_of_the_same_bytes():
    """Only the one that the encoder gives counts; and what the other one has is lost, not moved."""
    tokens, twice = Hand(["A", "B", "AA"], left_to_right), Hand(["A", "B", "AA", "A", "AA"], left_to_right)
    reader = Law(lambda ids: [*(0.9 * p for p in chain(ids)), 0.04, 0.06] if ids == (1,) else [*chain(ids), 0, 0])
    found = {ids: p for ids, _, p in script.covers(tuple(b"BA"), twice, reader, 1.0)}
    assert found == pytest.approx({(1, 0): 0.9 * 0.12, (1, 2): 0.9 * 0.28}, abs=1e-12)
    assert next_byte("BA", twice, reader) == pytest.approx(next_byte("BA", tokens, Law(chain)), abs=1e-12)
    _, lost = script.grow([((1,), (), 1.0)], twice, reader, 1.0)
    assert lost == pytest.approx(0.1)


def test_push():
    grown = [((1,), (65, 66), 0.2), ((2,), (65,), 0.1), ((3,), (66,), 0.7)]
    assert script.push(grown, 65) == [((1,), (66,), 1.0), ((2,), (), 0.5)]
    assert script.push(grown, 67) == []


def test_likely():
    p = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3], dtype=torch.float64)
    assert script.likely(range(5), p, 1.0) == [(0, 0.1), (2, 0.4), (3, 0.2), (4, 0.3)]
    assert [v for v, _ in script.likely(torch.arange(5), p, 0.7)] == [2, 4]
    assert [v for v, _ in script.likely(torch.arange(5), p, 0.71)] == [2, 4, 3]
    assert [v for v, _ in script.likely([0, 3], p, 0.5)] == [3]  # of theirs, not of all


# ---------------------------------------------------------------- all sequences of tokens


def random_lm(size, seed=0):
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(seed)
    own = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.5, tie_word_embeddings=False)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=size, max_position_embeddings=512, **shape, **own)).double().eval()


class Masked:
    """A reader whose invalid tokens have probability 0."""

    def __init__(self, reader, tokens):
        self.reader, self.tokens, self.masks = reader, tokens, {}
        self.begin = reader.begin

    @property
    def base(self):
        return self.reader.base

    def __call__(self, ids):
        if ids not in self.masks:
            window = self.tokens.window(ids)
            valid = [bool(piece) and self.tokens.valid(window, v) for v, piece in enumerate(self.tokens.pieces)]
            self.masks[ids] = torch.tensor(valid).double()
        p = self.reader(ids) * self.masks[ids]
        return p / p.sum()


class Anew:
    """A reader without a cache, each pass over everything, that keeps all it has read."""

    base, calls = 0, 0

    def __init__(self, lm, head):
        self.lm, self.head, self.seen = lm, head, {}

    def begin(self, ways):
        pass

    def __call__(self, ids):
        if ids not in self.seen:
            self.seen[ids] = self.lm(torch.tensor([[*self.head, *ids]])).logits[0, -1].double().softmax(-1)
        return self.seen[ids]


def brute_force(x, tokens, reader, ids=()):
    """P of all sequences of tokens, valid or not, that spell x and begin their last token within it."""
    total = 0.0
    for v, piece in enumerate(tokens.pieces):
        n = min(len(piece), len(x))
        if piece and piece[:n] == x[:n]:
            p = reader(ids)[v].item()
            total += p * (brute_force(x[n:], tokens, reader, ids + (v,)) if len(x) > n and p else 1.0)
    return total


@functools.cache
def small():
    """Three letters, BPE of 14 tokens."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc", [5, 3, 2], k=12)) for _ in range(300)]
    tokenizer = bpe(14, texts, split=None, alphabet=False)
    assert len(tokenizer) == 14
    return script.Tokens(tokenizer, 14, [1])


@torch.no_grad()
def test_covers_are_all_there_is():
    """The sum of covers is the sum over all sequences, and texts of up to five letters, ended or going on, make up 1."""
    tokens, lm, mass = small(), random_lm(14), 0.0
    anew = Masked(Anew(lm, [1]), tokens)
    raw, short = Anew(lm, [1]), []
    for n in range(1, 6):
        for letters in itertools.product(b"abc", repeat=n):
            reader = script.Reader(lm, [1])
            reader.begin([()])
            reader.begin = lambda ways: None  # sums from the start on, and not from what covers have in common
            found = script.covers(letters, tokens, Masked(reader, tokens), 1.0)
            p, ids = sum(p for *_, p in found), next(iter(tokens.encode(letters)))
            assert p == pytest.approx(brute_force(letters, tokens, anew), rel=0, abs=1e-12)
            whole = next(p for some, rest, p in found if some == ids and not rest)
            mass += p if n == 5 else whole * anew(ids)[1].item()
            short += [sum(p for *_, p in script.covers(letters, tokens, raw, 1.0))] if n == 4 else []
    assert mass + anew(())[1].item() == pytest.approx(1, rel=0, abs=1e-12)
    assert sum(short) < 0.99  # a model that gives invalid tokens mass loses it


@torch.no_grad()
def test_bytes_of_a_real_tokenizer_sum_up():
    """Behind any bytes, in a character as well, the symbols that may come have the mass of what is there, and each the covers
    of what is one longer."""
    _, tokens = real()
    lm = random_lm(310)
    reader = Masked(Anew(lm, [1]), tokens)
    for text in ("é", "你", "the ", "12345"):
        x = tuple(text.encode())
        for m in range(1, len(x) + 1):
            found = script.covers(x[:m], tokens, reader, 1.0)
            assert sum(p for *_, p in found) == pytest.approx(brute_force(x[:m], tokens, reader), rel=1e-12, abs=0)
            grown, lost = script.grow(found, tokens, reader, 1.0)
            assert lost < 1e-12
            assert sum(p for *_, p in grown) == pytest.approx(sum(p for *_, p in found), rel=1e-12)
            if m < len(x):
                longer = {ids: p for ids, _, p in script.covers(x[: m + 1], tokens, reader, 1.0)}
                pushed = {ids: p for ids, _, p in script.push(grown, x[m])}
                most = max(longer.values())
                assert pushed == pytest.approx({ids: p / most for ids, p in longer.items()}, rel=1e-9)


@torch.no_grad()
def test_a_prompt_that_ends_inside_a_character():
    _, tokens = real()
    raw = Anew(random_lm(310), [1])
    for text in ("Ça", "世界", "🙂"):
        first = text[0].encode()
        for m in range(1, len(first)):
            law = next_byte(first[:m], tokens, raw)
            assert law and all(0x80 <= ord(c) < 0xC0 for c in law if c != "end") and "end" not in law
        assert "end" in next_byte(first, tokens, raw)


@torch.no_grad()
def test_a_prompt_of_one_byte():
    tokens, reader = small(), Law(lambda ids: [0, 0.1, *[0.9 / 12] * 12])
    found = script.covers(tuple(b"a"), tokens, reader, 1.0)
    begin = [v for v, piece in enumerate(tokens.pieces) if piece[:1] == tuple(b"a")]
    assert sorted(ids for ids, *_ in found) == sorted((v,) for v in begin) and len(begin) > 1
    assert sum(p for *_, p in found) == pytest.approx(0.9 / 12 * len(begin))


# ---------------------------------------------------------------- tokenizers


def some_texts(n, seed=0):
    """Texts of pieces of TEXTS and of blanks, digits, marks."""
    rng, bits = random.Random(seed), [*TEXTS, " ", "  ", "\n", " \n", "'s", "'", "the", "ing", "9", "é", "🙂", "你好"]
    return [unicodedata.normalize("NFC", "".join(rng.choices(bits, k=rng.randint(1, 14)))) for _ in range(n)]


def test_encodings_are_the_tokenizer_s():
    tokenizer, tokens = real()
    for text in some_texts(300):
        ids = tuple(tokenizer(text)["input_ids"])
        assert list(tokens.encode(text.encode())) == [ids]
        assert bytes(tokens.decode(ids)) == text.encode()
        assert tokens.encode((*text.encode(), 256)) == {}
    assert tokens.encode(b"a\xff") == tokens.encode(b"\xc3a") == tokens.encode(b"\xc3abc") == {}
    assert tokens.encode(b"") == {(): []}


def test_what_follows_is_found_from_any_byte_on():
    """The tokens of a text, as far as they cover its first n bytes, are among the covers of these; and validity by the
    last words is validity by all."""
    tokenizer, tokens = real()
    flat = Law(lambda ids: [1 / 310] * 310)
    for text in some_texts(40, seed=1):
        x, ids = tuple(text.encode()), tuple(tokenizer(text)["input_ids"])
        for n in range(1, len(x) + 1):
            k = next(k for k in range(len(ids) + 1) if len(tokens.decode(ids[:k])) >= n)
            found = [some for some, *_ in script.covers(x[:n], tokens, flat, 1.0)]
            assert ids[:k] in found and len(found) == len(set(found))
    for text in some_texts(25, seed=2):
        ids = tuple(tokenizer(text)["input_ids"])
        window = tokens.window(ids)
        assert ids[len(ids) - len(window) :] == window
        for v in range(2, 300):
            assert tokens.valid(window, v) == (ids + (v,) in tokens.encode(tokens.decode(ids + (v,))))


def test_the_character_that_is_begun_decides_where_a_word_ends():
    """Behind a the byte C3 may begin a letter, which joins a's word and so its token, or a sign, which does not."""
    tokens = script.Tokens(bpe(262, ["".join(f"a{c} " for c in "àáâãäåçèéêëìíîïñòóôõöùúûü")]), 262, [1])
    number = {bytes(piece): v for v, piece in enumerate(tokens.pieces) if piece and piece != (256,)}
    joined, apart = (number[b"a\xc3"],), (number[b"a"], number[b"\xc3"])
    assert set(tokens.encode(b"a\xc3")) == {joined, apart}
    found = script.covers(tuple(b"a\xc3"), tokens, Law(lambda ids: [1 / 262] * 262), 1.0)
    assert {ids for ids, rest, _ in found if not rest} == {joined, apart}


def test_blanks_and_line_breaks():
    """Words of blanks grow and split again by what follows: it is enough to look at the last three."""
    rng = random.Random(0)
    texts = ["".join(rng.choices([" ", "  ", "\n", "\n\n", "a", " a"], k=20)) for _ in range(200)]
    tokens, valid = script.Tokens(bpe(280, texts), 280, [1]), 0
    blank = [v for v, piece in enumerate(tokens.pieces) if piece and set(piece) <= set(b" \na")]
    for text in map("".join, itertools.product(" \na", repeat=5)):
        (ids,) = tokens.encode(text.encode())
        for v in blank:
            whole = ids + (v,) in tokens.encode(tokens.decode(ids + (v,)))
            assert tokens.valid(tokens.window(ids), v) == whole
            valid += whole
    assert 0 < valid < 3**5 * len(blank)


def test_a_window_is_short():
    tokenizer, tokens = real()
    ids = tuple(tokenizer("the cats dream " * 50 + "there")["input_ids"])
    assert 1 <= len(tokens.window(ids)) < 20
    assert tokens.known is not None and tokens.valid(tokens.window(ids), 1)  # a text may end behind a word


def test_validity_is_kept(monkeypatch):
    tokens, calls = small(), []
    encode = tokens.encode
    monkeypatch.setattr(tokens, "encode", lambda x: calls.append(x) or encode(x))
    monkeypatch.setattr(tokens, "known", {})
    answers = [tokens.valid((2,), v) for v in range(2, 14)]
    before = len(calls)
    assert before > 1 and answers == [tokens.valid((2,), v) for v in range(2, 14)] and len(calls) == before


def test_what_a_tokenizer_changes_is_no_text():
    tokens = script.Tokens(bpe(300, plain=normalizers.NFC()), 310, [1])
    assert tokens.encode("é".encode()) and not tokens.encode("e\u0301".encode())
    some = tokens.window(next(iter(tokens.encode(b"e"))))
    mark = next(iter(tokens.encode("\u0301".encode())))[0]
    assert not any(c[:2] == (*some, mark) for c in tokens.encode("e\u0301".encode()))
    with pytest.raises(UserError, match="would change it"):
        tokens.divide(next(iter(real()[1].encode("e\u0301".encode()))), 1)


def test_characters_that_a_byte_begins():
    found = script.endings(b"\xc3")
    assert len(found) == len({unicodedata.category(c) for c in found}) > 2 and all(c.encode()[0] == 0xC3 for c in found)
    assert all(c.encode().startswith(b"\xe4\xbd") for c in script.endings(b"\xe4\xbd"))
    assert script.endings(b"\xf0\x9f\x99") and script.endings(b"\xed\xa0") == []  # surrogates are no characters
    assert script.endings(b"\xf0") and {len(c.encode()) for c in script.endings(b"\xf0")} == {4}


def test_prompts_are_divided_behind_special_tokens():
    tokenizer, tokens = real()
    ids = tokenizer("the <eos><pad>cat")["input_ids"]
    head, x = tokens.divide(ids, 1)
    assert head == ids[: ids.index(0) + 1] and bytes(x) == b"cat"
    assert tokens.divide(tokenizer("cat")["input_ids"], 7)[0] == [7]
    assert tokens.divide([1], 7) == ([1], ())


@pytest.mark.parametrize("kind", ["characters", "words", "blank", "sentencepiece"])
def test_other_tokenizers_are_refused(kind):
    from common.worlds import tiny

    if kind == "characters":
        tokenizer = tiny.characters()
    elif kind == "words":
        made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    elif kind == "blank":
        tokenizer = bpe(300, add_prefix_space=True)
    else:
        made = Tokenizer(models.BPE({"<eos>": 0, "\u2581": 1, "a": 2}, []))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    with pytest.raises(UserError, match="needs byte-level BPE"):
        script.Tokens(tokenizer, 100, [1])


# ---------------------------------------------------------------- reading and decoding


@torch.no_grad()
def test_a_reader_reads_as_one_pass_does():
    lm, rng = random_lm(14), random.Random(0)
    reader, anew = script.Reader(lm, [1, 5]), Anew(lm, [1, 5])
    ways = [(3, 4, *rng.choices(range(2, 14), k=rng.randint(0, 5))) for _ in range(40)]
    reader.begin(ways)
    assert reader.base >= 2 and reader.calls == 1
    for ids in ways:
        torch.testing.assert_close(reader(ids), anew(ids), rtol=0, atol=1e-12)
    calls = reader.calls
    assert calls < len(ways) and torch.equal(reader(ways[-1]), reader(ways[-1])) and reader.calls == calls


def options(**own):
    return SimpleNamespace(**dict(temperature=1.0, top_mass=1.0, max_new_tokens=6) | own)


@torch.no_grad()
def test_texts_have_the_law_of_bytes():
    """Every text of three letters comes up as often as its bytes' probabilities say, number by number."""
    tokens, reader = Hand(["A", "B", "AA"], left_to_right), Law(chain)
    x = tuple(b"BA")
    for u, expected in (([0.69, 0.0], "AA"), ([0.71, 0.0], "BA"), ([0.0, 0.71], "AB"), ([0.71, 0.41], "BB")):
        found = script.covers(x, tokens, reader, 1.0)
        assert bytes(script.decode([found], [(x, tokens, reader)], u, options(max_new_tokens=2))).decode() == expected


@torch.no_grad()
def test_an_end_ends_a_text():
    tokens = Hand(["A", "B", "AA", "end"], left_to_right)
    reader = Law(lambda ids: [0.4, 0.3, 0.2, 0.1])
    found, model = script.covers((66,), tokens, reader, 1.0), ((66,), tokens, reader)
    assert script.decode([found], [model], [0.0, 0.999, 0.0], options()) == [65]
    assert script.complete(script.plain(*model, 1.0), *model[1:], [0.0, 0.0, 0.999, 0.0], options()) == [65]
    assert script.complete(script.plain(*model, 1.0), *model[1:], [0.0, *[0.8] * 9], options(max_new_tokens=3)) == [65] * 3


@torch.no_grad()
def test_a_byte_that_one_model_thinks_little_of(monkeypatch):
    """It is drawn from the other: all the tokens that spell it are looked at, and the model goes on."""
    tokens = Hand(["A", "B", "AA"], left_to_right)
    readers = [Law(lambda ids: [0.01, 0.98, 0.01]), Law(lambda ids: [0.98, 0.01, 0.01])]
    models, seen = [((66,), tokens, reader) for reader in readers], []
    found = [script.covers(*model, 1.0) for model in models]
    mean = script.ensemble
    monkeypatch.setattr(script, "ensemble", lambda grown: seen.append([len(some) for some in grown]) or mean(grown))
    assert bytes(script.decode(found, models, [0.1, 0.1, 0.9], options(top_mass=0.9, max_new_tokens=3))) == b"AAB"
    assert all(n > 0 for step in seen for n in step)


# ---------------------------------------------------------------- the world


def test_the_truth_is_the_world_s():
    rng, task = random.Random(5), script.words(60, 0)
    counts, texts = {}, [task.demonstrate(rng, None, True) for _ in range(8000)]
    assert all(set(text[1:].split(" ")) <= set(script.lexicon()) for text in texts)  # whole words: none is cut
    for text in texts:
        for n in range(1, len(text) + 1):
            begun = text[:n].rpartition(" ")[2]
            counts.setdefault(begun, []).append(ord(text[n]) if n < len(text) else 256)
    for begun in ("", "ban", "mist", "grane"):
        seen = torch.bincount(torch.tensor(counts[begun]), minlength=257) / len(counts[begun])
        assert (seen - script.truth(begun)).abs().sum() / 2 < 3 / len(counts[begun]) ** 0.5
        assert script.truth(begun).sum().item() == pytest.approx(1)
    assert sum(script.lexicon().values()) == pytest.approx(1) and len(script.lexicon()) == 48


def test_the_world():
    task, tokenizer = script.words(60, 0), script.words(60, 0).tokenizer()
    assert len(tokenizer) == 60 and len(script.words(40, 1).tokenizer()) == 40
    assert len(task.test) == 512 and all(e.prompt == "<eos>" + e.prompt[5:] and len(e.prompt) > 5 for e in task.test)
    assert tokenizer(task.test[0].prompt)["input_ids"][0] == tokenizer.eos_token_id
    assert task.check("ed bans", "ban") == ("baned", 1.0) and task.check("", "ban")[1] == 1.0
    assert task.check("eb", "ban")[1] == task.check(" x", "bane")[1] == 0.0
    assert sum(e.answer in script.lexicon() for e in task.test) < 256 and len({e.answer for e in task.test}) > 30
    assert all(e.prompt.endswith(e.answer) for e in task.test)


# ---------------------------------------------------------------- results


def row(i, far=0.5, inside=0.5, **own):
    arm = dict(lost=0.01, calls=6, bytes=3, far=far, right=1.0, text="x")
    arms = {name: dict(arm, **own) for name in ("tokens", "token healing", "bytes")}
    return dict(item=i, **arms, inside=inside, covers=[["a|b", "c", 0.75]], laws=dict(bytes=[["c", 0.9]]))


def test_results():
    found = script.results([row(0, 0.2, 0.0), row(1, 0.6, right=0.0, calls=12)], None)
    table = found["table"]["bytes"]
    assert (table["distance, all"], table["distance, none may"], table["distance, a token may go on"]) == (0.4, 0.2, 0.6)
    assert table["right"] == 0.5 and table["calls per byte"] == 3.0 and table["mass on invalid tokens"] == 0.01
    assert "mass on invalid tokens" not in found["table"]["tokens"] and list(found["table"]) == [
        "tokens",
        "token healing",
        "bytes",
    ]
    assert [p["kind"] for p in found["panels"]] == ["bars", "points", "bars", "tokens"]
    json.dumps(found, allow_nan=False)
    found = script.results([row(0, None, bytes=0)], None)
    assert "distance, all" not in found["table"]["bytes"] and [p["kind"] for p in found["panels"]] == ["bars", "tokens"]
    json.dumps(found, allow_nan=False)


# ---------------------------------------------------------------- the script


def folder(path, tokenizer, seed):
    """A small model with this tokenizer, of random weights, and a few unused rows."""
    lm = random_lm(len(tokenizer) + 5, seed).float()
    lm.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Two folders with different tokenizers, one as Qwen's, one with a start as Llama 3's, and a file of prompts."""
    place = tmp_path_factory.mktemp("bytes")
    first = folder(place / "first", bpe(300, plain=normalizers.NFC()), 1)
    other = bpe(340, (TEXTS + "hello there the theme them ", "other words of others"), split=None, bos="<bos>")
    other.backend_tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    second, file = folder(place / "second", other, 2), place / "rows.jsonl"
    prompts = ["The th", "naïve e\u0301 ", "Привет", "12", "a <tool> b", "你"]
    file.write_text("".join(json.dumps(dict(prompt=p, answer="1")) + "\n" for p in prompts))
    return first, second, str(file)


SMALL = ["--items", 3, "--max-new-tokens", 6, "--prompt-template", "{prompt}"]


def test_two_folders(asked, tmp_path):
    first, second, file = asked
    out = run(
        tmp_path, "--model", first, "--second", second, "--task", file, "--run-dir", tmp_path / "a", *SMALL, script=SCRIPT
    )
    assert out.code == 0, out.err
    rows = lines(tmp_path / "a" / "items.jsonl")
    assert len(rows) == 3 and all(row["bytes, averaged"]["far"] is None for row in rows)
    assert all(0 <= row[arm]["bytes"] <= 6 for row in rows for arm in ("bytes", "bytes, averaged"))
    table = json.loads((tmp_path / "a" / "results.json").read_text())["table"]
    assert set(table) == {"tokens", "token healing", "bytes", "bytes, second", "bytes, averaged"}
    assert table["bytes"]["mass on invalid tokens"] > 0 and (tmp_path / "a" / "picture.png").exists()
    assert "mass on invalid tokens" in out.out.splitlines()[-1]


@torch.no_grad()
def test_temperature_and_top_mass():
    """One model alone, asked with other flags: other texts; fewer covers, none of them new, and the same law but for little."""
    _, tokens = real()
    model, uniforms = (random_lm(310), tokens, [1], tuple(b" ")), [0.9, 0.6, 0.3, 0.8]
    own = dict(max_new_tokens=3)
    p, text, found, told = script.drawn(script.covers, [model], uniforms, options(**own))
    assert told["calls"] >= 2 and told["lost"] > 0 and p.sum().item() == pytest.approx(1)
    fewer_p, _, fewer, _ = script.drawn(script.covers, [model], uniforms, options(top_mass=0.9, **own))
    assert len(fewer) < len(found) and {ids for ids, *_ in fewer} < {ids for ids, *_ in found}
    assert 0 < (p - fewer_p).abs().sum() / 2 < 0.25
    _, likeliest, *_ = script.drawn(script.covers, [model], uniforms, options(temperature=0, **own))
    _, other, *_ = script.drawn(script.covers, [model], [0.1] * 4, options(temperature=0, **own))
    assert likeliest == other != text
    _, healed, _, _ = script.drawn(script.healing, [model], uniforms, options(**own))
    assert len(healed) >= 1
    law, *_ = script.drawn(script.covers, [model, model], uniforms, options(**own))
    torch.testing.assert_close(law, p, rtol=0, atol=1e-12)


def test_mistakes_are_one_line(asked, tmp_path):
    first, second, file = asked

    def refused(*argv):
        said = user_error(run(tmp_path, *argv, "--run-dir", tmp_path / "none", script=SCRIPT))
        assert not (tmp_path / "none").exists()
        return said

    assert "nearest names" in refused("--model", first, "--second", "qwen2.5-7", "--task", file)
    assert "--task words is the tiny models' own" in refused("--model", first, "--task", "words")
    assert "--top-mass must be above 0" in refused("--top-mass", 0)
    assert "--pieces must be at least 20" in refused("--pieces", 3)


def test_flags_are_taken():
    args, _ = settings.resolve(script.Args(), script.worlds(script.Args(), False))
    assert (args.task, args.second, args.top_mass, args.max_new_tokens) == ("words", "tiny", 1.0, 12)
    args = script.Args(pieces=50, second_pieces=30)
    assert [len(script.worlds(args, k)("words").tokenizer()) for k in (False, True)] == [50, 30]
    assert script.worlds(args, False)("addition").name.startswith("addition")
