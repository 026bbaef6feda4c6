"""The gate plot: how strongly each method pushes a token whose ratio has moved away from 1, by autograd from
its own surrogate.

python -m runs.gates              runs/reference/gates.{png,json}
"""

import importlib
import inspect
import json
import sys
from pathlib import Path

import torch

from common import ROOT

T, PLACE = 8, 3  # tokens of a completion, and which of them deviates
RATIOS = torch.logspace(-1, 1, 201, base=2.0)  # 0.5 to 2


def gate(script, sign, probability=0.3):
    """-> weight of the deviating token [R] and of the tokens after it [R], for R ratios: the gradient of the
    surrogate with respect to logp, over its value where all tokens are on policy. `sign`: of the advantage;
    `probability`: pi_old of every token."""
    args = script.Args(max_new_tokens=T, group_size=2)
    old_logp = torch.full((len(RATIOS), T), probability, dtype=torch.float64).log()
    mask = torch.ones_like(old_logp, dtype=torch.bool)
    adv = torch.full_like(old_logp, float(sign))
    gradients = []
    for shift in (torch.zeros_like(RATIOS), RATIOS.log()):
        logp = old_logp.clone()
        logp[:, PLACE] += shift
        logp.requires_grad_()
        values = dict(logp=logp, old_logp=old_logp, adv=adv, mask=mask, args=args)
        values["entropy"] = torch.ones_like(old_logp)
        wanted = inspect.signature(script.surrogate).parameters
        objective, _ = script.surrogate(**{k: values[k] for k in wanted})
        objective.sum().backward()
        gradients.append(logp.grad)
    weights = gradients[1] / gradients[0]
    return weights[:, PLACE], weights[:, PLACE + 1 :].mean(1)


def draw(gates, path):
    """One panel per script. `gates` {title: {"+1" or "-1": what gate() gives}}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(gates) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 2.7 * rows), sharex=True, sharey=True)
    for axis, (name, curves) in zip(axes.flat, gates.items()):
        for sign, colour in ((1, "tab:blue"), (-1, "tab:red")):
            own, others = curves[f"{sign:+d}"]
            axis.plot(RATIOS, own, color=colour, lw=2, label=f"the token, A = {sign:+d}")
            axis.plot(RATIOS, others, ":", color=colour, lw=1.5, label="tokens after it")
        axis.set_title(name, fontsize=10)
        axis.axvline(1, color="grey", lw=0.6)
        axis.grid(alpha=0.25)
        axis.set_xscale("log", base=2)
        axis.set_ylim(-0.1, 2.1)
    for axis in axes.flat[len(gates) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("ratio of the token")
    for axis in axes[:, 0]:
        axis.set_ylabel("gradient weight")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="lower right", fontsize=9, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rounds(values):
    """To the digits that are kept."""
    return [round(v, 5) for v in values]


def main(out=ROOT / "runs" / "reference" / "gates"):
    """Draws and writes the gates of every surrogate; what builds on PPO has PPO's."""
    texts = {p.stem: p.read_text() for p in (ROOT / "algos").glob("*.py")}
    names = [n for n, text in texts.items() if "\ndef surrogate(" in text]
    names = [n for n in names if "Differs from ppo.py" not in texts[n]]
    gates = {}
    for name in sorted(names, key=lambda n: (n != "grpo", n)):
        script = importlib.import_module(f"algos.{name}")
        variants = {name: 0.3}
        # Where the interval depends on pi_old, one panel does not tell it.
        if "old_logp" in inspect.signature(getattr(script, "bounds", lambda: 0)).parameters:
            variants = {f"{name}, pi_old = {q}": q for q in (0.9, 0.3, 0.05)}
        for title, q in variants.items():
            gates[title] = {f"{sign:+d}": [w.tolist() for w in gate(script, sign, q)] for sign in (1, -1)}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(gates, out.with_suffix(".png"))
    rounded = {n: {s: [rounds(w) for w in ws] for s, ws in g.items()} for n, g in gates.items()}
    record = dict(ratios=rounds(RATIOS.tolist()), gates=rounded)
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    print(f"wrote {out.with_suffix('.png')} and {out.with_suffix('.json')}: {', '.join(gates)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
