"""TDPO's worked example down to the logits, its limits, and the script run as a user runs it."""

import math

import pytest
import torch

from algos import dpo, tdpo
from tests.helpers import ROOT, lines, run
from tests.test_simpo import tell_loads

SMALL = "--steps 4 --pairs-per-step 8 --eval-prompts 16".split()
CLOSE = dict(rtol=0, atol=1e-6)
VARIANTS = [dict(variant="tdpo1"), dict(variant="tdpo2"), dict(variant="tdpo2", alpha=2.0)]
# The card's pair, two tokens of three each: positions of the chosen response, then of the rejected one.
TARGETS = torch.tensor([0, 1, 1, 0])
LOGITS = torch.tensor([[1, 0, -1], [0.5, 0.5, 0], [0, 1, 0], [-1, 0, 2]])
REF_LOGITS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0.5], [0, 0, 1]])
# Gradients of the loss with respect to the logits.
TDPO1 = [[-0.086588, 0.043294, 0.043294], [0.074827, -0.102354, 0.027527],
         [-0.035596, 0.094285, -0.058689], [0.102354, -0.027527, -0.074827]]  # fmt: skip
TDPO2 = [[-0.042954, 0.031402, 0.011552], [0.049228, -0.079086, 0.029858],
         [-0.031181, 0.073768, -0.042588], [0.112021, -0.020924, -0.091097]]  # fmt: skip
UNDETACHED = [[-0.064248, 0.037087, 0.027162], [0.061576, -0.090102, 0.028527]]  # TDPO2's chosen rows without stop-gradient


def random_logits(B=3, T=4, V=7, seed=0, spread=1.0):
    """Targets, logits, ref_logits of 2B responses of T tokens, and their ragged mask."""
    g = torch.Generator().manual_seed(seed)
    ref_logits = 2 * torch.randn(2 * B * T, V, generator=g)
    logits = ref_logits + spread * torch.randn(2 * B * T, V, generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (2 * B, 1), generator=g)
    return torch.randint(V, (2 * B * T,), generator=g), logits, ref_logits, mask


def through(targets, logits, ref_logits, mask, script=tdpo, **changes):
    """From the logits to the loss, as in the loop -> losses, gradient with respect to the logits, stats."""
    leaf = logits.clone().requires_grad_()
    columns = [x.view(mask.shape) for x in tdpo.token_kl(targets, leaf, ref_logits)[:3]]
    args = script.Args(**changes)
    losses, stats = script.pair_loss(*(columns if script is tdpo else columns[:2]), mask, args)
    losses.sum().backward()
    return losses.detach(), leaf.grad, stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant, loss, gradient", [("tdpo1", 0.300785, TDPO1), ("tdpo2", 0.296557, TDPO2)])
def test_worked_example(variant, loss, gradient, dtype):
    mask = torch.ones(2, 2).bool()
    losses, grad, stats = through(TARGETS, LOGITS.to(dtype), REF_LOGITS.to(dtype), mask, beta=0.5, alpha=0.5, variant=variant)
    assert losses.dtype == dtype and losses.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor(gradient, dtype=dtype), **CLOSE)
    assert (grad[:2] - torch.tensor(UNDETACHED)).abs().max() > 0.01
    expected = dict(chosen_ratio=1.284431, rejected_ratio=-0.875469, margin=2.159900, chosen_kl=0.397657, rejected_kl=0.463157,
                    kl_gap=0.065500, chosen_reward=0.841043, rejected_reward=-0.206156, reward_accuracy=1)  # fmt: skip
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(expected, abs=2e-6)


def test_kl_at_each_position_of_the_example():
    _, _, kl, _ = tdpo.token_kl(TARGETS, LOGITS, REF_LOGITS)
    torch.testing.assert_close(kl, torch.tensor([0.308994, 0.088663, 0.208931, 0.254226]), **CLOSE)


def test_what_the_distributions_are_read_for():
    targets, logits, ref_logits, _ = random_logits()
    logp, ref_logp, kl, entropy = tdpo.token_kl(targets, logits, ref_logits)
    pi, ref = (torch.distributions.Categorical(logits=x) for x in (logits, ref_logits))
    expected = pi.log_prob(targets), ref.log_prob(targets), torch.distributions.kl_divergence(ref, pi), pi.entropy()
    for a, b in zip((logp, ref_logp, kl, entropy), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(kl, torch.distributions.kl_divergence(pi, ref), rtol=0.01)  # forward, not reverse


def test_a_probability_of_zero_is_no_nan():
    """Where the softmax underflows its logarithm is -inf; the log-softmax is not."""
    logits, far = torch.tensor([[0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, -200.0]], requires_grad=True)
    _, ref_logp, kl, _ = tdpo.token_kl(torch.tensor([1]), logits, far)
    assert ref_logp.item() == -200 and kl.item() == pytest.approx(math.log(2), abs=1e-6)
    _, _, kl, entropy = tdpo.token_kl(torch.tensor([1]), far, logits)
    kl.sum().backward()
    assert kl.item() == pytest.approx(100 - math.log(2), abs=1e-4) and entropy.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(far.grad, torch.tensor([[0.5, -0.5]]))


def test_what_is_detached():
    logits, ref_logits = LOGITS.clone().requires_grad_(), REF_LOGITS.clone().requires_grad_()
    logp, ref_logp, kl, entropy = tdpo.token_kl(TARGETS, logits, ref_logits)
    assert [x.requires_grad for x in (logp, ref_logp, kl, entropy)] == [True, False, True, False]
    (logp + kl).sum().backward()
    assert ref_logits.grad is None


@pytest.mark.parametrize("changes, chosen, rejected", [(VARIANTS[0], -1, 1), (VARIANTS[1], 0, 0.5), (VARIANTS[2], 0, 2)])
def test_which_kl_the_loss_pushes(changes, chosen, rejected):
    """TDPO1 is rewarded for a larger KL after the chosen prefixes; TDPO2 does not see it, and pulls down the other."""
    _, _, _, mask = random_logits()
    logp, kl = torch.zeros(mask.shape), torch.zeros(mask.shape, requires_grad=True)
    losses, _ = tdpo.pair_loss(logp, logp, kl, mask, tdpo.Args(beta=1.0, **changes))
    losses.sum().backward()
    expected = 0.5 * torch.cat([chosen * mask[:3], rejected * mask[3:]])
    torch.testing.assert_close(kl.grad, expected, **CLOSE)


def test_alpha_0_is_dpo():
    given = random_logits()
    losses, grad, stats = through(*given, alpha=0.0)
    dpo_losses, dpo_grad, dpo_stats = through(*given, script=dpo)
    assert torch.equal(losses, dpo_losses) and grad.abs().max() > 0.01
    torch.testing.assert_close(grad, dpo_grad, **CLOSE)
    for name in ("chosen_ratio", "rejected_ratio", "margin"):
        assert torch.equal(stats[name], dpo_stats[name])


@pytest.mark.parametrize("changes", VARIANTS)
def test_at_the_reference_every_variant_is_dpo(changes):
    targets, _, ref_logits, mask = random_logits()
    losses, grad, stats = through(targets, ref_logits, ref_logits, mask, **changes)
    _, dpo_grad, _ = through(targets, ref_logits, ref_logits, mask, script=dpo)
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)))
    torch.testing.assert_close(grad, dpo_grad, **CLOSE)
    assert not stats["chosen_kl"].any() and not stats["reward_accuracy"].any()


def test_alpha_1_has_tdpo1s_loss_and_another_gradient():
    given = random_logits()
    (a, grad, _), (b, other, _) = (through(*given, **c) for c in (dict(alpha=1.0), dict(variant="tdpo1")))
    torch.testing.assert_close(a, b)
    assert (grad - other).abs().max() > 0.01


@pytest.mark.parametrize("changes, argument", [(dict(beta=1.0), 2.127150), (dict(alpha=1.0), 0.5 * 2.094400)])
def test_every_number_changes_the_loss(changes, argument):
    """beta stands before the KL, too; alpha inside beta."""
    losses, *_ = through(TARGETS, LOGITS, REF_LOGITS, torch.ones(2, 2).bool(), **dict(beta=0.5) | changes)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-argument)), abs=1e-6)


def test_accuracy_is_that_of_the_rewards_with_their_kl():
    zero, mask = torch.zeros(2, 1), torch.ones(2, 1).bool()
    _, stats = tdpo.pair_loss(zero, zero, torch.tensor([[0.2], [0.1]]), mask, tdpo.Args())
    assert stats["margin"].item() == 0 and stats["reward_accuracy"].item() == 1


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics of four steps by a name's flags, the folder, what was told on stderr."""
    folder, out = tmp_path_factory.mktemp("tdpo"), {}
    for name, *flags in (("tdpo2",), ("tdpo1", "--variant", "tdpo1"), ("alpha0", "--alpha", 0), ("dpo", "--ref", "live")):
        script = ROOT / "algos" / ("dpo.py" if name == "dpo" else "tdpo.py")
        done = run(folder, *SMALL, *flags, "--run-dir", folder / name, script=script, before=tell_loads)
        assert done.code == 0, done.err
        out[name] = lines(folder / name / "metrics.jsonl"), folder / name, done.err.split()
    return out


def test_what_a_run_logs(runs):
    rows, folder, told = runs["tdpo2"]
    assert told == ["trained", "frozen"] + ["step"] * 4  # one reference, for the updates and for the evaluations
    assert not (folder / "reference.safetensors").exists()
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["reward_accuracy"] == 0
    assert first["chosen_kl"] == pytest.approx(0, abs=1e-5) and last["chosen_kl"] > 1e-4 and last["rejected_kl"] > 1e-4
    for row in rows:
        assert row["kl_gap"] == pytest.approx(row["rejected_kl"] - row["chosen_kl"], abs=1e-6)
        assert row["chosen_reward"] == pytest.approx(0.3 * (row["chosen_ratio"] + row["chosen_kl"]), abs=1e-5)
    before, after = lines(folder / "evals.jsonl")
    assert abs(before["kl"]) < 1e-4 < after["kl"]


def test_a_run_with_alpha_0_is_dpos(runs):
    for a, b in zip(runs["alpha0"][0], runs["dpo"][0]):
        for k in ("loss", "margin", "chosen_ratio", "rejected_ratio", "entropy", "grad_norm"):
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4), k


def test_the_variant_and_alpha_change_a_run(runs):
    first, last = ([runs[n][0][i]["loss"] for n in ("tdpo1", "tdpo2", "alpha0")] for i in (0, -1))
    assert first == pytest.approx([math.log(2)] * 3, abs=1e-5) and len(set(last)) == 3
