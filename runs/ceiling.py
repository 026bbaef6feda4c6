"""How far a tiny model comes by supervised learning alone: from its warm start on, the careful demonstrations of its task.

python -m runs.ceiling                     route: greedy accuracy on held-out prompts after 300, 600 and 900 updates
python -m runs.ceiling --task addition --updates 100

It is what the model can hold, against which a curve of reinforcement learning is read: the line in
runs/reference/route.png.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

from common import ROOT, UserError, engines, gpu, models, rewards, rollout, settings, tasks


@dataclass
class Options:
    task: str = "route"
    """a built-in task with demonstrations"""
    updates: tuple[int, ...] = (300, 600, 900)
    """where it is measured"""
    batch: int = 64
    """demonstrations in an update"""
    lr: float = 2e-3
    """AdamW's, in one cycle"""
    seed: int = 1
    """of the demonstrations' order"""
    out: str | None = None
    """where the numbers go; None: runs/compare/ceiling-<task>.json"""


def loss(lm, tokenizer, rows):
    """[(prompt ids, demonstration)] -> mean negative log-likelihood of the demonstrations' tokens and their end."""
    done = tokenizer([text for _, text in rows])["input_ids"]
    whole = [prompt + ids + [tokenizer.eos_token_id] for (prompt, _), ids in zip(rows, done)]
    width = max(map(len, whole))
    ids = torch.tensor([x + [0] * (width - len(x)) for x in whole])
    labels = ids.clone()
    for i, ((prompt, _), x) in enumerate(zip(rows, whole)):
        labels[i, : len(prompt)] = labels[i, len(x) :] = -100
    return lm(input_ids=ids, labels=labels).loss


def main(options):
    """Prints and writes {updates: greedy accuracy}."""
    known = tasks.worlds_with("demonstrations")
    if options.task.partition(":")[0] not in known.split(", "):
        raise UserError(f"--task {options.task} has no demonstrations; those that have: {known}")
    args = SimpleNamespace(
        model="tiny", task=options.task, dtype="float32", lora_rank=0, gradient_checkpointing=False, engine="hf",
        eval_prompts=512, eval_samples=0, seed=options.seed,
        max_new_tokens=tasks.world(options.task).max_new_tokens or settings.TINY["max_new_tokens"],
    )  # fmt: skip
    if min(options.updates, default=0) < 1 or options.batch < 1 or not 0 < options.lr < math.inf:
        raise UserError("--updates and --batch need numbers of at least 1, --lr one above 0")
    models.architecture(args)
    gpu.init(args)
    tokenizer = models.load_tokenizer(args)
    task = tasks.load(options.task, tokenizer)
    policy = models.load(args, gpu.device())
    engine = engines.make_engine(policy, tokenizer, args, 1024)
    scorer = rewards.Scorer(task.check, inline=task.inline)
    found, rng = {}, random.Random(options.seed)
    for most in options.updates:  # each from the start: a cycle that ends is another one
        policy.lm.load_state_dict(models.load(args, gpu.device()).lm.state_dict())
        optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=most)
        for _ in range(most):
            rows = [(e.ids, task.demonstrate(rng, e, 1.0)) for e in rng.choices(task.train, k=options.batch)]
            loss(policy.lm, tokenizer, rows).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        found[most] = rollout.evaluate(engine, scorer, tokenizer, task, args)["greedy_accuracy"]
        print(f"{most:,} updates: greedy accuracy {found[most]:.3f}", flush=True)
    out = Path(options.out or ROOT / "runs" / "compare" / f"ceiling-{options.task.replace(':', '-')}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    record = dict(command="python -m runs.ceiling " + " ".join(sys.argv[1:]), greedy_accuracy=found)
    out.write_text(json.dumps(record) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
