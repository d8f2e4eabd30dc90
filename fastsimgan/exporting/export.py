"""Writing a refiner's exported files, each with its proof that it agrees with PyTorch."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastsimgan import __version__
from fastsimgan.data.preprocess import prepare
from fastsimgan.errors import FastSimGANError, InputError
from fastsimgan.exporting import gptq, onnx_graph
from fastsimgan.exporting.exported_files import CARD, FORMS, QUANTISED, RECORD, how_to_call
from fastsimgan.exporting.model_card import model_card
from fastsimgan.exporting.parity import Parity, Truth
from fastsimgan.exporting.sample_images import COMPARED, sample_images
from fastsimgan.inference import int8_backend, trtexec
from fastsimgan.inference.graph_format import Form
from fastsimgan.inference.onnx_file import read, stamp
from fastsimgan.inference.onnxruntime_backend import OnnxRuntimeBackend
from fastsimgan.inference.refiner import IN_FEATURES, RefinerFile, read_refiner
from fastsimgan.inference.tensorrt_backend import Library, cached_engine
from fastsimgan.storage.atomic import staged
from fastsimgan.storage.checkpoint import newest_checkpoint
from fastsimgan.storage.names import printable


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
    log: Callable[[str], None] = print,
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
        log: called with each line of the report.

    Raises:
        InputError: an argument breaks a rule, or a file does not agree with PyTorch; nothing is written.
    """
    file = _exportable(refiner, quantise)
    stored, what = sample_images(images, file.settings["channels"], key)
    compared, calibration = stored[:COMPARED], stored[COMPARED : 2 * COMPARED]
    if quantise and not len(calibration):
        calibration = compared
    size = size or (stored.shape[2], stored.shape[3])
    profile = _profile(batch, size)
    facts = _facts(refiner, file, what)
    seen = prepare(calibration, file.settings["histogram"])
    writer = _Writer(
        file, Truth(file, compared), facts, gptq.calibrate(file.module, seen) if quantise else None, min_psnr, log
    )
    forms = _forms(file, quantise, log)
    with staged(out) as folder:
        folder.mkdir()
        for name, form in forms.items():
            writer.write(folder, name, form)
        record = {
            "files": writer.hashes,
            "parity": {name: parity.record() for name, parity in writer.reports.items()},
            "own_error": writer.truth.own_error,
            "size": size,
            "in_fastsimgan": writer.in_fastsimgan,
            **facts,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        commands = _write_commands(folder, profile, forms, file)
        (folder / CARD).write_text(model_card(file, record, writer.reports, commands, min_psnr))
    return writer.reports


def _forms(file: RefinerFile, quantise: Sequence[str], log: Callable[[str], None]) -> dict[str, Form]:
    """What to write, by name."""
    if not file.in_features:
        return FORMS | dict(QUANTISED[name] for name in quantise)
    forms = {name: form for name, form in FORMS.items() if form.branches == "float32"}
    log(f"{', '.join(forms)} alone: {IN_FEATURES}")
    return forms


def _write_commands(
    folder: Path, profile: trtexec.Profile, forms: Mapping[str, Form], file: RefinerFile
) -> dict[int, str]:
    """The trtexec command of each major version of TensorRT, as a script in ``folder``; all of them."""
    model = Path(max(forms.keys() & FORMS.keys(), key=list(FORMS).index))
    form = forms[model.name]
    commands = {
        major: trtexec.command(model, model.with_suffix(".engine"), profile, major, form, file.settings)
        for major in (10, 11)
    }
    for major, command in commands.items():
        (folder / f"trtexec{major}.sh").write_text(command + "\n")
    return commands


def _exportable(refiner: Path, quantise: Sequence[str]) -> RefinerFile:
    """The refiner; InputError if it, or some form of it that is asked for, cannot be exported."""
    for name in quantise:
        if name not in QUANTISED:
            raise InputError(f"quantise must be any of {', '.join(QUANTISED)}, got {name!r}")
    file = read_refiner(refiner)
    if quantise and file.settings["blocks"] < 2:
        raise InputError(
            "quantise must be for refiners of at least 2 blocks, as the last stays in floats, "
            f"got {file.settings['blocks']}"
        )
    if quantise and file.in_features:
        raise InputError(f"quantise must be left out here: {IN_FEATURES}")
    if "range" in file.settings:
        low, high = file.settings["range"]
        raise InputError(
            f"{printable(refiner)}: must be trained on images from black to white, got a refiner of floats from "
            f"{low:g} to {high:g} (--range), which no exported form holds: refine by the run's folder"
        )
    return file


class _Writer:
    """Writes files into a folder and compares each with PyTorch.

    Args:
        file: the refiner.
        truth: PyTorch's answers.
        facts: for the files' metadata.
        calibration: for quantised forms, what `gptq.calibrate` found.
        min_psnr: that quantised files must have, in dB.
        log: called with each line of the report.

    Attributes:
        reports: each file's parity, and that of other ways to run it, by name.
        hashes: each file's SHA-256.
        in_fastsimgan: what runs an 8-bit file here, where that is not onnxruntime; else "".
    """

    def __init__(
        self,
        file: RefinerFile,
        truth: Truth,
        facts: Mapping[str, Any],
        calibration: Mapping[str, Any] | None,
        min_psnr: float,
        log: Callable[[str], None],
    ) -> None:
        self.file, self.truth, self.facts = file, truth, facts
        self._weights = {name: tensor.numpy() for name, tensor in file.module.state_dict().items()}
        self._calibration, self._min_psnr, self._log = calibration, min_psnr, log
        self.reports: dict[str, Parity] = {}
        self.hashes: dict[str, str] = {}
        self.in_fastsimgan = ""

    def write(self, folder: Path, name: str, form: Form) -> None:
        """One file, and a picture of its worst image. InputError if it does not agree with PyTorch."""
        about = {"uint8": form.uint8, "branches": form.branches, "how_to_call": how_to_call(form, self.file)}
        model = onnx_graph.build(self._weights, self.file.settings, form, self._calibration)
        (folder / name).write_bytes(stamp(model, {**self.facts, **about}))
        opened = read(folder / name)  # what is judged is the file, as a user will read it
        self.hashes[name] = opened.sha256
        refined = OnnxRuntimeBackend(opened, torch.device("cpu"))(self.truth.input(form))
        self._judge(name, f"{name:46} ", name, self.truth.compare(refined, form), form)
        if form.branches == "float16":
            # onnxruntime computes float16 layers in float32 on a CPU; a GPU rounds after each of them.
            how = "every layer rounded to float16"
            parity = self.truth.compare(self.truth.rounded_as_on_a_gpu(form), form)
            self._judge(f"{name} ({how})", f"  {how:44} ", f"{name}, {how},", parity, form)
        if int8_backend.unmet(opened, torch.device("cpu")) is None:
            ours = int8_backend.Int8Backend(opened)
            parity = self.truth.compare(ours(self.truth.images), form)
            self.in_fastsimgan = ours.name
            how = "in fastsimgan"
            self._judge(f"{name} ({how})", f"  {f'{how}, {ours.name}':44} ", f"{name}, {how},", parity, form)
        self.truth.draw_worst(folder / f"worst.{name.removesuffix('.onnx')}.png", refined, self.reports[name])

    def _judge(self, key: str, label: str, what: str, parity: Parity, form: Form) -> None:
        self.reports[key] = parity
        self._log(f"{label}{parity}")
        if rule := parity.broken_rule(form, self.truth.own_error, self._min_psnr):
            raise InputError(f"{what} does not agree with PyTorch: {rule}")


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
