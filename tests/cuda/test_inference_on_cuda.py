"""Inference on CUDA: on the device asked for, the CPU's numbers, graphed, compiled, in one and two processes."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from refiners import trained

from fastsimgan.config import TrainConfig
from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.hardware.cuda_graphs import capture
from fastsimgan.inference import load_refiner, save_refiner, torch_backend
from fastsimgan.inference.refiner import Refiner
from fastsimgan.inference.torch_backend import Replay, TorchBackend
from fastsimgan.models import refiner as network
from fastsimgan.refinement import loading, session, tuning, worker_loop
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.sources import unit_parts

OTHER = torch.device("cuda:1")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def asked():
    """Counts what is asked of the pretend device."""
    return pytest.importorskip("pretend_device", reason="it asks the pretend device").counted


@pytest.fixture
def tensorrt_backend():
    pytest.importorskip("onnx")  # it reads what files say of themselves
    from fastsimgan.inference import tensorrt_backend

    return tensorrt_backend


def make(folder: Path, histogram: str = "keep", **shape: int) -> Path:
    """A refiner that does something, saved."""
    module = trained(1, amount=0.1, **{"width": 32, "blocks": 2, **shape})
    path = folder / f"{histogram}.safetensors"
    save_refiner(path, module, histogram=histogram, training=TrainConfig())
    return path


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if dtype == "float32":
        return random.random(shape, np.float32)
    return random.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance in grey levels of 255."""
    white = 1 if found.dtype == np.float32 else np.iinfo(found.dtype).max
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() / white * 255)


# --- graphs


@two_devices
def test_a_call_is_captured_on_the_device_it_is_for():
    """torch captures on the current device's stream, or on that of its first capture: there, nothing is recorded."""
    torch.cuda.set_device(0)
    before = torch.cuda.current_stream(OTHER)
    x = torch.ones(3, device=OTHER)
    capture(lambda: torch.ones(3, device="cuda:0") * 2, torch.device("cuda:0"))
    captured = capture(lambda: x * 2, OTHER)
    x.fill_(21)
    captured.replay()
    assert captured.nodes >= 1 and captured.result.tolist() == [42.0] * 3
    assert torch.cuda.current_stream(OTHER) == before and torch.cuda.current_device() == 0


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.zeros(3), "must hold at least 1 node, got 0: nothing was queued"),
        (lambda x: x.sum().item(), "cannot be captured as a CUDA graph: .*Error"),
    ],
    ids=["nothing", "waits"],
)
def test_a_capture_of_nothing_and_one_that_waits_are_errors_and_leave_the_device_as_it_was(call, message):
    x = torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(UnavailableError, match=message):
        capture(lambda: call(x), torch.device("cuda"))
    assert torch.cuda.current_stream() == stream and (x * 2).tolist() == [2, 2, 2]
    assert capture(lambda: x * 2, torch.device("cuda")).nodes >= 1


def test_where_no_graph_can_be_had_that_is_said_and_the_call_runs():
    replay = Replay(lambda x: x * float(x.max()), torch.device("cuda"))
    with pytest.warns(UserWarning, match="CUDA graphs are off, .* cannot be captured"):
        found = [replay(torch.full((2, 1, 3, 3), float(k), device="cuda")).max().item() for k in range(4)]
    assert found == [0, 1, 4, 9] and "cannot be captured" in replay.eager
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        replay(torch.ones(2, 1, 3, 3, device="cuda"))


@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:1", marks=two_devices)])
def test_every_batch_is_refined_whichever_device_is_current(device, tmp_path, asked):
    path = make(tmp_path)
    refiner, on_cpu = load_refiner(path, device), load_refiner(path, "cpu")
    torch.cuda.set_device(0)
    batch = [noise(4, 9, 11, seed=seed) for seed in range(5)]
    batch += [noise(3, 7, 8, seed=seed) for seed in range(5, 8)] + batch[:1] + [noise(2, 5, 5, seed=9)] * 2 + batch[:2]
    with asked() as counted, warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in batch:
            assert off(refiner(images), on_cpu(images)) <= 1
    assert refiner.device == torch.device("cuda", 1 if device == "cuda:1" else 0)
    assert counted["graphs"] >= 7 and refiner.backend._call.eager is None
    assert len(refiner.backend._call._graphs) <= Replay.KEPT


@two_devices
def test_cuda_alone_is_one_device_whatever_is_current_later(tmp_path):
    refiner = load_refiner(make(tmp_path), "cuda")
    expected = refiner(noise(2, 8, 8))
    with torch.cuda.device(1):
        assert np.array_equal(refiner(noise(2, 8, 8)), expected)


def test_a_device_that_is_not_there_is_said(tmp_path):
    count = torch.cuda.device_count()
    with pytest.raises(UnavailableError, match=f"device 'cuda:{count}' was asked for, and there are {count} here"):
        load_refiner(make(tmp_path), f"cuda:{count}")


# --- precision and stored types


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_16_bits_are_what_every_convolution_sees(precision, tmp_path, monkeypatch):
    pretend = pytest.importorskip("pretend_device", reason="it asks the pretend device")
    path = make(tmp_path)
    refiner, exact = load_refiner(path, "cuda", precision=precision), load_refiner(path, "cpu")
    monkeypatch.setattr(pretend, "CONVOLUTIONS", [])
    images = noise(3, 35, 55)
    found = refiner(images)
    kinds = [images.dtype for images, _ in pretend.CONVOLUTIONS]
    narrow = getattr(torch, precision)
    assert kinds == [narrow] * 6
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in pretend.CONVOLUTIONS)
    assert 0 < np.abs(found.astype(int) - exact(images)).mean() < 0.5 and off(found, exact(images)) <= 2


def test_a_gpu_without_bfloat16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(InputError, match=r"precision bfloat16 needs a GPU that computes in it .* try float16"):
        load_refiner(make(tmp_path), "cuda", precision="bfloat16")


@pytest.mark.parametrize("histogram", ["keep", "equalise"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_stored_type_is_refined_as_on_the_cpu(dtype, histogram, tmp_path):
    path = make(tmp_path, histogram)
    images = noise(5, 12, 17, dtype=dtype)
    found, expected = (load_refiner(path, device)(images, batch_size=2) for device in ("cuda", "cpu"))
    assert found.dtype == images.dtype and off(found, expected) <= (1 if dtype == "uint8" else 0.1)
    with pytest.raises(InputError, match=r"must be in \[0, 1\]"):
        load_refiner(path, "cuda")(images.astype(np.float32) + 2)


# --- compiled


def test_each_size_of_each_refiner_is_compiled_however_many(tmp_path):
    """Dynamo compiles 8 variants of one piece of code, and then runs it uncompiled without a word."""
    from torch._dynamo.utils import counters

    compiled = 0
    for width in (20, 24):
        path = make(tmp_path, width=width)
        refiner, on_cpu = load_refiner(path, "cuda", compiled=True), load_refiner(path, "cpu")
        assert refiner.backend.name == "torch float32, compiled"
        for size in range(torch_backend.MOST_COMPILED):
            images = noise(2, 6, 5 + size)
            before = counters["stats"]["unique_graphs"]
            for _ in range(3):
                assert off(refiner(images), on_cpu(images)) <= 1
            compiled += counters["stats"]["unique_graphs"] - before
        with pytest.warns(UserWarning, match=r"\[2, 1, 9, 9\] run uncompiled: 8 other shapes are compiled"):
            for _ in range(2):
                refiner(noise(2, 9, 9))
    assert compiled == 2 * torch_backend.MOST_COMPILED


def test_a_size_is_compiled_when_it_comes_back_and_a_repeatable_one_when_it_is_named(tmp_path):
    path = make(tmp_path)
    refiner = load_refiner(path, "cuda", compiled=True)
    refiner(noise(2, 6, 7))
    assert not refiner.backend._compiled
    refiner(noise(2, 6, 7))
    assert list(refiner.backend._compiled) == [torch.Size([2, 1, 6, 7])]
    repeatable = load_refiner(path, "cuda", compiled=True, repeatable=True)
    for _ in range(3):
        repeatable(noise(2, 6, 7))
    assert not repeatable.backend._compiled
    repeatable.warm_up(4, 6, 7)
    assert list(repeatable.backend._compiled) == [torch.Size([4, 1, 6, 7])]


def test_a_compiler_that_fails_is_an_error(tmp_path, monkeypatch):
    def broken(*_, **__):
        def call(_):
            raise RuntimeError("no C compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    refiner = load_refiner(make(tmp_path), "cuda", compiled=True)
    with pytest.raises(
        UnavailableError, match=r"torch.compile failed for \[2, 1, 6, 7\]: RuntimeError: no C compiler$"
    ):
        refiner.warm_up(2, 6, 7)
    monkeypatch.setattr(torch_backend, "_cannot_compile", lambda: "triton is not installed")
    with pytest.raises(UnavailableError, match="compiled was asked for, and triton is not installed"):
        load_refiner(tmp_path / "keep.safetensors", "cuda", compiled=True)


def test_compiled_first_and_last_layers_are_the_convolutions(tmp_path):
    """They are written as products there, which Inductor fuses; here they are traced, and computed as written."""
    for number, shape in enumerate([{}, {"first_kernel": 7}, {"blocks": 0}]):
        (tmp_path / str(number)).mkdir()
        path = make(tmp_path / str(number), **shape)
        images = noise(2, 9, 13, dtype="uint16")
        refiner = load_refiner(path, "cuda", compiled=True, repeatable=True)
        refiner.warm_up(2, 9, 13)
        assert off(refiner(images), load_refiner(path, "cpu")(images)) < 0.05


@pytest.mark.parametrize("repeatable", [False, True])
def test_cudnn_measures_its_algorithms_for_replays_alone_and_never_where_bytes_must_repeat(repeatable, tmp_path):
    refiner = load_refiner(make(tmp_path), "cuda", repeatable=repeatable)
    seen = []

    def look(*_):
        cudnn = torch.backends.cudnn
        seen.append((cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32))

    refiner.backend._module.first.register_forward_pre_hook(look)
    for _ in range(3):
        refiner(noise(2, 6, 7))
    eager, captured = ((False, True, False),) * 2 if repeatable else ((False, False, False), (True, False, False))
    assert seen == [eager, captured, captured]  # a first call, and the second's warm-up and capture


# --- TensorRT


class Context:
    """An execution context of an engine that inverts uint8 images; it notes where it ran."""

    def __init__(self, engine, config=None) -> None:
        self.engine, self.config, self.shapes, self.addresses = engine, config, [], {}
        engine.contexts.append((self, torch.cuda.current_device()))

    def set_input_shape(self, name, shape):
        self.shapes.append(shape)
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        assert stream == torch.cuda.current_stream().cuda_stream
        self.engine.ran.append((self, torch.cuda.current_device(), torch.cuda.is_current_stream_capturing()))
        source, target = (self._tensor(self.addresses[name]) for name in ("images", "refined"))
        torch.sub(255, source, out=target)
        return True

    def _tensor(self, address):
        about = {"shape": self.shapes[-1], "typestr": "|u1", "data": (address, False), "version": 3, "stream": None}
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=about), device="cuda")


class RTXContext(Context):
    def is_stream_capturable(self, stream):
        assert stream == torch.cuda.current_stream().cuda_stream and self.shapes
        self.engine.questions.append(stream)
        return self.engine.capturable


class Engine:
    """What TensorRT and TensorRT-RTX are asked of an engine."""

    num_io_tensors = 2
    capturable = True

    def __init__(self, context=Context) -> None:
        self.kind, self.contexts, self.ran, self.questions = context, [], [], []
        self.get_tensor_name = ["images", "refined"].__getitem__

    def get_tensor_mode(self, name):
        return "out" if name == "refined" else "in"

    def get_tensor_dtype(self, name):
        return "uint8"

    def get_tensor_shape(self, name):
        return (-1, 1, -1, -1)

    def get_tensor_profile_shape(self, name, profile):
        return [(1, 1, 4, 4), (4, 1, 8, 9), (6, 1, 16, 16)]

    def create_runtime_config(self):
        return SimpleNamespace()

    def create_execution_context(self, config=None):
        return self.kind(self, config)


def library(**more):
    return SimpleNamespace(
        __version__="1.0", __name__="fake",
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        DataType=SimpleNamespace(UINT8="uint8", FLOAT="float"),
        ILogger=type("ILogger", (), {"__init__": lambda self: None, "ERROR": 1, "INTERNAL_ERROR": 0}),
        **more,
    )  # fmt: skip


RTX = {
    "DynamicShapesKernelSpecializationStrategy": SimpleNamespace(EAGER="eager", LAZY="lazy"),
    "CudaGraphStrategy": SimpleNamespace(DISABLED="disabled"),
}


def test_every_captured_shape_has_a_context_of_its_own(tensorrt_backend):
    engine = Engine()
    device = torch.device("cuda", 0)
    runner = tensorrt_backend.TensorRTBackend(engine, library(), device)
    refiner = Refiner(runner, {"channels": 1, "histogram": "keep"}, "", device)
    for seed, size in enumerate([(4, 5), (4, 5), (4, 5), (6, 7), (6, 7), (4, 5), (6, 7), (8, 8), (4, 5)]):
        images = noise(3, *size, seed=seed)
        assert np.array_equal(refiner(images), 255 - images)
    captured = {context for context, _, capturing in engine.ran if capturing}
    assert len(captured) == 2 and len(engine.contexts) == 3
    assert all(len(set(context.shapes)) == 1 for context in captured)
    assert engine.contexts[0][0] not in captured and runner._call.eager is None


@pytest.mark.parametrize("capturable", [True, False])
def test_tensorrt_rtx_is_asked_whether_it_can_be_captured(capturable, tensorrt_backend):
    engine = Engine(RTXContext)
    engine.capturable = capturable
    device = torch.device("cuda", 0)
    runner = tensorrt_backend.TensorRTBackend(engine, library(**RTX), device, "tensorrt-rtx")
    refiner = Refiner(runner, {"channels": 1, "histogram": "keep"}, "", device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(4):
            assert np.array_equal(refiner(noise(3, 4, 5, seed=seed)), 255 - noise(3, 4, 5, seed=seed))
    assert len(engine.questions) == 1
    assert any(capturing for *_, capturing in engine.ran) == capturable
    assert [str(each.message) for each in said] == (
        []
        if capturable
        else [
            "CUDA graphs are off, so that small batches take longer: tensorrt-rtx 1.0 cannot be captured for images of "
            "shape [3, 1, 4, 5]"
        ]
    )
    config = engine.contexts[0][0].config
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager" and config.cuda_graph_strategy == "disabled"


@two_devices
def test_an_engine_is_read_and_run_on_its_device(tmp_path, monkeypatch, tensorrt_backend):
    engine = Engine()
    read = []

    class Runtime:
        def __init__(self, logger) -> None: ...

        def deserialize_cuda_engine(self, data):
            read.append(torch.cuda.current_device())
            return engine

    monkeypatch.setattr(tensorrt_backend, "library", lambda name: library(Runtime=Runtime))
    (tmp_path / "foreign.engine").write_bytes(b"engine")
    torch.cuda.set_device(0)
    refiner = load_refiner(tmp_path / "foreign.engine", "cuda:1", trust_engine=True)
    for seed in range(4):
        assert np.array_equal(refiner(noise(3, 4, 5, seed=seed)), 255 - noise(3, 4, 5, seed=seed))
    assert read == [1] and {device for _, device in engine.contexts} == {1}
    assert {device for _, device, _ in engine.ran} == {1} and any(capturing for *_, capturing in engine.ran)


# --- refine


@pytest.fixture
def small(monkeypatch):
    """Blocks of 32 images of 8x9 uint8, in batches of 16; of 100 images, 4 are left for the last."""
    monkeypatch.setattr(unit_parts, "BYTES_PER_UNIT", 32 * 72)
    return {"batch_size": 16}


def refined(job: Job, **options: object) -> np.ndarray:
    refine(job, **options)
    return np.load(job.output)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_refine_on_any_device_for_every_stored_type(dtype, tmp_path, small):
    path = make(tmp_path, "equalise")
    np.save(tmp_path / "in.npy", noise(100, 8, 9, dtype=dtype))
    found = {
        device: refined(Job(path, tmp_path / "in.npy", tmp_path / f"{device}.npy", device=device, **small))
        for device in ("cpu", "cuda", "cuda:1")[: 1 + torch.cuda.device_count()]
    }
    on_cpu, first, *others = found.values()
    assert off(first, on_cpu) <= (1 if dtype == "uint8" else 0.1)
    assert all(np.array_equal(first, other) for other in others)


@two_devices
def test_two_workers_share_two_devices(tmp_path):
    path = make(tmp_path)
    (tmp_path / "in").mkdir()
    for number, image in enumerate(noise(unit_parts.SAMPLES_PER_UNIT + 80, 8, 9)):  # two blocks
        Image.fromarray(image).save(tmp_path / "in" / f"{number}.png")
    job = Job(path, tmp_path / "in", tmp_path / "one", device="cuda", precision="bfloat16")
    try:
        loaded = [loading.load(job, worker, 2) for worker in range(3)]
        assert torch.cuda.current_device() == 0
        loaded[1].begin(noise(2, 8, 9))()
        assert [each.device.index for each in loaded] == [0, 1, 0]
        assert {parameter.device for parameter in loaded[1].refiner.backend._module.parameters()} == {OTHER}
        assert loading.load(Job(path, path, path, device="cuda:1"), 0, 2).device == OTHER  # as asked
    finally:
        torch.cuda.set_device(0)
    refine(job)
    report = refine(replace(job, output=tmp_path / "two"), workers=2)
    assert report.backends == {"torch bfloat16"} and report.images == unit_parts.SAMPLES_PER_UNIT + 80
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*") if file.suffix in (".png", ".jsonl")}
        for name in ("one", "two")
    )
    assert one == two and len(one) == report.images + 3  # blocks' records name no index of a device
    assert f'"device": "cuda ({torch.cuda.get_device_name(0)})"' in one["00000000.jsonl"].decode()


@pytest.mark.parametrize(("began", "joins"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_of_one_kind_of_device_is_not_gone_on_with_on_the_other(began, joins, tmp_path, small):
    """They round otherwise, and whoever does a block must write the same bytes."""
    np.save(tmp_path / "in.npy", noise(40, 8, 9))
    job = Job(make(tmp_path), tmp_path / "in.npy", tmp_path / "out.npy", device=began, **small)
    session.open_session(job)
    with pytest.raises(InputError, match="device"):
        session.open_session(replace(job, device=joins))
    assert len(refined(job)) == 40


@pytest.mark.pretend
@pytest.mark.parametrize("count", [1, 2])
def test_a_device_short_of_memory_is_one_line_with_ways_out(count, tmp_path, monkeypatch):
    path = make(tmp_path)
    np.save(tmp_path / "in.npy", noise(8, 8, 9))
    torch.cuda.empty_cache()
    monkeypatch.setenv("FASTSIMGAN_PRETEND_CUDA_GB", "0.001")
    with pytest.raises(UnavailableError, match=r"^cuda:\d must have memory for .* free of 1 MiB: a lower --batch-size"):
        refine(
            Job(path, tmp_path / "in.npy", tmp_path / "out.npy", device="cuda", residual_block="auto"), workers=count
        )
    assert not (tmp_path / "out.npy").exists()


def test_batches_wait_for_the_weights_which_another_stream_moves_and_rounds(tmp_path, monkeypatch):
    waits = []
    wait_stream = torch.cuda.Stream.wait_stream

    def watched(self, other):
        waits.append((self, other))
        wait_stream(self, other)

    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", watched)
    refiner = loading.load(Job(make(tmp_path), tmp_path, tmp_path, device="cuda", precision="float16"))
    assert (refiner._stream, torch.cuda.current_stream(refiner.device)) in waits


def test_a_batch_is_waited_for_once_whatever_its_type(tmp_path, asked, monkeypatch):
    path = make(tmp_path)
    waits = {}
    for dtype, count in itertools.product(("uint8", "uint16", "float32"), (64, 128)):
        np.save(tmp_path / "in.npy", noise(count, 8, 9, dtype=dtype))
        job = Job(path, tmp_path / "in.npy", tmp_path / f"{dtype}{count}.npy", batch_size=16, device="cuda")
        with asked() as counted:
            refine(job)
        waits[dtype, count] = counted["syncs"]
    assert all(waits[dtype, 128] - waits[dtype, 64] == 4 for dtype in ("uint8", "uint16", "float32"))


def test_a_run_keeps_the_batches_that_it_began_with(tmp_path, monkeypatch, capsys):
    from fastsimgan.refine import print_stages

    path = make(tmp_path)
    np.save(tmp_path / "in.npy", noise(30, 35, 55))
    job = Job(path, tmp_path / "in.npy", tmp_path / "out.npy", device="cuda")
    run = session.open_session(job).run
    assert run.identity["batch size"] == 1024 and "compiled" not in run.identity
    pixels = run.identity["pixels in a batch"]
    monkeypatch.setattr(tuning, "MOST_PIXELS", pixels // 2)  # on another machine
    assert session.open_session(job).run.identity["pixels in a batch"] == pixels
    monkeypatch.setattr(tuning, "_has_driver", lambda: False)
    assert session.as_begun(Job(path, tmp_path / "in.npy", tmp_path / "out.npy")).pixels == pixels
    with pytest.raises(InputError, match="is another run's output"):
        session.open_session(replace(job, batch_size=512))
    report = refine(job)
    print_stages(report)
    assert report.peak_bytes > 0 and "device memory: " in capsys.readouterr().out


def test_a_run_with_much_work_is_compiled_by_all_who_join_it(tmp_path, monkeypatch, small):
    path = make(tmp_path)
    np.save(tmp_path / "in.npy", noise(100, 8, 9))
    monkeypatch.setattr(tuning, "COMPILE_FROM", 2.0 * 100 * 72 * (9 * 32 + 4 * 9 * 32 * 32 + 32) + 1)
    job = Job(path, tmp_path / "in.npy", tmp_path / "eager.npy", device="cuda", **small)
    assert refine(job).backends == {"torch float32"}  # one operation too few
    monkeypatch.setattr(tuning, "COMPILE_FROM", tuning.COMPILE_FROM - 1)
    job = replace(job, output=tmp_path / "out.npy")
    begin = session.open_session(job).run.partial / ".fastsimgan" / "run.json"
    assert json.loads(begin.read_text())["identity"]["compiled"] is True
    monkeypatch.setattr(tuning, "COMPILE_FROM", 1e99)  # whoever joins does as the run began
    monkeypatch.setattr(torch_backend, "_cannot_compile", lambda: "triton is not installed")
    with pytest.raises(UnavailableError, match="compiled was asked for, and triton is not installed"):
        worker_loop.make_worker(session.open_session(job), loading.load, 0, 1)
    monkeypatch.setattr(torch_backend, "_cannot_compile", lambda: None)
    seen = []
    forward = TorchBackend._forward

    def look(self, images, replayed=False):
        seen.append((len(images), images.shape in self._compiled, replayed))
        return forward(self, images, replayed)

    monkeypatch.setattr(TorchBackend, "_forward", look)
    assert refine(job).backends == {"torch float32, compiled"}
    # full batches through compiled code from the first one on, the others never: so bytes depend on nothing else
    assert {(count, compiled) for count, compiled, _ in seen} == {(16, True), (4, False)}
    assert off(np.load(tmp_path / "out.npy"), np.load(tmp_path / "eager.npy")) <= 1


def test_the_residual_blocks_implementation_is_the_runs(tmp_path, monkeypatch, small):
    """Whoever joins takes the one that the run began with, and all that the op gets has 16 bits."""
    path = make(tmp_path)
    np.save(tmp_path / "in.npy", noise(40, 8, 9))
    job = Job(path, tmp_path / "in.npy", tmp_path / "out.npy", device="cuda", precision="float16", **small)
    assert session.open_session(replace(job, residual_block="reference")).run.identity["residual block"] == "reference"
    seen = set()
    block = network.residual_block

    def look(features, weight1, bias1, weight2, bias2, impl):
        seen.add((impl, features.dtype, weight1.dtype, torch.get_autocast_dtype("cuda")))
        return block(features, weight1, bias1, weight2, bias2, impl)

    monkeypatch.setattr(network, "residual_block", look)
    refine(job)
    assert seen == {("reference", torch.float16, torch.float16, torch.float16)}
    with pytest.raises(InputError, match="its residual block is reference, here it is None"):
        session.open_session(replace(job, residual_block="auto"))


def test_files_are_not_compiled_for(tmp_path):
    np.save(tmp_path / "in.npy", noise(3, 8, 9))
    job = Job(make(tmp_path), tmp_path / "in.npy", tmp_path / "out", device="cuda", to="folder", compiled=True)
    with pytest.raises(InputError, match="compile must be off where images are files"):
        session.open_session(job)
