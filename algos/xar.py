"""xAR: "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation". Ren, Yu, He, Shen, Yuille and Chen,
arXiv 2502.20388 (2025).

Idea: an image is generated a piece at a time, and what a piece is, is free: a token, a cell of neighbouring tokens, a sample of
distant ones, a coarser image. Pieces are continuous, so each is drawn by flow matching, given those before it. In training
all pieces are noisy, each by its own time, so that the network learns to go on from context that is not perfect.

Objective, to be minimised (equation numbers not at hand); X_n: the s_n tokens of entity n of N, with C channels each:
    L = 1/B sum_b 1/(C sum_n s_n) sum_n |v(F_1, ..., F_n; t_n, c) - V_n|^2,   F_n = (1 - t_n) X_n + t_n e_n,   V_n = e_n - X_n
    t_n = sigma(z),  z ~ N(0, 1),  e_n ~ N(0, I):  for each entity its own;  t = 0 is data, t = 1 is noise;  c: the class
One pass for all entities: attention is full inside an entity and reaches all earlier ones. It is noisy context learning.

Sampling, n = 1 .. N, each from x ~ N(0, I) at t = 1, behind finished entities, which are clean and have time 0:
    Euler:   x <- x + v dt
    SDE:     x <- x + (v - t s) dt + sqrt(2 t |dt|) e,   s = -((1 - t) v + x) / t;   without noise in the last step, from 0.04
    v = v_null + w_n (v_c - v_null),   w_n = 1 + (w - 1) (n - 1) / (N - 1);   with one entity w

Finished entities are read again in every pass: since nothing later reaches them, it is what a cache of keys and values gives.
--context clean has two streams: each noisy entity sees itself and the clean ones before it. increasing and decreasing sort the
times of an image: the noise grows, or falls, from its first entity to its last. The paper says that t is drawn from [0, 1], and
sums over n; that t is logit-normal, the mean, and the growth of w are the released code's. Ours: pixels in place of a VAE's
latents, a small network that trains shortly, Euler's sampler, an average of weights that is as short, AdamW's second beta
(0.999; the paper: 0.96), times as they are (the code cuts them to thousandths). Left out: dropout, other sizes of a cell.

Family: generation and control
Stand-alone: no language model, no reward; --entity image is the paper's plain arm, flow matching of the whole image.
Measures: judged, told
World: class_images
Costs: a forward and a backward pass over all entities; an image takes --sampling-steps passes for each of its entities, twice
       as many where it is guided.
Run:   python algos/xar.py                                      cells, CPU, about two minutes
       python algos/xar.py --entity image                       flow matching
       python algos/xar.py --context clean                      without the noise in what is seen
       python algos/xar.py --sampler sde --sampling-steps 25 --guidance 2
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    seed: int = 1
    """of the network's start, the images' order, their noise, and the evaluation's samples"""
    steps: int = 1000
    """updates in all"""
    batch_size: int = 128
    """images in one update, of all processes together"""
    lr: float = 1.5e-3
    """AdamW's rate"""
    warmup_steps: int = 50
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 0.02
    """AdamW's"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    eval_every: int = 250
    """steps between evaluations; 0: only before and after"""
    checkpoint_every: int = 250
    """steps between checkpoints; 0: only at the end"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """who gets the metrics besides TensorBoard"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """of weights and gradients"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] = "adamw"
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""

    # Next-X prediction
    limits = dict(
        label_drop="0 <= x < 1: some images must have their class", ema="0 <= x < 1", sampling_steps="1 <= x", samples="1 <= x",
    )  # fmt: skip
    entity: Literal["token", "cell", "subsample", "scale", "image"] = "cell"
    """what is generated at once: cells of 2 x 2 tokens, tokens 2 apart, grids of 1, 4 and 16 tokens (paper: cell)"""
    context: Literal["noisy", "clean", "increasing", "decreasing"] = "noisy"
    """earlier entities in training: each by its own noise, without, or noise that grows or falls along them (paper: noisy)"""
    label_drop: float = 0.1
    """share of the images whose class is not told in training, for the guidance (paper)"""
    ema: float = 0.995
    """decay of the average of weights, which samples (ours; the paper: 0.9999)"""
    sampler: Literal["euler", "sde"] = "euler"
    """how an entity is drawn (ours; the paper: sde)"""
    sampling_steps: int = 10
    """passes for an entity (ours; the paper: 50)"""
    guidance: float = 1.0
    """w, of the last entity; 1: none (ours; code: 2.2 to 2.7)"""
    samples: int = 320
    """images drawn in an evaluation, of all classes in turn (ours)"""


# ---------------------------------------------------------------- the world


def class_images():
    """-> [400, 3, 8, 8] in [-1, 1], black behind: a shape of 4 x 4 pixels at one of 25 places; image i is of class i // 25,
    shape i // 100 and colour i // 25 % 4."""
    shapes = dict(
        box="#### #### #### ####", ring="#### #..# #..# ####", plus=".##. #### #### .##.", bar=".... #### #### ....",
    )  # fmt: skip
    colours = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1), gold=(1, 0.84, 0))
    images = torch.full((len(shapes), len(colours), 5, 5, 3, 8, 8), -1.0)
    for i, rows in enumerate(shapes.values()):
        drawn = torch.tensor([[dot == "#" for dot in row] for row in rows.split()])
        for j, colour in enumerate(colours.values()):
            for y in range(5):
                for x in range(5):
                    images[i, j, y, x, :, y : y + 4, x : x + 4] += 2 * torch.tensor(colour)[:, None, None] * drawn
    return images.flatten(0, 3)


def judged(images, label, world):
    """Images [b, 3, 8, 8] and the classes asked for [b] -> sums over them: how many have the class, shape and colour, by the
    nearest image of the world, how many are valid (the class, and within 0.1 of it), and the mean square to it."""
    square = (images[:, None] - world).square().mean((2, 3, 4))
    distance, nearest = square.min(1)
    found = nearest // 25
    counts = dict(
        valid=(found == label) & (distance < 0.1), class_accuracy=found == label, shape=found // 4 == label // 4,
        colour=found % 4 == label % 4, distance=distance,
    )  # fmt: skip
    return {name: x.double().sum().item() for name, x in counts.items()}


def told(before, after, args):
    """Two evaluations -> the last line of a run."""
    ends = f"{before['valid']:.2f} -> {after['valid']:.2f} of {after['prompts']}"
    what = f"class {after['class_accuracy']:.2f}, shape {after['shape']:.2f}, colour {after['colour']:.2f}"
    return f"valid images, by {args.entity}: {ends} ({what}), {after['calls']:.0f} passes an image"


# ---------------------------------------------------------------- entities: an image as a sequence of sets of tokens

PATCH, GRID, SCALES, NULL = 2, 4, (1, 2, 4), 16  # pixels and tokens a side; sides of the scales; the class that is not told


def layout(entity):
    """-> which entity each token of the sequence is of [T], its place, in tokens [T, 2], and its number in the grid [T]."""
    sides = SCALES if entity == "scale" else (GRID,)
    grids = [torch.cartesian_prod(torch.arange(side), torch.arange(side)) for side in sides]
    if entity == "scale":
        places = [(grid + 0.5) * GRID / side - 0.5 for grid, side in zip(grids, sides)]  # centres
        return torch.tensor([n for n, side in enumerate(sides) for _ in range(side**2)]), torch.cat(places), None
    y, x = grids[0].T
    which = dict(token=GRID * y + x, cell=y // 2 * 2 + x // 2, subsample=y % 2 * 2 + x % 2, image=0 * y)[entity]
    order = which.argsort(stable=True)
    return which[order], grids[0][order], order


def patches(images):
    """[B, 3, H, H] -> tokens [B, (H / PATCH)^2, 3 PATCH^2], row by row."""
    B, C, H, _ = images.shape
    return images.view(B, C, H // PATCH, PATCH, H // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * PATCH**2)


def split(images, entity):
    """[B, 3, 8, 8] -> tokens [B, T, 12], entity after entity."""
    if entity == "scale":
        small = [torch.nn.functional.adaptive_avg_pool2d(images, PATCH * side) for side in SCALES]
        return torch.cat([patches(x) for x in small], 1)
    return patches(images)[:, layout(entity)[2]]


def joined(tokens, entity):
    """[B, T, 12] -> images [B, 3, 8, 8]; of scales the last one alone."""
    grid = tokens[:, -(GRID**2) :] if entity == "scale" else tokens[:, layout(entity)[2].argsort()]
    grid = grid.view(-1, GRID, GRID, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, 3, GRID * PATCH, GRID * PATCH)


# ---------------------------------------------------------------- the objective


def times(normal, args):
    """[B, N] of N(0, 1) -> the times of the entities [B, N]."""
    t = normal.sigmoid()
    if args.context in ("increasing", "decreasing"):
        t = t.sort(1, descending=args.context == "decreasing").values
    return t


def noised(x, eps, t, which):
    """x, eps [B, T, C], t [B, N], which [T] -> F and V [B, T, C]."""
    t = t[:, which, None]
    return (1 - t) * x + t * eps, eps - x


def flow_loss(v, target):
    """[B, T, C] each -> [B]: the mean over all tokens and channels, so that a larger entity counts more."""
    return (v - target).square().mean((1, 2))


def block_causal(which):
    """[S] -> [S, S], True where a row's token sees a column's: its own entity and those before it."""
    return which[:, None] >= which


def two_streams(which):
    """[S] -> [2 S, 2 S], the clean ones first: block-causal among them; a noisy entity sees itself and clean ones before it."""
    before, same = which[:, None] > which, which[:, None] == which
    clean = torch.cat([block_causal(which), torch.zeros_like(same)], 1)
    return torch.cat([clean, torch.cat([before, same], 1)])


# ---------------------------------------------------------------- the sampler


def grid(args):
    """Times from 1 to 0, with --sampling-steps steps between them; the SDE's last one is from 0.04."""
    if args.sampler == "euler":
        return torch.linspace(1, 0, args.sampling_steps + 1, dtype=torch.float64).tolist()
    return [*torch.linspace(1, 0.04, args.sampling_steps, dtype=torch.float64).tolist(), 0.0]


def score(v, x, t):
    """Of the density at time t > 0: s, in the shape of v and x."""
    return -((1 - t) * v + x) / t


def stepped(x, v, t, later, noise, args):
    """x, v, noise [b, s, C] at time t -> x at the time `later`, which is less."""
    if args.sampler == "euler":
        return x + (later - t) * v
    x = x + (v - t * score(v, x, t)) * (later - t)  # v - g s / 2, where g = 2 t
    return x + (2 * t * (t - later)) ** 0.5 * noise if later > 0 else x


def guidance(n, N, args):
    """w_n of entity n = 0 .. N - 1: none for the first one, unless it is the only one."""
    return 1 + (args.guidance - 1) * (n / (N - 1) if N > 1 else 1)


@torch.no_grad()
def sample(net, label, noise, args):
    """label [b], noise [b, 1, T, C], or [b, steps, T, C] for the SDE -> tokens [b, T, C], and the passes that an image took."""
    N, x, calls = int(net.which[-1]) + 1, noise[:, 0, :0], 0
    for n in range(N):
        mine, w = net.which == n, guidance(n, N, args)
        done, x = x, noise[:, 0, mine]
        for i, (t, later) in enumerate(zip(grid(args), grid(args)[1:])):
            seen, time = torch.cat([done, x], 1), x.new_zeros(len(x), n + 1)
            time[:, n] = t  # what is finished is clean
            v = net(seen, time, label)[:, done.shape[1] :]
            calls += 1
            if w != 1:  # the SDE's drift is linear in v, so it is guided with it
                null = net(seen, time, torch.full_like(label, NULL))[:, done.shape[1] :]
                v, calls = null + w * (v - null), calls + 1
            x = stepped(x, v, t, later, noise[:, (i + 1) % noise.shape[1], mine], args)
        x = torch.cat([done, x], 1)
    return x, calls


# ---------------------------------------------------------------- the network


def turned(x, cos, sin):
    """[B, heads, S, 2 k], [S, k] twice -> the first: rotary positions."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(torch.nn.Module):
    """Attention and a feed-forward layer, each scaled, shifted and gated by what an entity's time and the class say."""

    def __init__(self, d):
        super().__init__()
        self.qkv, self.out, self.modulation = (torch.nn.Linear(d, n * d) for n in (3, 1, 6))
        self.ffn = torch.nn.Sequential(torch.nn.Linear(d, 4 * d), torch.nn.GELU(), torch.nn.Linear(4 * d, d))
        self.norm = torch.nn.LayerNorm(d, elementwise_affine=False)
        torch.nn.init.zeros_(self.modulation.weight)
        torch.nn.init.zeros_(self.modulation.bias)

    def forward(self, x, said, which, mask, cos, sin):
        """x [B, S, d], said [B, entities, d] -> [B, S, d]."""
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(said)[:, which].chunk(6, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = torch.nn.functional.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, mask)
        x = x + gate * self.out(seen.transpose(1, 2).flatten(2))
        return x + gate2 * self.ffn(self.norm(x) * (1 + scale2) + shift2)


class Velocity(torch.nn.Module):
    """v: three blocks over the tokens of an image, each with a learned position and the rotary one of its place."""

    def __init__(self, args, d=96, depth=3, channels=3 * PATCH**2):
        super().__init__()
        which, place, _ = layout(args.entity)
        turns = place[..., None] * 100.0 ** (-torch.arange(d // 16) / (d // 16))  # 4 heads, half of each for y, half for x
        self.register_buffer("which", which, persistent=False)
        self.register_buffer("cos", turns.flatten(1).cos(), persistent=False)
        self.register_buffer("sin", turns.flatten(1).sin(), persistent=False)
        self.inner, self.outer = torch.nn.Linear(channels, d), torch.nn.Linear(d, channels)
        self.position = torch.nn.Parameter(0.02 * torch.randn(len(which), d))
        self.label = torch.nn.Embedding(NULL + 1, d)
        self.time = torch.nn.Sequential(torch.nn.Linear(d, d), torch.nn.SiLU(), torch.nn.Linear(d, d))
        self.blocks = torch.nn.ModuleList(Block(d) for _ in range(depth))
        self.norm, self.modulation = torch.nn.LayerNorm(d, elementwise_affine=False), torch.nn.Linear(d, 2 * d)
        for layer in (self.modulation, self.outer):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x, t, label, clean=None):
        """The first entities of an image, x [B, S, C], their times [B, n], label [B] -> v [B, S, C]. clean: the same entities
        without noise; they are then what is seen of earlier ones."""
        S, n, dtype = x.shape[1], t.shape[1], self.position.dtype
        which, index = self.which[:S], torch.arange(S, device=x.device)
        mask, h = block_causal(which), x
        if clean is not None:
            mask, h, t = two_streams(which), torch.cat([clean, x], 1), torch.cat([torch.zeros_like(t), t], 1)
            which, index = torch.cat([which, which + n]), index.repeat(2)
        half = torch.arange(self.position.shape[1] // 2, device=x.device)
        waves = 1000 * t[..., None] * 10000.0 ** (-half / len(half))
        said = self.time(torch.cat([waves.cos(), waves.sin()], -1).to(dtype)) + self.label(label)[:, None]
        said = torch.nn.functional.silu(said)  # once for all modulations
        h = self.inner(h.to(dtype)) + self.position[index]
        for block in self.blocks:
            h = block(h, said, which, mask, self.cos[index], self.sin[index])
        scale, shift = self.modulation(said)[:, which].chunk(2, -1)
        return self.outer(self.norm(h) * (1 + scale) + shift)[:, -S:].to(x.dtype)


class Generator(torch.nn.Module):
    """The network that learns, and the average of its weights, which samples."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(args.seed)  # the same network on every process
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)

        def widened(kept, now, n):  # the average of bfloat16 weights is not in bfloat16, which would lose what is added
            average(kept, [weight.to(mean.dtype) for weight, mean in zip(now, kept)], n)

        self.net = Velocity(args)
        self.ema = torch.optim.swa_utils.AveragedModel(self.net, multi_avg_fn=widened).requires_grad_(False)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, gpu, runlog, settings

    args, _, device = settings.prepare(__file__, args)
    if args.entity == "image" and args.context != "noisy":
        raise UserError(f"--context {args.context}: the whole image is one entity and has no context; use another --entity")
    if args.guidance != 1 and not args.label_drop:
        raise UserError(f"--guidance {args.guidance} needs a --label-drop above 0, or there is no velocity without a class")
    run = runlog.Run(__file__, args, trained=0)
    run.asked = "images"
    dtype = getattr(torch, args.dtype)
    wide = torch.promote_types(dtype, torch.float32)  # of images, their noise and the average
    policy = Generator(args).to(device, wide)
    policy.net.to(dtype)
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    world = class_images().to(device, wide)
    tokens, which, mine = split(world, args.entity), policy.net.which, slice(gpu.rank(), None, gpu.world())
    T, N = len(which), int(which[-1]) + 1

    def evaluate():
        g = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 1, 1))
        label = torch.arange(args.samples)[mine].to(device) % NULL
        drawn = args.sampling_steps if args.sampler == "sde" else 1
        noise = torch.randn(args.samples, drawn, T, tokens.shape[2], generator=g)[mine].to(device, wide)
        found, calls = sample(policy.ema.module, label, noise, args)
        sums = judged(joined(found, args.entity), label, world)
        return {k: gpu.total(x) / args.samples for k, x in sums.items()} | dict(calls=calls, prompts=args.samples)

    for step in run.steps(policy, optimizer, evaluate):
        # The whole batch is drawn on every process, which then takes its share.
        g = torch.Generator().manual_seed(gpu.hash_seed(args.seed, step, 0))
        index = torch.randint(len(world), (args.batch_size,), generator=g)
        label = (index // 25).masked_fill(torch.rand(args.batch_size, generator=g) < args.label_drop, NULL)
        normal = torch.randn(args.batch_size, N, generator=g)
        eps = torch.randn(args.batch_size, T, tokens.shape[2], generator=g)
        index, label = index[mine].to(device), label[mine].to(device)
        normal, eps = normal[mine].to(device, wide), eps[mine].to(device, wide)

        # Update: noise for every entity, one pass for all of them.
        x, t = tokens[index], times(normal, args)
        noisy, target = noised(x, eps, t, which)
        v = policy.net(noisy, t, label, clean=x if args.context == "clean" else None)
        loss = flow_loss(v, target).sum() / args.batch_size
        loss.backward()
        for weight in policy.net.parameters():  # it is so small that every process has all of it
            weight.grad.copy_(gpu.total(weight.grad))
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        loss = gpu.total(loss.item())
        if run.finite(loss, grad_norm):
            optimizer.step()
            policy.ema.update_parameters(policy.net)
        optimizer.zero_grad()
        run.timed("update")
        run.write(dict(loss=loss, grad_norm=grad_norm), args.batch_size * T, dict(loss="loss"))

    run.finish(run.after and told(run.state["before"], run.after, args))
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
