"""ATP-Latent's worked numbers, what a latent is and that the training pass feeds it again, its curriculum, its world, runs."""

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from algos import atp_latent
from common import UserError, models, settings
from common.batch import Meter, read
from tests.batches import heard
from tests.helpers import ROOT, checkpoints, contents, lines, run

SCRIPT = ROOT / "algos" / "atp_latent.py"
SMALL = "--prompts-per-step 8 --group-size 4 --minibatches 2 --eval-prompts 8 --sft-steps 12 --demos-per-step 8".split()
MU, LOGVAR, Z, STOP = ([0.2, -0.4], [-1.0, 0.5], [0.5, -0.1], [1.2, -0.3])


def args(**changes):
    values = dict(model="tiny", task="chains", dtype="float32", temperature=0.8, micro_batch_tokens=256, max_new_tokens=8)
    values |= dict(group_size=8, eval_prompts=8, gradient_checkpointing=False, most_steps=3, decoder_layers=1, sft_lr=1e-3)
    values |= dict(kl_weight=0.1, marks=("<start>", "<end>"), optimizer="adamw", lr=1e-3, sft_steps=2, demos_per_step=6)
    return atp_latent.Args(**values | changes)


def worked(**changes):
    values = dict(mu=MU, logvar=LOGVAR, z=Z, stop=STOP) | changes
    return [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in values.values()]


@pytest.fixture(scope="module", params=["float64"])
def parts(request):
    """A model that has learnt nothing, its heads and decoder."""
    a = args(dtype=request.param)
    tokenizer = models.load_tokenizer(a, atp_latent.chains, fresh=True)
    task, marks = atp_latent.questions(a, tokenizer)
    holder = SimpleNamespace(extra={}, stop=None, main=False)
    policy = models.load(a, torch.device("cpu"), warm=atp_latent.chains, fresh=True)
    policy, heads, decoder = atp_latent.make_parts(policy, a, holder)
    with torch.no_grad():  # some go on, some do not
        heads.stop[2].bias.copy_(torch.tensor([1.0, 0.0]))
    return SimpleNamespace(a=a, tokenizer=tokenizer, task=task, marks=marks, all=(policy, heads, decoder), run=holder)


def rollouts(p, n=16, **changes):
    """-> the batch of a rollout, and the log-probs that the engine gave, in its own precision."""
    a, (policy, heads, decoder) = replace(p.a, **changes), p.all
    engine = atp_latent.make_engine(policy, heads, p.tokenizer, p.marks, a)
    scorer = lambda texts, golds: (list(texts), [float(t == g) for t, g in zip(texts, golds)])  # noqa: E731
    batch, said = heard(engine, scorer, p, n, a)
    atp_latent.scored(batch, decoder, p.tokenizer, a)
    logp = torch.zeros(batch.mask.shape, dtype=torch.float64)
    for row, (_, found, _) in zip(logp, said):
        row[: len(found)] = torch.tensor(found, dtype=torch.float64)
    return a, batch, logp


def likelihood(p, batch, a):
    logp, _, h = read(p.all[0], batch, a, how=atp_latent.replay)
    return atp_latent.with_latents(p.all[1], logp, h, batch).detach()


# ---------------------------------------------------------------- the objective


def test_worked_latent():
    mu, logvar, z, stop = worked()
    going = torch.tensor([False])
    logp = atp_latent.latent_logp(mu, logvar, z, stop, going)
    logp.sum().backward()
    assert logp.item() == pytest.approx(-1.938907, abs=1e-6)
    assert mu.grad[0].tolist() == pytest.approx([0.815485, 0.181959], abs=1e-6)
    assert logvar.grad[0].tolist() == pytest.approx([-0.377677, -0.472706], abs=1e-6)
    assert stop.grad[0].tolist() == pytest.approx([0.182426, -0.182426], abs=1e-6)
    assert logp.item() + 0.201413 == pytest.approx(-0.541261 - 1.196232, abs=2e-6)
    mu, logvar, z, stop = worked(z=[3.0, -9.0])  # a dropped latent's density counts for nothing
    logp = atp_latent.latent_logp(mu, logvar, z, stop, ~going)
    logp.sum().backward()
    assert logp.item() == pytest.approx(-1.701413, abs=1e-6)
    assert not mu.grad.any() and not logvar.grad.any() and stop.grad[0, 1] > 0


def test_worked_kl():
    mu, logvar, _, _ = worked()
    found = atp_latent.kl_to_prior(mu, logvar)
    assert found[0].tolist() == pytest.approx([0.203940, 0.154361], abs=1e-6) and found.mean().item() == pytest.approx(0.17915)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(found, expected)
    assert not atp_latent.kl_to_prior(torch.zeros(3), torch.zeros(3)).any()


@pytest.mark.parametrize("steps, answer, strict, loose", [
    (["<<2+2=4>>", "<<4*3=12>>", "<<12-5=7>>"], "7", 1, 1),
    (["<<2+2=4>>", "<<5*3=15>>"], "15", 0.5, 0.5),
    (["3+4=7", "7+9=6", "6+2=8"], "9", 2 / 3, 2 / 3),
    (["3+4=7", "2+2=7"], "7", 1, 1),  # in a later step's text, wherever
    (["7+1=8", "4+7=1"], "1", 0.5, 0.5),  # not in an earlier one
    (["garbage", "="], "5", 0, 1),  # nothing is part of everything
    ([], "5", 1, 1),
    (["3+4=7"], "", 0, 0),
])  # fmt: skip
def test_coherence(steps, answer, strict, loose):
    assert atp_latent.coherence(steps, answer, args()) == pytest.approx(strict)
    assert atp_latent.coherence(steps, answer, args(strict_coherence=False)) == pytest.approx(loose)


def test_worked_rewards_and_advantages():
    accuracy, form, coherent = (torch.tensor(x).double() for x in ([1.0, 0, 1, 0], [1.0, 1, 1, 0], [2 / 3, 1, 1, 1]))
    R = atp_latent.total_reward(accuracy, form, coherent, args())
    assert R.tolist() == pytest.approx([1.566667, 0.5, 1.6, 0], abs=1e-6)
    adv = atp_latent.advantages(R[None], args())
    assert adv[0].tolist() == pytest.approx([0.816050, -0.523109, 0.857898, -1.150839], abs=2e-6)  # 1e-6 in place of 1e-8
    alone = atp_latent.total_reward(accuracy, form, coherent, args(accuracy_weight=0, coherence_weight=1.0))
    assert alone.tolist() == pytest.approx([0.5 + 2 / 3, 1.5, 1.5, 1.0])  # an answer is not looked at
    assert atp_latent.total_reward(accuracy, form, coherent, args(coherence_weight=0.0)).tolist() == [1.5, 0.5, 1.5, 0]


def test_a_log_ratio_at_its_cap_teaches_nothing():
    old, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    for adv in (1.0, -1.0):
        logp = torch.tensor([[2.9, 3.1, 500.0], [-2.9, -3.1, -500.0]], requires_grad=True)
        objective, stats = atp_latent.surrogate(logp, old, torch.full((2, 3), adv), mask, args(eps=100.0))
        objective.sum().backward()
        assert (logp.grad != 0).tolist() == [[True, False, False]] * 2
        assert stats["capped"].tolist() == [[0, 1, 1]] * 2 and objective.abs().max().item() == pytest.approx(20.0855, rel=1e-5)
    _, stats = atp_latent.surrogate(logp, old, torch.ones(2, 3), mask, args(log_ratio_cap=600.0))
    assert not stats["capped"].any()


def test_latents_and_tokens_are_means_of_their_own():
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    latent = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    w = 3 * atp_latent.token_weights(mask, args(), latent)
    expected = [[0.5, 0.5, 0.5, 0, 0.5], [1, 0, 1 / 3, 1 / 3, 1 / 3], [0] * 5, [0.5, 0.5, 0, 0, 0]]
    torch.testing.assert_close(w, torch.tensor(expected))


# ---------------------------------------------------------------- latents


def test_a_latent_is_drawn_and_says_itself_whether_it_is_one_too_many(parts):
    _, heads, _ = parts.all
    h = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(heads.mu.weight)
    noise = torch.rand(64, 97, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[0, 1] = 0.0
    with torch.no_grad():
        mu, logvar = heads(h)
        fed, shown, record, logp, stops = atp_latent.think(h, None, noise, heads, parts.marks)
        still = atp_latent.think(h, None, None, heads, parts.marks)
        e = torch.special.ndtri(noise[:, 1:].clamp(min=1e-12)).to(mu)
        torch.testing.assert_close(fed, mu + (0.5 * logvar).exp() * e)
        assert torch.equal(fed, record) and fed.isfinite().all() and torch.equal(still[0], mu)
        p = heads.stop(record).softmax(-1)[:, 1]
    assert torch.equal(stops, noise[:, 0] < p) and stops.any() and not stops.all()
    assert torch.equal(shown == parts.marks[1], stops) and torch.equal(shown == parts.marks[0], ~stops)
    torch.testing.assert_close(logp[stops], p[stops].log())
    density = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(record).sum(-1)
    torch.testing.assert_close(logp[~stops], (density + (1 - p).log())[~stops])
    assert torch.equal(still[4], heads.stop(mu)[:, 1] > heads.stop(mu)[:, 0])


def test_log_variance_is_bounded_or_fixed():
    heads = atp_latent.Heads(8, args())
    with torch.no_grad():
        heads.logvar.weight.mul_(1e4)
        low, high = heads(torch.randn(50, 8))[1].aminmax()
        assert (low, high) == (-8, 2)
    fixed = atp_latent.Heads(8, args(fixed_sigma=0.02))(torch.randn(5, 8))[1]
    torch.testing.assert_close((0.5 * fixed).exp(), torch.full((5, 8), 0.02))
    assert all(torch.equal(a, b) for a, b in zip(*(atp_latent.Heads(8, args()).parameters() for _ in range(2))))


@pytest.mark.parametrize("parts", ["float32", "float64"], indirect=True)
def test_the_training_pass_sees_what_was_fed(parts):
    a, batch, said = rollouts(parts)
    assert len(batch.ids) == 128
    logp = likelihood(parts, batch, a)
    latent, drawn, given = batch.columns["latent"], batch.columns["drawn"], batch.columns["given"]
    gap = (logp - said).abs() * batch.trained
    wide = a.dtype == "float64"
    assert gap[drawn].max() < (1e-9 if wide else 1e-4) and gap.max() < (5e-6 if wide else 1e-4)
    counts, ids = latent.sum(1), batch.ids[:, -batch.mask.shape[1] :]
    assert set(counts.tolist()) == {0, 1, 2, 3}
    for i, n in enumerate(counts.tolist()):  # latents, the end mark, then tokens
        assert latent[i].tolist() == [True] * n + [False] * (latent.shape[1] - n)
        assert ids[i, :n].eq(parts.marks[0]).all() and ids[i, n] == parts.marks[1]
        if n < 3:
            assert drawn[i].sum() == n + 1 and batch.trained[i, n] and given[i, n, 2:].any()
        else:  # the limit ended them: nothing was drawn there, and nothing is trained
            assert drawn[i].sum() == 3 and not batch.trained[i, 3] and not given[i, 3].bool()[2:].any() and said[i, 3] == 0
    assert not drawn[counts == 3][:, 3:].any()


def test_a_stored_number_changes_what_comes_after_it(parts):
    a, batch, _ = rollouts(parts, n=4)
    before = likelihood(parts, batch, a)
    batch.columns["given"] = batch.columns["given"].clone()
    some = batch.columns["latent"][:, 1]
    batch.columns["given"][some, 1, 5] += 0.5
    moved = (likelihood(parts, batch, a) - before).abs() * batch.mask
    assert moved[:, 0].max() < 1e-5 and moved[some][:, 1].min() > 1e-3 and not moved[~some].gt(1e-5).any()
    later, stops = moved[some], (batch.columns["drawn"] & ~batch.columns["latent"])[some]
    assert stops[:, 2].any() and (later[:, 2] > 1e-3).eq(~stops[:, 2]).all()  # a stop is decided from its own latent alone
    assert (later[:, 3:].amax(1) > 1e-3).all()


def test_a_prompt_that_rows_share_is_read_once_and_changes_nothing(parts):
    a, batch, _ = rollouts(parts, n=4)
    together, alone = likelihood(parts, batch, a), torch.zeros(batch.mask.shape).to(torch.float64)
    for i in range(len(batch.ids)):
        one = batch.take(torch.tensor([i]))
        alone[i, : one.mask.shape[1]] = likelihood(parts, one, a)[0]
    assert ((together - alone).abs() * batch.mask).max() < (1e-9 if a.dtype == "float64" else 1e-4)


def test_gradient_reaches_policy_and_heads_and_no_latent(parts):
    a, batch, _ = rollouts(parts, n=2)
    policy, heads, _ = parts.all
    logp, _, h = policy(batch.ids, batch.attention_mask, batch.mask, 1.0, **atp_latent.replay(batch, a))
    logp = atp_latent.with_latents(heads, logp, h, batch)
    logp[batch.columns["latent"]].sum().backward()
    grads = [x.grad for module in (policy, heads) for x in module.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads)
    policy.zero_grad(), heads.zero_grad()
    batch.mask = torch.zeros_like(batch.mask)  # a row that only keeps ranks in step
    logp, _, h = policy(batch.ids, batch.attention_mask, batch.mask, 1.0, **atp_latent.replay(batch, a))
    atp_latent.with_latents(heads, logp, h, batch).sum().backward()
    atp_latent.summed(heads)
    assert not any(x.grad.any() for x in heads.parameters())
    policy.zero_grad(), heads.zero_grad()


def test_rewards_of_a_rollout(parts):
    """Format is an answer that ends; coherence is that of the steps as the decoder reads them."""
    a, batch, _ = rollouts(parts, n=2)
    z = batch.columns["given"][:, :, 2:]
    for i in range(len(batch.ids)):
        steps = atp_latent.decode(parts.all[2], z[i][batch.columns["latent"][i]], parts.tokenizer)
        fit = atp_latent.coherence(steps, batch.texts[i], a)
        right = float(batch.texts[i] == batch.gold[i] and not batch.truncated[i])
        form = float(bool(batch.texts[i].strip()) and not batch.truncated[i])
        assert batch.reward[i].item() == pytest.approx(right + 0.5 * form + 0.1 * fit * right) and batch.accuracy[i] == right
    assert atp_latent.decode(parts.all[2], z[:0, 0], parts.tokenizer) == []


# ---------------------------------------------------------------- the curriculum


def test_a_solution_is_cut_into_steps():
    text = "1+1=2\n2+1=3\n3+1=4\n4+1=5\n5"
    assert atp_latent.cut(text, args()) == (["1+1=2", "2+1=3", "3+1=4\n4+1=5"], "5")
    assert atp_latent.cut(text, args(most_steps=9)) == (text.split("\n")[:-1], "5")
    assert atp_latent.cut(text, args(most_steps=1)) == (["1+1=2\n2+1=3\n3+1=4\n4+1=5"], "5")
    assert atp_latent.cut("5", args()) == ([], "5")


def slow_losses(p, row, noise):
    """The losses of one demonstration, without padding, mask or positions: what is not seen is not there."""
    (policy, heads, decoder), (prompt, (steps, answer)), k = p.all, row, len(noise)
    lm, ids, eos = policy.lm, lambda text: p.tokenizer(text)["input_ids"], p.tokenizer.eos_token_id
    embed, entropy = lm.get_input_embeddings(), torch.nn.functional.cross_entropy
    x, kl, words, stop = embed(torch.tensor(prompt)), 0.0, 0.0, 0.0
    for i in range(min(k, len(steps) + 1)):
        mu, logvar = heads(lm.model(inputs_embeds=x[None]).last_hidden_state[0, -1])
        z = mu + (0.5 * logvar).exp() * noise[i]
        kl = kl + atp_latent.kl_to_prior(mu, logvar).mean()
        stop = stop + entropy(heads.stop(z)[None], torch.tensor([int(i >= len(steps))]), reduction="sum")
        if i < len(steps):
            x = torch.cat([x, z[None]])
            said = torch.tensor(ids(steps[i]) + [eos])
            read = torch.cat([z[None], decoder.get_input_embeddings()(said[:-1])])
            words = words + entropy(decoder(inputs_embeds=read[None]).logits[0], said, reduction="sum")
    said = torch.tensor([p.marks[1], *ids("\n".join([*steps[k:], answer])), eos])
    logits = lm(inputs_embeds=torch.cat([x, embed(said)])[None]).logits[0, -len(said) : -1]
    return entropy(logits, said[1:], reduction="sum"), kl, words, stop


@pytest.mark.parametrize("k", [1, 2, 3])
def test_losses_of_a_batch_are_those_of_its_rows(parts, k):
    """Value and gradient: questions and steps of other lengths, latents beyond a question's steps, which nothing sees."""
    rng, two = random.Random(0), [e for e in parts.task.train if len(e.prompt) == 4][:2]
    some = [*two, *[e for e in parts.task.train if len(e.prompt) == 5][:2]]
    rows = [(e.ids, atp_latent.cut(parts.task.demonstrate(rng, e, 1.0), parts.a)) for e in some]
    noise = torch.randn(4, k, 96, generator=torch.Generator().manual_seed(0)).double()
    found, grads = [], []
    for slow in (False, True):
        if slow:
            losses = [sum(x) for x in zip(*(slow_losses(parts, row, e) for row, e in zip(rows, noise)))]
        else:
            losses, counts = zip(*atp_latent.sft_losses(parts.all, rows, noise, parts.marks, parts.tokenizer))
            assert counts == (sum(6 * max(0, len(s) - k) + 2 for _, (s, _) in rows), 4 * k, 4 * k, 4 * k)
        sum(losses).backward()
        found.append([x.item() for x in losses])
        grads.append([x.grad.clone() for module in parts.all for x in module.parameters()])
        for module in parts.all:
            module.zero_grad()
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("parts", ["float32"], indirect=True)
def test_the_curriculum_replaces_one_step_more_at_a_time(parts, monkeypatch):
    """What is trained, with what: k over the updates, hurried demonstrations, weights; every flag of it changes the outcome."""
    seen, real = [], atp_latent.sft_losses

    def losses(parts, rows, noise, marks, tokenizer):
        seen.append((noise.shape, [len(steps) for _, (steps, _) in rows]))
        return real(parts, rows, noise, marks, tokenizer)

    monkeypatch.setattr(atp_latent, "sft_losses", losses)

    def outcome(**changes):
        mine = copy.deepcopy(parts.all)
        a = replace(parts.a, sft_steps=5, demos_per_step=3, **changes)
        atp_latent.sft_stage(mine, parts.task, parts.marks, parts.tokenizer, a, parts.run)
        return [x.detach() for module in mine for x in module.parameters()]

    first = outcome()
    assert [shape for shape, _ in seen] == [(3, k, 96) for k in (1, 2, 3, 3, 3)]
    assert {n for _, counts in seen for n in counts} == {1, 2, 3}
    assert all(torch.equal(a, b) for a, b in zip(first, outcome()))
    for old, new in zip([x for module in parts.all for x in module.parameters()], first):  # all three are trained
        assert not torch.equal(old, new)
    for changes in (dict(kl_weight=0.0), dict(sft_lr=2e-3)):
        assert any(not torch.equal(a, b) for a, b in zip(first, outcome(**changes)))


def test_the_decoder_is_a_copy_of_the_lowest_layers(parts):
    policy, _, decoder = parts.all
    assert len(decoder.model.layers) == 1 and len(policy.lm.model.layers) == 2
    for a, b in zip(decoder.model.layers[0].parameters(), policy.lm.model.layers[0].parameters()):
        assert torch.equal(a, b) and a is not b
    whole = atp_latent.make_parts(policy, replace(parts.a, decoder_layers=0), SimpleNamespace(extra={}))[2]
    assert len(whole.model.layers) == 2 and policy.lm.config.num_hidden_layers == 2


# ---------------------------------------------------------------- the world, and runs


def test_chains():
    task, rng = atp_latent.chains("chains"), random.Random(0)
    assert len(task.train) == 1600 and len(task.test) == 400
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
    hurried, orders = 0, set()
    for e in task.train[:400]:
        for careful in (1.0, 0.0):
            *steps, answer = task.demonstrate(rng, e, careful).split("\n")
            digits = [int(c) for c in e.prompt[:-1]]
            total, full = digits[0], len(digits) - 1
            for x, step in zip(digits[1:], steps):
                a, b, c = int(step[0]), int(step[2]), int(step[4])
                assert sorted((a, b)) == sorted((total, x)) and c == (a + b) % 10 and step == f"{a}+{b}={c}"
                orders.add(a == total)
                total = c
            assert answer == str(total) and (careful < 1 or len(steps) == full and answer == e.answer)
            assert atp_latent.coherence([*steps], answer, args()) == 1
            hurried += len(steps) < full
            assert len(steps) >= full - 1
    assert orders == {True, False} and 120 < hurried < 200
    assert atp_latent.chains("addition").name.startswith("addition") and atp_latent.chains("x.jsonl") is None


def test_a_prompt_ends_with_the_first_mark_and_other_marks_are_refused(parts):
    start, end = parts.marks
    for e in parts.task.train + parts.task.test:
        assert e.ids[-1] == start != end and parts.tokenizer.decode(e.ids[:-1]) == e.prompt
    with pytest.raises(UserError, match="--marks <start> <no>"):
        atp_latent.questions(replace(parts.a, marks=("<start>", "<no>")), parts.tokenizer)


def test_no_more_latents_than_asked_for(parts):
    a, batch, _ = rollouts(parts, n=2, most_steps=1)
    assert batch.columns["latent"].sum(1).max() == 1
    found = dict(greedy_accuracy=0.5, prompts=8)
    engine = atp_latent.make_engine(*parts.all[:2], parts.tokenizer, parts.marks, a)
    more = atp_latent.evaluated(found, engine, parts.all[2], parts.task, parts.tokenizer, a)
    assert list(more)[0] == "greedy_accuracy" and 0 <= more["latents"] <= 1 and 0 <= more["coherence"] <= 1
    assert [len(z) == len(steps) <= 1 for z, steps, _ in atp_latent.heard(engine, parts.all[2], parts.task.test[:5],
                                                                          parts.tokenizer, a)] == [True] * 5  # fmt: skip


def test_latents_stops_and_tokens_are_logged_apart(parts):
    a, batch, _ = rollouts(parts, n=2)
    meter, heads = Meter(), parts.all[1]
    latent, drawn = batch.columns["latent"], batch.columns["drawn"]
    which = latent * 1.0 + (drawn & ~latent) * 2.0
    h = torch.zeros(*batch.mask.shape, 96).to(heads.mu.weight)
    atp_latent.look(meter, dict(which=which), batch, heads, h)
    atp_latent.measure(meter, batch)
    found = meter.result()
    assert (found["which"], found["latent_which"], found["stop_which"]) == (0, 1, 2)
    mu, logvar = heads(h[:1, :1])
    assert found["prior_kl"] == pytest.approx(atp_latent.kl_to_prior(mu, logvar).mean().item(), rel=1e-5)
    assert found["sigma"] == pytest.approx((0.5 * logvar).exp().mean().item(), rel=1e-5)
    assert found["latents"] == latent.sum(1).float().mean() and 0 <= found["coherence"] <= 1


def test_a_short_run(tmp_path):
    done = run(tmp_path, *SMALL, "--steps", 2, "--checkpoint-every", 1, "--run-dir", tmp_path / "a", script=SCRIPT)
    assert done.code == 0, done.err
    rows, states = lines(tmp_path / "a" / "metrics.jsonl"), []
    for row in rows:
        assert row["sampler_gap_max"] < 1e-4 and row["latent_sampler_gap_max"] < 1e-3 and row["heads_grad_norm"] > 0
        assert 0 <= row["latents"] <= 3 and row["prior_kl"] > 0 and row["sigma"] > 0 and 0 <= row["latent_capped"] <= 1
    assert {"latents", "coherence", "avg@4"} < lines(tmp_path / "a" / "evals.jsonl")[0].keys()
    assert done.out.count("(right: ") >= 3 and "curriculum, losses: text " in done.out
    for folder in checkpoints(tmp_path / "a"):
        states.append(contents(folder))
    (heads, moments), (decoder, none) = states[0]["heads"], states[0]["decoder"]
    assert moments and not none
    assert all(torch.equal(x, states[1]["decoder"][0][k]) for k, x in decoder.items())  # frozen
    assert all(not torch.equal(x, states[1]["heads"][0][k]) for k, x in heads.items())


def test_vllm_is_refused():
    with pytest.raises(UserError, match="embeddings fed while decoding"):
        settings.resolve(args(engine="vllm"), atp_latent.chains)
