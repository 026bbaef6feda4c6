"""Scripts whose statistics, masks or choices are over a whole rollout: two processes with half of it each are one with all."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT, tiny

__all__ = ["tiny"]
# Scripts, or script:mode.
SCRIPTS = "ares d3s forking_tokens gtpo hapo lp_reg pppo rng seed_grpo steer thr".split()
SCRIPTS += "pf_ppo poad rank_grpo rlfr spo spo:tree t_ppo sft otr intro rmt gdpo unmasking_policy training_free_grpo".split()
SCRIPTS += "bupo opsd soft_grpo soft_tokens cot2 atp_latent grpo_vision tw_grpo cacovid vppo fourier_head xar ptp".split()
SCRIPTS += ["xguard"]
MORE = dict(
    rank_grpo=dict(task="titles"),
    poad=dict(task="door", critic_first=0, critic_epochs=1),  # an environment; the policy moves from the start
    t_ppo=dict(window=19, value_warmup=0),  # by the default one all of the first rewards are 0
    rlfr=dict(flow_steps=5, demos_per_step=4),
    spo=dict(mc_rollouts=3, branches=(3, 3, 3)),
    rmt=dict(task="digits"),
    **dict.fromkeys(["sft", "otr"], dict(batch_size=7)),  # a row more on one of them
    gdpo=dict(task="sums"),
    bupo=dict(inner_steps=1),  # and the final policy afterwards
    soft_tokens=dict(task="chain:slips"),  # sums of one character, each a thought
    atp_latent=dict(task="chains", sft_steps=12, demos_per_step=8, max_new_tokens=8),
    cot2=dict(task="mnns", csft_steps=60, csft_batch=32, k=6),
    training_free_grpo=dict(task="rules", prompts_per_step=32),  # a world of its own; enough groups that teach
    unmasking_policy=dict(task="sums"),
    **dict.fromkeys(["grpo_vision", "vppo"], dict(task="count_sum")),
    tw_grpo=dict(task="events"),
    cacovid=dict(task="needle", combinations=8, repetitions=2),
    xar=dict(batch_size=5, samples=17, sampling_steps=2, max_grad_norm=0.5),
    ptp=dict(batch_size=7, episodes=4, width=16, warmup_steps=0),
    fourier_head=dict(batch_size=7, gamma=0.1),
    xguard=dict(task="guard", batch_size=7),
)
# In float64, since AdamW turns rounding noise into steps wherever the true gradient is 0. DAPO's filter is off: it leaves every
# process with groups of its own, which is not a script's doing.
EACH = """
import importlib, sys
sys.path.insert(0, {root!r})
from common import gpu
finish, gpu.finish = gpu.finish, lambda: None  # one process group for all
for which in {names!r}:
    name, _, mode = which.partition(":")
    script = importlib.import_module("algos." + name)
    flags = dict(task="addition", steps=2, prompts_per_step=8, group_size=4, minibatches=2, eval_prompts=8, checkpoint_every=0,
                 micro_batch_tokens=256, dtype="float64", run_dir={folder!r} + "/" + which, max_gen_batches=0)
    flags |= dict(mode=mode, edges_now=8) if mode else dict()  # edges wait
    flags |= {more!r}.get(name, dict())
    known = script.Args.__dataclass_fields__
    sys.argv = [name]
    script.train(script.Args(**{{k: v for k, v in flags.items() if k in known}}))
finish()
"""


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """{(ranks, script): rows of its metrics and of its evaluations}, all scripts in one process of each size."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        (folder / "each.py").write_text(EACH.format(root=str(ROOT), names=SCRIPTS, more=MORE, folder=str(folder)))
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(many if ranks > 1 else ()), str(folder / "each.py")]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        for name in SCRIPTS:
            files = [folder / name / f"{kind}.jsonl" for kind in ("metrics", "evals")]
            found[ranks, name] = [[json.loads(row) for row in open(file)] for file in files]
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_are_one(runs, name):
    (one, before), (two, after) = (runs[ranks, name] for ranks in (1, 2))
    assert len(one) == len(two) == 2 and all(row.get("grad_norm", 1) > 0 for row in one)  # training_free_grpo has none
    assert len(before) == len(after) > 0
    for a, b in zip(one + before, two + after):
        assert a.keys() == b.keys()
        for k in [k for k in a if not k.startswith("time/")]:
            assert b[k] == pytest.approx(a[k], rel=1e-6, abs=1e-6), (a["step"], k)
