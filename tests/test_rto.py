"""RTO's worked example, its limits, its first stage, and the script run as a user runs it."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from algos import dpo, ppo, rto
from common import models, pairs, tasks
from common.batch import collate
from common.worlds import tiny
from tests import test_gpu
from tests.helpers import ROOT, checkpoints, die_at, lines, outcome, run, same, user_error

RTO = ROOT / "algos" / "rto.py"
CLOSE = dict(rtol=0, atol=1e-6)
NAN = float("nan")
DPO_LOGP, REF_LOGP, OLD_LOGP = (torch.tensor([row]) for row in ([-0.2, -2.4, -0.9], [-0.7, -1.0, -0.4], [-0.5, -1.2, -0.3]))
VALUES, SCORE, MASK = torch.tensor([[0.2, 0.1, 0.3]]), torch.tensor([1.5]), torch.ones(1, 3).bool()


def settings(**changes):
    return rto.Args(**dict(beta=0.01, dpo_scale=0.05, dpo_clip=0.05, score_clip=10.0) | changes)


def rewards(score=SCORE, mask=MASK, **changes):
    return rto.token_rewards(score, OLD_LOGP, REF_LOGP, DPO_LOGP - REF_LOGP, mask, settings(**changes))


# ---------------------------------------------------------------- the objective


def test_worked_example():
    term = rto.dpo_rewards(DPO_LOGP - REF_LOGP, MASK, settings())
    torch.testing.assert_close(term, torch.tensor([[0.025, -0.05, -0.025]]), **CLOSE)
    clipped_first = 0.05 * (DPO_LOGP - REF_LOGP).clamp(-0.05, 0.05)
    torch.testing.assert_close(clipped_first, torch.tensor([[0.0025, -0.0025, -0.0025]]), **CLOSE)  # the wrong order
    assert (term - clipped_first).abs().min() > 0.02
    torch.testing.assert_close(rewards(), torch.tensor([[0.023, -0.048, 1.474]]), **CLOSE)
    adv, returns = rto.advantages(rewards(), VALUES, MASK, settings())
    unwhitened = rto.gae(rewards(), VALUES, MASK, settings())
    torch.testing.assert_close(unwhitened, torch.tensor([[1.126935, 1.2673, 1.174]]), **CLOSE)
    torch.testing.assert_close(returns, torch.tensor([[1.326935, 1.3673, 1.474]]), **CLOSE)
    biased = adv * math.sqrt(3 / 2)  # the authors divide by n, PPO by n - 1
    torch.testing.assert_close(biased, torch.tensor([[-1.071075, 1.335287, -0.264211]]), rtol=0, atol=1e-5)


def test_no_clip():
    term = rto.dpo_rewards(DPO_LOGP - REF_LOGP, MASK, settings(dpo_clip=0.0))
    torch.testing.assert_close(term, torch.tensor([[0.025, -0.07, -0.025]]), **CLOSE)


def test_dpo_scale_zero_is_ppo():
    plain = ppo.token_rewards(SCORE, OLD_LOGP, REF_LOGP, MASK, ppo.Args(beta=0.01))
    assert torch.equal(rewards(dpo_scale=0.0), plain) and not torch.equal(rewards(), plain)


def test_the_kl_penalty_is_of_the_sampling_policy():
    torch.testing.assert_close(rewards(beta=0.0) - rewards(beta=1.0), OLD_LOGP - REF_LOGP, **CLOSE)


@pytest.mark.parametrize("clip, expected", [(10.0, 10.0), (1.0, 1.0), (0.0, 16.0)])
def test_score_clip(clip, expected):
    for sign in (1, -1):
        both = rewards(score=sign * torch.tensor([16.0]), score_clip=clip, beta=0.0, dpo_scale=0.0)
        torch.testing.assert_close(both, torch.tensor([[0.0, 0.0, sign * expected]]), **CLOSE)


@pytest.mark.parametrize("shape, expected", [("token", [0.3, -0.5, 1.2]), ("last", [0.0, 0.0, 1.0]), ("rs", [0.3, -0.5, 1.7])])
def test_every_shape(shape, expected):
    """DPO terms 0.3, -0.5 (clipped from -0.84), -0.3: they sum to -0.5."""
    found = rewards(shape=shape, beta=0.0, dpo_scale=0.6, dpo_clip=0.5)
    torch.testing.assert_close(found, torch.tensor([expected]), **CLOSE)
    assert found.sum().item() == pytest.approx(1.5 if shape == "rs" else 1.0, abs=1e-6)


def test_rs_takes_the_sum_off_the_clipped_score():
    found = rewards(score=torch.tensor([16.0]), shape="rs", beta=0.0, dpo_scale=0.6, dpo_clip=0.5)
    assert found.sum().item() == pytest.approx(10.0, abs=1e-6)


@pytest.mark.parametrize("shape", ["token", "last", "rs"])
def test_ragged_and_empty_rows(shape):
    """Garbage outside the mask changes nothing; the score stands on the last valid token; an empty row gets nothing."""
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    args, score = settings(shape=shape), torch.tensor([1.0, 2.0, 3.0])
    logps = [x.expand(3, 3) for x in (OLD_LOGP, REF_LOGP, DPO_LOGP - REF_LOGP)]
    found = rto.token_rewards(score, *logps, mask, args)
    short = rto.token_rewards(score[:1], *(x[:1, :2] for x in logps), mask[:1, :2], args)
    torch.testing.assert_close(found[:1, :2], short, **CLOSE)
    assert found[0, 1] > 0.9 and found[2, 2] > 2.9 and not found[~mask].any()
    for i in range(3):
        for garbage in (NAN, float("inf")):
            dirty = [torch.where(mask, x, torch.tensor(garbage)) if j == i else x for j, x in enumerate(logps)]
            assert torch.equal(rto.token_rewards(score, *dirty, mask, args), found)


def test_stage_1_is_dpo():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 4])[:, None]
    logp, ref_logp = -torch.rand(2, 4, 5, generator=g).where(mask, NAN)
    found = []
    for losses in (
        lambda x: rto.dpo_loss(x, ref_logp, mask, rto.Args(dpo_beta=0.7)),
        lambda x: dpo.pair_loss(x, ref_logp, mask, dpo.Args(beta=0.7))[0],
        lambda x: rto.dpo_loss(x, ref_logp, mask, rto.Args(dpo_beta=1.0)),
    ):
        leaf = logp.clone().requires_grad_()
        loss = losses(leaf)
        loss.sum().backward()
        found.append((loss, leaf.grad))
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    assert (found[0][0] - found[2][0]).abs().min() > 1e-3


# ---------------------------------------------------------------- runs

STAGE_1 = dict(dpo_steps=3, dpo_beta=1.0, dpo_lr=1e-3, dpo_pairs_per_step=8)
SMALL = "--steps 4 --prompts-per-step 4 --eval-prompts 8 --checkpoint-every 2".split()


def flags(**changes):
    return [x for k, v in (STAGE_1 | changes).items() for x in (f"--{k.replace('_', '-')}", v)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    tiny.warm_start(tasks.load("letters"))
    folder = tmp_path_factory.mktemp("rto")
    done = run(folder, *SMALL, *flags(), "--run-dir", folder / "run", script=RTO)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("greedy score ")  # a gold reward is no accuracy
    return folder / "run"


def test_what_a_run_logs(whole):
    rows = lines(whole / "metrics.jsonl")
    assert len(rows) == 4 and rows[0]["ref_kl"] == pytest.approx(0, abs=1e-6) and abs(rows[3]["ref_kl"]) > 1e-4
    assert all(-0.3 <= r["dpo_term"] <= 0.3 and 0 <= r["dpo_clipped"] < 1 and "explained_variance" in r for r in rows)
    assert any(r["dpo_clipped"] for r in rows)
    for r in rows:  # sum and mean of the same terms
        assert r["dpo_sum"] == pytest.approx(r["dpo_term"] * r["length"], rel=1e-5)
    samples = [r["reward"] for r in lines(whole / "samples.jsonl")]
    assert max(samples) > 1 and min(samples) < 0  # gold rewards, not shares of 1
    assert json.loads((whole / "config.json").read_text())["args"]["dpo_clip"] == 0.3


def kill_at_the_second_checkpoint():
    die_at("os.rename", "step-000004")


def test_the_dpo_term_is_of_the_models_as_they_were_trained(whole, tmp_path):
    """At the sampling temperature log pi_dpo / pi_ref would be another model's: what is logged is the ratio at 1."""
    argv = [*SMALL[2:], "--steps", 1, "--temperature", 0.5, "--dpo-model", whole / "dpo", *flags()]
    done = run(tmp_path, *argv, "--run-dir", tmp_path / "run", script=RTO)
    assert done.code == 0, done.err
    args = rto.Args(task="letters", dtype="float32", lora_rank=0, gradient_checkpointing=False)
    tokenizer, start = models.load_tokenizer(args), models.load(args, "cpu", trainable=False)
    args.model = str(whole / "dpo")
    trained = models.load(args, "cpu", trainable=False)
    for row in [row for row in lines(tmp_path / "run" / "samples.jsonl") if len(row["tokens"]) > 2][:3]:
        prompt, ids = tokenizer(row["prompt"])["input_ids"], tokenizer.convert_tokens_to_ids(row["tokens"])
        b = collate([(prompt, ids)])
        with torch.no_grad():
            one, two = (model(b.ids, b.attention_mask, b.mask)[0][0] for model in (trained, start))
        torch.testing.assert_close(torch.tensor(row["columns"]["dpo_ratio"]), one - two, rtol=0, atol=2e-4)
        assert (one - two).abs().max() > 1e-3


def test_a_resumed_run_does_not_train_the_dpo_model_again(whole, tmp_path):
    done = run(tmp_path, *SMALL, *flags(), "--run-dir", tmp_path / "run", script=RTO, before=kill_at_the_second_checkpoint)
    assert done.code == -9 and [p.name for p in checkpoints(tmp_path / "run")] == ["step-000002"]
    weights = tmp_path / "run" / "dpo" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    done = run(tmp_path, "--resume", tmp_path / "run", script=RTO)
    assert done.code == 0, done.err
    assert weights.stat().st_mtime_ns == made and weights.read_bytes() == (whole / "dpo" / weights.name).read_bytes()
    same(outcome(tmp_path / "run"), outcome(whole))


def kill_before_the_dpo_model_is_whole():
    die_at("os.rename", "dpo.tmp")


def test_half_a_dpo_model_is_made_anew(whole, tmp_path):
    argv = *SMALL, *flags(), "--run-dir", tmp_path / "run"
    assert run(tmp_path, *argv, script=RTO, before=kill_before_the_dpo_model_is_whole).code == -9
    assert not (tmp_path / "run" / "dpo").exists()
    assert run(tmp_path, "--resume", tmp_path / "run", script=RTO).code == 0
    same(outcome(tmp_path / "run"), outcome(whole))


def test_a_dpo_model_that_is_given(whole, tmp_path):
    """The same run, without a stage 1; and one that has other tokens than the policy is refused."""
    done = run(tmp_path, *SMALL, *flags(), "--dpo-model", whole / "dpo", "--run-dir", tmp_path / "run", script=RTO)
    assert done.code == 0 and not (tmp_path / "run" / "dpo").exists()
    same(outcome(tmp_path / "run"), outcome(whole))
    other = shutil.copytree(whole / "dpo", tmp_path / "other")
    tokens = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokens.replace('"a": ', '"ä": '))
    assert "other tokens" in user_error(run(tmp_path, *SMALL, "--dpo-model", other, "--run-dir", tmp_path / "no", script=RTO))


def test_every_flag_of_stage_1_changes_the_dpo_model(whole, tmp_path, monkeypatch):
    settings = json.loads((whole / "config.json").read_text())["args"] | dict(run_dir=None)
    tokenizer = models.load_tokenizer(rto.Args(**settings))
    data = pairs.load(SimpleNamespace(**settings | dict(data="letters")), tiny.config(), tokenizer)
    monkeypatch.setattr(pairs, "load", lambda args, *_: data)
    found = {}
    for changes in ({}, dict(dpo_steps=2), dict(dpo_beta=0.2), dict(dpo_lr=1e-4), dict(dpo_pairs_per_step=4)):
        folder = tmp_path / f"dpo{len(found)}"
        args = rto.Args(**settings | changes)
        rto.dpo_stage(folder, args, tiny.config(), tokenizer, SimpleNamespace(main=True, stop=None))
        found[str(changes)] = (folder / "model.safetensors").read_bytes()
    assert len(set(found.values())) == 5


def test_a_real_model_takes_the_paper_s_values(whole, tmp_path):
    model = shutil.copytree(whole / "dpo", tmp_path / "model")  # not to be known for a tiny one
    config = json.loads((model / "config.json").read_text()) | dict(warm_started_on=None)
    (model / "config.json").write_text(json.dumps(config))
    local = "--model", model, "--task", "letters", "--dpo-model", whole / "dpo", "--max-new-tokens", 9, "--steps", 0
    done = run(tmp_path, *local, "--dtype", "float32", "--optimizer", "adamw", "--run-dir", tmp_path / "run", script=RTO)
    assert done.code == 0, done.err
    args = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    expected = dict(prompts_per_step=1024, minibatches=8, epochs=1, beta=0.01, dpo_scale=0.05, dpo_clip=0.05, score_clip=10.0)
    assert {k: args[k] for k in expected} == expected


@pytest.mark.parametrize(
    "argv, message",
    [("--task addition", "--task addition has no pairs for stage 1"),
     ("--dpo-pairs-per-step 0", "--dpo-pairs-per-step must be at least 1, is 0"),
     ("--dpo-lr -1", "--dpo-lr must be at least 0, is -1"), ("--gamma 1.5", "--gamma must be at least 0 and at most 1, is 1.5"),
     ("--dpo-model no/such/folder", "no such folder")],
)  # fmt: skip
def test_mistakes(tmp_path, argv, message):
    assert message in user_error(run(tmp_path, *argv.split(), "--run-dir", tmp_path / "run", script=RTO))


def test_two_ranks_are_one_process(tmp_path, whole):
    argv = *SMALL, "--steps", 2, *flags(), "--dtype", "float64", "--micro-batch-tokens", 100
    assert run(tmp_path, *argv, "--run-dir", tmp_path / "1", script=RTO).code == 0
    test_gpu.launch(2, *argv, "--run-dir", tmp_path / "2", script="algos/rto.py")
    for a, b in zip(*(test_gpu.metrics(tmp_path / r) for r in "12")):
        assert a.keys() == b.keys()
        for k in a:
            assert b[k] == pytest.approx(a[k], rel=1e-6, abs=1e-6), k
