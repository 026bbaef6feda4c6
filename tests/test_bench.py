"""The benchmarks' own arithmetic, and that what they start still runs. What they measure is no test's business."""

import json
import subprocess
import sys

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import head, worker


def side(rollout, update, step, peak):
    rates = dict(rollout_tokens_per_s=rollout, update_tokens_per_s=update, step_tokens_per_s=step)
    share = dict(rollout=0.5, scoring=0.1, update=0.4)
    return dict(rates, share=share, peak=peak * 2**30, gpu_peak=None, update_flops_share=0.25)


def test_ratios_and_table():
    found = dict(ours=[side(30.0, 20.0, 9.0, 1.0), side(20.0, 30.0, 8.0, 2.0)], trl=[side(10.0, 10.0, 6.0, 3.0)] * 2)
    ratios = bench.ratios(**found)
    assert ratios == dict(rollout_tokens_per_s=[3, 2], update_tokens_per_s=[2, 3], step=[1.5, 8 / 6], peak=[3, 1.5])
    lines = bench.table({"10M": dict(found, ratios=ratios)}).splitlines()
    assert lines[2] == "| 10M | 2.50 (2.00 to 3.00) | 2.50 (2.00 to 3.00) | 1.42 (1.33 to 1.50) | 2.25 (1.50 to 3.00) |"
    assert lines[6] == "| 10M | ours | 25 | 25 | 8 | 50%, 10%, 40% | 1.50 | 25% |"


def test_our_side_runs_and_its_lengths_are_those_promised():
    command = [sys.executable, "-m", "tests.bench.worker", "--size", "230k", "--prompts", "4"]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["tokens"] == pytest.approx(32 * row["length"]) and 100 < row["length"] < 172  # uniform 16..256: 136 +- 12
    assert row["update_flops_share"] == pytest.approx(6 * row["parameters"] * row["update_tokens_per_s"] / row["matmul"])
    assert sum(row["share"].values()) == pytest.approx(1, abs=0.1)


def test_lengths_are_uniform():
    """The end's odds, multiplied out, are those of a uniform draw from 16..256; a model that never wants to end has to."""

    class Lm:
        def forward(self, past_key_values):
            return type("Out", (), dict(logits=torch.zeros(1, 1, 10)))

    class Cache:
        def __init__(self, t):
            self.get_seq_length = lambda: worker.PROMPT + t - 1

    lm, going, odds = Lm(), 1.0, []
    with worker.ragged(lm):
        for t in range(1, worker.MOST + 1):
            p = lm.forward(past_key_values=Cache(t)).logits[0, 0].softmax(-1)[1].item()
            odds.append(going * p)
            going *= 1 - p
    assert odds[: worker.LEAST - 1] == [0] * (worker.LEAST - 1)
    assert odds[worker.LEAST - 1 :] == pytest.approx([1 / (worker.MOST + 1 - worker.LEAST)] * 241, rel=1e-3)


def test_both_ways_of_the_head_compute_the_same():
    found = [head.measure(head.Options(tokens=50, vocabulary=300, width=16, way=way)) for way in ("plain", "chunked")]
    assert found[0]["check"] == pytest.approx(found[1]["check"], rel=1e-5) and found[0]["check"][1] > 0
