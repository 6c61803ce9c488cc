"""TPU programs compile ahead of time for a described topology, on a machine without a TPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.reference.processes import as_users_compile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)

PROGRAM = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from seg4diff_jax.analysis.block_statistics import StatisticsReader
from seg4diff_jax.analysis.principal_components import ComponentsReader
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.attention import AttentionRequest, ForwardOptions
from seg4diff_jax.models.kernels import Kernel
from seg4diff_jax.models.sd3.model import MMDiT, MMDiTConfig
from seg4diff_jax.models.trunk import attention_at
from seg4diff_jax.parallel import AXES, parameter_shardings
from seg4diff_jax.models.perturbation import Blur, Perturbation
from seg4diff_jax.sampling import GeneratingRun, Looking, sample_looking

devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
config = MMDiTConfig(num_layers=6, num_attention_heads=8, attention_head_dim=64, caption_projection_dim=512,
                     joint_attention_dim=256, pooled_projection_dim=128, pos_embed_max_size=64, qk_norm=True,
                     dual_attention_layers=(0, 1))
model = nnx.eval_shape(lambda: MMDiT(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
sharding = parameter_shardings(mesh)
graph, state = nnx.split(model)
flat = []
for path, variable in nnx.to_flat_state(state):
    leaf = variable.get_value()
    flat.append((path, variable.replace(place(leaf, sharding(".".join(map(str, path)), leaf.shape)))))
model = nnx.merge(graph, nnx.from_flat_state(flat))
row = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
texts = TextConditioning(row(4, 154, 256), row(4, 128), segments=(("clip", 77), ("t5", 77)))
inputs = dict(latents=row(4, 64, 64, 16), timesteps=row(4), conditioning=texts)
kernel = Kernel("splash")
everything = AttentionRequest(quadrants=("image_to_text", "text_to_image"), mean_heads=True)


def masks(model, inputs, members):
    return attention_at(model, **inputs, block=2, options=ForwardOptions(everything, kernel))


def loss(model, inputs):
    velocity, records = model(**inputs, capture=(3,), options=ForwardOptions(kernel=kernel, remat=True))
    return (velocity.astype(jnp.float32) ** 2).mean() + records[3].scores.mean() + jnp.log(records[3].probs).mean()


def analysis(model, inputs, members):
    run = GeneratingRun(inputs["latents"], inputs["conditioning"], jnp.array([1.0, 0.5]))
    run = run.with_perturbation(Perturbation((2, 4), Blur(), steps=(1,)), model.depth, 2.0)
    looking = Looking((3,), (1,))
    _, statistics = sample_looking(model, run, StatisticsReader(members), looking=looking, kernel=kernel)
    _, components = model(**inputs, capture=range(6), options=ForwardOptions(ComponentsReader(), kernel))
    return statistics, components


def training(model, inputs, members):
    return jax.grad(loss)(model, inputs)


found = {}
with jax.set_mesh(mesh):
    for name, function in {"masks": masks, "training": training, "analysis": analysis}.items():
        compiled = jax.jit(function).lower(model, inputs, row(4, 3, 154)).compile()
        memory = compiled.memory_analysis()
        found[name] = {"kernels": compiled.as_text().count("tpu_custom_call"), "temp": memory.temp_size_in_bytes}
print(json.dumps(found))
"""


def test_capture_its_gradient_and_the_analysis_of_blocks_compile_for_a_sharded_tpu_mesh():
    # Other processes may have the wheel loaded too: nothing here touches a chip.
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = os.environ | as_users_compile() | settings  # libtpu ends where it meets a flag that it does not know
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["masks"]["kernels"] >= 3
    assert found["training"]["kernels"] > found["masks"]["kernels"]
    # 1178 tokens, 2 images and 4 heads on a chip: one array of tokens x tokens would be 44 MB in fp32.
    assert found["masks"]["temp"] < 40e6
    assert found["analysis"]["kernels"] >= 2
