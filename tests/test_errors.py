"""Mistakes of the user's end with exit code 2 and one line on stderr that says what is wrong and what would be right."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import CORE, GRPO, ROOT, lines, run, tiny, user_error

__all__ = ["tiny"]
REAL = "--dtype float32 --optimizer adamw --steps 1 --prompts-per-step 4 --group-size 4 --max-new-tokens 8".split()
LOCAL = ["--model", "{tiny}", *REAL]  # a model folder: no warm start, any task


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """A folder with everything that the cases below name."""
    place = tmp_path_factory.mktemp("errors")
    rows = [json.dumps(dict(prompt=f"{i}+1=", answer=str(i + 1))) for i in range(40)]

    def write(name, lines):
        (place / name).write_text("\n".join(lines) + "\n")

    write("good.jsonl", rows)
    write("not_json.jsonl", [*rows[:4], "{'prompt': 'p', 'answer': 'a'}", *rows])
    write("no_answer.jsonl", [rows[0], "", '{"prompt": "p", "reply": "a"}'])
    write("no_object.jsonl", [rows[0], '["p", "a"]'])
    write("strange.jsonl", [*rows, json.dumps(dict(prompt="café?", answer="1"))])
    write("empty.jsonl", [])
    write("three.jsonl", rows[:3])
    write("long.jsonl", [*rows, json.dumps(dict(prompt="7" * 1020, answer="1"))])
    (place / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "answer": "1"}\n' * 9)
    (place / "file").write_text("a regular file")
    (place / "empty").mkdir()

    def model(name, **files):
        shutil.copytree(tiny, place / name)
        for file, content in files.items():
            path = place / name / file.replace("__", ".")
            path.unlink()
            if content is not None:
                path.write_bytes(content)

    weights = (place / tiny / "model.safetensors").read_bytes()
    model("no_weights", model__safetensors=None)
    model("cut_weights", model__safetensors=weights[:5000])
    model("no_tokenizer", tokenizer__json=None, tokenizer_config__json=None)
    model("bad_config", config__json=b"{")
    model("odd_type", config__json=b'{"model_type": "abacus"}')
    config = json.loads((place / tiny / "config.json").read_text())
    model("other_shape", config__json=json.dumps(config | dict(hidden_size=48, head_dim=16)).encode())
    gpt2 = dict(model_type="gpt2", n_embd=32, n_head=2, n_layer=1, vocab_size=78, architectures=["GPT2LMHeadModel"])
    model("gpt2", config__json=json.dumps(gpt2).encode())
    return place


CASES = {
    # names
    "model": ("--model qwen2.5-7", "unknown model 'qwen2.5-7'", "qwen2.5-7b"),
    "model nothing like it": ("--model @@@", "unknown model '@@@'", "hub id (owner/name)"),
    "model folder": ("--model ./nowhere/at/all", "no such folder './nowhere/at/all'"),
    "task": ("--task adition", "unknown task 'adition'", "nearest: addition"),
    "task near the hub's": ([*LOCAL, "--task", "gsm8"], "unknown task 'gsm8'", "nearest: gsm8k"),
    "digits": ("--task addition:two", "'two' is not a positive number"),
    "no digits": ("--task addition:0", "'0' is not a positive number"),
    "digits of another script": ("--task addition:²", "'²' is not a positive number"),
    "countdown too small": ("--task countdown:1", "task countdown:1", "numbers"),
    "countdown too large": ("--task countdown:9", "task countdown:9", "numbers"),
    "gym": ([*LOCAL, "--task", "reasoning_gym:chain_sums"], "'chain_sums'", "nearest: chain_sum"),
    "gym without a name": ([*LOCAL, "--task", "reasoning_gym"], "unknown reasoning_gym task ''"),
    "bfloat16 with plain adamw": ("--dtype bfloat16", "adamw_sr"),
    # numbers
    "group of one": ("--group-size 1", "--group-size must be at least 2"),
    "no minibatches": ("--minibatches 0", "--minibatches must be at least 1, is 0"),
    "no epochs": ("--epochs 0", "--epochs must be at least 1, is 0"),
    "no prompts": ("--prompts-per-step 0", "--prompts-per-step must be at least 1, is 0"),
    "negative steps": ("--steps -1", "--steps must be at least 0, is -1"),
    "no evaluation prompts": ("--eval-prompts 0", "--eval-prompts must be at least 1, is 0"),
    "no tokens": ("--max-new-tokens 0", "--max-new-tokens must be at least 1, is 0"),
    "temperature": ("--temperature 0", "--temperature must be above 0, is 0"),
    "temperature below": ("--temperature -1", "--temperature must be above 0, is -1"),
    "temperature that is no number": ("--temperature nan", "--temperature must be above 0, is nan"),
    "negative rate": ("--lr -1", "--lr"),
    "rate that is no number": ("--lr nan", "--lr"),
    "negative decay": ("--weight-decay -1", "--weight-decay"),
    "negative rank": ("--lora-rank -1", "--lora-rank"),
    "negative interval": ("--checkpoint-every -2 --steps 1 --prompts-per-step 4", "--checkpoint-every"),
    # task files
    "not JSON": ([*LOCAL, "--task", "{place}/not_json.jsonl"], "not_json.jsonl:5: not JSON"),
    "field missing": ([*LOCAL, "--task", "{place}/no_answer.jsonl"], "no_answer.jsonl:3: needs", "'prompt', 'reply'"),
    "no object": ([*LOCAL, "--task", "{place}/no_object.jsonl"], "no_object.jsonl:2: needs an object"),
    "empty": ([*LOCAL, "--task", "{place}/empty.jsonl"], "empty.jsonl", "at least 5 rows"),
    "three rows": ([*LOCAL, "--task", "{place}/three.jsonl"], "three.jsonl", "at least 5 rows"),
    "no such file": ([*LOCAL, "--task", "{place}/none.jsonl"], "none.jsonl", "No such file"),
    "a folder": ([*LOCAL, "--task", "{place}/empty"], "cannot read the file {place}/empty", "directory"),
    "not UTF-8": ([*LOCAL, "--task", "{place}/latin.jsonl"], "latin.jsonl", "utf-8"),
    "no demonstrations": (
        ["--task", "{place}/good.jsonl"],
        "tiny model is warm-started",
        "for {place}/good.jsonl give --model",
    ),
    "prompt too long": ([*LOCAL, "--task", "{place}/long.jsonl", "--prompt-template", "{{prompt}}"], "1020 tokens", "has 1024"),
    "completion too long": (
        "--task addition --max-new-tokens 1020",
        "--max-new-tokens 1020 needs 1026 positions; the model has 1024",
    ),
    # characters that the model has no token for
    "a character": (
        [*LOCAL, "--task", "{place}/strange.jsonl", "--prompt-template", "{{prompt}}"],
        "strange.jsonl:41: the tokenizer does not know the character 'é' of 'café?'",
    ),
    "a character of the task's own template": (
        [*LOCAL, "--task", "{place}/good.jsonl"],
        "good.jsonl:1: the tokenizer does not know the character '\\\\' of",
        "Please reason step by step",
    ),
    "a character of the template given": (
        ["--task", "addition", "--prompt-template", "<{{prompt}}>"],
        "addition:2: ",
        "not know the character '<' of '<",
    ),
    # templates
    "template without the field": (["--prompt-template", "Add!"], "--prompt-template needs the field {{prompt}}"),
    "template with another field": (["--prompt-template", "{{prompt}} {{x}}"], "--prompt-template needs the field {{prompt}}"),
    "template that is none": (["--prompt-template", "{{prompt}} {{"], "--prompt-template needs the field {{prompt}}"),
    "template with a width": (["--prompt-template", "{{prompt:9999999}}"], "--prompt-template needs the field {{prompt}}"),
    "template with an attribute": (["--prompt-template", "{{prompt.x}}"], "--prompt-template needs the field {{prompt}}"),
    "template with doubled braces": (
        ["--steps", "0", "--prompt-template", "{{{{prompt}}}}"],
        "--prompt-template needs the field",
    ),
    # places
    "run folder below a file": (["--run-dir", "{place}/file/run"], "cannot write to the run folder", "file/run"),
    "run folder is a file": (["--run-dir", "{place}/file"], "cannot write to the run folder"),
    "resume of nothing": (["--resume", "{place}/none"], "none: no run there"),
    # model folders
    "an empty folder": (["--model", "{place}/empty", *REAL], "cannot load a model from the folder", "/empty"),
    "no weights": (["--model", "{place}/no_weights", "--task", "addition", *REAL], "cannot load", "/no_weights"),
    "weights cut": (["--model", "{place}/cut_weights", "--task", "addition", *REAL], "cannot load", "/cut_weights"),
    "weights of another shape": (["--model", "{place}/other_shape", "--task", "addition", *REAL], "cannot load", "/other_sha"),
    "no tokenizer": (["--model", "{place}/no_tokenizer", "--task", "addition", *REAL], "/no_tokenizer", "tokenizer"),
    "broken config": (["--model", "{place}/bad_config", *REAL], "cannot load", "/bad_config"),
    "unknown architecture": (["--model", "{place}/odd_type", *REAL], "cannot load", "/odd_type", "abacus"),
    "another architecture": (["--model", "{place}/gpt2", "--task", "addition", *REAL], "/gpt2", "gpt2"),
    # the hub, without network
    "hub model": ("--model qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B could not be had from the hub", "--model path/to/folder"),
    "hub id": ("--model someone/something", "someone/something could not be had from the hub", "--model path/to/folder"),
    "hub data": ([*LOCAL, "--task", "gsm8k"], "openai/gsm8k could not be had from the hub", "--task path/to/train.jsonl"),
}


@pytest.mark.parametrize("name", CASES)
def test_user_error(name, place, tiny, tmp_path):
    argv, *parts = CASES[name]
    argv = argv.split() if isinstance(argv, str) else [a.format(tiny=tiny, place=place) for a in argv]
    if "--run-dir" not in argv and "--resume" not in argv:
        argv += ["--run-dir", str(tmp_path / "run")]
    empty = dict(HF_HOME=str(tmp_path / "hub"), HF_DATASETS_CACHE=str(tmp_path / "hub"))
    # An empty cache: a mistake must not wait for the warm start that the default task needs.
    if "addition" not in argv:
        empty |= dict(TOKENPO_CACHE=str(tmp_path / "cache"))
    said = user_error(run(tmp_path, *argv, env=empty, seconds=40))
    assert not (tmp_path / "cache").exists()
    for part in parts:
        assert part.replace("{place}", str(place)).replace("{{", "{").replace("}}", "}") in said, said
    assert len(said) < 500
    # a mistake that can be seen before the model is loaded leaves no run folder behind
    assert "cannot load" in said or not (tmp_path / "run").exists()


def test_the_tasks_that_a_tiny_model_can_have_are_those_with_demonstrations(place, tmp_path):
    said = user_error(run(tmp_path, "--task", place / "good.jsonl", "--run-dir", tmp_path / "run"))
    listed = said.partition("(")[2].partition(")")[0].split(", ")
    assert {"addition", "countdown", "letters", "letters4", "chain", "record"} <= set(listed)
    assert not {"gsm8k", "math", "reasoning_gym"} & set(listed)  # these have none


def test_cache_that_cannot_be_written(place, tmp_path):
    env = dict(TOKENPO_CACHE=str(place / "file" / "cache"))
    said = user_error(run(tmp_path, "--steps", 1, "--run-dir", tmp_path / "run", env=env))
    assert "cannot write the warm-started model to" in said and "file/cache" in said


def test_a_wrong_task_leaves_nothing_in_the_cache(place, tmp_path):
    env = dict(TOKENPO_CACHE=str(tmp_path / "cache"))
    for task in ("adition", str(place / "good.jsonl")):
        user_error(run(tmp_path, "--task", task, "--run-dir", tmp_path / "run", env=env))
    assert list((tmp_path / "cache").glob("*")) == []


def test_the_corrected_command_finds_its_folder_free(place, tiny, tmp_path):
    """A start that failed is no run yet: not to be resumed, and not in the way."""
    argv = ["--task", "addition", *REAL, "--eval-prompts", 8, "--run-dir", tmp_path / "run"]
    user_error(run(tmp_path, "--model", place / "no_weights", *argv))
    done = run(tmp_path, "--model", tiny, *argv)
    assert done.code == 0, done.err
    assert [r["step"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == [1]


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["--group-sizes", "8"], ["--group-size"]),
        (["--steps", "many"], ["many"]),
        (["--engine", "vlm"], ["vlm", "auto", "hf", "vllm"]),
        (["--optimizer", "sgd"], ["sgd", "adamw", "adamw_sr", "adamw_8bit"]),
        (["--dtype", "half"], ["half", "float32", "bfloat16"]),
    ],
)
def test_flags_that_do_not_parse(argv, parts, tmp_path):
    """tyro may say these in its own form, on more than one line."""
    done = run(tmp_path, *argv, "--run-dir", tmp_path / "run")
    assert done.code == 2 and "Traceback" not in done.err and not (tmp_path / "run").exists()
    assert all(part in done.err for part in parts), done.err


@pytest.mark.parametrize("field, value", [("engine", "vlm"), ("optimizer", "sgd"), ("dtype", "half")])
@pytest.mark.parametrize("model", ["tiny", "folder"])
def test_choices_are_checked_without_the_command_line(field, value, model, tiny):
    """Where Args is made in Python, no parser stands before it."""
    from algos import grpo
    from common import UserError, settings

    with pytest.raises(UserError, match=rf"--{field} must be .*{value}"):
        settings.resolve(grpo.Args(model="tiny" if model == "tiny" else tiny, **{field: value}))


def python(*argv, **env):
    return subprocess.run(
        [sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=120, env=os.environ | env,
        preexec_fn=lambda: os.sched_setaffinity(0, CORE),
    )  # fmt: skip


def test_a_process_of_its_own():
    """The same outside of the forked children: no library's warning comes before the line."""
    done = python(GRPO, "--model", "qwen2.5-7")
    assert (done.returncode, done.stdout) == (2, "grpo: loading transformers\n")
    assert done.stderr.startswith("error: unknown model 'qwen2.5-7'; nearest names: qwen2.5-7b")
    assert done.stderr.count("\n") == 1


def test_what_is_imported(tmp_path):
    """Nothing that takes seconds for --help or a mistake in a flag; of what transformers would like, not all for a run."""
    for argv, code, heavy in ((["--help"], 0, False), (["--lr", "fast"], 2, False), (["--model", "qwen2.5-7"], 2, True)):
        done = python("-X", "importtime", GRPO, *argv)
        said = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time" in line]
        found = {name.partition(".")[0] for name in said}
        assert (done.returncode, "transformers" in found) == (code, heavy) and "torch" in found
        assert not {"sklearn", "scipy", "pandas"} & found


def test_the_library_raises_what_the_scripts_end_with(capfd):
    """In a notebook a mistake is an exception that says what it is."""
    from common import UserError, models, tasks

    with pytest.raises(UserError, match="unknown task 'adition'; nearest: addition") as caught:
        tasks.load("adition")
    assert isinstance(caught.value, SystemExit) and caught.value.code == 2
    assert capfd.readouterr().err == f"error: {caught.value}\n"
    with pytest.raises(UserError, match="qwen2.5-7b"):
        models.locate("qwen2.5-7")
    assert models.locate("Qwen2.5-7B") == "Qwen/Qwen2.5-7B" and models.locate("someone/something") == "someone/something"
    assert models.locate(str(ROOT)) == str(ROOT) and models.locate("tiny") == "tiny"


def test_a_good_file_runs(place, tiny, tmp_path):
    """The cases above fail for their reasons and not for another one."""
    argv = [a.format(tiny=tiny) for a in LOCAL]
    done = run(tmp_path, *argv, "--task", place / "good.jsonl", "--run-dir", tmp_path / "run", "--prompt-template", "{prompt}")
    assert done.code == 0, done.err
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert done.out.splitlines()[-1].endswith("on 8 held-out prompts")
