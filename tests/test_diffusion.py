"""Models that see all positions: Policy on them, what other repositories call them, their world, and the canvas."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from common import UserError, diffusion, foreign, models, rewards, rollout, tasks
from common.policy import Policy
from common.worlds import sums, tiny

SMALL = dict(
    vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, head_dim=8, is_causal=False,
)  # fmt: skip
TOKENIZER = tiny.with_mask()
MASK = TOKENIZER.mask_token_id


def wild(config):
    """A random model whose weights say something."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    return lm.eval()


def arguments(place, **more):
    return SimpleNamespace(model=str(place), task=None, dtype="float32", lora_rank=0, gradient_checkpointing=False, **more)


def load(place, denoiser=True):
    models.architecture(arguments(place))
    return models.load(arguments(place), torch.device("cpu"), denoiser=denoiser)


# ---------------------------------------------------------------- Policy


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig])
@torch.no_grad()
def test_a_token_is_guessed_where_it_stands(tmp_path, kind):
    """With all other positions seen, padding left out, and the same after saving and loading."""
    lm = wild(kind(**SMALL))
    lm.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    policy = load(tmp_path)
    assert (policy.packs, policy.shift, policy.lm.config.is_causal) == (False, 0, False)
    ids = torch.randint(3, 70, (2, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, :3] = False
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, [0, 2, 4]] = True
    clean = torch.randint(3, 70, (2, 5), generator=torch.Generator().manual_seed(2))
    logp, entropy = policy(ids, seen, mask, given=clean)
    for i in range(2):
        logits = lm(input_ids=ids[i][seen[i]][None]).logits[0, -5:].log_softmax(-1)
        torch.testing.assert_close(logp[i], logits.gather(1, clean[i, :, None])[:, 0] * mask[i])
        torch.testing.assert_close(entropy[i], -(logits.exp() * logits).sum(-1) * mask[i])
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 70
    assert ((policy(changed, seen, mask, given=clean)[0] - logp)[:, 0].abs() > 1e-3).all()  # what comes behind is seen
    changed = ids.clone()
    changed[1, :3] = 7
    assert torch.equal(policy(changed, seen, mask, given=clean)[0], logp)  # padding is not
    whole = lm(input_ids=ids[:1]).logits
    four = lm(input_ids=ids[:1], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool)).logits
    torch.testing.assert_close(whole, four)


def test_who_needs_which(tmp_path):
    """A causal script would train a model that sees the answer, a sampler of masked positions would guess blindly."""
    for name, causal in (("all", False), ("causal", True)):
        wild(Qwen2Config(**SMALL | dict(is_causal=causal))).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        assert load(tmp_path / name, denoiser=not causal).shift == (1 if causal else 0)
        need = "needs a causal model" if not causal else "is a causal model; this script needs one that sees all positions"
        with pytest.raises(UserError, match=need):
            load(tmp_path / name, denoiser=causal)


def test_a_config_that_lies(tmp_path, monkeypatch):
    """is_causal=False in front of attention that is causal all the same."""
    wild(Qwen2Config(**SMALL)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    from transformers.models.qwen2 import modeling_qwen2

    monkeypatch.setattr(
        modeling_qwen2,
        "create_causal_mask",
        lambda **kwargs: torch.ones(1, 1, *[kwargs["inputs_embeds"].shape[1]] * 2).tril().bool(),
    )
    with pytest.raises(UserError, match="attention is causal, whatever its config says"):
        load(tmp_path)


# ---------------------------------------------------------------- repositories with code of their own


def test_a_llada_is_a_llama(tmp_path):
    """Saved under the names that its repository has; a table with more rows than tokens; no key heads of its own."""
    from safetensors.torch import save_file

    lm = wild(LlamaConfig(**SMALL | dict(num_key_value_heads=4, rope_theta=5e5, tie_word_embeddings=False)))
    of = {
        "model.embed_tokens": "model.transformer.wte", "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out", "self_attn.": "", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out", "model.layers.": "model.transformer.blocks.",
    }  # fmt: skip
    theirs = {}
    for name, weight in lm.state_dict().items():
        for mine, other in of.items():
            name = name.replace(mine, other)
        theirs[name] = weight.contiguous()
    assert "model.transformer.blocks.1.q_proj.weight" in theirs and "model.transformer.blocks.0.ff_out.weight" in theirs
    save_file(theirs, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    fields = dict(
        model_type="llada", architectures=["LLaDAModelLM"], auto_map=dict(AutoConfig="c.LLaDAConfig"), d_model=32, n_layers=2,
        n_heads=4, n_kv_heads=None, mlp_hidden_size=48, max_sequence_length=64, weight_tying=False, vocab_size=77,
        embedding_size=80, rope_theta=5e5, rms_norm_eps=lm.config.rms_norm_eps, mask_token_id=MASK, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    TOKENIZER.save_pretrained(tmp_path)
    policy = load(tmp_path)
    ids = torch.arange(5, 14)[None]
    torch.testing.assert_close(policy.lm(input_ids=ids).logits, lm(input_ids=ids).logits)
    assert policy.shift == 0 and diffusion.mask_id(policy.lm.config, SimpleNamespace(mask_token_id=None), None) == MASK
    assert models.load_tokenizer(arguments(tmp_path)).mask_token_id == MASK
    config, size = models.architecture(arguments(tmp_path))
    assert (config.num_key_value_heads, config.vocab_size, size) == (4, 80, sum(p.numel() for p in lm.parameters()))
    (tmp_path / "config.json").write_text(json.dumps(fields | dict(embedding_size=None)))
    assert foreign.translate(str(tmp_path))[0].vocab_size == 77


@pytest.mark.parametrize("theirs, kind, shift", [("Dream", Qwen2Config, 1), ("a2d-qwen3", Qwen3Config, 0)])
@torch.no_grad()
def test_a_dream_is_a_qwen_whose_logits_are_shifted(tmp_path, theirs, kind, shift):
    """The token at a position is guessed one position before it, and so it stays when a checkpoint of ours is loaded."""
    lm = wild(kind(**SMALL))
    lm.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["is_causal"]
    raw |= dict(model_type=theirs, architectures=["Own"], auto_map=dict(AutoModel="modeling.Own"), mask_token_id=MASK)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    TOKENIZER.save_pretrained(tmp_path)
    policy = load(tmp_path)
    ids, seen, mask = torch.arange(5, 14)[None], torch.ones(1, 9, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    own = lm(input_ids=ids).logits.log_softmax(-1)[0, 5 - shift : 9 - shift].gather(1, ids[0, 5:, None])[:, 0]
    torch.testing.assert_close(policy(ids, seen, mask)[0][0], own)
    policy.lm.save_pretrained(tmp_path / "ours")
    TOKENIZER.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.shift == shift
    assert torch.equal(again(ids, seen, mask)[0], policy(ids, seen, mask)[0])


def test_names():
    assert models.locate("LLaDA-8B") == "GSAI-ML/LLaDA-8B-Instruct" and set(foreign.NAMES) <= set(models.ALIASES)


def test_no_mask_token():
    with pytest.raises(UserError, match="model m: neither its tokenizer nor its config names a mask token"):
        diffusion.mask_id(SimpleNamespace(), tiny.characters(), SimpleNamespace(model="m"))


# ---------------------------------------------------------------- the world, and the canvas


@pytest.mark.parametrize("text, answer, score", [
    ("30+43", "73", 1), ("43+30", "73", 1), ("30+42", "73", 0), ("63+10", "73", 1), ("64+09", "73", 0), ("73", "73", 0),
    ("3+70", "73", 0), ("30+43+00", "73", 0), ("3٣+40", "73", 0), ("", "73", 0), ("+", "73", 0), ("30+ 43", "73", 0),
])  # fmt: skip
def test_rule_of_sums(text, answer, score):
    assert sums.check_pair(text, answer) == (text, score)


def test_demonstrations_of_sums_are_right_and_all_pairs():
    import random

    task, rng = tasks.load("sums"), random.Random(0)
    assert [e.prompt for e in task.train] == [f"{s}=" for s in range(20, 100)] == [e.prompt for e in task.test]
    for e in task.train:
        told = {task.demonstrate(rng, e, 1.0) for _ in range(600)}
        assert all(task.check(t, e.answer)[1] == 1 for t in told)
        assert len(told) == int(e.answer) - 19


def test_any_built_in_task_can_be_one_for_such_models():
    task = diffusion.world("addition")
    config = tiny.config("tiny", task)
    assert config.is_causal is False and config.vocab_size == len(TOKENIZER) and diffusion.world("gsm8k.jsonl") is None
    assert diffusion.world("sums").recipe == tasks.world("sums").recipe


def made(script_args=(), unmask=None):
    lm = wild(Qwen2Config(**SMALL | dict(vocab_size=len(TOKENIZER))))
    args = SimpleNamespace(
        model="m", max_new_tokens=6, denoising_steps=3, block_length=0, micro_batch_tokens=64, seed=1, group_size=3,
        temperature=1.0, format_reward=0.0, eval_prompts=7, eval_samples=0, eval_temperature=1.0,
    )  # fmt: skip
    vars(args).update(script_args)
    return diffusion.Canvas(Policy(lm), TOKENIZER, args, unmask or all_at_once), args


def all_at_once(guess, masked, noise, temperature, args):
    tokens, probabilities = guess(torch.zeros_like(masked, dtype=torch.int64), masked, noise[:, 0], temperature)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    return tokens


def test_a_completion_depends_on_its_own_numbers():
    """Not on what is sampled beside it, in how many passes, or on how long the others' prompts are."""
    engine, args = made()
    prompts = [[5, 6], [7, 8, 9, 10], [11]]
    out = engine.generate(prompts, 3, 6, 1.0, [1, 2, 3])
    assert [len(y) for y, _, _ in out] == [6] * 9 and len({tuple(y) for y, _, _ in out}) == 9
    assert engine.generate(prompts[1:2], 3, 6, 1.0, [2]) == out[3:6]
    args.micro_batch_tokens = 8
    assert engine.generate(prompts, 3, 6, 1.0, [1, 2, 3]) == out
    assert engine.generate(prompts, 3, 6, 1.0, [1, 2, 4])[:6] == out[:6] != out[3:]
    likeliest = engine.generate(prompts, 1, 6, 0.0, [1, 2, 3])
    assert likeliest == engine.generate(prompts, 1, 6, 0.0, [4, 5, 6])
    assert all(MASK not in y for y, _, _ in [*out, *likeliest])


@torch.no_grad()
def test_what_is_guessed_is_the_models_distribution():
    """Every token as often as the model says, without the mask token, and probabilities that are at temperature 1."""
    engine, _ = made()
    engine.lm.lm_head.weight[MASK] *= 50  # it would be the likeliest, here or there
    n, prompts = 4000, torch.tensor([[5, 6]])
    masked = torch.ones(1, 6, dtype=torch.bool)
    canvas = torch.cat([prompts, torch.full((1, 6), MASK)], 1)
    logits = engine.lm(input_ids=canvas).logits[0, 2:]
    assert (logits.argmax(-1) == MASK).any()
    logits[:, MASK] = -torch.inf
    uniform = torch.rand(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    some = partial(engine.guess, engine.lm, prompts.expand(n, -1), torch.ones(n, 2, dtype=torch.bool))
    for temperature in (1.0, 0.5):
        tokens, p = some(torch.zeros(n, 6, dtype=torch.int64), masked.expand(n, -1), uniform, temperature)
        torch.testing.assert_close(p, logits.softmax(-1)[torch.arange(6), tokens], rtol=1e-4, atol=1e-6)
        for place in range(6):
            share = torch.bincount(tokens[:, place], minlength=len(TOKENIZER)) / n
            assert (share - (logits[place] / temperature).softmax(-1)).abs().max() < 0.025


def test_rollouts_and_evaluation_run_on_the_canvas(monkeypatch):
    engine, args = made()
    task = tasks.encode(tasks.world("sums"), TOKENIZER)
    scorer = rewards.Scorer(task.check, inline=True)
    batch = rollout.collect(engine, scorer, TOKENIZER, task.train[:2], args, 0)
    assert batch.mask.shape == (6, 6) and batch.mask.all() and batch.engine == "canvas" and not batch.sampler_logp.any()
    assert torch.equal(batch.truncated, ~(batch.ids[:, 3:] == 1).any(1))
    found = rollout.evaluate(engine, scorer, TOKENIZER, task, args)
    assert found == dict(greedy_accuracy=0.0, prompts=7)


@pytest.mark.parametrize("flags, why", [
    (dict(block_length=4), "--block-length 4 must divide the canvas of --max-new-tokens 6"),
    (dict(block_length=2, denoising_steps=2), "--denoising-steps 2: each of the 3 blocks needs one"),
])  # fmt: skip
def test_blocks_that_do_not_fit(flags, why):
    with pytest.raises(UserError, match=why):
        made(flags)
    made(dict(block_length=2, denoising_steps=6))
