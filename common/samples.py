"""Samples: what the terminal and samples.jsonl show of the completions of a rollout."""


def record(tokenizer, batch, i, tokens=False):
    """Row i of a Batch for samples.jsonl; with `tokens` the text of every token, and the columns [B, T] by name."""
    row = dict(prompt_id=int(batch.prompt_id[i]), prompt=_prompt(tokenizer, batch, i), completion=batch.texts[i],
               answer=batch.answers[i], right=batch.gold[i], reward=batch.reward[i].item(),
               truncated=bool(batch.truncated[i]))  # fmt: skip
    if tokens:
        of = {"logp": batch.old_logp, "adv": batch.adv} | batch.columns
        ids = batch.ids[i, -batch.mask.shape[1] :][batch.mask[i]]
        numbers = {k: x[i][batch.mask[i]] for k, x in of.items() if x is not None and x.shape == batch.mask.shape}
        row["tokens"] = [tokenizer.decode([token]) for token in ids.tolist()]
        row["columns"] = {k: [round(v, 4) for v in x.tolist()] for k, x in numbers.items()}
    return row


def contrast(tokenizer, batch):
    """Lines with the best and the worst completion of the first group that has both, else of the first."""
    groups = batch.reward.view(-1, batch.group)
    first = (groups.max(1).values > groups.min(1).values).byte().argmax().item()
    for k in sorted({groups[first].argmax().item(), groups[first].argmin().item()}):
        i = first * batch.group + k
        asked, text, gold = _prompt(tokenizer, batch, i), batch.texts[i], str(batch.gold[i])
        text = text if len(text) < 300 else f"{text[:140]} ... {text[-140:]}"
        right = "" if gold in asked else f"  (right: {gold[-40:]})"  # a game's prompt says what is asked for
        yield f"             reward {batch.reward[i]:.1f}  {asked[-60:]!r} -> {text!r}{right}"


def _prompt(tokenizer, batch, i):
    before = slice(0, -batch.mask.shape[1])
    ids = batch.ids[i, before][batch.attention_mask[i, before]]
    return tokenizer.decode(ids[ids >= 0], skip_special_tokens=True)  # below stand pictures
