"""Tasks: where prompts come from, what a right answer is, and what a tiny model's warm start is made of."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import os
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError, answers, reason, rewards

WORLDS = sorted(p.stem for p in (Path(__file__).parent / "worlds").glob("*.py") if p.stem not in ("__init__", "tiny"))
CHAT_TEMPLATE = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
HELD_OUT = 512


@dataclass
class Example:
    """One prompt. `id` is stable over epochs and runs: seeds and statistics per prompt may rely on it."""

    id: int
    prompt: str
    answer: str
    ids: list = field(default_factory=list)  # token ids of the prompt, template included


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


def worlds_with(what):
    """Names, with commas, of the worlds that have demonstrations, or pairs: HAS in their files."""
    return ", ".join(n for n in WORLDS if what in getattr(importlib.import_module(f"common.worlds.{n}"), "HAS", ()))


def source(args):
    """What the script's prompts or pairs come from: its --task or its --data; None for a script with neither."""
    return getattr(args, "task", None) or getattr(args, "data", None)


def _prompt_and_answer(row, where):
    """An object with the fields prompt and answer, or their like -> (prompt, answer). UserError, with where it stands."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: needs an object with prompt and answer")
    for prompt, answer in (("prompt", "answer"), ("question", "answer"), ("problem", "solution")):
        if row.get(prompt) is not None and row.get(answer) is not None:
            return str(row[prompt]), str(row[answer])
    raise UserError(f"{where}: needs the fields prompt and answer (or question and answer), has {sorted(row)}")


def read_rows(path, parse):
    """A .jsonl file -> (rows to train on, those held out or None: a sibling test.jsonl of a train.jsonl), each parse(object,
    "file:line"). Raises UserError with file and line."""
    folder, name = os.path.split(path)
    sibling, rows = os.path.join(folder, name.replace("train", "test")), []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(parse(json.loads(line), f"{path}:{number}"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file {path}: {error}") from None
    return rows, read_rows(sibling, parse)[0] if "train" in name and os.path.exists(sibling) else None


def read_hub(repository, advice, parts=(None,)):
    """A repository's data sets on the Hugging Face hub, one per configuration in `parts`. Raises UserError with advice."""
    import datasets

    try:
        return [datasets.load_dataset(repository, part) for part in parts]
    except Exception as error:
        raise UserError(f"data set {repository} could not be had from the hub ({reason(error)}); {advice}") from None


def from_hub(name, repository, parts):
    """A task whose rows are those of a repository on the hub, with its own split."""
    data = read_hub(repository, f"for {name} give a local file with prompt/answer fields: --task path/to/train.jsonl", parts)
    rows = ([_prompt_and_answer(row, f"{name} {s}") for part in data for row in part[s]] for s in ("train", "test"))
    return from_rows(name, *rows)


def from_rows(name, train, test, n_test=HELD_OUT, check=answers.maths, template=CHAT_TEMPLATE):
    """Rows (prompt, answer) -> Task. Without held-out rows (None) a fifth is held out, n_test at most."""
    if test is None:
        order = random.Random(0).sample(range(len(train)), len(train))
        held = set(order[: min(n_test, len(train) // 5)])
        test, train = ([row for i, row in enumerate(train) if (i in held) == side] for side in (True, False))
    if not train or not test:
        raise UserError(f"task {name}: needs at least 5 rows to train on some and hold some out")
    examples = [Example(i, *row) for i, row in enumerate(train + test[:n_test])]
    return Task(name, examples[: len(train)], examples[len(train) :], check, template=template)


def load(name, tokenizer=None, prompt_template=None, system_prompt=None, reward=None):
    """The task called `name`: a world (addition[:digits], gsm8k, reasoning_gym:<name>, ...) or a .jsonl file, with token
    ids where there is a tokenizer; checked by the function of a file, where `reward` is file.py:function. Raises UserError on
    an unknown name, with the nearest."""
    task = world(name)
    if task is None and not name.endswith((".jsonl", ".json")) and not os.path.exists(name):
        known = [*WORLDS, "path/to/file.jsonl"]
        near = difflib.get_close_matches(name, known, 3, 0.3)
        raise UserError(f"unknown task {name!r}; nearest: {', '.join(near or known)}; known: {', '.join(known)}")
    task = task or from_rows(name, *read_rows(name, _prompt_and_answer))
    if reward:
        task = dataclasses.replace(task, check=rewards.Own(reward), inline=False, measure="score")
    return task if tokenizer is None else encode(task, tokenizer, prompt_template, system_prompt)


def tokenize(texts, tokenizer, what, **kwargs):
    """Token ids of texts. Raises UserError where the tokenizer has only its word for the unknown for a character or word."""
    ids, unknown = tokenizer(texts, **kwargs)["input_ids"], tokenizer.unk_token_id
    for text, row in zip(texts, ids):
        if unknown in row and unknown not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            parts = [("character", c) for c in text] + [("word", w) for w in text.split()]
            strange = [p for p in parts if unknown in tokenizer(p[1], add_special_tokens=False)["input_ids"]]
            if strange and tokenizer.unk_token not in text:
                kind, part = strange[0]
                raise UserError(f"{what}: the tokenizer does not know the {kind} {part!r} of {text[:60]!r}")
    return ids


def fill(template, prompts):
    """The prompts inside a template, a Python format string. UserError where {prompt} is not its one field."""
    try:
        if {name for _, name, _, _ in string.Formatter().parse(template)} - {None} != {"prompt"}:
            raise ValueError(repr(template))
        return [template.format(prompt=prompt) for prompt in prompts]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--prompt-template needs the field {{prompt}} and no other ({error})") from None


def encode(task, tokenizer, prompt_template=None, system_prompt=None):
    """The task with `ids` filled in for every example, through the chat template where the tokenizer has one, behind a turn
    of the system where there is a system_prompt. `prompt_template` is a Python format string with the one field {prompt}."""
    examples = task.train + task.test + task.shown
    texts = fill(prompt_template or task.template, [e.prompt for e in examples])
    if tokenizer.chat_template:
        first = [dict(role="system", content=system_prompt)] if system_prompt else []
        turns = [[*first, dict(role="user", content=t)] for t in texts]
        try:
            texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's own, and what a template raises
            raise UserError(f"the tokenizer's chat template refuses the prompts: {reason(error)}") from None
        if first and texts and system_prompt not in texts[0]:
            raise UserError("--system-prompt: the tokenizer's chat template leaves the system's turn out")
    elif system_prompt:
        raise UserError("--system-prompt: the tokenizer has no chat template to put it in; --prompt-template takes any text")
    ids = tokenize(texts, tokenizer, f"task {task.name}", add_special_tokens=not tokenizer.chat_template)
    for example, row in zip(examples, ids):
        example.ids = row
    return task
