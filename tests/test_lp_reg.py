"""Lp-Reg's worked numbers, the proxy, who is protected, the null control, and what a run logs."""

import pytest
import torch

from algos import dapo, lp_reg
from tests.card import example
from tests.helpers import ROOT, lines, run, tiny

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
PI = torch.tensor([0.70, 0.20, 0.09, 0.01])
TOKENS = torch.tensor([0, 2, 3])
OLD, NEW = PI[TOKENS].log()[None], torch.tensor([[0.70, 0.08, 0.01]]).log()
ADV, MASK = -torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)


def args(**changes):
    return lp_reg.Args(**dict(rho=2 / 3) | changes)


def proxy(targets=TOKENS, p=PI, **changes):
    """-> (log pi_old, log q) of these tokens, each after the same distribution; logits are that up to a constant."""
    logits = p.log().expand(len(targets), -1) + 3.0
    return lp_reg.proxy_logp(targets, logits, args(**changes))


def loss_and_gradient(a, now=NEW, adv=ADV, mask=MASK, q=None):
    """As the loop forms it."""
    q = proxy(kappa=a.kappa)[1][None] if q is None else q
    _, protected = lp_reg.protect(now, q, adv, mask, a)
    logp = now.clone().requires_grad_()
    objective, stats = lp_reg.surrogate(logp, OLD, adv, mask, a, q, protected)
    loss = -(objective * lp_reg.token_weights(mask, a))[mask].sum()
    loss.backward()
    return loss.item(), logp.grad


def test_worked_numbers():
    old, q = proxy(torch.arange(4))
    torch.testing.assert_close(old, PI.log(), **CLOSE)
    torch.testing.assert_close(q, torch.tensor([-0.346625, -1.599388, -2.397895, -1e4]), **CLOSE)
    lowest, protected = lp_reg.protect(NEW, q[TOKENS][None], ADV, MASK, args())
    assert lowest.tolist() == [[False, True, True]] and protected.tolist() == [[False, True, False]]
    K = lp_reg.kl_penalty(NEW, q[TOKENS][None], protected)
    torch.testing.assert_close(K, torch.tensor([[0.0, 0.008530, 0.0]]), **CLOSE)
    loss, gradient = loss_and_gradient(args())
    assert loss == pytest.approx(0.965806, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0.333333, 0.250842, 0.333333]]), **CLOSE)
    _, without = loss_and_gradient(args(proxy_beta=0.0))
    torch.testing.assert_close(without, torch.tensor([[0.333333, 0.296296, 0.333333]]), **CLOSE)


def test_the_proxy_is_a_distribution_on_what_is_kept():
    torch.manual_seed(0)
    for kappa in (0.0, 0.02, 0.3, 1.0):
        p = torch.randn(7).mul(3).softmax(0)
        old, q = proxy(torch.arange(7), p, kappa=kappa)
        kept = p >= kappa * p.max()
        torch.testing.assert_close(q.exp(), p * kept / p[kept].sum())
        assert (q[~kept] == -1e4).all() and q.isfinite().all() and q[p.argmax()] > -1e3
        torch.testing.assert_close(old, p.log())


@pytest.mark.parametrize("kappa", [0.0, 0.02])
def test_where_nothing_is_noise_the_proxy_is_the_policy_to_the_last_bit(kappa):
    torch.manual_seed(0)
    logits = torch.rand(50, 30) * (9 if kappa == 0 else 3)
    old, q = lp_reg.proxy_logp(torch.randint(30, (50,)), logits, args(kappa=kappa))
    assert torch.equal(old, q)
    now, adv, mask = old[None], -torch.ones(1, 50), torch.ones(1, 50, dtype=torch.bool)
    lowest, protected = lp_reg.protect(now, q[None], adv, mask, args(rho=1.0))
    assert lowest.all() and not protected.any()


@pytest.mark.parametrize("rho, n, k", [(0.05, 19, 0), (0.05, 20, 1), (0.1, 30, 3), (0.29, 100, 29), (1.0, 7, 7), (0.0, 9, 0)])
def test_so_many_of_the_least_likely_of_negative_advantage(rho, n, k):
    """Whatever stands at other tokens and in the padding: right ones may be less likely."""
    torch.manual_seed(0)
    mask = torch.rand(20, 20) < 0.8
    negative = torch.zeros_like(mask).flatten().index_fill(0, mask.flatten().nonzero()[:n, 0], True).view_as(mask)
    adv, now = torch.where(negative, -0.5, 0.5), torch.rand(20, 20) - 2
    now = torch.where(negative, now, now - 5).masked_fill(~mask, float("-inf"))
    adv[0] = torch.where(negative[0], adv[0], 0.0)
    lowest, protected = lp_reg.protect(now, now + 1, adv, mask, args(rho=rho))
    assert lowest.sum() == k and not (lowest & ~negative).any() and torch.equal(lowest, protected)
    if 0 < k < n:
        assert now[lowest].max() <= now[negative & ~lowest].min()


def test_without_negatives_or_tokens_nothing_is_protected():
    q = NEW + 1
    for adv, mask in ((-ADV, MASK), (0 * ADV, MASK), (ADV, ~MASK)):
        lowest, protected = lp_reg.protect(NEW, q, adv, mask, args(rho=1.0))
        assert not lowest.any() and not protected.any()
        loss, gradient = loss_and_gradient(args(rho=1.0), adv=adv, mask=mask, q=q)
        assert torch.tensor(loss).isfinite() and gradient.isfinite().all() and gradient.any() == (adv.any() and mask.any())


def test_the_pull_is_up_and_stops_growing_at_ten():
    """By exp(l) - 1, and not where K is cut off; far away it is finite."""
    q, now = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -3.5, -300.0]])
    logp = now.clone().requires_grad_()
    objective, _ = lp_reg.surrogate(logp, now, 0 * ADV, MASK, args(), q, MASK)
    torch.testing.assert_close(objective, -torch.tensor([[1.718282 - 1, 12.182494 - 2.5 - 1, 10.0]]))
    objective.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[1.718282, 11.182494, 0.0]]))


def test_on_average_it_is_the_gradient_of_the_forward_kl():
    """Over tokens that the policy samples: of KL(q, pi), on the logits of a softmax."""
    z, q = torch.tensor([0.3, -0.2, 0.9, 0.1], requires_grad=True), torch.tensor([0.2, 0.3, 0.4, 0.1])
    logp, all_of_them = z.log_softmax(0)[None], torch.ones(1, 4, dtype=torch.bool)
    objective, _ = lp_reg.surrogate(logp, logp.detach(), torch.zeros(1, 4), all_of_them, args(), q.log()[None], all_of_them)
    (mine,) = torch.autograd.grad(-(logp.detach().exp() * objective).sum(), z)
    (wanted,) = torch.autograd.grad((q * (q.log() - z.log_softmax(0))).sum(), z)
    torch.testing.assert_close(mine, wanted)


def test_protected_tokens_are_not_clipped():
    """Others are, where the interval is not open: a ratio of 0.5 and a negative advantage have no gradient left."""
    logp, clip = OLD + torch.tensor(0.5).log(), dict(eps_low=0.2, eps_high=0.28)
    for protected, slope in ((MASK, 0.5), (~MASK, 0.0)):
        moved = logp.clone().requires_grad_()
        objective, stats = lp_reg.surrogate(moved, OLD, ADV, MASK, args(proxy_beta=0.0, **clip), logp, protected)
        objective.sum().backward()
        torch.testing.assert_close(moved.grad, torch.full((1, 3), -slope))
        assert stats["clip_fraction"].all() == (slope == 0)


def test_with_nothing_to_protect_it_is_dapo_s_loss():
    """To the last bit, with its interval; by default the interval lets all ratios from 0 to 10 through."""
    logp, old_logp, adv, mask = example()
    nobody, found = torch.zeros_like(mask), []
    for script, a, more in ((lp_reg, args(eps_low=0.2, eps_high=0.28), (logp.detach() + 1, nobody)), (dapo, dapo.Args(), ())):
        moved = logp.detach().clone().requires_grad_()
        objective, _ = script.surrogate(moved, old_logp, adv, mask, a, *more)
        (objective * script.token_weights(mask, a))[mask].sum().backward()
        found.append((objective.detach(), moved.grad))
    assert all(torch.equal(x, y) for x, y in zip(*found))
    ratio = torch.tensor([[1e-6, 9.9, 11.0]])
    for sign, expected in ((1.0, [1e-6, 9.9, 10.0]), (-1.0, [-1e-6, -9.9, -11.0])):
        objective, _ = lp_reg.surrogate(OLD + ratio.log(), OLD, sign * torch.ones(1, 3), MASK, args(), OLD, ~MASK)
        torch.testing.assert_close(objective, torch.tensor([expected]))


def test_a_run_protects_and_kappa_0_is_the_null_control(tiny, tmp_path):
    """On policy with kappa = 0 nobody is, though all negatives could be, however the passes are cut; with noise filtered some
    are; and off policy some are with kappa = 0 as well: the policy as it then is has become less sure of them."""
    argv = "--task addition --steps 1 --prompts-per-step 8 --group-size 4 --eval-prompts 8".split()
    null, off = ("--kappa", 0, "--rho", 1, "--micro-batch-tokens", 64), ("--kappa", 0, "--rho", 1, "--minibatches", 2)
    stale = (*null[:4], "--stale", 1, "--steps", 3)  # the third step trains on what the policy before the second sampled
    rows = {}
    for name, more in dict(plain=(), null=null, off=off, stale=stale).items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "lp_reg.py")
        assert done.code == 0, done.err
        rows[name] = lines(tmp_path / name / "metrics.jsonl")[-1]
    plain, null, off = rows["plain"], rows["null"], rows["off"]
    tokens = plain["length"] * 32
    assert plain["lowest"] == int(0.05 * tokens * plain["negatives"] + 1e-3) > 1 and plain["ratio_max"] < 1.001
    assert null["lowest"] == pytest.approx(tokens * null["negatives"]) and null["protected"] == null["proxy_kl"] == 0
    assert 0 < plain["protected"] <= plain["lowest"] / tokens + 1e-9 and 0 < plain["proxy_kl"] < 0.1
    assert rows["stale"]["staleness"] == 1 and rows["stale"]["protected"] > 0.05
    assert 0.05 < off["protected"] < off["negatives"] and 0 < off["proxy_kl"]
    columns = lines(tmp_path / "plain" / "samples.jsonl")[0]["columns"]
    assert set(columns) == {"logp", "adv", "proxy", "protected"}
    found = [row["columns"] for row in lines(tmp_path / "off" / "samples.jsonl") if "columns" in row]
    assert any(row["adv"][0] < 0 and 0 < sum(row["protected"]) for row in found)
