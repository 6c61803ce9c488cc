"""Name tables: rows of (PyTorch's name, our name or names, change of layout), checked for completeness both ways.

Our names are per layer (`blocks.7.image.mlp.up.kernel`), whether or not the model stacks its layers. In a pattern `{i}`
and `{j}` stand for a number. `{rest}` stands for anything, in rows whose tensors are left out. A fused PyTorch tensor
may fill several of our parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from flax import nnx

from seg4diff_jax.convert.errors import listed
from seg4diff_jax.convert.foreign_names import recognise, recognise_prefix
from seg4diff_jax.convert.layout import is_weight
from seg4diff_jax.convert.sources.quantised import INSTEAD
from seg4diff_jax.models.stacked_layers import Layered, layer_parameters

Shape = tuple[int, ...]


class NameTableError(ValueError):
    """A checkpoint and a model do not match; the message lists the differences, a bounded number of them."""


@dataclass(frozen=True)
class Transform:
    """A reversible change of layout from one PyTorch tensor to one or more of our arrays."""

    to_jax: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_torch: Callable[[Sequence[np.ndarray]], np.ndarray]

    def shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Returns the shapes after `to_jax`, without allocating arrays of these sizes."""
        return tuple(array.shape for array in self.to_jax(np.broadcast_to(np.float32(0), shape)))

    def split(self, parts: int) -> Transform:
        """Returns the transform of a tensor that fuses `parts` tensors of this layout along PyTorch's first axis."""

        def to_jax(tensor: np.ndarray) -> tuple[np.ndarray, ...]:
            if tensor.shape[0] % parts:
                return (tensor,)
            return tuple(self.to_jax(piece)[0] for piece in np.split(tensor, parts))

        def to_torch(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return np.concatenate([self.to_torch([array]) for array in arrays])

        return Transform(to_jax, to_torch)


def _one(to_jax: Callable[[np.ndarray], np.ndarray], to_torch: Callable[[np.ndarray], np.ndarray]) -> Transform:
    return Transform(lambda tensor: (to_jax(tensor),), lambda arrays: to_torch(arrays[0]))


def _swap_halves(tensor: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(tensor, 2)[::-1]) if tensor.shape[0] % 2 == 0 else tensor


COPY = _one(lambda x: x, lambda x: x)
"""No change: biases, norm scales, embeddings."""
LINEAR = _one(lambda x: x.T, lambda x: x.T)
"""[out, in] to [in, out]."""
CONV = _one(
    lambda x: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x,
    lambda x: x.transpose(3, 2, 0, 1),
)
"""[out, in, height, width] to [height, width, in, out]."""
CONV_AS_LINEAR = _one(lambda x: x.reshape(x.shape[:2]).T if x.ndim == 4 else x.T, lambda x: x.T[:, :, None, None])
"""A 1 x 1 convolution that we hold as a linear layer."""
SWAPPED_LINEAR = _one(lambda x: _swap_halves(x).T, lambda x: _swap_halves(x.T))
"""The weight of a modulation whose shift and scale come in the other order."""
SWAPPED = _one(_swap_halves, _swap_halves)
"""The bias of a modulation whose shift and scale come in the other order."""


class Rule(NamedTuple):
    """One row of a name table.

    `targets` is one pattern or a tuple of patterns; an empty tuple marks a redundant tensor to leave out. `source` is
    one pattern, or several patterns for names of the same tensor. Of these the first that a checkpoint has is read. If
    the checkpoint has others too, their tensors must hold the same numbers. The first pattern is used for writing.
    """

    source: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    transform: Transform = COPY

    @property
    def source_names(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else self.targets


class Assignment(NamedTuple):
    """One tensor of a particular checkpoint, the parameters that it fills, and the change of layout.

    `again` holds other names under which the checkpoint has the same tensor.
    """

    source: str
    targets: tuple[str, ...]
    transform: Transform
    again: tuple[str, ...] = ()


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(escaped.replace(r"\{rest\}", r".+"))


def parameter_shapes(model: Layered) -> dict[str, Shape]:
    """Returns the shape of every parameter of `model`, which may be abstract, by our per-layer name.

    The shape of a stacked parameter is that of one layer.
    """
    shapes = {path: tuple(variable.get_value().shape) for path, variable in parameters(model).items()}
    places = layer_parameters(model).items()
    return {name: shapes[path] if row is None else shapes[path][1:] for name, (path, row) in places}


def parameters(model: Layered) -> dict[str, nnx.Variable]:
    """Returns the variables of a model by their dotted paths; layers are stacked."""
    return {".".join(map(str, keys)): variable for keys, variable in nnx.to_flat_state(nnx.state(model))}


def assign(
    rules: Iterable[Rule],
    sources: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    what: str = "checkpoint",
    prefix: str = "",
    dtypes: Mapping[str, np.dtype] | None = None,
) -> list[Assignment]:
    """Matches every tensor of a checkpoint with the parameters that it fills, in the checkpoint's order.

    Args:
      what: the checkpoint's name in messages.
      prefix: prefix of every tensor's name in the checkpoint's files. Messages show it; `sources` do not have it.
      dtypes: dtypes of the checkpoint's tensors. If given, tensors that fill parameters must be floating-point.

    Raises NameTableError when a tensor matches no row or several, when a parameter is filled twice or not at all, or
    when a shape or a dtype is wrong. The message is one sentence if the surplus names show the cause. Otherwise it
    lists what is wrong, a bounded number of lines, under the checkpoint's own names.
    """
    rules = list(rules)
    compiled = [(_regex(name), rank, rule) for rule in rules for rank, name in enumerate(rule.source_names)]
    ranked: list[tuple[int, Assignment]] = []
    problems: list[str] = []
    unknown: list[str] = []
    integers: list[str] = []
    for source, shape in sources.items():
        matches = [(found, rank, rule) for regex, rank, rule in compiled if (found := regex.fullmatch(source))]
        if not matches:
            unknown.append(prefix + source)
        if len(matches) != 1:
            kind = (
                f"{len(matches)} rows of the name table match it" if matches else "no tensor of the model has its name"
            )
            problems.append(f"surplus tensor {prefix}{source} {list(shape)}: {kind}")
            continue
        found, rank, rule = matches[0]
        targets = tuple(name.format(**found.groupdict()) for name in rule.target_names)
        if not targets:
            continue
        if not all(name in expected for name in targets):
            problems.append(f"surplus tensor {prefix}{source} {list(shape)}: the configured model has no such part")
            continue
        wanted = tuple(expected[name] for name in targets)
        if rule.transform.shapes(shape) != wanted:
            torch_shape = _torch_shape(rule.transform, wanted)
            problems.append(f"wrong shape of {prefix}{source}: expected {torch_shape}, found {list(shape)}")
        if dtypes is not None and not is_weight(dtypes[source]):
            integers.append(f"{prefix}{source} {list(shape)} {dtypes[source]}")
        ranked.append((rank, Assignment(source, targets, rule.transform)))
    # Of several names for one tensor the lowest rank wins: it comes last here and overwrites the others.
    best = {a.targets: rank for rank, a in sorted(ranked, key=lambda pair: -pair[0])}
    again: dict[tuple[str, ...], tuple[str, ...]] = {}
    for rank, assignment in ranked:
        if rank != best[assignment.targets]:
            again[assignment.targets] = (*again.get(assignment.targets, ()), assignment.source)
    assignments = [a._replace(again=again.get(a.targets, ())) for rank, a in ranked if rank == best[a.targets]]
    filling: dict[str, list[str]] = {}
    for assignment in assignments:
        for target in assignment.targets:
            filling.setdefault(target, []).append(prefix + assignment.source)
    twice = dict.fromkeys(tuple(names) for names in filling.values() if len(names) > 1)
    problems += [f"one tensor under {len(names)} names: {', '.join(names)}" for names in twice]
    problems += _missing(rules, {name: shape for name, shape in expected.items() if name not in filling}, prefix)
    known = recognise(unknown) or (recognise_prefix(unknown) if len(unknown) == len(sources) else None)
    if known:
        raise NameTableError(f"{what} does not match the model: {known}")
    if integers:
        problems.append(f"only floating-point numbers are weights, found {', '.join(listed(integers))}; {INSTEAD}")
    if problems:
        listing = "\n  ".join(listed(problems))
        raise NameTableError(f"{what} does not match the model ({len(problems)} problems):\n  {listing}")
    return assignments


def _missing(rules: Iterable[Rule], unfilled: Mapping[str, Shape], prefix: str) -> list[str]:
    """Returns a message for each parameter that no tensor fills, with PyTorch's name, or ours if no row has one."""
    rows, uncovered = _rows_back(rules, unfilled)
    # A parameter can share its tensor with one that is filled. Then no row is left for it, and only our name is known.
    lines = [
        f"missing tensor {prefix}{row.source} {_torch_shape(row.transform, [unfilled[name] for name in row.targets])}"
        for row in rows
    ]
    return lines + [f"missing tensor for {name} {list(unfilled[name])}" for name in uncovered]


def _torch_shape(transform: Transform, shapes: Iterable[Shape]) -> list[int]:
    return list(transform.to_torch([np.broadcast_to(np.float32(0), shape) for shape in shapes]).shape)


def assign_back(rules: Iterable[Rule], names: Iterable[str]) -> list[Assignment]:
    """Returns the PyTorch tensors that hold our parameters `names`, each parameter exactly once.

    Raises a NameTableError that lists the names that no row covers.
    """
    assignments, left = _rows_back(rules, names)
    if left:
        raise NameTableError("no row of the name table covers:\n  " + "\n  ".join(listed(left)))
    return assignments


def _rows_back(rules: Iterable[Rule], names: Iterable[str]) -> tuple[list[Assignment], list[str]]:
    """Returns the PyTorch tensors that hold our parameters `names`, each once, and the names that no row covers."""
    left = dict.fromkeys(names)
    assignments: list[Assignment] = []
    for rule in rules:
        if not rule.target_names:
            continue
        regex = _regex(rule.target_names[0])
        for found in [found for name in left if (found := regex.fullmatch(name))]:
            numbers = found.groupdict()
            targets = tuple(name.format(**numbers) for name in rule.target_names)
            if all(target in left for target in targets):
                assignments.append(Assignment(rule.source_names[0].format(**numbers), targets, rule.transform))
                for target in targets:
                    del left[target]
    return assignments, list(left)
