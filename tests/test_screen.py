"""What the screen says: when nothing is learnt, what was sampled, what went wrong, once and without a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from algos import grpo
from common import UserError, _first_to_say, gpu, models, rollout, runlog, samples, settings, tables
from common.worlds import tiny as worlds
from tests.helpers import GRPO, lines, run, tiny

__all__ = ["tiny"]


class Bar:
    def __init__(self):
        self.lines = []

    def write(self, line):
        self.lines.append(line)


def batch(rewards, texts, gold, prompts):
    """Completions of a group each, as runlog sees them."""
    tokenizer = worlds.characters()
    G = len(texts) // len(prompts)
    ids = [tokenizer(prompts[i // G])["input_ids"] + tokenizer(t)["input_ids"] for i, t in enumerate(texts)]
    S, T = max(map(len, ids)), max(map(len, texts))
    whole, seen = torch.zeros(len(ids), S, dtype=torch.int64), torch.zeros(len(ids), S, dtype=torch.bool)
    for i, row in enumerate(ids):  # prompts end where the last T begin
        at = S - T - len(prompts[i // G])
        whole[i, at : at + len(row)], seen[i, at : at + len(row)] = torch.tensor(row), True
    n = len(texts)
    return tokenizer, SimpleNamespace(
        ids=whole, attention_mask=seen, mask=seen[:, S - T :], texts=texts, answers=texts, gold=gold, group=G,
        reward=torch.tensor(rewards), prompt_id=torch.arange(n), truncated=torch.zeros(n).bool(), old_logp=None, adv=None,
        columns={},
    )  # fmt: skip


def test_one_right_and_one_wrong_where_there_are_both():
    """Of the first group that has both, with the right answer, unless the prompt says it."""
    tokenizer, b = batch([0.0, 0.0, 0.0, 0.5, 1.0, 0.5], list("abcdef"), [*"444", *"777"], ["2+2=", "3+4="])
    found = list(samples.contrast(tokenizer, b))
    assert [line.split("reward ")[1] for line in found] == ["0.5  '3+4=' -> 'd'  (right: 7)", "1.0  '3+4=' -> 'e'  (right: 7)"]
    tokenizer, b = batch([0.0, 0.0, 0.0, 0.0], list("abcd"), [*"22", *"99"], ["2?", "9?"])
    (line,) = samples.contrast(tokenizer, b)  # all alike: one is enough, and the prompt holds the answer
    assert line.split("reward ")[1] == "0.0  '2?' -> 'a'"


def test_a_sample_has_its_prompt_and_the_right_answer():
    tokenizer, b = batch([0.0, 1.0], ["ab", "c"], ["7", "7"], ["3+4="])
    b.old_logp = torch.tensor([[-0.123456, -1.0], [-2.0, 0.0]])
    b.columns = dict(entropy=torch.tensor([[0.25, 0.5], [1.0, 9.0]]), score=torch.tensor([1.0, 2.0]))
    row = dict(prompt_id=1, prompt="3+4=", completion="c", answer="c", right="7", reward=1.0, truncated=False)
    assert samples.record(tokenizer, b, 1) == row
    assert samples.record(tokenizer, b, 1, tokens=True) == row | dict(tokens=["c"], columns=dict(logp=[-2.0], entropy=[1.0]))
    first = samples.record(tokenizer, b, 0, tokens=True)
    assert first["tokens"] == ["a", "b"] and first["columns"] == dict(logp=[-0.1235, -1.0], entropy=[0.25, 0.5])


def idle(largest, group=2):
    """What a run says after rollouts with these largest and least advantages, or these and their negatives."""
    r = SimpleNamespace(idle=0, bar=Bar(), main=True, aloud=False, times={}, state=dict(step=5), measure="accuracy")
    r.tokenizer = None
    r.args, r.write, r.samples = grpo.Args(max_new_tokens=28), lambda *_: None, SimpleNamespace(write=lambda _: None)
    told = []
    for i, adv in enumerate(largest):
        empty = SimpleNamespace(mask=torch.zeros(1, 1), texts=[], group=group)
        high, low = adv if isinstance(adv, tuple) else (adv, -adv)
        runlog.Run.log(r, dict(adv_max=high, adv_min=low, informative_groups=0.0, truncated=0.25), empty)
        told += [(i, line) for line in r.bar.lines[len(told) :]]
    return told


def test_a_run_that_cannot_learn_says_so():
    """Once, after five rollouts in a row; and again when it comes again."""
    ((at, line),) = idle([0.0] * 9)
    assert at == 4 and "nothing is learnt; 25% of the last completions were cut at --max-new-tokens 28" in line
    assert [at for at, _ in idle([0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0, 0])] == [9]
    assert idle([0.0] * 4 + [0.5] + [0.0] * 4) == [] == idle([0.0] * 9, group=1)
    assert idle([(-1.0, -1.0), (0.0, -1.0), (0.5, 0.0)] * 3) == []  # of wrong ones alone, of the worse half, of the better


@pytest.mark.parametrize("scores, ended, found", [
    ([1.0, 1.0, 0.0], [True, False, True], [1.0, 0.0, 0.0]),
    ([-4.0, 3.0, 2.0], [True, False, True], [-4.0, -4.0, 2.0]),
    ([-1.0, -5.0, 2.0], [True, False, True], [-1.0, -5.0, 2.0]),
    ([0.5, -0.5, 2.0], [False, False, False], [-0.5, -0.5, -0.5]), ([], [], []),
])  # fmt: skip
def test_a_completion_that_was_cut_beats_none(scores, ended, found):
    """0 is a wrong one's score only where no score is negative."""
    out = rollout._unless_cut(torch.tensor(scores), torch.tensor(ended, dtype=torch.bool))
    assert out.tolist() == found


def test_the_worst_is_that_of_all_processes(monkeypatch):
    monkeypatch.setattr(gpu, "maximum", lambda x: max(x, 6.0))
    assert rollout._unless_cut(torch.tensor([1.0, 2.0]), torch.tensor([True, False])).tolist() == [1.0, -6.0]


# ---------------------------------------------------------------- what a model is


def test_a_tiny_model_is_known_by_what_it_is(tiny, tmp_path):
    """Its checkpoint, its run's folder: the tiny preset and its own task; a real model of that size: the other."""
    args, _ = settings.resolve(grpo.Args(model=tiny))
    assert (args.task, args.lr, args.max_new_tokens, args.dtype, args.steps) == ("addition:2", 1e-4, 28, "float32", 120)
    folder = tmp_path / "run" / "checkpoints" / "step-000007"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tiny)
    assert settings.resolve(grpo.Args(model=str(tmp_path / "run")))[0].task == "addition:2"
    assert settings.resolve(grpo.Args(model=tiny, task="route"))[0].task == "route"
    plain = tmp_path / "plain"
    plain.mkdir()
    config = json.loads(open(f"{tiny}/config.json").read())
    (plain / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "warm_started_on"}))
    args, _ = settings.resolve(grpo.Args(model=str(plain)))
    assert (args.task, args.dtype, args.micro_batch_tokens) == ("gsm8k", "bfloat16", 8192)


def test_a_moved_model_folder(tiny, tmp_path):
    """A run whose model's folder was moved goes on from where it now is."""
    here, there = tmp_path / "here", tmp_path / "there"
    subprocess.run(["cp", "-r", tiny, here], check=True)
    argv = "--prompts-per-step 4 --group-size 4 --minibatches 2 --eval-prompts 8 --steps".split()
    assert run(tmp_path, "--model", here, *argv, 1, "--run-dir", tmp_path / "run").code == 0
    here.rename(there)
    lost = run(tmp_path, "--resume", tmp_path / "run", "--steps", 2)
    assert lost.code == 2 and "no such folder" in lost.err
    found = run(tmp_path, "--resume", tmp_path / "run", "--steps", 2, "--model", there)
    assert found.code == 0, found.err
    assert [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


# ---------------------------------------------------------------- once, and without a traceback


def test_an_error_of_several_processes_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert _first_to_say("a") and _first_to_say("a")  # without a launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert [_first_to_say(word) for word in "aabab"] == [True, False, True, False, False]


def test_a_mistake_under_torchrun_is_one_line(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | dict(OMP_NUM_THREADS="1", TMPDIR=str(tmp_path))
    done = subprocess.run([*launcher, str(GRPO), "--task", "adition"], capture_output=True, text=True, env=env)
    assert done.stderr.count("error: unknown task 'adition'") == 1


def test_ctrl_c_before_the_run(tmp_path):
    """In the warm start: one word, and what a shell takes for a Ctrl-C."""
    env = os.environ | dict(TOKENPO_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, str(GRPO)], cwd=tmp_path, env=env, **streams)
    while "making a tiny model for route" not in child.stdout.readline():
        assert child.poll() is None
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert said == "stopped\n" and child.returncode == -signal.SIGINT


def test_an_unknown_repository_is_answered_without_retries(monkeypatch):
    import huggingface_hub

    class Hub:
        def repo_info(self, repository, repo_type, timeout):
            asked.append((repository, repo_type))
            raise error

    asked, response = [], SimpleNamespace(headers={}, request=None, status_code=404)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    error = huggingface_hub.errors.RepositoryNotFoundError("not there", response=response)
    tables.ask_hub("a/b", "dataset")
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and asked == [("a/b", "dataset")]
    error = OSError("no network")
    started = time.monotonic()
    with pytest.raises(UserError, match="nobody/nothing could not be had from the hub"):
        models.architecture(grpo.Args(model="nobody/nothing"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE and time.monotonic() - started < 5


def test_every_step_draws_anew(monkeypatch):
    """Seeds of the sampling are of (seed, step, the prompt's place over all ranks), and of nothing else."""
    told = []

    class Engine:
        device, name = torch.device("cpu"), "hf"

        def generate(self, prefixes, n, budgets, temperature, seeds):
            told.append(seeds)
            return [([5, 1], [0.0, 0.0], True)] * (len(prefixes) * n)

    def scorer(texts, answers):
        return texts, [0.0] * len(texts)

    examples = [SimpleNamespace(id=i, ids=[4], answer="x") for i in range(3)]
    for rank, seed, step in ((0, 1, 0), (0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 0)):
        monkeypatch.setattr(gpu, "rank", lambda rank=rank: rank)
        a = grpo.Args(seed=seed, group_size=2, max_new_tokens=4)
        rollout.collect(Engine(), scorer, worlds.characters(), examples, a, step)
    assert told[0] == told[4] and len({s for some in told[:4] for s in some}) == 12
    assert told[2] == [gpu.hash_seed(1, 1, 3 + i) for i in range(3)]


@pytest.mark.parametrize("budget, most", [(None, [4, 1, 3]), (2, [2, 1, 2])])
def test_what_is_given_counts_towards_the_longest(budget, most):
    told = []

    class Engine:
        device = torch.device("cpu")

        def generate(self, prefixes, n, budgets, temperature, seeds):
            told.append((prefixes, budgets))
            return [([1], [0.0], True)] * (len(prefixes) * n)

    examples = [SimpleNamespace(id=i, ids=[4], answer="x") for i in range(3)]
    given, a = [[], [5, 6, 7], [8]], grpo.Args(group_size=2, max_new_tokens=4)
    scorer = lambda texts, _: (texts, [0.0] * len(texts))  # noqa: E731
    b = rollout.collect(Engine(), scorer, worlds.characters(), examples, a, 1, given, budget=budget)
    assert told == [([[4], [4, 5, 6, 7], [4, 8]], most)]
    assert b.trained.sum(1).tolist() == [1] * 6 and b.mask.sum(1).tolist() == [1, 1, 4, 4, 2, 2]


def test_two_runs_do_not_share_a_folder(tiny, tmp_path):
    from tests.helpers import logged, start

    argv = "--prompts-per-step 4 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    first = start(tmp_path, "--model", tiny, *argv, "--steps", 200, "--run-dir", tmp_path / "run")
    assert first.until(lambda: logged(tmp_path / "run") >= 1)
    second = run(tmp_path, "--model", tiny, *argv, "--steps", 1, "--resume", tmp_path / "run")
    assert second.code == 2 and "another process is running in the folder" in second.err
    os.kill(first.pid, signal.SIGKILL)
    first.process.join()
    third = run(tmp_path, "--resume", tmp_path / "run", "--steps", 1)
    assert third.code == 0, third.err  # a lock does not outlive its process
