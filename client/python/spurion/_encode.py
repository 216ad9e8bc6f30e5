"""Packs rollouts for the tap by hand, because a trainer waits for it: several times quicker than filling messages. The bytes are those of
spurion.proto (tests compare them with protobuf's). Texts are encoded one by one; the token ids of a whole batch in one go, four bytes each:
lists of Python's integers through array, which reads them two to four times as quickly as numpy and struct do."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from . import _messages as m
from ._rollout import _KNOWN, FIELDS, FORMS, Rollout, ids_of
from .errors import InvalidArgument

_RARE = ("group_size", "messages", "text_form")
_SMALL = [bytes([i]) for i in range(128)]
_UINT32 = next(c for c in "IL" if array(c).itemsize == 4)
_ALIKE = [{np.dtype(t)} for t in (np.int32, np.int64, np.uint32, np.uint64)]


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


def _narrow(ids: np.ndarray) -> bytes:
    """An array's ids as 32-bit integers in this machine's order; a number that does not fit becomes one that is refused afterwards."""
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise InvalidArgument(f"expected integers in one dimension, found {ids.dtype} of shape {ids.shape}")
    narrow = ids.astype(np.uint32)
    if not np.array_equal(narrow, ids):
        _refuse(ids.tolist())
    return narrow.tobytes()


def _refuse(ids: Iterable[Any], why: Exception | None = None) -> NoReturn:
    """Says which of the ids is none."""
    wrong: Any = next((i for i in ids if not hasattr(i, "__index__") or not 0 <= i.__index__() <= 0x7FFFFFFF), None)
    wrong = wrong.__index__() if hasattr(wrong, "__index__") else wrong
    wanted = "token ids from 0 on" if isinstance(wrong, int) and wrong < 0 else "integers of 32 bits"
    raise InvalidArgument(f"expected {wanted}, found {wrong!r}") from why


def _joined(lists: list[Any]) -> np.ndarray:
    """The ids of all lists, one after another. Raises InvalidArgument where there is none."""
    kinds = {x.dtype if isinstance(x, np.ndarray) and x.ndim == 1 and x.flags.c_contiguous else type(x) for x in lists}
    if kinds in _ALIKE:  # nothing to be done with each array; negative numbers are too large unsigned ones
        return np.frombuffer(b"".join(lists), f"u{kinds.pop().itemsize}")
    out = array(_UINT32)
    add = out.fromlist
    for x in lists:
        if isinstance(x, np.ndarray):
            out.frombytes(_narrow(x))
            continue
        try:
            add(x if type(x) is list else list(x))
        except (OverflowError, TypeError) as e:
            _refuse(x, e)
    return np.frombuffer(out, np.uint32)


def _ids_packed(lists: list[Any]) -> list[bytes]:
    """Each list's ids in four bytes each, with their length before them."""
    joined = _joined(lists)
    if joined.size and joined.max() > 0x7FFFFFFF:
        _refuse(next(x for x in lists for i in map(int, x) if not 0 <= i <= 0x7FFFFFFF))
    data = joined.astype("<u4", copy=False).tobytes()
    at, out = 0, []
    for x in lists:
        end = at + 4 * len(x)
        out.append(varint(end - at) + data[at:end])
        at = end
    return out


def _ids(value: Any, key: str) -> Any:
    """A list or an array of ids; tensors on the CPU as arrays."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return value
    ids = ids_of(value, key)
    return np.asarray(value) if hasattr(value, "__array__") else ids


def _mapping(r: Any, run: str) -> Mapping[str, Any]:
    """A rollout's fields by name, once they are known ones and the run is this one."""
    named: Mapping[str, Any] = r if isinstance(r, Mapping) else {k: getattr(r, k) for k in FIELDS}
    if not named.keys() <= _KNOWN:
        raise InvalidArgument(f"expected the fields {', '.join(FIELDS)}, found {', '.join(sorted(set(named) - _KNOWN))}")
    if named.get("run") not in (None, run):
        raise InvalidArgument(f"expected rollouts of run {run!r}, found one of {named.get('run')!r}")
    return named


def _rare(r: Mapping[str, Any]) -> list[bytes]:
    """The pieces of fields that few rollouts have."""
    parts: list[bytes] = []
    if value := r.get("group_size"):
        parts += (b"\x60", varint(value))
    if (value := r.get("messages")) is not None:
        data = json.dumps(list(value), ensure_ascii=False).encode()
        parts += (b"\x6a", varint(len(data)), data)
    if (value := r.get("text_form")) not in (None, "plain"):
        if value not in FORMS:
            raise InvalidArgument(f"text_form: expected {', '.join(FORMS)}, found {value!r}")
        parts += (b"\x70", varint(FORMS.index(value)))
    return parts


def _pack(r: Mapping[str, Any], head: bytes, lists: list[Any], places: list[tuple[list[bytes], int]]) -> list[bytes]:
    """A rollout as pieces, after head (run, step and group). Where token ids belong stands an empty piece; lists and places get the ids, and where."""
    get = r.get
    name = str(get("id", "0")).encode()
    parts = [head, b"\x22", varint(len(name)), name]
    if value := get("attempt"):
        parts += (b"\x28", varint(value))
    for tag, key in ((b"\x32", "prompt"), (b"\x3a", "completion")):
        if (value := get(key)) is not None:
            data = value.encode("utf-8", "surrogatepass")
            parts += (tag, varint(len(data)), data)
    if (value := get("trainer_reward")) is not None:
        parts += (b"\x55", np.float32(value).tobytes())
    if (value := get("tags")) is not None:
        data = json.dumps(value, ensure_ascii=False).encode()
        parts += (b"\x5a", varint(len(data)), data)
    if not r.keys().isdisjoint(_RARE):
        parts += _rare(r)
    for tag, key in ((b"\x7a", "prompt_ids"), (b"\x82\x01", "completion_ids")):  # prompt_ids_fixed, completion_ids_fixed
        if (value := get(key)) is not None and len(value := value if type(value) is list else _ids(value, key)):
            places.append((parts, len(parts) + 1))
            lists.append(value)
            parts += (tag, b"")
    return parts


def _explain(number: int, r: Any, e: Exception) -> InvalidArgument:
    """What was wrong with a rollout, and with which."""
    name = r.get("id", "0") if isinstance(r, Mapping) else getattr(r, "id", "0")
    return InvalidArgument(f"rollout {number} (id {str(name)!r}): {e.text if isinstance(e, InvalidArgument) else f'{type(e).__name__}: {e}'}")


def _check_ids(items: list[Any]) -> None:
    """Finds the ids that could not be packed, and says in which rollout and field they are."""
    for number, r in enumerate(items):
        for key in ("prompt_ids", "completion_ids"):
            value = r.get(key) if isinstance(r, Mapping) else getattr(r, key)
            try:
                if value is not None:
                    _ids_packed([_ids(value, key)])
            except InvalidArgument as e:
                raise _explain(number, r, InvalidArgument(f"{key}: {e.text}")) from e


def rollouts(items: Iterable[Rollout | Mapping[str, Any]], run: bytes) -> list[bytes]:
    """Every rollout packed, as a Rollout of run. Raises InvalidArgument where one is malformed or of another run, and says which."""
    items = list(items)
    run_field, run_text = b"\x0a" + varint(len(run)) + run, run.decode()
    step, group, head = None, None, b""
    out: list[list[bytes]] = []
    lists: list[Any] = []
    places: list[tuple[list[bytes], int]] = []
    try:
        for r in items:
            x = _mapping(r, run_text)
            if (s := x.get("step", 0)) is not step or x.get("group", "0") is not group or not head:
                step, group = s, x.get("group", "0")
                name = str(group).encode()
                head = run_field + b"\x10" + varint(step) + b"\x1a" + varint(len(name)) + name
            out.append(_pack(x, head, lists, places))
    except (InvalidArgument, TypeError, ValueError, AttributeError) as e:
        raise _explain(len(out), r, e) from e
    try:
        packed = _ids_packed(lists) if lists else ()
    except InvalidArgument:
        _check_ids(items)
        raise
    for (parts, place), data in zip(places, packed):
        parts[place] = data
    return [b"".join(parts) for parts in out]


def without_fixed_ids(tap: bytes) -> bytes:
    """A Tap message for a daemon that has not said that it takes ids of four bytes: the same one with varints."""
    out = m.Tap.FromString(tap)
    for r in out.rollouts:
        for old, fixed in ((r.prompt_ids, r.prompt_ids_fixed), (r.completion_ids, r.completion_ids_fixed)):
            old.extend(fixed)
            del fixed[:]
    return bytes(out.SerializeToString())


def tap(run: bytes, producer: bytes, epoch: int, sequence: int, packed: list[bytes], step_end: int | None) -> bytes:
    """A Tap message."""
    parts = [b"\x0a", varint(len(run)), run, b"\x12", varint(len(producer)), producer, b"\x18", varint(epoch), b"\x20", varint(sequence)]
    for data in packed:
        parts += (b"\x2a", varint(len(data)), data)
    if step_end is not None:
        parts += (b"\x30", varint(step_end))
    return b"".join(parts)
