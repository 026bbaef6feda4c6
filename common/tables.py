"""Tables: what files and the hub hold, what a row may be, what is held out."""

import functools
import json
import math
import os
import random
from pathlib import Path

import huggingface_hub

from common import UserError, gpu, reason

HELD_OUT = 512
PICTURES = ("image", "images", "video")
FIELDS = ("prompt", "answer"), ("question", "answer"), ("problem", "answer"), ("problem", "solution")


def conversation(value):
    """Whether a value of a row is messages {role, content}, of text."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip


def without_pictures(row, where):
    """A row of a file, as it is. UserError where it has what a script of text would leave out."""
    if seen := [name for name in PICTURES if isinstance(row, dict) and row.get(name)]:
        raise UserError(f"{where}: has the field {seen[0]}, and this script reads no pictures")
    return row


def prompt_and_answer(row, where):
    """An object with the fields prompt and answer, or their like -> (prompt, answer, where). UserError, with its place."""
    if not isinstance(without_pictures(row, where), dict):
        raise UserError(f"{where}: needs an object with prompt and answer")
    for name, reply in FIELDS:
        prompt, answer = row.get(name), row.get(reply)
        if prompt is None or answer is None:
            continue
        said = prompt[-1]["content"] if conversation(prompt) and prompt[-1]["role"] != "assistant" else prompt
        if not isinstance(said, str) or not said.strip():
            what = "text, or messages of which the last is not the assistant's"
            raise UserError(f"{where}: {name} must be {what}, is {prompt!r:.60}")
        several = answer if isinstance(answer, list) else [answer]
        plain = [isinstance(a, (str, int, float)) and not isinstance(a, bool) and bool(str(a).strip()) for a in several]
        if not several or not all(plain):
            what = "text or a number, or a list of those that are right"
            raise UserError(f"{where}: {reply} must be {what}, is {answer!r:.60}")
        return prompt, tuple(map(str, several)) if isinstance(answer, list) else str(answer), where
    raise UserError(f"{where}: needs the fields prompt and answer (or question and answer), has {sorted(row)}")


def _object(text, where):
    """What a piece of JSON says. UserError where it says nothing that could be a row."""

    def number(written):
        if not math.isfinite(float(written)):
            raise ValueError(f"{written} is no number")
        return float(written)

    try:
        value = json.loads(text, parse_constant=number, parse_float=number)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({reason(error)})") from None


def read_rows(path, parse):
    """A .jsonl file, or a JSON array -> (rows to train on, those held out or None: a sibling test.jsonl of a train.jsonl), each
    parse(object, "file:line", or "file[number]" in an array). Raises UserError with file and line."""
    folder, name = os.path.split(path)
    sibling = os.path.join(folder, name.replace("train", "test"))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file {path}: {error}") from None
    if text.lstrip()[:1] == "[":
        found = [(row, f"{path}[{i}]") for i, row in enumerate(_object(text, path))]
    else:
        lines = [(line, f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        found = [(_object(line, where), where) for line, where in lines]
    rows = [parse(row, where) for row, where in found]
    return rows, read_rows(sibling, parse)[0] if "train" in name and os.path.exists(sibling) else None


def split(train, test, n_test=HELD_OUT):
    """Rows (prompt, ...) to train on and held out (None: a fifth of the prompts becomes that, n_test at most) -> both, without
    a prompt in common: what is held out is not trained on."""
    keys = [json.dumps(row[0]) for row in train]
    if test is None:
        prompts = list(dict.fromkeys(keys))
        held = set(random.Random(0).sample(prompts, min(n_test, len(prompts) // 5)))
        test = [row for key, row in zip(keys, train) if key in held]
    else:
        held = {json.dumps(row[0]) for row in test}
        twice = sum(key in held for key in keys)
        if twice and gpu.rank() == 0:
            print(f"note: {twice:,} rows are not trained on: their prompts are held out as well", flush=True)
    return [row for key, row in zip(keys, train) if key not in held], test


@functools.cache
def ask_hub(repository, kind="model"):
    """Asks the hub for a repository, once and briefly: where no answer comes, this process does without it from now on, since
    whatever loads from there would go on asking for half a minute."""
    try:
        huggingface_hub.HfApi().repo_info(repository, repo_type=kind, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # an answer
    except Exception:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def read_hub(repository, advice, parts=(None,)):
    """A repository's data sets on the Hugging Face hub, one per configuration in `parts`. Raises UserError with advice."""
    import datasets

    ask_hub(repository, "dataset")
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        return [datasets.load_dataset(repository, part) for part in parts]
    except Exception as error:
        raise UserError(f"data set {repository} could not be had from the hub ({reason(error)}); {advice}") from None
