"""D3S's worked numbers, the widest subset against all subsets, ties, tokens at stake, the schedule, and what a run does."""

import itertools

import pytest
import torch

from algos import d3s, grpo
from tests.helpers import ROOT, lines, run, tiny
from tests.test_objectives import batch

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
ROOT3 = 3**0.5
ADV = torch.tensor([[ROOT3, -1 / ROOT3, -1 / ROOT3, -1 / ROOT3], [0.0] * 4, [1.0, 1.0, -1.0, -1.0]])
A = torch.tensor([[ROOT3], [1.0], [-1.0], [-1.0]]).expand(4, 3)
H = torch.tensor([[0.1, 1.2, 0.4], [0.9, 0.05, 0.3], [0.2, 0.6, 0.8], [1.0, 0.1, 9.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()


def args(**changes):
    return d3s.Args(**dict(group_size=4) | changes)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def places(selected):
    return set(map(tuple, selected.nonzero().tolist()))


def loss(adv=A, share=0.2, ratio=1.0, **changes):
    a = args(**changes)
    selected = d3s.stakes(adv, H, MASK, share)
    old_logp = torch.full((4, 3), -1.0)
    logp = (old_logp + torch.tensor(ratio).log()).requires_grad_()
    objective, _ = d3s.surrogate(logp, old_logp, adv, MASK, a)
    value = -(objective * d3s.token_weights(MASK, a, selected))[MASK].sum()
    value.backward()
    return value.item(), logp.grad


def test_worked_numbers_of_completions():
    value = ADV.flatten()
    best = torch.stack([value[list(s)].var(correction=0) for s in itertools.combinations(range(12), 4)]).max()
    assert best.item() == pytest.approx(1.466506, abs=1e-6)
    for seed in range(5):
        found = d3s.chosen(ADV, 4 / 12, args(), chance(seed))
        kept = ADV[found].sort(descending=True).values
        torch.testing.assert_close(kept, torch.tensor([ROOT3, 1.0, -1.0, -1.0]), **CLOSE)  # as they were: the mean is 0.183
        assert kept.var(correction=0).item() == pytest.approx(1.466506, abs=1e-6)


def test_worked_numbers_of_tokens():
    assert places(d3s.stakes(A, H, MASK, 0.2)) == {(0, 1), (3, 0), (1, 0)}  # 0.2 of 11, rounded up
    assert places(d3s.stakes(A, H, MASK, 4 / 11)) == {(0, 1), (3, 0), (1, 0), (2, 2)}
    assert places(d3s.stakes(A, H, MASK, 5 / 11)) == {(0, 1), (3, 0), (1, 0), (2, 2), (0, 2)}
    by_entropy = d3s.stakes(A.sign(), H, MASK, 5 / 11)
    assert places(by_entropy) == {(0, 1), (3, 0), (1, 0), (2, 2), (2, 1)}  # the advantage decides between (0, 2) and (2, 1)


@pytest.mark.parametrize("norm, value, Z", [("selected", -0.577350, 3), ("all", -0.157459, 11)])
def test_worked_loss(norm, value, Z):
    found, gradient = loss(token_norm=norm)
    assert found == pytest.approx(value, abs=1e-6)
    wanted = torch.zeros(4, 3)
    wanted[0, 1], wanted[1, 0], wanted[3, 0] = -ROOT3 / Z, -1 / Z, 1 / Z
    torch.testing.assert_close(gradient, wanted, **CLOSE)


def test_worked_schedule():
    a = args(rows_first=4 / 12, rows_last=1.0, tokens_first=0.2, tokens_last=1.0)
    found = [[12 * n, k] for n, k in (d3s.shares(step, 5, a) for step in (0, 1, 2, 4, 6))]
    assert found == [pytest.approx(x) for x in ([4, 0.2], [6, 0.4], [8, 0.6], [12, 1.0], [12, 1.0])]
    assert d3s.shares(0, 1, a) == (4 / 12, 0.2)


def test_the_widest_of_all_subsets():
    g = torch.Generator().manual_seed(0)
    for trial in range(40):
        m = 9
        adv = torch.randn(m, generator=g) if trial % 2 else torch.randint(-2, 3, (m,), generator=g).float()
        for n in (1, 2, 3, 5, 8, 9):
            rows = d3s.widest(adv, n, torch.randperm(m, generator=g))
            assert len(rows.unique()) == n
            best = max(adv[list(s)].var(correction=0).item() for s in itertools.combinations(range(m), n))
            assert adv[rows].var(correction=0).item() == pytest.approx(best, abs=1e-3)  # it rounds


def test_chance_decides_between_equals():
    """Also where they differ in the last bits, as the z-scores of groups with as many right ones may."""
    adv = torch.tensor([1.0] * 20 + [-1.0] * 20).view(10, 4)
    counts = sum(d3s.chosen(adv, 0.25, args(), chance(seed)).long() for seed in range(200)).flatten()
    assert counts[:20].sum() == counts[20:].sum() == 1000 and counts.min() > 20 and counts.max() < 80
    assert torch.equal(d3s.chosen(adv, 0.25, args(), chance(3)), d3s.chosen(adv, 0.25, args(), chance(3)))
    noisy = adv * (1 + 1e-7 * torch.arange(40).view(10, 4) % 3)
    assert torch.equal(d3s.chosen(adv, 0.25, args(), chance(3)), d3s.chosen(noisy, 0.25, args(), chance(3)))


def test_neither_end_is_favoured():
    """Of one the variance is 0 whoever it is; of five of as many +1 as -1 three may be either."""
    one = [ADV[2][d3s.chosen(ADV[2:], 0.25, args(select="group"), chance(seed))[0]].item() for seed in range(100)]
    assert 25 < sum(x > 0 for x in one) < 75
    adv = torch.tensor([1.0] * 8 + [-1.0] * 8).view(4, 4)
    five = [adv[d3s.chosen(adv, 5 / 16, args(), chance(seed))].sum().item() for seed in range(100)]
    assert set(five) == {1.0, -1.0} and 25 < five.count(1.0) < 75


def test_within_groups_and_at_random():
    """Of each group its share; the batch's rule takes nobody from a group that says nothing."""
    group = d3s.chosen(ADV, 0.5, args(select="group"), chance())
    assert group.sum(1).tolist() == [2, 2, 2] and group[0, 0] and ADV[2][group[2]].sum() == 0
    whole = d3s.chosen(ADV, 0.5, args(), chance())
    assert whole.sum() == 6 and not whole[1].any() and whole[2].all() and whole[0, 0]
    found = [d3s.chosen(ADV, 0.5, args(select="random"), chance(seed)) for seed in range(100)]
    assert all(f.sum() == 6 for f in found)
    assert sum(f.long() for f in found).min() > 25  # none is favoured
    assert d3s.chosen(ADV, 0.001, args(), chance()).sum() == 1  # never nobody
    assert d3s.chosen(ADV, 1.0, args(), chance()).all()


@pytest.mark.parametrize("share", [0.2, 0.05, 0.8, 1.0])
@pytest.mark.parametrize("n", [0, 1, 5, 10, 37])
def test_exactly_so_many_tokens(n, share):
    mask = (torch.arange(40) < n).view(4, 10)
    key = torch.rand(4, 10).masked_fill(~mask, 99.0)
    for adv in (torch.ones(4, 1), -torch.ones(4, 1), torch.tensor([[0.0], [0.1], [-3.0], [2.0]])):
        selected = d3s.stakes(adv, key, mask, share).bool()
        there = bool((mask & (adv != 0)).any())
        assert selected.sum() == (-(-round(share * n, 6) // 1) if there else 0) and not (selected & ~mask).any()
    garbage = torch.where(mask, key, torch.nan)
    assert torch.equal(d3s.stakes(torch.ones(4, 1), garbage, mask, share), d3s.stakes(torch.ones(4, 1), key, mask, share))


def test_nothing_is_at_stake():
    """All advantages 0, or a policy that is sure of everything: no token, rather than any."""
    assert not d3s.stakes(torch.zeros(4, 3), H, MASK, 0.5).any()
    assert not d3s.stakes(A, torch.zeros(4, 3), MASK, 0.5).any()
    assert not d3s.stakes(A, H, torch.zeros_like(MASK), 0.5).any()
    value, gradient = loss(adv=torch.zeros(4, 3))
    assert value == 0 and not gradient.any()


def test_with_everything_it_is_grpo_with_a_mean_over_tokens():
    value, gradient = loss(share=1.0, ratio=1.3)
    old_logp = torch.full((4, 3), -1.0)
    logp = (old_logp + torch.tensor(1.3).log()).requires_grad_()
    objective, _ = grpo.surrogate(logp, old_logp, A, MASK, grpo.Args())
    base = -(objective[MASK] / 11).sum()
    base.backward()
    assert value == pytest.approx(base.item(), abs=1e-7)
    torch.testing.assert_close(gradient, logp.grad)
    assert loss(share=1.0, ratio=1.3, token_norm="all")[0] == pytest.approx(value, abs=1e-7)
    assert loss(ratio=1.3)[0] != pytest.approx(loss(ratio=1.3, eps=0.3)[0], abs=1e-3)


def test_weights_count_only_what_is_there():
    b = batch()
    selected = torch.where(b["mask"], 1.0, torch.nan)
    for norm in ("selected", "all"):
        found = d3s.token_weights(b["mask"], args(token_norm=norm), selected)
        torch.testing.assert_close(found, b["mask"] / b["mask"].sum())


def test_a_run_trains_on_what_it_has_chosen(tiny, tmp_path):
    """N and K of the schedule, in the third step, which a resume adds, still those of the end; nobody without an advantage."""
    argv = "--task addition --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    script = ROOT / "algos" / "d3s.py"
    runs = dict(it=("--steps", 2), flat=("--steps", 1, "--rows-first", 1, "--tokens-first", 1, "--token-norm", "all"))
    for name, more in runs.items():
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=script)
        assert done.code == 0, done.err
    assert run(tmp_path, "--resume", tmp_path / "it", "--steps", 3, script=script).code == 0
    rows = {name: lines(tmp_path / name / "metrics.jsonl") for name in runs}
    sizes = [row["kept"] / row["useful"] for row in rows["it"]]  # N, those without an advantage included
    assert sizes == pytest.approx([8, 24, 24])
    first, flat = rows["it"][0], rows["flat"][0]
    assert first["useful"] == 1 and first["prompts"] <= 8 and first["adv_var"] > 1.2 * flat["adv_var"] > 0
    assert flat["kept"] / flat["useful"] == pytest.approx(32) and flat["kept"] == pytest.approx(32 * flat["informative_groups"])
    assert first["trained"] < 0.08 < flat["trained"] <= 1
    columns = lines(tmp_path / "it" / "samples.jsonl")[0]["columns"]
    assert set(columns) == {"logp", "adv", "old_entropy", "selected"}


def test_equal_rewards_make_no_update(tiny, tmp_path):
    (tmp_path / "mine.py").write_text("def check(text, answer):\n    return 1.0\n")
    argv = ["--model", tiny, "--reward", f"{tmp_path}/mine.py:check", "--prompt-template", "{prompt}", "--eval-prompts", 8]
    argv += "--steps 1 --prompts-per-step 4 --group-size 4 --minibatches 2 --run-dir".split()
    done = run(tmp_path, *argv, tmp_path / "run", script=ROOT / "algos" / "d3s.py")
    assert done.code == 0, done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["kept"] == row["prompts"] == row["useful"] == row["trained"] == row["adv_var"] == 0 and "loss" not in row
