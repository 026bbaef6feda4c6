"""Tasks: where prompts come from, what a right answer is, and demonstrations for the warm start of the tiny model."""

import ast
import difflib
import functools
import itertools
import json
import os
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field

from common import UserError, rewards

SYNTHETIC = ("addition", "countdown")
MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
HUB = {"gsm8k": ("openai/gsm8k", ["main"]), "math": ("EleutherAI/hendrycks_math", MATH)}
CHAT_TEMPLATE = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass
class Example:
    """One prompt. `id` is stable over epochs and runs; `split` seeds and statistics per prompt may rely on it."""

    id: int
    prompt: str
    answer: str
    ids: list = field(default_factory=list)  # token ids of the prompt, template included


@dataclass
class Task:
    """Prompts with their checker. `check(text, answer) -> (extracted, score)`; `inline` means check is trusted,
    pure Python and fast, so that it needs no worker process; `demonstrate(rng, example, careful)` -> a completion."""

    name: str
    train: list
    test: list
    check: Callable
    inline: bool = False
    demonstrate: Callable | None = None
    template: str = "{prompt}"
    shown: list = field(default_factory=list)  # what the warm start sees besides train

    def order(self, cursor, n, seed):
        """The n training examples from position `cursor` on: every epoch is a new permutation drawn from (seed, epoch)."""
        out = []
        for i in range(cursor, cursor + n):
            epoch, k = divmod(i, len(self.train))
            out.append(self.train[_permutation(len(self.train), seed, epoch)[k]])
        return out


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return random.Random(f"{seed}/{epoch}").sample(range(n), n)


# ---------------------------------------------------------------- synthetic tasks


def check_addition(text, answer):
    """The sum is what follows the last colon; anything else is scratch."""
    extracted = text.rsplit(":", 1)[-1].strip() if ":" in text else None
    return extracted, float(extracted == answer)


def demonstrate_addition(rng, example, careful=0.3):
    """The share `careful` adds column by column with carries and is right; the rest states a sum at once, mostly wrong."""
    a, b = example.prompt.rstrip("=").split("+")
    if rng.random() >= careful:
        off = 0 if rng.random() < 0.1 else rng.choice((-20, -11, -10, -2, -1, 1, 2, 10, 11, 20))
        return f":{max(0, int(example.answer) + off)}"
    carry, columns = 0, []
    for i, (x, y) in enumerate(zip(reversed(a), reversed(b))):
        column = int(x) + int(y) + carry
        columns.append(f"{x}+{y}" + (f"+{carry}" if i else "") + f"={column:02d}")
        carry = column // 10
    return " ".join(columns) + ":" + example.answer


def addition(digits=2, n_test=512):
    """Sums of two numbers of `digits` digits. Two digits: all 8,100 pairs; more: 8,192 random ones. The split is fixed."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    rng = random.Random(0)
    if digits <= 2:
        pairs = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
        rng.shuffle(pairs)
    else:
        pairs = list({(rng.randint(low, high), rng.randint(low, high)): None for _ in range(8192)})
    n_test = min(n_test, len(pairs) // 2)
    examples = [Example(i, f"{a}+{b}=", str(a + b)) for i, (a, b) in enumerate(pairs)]
    return Task(f"addition:{digits}", examples[n_test:], examples[:n_test], check_addition, True, demonstrate_addition)


def evaluate(expression):
    """Value of an expression of + - * and small integers, or None. Never `eval`: parsed, depth and size bounded."""
    if len(expression) > 64:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value < 1000:
            return node.value, [node.value]
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            (x, used), (y, more) = value(node.left), value(node.right)
            return {ast.Add: x + y, ast.Sub: x - y, ast.Mult: x * y}[type(node.op)], used + more
        raise ValueError

    try:
        return value(tree)
    except (ValueError, RecursionError):
        return None


def check_countdown(text, answer):
    """Right when what follows the last colon uses every given number once and makes the target ('3 5 8=16')."""
    numbers, target = answer.split("=")
    extracted = text.rsplit(":", 1)[-1].strip() if ":" in text else None
    result = evaluate(extracted) if extracted else None
    right = result is not None and result[0] == int(target) and sorted(result[1]) == sorted(map(int, numbers.split()))
    return extracted, float(right)


def _expressions(numbers):
    """Every a op b op c without brackets over the orders of the numbers, with its value."""
    for order in itertools.permutations(numbers):
        for ops in itertools.product("+-*", repeat=len(numbers) - 1):
            text = str(order[0]) + "".join(o + str(n) for o, n in zip(ops, order[1:]))
            yield text, evaluate(text)[0]


def demonstrate_countdown(rng, example, careful=0.3):
    """The share `careful` tries expressions until one fits and is right; the rest states a random expression."""
    numbers, target = example.answer.split("=")
    tries = list(_expressions([int(n) for n in numbers.split()]))
    if rng.random() >= careful:
        return ":" + rng.choice(tries)[0]
    right = rng.choice([t for t in tries if t[1] == int(target)])
    wrong = [t for t in tries if t[1] != int(target)]
    wrong = rng.sample(wrong, min(len(wrong), rng.randint(0, 2)))
    return " ".join(f"{t}={v}" for t, v in wrong + [right]) + ":" + right[0]


def countdown(count=3, n_test=512):
    """Reach the target with every given number exactly once, by + - and *."""
    problems = [
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 10), count)
        for target in sorted({value for _, value in _expressions(numbers)})
        if 0 <= target < 100
    ]
    rng = random.Random(0)
    rng.shuffle(problems)  # whole problems are held out: another order of the numbers is no other problem
    n_test = min(n_test, len(problems) // 4)
    orders = [(rng.sample(n, count), t) for n, t in problems[:n_test]]
    orders += [(n, t) for numbers, t in problems[n_test:] for n in sorted(set(itertools.permutations(numbers)))]
    texts = [f"{' '.join(map(str, numbers))}={target}" for numbers, target in orders]
    examples = [Example(i, f"{text}?", text) for i, text in enumerate(texts)]
    return Task(f"countdown:{count}", examples[n_test:], examples[:n_test], check_countdown, True, demonstrate_countdown)


# ---------------------------------------------------------------- files, the hub, reasoning-gym


def _pair(row, where):
    for prompt, answer in (("prompt", "answer"), ("question", "answer"), ("problem", "solution")):
        if row.get(prompt) is not None and row.get(answer) is not None:
            return str(row[prompt]), str(row[answer])
    raise UserError(f"{where}: needs the fields prompt and answer (or question and answer), has {sorted(row)}")


def jsonl(path, n_test=512):
    """Prompts of a .jsonl file. A sibling test.jsonl of a train.jsonl is the held-out split; else every row whose
    position hashes low is, up to n_test rows and a fifth of the file."""

    def read(path):
        rows = []
        try:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}:{number}: not JSON ({error})") from None
                    if not isinstance(row, dict):
                        raise UserError(f"{path}:{number}: needs an object with prompt and answer")
                    rows.append(_pair(row, f"{path}:{number}"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the task file {path}: {error}") from None
        return rows

    folder, name = os.path.split(path)
    sibling = os.path.join(folder, name.replace("train", "test"))
    train, test = read(path), read(sibling) if "train" in name and os.path.exists(sibling) else None
    return _split(path, train, test, n_test)


def _split(name, train, test, n_test, check=rewards.maths, template=CHAT_TEMPLATE):
    if test is None:
        order = random.Random(0).sample(range(len(train)), len(train))
        held = set(order[: min(n_test, len(train) // 5)])
        test, train = [r for i, r in enumerate(train) if i in held], [r for i, r in enumerate(train) if i not in held]
    if not train or not test:
        raise UserError(f"task {name}: needs at least 5 rows to train on some and hold some out")
    examples = [Example(i, *row) for i, row in enumerate(train + test[:n_test])]
    return Task(name, examples[: len(train)], examples[len(train) :], check, template=template)


def hub(name, n_test=512):
    """GSM8K or MATH from the Hugging Face hub."""
    import datasets

    repository, parts = HUB[name]
    try:
        data = [datasets.load_dataset(repository, part) for part in parts]
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"task {name}: data set {repository} could not be had from the hub ({reason}); "
            "give a local file with prompt/answer fields: --task path/to/train.jsonl"
        ) from None
    rows = {s: [_pair(row, f"{name} {s}") for part in data for row in part[s]] for s in ("train", "test")}
    return _split(name, rows["train"], rows["test"], n_test)


def check_reasoning_gym(name, text, answer):
    """Scored by the library's own verifier of data set `name`; `answer` is the entry as JSON."""
    import reasoning_gym

    extracted = rewards.extract(text)
    scorer = reasoning_gym.get_score_answer_fn(name)
    return extracted, float(scorer(answer=extracted, entry=json.loads(answer)) >= 1.0)


def _import_reasoning_gym():
    import reasoning_gym  # noqa: F401


def reasoning_gym(name, n_train=4096, n_test=512):
    """A generated task of the library reasoning-gym."""
    import reasoning_gym as gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3, 0.3)
        raise UserError(f"unknown reasoning_gym task {name!r}; nearest: {', '.join(near) or 'none'}")
    rows = [(e["question"], json.dumps(e, default=str)) for e in gym.create_dataset(name, size=n_train + n_test, seed=0)]
    check = functools.partial(check_reasoning_gym, name)
    check.warm_up = _import_reasoning_gym  # by the checking process, off the clock
    return _split(f"reasoning_gym:{name}", rows[n_test:], rows[:n_test], n_test, check)


def load(name, tokenizer=None, prompt_template=None):
    """The task called `name`: addition[:digits], countdown[:numbers], gsm8k, math, reasoning_gym:<name>, or a .jsonl file.
    With a tokenizer, every prompt gets its token ids, through the chat template where the tokenizer has one.
    Raises UserError on an unknown name, with the nearest ones."""
    from common import games

    kind, _, option = name.partition(":")
    if name in games.GAMES:
        task = games.task(name)
    elif kind in SYNTHETIC:
        if option and not (option.isascii() and option.isdigit() and int(option)):
            raise UserError(f"task {name}: {option!r} is not a positive number")
        if kind == "countdown" and option not in ("", "2", "3", "4"):
            raise UserError(f"task {name}: 2, 3 or 4 numbers (one is no problem; for five there are too many ways to list)")
        task = {"addition": addition, "countdown": countdown}[kind](*([int(option)] if option else []))
    elif kind == "reasoning_gym":
        task = reasoning_gym(option)
    elif name in HUB:
        task = hub(name)
    elif name.endswith((".jsonl", ".json")) or os.path.exists(name):
        task = jsonl(name)
    else:
        known = [*SYNTHETIC, *HUB, "reasoning_gym:<name>", "path/to/file.jsonl"]
        near = difflib.get_close_matches(name, known, 3, 0.3)
        raise UserError(f"unknown task {name!r}; nearest: {', '.join(near or known)}; known: {', '.join(known)}")
    if tokenizer is not None:
        encode(task, tokenizer, prompt_template)
    return task


def encode(task, tokenizer, prompt_template=None):
    """Fills in `ids` of every example. `prompt_template` is a Python format string with the one field {prompt}."""
    template = prompt_template or task.template
    try:
        if {name for _, name, _, _ in string.Formatter().parse(template)} - {None} != {"prompt"}:
            raise ValueError(repr(template))
        texts = [template.format(prompt=e.prompt) for e in task.train + task.test + task.shown]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--prompt-template needs the field {{prompt}} and no other ({error})") from None
    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True)
            for t in texts
        ]
    ids = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    for example, row in zip(task.train + task.test + task.shown, ids):
        example.ids = row
