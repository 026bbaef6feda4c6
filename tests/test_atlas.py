"""The atlas: its pages as a browser and a reader meet them, the lesson and the claims on them, and what it refuses."""

import collections
import html
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common import ROOT, UserError
from runs import atlas, atlas_lesson, atlas_shown
from tests import parts, sync

SOURCE = "https://forge.example/blob/main"
TEXTS = {name: (sync.ALGOS / f"{name}.py").read_text() for name in sync.scripts()}
VOID = {"meta", "link", "img", "input", "br"}
CLAIM = dict(
    claim="A soft gate learns further.", metric="greedy accuracy after", better="higher", seeds=3, note="one start", why="",
    starts=[dict(baseline="grpo,lr=3e-4", method="sapo,lr=3e-4", mean=-0.01234, low=-0.0343, high=0.0123)],
    arms={"grpo,lr=3e-4": [0.6641, 0.6543, 0.6672], "sapo,lr=3e-4": [0.6111, 0.6543, 0.6992]},
    controls=[dict(item="gspo,lr=3e-4", mean=0.0456, low=None, high=None, word="better")],
    verdict="no difference here", seconds=412, source="lr.json", changed=["grpo"],
)  # fmt: skip
RUN = CLAIM | dict(verdict="holds here", source="runs", flags="--lr 3e-4", margin=0.48, changed=[])
# Built twice, by another process with another order of sets, too: what a test has no time for is drawn elsewhere.
BUILD = f"""
import sys
from pathlib import Path
from runs import atlas, atlas_shown
known = atlas_shown.claims
atlas_shown.claims = lambda: known(Path(sys.argv[2]))
atlas_shown.draw_curves = lambda found, path: path.write_text("<svg/>")
atlas_shown.draw_gate = lambda ratios, mine, base, path: path.write_text("<svg/>")
atlas.build(sys.argv[1], {SOURCE!r})
"""


class Page(HTMLParser):
    """A page's tags, ids, links, headings and text, and whether its tags are balanced."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.ids, self.links, self.words, self.open, self.wrong = [], [], [], [], [], []
        self.text = path.read_text()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [(tag, found[key]) for key in ("href", "src") if key in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [found for name, found in self.tags if name == tag]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """-> the folder of a site with one claim that was tried, the file of claims."""
    folder = tmp_path_factory.mktemp("atlas")
    claims = folder / "claims.json"
    claims.write_text(json.dumps(dict(command="", counts={}, claims=dict(sapo=CLAIM, steer=RUN))))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("claims", "draw_curves", "draw_gate"):
            patch.setattr(atlas_shown, name, getattr(atlas_shown, name))
        patch.setattr(sys, "argv", ["", str(folder / "site"), str(claims)])
        exec(BUILD, {})
    return folder / "site", claims


@pytest.fixture(scope="session")
def read(site):
    """{file: Page} of a site."""
    return {path.name: Page(path) for path in sorted(site[0].glob("*.html"))}


def test_every_script_has_a_page_and_stands_on_the_map(read):
    assert set(read) == {f"{name}.html" for name in TEXTS} | {"index.html", "pair.html"}
    there = {target for tag, target in read["index.html"].links if tag == "a"}
    assert {f"{name}.html" for name in TEXTS} <= there
    assert collections.Counter(i for i in read["index.html"].ids if i in TEXTS) == dict.fromkeys(TEXTS, 1)


def test_every_page_is_well_formed_and_can_be_read_aloud(read):
    for name, page in read.items():
        assert (page.wrong, page.open) == ([], []), name
        assert page.text.startswith("<!doctype html>\n") and page.all("html") == [{"lang": "en"}], name
        assert len(page.all("title")) == 1 and len(page.all("main")) == 1, name
        assert "width=device-width" in next(m["content"] for m in page.all("meta") if m.get("name") == "viewport"), name
        assert not [i for i, n in collections.Counter(page.ids).items() if n > 1], name
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels.count(1) == 1 and levels[0] == 1, name
        assert all(b - a <= 1 for a, b in zip(levels, levels[1:])), name
        assert all(image["alt"].strip() for image in page.all("img")), name
        fields = {found["id"] for tag in ("input", "select") for found in page.all(tag)}
        assert fields == {found["for"] for found in page.all("label")}, name


def test_every_link_leads_somewhere(site, read):
    checked = 0
    for name, page in read.items():
        for tag, target in page.links:
            place, _, fragment = target.partition("#")
            if target.startswith(SOURCE):
                assert (ROOT / place.removeprefix(f"{SOURCE}/")).exists(), (name, target)
            elif target.startswith("http"):
                assert tag == "a" and target.startswith("https://arxiv.org/abs/"), (name, target)
            elif place == "pair.html" and fragment:
                assert set(fragment.split("/")) <= set(TEXTS), (name, target)
            else:
                assert (site[0] / place).exists(), (name, target)
                assert not fragment or fragment in read[place or name].ids, (name, target)
            checked += 1
    assert checked > 2000
    assert not re.findall(r"https?:|url\(|@import", (site[0] / "style.css").read_text() + (site[0] / "code.css").read_text())


@pytest.mark.parametrize("name", [n for n, text in TEXTS.items() if parts.differs(text)[0]])
def test_the_lesson_on_a_page_is_the_lesson(name, read):
    """Line for line what python -m tests.sync prints, gone ones and new ones."""
    base = TEXTS[parts.differs(TEXTS[name])[0]]
    rows = re.findall(r'<(del|ins) class="row">(.*?)\n</\1>', read[f"{name}.html"].text, re.S)
    shown = [("-" if tag == "del" else "+") + html.unescape(re.sub(r"<[^>]+>", "", line)) for tag, line in rows]
    wanted = [row for of in parts.changes(TEXTS[name], base).values() for row in of if row]
    assert collections.Counter(shown) == collections.Counter(wanted)
    assert len(shown) == parts.changed_lines(TEXTS[name], base)[0]
    assert f"{len(shown)} changed lines" in read[f"{name}.html"].text


def test_left_and_right_stand_level(read):
    """What is on both sides of a block and unchanged stands beside itself: as many lines as the shorter side has."""
    blocks = [(name, block) for name, page in read.items() for block in page.text.split('<div class="two">')[1:]]
    for name, block in blocks:
        sides = [re.findall(r'class="row( same| pad)?">(.*?)\n</', side, re.S) for side in block.split("</code></pre>")[:2]]
        assert len(sides[0]) == len(sides[1]) > 0, name
        same = [[text for kind, text in side if kind == " same" and text.strip()] for side in sides]
        level = [a == b for (k, a), (other, b) in zip(*sides) if k == other == " same" and a.strip()]
        assert all(level) and len(level) >= min(map(len, same)), name
    assert len(blocks) > 200


def test_the_claim_and_its_numbers_stand_on_its_page(read):
    words = " ".join(" ".join(read["sapo.html"].words).split())
    for said in (
        "A soft gate learns further.", "No difference here", "3 seeds", "−0.012 (−0.034 to +0.012)", "0.664", "0.655", "0.699",
        "+0.046", "better", "One start.", "7 minutes", "From lr.json .",
    ):  # fmt: skip
        assert said in words, said
    assert "The code of grpo has changed since." in words
    counts = re.findall(r'<span class="verdict \w+">([^<]+)</span></dt><dd>(\d+)</dd>', read["index.html"].text)
    written = atlas_shown.claims(Path("nowhere"))
    assert counts == [("holds here", "1"), ("no difference here", "1"), ("not tried yet", str(len(written) - 2))]
    words = " ".join(" ".join(read["steer.html"].words).split())
    assert "From runs of its own" in words and "All arms ran with --lr 3e-4 ." in words and "0.48 or more apart" in words
    assert set(written) < set(TEXTS) and "Not tried yet" in " ".join(read["rng.html"].words)


def test_without_a_list_of_claims(tmp_path):
    assert atlas_shown.claims(tmp_path / "claims.json", tmp_path / "claims.toml") == {}
    (tmp_path / "claims.json").write_text(json.dumps(dict(claims=dict(sapo=CLAIM))))
    only = atlas_shown.claims(tmp_path / "claims.json", tmp_path / "claims.toml")
    assert list(only) == ["sapo"] and (only["sapo"]["verdict"], only["sapo"]["kind"]) == ("no difference here", "none")


def test_two_builds_are_equal(site, tmp_path):
    first, claims = site
    environment = os.environ | dict(PYTHONHASHSEED="7", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", BUILD, str(tmp_path / "again"), str(claims)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (first, tmp_path / "again")
    ]
    assert files[0].keys() == files[1].keys() and [n for n in files[0] if files[0][n] != files[1][n]] == []


def test_pictures_are_drawn_alike(tmp_path):
    found = atlas_shown.curves("sapo", "grpo", atlas_shown.claims()["sapo"], atlas_shown.records())
    assert (found.record, found.own, found.base, found.seeds) == ("lr", "sapo,lr=3e-4", "grpo,lr=3e-4", 3)
    assert [(step, round(y, 3)) for step, y in found.panels[0][1][0][:2]] == [(0, 0.326), (20, 0.578)]
    ratios, gates = atlas_shown.gates(names=TEXTS)
    assert list(gates["gspo"]) == ["one token moved", "all tokens moved"] and list(gates["dr_grpo"]) == [""]
    for i in (1, 2):
        atlas_shown.draw_curves(found, tmp_path / f"curves-{i}.svg")
        atlas_shown.draw_gate(ratios, gates["gspo"], gates["grpo"], tmp_path / f"gate-{i}.svg")
    for name, lines in dict(curves=1, gate=8).items():  # the gate's: its own and later tokens', two signs, two ways to move
        one, two = ((tmp_path / f"{name}-{i}.svg").read_text() for i in (1, 2))
        assert one == two and len(re.findall(rf"fill: none; stroke[^\"]*{atlas_shown.OWN}", one)) == lines


def test_a_curve_is_called_what_it_is():
    """Runs keep accuracy, score and return in one column; what it is stands in their last line."""
    found, claims = atlas_shown.records(), atlas_shown.claims()
    for name, measure in dict(poad="greedy return", rank_grpo="greedy score", steer="greedy accuracy").items():
        assert atlas_shown.curves(name, None, claims[name], found).measure.split(" on ")[0] == measure
    # of what starts from other runs, these; of one evaluation there is no curve
    shown = atlas_shown.curves("precision_pretraining", "sft", claims["precision_pretraining"], found)
    assert (shown.base, shown.own) == ("precision_pretraining,beta=0", "precision_pretraining,beta=-0.25")
    record = dict(found["latent-cot2-csft"], curves={"cot2": [[dict(step=0, greedy_accuracy=1.0)]]})
    assert atlas_shown.curves("cot2", None, None, {"a": record}) is None


def test_a_gate_is_drawn_where_the_base_has_another(read):
    drawn = {n for n in TEXTS if f"{n}-gate.svg" in read[f"{n}.html"].text}
    told = {n for n in TEXTS if "is pushed as in" in " ".join(read[f"{n}.html"].words)}
    assert {"grpo", "sapo", "gspo", "dapo"} < drawn and {"dr_grpo", "ppo", "forking_tokens"} < told and not drawn & told


def test_needs_and_changes_are_said_of_every_script():
    assert set(atlas.NEEDS) == set(TEXTS)
    assert {key for needs in atlas.NEEDS.values() for key in needs.split()} == set(atlas.COSTS)
    assert not [n for n, needs in atlas.NEEDS.items() if "nothing" in needs.split() and needs != "nothing"]
    found = atlas.entries()
    named = {part for e in found.values() for part in (*e.parts, *e.copies)}
    assert {part for of in atlas.CHANGES.values() for part in of.split()} - named == set()
    assert [n for n, e in found.items() if bool(e.changes) != bool(e.base)] == []
    wanted = dict(sapo={"objective"}, dr_grpo={"advantages", "token weights"}, bupo={atlas.LOOP}, ccp={"scores", "data"})
    assert {name: set(found[name].changes) & {*atlas.CHANGES, atlas.LOOP} for name in wanted} == wanted
    assert "a network of its own" in found["ppo"].changes
    assert {key for e in found.values() for key in e.changes} == {*atlas.CHANGES, atlas.LOOP}


FOUND = {"clip": "cispo", "2511.20347": "sapo", "--tau-pos": "sapo", "tau_pos": "sapo", "a cliff": "sapo", "gae": "ppo"}


@pytest.mark.parametrize("words, name", FOUND.items())
def test_the_search_finds(words, name, read):
    finds = {e["id"]: e["data-find"] for e in read["index.html"].all("li") if "data-find" in e}
    assert words in finds[name] and sum(words in find for find in finds.values()) < len(finds) / 2


def test_a_docstring_as_text():
    note = atlas_lesson.read(TEXTS["rlfr"], TEXTS)
    assert (note.label, note.title) == ("RLFR", "Extending Reinforcement Learning for LLMs with Flow Environment")
    assert '<a href="https://arxiv.org/abs/2510.10201">arXiv&nbsp;2510.10201</a> (2025).' in note.cite
    assert [heading for heading, *_ in note.blocks if heading] == ["Idea", "Formulas", "Notes"]
    assert note.blocks[2][1] == "pre" and note.blocks[2][2].startswith("J = 1/B sum_i")
    assert note.runs[2][1].endswith("each answer a whole correct solution") and len(note.runs) == 4
    assert atlas_lesson.prose("as in grpo.py, --lr <1 `x`", {"grpo"}) == (
        'as in <a href="grpo.html">grpo.py</a>, <code>--lr</code> &lt;1 <code>x</code>'
    )
    assert all(atlas_lesson.read(text, TEXTS).runs for text in TEXTS.values())


def test_lines_stand_beside_each_other():
    left, right = list("abxd"), list("aydmz")
    assert atlas_lesson.beside(left, right, {1, 2}, {1, 3}) == [(0, 0), (1, 1), (2, None), (3, 2), (None, 3), (None, 4)]
    assert atlas_lesson.beside(["p"], ["q", "p"], set(), set()) == [(None, 0), (0, 1)]
    assert atlas_lesson.order(["a", "n", "c"], ["a", "b", "c", "d"]) == ["a", "n", "b", "c", "d"]


def test_the_parts_of_a_pair_are_the_scripts(site):
    text = (site[0] / "parts.js").read_text()
    data = json.loads(text.removeprefix("const ATLAS = ").removesuffix(";\n"))
    assert len(set(data["parts"])) == len(data["parts"])
    for name, script in TEXTS.items():
        lines = [data["parts"][number] for _, number, _ in data["scripts"][name]]
        plain = html.unescape(re.sub(r"<[^>]+>", "", "\n".join(lines)))
        assert plain.split() == "".join(c for p, c in parts.chunks(script).items() if p != "docstring").split(), name


def test_a_folder_that_is_no_atlas_stays(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="mine is there and is no atlas"):
        atlas.build(tmp_path / "mine")
    assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    old = tmp_path / "site"
    old.mkdir()
    (old / atlas.MARK).write_text("an older one")
    monkeypatch.setattr(atlas, "parts_js", lambda found: 1 / 0)
    monkeypatch.setattr(atlas, "entries", dict)
    with pytest.raises(UserError, match="cannot write the atlas"):
        atlas.build(old)
    assert [p.name for p in tmp_path.rglob("*")] == ["site", atlas.MARK]


def test_the_way_to_a_file(tmp_path):
    inside = atlas.linker(ROOT / "runs" / "atlas", None)
    assert inside("algos/sapo.py") == "../../algos/sapo.py" and (ROOT / "runs" / "atlas").joinpath("..", "..").resolve() == ROOT
    assert atlas.linker(ROOT / "docs", None)("README.md") == "../README.md"
    assert atlas.linker(tmp_path, None)("README.md") is None
    assert atlas.linker(tmp_path, SOURCE + "/")("README.md") == f"{SOURCE}/README.md"


def test_colours_of_code_can_be_read(site):
    """Contrast of 4.5 at least, on the grounds of unchanged, gone and new lines, for what the lexer makes of a script."""

    def light(colour):
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))

    used = set(re.findall(r'class=\\"(\w+)\\"', (site[0] / "parts.js").read_text())) - {"sd"}
    style = (site[0] / "style.css").read_text()
    sheets = (site[0] / "code.css").read_text().partition("@media")
    for sheet, root in ((sheets[0], 0), (sheets[2], 1)):
        grounds = [re.findall(rf"--{name}: (#\w{{6}})", style)[root] for name in ("shade", "gone", "new")]
        colours = re.findall(r"\.code \.(\w+) \{ color: (#\w{6})", sheet)
        assert len([c for c, _ in colours if c in used]) > 8
        for name, colour in [c for c in colours if c[0] in used]:
            for ground in grounds:
                low, high = sorted((light(colour), light(ground)))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, colour, ground)
