"""Pairs of a chosen and a rejected response: reading, batches, and what a frozen model says of them."""

import copy
import functools
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common import UserError, encoding, gpu, models, settings, tables, tasks
from common.batch import collate, cuts, read


@dataclass
class Pair:
    """Token ids; a response ends with encoding.turn_end, unless it was cut. `id` is the position in the data set."""

    id: int
    prompt: list
    chosen: list
    rejected: list
    text: str  # of the prompt, without any chat template
    gold: tuple | None = None  # per response, the true worth of every token, where the task knows it


@dataclass
class Data:
    """`train` and `test` share no prompt. `reward(prompt text, response text)` is the gold reward of a built-in task, and
    `responses()` lists every response where that can be done.
    `columns` {name: numbers per token of a response, by row}; pair i's chosen response is row 2 i, its rejected 2 i + 1."""

    name: str
    train: list
    test: list
    reward: Callable | None = None
    responses: Callable | None = None
    columns: dict = field(default_factory=dict)

    order = tasks.Task.order  # the same walk over the training set


def _row(row, where):
    """A row of the hub's usual schema -> (prompt: text or messages, chosen text, rejected text, where it stands)."""
    if not isinstance(tables.without_pictures(row, where), dict) or not {"chosen", "rejected"} <= row.keys():
        raise UserError(f"{where}: needs an object with the fields prompt, chosen and rejected, is {json.dumps(row)[:80]}")
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(s, str) for s in sides):
        if isinstance(prompt, str) and prompt.strip() or tables.conversation(prompt):
            return _asked(prompt, where), *sides, where
        raise UserError(f"{where}: chosen and rejected are plain text, so prompt must be text or messages, is {prompt!r:.60}")
    if not all(tables.conversation(s) and s[-1]["role"] == "assistant" for s in sides):
        raise UserError(f"{where}: chosen and rejected must both be text, or both messages that end with the assistant's")
    if sides[0][:-1] != sides[1][:-1]:
        raise UserError(f"{where}: chosen and rejected differ before their last message")
    if prompt and not isinstance(prompt, str) and not tables.conversation(prompt):
        raise UserError(f"{where}: prompt must be text or messages, is {prompt!r:.60}")
    # The conversation so far may stand in prompt, in both responses, in both, or begin in prompt and go on inside.
    before = [dict(role="user", content=prompt)] if isinstance(prompt, str) and prompt.strip() else prompt or []
    before, inside = ([dict(role=m["role"], content=m["content"]) for m in part] for part in (before, sides[0][:-1]))
    if before and inside and before[-1]["content"].strip() != inside[-1]["content"].strip():
        if before[-1]["role"] == "user":
            raise UserError(f"{where}: prompt is not what chosen and rejected answer")
        inside = before + inside
    if not before and not inside:
        raise UserError(f"{where}: has no prompt, neither as a field nor inside chosen and rejected")
    return _asked(max(inside, before, key=len), where), *(s[-1]["content"] for s in sides), where


def _asked(prompt, where):
    """A prompt, refused where there is nothing to be answered at its end."""
    if not isinstance(prompt, str) and (prompt[-1]["role"] == "assistant" or not prompt[-1]["content"].strip()):
        raise UserError(f"{where}: the prompt must end with a turn that is not the assistant's, and has text")
    return prompt


def _hub(name):
    advice = "or give a local file with the fields prompt, chosen, rejected: --data path/to/train.jsonl"
    data = tables.read_hub(name, f"built in are {tasks.worlds_with('pairs')}; {advice}")[0]
    parts = [next((s for s in (kind, f"{kind}_prefs") if s in data), None) for kind in ("train", "test")]
    if not parts[0]:
        raise UserError(f"--data {name}: has no split train or train_prefs, only {', '.join(data)}")
    return [[_row(r, f"{name} {s}, row {i}") for i, r in enumerate(data[s])] if s else None for s in parts]


def _built_in(world):
    """Rows (prompt, chosen, rejected, where), texts, to train on and held out."""
    rng, rows = random.Random(1), ([], [])
    for part, examples, n in ((0, world.train, 4096), (1, world.test, tasks.HELD_OUT)):
        for e in itertools.islice(itertools.cycle(examples), 4 * n):
            two = world.pair(rng, e.prompt)
            if two and two[0] != two[1] and len(rows[part]) < n:
                rows[part].append((e.prompt, *two, world.name))
    return rows


def load(args, config, tokenizer):
    """`args.data` -> Data with token ids. Pairs that teach nothing (the same response twice, an empty one) or do not fit into
    the model's positions are left out, and counted on the terminal. Raises UserError, with file and line where there is one."""
    name, world = args.data, tasks.world(args.data)
    if world and world.pair:
        train, test = _built_in(world)
    elif name.endswith((".jsonl", ".json")) or os.path.exists(name):
        train, test = tables.read_rows(name, _row)
    elif name.count("/") == 1:
        train, test = _hub(name)
    else:
        known = tasks.worlds_with("pairs")
        raise UserError(f"--data {name}: unknown; there are {known}, .jsonl files, and hub ids (owner/name)")
    left_out, parts = 0, []
    for rows in tables.split(train, test):
        pairs, where = [], [row[3] for row in rows]
        read = [encoding.response_ids([row[i] for row in rows], tokenizer, where, args.max_new_tokens) for i in (1, 2)]
        prompts = encoding.prompt_ids([row[0] for row in rows], tokenizer, where)
        for some in (prompts, *read):
            models.check_tokens(zip(some, where), config)
        for (prompt, *sides, _), ids, chosen, rejected in zip(rows, prompts, *read):
            too_long = len(ids) + max(len(chosen), len(rejected)) > config.max_position_embeddings
            if not all(side.strip() for side in sides) or not chosen or not rejected or chosen == rejected or too_long:
                left_out += 1
                continue
            text = prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)
            worth = [world.worth(prompt, s) for s in sides] if world else []
            gold = tuple(w + [0] for w in worth) if [len(w) + 1 for w in worth] == [len(chosen), len(rejected)] else None
            pairs.append(Pair(len(pairs) + sum(map(len, parts)), ids, chosen, rejected, text, gold))
        parts.append(pairs)
    if left_out and gpu.rank() == 0:
        print(f"note: {left_out:,} pairs left out: empty, twice the same response, or too long a prompt", flush=True)
    if not all(parts):
        raise UserError(f"--data {name}: {len(parts[0])} pairs to train on, {len(parts[1])} held out; needs some of each")
    return Data(name, *parts, world and world.reward, world and world.responses)


def context(data, args):
    """Positions that the longest prompt and response need, and where responses are sampled these."""
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in data.train + data.test)
    return max(longest, *(len(p.prompt) + args.max_new_tokens for p in data.test if data.reward)) if data.reward else longest


def micro_batches(pairs, data, args):
    """Batches of at most args.micro_batch_tokens tokens; a pair is never torn. Their weights make the sum of the losses
    the mean over the pairs of all ranks' minibatch."""
    sizes = [(len(p.prompt), len(p.chosen) + len(p.rejected)) for p in pairs]
    for cut in cuts(sizes, [tuple(p.prompt) for p in pairs], args.micro_batch_tokens):
        some, device = [pairs[i] for i in cut] or pairs[:1], gpu.device()
        mb = collate([(p.prompt, p.chosen) for p in some] + [(p.prompt, p.rejected) for p in some], device=device)
        rows = [2 * p.id for p in some] + [2 * p.id + 1 for p in some]
        for name, column in data.columns.items():
            values = torch.nn.utils.rnn.pad_sequence([column[r] for r in rows], batch_first=True)
            mb.columns[name] = values.to(device)
        mb.real = torch.full((len(some),), bool(cut), device=device)
        mb.weights = mb.real / args.pairs_per_step
        yield mb


def logp_of(model, rows, args, **reading):
    """Log-probs under `model` of every token of the responses: [(prompt ids, response ids)] -> [[T_i]], on the CPU; or the
    first thing that `reading` (read=..., beside=...; see policy.Policy) asks for. The work is shared out over the ranks."""
    mine, out = list(range(len(rows)))[gpu.rank() :: gpu.world()], {}
    sizes, prompts = [tuple(map(len, rows[i])) for i in mine], [tuple(rows[i][0]) for i in mine]
    for cut in cuts(sizes, prompts, args.micro_batch_tokens):
        some = collate([rows[mine[k]] for k in cut] or rows[:1], device=gpu.device())
        numbers = {prompts[k]: k for k in cut}
        some.prompt_id = torch.tensor([numbers[prompts[k]] for k in cut] or [0], device=gpu.device())
        logp, *_ = read(model, some, args, temperature=1.0, **reading)
        out |= {mine[k]: values[: len(rows[mine[k]][1])] for k, values in zip(cut, logp.cpu())}
    merged = {i: values for part in gpu.gather_objects(out) for i, values in part.items()}
    return [merged[i] for i in range(len(rows))]


@torch.no_grad()
def logp_now(model, mb):
    """Log-probs [2b, T] of a Batch of pairs under a frozen model."""
    return model(mb.ids, mb.attention_mask, mb.mask)[0]


class _Cache:
    """A column that lies in a memory-mapped file: cache[row] -> [T_row]."""

    def __init__(self, path):
        from safetensors import safe_open

        self.file = safe_open(path, "pt")
        self.key = (self.file.metadata() or {}).get("key")
        self.start, self.values = self.file.get_tensor("start").tolist(), self.file.get_slice("values")

    def __getitem__(self, row):
        return self.values[self.start[row] : self.start[row + 1]]


def cached(run, name, model, data, prompt=lambda pair, response: pair.prompt, values=None):
    """A column: the log-probs of all responses under the frozen model that model() returns, computed once and kept in <run
    folder>/<name>.safetensors for the same tokens and settings. prompt(pair, response ids) -> the prompt's ids, where responses
    are to be read after another than their own; values(model, rows) -> [[T_i]], where something else is to be kept."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    args, path = run.args, gpu.gather_objects(run.dir)[0] / f"{name}.safetensors"
    rows = [(prompt(p, y), y) for p in data.train + data.test for y in (p.chosen, p.rejected)]
    kept = {k: v for k, v in vars(args).items() if k not in settings.MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(repr(row).encode())
    key = digest.hexdigest()
    try:
        fresh = _Cache(path).key != key
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
    return _Cache(path)


def fit(name, loss, data, args, run, steps, lr):
    """-> a frozen Policy: the start after `steps` updates at the rate lr on loss(logp [2b, T], Batch) -> [b], averaged over
    the pairs of a step. For a model that a method needs beside the policy; its pairs come in an order of their own."""
    from tqdm import tqdm

    args = copy.copy(args)
    args.lr = lr
    model = gpu.shard(models.load(args, gpu.device()))
    optimizer = gpu.make_optimizer(model, args)
    for step in tqdm(range(steps), desc=name, disable=None if gpu.rank() == 0 else True, leave=False):
        torch.manual_seed(gpu.hash_seed(args.seed, step, gpu.rank(), 13))
        pairs = gpu.local(data.order(step * args.pairs_per_step, args.pairs_per_step, f"{name} {args.seed}"))
        for mb in micro_batches(pairs, data, args):
            logp, _ = model(mb.ids, mb.attention_mask, mb.mask)
            (loss(logp, mb) * mb.weights).sum().backward()
        norm = gpu.clip_gradients(model, args.max_grad_norm)
        if not math.isfinite(norm):
            raise UserError(f"the {name} cannot be trained: no finite gradient at update {step + 1}; try a smaller rate")
        optimizer.step()
        optimizer.zero_grad()
        if gpu.maximum(int(bool(run.stop))):
            raise UserError(f"stopped while the {name} was trained: nothing is lost but that; start again")
    model.lm.requires_grad_(False)
    return model
