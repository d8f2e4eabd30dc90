"""R as a TensorRT engine: built from an exported file, kept in a cache, run on torch's CUDA tensors.

`tensorrt` (10.15 to 11) and `tensorrt_rtx` have one interface; the library is a parameter. Networks are strongly typed,
the one form that both major versions take: precision is the file's. Written against the interface; engines have been
built with TensorRT-RTX, none has been run on a GPU yet.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.inference.graph_format import OUTPUT
from fastsimgan.inference.onnx_file import OnnxFile
from fastsimgan.inference.torch_backend import Replay
from fastsimgan.inference.trtexec import Profile
from fastsimgan.storage.atomic import write_atomically
from fastsimgan.storage.names import printable

Library = Literal["tensorrt", "tensorrt-rtx"]
_EXTRA = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
_INPUTS = {"images": "keep", "normalised": "keep", "equalised_and_normalised": "equalise"}  # name -> what comes before


def library(name: Library) -> ModuleType:
    """The module; UnavailableError if it is not there, or is of a version that is not supported."""
    try:
        module = importlib.import_module(name.replace("-", "_"))
    except (ImportError, OSError) as error:
        raise UnavailableError(f"{name} is not installed: pip install 'fastsimgan[{_EXTRA[name]}]'") from error
    version = tuple(int(part) for part in module.__version__.split(".")[:2])
    if name == "tensorrt" and not (10, 15) <= version < (12,):
        raise UnavailableError(f"tensorrt must be at least 10.15 and below 12, got {module.__version__}")
    return module


def build_engine(file: OnnxFile, trt: ModuleType, profile: Profile, *, sm: str | None = None, cache: Any = b"") -> Any:
    """Build a serialised engine, and return it with the timing cache (bytes; empty where the library keeps none).

    Args:
        file: what `onnx_file.read` returned.
        trt: the module `tensorrt` or `tensorrt_rtx`.
        profile: the sizes it is for.
        sm: architecture such as "sm_89" (TensorRT-RTX only, which needs no GPU then); None is the GPU that is here.
        cache: a timing cache of an earlier build with the same library and GPU.

    Raises:
        InputError: the library refuses the file, the sizes or the architecture.
    """
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    if builder is None:
        raise UnavailableError(f"{trt.__name__} cannot build here: {log.last()}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(file.data):
        reason = parser.get_error(0).desc().splitlines()[0] if parser.num_errors else log.last()
        raise InputError(f"{printable(file.path)}: {trt.__name__} {trt.__version__} refuses it: {reason}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # it rounds float32 as float16 would
    if sm is not None:
        known = getattr(getattr(trt, "ComputeCapability", None), sm.upper().replace("_", ""), None)
        if known is None:
            raise InputError(f"sm must be an architecture that {trt.__name__} builds for, such as sm_89, got {sm}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(known, 0)
    channels = file.settings["channels"]
    sizes = [(batch, channels, height, width) for batch, height, width in asdict(profile).values()]
    shapes = builder.create_optimization_profile()
    shapes.set_shape(file.input_name, *sizes)
    config.add_optimization_profile(shapes)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: without it no stream can be captured
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    keeps_timings = trt.__name__ != "tensorrt_rtx"  # which tunes as it runs
    if keeps_timings:
        config.set_timing_cache(config.create_timing_cache(cache), ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise InputError(f"{printable(file.path)}: {trt.__name__} {trt.__version__} cannot build it: {log.last()}")
    return bytes(engine), bytes(config.get_timing_cache().serialize()) if keeps_timings else b""


def cached_engine(
    file: OnnxFile, name: Library, profile: Profile, *, sm: str | None = None, folder: Path | None = None
) -> Path:
    """The path of the engine for this file, library version, GPU and profile: from the cache, or built into it.

    The cache (``~/.cache/fastsimgan/engines``, or ``XDG_CACHE_HOME``) must be its owner's alone: who writes an engine
    decides what runs.
    """
    trt = library(name)
    folder = folder or default_cache()
    _own(folder)
    if sm is None and not torch.cuda.is_available():
        raise UnavailableError(f"an engine is built for the GPU that is here, and there is none ({name})")
    key = {
        "model_sha256": file.sha256,
        "library": f"{name} {trt.__version__}",
        "gpu": sm or _gpu(),
        "profile": [list(size) for size in asdict(profile).values()],
        "for graphs": True,  # engines of TensorRT-RTX from before that cannot be captured
    }
    stem = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{stem}.engine"
    if path.exists():
        record(path, path.read_bytes())  # raises if it is not what was built
        return path
    timing = folder / f"timing-{key['library']}-{key['gpu']}.cache".replace(" ", "-")
    known = timing.read_bytes() if timing.exists() else b""
    engine, known = build_engine(file, trt, profile, sm=sm, cache=known)
    write_atomically(path, engine)
    if known:
        write_atomically(timing, known)
    about = key | {"sha256": hashlib.sha256(engine).hexdigest(), "settings": file.settings}
    write_atomically(path.with_suffix(".json"), (json.dumps(about, indent=2) + "\n").encode())  # last: its commit mark
    return path


def default_cache() -> Path:
    """Where engines are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsimgan" / "engines"


def record(path: Path, engine: bytes) -> dict[str, Any]:
    """What was written down when the engine at ``path``, which holds ``engine``, was built.

    Raises:
        InputError: the folder is open to others, or the engine has no record or is not the one recorded.
    """
    _own(path.parent)
    try:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(path)}: has no record of how it was built: {error}; delete it") from error
    found = hashlib.sha256(engine).hexdigest()
    if found != about.get("sha256"):
        raise InputError(f"{printable(path)}: sha256 must be {about.get('sha256')}, got {found}: delete it")
    return about


def load_engine(
    path: Path, name: Library | None, device: torch.device, *, trusted: bool = False
) -> tuple[TensorRTBackend, dict[str, Any], str]:
    """An engine's backend, the refiner's settings as far as they are known, and the engine's SHA-256.

    Args:
        path: an engine from the cache, or (with ``trusted``) from anywhere, trtexec's for one.
        name: the library that built it; None is what its record says, and TensorRT where it has none.
        device: a CUDA device.
        trusted: run an engine that has no record here; it can hold code.

    Raises:
        InputError: an engine that is foreign and not trusted, altered, or of another version, GPU or refiner.
        UnavailableError: no library, or no GPU.
    """
    try:
        data = path.read_bytes()  # once: what is checked is what runs
    except OSError as error:
        raise InputError(f"{printable(path)}: no such engine: {error.strerror}") from error
    about: dict[str, Any] | None = None
    if path.parent.resolve() == default_cache().resolve():
        about = record(path, data)
    elif not trusted:
        raise InputError(
            f"{printable(path)}: was not built here, and an engine can hold code: "
            "refine --trust-engine or load_refiner(path, trust_engine=True) runs it all the same"
        )
    if name is None:
        rtx = about is not None and about["library"].startswith("tensorrt-rtx ")
        name = "tensorrt-rtx" if rtx else "tensorrt"
    trt = library(name)
    if about is not None and about["library"] != (ours := f"{name} {trt.__version__}"):
        raise InputError(f"{printable(path)}: must be run by {about['library']}, which built it, got {ours}")
    if device.type != "cuda":  # without a GPU, some of the libraries crash as they read an engine
        raise UnavailableError(f"an engine needs a CUDA device, got {device}")
    if about is not None and about["gpu"] not in (_gpu(device), _sm(device)):
        raise InputError(
            f"{printable(path)}: must be run on {about['gpu']}, for which it was built, got {_gpu(device)}"
        )
    log = _Log(trt)
    with torch.cuda.device(device):  # an engine's weights go to the device that is current, and so do its contexts
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(data)
        if engine is None:
            raise InputError(f"{printable(path)}: {trt.__name__} {trt.__version__} refuses it: {log.last()}")
        try:
            backend = TensorRTBackend(engine, trt, device, name)
        except InputError as error:
            raise InputError(f"{printable(path)}: {error}") from None
    settings = about["settings"] if about else {"channels": backend.channels, "histogram": backend.histogram}
    return backend, settings, hashlib.sha256(data).hexdigest()


class TensorRTBackend:
    """An engine and its contexts. Batches below the profile's smallest are padded; larger ones `Refiner` splits.

    A shape that comes back is captured as a CUDA graph in a context of its own: a context works in memory of its own
    for one shape at a time, so that one that goes on to another shape would pull it from under the graph.

    Args:
        engine, trt: a deserialised engine and the module it came from, deserialised with ``device`` current.
        device: where the images are.

    Raises:
        InputError: its input and output are not those of an exported refiner.
    """

    def __init__(self, engine: Any, trt: ModuleType, device: torch.device, name: str = "tensorrt") -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [each for each in names if engine.get_tensor_mode(each) == trt.TensorIOMode.INPUT]
        if len(inputs) != 1 or inputs[0] not in _INPUTS or set(names) - set(inputs) != {OUTPUT}:
            raise InputError(f"must take one of {', '.join(_INPUTS)} and give {OUTPUT}, got {', '.join(names)}")
        self._input = inputs[0]
        kinds = {trt.DataType.UINT8: torch.uint8, trt.DataType.FLOAT: torch.float32}
        found = {engine.get_tensor_dtype(each) for each in names}
        wanted = trt.DataType.UINT8 if self._input == "images" else trt.DataType.FLOAT
        if found != {wanted}:
            raise InputError(f"{self._input} must be {wanted}, and so {OUTPUT}, got {', '.join(map(str, found))}")
        self.dtype = kinds[wanted]
        self.histogram = _INPUTS[self._input]
        self.channels = int(engine.get_tensor_shape(self._input)[1])
        self._smallest, _, self._largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(self._input, 0))
        self.largest_batch: int | None = self._largest[0]
        self.name = f"{name} {trt.__version__}"
        self._engine = engine  # the contexts do not keep it alive
        self._trt = trt
        self._context = self._new_context()  # of all that runs eagerly
        self._device = device
        run = partial(self._run, self._context)
        self._call = Replay(run, device, self._to_capture) if device.type == "cuda" else run

    def _new_context(self) -> Any:
        """A context; TensorRT-RTX's has the kernels made for a shape before it runs, and leaves graphs to us."""
        strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            context = self._engine.create_execution_context()
        else:
            config = self._engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER  # LAZY: a graph keeps the stopgap
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED
            context = self._engine.create_execution_context(config)
        if context is None:
            raise UnavailableError(f"{self.name} has no memory for another execution context: lower the batch size")
        return context

    def _to_capture(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """The engine in a context of its own, for graphs of ``images``' shape."""
        contexts: list[Any] = []  # one, made as the shape is captured; it lives as long as what is captured

        def call(images: Tensor) -> Tensor:
            if contexts:
                return self._run(contexts[0], images)
            context = self._new_context()
            out = self._run(context, images)
            # TensorRT-RTX is asked with the shape set, on the stream to be captured, after it has run there once
            ask = getattr(context, "is_stream_capturable", None)
            if ask is not None and not ask(torch.cuda.current_stream(self._device).cuda_stream):
                raise UnavailableError(f"{self.name} cannot be captured for images of shape {list(images.shape)}")
            contexts.append(context)
            return out

        return call

    def __call__(self, images: Tensor) -> Tensor:
        images = images.contiguous()
        low, high = self._smallest, self._largest
        if not all(low[axis] <= images.shape[axis] <= high[axis] for axis in (2, 3)):
            raise InputError(
                f"images must be {low[2]}x{low[3]} to {high[2]}x{high[3]}, which the engine was built for, "
                f"got {images.shape[2]}x{images.shape[3]}"
            )
        count = len(images)
        if count < low[0]:
            images = torch.cat([images, images.new_zeros(low[0] - count, *images.shape[1:])])
        return self._call(images)[:count]

    def _run(self, context: Any, images: Tensor) -> Tensor:
        out = torch.empty_like(images)
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        if not context.set_input_shape(self._input, tuple(images.shape)):
            raise InputError(f"the engine refuses images of shape {list(images.shape)}")
        context.set_tensor_address(self._input, images.data_ptr())
        context.set_tensor_address(OUTPUT, out.data_ptr())
        if not context.execute_async_v3(stream):
            raise RuntimeError(f"{self.name} failed on images of shape {list(images.shape)}")
        return out


class _Log:
    """A logger of the library's that keeps the errors, in place of printing them."""

    def __init__(self, trt: ModuleType) -> None:
        errors: list[str] = []
        self.errors = errors

        class Logger(trt.ILogger):  # type: ignore[name-defined]
            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    errors.append(message)

        self.logger = Logger()

    def last(self) -> str:
        return printable(self.errors[-1].splitlines()[0]) if self.errors else "no reason given"


def _sm(device: torch.device | None = None) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _gpu(device: torch.device | None = None) -> str:
    return f"{torch.cuda.get_device_name(device)} {_sm(device)}"


def _own(folder: Path) -> None:
    """Make ``folder`` for its owner alone, or check that it is so."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    about = folder.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise InputError(
            f"{printable(folder)}: must belong to uid {os.getuid()} with mode 700, got uid {about.st_uid} with mode "
            f"{stat.S_IMODE(about.st_mode):o}"
        )
