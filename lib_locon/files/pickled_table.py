"""The table of tensors in a pickle that `torch.save` wrote, without running it.

A pickle is a program for a small machine, and its power lies in calling whatever function it names. This machine knows
the thirty instructions that a table of tensors is made of, and calls nothing: where torch's program names a function,
a description is put down of what that function would have built. Anything else raises ValueError.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import torch

from lib_locon.files.reader import DTYPES, is_shape, shown

_STORAGES: dict[str, torch.dtype] = {
    f"torch {name}Storage": getattr(torch, attribute)
    for name, attribute in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
        "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
    }.items()
}  # fmt: skip
_BYTES = "torch.storage UntypedStorage"
_DTYPES = {str(dtype).replace(".", " "): dtype for dtype in DTYPES.values()}
_DICTIONARY = "collections OrderedDict"
_TENSOR, _TENSOR_OF_BYTES = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"
_PARAMETER = "torch._utils _rebuild_parameter"
_GLOBALS = frozenset({_DICTIONARY, _TENSOR, _TENSOR_OF_BYTES, _PARAMETER, _BYTES, *_STORAGES, *_DTYPES})


class NotOnlyTensors(ValueError):
    """A program of something else than tensors; says what."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the program describes it: `part` of the archive holds its numbers; `offset` and `strides` count them.

    Its numbers lie between `offset` and `last`, both of which are in the part's first `held` numbers.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    part: str
    held: int

    @property
    def nbytes(self) -> int:
        """Of all its numbers, be they the same ones in the file."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def last(self) -> int:
        """The place of its last number."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class _Global:
    """Something that the program names and is not given."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype | None
    part: str
    length: int


def read_table(program: bytes) -> object:
    """Build the program's result, of plain Python values and StoredTensors. Raises ValueError."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name not in _INSTRUCTIONS:
                raise NotOnlyTensors(f"the instruction {opcode.name}")
            _INSTRUCTIONS[opcode.name](machine, argument)
        (result,) = machine.stack
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it takes what it has not put down") from error
    return result


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def since_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items


def _protocol(machine: _Machine, version: int) -> None:
    if version != 2:
        raise NotOnlyTensors("the instruction PROTO")


def _put(machine: _Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]


def _tuple(machine: _Machine, count: int | None) -> None:
    machine.stack.append(tuple(machine.since_mark()) if count is None else machine.last(count))


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise TypeError
    target += items


def _set(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict:
        raise TypeError
    for key, value in zip(islice(items, 0, None, 2), islice(items, 1, None, 2), strict=True):
        if not isinstance(key, (str, int, float, type(None))):  # Python takes the hash of deep tuples off the C stack
            raise NotOnlyTensors(f"a key that is a {type(key).__name__}")
        target[key] = value


def _global(machine: _Machine, name: str) -> None:
    if name not in _GLOBALS:
        raise NotOnlyTensors(shown(name))
    machine.stack.append(_Global(name))


def _build(machine: _Machine, _: None) -> None:
    """Attributes, such as those of a `state_dict()`; they are no tensors."""
    machine.stack.pop()
    if type(machine.stack[-1]) is not dict:
        raise TypeError


def _storage(machine: _Machine, _: None) -> None:
    kind, named, part, _place, length = machine.stack.pop()
    if kind != "storage" or not isinstance(part, str) or type(length) is not int:
        raise TypeError
    if named.name != _BYTES and named.name not in _STORAGES:
        raise TypeError
    machine.stack.append(_Storage(_STORAGES.get(named.name), part, length))


def _call(machine: _Machine, _: None) -> None:
    function, arguments = machine.last(2)
    name = function.name
    if name == _DICTIONARY and arguments == ():
        machine.stack.append({})
    elif name == _PARAMETER:
        machine.stack.append(arguments[0])
    elif name in (_TENSOR, _TENSOR_OF_BYTES):
        machine.stack.append(_tensor(name, *arguments))
    else:
        raise TypeError


def _tensor(name: str, storage: _Storage, offset: int, shape: Any, strides: Any, *more: Any) -> StoredTensor:
    """Describe a tensor. `more` is about gradients, the dtype where the storage has none, and conjugates."""
    more = more[2:]
    dtype, length = storage.dtype, storage.length
    if name == _TENSOR_OF_BYTES:
        dtype, more = _DTYPES[more[0].name], more[1:]
        length //= dtype.itemsize if storage.dtype is None else 1
    if any(more):
        raise ValueError("a tensor is the conjugate or the negative of another")
    if dtype is None or type(offset) is not int or offset < 0:
        raise TypeError
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise TypeError
    if not is_shape(shape) or not all(type(stride) is int and 0 <= stride < 2**63 for stride in strides):
        raise ValueError("a tensor has a negative or broken shape")
    found = StoredTensor(dtype, shape, strides, offset, storage.part, length)
    if 0 not in shape and found.last >= length:
        raise ValueError("a tensor is larger than its storage")
    return found


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


def _value(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _protocol,
    "STOP": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "GLOBAL": _global,
    "REDUCE": _call,
    "BUILD": _build,
    "BINPERSID": _storage,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _value),
    "SETITEM": lambda machine, _: _set(machine, list(machine.last(2))),
    "SETITEMS": lambda machine, _: _set(machine, machine.since_mark()),
    "APPEND": lambda machine, _: _append(machine, list(machine.last(1))),
    "APPENDS": lambda machine, _: _append(machine, machine.since_mark()),
    "TUPLE": lambda machine, _: _tuple(machine, None),
    "TUPLE1": lambda machine, _: _tuple(machine, 1),
    "TUPLE2": lambda machine, _: _tuple(machine, 2),
    "TUPLE3": lambda machine, _: _tuple(machine, 3),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, place: machine.stack.append(machine.memo[place])),
}
