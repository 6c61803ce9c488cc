"""README's commands and the Python in README and docs/ run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import seg4diff_jax as s4d

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
WITHOUT_TORCH = """
import runpy, shlex, sys
sys.modules["torch"] = None
from seg4diff_jax.__main__ import main
for line in {commands!r}:
    program, *arguments = shlex.split(line)
    if program == "python":
        sys.argv = arguments
        runpy.run_path({root!r} + "/" + arguments[0], run_name="__main__")
    elif program == "seg4diff":
        assert main(arguments) == 0, line
    else:
        raise SystemExit("cannot run " + line)
"""


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / document).read_text("utf-8"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The first commands of README, but for the installation, run in an empty directory and without PyTorch."""
    directory = tmp_path_factory.mktemp("quickstart")
    install, *commands = blocks("README.md", "bash")[0].splitlines()
    assert install == "pip install -e ."
    environment = os.environ | {"XDG_CACHE_HOME": str(directory / "cache"), "PYTHONPATH": str(ROOT)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        environment.pop(name, None)
    program = WITHOUT_TORCH.format(commands=commands, root=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "random weights: masks made with it mean nothing" in done.stdout
    assert "PyTorch" not in done.stderr
    return directory


def test_the_quickstart_makes_masks_and_keeps_compiled_programs(quickstart):
    labels = np.asarray(Image.open(quickstart / "runs" / "demo" / "result" / "labels.png"))
    assert labels.shape == (480, 640)
    assert len(np.unique(labels)) > 1
    assert any((quickstart / "cache" / "seg4diff-jax" / "compiled").iterdir())


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name, "python")])
def test_the_python_examples_run(document, quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    exec(compile("\n".join(blocks(document, "python")), document, "exec"), {"__name__": "example"})


def test_the_files_that_documents_name_exist():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        named = re.findall(r"(?:tests|docs|examples|benchmarks|seg4diff_jax|convert)/[\w./]+\.(?:py|md)", text)
        missing = [name for name in named if not (ROOT / name).is_file()]
        assert not missing, f"{document} names {missing}"


def test_the_random_checkpoint_is_one_that_diffusers_loads_whole(quickstart):
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    checkpoint = quickstart / "runs" / "demo" / "checkpoint"
    parts = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    for name, cls in parts.items():
        _, loaded = cls.from_pretrained(checkpoint / name, output_loading_info=True)
        assert not any(loaded[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = StableDiffusion3Pipeline.from_pretrained(checkpoint, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(
            "a house", None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
    ours = s4d.load(checkpoint, blocks=1).encode_prompts(["a house"])
    np.testing.assert_allclose(ours.context, context.numpy(), atol=1e-5 * context.abs().max().item())
    np.testing.assert_allclose(ours.pooled, pooled.numpy(), atol=1e-5 * pooled.abs().max().item())
