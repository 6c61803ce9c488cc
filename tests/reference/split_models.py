"""Small models split over devices, beside the same on one: python -m tests.reference.split_models LAYOUT ...

One JSON line for each layout and model: the largest error of its output and of each gradient, of the largest entry.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.clip import CLIPText, CLIPTextConfig
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.lora import IMAGE_ATTENTION, TEXT_ATTENTION, LoRA, LoRAConfig, add_lora
from seg4diff_jax.models.sd3.block import modulate
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.stacked_layers import take_layer
from seg4diff_jax.models.t5 import T5Config, T5Encoder
from seg4diff_jax.parallel import BATCH, make_mesh, parameter_shardings
from seg4diff_jax.training.state import take_apart

BATCH_SIZE, TOKENS, WIDTH, HEADS = 8, 8, 64, 8
MMDIT = MMDiTConfig.from_json(
    {"num_layers": 4, "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "sample_size": 8}
    | {"caption_projection_dim": WIDTH, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
    | {"pos_embed_max_size": 8}
)
ADAPTERS = LoRAConfig(rank=2, alpha=4, targets=(*IMAGE_ATTENTION, *TEXT_ATTENTION))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Case(NamedTuple):
    model: nnx.Module
    trained: Any
    output: Callable
    inputs: tuple[np.ndarray, ...]


def mmdit(trained: Any, *, remat: bool) -> Case:
    model = add_lora(MMDiT(MMDIT, rngs=nnx.Rngs(0)), ADAPTERS, nnx.Rngs(1))
    drawn = jax.tree.map(lambda leaf: jnp.asarray(draw(*leaf.shape) / 10), nnx.state(model, LoRA))
    nnx.update(model, drawn)  # B is not zero: neither is any gradient

    def output(model: MMDiT, latents, timesteps, context, pooled):
        velocity, records = model(
            latents,
            timesteps,
            TextConditioning(context, pooled, segments=(("clip", context.shape[1]),)),
            capture=(2,),
            options=ForwardOptions(remat=remat),
        )
        return velocity, records[2].scores, records[2].probs

    inputs = draw(BATCH_SIZE, 8, 8, 16), 500 + 100 * draw(BATCH_SIZE), draw(BATCH_SIZE, TOKENS, WIDTH)
    return Case(model, trained, output, (*inputs, draw(BATCH_SIZE, WIDTH)))


class Models(nnx.Module):
    def __init__(self, mmdit: nnx.Module, clip: CLIPText, t5: T5Encoder):
        self.mmdit, self.clip, self.t5 = mmdit, clip, t5


def layers() -> Case:
    """Single layers, asked for results and for gradients of what enters them that are split over `tensor`."""
    over_tensor = lambda part: jax.lax.with_sharding_constraint(part, P(*BATCH, *[None] * (part.ndim - 2), "tensor"))

    def results(model: Models, x, conditioning):
        block, clip, t5 = (
            take_layer(stack, 0) for stack in (model.mmdit.stacks[0], model.clip.blocks, model.t5.blocks)
        )
        heads = x.reshape(*x.shape[:2], HEADS, -1)
        modulated = modulate(x, conditioning, conditioning)
        return (
            block.image.attention.merge(heads),
            block.text.attention.merge(heads),
            block.text.mlp(modulated),
            *jax.tree.leaves(block.text.attention.qkv(modulated)),
            *block.image.modulations(conditioning),
            clip(x),
            t5(x, model.t5.relative_bias(TOKENS)),
            model.mmdit.patch_velocity(x, conditioning),
        )

    def output(model: Models, x, conditioning):
        def asked(x, conditioning):
            found = results(model, x, conditioning)
            return sum(jnp.square(part).sum() for part in found), found

        (_, found), gradients = jax.value_and_grad(asked, argnums=(0, 1), has_aux=True)(x, conditioning)
        return [over_tensor(part) for part in (*found, *gradients)]

    model = Models(mmdit(LoRA, remat=False).model, clip(), t5())
    return Case(model, LoRA, output, (draw(BATCH_SIZE, TOKENS, WIDTH), draw(BATCH_SIZE, WIDTH)))


def clip() -> CLIPText:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS}
    texts = {"vocab_size": 32, "max_position_embeddings": TOKENS, "eos_token_id": 31, "projection_dim": WIDTH}
    return CLIPText(CLIPTextConfig(num_hidden_layers=2, **sizes, **texts), rngs=nnx.Rngs(0))


def t5() -> T5Encoder:
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": HEADS}
    return T5Encoder(T5Config(vocab_size=32, **sizes), rngs=nnx.Rngs(0))


def encoder(model: nnx.Module) -> Case:
    ids = np.random.default_rng(0).integers(0, 32, (BATCH_SIZE, TOKENS)).astype(np.int32)
    return Case(model, nnx.Param, lambda model, ids: jax.tree.leaves(model(ids)), (ids,))


def cases() -> Iterator[tuple[str, Case]]:
    yield "layers", layers()
    yield "mmdit", mmdit(nnx.Any(nnx.Param, LoRA), remat=False)
    yield "adapters", mmdit(LoRA, remat=False)
    yield "adapters, blocks computed again", mmdit(LoRA, remat=True)
    yield "clip", encoder(clip())
    yield "t5", encoder(t5())


def computed(case: Case, mesh: Mesh) -> Any:
    """Output, and the gradient of every parameter that is trained, on a mesh."""
    structure, *parts = take_apart(case.model, case.trained)
    place = parameter_shardings(mesh)
    put = lambda part: {name: jax.device_put(array, place(name, array.shape)) for name, array in part.items()}
    trainable, frozen = map(put, parts)
    inputs = jax.device_put(case.inputs, NamedSharding(mesh, BATCH))

    def loss(trainable: dict, frozen: dict, *inputs):
        found = case.output(structure.model(trainable, frozen), *inputs)
        return sum(jnp.square(part.astype(jnp.float32) - 1).sum() for part in found), found

    with jax.set_mesh(mesh):
        (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, frozen, *inputs)
    return jax.device_get((list(found), gradient))


def error(found: Any, expected: Any) -> float:
    """Of outputs and of gradients, each relative to its largest entry.

    What is zero but for rounding, as a gradient of keys' biases is, counts as a thousandth of the largest of its kind.
    """
    largest = lambda array: float(np.abs(array).max())

    def of_part(found: Any, expected: Any) -> float:
        floor = max(map(largest, jax.tree.leaves(expected))) / 1000
        relative = lambda a, b: largest(a - b) / max(largest(b), floor)
        return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))

    return max(map(of_part, found, expected))


if __name__ == "__main__":
    for name, case in cases():
        alone = computed(case, make_mesh(1, among=jax.devices()[:1]))
        for layout in sys.argv[1:]:
            found = computed(case, make_mesh(*map(int, layout.split("x"))))
            print(json.dumps({"model": name, "layout": layout, "error": error(found, alone)}), flush=True)
