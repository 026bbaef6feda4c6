"""Batches of completions: what they carry, how they are cut, the scoring pass, minibatches, exact means."""

import math
from dataclasses import dataclass, field, fields

import torch

from common import gpu


@dataclass
class Batch:
    """B completions, of rollouts (groups of `group` rows, contiguous), pairs (the chosen first, then the rejected) or
    demonstrations; prompts padded on the left, completions on the right, S = prompt + T. Token ids are those that were sampled
    or read: nothing is decoded and encoded again on the way to the loss. `columns` is where scripts put numbers of their own:
    [B], [B, T] or [B, T, m], which take, pick, join, micro_batches and minibatches carry like the fields."""

    ids: torch.Tensor  # [B, S] int64
    attention_mask: torch.Tensor  # [B, S] bool
    mask: torch.Tensor  # [B, T] bool: completion tokens, the ending EOS included
    trained: torch.Tensor | None = None  # [B, T] bool: the tokens that the loss is on; None becomes the mask
    weights: torch.Tensor | None = None  # [B, T]: token_weights of the minibatch that a row is in; [b] of b pairs
    real: torch.Tensor | None = None  # [b] bool, of pairs: False where one only keeps ranks in step
    row: torch.Tensor | None = None  # [B] int64: which rows of the batch it was cut from these are
    prompt_id: torch.Tensor | None = None  # [B] int64, stable over epochs
    sampler_logp: torch.Tensor | None = None  # [B, T] float32: what the engine says of its samples
    truncated: torch.Tensor | None = None  # [B] bool: no EOS within max_new_tokens
    accuracy: torch.Tensor | None = None  # [B] float32: right or wrong, before any shaping
    reward: torch.Tensor | None = None  # [B] float32
    policy_version: torch.Tensor | None = None  # [B] int64: optimizer steps behind the sampling policy
    old_logp: torch.Tensor | None = None  # [B, T] float32, by the trainer, before the first update
    ref_logp: torch.Tensor | None = None  # [B, T] float32, of the frozen reference
    adv: torch.Tensor | None = None  # [B, T] float32
    columns: dict = field(default_factory=dict)
    texts: list | None = None  # B decoded completions, for checking and reading only
    answers: list | None = None  # B extracted answers
    gold: list | None = None  # B right answers
    group: int = 1  # G, completions per prompt
    engine: str = ""  # the name of the engine that sampled
    timeouts: int = 0  # completions whose check was killed

    def __post_init__(self):
        if self.trained is None:
            self.trained = self.mask

    def _map(self, change, listed):
        """The batch with change(name, tensor) in place of every tensor and listed(list) of every list; counters stay."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out |= {name: change(name, value) for name, value in out.items() if isinstance(value, torch.Tensor)}
        out |= {name: listed(value) for name, value in out.items() if isinstance(value, list)}
        return type(self)(**out | dict(columns={name: change(name, x) for name, x in self.columns.items()}))

    def to(self, device):
        """The batch on that device."""
        return self._map(lambda _, value: value.to(device), list)

    def take(self, rows):
        """Rows [b] as a batch of their own, cut to their longest prompt and completion by attention: masks may have holes."""
        T, seen = self.mask.shape[1], self.attention_mask[rows]
        left = self.ids.shape[1] - T - max(seen[:, :-T].sum(1).tolist(), default=0)
        t = max([1, *seen[:, -T:].sum(1).tolist()])

        def cut(name, value):
            value = value[rows]
            if name in ("ids", "attention_mask"):
                return value[:, left : value.shape[1] - (T - t)]
            return value if value.dim() == 1 else value[:, :t]

        return self._map(cut, lambda values: [values[i] for i in rows.tolist()])

    def pick(self, index, of=None):
        """index [p, k]: numbers of rows within each of the groups `of` [p] (None: of all) -> these rows, in groups of k."""
        of = torch.arange(len(index), device=index.device) if of is None else of
        out = self.take((of[:, None] * self.group + index).flatten().to(self.ids.device))
        out.group = index.shape[1]
        return out

    def groups(self, keep):
        """The whole groups with numbers keep [p]."""
        return self.pick(torch.arange(self.group, device=keep.device).expand(len(keep), -1), keep)

    @staticmethod
    def join(batches):
        """Several batches with the same fields and columns as one, padded to the longest prompt and completion."""
        first, T = batches[0], max(b.mask.shape[1] for b in batches)
        S = T + max(b.ids.shape[1] - b.mask.shape[1] for b in batches)
        if any(b.group != first.group or b.columns.keys() != first.columns.keys() for b in batches):
            raise ValueError("batches of other group sizes or columns cannot be joined")

        def padded(b, name):
            value = b.columns[name] if name in b.columns else getattr(b, name)
            right = T - b.mask.shape[1]
            pad = (S - right - value.shape[1] if name in ("ids", "attention_mask") else 0, right) if value.dim() > 1 else ()
            return torch.nn.functional.pad(value, (0, 0) * (value.dim() - 2) + pad)

        out = first._map(lambda name, _: torch.cat([padded(b, name) for b in batches]), list)
        for name in ("texts", "answers", "gold"):
            if getattr(first, name) is not None:
                setattr(out, name, [x for b in batches for x in getattr(b, name)])
        out.timeouts = sum(b.timeouts for b in batches)
        return out

    def micro_batches(self, rows, budget):
        """Cuts rows [b] into micro-batches of at most `budget` tokens; completions of one prompt stay together where they can.
        Every rank yields equally many (FSDP needs it): ranks that run out repeat a row on which no loss is."""
        T, seen = self.mask.shape[1], self.attention_mask[rows]
        sizes = torch.stack([seen[:, :-T].sum(1), seen[:, -T:].sum(1)], 1).tolist()
        for cut in cuts(sizes, (rows if self.prompt_id is None else self.prompt_id[rows]).tolist(), budget):
            some = rows[torch.tensor(cut, device=rows.device)] if cut else rows.new_zeros(1)
            mb = self.take(some)
            mb.row = some
            if not cut:
                mb.mask = mb.trained = torch.zeros_like(mb.mask)
                mb.weights = None if mb.weights is None else torch.zeros_like(mb.weights)
            yield mb


def collate(rows, pad=0, device="cpu"):
    """[(prompt ids, completion ids)] -> Batch."""
    S0, T = max(len(p) for p, _ in rows), max(1, *(len(y) for _, y in rows))
    ids = torch.full((len(rows), S0 + T), pad, dtype=torch.int64)
    attention = torch.zeros(len(rows), S0 + T, dtype=torch.bool)
    for i, (p, y) in enumerate(rows):
        ids[i, S0 - len(p) : S0 + len(y)] = torch.tensor(p + y)
        attention[i, S0 - len(p) : S0 + len(y)] = True
    return Batch(ids.to(device), attention.to(device), attention[:, S0:].to(device))


def cuts(sizes, prompts, budget):
    """sizes [(prompt tokens, completion tokens)], prompts [anything that tells them apart] -> the items' numbers in lists of at
    most `budget` tokens (one item may have more), long ones first. A prompt in common counts once (policy.Packing). Every rank
    gets equally many lists (FSDP needs it), empty ones where it has fewer."""
    length, first = {}, {}
    for i, (size, prompt) in enumerate(zip(sizes, prompts)):
        length[prompt] = max(length.get(prompt, 0), sum(size))
        first.setdefault(prompt, i)
    out, inside, tokens = [], set(), 0
    for i in sorted(range(len(sizes)), key=lambda i: (-length[prompts[i]], first[prompts[i]], -sizes[i][1])):
        more = sizes[i][1] + (0 if prompts[i] in inside else sizes[i][0])
        if not out or tokens + more > budget:
            out.append([])
            inside, tokens, more = set(), 0, sum(sizes[i])
        out[-1].append(i)
        inside.add(prompts[i])
        tokens += more
    return out + [[]] * (gpu.maximum(len(out)) - len(out))


@torch.no_grad()
def read(policy, batch, args, rows=None, temperature=None, how=None, **reading):
    """The scoring pass, by micro-batches -> what policy() gives of the batch's rows [b] (None: all): log-probs and entropies,
    [b, T] each; or, with read=f, beside=[...], the values of f; and with layers=[...] last the hidden states [b, T, H] of each
    (see policy.Policy). how(micro-batch, args): more of policy()'s arguments. `temperature`: None is args.temperature. A
    sharded policy is left in its shards, since weights that stay gathered would hide gradients from clip_gradients."""
    rows = torch.arange(len(batch.ids), device=batch.ids.device) if rows is None else rows
    place = torch.empty(len(batch.ids), dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    out, T, heat = (), batch.mask.shape[1], args.temperature if temperature is None else temperature
    for mb in batch.micro_batches(rows, args.micro_batch_tokens):
        found = policy(mb.ids, mb.attention_mask, mb.mask, heat, **reading, **(how(mb, args) if how else {}))
        out = out or tuple(None if x is None else x.new_zeros(len(rows), T, *x.shape[2:]) for x in found)
        for whole, x in zip(out, found):
            if x is not None and mb.mask.any():
                whole[place[mb.row], : x.shape[1]] = x
    for module in (policy, *reading.get("beside", ())):
        if hasattr(module, "reshard"):
            module.reshard()
    return out


def minibatches(batch, args, step, token_weights, columns=(), keep=None, normalise=None, **others):
    """Cuts the rows of all ranks into args.minibatches random parts, args.epochs times over; yields this rank's rows [b] of a
    part and the weights [B, T] of token_weights(trained, args, *columns), called on the whole part, so that neither gradient
    accumulation nor data parallelism can change them; corrected where vLLM sampled (see _engine_ratio).
    columns: names of batch.columns that token_weights gets of the part. keep [B] bool: other rows are left out; equally many
    parts on every rank. normalise(adv, trained) -> adv, [n, T] each, of the whole part: what batch.adv is during it. others,
    name=mask [B, T]: token_weights of that mask, uncorrected, as batch.columns[name] (a critic's)."""
    whole = {name: gpu.gather(batch.columns[name]) for name in columns}
    trained, mine, width = gpu.gather(batch.trained), len(batch.mask) * gpu.rank(), batch.mask.shape[1]
    others = {name: gpu.gather(mask) for name, mask in others.items()}
    keep = None if keep is None else gpu.gather(keep)
    adv = gpu.gather(batch.adv) if normalise else None
    correction = _engine_ratio(batch, args)

    def weigh(mask, part):
        weights = torch.zeros(mask.shape, device=mask.device)
        weights[part] = token_weights(mask[part], args, *(x[part] for x in whole.values())).float()
        return gpu.local(weights)[:, :width]

    for epoch in range(args.epochs):
        shuffle = torch.Generator().manual_seed(gpu.hash_seed(args.seed, step, epoch, 7))
        order = torch.randperm(len(trained), generator=shuffle).to(trained.device)
        order = order if keep is None else order[keep[order]]
        for part in order.chunk(args.minibatches) if len(order) else ():
            for name, mask in others.items():
                batch.columns[name] = weigh(mask, part)
            if normalise:
                changed = adv.clone()
                changed[part] = normalise(adv[part], trained[part])
                batch.adv = gpu.local(changed)[:, :width]
            weights = weigh(trained, part)
            rows = part[(part >= mine) & (part < mine + len(batch.mask))] - mine
            yield rows, weights if correction is None else weights * correction


def _engine_ratio(batch, args):
    """[B, T], or None where the sampler is the policy itself: pi_old / pi_sampler, truncated at args.tis_cap. At args.tis_level
    token each token has its own, which suits a loss of single tokens; at level sequence all have the completion's, the product
    over its trained tokens: where a loss moves a completion as one action, single ratios would be another action's."""
    if batch.engine != "vllm" or not args.tis_cap > 0:
        return None
    log_ratio = (batch.old_logp - batch.sampler_logp).masked_fill(~batch.trained, 0.0)
    if args.tis_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp().clamp(max=args.tis_cap)


class Meter:
    """Exact means over a step's tokens, whatever the micro-batches and ranks; of names in _max or _min the extreme."""

    def __init__(self):
        self.sums, self.extremes, self.notes = {}, {}, {}

    def note(self, **numbers):
        """Numbers of one update, the same on all ranks: the mean over the step's updates is logged."""
        for name, value in numbers.items():
            self.notes.setdefault(name, []).append(value)

    def add(self, stats, mask):
        """stats {name: [b, T]}, mask [b, T]."""
        for name, value in stats.items():
            value, sign = value.detach()[mask], -1 if name.endswith("_min") else 1
            if name.endswith(("_max", "_min")):
                best = (sign * value).max().item() if value.numel() else -math.inf
                self.extremes[name] = max(self.extremes.get(name, -math.inf), best)
            else:
                s, n = self.sums.get(name, (0.0, 0))
                self.sums[name] = s + gpu.double(value).sum().item(), n + value.numel()

    def result(self):
        """{name: number}. A collective."""
        out = {name: sum(values) / len(values) for name, values in self.notes.items()}
        out |= {name: gpu.total(s) / max(1, gpu.total(n)) for name, (s, n) in self.sums.items()}
        for name, best in [(name, gpu.maximum(value)) for name, value in self.extremes.items()]:
            out[name] = 0.0 if best == -math.inf else best if name.endswith("_max") else -best
        return out
