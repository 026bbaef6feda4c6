"""CoIn's hash tree, heads and verifier on worked numbers, what fillers are and what of them passes, the embedding of a folder,
and the script as a user runs it."""

import hashlib
import itertools
import json
import random
import struct
import sys

import pytest
import torch

from algos import coin as script
from common import UserError, settings
from tests.helpers import ROOT, lines, run, user_error

SCRIPT = ROOT / "algos" / "coin.py"
CLOSE = dict(rtol=0, atol=1e-6)
DATA = [b"fp%d" % i for i in range(5)]
LEAVES = [script.leaf(x) for x in DATA]


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the commitment


def test_the_tree_of_the_card():
    levels = script.tree(LEAVES)
    assert [len(x) for x in levels] == [8, 4, 2, 1]
    assert levels[-1][0].hex() == "0b9eebfb823c6c976ee66ebabd5fa2ea32a00528d17f2b37ff4c420c8e9b7c06"
    assert levels[0][5:] == [LEAVES[4]] * 3
    assert [x.hex()[:12] for x in script.proof(levels, 2)] == ["778149271ccc", "6358e81186d1", "13bbbdb36077"]
    assert script.tree(LEAVES[:1]) == [LEAVES[:1]]


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_every_leaf_opens_and_nothing_else_does(m):
    data = [b"x%d" % i for i in range(m)]
    levels = script.tree([script.leaf(x) for x in data])
    top = script.root(levels, m)
    for i in range(m):
        path = script.proof(levels, i)
        assert script.verify(data[i], i, m, path, top)
        for other in set(range(m)) - {i}:
            assert not script.verify(data[i], other, m, path, top)
        assert not script.verify(data[i], i + m, m, path, top) and not script.verify(data[i], i - m, m, path, top)
        assert not script.verify(data[i], i, m + 1, path, top)
        for k in range(len(path)):
            broken = [*path[:k], bytes([path[k][0] ^ 1]) + path[k][1:], *path[k + 1 :]]
            assert not script.verify(data[i], i, m, broken, top)


def test_the_count_is_bound():
    """Five leaves, and six of which the last two are equal, have one top: what is published differs by m."""
    five, six = script.tree(LEAVES), script.tree([*LEAVES, LEAVES[4]])
    assert five[-1] == six[-1] and script.root(five, 5) != script.root(six, 6)
    path = script.proof(six, 5)
    assert script.verify(DATA[4], 5, 6, path, script.root(six, 6))
    assert not script.verify(DATA[4], 5, 5, path, script.root(five, 5))
    assert not script.verify(DATA[4], 5, 6, path, script.root(five, 5))
    assert script.root(five, 5) == hashlib.sha256(five[-1][0] + struct.pack("<Q", 5)).digest()


def test_a_node_is_no_leaf():
    levels = script.tree(LEAVES)
    node = levels[0][0] + levels[0][1]
    assert script.leaf(node) == levels[1][0]
    for m in (4, 5):
        assert not script.verify(node, 0, m, script.proof(levels, 0)[1:], script.root(levels, 5))


def test_a_fingerprint_is_its_floats():
    block, token = torch.tensor([1.0, -2.5]), torch.tensor([0.1, 0.0], dtype=torch.float32)
    data = script.fingerprint(block, token)
    assert data.hex() == "0000803f" + "000020c0" + "cdcccc3d" + "00000000"
    assert script.fingerprint(token, block) != data
    prints = [script.fingerprint(*x.float()) for x in drawn(6, 2, 3)]
    levels = script.tree([script.leaf(x) for x in prints])
    top, path = script.root(levels, 6), script.proof(levels, 3)
    assert script.verify(prints[3], 3, 6, path, top)
    for place in range(len(prints[3])):
        for bit in (0, 7):
            flipped = bytearray(prints[3])
            flipped[place] ^= 1 << bit
            assert not script.verify(bytes(flipped), 3, 6, path, top)


def test_catch():
    assert script.catch(0.05, 10) == pytest.approx(0.401263, abs=1e-6)
    assert script.catch(0.1, 10) == pytest.approx(0.651322, abs=1e-6)
    found = [any(i < 2 for i in asked) for asked in itertools.product(range(5), repeat=4)]  # 2 of 5 forged, 4 challenges
    assert script.catch(0.4, 4) == pytest.approx(sum(found) / len(found))


# ---------------------------------------------------------------- the judges


def test_focal():
    s, y = torch.tensor([0.9, 0.6, 0.2]).double(), torch.tensor([1, 1, 0])
    assert script.focal(s.logit(), y, 2.0).mean().item() == pytest.approx(0.030570, abs=1e-6)
    assert script.focal(s.logit(), y, 0.0).mean().item() == pytest.approx(0.279777, abs=1e-6)
    assert script.focal(torch.tensor([200.0, -200.0]), torch.tensor([0, 1]), 2.0).tolist() == [200, 200]
    for gamma in (0.0, 1.5, 2.0):
        z = drawn(6).requires_grad_()
        label = torch.tensor([1, 0, 1, 1, 0, 0])
        assert torch.autograd.gradcheck(lambda z, g=gamma, y=label: script.focal(z, y, g), z)
    z = torch.tensor([0.9]).double().logit().requires_grad_()
    script.focal(z, torch.tensor([1]), 2.0).sum().backward()
    # d/dz of -(1 - p)^2 ln p: (1 - p)^2 (2 p ln p - (1 - p))
    assert z.grad.item() == pytest.approx(-0.00289649, abs=1e-8)


def test_heads():
    u, v = drawn(4, 3), drawn(4, 3, seed=1)
    cos = (u * v).sum(1) / u.norm(dim=1) / v.norm(dim=1)
    torch.testing.assert_close(script.match_score(u, v, 2.0, -0.5), 2 * cos - 0.5)
    cosine, mlp = script.Head(3, "cosine").double(), script.Head(3, "mlp").double()
    torch.testing.assert_close(cosine(u, v), 5 * cos)
    torch.testing.assert_close(cosine(7 * u, v), cosine(u, v))
    assert sum(p.numel() for p in cosine.parameters()) == 2
    assert mlp(u, v).shape == (4,) and not torch.allclose(mlp(7 * u, v), mlp(u, v))
    joined = torch.cat([u, v, (u - v).abs(), u * v], 1)
    torch.testing.assert_close(mlp(u, v), mlp.net(joined)[:, 0])
    assert torch.autograd.gradcheck(lambda u, v: script.match_score(u, v, 2.0, -0.5), (u.requires_grad_(), v.requires_grad_()))


def test_deep_sets():
    net, scores = script.DeepSets().double(), drawn(3, 5, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).double()
    found = net(scores, mask)
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(net(scores[:, order], mask[:, order]), found)
    torch.testing.assert_close(net(scores[1:2, :3], mask[1:2, :3]), found[1:2])  # padding is not seen
    torch.testing.assert_close(net(scores.repeat(1, 2, 1), mask.repeat(1, 2)), found)  # nor how many blocks there are
    assert not torch.allclose(net(scores + 1, mask), found)
    small = script.DeepSets(4).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    honest = torch.tensor([1.0, 0, 1]).double()
    assert torch.autograd.gradcheck(lambda s: loss(small(s, mask), honest), scores.requires_grad_())


def test_thresholds():
    scores = torch.tensor([3.0, 1, 2, 5, 4, 9, 8, 7, 6, 10])
    for share, flagged in ((0, 0), (0.05, 0), (0.1, 1), (0.25, 2), (0.5, 5), (1, 10)):
        assert (scores < script.threshold(scores, share)).sum() == flagged
    tied = torch.tensor([1.0, 1, 1, 2])
    assert (tied < script.threshold(tied, 0.5)).sum() == 0  # never more than were asked for
    honest = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    means = torch.tensor([[0.25, 0.95], [0.35, 0.65], [0.0, 1.0], [1.0, 1.0]])
    assert script.rank_score(means, honest).tolist() == [2, 1, 0, 4]


# ---------------------------------------------------------------- the embedding


def grams_of(text, net):
    """The rows of a text, gram by gram."""
    keys = [text[i : i + n] for i in range(len(text)) for n in (1, 2, 3) if i + n <= len(text)]
    places = []
    for gram in keys:
        key = sum(ord(c) * p for c, p in zip(gram, (1_000_003, 19_349_663, 83_492_791)))
        places.append((key + len(gram)) % (2**31 - 1) * 48_271 % (2**31 - 1) % net.rows)
    return places


def test_grams():
    net = script.Grams(frozen=False)
    texts = ["a", "7+k=7+12=19 ", "", "αβγ𝛿", "ab"]
    found = net(texts)
    for text, row in zip(texts, found):
        places = grams_of(text, net)
        expected = net.table[places].mean(0) if places else torch.zeros(net.d)
        torch.testing.assert_close(row, expected, **CLOSE)
    torch.testing.assert_close(net(["ab"]), found[4:])  # not a function of its neighbours
    assert not torch.allclose(net(["ba"]), found[4:])
    assert len({grams_of(a + b, net)[1] for a in "0123456789+=" for b in "0123456789+="}) > 130  # of 144: few collide
    assert net.tokens("ab c") == ["a", "b", " ", "c"]
    assert not script.Grams(frozen=True).table.requires_grad and net.table.requires_grad
    found.sum().backward()
    assert (net.table.grad.abs().sum(1) > 0).sum() == len({p for text in texts for p in grams_of(text, net)})


def matcher(**flags):
    torch.manual_seed(0)
    args = script.Args(**flags)
    return script.Matcher(script.Grams(False), args), args


def test_the_matcher():
    net, _ = matcher()
    a = net.a([["7", "+"], ["k", "="]], ["7+k=", "zz"])
    u = torch.stack([net.encode(["7", "+"]).mean(0), net.encode(["k", "="]).mean(0)])
    torch.testing.assert_close(a, net.tokens_block(u, net.encode(["7+k=", "zz"])))
    expected = net.block_answer(net.encode(list("xyx")), net.encode(list("qqq")))
    torch.testing.assert_close(net.b(list("xyx"), list("qqq")), expected)


# ---------------------------------------------------------------- the world, the seller


def split_of(n=70, seed=1):
    return [script.problem(k, script.Args(seed=seed)) for k in range(n)]


def test_problems_are_sums():
    passes = set()
    for tokens, answer in split_of(40):
        text = "".join(tokens)
        letters, total = answer.split("=")
        worth, steps = {}, text.split()
        for step in steps:
            (before, x), (again, value), after = (part.split("+") for part in step.split("="))
            assert before == again and worth.setdefault(x, value) == value and int(before) + int(value) == int(after[0])
        assert sorted(worth) == letters.split("+") and sum(map(int, worth.values())) == int(total)
        assert 5 <= len(worth) <= 9 and len(steps) % len(worth) == 0
        passes.add(len(steps) // len(worth))
    assert passes == {1, 2, 3, 4}
    assert split_of(3) == split_of(3) and split_of(3) != split_of(3, seed=2)


SPLIT = split_of()
VOCABULARY = sorted({t for tokens, _ in SPLIT for t in tokens})
NEAR = torch.eye(len(SPLIT))
LONG = next(k for k, (tokens, _) in enumerate(SPLIT) if len(tokens) > 150 and len(tokens) % 16 > 4)  # with a last, short block


def inflated(kind, rate, k=LONG, near=NEAR):
    return script.inflate(kind, rate, k, SPLIT, near, VOCABULARY, random.Random(5), 16)


@pytest.mark.parametrize("kind, rate", script.CASES)
def test_bills(kind, rate):
    """As many tokens as the rate says, all true ones in their order, filler marked where it is more than half of a block."""
    tokens, _ = SPLIT[LONG]
    blocks, shown, false = inflated(kind, rate)
    flat = [t for b in blocks for t in b]
    n, cut = round(rate * len(tokens)), len(tokens) // 16 * 16
    assert len(flat) == len(tokens) + n and flat[:cut] == tokens[:cut] and flat[cut + n :] == tokens[cut:]
    assert all(len(b) == 16 for b in blocks[:-1]) and set(flat) <= set(VOCABULARY)
    added = [cut <= i < cut + n for i in range(len(flat))]
    assert len(blocks) == len(shown) and false == [sum(x) > len(x) / 2 for x in script.blocks_of(added, 16)]
    if kind != "foreign under own blocks":
        assert shown == ["".join(b) for b in blocks]


def test_fillers():
    tokens, _ = SPLIT[LONG]
    text, n = "".join(tokens), len(tokens)
    assert n % 16, "the tail is a part of what is tested"

    def made(kind, near=NEAR):
        flat = [t for b in inflated(kind, 1, near=near)[0] for t in b]
        return flat[n // 16 * 16 : n // 16 * 16 + n]

    assert len(set(made("one token repeated"))) == 1 and len(set(made("random tokens"))) > 20
    assert sorted(made("own tokens shuffled")) == sorted(tokens) != made("own tokens shuffled")
    pieces = ["".join(x) for x in script.blocks_of(tokens, 4)]
    mixed = made("own pieces shuffled")
    assert sorted(mixed) == sorted(tokens) != mixed and all(piece in "".join(mixed) for piece in pieces)
    altered = "".join(made("own steps, digits altered"))
    assert altered != text and [c for c in altered if not c.isdigit()] == [c for c in text if not c.isdigit()]
    traces = ["".join(t) for t, _ in SPLIT]
    other = "".join(made("another's trace"))
    assert [i for i, trace in enumerate(traces) if trace[:30] == other[:30]] not in ([], [LONG])
    near = torch.zeros(len(SPLIT), len(SPLIT))
    for i in range(len(SPLIT)):
        near[LONG, i] = -i
    drawn_from = sorted(random.Random(5).sample([i for i in range(len(SPLIT)) if i != LONG], 60))
    assert "".join(made("nearest of 60 traces", near))[:30] == traces[drawn_from[0]][:30]
    few = script.inflate("nearest of 60 traces", 1, 1, SPLIT[:5], torch.eye(5), VOCABULARY, random.Random(0), 1)[0]
    assert "".join(t for b in few for t in b).count(traces[1]) == 1  # nobody is near to itself
    own = [tokens[i : i + 16] for i in range(0, n - 15, 16)]
    assert all(b in own for b in script.blocks_of(made("own blocks repeated"), 16)[:-1])
    blocks, shown, false = inflated("foreign under own blocks", 1)
    for b, s, f in zip(blocks, shown, false):
        assert s in ["".join(x) for x in script.blocks_of(tokens, 16)] and ("".join(b) != s) <= f or not f


@torch.no_grad()
def test_repeated_blocks_pass_by_construction():
    """Whatever the heads have learnt: a repeated block has the scores of the block it repeats, as long as the tokens that are
    opened are the same."""
    net, args = matcher(opened=16)  # all tokens of a block, whose mean has no order
    tokens, answer = SPLIT[LONG]
    blocks, shown, false = inflated("own blocks repeated", 2)
    honest, own, _ = inflated("no filler", 0)
    (picked, scores), (_, genuine) = script.judged(
        net, [(blocks, shown, answer, 1, random.Random(1)), (honest, own, answer, 1, random.Random(2))], args
    )
    whole = [i for i, j in enumerate(picked) if false[j] and shown[j] in own]
    assert len(whole) >= sum(false) - 1 > 5
    for i in whole:
        assert (scores[i] - genuine).abs().sum(1).min() < 1e-5
    foreign, other, false = inflated("another's trace", 2)
    picked, scores = script.judged(net, [(foreign, other, answer, 1, random.Random(1))], args)[0]
    assert max((scores[i] - genuine).abs().sum(1).min() for i, j in enumerate(picked) if false[j]) > 1e-3
    assert "repeats the seller's own genuine blocks passes" in script.__doc__.replace("\n", " ")


# ---------------------------------------------------------------- the auditor


def test_examples():
    """What is genuine, hard, easy and junk is so."""
    texts = [["".join(b) for b in script.blocks_of(tokens, 16)] for tokens, _ in SPLIT]
    answers = [answer for _, answer in SPLIT]
    for hard, junk in ((1.0, 0.0), (0.0, 0.0), (0.0, 1.0)):
        args = script.Args(hard=hard, junk=junk, pairs=300)
        first, second = script.examples(SPLIT, VOCABULARY, random.Random(0), args)
        assert all(len(x) == 300 and 0.4 < sum(y for _, _, y in x) / 300 < 0.6 for x in (first, second))
        for tokens, shown, genuine in first:
            assert len(tokens) == 4 and (not genuine or set(tokens) <= set(shown))
        for block, answer, genuine in second:
            own = texts[answers.index(answer)]
            near = [sum(a != b for a, b in zip(block, x)) for x in own if len(x) == len(block)]
            if genuine:
                assert block in own
            elif hard:
                assert near and min(near) <= 2
            elif junk:
                assert len(block) == 16 and block not in itertools.chain(*texts)
            else:
                assert block in itertools.chain(*texts)
        alike = [len(set(second_block)) == 1 for second_block, _, y in second if not y and len(second_block) == 16]
        assert (0.3 < sum(alike) / len(alike) < 0.7) if junk else not sum(alike)


def test_audits_open_what_they_say():
    net, args = matcher(opened=3)
    seen, asked = [], []
    net.a = lambda tokens, blocks: seen.append((tokens, blocks)) or torch.zeros(len(blocks))
    net.b = lambda blocks, answers: asked.append((blocks, answers)) or torch.zeros(len(blocks))
    blocks, shown, _ = inflated("another's trace", 1)
    for share in (0.1, 0.3, 1):
        picked, scores = script.judged(net, [(blocks, shown, "a", share, random.Random(0))], args)[0]
        assert len(picked) == len(set(picked)) == -(-len(blocks) * share // 1) and scores.shape == (len(picked), 2)
        tokens, texts = seen[-1]
        assert texts == [shown[j] for j in picked] and all(len(t) == 3 for t in tokens)
        assert asked[-1] == (texts, ["a"] * len(texts))
        assert all(sorted(t) == sorted(set_in(t, blocks[j])) for t, j in zip(tokens, picked))
    assert script.first_of(torch.arange(10), 0.25).tolist() == [0, 1, 2]
    assert script.some(["x"], random.Random(0), 3) == ["x"] * 3


def set_in(some, block):
    """Those of `some` that the block has, as often as it has them."""
    left = list(block)
    return [left.pop(left.index(t)) for t in some if t in left]


def test_verifiers():
    """Thresholds flag the share of honest traces they are set on; the nets learn to tell; one has not seen its filler."""
    torch.manual_seed(0)
    args = script.Args(verifier_steps=30, false_alarms=0.1, exposure=0.5)
    honest = [0.6 + 0.4 * torch.rand(6, 2) for _ in range(40)]
    false = [0.4 * torch.rand(6, 2) for _ in range(40)]
    nets = script.Verifiers(40)
    labels = [0] * 40 + [1 + i % len(script.FILLERS) for i in range(40)]
    script.fit_nets(nets.nets, honest + false, labels, args)
    with torch.no_grad():
        nets.set(honest, torch.arange(40.0), args)
        half = [script.first_of(s, 0.5) for s in honest]
        for net in range(1 + len(script.FILLERS)):
            assert (nets.scores(half, net) < nets.least[net]).sum() == 4
            assert (nets.scores(false, net) < nets.least[net]).all()
        for i, share in enumerate(script.EXPOSURES):
            assert (nets.scores([script.first_of(s, share) for s in honest]) < nets.at[i]).sum() == 4
        assert (nets.rank(half) < nets.rule).sum() <= 4 and (nets.rank(false) < nets.rule).all()
        assert (-torch.arange(40.0) < nets.bill).tolist() == [False] * 36 + [True] * 4  # the longest bills


def test_a_net_is_fitted_without_its_filler():
    """Label i is left out of net i and of no other."""
    args = script.Args(verifier_steps=1)
    sets = [torch.full((2, 2), 0.9)] * 4 + [torch.full((2, 2), 0.1)] * 9
    labels = [0] * 4 + list(range(1, 10))

    def fitted(sets):
        torch.manual_seed(0)
        nets = script.Verifiers(1).nets
        script.fit_nets(nets, sets, labels, args)
        return [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]

    before, after = fitted(sets), fitted([*sets[:6], torch.full((2, 2), 0.5), *sets[7:]])  # filler 3 changes
    assert [not torch.equal(a, b) for a, b in zip(before, after)] == [i != 3 for i in range(10)]


# ---------------------------------------------------------------- what is measured


def rows_of(n=4):
    rows = []
    for k in range(n):
        row = dict(item=k, tokens=100, refused=0, forged=[1, 2, 5, 10, 20], met=[0, 0, k % 2, 1, 1], unseen=[k % 2] * 9)
        row |= dict(verifier=[k == 0, *[1] * 45], rule=[0, *[k < 2] * 45], length=[0, *[k < 1] * 45], exposed={}, shown={})
        row |= dict(blocks={"no filler": [[0.9, 0.8]]} | {kind: [[0.1, 0.8]] for kind in script.FILLERS})
        row["exposed"] = {"no filler": [0, 0, 0, k % 2]}
        row["shown"] = {"random tokens": [["ab", 0.5]]} if k < 2 else {}
        rows.append(row)
    return json.loads(json.dumps(rows))


def test_results():
    found = script.results(rows_of(), script.Args())
    table = found["table"]
    assert table["DeepSets, mean of the fillers"] == {"false alarms": 0.25} | {f"+{r:.0%}": 1 for r in script.RATES}
    assert table["rule, mean of the fillers"]["+25%"] == 0.5 and table["length alone, mean of the fillers"]["+500%"] == 0.25
    of = table["DeepSets: own blocks repeated"]
    assert of["+100%"] == 1 and of["+100%, unseen"] == 0.5 and of["+100%, rule"] == 0.5
    assert of["AUROC tokens-block"] == 1 and of["AUROC block-answer"] == 0.5
    panels = {p["title"]: p["of"] for p in found["panels"]}
    law = panels["forged leaves, q = 10"]
    assert law["measured"][2] == [0.05, 0.5] and law["1 - (1 - phi)^q"][2] == [0.05, pytest.approx(0.401263, abs=1e-6)]
    assert panels["twice the tokens, by what is audited"]["no filler"][-1] == [1.0, 0.5]
    rows = rows_of()
    for row in rows:
        row["blocks"]["random tokens"] = []
    assert script.results(rows, script.Args())["table"]["DeepSets: random tokens"]["AUROC tokens-block"] is None


# ---------------------------------------------------------------- the script as a user runs it

SMALL = "--items 3 --problems 12 --verified 8 --fit-steps 2 --verifier-steps 1 --device cpu".split()


def trained(folder, *flags):
    folder.mkdir(exist_ok=True)
    found = run(folder, *SMALL, "--run-dir", folder / "run", *flags, script=SCRIPT)
    assert found.code == 0, found.err
    return found, lines(folder / "run" / "items.jsonl"), folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("coin"))


def test_a_run(plain):
    found, rows, folder = plain
    assert [row["item"] for row in rows] == [0, 1, 2] and not any(row["refused"] for row in rows)
    assert "twice the tokens: length alone" in found.out.splitlines()[-1] and "repeated pass: " in found.out.splitlines()[-1]
    assert (folder / "picture.png").exists() and (folder / "checkpoints" / "heads.safetensors").exists()
    results = json.loads((folder / "results.json").read_text())
    assert results["table"]["hash tree"] == {"false alarms": 0.0}
    before = (folder / "items.jsonl").read_bytes()
    (folder / "items.jsonl").write_bytes(before[: len(before) // 2])
    again = run(folder.parent, "--resume", folder, script=SCRIPT)
    assert again.code == 0, again.err
    assert (folder / "items.jsonl").read_bytes() == before
    assert json.loads((folder / "results.json").read_text()) == results


FLAGS = ["--seed 2", "--block-size 8", "--opened 2", "--exposure 0.6", "--challenges 1", "--false-alarms 0.5", "--head cosine",
         "--frozen", "--hard 0", "--junk 1", "--gamma 0", "--fit-steps 3", "--pairs 64", "--lr 0.01", "--verifier-steps 2",
         "--problems 13", "--verified 9", "--items 2"]  # fmt: skip


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return rows_with(tmp_path_factory.mktemp("flags") / "run", patch)


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_changes_something(flags, monkeypatch, tmp_path, without):
    assert rows_with(tmp_path / "run", monkeypatch, *flags.split()) != without


def rows_with(folder, monkeypatch, *flags):
    """What a run in this process writes."""
    monkeypatch.setattr(sys, "argv", ["coin.py", *SMALL, *flags, "--run-dir", str(folder)])
    monkeypatch.setattr("common.figures.publish", lambda folder, results: None)
    script.main(settings.parse(script.Args, script.__doc__))
    return (folder / "items.jsonl").read_text()


# ---------------------------------------------------------------- traces of a model, an encoder of a folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT with word pieces, as sentence encoders are."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz0123456789+=.", "sum", "so"]
    words += [f"##{c}" for c in "abcs0123456789"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=48)
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def test_sentences(encoder):
    net = script.Sentences(str(encoder), 16, torch.device("cpu"))
    texts = ["so 1+2=3. ", "sum", "a longer one, abc=7", "a " * 200]
    found = net(texts)
    assert found.shape == (4, net.d) and not found.requires_grad
    for text, row in zip(texts, found):  # alone, without padding
        ids = net.tokenizer(text, return_tensors="pt", truncation=True, max_length=40)
        with torch.no_grad():
            mean = net.lm(**ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-5)
    assert torch.equal(net(["sum"])[0], found[1])
    text = "  So, 12+3 = 15.\nSum\n"
    pieces = net.tokens(text)
    assert "".join(pieces) == text and net.tokens("") == [] and net.tokens("  ") == ["  "]
    assert pieces == ["  So", ", ", "1", "2", "+", "3 ", "= ", "1", "5", ".\n", "Sum\n"]
    assert not any(isinstance(m, torch.nn.Module) for m in vars(net).values() if m is not net.lm)
    names = script.Matcher(net, script.Args()).state_dict()
    assert all(name.startswith(("tokens_block", "block_answer")) for name in names)  # the encoder is not saved


def traces(path, n=60, change=lambda i, row: row):
    rows = []
    for i in range(n):
        steps = " ".join(f"{j}+{i}={i + j}. so" for j in range(6 + i % 5))
        rows.append(change(i, dict(prompt=f"sum {i}", response=f"<think>\n{steps}\n</think>\n\nsum={i}.")))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_traces_and_an_encoder(tmp_path, encoder):
    path = traces(tmp_path / "traces.jsonl", 72)
    found, rows, folder = trained(tmp_path, "--traces", path, "--embedder", encoder, "--block-size", "12")
    assert "traces: of 72 prompts" in found.out and len(rows) == 3
    weights = (folder / "checkpoints" / "heads.safetensors").read_bytes()
    assert b"tokens_block" in weights and b"layer" not in weights and rows[0]["tokens"] > 40
    found, rows, _ = trained(tmp_path / "run", "--traces", path)  # n-grams of characters
    assert len(rows) == 3 and rows[0]["tokens"] > 60


def test_splits(tmp_path):
    """Half, and three sixths; one trace a prompt; what has no reasoning is left out; both forms of a row."""

    def change(i, row):
        if i == 0:
            return row | dict(response="</think>sum=0.")
        if i % 2:
            return dict(prompt=row["prompt"], reasoning=row["response"][8:-20].strip(), answer="sum")
        return row | dict(prompt="sum 2") if i in (2, 4) else row

    path = traces(tmp_path / "t.jsonl", 62, change)
    splits = script.load(script.Args(traces=str(path), items=7), list)
    assert [len(s) for s in splits] == [30, 10, 10, 7]
    every = ["".join(tokens) for split in splits for tokens, _ in split]
    assert len(set(every)) == 57 and not any("think" in x for x in every)
    assert {answer for split in splits for _, answer in split} >= {"sum", "sum=6."}
    own = script.load(script.Args(problems=5, verified=3, items=2), list)
    assert [len(s) for s in own] == [5, 3, 3, 2] and own[3][1] == script.problem(12, script.Args())


# ---------------------------------------------------------------- mistakes


def test_mistakes_in_traces(tmp_path):
    def refused(path):
        with pytest.raises(UserError) as error:
            script.load(script.Args(traces=str(path)), list)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "48 are needed" in refused(traces(tmp_path / "few.jsonl", 47))
    bads = {"prompt": "a"}, {"response": "no thought"}, {"reasoning": "a", "answer": " "}, {"reasoning": 3}, [1]
    for number, bad in enumerate(bads):
        path = traces(tmp_path / f"bad{number}.jsonl", 50, lambda i, row, bad=bad: bad if i == 3 else row)
        assert f"bad{number}.jsonl:4: needs text" in refused(path)
    assert "cannot read" in refused(tmp_path / "none.jsonl")


def test_mistakes_of_an_embedder(tmp_path, encoder, monkeypatch):
    with pytest.raises(UserError, match="block-size 39.*reads 40 tokens"):
        script.Sentences(str(encoder), 39, torch.device("cpu"))
    script.Sentences(str(encoder), 38, torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load it"):
        script.Sentences(str(tmp_path / "empty"), 16, torch.device("cpu"))


def test_a_mistake_is_one_line(tmp_path):
    said = {"--traces none.jsonl": "cannot read the file none.jsonl", "--exposure 0": "--exposure must be above 0"}
    for flags, says in said.items():
        assert says in user_error(run(tmp_path, *flags.split(), script=SCRIPT))
