"""The worked example that all cards of the ratio family share (algos/grpo.py's objective on two rows)."""

import torch


def example():
    """-> logp (with gradient), old_logp, adv [B, T], mask. Row 0: four tokens, advantage +1; row 1: two tokens, -1."""
    old_logp = torch.tensor([[-0.5, -1.2, -0.1, -2.0], [-0.7, -0.3, -1.0, -1.0]])
    logp = torch.tensor([[-0.3, -1.9, -0.12, -1.5], [-1.0, -0.05, -5.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    adv = torch.tensor([[1.0], [-1.0]]).expand(2, 4)
    return logp, old_logp, adv, mask


def loss_and_gradient(script, args, adv=None, **extra):
    """-> (loss, dloss/dlogp) of `script`'s surrogate and token_weights on the example."""
    logp, old_logp, default, mask = example()
    objective, _ = script.surrogate(logp, old_logp, default if adv is None else adv, mask, args, **extra)
    loss = -(objective * script.token_weights(mask, args)).sum()
    loss.backward()
    return loss.item(), logp.grad
