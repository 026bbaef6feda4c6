"""OPSD: On-Policy Self-Distillation. Zhao, Xie, Liu, Huang, Pang, Chen and Grover, "Self-Distilled Reasoner: On-Policy
Self-Distillation for Large Language Models", arXiv 2601.18734 (2026).

Idea: let a model that is shown the reference solution teach the same model that is not, token by token, on what the latter
wrote. The teacher's next-token distribution replaces the reward: one completion per prompt is enough, right or wrong. Only
the student samples, and its prompt never holds the solution.

Objective, to be minimised (equation numbers not at hand), over all N tokens of the completions y that the student wrote:
    L = 1/N sum_n sum_v min(l_nv, c),   q = pi_start(. | x + y*, y_<n), a constant;   p = pi(. | x, y_<n);   m = (p + q) / 2
    --divergence forward: l = q log(q / p);   reverse: l = p log(p / q);   jsd: l = q/2 log(q / m) + p/2 log(p / m)
    --divergence sampled: L = -1/N sum_n log p(y_n) sg[log q(y_n) - log p(y_n)], without c

x + y*: the prompt x and its whole reference solution. In the official code beta 0 is forward, 0.5 is jsd, 1 is reverse; other
libraries count the other way. c (--entry-clip) is off here; the later official code has 0.05. It cuts the entries that the
teacher wants most, which then teach nothing while all others still do: the student can move away from the teacher. The paper
samples at temperature 1.1 with top-p and top-k; here both models are read at the temperature that is sampled at. How the
solution is shown is ours (--hint-template). No reward is in L: --reward is what is logged. Where vLLM samples, old log-probs
correct for it; else they are only looked at.

Family: latent
Differs from grpo.py in: advantages, surrogate, entries, divergence, retold, read_twice, train
Same as spo.py: token_weights
World: sums, hinted, hints
Measures: seen, measure, compared
Costs: one more forward pass, without gradient, over all completions, and a frozen copy of the start, which beta > 0 shares;
    with --teacher live no copy. No group, and no critic.
Run:   python algos/opsd.py                                    tiny model, CPU, about a minute
       python algos/opsd.py --hint none --teacher live         the control: the teacher is the student, the loss 0
       python algos/opsd.py --steps 0 --run-dir runs/start     the start, for: algos/grpo.py --task addition --model runs/start
       python algos/opsd.py --model qwen2.5-1.5b               GSM8K on one GPU
       torchrun --nproc-per-node 8 algos/opsd.py --model qwen2.5-7b --task math
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

    # OPSD
    limits = dict(format_reward="0 <= x <= 0: no reward is learnt from")
    tiny_preset = dict(
        task="addition", steps=200, group_size=1, minibatches=1, lr=3e-4, hint_template="({solution}){prompt}",
    )  # fmt: skip
    real_preset = dict(
        prompts_per_step=32, group_size=1, minibatches=1,
        hint_template="{prompt}\n\nA reference solution:\n<solution>\n{solution}\n</solution>\nUnderstand it. Then derive "
                      "the answer yourself, in your own words.",
    )  # fmt: skip
    divergence: Literal["forward", "jsd", "reverse", "sampled"] = "forward"
    """KL(teacher, student), the best in the paper; of both to their mean; KL(student, teacher); that of written tokens alone"""
    entry_clip: float = 0.0
    """c, the most that an entry of the vocabulary may add (0.05 in the later official code); 0: off (the earlier code)"""
    teacher: Literal["fixed", "live"] = "fixed"
    """the frozen start (the paper), or the weights of now"""
    hint: Literal["right", "wrong", "none"] = "right"
    """what the teacher is shown: the solution; 10 more where it is an integer, else another's; nothing (ours: controls)"""
    hint_template: str | None = None
    """format string with the fields {prompt} and {solution}, applied before --prompt-template (ours)"""


# ---------------------------------------------------------------- the objective


def entries(logp, told_logp, args):
    """Log-probs of all tokens by student and teacher, [m, V] each -> l [m, V]."""
    if args.divergence == "forward":
        return told_logp.exp() * (told_logp - logp)
    if args.divergence == "jsd":
        middle = torch.logaddexp(logp, told_logp) - 0.6931471805599453  # log m, by log 2
        return (told_logp.exp() * (told_logp - middle) + logp.exp() * (logp - middle)) / 2
    return logp.exp() * (logp - told_logp)


def divergence(targets, logits, told_logits, args):
    """targets [m], logits [m, V] each -> the terms of -L [m], log-probs of the written tokens [m], and what is logged."""
    logp, told_logp = logits.log_softmax(-1), told_logits.detach().log_softmax(-1)
    own, told = (x.gather(1, targets[:, None])[:, 0] for x in (logp, told_logp))
    whole = entries(logp, told_logp, args)
    cut = whole.clamp(max=args.entry_clip) if args.entry_clip else whole  # each entry, not their sum
    objective = (told - own).detach() * own if args.divergence == "sampled" else -cut.sum(1)
    return objective, own, *seen(logp, told_logp, whole, cut)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the minibatch that are trained on."""
    return mask / mask.sum().clamp(min=1)


def kl_penalty(logp, ref_logp, mask):
    """[B, T] -> [B, T]: the k3 estimate of KL(pi, pi_ref), never negative. Eq. 4 of arXiv 2402.03300."""
    log_ratio = (ref_logp - logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    return log_ratio.exp() - log_ratio - 1


def retold(batch, told_ids):
    """Lets all completions count alike -> the same, token for token, behind the teacher's prompts."""
    from common.batch import collate

    batch.adv = torch.ones_like(batch.old_logp)
    rows = zip(batch.prompt_id.tolist(), batch.ids[:, -batch.mask.shape[1] :], batch.mask)
    return collate([(told_ids[i], y[m].tolist()) for i, y, m in rows], device=batch.ids.device)


def read_twice(policy, teacher, mb, told, args):
    """A micro-batch, and its completions behind the teacher's prompts -> what divergence() gives, [b, T] each."""
    with torch.no_grad():
        states = teacher(told.ids, told.attention_mask, mb.mask, states=True)
    how = dict(read=lambda *x: divergence(*x, args), beside=[(teacher, states)])
    return policy(mb.ids, mb.attention_mask, mb.mask, args.temperature, **how)


# ---------------------------------------------------------------- what is only looked at


def seen(logp, told_logp, whole, cut):
    """[m, V] each -> [m] each: entropy; KL(teacher, student), never clipped; the share of the positive entries that c cuts."""
    logp, above = logp.detach(), whole.detach().clamp(min=0).sum(1)
    entropy, kl = -(logp.exp() * logp).sum(1), (told_logp.exp() * (told_logp - logp)).sum(1)
    return entropy, kl, (whole - cut).detach().sum(1) / above.clamp(min=1e-30)


def measure(meter, mb, found, args):
    """What seen() found behind the entropy -> what is logged of every token; KL also of first tokens alone; and leakage, the
    share of completions that begin with the words before the solution in the teacher's prompt."""
    kl, cut = found
    first = mb.trained & (mb.mask.cumsum(1) == 1)
    mark = args.hint_template.partition("{solution}")[0].rpartition("}")[2].strip().rpartition("\n")[2]
    leaks = torch.tensor([bool(mark) and text.strip().startswith(mark) for text in mb.texts], device=kl.device)
    meter.add(dict(teacher_kl_first=kl, leakage=leaks[:, None].expand_as(kl).float()), first)
    return dict(teacher_kl=kl, clipped_mass=cut)


def compared(run, task, told, evaluate):
    """evaluate(task); before the first step also how the same weights, which are the teacher, fare behind its prompts."""
    from common import gpu

    out = evaluate(task)
    if run.state["step"] == 0:
        teacher = evaluate(told)["greedy_accuracy"]
        out |= dict(teacher_accuracy=teacher, teacher_gain=teacher - out["greedy_accuracy"])
        if out["teacher_gain"] < 0.4 and gpu.rank() == 0:
            print(f"note: what the teacher is shown changes its accuracy by {out['teacher_gain']:.2f} only", flush=True)
    return out


# ---------------------------------------------------------------- the world: sums, mostly guessed; prompts that hold the answer


def sums(args):
    """addition for the tiny model's warm start: half of it as it is, mostly guessed; half behind prompts that hold the sum,
    added column by column."""
    from dataclasses import replace

    from common import UserError, tasks
    from common.worlds import tiny

    if args.model not in tiny.SHAPES:
        return None
    if args.task not in ("addition", "addition:2"):
        raise UserError(f"--task {args.task}: the tiny model knows what a solution is in addition alone; give --model")
    task = tasks.load("addition")
    plain = {e.id + 10**6: e for e in task.train}
    told = hinted(replace(task, train=[replace(e, id=i) for i, e in plain.items()]), replace(args, hint="right")).train

    def demonstrate(rng, example, careful):
        return task.demonstrate(rng, plain.get(example.id, example), 1.0 if example.id in plain else careful)

    return replace(task, shown=told, demonstrate=demonstrate, recipe=dict(steps=500, careful_steps=350, careful=0.2))


def hinted(task, args):
    """The Task of the teacher's prompts: each holds its example's whole solution."""
    from dataclasses import replace

    from common import UserError

    def tell(prompt, solution, template):
        if isinstance(prompt, str):
            return template.format(prompt=prompt, solution=solution)
        return [*prompt[:-1], prompt[-1] | dict(content=tell(prompt[-1]["content"], solution, template))]

    def told(examples):
        said = [e.answer if isinstance(e.answer, str) else e.answer[0] for e in examples]
        if args.hint == "wrong":
            before = dict(zip(others := list(dict.fromkeys(said)), others[-1:] + others))
            said = [str(int(x) + 10) if x.isdecimal() else before[x] for x in said]
        template = "{prompt}" if args.hint == "none" else args.hint_template
        return [replace(e, prompt=tell(e.prompt, x, template)) for e, x in zip(examples, said)]

    try:
        a, b, c, d = (tell(*pair, args.hint_template) for pair in (("1", ""), ("2", ""), ("", "1"), ("", "2")))
        if a == b or c == d:
            raise ValueError(repr(args.hint_template))
    except (AttributeError, LookupError, ValueError) as error:
        raise UserError(f"--hint-template needs the fields {{prompt}} and {{solution}} and no other ({error})") from None
    return replace(task, train=told(task.train), test=told(task.test), shown=[])


def hints(task, tokenizer, config, args):
    """-> the Task of the teacher's prompts, {an example's id: their token ids}, the positions that the longest needs of all."""
    from common import models, tasks

    told = tasks.encode(hinted(task, args), tokenizer, args.prompt_template, args.system_prompt)
    return told, {e.id: e.ids for e in told.train}, max(models.check_context(config, some, args) for some in (task, told))


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import engines, gpu, models, rewards, rollout, runlog, settings, tasks
    from common.batch import Meter, minibatches, read

    args, config, device = settings.prepare(__file__, args)
    warm, frozen = sums(args), args.beta > 0 or args.teacher == "fixed"
    tokenizer = models.load_tokenizer(args, warm)
    task = tasks.load(args.task, tokenizer, args.prompt_template, args.system_prompt, args.reward)
    told, told_ids, context = hints(task, tokenizer, config, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=int(frozen))
    policy = gpu.shard(models.load(args, device, warm=warm))
    begin = gpu.shard(models.load(args, device, trainable=False, warm=warm)) if frozen else None
    reference, teacher = begin if args.beta > 0 else None, begin if args.teacher == "fixed" else policy
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    scorer = rewards.Scorer(task.check, inline=task.inline)

    def evaluate():
        return compared(run, task, told, lambda some: rollout.evaluate(engine, scorer, tokenizer, some, args))

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

        # The teacher reads the same completions, right and wrong ones, behind prompts of its own.
        shown = retold(batch, told_ids)

        # Update: the weights of a minibatch are fixed before it is cut into micro-batches.
        meter = Meter()
        meter.note(staleness=step - batch.policy_version[0].item())
        for rows, weights in minibatches(batch, args, step, token_weights):
            batch.weights, loss = weights, 0.0
            for mb in batch.micro_batches(rows, args.micro_batch_tokens):
                objective, logp, entropy, *found = read_twice(policy, teacher, mb, shown.take(mb.row), args)
                stats = measure(meter, mb, found, args)
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
