"""OPSD's worked numbers, the teacher's reading of the student's tokens, its prompts, the world, and what runs log."""

import collections
import copy
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos import opsd
from common import UserError, settings, tasks
from common.batch import collate
from common.policy import Policy
from common.worlds import tiny as models
from tests.helpers import ROOT, lines, run
from tests.test_every_script import SMALL, halves

CLOSE = dict(rtol=0, atol=1e-6)
TOLD, STUDENT = torch.tensor([[0.7, 0.2, 0.1]]).double().log(), torch.tensor([[0.2, 0.5, 0.3]]).double().log()


def loss(target=1, told=TOLD, student=STUDENT, **flags):
    """Of one position -> loss, gradient of the student's logits, and what is logged."""
    student, told = student.clone().requires_grad_(), told.clone().requires_grad_()
    objective, logp, *found = opsd.divergence(torch.tensor([target]), student, told, opsd.Args(**flags))
    (-objective.sum()).backward()
    assert told.grad is None and logp.item() == student.log_softmax(-1)[0, target].item()
    return -objective.item(), student.grad[0], found


@pytest.mark.parametrize(
    "flags, value, gradient",
    [({}, 0.583815, [-0.5, 0.3, 0.2]),
     (dict(entry_clip=0.05), -0.243119, [0.06, -0.05, -0.01]),
     (dict(entry_clip=0.5), 0.206881, [0.06, -0.05, -0.01]),
     (dict(divergence="reverse"), 0.537176, [-0.357988, 0.189557, 0.168431]),
     (dict(divergence="jsd"), 0.132918, [-0.094872, 0.054721, 0.040151]),
     (dict(divergence="sampled"), -0.635124, [-0.183258, 0.458145, -0.274887]),
     (dict(divergence="sampled", entry_clip=0.05), -0.635124, [-0.183258, 0.458145, -0.274887])],
    ids=str,
)  # fmt: skip
def test_worked_numbers(flags, value, gradient):
    found, grad, _ = loss(**flags)
    assert found == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(gradient).double(), **CLOSE)


def test_entries():
    l = opsd.entries(STUDENT, TOLD, opsd.Args())  # noqa: E741
    torch.testing.assert_close(l, torch.tensor([[0.876934, -0.183258, -0.109861]]).double(), **CLOSE)
    # beta 0 is KL(teacher, student): the mass that the teacher has and the student has not is what costs.
    sure, unsure = torch.tensor([[0.98, 0.01, 0.01]]).double().log(), torch.tensor([[0.34, 0.33, 0.33]]).double().log()
    kl = {kind: loss(told=unsure, student=sure, divergence=kind)[0] for kind in ("forward", "reverse", "jsd")}
    assert kl["forward"] > kl["reverse"] > kl["jsd"] > 0


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_teacher_who_knows_no_more_teaches_nothing(kind):
    """And what is all but impossible to one of both stays finite."""
    value, grad, _ = loss(told=STUDENT, divergence=kind)
    assert value == pytest.approx(0, abs=1e-15) and grad.abs().max() < 1e-15
    far = torch.tensor([[0.0, -2e3, 0]])
    for pair in (dict(told=far, student=far.flip(1).roll(1, 1)), dict(told=far.roll(1, 1), student=far)):
        value, grad, found = loss(divergence=kind, **pair)
        assert all(torch.tensor([value, *grad, *torch.cat(found)]).isfinite())


def test_the_sampled_gradient_is_the_reverse_one_in_the_mean():
    p = STUDENT[0].exp()
    mean = sum(p[i] * loss(i, divergence="sampled")[1] for i in range(3))
    torch.testing.assert_close(mean, loss(divergence="reverse")[1])


def test_what_is_logged():
    p = STUDENT.exp()
    for flags, cut in (({}, 0), (dict(entry_clip=0.05), (0.876934 - 0.05) / 0.876934), (dict(divergence="reverse"), 0)):
        entropy, kl, clipped = loss(**flags)[2]
        assert entropy.item() == pytest.approx(-(p * p.log()).sum().item()) and kl.item() == pytest.approx(0.583815, abs=1e-6)
        assert clipped.item() == pytest.approx(cut, abs=1e-6) and not any(x.requires_grad for x in (entropy, kl, clipped))
    assert loss(told=STUDENT, entry_clip=0.05)[2][2].item() == 0


def test_every_token_counts_alike():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert torch.equal(opsd.token_weights(mask, opsd.Args()), mask / 4)
    assert not opsd.token_weights(mask & False, opsd.Args()).any()


# ---------------------------------------------------------------- two readings


@pytest.fixture(scope="module")
def policies():
    """A student and another teacher."""
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    out = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        out.append(Policy(Qwen2ForCausalLM(Qwen2Config(vocab_size=32, initializer_range=0.3, **shape)).double()))
    return out


def rollout(lengths=(5, 3, 7, 1, 6, 0), same_prompts=False, **flags):
    """Six completions of three prompts, one of them empty -> batch, the same behind the teacher's prompts, args."""
    g = torch.Generator().manual_seed(1)

    def text(n):
        return torch.randint(3, 32, (n,), generator=g).tolist()

    prompts = [text(n) for n in (4, 2, 6)]
    batch = collate([(prompts[i // 2], text(n)) for i, n in enumerate(lengths)])
    batch.prompt_id, batch.old_logp = torch.tensor([10, 10, 11, 11, 12, 12]), torch.zeros(batch.mask.shape)
    told_ids = {10 + i: ([] if same_prompts else text(n)) + p for i, (n, p) in enumerate(zip((1, 5, 3), prompts))}
    return batch, opsd.retold(batch, told_ids), opsd.Args(**flags)


def test_the_same_completions_behind_other_prompts():
    batch, told, _ = rollout()
    T = batch.mask.shape[1]
    assert torch.equal(told.mask, batch.mask) and torch.equal(told.ids[:, -T:][told.mask], batch.ids[:, -T:][batch.mask])
    assert told.attention_mask[:, :-T].sum(1).tolist() == [5, 5, 7, 7, 9, 9]
    assert torch.equal(batch.adv, torch.ones_like(batch.old_logp))


def by_hand(policies, batch, told, args):
    """Row by row, without padding: what both say of every token of a completion -> the loss's terms, KL, in order."""
    out, kl, T = [], [], batch.mask.shape[1]
    for i in range(len(batch.ids)):
        if not (n := int(batch.mask[i].sum())):
            continue
        both = []
        for policy, b in zip(policies, (batch, told)):
            ids = b.ids[i][b.attention_mask[i]]
            both.append(policy.lm(ids[None]).logits[0, -n - 1 : -1].double() / args.temperature)
        out.append(-opsd.divergence(batch.ids[i, -T:][batch.mask[i]], *both, args)[0])
        p, q = (z.softmax(-1) for z in both)
        kl.append((q * (q / p).log()).sum(1))
    return torch.cat(out), torch.cat(kl)


@pytest.mark.parametrize("flags", [{}, dict(temperature=0.7), dict(divergence="jsd"), dict(divergence="sampled")], ids=str)
def test_both_are_read_at_the_same_token_and_temperature(policies, flags):
    """Whatever the lengths of the prompts."""
    batch, told, args = rollout(**flags)
    with torch.no_grad():
        objective, logp, entropy, kl, cut = opsd.read_twice(*policies, batch, told, args)
        for found, wanted in zip((-objective, kl), by_hand(policies, batch, told, args)):
            torch.testing.assert_close(found[batch.mask], wanted)
        plain = policies[0](batch.ids, batch.attention_mask, batch.mask, args.temperature)
    torch.testing.assert_close(logp, plain[0])
    torch.testing.assert_close(entropy, plain[1])
    assert not objective[~batch.mask].any() and kl[batch.mask].min() > 0 and not cut.any()


def gradient(policies, budget=1000, **flags):
    """As the loop forms it, in micro-batches of that many tokens -> loss, gradient, number of micro-batches."""
    (policy, teacher), (batch, told, args) = policies, rollout(**flags)
    batch.weights = opsd.token_weights(batch.trained, args).double()
    policy.zero_grad(), teacher.zero_grad()
    value, cuts = 0.0, 0
    for mb in batch.micro_batches(torch.arange(6), budget):
        objective, *_ = opsd.read_twice(policy, teacher, mb, told.take(mb.row), args)
        micro = -(objective * mb.weights)[mb.trained].sum()
        micro.backward()
        value, cuts = value + micro.item(), cuts + 1
    assert teacher is policy or all(p.grad is None for p in teacher.parameters())
    return value, torch.cat([p.grad.flatten().clone() for p in policy.parameters()]), cuts


@pytest.mark.parametrize("flags", [{}, dict(entry_clip=0.05), dict(divergence="sampled")], ids=str)
def test_micro_batches_add_up(policies, flags):
    (whole, grad, one), (parts, sums, many) = (gradient(policies, budget, **flags) for budget in (1000, 14))
    assert one == 1 and many > 2 and parts == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(sums, grad, rtol=1e-9, atol=1e-12)
    batch, told, args = rollout(**flags)
    with torch.no_grad():
        assert whole == pytest.approx(by_hand(policies, batch, told, args)[0].mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "sampled"])
def test_the_live_teacher_behind_the_student_s_prompt_is_the_student(policies, kind):
    """To the last bit: a teacher that read a token earlier or later would differ."""
    value, grad, _ = gradient(policies[:1] * 2, same_prompts=True, divergence=kind)
    bound = 1e-15 if kind == "jsd" else 0
    assert abs(value) <= bound and grad.abs().max() <= (1e-12 if kind != "sampled" else 0)
    assert gradient(policies[:1] * 2, divergence=kind)[1].abs().max() > 1e-3


def test_a_live_teacher_is_a_constant(policies):
    """It gives the gradient of a frozen copy of itself."""
    policy = policies[0]
    live, frozen = gradient((policy, policy)), gradient((policy, copy.deepcopy(policy)))
    assert live[0] == frozen[0] and torch.equal(live[1], frozen[1])


def test_flags_of_the_loss(policies):
    base = gradient(policies)[1]
    for flags in (dict(divergence="jsd"), dict(divergence="reverse"), dict(divergence="sampled"), dict(entry_clip=0.05),
                  dict(temperature=0.7)):  # fmt: skip
        assert (gradient(policies, **flags)[1] - base).abs().max() > 1e-3, flags
    assert torch.equal(gradient(policies, entry_clip=1e3)[1], base)


def test_without_a_token_there_is_no_loss(policies):
    batch, told, args = rollout()
    mb = batch.take(torch.tensor([0, 1]))
    mb.mask = mb.trained = mb.mask & False
    objective, *found = opsd.read_twice(*policies, mb, told.take(torch.tensor([0, 1])), args)
    assert objective.shape == mb.mask.shape and not any(x.any() for x in (objective, *found))
    policies[0].zero_grad()
    (objective * 1.0)[mb.trained].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in policies[0].parameters())


@pytest.mark.parametrize("template, mark", [("({solution}){prompt}", "("), ("{prompt}\nSee:\n<s>\n{solution}\n</s>", "<s>"),
                                            ("{prompt}{solution}", None)])  # fmt: skip
def test_measures(template, mark):
    """KL at first tokens alone; how often a completion begins as the solution does in the teacher's prompt."""
    batch, _, args = rollout(hint_template=template)
    batch.texts = [(mark or "") + "85", "85(<s>", " " + (mark or "") + "x", "", ":", (mark or "") + "empty"]
    mb = batch.take(torch.arange(6))
    seen = collections.defaultdict(list)
    meter = SimpleNamespace(add=lambda stats, mask: [seen[k].extend(x[mask].tolist()) for k, x in stats.items()])
    kl = torch.arange(42.0).view(6, 7)
    stats = opsd.measure(meter, mb, [kl, kl + 1], args)
    assert seen["teacher_kl_first"] == [0, 7, 14, 21, 28]  # the last one has no token
    assert seen["leakage"] == ([1, 0, 1, 0, 0] if mark else [0] * 5)
    assert stats.keys() == {"teacher_kl", "clipped_mass"} and torch.equal(stats["clipped_mass"], kl + 1)


# ---------------------------------------------------------------- the teacher's prompts


def told(*rows, part="train", **flags):
    """The teacher's prompts, of rows (prompt, answer)."""
    examples = [tasks.Example(i, *row) for i, row in enumerate(rows)]
    task = tasks.Task("t", *((examples, []) if part == "train" else ([], examples)), None)
    return [e.prompt for e in getattr(opsd.hinted(task, opsd.Args(**dict(hint_template="{solution}|{prompt}") | flags)), part)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_whole_solution_is_shown(part):
    answers = ["It is 3 + 4 = 7.\n#### 7", r"So \boxed{1}{x}.", ("12", "13"), "9"]
    rows = [("q{y}", a) for a in answers]
    assert told(*rows, part=part) == [f"{x}|q{{y}}" for x in (*answers[:2], "12", "9")]
    assert told(*rows, part=part, hint="wrong") == [f"{x}|q{{y}}" for x in ("9", answers[0], "22", "19")]
    assert told(*rows, part=part, hint="none") == ["q{y}"] * 4


def test_only_the_last_turn_holds_it():
    turns = [dict(role="user", content="a"), dict(role="assistant", content="b"), dict(role="user", content="c {x}")]
    assert told((turns, "7")) == [[*turns[:2], dict(role="user", content="7|c {x}")]] and turns[-1]["content"] == "c {x}"
    assert told((turns, "7"), hint="none") == [turns]


@pytest.mark.parametrize("template", ["{prompt}", "{solution}", "none", "{prompt} {solution} {x}", "{prompt} {solution} {",
                                      "{0}{1}", "{prompt.x}{solution}"])  # fmt: skip
@pytest.mark.parametrize("hint", ["right", "none"])
def test_a_template_without_its_fields(template, hint):
    with pytest.raises(UserError, match="--hint-template needs the fields {prompt} and {solution} and no other"):
        told(("q", "7"), hint_template=template, hint=hint)


CHAT = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"


def test_a_chat_template_and_the_context(tmp_path):
    """Both prompts end alike, in a real model's own words."""
    tokenizer = models.characters(models.CHARACTERS + "[]\\{}<>#'")
    tokenizer.chat_template = CHAT
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=320, **shape)
    config.save_pretrained(tmp_path)
    rows = [dict(prompt=f"{i} apples and 2?", answer=f"{i}+2={i + 2}\n#### {i + 2}") for i in range(20, 40)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = opsd.Args(model=str(tmp_path), task=str(tmp_path / "task.jsonl"), max_new_tokens=16, system_prompt="be brief")
    args, config = settings.resolve(given)
    assert (args.prompts_per_step, args.group_size, args.minibatches, args.lr) == (32, 1, 1, 2e-6)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt)
    other, ids, context = opsd.hints(task, tokenizer, config, args)
    e, cue = task.train[0], r"Please reason step by step, and put your final answer within \boxed{}.[me]"
    assert tokenizer.decode(e.ids) == f"[system]be brief[user]{e.prompt}\n\n{cue}"
    shown = f"{e.prompt}\n\nA reference solution:\n<solution>\n{e.answer}\n</solution>\nUnderstand it."
    assert tokenizer.decode(ids[e.id]).startswith(f"[system]be brief[user]{shown}")
    assert tokenizer.decode(ids[e.id]).endswith(f" words.\n\n{cue}")
    assert ids.keys() == {e.id for e in task.train} and [e.id for e in other.test] == [e.id for e in task.test]
    assert context == 16 + max(len(e.ids) for e in other.train + other.test) > 100 + len(e.ids)
    config.max_position_embeddings = context - 1
    with pytest.raises(UserError, match=f"A reference solution.* needs {context} positions"):
        opsd.hints(task, tokenizer, config, args)


# ---------------------------------------------------------------- the world


def test_half_of_the_world_is_shown_the_sum():
    args, _ = settings.resolve(opsd.Args())
    task, rng = opsd.sums(args), random.Random(0)
    assert len(task.shown) == len(task.train) and {e.id for e in task.shown}.isdisjoint(e.id for e in task.train)
    for e, shown in zip(task.train[:300], task.shown):
        assert shown.prompt == f"({e.answer}){e.prompt}" and shown.answer == e.answer
        text = task.demonstrate(rng, shown, 0.0)
        assert text == task.demonstrate(rng, e, 1.0) and text.endswith(":" + e.answer) and not text.startswith(":")
    guesses = [task.demonstrate(rng, e, 0.2).startswith(":") for e in task.train[:500]]
    assert sum(guesses) / 500 == pytest.approx(0.8, abs=0.05)
    other = opsd.sums(dataclasses.replace(args, hint_template="{prompt}{solution}=", hint="wrong"))
    assert other.shown[0].prompt == f"{task.train[0].prompt}{task.train[0].answer}="
    assert opsd.sums(dataclasses.replace(args, model="qwen2.5-1.5b", task="gsm8k")) is None


def test_mistakes():
    for bad in (dict(format_reward=0.1), dict(entry_clip=-1.0), dict(group_size=0), dict(divergence="kl"), dict(hint="x")):
        with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
            settings.resolve(opsd.Args(**bad))
    for task in ("route", "addition:3", "no.jsonl"):
        with pytest.raises(UserError, match=f"--task {task}: the tiny model knows what a solution is in addition alone"):
            opsd.sums(opsd.Args(task=task, hint_template="{prompt}{solution}"))


def test_presets():
    small, _ = settings.resolve(opsd.Args())
    assert (small.task, small.max_new_tokens, small.minibatches, small.epochs, small.group_size) == ("addition", 28, 1, 1, 1)
    assert (small.divergence, small.entry_clip, small.teacher, small.hint, small.beta) == ("forward", 0, "fixed", "right", 0)


# ---------------------------------------------------------------- runs


def test_a_run_and_the_same_in_two_halves(tmp_path):
    """And the world is one in which the teacher knows more."""
    rows = halves("opsd", tmp_path, 2, "--group-size", 1, "--minibatches", 1, "--eval-prompts", 64)
    assert [r["step"] for r in rows] == [1, 2]
    for r in rows:
        assert r["grad_norm"] > 0 and r["entropy"] > 0 and r["clipped_mass"] == r["leakage"] == 0 and r["adv_mean"] == 1
        assert r["loss"] == pytest.approx(r["teacher_kl"], rel=1e-5) and 0.1 < r["teacher_kl"] < r["teacher_kl_first"]
        assert r["ratio_max"] == pytest.approx(1, abs=1e-4) and r["accuracy"] == r["reward"] < 0.5
    before, *_, after = lines(tmp_path / "whole" / "evals.jsonl")
    assert before["teacher_gain"] == before["teacher_accuracy"] - before["greedy_accuracy"] > 0.8
    assert before["teacher_accuracy"] > 0.95 and "teacher_gain" not in after
    said = f"teacher accuracy {before['teacher_accuracy']:.3g}, teacher gain {before['teacher_gain']:.3g} on 64"
    assert said in next(tmp_path.glob("child-0.out")).read_text()


def listen():
    """Writes down every prompt that is sampled from for training, and every one that is read, and whether it is learnt from."""
    from common import policy, rollout

    collect, forward, file = rollout.collect, policy.Policy.forward, open("heard.jsonl", "w", 1)

    def prompts(kind, ids, attention, T):
        file.write(json.dumps([kind, [row[m].tolist() for row, m in zip(ids[:, :-T], attention[:, :-T])]]) + "\n")

    def collected(*args, **kwargs):
        batch = collect(*args, **kwargs)
        prompts("sampled", batch.ids, batch.attention_mask, batch.mask.shape[1])
        return batch

    def read(self, ids, attention_mask, mask, *args, **kwargs):
        if len(mask):
            kind = "learnt" if torch.is_grad_enabled() else "taught" if kwargs.get("states") else "read"
            prompts(kind, ids, attention_mask, mask.shape[1])
        return forward(self, ids, attention_mask, mask, *args, **kwargs)

    rollout.collect, policy.Policy.forward = collected, read


def test_the_student_never_sees_the_solution(tmp_path):
    argv = [*SMALL, "--steps", 2, "--teacher", "live", "--beta", 0.1, "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *argv, script=ROOT / "algos" / "opsd.py", before=listen)
    assert done.code == 0, done.err
    tokenizer, heard = models.characters(), collections.defaultdict(list)
    for row in (tmp_path / "heard.jsonl").read_text().splitlines():
        kind, prompts = json.loads(row)
        heard[kind] += [tokenizer.decode(p) for p in prompts]
    for kind in ("sampled", "learnt"):
        assert len(heard[kind]) >= 64 and all(p.count("+") == 1 and "(" not in p for p in heard[kind]), kind
    assert len(heard["taught"]) >= 64 and all(p.startswith("(") for p in heard["taught"][-64:])
    solved = [p[1:].partition(")") for p in heard["taught"][-64:]]
    assert all(eval(sum_.rstrip("=")) == int(answer) for answer, _, sum_ in solved)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert 0 < rows[0]["ref_kl"] < rows[1]["ref_kl"]  # two updates each


def test_the_control(tmp_path):
    """Who is its own teacher, behind its own prompt, stays where it started, and a note says why."""
    argv = [*SMALL, "--group-size", 1, "--hint", "none", "--teacher", "live", "--steps", 1, "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *argv, script=ROOT / "algos" / "opsd.py")
    assert done.code == 0, done.err
    assert "note: what the teacher is shown changes its accuracy by 0.00 only" in done.out
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == row["teacher_kl"] == 0 and row["grad_norm"] < 1e-6 and row["tokens"] > 0
