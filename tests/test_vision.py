"""Pictures: what is read is what transformers reads, packed or not, sampled or scored; whose rows may be anybody's."""

import json
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from algos import grpo_vision
from common import UserError, demonstrations, engines, models, pairs, tables, tasks, vision
from common.batch import collate, read
from common.policy import Policy
from common.worlds import tiny_vision
from tests.helpers import ROOT, checkpoints, lines, run, tiny, user_error

__all__ = ["tiny"]

SCRIPT = ROOT / "algos" / "grpo_vision.py"
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.08, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    bos_token_id=None,
)  # fmt: skip


def reader(merge=2):
    """A Processor as of a real model: patches of 4 pixels, merged by twos, a chat template with turns."""
    own = tiny_vision.tokenizer("\n" + string.printable[:95])
    own.add_special_tokens(dict(additional_special_tokens=["<|im_start|>", "<|im_end|>"]), replace_extra_special_tokens=False)
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    body = tiny_vision.TEMPLATE.removeprefix("{% for m in messages %}").removesuffix("{% endfor %}")
    own.chat_template = turn + body + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    made = tiny_vision.processor(own)
    made.image_processor.merge_size = merge
    return made


def config(kind, own, merge=2):
    """A small one of this kind, as real ones are: heads of their own, patches that are merged, eyes with windows."""
    start, end, image, video = own.convert_tokens_to_ids(list(tiny_vision.SPECIAL))
    ids = dict(image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end)
    eyes = dict(depth=2, hidden_size=64, num_heads=2, intermediate_size=96, out_hidden_size=64, patch_size=4,
                spatial_merge_size=merge, temporal_patch_size=2, initializer_range=0.08)  # fmt: skip
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
    text = TEXT | dict(vocab_size=len(own), rope_parameters=rope)
    if kind == "qwen3_vl":
        text |= dict(head_dim=16, rope_parameters=rope | dict(mrope_interleaved=True))
        eyes |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        return Qwen3VLConfig(text_config=text, vision_config=eyes, tie_word_embeddings=False, **ids)
    eyes |= dict(window_size=16, fullatt_block_indexes=[1])
    return Qwen2_5_VLConfig(text_config=text, vision_config=eyes, tie_word_embeddings=False, **ids)


def noise(rng, *shape):
    return rng.integers(0, 255, (*shape, 3), dtype=np.uint8)


def start(kind, merge=2, videos=True):
    """A random small model with prompts of all sorts: one picture and another behind the same words, none, two, other sizes,
    a video."""
    made, rng = reader(merge), np.random.default_rng(0)
    torch.manual_seed(0)
    lm = AutoModelForImageTextToText.from_config(config(kind, made.tokenizer, merge))
    shown = [[noise(rng, 16, 16)], [noise(rng, 16, 16)], [], [noise(rng, 24, 16), noise(rng, 16, 40)], [noise(rng, 32, 24)]]
    shown += [[noise(rng, 6, 16, 24)]] * videos
    rows = [tasks.Example(i, "how many are there?", "1", pictures=p) for i, p in enumerate(shown)]
    task = tasks.Task("scenes", rows, [], None)
    pictures = vision.encode(task, made)
    policy = vision.look(Policy(lm.eval()), task, pictures)
    return SimpleNamespace(lm=lm, task=task, pictures=pictures, reader=made, policy=policy)


@pytest.fixture(scope="module", params=["qwen2_5_vl:1", "qwen2_5_vl:2", "qwen3_vl:2"])
def s(request):
    kind, _, merge = request.param.partition(":")
    return start(kind, int(merge), videos=kind != "qwen3_vl")


def asked(s, example, completion=()):
    """What transformers' own forward pass gets of an example and a completion."""
    ids = torch.tensor([[*example.ids, *completion]])
    types, fed, pixels = torch.zeros_like(ids), ids.clone(), {}
    for k in dict.fromkeys(-2 - i for i in example.ids if i < -1):
        patches, grid, kind = s.pictures[k]
        types[ids == -2 - k], fed[ids == -2 - k] = vision.KINDS[kind], s.reader.special[vision.KINDS[kind] - 1]
        names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        for name, x in zip(names, (patches, grid[None])):
            pixels[name] = torch.cat([pixels[name], x]) if name in pixels else x
    return dict(input_ids=fed, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels)


def plain(s, example, completion):
    """Log-probs of a completion by transformers' own forward pass of one row."""
    with torch.no_grad():
        out = s.lm(**asked(s, example, completion)).logits[0].log_softmax(-1)
    return [out[len(example.ids) - 1 + t, token].item() for t, token in enumerate(completion)]


def completions(s, n=2):
    """Ragged ones for every prompt, its rows not side by side."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for k in range(n):
        for i, e in enumerate(s.task.train):
            rows.append((e, torch.randint(7, 60, (1 + (3 * i + k) % 7,), generator=draw).tolist()))
    return rows, collate([(e.ids, y) for e, y in rows])


def test_packed_and_padded_are_the_plain_forward_pass(s):
    """Prompts of the same words with other pictures, pictures of several sizes, a video, none at all, in one batch."""
    rows, batch = completions(s)
    expected = [plain(s, e, y) for e, y in rows]
    other = Policy(s.lm)
    other.pictures = s.pictures
    for policy in (s.policy, other):
        with torch.no_grad():
            logp, _ = policy(batch.ids, batch.attention_mask, batch.mask)
        for row, mask, wanted in zip(logp, batch.mask, expected):
            assert row[mask].tolist() == pytest.approx(wanted, abs=1e-5)
        other.pad()
    assert not other.packs and s.policy.packs
    s.policy.lm.set_attn_implementation("packed")  # pad() took it from both


def test_a_picture_is_read_once_and_its_gradient_is_that_of_all_rows(s):
    """Packed, the eyes see each picture once; the gradient of their weights is the plain pass's."""
    rows, batch = completions(s)
    seen = []
    hook = s.lm.model.visual.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    weight = next(p for n, p in s.lm.named_parameters() if "patch_embed" in n)
    grads = []
    for of in ([range(len(rows))], [[i] for i in range(len(rows))]):
        s.lm.zero_grad()
        for some in of:
            part = batch.take(torch.tensor(list(some)))
            s.policy(part.ids, part.attention_mask, part.mask)[0].sum().backward()
        grads.append(weight.grad.clone())
    hook.remove()
    assert seen[0] == sum(len(s.pictures[k][0]) for k in range(len(s.pictures.shown)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * grads[0].abs().max().item())


def test_a_row_is_its_own_in_any_company(s):
    """Left padding, other rows and other pictures beside it change nothing; swapping two pictures swaps their rows."""
    _, batch = completions(s, n=1)
    with torch.no_grad():
        whole, _ = s.policy(batch.ids, batch.attention_mask, batch.mask)
        alone = batch.take(torch.tensor([0]))
        one, _ = s.policy(alone.ids, alone.attention_mask, alone.mask)
        assert (whole[0, : one.shape[1]] - one[0]).abs().max() < 1e-5
        two = batch.take(torch.tensor([0, 1]))
        two.ids[1, -two.mask.shape[1] :] = two.ids[0, -two.mask.shape[1] :]
        two.mask[1] = two.mask[0]
        two.attention_mask[1, -two.mask.shape[1] :] = two.mask[0]
        before, _ = s.policy(two.ids, two.attention_mask, two.mask)
        first, second = two.ids == -2, two.ids == -3
        two.ids[first], two.ids[second] = -3, -2
        after, _ = s.policy(two.ids, two.attention_mask, two.mask)
    assert (before[0] - before[1]).abs().max() > 1e-2
    assert (before.flip(0) - after)[two.mask].abs().max() < 1e-5


def test_greedy_decoding_is_transformers_generate(s):
    """Token for token; and what the sampler says of its samples is what the trainer says."""
    engine = engines.HF(s.policy, s.reader.tokenizer)
    s.lm.generation_config.eos_token_id = engine.end
    out = engine.generate([e.ids for e in s.task.train], 1, 12, 0.0, [0] * len(s.task.train))
    for e, (tokens, _, _) in zip(s.task.train, out):
        barred = [[i] for i in s.reader.special]
        mine = s.lm.generate(
            **asked(s, e), max_new_tokens=12, do_sample=False, bad_words_ids=barred, pad_token_id=0, use_cache=True,
        )[0, len(e.ids) :].tolist()  # fmt: skip
        assert tokens == mine[: len(tokens)] and (len(tokens) == 12 or tokens[-1] in engine.end)
    sampled = engine.generate([e.ids for e in s.task.train], 3, 9, 1.0, [7 + i for i in range(len(s.task.train))])
    rows = [(s.task.train[i // 3].ids, y) for i, (y, _, _) in enumerate(sampled)]
    batch = collate(rows)
    with torch.no_grad():
        logp, _ = s.policy(batch.ids, batch.attention_mask, batch.mask)
    for i, (y, said, _) in enumerate(sampled):
        assert not set(y) & set(s.reader.special)
        # what is barred has its share of the trainer's distribution, and of the sampler's none
        assert (torch.tensor(said) - logp[i][batch.mask[i]]).min() > -1e-5


def test_a_barred_id_is_never_drawn():
    """Whatever the model says: an id of a picture without its patches would break the next forward pass."""
    s = start("qwen2_5_vl")
    end = s.reader.special[2]
    with torch.no_grad():
        s.lm.lm_head.weight.zero_()
        s.lm.lm_head.weight[s.reader.special] = 0.0
        s.lm.lm_head.weight[end] = s.lm.model.language_model.norm.weight  # some hidden states point there
    engine = engines.HF(s.policy, s.reader.tokenizer)
    out = engine.generate([e.ids for e in s.task.train], 40, 8, 1.0, list(range(len(s.task.train))))
    assert not {i for tokens, _, _ in out for i in tokens} & set(s.reader.special)


def test_patches_are_those_of_the_picture():
    """(channel, time, row, column), tokens row by row, in [-1, 1]; a video's times are its frames, the last one twice."""
    rng = np.random.default_rng(3)
    made, frames = reader(merge=1), noise(np.random.default_rng(2), 3, 8, 12)
    pixels, grid, kind = made.patches(frames[0])
    assert grid.tolist() == [1, 2, 3] and kind == "image" and pixels.shape == (6, 3 * 2 * 4 * 4)
    scaled = torch.tensor(frames).float().permute(0, 3, 1, 2) / 127.5 - 1  # [times, channel, row, column]
    for place, row in enumerate(pixels.view(6, 3, 2, 4, 4)):
        i, j = 4 * (place // 3), 4 * (place % 3)
        for time in (0, 1):
            torch.testing.assert_close(row[:, time], scaled[0, :, i : i + 4, j : j + 4], rtol=0, atol=1e-6)
    video, grid, kind = made.patches(frames)
    assert grid.tolist() == [2, 2, 3] and kind == "video"
    for place, row in enumerate(video.view(12, 3, 2, 4, 4)):
        first, i, j = 2 * (place // 6), 4 * (place % 6 // 3), 4 * (place % 3)
        for time in (0, 1):
            now = scaled[min(first + time, 2), :, i : i + 4, j : j + 4]
            torch.testing.assert_close(row[:, time], now, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="of several sizes"):
        made.patches([noise(rng, 8, 8), noise(rng, 8, 12)])


def test_varied_gives_each_row_pictures_of_its_own():
    """Two rows of one prompt, one of them darkened: the other's log-probs stay, and the originals are untouched."""
    s = start("qwen2_5_vl")
    rows = [(s.task.train[3].ids, [20, 21]), (s.task.train[3].ids, [20, 21]), (s.task.train[2].ids, [20, 21])]
    batch = collate(rows)
    args = SimpleNamespace(temperature=1.0, micro_batch_tokens=4096)
    before, _ = read(s.policy, batch, args)
    changed = s.pictures.varied(batch, lambda patches, grid, row: patches * (row != 1))
    assert set(changed.ids[0].tolist()).isdisjoint(i for i in changed.ids[1].tolist() if i < -1)
    assert changed.prompt_id.tolist() == [0, 1, 2]
    after, _ = read(s.policy, changed, args)
    assert (after - before)[0].abs().max() < 1e-5 and (after - before)[2].abs().max() < 1e-5
    assert (after - before)[1].abs().max() > 1e-3
    again, _ = read(s.policy, batch, args)
    torch.testing.assert_close(again, before)


# ---------------------------------------------------------------- rows of files


def saved(folder, kind="qwen2_5_vl", **changes):
    """A model's folder, as from the hub."""
    made = reader()
    torch.manual_seed(1)
    lm = AutoModelForImageTextToText.from_config(config(kind, made.tokenizer))
    for name, value in changes.items():
        setattr(lm.config, name, value)
    lm.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def written(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "rows.jsonl"


def drawn(folder, n=12):
    """Rows with pictures of several sizes in files: one, two with their places in the text, a video's frames, none."""
    rng = np.random.default_rng(5)
    (folder / "img").mkdir()

    def file(name, h, w):
        Image.fromarray(noise(rng, h, w)).save(folder / "img" / name)
        return f"img/{name}"

    rows = []
    for i in range(n):
        row = dict(prompt=f"how many, {i}?", answer=i % 3, image=file(f"{i}.png", 8 * (1 + i % 3), 16))
        if i % 4 == 1:
            row |= dict(prompt=f"is <image> like <image>? {i}", image=[row["image"], file(f"{i}b.png", 16, 24)])
        if i % 4 == 2:
            row["video"] = [file(f"{i}-{k}.png", 16, 16) for k in range(4)]
            del row["image"]
        if i % 4 == 3:
            del row["image"]
        rows.append(row)
    return rows


def test_rows_of_files(tmp_path):
    """Where pictures stand, how many placeholders they have, the template; the same words with other pictures are another
    prompt."""
    rows = drawn(tmp_path)
    rows += [dict(rows[4], image=f"img/{i}.png") for i in (0, 8)]  # the same question
    args = SimpleNamespace(task=str(written(tmp_path, rows)), reward=None, system_prompt="Be brief.")
    args.prompt_template = "Q: {prompt}"
    made = reader()
    task, pictures = vision.load(args, made)
    by = {e.where.rpartition(":")[2]: e for e in task.train + task.test}
    assert len(by) == 14
    start_, end, pad = (made.tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("vision_start", "vision_end", "image_pad"))

    def shown(line):
        ids = by[line].ids
        text = made.tokenizer.decode([i for i in ids if i >= 0])
        return text, [sum(i == n for i in ids) for n in dict.fromkeys(i for i in ids if i < -1)]

    text, sizes = shown("1")
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert text == begin + "<|vision_start|><|vision_end|>Q: how many, 0?<|im_end|>\n<|im_start|>assistant\n"
    assert sizes == [1 * 2]  # 8 x 16 pixels: 2 x 4 patches, merged by 2 x 2
    text, sizes = shown("2")
    assert "Q: is <|vision_start|><|vision_end|> like <|vision_start|><|vision_end|>? 1<" in text and sizes == [2 * 2, 2 * 3]
    assert shown("3")[1] == [2 * 2 * 2] and shown("4")[1] == [] and pad not in by["1"].ids
    assert by["5"].prompt[0]["content"][-1] == by["13"].prompt[0]["content"][-1]  # words
    assert len({tuple(by[n].ids) for n in ("5", "13", "14")}) == 3
    assert pictures[-2 - next(i for i in by["3"].ids if i < -1)][2] == "video"
    for row, line, complaint in (
        (dict(rows[0], image="img/none.png"), 1, "there is no picture .*none.png"),
        (dict(rows[0], image=5), 1, "there is no picture 5"),
        (5, 1, "needs an object with prompt and answer"),
        (dict(rows[0], image="rows.jsonl"), 1, "a picture cannot be read"),
        (dict(rows[0], video=["img/0.png", "img/1.png"]), 1, "several sizes"),
        (dict(rows[0], prompt="<image> and <image>"), 1, "has 1 pictures, and its prompt 2 times <image>"),
    ):
        args.task = str(written(tmp_path, [row, *rows[1:]]))
        with pytest.raises(UserError, match=complaint) as caught:
            vision.load(args, made)
        assert str(caught.value).startswith(f"{args.task}:{line}: ")
    args.task = str(written(tmp_path, [dict(prompt=f"{i}?", answer="1") for i in range(9)]))
    with pytest.raises(UserError, match="none of its rows has a picture"):
        vision.load(args, made)
    made.tokenizer.chat_template = "{% for m in messages %}text{% endfor %}"
    args.task = str(written(tmp_path, rows))
    with pytest.raises(UserError, match="has 1 pictures, and its prompt 0 places for them"):
        vision.load(args, made)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_user_s_own_pictures_and_model(kind, tmp_path):
    """A model from a folder, rows with pictures; the checkpoint loads again, and has what reads pictures."""
    rows = [row for row in drawn(tmp_path) if kind == "qwen2_5_vl" or "video" not in row]
    folder = saved(tmp_path / "model", kind)
    (tmp_path / "reward.py").write_text("def length(text, answer):\n    return float(len(text))\n")
    flags = "--prompts-per-step 4 --group-size 2 --minibatches 2 --max-new-tokens 5 --eval-prompts 2 --dtype float32".split()
    flags += "--optimizer adamw --lr 1e-3 --temperature 0.7 --micro-batch-tokens 256 --beta 0.01".split()
    flags += ["--task", written(tmp_path, rows), "--reward", f"{tmp_path}/reward.py:length"]
    own = ["--run-dir", tmp_path / "run", "--steps", 2]
    done = run(tmp_path, "--model", folder, *own, *flags, script=SCRIPT)
    assert done.code == 0, done.err[-2000:]
    last = checkpoints(tmp_path / "run")[-1]
    assert "memory plan" in done.out and (last / "preprocessor_config.json").exists()
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    # Random models would say what is barred in a few of a hundred tokens, which the sampler's log-probs leave out.
    assert max(m["sampler_gap"] for m in metrics) < 0.15 and max(m["grad_norm"] for m in metrics) > 0
    loads = AutoModelForImageTextToText.from_pretrained
    before, (after, told) = loads(folder), loads(last, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    moved = {n for (n, a), b in zip(before.named_parameters(), after.parameters()) if (a != b).any()}
    assert any("visual.blocks" in n for n in moved) and any("language_model.layers" in n for n in moved)
    again = run(tmp_path, "--model", last, "--run-dir", tmp_path / "again", *flags, "--steps", 0, script=SCRIPT)
    assert again.code == 0 and "evaluation only" in again.out, again.err[-2000:]


def test_what_has_no_eyes_is_refused_and_what_has_some_elsewhere(tmp_path):
    """One line, before anything is made; a script without pictures refuses a model that reads them, as before."""
    folder = saved(tmp_path / "model")
    task = written(tmp_path, [dict(prompt=str(i), answer=1) for i in range(9)])
    said = user_error(run(tmp_path, "--model", folder, "--task", task))
    assert "qwen2_5_vl reads images or sound, which this script does not give it" in said
    said = user_error(run(tmp_path, "--model", "tiny", "--task", "addition", script=SCRIPT))
    assert "qwen2 reads no pictures, which this script is about" in said
    said = user_error(run(tmp_path, "--model", folder, script=SCRIPT))
    assert "--task: give rows with image, prompt and answer" in said
    (folder / "preprocessor_config.json").unlink()
    said = user_error(run(tmp_path, "--model", folder, "--task", task, script=SCRIPT))
    assert "it has nothing that reads pictures" in said


def test_eyes_that_are_read_wrongly_are_refused(monkeypatch):
    """The check on the first picture: here Policy's layers get places as of plain text."""
    s = start("qwen2_5_vl")
    assert vision.look(s.policy, s.task, s.pictures) is s.policy
    flat = lambda self, lm, ids, attention_mask: (attention_mask.cumsum(1) - 1).expand(3, *ids.shape)  # noqa: E731
    monkeypatch.setattr(vision.Pictures, "_positions", flat)
    with pytest.raises(UserError, match="nat off those of transformers"):
        vision.look(s.policy, s.task, s.pictures)


def test_frozen_eyes_get_no_gradient():
    """And the rest has some."""
    s = start("qwen2_5_vl")
    vision.look(s.policy, s.task, s.pictures, frozen=True)
    _, batch = completions(s)
    s.policy(batch.ids, batch.attention_mask, batch.mask)[0].sum().backward()
    grads = {n: p.grad for n, p in s.lm.named_parameters()}
    assert all((g is None) == ("visual" in n) for n, g in grads.items())


def test_rows_that_see_nothing_still_run_the_eyes():
    """Sharded weights need all processes: there the gradient is 0, not missing."""
    s = start("qwen2_5_vl")
    batch = collate([(s.task.train[2].ids, [20, 21])])
    s.policy(batch.ids, batch.attention_mask, batch.mask)[0].sum().backward()
    grads = [p.grad for n, p in s.lm.named_parameters() if "visual" in n]
    assert all(g is not None and not g.any() for g in grads)


def test_a_photograph_is_turned_as_its_file_says(tmp_path):
    """Cameras write how they were held; a wide picture that is to be turned is a high one."""
    turned = Image.Exif()
    turned[274] = 6  # orientation: by a quarter
    Image.fromarray(noise(np.random.default_rng(0), 8, 24)).save(tmp_path / "a.jpg", exif=turned)
    assert reader(merge=1).patches(str(tmp_path / "a.jpg"))[1].tolist() == [1, 6, 2]


def test_names_of_models_that_read_pictures():
    names = {"qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
    for name, repository in (names | {"qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct"}).items():
        assert models.locate(name) == repository


def test_large_pictures_are_made_smaller(tmp_path):
    """To at most so many tokens, of merged patches; a checkpoint's pictures will be, too."""
    args = grpo_vision.Args(model=str(saved(tmp_path / "model")), image_tokens=20)
    made = vision.load_processor(args, args.image_tokens)
    picture = noise(np.random.default_rng(0), 200, 120)
    pixels, grid, _ = made.patches(picture)
    assert len(pixels) == grid.prod() and 12 <= len(pixels) / 4 <= 20 and grid[1] > grid[2]
    assert len(reader().patches(picture)[0]) == 50 * 30
    made.save_pretrained(tmp_path)
    again = vision.Processor(made.tokenizer, AutoImageProcessor.from_pretrained(tmp_path))
    torch.testing.assert_close(again.patches(picture)[0], pixels)


def test_more_videos_than_positions():
    """The places of a video are the same in a batch of many short rows."""
    s = start("qwen2_5_vl")
    batch = collate([(s.task.train[5].ids, [20])] * 90)
    assert len(batch.ids) > batch.ids.shape[1]
    with torch.no_grad():
        places = s.pictures(s.lm, batch.ids, batch.attention_mask)["position_ids"]
    alone = s.pictures(s.lm, batch.ids[:1], batch.attention_mask[:1])["position_ids"]
    assert (places == alone).all()


def test_videos_of_qwen3_vl_are_refused():
    with pytest.raises(UserError, match="task scenes: has videos, which Qwen3-VL reads with time stamps"):
        start("qwen3_vl", videos=True)


@pytest.mark.parametrize("field", ["image", "images", "video"])
@pytest.mark.parametrize("parse", [tables.prompt_and_answer, pairs._row, demonstrations._row])
def test_scripts_of_text_refuse_rows_with_pictures(field, parse):
    """Else they would learn to answer without looking; a column that is empty does no harm."""
    row = dict(prompt="how many?", answer="2", chosen="2", rejected="3", completion="2")
    assert parse(row | {field: None}, "a:1") == parse(row, "a:1")
    with pytest.raises(UserError, match=f"a:1: has the field {field}, and this script reads no pictures"):
        parse(row | {field: ["a.png"]}, "a:1")


def test_a_world_of_pictures_is_none_for_a_model_of_text(tiny, tmp_path):
    said = user_error(run(tmp_path, "--model", tiny, "--task", "count_sum", "--max-new-tokens", 9))
    assert said == "task count_sum: its prompts have pictures, which this script does not read"
