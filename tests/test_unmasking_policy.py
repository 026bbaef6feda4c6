"""The unmasking policy's worked numbers, its network, what it does on a canvas, what is written down, and what a run logs."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from algos import unmasking_policy as script
from common import UserError, models, settings
from common.batch import Meter, collate
from tests.helpers import checkpoints, contents, lines

CLOSE = dict(rtol=0, atol=1e-6)
LOGITS = [0.5, -2.0, 1.0, 0.3]
REVEALED, VALID = torch.tensor([[True, False, True, False]]), torch.tensor([[True, True, True, False]])


def arguments(**changes):
    values = dict(max_new_tokens=8, denoising_steps=8, width=16, output_bias=-1.0, position_std=0.3)
    return script.Args(**values | changes)


def network(**changes):
    return script.UnmaskingPolicy(arguments(**changes))


# ---------------------------------------------------------------- the objective


def test_worked_numbers():
    logits = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    logp, entropy = script.step_logp(logits, REVEALED, VALID)
    logp.sum().backward()
    assert logp.item() == pytest.approx(-0.914267, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.377541, -0.119203, 0.268941, 0]]).double(), **CLOSE)
    chances = [1 / (1 + math.exp(-x)) for x in LOGITS[:3]]
    assert entropy.item() == pytest.approx(-sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in chances), abs=1e-6)
    assert not entropy.requires_grad
    for adv in (0.2, -0.2):
        step = torch.ones(1, 1, dtype=torch.bool)
        old = torch.full((1, 1), -0.9, dtype=torch.float64)
        objective, _ = script.surrogate(logp.detach()[None], old, torch.full((1, 1), adv), step, script.Args())
        assert objective.item() == pytest.approx(adv * 0.985835, abs=1e-6)


def test_one_ratio_for_a_step():
    """1.2 twice is 1.44, and 1.3 twice 1.69, which is clipped to 1.5, though neither position is."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for each, ratio in ((1.2, 1.44), (1.3, 1.5)):
        objective, stats = script.surrogate(zero + 2 * math.log(each), zero, one, one.bool(), script.Args())
        assert objective.item() == pytest.approx(ratio, abs=1e-6) and stats["clip_fraction"].item() == (each > 1.25)


def test_steps_weigh_alike_in_a_completion():
    made = torch.tensor([[True, True, False, False], [True, False, True, True]])
    weights = script.token_weights(made, script.Args())
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.25, 0, 0], [1 / 6, 0, 1 / 6, 1 / 6]]))


@pytest.mark.parametrize("alpha, values", [
    (0.0, [1, 1, 1]), (0.3, [1, 0.841466, 0.435275]), (1.0, [1, 0.5625, 0.0625]), (3.0, [1, 0.177979, 0.000244]),
])  # fmt: skip
def test_reward(alpha, values):
    """Of a canvas of 16, after 1, 8 and 16 steps; a wrong answer is worth nothing at any speed, unless the form is additive."""
    args, steps = script.Args(max_new_tokens=16, alpha=alpha), torch.tensor([1, 8, 16])
    found = script.speed_reward(torch.ones(3), steps, args)
    torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float32), **CLOSE)
    assert not script.speed_reward(torch.zeros(3), steps, args).any()
    added = script.Args(max_new_tokens=16, alpha=alpha, reward_form="additive")
    for right in (0.0, 1.0):
        expected = [right - alpha * n / 16 for n in (1, 8, 16)]
        assert script.speed_reward(torch.full((3,), right), steps, added).tolist() == pytest.approx(expected)


def test_garbage_where_nothing_can_be_revealed():
    for garbage in (math.inf, -math.inf, math.nan):
        logits = torch.tensor([[*LOGITS[:3], garbage]], requires_grad=True)
        logp, entropy = script.step_logp(logits, REVEALED, VALID)
        logp.sum().backward()
        assert logp.item() == pytest.approx(-0.914267, abs=1e-6) and entropy.isfinite().all()
        assert logits.grad[0, 3] == 0 and logits.grad.isfinite().all()
    far = torch.tensor([[200.0, -200.0, 200.0, 0.0]], requires_grad=True)
    logp, entropy = script.step_logp(far, ~REVEALED, VALID)
    logp.sum().backward()
    assert logp.item() == -600 and entropy.item() == 0 and far.grad.tolist() == [[-1, 1, -1, 0]]


# ---------------------------------------------------------------- the network


def inputs(n=3, L=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, L, generator=g), torch.rand(n, L, generator=g) < 0.5, torch.rand(n, generator=g)


def moved(policy, by=0.3):
    """With weights that say something everywhere."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(by * torch.randn(weight.shape, generator=g))
    return policy


def test_the_papers_network_has_the_codes_size():
    paper = script.Args(**script.Args.real_preset)
    assert sum(p.numel() for p in script.UnmaskingPolicy(paper).parameters()) == 331_265


def test_a_network_at_its_start():
    """Nothing but confidences and positions counts; its mean is the bias, and the seed alone makes it."""
    confidence, masked, time = inputs()
    policy = network()
    out = policy(confidence, masked, time)
    assert torch.equal(out, policy(confidence, ~masked, 1 - time)) and (out + 1).abs().max() < 0.5
    assert not torch.equal(out, network(seed=2)(confidence, masked, time))
    torch.manual_seed(5)
    assert torch.equal(out, network()(confidence, masked, time))
    for changes in (dict(output_bias=-2.0), dict(position_std=0.0), dict(position_std=0.6), dict(width=32)):
        assert not torch.equal(out, network(**changes)(confidence, masked, time))


def test_what_each_input_reaches():
    """Every position sees every other; what a mask bit and the time change, and how one canvas leaves the others alone."""
    policy, (confidence, masked, time) = moved(network(), 0.1).double(), inputs()
    out = policy(confidence, masked, time)
    for place in (0, 7):
        for which, x in enumerate((confidence, masked)):
            other = x.clone()
            other[0, place] = 1 - other[0, place] if which == 0 else ~other[0, place]
            change = policy(*((other, masked) if which == 0 else (confidence, other)), time) - out
            assert (change[0].abs() > 1e-7).all() and not change[1:].any()
    later = time + torch.tensor([0.125, 0, 0])
    assert ((policy(confidence, masked, later) - out)[0].abs() > 1e-7).all()


def test_without_a_learned_embedding_positions_are_relative():
    """Rotary ones: equal confidences all around give equal logits; with the embedding they do not."""
    same = torch.full((1, 8), 0.4), torch.ones(1, 8, dtype=torch.bool), torch.zeros(1)
    out = moved(network(position_std=0.0))(*same)
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    assert moved(network())(*same).std() > 1e-3
    confidence, masked, time = inputs()
    turned = moved(network(position_std=0.0))(confidence.flip(1), masked.flip(1), time).flip(1)
    assert (moved(network(position_std=0.0))(confidence, masked, time) - turned).abs().max() > 1e-3  # they do count
    x = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(0)).double()
    q, k = script.turned(x[:, :, :1].expand_as(x)), script.turned(x[:, :, 1:2].expand_as(x))
    scores = (q @ k.transpose(2, 3))[0, 0]
    torch.testing.assert_close(scores[2, 5], scores[4, 7])
    assert (scores[2, 5] - scores[5, 2]).abs() > 1e-3
    torch.testing.assert_close(script.turned(x).norm(dim=3), x.norm(dim=3))


# ---------------------------------------------------------------- on a canvas


class Scripted:
    """A policy whose logits are those of a plan [T, L], told what it was asked."""

    def __init__(self, plan, training=True):
        self.plan, self.training, self.asked = torch.tensor(plan), training, []

    def __call__(self, confidence, masked, time):
        self.asked.append((confidence, masked, time))
        return self.plan[len(self.asked) - 1].expand(len(masked), -1)


def guess(tokens, masked, noise, temperature):
    """Token 10 + the number of those that are there, so that it is seen when a position was filled; surer to the right."""
    assert temperature == 0
    there = (~masked).sum(1, keepdim=True) + 10
    confidence = torch.arange(1, masked.shape[1] + 1) / 10
    return there.expand_as(tokens).masked_fill(~masked, 0), (confidence * masked).float()


def fill(policy, b=1, noise=0.5, temperature=1.0, **changes):
    args, trace = arguments(**dict(max_new_tokens=4, denoising_steps=4) | changes), []
    masked = torch.ones(b, 4, dtype=torch.bool)
    noise = noise if isinstance(noise, torch.Tensor) else torch.full((b, args.denoising_steps + 1, 4), noise).double()
    tokens = script.unmask(policy, trace, guess, masked, noise, temperature, args)
    assert len(trace) == 1 and masked.all()
    return tokens, SimpleNamespace(**trace[0])


def test_a_canvas_by_hand():
    """Two positions, nothing, the others: three steps, of which the second is lost. The last one is not needed."""
    policy = Scripted([[9.0, -9, 9, -9], [9, -9, 9, -9], [-9, 9, -9, 9]])
    tokens, saw = fill(policy)
    assert tokens.tolist() == [[10, 12, 10, 12]]
    assert saw.valid[0].int().tolist() == [[1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert torch.equal(saw.masked, saw.valid) and saw.revealed[0].sum(1).tolist() == [2, 0, 2, 0]
    assert [time.item() for *_, time in policy.asked] == [0, 0.25, 0.5]
    torch.testing.assert_close(saw.confidence[0, 1], torch.tensor([0, 0.2, 0, 0.4]))
    assert all(torch.equal(a[0][0], saw.confidence[0, t]) for t, a in enumerate(policy.asked))
    expected = [script.step_logp(policy.plan[t : t + 1], saw.revealed[:, t], saw.valid[:, t])[0].item() for t in range(3)]
    assert saw.logp[0].tolist() == pytest.approx([*expected, 0]) and expected[1] == pytest.approx(-2.5e-4, rel=0.03)


def test_a_canvas_with_masks_left_says_nothing():
    tokens, saw = fill(Scripted([[9.0, 9, 9, -9]] * 4))
    assert tokens.tolist() == [[0, 0, 0, 0]] and saw.valid.any(2).sum() == 4 and saw.valid[0, 3].tolist() == [0, 0, 0, 1]


def test_in_evaluation_the_likeliest_is_revealed_where_none_is_drawn():
    plan = [[-9.0, -7, -8, 5]] * 4
    tokens, saw = fill(Scripted(plan, training=False))
    assert tokens.tolist() == [[13, 11, 12, 10]] and saw.valid.any(2).sum() == 4
    assert saw.revealed[0].int().argmax(1).tolist() == [3, 1, 2, 0]
    noise = torch.tensor([0.01, 0.99, 0.99, 0.99]).double().expand(1, 5, 4)
    _, saw = fill(Scripted([[0.0, 0, 0, 1]] * 4, training=False), noise=noise)
    assert saw.revealed[0].int().argmax(1).tolist() == [0, 3, 1, 2]  # where one is drawn, it alone


def test_a_position_is_drawn_where_its_number_is_below_its_chance():
    """In evaluations, whose temperature is 0, at --eval-temperature."""
    plan = [[1.0, 1, 1, 1]] * 4
    low, high = 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(-2.0))
    noise = torch.tensor([low - 1e-4, low + 1e-4, high - 1e-4, high + 1e-4]).double().expand(1, 5, 4)
    for temperature, changes, first in ((1.0, {}, 1), (0.5, {}, 3), (0.0, {}, 1), (0.0, dict(eval_temperature=0.5), 3)):
        _, saw = fill(Scripted(plan), noise=noise, temperature=temperature, **changes)
        assert saw.revealed[0, 0].sum() == first


def test_blocks_are_filled_from_the_left():
    """Two steps each. The first is full after one, and the second is not after two; other positions are seen all the time."""
    policy = Scripted([[9.0, 9, 9, 9], [-9, -9, 9, -9], [-9, -9, -9, -9]])
    tokens, saw = fill(policy, block_length=2)
    assert saw.valid[0].int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert saw.masked[0].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert [time.item() for *_, time in policy.asked] == [0, 0.25, 0.5] and tokens.tolist() == [[0, 0, 0, 0]]
    _, saw = fill(Scripted([[9.0, -9, 9, 9]] * 3), block_length=2)
    assert saw.valid[0].int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]  # what is late is lost
    assert saw.masked[0, 2].tolist() == [False, True, True, True]
    tokens, _ = fill(Scripted([[9.0, 9, 9, 9]] * 2), block_length=2, denoising_steps=2)
    assert tokens.tolist() == [[10, 10, 12, 12]]


def test_fewer_steps():
    _, saw = fill(Scripted([[-9.0, -9, -9, -9]] * 2, training=False), denoising_steps=2)
    assert saw.valid.any(2)[0].tolist() == [True, True, False, False]


def rollout_of(policy, args, b=6, seed=0):
    """A batch as train() makes it, and the tokens on its canvases."""
    trace, L = [], args.max_new_tokens
    noise = torch.rand(b, args.denoising_steps + 1, L, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    parts = [(0, 4), (4, b)]  # as where an engine calls twice
    tokens = [
        script.unmask(policy, trace, guess, torch.ones(j - i, L, dtype=torch.bool), noise[i:j], args.temperature, args)
        for i, j in parts
    ]
    batch = collate([([5, 6], y) for y in torch.cat(tokens).tolist()])
    batch.reward = batch.accuracy = torch.tensor([1.0, 0, 1, 1, 0, 1])
    batch.texts = batch.answers = batch.gold = [""] * b
    script.kept(batch, trace, args)
    assert trace == []
    return batch, torch.cat(tokens)


@pytest.mark.parametrize("changes", [{}, dict(block_length=4), dict(temperature=0.7)])
def test_the_policy_that_sampled_has_ratio_1(changes):
    """And each of a step's logits its own gradient: u - sigma(b) times the weight, the advantage, 1 / temperature."""
    args, policy = arguments(**changes), moved(network())
    batch, _ = rollout_of(policy, args)
    made = batch.trained
    assert torch.equal(made, batch.columns["valid"].any(2)) and 6 < made.sum() < 48
    logp, entropy = script.likelihood(policy, batch, args)
    torch.testing.assert_close(logp, batch.old_logp)
    assert not logp[~made].any() and not entropy[~made].any() and (entropy[made] > 0).all()
    assert torch.equal(batch.sampler_logp, batch.old_logp)
    steps = made.sum(1)
    torch.testing.assert_close(batch.reward, batch.accuracy * ((9 - steps) / 8) ** 0.3)
    with torch.no_grad():
        logits = policy(batch.columns["confidence"][0], batch.columns["masked"][0], torch.arange(8) / 8)
    n = int(steps[0])
    if not changes:
        by_hand = SimpleNamespace(trained=made[:1], columns={k: x[:1] for k, x in batch.columns.items()})
        free = logits.clone().requires_grad_()
        (script.likelihood(lambda *x: free[: len(x[0])], by_hand, args)[0].sum() / n).backward()
        u, valid = batch.columns["revealed"][0], batch.columns["valid"][0]
        torch.testing.assert_close(free.grad, ((u.float() - logits.sigmoid()) * valid / n))


def test_rows_and_steps_are_apart():
    """Garbage in steps that were not made, micro-batches, and one without any step."""
    args, policy = arguments(), moved(network())
    batch, tokens = rollout_of(policy, args)
    logp, _ = script.likelihood(policy, batch, args)
    found = torch.zeros_like(logp)
    for mb in batch.micro_batches(torch.tensor([4, 0, 5]), 12):
        found[mb.row] = script.likelihood(policy, mb, args)[0]
    torch.testing.assert_close(found[[0, 4, 5]], logp[[0, 4, 5]])
    batch.columns["confidence"][~batch.trained] = math.nan
    assert torch.equal(script.likelihood(policy, batch, args)[0], logp)
    batch.trained = torch.zeros_like(batch.trained)
    none, _ = script.likelihood(policy, batch, args)
    none.sum().backward()
    assert not none.any() and all(p.grad is not None and not p.grad.any() for p in policy.parameters())
    alone, trace = torch.rand(6, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[2:3], []
    again = script.unmask(policy, trace, guess, torch.ones(1, 8, dtype=torch.bool), alone, 1.0, args)
    assert torch.equal(again, tokens[2:3]) and torch.equal(trace[0]["revealed"][0], batch.columns["revealed"][2])


def test_measures():
    args = arguments(max_new_tokens=4, denoising_steps=4)
    _, saw = fill(Scripted([[9.0, -9, 9, -9], [-9, 9, -9, -9], [-9, -9, -9, -9], [-9, -9, -9, -9]]), b=2)
    columns = vars(saw) | dict(logp=None)
    columns["revealed"][1, 3, 3] = True
    batch = SimpleNamespace(columns=columns, trained=saw.valid.any(2))
    meter = Meter()
    script.measure(meter, batch)
    assert meter.result() == dict(denoising_steps=4.0, filled=0.5, revealed=pytest.approx(7 / 8))
    assert batch.columns["revealed_at"].tolist() == [[1, 2, 1, 0], [1, 2, 1, 4]]
    trace = [dict(valid=saw.valid), dict(valid=saw.valid[:1, :3])]
    assert list(script.counted(trace, dict(greedy_accuracy=0.5, prompts=3)).items()) == [
        ("greedy_accuracy", 0.5), ("prompts", 3), ("denoising_steps", pytest.approx(11 / 3)),
    ]  # fmt: skip
    assert trace == [] and args.alpha == 0.3


# ---------------------------------------------------------------- runs


SMALL = dict(steps=2, prompts_per_step=4, group_size=4, eval_prompts=8, checkpoint_every=0)


def test_a_run(tmp_path, monkeypatch, capsys):
    """The language model is asked and never trained; a checkpoint has the network alone, and another one does not fit it."""
    held = []

    def load(args, *rest, **how):
        held.append((models_load(args, *rest, **how), how))
        held.append({k: v.clone() for k, v in held[0][0].state_dict().items()})
        return held[0][0]

    def unmask(policy, trace, guess, masked, noise, temperature, args):
        modes.add((policy.training, temperature))
        return script_unmask(policy, trace, guess, masked, noise, temperature, args)

    modes, models_load, script_unmask = set(), models.load, script.unmask
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(script, "unmask", unmask)
    script.train(script.Args(**SMALL, alpha=1.0, eval_samples=2, eval_temperature=0.5, run_dir=str(tmp_path / "run")))
    assert modes == {(True, 1.0), (False, 0.0), (False, 0.5)}
    (denoiser, how), before = held
    assert how["trainable"] is False and how["denoiser"] and not any(p.requires_grad for p in denoiser.parameters())
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    rows, evals = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "evals.jsonl")
    for row in rows:
        assert 1 <= row["denoising_steps"] <= 8 and 0 < row["filled"] <= 1 and row["grad_norm"] > 0
        assert row["length"] == 8 and row["ratio_max"] >= row["ratio_min"] > 0.5 and row["sampler_gap"] == 0
        assert row["accuracy"] <= row["filled"] and row["reward"] <= row["accuracy"]
        assert row["revealed"] * row["denoising_steps"] == pytest.approx(8, abs=1.5)
    assert [row["step"] for row in evals] == [0, 2] and all(1 < row["denoising_steps"] < 8 for row in evals)
    assert set(evals[0]) == {"step", "greedy_accuracy", "avg@2", "pass@2", "denoising_steps", "prompts"}
    ends = [f"{row['greedy_accuracy']:.2f} in {row['denoising_steps']:.1f} steps" for row in evals]
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"greedy accuracy {ends[0]} -> {ends[1]} on 8 prompts"
    assert not any("talk to it" in line or "from_pretrained" in line for line in out)
    last = checkpoints(tmp_path / "run")[-1]
    assert sorted(p.name for p in last.iterdir()) == ["manifest.json", "state"]
    saved = contents(last)
    policy = script.UnmaskingPolicy(settings.resolve(script.Args())[0])
    policy.load_state_dict(saved["own"])
    shown = lines(tmp_path / "run" / "samples.jsonl")[0]
    assert len(shown["columns"]["revealed_at"]) == 8 == len(shown["tokens"])
    other = shutil.copytree(tmp_path / "run", tmp_path / "other", ignore=shutil.ignore_patterns(".lock"))
    record = other / "config.json"
    record.write_text(record.read_text().replace('"width": 32', '"width": 16'))
    with pytest.raises(UserError, match="checkpoint is of another model .UnmaskingPolicy, "):
        script.train(script.Args(resume=str(other)))


def test_blocks_and_fewer_steps_in_a_run(tmp_path):
    for name, flags, most in (("blocks", dict(block_length=4), 8), ("few", dict(denoising_steps=2), 2)):
        script.train(script.Args(**SMALL | dict(steps=1), **flags, run_dir=str(tmp_path / name)))
        evals = lines(tmp_path / name / "evals.jsonl")
        assert 2 <= evals[-1]["denoising_steps"] <= most


def test_presets_and_limits():
    args, config = settings.resolve(script.Args())
    assert (args.task, args.max_new_tokens, args.width, args.output_bias, args.lr) == ("sums", 8, 32, -1.0, 2e-3)
    assert config.is_causal is False
    for flags, why in (
        (dict(width=30), "--width must be one of 16, 32"), (dict(denoising_steps=0), "--denoising-steps must be at least 1"),
        (dict(alpha=-1.0), "--alpha must be at least 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            settings.resolve(script.Args(**flags))


def test_blocks_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="--block-length 3 must divide the canvas"):
        script.train(script.Args(**SMALL, block_length=3, run_dir=str(tmp_path / "b")))
