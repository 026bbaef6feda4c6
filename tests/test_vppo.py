"""VPPO's worked numbers, what makes a token pivotal, the shaping, the reading in the dark, and what a run does with them."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from algos import dapo, vppo
from common import UserError, engines, models, rewards, rollout, settings, tasks, vision
from common.batch import collate, read
from common.worlds import count_sum, tiny_vision
from tests.card import example
from tests.helpers import ROOT, lines, run

CLOSE = dict(rtol=0, atol=1e-6)
OLD = torch.tensor([[-0.1, -1.2, -0.4, -2, -0.3], [-0.5, -0.2, -1.5, -9, -9]])
DARK = torch.tensor([[-0.1, -3.2, -0.5, -1, -0.9], [-0.6, -0.2, -2.5, -1, -9]])
NEW = OLD + torch.tensor([[0.05, 0.3, 0, -0.1, 0.1], [0.1, -0.4, 0.2, 9, 9]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
ADV = torch.tensor([[0.8], [-1.1]]).expand(2, 5)
S = torch.tensor([[0, 1.135335, 0.004837, 0.718282, 0.148812], [0.004837, 0, 0.367879, 0, 0]])


def two(logp):
    """[n] -> logits [n, 2] whose first token has this log-prob."""
    return torch.stack([logp, (-logp.expm1()).log()], 1)


def seen(old, dark, **flags):
    """S [n] of tokens of these log-probs."""
    targets = torch.zeros(len(old), dtype=torch.int64)
    return vppo.dependency(targets, two(old), two(dark), vppo.Args(**flags))[2]


def loss_and_gradient(script, args, logp, old_logp, adv, mask, penalty=0.0):
    """As the loop forms it."""
    logp = logp.detach().clone().requires_grad_()
    objective, _ = script.surrogate(logp, old_logp, adv, mask, args)
    loss = -((objective + penalty * logp) * script.token_weights(mask, args))[mask].sum()
    loss.backward()
    return loss.item(), logp.grad


# ---------------------------------------------------------------- the objective


def test_worked_numbers():
    args = vppo.Args()
    found = torch.zeros(2, 5).masked_scatter(MASK, seen(OLD[MASK], DARK[MASK]))
    torch.testing.assert_close(found, S, **CLOSE)
    M = vppo.pivotal(found, MASK, args.kappa)
    assert M.int().tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]
    alpha = vppo.shaping(found, MASK, args)
    torch.testing.assert_close(alpha, torch.tensor([1.1, 0.9]), **CLOSE)
    means = torch.tensor([0.401453, 0.124239])
    torch.testing.assert_close(found.sum(1) / MASK.sum(1), means, **CLOSE)
    adv = ADV * M * alpha[:, None]
    assert loss_and_gradient(vppo, args, NEW, OLD, adv, MASK)[0] == pytest.approx(0.047581, abs=1e-6)
    loss, gradient = loss_and_gradient(vppo, args, NEW, OLD, adv, MASK, args.penalty)
    assert loss == pytest.approx(0.092206, abs=1e-6)
    wanted = [[-0.0075, -0.0075, -0.0075, -0.107032, -0.0075], [0.129265, -0.0075, 0.143649, 0, 0]]
    torch.testing.assert_close(gradient, torch.tensor(wanted), **CLOSE)


def test_k3_is_the_kl_in_the_mean_and_ranks_otherwise():
    g, args = torch.Generator().manual_seed(0), vppo.Args(dependency="kl")
    logits = torch.randn(40, 7, generator=g).double()
    dark = logits + torch.randn(40, 7, generator=g).double() / 2
    p, each = logits.softmax(1), []
    for token in range(7):
        logp, entropy, kl = vppo.dependency(torch.full((40,), token), logits, dark, args)
        torch.testing.assert_close(logp, logits.log_softmax(1)[:, token])
        torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy())
        k3 = vppo.dependency(torch.full((40,), token), logits, dark, vppo.Args())
        assert torch.equal(k3[0], logp) and torch.equal(k3[1], entropy)
        each.append(k3[2])
    categorical = torch.distributions.Categorical
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(categorical(logits=logits), categorical(logits=dark)))
    torch.testing.assert_close((p * torch.stack(each, 1)).sum(1), kl)
    order = torch.stack(each)[0].argsort()
    assert not torch.equal(order, kl.argsort())


def test_bounds():
    """Never below 0, 10 at most where the dark makes a token likelier, 0 where nothing has changed."""
    old = torch.tensor([-30.0, -5.0, -1e-4, -0.7, -0.7])
    dark = torch.tensor([-1e-4, -1e-4, -30.0, -0.7, -0.71])
    found = seen(old, dark)
    assert found[:2].tolist() == [10, 10] and 9.9 < found[2] <= 10 and found[3] == 0 and 0 < found[4] < 1e-4
    for kind in ("k3", "kl"):
        sure = torch.tensor([[0.0, -500.0], [-500.0, 0.0]])
        for dark in (sure, sure.flip(0)):
            values = vppo.dependency(torch.tensor([0, 0]), sure, dark, vppo.Args(dependency=kind))
            assert all(x.isfinite().all() for x in values) and (values[2] >= 0).all()


@pytest.mark.parametrize("kappa", [0.01, 0.1, 0.15, 0.3, 0.4, 0.7, 1.0])
def test_how_many_are_pivotal(kappa):
    """The share, rounded up, as fractions have it, of every length; and these are the ones that score most."""
    T = 200
    mask = torch.arange(T) < torch.arange(T + 1)[:, None]
    score = torch.randn(T + 1, T, generator=torch.Generator().manual_seed(0))
    M = vppo.pivotal(score.masked_fill(~mask, torch.nan), mask, kappa)
    assert M.sum(1).tolist() == [math.ceil(Fraction(str(kappa)) * n) for n in range(T + 1)]
    assert not (M & ~mask).any() and (kappa < 1 or torch.equal(M, mask))
    least = score.masked_fill(~M, torch.inf).amin(1)
    assert (score.masked_fill(~mask | M, -torch.inf).amax(1) < least).all()
    holes = mask & (torch.arange(T) % 3 != 1)
    assert not (vppo.pivotal(score, holes, kappa) & ~holes).any()


def test_of_equal_scores_the_first():
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :3] = False
    M = vppo.pivotal(torch.zeros(2, 40), mask, 0.25)
    assert M.nonzero()[:, 1].tolist() == [*range(3, 13), *range(10)]


def test_shaping():
    """Of mean 1, beta_min at least, in the order of the mean dependency, whatever its unit."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 4, 0, 7, 1, 5])[:, None]
    S = torch.rand(6, 9, generator=g)
    for beta_min in (0.9, 0.5, 0.0):
        args = vppo.Args(beta_min=beta_min)
        alpha = vppo.shaping(S.masked_fill(~mask, torch.nan), mask, args)
        some, means = mask.any(1), (S * mask).sum(1) / mask.sum(1)
        assert alpha[2] == 1 and alpha[some].mean() == pytest.approx(1, abs=1e-6)
        assert alpha.min() == pytest.approx(beta_min, abs=1e-6)
        assert torch.equal(alpha[some].argsort(), means[some].argsort())
        torch.testing.assert_close(vppo.shaping(3 * S + 2 * mask, mask, args), alpha, rtol=0, atol=1e-5)
        torch.testing.assert_close(vppo.shaping(S[some], mask[some], args), alpha[some], **CLOSE)
    assert torch.equal(vppo.shaping(S, mask, vppo.Args(beta_min=1)), torch.ones(6))


def test_shaping_of_nothing_to_tell_apart_and_of_one_that_stands_out():
    args, mask = vppo.Args(), torch.ones(5, 3, dtype=torch.bool)
    one = torch.tensor([[True] * 3] + [[False] * 3] * 4)
    S = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    for values, m in ((torch.full((5, 3), 0.7), mask), (S, one), (S, mask & False)):
        assert torch.equal(vppo.shaping(values, m, args), torch.ones(5))
    far = vppo.shaping(torch.tensor([[8.0], [0], [0], [0], [0]]).expand(5, 3), mask, args)
    torch.testing.assert_close(far, torch.tensor([1.4, 0.9, 0.9, 0.9, 0.9]), **CLOSE)  # beta_max = 0.9 + 0.1 B


def test_with_all_tokens_alike_it_is_dapo_s_loss():
    """--kappa 1 --beta-min 1 --penalty 0: to the last bit, clips included, where no dual clip reaches."""
    logp, old_logp, adv, mask = example()
    args = vppo.Args(kappa=1, beta_min=1, penalty=0)
    random = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    mine = adv * vppo.pivotal(random, mask, args.kappa) * vppo.shaping(random, mask, args)[:, None]
    found = loss_and_gradient(vppo, args, logp, old_logp, mine, mask, args.penalty)
    base = loss_and_gradient(dapo, dapo.Args(), logp, old_logp, adv, mask)
    assert found[0] == base[0] and torch.equal(found[1], base[1])
    for changes in (dict(eps_low=0.5), dict(eps_high=0.5)):
        assert loss_and_gradient(vppo, vppo.Args(**changes), logp, old_logp, adv, mask)[0] != base[0]


def test_dual_clip():
    """A token of a negative advantage costs at most three times that; a positive one has no such floor."""
    old_logp = torch.full((1, 4), -4.0)
    adv, mask = torch.tensor([[-2.0, -2.0, -2.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    logp = (old_logp + torch.tensor([[2.9, 3.1, 50.0, 50.0]]).log()).requires_grad_()
    objective, _ = vppo.surrogate(logp, old_logp, adv, mask, vppo.Args())
    torch.testing.assert_close(objective, torch.tensor([[-5.8, -6.0, -6.0, 2 * 1.28]]))
    objective.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-5.8, 0.0, 0.0, 0.0]]))


# ---------------------------------------------------------------- the reading in the dark


@pytest.fixture(scope="module")
def start():
    """The tiny model, with a rollout of its."""
    args, config = settings.resolve(vppo.Args(engine="hf", group_size=4))
    processor = vision.load_processor(args, args.image_tokens)
    task, pictures = vision.load(args, processor)
    policy = vision.look(models.load(args, torch.device("cpu")), task, pictures)
    engine = engines.make_engine(policy, processor.tokenizer, args, models.check_context(config, task, args))
    scorer = rewards.Scorer(task.check, inline=True)
    batch = rollout.collect(engine, scorer, processor.tokenizer, task.train[:4], args, 0)
    return SimpleNamespace(args=args, processor=processor, task=task, pictures=pictures, policy=policy, batch=batch)


def again(start, step=0, batch=None, **flags):
    """-> log-probs, entropy, S, chance."""
    args = SimpleNamespace(**vars(start.args) | flags)
    return vppo.read_twice(start.policy, batch or start.batch, step, args)


def test_the_light_is_as_ever(start):
    """Log-probs and entropy are those of one plain reading; a picture that loses nothing has no dependency."""
    plain = read(start.policy, start.batch, start.args)
    for flags in (dict(), dict(blacken=0.0), dict(dependency="kl")):
        found = again(start, **flags)
        for a, b in zip(found, plain):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        assert not found[2][~start.batch.mask].any()
    assert again(start, blacken=0.0)[2].abs().max() < 1e-6 < 0.1 < again(start)[2].max()


def test_dependency_is_of_the_digits(start):
    S, ids = again(start)[2], start.batch.ids[:, -start.batch.mask.shape[1] :]
    digits = torch.tensor(start.processor.tokenizer.convert_tokens_to_ids(list("0123456789")))
    behind = torch.nn.functional.pad(ids, (1, 0))[:, :-1] == start.processor.tokenizer.convert_tokens_to_ids("=")
    counted = torch.isin(ids, digits) & behind & start.batch.mask
    assert S[counted].mean() > 30 * S[start.batch.mask & ~counted].mean()
    assert vppo.pivotal(S, start.batch.mask, 0.4)[counted].float().mean() > 0.85


def test_all_black_is_an_empty_scene(start):
    """Scored by the model as the picture of nothing is."""
    number, start.pictures.own = len(start.pictures.shown), {}
    start.pictures.shown.append(tiny_vision.render([]))
    ids = start.batch.ids.where(start.batch.ids > -2, -2 - number)
    logp, _ = start.policy(ids, start.batch.attention_mask, start.batch.mask)
    start.pictures.shown.pop()
    start.pictures._cached.cache_clear()
    found = again(start, blacken=1.0)
    d = (logp.detach() - found[0])[start.batch.mask].clamp(-20, 20)
    torch.testing.assert_close(found[2][start.batch.mask], (d.exp() - d - 1).clamp(0, 10), rtol=1e-3, atol=1e-4)


def test_draws(start, monkeypatch):
    """Every completion has its own, by seed, step, prompt and number in its group, whatever is read with it."""
    varied, found = start.pictures.varied, {}

    def overheard(mb, change):
        out = varied(mb, change)
        found.update(zip(mb.row.tolist(), [patches for patches, *_ in start.pictures.own.values()]))
        return out

    monkeypatch.setattr(start.pictures, "varied", overheard)

    def drawn(step=0, **flags):
        found.clear()
        again(start, step, **flags)
        return dict(sorted(found.items()))

    plain, shares = drawn(), []
    assert [*plain] == [*range(16)]
    for row, patches in plain.items():
        own = start.pictures[-2 - start.batch.ids[row].min().item()][0]
        black = (patches == -1).all(1)
        assert torch.equal(patches[~black], own[~black])
        shares.append(black[(own != -1).any(1)].float().mean())
    assert 0.35 < torch.stack(shares).mean() < 0.65
    assert len({p.numpy().tobytes() for p in plain.values()}) > 10
    for other in (drawn(step=1), drawn(seed=2)):
        assert sum(torch.equal(plain[i], other[i]) for i in plain) < 4
    fine = drawn(micro_batch_tokens=60)
    assert all(torch.equal(plain[i], fine[i]) for i in plain)
    # Cut otherwise, and the second half alone, as another process has it.
    S, chance = again(start)[2:]
    fine = again(start, micro_batch_tokens=60)
    torch.testing.assert_close(fine[2], S, rtol=1e-3, atol=1e-5)
    half = again(start, batch=start.batch.groups(torch.tensor([2, 3])))
    T = half[2].shape[1]
    torch.testing.assert_close(half[2], S[8:, :T], rtol=1e-3, atol=1e-5)
    assert torch.equal(half[3], chance[8:, :T]) and torch.equal(fine[3], chance)
    assert (0 <= chance).all() and (chance < 1).all() and len(chance.unique()) > 0.99 * chance.numel()


def test_black_is_the_processor_s(start):
    """Of a model whose channels have means of their own, whose patches are merged; of all pictures of a prompt; and a prompt
    without one stays as it is."""
    clip = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
    made = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=dict(shortest_edge=28**2, longest_edge=2**16), **clip)
    pictures = vision.Pictures(vision.Processor(start.processor.tokenizer, made))
    rng = np.random.default_rng(0)
    pictures.shown = [rng.integers(0, 255, size, np.uint8) for size in ((56, 84, 3), (28, 56, 3))]
    rows = [([*pictures.tokens(0), 7, *pictures.tokens(1), 8], [9, 10]), ([7, 8], [9])]
    batch, T = collate(rows), 2
    batch.prompt_id = torch.tensor([0, 1])

    class Blind:
        lm = None

        def __init__(self):
            self.pictures = pictures

        def __call__(self, ids, attention_mask, mask, *_, states=False, **__):
            return ids if states else (torch.zeros(len(ids), T),) * 3

    args = vppo.Args(max_new_tokens=2, micro_batch_tokens=10**4, blacken=1.0)
    vppo.read_twice(Blind(), batch, 0, args)
    assert len(pictures.own) == 2  # of the first row both, of the second none
    for (patches, grid, _), shown in zip(pictures.own.values(), pictures.shown):
        wanted, size, _ = pictures.processor.patches(np.zeros_like(shown))
        assert torch.equal(size, grid) and len(patches) == grid.prod() > 4
        torch.testing.assert_close(patches, wanted, rtol=0, atol=1e-6)
    args.blacken = 0.5
    vppo.read_twice(Blind(), batch, 0, args)
    gone = [(patches - pictures.processor.patches(np.zeros_like(s))[0]).abs().amax(1) < 1e-6 for (patches, *_), s in
            zip(pictures.own.values(), pictures.shown)]  # fmt: skip
    assert all(0 < g.sum() < len(g) for g in gone) and not torch.equal(gone[0][: len(gone[1])], gone[1])


def test_mistakes():
    for bad in (dict(kappa=0.0), dict(kappa=1.1), dict(beta_min=1.1), dict(blacken=-0.1), dict(blacken=1.5), dict(mask="most"),
                dict(dependency="js"), dict(penalty=-1.0), dict(group_size=1)):  # fmt: skip
        with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
            settings.resolve(vppo.Args(**bad))


# ---------------------------------------------------------------- runs

SMALL = "--steps 1 --prompts-per-step 1 --group-size 8 --minibatches 1 --eval-prompts 2".split()

TURNS = """
import itertools

turn = itertools.cycle((0.0, 0.0, 1.0))

def check(text, answer):  # a group has right and wrong ones then, whatever the model says
    return next(turn)
"""


def ran(tmp_path, name, *argv):
    """-> metrics, samples of the first prompt, {column: [n, T]} and mask of these, and the bytes of the weights."""
    (tmp_path / "mine.py").write_text(TURNS)
    argv = [*SMALL, *argv, "--reward", f"{tmp_path}/mine.py:check", "--run-dir", tmp_path / name]
    done = run(tmp_path, *argv, script=ROOT / "algos" / "vppo.py")
    assert done.code == 0, done.err
    (metrics,), samples = lines(tmp_path / name / "metrics.jsonl"), lines(tmp_path / name / "samples.jsonl")
    width, columns = max(len(s["tokens"]) for s in samples), {}
    for k in samples[0]["columns"]:
        columns[k] = torch.tensor([s["columns"][k] + [0] * (width - len(s["tokens"])) for s in samples]).float()
    mask = torch.stack([torch.arange(width) < len(s["tokens"]) for s in samples])
    weights = (tmp_path / name / "checkpoints" / "step-000001" / "model.safetensors").read_bytes()
    return SimpleNamespace(metrics=metrics, samples=samples, columns=columns, mask=mask, weights=weights)


def advantages(found):
    """Of a group's samples, [G, 1]."""
    return vppo.advantages(torch.tensor([[s["reward"] for s in found.samples]]), vppo.Args()).T


def test_a_run(tmp_path):
    """The advantages and the loss of a rollout are those of the functions above; and what else a flag does."""
    plain = ran(tmp_path, "plain")
    c, mask, args = plain.columns, plain.mask, vppo.Args()
    assert set(c) == {"logp", "adv", "dependency", "pivotal"} and len(mask) == 8
    kept, alpha = c["pivotal"].bool(), vppo.shaping(c["dependency"], mask, args)[:, None]
    assert kept.sum(1).tolist() == [math.ceil(0.4 * len(s["tokens"])) for s in plain.samples]
    least, most = (c["dependency"].masked_fill(~m, x) for m, x in ((kept, torch.inf), (mask & ~kept, -torch.inf)))
    assert (least.amin(1) >= most.amax(1)).all() and (least.amin(1) < 0.05).all()
    torch.testing.assert_close(c["adv"], advantages(plain) * alpha * c["pivotal"], rtol=0, atol=1e-3)
    assert c["adv"].any() and plain.metrics["shaping_max"] == pytest.approx(alpha.max().item(), abs=1e-3)
    loss = -(c["adv"] + 0.06 * c["logp"])[mask].mean().item()
    assert plain.metrics["loss"] == pytest.approx(loss, abs=1e-4) != pytest.approx(-c["adv"][mask].mean().item(), abs=1e-3)

    even = ran(tmp_path, "even", *"--kappa 1 --beta-min 1 --blacken 0.2".split())
    assert even.metrics["kept"] == even.metrics["shaping_max"] == 1 and 0.4 <= plain.metrics["kept"] < 0.45
    torch.testing.assert_close(even.columns["adv"], advantages(even) * mask, rtol=0, atol=1e-3)
    assert even.metrics["dependency"] == even.metrics["dependency_kept"] < plain.metrics["dependency"]

    low = ran(tmp_path, "low", *"--mask lowest --dependency kl --penalty 0".split())
    assert low.metrics["loss"] == pytest.approx(-low.columns["adv"][mask].mean().item(), abs=1e-4)
    assert low.metrics["kept"] == plain.metrics["kept"] and low.metrics["dependency_kept"] < 0.05 * low.metrics["dependency"]
    assert (low.columns["dependency"] - c["dependency"]).abs().max() > 0.1

    unsure = ran(tmp_path, "unsure", "--mask", "entropy")
    assert unsure.metrics["kept"] == plain.metrics["kept"] and torch.equal(unsure.columns["dependency"], c["dependency"])
    assert 0.5 < (unsure.columns["pivotal"] == c["pivotal"])[mask].float().mean() < 0.95
    assert (
        c["logp"][c["pivotal"] > unsure.columns["pivotal"]].mean() > c["logp"][unsure.columns["pivotal"] > c["pivotal"]].mean()
    )
    assert len({r.weights for r in (plain, even, low, unsure)}) == 4


def test_a_prompt_without_a_picture_keeps_all_and_is_not_shaped(tmp_path):
    """Beside one that has a picture, of which tokens are kept at random."""
    from PIL import Image

    Image.fromarray(tiny_vision.render(count_sum.scene(0)[0])).save(tmp_path / "scene.png")
    rows = [dict(prompt="red+blue?", answer="2", image="scene.png"), dict(prompt="red+blue?", answer="3")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0] | dict(prompt="red+gold?")) + "\n")
    (tmp_path / "own.py").write_text("def score(text, answer):\n    return text, float(sum(map(ord, text)) % 7)\n")
    folder = tiny_vision.warm_start(tasks.load("count_sum:noisy"))
    local = f"--model {folder} --dtype float32 --optimizer adamw --max-new-tokens 40 --mask random".split()
    local += "--prompts-per-step 2 --prompt-template {prompt} --seed 1".split()
    blind = ran(tmp_path, "run", *local, "--task", tmp_path / "train.jsonl", "--reward", f"{tmp_path}/own.py:score")
    c, metrics = blind.columns, blind.metrics
    assert not c["dependency"].any() and torch.equal(c["pivotal"].bool(), blind.mask)  # the first prompt is the one without
    torch.testing.assert_close(c["adv"], advantages(blind) * blind.mask, rtol=0, atol=1e-3)
    all_, free = metrics["tokens"], int(blind.mask.sum())
    assert free + 0.4 * (all_ - free) <= all_ * metrics["kept"] < free + 0.4 * (all_ - free) + 8  # rounded up in 8 rows
    assert metrics["shaping_max"] > 1.05
    assert 0.05 < metrics["dependency_kept"] / metrics["dependency"] < 0.95
