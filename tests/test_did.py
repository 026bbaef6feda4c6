"""DID: the exact identities, which loss finds the target, the projection, and the entropies of a language model."""

import itertools
import json
import math
import os
import signal

import pytest
import torch

from algos import did, dpo
from tests import sync, test_gpu
from tests.helpers import ROOT, lines, logged, run, start, user_error
from tests.test_dpo import example

FEW = ["--recovery-steps", 20]

DID = ROOT / "algos" / "did.py"
FEW = "--steps 3 --pairs-per-step 8 --eval-prompts 8 --ref live --did-prompts 1 --checkpoint-every 0".split()
REF, STAR, BETA = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log(), torch.tensor([0.2, 0.5, 0.2, 0.1]).double().log(), 0.5


def near(tensor, values, tolerance=1e-6):
    torch.testing.assert_close(tensor, torch.tensor(values, dtype=tensor.dtype), rtol=0, atol=tolerance)


def test_the_loss_is_dpos():
    assert sync.chunks(DID.read_text())["pair_loss"] == sync.chunks((ROOT / "algos" / "dpo.py").read_text())["pair_loss"]
    logp, ref_logp, mask = example()
    losses, _ = did.pair_loss(logp, ref_logp, mask, did.Args())
    assert losses.item() == pytest.approx(0.644397, abs=1e-6) and did.Args().beta == 0.5
    for change in (dict(loss="ipo"), dict(loss="hinge"), dict(label_smoothing=0.1), dict(beta=1.0)):
        mine, _ = did.pair_loss(logp, ref_logp, mask, did.Args(**change))
        assert torch.equal(mine, dpo.pair_loss(logp, ref_logp, mask, dpo.Args(**dict(beta=0.5) | change))[0])
        assert not torch.equal(mine, losses)


# ---------------------------------------------------------------- part A


def test_worked_example():
    q = did.differential_information(STAR, REF)
    near(q.exp(), [0.074074, 0.308642, 0.246914, 0.370370])
    near(did.entropy(q), 1.268856)
    rejected = did.rejected_sampler(REF, STAR, BETA)
    near(rejected.exp(), [0.665346, 0.195571, 0.109328, 0.029755])
    near(did.differential_information(REF, rejected).exp(), [0.140785, 0.287375, 0.257036, 0.314804])
    torch.testing.assert_close(did.differential_information(REF, rejected), (BETA * q).log_softmax(-1))  # the power law
    near((REF + (REF - rejected) / BETA).softmax(-1), [0.2, 0.5, 0.2, 0.1])
    found = did.spread(STAR, REF)
    near(found["ref_log_ratio"], -0.227088)
    near(found["entropy"], 1.220607)
    near(found["entropy_q"], 1.268856)
    near(did.entropy(REF), 1.142120)


def test_how_pairs_are_made_is_how_they_are_preferred():
    q, rejected = did.differential_information(STAR, REF), did.rejected_sampler(REF, STAR, BETA)
    made = REF.exp()[1] * rejected.exp()[0] / (REF.exp()[1] * rejected.exp()[0] + REF.exp()[0] * rejected.exp()[1])
    near(made, 0.671187)
    near(torch.sigmoid(BETA * (q[1] - q[0])), 0.671187)
    for i, j in itertools.combinations(range(4), 2):  # margins lie on a line
        rejected_margin, ref_margin, star_margin = (p[i] - p[j] for p in (rejected, REF, STAR))
        torch.testing.assert_close(ref_margin - rejected_margin, BETA * (star_margin - ref_margin))


def test_entropy_and_divergence_on_closed_forms():
    sure, even = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
    assert did.entropy(sure) == 0 and did.entropy(even).item() == pytest.approx(math.log(2))
    assert did.divergence(sure, sure.flip(0)).item() == pytest.approx(math.log(2))
    assert did.divergence(even, even).item() == pytest.approx(0, abs=1e-7)
    m = (REF.exp() + STAR.exp()) / 2
    by_hand = sum((p.exp() * (p - m.log())).sum() for p in (REF, STAR)) / 2
    torch.testing.assert_close(did.divergence(REF, STAR), by_hand)
    both = did.differential_information(torch.stack([REF, STAR]), REF)  # a prompt each: not pooled
    near(did.entropy(both), [math.log(4), 1.268856])


def outcomes():
    """Those of the script and of the card's prototype."""
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


@pytest.fixture(scope="module")
def recovered():
    ref_logp, target = outcomes()
    return did.recovery(ref_logp, target, did.rejected_sampler(ref_logp, target, 0.5), 0.5, 1500)


@pytest.mark.parametrize(
    "name, js",
    [("DPO", 0.0), ("DPO, 2 beta", 0.0599), ("IPO", 0.149), ("hinge", 0.029), ("SimPO, no margin", 0.088), ("SimPO", 0.091),
     ("SLiC", 0.091), ("ORPO", 0.204)],
)  # fmt: skip
def test_only_dpo_with_its_own_beta_finds_the_target(recovered, name, js):
    assert recovered[name]["js_target"] == pytest.approx(js, abs=1e-3)
    assert (recovered[name]["js_information"] < 1e-6) == (name == "DPO")


def test_equal_losses_and_different_policies(recovered):
    ref_logp, target = outcomes()
    for name in ("DPO", "DPO, 2 beta", "SimPO, no margin"):
        assert recovered[name]["loss"] == pytest.approx(0.60507, abs=2e-5)
    assert recovered["DPO"]["ref_log_ratio"] == pytest.approx(-1.016, abs=1e-3)  # -KL(pi_ref || pi*)
    for name, value in did.spread(target, ref_logp).items():
        assert recovered["DPO"][name] == pytest.approx(value.item(), abs=1e-3), name


def test_another_rejected_sampler_another_target():
    """DPO ends at pi_ref (pi_ref / pi_l)^(1 / beta), whatever pi_l is."""
    even = torch.zeros(4).double().log_softmax(-1)
    for rejected in (even, REF):
        end = (REF + (REF - rejected) / 2.0).log_softmax(-1)
        assert did.recovery(REF, end, rejected, 2.0, 400)["DPO"]["js_target"] < 1e-6
    assert did.recovery(REF, STAR, even, 2.0, 400)["DPO"]["js_target"] > 1e-2


def test_the_other_losses_are_what_their_papers_say():
    """At the start, where the policy is the reference, summed pair by pair."""
    rejected = did.rejected_sampler(REF, STAR, BETA)

    def expected(loss):
        p, l = REF.exp().tolist(), rejected.exp().tolist()
        return sum(p[i] * l[j] * loss(p[i], p[j]) for i in range(4) for j in range(4))

    def minus_log_sigmoid(z):
        return math.log1p(math.exp(-z))

    def odds(p):
        return p / (1 - p)

    found = did.recovery(REF, STAR, rejected, BETA, 0)
    for name, loss in {
        "SimPO, no margin": lambda w, l: minus_log_sigmoid(0.5 * math.log(w / l)),
        "SimPO": lambda w, l: minus_log_sigmoid(2 * math.log(w / l) - 1),
        "SLiC": lambda w, l: max(0, 1 - math.log(w / l)) - 0.1 * math.log(w),
        "ORPO": lambda w, l: 0.1 * minus_log_sigmoid(math.log(odds(w) / odds(l))) - math.log(w),
        "DPO": lambda w, l: math.log(2),
        "IPO": lambda w, l: 1.0,
        "hinge": lambda w, l: 1.0,
    }.items():
        assert found[name]["loss"] == pytest.approx(expected(loss), abs=1e-6), name
        assert found[name]["js_target"] == pytest.approx(did.divergence(REF, STAR).item())


# ---------------------------------------------------------------- part B


def test_sampled_entropy_finds_the_exact_one():
    g = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(STAR.exp().expand(2, 4), 200_000, replacement=True, generator=g)
    near(did.sampled_entropy(STAR[drawn], REF[drawn]), [1.268856] * 2, 0.01)
    few = drawn[0, :3]  # weights 1 / pi_ref, normalised; q = pi / pi_ref over the mean of 1 / pi_ref
    w, q = 1 / REF[few].exp(), (STAR - REF)[few].exp() / (1 / REF[few].exp()).mean()
    near(did.sampled_entropy(STAR[few], REF[few]), -(w / w.sum() * q.log()).sum().item())
    drawn = torch.multinomial(REF.exp(), 200_000, replacement=True, generator=g)
    near(did.sampled_entropy(REF[drawn], REF[drawn]), math.log(4), 0.01)  # q is uniform where the policy is the reference


def test_projection():
    h = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    g = [torch.tensor([-3.0, 2.0]), torch.tensor([[1.0]])]
    cosine = did.project(g, h)
    assert cosine == pytest.approx(-5 / (5 * 14**0.5))
    near(g[0], [-3 + 3 / 5, 2.0])
    near(g[1], [[1 + 4 / 5]])
    assert sum((x * y).sum() for x, y in zip(g, h)).item() == pytest.approx(0, abs=1e-6)
    kept = [x.clone() for x in g]
    assert did.project(g, [-x for x in h]) == pytest.approx(0, abs=1e-6)
    kind = [torch.tensor([1.0, 2.0]), torch.tensor([[-0.5]])]  # <g, h> = 1
    assert did.project(kind, h) > 0 and torch.equal(kind[0], torch.tensor([1.0, 2.0]))
    assert did.project(kept, [torch.zeros(2), torch.zeros(1, 1)]) == 0 and torch.equal(kept[0], g[0])


def test_projection_of_a_real_conflict():
    """A shared weight: the pair's loss would lower both responses; projected, a step leaves the chosen one as it is."""
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    near_alike = torch.stack([torch.ones(6), torch.linspace(1.1, 1.6, 6)]).double()  # features of chosen, rejected

    def logp():
        return torch.nn.functional.logsigmoid(near_alike @ weight)[:, None]

    ref_logp = logp().detach()
    g = torch.autograd.grad(did.pair_loss(logp(), ref_logp, torch.ones(2, 1).bool(), did.Args())[0].sum(), weight)
    h = torch.autograd.grad(-logp()[0].sum(), weight)
    before = (g[0] * h[0]).sum().item()
    assert before < 0
    did.project(list(g), list(h))
    assert (g[0] * h[0]).sum().item() == pytest.approx(0, abs=1e-12) and g[0].abs().max() > 1e-3


# ---------------------------------------------------------------- runs


def by_hand(folder, prompt):
    """Log-probs of the 4,096 responses to a prompt under the run's final weights and under the start, one token at a time."""
    from common import models, settings

    args, _ = settings.resolve(did.Args(data="letters4", dtype="float64", optimizer="adamw"))
    tokenizer, out = models.load_tokenizer(args), []
    texts = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=4)]
    every = torch.tensor(tokenizer(texts)["input_ids"])
    every = torch.cat([every, torch.full((len(every), 1), tokenizer.eos_token_id)], 1)
    for name in (str(next((folder / "checkpoints").glob("step-000003"))), "tiny"):
        args.model = name
        lm, ids = models.load(args, "cpu", trainable=False).lm, tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = lm(input_ids=torch.cat([torch.tensor(ids).expand(len(every), -1), every], 1)).logits
        logp = logits[:, len(ids) - 1 : -1].log_softmax(-1).gather(-1, every[..., None])
        out.append(logp.sum((1, 2)))
    return out


def test_a_run_and_two_processes(tmp_path):
    """Shards of gradients: inner products are over all processes, so the projected run is the same. Most labels are taken to
    be wrong, so that the gradients are at odds from the first step on."""
    exact = [*FEW, "--dtype", "float64", "--lr", "1e-3", "--recovery-steps", 20, "--label-smoothing", 0.7, "--run-dir"]
    one = run(tmp_path, *exact, tmp_path / "1", script=DID)
    assert one.code == 0 and not one.err
    assert "  over 4,096 responses to 1 prompts: mass 0.9" in one.out
    out = test_gpu.launch(2, *exact, tmp_path / "2", script="algos/did.py")
    assert out.count("SimPO, no margin") == 1
    a, b = (test_gpu.metrics(tmp_path / r) for r in "12")
    for x, y in zip(a, b):
        assert y == pytest.approx(x, rel=1e-6, abs=1e-6)
    assert a[0]["projections"] == 1 and -1 < a[0]["chosen_cosine"] < -0.1
    a, b = (json.loads((tmp_path / r / "did.json").read_text()) for r in "12")
    (prompt,) = a.pop("prompts")
    assert b.pop("prompts") == [prompt] and a.pop("exact") and b.pop("exact")
    for name, (value,) in a.items():
        assert b[name][0] == pytest.approx(value, abs=1e-6), name
    logp, ref_logp = by_hand(tmp_path / "1", prompt)
    p, ref = logp.exp() / logp.exp().sum(), ref_logp.exp() / ref_logp.exp().sum()
    q = p / ref / (p / ref).sum()
    assert a["mass"][0] == pytest.approx(logp.exp().sum().item(), abs=1e-6)
    for name, x in (("entropy", p), ("reference_entropy", ref), ("entropy_q", q)):
        assert a[name][0] == pytest.approx(-(x * x.log()).sum().item(), abs=1e-5), name
    (fall,) = a["ref_log_ratio"]
    assert fall == pytest.approx((ref * (p / ref).log()).sum().item(), abs=1e-5) and fall < -1e-3
    recovery = json.loads((tmp_path / "1" / "recovery.json").read_text())
    assert set(recovery["ORPO"]) == {"loss", "js_target", "js_information", "entropy", "entropy_q", "ref_log_ratio"}


def test_without_projection_it_is_dpo(tmp_path):
    plain = [*FEW[:8], "--data", "letters4", "--beta", 0.5, "--eval-prompts", 4]
    off = ["--no-projected", "--recovery-steps", 0, "--did-prompts", 0]
    for script, more in ((DID, off), (ROOT / "algos" / "dpo.py", [])):
        done = run(tmp_path, *plain, *more, "--run-dir", tmp_path / script.stem, script=script)
        assert done.code == 0, done.err
    for a, b in zip(lines(tmp_path / "did" / "metrics.jsonl"), lines(tmp_path / "dpo" / "metrics.jsonl")):
        assert {k: v for k, v in a.items() if "time/" not in k} == {k: v for k, v in b.items() if "time/" not in k}
    assert not (tmp_path / "did" / "recovery.json").exists() and not (tmp_path / "did" / "did.json").exists()


def test_other_data_is_sampled(tmp_path):
    argv = [*FEW, "--steps", 1, "--data", "letters", "--recovery-steps", 0, "--did-samples", 5, "--eval-prompts", 4]
    done = run(tmp_path, *argv, "--run-dir", tmp_path / "run", script=DID)
    assert done.code == 0, done.err
    assert "over 5 samples (a rough estimate) to 1 prompts: entropy 1" in done.out
    found = json.loads((tmp_path / "run" / "did.json").read_text())
    assert not found["exact"] and set(found) == {"exact", "prompts", "entropy", "entropy_q"} and len(found["entropy_q"]) == 1


def test_a_stopped_run_measures_when_it_is_resumed(tmp_path):
    """Part A comes first, and once; part B only where the training has come to its end."""
    folder = tmp_path / "run"
    argv = [*FEW, "--steps", 6, "--recovery-steps", 20, "--run-dir", folder]
    child = start(tmp_path, *argv, script=DID)
    assert child.until(lambda: logged(folder) == 2), child.wait()
    os.kill(child.pid, signal.SIGTERM)
    done = child.wait()
    assert done.code == 0 and done.out.splitlines()[-1].startswith("stopped after step")
    assert (folder / "recovery.json").exists() and not (folder / "did.json").exists()
    done = run(tmp_path, "--resume", folder, script=DID)
    assert done.code == 0, done.err
    assert (folder / "did.json").exists() and "which loss finds the target?" not in done.out


@pytest.mark.parametrize("flag", ["--recovery-steps", "--did-prompts", "--did-samples"])
def test_mistakes_end_in_one_line(tmp_path, flag):
    assert f"{flag} must be at least 0, is -1" in user_error(run(tmp_path, flag, -1, script=DID))
