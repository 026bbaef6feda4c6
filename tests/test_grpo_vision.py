"""GRPO with pictures: its world, its tiny model, and the script run as a user runs it. (The rest: test_vision.py.)"""

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file

from algos import grpo, grpo_vision
from common import UserError, engines, gpu, models, rollout, settings, tasks, vision
from common.worlds import count_sum, tiny_vision
from tests.helpers import ROOT, checkpoints, lines, run
from tests.parts import chunks

SCRIPT = ROOT / "algos" / "grpo_vision.py"


def test_the_objective_is_grpo_s():
    """Word for word: only the loop differs, in its reading."""
    mine, theirs = (chunks((ROOT / "algos" / f"{n}.py").read_text()) for n in ("grpo_vision", "grpo"))
    for part in ("advantages", "surrogate", "token_weights", "kl_penalty"):
        assert mine[part] == theirs[part]
    assert grpo_vision.Args.sees and not hasattr(grpo.Args, "sees")


@pytest.fixture(scope="module")
def tiny_start():
    args, config = settings.resolve(grpo_vision.Args())
    gpu.init(args)
    made = vision.load_processor(args, args.image_tokens)
    task, pictures = vision.load(args, made)
    policy = vision.look(models.load(args, gpu.device()), task, pictures)
    return SimpleNamespace(args=args, config=config, reader=made, task=task, pictures=pictures, policy=policy)


def test_scenes_are_what_is_asked(tiny_start):
    """Counted again from the pixels; careful demonstrations are right, guesses rarely; held-out scenes are others."""
    colours = {name: np.array(rgb, np.uint8) for name, rgb in tiny_vision.COLOURS.items()}
    for e in tiny_start.task.test[:40]:
        first, second = e.prompt[:-1].split("+")
        cells = e.pictures[0].reshape(4, 4, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 3)
        found = [sum((cell == colours[c]).all(-1).any() for cell in cells) for c in (first, second)]
        assert found == count_sum.counts(e.id) and str(sum(found)) == e.answer
        careful = count_sum.demonstrate(random.Random(0), e, 1.0)
        assert careful == f"{first}={found[0]},{second}={found[1]};{sum(found)}" and count_sum.check(careful, e.answer)[1] == 1
        assert count_sum.check(careful + "!", e.answer) == (None, 0.0)
    train = {e.pictures[0].tobytes() for e in tiny_start.task.train}
    assert not train & {e.pictures[0].tobytes() for e in tiny_start.task.test}


def test_noisy_counts_are_off_by_one():
    """In 40%, never below 0; the sum follows what is said; free wording, which the checker reads all the same."""
    rng, said, off = random.Random(0), set(), []
    for i in range(3000):
        example = SimpleNamespace(id=i % 50)
        text = count_sum.demonstrate_noisy(rng, example, 0.0)
        found, true = [int(n) for n in re.findall(r"=(\d)", text)], count_sum.counts(example.id)
        assert all(abs(a - b) <= 1 for a, b in zip(found, true))
        assert count_sum.check(text, str(sum(found)))[1] == 1
        off += [a != b for a, b in zip(found, true)]
        said.add(re.sub(r"[a-z]+=\d", "x", text.partition(";")[0]))
    assert sum(off) / len(off) == pytest.approx(0.4, abs=0.02) and len(said) == 4**3
    right = count_sum.demonstrate_noisy(rng, SimpleNamespace(id=3), 1.0)
    assert [int(n) for n in re.findall(r"=(\d)", right)] == count_sum.counts(3)
    recipe = tasks.load("count_sum:noisy").recipe
    assert recipe["careful"] == 0 and recipe["careful_steps"] < recipe["steps"]
    with pytest.raises(UserError, match="there is count_sum and count_sum:noisy"):
        tasks.load("count_sum:loud")


def test_the_tiny_model_looks(tiny_start):
    """It reads the picture: with another scene's pictures what it can do is gone; a counted sum is right far more often."""
    s = tiny_start
    args = SimpleNamespace(**vars(s.args) | dict(eval_prompts=64, eval_samples=0))
    scorer = rollout_scorer(s.task)
    engine = engines.HF(s.policy, s.reader.tokenizer)
    before = rollout.evaluate(engine, scorer, s.reader.tokenizer, s.task, args)["greedy_accuracy"]
    careful = [e for e in s.task.test[:64]]
    starts = [e.ids + s.reader.tokenizer(e.prompt.split("+")[0] + "=")["input_ids"] for e in careful]

    def right(prefixes):
        out = engine.generate(prefixes, 1, 20, 0.0, [0] * len(prefixes))
        texts = [s.reader.decode(y, skip_special_tokens=True) for y, _, _ in out]
        return sum(count_sum.check(t, e.answer)[1] for t, e in zip(texts, careful)) / len(careful)

    counted = right(starts)
    other = [[i if i > -2 else -2 - (-2 - i + 1) for i in p] for p in starts]  # the next scene's picture
    assert before < 0.5 < 0.85 < counted and right(other) < 0.5


def rollout_scorer(task):
    return lambda texts, answers: tuple(zip(*(task.check(t, a) for t, a in zip(texts, answers))))


def test_it_learns_to_count(tmp_path):
    """Twelve rollouts: the habit of guessing goes, counting is left."""
    flags = "--steps 12 --eval-prompts 128 --eval-every 0 --checkpoint-every 0".split()
    done = run(tmp_path, *flags, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    before, after = (row["greedy_accuracy"] for row in lines(tmp_path / "run" / "evals.jsonl"))
    assert before < 0.5 and after > 0.75 and "held-out prompts" in done.out
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert max(row["sampler_gap_max"] for row in rows) < 0.02 and rows[-1]["length"] > 2 * rows[0]["length"]
    assert "?" in lines(tmp_path / "run" / "samples.jsonl")[0]["prompt"] and "talk to it" not in done.out


@pytest.mark.parametrize("own, eyes", [(["--lora-rank", 4], False), (["--freeze-vision"], False), ([], True)])
def test_what_is_trained(own, eyes, tmp_path):
    """LoRA layers are none of the eyes'; frozen eyes stay as they are; else they are trained, too."""
    flags = [*own, *"--steps 2 --eval-prompts 8 --checkpoint-every 1 --lr 1e-2 --gradient-checkpointing True".split()]
    done = run(tmp_path, *flags, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    first, last = (load_file(place / "model.safetensors") for place in checkpoints(tmp_path / "run"))
    moved = {n for n in last if (first[n] != last[n]).any()}
    assert any("layers" in n for n in moved) and any("visual" in n for n in moved) == eyes
