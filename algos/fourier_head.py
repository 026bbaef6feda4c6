"""Fourier head: "Fourier Head: Helping Large Language Models Learn Complex Probability Distributions". Gillman, Aggarwal,
Freeman, Singh and Sun, arXiv 2410.22269 (ICLR 2025).

Idea: where the tokens are numbers, that is, bins of an interval in their order, the last linear layer is put in terms of waves:
it gives the coefficients of a Fourier series, and the bins' probabilities are the values of that series at their centres.
Neighbouring bins then share what is learnt of each of them, which a row of independent logits must learn bin by bin. How fine
the density may be is a flag, the number of frequencies, and the layer's size does not grow with the number of bins.

Objective, to be minimised (equation numbers not at hand); h: what the last layer sees, m bins with the centres z_b:
    L = -1/B sum_i log softmax(l_i)[bin i] + gamma R,   l_b = log(q_b + 1e-5),   q_b = p(z_b) / sum_b' p(z_b')
    p(z) = 1/2 + Re sum_k=1..N c_k / c_0 e^(i k pi z),   z_b = -1 + (2b + 1) / m
    c_k = sum_j=0..N-k a_(j+k) conj(a_j),   (Re a, Im a) = W h + b,   a_0 ... a_N complex
    R = 2/B sum_i sum_k 2 pi^2 k^2 |c_k|^2

As c is the autocorrelation of a, p(z) is |sum_j a_j e^(i j pi z)|^2 / (2 c_0): never negative, in any precision, and
computed as that, by two products with fixed cosines and sines; c itself is needed for R alone. W and b begin as
nn.Linear's, divided by 100. As in the released code R is of c_k, not of c_k / c_0, so that it holds down the size of a as
well, which p does not see; at the code's gamma, 1e-6, it is lost beside the loss of this task (`penalty` in the metrics).
The code's Decision Transformer and Chronos pass gamma to the layer and never add R to their loss; its toy task does, and so
does this script. Ours: the inputs are the bins' centres (there: their numbers), a quarter of all inputs is held out, and
targets beyond the ends are drawn again. Left out: the variant without bins, by the density itself, and the two large
experiments, Atari with a Decision Transformer and forecasts with Chronos.

Family: generation and control
Stand-alone: the paper is one layer in the place of another, and no language model is needed to see what it does; --head linear,
             nn.Linear with a logit for each bin, is the plain arm.
Measures: kl, smoothness, told
World: bin_distribution, two_modes
Costs: the two products, B x 2(N + 1) x m each; the parameters are 2(N + 1) rows instead of m.
Run:   python algos/fourier_head.py                             CPU, seconds
       python algos/fourier_head.py --head linear               the plain arm
       python algos/fourier_head.py --frequencies 20 --gamma 1e-6
       python algos/fourier_head.py --points 4000 --steps 5000
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    seed: int = 1
    """of the points, their order and the network"""
    steps: int = 4000
    """updates in all; 160 passes over the points (ours; the paper: 500)"""
    batch_size: int = 32
    """points in one update, of all processes together (code)"""
    lr: float = 1e-3
    """AdamW's rate (code: Adam's, which without decay is the same)"""
    warmup_steps: int = 0
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    eval_every: int = 500
    """steps between evaluations; 0: only before and after"""
    checkpoint_every: int = 2000
    """steps between checkpoints; 0: only at the end"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """who gets the metrics besides TensorBoard"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of weights and gradients; the head computes in float32 at least"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] = "adamw"
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""

    # Fourier head
    limits = dict(frequencies="1 <= x", bins="2 <= x", points="1 <= x")
    head: Literal["fourier", "linear"] = "fourier"
    """the last layer; linear: a logit for each bin, the plain arm (paper)"""
    frequencies: int = 12
    """N, of a Fourier head; the density has no finer waves than this (code: 2 to 20)"""
    gamma: float = 0.0
    """how much the penalty R on high frequencies counts (code: 0 or 1e-6)"""
    bins: int = 50
    """m, of the interval from -1 to 1 (code)"""
    points: int = 800
    """training points: the fewer, the more there is to share (ours; code: 4000)"""


# ---------------------------------------------------------------- the objective


def centres(bins):
    """-> z [bins], the bins' centres in (-1, 1), float64."""
    return (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins - 1


def probabilities(a, bins):
    """Re a, then Im a, [n, 2(N + 1)] -> q [n, bins]: p(z_b) is |sum_j a_j e^(i j pi z_b)|^2 up to a factor, which q has not."""
    j = torch.arange(a.shape[-1] // 2, dtype=torch.float64)
    angle = torch.pi * j[:, None] * centres(bins)
    cos, sin = angle.cos().to(a), angle.sin().to(a)
    power = (a @ torch.cat([cos, -sin])) ** 2 + (a @ torch.cat([sin, cos])) ** 2
    return power / power.sum(-1, keepdim=True)


def autocorrelation(a):
    """Re a, then Im a, [n, 2(N + 1)] -> c [n, N + 1], complex."""
    a = torch.complex(*a.chunk(2, -1))
    n = a.shape[-1]
    return torch.stack([(a[..., k:] * a[..., : n - k].conj()).sum(-1) for k in range(n)], -1)


def penalty(c):
    """c [n, N + 1] -> R of each row [n]: large where a density has high frequencies."""
    k = torch.arange(c.shape[-1], device=c.device)
    return 4 * torch.pi**2 * (k**2 * (c.real**2 + c.imag**2)).sum(-1)


class FourierHead(torch.nn.Module):
    """In the place of nn.Linear(width, bins): h [n, width] -> logits [n, bins], in float32 at least."""

    def __init__(self, width, bins, frequencies):
        super().__init__()
        self.bins, self.linear = bins, torch.nn.Linear(width, 2 * (frequencies + 1))
        with torch.no_grad():
            for weight in self.linear.parameters():
                weight /= 100

    def coefficients(self, h):
        """h [n, width] -> Re a, then Im a, [n, 2(N + 1)]."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        return torch.nn.functional.linear(*(x.to(dtype) for x in (h, self.linear.weight, self.linear.bias)))

    def forward(self, h):
        return (probabilities(self.coefficients(h), self.bins) + 1e-5).log()


class Network(torch.nn.Module):
    """The toy task's: two inputs, two hidden layers, and the head that is asked for. forward -> logits [n, bins]."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(args.seed)  # the same network on every process
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        self.body = torch.nn.Sequential(linear(2, 64), relu(), linear(64, 32), relu())
        self.head = linear(32, args.bins) if args.head == "linear" else FourierHead(32, args.bins, args.frequencies)

    def forward(self, x):
        return self.head(self.body(x))


# ---------------------------------------------------------------- what is measured


def kl(exact, logits):
    """Bins' true probabilities [n, m], logits [n, m] -> KL(exact, softmax(logits)) of each row [n], nats."""
    exact = exact.to(logits)
    return (torch.xlogy(exact, exact) - exact * logits.log_softmax(-1)).sum(-1)


def smoothness(q):
    """q [n, m] -> s(q) [n]: how much of a distribution is lost by Gaussian filters of sigma 1 to 100 bins that wrap around,
    sum 6 / (pi sigma)^2 |q - G_sigma q|; the lower the smoother."""
    m = q.shape[-1]
    sigma, k = torch.arange(1, 101, dtype=torch.float64)[:, None], torch.arange(1 - m, m)
    g = (-(k**2) / (2 * sigma**2)).exp()
    g = torch.zeros(100, m, dtype=torch.float64).index_add(1, k % m, g / g.sum(1, keepdim=True))
    b = torch.arange(m)
    lost = torch.eye(m) - g[:, (b[:, None] - b) % m]  # [100, m, m], each symmetric
    return (torch.einsum("nb,sbc->nsc", q, lost.to(q)).norm(dim=2) @ (6 / (torch.pi * sigma[:, 0]) ** 2).to(q)).to(q)


def told(before, after, exact, net):
    """Two evaluations, the exact distributions, the network -> the last line of a run."""
    size = sum(weight.numel() for weight in net.head.parameters())
    change = "; ".join(f"{name} {before[x]:.3f} -> {after[x]:.3f}" for name, x in (("KL", "kl"), ("smoothness", "smoothness")))
    own = f"{smoothness(exact).mean():.3f} is the exact distribution's own: less is over-smoothed"
    return f"{change} ({own}) on {after['prompts']} held-out inputs, by a head of {size:,} parameters"


# ---------------------------------------------------------------- the world: a number that is near one of two others


def bin_distribution(bins, std=0.1):
    """-> [bins, bins]: row i has the probabilities of z's bin for z ~ N(x, std^2) and x uniform in bin i, exactly: a uniform
    less another one, smeared by the normal, is the second difference of its cdf's antiderivative."""
    width = 2 / bins
    near = -(centres(bins)[:, None] - centres(bins)).abs()
    cdf, pdf = torch.special.ndtr, torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob
    under = [u * cdf(u) + pdf(u).exp() for u in ((near + d) / std for d in (width, 0, -width))]
    return (std / width * (under[0] - 2 * under[1] + under[2])).clamp(min=0)


def two_modes(args):
    """x, y uniform in (-.8, .8), z from N(x, .01) or N(y, .01), each with probability 1/2; x and y are given as their bins'
    centres, z is asked for as its bin. -> inputs [points, 2], targets [points], and of the pairs of bins that are held out,
    a quarter, inputs [n, 2] and the exact distribution of z's bin [n, bins]. Functions of the seed."""
    from common import gpu

    draw, z = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 1)), centres(args.bins)
    near = bin_distribution(args.bins)
    pairs = torch.cartesian_prod(*2 * [(z.abs() < 0.8).nonzero()[:, 0]])
    exact = near[pairs].sum(1)  # a draw beyond the ends is made again
    exact = exact / exact.sum(1, keepdim=True)
    order = torch.randperm(len(pairs), generator=draw)
    held_out, others = order[: len(pairs) // 4], order[len(pairs) // 4 :]
    chosen = others[torch.randint(len(others), (args.points,), generator=draw)]
    targets = torch.multinomial(exact[chosen], 1, generator=draw)[:, 0]
    return z[pairs[chosen]], targets, z[pairs[held_out]], exact[held_out]


# ---------------------------------------------------------------- the loop


def rows_at(cursor, n, points, seed):
    """The n points behind the first `cursor`, of passes over all of them, each in an order of its own -> [n]."""
    from common import gpu

    place, found = torch.arange(cursor, cursor + n), []
    for epoch in (place // points).unique().tolist():
        order = torch.randperm(points, generator=torch.Generator().manual_seed(gpu.hash_seed(seed, epoch, 2)))
        found.append(order[place[place // points == epoch] % points])
    return torch.cat(found)


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, gpu, runlog, settings

    args, _, device = settings.prepare(__file__, args)
    if args.gamma and args.head == "linear":
        raise UserError(f"--gamma {args.gamma:g} needs --head fourier: a linear head has no frequencies")
    run = runlog.Run(__file__, args, trained=0)
    run.measure, run.asked = "KL", "held-out inputs"
    dtype = getattr(torch, args.dtype)
    inputs, targets, held_out, exact = two_modes(args)
    inputs, targets, held_out = inputs.to(device, dtype), targets.to(device), held_out.to(device, dtype)
    net = Network(args).to(device, dtype)
    optimizer = gpu.make_optimizer(net, args)
    run.restore(net, optimizer)

    @torch.no_grad()
    def evaluate():
        logits = gpu.double(net(held_out)).cpu()
        found = dict(kl=kl(exact, logits), smoothness=smoothness(logits.softmax(-1)))
        return {name: x.mean().item() for name, x in found.items()} | dict(prompts=len(exact))

    for step in run.steps(net, optimizer, evaluate):
        # All processes know the whole batch, and each takes its share of the rows.
        rows = rows_at(step * args.batch_size, args.batch_size, args.points, args.seed)[gpu.rank() :: gpu.world()]
        h = net.body(inputs[rows])
        logp = net.head(h).log_softmax(-1).gather(1, targets[rows, None])
        loss = -logp.sum() / args.batch_size
        metrics = dict(loss=loss.item())
        if args.gamma:
            rough = penalty(autocorrelation(net.head.coefficients(h))).sum() / args.batch_size
            loss = loss + args.gamma * rough
            metrics["penalty"] = rough.item()
        loss.backward()
        for weight in net.parameters():  # it is so small that every process has all of it
            weight.grad.copy_(gpu.total(weight.grad))
        metrics = {name: gpu.total(x) for name, x in metrics.items()}
        metrics["grad_norm"] = gpu.clip_gradients(net, torch.inf)  # the norm alone, as the code clips nothing
        if run.finite(gpu.total(loss.item()), metrics["grad_norm"]):
            optimizer.step()
        optimizer.zero_grad()
        run.timed("update")
        run.write(metrics, args.batch_size, dict(loss="loss", grad_norm="grad"))

    run.finish(run.after and told(run.state["before"], run.after, exact, net))
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
