"""Vision: models that read pictures. What an example shows, the token ids that stand for it, and what the layers get there."""

import dataclasses
import functools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, utils

from common import UserError, encoding, models, reason, tables, tasks

MARK = "<image>"  # where in a prompt a picture stands; pictures without a mark stand before it
KINDS = dict(image=1, video=2)  # as transformers numbers them
FILES = ("video_preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja")
CACHED = 2**28  # bytes of patches that are kept


class Processor:
    """A tokenizer with what cuts pictures into patches. AutoProcessor does both at once, and needs torchvision for videos."""

    def __init__(self, tokenizer, image_processor, source=None):
        self.tokenizer, self.image_processor, self.source = tokenizer, image_processor, source
        names = [f"<|{name}|>" for name in ("image_pad", "video_pad", "vision_start", "vision_end")]
        self.special = tokenizer.convert_tokens_to_ids(names)
        if None in self.special or tokenizer.unk_token_id in self.special:
            raise UserError(f"the tokenizer has no {' '.join(names)}; Qwen2.5-VL's and Qwen3-VL's will do")

    def patches(self, shown):
        """shown: a picture (path or array [H, W, 3]), or a video, the list or array of its frames -> (patches [n, dim],
        grid [3]: times, rows, columns of patches, kind). A patch is of two frames, which of a picture are alike."""
        frames = [shown] if _kind(shown) == "image" else shown
        made = [self.image_processor(images=[_opened(frame)], return_tensors="pt") for frame in frames]
        pixels, grid = made[0]["pixel_values"], made[0]["image_grid_thw"][0].clone()
        if _kind(shown) == "image":
            return pixels, grid, "image"
        if any(not torch.equal(m["image_grid_thw"][0], grid) for m in made):
            raise UserError("the frames of a video are of several sizes")
        deep = self.image_processor.temporal_patch_size
        made += made[-1:] * (-len(made) % deep)
        made = [m["pixel_values"].view(len(pixels), -1, deep, self.image_processor.patch_size**2) for m in made]
        pixels = [torch.stack([m[:, :, 0] for m in made[i : i + deep]], 2).flatten(1) for i in range(0, len(made), deep)]
        grid[0] = len(pixels)
        return torch.cat(pixels), grid, "video"

    def decode(self, ids, **how):
        """As the tokenizer's."""
        return self.tokenizer.decode(ids, **how)

    def save_pretrained(self, folder):
        """Both, and what AutoProcessor has in files besides."""
        for name in FILES if self.source else ():
            if found := utils.cached_file(self.source, name, _raise_exceptions_for_missing_entries=False):
                shutil.copy(found, folder)
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _opened(frame):
    return frame if isinstance(frame, np.ndarray) else ImageOps.exif_transpose(Image.open(frame)).convert("RGB")


class Pictures:
    """The pictures of a task, by number: token id -2 - k is a placeholder of picture k, so that ids alone say what a row sees:
    prompts are shared and told apart, cut and shared out like any others. As a function: what the layers of `lm` get for ids
    [b, S] of which attention_mask [b, S] are read, or of these the ones to `keep` [b, S] -> dict with inputs_embeds [b, S, H],
    or [1, N, H], and position_ids [3, ...]. A picture goes through the eyes once, however many rows see it."""

    def __init__(self, processor):
        self.processor, self.shown, self.own, self.sizes, self.barred = processor, [], {}, {}, processor.special
        self._cached = functools.lru_cache(None)(lambda number: processor.patches(self.shown[number]))

    def __getitem__(self, number):
        """-> (patches [n, dim], grid [3], kind)."""
        found = self.own.get(number) or self._cached(number)
        if self._cached.cache_info().currsize * found[0].nbytes > CACHED:
            self._cached.cache_clear()
        return found

    def tokens(self, number):
        """The token ids that stand for a picture."""
        like = getattr(self.shown[number], "shape", number)  # arrays of one shape have equally many
        if like not in self.sizes:
            self.sizes[like] = int(self[number][1].prod()) // self.processor.image_processor.merge_size**2
        return [-2 - number] * self.sizes[like]

    def varied(self, batch, change):
        """The batch, each row with pictures of its own: change(patches, grid, row) -> patches. Until the next call."""
        numbers, ids = {}, batch.ids.clone()
        for row, all_ids in enumerate(batch.ids.tolist()):
            for number in dict.fromkeys(-2 - i for i in all_ids if i < -1):
                numbers[row, number] = len(self.shown) + len(numbers)
        self.own = {}
        for (row, old), new in numbers.items():
            patches, grid, kind = self[old]
            self.own[new] = change(patches, grid, row), grid, kind
            ids[row][batch.ids[row] == -2 - old] = -2 - new
        return dataclasses.replace(batch, ids=ids, prompt_id=torch.arange(len(ids), device=ids.device))

    def __call__(self, lm, ids, attention_mask, keep=None):
        kept = ids if keep is None else ids[keep][None]
        x, seen = lm.get_input_embeddings()(kept.clamp(min=0)), kept < -1
        numbers, which = (-2 - kept[seen]).unique(return_inverse=True)
        # Every process runs its eyes, whether its rows see something or not: sharded weights need all of them.
        found, looked = {}, [self[k] for k in (numbers.tolist() or [0] * bool(self.shown))]
        if looked:
            pixels, grids = torch.cat([p for p, *_ in looked]), torch.stack([g for _, g, _ in looked])
            found = lm.model.get_image_features(pixels.to(x.device, x.dtype), grids.to(x.device), return_dict=True)
            sizes = torch.tensor([len(f) for f in found["pooler_output"]], device=x.device)
            order = which.argsort(stable=True)  # placeholder j of a picture is its token j, in whatever rows they stand
            begun = (which.bincount(minlength=len(sizes)).cumsum(0) - which.bincount(minlength=len(sizes)))[which[order]]
            place = torch.empty_like(which).scatter_(0, order, torch.arange(len(which), device=x.device) - begun)
            index = (sizes.cumsum(0) - sizes)[which] + place % sizes[which]
            features = torch.cat(found["pooler_output"]).to(x.dtype)
            x = x.masked_scatter(seen[:, :, None], torch.nn.functional.embedding(index, features))
        deep = [torch.nn.functional.embedding(index, torch.cat(f)) for f in found.get("deepstack_features") or ()]
        more = dict(visual_pos_masks=seen, deepstack_visual_embeds=deep) if deep else {}
        positions = self._positions(lm, ids, attention_mask)
        return dict(inputs_embeds=x, position_ids=positions if keep is None else positions[:, keep][:, None], **more)

    def _positions(self, lm, ids, attention_mask):
        """M-RoPE's places [3, b, S]: of text in all three rows the same, of a patch its time, row and column."""
        types, grids = torch.zeros_like(ids), {kind: [] for kind in KINDS}
        rows, columns = (attention_mask & (ids < -1)).nonzero(as_tuple=True)
        for number in dict.fromkeys(zip(rows.tolist(), ids[rows, columns].tolist())):
            _, grid, kind = self[-2 - number[1]]
            types[number[0]][ids[number[0]] == number[1]] = KINDS[kind]
            grids[kind].append(grid)
        given = {f"{kind}_grid_thw": torch.stack(g).to(ids.device) for kind, g in grids.items() if g}
        given |= dict(second_per_grid_ts=[1] * len(grids["video"]))  # two frames a second; left out, it has one per position
        return lm.model.get_rope_index(ids, mm_token_type_ids=types, attention_mask=attention_mask, **given)[0]


def seeing_row(folder, prompt_template, row, where):
    """An object with image (a path, or a list of them; beside the file) or video (a list of frames' paths), prompt and answer
    -> (messages, answer, where): text with <image> in it has its pictures there, else they stand before it."""
    words = {k: x for k, x in row.items() if k not in tables.PICTURES} if isinstance(row, dict) else row
    prompt, answer, where = tables.prompt_and_answer(words, where)

    def places(paths):
        paths = paths if isinstance(paths, list) else [paths] if paths else []
        if gone := [p for p in paths if not isinstance(p, str) or not os.path.isfile(os.path.join(folder, p))]:
            raise UserError(f"{where}: there is no picture {gone[0]}")
        return [os.path.join(folder, p) for p in paths]

    shown = places(row.get("image") or row.get("images")) + ([places(row["video"])] if row.get("video") else [])
    before, text = (prompt[:-1], prompt[-1]["content"]) if isinstance(prompt, list) else ([], prompt)
    if isinstance(prompt, str) or prompt_template:
        text = encoding.fill(prompt_template or tasks.CHAT_TEMPLATE, [text])[0]
    parts, pieces = [{"type": _kind(x), _kind(x): x} for x in shown], text.split(MARK)
    if len(pieces) not in (1, len(parts) + 1):
        raise UserError(f"{where}: has {len(parts)} pictures, and its prompt {len(pieces) - 1} times {MARK}")
    texts = [dict(type="text", text=piece) for piece in pieces]
    said = [texts[0], *(x for both in zip(parts, texts[1:]) for x in both)] if len(pieces) > 1 else [*parts, *texts]
    return [*before, dict(role="user", content=said)], answer, where


def _kind(shown):
    return "video" if isinstance(shown, list) or getattr(shown, "ndim", 3) == 4 else "image"


def encode(task, processor, prompt_template=None, system_prompt=None):
    """Fills in the token ids of a task's examples, through the chat template -> their Pictures. What an example shows is in
    its `pictures` (see Processor.patches), or in its prompt, as seeing_row() writes it. UserError, with its place, where a
    picture cannot be read, or where there is no place for it."""
    examples, pictures, tokenizer, texts = task.train + task.test + task.shown, Pictures(processor), processor.tokenizer, []
    system, places = [dict(role="system", content=system_prompt)] * bool(system_prompt), []
    for e in examples:
        places.append(e.where or f"task {task.name}")
        if isinstance(e.prompt, str):
            text = encoding.fill(prompt_template or task.template, [e.prompt])[0]
            turns = [dict(role="user", content=[*(dict(type=_kind(x)) for x in e.pictures), dict(type="text", text=text)])]
        else:
            turns = e.prompt
            e.pictures = [c[c["type"]] for c in turns[-1]["content"] if c["type"] in KINDS]
        pictures.shown += e.pictures
        try:
            texts.append(tokenizer.apply_chat_template(system + turns, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # jinja's own, and what a template raises
            raise UserError(f"{places[-1]}: the chat template refuses the prompt: {reason(error)}") from None

    def tokens(number):
        try:
            return pictures.tokens(number)
        except (Exception, UserError) as error:  # of a file that is no picture
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(tokens, range(len(pictures.shown)))
    for e, place, ids in zip(examples, places, encoding.tokenize(texts, tokenizer, places, add_special_tokens=False)):
        own = [next(found) for _ in e.pictures]
        if wrong := [reason(x) for x in own if not isinstance(x, list)]:
            raise UserError(f"{place}: a picture cannot be read ({wrong[0]})")
        if (marks := sum(i in processor.special[:2] for i in ids)) != len(own):
            raise UserError(f"{place}: has {len(own)} pictures, and its prompt {marks} places for them")
        own = iter(own)
        e.ids = [t for i in ids for t in (next(own) if i in processor.special[:2] else [i])]
    return pictures


def load_processor(args, image_tokens, warm=None):
    """The Processor of `args.model`; a picture of more than so many tokens is made smaller. `warm`: what a tiny model is
    warm-started on (tasks.warmed)."""
    tokenizer = models.load_tokenizer(args, warm)
    try:
        eyes = AutoImageProcessor.from_pretrained(tokenizer.name_or_path)
        most = image_tokens * (eyes.patch_size * eyes.merge_size) ** 2
        eyes.size = type(eyes.size)(**{k: min(eyes.size[k], most) for k in ("shortest_edge", "longest_edge")})
    except Exception as error:
        raise UserError(f"model {args.model}: it has nothing that reads pictures ({reason(error)})") from None
    return Processor(tokenizer, eyes, tokenizer.name_or_path)


def load(args, processor, task=None):
    """-> (the task called args.task, or a script's own, with token ids, and its Pictures)."""
    if args.task is None:
        raise UserError("--task: give rows with image, prompt and answer: --task path/to/rows.jsonl")
    parse = functools.partial(seeing_row, os.path.dirname(args.task), args.prompt_template)
    task = task or tasks.load(args.task, reward=args.reward, parse=parse)
    pictures = encode(task, processor, args.prompt_template, args.system_prompt)
    if pictures.shown:
        return task, pictures
    raise UserError(f"task {task.name}: none of its rows has a picture: give image, or video")


def look(policy, task, pictures, frozen=False):
    """Gives a Policy, before it is sharded, the pictures of its task, and checks on one that it reads them as transformers does
    -> the policy. `frozen`: its eyes are not trained."""
    policy.pictures, lm = pictures, policy.lm
    for weight in lm.model.visual.parameters() if frozen else ():
        weight.requires_grad_(False)
    if lm.config.model_type.startswith("qwen3") and any(_kind(x) == "video" for x in pictures.shown):
        raise UserError(f"task {task.name}: has videos, which Qwen3-VL reads with time stamps, and this script without")
    seen = [e for e in task.train if e.pictures]
    if seen:
        gap, rough = _gap(policy, min(seen, key=lambda e: len(e.ids))), lm.dtype.itemsize < 4
        if not gap < (0.2 if rough else 1e-3):
            raise UserError(f"the model's log-probs behind a picture are {gap:.2g} nat off those of transformers")
    return policy


@torch.no_grad()
def _gap(policy, example):
    """Nats between the log-probs of Policy and of transformers' own forward pass, of an example's last prompt token."""
    lm, pictures = policy.lm, policy.pictures
    ids = torch.tensor([example.ids], device=lm.device)
    seen, plain = torch.ones_like(ids).bool(), ids.clone()
    types, given = torch.zeros_like(ids), {}
    for number in dict.fromkeys(-2 - i for i in example.ids if i < -1):
        pixels, grid, kind = pictures[number]
        types[ids == -2 - number] = KINDS[kind]
        plain[ids == -2 - number] = pictures.processor.special[KINDS[kind] - 1]
        names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        for name, x in zip(names, (pixels.to(lm.device, lm.dtype), grid.to(lm.device)[None])):
            given[name] = torch.cat([given[name], x]) if name in given else x
    logits = lm(input_ids=plain, attention_mask=seen.long(), mm_token_type_ids=types, **given).logits[0, -2].float()
    return (policy(ids, seen, seen[:, -1:])[0] - logits.log_softmax(-1)[ids[0, -1]]).abs().item()
