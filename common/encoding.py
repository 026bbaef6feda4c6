"""Encoding: prompt templates, chat templates, token ids of prompts, what ends a response."""

import contextlib
import string

from common import UserError, reason


def tokenize(texts, tokenizer, where, **kwargs):
    """Token ids of texts. where: a name for all or a list of one for each. Raises UserError, naming it, where the tokenizer has
    only its word for the unknown for a character or word."""
    if not texts:
        return []
    ids, unknown = tokenizer(texts, **kwargs)["input_ids"], tokenizer.unk_token_id
    for i, (text, row) in enumerate(zip(texts, ids)):
        if unknown in row and unknown not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            parts = [("character", c) for c in text] + [("word", w) for w in text.split()]
            strange = [p for p in parts if unknown in tokenizer(p[1], add_special_tokens=False)["input_ids"]]
            if strange and tokenizer.unk_token not in text:
                kind, part = strange[0]
                what = where if isinstance(where, str) else where[i]
                raise UserError(f"{what}: the tokenizer does not know the {kind} {part!r} of {text[:60]!r}")
    return ids


def turn_end(tokenizer):
    """The token that ends a response: what the chat template writes behind the assistant's words, else the end of sequence."""
    with contextlib.suppress(Exception):  # no template, or one that refuses this: see prompt_ids
        said = [dict(role="user", content="?"), dict(role="assistant", content="§")]
        behind = tokenizer.apply_chat_template(said, tokenize=False).rpartition("§")[2]
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        return next(i for i in ids if i in tokenizer.added_tokens_decoder)
    return tokenizer.eos_token_id


def prompt_ids(prompts, tokenizer, where, system_prompt=None):
    """Token ids of prompts, text or messages each, through the chat template where the tokenizer has one, behind a turn of the
    system where there is a system_prompt. where: as in tokenize, for what is refused."""
    places = [where] * len(prompts) if isinstance(where, str) else where
    first, texts = [dict(role="system", content=system_prompt)] if system_prompt else [], []
    if first and not tokenizer.chat_template:
        raise UserError("--system-prompt: the tokenizer has no chat template to put it in; --prompt-template takes any text")
    for prompt, place in zip(prompts, places, strict=True):
        turns = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
        if first and turns[0]["role"] == "system":
            raise UserError(f"{place}: begins with a system turn of its own, and there is --system-prompt")
        if not tokenizer.chat_template:
            texts.append("\n\n".join(m["content"] for m in turns))
            continue
        try:
            text = tokenizer.apply_chat_template(first + turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's own, and what a template raises
            raise UserError(f"{place}: the tokenizer's chat template refuses the prompt: {reason(error)}") from None
        if first and system_prompt.strip() not in text:
            raise UserError("--system-prompt: the tokenizer's chat template leaves the system's turn out")
        texts.append(text)
    ids = tokenize(texts, tokenizer, where, add_special_tokens=not tokenizer.chat_template)
    end, word = tokenizer.eos_token_id, tokenizer.eos_token  # which some tokenizers add to every text
    return [row[:-1] if row[-1:] == [end] and not text.endswith(word) else row for row, text in zip(ids, texts)]


def response_ids(texts, tokenizer, where, most):
    """Token ids of responses, each with its one end (turn_end), cut to `most`; [] of an empty text."""
    end = turn_end(tokenizer)
    ids = tokenize(texts, tokenizer, where, add_special_tokens=False)
    if ids and any(tokenizer.convert_ids_to_tokens(row[:1])[0].startswith("\u2581") for row in ids if row):
        # SentencePiece puts a blank before a text, which none has behind a prompt; behind a line break it puts none.
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        behind = tokenizer(["\n" + text for text in texts], add_special_tokens=False)["input_ids"]
        ids = [b[len(line) :] if b[: len(line)] == line else row for b, row in zip(behind, ids)]
    for row in ids:
        while row and row[-1] in (end, tokenizer.eos_token_id):
            row.pop()
    return [(row + [end])[:most] if row else [] for row in ids]


def fill(template, prompts):
    """The prompts inside a template, a Python format string. UserError where {prompt} is not its one field."""
    try:
        fields = [field for _, *field in string.Formatter().parse(template) if field[0] is not None]
        if not fields or any(field != ["prompt", "", None] for field in fields):
            raise ValueError(repr(template))
        return [template.format(prompt=prompt) for prompt in prompts]
    except ValueError as error:
        raise UserError(f"--prompt-template needs the field {{prompt}} and no other ({error})") from None
