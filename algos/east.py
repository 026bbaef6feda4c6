"""EAST: Entropic Activation Steering. Rahn, D'Oro and Bellemare, "Controlling Large Language Model Agents with Entropic
Activation Steering", arXiv 2406.00244 (2024).

Idea: a language model that plays a bandit settles on an arm too soon, and a direction in its activations says how unsure it is
of its action. That direction is the mean of the activations before a decision, weighted by the entropy of the action there,
after each run's own mean was taken away, since the history of a run is most of what an activation holds. Added while the model
thinks and acts, it makes the action less certain, and taken away more certain, while what is said stays well-formed.

Rule (equation numbers not at hand), z_t [H] the output of a layer at the last token of the prompt of pull t, of K runs on
arms with equal means:
    h_t = - sum_a p_t(a) log p_t(a)                 p_t: shares of the arms among the M completions that name one
    u = 1/Z sum_k sum_t h_t^k (z_t^k - 1/T sum_t' z_t'^k),   Z = sum_k sum_t h_t^k
    z~_i = z_i + beta u at the last token of the prompt and at every token of the completion; the next prompt is read afresh

Entropies are in nats: 0 is certain, log 2 = 0.693 undecided. Neither more entropy nor more switching is said to be better: the
regret of the episodes stands beside them, and the share of completions that name an arm, since gibberish has entropy, too.
Strength is beta |u| / mean |z|, so that layers and models compare; the paper's beta of 2 is of an u whose size depends on both.

Controls of the same size at the same layer: u with its coordinates shuffled and a random direction, both drawn anew for every
prompt, and the mean that is not centred. Temperature is the other way to more entropy: a thought decides the action first.

The paper has no public code. A message a pull is its prompt; here one message holds the whole history. The tiny model's first
two pulls are forced (an arm is untried) and do not enter u (--skip): with them u says "early". The paper skips none.

Family: inference
Differs from decode.py in: task, prompt_template, seed, items, max_new_tokens, pick, decode, action_entropy,
    steering_vector, shift, ask, play, first_phase, main
World: arms, prompt, arm_of, points, transcripts
Measures: controls, sweep, measure, mean, regrets, results
Costs: --samples completions for every pull, of --runs + 3 --items episodes, and for every condition of the sweep: hours
       for a model of 7B. No vLLM: it has no hook.
Run:   python algos/east.py                                     CPU, two minutes; once, its warm start
       python algos/east.py --built-on letters                  arms 0 and 1, steered by what was found on arms a and b
       python algos/east.py --layer 3 --strength 0.2
       python algos/east.py --model qwen2.5-7b-instruct --pulls 20 --items 16     buttons, told in words; layer 14 of 28
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass
class Args:
    model: str = "tiny"
    """alias (qwen2.5-7b, llama-3.2-1b, ...), hub id or folder; tiny: a small model made and warm-started here"""
    system_prompt: str | None = None
    """put before the prompt where the tokenizer has a chat template"""
    seed: int = 1
    """of the uniform numbers, and of the tiny model's warm start"""
    items: int = 64
    """bandits; each gives a prompt that is steered in all ways and an episode that is played in three (paper: 100 and 65)"""
    max_new_tokens: int | None = None
    """longest thought and action; a longer one is cut, and names no arm"""
    temperature: float = 1.0
    """of sampling; 0: the likeliest token"""
    resume: str | None = None
    """run folder to continue"""
    run_dir: str | None = None
    """where to write; None: runs/<script>-<seed>-<time>"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: a CUDA GPU where there is one, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """of the weights"""

    # EAST
    wording: Literal["digits", "letters", "buttons", "machines"] | None = None
    """what the bandit is called: digits and letters are the tiny model's, buttons and machines for models that read English"""
    built_on: Literal["same", "digits", "letters", "buttons", "machines"] = "same"
    """wording of the runs that give the vector"""
    samples: int = 25
    """M, completions that an entropy is measured on (paper)"""
    runs: int | None = None
    """K, runs on equal means that give the vector (not in the paper's main text)"""
    pulls: int | None = None
    """T, pulls of an episode (paper: 50)"""
    skip: int | None = None
    """first pulls of a run that do not enter the vector, and whose prompts are not steered (paper: none)"""
    layer: int | None = None
    """that episodes are steered at, counted from 1; None: the middle one (paper: 16 of 32)"""
    strength: float = 0.3
    """beta |u| / mean |z|, of the steered episodes (here)"""
    strengths: tuple[float, ...] = (-0.2, 0.1, 0.2, 0.3, 0.4, 0.5)
    """those that prompts are steered with, at a quarter, half and three quarters of the depth and at --layer (here)"""
    temperatures: tuple[float, ...] = (0.5, 1.5, 2.0, 3.0)
    """those that the same prompts are sampled at without steering (here)"""
    rows: int | None = None
    """completions at a time"""

    limits = dict(
        items="1 <= x", temperature="0 <= x", samples="2 <= x", runs="1 <= x", pulls="2 <= x", layer="1 <= x", rows="1 <= x",
        strength="0 < x <= 1", strengths="-1 <= x <= 1", temperatures="0 < x",
    )  # fmt: skip
    tiny_preset = dict(wording="digits", runs=40, pulls=10, skip=2, rows=500)
    real_preset = dict(wording="buttons", runs=20, pulls=50, skip=0, rows=100, max_new_tokens=96)


# ---------------------------------------------------------------- the rule


def law(logits, args):
    """Logits [..., V] -> probabilities of the next token [..., V], float64; at temperature 0 all on the likeliest."""
    if args.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return (logits.double() / args.temperature).softmax(-1)


def pick(p, u):
    """Probabilities [B, V], uniform numbers [B] in [0, 1) -> the tokens [B] at which their running sums pass them."""
    running = p.cumsum(-1)
    return torch.searchsorted(running, u[:, None] * running[:, -1:], right=True).clamp(max=p.shape[1] - 1)[:, 0]


def decode(reader, end, uniforms, args):
    """A Decoder that has read a prompt for B rows, ids that end a completion, uniform numbers [B, max_new_tokens] -> the ids
    of each completion."""
    ids = [[] for _ in uniforms]
    for t in range(args.max_new_tokens):
        new = pick(law(reader.logits, args), uniforms[reader.rows, t])
        for row, token in zip(reader.rows.tolist(), new.tolist()):
            ids[row].append(token)
        going = [i for i, token in enumerate(new.tolist()) if token not in end]
        if not going or t + 1 == args.max_new_tokens:
            break
        if len(going) < len(new):
            reader.keep(torch.tensor(going, device=reader.device))
        reader.feed(new[going])
    return ids


def action_entropy(counts):
    """How often each arm was named [..., A] -> entropy of the action [...], nats; NaN where none was."""
    p = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1)


def steering_vector(z, h, centred=True):
    """Activations [T, ...] of every run, their action entropies [T] -> u [...]. A run has as many pulls as it came to."""
    away = [x - x.mean(0) if centred else x for x in z]
    return sum(torch.tensordot(w, x, 1) for w, x in zip(h, away)) / sum(w.sum() for w in h)


def shift(output, v):
    """A layer's output [B, k, H], what is added [B, H] -> the same, shifted at the last position. transformers' layers return
    the tensor itself."""
    return torch.cat([output[:, :-1], output[:, -1:] + v[:, None].to(output.dtype)], 1)


def ask(lm, ids, vectors, uniforms, end, args, layers=()):
    """A prompt's ids, {layer: what is added there [B, H]}, uniform numbers [B, max_new_tokens] -> the ids of B completions, and
    {layer: z [H]} of the prompt's last token."""
    from common import engines, gpu

    # All but the last token is read before the hooks are there, so that nothing earlier is shifted.
    reader, hooks = engines.Decoder(lm, [ids[:-1]], n=len(uniforms), layers=layers), []
    for layer, v in vectors.items():
        hook = lambda module, given, output, v=v: shift(output, v[reader.rows])  # noqa: E731
        hooks.append(gpu.body(lm).layers[layer - 1].register_forward_hook(hook))
    try:
        reader.feed(torch.tensor([ids[-1]] * len(uniforms), device=reader.device))
        states = {layer: z[0].double().cpu() for layer, z in reader.states.items()}
        return decode(reader, end, uniforms.to(reader.device), args), states
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- the bandit


def arms(args):
    """What the two arms are called."""
    return dict(digits=("0", "1"), letters=("a", "b"), buttons=("blue", "green"), machines=("left", "right"))[args.wording]


def prompt(turns, args):
    """[(completion, points), ...] of an episode so far -> the text that the player reads."""
    first, second = arms(args)
    if len(first) == 1:
        return f"{first}{second} " + "".join(f"{text}:{r} " for text, r in turns)
    places = dict(buttons="two buttons. Each press of one", machines="two slot machines. Each game on one")
    rule = f"There are {places[args.wording]} gives points, more or fewer by chance, around an average that never changes."
    aim = f"They are called {first} and {second}. You choose {args.pulls} times, and want as many points in all as you can get."
    so_far = "".join(f"\nRound {i}: {' '.join(text.split())}\nPoints: {r}" for i, (text, r) in enumerate(turns, 1))
    asked = f"Think in one short sentence, then end with 'Action: {first}' or 'Action: {second}'."
    return f"{rule} {aim}{so_far}\nThis is round {len(turns) + 1}. {asked}"


def arm_of(text, args):
    """A completion -> the arm that it names, 0 or 1; None where it names none."""
    import re

    form = "(?:ex|gr)({}|{})" if len(arms(args)[0]) == 1 else r"(?si:.*action\W+({}|{})\W*)"
    found = re.fullmatch(form.format(*arms(args)), text)
    return arms(args).index(found[1].lower()) if found else None


def points(x, args):
    """What a pull gives, in its standard deviations from an average arm -> a number as it is written."""
    return min(9, max(0, round(4.5 + 2 * x))) if len(arms(args)[0]) == 1 else round(100 + 10 * x)


def transcripts(args):
    """Twelve pulls of a player who tries each arm, and then takes the arm whose mean is greater (gr) or the one that was tried
    less (ex): every fourth player half of the time, the others at one pull in fifty."""
    from dataclasses import replace

    from common import tasks

    def demonstrate(rng, example, careful):
        means, curious, seen, turns = [rng.uniform(-1.25, 1.25) for _ in "01"], rng.random() < 0.25, ([], []), []
        for _ in range(12):
            explores = not all(seen) or rng.random() < (0.5 if curious else 0.02)
            worth = [-len(s) if explores else sum(s) / len(s) for s in seen]
            arm = rng.choice([a for a in (0, 1) if worth[a] == max(worth)])
            seen[arm].append(points(rng.gauss(means[arm], 1), own))
            turns.append(f"{'ex' if explores else 'gr'}{example.prompt[arm]}:{seen[arm][-1]} ")
        return "".join(turns)

    own = replace(args, wording="digits")
    examples = [tasks.Example(i, prompt([], replace(args, wording=w)), "") for i, w in enumerate(("digits", "letters"))]
    shape = dict(num_hidden_layers=4, hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=4)
    recipe = dict(steps=600, careful_steps=600, batch=32, lr=3e-3, seed=args.seed)
    own_task = dict(demonstrate=demonstrate, max_new_tokens=3, recipe=recipe, shape=shape)
    return tasks.Task("bandit", examples, [], None, **own_task)


def play(lm, tokenizer, end, means, stream, args, vectors=None, layers=()):
    """An episode -> a dict for every pull: ids of its prompt, arm, h, the share of completions that name an arm, z. It ends
    where none does. stream: numbers that its draws are a function of, besides the seed; steered or not, they are the same."""
    from common import UserError, encoding, gpu

    numbers, turns, pulls = torch.Generator().manual_seed(gpu.hash_seed(args.seed, *stream)), [], []
    for _ in range(args.pulls):
        uniforms = torch.rand(args.samples, args.max_new_tokens, dtype=torch.float64, generator=numbers)
        which, noise = torch.rand(1, generator=numbers).item(), torch.randn(1, generator=numbers).item()
        (ids,) = encoding.prompt_ids([prompt(turns, args)], tokenizer, f"--wording {args.wording}", args.system_prompt)
        if len(ids) + args.max_new_tokens > (most := lm.config.get_text_config().max_position_embeddings):
            raise UserError(f"pull {len(turns) + 1} needs {len(ids) + args.max_new_tokens} positions; the model has {most}")
        added = {layer: v.expand(args.samples, -1) for layer, v in (vectors or {}).items()}
        said, z = ask(lm, ids, added, uniforms, end, args, layers)
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        named = [arm_of(text, args) for text in texts]
        valid = [i for i, arm in enumerate(named) if arm is not None]
        if not valid:
            break
        chosen, counts = valid[int(which * len(valid))], torch.tensor([named.count(0), named.count(1)])
        h = action_entropy(counts.double()).item()
        pulls.append(dict(ids=ids, arm=named[chosen], h=h, valid=len(valid) / len(named), z=z))
        turns.append((texts[chosen], points(means[named[chosen]] + noise, args)))
    return pulls


def first_phase(lm, tokenizer, end, args):
    """Runs on equal means -> u and the mean that is not centred [L, H], mean |z| of each layer [L]."""
    from dataclasses import replace

    from common import UserError, gpu

    args = args if args.built_on == "same" else replace(args, wording=args.built_on)
    layers, z, h, late = range(1, 1 + len(gpu.body(lm).layers)), [], [], []
    for k in range(args.runs):
        pulls = play(lm, tokenizer, end, (0.0, 0.0), (1, k), args, layers=layers)
        late += [pull["h"] for pull in pulls[args.pulls // 2 :]]
        if pulls := pulls[args.skip :]:
            z.append(torch.stack([torch.stack([*pull["z"].values()]) for pull in pulls]))
            h.append(torch.tensor([pull["h"] for pull in pulls], dtype=torch.float64))
    if not sum(x.sum() for x in h) > 0:
        raise UserError("no pull of any run has an uncertain action: there is no direction to be found")
    if late and sum(late) > 0.55 * len(late):
        still = f"its action's entropy is still {sum(late) / len(late):.2f} in the second half of a run, of 0.69 at most"
        raise UserError(f"the model has not learnt to tell the arms apart: {still}; another --seed is another warm start")
    size = torch.cat(z).norm(dim=-1).mean(0)
    return dict(u=steering_vector(z, h), plain=steering_vector(z, h, centred=False), size=size)


# ---------------------------------------------------------------- what is measured


def controls(found, numbers):
    """-> {what is added: its directions [L, H], of length 1}, two of them drawn."""
    L, H = found["u"].shape
    shuffled, drawn = found["u"][:, torch.randperm(H, generator=numbers)], torch.randn(L, H, generator=numbers).double()
    of = {"steering vector": found["u"], "shuffled": shuffled, "random": drawn, "not centred": found["plain"]}
    return {kind: v / v.norm(dim=-1, keepdim=True) for kind, v in of.items()} | {"not steered": torch.zeros(L, H)}


def sweep(lm, tokenizer, end, ids, directions, size, layers, uniforms, args):
    """A prompt's ids -> [[what is added, layer, strength, h or None, share of completions that name an arm], ...] by the same
    uniform numbers under all conditions; ["temperature", 0, temperature, ...] of those without steering."""
    from dataclasses import replace

    M, out = args.samples, []

    def measured(condition, said):
        named = [arm_of(text, args) for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
        counts = torch.tensor([named.count(0), named.count(1)]).double()
        out.append([*condition, action_entropy(counts).item() if counts.any() else None, counts.sum().item() / M])

    strengths = sorted({args.strength, *args.strengths} - {0.0})
    of = {kind: [s for s in strengths if s > 0 or kind == "steering vector"] for kind in directions if kind != "not steered"}
    todo = [("not steered", layers[0], 0.0), *((kind, l, s) for kind in of for l in layers for s in of[kind])]
    per = max(1, args.rows // M)
    for some in (todo[i : i + per] for i in range(0, len(todo), per)):
        added = {l: [directions[k][l - 1] * s * size[l - 1] * (at == l) for k, at, s in some] for l in layers}
        added = {l: torch.stack(v).to(lm.device).repeat_interleave(M, 0) for l, v in added.items()}
        said, _ = ask(lm, ids, added, uniforms.repeat(len(some), 1), end, args)
        for j, condition in enumerate(some):
            measured(condition, said[j * M : (j + 1) * M])
    for heat in args.temperatures:
        measured(("temperature", 0, heat), ask(lm, ids, {}, uniforms, end, replace(args, temperature=heat))[0])
    return out


def measure(lm, tokenizer, end, found, layers, i, args):
    """A bandit -> its line of items.jsonl: three episodes, and one of the prompts that came up, under all conditions."""
    from common import UserError, gpu

    numbers, episodes = torch.Generator().manual_seed(gpu.hash_seed(args.seed, 2, i)), {}
    means, directions = (2.5 * torch.rand(2, generator=numbers) - 1.25).tolist(), controls(found, numbers)
    for way in ("not steered", "steering vector", "shuffled"):
        v = args.strength * found["size"][args.layer - 1] * directions[way][args.layer - 1]
        episodes[way] = play(lm, tokenizer, end, means, (3, i), args, {args.layer: v.to(lm.device)})
    if not (some := episodes["not steered"][args.skip :] or episodes["not steered"]):
        raise UserError(f"bandit {i}: none of {args.samples} completions names an arm")
    ids = some[torch.randint(len(some), (1,), generator=numbers).item()]["ids"]
    uniforms = torch.rand(args.samples, args.max_new_tokens, dtype=torch.float64, generator=numbers)
    asked = sweep(lm, tokenizer, end, ids, directions, found["size"], layers, uniforms, args)
    told = {way: [[pull["arm"], pull["h"], pull["valid"]] for pull in pulls] for way, pulls in episodes.items()}
    beta = {layer: (args.strength * found["size"] / found["u"].norm(dim=-1))[layer - 1].item() for layer in layers}
    return dict(item=i, layer=args.layer, beta=beta, means=means, episodes=told, asked=asked)


def mean(values):
    """The mean of what is not None; None where all are."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def regrets(means, pulls):
    """After each pull: what the better arm would have given more so far, in standard deviations of a pull's points."""
    lost = [max(means) - means[arm] for arm, _, _ in pulls]
    return [sum(lost[: t + 1]) for t in range(len(lost))]


def results(rows, args):
    """Lines of items.jsonl -> {table, panels}, see common/figures.py."""
    under, chosen, ways = {}, rows[0]["layer"], rows[0]["episodes"]
    for row in rows:
        for kind, layer, x, h, valid in row["asked"]:
            under.setdefault((kind, layer, x), []).append((h, valid))
    at = {c: dict(entropy=mean(h for h, _ in of), valid=mean(valid for _, valid in of)) for c, of in under.items()}
    (none,), layers = [v for c, v in at.items() if c[0] == "not steered"], sorted({c[1] for c in at} - {0})
    kinds = list(dict.fromkeys(c[0] for c in at if c[0] not in ("not steered", "temperature")))

    def curve(kind, layer, y):
        """-> [[strength or temperature, entropy or valid share], ...], from where nothing is added."""
        start = args.temperature if kind == "temperature" else 0.0
        points = {start: none} | {x: v for (k, l, x), v in at.items() if (k, l) == (kind, layer)}
        return [[x, points[x][y]] for x in sorted(points) if points[x][y] is not None]

    def by_pull(way, of):
        """of(row) -> a number for each pull of an episode; -> [[pull, mean over the episodes that have it], ...]."""
        found = [of(row, row["episodes"][way]) for row in rows]
        return [[t + 1, mean(x[t] for x in found if len(x) > t)] for t in range(max(map(len, found)))]

    table = {"not steered": dict(none)}
    for layer in layers:
        table |= {f"{kind}, layer {layer}": dict(at[kind, layer, args.strength]) for kind in kinds}
        good = [x for x, valid in curve("steering vector", layer, "valid") if x >= 0 and valid >= 0.95]
        widest = dict(curve("steering vector", layer, "entropy"))[max(good)] if good else None
        own = {"beta": rows[0]["beta"][str(layer)], "last with 95% valid": max(good, default=None), "entropy there": widest}
        table[f"steering vector, layer {layer}"] |= own
    table |= {f"temperature {c[2]:g}": dict(v) for c, v in at.items() if c[0] == "temperature"}
    for way in ways:
        played = [(row["means"], row["episodes"][way]) for row in rows]
        switches = mean(sum(a[0] != b[0] for a, b in zip(pulls, pulls[1:])) for _, pulls in played)
        name = way if way in table else f"{way}, layer {chosen}"
        table[name] |= dict(switches=switches, regret=mean((regrets(*x) or [None])[-1] for x in played))

    last, nats = f"layer {chosen}", dict(kind="lines", x="strength", y="nats")
    panels = [nats | dict(title=f"action entropy, {last}", of={kind: curve(kind, chosen, "entropy") for kind in kinds})]
    of = {kind: curve(kind, chosen, "valid") for kind in kinds}
    panels += [dict(title=f"completions that name an arm, {last}", kind="lines", x="strength", y="share", of=of)]
    of = {f"layer {layer}": curve("steering vector", layer, "entropy") for layer in layers}
    panels += [nats | dict(title="action entropy by the steering vector", of=of)]
    of = {f"steered, layer {layer}": ("steering vector", layer) for layer in layers} | dict(temperature=("temperature", 0))
    of = {k: [[v, h] for (_, v), (_, h) in zip(curve(*c, "valid"), curve(*c, "entropy"))] for k, c in of.items()}
    panels += [nats | dict(title="what more entropy costs", x="share that names an arm", of=of)]
    of = {way: by_pull(way, lambda row, pulls: [h for _, h, _ in pulls]) for way in ways}
    panels += [nats | dict(title=f"episodes: action entropy, {last}", x="pull", of=of)]
    of = {way: by_pull(way, lambda row, pulls: regrets(row["means"], pulls)) for way in ways}
    panels += [dict(title=f"episodes: regret so far, {last}", kind="lines", x="pull", y="standard deviations", of=of)]
    return dict(table=table, panels=panels)


# ---------------------------------------------------------------- the loop


def main(args):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import UserError, items, models, settings

    def warm(name):
        return transcripts(args)

    args, config, device = settings.prepare(__file__, args, warm)
    deep = config.get_text_config().num_hidden_layers
    args.layer = args.layer or max(1, deep // 2)
    if args.layer > deep or args.pulls < args.skip + 2:
        why = f"--layer is from 1 to {deep}" if args.layer > deep else "--pulls must be two more than --skip at least"
        raise UserError(f"{why}; it is {args.layer if args.layer > deep else args.pulls}")
    layers = sorted({args.layer} | {max(1, deep * k // 4) for k in (1, 2, 3)})
    tokenizer = models.load_tokenizer(args, warm)
    run = items.Items(__file__, args, config)
    lm = models.load(args, device, trainable=False, warm=warm).lm
    end = models.end_tokens(lm, tokenizer)

    # What is learnt: u of every layer, by runs that are not steered.
    width = config.get_text_config().hidden_size
    zeros = torch.zeros(deep, width, dtype=torch.float64)
    found = torch.nn.ParameterDict(dict(u=zeros, plain=zeros.clone(), size=zeros[:, 0].clone())).requires_grad_(False)

    def fit():
        for name, x in first_phase(lm, tokenizer, end, args).items():
            found[name].copy_(x)

    with torch.no_grad():
        run.kept("vectors", found, fit)
        for i in run.left(args.items):
            run.write(measure(lm, tokenizer, end, found, layers, i, args))

    of = results(run.rows(), args)
    none, there = of["table"]["not steered"], {k: v for k, v in of["table"].items() if k.endswith(f", layer {args.layer}")}
    told = ", ".join(f"{kind.partition(',')[0]} {row['entropy']:.2f}" for kind, row in there.items())
    steered = there[f"steering vector, layer {args.layer}"]
    valid, switches, regret = (f"{none[k]:.2f} to {steered[k]:.2f}" for k in ("valid", "switches", "regret"))
    more = f"steered, the share that names an arm goes from {valid}, switches from {switches}, regret from {regret}"
    run.finish(of, f"action entropy {none['entropy']:.2f}; at strength {args.strength:g} {told}; {more}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import settings

    main(settings.parse(Args, __doc__))
