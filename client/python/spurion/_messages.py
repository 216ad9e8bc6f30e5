"""Message classes of spurion.proto, in a descriptor pool of their own: they meet no other package's messages."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ._descriptor import DESCRIPTOR_SET


def _load() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    files = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR_SET)
    for file in files.file:
        pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    get: Any = getattr(message_factory, "GetMessageClass", None)
    if get is None:  # protobuf before 4.22
        get = getattr(message_factory.MessageFactory(pool), "GetPrototype")  # noqa: B009: types of newer versions know it no more
    return {m.name: get(pool.FindMessageTypeByName(f"{file.package}.{m.name}")) for file in files.file for m in file.message_type}


_classes = _load()


def __getattr__(name: str) -> Any:
    try:
        return _classes[name]
    except KeyError:
        raise AttributeError(f"spurion.proto: expected a message of it, found {name}") from None
