"""Pictures of single methods: the probes on a small scale, numbers by hand from made-up runs, every picture drawn."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from runs import launch, pictures
from runs.panels import __main__ as panels
from runs.panels import (
    bupo,
    columns,
    cot2,
    gdpo,
    metrics,
    otr,
    pf_ppo,
    poad,
    precision_pretraining,
    rank_grpo,
    rlfr,
    spo,
    start,
    t_ppo,
    unmasking_policy,
)

REFERENCE = launch.ROOT / "runs" / "reference" / "panels"


@pytest.mark.parametrize("name", panels.NAMES)
def test_a_committed_picture_is_drawn_again(name, tmp_path):
    (tmp_path / f"{name}.json").write_text((REFERENCE / f"{name}.json").read_text())
    panels.main(panels.Options(scripts=(name,), out=str(tmp_path), redraw=True))
    assert (tmp_path / f"{name}.png").stat().st_size > 20_000 and (REFERENCE / f"{name}.png").exists()
    assert json.loads((tmp_path / f"{name}.json").read_text())["command"] == f"python -m runs.panels {name}"


def test_unknown_and_missing(tmp_path):
    with pytest.raises(UserError, match="no picture of grpo; there are: atp_latent, bupo, "):
        panels.main(panels.Options(scripts=("grpo",), out=str(tmp_path)))
    with pytest.raises(UserError, match="--redraw needs the numbers in .*spo.json"):
        panels.main(panels.Options(scripts=("spo",), out=str(tmp_path), redraw=True))


def write(folder, script, flags, seed, rows, evals=()):
    place = folder / "runs" / "compare" / "-".join([script, str(seed), *([flags] if flags else [])])
    place.mkdir(parents=True)
    for name, of in dict(metrics=rows, evals=evals).items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))


def test_what_is_no_number_is_null(tmp_path, monkeypatch, capsys):
    """As in every .json file here; a word stays a word."""
    monkeypatch.setattr(pf_ppo, "numbers", lambda seed: dict(r2=[float("nan"), 0.1234567], word="NaN"))
    monkeypatch.setattr(pf_ppo, "draw", lambda figure, data: None)
    panels.main(panels.Options(scripts=("pf_ppo",), out=str(tmp_path)))
    assert json.loads((tmp_path / "pf_ppo.json").read_text())["r2"] == [None, 0.12346]
    assert '"word": "NaN"' in (tmp_path / "pf_ppo.json").read_text()


def test_a_run_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    with pytest.raises(UserError, match="t_ppo-1-task-addition:3/metrics.jsonl is missing: the comparisons of"):
        metrics("t_ppo", t_ppo.TASK)


def test_t_ppo_from_made_up_runs(tmp_path, monkeypatch):
    """The clock is the sum of the longest new parts; of steps without a finished response there is no length."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    evals = [dict(step=i, greedy_accuracy=i / 10) for i in (0, 2, 4)]
    for seed in (1, 2, 3):
        rows = [dict(step=i, clock=10 + i, generated=5, trained=4, waiting_tokens=3, length=7.0) for i in (1, 2, 3, 4)]
        rows[0]["length"] = None
        for flags in t_ppo.FLAGS.values():
            write(tmp_path, "t_ppo", flags, seed, rows, evals)
        write(tmp_path, "ppo", t_ppo.PPO, seed, rows[1:] + rows[3:], evals)
    data = t_ppo.numbers(1)
    assert data["over"]["zero"] == [[(0, 0.0), (23, 0.2), (50, 0.4)]] * 3
    assert data["over"]["ppo"] == [[(0, 0.0), (76, 0.2), (152, 0.4)]] * 3
    assert data["lengths"]["all"][0] == [(2, 7.0), (3, 7.0), (4, 7.0)] and data["tokens"]["trained"][2][0] == (1, 4)


def test_poad_from_made_up_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    for flags in ("", "gamma-w-0.95", *(f"{own}task-door:{n}" for own in ("", "gamma-w-0.95-") for n in (2, 4))):
        for seed in (1, 2, 3):
            rows = [dict(step=i, steps=2.5, accuracy=i / 10, value_error=float(i), length=5.0) for i in range(1, 8)]
            write(tmp_path, "poad", flags, seed, rows)
    arm = poad.numbers(1)["arms"]["ntpo x4"]
    assert arm["returns"][1][:2] == [(240, 0.1), (480, 0.2)]  # 96 episodes of 2.5 steps
    assert arm["value_error"] == [5.0] * 3 and arm["length"] == 5.0  # the last five of seven


def test_spo_over_tokens_from_made_up_runs(tmp_path, monkeypatch):
    """Continuations count; where none are logged all that is sampled is trained on."""
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    for arm, more in (("chain", dict(sampled_tokens=30)), ("grpo", {})):
        script, flags, _ = spo.ARMS[arm]
        for seed in (1, 2, 3):
            write(tmp_path, script, flags, seed, [dict(step=i, tokens=10, accuracy=i / 4) | more for i in (1, 2, 3, 4)])
    assert spo.over_tokens(*spo.ARMS["chain"][:2], every=2) == [[(60, 0.375), (120, 0.875)]] * 3
    assert spo.over_tokens(*spo.ARMS["grpo"][:2], every=2)[0] == [(20, 0.375), (40, 0.875)]


def test_otr_on_a_small_scale(tmp_path, monkeypatch):
    """More guesses come nearer to all of them; accuracy and the last ten log-probs are read from made-up runs."""
    found = otr.cosines(1, guesses=(1, 256), draws=2, n=4)
    assert max(found[1]) < min(found[256]) and 0.9 < min(found[256]) <= 1
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(otr, "cosines", lambda seed: found)
    for (script, own, *_) in otr.ARMS.values():
        for seed in (1, 2, 3):
            for rate in otr.RATES:
                evals = [dict(step=0, greedy_accuracy=0.1), dict(step=20, greedy_accuracy=seed / 10 + float(rate))]
                write(tmp_path, script, f"{own}lr-{rate}", seed, [dict(step=i, logp=-i) for i in range(1, 21)], evals)
    data = otr.numbers(1)
    assert data["accuracy"]["sft"][1] == pytest.approx([0.2003, 0.201, 0.203]) and data["logp"]["DFT"][2] == [-15.5] * 3
    draws(otr, data, tmp_path)


def draws(panel, data, folder):
    figure = pictures.pyplot().figure(figsize=panel.SIZE, layout="constrained")
    panel.draw(figure, json.loads(json.dumps(data)))
    figure.savefig(folder / "x.png")
    assert (folder / "x.png").stat().st_size > 20_000


def test_cot2_from_made_up_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(cot2, "passes", lambda folder, seed: {1: 0.5, 2: 0.25 * len(folder.name), 4: 0.8, 8: 0.9, 16: 1.0})
    arms = [own for own, _ in cot2.ARMS.values()] + [cot2.flags(b, w) for b in cot2.TRACES for w in cot2.WIDTHS]
    for flags in dict.fromkeys(arms):
        for seed in (1, 2, 3):
            evals = [{"step": i, "greedy_accuracy": 0.9 - i / 100, "avg@8": 0.1 * seed + i / 100} for i in (0, 20)]
            write(tmp_path, "cot2", flags, seed, [dict(step=i, entropy_thoughts=2 - i / 20) for i in range(1, 21)], evals)
    data = cot2.numbers(1)
    assert data["greedy"]["1"][2] == [(24, 0.9), (32, 0.9)] and cot2.flags(1, 32) == "steps-0-traces-1-width-32"
    assert data["tokens"]["24"][0][1] == (2, 0.25 * len("cot2-1-steps-0-traces-1"))
    assert data["entropy"]["K = 6"][0][-1] == (20, 1.0)
    assert data["over"]["K = 6"]["drawn"][1] == [(0, 0.2), (20, pytest.approx(0.4))]
    draws(cot2, data, tmp_path)


def test_precision_pretraining_from_made_up_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    for flags, *_ in precision_pretraining.ARMS.values():
        for seed in (1,):
            rows = [dict(step=i, entropy=float(i)) for i in range(1, 50)]
            evals = [{"step": i, "perplexity": 80 - i, "greedy_accuracy": 0.1, "avg@16": 0.2, "pass@16": 0.3} for i in (0, 40)]
            write(tmp_path, "precision_pretraining", flags, seed, rows, evals)
            write(tmp_path, "grpo", precision_pretraining.GRPO.format(seed=seed, arm=flags), seed, rows, evals)
    data = precision_pretraining.numbers(1)
    assert data["perplexity"]["beta 0.5"] == [[(40, 40)]] and data["average"]["cross-entropy"][0] == [(0, 0.2), (40, 0.2)]
    assert data["later"]["beta -0.25"][0] == [(20, 10.5), (40, 30.5)]
    draws(precision_pretraining, data, tmp_path)


def test_bupo_from_made_up_runs(tmp_path, monkeypatch):
    """Every fourth step has entropies of the inner policies; the start has those of the embeddings and of the whole as well."""
    data = bupo.start_of(1, prompts=4, task="addition")
    assert len(data["entropy"]) == 5 and data["entropy"][0] > 3 > data["entropy"][4] > 0
    assert len(data["dH"]) == 4 and data["boundary"] == max(l for l, x in enumerate(data["dH"], 1) if x > 0)
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    for script, own, *_ in bupo.ARMS.values():
        for seed in (1, 2, 3):
            inner = {f"entropy_{i}": i / 10 for i in range(4)}
            made = [dict(step=i, entropy=float(i)) | (inner if i % 4 == 1 else {}) for i in range(1, 13)]
            write(tmp_path, script, bupo.FLAGS.format(own), seed, made, [dict(step=i, greedy_accuracy=i / 10) for i in (0, 6)])
    data |= bupo.curves()
    assert data["accuracy"]["GRPO"] == [[(0, 0.0), (6, 0.6)]] * 3 and data["whole"]["GRPO"][0][11] == (12, 12.0)
    assert data["layers"]["layer 1 for 100%"]["entropy_2"][0] == [(1, 0.2), (5, 0.2), (9, 0.2)]
    draws(bupo, data, tmp_path)


def test_rank_grpo_counts_and_smooths():
    assert rank_grpo.smooth([(i, float(i == 3)) for i in range(1, 7)], 3) == [
        (1, 0), (2, pytest.approx(1 / 3)), (3, pytest.approx(1 / 3)), (4, pytest.approx(1 / 3)), (5, 0), (6, 0)
    ]  # fmt: skip
    found = rank_grpo.by_rank("tiny", 1, n=4, prompts=16)
    assert len(found["hits"]) == 5 and found["hits"][0] > found["hits"][4] > 0.1  # the later, the worse
    assert 0.5 < found["exact"] < 1


def test_columns():
    runs = [[dict(step=1, a=2.0), dict(step=2, a=float("nan"))], [dict(step=1, a=3.0)]]
    assert columns(runs, None, "a") == dict(a=[[(1, 2.0)], [(1, 3.0)]]) and columns(runs[1:], "a", "step") == dict(
        step=[[(3, 1)]]
    )


def test_spo_on_a_small_scale():
    """Values of many completions are near those of 9; in a tree a node is worth the mean of its children."""
    s = start(spo.spo, seed=1)
    prompts = s.task.order(0, 2, 1)
    errors, row = spo.chains(s, prompts, 40, (1, 5))
    assert errors[1]["mse"] < errors[1]["mean_square"] and errors[1]["segments"] >= errors[5]["segments"] >= 0.5
    assert len(row["p"]) == len(row["tokens"]) == len(row["start"]) and any(row["start"])
    tree = spo.small_tree(s, prompts[0])
    nodes = tree["nodes"]
    for i, value in [(-1, tree["root"]), *((i, n["value"]) for i, n in enumerate(nodes))]:
        below = [n for n in nodes if n["parent"] == i]
        assert not below or sum(n["value"] for n in below) / len(below) == pytest.approx(value, abs=1e-5)
        assert all(n["adv"] == pytest.approx(n["value"] - value, abs=1e-5) for n in below)
        assert len(below) == (3 if i < 0 or nodes[i]["open"] else 0)
    edge, questions, roots = spo.grown(s, prompts, (3, 3, 3))
    before, behind = spo.states(edge, questions)
    assert len(roots) == 2 and all(y[: len(x)] == x and len(y) > len(x) for x, y in zip(before, behind))
    assert spo.tree_error(s, prompts[:1], 20)["mse"] < 0.2


def test_pf_ppo_on_a_small_scale():
    data = pf_ppo.numbers(1, prompts=32)
    assert len(data["quality"]) == 160 and set(data["r2"]) == {"middle", "uniform"}
    assert data["r2"]["middle"]["bw"] > data["r2"]["middle"]["bon"]
    sure = [(q, r) for q, r in zip(data["quality"], data["reward"]["middle"]) if abs(q) == 1]
    assert sure and all(q == r for q, r in sure)  # where the noise is narrow it is none


def test_rlfr_on_a_small_scale():
    data = rlfr.numbers(1, prompts=8, flow_steps=20)
    assert len(data["fit"]) == 20 and data["fit"][-1] < data["fit"][0]
    assert data["table"]["all"]["right"] + data["table"]["all"]["wrong"] == 64 and data["table"]["all"]["auc"]["-log p"] > 0.8
    assert [row["right"] for row in data["shown"]] == [True, False]
    assert all(len(row["D"]) == len(row["tokens"]) and min(row["D"]) > 0 for row in data["shown"])
    scores = dict(x=torch.tensor([1.0, 2, 3, 4]))
    right = torch.tensor([True, False, True, False])
    assert rlfr.aucs(scores, right, torch.ones(4) > 0) == dict(right=2, wrong=2, auc=dict(x=0.75))


def test_a_threshold_by_hand():
    """What is surer than 0.4 at once, else the surest; a token says how many were there. The left block is filled first."""
    sure = torch.tensor([[0.9, 0.2, 0.5, 0.3]])

    def guess(tokens, masked, noise, temperature):
        return (10 + (~masked).sum(1, keepdim=True)).expand_as(tokens), sure * masked

    for width, tokens in ((0, [10, 13, 10, 12]), (2, [10, 11, 12, 13])):
        args = SimpleNamespace(block_length=width, threshold=0.4)
        start = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 5, 4)
        assert unmasking_policy.threshold(guess, *start, 0.0, args).tolist() == [tokens]


def test_every_panel_has_its_parts():
    for name in panels.NAMES:
        panel = importlib.import_module(f"runs.panels.{name}")
        assert len(panel.SIZE) == 2 and callable(panel.numbers) and callable(panel.draw)
        assert (launch.ROOT / "algos" / f"{name}.py").exists()
    assert pictures.pyplot().get_backend().lower() == "agg"


@pytest.mark.parametrize("kind, changes", [
    ("sdmc, count", dict()), ("sdmc, 1/t", dict(exact_count=False)), ("double MC, count", dict(likelihood="double_mc")),
    ("double MC, t and 1/t", dict(likelihood="double_mc", exact_count=False)),
])  # fmt: skip
def test_gdpo_s_estimates_are_the_script_s(kind, changes):
    """Mean and variance by formula, and of 40,000 of the script's own masks, where sets of masks have sums of any kind. What
    rare small t give is seen where they are drawn more often: log t uniform, and the least t apart."""
    L, n, heavy = 4, 2, kind == "double MC, t and 1/t"
    sums = -torch.rand(2**L, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    sums[0] = 0
    size = torch.tensor([bin(i).count("1") for i in range(2**L)])
    of = [sums[size == k] for k in range(1, L + 1)]
    mean, var = torch.stack([x.mean() for x in of])[None], torch.stack([x.var(correction=0) for x in of])[None]
    first, second = (x.item() for x in gdpo.estimate(kind, n, mean, var))

    def drawn(noise):
        a = gdpo.gdpo.Args(max_new_tokens=L, nodes=noise.shape[1], **changes)
        weights = gdpo.gdpo.mask_weights(noise, a).double()
        which = ((weights > 0) * 2 ** torch.arange(L)).sum(2)
        return (weights.amax(2) * sums[which]).sum(1)

    noise = torch.rand(40000, 1 if heavy else n, 1 + L, generator=torch.Generator().manual_seed(4))
    if heavy:
        noise[..., 0] = gdpo.LEAST ** noise[..., 0]
        weight, found = -noise[:, 0, 0] * torch.tensor(gdpo.LEAST).log(), drawn(noise)
        noise[..., 0] = 0
        found, least = ([(x**p).double() for p in (1, 2)] for x in (found, drawn(noise)))
        one, two = ((weight * x).mean().item() + gdpo.LEAST * y.mean().item() for x, y in zip(found, least))
        assert one == pytest.approx(first, rel=0.03) and (two - one**2) / n == pytest.approx(second, rel=0.1)
    else:
        found = drawn(noise)
        assert found.mean().item() == pytest.approx(first, abs=5 * (second / 40000) ** 0.5 + 1e-6)
        assert found.var().item() == pytest.approx(second, rel=0.04)
    if kind.startswith("double"):
        assert first == pytest.approx(gdpo.exact(mean).item(), rel=2e-3)


def test_gdpo_s_spread_counts():
    """By one pass they are double Monte Carlo, by as many as there are positions only the sets are random; never biased."""
    g = torch.Generator().manual_seed(0)
    mean, var = -torch.rand(3, 8, generator=g, dtype=torch.float64), torch.rand(3, 8, generator=g, dtype=torch.float64)
    for n in (1, 2, 4, 8):
        first, second = gdpo.estimate("spread counts", n, mean, var)
        torch.testing.assert_close(first, gdpo.exact(mean))
        plain = gdpo.estimate("double MC, count", n, mean, var)[1]
        assert torch.allclose(second, plain) if n == 1 else (second < plain).all()
    torch.testing.assert_close(second, (var / torch.arange(1, 9) ** 2).sum(1))


def test_gdpo_s_moments():
    """Of a policy whose log-probs are -0.1 times the place, more where more is masked."""

    def policy(ids, seen, masked, temperature, given):
        assert torch.equal(ids[:, 1:] == 99, masked) and temperature == 1.0 and (given < 9).all()
        return (-0.1 * torch.arange(1, 5) * masked.sum(1, keepdim=True) * masked,)

    mean, var = gdpo.moments(policy, torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5).bool(), 4, 99)
    torch.testing.assert_close(mean[1], -0.25 * torch.arange(1, 5).double() ** 2)
    assert var[0, 0].item() == pytest.approx(0.0125) and var[0, 3] == 0
    torch.testing.assert_close(gdpo.exact(mean), torch.full((2,), -0.25 * 10).double())
