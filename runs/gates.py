"""The gate plot: how strongly each method pushes a token whose ratio has moved away from 1, by autograd from
its own surrogate.

python -m runs.gates              runs/reference/gates.{png,json}

One token of a completion deviates, the others stay on policy. Where it makes a difference, because the objective
takes a ratio of the completion or of a prefix, a second panel has all tokens deviate alike. Methods that push
alike share a panel.
"""

import importlib
import inspect
import json
import sys
from pathlib import Path

import torch

from common import ROOT
from runs import pictures

T, PLACE = 8, 3  # tokens of a completion, and which of them deviates
RATIOS = torch.logspace(-3, 3, 241, base=2.0, dtype=torch.float64)
TICKS = {1 / 8: "1/8", 1 / 4: "1/4", 1 / 2: "1/2", 1: "1", 2: "2", 4: "4", 8: "8"}
HIGHEST = 8.6  # of the vertical axis


def gate(script, sign, probability=0.1, together=False):
    """-> weight of the deviating token [R] and of the tokens after it [R], for R ratios: the gradient of the
    surrogate with respect to logp, over its value where all tokens are on policy. `sign`: of the advantage;
    `probability`: pi_old of every token, NaN where the ratio would make more than 1 of it; `together`: all tokens
    deviate."""
    args = script.Args(max_new_tokens=T, group_size=2)
    old_logp = torch.full((len(RATIOS), T), probability, dtype=torch.float64).log()
    mask = torch.ones_like(old_logp, dtype=torch.bool)
    adv = torch.full_like(old_logp, float(sign))
    moved = torch.ones(T) if together else torch.arange(T) == PLACE
    gradients = []
    for shift in (torch.zeros_like(RATIOS), RATIOS.log()):
        logp = (old_logp + shift[:, None] * moved).requires_grad_()
        values = dict(logp=logp, old_logp=old_logp, adv=adv, mask=mask, args=args)
        values |= dict(entropy=torch.ones_like(old_logp), h=0 * old_logp, proxy=old_logp, protected=~mask)
        values["rank_id"] = (torch.arange(T) // (T // 2)).expand(mask.shape)  # two lines
        wanted = inspect.signature(script.surrogate).parameters
        objective, _ = script.surrogate(**{k: values[k] for k in wanted})
        objective.sum().backward()
        gradients.append(logp.grad)
    weights = gradients[1] / gradients[0]
    weights[RATIOS * probability > 1 + 1e-9] = float("nan")
    return weights[:, PLACE], weights[:, PLACE + 1 :].mean(1)


def panels(name, script):
    """{title: {"+1" or "-1": what gate() gives}} of a script."""

    def both(**how):
        return {f"{sign:+d}": gate(script, sign, **how) for sign in (1, -1)}

    # Where the interval depends on pi_old, one panel does not tell it.
    if "old_logp" in inspect.signature(getattr(script, "bounds", lambda: 0)).parameters:
        return {f"{name}, pi_old = {q}": both(probability=q) for q in (0.9, 0.3, 0.05)}
    one, all_ = both(), both(together=True)
    if all(torch.allclose(one[sign][0], all_[sign][0]) for sign in one):
        return {name: one}
    return {f"{name}, one token moved": one, f"{name}, all tokens moved": all_}


def merged(gates):
    """{title: ...} with the curves rounded to what is kept, None for NaN; those that are alike under one title."""
    titles = {}
    for title, curves in gates.items():
        kept = {s: [[None if v != v else round(v, 5) for v in w.tolist()] for w in ws] for s, ws in curves.items()}
        titles.setdefault(json.dumps(kept), []).append(title)
    return {", ".join(names): json.loads(kept) for kept, names in titles.items()}


def draw(gates, path, columns=4):
    """One panel per title. `gates`: what merged() gives."""
    plt = pictures.pyplot()
    rows = -(-(len(gates) + 1) // columns)  # the legend has a place of its own
    size = (pictures.WIDE, 2.15 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    for axis, (name, curves) in zip(axes.flat, gates.items()):
        for sign, colour in ((1, "tab:blue"), (-1, "tab:red")):
            own, others = (torch.tensor([float("nan") if v is None else v for v in w]) for w in curves[f"{sign:+d}"])
            # The token's own are drawn one wide, one narrow: where they are the same, both are seen.
            axis.plot(RATIOS, own, color=colour, lw=3 if sign > 0 else 1.3, label=f"the token, A = {sign:+d}")
            axis.plot(RATIOS, others, ":", color=colour, lw=1.3, label=f"tokens after it, A = {sign:+d}")
        axis.set_title(pictures.wrapped(name, 26), fontsize=9)
        axis.axvline(1, color="grey", lw=0.6)
        axis.grid(alpha=0.25)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(TICKS), TICKS.values())
        axis.minorticks_off()
        # Roots, so that both 0 to 1 and a cap of 5 are seen.
        axis.set_yscale("function", functions=(lambda y: y.clip(0) ** 0.5, lambda y: y**2))
        axis.set_yticks([0, 0.25, 1, 2, 4, 8], ["0", "1/4", "1", "2", "4", "8"])
        axis.set_ylim(0, HIGHEST)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(gates) :]:
        axis.set_axis_off()
        axes.flat[list(axes.flat).index(axis) - columns].tick_params(labelbottom=True)
    axes.flat[len(gates)].legend(*axes.flat[0].get_legend_handles_labels(), loc="center left", fontsize=9, frameon=False)
    figure.supxlabel("ratio pi / pi_old of what is moved", fontsize=9)
    figure.supylabel("push: gradient of logp, 1 on policy (axis in square roots)", fontsize=9)
    figure.savefig(path, dpi=pictures.DPI)
    plt.close(figure)


def main(out=ROOT / "runs" / "reference" / "gates"):
    """Draws and writes the gates of every surrogate; what builds on PPO has PPO's."""
    texts = {p.stem: p.read_text() for p in (ROOT / "algos").glob("*.py")}
    names = [n for n, text in texts.items() if "\ndef surrogate(" in text and "\nStand-alone: " not in text]
    names = [n for n in names if "Differs from ppo.py" not in texts[n]]
    gates = {}
    for name in sorted(names, key=lambda n: (n != "grpo", n)):
        gates |= panels(name, importlib.import_module(f"algos.{name}"))
    gates = merged(gates)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(gates, out.with_suffix(".png"))
    record = dict(ratios=[round(r, 5) for r in RATIOS.tolist()], gates=gates)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(f"wrote {out.with_suffix('.png')} and {out.with_suffix('.json')}: {'; '.join(gates)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
