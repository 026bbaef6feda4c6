"""Models that Policy does not know by heart: what models.load lets in has the log-probs that transformers has."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from common import UserError, checkpoint, export, models
from common.worlds import tiny

SMALL = dict(
    vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2, head_dim=16,
)  # fmt: skip


def folder(place, kind, dtype=torch.float32, **changes):
    """A random model of a kind, with weights that say something, and the tiny tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | changes)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if "norm" in name and "weight" in name else 0.0))
    lm.save_pretrained(place)
    tiny.characters().save_pretrained(place)
    return SimpleNamespace(model=str(place), dtype=str(dtype).removeprefix("torch."), lora_rank=0, gradient_checkpointing=False)


def load(args):
    models.architecture(args)
    return models.load(args, torch.device("cpu"))


def log_probs(policy):
    """A ragged batch by Policy, and row by row by transformers."""
    ids = torch.randint(3, 70, (4, 12), generator=torch.Generator().manual_seed(1))
    ids[3, :6] = ids[0, :6]
    seen = torch.ones(4, 12, dtype=torch.bool)
    seen[1, :3] = seen[2, 9:] = False
    mask = seen[:, 6:]
    mine, own = policy(ids, seen, mask)[0], torch.zeros(mask.shape)
    for i in range(4):
        row = ids[i][seen[i]]
        n = int(mask[i].sum())
        logits = policy.lm(input_ids=row[None]).logits[0]
        own[i, :n] = logits.log_softmax(-1)[-n - 1 : -1].gather(1, row[-n:, None])[:, 0]
    return mine[mask], own[mask]


@pytest.mark.parametrize("kind, packs", [
    ("qwen2", True), ("qwen3", True), ("llama", True), ("olmo2", True), ("mistral", None), ("gemma3_text", None),
    ("phi3", None), ("stablelm", False), ("smollm3", None), ("qwen3_moe", None),
])  # fmt: skip
@torch.no_grad()
def test_what_is_let_in_has_its_own_log_probs(tmp_path, kind, packs):
    more = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32) if kind == "qwen3_moe" else {}
    policy = load(folder(tmp_path, kind, **more))
    assert packs is None or policy.packs == packs
    mine, own = log_probs(policy)
    assert len(mine) == 21 and own.std() > 0.3
    torch.testing.assert_close(mine, own, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, changes, why", [
    ("gemma2", {}, "soft cap"), ("gemma3_text", dict(final_logit_softcapping=3.0), "soft cap"),
    ("granite", dict(logits_scaling=4.0), "a scale"), ("cohere", {}, "a scale"),
])  # fmt: skip
def test_what_would_be_wrong_in_silence_is_refused(tmp_path, kind, changes, why, dtype):
    with pytest.raises(UserError, match=why) as caught:
        load(folder(tmp_path, kind, dtype, **changes))
    assert str(caught.value).count("\n") == 0 and "so that Policy would train on other log-probs" in str(caught.value)


@pytest.mark.parametrize("kind, why", [
    ("phi", "a head with a bias"), ("opt", "none that Policy knows"), ("jamba", "recurrent layers"),
    ("lfm2", "recurrent layers"), ("qwen3_next", "recurrent layers"),
    ("qwen2_5_vl", "images or sound"), ("gemma3", "images or sound"),
])  # fmt: skip
def test_what_no_script_can_train_is_refused_by_its_config(tmp_path, kind, why):
    more = dict(layer_types=["conv", "full_attention"]) if kind == "lfm2" else {}
    more = {} if kind in ("qwen2_5_vl", "gemma3") else SMALL | more
    AutoConfig.for_model(kind, **more).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"the architecture {kind} .*{why}"):
        models.architecture(SimpleNamespace(model=str(tmp_path)))


def test_a_known_model_in_bfloat16_is_let_in(tmp_path):
    assert load(folder(tmp_path, "qwen2", torch.bfloat16)).packs


def test_no_dropout_in_training(tmp_path):
    """The config's stays as it is; the model in training mode gives the same twice, and DPO's first margin is 0."""
    args = folder(tmp_path, "qwen2", attention_dropout=0.5)
    policy = load(args)
    assert policy.lm.training and policy.lm.config.attention_dropout == 0.5
    with torch.no_grad():
        a, b = (log_probs(policy)[0] for _ in range(2))
    assert torch.equal(a, b)


def test_generation_settings_cost_no_checkpoint(tmp_path):
    args = folder(tmp_path, "qwen2")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(dict(do_sample=False, temperature=0.6, eos_token_id=[1, 5])))
    policy = load(args)
    export.write_weights(policy.lm, policy.lm.state_dict().items(), tmp_path)
    assert models.end_tokens(policy.lm, models.load_tokenizer(args)) == [1, 5]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1, 5] and checkpoint._key(policy)


def test_a_pad_token_outside_the_vocabulary(tmp_path):
    args = folder(tmp_path, "qwen2")
    tokenizer = tiny.characters()
    tokenizer.add_special_tokens(dict(pad_token="<later>"))
    tokenizer.add_tokens([f"<{i}>" for i in range(10)])
    tokenizer.add_special_tokens(dict(pad_token="<last>"))
    assert tokenizer.pad_token_id >= 80
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer(args).pad_token_id == 1
    tokenizer.add_special_tokens(dict(eos_token="<last>"))
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its end-of-sequence token 8[0-9] is none of its 80 tokens"):
        models.load_tokenizer(args)


def test_what_is_no_parameter_is_in_the_checkpoint(tmp_path):
    """The bias of a mixture's router, which balances its experts: it is a buffer, and without it other experts are taken."""
    more = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=0, n_group=1,
                topk_group=1, n_shared_experts=1)  # fmt: skip
    args = folder(tmp_path / "first", "glm4_moe", **more)
    policy = load(args)
    biases = {n: b for n, b in policy.lm.named_buffers() if n.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    with torch.no_grad():
        before = log_probs(policy)[0]
        for bias in biases.values():
            bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(2)))
        mine = log_probs(policy)[0]
    assert (mine - before).abs().max() > 0.01
    (tmp_path / "second").mkdir()
    export.write_weights(policy.lm, export.full_weights(policy), tmp_path / "second")
    tiny.characters().save_pretrained(tmp_path / "second")
    args.model = str(tmp_path / "second")
    with torch.no_grad():
        torch.testing.assert_close(log_probs(load(args))[0], mine)


# ---------------------------------------------------------------- what would be made up, lost or noisy


def test_weights_that_are_in_no_file_are_refused(tmp_path):
    """transformers would draw them at random, and say so in a warning: a head that is missing, names of another class."""
    from safetensors.torch import load_file, save_file

    args = folder(tmp_path, "qwen2", tie_word_embeddings=False)
    weights = load_file(tmp_path / "model.safetensors")
    for gone in ("lm_head.weight", "layers.1.self_attn.q_proj.weight", ""):
        kept = {k if gone else f"foo.{k}": v for k, v in weights.items() if not gone or gone not in k}
        save_file(kept, tmp_path / "model.safetensors", metadata=dict(format="pt"))
        with pytest.raises(UserError, match=f"of its weights are in no file, the first of them .*{gone}"):
            load(args)
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    load(args)


@pytest.mark.parametrize("kind, more", [
    ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
])  # fmt: skip
def test_lora_on_experts_is_merged_into_the_checkpoint(tmp_path, kind, more):
    """Experts are one parameter, which peft wraps in its own way: without a merge a checkpoint would have no experts."""
    args = folder(tmp_path / "first", kind, **more)
    args.lora_rank, args.lora_alpha, args.lora_targets = 4, None, "all-linear"
    policy = load(args)
    with torch.no_grad():
        before = log_probs(policy)[0]
        for name, weight in policy.lm.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        mine = log_probs(policy)[0]
        full = {k: v.contiguous() for k, v in export.full_weights(policy)}
    assert (mine - before).abs().max() > 0.1 and any("experts" in name for name in full)
    (tmp_path / "second").mkdir()
    export.write_weights(policy.lm, full.items(), tmp_path / "second")
    tiny.characters().save_pretrained(tmp_path / "second")
    args.model, args.lora_rank = str(tmp_path / "second"), 0
    with torch.no_grad():
        torch.testing.assert_close(log_probs(load(args))[0], mine, rtol=0, atol=1e-3)


def test_no_noise_of_routers_in_training(tmp_path):
    args = folder(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3)
    policy = load(args)
    with torch.no_grad():
        assert policy.lm.training and torch.equal(*(log_probs(policy)[0] for _ in range(2)))


def test_what_a_model_freezes_stays_frozen(tmp_path):
    """Its bias that balances experts is not trained by a gradient, and clip_gradients would miss one."""
    args = folder(tmp_path, "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=0)
    frozen = [n for n, p in load(args).lm.named_parameters() if not p.requires_grad]
    assert frozen and all("bias" in n for n in frozen)


@pytest.mark.parametrize("changes, why", [
    (dict(hidden_act="nope"), "cannot build what its config describes"),
    (dict(pad_token_id=500), "cannot build what its config describes"),
])  # fmt: skip
def test_a_config_that_describes_nothing(tmp_path, changes, why):
    folder(tmp_path, "qwen2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=why):
        models.architecture(SimpleNamespace(model=str(tmp_path)))


def test_ends_that_are_no_numbers(tmp_path):
    args = folder(tmp_path, "qwen2")
    policy = load(args)
    policy.lm.generation_config.eos_token_id = "x"
    with pytest.raises(UserError, match="eos_token_id is 'x'"):
        models.end_tokens(policy.lm, models.load_tokenizer(args))


def test_a_model_with_attention_of_its_own_is_padded(tmp_path):
    """gpt_oss has sinks in its attention, which torch's has not: it keeps the one that it was loaded with."""
    policy = load(folder(tmp_path, "gpt_oss", num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2))
    assert not policy.packs and policy.lm.config._attn_implementation == policy.plain
    torch.testing.assert_close(*log_probs(policy), rtol=0, atol=2e-4)
