"""The central claim of every paper, tried in miniature: what runs/claims.toml says, judged by one rule.

python -m runs.claims                      all of them: runs/reference/claims.{json,md}
python -m runs.claims sapo steer           these; what the record has of the others stays
python -m runs.claims --recorded           runs nothing: what is recorded counts, also of earlier code, which the table marks
python -m runs.claims sapo --fresh         from runs alone, whatever is recorded

What is in claims.json, or in the record in runs/reference that a claim names, is taken from there if it has the same arms, as
many seeds, and scripts that compute the same (launch.lesson: their code without comments; common/ is held to its own tests).
What is missing is run as runs.compare runs it, two at a time; a command that was cut short does only what is left.

The rule is runs.compare's: a difference of means counts from the claim's margin on, outside both spans over the seeds, and,
where there are two warm starts, on both. A claim of `higher` or `lower` holds where the method differs so from the baseline;
one of `equal` (nothing is lost) where it is worse on none of them. What rests on a control has to beat that as well.
"""

import json
import re
import statistics
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import ROOT, UserError
from common.figures import markdown
from runs import compare, launch

FIELDS = "claim arms first rows row file panel metric better beats margin flags record why".split()
VERDICTS = HOLDS, NONE, OTHER, UNTRIED = "holds here", "no difference here", "the other way round here", "not tried"
HEAD = """`python -m runs.claims`: the sentence of each paper in [claims.toml](../claims.toml), its arms, and what came out.
Differences are method less baseline: the mean over the seeds and the 95% bootstrap interval of the paired differences, of each
warm start. Minutes are of all runs of a claim, one after the other, on a core each (two at a time take half). †: the code of a
script has changed since; `python -m runs.claims` makes the numbers anew. What does not hold here may at the paper's size.

"""


@dataclass
class Options:
    slugs: tyro.conf.Positional[tuple[str, ...]] = ()
    """scripts that claims.toml has; none: all"""
    seeds: int = 3
    """seeds 1 to this"""
    jobs: int = 2
    """runs at a time, each on its own share of the cores"""
    recorded: bool = False
    """run nothing: runs that are finished, then what is recorded, whatever has changed since"""
    fresh: bool = False
    """take nothing that is recorded"""
    out: str = "runs/reference/claims"
    """numbers (.json) and table (.md), without ending"""


def load(path=ROOT / "runs" / "claims.toml"):
    """{slug: claim} as claims.toml has it, with `starts`: its arms or rows, a list for each warm start. UserError where a claim
    cannot be judged."""
    claims = tomllib.loads(path.read_text())
    for slug, c in claims.items():
        wrong = sorted(c.keys() - set(FIELDS))
        if wrong:
            raise UserError(f"{path.name}: {slug} has {wrong[0]}, which is none of {', '.join(FIELDS)}")
        arms = c.get("rows") or c.get("arms") or []
        c["starts"] = arms if arms and isinstance(arms[0], list) else [arms]
        if "why" in c:
            continue
        if c.get("better") not in ("higher", "lower", "equal") or "metric" not in c or min(map(len, c["starts"])) < 2:
            raise UserError(f"{path.name}: {slug} needs a metric, a baseline and a method, and better = higher, lower or equal")
        if "beats" in c and c["beats"] not in c["starts"][0]:
            raise UserError(f"{path.name}: {slug} is to beat {c['beats']}, which is no arm of it")
    return claims


def everything(claim):
    """Baseline, method and controls of all warm starts, in order."""
    return [arm for start in claim["starts"] for arm in start]


def items(slug, claim):
    """What runs.compare has to run for a claim, what others need first."""
    runs = claim.get("arms") or ([] if "panel" in claim else [slug])
    return [*claim.get("first", []), *(x for arm in runs for x in (arm if isinstance(arm, list) else [arm]))]


def scripts(slug, claim):
    """{script: digest} of what a claim's numbers come from."""
    return compare.lessons([*items(slug, claim), *([slug] if "panel" in claim else [])])


def kept(slug, claim, options):
    """What claims.json has of a claim for the same arms, metric and seeds, or None."""
    path = Path(f"{options.out}.json")
    old = json.loads(path.read_text())["claims"].get(slug, {}) if path.exists() else {}
    same = list(old.get("arms", {})) == everything(claim) and old.get("metric") == claim["metric"]
    return old if same and old["seeds"] == options.seeds else None


def recorded(slug, claim, options):
    """The same out of the record in runs/reference that a claim names."""
    path = ROOT / "runs" / "reference" / f"{claim.get('record')}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if "row" in claim:
        found = {arm: of["table"][claim["row"]].get(claim["metric"]) for arm, of in record["results"].items()}
        found = {arm: found.get(arm) for arm in everything(claim)}
    elif "rows" in claim:
        table = record["results"][slug]["table"]
        found = {arm: table.get(arm, {}).get(claim["metric"]) for arm in everything(claim)}
    else:
        found = {arm: record["summary"].get(arm, {}).get(claim["metric"], {}).get("seeds") for arm in everything(claim)}
    if not all(values and len(values) >= options.seeds for values in found.values()):
        return None
    arms = {arm: values[: options.seeds] for arm, values in found.items()}
    return dict(arms=arms, seconds=None, source=path.name, lessons=record.get("lessons", {}))


def tried(slug, claim, options):
    """The same from runs, which are made where they are missing. UserError where one fails."""
    extra, names = claim.get("flags", "").split(), list(dict.fromkeys(items(slug, claim)))
    first = [item for item in names if item in claim.get("first", [])]
    how, folders = compare.Options(seeds=options.seeds, jobs=options.jobs), {}
    for some in (first, [item for item in names if item not in first]):  # the first before those that start from them
        folders |= compare.each(compare.run, some, how, extra) if some else {}
    seconds = [taken(folder) for of in folders.values() for folder in of]
    if "panel" in claim:
        looks = compare.each(looked, [slug], how, [])[slug]
        tables, seconds = [table for table, _ in looks], [*seconds, *(took for _, took in looks)]
        arms = {row: [table[row][claim["metric"]] for table in tables] for row in everything(claim)}
    elif "file" in claim:
        of = [json.loads((folder / claim["file"]).read_text()) for folder in folders[claim["arms"][0]]]
        arms = {row: [inside(data, row.split("."))[claim["metric"]] for data in of] for row in everything(claim)}
    elif "row" in claim:
        of = {arm: [json.loads((folder / "results.json").read_text()) for folder in folders[arm]] for arm in everything(claim)}
        arms = {arm: [found["table"][claim["row"]][claim["metric"]] for found in some] for arm, some in of.items()}
    elif "rows" in claim:
        tables = [json.loads((folder / "results.json").read_text())["table"] for folder in folders[slug]]
        arms = {row: [table[row][claim["metric"]] for table in tables] for row in everything(claim)}
    else:
        kind = compare.kind(names[-1])
        arms = {arm: compare.summary(folders[arm], kind)[claim["metric"]]["seeds"] for arm in everything(claim)}
    return dict(arms=arms, seconds=None if None in seconds else sum(seconds), source="runs", lessons=scripts(slug, claim))


def looked(slug, seed, extra, share):
    """-> (what arms(seed) of a panel gives, seconds)."""
    begun = time.monotonic()
    done = launch.python(["-m", "runs.panels", slug, "--seed", str(seed), "--arms"], share)
    if done.returncode:
        raise UserError(f"the panel of {slug} with seed {seed} failed: {launch.last_line(done.stderr)}")
    return json.loads(launch.last_line(done.stdout)), time.monotonic() - begun


def taken(folder):
    """Seconds that a run took, as its mark says, or None."""
    found = re.search(r"^([\d.]+) seconds$", (folder / "done").read_text(), re.M)
    return float(found[1]) if found else None


def inside(data, names):
    """What lies in nested dicts."""
    return inside(data[names[0]], names[1:]) if names else data


def there(slug, claim, options):
    """Are all runs of a claim finished, by today's code? What a panel looks at is looked at anew, so that its are not."""
    if "panel" in claim:
        return False
    pairs = [(item, seed) for item in items(slug, claim) for seed in range(1, options.seeds + 1)]
    return bool(pairs) and all(compare.finished(compare.place(*pair, claim.get("flags", "").split())[0]) for pair in pairs)


def numbers(slug, claim, options):
    """Where a claim's numbers come from -> dict(arms, seconds, source, lessons), or None where nothing may be run."""
    ways = [] if options.fresh else [found for found in (kept(slug, claim, options), recorded(slug, claim, options)) if found]
    now = scripts(slug, claim)
    good = [found for found in ways if now.items() <= found["lessons"].items()]
    if good:
        return good[0]
    if options.recorded and not there(slug, claim, options):
        return ways[0] if ways else None
    return tried(slug, claim, options)


def judged(claim, arms):
    """{arm: a number per seed} -> dict(starts, controls, verdict, note), by the rule above."""
    sign, margin = -1 if claim["better"] == "lower" else 1, claim.get("margin", compare.MARGIN)

    def word(*pairs):
        return compare.verdict(*[[[sign * x for x in arms[arm]] for arm in pair] for pair in pairs], margin=margin)

    said, words = [], []
    for base, method, *_ in claim["starts"]:
        said.append(dict(baseline=base, method=method, **compare.difference(arms[method], arms[base])))
        words.append(word((method, base)))
    whole = word(*[(method, base) for base, method, *_ in claim["starts"]])
    controls = [
        dict(item=control, **compare.difference(arms[start[1]], arms[control]), word=word((start[1], control)))
        for start in claim["starts"]
        for control in start[2:]
    ]
    good = "worse" not in words if claim["better"] == "equal" else whole == "better"
    verdict = HOLDS if good else OTHER if whole == "worse" else NONE
    rests = next((c["word"] for c in controls if c["item"] == claim.get("beats")), "better")
    if verdict == HOLDS and rests != "better":
        verdict = OTHER if rests == "worse" else NONE
    note = f"{' and '.join(words)} on the two warm starts" if len(set(words)) > 1 else ""
    if rests != "better":
        note = "; ".join([*([note] if note else []), f"{rests} against {claim['beats']}, which it has to beat"])
    return dict(starts=said, controls=controls, verdict=verdict, note=note)


def entry(slug, claim, found, seeds):
    """What claims.json says of a claim."""
    said = dict(claim=claim["claim"], metric=claim.get("metric", ""), better=claim.get("better", ""), seeds=seeds)
    if found is None:
        why = claim.get("why", "nothing is recorded: python -m runs.claims " + slug)
        said |= dict(arms={}, starts=[], controls=[], verdict=UNTRIED, note="", seconds=None, source="", changed=[])
        return said | dict(why=why)
    now = scripts(slug, claim)
    changed = [script for script in now if found["lessons"].get(script) != now[script]]
    said |= {name: found[name] for name in ("arms", "seconds", "source", "lessons")}
    return said | judged(claim, found["arms"]) | dict(why="", changed=changed)


def signed(of):
    """A difference and its interval as text."""
    interval = "" if of["low"] is None else f" ({of['low']:+.3f} to {of['high']:+.3f})"
    return f"{of['mean']:+.3f}{interval}"


def row(slug, of):
    """A claim as cells of the table."""
    name = f"[{slug}](../../algos/{slug}.py)"
    if not of["arms"]:
        return [name, of["claim"], "", "", f"**{of['verdict']}**: {of['why']}", "", ""]

    def arm(item):
        return f"`{item}` {statistics.mean(of['arms'][item]):.3f}"

    pairs = "; ".join(f"{arm(s['baseline'])} → {arm(s['method'])}" for s in of["starts"])
    controls = "; ".join(f"{arm(c['item'])}: {c['word']}, {c['mean']:+.3f}" for c in of["controls"])
    verdict = f"**{of['verdict']}**" + ("†" if of["changed"] else "") + (f" ({of['note']})" if of["note"] else "")
    minutes = "" if of["seconds"] is None else f"{of['seconds'] / 60:.0f}"
    metric = f"{of['metric']} ({of['better']})"
    return [name, of["claim"], f"{metric}: {pairs}", "; ".join(map(signed, of["starts"])), verdict, controls, minutes]


def counted(entries):
    """{verdict: how many claims}."""
    said = [of["verdict"] for of in entries.values()]
    return {verdict: said.count(verdict) for verdict in VERDICTS}


def sentence(counts):
    """The counts in words, as README has them."""
    holds, none, other, untried = (counts[verdict] for verdict in VERDICTS)
    said = f"Of {sum(counts.values())} claims, {holds} hold here, {none} make no difference, {other} go the other way round"
    return said + (f"; {untried} were not tried." if untried else ".")


def write(entries, out):
    """claims.json and claims.md."""
    counts = counted(entries)
    record = dict(command="python -m runs.claims", counts=counts, claims=entries)
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(record, indent=1) + "\n")
    heads = ["paper", "claim", "baseline → method", "difference", "verdict", "the method against its controls", "minutes"]
    Path(f"{out}.md").write_text(f"{HEAD}{sentence(counts)}\n\n{markdown(heads, [row(*x) for x in entries.items()])}\n")


def main(options):
    claims, out = load(), Path(options.out)
    unknown = [slug for slug in options.slugs if slug not in claims]
    if unknown:
        raise UserError(f"claims.toml has no {unknown[0]}; it has: {', '.join(claims)}")
    if min(options.seeds, options.jobs) < 1 or (options.recorded and options.fresh):
        raise UserError("--seeds and --jobs must be at least 1, and --recorded and --fresh exclude each other")
    path = Path(f"{out}.json")
    entries = json.loads(path.read_text())["claims"] if path.exists() else {}
    for slug in options.slugs or claims:
        claim = claims[slug]
        found = None if "why" in claim else numbers(slug, claim, options)
        entries[slug] = entry(slug, claim, found, options.seeds)
        entries = {name: entries[name] for name in claims if name in entries}
        write(entries, out)  # now, so that what is done stays done
        print(f"{slug}: {entries[slug]['verdict']} ({entries[slug]['source'] or entries[slug]['why']})", flush=True)
    print(sentence(counted(entries)))
    print(f"wrote {out}.md and {out}.json")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
