"""What a loader takes is bounded by the size of the file it reads: the worst files of each kind that a few lines can make, and the peak of
resident memory of the process that takes or refuses them."""

import functools
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness import ROOT, need_program

MIB = 1 << 20
SIZE = 3 * MIB  # of each file: well above what a process takes by itself, below the smallest limit (4 MiB, config.json)
FACTOR = 40     # at most so many bytes of memory for a byte of file; what it is of is said in docs/checkpoints.md
# A small process that runs the program and writes the peak of its memory: a child of a large one begins with that one's pages.
WATCH = """import os, subprocess, sys
p = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(sys.argv[1], "wb"))
_, status, usage = os.wait4(p.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)"""


def peak(tmp_path, *command) -> tuple[int, float, str]:
    """(exit status, MiB, standard error)"""
    out = subprocess.run([sys.executable, "-S", "-c", WATCH, str(tmp_path / "err"), *map(str, command)], capture_output=True, text=True, check=True,
                         timeout=240, env={**os.environ, "OMP_WAIT_POLICY": "passive"}).stdout.split()
    return int(out[0]), int(out[1]) / 1024, (tmp_path / "err").read_text(errors="replace")


def beside(name: str) -> Path:
    """Another program of the build that SPURIOND is of."""
    return Path(need_program("SPURIOND")).with_name(name)


def filled(make, size: int = SIZE) -> str:
    """make(0) + make(1) + ... up to about the size."""
    length = len(make(1000))
    return "".join(make(n) for n in range(size // length))


@functools.cache
def json_files() -> dict[str, str]:
    """Texts that cost a parser of trees the most: many small values."""
    return {
        "lists": "{\"a\":[" + "[]," * (SIZE // 3) + "[]]}",
        "objects": "{\"a\":[" + "{}," * (SIZE // 3) + "{}]}",
        "depth": "{\"a\":" + "[" * (SIZE // 2) + "]" * (SIZE // 2) + "}",
        "wide": "{\"a\":[" + ("[[[[[[]]]]]]," * (SIZE // 13)) + "[]]}",
        "numbers": "{\"a\":[" + "1," * (SIZE // 2) + "1]}",
        "strings": "{\"a\":[" + "\"\"," * (SIZE // 3) + "\"\"]}",
        "keys": "{" + filled(lambda n: f"\"{n:x}\":1,") + "\"z\":1}",
        "long string": "{\"a\":\"" + "x" * SIZE + "\"}",
        "escapes": "{\"a\":\"" + "\\u0041" * (SIZE // 6) + "\"}",
    }


def added(n: int) -> str:
    return f"{{\"id\":{n + 1},\"content\":\"{n:05x}\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":true,\"special\":true}}"


def header(text: str, data: bytes = b"") -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


@functools.cache
def safetensors_files() -> dict[str, bytes]:
    empty = "{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}"
    return {
        "tensors": header("{" + filled(lambda n: f"\"{n:x}\":{empty},") + f"\"z\":{empty}}}"),
        "notes": header("{\"__metadata__\":{" + filled(lambda n: f"\"{n:x}\":\"\",") + "\"z\":\"\"}}"),
        "long name": header("{\"" + "n" * SIZE + f"\":{empty}}}"),
        "huge shape": header("{\"W_enc\":{\"dtype\":\"F32\",\"shape\":[65536,65536],\"data_offsets\":[0,17179869184]}}", b"x" * SIZE),
        "long header": struct.pack("<Q", 99_000_000) + b"{" + b" " * SIZE,
        "depth": header("[" * SIZE),
    }


def npz(arrays: dict[str, bytes], level: int = 9) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as z:
        for name, data in arrays.items():
            z.writestr(name + ".npy", data)
    return out.getvalue()


def npy(shape: tuple, kind: str = "<f4", data: bytes | None = None) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    count = int(kind[-1])
    for side in shape:
        count *= side
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + (bytes(count) if data is None else data)


@functools.cache
def npz_files() -> dict[str, bytes]:
    d, m = 1024, 65536
    bomb = {"W_enc": npy((d, m)), "W_dec": npy((m, d)), "b_enc": npy((m,)), "b_dec": npy((d,)), "threshold": npy((m,))}  # 512 MiB in 0.5
    return {"zeros": npz(bomb), "members": npz({f"{n:05x}": npy((0,)) for n in range(20000)}, 1),
            "claims": npz({"W_enc": npy((65536, 65536), data=b""), "b_enc": npy((65536,), data=b"")})}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What each program takes with hardly a file at all, MiB."""
    place = tmp_path_factory.mktemp("base")
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(header("{}"))
    (place / "tokenizer.json").write_text("{}")
    (place / "labels.jsonl").write_text("")
    found = {"dump": peak(place, beside("readers_dump"), "model", place, place)[1],
            "tokenize": peak(place, need_program("SPURION_TOKENIZE"), place / "tokenizer.json")[1],
            "labels": peak(place, beside("spurion"), "labels", "import", place / "labels.jsonl", "--checksum", "0" * 64, "--out", place / "out.jsonl")[1]}
    if min(found.values()) > 40:
        pytest.skip(f"built with a sanitizer: the programs take {found} MiB by themselves")
    return found


def check(what: str, size: int, base: float, tmp_path, *command) -> None:
    status, most, error = peak(tmp_path, *command)
    print(f"{what}: {most - base:.1f} MiB above {base:.1f} for a file of {size / MIB:.2f} MiB; status {status} {error[:200]}")
    assert status >= 0, error[-2000:]  # refused or taken, not killed
    assert most - base <= 2 + FACTOR * size / MIB, f"{what}: {most - base:.1f} MiB for {size / MIB:.2f} MiB: {error[:300]}"


@pytest.mark.parametrize("kind", list(json_files()))
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "cfg.json"])
def test_loader_memory_json(kind, file, base, tmp_path):
    text = json_files()[kind]
    (tmp_path / file).write_text(text)
    what = "sae" if file == "cfg.json" else "model"
    if file.endswith("index.json"):
        (tmp_path / "config.json").write_text(json.dumps({
            "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
            "num_attention_heads": 1, "intermediate_size": 8, "max_position_embeddings": 8}))
    check(f"{file} {kind}", len(text), base["dump"], tmp_path, beside("readers_dump"), what, tmp_path, tmp_path)


@pytest.mark.parametrize("kind", [*json_files(), "vocabulary", "merges", "pairs", "added"])
def test_loader_memory_tokenizer(kind, base, tmp_path):
    texts = dict(json_files())
    model = "\"model\":{\"type\":\"BPE\",\"vocab\":{"
    texts["vocabulary"] = "{" + model + filled(lambda n: f"\"{n:x}\":{n},") + "\"z\":99999999},\"merges\":[]}}"
    texts["merges"] = "{" + model + "\"a\":0,\"aa\":1},\"merges\":[" + "\"a a\"," * (SIZE // 6) + "\"a a\"]}}"
    texts["pairs"] = "{" + model + "\"a\":0,\"aa\":1},\"merges\":[" + "[\"a\",\"a\"]," * (SIZE // 10) + "[\"a\",\"a\"]]}}"
    texts["added"] = "{\"added_tokens\":[" + filled(lambda n: added(n) + ",") + added(1) + "]," + model + "\"a\":0},\"merges\":[]}}"
    (tmp_path / "tokenizer.json").write_text(texts[kind])
    check(f"tokenizer.json {kind}", len(texts[kind]), base["tokenize"], tmp_path, need_program("SPURION_TOKENIZE"), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", list(safetensors_files()))
def test_loader_memory_safetensors(kind, base, tmp_path):
    data = safetensors_files()[kind]
    (tmp_path / "sae.safetensors").write_bytes(data)
    check(f"safetensors {kind}", len(data), base["dump"], tmp_path, beside("readers_dump"), "sae", tmp_path / "sae.safetensors", tmp_path,
          "gemma_scope")


@pytest.mark.parametrize("kind", ["zeros", "members", "claims"])
def test_loader_memory_npz(kind, base, tmp_path):
    data = npz_files()[kind]
    (tmp_path / "params.npz").write_bytes(data)
    check(f"npz {kind}", len(data), base["dump"], tmp_path, beside("readers_dump"), "sae", tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["plain", "packed", "one line", "bomb"])
def test_loader_memory_labels(kind, base, tmp_path):
    line = "{\"modelId\":\"m\",\"layer\":\"0-r\",\"index\":\"%d\",\"description\":\"about %d\"}\n"
    data = {"plain": filled(lambda n: line % (n, n)).encode(), "one line": b"{" + b"x" * SIZE, "bomb": gzip.compress(bytes(512 * MIB))}
    data["packed"] = gzip.compress(data["plain"])
    path = tmp_path / ("labels.jsonl.gz" if kind in ("packed", "bomb") else "labels.jsonl")
    path.write_bytes(data[kind])
    check(f"labels {kind}", len(data[kind]), base["labels"], tmp_path, beside("spurion"), "labels", "import", path, "--checksum", "0" * 64, "--out", tmp_path / "out.jsonl")


def test_loader_memory_is_documented():
    assert f"at most {FACTOR} bytes of memory for a byte of JSON" in (ROOT / "docs" / "checkpoints.md").read_text()
