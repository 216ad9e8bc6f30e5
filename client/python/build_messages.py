"""Writes spurion/_descriptor.py: the messages of proto/spurion.proto as a serialized descriptor set. Run by setup.py and by CMake.

    python3 build_messages.py OUT.py [PROTO]

A descriptor instead of protoc's generated module: it works with every protobuf runtime from 3.20 on, whatever the compiler's version.
Compilers that are tried: $PROTOC, protoc, protoc-c (Debian's protobuf-c-compiler), grpcio-tools.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD = '"""Generated from proto/spurion.proto by build_messages.py. Do not edit."""\n\n'


def find_proto() -> Path:
    """The file in the source tree, or the copy that a source distribution carries."""
    for path in (HERE.parents[1] / "proto" / "spurion.proto", HERE / "spurion.proto"):
        if path.is_file():
            return path
    raise SystemExit(f"build_messages: expected proto/spurion.proto two folders above {HERE}, or a copy in it; found neither")


def compile_set(proto: Path) -> bytes:
    """The FileDescriptorSet of proto, packed."""
    tried = []
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "set")
        options = [f"--proto_path={proto.parent}", f"--descriptor_set_out={out}", str(proto)]
        for name in filter(None, (os.environ.get("PROTOC"), "protoc", "protoc-c")):
            tried.append(name)
            if shutil.which(name):
                subprocess.run([name, *options], check=True)
                return Path(out).read_bytes()
        try:
            from grpc_tools import protoc
        except ImportError:
            raise SystemExit(f"build_messages: expected a protobuf compiler ({', '.join(tried)}, or the package grpcio-tools), found none") from None
        if protoc.main(["protoc", *options]) != 0:
            raise SystemExit("build_messages: grpcio-tools could not compile the messages")
        return Path(out).read_bytes()


def write(out: Path, proto: Path | None = None) -> None:
    """Writes the module."""
    data = compile_set(proto or find_proto())
    rows = "".join(f"    {data[i:i + 48]!r}\n" for i in range(0, len(data), 48))
    text = f"{HEAD}DESCRIPTOR_SET = (\n{rows})\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="ascii")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
