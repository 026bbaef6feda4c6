"""CoT2: Continuous Chain of Thought. Gozeten, Ildiz, Zhang, Harutyunyan, Rawat and Oymak, "Continuous Chain of Thought Enables
Parallel Exploration and Reasoning", arXiv 2505.23648 (2025).

Idea: let a thought be a mixture of tokens, so that a model follows many lines of reasoning at once. First it is shown, at
every step, how often each state comes up among many traces of a problem: it learns to give that distribution, and is fed its
mean embedding. Then GRPO goes on with thoughts that are drawn, K tokens averaged or a random point of the simplex, so that each
has a probability, and a ratio.

Objective (equation numbers not at hand); a_t = softmax(z_t) at step t of m, E the embeddings, the last step a token:
    CSFT, to be minimised: L = sum_t KL(a*_t, a_t), mean over prompts;   fed is E' a*_t
        a*_t(v) = 1/B #{of B traces those in state v at step t};   a*_m: the right answer
    GRPO, to be maximised: J = 1/(B G m) sum min(r_t A, clip(r_t, 1 - eps, 1 + eps) A),   A = (R - mean R) / std R
        MTS: fed is the mean of K embeddings, of tokens drawn from a_t;   r_t = (product of their ratios)^(1/K)
        Dirichlet: fed is E' x, x drawn from Dir(gamma a_t);   r_t = ratio of the densities at x
        the answer: r_m = ratio of its token's probabilities

The std is that of the population. In the authors' code MTS draws from softmax(z_t / K), and r_t is the plain product there
(--ratio code); the answer has no K. Dirichlet is the code's: on the tokens of at least 0.001 in the rollout, none below that.
CSFT is teacher-forced; the code can also feed the model its own mixtures. Its gradient goes through what is fed, that of GRPO
does not. Greedy accuracy is the paper's base evaluation, where the model feeds itself whole mixtures; avg@N that of thoughts as
they are drawn. GRPO improves the second one, and the first one falls: the more, the less like the mixture a drawn thought is.

Family: latent
Differs from grpo.py in: eval_samples, advantages, token_weights, targets, csft_loss, tempered, restricted, thought_logp,
    entries, mixture, dirichlet, think, replay, stage, start, make_engine, readings, train
World: traces, mnns, worlds
Measures: measure
Costs: CSFT, once, on tasks whose states can be listed. Rollouts by transformers, since vLLM cannot be fed embeddings: --model
       qwen2.5-7b runs, slowly, and without CSFT.
Run:   python algos/cot2.py                                     tiny model of width 24 on MNNS, CPU, about a minute
       python algos/cot2.py --steps 0 --run-dir runs/csft       CSFT alone; --traces 1: of one trace, in tokens
       python algos/cot2.py --model runs/csft --k 6             GRPO from there; --sampler dirichlet
       python algos/cot2.py --model qwen2.5-1.5b                GSM8K on one GPU
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
    """route, titles, chain, addition[:digits], countdown[:n], gsm8k, math, reasoning_gym:<name>, a .jsonl file; None: preset"""
    reward: str | None = None
    """file.py:function of your own: (text, answer) -> score, or (answer that was read, score); a cut completion scores 0"""
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
    eval_samples: int = 8
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

    # CoT2
    limits = dict(
        group_size="2 <= x: the completions of a prompt are compared with each other", k="1 <= x", gamma="0 < x",
        csft_batch="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(task="mnns", steps=60, minibatches=4, thoughts=3, csft_steps=1200)
    real_preset = dict(thoughts=16, csft_steps=0)
    hf_only = "embeddings fed while decoding"
    eps: float = 0.1
    """half-width of the clip interval (authors' code)"""
    sampler: Literal["mts", "dirichlet"] = "mts"
    """what a thought is in rollouts: the mean of K tokens, or a point of the simplex"""
    k: int = 3
    """K of mts (the paper: 2, 3, 6); 1: a token"""
    ratio: Literal["paper", "code"] = "paper"
    """of mts: the geometric mean; or a product, of logits that are divided by K where tokens are drawn, too"""
    gamma: float = 1.0
    """of dirichlet: how near points are to the model's own (authors' code)"""
    thoughts: int | None = None
    """thoughts that a completion begins with (MNNS: a sum each, all but the last)"""
    traces: int = 0
    """B of CSFT, the best of all traces; 0: all; 1: one, and thoughts are tokens, in GRPO as well"""
    width: Literal[16, 24, 32] = 24
    """channels of the tiny model on MNNS (the paper's)"""
    csft_steps: int | None = None
    """updates of CSFT, for a tiny model on MNNS; None: 1200 (ours); a run's folder as --model is behind it"""
    csft_batch: int = 256
    """prompts in such an update (ours)"""
    csft_lr: float = 4e-3
    """AdamW's rate there, up over the first fifth, then down to 0 by a cosine (ours)"""


# ---------------------------------------------------------------- the objective


def advantages(rewards, args):
    """[P, G] -> [P, G]: z-score in the group, population std; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    std = rewards.std(1, correction=0, keepdim=True)
    return torch.where(std > 1e-6, centred / std, torch.zeros_like(rewards))


def surrogate(logp, old_logp, adv, mask, args):
    """[B, T] each -> (objective per token [B, T], to be maximised, stats per token)."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - args.eps, 1 + args.eps)
    objective = torch.min(ratio * adv, clipped * adv)
    return objective, dict(clip_fraction=(clipped * adv < ratio * adv).float())


def token_weights(mask, args):
    """[B, T] -> [B, T]: sum over a completion's steps / m, then mean over completions; empty completions do not count."""
    lengths = mask.sum(1, keepdim=True)
    return mask / args.max_new_tokens / (lengths > 0).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def targets(traces, args):
    """Traces of a problem, lists of states, the best first -> a* of every step, {state: share}."""
    some = traces[: args.traces or None]
    shares = [{v: column.count(v) / len(some) for v in column} for column in zip(*some)]
    return [*shares[:-1], {some[0][-1]: 1.0}]


def csft_loss(target, logits):
    """a*, z [..., V] each -> KL(a*, a) [...]: the cross-entropy less the target's entropy."""
    return -(target * logits.log_softmax(-1)).sum(-1) - torch.special.entr(target).sum(-1)


def tempered(z, args):
    """Logits of thoughts [n, V] -> those that are drawn from. The answer's stay as they are."""
    return z / args.k if args.sampler == "mts" and args.ratio == "code" else z


def restricted(z, ids, kept):
    """Logits [n, V], tokens [n, w] and which of them are the support -> a on it [n, w], none below 0.001, 0 elsewhere."""
    p = z.softmax(-1).gather(-1, ids).clamp(min=1e-3) * kept
    return p / p.sum(-1, keepdim=True)


def thought_logp(record, z, args):
    """Thoughts [n, 2 w], tokens and then their weights, and logits [n, V] -> their log-probs or log-densities [n]."""
    ids, x = record.chunk(2, -1)
    if args.sampler == "mts":
        logp = tempered(z, args).log_softmax(-1).gather(-1, ids.long()).sum(-1)
        return logp / args.k if args.ratio == "paper" else logp
    kept = x > 0
    a = (args.gamma * restricted(z, ids.long(), kept)).where(kept, 1.0)  # a token of a = x = 1 adds nothing
    return z.new_tensor(args.gamma).lgamma() + ((a - 1) * x.where(kept, 1.0).log() - a.lgamma()).sum(-1)


def entries(V, args):
    """w, tokens of a thought: K, or all that a support may have, of the likeliest 128."""
    return args.k if args.sampler == "mts" else min(V, 128)


def mixture(embedding, record):
    """Thoughts [n, 2 w] -> the weighted mean of their tokens' embeddings [n, H]."""
    ids, x = record.chunk(2, -1)
    return torch.einsum("nw,nwh->nh", x.to(embedding.weight.dtype), embedding(ids.long()))


def dirichlet(p, noise, args):
    """p [n, w], 0 outside the support, uniform numbers [n, 2 w] -> a draw of Dir(gamma p), none on the support below 1e-6. A
    gamma variable of shape a is one of a + 1, here by its inverse, times a uniform number to the power 1 / a."""
    from scipy.special import gammaincinv

    a, (u, v) = (args.gamma * p).double().cpu(), noise.double().cpu().clamp(min=1e-300).chunk(2, -1)
    log_g = torch.from_numpy(gammaincinv(a.numpy() + 1, u.numpy())).log() + v.log() / a
    x = log_g.where(a > 0, -torch.inf).softmax(-1).clamp(min=1e-6).to(p) * (p > 0)
    return x / x.sum(-1, keepdim=True)


def think(z, embedding, noise, args):
    """See common.thoughts.Thinker. Without noise the whole mixture is fed, and nothing recorded."""
    p, w = tempered(z, args).softmax(-1), entries(z.shape[1], args)
    never = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    if noise is None:
        return p.to(embedding.weight.dtype) @ embedding.weight, p.argmax(-1), z.new_zeros(len(z), 2 * w), 0 * z[:, 0], never
    if args.sampler == "mts":
        cdf = p.cumsum(-1, dtype=noise.dtype)
        ids = torch.searchsorted(cdf, noise[:, :w] * cdf[:, -1:], right=True).clamp(max=z.shape[1] - 1)
        x = torch.full_like(ids, 1, dtype=z.dtype) / w
    else:
        ids = p.topk(w).indices.sort(-1).values
        x = dirichlet(restricted(z, ids, p.gather(-1, ids) >= 1e-3), noise, args)
    record = torch.cat([ids.to(z), x], -1)
    shown = ids.gather(-1, x.argmax(-1, keepdim=True))[:, 0]
    return mixture(embedding, record), shown, record, thought_logp(record, z, args), never


def replay(mb, args):
    """What policy() must be told to see a micro-batch's thoughts again -> log-probs and entropies, [b, T] each."""
    given = mb.columns["given"]
    soft = given[:, :, 0] > 0

    def read(given, z):
        thought, record = given[:, 0] > 0, given[:, 2:]
        token = z.log_softmax(-1).gather(-1, given[:, 1:2].long())[:, 0]
        drawn = tempered(z, args).where(thought[:, None], z).detach()
        logp = token.index_put((thought,), thought_logp(record[thought], z[thought], args))
        return logp, torch.special.entr(drawn.softmax(-1)).sum(-1)

    return dict(read=read, given=given, thoughts=(soft, lambda embedding: mixture(embedding, given[soft][:, 2:])))


def measure(meter, mb, logp, entropy, stats):
    """Entropy, how far ratios move and how often they are clipped, at thoughts and at tokens apart."""
    thought = mb.columns["given"][:, :, 0] > 0
    found = dict(entropy=entropy, log_ratio=(logp.detach() - mb.old_logp).abs(), clip_fraction=stats["clip_fraction"])
    for name, mask in dict(thoughts=mb.trained & thought, tokens=mb.trained & ~thought).items():
        meter.add({f"{k}_{name}": x for k, x in found.items()}, mask)


# ---------------------------------------------------------------- the world: minimum non-negative sum


def traces(prompt):
    """D3 D1 D4 D1 -> the sums so far by every choice of signs, S3 S4 S0 =1: the smallest |last sum| comes first, and of two
    that are alike in it the one that is not negative."""
    from itertools import accumulate, product

    digits = [int(word[1:]) for word in prompt.split()]
    signs = list(product((-1, 1), repeat=len(digits)))
    sums = [list(accumulate(s * d for s, d in zip(some, digits))) for some in signs]
    best = sorted(zip(sums, signs), key=lambda x: (abs(x[0][-1]), x[0][-1] < 0, x[1]))
    return [" ".join(f"S{s}" for s in before) + f" ={last}" for (*before, last), _ in best]


def mnns(args):
    """Four digits from 1 to 9: which signs make the smallest sum that is not negative? The states are sums so far, the answers
    tokens of their own, =0 to =9, each of which ends a completion. A fifth of the multisets of digits is held out, in all
    their orders."""
    from functools import partial
    from itertools import combinations_with_replacement, product
    from random import Random

    from common import rewards, tasks
    from common.worlds import tiny

    bags = {bag: " ".join(f"D{d}" for d in bag) for bag in combinations_with_replacement(range(1, 10), 4)}
    answers = {bag: traces(prompt)[0].split()[-1] for bag, prompt in bags.items()}
    held_out = set(Random(0).sample(list(bags), len(bags) // 5))
    every, parts = Random(0).sample(list(product(range(1, 10), repeat=4)), 9**4), ([], [])
    for i, digits in enumerate(every):
        bag, prompt = tuple(sorted(digits)), " ".join(f"D{d}" for d in digits)
        parts[bag in held_out].append(tasks.Example(i, prompt, answers[bag]))

    def check(text, answer):
        said = (text.split() or [None])[-1]
        return said, float(said == answer)

    words = [*(f"D{d}" for d in range(10)), *(f"S{s}" for s in range(-27, 28)), *(f"={s}" for s in range(10))]
    shape = dict(hidden_size=args.width, intermediate_size=4 * args.width, num_attention_heads=2, num_key_value_heads=2)
    shape["initializer_range"] = 0.08
    own = dict(check=rewards.Own(args.reward) if args.reward else check, inline=not args.reward)
    own |= dict(shape=shape, tokenizer=partial(tiny.words, words), max_new_tokens=4)
    return tasks.Task("mnns", *parts, demonstrate=lambda rng, e, careful: traces(e.prompt)[0], **own)


def worlds(args):
    """-> a function of a task's name: the Task that a tiny model is made for."""
    from common import tasks

    return lambda name: mnns(args) if name == "mnns" else tasks.world(name)


# ---------------------------------------------------------------- the loop


def stage(policy, task, tokenizer, args, run):
    """CSFT of a tiny model: a prompt and the mixtures behind it are read in one parallel pass."""
    from dataclasses import replace

    from tqdm import tqdm

    from common import UserError, gpu

    policy.to(gpu.device())
    own = replace(args, lr=args.csft_lr, steps=args.csft_steps, warmup_steps=args.csft_steps // 5, lr_schedule="cosine")
    optimizer, lm, number, known = gpu.make_optimizer(policy, own), policy.lm, tokenizer.convert_tokens_to_ids, {}
    (schedule,), embedding = gpu.make_schedules([optimizer], own), lm.get_input_embeddings()
    lm.generation_config.eos_token_id = [i for word, i in tokenizer.get_vocab().items() if word[0] == "="]
    for step in tqdm(range(args.csft_steps), desc="CSFT", disable=None, leave=False):
        examples = task.order(step * args.csft_batch, args.csft_batch, f"CSFT {args.seed}")
        for e in [e for e in examples if e.id not in known]:
            rows = [*({i: 1.0} for i in e.ids), *targets([number(trace.split()) for trace in traces(e.prompt)], args)]
            known[e.id] = torch.tensor([[row.get(v, 0.0) for v in range(lm.config.vocab_size)] for row in rows])
        target, first = torch.stack([known[e.id] for e in examples]).to(embedding.weight), len(examples[0].ids)
        logits = lm(inputs_embeds=target[:, :-1] @ embedding.weight, use_cache=False).logits[:, first - 1 :]
        csft_loss(target[:, first:], logits).sum(1).mean().backward()
        gpu.clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if run.stop:
            raise UserError("stopped during CSFT: nothing is lost but that; start again")


def start(task, tokenizer, args, run, warm):
    """args of the model that the rollouts begin with. On MNNS the tiny model's way there is CSFT: the first process makes it,
    and puts it in the run folder, whole or not at all, where a resumed run finds it."""
    from dataclasses import replace

    from common import export, gpu, models, whole_folder
    from common.worlds import tiny

    if task.name != "mnns" or args.model not in tiny.SHAPES:
        return args
    folder = gpu.gather_objects(run.dir)[0] / "csft"
    if not (args.resume and folder.is_dir()):
        policy = models.load(replace(args, lora_rank=0), gpu.device(), warm=warm, fresh=True)
        if run.main:
            stage(policy, task, tokenizer, args, run)
            with whole_folder(folder, "the model behind CSFT") as scratch:
                export.write_weights(policy.lm, export.full_weights(policy), scratch)
                tokenizer.save_pretrained(scratch)
        gpu.gather_objects(None)  # the others wait for the folder
    return replace(args, model=str(folder))


def make_engine(policy, tokenizer, args):
    """The engine that feeds thoughts, or by --traces 1 tokens."""
    from common.thoughts import Thinker

    w = entries(policy.lm.config.vocab_size, args)
    return Thinker(policy, tokenizer, args, think, args.thoughts * (args.traces != 1), numbers=2 * w, m=2 * w)


def readings(engine, evaluate, args):
    """What evaluate(args) gives; where K divides logits, greedily by whole mixtures both without it and, as drawn, with it."""
    from dataclasses import replace

    found = evaluate(args)
    if engine.most and args.sampler == "mts" and args.ratio == "code":
        engine.args = replace(args, ratio="paper")
        whole = evaluate(replace(args, eval_samples=0))
        engine.args, found["greedy_divided"] = args, found["greedy_accuracy"]
        found |= whole
    return found


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    warm = worlds(args)
    args, config, device = settings.prepare(__file__, args, warm)
    tokenizer = models.load_tokenizer(args, warm, fresh=args.task == "mnns")
    task = mnns(args) if args.task == "mnns" else tasks.load(args.task, reward=args.reward)
    task = tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt)
    context = models.check_context(config, task, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.beta > 0))
    begin = start(task, tokenizer, args, run, warm)
    policy = gpu.shard(models.load(begin, device))
    reference = gpu.shard(models.load(begin, device, trainable=False)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = make_engine(policy, tokenizer, args)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return readings(engine, lambda changed: rollout.evaluate(engine, scorer, tokenizer, task, changed), args)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
        engine.attach(batch)
        engine.sleep()
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Log-probs of the policy that sampled, and of the reference.
        batch.old_logp, _ = read(policy, batch, args, how=replay)
        batch.ref_logp = read(reference, batch, args, how=replay)[0] if reference else None
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
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **replay(mb, args))
                objective, stats = surrogate(logp, mb.old_logp, mb.adv, mb.trained, args)
                measure(meter, mb, logp, entropy, stats)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
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
