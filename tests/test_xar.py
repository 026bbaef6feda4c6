"""xAR's worked numbers, entities, masks and samplers, what reaches what in its network, its world, and what a run logs."""

import math
import shutil

import pytest
import torch

from algos import xar as script
from common import UserError, settings
from tests.helpers import ROOT, checkpoints, contents, killed, lines, outcome, run, same, user_error

ENTITIES = "token cell subsample scale image".split()
CLOSE = dict(rtol=0, atol=1e-6)
PATH = ROOT / "algos" / "xar.py"
SMALL = "--steps 4 --batch-size 4 --samples 16 --sampling-steps 2 --eval-every 2 --checkpoint-every 2 --warmup-steps 1".split()


def noise_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(entity="cell", **changes):
    """With weights that say something everywhere, in float64."""
    net = script.Generator(script.Args(entity=entity, **changes)).net.double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=g))
    return net


# ---------------------------------------------------------------- entities


def test_entities_by_hand():
    """The orders of the card; scales are three grids, whose places are the centres of what a token covers."""
    grouped = dict(
        token=[[i] for i in range(16)], image=[list(range(16))],
        cell=[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]],
        subsample=[[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]],
    )  # fmt: skip
    for entity, groups in grouped.items():
        which, place, order = script.layout(entity)
        assert [order[which == n].tolist() for n in range(len(groups))] == groups and len(which) == 16
        assert (4 * place[:, 0] + place[:, 1]).tolist() == order.tolist()
    which, place, order = script.layout("scale")
    assert which.bincount().tolist() == [1, 4, 16] and order is None
    assert place[0].tolist() == [1.5, 1.5] and place[1:5].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert place[5:].tolist() == [[y, x] for y in range(4) for x in range(4)]


@pytest.mark.parametrize("entity", ENTITIES)
def test_an_image_is_split_and_joined(entity):
    images = noise_of(3, 3, 8, 8)
    tokens = script.split(images, entity)
    which, place, _ = script.layout(entity)
    assert tokens.shape == (3, len(which), 12) and torch.equal(script.joined(tokens, entity), images)
    for i in range(len(which) - 16, len(which)):
        y, x = (2 * place[i]).int().tolist()
        assert torch.equal(tokens[:, i], images[:, :, y : y + 2, x : x + 2].flatten(1))
    if entity == "scale":  # the pixels of a smaller image are the means of what they cover
        quarter = images[:, :, :4, :4].mean((2, 3))
        torch.testing.assert_close(tokens[:, 0].view(3, 3, 4)[:, :, 0], quarter)
        torch.testing.assert_close(tokens[:, 1].view(3, 3, 4).mean(2), quarter)
        torch.testing.assert_close(tokens[:, 2].view(3, 3, 4)[:, :, 1], images[:, :, :2, 6:].mean((2, 3)))


def test_masks_by_hand():
    which = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert script.block_causal(which).sum(1).tolist() == [2, 2, 4, 4, 6, 6, 8, 8]
    assert script.block_causal(which)[2].int().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    rows = ["110000", "110000", "111000", "000110", "000110", "110001"]
    mask = script.two_streams(torch.tensor([0, 0, 1]))
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == rows


# ---------------------------------------------------------------- the objective


def test_worked_numbers():
    """The card's: two entities of one token. The gradient of the mean is that of its four squares, quartered."""
    x, eps = (torch.tensor([rows], dtype=torch.float64) for rows in ([[1, 2], [3, -1]], [[0.5, -0.5], [1, 1]]))
    t, which = torch.tensor([[0.25, 0.8]], dtype=torch.float64), torch.tensor([0, 1])
    noisy, target = script.noised(x, eps, t, which)
    torch.testing.assert_close(noisy, torch.tensor([[[0.875, 1.375], [1.4, 0.6]]]).double())
    torch.testing.assert_close(target, torch.tensor([[[-0.5, -2.5], [-2, 2]]]).double())
    for seen, expected in ((noisy, 5.328828), (x, 5.424766)):
        v = torch.stack([0.5 * noisy[:, 0], 0.5 * noisy[:, 1] - 0.2 * seen[:, 0]], 1).requires_grad_()
        loss = script.flow_loss(v, target)
        assert loss.shape == (1,) and loss.item() == pytest.approx(expected, abs=1e-6)
        loss.sum().backward()
        torch.testing.assert_close(v.grad, (v.detach() - target) / 2)
    assert 4 * 5.328828 == pytest.approx(21.315313, abs=2e-6)


def test_a_loss_is_one_images():
    """The larger entity of two counts more, and no image another's."""
    v = torch.zeros(2, 5, 12)
    v[0, 1:] = 2.0
    assert script.flow_loss(v, torch.zeros_like(v)).tolist() == pytest.approx([3.2, 0])


def test_times():
    """Logit-normal, each entity's own; sorted where the context is to be."""
    normal = noise_of(20000, 3)
    t = script.times(normal, script.Args())
    torch.testing.assert_close(t, 1 / (1 + (-normal).exp()))
    assert t.median().item() == pytest.approx(0.5, abs=0.01)
    assert t.quantile(0.8413).item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)
    assert torch.equal(script.times(normal, script.Args(context="clean")), t)
    for context, sign in (("increasing", 1), ("decreasing", -1)):
        ordered = script.times(normal, script.Args(context=context))
        assert (sign * ordered.diff(dim=1) >= 0).all() and torch.equal(ordered.sort(1).values, t.sort(1).values)


def test_time_0_is_data():
    x, eps, which = noise_of(2, 4, 12), noise_of(2, 4, 12, seed=1), torch.tensor([0, 0, 1, 1])
    noisy, _ = script.noised(x, eps, torch.tensor([[0.0, 1.0]]).double().expand(2, 2), which)
    assert torch.equal(noisy[:, :2], x[:, :2]) and torch.equal(noisy[:, 2:], eps[:, 2:])


# ---------------------------------------------------------------- the samplers


def test_score_and_drift():
    v, x = torch.tensor(0.3).double(), torch.tensor(1.0).double()
    assert script.score(v, x, 0.5).item() == pytest.approx(-2.3)
    sde = script.Args(sampler="sde")
    assert script.stepped(x, v, 0.5, 0.0, 9.0, sde).item() == pytest.approx(1 - 0.5 * 1.45)  # the last step has no noise
    moved = script.stepped(x, v, 0.5, 0.4, 1.0, sde) - script.stepped(x, v, 0.5, 0.4, 0.0, sde)
    assert moved.item() == pytest.approx(math.sqrt(2 * 0.5 * 0.1))
    assert script.stepped(x, v, 0.5, 0.4, 1.0, script.Args()).item() == pytest.approx(1 - 0.1 * 0.3)


def test_grids():
    assert script.grid(script.Args(sampling_steps=4)) == [1, 0.75, 0.5, 0.25, 0]
    assert script.grid(script.Args(sampler="sde", sampling_steps=4)) == pytest.approx([1, 0.68, 0.36, 0.04, 0])
    assert script.grid(script.Args(sampler="sde", sampling_steps=1)) == [1, 0]


def test_score_of_a_gaussian():
    """Data N(0, s^2) has a velocity and a score in closed form; the SDE ends at s, where half its noise would not."""
    s, x = 0.5, noise_of(20000)
    args = script.Args(sampler="sde", sampling_steps=60)
    times = script.grid(args)
    for i, (t, later) in enumerate(zip(times, times[1:])):
        var = (1 - t) ** 2 * s**2 + t**2
        v = (t - (1 - t) * s**2) / var * x
        torch.testing.assert_close(script.score(v, x, t), -x / var)
        x = script.stepped(x, v, t, later, noise_of(20000, seed=i + 1), args)
    assert x.std().item() == pytest.approx(s, abs=0.02)


class Exact:
    """A network whose velocity leads straight to the images it has in mind, told what it was asked."""

    def __init__(self, entity, images):
        self.which, self.goal, self.asked = script.layout(entity)[0], script.split(images, entity), []

    def __call__(self, x, t, label):
        self.asked.append((x, t, label))
        goal = torch.where((label == script.NULL)[:, None, None], 0.0, self.goal)[:, : x.shape[1]]
        of_token = t[:, self.which[: x.shape[1]], None]
        return torch.where(of_token > 0, (x - goal) / of_token.clamp(min=1e-9), torch.nan)  # nobody reads a finished one's


@pytest.mark.parametrize("entity", ENTITIES)
@pytest.mark.parametrize("sampler", ["euler", "sde"])
def test_an_exact_velocity_gives_the_image(entity, sampler):
    """Entity by entity, from noise at time 1, behind finished ones that are clean and have time 0. By the SDE it is there but
    for the noise at 0.04, which its last step, a long one, turns around."""
    M, far = dict(euler=(6, 1e-9), sde=(40, 0.3))[sampler]
    args, images = script.Args(entity=entity, sampler=sampler, sampling_steps=M), noise_of(2, 3, 8, 8)
    net, label = Exact(entity, images), torch.tensor([3, 5])
    N, noise = int(net.which[-1]) + 1, noise_of(2, M if sampler == "sde" else 1, len(net.which), 12, seed=1)
    tokens, calls = script.sample(net, label, noise, args)
    torch.testing.assert_close(script.joined(tokens, entity), images, rtol=0, atol=far)
    assert calls == M * N == len(net.asked)
    for i, (x, t, asked) in enumerate(net.asked):
        n, now = i // M, net.which[: x.shape[1]] == i // M
        assert torch.equal(asked, label) and x.shape[1] == (net.which <= n).sum() and not t[:, :n].any()
        assert t[:, n].tolist() == [script.grid(args)[i % M]] * 2
        assert torch.equal(x[:, ~now], tokens[:, : x.shape[1]][:, ~now])
        assert i % M or torch.equal(x[:, now], noise[:, 0, net.which == n])


def test_noise_of_a_step_is_its_own():
    """The SDE's steps but the last have each a noise; Euler has the start's alone."""
    images, label = noise_of(1, 3, 8, 8), torch.tensor([0])
    for sampler, used in (("sde", [True, True, True]), ("euler", [True, False, False])):
        args, noise = script.Args(entity="image", sampler=sampler, sampling_steps=3), noise_of(1, 3, 16, 12)
        seen = []
        for i in range(4):
            changed = noise.clone()
            changed[:, i % 3] += float(i < 3)
            net = Exact("image", images)
            script.sample(net, label, changed, args)
            seen.append(net.asked[-1][0])
        assert [not torch.allclose(x, seen[3]) for x in seen[:3]] == used


def test_guidance():
    """Grows from none to w; with one entity it is w. Both velocities are asked for, the other one without the class."""
    w = [script.guidance(n, 4, script.Args(guidance=4.0)) for n in range(4)]
    assert w == [1, 2, 3, 4] and script.guidance(0, 1, script.Args(guidance=4.0)) == 4
    assert {script.guidance(n, 4, script.Args()) for n in range(4)} == {1}
    images, label = noise_of(2, 3, 8, 8), torch.tensor([3, 5])
    for sampler in ("euler", "sde"):  # without the class the goal is 0, so what is aimed at is w times the image
        args, net = script.Args(guidance=4.0, sampler=sampler, sampling_steps=3), Exact("cell", images)
        tokens, calls = script.sample(net, label, noise_of(2, 3, 16, 12), args)
        larger = Exact("cell", images)
        larger.goal = net.goal * torch.tensor(w).double().repeat_interleave(4)[:, None]
        args = script.Args(sampler=sampler, sampling_steps=3)
        torch.testing.assert_close(tokens, script.sample(larger, label, noise_of(2, 3, 16, 12), args)[0])
        assert calls == 3 + 3 * 6 == len(net.asked) and sum((asked == script.NULL).all() for *_, asked in net.asked) == 9


# ---------------------------------------------------------------- the network


def asked(net, seed=0, b=2):
    """Something to ask of a network: x, t, label."""
    S, N = len(net.which), int(net.which[-1]) + 1
    return noise_of(b, S, 12, seed=seed), noise_of(b, N, seed=seed + 1).sigmoid(), torch.arange(b)


def test_a_network_at_its_start():
    """It says 0, and is the seed's."""
    nets = [script.Generator(script.Args(seed=seed)).net for seed in (1, 1, 2)]
    x, t, label = asked(nets[0])
    assert not nets[0](x, t, label).any()
    first = [net.inner.weight for net in nets]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


@pytest.mark.parametrize("entity", ENTITIES)
def test_what_reaches_what(entity):
    """An entity's tokens and its time reach itself and all later ones, and none before; the class all of its image's."""
    net = network(entity)
    x, t, label = asked(net)
    out, which = net(x, t, label), net.which
    assert out.dtype == torch.float64
    for n in {0, int(which[-1]) // 2, int(which[-1])}:
        other, later = x.clone(), t.clone()
        other[0, which == n] += 1
        later[0, n] = 1 - later[0, n]
        for change in (net(other, t, label) - out, net(x, later, label) - out):
            assert not change[1].any() and not change[0, which < n].any()
            assert (change[0, which >= n].abs().amax(1) > 1e-6).all()
    change = net(x, t, torch.tensor([script.NULL, 1])) - out
    assert not change[1].any() and (change[0].abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("entity", ENTITIES)
def test_reading_again_is_a_cache(entity):
    """Finished entities have the keys and values, clean and at time 0, that they had when they were alone; the rest of a pass
    is of the current entity. So are its velocities, whatever comes behind it."""
    net, held = network(entity), []
    for block in net.blocks:
        block.qkv.register_forward_hook(lambda module, inputs, out: held.append(out))
    x, t, label = asked(net)
    last = int(net.which[-1])
    full = net(x, t, label)
    for n in {1, (last + 1) // 2, last} - {0}:
        held.clear()
        cached, now = int((net.which < n).sum()), int((net.which <= n).sum())
        alone = net(x[:, :cached], t.new_zeros(2, n), label)
        time = torch.cat([t.new_zeros(2, n), t[:, n : n + 1]], 1)
        net(x[:, :now], time, label)
        for before, after in zip(held[:3], held[3:]):
            torch.testing.assert_close(after[:, :cached], before)
        assert alone.shape[1] == cached
        torch.testing.assert_close(net(x[:, :now], t[:, : n + 1], label), full[:, :now])


@pytest.mark.parametrize("entity", ENTITIES[:4])
def test_two_streams_are_one_with_a_clean_context(entity):
    """What a noisy entity is told in training with --context clean is what it is told in sampling."""
    net = network(entity)
    x, t, label = asked(net)
    clean = noise_of(*x.shape, seed=7)
    out = net(x, t, label, clean=clean)
    for n in range(t.shape[1]):
        mine, before = net.which == n, int((net.which < n).sum())
        seen = torch.cat([clean[:, :before], x[:, mine]], 1)
        one = net(seen, torch.cat([t.new_zeros(2, n), t[:, n : n + 1]], 1), label)
        torch.testing.assert_close(out[:, mine], one[:, before:])
    assert (net(x, t, label)[:, net.which == 0] - out[:, net.which == 0]).abs().max() < 1e-9  # the first has no context
    assert (net(x, t, label) - out)[:, net.which > 0].abs().amax(2).min() > 1e-6


def test_the_places_count():
    """Rotary positions are relative, along either axis; without them, and without learned ones, places are alike."""
    net = network("image")
    cos, sin = net.cos, net.sin
    q, k = noise_of(1, 1, 1, 24).expand(1, 1, 16, 24), noise_of(1, 1, 1, 24, seed=1).expand(1, 1, 16, 24)
    scores = (script.turned(q, cos, sin) @ script.turned(k, cos, sin).transpose(2, 3))[0, 0]
    for a, b, c, d in ((0, 1, 9, 10), (0, 4, 7, 11), (6, 0, 15, 9)):
        torch.testing.assert_close(scores[a, b], scores[c, d], **CLOSE)
    assert abs(scores[0, 1] - scores[0, 4]) > 1e-3 and abs(scores[0, 1] - scores[1, 0]) > 1e-3
    x, t, label = noise_of(1, 16, 12), torch.full((1, 1), 0.5).double(), torch.tensor([0])
    flipped = x.flip(1)
    assert not torch.allclose(net(flipped, t, label).flip(1), net(x, t, label), atol=1e-3)
    with torch.no_grad():
        net.position.zero_()
    assert not torch.allclose(net(flipped, t, label).flip(1), net(x, t, label), atol=1e-3)
    net.cos, net.sin = torch.ones_like(cos), torch.zeros_like(sin)
    torch.testing.assert_close(net(flipped, t, label).flip(1), net(x, t, label))


def test_the_average_of_weights():
    """The first weights that were trained, then 0.9 of it and a tenth of each; bfloat16 ones are averaged in float32."""
    policy = script.Generator(script.Args(ema=0.9))
    mean, weight = policy.ema.module.inner.weight, policy.net.inner.weight
    assert torch.equal(mean, weight) and mean is not weight
    assert not any(p.requires_grad for p in policy.ema.parameters()) and all(p.requires_grad for p in policy.net.parameters())
    policy.net.bfloat16()
    expected = None
    for value in (1.0, 2.0, 4.0):
        weight = policy.net.inner.weight
        with torch.no_grad():
            weight.fill_(value)
        policy.ema.update_parameters(policy.net)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
        assert mean.dtype == torch.float32 and mean[0, 0].item() == pytest.approx(expected)


# ---------------------------------------------------------------- the world


def test_the_world():
    """400 images that differ, of 16 classes; a gold ring where it should be."""
    world = script.class_images()
    assert world.shape == (400, 3, 8, 8) and world.min() == -1 and world.max() == 1
    assert len(world.flatten(1).unique(dim=0)) == 400
    ring = world[25 * 7 + 5 * 2 + 3]  # shape 1, colour 3, two down, three to the right
    assert [" #"[int(x > 0)] for x in ring[0, 2]] == list("   #### ") and ring[0, 3, 3:7].tolist() == [1, -1, -1, 1]
    assert ring[1].max() == pytest.approx(0.68) and ring[2].max() == -1 and (ring[0] > 0).sum() == 12
    assert [int((world[100 * i, 0] > 0).sum()) for i in range(4)] == [16, 12, 12, 8]


def test_judged():
    world = script.class_images().double()
    own = torch.arange(400) // 25
    all_right = script.judged(world[::10], own[::10], world)
    assert all_right == dict(valid=40, class_accuracy=40, shape=40, colour=40, distance=0)
    box, other = world[:1], torch.tensor([0])
    for label, shape, colour in ((1, 1, 0), (4, 0, 1), (5, 0, 0)):
        found = script.judged(box, torch.tensor([label]), world)
        assert (found["valid"], found["class_accuracy"], found["shape"], found["colour"]) == (0, 0, shape, colour)
    for by, valid in ((0.31, 1), (0.32, 0)):  # 0.1 is 0.316 squared
        found = script.judged(box + by, other, world)
        assert (found["valid"], found["class_accuracy"]) == (valid, 1) and found["distance"] == pytest.approx(by**2)


# ---------------------------------------------------------------- runs


def test_as_a_user(tmp_path):
    """What a run says and writes; killed and resumed it is the same to the last bit, the average of weights too."""
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "whole", script=PATH)
    assert done.code == 0, done.err
    rows, evals = lines(tmp_path / "whole" / "metrics.jsonl"), lines(tmp_path / "whole" / "evals.jsonl")
    assert [row["step"] for row in evals] == [0, 2, 4] and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert list(evals[0]) == "step valid class_accuracy shape colour distance calls prompts".split()
    assert all(0 <= row[k] <= 1 for row in evals for k in ("valid", "class_accuracy", "shape", "colour"))
    assert evals[0]["calls"] == 8 and evals[0]["prompts"] == 16 and all(r["grad_norm"] > 0 and r["tokens"] == 64 for r in rows)
    assert rows[0]["loss"] == pytest.approx(2, abs=0.2)
    assert [row["lr"] for row in rows] == pytest.approx([7.5e-4, 1.5e-3, 1.125e-3, 3.75e-4])
    said = done.out.splitlines()[-1]
    assert said.startswith("valid images, by cell: 0.00 -> ") and said.endswith(", 8 passes an image")
    assert "on 16 images" in done.out
    killed(tmp_path / "whole", tmp_path / "parts", 2)
    done = run(tmp_path, "--resume", tmp_path / "parts", script=PATH)
    assert done.code == 0, done.err
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    saved = contents(checkpoints(tmp_path / "parts")[-1])
    policy = script.Generator(script.Args())
    policy.load_state_dict(saved["own"])
    assert policy.ema.n_averaged == 4 and not torch.equal(policy.ema.module.inner.weight, policy.net.inner.weight)
    other = shutil.copytree(tmp_path / "whole", tmp_path / "other", ignore=shutil.ignore_patterns(".lock"))
    record = other / "config.json"
    record.write_text(record.read_text().replace('"entity": "cell"', '"entity": "scale"'))
    with pytest.raises(UserError, match="checkpoint is of another model .Generator, "):
        script.train(script.Args(resume=str(other)))


def trained(folder, **flags):
    """A run of two updates -> its weights, all as one, and its last evaluation."""
    few = dict(steps=2, batch_size=8, samples=8, sampling_steps=2, eval_every=0, checkpoint_every=0, warmup_steps=0)
    script.train(script.Args(**few | flags, run_dir=str(folder)))
    saved = contents(checkpoints(folder)[-1])["own"]
    kept = {part: torch.cat([v.flatten() for k, v in saved.items() if k.startswith(part)]) for part in ("net", "ema.module")}
    return kept, lines(folder / "evals.jsonl")[-1]


def test_every_flag_changes_something(tmp_path):
    """In training the weights, and what only samples an evaluation and no weight."""
    kept, found = trained(tmp_path / "own")
    again, _ = trained(tmp_path / "again")
    assert torch.equal(kept["net"], again["net"])
    learnt = [dict(context=c) for c in ("clean", "increasing", "decreasing")] + [dict(label_drop=0.6), dict(entity="subsample")]
    for i, flags in enumerate([*learnt, dict(weight_decay=0.5), dict(max_grad_norm=1e-3), dict(lr_schedule="constant")]):
        assert not torch.equal(trained(tmp_path / f"l{i}", **flags)[0]["net"], kept["net"]), flags
    for i, flags in enumerate([dict(ema=0.5), dict(sampler="sde"), dict(sampling_steps=3), dict(samples=9)]):
        other, differently = trained(tmp_path / f"s{i}", **flags)
        assert torch.equal(other["net"], kept["net"]) and differently != found, flags
        assert torch.equal(other["ema.module"], kept["ema.module"]) == ("ema" not in flags)
    _, guided = trained(tmp_path / "w", guidance=3.0)
    assert guided["calls"] == found["calls"] + 6 and guided["distance"] != found["distance"]


def test_mistakes(tmp_path):
    for flags, why in (
        (dict(entity="row"), "--entity must be one of token, cell"), (dict(samples=0), "--samples must be at least 1"),
        (dict(sampling_steps=0), "--sampling-steps must be at least 1"), (dict(dtype="bfloat16"), "--optimizer adamw would"),
        (dict(ema=1.0), "--ema must be .* below 1"), (dict(label_drop=1.0), "--label-drop must be .* below 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            settings.resolve(script.Args(**flags))
    place = ["--steps", 0, "--samples", 1, "--run-dir", tmp_path / "none"]
    said = user_error(run(tmp_path, "--entity", "image", "--context", "clean", *place, script=PATH))
    assert said.startswith("--context clean: the whole image is one entity")
    with pytest.raises(UserError, match="--guidance 2.0 needs a --label-drop above 0"):
        script.train(script.Args(guidance=2.0, label_drop=0.0, run_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_the_defaults_stand_without_a_preset():
    before = vars(script.Args()).copy()
    args, config = settings.resolve(script.Args())
    assert vars(args) == before and config is None
    assert [k for k, v in before.items() if v is None] == ["resume", "run_dir"]
