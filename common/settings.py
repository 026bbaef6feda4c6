"""Settings: what a flag that was left open becomes, what a flag may be, and what a resumed run keeps."""

import ast
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import torch
import tyro

from common import UserError, encoding, gpu, rewards, tasks
from common.worlds import tiny

# What a field of Args that was left at None becomes. TINY is the embedded default; the others are chosen by the number of
# parameters (in billions, up to and including). Rates: 1e-6 is the field's value for full fine-tuning of 1.5B to 32B (arXiv
# 2503.14476, 2507.18071, 2503.20783). A script's own tiny_preset and real_preset come on top.
TINY = dict(task="route", steps=120, prompts_per_step=32, group_size=8, minibatches=8, lr=1e-4, max_new_tokens=28,
            eval_every=20, checkpoint_every=20, dtype="float32", optimizer="adamw", gradient_checkpointing=False,
            micro_batch_tokens=16384)  # fmt: skip
REAL = TINY | dict(task="gsm8k", steps=200, prompts_per_step=128, minibatches=4, lr=1e-6, max_new_tokens=1024, dtype="bfloat16",
                   optimizer="adamw_sr", gradient_checkpointing=True, micro_batch_tokens=32768)  # fmt: skip
PRESETS = {
    1.0: REAL | dict(lr=2e-6, gradient_checkpointing=False, micro_batch_tokens=8192),
    4.0: REAL,
    9.0: REAL | dict(optimizer="adamw_8bit", micro_batch_tokens=16384),
    1e9: REAL | dict(optimizer="adamw_8bit", micro_batch_tokens=8192),
}
# On top of these, for scripts that have the field: those that learn from pairs, and from demonstrations. 5e-7: repository of
# arXiv 2305.18290; 1e-5: what full fine-tuning on demonstrations commonly takes.
KINDS = dict(pairs_per_step=(
    dict(data="letters", steps=150, pairs_per_step=48, lr=1e-4, max_new_tokens=12, checkpoint_every=50),
    dict(data="trl-lib/ultrafeedback_binarized", steps=900, pairs_per_step=64, lr=5e-7, checkpoint_every=300, eval_every=300)
), batch_size=(
    dict(task="addition", steps=60, batch_size=32, lr=3e-4), dict(steps=350, batch_size=64, lr=1e-5, eval_every=50)
))  # fmt: skip
# A number is finite and at least 0, unless these or Args.limits say otherwise: "0 < x <= 1", a reason after a colon.
COUNTS = """prompts_per_step pairs_per_step batch_size group_size minibatches epochs max_new_tokens micro_batch_tokens
            eval_prompts vllm_tp""".split()
LIMITS = dict.fromkeys(COUNTS, "1 <= x") | dict.fromkeys(["lora_alpha", "eval_temperature"], "0 < x")
LIMITS |= dict(vllm_memory="0 < x <= 1", careful="0 <= x <= 1")
LIMITS["temperature"] = "0 < x: a greedy policy has nothing to learn from"
LAST_SHARED = "micro_batch_tokens"  # field of Args; the method's own come behind it
MAY_CHANGE = """resume run_dir model steps eval_every eval_samples eval_temperature checkpoint_every engine vllm_memory vllm_tp
                micro_batch_tokens device tracker push_to_hub""".split()


def parse(cls, doc):
    """Args from the command line. --help says what the method is, the first part of a script's docstring, and its own flags
    before those that it shares; of a flag that is left open what its preset makes of it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    described = [(a, b) for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    words = {a.target.id: b.value.value for a, b in described}
    fields, hints = dataclasses.fields(cls), get_type_hints(cls)
    names = [f.name for f in fields]
    kinds = [preset for field, preset in KINDS.items() if field in names]
    presets = [TINY | (kinds[0][0] if kinds else {}) | getattr(cls, "tiny_preset", {})]
    presets += [PRESETS[4.0] | (kinds[0][1] if kinds else {}) | getattr(cls, "real_preset", {})]
    cut = names.index(LAST_SHARED) + 1 if LAST_SHARED in names else 0

    def flag(f):
        of = list(dict.fromkeys(str(preset[f.name]) for preset in presets if f.name in preset)) or ["none"]
        hint = f"(default: {of[0]} for tiny, else {of[1]})" if len(of) > 1 else f"(default: {of[0]})"
        arg = tyro.conf.arg(help=words.get(f.name), help_behavior_hint=hint if f.default is None else None)
        return f.name, Annotated[hints[f.name], arg], dataclasses.field(default=f.default)

    groups = {Path(sys.argv[0]).stem: fields[cut:], "shared": fields[:cut]}
    made = {title: dataclasses.make_dataclass(title, map(flag, some)) for title, some in groups.items() if some}
    both = [(title, tyro.conf.OmitArgPrefixes[kind], dataclasses.field(default_factory=kind)) for title, kind in made.items()]
    found = tyro.cli(dataclasses.make_dataclass("Flags", both), description=doc.partition("\nFamily:")[0])
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).stem}: loading transformers", flush=True)
    from transformers import utils  # without what takes it a second, for assisted decoding and boxes

    utils.is_sklearn_available = utils.is_scipy_available = lambda *_: False
    return cls(**{k: v for group in vars(found).values() for k, v in vars(group).items()})


def prepare(script, args, warm=None):
    """-> (args with every field filled in, the model's config or None, the device). Joins the process group, prints what
    will run. `warm`: what a tiny model is warm-started on, where that is not the task (see tasks.warmed)."""
    signal.signal(signal.SIGINT, stop_now)
    if args.resume:
        args = inherit(Path(script).stem, args)
    gpu.choose(vars(args).get("device", "auto"))
    default = {f.name: f.default for f in dataclasses.fields(args)}
    told = {"model", "task", "data", "steps", "seed"} | {k for k, v in vars(args).items() if v != default[k]}
    args, config = resolve(args, warm)
    device = gpu.init(args, small=bool(getattr(config, "warm_started_on", None)))  # a tiny model's checkpoint, too
    if gpu.rank() == 0:
        words = " ".join(f"{k}={v}" for k, v in vars(args).items() if k in told and v is not None)
        print(f"{Path(script).stem}: {words}; the rest is its preset's (config.json)", flush=True)
    return args, config, device


def stop_now(number, frame):
    """At Ctrl-C before a run has begun, or the second one during it: ends this process as a shell expects it."""
    print("stopped", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def resolve(args, warm=None):
    """Fills every field of `args` left at None from the preset of its model, and checks all of them against their limits.
    Returns (args, the model's transformers config; None for a script without the field model)."""
    from common import models  # takes seconds, which --help and a mistake in a flag need not wait for

    fields, config, size = vars(args), None, 0
    small, known = "model" not in fields or models.locate(args.model) in tiny.SHAPES, None
    if not small:
        config, size = models.architecture(args)
        known = getattr(config, "warm_started_on", None)  # a checkpoint of a tiny model
        small = known is not None
    preset = TINY if small else next(p for limit, p in PRESETS.items() if size / 1e9 <= limit)
    for field, kind in KINDS.items():
        preset = preset | (kind[not small] if field in fields else {})
    if preset["optimizer"] == "adamw_8bit" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        preset = preset | dict(optimizer="adamw_sr")  # sharded states need no 8 bits, and torchao's cannot be sharded
    emulated = gpu.device().type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if preset["dtype"] == "bfloat16" and emulated:  # a T4, a V100
        preset = preset | dict(dtype="float32", optimizer="adamw")
        if fields.get("dtype", "") is None and gpu.rank() == 0:
            print("note: this GPU has no bfloat16 of its own: --dtype float32, --optimizer adamw by default", flush=True)
    own = getattr(args, "tiny_preset" if small else "real_preset", {})
    source = "task" if "task" in fields else "data"
    own = own | ({source: known} if tasks.world(known) else {})
    world = tasks.warmed(warm, fields.get(source) or (preset | own).get(source)) if small else None
    length = dict(max_new_tokens=world.max_new_tokens) if world and world.max_new_tokens else {}
    for field, value in (preset | length | own).items():
        if field in fields and fields[field] is None:
            setattr(args, field, value)
    if small and "model" in fields:
        config, _ = models.architecture(args, warm)
    _check(args)
    return args, config


def _check(args):
    hints, limits = get_type_hints(type(args)), LIMITS | getattr(args, "limits", {})
    for field, value in vars(args).items():
        flag, hint = "--" + field.replace("_", "-"), hints.get(field)
        words = [w for h in (hint, *get_args(hint)) if get_origin(h) is Literal for w in get_args(h)]
        if words and value not in words:
            raise UserError(f"{flag} must be one of {', '.join(map(str, words))}; it is {value!r}")
        default = vars(type(args)).get(field)  # of a dataclass
        if value == () and isinstance(default, tuple) and any(isinstance(x, (int, float)) for x in default):
            raise UserError(f"{flag} needs a number at least")
        for x in value if isinstance(value, tuple) else (value,):
            if not isinstance(x, (int, float)) or isinstance(x, bool):
                continue
            limit, colon, why = limits.get(field, "0 <= x").partition(": ")
            low, above, below, high = re.fullmatch(r"(?:(\S+) (<=?) )?x(?: (<=?) (\S+))?", limit).groups()
            fits = math.isfinite(x)
            fits &= low is None or x > float(low) or above == "<=" and x == float(low)
            fits &= high is None or x < float(high) or below == "<=" and x == float(high)
            if not fits:
                words = [f"{'above' if above == '<' else 'at least'} {low}"] if low else []
                words += [f"{'below' if below == '<' else 'at most'} {high}"] if high else []
                raise UserError(f"{flag} must be {' and '.join(words) or 'finite'}, is {x}{colon}{why}")
    if vars(args).get("engine") == "vllm" and (needs := getattr(args, "hf_only", "")):
        raise UserError(f"--engine vllm: this script needs {needs}, which it is not given here; use --engine hf")
    if "" in vars(args).get("stop", ()):
        raise UserError("--stop: an empty string would end every completion at once")
    # What follows is seen here, and not when it is needed, since a tiny model's warm start takes a minute.
    if vars(args).get("reward"):
        rewards.Own(args.reward)
    if vars(args).get("prompt_template"):
        encoding.fill(args.prompt_template, [""])
    if place := vars(args).get("run_dir"):
        nearest = next(p for p in (Path(place), *Path(place).absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"cannot write to the run folder {place}: {nearest} is no folder that can be written to")
    if getattr(args, "dtype", None) == "bfloat16" and getattr(args, "optimizer", None) == "adamw":
        lost = "nearly every update of bfloat16 weights away (a step of 1e-6 is far below a weight's last bit)"
        raise UserError(f"--optimizer adamw would round {lost}; use adamw_sr, adamw_8bit, or --dtype float32")


def inherit(script, args):
    """A resumed run keeps its settings: what is given and differs from them is refused, unless it is in MAY_CHANGE."""
    folder = Path(args.resume)
    resumed = [p for p in folder.glob("config-resumed-*.json") if re.fullmatch(r"config-resumed-\d+", p.stem)]
    path = max(resumed, key=lambda p: int(p.stem.rpartition("-")[2]), default=folder / "config.json")
    try:
        before = json.loads(path.read_text())
        of, kept = before["script"], before["args"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--resume {args.resume}: no run there ({path} cannot be read)") from None
    if of != script:
        raise UserError(f"--resume {args.resume}: that is a run of {of}.py, not of {script}.py")
    flags = [re.match(r"--(?:no-)?([^=]*)", word) for word in sys.argv[1:]]
    typed = {flag[1].replace("-", "_") for flag in flags if flag}  # also where it is the default
    for f in dataclasses.fields(args):
        given, old = getattr(args, f.name), kept.get(f.name, f.default)
        old = tuple(old) if isinstance(old, list) else old
        if given == f.default and f.name not in ("resume", "run_dir", *typed):
            setattr(args, f.name, old)
        elif given != old and f.name not in MAY_CHANGE:
            change = f"--{f.name.replace('_', '-')} is {old} there, not {given}"
            raise UserError(f"--resume {args.resume}: {change}; a resumed run keeps its settings")
    return args
