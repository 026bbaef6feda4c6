"""Where the seconds go between the command and the first step of a script: what is imported, and what is done.

python -m tests.bench.start --out runs/reference/start            python algos/sapo.py as it is typed, three times
python -m tests.bench.start --script grpo
The script runs in a process of its own on one core. What it imports and the functions of STAGES are spans, one inside the
other; a span's own seconds are those that no span inside it has, so that all of them add up. They are the process's own seconds
on its core, since others may want it, too. A first run that does not count warms the files up, and makes the tiny model's warm
start where there is none. The process ends when the first step is logged. --help is run as often, unwatched.
"""

import importlib._bootstrap as bootstrap
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Function of common/ -> what it does, in a reader's words. One that is called inside another is counted apart from it.
STAGES = {
    "settings.parse": "reading flags (tyro)", "settings.resolve": "filling flags in from the preset",
    "settings.prepare": "process group, threads", "models.load_tokenizer": "tokenizer", "tasks.load": "task",
    "runlog.Run": "run folder, TensorBoard", "memory.explain_plan": "memory plan", "models.load": "model",
    "fit.probe": "probe of the model", "gpu.make_optimizer": "optimizer", "engines.make_engine": "engine",
    "rewards.Scorer": "reward workers", "rollout.evaluate": "first evaluation", "rollout.collect": "first step: rollout",
}  # fmt: skip
START, STEP, LEAST = "interpreter, standard library", "first step: scoring, update", 0.05  # LEAST: s, of a package's own row


@dataclass
class Options:
    script: str = "sapo"
    repeats: int = 3
    out: str | None = None
    """table (.md) and numbers (.json), without ending"""


class Spans:
    """What runs inside what: `own` {(kind, name): seconds}; `asked` {(package, the module that asked for it): seconds with what
    it imports itself}, where a package of another's is loaded first. kind: import, with a package's name, or stage."""

    def __init__(self, clock=time.process_time):
        self.clock, self.stack, self.own, self.asked, self.lines = clock, [], {}, {}, []
        self.since = clock()

    def _pass(self):
        """The seconds since the last call go to the innermost span."""
        now = self.clock()
        key = self.stack[-1][0] if self.stack else ("stage", STEP)
        self.own[key] = self.own.get(key, 0.0) + now - self.since
        self.since = now

    def open(self, kind, name):
        self._pass()
        self.stack.append(((kind, name.partition(".")[0] if kind == "import" else name), name, self.since))

    def close(self):
        self._pass()
        (kind, package), _, begun = self.stack.pop()
        above = [name for (k, _), name, _ in reversed(self.stack) if k == "import"]
        inside = any(key == (kind, package) for key, *_ in self.stack)
        if kind == "import" and not inside:
            key = (package, above[0] if above else "the script")
            self.asked[key] = self.asked.get(key, 0.0) + self.since - begun

    def wrapped(self, f, name):
        def timed(*args, **kwargs):
            self.open("stage", name)
            try:
                return f(*args, **kwargs)
            finally:
                self.close()

        return timed


def watch(script, flags, out):
    """Runs the script up to its first step, in this process, and writes what was seen to the file `out`."""
    spans, find = Spans(), bootstrap._find_and_load
    spans.own["stage", START] = spans.since

    def load(name, import_):
        if name in sys.modules:
            return find(name, import_)
        spans.open("import", name)
        try:
            return find(name, import_)
        finally:
            spans.close()
            if name.startswith("common."):
                hook(name, sys.modules.get(name))

    def hook(name, module):
        for place, words in STAGES.items():
            part, _, function = place.partition(".")
            if name == f"common.{part}" and isinstance(vars(module).get(function), type):
                kind = vars(module)[function]
                kind.__init__ = spans.wrapped(kind.__init__, words)
            elif name == f"common.{part}":
                setattr(module, function, spans.wrapped(vars(module)[function], words))
        if name == "common.runlog":
            module.Run.log = end

    def end(*args):
        spans._pass()
        own = [[kind, name, seconds] for (kind, name), seconds in spans.own.items()]
        asked = [[package, by, seconds] for (package, by), seconds in spans.asked.items()]
        Path(out).write_text(json.dumps(dict(own=own, asked=asked, lines=spans.lines, whole=spans.since)))
        os._exit(0)

    def write(text, plain=sys.stdout.write):
        if text.strip():
            spans.lines.append([text.strip(), time.process_time(), time.time()])
        return plain(text)

    bootstrap._find_and_load, sys.stdout.write, sys.argv = load, write, [script, *flags]
    runpy.run_path(script, run_name="__main__")


def run(options):
    """-> what watch() saw of one run, the lines with seconds on the clock since the process was started."""
    with tempfile.TemporaryDirectory() as folder:
        call = "import sys; from tests.bench import start; start.watch(sys.argv[1], sys.argv[3:], sys.argv[2])"
        argv = [sys.executable, "-c", call, f"algos/{options.script}.py", f"{folder}/seen.json", "--run-dir", f"{folder}/run"]
        begun = time.time()
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        if not Path(folder, "seen.json").exists():
            sys.exit(f"{options.script} came to no first step:\n{done.stderr[-3000:]}")
        seen = json.loads(Path(folder, "seen.json").read_text())
    seen["lines"] = [[text.replace(folder, "runs"), cpu, clock - begun] for text, cpu, clock in seen["lines"]]
    return seen


def helped(options):
    """Seconds of the core that --help takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, f"algos/{options.script}.py", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(runs):
    """Runs -> [(what, [seconds, one a run])]: stages in their order, then packages, large ones first, small ones together."""
    own = [{(kind, name): seconds for kind, name, seconds in seen["own"]} for seen in runs]
    keys = dict.fromkeys(key for one in own for key in one)
    of = {key: [one.get(key, 0.0) for one in own] for key in keys}
    packages = sorted((k for k in keys if k[0] == "import"), key=lambda k: -statistics.median(of[k]))
    large = [k for k in packages if statistics.median(of[k]) >= LEAST]
    small = [k for k in packages if k not in large]
    found = [(START, of["stage", START])] + [(f"import: {name}", of["import", name]) for _, name in large]
    if small:
        found.append((f"import: {len(small)} other packages and modules", [sum(v) for v in zip(*(of[k] for k in small))]))
    return found + [(words, of["stage", words]) for words in (*STAGES.values(), STEP) if ("stage", words) in of]


def causes(runs, least=0.1):
    """Runs -> [(package, who asks for it, [seconds with all that it imports])] of those that take so long, large first."""
    of = [{(package, by): seconds for package, by, seconds in seen["asked"]} for seen in runs]
    found = [(*key, [one.get(key, 0.0) for one in of]) for key in dict.fromkeys(k for one in of for k in one)]
    return sorted((row for row in found if statistics.median(row[2]) >= least), key=lambda row: -statistics.median(row[2]))


def report(runs):
    """Markdown: what takes the seconds, who asks for the packages, and when the first line is on the screen."""
    from common.figures import markdown
    from tests.bench.__main__ import band

    text = markdown(["what", "seconds"], [[what, band(v)] for what, v in rows(runs)])
    text += "\n\n" + markdown(["package", "asked for by", "seconds with all that it imports"],
                              [[package, by, band(v)] for package, by, v in causes(runs)])  # fmt: skip
    first = [seen["lines"][0] for seen in runs]
    cpu, clock = band([cpu for _, cpu, _ in first]), band([clock for *_, clock in first])
    text += f"\n\nFirst line after {cpu} s of the core, {clock} s by the clock: {first[0][0][:40]!r}\n"
    return text + f"First step logged after {band([seen['whole'] for seen in runs])} s of the core."


def main(options):
    from tests.bench.__main__ import band, processor

    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    run(options)
    runs = [run(options) for _ in range(options.repeats)]
    asked = [helped(options) for _ in range(options.repeats)]
    text = f"{report(runs)} `--help` takes {band(asked)} s of it."
    print(text)
    if options.out:
        command = ("python -m tests.bench.start " + " ".join(sys.argv[1:])).strip()
        device, out = f"one core of {processor()}", Path(options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        record = dict(command=command, device=device, rows=rows(runs), causes=causes(runs),
                      lines=[r["lines"] for r in runs], first_step=[r["whole"] for r in runs], help=asked)  # fmt: skip
        out.with_suffix(".json").write_text(json.dumps(record) + "\n")
        out.with_suffix(".md").write_text(f"`{command}` on {device}\n\n{text}\n")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
