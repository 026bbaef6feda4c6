"""The policy: a language model that gives what is asked of its next-token distributions, in little memory."""

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.gpu import body


class Packing:
    """How a padded batch ids [b, S], attention_mask [b, S], its completions in the last T positions, goes through a model as N
    tokens: padding is left out, and a prompt that several rows share is read once.
    keep [b, S]: the positions that are read; positions [N]: their places in their sequences; number [b, S]: which of the N
    tokens stands at a position; rows: the sequences as attention sees them, [n, length] token numbers each, those of like
    length together; place [N]: where in the concatenated rows a token's own output stands."""

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
        for some in _buckets(lengths, waste=256):  # a call costs about as much
            width, some = max(1, lengths[some[0]]), torch.tensor(some, device=device)
            self.rows.append(aligned[some, :width])
            start[some] = begun + width * torch.arange(len(some), device=device)
            begun += width * len(some)
        self.place = (start[:, None] + positions)[self.keep]


def _buckets(sizes, waste):
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


def _packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, packing=None, **kwargs):
    """Attention over the sequences of a Packing where one is given, query [1, heads, N, width], else torch's own, padded."""
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


AttentionInterface.register("packed", _packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


@contextlib.contextmanager
def recorded(lm, layers):
    """Inside, a forward pass of `lm` writes hidden states [1 or b, positions, H] into the dictionary that this gives: 0 are the
    embeddings, l what layer l (counted from 1) hands on, the last one before the final norm; "normed": what the head reads."""
    states, handles = {}, []
    places = dict(enumerate([*body(lm).layers, body(lm).norm])) | {"normed": lm.lm_head} if layers else {}
    for layer in layers:
        def keep(module, inputs, layer=layer):
            states[layer] = inputs[0]

        handles.append(places[layer].register_forward_pre_hook(keep))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


class Policy(nn.Module):
    """A language model that returns what is asked of its next-token distributions, not its logits.
    forward(ids [b, S], attention_mask, mask [b, T], temperature) -> logp [b, T] of the tokens that are there and entropy
    [b, T] (nats, detached), float32 (float64 for a float64 model), 0 where mask is False. The completion is the last T.
    read: read(targets [n], logits [n, V], ...) -> a tuple of [n], with the logits of this model and of each frozen one beside
        (or (model, its states)), comes in their place, [b, T] each; `given` [b, T, m]: what read gets for targets, [n, m].
    layers: last of all the hidden states [b, T, H] of each of these depths (see recorded), of the position that a token is
        predicted from, or with at=True of its own. layer: the depth that the head reads, without the final norm.
    pictures: what the ids below -1 stand for, a vision.Pictures, where there are some.
    thoughts (soft [b, T] bool, make): where soft, an embedding is fed for a token: make(embedding layer) -> [n, H], detached.
    states: nothing but the last hidden states, normed, [N, H], behind the N tokens of the mask.
    shift: a token is predicted from so many positions before it: 1; of a model whose config says is_causal=False, which sees
        all positions and guesses the masked ones where they stand, 0, or the logits_shift of its config.
    No padding passes through the model, and a prompt does once for all its rows (see Packing). Only masked positions go
    through the head, some at a time, recomputed in the backward pass: [b, T, V] never exists."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.pictures, config = lm, None, lm.config.get_text_config()
        kinds = getattr(config, "sliding_window", None) or set(getattr(config, "layer_types", None) or ["full_attention"])
        self.packs = kinds == {"full_attention"} and config._attn_implementation in ("sdpa", "packed")
        self.packs = self.packs and lm._supports_attention_backend  # else packing would not reach the attention
        sees_all = getattr(config, "is_causal", True) is False  # rows with one prompt are then no longer alike in it
        self.packs, self.shift = self.packs and not sees_all, getattr(config, "logits_shift", 0) if sees_all else 1
        self.plain = config._attn_implementation
        if self.packs:
            lm.set_attn_implementation("packed")

    def pad(self):
        """No packing from now on: padded batches, as transformers has them."""
        self.packs = False
        self.lm.set_attn_implementation(self.plain)

    def _pass(self, ids, attention_mask, T, thoughts):
        """One pass through the layers -> (last hidden states [N, H], number [b, S]: which of these rows is a position's)."""
        packing = Packing(ids, attention_mask, T) if self.packs else None
        if packing is None:
            number = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
            fed, inputs = ids, dict(attention_mask=attention_mask, use_cache=False)
            inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        else:  # a mask of four dimensions: transformers makes none of its own
            number, fed = packing.number, ids[packing.keep][None]
            inputs = dict(packing=packing, attention_mask=attention_mask.new_ones(1, 1, 1, 1), use_cache=False)
            inputs["position_ids"] = packing.positions[None]
        embedding = self.lm.get_input_embeddings()
        if self.pictures:
            inputs |= self.pictures(self.lm, ids, attention_mask, packing and packing.keep)
        else:
            inputs |= dict(input_ids=fed) if thoughts is None else dict(inputs_embeds=embedding(fed))
        if thoughts is not None:
            (soft, make), x = thoughts, inputs["inputs_embeds"]
            made = make(embedding).detach().to(x.dtype)
            inputs["inputs_embeds"] = x.flatten(0, 1).index_put((number[:, -T:][soft],), made).view(x.shape)
        return body(self.lm)(**inputs).last_hidden_state.flatten(0, 1), number

    def forward(self, ids, attention_mask, mask, temperature=1.0, read=None, beside=(), given=None, layers=None, at=False,
                layer=None, thoughts=None, states=False):  # fmt: skip
        T, head = mask.shape[1], self.lm.lm_head.weight
        wanted = set(layers or ()) | ({layer} - {None})
        with recorded(self.lm, wanted) as found:
            hidden, number = self._pass(ids, attention_mask, T, thoughts)
        found["normed"] = hidden[None]  # here the head is no module that is called
        first = number.shape[1] - T - self.shift
        before, own = number[:, first : first + T][mask], number[:, -T:][mask]
        if layer is not None:
            hidden = found[layer].flatten(0, 1)
        hidden = nn.functional.embedding(before, hidden)  # picks rows, with a backward pass that is quick on a CPU
        if states:
            return hidden
        targets = ids[:, -T:][mask] if given is None else given[mask]
        if read is None:
            out = HeadLogp.apply(hidden, head, targets, temperature)
        else:
            with torch.no_grad():
                asked = [m if isinstance(m, tuple) else (m, m(ids, attention_mask, mask, states=True)) for m in beside]
            others = [(states, m.lm.lm_head.weight.detach()) for m, states in asked]
            out = _head_read(read, targets, (hidden, head), *others, temperature=temperature)
        out = tuple(torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in out)
        rows, where = (own if at else before), mask[:, :, None]
        for depth in layers or ():
            x = nn.functional.embedding(rows, found[depth].flatten(0, 1))
            out += (x.new_zeros(*mask.shape, x.shape[1]).masked_scatter(where, x),)
        return out


def head_rows(n_vocabulary):
    """Positions whose logits exist at a time: 2^25 numbers (128 MiB in float32); 2^27 on a GPU, which wants larger matrices."""
    return max(16, 2 ** (27 if torch.cuda.is_available() else 25) // n_vocabulary)


class HeadLogp(torch.autograd.Function):
    """(hidden [N, H], head weight [V, H], targets [N], temperature) -> logp [N] of the targets and entropy [N] (nats, no
    gradient) of softmax(hidden weight' / temperature), in float32 at least. All chunks have their logits in one buffer, as new
    memory is slow on a CPU; made again in the backward pass, they become their own gradient, g (onehot - softmax)."""

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
            if grad_weight is not None and wide == hidden.dtype:
                grad_weight.addmm_(z.T, hidden[at])  # without a second [V, H]
            elif grad_weight is not None:
                grad_weight += z.T @ hidden[at]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _logits(hidden, weight, temperature, buffer):
    """hidden [n, H] -> hidden weight' / temperature, [n, V], in the first n rows of the buffer."""
    z = buffer[: len(hidden)]
    z = torch.mm(hidden, weight.T, out=z) if z.dtype == hidden.dtype else z.copy_(hidden @ weight.T)
    return z.div_(temperature) if temperature != 1 else z


def _head_read(read, targets, *models, temperature=1.0):
    """read(targets [n], logits [n, V] of every model) -> tuple of [n], by chunks: -> tuple of [N]. `models`: (hidden [N, H],
    head weight [V, H]) each. The logits are in float32 at least, and made again in the backward pass."""

    def part(targets, *flat):
        logits = (hidden @ weight.T for hidden, weight in zip(flat[::2], flat[1::2]))
        return read(targets, *(z.to(torch.promote_types(z.dtype, torch.float32)) / temperature for z in logits))

    rows, out = head_rows(len(models[0][1])), []
    for i in range(0, max(1, len(targets)), rows):  # no token at all is one empty chunk: the weights still get their gradient
        flat = [x for hidden, weight in models for x in (hidden[i : i + rows], weight)]
        out.append(checkpoint(part, targets[i : i + rows], *flat, use_reentrant=False))
    return tuple(torch.cat(parts) for parts in zip(*out))
