"""Models: names and presets, the built-in tiny model with its warm start, loading, and token log-probs in little memory."""

import difflib
import hashlib
import json
import math
import os
import random
import shutil
import typing
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import UserError, gpu

ROOT = Path(__file__).resolve().parents[1]


def _aliases():
    names = {}
    for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b"):
        big = size.upper()
        names[f"qwen2.5-{size}"] = f"Qwen/Qwen2.5-{big}"
        names[f"qwen2.5-{size}-instruct"] = f"Qwen/Qwen2.5-{big}-Instruct"
        if size in ("1.5b", "7b", "72b"):
            names[f"qwen2.5-math-{size}"] = names[f"qwen2.5-{size}-math"] = f"Qwen/Qwen2.5-Math-{big}"
            names[f"qwen2.5-math-{size}-instruct"] = f"Qwen/Qwen2.5-Math-{big}-Instruct"
            names[f"qwen2.5-{size}-math-instruct"] = f"Qwen/Qwen2.5-Math-{big}-Instruct"
    for size in ("0.6b", "1.7b", "4b", "8b", "14b"):
        names[f"qwen3-{size}"] = f"Qwen/Qwen3-{size.upper()}"
        names[f"qwen3-{size}-base"] = f"Qwen/Qwen3-{size.upper()}-Base"
    names |= {"qwen3-32b": "Qwen/Qwen3-32B", "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B"}
    names["qwen3-30b-a3b-base"] = "Qwen/Qwen3-30B-A3B-Base"
    for version, size in (("3.2", "1b"), ("3.2", "3b"), ("3.1", "8b"), ("3.1", "70b"), ("3.3", "70b")):
        name = f"meta-llama/Llama-{version}-{size.upper()}"
        names[f"llama-{version}-{size}-instruct"] = name + "-Instruct"
        if version != "3.3":
            names[f"llama-{version}-{size}"] = name
    return names


ALIASES = _aliases()

# What a field of Args that was left at None becomes. `tiny` is the embedded default; the others are chosen by the
# number of parameters (in billions, up to and including). Rates: 1e-6 is the field's value for full fine-tuning of
# 1.5B to 32B (DAPO, GSPO, Dr. GRPO scripts).
TINY = dict(
    task="addition", steps=40, prompts_per_step=32, group_size=8, minibatches=8, lr=1e-4, max_new_tokens=28,
    eval_every=0, checkpoint_every=20, dtype="float32", optimizer="adamw", gradient_checkpointing=False,
    micro_batch_tokens=16384,
)  # fmt: skip
REAL = dict(
    task="gsm8k", steps=200, prompts_per_step=128, group_size=8, minibatches=4, lr=1e-6, max_new_tokens=1024,
    eval_every=20, checkpoint_every=20, dtype="bfloat16", optimizer="adamw_sr", gradient_checkpointing=True,
    micro_batch_tokens=32768,
)  # fmt: skip
# The same for scripts that learn from pairs (those with the field pairs_per_step), on top of the above. 5e-7: DPO's repository.
TINY_PAIRS = dict(data="letters", steps=150, pairs_per_step=48, lr=1e-4, max_new_tokens=12, checkpoint_every=50)
REAL_PAIRS = dict(data="trl-lib/ultrafeedback_binarized", steps=900, pairs_per_step=64, lr=5e-7, eval_every=300,
                  checkpoint_every=300)  # fmt: skip
PRESETS = {
    1.0: REAL | dict(lr=2e-6, gradient_checkpointing=False),
    4.0: REAL,
    9.0: REAL | dict(optimizer="adamw_8bit", micro_batch_tokens=16384),
    1e9: REAL | dict(optimizer="adamw_8bit", micro_batch_tokens=8192),
}


def _quiet():
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def locate(name):
    """`name` (tiny, alias, hub id or local folder) -> what transformers loads. Raises UserError with the nearest names."""
    if name == "tiny" or os.path.isdir(name):
        return name
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    if name.count("/") == 1 and not name.startswith((".", "/")) and not name.endswith("/"):
        return name
    near = difflib.get_close_matches(name.lower(), ["tiny", *ALIASES], 4, 0.3)
    what = "no such folder" if "/" in name else "unknown model"
    near = f"nearest names: {', '.join(near)}; or " if near else ""
    raise UserError(f"{what} {name!r}; {near}give a hub id (owner/name) or a folder")


def _fetch(loader, name, **kwargs):
    try:
        return loader.from_pretrained(name, **kwargs)
    except Exception as error:  # safetensors, tokenizers and torch have errors of their own for files that are damaged
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if os.path.isdir(name):
            raise UserError(f"cannot load a model from the folder {name}: {lines[0][:200]}") from None
        raise UserError(
            f"model {name} could not be had from the hub ({lines[0][:160]}); "
            "download it on a machine with network and give the folder: --model path/to/folder"
        ) from None


def resolve(args):
    """Fills every field of `args` left at None from the preset of its model, and checks the shared fields.
    Returns (args, the model's transformers config)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet()
    name = locate(args.model)
    config = tiny_config() if name == "tiny" else _fetch(AutoConfig, name)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
    except ValueError:
        lm = None
    if not hasattr(lm, "model") or not hasattr(lm, "lm_head"):
        raise UserError(
            f"model {args.model}: the architecture {config.model_type} is none that Policy knows (Qwen, Llama and their like)"
        )
    billions = sum(p.numel() for p in lm.parameters()) / 1e9
    preset = TINY if name == "tiny" else next(p for limit, p in PRESETS.items() if billions <= limit)
    if hasattr(args, "pairs_per_step"):
        preset = preset | (TINY_PAIRS if name == "tiny" else REAL_PAIRS)
    if preset["optimizer"] == "adamw_8bit" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        preset = preset | dict(optimizer="adamw_sr")  # sharded states need no 8 bits, and torchao's cannot be sharded
    if name == "tiny" and hasattr(args, "task"):  # what the careful way takes, and some room
        kind, _, n = (args.task or preset["task"]).partition(":")
        n = int(n) if n.isascii() and n.isdigit() else dict(addition=2, countdown=3).get(kind, 2)
        preset = preset | dict(max_new_tokens=12 * n if kind == "countdown" else 8 + 10 * n)
    # What a script needs that has its point to show elsewhere, or fields of its own with two presets.
    preset = preset | getattr(args, "tiny_preset" if name == "tiny" else "real_preset", {})
    for f in fields(args):
        if getattr(args, f.name) is None and f.name in preset:
            setattr(args, f.name, preset[f.name])
    for field, least in (("steps", 0), ("prompts_per_step", 1), ("pairs_per_step", 1), ("group_size", 1), ("minibatches", 1),
                         ("epochs", 1), ("max_new_tokens", 1), ("micro_batch_tokens", 1), ("eval_prompts", 1),
                         ("vllm_tp", 1)):  # fmt: skip
        if getattr(args, field, least) < least:
            raise UserError(f"--{field.replace('_', '-')} must be at least {least}, is {getattr(args, field)}")
    for field in ("lr", "weight_decay", "max_grad_norm", "beta", "lora_rank", "eval_every", "checkpoint_every", "tis_cap"):
        value = getattr(args, field, 0)
        if not 0 <= value < math.inf:
            raise UserError(f"--{field.replace('_', '-')} must be a number of at least 0, is {value}")
    for field, hint in typing.get_type_hints(type(args)).items():
        literal = next((h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is typing.Literal), None)
        if literal and getattr(args, field) not in (words := typing.get_args(literal)):
            flag = field.replace("_", "-")
            raise UserError(f"--{flag} must be one of {', '.join(words)}; it is {getattr(args, field)!r}")
    if args.dtype == "bfloat16" and args.optimizer == "adamw":
        raise UserError(
            "--optimizer adamw would round nearly every update of bfloat16 weights away (a step of 1e-6 is far below "
            "a weight's last bit); use adamw_sr (stochastic rounding), adamw_8bit, or --dtype float32"
        )
    if not getattr(args, "temperature", 1) > 0:
        raise UserError(f"--temperature must be above 0, is {args.temperature}: a greedy policy has nothing to learn from")
    return args, config


def count_parameters(config):
    """Number of parameters of a transformers config, counted on a model without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


# ---------------------------------------------------------------- the built-in tiny model

CHARACTERS = "\n +-*/=().,:?" + "0123456789" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"


def tiny_tokenizer():
    """One token per character, 78 in all; what it does not know is <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=1024
    )


def tiny_config(vocab_size=None):
    """A Qwen2 of about 230 thousand parameters."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocab_size or 3 + len(CHARACTERS), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, use_cache=True,
    )  # fmt: skip


# First the careful way alone, until the model can do it; then the mixture, so that it has the habit of guessing.
WARM_START = dict(steps=600, careful_steps=420, batch=64, lr=5e-3, seed=0, version=2)
LONGER = dict(chain=dict(steps=1500, careful_steps=1200))  # after 600 steps its sums are still guesses


def warm_start(task_name, cache=None):
    """Folder of the tiny model after supervised training on the task's demonstrations, made once and cached under
    runs/cache (or $TOKENPO_CACHE). Safe when two processes start at once: the first makes it, the other waits."""
    from filelock import FileLock

    from common import tasks

    recipe = WARM_START | LONGER.get(task_name, {})
    recipe |= dict(task=task_name, config=tiny_config().to_dict(), torch=torch.__version__)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:10]
    cache = Path(cache or os.environ.get("TOKENPO_CACHE") or ROOT / "runs" / "cache")
    folder = cache / f"tiny-{task_name.replace(':', '-').replace('/', '-')}-{key}"
    if (folder / "model.safetensors").exists():
        return str(folder)
    tokenizer = tiny_tokenizer()
    task = tasks.load(task_name, tokenizer)  # before the lock: a name that is wrong leaves nothing behind
    if task.demonstrate is None:
        raise UserError(f"the tiny model needs a task with demonstrations (addition, countdown); {task.name} has none")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "model.safetensors").exists():
                scratch = Path(f"{folder}.tmp")
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                lm = _supervise(task, tokenizer, recipe)
                write_weights(lm, lm.state_dict(), scratch)  # transformers' save_pretrained writes none outside rank 0
                tokenizer.save_pretrained(scratch)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(scratch, folder)
    except OSError as error:
        raise UserError(f"cannot write the warm-started model to {cache}: {error.strerror or error}") from None
    return str(folder)


def write_weights(lm, weights, folder):
    """config.json and model.safetensors; a tied head is stored once."""
    from safetensors.torch import save_file

    if lm.config.tie_word_embeddings:
        weights = {k: v for k, v in weights.items() if k != "lm_head.weight"}
    lm.config.save_pretrained(folder)
    lm.generation_config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata=dict(format="pt"))


def _supervise(task, tokenizer, recipe):
    """Next-token training of a fresh tiny model on demonstrations, completions only."""
    from tqdm import tqdm
    from transformers import Qwen2ForCausalLM

    rng = random.Random(recipe["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = Qwen2ForCausalLM(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98))
    steps, examples = recipe["steps"], sorted(task.train + task.shown, key=lambda e: e.id)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc="warm start (once, then cached)", disable=None, leave=False):
        rows = rng.choices(examples, k=recipe["batch"])
        careful = 1.0 if step < recipe["careful_steps"] else 0.3
        done = tokenizer([task.demonstrate(rng, e, careful) for e in rows])["input_ids"]
        sequences = [e.ids + d + [tokenizer.eos_token_id] for e, d in zip(rows, done)]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        labels = torch.tensor(
            [[-100] * len(e.ids) + s[len(e.ids) :] + [-100] * (width - len(s)) for e, s in zip(rows, sequences)]
        )
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model


# ---------------------------------------------------------------- loading


class Packing:
    """How a padded batch ids [b, S], attention_mask [b, S], its completions in the last T positions, goes through a model as N
    tokens: padding is left out, and a prompt that several rows share is read once.

    keep [b, S]: the positions that are read; positions [N]: each one's place in its sequence; number [b, S]: which of the N
    tokens stands at a position (anything where there is none); rows: the sequences as attention sees them, [n, length] token
    numbers each, those of like length together; place [N]: where in the concatenated rows a token's own output stands."""

    def __init__(self, ids, attention_mask, T):
        (b, S), device, each = ids.shape, ids.device, torch.arange(len(ids), device=ids.device)
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        prompts = ids[:, :-T].where(attention_mask[:, :-T], -1)
        _, group = prompts.unique(dim=0, return_inverse=True)
        first = torch.full_like(group, b).scatter_reduce(0, group, each, "amin")[group]  # the row that reads a row's prompt
        self.keep = attention_mask.clone()
        self.keep[:, :-T] &= (first == each)[:, None]
        self.number = (self.keep.flatten().cumsum(0) - 1).clamp(min=0).view(b, S)
        self.number[:, :-T] = self.number[first, :-T]
        self.positions = positions[self.keep]
        order = (~attention_mask).byte().argsort(dim=1, stable=True)
        aligned = self.number.gather(1, order)  # to the left: causal attention then needs no mask
        start, self.rows, begun = torch.zeros(b, dtype=torch.int64, device=device), [], 0
        lengths = attention_mask.sum(1).tolist()
        for some in buckets(lengths, waste=256):  # a call costs about as much
            width, some = max(1, lengths[some[0]]), torch.tensor(some, device=device)
            self.rows.append(aligned[some, :width])
            start[some] = begun + width * torch.arange(len(some), device=device)
            begun += width * len(some)
        self.place = (start[:, None] + positions)[self.keep]


def buckets(sizes, waste):
    """sizes [n] -> the items' numbers, large ones first, in lists that end before padding to the largest exceeds `waste`."""
    out, padding = [], 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        more = sizes[out[-1][0]] - sizes[i] if out else 0
        if not out or padding + more > waste:
            out.append([])
            padding = more = 0
        padding += more
        out[-1].append(i)
    return out


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, packing=None, **kwargs):
    """Attention for transformers' models: over the sequences of a Packing where one is given, query [1, heads, N, width], else
    torch's own over a padded batch."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    heads = query.shape[1]
    flat = [(x.shape[1], x[0].transpose(0, 1).flatten(1)) for x in (query, key, value)]  # [N, heads * width] each
    out = []
    for rows in packing.rows:  # embedding() picks rows as indexing does, with a backward pass that is quick on a CPU
        q, k, v = (nn.functional.embedding(rows, x).unflatten(-1, (n, -1)).transpose(1, 2) for n, x in flat)
        out.append(sdpa_attention_forward(module, q, k, v, None, dropout, scaling)[0].flatten(2).flatten(0, 1))
    out = nn.functional.embedding(packing.place, torch.cat(out) if len(out) > 1 else out[0])
    return out.view(1, -1, heads, value.shape[3]), None


class Policy(nn.Module):
    """A causal language model that returns what is asked of its next-token distributions, not its logits.

    forward(ids [b, S], attention_mask [b, S], mask [b, T], temperature) -> logp [b, T] of the tokens that are there and
    entropy [b, T] (nats, detached), both float32 (float64 for a float64 model), 0 where mask is False. The completion is
    the last T of the S positions.
    `read` asks for something else: read(targets [n], logits [n, V], ...) -> a tuple of [n], with the logits of this model and
    of each frozen model in `beside`; forward then returns these as [b, T]. states=True returns the hidden states [N, H]
    behind the N tokens of the mask.
    Padding does not pass through the model, and a prompt does once for all rows that have it (see Packing). Only the masked
    positions go through the head, some at a time, recomputed in the backward pass: [b, T, V] never exists."""

    def __init__(self, lm):
        super().__init__()
        self.lm, config = lm, lm.config
        kinds = set(getattr(config, "layer_types", None) or ()) | {"full_attention"}
        plain = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
        self.packs = plain and config._attn_implementation in ("sdpa", "packed")
        if self.packs:
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import sdpa_mask

            AttentionInterface.register("packed", packed_attention)
            AttentionMaskInterface.register("packed", sdpa_mask)
            lm.set_attn_implementation("packed")

    def hidden_states(self, ids, attention_mask, mask):
        """[N, H]: what the N tokens of the mask are predicted from."""
        T = mask.shape[1]
        if not self.packs:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            out = self.lm.model(input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
            return out.last_hidden_state[:, -T - 1 : -1][mask]
        packing = Packing(ids, attention_mask, T)
        out = self.lm.model(
            input_ids=ids[packing.keep][None], position_ids=packing.positions[None], packing=packing, use_cache=False,
            attention_mask=mask.new_ones(1, 1, 1, 1),  # four dimensions: transformers makes none of its own
        )  # fmt: skip
        return nn.functional.embedding(packing.number[:, -T - 1 : -1][mask], out.last_hidden_state[0])

    def forward(self, ids, attention_mask, mask, temperature=1.0, read=None, beside=(), states=False):
        hidden, targets = self.hidden_states(ids, attention_mask, mask), ids[:, -mask.shape[1] :][mask]
        if states:
            return hidden
        if read is None:
            out = HeadLogp.apply(hidden, self.lm.lm_head.weight, targets, temperature)
        else:
            with torch.no_grad():
                others = [(m(ids, attention_mask, mask, states=True), m.lm.lm_head.weight) for m in beside]
            out = head_read(read, targets, (hidden, self.lm.lm_head.weight), *others, temperature=temperature)
        return tuple(torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in out)


def head_rows(n_vocabulary):
    """Positions whose logits exist at a time: 2^25 numbers (128 MiB in float32); 2^27 on a GPU, which wants larger matrices."""
    return max(16, 2 ** (27 if torch.cuda.is_available() else 25) // n_vocabulary)


class HeadLogp(torch.autograd.Function):
    """(hidden [N, H], head weight [V, H], targets [N], temperature) -> logp [N] of the targets and entropy [N] (nats, no
    gradient) of softmax(hidden weight' / temperature), in float32 at least. All chunks have their logits in one buffer, since
    new memory is slow on a CPU. They are made again in the backward pass, and turn there into their own gradient:
    g (onehot - softmax)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature=1.0):
        rows, wide = head_rows(len(weight)), torch.promote_types(hidden.dtype, torch.float32)
        logp, entropy, normalizer = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        buffer, spare = (hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=wide) for _ in range(2))
        for i in range(0, len(hidden), rows):
            at = slice(i, i + rows)
            z = _logits(hidden[at], weight, temperature, buffer)
            top = z.amax(-1)
            z.sub_(top[:, None])
            p = torch.exp(z, out=spare[: len(z)])
            total = p.sum(-1)
            log_total = total.log()
            normalizer[at] = top + log_total
            logp[at] = z.gather(-1, targets[at, None]).squeeze(-1) - log_total
            entropy[at] = log_total - p.mul_(z).sum(-1) / total
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, normalizer = ctx.saved_tensors
        rows, wide = head_rows(len(weight)), normalizer.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight), dtype=wide)
        for i in range(0, len(hidden), rows):
            at = slice(i, i + rows)
            g = grad[at, None] / ctx.temperature
            z = _logits(hidden[at], weight, ctx.temperature, buffer)
            z.sub_(normalizer[at, None]).exp_().mul_(-g)
            z.scatter_add_(-1, targets[at, None], g)
            z = z.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[at] = z @ weight
            if grad_weight is not None:
                if wide == hidden.dtype:
                    grad_weight.addmm_(z.T, hidden[at])  # without a second [V, H]
                else:
                    grad_weight += z.T @ hidden[at]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _logits(hidden, weight, temperature, buffer):
    """hidden [n, H] -> hidden weight' / temperature, [n, V], in the first n rows of the buffer."""
    z = buffer[: len(hidden)]
    if z.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=z)
    else:
        z.copy_(hidden @ weight.T)
    return z.div_(temperature) if temperature != 1 else z


def head_read(read, targets, *models, temperature=1.0):
    """read(targets [n], logits [n, V] of every model) -> tuple of [n], by chunks: -> tuple of [N]. `models`: (hidden [N, H],
    head weight [V, H]) each. The logits are in float32 at least, and made again in the backward pass."""

    def part(targets, *flat):
        logits = []
        for hidden, weight in zip(flat[::2], flat[1::2]):
            logits.append((hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature)
        return read(targets, *logits)

    rows, out = head_rows(len(models[0][1])), []
    for i in range(0, max(1, len(targets)), rows):  # no token at all is one empty chunk: the weights still get their gradient
        flat = [x for hidden, weight in models for x in (hidden[i : i + rows], weight)]
        out.append(checkpoint(part, targets[i : i + rows], *flat, use_reentrant=False))
    return tuple(torch.cat(parts) for parts in zip(*out))


def load_tokenizer(args):
    """The tokenizer of `args.model`; for the tiny model this makes the warm start, if it is not cached."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = _folder(args)
    try:
        kind = get_tokenizer_config(name).get("tokenizer_class")
    except Exception:  # says what is wrong below
        kind = None
    # AutoTokenizer of transformers 5 would build a Qwen2Tokenizer for any Qwen2, around the splitting rule of another.
    own = kind in ("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer = _fetch(PreTrainedTokenizerFast if own else AutoTokenizer, name, padding_side="left")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {args.model}: its tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _folder(args):
    from common import games

    if args.model != "tiny":
        return locate(args.model)
    if hasattr(args, "data") and args.data not in games.GAMES:
        raise UserError(
            f"the tiny model is warm-started on built-in data ({', '.join(games.GAMES)}); for {args.data} give --model"
        )
    return warm_start(args.data if hasattr(args, "data") else args.task)


def end_tokens(lm, tokenizer):
    """Token ids that end a completion: the tokenizer's end of sequence, and those of the model's generation settings
    (a chat model ends its turn by another one than its text)."""
    also = lm.generation_config.eos_token_id if lm.generation_config else None
    also = also if isinstance(also, list) else [] if also is None else [also]
    return sorted({tokenizer.eos_token_id, *also})


def load(args, device, trainable=True):
    """The Policy of `args.model`, with LoRA layers where args.lora_rank > 0; or, not trainable, a frozen copy of the start."""
    from transformers import AutoModelForCausalLM

    lm = _fetch(AutoModelForCausalLM, _folder(args), dtype=getattr(torch, args.dtype))
    lm.config.use_cache = True
    if args.lora_rank and trainable:
        import peft

        peft_config = peft.LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        lm.requires_grad_(False)
        lm = peft.inject_adapter_in_model(peft_config, lm)
    if args.gradient_checkpointing and trainable:
        lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    if not trainable:
        lm.requires_grad_(False)
    lm.train(trainable)
    return Policy(lm if gpu.world() > 1 else lm.to(device))  # sharding moves a layer at a time


def check_context(config, task, args):
    """Positions that the longest prompt and completion need. Raises UserError where the model has fewer."""
    longest = max(task.train + task.test, key=lambda e: len(e.ids))
    empty = next((e for e in task.train + task.test if not e.ids), None)
    if empty:
        raise UserError(
            f"model {args.model}: its tokenizer makes no tokens of the prompt {empty.prompt[:40]!r} of task {task.name}"
        )
    context = len(longest.ids) + args.max_new_tokens
    if context > config.max_position_embeddings:
        raise UserError(
            f"the longest prompt ({len(longest.ids)} tokens, {longest.prompt[:40]!r}) with --max-new-tokens "
            f"{args.max_new_tokens} needs {context} positions; the model has {config.max_position_embeddings}"
        )
    return context
