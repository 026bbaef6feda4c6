"""InTRO's worked numbers, candidates, two readings of a completion, prompts that tell, the world, and what runs log."""

import collections
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos import intro
from common import UserError, engines, settings, tasks
from common.batch import collate, read
from common.policy import Policy
from common.worlds import tiny as models
from tests.helpers import ROOT, checkpoints, lines, run, user_error
from tests.test_every_script import halves

CLOSE = dict(rtol=0, atol=1e-6)
LOGITS = torch.tensor([[2.0, 1, 0, -1], [0, 0.5, 1, -0.5]])
TOLD = torch.tensor([[0.0, 3, 0, -1], [2, -3, 1, -0.5]])
GIVEN = torch.tensor([[1, 0.1, 0.5], [2, 0.1, 0.3]])  # the draws are tokens 0 and 0, 0 and 1
W = torch.tensor([[3.776308, 0.069166, 0.069166], [0.554973, 4.100724, 0.016759]])


def loss(given=GIVEN, **flags):
    """Of the two positions as one completion -> loss, gradient of the policy's logits, and what is logged."""
    logits, told = LOGITS.clone().requires_grad_(), TOLD.clone().requires_grad_()
    objective, logp, *found = intro.likelihood(given, logits, told, intro.Args(**flags))
    value = -(objective * intro.token_weights(torch.ones(1, 2).bool(), intro.Args())[0]).sum()
    value.backward()
    assert told.grad is None and torch.equal(logp.detach(), LOGITS.log_softmax(-1).gather(1, given[:, :1].long())[:, 0])
    return value.item(), logits.grad, found


@pytest.mark.parametrize(
    "flags, value, gradient",
    [({}, 2.214567, [[0.397060, -0.474833, 0.056856, 0.020916], [-0.553088, 0.212143, 0.261875, 0.079071]]),
     (dict(exact=True), 1.516808, [[0.299689, -0.328830, 0.021304, 0.007837], [-0.259538, 0.135689, 0.101256, 0.022593]]),
     (dict(cap=2.0), 1.162412, None)],
)  # fmt: skip
def test_worked_numbers(flags, value, gradient):
    found, grad, _ = loss(**flags)
    assert found == pytest.approx(value, abs=1e-6)
    assert gradient is None or torch.allclose(grad, torch.tensor(gradient), **CLOSE)


def test_the_correction_is_a_constant():
    ids = intro.candidates(GIVEN, LOGITS)
    assert ids.tolist() == [[1, 0, 0], [2, 0, 1]]
    logp, told = (x.log_softmax(-1).gather(1, ids).requires_grad_() for x in (LOGITS, TOLD))
    w = intro.correction(told, logp, intro.Args())
    torch.testing.assert_close(w, W, **CLOSE)
    assert not w.requires_grad
    torch.testing.assert_close(intro.correction(told, logp, intro.Args(cap=2.0)), W.clamp(max=2), **CLOSE)
    assert intro.correction(torch.tensor([0.0]), torch.tensor([-200.0]), intro.Args()).item() == 200


def test_what_is_logged():
    _, _, (entropy, first, mean, most, capped, above, kl) = loss(cap=1.5)
    w, (p, q) = W.clamp(max=1.5), (x.softmax(-1) for x in (LOGITS, TOLD))
    for found, wanted in zip((first, mean, most), (w[:, 0], w.mean(1), w.amax(1))):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert capped.tolist() == above.tolist() == pytest.approx([1 / 3, 1 / 3])
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1), **CLOSE)
    torch.testing.assert_close(kl, (q * (q / p).log()).sum(1), **CLOSE)


def test_raft_is_the_likelihood_of_what_was_written():
    value, grad, found = loss(GIVEN[:, :1], weights="ones")
    torch.testing.assert_close(grad, (LOGITS.softmax(-1) - torch.eye(4)[[1, 2]]) / 2, **CLOSE)
    assert value == pytest.approx(-LOGITS.log_softmax(-1)[[0, 1], [1, 2]].mean().item(), abs=1e-6)
    torch.testing.assert_close(found[1], W[:, 0], **CLOSE)  # is logged all the same


def test_draws_give_the_cross_entropy_s_gradient():
    """Many, evenly spread: the gradient that --exact has. With weights of 1 they give none, which is the policy's own score."""
    n = 20_000
    given = torch.cat([GIVEN[:, :1], ((torch.arange(n) + 0.5) / n).expand(2, n)], 1).double()
    torch.testing.assert_close(loss(given)[1], loss(exact=True)[1], rtol=0, atol=5e-4)
    assert loss(given, weights="ones")[1].abs().max() < 5e-4
    assert (loss(given, cap=1.5)[1] - loss(exact=True)[1]).abs().max() > 0.05  # a cap that is reached is a bias


def test_candidates_are_the_sampler_s_draws():
    g = torch.Generator().manual_seed(0)
    logits, u = 3 * torch.randn(500, 78, generator=g), torch.rand(500, 4, generator=g)
    ids = intro.candidates(torch.cat([torch.full((500, 1), 7.0), u], 1), logits)
    assert (ids[:, 0] == 7).all() and ids.dtype == torch.int64
    for i in range(4):
        assert torch.equal(ids[:, i + 1], engines.draw(logits, u[:, i].double(), 1.0)[0])
    spread = torch.bincount(intro.candidates(torch.arange(10001)[None] / 10001, LOGITS[:1])[0, 1:], minlength=4) / 10000
    torch.testing.assert_close(spread, LOGITS[0].softmax(-1), rtol=0, atol=2e-4)


def test_no_number_draws_what_has_no_probability():
    """Numbers next to 0 and 1, and a vocabulary whose ends are impossible; the token itself may be any."""
    logits = torch.full((1, 1000), -1e4)
    logits[0, 100:900] = 0
    given = torch.tensor([[150000.0, 0, 1e-30, 1 - 2**-24, 1.0]])
    ids = intro.candidates(given, logits)[0].tolist()
    assert ids[0] == 150000 and ids[1:3] == [100, 100] and all(890 < i < 900 for i in ids[3:])


# ---------------------------------------------------------------- two readings


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    return Policy(Qwen2ForCausalLM(Qwen2Config(vocab_size=32, initializer_range=0.3, **shape)).double())


def rollout(right=(1, 0, 1, 1, 0, 1), lengths=(5, 3, 7, 1, 6, 2), step=3, **flags):
    """A batch of six completions of three prompts, prepared -> batch, which are right, told, args."""
    g, args = torch.Generator().manual_seed(1), intro.Args(max_new_tokens=9, micro_batch_tokens=1000, minibatches=1, **flags)

    def text(n):
        return torch.randint(3, 32, (n,), generator=g).tolist()

    prompts = [text(n) for n in (4, 2, 6)]
    batch = collate([(prompts[i // 2], text(n)) for i, n in enumerate(lengths)])
    batch.prompt_id, batch.group = torch.tensor([10, 10, 11, 11, 12, 12]), 2
    batch.accuracy = torch.tensor(right, dtype=torch.float32)
    batch.old_logp = torch.zeros(batch.mask.shape, dtype=torch.float64)
    told_ids = {10 + i: text(n) + p for i, (n, p) in enumerate(zip((1, 5, 3), prompts))}
    return batch, *intro.prepared(batch, told_ids, args, step), args


def test_what_is_prepared():
    batch, right, told, _ = rollout()
    assert right.tolist() == [True, False, True, True, False, True]
    assert torch.equal(batch.trained, batch.mask & right[:, None]) and torch.equal(batch.adv[:, 0], right.float())
    T = batch.mask.shape[1]
    assert torch.equal(told.mask, batch.mask) and torch.equal(told.ids[:, -T:][told.mask], batch.ids[:, -T:][batch.mask])
    assert told.attention_mask[:, :-T].sum(1).tolist() == [5, 5, 7, 7, 9, 9]
    given = batch.columns["given"]
    assert given.shape == (6, T, 5) and torch.equal(given[:, :, 0], batch.ids[:, -T:].float())
    assert given[:, :, 1:].unique().numel() == 6 * T * 4 and given[:, :, 1:].max() < 1
    # Nobody's length, and none of the other rows, changes a position's numbers; another step or seed does.
    longer, alone = rollout(lengths=(5, 3, 7, 1, 9, 2))[0], rollout(candidates=1)[0]
    assert torch.equal(longer.columns["given"][:, :T, 1:], given[:, :, 1:]) and alone.columns["given"].shape == (6, T, 1)
    for changes in (dict(step=4), dict(seed=2)):
        assert not (rollout(**changes)[0].columns["given"][:, :, 1:] == given[:, :, 1:]).any()
    none, right, *_ = rollout(right=[0] * 6)
    assert right is None and not none.trained.any() and not none.adv.any()


def test_numbers_belong_to_rows_of_all_ranks(monkeypatch):
    """The second of two ranks, with the last rows, draws as they did on one."""
    whole, *_ = rollout()
    monkeypatch.setattr("common.gpu.rank", lambda: 1)
    part = whole.take(torch.arange(3, 6))
    intro.prepared(part, {11: [1], 12: [1]}, intro.Args(max_new_tokens=9), 3)
    assert torch.equal(part.columns["given"][:, :, 1:], whole.columns["given"][3:, : part.mask.shape[1], 1:])


def test_w_compares_a_token_behind_both_prompts(policy):
    """Position by position, whatever the lengths of the prompts: the ratio of two plain readings."""
    batch, _, told, args = rollout()
    with torch.no_grad():
        objective, logp, entropy, w, *_ = intro.read_twice(policy, batch, told, args)
    plain, H = read(policy, batch, args)
    torch.testing.assert_close(logp, plain)
    torch.testing.assert_close(entropy, H)
    torch.testing.assert_close(w, ((read(policy, told, args)[0] - plain).exp().clamp(max=200)).masked_fill(~batch.mask, 0))
    assert (w[batch.mask] - 1).abs().min() > 1e-6
    same = intro.read_twice(policy, batch, batch, args)  # who is told nothing has nothing to say
    torch.testing.assert_close(same[3][batch.mask], torch.ones(int(batch.mask.sum()), dtype=torch.float64))


def gradient(policy, budget, edit=lambda batch: None, **flags):
    """As the loop forms it, in micro-batches of that many tokens."""
    batch, right, told, args = rollout(**flags)
    edit(batch)
    batch.weights = torch.zeros(batch.mask.shape, dtype=torch.float64)
    batch.weights[right] = intro.token_weights(batch.trained[right], args).double()
    policy.zero_grad()
    value, cuts = 0.0, 0
    for mb in batch.micro_batches(right.nonzero()[:, 0], budget):
        objective, *_ = intro.read_twice(policy, mb, told.take(mb.row), args)
        micro = -(objective * mb.weights)[mb.trained].sum()
        micro.backward()
        value, cuts = value + micro.item(), cuts + 1
    return value, torch.cat([p.grad.flatten().clone() for p in policy.parameters()]), cuts


@pytest.mark.parametrize("flags", [dict(), dict(exact=True), dict(weights="ones")], ids=str)
def test_micro_batches_add_up(policy, flags):
    """The draws are those of the position, however the rows are cut."""
    (whole, grad, one), (parts, sums, many) = (gradient(policy, budget, **flags) for budget in (1000, 14))
    assert one == 1 and many > 2 and parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(sums, grad, rtol=1e-9, atol=1e-12)


def test_wrong_completions_teach_nothing(policy):
    """Whatever they say; and what becomes right does."""

    def edit(batch):
        batch.ids[[1, 4], -2:] = 9

    a, b = gradient(policy, 1000), gradient(policy, 1000, edit)
    assert a[0] == b[0] and torch.equal(a[1], b[1])
    assert (gradient(policy, 1000, right=(1, 1, 1, 1, 0, 1))[1] - a[1]).abs().max() > 1e-3


def test_flags_of_the_loss(policy):
    base = gradient(policy, 1000)[1]
    for flags in (dict(candidates=1), dict(candidates=9), dict(cap=0.5), dict(exact=True), dict(weights="ones"), dict(seed=2),
                  dict(temperature=0.7)):  # fmt: skip
        assert (gradient(policy, 1000, **flags)[1] - base).abs().max() > 1e-3, flags


def test_measures():
    """w of the written tokens by their place: the answer is where it stands last, the first token counts as first alone."""
    tokenizer = models.characters()
    rows = [("(85)2+6=", "85:85"), ("x=", "7"), ("x=", "no")]
    batch = collate([tuple(tokenizer([p, y]).input_ids) for p, y in rows])
    batch.answers, batch.adv = ["85", "7", None], torch.tensor([[1.0], [1], [0]]).expand(3, 5)
    batch.trained, batch.old_logp = batch.mask & (batch.adv > 0), torch.zeros(3, 5)
    mb = batch.take(torch.arange(3))
    mb.row = torch.arange(3)
    w, seen = torch.arange(15.0).view(3, 5), collections.defaultdict(list)
    meter = SimpleNamespace(add=lambda stats, mask: [seen[k].extend(x[mask].tolist()) for k, x in stats.items()])
    stats = intro.measure(meter, batch, mb, [w, *(w + 10 * i for i in range(1, 6))], tokenizer)
    assert seen["w_first"] == [0, 5] and seen["w_answer"] == [3, 4] and seen["w_elsewhere"] == [1, 2]
    assert seen["right_length"] == [5, 1] and seen["kept"] == [1, 1, 0]
    assert torch.equal(batch.columns["w"], w)
    assert [(k, (x - w).unique().item()) for k, x in stats.items()] == [
        ("w", 10), ("w_max", 20), ("w_capped", 30), ("w_above_1", 40), ("teacher_kl", 50)
    ]  # fmt: skip


# ---------------------------------------------------------------- prompts that tell


def told(*rows, **flags):
    """Prompts told the answer, of rows (prompt, answer)."""
    task = tasks.Task("t", [tasks.Example(i, *row) for i, row in enumerate(rows)], [], None)
    return [e.prompt for e in intro.hinted(task, intro.Args(**dict(hint_template="{answer}|{prompt}") | flags)).train]


def test_the_answer_that_is_told_is_the_last_word_of_it():
    answers = ["It is 3 + 4 = 7.\n#### 7", r"So \boxed{1} or \boxed{\frac{1}{2}}.", "x + 1", ("12", "13"), r"\fbox{9}", " 4 ",
               "3 boxes"]  # fmt: skip
    assert told(*[("q", a) for a in answers]) == [f"{x}|q" for x in ("7", r"\frac{1}{2}", "x + 1", "12", "9", "4", "3 boxes")]
    wrong = told(*[("q", a) for a in answers], ("q", "7"), hint="wrong")
    assert wrong == [f"{x}|q" for x in ("17", "7", r"\frac{1}{2}", "22", "19", "14", "4", "17")]


def test_only_the_last_turn_tells():
    turns = [dict(role="user", content="a"), dict(role="assistant", content="b"), dict(role="user", content="c {x}")]
    assert told((turns, "7")) == [[*turns[:2], dict(role="user", content="7|c {x}")]] and turns[-1]["content"] == "c {x}"


@pytest.mark.parametrize("template", ["{prompt}", "{answer}", "none", "{prompt} {answer} {x}", "{prompt} {answer} {", "{0}{1}",
                                      "{prompt.x}{answer}"])  # fmt: skip
def test_a_template_without_its_fields(template):
    with pytest.raises(UserError, match="--hint-template needs the fields {prompt} and {answer} and no other"):
        told(("q", "7"), hint_template=template)


CHAT = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder of a random model that has a chat template, and the path of a task whose answers are solutions."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = models.characters(models.CHARACTERS + "[]\\{}<>#'")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=160)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    rows = [dict(prompt=f"{i} apples and 2?", answer=f"{i}+2={i + 2}\n#### {i + 2}") for i in range(20, 40)]
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, path, tokenizer


def test_a_chat_template_and_the_context(chat):
    folder, path, tokenizer = chat
    args, config = settings.resolve(intro.Args(model=str(folder), task=str(path), max_new_tokens=16, system_prompt="be brief"))
    assert (args.group_size, args.minibatches, args.lr) == (4, 1, 5e-7)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt)
    ids, context = intro.hints(task, tokenizer, config, args)
    e, cue = task.train[0], r"Please reason step by step, and put your final answer within \boxed{}.[me]"
    right = e.answer.rpartition(" ")[2]
    assert tokenizer.decode(e.ids) == f"[system]be brief[user]{e.prompt}\n\n{cue}"
    assert tokenizer.decode(ids[e.id]) == f"[system]be brief[user]{e.prompt}\n\nThe answer is {right}.\n\n{cue}"
    assert ids.keys() == {e.id for e in task.train} and context == 16 + max(map(len, ids.values())) > 16 + len(e.ids)
    config.max_position_embeddings = context - 1
    with pytest.raises(UserError, match=f"The answer is.* needs {context} positions"):
        intro.hints(task, tokenizer, config, args)


def test_a_run_without_a_right_completion_moves_nothing(chat, tmp_path):
    """The random model is always wrong: a step as any other, with the same names in its row, and no update."""
    folder, path, _ = chat
    (tmp_path / "own.py").write_text("def never(text, answer):\n    return 0.0\n")  # a scorer that starts quickly
    argv = f"--model {folder} --task {path} --steps 1 --prompts-per-step 4 --max-new-tokens 9 --reward own.py:never"
    argv += " --dtype float32 --optimizer adamw --weight-decay 0.1"  # which would move them
    done = run(tmp_path, *argv.split(), "--run-dir", tmp_path / "run", script=ROOT / "algos" / "intro.py")
    assert done.code == 0, done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["kept"] == row["accuracy"] == row["loss"] == row["grad_norm"] == row["w_answer"] == row["right_length"] == 0
    assert row["skipped_updates"] == 0 and row["tokens"] > 0 and "entropy" in row and "teacher_kl" in row
    (last,) = checkpoints(tmp_path / "run")
    assert (last / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    before, after = (Qwen2ForCausalLM.from_pretrained(p).state_dict() for p in (folder, last))
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---------------------------------------------------------------- the world


def test_texts_of_sums():
    rng, ways, right, slipped = random.Random(0), collections.Counter(), 0, 0
    for _ in range(4000):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        text = intro.sum_text(rng, f"{a}+{b}=")
        work, _, answer = text.partition(":")
        way = ("guess", "", "careful", "", "verbose")[len(work.split())]
        ways[way] += 1
        right += answer == str(a + b)
        slipped += way == "careful" and answer != str(a + b)
        assert int(answer) - a - b in (0, 1, 2, 10, 11, 12, 20, 21, 22) or way == "guess"
        if work and answer == str(a + b):
            assert work.split()[-1].endswith(f"={(a + b - (a % 10 + b % 10) % 10) // 10:02d}"), text
    assert ways["guess"] == pytest.approx(2000, abs=120) and ways["careful"] == pytest.approx(1000, abs=100)
    assert slipped / ways["careful"] == pytest.approx(1 - 0.85**2, abs=0.05)
    assert right / 4000 == pytest.approx(0.5 * 0.1 + 0.25 * 0.85**2 + 0.25 * 0.7**4, abs=0.03)
    assert intro.sum_text(rng, "97+85=", 0.0, ["careful"]) == "7+5=12 9+8+1=18:182"
    assert intro.sum_text(rng, "97+85=", 1.0, ["careful"]) == "7+5=13 9+8+1=19:193"
    assert intro.sum_text(rng, "25+60=", 1.0, ["verbose"]) == "5+0=06 5+0=07 2+6+0=09 2+6+0=10:107"


def test_the_told_answer_is_the_one_of_the_very_text():
    args, _ = settings.resolve(intro.Args())
    task, rng = intro.sums(args), random.Random(0)
    assert len(task.shown) == len(task.train) and {e.id for e in task.shown}.isdisjoint(e.id for e in task.train)
    right = 0
    for e, shown in zip(task.train[:500], task.shown):
        hint, _, prompt = shown.prompt[1:].partition(")")
        texts = {task.demonstrate(rng, shown, careful) for careful in (1.0, 0.0)}
        (text,) = texts
        assert prompt == e.prompt and text.endswith(":" + hint)
        right += hint == e.answer
        first = task.demonstrate(rng, e, 1.0)
        assert first.endswith(":" + e.answer) and not first.startswith(":")  # without a guess and a slip, until it can
    assert right / 500 == pytest.approx(0.29, abs=0.06)
    assert sum(task.demonstrate(rng, e, 0.0).startswith(":") for e in task.train[:400]) == pytest.approx(200, abs=50)
    assert intro.hinted(task, args).train[0].prompt == f"({task.train[0].answer}){task.train[0].prompt}"
    other = intro.sums(dataclasses.replace(args, hint_template="{prompt}{answer}=", hint="wrong"))
    assert other.shown[0].prompt == task.train[0].prompt + task.shown[0].prompt[1:].partition(")")[0] + "="
    assert intro.sums(dataclasses.replace(args, model="qwen2.5-1.5b", task="gsm8k")) is None


def test_mistakes():
    for bad in (dict(candidates=0), dict(cap=0.0), dict(format_reward=0.1)):
        with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
            settings.resolve(intro.Args(**bad))
    for task in ("route", "addition:3", "no.jsonl"):
        with pytest.raises(UserError, match=f"--task {task}: the tiny model knows what an answer means in addition alone"):
            intro.sums(intro.Args(task=task, hint_template="{prompt}{answer}"))


def test_it_is_refused_before_a_model_is_made(tmp_path):
    env = dict(TOKENPO_CACHE=str(tmp_path / "no"))
    done = run(tmp_path, "--hint-template", "{answer}", script=ROOT / "algos" / "intro.py", env=env)
    assert "--hint-template needs the fields" in user_error(done) and not (tmp_path / "no").exists()


def test_presets():
    small, _ = settings.resolve(intro.Args())
    assert (small.task, small.max_new_tokens, small.minibatches, small.group_size) == ("addition", 48, 1, 8)
    assert (small.candidates, small.cap, small.weights, small.exact, small.hint) == (5, 200, "teacher", False, "right")


# ---------------------------------------------------------------- a run


def test_a_run_and_the_same_in_two_halves(tmp_path):
    rows = halves("intro", tmp_path, 2)
    assert [r["step"] for r in rows] == [1, 2] and all(r["grad_norm"] > 0 and r["entropy"] > 0 for r in rows)
    for r in rows:
        assert r["kept"] == r["accuracy"] == r["adv_mean"] > 0 and r["ratio_max"] > 0.99
        assert 0 < r["teacher_kl"] < 0.2 and r["w"] == pytest.approx(1, abs=0.1) and 0.3 < r["w_above_1"] < 0.9
        assert r["w_capped"] == 0 and 1 < r["w_max"] < 200 and 1 < r["right_length"] <= 48
        assert 0.5 < r["w_first"] < 2 and 0.5 < r["w_elsewhere"] < 2 and 0.5 < r["w_answer"] < r["w_max"]
    samples = lines(tmp_path / "whole" / "samples.jsonl")[:4]
    for s in samples:  # the first step shows every token, and w where it was learnt from
        assert len(s["columns"]["w"]) == len(s["tokens"]) and all((x > 0) == (s["reward"] == 1) for x in s["columns"]["w"])
