"""OTR: how near the gradient of K guesses is to that of all of them, and what the method comes to over the learning rate."""

import copy

import torch

from algos import otr
from common import demonstrations, gpu
from runs import pictures
from runs.panels import SEEDS, rows, start

SIZE = (12, 3.6)
GUESSES, DRAWS, DEMONSTRATIONS = (1, 4, 16, 64, 256), 8, 32
RATES = ("3e-4", "1e-3", "3e-3")
# Of python -m runs.sweep: script, its flags in the folder's name, colour, line.
ARMS = {
    "sft": ("sft", "", "0.55", "-"),
    "otr": ("otr", "", "tab:blue", "-"),
    "otr, exact": ("otr", "exact-", "tab:cyan", "--"),
    "DFT": ("otr", "beta-0-exact-kappa-1-", "tab:orange", ":"),
}


def gradient(s, batch, seed, **flags):
    """Of all weights, on a batch, of otr's loss with these flags and this noise."""
    args = copy.copy(s.args)
    vars(args).update(flags)
    noise = torch.rand(*batch.mask.shape, args.samples, generator=torch.Generator().manual_seed(seed))
    given = torch.cat([batch.ids[:, -batch.mask.shape[1] :, None], noise.to(batch.ids.device)], 2)

    def read(given, logits):
        return otr.token_loss(given[:, 0].long(), logits, args, given[:, 1:])

    losses, *_ = s.policy(batch.ids, batch.attention_mask, batch.mask, read=read, given=given)
    s.policy.zero_grad()
    (losses * otr.token_weights(batch.mask, args))[batch.mask].sum().backward()
    return torch.cat([p.grad.flatten() for p in s.policy.parameters()])


def cosines(seed, guesses=GUESSES, draws=DRAWS, n=DEMONSTRATIONS):
    """At the start, on n demonstrations -> {K: cosine to the closed form of each of the draws}."""
    s = start(otr, seed=seed)
    batch = demonstrations.batch(s.task, s.task.order(0, n, seed), s.tokenizer, s.args, seed)
    whole = gradient(s, batch, 0, exact=True)

    def cosine(K, draw):
        sampled = gradient(s, batch, gpu.hash_seed(seed, K, draw), samples=K)
        return torch.cosine_similarity(sampled, whole, dim=0).item()

    return {K: [cosine(K, draw) for draw in range(draws)] for K in guesses}


def numbers(seed):
    """Cosines of the start; greedy accuracy and log-prob of the demonstrations at the end of the sweep's runs."""
    out = dict(cosine={str(K): values for K, values in cosines(seed).items()}, accuracy={}, logp={})
    for name, (script, own, *_) in ARMS.items():
        folders = [[(script, f"{own}lr-{rate}", s) for rate in RATES] for s in SEEDS]
        out["accuracy"][name] = [[rows(f, x, "evals", s)[-1]["greedy_accuracy"] for f, x, s in of] for of in folders]
        late = [[rows(f, x, "metrics", s)[-10:] for f, x, s in of] for of in folders]
        out["logp"][name] = [[sum(row["logp"] for row in some) / len(some) for some in of] for of in late]
    return out


def draw(figure, data):
    left, middle, right = figure.subplots(1, 3)
    guesses = list(map(int, data["cosine"]))
    draws = [list(zip(guesses, values)) for values in zip(*data["cosine"].values())]
    pictures.curve(left, draws, "tab:blue", marker="o", ms=4)
    left.set_xscale("log", base=4)
    left.set_xticks(guesses, guesses)
    left.set_ylim(0, 1.03)
    left.set_xlabel("K, guesses at every token", fontsize=9)
    left.set_title(f"cosine of the gradient to the closed form's\n{len(draws)} draws, before training", fontsize=10)
    for axis, what in ((middle, "accuracy"), (right, "logp")):
        for name, (*_, colour, line) in ARMS.items():
            curves = [list(enumerate(values)) for values in data[what][name]]
            pictures.curve(axis, curves, colour, ls=line, marker="o", ms=4, label=name)
        axis.set_xticks(range(len(RATES)), RATES)
        axis.set_xlabel("learning rate", fontsize=9)
    middle.set_title("greedy accuracy after training", fontsize=10)
    right.set_title("log-prob of the demonstrations, last 10 updates", fontsize=10)
    middle.legend(fontsize=8, frameon=False, loc="lower left")
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
