"""What a plan counts: operations of traced programs, and what compiled ones move, beside a brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

from seg4diff_jax.models.attention import ForwardOptions
from seg4diff_jax.models.conditioning import TextConditioning
from seg4diff_jax.models.flops import mmdit_flops
from seg4diff_jax.models.kernels import Kernel, attend
from seg4diff_jax.models.lora import LoRA, LoRAConfig, add_lora
from seg4diff_jax.models.sd3.config import MMDiTConfig
from seg4diff_jax.models.sd3.model import MMDiT
from seg4diff_jax.models.trunk import attention_at
from seg4diff_jax.parallel import AXES
from seg4diff_jax.planning.arithmetic import operations
from seg4diff_jax.planning.checkpoints import TRANSFORMERS
from seg4diff_jax.planning.hlo import Collective, Program

# ---- operations -----------------------------------------------------------------------------------------------------


def abstract_inputs(latents: tuple[int, ...], context: tuple[int, int], pooled: int) -> tuple:
    """Of one image."""
    shape = lambda *sides: jax.ShapeDtypeStruct((1, *sides), jnp.float32)
    text = TextConditioning(shape(*context), shape(pooled), segments=(("clip", min(77, context[0])),))
    return shape(*latents), shape(), text


@pytest.mark.parametrize(("name", "whole"), [("sd3-medium", 8.437), ("sd3.5-medium", 10.783), ("sd3.5-large", 29.597)])
def test_a_traced_forward_pass_has_the_published_models_operations(name, whole):
    config = MMDiTConfig.from_json(TRANSFORMERS[name])
    model = nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))
    inputs = abstract_inputs((128, 128, 16), (154, 4096), 2048)
    # One chunk, which is not made: the default's many are rounded up.
    options = ForwardOptions(kernel=Kernel("xla", 4250))
    traced = jax.make_jaxpr(lambda model, inputs: model(*inputs, options=options))(model, inputs)
    assert operations(traced) == mmdit_flops(config, 4096, 154)
    assert operations(traced) / 1e12 == pytest.approx(whole, abs=5e-4)


def test_a_scanned_program_has_the_operations_of_the_unrolled_one():
    weights, x, one = jnp.ones((5, 64, 64)), jnp.ones((32, 64)), 2 * 32 * 64 * 64
    step = lambda x, w: (jnp.tanh(x @ w), None)
    scanned = jax.grad(lambda weights, x: jax.lax.scan(jax.checkpoint(step), x, weights)[0].sum())
    assert operations(jax.make_jaxpr(scanned)(weights, x)) == (5 + 5 + 2 * 5) * one  # forward, again, two products back
    unrolled = jax.grad(lambda weights, x: [x := step(x, w)[0] for w in weights][-1].sum())
    products = operations(jax.make_jaxpr(unrolled)(weights, x))
    assert products == (5 + 2 * 5 - 1) * one  # of the first layer's input there is no gradient
    counted = jax.jit(unrolled).lower(weights, x).compile().cost_analysis()
    assert counted is not None
    assert products <= counted["flops"] < 1.05 * products


def test_convolutions_are_divided_over_what_has_pictures_of_its_own():
    x, kernel = jnp.ones((8, 16, 16, 4)), jnp.ones((3, 3, 4, 8))
    convolve = lambda x: jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    whole = operations(jax.make_jaxpr(convolve)(x))
    assert whole == 2 * 8 * 16 * 16 * 8 * 3 * 3 * 4
    assert operations(jax.make_jaxpr(convolve)(x), chips=8, shares=4) == whole / 4


def test_a_kernels_operations_count_its_padded_tiles_and_are_those_of_each_chip():
    q = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)  # 300 tokens are three tiles of 128
    program = lambda q: attend(q, q, q, kernel=Kernel("splash"))[0]
    whole = operations(jax.make_jaxpr(program)(q))
    assert whole == 2 * 4 * 4 * 384 * 384 * 64
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)):
        assert operations(jax.make_jaxpr(program)(q), chips=4) == whole / 4


@pytest.mark.parametrize(
    ("precision", "dtype", "times"), [("highest", "float32", 6), (None, "float32", 1), ("highest", "bfloat16", 1)]
)
def test_fp32_at_the_highest_precision_counts_as_often_as_a_tpu_multiplies(precision, dtype, times):
    x = jax.ShapeDtypeStruct((8, 8), dtype)
    with jax.default_matmul_precision(precision):
        program = jax.make_jaxpr(lambda x: jax.lax.map(lambda row: row @ x, x[None]))(x)
    assert operations(program) == 2 * 8**3
    assert operations(program, passes=6) == times * 2 * 8**3


def test_a_loop_of_unknown_length_must_hold_no_products():
    endless = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)
    with pytest.raises(ValueError, match="loop of unknown length"):
        operations(jax.make_jaxpr(endless)(jnp.ones((2, 2))))


@pytest.mark.parametrize("remat", [False, True, jax.checkpoint_policies.dots_with_no_batch_dims_saveable])
def test_the_backward_pass_is_handed_no_copy_of_the_weights_and_no_whole_scores(remat):
    widths = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 24,
    }
    config = MMDiTConfig(**widths, num_layers=6, pooled_projection_dim=20, pos_embed_max_size=8, sample_size=8)
    model = nnx.eval_shape(lambda: add_lora(MMDiT(config, rngs=nnx.Rngs(0)), LoRAConfig(rank=2), nnx.Rngs(0)))
    graph, adapters, base = nnx.split(model, LoRA, ...)
    inputs = abstract_inputs((8, 8, 16), (5, 24), 20)

    def whole(model, options):
        velocity, records = model(*inputs, capture=(3,), options=options)
        return (velocity**2).mean() + records[3].scores.mean()

    def part(model, options):
        return attention_at(model, *inputs, block=3, options=options).scores.mean()

    def text(loss, remat):
        options = ForwardOptions(kernel=Kernel("xla", query_chunk=7), remat=remat)
        run = lambda adapters, base: loss(nnx.merge(graph, adapters, base), options)
        return str(jax.make_jaxpr(jax.grad(run))(adapters, base))

    inputs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
    copy = "f32[3,32,128]"  # of the MLPs of blocks 0 to 2, which are part of a stack of five
    assert copy in text(part, jax.checkpoint_policies.everything_saveable)
    assert copy not in text(part, remat)
    for loss, blocks in ((whole, 5), (part, 3)):
        assert "f32[1,2,7,21]" in text(loss, remat), "scores of a chunk of the queries"
        assert f"f32[{blocks},3,1,2,7,21]" not in text(loss, remat), "of all chunks of these blocks"


# ---- a compiled program's text --------------------------------------------------------------------------------------

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%fused (param_0.1: f32[6,4,4], param_1.1: s32[]) -> f32[1,4,4] {
  %param_0.1 = f32[6,4,4]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  ROOT %dynamic-slice.1 = f32[1,4,4]{2,1,0} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,4,4}
}

%begin (param_0.2: f32[1,4,4]) -> (f32[1,4,4], f32[1,16,4], u32[]) {
  %param_0.2 = f32[1,4,4]{2,1,0} parameter(0)
  %all-gather.1 = f32[1,16,4]{2,1,0} all-gather(%param_0.2), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %start = (f32[1,4,4]{2,1,0}, f32[1,16,4]{2,1,0}, u32[]{:S(2)}) custom-call(%all-gather.1)
}

%end (param_0.3: f32[1,4,4]) -> f32[1,16,4] {
  %param_0.3 = f32[1,4,4]{2,1,0} parameter(0)
  ROOT %all-gather.2 = f32[1,16,4]{2,1,0} all-gather(%param_0.3), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%condition (state: (s32[], f32[6,4,4])) -> pred[] {
  %end = s32[] constant(6)
  %state = (s32[], f32[6,4,4]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%counter, %end), direction=LT
}

%body (arg: (s32[], f32[6,4,4])) -> (s32[], f32[6,4,4]) {
  %arg = (s32[], f32[6,4,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = f32[6,4,4]{2,1,0} get-tuple-element(%arg), index=1
  %slice = f32[1,4,4]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %gather-start = (f32[1,4,4]{2,1,0}, f32[1,16,4]{2,1,0}) all-gather-start(%slice), replica_groups=[2,4]<=[8]
  %gather-done = f32[1,16,4]{2,1,0} all-gather-done(%gather-start)
  %begun = (f32[1,4,4]{2,1,0}, f32[1,16,4]{2,1,0}, u32[]{:S(2)}) fusion(%slice), kind=kCustom, calls=%begin
  %half = f32[1,4,4]{2,1,0} get-tuple-element(%begun), index=0
  %ended = f32[1,16,4]{2,1,0} fusion(%half), kind=kCustom, calls=%end
  ROOT %out = (s32[], f32[6,4,4]{2,1,0}) tuple(%i, %w)
}

ENTRY %main (x: bf16[10,10], w: f32[6,4,4]) -> f32[8] {
  %x = bf16[10,10]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = f32[6,4,4]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %in = (s32[], f32[6,4,4]{2,1,0}) tuple(%zero, %w.1)
  %while = (s32[], f32[6,4,4]{2,1,0}) while(%in), condition=%condition, body=%body
  %near = bf16[10,10]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %sum = bf16[10,10]{1,0} all-reduce(%near), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %cut = f32[8]{0} custom-call(%sum), custom_call_target="x"
}
"""


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    program = Program.parse(TEXT)
    # Each of four chips holds 64 bytes of what twice in six turns becomes 256; two chips sum 200 bytes.
    assert program.collectives() == [
        Collective("all-gather", 12, 12 * 3 * 64.0),
        Collective("all-reduce", 1, 2 * 0.5 * 200.0),
    ]


def test_traffic_is_what_operations_read_and_write_outside_of_the_chips_own_memory():
    slice_, gather = 64 + 64 + 4, 64 + 256
    copy, reduce, cut = 200, 400, 200 + 32
    assert Program.parse(TEXT).traffic() == 6 * (slice_ + 2 * gather) + copy + reduce + cut


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        Program.parse("HloModule nothing\n")
