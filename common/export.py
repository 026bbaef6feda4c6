"""A model's weights, whole, one after another: for the sampler's copy, and into files."""

import json
import os

from safetensors.torch import save_file

from common import gpu

FILE = 2**30  # bytes of a file of a model: what one process holds of the whole while it writes one


def full_weights(policy):
    """(name, whole tensor) of every weight of policy.lm under its Hugging Face name, LoRA merged, `lm_head.weight` also
    where it is tied to the embeddings, and of what else its checkpoints hold (the bias that balances a router's experts). A
    collective: every rank must run through it."""
    lm = policy.lm
    kept = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        if name in kept:
            yield name.replace(".base_layer.", "."), gpu.whole(buffer)
    for name, tensor in [(n, p) for n, p in lm.named_parameters() if ".lora_" not in n]:
        weight = gpu.whole(tensor.detach())
        if name.endswith(".base_layer.weight"):
            module = lm.get_submodule(name.removesuffix(".base_layer.weight"))
            a, b = (gpu.whole(x["default"].weight.detach()) for x in (module.lora_A, module.lora_B))
            weight = weight + (module.scaling["default"] * (b.float() @ a.float())).to(weight.dtype)
        elif ".base_layer." in name:  # experts in one parameter: peft wraps their module once for each
            module = lm.get_submodule(name.partition(".base_layer.")[0])
            while hasattr(module, "base_layer"):
                if getattr(module, "parameter_name", None) == name.rpartition(".")[2]:
                    weight = weight + module.get_delta_weight("default").to(weight.dtype)
                module = module.base_layer
        while ".base_layer." in name:
            name = name.replace(".base_layer.", ".")
        yield name, weight
    if lm.config.tie_word_embeddings:
        yield "lm_head.weight", gpu.whole(lm.get_input_embeddings().weight.detach())


def write_weights(lm, weights, folder):
    """config.json and model.safetensors (above FILE bytes several, and an index) of a model that transformers loads, from its
    (name, tensor) as they come; a tied head is stored once. folder None: this process only runs through them."""
    part, parts = {}, []

    def write():
        save_file(part, folder / f"{len(parts)}.part", metadata=dict(format="pt"))
        parts.append(list(part))
        part.clear()

    for name, weight in weights:
        if not folder or lm.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if part and sum(x.nbytes for x in part.values()) + weight.nbytes > FILE:
            write()
        part[name] = weight.cpu().contiguous()
    if not folder:
        return
    write()
    lm.config.architectures = lm.config.architectures or [type(lm).__name__]  # vLLM and TRL ask for it
    lm.config.save_pretrained(folder)
    lm.generation_config.save_pretrained(folder)
    n = len(parts)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for i, file in enumerate(files):
        os.rename(folder / f"{i}.part", folder / file)
    if n > 1:
        index = dict(metadata={}, weight_map={name: file for file, names in zip(files, parts) for name in names})
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
