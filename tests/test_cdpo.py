"""cDPO's worked examples, its limits, the scores against a computation by hand, and the script run as a user runs it."""

import json
import math

import pytest
import torch

from algos import cdpo, dpo
from tests.helpers import ROOT, lines, run, user_error
from tests.test_dpo import example, pair

PLAIN = dict(columns=dict(score=(1.0, 0.0)))  # DPO
FEW = ["--ce-steps", 2]

CDPO = ROOT / "algos" / "cdpo.py"
SMALL = "--steps 4 --pairs-per-step 8 --eval-prompts 16".split()
CLOSE = dict(rtol=0, atol=1e-6)
SCORE = torch.tensor([[0.5, 0.8, 0.3], [0.9, 0.2, 0.0]])  # the card has those of the rejected side


def loss_and_gradient(logp, ref_logp, score, mask, **changes):
    leaf = logp.detach().clone().requires_grad_()
    losses, stats = cdpo.pair_loss(leaf, ref_logp, score, mask, cdpo.Args(**changes))
    losses.sum().backward()
    return losses.detach(), leaf.grad, stats


def random_pairs():
    logp, ref_logp, mask = pair([(5, 2), (1, 4), (3, 3)])
    return logp, ref_logp, torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)), mask


def softplus(x):
    return math.log1p(math.exp(x))


# ---------------------------------------------------------------- the score


def test_score_worked_example():
    plus, minus = torch.tensor([2, 0.5, -1]), torch.tensor([1.0, 2, 0])
    score = cdpo.contrastive_score(torch.arange(3), plus.expand(3, 3), minus.expand(3, 3), 1.0)
    torch.testing.assert_close(score, torch.tensor([0.975559, 0.017868, 0.006573]), **CLOSE)  # sums to 1: the vocabulary's
    p, q = plus.softmax(0), minus.softmax(0)
    assert (p**2 / q)[0].item() == pytest.approx(2.521826, abs=1e-5)  # what it would be without the sum
    torch.testing.assert_close(score, p**2 / q / (p**2 / q).sum(), **CLOSE)


def test_score_of_a_random_vocabulary():
    g = torch.Generator().manual_seed(0)
    plus, minus = torch.randn(6, 50, generator=g) * 3, torch.randn(6, 50, generator=g) * 3
    targets = torch.randint(50, (6,), generator=g)
    for kappa in (0.0, 0.5, 2.0):
        ratio = plus.double().softmax(1) ** (1 + kappa) / minus.double().softmax(1) ** kappa
        expected = (ratio / ratio.sum(1, keepdim=True))[torch.arange(6), targets]
        torch.testing.assert_close(cdpo.contrastive_score(targets, plus, minus, kappa).double(), expected, rtol=1e-4, atol=1e-9)
    same = cdpo.contrastive_score(targets, plus, plus, 1.0)  # no contrast: the model's own probability
    torch.testing.assert_close(same, plus.softmax(1)[torch.arange(6), targets])


def test_the_end_of_sequence_weighs_one():
    responses = [[5, 7, 1], [5, 1, 8], [1], [9, 1]]
    scores = [torch.full((len(y),), 0.3) for y in responses]
    free = [s.tolist() for s in cdpo.free_ends(scores, responses, 1)]
    third = pytest.approx(0.3)
    assert free == [[third, third, 1], [third, third, third], [1], [third, 0]]  # the second was cut, its 1 is no end
    assert all((s == scores[0][0]).all() for s in scores)


def test_detection_is_what_counting_says():
    g = torch.Generator().manual_seed(0)
    value, wrong = torch.randint(6, (40,), generator=g) / 5, torch.rand(40, generator=g) < 0.3
    found = cdpo.detection(value, wrong)
    pairs = [(a > b) + (a == b) / 2 for a in value[wrong].tolist() for b in value[~wrong].tolist()]
    assert found["auc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6) and len(set(pairs)) == 3
    assert found["wrong"] == pytest.approx(value[wrong].mean().item())
    assert found["innocent"] == pytest.approx(value[~wrong].mean().item())
    assert cdpo.detection(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))["auc"] == 1


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example_of_the_paper(dtype):
    logp, ref_logp, mask = example()
    losses, grad, stats = loss_and_gradient(logp.to(dtype), ref_logp.to(dtype), SCORE.to(dtype), mask, beta=0.5)
    assert losses.dtype == dtype and losses.item() == pytest.approx(0.700675, abs=1e-6)
    expected = torch.tensor([[-0.251875] * 3, [0.025187, 0.2015, 0]], dtype=dtype)
    torch.testing.assert_close(grad, expected, **CLOSE)
    assert stats["margin"].item() == pytest.approx(-0.03, abs=1e-6) and stats["reward_accuracy"].item() == 0
    assert stats["chosen_ratio"].item() == pytest.approx(0.1, abs=1e-6)
    assert stats["rejected_ratio"].item() == pytest.approx(-0.1, abs=1e-6)  # as DPO's, without the weights
    assert stats["critical_ratio"].item() == pytest.approx(0.1 * -0.3 + 0.8 * 0.2, abs=1e-6)
    assert stats["critical_weight"].item() == pytest.approx(0.45, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example_of_the_authors_code(dtype):
    logp, ref_logp, mask = example()
    some = [x.to(dtype) for x in (logp, ref_logp, SCORE)]
    losses, grad, _ = loss_and_gradient(*some, mask, beta=0.5, aggregate="per_token")
    cells = 0.637299, 0.787192, 0.668460
    assert losses.item() == pytest.approx(sum(cells) / 3, abs=1e-6) == pytest.approx(0.69765, abs=1e-6)
    expected = torch.tensor([[-0.078547, -0.090813, -0.08125], [0.007855, 0.072651, 0]], dtype=dtype)
    torch.testing.assert_close(grad, expected, **CLOSE)


@pytest.mark.parametrize("aggregate", ["sequence", "per_token"])
def test_the_width_of_the_padding_is_no_learning_rate(aggregate):
    some = random_pairs()
    losses, grad, _ = loss_and_gradient(*some, aggregate=aggregate)
    wide, wide_grad, _ = loss_and_gradient(*(torch.nn.functional.pad(x, (0, 4)) for x in some), aggregate=aggregate)
    torch.testing.assert_close(wide, losses, **CLOSE)
    torch.testing.assert_close(wide_grad[:, :-4], grad, **CLOSE)


def test_per_token_counts_the_positions_that_either_response_has():
    logp, ref_logp, mask = pair([(1, 3)])
    losses, _, _ = loss_and_gradient(logp, ref_logp, torch.zeros(2, 3), mask, beta=1.0, aggregate="per_token")
    d = (logp - ref_logp).tolist()
    expected = (softplus(d[1][0] - d[0][0]) + softplus(d[1][1]) + softplus(d[1][2])) / 3
    assert losses.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "changes, argument",
    [
        (dict(), 0.1 - 0.13),
        (dict(beta=1.0), 2 * (0.1 - 0.13)),
        (dict(only_neg=False), 0.5 * 0.2 - 0.8 * 0.2 + 0.3 * 0.1 - 0.13),  # the chosen side by s, not by 1 - s
    ],
)
def test_every_option_changes_the_loss(changes, argument):
    logp, ref_logp, mask = example()
    losses, _, _ = loss_and_gradient(logp, ref_logp, SCORE, mask, **dict(beta=0.5) | changes)
    assert losses.item() == pytest.approx(softplus(-0.5 * argument), abs=1e-6)


def test_per_token_without_only_neg():
    logp, ref_logp, mask = example()
    losses, _, _ = loss_and_gradient(logp, ref_logp, SCORE, mask, beta=0.5, aggregate="per_token", only_neg=False)
    cells = 0.5 * 0.2 + 0.1 * 0.3, -0.8 * 0.2 - 0.8 * 0.2, 0.3 * 0.1
    assert losses.item() == pytest.approx(sum(softplus(-0.5 * c) for c in cells) / 3, abs=1e-6)


def test_all_tokens_critical_is_dpo():
    logp, ref_logp, score, mask = random_pairs()
    losses, grad, _ = loss_and_gradient(logp, ref_logp, torch.zeros_like(score), mask, beta=0.3)
    expected, _ = dpo.pair_loss(logp, ref_logp, mask, dpo.Args(beta=0.3))
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), **CLOSE)
    torch.testing.assert_close(grad, logp.grad, **CLOSE)


def test_without_critical_tokens_the_chosen_side_is_left():
    logp, ref_logp, _, mask = random_pairs()
    _, grad, stats = loss_and_gradient(logp, ref_logp, torch.ones_like(ref_logp), mask)
    assert not grad[3:].any() and (grad[:3][mask[:3]] < 0).all() and not stats["critical_weight"].any()
    torch.testing.assert_close(stats["margin"], stats["chosen_ratio"])
    assert torch.equal(stats["reward_accuracy"], (stats["margin"] > 0).float())
    assert ((0 < stats["margin"]) & (stats["margin"] < 1)).any() and (stats["margin"] < 0).any()


@pytest.mark.parametrize("aggregate", ["sequence", "per_token"])
def test_pairs_of_nothing(aggregate):
    logp, ref_logp, mask = pair([(0, 0), (2, 1)])
    losses, grad, stats = loss_and_gradient(logp, ref_logp, torch.rand(mask.shape), mask, aggregate=aggregate)
    assert losses.isfinite().all() and grad.isfinite().all() and all(s.isfinite().all() for s in stats.values())


@pytest.mark.parametrize("only_neg", [True, False])
def test_scores_are_constants(only_neg):
    logp, ref_logp, score, mask = random_pairs()
    score.requires_grad_()
    losses, _ = cdpo.pair_loss(logp, ref_logp, score, mask, cdpo.Args(only_neg=only_neg))
    losses.sum().backward()
    assert score.grad is None and logp.grad.any()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def tiny():
    from common import tasks
    from common.worlds import tiny

    return [tiny.warm_start(tasks.load(name)) for name in ("chain", "record")]


def on_a_file(folder, tiny, *argv):
    """A run of one step on 30 pairs, without any gold, that end or (every third) are cut -> score.safetensors, responses."""
    from common import pairs
    from common.worlds.tiny import characters, config

    rows = [dict(prompt=f"{i:08d}=", chosen="01234567"[: 4 + i % 3], rejected="7654321") for i in range(30)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    name = folder / f"run-{len(list(folder.glob('run-*')))}"
    done = run(
        folder, "--model", tiny[0], "--data", path, "--dtype", "float32", "--optimizer", "adamw", "--steps", 1, "--lr", 1e-3,
        "--pairs-per-step", 4, "--max-new-tokens", 6, "--eval-prompts", 2, "--run-dir", name, *argv, script=CDPO,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert not (name / "detection.json").exists()
    args = cdpo.Args(data=str(path), max_new_tokens=6)
    data = pairs.load(args, config(), characters())
    found, reference = (pairs._Cache(name / f"{n}.safetensors") for n in ("score", "reference"))
    sides = [(p.prompt, y) for p in data.train + data.test for y in (p.chosen, p.rejected)]
    return [found[i] for i in range(60)], [reference[i] for i in range(60)], sides


def test_folders_are_the_two_models(tmp_path, tiny):
    from transformers import Qwen2ForCausalLM

    found, _, sides = on_a_file(tmp_path, tiny, "--positive", tiny[0], "--negative", tiny[1], "--kappa", 0.5)
    plus, minus = (Qwen2ForCausalLM.from_pretrained(f).eval() for f in tiny)
    ended = 0
    for i in range(0, 60, 5):
        prompt, y = sides[i]
        with torch.no_grad():
            both = [m(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1] for m in (plus, minus)]
        expected = (1.5 * both[0] - 0.5 * both[1]).softmax(-1)[torch.arange(len(y)), torch.tensor(y)]
        if y[-1] == 1:
            expected[-1], ended = 1 - i % 2, ended + 1
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-5)
    assert 0 < ended < 12 and any(sides[i][1][-1] != 1 for i in range(0, 60, 5))


def test_the_training_of_the_two_models(tmp_path, tiny):
    still, reference, sides = on_a_file(tmp_path, tiny, "--ce-steps", 0)
    for s, r, (_, y) in zip(still, reference, sides):  # both are the start: its own probabilities
        n = len(y) - (y[-1] == 1)
        torch.testing.assert_close(s[:n], r[:n].exp(), rtol=1e-3, atol=1e-6)
    trained, _, _ = on_a_file(tmp_path, tiny, "--ce-steps", 3)
    change = [(a - b)[:4].mean() for a, b in zip(trained, still)]
    assert min(change[::2]) > 0.05  # the chosen are what the positive model likes better than the negative
    assert trained[1][:4].max() < 0.1
    default, _, _ = on_a_file(tmp_path, tiny, "--ce-steps", 3, "--ce-lr", 5e-3)
    slow, _, _ = on_a_file(tmp_path, tiny, "--ce-steps", 3, "--ce-lr", 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(trained, default))  # 5 lr
    assert not any(torch.equal(a[:4], b[:4]) for a, b in zip(trained, slow))
    score = tmp_path / "run-1" / "score.safetensors"
    made = score.stat().st_mtime_ns
    done = run(tmp_path, "--resume", tmp_path / "run-1", "--steps", 2, script=CDPO)
    assert done.code == 0 and score.stat().st_mtime_ns == made  # no second training
    assert len(lines(tmp_path / "run-1" / "metrics.jsonl")) == 2


def few_pairs():
    """Cuts the built-in data: most of a run so short would be the scores of all the other pairs."""
    from common import pairs

    built_in = pairs._built_in

    def few(world):
        train, test = built_in(world)
        return train[:256], test[:64]

    pairs._built_in = few


def test_a_run_knows_its_wrong_tokens(tmp_path, tiny):
    folder = tmp_path / "run"
    done = run(tmp_path, *SMALL, "--ce-steps", 30, "--ce-lr", 1e-3, "--run-dir", folder, script=CDPO, before=few_pairs)
    assert done.code == 0 and done.err == ""
    assert "data=chain" in done.out
    found = json.loads((folder / "detection.json").read_text())
    assert found["score"]["auc"] > found["ref_logp"]["auc"] > 0.9
    assert found["score"]["wrong"] > 0.8 and found["score"]["innocent"] < 0.2
    assert f"wrong tokens by 1 - s: wrong {found['score']['wrong']:.3f}, innocent" in done.out
    first, *_ = rows = lines(folder / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert all(1 / 9 < r["critical_weight"] < 0.6 for r in rows)  # the end of sequence, the slip, and what looks like one
    assert rows[-1]["margin"] > 0 and rows[-1]["critical_ratio"] < 0


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--positive", "x"], "--positive and --negative go together"),
        (["--kappa", "-1"], "--kappa must be at least 0, is -1.0"),
        (["--ce-steps", "-1"], "--ce-steps must be at least 0, is -1"),
        (["--ce-lr", "nan"], "--ce-lr must be at least 0, is nan"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, argv, complaint):
    assert complaint in user_error(run(tmp_path, *argv, script=CDPO))
