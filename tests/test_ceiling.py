"""The ceiling by supervised learning: its loss against one by hand, and the command."""

import json

import pytest
import torch

from common import UserError
from runs import ceiling
from tests.batches import tiny

__all__ = ["tiny"]


def test_loss_is_that_of_the_demonstrations_alone(tiny):
    """By single rows: the tokens behind the prompt and the end, each counted once, whatever is padded."""
    tokenizer, policy, task = tiny
    rows = [(task.train[0].ids, ":12"), (task.train[1].ids, "1+2=03 4+5=09:93")]
    losses = []
    for prompt, text in rows:
        ids = torch.tensor([[*prompt, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        logp = policy.lm(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-logp[len(prompt) - 1 :])
    assert [len(x) for x in losses] == [4, 17]
    assert ceiling.loss(policy.lm, tokenizer, rows).item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-6)


def test_command(tiny, tmp_path, capsys):
    """One update moves little; each number of updates starts anew, so that their order does not matter."""
    options = ceiling.Options(task="addition", updates=(1, 8), batch=16, out=str(tmp_path / "x" / "ceiling.json"))
    ceiling.main(options)
    found = json.loads((tmp_path / "x" / "ceiling.json").read_text())["greedy_accuracy"]
    assert list(found) == ["1", "8"] and found["1"] < 0.15 and found["8"] > found["1"] + 0.05
    assert f"8 updates: greedy accuracy {found['8']:.3f}" in capsys.readouterr().out


def test_errors():
    with pytest.raises(UserError, match="--updates and --batch need numbers of at least 1"):
        ceiling.main(ceiling.Options(updates=(0,)))
    with pytest.raises(UserError, match="--lr one above 0"):
        ceiling.main(ceiling.Options(lr=-1.0))
    with pytest.raises(UserError, match="--task gsm8k has no demonstrations; those that have: addition, .*route"):
        ceiling.main(ceiling.Options(task="gsm8k"))
