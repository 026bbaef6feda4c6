"""Pictures of single methods; see __main__."""

from types import SimpleNamespace

from common import UserError, engines, gpu, models, rewards, settings, tasks, vision
from runs import compare, launch

SEEDS = (1, 2, 3)


def start(script, **flags):
    """What a script begins with, by its own defaults -> args, tokenizer, task, policy, engine, scorer. `script`: the module."""
    args, config = settings.resolve(script.Args(engine="hf", **flags))
    gpu.init(args)
    tokenizer = models.load_tokenizer(args)
    task, policy = tasks.load(args.task, tokenizer), models.load(args, gpu.device())
    engine = engines.make_engine(policy, tokenizer, args, models.check_context(config, task, args))
    scorer = rewards.Scorer(task.check, inline=task.inline)
    return SimpleNamespace(args=args, tokenizer=tokenizer, task=task, policy=policy, engine=engine, scorer=scorer)


def sighted(script, **flags):
    """As start(), of a script that reads pictures."""
    args, config = settings.resolve(script.Args(engine="hf", **flags))
    gpu.init(args)
    reader = vision.load_processor(args, args.image_tokens)
    task, pictures = vision.load(args, reader)
    policy = vision.look(models.load(args, gpu.device()), task, pictures)
    engine = engines.make_engine(policy, reader.tokenizer, args, models.check_context(config, task, args))
    scorer = rewards.Scorer(task.check, inline=task.inline)
    return SimpleNamespace(args=args, tokenizer=reader.tokenizer, task=task, policy=policy, engine=engine, scorer=scorer)


def rows(script, flags, name, seed):
    """A file, <name>.jsonl, of a run that runs.compare has made, by its script, its flags in the folder's name and its seed.
    UserError where there is none."""
    folder = "-".join([script, str(seed), *([flags] if flags else [])])
    path = launch.ROOT / "runs" / "compare" / folder / f"{name}.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing: the comparisons of runs/reference/README.md make it")
    return compare.rows_of(path)


def metrics(script, flags=""):
    """[rows of metrics.jsonl] of every seed."""
    return [rows(script, flags, "metrics", seed) for seed in SEEDS]


def columns(runs, x, *ys):
    """Rows of metrics of some runs -> {name: [[(x, y)] a run]} for pictures.curve; x: a metric's name, or None for the step."""
    return {
        y: [[(row["step"] if x is None else row[x], row[y]) for row in rows if row[y] == row[y]] for rows in runs] for y in ys
    }
