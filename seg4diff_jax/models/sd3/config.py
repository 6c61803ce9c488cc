"""Configuration of SD3's transformers, and the stacks that their different kinds of blocks form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seg4diff_jax.models.stacked_layers import LayerStack


def _is_integer(value: Any) -> bool:
    """Whether a JSON value is an integer. Python counts true and false as integers; here they are not."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class MMDiTConfig:
    """The configuration of an MM-DiT, with diffusers' names and defaults."""

    num_layers: int = 18
    num_attention_heads: int = 18
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2
    sample_size: int = 128
    pos_embed_max_size: int = 96
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    qk_norm: bool = False
    dual_attention_layers: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> MMDiTConfig:
        """Reads a diffusers `transformer/config.json`. Raises ValueError for a variant that is not implemented."""
        if (kind := config.get("_class_name", "SD3Transformer2DModel")) != "SD3Transformer2DModel":
            raise ValueError(f"_class_name is {kind!r:.80}; 'SD3Transformer2DModel' is implemented")
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        norm = known.pop("qk_norm", None)
        if norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {norm!r:.80}; null or 'rms_norm' is implemented")
        if known.get("out_channels") is None:
            known["out_channels"] = known.get("in_channels", cls.in_channels)
        layers = known.get("dual_attention_layers") or ()
        if not isinstance(layers, list | tuple) or not all(_is_integer(layer) for layer in layers):
            raise ValueError(f"dual_attention_layers is {layers!r:.80}; expected a list of integers")
        known["dual_attention_layers"] = tuple(layers)
        if not known.get("pos_embed_max_size", cls.pos_embed_max_size):
            raise ValueError("pos_embed_max_size is missing; SD3's positional table is cropped from one of that size")
        for name, value in known.items():
            if name != "dual_attention_layers" and (not _is_integer(value) or value < 1):
                raise ValueError(f"{name} is {value!r:.80}; expected a positive integer")
        parsed = cls(**known, qk_norm=norm is not None)
        if len(set(layers)) < len(layers) or not all(0 <= layer < parsed.num_layers for layer in layers):
            raise ValueError(
                f"dual_attention_layers is {layers!r:.80}; expected numbers of its {parsed.num_layers} layers, each "
                "once"
            )
        if parsed.caption_projection_dim != parsed.width:
            raise ValueError(
                f"caption_projection_dim is {parsed.caption_projection_dim}; it must equal num_attention_heads x "
                f"attention_head_dim = {parsed.width}, since both streams attend together"
            )
        return parsed

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def layer_stacks(self, depth: int | None = None) -> tuple[LayerStack, ...]:
        """Groups the first `depth` blocks into stacks of one kind: dual attention, joint attention only, last block."""
        kinds = [(i in self.dual_attention_layers, i == self.num_layers - 1) for i in range(self.num_layers)][:depth]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        stops = [*starts[1:], len(kinds)]
        return tuple(LayerStack(f"stacks.{n}", "blocks", *run) for n, run in enumerate(zip(starts, stops, strict=True)))
