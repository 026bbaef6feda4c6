"""Masked diffusion models whose repositories bring code of their own: which of transformers' models they are, field by field
and weight by weight, so that none of that code has to be run. Written from descriptions of the files and from ports of them;
nobody here has had the files themselves."""

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

# A short name, and its repository on the hub.
NAMES = {
    "llada-8b": "GSAI-ML/LLaDA-8B-Instruct", "dream-7b": "Dream-org/Dream-v0-Instruct-7B",
    "qwen3-0.6b-mdlm": "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
}  # fmt: skip
# What LLaDA's config calls the fields of a Llama.
LLADA = dict(
    d_model="hidden_size", n_layers="num_hidden_layers", n_heads="num_attention_heads", n_kv_heads="num_key_value_heads",
    mlp_hidden_size="intermediate_size", max_sequence_length="max_position_embeddings", weight_tying="tie_word_embeddings",
)  # fmt: skip
# Its weights' names in a block, and what a Llama's are in a layer.
LLADA_BLOCK = {
    "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm", "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}  # fmt: skip
LLADA_WEIGHTS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.", r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
}  # fmt: skip
for theirs, own in LLADA_BLOCK.items():
    LLADA_WEIGHTS[rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\."] = rf"model.layers.\1.{own}."
# model_type in config.json -> (the config of transformers, its fields' names there, its weights' names there, logits_shift)
KINDS = {
    "llada": (LlamaConfig, LLADA, LLADA_WEIGHTS, 0), "Dream": (Qwen2Config, {}, {}, 1),
    "a2d-qwen3": (Qwen3Config, {}, {}, 0), "a2d-qwen2": (Qwen2Config, {}, {}, 0),
}  # fmt: skip
NOT_THEIRS = ("model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "_name_or_path")


def translate(name):
    """A hub id or folder -> (config, key_mapping for from_pretrained) where its model_type is one of the above, else None."""
    raw, _ = PreTrainedConfig.get_config_dict(name)
    if raw.get("model_type") not in KINDS:
        return None
    kind, fields, weights, shift = KINDS[raw["model_type"]]
    own = {fields.get(field, field): value for field, value in raw.items() if field not in NOT_THEIRS}
    if "embedding_size" in own:  # the table may have more rows than there are tokens
        own["vocab_size"] = own.pop("embedding_size") or own["vocab_size"]
    config = kind(**own | dict(is_causal=False, use_cache=True))
    config.logits_shift = raw.get("logits_shift", shift)
    return config, weights
