"""SFT: the loss by hand, what a demonstration may be, where the loss is, and the script run as a user runs it."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from algos import grpo, sft
from common import UserError, demonstrations, encoding, gpu, memory, models, settings, tasks
from common.worlds import tiny as tiny_models
from tests.helpers import ROOT, checkpoints, contents, die_at, lines, outcome, run, same, tiny, user_error

__all__ = ["tiny"]
SFT = ROOT / "algos" / "sft.py"
SMALL = "--steps 4 --batch-size 8 --eval-prompts 16 --checkpoint-every 2 --eval-every 2".split()
TOKENIZER = tiny_models.characters()


def user(text):
    return dict(role="user", content=text)


def assistant(text):
    return dict(role="assistant", content=text)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def load(task, tokenizer=TOKENIZER, **changes):
    """-> (args, task) as the script has them."""
    args = sft.Args(task=str(task), **dict(max_new_tokens=28, batch_size=8) | changes)
    return args, demonstrations.load(args, config(tokenizer), tokenizer)[0]


def config(tokenizer):
    found = tiny_models.config("tiny-small")
    found.vocab_size = len(tokenizer)
    return found


# ---------------------------------------------------------------- the objective


def test_worked_example():
    """Cross-entropy, whose gradient is pi - onehot; the numbers are those of methods' cards that argue with it."""
    logits = torch.tensor([[2.0, 1, 0, -1]], requires_grad=True)
    losses, logp, entropy = sft.token_loss(torch.tensor([1]), logits, sft.Args())
    losses.sum().backward()
    assert losses.item() == pytest.approx(1.440190, abs=1e-6) and logp.item() == -losses.item()
    assert entropy.item() == pytest.approx(0.947537, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.643914, -0.763117, 0.087144, 0.032059]]), rtol=0, atol=1e-6)


def test_all_tokens_count_alike():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert sft.token_weights(mask, sft.Args()).tolist() == [[0.25, 0.25, 0.25], [0.25, 0, 0]]


def test_the_loss_is_that_of_transformers(tiny):
    """Of labels that are -100 at the prompt and the padding."""
    args, task = load("addition")
    policy = models.load(settings.resolve(sft.Args(model=tiny, task="addition"))[0], torch.device("cpu"))
    batch = demonstrations.batch(task, task.train[:6], TOKENIZER, args, 1)
    losses, logp, _ = policy(batch.ids, batch.attention_mask, batch.mask, read=lambda *x: sft.token_loss(*x, args))
    ours = (losses * sft.token_weights(batch.mask, args))[batch.mask].sum()
    labels = batch.ids.clone()
    labels[:, : -batch.mask.shape[1]] = -100
    labels[:, -batch.mask.shape[1] :][~batch.mask] = -100
    policy.pad()
    where = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    theirs = policy.lm(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=where, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(logp, policy(batch.ids, batch.attention_mask, batch.mask)[0])  # and HeadLogp's


# ---------------------------------------------------------------- what a demonstration may be


@pytest.mark.parametrize(
    "row",
    [
        dict(prompt="2+2=", completion="4"),
        dict(prompt=[user("2+2=")], completion="4"),
        dict(prompt=[user("2+2=")], completion=[assistant("4")], extra=1),
        dict(messages=[user("2+2="), assistant("4")]),
        dict(messages=None, prompt="2+2=", completion="4", answer=None),
    ],
)
def test_every_schema_is_the_same_demonstration(row, tmp_path):
    rows = [dict(prompt=f"{i}=", completion=f"{i}") for i in range(12)] + [row]
    args, task = load(write(tmp_path / "rows.jsonl", rows))
    (e,) = [e for e in task.train + task.test if TOKENIZER.decode(e.ids) == "2+2="]
    assert task.demonstrate(None, e, 0.9) == "4" and task.check is None and e.where.endswith("rows.jsonl:13")
    batch = demonstrations.batch(task, [e], TOKENIZER, args, 1)
    assert TOKENIZER.decode(batch.ids[0]) == "2+2=4<eos>" and batch.mask.tolist() == [[True, True]]


def test_the_last_message_is_learnt_and_the_others_are_read(tmp_path):
    """Through a chat template whose assistant ends with a token of its own, behind a system's turn."""
    tokenizer = tiny_models.characters()
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<end>"]))
    tokenizer.chat_template = (
        "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    turns = [user("a"), assistant("b"), user("c"), assistant("de")]
    rows = [dict(messages=[*turns[:2], user(f"{i}"), turns[3]]) for i in range(12)]
    args = sft.Args(task=str(write(tmp_path / "rows.jsonl", rows)), max_new_tokens=8, system_prompt="be brief")
    task, context = demonstrations.load(args, config(tokenizer), tokenizer)
    batch = demonstrations.batch(task, task.train[:1], tokenizer, args, 1)
    read, learnt = batch.ids[0, : -batch.mask.shape[1]], batch.ids[0, -batch.mask.shape[1] :][batch.mask[0]]
    asked = task.train[0].prompt[-1]["content"]
    said = f"(system)be brief<end>\n(user)a<end>\n(assistant)b<end>\n(user){asked}<end>\n(assistant)"
    assert tokenizer.decode(read) == said and tokenizer.decode(learnt) == "de<end>"
    assert learnt[-1] == encoding.turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")
    lm = AutoModelForCausalLM.from_config(config(tokenizer))
    assert learnt[-1] in models.end_tokens(lm, tokenizer) and context == 62 + 8


def test_answers_are_demonstrations_that_can_be_checked(tmp_path):
    """GSM8K's schema: the whole solution is learnt, under the prompt that asks for a box, as for online scripts."""
    tokenizer = tiny_models.characters(tiny_models.CHARACTERS + "\\{}#")
    rows = [dict(question=f"{i} and 2?", answer=f"{i}+2={i + 2}\n#### {i + 2}") for i in range(12)]
    args, task = load(write(tmp_path / "rows.jsonl", rows), tokenizer, max_new_tokens=40)
    e = task.train[0]
    assert task.demonstrate(None, e, 0.9) == e.answer and "boxed" in tokenizer.decode(e.ids)
    assert task.check(e.answer, e.answer)[1] == task.check(f"so {int(e.prompt[0]) + 2}", e.answer)[1] == 1.0
    # several right ones: the first is learnt
    rows = [dict(prompt=f"{i}=", answer=[f"{i}", "x"]) for i in range(12)]
    _, task = load(write(tmp_path / "more.jsonl", rows), tokenizer)
    assert task.demonstrate(None, task.train[0], 0.9) == task.train[0].answer[0]


def test_completions_with_answers_can_be_checked_too(tmp_path):
    rows = [dict(prompt=f"{i}=", completion=f"it is {i}", answer=str(i)) for i in range(12)]
    _, task = load(write(tmp_path / "rows.jsonl", rows))
    e = task.train[0]
    assert e.answer == e.prompt[:-1] and task.demonstrate(None, e, 0.9) == f"it is {e.answer}"
    assert task.check(f"it is {e.answer}", e.answer)[1] == 1.0 and TOKENIZER.decode(e.ids) == e.prompt  # in its own words
    del rows[3]["answer"]  # not all of them
    assert load(write(tmp_path / "rows.jsonl", rows))[1].check is None
    (tmp_path / "mine.py").write_text("def score(text, answer):\n    return float(text == answer)\n")
    _, task = load(tmp_path / "rows.jsonl", reward=f"{tmp_path}/mine.py:score")
    without = [e for e in task.train + task.test if e.prompt == "3="]
    assert task.check is not None and without[0].answer == "it is 3"  # what a reward of one's own compares with


@pytest.mark.parametrize(
    "row, complaint",
    [
        (dict(completion="a"), "needs prompt and completion, or messages of which the last is the assistant's"),
        (dict(prompt="a", completion=3), "needs prompt and completion"),
        (dict(prompt="a", completion=[user("b")]), "needs prompt and completion"),
        (dict(messages=[assistant("a")]), "needs prompt and completion, or messages"),
        (dict(messages=[user("a"), user("b")]), "messages of which the last is the assistant's"),
        (dict(messages="hi"), "messages of which"),
        (dict(messages=[user("a"), assistant("b"), assistant("c")]), "of which the last is not the assistant's"),
        (dict(prompt=" ", completion="a"), "prompt must be text"),
        (dict(prompt="a", completion="b", answer=[]), "answer must be text or a number"),
        (dict(prompt="a", reply="b"), "needs the fields prompt and answer"),
        (["a", "b"], "needs an object"),
    ],
)
def test_mistakes_in_a_row_are_told_with_its_line(row, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint) as caught:
        load(write(tmp_path / "rows.jsonl", [dict(prompt="a", completion="b"), row]))
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: ")


def test_tasks_without_demonstrations_are_refused():
    with pytest.raises(UserError, match="gym:chain_sum: has no demonstrations; there are addition, .*gsm8k, math, and"):
        load("reasoning_gym:chain_sum")


def test_what_does_not_fit_is_told_in_one_line(tmp_path, capsys):
    rows = [dict(prompt=f"{i}=", completion="abc") for i in range(20)]
    rows += [dict(prompt="x", completion=" "), dict(prompt="y" * 1024, completion="a"), dict(prompt="z", completion="a" * 30)]
    args, task = load(write(tmp_path / "train.jsonl", rows), max_new_tokens=8)
    assert capsys.readouterr().out == (
        "note: of 23 demonstrations 2 left out (empty, or too long for the model), 1 cut at --max-new-tokens 8\n"
    )
    assert len(task.train) + len(task.test) == 21
    long = [e for e in task.train + task.test if e.prompt == "z"]
    batch = demonstrations.batch(task, long, TOKENIZER, args, 1)
    assert TOKENIZER.decode(batch.ids[0]) == "z" + "a" * 8 and batch.mask.all()  # cut, so without an end
    # a held-out prompt needs room for what is sampled, one to train on for its completion alone
    rows = [dict(prompt=f"{i}" + "y" * 1000, completion="abc") for i in range(10, 30)]
    write(tmp_path / "test.jsonl", [dict(prompt="a", completion="b")])
    _, task = load(write(tmp_path / "train.jsonl", rows))
    assert len(task.train) == 20 and capsys.readouterr().out == ""
    with pytest.raises(UserError, match="20 demonstrations to learn, 0 held out"):
        load(write(tmp_path / "train.jsonl", rows), max_new_tokens=1024)


# ---------------------------------------------------------------- batches


def test_masks_are_on_completions_and_their_end():
    args, task = load("addition")
    batch = demonstrations.batch(task, task.train[:20], TOKENIZER, args, 3)
    T = batch.mask.shape[1]
    for i, e in enumerate(task.train[:20]):
        assert TOKENIZER.decode(batch.ids[i, :-T][batch.attention_mask[i, :-T]]) == e.prompt
        assert TOKENIZER.decode(batch.ids[i, -T:][batch.mask[i]]) == batch.texts[i] + "<eos>"
    assert torch.equal(batch.mask, batch.attention_mask[:, -T:]) and batch.trained is batch.mask
    assert batch.prompt_id.tolist() == [e.id for e in task.train[:20]]


def test_a_demonstration_is_drawn_from_seed_and_position_alone():
    args, task = load("addition", careful=0.5)

    def texts(examples, seed, first):
        torch.manual_seed(first)
        return demonstrations.batch(task, examples, TOKENIZER, args, seed, first).texts

    whole = texts(task.train[:16], 1, 32)
    assert whole == texts(task.train[:16], 1, 32) and whole[5:9] == texts(task.train[5:9], 1, 37)
    assert whole != texts(task.train[:16], 2, 32) and whole != texts(task.train[:16], 1, 48)


@pytest.mark.parametrize("careful, low, high", [(1.0, 1, 1), (0.0, 0.02, 0.2), (0.9, 0.85, 0.96)])
def test_the_share_of_careful_ones(careful, low, high):
    args, task = load("addition", careful=careful)
    batch = demonstrations.batch(task, task.train[:400], TOKENIZER, args, 1)
    right = sum(task.check(text, e.answer)[1] for text, e in zip(batch.texts, task.train)) / 400
    assert low <= right <= high
    if careful == 0.9:
        with pytest.raises(UserError, match="--careful must be at least 0 and at most 1, is 1.1"):
            settings.resolve(sft.Args(careful=1.1))


@pytest.mark.parametrize("name", tasks.worlds_with("demonstrations").split(", "))
def test_every_world_with_demonstrations(name):
    """Their texts are told apart from no text, and are what is checked."""
    world = tasks.world(name)
    tokenizer = (world.tokenizer or tiny_models.characters)()
    args, task = load(name, tokenizer, max_new_tokens=world.max_new_tokens or 28)
    batch = demonstrations.batch(task, task.train[:8], tokenizer, args, 1)
    assert all(batch.texts) and batch.mask.any(1).all() and task.check


# ---------------------------------------------------------------- presets, memory


def test_presets(tmp_path):
    args, _ = settings.resolve(sft.Args())
    assert (args.task, args.steps, args.batch_size, args.lr, args.max_new_tokens) == ("addition", 60, 32, 3e-4, 28)
    tiny_models.config().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("warm_started_on", "x"))
    args, model = settings.resolve(sft.Args(model=str(tmp_path)))
    assert (args.task, args.batch_size, args.lr, args.optimizer) == ("gsm8k", 64, 1e-5, "adamw_sr")
    with pytest.raises(UserError, match="--batch-size must be at least 1"):
        settings.resolve(sft.Args(batch_size=0))
    # the plan knows no group of completions: what is sampled are the held-out prompts
    plan = memory.memory_plan(model, args, 10**6, context=64, capacity=2**30)
    rows = 4 * args.eval_prompts
    assert plan["gradients"] > 0 and plan["KV cache"] == pytest.approx(2 * 2 * 3 * 32 * 2 * 64 * min(rows, 1024))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("sft")
    done = run(folder, *SMALL, "--also-evaluate", "addition:1", "--run-dir", folder / "run", script=SFT)
    assert done.code == 0, done.err
    return folder / "run", done, outcome(folder / "run")


def test_what_a_run_says(whole):
    folder, done, _ = whole
    before, middle, after = lines(folder / "evals.jsonl")
    assert (before["step"], middle["step"], after["step"]) == (0, 2, 4) and after["prompts"] == 16
    last = f"greedy accuracy {before['greedy_accuracy']:.2f} -> {after['greedy_accuracy']:.2f} on 16 held-out prompts"
    assert done.err == "" and done.out.splitlines()[-1] == last and after["greedy_accuracy"] > before["greedy_accuracy"]
    assert before["perplexity"] > after["perplexity"] > 1 and 0 <= after["also_greedy_accuracy"] <= 1
    rows = lines(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and all(r["loss"] == pytest.approx(-r["logp"], rel=1e-6) for r in rows)
    shown = lines(folder / "samples.jsonl")
    assert [r["step"] for r in shown] == [0, 0, 2, 2, 4, 4] and shown[0]["prompt"] == shown[2]["prompt"]
    assert repr(shown[-1]["completion"]) in done.out and repr(shown[0]["demonstration"]) in done.out


def test_killed_and_resumed(whole, tmp_path):
    """The same seed is the same run, also one that dies on its way."""
    again = "--also-evaluate", "addition:1", "--run-dir", tmp_path / "run"
    dead = run(tmp_path, *SMALL, *again, script=SFT, before=functools.partial(die_at, "os.rename", "step-000004"))
    assert dead.code == -9 and len(checkpoints(tmp_path / "run")) == 1
    done = run(tmp_path, "--resume", tmp_path / "run", script=SFT)
    assert done.code == 0, done.err
    same(outcome(tmp_path / "run"), whole[2])


def test_lora_from_a_local_folder_on_conversations(tmp_path):
    """A model with a chat template; nothing says what is right, so that perplexity is the last word; only adapters move."""
    tokenizer = tiny_models.characters(tiny_models.CHARACTERS + "<>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lm = AutoModelForCausalLM.from_config(config(tokenizer))
    lm.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    rows = [dict(messages=[user(f"say {c}"), assistant(c * 3)]) for c in "abcdefghijklmnop"]
    local = ["--model", tmp_path / "model", "--task", write(tmp_path / "train.jsonl", rows), "--max-new-tokens", 6]
    flags = "--steps 3 --batch-size 5 --lr 3e-2 --lora-rank 4 --dtype float32 --optimizer adamw --warmup-steps 1".split()
    done = run(tmp_path, *local, *flags, "--run-dir", tmp_path / "run", script=SFT)
    assert done.code == 0 and done.err == "", done.err
    before, after = (lines(tmp_path / "run" / "evals.jsonl")[i] for i in (0, -1))
    last = f"perplexity {before['perplexity']:.2f} -> {after['perplexity']:.2f} on 3 held-out prompts"
    assert done.out.splitlines()[-1] == last and after["perplexity"] < before["perplexity"] and "greedy_accuracy" not in after
    assert "memory plan per process" in done.out
    own = contents(checkpoints(tmp_path / "run")[-1])["own"]
    assert own and all(".lora_" in name for name in own)
    start, end = (load_file(p / "model.safetensors") for p in (tmp_path / "model", checkpoints(tmp_path / "run")[-1]))
    assert torch.equal(start["model.embed_tokens.weight"], end["model.embed_tokens.weight"])
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"], end["model.layers.0.mlp.up_proj.weight"])


def test_tiny_is_refused_a_file_of_completions(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dict(prompt=f"{i}", completion="b") for i in range(9)])
    said = user_error(run(tmp_path, "--task", path, "--run-dir", tmp_path / "run", script=SFT))
    assert said.startswith("the tiny model is warm-started on a built-in task (addition, ") and said.endswith("give --model")


def test_its_checkpoint_is_a_model_for_grpo(whole):
    args, model = settings.resolve(grpo.Args(model=str(whole[0])))
    assert (args.task, args.lr, args.max_new_tokens) == ("addition:2", 1e-4, 28)
    tokenizer = models.load_tokenizer(args)
    policy = models.load(args, gpu.device())
    assert len(tokenizer) == model.vocab_size == policy.lm.lm_head.weight.shape[0]


def test_every_update_has_demonstrations_of_its_own(tiny, tmp_path, monkeypatch):
    """Of the places in the order that follow on those before, by the script's own loop."""
    made, drawn = [], demonstrations.batch

    def remembered(task, examples, tokenizer, args, seed, first=0):
        made.append((seed, first, [e.id for e in examples]))
        return drawn(task, examples, tokenizer, args, seed, first)

    monkeypatch.setattr(demonstrations, "batch", remembered)
    monkeypatch.setattr("sys.argv", ["sft.py"])
    small = dict(steps=3, batch_size=4, eval_prompts=2, eval_every=0, checkpoint_every=0)
    sft.train(sft.Args(model=str(tiny), run_dir=str(tmp_path / "run"), seed=5, **small))
    (evaluated, *updates, again), order = made, load("addition")[1].order(0, 12, 5)
    assert evaluated == again and evaluated[0] == 0  # alike for all seeds
    assert updates == [(5, 4 * i, [e.id for e in order[4 * i : 4 * i + 4]]) for i in range(3)]


def test_a_tiny_checkpoint_runs_on_one_thread_as_the_tiny_model_does(tiny, monkeypatch):
    told = []
    monkeypatch.setattr(gpu, "init", lambda args, small: told.append(small) or gpu.device())
    monkeypatch.setattr("sys.argv", ["sft.py"])
    settings.prepare("sft.py", sft.Args(model=str(tiny)))
    assert told == [True]


# ---------------------------------------------------------------- random weights


def test_fresh_weights(tmp_path, monkeypatch):
    """By args.seed, of the model's shape, and for a tiny model without the minute of its warm start."""
    monkeypatch.setenv("TOKENPO_CACHE", str(tmp_path))
    monkeypatch.setattr(tiny_models, "RECIPE", tiny_models.RECIPE | dict(steps=10**9))

    def fresh(seed):
        args = SimpleNamespace(
            model="tiny-small", task="route", seed=seed, dtype="float32", lora_rank=0, gradient_checkpointing=False
        )
        assert len(models.load_tokenizer(args, fresh=True)) == 79  # with the > of route's prompts
        return models.load(args, torch.device("cpu"), fresh=True).lm

    one, again, two = (fresh(seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(one[k], again[k]) for k in one) and not torch.equal(one[name], two[name])
    assert one[name].std().item() == pytest.approx(0.02, rel=0.1)  # as transformers draws them
    assert fresh(3).config.warm_started_on == "route"
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1  # one folder, whatever the seed
