"""Whole runs of scripts, each in a process of its own and on its own cores."""

import ast
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor

from common import ROOT


def code(script):
    """Digest of what makes a run: the script and all of common/, with the folders in it."""
    digest = hashlib.sha256()
    for path in (ROOT / "algos" / f"{script}.py", *sorted((ROOT / "common").rglob("*.py"))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def lesson(script, text=None):
    """Digest of a script's own code, without comments, docstrings and blank lines: what it computes, as far as the script says.
    `text`: of an earlier version."""
    text = (ROOT / "algos" / f"{script}.py").read_text() if text is None else text
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    kept = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def cores():
    """The CPU cores of this process; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def complete(script, arguments, folder, share):
    """A script to its end, its run folder made anew -> what subprocess.run() gives. `share`: the set of cores
    it may use; empty or None: all."""
    if folder.exists():
        shutil.rmtree(folder)
    return python([f"algos/{script}.py", *arguments, "--run-dir", str(folder)], share)


def python(words, share):
    """Python with these arguments, from the root -> what subprocess.run() gives."""
    pin = (lambda: os.sched_setaffinity(0, share)) if share else None
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, preexec_fn=pin)


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
