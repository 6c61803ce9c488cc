"""Measures memory and time of converting a full SD3-medium with T5-XXL (15 GB in fp16), and of `cp` of the same files.

    python benchmarks/convert_checkpoint.py [--scratch DIR] [--without-t5] [--repeats 2]

Writes a checkpoint of random numbers with the published shapes, in diffusers' layout (no download). Then copies and
converts it in turn, each time from a cold page cache, and until all bytes are on the disk. Needs free space of twice
the checkpoint's size. As root the whole page cache is dropped, otherwise only the checkpoint's pages. Target: at most
2 GiB resident at the peak, with mapped pages and imports, and at most twice the time of cp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from seg4diff_jax.convert.components import COMPONENTS, abstract_model, parse_config
from seg4diff_jax.convert.families import SD3
from seg4diff_jax.convert.names import Shape, assign_back, parameter_shapes
from seg4diff_jax.convert.sources.safetensors_stream import write_safetensors

CLIP = {"hidden_act": "gelu", "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "sample_size": 128,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 16,
        "layers_per_block": 2,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": CLIP
    | {"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    | {"num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": CLIP
    | {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
    | {"num_hidden_layers": 32, "num_attention_heads": 20},
    "text_encoder_3": {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    },
}
PEAK_LIMIT, TIME_LIMIT = 2.0, 2.0
MEASURED = """
import sys
from seg4diff_jax.convert.__main__ import main
status = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(status)
"""


def torch_shapes(name: str, config: dict[str, Any]) -> dict[str, Shape]:
    shapes = parameter_shapes(abstract_model(name, config))
    rows = assign_back(COMPONENTS[name].rules["diffusers"](parse_config(name, config)), shapes)
    zero = np.float32(0)
    return {
        row.source: row.transform.to_torch([np.broadcast_to(zero, shapes[t]) for t in row.targets]).shape
        for row in rows
    }


def random_tensors(shapes: dict[str, Shape]) -> Iterator[tuple[str, np.ndarray]]:
    pool = np.random.default_rng(0).integers(0, 0x3C00, 1 << 24, dtype=np.uint16).view(np.float16)
    for name, shape in shapes.items():
        yield name, np.resize(pool, shape)


def make_checkpoint(directory: Path, components: list[str]) -> None:
    for name in components:
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text(json.dumps(CONFIGS[name]))
        shapes = torch_shapes(name, CONFIGS[name])
        layout = {key: (shape, np.dtype(np.float16)) for key, shape in shapes.items()}
        write_safetensors(directory / name / f"{COMPONENTS[name].weights}.safetensors", layout, random_tensors(shapes))
        if folder := COMPONENTS[name].tokenizer:
            (directory / folder).mkdir()
            (directory / folder / "tokenizer_config.json").write_text("{}")
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD3.scheduler))
    index = {name: entry for name, entry in SD3.model_index.items() if name not in CONFIGS or name in components}
    (directory / "model_index.json").write_text(json.dumps(index))


def drop_cache(directory: Path) -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in directory.rglob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Seconds until the command's output is on the disk, and what it printed."""
    start = time.perf_counter()
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    os.sync()
    return time.perf_counter() - start, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--without-t5", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    components = [name for name in CONFIGS if not (options.without_t5 and name == "text_encoder_3")]
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=options.scratch))
    source, copy, converted = work / "source", work / "copy", work / "converted"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    table = Table("run", "cp, s", "convert, s", "convert / cp", "peak resident, GiB")
    try:
        make_checkpoint(source, components)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        for run in range(1, options.repeats + 1):
            drop_cache(source)
            copying, _ = timed(["cp", "-r", str(source), str(copy)])
            shutil.rmtree(copy)
            drop_cache(source)
            command = [sys.executable, "-c", MEASURED, "checkpoint", str(source), str(converted)]
            converting, printed = timed(command, environment)
            shutil.rmtree(converted)
            peak = int(printed.split()[-1]) / 2**20
            table.add_row(str(run), f"{copying:.1f}", f"{converting:.1f}", f"{converting / copying:.2f}", f"{peak:.2f}")
    finally:
        shutil.rmtree(work)
    table.title = f"SD3-medium, {size / 1e9:.2f} GB, both cold and synced; at most {TIME_LIMIT} x and {PEAK_LIMIT} GiB"
    Console().print(table)


if __name__ == "__main__":
    main()
