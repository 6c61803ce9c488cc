"""What users are told to install can be installed: this clone, or a package that is published."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from tests.reference.documents import DOCUMENTS, ROOT

PUBLISHED = {"gguf", "libtpu", "torch"}
"""On PyPI under just this name. This project is not."""
OPTIONS_WITH_A_VALUE = ("-e", "--editable", "-r", "--index-url", "--extra-index-url", "-i", "-f")


def told() -> dict[str, list[str]]:
    """File to what stands after each `pip install` in it: documents, configurations, help and error messages."""
    sources = [
        file for folder in ("seg4diff_jax", "convert", "benchmarks", "configs") for file in (ROOT / folder).rglob("*.*")
    ]
    texts = [*(ROOT / name for name in DOCUMENTS), *(file for file in sources if file.suffix in (".py", ".yaml"))]
    texts += [ROOT / "train.py", ROOT / "evaluate.py", ROOT / "pyproject.toml"]
    found = {str(file.relative_to(ROOT)): installs(file.read_text("utf-8")) for file in texts}
    return {name: commands for name, commands in found.items() if commands}


def installs(text: str) -> list[str]:
    """The words after `pip install`, up to what ends a command in a shell, a sentence, or code."""
    return [
        each.strip() for each in re.findall(r"pip3? install +((?:\"[^\"\n]*\"|'[^'\n]*'|[^\s`&#;,|)\\]+ ?)+)", text)
    ]


def unpublished(arguments: str) -> list[str]:
    """Of what is installed, what is neither a path, a git URL nor known to be published."""
    words, wrong = iter(re.split(r" (?:or|and|brings|in|to|for)\b", arguments)[0].split(" ")), []
    for word in words:
        name = shlex.split(word)[0] if word.count("'") % 2 == 0 and word.count('"') % 2 == 0 else word.strip("\"'")
        if name in ("-e", "--editable"):
            local = next(words, "").strip("\"'")
            wrong += [] if local.startswith((".", "/", "git+")) else [local]
        elif name in OPTIONS_WITH_A_VALUE:
            next(words, None)
        elif not name.startswith(("-", ".", "/", "git+")) and re.split(r"[\[=<>~!]", name)[0] not in PUBLISHED:
            wrong.append(name)
    return wrong


def test_documents_and_messages_tell_to_install_what_there_is():
    commands = told()
    assert {"README.md", "CONTRIBUTING.md", "docs/scale.md", "convert/sources/gguf.py"} <= commands.keys()
    wrong = {name: each for name, found in commands.items() for each in found if unpublished(each)}
    assert not wrong


def test_nobody_is_told_to_install_this_project_by_name():
    name = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["name"]
    assert name not in PUBLISHED
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        assert not re.search(rf"(?i)install +['\"]?{re.sub('[-_]', '[-_]', name)}", text), document


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`pip install -e .`", []),
        ('pip install -e ".[cuda,convert]"       # or tpu for cuda', []),
        ("is not installed: pip install libtpu, or in the clone", []),
        ("pip install libtpu && pytest", []),
        ("pip install git+https://example.org/seg4diff_jax", []),
        ("pip install ./here", []),
        ("pip install seg4diff-jax", ["seg4diff-jax"]),
        ("pip install 'seg4diff-jax[tpu]'    # libtpu", ["seg4diff-jax[tpu]"]),
        ("pip install -U libtpu seg4diff_jax", ["seg4diff_jax"]),
        ("pip install -e seg4diff_jax", ["seg4diff_jax"]),
        ("pip install libtpu==1 'torch>=2'", []),
    ],
)
def test_what_is_not_published_is_found(text, wrong):
    (arguments,) = installs(text)
    assert unpublished(arguments) == wrong
