"""Precision pre-training: the card's numbers in both readings, what the knobs are to each other, a start at random weights."""

import json
import math

import pytest
import torch

from algos import grpo
from algos import precision_pretraining as precision
from common import gpu, models, settings
from tests.helpers import ROOT, checkpoints, lines, run

SCRIPT = ROOT / "algos" / "precision_pretraining.py"
LOGITS = [2.0, 1, 0, -1]


def value(logits=LOGITS, target=1, dtype=torch.float32, **flags):
    """-> (loss, its gradient, tail mass) at one position, whose next token is 1 on the card."""
    leaf = torch.tensor([logits], dtype=dtype, requires_grad=True)
    loss, _, _, tail = precision.token_loss(torch.tensor([target]), leaf, precision.Args(**dict(top_k=2) | flags))
    loss.sum().backward()
    return loss.item(), leaf.grad[0].tolist(), tail.item()


CARD = [  # beta, lambda_top, lambda_tail, how the right token's reward is read
    ((0.0, 0.0, 0.0, "product"), 1.440190, [0.643914, -0.763117, 0.087144, 0.032059]),  # cross-entropy
    ((0.0, 0.0, 0.0, "power"), 1.440190, [0.643914, -0.763117, 0.087144, 0.032059]),
    ((-0.25, 0.0, 0.0, "product"), 1.540891, [0.688938, -0.816476, 0.093238, 0.034300]),
    ((0.5, 0.0, 0.0, "product"), 1.258100, [0.562501, -0.666633, 0.076126, 0.028005]),
    ((0.0, 0.1, 0.0, "product"), 1.468534, [0.620985, -0.747864, 0.092756, 0.034123]),
    ((0.0, 0.0, -0.1, "product"), 1.407896, [0.636239, -0.765941, 0.094820, 0.034882]),
    ((-0.25, 0.1, -0.1, "product"), 1.536942, [0.658334, -0.804046, 0.106525, 0.039188]),
    ((-0.25, 0.0, 0.0, "power"), 1.592772, [0.712135, -0.843967, 0.096377, 0.035455]),
    ((0.5, 0.0, 0.0, "power"), 1.200437, [0.536720, -0.636079, 0.072637, 0.026722]),
    ((-0.25, 0.1, -0.1, "power"), 1.588823, [0.681530, -0.831537, 0.109664, 0.040343]),
]


@pytest.mark.parametrize("flags, loss, gradient", CARD)
def test_worked_example(flags, loss, gradient):
    found, grad, tail = value(**dict(zip(("beta", "lambda_top", "lambda_tail", "positive"), flags)))
    assert found == pytest.approx(loss, abs=1e-6) and grad == pytest.approx(gradient, abs=1e-6)
    assert tail == pytest.approx(0.087144 + 0.032059, abs=1e-6)


def test_no_gradient_through_the_reward():
    """With it, beta -0.25 would have the gradient of a focal loss, which the card lists as the wrong reading."""
    assert value(beta=-0.25)[1] != pytest.approx([0.611940, -0.725223, 0.082817, 0.030467], abs=1e-3)


@pytest.mark.parametrize("positive", ["product", "power"])
def test_the_gradient_is_the_policy_gradient_of_the_reward(positive):
    """-sum_a pi(a) r(a) (e_a - pi) of one step, with each reading's r as the paper's notes write it."""
    beta, top, tail, logits = -0.25, 0.3, -0.2, [0.3, -1.0, 2.0, 0.9, -0.4]
    pi = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    x = 4
    r = torch.tensor([tail, tail, top, top, 0.0], dtype=torch.float64)
    own = (1 - pi[x]) ** beta / pi[x] if positive == "product" else (1 / pi[x]) ** ((1 - pi[x]) ** beta)
    r[x] = own
    expected = -((pi * r)[:, None] * (torch.eye(5, dtype=torch.float64) - pi)).sum(0)
    _, grad, _ = value(logits, x, torch.float64, beta=beta, lambda_top=top, lambda_tail=tail, positive=positive)
    assert grad == pytest.approx(expected.tolist(), abs=1e-12)


def test_equal_lambdas_are_a_weight_of_the_right_token():
    """Since the policy gradient of a constant is 0: (1 - pi)^beta - lambda pi in place of (1 - pi)^beta."""
    pi = torch.tensor(LOGITS, dtype=torch.float64).softmax(-1)[1].item()
    for beta, lam in ((0.0, 0.4), (-0.25, -0.3)):
        _, both, _ = value(dtype=torch.float64, beta=beta, lambda_top=lam, lambda_tail=lam)
        _, plain, _ = value(dtype=torch.float64, beta=0.0)
        weight = (1 - pi) ** beta - lam * pi
        assert both == pytest.approx([weight * g for g in plain], abs=1e-12)


def test_the_right_token_earns_its_own_reward_alone():
    """Whether it is among the k likeliest or not; k is the whole vocabulary at most."""
    for target in range(4):
        _, with_top, _ = value(target=target, beta=0.0, lambda_top=0.5, top_k=4)
        _, with_both, _ = value(target=target, beta=0.0, lambda_top=0.5, lambda_tail=0.5, top_k=1)
        assert with_top == pytest.approx(with_both, abs=1e-6)
    assert value(top_k=100)[2] == 0 and value(top_k=1)[2] == pytest.approx(1 - 0.643914, abs=1e-6)


@pytest.mark.parametrize("positive, weight", [("product", 1e-4**-0.25), ("power", 1.0)])
def test_a_sure_token(positive, weight):
    """1 - pi is held above 1e-4, where beta is below 0: at pi = 1 the product's weight is 10 and the power's that of
    cross-entropy. The weight is the gradient of the right logit over pi - 1; at 0.99 the plan names 3.16 and 1.02."""
    sure = [20.0, 0.0]
    loss, grad, _ = value(sure, 0, torch.float64, beta=-0.25, positive=positive)
    miss = 1 / (1 + math.exp(20))
    assert grad[0] == pytest.approx(-weight * miss, rel=1e-3) and loss == pytest.approx(weight * miss, rel=1e-3)
    for share, at in ((0.99, dict(product=3.16, power=1.02)), (0.5, dict(product=1.19, power=1.14))):
        _, grad, _ = value([math.log(share / (1 - share)), 0.0], 0, torch.float64, beta=-0.25, positive=positive)
        assert grad[0] / (share - 1) == pytest.approx(at[positive], abs=0.005)
    assert value([200.0, 0.0], 0, beta=0.5, positive=positive)[0] == 0  # no floor above 0


# ---------------------------------------------------------------- runs

SMALL = "--batch-size 8 --eval-prompts 8 --checkpoint-every 0 --steps".split()


def test_from_random_weights_to_grpo(tmp_path):
    """Drawn from the seed, not made by a warm start; what comes out is a model that grpo goes on with, on the same task."""
    for name, seed in (("one", 1), ("two", 2)):
        done = run(tmp_path, *SMALL, 1, "--seed", seed, "--lr", 0, "--run-dir", tmp_path / name, script=SCRIPT,
                   env=dict(TOKENPO_CACHE=str(tmp_path / "cache")))  # fmt: skip
        assert done.code == 0 and done.err == "" and "warm start" not in done.out, done.err
    one, two = (lines(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two"))
    assert one["train_perplexity"] == pytest.approx(79, rel=0.1) and one["train_perplexity"] != two["train_perplexity"]
    assert one["entropy"] == pytest.approx(math.log(79), abs=0.1) and one["tail_mass"] == pytest.approx(74 / 79, abs=0.05)
    assert one["loss"] > -one["logp"]  # a weight above 1 at beta -0.25, and a perplexity that is not the loss's
    assert [p.name[:10] for p in (tmp_path / "cache").iterdir() if p.is_dir()] == ["tiny-route"]
    config = json.loads((checkpoints(tmp_path / "one")[-1] / "config.json").read_text())
    assert config["warm_started_on"] == "route"
    args, _ = settings.resolve(grpo.Args(model=str(tmp_path / "one")))
    assert (args.task, args.lr, args.steps) == ("route", 1e-4, 120)
    found = models.load(args, gpu.device()).lm.model.layers[0].mlp.up_proj.weight
    torch.manual_seed(1)
    drawn = type(models.load(args, gpu.device()).lm)(models.architecture(args)[0]).model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, drawn)  # at rate 0: the weights of seed 1


def test_one_core_for_a_tiny_model_s_checkpoint(tmp_path, monkeypatch):
    """In its folder it is as small as by its name."""
    from common.worlds import tiny

    tiny.config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for on, cores in (("route", 1), (None, 4)):
        (tmp_path / "config.json").write_text(json.dumps(config | dict(warm_started_on=on)))
        settings.prepare("grpo.py", grpo.Args(model=str(tmp_path), task="route"))
        assert threads.pop() == cores
