"""What must hold for the objective of every online script, parametrised over algos/."""

import importlib
import inspect
import typing

import pytest
import torch

from tests import sync

TEXTS = {n: (sync.ALGOS / f"{n}.py").read_text() for n in sync.scripts()}
SCRIPTS = [n for n, text in TEXTS.items() if "def surrogate(" in text and "\nStand-alone: " not in text]


def load(name):
    return importlib.import_module(f"algos.{name}")


def arguments(script, **changes):
    values = dict(group_size=4, max_new_tokens=8, steps=1) | changes
    if "items" in script.Args.__dataclass_fields__:
        values.setdefault("items", 5)  # of a list; what is open in Args is the preset's
    return script.Args(**values)


def batch(B=6, T=5, seed=0, spread=0.3):
    """Random log-probs near each other, ragged lengths T, T-1, ..., advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    old_logp = -torch.rand(B, T, generator=g) * 2 - 0.05
    logp = (old_logp + spread * torch.randn(B, T, generator=g)).clamp(max=-1e-3)
    mask = torch.arange(T) < torch.tensor([max(1, T - i % T) for i in range(B)])[:, None]
    adv = torch.randn(B, 1, generator=g).expand(B, T)
    entropy, score = (torch.rand(B, T, generator=g) * 2 for _ in range(2))
    h = torch.rand(B, T, generator=g) * 2 - 1
    proxy, protected = logp + torch.rand(B, T, generator=g), mask & (adv < 0) & (torch.rand(B, T, generator=g) < 0.5)
    conflict, selected = (torch.rand(B, T, generator=g) * 2 for _ in range(2))
    b = dict(logp=logp, old_logp=old_logp, adv=adv, mask=mask, entropy=entropy, score=score, h=h, completion=mask)
    rank_id = (torch.arange(T) // 2).expand(B, T)  # lines of two tokens
    latent, importance = (torch.arange(T) < 2).expand(B, T), 1 + torch.rand(B, T, generator=g)
    b |= dict(proxy=proxy, protected=protected, conflict=conflict, selected=selected, rank_id=rank_id, latent=latent)
    return b | dict(importance=importance)


def unprotected(b):
    """Without the tokens that lp_reg pulls towards a proxy, by a force that is not the advantage's."""
    return b | dict(protected=torch.zeros_like(b["mask"]))


def surrogate(script, b, args):
    values = b | {"args": args}
    return script.surrogate(**{k: values[k] for k in inspect.signature(script.surrogate).parameters})


def token_weights(script, b, args):
    """With the columns that a script's weights are made of."""
    more = list(inspect.signature(script.token_weights).parameters)[2:]
    return script.token_weights(b["mask"], args, *(b[name] for name in more))


def loss_and_gradient(script, b, args=None):
    """Gradient with respect to logp of the loss that the loop would form of the whole batch."""
    args = args or arguments(script)
    logp = b["logp"].clone().requires_grad_()
    objective, stats = surrogate(script, b | {"logp": logp}, args)
    assert objective.shape == logp.shape and all(s.shape == logp.shape for s in stats.values())
    loss = -(objective * token_weights(script, b, args))[b["mask"]].sum()
    loss.backward()
    return loss.detach(), logp.grad


each = pytest.mark.parametrize("script", [load(n) for n in SCRIPTS], ids=SCRIPTS)


def own_fields(script):
    """Names of the method's own fields of Args: they stand behind the shared ones."""
    names = list(script.Args.__dataclass_fields__)
    return names[names.index("micro_batch_tokens") + 1 :]


def options(script):
    """Every other value of a choice among the method's own fields, one at a time: another way through its surrogate."""
    hints = typing.get_type_hints(script.Args)
    for name in own_fields(script):
        default, hint = script.Args.__dataclass_fields__[name].default, hints[name]
        words = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else (True, False) if hint is bool else ()
        yield from (dict([(name, word)]) for word in words if word != default)


# Every script as it is, and with each of its options.
WAYS = [(name, own) for name in SCRIPTS for own in ({}, *options(load(name)))]
ways = [pytest.param(load(name), own, id="-".join([name, *map(str, own.values())])) for name, own in WAYS]
each_way = pytest.mark.parametrize("script, own", ways)
# Advantages of rewards in groups; those that need values or the mask are tested in their own files.
GROUPED = [n for n in SCRIPTS if not {"values", "mask"} & set(inspect.signature(load(n).advantages).parameters)]
# Whose advantages do not add up to 0 in a group, and why.
ONE_SIDED = {"algos.rng": "learns from the worse half alone"}
# Without which flags the gradient at ratio 1 is the weight times the advantage, and why.
AT_RATIO_1 = {"algos.hapo": dict(dar=False)}  # sure tokens learn less, by h, where they have not moved
each_grouped = pytest.mark.parametrize("script", [load(n) for n in GROUPED], ids=GROUPED)


@each_way
def test_garbage_in_masked_positions_changes_nothing(script, own):
    b, args = batch(), arguments(script, **own)
    loss, grad = loss_and_gradient(script, b, args)
    for garbage in (1e4, -1e4, float("inf"), float("nan")):
        other = dict(b)
        for k in "logp old_logp entropy score h proxy conflict selected".split():
            other[k] = torch.where(b["mask"], b[k], torch.tensor(garbage))
        loss2, grad2 = loss_and_gradient(script, other, args)
        assert torch.equal(loss, loss2), garbage
        assert torch.equal(grad, grad2) and not grad2[~b["mask"]].any(), garbage


@each
def test_padding_and_order_of_rows_change_nothing(script):
    b = batch()
    loss, grad = loss_and_gradient(script, b)
    wide = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in b.items()}
    loss2, grad2 = loss_and_gradient(script, wide)
    torch.testing.assert_close(loss2, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad2[:, :5], grad, rtol=1e-6, atol=1e-7)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss3, grad3 = loss_and_gradient(script, {k: v[order] for k, v in b.items()})
    torch.testing.assert_close(loss3, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad3, grad[order], rtol=1e-6, atol=1e-7)


@each
def test_micro_batches_add_up(script):
    """The weights of the whole minibatch, the surrogate of the parts: the gradient of the whole."""
    b, args = batch(), arguments(script)
    loss, grad = loss_and_gradient(script, b, args)
    weights = token_weights(script, b, args)
    total, parts = 0.0, torch.zeros_like(grad)
    for rows in ([0, 3], [1], [5, 2, 4]):
        t = int(b["mask"][rows].sum(1).max())
        part = {k: v[rows][:, :t] for k, v in b.items()}
        logp = part["logp"].clone().requires_grad_()
        objective, _ = surrogate(script, part | {"logp": logp}, args)
        micro = -(objective * weights[rows][:, :t]).sum()
        micro.backward()
        total, parts[rows, :t] = total + micro.detach(), logp.grad
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts, grad, rtol=1e-5, atol=1e-7)


@each
def test_an_empty_completion_counts_for_nothing(script):
    b = batch(B=4)
    loss, grad = loss_and_gradient(script, b)
    empty = {k: torch.cat([v, torch.full_like(v[:1], False if v.dtype == torch.bool else 0.7)]) for k, v in b.items()}
    loss2, grad2 = loss_and_gradient(script, empty)
    assert torch.isfinite(loss2) and torch.isfinite(grad2).all()
    torch.testing.assert_close(grad2[:4], grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(loss2, loss, rtol=1e-6, atol=1e-8)
    assert not grad2[4].any()


@each
def test_a_batch_of_empty_completions_is_zero(script):
    b = batch(B=3)
    b["mask"] = torch.zeros_like(b["mask"])
    loss, grad = loss_and_gradient(script, b)
    assert loss == 0 and not grad.any() and not token_weights(script, b, arguments(script)).any()


@each
def test_zero_advantage_gives_zero_gradient(script):
    b = unprotected(batch())
    b["adv"] = torch.zeros_like(b["adv"])
    loss, grad = loss_and_gradient(script, b)
    assert torch.isfinite(loss) and not grad.any()


@each_way
def test_the_objective_is_proportional_to_the_advantage(script, own):
    """And where a token is clipped, what it is clipped to, and all that is logged depend on the advantage's sign alone."""
    b, args = unprotected(batch(B=40, spread=1.5)), arguments(script, **own)
    loss, grad = loss_and_gradient(script, b, args)
    _, stats = surrogate(script, b, args)
    for factor in (0.125, 8.0):  # powers of two: the same bits
        other = b | {"adv": factor * b["adv"]}
        loss2, grad2 = loss_and_gradient(script, other, args)
        assert torch.equal(loss2, factor * loss) and torch.equal(grad2, factor * grad)
        _, stats2 = surrogate(script, other, args)
        assert all(torch.equal(stats2[k][b["mask"]], stats[k][b["mask"]]) for k in stats)


def is_a_product(script, step=0.01):
    """Whether log-ratios add up over a completion: where each of five tokens gained a step, the objective gained five."""
    one, row = torch.ones(1, 5), torch.full((1, 5), -1.0)
    b = unprotected(dict(logp=row + step, old_logp=row, adv=one, mask=one.bool(), entropy=one, h=0 * one, proxy=row))
    b["rank_id"] = torch.zeros(1, 5).long()
    objective, _ = surrogate(script, b, arguments(script))
    return objective[0, 4].log().item() == pytest.approx(5 * step, rel=1e-3)


@each
def test_on_policy_the_gradient_is_the_policy_gradient(script):
    """At ratio 1 every method pushes each token by its weight times its advantage; those whose ratio is the product over a
    completion push its tokens by all their weights together."""
    b, args = unprotected(batch()), arguments(script, **AT_RATIO_1.get(script.__name__, {}))
    b["logp"] = b["old_logp"].clone()
    _, grad = loss_and_gradient(script, b, args)
    weights = token_weights(script, b, args)
    if is_a_product(script):
        weights = b["mask"] * weights.sum(1, keepdim=True)
    torch.testing.assert_close(grad, -weights * b["adv"] * b["mask"], rtol=1e-5, atol=1e-7)
    _, stats = surrogate(script, b, arguments(script))
    assert not any(stats[k][b["mask"]].any() for k in stats if k.startswith("clip_fraction"))


@each
def test_one_valid_token(script):
    b = batch(B=2, T=4)
    b["mask"] = torch.tensor([[True, False, False, False]] * 2)
    loss, grad = loss_and_gradient(script, b)
    assert torch.isfinite(loss) and torch.isfinite(grad).all() and grad[:, 0].any() and not grad[:, 1:].any()


@each
def test_far_off_policy_stays_finite(script):
    b = batch()
    for shift in (200.0, -200.0):  # whose exponential no float32 holds
        b["logp"] = b["old_logp"] + shift
        loss, grad = loss_and_gradient(script, b)
        assert torch.isfinite(loss) and torch.isfinite(grad).all()
        if hasattr(script, "kl_penalty"):
            assert script.kl_penalty(b["logp"], b["old_logp"], b["mask"]).isfinite().all()


@each_grouped
def test_equal_rewards_give_zero_advantage(script):
    for value in (0.0, 1.0, 0.1 + 0.2):
        adv = advantages(script, torch.full((3, 4), value))
        assert torch.equal(adv, torch.zeros(3, 4))
    nearly = torch.full((2, 4), 0.3)
    nearly[:, 1] = 0.1 + 0.2  # differs in the last bit only
    assert advantages(script, nearly).abs().max() < 1e-5


def advantages(script, rewards):
    names = inspect.signature(script.advantages).parameters
    values = dict(rewards=rewards, args=arguments(script), prompt_id=torch.arange(len(rewards)), stats={})
    values["lengths"] = torch.full_like(rewards, 5)
    return script.advantages(**{k: values[k] for k in names})


@each_grouped
def test_advantages_do_not_mix_prompts(script):
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    together = advantages(script, rewards)
    alone = torch.cat([advantages(script, row[None]) for row in rewards])
    torch.testing.assert_close(together, alone)
    if script.__name__ not in ONE_SIDED:
        torch.testing.assert_close(together.mean(1), torch.zeros(3), atol=1e-6, rtol=0)


@each
def test_the_loop_hands_over_everything_in_fields_of_args(script):
    """Every own field is read by the script's code."""
    source = inspect.getsource(script)
    for field in own_fields(script):
        assert f"args.{field}" in source, f"--{field} is read nowhere"
