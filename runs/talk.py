"""Ask a model, and see at every token of its answer how likely the model itself held it.

python -m runs.talk tiny --task route                                      a prompt per line, until an empty one
python -m runs.talk runs/grpo-1-20260101-120000 --prompt "40>72:" --n 4    the last checkpoint of a run
python -m runs.talk qwen2.5-0.5b-instruct --temperature 0                  through its chat template

A token's colour is its probability at the temperature of the sampling, by the engine that drew it: red is unlikely. Where there
are no colours (a file, a pipe, NO_COLOR), a token that was less likely than one half has it behind it, like 7[0.32].
"""

import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from algos import grpo
from common import UserError, encoding, engines, gpu, models, settings, tasks
from common.worlds import tiny

SURE = (248, 105, 107), (255, 225, 125), (110, 195, 125)  # red, yellow, green, for 0, 0.5 and 1
ROOM = 4096  # tokens of a prompt that vLLM makes room for
SMALL = 10**7  # parameters: below, threads would only wait for each other


@dataclass
class Options:
    model: tyro.conf.Positional[str]
    """a run folder (its last checkpoint), a checkpoint or any other model folder, tiny, an alias, or a hub id"""
    task: str | None = None
    """the built-in task that tiny is warm-started on; other models need none"""
    prompt: str | None = None
    """ask this and end; None: ask what is typed"""
    n: int = 1
    """answers to a prompt"""
    temperature: float = 1.0
    """of the sampling; 0: the likeliest token, one answer, and the probabilities of temperature 1"""
    max_new_tokens: int | None = None
    """longest answer; None: that of the run or of the task, else the preset's"""
    raw: bool = False
    """leave the tokenizer's chat template out"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    seed: int = 1
    """of the sampling, with the number of the prompt"""


def open_model(name, **flags):
    """A model to be read and sampled, not trained -> (args as a script has them, config, tokenizer, policy). `flags`: fields of
    args; None becomes the preset's, but dtype is as stored, unless in 16 bits, and a completion ends where it did in the run
    that a checkpoint lies in. Raises UserError as a script does."""
    args = grpo.Args(model=models.locate(name), optimizer="adamw_sr", **flags)  # there is none, but adamw refuses bfloat16
    folder, longest = Path(args.model), args.max_new_tokens
    if args.model not in tiny.SHAPES:
        stored = str(models.architecture(args)[0].dtype or torch.float32).removeprefix("torch.")
        args.dtype = stored if stored in ("float32", "float64") else None
        with contextlib.suppress(OSError, ValueError, LookupError):
            ran = json.loads((folder.parents[1] / "config.json").read_text())["args"]
            args.stop, longest = tuple(ran.get("stop", ())), longest or ran["max_new_tokens"]
    args, config = settings.resolve(args)
    # The preset's, too long for a small model, must leave a prompt some of its positions.
    args.max_new_tokens = longest or min(args.max_new_tokens, config.max_position_embeddings // 2)
    device = gpu.init(args)
    policy = models.load(args, device, trainable=False)
    if device.type == "cpu" and sum(p.numel() for p in policy.parameters()) < SMALL:
        torch.set_num_threads(1)
    return args, config, models.load_tokenizer(args), policy


def encode(text, tokenizer, raw=False):
    """Token ids of a prompt, through the chat template where there is one, unless raw. Raises UserError where there are none,
    or unknown ones."""
    ids = (encoding.tokenize if raw else encoding.prompt_ids)([text], tokenizer, "the prompt")[0]
    if not ids:
        raise UserError(f"the tokenizer makes no tokens of the prompt {text!r}")
    return ids


def pieces(ids, tokenizer):
    """What each token adds to the text of them all. Of a character made of several tokens only the last one adds it."""
    out, done = [], 0
    for i in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:i], clean_up_tokenization_spaces=False)
        whole = i == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        out.append(text[done:] if whole else "")
        done = len(text) if whole else done
    return out


def in_colour():
    """Whether stdout is a terminal whose user has nothing against colours (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def tint(share, stops):
    """The colour at `share` (0 to 1) of the way along the stops -> (red, green, blue), 0 to 255 each."""
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(stops[i], stops[i + 1]))


def harmless(text):
    """A model's words, with nothing in them that a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def painted(texts, shares, stops):
    """Texts on grounds of their colours (see tint), for a terminal."""
    out = ""
    for text, share in zip(texts, shares):
        on = "\x1b[30;48;2;{};{};{}m".format(*tint(share, stops))
        out += on + harmless(text).replace("\n", f"\N{RETURN SYMBOL}\x1b[0m\n{on}") + "\x1b[0m"
    return out


def bracketed(texts, shares):
    """Texts, with what is less than one half behind them, for where there are no colours."""
    return "".join(harmless(t) + (f"[{x:.2f}]" if x < 0.5 else "") for t, x in zip(texts, shares))


def lines(prompt):
    """The one prompt, or what is typed until an empty line, the end of the input or Ctrl-C."""
    if prompt is not None:
        yield prompt
        return
    with contextlib.suppress(EOFError):
        while line := input("> " if sys.stdin.isatty() else ""):
            if not sys.stdin.isatty():
                print("> " + harmless(line))
            yield line


def main(options):
    """Loads the model and answers. A prompt that cannot be read ends a --prompt; among several it is refused and the next one
    is asked for."""
    if options.n < 1 or not 0 <= options.temperature < math.inf:
        raise UserError("--n must be at least 1, and --temperature at least 0")
    if options.model in tiny.SHAPES and not options.task:
        known = tasks.worlds_with("demonstrations")
        raise UserError(f"{options.model} needs --task, the task that it is warm-started on: {known}")
    flags = {name: getattr(options, name) for name in ("task", "engine", "seed", "max_new_tokens")}
    args, config, tokenizer, policy = open_model(options.model, **flags)
    room, longest = min(config.max_position_embeddings, ROOM + args.max_new_tokens), args.max_new_tokens
    engine, colour = engines.make_engine(policy, tokenizer, args, room), in_colour()
    marks = [0.0, 0.25, 0.5, 0.75, 1.0]
    legend = painted([f" {p} " for p in marks], marks, SURE) if colour else "in [brackets] where below 0.5"
    print(f"probability of a token: {legend}", flush=True)
    refusal = contextlib.suppress(UserError) if options.prompt is None else contextlib.nullcontext()
    n = options.n if options.temperature else 1
    with contextlib.closing(engine), contextlib.suppress(KeyboardInterrupt):
        for number, line in enumerate(lines(options.prompt)):
            with refusal:
                ids = encode(line, tokenizer, options.raw)
                if len(ids) + longest > room:
                    raise UserError(f"a prompt of {len(ids)} tokens and --max-new-tokens {longest} exceed {room} positions")
                seeds = [gpu.hash_seed(options.seed, number)]
                for tokens, logp, ended in engine.generate([ids], n, longest, options.temperature, seeds):
                    texts, p = pieces(tokens, tokenizer), [math.exp(x) for x in logp]
                    said = painted(texts, p, SURE) if colour else bracketed(texts, p)
                    print(said + ("" if ended else f" (cut after {longest} tokens)"), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
