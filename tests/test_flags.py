"""Flags that users look for: own rewards, system prompts, stop strings, schedules, LoRA's choices, devices, trackers, the hub,
sampled evaluations, rollouts that wait."""

import fnmatch
import json
import math
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from algos import grpo, rlfr, spo
from common import UserError, checkpoint, engines, gpu, models, rewards, rollout, settings, tasks
from common.worlds import tiny as tiny_models
from tests.batches import args, tiny
from tests.helpers import ROOT, checkpoints, contents, lines, outcome, run, same, user_error

__all__ = ["tiny"]
ADDITION = """--task addition --prompts-per-step 4 --group-size 2 --minibatches 2 --eval-prompts 8 --eval-every 0
    --checkpoint-every 0""".split()

# ---------------------------------------------------------------- rewards of one's own

OWN = """
import time
import beside

def equals(text, answer):
    return text.count("=") - len(answer) / 2

def both(text, answer):
    return text[-1:], beside.TWICE * len(text)

def three(text, answer):
    return text, 1.0, 2.0

def alone():
    return 1.0

def picky(text, answer):
    if text == "hang":
        time.sleep(60)
    if text == "none":
        return float("nan")
    return {"a": 0.25}[text]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "beside.py").write_text("TWICE = 2\n")
    (folder / "mine.py").write_text(OWN)
    return folder / "mine.py"


def scored(own, name, texts, **kwargs):
    scorer = rewards.Scorer(rewards.Own(f"{own}:{name}"), workers=1, **kwargs)
    done = scorer(texts, ["42"] * len(texts))
    scorer.close()
    return *done, scorer.timeouts


def test_a_score_may_be_any_number(own):
    assert scored(own, "equals", ["1=1 =2: 7", "nothing"]) == (["7", None], [1.0, -1.0], 0)


def test_an_answer_may_come_with_it(own):
    assert scored(own, "both", ["abc", ""]) == (["c", ""], [6.0, 0.0], 0)


def test_what_it_raises_is_told_once_and_scores_0(own, capfd):
    texts = ["a", "b", "hang", "c", "none"]
    assert scored(own, "picky", texts, timeout_s=1.0) == ([None] * 5, [0.25, 0.0, 0.0, 0.0, 0.0], 1)
    assert scored(own, "three", ["a"])[1] == [0.0]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: --reward ")]
    assert told[:2] == [f"note: --reward {own}:picky raised KeyError('{x}'); that scores 0" for x in "bc"]  # b's was killed
    assert len(told) == 3 and "too many values to unpack" in told[2]


@pytest.mark.parametrize(
    "spec, reason",
    [("{own}", "needs file.py:function"), ("{own}:missing", "no function missing"),
     ("{own}:alone", "too many positional arguments"), ("{own}:time", "is not a callable object"),
     ("{folder}/bye.py:f", "bye"), ("{own}x:equals", "No such file"),
     ("{folder}/broken.py:f", "division by zero")],
)  # fmt: skip
def test_rewards_that_cannot_be_loaded(own, spec, reason):
    (own.parent / "broken.py").write_text("1 / 0\n")
    (own.parent / "bye.py").write_text("import sys; sys.exit('bye')\n")
    with pytest.raises(UserError, match="--reward ") as caught:
        rewards.Own(spec.format(own=own, folder=own.parent))
    assert reason in str(caught.value)


def test_a_run_on_a_reward_of_ones_own(own, tmp_path):
    argv = [*ADDITION, "--steps", 1, "--reward", f"{own}:equals", "--format-reward", 0.0, "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *argv)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("greedy score ")
    for row in lines(tmp_path / "run" / "samples.jsonl"):
        answer = tasks.load("addition").train
        answer = next(e.answer for e in answer if e.id == row["prompt_id"])
        assert row["reward"] == (0.0 if row["truncated"] else row["completion"].count("=") - len(answer) / 2)


# ---------------------------------------------------------------- prompts, and where completions end


def test_system_prompt():
    tokenizer = tiny_models.characters()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    e = tasks.load("addition:1", tokenizer, "what is {prompt}?", "Be brief.").train[0]
    assert tokenizer.decode(e.ids) == f"system: Be brief.\nuser: what is {e.prompt}?\nassistant: "
    with pytest.raises(UserError, match="--system-prompt: the tokenizer has no chat template"):
        tasks.load("addition:1", tiny_models.characters(), None, "Be brief.")
    for template, said in (("{{ messages[-1]['content'] }}", "leaves the system's turn out"),
                           ("{{ raise_exception('no system') }}", "refuses the prompt: no system")):  # fmt: skip
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=said):
            tasks.load("addition:1", tokenizer, None, "Be brief.")
    with pytest.raises(UserError, match="--stop: an empty string would end every completion at once"):
        settings.resolve(grpo.Args(stop=("x", "")))


@pytest.mark.parametrize("stop", [("=",), ("=1", ":"), ("nowhere",), ("+",)])
def test_stop_strings_end_a_completion(tiny, stop):
    """The same tokens and log-probs as without, up to the first of the strings; '+' stands in every prompt, too."""
    tokenizer, policy, task = tiny
    prefixes, seeds = [e.ids for e in task.test[:12]], list(range(12))
    whole = engines.HF(policy, tokenizer).generate(prefixes, 3, 28, 1.0, seeds)
    cut = engines.HF(policy, tokenizer, stop=stop).generate(prefixes, 3, 28, 1.0, seeds)
    assert len(cut) == 36
    for (ids, logp, ended), (short, short_logp, short_ended) in zip(whole, cut):
        text = "".join(tokenizer.convert_ids_to_tokens(ids))
        ends = [text.find(s) + len(s) for s in stop if s in text]
        n = min(ends, default=len(ids))
        assert short == ids[:n] and short_ended == (True if ends else ended)
        assert short_logp == pytest.approx(logp[:n], abs=1e-5)


# ---------------------------------------------------------------- the rate


def rates(optimizer, n, **flags):
    schedules = gpu.make_schedules([optimizer], SimpleNamespace(**flags))
    out = []
    for _ in range(n):
        out.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    return out


def adamw(lr=2.0):
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr)


def test_rates():
    """Worked: two steps of warm-up in thirds, then 4 steps down to 0."""
    flags = dict(steps=6, warmup_steps=2)
    up = [2 / 3, 4 / 3]
    assert rates(adamw(), 7, lr_schedule="constant", **flags) == pytest.approx([*up, 2, 2, 2, 2, 2])
    assert rates(adamw(), 7, lr_schedule="linear", **flags) == pytest.approx([*up, 2, 1.5, 1, 0.5, 0])
    half = math.sqrt(0.5)
    assert rates(adamw(), 7, lr_schedule="cosine", **flags) == pytest.approx([*up, 2, 1 + half, 1, 1 - half, 0])
    assert gpu.make_schedules([adamw()], SimpleNamespace(steps=6, warmup_steps=0, lr_schedule="constant")) == []


def test_rates_of_torchao_optimizers():
    """Their rate is a tensor, which must not become its own base."""
    from torchao import optim

    optimizer = optim._AdamW([torch.nn.Parameter(torch.zeros(2))], lr=2.0)
    assert rates(optimizer, 4, steps=4, warmup_steps=0, lr_schedule="linear") == pytest.approx([2, 1.5, 1, 0.5])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_goes_on_after_a_resume(tmp_path, schedule):
    argv = [*ADDITION, "--steps", 4, "--warmup-steps", 1, "--lr-schedule", schedule, "--lr", "1e-3"]
    argv[argv.index("--checkpoint-every") + 1] = 2
    assert run(tmp_path, *argv, "--run-dir", tmp_path / "whole").code == 0
    rows = lines(tmp_path / "whole" / "metrics.jsonl")
    fall = dict(linear=[1, 2 / 3, 1 / 3], cosine=[1, 0.75, 0.25])[schedule]
    assert [r["lr"] for r in rows] == pytest.approx([5e-4, *(1e-3 * x for x in fall)])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(checkpoints(tmp_path / "again")[-1])
    done = run(tmp_path, "--resume", tmp_path / "again")
    assert done.code == 0 and "step-000002" in done.out, done.err
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "again"))


# ---------------------------------------------------------------- LoRA, devices


def lora(**flags):
    a = args(task="addition", lora_rank=4, **dict(lora_alpha=None, lora_targets="all-linear") | flags)
    return {n: m for n, m in models.load(a, torch.device("cpu")).lm.named_modules() if hasattr(m, "lora_A")}


def test_lora_alpha_and_targets():
    layers = lora()
    assert {m.scaling["default"] for m in layers.values()} == {2.0} and len(layers) == 2 * 7
    layers = lora(lora_alpha=1.0, lora_targets="q_proj,down_proj")
    assert {m.scaling["default"] for m in layers.values()} == {0.25}
    assert {n.rpartition(".")[2] for n in layers} == {"q_proj", "down_proj"} and len(layers) == 2 * 2
    with pytest.raises(UserError, match="--lora-targets query: the model's layers are .*o_proj, q_proj, up_proj"):
        lora(lora_targets="query")
    assert len(lora(lora_targets="q_proj, v_proj")) == 2 * 2
    for targets in ("q_proj,vproj", "lm_head", "embed_tokens"):
        with pytest.raises(UserError, match="--lora-targets"):
            lora(lora_targets=targets)


def test_a_resumed_run_keeps_its_device(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(script="grpo", args=dict(device="cpu"))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "init", lambda args, small: gpu.device())
    assert settings.prepare("grpo.py", grpo.Args(resume=str(tmp_path)))[2].type == "cpu"
    gpu.choose("auto")


def test_device(monkeypatch):
    assert not torch.cuda.is_available() and gpu.device().type == "cpu"
    with pytest.raises(UserError, match="--device cuda: torch finds none here; there is: auto, cpu"):
        gpu.choose("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.device().type == "cuda"
    gpu.choose("cpu")
    assert gpu.device().type == "cpu"
    gpu.choose("auto")
    assert gpu.device().type == "cuda"


@pytest.mark.parametrize("native, dtype, optimizer", [(True, "bfloat16", "adamw_sr"), (False, "float32", "adamw")])
def test_a_card_without_bfloat16(monkeypatch, capsys, tmp_path, native, dtype, optimizer):
    config = tiny_models.config()
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    found, _ = settings.resolve(grpo.Args(model=str(tmp_path), task="addition"))
    assert (found.dtype, found.optimizer) == (dtype, optimizer)
    assert ("no bfloat16 of its own" in capsys.readouterr().out) == (not native)
    given, _ = settings.resolve(grpo.Args(model=str(tmp_path), task="addition", dtype="bfloat16", optimizer="adamw_sr"))
    assert (given.dtype, given.optimizer) == ("bfloat16", "adamw_sr")


# ---------------------------------------------------------------- trackers, the hub

TRACKER = """
import json, pathlib
rows = []
init = lambda **kwargs: rows.append(["init", kwargs["name"], kwargs["config"]["steps"]])
log = lambda numbers, step: rows.append([step, sorted(numbers)])
finish = lambda: pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(rows))
"""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_tracker(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(TRACKER)
    argv = [*ADDITION, "--steps", 2, "--tracker", name, "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *argv, before=_see_folder)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert rows[0] == ["init", "run", 2] and [r[0] for r in rows[1:]] == [0, 1, 2, 2]
    assert rows[1][1] == ["greedy_accuracy"] and {"reward", "entropy", "time/step"} <= set(rows[2][1])


def _see_folder():
    sys.path.insert(0, ".")  # the child's working folder


def test_a_tracker_that_is_not_installed(tmp_path):
    done = run(tmp_path, *ADDITION, "--steps", 1, "--tracker", "wandb", "--run-dir", tmp_path / "run", before=_no_wandb)
    assert "--tracker wandb: it is not installed (pip install wandb)" in user_error(done)


def _no_wandb():
    sys.modules["wandb"] = None


def _hub():
    """A stand-in that writes down what is asked of it."""

    class Hub:
        def create_repo(self, repository, **kwargs):
            print("create", repository, kwargs)

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            files = [p.relative_to(folder_path).as_posix() for p in sorted(folder_path.rglob("*")) if p.is_file()]
            files = [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in ignore_patterns)]
            print("upload", repo_id, folder_path.name, *files)

    huggingface_hub.HfApi, huggingface_hub.get_token = Hub, lambda: "token"


def _hub_away():
    _hub()

    def fails(self, *args, **kwargs):
        raise ConnectionError("Name or service not known\nmore")

    huggingface_hub.HfApi.create_repo = fails


def test_push_to_hub(tmp_path):
    argv = [*ADDITION, "--steps", 1, "--push-to-hub", "me/model", "--run-dir", tmp_path / "run"]
    done = run(tmp_path, *argv, before=_hub)
    assert done.code == 0, done.err
    *_, sentence, create, upload = done.out.splitlines()
    assert sentence.startswith("greedy accuracy ") and create == "create me/model {'private': True, 'exist_ok': True}"
    assert upload.split()[:3] == ["upload", "me/model", "step-000001"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(upload.split()[3:])
    assert not [f for f in upload.split() if f == "manifest.json" or f.startswith("state")]


def test_a_hub_that_cannot_be_reached(tmp_path):
    argv = [*ADDITION, "--steps", 0, "--push-to-hub", "me/model", "--run-dir", tmp_path / "run"]
    said = user_error(run(tmp_path, *argv, before=_hub_away))
    where = tmp_path / "run" / "checkpoints" / "step-000000"
    assert said == f"--push-to-hub me/model: Name or service not known; the model is in {where}"
    assert (where / "model.safetensors").exists()


def test_what_could_not_be_pushed_is_said_first(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="--push-to-hub me/model: there is no token for the hub here"):
        checkpoint.may_push("me/model")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    checkpoint.may_push("me/model-1.5_b")
    for name in ("model", "me/", "me/a/b", "me/a b"):
        with pytest.raises(UserError, match="needs owner/name"):
            checkpoint.may_push(name)


# ---------------------------------------------------------------- sampled evaluations, waiting rollouts, samples by token


class Scripted:
    """An engine whose completions are written down: {n: token lists, one a completion}."""

    def __init__(self, completions):
        self.completions, self.calls = completions, []

    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        self.calls.append((n, temperature, seeds))
        return self.completions[n]

    def wake(self):
        pass

    sleep = wake


def test_avg_and_pass_at_n():
    """Worked: the second prompt has one right of four, the third one that is right but cut."""
    tokenizer = tiny_models.characters()
    right, wrong = (tokenizer(x)["input_ids"] for x in ("y", "n"))
    greedy = [(right, [0.0], True), (wrong, [0.0], True), (wrong, [0.0], True)]
    cut = (right, [0.0], False)
    sampled = [(right, [0.0], True)] * 4 + [(wrong, [0.0], True)] * 3 + [(right, [0.0], True)] + [cut] * 4
    engine = Scripted({1: greedy, 4: sampled})
    task = SimpleNamespace(test=[tasks.Example(i, "", "y", [5]) for i in range(9)])
    a = args(eval_prompts=3, eval_samples=4, eval_temperature=0.6)
    scorer = lambda texts, answers: (texts, [float(t == a) for t, a in zip(texts, answers)])  # noqa: E731
    found = rollout.evaluate(engine, scorer, tokenizer, task, a)
    assert found == {"greedy_accuracy": 1 / 3, "avg@4": 5 / 12, "pass@4": 2 / 3, "prompts": 3}
    assert [c[:2] for c in engine.calls] == [(1, 0.0), (4, 0.6)] and len(set(engine.calls[1][2])) == 3
    a.eval_samples = 0
    assert rollout.evaluate(engine, scorer, tokenizer, task, a) == {"greedy_accuracy": 1 / 3, "prompts": 3}


def test_rollouts_that_wait(tmp_path):
    """Step n trains on what step n - 2 sampled: the same prompts in the same order, older by 0, 1, 2, 2 steps."""
    argv = [*ADDITION, "--steps", 4, "--eval-samples", 2]
    for stale in (0, 2):
        done = run(tmp_path, *argv, "--stale", stale, "--run-dir", tmp_path / str(stale))
        assert done.code == 0, done.err
    fresh, stale = (lines(tmp_path / x / "metrics.jsonl") for x in "02")
    assert [r["staleness"] for r in fresh] == [0, 0, 0, 0] and [r["staleness"] for r in stale] == [0, 1, 2, 2]
    ids = [[s["prompt_id"] for s in lines(tmp_path / x / "samples.jsonl")] for x in "02"]
    assert ids[0] == ids[1] and len(set(ids[0])) == 4
    assert fresh[0]["approx_kl"] == stale[0]["approx_kl"] and fresh[2]["approx_kl"] < stale[2]["approx_kl"]
    assert set(lines(tmp_path / "0" / "evals.jsonl")[0]) == {"step", "greedy_accuracy", "avg@2", "pass@2", "prompts"}
    rows = lines(tmp_path / "0" / "samples.jsonl")
    for row in rows[:2]:  # of step 1, token by token
        assert "".join(row["tokens"]).removesuffix("<eos>") == row["completion"]
        assert {len(v) for v in row["columns"].values()} == {len(row["tokens"])} and set(row["columns"]) == {"logp", "adv"}
        assert all(x <= 0 for x in row["columns"]["logp"])
    assert not any("tokens" in row for row in rows[2:])


def test_the_noise_of_rollouts_that_wait_differs(tmp_path):
    """Three rollouts of one step, of prompts that come again at once: other completions each."""
    argv = [*ADDITION, "--steps", 1, "--stale", 2, "--prompts-per-step", 41, "--task", "addition:1", "--temperature", 2.0]
    assert run(tmp_path, *argv, "--run-dir", tmp_path / "run", before=_telling).code == 0
    seen = [json.loads(line) for line in (tmp_path / "seeds.jsonl").read_text().splitlines()]
    assert len(seen) == 3 and len({x for seeds in seen for x in seeds}) == 3 * 41


def _telling():
    real = rollout.collect

    def collect(engine, scorer, tokenizer, examples, args, step, **kwargs):
        seeds = [gpu.hash_seed(args.seed, step, i) for i in range(len(examples))]
        with open("seeds.jsonl", "a") as file:
            file.write(json.dumps(seeds) + "\n")
        return real(engine, scorer, tokenizer, examples, args, step, **kwargs)

    rollout.collect = collect


def test_stopped_while_the_queue_is_filled(tmp_path):
    """Before the first update the optimizer has no state, and a resumed run must not find one."""
    argv = [*ADDITION, "--steps", 2, "--stale", 2]
    assert run(tmp_path, *argv, "--run-dir", tmp_path / "whole").code == 0
    stopped = run(tmp_path, *argv, "--run-dir", tmp_path / "run", before=_stop_at_the_second_rollout)
    assert stopped.code == 0 and "stopped after step 0" in stopped.out, stopped.err
    assert run(tmp_path, "--resume", tmp_path / "run").code == 0
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "run"))


def _stop_at_the_second_rollout():
    real, calls = rollout.collect, []

    def collect(*args, **kwargs):
        calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 1 else None)
        return real(*args, **kwargs)

    rollout.collect = collect


def test_a_schedule_follows_steps_that_are_changed_and_ppos_critic(tmp_path):
    """Resumed with twice the steps the rate is that of the longer run; the critic's falls with the policy's."""
    rates = ["--lr-schedule", "linear", "--lr", "1e-3", "--value-lr", "4e-3"]
    argv = [*ADDITION, "--steps", 2, *rates, "--run-dir", tmp_path / "run"]
    ppo = ROOT / "algos" / "ppo.py"
    assert run(tmp_path, *argv, script=ppo).code == 0
    done = run(tmp_path, "--resume", tmp_path / "run", "--steps", 4, script=ppo)
    assert done.code == 0, done.err
    assert [r["lr"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])
    saved = contents(checkpoints(tmp_path / "run")[-1])
    assert [s["base_lrs"] for s in saved["schedules"]] == [[1e-3], [4e-3]]
    assert {s["last_epoch"] for s in saved["schedules"]} == {4}


def test_a_rank_without_prompts(monkeypatch):
    """Fewer held-out prompts than processes."""
    tokenizer = tiny_models.characters()
    monkeypatch.setattr(gpu, "rank", lambda: 1)
    monkeypatch.setattr(gpu, "world", lambda: 2)
    monkeypatch.setattr(gpu, "total", lambda x, *_: x)
    engine = Scripted({1: [], 2: []})
    task = SimpleNamespace(test=[tasks.Example(0, "", "y", [5])])
    scorer = lambda texts, answers: (texts, [])  # noqa: E731
    a = args(eval_prompts=1, eval_samples=2, eval_temperature=1.0)
    found = rollout.evaluate(engine, scorer, tokenizer, task, a)
    assert found == {"greedy_accuracy": 0.0, "avg@2": 0.0, "pass@2": 0.0, "prompts": 1}


# ---------------------------------------------------------------- --help


def helped(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"algos/{module.__name__.rpartition('.')[2]}.py", "--help"])
    with pytest.raises(SystemExit):
        settings.parse(module.Args, module.__doc__)
    return re.sub(r"[\s\u2502]+", " ", capsys.readouterr().out)


def test_help_says_what_the_method_is_and_what_its_presets_are(monkeypatch, capsys):
    """The method's own flags stand first."""
    from algos import dapo, dpo

    text = helped(dapo, monkeypatch, capsys)
    assert "DAPO: Decoupled Clip and Dynamic sAmpling" in text and "Idea: four repairs of GRPO" in text
    assert "Family:" not in text
    assert text.index("dapo options") < text.index("--eps-low") < text.index("shared options") < text.index("--model")
    for line in ("(default: route for tiny, else gsm8k)", "(default: 120 for tiny, else 200)", "per prompt (default: 8)",
                 "(default: 0.0001 for tiny, else 1e-06)", "Section 4.1) (default: 0.28)"):  # fmt: skip
        assert line in text
    text = helped(dpo, monkeypatch, capsys)
    assert "(default: letters for tiny, else trl-lib/ultrafeedback_binarized)" in text and "else 5e-07)" in text


def test_what_is_typed_becomes_args(monkeypatch):
    argv = "grpo.py --eps 0.3 --steps 7 --stop a b --gradient-checkpointing True --model x/y --lr 1e-5".split()
    monkeypatch.setattr("sys.argv", argv)
    found = settings.parse(grpo.Args, grpo.__doc__)
    given = dict(eps=0.3, steps=7, stop=("a", "b"), gradient_checkpointing=True, model="x/y", lr=1e-5)
    assert type(found) is grpo.Args and found == grpo.Args(**given)


@pytest.mark.parametrize("script, flag", [(spo, "branches"), (rlfr, "timesteps"), (rlfr, "layers")])
def test_a_list_of_numbers_is_not_empty(script, flag):
    """--branches with nothing behind it. What may be empty is: no string that ends a completion, no hidden layer."""
    with pytest.raises(UserError, match=f"--{flag} needs a number at least"):
        settings.resolve(script.Args(**{flag: ()}))
    settings.resolve(script.Args(stop=()))
