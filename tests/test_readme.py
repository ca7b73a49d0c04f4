"""README and docs/: short, no dead link, no flag that its script lacks, and the numbers that results/ holds."""
import argparse
import importlib
import re
import shlex

import pytest
from conftest import ROOT

import networks
from engine import operations
from studies import study_file

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"(?:python|torchrun --nproc-per-node \d+) (\w+)\.py\b(.*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
OTHERS = {"--help", "--nproc-per-node", "--logdir"}      # argparse's own, torchrun's and TensorBoard's


class Parsed(Exception):
    """Raised in place of a script's work, once its parser has read the command line."""


@pytest.fixture
def parse(monkeypatch):
    """parse(script's name, words): what its own parser says of them, a Parsed(parser, names); nothing else runs."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, argv):
        raise Parsed(parser, real(parser, argv))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)

    def call(script, words):
        with pytest.raises(Parsed) as found:
            importlib.import_module(script).main(words)
        return found.value.args
    return call


def visible(page):
    """The text of a page without its comments."""
    return re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


def code_of(text):
    """Lines of code blocks, and code within lines."""
    rest = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.findall(r"^ {4}(.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", rest)


def commands_of(text):
    """(script's name, its words) of every command in the code of a text."""
    for code in code_of(text):
        for part in re.split(r" && | # ", code):
            match = SCRIPT.match(part.split(" > ")[0].strip())
            if match:
                yield match[1], shlex.split(match[2])


def headings_of(text):
    """The anchors that GitHub makes of a page's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def dead_links(text, page):
    """The relative links and pictures of a page that lead to no file, or to no heading of it."""
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or anchor and anchor not in headings_of(target.read_text()):
            dead.append(link)
    return dead


# ---- the tools of this file

def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading, here\n")
    text = '[a](page.md#one-heading-here) [b](none.md) [c](#no-heading) <img src="d.png"> [e](https://a.example/b)'
    assert dead_links(text, page) == ["none.md", "#no-heading", "d.png"]


def test_commands_are_found_in_blocks_and_in_lines():
    text = ("run `python train.py --lr 0.1`:\n\n    python test.py && python profil.py --json > a.json   # why\n"
            "    torchrun --nproc-per-node 2 train.py --epochs 1\n")
    assert list(commands_of(text)) == [("test", []), ("profil", ["--json"]), ("train", ["--epochs", "1"]),
                                       ("train", ["--lr", "0.1"])]


def test_a_flag_that_a_script_lacks_is_found(parse):
    with pytest.raises(ValueError, match="unrecognized arguments: --rate 1"):
        parse("train", ["--rate", "1"])


# ---- README

def test_readme_is_read_in_a_few_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


def test_quick_start_is_on_the_first_screen():
    assert README.read_text().splitlines().index("    make demo     # environment, then train, prune, test, count and "
                                                 "report on digits: minutes, no data set needed") < 40


def test_map_has_every_file_and_no_other():
    section = README.read_text().split("\n## Map\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/]+(?:\.py|/)|Makefile)`", section))
    assert {path.name for path in ROOT.glob("*.py")} - named == set()
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_readme_links_every_page():
    text = README.read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


# ---- all pages

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert dead_links(visible(page), page) == []


# what docs/your-own-technique.md lets a reader write (tests/test_your_own_technique.py does), and what is there already
OWN = {"stack": "mixup", "filter": "lamp", "narrow": "resnet20"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_flags_that_their_scripts_know(page, parse):
    for script, words in commands_of(visible(page)):
        assert (ROOT / f"{script}.py").exists(), f"{page.name} runs {script}.py, which is not there"
        parse(script, [OWN.get(word, word) for word in words] if page.stem == "your-own-technique" else words)


def test_every_flag_is_one_of_a_script(parse):
    needed = {"benchmark": [["inference"], ["training"], ["profile"], ["deployment", "a"]],
              "export": [["--out", "a"]], "predict": [["a"]], "study": [["a"]]}
    scripts = [path.stem for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    known = set(OTHERS)
    for script in scripts:
        for words in needed.get(script, [[]]):
            parser, _ = parse(script, words)
            known |= set(parser._option_string_actions)
    assert {"train_pruning", "test"} <= set(scripts)
    named = {(page.name, flag) for page in PAGES for code in code_of(visible(page)) for flag in FLAG.findall(code)}
    assert {(page, flag) for page, flag in named if flag not in known} == set()


def test_make_has_every_target_that_is_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match for page in PAGES for code in code_of(visible(page))
             for match in re.findall(r"^make ([\w-]+)", code)}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_page_opens_with_a_command(page):
    assert list(commands_of(visible(page).split("\n## ")[0]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marked_tables_are_closed(page):
    marks = re.findall(r"<!-- (table \S+|end)", page.read_text())
    assert [mark.split()[0] for mark in marks] == ["table", "end"] * (len(marks) // 2)
    assert [mark for mark in marks[::2] if not (ROOT / mark.split()[1].rstrip(":")).exists()] == []


# ---- what pages show beside results/

def test_the_table_of_networks_counts_them_right():
    section = (ROOT / "docs" / "training.md").read_text().split("\n## Networks\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)( --groups 1)?` \| ([\d,]+) \| ([\d,]+) \|", section, re.MULTILINE)
    assert len(rows) == 11
    for name, dense, parameters, macs in rows:
        model = networks.build(name, num_classes=10, **({"groups": 1} if dense else {}))
        assert f"{sum(weight.numel() for weight in model.parameters()):,}" == parameters
        assert f"{operations.macs_of(model, (3, 32, 32)):,}" == macs


def test_the_example_of_a_study_is_one(tmp_path):
    text = (ROOT / "docs" / "results.md").read_text()
    (tmp_path / "example.json").write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert len(study_file.read_study(tmp_path / "example.json")["arms"]) == 2
