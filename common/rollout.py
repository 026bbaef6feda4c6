"""Rollouts: completions sampled and scored, greedy accuracy, and what is logged of both."""

import torch

from common import UserError, gpu
from common.answers import has_format
from common.batch import collate


def collect(engine, scorer, tokenizer, examples, args, step, given=None, n=None, budget=None, seeds=None, temperature=None):
    """Samples n (None: args.group_size) completions for every example of this rank and scores them -> Batch; a truncated one is
    wrong, whatever its text says. given: token ids that the completions of an example begin with; they go on from there by at
    most `budget` tokens, and only what is new is trained. seeds: one per example. temperature: None is args.temperature; a
    function of the next token's logits [b, V] -> [b], where the engine is made for that."""
    n, given = n or args.group_size, given or [[] for _ in examples]
    seeds = seeds or [gpu.hash_seed(args.seed, step, gpu.rank() * len(examples) + i) for i in range(len(examples))]
    budgets = [min(budget or args.max_new_tokens, args.max_new_tokens - len(g)) for g in given]
    prefixes = [e.ids + g for e, g in zip(examples, given)]
    out = engine.generate(prefixes, n, budgets, temperature or args.temperature, seeds)
    owner = [i for i in range(len(examples)) for _ in range(n)]
    whole = [given[i] + ids for i, (ids, _, _) in zip(owner, out)]
    batch = collate([(examples[i].ids, y) for i, y in zip(owner, whole)], tokenizer.pad_token_id, engine.device)

    B, T = batch.mask.shape
    logp, begun = torch.zeros(B, T), torch.tensor([[len(given[i])] for i in owner])
    for i, (ids, token_logp, _) in enumerate(out):
        logp[i, begun[i] : begun[i] + len(ids)] = torch.tensor(token_logp)
    truncated = torch.tensor([not ended for _, _, ended in out])
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    before = getattr(scorer, "timeouts", 0)
    gold = [examples[i].answer for i in owner]
    answers, scores = scorer(texts, gold)
    accuracy = _unless_cut(torch.tensor(scores), ~truncated)
    reward = accuracy.clone()
    if weight := vars(args).get("format_reward"):
        reward += weight * torch.tensor([has_format(t) for t in texts]).float()
    ids = torch.tensor([examples[i].id for i in owner])
    found = dict(sampler_logp=logp, truncated=truncated, accuracy=accuracy, reward=reward, prompt_id=ids)
    for name, value in (found | dict(policy_version=torch.full((B,), step))).items():
        setattr(batch, name, value.to(engine.device))
    if any(given):
        batch.trained = batch.mask & (torch.arange(T) >= begun).to(engine.device)
    batch.texts, batch.answers, batch.gold, batch.group, batch.engine = texts, answers, gold, n, getattr(engine, "name", "")
    batch.timeouts = getattr(scorer, "timeouts", 0) - before
    return batch


def _unless_cut(scores, ended):
    """Scores [B], of completions that were cut a wrong one's: 0, or the worst of all ranks' where there are negative ones."""
    worst = -gpu.maximum(-min(0.0, *scores.tolist())) if len(scores) else -gpu.maximum(0.0)
    return scores.masked_fill(~ended, worst)


def evaluate(engine, scorer, tokenizer, task, args):
    """On args.eval_prompts held-out examples, over all ranks -> {greedy_accuracy, prompts}; with args.eval_samples N also, of N
    completions each at args.eval_temperature, avg@N, their mean, and pass@N, the mean of each prompt's best."""
    examples = task.test[: args.eval_prompts]
    numbers = range(gpu.rank(), len(examples), gpu.world())

    def scores(n, temperature):
        """[prompts of this rank, n]. The noise is the same at every evaluation."""
        seeds = [gpu.hash_seed(args.seed, i, 13) for i in numbers]
        out = engine.generate([examples[i].ids for i in numbers], n, args.max_new_tokens, temperature, seeds)
        texts = tokenizer.batch_decode([tokens for tokens, _, _ in out], skip_special_tokens=True) if out else []
        _, found = scorer(texts, [examples[i].answer for i in numbers for _ in range(n)])
        ended = torch.tensor([done for _, _, done in out], dtype=torch.bool)
        return _unless_cut(torch.tensor(found, dtype=torch.float64), ended).view(-1, n)

    def mean(values):
        return gpu.total(values.sum().item()) / len(examples)

    engine.wake()
    values, n = dict(greedy_accuracy=mean(scores(1, 0.0))), args.eval_samples
    if n:
        sampled = scores(n, args.eval_temperature)
        values |= {f"avg@{n}": mean(sampled.mean(1)), f"pass@{n}": mean(sampled.max(1).values)}
    engine.sleep()
    return values | dict(prompts=len(examples))


def diagnostics(logp, mb, entropy):
    """What every script logs per token: entropy, k3 distance and ratio to the rollout's policy, gap to the sampler."""
    log_ratio = (logp.detach() - mb.old_logp).clamp(-20, 20)
    ratio, gap = log_ratio.exp(), (mb.old_logp - mb.sampler_logp).abs()
    out = dict(entropy=entropy, approx_kl=(-log_ratio).exp() + log_ratio - 1, ratio_max=ratio, ratio_min=ratio)
    return out | dict(sampler_gap=gap, sampler_gap_max=gap)


def summary(batch):
    """Means over the completions of all ranks. Raises UserError where the sampler's log-probs are not those of the policy
    that it should have had: weights that did not reach the engine, or another temperature."""
    gap = gpu.double((batch.old_logp - batch.sampler_logp).abs() * batch.trained).sum().item()
    gap = gpu.total(gap) / max(1, gpu.total(int(batch.trained.sum())))
    if gap > 0.5:  # NaN passes: Run.finite has a clearer word for it
        raise UserError(
            f"the sampler's log-probs are {gap:.2f} nat per token away from the policy's: its weights are not in step "
            "(--engine hf rules the engine out)"
        )
    groups = batch.accuracy.view(-1, batch.group)
    spread = groups.max(1).values - groups.min(1).values
    values = dict(reward=batch.reward, accuracy=batch.accuracy, length=batch.mask.sum(1).float())
    adv = batch.adv.where(batch.trained, 0.0).sum(1) / batch.trained.sum(1).clamp(min=1)  # padding is each process's own
    values |= dict(truncated=batch.truncated.float(), informative_groups=(spread > 1e-6).float(), adv_mean=adv)
    out = {k: gpu.total(gpu.double(v).sum().item()) / gpu.total(v.numel()) for k, v in values.items()}
    out["reward_timeouts"] = gpu.total(batch.timeouts)
    out["adv_max"], out["adv_min"] = gpu.maximum(batch.adv.max().item()), -gpu.maximum(-batch.adv.min().item())
    return out
