"""Completions that begin with thoughts, embeddings fed in place of tokens: sampled step by step, and what a replay needs."""

import torch

from common.engines import HF


class Thinker(HF):
    """An engine whose completions begin with at most `most` thoughts. What is fed for one is the script's:

    think(z, embedding, noise, args) -> (fed [b, H], shown [b], record [b, m], logp [b], closes [b] bool), with z [b, V] the
    logits at the temperature of sampling, or, where `layer` is given, the hidden states there, [b, H] (see policy.recorded);
    embedding the model's; noise [b, numbers] float64 in [0, 1), None at temperature 0, where nothing is drawn. shown: tokens
    that stand for the thoughts in the text. record: what the training pass needs to feed the same again. logp: of what was
    drawn. closes: the token that is shown is fed itself, and ends the thinking; an end token among these ends the completion.

    forced: two lists of token ids, which follow thoughts that such a token closed, and thoughts that the limit ended; they are
    fed, not drawn. Then tokens follow as in HF, with the same random numbers; with on=False nothing else does: the same policy,
    read in tokens. The noise is a function of (seed, completion, position)."""

    name = "thinker"

    def __init__(self, policy, tokenizer, args, think, most, numbers, m, layer=None, forced=((), ())):
        super().__init__(policy, tokenizer, stop=args.stop)
        self.args, self.think, self.most, self.numbers, self.m, self.forced = args, think, most, numbers, m, forced
        self.layer, self.layers, self.on, self.given = layer, () if layer is None else (layer,), True, []

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
        forced = [torch.nn.functional.pad(f[:, :T], (0, max(0, T - f.shape[1])), value=-1) for _, f in self.given]
        batch.columns["given"] = torch.cat(given)
        batch.columns["given"][:, :, 1] = batch.ids[:, -T:]
        batch.trained = batch.trained & (torch.cat(forced) < 0)

    def _sampler(self, decoder, streams, limit, temperature):
        plain, device = super()._sampler(decoder, streams, limit, temperature), self.device
        B, T, each = len(limit), int(limit.max()), len(limit) // len(streams)
        most = limit.clamp(max=self.most if self.on else 0)
        wide = torch.promote_types(decoder.lm.dtype, torch.float32)
        given, forced = torch.zeros(B, T, 2 + self.m, dtype=wide, device=device), torch.full((B, 2 * T), -1, device=device)
        thinking, embedding = most > 0, decoder.lm.get_input_embeddings()
        self.given.append((given, forced[:, :T]))

        def step(uniform, t):
            rows = decoder.rows
            token, logp, _, _ = plain(uniform, t)
            must, noise = forced[rows, t], None
            token, logp = torch.where(must < 0, token, must), logp.where(must < 0, 0.0)
            if temperature and thinking.any():  # every prefix's stream moves on at every position
                noise = [torch.rand(each, self.numbers, dtype=torch.float64, generator=stream) for stream in streams]
                noise = torch.cat(noise).to(device, uniform.dtype)
            fed, some, may_end = embedding(token), thinking[rows].nonzero().squeeze(-1), torch.ones_like(token).bool()
            if len(some):
                who = rows[some]
                z = decoder.logits.to(wide) / (temperature or 1.0) if self.layer is None else decoder.states[self.layer]
                noise = None if noise is None else noise[who]
                mixed, token[some], record, density, closes = self.think(z[some], embedding, noise, self.args)
                logp[some], may_end[some] = density.to(logp.dtype), closes
                fed[some] = torch.where(closes[:, None], embedding(token[some]), mixed.to(fed.dtype))
                given[who, t, 0], given[who, t, 2:] = (~closes).to(wide), record.to(wide)
                over = closes | (t + 1 >= most[who])
                thinking[who[over]] = False
                for which, ids in zip((closes, over & ~closes), self.forced):
                    forced[who[which], t + 1 : t + 1 + len(ids)] = torch.tensor(ids, dtype=torch.int64, device=device)
            return token, logp, fed, may_end

        return step
