"""Training-Free GRPO. Youtu-Agent Team (Tencent), "Training-Free Group Relative Policy Optimization", arXiv 2510.08191 (2025).

Idea: keep the model frozen, and learn a short list of experiences, in plain words, that stands in its prompt. Groups of
attempts are sampled and scored as in GRPO; where a group has right and wrong ones, a critic says in words what made the
difference, and that is the advantage. These texts edit the list: this takes the place of the gradient step.

What is learnt (equation numbers not at hand); q: question, E = {id: text}: the library, pi: the frozen model:
    o_1 .. o_G ~ pi(. | q, E),   R_i in [0, 1];   a question teaches where 0 < mean R < 1
    s_i = pi(retell o_i | q, R_i, E),   A = pi(compare s_1 .. s_G | q, R, E): one operation, add a text or modify one
    E' = merged(E + adds, modifies), by one more call: its plan modifies texts, and merges several into one; ids G0, G1, ...

This is the algorithm of the paper's own branch. The later rewrite of the code has other operations (update, delete), and asks
once more for each question; here, as in the paper, a text leaves only by a merge. All advice is asked for at temperature 0.
What cannot be read as JSON is dropped: the operation of a question, or, after three tries, the merge, and what was added then
stays. Ours: the caps on lines and words. Not built: learning without right answers. The paper samples with top-p 0.95 where it
evaluates, here there is none.

The tiny model follows what it reads, and has not been told which of 36 environments it is in. It writes poor advice: its critic
is a rule that counts words and replies in the same JSON. A line of the library has one vote, a proposal one, and a step's votes
are forgotten behind it: since the model obeys a line in seven of ten cases, groups contradict a wrong one, and it leaves.

Family: supervised
Differs from grpo.py in: task, minibatches, epochs, stale, lr, warmup_steps, lr_schedule, weight_decay, max_grad_norm, beta,
    temperature, format_reward, tis_cap, tis_level, eval_prompts, eval_samples, eval_temperature, push_to_hub, optimizer,
    lora_rank, lora_alpha, lora_targets, gradient_checkpointing, micro_batch_tokens, advantages, surrogate, token_weights,
    kl_penalty, teaching, parsed, proposed, revised, renumbered, updated, listed, with_library, summary_prompt,
    critique_prompt, merge_prompt, by_model, by_rule, here, served, started, attempts, train
World: Rules, rules
Measures: held_out, show, learnt
Costs: no gradient, no optimizer, no weights in a checkpoint. A step asks the model P G times; with --critic model once more for
       every attempt at a question that teaches, once for each such question, and up to three times for the merge.
Run:   python algos/training_free_grpo.py                       tiny model, CPU, about a minute
       python algos/training_free_grpo.py --model qwen2.5-7b-instruct               GSM8K on one GPU
       OPENAI_API_KEY=... python algos/training_free_grpo.py --api-base http://host:8000/v1 --api-model NAME
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
    """rules (the tiny model's), gsm8k, math, reasoning_gym:<name>, countdown[:n], ..., a .jsonl file; None: preset"""
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
    max_new_tokens: int | None = None
    """longest completion; a longer one is cut and counts as wrong"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    temperature: float = 0.7
    """of the attempts (the paper)"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
    eval_every: int | None = None
    """steps between greedy evaluations; 0: only before and after"""
    eval_prompts: int = 48
    """held-out prompts, at most"""
    eval_samples: int = 16
    """also samples N completions of each: avg@N (their mean) and pass@N (whether one is right); 0: the greedy one only"""
    eval_temperature: float = 0.3
    """temperature of these samples (the paper, with top-p 0.95; here without)"""
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
    """of weights and gradients"""

    # Training-Free GRPO
    limits = dict(
        group_size="1 <= x", problems="1 <= x", max_operations="1 <= x", max_experiences="1 <= x", max_words="1 <= x",
        critic_tokens="1 <= x", tries="1 <= x", eval_samples="1 <= x", api_timeout="0 < x", api_jobs="1 <= x",
    )  # fmt: skip
    tiny_preset = dict(
        task="rules", steps=4, prompts_per_step=32, group_size=5, max_new_tokens=16, eval_every=1, checkpoint_every=1,
        critic="rule", transfer="sub inc one", critic_tokens=16,
    )  # fmt: skip
    real_preset = dict(
        task="gsm8k", steps=3, prompts_per_step=100, group_size=5, max_new_tokens=4096, eval_every=1, checkpoint_every=1,
        critic="model", critic_tokens=4096,
    )  # fmt: skip
    problems: int = 100
    """training questions, the first of the task's; they come again in every epoch (the paper)"""
    critic: Literal["rule", "model", "single"] | None = None
    """who writes advice: a rule that counts words (rules only), the model; single: that of the task, shown one attempt only"""
    library: str = "learned"
    """learned, none, random (rules only), or a file with a line for each experience, which then stays as it is"""
    transfer: str | None = None
    """a second task, or of rules a second environment, that the library is also measured on"""
    environment: str = "max keep two"
    """of rules: one word of add, sub, max, mul, one of keep, inc, neg, one of one, two, pad"""
    max_operations: int = 1
    """operations of one question that count (the branch)"""
    max_experiences: int = 50
    """lines of the library at most; the oldest leave (ours)"""
    max_words: int = 32
    """words of a line that are asked for (the paper); a line is cut at twice as many (ours)"""
    critic_tokens: int | None = None
    """longest summary, critique and merge (ours; the branch: 16384)"""
    tries: int = 3
    """of a request that failed, and of a merge that cannot be read (the paper)"""
    api_base: str | None = None
    """a server that speaks OpenAI's protocol, in place of --model; its key is read from $OPENAI_API_KEY"""
    api_model: str = "default"
    """the name of the model there"""
    api_timeout: float = 600.0
    """seconds for an answer (ours)"""
    api_jobs: int = 16
    """requests at a time (ours)"""


# ---------------------------------------------------------------- the objective: texts in place of numbers


def teaching(groups, args):
    """A step's questions -> those that have an advantage: 0 < mean reward < 1 over the attempts that were answered."""
    out = []
    for group in groups:
        answered = [(text, reward) for text, reward in zip(group["texts"], group["rewards"]) if text is not None]
        texts, rewards = zip(*answered) if answered else ((), ())
        if texts and (args.group_size == 1 or 0 < sum(rewards) < len(rewards)):
            out.append(group | dict(texts=texts, rewards=rewards))
    return out


def parsed(reply):
    """A critic's reply -> [dict(option, experience, ids)]; None where it is no JSON. Without a fence all of it is read."""
    import json

    try:
        found = json.loads(reply.rpartition("```json")[2].partition("```")[0] if "```json" in reply else reply)
    except (ValueError, RecursionError):
        return None
    out = []
    for op in [op for op in (found if isinstance(found, list) else [found]) if isinstance(op, dict)]:
        text, ids = op.get("experience"), op.get("merged_from", op.get("modified_from"))
        ids = [i.strip(" [].") for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, str)]
        if isinstance(text, str) and text.strip():
            out.append(dict(option=op.get("option"), experience=" ".join(text.split()), ids=ids))
    return out


def proposed(library, operations):
    """-> (candidates: the library and what is added, as C0, C1, ...; modifies: [(id, text)] of ids that are there)."""
    added = [op["experience"] for op in operations if op["option"] == "add"]
    modifies = [(i, op["experience"]) for op in operations if op["option"] == "modify" for i in op["ids"] if i in library]
    return library | {f"C{k}": text for k, text in enumerate(added)}, modifies


def revised(candidates, plan):
    """The candidates after a plan, in its order: a merge deletes its ids and appends its text as the next C."""
    library, new = dict(candidates), sum(i.startswith("C") for i in candidates)
    for op in plan:
        if op["option"] == "modify":
            library |= {i: op["experience"] for i in op["ids"] if i in library}
        elif op["option"] == "merge":
            library = {i: text for i, text in library.items() if i not in op["ids"]} | {f"C{new}": op["experience"]}
            new += 1
    return library


def renumbered(library, args):
    """The library with ids G0, G1, ..., inside its caps."""
    texts = [" ".join(text.split()[: 2 * args.max_words]) for text in library.values()]
    return {f"G{k}": text for k, text in enumerate(texts[-args.max_experiences :])}


def updated(library, groups, critic, editor, args):
    """One step of learning -> (the next library, counts, all that was said). critic(groups, library) -> a reply for each group;
    editor(candidates, modifies) -> one."""
    groups = teaching(groups, args) if args.library == "learned" else []
    if args.critic == "single":  # the first of the best alone
        places = [g["rewards"].index(max(g["rewards"])) for g in groups]
        groups = [g | {name: [g[name][k]] for name in ("texts", "rewards")} for g, k in zip(groups, places)]
    said = [dict(prompt=g["question"], critique=reply) for g, reply in zip(groups, critic(groups, library))]
    found = [parsed(row["critique"]) for row in said]
    operations = [op for ops in found for op in (ops or [])[: args.max_operations]]
    candidates, modifies = proposed(library, operations)
    plan = None
    while operations and plan is None and len(said) < len(groups) + args.tries:
        said.append(dict(merge=editor(candidates, modifies)))
        plan = parsed(said[-1]["merge"])
    counts = dict(kept=len(groups), operations=len(operations), unparsed=found.count(None), merges=len(said) - len(groups))
    return renumbered(revised(candidates, plan or []), args), counts, said


# ---------------------------------------------------------------- what is asked


def listed(library):
    return "\n".join(f"[{i}]. {text}" for i, text in library.items())


def with_library(problem, library):
    """Behind the problem the library; an empty one leaves no trace."""
    before = "Before you solve it, read these experiences carefully, and use those that help:"
    return f"{problem}\n\n{before}\n{listed(library)}" if library else problem


def summary_prompt(group, text, reward, library):
    return f"""Retell this attempt at a problem briefly, step by step: what each step does, which experiences it used (by id),
and, if its verdict is WRONG, the step that went astray and why.
Problem: {group["question"]}
Right answer: {group["gold"]}
Experiences in use:
{listed(library)}
{"RIGHT" if reward > 0.5 else "WRONG"}: {text}"""


def critique_prompt(group, notes, library, args):
    attempts = "\n".join(f"{'RIGHT' if r > 0.5 else 'WRONG'}: {text}" for text, r in zip(notes, group["rewards"]))
    return f"""Here are attempts at one problem, each with its verdict, and the experiences that were in use. What did the
RIGHT ones do that the WRONG ones did not, or what misled these? Make of it an experience for problems of this kind: general and
strategic, at most {args.max_words} words, without this problem's numbers or its answer.
Problem: {group["question"]}
Right answer: {group["gold"]}
Experiences in use:
{listed(library)}
{attempts}
Add it, or modify an experience that is there and nearly says it. Reply with a JSON list of at most {args.max_operations} of
these, or an empty list if there is nothing to learn:
```json
[{{"option": "add", "experience": "..."}}, {{"option": "modify", "modified_from": "id", "experience": "..."}}]
```"""


def merge_prompt(candidates, modifies, args):
    changes = "\n".join(f"[{i}]. {text}" for i, text in modifies)
    return f"""Here are experiences for a kind of problem, new ones among them (C), and changes to them, proposed by people
who saw one problem each. Make one good list of it: no two that say the same or contradict each other, each general and
strategic, of at most {args.max_words} words. What is said more often is more likely right.
Experiences:
{listed(candidates)}
Proposed changes:
{changes}
Reply with a JSON list of changes, of these two kinds; what it does not name stays as it is:
```json
[{{"option": "modify", "modified_from": "id", "experience": "..."}},
 {{"option": "merge", "merged_from": ["id", "id"], "experience": "..."}}]
```"""


def by_model(chat, warm, args, spent):
    """-> (critic, editor) as in updated(): the frozen model in three more roles. The tiny one cannot summarise, nor merge.
    `spent` counts."""

    def ask(prompts):
        asked = [[dict(role="user", content=prompt)] for prompt in prompts]
        replies = [row[0] for row in chat(asked, 1, 0.0, [args.seed] * len(asked), args.critic_tokens)]
        spent["critic_calls"] += len(asked)
        spent["critic_tokens"] += sum(tokens for _, tokens, _ in replies)
        return [text or "" for text, _, _ in replies]

    def critic(groups, library):
        each = [(group, *attempt) for group in groups for attempt in zip(group["texts"], group["rewards"])]
        short = [" ".join(filter(str.isalpha, text.split())) for _, text, _ in each]  # the words that the tiny one used
        told = iter(short if warm else ask([summary_prompt(*attempt, library) for attempt in each]))
        return ask([critique_prompt(g, [next(told) for _ in g["texts"]], library, args) for g in groups])

    return critic, by_rule()[1] if warm else lambda *proposals: ask([merge_prompt(*proposals, args)])[0]


def by_rule():
    """-> (critic, editor) as in updated(), for the words of rules: they count, and reply in the same JSON. The critic names the
    word whose share among the right attempts is furthest above that among the wrong ones; where they used the same words, none.
    The editor gives each slot the word with most votes; a proposal has one, and the line that is there, which wins a tie."""
    import json
    import random

    def advice(group, library):
        attempts = [(text.split(), reward > 0.5) for text, reward in zip(group["texts"], group["rewards"])]
        told = [[text for text, right in attempts if right == side] for side in (True, False)]
        right, wrong = ({w: sum(w in text for text in side) / max(1, len(side)) for w in sum(Rules.SLOTS, ())} for side in told)
        most = max(right[w] - wrong[w] for w in right)
        if most <= 0:
            return "[]"
        word = random.Random(repr(group["texts"])).choice([w for w in right if right[w] - wrong[w] == most])
        old = [i for i, text in library.items() for slot in Rules.SLOTS if text in slot and word in slot]
        op = dict(option="modify", modified_from=old[0]) if old else dict(option="add")
        return json.dumps([op | dict(experience=word)])

    def editor(candidates, modifies):
        plan = []
        for ids in ([i for i, text in candidates.items() if text in slot] for slot in Rules.SLOTS):
            votes = [candidates[i] for i in ids] + [text for i, text in modifies if i in ids]
            plan += [dict(option="merge", merged_from=ids, experience=max(votes, key=votes.count))] if ids else []
        return json.dumps(plan)

    return lambda groups, library: [advice(group, library) for group in groups], editor


# ---------------------------------------------------------------- who is asked


def here(args, config, device, task, warm):
    """-> (chat(conversations, n, temperature, seeds, most): for each conversation n replies (text or None, tokens, ended), of
    at most `most` tokens, by the model of args.model; what ends it)."""
    from common import encoding, engines, gpu, models, tasks

    tokenizer = models.load_tokenizer(args, warm=warm)
    needed = models.check_context(config, tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt), args)
    context = max(needed, min(16384, config.max_position_embeddings))
    policy = gpu.shard(models.load(args, device, trainable=False, warm=warm))
    engine = engines.make_engine(policy, tokenizer, args, context)

    def chat(conversations, n, temperature, seeds, most):
        prompts = encoding.prompt_ids(conversations, tokenizer, "a prompt")
        fit = [k for k, ids in enumerate(prompts) if len(ids) < context]  # a prompt that was cut would lose experiences
        budgets = [min(most, context - len(prompts[k])) for k in fit]
        out = engine.generate([prompts[k] for k in fit], n, budgets, temperature, [seeds[k] for k in fit])
        texts = tokenizer.batch_decode([ids for ids, _, _ in out], skip_special_tokens=True) if out else []
        rows = [(text, len(ids), ended) for text, (ids, _, ended) in zip(texts, out)]
        found = {k: rows[n * j : n * j + n] for j, k in enumerate(fit)}
        return [found.get(k, [(None, 0, False)] * n) for k in range(len(prompts))]

    return chat, engine.close


def served(args):
    """The same of a server. A reply is a request of its own, which fails alone; besides, many servers know no n."""
    import os
    import time
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import InferenceClient

    from common import UserError, gpu, reason

    if not args.api_base.startswith(("http://", "https://")) or gpu.world() > 1:
        raise UserError(f"--api-base {args.api_base}: needs http://host:port/v1 or the like, and one process")
    key = os.environ.get("OPENAI_API_KEY") or "none"  # without one the client would send the hub's token there
    client = InferenceClient(base_url=args.api_base, api_key=key, timeout=args.api_timeout)
    pool, told = ThreadPoolExecutor(args.api_jobs), set()

    def request(turns, temperature, seed, most):
        for attempt in range(args.tries):
            time.sleep(2**attempt - 1)
            try:
                how = dict(model=args.api_model, temperature=temperature, seed=seed, max_tokens=most)
                found = client.chat_completion(turns, **how)
                text, tokens = found.choices[0].message.content, found.usage.completion_tokens if found.usage else 0
                return text or "", tokens or 0, found.choices[0].finish_reason != "length"
            except Exception as error:  # the network's, the server's, a reply that is none
                why = reason(error)
        return None, why, False

    def chat(conversations, n, temperature, seeds, most):
        jobs = [(t, temperature, gpu.hash_seed(s, k) % 2**31, most) for t, s in zip(conversations, seeds) for k in range(n)]
        replies = list(pool.map(request, *zip(*jobs))) if jobs else []
        for why in {why for text, why, _ in replies if text is None} - told:
            print(f"note: {args.api_base}: {why}", file=sys.stderr, flush=True)
            told.add(why)
        replies = [reply if reply[0] is not None else (None, 0, False) for reply in replies]
        return [replies[i : i + n] for i in range(0, len(replies), n)]

    return chat, pool.shutdown


def started(args):
    """-> (the task, the second one or None, the tiny model's warm start or None, the library at the start)."""
    from common import UserError, gpu, tasks
    from common.worlds import tiny

    own, small = args.task == "rules", args.model in tiny.SHAPES and not args.api_base
    if not own and (small or args.critic == "rule" or args.library == "random"):
        raise UserError(f"--task {args.task}: the tiny model, --critic rule and --library random know the task rules alone")
    if args.library in ("learned", "none"):
        lines = []
    elif args.library == "random":
        lines = [slot[gpu.hash_seed(args.seed, k) % len(slot)] for k, slot in enumerate(Rules.SLOTS)]
    else:
        try:
            lines = Path(args.library).read_text(encoding="utf-8").splitlines()
            lines = [line.partition("]. ")[2] if line.startswith("[G") else line for line in lines]
        except (OSError, ValueError):
            raise UserError(f"--library {args.library}: is none of learned, none, random, and no file of lines") from None
    load = rules if own else lambda name, args: tasks.load(name, reward=args.reward)
    task, other = (load(name, args) if name else None for name in (args.environment if own else args.task, args.transfer))
    task.train = task.train[: args.problems]
    return task, other, task if own and small else None, {f"G{k}": line for k, line in enumerate(filter(None, lines))}


def attempts(chat, scorer, task, examples, library, n, temperature, seeds, args):
    """n attempts at each of these questions, with the library in the prompt, scored -> for each dict(id, question, gold, texts,
    answers, rewards, ended, tokens). One that was cut is wrong; one that was never answered, too, and its text is None."""
    from common import UserError, encoding

    first, asked = [dict(role="system", content=args.system_prompt)] if args.system_prompt else [], []
    for e in examples:
        turns = [dict(role="user", content=e.prompt)] if isinstance(e.prompt, str) else e.prompt
        template = args.prompt_template or (task.template if isinstance(e.prompt, str) else "{prompt}")
        content = with_library(encoding.fill(template, [turns[-1]["content"]])[0], library)
        asked.append([*first, *turns[:-1], turns[-1] | dict(content=content)])
    replies = [reply for row in chat(asked, n, temperature, seeds, args.max_new_tokens) for reply in row]
    if replies and all(text is None for text, _, _ in replies):
        raise UserError("not one question was answered: is the server there, and room for the prompts?")
    answers, scores = scorer([text or "" for text, _, _ in replies], [e.answer for e in examples for _ in range(n)])
    scores = [score * ended for score, (_, _, ended) in zip(scores, replies)]
    out = []
    for i, e in enumerate(examples):
        mine = slice(n * i, n * i + n)
        texts, tokens, ended = map(list, zip(*replies[mine]))
        question = e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"]
        group = dict(id=e.id, question=question, gold=e.answer, texts=texts, answers=answers[mine], rewards=scores[mine])
        out.append(group | dict(ended=ended, tokens=tokens))
    return out


def held_out(chat, scorers, library, args):
    """On held-out questions, over all ranks, with the library in the prompt: greedy accuracy; of N samples of each avg@N and
    pass@N; on the second task avg@N."""
    from common import gpu

    def scores(task, scorer, n, temperature):
        """[questions of this rank, n], and the number of all. The noise is the same at every evaluation."""
        examples = task.test[: args.eval_prompts]
        mine = range(gpu.rank(), len(examples), gpu.world())
        seeds = [gpu.hash_seed(args.seed, i, 13) for i in mine]
        groups = attempts(chat, scorer, task, [examples[i] for i in mine], library, n, temperature, seeds, args)
        return torch.tensor([g["rewards"] for g in groups], dtype=torch.float64).view(-1, n), len(examples)

    (greedy, prompts), n = scores(*scorers[0], 1, 0.0), args.eval_samples
    sampled, _ = scores(*scorers[0], n, args.eval_temperature)
    values = dict(greedy_accuracy=greedy.sum(), **{f"avg@{n}": sampled.mean(1).sum(), f"pass@{n}": sampled.amax(1).sum()})
    values = {name: gpu.total(value.item()) / prompts for name, value in values.items()}
    for task, scorer in scorers[1:]:
        found, of = scores(task, scorer, n, args.eval_temperature)
        values["transfer"] = gpu.total(found.mean(1).sum().item()) / of
    return values | dict(prompts=prompts)


def show(run, before, groups, counts, said):
    """Ends a step: its metrics; the library as text, in the run folder and on the terminal; into samples.jsonl the attempts at
    the first question, and all that was said of any. `before`: the library that they had."""
    import json

    library, step = run.state["library"], run.state["step"] + 1
    texts, rewards, ended, tokens = ([x for g in groups for x in g[name]] for name in ("texts", "rewards", "ended", "tokens"))
    values = dict(reward=rewards, truncated=[t is not None and not e for t, e in zip(texts, ended)], length=tokens)
    values |= dict(unanswered=[t is None for t in texts], informative_groups=[len(set(g["rewards"])) > 1 for g in groups])
    metrics = {name: sum(x) / len(x) for name, x in values.items()} | counts
    metrics |= dict(experiences=len(library), library_words=sum(len(text.split()) for text in library.values()))
    run.write(metrics, sum(tokens), dict(reward="reward", kept="taught", experiences="experiences"))
    if run.main:
        (run.dir / f"library-{step}.txt").write_text(listed(library) + "\n", encoding="utf-8")
        run.bar.write(
            "\n".join(f"             {line}" for line in listed(library).splitlines()) or "             no experience yet"
        )
        g = groups[0]
        shown = zip(g["texts"], g["answers"], g["rewards"], g["ended"])
        first = dict(prompt_id=g["id"], prompt=with_library(g["question"], before), right=g["gold"])
        rows = [dict(completion=text, answer=a, reward=r, truncated=not done) for text, a, r, done in shown]
        for row in [*(first | row for row in rows), *said]:
            run.samples.write(json.dumps(dict(step=step) | row) + "\n")


def learnt(run, args):
    """The last line of a run that learnt: None of one that was stopped, or evaluates only."""
    if not run.after or not run.state["step"]:
        return None
    library, name = list(run.state["library"].values()), f"avg@{args.eval_samples}"
    few = "; ".join(library) if len(library) < 6 else str(run.dir / f"library-{run.state['step']}.txt")
    change = f"{name} {run.state['before'][name]:.2f} -> {run.after[name]:.2f} on {run.after['prompts']} held-out prompts"
    return f"{change}, no weight changed, {len(library)} experiences in the prompt: {few}"


# ---------------------------------------------------------------- the world


class Rules:
    """Two digits, and a word of each slot that says what to do with them: 36 environments. An attempt names its words, each
    with what it gives; right is what the environment's words give, and no prompt names these. JSON: pieces of a reply."""

    SLOTS = ("ADD", "SUB", "MAX", "MUL"), ("KEEP", "INC", "NEG"), ("ONE", "TWO", "PAD")
    JSON = '[{"option": "add", "experience": "', '[{"option": "modify", "modified_from": "', '", "experience": "', '"}]', "[]"
    KNOWN = (*JSON, *sum(SLOTS, ()), *"0123456789,=:", "RIGHT", "WRONG", "G0", "G1", "G2", "G3", "G4", "G5")

    @staticmethod
    def write(words, a, b):
        x = dict(ADD=a + b, SUB=abs(a - b), MAX=max(a, b), MUL=a * b)[words[0]] % 10
        y = dict(KEEP=x, INC=x + 1, NEG=-x)[words[1]] % 10
        return f"{words[0]} {x} {words[1]} {y} {words[2]} : {dict(ONE=f'{y}', TWO=f'{y} {y}', PAD=f'0 {y}')[words[2]]}"

    @staticmethod
    def obey(rng, words, careful):
        """A word of each slot: of those that are named, each with this probability; else any."""
        return [rng.choice([w for w in slot if w in words and rng.random() < careful] or slot) for slot in Rules.SLOTS]

    @staticmethod
    def tokenizer():
        """It leaves out what it does not know of a text, so that the prompts are those of a real model."""
        import re

        from tokenizers import Regex, pre_tokenizers

        from common.worlds import tiny

        kinds = [re.escape(w) if w in Rules.JSON else rf"\b{w}\b" if w[1:] else rf"(?<!\S){w}(?!\S)" for w in Rules.KNOWN]
        made = tiny.words(Rules.KNOWN)
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(kinds)), "removed", invert=True)
        return made


def rules(environment, args):
    """-> Task, 48 of the 100 questions held out. The warm start sees all of them, under libraries of any words and without
    (for --critic model also critiques, in any environment); none is answered there as the environment wants it."""
    import random

    from common import UserError, tasks

    right, rng = environment.upper().split(), random.Random(0)
    if len(right) != 3 or any(word not in slot for word, slot in zip(right, Rules.SLOTS)):
        raise UserError(f"--environment {environment}: needs a word of each of {', '.join(map('/'.join, Rules.SLOTS)).lower()}")

    def check(text, answer):
        return text, float(text.rpartition(": ")[2] == answer)

    cases = [({}, divmod(k, 10)) for k in rng.sample(range(100), 100)]
    golds = [Rules.write(right, *pair).rpartition(": ")[2] for _, pair in cases]
    plain = [tasks.Example(k, "{} , {} =".format(*cases[k][1]), gold) for k, gold in enumerate(golds)]
    for k in range(100, 4100 if args.critic == "model" else 3100):
        e, (_, pair), wanted = plain[k % 100], cases[k % 100], Rules.obey(rng, (), 0)
        lines = rng.sample([*zip(wanted, Rules.SLOTS)] * 2, rng.randrange(7))
        library = {f"G{i}": rng.choice((word, *slot)) for i, (word, slot) in enumerate(lines)}
        cases.append((library, pair))
        plain.append(tasks.Example(k, with_library(e.prompt, library), ""))
        if k >= 3100:
            chosen = [Rules.obey(rng, wanted, 0.6) for _ in range(5)]
            texts, gold = [Rules.write(words, *pair) for words in chosen], Rules.write(wanted, *pair).rpartition(": ")[2]
            rewards = [check(text, gold)[1] for text in texts]
            cases[k] = library, dict(question=e.prompt, gold=gold, texts=texts, rewards=rewards)
            plain[k].prompt = critique_prompt(cases[k][1], map(" ".join, chosen), library, args)

    def demonstrate(rng, example, careful):
        library, case = cases[example.id]
        if isinstance(case, dict):
            return by_rule()[0]([case], library)[0]
        return Rules.write(Rules.obey(rng, library.values(), careful), *case)

    steps = 500 if args.critic != "model" else 800
    made = dict(recipe=dict(steps=steps, careful_steps=steps * 7 // 10, careful=0.7), shape=dict(initializer_range=0.08))
    made |= dict(shown=plain[100:], tokenizer=Rules.tokenizer)
    return tasks.Task("rules", plain[48:100], plain[:48], check, True, demonstrate, **made)


# ---------------------------------------------------------------- the loop


def train(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import gpu, rewards, runlog, settings

    if args.api_base and not args.resume:  # a server's model is no tiny one
        vars(args).update({name: x for name, x in args.real_preset.items() if getattr(args, name) is None})
    args, config, device = settings.prepare(__file__, args)
    task, other, warm, library = started(args)
    run = runlog.Run(__file__, args)
    chat, close = served(args) if args.api_base else here(args, config, device, task, warm)
    spent = dict(critic_calls=0, critic_tokens=0)
    critic, editor = by_model(chat, warm, args, spent) if args.task != "rules" or args.critic == "model" else by_rule()
    scorers = [(t, rewards.Scorer(t.check, inline=t.inline)) for t in (task, other) if t]
    frozen = torch.nn.Linear(1, 1)  # in the checkpoints' place for weights, which do not change
    optimizer = torch.optim.SGD(frozen.parameters())
    run.state["library"] = library
    run.restore(frozen, optimizer)

    def evaluate():
        return held_out(chat, scorers, run.state["library"], args)

    for step in run.steps(frozen, optimizer, evaluate):
        # Rollout: P questions over all processes, G attempts each, with the library in the prompt.
        prompts = gpu.local(task.order(run.state["cursor"], args.prompts_per_step, args.seed))
        library, first = run.state["library"], gpu.rank() * len(prompts)
        seeds = [gpu.hash_seed(args.seed, step, first + i) for i in range(len(prompts))]
        groups = attempts(chat, scorers[0][1], task, prompts, library, args.group_size, args.temperature, seeds, args)
        groups = sum(gpu.gather_objects(groups), [])
        run.state["cursor"] += args.prompts_per_step
        run.timed("rollout")

        # Update: of the library's text. What one process is told counts for all.
        spent.update(critic_calls=0, critic_tokens=0)
        run.state["library"], counts, said = gpu.gather_objects(updated(library, groups, critic, editor, args))[0]
        run.timed("update")
        show(run, library, groups, counts | spent, said)

    run.finish(learnt(run, args))
    close()
    for _, scorer in scorers:
        scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
