"""Every script as it starts without any argument: its last line, how long it takes, how it ends.

python -m runs.defaults                       all of algos/, to runs/reference/defaults.{json,md}
python -m runs.defaults grpo sapo --jobs 1

Each runs on one core, with its run folder under runs/defaults. A script that ended well is not run again,
unless its code (the script, or common/) has changed since. The exit code is 1 where one of them failed.
"""

import json
import sys
import time
from dataclasses import dataclass

import tyro

from common import UserError
from runs import launch

HEAD = """`python -m runs.defaults`: every script without arguments, seed 1, each on one CPU core.
The seconds are the whole command's, with the tiny model's warm start where a script is the first to need it.

| script | last line | seconds | exit code |
|---|---|---|---|
"""


@dataclass
class Options:
    scripts: tyro.conf.Positional[tuple[str, ...]] = ()
    """scripts in algos/; none: all"""
    jobs: int = 2
    """runs at a time, at most one for each core"""


def run(script, share):
    """One default run -> its row: last line (of stderr, where it failed), seconds, exit code, digest."""
    code, start = launch.code(script), time.monotonic()
    done = launch.complete(script, [], launch.ROOT / "runs" / "defaults" / script, share)
    seconds = round(time.monotonic() - start, 1)
    last = launch.last_line(done.stderr if done.returncode else done.stdout)
    row = dict(last_line=last, seconds=seconds, exit_code=done.returncode, code=code)
    print(line(script, row), flush=True)
    return row


def line(script, row):
    """A row as a line of the table."""
    said = row["last_line"].replace("|", "\\|")
    return f"| [{script}](../../algos/{script}.py) | {said} | {row['seconds']:.0f} | {row['exit_code']} |"


def write(rows, folder):
    """defaults.json and defaults.md."""
    rows = dict(sorted(rows.items()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "defaults.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "defaults.md").write_text(HEAD + "".join(line(*item) + "\n" for item in rows.items()))


def main(options):
    """-> the exit code."""
    folder = launch.ROOT / "runs" / "reference"
    known = sorted(p.stem for p in (launch.ROOT / "algos").glob("*.py") if p.stem != "__init__")
    unknown = [script for script in options.scripts if script not in known]
    if unknown:
        raise UserError(f"no script algos/{unknown[0]}.py; there are: {', '.join(known)}")
    if options.jobs < 1:
        raise UserError("--jobs must be at least 1")
    old = folder / "defaults.json"
    rows = json.loads(old.read_text()) if old.exists() else {}
    rows = {script: row for script, row in rows.items() if script in known}
    chosen = list(dict.fromkeys(options.scripts)) or known
    good = {script for script, row in rows.items() if not row["exit_code"]}
    todo = [s for s in chosen if s not in good or rows[s]["code"] != launch.code(s)]
    shares = [{core} for core in launch.cores()[: options.jobs]] or [None] * options.jobs
    write(rows, folder)
    for script, row in zip(todo, launch.spread(run, [(script,) for script in todo], shares)):
        rows[script] = row
        write(rows, folder)  # now, so that what is done stays done
    failed = [script for script in chosen if rows[script]["exit_code"]]
    kept = len(chosen) - len(todo)
    print(f"{len(todo)} run, {kept} not changed since; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
