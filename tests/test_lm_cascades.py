"""Chow's scores and quantiles on the card's answers, the network's loss and fit, the task, and what a run defers."""

import json

import pytest
import torch

from algos import lm_cascades
from tests.helpers import ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
SCRIPT = ROOT / "algos" / "lm_cascades.py"
ANSWERS = [[-0.05] * 8, [-0.01, -0.30], [-0.02, -0.02, -1.2, -0.02, -0.02, -0.02]]
LOGP = torch.tensor([a + [-9.0] * (8 - len(a)) for a in ANSWERS], dtype=torch.float64)
MASK = torch.arange(8) < torch.tensor([[len(a)] for a in ANSWERS])


def test_worked_numbers():
    total, mean = lm_cascades.chow(LOGP, MASK)
    assert total.tolist() == pytest.approx([-0.4, -0.31, -1.3])
    assert mean.tolist() == pytest.approx([-0.05, -0.155, -0.216667], abs=1e-6)
    found = lm_cascades.quantiles(LOGP, MASK)
    assert found.shape == (3, 11) and found[:, 0].tolist() == pytest.approx([-0.05, -0.30, -1.2])
    assert found[:, 4].tolist() == pytest.approx([-0.05, -0.184, -0.02])
    assert found[:, 5].tolist() == pytest.approx([-0.05, -0.155, -0.02]) and found[1, 10].item() == pytest.approx(-0.01)
    order = {name: x.argsort().tolist() for name, x in dict(sum=total, mean=mean, q=found[:, 4]).items()}
    assert order == dict(sum=[2, 0, 1], mean=[2, 1, 0], q=[1, 0, 2])
    # A quantile of probabilities is another number.
    assert LOGP[1, :2].exp().quantile(0.4).item() == pytest.approx(0.840511, abs=1e-6)
    assert found[1, 4].exp().item() == pytest.approx(0.831936, abs=1e-6)


def test_features():
    """Whatever is in the padding; an answer that has nothing has zeros."""
    cut = torch.tensor([False, True, False])
    found = lm_cascades.scores(LOGP, cut, MASK, lm_cascades.Args())
    wide = torch.nn.functional.pad(LOGP, (0, 3), value=-1.0), cut, torch.nn.functional.pad(MASK, (0, 3))
    torch.testing.assert_close(lm_cascades.scores(*wide, lm_cascades.Args()), found)
    assert found.shape == (3, 14) and found[:, 13].tolist() == [0, 1, 0]
    assert found[:, 11].tolist() == pytest.approx([-0.4, -0.31, -1.3])
    none = lm_cascades.scores(LOGP, cut, MASK & False, lm_cascades.Args())
    assert none[:, :13].eq(0).all() and none[:, 13].tolist() == [0, 1, 0]


def test_loss():
    """The gain, or the small model's own quality with its sign turned; gradients by hand."""
    guess = torch.tensor([0.5, -0.25, 0.0], requires_grad=True)
    small, large = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])
    loss = lm_cascades.router_loss(guess, small, large, lm_cascades.Args())
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 1.5625 + 1) / 3)
    assert guess.grad.tolist() == pytest.approx([2 / 3 * 0.5, 2 / 3 * -1.25, 2 / 3 * 1.0])
    other = lm_cascades.router_loss(guess, small, large, lm_cascades.Args(target="small-right"))
    assert other.item() == pytest.approx((1.5**2 + 0.25**2 + 1) / 3)


def world(n=400):
    """The gain is 1 where the first feature is above 0; the second one is noise on another scale."""
    g = torch.Generator().manual_seed(0)
    x = torch.stack([torch.randn(n, generator=g), 1000 * torch.randn(n, generator=g) + 5000], 1)
    large = (x[:, 0] > 0).float()
    return x, torch.zeros(n), large


def fitted(seed=0, **flags):
    x, small, large = world()
    router = lm_cascades.Router(2)
    rows = torch.arange(200), torch.arange(200, 300)
    lm_cascades.fit(router, x, small, large, *rows, seed, lm_cascades.Args(**dict(epochs=15, lr=1e-2) | flags))
    return router.eval()


def test_deferral():
    """By the card; and ties are the mean of their orders."""
    curve, area = lm_cascades.deferral([0.9, 0.2, 0.6, 0.4], [1, 0, 1, 1], [1, 1, 0, 1])
    assert curve == [[0, 0.75], [0.25, 1.0], [0.5, 1.0], [0.75, 0.75], [1.0, 0.75]] and area == pytest.approx(0.875)
    oracle = lm_cascades.deferral([0, -1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1])
    assert oracle[0] == [[0, 0.75], [0.25, 1.0], [0.5, 1.0], [0.75, 1.0], [1.0, 0.75]]
    assert oracle[1] == pytest.approx(0.9375)
    small, large = [1, 0, 1, 0, 0], [0, 1, 1, 1, 0]
    line, _ = lm_cascades.deferral([7] * 5, small, large)
    assert line == [pytest.approx([i / 5, 0.4 + i / 5 * 0.2]) for i in range(6)]


def test_fit():
    """It finds what is gained on rows that it has not seen, standardised, and the same for the same seed."""
    x, small, large = world()
    router = fitted()
    with torch.no_grad():
        area = lm_cascades.deferral(-router(x[300:]), small[300:], large[300:])[1]
    best = lm_cascades.deferral(-large[300:], small[300:], large[300:])[1]
    assert area > best - 0.03 and best > 0.7 * large[300:].mean()
    torch.testing.assert_close(router.mean, x[:200].mean(0))
    torch.testing.assert_close(router.std, x[:200].std(0))
    again, other = fitted(), fitted(seed=1)
    state = router.state_dict()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    assert any(not torch.equal(v, other.state_dict()[k]) for k, v in state.items())


def test_the_epoch_is_chosen_on_other_rows(monkeypatch):
    """What is kept is the network of the epoch with the greatest area, here the second of four."""
    areas, states = iter([0.1, 0.9, 0.5, 0.3]), []
    router = lm_cascades.Router(2)

    def deferral(score, small, large):
        assert len(score) == 100
        states.append({k: v.clone() for k, v in router.state_dict().items()})
        return None, next(areas)

    monkeypatch.setattr(lm_cascades, "deferral", deferral)
    x, small, large = world()
    rows = torch.arange(200), torch.arange(200, 300)
    lm_cascades.fit(router, x, small, large, *rows, 0, lm_cascades.Args(epochs=4))
    kept = router.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in states[1].items())
    assert any(not torch.equal(v, kept[k]) for k, v in states[3].items())


def test_the_task():
    args = lm_cascades.Args(items=300, seed=5)
    task = lm_cascades.families(args, 10)
    assert len(task.test) == 300 and {e.prompt[0] for e in task.test} == set("csd") and task.recipe["steps"] == 10
    for e in task.test + task.train[:500]:
        kind, rest = e.prompt[0], e.prompt[1:-1]
        if kind == "c":
            assert e.answer[-1] == rest and e.answer == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(e.answer)]
        else:
            digits = rest.split("+") if kind == "s" else list(rest)
            assert int(e.answer) == sum(map(int, digits)) % (10**9 if kind == "s" else 10)
        assert task.check(e.answer, e.answer)[1] == 1 and task.check(e.answer + "0", e.answer)[1] == 0
    again, other = (lm_cascades.families(lm_cascades.Args(items=300, seed=s), 10) for s in (5, 6))
    assert [e.prompt for e in again.test] == [e.prompt for e in task.test] != [e.prompt for e in other.test]
    assert [e.prompt for e in other.train] == [e.prompt for e in task.train]


def test_results():
    """Ends are the models' own qualities, the oracle is above all, and random is the line."""
    made = [dict(family="cs"[i % 2], small=float(i % 4 == 0), large=float(i % 3 > 0), asked="",
                 scores=dict(sum=-float(i), length=1.0)) for i in range(60)]  # fmt: skip
    found = lm_cascades.results(made, lm_cascades.Args())
    table, curves = found["table"], found["panels"][0]["of"]
    small, large = (sum(r[k] for r in made) / 60 for k in ("small", "large"))
    assert table["random"]["AUC-DF"] == pytest.approx((small + large) / 2) == pytest.approx(table["length"]["AUC-DF"])
    assert curves["sum"][0] == [0.0, small] and curves["random"] == [[0.0, small], [1.0, large]]
    assert table["oracle"]["AUC-DF"] >= max(row["AUC-DF"] for name, row in table.items() if "low" in row)
    assert table["small alone"]["quality"] == small and table["large alone"]["quality"] == large
    heat = found["panels"][2]["of"]["sum"]
    assert heat == {"c": pytest.approx(0.3), "s": pytest.approx(0.3)}
    json.dumps(found, allow_nan=False)


def test_a_run(tmp_path, tiny):
    """Two folders of the same tokenizer on a file of prompts: the large one answers better, and each has its own states."""
    rows = [dict(prompt=f"{10 + i % 90}+{10 + i * 7 % 90}=", answer=str(20 + i % 90 + i * 7 % 90)) for i in range(60)]
    for name, some in dict(train=rows[:48], test=rows[48:]).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    weak = lm_cascades_weak(tmp_path / "weak", tiny)
    argv = ["--model", weak, "--large", tiny, "--task", tmp_path / "train.jsonl", "--items", 32, "--max-new-tokens", 28]
    done = run(tmp_path, *argv, "--prompt-template", "{prompt}", "--epochs", 2, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    small, large = (lines(tmp_path / "run" / f"{name}.jsonl") for name in ("small", "large"))
    assert len(small) == len(large) == 32 and len(lines(tmp_path / "run" / "items.jsonl")) == 11
    assert all(len(a["logp"]) >= 1 and a["state"] != b["state"] for a, b in zip(small, large))
    assert all(row["family"] is None for row in lines(tmp_path / "run" / "items.jsonl"))


def test_a_large_model_that_is_no_better(tmp_path, tiny):
    """That is said, and what there is is shown; where both are always wrong nothing is over random."""
    (tmp_path / "zero.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "no"}}\n' for i in range(40)))
    argv = ["--model", tiny, "--large", tiny, "--task", tmp_path / "zero.jsonl", "--items", 12, "--max-new-tokens", 4]
    done = run(tmp_path, *argv, "--prompt-template", "{prompt}", "--epochs", 1, "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    assert "is right no more often than" in done.out
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    assert table["random"]["AUC-DF"] == 0 == table["sum"]["over random, %"] == table["large alone"]["quality"]


def lm_cascades_weak(folder, tiny):
    """The tiny model with other weights in its last layer."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name in weights:
        if "layers.1" in name and weights[name].dim() > 1:
            weights[name] = torch.randn_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))
    return folder


def test_mistakes(tmp_path, tiny):
    assert "--items must be at least 12" in user_error(run(tmp_path, "--items", 3, script=SCRIPT))
    assert "--epochs must be at least 1" in user_error(run(tmp_path, "--epochs", 0, script=SCRIPT))
    (tmp_path / "few.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(8)))
    argv = ["--model", tiny, "--large", tiny, "--task", tmp_path / "few.jsonl", "--prompt-template", "{prompt}"]
    assert "that can be asked" in user_error(run(tmp_path, *argv, "--items", 24, script=SCRIPT))
