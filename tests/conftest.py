"""vLLM's tests are collected where vLLM is installed; .ci/run gives them an environment of their own."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_vllm.py"]
