"""Engines take token ids and return token ids: transformers, stepped by hand, and vLLM."""

import contextlib
import copy
import importlib.util

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common import UserError, export, gpu
from common.models import auto, end_tokens
from common.policy import recorded
from common.vllm_engine import VLLM


def make_engine(policy, tokenizer, args, context, heated=False):
    """The engine of args.engine: hf, vllm, or auto (vLLM where it is installed and there is a GPU). `heated`: whether
    temperatures may be functions (see draw), which vLLM has to know from the start."""
    installed = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm" and not installed:
        raise UserError("--engine vllm: vLLM is not installed (pip install -r requirements-gpu.txt)")
    if args.engine == "vllm" or args.engine == "auto" and installed and gpu.device().type == "cuda" and not policy.pictures:
        return VLLM(policy, tokenizer, args, context, heated)
    return HF(policy, tokenizer, stop=vars(args).get("stop", ()))


def draw(logits, uniform, temperature):
    """logits [b, V], uniform [b] float64 in [0, 1) -> (token ids [b], their log-probs [b] in float32). The token is where the
    cumulative distribution passes the uniform number, so that it depends on that alone. temperature: a number (0: the
    likeliest), or a function of the logits -> [b]."""
    heat = temperature(logits)[:, None] if callable(temperature) else temperature or 1.0
    logp = torch.log_softmax(logits.float() / heat, -1)
    tokens = logp.argmax(-1, keepdim=True)
    if temperature:
        cdf = logp.exp().cumsum(-1, dtype=uniform.dtype)
        tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp_(max=logits.shape[1] - 1)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)


class _Growing(DynamicLayer):
    """Keys and values [b, heads, length, width] as the beginnings of buffers with room for more positions: without gradients a
    position is written into its place, and rows that stay are not copied; DynamicLayer writes all of them anew each time."""

    room = (torch.empty(0, 0, 0, 0),)  # in use as long as the keys begin where it begins

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_grad_enabled() or not self.is_initialized:
            return super().update(key_states, value_states)
        begun, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.room[0].data_ptr() != self.keys.data_ptr() or end > self.room[0].shape[2]:
            self.room = [torch.nn.functional.pad(x, (0, 0, 0, end - begun + 63)) for x in (self.keys, self.values)]
        for room, x in zip(self.room, (key_states, value_states)):
            room[:, :, begun:end] = x
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.room[0].data_ptr() != self.keys.data_ptr() or len(indices) > len(self.keys):
            return super().batch_select_indices(indices)
        to = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        for x in (self.keys, self.values):
            x[to] = x[indices[to]]
        self.keys, self.values, *self.room = (x[: len(indices)] for x in (self.keys, self.values, *self.room))


class Decoder:
    """A causal language model that is stepped: prefixes are read at once, n rows each, then every feed() is one more position.

    logits [b, V]: of the next token, of the rows that are there; rows [b]: their numbers (prefix i has n i to n i + n - 1);
    states {layer: [b, H]}: hidden states at the last position read, of the `layers` asked for (see policy.recorded).
    pictures: a vision.Pictures, what ids below -1 stand for; tokens that would stand for one are never drawn then."""

    def __init__(self, lm, prefixes, n=1, pad=0, layers=(), pictures=None):
        width, self.lm, self.device, self.layers = max(map(len, prefixes)), lm, lm.device, layers
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prefixes], device=self.device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=self.device)
        self.attention, self.cache, self.barred = attention, DynamicCache(config=lm.config), getattr(pictures, "barred", None)
        self.cache.layers = [_Growing() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        self.ahead = torch.zeros_like(attention[:, :1])  # positions that are left out behind a picture, below 0
        first = pictures(lm, ids, attention.bool()) if pictures else dict(input_ids=ids)
        self._read(**first)
        if pictures:
            self.ahead = first["position_ids"].amax((0, 2))[:, None] + 1 - attention.sum(1, keepdim=True)
        if n > 1:
            self.cache.batch_repeat_interleave(n)
        self.attention, self.logits, self.ahead = (x.repeat_interleave(n, 0) for x in (attention, self.logits, self.ahead))
        self.states = {layer: x.repeat_interleave(n, 0) for layer, x in self.states.items()}
        self.rows = torch.arange(len(self.logits), device=self.device)

    def _read(self, every=False, **fed):
        """ids or embeddings [b, k, ...], behind what was read -> logits of the last position, or of every one."""
        k = next(iter(fed.values())).shape[1]
        fed = dict(position_ids=(self.attention.cumsum(1) - 1).clamp(min=0)[:, -k:] + self.ahead) | fed
        with recorded(self.lm, self.layers) as states:
            hidden = gpu.body(self.lm)(**fed, attention_mask=self.attention, past_key_values=self.cache, use_cache=True)
            logits = self.lm.lm_head(hidden.last_hidden_state[:, -k if every else -1 :])
        if self.barred:
            logits[:, :, self.barred] = -torch.inf
        self.logits, self.states = logits[:, -1], {layer: x[:, -1] for layer, x in states.items()}
        return logits

    def feed(self, x, every=False):
        """x: token ids [b] or [b, k], or embeddings [b, H] or [b, k, H], in the order of `rows`; every=True -> logits
        [b, k, V] behind each of the k positions, where several are fed at once."""
        kind = "inputs_embeds" if x.is_floating_point() else "input_ids"
        x = x[:, None] if x.dim() == (2 if x.is_floating_point() else 1) else x
        self.attention = torch.nn.functional.pad(self.attention, (0, x.shape[1]), value=1)
        logits = self._read(every, **{kind: x})
        return logits if every else None

    def keep(self, index):
        """Goes on with the rows at these places [b'], in this order; a place may come more than once."""
        self.cache.batch_select_indices(index)
        self.rows, self.attention = self.rows[index], self.attention[index]
        self.logits, self.ahead = self.logits[index], self.ahead[index]
        self.states = {layer: x[index] for layer, x in self.states.items()}

    def crop(self, k):
        """Forgets the last k positions of every row; `logits` are stale until the next feed()."""
        if k:
            self.cache.crop(-k)
            self.attention = self.attention[:, :-k]


class HF:
    """transformers, by the Decoder: a prompt is read once for its n completions, and a completion that has ended leaves the
    batch. Uses the policy's own weights; a sharded policy gets a full copy, synced after updates."""

    name, layers = "hf", ()

    def __init__(self, policy, tokenizer, rows=1024, stop=()):
        self.policy, self.tokenizer, self.rows, self.stop = policy, tokenizer, rows, stop
        self.device, self.end = gpu.device(), end_tokens(policy.lm, tokenizer)
        self.lm = policy.lm
        if gpu.world() > 1:
            config, dtype = copy.deepcopy(policy.lm.config), next(policy.parameters()).dtype
            self.lm = auto(config).from_config(config, dtype=dtype).to(self.device)
            self.sync()

    def sync(self):
        """The policy's weights into the copy, where there is one."""
        own = dict(self.lm.named_parameters()) | dict(self.lm.named_buffers())
        for name, weight in export.full_weights(self.policy) if self.lm is not self.policy.lm else ():
            if name in own:
                own[name].data.copy_(weight)

    def sleep(self):
        """Nothing, like wake and close: the weights are the trainer's own."""

    wake = close = sleep

    @torch.no_grad()
    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        """-> for every prefix its n completions, each (token ids with the EOS, their log-probs, ended by EOS or a stop string,
        which stays in it). A prefix is any list of token ids, the beginning of a completion included; max_new_tokens is a
        number, or a list of one per prefix."""
        out, per_call = [], max(1, self.rows // n)
        budgets = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prefixes)
        with self.whole() as lm:
            for first in range(0, len(prefixes), per_call):
                some = slice(first, first + per_call)
                out += self._generate(lm, prefixes[some], n, budgets[some], temperature, seeds[some])
        return out

    @contextlib.contextmanager
    def whole(self):
        """The whole model, set up for decoding: for a script that steps a Decoder itself. On a CPU its large float32 linear
        layers work on copies of their weights in oneDNN's own layout: torch's plain product is slow for few rows."""
        training, large = self.lm.training, [m for m in self.lm.modules() if type(m) is torch.nn.Linear]
        large = [m for m in large if m.weight.numel() >= 2**17 and m.weight.dtype == torch.float32]
        for m in large if self.device.type == "cpu" and torch.backends.mkldnn.is_available() else ():
            weight = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach())
            m.forward = lambda x, w=weight, b=m.bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
        self.lm.eval()
        try:
            yield self.lm
        finally:
            self.lm.train(training)
            for m in large:
                vars(m).pop("forward", None)

    def _generate(self, lm, prefixes, n, budgets, temperature, seeds):
        T, B, pad = max(budgets), n * len(prefixes), self.tokenizer.pad_token_id
        streams, uniform = [torch.Generator().manual_seed(seed) for seed in seeds], torch.zeros(B, T, dtype=torch.float64)
        for i, (stream, most) in enumerate(zip(streams, budgets)):  # the CPU's numbers, so that every device draws the same
            uniform[n * i : n * i + n, :most] = torch.rand(n, most, dtype=torch.float64, generator=stream)
        uniform = (uniform.float() if self.device.type == "mps" else uniform).to(self.device)
        limit, end = torch.tensor(budgets).repeat_interleave(n).to(self.device), torch.tensor(self.end, device=self.device)
        tokens, logp = torch.full((B, T), pad, device=self.device), torch.zeros_like(uniform)
        lengths, decoder = torch.zeros_like(limit), Decoder(lm, prefixes, n, pad, self.layers, self.policy.pictures)
        ended, step = limit > limit, self._sampler(decoder, streams, limit, temperature)
        t, going, fed = 0, limit > 0, decoder.rows
        while k := int(going.sum()):
            if k < len(going):  # the last rows fill the gaps, so that few are moved
                index = torch.arange(k, device=self.device)
                index[~going[:k]] = going[k:].nonzero().squeeze(-1) + k
                decoder.keep(index)
                fed = fed[index]
            if t:
                decoder.feed(fed)
            rows = decoder.rows
            tokens[rows, t], logp[rows, t], fed, may_end = step(uniform[rows, t], t)
            t, ended[rows] = t + 1, (torch.isin(tokens[rows, t], end) | self._stopped(tokens[rows, : t + 1])) & may_end
            lengths[rows], going = t, ~ended[rows] & (t < limit[rows])
        return [(y[:k], p[:k], done) for y, p, k, done in zip(*(x.tolist() for x in (tokens, logp, lengths, ended)))]

    def _sampler(self, decoder, streams, limit, temperature):
        """-> step(uniform [b], t) -> (tokens, log-probs, what is fed for them, whether a completion may end there), of the rows
        that are there. streams: a generator for each prefix, behind the numbers that tokens are drawn with."""

        def step(uniform, t):
            token, logp = draw(decoder.logits, uniform, temperature)
            return token, logp.to(uniform.dtype), token, True

        return step

    def _stopped(self, tokens):
        """[b, t] -> [b] bool, or False: which of the completions so far end in a stop string. A token is a byte at least."""
        if not self.stop:
            return False
        width = max(len(s.encode()) for s in self.stop) + 1
        texts = self.tokenizer.batch_decode(tokens[:, -width:])
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=self.device)
