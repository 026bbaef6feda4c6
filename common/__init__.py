"""What every script shares and no paper changes: models, tasks, rewards, rollouts, devices, run folders."""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

# Chatter at import that says nothing to the user: torchao's optional kernels, a deprecation inside torch's pytree.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]


class UserError(SystemExit):
    """A mistake that the user can mend: one clear line on stderr and exit code 2, never a traceback."""

    def __init__(self, message):
        super().__init__(2)
        self.message = message
        if _first_to_say(message):
            print(f"error: {message}", file=sys.stderr, flush=True)

    def __str__(self):
        return self.message


def _first_to_say(message):
    """Whether no other of torchrun's processes on this machine has said this: each would say it."""
    launcher = Path(f"/proc/{os.getppid()}")
    if "TORCHELASTIC_RUN_ID" not in os.environ or not launcher.exists():
        return True
    said = f"{launcher.stat().st_ctime_ns}-{zlib.crc32(message.encode())}"
    with contextlib.suppress(FileExistsError):
        os.close(os.open(Path(tempfile.gettempdir()) / f"tokenpo-{said}", os.O_CREAT | os.O_EXCL))
        return True
    return False


def reason(error, longest=160):
    """An exception as part of a line: the system's word for it, else the first line of its text, else its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (getattr(error, "strerror", None) or (lines or [type(error).__name__])[0])[:longest]


@contextlib.contextmanager
def whole_folder(folder, what, makes=True):
    """Gives a scratch folder to be filled, which then becomes `folder`, whole or not at all. UserError, naming `what`. `makes`:
    False where another process makes it, and this one only writes into it."""
    folder = Path(folder)
    scratch = folder.with_name(folder.name + ".tmp")
    try:
        if makes:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        yield scratch
        if not makes:
            return
        for path in [*scratch.rglob("*"), scratch]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(scratch, folder)
    except Exception as error:  # torch, safetensors and tokenizers have errors of their own for a full disk
        shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(f"cannot write {what} {folder}: {reason(error)}") from None
