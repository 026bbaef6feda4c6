"""The tiny models, their tokenizers, and their warm start: supervised training on a task's demonstrations, made once."""

import hashlib
import inspect
import json
import os
import random
import sys
from pathlib import Path

import torch

from common import ROOT, UserError, export, whole_folder
from common.encoding import tokenize

CHARACTERS = "\n +-*/=().,:?" + "0123456789" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"
# Layers, width, inner width, heads: 230, 27, 460 and 810 thousand parameters.
SHAPES = {
    "tiny": (2, 96, 256, 3), "tiny-small": (1, 48, 96, 3), "tiny-deep": (4, 96, 256, 3), "tiny-large": (4, 128, 344, 4),
}  # fmt: skip
# First the careful way alone, until the model can do it; then a mixture with the share `careful`, so that it has the habit
# of guessing.
RECIPE = dict(steps=600, careful_steps=420, careful=0.3, batch=64, lr=5e-3, seed=0)
UNTRAINED = dict(steps=1, careful_steps=1, careful=1.0, batch=1, lr=0.0)  # the weights as they were drawn


def characters(alphabet=CHARACTERS):
    """A tokenizer of one token per character of the alphabet."""
    from tokenizers import Regex, decoders, pre_tokenizers

    return _tokenizer(alphabet, pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse())


def with_mask(make=characters):
    """The tokenizer that make() gives, with a token for a masked position."""
    made = make()
    made.add_special_tokens(dict(mask_token="<mask>"))
    return made


def words(vocabulary):
    """A tokenizer of one token per word of the vocabulary; words stand between blanks, which are no tokens."""
    from tokenizers import decoders, pre_tokenizers

    return _tokenizer(vocabulary, pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##", cleanup=False))


def _tokenizer(pieces, pre_tokenizer, decoder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=1024
    )


def config(name="tiny", task=None):
    """The Qwen2 of this name, with the vocabulary and the shape that the task asks for."""
    from transformers import Qwen2Config

    layers, width, inner, heads = SHAPES[name]
    size = 3 + len(CHARACTERS) if task is None or task.tokenizer is None else len(task.tokenizer())
    fields = dict(
        vocab_size=size, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, use_cache=True, warm_started_on=task.name if task else None,
    )  # fmt: skip
    return Qwen2Config(**fields | (task.shape if task else {}))


def warm_start(task, name="tiny", cache=None, fresh=False):
    """Folder of the tiny model `name` after supervised training on the task's demonstrations, made once and cached under
    runs/cache (or $TOKENPO_CACHE) by what it is made of. Safe when two processes start at once: the first makes it, the other
    waits. `fresh`: without the training. Leaves the task's examples encoded. Raises UserError where the task has no
    demonstrations."""
    if task.demonstrate is None:
        raise UserError(f"the tiny model needs a task with demonstrations (addition, countdown); {task.name} has none")
    tokenizer = (task.tokenizer or characters)()
    examples = sorted(task.train + task.shown, key=lambda e: e.id)
    prompts = [task.template.format(prompt=e.prompt) for e in examples]
    for e, ids in zip(examples, tokenize(prompts, tokenizer, f"task {task.name}")):
        e.ids = ids
    recipe, shape = RECIPE | task.recipe | (UNTRAINED if fresh else {}), config(name, task)
    train = _supervise if getattr(shape, "is_causal", True) else _denoise

    made_of = [recipe, shape.to_dict(), tokenizer.get_vocab(), torch.__version__, inspect.getsource(train)]
    made_of += [told(task, examples, recipe), prompts]
    return stored(task, name, made_of, lambda: train(task, examples, tokenizer, recipe, shape), tokenizer, cache, fresh)


def told(task, examples, recipe):
    """Some demonstrations, by which a warm start is known."""
    rng = random.Random(1)
    return [task.demonstrate(rng, e, share) for e in rng.choices(examples, k=64) for share in (1.0, recipe["careful"])]


def stored(task, name, made_of, make, reader, cache=None, fresh=False):
    """The folder of the model that make() gives, made once, under a key of what it is made_of; with it its `reader`, a
    tokenizer or a vision.Processor."""
    from filelock import FileLock

    key = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=str).encode()).hexdigest()[:10]
    cache = Path(cache or os.environ.get("TOKENPO_CACHE") or ROOT / "runs" / "cache")
    folder = cache / f"{name}-{task.name.replace(':', '-').replace('/', '-')}-{key}"
    if not (folder / "model.safetensors").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{folder}.lock")
            lock.acquire()
        except OSError as error:
            raise UserError(f"cannot write the warm-started model to {cache}: {error.strerror or error}") from None
        with lock:
            if not (folder / "model.safetensors").exists():
                if not fresh and not sys.stderr.isatty():  # where there is no bar to be seen
                    what = f"making a {name} model for {task.name}: supervised training of a minute or two, once"
                    print(f"{what} (then it lies in {cache})", flush=True)
                lm = make()
                with whole_folder(folder, "the warm-started model") as scratch:  # transformers writes none outside rank 0
                    export.write_weights(lm, lm.state_dict().items(), scratch)
                    reader.save_pretrained(scratch)
    return str(folder)


def _supervise(task, examples, tokenizer, recipe, shape):
    """Next-token training of a fresh tiny model on demonstrations, completions only."""
    from tqdm import tqdm
    from transformers import Qwen2ForCausalLM

    rng = random.Random(recipe["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = Qwen2ForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98))
    steps = recipe["steps"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc="warm start (once, then cached)", disable=None, leave=False):
        rows = rng.choices(examples, k=recipe["batch"])
        careful = 1.0 if step < recipe["careful_steps"] else recipe["careful"]
        done = tokenize([task.demonstrate(rng, e, careful) for e in rows], tokenizer, f"task {task.name}")
        sequences = [e.ids + d + [tokenizer.eos_token_id] for e, d in zip(rows, done)]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        labels = torch.tensor(
            [[-100] * len(e.ids) + s[len(e.ids) :] + [-100] * (width - len(s)) for e, s in zip(rows, sequences)]
        )
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def _denoise(task, examples, tokenizer, recipe, shape):
    """Masked diffusion of a fresh tiny model that sees all positions: of the L tokens of a completion, filled up with EOS, k
    random ones are masked and guessed, k from 1 to L spread over the batch, weighted by L / k."""
    from tqdm import tqdm
    from transformers import Qwen2ForCausalLM

    rng, L, batch = random.Random(recipe["seed"]), task.max_new_tokens, recipe["batch"]
    noise = torch.Generator().manual_seed(recipe["seed"])
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = Qwen2ForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98))
    steps, end = recipe["steps"], tokenizer.eos_token_id
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["lr"], total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc="warm start (once, then cached)", disable=None, leave=False):
        rows = rng.choices(examples, k=batch)
        careful = 1.0 if step < recipe["careful_steps"] else recipe["careful"]
        done = tokenize([task.demonstrate(rng, e, careful) for e in rows], tokenizer, f"task {task.name}")
        width = max(len(e.ids) for e in rows)
        prompt = torch.tensor([[0] * (width - len(e.ids)) + e.ids for e in rows])
        target = torch.tensor([(d + [end] * L)[:L] for d in done])
        k = 1 + (torch.arange(batch) + torch.rand(1, generator=noise)) * L // batch
        masked = torch.rand(batch, L, generator=noise).argsort(1).argsort(1) < k[:, None]
        canvas = torch.cat([prompt, target.masked_fill(masked, tokenizer.mask_token_id)], 1)
        seen = torch.cat([torch.arange(width) >= width - torch.tensor([[len(e.ids)] for e in rows]), masked | True], 1)
        places = (seen.long().cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=canvas, attention_mask=seen, position_ids=places, use_cache=False).logits[:, -L:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        (loss * masked / k[:, None]).sum(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
