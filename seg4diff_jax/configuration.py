"""Reads configuration files: YAML of bounded size, checked against the types of the options.

jsonargparse then merges the options with the command line. On its own it would import the module of any `class_path`,
read an empty section as null, and expand aliases without a limit. The options that it gets from here have none of
these.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

from seg4diff_jax.quoting import quoted

Value = TypeVar("Value")
LARGEST = 1 << 20
"""Most bytes of a configuration file."""
VALUES = 20_000
"""Most values in a configuration file. A value counts as often as aliases repeat it."""
DEPTH = 32
LONGEST_LINE = 400
"""Most characters of one line of a message."""
CLASSES = ("class_path", "init_args", "dict_kwargs")
"""Keys by which jsonargparse would import a class. No option has such a name."""


class _Loader(yaml.SafeLoader):
    """A YAML loader with YAML 1.2's floats (`1e-5` is one) and without dates."""


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))


def read_configuration(path: Path, kind: type | None = None) -> dict[str, Any]:
    """Returns the options of a configuration file.

    Args:
      kind: dataclass of the options. An empty section means the section's defaults and is left out. None: empty
        sections stay.

    Raises:
      ValueError: the file is absent, is no YAML, repeats a key, is too large, or holds a value that no option takes.
        The message begins with the file.
    """
    try:
        with path.expanduser().open("rb") as file:
            contents = file.read(LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(contents) > LARGEST:
        raise ValueError(f"{path}: expected a configuration of at most {LARGEST >> 10} KiB, the file is larger")
    found = parse_yaml(contents, str(path))
    if not isinstance(found, dict | None):
        raise ValueError(f"{path}: expected options, as in `name: value`, found {quoted(found)}")
    try:
        return {} if found is None else _options(found, kind, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_yaml(contents: bytes | str, where: str) -> Any:
    """Parses YAML with unique keys, moderate depth and bounded size. Aliases are expanded.

    Raises ValueError for anything else. Its message begins with `where`, the name of a file or of an option.
    """
    try:
        loader = _Loader(contents)
        try:
            node = loader.get_single_node()
            if node is not None:
                _expanded(node, {}, ())
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError(f"{where}: more than {DEPTH} sections or lists inside each other") from None
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"{where}: no YAML: {' '.join(str(error).split())}") from None


def _expanded(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Counts the values that a node stands for. Raises ValueError if there are too many, RecursionError if too deep."""
    if id(node) in above or len(above) > DEPTH:
        raise RecursionError
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []:
                raise ValueError(f"{', '.join(map(quoted, twice[:8]))} occurs twice in one section")
            parts = [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_expanded(part, known, (*above, id(node))) for part in parts)
    if known[id(node)] > VALUES:
        raise ValueError(f"more than {VALUES} values, aliases expanded")
    return known[id(node)]


# ---- options and their types ----------------------------------------------------------------------------------------


def section(kind: Any) -> tuple[type | None, bool]:
    """Returns the dataclass of an option that is a section (None for other options), and whether it may be null."""
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    found = next((each for each in choices if isinstance(each, type) and is_dataclass(each)), None)
    return found, types.NoneType in choices


def _options(found: Mapping[Any, Any], kind: type | None, prefix: str) -> dict[str, Any]:
    """Returns the options of a section, without empty sections."""
    hints = get_type_hints(kind) if kind else {}
    kept: dict[str, Any] = {}
    for name, value in found.items():
        if not isinstance(name, str) or name in CLASSES:
            raise ValueError(f"{prefix}{name} is no option: expected names of options as keys")
        option, (inner, optional) = prefix + name, section(hints.get(name))
        if inner is None:
            kept[name] = _plain(value, option)
        elif isinstance(value, dict):
            kept[name] = _options(value, inner, f"{option}.")
        elif value is not None:
            raise ValueError(f"{option} is {quoted(value)}; expected a section with options of its own")
        elif optional:
            kept[name] = None
    return kept


def _plain(value: Any, option: str) -> Any:
    """Returns a value of finite numbers, words, and lists and tables of them.

    Raises ValueError for any other value; the message names the option.
    """
    if isinstance(value, dict):
        return _options(value, None, f"{option}.")
    if isinstance(value, list):
        return [_plain(each, option) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{option} is {value}; expected a finite number")
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{option} is a number of {len(str(abs(value)))} digits; expected one below 2^63")
    if value is not None and not isinstance(value, str | bool | int | float):
        raise ValueError(f"{option} is {quoted(value)}; expected a number, a word, or a list or table of them")
    return value


def check_parsed(values: Mapping[str, Any], kind: type | None) -> None:
    """Checks what jsonargparse does not: that numbers are finite, switches true or false, and required values not null.

    Args:
      values: options that jsonargparse has parsed.
      kind: dataclass of the options.

    Raises ValueError that names all options with such a value.
    """
    refuse(_unparsed(values, kind, ""))


def _unparsed(values: Mapping[str, Any], kind: type | None, prefix: str) -> list[str]:
    hints, found = get_type_hints(kind) if kind else {}, []
    for name, value in values.items():
        option, hint = prefix + name, hints.get(name)
        inner, optional = section(hint)
        if isinstance(value, Mapping):
            found += _unparsed(value, inner, f"{option}.")
        elif value is None and hint is not None and not optional:
            found.append(f"{option} is null; expected a value, or leave the option out for its default")
        elif hint is bool and type(value) is not bool:  # jsonargparse accepts any value from a file for a switch
            found.append(f"{option} is {quoted(value)}; expected true or false")
        else:
            found += infinite({name: value}, prefix)
    return found


def infinite(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns one message for each option with a number that is not finite."""
    return [
        f"{prefix}{name} is {quoted(value)}; expected a finite number"
        for name, value in values.items()
        if any(isinstance(each, float) and not math.isfinite(each) for each in _listed(value))
    ]


# ---- what does not fit ----------------------------------------------------------------------------------------------


def refuse(found: Sequence[str]) -> None:
    """Raises ValueError with all messages, each once; does nothing if there are none."""
    said = list(dict.fromkeys(found))
    if len(said) == 1:
        raise ValueError(said[0])
    if said:
        raise ValueError("".join([f"{len(said)} things do not fit:", *(f"\n  {each}" for each in said)]))


class Refusals:
    """Collects what does not fit, so that one message names all of it.

    Attributes:
      found: a sentence for each thing that does not fit.
    """

    def __init__(self, found: Sequence[str] = ()):
        self.found = list(found)

    def parsed(self, parse: Callable[[], Value], instead: Value) -> Value:
        """Returns what `parse` returns. When it raises ValueError its message is collected, and `instead` returned."""
        try:
            return parse()
        except ValueError as error:
            self.found.append(str(error))
            return instead

    def check(self, check: Callable[[], object]) -> None:
        """Collects the message of a check that raises ValueError."""
        self.parsed(check, None)


def unchecked(kind: type, values: Mapping[str, Any]) -> Any:
    """Makes a configuration and its sections from unchecked values, so that `problems` can report all problems."""
    made, hints = object.__new__(kind), get_type_hints(kind)
    for field in fields(kind):
        inner, _ = section(hints[field.name])
        value = values[field.name]
        value = unchecked(inner, value) if inner is not None and isinstance(value, Mapping) else value
        object.__setattr__(made, field.name, value)
    return made


def problems(config: Any, prefix: str = "") -> list[str]:
    """Returns the problems of a configuration and of its sections. Each reports its own by a method of this name."""
    found: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        found += problems(value, f"{prefix}{field.name}.") if is_dataclass(value) else []
    own = config.problems() if hasattr(config, "problems") else []
    return found + [each if each.startswith(prefix) else f"{prefix}{each}" for each in own]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


class Parser(ArgumentParser):
    """jsonargparse's parser, with long lines of its error messages cut: they would hold wrong values of any length."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = (line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in message.splitlines())
        super().error("\n".join(lines), ex)


def configuration_file(kind: type) -> type[ActionConfigFile]:
    """Returns the action of `--config FILE` for the options of a dataclass."""

    class ConfigurationFile(ActionConfigFile):
        def __call__(self, parser, cfg, values, option_string=None):
            try:
                options = read_configuration(Path(values), kind)
                self.apply_config(parser, cfg, self.dest, json.dumps(options) if options else "{}")
            except ValueError as error:
                raise TypeError(str(error)) from error

    return ConfigurationFile


def check_arguments(arguments: Sequence[str], kind: type) -> None:
    """Raises ValueError for an argument that would make jsonargparse import a module or read a file for a section."""
    sections = dict(_sections(kind, ""))
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, given, value = argument.partition("=")
        if not option.startswith("--"):
            continue
        name = option[2:].replace("-", "_")
        if not {*name.split(".")}.isdisjoint(CLASSES):
            raise ValueError(f"{option} is no option")
        if name not in sections:
            continue
        found = parse_yaml(value if given else following, option)
        inner, optional = sections[name]
        if not isinstance(found, dict) and not (found is None and optional):
            raise ValueError(f"{option} is {quoted(found)}; expected options of it, as in {option}.NAME=VALUE")
        _options(found or {}, inner, f"{option}.")


def _sections(kind: type, prefix: str) -> Iterator[tuple[str, tuple[type, bool]]]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner, optional = section(hints[field.name])
        if inner is not None:
            yield prefix + field.name, (inner, optional)
            yield from _sections(inner, f"{prefix}{field.name}.")
