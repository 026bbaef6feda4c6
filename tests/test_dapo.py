"""DAPO's worked example, its length penalty and its filter of groups."""

import json

import pytest
import torch

from algos import dapo, grpo
from common import rewards, rollout
from tests.card import example, loss_and_gradient

CLOSE = dict(rtol=0, atol=1e-6)


def test_worked_example():
    loss, grad = loss_and_gradient(dapo, dapo.Args())
    assert loss == pytest.approx(-0.315694, abs=1e-6)
    expected = torch.tensor([[-0.203567, -0.082764, -0.163366, 0], [0, 0.214004, 0, 0]])
    torch.testing.assert_close(grad, expected, **CLOSE)


def test_with_a_symmetric_interval_the_first_token_is_clipped():
    loss, grad = loss_and_gradient(dapo, dapo.Args(eps_high=0.2))
    assert loss == pytest.approx(-0.298793, abs=1e-6)
    assert grad[0, 0] == 0 and grad[0, 1] == pytest.approx(-0.082764, abs=1e-6)


def test_a_lower_floor_frees_the_negative_token():
    loss, grad = loss_and_gradient(dapo, dapo.Args(eps_low=0.5))  # its ratio is e^-0.3
    assert loss != pytest.approx(-0.315694, abs=1e-3) and grad[1, 0] > 0


def test_a_symmetric_interval_and_equal_lengths_give_grpo():
    logp, old_logp, adv, _ = example()
    mask, results = torch.ones(2, 4, dtype=torch.bool), []
    for script, args in ((dapo, dapo.Args(eps_high=0.2)), (grpo, grpo.Args())):
        objective, _ = script.surrogate(logp, old_logp, adv, mask, args)
        loss = (objective * script.token_weights(mask, args)).sum()
        results.append((loss, *torch.autograd.grad(loss, logp)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_every_token_weighs_the_same():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    torch.testing.assert_close(dapo.token_weights(mask, dapo.Args()), mask * 0.2)


def test_length_penalty():
    args = dapo.Args(max_new_tokens=20, overlong_share=0.2)
    penalty = dapo.overlong_penalty(torch.tensor([[10, 16, 17], [18, 20, 21]]), args)
    torch.testing.assert_close(penalty, torch.tensor([[0, 0, -0.25], [-0.5, -1, -1]]))
    earlier = dapo.overlong_penalty(torch.tensor([10, 16]), dapo.Args(max_new_tokens=20, overlong_share=0.5))
    torch.testing.assert_close(earlier, torch.tensor([0, -0.6]))
    sharp = dapo.overlong_penalty(torch.tensor([0, 19, 20]), dapo.Args(max_new_tokens=20, overlong_share=0.0))
    assert sharp.tolist() == [0, 0, -1]


def test_half_the_penalty_on_rewards_of_0_and_1_is_the_papers():
    accuracy = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1]])
    penalty = dapo.overlong_penalty(torch.tensor([[10, 18, 12, 20], [16, 17, 19, 20]]), dapo.Args(max_new_tokens=20))
    ours = dapo.advantages(accuracy + dapo.Args().overlong_weight * penalty, dapo.Args())
    papers = dapo.advantages(2 * accuracy - 1 + penalty, dapo.Args())
    torch.testing.assert_close(ours, papers, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, dapo.advantages(accuracy + penalty, dapo.Args()), atol=1e-2)


def test_only_mixed_groups_are_informative():
    accuracy = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0]])
    assert dapo.informative(accuracy, dapo.Args()).tolist() == [False, True, False, True]
    assert dapo.informative(accuracy, dapo.Args(max_gen_batches=0)).all()
    scores = torch.tensor([[0.5, 0.5, 0.5], [5.0, 7.0, 9.0], [-1.0, -1.0, -0.5], [2.0, 2.0, 2.0]])  # of a reward of one's own
    assert dapo.informative(scores, dapo.Args()).tolist() == [False, True, True, False]


def test_checks_that_were_killed_are_counted(tmp_path, monkeypatch):
    """Of every round of sampling, whichever groups are kept: three in each."""
    scorer = rewards.Scorer

    class Killing(scorer):
        def __call__(self, texts, answers):
            self.timeouts += 3 * (len(texts) > 16)  # not in the evaluations
            return super().__call__(texts, answers)

    monkeypatch.setattr(rewards, "Scorer", Killing)
    small = dict(steps=2, prompts_per_step=8, group_size=4, eval_prompts=8, minibatches=2, checkpoint_every=0)
    dapo.train(dapo.Args(**small, run_dir=str(tmp_path / "run")))
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    for row in rows:
        rounds = row["generated"] / 32
        assert row["groups"] == 8 and row["reward_timeouts"] == 3 * rounds


def test_nothing_is_learnt_where_no_group_teaches(tmp_path, monkeypatch):
    """All are wrong, of different lengths, and some have the form of an answer: neither the length penalty nor the reward for
    the form makes an update of its own."""
    monkeypatch.setattr(rollout, "has_format", lambda text: len(text) % 2)
    (tmp_path / "mine.py").write_text("def score(text, answer):\n    return 0.0\n")
    small = dict(steps=1, prompts_per_step=4, group_size=4, eval_prompts=4, minibatches=2, checkpoint_every=0)
    flags = dict(
        reward=f"{tmp_path / 'mine.py'}:score",
        max_gen_batches=1,
        format_reward=0.5,
        overlong_share=1.0,
        run_dir=str(tmp_path / "run"),
    )
    dapo.train(dapo.Args(**small, **flags))
    (row,) = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert row["groups"] == 0 and row["adv_max"] == row["adv_min"] == row["loss"] == 0 < row["reward"] < 0.5
