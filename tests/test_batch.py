"""Batches: columns, cuts, the scoring pass, minibatches, and the loop's own arithmetic."""

import json
from types import SimpleNamespace

import pytest
import torch

from algos import grpo, ppo
from common import checkpoint, engines, gpu, rollout, tasks
from common.batch import Batch, _engine_ratio, collate, cuts, minibatches, read
from common.worlds import tiny as tiny_models
from tests.batches import args, sample, tiny

__all__ = ["tiny"]


def test_micro_batches_hold_every_row_once_within_the_budget(tiny):
    a, batch = sample(tiny)
    rows = torch.tensor([5, 0, 17, 9, 23, 3, 11])
    for budget in (40, 90, 10**6):
        seen = []
        for mb in batch.micro_batches(rows, budget):
            T = mb.mask.shape[1]
            prompts = {tuple(i[m].tolist()) for i, m in zip(mb.ids[:, :-T], mb.attention_mask[:, :-T])}
            assert sum(map(len, prompts)) + int(mb.mask.sum()) <= budget or len(mb.ids) == 1
            assert mb.attention_mask.any(0).all() and mb.mask.any(0).all()  # trimmed: no column is all padding
            seen += [tuple(i[m].tolist()) for i, m in zip(mb.ids, mb.attention_mask)]
        assert sorted(seen) == sorted(tuple(batch.ids[r][batch.attention_mask[r]].tolist()) for r in rows)


def test_gradient_does_not_depend_on_micro_batches(tiny):
    _, policy, _ = tiny
    a, batch = sample(tiny)
    batch.old_logp = read(policy, batch, a)[0]
    batch.adv = torch.randn(24, 1, generator=torch.Generator().manual_seed(0)).expand(batch.mask.shape)
    gradients = []
    for budget in (10**6, 300, 30):
        policy.zero_grad()
        rows, batch.weights = next(iter(minibatches(batch, a, 0, grpo.token_weights)))
        for mb in batch.micro_batches(rows, budget):
            logp, _ = policy(mb.ids, mb.attention_mask, mb.mask, a.temperature)
            objective, _ = grpo.surrogate(logp, mb.old_logp, mb.adv, mb.mask, grpo.Args())
            (-(objective * mb.weights)[mb.mask].sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for g in gradients[1:]:
        torch.testing.assert_close(g, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_rank_that_runs_out_repeats_a_row_that_counts_for_nothing(tiny, monkeypatch):
    """Sharded ranks must make equally many passes: the extra ones add nothing to gradients or means, and reach every weight."""
    _, policy, _ = tiny
    a, batch = sample(tiny)
    batch.old_logp = read(policy, batch, a)[0]
    batch.adv = torch.ones(batch.mask.shape)
    batch.weights = grpo.token_weights(batch.mask, a)
    rows = torch.arange(24)
    real = len(list(batch.micro_batches(rows, 300)))
    monkeypatch.setattr(gpu, "maximum", lambda n: n + 2)
    every = list(batch.micro_batches(rows, 300))
    assert len(every) == real + 2 and all(mb.mask.any() for mb in every[:real])
    for idle in every[real:]:
        assert not idle.mask.any() and not idle.weights.any()
        policy.zero_grad()
        logp, _ = policy(idle.ids, idle.attention_mask, idle.mask, a.temperature)
        objective, _ = grpo.surrogate(logp, idle.old_logp, idle.adv, idle.mask, grpo.Args())
        (-(objective * idle.weights)[idle.mask].sum()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_minibatches_cut_the_rollout_into_parts_whose_weights_sum_to_one(tiny):
    a, batch = sample(tiny)
    parts = list(minibatches(batch, a, 0, grpo.token_weights))
    assert len(parts) == a.minibatches * a.epochs
    for epoch in (parts[:3], parts[3:]):
        assert sorted(torch.cat([rows for rows, _ in epoch]).tolist()) == list(range(24))
    for rows, weights in parts:
        assert weights.sum().item() == pytest.approx(1.0) and set(weights.nonzero()[:, 0].tolist()) == set(rows.tolist())
    again = list(minibatches(batch, a, 1, grpo.token_weights))
    assert not torch.equal(parts[0][0], again[0][0])


def test_every_pass_and_every_step_has_an_order_of_its_own(tiny):
    a, batch = sample(tiny, epochs=2, minibatches=2)
    orders = []
    for step in (0, 1):
        parts = [rows.tolist() for rows, _ in minibatches(batch, a, step, grpo.token_weights)]
        orders += [parts[0] + parts[1], parts[2] + parts[3]]
    assert all(sorted(order) == list(range(24)) for order in orders) and len({tuple(order) for order in orders}) == 4


def test_join_undoes_groups(tiny):
    _, batch = sample(tiny)
    parts = [batch.groups(torch.tensor(g)) for g in ([0, 2], [1], [3, 4, 5])]
    joined = Batch.join(parts)
    order = torch.tensor([0, 2, 1, 3, 4, 5])
    expected = batch.groups(order)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(joined, name), value), name
    assert torch.equal(joined.reward, batch.reward.view(6, 4)[order].flatten()) and joined.texts == expected.texts


@pytest.mark.parametrize(
    "sizes, prompts, budget, expected",
    [
        ([(2, 8)] * 5, "abcde", 20, [[0, 1], [2, 3], [4]]),  # prompts of their own: 10 tokens each
        ([(2, 8)] * 5, "aaaaa", 20, [[0, 1], [2, 3], [4]]),  # 18 tokens, and a third completion would make 26
        ([(2, 8)] * 5, "aaaaa", 26, [[0, 1, 2], [3, 4]]),
        ([(2, 8)] * 5, "ababa", 26, [[0, 2, 4], [1, 3]]),  # completions of a prompt come together
        ([(2, 5), (4, 50), (2, 9)], "aba", 10**6, [[1, 2, 0]]),  # the longest prompt's first, longest first
        ([(2, 500), (2, 8)], "aa", 100, [[0], [1]]),  # an item larger than the budget goes alone
        ([], "", 100, []),
    ],
)
def test_where_micro_batches_end(sizes, prompts, budget, expected):
    assert cuts(sizes, prompts, budget) == expected


# ---------------------------------------------------------------- columns


def columns(batch):
    """Numbers of a script's own, of every shape, that tell rows and tokens apart."""
    B, T = batch.mask.shape
    row, token = torch.arange(B).float(), torch.arange(B * T).float().view(B, T)
    return dict(number=row, per_token=token, several=token[:, :, None] * torch.tensor([1.0, 10.0, 100.0]))


def test_columns_go_wherever_rows_go(tiny):
    a, batch = sample(tiny)
    batch.columns = columns(batch)
    rows = torch.tensor([5, 0, 17, 9])
    some = batch.take(rows)
    t = some.mask.shape[1]
    for name, value in batch.columns.items():
        expected = value[rows] if value.dim() == 1 else value[rows][:, :t]
        assert torch.equal(some.columns[name], expected), name
    assert some.texts == [batch.texts[i] for i in rows] and torch.equal(some.reward, batch.reward[rows])
    for mb in batch.micro_batches(rows, 60):
        assert torch.equal(mb.columns["number"], mb.row.float()) and set(mb.row.tolist()) <= set(rows.tolist())
        assert mb.columns["several"].shape == (*mb.mask.shape, 3)
        assert torch.equal(mb.columns["several"][:, :, 1], 10 * mb.columns["per_token"])
    parts = [batch.groups(torch.tensor(g)) for g in ([4, 2], [1])]
    joined = Batch.join(parts)
    back = torch.tensor([16, 17, 18, 19, 8, 9, 10, 11, 4, 5, 6, 7])
    assert torch.equal(joined.columns["number"], back.float())
    where = joined.mask
    expected = batch.columns["several"][back][:, : where.shape[1]]
    assert torch.equal(joined.columns["several"][where], expected[where])
    with pytest.raises(ValueError, match="columns"):
        parts[0].columns.pop("number")
        Batch.join(parts)


def test_pick_takes_rows_within_groups(tiny):
    """Their texts, answers and rewards, and the counters of the rollout."""
    _, batch = sample(tiny)
    batch.columns, batch.timeouts = columns(batch), 7
    picked = batch.pick(torch.tensor([[3, 0], [1, 1], [2, 3], [0, 1], [0, 2], [3, 2]]))
    rows = [3, 0, 5, 5, 10, 11, 12, 13, 16, 18, 23, 22]
    assert picked.group == 2 and picked.columns["number"].tolist() == rows and picked.timeouts == 7
    assert picked.texts == [batch.texts[i] for i in rows] and picked.answers == [batch.answers[i] for i in rows]
    assert torch.equal(picked.reward, batch.reward[rows]) and torch.equal(picked.prompt_id, batch.prompt_id[rows])
    assert Batch.join([picked, picked]).timeouts == 14 and batch.groups(torch.tensor([1])).timeouts == 7


def test_a_mask_with_a_hole_at_its_start_is_cut_right(tiny):
    """Completions are measured by attention: log-probs through the cut are those of one direct pass."""
    _, policy, _ = tiny
    a, batch = sample(tiny, micro_batch_tokens=60)
    whole, _ = read(policy, batch, a)
    batch.mask = batch.mask & (torch.arange(batch.mask.shape[1]) >= torch.arange(24)[:, None] % 4)
    logp, _ = read(policy, batch, a)
    direct, _ = policy(batch.ids, batch.attention_mask, batch.mask, a.temperature)
    assert batch.mask.any(1).all() and not logp[~batch.mask].any()
    torch.testing.assert_close(logp, direct.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(logp, whole * batch.mask, rtol=0, atol=2e-5)


def test_gather_pads_every_shape(monkeypatch):
    """The second dimension, whatever comes behind it."""
    monkeypatch.setattr(gpu, "world", lambda: 2)
    monkeypatch.setattr(gpu, "maximum", lambda n: n + 2)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, x: [p.copy_(x) for p in parts])
    for shape in ((3,), (3, 4), (3, 4, 2)):
        x = torch.rand(shape)
        out = gpu.gather(x)
        assert out.shape == (6, *([6] * (len(shape) > 1)), *shape[2:])
        assert torch.equal(out[:3, :4] if len(shape) > 1 else out[:3], x) and (len(shape) < 2 or not out[:, 4:].any())


# ---------------------------------------------------------------- the scoring pass


def test_read_gives_rows_distributions_and_hidden_states(tiny):
    _, policy, _ = tiny
    a, batch = sample(tiny, micro_batch_tokens=70)
    whole = policy(batch.ids, batch.attention_mask, batch.mask, a.temperature, layers=[0, 2])
    logp, entropy, first, last = read(policy, batch, a, layers=[0, 2])
    for found, expected in zip((logp, entropy, first, last), whole):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=2e-5)
        assert not found.requires_grad
    rows = torch.tensor([20, 3, 11])
    torch.testing.assert_close(read(policy, batch, a, rows=rows)[0], logp[rows], rtol=0, atol=2e-5)

    def surprise(targets, logits):
        law = logits.log_softmax(-1)
        return law.gather(-1, targets[:, None]).squeeze(-1) - law.amax(-1), law.exp().square().sum(-1)

    gap, power = read(policy, batch, a, read=surprise)
    assert (gap <= 0).all() and not gap[~batch.mask].any() and (power[batch.mask] > 0).all()
    warm = read(policy, batch, a, temperature=2.0)[1]
    assert (warm - entropy)[batch.mask].mean() > 0.1


def test_an_empty_choice_of_rows_is_read(tiny):
    _, policy, _ = tiny
    a, batch = sample(tiny)
    assert read(policy, batch, a, rows=torch.zeros(0, dtype=torch.int64)) == ()


# ---------------------------------------------------------------- minibatches of all ranks


def on_two_ranks(monkeypatch, whole, work):
    """work(batch) on both halves of a batch, as two ranks would see it -> [results]; their collectives give the whole."""
    B, out = len(whole.ids), []
    for rank in range(2):
        half = whole.take(torch.arange(rank * B // 2, (rank + 1) * B // 2))

        def gather(x, rank=rank):
            for source in (vars(whole), whole.columns):
                for value in source.values():
                    if isinstance(value, torch.Tensor) and value.shape[:1] == (B,) and value.dim() == x.dim():
                        mine = value[rank * B // 2 : (rank + 1) * B // 2]
                        mine = mine[:, : x.shape[1]] if x.dim() > 1 else mine
                        if mine.shape == x.shape and mine.dtype == x.dtype and torch.equal(mine, x):
                            return value
            raise AssertionError("gathered what is in no field of the whole batch")

        monkeypatch.setattr(gpu, "world", lambda: 2)
        monkeypatch.setattr(gpu, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(gpu, "gather", gather)
        out.append(work(half))
        monkeypatch.undo()
    return out


def weights_by(mask, args, number):
    """As a script's would: every row by a column, of the whole part."""
    return mask * number[:, None] / (mask * number[:, None]).sum()


def prepared(tiny):
    a, batch = sample(tiny, n=6)
    batch.old_logp, batch.columns = batch.sampler_logp, dict(number=1 + torch.arange(24).float())
    batch.adv = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    batch.columns["keep"] = torch.arange(24) % 3 > 0
    return a, batch


def test_weights_columns_and_advantages_of_the_whole_part(tiny, monkeypatch):
    """What two ranks get is what one gets: gathered columns for token_weights, rows that are kept, advantages that are
    normalised over the part of all ranks, a second set of weights over another mask; equally many updates on both."""
    a, batch = prepared(tiny)

    def standardise(adv, trained):
        values = adv[trained]
        return (adv - values.mean()) / values.std()

    def work(half):
        out = []
        more = dict(columns=["number"], keep=half.columns["keep"], normalise=standardise, value_weights=half.mask)
        for rows, weights in minibatches(half, a, 0, weights_by, **more):
            out.append((rows, weights[rows], half.adv[rows], half.columns["value_weights"][rows]))
        return out

    one = work(batch.take(torch.arange(24)))
    two = on_two_ranks(monkeypatch, batch, work)
    assert len(one) == len(two[0]) == len(two[1]) == a.minibatches * a.epochs
    for (rows, *found), (mine, *first), (theirs, *second) in zip(one, *two):
        together = torch.cat([mine, theirs + 12])
        order, expected = rows.argsort(), together.argsort()
        assert torch.equal(rows[order], together[expected]) and (rows % 3 > 0).all()
        for whole, a_half, b_half in zip(found, first, second):
            T = whole.shape[1]
            halves = torch.cat([torch.nn.functional.pad(x, (0, T - x.shape[1])) for x in (a_half, b_half)])
            where = batch.mask[rows[order]][:, :T]
            torch.testing.assert_close(halves[expected][where], whole[order][where])
        weights, adv, _ = found
        where = batch.mask[rows]
        assert weights.sum().item() == pytest.approx(1.0)
        assert adv[where].mean().abs() < 1e-6 and adv[where].std().item() == pytest.approx(1.0)


def test_nothing_kept_is_no_update(tiny):
    a, batch = prepared(tiny)
    assert list(minibatches(batch, a, 0, grpo.token_weights, keep=torch.zeros(24, dtype=torch.bool))) == []


def test_the_loss_is_on_trained_tokens_alone(tiny):
    """Weights are those of `trained`: where the first half of every completion is given, it has none."""
    a, batch = sample(tiny)
    batch.trained = batch.mask & (torch.arange(batch.mask.shape[1]) >= batch.mask.sum(1, keepdim=True) // 2)
    for rows, weights in minibatches(batch, a, 0, grpo.token_weights):
        assert not weights[~batch.trained].any() and weights.sum().item() == pytest.approx(1.0)
        expected = grpo.token_weights(batch.trained[rows], a)
        torch.testing.assert_close(weights[rows], expected)


# ---------------------------------------------------------------- the loop


def run(tmp_path, name, script=grpo, **changes):
    small = dict(steps=2, prompts_per_step=8, group_size=4, eval_prompts=8, checkpoint_every=0, run_dir=str(tmp_path / name))
    script.train(script.Args(**small | changes))
    return [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]


@pytest.mark.parametrize("script", [grpo, ppo])
def test_truncated_importance_sampling(tmp_path, monkeypatch, script):
    """A sampler that reports log-probs off by ln 1.5: every token weighs 1.5 times as much, or the cap; 0 turns it off. What a
    critic learns is not corrected."""
    small = dict(steps=1, minibatches=1) | (dict(prompts_per_step=32, group_size=1) if script is ppo else {})
    plain = run(tmp_path, "plain", script, **small)[0]
    monkeypatch.setattr(engines.HF, "name", "vllm")
    collect = rollout.collect

    def shifted(*a):
        batch = collect(*a)
        batch.sampler_logp = batch.sampler_logp - torch.tensor(1.5).log()
        return batch

    monkeypatch.setattr(rollout, "collect", shifted)
    for cap, factor in ((2.0, 1.5), (1.2, 1.2), (0.0, 1.0)):
        found = run(tmp_path, f"cap{cap}", script, tis_cap=cap, **small)[0]
        assert found["grad_norm"] == pytest.approx(factor * plain["grad_norm"], rel=1e-4)
        if script is ppo:
            assert found["value_grad_norm"] == pytest.approx(plain["value_grad_norm"], rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_weight_of_a_completion_is_the_product_over_its_trained_tokens(level):
    """By hand: ratios 2, 1/2, 4 and, not trained, 8; cap 3."""
    batch = collate([([5], [7, 8, 9, 10]), ([5], [7])])
    batch.engine, batch.old_logp = "vllm", torch.tensor([[2.0, 0.5, 4.0, 8.0], [0.25, 9.0, 9.0, 9.0]]).log()
    batch.sampler_logp = torch.zeros(2, 4)
    batch.trained = batch.mask & torch.tensor([[True, True, True, False]] * 2)
    found = _engine_ratio(batch, args(tis_cap=3.0, tis_level=level)) * batch.trained
    expected = [[2, 0.5, 3, 0], [0.25, 0, 0, 0]] if level == "token" else [[3, 3, 3, 0], [0.25, 0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype))
    assert _engine_ratio(batch, args(tis_cap=0.0)) is None
    batch.engine = "hf"
    assert _engine_ratio(batch, args()) is None


def test_kl_penalty_holds_the_policy_back(tmp_path):
    """A heavy penalty keeps the distance to the starting model small; a light one lets the same rate run off."""
    runs = [run(tmp_path, f"beta{b}", lr=3e-4, steps=8, beta=b) for b in (1e-6, 2.0)]
    light, heavy = (sum(row["ref_kl"] for row in rows) / len(rows) for rows in runs)
    assert 0 < heavy < light / 3 and light > 0.05


def test_first_minibatch_is_on_policy(tmp_path):
    rows = run(tmp_path, "one", steps=1, minibatches=1)
    assert rows[0]["ratio_max"] == pytest.approx(1.0, abs=1e-4) and rows[0]["clip_fraction"] == 0
    rows = run(tmp_path, "eight", steps=1, minibatches=8, lr=1e-3)
    assert rows[0]["ratio_max"] > 1.05


def test_lora_trains_and_syncs_merged_weights(tmp_path):
    rows = run(tmp_path, "lora", lora_rank=4, lr=1e-2, steps=2)
    assert rows[1]["sampler_gap_max"] < 1e-4 and rows[1]["approx_kl"] > 0
    from safetensors.torch import load_file

    folder = tmp_path / "lora" / "checkpoints" / "step-000002"
    start = load_file(tiny_models.warm_start(tasks.world("route")) + "/model.safetensors")
    merged = load_file(folder / "model.safetensors")
    assert merged.keys() == start.keys()
    moved = [k for k in merged if not torch.equal(merged[k], start[k])]
    assert moved and all("proj.weight" in k for k in moved)


def test_what_waits_is_resumed_on_the_device(tiny, tmp_path, monkeypatch):
    """A checkpoint is read on the CPU; a batch of its queue goes where the model is, columns and all."""
    _, batch = sample(tiny)
    batch.columns["x"] = torch.ones_like(batch.mask)
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    run = SimpleNamespace(dir=tmp_path, extra={}, schedules=[], main=True, state=dict(step=1), queue=[batch])
    checkpoint.save(run, module, optimizer)
    monkeypatch.setattr(gpu, "device", lambda: torch.device("meta"))
    checkpoint.restore(run, checkpoint.find(run), module, optimizer)
    (moved,) = run.queue
    assert {x.device.type for x in (moved.ids, moved.trained, moved.reward, moved.columns["x"])} == {"meta"}
    assert moved.group == batch.group and moved.texts == batch.texts and batch.ids.device.type == "cpu"
