"""Preferences: pairs of a chosen and a rejected response, how they are batched, and what is measured on held-out prompts."""

import copy
import functools
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common import UserError, games, gpu, models, rollout, runlog, tasks


@dataclass
class Pair:
    """Token ids; a response ends with the end-of-sequence token, unless it was cut. `id` is the position in the data set."""

    id: int
    prompt: list
    chosen: list
    rejected: list
    text: str  # of the prompt, without any chat template
    gold: tuple | None = None  # per response, the true worth of every token, where the task knows it


@dataclass
class Data:
    """`train` and `test` share no prompt. `reward(prompt text, response text)` is the gold reward of a built-in task.
    `columns` {name: numbers per token of a response, by row}; pair i's chosen response is row 2 i, its rejected 2 i + 1."""

    name: str
    train: list
    test: list
    reward: Callable | None = None
    columns: dict = field(default_factory=dict)

    order = tasks.Task.order  # the same walk over the training set


@dataclass
class Batch:
    """b pairs as 2 b rows, the chosen first; prompts padded on the left, responses on the right."""

    ids: torch.Tensor  # [2b, S] int64
    attention_mask: torch.Tensor  # [2b, S] bool
    mask: torch.Tensor  # [2b, T] bool: response tokens, the end of sequence included
    columns: dict  # name -> [2b, T], 0 at the padding
    weights: torch.Tensor  # [b]: of every pair in the loss; 0 for a pair that only keeps ranks in step
    real: torch.Tensor  # [b] bool: where that is not so


# ---------------------------------------------------------------- files and the hub


def _row(row, where):
    """A row of the hub's usual schema -> (prompt: text or messages, chosen text, rejected text)."""
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise UserError(f"{where}: needs an object with the fields prompt, chosen and rejected, is {json.dumps(row)[:80]}")
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(s, str) for s in sides):
        if isinstance(prompt, str) or _messages(prompt):
            return prompt, *sides
        raise UserError(f"{where}: chosen and rejected are plain text, so prompt must be text or messages, is {prompt!r:.60}")
    if not all(_messages(s) and s[-1]["role"] == "assistant" for s in sides):
        raise UserError(f"{where}: chosen and rejected must both be text, or both messages that end with the assistant's")
    if sides[0][:-1] != sides[1][:-1]:
        raise UserError(f"{where}: chosen and rejected differ before their last message")
    inside = sides[0][:-1]  # the conversation so far may stand in prompt, in both responses, or in part in each
    if _messages(prompt) and prompt != inside[: len(prompt)]:
        inside = prompt + inside
    if not inside and not isinstance(prompt, str):
        raise UserError(f"{where}: has no prompt, neither as a field nor inside chosen and rejected")
    return inside or prompt, *(s[-1]["content"] for s in sides)


def _messages(value):
    return isinstance(value, list) and bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )  # fmt: skip


def _read(path):
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        rows.append(_row(json.loads(line), f"{path}:{number}"))
                    except json.JSONDecodeError as error:
                        raise UserError(f"{path}:{number}: not JSON ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the preference file {path}: {error}") from None
    return rows


def _hub(name):
    import datasets

    try:
        data = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--data {name}: could not be had from the hub ({reason}); built in are {', '.join(games.GAMES)}; "
            "or give a local file with the fields prompt, chosen, rejected: --data path/to/train.jsonl"
        ) from None
    parts = [next((s for s in (kind, f"{kind}_prefs") if s in data), None) for kind in ("train", "test")]
    if not parts[0]:
        raise UserError(f"--data {name}: has no split train or train_prefs, only {', '.join(data)}")
    return [[_row(r, f"{name} {s}, row {i}") for i, r in enumerate(data[s])] if s else None for s in parts]


def load(args, config, tokenizer):
    """`args.data` -> Data with token ids. Pairs that teach nothing (the same response twice, an empty one) or do not fit into
    the model's positions are left out, and counted on the terminal. Raises UserError, with file and line where there is one."""
    name, game = args.data, None
    if not args.beta > 0:
        raise UserError(f"--beta must be above 0, is {args.beta}")
    if name in games.GAMES:
        train, test, game = games.pairs(name)
    elif name.endswith((".jsonl", ".json")) or os.path.exists(name):
        folder, file = os.path.split(name)
        sibling = os.path.join(folder, file.replace("train", "test"))
        train, test = _read(name), _read(sibling) if "train" in file and os.path.exists(sibling) else None
    elif name.count("/") == 1:
        train, test = _hub(name)
    else:
        raise UserError(f"--data {name}: unknown; there are {', '.join(games.GAMES)}, .jsonl files, and hub ids (owner/name)")
    if test is None:  # whole prompts are held out, a fifth at most
        prompts = list(dict.fromkeys(json.dumps(r[0]) for r in train))
        held = set(random.Random(0).sample(prompts, min(games.HELD_OUT, len(prompts) // 5)))
        test, train = ([r for r in train if (json.dumps(r[0]) in held) == side] for side in (True, False))
    left_out, parts = 0, []
    for rows in (train, test):
        pairs = []
        for prompt, *sides in rows:
            ids = prompt_ids(prompt, tokenizer)
            chosen, rejected = (
                (i + [tokenizer.eos_token_id])[: args.max_new_tokens] if i else []
                for i in tokenizer(sides, add_special_tokens=False)["input_ids"]
            )
            too_long = len(ids) + args.max_new_tokens > config.max_position_embeddings
            if not chosen or not rejected or chosen == rejected or too_long:
                left_out += 1
                continue
            text = prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)
            worth = [game.worth(prompt, s) for s in sides] if game else []
            gold = tuple(w + [0] for w in worth) if [len(w) + 1 for w in worth] == [len(chosen), len(rejected)] else None
            pairs.append(Pair(len(pairs) + sum(map(len, parts)), ids, chosen, rejected, text, gold))
        parts.append(pairs)
    if left_out and gpu.rank() == 0:
        print(f"note: {left_out:,} pairs left out: empty, twice the same response, or too long a prompt", flush=True)
    if not all(parts):
        raise UserError(f"--data {name}: {len(parts[0])} pairs to train on, {len(parts[1])} held out; needs some of each")
    return Data(name, *parts, game.reward if game else None)


def prompt_ids(prompt, tokenizer):
    """Token ids of a prompt, text or messages, through the chat template where the tokenizer has one."""
    messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]


def context(data, args):
    """Positions that the longest prompt and response need."""
    return max(len(p.prompt) for p in data.train + data.test) + args.max_new_tokens


# ---------------------------------------------------------------- batches


def collate(rows, device):
    """[(prompt ids, response ids)] -> ids [n, S], attention_mask [n, S], mask [n, T]."""
    S0, T = max(len(p) for p, _ in rows), max(len(y) for _, y in rows)
    ids, attention = torch.zeros(len(rows), S0 + T, dtype=torch.int64), torch.zeros(len(rows), S0 + T, dtype=torch.bool)
    for i, (p, y) in enumerate(rows):
        ids[i, S0 - len(p) : S0 + len(y)] = torch.tensor(p + y)
        attention[i, S0 - len(p) : S0 + len(y)] = True
    return ids.to(device), attention.to(device), attention[:, S0:].to(device)


def micro_batches(pairs, data, args):
    """Batches of at most args.micro_batch_tokens tokens; a pair is never torn. Their weights make the sum of the losses
    the mean over the pairs of all ranks' minibatch."""
    sizes = [(len(p.prompt), len(p.chosen) + len(p.rejected)) for p in pairs]
    for cut in rollout.cuts(sizes, [tuple(p.prompt) for p in pairs], args.micro_batch_tokens):
        some, device = [pairs[i] for i in cut] or pairs[:1], gpu.device()
        both = [(p.prompt, p.chosen) for p in some] + [(p.prompt, p.rejected) for p in some]
        ids, attention, mask = collate(both, device)
        rows, columns = [2 * p.id for p in some] + [2 * p.id + 1 for p in some], {}
        for name, column in data.columns.items():
            values = torch.nn.utils.rnn.pad_sequence([column[r] for r in rows], batch_first=True)
            columns[name] = values.to(device)
        real = torch.full((len(some),), bool(cut), device=device)
        yield Batch(ids, attention, mask, columns, real / args.pairs_per_step, real)


@torch.no_grad()
def logp_of(model, rows, args, **reading):
    """Log-probs under `model` of every token of the responses: [(prompt ids, response ids)] -> [[T_i]], on the CPU; or the
    first thing that `reading` (read=..., beside=...; see models.Policy) asks for. The work is shared out over the ranks."""
    mine, out = list(range(len(rows)))[gpu.rank() :: gpu.world()], {}
    sizes, prompts = [tuple(map(len, rows[i])) for i in mine], [tuple(rows[i][0]) for i in mine]
    for cut in rollout.cuts(sizes, prompts, args.micro_batch_tokens):
        logp, *_ = model(*collate([rows[mine[k]] for k in cut] or rows[:1], gpu.device()), **reading)
        out |= {mine[k]: values[: len(rows[mine[k]][1])] for k, values in zip(cut, logp.cpu())}
    for m in (model, *reading.get("beside", ())):
        if hasattr(m, "reshard"):  # no backward pass follows that would do it, and checkpoints need the shards
            m.reshard()
    merged = {i: values for part in gpu.gather_objects(out) for i, values in part.items()}
    return [merged[i] for i in range(len(rows))]


@torch.no_grad()
def logp_now(model, mb):
    """Log-probs [2b, T] of a Batch under a frozen model."""
    return model(mb.ids, mb.attention_mask, mb.mask)[0]


class Cache:
    """A column that lies in a memory-mapped file: cache[row] -> [T_row]."""

    def __init__(self, path):
        from safetensors import safe_open

        self.file = safe_open(path, "pt")
        self.key = (self.file.metadata() or {}).get("key")
        self.start, self.values = self.file.get_tensor("start").tolist(), self.file.get_slice("values")

    def __getitem__(self, row):
        return self.values[self.start[row] : self.start[row + 1]]


def cached(run, name, model, data, prompt=lambda pair, response: pair.prompt, values=None):
    """The log-probs of all responses under the frozen model that model() returns, as a Cache: computed once, then read from
    <run folder>/<name>.safetensors, unless that was written for other tokens or settings. prompt(pair, response ids)
    -> the prompt's ids, where responses are to be read after another prompt than their own; values(model, rows) -> [[T_i]],
    where something else than the log-probs is to be kept."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    args, path = run.args, gpu.gather_objects(run.dir)[0] / f"{name}.safetensors"
    rows = [(prompt(p, y), y) for p in data.train + data.test for y in (p.chosen, p.rejected)]
    settings = {k: v for k, v in vars(args).items() if k not in runlog.MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(repr(row).encode())
    key = digest.hexdigest()
    try:
        fresh = Cache(path).key != key
    except (OSError, SafetensorError):  # missing, or cut short
        fresh = True
    if gpu.maximum(int(fresh)):
        found = (values or functools.partial(logp_of, args=args))(model(), rows)
        if gpu.rank() == 0:
            start = torch.tensor([0, *itertools.accumulate(len(y) for _, y in rows)])
            try:
                save_file(dict(values=torch.cat(found), start=start), f"{path}.tmp", metadata=dict(key=key))
                os.replace(f"{path}.tmp", path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot write the column {name} to {path}: {error}") from None
        gpu.gather_objects(None)  # the others wait for the file
    return Cache(path)


def fit(name, loss, data, args, run, steps, lr):
    """-> a frozen Policy: the start after `steps` updates at the rate lr on loss(logp [2b, T], Batch) -> [b], averaged over
    the pairs of a step. For a model that a method needs beside the policy; its pairs come in an order of their own."""
    from tqdm import tqdm

    args = copy.copy(args)
    args.lr = lr
    model = gpu.shard(models.load(args, gpu.device()))
    optimizer = gpu.make_optimizer(model, args)
    for step in tqdm(range(steps), desc=name, disable=None if gpu.rank() == 0 else True, leave=False):
        torch.manual_seed(rollout.hash_seed(args.seed, step, gpu.rank(), 13))
        pairs = gpu.local(data.order(step * args.pairs_per_step, args.pairs_per_step, f"{name} {args.seed}"))
        for mb in micro_batches(pairs, data, args):
            logp, _ = model(mb.ids, mb.attention_mask, mb.mask)
            (loss(logp, mb) * mb.weights).sum().backward()
        gpu.clip_gradients(model, args.max_grad_norm)
        optimizer.step(), optimizer.zero_grad()
        if gpu.maximum(int(bool(run.stop))):
            raise UserError(f"stopped while the {name} was trained: nothing is lost but that; start again")
    model.lm.requires_grad_(False)
    return model
