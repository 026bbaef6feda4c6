"""Training-Free GRPO: what libraries are worth, learnt from groups, from single attempts, by a weak critic, drawn or empty: the
mean over all 36 environments of rules, on held-out questions of the environment and of another one."""

import itertools
import statistics
from dataclasses import replace

from algos import training_free_grpo as script
from common import gpu, rewards, settings

SIZE = (9.4, 3.6)
STEPS, SAMPLES = 4, 16
ARMS = {  # label, flags, colour, line
    "group": ("the rule, on groups", dict(critic="rule"), "tab:blue", "-"),
    "single": ("the rule, on one attempt", dict(critic="single"), "tab:orange", "--"),
    "model": ("the tiny model itself", dict(critic="model"), "tab:red", "-."),
    "random": ("a random library", dict(library="random"), "tab:green", ":"),
    "none": ("no library", dict(library="none"), "0.5", ":"),
}
SLOTS = script.Rules.SLOTS
# Every environment, with one that has no word in common with it.
PAIRS = [(env, [slot[slot.index(word) - 1] for word, slot in zip(env, SLOTS)]) for env in itertools.product(*SLOTS)]


class Frozen:
    """The tiny model, whose warm start has critiques in it (critic="model"), the same for all arms. Evaluations are kept: they
    come out the same for the same library."""

    def __init__(self, seed, critic="model"):
        self.args, config = settings.resolve(script.Args(critic=critic, engine="hf", seed=seed))
        gpu.init(self.args)
        task, _, self.warm, _ = script.started(self.args)
        self.chat, _ = script.here(self.args, config, gpu.device(), task, self.warm)
        self.tasks, self.known = {}, {}

    def task(self, env):
        """Of an environment: its questions are those of all others, and the warm start is, too."""
        if tuple(env) not in self.tasks:
            self.tasks[tuple(env)] = script.rules(" ".join(env), replace(self.args, critic="rule"))
        return self.tasks[tuple(env)]

    def attempts(self, env, examples, library, n, temperature, seeds):
        task = self.task(env)
        scorer = rewards.Scorer(task.check, inline=True)
        return script.attempts(self.chat, scorer, task, examples, library, n, temperature, seeds, self.args)

    def worth(self, env, library):
        """Mean@SAMPLES on held-out questions."""
        key = tuple(env), tuple(library.values())
        if key not in self.known:
            test = self.task(env).test
            seeds = [gpu.hash_seed(self.args.seed, i, 13) for i in range(len(test))]
            groups = self.attempts(env, test, library, SAMPLES, self.args.eval_temperature, seeds)
            self.known[key] = statistics.mean(r for g in groups for r in g["rewards"])
        return self.known[key]


def learn(frozen, env, arm, steps=STEPS):
    """The script's loop in one environment -> its libraries, of the start and after each step."""
    args = replace(frozen.args, **dict(critic="rule") | ARMS[arm][1])
    place = frozen.args.seed * len(PAIRS) + [e for e, _ in PAIRS].index(tuple(env))  # another draw for each
    library = script.started(replace(args, seed=place, critic="rule", transfer=None))[3]
    spent = dict(critic_calls=0, critic_tokens=0)
    roles = script.by_model(frozen.chat, frozen.warm, args, spent) if args.critic == "model" else script.by_rule()
    task, P, libraries = frozen.task(env), args.prompts_per_step, [library]
    for step in range(steps if args.library == "learned" else 0):
        examples = task.order(step * P, P, args.seed)
        seeds = [gpu.hash_seed(args.seed, step, i) for i in range(P)]
        groups = frozen.attempts(env, examples, libraries[-1], args.group_size, args.temperature, seeds)
        libraries.append(script.updated(libraries[-1], groups, *roles, args)[0])
    return libraries + [libraries[-1]] * (steps + 1 - len(libraries))


def numbers(seed, pairs=None, steps=STEPS, arms=tuple(ARMS), critic="model"):
    """{arm: {own, transfer: means over the environments by step; right: how many libraries are, in the end}}."""
    frozen, out, pairs = Frozen(seed, critic), {}, pairs or PAIRS
    for arm in arms:
        runs = [learn(frozen, env, arm, steps) for env, _ in pairs]
        own = [[frozen.worth(env, library) for library in run] for run, (env, _) in zip(runs, pairs)]
        other = [[frozen.worth(env, library) for library in run] for run, (_, env) in zip(runs, pairs)]
        right = sum(set(run[-1].values()) == set(env) for run, (env, _) in zip(runs, pairs))
        means = {name: [statistics.mean(x) for x in zip(*rows)] for name, rows in dict(own=own, transfer=other).items()}
        out[arm] = means | dict(right=right, ends=[row[-1] for row in own], lines=statistics.mean(len(r[-1]) for r in runs))
    return dict(arms=out, environments=len(pairs))


def arms(seed):
    """For runs.claims -> {row: {Mean@16}} after the last step, the mean over all environments."""
    names = {"single attempts": "single", "groups": "group", "random advice": "random", "no advice": "none"}
    found = numbers(seed, arms=tuple(names.values()))["arms"]
    return {row: {f"Mean@{SAMPLES}": found[arm]["own"][-1]} for row, arm in names.items()}


def draw(figure, data):
    left, right, last = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    for arm, (label, _, colour, line) in ARMS.items():
        of = data["arms"][arm]
        for axis, name in ((left, "own"), (right, "transfer")):
            axis.plot(range(len(of[name])), of[name], color=colour, ls=line, marker="o", ms=4, label=label)
    left.set_ylabel(f"Mean@{SAMPLES}, held-out questions", fontsize=9)
    left.set_title(f"mean of {data['environments']} environments", fontsize=10)
    right.set_title("the same libraries in another one", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("steps", fontsize=9)
        axis.set_ylim(-0.03, 1.03)
    right.legend(fontsize=7, frameon=False)
    for i, (arm, (_, _, colour, _)) in enumerate(ARMS.items()):
        ends = sorted(data["arms"][arm]["ends"])
        last.plot([i + 0.6 * (k / len(ends) - 0.5) for k in range(len(ends))], ends, ".", color=colour, ms=4)
        last.text(i, 1.07, data["arms"][arm]["right"], ha="center", fontsize=8)
    last.set_xticks(range(len(ARMS)), list(ARMS), fontsize=8)
    last.set_ylim(-0.03, 1.15)
    last.set_title("each environment at the end\n(above: right libraries)", fontsize=9)
    for axis in (left, right, last):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
