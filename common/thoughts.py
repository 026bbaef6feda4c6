"""Completions that begin with thoughts, embeddings fed in place of tokens: sampled step by step, and what a replay needs."""

import torch

from common.engines import HF, Decoder, draw


class Thinker(HF):
    """An engine whose completions begin with up to args.thoughts thoughts. What is fed for one is the script's:

    think(z, embedding, noise, args) -> (fed [b, H], shown [b], record [b, m], logp [b], closes [b] bool), with z [b, V] the
    logits at the temperature of sampling, or, where `layer` is given, the hidden states there, [b, H] (see policy.recorded);
    embedding the model's; noise [b, numbers] float64 in [0, 1), None at temperature 0, where nothing is drawn. shown: tokens
    that stand for the thoughts in the text. record: what the training pass needs to feed the same again. logp: of what was
    drawn. closes: the token that is shown is fed itself, and ends the thinking; an end token among these ends the completion.

    forced: two lists of token ids, which follow thoughts that such a token closed, and thoughts that the limit ended; they are
    fed, not drawn. Then tokens follow as in HF, with the same random numbers; with on=False nothing else does: the same policy,
    read in tokens. The noise is a function of (seed, completion, position)."""

    name = "thinker"

    def __init__(self, policy, tokenizer, args, think, numbers, m, layer=None, forced=((), ())):
        super().__init__(policy, tokenizer, stop=args.stop)
        self.args, self.think, self.numbers, self.m, self.layer, self.forced = args, think, numbers, m, layer, forced
        self.on, self.given = True, []

    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        """As HF's. What stands beside the tokens is kept until the next call, for attach()."""
        self.given = []
        return super().generate(prefixes, n, max_new_tokens, temperature, seeds)

    def attach(self, batch):
        """Gives the batch that was sampled last its column given [B, T, 2 + m], float64 for a model of that kind: whether a
        thought was fed, the token (for a thought the one that is shown), and the record, 0 where there is none. Forced tokens
        are not trained."""
        T = batch.mask.shape[1]
        given = [torch.nn.functional.pad(x[:, :T], (0, 0, 0, max(0, T - x.shape[1]))) for x, _ in self.given]
        drawn = [torch.nn.functional.pad(d[:, :T], (0, max(0, T - d.shape[1])), value=True) for _, d in self.given]
        batch.columns["given"] = torch.cat(given)
        batch.columns["given"][:, :, 1] = batch.ids[:, -T:]
        batch.trained = batch.trained & torch.cat(drawn)

    def _generate(self, lm, prefixes, n, budgets, temperature, seeds):
        T, B, device, pad = max(budgets), n * len(prefixes), self.device, self.tokenizer.pad_token_id
        wide = torch.promote_types(lm.dtype, torch.float32)
        streams, uniform = [torch.Generator().manual_seed(seed) for seed in seeds], torch.zeros(B, T, dtype=torch.float64)
        for i, (stream, most) in enumerate(zip(streams, budgets)):  # the numbers that HF draws come first
            uniform[n * i : n * i + n, :most] = torch.rand(n, most, dtype=torch.float64, generator=stream)
        real = torch.float32 if device.type == "mps" else torch.float64
        uniform, end = uniform.to(device, real), torch.tensor(self.end, device=device)
        limit = torch.tensor(budgets, device=device).repeat_interleave(n)
        most = limit.clamp(max=self.args.thoughts if self.on else 0)
        tokens, logp = torch.full((B, T), pad, device=device), torch.zeros(B, T, dtype=wide, device=device)
        given, forced = torch.zeros(B, T, 2 + self.m, dtype=wide, device=device), torch.full((B, 2 * T), -1, device=device)
        thinking, ended, lengths = most > 0, limit > limit, torch.zeros_like(limit)
        decoder = Decoder(lm, prefixes, n, pad, layers=() if self.layer is None else (self.layer,))
        embedding, fed, going = lm.get_input_embeddings(), None, (limit > 0).nonzero().squeeze(-1)
        while len(going):
            if len(going) < len(decoder.rows):
                stay = torch.isin(decoder.rows, going).nonzero().squeeze(-1)
                decoder.keep(stay)
                fed = fed if fed is None else fed[stay]
            rows, t = decoder.rows, int(lengths[going[0]])
            if t:
                decoder.feed(fed)
            token, token_logp = draw(decoder.logits, uniform[rows, t], temperature)
            must, noise = forced[rows, t], None
            token, token_logp = torch.where(must < 0, token, must), token_logp.to(wide).where(must < 0, 0.0)
            if temperature and thinking.any():  # every prompt's stream moves on at every position
                noise = [torch.rand(n, self.numbers, dtype=torch.float64, generator=stream) for stream in streams]
                noise = torch.cat(noise).to(device, real)
            fed, some = embedding(token), thinking[rows].nonzero().squeeze(-1)
            thought = torch.zeros_like(thinking[rows])
            if len(some):
                who = rows[some]
                z = decoder.logits.to(wide) / (temperature or 1.0) if self.layer is None else decoder.states[self.layer]
                mixed, shown, record, density, closes = self.think(
                    z[some], embedding, None if noise is None else noise[who], self.args
                )
                token[some], token_logp[some] = shown, density.to(logp.dtype)
                fed[some] = torch.where(closes[:, None], embedding(shown), mixed.to(fed.dtype))
                given[who, t, 0], given[who, t, 2:] = (~closes).to(wide), record.to(wide)
                thought[some], over = ~closes, closes | (t + 1 >= most[who])
                thinking[who[over]] = False
                for which, ids in zip((closes, over & ~closes), self.forced):
                    forced[who[which], t + 1 : t + 1 + len(ids)] = torch.tensor(ids, dtype=torch.int64, device=device)
            tokens[rows, t], logp[rows, t], lengths[rows] = token, token_logp, t + 1
            done = torch.isin(token, end) | self._stopped(tokens[rows, : t + 1])
            ended[rows] = done = done & ~thought
            going = rows[~done & (t + 1 < limit[rows])]
        self.given.append((given, forced[:, :T] < 0))
        found = zip(*(x.tolist() for x in (tokens, logp, lengths, ended)))
        return [(y[:k], p[:k], done) for y, p, k, done in found]
