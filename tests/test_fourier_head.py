"""The Fourier head's worked numbers, what leaves its density alone and what does not, the world and how it is measured against,
and the script as a user runs it."""

import functools
import math

import pytest
import torch

from algos import fourier_head as script
from common import UserError, settings
from tests.helpers import ROOT, checkpoints, die_at, lines, outcome, run, same, user_error

SCRIPT = ROOT / "algos" / "fourier_head.py"
CLOSE = dict(rtol=0, atol=1e-6)
A = torch.tensor([[1, 0.5, -0.2, 0, 0.3, 0.4]], dtype=torch.float64)  # 1, .5 + .3i, -.2 + .4i


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def complexes(a):
    return torch.complex(*a.chunk(2, -1))


def reals(a):
    return torch.cat([a.real, a.imag], -1)


def head(width, bins, frequencies, a=None):
    """A head; with the coefficients `a` whatever it sees."""
    made = script.FourierHead(width, bins, frequencies).double()
    if a is not None:
        with torch.no_grad():
            made.linear.weight.zero_()
            made.linear.bias.copy_(a[0])
    return made


# ---------------------------------------------------------------- the objective


def test_worked_numbers():
    c = script.autocorrelation(A)
    torch.testing.assert_close(c, torch.tensor([[1.54, 0.52 + 0.56j, -0.2 + 0.4j]], dtype=torch.complex128), **CLOSE)
    q = script.probabilities(A, 4)
    torch.testing.assert_close(q, torch.tensor([[0.129313, 0.627817, 0.110947, 0.131924]]).double(), **CLOSE)
    logits = head(3, 4, 2, A)(drawn(1, 3))
    torch.testing.assert_close(logits, torch.tensor([[-2.045442, -0.465491, -2.198616, -2.025457]]).double(), **CLOSE)
    assert script.penalty(c).item() == pytest.approx(54.638130, abs=1e-6)
    assert script.penalty(c / c[:, :1]).item() == pytest.approx(23.038510, abs=1e-6)  # the reading that is not the code's


def series(a, z):
    """p(z) as it is defined, by c."""
    c = script.autocorrelation(a)
    k = torch.arange(1, c.shape[1])
    waves = torch.polar(torch.ones((), dtype=torch.float64), torch.pi * k[:, None] * z)
    return 0.5 + (c[:, 1:] / c[:, :1] @ waves).real


def test_the_square_is_the_series():
    z = script.centres(4)
    assert z.tolist() == [-0.75, -0.25, 0.25, 0.75]
    torch.testing.assert_close(series(A, z), torch.tensor([[0.258626, 1.255633, 0.221893, 0.263847]]).double(), **CLOSE)
    a, z = drawn(7, 26), script.centres(50)
    p = series(a, z)
    torch.testing.assert_close(script.probabilities(a, 50), p / p.sum(1, keepdim=True))
    torch.testing.assert_close(p.mean(1) * 2, torch.ones(7).double())  # 50 bins see all of 12 frequencies: it is a density
    assert (p > -1e-12).all()


def test_gradients():
    """Through the square as through c, and nothing is detached; as the size of a is not seen, the gradient is across it."""
    a = drawn(3, 10).requires_grad_()
    target = torch.tensor([0, 4, 6])
    p = series(a, script.centres(7))
    (expected,) = torch.autograd.grad((p / p.sum(1, keepdim=True) + 1e-5).log().log_softmax(1)[range(3), target].sum(), a)
    (found,) = torch.autograd.grad((script.probabilities(a, 7) + 1e-5).log().log_softmax(1)[range(3), target].sum(), a)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((found * a).sum(1), torch.zeros(3).double(), **CLOSE)
    assert torch.autograd.gradcheck(lambda a: script.penalty(script.autocorrelation(a)), a)


def test_what_leaves_the_density_alone():
    a, m = complexes(drawn(4, 10)), 9
    q = script.probabilities(reals(a), m)
    for factor in (1e-2, 3.0, torch.polar(torch.ones(()), torch.tensor(0.7)).item()):
        torch.testing.assert_close(script.probabilities(reals(a * factor), m), q)
    j = torch.arange(5, dtype=torch.float64)
    one_bin = torch.polar(torch.ones(5).double(), -2 * torch.pi * j / m)
    torch.testing.assert_close(script.probabilities(reals(a * one_bin), m), q.roll(1, 1))  # the interval's ends meet
    torch.testing.assert_close(script.probabilities(reals(a.conj()), m), q.flip(1))
    torch.testing.assert_close(script.probabilities(reals(a[:, :1]), m), torch.full((4, m), 1 / m).double())  # N = 0: flat


def test_the_penalty_is_on_size_and_frequency():
    a = complexes(drawn(4, 10))
    of = [script.penalty(script.autocorrelation(reals(x))) for x in (a, 2 * a, a * 1j)]
    torch.testing.assert_close(of[1], 16 * of[0])  # which the density does not see
    torch.testing.assert_close(of[2], of[0])
    assert not script.penalty(script.autocorrelation(reals(a[:, :1]))).any()
    for k in (1, 2, 3):
        pair = torch.zeros(1, 5, dtype=torch.complex128)
        pair[0, 0], pair[0, k] = 1, 0.5
        found = script.penalty(script.autocorrelation(reals(pair))).item()
        assert found == pytest.approx(4 * math.pi**2 * k**2 * 0.25)


def test_the_constant_in_the_log():
    """Softmax gives q back but for 1e-5, and no bin can cost more than 11.5."""
    a = torch.zeros(1, 4, dtype=torch.float64)
    a[0, 0], a[0, 1] = 1, 1  # |1 + e^(i pi z)|^2 is 0 at -1 and 1, which are no centres, and all but 0 beside them
    logits = head(2, 1000, 1, a)(drawn(1, 2))
    q = script.probabilities(a, 1000)
    torch.testing.assert_close(logits.softmax(1), (q + 1e-5) / (1 + 1000 * 1e-5))
    assert -logits.min().item() == pytest.approx(math.log(1e5), abs=1e-3) and q.min() < 1e-8


def test_the_layer():
    torch.manual_seed(3)
    plain = torch.nn.Linear(8, 26)
    torch.manual_seed(3)
    made = script.FourierHead(8, 50, 12)
    assert torch.equal(made.linear.weight, plain.weight / 100) and torch.equal(made.linear.bias, plain.bias / 100)
    sizes = [sum(p.numel() for p in script.FourierHead(8, bins, 12).parameters()) for bins in (50, 4096)]
    assert sizes == [26 * 9, 26 * 9]
    h = drawn(5, 8).float()
    assert made(h).shape == (5, 50) and made(h).dtype == torch.float32
    torch.testing.assert_close(made.coefficients(h), made.linear(h))
    half = script.FourierHead(8, 50, 12).bfloat16()
    found = half(h.bfloat16())
    whole = script.FourierHead(8, 50, 12)
    whole.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(found, whole(h.bfloat16().float()))  # only weights and inputs are rounded


def test_the_network():
    for kind, size in (("fourier", 26 * 33), ("linear", 50 * 33)):
        net = script.Network(script.Args(head=kind))
        assert sum(p.numel() for p in net.head.parameters()) == size
        assert net(torch.zeros(3, 2)).shape == (3, 50)
        assert [p.shape[0] for p in net.body.parameters()] == [64, 64, 32, 32]
    one, same_seed, other = (script.Network(script.Args(seed=seed)).body[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same_seed) and not torch.equal(one, other)


# ---------------------------------------------------------------- what is measured


def test_kl():
    exact = torch.tensor([[0.5, 0.5, 0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    logits = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]]).double().log() + 7
    torch.testing.assert_close(script.kl(exact, logits), torch.tensor([math.log(2), 0]).double(), **CLOSE)


def test_smoothness():
    """As its sum says, filter by filter; nothing is lost of a flat one, and where a distribution lies does not matter."""
    q, m = drawn(3, 12).softmax(1), 12
    expected = torch.zeros(3).double()
    for sigma in range(1, 101):
        g = [math.exp(-(k**2) / (2 * sigma**2)) for k in range(1 - m, m)]
        blurred = torch.zeros_like(q)
        for k, weight in zip(range(1 - m, m), g):
            blurred += weight / sum(g) * q.roll(k, 1)
        expected += 6 / (math.pi * sigma) ** 2 * (q - blurred).square().sum(1).sqrt()
    torch.testing.assert_close(script.smoothness(q), expected)
    torch.testing.assert_close(script.smoothness(q.roll(5, 1).flip(1)), expected)
    assert script.smoothness(torch.full((1, m), 1 / m)).item() == pytest.approx(0, abs=1e-6)
    spike = torch.eye(m)[:1]
    assert script.smoothness(spike) > script.smoothness((spike + spike.roll(1, 1)) / 2)


# ---------------------------------------------------------------- the world


def test_bin_distribution():
    """Against Simpson's rule over where x is in its bin; beyond the ends there is something, but not much from the middle."""
    bins, edges = 10, torch.linspace(-1, 1, 11, dtype=torch.float64)
    found = script.bin_distribution(bins, 0.3)
    for i in (0, 3, 7):
        x = torch.linspace(edges[i], edges[i + 1], 201, dtype=torch.float64)
        weight = torch.tensor([1.0] + [4.0, 2.0] * 99 + [4.0, 1.0]).double() / 600
        below = torch.special.ndtr((edges - x[:, None]) / 0.3)
        torch.testing.assert_close(found[i], weight @ below.diff(dim=1), rtol=0, atol=1e-9)
    torch.testing.assert_close(found, found.T)
    own = script.bin_distribution(50)
    assert own[25].sum().item() == pytest.approx(1, abs=1e-12) and own[0].sum() < 0.6 and (own >= 0).all()


def test_two_modes():
    args = script.Args(points=20000)
    inputs, targets, held_out, exact = script.two_modes(args)
    assert inputs.shape == (20000, 2) and held_out.shape == (400, 2) and exact.shape == (400, 50)
    pairs, others = ({tuple(x) for x in some.tolist()} for some in (inputs, held_out))
    assert len(others) == 400 and len(pairs) == 1200 and not pairs & others  # of 40 x 40
    assert inputs.abs().max().item() == pytest.approx(0.78) and targets.min() >= 0 and targets.max() < 50
    torch.testing.assert_close(exact.sum(1), torch.ones(400).double())
    own = script.bin_distribution(50)
    x, y = ((held_out[3] + 1) * 25).long().tolist()
    both = own[x] + own[y]
    torch.testing.assert_close(exact[3], both / both.sum())
    z = script.centres(50)[targets]
    near = (z[:, None] - inputs).abs() < 0.2  # two standard deviations
    apart = (inputs[:, 0] - inputs[:, 1]).abs() > 0.5
    assert near.any(1).double().mean() > 0.94
    assert near[apart].double().mean(0).tolist() == pytest.approx([0.48, 0.48], abs=0.02)
    again, other = script.two_modes(args), script.two_modes(script.Args(points=20000, seed=2))
    assert all(torch.equal(a, b) for a, b in zip((inputs, targets, held_out), again))
    assert not torch.equal(inputs, other[0]) and not torch.equal(held_out, other[2])


def test_every_pass_has_every_point():
    order = script.rows_at(0, 30, 10, 1)
    passes = order.view(3, 10)
    assert all(sorted(p.tolist()) == list(range(10)) for p in passes) and len({tuple(p.tolist()) for p in passes}) == 3
    assert torch.equal(torch.cat([script.rows_at(k, 7, 10, 1) for k in (0, 7, 14, 21)]), order[:28])  # batches may straddle
    assert not torch.equal(script.rows_at(0, 10, 10, 2), passes[0])


# ---------------------------------------------------------------- runs

QUICK = dict(steps=3, eval_every=0, checkpoint_every=0)
SMALL = "--steps 4 --eval-every 2 --checkpoint-every 2 --frequencies 5 --gamma 1e-3 --bins 20 --points 40 --lr-schedule cosine"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights after three steps of the defaults."""
    return trained(tmp_path_factory.mktemp("plain"))


def trained(folder, **flags):
    script.train(script.Args(**QUICK | flags, run_dir=str(folder / "run")))
    return outcome(folder / "run")


@pytest.mark.parametrize("flags", [
    dict(head="linear"), dict(frequencies=11), dict(gamma=1.0), dict(bins=49), dict(points=799), dict(batch_size=31),
    dict(lr=2e-3), dict(weight_decay=0.1), dict(warmup_steps=2), dict(lr_schedule="linear"), dict(seed=2),
    dict(dtype="float64"),
], ids=str)  # fmt: skip
def test_every_flag_counts(plain, tmp_path, flags):
    assert trained(tmp_path, **flags).weights != plain.weights


def test_gamma_holds_frequencies_down(tmp_path):
    rows = {}
    for gamma in (1e-9, 1.0):
        flags = dict(steps=80, frequencies=20, gamma=gamma, eval_every=0, checkpoint_every=0)
        script.train(script.Args(**flags, run_dir=str(tmp_path / str(gamma))))
        rows[gamma] = lines(tmp_path / str(gamma) / "metrics.jsonl")
    assert rows[1.0][0]["penalty"] == rows[1e-9][0]["penalty"]  # the same start
    assert rows[1.0][-1]["penalty"] < 0.3 * rows[1e-9][-1]["penalty"]


def test_it_learns(tmp_path, capsys):
    script.train(script.Args(steps=200, eval_every=0, checkpoint_every=0, run_dir=str(tmp_path / "run")))
    before, after = lines(tmp_path / "run" / "evals.jsonl")
    assert list(after) == ["step", "kl", "smoothness", "prompts"] and after["prompts"] == 400
    assert before["kl"] > 1 and after["kl"] < 0.6
    exact = script.smoothness(script.two_modes(script.Args())[3]).mean().item()
    said = f"KL {before['kl']:.3f} -> {after['kl']:.3f}; smoothness {before['smoothness']:.3f} -> {after['smoothness']:.3f}"
    said += f" ({exact:.3f} is the exact distribution's own: less is over-smoothed) on 400 held-out inputs"
    out = capsys.readouterr().out
    assert "#" not in out  # no bar of what should fall
    assert out.splitlines()[-1] == f"{said}, by a head of 858 parameters"


def test_killed_and_resumed(tmp_path):
    """The same seed is the same run, also one that dies on its way."""
    script_run = functools.partial(run, tmp_path, script=SCRIPT)
    whole = script_run(*SMALL.split(), "--run-dir", tmp_path / "whole")
    assert whole.code == 0 and whole.err == "" and "  step    2  kl " in whole.out, whole.err
    rows = lines(tmp_path / "whole" / "metrics.jsonl")
    assert len(rows) == 4 and all(row["penalty"] > 0 and row["grad_norm"] > 0 and row["tokens"] == 32 for row in rows)
    assert [row["step"] for row in lines(tmp_path / "whole" / "evals.jsonl")] == [0, 2, 4]
    dead = script_run(
        *SMALL.split(), "--run-dir", tmp_path / "parts", before=functools.partial(die_at, "os.rename", "step-000004")
    )
    assert dead.code == -9 and len(checkpoints(tmp_path / "parts")) == 1
    done = script_run("--resume", tmp_path / "parts")
    assert done.code == 0, done.err
    same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_mistakes(tmp_path):
    done = run(tmp_path, "--gamma", "1e-6", "--head", "linear", script=SCRIPT)
    assert user_error(done) == "--gamma 1e-06 needs --head fourier: a linear head has no frequencies"
    for flags, why in (
        (dict(frequencies=0), "--frequencies must be at least 1"), (dict(bins=1), "--bins must be at least 2"),
        (dict(points=0), "--points must be at least 1"), (dict(gamma=-1.0), "--gamma must be at least 0"),
        (dict(head="cosine"), "--head must be one of fourier, linear"), (dict(batch_size=0), "--batch-size must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            settings.resolve(script.Args(**flags))
