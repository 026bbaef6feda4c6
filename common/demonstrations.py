"""Demonstrations: prompts with the completions to be learnt, as Batches like a rollout's, and how held-out ones fare."""

import dataclasses
import json
import random
from typing import NamedTuple

import torch

from common import UserError, encoding, gpu, models, rewards, rollout, tables, tasks
from common.batch import collate, read

SHOWN = dict(loss="loss", train_perplexity="ppl", entropy="H")  # what the bar shows of a step's metrics


class Said(NamedTuple):
    """What a row has beside its prompt; the answer that the completion comes to is None where the row does not name it."""

    completion: str
    answer: str | tuple | None


def _row(row, where):
    """A row of a file -> (prompt: text or messages, Said, or an answer that is the completion as well, where it stands)."""
    if not isinstance(tables.without_pictures(row, where), dict) or row.get("messages") is row.get("completion") is None:
        return tables.prompt_and_answer(row, where)
    prompt, said, turns = row.get("prompt"), row.get("completion"), row.get("messages")
    if turns is not None:
        prompt, said = (turns[:-1], turns[-1:]) if tables.conversation(turns) else (None, None)
    if tables.conversation(said) and len(said) == 1 and said[0]["role"] == "assistant":
        said = said[0]["content"]
    if not prompt or not isinstance(said, str):
        what = "prompt and completion, or messages of which the last is the assistant's"
        raise UserError(f"{where}: needs {what}, is {json.dumps(row, ensure_ascii=False)[:80]}")
    answer = row.get("answer")
    prompt, checked, _ = tables.prompt_and_answer(dict(prompt=prompt, answer="?" if answer is None else answer), where)
    return prompt, Said(said, None if answer is None else checked), where


def _from_rows(task, args):
    """Gives a task of rows its `demonstrate`: what they have as completion, else as answer; no `check` where answers miss."""
    solutions = tasks.worlds_with("solutions").split(", ")
    if tasks.world(args.task) and args.task not in solutions:
        known = f"{tasks.worlds_with('demonstrations')}, {', '.join(solutions)}"
        raise UserError(f"--task {args.task}: has no demonstrations; there are {known}, and .jsonl files with completions")
    said, rows = {}, task.train + task.test
    if any(isinstance(e.answer, Said) for e in rows):
        task.template = "{prompt}"  # they ask in their own words
    for e in rows:
        first = e.answer[0] if isinstance(e.answer, tuple) else e.answer
        said[e.id] = e.answer if isinstance(e.answer, Said) else Said(first, e.answer)
        e.answer = said[e.id].answer or said[e.id].completion
    task.demonstrate = lambda rng, e, careful: said[e.id].completion
    if not args.reward and any(s.answer is None for s in said.values()):
        task.check = None


def load(args, config, tokenizer):
    """`args.task` -> (Task with token ids, every example with a demonstration; the positions that it needs). `check` is None
    where nothing says what is right. Rows without a completion, or too long for the model, are left out, and that is told.
    Raises UserError, with file and line where there is one."""
    task = tasks.load(args.task, reward=args.reward, parse=_row)
    rows, most, positions = task.train + task.test, args.max_new_tokens, config.max_position_embeddings
    looked = rows[:256] if task.demonstrate else rows  # a world's are drawn anew for every update
    if not task.demonstrate:
        _from_rows(task, args)
    tasks.encode(task, tokenizer, args.prompt_template, args.system_prompt)
    texts, ids = _drawn(task, looked, range(len(looked)), tokenizer, args.careful, None)
    for some, of in ((rows, [e.ids for e in rows]), (looked, ids)):
        models.check_tokens(zip(of, [e.where or f"task {task.name}" for e in some]), config)
    needs = {e.id: len(e.ids) + min(len(y), most) for e, y in zip(looked, ids)}
    sampled = {e.id: len(e.ids) + most for e in rows}
    needs = sampled | needs | {e.id: sampled[e.id] for e in task.test}
    empty = {e.id for e, text in zip(looked, texts) if not text.strip()}
    kept = {e.id for e in rows if e.ids and e.id not in empty and needs[e.id] <= positions}
    cut = sum(len(y) > most for e, y in zip(looked, ids) if e.id in kept)
    told = [f"{len(rows) - len(kept):,} left out (empty, or too long for the model)"] if len(kept) < len(rows) else []
    told += [f"{cut:,} cut at --max-new-tokens {most}"] if cut else []
    if told and gpu.rank() == 0:
        print(f"note: of {len(looked):,} demonstrations {', '.join(told)}", flush=True)
    task.train, task.test = ([e for e in part if e.id in kept] for part in (task.train, task.test))
    if not task.train or not task.test:
        raise UserError(f"--task {args.task}: {len(task.train)} demonstrations to learn, {len(task.test)} held out; needs both")
    context = max(needs[e.id] for e in task.train + task.test)
    return task, max(context, models.check_context(config, *_also(args, tokenizer)) if vars(args).get("also_evaluate") else 0)


def _drawn(task, examples, seeds, tokenizer, careful, most):
    """A demonstration's text and token ids for each of the examples; what is random in one is a function of its seed alone."""
    texts = [task.demonstrate(random.Random(seed), e, careful) for e, seed in zip(examples, seeds)]
    return texts, encoding.response_ids(texts, tokenizer, [e.where or f"task {task.name}" for e in examples], most)


def batch(task, examples, tokenizer, args, seed, first=0):
    """Demonstrations of these examples, drawn from (seed, first + their places) -> Batch, the same on all ranks."""
    seeds = [gpu.hash_seed(seed, first + i, 19) for i in range(len(examples))]
    texts, ids = _drawn(task, examples, seeds, tokenizer, args.careful, args.max_new_tokens)
    out = collate([(e.ids, y) for e, y in zip(examples, ids)], tokenizer.pad_token_id, gpu.device())
    out.prompt_id, out.texts = torch.tensor([e.id for e in examples], device=gpu.device()), texts
    return out


def perplexity(logp):
    """Of a mean log-prob per token, nats."""
    return torch.tensor(-logp, dtype=torch.float64).exp().item()


def evaluate(engine, scorer, policy, task, tokenizer, run):
    """On args.eval_prompts held-out prompts, over all ranks -> {name: number}: what rollout.evaluate gives, where there is a
    scorer; perplexity of their demonstrations, drawn alike for all seeds; greedy accuracy on args.also_evaluate. Shows two
    completions beside the demonstrations."""
    args, some = run.args, task.test[: run.args.eval_prompts]
    engine.sync()
    out = rollout.evaluate(engine, scorer, tokenizer, task, args) if scorer else {}
    held = batch(task, some, tokenizer, args, 0)
    mine = torch.arange(len(some), device=gpu.device())[gpu.rank() :: gpu.world()]
    logp, _ = read(policy, held, args, mine, temperature=1.0)
    out |= dict(perplexity=perplexity(gpu.total(gpu.double(logp).sum().item()) / int(held.mask.sum())), prompts=len(some))
    if args.also_evaluate:
        other, wide = _also(args, tokenizer)
        scorer = rewards.Scorer(other.check, inline=other.inline)
        out["also_greedy_accuracy"] = rollout.evaluate(engine, scorer, tokenizer, other, wide)["greedy_accuracy"]
        scorer.close()
    _show(engine, some[:2], held.texts, tokenizer, run)
    return out


def _also(args, tokenizer):
    """The task of args.also_evaluate, and args for it."""
    task = tasks.load(args.also_evaluate, tokenizer, system_prompt=args.system_prompt)
    return task, dataclasses.replace(args, max_new_tokens=max(args.max_new_tokens, task.max_new_tokens or 0), eval_samples=0)


def _show(engine, examples, told, tokenizer, run):
    """Greedy completions of these examples into samples.jsonl, and on the terminal."""
    mine = range(gpu.rank(), len(examples), gpu.world())
    engine.wake()
    out = engine.generate([examples[i].ids for i in mine], 1, run.args.max_new_tokens, 0.0, [0] * len(mine))
    engine.sleep()
    found = {i: ids for part in gpu.gather_objects({i: ids for i, (ids, _, _) in zip(mine, out)}) for i, ids in part.items()}
    for i, e in enumerate(examples) if run.main else ():
        asked, text = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (e.ids, found[i]))
        row = dict(step=run.state["step"], prompt=asked, completion=text, demonstration=told[i])
        run.samples.write(json.dumps(row) + "\n")
        run.bar.write(f"             {asked[-60:]!r} -> {text[:140]!r}  (a demonstration: {told[i][:140]!r})")
