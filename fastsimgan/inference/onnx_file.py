"""An exported refiner on disk: its metadata, stamped last, and everything that is checked before it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.inference.graph_format import BRANCHES, NEEDS_ONNX, OPERATORS, check_settings, input_name
from fastsimgan.storage.names import printable

_FORMAT = "fastsimgan.onnx/1"
_KEYS = ("fastsimgan.format", "fastsimgan.facts", "fastsimgan.graph_sha256")

try:
    import onnx
    from google.protobuf.message import DecodeError
except ImportError as error:  # an optional package
    if "onnx" not in str(error) and "google" not in str(error):
        raise
    raise UnavailableError(NEEDS_ONNX) from error


@dataclass(frozen=True)
class OnnxFile:
    """A whole and checked file."""

    path: Path
    data: bytes
    facts: dict[str, Any]
    """``settings`` of the refiner, ``branches`` (`Form`), ``uint8``, and the record of where it comes from."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.facts["settings"]
        return settings

    @property
    def uint8(self) -> bool:
        return bool(self.facts["uint8"])

    @property
    def input_name(self) -> str:
        return input_name(self.uint8, self.settings["histogram"])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All constants of the graph, by name."""
        model = onnx.load_model_from_string(self.data)
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def stamp(model: onnx.ModelProto, facts: dict[str, Any]) -> bytes:
    """Serialise ``model`` with ``facts`` and a checksum of everything else in its metadata."""
    values = (_FORMAT, json.dumps(facts), _graph_sha256(model))
    onnx.helper.set_model_props(model, dict(zip(_KEYS, values, strict=True)))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def read(path: Path) -> OnnxFile:
    """Read and check a file that `export` wrote; nothing of it is run, and no other file is opened.

    Raises:
        InputError: not such a file, altered, with data outside it, with an operator that `export` does not write, or
            with inputs other than its metadata says.
    """
    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise InputError(f"{printable(path)}: not an ONNX file") from error
    try:
        return OnnxFile(path, data, _check(model))
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None


def _check(model: onnx.ModelProto) -> dict[str, Any]:
    # What could reach outside the file or be unknown code comes first, and is named; the checksum catches the rest.
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(f"all data must be inside the file, got tensor {printable(tensor.name)} in another one")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            known = f"{node.domain}.{node.op_type}".lstrip(".")
            raise InputError(f"operators must be those of an exported refiner, got {printable(known)}")
    if model.functions:
        raise InputError("operators must be those of an exported refiner, got functions of its own")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if properties.get(_KEYS[0]) != _FORMAT:
        raise InputError(f"{_KEYS[0]} must be {_FORMAT!r}, got {properties.get(_KEYS[0])!r}")
    found = _graph_sha256(model)
    if properties.get(_KEYS[2]) != found:
        raise InputError(f"graph's sha256 must be {properties.get(_KEYS[2])}, got {found}: the file was altered")
    try:
        facts = json.loads(properties[_KEYS[1]])
        settings = facts["settings"]
        check_settings(settings)
        if facts["branches"] not in BRANCHES:
            raise ValueError(f"branches must be one of {', '.join(BRANCHES)}, got {facts['branches']!r}")
        wanted = ["batch", settings["channels"], "height", "width"]
        name = input_name(bool(facts["uint8"]), settings["histogram"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"metadata must be whole: {type(error).__name__}: {error}") from error
    inputs = [(value.name, _shape(value)) for value in model.graph.input]
    if inputs != [(name, wanted)]:
        raise InputError(f"its one input must be {name} {wanted}, as its metadata says, got {inputs}")
    kind = model.graph.input[0].type.tensor_type.elem_type
    if kind != (onnx.TensorProto.UINT8 if facts["uint8"] else onnx.TensorProto.FLOAT):
        raise InputError(f"input must be {'uint8' if facts['uint8'] else 'float32'}, as its metadata says, got {kind}")
    return dict(facts)


def _graph_sha256(model: onnx.ModelProto) -> str:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of the top graph; operators with graphs inside are refused anyway."""
    yield from model.graph.initializer
    for sparse in model.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
