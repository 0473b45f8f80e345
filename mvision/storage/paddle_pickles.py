"""Reading arrays from a file of PaddlePaddle (``.pdparams``) without running any code that is in it.

``paddle.save`` writes a pickle of NumPy arrays by name, of protocol 2 to 4. A pickle is a program: its instructions can
call any function of any package. Of those instructions the ones of which such files consist are carried out here, and
the functions that they name are recognised, never called: numbers, texts, lists, dictionaries and arrays of numbers can
come out, and nothing else. Python's own unpickler is not used, as it takes memory for what a file merely claims.
"""

from __future__ import annotations

import math
import mmap
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from mvision.errors import UserError

MAX_INSTRUCTIONS = 2_000_000
"""Of the pickle; an array takes 40, so that a model of 10,000 tensors takes 400,000."""
MAX_AXES = 16
PARAMETERS = "StructuredToParameterName@@"
"""The key under which Paddle keeps the names that parameters have in a program."""

# Functions and classes that Paddle's files name, with NumPy 1 and 2 and with Python 2's names in protocol 2.
_NAMES = {
    "numpy.core.multiarray._reconstruct": "array",
    "numpy._core.multiarray._reconstruct": "array",
    "numpy.ndarray": "class",
    "numpy.dtype": "dtype",
    "_codecs.encode": "bytes",
    "collections.OrderedDict": "dictionary",
    "builtins.tuple": "tuple",
    "__builtin__.tuple": "tuple",
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KINDS = {"f2", "f4", "f8", "u1", "u2", "i1", "i2", "i4", "i8", "b1"}
"""Codes of numbers; Paddle, which has no unsigned numbers of 16 bits, writes bfloat16 as ``u2``."""


class _Refused(Exception):
    """The file has something in it that arrays do not need; the text says what."""


class _Named:
    """Stands for a function or class of ``_NAMES``; cannot be called."""

    def __init__(self, meaning: str) -> None:
        self.meaning = meaning


class _Kind:
    """Stands for the type of an array's numbers."""

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or code not in _KINDS:
            found = repr(printable(code)) if isinstance(code, str) else "something else"
            raise _Refused(f"an array in it is of {found}, and only arrays of numbers are read")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Take over the byte order."""
        _, order, *structure = state
        if order not in ("<", ">", "|", "=") or any(part is not None for part in structure[:3]):
            raise _Refused("an array in it is not of single numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for an array, until its numbers are there."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Take over shape and numbers: both have to be in the file."""
        _, shape, kind, by_columns, data = state
        if not isinstance(kind, _Kind) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise _Refused("an array in it has something else than numbers")
        if len(shape) > MAX_AXES or any(type(side) is not int or side < 0 for side in shape):
            raise ValueError("the shape of an array is none")
        if math.prod(shape) * kind.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {list(shape)[:8]} has {len(data):,} bytes")
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if by_columns else "C")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of ``paddle.save`` by name: of a state dict, or of one under the key ``model``.

    Raises:
        UserError: not such a file, damaged, or something in it that is no array of numbers.
    """
    try:
        content = _read(path)
    except _Refused as error:
        raise UserError(f"weights {path}: {error}; the file is not read") from error
    except OSError as error:
        raise UserError(f"weights {path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError) as error:
        reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
        raise UserError(
            f"weights {path}: damaged, or not copied or downloaded to the end: no whole file of paddle.save ({reason})"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise UserError(f"weights {path}: holds a {type(content).__name__}, not arrays by their names")
    arrays = {name: _array(value, name, path) for name, value in content.items() if name != PARAMETERS}
    if not arrays:
        raise UserError(f"weights {path}: there are no arrays in it")
    total, size = sum(array.nbytes for array in arrays.values()), path.stat().st_size
    if total > 2 * size:  # several names can share their numbers
        raise UserError(f"weights {path}: its arrays claim more than the {size:,} bytes of the file")
    return arrays


def printable(text: Any, length: int = 100) -> str:
    """A text from a file for one line of a message: its beginning, with control characters written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[:length])


def _array(value: Any, name: str, path: Path) -> np.ndarray:
    """The array of an entry; parameters inside other things than a state dict are pairs of a name and an array."""
    if not name.isprintable():
        raise UserError(f"weights {path}: the name {printable(name)!r} has control characters in it")
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    if not isinstance(value, _Array):
        raise UserError(f"weights {path}: {printable(name)!r} is a {type(value).__name__}, not an array")
    if value.value is None:
        raise UserError(f"weights {path}: damaged: the array {printable(name)!r} has no numbers")
    return value.value


def _read(path: Path) -> Any:
    """What the program of a file leaves."""
    with path.open("rb") as file:
        start = file.read(4)
        if start[:2] == b"PK":
            raise _Refused("it is a zip archive and not a file of paddle.save; files of torch.save end with .pth")
        if len(start) < 2 or start[0] != 0x80 or start[1] not in (2, 3, 4):
            found = "it is empty" if not start else "it is no pickle of protocol 2 to 4"
            raise _Refused(f"not a file of paddle.save, or damaged ({found})")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Program().run(content)


class _Program:
    """A pickle's stack, the places in it from which lists of things begin, and what is kept by number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: mmap.mmap) -> Any:
        """Carry out all instructions."""
        # It asks for the reading methods of a file, which a map has too; a map never gives more bytes than there are.
        instructions = pickletools.genops(content)  # type: ignore[arg-type]
        for count, (instruction, value, _) in enumerate(instructions):
            name = instruction.name
            if name == "STOP":
                return self.stack.pop()
            if count > MAX_INSTRUCTIONS:
                raise _Refused(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
            if name in _VALUES:
                self.stack.append(value)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif not self._structure(name) and not self._memory(name, value):
                self._call(name, value)
        raise ValueError("its end is missing")

    def _structure(self, name: str) -> bool:
        """Carry out an instruction that makes or fills a container; False if it is none."""
        stack = self.stack
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("TUPLE", *_TUPLES):
            stack.append(tuple(self._take(_TUPLES.get(name))))
        elif name in ("APPEND", "APPENDS"):
            items = self._take(1 if name == "APPEND" else None)
            self._last(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._take(2 if name == "SETITEM" else None)
            keys = items[::2]
            if not all(isinstance(key, str) for key in keys):
                raise _Refused("a dictionary in it has keys that are no texts")
            self._last(dict).update(zip(keys, items[1::2], strict=True))
        else:
            return False
        return True

    def _memory(self, name: str, value: Any) -> bool:
        """Carry out an instruction that keeps a thing or repeats it; False if it is none."""
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[value])
        else:
            return name in ("PROTO", "FRAME")
        return True

    def _call(self, name: str, value: Any) -> None:
        """Carry out an instruction that names or calls a function, or fills what one made; refuse every other one."""
        if name in ("GLOBAL", "STACK_GLOBAL"):
            called = value.replace(" ", ".") if name == "GLOBAL" else ".".join(self._take(2))
            if called not in _NAMES:
                raise _Refused(f"it would run code when opened ({printable(called)})")
            self.stack.append(_Named(_NAMES[called]))
        elif name == "REDUCE":
            function, arguments = self._take(2)
            self.stack.append(_result(function, arguments))
        elif name == "BUILD":
            (state,) = self._take(1)
            if not isinstance(self.stack[-1], _Kind | _Array):
                raise _Refused("its pickle changes things that are no arrays")
            self.stack[-1].build(state)
        elif name == "INST":
            raise _Refused(f"it would run code when opened ({printable(value).replace(' ', '.')})")
        else:
            raise _Refused(f"its pickle has more in it than arrays of numbers ({name})")

    def _take(self, count: int | None) -> list[Any]:
        """Remove the last things of the stack; None: those since the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if not 0 <= start <= len(self.stack) or (self.marks and start < self.marks[-1]):
            raise ValueError("its pickle takes things that are not there")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"its pickle fills something that is no {kind.__name__}")
        return self.stack[-1]


def _result(function: Any, arguments: Any) -> Any:
    """What stands for the result of a function of ``_NAMES`` that is called as Paddle's files do."""
    meaning = function.meaning if isinstance(function, _Named) else ""
    if not isinstance(arguments, tuple):
        raise ValueError("its pickle calls something without arguments")
    if meaning == "array" and isinstance(arguments[0], _Named) and arguments[0].meaning == "class":
        return _Array()
    if meaning == "dtype":
        return _Kind(arguments[0])
    if meaning == "dictionary" and not arguments:
        return {}
    if meaning == "bytes" and len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    if meaning == "tuple" and len(arguments) == 1 and isinstance(arguments[0], tuple):
        return arguments[0]
    raise _Refused("its pickle calls something in another way than files of Paddle do")
