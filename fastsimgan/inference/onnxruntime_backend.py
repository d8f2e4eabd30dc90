"""R in onnxruntime, on the CPU or, with onnxruntime-gpu, on CUDA; never on the one when the other was asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsimgan.errors import InputError, UnavailableError
from fastsimgan.inference.graph_format import OUTPUT
from fastsimgan.inference.onnx_file import OnnxFile
from fastsimgan.storage.names import printable

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """An exported file in an onnxruntime session. Images stay where they are: inputs and outputs are bound by address.

    Args:
        file: what `onnx_file.read` returned.
        device: "cpu" or "cuda".

    Raises:
        UnavailableError: onnxruntime or its provider for ``device`` is not there.
        InputError: onnxruntime refuses the file.
    """

    largest_batch: int | None = None

    def __init__(self, file: OnnxFile, device: torch.device) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UnavailableError(
                "running an ONNX file needs onnxruntime: pip install 'fastsimgan[onnx]' (or [gpu])"
            ) from error
        provider = PROVIDERS.get(device.type, device.type)
        if provider not in onnxruntime.get_available_providers():
            raise UnavailableError(
                f"device {str(device)!r} was asked for, and onnxruntime {onnxruntime.__version__} has no {provider} "
                f"(it has {', '.join(onnxruntime.get_available_providers())}; 'fastsimgan[gpu]' brings CUDA)"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors: it warns about every shape-only node that it keeps on the CPU
        if file.facts["branches"] == "fp8":  # its further fusions change what such a graph computes: 17 dB, not 41
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # TF32 rounds as float16 does, and float32 is to be float32.
        settings = {} if device.type == "cpu" else {"device_id": str(device.index or 0), "use_tf32": "0"}
        try:
            self._session = onnxruntime.InferenceSession(file.data, options, providers=[(provider, settings)])
        except Exception as error:  # its own exceptions share no base class
            raise InputError(f"{printable(file.path)}: onnxruntime refuses it: {str(error).splitlines()[0]}") from error
        self._session.disable_fallback()
        if (used := self._session.get_providers()[0]) != provider:
            raise UnavailableError(f"{provider} was asked for, and onnxruntime took {used}")
        self.name = f"onnxruntime {file.facts['branches']}"
        self.dtype = torch.uint8 if file.uint8 else torch.float32
        self._input = file.input_name

    def __call__(self, images: Tensor) -> Tensor:
        images = images.contiguous()  # in [B, C, H, W] order: only the address is passed on
        out = torch.empty_like(images)
        binding = self._session.io_binding()
        index = images.device.index or 0
        kind = str(images.dtype).removeprefix("torch.")
        bound = images.device.type, index, kind, list(images.shape)
        binding.bind_input(self._input, *bound, images.data_ptr())
        binding.bind_output(OUTPUT, *bound, out.data_ptr())
        if images.device.type == "cuda":
            torch.cuda.current_stream(images.device).synchronize()  # onnxruntime has a stream of its own
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return out
