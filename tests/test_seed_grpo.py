"""SEED-GRPO's worked numbers, bounds of the entropy, shapes of the scale, and what a run does with them."""

import json
import math

import pytest
import torch

from algos import dr_grpo, seed_grpo
from tests.card import loss_and_gradient
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
LOGLIK, ANSWERS = torch.tensor([-0.2, -0.4, -0.5, -1.0]), ["5", "5", "7", "9"]


def args(**changes):
    return seed_grpo.Args(**dict(group_size=4, max_new_tokens=8) | changes)


def entropy(loglik=LOGLIK, answers=ANSWERS, lengths=(1, 2, 3, 4), **changes):
    """SE of completions of these lengths whose mean log-prob per token is loglik."""
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    logp = torch.where(mask, loglik[:, None], torch.tensor(float("nan")))  # garbage in the padding
    return seed_grpo.semantic_entropy(logp, mask, answers, args(**changes))


def test_worked_numbers():
    assert entropy().tolist() == pytest.approx([0.933350], abs=1e-6)
    masses = LOGLIK.log_softmax(0)  # the likelihoods of completions of one token, whose sum is 1
    paper = entropy(masses, lengths=(1, 1, 1, 1), estimator="paper")
    assert paper.tolist() == pytest.approx([1.268854], abs=1e-6)
    small, large = (seed_grpo.scale(entropy(), args(alpha=a)).item() for a in (0.0417, 1.0))
    assert small == pytest.approx(0.972691, abs=1e-6) and large == pytest.approx(0.597632, abs=1e-6)
    adv = seed_grpo.advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), args())
    torch.testing.assert_close(adv * small, torch.tensor([[0.486346, 0.486346, -0.486346, -0.486346]]), **CLOSE)
    torch.testing.assert_close((adv * large).abs(), torch.full((1, 4), 0.298816), **CLOSE)


def test_the_ends():
    """One voice: 0 and a scale of 1. Nobody says anything: log G, since who says nothing agrees with nobody."""
    assert entropy(answers=["5"] * 4).item() == pytest.approx(0, abs=1e-6)
    silent = entropy(torch.full((4,), -0.7), [None] * 4)
    assert silent.item() == pytest.approx(math.log(4), abs=1e-6)
    for alpha in (0.0417, 1.0, 3.0):
        assert seed_grpo.scale(entropy(answers=["5"] * 4), args(alpha=alpha)).item() == pytest.approx(1, abs=1e-6)
        assert seed_grpo.scale(silent, args(alpha=alpha)).item() == pytest.approx(1 / (1 + alpha), abs=1e-6)
    assert seed_grpo.scale(silent, args(alpha=0.0)).item() == 1.0


def test_the_entropy_is_of_clusters_whatever_their_names_and_order():
    found = entropy(answers=["x", "x", None, ""])  # an empty answer is one, too, and not the same as none
    torch.testing.assert_close(found, entropy())
    order = [2, 0, 3, 1]
    torch.testing.assert_close(entropy(LOGLIK[order], [ANSWERS[i] for i in order], [3, 1, 4, 2]), entropy())
    two = entropy(answers=["1", "2", "1", "2"])
    assert entropy(answers=["1", None, "1", None]).item() > two.item() + 1e-3
    torch.manual_seed(0)
    for _ in range(50):
        words = [str(w) for w in torch.randint(4, (4,)).tolist()]
        value = entropy(torch.randn(4) * 3, words).item()
        assert -1e-6 <= value <= math.log(len(set(words))) + 1e-6


def test_groups_do_not_mix_and_empty_completions_are_finite():
    mask = torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]] * 2).bool()
    logp, answers = torch.randn(8, 2) - 2, ["1", "2", None, "1", "3", "3", "3", "4"]
    both = seed_grpo.semantic_entropy(logp, mask, answers, args())
    parts = [seed_grpo.semantic_entropy(logp[i : i + 4], mask[i : i + 4], answers[i : i + 4], args()) for i in (0, 4)]
    torch.testing.assert_close(both, torch.cat(parts))
    assert both.isfinite().all() and both.shape == (2,)


def test_length_counts_in_the_paper_s_formula_alone():
    short, long = ((entropy(lengths=[n] * 4, estimator=e).item()) for n, e in ((1, "normalised"), (4, "normalised")))
    assert short == pytest.approx(long, abs=1e-6)
    short, long = ((entropy(lengths=[n] * 4, estimator="paper").item()) for n in (1, 4))
    assert long > short + 0.5 and long > math.log(4)


@pytest.mark.parametrize("shape, half, most", [
    ("inverse", 1 / 1.5, 0.5), ("linear", 0.5, 0.0), ("exponential", math.exp(-0.5), math.exp(-1)), ("focal", 0.5, 0.0),
    ("reversed", 1.5, 2.0),
])  # fmt: skip
def test_shapes(shape, half, most):
    """At an entropy of 0, half of log G and log G, with alpha 1; and never below 0, where alpha or the entropy is larger."""
    a = args(alpha=1.0, shape=shape)
    found = seed_grpo.scale(torch.tensor([0.0, math.log(4) / 2, math.log(4)]), a)
    torch.testing.assert_close(found, torch.tensor([1.0, half, most]), **CLOSE)
    assert (seed_grpo.scale(torch.tensor([9.0]), args(alpha=3.0, shape=shape)) >= 0).all()


def test_the_gradient_is_dr_grpo_s_times_the_scale():
    a = args(alpha=1.0)
    factor = seed_grpo.scale(entropy(), a).item()
    adv = torch.tensor([[1.0], [-1.0]]).expand(2, 4)
    _, base = loss_and_gradient(dr_grpo, dr_grpo.Args(max_new_tokens=8), adv)
    _, mine = loss_and_gradient(seed_grpo, a, factor * adv)
    torch.testing.assert_close(mine, factor * base)


def test_a_run_scales_what_is_uncertain(tiny, tmp_path):
    """Without alpha it is Dr. GRPO, bit for bit; with it the logged advantages are smaller by the logged scale."""
    argv = "--task addition --steps 1 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    weights, rows, samples = {}, {}, {}
    runs = dict(base=("dr_grpo",), none=("seed_grpo", "--alpha", 0), one=("seed_grpo", "--alpha", 1))
    for name, (script, *more) in runs.items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / f"{script}.py")
        assert done.code == 0, done.err
        weights[name] = (tmp_path / name / "checkpoints" / "step-000001" / "model.safetensors").read_bytes()
        (rows[name],) = lines(tmp_path / name / "metrics.jsonl")
        samples[name] = [json.loads(line) for line in open(tmp_path / name / "samples.jsonl")]
    assert weights["base"] == weights["none"] != weights["one"]
    assert rows["none"]["scale"] == 1.0 and 0.5 <= rows["one"]["scale"] < 0.95 and rows["one"]["semantic_entropy"] > 0.2
    a, b = (torch.tensor([row["columns"]["adv"][0] for row in samples[name]]) for name in ("none", "one"))
    assert a.any() and (a[a != 0] / b[a != 0]).min() > 1.05
