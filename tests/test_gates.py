"""How hard a token is pushed, against each method's formula, and the picture of it."""

import json
import math

import pytest
import torch

from algos import cispo, dcpo, dhpo, gmpo, grpo, gspo, minpro, rloo, sapo
from runs import gates
from tests.test_compare import drawn, titles

R = gates.RATIOS


def at(weights, ratio):
    """The weight at the ratio nearest to one."""
    return weights[(R.log() - math.log(ratio)).abs().argmin()].item()


def clipped(sign, low, high, value=lambda r: r):
    """What a clipped ratio gives at r: its own weight, or none outside on the side where the clip acts."""
    return torch.where(R < high if sign > 0 else R > low, value(R), 0.0)


def test_ratios_reach_from_an_eighth_to_eight():
    assert R[0].item() == pytest.approx(1 / 8) and R[-1].item() == pytest.approx(8) and R[len(R) // 2].item() == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_token_level(sign):
    own, others = gates.gate(grpo, sign)
    torch.testing.assert_close(own, clipped(sign, 0.8, 1.2))
    assert (others == 1).all()
    own, others = gates.gate(cispo, sign)
    torch.testing.assert_close(own, R.clamp(max=5))
    assert (others == 1).all()
    tau = sapo.Args.tau_pos if sign > 0 else sapo.Args.tau_neg
    s = torch.sigmoid(tau * (R - 1))
    own, _ = gates.gate(sapo, sign)
    torch.testing.assert_close(own, 4 * R * s * (1 - s))
    assert 1.5 < own.max() < 1.6 and at(own, 8) < 0.05  # it rises, then falls to almost nothing
    own, others = gates.gate(minpro, sign)
    torch.testing.assert_close(own, R.clamp(max=5))
    torch.testing.assert_close(others, R.clamp(max=1))  # the least ratio before them


@pytest.mark.parametrize("sign", [1, -1])
def test_all_tokens_together(sign):
    """Where all move alike, the geometric mean of the ratios is the ratio, and their product its eighth power."""
    torch.testing.assert_close(gates.gate(gspo, sign, together=True)[0], clipped(sign, 1 - 3e-4, 1 + 4e-4))
    torch.testing.assert_close(gates.gate(gmpo, sign, together=True)[0], clipped(sign, math.exp(-0.4), math.exp(0.4)))
    own, others = gates.gate(rloo, sign, together=True)
    edge = 1.2 ** (1 / gates.T), 0.8 ** (1 / gates.T)
    inside = (R < edge[0]) & (R > edge[1])
    torch.testing.assert_close(own[inside], R[inside] ** gates.T)
    assert (own == others).all() and at(own, 2 if sign > 0 else 1 / 2) == 0
    torch.testing.assert_close(gates.gate(minpro, sign, together=True)[0], (R * R).clamp(max=5))
    # one token of eight moves the mean by its eighth root
    torch.testing.assert_close(gates.gate(gspo, sign)[0], clipped(sign, 1 - 1e-4, 1 + 1e-4, lambda r: r ** (1 / gates.T)))
    torch.testing.assert_close(gates.gate(grpo, sign, together=True)[0], gates.gate(grpo, sign)[0])


def test_no_ratio_makes_a_probability_above_one():
    own, others = gates.gate(dcpo, 1, probability=0.3)
    possible = R <= 1 / 0.3
    assert own[possible].isfinite().all() and own[~possible].isnan().all() and others[~possible].isnan().all()
    assert gates.gate(dcpo, 1, probability=0.05)[0].isfinite().all()


def test_panels_and_which_share_one():
    assert list(gates.panels("grpo", grpo)) == ["grpo"]
    assert list(gates.panels("dhpo", dhpo)) == ["dhpo, one token moved", "dhpo, all tokens moved"]
    assert list(gates.panels("dcpo", dcpo)) == [f"dcpo, pi_old = {q}" for q in (0.9, 0.3, 0.05)]
    one, other = gates.panels("a", grpo)["a"], gates.panels("b", sapo)["b"]
    found = gates.merged(dict(a=one, b=other, c=one))
    assert list(found) == ["a, c", "b"] and found["a, c"]["+1"][0][0] == 0.125
    nothing = gates.merged(dict(a={"+1": [torch.tensor([float("nan"), 1 / 3])]}))
    assert nothing == dict(a={"+1": [[None, 0.33333]]})


def test_the_picture(tmp_path, monkeypatch):
    pictures = drawn(monkeypatch)
    gates.main(tmp_path / "gates")
    record = json.loads((tmp_path / "gates.json").read_text())
    assert len(record["ratios"]) == len(R) and (tmp_path / "gates.png").stat().st_size > 50_000
    assert ["".join(title.split()) for title in titles(pictures)[0]] == ["".join(title.split()) for title in record["gates"]]
    first = next(iter(record["gates"])).split(", ")
    assert first[0] == "grpo" and {"dr_grpo", "reinforce"} < set(first) and "rto" not in str(list(record["gates"]))
    [axes] = pictures
    assert [tick.get_text() for tick in axes[-1].get_xticklabels()] == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]
