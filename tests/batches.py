"""A tiny policy with a batch of its rollouts, for tests of what stands around the loop."""

from types import SimpleNamespace

import pytest
import torch

from common import engines, models, rollout, tasks


def args(**changes):
    values = dict(model="tiny", task="addition", dtype="float32", lora_rank=0, gradient_checkpointing=False, seed=3,
                  temperature=0.8, micro_batch_tokens=4096, group_size=4, max_new_tokens=28, format_reward=0.0,
                  minibatches=3, epochs=2, tis_cap=2.0, tis_level="token")  # fmt: skip
    return SimpleNamespace(**values | changes)


@pytest.fixture(scope="module")
def tiny():
    a = args()
    tokenizer = models.load_tokenizer(a)
    return tokenizer, models.load(a, torch.device("cpu")), tasks.load("addition:2", tokenizer)


def scorer(texts, answers):
    return list(texts), [float(t.endswith(a)) for t, a in zip(texts, answers)]


def sample(tiny, n=6, **changes):
    tokenizer, policy, task = tiny
    a = args(**changes)
    return a, rollout.collect(engines.HF(policy, tokenizer), scorer, tokenizer, task.train[:n], a, 0)


def ragged_batch(groups=(0, 0, 1, 1, 1, 2, 0), lengths=(9, 1, 30, 5, 5, 0, 22), prompts=(7, 3, 12)):
    """Rows in any order whose prompts are shared, the second prompt the end of the first, with garbage in the padding."""
    g = torch.Generator().manual_seed(0)
    S0, T = max(prompts), max(lengths)
    text = [torch.randint(3, 60, (n,), generator=g) for n in prompts]
    text[1] = text[0][-prompts[1] :]
    ids = torch.randint(3, 60, (len(groups), S0 + T), generator=g)
    attention, mask = torch.zeros(ids.shape).bool(), torch.arange(T) < torch.tensor(lengths)[:, None]
    for i, group in enumerate(groups):
        ids[i, S0 - prompts[group] : S0] = text[group]
        attention[i, S0 - prompts[group] : S0] = True
    attention[:, S0:] = mask
    return ids, attention, mask


def heard(engine, scorer, start, prompts, args):
    """A rollout of a start's first prompts by a Thinker -> the Batch with what it attaches, and what generate() gave, whose
    log-probs are in the model's own precision."""
    said, plain = [], engine.generate
    engine.generate = lambda *given: said.extend(plain(*given)) or said
    batch = rollout.collect(engine, scorer, start.tokenizer, start.task.train[:prompts], args, 0)
    engine.attach(batch)
    engine.generate = plain
    return batch, said


def chain_scorer(texts, prompts):
    """For what was asked on the task chain."""
    right = [str(sum(map(int, prompt[:8])) % 10) for prompt in prompts]
    return list(texts), [float(len(t) == 8 and t[7] == r) for t, r in zip(texts, right)]
