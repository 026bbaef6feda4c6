"""R2Q: soft values on a token MDP whose numbers are known, beam search against brute force, and the script's two files."""

import itertools
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from algos import dpo, r2q
from tests import sync, test_gpu
from tests.helpers import ROOT, lines, logged, run, start, user_error
from tests.test_dpo import example

FEW = ["--beam-prompts", 16]

R2Q = ROOT / "algos" / "r2q.py"
FEW = "--steps 2 --pairs-per-step 8 --eval-prompts 8 --ref live --beams 1,3 --beam-prompts 6".split()


def test_the_loss_is_dpos():
    assert sync.chunks(R2Q.read_text())["pair_loss"] == sync.chunks((ROOT / "algos" / "dpo.py").read_text())["pair_loss"]
    logp, ref_logp, mask = example()
    losses, _ = r2q.pair_loss(logp, ref_logp, mask, r2q.Args(beta=0.5))
    assert losses.item() == pytest.approx(0.644397, abs=1e-6)
    for change in (dict(loss="ipo"), dict(loss="hinge"), dict(label_smoothing=0.1), dict(beta=1.0)):
        theirs, _ = dpo.pair_loss(logp, ref_logp, mask, dpo.Args(**dict(beta=0.5) | change))
        assert torch.equal(r2q.pair_loss(logp, ref_logp, mask, r2q.Args(**dict(beta=0.5) | change))[0], theirs)
        assert not torch.equal(theirs, losses)


# ---------------------------------------------------------------- the card's token MDP

A, B = 0, 1
REF = {(): [0.6, 0.4], (A,): [0.5, 0.5], (B,): [0.5, 0.5]}
REWARD = {(A, A): 1.0, (A, B): 1.0, (B, A): 2.0, (B, B): -3.0}  # paid with the last token


def solved(beta=1.0):
    """-> V* {prefix: value}, log pi* {prefix: [2]}, by the soft Bellman equations backwards."""
    V, logp = {ids: 0.0 for ids in REWARD}, {}
    for prefix in ((A,), (B,), ()):
        Q = [REWARD.get((*prefix, a), 0.0) + beta * math.log(REF[prefix][a]) + V[(*prefix, a)] for a in (A, B)]
        V[prefix] = beta * math.log(sum(math.exp(q / beta) for q in Q))
        logp[prefix] = [(q - V[prefix]) / beta for q in Q]
    return V, logp


def paths(logp):
    """-> log-probs [4, 2] of the tokens of aa, ab, ba, bb under pi* and under the reference."""
    both = [[[p[()][x], p[(x,)][y]] for x, y in REWARD] for p in (logp, {k: [math.log(q) for q in v] for k, v in REF.items()})]
    return (torch.tensor(x, dtype=torch.float64) for x in both)


def test_values_of_the_card():
    V, logp = solved()
    assert [V[(A,)], V[(B,)], V[()]] == pytest.approx([1.0, 1.313568, 1.137428], abs=1e-6)
    assert [math.exp(x) for x in logp[()]] == pytest.approx([0.522958, 0.477042], abs=1e-6)
    assert math.exp(logp[(B,)][A]) == pytest.approx(0.993307, abs=1e-6)


def test_credit_is_the_advantage():
    V, logp = solved()
    policy, ref_logp = paths(logp)
    c = r2q.token_advantages(policy.requires_grad_(), ref_logp, torch.ones(4, 2).bool(), r2q.Args(beta=1.0))
    expected = [[-0.137428, 0.0], [-0.137428, 0.0], [0.176140, 0.686432], [0.176140, -4.313568]]
    torch.testing.assert_close(c, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert not c.requires_grad
    for (x, _), (first, second), r in zip(REWARD, c.tolist(), REWARD.values()):  # r + V* ahead - V* here
        assert first == pytest.approx(V[(x,)] - V[()], abs=1e-12) and second == pytest.approx(r - V[(x,)], abs=1e-12)
    assert c.sum(1).tolist() == pytest.approx([r - V[()] for r in REWARD.values()], abs=1e-12)  # telescoping
    assert c.sum(1)[[0, 2, 3]].tolist() == pytest.approx([-0.137428, 0.862572, -4.137428], abs=1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.0])
def test_the_identities_hold_at_every_beta_and_the_loss_is_bradley_terry(beta):
    V, logp = solved(beta)
    policy, ref_logp = paths(logp)
    args, mask = r2q.Args(beta=beta), torch.ones(4, 2).bool()
    c = r2q.token_advantages(policy, ref_logp, mask, args)
    rewards = torch.tensor(list(REWARD.values()), dtype=torch.float64)
    torch.testing.assert_close(c.sum(1), rewards - V[()])
    pairs = list(itertools.permutations(range(4), 2))
    rows = [w for w, _ in pairs] + [l for _, l in pairs]
    losses, _ = r2q.pair_loss(policy[rows], ref_logp[rows], mask[rows], args)
    gaps = torch.stack([rewards[w] - rewards[l] for w, l in pairs])
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(gaps))  # V*(prompt) cancels


def test_samples_of_the_reference_lose_likelihood():
    policy, ref_logp = paths(solved()[1])
    expected = (ref_logp.sum(1).exp() * (policy - ref_logp).sum(1)).sum().item()
    assert expected == pytest.approx(-0.737428, abs=1e-6)


def test_credit_of_padding_is_zero():
    logp, ref_logp, mask = example()
    garbage = torch.tensor(float("nan"))
    c = r2q.token_advantages(torch.where(mask, logp, garbage), torch.where(mask, ref_logp, garbage), mask, r2q.Args(beta=0.5))
    torch.testing.assert_close(c, torch.tensor([[0.1, -0.1, 0.05], [-0.15, 0.1, 0.0]]))


def test_alignment():
    c, worth = torch.tensor([2.0, 0.0, -1.0, 0.5, -2.0, -1.0]), torch.tensor([1, 0, -1, 0, -1, 0])
    rejected = torch.tensor([0, 0, 1, 1, 1, 1]).bool()
    found = r2q.alignment(c, worth, rejected)
    assert found["wrong_token_auc"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)  # -1 ties with the other -1
    x, y = c - c.mean(), worth - worth.float().mean()
    assert found["correlation"] == pytest.approx((x @ y / x.norm() / y.norm()).item(), abs=1e-6)
    assert r2q.alignment(c, worth, ~rejected)["wrong_token_auc"] is None  # the wrong tokens are not theirs
    nothing = r2q.alignment(torch.zeros(6), worth, rejected)
    assert nothing == dict(correlation=None, wrong_token_auc=0.5)


# ---------------------------------------------------------------- beam search


class Rows:
    """What beam_search needs of a Decoder, over logp(prefix) -> [V]: it has the prefixes themselves, and counts
    how often it reads."""

    def __init__(self, logp, prompts):
        self.logp, self.prefixes, self.calls = logp, [list(p) for p in prompts], 1
        self._read()

    def _read(self):
        rows = [torch.as_tensor(self.logp(tuple(p)), dtype=torch.float64) for p in self.prefixes]
        self.logits = torch.stack(rows)

    def keep(self, index):
        self.prefixes = [self.prefixes[i] for i in index.tolist()]

    def feed(self, tokens):
        assert len(tokens) == len(self.prefixes)
        self.prefixes, self.calls = [p + [t] for p, t in zip(self.prefixes, tokens.tolist())], self.calls + 1
        self._read()


def search(logp, prompts, *args):
    return r2q.beam_search(Rows(logp, prompts), *args)


def mdp(logp):
    return lambda prefix: logp[prefix]


def test_greedy_misses_what_two_beams_find():
    found = {k: search(mdp(solved()[1]), [[]], k, [], 2)[0] for k in (1, 2)}
    assert found[1][0][2][0] == A and math.exp(found[1][0][1]) == pytest.approx(0.261479, abs=1e-6)
    assert found[2][0][2] == [B, A] and math.exp(found[2][0][1]) == pytest.approx(0.473849, abs=1e-6)
    assert len(found[1]) == 1 and len(found[2]) == 2


class Table:
    """Random next-token distributions over V tokens."""

    def __init__(self, seed, V=4, spread=2.0):
        self.seed, self.V, self.spread = seed, V, spread

    def logp(self, prefix):
        g = torch.Generator().manual_seed(hash((self.seed, *prefix)) % 2**31)
        return (self.spread * torch.randn(self.V, generator=g, dtype=torch.float64)).log_softmax(-1)


def everything(table, prompt, end, longest, penalty=0.0):
    """All responses, best first: those that end, and those that are cut."""
    out = []
    for n in range(1, longest + 1):
        for ids in itertools.product(range(table.V), repeat=n):
            if not set(ids[:-1]) & set(end) and (ids[-1] in end or n == longest):
                total = sum(table.logp((*prompt, *ids[:t]))[ids[t]].item() for t in range(n))
                out.append((total / n**penalty, total, list(ids)))
    return sorted(out, key=lambda r: -r[0])


@pytest.mark.parametrize("end", [[0], [0, 2], []])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_are_exhaustive(end, penalty):
    prompts = [[5], [6, 7], [8]]
    found = search(Table(1).logp, prompts, 300, end, 4, penalty)
    for prompt, mine in zip(prompts, found):
        best = everything(Table(1), prompt, end, 4, penalty)
        assert [ids for *_, ids in mine] == [ids for *_, ids in best][: len(mine)] and len(mine) == min(300, len(best))
        assert [s for s, *_ in mine] == pytest.approx([s for s, *_ in best][: len(mine)])


def plain(table, prompt, k, end, longest, penalty):
    """Beam search as one would write it down: a prompt alone, no early stop, every token of every prefix a candidate."""
    beams, finished = [(0.0, [])], []
    for n in range(1, longest + 1):
        some = [(s + v, [*ids, a]) for s, ids in beams for a, v in enumerate(table.logp((*prompt, *ids)).tolist())]
        some.sort(key=lambda c: -c[0])
        finished += [(s / n**penalty, s, ids) for s, ids in some[:k] if ids[-1] in end or n == longest]
        beams = [c for c in some if c[1][-1] not in end][:k]
    return sorted(finished, key=lambda f: -f[0])[:k]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_batched_and_stopped_early_it_is_the_plain_search(k, penalty):
    stopped = 0
    for seed in range(6):
        table, prompts = Table(seed, V=5), [[7], [8, 9], [10]]
        rows = Rows(table.logp, prompts)
        found = r2q.beam_search(rows, k, [1, 3], 7, penalty)
        stopped += rows.calls < 7
        for prompt, mine in zip(prompts, found):
            theirs = plain(table, prompt, k, [1, 3], 7, penalty)
            assert [ids for *_, ids in mine] == [ids for *_, ids in theirs]
            assert [s for s, *_ in mine] == pytest.approx([s for s, *_ in theirs])
    assert stopped or penalty  # a long response may still win by its length


def test_one_beam_is_greedy():
    for seed in range(5):
        table, ids = Table(seed), []
        while len(ids) < 6 and (not ids or ids[-1] != 0):
            ids.append(table.logp((9, *ids)).argmax().item())
        assert search(table.logp, [[9]], 1, [0], 6)[0][0][2] == ids


def test_the_length_penalty_prefers_long_responses():
    """Ending at once has probability 0.3, going on for two tokens more 0.6 * 0.4: with p = 1 the longer one is the better."""
    rows = {(): [0.3, 0.6, 0.1], (1,): [0.4, 0.3, 0.3], (2,): [0.1, 0.45, 0.45]}
    table = mdp({k: [math.log(p) for p in v] for k, v in rows.items()})
    assert search(table, [[]], 2, [0], 2)[0][0][2] == [0]
    (score, total, ids), *_ = search(table, [[]], 2, [0], 2, 1.0)[0]
    assert ids == [1, 0] and total == pytest.approx(math.log(0.24)) and score == pytest.approx(total / 2)


def test_impossible_tokens_are_never_taken():
    table = mdp({(): [-math.inf, 0.0], (1,): [math.log(0.5), math.log(0.5)]})
    assert [ids for *_, ids in search(table, [[]], 3, [], 2)[0]] == [[1, 0], [1, 1]]


def test_the_decoder_says_what_a_forward_pass_says():
    """Prompts of different lengths, prefixes that are dropped, copied and reordered, against the model without a
    cache: what is in the decoder's rows are the prefixes that the search takes them for."""
    from transformers import Qwen2ForCausalLM

    from common.engines import Decoder
    from common.worlds import tiny

    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(tiny.config()).double().eval()
    with torch.no_grad():
        for p in lm.parameters():
            p.mul_(3)  # so that tokens matter

    def logp(prefix):
        return lm(input_ids=torch.tensor([prefix]), use_cache=False).logits[0, -1].log_softmax(-1)

    class Compared(Rows):
        def __init__(self, prompts):
            self.decoder, self.widths = Decoder(lm, prompts), []
            super().__init__(logp, prompts)

        def _read(self):
            super()._read()
            self.widths.append(len(self.prefixes))
            torch.testing.assert_close(self.decoder.logits.log_softmax(-1), self.logits, rtol=0, atol=1e-8)

        def keep(self, index):
            super().keep(index)
            self.decoder.keep(index)

        def feed(self, tokens):
            self.decoder.feed(tokens)
            super().feed(tokens)

    with torch.no_grad():
        prompts, rest = [[5, 6, 7, 8], [9], [20, 21]], (3, [40, 41, 42, 43, 44], 5)
        compared = Compared(prompts)
        expected = r2q.beam_search(compared, *rest)
        found = r2q.beam_search(Decoder(lm, prompts), *rest)
    assert compared.widths[:2] == [3, 9] and len(compared.widths) == compared.calls == 5
    for mine, theirs in zip(found, expected):
        assert [ids for *_, ids in mine] == [ids for *_, ids in theirs]
        assert [s for s, *_ in mine] == pytest.approx([s for s, *_ in theirs], abs=1e-8)


# ---------------------------------------------------------------- runs


def test_a_run_writes_credit_and_beams(tmp_path):
    """Two processes are one, and what the files say is what the model says."""
    from common import models, pairs, settings
    from common.engines import Decoder

    exact = [*FEW, "--dtype", "float64", "--lr", "1e-3", "--run-dir"]
    done = run(tmp_path, *exact, tmp_path / "1", script=R2Q)
    assert done.code == 0 and not done.err
    for out in (done.out, test_gpu.launch(2, *exact, tmp_path / "2", script="algos/r2q.py")):
        assert out.count("  policy, width 3: logp -") == 1 and out.count("credit: correlation 0.") == 1
    a, b = (json.loads((tmp_path / r / "beams.json").read_text()) for r in "12")
    credit, again = (json.loads((tmp_path / r / "credit.json").read_text()) for r in "12")
    assert a["prompts"] == 6 and set(a["policy"]) == set(a["reference"]) == {"1", "3"}
    for name, width in itertools.product(("policy", "reference"), "13"):
        assert a[name][width] == pytest.approx(b[name][width], abs=1e-6)
        assert set(a[name][width]) == {"logp", "length", "gold_reward"}
    assert a["policy"]["3"]["logp"] > a["policy"]["1"]["logp"] and a["policy"] != a["reference"]
    assert again["correlation"] == pytest.approx(credit["correlation"], abs=1e-6) and credit["correlation"] > 0.3
    # The same by hand: reload the weights, and read the first held-out pair, without a cache.
    folder = next((tmp_path / "1" / "checkpoints").glob("step-000002"))
    args, config = settings.resolve(r2q.Args(model=str(folder), data="letters", dtype="float64", optimizer="adamw", beta=1.0,
                                           max_new_tokens=12, micro_batch_tokens=16384))  # fmt: skip
    tokenizer = models.load_tokenizer(args)
    pair = pairs.load(args, config, tokenizer).test[0]
    policy = models.load(args, "cpu", trainable=False)
    args.model = "tiny"
    reference = models.load(args, "cpu", trainable=False)
    for row, ids, gold in zip(credit["responses"], (pair.chosen, pair.rejected), pair.gold):
        now, ref = (pairs.logp_of(m, [(pair.prompt, ids)], args)[0] for m in (policy, reference))
        assert row["c"] == pytest.approx((now - ref).tolist(), abs=1e-6) and max(map(abs, row["c"])) > 1e-3
        assert row["worth"] == gold and "".join(row["tokens"]) == tokenizer.decode(ids)
    with torch.no_grad():
        found = r2q.beam_search(Decoder(policy.lm, [pair.prompt]), 3, [tokenizer.eos_token_id], 12)
    _, total, ids = found[0][0]
    assert ids[-1] == tokenizer.eos_token_id and len(ids) == 9
    assert total == pytest.approx(pairs.logp_of(policy, [(pair.prompt, ids)], args)[0].sum().item(), abs=1e-6)


def test_flags_of_the_search(tmp_path):
    once = [*FEW, "--steps", 1, "--eval-prompts", 4]
    done = run(tmp_path, *once, "--beams", "2", "--beam-prompts", 3, "--run-dir", tmp_path / "a", script=R2Q)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "a" / "beams.json").read_text())
    assert found["prompts"] == 3 and set(found["policy"]) == {"2"}
    done = run(tmp_path, *once, "--beams", "", "--run-dir", tmp_path / "b", script=R2Q)
    assert done.code == 0 and not (tmp_path / "b" / "beams.json").exists() and "width" not in done.out
    assert lines(tmp_path / "b" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_stopped_run_measures_when_it_is_resumed(tmp_path):
    folder = tmp_path / "run"
    child = start(tmp_path, *FEW, "--steps", 6, "--run-dir", folder, script=R2Q)
    assert child.until(lambda: logged(folder) == 2), child.wait()
    os.kill(child.pid, signal.SIGTERM)
    done = child.wait()
    assert done.code == 0 and done.out.splitlines()[-1].startswith("stopped after step")
    assert not (folder / "credit.json").exists() and not (folder / "beams.json").exists()
    done = run(tmp_path, "--resume", folder, script=R2Q)
    assert done.code == 0, done.err
    assert (folder / "credit.json").exists() and (folder / "beams.json").exists()


def test_no_search_where_no_process_has_a_whole_policy(tmp_path, monkeypatch):
    """Under torchrun with vLLM: a line says so, where a search was asked for."""
    from common import gpu

    monkeypatch.setattr(gpu, "world", lambda: 2)
    said, data = [], SimpleNamespace(test=[])
    bar = SimpleNamespace(write=said.append)
    run = SimpleNamespace(args=r2q.Args(), main=True, dir=tmp_path, bar=bar)
    vllm = SimpleNamespace(name="vllm")
    r2q.measure_beams(run, [], data, None, vllm, None)
    assert said == []
    r2q.measure_beams(run, [1, 2], data, None, vllm, None)
    assert len(said) == 1 and "note: no beam search" in said[0] and not list(tmp_path.iterdir())


MISTAKES = [
    ("--beams", "1,two", "--beams: widths of at least 1 with commas"),
    ("--beams", "0", "--beams: widths of at least 1 with commas"),
    ("--beam-prompts", 0, "--beam-prompts must be at least 1, is 0"),
    ("--length-penalty", -1, "--length-penalty must be at least 0, is -1"),
    ("--length-penalty", "inf", "--length-penalty must be at least 0, is inf"),
]


@pytest.mark.parametrize("flag, value, says", MISTAKES)
def test_mistakes_end_in_one_line(tmp_path, flag, value, says):
    assert says in user_error(run(tmp_path, flag, value, script=R2Q))
