"""math: competition problems, from the Hugging Face hub."""

from common.tasks import from_hub

HAS = ("solutions",)

PARTS = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"


def task():
    """Hendrycks et al., arXiv 2103.03874; the answer stands in a box."""
    return from_hub("math", "EleutherAI/hendrycks_math", PARTS.split())
