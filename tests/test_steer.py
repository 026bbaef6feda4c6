"""STEER's worked numbers, how well it foretells the entropy, its limits and controls, and what a run does with the weights."""

import pytest
import torch

from algos import dapo, steer
from tests.card import example
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
P, OLD_P = torch.tensor([[0.9, 0.2, 0.6]]), torch.tensor([[0.9, 0.25, 0.6]])
H, ADV = torch.tensor([[0.4, 1.3, 0.7]]), torch.tensor([[1.0, 1.0, -1.0]])
MASK = torch.ones(1, 3, dtype=torch.bool)
OMEGA = torch.tensor([[0.029464, -0.198040, -0.075670]])
DAMPED = torch.tensor([[0.967346, 0.800000, 0.918272]])


def damped(omega=OMEGA, mask=MASK, seed=0, **changes):
    return steer.damping(omega, mask, steer.Args(**changes), seed)


def loss_and_gradient(script, args, logp, old_logp, adv, mask, weight=1.0):
    """As the loop forms it."""
    logp = logp.detach().clone().requires_grad_()
    objective, _ = script.surrogate(logp, old_logp, adv, mask, args)
    loss = -(weight * objective * script.token_weights(mask, args))[mask].sum()
    loss.backward()
    return loss.item(), logp.grad


def test_worked_numbers():
    omega = steer.entropy_change(P.log(), OLD_P.log(), H, ADV)
    torch.testing.assert_close(omega, OMEGA, **CLOSE)
    torch.testing.assert_close(damped(omega), DAMPED, **CLOSE)
    torch.testing.assert_close(damped(omega, lambda_min=0.7), torch.tensor([[0.948318, 0.7, 0.872596]]), **CLOSE)
    torch.testing.assert_close(damped(omega, mapping="linear"), torch.tensor([[1.2, 0.8, 1.090362]]), **CLOSE)
    loss, gradient = loss_and_gradient(steer, steer.Args(), P.log(), OLD_P.log(), ADV, MASK, damped(omega))
    torch.testing.assert_close(gradient, torch.tensor([[-0.967346, -0.8 * 0.8, 0.918272]]) / 3, **CLOSE)
    assert loss == pytest.approx(-(0.967346 + 0.8 * 0.8 - 0.918272) / 3, abs=1e-6)


def exact_change(p, token):
    """Of the entropy, per unit of rate, by a step on the logits that rewards this token of a softmax by 1."""
    z = p.log().requires_grad_()
    logp = z.log_softmax(0)
    (slope,) = torch.autograd.grad(-(logp.exp() * logp).sum(), z)
    (push,) = torch.autograd.grad(z.log_softmax(0)[token], z)
    return (slope * push).sum()


def foretold(p):
    """-Omega of each token of a distribution."""
    p = p[None]
    return -steer.entropy_change(p.log(), p.log(), -(p * p.log()).sum().expand_as(p), torch.ones_like(p))[0]


def test_how_well_the_change_is_foretold():
    """The sign is right; rare tokens are overestimated about 1/p times. Over random distributions the two go together."""
    p = torch.tensor([0.6, 0.3, 0.1])
    exact = torch.stack([exact_change(p, i) for i in range(3)])
    torch.testing.assert_close(exact, torch.tensor([-0.134498, 0.189583, 0.238238]), **CLOSE)
    torch.testing.assert_close(foretold(p), torch.tensor([-0.154848, 0.214219, 1.264175]), **CLOSE)
    g = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(300):
        p = torch.randn(6, generator=g).mul(2).softmax(0)
        token = torch.multinomial(p, 1, generator=g).item()
        pairs.append(torch.stack([foretold(p)[token], exact_change(p, token)]))
    pairs = torch.stack(pairs).T
    assert torch.corrcoef(pairs)[0, 1] > 0.6 and (pairs.sign().prod(0) > 0).float().mean() > 0.9


def test_the_sign_says_where_entropy_goes():
    """Rewarding the likely and punishing the unlikely lower it; the other two raise it."""
    p, h = torch.tensor([[0.9, 0.05, 0.9, 0.05]]), torch.full((1, 4), 0.5)
    omega = steer.entropy_change(p.log(), p.log(), h, torch.tensor([[1.0, -1.0, -1.0, 1.0]]))
    assert (omega > 0).tolist() == [[True, True, False, False]]
    torch.testing.assert_close(omega[0, 0], 0.1 * (p[0, 0].log() + 0.5))  # on policy: A (1 - p) (log p + H)


def test_certain_and_impossible_tokens_are_finite():
    logp = torch.tensor([[0.0, -200.0, 0.0, -float("inf")]])
    omega = steer.entropy_change(logp, logp.roll(1), torch.zeros(1, 4), torch.ones(1, 4))
    assert omega.isfinite().all() and omega[0, 0] == 0
    assert damped(omega, torch.ones(1, 4, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("weight", ["no damping", "no change"])
def test_without_damping_it_is_dapo_s_loss(weight):
    """With lambda_min = 1, and where no token changes the entropy: loss and gradient to the last bit, clips included."""
    logp, old_logp, adv, mask = example()
    omega = torch.randn(2, 4) if weight == "no damping" else torch.zeros(2, 4)
    ones = damped(omega, mask, lambda_min=1.0 if weight == "no damping" else 0.8)
    assert torch.equal(ones, torch.ones(2, 4))
    mine = loss_and_gradient(steer, steer.Args(), logp, old_logp, adv, mask, ones)
    base = loss_and_gradient(dapo, dapo.Args(), logp, old_logp, adv, mask)
    assert mine[0] == base[0] and torch.equal(mine[1], base[1])


def test_dual_clip():
    """A token of a negative advantage costs at most ten times that; a positive one has no such floor."""
    old_logp = torch.tensor([[-4.0, -4.0, -4.0, -4.0]])
    ratio = torch.tensor([[9.9, 10.1, 50.0, 50.0]])
    adv = torch.tensor([[-2.0, -2.0, -2.0, 2.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    logp = (old_logp + ratio.log()).requires_grad_()
    objective, _ = steer.surrogate(logp, old_logp, adv, mask, steer.Args())
    torch.testing.assert_close(objective, torch.tensor([[-19.8, -20.0, -20.0, 2 * 1.28]]))
    objective.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-19.8, 0.0, 0.0, 0.0]]))


def test_the_weights_are_of_sizes_between_the_ends():
    torch.manual_seed(0)
    omega, mask = torch.randn(6, 9), torch.rand(6, 9) < 0.7
    garbage = omega.masked_fill(~mask, float("nan"))
    for changes in (dict(), dict(mapping="linear"), dict(omega_quantile=0.5), dict(mapping="linear", omega_quantile=0.5)):
        weight, top = damped(garbage, mask, **changes), 1.2 if "mapping" in changes else 1.0
        assert weight[mask].min() == pytest.approx(0.8, abs=1e-6) and weight[mask].max() <= top and (weight[~mask] == 1).all()
        order = weight[mask][omega[mask].abs().argsort()]
        assert (order.diff() <= 0).all()
        torch.testing.assert_close(damped(-garbage, mask, **changes), weight, rtol=0, atol=0)
        at_the_end = (weight[mask] < 0.8 + 1e-6).float().mean()
        assert (at_the_end > 0.45) == ("omega_quantile" in changes)


def test_the_floor_leaves_small_changes_alone():
    small = OMEGA / OMEGA.abs().max() * 0.002  # a tenth of the floor
    assert damped(small).min() == pytest.approx(0.8**0.1, abs=1e-6)
    assert damped(small, mapping="linear").min() == pytest.approx(0.8, abs=1e-6)  # which has none


@pytest.mark.parametrize("mapping, middle", [("exponential", 1.0), ("linear", 1.0), ("linear", 0.9)])
def test_no_token_and_equal_tokens(mapping, middle):
    """Nothing to set the scale: linear takes the midpoint."""
    most = 2 * middle - 0.8
    changes = dict(mapping=mapping, lambda_max=most)
    assert (damped(OMEGA, ~MASK, **changes) == 1).all()
    torch.testing.assert_close(damped(torch.zeros(1, 3), **changes), torch.full((1, 3), middle))
    if mapping == "linear":
        torch.testing.assert_close(damped(-torch.ones(1, 3), **changes), torch.full((1, 3), middle))
    one = torch.tensor([[True, False, False]])
    assert damped(OMEGA, one, mapping=mapping)[0, 0].item() == pytest.approx(0.8 if mapping == "exponential" else 1.0, abs=1e-6)


@pytest.mark.parametrize("mapping", ["exponential", "linear"])
def test_the_control_has_the_same_histogram(mapping):
    """On other tokens, by the seed alone, whatever padding stands between them."""
    torch.manual_seed(0)
    omega, mask = torch.randn(6, 9), torch.arange(9) < torch.tensor([9, 4, 0, 7, 1, 5])[:, None]
    plain, shuffled = damped(omega, mask, mapping=mapping), damped(omega, mask, 7, mapping=mapping, shuffled=True)
    assert torch.equal(plain[mask].sort().values, shuffled[mask].sort().values) and (shuffled[~mask] == 1).all()
    assert (plain == shuffled)[mask].float().mean() < 0.3
    assert torch.equal(shuffled, damped(omega, mask, 7, mapping=mapping, shuffled=True))
    assert not torch.equal(shuffled, damped(omega, mask, 8, mapping=mapping, shuffled=True))
    wide = damped(*(torch.nn.functional.pad(x, (0, 3)) for x in (omega, mask)), 7, mapping=mapping, shuffled=True)
    assert torch.equal(wide[:, :9], shuffled)


def test_the_clip_s_flags():
    args = (*(x.detach() for x in example()[:3]), example()[3])
    losses = [loss_and_gradient(steer, steer.Args(**c), *args)[0] for c in (dict(), dict(eps_low=0.5), dict(eps_high=0.5))]
    assert len(set(losses)) == 3


def test_a_run_damps_its_tokens(tiny, tmp_path):
    """Every update has a token of the least weight. Weights of the second pass over the rollout are those of the policy as the
    first has left it, so they are others where it has stood still; and the control makes another model than the method."""
    argv = "--task addition --steps 1 --prompts-per-step 8 --group-size 4 --minibatches 1 --epochs 2 --eval-prompts 8".split()
    rows, weights = {}, {}
    for name, more in dict(plain=(), shuffled=("--shuffled",), still=("--lr", 0)).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "steer.py")
        assert done.code == 0, done.err
        (rows[name],) = lines(tmp_path / name / "metrics.jsonl")
        weights[name] = (tmp_path / name / "checkpoints" / "step-000001" / "model.safetensors").read_bytes()
    assert len(set(weights.values())) == len(weights)
    for row in rows.values():
        assert row["damping_min"] == pytest.approx(0.8, abs=1e-6) and 0.9 < row["damping"] < 1 and 0 < row["damped"] < 0.5
    assert rows["shuffled"]["damping"] == pytest.approx(rows["plain"]["damping"], rel=1e-2)
    assert abs(rows["still"]["damping"] - rows["plain"]["damping"]) > 1e-5
    (first, *_) = lines(tmp_path / "plain" / "samples.jsonl")
    assert set(first["columns"]) == {"logp", "adv", "old_entropy", "damping"} and min(first["columns"]["damping"]) < 1
