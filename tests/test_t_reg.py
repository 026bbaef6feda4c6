"""T-REG's worked example, its limits, and the prompts behind its token reward."""

import json

import pytest
import torch

from algos import dpo, t_reg, tgdpo
from common import encoding, models, pairs, tasks
from common.worlds import tiny
from tests.helpers import ROOT, lines, run, user_error
from tests.test_dpo import example, pair
from tests.test_tgdpo import loss_and_gradient

PLAIN = dict(args=dict(alpha=0.0))  # DPO
SMOOTH = dict(static_weight=True)  # the pair's weight is no function to be differentiated

CLOSE = dict(rtol=0, atol=1e-6)
T_REG = ROOT / "algos" / "t_reg.py"
SMALL = "--steps 4 --pairs-per-step 8 --eval-prompts 16".split()
CARD = dict(beta=0.5, alpha=0.25)


def prompted():
    """The pair of the card: logp (a leaf), ref_logp, better_logp, worse_logp, mask."""
    logp, ref_logp, mask = example()
    better_logp = torch.tensor([[-0.2, -0.9, -0.5], [-1.5, -1.0, 0.0]])
    return logp, ref_logp, better_logp, torch.tensor([[-0.8, -0.7, -0.5], [-0.5, -1.2, 0.0]]), mask


def random_pairs(seed=0):
    logp, ref_logp, mask = pair([(5, 2), (1, 4), (3, 3)], seed)
    g = torch.Generator().manual_seed(seed)
    return logp, ref_logp, *(-torch.rand(mask.shape, generator=g) * 3 for _ in range(2)), mask


def test_worked_example():
    losses, stats, grad = loss_and_gradient(t_reg, *prompted(), **CARD)
    assert losses.item() == pytest.approx(0.638741, abs=1e-6)
    assert stats["w"].item() == pytest.approx(0.475021, abs=1e-6) and stats["R"].item() == pytest.approx(-0.047629, abs=1e-6)
    expected = torch.tensor([[-0.246159, -0.234551, -0.237510], [0.251230, 0.234551, 0.0]])
    torch.testing.assert_close(grad, expected, **CLOSE)
    assert (grad[0] - torch.tensor([-0.244674, -0.233067, -0.236026])).abs().min() > 1e-3  # with gradient through w
    assert stats["chosen_r_hat"].item() == pytest.approx((0.145656 - 0.049834) / 3, abs=1e-6)
    assert stats["rejected_r_hat"].item() == pytest.approx((-0.231059 + 0.049834) / 2, abs=1e-6)
    found = [stats[k].item() for k in ("chosen_ratio", "rejected_ratio", "margin", "reward_accuracy")]
    assert found == pytest.approx([0.1, -0.1, 0.2, 1.0], abs=1e-6)


def test_static_weight():
    losses, stats, grad = loss_and_gradient(t_reg, *prompted(), **CARD, static_weight=True)
    torch.testing.assert_close(grad[0], torch.tensor([-0.255717, -0.231281, -0.237510]), **CLOSE)
    assert losses.item() == pytest.approx(0.644397 - 0.25 * 0.047629, abs=1e-6)


def test_token_reward():
    logp, _, better_logp, worse_logp, mask = prompted()
    r_hat = t_reg.token_reward(better_logp, worse_logp, mask)
    expected = torch.tensor([[0.145656, -0.049834, 0.0], [-0.231059, 0.049834, 0.0]])
    torch.testing.assert_close(r_hat, expected, **CLOSE)
    garbage = torch.where(mask, better_logp, torch.nan).requires_grad_()
    again = t_reg.token_reward(garbage, torch.where(mask, worse_logp, -torch.inf), mask)
    assert torch.equal(again, r_hat) and not again.requires_grad
    far = t_reg.token_reward(torch.tensor([[0.0, -900.0]]), torch.tensor([[-900.0, 0.0]]), torch.ones(1, 2).bool())
    assert far.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("settings", [dict(alpha=0.0), dict(alpha=0.5)])
def test_alpha_0_and_equal_prompts_are_dpo(settings):
    logp, ref_logp, better_logp, worse_logp, mask = random_pairs()
    worse_logp = better_logp if settings["alpha"] else worse_logp
    losses, stats, grad = loss_and_gradient(t_reg, logp, ref_logp, better_logp, worse_logp, mask, **settings)
    expected, seen, slope = loss_and_gradient(dpo, logp, ref_logp, mask)
    assert torch.equal(losses, expected) and torch.equal(grad, slope)
    assert all(torch.equal(stats[k], v) for k, v in seen.items())


@pytest.mark.parametrize("beta, alpha", [(0.3, 0.25), (1.0, 0.5)])
def test_the_gradient_is_dpos_times_a_weight_of_the_token(beta, alpha):
    logp, ref_logp, better_logp, worse_logp, mask = random_pairs()
    losses, stats, grad = loss_and_gradient(t_reg, logp, ref_logp, better_logp, worse_logp, mask, beta=beta, alpha=alpha)
    plain, _, slope = loss_and_gradient(dpo, logp, ref_logp, mask, beta=beta)
    side = torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]
    r_hat = torch.sigmoid(better_logp - worse_logp) - 0.5
    torch.testing.assert_close(grad, slope * (1 + side * alpha * r_hat))
    R = -(beta * r_hat * logp.detach()).masked_fill(~mask, 0.0).sum(1)  # a sum over tokens, +r_hat on both sides
    R = R[:3] + R[3:]
    torch.testing.assert_close(stats["R"], R)
    torch.testing.assert_close(losses, plain + alpha * torch.sigmoid(-beta * stats["margin"]) * R)


def test_at_the_reference_it_is_tgdpo_with_this_r_hat():
    """There both have w = 1/2; elsewhere TGDPO's w is of the weighted margin."""
    _, ref_logp, better_logp, worse_logp, mask = random_pairs()
    _, _, grad = loss_and_gradient(t_reg, ref_logp, ref_logp, better_logp, worse_logp, mask, alpha=0.5)
    guide_logp = ref_logp + t_reg.token_reward(better_logp, worse_logp, mask) / 0.3
    _, _, other = loss_and_gradient(tgdpo, ref_logp, ref_logp, guide_logp, mask, alpha=0.5)
    torch.testing.assert_close(grad, other)


def test_no_gradient_reaches_the_two_prompts():
    logp, ref_logp, better_logp, worse_logp, mask = random_pairs()
    better_logp.requires_grad_(), worse_logp.requires_grad_()
    losses, _ = t_reg.pair_loss(logp, ref_logp, better_logp, worse_logp, mask, t_reg.Args())
    losses.sum().backward()
    assert better_logp.grad is None and worse_logp.grad is None and logp.grad.any()


def test_revision():
    assert t_reg.revision("1nabc:", "kkk", True, tagged=True) == "1+abc:"
    assert t_reg.revision("2nnnn:", "kkk", False, tagged=True) == "2-nnn:"
    better, worse = (t_reg.revision("What is 2+2?", "It is 4.", b) for b in (True, False))
    for text in (better, worse):
        assert text.index("What is 2+2?") < text.index("It is 4.") and text.count("It is 4.") == 1
    assert "more helpful" in better and "less helpful" in worse and "less helpful" not in better
    world = tasks.world("letters")
    plain, variants = world.train[0].prompt, [e.prompt for e in world.shown[:2]]  # what the warm start has seen
    assert variants == [t_reg.revision(plain, "", b, tagged=True) for b in (True, False)]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def letters():
    return tiny.warm_start(tasks.load("letters"))


def columns(folder):
    return [pairs._Cache(folder / f"{name}.safetensors") for name in ("reference", "better", "worse")]


def test_the_tags_give_nearly_the_true_token_reward(tmp_path, letters):
    done = run(tmp_path, *SMALL, "--run-dir", tmp_path / "run", script=T_REG)
    assert done.code == 0 and done.err == "" and "token reward" not in done.out
    args = t_reg.Args(data="letters", max_new_tokens=12)
    data = pairs.load(args, tiny.config(), tiny.characters())
    _, better, worse = columns(tmp_path / "run")
    r_hat, gold = [], []
    for p in data.train[:300]:
        for row, ids, worth in zip((2 * p.id, 2 * p.id + 1), (p.chosen, p.rejected), p.gold):
            some = torch.ones(1, len(ids)).bool()
            r_hat.append(t_reg.token_reward(better[row][None], worse[row][None], some)[0])
            gold.append(torch.tensor(worth).float())
    assert torch.corrcoef(torch.stack([torch.cat(r_hat), torch.cat(gold)]))[0, 1] > 0.8
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["w"] == pytest.approx(0.5, abs=1e-4) and first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["chosen_r_hat"] > 0 > first["rejected_r_hat"] and first["R"] != 0


def test_a_game_without_better_and_worse_prompts(tmp_path):
    done = run(tmp_path, "--data", "chain", script=T_REG)
    assert "--data chain: its prompts have no better and worse variants" in user_error(done)


def test_a_file(tmp_path, letters):
    """Real data: the prompts quote question and answer; one pair's are too long for the model, and it has no token reward."""
    rows = [dict(prompt=f"{i}: abc?", chosen="abc", rejected="kkkk") for i in range(30)]
    rows.append(dict(prompt="z" * 1000, chosen="abc", rejected="kkkk"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0] | dict(prompt="99: abc?")) + "\n")
    done = run(
        tmp_path, "--data", tmp_path / "train.jsonl", "--model", letters, "--dtype", "float32", "--optimizer", "adamw",
        "--steps", 2, "--pairs-per-step", 4, "--max-new-tokens", 6, "--run-dir", tmp_path / "run", script=T_REG,
    )  # fmt: skip
    assert done.code == 0, done.err
    note = "note: 2 responses have no token reward: their revision prompts are too long"
    assert [line for line in done.out.splitlines() if line.startswith("note")] == [note]
    reference, *found = columns(tmp_path / "run")
    for column in found:
        assert torch.equal(column[60], reference[60]) and torch.equal(column[61], reference[61])
    args = t_reg.Args(model=letters, data="-", dtype="float32", micro_batch_tokens=16384)
    tokenizer, model = models.load_tokenizer(args), models.load(args, "cpu", trainable=False)
    for better, column in zip((True, False), found):
        for row, answer in ((8, "abc"), (9, "kkkk")):
            prompt = encoding.prompt_ids([t_reg.revision("4: abc?", answer, better)], tokenizer, "")[0]
            response = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            (expected,) = pairs.logp_of(model, [(prompt, response)], args)
            torch.testing.assert_close(column[row], expected, rtol=1e-4, atol=1e-4)
