"""PTP: the card's numbers, what the world asks of a memory, how a plan is made and chosen, and the script as it is run."""

import functools
import itertools
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from algos import ptp as script
from common import UserError, settings
from tests.helpers import ROOT, checkpoints, contents, die_at, lines, outcome, run, same, user_error

PTP = ROOT / "algos" / "ptp.py"
SMALL = "--steps 4 --batch-size 16 --width 16 --episodes 6 --demonstrations 5 --diffusion-steps 4".split()


def arguments(**changes):
    args = script.Args(**dict(width=16, diffusion_steps=6, episodes=4) | changes)
    args.horizon = args.horizon or args.context + 7
    return args


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def column(*numbers):
    """-> [1, H, 1]"""
    return torch.tensor(numbers, dtype=torch.float64)[None, :, None]


# ---------------------------------------------------------------- the objective


@pytest.mark.parametrize("past, loss", [(-1, 0.096667), (0, 0.083333), (1, 0.1025), (2, 0.114), (3, 0.096667)])
def test_worked_losses(past, loss):
    """With the gradient 2 (prediction - noise) / |S| in S, and none before it."""
    prediction, noise = column(0.1, 0.4, -0.2, 1, 0.5, 0).requires_grad_(), column(0, 0, 0.2, 0.6, 0.5, 0.3)
    found = script.past_token_loss(prediction, noise, arguments(context=4, horizon=6, past=past))
    found.sum().backward()
    assert found.tolist() == [pytest.approx(loss, abs=1e-6)]
    first = dict(zip((-1, 0, 1, 2, 3), (0, 3, 2, 1, 0)))[past]
    expected = 2 * (prediction.detach() - noise) / (6 - first)
    expected[:, :first] = 0
    torch.testing.assert_close(prediction.grad, expected)


def test_the_loss_is_a_mean_over_numbers_of_an_action_and_a_window_each():
    prediction, noise = torch.randn(2, 3, 9, 2, generator=generator()).double()
    args = arguments(context=4, horizon=9, past=1)
    found = script.past_token_loss(prediction, noise, args)
    by_hand = [sum((prediction[b, h] - noise[b, h]).square().sum() for h in range(2, 9)) / (7 * 2) for b in range(3)]
    torch.testing.assert_close(found, torch.stack(by_hand))


def test_worked_noising():
    half, quarter = torch.full((1, 1, 1), 0.5).double(), torch.tensor([0.25]).double()
    assert script.noised(2 * half, half, quarter).item() == pytest.approx(0.933013, abs=1e-6)
    found = script.alpha_bar(100)
    assert [found[k].item() for k in (0, 1, 49, 98, 99)] == [
        pytest.approx(x, rel=2e-6) for x in (0.999369, 0.998252, 0.493844, 2.42857e-4, 2.42857e-7)
    ]
    mixed = script.noised(torch.ones(3, 2, 1), torch.zeros(3, 2, 1), torch.tensor([1.0, 0.25, 0.0]))
    assert mixed[:, :, 0].tolist() == [[1, 1], [0.5, 0.5], [0, 0]]  # a level for each row


def test_worked_choice():
    candidates = torch.tensor([[[0.1, 0.2, 0.3, 9], [0, 0.25, 0.1, 9], [0.3, 0.2, 0.2, 9]]]).double()[..., None]
    best, scores = script.choose(candidates, column(0, 0.2, 0.3))
    assert best.tolist() == [0] and scores[0].tolist() == pytest.approx([0.003333, 0.014167, 0.033333], abs=1e-6)
    both = torch.cat([candidates, candidates.flip(1)])
    best, _ = script.choose(both, column(0, 0.2, 0.3).expand(2, -1, -1))  # rows are apart
    assert best.tolist() == [0, 2]


# ---------------------------------------------------------------- the world


def player(n, random, T, remembers):
    """Who sees the last T observations, and at 0 goes where `remembers` says: [n, T] -> who goes down, [n]. All else it does
    as demonstrations do, of which two observations are enough: from 0 it has only just come where it moves away from it."""
    speed = 0.2 + 0.15 * torch.rand(n, generator=random)

    def act(seen, state):
        window = torch.stack(([seen[0]] * T + seen)[-T:], 1)
        now, at = window[:, -1], window.abs() < 0.12
        stands = at.flip(1).long().cumprod(1).sum(1)
        leaves = (stands > 1) & (torch.rand(n, generator=random) < 1 / 3) | (stands > 6)
        away = torch.where(remembers(window), -1.0, 1.0)
        falls = (now > 0.9) | (window[:, -2] > now + 0.05)
        moving = torch.where(now < -0.12, -1.0, torch.where(falls, 0.0, 1.0))
        target = torch.where(at[:, -1], torch.where(leaves, away, 0.0), moving)
        return (target - now).clamp(-speed, speed)

    return act


def share(remembers, T, n=1000):
    random = generator()
    act = player(n, random, T, lambda window: remembers(window, random))
    return {k: v.double().mean().item() for k, v in script.judged(script.play(act, n, random)[2]).items()}


def test_sixteen_observations_are_enough():
    found = share(lambda window, _: (window > 0.5).any(1), 16)
    assert found["success"] >= 0.95, found


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_two_observations_are_not(p):
    """Whoever leaves 0 upwards with probability p, at each departure anew: all departures until the first one down, and the
    share of them that are a success, which is at most 1/4; the world's own count is the same."""
    chances = {}
    for ways in itertools.product("ud", repeat=6):  # longer ones: p^6 at most, none of them right
        path = "".join(ways).partition("d")
        path = path[0] + path[1]
        chances[path] = p ** path.count("u") * (1 - p) ** path.count("d")
    assert sum(chances.values()) == pytest.approx(1)

    def right(path):  # 5 steps away and 5 back, the last one down to stay
        states = [x for way in path for x in ([0.5, 1, 0.5, 0] if way == "u" else [-0.5, -1, -1, -1])]
        return script.judged(torch.tensor([states]))["success"].item()

    exact = sum(chance for path, chance in chances.items() if right(path))
    assert exact == pytest.approx(p * (1 - p)) and exact <= 0.25
    played = share(lambda window, random: torch.rand(len(window), generator=random) > p, 2)["success"]
    assert played == pytest.approx(exact, abs=0.05)  # a standard error is 0.014; 40 steps hold what comes up twice or so


@functools.cache
def demonstrated(n=2000):
    random = generator(3)
    return script.play(script.demonstrator(n, random), n, random)


def test_demonstrations():
    """All succeed; the label is the clean action towards the target, so that errors are mended; pauses are as they should be,
    and neither they nor where the point stands say which way it goes."""
    observations, actions, states = demonstrated()
    found = script.judged(states)
    assert all(which.all() for which in found.values())
    before = torch.cat([torch.zeros(len(states), 1), states[:, :-1]], 1)
    assert (states - before - actions).std().item() == pytest.approx(0.02, rel=0.05)
    assert (observations - before).std().item() == pytest.approx(0.02, rel=0.05)
    speeds = actions.abs().amax(1)
    assert 0.2 <= speeds.min() < 0.205 and 0.345 < speeds.max() <= 0.35
    waits, here = [[], []], []
    for speed, moves, place in zip(speeds.tolist(), actions.tolist(), before.tolist()):
        up = next(t for t in range(40) if moves[t] > 0.15)
        top = next(t for t in range(40) if place[t] > 0.85)
        back = next(t for t in range(top, 40) if place[t] <= speed)  # from there it reaches 0
        down = next(t for t in range(back + 1, 40) if moves[t] < -0.15)
        waits[0].append(up)
        waits[1].append(down - back - 1)
        here.append((place[up], place[down]))
    for some in waits:
        counts = torch.tensor(some).bincount(minlength=7) / len(some)
        expected = [0, *((2 / 3) ** k / 3 for k in range(5)), (2 / 3) ** 5]
        torch.testing.assert_close(counts, torch.tensor(expected), rtol=0, atol=0.035)
    means = torch.tensor(here).mean(0)
    assert means.abs().max() < 0.003
    torch.testing.assert_close(script.play(script.demonstrator(5, generator(3)), 5, generator(4))[1][:, 0].abs() < 0.1,
                               torch.ones(5, dtype=torch.bool))  # fmt: skip


UP, DOWN = [0.5, 0.9, 1, 0.4, 0], [-0.5, -0.9, -1, -1, -1]


@pytest.mark.parametrize("states, success, one_visit, end", [
    (UP + DOWN, 1, 1, 1),
    (UP + UP + DOWN, 0, 0, 1),
    (DOWN + DOWN, 0, 0, 1),
    (UP + DOWN[:3] + [-0.7], 0, 1, 0),
    (UP + [-0.5, -0.8, -0.8], 0, 0, 1),  # near enough at the end, and yet no visit
    (UP + DOWN + [0, 0.9] + DOWN, 0, 0, 1),
    (UP + DOWN + [0] + DOWN, 1, 1, 1),
    ([0.9, 0.8, 0.9, 0.4] + DOWN, 1, 1, 1),  # trembles at the top: one visit
    ([0.9, 0.4, 0.9, 0.4] + DOWN, 0, 0, 1),
    (UP + DOWN + [-1.3], 0, 1, 0),
    ([-0.9] + UP + DOWN, 0, 0, 1),
])  # fmt: skip
def test_what_is_a_success(states, success, one_visit, end):
    found = script.judged(torch.tensor([[0.0], [1.0]]) + torch.tensor([states]) * torch.tensor([[1.0], [0.0]]))
    assert {k: v[0].item() for k, v in found.items()} == dict(success=success, one_visit=one_visit, end=end)
    assert not found["success"][1]  # who is always at the top


# ---------------------------------------------------------------- windows, plans


def test_windows_have_the_current_action_behind_the_past():
    """At T - 1, where the last observation is of the same time; before the episode the first observation and no moves."""
    args = arguments(context=4, horizon=9)
    times = torch.arange(1.0, 41)[None].expand(2, -1) + torch.tensor([[0.0], [100.0]])
    observations, actions = script.windows(times, -times, args)
    assert observations.shape == (80, 4) and actions.shape == (80, 9, 1)
    torch.testing.assert_close(actions[:, 3, 0], -observations[:, 3])
    assert observations[0].tolist() == [1, 1, 1, 1] and observations[42].tolist() == [101, 101, 102, 103]
    assert actions[0, :, 0].tolist() == [0, 0, 0, -1, -2, -3, -4, -5, -6]
    assert actions[42, :, 0].tolist() == [0, -101, -102, -103, -104, -105, -106, -107, -108]
    assert actions[39, :, 0].tolist() == [-37, -38, -39, -40, 0, 0, 0, 0, 0]


def test_the_scale_of_actions():
    actions = torch.tensor([[-0.2, 0.6], [0.0, 0.1]])
    policy = script.DiffusionPolicy(arguments(), actions)
    torch.testing.assert_close(policy.scaled(actions), torch.tensor([[-1.0, 1.0], [-0.5, -0.25]]))
    torch.testing.assert_close(policy.unscaled(policy.scaled(actions)), actions)
    constant = script.DiffusionPolicy(arguments(), torch.full((2, 3), 0.3))
    assert constant.scaled(torch.full((2,), 0.3)).tolist() == [0, 0]
    assert constant.unscaled(torch.zeros(1)).item() == pytest.approx(0.3)


def exact(clean):
    """A denoiser that knows the clean trajectories [n, H]: the noise that is in what it is given."""
    levels = script.alpha_bar(6)

    def average(noisy, k, observations):
        level = levels[k][:, None, None]
        return ((noisy - level.sqrt() * clean[..., None]) / (1 - level).sqrt()).to(noisy)

    return average


@pytest.mark.parametrize("reach, inside", [(0.9, True), (3.0, False)])
def test_sampling_gives_what_the_denoiser_knows(reach, inside):
    """The posterior's steps lead from noise to the clean actions, cut at -1 and 1."""
    args = arguments(context=4, horizon=9)
    policy = script.DiffusionPolicy(args, torch.tensor([-1.0, 1.0])).double()
    clean = reach * torch.rand(5, 9, generator=generator()).double() - reach / 2
    del policy.average
    policy.average = exact(clean)
    found = policy.sample(torch.zeros(5, 4).double(), generator(), args)
    torch.testing.assert_close(found[..., 0], clean.clamp(-1, 1))
    assert torch.equal(found[..., 0].abs() < 1, clean.abs() < 1) and (clean.abs() < 1).all() == inside


def test_a_step_of_sampling_is_the_posterior():
    """Of x_{k-1} given x_k and the clean actions, by Bayes: its mean, its spread, and nothing of x_k besides."""
    args = arguments(context=2, horizon=2, diffusion_steps=2)
    policy = script.DiffusionPolicy(args, torch.tensor([-1.0, 1.0])).double()
    del policy.average
    asked, n = [], 20000

    def average(noisy, k, observations):
        asked.append((int(k[0]), noisy.clone()))
        return torch.zeros_like(noisy)

    policy.average = average
    policy.sample(torch.zeros(n, 2).double(), generator(), args)
    (first, x), (second, y) = asked
    a, b = script.alpha_bar(2).tolist()
    assert (first, second) == (1, 0)
    clean, alpha = (x / b**0.5).clamp(-1, 1), b / a
    # likelihood N(x; sqrt(alpha) y, 1 - alpha), prior N(y; sqrt(a) clean, 1 - a)
    precision = alpha / (1 - alpha) + 1 / (1 - a)
    mean = (alpha**0.5 * x / (1 - alpha) + a**0.5 * clean / (1 - a)) / precision
    assert (y - mean).mean().abs() < 0.01 and (y - mean).std().item() == pytest.approx(precision**-0.5, rel=0.02)
    assert torch.corrcoef(torch.stack([(y - mean).flatten(), x.flatten()]))[0, 1].abs() < 0.02


def planner(args, fill):
    """A policy whose samples are `fill`, [rows, H], and what it was asked for."""
    asked = []

    def sample(observations, random, args):
        asked.append(observations)
        return fill(len(observations))[..., None]

    policy = SimpleNamespace(sample=sample)
    policy.plan = functools.partial(script.DiffusionPolicy.plan, policy)
    return policy, asked


def test_a_plan_is_chosen_once_there_is_a_whole_past():
    """Of 3 candidates the last recalls what was done; before that one is drawn, and executed is what follows on the past."""
    args = arguments(context=4, horizon=8, samples=3, execute=2)
    trajectories = torch.tensor([[0.5] * 3 + [1, 1, 1, 1, 1], [0.4] * 3 + [2.0] * 5, [0.1, 0.2, 0.3, 3, 4, 5, 6, 7]])
    policy, asked = planner(args, lambda rows: trajectories[:1].expand(rows, -1) if rows == 2 else trajectories.repeat(2, 1))
    done = [torch.full((2,), x) for x in (9.0, 0.1, 0.2, 0.3)]
    plan, error = policy.plan([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], done[:2], generator(), args)
    assert plan.tolist() == [[1, 1], [1, 1]] and error is None
    assert asked[-1].tolist() == [[1, 1, 1, 3], [2, 2, 2, 4]]  # before the episode: its first observation
    seen = [torch.tensor([float(t), -float(t)]) for t in range(5)]
    plan, error = policy.plan(seen, done, generator(), args)
    assert plan.tolist() == [[3, 4], [3, 4]] == policy.plan(seen, done[1:], generator(), args)[0].tolist()  # 3 are enough
    assert asked[-1].tolist() == [[1, 2, 3, 4]] * 3 + [[-1, -2, -3, -4]] * 3
    assert error == pytest.approx(sum((0.5 - x) ** 2 for x in (0.1, 0.2, 0.3)) / 3)  # of the first candidate, not of the best
    plan, _ = policy.plan(seen, done, generator(), arguments(**vars(args) | dict(execute=5)))
    assert plan.tolist() == [[3, 4, 5, 6, 7]] * 2


def test_roll_outs_execute_what_is_planned():
    """And compare the past on the scale of the actions: the unscaled move is another number."""
    args = arguments(context=4, horizon=8, execute=3, episodes=2)
    policy = script.DiffusionPolicy(args, torch.tensor([-0.2, 0.6]))
    heard = []

    def plan(seen, done, random, args):
        heard.append((len(seen), [x.clone() for x in done]))
        return torch.full((2, 3), 0.5), 0.25 if len(done) >= 3 else None

    policy.plan = plan
    actions, states, error = script.roll_out(policy, args, 5)
    assert actions.unique().tolist() == [pytest.approx(0.4)] and actions.shape == states.shape == (2, 40)
    assert [n for n, _ in heard] == list(range(1, 41, 3)) and [len(done) for _, done in heard] == list(range(0, 40, 3))
    assert heard[-1][1][0].tolist() == [0.5, 0.5] and error == 0.25


def test_the_average_acts_and_the_network_learns():
    args = arguments(ema=0.75)
    policy = script.DiffusionPolicy(args, torch.tensor([-1.0, 1.0]))
    assert {p.requires_grad for p in policy.average.parameters()} == {False}
    again = script.DiffusionPolicy(args, torch.tensor([-1.0, 1.0]))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters()))
    policy.average.update_parameters(policy.net)  # the first one copies
    first = policy.net.step.weight.detach().clone()
    seen = torch.zeros(1, 16)
    before = policy.sample(seen, generator(), args)
    with torch.no_grad():
        for weight in policy.net.parameters():
            weight.add_(1.0)
    assert torch.equal(policy.sample(seen, generator(), args), before)
    policy.average.update_parameters(policy.net)
    torch.testing.assert_close(policy.average.module.step.weight, first + 0.25)
    assert not torch.equal(policy.sample(seen, generator(), args), before)
    other = script.DiffusionPolicy(arguments(seed=2), torch.tensor([-1.0, 1.0]))
    assert not torch.equal(other.net.step.weight, first)


def test_predictability():
    """1 where an action follows from the one before it, 0 where it does not; of the demonstrations, in between."""
    falls = 0.9 ** torch.arange(30.0)
    assert script.predictability(torch.stack([falls, falls]), bins=1000) == pytest.approx(1, abs=1e-3)
    assert script.predictability(torch.randn(50, 40, generator=generator())) == pytest.approx(0, abs=0.02)
    now = torch.tensor([[0.0, 1, 0, 3, 2, 1]])  # bins 0: next 1, 3; 1: next 0; 2: next 1; 3: next 2
    after = torch.tensor([1.0, 0, 3, 2, 1])
    expected = 1 - (2 / 5) / after.var(correction=0).item()
    assert script.predictability(now, bins=4) == pytest.approx(expected)
    assert 0.4 < script.predictability(demonstrated()[1]) < 0.7
    assert math.isfinite(script.predictability(torch.zeros(2, 5)))


def test_told():
    before, after = dict(success=0.01), dict(success=0.5, one_visit=0.75, end=0.6, prompts=200)
    assert script.told(before, after) == "success 0.01 -> 0.50 (one visit to the top 0.75, end 0.60) on 200 episodes"


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptp")
    flags = ["--checkpoint-every", 2, "--eval-every", 2, "--samples", 2, "--warmup-steps", 1]
    done = run(folder, *SMALL, *flags, "--run-dir", folder / "run", script=PTP)
    assert done.code == 0, done.err
    return folder / "run", done, flags


def test_what_a_run_says(whole):
    folder, done, _ = whole
    evals, rows = lines(folder / "evals.jsonl"), lines(folder / "metrics.jsonl")
    assert [row["step"] for row in evals] == [0, 2, 4] and evals[-1]["prompts"] == 6
    names = ["step", "success", "one_visit", "end", "recall_error", "predictability", "of_demonstrations", "prompts"]
    assert [*evals[0]] == names and len({row["of_demonstrations"] for row in evals}) == 1
    ends = f"{evals[0]['success']:.2f} -> {evals[-1]['success']:.2f}"
    parts = f"one visit to the top {evals[-1]['one_visit']:.2f}, end {evals[-1]['end']:.2f}"
    assert done.err == "" and done.out.splitlines()[-1] == f"success {ends} ({parts}) on 6 episodes"
    for row in rows:
        assert row["loss"] == pytest.approx((15 * row["past_loss"] + 8 * row["future_loss"]) / 23, rel=1e-5)
        assert row["tokens"] == 16 * 23 and row["grad_norm"] > 0
    assert rows[0]["loss"] != rows[1]["loss"] and [round(row["lr"], 6) for row in rows[:2]] == [5e-3, 1e-2]


def test_killed_and_resumed(whole, tmp_path):
    """The same seed is the same run, also one that dies on its way."""
    folder, _, flags = whole
    dead = run(tmp_path, *SMALL, *flags, "--run-dir", tmp_path / "run", script=PTP,
               before=functools.partial(die_at, "os.rename", "step-000004"))  # fmt: skip
    assert dead.code == -9 and len(checkpoints(tmp_path / "run")) == 1
    done = run(tmp_path, "--resume", tmp_path / "run", script=PTP)
    assert done.code == 0, done.err
    same(outcome(tmp_path / "run"), outcome(folder))
    saved = contents(checkpoints(tmp_path / "run")[-1])["own"]
    assert not torch.equal(saved["average.module.step.weight"], saved["net.step.weight"])
    assert saved["average.n_averaged"].item() == 4


def losses(folder, **changes):
    flags = dict(steps=4, batch_size=16, width=16, episodes=4, demonstrations=5, diffusion_steps=4, eval_every=0)
    script.train(script.Args(**flags | dict(checkpoint_every=0, warmup_steps=1) | changes, run_dir=str(folder)))
    evals = lines(folder / "evals.jsonl")[-1]
    return [row["loss"] for row in lines(folder / "metrics.jsonl")], {k: v for k, v in evals.items() if k != "step"}


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ptp.py"])


CHANGES = [
    (dict(context=5), True), (dict(horizon=24), True), (dict(past=0), True), (dict(past=7), True), (dict(samples=3), False),
    (dict(execute=1), False), (dict(diffusion_steps=5), True), (dict(width=17), True), (dict(ema=0.5), False),
    (dict(demonstrations=6), True), (dict(episodes=5), False), (dict(lr=1e-3), True), (dict(weight_decay=0.9), True),
    (dict(max_grad_norm=1e-9), True), (dict(lr_schedule="linear"), True), (dict(warmup_steps=0), True),
    (dict(seed=2), True), (dict(batch_size=15), True), (dict(dtype="float64"), True),
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ptp.py"])
        return losses(tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("change, trains", CHANGES, ids=lambda x: ",".join(x) if isinstance(x, dict) else None)
def test_every_flag_changes_something(change, trains, tmp_path, plain, alone):
    """The losses, or, where it is of the evaluation alone, what is found there and nothing else."""
    found, evaluated = losses(tmp_path / "run", **change)
    assert (found != plain[0]) == trains and (trains or evaluated != plain[1])


def test_every_update_has_a_batch_of_its_own(tmp_path, alone):
    """Of weights that stay as they are."""
    assert len(set(losses(tmp_path / "run", lr=0.0)[0])) == 4


def test_all_past_tokens_are_the_default(tmp_path, plain, alone):
    assert losses(tmp_path / "run", past=15) == plain


def test_a_constant_demonstration(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(script, "demonstrator", lambda n, random: lambda seen, state: torch.zeros(n))
    assert all(map(math.isfinite, losses(tmp_path / "run")[0]))


def test_bfloat16_samples_numbers():
    """Where the first level, 0.9994, is 1 to its last bit."""
    args = arguments(diffusion_steps=100)
    policy = script.DiffusionPolicy(args, torch.tensor([-1.0, 1.0])).to(torch.bfloat16)
    found = policy.sample(torch.zeros(2, 16, dtype=torch.bfloat16), generator(), args)
    assert found.isfinite().all() and found.dtype == torch.bfloat16


@pytest.mark.parametrize("flags, said", [
    (dict(past=16), "--past 16: of a context of 16 observations 15 actions are past"),
    (dict(execute=9), "--execute 9: of a horizon of 23 actions 8 are not past"),
    (dict(horizon=12), "--execute 2: of a horizon of 12 actions 0 are not past"),
    (dict(context=1), "--context must be at least 2, is 1: with a single observation no action is past"),
    (dict(past=-2), "--past must be at least -1"), (dict(samples=0), "--samples must be at least 1"),
    (dict(ema=1.0), "--ema must be at least 0 and below 1"), (dict(diffusion_steps=1), "--diffusion-steps must be at least 2"),
])  # fmt: skip
def test_mistakes(flags, said, tmp_path, alone):
    with pytest.raises(UserError, match=said):
        script.train(script.Args(**flags, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line(tmp_path):
    assert user_error(run(tmp_path, "--past", 20, script=PTP)).startswith("--past 20: of a context of 16")


def test_a_checkpoint_of_another_size_is_refused(whole, tmp_path, alone):
    other = shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    record = other / "config.json"
    record.write_text(record.read_text().replace('"width": 16', '"width": 17'))
    with pytest.raises(UserError, match="checkpoint is of another model .DiffusionPolicy, "):
        script.train(script.Args(resume=str(other)))
    with pytest.raises(UserError, match="--past is -1 there, not 0"):
        settings.inherit("ptp", script.Args(resume=str(whole[0]), past=0))
