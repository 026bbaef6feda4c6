"""What a preference method is judged by: gold reward and KL of fresh samples, held-out pairs, credit of single tokens."""

import functools
import json

import torch

from common import gpu, pairs

# What the bar shows of a step's metrics.
SHOWN = dict(loss="loss", reward_accuracy="acc", margin="margin", chosen_ratio="chosen", chosen_reward="reward", entropy="H")


def evaluate(engine, policy, reference, data, tokenizer, run, samples=4):
    """-> {name: number} on args.eval_prompts held-out pairs; log-ratios are log pi - log pi_ref summed over a response, nats.
    win_rate: of fresh samples against the reference's, by gold reward, ties half; 0.5 for the reference itself. gold_reward.
    kl: to the reference, on fresh samples. length. reward_accuracy: held-out pairs whose chosen log-ratio is the larger one.
    margin: by how much. chosen_shift, rejected_shift: the log-ratios themselves. credit: of two tokens of a response that
    differ in true worth, how often the token log-ratio orders them rightly, ties half."""
    args, held_out = run.args, data.test[: run.args.eval_prompts]
    prompts = list({p.text: p for p in held_out}.values())
    if data.reward and "reference_rewards" not in run.state:  # the policy is still the reference
        run.state["reference_rewards"] = sample(engine, prompts, data, tokenizer, args, samples, 0)[1]
    drawn, rewards = sample(engine, prompts, data, tokenizer, args, samples, 1)
    ref = pairs.logp_of(reference, [(prompts[i].prompt, ids) for i, ids, _ in drawn], args)
    out = dict(kl=sum(logp - r.double().sum().item() for (_, _, logp), r in zip(drawn, ref)) / len(drawn))
    out["length"] = sum(len(ids) for _, ids, _ in drawn) / len(drawn)
    if data.reward:
        ours, theirs = torch.tensor(rewards), torch.tensor(run.state["reference_rewards"])
        wins = (ours[:, :, None] - theirs[:, None, :]).sign()
        out |= dict(win_rate=(1 + wins.mean().item()) / 2, gold_reward=ours.mean().item())
    rows = [(p.prompt, y) for p in held_out for y in (p.chosen, p.rejected)]
    ratios = [a - b for a, b in zip(pairs.logp_of(policy, rows, args), pairs.logp_of(reference, rows, args))]
    chosen, rejected = torch.stack([r.double().sum() for r in ratios]).view(-1, 2).T
    out |= dict(reward_accuracy=(chosen > rejected).double().mean().item(), margin=(chosen - rejected).mean().item(),
                chosen_shift=chosen.mean().item(), rejected_shift=rejected.mean().item())  # fmt: skip
    gold = [torch.tensor(w) for p in held_out for w in p.gold or ()]
    right = total = 0
    for r, w in zip(ratios, gold) if len(gold) == len(ratios) else ():
        better = w[:, None] > w
        right, total = right + (1 + (r[:, None] - r).sign()[better]).sum().item() / 2, total + better.sum().item()
    if total:
        out["credit"] = right / total
    out["prompts"] = len(prompts)
    if run.main:
        for p, (_, ids, _) in zip(prompts[:2], drawn[::samples]):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            run.samples.write(json.dumps(dict(step=run.state["step"], prompt=p.text, completion=text)) + "\n")
            run.bar.write(f"             {p.text[-100:]!r} {text[:200]!r}")
        run.samples.flush()
    return out


def sample(engine, prompts, data, tokenizer, args, n, stream):
    """n samples per prompt, the work shared out over the ranks -> [(prompt's number, token ids, log-prob under the policy)],
    and their gold rewards [P][n] (None where the data has none). The seeds are those of the prompt and `stream`."""
    mine = list(range(len(prompts)))[gpu.rank() :: gpu.world()]
    seeds = [gpu.hash_seed(args.seed, i, stream, 11) for i in mine]
    engine.wake()
    out = engine.generate([prompts[i].prompt for i in mine], n, args.max_new_tokens, 1.0, seeds)
    engine.sleep()
    found = {i: [(i, ids, sum(logp)) for ids, logp, _ in out[k * n : k * n + n]] for k, i in enumerate(mine)}
    found = functools.reduce(dict.__or__, gpu.gather_objects(found))
    rewards = data.reward and [
        [data.reward(p.text, tokenizer.decode(ids, skip_special_tokens=True)) for _, ids, _ in found[i]]
        for i, p in enumerate(prompts)
    ]
    return [s for i in range(len(prompts)) for s in found[i]], rewards


def sentence(run):
    """The last line of a run, from what evaluate() gave at its start and at its end; None for one that was stopped."""
    if not run.after:
        return None
    before, after = run.state["before"], run.after
    name, what = ("win_rate", "against the reference on {} held-out prompts (gold reward)")
    if name not in after:
        name, what = ("reward_accuracy", "on the pairs of {} held-out prompts")
    change = f"{name.replace('_', ' ')} {before[name]:.2f} -> {after[name]:.2f}"
    return f"{change} {what.format(after['prompts'])}, KL {after['kl']:.1f} nats"
