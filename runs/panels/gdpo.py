"""GDPO: estimates of a canvas's likelihood at equal passes against its exact value, which 2^8 sets of masks give; and training
by them."""

import statistics

import torch

from algos import gdpo
from common import diffusion, gpu, models, settings, tasks
from runs import pictures
from runs.panels import columns, metrics

SIZE = (13.2, 3.7)
# Of runs.compare: what its flags make of a folder's name.
ARMS = {
    "sdmc, 2 nodes": ("", "tab:blue", "-"),
    "sdmc, 3 nodes": ("nodes-3", "#08306b", "-"),
    "double MC, 2": ("likelihood-double_mc", "tab:orange", "--"),
    "double MC, 4": ("draws-2-likelihood-double_mc", "tab:red", "--"),
    "diffu-GRPO": ("likelihood-diffu", "tab:green", "-."),
}
KINDS = {
    "double MC, t and 1/t": "#e6862c", "double MC, count": "#f7c08a", "spread counts": "#999999", "sdmc, 1/t": "#9ec5e8",
    "sdmc, count": "#2271b5",
}  # fmt: skip
PASSES, LEAST = (1, 2, 3), 1e-3


@torch.no_grad()
def moments(policy, ids, seen, L, mask):
    """Canvases [B, S] with seen [B, S] -> over all sets of k masked positions, k from 1 to L, the mean and the variance of the
    sum of their tokens' log-probs, [B, L] each."""
    sets = torch.arange(1, 2**L)[:, None] >> torch.arange(L) & 1 > 0
    sums = []
    for masked in sets:
        canvas, masked = ids.clone(), masked.expand(len(ids), -1)
        canvas[:, -L:].masked_fill_(masked, mask)
        sums.append(policy(canvas, seen, masked, 1.0, given=ids[:, -L:])[0].double().sum(1))
    groups = [torch.stack([x for x, m in zip(sums, sets) if m.sum() == k], 1) for k in range(1, L + 1)]
    return torch.stack([g.mean(1) for g in groups], 1), torch.stack([g.var(1, correction=0) for g in groups], 1)


def exact(mean):
    """mean [B, L] of moments() -> E [B]."""
    return (mean / torch.arange(1, mean.shape[1] + 1)).sum(1)


def fixed(mean, var, counts, weights):
    """An estimate by passes with these numbers of masks -> its mean and variance [B]."""
    at = torch.tensor(counts) - 1
    return (mean[:, at] * weights).sum(1), (var[:, at] * weights**2).sum(1)


def estimate(kind, n, mean, var):
    """Mean and variance [B] of an estimate by n passes, of moments()."""
    L = mean.shape[1]
    k, square = torch.arange(1, L + 1, dtype=torch.float64), var + mean**2
    if kind.startswith("sdmc"):
        t, w = (x.double() for x in gdpo.quadrature(n))
        counts = [max(1, int(x * L + 1e-6)) for x in t]
        return fixed(mean, var, counts, w / (t if kind.endswith("1/t") else torch.tensor(counts) / L))
    if kind == "double MC, count":  # any number of masks is as likely
        first, second = mean @ (1 / k), square @ (L / k**2)
    elif kind == "double MC, t and 1/t":  # each position with probability t, which has no variance without a least t
        t = torch.logspace(torch.log10(torch.tensor(LEAST)).item(), 0, 4001, dtype=torch.float64)
        binomial = torch.distributions.Binomial(L, t[:, None]).log_prob(k).exp()
        first, second = (
            x @ (torch.trapezoid(binomial / t[:, None] ** power, t, dim=0) + LEAST ** (1 - power) * binomial[0])
            for x, power in ((mean, 1), (square, 2))
        )
    else:  # the authors' plain estimate: one random number of masks, the others at equal distances from it, in a circle
        each = []
        for start in range(L):
            counts = [(start + round(j * L / n)) % L + 1 for j in range(n)]
            each.append(fixed(mean, var, counts, L / torch.tensor(counts, dtype=torch.float64) / n))
        first, inner = (torch.stack(x).mean(0) for x in zip(*each))
        return first, inner + torch.stack([m for m, _ in each]).var(0, correction=0)
    return first, (second - first**2) / n


def numbers(seed):
    """Of the warm start, on a canvas that it samples for each prompt, in nats a token; and of the arms' runs."""
    args, _ = settings.resolve(gdpo.Args(seed=seed))
    gpu.init(args)
    tokenizer, L = models.load_tokenizer(args), args.max_new_tokens
    policy = models.load(args, gpu.device(), denoiser=True)
    engine = diffusion.Canvas(policy, tokenizer, args, gdpo.unmask)
    prompts = [e.ids for e in tasks.load(args.task, tokenizer).test]
    out = engine.generate(prompts, 1, L, 1.0, [gpu.hash_seed(seed, i, 13) for i in range(len(prompts))])
    ids = torch.tensor([p + y for p, (y, _, _) in zip(prompts, out)])
    mean, var = moments(policy, ids, torch.ones_like(ids, dtype=torch.bool), L, engine.mask_id)
    data = dict(variance={}, bias={}, error={}, canvases=len(ids), exact=exact(mean).mean().item() / L)
    for kind in KINDS:
        found = [estimate(kind, n, mean, var) for n in PASSES]
        off = [(first - exact(mean)) / L for first, _ in found]
        spread = [second / L**2 for _, second in found]
        data["bias"][kind] = [x.mean().item() for x in off]
        data["variance"][kind] = [x.mean().item() for x in spread]
        data["error"][kind] = [(x**2 + v).mean().sqrt().item() for x, v in zip(off, spread)]
    data["loss"] = (-mean / torch.arange(1, L + 1)).mean(0).tolist()
    curves = {name: columns(metrics("gdpo", flags), None, "accuracy")["accuracy"] for name, (flags, *_) in ARMS.items()}
    return data | dict(curves=curves)


def smooth(curve, n=9):
    """[(x, y)] -> y as the mean over the n points around."""
    ys, half = [y for _, y in curve], n // 2
    return [(x, statistics.mean(ys[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(curve)]


def draw(figure, data):
    noise, off, loss, training = figure.subplots(1, 4, width_ratios=[1.15, 1.15, 0.9, 1.15])
    width = 0.8 / len(KINDS)
    for axis, name in ((noise, "variance"), (off, "bias")):
        for i, (kind, colour) in enumerate(KINDS.items()):
            axis.bar([n + width * (i - 2) for n in PASSES], data[name][kind], width, color=colour, label=kind)
        axis.set_xticks(PASSES)
        axis.set_xlabel("passes of the model", fontsize=9)
        axis.set_title(f"{name} of the estimate, nats a token{'²' * (name == 'variance')}", fontsize=10)
    noise.set_yscale("log")
    noise.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    off.axhline(0, color="0.3", lw=0.8)
    L = len(data["loss"])
    loss.plot([k / L for k in range(1, L + 1)], data["loss"], "o-", color="0.3", ms=4)
    for n, colour in ((2, "tab:blue"), (3, "#08306b")):
        for t in gdpo.quadrature(n)[0].tolist():
            loss.axvline(t, color=colour, lw=0.8, ls=":")
    loss.set_title("loss of a masked token", fontsize=10)
    loss.set_xlabel("t, share that is masked (dotted: nodes)", fontsize=9)
    for name, (_, colour, line) in ARMS.items():
        pictures.curve(training, [smooth(run) for run in data["curves"][name]], colour, ls=line, lw=1.6, label=name)
    training.set_title("sampled accuracy", fontsize=10)
    training.set_xlabel("rollout (mean over nine)", fontsize=9)
    training.legend(fontsize=8, frameon=False, loc="lower right")
    for axis in (noise, off, loss, training):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
