"""Checkpoints: a folder that transformers loads, and state.pt; written whole or not at all, resumed bit for bit."""

import contextlib
import hashlib
import json
import os
import re
import shutil

import huggingface_hub
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict as dcp

from common import UserError, gpu, reason, whole_folder
from common.batch import Batch

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all ranks, on rank 0


def save(run, policy, optimizer):
    """Writes <run folder>/checkpoints/step-N and keeps the last two. A Policy becomes a model folder (LoRA merged); the rest
    (adapters, another module's weights, run.state, queue and extra, the optimizers) lies in state.pt. A collective."""
    folder = run.dir / "checkpoints" / f"step-{run.state['step']:06d}"
    lm = getattr(policy, "lm", None)
    full = gpu.full_weights(policy) if lm else ()
    weights = {name: weight.cpu().contiguous() for name, weight in full if run.main}  # all ranks take part, one keeps
    saved = dict(state=run.state, queue=gpu.gather_objects(run.queue))
    saved["own"] = {k: gpu.whole(v).cpu() for k, v in policy.state_dict().items() if not lm or ".lora_" in k}
    saved["optimizer"] = _states(policy, optimizer)
    saved["schedules"] = [schedule.state_dict() for schedule in run.schedules]
    for name, pair in run.extra.items():
        saved[name] = dcp.get_model_state_dict(pair[0], options=WHOLE), _states(*pair)
    if not run.main or folder.exists():
        return
    with whole_folder(folder, "the checkpoint") as scratch:
        if lm:
            gpu.write_weights(lm, weights, scratch)
            run.tokenizer.save_pretrained(scratch)
        torch.save(saved, scratch / "state.pt")
        sums = {p.name: _digest(p) for p in sorted(scratch.iterdir())}
        (scratch / "manifest.json").write_text(json.dumps(dict(model=_key(policy), files=sums)))
    for old in _all(run.dir)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def _put(module, optimizer, weights, states):
    """What a checkpoint has of a module and its optimizer, into both."""
    dcp.set_model_state_dict(module, weights, options=WHOLE)
    if states:
        dcp.set_optimizer_state_dict(module, optimizer, states, options=dcp.StateDictOptions(**vars(WHOLE) | {"strict": False}))
        for weight in [w for name, w in module.named_parameters() if name not in states["state"]]:
            optimizer.state.pop(weight, None)  # it has had no gradient yet, and dcp would have it be one step old


def _states(module, optimizer):
    """An optimizer's state, None before its first step: dcp would make one, whose step counter is at 1 already."""
    return dcp.get_optimizer_state_dict(module, optimizer, options=WHOLE) if optimizer.state else None


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
        hub.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["state.pt", "manifest.json"])
    except Exception as error:
        raise UserError(f"--push-to-hub {repository}: {reason(error)}; the model is in {folder}") from None


def find(run, config=None):
    """The newest whole checkpoint -> (folder, manifest, what save() wrote), or None. UserError where all are damaged, or it is
    of another model than `config` describes."""
    folders = _all(run.dir)
    for folder in reversed(folders):
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name, digest in manifest["files"].items():
                if _digest(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            if config is not None and manifest["model"] != _shape(config):
                raise UserError(f"--resume {run.dir}: the checkpoint is of another model ({manifest['model']})")
            return folder, manifest, torch.load(folder / "state.pt", weights_only=False, map_location="cpu")
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
    in the queue are shared out anew."""
    folder, manifest, saved = found
    if manifest["model"] != _key(policy):
        raise UserError(f"--resume {run.dir}: the checkpoint is of another model ({manifest['model']})")
    # A tied head is in neither, since it is the embeddings; beside adapters the weights are those of the start.
    weights = saved["own"] or {f"lm.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    _put(policy, optimizer, weights, saved["optimizer"])
    for name, pair in run.extra.items():
        _put(*pair, *saved[name])
    for schedule, state in zip(run.schedules, saved.get("schedules", ())):
        schedule.load_state_dict(state)
        gpu.set_rate(schedule)  # --steps may have changed
    if len(saved["queue"]) == gpu.world():
        run.queue = saved["queue"][gpu.rank()]
    elif saved["queue"][0]:
        joined = [Batch.join(parts) for parts in zip(*saved["queue"])]
        odd = [n for n in (len(b.ids) // b.group for b in joined) if n % gpu.world()]
        if odd:
            what = f"a rollout that waits has {odd[0]} groups, which {gpu.world()} processes cannot share evenly"
            raise UserError(f"--resume {run.dir}: {what}; go on with {len(saved['queue'])}")
        run.queue = [b.groups(gpu.local(torch.arange(len(b.ids) // b.group))) for b in joined]
    run.queue = [b.to(gpu.device()) for b in run.queue]
    if run.main:
        folders = _all(run.dir)
        for damaged in folders[folders.index(folder) + 1 :]:  # its step is run and saved again
            shutil.rmtree(damaged, ignore_errors=True)
        print(f"resumed from {folder}", flush=True)


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


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
