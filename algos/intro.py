"""InTRO: In-Token Rationality Optimization. Zhu, Liu, Fu, Wang and Zhang, "In-Token Rationality Optimization: Towards Accurate
and Concise LLM Reasoning via Self-Feedback", arXiv 2511.09865 (2025).

Idea: read every right completion again behind a prompt that tells the answer, and let each of its tokens count by how much
likelier the same model finds it there. A few other tokens are weighed at every position as well, so that what was not written
teaches, too. Wrong completions are dropped.

Objective, to be maximised (equation numbers not at hand; no code is public), over the N right completions z of a rollout:
    J = 1/N sum_z 1/|z| sum_t 1/n sum_i w_ti log pi(z_ti | x, z_<t),   z_t1 = z_t,   z_t2 to z_tn drawn from pi(. | x, z_<t)
    w_ti = clip(pi(z_ti | x + y, z_<t) / pi(z_ti | x, z_<t), 0, cap), a constant;   x + y: the prompt x, told the answer y
    --exact: J = 1/N sum_z 1/|z| sum_t sum_v pi(v | x + y, z_<t) log pi(v | x, z_<t), the first factor a constant

For a draw, the gradient is in the mean that of --exact, but for the cap. A written token is such a draw only while pi is what
wrote it: one update a rollout, so minibatches is 1 by default; --minibatches, --epochs and --stale work as elsewhere, without a
correction. A rollout without a right completion makes no update. --weights ones with --candidates 1 is RAFT. How the answer is
told stands in the paper's appendix, which was not at hand: --hint-template is ours. With --hint wrong another answer is told:
what helps even then is being told, and not what.

Family: supervised
Differs from grpo.py in: advantages, surrogate, candidates, correction, likelihood, prepared, read_twice, train
World: sum_text, sums, hinted, hints
Measures: seen, measure
Costs: one more forward pass, without gradient, over the right completions; neither a critic nor a reference.
Run:   python algos/intro.py                                    tiny model, CPU, about a minute
       python algos/intro.py --weights ones --candidates 1      RAFT
       python algos/intro.py --model qwen2.5-1.5b               GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/intro.py --model qwen2.5-7b --task math
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

    # InTRO
    limits = dict(
        candidates="1 <= x", cap="0 < x", format_reward="0 <= x <= 0: a completion is right, or it is dropped",
    )  # fmt: skip
    tiny_preset = dict(
        task="addition", steps=60, minibatches=1, max_new_tokens=48, eval_every=10, hint_template="({answer}){prompt}",
    )  # fmt: skip
    real_preset = dict(group_size=4, minibatches=1, lr=5e-7, hint_template="{prompt}\n\nThe answer is {answer}.")
    candidates: int = 5
    """n, tokens weighed at every position: the one that was written, the others drawn from the policy (the paper)"""
    cap: float = 200.0
    """w's largest value (the paper)"""
    exact: bool = False
    """whole distributions in place of candidates (ours); --candidates, --cap and --weights then change no update"""
    weights: Literal["teacher", "ones"] = "teacher"
    """what a candidate counts: w, or 1 (ours, for RAFT)"""
    hint: Literal["right", "wrong"] = "right"
    """which answer is told: the right one; or 10 more, where it is an integer, else another prompt's (ours, a control)"""
    hint_template: str | None = None
    """format string with the fields {prompt} and {answer}, applied before --prompt-template (ours)"""


# ---------------------------------------------------------------- the objective


def candidates(given, logits):
    """given [m, n]: a written token, then uniform numbers; logits [m, V] -> ids [m, n]: the token, then draws by numbers."""
    cdf = logits.detach().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cdf, given[:, 1:].to(cdf.dtype) * cdf[:, -1:], right=True)
    return torch.cat([given[:, :1].long(), drawn.minimum((cdf < cdf[:, -1:]).sum(1, keepdim=True))], 1)


def correction(teacher_logp, logp, args):
    """Log-probs of the same tokens, told the answer and not, of any shape -> their w."""
    return (teacher_logp - logp).exp().clamp(max=args.cap).detach()


def likelihood(given, logits, teacher_logits, args):
    """given [m, n], logits [m, V] each -> J's innermost sums [m], log-probs of the written tokens [m], what is logged."""
    logp, teacher_logp = logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    ids = candidates(given, logits)
    own = logp.gather(1, ids)
    w = correction(teacher_logp.gather(1, ids), own, args)
    sampled = (own if args.weights == "ones" else w * own).mean(1)
    objective = (teacher_logp.exp() * logp).sum(1) if args.exact else sampled
    return objective, own[:, 0], *seen(logp, teacher_logp, w, args)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over a completion's tokens, then over completions; empty completions do not count."""
    lengths = mask.sum(1, keepdim=True)
    return mask / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def prepared(batch, told_ids, args, step):
    """Lets right completions alone be trained on, and gives every position its own numbers, functions of row and position ->
    which are right [B], None where none is on any rank; and the same completions behind prompts that tell the answer."""
    from common import gpu
    from common.batch import collate

    T, right = batch.mask.shape[1], batch.accuracy >= 1
    batch.adv, batch.trained = right.float()[:, None].expand_as(batch.old_logp), batch.mask & right[:, None]
    seeds = [gpu.hash_seed(args.seed, step, gpu.rank() * len(right) + i, 23) for i in range(len(right))]
    chance = [torch.Generator().manual_seed(seed) for seed in seeds]
    numbers = torch.stack([torch.rand(args.max_new_tokens, args.candidates - 1, generator=g)[:T] for g in chance])
    written = batch.ids[:, -T:]
    batch.columns["given"] = torch.cat([written[:, :, None].float(), numbers.to(written.device)], 2)
    rows = [(told_ids[i], y[m].tolist()) for i, y, m in zip(batch.prompt_id.tolist(), written, batch.mask)]
    return right if gpu.total(right.sum().item()) else None, collate(rows, device=written.device)


def read_twice(policy, mb, told, args):
    """A micro-batch, and its completions behind prompts that tell the answer -> what likelihood() gives, [b, T] each."""
    with torch.no_grad():
        states = policy(told.ids, told.attention_mask, mb.mask, states=True)
    how = dict(read=lambda *x: likelihood(*x, args), beside=[(policy, states)], given=mb.columns["given"])
    return policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **how)


# ---------------------------------------------------------------- what is only looked at


def seen(logp, teacher_logp, w, args):
    """[m, V], [m, V], [m, n] -> [m] each: entropy; w of the written token; of the candidates its mean, its maximum, the share
    at the cap and above 1; KL(teacher, policy)."""
    logp = logp.detach()
    entropy, kl = -(logp.exp() * logp).sum(1), (teacher_logp.exp() * (teacher_logp - logp)).sum(1)
    return entropy, w[:, 0], w.mean(1), w.amax(1), (w >= args.cap).float().mean(1), (w > 1).float().mean(1), kl


def measure(meter, batch, mb, found, tokenizer):
    """What seen() found behind the entropy -> what is logged of every token; and of the written ones' w, at the first token, at
    those of the answer, where it stands last, and elsewhere."""
    w, mean, most, capped, above, kl = found
    ids, answer = mb.ids[:, -mb.mask.shape[1] :], torch.zeros_like(mb.mask)
    pieces = {t: tokenizer.decode([t], skip_special_tokens=True) for t in ids.unique().tolist()}
    for i, row in enumerate(ids.tolist()):
        said, end = mb.answers[i] or "\0", 0
        start = "".join(map(pieces.get, row)).rfind(said)
        for t, token in enumerate(row if start >= 0 else ()):
            end += len(pieces[token])
            answer[i, t] = end - len(pieces[token]) < start + len(said) and end > start
    first, rest = mb.trained & (mb.mask.cumsum(1) == 1), mb.trained & (mb.mask.cumsum(1) > 1)
    for name, where in dict(first=first, answer=rest & answer, elsewhere=rest & ~answer).items():
        meter.add({f"w_{name}": w}, where)
    meter.add(dict(right_length=mb.mask.sum(1, keepdim=True).float().expand_as(w)), first)
    meter.add(dict(kept=batch.adv[:, 0]), torch.ones_like(batch.adv[:, 0]).bool())
    if mb.mask.any():  # for samples.jsonl
        batch.columns.setdefault("w", torch.zeros_like(batch.old_logp))[mb.row, : w.shape[1]] = w
    return dict(w=mean, w_max=most, w_capped=capped, w_above_1=above, teacher_kl=kl)


# ---------------------------------------------------------------- the world: sums by guess and by column; prompts that tell


def sum_text(rng, prompt, slip=0.15, ways=("guess", "guess", "careful", "verbose")):
    """A guess states a number at once, mostly a wrong one; the other ways add column by column. The verbose one states each
    column twice and slips, by one too much, twice as often. What follows a slip goes on from it."""
    way, (a, b) = rng.choice(ways), prompt.rstrip("=").split("+")
    if way == "guess":
        off = 0 if rng.random() < 0.1 else rng.choice((-20, -11, -10, -2, -1, 1, 2, 10, 11, 12, 20, 21, 22))
        return f":{max(0, int(a) + int(b) + off)}"
    carry, columns, total, times = 0, [], 0, 1 + (way == "verbose")
    for i, (x, y) in enumerate(zip(reversed(a), reversed(b))):
        column, before = int(x) + int(y) + carry, f"+{carry}" if i else ""
        for _ in range(times):
            column += rng.random() < slip * times
            columns.append(f"{x}+{y}{before}={column:02d}")
        total, carry = total + column % 10 * 10**i, column // 10
    return f"{' '.join(columns)}:{total + carry * 10 ** len(a)}"


def sums(args):
    """addition for the tiny model's warm start; also told an answer, the one that this very text ends with, right or wrong."""
    import random
    from dataclasses import replace

    from common import UserError, tasks
    from common.worlds import tiny

    if args.model not in tiny.SHAPES:
        return None
    if args.task not in ("addition", "addition:2"):
        raise UserError(f"--task {args.task}: the tiny model knows what an answer means in addition alone; give --model")
    task, rng = tasks.load("addition"), random.Random(0)
    texts = {e.id + 10**6: sum_text(rng, e.prompt) for e in task.train}
    told = [replace(e, id=i, answer=text.rpartition(":")[2]) for e, (i, text) in zip(task.train, texts.items())]

    def demonstrate(rng, example, careful):
        return texts.get(example.id) or sum_text(rng, example.prompt, *(int(careful) * [0.0, ("careful", "verbose")]))

    recipe = dict(steps=1000, careful_steps=600, careful=0.0, batch=32, lr=4e-3)
    told = hinted(replace(task, train=told), replace(args, hint="right")).train
    return replace(task, shown=told, demonstrate=demonstrate, recipe=recipe)


def hinted(task, args):
    """The Task of task.train's prompts, told the answer: what follows the last ####, else the last box, else all of it."""
    from dataclasses import replace

    from common import UserError
    from common.answers import extract

    answers, template = [e.answer if isinstance(e.answer, str) else e.answer[0] for e in task.train], args.hint_template
    boxes = [extract(x) if "\\boxed" in x or "\\fbox" in x else None for x in answers]
    answers = [(x.rpartition("####")[2] if "####" in x else box or x).strip() for x, box in zip(answers, boxes)]
    if args.hint == "wrong":
        before = dict(zip(others := list(dict.fromkeys(answers)), others[-1:] + others))
        answers = [str(int(x) + 10) if x.isdecimal() else before[x] for x in answers]

    def tell(prompt, answer):
        if isinstance(prompt, str):
            return template.format(prompt=prompt, answer=answer)
        return [*prompt[:-1], prompt[-1] | dict(content=tell(prompt[-1]["content"], answer))]

    try:
        if tell("1", "") == tell("2", "") or tell("", "1") == tell("", "2"):
            raise ValueError(repr(template))
    except (AttributeError, LookupError, ValueError) as error:
        raise UserError(f"--hint-template needs the fields {{prompt}} and {{answer}} and no other ({error})") from None
    return replace(task, train=[replace(e, prompt=tell(e.prompt, a)) for e, a in zip(task.train, answers)], test=[], shown=[])


def hints(task, tokenizer, config, args):
    """-> {an example's id: token ids of its prompt, told the answer}, and the positions that the longest needs of all."""
    from common import models, tasks

    told = tasks.encode(hinted(task, args), tokenizer, args.prompt_template, args.system_prompt)
    return {e.id: e.ids for e in told.train}, max(models.check_context(config, some, args) for some in (task, told))


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    warm = sums(args)
    tokenizer = models.load_tokenizer(args, warm)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    told_ids, context = hints(task, tokenizer, config, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(args.beta > 0))
    policy = gpu.shard(models.load(args, device, warm=warm))
    reference = gpu.shard(models.load(args, device, trainable=False, warm=warm)) if args.beta > 0 else None
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return rollout.evaluate(engine, scorer, tokenizer, task, args)

    for step in run.steps(policy, optimizer, evaluate):
        # Rollout: P prompts over all processes, G completions each.
        engine.wake()
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        batch = rollout.collect(engine, scorer, tokenizer, prompts, args, step + len(run.queue))
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

        # Right completions alone are trained on, and read once more behind prompts that tell the answer.
        right, told = prepared(batch, told_ids, args, step)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        for rows, weights in minibatches(batch, args, step, token_weights, keep=right):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                objective, logp, entropy, *found = read_twice(policy, mb, told.take(mb.row), args)
                stats = measure(meter, batch, mb, found, tokenizer)
                if reference:
                    stats["ref_kl"] = kl_penalty(logp, mb.ref_logp, mb.trained)
                    objective = objective - args.beta * stats["ref_kl"]
                micro_loss = -(objective * mb.weights)[mb.trained].sum()
                micro_loss.backward()
                loss += micro_loss.item()
                meter.add(stats | rollout.diagnostics(logp, mb, entropy), mb.trained)
            grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
            if right is not None and run.finite(gpu.total(loss), grad_norm):
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
