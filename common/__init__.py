"""What every script shares and no paper changes: models, tasks, rewards, rollouts, devices, run folders."""

import logging
import os
import sys

# Chatter at import that says nothing to the user: torchao's optional kernels, a deprecation inside torch's pytree.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class UserError(SystemExit):
    """A mistake that the user can mend: one clear line on stderr and exit code 2, never a traceback."""

    def __init__(self, message):
        super().__init__(2)
        self.message = message
        print(f"error: {message}", file=sys.stderr, flush=True)

    def __str__(self):
        return self.message
