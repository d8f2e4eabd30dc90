"""TensorRT: engines built from our files with no GPU (TensorRT-RTX), the cache, the runner against a fake engine."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed ([onnx])")

from refiners import trained

from fastsimgan.data.preprocess import prepare
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.exporting import gptq, onnx_graph
from fastsimgan.inference import onnx_file, tensorrt_backend
from fastsimgan.inference.graph_format import Form
from fastsimgan.inference.refiner import Refiner, describe, load_refiner
from fastsimgan.inference.trtexec import Profile
from fastsimgan.refine import main as refine_main

EYES = Profile((1, 35, 55), (64, 35, 55), (512, 35, 55))
DYNAMIC = Profile((1, 17, 9), (64, 35, 55), (512, 224, 224))


def exported(folder: Path, form: Form, histogram: str = "equalise", blocks: int = 1, first: int = 3):
    module = trained(1, width=8, blocks=blocks, first_kernel=first)
    settings = describe(module, histogram)
    images = torch.randint(0, 256, (4, 1, 35, 55)).to(torch.uint8)
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    model = onnx_graph.build(weights, settings, form, gptq.calibrate(module, prepare(images, histogram)))
    path = folder / "refiner.onnx"
    path.write_bytes(onnx_file.stamp(model, {"settings": settings, "uint8": form.uint8, "branches": form.branches}))
    return onnx_file.read(path)


@pytest.mark.parametrize(
    ("form", "sm", "profile", "shape"),
    [
        (Form(False, "float32"), "sm_86", EYES, {}),
        (Form(False, "float16"), "sm_89", DYNAMIC, {}),
        (Form(True, "float16"), "sm_120", EYES, {}),
        (
            Form(True, "float16"),
            "sm_86",
            Profile((1, 224, 224), (8, 224, 224), (64, 224, 224)),
            {"blocks": 10, "first": 7},
        ),
        (Form(True, "s8s8"), "sm_89", EYES, {"blocks": 2}),
        (Form(False, "fp8"), "sm_120", EYES, {"blocks": 2}),
    ],
)
def test_tensorrt_rtx_builds_our_files_with_no_gpu(tmp_path, form, sm, profile, shape) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed ([rtx])")
    configs = []

    class Builder(trt.Builder):
        def create_builder_config(self):
            configs.append(super().create_builder_config())
            return configs[-1]

    watched = SimpleNamespace(**{**{name: getattr(trt, name) for name in dir(trt)}, "Builder": Builder})
    engine, _ = tensorrt_backend.build_engine(exported(tmp_path, form, **shape), watched, profile, sm=sm)
    assert len(engine) > 10_000
    assert configs[0].get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or no CUDA graph could be captured


def test_what_tensorrt_rtx_refuses(tmp_path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed ([rtx])")
    with pytest.raises(InputError, match="sm must be an architecture .* got sm_90"):
        tensorrt_backend.build_engine(exported(tmp_path, Form(True, "float16")), trt, EYES, sm="sm_90")
    with pytest.raises(InputError, match="tensorrt_rtx .* refuses it: "):  # the form for CPUs
        tensorrt_backend.build_engine(exported(tmp_path, Form(True, "u8s8"), blocks=2), trt, EYES, sm="sm_89")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache with one engine in it, its file, and the calls that built engines."""
    calls = []

    def build(file, trt, profile, *, sm, cache):
        calls.append(profile)
        return b"engine", b"timing"

    monkeypatch.setattr(tensorrt_backend, "build_engine", build)
    monkeypatch.setattr(tensorrt_backend, "library", lambda name: SimpleNamespace(__version__="10.15.1"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = exported(tmp_path, Form(True, "float16"))
    return tensorrt_backend.cached_engine(file, "tensorrt-rtx", EYES, sm="sm_89"), file, calls


def test_the_cache_is_keyed_and_its_owners_alone(cached, tmp_path) -> None:
    path, file, calls = cached
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert tensorrt_backend.cached_engine(file, "tensorrt-rtx", EYES, sm="sm_89") == path and len(calls) == 1
    others = {
        tensorrt_backend.cached_engine(file, "tensorrt-rtx", DYNAMIC, sm="sm_89"),
        tensorrt_backend.cached_engine(file, "tensorrt-rtx", EYES, sm="sm_86"),
    }
    assert path not in others and len(others) == 2 and len(calls) == 3
    os.chmod(path.parent, 0o755)
    with pytest.raises(InputError, match="must belong to uid .* with mode 700, got uid .* with mode 755"):
        tensorrt_backend.cached_engine(file, "tensorrt-rtx", EYES, sm="sm_89")


def test_an_altered_engine_is_refused(cached) -> None:
    path, file, _ = cached
    path.write_bytes(b"other")
    for call in (
        lambda: tensorrt_backend.cached_engine(file, "tensorrt-rtx", EYES, sm="sm_89"),
        lambda: load_refiner(path, "cpu", library="tensorrt-rtx"),
    ):
        with pytest.raises(InputError, match="sha256 must be [0-9a-f]{64}, got"):
            call()


def test_engines_that_cannot_run_here(cached, tmp_path, monkeypatch) -> None:
    path, *_ = cached
    with pytest.raises(InputError, match="must be run by tensorrt-rtx 10.15.1, which built it, got tensorrt 10.15.1"):
        load_refiner(path, "cpu", library="tensorrt")
    with pytest.raises(UnavailableError, match="an engine needs a CUDA device, got cpu"):
        load_refiner(path, "cpu")  # by the library of its record
    monkeypatch.setattr(tensorrt_backend, "_gpu", lambda device=None: "H100 sm_90")
    monkeypatch.setattr(tensorrt_backend, "_sm", lambda device=None: "sm_90")
    with pytest.raises(InputError, match="must be run on sm_89, for which it was built, got H100 sm_90"):
        tensorrt_backend.load_engine(path, "tensorrt-rtx", torch.device("cuda"))
    (tmp_path / "foreign.engine").write_bytes(b"engine")
    with pytest.raises(InputError, match="was not built here, and an engine can hold code: .*trust_engine=True"):
        load_refiner(tmp_path / "foreign.engine", "cpu")
    with pytest.raises(InputError, match="no such engine"):
        load_refiner(tmp_path / "missing.engine", "cpu")


def test_refine_refuses_engines_before_any_image_is_touched(cached, tmp_path, monkeypatch, capsys) -> None:
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((2, 35, 55), np.uint8))
    foreign = tmp_path / "foreign.engine"
    foreign.write_bytes(b"engine")

    def refine(engine: Path, *flags: str, device: str = "cpu") -> tuple[int, str]:
        flags = ("--refiner", str(engine), "--input", str(images), "--output", str(tmp_path / "out.npy"), *flags)
        code = refine_main([*flags, "--device", device])
        assert not list(tmp_path.glob("out*"))
        return code, capsys.readouterr().err

    code, message = refine(foreign)
    assert code == 2 and "can hold code: refine --trust-engine" in message
    code, message = refine(foreign, "--trust-engine")
    assert code == 3 and "an engine needs a CUDA device" in message  # trusted, it fails for want of a GPU alone

    path, *_ = cached
    with monkeypatch.context() as another:  # engines are refused before CUDA is called
        another.setattr(torch.cuda, "is_available", lambda: True)
        another.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        another.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        another.setattr(torch.cuda, "current_device", lambda: 0)
        another.setattr(torch.cuda, "device_count", lambda: 1)
        about = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30)
        another.setattr(torch.cuda, "get_device_properties", lambda device: about)
        code, message = refine(path, device="cuda")
    assert code == 2 and "must be run on sm_89, for which it was built, got NVIDIA H100 sm_90" in message
    monkeypatch.setattr(tensorrt_backend, "library", lambda name: SimpleNamespace(__version__="10.16.0"))
    code, message = refine(path)
    assert code == 2 and "must be run by tensorrt-rtx 10.15.1, which built it, got tensorrt-rtx 10.16.0" in message
    path.write_bytes(b"other")
    code, message = refine(path)
    assert code == 2 and "sha256 must be" in message
    path.with_suffix(".json").unlink()
    code, message = refine(path)
    assert code == 2 and "has no record of how it was built" in message


def test_what_was_checked_is_what_runs(cached, monkeypatch) -> None:
    """The file is read once: one that changes after the check must not be what the library gets."""
    path, *_ = cached
    read = []

    class Runtime:
        def __init__(self, logger) -> None: ...

        def deserialize_cuda_engine(self, data):
            read.append(data)

    checked = tensorrt_backend.record

    def swapped_after_the_check(path, data):
        about = checked(path, data)
        path.write_bytes(b"another")
        return about

    trt = SimpleNamespace(
        __version__="10.15.1", __name__="trt", Runtime=Runtime,
        ILogger=type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1, "INTERNAL_ERROR": 0}),
    )  # fmt: skip
    monkeypatch.setattr(tensorrt_backend, "library", lambda name: trt)
    monkeypatch.setattr(tensorrt_backend, "record", swapped_after_the_check)
    monkeypatch.setattr(tensorrt_backend, "_gpu", lambda device=None: "sm_89")
    monkeypatch.setattr(tensorrt_backend, "_sm", lambda device=None: "sm_89")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.raises(InputError, match="refuses it: no reason given"):
        tensorrt_backend.load_engine(path, None, torch.device("cuda"))
    assert read == [b"engine"]


TRT = SimpleNamespace(
    __version__="fake",
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
    DataType=SimpleNamespace(UINT8="uint8", FLOAT="float"),
)


class FakeEngine:
    """Inverts uint8 images at the addresses that it is given, and notes the shapes."""

    def __init__(self, name: str = "images", kind: str = "uint8", ok: bool = True) -> None:
        self.names, self.kind, self.ok = [name, "refined"], kind, ok
        self.num_io_tensors = 2
        self.shapes: list[tuple[int, ...]] = []
        self.addresses: dict[str, int] = {}
        self.get_tensor_name = self.names.__getitem__

    def get_tensor_mode(self, name):
        return "out" if name == "refined" else "in"

    def get_tensor_dtype(self, name):
        return self.kind

    def get_tensor_shape(self, name):
        return (-1, 1, -1, -1)

    def get_tensor_profile_shape(self, name, profile):
        return [(4, 1, 8, 9), (4, 1, 8, 9), (6, 1, 16, 9)]

    def create_execution_context(self):
        return self

    def set_input_shape(self, name, shape):
        self.shapes.append(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        import ctypes

        count = int(np.prod(self.shapes[-1]))
        kind = ctypes.c_uint8 * count
        source, target = (kind.from_address(self.addresses[name]) for name in self.names)
        np.ctypeslib.as_array(target)[:] = 255 - np.ctypeslib.as_array(source)
        return self.ok


def test_the_runner_pads_and_splits() -> None:
    engine = FakeEngine()
    backend = tensorrt_backend.TensorRTBackend(engine, TRT, torch.device("cpu"))
    refiner = Refiner(backend, {"channels": 1, "histogram": "keep"}, "", torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (14, 8, 9), dtype=np.uint8)
    assert np.array_equal(refiner(images), 255 - images)
    assert engine.shapes == [(6, 1, 8, 9), (6, 1, 8, 9), (4, 1, 8, 9)]  # the last two images, padded to four
    with pytest.raises(InputError, match="images must be 8x9 to 16x9, which the engine was built for, got 8x10"):
        refiner(np.zeros((2, 8, 10), np.uint8))
    engine.ok = False
    with pytest.raises(RuntimeError, match="failed on images of shape"):
        refiner(images)


def test_an_engine_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match="must take one of images.* got pixels, refined"):
        tensorrt_backend.TensorRTBackend(FakeEngine("pixels"), TRT, torch.device("cpu"))
    with pytest.raises(InputError, match="images must be uint8"):
        tensorrt_backend.TensorRTBackend(FakeEngine(kind="float"), TRT, torch.device("cpu"))


def test_trtexecs_engine_says_by_its_input_what_comes_before() -> None:
    backend = tensorrt_backend.TensorRTBackend(
        FakeEngine("equalised_and_normalised", "float"), TRT, torch.device("cpu")
    )
    assert backend.histogram == "equalise" and backend.channels == 1 and backend.dtype == torch.float32
