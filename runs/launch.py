"""Whole runs of scripts, each in a process of its own and on its own cores."""

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from common import ROOT


def code(script):
    """Digest of what makes a run: the script and all of common/, with the folders in it."""
    digest = hashlib.sha256()
    for path in (ROOT / "algos" / f"{script}.py", *sorted((ROOT / "common").rglob("*.py"))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cores():
    """The CPU cores of this process; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def complete(script, arguments, folder, share):
    """A script to its end, its run folder made anew -> what subprocess.run() gives. `share`: the set of cores
    it may use; empty or None: all."""
    if folder.exists():
        shutil.rmtree(folder)
    command = [sys.executable, f"algos/{script}.py", *arguments, "--run-dir", str(folder)]
    pin = (lambda: os.sched_setaffinity(0, share)) if share else None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=pin)


def last_line(text):
    """The last line of what a process printed."""
    return (text.strip().splitlines() or ["no message"])[-1]


def spread(work, jobs, shares):
    """Yields work(*job, share) for every job, in order; at any time, each share of the cores has one job."""
    free = list(shares)

    def one(job):
        share = free.pop()
        try:
            return work(*job, share)
        finally:
            free.append(share)

    with ThreadPoolExecutor(len(free)) as pool:
        yield from pool.map(one, jobs)
