"""RLFR: how well the flow fits, how strange it finds the tokens of a right and of a wrong completion, and what that tells."""

from types import SimpleNamespace

import torch

from algos import rlfr
from common import rollout
from runs.panels import start

SIZE = (7, 6.5)


def aucs(scores, right, some):
    """{name: how often a wrong completion of `some` has more of it than a right one}, and how many there are of either."""
    found = {name: rlfr.auc(x[some & ~right], x[some & right]) for name, x in scores.items()}
    return dict(right=int((some & right).sum()), wrong=int((some & ~right).sum()), auc=found)


def numbers(seed, prompts=64, **flags):
    s = start(rlfr, seed=seed, **flags)
    torch.manual_seed(seed)
    flow, optimizer = rlfr.make_flow(s.policy, s.args)
    fit = rlfr.flow_stage(s.policy, flow, s.task, s.tokenizer, s.args, SimpleNamespace(stop=None))
    batch = rollout.collect(s.engine, s.scorer, s.tokenizer, s.task.train[:prompts], s.args, 0)
    batch.old_logp, _ = rlfr.score(s.policy, flow, optimizer, batch, s.args, 0)
    D, n, right = batch.columns["deviation"], batch.mask.sum(1), batch.accuracy == 1
    scores, careful = {"D": D.sum(1) / n, "-log p": -batch.old_logp.sum(1) / n, "short": -n.float()}, n > n.max() / 2
    table = {"all": aucs(scores, right, careful | True), "careful": aucs(scores, right, careful)}
    groups = [[i for i in range(g, g + batch.group) if careful[i]] for g in range(0, len(n), batch.group)]
    both = [g for g in groups if any(right[i] for i in g) and not all(right[i] for i in g)]  # of one prompt, where there is one
    shown = []
    for wanted in (True, False):
        i = next(i for i in (both or [sum(groups, [])])[0] if bool(right[i]) == wanted)
        ids = batch.ids[i, -batch.mask.shape[1] :][batch.mask[i]].tolist()
        tokens = [s.tokenizer.decode([t]) for t in ids]
        shown.append(dict(right=wanted, gold=batch.gold[i], tokens=tokens, D=D[i][batch.mask[i]].tolist()))
    return dict(task=s.task.name, fit=fit, table=table, shown=shown)


def draw(figure, data):
    curve, heat, table = figure.subplots(3, 1, height_ratios=(3, 1.6, 1.5))
    curve.plot(range(1, len(data["fit"]) + 1), data["fit"], lw=1.2)
    curve.set_yscale("log")
    curve.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    curve.minorticks_off()
    late = data["fit"][-20:]
    curve.set_title(f"the flow's fit: error {data['fit'][0]:.0f} -> {sum(late) / len(late):.1f}", fontsize=10)
    curve.set_xlabel("update", fontsize=9)
    curve.set_ylabel("squared error of the velocity", fontsize=9)
    curve.grid(alpha=0.25)
    rows = data["shown"]
    width, low, high = (
        max(len(row["D"]) for row in rows),
        min(min(row["D"]) for row in rows),
        max(max(row["D"]) for row in rows),
    )
    padded = [row["D"] + [float("nan")] * (width - len(row["D"])) for row in rows]
    image = heat.imshow(padded, aspect="auto", cmap="YlOrRd", norm="log", vmin=low, vmax=high)
    for y, row in enumerate(rows):
        for x, (token, d) in enumerate(zip(row["tokens"], row["D"])):
            text = {" ": "_", "<eos>": "end"}.get(token, token)
            dark, size = d > 0.4 * high, 8 if len(text) < 3 else 6
            heat.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
    heat.set_xticks(range(0, width, 5))
    heat.set_yticks([0, 1], ["right" if row["right"] else "wrong" for row in rows], fontsize=9)
    heat.set_xlabel(f"token of the completion (the sum is {rows[0]['gold']})", fontsize=9)
    heat.set_title("D: how strange a token's hidden states are", fontsize=10)
    figure.colorbar(image, ax=heat, fraction=0.04, pad=0.02)
    table.set_axis_off()
    columns = list(data["table"]["all"]["auc"])
    cells = [[f"{of['auc'][c]:.2f}" for c in columns] for of in data["table"].values()]
    names = [f"{where} ({of['right']} right, {of['wrong']} wrong)" for where, of in data["table"].items()]
    made = table.table(cells, rowLabels=names, colLabels=columns, loc="center", cellLoc="center", bbox=(0.42, 0.0, 0.56, 0.85))
    made.auto_set_font_size(False)
    made.set_fontsize(9)
    table.set_title("AUC: a wrong completion above a right one", fontsize=10)
