"""CaCoVID: "Contribution-aware Token Compression for Efficient Video Understanding via Reinforcement Learning". Ma, Zhou, Wang,
Chen, Yang, Song and Zheng, arXiv 2602.01649 (2026).

Idea: of a video's many tokens a few carry the answer; a small selector learns which, from nothing but whether the answer is
still right when all others are gone. It draws sets of tokens, combinations, and a language model that stays as it is answers
from each: the reward. So that one reward says something of a token, a combination is drawn from tokens of like rank.

Objective, to be maximised (equation numbers not at hand). b^g in {0, 1}^N: which of the N tokens combination g keeps, in all T
frames equally many; u: the selector's logits of token j, f: of frame t, two of each;  l(b_j) = log softmax(u_j)[b_j]
    J = 1/G sum_g [sum_j w_j min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) / sum_j w_j] + the same of frames, w = 1
    rho = exp(l(b_j) - l_old(b_j)), for each token,   A = (R - mean R) / (std R + 1e-4) over the question's combinations so far
    w_j = b_j (1 - mu) + (1 - b_j) mu,  mu = mean b: the few that are kept weigh as much as the many that are not

A question is asked --repetitions times, the combinations and rewards before are kept, and l_old is that of the first update.
OCSS, the sampling: in a frame p = softmax(u_1 - u_0); the ranking by p is cut into C groups, one is drawn by its sum of p (at
most 2 / C), and k tokens from within it, by p (between 1/2 and 2 of the mean). --sampling multinomial draws them from the whole
frame. Frames are drawn, too, a few for the whole budget, with the tokens in them by density peaks. k grows where nearly all
answers are wrong, and shrinks where nearly all are right.

Given as in the released code; the paper's own equations were not read. Its samples do not come from softmax(u), and it makes no
correction. The reward is read at once: right, if each token of the answer, and its end, is the model's first choice (the paper
generates, nearly greedily). The selector's layer begins as the language model's first, as in the paper. Ours: the cap on frames
is a row's own; where a frame has few tokens k is one at least and C so small that a group has k. Left out: a head for the mode
of sampling, whose loss is not used, and the penalty to an even policy, whose weight is 0.

Family: vision
Same as dapo.py: surrogate
Stand-alone: the language model is frozen and tokens of the input are chosen: no base has such a loop. The plain arm is
             --sampling multinomial.
Measures: measure, told
World: scene, needle, worlds
Costs: --combinations passes of the language model over what is left of a video, --repetitions times for every question, in
       chunks of --micro-batch-tokens; once a pass over each question without its video. All processes hold a whole model.
Run:   python algos/cacovid.py                                  tiny model, CPU, about two minutes; once, its warm start
       python algos/cacovid.py --sampling multinomial           from all tokens of a frame
       python algos/cacovid.py --balance False                  tokens that are kept and dropped weigh alike
       python algos/cacovid.py --model qwen2.5-vl-3b --task path/to/train.jsonl         rows with video, prompt, answer
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """tiny, an alias (qwen2.5-vl-3b, qwen2.5-vl-7b), a hub id, or a local folder; it is not trained"""
    task: str | None = None
    """needle, or a .jsonl file, a row with video (a list of frames' paths), prompt and answer; None: preset"""
    prompt_template: str | None = "{prompt}"
    """format string with the field {prompt}, applied before the tokenizer's chat template"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    seed: int = 1
    """seed of the questions' order, the sampling and the selector's start"""
    steps: int | None = None
    """sets of questions in all, each with --repetitions updates; None here and below: the preset of the model"""
    prompts_per_step: int | None = None
    """questions in a set, of all processes together (the code: one a GPU)"""
    lr: float | None = None
    """AdamW's rate, of the selector's heads"""
    warmup_steps: int = 0
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps (code: cosine)"""
    weight_decay: float = 0.01
    """AdamW's (code)"""
    max_grad_norm: float = 5.0
    """the gradient is scaled down to this norm (code)"""
    max_new_tokens: int | None = None
    """longest answer, its end included; a longer one is cut"""
    eval_every: int | None = None
    """steps between evaluations; 0: only before and after"""
    eval_prompts: int = 512
    """held-out questions, at most"""
    checkpoint_every: int | None = None
    """steps between checkpoints; 0: only at the end"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """who gets the metrics besides TensorBoard"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the language model; the selector is in float32 at least"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] | None = None
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass of the language model"""

    # CaCoVID
    limits = dict(
        rate="0 < x <= 1", rate_min="0 < x <= 1", rate_max="0 < x <= 1", frame_ratio="0 < x <= 1", budget="0 < x",
        combinations="8 <= x: one for the log, a quarter of frames, the rest of tokens", repetitions="1 <= x",
        important="0 <= x <= 1", image_tokens="4 <= x",
        per_frame="1 <= x", eps_low="0 <= x <= 1", group_tokens="1 <= x", max_group="0 < x",
    )  # fmt: skip
    sees, reward = True, None  # answers are compared token by token
    tiny_preset = dict(
        task="needle", steps=40, prompts_per_step=8, lr=1e-3, eval_every=10, layer_lr=1.0, rate=0.0625, rate_min=0.0625,
        rate_max=0.125, budget=8.0, important=1.0,
    )  # fmt: skip
    real_preset = dict(
        task=None, steps=1000, prompts_per_step=8, lr=1e-6, max_new_tokens=64, layer_lr=0.1, rate=0.02, rate_min=0.01,
        rate_max=0.12, budget=0.1, important=0.5,
    )  # fmt: skip
    image_tokens: int = 1280
    """a frame of more tokens is made smaller (Qwen2.5-VL's own advice)"""
    sampling: Literal["ocss", "multinomial"] = "ocss"
    """of token combinations: from a group of like rank, or from the whole frame (the paper's plain arm)"""
    combinations: int = 32
    """of a question, in a repetition: one by density peaks for the log, a quarter of frames, the rest of tokens (code)"""
    repetitions: int = 5
    """of a question, an update each, with all the combinations so far (code)"""
    rate: float | None = None
    """share of a frame's tokens that a combination keeps, at first (tiny: ours; code: 0.02)"""
    rate_min: float | None = None
    """it is halved where 7/8 of a question's answers are right, as far as this (tiny: ours; code: 0.01)"""
    rate_max: float | None = None
    """it is doubled where 1/8 are, as far as this (tiny: ours; code: 0.12)"""
    frame_ratio: float = 0.125
    """share of the frames in a frame combination (code)"""
    group_tokens: float = 2.0
    """tokens of a group in OCSS, as a multiple of those that are kept (code)"""
    max_group: float = 2.0
    """cap on a group's probability, as a multiple of the mean (code)"""
    balance: bool = True
    """weigh kept and dropped tokens by w; else alike (ours)"""
    eps_low: float = 0.2
    """the clip interval's reach below 1 (code)"""
    eps_high: float = 0.28
    """its reach above 1 (code)"""
    layer_lr: float | None = None
    """the rate of the selector's layer, as a multiple of lr (tiny: ours; code: 0.1)"""
    blind_filter: bool = True
    """leave out of training what the model answers right without the video (code)"""
    budget: float | None = None
    """tokens that an evaluation keeps; below 1: share of a video's (tiny: ours; code: 0.1)"""
    important: float | None = None
    """share of the budget that goes to the first of the ranking, the rest is spread evenly (tiny: ours; code: 0.5)"""
    per_frame: float = 1.5
    """most of these that a frame may have, as a multiple of the mean (code)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards):
    """[G] -> [G]: z-score, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + 1e-4) if len(rewards) > 1 else torch.zeros_like(rewards)


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def choice_logp(logits, chosen):
    """logits [N, 2], masks [G, N] -> [G, N]: the log-probability of keeping, or dropping, each of them."""
    dropped, kept = logits.log_softmax(-1).unbind(-1)
    return torch.where(chosen, kept, dropped)


def token_weights(chosen, balance):
    """Masks [G, N] -> w [G, N] / their sum: what is kept and what is dropped have the same weight in all; else 1 / N."""
    share = chosen.float().mean(1, keepdim=True)
    w = torch.where(chosen, 1 - share, share) if balance else torch.ones_like(chosen, dtype=share.dtype)
    return w / (w.sum(1, keepdim=True) + 1e-7)


def objective_of(logits, old_logits, chosen, rewards, weights, args):
    """logits, old_logits [N, 2], masks [G, N], rewards [G], weights [G, N] -> (J, to be maximised, stats [G, N])."""
    logp, old_logp = (choice_logp(x, chosen) for x in (logits, old_logits))
    objective, stats = surrogate(logp, old_logp, advantages(rewards)[:, None], torch.ones_like(chosen), args)
    back, p = (old_logp - logp).detach(), logits.detach().softmax(-1)
    entropy = torch.special.entr(p).sum(-1).expand_as(logp)
    return (weights * objective).sum(1).mean(), stats | dict(approx_kl=back.exp() - back - 1, entropy=entropy)


# ---------------------------------------------------------------- which tokens


def capped(p, cap, floor=1e-9):
    """p [..., C] -> the same, none above cap: the largest is set to it, what is left of 1 shared out over the others, none of
    them below the floor before, until all are below."""
    p = p.clamp(min=floor)
    p, fixed = p / p.sum(-1, keepdim=True), torch.zeros_like(p, dtype=torch.bool)
    for _ in range(p.shape[-1] - 1):
        over = (p > cap + 1e-9) & (p == p.amax(-1, keepdim=True)) & ~fixed
        if not over.any():
            break
        touched, fixed = over.any(-1, keepdim=True), fixed | over
        rest = p.clamp(min=floor).masked_fill(fixed, 0.0)
        left = 1 - cap * fixed.sum(-1, keepdim=True)
        p = torch.where(touched, (rest * left / rest.sum(-1, keepdim=True)).masked_fill(fixed, cap), p)
    return p / p.sum(-1, keepdim=True)


def groups(n, k, rate, args):
    """Sizes of the groups that the ranking of a frame's n tokens is cut into, for k that are kept."""
    C = max(min(int(1 / (rate * args.group_tokens) + 1e-9), n // k), 1)
    return [n // C + (i < n % C) for i in range(C)]


def drawn(logits, k, generator):
    """logits [..., n] -> masks [..., n] of k, drawn without replacement by their softmax (the largest of perturbed ones)."""
    noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
    places = (logits.double() - (-noise.log()).log()).topk(k, -1).indices
    return torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, places, True)


def ocss(score, k, rate, draws, generator, args):
    """Online combination space sampling: score [T, n] -> masks [draws, T, n] of k tokens in each frame."""
    (T, n), sizes = score.shape, torch.tensor(groups(score.shape[1], k, rate, args))
    p, C = score.softmax(-1), len(sizes)
    order = score.argsort(dim=-1, descending=True, stable=True)
    of_rank = torch.repeat_interleave(torch.arange(C), sizes).expand(T, n)
    group = torch.zeros_like(order).scatter_(1, order, of_rank)  # in which a token is
    mass = torch.zeros(T, C, dtype=p.dtype).scatter_add_(1, group, p)
    cap = 1.0 if C == 1 else min(max(args.max_group / C, 0.1), 0.9)
    chosen = torch.multinomial(capped(mass, cap, 1 / C**2), draws, replacement=True, generator=generator)
    s = n // C
    inside = (p / mass.gather(1, group).clamp(min=1e-30)).clamp(1 / (2 * s), 2 / s).log()
    return drawn(inside.where(group == chosen.T[:, :, None], -torch.inf), k, generator)


def density_peaks(x, generator):
    """Embeddings [T, n, d] -> scores [T, n]: how dense it is around a token, times how far the next denser one is."""
    apart = torch.cdist(x, x) / x.shape[2] ** 0.5
    near = apart.topk(min(4, x.shape[1]), -1, largest=False).values
    density = (-near.square().mean(-1)).exp() + 1e-6 * torch.rand(x.shape[:2], generator=generator)  # no two alike
    denser = density[:, None, :] > density[:, :, None]
    distance = apart.masked_fill(~denser, torch.inf).amin(-1)
    return density * torch.where(distance.isinf(), apart.amax(-1), distance)


def top(score, k):
    """score [..., n] -> masks [..., n] of the k largest."""
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(k, -1).indices, True)


def next_rate(rate, rewards, args):
    """The share that a question's next combinations keep: less where its answers are right, more where they are wrong."""
    if rewards.mean() >= 0.875:
        return min(rate, max(rate / 2, args.rate_min))
    return max(rate, min(rate * 2, args.rate_max)) if rewards.mean() <= 0.125 else rate


def keep_score(logits):
    """[m, 2] -> [m], on the CPU: where numbers are drawn, so that every device draws the same."""
    return (logits[:, 1] - logits[:, 0]).cpu()


def combinations(token, frame, peaks, rate, generator, args):
    """Scores of tokens [T, n], of frames [T], density peaks [T, n] -> masks of tokens [G, T, n], and of frames [G_f, T]. Of the
    former the first is by density peaks, for the log, and the last are those of frames."""
    T, n = token.shape
    k, n_frames = max(1, round(rate * n)), args.combinations // 4
    n_tokens = args.combinations - 1 - n_frames
    if args.sampling == "ocss":
        tokens = ocss(token, k, rate, n_tokens, generator, args)
    else:
        tokens = drawn(token.log_softmax(-1).expand(n_tokens, T, n), k, generator)
    tokens[0] = top(token, k)
    F = -int((1e-9 - args.frame_ratio * T) // 1)  # rounded up
    p = capped(frame.softmax(-1), min(3 / T, 1.0))
    frames = drawn(p.log().expand(n_frames, T), F, generator)
    frames[0] = top(frame, F)
    in_frames = frames[:, :, None] & top(peaks, min(n, k * T // F))
    return torch.cat([top(peaks, k)[None], tokens, in_frames]), frames


def kept(token, frame, budget, args):
    """What an evaluation keeps: scores of tokens [T, n], of frames [T] -> mask [T, n] of `budget` tokens. A share of them goes
    to frames, by their scores, and there to the first of the ranking; the rest are at even distances among the others."""
    (T, n), share = token.shape, round(args.important * budget)
    most = min(n, -int((1e-9 - args.per_frame * share / T) // 1))  # of a frame, rounded up
    p = (3 * frame / frame.abs().max().clamp(min=1e-9)).softmax(0)
    p = p.clamp(1 / (2 * T), args.per_frame / T)
    each = (share * p / p.sum()).round().long().clamp(min(1, share // T), most)
    while (gap := share - int(each.sum())) != 0:
        room = each.masked_fill(each == most, n + 1) if gap > 0 else each
        each[room.argmin() if gap > 0 else room.argmax()] += 1 if gap > 0 else -1
    rank = token.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    mask = rank < each[:, None]
    others = (~mask).flatten().nonzero()[:, 0]
    spread = budget - share
    mask.view(-1)[others[((torch.arange(spread) + 0.5) * len(others) / max(1, spread)).long()]] = True
    return mask


# ---------------------------------------------------------------- the selector, and what it chooses for


def head(d):
    """From a hidden state to two logits, in five layers."""
    sizes = [d, max(2, d // 2), max(2, d // 4), max(2, d // 8), max(2, d // 16)]
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (torch.nn.Linear(a, b), torch.nn.SiLU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], 2))


class Selector(torch.nn.Module):
    """The language model's first layer, without a causal mask, and a head for tokens and one for frames. forward(a Question) ->
    logits of tokens [N, 2], of frames [T, 2]."""

    def __init__(self, layers, seed):
        from copy import deepcopy

        super().__init__()
        torch.manual_seed(seed)  # the same on every process
        self.layer, d = deepcopy(layers[0]).requires_grad_(True), layers[0].hidden_size
        self.layer.self_attn.is_causal = False
        self.heads = torch.nn.ModuleDict(dict(norm=torch.nn.RMSNorm(d, eps=1e-6), token=head(d), frame=head(d)))

    def forward(self, q):
        x, turned = q.x[:, : q.asked].to(self.heads.norm.weight), [z[..., : q.asked, :] for z in q.turned]
        x = self.layer(x, position_embeddings=[z.to(x) for z in turned])
        x = self.heads.norm(x[0, q.video])
        return self.heads.token(x), self.heads.frame(x.view(q.T, q.n, -1).mean(1))


@dataclass
class Question:
    """One question of one video, embedded: x [1, S, H], positions [3, 1, S], turned: their cosines and sines, labels [1, S]
    (-100 but on the answer), video: where the N = T n tokens are, asked: where the answer begins; and what was drawn so far."""

    x: torch.Tensor
    positions: torch.Tensor
    turned: tuple
    labels: torch.Tensor
    video: torch.Tensor
    asked: int
    T: int
    n: int
    peaks: torch.Tensor | None = None
    noise: torch.Generator | None = None
    old: tuple = ()
    rate: float = 0.0
    memory: dict = field(default_factory=dict)

    def remember(self, **drawn):
        """{name: (masks [G, N], rewards [G])}, behind those that are there."""
        for name, new in drawn.items():
            self.memory[name] = [torch.cat(x) for x in zip(self.memory[name], new)] if name in self.memory else list(new)


def remembered(q, logits, args):
    """Logits of tokens [N, 2] and of frames [T, 2] -> (J over all that was drawn of a question, stats of its tokens)."""
    found = []
    for name, new, old, balance in zip(("token", "frame"), logits, q.old, (args.balance, False)):
        chosen, rewards = (x.to(new.device) for x in q.memory[name])
        found.append(objective_of(new, old, chosen, rewards, token_weights(chosen, balance), args))
    return found[0][0] + found[1][0], found[0][1]


def answers(lm, x, positions, labels, keep):
    """Embeddings x [b, S, H] with positions [3, b, S], of which only `keep` [b, S] are read, where they stand -> (logits that
    predict the labels [m, V], these [m], the rows of either)."""
    from common.gpu import body

    order = (~keep).byte().argsort(dim=1, stable=True)[:, : keep.sum(1).max()]
    there, rows = keep.gather(1, order), torch.arange(len(keep), device=keep.device)[:, None]
    positions, labels = positions.expand(3, *keep.shape).gather(2, order.expand(3, -1, -1)), labels.expand_as(keep)
    labels = labels.gather(1, order)[:, 1:]
    x = x.expand(len(keep), -1, -1)[rows, order]
    hidden = body(lm)(inputs_embeds=x, position_ids=positions, attention_mask=there, use_cache=False).last_hidden_state
    return lm.lm_head(hidden[:, :-1][labels >= 0]), labels[labels >= 0], (labels >= 0).nonzero()[:, 0]


@torch.no_grad()
def right(policy, x, positions, labels, keep, args):
    """As answers() -> [b], 1.0 where each token of the answer is the first choice behind what is kept."""
    out = []
    for part in keep.split(max(1, args.micro_batch_tokens // int(keep.sum(1).max()))):
        logits, targets, rows = answers(policy.lm, x, positions, labels, part)
        missed = torch.zeros(len(part), device=keep.device).index_add_(0, rows, (logits.argmax(-1) != targets).float())
        out.append((missed == 0).float())
    return torch.cat(out)


def answered(policy, q, masks, args):
    """Masks of tokens [G, T, n] -> [G], 1.0 where the question is answered right by those alone."""
    keep = torch.ones(len(masks), q.x.shape[1], dtype=torch.bool, device=q.x.device)
    keep[:, q.video] = masks.flatten(1).to(keep.device)
    return right(policy, q.x, q.positions, q.labels, keep, args).cpu()


@torch.no_grad()
def question(policy, pictures, e, answer):
    """An example and the token ids of its answer -> Question. The video goes through the eyes once."""
    from common import UserError, gpu

    ids = torch.tensor([e.ids + answer], device=policy.lm.device)
    fed = pictures(policy.lm, ids, torch.ones_like(ids).bool())
    if len(fed) > 2:  # Qwen3-VL
        raise UserError("the model's inner layers see the video, too: its tokens cannot be left out of the first alone")
    video, positions = (ids[0] < -1).nonzero()[:, 0], fed["position_ids"]
    labels = ids.where(torch.arange(ids.shape[1], device=ids.device) >= len(e.ids), -100)
    T = int(pictures[-2 - int(ids[0, video[0]])][1][0])
    turned = gpu.body(policy.lm).rotary_emb(fed["inputs_embeds"], positions)
    return Question(fed["inputs_embeds"], positions, turned, labels, video, len(e.ids), T, len(video) // T)


@torch.no_grad()
def blind(policy, ids, answer, args):
    """Token ids of a question without its video, and of its answer -> whether it is answered right."""
    ids, asked = torch.tensor([ids + answer], device=policy.lm.device), len(ids)
    there, place = torch.ones_like(ids).bool(), torch.arange(ids.shape[1], device=ids.device)
    x = policy.lm.get_input_embeddings()(ids)
    return bool(right(policy, x, place.expand(3, 1, -1), ids.where(place >= asked, -100), there, args))


def unanswered(policy, task, answer, args):
    """The training examples that are answered wrong without their video; each process asks some."""
    from common import UserError, gpu

    known, found = {}, {}
    for e in task.train[gpu.rank() :: gpu.world()]:
        ids = tuple(i for i in e.ids if i >= 0)
        key = ids, tuple(answer[e.id])
        if key not in known:
            known[key] = blind(policy, list(ids), answer[e.id], args)
        found[e.id] = known[key]
    found = {k: x for part in gpu.gather_objects(found) for k, x in part.items()}
    left = [e for e in task.train if not found[e.id]]
    if not left:
        raise UserError(f"task {task.name}: the model answers all of it right without a video (--blind-filter False)")
    return left


def answer_ids(task, pictures, args):
    """{id: token ids of the answer, the first of several, and its end} of a task's examples, of which each has one video."""
    from common import UserError, encoding

    out = {}
    for e in task.train + task.test:
        if len(e.pictures) != 1:
            raise UserError(f"{e.where or f'task {task.name}'}: needs one video, or one image; has {len(e.pictures)}")
        text = e.answer[0] if isinstance(e.answer, tuple) else e.answer
        out[e.id] = encoding.response_ids([text], pictures.processor.tokenizer, e.where, args.max_new_tokens)[0]
    return out


@torch.no_grad()
def evaluated(policy, selector, pictures, task, answer, args, everything=False):
    """Share of held-out questions that are answered right from what kept() keeps of their videos, or from everything; for
    needles also how many of them are kept."""
    from common import gpu

    held_out, sums = task.test[: args.eval_prompts], torch.zeros(2)
    for e in held_out[gpu.rank() :: gpu.world()]:
        q = question(policy, pictures, e, answer[e.id])
        token, frame = (keep_score(x) for x in selector(q))
        budget = len(token) if everything else round(args.budget if args.budget >= 1 else args.budget * len(token))
        mask = kept(token.view(q.T, q.n), frame, min(max(1, budget), len(token)), args)
        found = task.name == "needle" and mask.flatten()[scene(e.id)[1]]
        sums += torch.tensor([answered(policy, q, mask[None], args).item(), float(found)])
    right, recall = (gpu.total(x) / len(held_out) for x in sums.tolist())
    more = dict(recall=recall) if task.name == "needle" else {}
    return dict(greedy_accuracy=right, **more, prompts=len(held_out))


def measure(meter, q, rewards, stats, args):
    """Of a repetition: how often answers are right behind what was drawn, behind the first of the ranking, behind density peaks
    and behind frames; the rate; whether nothing can be learnt as all tokens' rewards are alike; and the update's stats."""
    n = args.combinations // 4
    of = dict(peaks_accuracy=rewards[:1], top_accuracy=rewards[1:2], accuracy=rewards[1:-n], frame_accuracy=rewards[-n:])
    all_alike = (q.memory["token"][1].std() == 0).float()
    for name, x in (of | dict(rate=torch.tensor(q.rate), dead_groups=all_alike) | stats).items():
        meter.add({name: x}, torch.ones_like(x, dtype=torch.bool))


def told(before, after, full, args):
    """Two evaluations -> the last line of a run."""
    said = f"answers right from {args.budget:g} {'tokens' if args.budget >= 1 else 'of the tokens'}"
    said += f" {before['greedy_accuracy']:.2f} -> {after['greedy_accuracy']:.2f} (from all {full['greedy_accuracy']:.2f})"
    if "recall" in after:
        said += f", needles among these {before['recall']:.2f} -> {after['recall']:.2f}"
    return f"{said}, on {after['prompts']} held-out questions"


# ---------------------------------------------------------------- the world: a needle in a video


def scene(number):
    """Of clip `number`: {cell of 64, 16 in each of four times: (shape, colour)}, and the cell of the needle, the one thing of
    its shape; others are in 40% of the cells."""
    from random import Random

    from common.worlds import tiny_vision

    rng = Random(f"needle {number}")
    shape, place = rng.choice([*tiny_vision.SHAPES]), rng.randrange(64)
    others = [s for s in tiny_vision.SHAPES if s != shape]
    there = {cell: (rng.choice(others), rng.choice([*tiny_vision.COLOURS])) for cell in range(64) if rng.random() < 0.4}
    return there | {place: (shape, rng.choice([*tiny_vision.COLOURS]))}, place


def needle():
    """Which colour is the one thing of this shape, in eight frames of which two and two are alike? ring? -> ;gold. The eyes see
    each cell alone, so that no other token can tell of the needle. 2,048 clips and 256 held out."""
    from functools import partial
    from types import SimpleNamespace

    import numpy as np

    from common import tasks
    from common.worlds import tiny_vision

    kinds, examples = [(s, c) for s in tiny_vision.SHAPES for c in tiny_vision.COLOURS], []
    tile = {kind: tiny_vision.render([(*kind, 0)])[:4, :4] for kind in kinds}
    for i in range(2048 + 256):
        (things, place), clip = scene(i), np.zeros((4, 4, 4, 4, 4, 3), np.uint8)  # time, row, its pixels, column, its pixels
        for cell, kind in things.items():
            clip[cell // 16, cell % 16 // 4, :, cell % 4] = tile[kind]
        shape, colour = things[place]
        clip = clip.reshape(4, 16, 16, 3).repeat(2, 0)
        examples.append(tasks.Example(i, f"{shape}?", f";{colour}", pictures=[clip]))
    own = dict(check=lambda text, answer: (text, float(text == answer)), inline=True, tokenizer=tiny_vision.tokenizer)
    start = partial(tiny_vision.warm_start, train=supervise)
    own |= dict(makers=SimpleNamespace(config=tiny_vision.config, warm_start=start), max_new_tokens=8)
    own |= dict(shape=dict(depth=0, fullatt_block_indexes=[]), recipe=dict(steps=700))
    return tasks.Task("needle", examples[:2048], examples[2048:], demonstrate=lambda rng, e, careful: e.answer, **own)


def worlds(name):
    """The Task that a tiny model is made for, or None."""
    from common import tasks

    return needle() if name == "needle" else tasks.world(name)


# ---------------------------------------------------------------- its warm start: a tiny model that bears the loss of tokens


def supervise(task, examples, pictures, recipe, shape):
    """Next-token training on answers behind K tokens of a clip. K is 2 at first, later up to 64; the needle is among them in
    the first half of the steps, and later in two thirds of the rows: first a colour is read, then the thing is searched for."""
    from random import Random

    from tqdm import tqdm
    from transformers import Qwen2_5_VLForConditionalGeneration

    rng, own = Random(recipe["seed"]), pictures.processor.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = Qwen2_5_VLForConditionalGeneration(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98))
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    for step in tqdm(range(recipe["steps"]), desc="warm start (once, then cached)", disable=None, leave=False):
        rows = rng.choices(examples, k=recipe["batch"])
        done = [e.ids + ids + [own.eos_token_id] for e, ids in zip(rows, own([e.answer for e in rows])["input_ids"])]
        S, early = max(map(len, done)), step < recipe["steps"] / 2
        K = 2 ** rng.randint(1, 1 + min(5, int(step / (0.58 * recipe["steps"]) * 5)))
        ids = torch.tensor([s + [0] * (S - len(s)) for s in done])
        there = torch.tensor([[k < len(s) for k in range(S)] for s in done])
        labels = torch.tensor([[-100] * len(e.ids) + s[len(e.ids) :] + [-100] * (S - len(s)) for e, s in zip(rows, done)])
        with_needle = [early or 16 * i < 11 * len(rows) for i in range(len(rows))]
        chance = torch.tensor([[rng.random() for _ in range(64)] for _ in rows])
        chance[torch.arange(len(rows)), [scene(e.id)[1] for e in rows]] = torch.tensor(with_needle).float() * 2 - 1
        keep = there.masked_scatter(ids < -1, top(chance, K))
        fed = pictures(model, ids, there)
        logits, targets, _ = answers(model, fed["inputs_embeds"], fed["position_ids"], labels, keep)
        torch.nn.functional.cross_entropy(logits, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rise.step()
        optimizer.zero_grad()
    return model


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from functools import cache

    from common import UserError, gpu, models, runlog, settings, tasks, vision
    from common.batch import Meter

    warm = cache(worlds)
    args, config, device = settings.prepare(__file__, args, warm)
    if args.task is None or tasks.world(args.task):
        raise UserError(f"--task {args.task}: this script takes needle, or a .jsonl file with video, prompt and answer")
    processor = vision.load_processor(args, args.image_tokens, warm)
    task, pictures = vision.load(args, processor, warm(args.task))
    answer = answer_ids(task, pictures, args)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, processor, context, trained=0, frozen=1)
    run.asked = "held-out questions"
    policy = models.load(args, device, trainable=False, warm=warm).to(device)  # every process has all of it
    policy = vision.look(policy, task, pictures)
    if args.blind_filter:
        task.train = unanswered(policy, task, answer, args)
    selector = Selector(gpu.body(policy.lm).layers, args.seed).to(device, torch.promote_types(policy.lm.dtype, torch.float32))
    optimizer = gpu.make_optimizer(selector.heads, args)
    optimizer.add_param_group(dict(params=[*selector.layer.parameters()], lr=args.layer_lr * args.lr))
    run.restore(selector, optimizer)

    def evaluate():
        return evaluated(policy, selector, pictures, task, answer, args)

    for step in run.steps(selector, optimizer, evaluate):
        # The questions of this process, and what the selector says of their tokens before it learns from them.
        examples = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        run.state["cursor"] += args.prompts_per_step
        questions, meter, read = [question(policy, pictures, e, answer[e.id]) for e in examples], Meter(), 0
        for e, q in zip(examples, questions):
            noise = torch.Generator().manual_seed(gpu.hash_seed(args.seed, step, e.id, 17))
            q.peaks = density_peaks(q.x[0, q.video].float().cpu().view(q.T, q.n, -1), noise)
            q.rate, q.noise = args.rate, noise
            with torch.no_grad():
                q.old = selector(q)
        for _ in range(args.repetitions):
            loss = 0.0
            for q in questions:
                # Combinations, drawn from the old logits, and the answers behind them join the question's memory.
                token, frame = (keep_score(x) for x in q.old)
                masks, frames = combinations(token.view(q.T, q.n), frame, q.peaks, q.rate, q.noise, args)
                rewards = answered(policy, q, masks, args)
                n = len(frames)
                q.remember(token=(masks[1:-n].flatten(1), rewards[1:-n]), frame=(frames, rewards[-n:]))
                read += int(masks.sum())

                # The objective over the whole memory; the mean over the questions of all processes.
                objective, stats = remembered(q, selector(q), args)
                micro_loss = -objective / args.prompts_per_step
                micro_loss.backward()
                loss += micro_loss.item()
                measure(meter, q, rewards, stats, args)
                q.rate = next_rate(q.rate, q.memory["token"][1], args)
            for weight in selector.parameters():  # it is so small that every process has all of it
                weight.grad.copy_(gpu.total(weight.grad))
            grad_norm = gpu.clip_gradients(selector, args.max_grad_norm)
            if run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        shown = dict(accuracy="acc", top_accuracy="top", peaks_accuracy="peaks", dead_groups="dead")
        run.write(meter.result(), int(gpu.total(read)), shown)

    full = evaluated(policy, selector, pictures, task, answer, args, everything=True) if run.after else None
    run.finish(run.after and told(run.state["before"], run.after, full, args))
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
