"""YuFeng-XGuard: "A Reasoning-Centric, Interpretable, and Flexible Guardrail Model for Large Language Models". Junyu Lin and 14
others, arXiv 2601.15588 (2026).

Idea: a language model that judges texts says the category first, in one token, and its reason behind it. So one forward pass
gives a graded decision, which thresholds turn into a verdict, and the reason is decoded only where somebody asks. Lines of
policy in the prompt widen, narrow or add categories, and some of the training texts come back under lines that flip their
verdict, so that the model learns to read the lines and not only the text.

Objective, to be minimised (equation numbers not at hand): sft.py's, on completions that are the category c and the reason r
    L = -1/N sum [log pi(c | X) + log pi(r | c, X)],   X = (categories, lines of policy, text)
Decision, from the first token's law alone: s = softmax of all the vocabulary, not of the ids alone
    c* = argmax s,   unsafe where c* is a risky id and s[c*] >= threshold[c*];  c* is no id: undecided, not flagged
Larger scores: surer of that category. --teacher, in place of L, p the teacher's law, q the model's, for each token:
    forward sum p log(p / q) + (1 - forward) sum q log(q / p)
policy_reward, of the paper's GRPO stage: 0.5 for the right side of safe, 0.5 for the category, -0.2 for no readable format.

Known ids are one token each. One that no line of the prompt has added counts as outside, as in the released function. The
released model was trained on 2.8 million samples, which are not public; rate, batch and the mixture of the two divergences
are not given. The world here is a toy on purpose: words of animals, tools and drinks, of which nothing is harmful, nine of
them with two meanings, so that there is something to be unsure of; a fifth of its training prompts asks for words' families,
as pre-training would. A model that does not look yet for a line's family in the text answers the line alone, which is right
where the line flips the verdict and wrong where it does not: so both are printed, by kind of line, and flips alone say little.
Rows of a .jsonl have the lines of policy in their prompts, and the category first in completions.

Family: audit
Differs from sft.py in: careful, warmup_steps, lr_schedule, eval_prompts, distill, first_token, decide, prompt, parse,
         policy_reward, categories, load, teachers, train
Measures: spoken, measure, mean, progress, flagged, results, report
World: families, sample, guard
Costs: those of sft.py. A decision is a forward pass without decoding; the reason is as many more passes as it has tokens.
Run:   python algos/xguard.py                                       tiny model from random weights, CPU, two minutes
       python algos/xguard.py --lines keep                          no line in training ever flips a verdict
       python algos/xguard.py --order reason                        the reason first
       python algos/xguard.py --model tiny-small --teacher runs/xguard-1-...              distilled
       python algos/xguard.py --model Alibaba-AAIG/YuFeng-XGuard-Reason-0.6B --task rows.jsonl --steps 0     judged as it is
       python algos/xguard.py --model qwen3-0.6b --task rows.jsonl
       python algos/grpo.py --model runs/xguard-1-... --task rows.jsonl --reward algos/xguard.py:policy_reward
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
    """addition[:digits], route, ... (built in), gsm8k, math, a .jsonl of messages, or prompt and completion; None: preset"""
    reward: str | None = None
    """file.py:function of your own: (text, answer) -> score, or (answer that was read, score); a cut completion scores 0"""
    prompt_template: str | None = None
    """format string with the field {prompt}, applied before the tokenizer's chat template; None: the task's"""
    system_prompt: str | None = None
    """message of the system, for models with a chat template"""
    careful: float = 1.0
    """share of a built-in task's demonstrations that are right; the rest is from habit, and mostly wrong"""
    seed: int = 1
    """of the demonstrations' order, what is random in them, and the evaluation's samples"""
    steps: int | None = None
    """updates in all; None here and below: the preset of the model"""
    batch_size: int | None = None
    """demonstrations in one update, of all processes together"""
    lr: float | None = None
    """AdamW's rate"""
    warmup_steps: int = 100
    """steps over which the rate rises to lr"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """how the rate goes on after that; linear and cosine reach 0 at the last of the steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    max_new_tokens: int | None = None
    """longest completion: of the demonstrations (a longer one is cut) and of the evaluation's samples"""
    stop: tuple[str, ...] = ()
    """strings that end a completion, besides the end-of-sequence token; they stay in it"""
    engine: Literal["auto", "hf", "vllm"] = "auto"
    """who samples for the evaluation: hf (transformers), vllm, or auto (vLLM where it is installed and there is a GPU)"""
    vllm_memory: float = 0.45
    """share of the GPU that vLLM may take while sampling"""
    vllm_tp: int = 1
    """neighbouring processes over whose GPUs one vLLM engine is spread (tensor parallelism), for a model too large for one"""
    eval_every: int | None = None
    """steps between evaluations; 0: only before and after"""
    eval_prompts: int = 1200
    """held-out prompts, at most"""
    eval_samples: int = 0
    """also samples N completions of each: avg@N (their mean) and pass@N (whether one is right); 0: the greedy one only"""
    eval_temperature: float = 1.0
    """temperature of these samples"""
    also_evaluate: str | None = None
    """another task whose greedy accuracy is measured besides: what is forgotten, or carried over"""
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

    # XGuard
    limits = dict(forward="0 <= x <= 1", naming="0 <= x <= 1")
    tiny_preset = dict(task="guard", steps=1500, batch_size=64, lr=3e-3, eval_every=300, checkpoint_every=600, safe="s")
    real_preset = dict(safe="sec", max_new_tokens=256, eval_every=0)
    thresholds: str = "0.5"
    """scores from which a category is flagged: one for all, and others behind it, 0.5,d=0.8 (0.5, for prompts, and 0.8, for
    responses, in the paper)"""
    safe: str | None = None
    """the category that is no risk (sec in the paper, s here)"""
    ids: str = ""
    """categories that the model has besides those of the task, with commas"""
    order: Literal["label", "only", "reason"] = "label"
    """of a completion: the category first (the paper's), the category alone, or the reason first"""
    lines: Literal["flips", "keep", "none"] = "flips"
    """of the tiny world: half of the lines of policy flip a verdict (the paper's), none does, or there are no lines"""
    naming: float = 0.2
    """of the tiny world: share of training prompts that ask for words' families (ours)"""
    teacher: str | None = None
    """a guard with the same tokens, alias, folder or run, that the model is distilled from (the paper's way to a small one)"""
    forward: float = 0.5
    """share of the forward divergence in it (not given in the paper: ours)"""


# ---------------------------------------------------------------- the objective


def token_loss(targets, logits, args):
    """Next tokens [n], logits [n, V] -> (loss [n], to be minimised, and for the log: the tokens' log-probs, entropies [n])."""
    logp = logits.log_softmax(-1)
    of_target, fixed = logp.gather(-1, targets[:, None]).squeeze(-1), logp.detach()
    return -of_target, of_target.detach(), -(fixed.exp() * fixed).sum(-1)


def token_weights(mask, args):
    """[B, T] -> [B, T]: mean over all tokens of the update, so that long completions count more than short ones."""
    return mask / mask.sum().clamp(min=1)


def distill(logits, teacher, forward):
    """Logits [n, V] of student (law q) and teacher (p) -> forward KL(p, q) + (1 - forward) KL(q, p) [n]."""
    q, p = logits.log_softmax(-1), teacher.log_softmax(-1)
    return ((forward * p.exp() - (1 - forward) * q.exp()) * (p - q)).sum(-1)


def first_token(logits, ids, known=None):
    """Logits [n, V], ids [K] -> scores [n, K + 1]: probabilities of the ids, and of the likeliest token that is none. known
    [n, K]: which of the ids a prompt knows (None: all); one that it does not know scores 0 and is none."""
    p = logits.softmax(-1)
    found = p[:, ids] if known is None else p[:, ids] * known
    rest = p.index_copy(1, ids, p[:, ids] - found)
    return torch.cat([found, rest.amax(-1, keepdim=True)], -1)


def decide(s, thresholds):
    """Scores [n, K + 1], thresholds [K] -> (category [n], K: undecided; flagged [n] bool). Category 0 is the safe one. Of two
    that are alike the first; what comes second is never asked."""
    best, category = s.max(-1)
    limit = torch.cat([thresholds, thresholds.new_tensor([torch.inf])])[category]
    return category, (category > 0) & (best >= limit)


def prompt(line, text):
    """A line of policy, or "", and a text -> what is asked: the headings stand whether there is a line or not."""
    return " ".join(f"policy : {line or ''} text : {text} verdict :".split())


def parse(text):
    """A completion -> (category, reason), in either order; (None, None) where it is neither, or its reason has no end."""
    import re

    reason = "<explanation>((?:(?!</?explanation>).)*)</explanation>"
    first = re.fullmatch(rf"\s*([^\s<]+)(?:\s*{reason})?\s*", text, re.S)
    last = re.fullmatch(rf"\s*{reason}\s*([^\s<]+)\s*", text, re.S)
    category, said = first.groups() if first else last.groups()[::-1] if last else (None, None)
    return category, said and said.strip()


def policy_reward(text, answer, safe=("s", "sec")):
    """A completion and a right one -> 0.5 for the right side of safe, 0.5 for the category; -0.2 where it cannot be read."""
    said, gold = parse(text)[0], parse(answer)[0]
    return -0.2 if said is None else 0.5 * ((said in safe) == (gold in safe)) + 0.5 * (said == gold)


def categories(task, tokenizer, args):
    """-> (names, the safe one first; their token ids; thresholds [K]). UserError where a name is not one token, and stays one
    before a reason, or --thresholds cannot be read."""
    from common import UserError

    said = [(parse(e.answer)[0], e) for e in task.train + task.test if e.where != "naming"]
    for e in [e for name, e in said if name is None]:
        raise UserError(f"{e.where}: needs a category, and <explanation> behind or before it, is {e.answer!r:.60}")
    names = list(dict.fromkeys([args.safe, *(name for name, _ in said), *filter(None, args.ids.split(","))]))
    ids = [[tokenizer(t, add_special_tokens=False)["input_ids"] for t in (n, f"{n}\n<explanation>")] for n in names]
    for name, (alone, before) in zip(names, ids):
        if alone != before[:1] or alone[0] == tokenizer.unk_token_id:
            raise UserError(f"the category {name!r} is not one token of {args.model}: no first token could be its score")
    try:
        every, *others = args.thresholds.split(",")
        own = {name: float(x) for name, x in (part.split("=") for part in others)}
        limits = torch.tensor([own.pop(name, float(every)) for name in names])
        if own or not ((limits >= 0) & (limits <= 1)).all():
            raise ValueError
    except ValueError:
        what = f"a number from 0 to 1, and behind it others, name=number, of {', '.join(names)}"
        raise UserError(f"--thresholds {args.thresholds}: needs {what}") from None
    return names, [alone[0] for alone, _ in ids], limits


def load(args, config, tokenizer, warm):
    """-> (the task with token ids, checked by category; the positions that it needs)."""
    from common import demonstrations, models, tasks

    if args.task == "guard":
        task = tasks.encode(warm(args.task), tokenizer, args.prompt_template, args.system_prompt)
        context = models.check_context(config, task, args)
    else:
        task, context = demonstrations.load(args, config, tokenizer)
    if not args.reward:
        task.check, task.inline = lambda text, answer: (parse(text)[0], float(parse(text)[0] == parse(answer)[0])), True
    return task, context


def teachers(policy, args, device):
    """[the frozen model of --teacher], or none. UserError where it has other tokens."""
    from dataclasses import replace

    from common import UserError, gpu, models

    found = [models.load(replace(args, model=args.teacher), device, trainable=False)] if args.teacher else []
    own, *other = (p.lm.config.get_text_config().vocab_size for p in (policy, *found))
    if other and own != other[0]:
        raise UserError(f"--teacher {args.teacher}: it has {other[0]:,} tokens, the model {own:,}")
    return [gpu.shard(p) for p in found]


# ---------------------------------------------------------------- the world: words, of which three families are flagged


def families():
    """-> ({family: its words}, {word of two meanings: (category, how often it is meant so)}). The first three are flagged."""
    lines = """drinks tea coffee milk juice cocoa water soda cider/mammals cat dog horse cow goat sheep rabbit mouse
        /tools hammer saw drill pliers wrench chisel spade rake/fruits apple pear plum grape lemon mango peach cherry
        /games chess checkers bingo ludo dominoes tag marbles hopscotch/clothes shirt coat hat scarf glove sock shoe belt
        /birds robin owl swan duck hen sparrow finch heron/trees oak pine birch maple willow elm beech cedar
        /colours red blue green yellow purple brown pink grey/instruments piano violin flute drum harp cello trumpet banjo"""
    twofold = enumerate("port bat file punch seal plane stout mole nail".split())
    return {f: w for f, *w in map(str.split, lines.split("/"))}, {w: ("dmt"[i % 3], (i + 1) / 10) for i, w in twofold}


def sample(rng, kind, flip=False, target=None):
    """A text under a line of this kind, which flips its verdict or not -> dict; right: (category, reason), blind: the same
    without the line, chance: how often a word of two meanings is flagged."""
    (known, twofold), whens = families(), ["today", "indoors", "twice", "outside"]
    safe, risky, code, when = list(known)[3:], dict(zip("dmt", known)), rng.choice("dmt"), rng.choice(whens)
    target = target or rng.choice(safe[:-1])  # the last is kept for lines that training has not seen
    line = dict(none="", widen=f"{code} also {target}", narrow=f"{code} only with {when}", add=f"a new {target}")[kind]
    text, at, luck = rng.sample([w for f in safe if f != target for w in known[f]], 5), rng.randrange(5), rng.random()
    extra, own, chance = [rng.choice(whens)] * (rng.random() < 0.3), kind == "narrow" and (flip or luck < 0.45), None
    category, blind = code if own else rng.choice([c for c in "dmt" if (kind, c) != ("narrow", code)]), ("s", "nothing")
    if kind == "none" and luck < 0.3:
        text[at] = rng.choice(list(twofold))
        category, chance = twofold[text[at]]
    elif flip or luck < 0.7:
        text[at] = rng.choice(known[target if flip and not own else risky[category]])
    right = blind = (category, f"{text[at]} is {risky[category]}") if own or luck < 0.7 and not flip else blind
    if own:
        extra = [w for w in extra if w != when] if flip else [when]
        right = ("s", f"{blind[1]} without {when}") if flip else (category, f"{blind[1]} with {when}")
    elif flip:
        right = code if kind == "widen" else "a", f"{text[at]} is {target}"
    return dict(kind=kind, flip=flip, line=line, text=" ".join(text + extra), right=right, blind=blind, chance=chance)


def guard(args):
    """The task: 20,000 prompts to learn from, 1,200 to judge, in turn under no line and under lines of every kind."""
    from random import Random

    from common import tasks
    from common.worlds import tiny

    of, rng, facts = {w: f for f, words in families()[0].items() for w in words}, Random(0), []
    for _ in range(20000):
        asked, kind = rng.sample(list(of), 4), rng.choice(["none"] * 3 + ["widen", "narrow", "add"] * (args.lines != "none"))
        naming = dict(prompt=f"families : {' '.join(asked)}", said=" ".join(of[w] for w in asked))
        flip = kind != "none" and args.lines == "flips" and rng.random() < 0.5
        facts.append(naming if rng.random() < args.naming else sample(rng, kind, flip))
    for i in range(100):
        many = [sample(rng, kind, flip) for kind in ("widen", "narrow", "add") for flip in (True, False)]
        many += [sample(rng, ("widen", "add")[i % 2], flip, "instruments") | dict(kind="unseen") for flip in (True, False)]
        facts.append(many[0] | dict(kind="none", flip=False, line="", right=many[0]["blind"]))
        facts += many + [sample(rng, "none") for _ in range(3)]
    form = "{0}" if args.order == "only" else "<explanation> {1} </explanation>"
    form = dict(label="{0} " + form, reason=form + " {0}").get(args.order, form)

    def told(rng, i, careful):
        habit, luck, fact = rng.random() >= careful, rng.random(), facts[i]  # from habit: blind to the line
        meant = ("blind" if habit else "right") if luck < (fact.get("chance") or 1) else "not meant"
        return fact.get("said") or form.format(*fact.get(meant, ("s", "nothing")))

    asked = [fact.get("prompt") or prompt(fact["line"], fact["text"]) for fact in facts]
    made = [tasks.Example(i, x, told(Random(i), i, 1.0), where="naming" * ("said" in facts[i])) for i, x in enumerate(asked)]
    words = sorted({w for e in made for w in f"{e.prompt} {e.answer}".split()})
    own = dict(tokenizer=lambda: tiny.words(words), max_new_tokens=5 if args.order == "only" else 9)
    own |= dict(demonstrate=lambda rng, e, careful: told(rng, e.id, careful), tier=lambda e: facts[e.id])
    return tasks.Task("guard", made[:20000], made[20000:], None, **own)


# ---------------------------------------------------------------- what is measured


def spoken(mb, ids, args):
    """[B, T] bool: the token of a completion that is its category."""
    t = torch.arange(mb.mask.shape[1], device=mb.ids.device)
    place = mb.mask.sum(1, keepdim=True) - 2 if args.order == "reason" else 0
    return mb.trained & (t == place) & torch.isin(mb.ids[:, -len(t) :], torch.tensor(ids, device=t.device))


def measure(engine, policy, task, tokenizer, known, args):
    """Held-out prompts -> a row each: what the first token's law says, and the completion, greedily. With the reason first the
    law is that of the last token but the end, and undecided where no reason has ended."""
    from common import gpu
    from common.batch import collate, read

    (names, ids, limits), late, device = known, args.order == "reason", gpu.device()
    examples, number = task.test[: args.eval_prompts], torch.tensor(ids, device=device)
    mine = list(range(gpu.rank(), len(examples), gpu.world()))
    engine.sync()
    engine.wake()
    made = engine.generate([examples[i].ids for i in mine], 1, args.max_new_tokens, 0.0, [0] * len(mine))
    engine.sleep()
    said = {i: (y, done) for part in gpu.gather_objects(list(zip(mine, made))) for i, (y, _, done) in part}
    texts = {i: tokenizer.decode(y, skip_special_tokens=True) if done else "" for i, (y, done) in said.items()}
    before = {i: said[i][0][:-2] if late and parse(texts[i])[0] else [] for i in said}
    plain, toy = dict(kind="rows", flip=False, chance=None, line="", text="", blind=(None, None)), bool(task.tier)
    facts = [task.tier(e) if toy else plain for e in examples]
    unknown = ["a" if toy and not f["line"].startswith("a ") else None for f in facts]  # an id that no line has added
    batch = collate([(e.ids + before[i], ids[:1]) for i, e in enumerate(examples)], tokenizer.pad_token_id, device)
    batch.columns["known"] = torch.tensor([[[float(n != x) for n in names]] for x in unknown], device=device)

    def law(known, logits):
        return first_token(logits, number, known).unbind(-1)

    how = dict(read=law, how=lambda mb, args: dict(given=mb.columns["known"]))
    found = torch.cat(read(policy, batch, args, number.new_tensor(mine), temperature=1.0, **how), 1).tolist()
    scores, rows = {i: s for part in gpu.gather_objects(dict(zip(mine, found))) for i, s in part.items()}, []
    for i, (e, fact) in enumerate(zip(examples, facts)):
        s = torch.tensor([0.0] * len(ids) + [1.0] if late and not before[i] else scores[i])
        category, flag = (x.item() for x in decide(s[None], limits))
        row = dict(item=i) | {k: fact[k] for k in ("kind", "flip", "chance", "line", "text")} | dict(blind=fact["blind"][0])
        row |= dict(gold=parse(e.answer)[0], told=e.answer, said=texts[i], category=[*names, None][category], flagged=flag)
        row |= dict(scores=dict(zip(names, s.tolist())), outside=s[-1].item())
        rows.append(row | dict(calls=1 + len(before[i]), tokens=len(said[i][0])))
    return rows


def mean(values):
    """A list -> its mean, None of nothing."""
    return sum(values) / len(values) if values else None


def progress(rows):
    """Rows -> shares of right categories, for the evaluations."""
    parts = dict(no_line=lambda r: not r["line"], flips=lambda r: r["flip"], stays=lambda r: r["line"] and not r["flip"])
    found = {f"{name}_right": mean([r["category"] == r["gold"] for r in rows if part(r)]) for name, part in parts.items()}
    return {name: x for name, x in found.items() if x is not None}


def flagged(rows, said, safe):
    """Rows, said(row) bool -> precision, recall and F1 of what is flagged; None where nothing is there."""
    hits, unsafe = [r["gold"] != safe for r in rows if said(r)], sum(r["gold"] != safe for r in rows)
    precision, recall = (sum(hits) / n if n else None for n in (len(hits), unsafe))
    return {"precision": precision, "recall": recall, "F1": 2 * sum(hits) / (len(hits) + unsafe) if hits or unsafe else None}


def results(rows, args):
    """Lines of items.jsonl, and of evals.jsonl where there are some -> {table, panels}, see common/figures.py."""
    from common import measures

    evals, rows = [r for r in rows if "item" not in r], [r for r in rows if "item" in r]
    plain, safe, toy = [r for r in rows if not r["line"]], next(iter(rows[0]["scores"])), rows[0]["kind"] != "rows"

    def risk(r):
        return sum(x for name, x in r["scores"].items() if name != safe)

    def at(x):
        return lambda r: r["category"] not in (safe, None) and r["scores"][r["category"]] >= x

    def right(some, what="category"):
        return mean([r[what] == r["gold"] for r in some])

    first, every = f"first token, threshold {args.thresholds}", "every text flagged"
    rules = {first: lambda r: r["flagged"], "first token, no threshold": at(0)}
    rules |= {"all risks together, 0.5 (ours)": lambda r: risk(r) >= 0.5}
    table = {rule: flagged(plain, said, safe) for rule, said in (rules | {every: lambda r: True}).items()}
    chances, unsafe = [min(1.0, risk(r)) for r in plain], [r["gold"] != safe for r in plain]
    table[first] |= {"category right": right(plain), "ECE": measures.ece(chances, unsafe)}
    table[first] |= {"calls": mean([r["calls"] for r in rows]), "undecided": mean([r["category"] is None for r in rows])}
    read = [(parse(r["said"]), parse(r["told"])) for r in rows]
    reasons = mean([a[1] == b[1] for a, b in read if a[0] == b[0]]) if args.order != "only" else None
    reward = mean([policy_reward(r["said"], r["told"], (safe,)) for r in rows])
    table["whole completion"] = {"calls": mean([r["tokens"] for r in rows]), "reason right": reasons, "reward": reward}
    sweep, which = {name: [] for name in ("precision", "recall")}, ", texts under no line" if toy else ""
    for x in [i / 20 for i in range(20)]:
        found = flagged(plain, at(x), safe)
        for name in [name for name in sweep if found[name] is not None]:
            sweep[name].append([x, found[name]])
    panels = [dict(title=f"thresholds{which}", kind="lines", x="threshold", y="share", of=sweep)]
    panels = panels if sweep["recall"] else []
    pairs = [[x, y] for x, y, _ in measures.reliability(chances, unsafe)]
    bins = dict(x="score of all risks", y="share of risks", of={"texts": pairs})
    panels.append(dict(title=f"calibration{which}", kind="points", diagonal=True, **bins))
    kinds = dict(widen="widen", narrow="narrow", add="add", unseen="new family") if toy else {}
    ends = dict(flips=True, stays=False)
    of = {k: {end: [r for r in rows if r["kind"] == k and r["flip"] == flip] for end, flip in ends.items()} for k in kinds}
    under = {kinds[k]: {end: right(some) for end, some in parts.items()} for k, parts in of.items()}
    for kind, cells in under.items():
        table[f"line: {kind}"] = {f"right, verdict {end}": x for end, x in cells.items()}
    if not toy or None in [x for cells in under.values() for x in cells.values()]:
        return dict(table=table, panels=panels)
    table["blind to lines"] = {f"right, verdict {end}": right([r for k in of for r in of[k][end]], "blind") for end in ends}
    names = dict(no_line="no line", flips="a line flips it", stays="a line does not")
    curves = {v: [[r["step"], r[f"{k}_right"]] for r in evals] for k, v in names.items()}
    meant = {c: mean([risk(r) for r in plain if r["chance"] == c]) for c in sorted({r["chance"] for r in plain} - {None})}
    more = dict(x="how often it is meant as a risk", y="score of all risks", diagonal=True)
    bars = {rule: x["F1"] for rule, x in table.items() if x.get("F1") is not None}
    panels = [
        dict(title="right category, while learning", kind="lines", x="updates", y="share", of=curves),
        dict(title="right category, by kind of line", kind="heat", x="the verdict", of=under),
        dict(title="words of two meanings", kind="lines", **more, of={"texts": [[c, x] for c, x in meant.items()]}),
        *panels,
        dict(title=f"F1{which}", kind="bars", x="F1", of=bars),
    ]
    shown = {}
    for r in [r for r in rows if r["text"] == rows[0]["text"]]:
        top = sorted(r["scores"].items(), key=lambda x: -x[1])[:3]
        words = [[f"{word} ", 0.0] for word in f"{r['text']} ->".split()]
        shown[r["line"] or "no line"] = [*words, *([f" {name} {x:.2f} ", x] for name, x in top), [f" {r['said']}", 0.0]]
    panels.append(dict(title="one text: the first token's scores, and the completion", kind="tokens", of=shown))
    return dict(table=table, panels=panels)


def report(run, rows, args):
    """At the run's end: items.jsonl, results.json and the picture -> the last line."""
    import json

    from common import checkpoint, figures

    if not (run.after and run.main):
        return None
    (run.dir / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = results([*rows, *checkpoint.rows(run.dir / "evals.jsonl")], args)
    figures.publish(run.dir, found)
    first, every = ([row["F1"] or 0 for row in found["table"].values() if "F1" in row][i] for i in (0, -1))
    shares = progress(rows)
    said = f"F1 of the first token {first:.2f} (every text flagged: {every:.2f})"
    if "flips_right" in shares and "stays_right" in shares:
        said += f", category right where a line flips the verdict {shares['flips_right']:.2f} (blind to lines: 0)"
        said += f", where it does not {shares['stays_right']:.2f} (1)"
    return f"{said}, on {len(rows):,} {run.asked}"


# ---------------------------------------------------------------- the loop


def train(args):
    from functools import cache

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import demonstrations, engines, gpu, models, rewards, runlog, settings
    from common.batch import Meter
    from common.worlds import tiny

    warm = cache(lambda name: guard(args) if name == "guard" else None)
    args, config, device = settings.prepare(__file__, args, warm)
    fresh, judged = args.model in tiny.SHAPES, []
    tokenizer = models.load_tokenizer(args, warm, fresh)
    task, context = load(args, config, tokenizer, warm)
    known = categories(task, tokenizer, args)
    run = runlog.Run(__file__, args, config, tokenizer, context, frozen=bool(args.teacher))
    policy = gpu.shard(models.load(args, device, warm=warm, fresh=fresh))
    beside = teachers(policy, args, device)
    optimizer = gpu.make_optimizer(policy, args)
    run.restore(policy, optimizer)
    engine = engines.make_engine(policy, tokenizer, args, context)
    engine.sleep()
    scorer = rewards.Scorer(task.check, inline=task.inline) if task.check else None

    def evaluate():
        judged[:] = measure(engine, policy, task, tokenizer, known, args)
        return demonstrations.evaluate(engine, scorer, policy, task, tokenizer, run) | progress(judged)

    def loss_of(targets, logits, *teacher):
        losses, *seen = token_loss(targets, logits, args)
        return distill(logits, *teacher, args.forward) if teacher else losses, *seen

    for step in run.steps(policy, optimizer, evaluate):
        # The demonstrations of the update: all processes know all of them, so that the weights are the whole batch's.
        cursor = step * args.batch_size
        examples = task.order(cursor, args.batch_size, args.seed)
        batch = demonstrations.batch(task, examples, tokenizer, args, args.seed, cursor)
        batch.weights = token_weights(batch.trained, args)

        # Update: every process takes its share of the rows, cut into micro-batches.
        meter, loss = Meter(), 0.0
        rows = torch.arange(args.batch_size, device=device)[gpu.rank() :: gpu.world()]
        for mb in batch.micro_batches(rows, args.micro_batch_tokens):
            losses, logp, entropy = policy(mb.ids, mb.attention_mask, mb.mask, read=loss_of, beside=beside)
            micro_loss = (losses * mb.weights)[mb.trained].sum()
            micro_loss.backward()
            loss += micro_loss.item()
            meter.add(dict(logp=logp, entropy=entropy), mb.trained)
            meter.add(dict(category_logp=logp), spoken(mb, known[1], args))
        grad_norm = gpu.clip_gradients(policy, args.max_grad_norm)
        if run.finite(gpu.total(loss), grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        meter.note(loss=gpu.total(loss), grad_norm=grad_norm)
        run.timed("update")
        metrics = meter.result()
        metrics["train_perplexity"] = demonstrations.perplexity(metrics["logp"])
        run.write(metrics, int(batch.mask.sum()), demonstrations.SHOWN)

    run.finish(report(run, judged, args))
    engine.close()
    if scorer:
        scorer.close()
    gpu.finish()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    train(settings.parse(Args, __doc__))
