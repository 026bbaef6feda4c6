"""The atlas: one static site of all scripts, to be read without a server and without a network.

python -m runs.atlas                        runs/atlas/index.html, to be opened from the file system
python -m runs.atlas --out docs --source https://HOST/OWNER/REPOSITORY/blob/main        to be published

A map of families, bases and methods; a page for every script: its idea, its code beside its base's, what it was found to do,
how to run it; and any two side by side. What it shows is read from algos/, runs/reference/ and runs/claims.toml: after a change
of these it is made anew. Two builds of the same are equal byte for byte.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tyro
from markupsafe import Markup
from pygments.formatters import HtmlFormatter

from common import ROOT, UserError, whole_folder
from runs import atlas_lesson, atlas_shown
from tests import pages, parts, sync

SITE = ROOT / "runs" / "site"
MARK = "atlas.txt"  # what tells a folder that was written here from another, which stays as it is
# What a script changes, by the names of the parts in which it differs from its base. A network: a class that is a torch module.
CHANGES = {
    "rewards": "token_rewards rank_rewards flow_rewards dpo_rewards prefix_rewards hidden_rewards soft_reward length_reward "
    "policy_reward speed_reward total_reward overlong_penalty shaping curriculum",
    "advantages": "advantages token_advantages gae returns value_targets scale",
    "objective": "surrogate pair_loss token_loss likelihood project bounds csft_loss sft_losses ntp_loss distill",
    "token weights": "token_weights kl_weights text_weights",
    "KL and reference": "kl_penalty token_kl kl_weights ref beta",
    "sampling": "make_engine think decode pick propose verify unmask play chain tree heat attempts informative selection "
    "prefixes carry group_size prompts_per_step candidates read_on",
    "data": "task questions experts Corpus revision_columns contrastive_column retold teachers prompt",
    "scores": "scores",
    "a network of its own": "",
}
LOOP = "the loop alone"  # of what changes nothing of these
COSTS = {
    "nothing": "nothing more",
    "less": "less than its base",
    "forward": "more forward passes",
    "samples": "more samples",
    "critic": "a critic",
    "model": "a second model (reference, teacher, draft)",
    "network": "a network of its own",
    "stage": "a training before it",
    "states": "hidden states or whole distributions",
    "engine": "sampling without vLLM",
}
# What a script needs beside its base (a critic also where the base has it): keys of COSTS, read off its line `Costs`. No code
# tells what a pass costs, so this is said here.
NEEDS = dict(
    ares="model", atp_latent="network stage forward engine", bupo="forward states", byte_level="forward",
    cacovid="forward network", ccp="model", cdpo="stage model forward", cispo="nothing",
    coin="forward network stage", cot2="stage engine", d3s="less", dapo="samples",
    dc_pdd="nothing", dcpo="nothing", decode="nothing", dhpo="nothing", did="forward", diffadapt="samples stage network states",
    dpo="model forward", dr_grpo="nothing", east="samples engine states", forking_tokens="nothing", fourier_head="nothing",
    gdpo="forward engine", gmpo="nothing", grpo="forward", grpo_vision="forward", gspo="nothing", gtpo="nothing", hapo="states",
    intro="forward", lm_cascades="model network states", lp_reg="forward", magic_word="forward", mdlm="forward engine",
    minpro="nothing", opsd="forward model", otr="states", pf_ppo="critic samples", poad="critic model forward",
    ppo="critic forward", pppo="samples",
    precision_pretraining="states", ptp="nothing", r2q="samples model", rank_grpo="model", reinforce="nothing",
    rlfr="network stage states", rloo="nothing", rmt="forward", rng="nothing", rto="critic stage model forward", sapo="nothing",
    score="forward", seed_grpo="nothing", sft="nothing", simpo="less", soft_grpo="engine", soft_tokens="states engine",
    specdec="model", specdec_pp="model network stage states", spo="samples", steer="forward", t_ppo="critic", t_reg="forward",
    tab_po="nothing", tdpo="model states", tgdpo="stage model forward", thr="states", tokenprober="forward",
    training_free_grpo="samples less", tw_grpo="states", unmasking_policy="network forward engine", uqac="forward states",
    vppo="forward", xar="forward", xguard="nothing",
)  # fmt: skip


@dataclass
class Options:
    out: str = "runs/atlas"
    """folder of the site; one that is there and is no atlas is left alone"""
    source: str | None = None
    """what stands before a file's path in a link to it, such as https://HOST/OWNER/REPOSITORY/blob/main; None: the way from
    the site to the file, where the site lies inside the repository, else no link"""


@dataclass
class Entry(pages.Lesson):
    """A script, as the templates see it."""

    note: atlas_lesson.Note | None = None
    claim: dict | None = None
    idea: str = ""
    changes: tuple = ()
    find: str = ""
    """all that the search looks in"""

    @property
    def needs(self):
        return NEEDS.get(self.name, "").split()


def changes(names, text):
    """What a script changes -> keys of CHANGES. `names`: the parts in which it differs from its base, or has from a third."""
    found = [key for key, of in CHANGES.items() if set(of.split()) & set(names)]
    own = [re.search(rf"^class {n}\((?:torch\.)?nn\.Module\)", text, re.M) for n in names]
    return tuple(found + ["a network of its own"] * any(own)) or (LOOP,)


def entries():
    """{name: Entry} of all scripts, each after its base."""
    texts = {name: (sync.ALGOS / f"{name}.py").read_text(encoding="utf-8") for name in sync.scripts()}
    claims, out = atlas_shown.claims(), {}
    for name, text in texts.items():
        base, named = parts.differs(text)
        lines = parts.changed_lines(text, texts[base])[0] if base else 0
        entry = Entry(name, text, parts.family(text), base, named, parts.same(text), lines)
        entry.note, entry.claim = atlas_lesson.read(text, texts), claims.get(name)
        entry.idea = pages.idea(parts.note(text)).replace("\\", "")
        functions = named if base else [p for p, chunk in parts.chunks(text).items() if atlas_lesson.is_function(chunk)]
        entry.changes = changes([*named, *entry.copies], text) if base else ()
        flags = re.findall(r"^    (\w+): .* = ", parts.chunks(text).get("own fields", ""), re.M)
        said = re.search(r"^Idea: (.+?)\n\n", parts.note(text), re.M | re.S)[1]
        words = [name, entry.note.label, entry.note.title, *entry.note.arxiv, said, *functions, *entry.copies]
        words += [*flags, *(f"--{flag.replace('_', '-')}" for flag in flags)]
        entry.find = " ".join(" ".join(words).lower().split())
        out[name] = entry
    return out


def tree(found):
    """[(family, [(root or base, is it of this family, [children])])] as the map shows them."""
    out = []
    for family in pages.families(found):
        roots = [e for e in found.values() if e.family == family and not e.base]
        alone = [e for e in roots if "Stand-alone" in e.note.fields]
        branches = [(e, True) for e in roots if e not in alone]
        branches += [(found[b], False) for b in pages.bases(found, family) if found[b].family != family]
        out.append((family, branches, sorted(alone, key=lambda e: e.name)))
    return out


def below(found, name, family):
    """The scripts of a family that differ from a script, by name."""
    return sorted((e for e in found.values() if (e.base, e.family) == (name, family)), key=lambda e: e.name)


def linker(out, source):
    """-> f(path in the repository) -> where a page of the site finds it, or None where no link would last."""
    inside = Path(out).resolve().is_relative_to(ROOT)

    def link(path):
        if source:
            return f"{source.rstrip('/')}/{path}"
        return os.path.relpath(ROOT / path, Path(out).resolve()).replace(os.sep, "/") if inside else None

    return link


def parts_js(found):
    """The parts of all scripts, each once, as JavaScript: lines of HTML by number, and {script: [[part, number], ...]}."""
    numbers, scripts = {}, {}
    for name, entry in found.items():
        chunks = {p: c for p, c in parts.chunks(entry.text).items() if p != "docstring"}
        scripts[name] = [[p, numbers.setdefault(c, len(numbers)), int(atlas_lesson.is_function(c))] for p, c in chunks.items()]
    data = dict(parts=["\n".join(atlas_lesson.highlighted(chunk)) for chunk in numbers], scripts=scripts)
    return "const ATLAS = " + json.dumps(data, separators=(",", ":")) + ";\n"


def code_css():
    """The colours of code, for light and for dark screens."""

    def sheet(style):
        rows = HtmlFormatter(style=atlas_lesson.STYLES[style]).get_style_defs(".code").splitlines()
        return "\n".join(row for row in rows if row.startswith(".code ."))

    return f"{sheet('light')}\n@media (prefers-color-scheme: dark) {{\n{sheet('dark')}\n}}\n"


def results(entry, found, pictures):
    """Draws and copies a script's pictures into a folder -> what the templates say of its results."""
    name, shown = entry.name, {}
    curves = atlas_shown.curves(name, entry.base, entry.claim, found["records"])
    curves = curves or atlas_shown.curves(name, None, None, found["records"])
    if curves:
        shown["curves"] = curves
        atlas_shown.draw_curves(curves, pictures / f"{name}-curves.svg")
    shown["table"] = atlas_shown.table(name, entry.claim, found["records"])
    ratios, gates = found["gates"]
    base = gates.get(entry.base, {})
    if name in gates:
        shown["gate"] = "same" if gates[name] == base else "own"
        if shown["gate"] == "own":
            atlas_shown.draw_gate(ratios, gates[name], base, pictures / f"{name}-gate.svg")
    shown["section"] = atlas_shown.section(name, entry.note.label, entry.claim, found["sections"])
    if path := atlas_shown.picture(name):
        shutil.copyfile(path, pictures / path.name)
        shown["picture"] = path.name, atlas_shown.alt(path, found["sections"]) or f"Results of {entry.note.label}"
    shown["any"] = any(shown.get(key) for key in ("curves", "table", "gate", "picture"))
    return shown


def templates(found, link):
    """The templates, with what they all know. `found`: {name: Entry}; `link`: what linker() gives."""
    loader = jinja2.FileSystemLoader(SITE)
    env = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    env.filters |= dict(safe_lines=lambda lines: Markup("\n".join(lines)), anchor=atlas_lesson.anchor)
    env.globals |= dict(scripts=found, tree=tree(found), below=lambda name, family: below(found, name, family))
    env.globals |= dict(costs=COSTS, changes=[*CHANGES, LOOP], verdicts=atlas_shown.VERDICTS, reading=list(pages.READING))
    env.globals |= dict(link=link, metrics=atlas_shown.METRICS)
    return env


def build(out, source=None):
    """Writes the site into a folder, whole or not at all. UserError where another folder is in its place."""
    out = Path(out)
    if out.exists() and not (out / MARK).exists():
        raise UserError(f"{out} is there and is no atlas ({MARK} is not in it): name another folder")
    found = entries()
    shown = dict(records=atlas_shown.records(), gates=atlas_shown.gates(names=found), sections=atlas_shown.sections())
    env = templates(found, linker(out, source))
    with whole_folder(out, "the atlas") as folder:
        (folder / "pictures").mkdir()
        for name, entry in found.items():
            base = found[entry.base].text if entry.base else None
            values = dict(entry=entry, lesson=atlas_lesson.lesson(entry.text, base))
            values["shown"] = results(entry, shown, folder / "pictures")
            (folder / f"{name}.html").write_text(env.get_template("method.html").render(values), encoding="utf-8")
        for name in ("index.html", "pair.html"):
            (folder / name).write_text(env.get_template(name).render(), encoding="utf-8")
        for name in ("style.css", "atlas.js"):
            shutil.copyfile(SITE / name, folder / name)
        (folder / "code.css").write_text(code_css())
        (folder / "parts.js").write_text(parts_js(found), encoding="utf-8")
        (folder / MARK).write_text("Written by python -m runs.atlas, which replaces this folder.\n")
    return len(found)


def main(o):
    """Builds the site and says where it is."""
    n = build(o.out, o.source)
    print(f"wrote {Path(o.out) / 'index.html'}: {n} scripts")


if __name__ == "__main__":
    main(tyro.cli(Options))
