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

from common import ROOT, UserError, reason
from common.figures import markdown
from runs import compare, launch

FIELDS = "claim arms first rows row file panel metric better beats margin flags record why".split()
VERDICTS = HOLDS, NONE, OTHER, UNTRIED = "holds here", "no difference here", "the other way round here", "not tried"
HEAD = """`python -m runs.claims`: the sentence of each paper in [claims.toml](../claims.toml), its arms, and what came out,
judged by one rule. A difference counts where the means are 0.03 or more apart (or a claim's own margin) and the spans over the
seeds do not overlap, on every warm start; all else is *no difference here*, however it looks. What does not hold here may at a
paper's size.

Differences are method less baseline: the mean over the seeds and the 95% bootstrap interval of the paired differences, of each
warm start. Minutes are of all runs of a claim, one after the other, on a core each (two at a time take half); *recorded*: of a
family's section. †: the code of a script has changed since; `python -m runs.claims` makes the numbers anew.

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


def asked(claim):
    """What decides the numbers of an arm, besides the arm: another claim's, or an older one's, are not taken for it."""
    return {name: claim.get(name) for name in ("metric", "flags", "first", "row", "file", "panel", "record")}


def kept(slug, claim, options):
    """{arm: numbers} that claims.json has of a claim, and its entry: the one at --out, else the one in runs/reference."""
    for out in (options.out, ROOT / "runs" / "reference" / "claims"):
        old = entries_of(out).get(slug, {})
        if old.get("arms") and old["asked"] == asked(claim) and old["seeds"] >= options.seeds:
            return {arm: values[: options.seeds] for arm, values in old["arms"].items()}, old
    return {}, {}


def training(flags):
    """The flags that touch more than the evaluation, in order."""
    return sorted(word for word in re.findall(r"--\S+(?: [^-]\S*)*", flags or "") if not word.startswith("--eval"))


def recorded(slug, claim, options):
    """{arm: numbers} of the record in runs/reference that a claim names, and its digests."""
    path = ROOT / "runs" / "reference" / f"{claim.get('record')}.json"
    if not path.exists():
        return {}, {}
    record = json_of(path)
    if training(record["command"].partition(" -- ")[2]) != training(claim.get("flags")):
        raise UserError(f"claims.toml: {slug} has other flags than the command of {path.name}")
    if "row" in claim:
        found = {arm: of["table"].get(claim["row"], {}).get(claim["metric"]) for arm, of in record["results"].items()}
    elif "rows" in claim:
        found = {row: of.get(claim["metric"]) for row, of in record["results"][slug]["table"].items()}
    else:
        found = {arm: of.get(claim["metric"], {}).get("seeds") for arm, of in record["summary"].items()}
    enough = {arm: v[: options.seeds] for arm, v in found.items() if v and len(v) >= options.seeds}
    return {arm: values for arm, values in enough.items() if arm in everything(claim)}, record.get("lessons", {})


def tried(slug, claim, options, missing):
    """The numbers of the arms that are missing, from runs, which are made unless they are there. UserError where one fails."""
    extra, first = claim.get("flags", "").split(), claim.get("first", [])
    runs = missing if missing and "rows" not in claim and "panel" not in claim else items(slug, claim)
    how, folders = compare.Options(seeds=options.seeds, jobs=options.jobs), {}
    for some in (first, [item for item in dict.fromkeys(runs) if item not in first]):  # the first before what starts from them
        folders |= compare.each(compare.run, some, how, extra) if some else {}
    seconds = [taken(folder) for of in folders.values() for folder in of]
    if "panel" in claim:
        looks = compare.each(looked, [slug], how, [])[slug]
        seconds += [took for _, took in looks]
        arms = {row: [table[row][claim["metric"]] for table, _ in looks] for row in everything(claim)}
    elif "file" in claim:
        of = [json_of(folder / claim["file"]) for folder in folders[claim["arms"][0]]]
        arms = {row: [inside(data, row.split("."))[claim["metric"]] for data in of] for row in everything(claim)}
    elif "row" in claim:
        of = {arm: [json_of(folder / "results.json")["table"] for folder in folders[arm]] for arm in missing}
        arms = {arm: [table[claim["row"]][claim["metric"]] for table in tables] for arm, tables in of.items()}
    elif "rows" in claim:
        tables = [json_of(folder / "results.json")["table"] for folder in folders[slug]]
        arms = {row: [table[row][claim["metric"]] for table in tables] for row in everything(claim)}
    else:
        arms = {arm: compare.summary(folders[arm], compare.kind(arm))[claim["metric"]]["seeds"] for arm in missing}
    return dict(arms=arms, seconds=None if None in seconds else sum(seconds), source="runs")


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
    return all(compare.finished(compare.place(*pair, claim.get("flags", "").split())[0]) for pair in pairs)


def known(slug, claim, options):
    """What is recorded of a claim's arms, by scripts that compute the same -> dict(arms, seconds, source, lessons)."""
    now, out = scripts(slug, claim), dict(arms={}, seconds=None, source="")
    if options.fresh:
        return out | dict(lessons=now)
    mine, old = kept(slug, claim, options)
    theirs, lessons = recorded(slug, claim, options)
    for arms, digests, how in (
        (theirs, lessons, dict(source=f"{claim.get('record')}.json", seconds=None)),
        (mine, old.get("lessons", {}), dict(source=old.get("source"), seconds=old.get("seconds"))),
    ):
        if arms and now.items() <= digests.items():
            out |= how | dict(arms=out["arms"] | arms)
    return out | dict(lessons=now)


def missing(claim, found):
    """The arms that have no numbers yet."""
    return [arm for arm in everything(claim) if arm not in found["arms"]]


def stale(slug, claim, options):
    """The same of earlier code, all arms of one source, or None."""
    mine, old = kept(slug, claim, options)
    theirs, lessons = recorded(slug, claim, options)
    ways = [dict(old, arms=mine), dict(arms=theirs, lessons=lessons, seconds=None, source=f"{claim.get('record')}.json")]
    return next((way for way in ways if not missing(claim, way)), None)


def numbers(slug, claim, options):
    """Where a claim's numbers come from -> dict(arms, seconds, source, lessons), or None where nothing may be run."""
    found = known(slug, claim, options)
    if left := missing(claim, found):
        if options.recorded and not there(slug, claim, options):
            return stale(slug, claim, options)
        made = tried(slug, claim, options, left)
        both = f"{found['source']} and runs" if found["arms"] else "runs"
        made |= dict(source=both, seconds=None if found["arms"] else made["seconds"])
        found |= made | dict(arms=found["arms"] | made["arms"])
    return found


def judged(claim, arms):
    """{arm: a number per seed} -> dict(starts, controls, verdict, note), by the rule above."""
    sign, margin = -1 if claim["better"] == "lower" else 1, claim.get("margin", compare.MARGIN)

    def word(*pairs):
        sides = [[[sign * x for x in arms[arm]] for arm in pair] for pair in pairs]
        return compare.verdict(*sides, margin=margin).partition(" (")[0]

    def against(method, other):
        return compare.difference(arms[method], arms[other])

    starts = [(method, base, others) for base, method, *others in claim["starts"]]
    said = [dict(baseline=base, method=method, **against(method, base)) for method, base, _ in starts]
    controls = [dict(item=x, **against(method, x), word=word((method, x))) for method, _, others in starts for x in others]
    words = [word((method, base)) for method, base, _ in starts]
    whole, note = word(*[(method, base) for method, base, _ in starts]), []
    verdict = HOLDS if whole == "better" else OTHER if whole == "worse" else NONE
    if claim["better"] == "equal" and whole != "worse":
        verdict = NONE if "worse" in words else HOLDS
    if len(set(words)) > 1:
        note.append(f"{' and '.join(words)} on the two warm starts" + ", so that it does not hold" * (verdict == NONE))
    if "beats" in claim:
        at = claim["starts"][0].index(claim["beats"])
        rests = word(*[(start[1], start[at]) for start in claim["starts"] if len(start) > at])
        if verdict == HOLDS and rests != "better":
            verdict = NONE
        if rests != "better":
            note.append(f"{rests} against {claim['beats']}, which it has to beat")
    return dict(starts=said, controls=controls, verdict=verdict, note="; ".join(note))


def entry(slug, claim, found, seeds):
    """What claims.json says of a claim."""
    said = dict(claim=claim["claim"], metric=claim.get("metric", ""), better=claim.get("better", ""))
    said |= dict(flags=claim.get("flags", ""), margin=claim.get("margin", compare.MARGIN), seeds=seeds, asked=asked(claim))
    if found is None:
        why = claim.get("why", "nothing is recorded: python -m runs.claims " + slug)
        said |= dict(arms={}, starts=[], controls=[], verdict=UNTRIED, note="", seconds=None, source="", changed=[])
        return said | dict(why=why)
    now = scripts(slug, claim)
    changed = [script for script in now if found["lessons"].get(script) != now[script]]
    said |= dict(arms={arm: found["arms"][arm] for arm in everything(claim)})
    said |= {name: found[name] for name in ("seconds", "source", "lessons")}
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
    pairs += f", all with `{of['flags']}`" if of["flags"] else ""
    controls = "; ".join(f"{arm(c['item'])}: {c['word']}, {c['mean']:+.3f}" for c in of["controls"])
    verdict = f"**{of['verdict']}**" + ("†" if of["changed"] else "") + (f" ({of['note']})" if of["note"] else "")
    minutes = "recorded" if of["seconds"] is None else f"{of['seconds'] / 60:.0f}"
    metric = f"{of['metric']} ({of['better']})"
    return [name, of["claim"], f"{metric}: {pairs}", "; ".join(map(signed, of["starts"])), verdict, controls, minutes]


def counted(entries):
    """{verdict: how many claims}."""
    said = [of["verdict"] for of in entries.values()]
    return {verdict: said.count(verdict) for verdict in VERDICTS}


def sentence(counts):
    """The counts in words, as README has them."""
    holds, none, other, untried = (counts[verdict] for verdict in VERDICTS)
    said = [f"{holds} hold{'s' * (holds == 1)} here", f"{none} show{'s' * (none == 1)} no difference here"]
    said.append(f"{other} go{'es' * (other == 1)} the other way round here")
    return f"Of {sum(counts.values())} claims, {', '.join(said)}" + (f"; {untried} not tried." if untried else ".")


def json_of(path):
    """What a file says. UserError where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def entries_of(out):
    """{slug: entry} of claims.json, if there is one. UserError where the file is of another kind."""
    path = Path(f"{out}.json")
    record = json_of(path) if path.exists() else dict(claims={})
    entries = record.get("claims") if isinstance(record, dict) else None
    rows = entries.values() if isinstance(entries, dict) else [None]
    if not all(isinstance(of, dict) and {"verdict", "asked"} <= of.keys() for of in rows):
        raise UserError(f"{path} is not what runs.claims writes: name another --out, or delete it")
    return entries


def write(entries, out):
    """claims.json and claims.md, each whole or not at all."""
    counts = counted(entries)
    record = dict(command="python -m runs.claims", counts=counts, claims=entries)
    heads = ["paper", "claim", "baseline → method", "difference", "verdict", "the method against its controls", "minutes"]
    page = f"{HEAD}{sentence(counts)}\n\n{markdown(heads, [row(*x) for x in entries.items()])}\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in dict(json=json.dumps(record, indent=1) + "\n", md=page).items():
        half = Path(f"{out}.{ending}.half")
        half.write_text(text, encoding="utf-8")
        half.replace(f"{out}.{ending}")


def main(options):
    claims, out = load(), Path(options.out)
    unknown = [slug for slug in options.slugs if slug not in claims]
    if unknown:
        raise UserError(f"claims.toml has no {unknown[0]}; it has: {', '.join(claims)}")
    if min(options.seeds, options.jobs) < 1 or (options.recorded and options.fresh):
        raise UserError("--seeds and --jobs must be at least 1, and --recorded and --fresh exclude each other")
    entries, slugs = entries_of(out), [s for s in dict.fromkeys(options.slugs or claims) if "why" not in claims[s]]
    todo = [s for s in slugs if missing(claims[s], known(s, claims[s], options))]
    if todo and not options.recorded:
        print(f"to be run, up to ten minutes each on two cores: {', '.join(todo)}", flush=True)
    for slug in options.slugs or claims:
        claim, old = claims[slug], entries.get(slug, {})
        found = None if "why" in claim else numbers(slug, claim, options)
        more = old.get("asked") == asked(claim) and (old.get("seeds", 0) > options.seeds or found is None)
        if old.get("arms") and more and not options.fresh:
            print(f"{slug}: stays as it is: {old['seeds']} seeds are recorded, {options.seeds} were asked for", flush=True)
            continue
        entries[slug] = entry(slug, claim, found, options.seeds)
        entries = {name: entries[name] for name in claims if name in entries}
        write(entries, out)  # now, so that what is done stays done
        print(f"{slug}: {entries[slug]['verdict']} ({entries[slug]['source'] or entries[slug]['why']})", flush=True)
    print(sentence(counted(entries)))
    print(f"wrote {out}.md and {out}.json")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
