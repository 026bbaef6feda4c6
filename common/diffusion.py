"""Masked diffusion: what a model that sees all positions is made from, its mask token, and a sampler in the engines' place."""

import dataclasses
from functools import partial

import torch

from common import UserError, tasks
from common.engines import HF, draw
from common.policy import Policy
from common.worlds import tiny


def world(source):
    """The built-in task `source` for tiny models that see all positions, None where it is no built-in one."""
    task = tasks.world(source)
    if task is None or task.demonstrate is None or task.shape.get("is_causal") is False:
        return task
    shape = task.shape | dict(is_causal=False, initializer_range=0.08)
    return dataclasses.replace(task, shape=shape, tokenizer=partial(tiny.with_mask, task.tokenizer or tiny.characters))


def mask_id(config, tokenizer, args):
    """The token that stands at a masked position. Raises UserError where the model has none."""
    found = next((x for x in (tokenizer.mask_token_id, getattr(config, "mask_token_id", None)) if x is not None), None)
    if found is None:
        raise UserError(f"model {args.model}: neither its tokenizer nor its config names a mask token")
    return found


def fill(batch, L, end):
    """A Batch of completions of at most L tokens as canvases of L positions, filled up with the token `end`."""
    T, more = batch.mask.shape[1], L - batch.mask.shape[1]
    mask = torch.nn.functional.pad(batch.mask, (0, more))
    ids = torch.nn.functional.pad(batch.ids, (0, more))
    ids[:, -L:] = ids[:, -L:].where(mask, end)
    everywhere = torch.ones_like(mask)
    seen = torch.cat([batch.attention_mask[:, :-T], everywhere], 1)
    return dataclasses.replace(batch, ids=ids, attention_mask=seen, mask=everywhere, trained=everywhere)


def check_canvas(args):
    """Raises UserError where a canvas cannot be filled in so many steps, in such blocks."""
    L, steps = args.max_new_tokens, args.denoising_steps
    width = args.block_length or L
    if L % width:
        raise UserError(f"--block-length {width} must divide the canvas of --max-new-tokens {L}")
    if steps > L:
        raise UserError(f"--denoising-steps {steps} is more than the canvas has positions, {L}")
    if steps < L // width:
        raise UserError(f"--denoising-steps {steps}: each of the {L // width} blocks needs one")


class Canvas(HF):
    """An engine that fills a canvas of args.max_new_tokens masked positions behind each prompt. `unmask`(guess, masked [b, L],
    noise [b, denoising steps + 1, L], temperature, args) -> tokens [b, L] is the script's: guess(tokens [b, L], masked,
    noise [b, L], temperature) -> (tokens [b, L], their probabilities at temperature 1), 0 where nothing is masked. All noise
    is a function of (seed, completion, step, position). Completions are whole canvases, EOS as filler included; their
    log-probs, which a sampler of this kind does not have, are given as 0."""

    name = "canvas"

    def __init__(self, policy, tokenizer, args, unmask):
        super().__init__(policy, tokenizer)
        self.args, self.unmask, self.mask_id = args, unmask, mask_id(policy.lm.config, tokenizer, args)
        check_canvas(args)

    def guess(self, lm, prompts, seen, tokens, masked, noise, temperature):
        """One pass over the canvas behind prompts [b, S] with seen [b, S] -> (tokens [b, L], their probabilities [b, L])."""

        def pick(uniform, logits):
            logits = logits.index_fill(1, torch.tensor([self.mask_id], device=logits.device), -torch.inf)
            found, _ = draw(logits, uniform, temperature)
            return found, logits.softmax(-1).gather(1, found[:, None])[:, 0]

        policy, out = Policy(lm), []
        rows = max(1, self.args.micro_batch_tokens // (prompts.shape[1] + tokens.shape[1]))
        canvas = torch.cat([prompts, tokens.masked_fill(masked, self.mask_id)], 1)
        for some in torch.arange(len(canvas), device=canvas.device).split(rows):
            attention = torch.cat([seen[some], torch.ones_like(masked[some])], 1)
            out.append(policy(canvas[some], attention, masked[some], read=pick, given=noise[some]))
        return tuple(torch.cat(parts) for parts in zip(*out))

    def _generate(self, lm, prefixes, n, budgets, temperature, seeds):
        L, steps, width = self.args.max_new_tokens, self.args.denoising_steps, max(map(len, prefixes))
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.cat([torch.rand(n, steps + 1, L, dtype=torch.float64, generator=g) for g in draws]).to(self.device)
        pad = self.tokenizer.pad_token_id
        prompts = torch.tensor([[pad] * (width - len(p)) + p for p in prefixes for _ in range(n)], device=self.device)
        seen = torch.tensor(
            [[i >= width - len(p) for i in range(width)] for p in prefixes for _ in range(n)], device=self.device
        )
        guess = partial(self.guess, lm, prompts, seen)
        masked = torch.ones(len(prompts), L, dtype=torch.bool, device=self.device)
        tokens = self.unmask(guess, masked, noise, temperature, self.args)
        ended = torch.isin(tokens, torch.tensor(self.end, device=self.device)).any(1)
        return [(y, [0.0] * L, done) for y, done in zip(tokens.tolist(), ended.tolist())]
