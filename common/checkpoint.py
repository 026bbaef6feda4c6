"""Checkpoints: a folder that transformers loads, and beside the model what a run goes on with, of which every process writes
and reads its own part; written whole or not at all, resumed bit for bit."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings

import huggingface_hub
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from common import UserError, export, gpu, reason, whole_folder
from common.batch import Batch


def save(run, policy, optimizer):
    """Writes <run folder>/checkpoints/step-N and keeps the last two. A Policy becomes a model folder (LoRA merged, and apart in
    adapter/ as peft has it); the rest (adapters, another module's weights, run.state, queue and extra, the optimizers) lies in
    state/. A collective; no process holds more than its own part and one file of the model."""
    folder = gpu.gather_objects(run.dir)[0] / "checkpoints" / f"step-{run.state['step']:06d}"
    if gpu.maximum(int(folder.exists())):
        return
    lm = getattr(policy, "lm", None)
    saved = dict(state=run.state, schedules=[schedule.state_dict() for schedule in run.schedules])
    saved[f"queue.{gpu.rank()}."] = [b.to("cpu") for b in run.queue]
    for title, pair in dict(policy=(policy, optimizer), **run.extra).items():
        saved |= _weights(title, pair[0]) | _states(title, *pair)
    with whole_folder(folder, "the checkpoint", run.main) as scratch:
        gpu.gather_objects(None)  # it is there now
        if not scratch.is_dir():
            raise UserError(f"{folder.parent}: not all processes see it; give a --run-dir on a disk that all nodes share")
        if lm:
            export.write_weights(lm, export.full_weights(policy), scratch if run.main else None)
            if hasattr(lm, "peft_config"):
                _write_adapter(lm, scratch / "adapter" if run.main else None)
            if run.main:
                run.tokenizer.save_pretrained(scratch)
        _call(dcp.save, saved, dcp.DefaultSavePlanner, checkpoint_id=scratch / "state")
        names = sorted(p.relative_to(scratch).as_posix() for p in scratch.rglob("*") if p.is_file())
        sums = {n: x for part in gpu.gather_objects(_digests(scratch, names)) for n, x in part.items()}
        if run.main:
            (scratch / "manifest.json").write_text(json.dumps(dict(model=_key(policy), world=gpu.world(), files=sums)))
    for old in _all(run.dir)[:-2] if run.main else ():
        shutil.rmtree(old, ignore_errors=True)
    gpu.gather_objects(None)


def _weights(title, module):
    """What of a module's weights a checkpoint's state/ holds, by name: a Policy's own are in the model folder."""
    apart = title == "policy" and hasattr(module, "lm")
    return {f"{title}.weights.{k}": v for k, v in module.state_dict().items() if not apart or ".lora_" in k}


def _states(title, module, optimizer):
    """The optimizer's states by the names of the weights; what is no plain tensor (8 bits) goes as an object."""
    names = {weight: name for name, weight in module.named_parameters()}
    return {
        f"{title}.optimizer.{names[weight]}.{key}": x if type(x) in (torch.Tensor, DTensor) else (x,)
        for weight, of in optimizer.state.items() for key, x in of.items()
    }  # fmt: skip


def _write_adapter(lm, folder):
    """The LoRA layers as peft's PeftModel.from_pretrained takes them; folder None: only takes part."""
    import peft

    found = {name: gpu.whole(weight).cpu() for name, weight in lm.state_dict().items() if ".lora_" in name}
    if folder:
        found = peft.get_peft_model_state_dict(lm, found, save_embedding_layers=False)
        lm.peft_config["default"].save_pretrained(folder)
        save_file({f"base_model.model.{k}": v for k, v in found.items()}, folder / "adapter_model.safetensors")


def _call(function, what, planner, **where):
    """dcp.save or dcp.load, without its remarks; dictionaries stay objects."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(what, planner=planner(flatten_state_dict=False, flatten_sharded_tensors=False), **where)


def read(folder, *starts):
    """What the checkpoint in `folder` holds under names that begin so, whole, for this process alone: {name: tensor, object}.
    policy.weights.<name> (adapters, or a module that is no Policy), policy.optimizer.<name>.<key>, the same with the name of
    one of run.extra, state, schedules, queue.<process>."""
    reader = dcp.FileSystemReader(folder / "state")
    found = {k: _empty(x) for k, x in reader.read_metadata().state_dict_metadata.items() if k.startswith(starts)}
    _call(dcp.load, found, dcp.DefaultLoadPlanner, storage_reader=reader, no_dist=True)
    return found


def weights(folder, title="policy"):
    """{name: whole tensor} of what the checkpoint in `folder` has in state/ of the policy, or of one of run.extra."""
    return {k.removeprefix(f"{title}.weights."): v for k, v in read(folder, f"{title}.weights.").items()}


def _empty(about, like=None):
    """A place for what metadata describe: sharded like a weight of the same shape, None for an object."""
    if not isinstance(about, TensorStorageMetadata):
        return None
    if like is not None and like.dim() and about.size == like.shape:
        return torch.empty_like(like, dtype=about.properties.dtype, requires_grad=False)
    return torch.empty(about.size, dtype=about.properties.dtype)


def may_push(repository):
    """UserError, before a run has cost anything, where a model could not be pushed there: no owner/name, no token."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push-to-hub {repository}: needs owner/name")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push-to-hub {repository}: there is no token for the hub here; log in with: hf auth login")


def push(run):
    """The run's last checkpoint, as a model that transformers loads, to args.push_to_hub on the hub: private, made if it is
    not there. UserError where that fails."""
    folder, repository = _all(run.dir)[-1], run.args.push_to_hub
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["state/*", "manifest.json"])
    except Exception as error:
        raise UserError(f"--push-to-hub {repository}: {reason(error)}; the model is in {folder}") from None


def find(run, config=None):
    """The newest whole checkpoint -> (folder, manifest, run.state), or None. UserError where all are damaged, or it is of
    another model than `config` describes. A collective: every process looks at its share of the files."""
    folders = _all(run.dir)
    for folder in reversed(folders):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            sums = {n: x for part in gpu.gather_objects(_digests(folder, manifest["files"])) for n, x in part.items()}
            if bad := [name for name, digest in manifest["files"].items() if sums[name] != digest]:
                raise ValueError(f"{bad[0]} is not what was written")
            if config is not None and manifest["model"] != _shape(config):
                raise UserError(f"--resume {run.dir}: the checkpoint is of another model ({manifest['model']})")
            return folder, manifest, read(folder, "state")["state"]
        except Exception as error:
            if run.main:
                print(f"checkpoint {folder} is damaged ({reason(error)}); using the one before it", flush=True)
    if folders:
        raise UserError(f"--resume {run.dir}: no whole checkpoint is left")
    if run.main:
        print(f"{run.dir} has no checkpoint yet: starting from the first step", flush=True)
    return None


def restore(run, found, policy, optimizer):
    """What find() gave into the policy, the optimizer and the run; with another number of processes the rollouts that wait
    in the queue are shared out anew. A collective; every process reads its own part."""
    folder, manifest, _ = found
    if manifest["model"] != _key(policy):
        raise UserError(f"--resume {run.dir}: the checkpoint is of another model ({manifest['model']})")
    if hasattr(policy, "lm") and not hasattr(policy.lm, "peft_config"):  # beside adapters the weights are those of the start
        kept = policy.lm.state_dict()
        if policy.lm.config.tie_word_embeddings:
            kept.pop("lm_head.weight")  # it is stored once, as the embeddings
        _call(dcp.load, kept, dcp.DefaultLoadPlanner, storage_reader=dcp.HuggingFaceStorageReader(folder))
    reader = dcp.FileSystemReader(folder / "state")
    there = reader.read_metadata().state_dict_metadata
    for title, pair in dict(policy=(policy, optimizer), **run.extra).items():
        _put(title, *pair, reader, there)
    for schedule, state in zip(run.schedules, read(folder, "schedules")["schedules"]):
        schedule.load_state_dict(state)
        gpu.set_rate(schedule)  # --steps may have changed
    if manifest["world"] == gpu.world():
        (run.queue,) = read(folder, f"queue.{gpu.rank()}.").values()
    else:
        waiting = read(folder, "queue.")
        joined = [Batch.join(parts) for parts in zip(*(waiting[f"queue.{i}."] for i in range(manifest["world"])))]
        odd = [n for n in (len(b.ids) // b.group for b in joined) if n % gpu.world()]
        if odd:
            what = f"a rollout that waits has {odd[0]} groups, which {gpu.world()} processes cannot share evenly"
            raise UserError(f"--resume {run.dir}: {what}; go on with {manifest['world']}")
        run.queue = [b.groups(gpu.local(torch.arange(len(b.ids) // b.group))) for b in joined]
    run.queue = [b.to(gpu.device()) for b in run.queue]
    if run.main:
        folders = _all(run.dir)
        for damaged in folders[folders.index(folder) + 1 :]:  # its step is run and saved again
            shutil.rmtree(damaged, ignore_errors=True)
        print(f"resumed from {folder}", flush=True)
    gpu.gather_objects(None)  # before any process asks what is there


def _put(title, module, optimizer, reader, there):
    """What a checkpoint holds of a module and its optimizer, into both; a weight that had no gradient yet has no states."""
    start, found = f"{title}.optimizer.", _weights(title, module)  # the weights are filled in place
    weights = dict(module.named_parameters())
    for name in (name for name in there if name.startswith(start)):
        found[name] = _empty(there[name], weights[name.removeprefix(start).rpartition(".")[0]])
    _call(dcp.load, found, dcp.DefaultLoadPlanner, storage_reader=reader)
    states = {}
    for name, x in found.items():
        if name.startswith(start):
            weight, _, key = name.removeprefix(start).rpartition(".")
            states.setdefault(weight, {})[key] = x[0] if isinstance(x, tuple) else x
    groups, names = optimizer.state_dict()["param_groups"], {weight: name for name, weight in weights.items()}
    order = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
    optimizer.load_state_dict(dict(state={i: states[n] for i, n in enumerate(order) if n in states}, param_groups=groups))


def rows(path):
    """The rows of a .jsonl file, without a line that was cut short; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def rewind(folder, step):
    """Drops what was logged after the checkpoint of this step, since it is run again."""
    for name in ("metrics", "samples", "evals"):
        path, scratch = folder / f"{name}.jsonl", folder / f"{name}.tmp"
        kept = [json.dumps(row) + "\n" for row in rows(path) if row["step"] <= step]
        scratch.write_text("".join(kept), encoding="utf-8")
        os.replace(scratch, path)


def _key(module):
    """What two models must share for a checkpoint of one to fit the other."""
    if not hasattr(module, "lm"):
        kind = type(module).__name__.removeprefix("FSDP")  # which fully_shard puts there
        return f"{kind}, {sum(p.numel() for p in module.parameters()):,} parameters"
    return _shape(module.lm.config)


def _shape(config):
    config = config.get_text_config()
    return f"{config.model_type} {config.num_hidden_layers} x {config.hidden_size}, vocabulary {config.vocab_size}"


def _all(folder):
    """The checkpoints in a run folder, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _digests(folder, names):
    """{name: what its bytes come to, None where it cannot be read} of this process's share of the files."""
    found = {}
    for name in list(names)[gpu.rank() :: gpu.world()]:
        found[name] = None
        with contextlib.suppress(OSError), open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
