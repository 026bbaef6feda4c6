"""Rollouts: engines that take token ids and return token ids, and the batch that the loop trains on."""

import contextlib
import os
import tempfile
from dataclasses import dataclass, fields

import torch

from common import UserError, gpu, models


@dataclass
class Rollout:
    """B = P * G completions, groups contiguous; prompts padded on the left, completions on the right, S = prompt + T.
    Token ids are those the engine sampled: nothing is decoded and encoded again on the way to the loss."""

    prompt_id: torch.Tensor  # [B] int64, stable over epochs
    ids: torch.Tensor  # [B, S] int64
    attention_mask: torch.Tensor  # [B, S] bool
    mask: torch.Tensor  # [B, T] bool: completion tokens, the ending EOS included
    sampler_logp: torch.Tensor  # [B, T] float32: what the engine says of its samples
    truncated: torch.Tensor  # [B] bool: no EOS within max_new_tokens
    accuracy: torch.Tensor  # [P, G] float32: right or wrong, before any shaping
    reward: torch.Tensor  # [P, G] float32
    policy_version: torch.Tensor  # [B] int64: optimizer steps behind the sampling policy
    old_logp: torch.Tensor | None = None  # [B, T] float32, by the trainer, before the first update
    ref_logp: torch.Tensor | None = None  # [B, T] float32, of the frozen reference (only where beta > 0)
    adv: torch.Tensor | None = None  # [B, T] float32
    old_values: torch.Tensor | None = None  # [B, T] float32, of the critic before the first update (only where there is one)
    returns: torch.Tensor | None = None  # [B, T] float32, what the critic is fitted to
    weights: torch.Tensor | None = None  # [B, T] float32: token_weights of the minibatch that a row is in
    texts: list | None = None  # B decoded completions, for checking and reading only
    answers: list | None = None  # B extracted answers
    timeouts: int = 0  # completions whose check was killed

    def take(self, rows):
        """Rows [b] as a batch of their own, cut to their longest prompt and completion. Per-group fields stay behind."""
        T = self.mask.shape[1]
        prompts, lengths = self.attention_mask[rows, :-T].sum(1), self.mask[rows].sum(1)
        left = self.attention_mask.shape[1] - T - max(prompts.tolist(), default=0)
        t = max([1, *lengths.tolist()])
        out = {"accuracy": None, "reward": None}
        for name, value in self._tensors():
            value = value[rows]
            if name in ("ids", "attention_mask"):
                value = value[:, left : value.shape[1] - (T - t)]
            elif value.dim() == 2:
                value = value[:, :t]
            out[name] = value
        return Rollout(**out)

    def _tensors(self):
        for f in fields(self):
            if isinstance(getattr(self, f.name), torch.Tensor) and f.name not in ("accuracy", "reward"):
                yield f.name, getattr(self, f.name)

    def groups(self, keep):
        """The groups with numbers keep [p], texts and rewards included."""
        G = self.reward.shape[1]
        keep = keep.to(self.ids.device)
        rows = (keep[:, None] * G + torch.arange(G, device=keep.device)).flatten()
        out = self.take(rows)
        out.accuracy, out.reward = self.accuracy[keep], self.reward[keep]
        out.texts, out.answers = ([values[i] for i in rows.tolist()] for values in (self.texts, self.answers))
        return out

    @staticmethod
    def join(batches):
        """Several batches with the same fields as one, padded to the longest prompt and completion."""
        T = max(b.mask.shape[1] for b in batches)
        S0 = max(b.ids.shape[1] - b.mask.shape[1] for b in batches)
        out = {name: [] for name, _ in batches[0]._tensors()}
        for b in batches:
            right, left = T - b.mask.shape[1], S0 - (b.ids.shape[1] - b.mask.shape[1])
            for name, value in b._tensors():
                pad = () if value.dim() == 1 else (left if name in ("ids", "attention_mask") else 0, right)
                out[name].append(torch.nn.functional.pad(value, pad) if pad else value)
        joined = Rollout(accuracy=None, reward=None, **{name: torch.cat(values) for name, values in out.items()})
        joined.accuracy, joined.reward = (torch.cat([getattr(b, k) for b in batches]) for k in ("accuracy", "reward"))
        joined.texts, joined.answers = ([x for b in batches for x in getattr(b, k)] for k in ("texts", "answers"))
        return joined

    def micro_batches(self, rows, budget):
        """Cuts rows [b] into micro-batches of at most `budget` tokens; completions of one prompt stay together where they can.
        Every rank yields equally many (FSDP needs it): ranks that run out repeat a row with weight 0."""
        T = self.mask.shape[1]
        sizes = torch.stack([self.attention_mask[rows, :-T].sum(1), self.mask[rows].sum(1)], 1).tolist()
        for cut in cuts(sizes, self.prompt_id[rows].tolist(), budget):
            if cut:
                yield self.take(rows[torch.tensor(cut, device=rows.device)])
            else:
                idle = self.take(torch.zeros(1, dtype=torch.int64, device=self.ids.device))
                idle.mask, idle.weights = idle.mask & False, idle.weights * 0 if idle.weights is not None else None
                yield idle


def cuts(sizes, prompts, budget):
    """sizes [(prompt tokens, completion tokens)], prompts [anything that tells them apart] -> the items' numbers in lists of at
    most `budget` tokens (one item may have more), the long ones first. A prompt that a list's items have in common counts once
    (models.Packing). Every rank gets equally many lists (FSDP needs it), empty ones where it has fewer."""
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
def logp_of(policy, batch, args):
    """Per-token log-probs [B, T] of a whole rollout under `policy`, by micro-batches, temperature included."""
    wide = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    out = torch.zeros(batch.mask.shape, dtype=wide, device=batch.ids.device)
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    batch.weights = rows[:, None].expand(batch.mask.shape).contiguous()  # carries the row number through the cut
    for mb in batch.micro_batches(rows, args.micro_batch_tokens):
        logp, _ = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
        if mb.mask.any():
            out[mb.weights[:, 0], : logp.shape[1]] = logp
    batch.weights = None
    return out


def collect(engine, scorer, tokenizer, examples, args, step):
    """Samples args.group_size completions for every example of this rank and scores them -> Rollout on the policy's device.
    A truncated completion is wrong, whatever its text says."""
    G, T_max = args.group_size, args.max_new_tokens
    offset = gpu.rank() * len(examples)
    seeds = [hash_seed(args.seed, step, offset + i) for i in range(len(examples))]
    out = engine.generate([e.ids for e in examples], G, T_max, args.temperature, seeds)
    return assemble(out, [e for e in examples for _ in range(G)], G, scorer, tokenizer, args, step, engine.device)


def assemble(out, examples, G, scorer, tokenizer, args, step, device):
    """Engine output [(ids, logp, ended)] of B examples -> scored Rollout."""
    B = len(out)
    S0, T = max(len(e.ids) for e in examples), max(1, max(len(ids) for ids, _, _ in out))
    ids = torch.full((B, S0 + T), tokenizer.pad_token_id, dtype=torch.int64)
    attention, logp = torch.zeros(B, S0 + T, dtype=torch.bool), torch.zeros(B, T)
    for i, (e, (tokens, token_logp, _)) in enumerate(zip(examples, out)):
        row = e.ids + tokens
        start = S0 - len(e.ids)
        ids[i, start : start + len(row)] = torch.tensor(row)
        attention[i, start : start + len(row)] = True
        logp[i, : len(tokens)] = torch.tensor(token_logp)
    truncated = torch.tensor([not ended for _, _, ended in out])
    texts = tokenizer.batch_decode([tokens for tokens, _, _ in out], skip_special_tokens=True)
    before = getattr(scorer, "timeouts", 0)
    answers, scores = scorer(texts, [e.answer for e in examples])
    accuracy = torch.tensor(scores).masked_fill(truncated, 0.0).view(-1, G)
    reward = accuracy.clone()
    if args.format_reward:
        from common.rewards import has_format

        reward += args.format_reward * torch.tensor([has_format(t) for t in texts]).float().view(-1, G)
    return Rollout(
        prompt_id=torch.tensor([e.id for e in examples], device=device),
        ids=ids.to(device),
        attention_mask=attention.to(device),
        mask=attention[:, S0:].to(device),
        sampler_logp=logp.to(device),
        truncated=truncated.to(device),
        accuracy=accuracy.to(device),
        reward=reward.to(device),
        policy_version=torch.full((B,), step, device=device),
        texts=texts,
        answers=answers,
        timeouts=getattr(scorer, "timeouts", 0) - before,
    )


def evaluate(engine, scorer, tokenizer, examples, args):
    """Greedy accuracy on held-out examples, over all ranks."""
    mine = examples[gpu.rank() :: gpu.world()]
    out = engine.generate([e.ids for e in mine], 1, args.max_new_tokens, 0.0, [0] * len(mine))
    texts = tokenizer.batch_decode([tokens for tokens, _, _ in out], skip_special_tokens=True)
    _, scores = scorer(texts, [e.answer for e in mine])
    right = sum(s for s, (_, _, ended) in zip(scores, out) if ended)
    return gpu.total(right) / len(examples)


def minibatches(batch, args, step, token_weights):
    """Cuts the rollout of all ranks into args.minibatches random parts, args.epochs times over; yields this rank's rows [b]
    of a part and the weights [B, T] of token_weights(mask, args) on the whole part, which gradient accumulation and data
    parallelism therefore cannot change."""
    mask = gpu.gather(batch.mask)
    mine = len(batch.mask) * gpu.rank()
    for epoch in range(args.epochs):
        shuffle = torch.Generator().manual_seed(hash_seed(args.seed, step, epoch, 7))
        for part in torch.randperm(len(mask), generator=shuffle).to(mask.device).chunk(args.minibatches):
            weights = torch.zeros(mask.shape, device=mask.device)
            weights[part] = token_weights(mask[part], args).float()
            rows = part[(part >= mine) & (part < mine + len(batch.mask))] - mine
            yield rows, gpu.local(weights)[:, : batch.mask.shape[1]]


def diagnostics(logp, mb, entropy):
    """What every script logs per token: entropy, k3 distance and ratio to the rollout's policy, gap to the sampler."""
    log_ratio = (logp.detach() - mb.old_logp).clamp(-20, 20)
    gap = (mb.old_logp - mb.sampler_logp).abs()
    return dict(
        entropy=entropy, approx_kl=(-log_ratio).exp() + log_ratio - 1, ratio_max=log_ratio.exp(),
        ratio_min=log_ratio.exp(), sampler_gap=gap, sampler_gap_max=gap,
    )  # fmt: skip


def summary(batch):
    """Means over the completions of all ranks. Raises UserError where the sampler's log-probs are not those of the policy
    that it should have had: weights that did not reach the engine, or another temperature."""
    gap = ((batch.old_logp - batch.sampler_logp).abs() * batch.mask).double().sum().item()
    gap = gpu.total(gap) / max(1, gpu.total(int(batch.mask.sum())))
    if gap > 0.5:  # NaN passes: Run.finite has a clearer word for it
        raise UserError(
            f"the sampler's log-probs are {gap:.2f} nat per token away from the policy's: its weights are not in step "
            "(--engine hf rules the engine out)"
        )
    lengths, spread = batch.mask.sum(1).float(), batch.accuracy.max(1).values - batch.accuracy.min(1).values
    values = dict(
        reward=batch.reward, accuracy=batch.accuracy, length=lengths, truncated=batch.truncated.float(),
        informative_groups=(spread > 1e-6).float(), adv_mean=batch.adv.mean(1),
    )  # fmt: skip
    out = {k: gpu.total(v.double().sum().item()) / gpu.total(v.numel()) for k, v in values.items()}
    out["reward_timeouts"] = gpu.total(batch.timeouts)
    out["adv_max"], out["adv_min"] = gpu.maximum(batch.adv.max().item()), -gpu.maximum(-batch.adv.min().item())
    return out


def hash_seed(*numbers):
    """One 63-bit seed from several integers: randomness is a function of (seed, step, prompt), so that a resumed run and
    a run on more ranks sample the same completions."""
    state = 0x9E3779B97F4A7C15
    for n in numbers:
        state = ((state ^ (n & (1 << 64) - 1)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
        state ^= state >> 29
    return state >> 1


# ---------------------------------------------------------------- engines


def make_engine(policy, tokenizer, args, context):
    """The engine that `args.engine` names: hf, vllm, or auto (vllm where it is installed and the model is a real one)."""
    import importlib.util

    installed = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm" and not installed:
        raise UserError("--engine vllm: vLLM is not installed (pip install -r requirements-gpu.txt)")
    if args.engine == "vllm" or args.engine == "auto" and installed and torch.cuda.is_available():
        return VLLM(policy, tokenizer, args, context)
    return HF(policy, tokenizer)


def draw(logits, uniform, temperature):
    """logits [b, V], uniform [b] float64 in [0, 1) -> (token ids [b], their log-probs [b] in float32). The token is where the
    cumulative distribution passes the uniform number, so a completion depends on its own numbers alone; temperature 0: the
    likeliest."""
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp_(max=logits.shape[1] - 1)
    else:
        tokens = logp.argmax(-1, keepdim=True)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)


@contextlib.contextmanager
def packed_linears(lm):
    """Inside, the large float32 linear layers of `lm` on a CPU work on copies of their weights in oneDNN's own layout, since
    torch's plain product is slow where a matrix has the few rows of a decoding step."""
    layers = []
    if torch.backends.mkldnn.is_available():
        layers = [m for m in lm.modules() if type(m) is torch.nn.Linear and m.weight.numel() >= 2**17]
        layers = [m for m in layers if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    for m in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(m.weight.detach())
        m.forward = lambda x, w=weight, b=m.bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    try:
        yield
    finally:
        for m in layers:
            del m.forward


def growing_cache(config, most):
    """transformers' DynamicCache with room to grow, up to `most` tokens: a new token is written behind the others, where the
    original copies the whole cache to append it. batch_select_indices moves only the rows whose place changes. Layers with a
    sliding window stay as they are."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        def lazy_initialization(self, keys, values):
            super().lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
            self.buffers = self.keys, self.values

        def update(self, keys, values, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            old, rows, end = self.keys.shape[2], len(keys), self.keys.shape[2] + keys.shape[2]
            if end > self.buffers[0].shape[2]:
                kept, room = (self.keys, self.values), max(end, min(most, end + max(64, end // 2)))
                self.buffers = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
                for buffer, x in zip(self.buffers, kept):
                    buffer[:, :, :old] = x
            for buffer, x in zip(self.buffers, (keys, values)):
                buffer[:rows, :, old:end] = x
            self.keys, self.values = (buffer[:rows, :, :end] for buffer in self.buffers)
            return self.keys, self.values

        def batch_repeat_interleave(self, repeats):
            super().batch_repeat_interleave(repeats)
            self.buffers = self.keys, self.values

        def batch_select_indices(self, indices):
            moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
            for x in (self.keys, self.values):
                x[moved] = x[indices[moved]]
            self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    cache = DynamicCache(config=config)
    cache.layers = [Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class HF:
    """transformers, with a loop of its own: a prompt is read once for its n completions, and a completion that has ended
    leaves the batch. Uses the policy's own weights; a sharded policy gets a full copy, synced after updates."""

    name = "hf"

    def __init__(self, policy, tokenizer, rows=1024):
        import copy

        self.policy, self.tokenizer, self.rows = policy, tokenizer, rows
        self.device, self.end = gpu.device(), models.end_tokens(policy.lm, tokenizer)
        self.lm = policy.lm
        if gpu.world() > 1:
            from transformers import AutoModelForCausalLM

            dtype = next(policy.parameters()).dtype
            self.lm = AutoModelForCausalLM.from_config(copy.deepcopy(policy.lm.config), dtype=dtype).to(self.device)
            self.sync()

    def sync(self):
        if self.lm is not self.policy.lm:
            own = dict(self.lm.named_parameters())
            for name, weight in gpu.full_weights(self.policy):
                if name in own:
                    own[name].data.copy_(weight)

    def sleep(self):
        pass

    wake = close = sleep

    @torch.no_grad()
    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        """-> for every prefix its n completions, each (token ids with the EOS, their log-probs, ended by EOS)."""
        out, per_call, training = [], max(1, self.rows // n), self.lm.training
        self.lm.eval()
        with gpu.no_checkpointing(self.lm), packed_linears(self.lm):
            for first in range(0, len(prefixes), per_call):
                some = slice(first, first + per_call)
                out += self._generate(prefixes[some], n, max_new_tokens, temperature, seeds[some])
        self.lm.train(training)
        return out

    def _generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        width, pad = max(map(len, prefixes)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prefixes], device=self.device)
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prefixes], device=self.device)
        streams = [torch.Generator().manual_seed(s) for s in seeds]  # the CPU's, so that every device draws the same
        uniform = torch.cat([torch.rand(n, max_new_tokens, dtype=torch.float64, generator=g) for g in streams]).to(self.device)
        end, cache = torch.tensor(self.end, device=self.device), growing_cache(self.lm.config, width + max_new_tokens)

        def logits_after(ids):
            positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            return self.lm(
                input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip

        logits = logits_after(ids).repeat_interleave(n, 0)
        attention = attention.repeat_interleave(n, 0)
        if n > 1:
            cache.batch_repeat_interleave(n)
        B = len(uniform)
        tokens = torch.full((B, max_new_tokens), pad, device=self.device)
        logp, lengths = torch.zeros(B, max_new_tokens, device=self.device), torch.zeros(B, dtype=torch.int64)
        rows = torch.arange(B, device=self.device)  # which completions are still being written
        for t in range(max_new_tokens):
            token, token_logp = draw(logits, uniform[rows, t], temperature)
            tokens[rows, t], logp[rows, t] = token, token_logp
            lengths[rows.cpu()] = t + 1
            going = (~torch.isin(token, end)).nonzero().squeeze(-1)
            if t + 1 == max_new_tokens or not len(going):
                break
            if len(going) < len(rows):  # the last rows take the places of those that have ended
                place = torch.arange(len(going), device=self.device)
                place[~torch.isin(place, going)] = going[going >= len(going)]
                rows, token, attention = rows[place], token[place], attention[place]
                cache.batch_select_indices(place)
            attention = torch.nn.functional.pad(attention, (0, 1), value=1)
            logits = logits_after(token[:, None])
        lengths = lengths.tolist()
        tokens, logp = tokens.tolist(), logp.tolist()
        return [(y[:k], p[:k], y[k - 1] in self.end) for y, p, k in zip(tokens, logp, lengths)]


class VLLM:
    """vLLM 0.32 in this process: one engine per rank on the rank's own device, or one per args.vllm_tp neighbouring ranks that
    share out its weights; these are replaced in place after every update. On a GPU it sleeps while the trainer updates."""

    name = "vllm"

    def __init__(self, policy, tokenizer, args, context):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm

        if not vllm.__version__.startswith("0.32."):
            print(f"note: vLLM {vllm.__version__} is not the tested 0.32; if it misbehaves: --engine hf", flush=True)
        self.policy, self.device, self.end = policy, gpu.device(), models.end_tokens(policy.lm, tokenizer)
        cuda, self.asleep, self.tp = self.device.type == "cuda", set(), args.vllm_tp
        if gpu.world() % self.tp:
            raise UserError(f"--vllm-tp {self.tp}: {gpu.world()} processes cannot be shared out in groups of {self.tp}")
        with tempfile.TemporaryDirectory() as folder:  # shapes only: the weights come by sync()
            policy.lm.config.save_pretrained(folder)
            self.llm = vllm.LLM(
                model=folder, skip_tokenizer_init=True, load_format="dummy", dtype=args.dtype,
                max_model_len=context, tensor_parallel_size=self.tp, logprobs_mode="processed_logprobs",
                enable_prefix_caching=True, distributed_executor_backend="external_launcher" if gpu.world() > 1 else "uni",
                gpu_memory_utilization=args.vllm_memory, enforce_eager=not cuda, enable_sleep_mode=cuda,
                max_num_batched_tokens=max(8192, context), seed=0, disable_log_stats=True,
            )  # fmt: skip
        self.sync()

    def sync(self):
        """The policy's weights into the engine, which may be asleep. That they arrived shows in sampler_gap: summary()."""
        self._wake("weights")
        weights = ((name, weight.to(self.device)) for name, weight in gpu.full_weights(self.policy))
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        self.llm.reset_prefix_cache()

    def sleep(self):
        """Gives the GPU's memory to the trainer; the weights wait in the CPU's."""
        if self.device.type == "cuda" and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def wake(self):
        self._wake("weights", "kv_cache")

    def _wake(self, *parts):
        if parts := [p for p in parts if p in self.asleep]:
            self.llm.wake_up(tags=parts)
            self.asleep -= set(parts)

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        """As HF.generate. top-p and top-k stay off: a cut distribution is not the one that the trainer's log-probs are of.
        The ranks of a group hand all their prompts to the engine that they share, in the same order, and keep their own."""
        from vllm import SamplingParams

        mine = slice(0, len(prefixes))
        if self.tp > 1:
            first = gpu.rank() // self.tp * self.tp
            group = gpu.gather_objects((prefixes, seeds))[first : first + self.tp]
            before = sum(len(p) for p, _ in group[: gpu.rank() - first])
            mine = slice(before, before + len(prefixes))
            prefixes, seeds = ([x for part in group for x in part[i]] for i in (0, 1))
        params = [
            SamplingParams(
                n=n, temperature=temperature, max_tokens=max_new_tokens, logprobs=0, seed=s % 2**31,
                stop_token_ids=self.end, detokenize=False,
            ) for s in seeds
        ]  # fmt: skip
        done = self.llm.generate([{"prompt_token_ids": p} for p in prefixes], params, use_tqdm=False)
        out = []
        for request in done[mine]:
            for c in request.outputs:
                tokens = list(c.token_ids)
                logp = [d[t].logprob for t, d in zip(tokens, c.logprobs)]
                out.append((tokens, logp, bool(tokens) and tokens[-1] in self.end))
        return out
