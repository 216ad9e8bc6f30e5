"""Packs rollouts for the tap by hand, because a trainer waits for it: several times quicker than filling messages. The bytes are those of
spurion.proto (tests compare them with protobuf's). Texts are encoded one by one; the token ids of a whole batch in one go with numpy."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from ._rollout import _KNOWN, FIELDS, FORMS, Rollout, ids_of
from .errors import InvalidArgument

_SMALL = [bytes([i]) for i in range(128)]
_TEXTS = ((b"\x32", "prompt"), (b"\x3a", "completion"))
_ALIKE = [{np.dtype(t)} for t in (np.int32, np.int64, np.uint32, np.uint64)]
_IDS = ((b"\x42", "prompt_ids"), (b"\x4a", "completion_ids"))


def varint(n: int) -> bytes:
    """A number as base-128 varint; negative ones as 64-bit two's complement."""
    if 0 <= n < 128:
        return _SMALL[n]
    n &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _array(ids: Any) -> Any:
    """Ids as a buffer of 32-bit integers. Lists go through struct, which reads Python's integers twice as quickly as numpy does."""
    if not isinstance(ids, np.ndarray):
        try:
            return struct.pack(f"{len(ids)}I", *ids)
        except struct.error as e:
            _refuse(next((i for i in ids if not hasattr(i, "__index__") or not 0 <= i.__index__() < 1 << 32), None), e)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise InvalidArgument(f"ids: expected integers in one dimension, found {ids.dtype} of shape {ids.shape}")
    narrow = ids.astype(np.uint32)
    if not np.array_equal(narrow, ids):
        _refuse(next(i for i in ids.tolist() if not 0 <= i < 1 << 32))
    return narrow


def _refuse(wrong: Any, why: Exception | None = None) -> NoReturn:
    negative = hasattr(wrong, "__index__") and wrong.__index__() < 0
    raise InvalidArgument(f"ids: expected {'token ids from 0 on' if negative else 'integers of 32 bits'}, found {wrong!r}") from why


def _varints(x: np.ndarray, highest: int) -> tuple[bytes, int]:
    """Numbers as varints of one length, and that length: short ones are filled up with continued zeros, which every reader of varints takes.
    So no number has to be looked at by itself."""
    if highest < 1 << 28:  # four bytes: bits 7 on go up by one place, bits 14 on by two; adding a field to itself moves it up by one
        out = x & np.uint32(0xFFFC000)
        out *= np.uint32(3)
        out += x
        out += out & np.uint32(0x3F803F80)
        out |= np.uint32(0x808080)
        return out.astype("<u4", copy=False).tobytes(), 4
    grid = np.empty((x.size, 5), np.uint8)
    for k in range(5):
        grid[:, k] = x >> np.uint32(7 * k) | np.uint32(128 if k < 4 else 0)
    return grid.tobytes(), 5


def _ids_packed(lists: list[Any]) -> list[bytes]:
    """Each list's ids as packed varints."""
    dtypes = {x.dtype if isinstance(x, np.ndarray) and x.ndim == 1 and x.flags.c_contiguous else None for x in lists}
    if dtypes in _ALIKE:  # nothing to be done with each array; negative numbers are too large unsigned ones
        joined = np.frombuffer(b"".join(lists), f"u{dtypes.pop().itemsize}")
    else:
        joined = np.frombuffer(b"".join([_array(x) for x in lists]), np.uint32)
    highest = int(joined.max()) if joined.size else 0
    if highest > 0x7FFFFFFF:
        _refuse(next(i for x in lists for i in map(int, x) if not 0 <= i <= 0x7FFFFFFF))
    data, size = _varints(joined.astype(np.uint32, copy=False), highest)
    at, out = 0, []
    for x in lists:
        end = at + len(x) * size
        out.append(data[at:end])
        at = end
    return out


def _ids(value: Any, key: str) -> Any:
    """A list or an array of ids; tensors on the CPU as arrays."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return value
    ids = ids_of(value, key)
    return np.asarray(value) if hasattr(value, "__array__") else ids


def rollouts(items: Iterable[Rollout | Mapping[str, Any]], run: bytes) -> list[bytes]:
    """Every rollout packed, as a Rollout of run. Raises InvalidArgument where one is malformed or of another run."""
    run_field, run_text = b"\x0a" + varint(len(run)) + run, run.decode()
    out: list[list[bytes]] = []
    lists: list[Any] = []
    places: list[tuple[int, int]] = []
    for number, r in enumerate(items):
        if not isinstance(r, dict):
            r = dict(r) if isinstance(r, Mapping) else {k: getattr(r, k) for k in FIELDS}
        if not r.keys() <= _KNOWN:
            raise InvalidArgument(f"rollout: expected the fields {', '.join(FIELDS)}, found {', '.join(sorted(set(r) - _KNOWN))}")
        get = r.get
        if get("run") not in (None, run_text):
            raise InvalidArgument(f"publish: expected rollouts of run {run_text!r}, found one of {get('run')!r}")
        group, name = str(get("group", "0")).encode(), str(get("id", "0")).encode()
        parts = [run_field, b"\x10", varint(get("step", 0)), b"\x1a", varint(len(group)), group, b"\x22", varint(len(name)), name]
        if value := get("attempt"):
            parts += (b"\x28", varint(value))
        for tag, key in _TEXTS:
            if (value := get(key)) is not None:
                data = value.encode("utf-8", "surrogatepass")
                parts += (tag, varint(len(data)), data)
        for tag, key in _IDS:
            if (value := get(key)) is not None and len(value := _ids(value, key)):
                parts += (tag, b"", b"")
                places.append((number, len(parts)))
                lists.append(value)
        if (value := get("trainer_reward")) is not None:
            parts += (b"\x55", np.float32(value).tobytes())
        if (value := get("tags")) is not None:
            data = json.dumps(value, ensure_ascii=False).encode()
            parts += (b"\x5a", varint(len(data)), data)
        if value := get("group_size"):
            parts += (b"\x60", varint(value))
        if (value := get("messages")) is not None:
            data = json.dumps(list(value), ensure_ascii=False).encode()
            parts += (b"\x6a", varint(len(data)), data)
        if (value := get("text_form")) not in (None, "plain"):
            if value not in FORMS:
                raise InvalidArgument(f"text_form: expected {', '.join(FORMS)}, found {value!r}")
            parts += (b"\x70", varint(FORMS.index(value)))
        out.append(parts)
    for (number, end), data in zip(places, _ids_packed(lists) if lists else ()):
        out[number][end - 2:end] = [varint(len(data)), data]
    return [b"".join(parts) for parts in out]


def tap(run: bytes, producer: bytes, epoch: int, sequence: int, packed: list[bytes], step_end: int | None) -> bytes:
    """A Tap message."""
    parts = [b"\x0a", varint(len(run)), run, b"\x12", varint(len(producer)), producer, b"\x18", varint(epoch), b"\x20", varint(sequence)]
    for data in packed:
        parts += (b"\x2a", varint(len(data)), data)
    if step_end is not None:
        parts += (b"\x30", varint(step_end))
    return b"".join(parts)
