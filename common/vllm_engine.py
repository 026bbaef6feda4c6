"""vLLM as an engine (see engines.py): text is sampled by it, weights are the trainer's."""

import os
import tempfile

from common import UserError, export, gpu
from common.models import end_tokens


def _heat():
    """A class of vLLM's logits processors, a new one: where it has a rule(logits [b, V]) -> [b], logits are divided by that."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the second runner does not call such processors
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Heat(LogitsProcessor):
        rule = None

        def __init__(self, *_):
            """No state: a row's own logits are all that the rule sees."""

        update_state = __init__

        def is_argmax_invariant(self):
            return True  # a division by a positive number

        def apply(self, logits):
            return logits if self.rule is None else logits.div_(self.rule(logits)[:, None])

    return Heat


class VLLM:
    """vLLM 0.32 in this process: one engine per rank on the rank's own device, or one per args.vllm_tp neighbouring ranks that
    share out its weights; these are replaced in place after every update. On a GPU it sleeps while the trainer updates."""

    name = "vllm"

    def __init__(self, policy, tokenizer, args, context, heated=False):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm

        if not vllm.__version__.startswith("0.32."):
            print(f"note: vLLM {vllm.__version__} is not the tested 0.32; if it misbehaves: --engine hf", flush=True)
        self.policy, self.device, self.end = policy, gpu.device(), end_tokens(policy.lm, tokenizer)
        self.stop = list(vars(args).get("stop", ()))
        self.cuda, self.asleep, self.tp = self.device.type == "cuda", set(), args.vllm_tp
        self.heat = _heat() if heated else None
        if gpu.world() % self.tp:
            raise UserError(f"--vllm-tp {self.tp}: {gpu.world()} processes cannot be shared out in groups of {self.tp}")
        with tempfile.TemporaryDirectory() as folder:  # shapes only: the weights come by sync()
            policy.lm.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self.llm = vllm.LLM(
                model=folder, skip_tokenizer_init=not self.stop, load_format="dummy", dtype=args.dtype,
                max_model_len=context, tensor_parallel_size=self.tp, logprobs_mode="processed_logprobs",
                enable_prefix_caching=True, distributed_executor_backend="external_launcher" if gpu.world() > 1 else "uni",
                gpu_memory_utilization=args.vllm_memory, enforce_eager=not self.cuda, enable_sleep_mode=self.cuda,
                max_num_batched_tokens=max(8192, context), seed=0, disable_log_stats=True,
                logits_processors=[self.heat] if heated else None,
            )  # fmt: skip
        self.sync()

    def sync(self):
        """The policy's weights into the engine, which may be asleep. That they arrived shows in sampler_gap: summary()."""
        self.wake(["weights"])
        weights = ((name, weight.to(self.device)) for name, weight in export.full_weights(self.policy))
        self.llm.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        self.llm.reset_prefix_cache()

    def sleep(self):
        """Gives the GPU's memory to the trainer; the weights wait in the CPU's."""
        if self.cuda and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def wake(self, parts=("weights", "kv_cache")):
        """Takes back what sleep() gave away."""
        if parts := [p for p in parts if p in self.asleep]:
            self.llm.wake_up(tags=parts)
            self.asleep -= set(parts)

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()

    def generate(self, prefixes, n, max_new_tokens, temperature, seeds):
        """As HF.generate. top-p and top-k stay off: a cut distribution is not the one that the trainer's log-probs are of.
        The ranks of a group hand all their prompts to the engine that they share, in the same order, and keep their own."""
        from vllm import SamplingParams

        mine = slice(0, len(prefixes))
        budgets = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prefixes)
        if self.tp > 1:
            first = gpu.rank() // self.tp * self.tp
            group = gpu.gather_objects((prefixes, seeds, budgets))[first : first + self.tp]
            before = sum(len(p) for p, *_ in group[: gpu.rank() - first])
            mine = slice(before, before + len(prefixes))
            prefixes, seeds, budgets = ([x for part in group for x in part[i]] for i in range(3))
        if self.heat:
            self.heat.rule = staticmethod(temperature) if callable(temperature) else None
        temperature = 1.0 if callable(temperature) else temperature
        shared = dict(n=n, temperature=temperature, logprobs=0, stop_token_ids=self.end, detokenize=bool(self.stop))
        shared |= dict(stop=self.stop, include_stop_str_in_output=True) if self.stop else {}
        params = [SamplingParams(max_tokens=most, seed=s % 2**31, **shared) for s, most in zip(seeds, budgets)]
        done = self.llm.generate([{"prompt_token_ids": p} for p in prefixes], params, use_tqdm=False)
        out = [(list(c.token_ids), c) for request in done[mine] for c in request.outputs]
        return [(y, [law[t].logprob for t, law in zip(y, c.logprobs)], c.finish_reason == "stop") for y, c in out]
