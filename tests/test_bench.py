"""The benchmarks' own arithmetic, and that what they start still runs. What they measure is no test's business."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.bench import __main__ as bench
from tests.bench import head, plan, scale, worker


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
    command = [sys.executable, "-m", "tests.bench.worker", "--size", "230k", "--prompts", "4", "--seed", "3"]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    lengths = worker.draw_lengths(worker.Work(prompts=4, seed=3))
    next(lengths)  # the first rollout is not measured
    assert row["tokens"] == sum(next(lengths)) == 32 * row["length"]
    assert row["update_flops_share"] == pytest.approx(6 * row["parameters"] * row["update_tokens_per_s"] / row["matmul"])
    assert sum(row["share"].values()) == pytest.approx(1, abs=0.1)


def test_lengths_are_uniform():
    lengths = next(worker.draw_lengths(worker.Work(prompts=500, group=8)))
    assert min(lengths) == worker.LEAST and max(lengths) == worker.MOST
    assert sum(lengths) / 4000 == pytest.approx(136, abs=4 * 241 / (12 * 4000) ** 0.5)  # four standard errors


@pytest.mark.parametrize("drops", [True, False])  # as our sampler does with rows that have ended, and as transformers' does
def test_every_length_is_written_once(drops):
    class Layers(torch.nn.Module):
        def forward(self, past_key_values):
            return torch.zeros(len(past_key_values.rows), 1, 10)

    class Cache:
        def __init__(self, t, rows):
            self.rows, self.get_seq_length = rows, lambda: worker.PROMPT + t - 1

    lm = SimpleNamespace(model=Layers(), lm_head=torch.nn.Identity())
    lengths = next(worker.draw_lengths(worker.Work(prompts=2)))
    rows, written = list(range(16)), [0] * 16
    with worker.ragged(lm, lengths):
        for t in range(1, max(lengths) + 1):
            end = lm.lm_head(lm.model(past_key_values=Cache(t, rows)))[:, 0].softmax(-1)[:, 1].tolist()
            assert set(end) <= {0.0, 1.0}
            for row, p in zip(rows, end):
                written[row] = written[row] or int(p) * t
            rows = rows if not drops else [row for row, p in zip(rows, end) if not p][::-1]
    assert sorted(written) == sorted(lengths)


def test_both_ways_of_the_head_compute_the_same():
    found = [head.measure(head.Options(tokens=50, vocabulary=300, width=16, way=way)) for way in ("plain", "chunked")]
    assert found[0]["check"] == pytest.approx(found[1]["check"], rel=1e-5) and found[0]["check"][1] > 0


def test_one_process_of_the_scaling_benchmark(tmp_path):
    """With the prompts as they are: the model's tokenizer has not all characters of the default template."""
    prompts, _ = worker.make_model(worker.Work(prompts=3), str(tmp_path))
    rows = [json.dumps(dict(prompt=p, answer="0")) + "\n" for p in prompts]
    (tmp_path / "train.jsonl").write_text("".join(rows[:-2]))
    (tmp_path / "test.jsonl").write_text("".join(rows[-2:]))
    done = scale.run(str(tmp_path), str(tmp_path / "train.jsonl"), 1, scale.Options(prompts=2))
    assert [r["step"] for r in done] == [2, 3] and all(r["tokens"] > 16 and r["time/step"] > 0 for r in done)


def test_the_plan_of_large_models(capsys):
    plan.main()
    table = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in table[3:]] == ["| 7B", "| 32B", "| 72B"]
    found, seconds, room = plan.step(7.6e9, 3584, 18944, 28, 28, 4, 152064, 8, 1)
    assert found["weights"] == 2 * 7.6e9 / 8 and found["needed"] < 0.92 * plan.MEMORY and room > 0
    assert all(s > 0 for s in seconds.values())
