"""Training-Free GRPO: which groups teach, what edits make of a library, what a critic is shown, a server, runs."""

import json
import random
import string
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from algos import training_free_grpo as tf
from algos.training_free_grpo import Rules
from common import UserError, rewards, settings, tasks
from common.worlds import tiny
from runs.panels import training_free_grpo as panel
from tests.helpers import ROOT, checkpoints, contents, lines, run

SCRIPT = ROOT / "algos" / "training_free_grpo.py"
GROUPS = dict(A=(1, 1, 1), B=(0, 0, 0), C=(1, 0, 1), D=(0, 1, 0))
LIBRARY = dict(G0="e0", G1="e1", G2="e2")


def args(**changes):
    values = dict(task="rules", critic="rule", max_new_tokens=16, critic_tokens=16, group_size=5, prompts_per_step=4)
    return tf.Args(**values | changes)


def group(rewards, texts=None, question="3 , 7 ="):
    texts = texts or [f"{question} {k}" for k in range(len(rewards))]
    return dict(question=question, gold="7", texts=texts, rewards=list(map(float, rewards)))


def op(option, text, *ids):
    return dict(option=option, experience=text, ids=list(ids))


# ---------------------------------------------------------------- the skeleton


def kept(groups, **changes):
    return [g["question"] for g in tf.teaching(groups, args(**changes))]


def test_groups_that_teach():
    groups = [group(rewards, question=name) for name, rewards in GROUPS.items()]
    assert kept(groups) == ["C", "D"]
    halves = [group((0.5, 0.5), question="A"), group((1, 0), question="B")]
    assert kept(halves) == ["A", "B"]  # a mean inside (0, 1), without spread
    assert kept(groups, group_size=1) == list("ABCD")  # without siblings there is nothing to compare
    assert tf.teaching([], args()) == []


def test_attempts_without_an_answer_are_left_out():
    missing = group((1, 0, 0), [None, "b", "c"], "A"), group((1, 0, 0), ["a", None, "c"], "B"), group((0, 0), [None, None], "C")
    found = tf.teaching(missing, args())
    assert [g["question"] for g in found] == ["B"] and found[0]["texts"] == ("a", "c") and found[0]["rewards"] == (1.0, 0.0)
    assert kept(missing[2:], group_size=1) == []


def test_edits_of_a_library():
    operations = [op("add", "n1"), op("modify", "m", "G1"), op("modify", "m9", "G9"), op("delete", "x", "G0"), op(None, "y")]
    candidates, modifies = tf.proposed(LIBRARY, operations)
    assert candidates == LIBRARY | dict(C0="n1") and modifies == [("G1", "m")]
    plan = [op("modify", "m1", "G1"), op("merge", "M", "G0", "C0", "Z9")]
    found = tf.revised(candidates, plan)
    assert found == dict(G1="m1", G2="e2", C1="M") and list(found) == ["G1", "G2", "C1"]
    assert tf.renumbered(found, args()) == dict(G0="m1", G1="e2", G2="M")
    assert candidates == LIBRARY | dict(C0="n1") and LIBRARY == dict(G0="e0", G1="e1", G2="e2")  # left as they were


def test_a_plan_goes_in_its_order():
    plan = [op("merge", "M", "G0", "G1"), op("modify", "x", "G1"), op("merge", "N", "C0"), op("modify", "y", "C1")]
    assert tf.revised(LIBRARY, [*plan, op("modify", "z")]) == dict(G2="e2", C1="y")
    assert tf.revised(LIBRARY, [op("merge", "M")]) == LIBRARY | dict(C0="M")
    assert tf.revised({}, []) == {} and tf.revised(LIBRARY, [op("delete", "x", "G0")]) == LIBRARY


def test_caps():
    texts = {f"C{k}": f"w{k} " * 9 for k in range(5)}
    found = tf.renumbered(texts, args(max_experiences=3, max_words=2))
    assert found == {f"G{k}": " ".join([f"w{k + 2}"] * 4) for k in range(3)}  # the oldest leave
    assert tf.renumbered({}, args()) == {}


REPLIES = [
    ('[{"option": "add", "experience": " a \\n b "}]', [op("add", "a b")]),
    ('{"option": "add", "experience": "a"}', [op("add", "a")]),
    ('```json\n[]\n```\nor\n```json\n[{"option": "modify", "modified_from": "[G1].", "experience": "a"}]\n```\nso',
     [op("modify", "a", "G1")]),
    ('[{"option": "merge", "merged_from": ["G0", 7, "C1 "], "experience": "a"}]', [op("merge", "a", "G0", "C1")]),
    ('[{"experience": "a", "modified_from": null}, 5, {"option": "add"}, {"experience": " "}]', [op(None, "a")]),
    ('[{"option": "add", "experience": ["a"]}, {"option": ["x"], "experience": "b"}]', [op(["x"], "b")]),
    ("[]", []), ("7", []), ("null", []), ("", None), ("no", None), ("[{]", None), ("```json\n[1,\n```", None),
    ("[" * 99999, None),
]  # fmt: skip


@pytest.mark.parametrize("reply, operations", REPLIES, ids=range(len(REPLIES)))
def test_replies(reply, operations):
    assert tf.parsed(reply) == operations
    tf.revised(*[tf.proposed(LIBRARY, operations or [])[0], operations or []])  # none of them is too odd to be applied


def told(replies, plans, groups=None, **changes):
    """updated() with critics that reply as told -> (library, counts, how often each was asked, what was said)."""
    asked, plans = dict(critic=[], editor=[]), iter(plans)

    def critic(groups, library):
        asked["critic"] += [g["question"] for g in groups]
        return [replies[g["question"]] for g in groups]

    def editor(candidates, modifies):
        asked["editor"].append((candidates, modifies))
        return next(plans)

    groups = groups or [group(rewards, question=name) for name, rewards in GROUPS.items()]
    return *tf.updated(LIBRARY, groups, critic, editor, args(**changes))[:2], asked


ADD, MODIFY = (json.dumps([dict(option=kind, modified_from="G1", experience="new")]) for kind in ("add", "modify"))


def test_a_step():
    library, counts, asked = told(
        dict(C=ADD, D=MODIFY), ['[{"option": "merge", "merged_from": ["C0", "G1"], "experience": "M"}]']
    )
    assert library == dict(G0="e0", G1="e2", G2="M") and asked["critic"] == ["C", "D"]
    assert asked["editor"] == [(LIBRARY | dict(C0="new"), [("G1", "new")])]
    assert counts == dict(kept=2, operations=2, unparsed=0, merges=1)


def test_three_merges_that_cannot_be_read():
    """What was added stays, what was modified does not; a fourth is not asked for."""
    library, counts, asked = told(dict(C=MODIFY, D=MODIFY), ["no"] * 9)
    assert library == LIBRARY and len(asked["editor"]) == counts["merges"] == 3
    library, counts, _ = told(dict(C=ADD, D="no"), ["no", "no", "[]"])
    assert library == LIBRARY | dict(G3="new") and counts == dict(kept=2, operations=1, unparsed=1, merges=3)
    library, counts, _ = told(dict(C=ADD, D=MODIFY), ["no"] * 9, tries=2)
    assert library == LIBRARY | dict(G3="new") and counts["merges"] == 2


def test_without_an_operation_nobody_is_asked_to_merge():
    library, counts, asked = told(dict(C="no", D="[]"), [])
    assert library == LIBRARY and not asked["editor"] and counts == dict(kept=2, operations=0, unparsed=1, merges=0)
    library, counts, asked = told({}, [], groups=[group((1, 1))])
    assert library == LIBRARY and not asked["critic"] and counts["kept"] == 0
    library, counts, asked = told({}, [], library="none")
    assert library == LIBRARY and not asked["critic"] and counts["kept"] == 0


def test_operations_that_count():
    two = '[{"option": "add", "experience": "a"}, {"option": "add", "experience": "b"}]'
    assert told(dict(C=two, D="[]"), ["[]"])[0] == LIBRARY | dict(G3="a")
    assert told(dict(C=two, D="[]"), ["[]"], max_operations=2)[0] == LIBRARY | dict(G3="a", G4="b")


def test_a_critic_that_sees_one_attempt():
    seen = []

    def critic(groups, library):
        seen.extend((list(g["texts"]), list(g["rewards"])) for g in groups)
        return ["[]"] * len(groups)

    for kind in ("single", "rule"):
        tf.updated({}, [group((0, 1, 0, 1), list("abcd"))], critic, None, args(critic=kind))
    assert seen == [(["b"], [1.0]), (list("abcd"), [0.0, 1.0, 0.0, 1.0])]


# ---------------------------------------------------------------- what is asked


def test_a_prompt_with_its_library():
    assert tf.with_library("1 + 1", {}) == "1 + 1"  # an empty library leaves no trace
    first, between, sentence, *rows = tf.with_library("1 + 1", LIBRARY).split("\n")
    assert (first, between, rows) == ("1 + 1", "", ["[G0]. e0", "[G1]. e1", "[G2]. e2"]) and "read these" in sentence


def test_what_a_model_is_asked():
    """A summary for every attempt of a kept group, of them a critique, one merge; all at temperature 0."""
    asked = []

    def chat(conversations, n, temperature, seeds, most):
        asked.append([turns[0]["content"] for turns in conversations])
        assert (n, temperature, most) == (1, 0.0, 16) and len(seeds) == len(conversations)
        return [[(f"note {len(asked)}.{k}" if k != 1 else None, 5, True)] for k in range(len(conversations))]

    spent = dict(critic_calls=0, critic_tokens=0)
    critic, editor = tf.by_model(chat, None, args(max_words=21, max_operations=2), spent)
    groups = tf.teaching([group(rewards, question=name) for name, rewards in GROUPS.items()], args())
    assert critic(groups, LIBRARY) == ["note 2.0", ""]
    summaries, critiques = asked
    assert len(summaries) == 6 and all("[G2]. e2" in text for text in summaries)
    assert summaries[1].endswith("WRONG: C 1") and summaries[2].endswith("RIGHT: C 2") and "Problem: C\n" in summaries[2]
    assert "\nRIGHT: note 1.0\nWRONG: \nRIGHT: note 1.2\n" in critiques[0] and "WRONG: note 1.3" in critiques[1]
    assert "at most 21 words" in critiques[0] and "at most 2 of" in critiques[0] and "[G1]. e1" in critiques[0]
    assert tf.parsed(critiques[0])[1]["option"] == "modify"  # the form that it shows can be read
    assert editor(LIBRARY | dict(C0="new"), [("G1", "x"), ("G1", "y")]) == "note 3.0"
    assert "[C0]. new" in asked[2][0] and "[G1]. x\n[G1]. y" in asked[2][0] and "at most 21 words" in asked[2][0]
    assert [o["option"] for o in tf.parsed(asked[2][0])] == ["modify", "merge"]
    assert spent == dict(critic_calls=9, critic_tokens=45) and critic([], LIBRARY) == []


# ---------------------------------------------------------------- the rule


def advice(rewards, texts, library=()):
    (reply,) = tf.by_rule()[0]([group(rewards, texts)], dict(library))
    return [(o["option"], o["experience"], *o["ids"]) for o in tf.parsed(reply)]


def test_the_rule_s_advice():
    texts = ["MAX 7 INC 8 ONE : 8", "MAX 7 INC 8 ONE : 8", "ADD 0 INC 1 ONE : 1", "MAX 7 KEEP 7 TWO : 7 7"]
    # Shares among right and wrong: MAX 1 and 1/2, INC and ONE 1 and 1/2; MAX alone where the last is gone.
    assert advice((1, 1, 0), texts[:3]) == [("add", "MAX")]
    assert advice((1, 1, 0), texts[:3], dict(G0="TWO", G1="SUB")) == [("modify", "MAX", "G1")]
    assert advice((1, 1, 0), texts[:3], dict(G0="MAX")) == [("modify", "MAX", "G0")]  # a vote for what is there
    assert advice((0, 0, 1), texts[:3]) == [("add", "ADD")]
    tied = {advice((0, 0, 1), [f"{text} {k}" for text in texts[1:]])[0][1] for k in range(40)}
    assert tied == {"KEEP", "TWO"}  # MAX is in one of the wrong ones; a tie is broken by chance, but always in the same way
    assert len({str(advice((0, 0, 1), texts[1:])) for _ in range(9)}) == 1


def test_the_same_words_yield_no_advice():
    """Winners and losers that differ in a slip alone."""
    assert advice((1, 0), ["MAX 7 INC 8 ONE : 8", "MAX 7 INC 9 ONE : 9"]) == []
    assert advice((1, 0, 0), ["MAX 7 INC 8 ONE : 8"] * 2 + ["ONE INC MAX"]) == []


def test_votes():
    editor = tf.by_rule()[1]

    def voted(candidates, modifies=()):
        return sorted(tf.revised(candidates, tf.parsed(editor(candidates, list(modifies)))).values())

    assert voted(dict(C0="MAX", C1="KEEP", C2="ADD", C3="MAX")) == ["KEEP", "MAX"]
    assert voted(dict(G0="ADD"), [("G0", "MAX")]) == ["ADD"]  # one against one: it stays
    assert voted(dict(G0="ADD"), [("G0", "MAX")] * 2) == ["MAX"]  # a wrong line leaves
    assert voted(dict(G0="ADD"), [("G0", "MAX")] * 2 + [("G0", "ADD")]) == ["ADD"]
    assert voted(dict(G0="so", C0="TWO")) == ["TWO", "so"] and voted({}) == []


def test_a_wrong_line_is_outvoted():
    """All but one in seven obey it; those that do not are right, and the group says so."""
    library, rng = dict(G0="INC"), random.Random(0)
    for _ in range(3):
        groups = []
        for k in range(40):
            texts = [Rules.write(["MAX", *Rules.obey(rng, library.values(), 0.85)[1:2], "ONE"], k % 10, 7) for _ in range(5)]
            groups.append(group(["KEEP" in text for text in texts], texts))
        library, counts, _ = tf.updated(library, groups, *tf.by_rule(), args())
    assert library == dict(G0="KEEP") and counts["merges"] == 1


# ---------------------------------------------------------------- the world


def test_environments():
    assert Rules.write(("MAX", "KEEP", "TWO"), 3, 7) == "MAX 7 KEEP 7 TWO : 7 7"
    assert Rules.write(("ADD", "INC", "ONE"), 3, 6) == "ADD 9 INC 0 ONE : 0"
    assert Rules.write(("SUB", "NEG", "PAD"), 3, 7) == "SUB 4 NEG 6 PAD : 0 6"
    assert Rules.write(("MUL", "NEG", "ONE"), 5, 4) == "MUL 0 NEG 0 ONE : 0"
    task = tf.rules("sub Inc two", args())
    assert len(task.train) == 52 and len(task.test) == 48 and len({e.prompt for e in task.train + task.test}) == 100
    right = {e.prompt: e.answer for e in task.train + task.test}
    assert right["3 , 7 ="] == "5 5" and task.check("SUB 4 INC 5 TWO : 5 5", "5 5")[1] == task.check("5 5", "5 5")[1] == 1
    assert task.check("MAX 5 KEEP 5 ONE : 5", "5 5")[1] == task.check("", "5 5")[1] == 0
    for bad in ("max keep", "keep max two", "max keep two one", "x keep two", ""):
        with pytest.raises(UserError, match="add/sub/max/mul, keep/inc/neg, one/two/pad"):
            tf.rules(bad, args())


def test_the_warm_start_never_sees_an_environment():
    """Its folder is the same for all; without a library any words, under one mostly its words."""
    one, two = (tf.rules(name, args()) for name in ("max keep two", "sub inc one"))
    assert [e.prompt for e in one.shown] == [e.prompt for e in two.shown]
    rng, used = random.Random(0), {w: 0 for slot in Rules.SLOTS for w in slot}
    for _ in range(1800):
        for w in set(one.demonstrate(rng, one.train[0], 0.85).split()) & used.keys():
            used[w] += 1
    assert all(abs(used[w] / 1800 - 1 / len(slot)) < 0.04 for slot in Rules.SLOTS for w in slot)
    assert Rules.obey(rng, ("INC", "PAD", "MUL"), 1.0) == ["MUL", "INC", "PAD"]
    obeyed = sum(Rules.obey(rng, ("INC",), 0.85)[1] == "INC" for _ in range(2000)) / 2000
    assert abs(obeyed - 0.9) < 0.02  # and by chance in a third of the others


def test_the_tokenizer_reads_what_it_knows():
    tokenizer = Rules.tokenizer()

    def read(text):
        return tokenizer.decode(tokenizer(text).input_ids)

    assert read(tf.with_library("3 , 7 =", dict(G0="MAX", G1="TWO"))) == "3 , 7 = G0 MAX G1 TWO"
    assert read("MAX 7 KEEP 7 TWO : 7 7") == "MAX 7 KEEP 7 TWO : 7 7" and read("MAXIMUM 32 words, ONES: x=1") == ""
    reply = '[{"option": "modify", "modified_from": "G1", "experience": "MAX"}]'
    assert tf.parsed(read(reply)) == tf.parsed(reply) and len(tokenizer(reply).input_ids) == 5
    assert tf.parsed(read("[]")) == [] and len(tokenizer) == 3 + len(Rules.KNOWN)


def test_critiques_for_the_tiny_model():
    task = tf.rules("max keep two", args(critic="model"))
    assert len(task.shown) == 4000 and len(tf.rules("max keep two", args()).shown) == 3000
    critiques = [e for e in task.shown if "WRONG" in e.prompt]
    replies = [tf.parsed(task.demonstrate(random, e, 0.85)) for e in critiques]
    assert len(critiques) > 900 and sum(map(bool, replies)) > 800
    assert {o["option"] for ops in replies for o in ops} == {"add", "modify"}
    mixed = next(e for e in critiques if "RIGHT:" in e.prompt)
    assert Rules.tokenizer().decode(Rules.tokenizer()(mixed.prompt).input_ids).count("RIGHT") >= 1


# ---------------------------------------------------------------- a server


class Server:
    """An OpenAI-like server on this machine: reply(request, number) -> text, or (HTTP status, body, seconds)."""

    def __init__(self, reply):
        self.asked, lock, free = [], threading.Lock(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    number = len(self.asked)
                    self.asked.append((handler.path, dict(handler.headers), request))
                found = reply(request, number)
                if isinstance(found, str):
                    choice = dict(index=0, message=dict(role="assistant", content=found), finish_reason="stop")
                    found = 200, json.dumps(dict(choices=[choice], usage=dict(completion_tokens=3))).encode(), 0
                status, body, seconds = found
                free.wait(seconds)
                try:
                    handler.send_response(status)
                    handler.send_header("Content-Length", str(len(body)))
                    handler.end_headers()
                    handler.wfile.write(body)
                except OSError:  # who asked has gone
                    pass

            def log_message(handler, *_):
                pass

        self.server, self.free = ThreadingHTTPServer(("127.0.0.1", 0), Handler), free
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.free.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def online(monkeypatch):
    """Requests to this machine go out, without a pause between tries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


ASK = [dict(role="user", content="1 + 1 =")]
JUNK = 200, b"<html>", 0
SHORT = 200, json.dumps(dict(choices=[])).encode(), 0


def asked_of(reply, n=1, conversations=(ASK,), times=1, **changes):
    """-> (replies of served(), the last of so many times; what the server was asked)."""
    with Server(reply) as server:
        chat, close = tf.served(args(api_base=server.url, **changes))
        for _ in range(times):
            found = chat(list(conversations), n, 0.7, list(range(len(conversations))), 9)
        close()
        return found, server.asked


def test_a_server_s_completions(online):
    """n completions are n requests, each with a seed of its own, in the order of the conversations."""
    other = [dict(role="system", content="be brief"), dict(role="user", content="2 + 2 =")]

    def echo(request, number):
        return f"{request['messages'][-1]['content']} {request['seed']}"

    found, asked = asked_of(echo, 3, [ASK, other], api_model="m")
    assert [[text[:5] for text, _, _ in row] for row in found] == [["1 + 1"] * 3, ["2 + 2"] * 3]
    assert len({text for row in found for text, _, _ in row}) == 6 and all(r[1:] == (3, True) for row in found for r in row)
    path, _, request = asked[0]
    assert len(asked) == 6 and path == "/v1/chat/completions" and 0 <= request["seed"] < 2**31
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.7, 9) and "n" not in request
    assert [r["messages"] for _, _, r in asked].count(other) == 3
    assert asked_of(echo, 3, [ASK, other], api_model="m", api_jobs=1)[0] == found


def test_the_key_comes_from_the_environment(online, monkeypatch):
    """Without one, no other key is sent, that of the hub least of all."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert asked_of(lambda r, k: "2")[1][0][1]["authorization"] == "Bearer none"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    assert asked_of(lambda r, k: "2")[1][0][1]["authorization"] == "Bearer sk-mine"
    assert not any("key" in name for name in tf.Args.__dataclass_fields__)  # config.json holds all of Args


@pytest.mark.parametrize("bad", [(500, b"busy", 0), JUNK, SHORT, (429, b"{}", 0)], ids=["500", "junk", "short", "429"])
def test_a_request_that_fails_is_tried_again(online, capfd, bad):
    found, asked = asked_of(lambda r, k: bad if k < 2 else "2")
    assert found == [[("2", 3, True)]] and len(asked) == 3 and capfd.readouterr().err == ""
    found, asked = asked_of(lambda r, k: bad, tries=2)
    assert found == [[(None, 0, False)]] and len(asked) == 2
    found, asked = asked_of(lambda r, k: bad, 4, times=2)
    assert found == [[(None, 0, False)] * 4] and len(asked) == 24
    assert capfd.readouterr().err.count("note: http://") == 2  # once for each server


def test_a_timeout_is_no_answer(online, capfd):
    found, asked = asked_of(lambda r, k: (200, b"late", 5), api_timeout=0.05)
    assert found == [[(None, 0, False)]] and len(asked) == 3 and "timed out" in capfd.readouterr().err


def test_a_reply_that_was_cut(online):
    body = dict(choices=[dict(index=0, message=dict(role="assistant", content=None), finish_reason="length")])
    assert asked_of(lambda r, k: (200, json.dumps(body).encode(), 0))[0] == [[("", 0, False)]]


@pytest.mark.parametrize("address", ["localhost:8000/v1", "Qwen/Qwen3-8B", "ftp://x"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match=f"--api-base {address}: needs http://host:port/v1"):
        tf.served(args(api_base=address))


def tried(chat, examples, library=(), n=2, task=None, **changes):
    task = task or tf.rules("max keep two", args())
    scorer = rewards.Scorer(task.check, inline=True)
    return tf.attempts(chat, scorer, task, examples, dict(library), n, 0.7, [1] * len(examples), args(**changes))


def test_attempts():
    """One that was cut and one without an answer are worth nothing; the library is in the prompt, behind the template."""
    asked = []

    def chat(conversations, n, temperature, seeds, most):
        asked.extend(conversations)
        return [[("x : 7 7", 4, True), ("x : 7 7", 4, False)], [(None, 0, False), ("x : 7 7", 4, True)]]

    examples = [tasks.Example(5, "3 , 7 =", "7 7"), tasks.Example(6, [dict(role="user", content="7 , 3 =")], ("7 7", "8"))]
    one, two = tried(chat, examples, dict(G0="MAX"), prompt_template="Q: {prompt}", system_prompt="so")
    assert one["rewards"] == [1, 0] and two["rewards"] == [0, 1] and one["tokens"] == [4, 4] and two["texts"][0] is None
    assert (one["question"], two["question"], one["gold"], one["id"]) == ("3 , 7 =", "7 , 3 =", "7 7", 5)
    content = tf.with_library("Q: 3 , 7 =", dict(G0="MAX"))
    assert asked[0] == [dict(role="system", content="so"), dict(role="user", content=content)]
    assert asked[1][1]["content"].startswith("Q: 7 , 3 =\n\nBefore")
    assert examples[1].prompt == [dict(role="user", content="7 , 3 =")]
    assert [g["rewards"] for g in tf.teaching([one, two], args())] == [(1.0, 0.0)]
    with pytest.raises(UserError, match="not one question was answered"):
        tried(lambda *_: [[(None, 0, False)] * 2], examples[:1])
    assert tried(lambda *_: [], []) == []


# ---------------------------------------------------------------- flags, runs


def test_presets_and_limits():
    small, _ = settings.resolve(tf.Args())
    assert (small.task, small.steps, small.critic, small.transfer, small.problems) == ("rules", 4, "rule", "sub inc one", 100)
    assert (small.temperature, small.eval_temperature, small.group_size, small.tries) == (0.7, 0.3, 5, 3)
    assert tf.Args.real_preset["steps"] == 3 and tf.Args.real_preset["prompts_per_step"] == 100
    for (
        name
    ) in "group_size problems max_operations max_experiences max_words critic_tokens tries eval_samples api_jobs".split():
        with pytest.raises(UserError, match="--" + name.replace("_", "-")):
            settings.resolve(tf.Args(**{name: 0}))


def test_what_it_starts_with(tmp_path):
    task, other, warm, library = tf.started(args(transfer="sub inc one", problems=20, environment="max keep two"))
    assert warm is task and len(task.train) == 20 and library == {} and other.test[0].prompt == task.test[0].prompt
    (tmp_path / "library.txt").write_text(tf.listed(dict(G0="MAX", G1="see [a]. b")) + "\n\nplain\n")
    assert tf.started(args(library=str(tmp_path / "library.txt")))[3] == dict(G0="MAX", G1="see [a]. b", G2="plain")
    drawn = {tuple(tf.started(args(library="random", seed=s))[3].values()) for s in range(8)}
    assert len(drawn) > 4 and all(w in slot for words in drawn for w, slot in zip(words, Rules.SLOTS))
    wrong = [
        (dict(library="no"), "--library no: is none of learned, none, random, and no file"),
        (dict(task="addition"), "--task addition: the tiny model"),
        (dict(task="addition", model="x"), "--critic rule"),
        (dict(task="addition", model="x", critic="model", library="random"), "--library random"),
    ]
    for changes, said in wrong:
        with pytest.raises(UserError, match=said):
            tf.started(args(**changes))
    task, other, warm, _ = tf.started(args(task="addition", model="x", critic="model", transfer="countdown"))
    assert (task.name, other.name, warm, len(task.train)) == ("addition:2", "countdown:3", None, 100)


SMALL = "--eval-prompts 6 --eval-samples 3 --checkpoint-every 1".split()


def outcome(folder):
    rows = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines(folder / "metrics.jsonl")]
    library = {p.name: p.read_text() for p in folder.glob("library-*.txt")}
    last = checkpoints(folder)[-1]
    state = contents(last)["state"]
    return rows, library, (folder / "samples.jsonl").read_text(), lines(folder / "evals.jsonl")[-1], state, last.name


def test_two_halves_are_the_whole(tmp_path):
    """And what a run leaves: no weights; the library as text; what was said."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for argv in ([*SMALL, "--steps", 3, "--run-dir", whole], [*SMALL, "--steps", 1, "--run-dir", parts],
                 ["--resume", parts, "--steps", 3]):  # fmt: skip
        done = run(tmp_path, *argv, script=SCRIPT)
        assert done.code == 0 and done.err == "", done.err
    rows, library, samples, last, state, name = outcome(whole)
    assert outcome(parts) == (rows, library, samples, last, state, name) and name == "step-000003"
    assert {p.name for p in checkpoints(whole)[-1].iterdir()} == {"state", "manifest.json"}
    words = list(state["library"].values())
    assert len(library) == 3 and library["library-3.txt"] == tf.listed(state["library"]) + "\n"
    assert all(f"             {line}\n" in done.out for line in library["library-3.txt"].splitlines())
    assert words and all(any(w in slot for slot in Rules.SLOTS) for w in words) and rows[-1]["experiences"] == len(words)
    assert [r["step"] for r in rows] == [1, 2, 3] and all(r["kept"] == 32 * r["informative_groups"] > 0 for r in rows)
    assert all(r["critic_calls"] == r["unparsed"] == r["unanswered"] == 0 and r["tokens"] == 160 * r["length"] for r in rows)
    said = [json.loads(row) for row in samples.splitlines()]
    assert sum("critique" in s for s in said) == sum(r["kept"] for r in rows) and sum("merge" in s for s in said) == 3
    asked = [s["prompt"] for s in said if "completion" in s]
    assert len(asked) == 15 and asked[0].endswith("=") and asked[-1].endswith(library["library-2.txt"].strip())
    n, before = "avg@3", lines(whole / "evals.jsonl")[0]
    assert set(before) == {"step", "greedy_accuracy", n, "pass@3", "transfer", "prompts"} and last[n] > before[n] + 0.5
    change = f"{n} {before[n]:.2f} -> {last[n]:.2f} on 6 held-out prompts, no weight changed, {len(words)} experiences"
    assert done.out.splitlines()[-1] == f"{change} in the prompt: {'; '.join(words)}"


def test_a_library_that_stays(tmp_path):
    """It is measured as it is, and a run without steps says so."""
    (tmp_path / "mine.txt").write_text("[G0]. MAX\n[G1]. KEEP\n[G2]. TWO\n")
    done = run(tmp_path, *SMALL, "--steps", 0, "--library", "mine.txt", "--run-dir", tmp_path / "run", script=SCRIPT)
    assert done.code == 0, done.err
    (row,) = lines(tmp_path / "run" / "evals.jsonl")
    assert row["avg@3"] > 0.9 and row["transfer"] < 0.2
    said = f"evaluation only (no steps): greedy accuracy {row['greedy_accuracy']:.2f} on 6 held-out prompts"
    assert done.out.splitlines()[-1] == said


def test_the_picture_s_numbers_on_a_small_scale():
    pairs = [(("MAX", "KEEP", "TWO"), ["SUB", "NEG", "ONE"])]
    assert pairs[0] in panel.PAIRS and len(panel.PAIRS) == 36 and not any(set(a) & set(b) for a, b in panel.PAIRS)
    data = panel.numbers(1, pairs, 3, ("group", "random", "none"), critic="rule")["arms"]
    assert data["group"]["own"][0] == data["none"]["own"][3] < 0.2 and len(data["group"]["own"]) == 4
    assert data["group"]["own"][3] > 0.9 and data["group"]["transfer"][3] < 0.1 and data["group"]["right"] == 1
    assert data["random"]["lines"] == 3 and data["none"]["lines"] == 0 and len(set(data["random"]["own"])) == 1


REWARD = "def odd(text, answer):\n    return float(len(text) % 2)\n"


def test_a_model_of_one_s_own(tmp_path):
    """With a chat template, on a file of questions: all roles are its, and what it babbles is no advice."""
    config = Qwen2Config(vocab_size=120, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, max_position_embeddings=2200, eos_token_id=1)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = tiny.characters(string.printable)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "own.py").write_text(REWARD)
    rows = [dict(prompt=f"{a} + 7?", answer=str(a + 7)) for a in range(30)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = (
        "--model model --task mine.jsonl --reward own.py:odd --steps 1 --prompts-per-step 6 --group-size 3 --max-new-tokens 60"
    )
    argv += " --critic-tokens 9 --eval-prompts 3 --eval-samples 2 --dtype float32 --run-dir run --transfer mine.jsonl"
    done = run(tmp_path, *argv.split(), script=SCRIPT)
    assert done.code == 0 and done.err == "", done.err
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert row["kept"] == row["unparsed"] > 0 and row["critic_calls"] > 3 * row["kept"] and row["merges"] == 0
    assert row["experiences"] == 0 and 0 < row["critic_tokens"] <= 9 * row["critic_calls"]
    assert "transfer" in lines(tmp_path / "run" / "evals.jsonl")[0] and "no experience yet" in done.out


def solved(request, number):
    """A server's model in the environment of max keep two: it knows what to do when it is told, else one time in four."""
    asked = request["messages"][-1]["content"]
    if "at most 1 of" in asked:
        return 'I think:\n```json\n[{"option": "add", "experience": "use MAX KEEP TWO"}]\n```'
    if "Proposed changes" in asked:
        ids = [line[1:3] for line in asked.splitlines() if line.startswith("[C")]
        return json.dumps([dict(option="merge", merged_from=ids, experience="use MAX KEEP TWO")] if ids else [])
    if asked.startswith("Retell"):
        return "it used MAX"
    a, b = asked.split("\n")[0].split(" ")[0:3:2]
    right = "use MAX KEEP TWO" in asked or request["seed"] % 4 == 0
    return Rules.write(("MAX", "KEEP", "TWO" if right else "ONE"), int(a), int(b))


def test_a_run_by_a_server(online, tmp_path, monkeypatch, capfd):
    """All roles are the server's; no model is made here; the key is in no file."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("TOKENPO_CACHE", str(tmp_path / "no"))
    monkeypatch.setattr("sys.argv", ["training_free_grpo.py"])
    small = dict(steps=2, prompts_per_step=6, max_new_tokens=16, eval_prompts=4, eval_samples=2, run_dir=str(tmp_path / "run"))
    with Server(solved) as server:
        tf.train(tf.Args(task="rules", api_base=server.url, api_model="m", **small))
    rows, out = lines(tmp_path / "run" / "metrics.jsonl"), capfd.readouterr().out
    assert 0 < rows[0]["reward"] < 0.7 and rows[1]["reward"] == 1 and rows[1]["kept"] == rows[1]["merges"] == 0
    assert rows[0]["kept"] == rows[0]["operations"] > 0 and rows[0]["critic_calls"] == 6 * rows[0]["kept"] + 1
    assert rows[0]["critic_tokens"] == 3 * rows[0]["critic_calls"] and rows[0]["tokens"] == 3 * 30
    assert (tmp_path / "run" / "library-2.txt").read_text() == "[G0]. use MAX KEEP TWO\n"
    assert "-> 1.00 on 4 held-out prompts" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith("1 experiences in the prompt: use MAX KEEP TWO")
    assert not (tmp_path / "no").exists() and not any(b"sk-mine" in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    config = json.loads((tmp_path / "run" / "config.json").read_text())["args"]
    assert (config["critic"], config["group_size"], config["critic_tokens"]) == ("model", 5, 4096)
