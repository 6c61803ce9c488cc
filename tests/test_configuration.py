"""Configuration files mean what they say, and nothing in them runs, expands without end or is silently left out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from seg4diff_jax import configuration
from seg4diff_jax.command_line.plan import parse as parse_plan
from seg4diff_jax.command_line.tasks import TASKS
from seg4diff_jax.command_line.train import make_parser
from seg4diff_jax.command_line.train import parse as parse_training
from seg4diff_jax.configuration import parse_yaml, read_configuration, section
from seg4diff_jax.evaluation.options import Data, Options, Unsupervised
from seg4diff_jax.evaluation.options import parse as parse_evaluation
from seg4diff_jax.magnet.items import MaskData
from seg4diff_jax.parallel import MeshConfig
from seg4diff_jax.training.optimizers import OptimizerConfig

TRAINING = ["--task=magnet", "--run.out=o", "--run.steps=9", "--run.batch_size=1", "--model=m"]


def written(folder: Path, contents: str) -> Path:
    (folder / "options.yaml").write_text(contents)
    return folder / "options.yaml"


def trained(file: Path, *arguments: str) -> Any:
    return parse_training(["--config", str(file), *TRAINING, *arguments]).config


def evaluated(file: Path, *arguments: str) -> Options:
    return parse_evaluation(["--config", str(file), *arguments])


def planned(file: Path) -> Any:
    return parse_plan(["--config", str(file), *TRAINING])[0]


COMMANDS = {"train": trained, "evaluate": evaluated, "plan": planned}

# ---- empty sections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "contents", ["data:\n", "data: null\n", "data: {}\n", "data: ~\nmodel: m\n", "{}", "", "# none"]
)
def test_an_empty_section_means_its_defaults(tmp_path, command, contents):
    found = COMMANDS[command](written(tmp_path, contents))
    assert found.data == (Data() if command == "evaluate" else MaskData())


def test_every_section_may_be_empty_at_every_depth(tmp_path):
    found = trained(
        written(tmp_path, "run:\n  mesh:\noptimizer:\ndata:\nheld_out:\nlora:\nobjective:\nnoise_levels:\n")
    )
    assert found.run.mesh == MeshConfig()
    assert found.optimizer == OptimizerConfig()
    assert evaluated(written(tmp_path, "unsupervised:\ndata:\n  name: voc20\n")).unsupervised == Unsupervised()


def test_null_stays_null_where_it_is_a_value(tmp_path):
    file = written(tmp_path, "samples:\nblock: null\noptimizer:\n  clip: null\nrun:\n  mesh:\n    data: null\n")
    found = trained(file)
    assert (found.samples, found.block, found.optimizer.clip, found.run.mesh.data) == (None, None, None, None)
    assert trained(written(tmp_path, "samples: {}\n")).samples.count == 8
    assert trained(written(tmp_path, "samples: {count: 3}\n"), "--samples=null").samples is None


def test_options_given_after_the_file_win_and_those_before_it_do_not(tmp_path):
    file = written(tmp_path, "optimizer:\n  learning_rate: 1e-5\n  warmup: 3\n")
    assert trained(file, "--optimizer.warmup=4").optimizer == OptimizerConfig(learning_rate=1e-5, warmup=4)
    assert parse_evaluation(["--pictures=3", "--config", str(written(tmp_path, "pictures: 4\n"))]).pictures == 4


@pytest.mark.parametrize("option", [name for name, kind in get_type_hints(Options).items() if kind is bool])
@pytest.mark.parametrize("value", ["[[], []]", "7", "abc"])
def test_a_switch_in_a_file_is_a_truth_value(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"^{option} is .*; expected true or false"):
        parse_evaluation(["--config", str(written(tmp_path, f"{option}: {value}\n"))])
    assert getattr(parse_evaluation(["--config", str(written(tmp_path, f"{option}: true\n"))]), option) is True


@pytest.mark.parametrize(
    ("command", "option"),
    [("train", "lora.alpha"), ("train", "optimizer.warmup"), ("evaluate", "model"), ("evaluate", "data.scenes")],
)
def test_null_is_refused_by_name_where_it_is_no_value(tmp_path, command, option):
    section, _, name = option.rpartition(".")
    file = written(tmp_path, f"{section}:\n  {name}: null\n" if section else f"{name}: null\n")
    with pytest.raises(ValueError, match=rf"^{option} is null; expected a value"):
        COMMANDS[command](file)


def test_without_arguments_the_tasks_are_named():
    with pytest.raises(ValueError, match="the task is not named; expected one of autoencoder, contrastive"):
        parse_training([])


@pytest.mark.parametrize("contents", ["", "{}", "# none", "task: null", "task: sewing"])
def test_a_file_that_names_no_task_is_named_itself(tmp_path, contents):
    file = written(tmp_path, contents)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(file))}: the task is (not named|'sewing'); expected one of"
    ):
        parse_training(["--config", str(file)])


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_wrong_value_is_shown_in_short(tmp_path, capsys, command):
    with pytest.raises(SystemExit):
        COMMANDS[command](written(tmp_path, f"model: {[[]] * 3000}\n"))
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert "model" in said
    assert max(map(len, said.splitlines())) < 500


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ("data:\n  name: a\n  name: b\n", "'name' occurs twice"),
        ("data: [1, 2]\n", "data is [1, 2]; expected a section"),
        ("data: folder.yaml\n", "data is 'folder.yaml'; expected a section"),
        ("[1, 2]\n", "expected options"),
        ("model: .nan\n", "model is nan; expected a finite number"),
        ("model: [1, -.inf]\n", "model is -inf; expected a finite number"),
        ("model: {a: {b: .inf}}\n", "model.a.b is inf; expected a finite number"),
        ("model: " + "9" * 5000, "digits"),
        ("model: " + "9" * 30, "model is a number of 30 digits"),
        ("data: " + "[" * 3000, "more than 32 sections or lists inside each other"),
        ("data: &a\n  name: *a\n", "inside each other"),
        ("model: !!python/name:os.system\n", "no YAML"),
        ("model: !!binary aGk=\n", "expected a number, a word"),
        ("1: 2\n", "1 is no option"),
        ("model: [\n", "no YAML"),
        ("\x00", "no YAML"),
    ],
)
def test_a_file_that_no_options_can_be_read_of_is_named_in_one_sentence(tmp_path, capsys, command, contents, said):
    file = written(tmp_path, contents)
    try:
        COMMANDS[command](file)
        pytest.fail("nothing was said")
    except ValueError as error:
        message = str(error)
    except SystemExit:
        message = capsys.readouterr().err.rpartition("error: ")[2]
    assert str(file) in message
    assert said in message
    assert len(message.strip().splitlines()) == 1


def test_aliases_are_bounded_by_what_they_expand_to(tmp_path, monkeypatch):
    """Ten of ten is a hundred: with a bound of 50 that is too much, however few bytes it takes."""
    monkeypatch.setattr(configuration, "VALUES", 50)
    tenfold = lambda of: "[" + ", ".join([of] * 10) + "]"
    assert parse_yaml(f"a: &a {tenfold('1')}\nb: *a\n", "f") == {"a": [1] * 10, "b": [1] * 10}
    with pytest.raises(ValueError, match="f: no YAML: more than 50 values, aliases expanded"):
        parse_yaml(f"a: &a {tenfold('1')}\nb: {tenfold('*a')}\n", "f")
    monkeypatch.setattr(configuration, "LARGEST", 20)
    with pytest.raises(ValueError, match=r"options\.yaml: .*the file is larger"):
        read_configuration(written(tmp_path, "model: " + "m" * 20))


def test_numbers_are_those_of_yaml_and_dates_are_words():
    values = {"1e-5": 1e-5, "1.5": 1.5, "1.": 1.0, ".5": 0.5, "-2E+3": -2000.0, "10": 10, "2026-11-29": "2026-11-29"}
    values |= {"1e": "1e", "e5": "e5", "0x10": 16, "true": True, "null": None, "1.2.3": "1.2.3", "5:3": 303}
    assert {text: parse_yaml(text, "f") for text in values} == values


@pytest.mark.parametrize("value", [".nan", "-.inf", "1e999", "[0.9, .nan]", '{"a": .inf}'])
def test_a_number_on_the_command_line_is_finite_too(value):
    option = {"[": "betas", "{": "rates"}.get(value[0], "learning_rate")
    with pytest.raises(ValueError, match=rf"^optimizer\.{option}.* is .*; expected a finite number"):
        parse_training([*TRAINING, f"--optimizer.{option}={value}"])


BASE = {
    "autoencoder": [],
    "contrastive": [],
    "flow_matching": ["--vae=v", "--text=t", "--kernel.name=xla"],
    "magnet": ["--model=m", "--samples={}", "--kernel.name=xla", "--objective.targets=classes"],
}


def numeric_options(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted options of a configuration that are numbers, or lists or tables of them, and a value far below zero."""
    for name, hint in get_type_hints(kind).items():
        inner, _ = section(hint)
        if inner is not None:
            yield from numeric_options(inner, f"{prefix}{name}.")
        elif re.search(r"\b(int|float)\b", str(hint)):
            forms = {"tuple": "[{0}, {0}]", "dict": '{{"a": {0}}}'}
            form = next((form for word, form in forms.items() if word in str(hint)), "{0}")
            yield prefix + name, form.format(-(10**15))


@pytest.mark.parametrize(
    ("task", "option", "value"), [(task, *each) for task in TASKS for each in numeric_options(TASKS[task].config)]
)
def test_every_number_of_every_task_has_a_bound_that_is_told_by_its_name(capsys, task, option, value):
    run = ["--task", task, "--run.out=o", "--run.steps=9", "--run.batch_size=1", *BASE[task], f"--{option}={value}"]
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse_training(run)
    printed = capsys.readouterr().err.rpartition("error: ")[2]
    assert option.split(".")[-1] in (printed if isinstance(caught.value, SystemExit) else str(caught.value))


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that can be imported, with a class that would do for a section: importing it is seen in sys.modules."""
    name = "a_module_of_no_use"
    source = "from seg4diff_jax.training.sample_pictures import Samples\nclass Other(Samples): pass\n"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "contents",
    [
        "samples: {class_path: NAME.Other}",
        "samples: NAME.Other",
        "data: {class_path: NAME.Other}",
        "optimizer: NAME.Other",
        "kernel: NAME.Other",
        "run: {mesh: {class_path: NAME.Other, init_args: {}}}",
        "class_path: NAME.Other",
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_configuration_file_imports_a_module(tmp_path, module, command, contents):
    file = written(tmp_path, contents.replace("NAME", module))
    with pytest.raises((ValueError, SystemExit)):
        COMMANDS[command](file)
    assert module not in sys.modules


@pytest.mark.parametrize(
    "arguments",
    [
        ["--samples=NAME.Other"],
        ["--samples", "NAME.Other"],
        ["--samples.class_path=NAME.Other"],
        ['--samples={"class_path": "NAME.Other"}'],
        ["--data.class_path", "NAME.Other"],
        ["--optimizer=NAME.Other"],
        ["--kernel=NAME.Other"],
        ["--run.mesh=NAME.Other"],
    ],
)
def test_nor_does_an_argument(module, arguments):
    with pytest.raises(ValueError, match=r"no option|expected options"):
        parse_training([*TRAINING, *(each.replace("NAME", module) for each in arguments)])
    assert module not in sys.modules


def test_the_files_that_come_with_the_project_are_read():
    files = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        assert read_configuration(file) == yaml.safe_load(re.sub(r"(?<![.0-9])(\d+)e-", r"\1.0e-", file.read_text()))


def test_the_help_of_magnet_says_what_every_option_does():
    actions = make_parser("magnet")._actions
    assert len(actions) > 60
    assert not [action.option_strings for action in actions if not action.help]
