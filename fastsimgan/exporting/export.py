"""Writing a refiner's exported files, each with its proof that it agrees with PyTorch."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastsimgan import __version__
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.pixel_values import from_float
from fastsimgan.data.reading import Reading
from fastsimgan.data.simulators.builtin import builtin_pair
from fastsimgan.errors import FastSimGANError, InputError
from fastsimgan.exporting import onnx_graph
from fastsimgan.exporting.onnx_graph import IR_VERSION, OPSET, RUNS_IN
from fastsimgan.inference import int8_backend, trtexec
from fastsimgan.inference.graph_format import Form, input_name
from fastsimgan.inference.onnx_file import read, stamp
from fastsimgan.inference.onnxruntime_backend import OnnxRuntimeBackend
from fastsimgan.inference.refiner import RefinerFile, read_refiner
from fastsimgan.inference.tensorrt_backend import Library, cached_engine
from fastsimgan.inference.torch_backend import prepare
from fastsimgan.models import refiner as network
from fastsimgan.reporting.contact_sheet import save_rows
from fastsimgan.storage.atomic import staged
from fastsimgan.storage.checkpoint import newest_checkpoint
from fastsimgan.storage.names import printable

FORMS = {
    "refiner.onnx": Form(False, "float32"),
    "refiner.fp16.onnx": Form(False, "float16"),
    "refiner.u8.fp16.onnx": Form(True, "float16"),
}
QUANTISED = {
    "int8-cpu": ("refiner.u8.int8-cpu.onnx", Form(True, "u8s8")),
    "int8-tensorrt": ("refiner.u8.int8-tensorrt.onnx", Form(True, "s8s8")),
    "fp8": ("refiner.u8.fp8.onnx", Form(True, "fp8")),
}
RECORD, CARD = "export.json", "README.md"
COMPARED = 64
"""Images on which each file is compared with PyTorch, at most; the quantised ones are calibrated on as many others."""


@dataclass(frozen=True)
class Parity:
    """How one exported file differs from PyTorch's float32, in grey levels of 255."""

    largest: float
    mean: float
    psnr: float
    """Decibels, of the difference against 255; infinity where there is none."""
    within_one: float
    """Share of the pixels whose uint8 values differ by at most one."""
    most_levels: int
    """Largest difference of the uint8 values."""
    worst_image: int

    def broken_rule(self, form: Form, own_error: float, min_psnr: float) -> str | None:
        """The rule that does not hold, with its value, or None.

        float32 files must agree to four times PyTorch's own float32 error (against float64), or 1e-5 of [-1, 1] if that
        is more; float16 ones within one level on 99.5 % of the pixels and within two on all; quantised ones in PSNR.
        """
        if form.quantised:
            if self.psnr >= min_psnr:
                return None
            return (
                f"PSNR must be at least {min_psnr:g} dB, got {self.psnr:.1f} (--min-psnr {math.floor(self.psnr)} takes "
                "it; nothing is written now, so leave it out of --quantise to have the others)"
            )
        if form.branches == "float32":
            allowed = max(4 * own_error, 1e-5 * 127.5)
            return None if self.largest <= allowed else f"must be within {allowed:.2g} levels, got {self.largest:.2g}"
        if self.within_one < 0.995 or self.most_levels > 2:
            return (
                "must be within one grey level on 99.5 % of the pixels and two on all, "
                f"got {self.within_one:.2%} and {self.most_levels}"
            )
        return None


def export(
    refiner: Path,
    out: Path,
    *,
    images: Path | None = None,
    key: str | None = None,
    quantise: Sequence[str] = (),
    min_psnr: float = 50.0,
    batch: tuple[int, int, int] = (1, 512, 512),
    size: tuple[int, int] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Parity]:
    """Write ``out`` with every file, its parity, a picture of its worst image, and a model card; whole or not at all.

    Args:
        refiner: the folder of a run, or its ``refiner.safetensors``.
        out: a folder that does not exist.
        images: images like those to be refined, to compare and to calibrate on; left out, the built-in eyes for one
            channel, and noise for others.
        key: which array of that file holds them, see `Reading`.
        quantise: any of `QUANTISED`.
        min_psnr: below this a quantised file is not written, in dB.
        batch: smallest, usual and largest batch in the trtexec command.
        size: height and width in it; those of the images if None.
        say: called with each line of the report.

    Raises:
        InputError: an argument breaks a rule, or a file does not agree with PyTorch; nothing is written.
    """
    for name in quantise:
        if name not in QUANTISED:
            raise InputError(f"quantise must be any of {', '.join(QUANTISED)}, got {name!r}")
    file = read_refiner(refiner)
    if quantise and file.settings["blocks"] < 2:
        raise InputError(
            "quantise must be for refiners of at least 2 blocks, as the last stays in floats, "
            f"got {file.settings['blocks']}"
        )
    if "range" in file.settings:
        low, high = file.settings["range"]
        raise InputError(
            f"{printable(refiner)}: must be trained on images from black to white, got a refiner of floats from "
            f"{low:g} to {high:g} (--range), which no exported form holds: refine by the run's folder"
        )
    stored, what = _images(images, file.settings["channels"], key)
    compared, calibration = stored[:COMPARED], stored[COMPARED : 2 * COMPARED]
    if quantise and not len(calibration):
        calibration = compared
    size = size or (stored.shape[2], stored.shape[3])
    profile = _profile(batch, size)
    facts = _facts(refiner, file, what)
    weights = {name: tensor.numpy() for name, tensor in file.module.state_dict().items()}
    found = onnx_graph.calibrate(file.module, prepare(calibration, file.settings["histogram"])) if quantise else None
    truth = Truth(file, compared)
    forms = FORMS | dict(QUANTISED[name] for name in quantise)

    with staged(out) as folder:
        folder.mkdir()
        reports: dict[str, Parity] = {}
        hashes: dict[str, str] = {}
        in_fastsimgan = ""  # what runs an 8-bit file here, where that is not onnxruntime
        for name, form in forms.items():
            about = facts | {"uint8": form.uint8, "branches": form.branches, "how_to_call": _how_to_call(form, file)}
            (folder / name).write_bytes(stamp(onnx_graph.build(weights, file.settings, form, found), about))
            opened = read(folder / name)  # what is judged is the file, as a user will read it
            hashes[name] = opened.sha256
            backend = OnnxRuntimeBackend(opened, torch.device("cpu"))
            refined = backend(truth.input(form))
            reports[name] = truth.compare(refined, form)
            say(f"{name:46} {_row(reports[name])}")
            if rule := reports[name].broken_rule(form, truth.own_error, min_psnr):
                raise InputError(f"{name} does not agree with PyTorch: {rule}")
            others: dict[str, Tensor] = {}
            if form.branches == "float16":
                # onnxruntime computes float16 layers in float32 on a CPU; a GPU rounds after each of them.
                others["every layer rounded to float16"] = truth.rounded_as_on_a_gpu(form)
            if int8_backend.unmet(opened, torch.device("cpu")) is None:
                ours = int8_backend.Int8Backend(opened)
                others["in fastsimgan"] = ours(truth.images)
                in_fastsimgan = ours.name
            for how, other in others.items():
                reports[f"{name} ({how})"] = parity = truth.compare(other, form)
                label = f"{how}, {in_fastsimgan}" if how == "in fastsimgan" else how
                say(f"  {label:44} {_row(parity)}")
                if rule := parity.broken_rule(form, truth.own_error, min_psnr):
                    raise InputError(f"{name}, {how}, does not agree with PyTorch: {rule}")
            truth.draw_worst(folder / f"worst.{name.removesuffix('.onnx')}.png", refined, reports[name])
        record = {
            "files": hashes,
            "parity": {name: asdict(parity) | {"psnr": _finite(parity.psnr)} for name, parity in reports.items()},
            "own_error": truth.own_error,
            "size": size,
            "in_fastsimgan": in_fastsimgan,
            **facts,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        model = Path("refiner.u8.fp16.onnx")
        commands = {
            major: trtexec.command(
                model, model.with_suffix(".engine"), profile, major, forms[model.name], file.settings
            )
            for major in (10, 11)
        }
        for major, command in commands.items():
            (folder / f"trtexec{major}.sh").write_text(command + "\n")
        (folder / CARD).write_text(_card(file, record, reports, truth.own_error, commands, min_psnr))
    return reports


def engine(
    exported: Path,
    library: Library,
    *,
    batch: tuple[int, int, int],
    size: tuple[int, int] | None = None,
    sm: str | None = None,
) -> Path:
    """Build the engine of ``exported/refiner.u8.fp16.onnx`` into the cache, or find it there; its path."""
    if size is None:
        size = tuple(json.loads((exported / RECORD).read_text())["size"])
    return cached_engine(read(exported / "refiner.u8.fp16.onnx"), library, _profile(batch, size), sm=sm)


def _profile(batch: tuple[int, int, int], size: tuple[int, int]) -> trtexec.Profile:
    smallest, usual, largest = ((images, *size) for images in batch)
    return trtexec.Profile(smallest, usual, largest)


class Truth:
    """PyTorch's answers on some images, and how far others are from them.

    Args:
        file: the refiner.
        images: ``[N, C, H, W]`` uint8.
    """

    @torch.inference_mode()
    def __init__(self, file: RefinerFile, images: Tensor) -> None:
        self.file = file
        self.images = images
        self.prepared = prepare(images, file.settings["histogram"]).contiguous()
        self.refined = file.module(self.prepared)
        exact = deepcopy(file.module).double()(self.prepared.double())
        self.own_error = float((self.refined - exact).abs().max()) * 127.5
        """Largest error of PyTorch's float32 against float64, in grey levels."""

    def input(self, form: Form) -> Tensor:
        return self.images if form.uint8 else self.prepared

    def compare(self, refined: Tensor, form: Form) -> Parity:
        """``refined`` as the form gives it (uint8, or floats in [-1, 1]) against PyTorch's."""
        levels = refined if form.uint8 else from_float(refined, torch.uint8)
        steps = (levels.int() - from_float(self.refined, torch.uint8).int()).abs()
        exact = steps.double() if form.uint8 else (refined.double() - self.refined).abs() * 127.5
        square = float(exact.square().mean())
        return Parity(
            largest=float(exact.max()),
            mean=float(exact.mean()),
            psnr=10 * math.log10(255**2 / square) if square else math.inf,
            within_one=float((steps <= 1).double().mean()),
            most_levels=int(steps.max()),
            worst_image=int(exact.flatten(1).amax(1).argmax()),
        )

    @torch.inference_mode()
    def rounded_as_on_a_gpu(self, form: Form) -> Tensor:
        """What the float16 form gives where each branch layer's weights, input and output are rounded to float16.

        The products are summed in float32, as tensor cores do; a CPU's own float16 convolutions are very slow.
        """

        def rounded(values: Tensor) -> Tensor:
            return values.half().float()

        module = deepcopy(self.file.module)
        x = F.relu(module.first(self.prepared))
        for block in module.blocks:
            assert isinstance(block, network.ResidualBlock)
            for parameter in block.parameters():
                parameter.copy_(rounded(parameter))
            hidden = rounded(F.relu(block.conv1(rounded(x))))
            x = F.relu(x + rounded(block.conv2(hidden)))
        refined = torch.tanh(module.last(x))
        return from_float(refined, torch.uint8) if form.uint8 else refined

    def draw_worst(self, path: Path, refined: Tensor, parity: Parity) -> None:
        """The image with the largest difference: before, by PyTorch, by the exported file, and the difference × 16."""
        one = slice(parity.worst_image, parity.worst_image + 1)
        ours = refined[one] if refined.dtype == torch.uint8 else from_float(refined[one], torch.uint8)
        theirs = from_float(self.refined[one], torch.uint8)
        difference = ((ours.int() - theirs.int()) * 16 + 128).clamp(0, 255).to(torch.uint8)
        rows = {"synthetic": self.images[one], "PyTorch": theirs, "exported": ours, "diff. x16": difference}
        if theirs.shape[1] not in (1, 3):
            rows = {name: image[:, :1] for name, image in rows.items()}
        save_rows(path, {name: _as_array(image) for name, image in rows.items()})


def _as_array(images: Tensor) -> Any:
    return (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()


def _images_in(path: Path) -> Callable[[str], str]:
    """How to say which files of a folder are the images to compare on: the folder and a glob, as one path."""
    return lambda glob: f"--images '{printable(path)}/{glob}'"


def _images(path: Path | None, channels: int, key: str | None) -> tuple[Tensor, str]:
    """uint8 ``[N, C, H, W]`` to compare and calibrate on, and what they are."""
    if path is None:
        if channels == 1:
            return torch.from_numpy(builtin_pair(0)[0]["images"][: 2 * COMPARED])[:, None], "the built-in eyes"
        noise = torch.randint(0, 256, (2 * COMPARED, channels, 32, 32), generator=torch.Generator().manual_seed(0))
        return noise.to(torch.uint8), "noise, for want of --images"
    source = open_images(path, Reading(key=key, links="inside", flag=_images_in(path)))
    array = source.load()
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        array = np.rint(array * 255).astype(np.uint8)
    chosen = np.linspace(0, len(array) - 1, min(len(array), 2 * COMPARED)).astype(int)
    chosen = np.concatenate([chosen[::2], chosen[1::2]])  # both halves from the whole set
    planes = torch.from_numpy(array[chosen])
    planes = planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2).contiguous()
    if planes.shape[1] != channels:
        raise InputError(
            f"{printable(path)}: images must have {channels} channel(s), as the refiner has, got {planes.shape[1]}"
        )
    return planes, f"{min(COMPARED, len(planes))} of {printable(path.name)}"


def _facts(refiner: Path, file: RefinerFile, images: str) -> dict[str, Any]:
    """What goes into every file's metadata."""
    training = json.loads(file.training)
    data: dict[str, str] | str = "not recorded: exported from the file alone"
    if refiner.is_dir():
        try:
            data = newest_checkpoint(refiner / "checkpoints")[2].get("data", data)
        except FastSimGANError:
            data = "not recorded: the run has no whole checkpoint"
    return {
        "settings": file.settings,
        "training": training,
        "lambda": training.get("lam"),
        "data_sha256": data,
        "refiner_sha256": file.sha256,
        "fastsimgan": __version__,
        "exported": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "compared_on": images,
    }


def _how_to_call(form: Form, file: RefinerFile) -> str:
    histogram, channels = file.settings["histogram"], file.settings["channels"]
    name = input_name(form.uint8, histogram)
    if form.uint8:
        inside = "histogram equalisation, normalisation" if histogram == "equalise" else "normalisation"
        return (
            f"input {name}: uint8 [batch, {channels}, height, width], 0 to 255, as stored; output refined: the same. "
            f"Everything is inside: {inside}, rounding."
        )
    first = (
        "equalise each image's histogram (as OpenCV's equalizeHist does), then u / 127.5 - 1"
        if histogram == "equalise"
        else "u / 127.5 - 1"
    )
    return (
        f"input {name}: float32 [batch, {channels}, height, width] in [-1, 1]; from uint8 u: {first}. "
        "Output refined: the same range; to uint8: round((r + 1) * 127.5). Neither is inside."
    )


def _row(parity: Parity) -> str:
    return (
        f"largest {parity.largest:8.4f}  mean {parity.mean:.5f} levels  PSNR {parity.psnr:5.1f} dB  "
        f"within one level {parity.within_one:.3%}"
    )


def _finite(psnr: float) -> float | None:
    return psnr if math.isfinite(psnr) else None  # JSON has no infinity


def _card(
    file: RefinerFile,
    facts: Mapping[str, Any],
    reports: Mapping[str, Parity],
    own_error: float,
    commands: Mapping[int, str],
    min_psnr: float,
) -> str:
    settings, training = file.settings, facts["training"]
    equalised = (
        "**This refiner was trained on histogram-equalised images.** The uint8 files equalise inside. The float "
        "files do not:\n"
        "their input is named `equalised_and_normalised`, and gives wrong images otherwise."
        if settings["histogram"] == "equalise"
        else "No histogram equalisation is part of this refiner."
    )
    table = "\n".join(
        f"| `{name}` | {p.largest:.4f} | {p.mean:.5f} | {p.psnr:.1f} | {p.within_one:.3%} | {p.most_levels} |"
        for name, p in reports.items()
    )
    forms = FORMS | dict(QUANTISED.values())
    calls = "\n".join(f"- `{name}`: {_how_to_call(forms[name], file)}" for name in reports if name in forms)
    by = f": {facts['in_fastsimgan']}" if facts["in_fastsimgan"] else ""
    data = facts["data_sha256"]
    listed = ", ".join(f"{name} {value}" for name, value in data.items()) if isinstance(data, dict) else data
    return f"""# Refiner

A SimGAN refiner (Shrivastava et al., 2017, arXiv 1612.07828), exported by fastsimgan {facts["fastsimgan"]} on
{facts["exported"]}. It changes the look of synthetic images of the kind it was trained on, and nothing bounds by how
much it moves what a label points at: judge it with `python -m fastsimgan.evaluate` before use. Not meant for images of
real people, nor for telling real from synthetic.

- network: {settings["channels"]} channel(s), width {settings["width"]}, {settings["blocks"]} residual blocks, first
  kernel {settings["first_kernel"]}; lambda {facts["lambda"]}, {training.get("steps")} iterations,
  seed {training.get("seed")}
- refiner.safetensors sha256: {facts["refiner_sha256"]}
- training data sha256: {listed}

{equalised}

## How to call each file

{calls}

Needed are {RUNS_IN} or later (opset {OPSET}, IR version {IR_VERSION}), or TensorRT 10 or later.

In Python: `fastsimgan.load_refiner("FILE.onnx")`, by onnxruntime; an int8-cpu file of 32, 64, ... feature maps by
kernels of its own where the processor has AVX-512 with VNNI. Batch, height and width are free in every file.

Residual branches are in the numbers that a file's name tells, the last one of an 8-bit file in floats; the first and
last layer and the skip connections are float32 in all. **TF32 must be off for these**: onnxruntime's CUDA provider
`use_tf32=0`, trtexec `--noTF32`.

## Agreement with PyTorch

On {facts["compared_on"]}, by onnxruntime on a CPU ("every layer rounded": float16 emulated as a GPU rounds; "in
fastsimgan": by `load_refiner` on the machine that exported{by}), in grey levels of 255. PyTorch's own float32 is
{own_error:.4f} from float64. Rules: float32 within four times that (at least 0.0013); float16 within one level on
99.5 % of pixels and two on all; quantised files at least {min_psnr:g} dB.

| file | largest | mean | PSNR dB | within one | most levels |
| --- | --- | --- | --- | --- | --- |
{table}

`worst.*.png` shows each file's worst image.

## TensorRT

TensorRT 10 (`trtexec10.sh`):

```
{commands[10]}
```

TensorRT 11 (`trtexec11.sh`):

```
{commands[11]}
```
"""
