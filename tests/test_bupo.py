"""BuPO's worked numbers, what of a model an inner policy reaches, the boundary layer, and what the switch leaves as it was."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from algos import bupo
from common.batch import Meter, collate, read
from common.policy import HeadLogp, Policy
from tests.helpers import ROOT, checkpoints, contents, killed, lines, outcome, run, same

KINDS = dict(
    qwen2=(Qwen2Config, Qwen2ForCausalLM), qwen3=(Qwen3Config, Qwen3ForCausalLM), llama=(LlamaConfig, LlamaForCausalLM)
)  # fmt: skip
ARGS = SimpleNamespace(temperature=1.0, micro_batch_tokens=30)
SMALL = "--task addition --prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8".split()
SCRIPT = ROOT / "algos" / "bupo.py"


def policy(kind="qwen2", layers=3, tied=False, dtype=torch.float64):
    """A random one, whose head and norm are nothing special."""
    config, model = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.4,
    ))  # fmt: skip
    torch.nn.init.uniform_(made.model.norm.weight, 0.5, 2.0)
    return Policy(made.to(dtype))


def rollout():
    """Groups of three; with an empty completion and one of a single token."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 11, (n,), generator=g).tolist() for n in (3, 5, 2, 4)]
    lengths = [6, 2, 0, 4, 7, 1, 0, 3, 5, 1, 6, 2]
    rows = [(prompts[i // 3], torch.randint(2, 11, (n,), generator=g).tolist()) for i, n in enumerate(lengths)]
    batch = collate(rows)
    batch.group, batch.prompt_id = 3, torch.arange(12) // 3
    return batch


# ---------------------------------------------------------------- the objective


def test_worked_numbers():
    h = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    E = torch.tensor([[1.0, 0], [0, 1], [-1, 1]], dtype=torch.float64, requires_grad=True)
    logp, entropy = HeadLogp.apply(h, E, torch.tensor([0]))
    assert logp.item() == pytest.approx(-0.054985, abs=1e-6) and entropy.item() == pytest.approx(0.228243, abs=1e-6)
    mask, one = torch.ones(1, 1).bool(), torch.ones(1, 1, dtype=torch.float64)
    objective, stats = bupo.surrogate(logp[None], -0.2 * one, one, mask, bupo.Args())
    loss = -(objective * bupo.token_weights(mask, bupo.Args()))[mask].sum()
    loss.backward()
    assert loss.item() == pytest.approx(-1.156057, abs=1e-6) and not stats["clip_fraction"].any()
    assert h.grad[0].tolist() == pytest.approx([-0.069223, 0.061850], abs=1e-6)
    wanted = [[-0.123700, 0.061850], [0.108955, -0.054477], [0.014745, -0.007373]]
    torch.testing.assert_close(E.grad, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_inner_policy_has_no_norm_and_reaches_no_layer_above(kind):
    model, batch = policy(kind), rollout()
    T = batch.mask.shape[1]
    positions = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    model.pad()
    out = model.lm.model(
        input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=positions, output_hidden_states=True
    )
    states, E = out.hidden_states, model.lm.lm_head.weight
    for l in (1, 2):
        logp, entropy = model(batch.ids, batch.attention_mask, batch.mask, 1.0, layer=l)
        naive = (states[l][:, -T - 1 : -1] @ E.T).log_softmax(-1)
        target = naive.gather(-1, batch.ids[:, -T:, None])[..., 0]
        torch.testing.assert_close(logp[batch.mask], target[batch.mask], rtol=0, atol=1e-10)
        torch.testing.assert_close(entropy[batch.mask], -(naive.exp() * naive).sum(-1)[batch.mask], rtol=0, atol=1e-10)
        model.zero_grad()
        logp.sum().backward()
        none = {n for n, p in model.lm.named_parameters() if p.grad is None}
        above = tuple(f"model.layers.{i}." for i in range(l, 3))
        assert none == {n for n, _ in model.lm.named_parameters() if n.startswith(above) or n == "model.norm.weight"}
        assert all(p.grad.any() for n, p in model.lm.named_parameters() if p.grad is not None and "k_proj.bias" not in n)


def test_which_steps_have_an_inner_policy():
    config = SimpleNamespace(num_hidden_layers=4)
    for steps, l, wanted in (
        (2, 3, [3, 3, None, None]),
        (0, 3, 4 * [None]),
        (4, 1, 4 * [1]),
        (9, 4, 4 * [None]),
        (2, 9, 4 * [None]),
    ):
        assert [bupo.layer_at(step, l, bupo.Args(inner_steps=steps), config) for step in range(4)] == wanted


# ---------------------------------------------------------------- the boundary layer


def changes(model, batch):
    """dH of every layer by transformers' own padded pass, and whole distributions."""
    lm, T, seen = model.lm, batch.mask.shape[1], []
    hooks = [layer.mlp.register_forward_hook(lambda module, x, y: seen.append((x[0], y))) for layer in lm.model.layers]
    positions = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    model.pad()
    with torch.no_grad():
        lm.model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=positions)
        for hook in hooks:
            hook.remove()
        first = (torch.arange(len(batch.ids)) % batch.group == 0)[:, None] & batch.mask
        logps = [[(z[:, -T - 1 : -1][first] @ lm.lm_head.weight.T).log_softmax(-1) for z in pair] for pair in seen]
    before, after = ([-(logp.exp() * logp).sum(-1).mean().item() for logp in some] for some in zip(*logps))
    return [b - a for a, b in zip(before, after)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [2, 5])
def test_the_boundary_layer_is_the_last_that_raises_the_entropy(kind, layers, capsys):
    model, batch = policy(kind, layers), rollout()
    mine, before = bupo.boundary(model, batch, ARGS), read(model, batch, ARGS)
    said = capsys.readouterr().out
    wanted = changes(policy(kind, layers), batch)
    assert mine == max((i for i, x in enumerate(wanted, 1) if x > 0), default=1)
    assert said == f"boundary layer {mine}: feed-forward parts change the entropy by {' '.join(f'{x:+.2f}' for x in wanted)}\n"
    after = read(policy(kind, layers), batch, ARGS)  # no hook is left, and no weight is another
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and len({f"{x:+.2f}" for x in wanted}) == layers


@pytest.mark.parametrize("raises, found", [([1], 1), ([2], 2), ([1, 2], 2), ([], 1), ([1, 3], 3), ([1, 2, 3], 3)])
def test_feed_forward_parts_made_to_raise_or_to_lower(raises, found):
    """One that puts out nothing leaves all tokens alike, and one that puts out much hardly any."""
    model, batch = policy(), rollout()
    with torch.no_grad():
        for l, layer in enumerate(model.lm.model.layers, 1):
            layer.mlp.down_proj.weight.mul_(0.0 if l in raises else 1e3)
    assert bupo.boundary(model, batch, ARGS) == found


def test_the_boundary_layer_is_that_of_first_completions_in_any_micro_batches(capsys):
    model, batch = policy(), rollout()
    bupo.boundary(model, batch, ARGS)
    said = capsys.readouterr().out
    bupo.boundary(model, batch, SimpleNamespace(temperature=1.0, micro_batch_tokens=1000))
    T = batch.mask.shape[1]
    batch.ids[:, -T:][torch.arange(12) % 3 > 0] = 7
    batch.ids[~batch.attention_mask] = 5
    bupo.boundary(model, batch, ARGS)
    assert capsys.readouterr().out == said + said
    batch.mask, batch.attention_mask = batch.mask & False, batch.attention_mask.clone()
    batch.attention_mask[:, -T:] = False
    assert bupo.boundary(model, batch, ARGS) == 1  # nothing was said at all


# ---------------------------------------------------------------- what is logged


def test_what_is_logged_of_a_token():
    """old 0.5 of the inner policy and 0.8 of the final one; the sampler's gap is the final one's."""
    full = torch.full
    mb = collate([([3], [4, 5])])
    mb.old_logp, mb.sampler_logp = full((1, 2), math.log(0.8)), full((1, 2), math.log(0.8) - 0.25)
    mb.columns["own_logp"] = full((1, 2), math.log(0.5))
    found = bupo.seen(full((1, 2), math.log(0.6)), mb, full((1, 2), 0.7), 2)
    assert set(found) == set("inner_entropy inner_kl inner_ratio_max inner_ratio_min sampler_gap sampler_gap_max".split())
    values = {k: v[0, 0].item() for k, v in found.items()}
    wanted = dict(inner_ratio_max=1.2, inner_ratio_min=1.2, inner_entropy=0.7, inner_kl=1 / 1.2 + math.log(1.2) - 1)
    assert values == pytest.approx(wanted | dict(sampler_gap=0.25, sampler_gap_max=0.25), abs=1e-6)
    plain = bupo.seen(full((1, 2), math.log(0.6)), mb, full((1, 2), 0.7), None)
    assert plain["ratio_max"][0, 0].item() == pytest.approx(0.75) and "inner_kl" not in plain and "entropy" in plain


def test_what_is_logged_of_a_step():
    model, batch = policy(), rollout()
    logp, entropy = read(model, batch, ARGS)
    batch.old_logp, batch.sampler_logp = logp - 0.1, logp
    for step, layer, more in ((4, None, {}), (5, 2, dict(entropy=0, approx_kl=0)), (8, 2, dict(entropy=0, approx_kl=0))):
        bupo.measure(meter := Meter(), model, batch, ARGS, step, 2, layer)
        found = meter.result()
        profile = {"entropy_0", "entropy_1", "entropy_2", "cosine"} if step % 4 == 0 else set()
        assert set(found) == profile | set(more)
        if layer:
            assert found["approx_kl"] == pytest.approx(math.exp(-0.1) + 0.1 - 1)
            assert found["entropy"] == pytest.approx(entropy[batch.mask].mean().item())
    first = (torch.arange(12) % 3 == 0)[:, None] & batch.mask
    inner = read(model, batch, ARGS, layer=1)[1]
    assert found["entropy_1"] == pytest.approx(inner[first].mean().item())
    *_, h, last = read(model, batch, ARGS, layers=[2, 3])
    assert found["cosine"] == pytest.approx(torch.cosine_similarity(h, last, dim=2)[first].mean().item(), abs=1e-6)
    bupo.measure(meter := Meter(), model, batch, ARGS, 0, 9, None)  # a layer that there is not is the last
    assert meter.result()["cosine"] == pytest.approx(1)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{arm: (folder, rows of its metrics)}, of one step or two."""
    folder = tmp_path_factory.mktemp("bupo")
    arms = dict(
        inner=("--inner-layer", 1, "--weight-decay", 0.5, "--beta", 0.5, "--minibatches", 1),
        none=("--inner-steps", 0), grpo=("--model", "tiny-deep"),
        switch=("--inner-steps", 1, "--steps", 2, "--checkpoint-every", 1, "--stale", 1),
    )  # fmt: skip
    for name, more in arms.items():
        script = ROOT / "algos" / "grpo.py" if name == "grpo" else SCRIPT
        done = run(folder, *SMALL, "--steps", 1, *more, "--run-dir", folder / name, script=script)
        assert done.code == 0, done.err
        (folder / f"{name}.out").write_text(done.out)
    return {name: (folder / name, lines(folder / name / "metrics.jsonl")) for name in arms}


def test_without_an_inner_policy_it_is_grpo_bit_for_bit(runs):
    (mine, rows), (base, base_rows) = runs["none"], runs["grpo"]
    assert outcome(mine).weights == outcome(base).weights != outcome(runs["inner"][0]).weights
    assert outcome(mine).evals == outcome(base).evals
    for a, b in zip(rows, base_rows, strict=True):
        shared = [k for k in b if not k.startswith("time/")]
        assert {k: a[k] for k in shared} == {k: b[k] for k in shared} and b["grad_norm"] > 0


def test_layers_above_stay_as_they_were(runs):
    """Not even decayed: they have no gradient. And what a step logs."""
    from safetensors.torch import load_file

    from common import tasks
    from common.worlds import tiny

    start = load_file(tiny.warm_start(tasks.load("addition"), "tiny-deep") + "/model.safetensors")
    said = (runs["switch"][0].parent / "switch.out").read_text()
    (found,) = re.findall(r"^boundary layer (\d): feed-forward parts change", said, re.M)
    assert found in "23" and "boundary layer" not in (runs["inner"][0].parent / "inner.out").read_text()  # this one was told
    for name, l in (("inner", 1), ("switch", int(found))):
        trained = load_file(checkpoints(runs[name][0])[0] / "model.safetensors")
        moved = {k for k, v in trained.items() if not torch.equal(v, start[k])}
        above = tuple(f"model.layers.{i}." for i in range(l, 4))
        assert moved == {k for k in trained if not k.startswith(above) and k != "model.norm.weight"}
    row = runs["switch"][1][0]
    assert row["inner_kl"] > row["approx_kl"] > 0 and row["inner_ratio_max"] > 1 > row["inner_ratio_min"]
    assert row["sampler_gap_max"] < 1e-4 and "ratio_max" not in row and row["clip_fraction"] < 0.2
    assert 0 < row["cosine"] < 1 and row["entropy_0"] > row["entropy"] > 0


def test_old_new_and_reference_are_of_one_layer(runs):
    """At the first update of the first step they are the same policy, and advantages add up to 0."""
    folder, (row,) = runs["inner"]
    assert row["inner_ratio_max"] == pytest.approx(1, abs=1e-4) == row["inner_ratio_min"] and row["clip_fraction"] == 0
    assert abs(row["loss"]) < 1e-5 and row["ref_kl"] < 1e-6 and row["grad_norm"] > 0.01 and row["approx_kl"] > 0
    columns = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])["columns"]
    assert columns["own_logp"] != columns["logp"]  # which is the final policy's


def test_a_resume_at_the_switch_and_a_rollout_that_waits(runs, tmp_path):
    """What waits is read by the policy that it will train: here the final one, though an inner one is trained meanwhile. The
    layers above begin without a past in the optimizer, resumed or not."""
    folder, rows = runs["switch"]
    assert "inner_kl" in rows[0] and "inner_kl" not in rows[1]
    killed(folder, tmp_path / "parts", 1)
    saved = contents(checkpoints(tmp_path / "parts")[-1])
    (waiting,) = saved["queue"][0]
    assert torch.equal(waiting.columns["own_logp"], waiting.old_logp) and saved["state"]["inner_layer"] in (2, 3)
    steps = {state["step"].item() for state in saved["optimizer"].values()}
    assert steps == {2}
    done = run(tmp_path, "--resume", tmp_path / "parts", script=SCRIPT)
    assert done.code == 0, done.err
    assert "boundary layer" not in done.out
    same(outcome(folder), outcome(tmp_path / "parts"))
