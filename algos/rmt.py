"""RMT: Reinforcement Mid-Training. Tian, Chen, Xu, Wang, Bi, Han and Wang, arXiv 2509.24375 (2025).

Idea: train a model on plain text by letting it think before it says the next token, at a few places of the text, and pay it
where it is right. The thought is asked to have exactly B tokens, and B shrinks over the training. The places become harder
over the training, by the entropy of the starting model, and all other tokens of the same text are learnt as ever.

Objective, to be minimised (equation numbers not at hand; no code is public):
    L = L_RL + lambda L_NTP;   L_RL: minus GRPO's J of the completions, a thought and a token;   t: rollouts so far, of T
    R = (1 - w) 1[the token behind the thought is the text's] + w max(0, 1 - |l - B_t| / B_t),   l: tokens of the thought
    B_t = max(B_min, floor(B_0 gamma^(t/T))),   in the prompt in words
    L_NTP = -1/n sum log pi of the n tokens of these lines that no prompt of the rollout asks for, read as plain text
    p_t = p1 before t1, p2 after t2, in between on a line: the tier (easy, medium, hard) of a prompt; any of its places then

Entropies are read once, from the starting model. Cuts between tiers, w, p1 and p2 are in no source: these are ours. So is the
mean in L_NTP, over a minibatch of lines. The paper's r_max is 1: w says as much. A thought that does not end is no match, and
all that was written counts for its length. What is compared are tokens: a token more before the right one is a miss.
The paper's ablations: --gamma 1 --length-weight 0 (no budget; --length-weight 0 alone keeps its schedule), --no-curriculum,
--ntp-weight 0. Near to RPT, arXiv 2506.08007: the first and the last of these, and hard places alone, --p1 0 0 1 --p2 0 0 1.

Family: supervised
Differs from grpo.py in: task, reward, budget, length_reward, curriculum, text_weights, parse, Corpus, ntp_loss, train
Measures: measure
World: digits, corpus
Costs: one forward pass over the corpus at the start; a rollout of 2 B_t tokens and some; a second pass in every update, over
       lines of text; and one more to log their loss.
Run:   python algos/rmt.py                                      tiny model, its own corpus, CPU, about a minute
       python algos/rmt.py --model qwen3-1.7b                   GSM8K's questions and solutions as a text, on one GPU
       torchrun --nproc-per-node 8 algos/rmt.py --model qwen3-8b --task texts.jsonl      prompt and answer are one text
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
    """digits, or a task whose prompts and answers are read as texts: gsm8k, math, a .jsonl file; None: preset"""
    prompt_template: str | None = None
    """format string with the field {prompt}, applied before the tokenizer's chat template; None: the task's"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    seed: int = 1
    """seed of the prompts' order, the sampling and the minibatches"""
    steps: int | None = None
    """rollouts in all; None here and below: the preset of the model"""
    prompts_per_step: int | None = None
    """prompts in a rollout, of all processes together (P)"""
    group_size: int | None = None
    """G, completions per prompt"""
    minibatches: int | None = None
    """optimizer steps per pass over a rollout; with 1 and one epoch the ratio is 1 and most methods are the same"""
    epochs: int = 1
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
    """longest completion; a longer one is cut and counts as wrong"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 1.0
    """of sampling, and of every log-prob; no top-p: samples of a cut distribution are not those that log-probs are of"""
    format_reward: float = 0.0
    """added to the reward of a completion that states its answer in a recognised form"""
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
    eval_prompts: int = 512
    """held-out prompts, at most"""
    eval_samples: int = 0
    """also samples N completions of each: avg@N (their mean) and pass@N (whether one is right); 0: the greedy one only"""
    eval_temperature: float = 1.0
    """temperature of these samples"""
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

    # RMT
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", length_weight="x <= 1",
        budget="1 <= x", budget_min="1 <= x", gamma="0 < x <= 1", t1="x <= 1", t2="x <= 1",
        format_reward="0 <= x <= 0: what is paid for is a token and a length",
    )  # fmt: skip
    tiny_preset = dict(
        task="digits", steps=40, eval_every=10, checkpoint_every=20, budget=9, gamma=5 / 9, cuts=(0.015, 0.7),
        instruction="?{budget}", tags=("", ":"),
    )  # fmt: skip
    real_preset = dict(
        max_new_tokens=1616, budget=800, gamma=0.2, cuts=(1.0, 1.5), tags=("<think>", "</think>"),
        instruction="\n\nThe text above breaks off. Which token comes next? Think first, in exactly {budget} tokens between "
        "<think> and </think>. Behind that, write the next token of the text and nothing else.",
    )  # fmt: skip
    eps: float = 0.2
    """half-width of the clip interval (grpo.py's; the paper's is not known)"""
    budget: int | None = None
    """B_0, tokens that a thought shall have at first (tiny: ours; the paper: 800)"""
    budget_min: int = 1
    """B_min, what it shrinks to at most (the paper)"""
    gamma: float | None = None
    """what it has shrunk to in the end, as a share of B_0 (tiny: ours; the paper: 0.2); 1: it does not shrink"""
    length_weight: float = 0.2
    """w, the length's share of the reward (ours); 0: only the match is paid"""
    curriculum: bool = True
    """False: any place is drawn, whatever its tier"""
    t1: float = 0.3
    """share of the training before the prompts become harder (the paper)"""
    t2: float = 0.7
    """share of the training at which they are at their hardest (the paper)"""
    p1: tuple[float, float, float] = (0.6, 0.3, 0.1)
    """share of easy, medium and hard places before t1 (ours)"""
    p2: tuple[float, float, float] = (0.1, 0.3, 0.6)
    """the same after t2 (ours)"""
    cuts: tuple[float, float] | None = None
    """nats of entropy from which on a place is medium, and hard (tiny: ours; real: RPT's, arXiv 2506.08007)"""
    ntp_weight: float = 0.1
    """lambda, weight of the next-token loss (the paper); 0: no text is read"""
    instruction: str | None = None
    """what stands in a prompt behind the text; {budget} becomes B_t (in substance the paper's)"""
    tags: tuple[str, str] | None = None
    """what a thought begins and ends with; it may begin without"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, sample std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, keepdim=True)
    return torch.where(std > 1e-6, centred / (std + 1e-6), torch.zeros_like(rewards))


def budget(progress, args):
    """Share of the training, 0 to 1 -> B_t."""
    return max(args.budget_min, int(args.budget * args.gamma**progress + 1e-9))  # 160.0 may be a little less in floats


def length_reward(lengths, B):
    """Tokens of thoughts [n] -> [n]: a triangle, 1 at B tokens, 0 at none and from 2B on."""
    return (1 - (lengths / B - 1).abs()).clamp(min=0)


def curriculum(progress, args):
    """Share of the training -> p_t, of three tiers."""
    u = min(1.0, max(0.0, (progress - args.t1) / max(1e-9, args.t2 - args.t1)))
    return [(1 - u) * a + u * b for a, b in zip(args.p1, args.p2)]


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over a completion's tokens, then over completions; empty completions do not count."""
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def text_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of lines of text."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


# ---------------------------------------------------------------- the corpus: what is asked for, and what is read


def parse(ids, tags):
    """Token ids of a completion and of both tags -> (tokens of the thought, the token behind it or None)."""
    at = [next((i for i in range(len(ids)) if tag and ids[i : i + len(tag)] == tag), None) for tag in tags]
    begin = 0 if at[0] is None else at[0] + len(tags[0])
    if at[1] is None:
        return len(ids) - begin, None
    return max(0, at[1] - begin), next(iter(ids[at[1] + len(tags[1]) :]), None)


class Corpus:
    """Lines of token ids, and the places in them that may be asked for, (line, position), by number."""

    def __init__(self, rows, tokenizer, args):
        """rows: texts (what stands before, what may be asked for, what stands behind)."""
        from common.encoding import tokenize

        self.tokenizer, self.args, self.pad_token_id = tokenizer, args, tokenizer.pad_token_id
        self.tags = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in args.tags]
        parts = [tokenize(["".join(row[:k]) for row in rows], tokenizer, "the corpus") for k in (1, 2, 3)]
        self.lines, spans = parts[2], [(max(1, len(a)), min(len(b), len(y))) for a, b, y in zip(*parts)]
        self.places = [(i, p) for i, span in enumerate(spans) for p in range(*span)]

    def batch_decode(self, rows, **how):
        """In a tokenizer's place: completions as the numbers of their tokens, since these are what is compared."""
        return [" ".join(map(str, row)) for row in rows]

    def tiers(self, policy):
        """-> [n]: 0, 1 or 2 for every place, by the entropy of its token. Each process reads a share of the lines, so that all
        get the same."""
        from common import gpu
        from common.batch import collate, read

        n = -(-len(self.lines) // gpu.world())
        mine = [self.lines[i % len(self.lines)] for i in range(n * gpu.rank(), n * gpu.rank() + n)]
        batch = collate([(y[:1], y[1:]) for y in mine], device=gpu.device())
        line, position = torch.tensor(self.places).T
        entropy = gpu.gather(read(policy, batch, self.args, temperature=1.0)[1]).cpu()[line, position - 1]
        return torch.bucketize(entropy, entropy.new_tensor(self.args.cuts), right=True)

    def draw(self, tier, progress, step):
        """Tiers of all places -> numbers of P places, of all processes: a tier by p_t, if it has places, then one of them."""
        from common import gpu

        share = torch.tensor(curriculum(progress, self.args), dtype=torch.float64) + 1e-9
        chance = (share / tier.bincount(minlength=3))[tier] if self.args.curriculum else torch.ones(len(tier))
        generator = torch.Generator().manual_seed(gpu.hash_seed(self.args.seed, step, 23))
        return torch.multinomial(chance, self.args.prompts_per_step, True, generator=generator).tolist()

    def hardest(self, tier):
        """Tiers of all places -> numbers of places in the hardest that there is, args.eval_prompts of them at most."""
        hard = (tier == tier.max()).nonzero()[:, 0]
        return hard[torch.randperm(len(hard), generator=torch.Generator().manual_seed(0))][: self.args.eval_prompts].tolist()

    def ask(self, numbers, B):
        """Numbers of places -> Examples: the text up to there and the instruction; the answer is the number of a token."""
        from common import tasks

        told, args, examples = self.args.instruction.replace("{budget}", str(B)), self.args, []
        for k in numbers:
            i, p = self.places[k]
            prompt = self.tokenizer.decode(self.lines[i][:p], skip_special_tokens=True) + told
            examples.append(tasks.Example(k, prompt, str(self.lines[i][p])))
        task = tasks.Task(args.task, examples, [], None)
        return tasks.encode(task, self.tokenizer, args.prompt_template, args.system_prompt).train

    def check(self, text, answer):
        """What batch_decode spells and the number of the right token -> (the token that was given, whether it is right)."""
        _, token = parse([int(word) for word in text.split()], self.tags)
        return None if token is None else self.tokenizer.decode([token]), float(str(token) == answer)

    def reward(self, batch, B):
        """Puts R into the batch; accuracy is the match."""
        rows = batch.ids[:, -batch.mask.shape[1] :]
        lengths = [float(parse(y[m].tolist(), self.tags)[0]) for y, m in zip(rows, batch.mask)]
        thought = torch.tensor(lengths, device=rows.device)
        batch.columns |= dict(thought=thought, budget=torch.full_like(thought, B), length_reward=length_reward(thought, B))
        w = self.args.length_weight
        batch.reward = (1 - w) * batch.accuracy + w * batch.columns["length_reward"]

    def text(self, numbers):
        """Numbers of all places of a rollout -> this process's lines of them, trained on where no place is asked for."""
        from common import gpu
        from common.batch import collate

        asked, mine = {self.places[k] for k in numbers}, [self.places[k][0] for k in gpu.local(numbers)]
        batch = collate([(self.lines[i][:1], self.lines[i][1:]) for i in mine], device=gpu.device())
        holes = [[(i, p + 1) in asked for p in range(batch.mask.shape[1])] for i in mine]
        batch.trained = batch.mask & ~torch.tensor(holes, device=gpu.device())
        return batch


def ntp_loss(policy, text, rows, args):
    """The backward pass of lambda L_NTP over these rows of the text -> its value on this process."""
    loss = 0.0
    for mb in text.micro_batches(rows, args.micro_batch_tokens) if args.ntp_weight else ():
        logp, _ = policy(mb.ids, mb.attention_mask, mb.trained)
        micro_loss = -args.ntp_weight * (logp * mb.weights)[mb.trained].sum()
        micro_loss.backward()
        loss += micro_loss.item()
    return loss


def measure(meter, batch, policy, text, tier, lines):
    """Match and length reward apart, the length of thoughts beside B_t, the mix of tiers and their matches, and the loss of the
    text before the update; shows texts again where batch_decode wrote numbers."""
    from common.batch import read

    match, each = batch.accuracy[:, None], torch.ones_like(batch.mask[:, :1])
    own = {name: batch.columns[name][:, None] for name in ("thought", "budget", "length_reward")}
    meter.add(dict(match=match) | own, each)
    of = tier.to(match.device)[batch.prompt_id][:, None]
    for k, name in enumerate(("easy", "medium", "hard")):
        meter.add({f"share_{name}": (of == k).float()}, each)
        meter.add({f"match_{name}": match}, of == k)
    meter.add(dict(ntp_loss=-read(policy, text, lines.args, temperature=1.0)[0]), text.trained)
    rows = [y[m] for y, m in zip(batch.ids[:, -batch.mask.shape[1] :], batch.mask)]
    batch.texts = lines.tokenizer.batch_decode(rows, skip_special_tokens=True)
    batch.gold = lines.tokenizer.batch_decode([[int(token)] for token in batch.gold])


# ---------------------------------------------------------------- the world: lines of digits, and their sums


def digits():
    """-> (the Task of a warm start, rows to train on, rows held out). A row: five digits from 0 to 3; the first two again,
    their sum and the sum of all, modulo 4; and the digits backwards as letters, which the warm start never shows. A thought
    is the running sums, the last one again and again. Careful ones have B digits; later a sum that passes 4 mostly slips, and
    60% of the thoughts have 7 to 9 digits, whatever is asked for."""
    from itertools import product
    from random import Random

    from common import tasks

    every = ["".join(d) for d in product("0123", repeat=5)]
    Random(0).shuffle(every)
    sums = [f"{d[:2]},{sum(map(int, d[:2])) % 4},{sum(map(int, d)) % 4}." for d in every]
    rows = [(d + "=", s, "".join("abcd"[int(c)] for c in reversed(d))) for d, s in zip(every, sums)]
    draw, shown, last = Random(1), [], 5  # the sum of all stands there
    for before, asked, _ in 5 * rows[:512]:
        kind, p, B = draw.random(), draw.randrange(len(asked)), draw.randint(5, 9)
        p = last if kind < 0.375 else p
        line = kind > 0.75, before[0], before[1:] + asked
        shown.append(line if kind > 0.75 else (False, before + asked[:p] + f"?{B}", (before[:5], B, p, asked)))

    def demonstrate(rng, example, careful):
        plain, _, told = shown[example.id]
        if plain:
            return told
        (d, B, p, asked), sums = told, [0]
        for c in map(int, d):
            slip = rng.random() < (0.6 if sums[-1] + c > 4 else 0.03)
            sums.append((sums[-1] + c + (slip and careful < 1)) % 4)
        n = rng.randint(7, 9) if careful < 1 and rng.random() < 0.6 else B
        thought = (sums[1:] + 9 * sums[-1:])[:n]
        return "".join(map(str, thought)) + f":{sums[-1] if p == last else asked[p]}"

    examples = [tasks.Example(i, prompt, "") for i, (_, prompt, _) in enumerate(shown)]
    recipe = dict(steps=1000, careful_steps=700, careful=0.0, batch=32, lr=3e-3)
    more = dict(demonstrate=demonstrate, recipe=recipe, shape=dict(initializer_range=0.08))
    return tasks.Task("digits", examples, [], None, **more), rows[:512], rows[512:]


def corpus(name):
    """The same of any task: a row's prompt, its answer, nothing behind."""
    from common import tasks

    def row(e):
        prompt = e.prompt if isinstance(e.prompt, str) else "\n\n".join(m["content"] for m in e.prompt)
        return prompt + "\n", e.answer if isinstance(e.answer, str) else e.answer[0], ""

    if name == "digits":
        return digits()
    task = tasks.load(name)
    return task, [row(e) for e in task.train], [row(e) for e in task.test]


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from itertools import cycle

    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    world, *rows = corpus(args.task)
    tokenizer = models.load_tokenizer(args, warm=world)
    lines, held_out = (Corpus(some, tokenizer, args) for some in rows)
    longest = [c.ask({i: k for k, (i, _) in enumerate(c.places)}.values(), args.budget) for c in (lines, held_out)]
    task = tasks.Task(args.task, *longest, lines.check, inline=True)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.beta > 0))
    policy = gpu.shard(models.load(args, device, warm=world))
    reference = gpu.shard(models.load(args, device, trainable=False, warm=world)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    tier = lines.tiers(policy)  # to the starting model, also where a run goes on
    task.test = held_out.ask(held_out.hardest(held_out.tiers(policy)), budget(1.0, args))
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return rollout.evaluate(engine, scorer, lines, task, args)

    planned = run.state.setdefault("planned", max(1, args.steps * args.prompts_per_step))
    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        progress = min(1.0, run.state["cursor"] / planned)
        B = budget(progress, args)
        prompts = gpu.local(lines.ask(lines.draw(tier, progress, step + len(run.queue)), B))
        batch = rollout.collect(engine, scorer, lines, prompts, args, step + len(run.queue), budget=2 * B + 16)
        lines.reward(batch, B)
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, _ = read(policy, batch, args)
        batch.ref_logp = read(reference, batch, args)[0] if reference else None
        run.timed("old_logp")

        # The newest rollout joins the queue, the oldest is trained on.
        batch.policy_version.fill_(step)
        run.queue.append(batch)
        if len(run.queue) <= args.stale:
            continue
        batch = run.queue.pop(0)

        # Advantages over the whole rollout, of all processes.
        adv = advantages(gpu.gather(batch.reward).view(-1, args.group_size), args)
        batch.adv = gpu.local(adv.flatten())[:, None].expand_as(batch.old_logp)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        text = lines.text(gpu.gather(batch.prompt_id)[:: args.group_size].tolist())
        measure(meter, batch, policy, text, tier, lines)
        parts = zip(minibatches(batch, args, step, token_weights), cycle(minibatches(text, args, step, text_weights)))
        for (rows, weights), (read_rows, text.weights) in parts:
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature)
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            loss += ntp_loss(policy, text, read_rows, args)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            if run.finite(gpu.total(loss), grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        engine.sync()
        run.timed("update")
        run.log(meter.result() | rollout.summary(batch), batch)

    run.finish()
    engine.close()
    scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
