"""Keeps the scripts in step: what a script does not name as different is its base's, byte for byte.

python -m tests.sync            rewrites every script from its base, after a change of the base, and the pages
python -m tests.sync REVISION   the same for a change since a git revision that is older than the last commit
python -m tests.sync --check    says what is out of step, changes nothing (the guard of tests/test_sync.py)
python -m tests.sync sapo       prints the lesson: the lines that a script changes of its base

`Differs from <base>.py in: <parts>` names what differs. A script without that line is a base, and its
docstring says `Base:` or `Stand-alone:`. `Same as <script>.py: <parts>` names what stands word for word in a
third script: it is held to that one instead of the base, needs no mention in `Differs from`, and its lines
are not counted, since they are not this paper's. `Measures: <parts>` names what only looks and never touches the
training, `World: <parts>` what is a task or an environment of the script's own, 60 lines at most: counted apart.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import pages, parts
from tests.parts import apart, changed_lines, changes, chunks, difference, differs, family, measures, note, same, split

ROOT = Path(__file__).resolve().parents[1]
ALGOS = ROOT / "algos"
UNSAID = "equation numbers not at hand"  # what a docstring says where no source of the script has them
PLACE = re.compile(rf"\b(Eqs?\. ?\(?\d|[Ss]ections? \d|[Aa]ppendix [A-Z\d]|Algorithm \d|Table \d)|{UNSAID}")
BUDGET = (60, 20)  # changed lines of a lesson at most: all, and those inside its loop
WORLD = 60  # lines of a world at most
# Who may have more, and why. A number is what is there, or the budget's where that is kept.
EXCEPTIONS = {
    "ppo": (101, 34, "a critic: a second model with a loss and an optimizer of its own"),
    "rto": (79, 20, "trains a DPO model first: two methods in one script"),
    "rank_grpo": (69, 20, "a reward for every line: a list is cut into ranks by its token ids, and each is looked up"),
    "t_ppo": (80, 29, "responses outlive the step: a pool of slots, and two kinds of rows from the rollout to the log"),
    "poad": (200, 63, "episodes of many actions, in an environment: rollout, evaluation and critic are of another kind"),
    "rlfr": (179, 20, "a second network, with a first fit, a loss and an optimizer of its own"),
    "spo": (148, 31, "two methods in one script, a chain and a tree, each with its own way to sample and to value"),
    "intro": (71, 22, "a second reading behind prompts that tell the answer, and draws by numbers of their own"),
    "rmt": (130, 30, "prompts are places of a text: read once for their entropy, drawn, asked for by budget, and read as text"),
    "training_free_grpo": (396, 84, "no gradient: a third of it is what is gone; texts are learnt, by two ways to ask a model"),
    "gdpo": (104, 28, "a model of another kind: masks and likelihoods of whole canvases, and without the flags of an engine"),
    "unmasking_policy": (165, 40, "the language model is the environment: a network of its own, a sampler, and 14 flags less"),
    "opsd": (63, 23, "a teacher with prompts of its own: a second reading, and a frozen start"),
    "soft_grpo": (69, 20, "actions of another kind: what is fed of a thought, its density, and the pass that feeds it again"),
    "soft_tokens": (79, 20, "a thought is a vector: fed, shown and kept by one function, and read again by another's density"),
    "cot2": (162, 27, "two stages, supervised and RL; thoughts that are fed, drawn in two ways, and seen again"),
    "atp_latent": (255, 50, "a curriculum of its own before the RL: heads, a decoder, four losses, gradients through latents"),
    "specdec": (117, 47, "two models with a cache each, and four functions where decode.py has one line"),
    "specdec_pp": (126, 40, "a small network of its own: its labels, its fit, and a rule that asks it while drafting"),
    "byte_level": (297, 58, "its state is a set of sequences: a tokenizer is read as one of bytes, and two models are asked"),
    "east": (169, 60, "an agent's episodes around the sampler, rows steered at once, and a direction found before them"),
    "ccp": (188, 80, "claims and their alternatives: another model judges pairs, and a text is cut into what it claims"),
    "dc_pdd": (161, 74, "texts without prompts: a corpus is counted, three readings of a law, and no sampling"),
    "diffadapt": (226, 85, "two rounds of samples, and between them a threshold and a probe: labels, training and choice"),
    "uqac": (157, 58, "a chain, its variants and their marginal for every response; a world of its own"),
    "xguard": (111, 29, "a decision beside the loss: scores, thresholds, reward, distillation, ids that are checked, a task"),
    "lm_cascades": (199, 100, "two models that answer, a network that is fitted to both, and a choice on items of its own"),
    "dapo": (60, 25, "samples until the groups teach: the rollout itself is a loop"),
}


def scripts():
    """Names of all scripts, each after those that it is held to."""
    found = {p.stem: p.read_text() for p in sorted(ALGOS.glob("*.py")) if p.name != "__init__.py"}

    def depth(name, path=()):
        if name in path:
            raise ValueError("scripts are held to each other in a circle: " + ", ".join([*path, name]))
        above = [n for n in {differs(found[name])[0], *same(found[name]).values()} if n in found]
        return 1 + max((depth(n, (*path, name)) for n in above), default=-1)

    return sorted(found, key=lambda n: (depth(n), n))


def out_of_step(name, text, base_text):
    """Complaints about a script's text against its base's."""
    base, allowed = differs(text)
    mine, theirs, complaints = chunks(text), chunks(base_text), []
    for chunk in [c for c in {**theirs, **mine} if c not in apart(text)]:
        if mine.get(chunk) != theirs.get(chunk) and chunk not in allowed:
            diff = difference(theirs.get(chunk, ""), mine.get(chunk, ""), f"{base}.py", f"{name}.py")
            says = f"{chunk} differs from {base}.py and the docstring does not say so"
            complaints.append(f"{name}.py: {says}\n{diff}")
    for chunk in allowed:
        if mine.get(chunk) == theirs.get(chunk):
            says = f"the docstring says that {chunk} differs from {base}.py, but it does not"
            complaints.append(f"{name}.py: {says}")
    for chunk in [c for c in measures(text) if c not in mine]:
        complaints.append(f"{name}.py: the docstring says that {chunk} measures, but there is none")
    for chunk in [c for c in parts.world(text) if c not in mine]:
        complaints.append(f"{name}.py: the docstring says that {chunk} is its world, but there is none")
    shared = [c for c in mine if c in theirs]
    if shared != [c for c in theirs if c in mine]:
        complaints.append(f"{name}.py: its parts stand in another order than in {base}.py")
    return complaints


def copies(name, text, texts):
    """-> (complaints about parts that should be a third script's, the text with those from there)."""
    complaints, mine = [], chunks(text)
    for part, other in same(text).items():
        theirs = chunks(texts[other]) if other in texts else {}
        if part not in mine or part not in theirs:
            without = name if part not in mine else other
            says = f"{part} should be the same as in {other}.py, but {without}.py has none"
            complaints.append(f"{name}.py: {says}")
            continue
        (above, my_own), original = split(mine[part]), split(theirs[part])[1]
        if my_own != original:
            diff = difference(original, my_own, f"{other}.py", f"{name}.py")
            complaints.append(f"{name}.py: {part} is not the same as in {other}.py\n{diff}")
            mine[part] = above + original
    return complaints, "".join(mine.values())


def over_budget(name, lines, exceptions):
    """Complaints about the size of a lesson; `lines` as changed_lines() gives them."""
    limits, needed = tuple(exceptions.get(name, BUDGET)[:2]), tuple(map(max, zip(lines, BUDGET)))
    says = f"{name}.py changes {lines[0]} lines, {lines[1]} of them in its loop"
    if any(n > limit for n, limit in zip(lines, limits)):
        return [f"{says}: more than {limits[0]}, or than {limits[1]} there"]
    if name in exceptions and needed == BUDGET:
        return [f"{says}: it needs no exception any more"]
    return [] if needed == limits else [f"{says}: its exception should be {needed[0]} and {needed[1]}"]


def unwritten(name, text):
    """Complaints about what a docstring has to say, and about a missing test."""
    said = note(text)
    root = re.search(r"^(Base|Stand-alone): +\S", said, re.M)
    wanted = {
        "a line 'Family: ...'": family(text),
        "a line 'Differs from <base>.py in:', 'Base:' or 'Stand-alone:'": differs(text)[0] or root,
        "a line 'Costs: ...'": re.search(r"^Costs: +\S", said, re.M),
        "a line 'Run: ...'": re.search(r"^Run: +\S", said, re.M),
        f"an equation's or a section's number, or the words '{UNSAID}'": PLACE.search(" ".join(said.split())),
        "an 'Idea: ...' that begins with a sentence": pages.idea(said),
    }
    complaints = [f"{name}.py: its docstring needs {what}" for what, there in wanted.items() if not there]
    if not (ROOT / "tests" / f"test_{name}.py").exists():
        complaints.append(f"{name}.py has no tests/test_{name}.py")
    return complaints


def problems(name, texts):
    """All complaints about a script; `texts`: {name: text} of all."""
    text, base = texts[name], differs(texts[name])[0]
    found = unwritten(name, text) + copies(name, text, texts)[0]
    if base is None:
        return found
    if base not in texts:
        return [*found, f"{name}.py: there is no base {base}.py"]
    lines, world = changed_lines(text, texts[base]), parts.lines_of(parts.world(text), text)
    found += [f"{name}.py: its world has {world} lines, more than {WORLD}"] if world > WORLD else []
    return found + out_of_step(name, text, texts[base]) + over_budget(name, lines, EXCEPTIONS)


def merge(name, text, base_text, old_base_text):
    """The script's text with every unnamed part taken from the base, and the base's changes since
    `old_base_text` merged into the named parts. -> (text, conflicts)."""
    _, allowed = differs(text)
    mine, theirs, old = chunks(text), chunks(base_text), chunks(old_base_text)
    conflicts, out, kept = [], [], apart(text)
    order = [c for c in mine]
    for i, chunk in enumerate(theirs):  # a part that is new in the base goes after its neighbour there
        if chunk not in mine and chunk not in allowed and chunk not in kept:
            before = [c for c in list(theirs)[:i] if c in order]
            order.insert(order.index(before[-1]) + 1 if before else 0, chunk)
    for chunk in order:
        if chunk in kept or (chunk in allowed and chunk not in theirs):
            out.append(mine[chunk])
        elif chunk not in allowed:  # what is the script's own and unnamed is kept, and complained of
            out.append(theirs.get(chunk, "" if chunk in old else mine.get(chunk, "")))
        elif old.get(chunk) in (None, theirs[chunk]):
            out.append(mine[chunk])
        else:
            merged, clean = _three_way(mine[chunk], old[chunk], theirs[chunk])
            out.append(merged if clean else mine[chunk])
            says = f"{name}.py: {chunk} needs a hand: the base changed the same lines"
            conflicts += [] if clean else [says]
    return "".join(out), conflicts


def _three_way(mine, old, theirs):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / n for n in ("mine", "old", "theirs")]
        for path, text in zip(paths, (mine, old, theirs)):
            path.write_text(text)
        done = subprocess.run(["git", "merge-file", "-p", *map(str, paths)], capture_output=True, text=True)
    return done.stdout, done.returncode == 0


def lesson(name, texts):
    """The lines that a script changes of its base, part by part."""
    base = differs(texts[name])[0]
    if base is None:
        return f"{name}.py is a base"
    total, loop = changed_lines(texts[name], texts[base])
    out = [f"{name}.py against {base}.py: {total} changed lines, {loop} of them in its loop"]
    for part, rows in changes(texts[name], texts[base]).items():
        out += ["", part, *(f"  {r}".rstrip() for r in rows)]
    for part, other in same(texts[name]).items():
        out += ["", f"{part}: same as in {other}.py"]
    return "\n".join(out)


def written(texts):
    """{path: text} of the pages about the scripts."""
    lessons = {}
    for name, text in texts.items():
        base, named = differs(text)
        lines = changed_lines(text, texts[base])[0] if base else 0
        lessons[name] = pages.Lesson(name, text, family(text) or "none", base, named, same(text), lines)
    records, readme = pages.records(ROOT / "runs" / "reference"), ROOT / "README.md"
    claims = ROOT / "runs" / "reference" / "claims.json"
    tried = json.loads(claims.read_text()) if claims.exists() else None
    out = {readme: pages.readme(readme.read_text(), lessons, tried)} if readme.exists() else {}
    return out | {ALGOS / "README.md": pages.index(lessons, records, tried)}


def stale(texts):
    """Complaints about pages that are not what the scripts and the results say."""
    pages_now = written(texts).items()
    behind = [path for path, text in pages_now if not path.exists() or path.read_text() != text]
    return [f"{path.relative_to(ROOT)} is not what python -m tests.sync makes" for path in behind]


def main(check, since="HEAD"):
    texts, complaints = {n: (ALGOS / f"{n}.py").read_text() for n in scripts()}, []
    if since in texts:
        print(lesson(since, texts))
        return 0
    for name, text in texts.items():
        base = differs(text)[0]
        if base in texts and not check:
            command = ["git", "show", f"{since}:algos/{base}.py"]
            old = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
            text, conflicts = merge(name, text, texts[base], old or texts[base])
            complaints += conflicts
        if not check:
            texts[name] = copies(name, text, texts)[1]
            (ALGOS / f"{name}.py").write_text(texts[name])
        complaints += problems(name, texts)
    complaints += [f"EXCEPTIONS of tests/sync.py: there is no {n}.py" for n in EXCEPTIONS if n not in texts]
    if not check:
        for path, text in written(texts).items():
            path.write_text(text)
    complaints += stale(texts)
    print("\n".join(complaints) or "all scripts are in step")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv, *[a for a in sys.argv[1:] if not a.startswith("-")]))
