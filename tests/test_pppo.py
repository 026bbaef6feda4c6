"""PPPO's worked numbers, prefixes that are continued by an engine, rewards by hand, the growth of eta, and what a run logs."""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from algos import dapo, pppo
from common import engines, gpu, models, rollout, tasks
from common.batch import collate
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
LENGTHS = torch.tensor([7, 10, 3])
MASK = torch.arange(10) < LENGTHS[:, None]
REWARDS = torch.tensor([[5.0, 0.0, 2.0]])


def loss(mask, weights):
    """Ratios (1.1, 1.35 | 0.7, 1.0, 1.3 | 0.9) on the tokens of the prefixes, 1.2 on all others."""
    ratio = torch.full((3, 10), 1.2)
    ratio[0, :2], ratio[1, :3], ratio[2, 0] = torch.tensor([1.1, 1.35]), torch.tensor([0.7, 1.0, 1.3]), 0.9
    logp = ratio.log().requires_grad_()
    adv = pppo.advantages(REWARDS, pppo.Args()).view(3, 1).expand(3, 10)
    objective, _ = pppo.surrogate(logp, torch.zeros(3, 10), adv, mask, pppo.Args())
    value = -(objective * weights)[mask].sum()
    value.backward()
    return value.item(), logp.grad


def test_worked_numbers():
    adv = pppo.advantages(REWARDS, pppo.Args())
    torch.testing.assert_close(adv, torch.tensor([[1.059625, -0.927172, -0.132453]]), **CLOSE)
    chosen = pppo.chosen(MASK, 0.35, pppo.Args())
    assert chosen.sum(1).tolist() == [2, 3, 1] == pppo.prefix_lengths(LENGTHS, 0.35).tolist()
    value, gradient = loss(chosen, pppo.token_weights(chosen, pppo.Args(), MASK))
    assert value == pytest.approx(0.023577, abs=1e-6)
    assert gradient[0, 0].item() == pytest.approx(-0.058279, abs=1e-6)
    assert gradient[0, 1] == 0 and gradient[1, 0] == 0 and not gradient[~chosen].any()
    assert gradient[1, 1:3].tolist() == pytest.approx([0.927172 / 20, 1.3 * 0.927172 / 20], abs=1e-6)
    # Over the six tokens of the prefixes it would be 20/6 of that, which is another method.
    assert loss(chosen, pppo.token_weights(chosen, pppo.Args(), chosen))[0] == pytest.approx(0.078589, abs=1e-6)


def test_the_whole_completion_is_dapo():
    everything = pppo.chosen(MASK, 1.0, pppo.Args())
    assert torch.equal(everything, MASK)
    weights = pppo.token_weights(everything, pppo.Args(), MASK)
    torch.testing.assert_close(weights, dapo.token_weights(MASK, dapo.Args()))


@pytest.mark.parametrize("eta", [0.05, 0.15, 0.2, 0.25, 0.3, 0.35])
def test_lengths_of_prefixes_are_those_of_exact_arithmetic(eta):
    """0.35 * 20 is 7, and not the 6.999 that floating point has; nothing of an empty completion, one token at least else."""
    n = torch.arange(0, 20001)
    hundredths = round(100 * eta)
    assert pppo.prefix_lengths(n, eta).tolist() == [min(i, max(1, hundredths * i // 100)) for i in range(20001)]


def test_the_control_takes_as_many_from_the_end():
    last = pppo.chosen(MASK, 0.35, pppo.Args(part="last"))
    assert last.sum(1).tolist() == [2, 3, 1]
    assert last[0].tolist() == [False] * 5 + [True] * 2 + [False] * 3 and last[2, 2]


def test_rewards_are_counts_of_right_continuations():
    """The third completion is a single token, its end: what came behind it would be no continuation of it."""
    batch = SimpleNamespace(mask=MASK.clone(), reward=torch.tensor([1.0, 0.0, 1.0]), accuracy=torch.tensor([1.0, 0.0, 1.0]))
    batch.mask[2] = torch.arange(10) < 1
    again = torch.tensor([[1.0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert pppo.prefix_rewards(batch, [[4, 5], [4, 5, 6], [2]], again).tolist() == [4, 1, 5]
    all_right = pppo.prefix_rewards(batch, [[4, 5], [4, 5, 6], [2]], torch.ones(3, 8))
    assert all_right.tolist() == [9, 8, 9]


def test_a_shortened_batch():
    batch = collate([([1, 2], [4, 5, 6, 7, 8, 9, 2]), ([1, 2, 3], list(range(4, 14))), ([1], [4, 5, 2])])
    for part, ends in dict(first=[2, 3, 1], last=[7, 10, 3]).items():
        mine = dataclasses.replace(batch, trained=pppo.chosen(batch.mask, 0.35, pppo.Args(part=part)), columns={})
        pppo.shorten(mine)
        assert mine.mask.sum(1).tolist() == ends and mine.trained.sum(1).tolist() == [2, 3, 1]
        assert mine.attention_mask.sum(1).tolist() == [2 + ends[0], 3 + ends[1], 1 + ends[2]]
        assert torch.equal(mine.columns["completion"], batch.mask) and not (mine.trained & ~mine.mask).any()
        assert batch.mask.sum(1).tolist() == [7, 10, 3]  # the batch that it was cut from is as it was
    assert pppo.prefixes(batch, 0.35) == [[4, 5], [4, 5, 6], [4]]


def test_eta_grows_where_accuracy_does_not():
    args = pppo.Args(look=2, patience=2)
    state = dict(eta=args.eta, best=float("-inf"), stalled=0, seen=[])
    etas = []
    for accuracy in [0.125, 0.25, 0.25, 0.5, 0.375, 0.375, 0.125, 0.125, 0.375, 0.375, 0.375, 0.375]:
        pppo.retention(state, accuracy, args)
        etas.append(round(state["eta"], 6))
    assert etas == [0.15] * 7 + [0.2] * 4 + [0.25]  # a look as good as the best is no gain
    for _ in range(60):
        pppo.retention(state, 0.0, args)
    assert state["eta"] == pytest.approx(0.35) and len(state["seen"]) == 0
    for _ in range(4):
        pppo.retention(state, 0.9, args)
    assert state["eta"] == pytest.approx(0.35) and state["best"] == 0.9
    state = dict(eta=args.eta, best=float("-inf"), stalled=0, seen=[])  # a score of one's own may be negative
    for accuracy in range(-20, 0):
        pppo.retention(state, float(accuracy), args)
    assert state["eta"] == args.eta
    state = dict(eta=0.5, best=1.0, stalled=0, seen=[])  # above its largest value from the start: it stays
    for _ in range(4):
        pppo.retention(state, 0.0, args)
    assert state["eta"] == 0.5


def test_a_greedy_continuation_is_the_rest(tiny):
    """What the engine makes of a completion's own prefix, for every length of it; and it is the whole that is scored."""
    args = SimpleNamespace(model=str(tiny), task="addition", dtype="float32", lora_rank=0, gradient_checkpointing=False,
                           temperature=1e-6, seed=0, group_size=1, max_new_tokens=28, format_reward=0.0)  # fmt: skip
    tokenizer = models.load_tokenizer(args)
    engine = engines.HF(models.load(args, gpu.device()), tokenizer)
    examples = tasks.load("addition", tokenizer).test[:4]
    asked = [e.ids for e in examples]
    whole = [y for y, _, _ in engine.generate(asked, 1, 28, 0.0, [0] * 4)]
    n = min(map(len, whole))
    for k in range(1, n):
        given = [y[:k] for y in whole]
        rest = engine.generate([p + g for p, g in zip(asked, given)], 1, [28 - k] * 4, 0.0, [0] * 4)
        assert [g + y for g, (y, _, _) in zip(given, rest)] == whole
    answers = [tokenizer.decode(y, skip_special_tokens=True) for y in whole]

    def scorer(texts, gold):
        return texts, [float(t == answers[i // 2]) for i, t in enumerate(texts)]

    given = [y[:2] for y in whole]
    batch = rollout.collect(engine, scorer, tokenizer, examples, args, 0, given, 2)
    assert batch.accuracy.tolist() == [1.0] * 8 and batch.texts[0] == answers[0]
    assert not batch.trained[:, :2].any()


def test_a_run_trains_on_prefixes(tiny, tmp_path):
    """288 completions for 32 first ones; about a seventh of their tokens is trained on; lengths are those of whole completions.
    With no continuations as many as DAPO, and with all tokens its very numbers."""
    argv = "--task addition --steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    argv += "--max-gen-batches 0 --overlong-weight 0".split()
    runs = dict(prefix=[], last=["--part", "last", "--continuations", "0"], whole=["--eta", "1", "--continuations", "0"])
    for name, more in (runs | dict(dapo=[])).items():
        script = ROOT / "algos" / ("dapo.py" if name == "dapo" else "pppo.py")
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=script)
        assert done.code == 0, done.err
    found = {name: lines(tmp_path / name / "metrics.jsonl") for name in [*runs, "dapo"]}
    assert found["prefix"][0]["length"] == found["last"][0]["length"] == found["dapo"][0]["length"] > 5
    assert found["prefix"][0]["generated"] == 288 and found["last"][0]["generated"] == 32
    assert all(0.05 < r["trained"] <= 0.2 and r["eta"] == 0.15 for r in found["prefix"] + found["last"])
    assert found["prefix"][0]["reward"] > found["prefix"][0]["accuracy"] and found["prefix"][0]["grad_norm"] > 0
    timeless = [{k: v for k, v in r.items() if not k.startswith(("time", "tokens", "trained", "eta"))} for r in found["whole"]]
    assert timeless == [{k: v for k, v in r.items() if k in timeless[0]} for r in found["dapo"]]
    row = lines(tmp_path / "prefix" / "samples.jsonl")[0]
    assert "".join(row["tokens"]).startswith(row["completion"]) and sum(row["columns"]["completion"]) == len(row["tokens"])


def test_eta_grows_in_a_run_and_continuations_begin_with_their_prefixes(tmp_path, monkeypatch):
    """With a look at every rollout and a rate of 0 accuracy gains nothing for long."""
    collect, seen = rollout.collect, []

    @functools.wraps(collect)
    def watched(engine, scorer, tokenizer, examples, args, step, given=None, n=None, **more):
        batch = collect(engine, scorer, tokenizer, examples, args, step, given, n, **more)
        if n:
            begins = [y[: len(g)] for g, y in zip(given, batch.ids[::n, -batch.mask.shape[1] :].tolist())]
            seen.append((begins == given, max(map(len, given))))
        return batch

    monkeypatch.setattr(rollout, "collect", watched)
    small = dict(task="addition", steps=6, prompts_per_step=4, group_size=4, eval_prompts=4, minibatches=1, checkpoint_every=0)
    pppo.train(pppo.Args(**small, lr=0.0, look=1, patience=1, eta_step=0.3, eta_max=0.9, max_gen_batches=0,
                         run_dir=str(tmp_path / "run")))  # fmt: skip
    etas = [r["eta"] for r in lines(tmp_path / "run" / "metrics.jsonl")]
    assert etas[0] == 0.15 and etas[-1] >= 0.45 and etas == sorted(etas)
    assert len(seen) == 6 and all(same for same, _ in seen) and seen[0][1] <= 5 < seen[-1][1]


QUARTER = """
import zlib

def check(text, answer):  # right is about every fourth text, whatever a model has learnt
    return float(zlib.crc32(text.encode()) % 4 == 0)
"""


def test_the_filter_is_on_the_rewards(tiny, tmp_path):
    """Groups that are all wrong are kept where their beginnings differ."""
    (tmp_path / "mine.py").write_text(QUARTER)
    argv = ["--model", tiny, "--reward", f"{tmp_path}/mine.py:check", "--prompt-template", "{prompt}", "--task", "addition"]
    argv += "--steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    done = run(tmp_path, *argv, "--max-gen-batches", "1", "--run-dir", tmp_path / "run", script=ROOT / "algos" / "pppo.py")
    assert done.code == 0, done.err
    assert min(r["informative_groups"] for r in lines(tmp_path / "run" / "metrics.jsonl")) < 1
