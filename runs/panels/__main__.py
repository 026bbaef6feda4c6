"""A method's own picture: what it works on, looked into on the tiny model.

python -m runs.panels spo rlfr          runs/reference/panels/{spo,rlfr}.{png,json}
python -m runs.panels                   all of them
python -m runs.panels spo --redraw      the picture again, of the numbers that are there

A module of runs/panels/ has the name of a script, its picture's SIZE in inches, numbers(seed), which looks, and
draw(figure, data), which draws what it has found.
"""

import contextlib
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError
from runs import pictures

NAMES = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.stem.startswith("__"))


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]] = ()
    """whose pictures; none: all that there are"""
    out: str = "runs/reference/panels"
    """folder of pictures and numbers"""
    seed: int = 1
    """of what is sampled"""
    arms: bool = False
    """no picture: prints what the module's arms(seed) gives, as runs.claims asks for it"""
    redraw: bool = False
    """nothing is looked into: the picture again, of <out>/<script>.json"""


def main(o):
    out = Path(o.out)
    if unknown := [name for name in o.scripts if name not in NAMES]:
        raise UserError(f"no picture of {unknown[0]}; there are: {', '.join(NAMES)}")
    if not o.arms:
        out.mkdir(parents=True, exist_ok=True)
    for name in o.scripts or NAMES:
        panel, path = importlib.import_module(f"runs.panels.{name}"), out / f"{name}.json"
        if o.arms:
            with contextlib.redirect_stdout(sys.stderr):
                found = panel.arms(o.seed)
            print(json.dumps(found))
            continue
        if not o.redraw:
            with contextlib.redirect_stdout(sys.stderr):
                data = dict(command=f"python -m runs.panels {name}", seed=o.seed) | panel.numbers(o.seed)
            rounded = json.loads(
                json.dumps(data), parse_float=lambda x: round(float(x), 5), parse_constant=lambda _: None
            )  # JSON has no NaN
            path.write_text(json.dumps(rounded) + "\n")
        if not path.exists():
            raise UserError(f"--redraw needs the numbers in {path}")
        plt = pictures.pyplot()
        figure = plt.figure(figsize=panel.SIZE, layout="constrained")
        panel.draw(figure, json.loads(path.read_text()))
        figure.savefig(path.with_suffix(".png"), dpi=pictures.DPI)
        plt.close(figure)
        print(f"wrote {path.with_suffix('.png')}" + ("" if o.redraw else f" and {path}"))


if __name__ == "__main__":
    main(tyro.cli(Options))
