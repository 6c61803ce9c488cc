"""Every command that a document, a configuration, a docstring or a message names is one that its program takes."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from seg4diff_jax import command_line
from seg4diff_jax.command_line import plan, plan_evaluate
from seg4diff_jax.command_line import train as training
from seg4diff_jax.command_line.evaluate import merging_protocols
from seg4diff_jax.convert import __main__ as convert_commands
from seg4diff_jax.evaluation.options import (
    STEPS,
    chosen_heads,
    kinds_of_prompts,
    make_parser,
    numbers,
    parse,
    protocols,
)
from seg4diff_jax.planning.chips import Slice
from seg4diff_jax.training.loop import check
from tests.reference.documents import (
    DOCUMENTS,
    ROOT,
    Command,
    anchors,
    blocks,
    fenced,
    headers,
    inline,
    links,
    messages,
    strings,
)

LINKED = [*DOCUMENTS, "CHANGELOG.md", "findings/README.md"]
TROUBLES = "docs/troubleshooting.md"
FOREIGN = {"cp", "gcloud", "hf", "mkdir", "pre-commit", "tar", "unzip", ".ci/run"}
"""Programs of others, and of our own that take nothing."""


class Parsed(Exception):
    """Raised in place of what a command does."""


@pytest.fixture(autouse=True)
def clone(tmp_path, monkeypatch):
    """Where a reader types: the configurations are there, and commands end where they have read their options."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)

    def parsed(*_: Any, **__: Any) -> None:
        raise Parsed

    for commands in (command_line.COMMANDS, convert_commands.COMMANDS):
        for name, command in commands.items():
            monkeypatch.setitem(commands, name, command._replace(run=parsed))


def program(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """What is run, and its arguments; those that may be left out too, and without the dots that stand for more."""
    given = re.sub(r"\[(--[^]]*)\]", lambda found: found[1].replace(" ", "\n"), "\n".join(words)).split("\n")
    given = [word for word in given if word != "..."]
    if given[:2] == ["python", "-m"]:
        return given[2], given[3:]
    if given[0] == "python":
        return given[1], given[2:]
    return given[0], given[1:]


# ---- what takes the arguments ---------------------------------------------------------------------------------------


def evaluated(arguments: list[str]) -> None:
    """As `evaluate.py` reads them, of a model of SD3-medium's depth."""
    options = parse(arguments)
    numbers(9 if options.blocks == "expert" else options.blocks, "--blocks", range(24))
    chosen_heads(options.heads, 24)
    numbers(8 if options.steps == "expert" else options.steps, "--steps", STEPS)
    numbers(options.seeds, "--seeds", range(2**31), all_allowed=False)
    kinds_of_prompts(options.prompts)
    merging_protocols(options, protocols(options.protocol))


def trained(arguments: list[str]) -> None:
    """As `train.py` reads them. It leaves a run's record, which later commands may name."""
    _, config, record, _, _ = training.parse(arguments)
    check(config.run, config.optimizer)
    out = Path(config.run.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(record))


def planned(arguments: list[str]) -> None:
    if arguments[:1] == ["evaluate"]:
        _, topology, _ = plan_evaluate.parse(arguments[1:])
    else:
        topology = plan.parse(arguments)[1]["topology"]
    Slice.parse(topology)


def gained(arguments: list[str]) -> None:
    """`magnet_gain.py`: its own options, and `train.py`'s with each of the values that vary."""
    from benchmarks.magnet_gain import _parser, _split

    own, others = _split(arguments)
    options = _parser().parse_args(own)
    varied = dict(pair.split("=", 1) for pair in options.vary)
    for values in product(*([f"--{name}={value}" for value in each.split(",")] for name, each in varied.items())):
        training.parse(["--config", options.config, *others, *values])


def benchmarked(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where the script lies, as Python would have it
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if "auto_cli" in vars(module):
        jsonargparse.auto_parser(module.main).parse_args(arguments)
        return

    def parsed(parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.parse_known_args(arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        module.main()


def of_tests(arguments: list[str]) -> None:
    """pytest's files exist, and what `-k` names is in one of them."""
    files = [ROOT / word for word in arguments if word.endswith(".py")]
    text = "".join(file.read_text("utf-8") for file in files)
    wanted = arguments[arguments.index("-k") + 1] if "-k" in arguments else ""
    assert re.search(rf"def test_\w*{wanted}", text) or not files, f"no test of {wanted}"


def installed(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = [name for each in re.findall(r"\[(.*?)\]", " ".join(arguments)) for name in each.split(",")]
    assert set(named) <= extras.keys()


def itself(name: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The program that a command of `seg4diff` is, where it is one by itself."""
    others = {"evaluate": "evaluate.py", "train": "train.py", "convert": "convert"}
    if name == "seg4diff" and arguments and arguments[0] in others:
        return others[arguments[0]], arguments[1:]
    return name, arguments


def typed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command as it would be read if it were typed. Raises or leaves where it would not be understood."""
    name, arguments = itself(*program(command.words))
    if name in ("seg4diff", "convert") and arguments[:1] != ["plan"]:
        with pytest.raises(Parsed):
            (command_line if name == "seg4diff" else convert_commands).main(arguments)
    elif name == "seg4diff":
        planned(arguments[1:])
    elif name == "benchmarks/magnet_gain.py":
        gained(arguments)
    elif name.startswith("benchmarks/"):
        benchmarked(name, arguments, monkeypatch)
    elif name in (simple := {"evaluate.py": evaluated, "train.py": trained, "pytest": of_tests, "pip": installed}):
        simple[name](arguments)
    elif name.startswith("real_shapes."):
        assert (ROOT / "benchmarks" / f"{name.replace('.', '/')}.py").is_file()
    else:
        assert name in FOREIGN, "no such program"


def named(command: Command) -> None:
    """Of a command that is told in part: there is one of that name, and it has each of the options."""
    name, arguments = itself(*program(command.words))
    if not arguments or arguments == ["COMMAND"]:
        return
    if name in ("seg4diff", "convert"):
        commands = command_line.COMMANDS if name == "seg4diff" else convert_commands.COMMANDS
        parser = jsonargparse.ArgumentParser()
        if arguments[:2] == ["plan", "evaluate"]:
            parser = plan_evaluate.make_parser()
        elif arguments[0] == "plan":
            parser = training.task_parser("magnet", "", "")
            parser.add_argument("--topology")
        else:
            commands[arguments[0]].arguments(parser)
    elif name == "evaluate.py":
        parser = make_parser()
    elif name == "train.py":
        parser = training.make_parser(training.chosen_task(["--config", "configs/magnet/coco.yaml"]))
    else:
        assert name == "pytest", "no such program"
        of_tests(arguments)
        return
    known = {option for action in parser._actions for option in action.option_strings}
    assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known


def misunderstood(commands: list[Command], monkeypatch: pytest.MonkeyPatch) -> str:
    """The commands that are not, each with what was said, a line each."""
    found = []
    for command in dict.fromkeys(commands):
        try:
            typed(command, monkeypatch) if command.whole else named(command)
        except (Exception, SystemExit) as error:
            found.append(f"{command.place}: {' '.join(command.words)}: {error!r}")
    return "\n".join(found)


# ---- statements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_a_document_are_understood_in_their_order(document, monkeypatch):
    assert not misunderstood([*fenced(document), *inline(document)], monkeypatch)


def test_the_commands_at_the_head_of_configurations_and_modules_are_understood(monkeypatch):
    assert not misunderstood(list(headers()), monkeypatch)


def test_the_commands_that_help_and_errors_name_exist(monkeypatch):
    found = list(messages())
    assert len(found) > 10
    assert not misunderstood(found, monkeypatch)


@pytest.mark.parametrize("document", LINKED)
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in links(document):
        name, _, heading = link.partition("#")
        target = ROOT / document if not name else (ROOT / document).parent / name
        assert target.exists(), f"{document} links to {link}"
        if heading:
            assert heading in anchors(str(target.resolve().relative_to(ROOT))), f"{document} links to {link}"


def test_every_page_can_be_reached_from_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        if (document := ahead.pop()) in reached or not document.endswith(".md"):
            continue
        reached.add(document)
        names = (link.partition("#")[0] for link in links(document))
        ahead += [str(((ROOT / document).parent / name).resolve().relative_to(ROOT)) for name in names if name]
    assert {*DOCUMENTS} <= reached


def test_the_messages_that_troubleshooting_shows_are_in_the_sources():
    said = "\n".join(" ".join(text.split()) for _, text in strings("…"))
    shown = [" ".join(block.split()) for block in blocks(TROUBLES, "text")]
    assert len(shown) > 30
    for message in shown:
        parts = [re.escape(part.strip()) for part in message.split("…")]
        assert re.search(r"[^\n]*".join(parts), said), message


@pytest.mark.parametrize(
    "wrong",
    [
        ("python", "evaluate.py", "--resised"),
        ("python", "evaluate.py", "--steps", "29"),
        ("python", "evaluate.py", "--config", "configs/eval/nothing.yaml"),
        ("python", "train.py", "--config", "configs/magnet/coco.yaml", "--run.stepz=3"),
        ("seg4diff", "segment", "photo.jpg", "--sizes", "3"),
        ("seg4diff", "plan", "--config", "configs/magnet/coco.yaml", "--topology", "v9:1x1"),
        ("seg4diff", "plan", "evaluate", "--topology", "v5e:1x1", "--promptz", "3"),
        ("python", "benchmarks/decode.py", "--pictures", "3"),
        ("pytest", "tests/test_nothing.py"),
        ("pip", "install", "-e", ".[everything]"),
        ("seg5diff", "segment"),
    ],
)
def test_a_command_that_is_not_is_found(wrong, monkeypatch):
    assert misunderstood([Command("here", wrong)], monkeypatch).startswith("here: ")
