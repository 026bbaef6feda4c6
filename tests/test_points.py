"""What the picture of the tokens family is made of: counts by hand on made-up runs, the probes on the real start."""

import json
import statistics

import pytest

from common import UserError
from runs import launch, points

WITH = dict.fromkeys("grpo steer lp_reg thr gtpo d3s rng".split(), points.PLAIN)
WITH |= dict.fromkeys(("forking_tokens", "ares"), points.WITHOUT_FILTER) | dict(hapo=f"lr-3e-4-{points.PLAIN}")
TOKENS = ["*", "2", "=", "0", "8", "<eos>"]
ROW = dict(
    entropy=0.5, entropy_selected=1.0, entropy_selected_min=0.4, entropy_rest=0.1, left_of_sure=0.1, right_of_unsure=0.2,
    n_he_easy=1.0, n_he_medium=2.0, n_he_hard=3.0, tokens=1000, damping=1.0,
    proxy_kl=0.0, kept=0.3, kept_forks=0.6, delta=1.0, conflict=0.2, trained=1.0, lam_easy=0.1, lam_medium=0.1, lam_hard=0.1,
)  # fmt: skip


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Runs of 40 rollouts of every script, with a completion that begins with *2 in every second one. 04>08: can be had by *2
    alone in one move; 01>08: by +7."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    columns = dict(thr=[0.01, 0.3, -0.7, 0, 0, 9.0], conflict=[2, 1, 0, 1, 1, 1], selected=[1, 0, 0, 0, 0, 1])
    for script, flags in [*WITH.items(), ("rng", f"{points.PLAIN}-variant-nsr"), ("rng", f"{points.PLAIN}-variant-psr")]:
        for seed in points.SEEDS:
            folder = tmp_path / "runs" / "compare" / f"{script}-{seed}-{flags}"
            folder.mkdir(parents=True)
            more = dict(trained=0.25) if script == "d3s" else {}
            metrics = [ROW | more | dict(step=i, entropy=i / 40) for i in range(1, 41)]
            evals = [dict(step=i, greedy_accuracy=0.3 + i / 100) for i in (0, 20, 40)]
            samples = [dict(step=i, prompt=prompt, completion="*2=08" if i % 2 else "+7=11") for i in range(1, 41)
                       for prompt in ("04>08:", "01>08:")]  # fmt: skip
            samples += [dict(step=1, prompt="01>08:", completion="", tokens=TOKENS, columns=columns)]
            for name, of in dict(metrics=metrics, evals=evals, samples=samples).items():
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))


def test_counts_by_hand(made_up):
    assert points.sparks("grpo") == [[(20, 0.5), (40, 0.5)]] * 3  # the other prompt does not need *2
    kinds = points.by_kind(points.logged("gtpo", "conflict"), lambda x: x != 1)
    assert kinds == {"move": 1.0, "digit": 0.0, "=": 1.0, "end": 0.0}
    assert points.by_kind(points.logged("d3s", "selected"), bool) == {"move": 1.0, "digit": 0.0, "=": 0.0, "end": 1.0}
    assert points.over_tokens("grpo")[0] == [(0.0, 0.3), (20.0, 0.5), (40.0, pytest.approx(0.7))]
    assert points.over_tokens("d3s")[0] == [(0.0, 0.3), (5.0, 0.5), (10.0, pytest.approx(0.7))]
    assert points.ends("gtpo", ["entropy", "conflict"]) == {"entropy": [pytest.approx(10.5 / 40), pytest.approx(30.5 / 40)],
                                                            "conflict": [pytest.approx(0.2)] * 2}  # fmt: skip
    curve = points.metric("grpo", "entropy")[0]
    assert [x for x, _ in curve] == [10, 20, 30, 40] and curve[0][1] == pytest.approx(5.5 / 40)


def test_the_picture(made_up, tmp_path, monkeypatch, capsys):
    lock_in = dict(right=[(0.15, 0.4)], wrong=[(0.15, 0.1)])
    probes = dict(entropy_changes=[(0.0, 0.0), (1.0, 2.0)], lock_in=lock_in, scales={1: 0.6})
    for name, value in probes.items():
        monkeypatch.setattr(points, name, lambda o, value=value: value)
    points.main(points.Options(out=str(tmp_path / "out")))
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["correlation"] == 1.0 and "is 1.00" in capsys.readouterr().out
    assert sum(share for _, share in record["thr"]) == pytest.approx(1, abs=1e-5)
    assert record["thr"][39][1] == pytest.approx(1 / 6, abs=1e-5)
    assert (tmp_path / "out.png").stat().st_size > 50_000


def test_a_run_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    with pytest.raises(UserError, match="thr-1-task-route/samples.jsonl is missing: the comparisons of"):
        points.logged("thr", "thr")


def test_the_probes():
    """On the real start: STEER's estimate has the sign of what happens, beginnings of right completions are better, and prompts
    that are far away have more voices."""
    o = points.Options()
    predicted, measured = zip(*points.entropy_changes(o, minibatches=16))
    assert statistics.correlation(predicted, measured) > 0.4 and max(measured) > 0 > min(measured)
    found = points.lock_in(o, etas=(0.15, 0.75), prompts=32, n=8)
    (_, early), (_, late) = found["right"]
    assert late > early + 0.2 and early > found["wrong"][0][1] + 0.1 and late < 1
    scale = points.scales(o, prompts=128)
    assert list(scale) == [1, 2, 3, 4] and 0.5 < scale[4] < scale[1] < 1
