"""The tiny model on the real vLLM: same log-probs as the policy after updates, same greedy completions as transformers."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common import engines as samplers
from common import export, models, rollout, tasks
from common.batch import read
from common.worlds import tiny

SMALL = "--task addition --steps 3 --prompts-per-step 16 --eval-prompts 64 --checkpoint-every 2 --engine vllm".split()


def test_training_end_to_end(tmp_path):
    """Several updates on vLLM's samples; at every step its log-probs are the policy's to 1e-4, and it learns."""
    command = [sys.executable, "algos/grpo.py", *SMALL, "--lr", "3e-4", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert all(0 < r["sampler_gap_max"] < 1e-4 for r in rows)
    assert rows[-1]["approx_kl"] > 0 and rows[-1]["length"] > rows[0]["length"] + 3  # the weights moved, and reached vLLM
    before, after = (float(w) for w in done.stdout.strip().splitlines()[-1].split()[2:5:2])
    assert after > before + 0.2


def test_stop_strings(tmp_path):
    """A completion ends with the first of the strings, which stays in it and is no truncation."""
    argv = [*SMALL, "--steps", "1", "--stop", "=1", ":", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "algos/grpo.py", *argv], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    texts = [r["completion"] for r in rows]
    assert all(t.endswith(("=1", ":")) and not any(s in t[:-1] for s in ("=1", ":")) for t in texts), texts
    assert not any(r["truncated"] for r in rows) and len(rows) == 8
    assert [r["sampler_gap_max"] < 1e-4 for r in map(json.loads, open(tmp_path / "run" / "metrics.jsonl"))] == [True]


@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks(tp, tmp_path):
    """FSDP2 shards the policy; every process samples its own prompts with its own vLLM, or both with one that is spread over
    them (tensor parallelism; three heads cannot be halved, so a model with four); and all end cleanly."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "algos/grpo.py"]
    argv = f"--engine vllm --vllm-tp {tp} --steps 2 --prompts-per-step 8 --eval-prompts 15".split()
    if tp == 2:
        argv += four_heads(tmp_path / "model")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *argv, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=400, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [r["step"] for r in rows] == [1, 2] and all(0 < r["sampler_gap_max"] < 1e-4 for r in rows)
    assert rows[-1]["approx_kl"] > 0 and (tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors").exists()


def four_heads(folder):
    """A random model on letters, where random text has rewards, and the flags that the tiny preset would give."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(**tiny.config().to_dict() | dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2))
    lm = Qwen2ForCausalLM(config)
    tiny.characters().save_pretrained(folder)
    export.write_weights(lm, lm.state_dict().items(), folder)
    flags = "--task letters --group-size 4 --minibatches 2 --max-new-tokens 60 --dtype float32 --optimizer adamw --lr 1e-3"
    return ["--model", str(folder), *flags.split(), "--gradient-checkpointing", "False", "--checkpoint-every", "0"]


@pytest.fixture(scope="module")
def engines():
    args = SimpleNamespace(model="tiny", task="addition", dtype="float32", lora_rank=0, gradient_checkpointing=False,
                           vllm_memory=0.4, vllm_tp=1, temperature=0.7, micro_batch_tokens=4096, seed=0, group_size=4,
                           max_new_tokens=28, format_reward=0.0)  # fmt: skip
    tokenizer = models.load_tokenizer(args)
    policy = models.load(args, torch.device("cpu"))
    task = tasks.load("addition", tokenizer)
    vllm = samplers.VLLM(policy, tokenizer, args, 64, heated=True)  # which changes nothing where temperatures are numbers
    yield args, tokenizer, policy, task, vllm, samplers.HF(policy, tokenizer)
    vllm.close()


def sample(engines, temperature=0.7):
    args, tokenizer, policy, task, vllm, _ = engines
    args.temperature = temperature
    scorer = lambda texts, answers: ([None] * len(texts), [0.0] * len(texts))  # noqa: E731
    batch = rollout.collect(vllm, scorer, tokenizer, task.test[:16], args, 0)
    batch.old_logp = read(policy, batch, args)[0]
    batch.adv = torch.zeros_like(batch.old_logp)
    return batch


def test_new_weights_arrive_and_stale_ones_are_noticed(engines):
    policy, vllm = engines[2], engines[4]
    batch = sample(engines)
    assert ((batch.old_logp - batch.sampler_logp).abs() * batch.mask).max() < 1e-4
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    stale = sample(engines)
    assert ((stale.old_logp - stale.sampler_logp).abs() * stale.mask).max() > 0.1
    vllm.sync()
    fresh = sample(engines)
    assert ((fresh.old_logp - fresh.sampler_logp).abs() * fresh.mask).max() < 1e-4
    stale.sampler_logp = stale.old_logp - 1.0
    with pytest.raises(SystemExit, match="not in step"):
        rollout.summary(stale)


def test_a_temperature_may_be_a_function_of_the_logits(engines):
    """Its log-probs are those of every row's own temperature, as on the other engine; and the next call is plain again."""
    _, _, policy, task, vllm, hf = engines
    vllm.sync()

    def hot(logits):
        return 0.5 + torch.special.entr(logits.float().softmax(-1)).sum(-1)

    prefixes, seen = [e.ids for e in task.test[:8]], set()
    for engine in (vllm, hf):
        for i, (tokens, logp, _) in enumerate(engine.generate(prefixes, 4, 28, hot, list(range(8)))):
            prompt = prefixes[i // 4]
            z = policy.lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
            law = (z / hot(z)[:, None]).log_softmax(-1)
            torch.testing.assert_close(torch.tensor(logp), law[range(len(tokens)), tokens], rtol=0, atol=1e-4)
            seen.add(tuple(tokens))
    assert len(seen) > 20
    plain = sample(engines, 1.0)
    assert ((plain.old_logp - plain.sampler_logp).abs() * plain.mask).max() < 1e-4


@pytest.mark.parametrize("name, low, high", [("hapo", 0.01, 3.0), ("pppo", 0.0, 1e-4)])
def test_scripts_that_sample_in_their_own_way(name, low, high, tmp_path):
    """HAPO heats the sampler from the second rollout on; PPPO goes on from prefixes, 9 completions for one."""
    command = [sys.executable, f"algos/{name}.py", *SMALL, "--steps", "2", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert rows[0]["sampler_gap_max"] < 1e-4 and low < rows[1]["sampler_gap_max"] < high
    assert all(r["grad_norm"] > 0 and r["generated"] % (9 if name == "pppo" else 1) == 0 for r in rows)


def test_greedy_completions_are_those_of_transformers(engines):
    *_, task, vllm, hf = engines
    prefixes = [e.ids for e in task.test[:48]]
    mine, theirs = (e.generate(prefixes, 1, 28, 0.0, [0] * 48) for e in (vllm, hf))
    assert [m[0] for m in mine] == [t[0] for t in theirs] and [m[2] for m in mine] == [t[2] for t in theirs]


def test_a_completion_depends_on_its_seed_alone(engines):
    *_, task, vllm, _ = engines
    prefixes = [e.ids for e in task.test[:8]]
    all_together = vllm.generate(prefixes, 4, 28, 1.0, list(range(8)))
    alone = vllm.generate(prefixes[5:6], 4, 28, 1.0, [5])
    assert [c[0] for c in all_together[20:24]] == [c[0] for c in alone]
    assert len({tuple(c[0]) for c in all_together[:4]}) > 1


def test_a_prefix_may_hold_part_of_a_completion(engines):
    _, tokenizer, _, task, vllm, hf = engines
    prefix = task.test[0].ids + tokenizer("1+1=02 ")["input_ids"]
    (tokens, logp, ended) = vllm.generate([prefix], 1, 5, 0.0, [0])[0]
    assert tokens == hf.generate([prefix], 1, 5, 0.0, [0])[0][0] and len(tokens) == len(logp) <= 5 and ended in (True, False)


def test_completions_go_on_from_the_middle_with_budgets_of_their_own(engines):
    """As on the other engine: nobody exceeds his budget, the log-probs are the training pass's, greedy is the same."""
    args, tokenizer, policy, task, vllm, hf = engines
    vllm.sync()
    examples, budgets = task.test[:12], [1 + i % 7 for i in range(12)]
    given = [ids[: i % 5] for i, (ids, _, _) in enumerate(hf.generate([e.ids for e in examples], 1, 28, 1.0, [0] * 12))]
    prefixes = [e.ids + g for e, g in zip(examples, given)]
    mine, theirs = (e.generate(prefixes, 1, budgets, 0.0, [0] * 12) for e in (vllm, hf))
    assert [m[0] for m in mine] == [t[0] for t in theirs]
    assert all(1 <= len(m[0]) <= budget for m, budget in zip(mine, budgets))
    scorer = lambda texts, answers: ([None] * len(texts), [0.0] * len(texts))  # noqa: E731
    batch = rollout.collect(vllm, scorer, tokenizer, examples, args, 0, given=given, n=3, budget=6)
    logp, _ = read(policy, batch, args)
    assert batch.trained.any() and ((logp - batch.sampler_logp).abs() * batch.trained).max() < 1e-4
    assert batch.trained.sum(1).max() <= 6 and (batch.mask.sum(1) > batch.trained.sum(1)).any()
