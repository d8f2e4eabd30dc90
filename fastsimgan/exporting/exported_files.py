"""Which files an export has, and how each is called."""

from __future__ import annotations

from fastsimgan.inference.graph_format import Form, input_name
from fastsimgan.inference.refiner import RefinerFile

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


def how_to_call(form: Form, file: RefinerFile) -> str:
    """What a file of that form takes and gives, in words."""
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
