"""SpecDec++'s worked numbers, its head in training and in decoding, its labels, exactness by enumeration, and what a run
leaves."""

import copy
import functools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos import specdec_pp as script
from common import batch, engines
from common.policy import Policy
from common.worlds import tiny
from tests.helpers import ROOT, lines, run, user_error

SCRIPT = ROOT / "algos" / "specdec_pp.py"
RULES = [("fixed", 2), ("confidence", 0.4), ("head", 0.5), ("oracle", 0.4)]
each_rule = pytest.mark.parametrize("arm", RULES, ids=lambda arm: arm[0])


def args(**changes):
    return script.Args(**dict(max_new_tokens=6) | changes)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- worked numbers


def test_worked_loss():
    logits, a = double([[0.2, 1.0], [0.5, -0.3], [0, 0]]).requires_grad_(), double([0.9, 0.25, 0.6])
    mask = torch.tensor([True, True, False])
    loss = script.head_loss(logits, a, mask, 6.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.479901, abs=1e-6)
    wanted = double([[-0.021594, 0.021594], [-0.195619, 0.195619], [0, 0]])
    torch.testing.assert_close(logits.grad, wanted, atol=1e-6, rtol=0)
    weights = 6 * (1 - a[:2]) + a[:2]  # a plain mean over positions is another number
    assert (loss * weights.sum() / 2).item() == pytest.approx(1.499690, abs=1e-6)


def test_no_label_no_loss():
    logits = torch.zeros(3, 2, requires_grad=True)
    loss = script.head_loss(logits, torch.ones(3), torch.zeros(3).bool(), 6.0)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_worked_labels_and_residual():
    logp, logq = double([-0.1, -2, -5]), double([-0.5, -1, -0.1])
    wanted = double([1, 0.367879, 0.007447])
    torch.testing.assert_close(script.acceptance(logp.exp(), logq.exp()), wanted, atol=1e-6, rtol=0)
    p, q = double([0.5, 0.3, 0.2]), double([0.2, 0.6, 0.2])
    assert script.acceptance(p, q).tolist() == [1, 0.5, 1]
    assert (q * script.acceptance(p, q)).sum().item() == pytest.approx(0.7)
    assert script.residual(p, q).tolist() == [1, 0, 0] and torch.equal(script.residual(p, p), p)


def drafted(monkeypatch, outputs, arm, a, room=20):
    """Candidates of a round in which the head says these, one for each call of the draft; the first is of a verified token."""
    said = iter(outputs[1:])
    monkeypatch.setattr(script, "read_on", lambda reader, text, n, V: torch.zeros(n, V))
    monkeypatch.setattr(script, "judge", lambda *_: next(said))
    ids, laws, judged = script.propose(None, None, None, [0], arm, [], room, torch.Generator().manual_seed(0), 3, a)
    assert len(laws) == len(ids)
    return len(ids), judged


WORKED = [0.9, 0.95, 0.9, 0.8, 0.7, 0.9]


@pytest.mark.parametrize("outputs, h, k", [
    (WORKED, 0.04, 2), (WORKED, 0.14, 3), (WORKED, 0.3, 4), (WORKED, 0.5, 5), (WORKED, 0.55, 6), (WORKED, 0.7, 6),
    ([0.9, 0.1], 0.3, 2), ([0.9, 0.1], 0.89, 2), (WORKED[:2] + [0.4, 0.1], 0.95, 4), ([0.0, 1.0, 0.9, 1.0], 0.0, 3),
])  # fmt: skip
def test_worked_stop(monkeypatch, outputs, h, k):
    """Cumulative rejection 0, .05, .145, .316, .5212, .5691; the newest candidate is sent unjudged."""
    found, judged = drafted(monkeypatch, outputs, ("head", h), args(most=len(outputs)))
    assert found == k and judged == outputs[1:k]


def test_bounds_of_a_round(monkeypatch):
    bad, good = [0.0] * 30, [1.0] * 30
    for least in (1, 2, 4):  # the first candidate alone cannot be judged
        assert drafted(monkeypatch, bad, ("head", 0.5), args(least=least))[0] == max(2, least)
    for most in (1, 3, 20):
        assert drafted(monkeypatch, good, ("oracle", 0.5), args(most=most))[0] == most
    assert drafted(monkeypatch, good, ("head", 0.5), args(), room=4)[0] == 4
    assert drafted(monkeypatch, bad, ("fixed", 3), args(most=2)) == (3, [])


def test_weights_and_whole_rounds():
    """Of a round of two judged and one newest candidate, of which one was kept; and w = 6 undone."""
    assert script.products([[[0.5, 0.8], 1]], 1) == [(0.5, True), (0.4, False)]
    (first, _), (second, _) = script.products([[[0.5, 0.8], 2]], 6)
    assert first == pytest.approx(6 / 7) and second == pytest.approx(6 / 7 * 4.8 / 5)
    assert script.products([[[], 1]], 6) == []


# ---------------------------------------------------------------- the head


def test_the_head_by_hand():
    torch.manual_seed(0)
    u = torch.randn(5, 4)
    head = script.AcceptanceHead(4, args(head_depth=2))
    x = u
    for block in head.blocks:
        z = x @ block.weight.T + block.bias
        x = x + z * z.sigmoid()
    torch.testing.assert_close(head(u), x @ head.out.weight.T + head.out.bias)
    assert head(u.bfloat16()).dtype == torch.float32


def test_depth_and_tied_layers():
    count = lambda **changes: sum(p.numel() for p in script.AcceptanceHead(4, args(**changes)).parameters())  # noqa: E731
    assert count() == 3 * 20 + 10 and count(head_depth=1) == 30 and count(tie_head_layers=True) == 30
    tied, once = (script.AcceptanceHead(4, args(tie_head_layers=True, head_depth=d)) for d in (3, 1))
    once.load_state_dict(tied.state_dict())
    u = torch.ones(1, 4)
    assert not torch.allclose(tied(u), once(u))
    free = script.AcceptanceHead(4, args())
    free.load_state_dict({f"blocks.{i}.{n}": p for i in range(3) for n, p in tied.blocks[0].state_dict().items()} | {
        f"out.{n}": p for n, p in tied.out.state_dict().items()})  # fmt: skip
    torch.testing.assert_close(free(u), tied(u))


@pytest.mark.parametrize("w", [1.0, 6.0])
def test_a_fitted_head_says_what_the_loss_asks_for(w):
    """Where a state always has the same label a, the loss is least at a / (a + w (1 - a)); undone, that is a."""
    a = args(rejection_weight=w, head_lr=0.03)
    chances = torch.tensor([0.2, 0.5, 0.9])
    states, mask = torch.eye(3).repeat(4, 1)[None], torch.ones(1, 12).bool()
    part, junk = chances.repeat(4)[None], torch.full((1, 12), 0.5)
    torch.manual_seed(0)
    head = script.AcceptanceHead(3, a)
    before = head(torch.eye(3)).detach()
    parts = [(states, part, mask), (states, junk, ~mask)]  # what has no label teaches nothing
    script.fit_head(head, parts, torch.tensor([[0, 1]]).repeat(150, 1), a)
    said = head(torch.eye(3)).softmax(-1)[:, 1].detach()
    torch.testing.assert_close(said, chances / (chances + w * (1 - chances)), atol=0.01, rtol=0)
    undone = [script.products([[[x], 1]], w)[0][0] for x in said.tolist()]
    assert undone == pytest.approx(chances.tolist(), abs=0.03)
    assert not torch.allclose(before.softmax(-1)[:, 1], said, atol=0.05)


def test_rate_and_order_of_the_fit():
    """The same parts, the same order, the same head; another rate, another order, another one."""
    g = torch.Generator().manual_seed(0)
    parts = [(torch.randn(2, 3, 4, generator=g), torch.rand(2, 3, generator=g), torch.ones(2, 3).bool()) for _ in range(3)]

    def fitted(rate, order):
        torch.manual_seed(0)
        head = script.AcceptanceHead(4, args())
        script.fit_head(head, parts, torch.tensor([order]), args(head_lr=rate))
        return head.out.weight.detach()

    first = fitted(0.01, [0, 1, 2])
    assert torch.equal(first, fitted(0.01, [0, 1, 2]))
    assert not torch.allclose(first, fitted(0.02, [0, 1, 2])) and not torch.allclose(first, fitted(0.01, [2, 1, 0]))


# ---------------------------------------------------------------- labels, and the same states in decoding


@functools.cache
def pair():
    """Two small models in float64 that have learnt nothing, but are alike; the target's vocabulary is padded. -> policies."""
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    size |= dict(max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    draft = Qwen2ForCausalLM(Qwen2Config(vocab_size=13, **size)).double().eval()
    target = Qwen2ForCausalLM(Qwen2Config(vocab_size=16, **size)).double().eval()
    for name, weight in target.state_dict().items():
        weight[: 13 if "embed" in name or "lm_head" in name else None] = draft.state_dict()[name]
        weight += 0.05 * torch.randn_like(weight)
    with torch.no_grad():  # norms that are not 1, so that a state before the norm is another one behind it
        for lm in (target, draft):
            lm.model.norm.weight.mul_(torch.linspace(0.5, 2, 16).double())
    return Policy(target), Policy(draft)


def rows(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    some = lambda low, high: torch.randint(2, 13, (int(torch.randint(low, high, (), generator=g)),), generator=g)  # noqa: E731
    return [(some(2, 6).tolist(), some(1, 8).tolist()) for _ in range(n)]


@pytest.mark.parametrize("changes", [dict(), dict(temperature=0.6), dict(temperature=0), dict(mixing=0.0)], ids=str)
@torch.no_grad()
def test_labels_one_by_one(changes):
    (target, draft), a, texts = pair(), args(**changes), rows(7)
    some = batch.collate(texts)
    T = some.mask.shape[1]
    u = torch.rand(7, T, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states, labels, own = script.labelled(target, draft, some, u, 13, a)
    for i, (x, y) in enumerate(texts):
        z = []
        for t in range(len(y)):
            p, q = (script.law(m.lm(torch.tensor([x + y[:t]])).logits[0, -1, :13], a) for m in (target, draft))
            drawn = script.pick(q, u[i, t, 0].item())
            assert labels[i, t].item() == pytest.approx(min(1, (p[drawn] / q[drawn]).item()), abs=1e-6)
            assert own[i, t] == (u[i, t, 1] >= a.mixing)
            z.append(drawn if own[i, t] else y[t])
        read = draft.lm.model(torch.tensor([x + z])).last_hidden_state[0, len(x) :]
        torch.testing.assert_close(states[i, : len(y)], read)
        assert not own[i, len(y) :].any()
    if a.temperature == 0:
        assert set(labels[own].tolist()) == {0.0, 1.0}
    assert own[some.mask].all() == (a.mixing == 0)


def decoders(prompt, layers=("normed",)):
    return [engines.Decoder(p.lm, [prompt[:-1]], layers=layers) for p in pair()]


@torch.no_grad()
def test_decoding_judges_by_the_states_of_training(monkeypatch):
    """The head's word on a candidate is that on the state at its own position in a pass over the whole text; the oracle's is
    the label. Over several rounds, behind rejections."""
    (_, draft), a = pair(), args(max_new_tokens=16, most=5)
    torch.manual_seed(1)
    head = script.AcceptanceHead(16, a)
    head.out.weight.mul_(4)
    real, seen = script.judge, []

    def judge(rule, head, target, draft, text, y, q, V, args):
        seen.append((text, y, real(rule, head, target, draft, text, y, q, V, args)))
        return seen[-1][2]

    monkeypatch.setattr(script, "judge", judge)
    for rule in ("head", "oracle"):
        seen.clear()
        for i in range(3):
            prompt, draws = [3, 5 + i, 7], torch.Generator().manual_seed(i)
            script.decode(*decoders(prompt), head, prompt, (rule, 0.8), [1], draws, 13, a)
        assert len({len(text) for text, *_ in seen}) > 6
        for text, y, said in seen:
            if rule == "head":
                whole = batch.collate([(text[:1], [*text[1:], y])])
                states = draft(whole.ids, whole.attention_mask, whole.mask, layers=["normed"], at=True)[-1]
                wanted = head(states[0, -1]).softmax(-1)[1].item()
            else:
                p, q = (script.law(m.lm(torch.tensor([text])).logits[0, -1, :13], a)[y] for m in pair())
                wanted = min(1.0, (p / q).item())
            assert said == pytest.approx(wanted, abs=1e-6)


# ---------------------------------------------------------------- exactness


@torch.no_grad()
def test_greedy_text_is_the_target_s_whatever_the_rule():
    a, (target, _), lengths = args(temperature=0, most=4), pair(), Counter()
    torch.manual_seed(0)
    head = script.AcceptanceHead(16, a)
    head.out.weight.mul_(8)
    for i in range(64):
        prompt, wanted = [2 + i % 8, 2 + i // 8, 4], []
        while len(wanted) < a.max_new_tokens and 1 not in wanted:
            wanted.append(target.lm(torch.tensor([prompt + wanted])).logits[0, -1, :13].argmax().item())
        arm = RULES[i % 4]
        found, _, count, rounds = script.decode(*decoders(prompt), head, prompt, arm, [1], torch.Generator(), 13, a)
        assert found == wanted, (prompt, arm)
        lengths[arm[0], count["drafted"] / count["rounds"]] += 1
        assert sum(n for _, n in rounds) == count["drafted"] - count["thrown"]
    assert len(lengths) > 6  # rounds of many lengths


class Coin:
    """A uniform number of which only comparisons are asked."""

    def __init__(self, choose):
        self.choose = choose

    def __ge__(self, chance):
        return self.choose([float(chance), 1 - float(chance)]) == 1


def law_of(program):
    """{what program(choose) gives: its probability}, by all paths; choose(probabilities) gives the number of one."""
    total, path = Counter(), []
    while True:
        at = SimpleNamespace(depth=0, weight=1.0)

        def choose(p, at=at):
            there = [i for i, x in enumerate(p) if x > 0]
            if at.depth == len(path):
                path.append([0, len(there)])
            i = there[path[at.depth][0]]
            at.depth, at.weight = at.depth + 1, at.weight * p[i]
            return i

        found = program(choose)
        total[found] += at.weight
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return total
        path[-1][0] += 1


class Reader:
    """A model that is a table: logits and a state for every text."""

    def __init__(self, seed, V=3):
        self.seed, self.V, self.known = seed, V, {}

    def __call__(self, text):
        if text not in self.known:
            g = torch.Generator().manual_seed(1 + self.seed + 7919 * int("1" + "".join(map(str, text))))
            self.known[text] = torch.randn(self.V, generator=g).double() * 1.2, torch.randn(4, generator=g)
        return self.known[text]


def read_on(reader, text, n, V):
    reader.states = {"normed": reader(tuple(text))[1][None]}
    return torch.stack([reader(tuple(text[: len(text) - i]))[0] for i in reversed(range(n))])


def gap(monkeypatch, arm, seed, lengths=None):
    """Between the law of decode()'s texts, by enumeration, and the target's: the greatest difference of a probability."""
    a, target, draft = args(max_new_tokens=3, most=3), Reader(seed), Reader(seed + 500)
    torch.manual_seed(seed)
    head = script.AcceptanceHead(4, a)
    with torch.no_grad():
        head.out.weight.mul_(4)
    monkeypatch.setattr(script, "read_on", read_on)

    def program(choose):
        monkeypatch.setattr(script, "uniform", lambda draws: Coin(choose))
        monkeypatch.setattr(script, "pick", lambda p, u: choose(p.tolist()))
        ids, _, count, _ = script.decode(target, draft, head, [0], arm, [2], None, 3, a)
        if lengths is not None:
            lengths.add(count["drafted"] / count["rounds"])
        return tuple(ids)

    def wanted(text=()):
        if len(text) == 3 or 2 in text:
            return {text: 1.0}
        p = target((0, *text))[0].softmax(-1).tolist()
        return {t: p[y] * x for y in range(3) for t, x in wanted((*text, y)).items()}

    with torch.no_grad():
        found, right = law_of(program), wanted()
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return max(abs(found[t] - right.get(t, 0)) for t in {*found, *right})


@each_rule
def test_enumerated_the_law_is_the_target_s(monkeypatch, arm):
    lengths = set()
    for seed in range(3):
        assert gap(monkeypatch, arm, seed, lengths) < 1e-12
    assert len(lengths) > 2


def all_but_a_bad_newest(real):
    """What must not be done: the newest candidate decides whether it is sent at all."""

    def propose(*given):
        ids, q, judged = real(*given)
        return (ids[:-1], q[:-1], judged) if len(ids) > 1 and q[-1][ids[-1]] < 0.4 else (ids, q, judged)

    return propose


BROKEN = {
    "propose": all_but_a_bad_newest,
    "residual": lambda real: lambda p, q: p,
    "acceptance": lambda real: lambda p, q: (p >= q).double(),
}


@pytest.mark.parametrize("part", BROKEN)
def test_enumeration_sees_what_is_broken(monkeypatch, part):
    monkeypatch.setattr(script, part, BROKEN[part](getattr(script, part)))
    assert gap(monkeypatch, ("head", 0.5), 0) > 1e-2


# ---------------------------------------------------------------- results


def test_results_from_rows():
    a = args(lengths=(2,), confidences=(0.5,), thresholds=(0.3, 0.7), costs=(0.1,), rejection_weight=3.0)
    names = ["K = 2", "confidence 0.5", "head 0.3", "head 0.7", "oracle 0.3", "oracle 0.7"]
    assert list(script.arms(a)) == names
    counts = {n: dict(rounds=2, drafted=4 + i, thrown=i, tokens=8) for i, n in enumerate(names)}
    rounds = {"head 0.3": [[[0.5], 1], [[0.5], 0]], "head 0.7": [[[], 1]]}
    row = dict(item=0, asked="1+1=", texts={}, right=dict.fromkeys(names, 1), counts=counts, rounds=rounds)
    row["pieces"] = {n: [["1", 0.5]] for n in names}
    found = script.results([row], a)
    assert found["table"]["head 0.7"] == {
        "accuracy": 1, "target calls": 0.25, "thrown away": 3 / 8, "drafted": 7 / 8, "time at 0.1": 0.25 + 0.0875,
        "ECE": None, "ECE, w undone": None,
    }  # fmt: skip
    assert found["table"]["head 0.3"]["ECE"] == 0 and found["table"]["head 0.3"]["ECE, w undone"] == pytest.approx(0.25)
    plane, by_h, whole, _ = (p["of"] for p in found["panels"])
    assert plane["oracle"] == [[0.25, 0.5], [0.25, 0.625]]
    assert whole == {"as fitted": [[0.5, 0.5]], "w = 3 undone": [[0.75, 0.5]]}
    assert by_h == {"0.1": [[0.3, pytest.approx(0.325)], [0.7, pytest.approx(0.3375)]]}


def test_no_round_was_judged():
    a = args(lengths=(1,), confidences=(0.5,), thresholds=(0.3,))
    names = list(script.arms(a))
    row = dict(asked="", right=dict.fromkeys(names, 0), rounds={"head 0.3": []}, pieces=dict.fromkeys(names, []))
    row["counts"] = dict.fromkeys(names, dict(rounds=1, drafted=1, thrown=0, tokens=1))
    assert script.results([row], a)["panels"][2]["of"] == {"as fitted": [], "w = 6 undone": []}


# ---------------------------------------------------------------- runs

FEW = """--items 2 --lengths 2 --confidences 0.5 --thresholds 0.5
    --label-samples 40 --head-batch 16 --head-epochs 2""".split()


def say_steps():
    """Makes this process print how many steps the head is trained for."""
    real = torch.optim.lr_scheduler.OneCycleLR.__init__

    def told(self, *given, total_steps, **more):
        print("the head's steps:", total_steps, flush=True)
        real(self, *given, total_steps=total_steps, **more)

    torch.optim.lr_scheduler.OneCycleLR.__init__ = told


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of one tokenizer, saved, the target's vocabulary padded further than the draft's; untrained."""
    out, tokenizer = [], tiny.characters()
    for name, rows_ in (("tiny", 80), ("tiny-small", 77)):
        folder = tmp_path_factory.mktemp(name)
        config = copy.deepcopy(tiny.config(name))
        config.vocab_size, config.tie_word_embeddings = rows_, False
        torch.manual_seed(0)
        lm = Qwen2ForCausalLM(config)
        with torch.no_grad():
            lm.lm_head.weight[len(tokenizer) :] = 0  # as good as never drawn beside the others' greater logits
            lm.lm_head.weight[: len(tokenizer)] *= 30
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        out.append(folder)
    return ["--model", out[0], "--draft", out[1], "--task", "addition", "--max-new-tokens", 8, "--dtype", "float32"]


def test_a_run(folders, tmp_path):
    """On two folders; texts with a token that only the target has are no labels, so that a few of the 40 may be missing."""
    folder = tmp_path / "run"
    done = run(tmp_path, *folders, *FEW, "--run-dir", folder, script=SCRIPT, before=say_steps)
    assert done.code == 0, done.err
    last = done.out.splitlines()[-1]
    assert "the head's steps: 6\n" in done.out and set(load_file(folder / "checkpoints" / "head.safetensors")) == {
        *(f"blocks.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")), "out.weight", "out.bias"
    }  # fmt: skip
    rows_ = lines(folder / "items.jsonl")
    assert [row["item"] for row in rows_] == [0, 1] and all(list(row["rounds"]) == ["head 0.5"] for row in rows_)
    assert (folder / "picture.png").exists() and (folder / "results.json").exists()
    for word in ("head 0.5: ", "K = 2: ", "confidence 0.5: ", "oracle 0.5: ", "each rule at its best"):
        assert word in last
    for row in rows_:
        for name, count in row["counts"].items():
            assert 1 <= count["rounds"] <= count["tokens"] <= 8 and len(row["pieces"][name]) == count["tokens"]


@pytest.mark.parametrize("flag, word", [
    (["--thresholds", 1.5], "--thresholds must be"), (["--mixing", 1], "--mixing must be"),
    (["--head-depth", 0], "--head-depth must be"), (["--rejection-weight", 0], "--rejection-weight must be above 0"),
    (["--draft", "nowhere"], "unknown model 'nowhere'"),
])  # fmt: skip
def test_mistakes(folders, tmp_path, flag, word):
    assert word in user_error(run(tmp_path, *folders, *flag, "--run-dir", tmp_path / "run", script=SCRIPT))
