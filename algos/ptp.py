"""PTP: "Learning Long-Context Diffusion Policies via Past-Token Prediction". Torne, Tang, Liu and Finn, arXiv 2505.09561
(2025).

Idea: a policy that clones demonstrations from many past observations loses sight of how actions follow from those before; let
it predict the actions already taken as well as those to come, and it cannot. The loss covers past and future positions of one
trajectory alike, with the same network and the same inputs, and past actions are never given to it. What it says of the past
can be checked at test time, so that of several sampled trajectories the one that recalls it best is executed.

Objective, to be minimised (equation numbers not at hand); T observations are seen, A = (a_{t-T+1}, ..., a_{t-T+H}) are the H
actions around the current one, a_t at position T - 1, each with d numbers; k is one of the steps of diffusion:
    L = 1/B sum_b 1/(|S| d) sum_{h in S} |eps_theta(A_k, k, o_{t-T+1..t})_h - eps_h|^2
    A_k = sqrt(abar_k) A + sqrt(1 - abar_k) eps,   eps ~ N(0, 1), k uniform
    S = {0, ..., H-1}: PTP;   {T-1, ..., H-1}: plain diffusion policy;   {T-1-r, ..., H-1}: r past tokens
Once T - 1 actions have been executed, the trajectory to follow is, of --samples, with actions scaled to [-1, 1]:
    j* = argmin_j 1/((T-1) d) sum_{h < T-1} |A^j_h - a^executed_{t-T+1+h}|^2

Without PTP the noisy past is still an input, and is denoised in sampling, but has no loss. Ours: the world and its size, a
plain network of three layers (the paper: a transformer, whose past tokens see no later observation), 20 steps of diffusion
(the code: 100), an average of constant decay (the code's grows), AdamW's second beta of 0.999 (the code: 0.95), two actions
executed of a plan (the paper: one). Left out, since an observation is a number here: the encoder of images, trained with a
short context and then frozen, its outputs cached. Before an episode observations are its first one, as in the code, and
actions 0.

Family: generation and control
Stand-alone: it clones actions and samples them by diffusion, without a language model. --past 0 is the plain diffusion policy
    with as long a context, --past 0 --context 2 the one with a short context.
Measures: predictability, told
World: play, demonstrator, judged
Costs: none in training. --samples multiplies the rows of a sampling pass.
Run:   python algos/ptp.py                               CPU, about a minute
       python algos/ptp.py --past 0                      a long context without past tokens in the loss
       python algos/ptp.py --past 0 --context 2          a short one
       python algos/ptp.py --samples 4                   of four plans the one that recalls the past best
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    seed: int = 1
    """of the demonstrations, their order, the network's start, and the evaluation's episodes"""
    steps: int = 5000
    """updates in all"""
    batch_size: int = 128
    """windows of demonstrations in one update, of all processes together"""
    lr: float = 1e-2
    """AdamW's rate"""
    warmup_steps: int = 100
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 1e-3
    """AdamW's"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    eval_every: int = 1000
    """steps between evaluations; 0: only before and after"""
    checkpoint_every: int = 1000
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

    # Past-token prediction
    limits = dict(
        context="2 <= x: with a single observation no action is past", horizon="2 <= x", past="-1 <= x", samples="1 <= x",
        execute="1 <= x", diffusion_steps="2 <= x", width="1 <= x", ema="0 <= x < 1", demonstrations="1 <= x",
        episodes="1 <= x",
    )  # fmt: skip
    context: int = 16
    """T, observations that the policy sees, up to the current one (paper); 2: a short context"""
    horizon: int | None = None
    """H, actions of a trajectory, past and future; None: context + 7, so that 8 are not past (ours; code: twice the context)"""
    past: int = -1
    """past tokens in the loss, the newest of them; -1: all (paper), 0: none, a plain diffusion policy"""
    samples: int = 1
    """trajectories to choose from at test time, by how well they recall the actions executed (code: an argument)"""
    execute: int = 2
    """actions that are executed of a plan (ours; paper: 1)"""
    diffusion_steps: int = 20
    """from noise to actions (ours; code: 100)"""
    width: int = 256
    """of the three hidden layers (ours)"""
    ema: float = 0.995
    """decay of the average of the weights that acts in evaluations (ours; code: grows up to 0.9999)"""
    demonstrations: int = 60
    """episodes to learn from (ours)"""
    episodes: int = 200
    """roll-outs in an evaluation, the same ones each time (ours; code: 150)"""


# ---------------------------------------------------------------- the objective


def alpha_bar(steps):
    """-> [steps], the share of the signal's variance that is left at each diffusion step: squared cosine, as in the code."""
    curve = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * torch.pi / 2).square()
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return (1 - betas).cumprod(0)


def noised(actions, noise, level):
    """A, eps [B, H, d], abar_k [B] -> A_k [B, H, d]."""
    level = level[:, None, None]
    return level.sqrt() * actions + (1 - level).sqrt() * noise


def past_token_loss(prediction, noise, args):
    """eps_theta, eps [B, H, d] -> each window's loss [B], the mean over S, which begins --past tokens before the present."""
    first = 0 if args.past < 0 else args.context - 1 - args.past
    return (prediction - noise)[:, first:].square().mean((1, 2))


def choose(candidates, executed):
    """Trajectories [n, S, H, d], the T - 1 last actions [n, T - 1, d] -> (j* [n], scores [n, S]; the least is chosen)."""
    recalled = candidates[:, :, : executed.shape[1]]
    scores = (recalled - executed[:, None]).square().mean((2, 3))
    return scores.argmin(1), scores


# ---------------------------------------------------------------- the policy


class Denoiser(torch.nn.Module):
    """eps_theta: a trajectory with noise in it, the diffusion step, the observations -> the noise."""

    def __init__(self, args):
        super().__init__()
        linear, w = torch.nn.Linear, args.width
        self.step = torch.nn.Embedding(args.diffusion_steps, 32)
        hidden = [linear(args.horizon + args.context + 32, w), torch.nn.SiLU()]
        hidden += [layer for _ in range(2) for layer in (linear(w, w), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*hidden, linear(w, args.horizon))

    def forward(self, noisy, k, observations):
        """noisy [n, H, 1], k [n], observations [n, T] -> [n, H, 1]."""
        return self.layers(torch.cat([noisy.squeeze(2), observations, self.step(k)], 1)).unsqueeze(2)


class DiffusionPolicy(torch.nn.Module):
    """The network that is trained, the average of its weights, which acts, and the least and greatest action, which become
    -1 and 1. Both networks travel in one checkpoint."""

    def __init__(self, args, actions):
        super().__init__()
        torch.manual_seed(args.seed)  # the same network on every process
        self.net = Denoiser(args)
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
        self.average = torch.optim.swa_utils.AveragedModel(self.net, multi_avg_fn=decay).requires_grad_(False)
        low, high = actions.amin(), actions.amax()
        self.register_buffer("middle", (low + high) / 2)
        self.register_buffer("reach", torch.where(high > low, (high - low) / 2, torch.ones_like(low)))  # of a constant action

    def scaled(self, actions):
        return (actions - self.middle) / self.reach

    def unscaled(self, actions):
        return actions * self.reach + self.middle

    @torch.no_grad()
    def sample(self, observations, random, args):
        """[n, T] -> n trajectories [n, H, 1] of scaled actions: DDPM, from noise, of the average's predictions."""
        like = dict(device=observations.device, dtype=observations.dtype)
        level, n = alpha_bar(args.diffusion_steps).tolist(), len(observations)
        x = torch.randn(n, args.horizon, 1, generator=random).to(**like)
        for k in reversed(range(args.diffusion_steps)):
            noise = self.average(x, torch.full((n,), k, device=x.device), observations)
            clean = (x - (1 - level[k]) ** 0.5 * noise) / level[k] ** 0.5
            clean = clean.clamp(-1, 1)  # clip_sample of the code
            if k == 0:
                return clean
            before, alpha = level[k - 1], level[k] / level[k - 1]
            mean = before**0.5 * (1 - alpha) * clean + alpha**0.5 * (1 - before) * x
            std = ((1 - before) / (1 - level[k]) * (1 - alpha)) ** 0.5  # the code's fixed_small
            x = mean / (1 - level[k]) + std * torch.randn(x.shape, generator=random).to(**like)

    def plan(self, seen, done, random, args):
        """Observations and scaled actions so far, lists of [n] -> (scaled actions to execute [n, --execute], how far the first
        candidate's past is from what was done; None as long as there is no whole past)."""
        T, n = args.context, len(seen[0])
        observations = torch.stack(([seen[0]] * T + seen)[-T:], 1)  # before the episode: its first one
        whole = len(done) >= T - 1
        S = args.samples if whole else 1
        rows = observations.repeat_interleave(S, 0)
        candidates = self.sample(rows, random, args).view(n, S, args.horizon, 1)
        best, error = torch.zeros(n, dtype=torch.int64, device=rows.device), None
        if whole:
            best, scores = choose(candidates, torch.stack(done[-(T - 1) :], 1)[..., None])
            error = scores[:, 0].mean().item()
        chosen = candidates[torch.arange(n, device=rows.device), best]
        return chosen[:, T - 1 : T - 1 + args.execute, 0], error


def windows(observations, actions, args):
    """Episodes [n, steps] each -> all their windows: observations [n * steps, T], actions [n * steps, H, 1]."""
    T, H = args.context, args.horizon
    first = observations[:, :1].expand(-1, T - 1)
    actions = torch.nn.functional.pad(actions, (T - 1, H - T))  # before an episode and after it nothing moves
    return torch.cat([first, observations], 1).unfold(1, T, 1).flatten(0, 1), actions.unfold(1, H, 1).flatten(0, 1)[..., None]


def roll_out(policy, args, seed):
    """--episodes roll-outs of the policy -> (actions, states [n, EPISODE], mean square error of recalled actions)."""
    random, errors, ahead, done = torch.Generator().manual_seed(seed), [], [], []
    like = next(policy.parameters())

    def act(seen, state):
        if not ahead:
            plan, error = policy.plan([x.to(like) for x in seen], done, random, args)
            ahead.extend(plan.unbind(1))
            errors.extend([error] if error is not None else [])
        done.append(ahead.pop(0))
        return policy.unscaled(done[-1]).to(state)

    _, actions, states = play(act, args.episodes, random)
    return actions, states, sum(errors) / max(1, len(errors))


# ---------------------------------------------------------------- the world: a point that goes up once, then down

EPISODE, NOISE, FAR, NEAR = 40, 0.02, 0.85, 0.5


def play(act, n, random):
    """n episodes of a point on a line, from 0. act(observations so far, a list of [n]; where it is [n]) -> its next move [n]
    -> observations, moves, and the states that these led to, [n, EPISODE] each. What moves it and what is seen has noise."""
    state, seen, moves, states = torch.zeros(n), [], [], []
    for _ in range(EPISODE):
        seen.append(state + NOISE * torch.randn(n, generator=random))
        moves.append(act(seen, state))
        state = state + moves[-1] + NOISE * torch.randn(n, generator=random)
        states.append(state)
    return tuple(torch.stack(x, 1) for x in (seen, moves, states))


def demonstrator(n, random):
    """-> act() of who waits at 0, goes to 1, comes back, waits again, goes to -1 and stays, at a speed of the episode's own.
    From the second step of waiting on it leaves with probability 1/3, after the sixth surely: neither the time nor where it
    stands says where to. It has come to a target when it could reach it in one step."""
    speed, targets = 0.2 + 0.15 * torch.rand(n, generator=random), torch.tensor([0.0, 1.0, 0.0, -1.0])
    part, waited = torch.zeros(n, dtype=torch.int64), torch.ones(n)

    def act(seen, state):
        leaves = (waited > 1) & (torch.rand(n, generator=random) < 1 / 3) | (waited > 6)
        part.add_(leaves)
        waited.masked_fill_(leaves, 0)
        gap = targets[part] - state
        there = gap.abs() <= speed
        waited.add_(there & (part % 2 == 0))
        part.add_(there & (part == 1))
        return gap.clamp(-speed, speed)

    return act


def judged(states):
    """[n, EPISODE] -> {name: which episodes, [n]}: success is one visit to the top, then to the bottom, and to the top never
    again, with the end at the bottom. A visit is beyond FAR, and over once the point is within NEAR of 0."""
    side, visits, fine, down = (torch.zeros(len(states)) for _ in range(4))
    fine += 1
    for x in states.unbind(1):
        here = torch.where(x.abs() > FAR, x.sign(), torch.zeros_like(x))
        new = (here != 0) & (here != side)
        fine *= ~(new & ((here > 0) != (visits == 0)))  # the first one to the top, and no other
        down += new & (here < 0)
        visits += new
        side = torch.where(here != 0, here, torch.where(x.abs() < NEAR, torch.zeros_like(x), side))
    one_visit, end = fine.bool() & (down > 0), (states[:, -1] + 1).abs() < 0.25
    return dict(success=one_visit & end, one_visit=one_visit, end=end)


# ---------------------------------------------------------------- what is looked at


def predictability(actions, bins=16):
    """[n, steps] -> how much of an action's variance the action before it explains, by means over `bins` equal intervals: near
    that of demonstrations where actions follow from each other as they do there (the paper's diagnostic; a network there)."""
    now, after = actions[:, :-1].flatten().double(), actions[:, 1:].flatten().double()
    width = (now.amax() - now.amin()).clamp(min=1e-9) / bins
    place = ((now - now.amin()) / width).long().clamp(max=bins - 1)
    mean = now.new_zeros(bins).index_add(0, place, after) / place.bincount(minlength=bins).clamp(min=1)
    return 1 - ((after - mean[place]).square().mean() / after.var(correction=0).clamp(min=1e-9)).item()


def told(before, after):
    """Two evaluations -> the last line of a run."""
    parts = f"one visit to the top {after['one_visit']:.2f}, end {after['end']:.2f}"
    return f"success {before['success']:.2f} -> {after['success']:.2f} ({parts}) on {after['prompts']} episodes"


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, gpu, runlog, settings

    args, _, device = settings.prepare(__file__, args)
    args.horizon = args.horizon or args.context + 7
    if args.past >= args.context:
        raise UserError(f"--past {args.past}: of a context of {args.context} observations {args.context - 1} actions are past")
    if args.horizon < args.context - 1 + args.execute:
        most = args.horizon - args.context + 1
        raise UserError(f"--execute {args.execute}: of a horizon of {args.horizon} actions {max(0, most)} are not past")
    run = runlog.Run(__file__, args, trained=0)
    run.asked = "episodes"
    random = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 1))
    observations, actions, _ = play(demonstrator(args.demonstrations, random), args.demonstrations, random)
    policy = DiffusionPolicy(args, actions).to(device, getattr(torch, args.dtype))
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    like, level = next(policy.parameters()), alpha_bar(args.diffusion_steps).float().to(device)
    observations, trajectories = (x.to(like) for x in windows(observations, actions, args))
    trajectories = policy.scaled(trajectories)
    of_demonstrations = predictability(actions)

    def evaluate():
        moves, states, error = roll_out(policy, args, gpu.hash_seed(args.seed, 2))
        found = {name: which.double().mean().item() for name, which in judged(states).items()}
        found |= dict(recall_error=error, predictability=predictability(moves), of_demonstrations=of_demonstrations)
        return found | dict(prompts=args.episodes)

    for step in run.steps(policy, optimizer, evaluate):
        # The update's windows, diffusion steps and noise: all processes draw all of them, and take their share of the rows.
        random.manual_seed(gpu.hash_seed(args.seed, step, 3))
        B, shape = args.batch_size, trajectories.shape[1:]
        rows, ks = (torch.randint(n, (B,), generator=random) for n in (len(trajectories), args.diffusion_steps))
        noise = torch.randn(B, *shape, generator=random)
        rows, ks, noise = (x[gpu.rank() :: gpu.world()].to(device) for x in (rows, ks, noise))
        noise = noise.to(like)

        noisy = noised(trajectories[rows], noise, level[ks])
        prediction = policy.net(noisy.to(like), ks, observations[rows])
        loss = past_token_loss(prediction, noise, args).sum() / B
        loss.backward()
        for weight in policy.net.parameters():  # it is so small that every process has all of it
            weight.grad.copy_(gpu.total(weight.grad))
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        if run.finite(gpu.total(loss.item()), grad_norm):
            optimizer.step()
            policy.average.update_parameters(policy.net)
        optimizer.zero_grad()
        error = (prediction.detach() - noise).square().sum((0, 2)) / B
        past, future = error[: args.context - 1].mean().item(), error[args.context - 1 :].mean().item()
        metrics = dict(loss=loss.item(), past_loss=past, future_loss=future)
        metrics = {name: gpu.total(value) for name, value in metrics.items()} | dict(grad_norm=grad_norm)
        run.timed("update")
        run.write(metrics, B * args.horizon, dict(loss="loss", past_loss="past", future_loss="future"))

    run.finish(run.after and told(run.state["before"], run.after))
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
