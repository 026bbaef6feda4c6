"""Tasks: where prompts come from, what a right answer is, and what a tiny model's warm start is made of."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, answers, rewards
from common.encoding import fill, prompt_ids
from common.tables import HELD_OUT, prompt_and_answer, read_hub, read_rows, split

WORLDS = sorted(p.stem for p in (Path(__file__).parent / "worlds").glob("*.py") if not p.stem.startswith(("__init__", "tiny")))
CHAT_TEMPLATE = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass
class Example:
    """One prompt. `id` is stable over epochs and runs: seeds and statistics per prompt may rely on it."""

    id: int
    prompt: str | list  # text, or messages {role, content}
    answer: str | tuple  # of several any is right
    ids: list = field(default_factory=list)  # token ids of the prompt, template included
    where: str = ""  # file and line
    pictures: list = field(default_factory=list)  # see vision.encode


@dataclass
class Task:
    """Prompts with their checker, and, from `demonstrate` on, what a world has besides: a task, built in or a script's own,
    that a tiny model is warm-started on."""

    name: str
    train: list
    test: list
    check: Callable  # (text, answer) -> (extracted, score)
    inline: bool = False  # check is trusted, pure Python and fast, so that it needs no worker process
    demonstrate: Callable | None = None  # (rng, example, careful) -> a completion, careful or from habit
    template: str = "{prompt}"
    shown: list = field(default_factory=list)  # what the warm start sees besides train
    measure: str = "accuracy"  # what a score is called: accuracy, or score where it is a gold reward
    max_new_tokens: int | None = None  # what a right completion takes, and some room; None: the preset's
    recipe: dict = field(default_factory=dict)  # what the warm start does otherwise (worlds.tiny.RECIPE)
    shape: dict = field(default_factory=dict)  # fields of the tiny model's config
    tokenizer: Callable | None = None  # () -> the tiny model's tokenizer; None: one token per character
    makers: object = None  # module with config and warm_start of other tiny models than worlds.tiny's
    pair: Callable | None = None  # (rng, prompt) -> (chosen, rejected) or None, for preferences
    reward: Callable | None = None  # (prompt, text) -> the true reward
    worth: Callable | None = None  # (prompt, text) -> that of every character
    responses: Callable | None = None  # () -> every response there is, where they can be listed
    tier: Callable | None = None  # (example) -> how hard it is
    chance: Callable | None = None  # (example) -> how often a random completion is right

    def order(self, cursor, n, seed):
        """The n training examples from position `cursor` on: every epoch is a new permutation drawn from (seed, epoch)."""
        places = [divmod(i, len(self.train)) for i in range(cursor, cursor + n)]
        return [self.train[_permutation(len(self.train), seed, epoch)[k]] for epoch, k in places]


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


@functools.lru_cache(maxsize=4)
def _world(name):
    kind, _, option = name.partition(":")
    make = importlib.import_module(f"common.worlds.{kind}").task
    variants = inspect.signature(make).parameters
    if option and not variants:
        raise UserError(f"task {name}: {kind} has no variants")
    return make(option) if variants else make()


def world(name):
    """The built-in task of this name, `kind` or `kind:option`, made by common/worlds/<kind>.py; None where there is none."""
    if name is None or name.partition(":")[0] not in WORLDS:
        return None
    task = _world(name)  # made once; encode() writes into examples, so everyone gets examples of their own
    own = {part: [dataclasses.replace(e) for e in getattr(task, part)] for part in ("train", "test", "shown")}
    return dataclasses.replace(task, **own)


def warmed(warm, name):
    """What a tiny model is warm-started on: the Task `warm`, or what that, a function, makes of the name; else its world."""
    return warm(name) if callable(warm) else warm or world(name)


def worlds_with(what):
    """Names, with commas, of the worlds that have demonstrations, or pairs: HAS in their files."""
    return ", ".join(n for n in WORLDS if what in getattr(importlib.import_module(f"common.worlds.{n}"), "HAS", ()))


def source(args):
    """What the script's prompts or pairs come from: its --task or its --data; None for a script with neither."""
    return getattr(args, "task", None) or getattr(args, "data", None)


def from_hub(name, repository, parts):
    """A task whose rows are those of a repository on the hub, with its own split."""
    data = read_hub(repository, f"for {name} give a local file with prompt/answer fields: --task path/to/train.jsonl", parts)
    rows = ([prompt_and_answer(row, f"{name} {s}") for part in data for row in part[s]] for s in ("train", "test"))
    return from_rows(name, *rows)


def from_rows(name, train, test, n_test=HELD_OUT, check=answers.maths, template=CHAT_TEMPLATE):
    """Rows (prompt, answer, where it stands) -> Task; see split()."""
    train, test = split(train, test, n_test)
    if not train or not test:
        raise UserError(f"task {name}: needs at least 5 rows, of different prompts, to train on some and hold some out")
    rows = train + test[:n_test]
    examples = [Example(i, prompt, answer, where=where) for i, (prompt, answer, where) in enumerate(rows)]
    return Task(name, examples[: len(train)], examples[len(train) :], check, template=template)


def load(name, tokenizer=None, prompt_template=None, system_prompt=None, reward=None, parse=prompt_and_answer):
    """The task called `name`: a world (addition[:digits], gsm8k, reasoning_gym:<name>, ...) or a .jsonl file, with token
    ids where there is a tokenizer; checked by the function of a file, where `reward` is file.py:function. parse(row, where) ->
    (prompt, answer, where): what a file's rows say. Raises UserError on an unknown name, with the nearest."""
    task = world(name)
    if task is None and not name.endswith((".jsonl", ".json")) and not os.path.exists(name):
        known = [*WORLDS, "path/to/file.jsonl"]
        near = difflib.get_close_matches(name, known, 3, 0.3)
        raise UserError(f"unknown task {name!r}; nearest: {', '.join(near or known)}; known: {', '.join(known)}")
    task = task or from_rows(name, *read_rows(name, parse))
    if reward:
        task = dataclasses.replace(task, check=rewards.Own(reward), inline=False, measure="score")
    return task if tokenizer is None else encode(task, tokenizer, prompt_template, system_prompt)


def encode(task, tokenizer, prompt_template=None, system_prompt=None):
    """The task with `ids` filled in for every example (see prompt_ids). `prompt_template`: a format string with the field
    {prompt}; None is the task's. Messages come as they are, unless one is given: then it is for the last of them."""
    examples, prompts = task.train + task.test + task.shown, []
    for e in examples:
        if e.pictures:
            raise UserError(f"task {task.name}: its prompts have pictures, which this script does not read")
        if isinstance(e.prompt, str):
            prompts += fill(prompt_template or task.template, [e.prompt])
        else:
            last = fill(prompt_template or "{prompt}", [e.prompt[-1]["content"]])[0]
            prompts.append([*e.prompt[:-1], e.prompt[-1] | dict(content=last)])
    ids = prompt_ids(prompts, tokenizer, [e.where or f"task {task.name}" for e in examples], system_prompt)
    for example, row in zip(examples, ids):
        example.ids = row
    return task
