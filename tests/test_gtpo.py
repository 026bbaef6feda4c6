"""GTPO's worked numbers, conflicts at both ends, the entropy filter, gamma's bound, and what a run logs."""

import math

import pytest
import torch

from algos import grpo, gtpo
from tests.helpers import ROOT, contents, lines, run, tiny
from tests.test_objectives import batch

__all__ = ["tiny"]
CLOSE = dict(rtol=0, atol=1e-6)
PAD = 0


def args(**changes):
    return gtpo.Args(**dict(group_size=2) | changes)


def padded(rows):
    """Lists of ids -> ids, mask [B, T]."""
    T = max(map(len, rows))
    mask = torch.arange(T) < torch.tensor([len(r) for r in rows])[:, None]
    return torch.tensor([r + [PAD] * (T - len(r)) for r in rows]), mask


def weights(rows, adv, **changes):
    """lambda of groups of completions (lists of ids) with these A [P, G], as lists of the completions' lengths."""
    ids, mask = padded(rows)
    found = gtpo.conflicts(ids, mask, torch.tensor(adv), args(**changes))
    assert found.shape == mask.shape and (found[~mask] == 1).all()
    return [row[: len(r)].tolist() for row, r in zip(found, rows)]


def loss(entropy=(0.30, 0.50), initial=0.2, rows=((5, 6, 7, 2), (5, 8, 9, 2)), rewards=(1.0, 0.0), **changes):
    """Of one group, as the loop forms it -> loss, gradient, the advantages."""
    a, (ids, mask) = args(**changes), padded([list(r) for r in rows])
    adv = gtpo.advantages(torch.tensor([rewards]), a)
    conflict = gtpo.conflicts(ids, mask, adv, a)
    H = gtpo.mean_entropy(torch.tensor(entropy)[:, None].expand(mask.shape), mask).view_as(adv)
    adv = gtpo.shaped(adv, H, gtpo.admitted(H, initial, a), a)
    logp = torch.full(mask.shape, -1.3).requires_grad_()
    objective, _ = gtpo.surrogate(logp, logp.detach() - 0.7, adv.flatten()[:, None].expand(mask.shape), mask, a)
    value = -(objective * gtpo.token_weights(mask, a, conflict))[mask].sum()
    value.backward()
    return value.item(), logp.grad, adv


def test_worked_numbers():
    assert weights([[5, 6, 7, 2], [5, 8, 9, 2]], [[0.5, -0.5]]) == [[2, 1, 1, 2], [0, 1, 1, 0]]
    value, gradient, adv = loss()
    torch.testing.assert_close(adv, torch.tensor([[0.47, -0.55]]), **CLOSE)
    assert value == pytest.approx(-0.215, abs=1e-6)
    wanted = torch.tensor([[-0.1175, -0.05875, -0.05875, -0.1175], [0, 0.06875, 0.06875, 0]])
    torch.testing.assert_close(gradient, wanted, **CLOSE)


def test_worked_numbers_of_the_filter():
    value, gradient, adv = loss(entropy=(0.30, 0.90))
    assert value == pytest.approx(-0.3525, abs=1e-6) and adv[0, 1] == 0
    torch.testing.assert_close(gradient, torch.tensor([[-0.1175, -0.05875, -0.05875, -0.1175], [0.0] * 4]), **CLOSE)
    # An initial policy whose entropy was above the limit: nobody is left out.
    assert loss(entropy=(0.30, 0.90), initial=0.70)[2][0, 1].item() == pytest.approx(-0.59, abs=1e-6)
    assert loss(entropy=(0.30, 0.90), initial=0.69)[2][0, 1] == 0


def test_the_limit_is_ln_2():
    limit = args().max_entropy
    assert limit == pytest.approx(math.log(2), abs=1e-6)
    delta = gtpo.admitted(torch.tensor([[0.6931, 0.6932]]), 0.2, args())
    assert delta.tolist() == [[True, False]]
    assert gtpo.admitted(torch.tensor([[limit + 1e-7]]), limit, args(max_entropy=limit)).item() is False  # at it is not above


def test_the_released_code_is_not_this():
    """It sums over the group, so here G times as much: with runs of one token its other divisor is 1."""
    for entropy, theirs in (((0.30, 0.50), -0.430), ((0.30, 0.90), -0.705)):
        assert 2 * loss(entropy=entropy)[0] == pytest.approx(theirs, abs=1e-6)


def test_only_unbroken_runs_count():
    found = weights([[5, 6, 7, 8, 2], [5, 1, 7, 3, 4]], [[0.5, -0.5]])
    assert found == [[2, 1, 1, 1, 1], [0, 1, 1, 1, 1]]  # the shared 7 inside is no conflict
    found = weights([[5, 6, 9, 7, 2], [4, 6, 3, 7, 2]], [[0.5, -0.5]])
    assert found == [[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]]


def test_the_end_is_counted_from_each_one_s_last_token():
    """Other lengths: 8, 2 stand at other places from the start. A cut one (no 2 at its end) has no run there."""
    found = weights([[5, 6, 7, 8, 2], [3, 8, 2], [4, 4, 8]], [[2 / 3, -1 / 3, -1 / 3]])
    assert found == [[1, 1, 1, 2, 2], [1, 0, 0], [1, 1, 1]]


def test_overlapping_runs_multiply():
    assert weights([[5, 6, 2], [5, 6, 2]], [[0.5, -0.5]]) == [[4, 4, 4], [0, 0, 0]]  # the same text, another verdict
    # 5 5 and 5 5 5: two from the start, two from the end; the middle one is in both runs of the longer one alone
    assert weights([[5, 5], [5, 5, 5]], [[0.5, -0.5]], conflict_wrong=0.5) == [[4, 4], [0.5, 0.25, 0.5]]
    assert weights([[5, 5, 5], [5, 5]], [[0.5, -0.5]]) == [[2, 4, 2], [0, 0]]


def test_a_conflict_needs_both_signs_and_zero_takes_no_part():
    assert weights([[5, 2], [5, 2]], [[0.5, 0.5]]) == [[1, 1], [1, 1]]
    assert weights([[5, 2], [5, 2]], [[0.0, 0.0]]) == [[1, 1], [1, 1]]
    assert weights([[5, 2], [5, 2], [6, 6]], [[0.5, 0.0, -0.5]]) == [[1, 1], [1, 1], [1, 1]]
    found = weights([[5, 2], [5, 2], [5, 9]], [[0.5, 0.0, -0.5]])
    assert found == [[2, 1], [1, 1], [0, 1]]
    # Conflicting tokens may come from several siblings: 5 is shared with the second, 6 with the third.
    found = weights([[5, 6, 1], [5, 9, 8], [7, 6, 3]], [[2 / 3, -1 / 3, -1 / 3]])
    assert found == [[2, 2, 1], [0, 1, 1], [1, 1, 1]]  # the third one's own run is broken at once
    assert weights([[5, 2], [5, 2], [6, 3]], [[0.5, -1e-8, -0.5]]) == [[1, 1]] * 3  # rounding is no sign
    assert weights([[5, 2], [5, 2], [6, 3]], [[-0.5, 1e-8, 0.5]]) == [[1, 1]] * 3


def test_groups_do_not_mix():
    one, two = [[5, 6, 2], [5, 9, 2]], [[5, 6], [7, 6, 6]]
    both = weights(one + two, [[0.5, -0.5], [-0.5, 0.5]])
    assert both == weights(one, [[0.5, -0.5]]) + weights(two, [[-0.5, 0.5]]) == [[2, 1, 2], [0, 1, 0], [1, 0], [1, 1, 2]]


def slowly(rows, adv, right, wrong):
    """lambda by its definition, in loops."""
    out = [[1.0] * len(r) for r in rows]
    for turn in (lambda r: r, lambda r: r[::-1]):
        for i, mine in enumerate(rows):
            for t, token in enumerate(turn(mine)):
                sides = {adv[j] > 0 for j, other in enumerate(rows) if adv[j] and turn(other)[t : t + 1] == [token]}
                if len(sides) < 2:
                    break
                place = t if turn(mine) is mine else len(mine) - 1 - t
                out[i][place] *= right if adv[i] > 0 else wrong if adv[i] < 0 else 1.0
    return out


def test_against_the_definition():
    """Three tokens of which one is the padding's: runs, breaks and overlaps of all kinds; empty completions, too."""
    g = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        rows = [torch.randint(3, (int(n),), generator=g).tolist() for n in torch.randint(5, (5,), generator=g)]
        adv = (torch.randint(3, (5,), generator=g) - 1.0).tolist()
        if any(rows):
            found = weights(rows, [adv], conflict_right=3.0, conflict_wrong=0.5)
            assert found == slowly(rows, adv, 3.0, 0.5)
            seen |= {w for row in found for w in row}
    assert seen == {1.0, 3.0, 9.0, 0.5, 0.25}


def test_padding_matches_nothing():
    """Whatever ids stand there; and a pad is no token 0."""
    ids, mask = padded([[5, 0], [5, 0, 0, 2], []])
    adv = torch.tensor([[0.5, -0.5, 0.0]])
    found = gtpo.conflicts(ids, mask, adv, args())
    other = gtpo.conflicts(torch.where(mask, ids, 2), mask, adv, args())
    torch.testing.assert_close(found, other)
    assert found[0].tolist() == [2, 2, 1, 1] and found[1].tolist() == [0, 0, 1, 1]
    nothing = gtpo.conflicts(ids, torch.zeros_like(mask), adv, args())
    assert (nothing == 1).all()


def test_a_group_with_equal_rewards_is_left_out():
    for rewards in ((1.0, 1.0), (0.0, 0.0)):
        value, gradient, adv = loss(rewards=rewards)
        assert value == 0 and not gradient.any() and not adv.any()
    both = gtpo.shaped(torch.tensor([[0.5, 0.0, -0.5], [0.0] * 3]), torch.full((2, 3), 0.4), torch.ones(2, 3).bool(), args())
    torch.testing.assert_close(both, torch.tensor([[0.46, -0.04, -0.54], [0.0] * 3]), **CLOSE)  # A of 0, but in a mixed group


@pytest.mark.parametrize("G", [2, 8, 14, 15, 16])
def test_gamma_s_bound(G):
    """The least advantage of a right completion is 1/G, the most that passes the filter costs gamma ln 2."""
    a = args(group_size=G)
    adv = gtpo.advantages(torch.tensor([[1.0] * (G - 1) + [0.0]]), a)
    entropy = torch.full((1, G), math.log(2) - 1e-3)
    found = gtpo.shaped(adv, entropy, gtpo.admitted(entropy, 0.2, a), a)
    assert bool((found[0, :-1] > 0).all()) == (G <= 14) and found[0, -1] < 0


def test_mean_entropy():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    entropy = torch.tensor([[0.1, 0.2, 0.6], [0.5, math.nan, math.inf], [math.nan] * 3])
    torch.testing.assert_close(gtpo.mean_entropy(entropy, mask), torch.tensor([0.3, 0.5, 0.0]))


def test_the_surrogate_is_the_policy_gradient_wherever_the_policy_is():
    """No ratio to the policy that sampled, no clipping: value A, gradient A, also far from old_logp."""
    b = batch(spread=3.0)
    logp = b["logp"].clone().requires_grad_()
    objective, stats = gtpo.surrogate(logp, b["old_logp"], b["adv"], b["mask"], args())
    assert torch.equal(objective.detach(), b["adv"]) and stats == {}
    objective.sum().backward()
    assert torch.equal(logp.grad, b["adv"] * b["mask"])


def test_without_its_parts_it_is_grpo_on_policy():
    """lambda 1 everywhere, no price, no filter: GRPO's gradient at ratio 1, of advantages that std does not divide."""
    off = dict(conflict_right=1.0, conflict_wrong=1.0, gamma=0.0, max_entropy=1e9)
    rows = [[5, 6, 7, 2], [5, 8, 2]]
    value, gradient, adv = loss(entropy=(0.3, 5.0), rows=rows, **off)
    assert adv.tolist() == [[0.5, -0.5]]
    _, mask = padded(rows)
    logp = torch.full(mask.shape, -1.3).requires_grad_()
    objective, _ = grpo.surrogate(logp, logp.detach(), adv.view(2, 1).expand(mask.shape), mask, grpo.Args())
    base = -(objective * grpo.token_weights(mask, grpo.Args()))[mask].sum()
    base.backward()
    assert value == base.item() and torch.equal(gradient, logp.grad)


@pytest.mark.parametrize("changes", [
    dict(gamma=0.2), dict(max_entropy=0.4), dict(conflict_right=1.0), dict(conflict_wrong=0.5)
])  # fmt: skip
def test_every_flag_changes_the_loss(changes):
    assert abs(loss(**changes)[0] - loss()[0]) > 1e-3 and not torch.equal(loss(**changes)[1], loss()[1])


def test_a_run_logs_its_conflicts(tiny, tmp_path):
    """And measures the starting policy's entropy once. On addition it is above ln 2, so nobody is left out; below another
    limit, somebody is."""
    argv = "--task addition --steps 2 --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
    rows, initial = {}, {}
    for name in ("it", "off"):
        above = initial["it"] + 0.05 if initial else 0  # the start's own entropy is what there is by chance
        more = ("--max-entropy", above, "--conflict-right", 1, "--conflict-wrong", 1) if name == "off" else ()
        done = run(tmp_path, *argv, *more, "--run-dir", tmp_path / name, script=ROOT / "algos" / "gtpo.py")
        assert done.code == 0, done.err
        rows[name] = lines(tmp_path / name / "metrics.jsonl")
        state = contents(tmp_path / name / "checkpoints" / "step-000002")
        initial[name] = state["state"]["initial_entropy"]
    assert initial["it"] == initial["off"] and math.log(2) < initial["it"]
    for row in rows["it"]:
        assert 0 < row["lifted"] < row["conflict"] < 1 and row["entropy_conflict"] > 0 and row["delta"] == 1
        assert row["adv_mean"] == pytest.approx(-0.1 * row["informative_groups"] * initial["it"], rel=0.3)  # -gamma H
        mean = row["conflict"] * row["entropy_conflict"] + (1 - row["conflict"]) * row["entropy_rest"]
        assert mean == pytest.approx(row["entropy"], rel=0.1)
    assert all(row["conflict"] == row["lifted"] == 0 and 0.2 < row["delta"] < 0.95 for row in rows["off"])
    columns = lines(tmp_path / "it" / "samples.jsonl")[0]["columns"]
    assert set(columns) == {"logp", "adv", "old_entropy", "conflict"} and set(columns["conflict"]) <= {0.0, 1.0, 2.0, 4.0}
