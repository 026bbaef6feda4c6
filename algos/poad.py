"""POAD: Policy Optimization with Action Decomposition. Wen, Wan, Zhang, Wang and Wen, arXiv 2405.15821 (2024).

Idea: an agent acts in text, several tokens an action; what is to come is discounted from one action to the next, and not from
token to token inside an action. A discount at every token, as in plain token-level PPO, makes a long action worth less than a
short one with the same effect. With gamma_w = 1 the best tokens are those of the best action, and each has its own advantage.

Objective, to be maximised (equation numbers not at hand); o_t: observation, w_tj: token j of the n of its action, r_t: reward:
    J = 1/N sum min(r A, clip(r, 1 - eps, 1 + eps) A) + alpha H over all N tokens,   r = pi / pi_old,   H: entropy
    A_tj = d_tj + gamma_w lambda A_t,j+1,        d_tj = gamma_w V(o_t, w_t,<j+1) - V(o_t, w_t,<j)       inside an action
    A_tn = d_tn + gamma_a c_t lambda A_t+1,1,    d_tn = r_t + gamma_a c_t V(o_t+1) - V(o_t, w_t,<n)     at its last token
    c_t = 0 where the episode ends at t, else 1;   gamma_w = 1 is the paper's backup, gamma_w = gamma_a its control NTPO
    L_V = 1/2 1/N sum max((V - G)^2, (clip(V, V_old - eps_value, V_old + eps_value) - G)^2),   G = A + V_old

A is standardised over the tokens of a minibatch (not in G). A minibatch whose KL(pi_old, pi), by k3, is above kl_stop makes no
policy step; later ones go on. The critic is a small network on the frozen starting model's states, as in the authors' code.
The authors' code takes advantages that are exactly 0 for padding; here the mask says what is. Actions are written freely; the
paper also chooses from a list of admissible ones. Its text has a target network for the critic, its code none, nor has this.
Ours, on the tiny model: the critic alone is trained in the first 4 rollouts, and has passes of its own, without clipping. Ours
everywhere: a floor under the standard deviation; else, once all is solved, dividing by a tiny one amplifies noise.

Family: credit
Differs from ppo.py in: task, reward, prompts_per_step, epochs, max_new_tokens, stop, format_reward, eval_prompts, eval_samples,
    eval_temperature, discounts, gae, advantages, standardised, value_loss, logp_and_entropy, Critic, fit, play, assemble, train
Same as grpo.py: kl_penalty
Measures: measure
World: Door, environment
Costs: a frozen copy of the starting model, and one more forward pass through it wherever the critic is asked or trained.
Run:   python algos/poad.py                                     tiny model, the door, CPU, about a minute
       python algos/poad.py --gamma-w 0.95                      NTPO
       python algos/poad.py --task door:2                       actions twice as long
       python algos/poad.py --model qwen2.5-3b-instruct --prompt-template "Get the item in: write open, put or close. {prompt}"
       python algos/poad.py --model qwen2.5-7b --task room.py:Room --horizon 20       an environment of your own
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """tiny, an alias (qwen2.5-7b, qwen3-8b-base, llama-3.1-8b-instruct, ...), a hub id, or a local folder"""
    task: str | None = None
    """door[:n], n to 4 (its words n times over: longer actions), or file.py:Class of your own: reset(seed) -> observation, and
    step(action) -> (observation, reward, done)"""
    prompt_template: str | None = None
    """format string with the field {prompt}, applied before the tokenizer's chat template; None: the task's"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    seed: int = 1
    """seed of the prompts' order, the sampling and the minibatches"""
    steps: int | None = None
    """rollouts in all; None here and below: the preset of the model"""
    prompts_per_step: int | None = 96
    """P, over all processes: episodes are begun with so many seeds (ours; the paper's 32 was unstable here)"""
    group_size: int | None = 1
    """G, completions per prompt; the critic needs no siblings to compare with"""
    minibatches: int | None = None
    """optimizer steps per pass over a rollout; with 1 and one epoch the ratio is 1 and most methods are the same"""
    epochs: int | None = None
    """passes over each rollout"""
    stale: int = 0
    """train on rollouts that are this many steps old (0: fresh); the queue is filled before the first update"""
    lr: float | None = None
    """AdamW's rate"""
    warmup_steps: int = 0
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    beta: float = 0.0
    """weight of the KL penalty to the starting model; above 0 a frozen reference is kept"""
    max_new_tokens: int | None = None
    """longest action; a longer one is cut, and carried out as it stands"""
    stop: tuple[str, ...] = ("\n",)
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 1.0
    """of sampling, and of every log-prob; no top-p: samples of a cut distribution are not those that log-probs are of"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    tis_cap: float = 2.0
    """truncated importance sampling: cap of pi_old / pi_sampler where the engine is vLLM; 0: off"""
    tis_level: Literal["token", "sequence"] = "token"
    """token: a ratio for each; sequence: one for the whole completion, where the objective moves it as one"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
    eval_every: int | None = None
    """steps between greedy evaluations; 0: only before and after"""
    eval_prompts: int = 16
    """greedy episodes; the door's are all alike"""
    checkpoint_every: int | None = None
    """steps between checkpoints; 0: only at the end"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    push_to_hub: str | None = None
    """owner/name on the Hugging Face hub that the last checkpoint goes to at the end"""
    tracker: Literal["none", "trackio", "wandb"] = "none"
    """who gets the metrics besides TensorBoard"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of weights and gradients"""
    optimizer: Literal["adamw", "adamw_sr", "adamw_8bit"] | None = None
    """adamw_sr rounds bfloat16 weights stochastically; adamw_8bit does, and keeps 8-bit states; both are torchao's"""
    lora_rank: int = 0
    """train LoRA layers of this rank instead of all weights; 0: all weights"""
    lora_alpha: float | None = None
    """their updates are scaled by alpha / rank; None: twice the rank"""
    lora_targets: str = "all-linear"
    """which layers get them: names with commas (q_proj,v_proj), or all-linear"""
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass"""
    micro_batch_tokens: int | None = None
    """tokens in one forward pass of the trainer; a prompt that its completions share counts once"""

    # POAD
    limits = dict(
        gamma_a="0 <= x <= 1", gamma_w="0 <= x <= 1", lam="0 <= x <= 1", horizon="1 <= x", kl_stop="0 < x",
        critic_width="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(
        task="door", steps=30, minibatches=4, epochs=2, eval_every=5, entropy=0.0, eps_value=0.0, value_lr=1e-3,
        critic_width=(256, 128), critic_epochs=10, critic_first=4, critic_first_epochs=40,
    )  # fmt: skip
    real_preset = dict(
        task="door", max_new_tokens=128, minibatches=4, epochs=5, entropy=0.01, eps_value=0.2, value_lr=5e-5,
        critic_width=(1024, 512), critic_epochs=0, critic_first=0, critic_first_epochs=0,
    )  # fmt: skip
    horizon: int = 5
    """steps of an episode in a rollout; what comes after them is bootstrapped (ours: the door's)"""
    eps: float = 0.2
    """half-width of the clip interval (the paper)"""
    gamma_a: float = 0.95
    """discount from action to action (the paper: 0.95 to 0.99)"""
    gamma_w: float = 1.0
    """discount from token to token of an action (the paper); as gamma_a: NTPO"""
    lam: float = 0.95
    """lambda of GAE (code)"""
    entropy: float | None = None
    """weight of the entropy bonus (tiny: ours; code: 0.01, Overcooked 1e-4)"""
    kl_stop: float = 0.02
    """a minibatch whose policy has moved further than this from the rollout's makes no step (the paper)"""
    std_floor: float = 0.2
    """advantages are divided by this at least (ours; the paper: 0)"""
    eps_value: float | None = None
    """how far V may move from V_old within a rollout; 0: as far as it likes (tiny: ours; the paper: 0.2)"""
    value_lr: float | None = None
    """the critic's rate (tiny: ours; the paper: 1e-5 to 5e-5)"""
    critic_width: tuple[int, ...] | None = None
    """widths of the critic's hidden layers (tiny: ours; code: 1024, 512)"""
    critic_epochs: int | None = None
    """the critic's passes over a rollout before those that it has with the policy (tiny: ours; the paper: 0)"""
    critic_first: int | None = None
    """rollouts at the start that the critic alone learns from (tiny: ours; the paper: 0)"""
    critic_first_epochs: int | None = None
    """its passes over each of these (tiny: ours; the paper: 0)"""


# ---------------------------------------------------------------- the objective


def token_rewards(scores, old_logp, ref_logp, mask, args):
    """scores [B], log-probs [B, T] (ref_logp None: no penalty) -> [B, T]: k1 penalty at every token, the score at the last."""
    penalty = torch.zeros_like(old_logp) if ref_logp is None else args.beta * (old_logp - ref_logp)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return (last * scores[:, None] - penalty).masked_fill(~mask, 0.0)


def discounts(cont, mask, args):
    """cont [E, S], mask [E, S, T] -> [E, S, T]: from a token to what follows it. At the end of an action time passes."""
    last = mask & (mask.flip(2).cumsum(2).flip(2) == 1)
    return torch.where(last, args.gamma_a * cont[:, :, None], args.gamma_w)


def gae(rewards, values, last, cont, mask, args):
    """rewards, values, mask [E, S, T] of E episodes of S steps; cont [E, S]: whether the episode goes on; last [E]: V of what
    comes after the window -> [E, S, T]: generalised advantage estimates, in one sweep over the tokens of an episode."""
    gamma, shape = discounts(cont, mask, args).flatten(1), mask.shape
    rewards, values, mask = rewards.flatten(1), values.flatten(1), mask.flatten(1)
    adv, next_adv, next_value = torch.zeros_like(values), torch.zeros_like(last), last.masked_fill(~cont.all(1), 0.0)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma[:, t] * next_value - values[:, t]
        adv[:, t] = delta + gamma[:, t] * args.lam * next_adv
        next_adv = torch.where(mask[:, t], adv[:, t], next_adv)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return adv.masked_fill(~mask, 0.0).view(shape)


def advantages(rewards, values, last, cont, mask, args):
    """[B, T] each, a row a step, args.horizon rows an episode; last, cont [B] -> advantages and returns [B, T]."""
    r, v, c, m = (x.unflatten(0, (-1, args.horizon)) for x in (rewards, values, cont, mask))
    adv = gae(r, v, last[:: args.horizon], c, m, args).flatten(0, 1)
    returns = (adv + values).masked_fill(~mask, 0.0)
    return adv, returns


def standardised(adv, mask, args):
    """[n, T] each, of a whole minibatch -> [n, T]: mean 0 and std 1 over its valid tokens; the std is the floor at least."""
    n = mask.sum()
    centred = (adv - adv.sum() / n.clamp(min=1)).masked_fill(~mask, 0.0)
    return centred / ((centred.square().sum() / n.clamp(min=1)).sqrt().clamp(min=args.std_floor) + 1e-8)


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def value_loss(values, old_values, returns, mask, args):
    """[B, T] each -> loss per token [B, T], to be minimised: squared error, the larger of plain and clipped."""
    values = values.masked_fill(~mask, 0.0)
    clipped = values.clamp(old_values - args.eps_value, old_values + args.eps_value) if args.eps_value else values
    error = torch.max((values - returns).square(), (clipped - returns).square())
    return 0.5 * error.masked_fill(~mask, 0.0)


def explained_variance(values, returns, mask):
    """[B, T] each -> 1 - Var(G - V) / Var(G) over the valid tokens: 1 for a perfect critic, 0 for a constant one."""
    error, spread = (returns - values)[mask], returns[mask]
    return 1 - error.var(correction=0) / spread.var(correction=0).clamp(min=1e-8)


def logp_and_entropy(targets, logits):
    """targets [n], logits [n, V] -> log-probs and entropies [n], both with their gradient."""
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


class Critic(torch.nn.Module):
    """A small network on the states of a frozen model, zero at first: V_t is read where token t is predicted, like its
    log-prob. Called as the policy is, or with these states [N, H]; forward -> values [b, T], wide, 0 off the mask, and None."""

    def __init__(self, policy, args):
        super().__init__()
        torch.manual_seed(args.seed)  # the same network on every process
        self.frozen, lm, sizes = (policy,), policy.lm, [policy.lm.config.hidden_size, *args.critic_width, 1]
        layers = [torch.nn.Linear(*pair, dtype=lm.dtype) for pair in zip(sizes, sizes[1:])]
        self.layers = torch.nn.Sequential(*[part for layer in layers for part in (torch.nn.ReLU(), layer)][1:])
        for weight in layers[-1].parameters():
            torch.nn.init.zeros_(weight)

    def forward(self, ids, attention_mask, mask, temperature=1.0, states=None):
        if states is None:
            states = self.frozen[0](ids, attention_mask, mask, states=True).detach()
        values = self.layers(states).squeeze(-1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.new_zeros(mask.shape).masked_scatter(mask, values), None


def fit(critic, optimizer, batch, args, step, run):
    """The critic's own passes over a rollout, before those that it has with the policy. Its states are read once for all."""
    from dataclasses import replace

    from common import gpu
    from common.batch import minibatches, read

    own = replace(args, epochs=args.critic_first_epochs if step < args.critic_first else args.critic_epochs)
    states = read(critic.frozen[0], batch, args, layers=["normed"])[2] if own.epochs else None
    for rows, _ in minibatches(batch, own, step, token_weights, keep=batch.mask.any(1), value_weights=batch.mask):
        mask, columns = batch.mask[rows], {name: x[rows] for name, x in batch.columns.items()}
        values, _ = critic(None, None, mask, states=states[rows][mask])
        losses = value_loss(values, columns["values"], columns["returns"], mask, args)
        (losses * columns["value_weights"])[mask].sum().backward()
        if run.finite(gpu.clip_gradients(critic, args.max_grad_norm)):
            optimizer.step()
        optimizer.zero_grad()


def play(make, engine, encode, tokenizer, numbers, args, noise, temperature):
    """Episodes with these numbers -> rows (prompt, token ids of the action, their log-probs, ended, text, reward, goes on),
    args.horizon of each episode, those after its end without an action; and the token ids of what each has seen last."""
    from common import gpu

    rooms, rows, going = [make() for _ in numbers], [[] for _ in numbers], list(range(len(numbers)))
    seen = [room.reset(gpu.hash_seed(args.seed, noise, i // args.group_size)) for room, i in zip(rooms, numbers)]
    for t in range(args.horizon):
        prompts = encode([seen[k] for k in going])
        seeds = [gpu.hash_seed(args.seed, noise, numbers[k], t) for k in going]
        out = engine.generate(prompts, 1, args.max_new_tokens, temperature, seeds)
        for k, prompt, (ids, logp, ended) in zip(going, prompts, out):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            seen[k], reward, done = rooms[k].step(text.strip())
            rows[k].append((prompt, ids, logp, ended, text, float(reward), not done))
        going = [k for k in going if rows[k][-1][-1]]
    seen = encode(seen)
    for row, prompt in zip(rows, seen):
        row += [(prompt, [], [], True, "", 0.0, False)] * (args.horizon - len(row))
    return [row for episode in rows for row in episode], seen


def assemble(rows, seen, tokenizer, engine, args, step):
    """What play() gives -> Batch whose groups are episodes, and one of what comes after them. A row's accuracy is the return of
    its episode; an action that was cut keeps its reward."""
    from common import gpu
    from common.batch import collate

    prompts, ids, logp, ended, texts, rewards, cont = map(list, zip(*rows))
    pad, S, end = tokenizer.pad_token_id, args.horizon, tokenizer.eos_token_id
    batch = collate(list(zip(prompts, ids)), pad, engine.device)
    logp = [p + [0.0] * (batch.mask.shape[1] - len(p)) for p in logp]
    found = dict(sampler_logp=logp, truncated=[not e for e in ended], reward=rewards, policy_version=[step] * len(rows))
    for name, value in (found | dict(prompt_id=[gpu.hash_seed(*p) for p in prompts])).items():
        setattr(batch, name, torch.tensor(value, device=engine.device))
    batch.accuracy = batch.reward.view(-1, S).sum(1).repeat_interleave(S)
    batch.columns["cont"] = torch.tensor(cont, device=engine.device)
    batch.texts, batch.answers, batch.gold, batch.group, batch.engine = texts, texts, [""] * len(rows), S, engine.name
    return batch, collate([(p, [end]) for p in seen], pad, engine.device)


def measure(meter, batch, policy, door, encode, tokenizer, args):
    """Means over the steps that were made; |A| of an action's first token, which decides in the door, and of the others; and
    how far V is, where actions begin, from the policy's value by dynamic programming, if the environment is the door. A move
    counts there as it is mostly written, with the line break behind it: any other ending would count as doing nothing."""
    from common import gpu
    from common.batch import collate, read

    made, S = batch.mask[:, :1], args.horizon
    rows = dict(length=batch.mask.sum(1).float(), reward=batch.reward, truncated=batch.truncated.float())
    meter.add({name: x[:, None] for name, x in rows.items()} | dict(adv_first=batch.adv[:, :1].abs()), made)
    meter.add(dict(adv_others=batch.adv[:, 1:].abs()), batch.mask[:, 1:])
    meter.add(dict(steps=made.view(-1, S).sum(1, keepdim=True).float()), made[::S])
    if not isinstance(door, Door):
        return
    doors = [Door(door.times, *state) for state in Door.STATES]
    prompts, end = encode([d.seen() for d in doors]), (*args.stop, "")[0]
    moves = tokenizer([d.moves[d.stage] + end for d in doors], add_special_tokens=False)["input_ids"]
    logp, _ = read(policy, collate(list(zip(prompts, moves)), device=batch.ids.device), args)
    chance = {d.seen(): p for d, p in zip(doors, logp.sum(1).exp().tolist())}
    exact = {gpu.hash_seed(*ids): d.value(chance, args.gamma_a) for ids, d in zip(prompts, doors)}
    wanted = torch.tensor([[exact.get(i, 0.0)] for i in batch.prompt_id.tolist()], device=batch.ids.device)
    error = batch.columns["values"][:, :1] - wanted
    meter.add(dict(value_bias=error, value_error=error.abs()), made)
    meter.add(dict(start_bias=error[::S]), made[::S])
    meter.note(exact_value=door.value(chance, args.gamma_a))


# ---------------------------------------------------------------- the world


class Door:
    """Open the door, put the item in, close the door; whatever else is written does nothing. The reward is 1 in the end, or -1
    after five steps. An action is its word `times` over: it gets longer, and its first letter still decides."""

    MOVES, STEPS = ("open", "put", "close"), 5
    SEEN = ("door closed item out", "door open item out", "door open item in")
    STATES = [(stage, left) for stage in range(3) for left in range(1, 6 - stage)]

    def __init__(self, times=1, stage=0, left=STEPS):
        self.times, self.stage, self.left = times, stage, left
        self.moves = [" ".join([move] * times) for move in self.MOVES]

    def reset(self, seed):
        self.stage, self.left = 0, self.STEPS
        return self.seen()

    def seen(self):
        return f"{self.SEEN[self.stage]} {self.left}:"

    def step(self, action):
        self.stage += action == self.moves[self.stage]
        self.left -= 1
        if self.stage == len(self.moves):
            return "done", 1.0, True
        return (self.seen(), 0.0, False) if self.left else ("late", -1.0, True)

    def value(self, chance, gamma):
        """The exact value of this state, of a policy that makes its move with probability chance[observation]."""
        value, p = 0.0, chance[self.seen()]
        for share, action in ((p, self.moves[self.stage]), (1 - p, "")):
            after = Door(self.times, self.stage, self.left)
            _, reward, done = after.step(action)
            value += share * (reward if done else reward + gamma * after.value(chance, gamma))
        return value


def environment(spec):
    """door, door:2, ... or file.py:Class -> (a function that makes an environment, its Task: observations, and for a warm start
    any of the actions and what is seen after it, so that the model reads what it sees)."""
    import runpy

    from common import UserError, reason, tasks

    path, _, option = spec.rpartition(":") if ":" in spec else (spec, "", "1")
    if path == "door" and option in ("1", "2", "3", "4"):  # longer words would not fit into the tiny model's max_new_tokens
        make, times = lambda: Door(int(option)), int(option)
        texts = [Door(times, *state).seen() for state in Door.STATES]
    else:
        try:
            sys.path.append(str(Path(path).parent.resolve()))  # for what the file imports
            make = runpy.run_path(path)[option]
            texts = [make().reset(0)]
            if not isinstance(texts[0], str):
                raise TypeError("reset() must return a text")
        except (Exception, SystemExit) as error:
            raise UserError(f"--task {spec}: needs door, door:2 to door:4, or file.py:Class ({reason(error)})") from None

    def demonstrate(rng, example, careful):
        door = Door(times, *Door.STATES[example.id])
        action = rng.choice(door.moves)
        return f"{action}\n{door.step(action)[0]}"

    examples = [tasks.Example(i, text, "") for i, text in enumerate(texts)]
    own = dict(demonstrate=demonstrate, recipe=dict(steps=400, careful_steps=400)) if path == "door" else {}
    return make, tasks.Task(spec, examples, examples, check=None, **own)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from dataclasses import replace

    from common import engines, gpu, models, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    make, task = environment(args.task)
    tokenizer = models.load_tokenizer(args, warm=task)
    task = tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt)
    context = max(models.check_context(config, task, args), min(4096, config.max_position_embeddings))  # more may be seen
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=1)
    run.measure = "return"  # of an episode, where others have an accuracy
    policy = gpu.shard(models.load(args, device, warm=task))
    reference = gpu.shard(models.load(args, device, trainable=False, warm=task))
    optimizer = gpu.make_optimizer(policy, args)
    critic = gpu.shard(Critic(reference, args).to(device))
    critic_optimizer = gpu.make_optimizer(critic, replace(args, lr=10 * args.lr if args.value_lr is None else args.value_lr))
    run.extra["critic"] = critic, critic_optimizer
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)

    def encode(texts):
        seen = replace(task, train=[tasks.Example(0, text, "") for text in texts])
        models.check_context(config, tasks.encode(seen, tokenizer, args.prompt_template, args.system_prompt), args)
        return [e.ids for e in seen.train]

    def evaluate():
        engine.wake()
        numbers = [i * args.group_size for i in range(gpu.rank(), args.eval_prompts, gpu.world())]
        rows, _ = play(make, engine, encode, tokenizer, numbers, args, -1, 0.0)
        engine.sleep()
        return dict(greedy_accuracy=gpu.total(sum(row[-2] for row in rows)) / args.eval_prompts, prompts=args.eval_prompts)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P seeds over all processes, G episodes each; a row of the batch is a step of one.
        engine.wake()
        numbers = gpu.local(range(args.prompts_per_step * args.group_size))
        rows, seen = play(make, engine, encode, tokenizer, numbers, args, step + len(run.queue), args.temperature)
        batch, after = assemble(rows, seen, tokenizer, engine, args, step)
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference; values of the critic, read in the same way.
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if args.beta > 0 else None
        batch.columns["values"], _ = read(critic, batch, args)
        batch.columns["last"] = read(critic, after, args)[0][:, 0].repeat_interleave(args.horizon)
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        scores = token_rewards(batch.reward, batch.old_logp, batch.ref_logp, batch.mask, args)
        scores, values, mask = map(gpu.gather, (scores, batch.columns["values"], batch.mask))
        adv, returns = advantages(scores, values, *(gpu.gather(batch.columns[name]) for name in ("last", "cont")), mask, args)
        batch.adv, batch.columns["returns"] = (gpu.local(x)[:, : batch.mask.shape[1]] for x in (adv, returns))

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        meter.note(explained_variance=explained_variance(values, returns, mask).item())
        measure(meter, batch, policy, make(), encode, tokenizer, args)
        fit(critic, critic_optimizer, batch, args, step, run)
        how = dict(keep=batch.mask.any(1), normalise=lambda adv, mask: standardised(adv, mask, args))
        for rows, weights in minibatches(batch, args, step, token_weights, **how, value_weights=batch.mask):
            batch.weights, loss, critic_loss, kl = weights, 0.0, 0.0, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, read=logp_and_entropy)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                objective = objective + args.entropy * entropy
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                values, _ = critic(mb.ids, mb.attention_mask, mb.mask)
                losses = value_loss(values, mb.columns["values"], mb.columns["returns"], mb.mask, args)
                micro_loss = (losses * mb.columns["value_weights"])[mb.mask].sum()
                micro_loss.backward()
                critic_loss += micro_loss.item()
                stats["old_kl"] = kl_penalty(mb.old_logp, logp.detach(), mb.trained)
                kl += (stats["old_kl"] * mb.weights)[mb.trained].sum().item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            critic_norm = gpu.clip_gradients(critic, args.max_grad_norm)
            stopped = gpu.total(kl) > args.kl_stop
            if run.finite(gpu.total(loss), grad_norm, gpu.total(critic_loss), critic_norm):
                if not stopped and step >= args.critic_first:
                    optimizer.step()
                critic_optimizer.step()
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm, stopped=float(stopped))
            meter.note(value_loss=gpu.total(critic_loss), value_grad_norm=critic_norm)
        batch.adv = gpu.local(adv)[:, : batch.mask.shape[1]]
        engine.sync()
        run.timed("update")
        run.log(rollout.summary(batch) | meter.result(), batch)

    run.finish()
    engine.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
