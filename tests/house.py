"""The house rules: functions of sources {path: text} of algos/, common/ and runs/ that return complaints."""

import ast
import re

FAMILY_FILES = ("pairs", "judge", "demonstrations", "diffusion", "thoughts", "vision", "measures", "figures", "items")
# Who may not import whom: each row from low to high, and what is low never reaches what is high.
ORDER = [
    ("__init__", "gpu", "export", "policy", "models", "batch", "vllm_engine", "engines", "rollout"),
    ("__init__", "gpu", "export", "policy", "models", "settings", "checkpoint"),
    ("__init__", "gpu", "policy", "models", "settings", "runlog"),
]
# Names of scripts that are English or the house's own words as well.
ORDINARY = {
    "did": "the past tense of do",
    "score": "what a checker gives",
    "decode": "what a tokenizer does",
    "mdlm": "what masked diffusion models are called",
    "rng": "a source of random numbers",
}
# A hidden import that hides no circle: transformers takes seconds, which --help and a mistake in a flag need not wait for.
LATE = (("common/settings.py", "from common import models"),)
CALLED_BY_TORCH = ("forward", "backward")
# What a module is there for: one user is enough.
PURPOSE = {
    "gpu": ("init", "choose", "make_schedules", "set_rate"),
    "policy": ("Policy", "Packing", "HeadLogp"),
    "fit": ("unfit", "probe"),
    "foreign": ("translate",),
    "diffusion": ("fill", "check_canvas", "mask_id"),
    "engines": ("Decoder", "HF", "draw"),
    "vllm_engine": ("VLLM",),
    "rewards": ("Own",),
    "answers": ("has_format", "maths"),
    "tasks": ("encode",),
    "vision": ("Pictures", "seeing_row"),
    "tables": ("prompt_and_answer",),
    "samples": ("record", "contrast"),
    "pairs": ("Pair", "Data"),
    "demonstrations": ("Said", "load", "evaluate"),
    "settings": ("resolve", "inherit"),
    "memory": ("memory_plan", "explain_plan"),
    "checkpoint": ("save", "find", "restore", "read", "rewind", "may_push", "push"),
}


def stem(path):
    """common/gpu.py -> gpu, common/worlds/tiny.py -> worlds.tiny; None for what is not in common/."""
    inside = path.removeprefix("common/")
    return inside.removesuffix(".py").replace("/", ".") if inside != path else None


def core(sources):
    """The part of common/ that belongs to no family and no world."""
    mine = {p: t for p, t in sources.items() if stem(p) and "." not in stem(p)}
    return {p: t for p, t in mine.items() if stem(p) not in FAMILY_FILES}


def imported(tree):
    """[(node, module of common, name taken from it or None, its name here)] for every import of common."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for n in [n for n in node.names if n.name.split(".")[0] == "common"]:
                out.append((node, n.name.removeprefix("common").lstrip(".") or "__init__", None, n.asname))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] == "common":
                inside = module if node.level else module.removeprefix("common").lstrip(".")
                out += [(node, inside, n.name, n.asname or n.name) for n in node.names]
    return out


def imports(sources, path):
    """-> (modules of common that a file imports, {name here: module}, {(module, name)} taken out of them)."""
    known = {stem(p) for p in sources if stem(p)}
    modules, aliases, names = set(), {}, set()
    for _, module, name, here in imported(ast.parse(sources[path])):
        whole = f"{module}.{name}".strip(".") if name else module
        if whole in known:
            modules.add(whole)
            aliases[here or f"common.{whole}"] = whole
        else:
            modules.add(module or "__init__")
            names.add((module or "__init__", name))
    return modules, aliases, names


def used(sources, path):
    """{(module, name)} of common/ that a file uses; of its own, what is used outside its own definition."""
    tree = ast.parse(sources[path])
    _, aliases, found = imports(sources, path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add((aliases.get(ast.unparse(node.value)), node.attr))
    for statement in tree.body:
        own = getattr(statement, "name", None)
        inside = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
        found |= {(stem(path), name) for name in inside - {own}}
    return found


def public(text):
    """The public functions and classes of a module."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n for n in ast.parse(text).body if isinstance(n, kinds) and not n.name.startswith("_")]


def two_users(sources):
    """A public function or class of common/ is used by two files, its own one too; a public method by one."""
    users, attributes, complaints = {}, {}, []
    for path, text in sources.items():
        for thing in used(sources, path):
            users.setdefault(thing, set()).add(path)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute):
                attributes[node.attr] = attributes.get(node.attr, 0) + 1
    for path in [p for p in sources if stem(p) and "." not in stem(p)]:
        purpose = PURPOSE.get(stem(path), ())
        names = {thing.name for thing in public(sources[path])}
        gone = [name for name in purpose if name not in names]
        complaints += [f"tests/house.py: PURPOSE names {name}, which {path} has not" for name in gone]
        for thing in public(sources[path]):
            there = sorted(users.get((stem(path), thing.name), ()))
            if len(there) < (1 if thing.name in purpose else 2):
                complaints.append(f"{path}: {thing.name} is used by {' and '.join(there) or 'nobody'}")
            for method in thing.body if isinstance(thing, ast.ClassDef) else ():
                known = not isinstance(method, ast.FunctionDef) or method.name.startswith("_")
                if not known and method.name not in CALLED_BY_TORCH and not attributes.get(method.name):
                    complaints.append(f"{path}: {thing.name}.{method.name} is used by nobody")
    return complaints


def line_caps(sources):
    """The core of common/ under 3,170 lines, a file at most 260, a world (what makes a task) at most 115."""
    lines = {p: len(t.splitlines()) for p, t in sources.items() if stem(p)}
    total = sum(lines[p] for p in core(sources))
    complaints = [] if total < 3170 else [f"the core of common/ has {total} lines; it is to stay under 3,170"]
    for path, n in lines.items():
        most = 115 if makes_task(path, sources[path]) else 260
        if n > most:
            complaints.append(f"{path} has {n} lines, more than {most}")
    return complaints


def makes_task(path, text):
    """Is a file a world?"""
    return path.startswith("common/worlds/") and any(f.name == "task" for f in public(text))


def probed(sources):
    """Nothing in common/ asks whether a script has a flag."""
    complaints = []
    for path in [p for p in sources if stem(p)]:
        for node in ast.walk(ast.parse(sources[path])):
            if isinstance(node, ast.Call) and ast.unparse(node).startswith("hasattr(args"):
                complaints.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return complaints


def methods_named(sources):
    """The core of common/ has no name of a script, in code, strings or comments."""
    names = {p[6:-3] for p in sources if p.startswith("algos/")} - set(ORDINARY) - {"__init__"}
    complaints = []
    for path, text in core(sources).items():
        for i, line in enumerate(text.splitlines(), 1):
            for word in [w for w in re.findall(r"\w+", line) if w.lower() in names]:
                complaints.append(f"{path}:{i}: {word} is the name of a script")
    return complaints


def one_way(sources):
    """Imports in common/ run one way and without a circle; files of worlds/ that make a task are found by
    their names, and imported by nobody but each other."""
    graph = {stem(p): imports(sources, p)[0] for p in sources if stem(p)}
    graph = {module: {to for to in edges if to in graph and to != module} for module, edges in graph.items()}
    low_high = [(low, high) for row in ORDER for i, low in enumerate(row) for high in row[i + 1 :]]
    low_high += [(stem(p), high) for p in core(sources) for high in FAMILY_FILES]
    worlds = [stem(p) for p, text in sources.items() if makes_task(p, text)]
    low_high += [(module, world) for module in graph if not module.startswith("worlds") for world in worlds]
    complaints = [f"imports run in a circle: {' -> '.join(path)}" for path in circles(graph)]
    for low, high in dict.fromkeys(low_high):
        path = way(graph, low, high)
        if path:
            complaints.append(f"{low} is to stay below {high}, but imports it: {' -> '.join(path)}")
    return complaints


def hidden_imports(sources):
    """No function in common/ imports a module of common/: that would hide a circle. LATE may, for time."""
    complaints = []
    for path in [p for p in sources if stem(p)]:
        tree = ast.parse(sources[path])
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
        nodes = {node.lineno: node for f in functions for node, *_ in imported(f)}
        found = [(line, ast.unparse(node)) for line, node in sorted(nodes.items())]
        complaints += [f"{path}:{line}: {text}" for line, text in found if (path, text) not in LATE]
    return complaints


def way(graph, start, end):
    """The shortest way from one module to another along imports, or None."""
    ways, seen = [[start]] if start in graph else [], {start}
    for path in ways:
        for to in sorted(graph[path[-1]]):
            if to == end:
                return [*path, to]
            if to not in seen:
                seen.add(to)
                ways.append([*path, to])
    return None


def circles(graph):
    """A way back for every import that has one, each circle once."""
    found = {}
    for start in sorted(graph):
        path = way(graph, start, start)
        if path:
            found.setdefault(frozenset(path), path)
    return list(found.values())
