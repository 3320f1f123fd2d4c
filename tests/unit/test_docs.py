"""The documents speak of what is there: links, commands, settings, and Python that at least compiles."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer.main

from node.cli.program import build
from node.config import SETTINGS
from tests.support.docs import OPERATIONS, TABLE, settings_table

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def by_name(path):
    return str(path.relative_to(ROOT))


def blocks(path, kind):
    return [text for language, text in BLOCK.findall(path.read_text("utf-8")) if language == kind]


def anchors(path):
    """As GitHub makes them: lower case, punctuation dropped, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def commands():
    """Every command there is, as (words, click command)."""
    found = {}

    def walk(command, words):
        inner = getattr(command, "commands", None)
        if inner is None:
            found[words] = command
            return
        for name, each in inner.items():
            walk(each, (*words, name))

    walk(typer.main.get_command(build()), ())
    return found


COMMANDS = commands()


def said_commands(path):
    """Each command of a document as its words: in console blocks after a prompt, and in `code` with our name."""
    text = path.read_text("utf-8")
    lines = [
        line[2:]
        for block in blocks(path, "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    lines += re.findall(r"`(oncekeeper [a-z][^`]*)`", BLOCK.sub("", text))
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for token in [*lexer, ";"]:
            if set(token) <= set("();<>|&"):
                if words:
                    yield words
                words = []
            else:
                words.append(token)


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(BLOCK.sub("", path.read_text("utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = unquote(target).partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{by_name(path)}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{by_name(path)}: {target}; there are {sorted(anchors(there))}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_python_in_documents_compiles(path):
    for text in blocks(path, "python"):
        compile(text, by_name(path), "exec")


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_commands_in_documents_exist_with_their_options(path):
    for words in said_commands(path):
        if words[0] != "oncekeeper":
            continue
        path_words = tuple(words[1:3]) if tuple(words[1:3]) in COMMANDS else tuple(words[1:2])
        if path_words == ("--install-completion",):
            continue
        assert path_words in COMMANDS, f"{by_name(path)}: {words}"
        known = {option for parameter in COMMANDS[path_words].params for option in parameter.opts}
        known |= {option for parameter in COMMANDS[path_words].params for option in parameter.secondary_opts}
        for word in words:
            if re.fullmatch(r"--[a-z][a-z-]*", word):
                assert word in known | {"--help"}, (
                    f"{by_name(path)}: {words}: {word}; there are {sorted(known)}"
                )


def test_every_command_is_documented_and_takes_json():
    table = (ROOT / "docs" / "cli.md").read_text("utf-8")
    documented = {tuple(each.split()) for each in re.findall(r"^\| `oncekeeper ([a-z ]+)` \|", table, re.M)}
    assert documented == set(COMMANDS)
    for words, command in COMMANDS.items():
        assert any("--json" in parameter.opts for parameter in command.params), words


def test_every_option_named_in_the_table_of_commands_exists():
    rows = re.findall(
        r"^\| `oncekeeper ([a-z ]+)` \| (.*) \|$", (ROOT / "docs" / "cli.md").read_text("utf-8"), re.M
    )
    for name, about in rows:
        known = {option for parameter in COMMANDS[tuple(name.split())].params
                 for option in (*parameter.opts, *parameter.secondary_opts)}  # fmt: skip
        assert set(re.findall(r"--[a-z][a-z-]*", about)) <= known | {"--help"}, name


@pytest.mark.parametrize("words", sorted(COMMANDS), ids=" ".join)
def test_every_command_explains_itself(words, capsys):
    program = typer.main.get_command(build())
    program([*words, "--help"], standalone_mode=False)
    assert " ".join(words) in capsys.readouterr().out


def test_the_table_of_settings_is_what_the_code_says():
    shown = TABLE.search(OPERATIONS.read_text("utf-8"))
    assert shown is not None
    assert shown[2] == settings_table(), "run: python -m tests.support.docs"
    assert set(re.findall(r"^\| `(\w+)` \|", shown[2], re.M)) == set(SETTINGS)


def test_messages_in_documents_are_json_and_are_tasks():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "oncekeeper" / "task.schema.json").read_text("utf-8"))
    found = []
    for path in DOCUMENTS:
        found += re.findall(r"'(\{\"handler\".*?\})'(?=\s|$)", path.read_text("utf-8"), re.M)
    right = [text for text in found if '"to": 5' not in text and "-1" not in text]
    assert right
    for text in right:
        jsonschema.validate(json.loads(text), schema)
