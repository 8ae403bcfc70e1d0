"""The small language in which a family states the shapes of its factors.

`"out r"` is a matrix: the first axis is `out`, the last name takes all axes that remain, multiplied. Trainers write the
same factor as `(out, r)`, `(out, r, 1)` or `(out, r, 1, 1)`, and a convolution's `(r, in, 3, 3)` is the matrix
`(r, in·9)`: read so, linear layers and convolutions of any dimension are one case. A vector is a matrix of one column.
`"r r *k"` ends in a kernel: two plain axes, then any number of kernel axes, kept apart. `""` is one number. `one` and
`two` are axes of that size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from lib_locon.errors import ShapeError

_LITERAL = {"one": 1, "two": 2}


def axes(spec: str) -> tuple[list[str], bool]:
    """The axis names of `spec`, and whether a kernel (`*k`) follows them."""
    names = spec.split()
    if names and names[-1].startswith("*"):
        return names[:-1], True
    return names, False


def fold(spec: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The size of each name of `spec` in a tensor of this shape; the kernel, if any, as one product at the end."""
    names, kernel = axes(spec)
    plain = len(names) if kernel else len(names) - 1
    return (*shape[:plain], prod(shape[plain:]))


def bind(specs: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes by axis name (`{"out": 320, "r": 8, "n": 2880}`), and `"*k"` → the product of the kernel axes.

    `specs` and `shapes` are keyed by file suffix. Raises ShapeError where a factor has too few axes, a zero-size axis,
    or one name would need two sizes.
    """
    sizes: dict[str, int] = {}
    for suffix, shape in shapes.items():
        names, kernel = axes(specs[suffix])
        least = len(names) if kernel else max(len(names) - 1, min(len(names), 1))
        if len(shape) < least or 0 in shape or (not names and not kernel and prod(shape) != 1):
            wanted = ", ".join(names) or "one number"
            raise ShapeError(f"{suffix} has the shape {shape}, where ({wanted}) is needed")
        for name, size in zip([*names, *(["*k"] if kernel else [])], fold(specs[suffix], shape), strict=False):
            if sizes.setdefault(name, _LITERAL.get(name, size)) != size:
                raise ShapeError(f"{suffix} has the shape {shape}: its axis {name} is {size}, elsewhere {sizes[name]}")
    return sizes
