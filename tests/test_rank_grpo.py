"""Rank-GRPO's worked numbers, ranks by token ids, rewards and advantages of ranks, the length, and what a run logs."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, decoders, pre_tokenizers
from transformers import Qwen2Config

from algos import gspo, rank_grpo
from common import UserError, settings, tasks
from common.worlds import tiny as models
from common.worlds import titles
from tests.helpers import ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
EOS = 1
# Two lists of two ranks: 2 + 1 and 1 + 2 tokens.
RANKS = torch.tensor([[0, 0, 1], [0, 1, 1]])
MOVED = torch.tensor([[0.2, -0.1, 0.3], [-0.2, 0.1, 0.1]], dtype=torch.float64)
ADV = torch.tensor([[1.0, 1, -1], [-1, 1, 1]], dtype=torch.float64)


def args(**changes):
    return rank_grpo.Args(**dict(items=5) | changes)


def loss(script=rank_grpo, moved=MOVED, adv=ADV, rank_id=RANKS, a=None, mask=None):
    """As the loop forms it of one minibatch -> loss, gradient."""
    a, mask = a or args(items=2), torch.ones_like(moved, dtype=torch.bool) if mask is None else mask
    old = torch.full_like(moved, -1.5)
    logp, more = (old + moved).requires_grad_(), (rank_id,) if script is rank_grpo else ()
    objective, _ = script.surrogate(logp, old, adv, mask, a, *more)
    value = -(objective * script.token_weights(mask, a, *more))[mask].sum()
    value.backward()
    return value.item(), logp.grad


@pytest.mark.parametrize(
    "average, value, first", [("tokens", -0.328781, [-0.175212, -0.175212, 0.224976]),
                              ("ranks", 0.039647, [-0.131409, -0.131409, 0.337465])])  # fmt: skip
def test_worked_numbers(average, value, first):
    """The second list is clipped in both ranks. By its own ratio of 1.221 the very first token would be, and by its
    neighbour's 0.905 that one would not: they move together."""
    found, gradient = loss(a=args(items=2, average=average))
    assert found == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([first, [0.0] * 3], dtype=torch.float64), **CLOSE)


def test_the_ratio_is_the_geometric_mean_of_the_rank():
    old, a = torch.zeros_like(MOVED), args(eps_low=9.0, eps_high=9.0)
    ratio, stats = rank_grpo.surrogate(MOVED, old, torch.ones_like(MOVED), MOVED < 9, a, RANKS)
    wanted = torch.tensor([[1.051271, 1.051271, 1.349859], [0.818731, 1.105171, 1.105171]], dtype=torch.float64)
    torch.testing.assert_close(ratio, wanted, **CLOSE)
    assert not stats["clip_fraction"].any()
    _, stats = rank_grpo.surrogate(MOVED, old, ADV, MOVED < 9, args(), RANKS)
    assert stats["clip_fraction"].tolist() == [[0, 0, 0], [1, 1, 1]]


def test_tokens_of_a_rank_have_its_mean_advantage():
    """What an EOS has reaches the tokens of its line, and their advantage reaches it: the gradient runs through the mean."""
    adv, still = torch.tensor([[1.0, 1.0, 0.4], [0.0, 0, 0]], dtype=torch.float64), torch.zeros_like(MOVED)
    _, gradient = loss(moved=still, adv=adv, rank_id=torch.zeros_like(RANKS))
    torch.testing.assert_close(gradient[0], torch.full((3,), -0.8 / 6, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
def test_one_line_is_gspo(seed):
    """N = 1, without an end: the surrogate of a sequence, and with the mean over ranks its very loss."""
    g = torch.Generator().manual_seed(seed)
    moved, adv = 0.3 * torch.randn(6, 5, generator=g), torch.randn(6, 1, generator=g).expand(6, 5)
    mask = torch.arange(5) < torch.tensor([5, 4, 1, 5, 0, 2])[:, None]
    rank_id = rank_grpo.segments(torch.zeros_like(mask), mask, args(items=1))
    mine = loss(moved=moved, adv=adv, rank_id=rank_id, a=args(items=1, average="ranks"), mask=mask)
    theirs = loss(gspo, moved=moved, adv=adv, a=gspo.Args(eps_low=0.06, eps_high=0.08), mask=mask)
    assert mine[0] == pytest.approx(theirs[0], abs=1e-7) and theirs[1].any() and (theirs[1][mask] == 0).any()
    torch.testing.assert_close(mine[1], theirs[1])
    old = torch.zeros_like(moved)
    both = [s.surrogate(moved, old, adv, mask, a, *more) for s, a, more in
            ((rank_grpo, args(), (rank_id,)), (gspo, gspo.Args(eps_low=0.06, eps_high=0.08), ()))]  # fmt: skip
    torch.testing.assert_close(both[0][0][mask], both[1][0].expand_as(mask)[mask])


def test_weights():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    rank_id = torch.tensor([[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 0]])
    tokens = rank_grpo.token_weights(mask, args(), rank_id)
    assert torch.equal(tokens, mask / 6)
    ranks = rank_grpo.token_weights(mask, args(items=2, average="ranks"), rank_id)  # a rank without tokens counts as one
    torch.testing.assert_close(ranks, torch.tensor([[1 / 12] * 3 + [1 / 4], [1 / 4, 1 / 4, 0, 0], [0.0] * 4]))


# ---------------------------------------------------------------- ranks


def segments(*ids, items=5, breaks=((1, 1),), n=None):
    mask = torch.arange(len(ids)) < (len(ids) if n is None else n)
    counts = torch.tensor([[dict(breaks).get(i, 0) for i in ids]])
    return rank_grpo.segments(counts, mask[None], args(items=items))[0].tolist()


def test_segments():
    assert segments(12, 9, 1, 6, 1, 17) == [0, 0, 0, 1, 1, 2]
    assert segments(12, 1, 3, 1, 4, 1, 5, 1, 6, items=2) == [0, 0, 1, 1, 2, 2, 2, 2, 2]  # behind line N all is one
    assert segments(8, 7, 8, 1, 8, breaks={1: 1, 7: 2}) == [0, 0, 2, 2, 3]  # two breaks in a token: a rank without tokens
    assert segments(8, 7, 8, breaks={7: 9}) == [0, 0, 5]
    assert segments(1, 1, 8) == [0, 1, 2] and segments(8) == [0]
    assert segments(8, 1, 8, 1, 1, 1, n=3) == [0, 0, 1, 1, 1, 1]  # padding holds no breaks
    assert segments(8, 1, 8, n=0) == [0, 0, 0]


@pytest.fixture(scope="module")
def pairs():
    """A tokenizer that has two line breaks, and one behind a comma, in one token."""
    pieces = ["\n\n", ",\n", *models.CHARACTERS]
    return models._tokenizer(pieces, pre_tokenizers.Split(Regex(r"\n\n|,\n|[\s\S]"), "isolated"), decoders.Fuse())


def listed(tokenizer, text, gold, ended=True, **changes):
    """A completion's rank ids, lines and rel, as the loop forms them."""
    a = args(**changes)
    ids = torch.tensor([tokenizer(text).input_ids + [EOS] * ended + [0, 7]])
    mask = (torch.arange(ids.shape[1]) < ids.shape[1] - 2)[None]
    rank_id = rank_grpo.segments(rank_grpo.newlines(ids, tokenizer), mask, a)
    rows = rank_grpo.written(ids, rank_id, mask & (ids != EOS), tokenizer, a)
    return rank_id[0][mask[0]].tolist(), rows[0], rank_grpo.relevance(rows, ["\t".join(gold)])[0].tolist()


TEXTS = [
    ("aa\nbb\ncc", ["aa", "bb", "cc", "", ""], [1, 0, 1, 0, 0]),
    ("aa\nno item\ncc\ndd\ne", ["aa", "no item", "cc", "dd", "e"], [1, 0, 1, 1, 0]),  # a bad line shifts nothing
    ("aa\n\ncc\n\n\nff", ["aa", "", "cc", "", ""], [1, 0, 1, 0, 0]),  # nor does a blank one, and line 6 has no rank
    ("cc\naa\ncc\ncc\ndd", ["cc", "aa", "cc", "cc", "dd"], [1, 1, 0, 0, 1]),  # once
    ("aa\ncc,\n dd \n", ["aa", "cc,", "dd", "", ""], [1, 0, 1, 0, 0]),
    ("", [""] * 5, [0] * 5),
    ("\n\n\n\naa", ["", "", "", "", "aa"], [0, 0, 0, 0, 1]),
    ("aa cc\naacc\nAA\n-\nc", ["aa cc", "aacc", "AA", "-", "c"], [0] * 5),
]


@pytest.mark.parametrize("text, rows, rel", TEXTS)
def test_lines_by_token_ids(pairs, text, rows, rel):
    """Whatever the tokens are, what stands on line k is paid to the tokens with rank id k."""
    for tokenizer in (models.characters(), pairs):
        for ended in (True, False):
            ids, found, paid = listed(tokenizer, text, ("aa", "cc", "dd"), ended)
            assert found == rows and paid == rel, tokenizer
            pieces = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
            ends = ["".join(pieces[: t + 1]).count("\n") for t in range(len(pieces))]
            assert ids == [min(5, n) for n in [0, *ends][: len(pieces)] + ends[-1:] * ended] or not pieces


def test_an_end_that_is_no_special_token_is_no_part_of_the_line():
    tokenizer = models.characters()
    end = tokenizer("z").input_ids[0]
    ids = torch.tensor([tokenizer("aa\nccz").input_ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    rank_id = rank_grpo.segments(rank_grpo.newlines(ids, tokenizer), mask, args())
    assert rank_grpo.written(ids, rank_id, mask & (ids != end), tokenizer, args())[0][:2] == ["aa", "cc"]


def test_rank_rewards():
    rel = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])
    found = {kind: rank_grpo.rank_rewards(rel, args(rank_reward=kind)) for kind in ("exp_inf", "exp", "log_decay")}
    assert torch.equal(found["exp_inf"], rel)
    torch.testing.assert_close(found["log_decay"][0], torch.tensor([1.5, 0.5, 0.5]), **CLOSE)
    torch.testing.assert_close(found["log_decay"][2], torch.tensor([2.130930, 1.130930, 0.5]), **CLOSE)
    torch.testing.assert_close(found["exp"], torch.tensor([[1.25, 0.5, 1], [0, 0, 0], [1.75, 1.5, 1]]), **CLOSE)
    torch.testing.assert_close(rank_grpo.rank_rewards(rel, args(rank_reward="exp", gamma=1.0))[2], torch.tensor([3.0, 2, 1]))
    far = rank_grpo.rank_rewards(torch.ones(1, 20), args(rank_reward="exp", gamma=1e30))
    assert torch.equal(far, torch.ones(1, 20))  # the limit is exp_inf, without an overflow


def test_no_rank_is_paid_for_what_stands_before_it():
    g = torch.Generator().manual_seed(0)
    rel = (torch.rand(50, 6, generator=g) < 0.5).float()
    for kind in ("exp_inf", "exp", "log_decay"):
        for k in range(1, 6):
            other = rel.clone()
            other[:, :k] = 1 - other[:, :k]
            one, two = (rank_grpo.rank_rewards(x, args(rank_reward=kind)) for x in (rel, other))
            assert torch.equal(one[:, k:], two[:, k:]) and not torch.equal(one[:, :k], two[:, :k])


def test_advantages_are_a_rank_s_own():
    """Mean and sample std of a rank in its group. A rank where all agree has none, and the others learn; a missing line is a
    0 among the others' hits."""
    rel = torch.tensor([[[1.0, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]], [[0, 1, 0.3], [1, 1, 0.3], [1, 1, 0.3], [1, 0, 0.3]]])
    adv = rank_grpo.advantages(rel, args())
    assert not adv[0, :, 0].any() and not adv[1, :, 2].any()
    # 1/2 / (0.577350 + 1e-4); 1/4 and 3/4 / (1/2 + 1e-4)
    torch.testing.assert_close(adv[0, :, 1], torch.tensor([0.865876, -0.865876, -0.865876, 0.865876]), **CLOSE)
    torch.testing.assert_close(adv[0, :, 2], torch.tensor([-0.4999, -0.4999, -0.4999, 1.4997]), **CLOSE)
    torch.testing.assert_close(adv[1, :, 0], torch.tensor([-1.4997, 0.4999, 0.4999, 0.4999]), **CLOSE)
    for k in range(3):
        torch.testing.assert_close(rank_grpo.advantages(rel[:, :, k : k + 1], args())[:, :, 0], adv[:, :, k])
        torch.testing.assert_close(rank_grpo.advantages(rel[:, :, k], args()), adv[:, :, k])


# ---------------------------------------------------------------- the length


def spread(text, adv=(1.0, -1.0, 2.0, -2.0, 3.0), ended=True, **changes):
    """The advantages of a completion's tokens; two columns of padding follow."""
    a, tokenizer = args(**changes), models.characters()
    ids = torch.tensor([tokenizer(text).input_ids + [EOS] * ended + [EOS, tokenizer("\n").input_ids[0]]])
    mask = (torch.arange(ids.shape[1]) < ids.shape[1] - 2)[None]
    rank_id = rank_grpo.segments(rank_grpo.newlines(ids, tokenizer), mask, a)
    found = rank_grpo.token_advantages(torch.tensor([adv[: a.items]]), rank_id, mask, mask & (ids == EOS), a)
    assert not found[~mask].any()
    return [round(v, 6) for v in found[0][mask[0]].tolist()]


def test_advantages_of_tokens():
    """The line break belongs to the line that it ends."""
    assert spread("aa\nb\nc\nd\ne") == [1, 1, 1, -1, -1, 2, 2, -2, -2, 3, 0.4]
    assert spread("a\nb\nc") == [1, 1, -1, -1, 2, -0.4]  # too short
    assert spread("a\nb\nc\nd\ne\nff\ng") == [1, 1, -1, -1, 2, 2, -2, -2, 3, 3] + [-0.4] * 5  # too long, the EOS as well
    assert spread("a\nb\nc\nd\ne\n") == [1, 1, -1, -1, 2, 2, -2, -2, 3, 3, 0.4]  # a last break opens no line
    assert spread("a\nb\nc\nd\n") == [1, 1, -1, -1, 2, 2, -2, -2, -0.4]  # and five breaks make no five lines
    assert spread("a\nb", ended=False) == [1, 1, -1] and spread("a\nb\nc\nd\ne", ended=False)[-1] == 3  # cut: no EOS
    assert spread("") == [-0.4] and spread("", ended=False) == [] and spread("\n") == [1, -0.4]
    assert spread("a\n\nc\n\ne") == [1, 1, -1, 2, 2, -2, 3, 0.4]  # blank lines are lines


def test_the_length_s_weight():
    """0.1 at N = 20; a line too few is a larger part of a shorter list."""
    for items, bonus, penalty in ((20, 0.1, 0.1), (5, 0.4, 0.4), (2, 1.0, 1.0)):
        full = spread("\n".join("a" * items), adv=(0.0,) * 20, items=items)
        assert full == [0.0] * (2 * items - 1) + [bonus]
        assert spread("a", adv=(0.0,) * 20, items=items) == [0, -penalty]
    assert spread("a\nb\nc\nd\ne", length_bonus=0.0, length_penalty=0.3)[-1] == 0
    assert spread("a\nb\nc\nd\ne\nf", length_bonus=0.3, length_penalty=0.0)[-2:] == [0, 0]
    assert spread("a", length_penalty=0.3) == [1, -1.2]


# ---------------------------------------------------------------- flags, tasks, runs


@pytest.mark.parametrize("changes", [dict(average="ranks"), dict(eps_low=0.01), dict(eps_high=0.01)])
def test_flags_of_the_loss(changes):
    moved = torch.tensor([[0.01, 0.04, -0.05], [-0.05, 0.07, 0.01]], dtype=torch.float64)
    assert abs(loss(moved=moved)[0] - loss(moved=moved, a=args(items=2, **changes))[0]) > 1e-4


def test_presets_and_limits(tmp_path):
    Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2).save_pretrained(tmp_path)  # fmt: skip
    small, _ = settings.resolve(rank_grpo.Args())
    real, _ = settings.resolve(rank_grpo.Args(model=str(tmp_path)))
    assert (small.task, small.items, small.max_new_tokens, small.beta) == ("titles", 5, 40, 1e-3)
    assert (real.task, real.items, real.prompt_template, real.beta) == ("gsm8k", 20, "{prompt}", 1e-3)
    for bad in (dict(items=0), dict(gamma=0.5), dict(format_reward=0.1)):
        with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
            settings.resolve(rank_grpo.Args(**bad))


@pytest.mark.parametrize("name", ["route", "addition", "chain"])
def test_a_task_without_lists_is_refused(name):
    with pytest.raises(UserError, match="its answers are no lists"):
        rank_grpo.listed(tasks.load(name), args())


def test_it_is_refused_before_a_model_is_made(tmp_path):
    done = run(
        tmp_path, "--task", "route", script=ROOT / "algos" / "rank_grpo.py", env=dict(TOKENPO_CACHE=str(tmp_path / "no"))
    )
    assert "--task route: its answers are no lists of relevant items" in user_error(done) and not (tmp_path / "no").exists()


def test_the_check_is_the_world_s():
    """And looks at N lines, here of other N as well."""
    task, right = tasks.load("titles"), {e.prompt: e.answer for e in tasks.load("titles").test}
    task, catalog = rank_grpo.listed(task, args())
    assert catalog == set(titles.TITLES) and task.inline
    rng = random.Random(0)
    for e in task.test:
        text = "\n".join(
            rng.choice([*titles.TITLES[:9], *right[e.prompt].split("\t"), "", "x"]) for _ in range(rng.randint(0, 7))
        )
        read, score = task.check(text, e.answer)
        assert score == pytest.approx(titles.check(text, right[e.prompt])[1], abs=1e-6) and read == (text or None)
    e = task.test[0]
    e.answer = (" oru", "kesta", "oru")
    twice, catalog = rank_grpo.listed(tasks.Task("lists", [e], [], None), args())
    assert twice.check("kesta\noru", e.answer)[1] == 1.0 and catalog == {"oru", "kesta"}
    e = task.test[1]
    three, _ = rank_grpo.listed(tasks.load("titles"), args(items=3))
    assert three.check("\n".join(right[e.prompt].split("\t")[:3]), e.answer)[1] == 1.0 and task.check("x", e.answer)[1] == 0
    gain = rank_grpo.ndcg(torch.tensor([[0.0, 1, 1, 0]]), ["aa\tbb"])
    best = torch.tensor([1.0, 1.630930, 1.630930, 1.630930])  # two are relevant
    torch.testing.assert_close(gain[0], torch.tensor([0, 0.630930, 1.130930, 1.130930]) / best, **CLOSE)


def test_a_reward_of_one_s_own_sees_the_whole_list(tmp_path):
    (tmp_path / "own.py").write_text("def share(text, answer):\n    return len(answer.split('\\t')) / 10\n")
    task, _ = rank_grpo.listed(tasks.load("titles", reward=f"{tmp_path}/own.py:share"), args(reward="set"))
    assert task.check("oru", task.test[0].answer) == (None, 0.8) and not task.inline


def test_measures_of_long_lists():
    """Of the last two lists, the same lines, one was cut. A blank line is no item, and no repetition of another."""
    found = {}
    meter = SimpleNamespace(add=lambda stats, mask: found.update({k: v[mask].mean().item() for k, v in stats.items()}))
    long = ["", "", "c", "b", "a", "z", "y"]
    rows = [["a", "b", "x", "a", "", "", ""], ["c", "", "", "", "", "", ""], long, long]
    rank_id = torch.tensor([[0, 1, 2, 3, 3], [0, 0, 0, 0, 0], [2, 3, 4, 5, 6], [3, 4, 5, 6, 6]])
    mask = torch.arange(5) < torch.tensor([5, 2, 5, 5])[:, None]
    eos = torch.zeros_like(mask)
    eos[0, 4] = eos[1, 1] = eos[3, 4] = True
    batch = SimpleNamespace(mask=mask, columns=dict(rank_id=rank_id), gold=["a\tb\tc", "c", "a\tb\tc", "a\tb\tc"])
    rank_grpo.measure(meter, batch, rows, rank_grpo.relevance(rows, batch.gold), eos, {"a", "b", "c"})
    assert set(found) == {"hit_1", "hit_7", "ndcg_1", "ndcg_7", "hit_mean", "exact", "invalid", "repeats"}
    assert found["hit_1"] == found["ndcg_1"] == 1 / 2 and found["hit_7"] == 0 and found["hit_mean"] == pytest.approx(9 / 28)
    assert found["invalid"] == pytest.approx(9 / 19) and found["repeats"] == pytest.approx(1 / 19) and found["exact"] == 1 / 4


SMALL = "--steps 1 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()


def test_a_run_pays_ranks(tmp_path):
    """Its advantages are those of the lists that samples.jsonl shows, formed by hand."""
    argv = [*SMALL, "--run-dir", tmp_path / "run", "--rank-reward", "log_decay"]
    done = run(tmp_path, *argv, script=ROOT / "algos" / "rank_grpo.py")
    assert done.code == 0, done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    hits = [row[f"hit_{k}"] for k in range(1, 6)]
    assert row["hit_mean"] == pytest.approx(sum(hits) / 5) and row["ndcg_1"] == hits[0] and 0.3 < row["hit_mean"] < 0.7
    assert row["ndcg_5"] == pytest.approx(row["accuracy"], abs=1e-6) and row["ref_kl"] > 0
    assert 0.5 < row["exact"] < 1 and row["invalid"] < 0.1 and 0 < row["repeats"] < 0.3
    samples = lines(tmp_path / "run" / "samples.jsonl")
    rows = [(s["completion"].split("\n") + [""] * 5)[:5] for s in samples]
    rel = rank_grpo.relevance(rows, [s["right"] for s in samples])
    adv = rank_grpo.advantages(rank_grpo.rank_rewards(rel, args(rank_reward="log_decay"))[None], args())[0]
    for s, mine in zip(samples, adv.tolist()):
        n, at, wanted, ids = len(s["completion"].split("\n")), 0, [], []
        for token in s["tokens"]:
            over, end = at >= 5, token == "<eos>"
            wanted.append((0.4 if n == 5 else -0.4) if end else -0.4 if over else mine[at])
            ids.append(min(at, 5))
            at += token == "\n"
        assert s["columns"]["rank_id"] == ids and s["columns"]["adv"] == pytest.approx(wanted, abs=1e-3)


def test_a_run_on_lists_of_one_s_own(tiny, tmp_path):
    """Answers in a file; the model knows nothing of them, and its lines are invalid."""
    rows = [dict(prompt=f"{a}+{b}=", answer=[str(a + b), "7+8"]) for a, b in zip(range(12, 60, 3), range(81, 33, -3))]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    local = f"--model {tiny} --dtype float32 --max-new-tokens 28 --prompt-template {{prompt}} --items 7".split()
    argv = [*SMALL, *local, "--task", tmp_path / "lists.jsonl", "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *argv, script=ROOT / "algos" / "rank_grpo.py")
    assert done.code == 0, done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["hit_1"] == row["hit_7"] == row["accuracy"] == 0 and row["invalid"] > 0.9 and row["grad_norm"] > 0


def test_a_blank_item_is_none():
    """Else a rank without tokens would be a hit."""
    task, catalog = rank_grpo.listed(tasks.Task("lists", [tasks.Example(0, "x", "oru\t\tkesta\t")], [], None), args())
    assert catalog == {"oru", "kesta"} and task.train[0].answer == "oru\tkesta"
