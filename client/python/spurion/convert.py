"""Rewrites pickled checkpoints as safetensors, so that the daemon never unpickles: ``python -m spurion.convert PATH``.

PATH is a ``.pt``, ``.pth`` or ``.bin`` file, or a directory of such files. For each a safetensors file of the same stem is written beside
it, with the same tensor names, every tensor contiguous. Loading is torch's ``weights_only=True``: nothing in the file is run.
A ``.gguf`` file becomes a checkpoint directory of the same stem beside it (gguf_weights.py).
Needs torch; for GGUF also the package gguf. Exit status: 0 done, 1 something could not be converted, 64 wrong usage.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

SUFFIXES = (".pt", ".pth", ".bin")
GGUF = ".gguf"
# What trainers leave beside the weights: no tensors of a model.
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "trainer_state", "rng_state", "random_states")
WRAPPERS = ("state_dict", "model_state_dict", "sae")


class ConvertError(Exception):
    """A file that cannot be converted; the text says what was expected and found."""


def _dtype_names(torch: Any) -> dict[str, Any]:
    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
        "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "uint16": "U16", "uint32": "U32", "uint64": "U64",
        "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    }
    return {getattr(torch, name): code for name, code in names.items() if hasattr(torch, name)}


def write_safetensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Writes tensors (name to torch tensor) as one safetensors file, by way of a temporary file and a rename.

    Order and padding as the safetensors library writes them: descending element size, then name; a header of a multiple of 8 bytes.
    """
    import torch

    names = _dtype_names(torch)
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise ConvertError(f"{name}: expected a dtype that safetensors has, found {tensor.dtype}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(len(text).to_bytes(8, "little"))
            out.write(text)
            for name in order:
                # a copy of its own: strides and shared storages end here
                tensor = tensors[name].detach().to("cpu").contiguous()
                size = tensor.numel() * tensor.element_size()
                if size:
                    out.write((ctypes.c_char * size).from_address(tensor.data_ptr()))
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _scale_biases(tensors: dict[str, Any], factor: float) -> dict[str, Any]:
    """Features in raw units, as the library's scale_biases does at the end of training: every bias, and thresholds from 0 on, times
    the factor; the -1 of a threshold that was never set stays."""
    biases = {"bias", "encoder.bias", "decoder.bias", "decoder_bias", "gate_bias", "mag_bias", "b_enc", "b_dec"}
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name in biases or (name == "threshold" and tensor.dim() > 0):
            out[name] = tensor * factor
        elif name == "threshold" and float(tensor) >= 0:
            out[name] = tensor * factor
    return out


def flatten(loaded: Any, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of what torch.load gave: a state dict, one wrapped in `state_dict`, or a backup of dictionary_learning
    ({"step", "ae", "optimizer", "config", "norm_factor"}, which holds unscaled biases)."""
    import torch

    metadata: dict[str, str] = {}
    if not isinstance(loaded, dict):
        raise ConvertError(f"{where}: expected a dict of tensors, found {type(loaded).__name__}")
    if isinstance(loaded.get("ae"), dict):
        tensors = dict(loaded["ae"])
        factor = loaded.get("norm_factor")
        if factor is not None:
            factor = float(factor)
            if not factor > 0:
                raise ConvertError(f"{where}: norm_factor: expected a number above 0, found {factor}")
            tensors = _scale_biases(tensors, factor)
            metadata["norm_factor"] = json.dumps(factor)
    else:
        wrapper = next((key for key in WRAPPERS if isinstance(loaded.get(key), dict)), None)
        tensors = dict(loaded[wrapper]) if wrapper else dict(loaded)
    out = {}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized:
                raise ConvertError(f"{where}: {name}: expected a dense tensor, found {value.layout}")
            out[str(name)] = value
        else:
            try:
                metadata[str(name)] = json.dumps(value)
            except TypeError:
                raise ConvertError(f"{where}: {name}: expected a tensor, a number, a text or a list of these, found "
                                   f"{type(value).__name__}") from None
    if not out:
        raise ConvertError(f"{where}: expected tensors, found none (keys: {', '.join(map(str, list(loaded)[:8]))})")
    return out, metadata


def convert_file(path: Path, force: bool = False) -> Path | None:
    """Converts one file; gives the path written, or None when it is there already."""
    import torch

    target = path.with_suffix(".safetensors")
    if target.exists() and not force:
        return None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes for a broken or refused file
        raise ConvertError(f"{path}: expected a checkpoint of tensors, found: {str(error).splitlines()[0] if str(error) else error!r}") from error
    tensors, metadata = flatten(loaded, str(path))
    write_safetensors(target, tensors, metadata)
    return target


def convert_index(path: Path, force: bool = False) -> Path | None:
    """pytorch_model.bin.index.json names the shards; its twin names the converted ones."""
    target = path.with_name(path.name.replace(".bin.index.json", ".safetensors.index.json"))
    if target.exists() and not force:
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"] = {name: str(Path(file).with_suffix(".safetensors")) for name, file in index["weight_map"].items()}
    target.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def sources(path: Path) -> list[Path]:
    """The pickles and GGUF files at a path, in the order of their names."""
    endings = (*SUFFIXES, GGUF)
    if path.is_file():
        if path.suffix not in endings:
            raise ConvertError(f"{path}: expected a file ending in {', '.join(endings)}, found {path.suffix or 'no ending'}")
        return [path]
    if not path.is_dir():
        raise ConvertError(f"{path}: expected a file or directory, found nothing")
    found = sorted(p for p in path.iterdir() if p.suffix in endings and p.is_file() and not p.name.startswith(NOT_WEIGHTS))
    if not found:
        raise ConvertError(f"{path}: expected files ending in {', '.join(endings)}, found none")
    return found


def _report(source: Path, target: Path | None) -> None:
    if target is None:
        print(f"{source}: converted before; --force writes it anew", file=sys.stderr)
    else:
        print(target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="spurion-convert", description="Rewrites .pt, .pth and .bin checkpoints as safetensors beside them, and .gguf files as checkpoint directories.")
    parser.add_argument("path", type=Path, help="a file, or a directory of files")
    parser.add_argument("--force", action="store_true", help="write files that are there already anew")
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="for .gguf: the splitting of a byte-level vocabulary, where the file does not say it")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return 64 if stop.code == 2 else int(stop.code or 0)
    try:
        import torch  # noqa: F401
    except ImportError:
        print("spurion-convert: expected the Python package torch, found none: pip install torch", file=sys.stderr)
        return 1
    failed = False
    try:
        files = sources(arguments.path)
    except ConvertError as error:
        print(f"spurion-convert: {error}", file=sys.stderr)
        return 1
    for source in files:
        try:
            if source.suffix == GGUF:
                from .gguf_weights import convert_gguf

                _report(source, convert_gguf(source, arguments.force, arguments.pre_tokenizer))
            else:
                _report(source, convert_file(source, arguments.force))
        except (ConvertError, OSError) as error:
            print(f"spurion-convert: {error}", file=sys.stderr)
            failed = True
    index = arguments.path / "pytorch_model.bin.index.json" if arguments.path.is_dir() else None
    if index is not None and index.exists() and not failed:
        _report(index, convert_index(index, arguments.force))
    return int(failed)


if __name__ == "__main__":
    from spurion.convert import main as run  # under its own name, so that its errors are one class everywhere

    sys.exit(run())
