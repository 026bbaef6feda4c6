"""The tiny models that read pictures, small Qwen2.5-VLs; the scenes that are drawn for them; their warm start."""

import functools
import hashlib
import inspect
import random

import numpy as np
import torch

from common import vision
from common.worlds import tiny

CELLS, PIXELS = 4, 4  # a scene is 4 x 4 cells of 4 x 4 pixels; a cell is a patch, and a token
SHAPES = dict(box="#### #### #### ####", ring="#### #..# #..# ####", plus=".##. #### #### .##.", bar=".... #### #### ....")
COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), gold=(255, 190, 0))
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = """{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}\
{% endfor %}{% endif %}{% endfor %}"""
RECIPE = dict(steps=480, careful_steps=400, careful=0.3, batch=64, lr=2e-3, seed=0)


def render(objects):
    """[(shape, colour, cell 0 to 15)] -> a picture [16, 16, 3], uint8, black where nothing is."""
    out = np.zeros((CELLS * PIXELS, CELLS * PIXELS, 3), np.uint8)
    for shape, colour, cell in objects:
        row, column = (PIXELS * x for x in divmod(cell, CELLS))
        filled = np.array([[c == "#" for c in line] for line in SHAPES[shape].split()])
        out[row : row + PIXELS, column : column + PIXELS][filled] = COLOURS[colour]
    return out


def tokenizer(alphabet=tiny.CHARACTERS + ";"):
    """One token per character, and those that stand for pictures."""
    made = tiny.characters(alphabet)
    made.add_special_tokens(dict(additional_special_tokens=list(SPECIAL)))
    made.chat_template = TEMPLATE
    return made


def processor(own):
    """The Processor of a tokenizer: as Qwen2.5-VL's, with patches of 4 pixels, which are not merged."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size, grey = dict(shortest_edge=PIXELS**2, longest_edge=2**16), [0.5] * 3
    made = Qwen2VLImageProcessorPil(patch_size=PIXELS, merge_size=1, size=size, image_mean=grey, image_std=grey)
    return vision.Processor(own, made)


def config(name="tiny", task=None):
    """The Qwen2.5-VL of this name, with the vocabulary of the task."""
    from transformers import Qwen2_5_VLConfig

    own = (task.tokenizer if task and task.tokenizer else tokenizer)()
    start, end, image, video = own.convert_tokens_to_ids(list(SPECIAL))
    layers = tiny.SHAPES[name][0]
    text = dict(
        vocab_size=len(own), hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4), initializer_range=0.08,
        tie_word_embeddings=True,
    )  # fmt: skip
    eyes = dict(
        depth=1, hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=64, patch_size=PIXELS,
        spatial_merge_size=1, temporal_patch_size=2, window_size=CELLS * PIXELS, fullatt_block_indexes=[0],
        initializer_range=0.08,
    )  # fmt: skip
    eyes |= task.shape if task else {}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=eyes, tie_word_embeddings=True, image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end, warm_started_on=task.name if task else None,
    )  # fmt: skip


def warm_start(task, name="tiny", cache=None, fresh=False, train=None):
    """As worlds.tiny's, of a model that reads pictures. train: another way than _supervise()."""
    reader = processor((task.tokenizer or tokenizer)())
    pictures, shape = vision.encode(task, reader), config(name, task)
    recipe = RECIPE | task.recipe | (tiny.UNTRAINED if fresh else {})
    examples = sorted(task.train + task.shown, key=lambda e: e.id)
    drawn = hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in pictures.shown)).hexdigest()
    made_of = [recipe, shape.to_dict(), reader.tokenizer.get_vocab(), torch.__version__, inspect.getsource(train or _supervise)]
    made_of += [tiny.told(task, examples, recipe), drawn]
    make = functools.partial(train or _supervise, task, examples, pictures, recipe, shape)
    return tiny.stored(task, name, made_of, make, reader, cache, fresh)


def _supervise(task, examples, pictures, recipe, shape):
    """Next-token training of a fresh tiny model on demonstrations, completions only."""
    from tqdm import tqdm
    from transformers import Qwen2_5_VLForConditionalGeneration

    rng, own = random.Random(recipe["seed"]), pictures.processor.tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = Qwen2_5_VLForConditionalGeneration(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], betas=(0.9, 0.98))
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    for step in tqdm(range(recipe["steps"]), desc="warm start (once, then cached)", disable=None, leave=False):
        rows = rng.choices(examples, k=recipe["batch"])
        careful = 1.0 if step < recipe["careful_steps"] else recipe["careful"]
        done = own([task.demonstrate(rng, e, careful) for e in rows])["input_ids"]
        sequences = [e.ids + d + [own.eos_token_id] for e, d in zip(rows, done)]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        there = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences]).bool()
        asked = torch.tensor([[len(e.ids)] for e in rows])
        labels = ids.where(there & (torch.arange(width) >= asked), -100)
        hidden = model.model.language_model(**pictures(model, ids, there), attention_mask=there, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state[:, :-1])
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rise.step()
        optimizer.zero_grad()
    return model
