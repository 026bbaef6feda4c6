"""RMT's worked numbers, thoughts by token ids, places and tiers, the text beside the rollouts, its world, and runs."""

import json
import random
import shutil

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos import grpo, rmt
from common import UserError, settings
from common.batch import collate, minibatches
from common.worlds import tiny as models
from tests.card import loss_and_gradient
from tests.helpers import checkpoints, contents, lines

CLOSE = dict(rtol=0, atol=1e-6)
CHARACTERS = models.characters()
WORDS = models.words("<think> </think> </ think> one two three four five six seven twelve say :".split())


def args(**changes):
    flags = dict(budget=9, gamma=5 / 9, cuts=(0.5, 1.5), instruction="?{budget}", tags=("", ":"), seed=1, task="digits")
    return rmt.Args(**flags | dict(prompts_per_step=4, group_size=2, eval_prompts=3, micro_batch_tokens=999) | changes)


# ---------------------------------------------------------------- budget, length, curriculum


def test_the_budget_shrinks():
    paper = args(budget=800, gamma=0.2)
    assert [rmt.budget(t, paper) for t in (0, 0.25, 0.5, 0.75, 1)] == [800, 534, 357, 239, 160]
    assert [rmt.budget(t / 40, args()) for t in (0, 1, 10, 20, 30, 39, 40)] == [9, 8, 7, 6, 5, 5, 5]
    assert rmt.budget(1.0, args(budget=3, gamma=0.01)) == 1 and rmt.budget(1.0, args(budget=3, gamma=0.01, budget_min=2)) == 2
    assert rmt.budget(0.7, args(gamma=1.0)) == 9 and rmt.budget(1.0, args(budget=100, gamma=0.29)) == 29  # 28.999... in floats


def test_worked_rewards_and_advantages():
    lengths = torch.tensor([3.0, 6, 9, 15], requires_grad=True)
    found = rmt.length_reward(lengths, 6)
    assert found.tolist() == [0.5, 1.0, 0.5, 0.0] and rmt.length_reward(torch.tensor([0.0, 12]), 6).tolist() == [0, 0]
    (slope,) = torch.autograd.grad(found[[0, 2, 3]].sum(), lengths)
    torch.testing.assert_close(slope, torch.tensor([1 / 6, 0, -1 / 6, 0]), **CLOSE)
    # The same by token ids: thoughts of 3, 6, 9 and 15 tokens, of which the first and the third are right.
    texts = [f"{'1' * n}:{y}" for n, y in ((3, 2), (6, 3), (9, 2), (15, 3))]
    batch, corpus = completions(texts), rmt.Corpus([("0", "12", "")], CHARACTERS, args(length_weight=0.2))
    batch.accuracy = torch.tensor([1.0, 0, 1, 0])
    corpus.reward(batch, 6)
    torch.testing.assert_close(batch.reward, torch.tensor([0.9, 0.2, 0.9, 0.0]), **CLOSE)
    assert batch.columns["thought"].tolist() == [3, 6, 9, 15] and batch.columns["budget"].tolist() == [6] * 4
    adv = rmt.advantages(batch.reward[None], args())
    torch.testing.assert_close(adv, torch.tensor([[0.852803, -0.639602, 0.852803, -1.066004]]), rtol=0, atol=3e-6)
    corpus.args.length_weight = 0.0
    corpus.reward(batch, 6)
    assert batch.reward.tolist() == batch.accuracy.tolist()


def test_the_curriculum():
    for t, p in {0.1: (0.6, 0.3, 0.1), 0.3: (0.6, 0.3, 0.1), 0.4: (0.475, 0.3, 0.225), 0.5: (0.35, 0.3, 0.35)}.items():
        assert rmt.curriculum(t, args()) == pytest.approx(p, abs=1e-9)
    for t in (0.7, 1.0):
        assert rmt.curriculum(t, args()) == pytest.approx((0.1, 0.3, 0.6), abs=1e-9)
    sudden = args(t1=0.5, t2=0.5)
    assert rmt.curriculum(0.49, sudden) == list(sudden.p1) and rmt.curriculum(0.51, sudden) == pytest.approx(sudden.p2)


def test_the_policy_loss_is_grpo_s():
    for changes in (dict(), dict(eps=0.05)):
        mine, theirs = loss_and_gradient(rmt, rmt.Args(**changes)), loss_and_gradient(grpo, grpo.Args(**changes))
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])


# ---------------------------------------------------------------- thoughts and answers by token ids


def completions(texts, tokenizer=CHARACTERS):
    return collate([([5], tokenizer(text)["input_ids"] + [1]) for text in texts])


@pytest.mark.parametrize(
    "ids, tags, found",
    [
        ([7, 7, 3, 8, 1], ([], [3]), (2, 8)),
        ([2, 7, 7, 3, 8, 9], ([2], [3]), (2, 8)),  # the tag in front is no thought
        ([7, 7, 3, 8, 9], ([2], [3]), (2, 8)),  # which may be missing, as where the prompt ends with it
        ([3, 8], ([2], [3]), (0, 8)), ([2, 3, 8], ([2], [3]), (0, 8)),
        ([7, 3, 8, 3, 9], ([], [3]), (1, 8)),  # the first end counts
        ([7, 7, 7], ([], [3]), (3, None)), ([2, 7, 7], ([2], [3]), (2, None)), ([], ([2], [3]), (0, None)),  # no end
        ([7, 3], ([], [3]), (1, None)),  # nothing behind it
        ([7, 4, 7, 4, 3, 8], ([], [4, 3]), (3, 8)),  # a tag of two tokens, and a part of it
        ([3, 2, 8], ([2], [3]), (0, 2)),
    ],
)  # fmt: skip
def test_parse(ids, tags, found):
    assert rmt.parse(ids, tags) == found


def test_what_is_compared_is_one_token():
    """twelve is no two, and a token before the right one is a miss."""
    corpus = rmt.Corpus([("one ", "two twelve", "")], WORDS, args(tags=("<think>", "</think>")))
    assert corpus.lines == [WORDS("one two twelve")["input_ids"]] and corpus.places == [(0, 1), (0, 2)]
    right = str(WORDS("twelve")["input_ids"][0])
    for text, read, score in (
        ("<think> six six </think> twelve", "twelve", 1.0), ("</think> twelve two", "twelve", 1.0),
        ("<think> six </think> two twelve", "two", 0.0), ("<think> twelve", None, 0.0), ("twelve", None, 0.0),
        ("<think> twelve </think>", None, 0.0), ("", None, 0.0),
    ):  # fmt: skip
        (spelled,) = corpus.batch_decode([WORDS(text)["input_ids"]], skip_special_tokens=True)
        assert corpus.check(spelled, right) == (read, score), text
    split = rmt.Corpus([("one ", "two", "")], WORDS, args(tags=("", "</ think>")))  # a tag of two tokens
    (spelled,) = split.batch_decode([WORDS("six </ six </ think> two")["input_ids"]])
    assert split.check(spelled, str(WORDS("two")["input_ids"][0])) == ("two", 1.0)


def test_garbage_and_empty_completions():
    corpus = rmt.Corpus([("0", "12", "")], CHARACTERS, args())
    batch = completions(["111:1", "", "11111111111111111111", "1"])
    batch.ids[1, 2:] = batch.ids[3, 3:] = CHARACTERS(":")["input_ids"][0]  # behind the ends
    batch.mask[1] = False
    batch.accuracy = torch.zeros(4)
    corpus.reward(batch, 3)
    assert batch.columns["thought"].tolist() == [3, 0, 21, 2] and batch.reward.tolist() == pytest.approx([0.2, 0, 0, 2 / 15])


# ---------------------------------------------------------------- places, tiers, draws

ROWS = [("01=", "234", "ab"), ("12=", "345", "bc"), ("23=", "0", "")]


def test_places_and_prompts():
    corpus = rmt.Corpus(ROWS, CHARACTERS, args())
    assert corpus.places == [(0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5), (2, 3)]  # not what stands before, nor behind
    first, last = corpus.ask([1, 6], 7)
    assert (first.id, first.prompt, first.ids) == (1, "01=2?7", CHARACTERS("01=2?7")["input_ids"]) and last.prompt == "23=?7"
    assert [CHARACTERS.decode([int(e.answer)]) for e in (first, last)] == ["3", "0"]
    corpus.args.prompt_template, corpus.args.instruction = "Say {prompt}", " in {budget}, {x}: {budget}"
    with pytest.raises(UserError, match="does not know the character '{'"):
        corpus.ask([1], 7)  # a text may have braces, which mean nothing
    corpus.args.instruction = " in {budget} or {budget}"
    assert CHARACTERS.decode(corpus.ask([0], 12)[0].ids) == "Say 01= in 12 or 12"
    assert rmt.Corpus([("", "ab", "")], CHARACTERS, args()).places == [(0, 1)]  # nothing stands before the first token


def law(ids, attention_mask, mask, temperature):
    """In a policy's place: the entropy is a tenth of the id of the token that is predicted from."""
    T = mask.shape[1]
    return torch.zeros(mask.shape), (ids[:, -T - 1 : -1] * 0.1).masked_fill(~mask, 99.0)


def test_tiers():
    corpus = rmt.Corpus(ROWS, CHARACTERS, args(micro_batch_tokens=9))
    at = [corpus.lines[i][p - 1] / 10 for i, p in corpus.places]
    low, high = sorted(set(at))[1], sorted(set(at))[-1]  # of the places before 2 3 4 and =
    corpus.args.cuts = (low, high)
    tier = corpus.tiers(law)
    assert tier.tolist() == [(x >= torch.tensor(low)) + 0 + (x >= torch.tensor(high)).item() for x in torch.tensor(at)]
    assert set(tier.tolist()) == {0, 1, 2}
    hard = (tier == 2).nonzero()[:, 0].tolist()
    assert set(corpus.hardest(tier)) <= set(hard) and len(corpus.hardest(tier)) == min(3, len(hard))
    assert sorted(corpus.hardest(torch.zeros(7).long())) != [0, 1, 2] and len(corpus.hardest(tier * 0 + 1)) == 3


def test_draws():
    """By p_t over tiers, then any place of the tier; a function of seed and step; a tier without places is left out."""
    corpus, tier = rmt.Corpus(ROWS, CHARACTERS, args(prompts_per_step=4000)), torch.tensor([0, 1, 1, 1, 2, 0, 0])
    for progress, p in ((0.0, (0.6, 0.3, 0.1)), (0.5, (0.35, 0.3, 0.35)), (0.9, (0.1, 0.3, 0.6))):
        drawn = torch.tensor(corpus.draw(tier, progress, 3))
        shares = drawn.bincount(minlength=7) / 4000
        wanted = torch.tensor([p[k] / (3, 3, 1)[k] for k in tier])
        torch.testing.assert_close(shares, wanted, rtol=0, atol=0.03)
    assert corpus.draw(tier, 0.9, 3) == drawn.tolist() != corpus.draw(tier, 0.9, 4)
    corpus.args.seed = 2
    assert corpus.draw(tier, 0.9, 3) != drawn.tolist()
    assert set(tier[corpus.draw(tier.clamp(max=1), 0.9, 3)].tolist()) == {0, 1, 2}  # all of them are drawn
    corpus.args.p1 = (0.0, 0.0, 1.0)
    assert set(corpus.draw(tier, 0.1, 3)) == {4} and len(set(corpus.draw(tier.clamp(max=1), 0.1, 3))) == 7
    corpus.args.curriculum = False  # any place, whenever it is
    assert corpus.draw(tier, 0.0, 3) == corpus.draw(tier, 1.0, 3)
    torch.testing.assert_close(
        torch.tensor(corpus.draw(tier, 0.0, 3)).bincount() / 4000, torch.full((7,), 1 / 7), rtol=0, atol=0.02
    )


# ---------------------------------------------------------------- the text


def test_places_that_are_asked_for_are_left_out_of_the_text():
    """Of a line that is drawn twice both, in both of its rows; what is asked of another line is none of its business."""
    corpus = rmt.Corpus(ROWS, CHARACTERS, args())
    text = corpus.text([0, 2, 6, 0])
    assert text.ids[0].tolist() == corpus.lines[0] and text.mask.sum(1).tolist() == [7, 7, 3, 7]
    kept = [[p for p in range(1, 8) if row[p - 1]] for row in text.trained.tolist()]
    assert kept == [[1, 2, 4, 6, 7]] * 2 + [[1, 2]] + [[1, 2, 4, 6, 7]]


class Table(torch.nn.Module):
    """In a policy's place: log-probs that are written down, one a position."""

    def __init__(self, *rows):
        super().__init__()
        self.logp = torch.nn.Parameter(torch.tensor(rows))

    def forward(self, ids, attention_mask, mask):
        return self.logp[: len(ids), : mask.shape[1]].masked_fill(~mask, 0.0), None


def test_the_loss_of_the_text():
    """By hand: the mean over the five tokens that nothing asks for, times lambda."""
    corpus = rmt.Corpus([("0", "12", "3"), ("0", "1", "")], CHARACTERS, args(ntp_weight=0.1))
    text, nan = corpus.text([0, 1, 2]), float("nan")
    assert text.trained.tolist() == [[False, False, True]] * 2 + [[False] * 3]
    policy = Table([nan, nan, -0.7], [nan, nan, -1.5], [nan] * 3)
    ((rows, text.weights),) = minibatches(text, args(minibatches=1), 0, rmt.text_weights)
    assert rmt.ntp_loss(policy, text, rows.sort().values, corpus.args) == pytest.approx(0.1 * 2.2 / 2, abs=1e-6)
    torch.testing.assert_close(policy.logp.grad, torch.tensor([[0, 0, -0.05], [0, 0, -0.05], [0, 0, 0]]), **CLOSE)
    corpus.args.ntp_weight = 0.0
    assert rmt.ntp_loss(None, text, rows, corpus.args) == 0


def test_a_text_that_is_all_asked_for_has_no_loss():
    corpus = rmt.Corpus([("0", "12", "")], CHARACTERS, args())
    text = corpus.text([0, 1])
    text.weights = rmt.text_weights(text.trained, args())
    policy = Table([float("nan")] * 2, [float("nan")] * 2)
    assert not text.weights.any() and rmt.ntp_loss(policy, text, torch.arange(2), corpus.args) == 0
    assert not policy.logp.grad.any()


def test_micro_batches_of_the_text_add_up():
    corpus = rmt.Corpus(ROWS, CHARACTERS, args())
    text = corpus.text([0, 3, 6, 6])
    text.weights = rmt.text_weights(text.trained, args())
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=80, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2)  # fmt: skip
    policy, found = models_policy(Qwen2ForCausalLM(config)), []
    for size in (999, 9):
        policy.zero_grad()
        value = rmt.ntp_loss(policy, text, torch.arange(4), args(micro_batch_tokens=size))
        found.append((value, torch.cat([p.grad.flatten() for p in policy.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and found[0][1].abs().max() > 0
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


def models_policy(lm):
    from common.policy import Policy

    return Policy(lm)


# ---------------------------------------------------------------- the world


@pytest.fixture(scope="module")
def world():
    return rmt.corpus("digits")


def test_the_world(world):
    task, train, held_out = world
    assert len(train) == len(held_out) == 512 and not {r[0] for r in train} & {r[0] for r in held_out}
    assert ("31203=", "31,0,1.", "dacbd") in train + held_out
    shown = [(e.prompt, task.demonstrate(random.Random(i), e, 1.0)) for i, e in enumerate(task.train)]
    assert set("".join(p + y for p, y in shown)) <= set(models.CHARACTERS) and not set("abcd") & set(
        "".join(y for _, y in shown)
    )
    known = {before: asked for before, asked, _ in train}
    plain = [(p, y) for p, y in shown if "?" not in p]
    assert all(known[(p + y)[:6]] == (p + y)[6:] for p, y in plain) and 0.23 < len(plain) / len(shown) < 0.27
    thinking, hard = [(p, y) for p, y in shown if "?" in p], 0
    for prompt, said in thinking:
        so_far, B = prompt.split("?")
        thought, token = said.split(":")
        sums = [str(sum(map(int, so_far[:k])) % 4) for k in range(1, 6)]
        assert thought == ("".join(sums) + sums[-1] * 9)[: int(B)] and token == known[so_far[:6]][len(so_far) - 6]
        hard += len(so_far) == 11
    assert 0.54 < hard / len(thinking) < 0.6  # half of them, and a seventh of the other half


def test_habits_of_the_world(world):
    """What training has to undo: sums that slip, and lengths of one's own."""
    task = world[0]
    asked = [e for e in task.train if e.prompt[-2:] == "?5" and len(e.prompt) == 13]
    lengths, right, by_carry = [], [], {True: [], False: []}
    for i, e in enumerate(10 * asked):
        thought, token = task.demonstrate(random.Random(i), e, 0.0).split(":")
        assert token == thought[-1]
        lengths.append(len(thought))
        right.append(int(token) == sum(map(int, e.prompt[:5])) % 4)
        for s, c, after in zip("0" + thought, e.prompt[:5], thought):
            by_carry[int(s) + int(c) > 4].append(int(after) != (int(s) + int(c)) % 4)
    share = {n: lengths.count(n) / len(lengths) for n in (5, 7, 8, 9)}
    assert share == pytest.approx({5: 0.4, 7: 0.2, 8: 0.2, 9: 0.2}, abs=0.05) and 0.35 < sum(right) / len(right) < 0.6
    slips = {k: sum(x) / len(x) for k, x in by_carry.items()}
    assert slips == pytest.approx({True: 0.6, False: 0.03}, abs=0.05)


def test_any_task_is_a_corpus(tmp_path):
    rows = [dict(prompt=f"{n} apples", answer=[f"say {n}", "no"] if n % 2 else f"say {n}") for n in range(20)]
    rows += [dict(prompt=[dict(role="system", content="be"), dict(role="user", content=f"n {n}")], answer="x") for n in (1, 2)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, train, held_out = rmt.corpus(str(tmp_path / "texts.jsonl"))
    assert {("3 apples\n", "say 3", ""), ("4 apples\n", "say 4", ""), ("be\n\nn 1\n", "x", "")} <= {*train, *held_out}
    assert not {*train} & {*held_out}


# ---------------------------------------------------------------- runs


def trained(folder, **changes):
    small = dict(steps=2, prompts_per_step=8, group_size=4, minibatches=2, eval_prompts=8, eval_every=0, checkpoint_every=0)
    rmt.train(rmt.Args(**small | dict(run_dir=str(folder / "run")) | changes))
    return lines(folder / "run" / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder / "run", trained(folder)


def test_a_run(plain):
    folder, rows = plain
    assert [row["budget"] for row in rows] == [9, 6] and [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["match"] == row["accuracy"] and 0 < row["match"] < 1 and row["truncated"] < 0.1 and row["grad_norm"] > 0
        assert row["reward"] == pytest.approx(0.8 * row["match"] + 0.2 * row["length_reward"], abs=1e-6)
        assert sum(row[f"share_{k}"] for k in ("easy", "medium", "hard")) == pytest.approx(1) and row["sampler_gap"] < 1e-4
        mix = sum(row[f"share_{k}"] * row[f"match_{k}"] for k in ("easy", "medium", "hard"))
        assert mix == pytest.approx(row["match"], abs=1e-6)
        assert 6 < row["thought"] < 10 and row["length"] == pytest.approx(row["thought"] + 3, abs=0.3)  # : and token and end
        assert 4 < row["ntp_loss"] < 7  # of the letters 15, which the model has never seen
    shown = [s for s in lines(folder / "samples.jsonl") if s["step"] == 1]
    assert all("?9" in s["prompt"] and len(s["right"]) == 1 for s in shown)
    for s in shown:  # in words, though what was compared are numbers
        thought, _, token = s["completion"].partition(":")
        length = max(0, 1 - abs(len(thought) / 9 - 1))
        assert s["reward"] == pytest.approx(0.8 * (token[:1] == s["right"]) + 0.2 * length, abs=1e-6)
        assert s["answer"] == (token[:1] or None)
    evals = lines(folder / "evals.jsonl")
    assert [e["step"] for e in evals] == [0, 2] and all(e["prompts"] == 8 for e in evals)


def test_evaluation_asks_for_hard_held_out_places_at_the_last_budget(tmp_path, monkeypatch, world):
    from common import rollout

    asked = []
    monkeypatch.setattr(rollout, "evaluate", lambda e, s, t, task, args: asked.append(task.test) or dict(x=0.0, prompts=1))
    trained(tmp_path, steps=0, eval_prompts=20)
    prompts = [e.prompt for e in asked[0]]
    assert len(set(prompts)) == 20 and all(p[-2:] == "?5" and len(p) == 13 for p in prompts)  # the sum of all, and nothing else
    assert {p[:6] for p in prompts} <= {before for before, _, _ in world[2]}


def test_flags_reach_the_loop(plain, tmp_path):
    """A rollout without budget, hard places alone, another instruction, no text: what each does by itself is tested above."""
    flags = dict(gamma=1.0, length_weight=0.0, p1=(0.0, 0.0, 1.0), p2=(0.0, 0.0, 1.0), instruction="?7", ntp_weight=0.0)
    rows = trained(tmp_path, **flags)
    assert [row["budget"] for row in rows] == [9, 9] and [row["share_hard"] for row in rows] == [1, 1]
    assert all(row["reward"] == row["match"] and 0 < row["length_reward"] < 1 for row in rows)
    assert all("?7" in s["prompt"] for s in lines(tmp_path / "run" / "samples.jsonl"))
    assert rows[1]["ntp_loss"] != plain[1][1]["ntp_loss"]  # which the other run learns
    assert abs(rows[0]["loss"]) < 0.1 and plain[1][0]["loss"] == pytest.approx(0.1 * plain[1][0]["ntp_loss"], abs=0.1)


def test_a_run_that_goes_on_is_the_whole(tmp_path, monkeypatch):
    """With a rollout in the queue, whose lines are read when it is trained on; tiers are those of the start, and the budget's
    schedule is the one that it began with."""
    seen, tiers = [], rmt.Corpus.tiers

    def told(corpus, policy):
        seen.append(policy.lm.lm_head.weight.sum().item())
        return tiers(corpus, policy)

    monkeypatch.setattr(rmt.Corpus, "tiers", told)
    same = dict(steps=3, stale=1, checkpoint_every=1, prompts_per_step=4)
    whole = trained(tmp_path, **same)
    assert [row["budget"] for row in whole] == [9, 7, 6] and whole[1]["staleness"] == 1
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(checkpoints(tmp_path / "cut")[-1])
    rmt.train(rmt.Args(resume=str(tmp_path / "cut")))
    again = lines(tmp_path / "cut" / "metrics.jsonl")
    timeless = [[{k: v for k, v in r.items() if not k.startswith("time")} for r in rows] for rows in (whole, again)]
    assert timeless[0] == timeless[1]
    a, b = (checkpoints(tmp_path / name)[-1] / "model.safetensors" for name in ("run", "cut"))
    assert a.read_bytes() == b.read_bytes()
    saved = contents(b.parent)
    assert saved["state"]["planned"] == 3 * 4 and len(seen) == 4 and len(set(seen)) == 1  # prompts; the start, every time


def test_a_real_model_on_texts_of_one_s_own(tmp_path):
    """A folder with a tokenizer of words, <think> and </think> among them, and a file of texts."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, eos_token_id=1, pad_token_id=0)  # fmt: skip
    lm = Qwen2ForCausalLM(config)
    lm.save_pretrained(tmp_path / "model")
    WORDS.save_pretrained(tmp_path / "model")
    words = "one two three four five six seven".split()
    rows = [dict(prompt=f"{a} {b}", answer=f"{b} {a} {c}") for a in words for b in words[:3] for c in words[:2]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (row,) = trained(
        tmp_path, model=str(tmp_path / "model"), task=str(tmp_path / "texts.jsonl"), dtype="float32", optimizer="adamw",
        steps=1, budget=6, gamma=0.5, cuts=(1.0, 2.0), max_new_tokens=40,
        instruction=" say : six <think> </think>",
    )  # fmt: skip
    assert row["share_hard"] == 1 and row["budget"] == 6 and row["ntp_loss"] == pytest.approx(2.9, abs=0.3)
    shown = lines(tmp_path / "run" / "samples.jsonl")
    assert all(s["prompt"].endswith(" say : six <think> </think>") for s in shown) and row["length"] <= 2 * 6 + 16 < 40
    for s in shown:
        y = s["completion"].split()
        token = y[y.index("</think>") + 1 :][:1] if "</think>" in y else []
        assert token == [s["answer"]] or not token and s["answer"] in (None, "<eos>")


def test_presets_and_limits(tmp_path):
    Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2).save_pretrained(tmp_path)  # fmt: skip
    small, _ = settings.resolve(rmt.Args())
    real, _ = settings.resolve(rmt.Args(model=str(tmp_path)))
    assert (small.task, small.budget, small.tags, small.cuts) == ("digits", 9, ("", ":"), (0.015, 0.7))
    assert (real.task, real.budget, real.gamma, real.tags) == ("gsm8k", 800, 0.2, ("<think>", "</think>"))
    assert real.max_new_tokens >= 2 * 800 + 16 and "{budget}" in real.instruction
    for bad in (dict(gamma=0.0), dict(gamma=1.5), dict(length_weight=1.5), dict(budget_min=0), dict(format_reward=0.1)):
        with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
            settings.resolve(rmt.Args(**bad))
    assert (small.ntp_weight, small.t1, small.t2, small.budget_min) == (0.1, 0.3, 0.7, 1)
