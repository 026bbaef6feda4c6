"""Models: their names, tokenizers, loading, ends of a completion, context."""

import contextlib
import difflib
import os
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForImageTextToText
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from common import UserError, encoding, fit, foreign, gpu, reason, tables, tasks
from common.policy import Policy
from common.worlds import tiny

# Families and their sizes. The repository has the same name with capitals; the words math and size may also change places.
FAMILIES = {
    "qwen2.5-{} qwen2.5-{}-instruct": "0.5b 1.5b 3b 7b 14b 32b 72b",
    "qwen2.5-math-{} qwen2.5-math-{}-instruct": "1.5b 7b 72b",
    "qwen3-{} qwen3-{}-base": "0.6b 1.7b 4b 8b 14b 30b-a3b",
    "llama-{} llama-{}-instruct": "3.2-1b 3.2-3b 3.1-8b 3.1-70b",
    "qwen3-{}": "32b", "llama-{}-instruct": "3.3-70b",
}  # fmt: skip
NAMES = [f.format(size) for family, sizes in FAMILIES.items() for f in family.split() for size in sizes.split()]
ALIASES = {name: f"{'Qwen' if name.startswith('qwen') else 'meta-llama'}/{name.title()}" for name in NAMES}
ALIASES |= {f"qwen2.5-vl-{n}b": f"Qwen/Qwen2.5-VL-{n}B-Instruct" for n in (3, 7, 32, 72)}
ALIASES |= {f"qwen3-vl-{n}b": f"Qwen/Qwen3-VL-{n}B-Instruct" for n in (2, 4, 8, 32)} | foreign.NAMES
ALIASES |= {re.sub(r"(math)-([^-]+)", r"\2-\1", name): repository for name, repository in ALIASES.items()}


def locate(name):
    """`name` (a tiny model, alias, hub id, folder, or a run's folder: its last checkpoint) -> what transformers loads. Raises
    UserError with the nearest names."""
    steps = {int(m[1]): str(p) for p in Path(name).glob("checkpoints/*") if (m := re.fullmatch(r"step-(\d+)", p.name))}
    if steps:
        return steps[max(steps)]
    if (Path(name) / "metrics.jsonl").exists():
        raise UserError(f"the run {name} has no checkpoint yet")
    if name in tiny.SHAPES or os.path.isdir(name) or re.fullmatch(r"[^./][^/]*/[^/]+", name):
        return name
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    near = difflib.get_close_matches(name.lower(), [*tiny.SHAPES, *ALIASES], 4, 0.3)
    what = "no such folder" if "/" in name else "unknown model"
    near = f"nearest names: {', '.join(near)}; or " if near else ""
    raise UserError(f"{what} {name!r}; {near}give a hub id (owner/name) or a folder")


def _fetch(loader, name, **kwargs):
    try:
        if not os.path.isdir(name):
            tables.ask_hub(name)
        return loader.from_pretrained(name, **kwargs)
    except Exception as error:  # safetensors, tokenizers and torch have errors of their own for files that are damaged
        if os.path.isdir(name):
            raise UserError(f"cannot load a model from the folder {name}: {reason(error, 200)}") from None
        advice = "download it on a machine with network and give the folder: --model path/to/folder"
        raise UserError(f"model {name} could not be had from the hub ({reason(error)}); {advice}") from None


def auto(config):
    """What makes the model that a config describes."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _described(name):
    """A hub id or folder -> (config, what else from_pretrained has to be told)."""
    with contextlib.suppress(Exception):  # _fetch says what is wrong
        if not os.path.isdir(name):
            tables.ask_hub(name)
        if found := foreign.translate(name):
            return found[0], dict(config=found[0], key_mapping=found[1])
    return _fetch(AutoConfig, name), {}


def architecture(args, warm=None):
    """-> (transformers config, number of parameters) of `args.model`. UserError where Policy does not know its architecture."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    name = locate(args.model)
    if name in tiny.SHAPES:
        world = tasks.warmed(warm, tasks.source(args))
        config = ((world and world.makers) or tiny).config(name, world)
    else:
        config, _ = _described(name)
    try:
        with torch.device("meta"):
            lm = auto(config).from_config(config)
    except ValueError:  # no language model
        lm = None
    except Exception as error:  # a field that its code cannot do with
        raise UserError(f"model {args.model}: transformers cannot build what its config describes ({reason(error)})") from None
    if why := fit.unfit(lm, config, getattr(args, "sees", False)):
        raise UserError(f"model {args.model}: the architecture {config.model_type} {why}; Qwen, Llama and their like will do")
    return config, sum(p.numel() for p in lm.parameters())


def _folder(args, warm, fresh):
    """What from_pretrained loads for `args.model`; for a tiny model this makes the warm start, where it is not cached."""
    name = locate(args.model)
    if name not in tiny.SHAPES:
        return name
    source = tasks.source(args)
    world = tasks.warmed(warm, source) or vars(args).get("task") and not os.path.exists(source) and tasks.load(source)
    if not world or world.demonstrate is None:
        known = tasks.worlds_with("pictures" if getattr(args, "sees", False) else "demonstrations")
        raise UserError(f"the tiny model is warm-started on a built-in task ({known}); for {source} give --model")
    return (world.makers or tiny).warm_start(world, name, fresh=fresh)


def load_tokenizer(args, warm=None, fresh=False):
    """The tokenizer of `args.model`. `warm`: what a tiny model is warm-started on (tasks.warmed); `fresh`: without it."""
    name = _folder(args, warm, fresh)
    kind = None
    with contextlib.suppress(Exception):  # _fetch says what is wrong
        kind = get_tokenizer_config(name).get("tokenizer_class")
    # AutoTokenizer of transformers 5 would build a Qwen2Tokenizer for any Qwen2, around the splitting rule of another.
    own = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer = _fetch(PreTrainedTokenizerFast if own else AutoTokenizer, name, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {args.model}: its tokenizer has no end-of-sequence token")
    size = len(tokenizer)
    with contextlib.suppress(Exception):
        size = AutoConfig.from_pretrained(name).get_text_config().vocab_size
    for end in {tokenizer.eos_token_id, encoding.turn_end(tokenizer)}:
        if end >= size:
            raise UserError(f"model {args.model}: its end-of-sequence token {end} is none of its {size:,} tokens")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_tokens(lm, tokenizer):
    """Token ids that end a completion: the tokenizer's, the chat template's, and those of the model's generation settings."""
    also = getattr(lm.generation_config, "eos_token_id", None)
    also = also if isinstance(also, list) else [also]
    if not all(isinstance(end, int | None) for end in also):
        raise UserError(f"generation_config.json: eos_token_id is {also[0]!r}, and must be a token's number")
    return sorted({tokenizer.eos_token_id, encoding.turn_end(tokenizer), *also} - {None})


def load(args, device, trainable=True, warm=None, denoiser=False, fresh=False):
    """The Policy of `args.model`, with LoRA layers where args.lora_rank > 0; or, not trainable, a frozen copy of the start,
    for which args needs no fields but model and dtype. `warm`: as in load_tokenizer; `denoiser`: whether it is to be one that
    sees all positions; `fresh`: random weights, by args.seed."""
    name, dtype = _folder(args, warm, fresh), dict(dtype=getattr(torch, args.dtype))
    config, more = _described(name)
    if denoiser != (getattr(config, "is_causal", True) is False):
        which = ("a causal model", "one that sees all positions (is_causal=False)")
        raise UserError(f"model {args.model} is {which[not denoiser]}; this script needs {which[denoiser]}")
    lm, told = _fetch(auto(config), name, **dtype, output_loading_info=True, **more)
    if missing := sorted(told["missing_keys"]):  # transformers would make them up
        raise UserError(f"model {args.model}: {len(missing)} of its weights are in no file, the first of them {missing[0]}")
    if fresh:
        torch.manual_seed(args.seed)
        lm = auto(config).from_config(lm.config, **dtype)
    lm.config.use_cache = True
    for module in lm.modules():  # no ratio would be 1 on policy
        for name in [n for n, x in vars(module).items() if isinstance(x, float) and ("drop" in n or "jitter" in n or n == "p")]:
            setattr(module, name, 0.0)
    try:
        lm.generation_config.validate(strict=True)
    except ValueError:  # transformers would not save it with a checkpoint
        ends = lm.generation_config.eos_token_id
        lm.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=lm.config.pad_token_id)
    with torch.device("meta"):  # loading forgets what a model freezes: a bias that balances its experts
        frozen = {n for n, p in auto(config).from_config(lm.config).named_parameters() if not p.requires_grad}
    for name, weight in lm.named_parameters():
        weight.requires_grad_(trainable and not args.lora_rank and name not in frozen)
    if trainable and args.lora_rank:
        import peft

        names, alpha = args.lora_targets, 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
        if names != "all-linear":  # the head is not read as a layer (see Policy)
            known = {n.rpartition(".")[2] for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear)}
            names = [n.strip() for n in names.split(",")]
            if not known.issuperset(names):
                raise UserError(f"--lora-targets {args.lora_targets}: the model's layers are {', '.join(sorted(known))}")
        eyes = dict(exclude_modules=".*visual.*") if hasattr(config, "vision_config") else {}
        settings = peft.LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM", **eyes)
        settings.base_model_name_or_path = str(_folder(args, warm, fresh))
        lm = peft.inject_adapter_in_model(settings, lm)
        if gpu.world() > 1 and any(hasattr(m, "parameter_name") for m in lm.modules()):
            raise UserError(f"model {args.model}: LoRA on experts that are one parameter works on one process only")
    if trainable and args.gradient_checkpointing:
        if not lm.supports_gradient_checkpointing:
            raise UserError(f"model {args.model}: it has no gradient checkpointing (--gradient-checkpointing False)")
        lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    lm.train(trainable)
    policy = Policy(lm if gpu.world() > 1 else lm.to(device))  # sharding moves a layer at a time
    packs, why = gpu.gather_objects(fit.probe(policy) if gpu.rank() == 0 else None)[0]
    if why:
        raise UserError(f"model {args.model}: {why}")
    if not packs:
        policy.pad()
    return policy


def check_tokens(rows, config):
    """UserError where a row, (token ids, its name), has a token that the model has not."""
    size = config.get_text_config().vocab_size
    for ids, name in rows:
        if ids and max(ids) >= size:
            raise UserError(f"{name}: the tokenizer's token {max(ids)} is none of the model's {size:,}")


def check_context(config, task, args):
    """Positions that the longest prompt and completion need. Raises UserError where the model has fewer."""
    shortest, longest = (f(task.train + task.test, key=lambda e: len(e.ids)) for f in (min, max))
    if not shortest.ids:
        which = f"the prompt {shortest.prompt[:40]!r} of task {task.name}"
        raise UserError(f"model {args.model}: its tokenizer makes no tokens of {which}")
    check_tokens([(e.ids, f"the prompt {e.prompt!r:.60} of task {task.name}") for e in task.train + task.test], config)
    context = len(longest.ids) + args.max_new_tokens
    if context > (most := config.get_text_config().max_position_embeddings):
        which = f"the longest prompt ({len(longest.ids)} tokens, {longest.prompt[:40]!r})"
        needs = f"{context} positions; the model has {most}"
        raise UserError(f"{which} with --max-new-tokens {args.max_new_tokens} needs {needs}")
    return context
