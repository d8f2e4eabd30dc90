"""R as an ONNX graph, written node by node: nothing is traced, so nothing depends on a trace's mode, batch or size.

Every graph takes ``[B, C, H, W]`` with B, H and W free, holds its weights itself, and is of one of two kinds:

- float: prepared images in and refined ones out, float32 in [-1, 1]. An input that has to be histogram-equalised first
  is *named* so (`input_name`), because a caller must write that name.
- uint8: stored images in and out, with all that has to happen before and after R inside: histogram equalisation where
  the refiner was trained with it, normalisation, rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimgan.errors import UnavailableError
from fastsimgan.exporting.gptq import compensated, to_float8
from fastsimgan.inference.graph_format import NEEDS_ONNX, OUTPUT, Form, input_name
from fastsimgan.models.refiner import CURVE

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:  # an optional package
    raise UnavailableError(NEEDS_ONNX) from error

Array = NDArray[Any]
Weights = Mapping[str, Array]

OPSET = 19  # the first with float8; parsed by TensorRT 10 and later
IR_VERSION = 9  # opset 19's; the next one, which nothing here needs, would take onnxruntime 1.18
RUNS_IN = "onnxruntime 1.17"
"""The oldest that runs every file: seen with 1.17.3 (the same bytes as 1.32), and 1.15.1 lacks Cast of opset 19."""
_FP8_TOP = 448  # the largest float8 e4m3


def build(
    weights: Weights, settings: Mapping[str, Any], form: Form, calibration: Mapping[str, Array] | None = None
) -> onnx.ModelProto:
    """The graph of a refiner, checked, without metadata.

    Args:
        weights: the refiner's tensors by the names in its file, float32.
        settings: the refiner's settings (`fastsimgan.inference.refiner.describe`).
        form: what to write.
        calibration: for a quantised form, what `gptq.calibrate` found.
    """
    graph = _Graph(weights, form, calibration or {})
    kind = TensorProto.UINT8 if form.uint8 else TensorProto.FLOAT
    name = input_name(form.uint8, settings["histogram"])
    shape = ["batch", settings["channels"], "height", "width"]
    image = _stored_to_float(graph, name, settings["histogram"]) if form.uint8 else name
    x = graph.node("Relu", [graph.conv("first", graph.cast(image, "float32", graph.features))], "first.relu")
    for block in range(settings["blocks"]):
        branch = graph.branch(f"blocks.{block}", x, form.of_branch(block, settings["blocks"]))
        x = graph.node("Relu", [graph.node("Add", [x, branch], f"blocks.{block}.sum")], f"blocks.{block}.out")
    computed = graph.cast(graph.conv("last", x), graph.features, "float32")
    _put_together(graph, image, computed, settings.get("computes", "image"), "put_together" if form.uint8 else OUTPUT)
    if form.uint8:
        _float_to_stored(graph, "put_together")
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "refiner",
            [helper.make_tensor_value_info(name, kind, shape)],
            [helper.make_tensor_value_info(OUTPUT, kind, shape)],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fastsimgan",
    )
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and constants as they are added, in order."""

    def __init__(self, weights: Weights, form: Form, calibration: Mapping[str, Array]) -> None:
        self.weights = weights
        self.form = form
        self.calibration = calibration
        self.features = "float16" if form.branches == "float16" else "float32"
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        if all(name != known.name for known in self.initializers):
            self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def conv(self, name: str, x: str, dtype: str = "") -> str:
        """A convolution that keeps the size, in ``dtype``, or in that of the features."""
        weight, bias = (
            self.constant(f"{name}.{part}", self.weights[f"{name}.{part}"].astype(dtype or self.features))
            for part in ("weight", "bias")
        )
        return self.size_kept(name, [x, weight, bias])

    def cast(self, x: str, given: str, wanted: str) -> str:
        if given == wanted:
            return x
        kind = TensorProto.FLOAT16 if wanted == "float16" else TensorProto.FLOAT
        return self.node("Cast", [x], f"{x}.{wanted}", to=kind)

    def size_kept(self, name: str, inputs: Sequence[str]) -> str:
        kernel = self.weights[f"{name}.weight"].shape[2:]
        return self.node("Conv", inputs, name, kernel_shape=kernel, pads=[k // 2 for k in kernel] * 2)

    def branch(self, name: str, x: str, numbers: str) -> str:
        """conv2(relu(conv1(x))), in and out of the features' type whatever is in between."""
        if numbers not in ("float32", "float16"):
            return self.quantised_branch(name, x)
        conv1 = self.conv(f"{name}.conv1", self.cast(x, self.features, numbers), numbers)
        hidden = self.node("Relu", [conv1], f"{name}.hidden")
        return self.cast(self.conv(f"{name}.conv2", hidden, numbers), numbers, self.features)

    def quantised_branch(self, name: str, x: str) -> str:
        """The same in 8 bits, in units in which each channel's peak is the largest 8-bit value.

        Channels differ in range, and the last layer weighs some of them ten times more than most. Runtimes take one
        scale an activation tensor, so that each channel's own goes into the weights before and behind it (ReLU lets it
        pass), and at the two ends of the branch into a multiplication.
        """
        parts = ("in", "hidden", "branch")
        units = {part: self.units(self.calibration[f"{name}.{part}"]) for part in parts}
        x = self.node("Mul", [x, self.channels(f"{name}.in.per_unit", 1 / units["in"])], f"{name}.in")
        rounded = self.rounded(f"{name}.in", x)
        conv1 = self.quantised_conv(f"{name}.conv1", rounded, units["in"], units["hidden"])
        hidden = self.node("Relu", [conv1], f"{name}.hidden")
        rounded = self.rounded(f"{name}.hidden", hidden)
        out = self.quantised_conv(f"{name}.conv2", rounded, units["hidden"], units["branch"])
        if self.form.branches == "u8s8":
            # onnxruntime multiplies in 8 bits only where the result is rounded to 8 bits again
            out = self.rounded(f"{name}.branch", out, signed=True)
        return self.node("Mul", [out, self.channels(f"{name}.branch.unit", units["branch"])], f"{name}.branch")

    def units(self, peaks: Array) -> Array:
        """What the number 1 stands for in each channel; one that calibration found (nearly) dead gets some room.

        Unsigned activations reach 127, not 255, at their peak: processors with AVX2 and no VNNI add two products in 16
        bits, and 255 * 127 * 2 would not fit. What is above the peaks of calibration has the upper half.
        """
        if self.form.branches == "fp8":  # floats need no range of their own in each channel
            peaks = np.full_like(peaks, peaks.max())
        room: Array = np.maximum(peaks, max(0.01 * peaks.max(), 1e-6))
        return room / (_FP8_TOP if self.form.branches == "fp8" else 127)

    def channels(self, name: str, values: Array) -> str:
        return self.constant(name, values.astype(np.float32)[:, None, None])

    def rounded(self, name: str, x: str, signed: bool = False) -> str:
        """``x``, in units, through 8 bits and back."""
        if self.form.branches == "fp8":
            zero = "float8_zero"
            if all(zero != known.name for known in self.initializers):
                self.float8(zero, np.float32(0))
        elif self.form.branches == "s8s8":
            zero = self.constant("int8_zero", np.int8(0))
        else:
            zero = self.constant("uint8_middle" if signed else "uint8_zero", np.uint8(128 if signed else 0))
        about = [self.constant("one", np.float32(1)), zero]
        small = self.node("QuantizeLinear", [x, *about], f"{name}.quantised")
        return self.node("DequantizeLinear", [small, *about], f"{name}.dequantised")

    def quantised_conv(self, name: str, x: str, x_units: Array, out_units: Array) -> str:
        """A convolution with 8-bit weights, one scale an output channel; input and output are in their units."""
        weight = self.weights[f"{name}.weight"] * x_units[:, None, None] / out_units[:, None, None, None]
        fp8 = self.form.branches == "fp8"
        top = _FP8_TOP if fp8 else 127
        bias = self.weights[f"{name}.bias"] / out_units
        # a bias, in units of the sums, leaves them most of their 32 bits, where the kernel is nearly zero too
        largest = np.maximum(np.abs(weight).max((1, 2, 3)), np.abs(bias) * (top / 2**28))
        scale = (np.maximum(largest, 1e-12) / top).astype(np.float32)
        exact = np.concatenate([weight.reshape(len(scale), -1), bias[:, None]], 1)
        seen = np.append(np.repeat(x_units, weight[0, 0].size), 1.0)
        moments = self.calibration[name] / seen[:, None] / seen
        held = compensated(exact / scale[:, None].astype(np.float64), moments, to_float8 if fp8 else np.rint, top)
        levels, bias = held[:, :-1].reshape(weight.shape), held[:, -1]
        if fp8:
            small, zero = self.float8(f"{name}.weight", levels), self.float8(f"{name}.zero", np.zeros(len(scale)))
        else:
            small = self.constant(f"{name}.weight", levels.astype(np.int8))
            zero = self.constant(f"{name}.zero", np.zeros(len(scale), np.int8))
        about = [self.constant(f"{name}.scale", scale), zero]
        restored = self.node("DequantizeLinear", [small, *about], f"{name}.weight.dequantised", axis=0)
        if self.form.branches == "u8s8":  # onnxruntime wants the bias in the accumulator's own units
            whole = np.clip(np.rint(bias), -(2**30), 2**30).astype(np.int32)
            about = [about[0], self.constant(f"{name}.bias.zero", np.zeros(len(scale), np.int32))]
            added = self.constant(f"{name}.bias", whole)
            added = self.node("DequantizeLinear", [added, *about], f"{name}.bias.dequantised", axis=0)
        else:
            added = self.constant(f"{name}.bias", (bias * scale).astype(np.float32))
        return self.size_kept(name, [x, restored, added])

    def float8(self, name: str, value: Any) -> str:
        """A constant in float8 e4m3, which NumPy does not have: rounded by torch, kept as raw bytes."""
        rounded = torch.from_numpy(np.array(value, np.float32)).to(torch.float8_e4m3fn)
        raw = rounded.view(torch.uint8).numpy().tobytes()
        self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, list(rounded.shape), raw, raw=True))
        return name


def _stored_to_float(graph: _Graph, images: str, histogram: str) -> str:
    """uint8 ``[B, C, H, W]`` to floats in [-1, 1], as `fastsimgan.data.preprocess.prepare` does it."""
    levels = graph.node("Cast", [images], "levels", to=TensorProto.FLOAT)
    if histogram == "equalise":
        levels = _equalise(graph, levels)
    unit = graph.node("Div", [levels, graph.constant("half_white", np.float32(127.5))], "unit")
    return graph.node("Sub", [unit, graph.constant("one", np.float32(1))], "normalised")


def _put_together(graph: _Graph, image: str, computed: str, computes: str, output: str) -> None:
    """The refined image from the image and what the last layer computed, as `models.refiner.put_together` has it."""
    if computes == "image":
        graph.node("Tanh", [computed], output)
        return
    node, constant = graph.node, graph.constant
    one, curve = constant("one", np.float32(1)), constant("curve", np.float32(CURVE))
    t = node("Tanh", [computed], "computed.tanh")
    near = node("Mul", [curve, image], "change.near")
    room = node("Sub", [one, node("Mul", [near, near], "change.near.square")], "change.room")
    above = node("Mul", [t, room], "change.above")
    beside = node("Mul", [curve, node("Mul", [near, t], "change.near.t")], "change.beside")
    change = node("Div", [above, node("Add", [curve, beside], "change.below")], "change")
    node("Clip", [node("Add", [image, change], "changed"), constant("least", np.float32(-1)), one], output)


def _float_to_stored(graph: _Graph, x: str) -> None:
    """Floats in [-1, 1] to rounded uint8, as `fastsimgan.data.pixel_values.quantise` does it (ties to even)."""
    x = graph.node("Add", [x, graph.constant("one", np.float32(1))], "from_zero")
    x = graph.node("Mul", [x, graph.constant("half_white", np.float32(127.5))], "scaled")
    x = graph.node("Round", [x], "rounded")
    limits = graph.constant("black", np.float32(0)), graph.constant("white", np.float32(255))
    x = graph.node("Clip", [x, *limits], "clipped")
    graph.node("Cast", [x], OUTPUT, to=TensorProto.UINT8)


def _equalise(graph: _Graph, levels: str) -> str:
    """Histogram equalisation of each grey image, exactly as `fastsimgan.data.equalisation.equalise` does it.

    A level is 16 h + l. One matrix product per image counts, for every h and l, the pixels whose high digit is h and
    whose low digit is at most l; with the pixels of smaller high digits that is the cumulative histogram. No scatter,
    no sort, no loop, so that every runtime takes it; and zeros and ones summed in float32 are exact up to 2^24 pixels,
    in TF32 too.
    """
    node, constant = graph.node, graph.constant

    def digits(op: str, digit: str, name: str) -> str:  # [B, 16, H*W] of zeros and ones
        steps = constant("steps", np.arange(16, dtype=np.float32)[:, None])
        return node("Cast", [node(op, [digit, steps], f"{name}.mask")], name, to=TensorProto.FLOAT)

    shape = node("Shape", [levels], "image_shape")
    flat = node("Reshape", [levels, constant("flat_shape", np.array([0, 1, -1]))], "flat")  # [B, 1, H*W]
    sixteenth = node("Mul", [flat, constant("sixteenth", np.float32(1 / 16))], "sixteenths")
    high = node("Floor", [sixteenth], "high")
    low = node("Sub", [flat, node("Mul", [high, constant("sixteen", np.float32(16))], "high_part")], "low")

    up_to_low = node("Transpose", [digits("LessOrEqual", low, "up_to_low")], "up_to_low.t", perm=[0, 2, 1])
    within = node("MatMul", [digits("Equal", high, "at_high"), up_to_low], "within")  # [B, 16, 16]
    axis_2, axis_1 = constant("axis_2", np.array([2])), constant("axis_1", np.array([1]))
    below = node("ReduceSum", [digits("Less", high, "below_high"), axis_2], "below", keepdims=1)  # [B, 16, 1]
    counts = node("Add", [within, below], "counts")
    cdf = node("Reshape", [counts, constant("table_shape", np.array([0, 256]))], "cdf")

    pixels = node("ReduceMax", [cdf, axis_1], "pixels", keepdims=1)
    occurs = node("Greater", [cdf, constant("black", np.float32(0))], "occurs")
    cdf_min = node("ReduceMin", [node("Where", [occurs, cdf, pixels], "occurring"), axis_1], "cdf_min", keepdims=1)
    above = node("Sub", [cdf, cdf_min], "above_min")
    spread = node("Max", [node("Sub", [pixels, cdf_min], "spread"), constant("one", np.float32(1))], "spread.min_1")
    share = node("Div", [above, spread], "share")
    table = node("Round", [node("Mul", [share, constant("white", np.float32(255))], "table.scaled")], "table.rounded")
    one_value = node("Equal", [cdf_min, pixels], "one_value")  # such an image stays as it is
    same = constant("all_levels", np.arange(256, dtype=np.float32)[None])
    table = node("Where", [one_value, same, table], "table")

    row = node("Reshape", [levels, constant("row_shape", np.array([0, -1]))], "row")
    index = node("Cast", [row], "index", to=TensorProto.INT32)
    equalised = node("GatherElements", [table, index], "equalised.row", axis=1)
    return node("Reshape", [equalised, shape], "equalised")
