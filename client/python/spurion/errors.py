"""What can go wrong, with the codes of gRPC. Every text says what was expected and found, and names the rollout where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CODES = ("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
         "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS",
         "UNAUTHENTICATED")


def code_name(code: int) -> str:
    """Name of a code of gRPC: 14 is UNAVAILABLE."""
    return CODES[code] if 0 <= code < len(CODES) else f"code {code}"


class SpurionError(Exception):
    """Base of all. code: 0 to 16, gRPC's. retry_after_ms: when to try again, where the daemon said so, else 0."""

    code = 2

    def __init__(self, text: str, code: int | None = None, retry_after_ms: int = 0):
        super().__init__(text)
        self.text = text
        self.code = self.code if code is None else code
        self.retry_after_ms = retry_after_ms

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.code, self.retry_after_ms)

    def __str__(self) -> str:
        return f"{code_name(self.code)}: {self.text}"


class Unavailable(SpurionError):
    """The daemon cannot be reached, is stopping, or its queue is full."""

    code = 14


class Timeout(SpurionError, TimeoutError):
    """No answer in time."""

    code = 4


class ServerBusy(SpurionError):
    """A limit of the daemon: memory in flight, space of its store, the size of a message."""

    code = 8


class InvalidArgument(SpurionError, ValueError):
    """A field out of its bounds."""

    code = 3


class AlreadyExists(SpurionError):
    """Another content stands under this identity: raise `attempt`, or choose another run."""

    code = 6


class NotFound(SpurionError, LookupError):
    """Nothing there."""

    code = 5


class ProtocolError(SpurionError):
    """The peer does not speak spurion.v1, or not this version of it."""

    code = 9


class DataLoss(SpurionError):
    """What was asked for is damaged in the store; or rollouts of the tap were dropped, and the text says how many."""

    code = 15


class RolloutError(SpurionError):
    """Rollouts that could not be judged. refused: (run, step, group, id, code name, reason) of each."""

    code = 3

    def __init__(self, refused: Sequence[tuple[Any, ...]], code: int | None = None, retry_after_ms: int = 0):
        self.refused = list(refused)
        first = self.refused[0]
        more = f"; and {len(self.refused) - 1} more (see .refused)" if len(self.refused) > 1 else ""
        super().__init__(f"rollout {first[0]}/{first[1]}/{first[2]}/{first[3]}: {first[4]}: {first[5]}{more}", code, retry_after_ms)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.refused, self.code, self.retry_after_ms)

    def __str__(self) -> str:
        return self.text


_BY_CODE = {c.code: c for c in (Unavailable, Timeout, ServerBusy, InvalidArgument, AlreadyExists, NotFound, ProtocolError, DataLoss)}
_BY_CODE[11] = InvalidArgument
_BY_CODE[12] = ProtocolError


def error_of(code: int, text: str, retry_after_ms: int = 0) -> SpurionError:
    """The exception for a code of the wire."""
    return _BY_CODE.get(code, SpurionError)(text, code, retry_after_ms)
