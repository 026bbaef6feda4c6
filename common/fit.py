"""Which models Policy can train: by what their config describes, and by what they say of three short rows."""

import torch

from common import gpu, reason
from common.policy import recorded


def unfit(lm, config, sees=False):
    """Why Policy cannot train what a config describes, or None. `sees`: whether the script gives it pictures."""
    layers, eyes = set(getattr(config.get_text_config(), "layer_types", None) or ()), hasattr(config, "vision_config")
    if hasattr(config, "audio_config") or eyes > sees:
        return "reads images or sound, which this script does not give it"
    if eyes < sees:
        return "reads no pictures, which this script is about"
    if getattr(lm, "_is_stateful", False) or layers - {"full_attention", "sliding_attention", "chunked_attention"}:
        return "has recurrent layers, which cannot be sampled by rows that come and go"
    if getattr(getattr(lm, "lm_head", None), "bias", None) is not None:
        return "has a head with a bias, which Policy does not add"
    if not hasattr(lm, "lm_head") or not all(hasattr(gpu.body(lm), part) for part in ("layers", "norm")):
        return "is none that Policy knows"
    return None


@torch.no_grad()
def probe(policy):
    """-> (whether the model may be packed, why it cannot be trained or None)."""
    try:
        packs, why = _compared(policy)
    except Exception as error:  # of code that nobody here has seen
        return False, f"it cannot be run as Policy runs it ({reason(error)})"
    return packs, f"{why}, so that Policy would train on other log-probs than its own" if why else None


def _compared(policy):
    """Three short rows, two of them with one prompt, by Policy and one by one by transformers -> as probe()."""
    training, lm = policy.lm.training, policy.lm.eval()
    draw, parts = torch.Generator().manual_seed(0), ((5, 6), (2, 4), (5, 1))  # tokens of prompt and completion
    size, device = lm.lm_head.weight.shape[0], lm.lm_head.weight.device
    text = torch.randint(size, (3, 11), generator=draw)
    text[2, :5] = text[0, :5]
    ids, seen = torch.zeros(2, 3, 11, dtype=torch.int64)
    for i, (p, t) in enumerate(parts):
        ids[i, 5 - p : 5 + t], seen[i, 5 - p : 5 + t] = text[i, : p + t], 1
    ids, seen = ids.to(device), seen.bool().to(device)
    mask, rough = seen[:, 5:], torch.finfo(lm.lm_head.weight.dtype).bits < 32
    sees_all = getattr(lm.config, "is_causal", True) is False

    def own(row):
        with recorded(lm, ["normed"]) as states:
            logits = lm(input_ids=row[None]).logits[0].float()
        return logits, (states["normed"][0] @ lm.lm_head.weight.T).float()

    logp, why = torch.zeros(mask.shape, device=device), None
    for i, (p, t) in enumerate(parts):
        row = text[i, : p + t].to(device)
        logits, plain = own(row)
        if (logits - plain).abs().max() > (0.02 if rough else 1e-4) * (1 + plain.abs().max()):
            why = "its logits are not its head times its hidden states (a soft cap, a scale)"
        changed, at = row.clone(), p + t - 1
        changed[at] = (changed[at] + 1) % size
        backwards = (own(changed)[0][:at] - logits[:at]).abs().max()
        if sees_all and backwards == 0:
            why = "its attention is causal, whatever its config says"
        if not sees_all and backwards > (0.5 if rough else 1e-3):
            why = "its attention is not causal"
        logits = logits[p - policy.shift : p + t - policy.shift]
        logp[i, :t] = logits.log_softmax(-1).gather(1, row[p:, None])[:, 0]

    def off():
        return (policy(ids, seen, mask)[0] - logp).abs()[mask].mean().item()

    limit = 0.2 if rough else 1e-3
    if policy.packs and not off() < limit:
        policy.pad()
    if not why and not (gap := off()) < limit:
        why = f"its log-probs in a batch are {gap:.2g} nat off those of single rows"
    lm.train(training)
    if not why and training and not (gap := off()) < limit:
        why = f"its log-probs in training are {gap:.2g} nat off"
    return policy.packs, why
