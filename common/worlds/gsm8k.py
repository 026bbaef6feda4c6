"""gsm8k: grade-school word problems, from the Hugging Face hub."""

from common.tasks import from_hub

HAS = ("solutions",)


def task():
    """Cobbe et al., arXiv 2110.14168; the answer stands behind ####."""
    return from_hub("gsm8k", "openai/gsm8k", ["main"])
