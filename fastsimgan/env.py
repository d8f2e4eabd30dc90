"""`python -m fastsimgan.env`: versions, devices, how the compiled ops were built, and what will run here and why."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from fastsimgan import __version__, cli
from fastsimgan.hardware import openmp

DESCRIPTION = "Versions, devices, how fastsimgan._C was built, and which implementation of each op runs here."

OPS = ("refiner_loss", "discriminator_loss", "history_swap", "residual_block", "residual_block_int8")
# From a checkout. Not with build isolation, which hides torch.
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."
# Each with what it is needed for, as the extras of pyproject.toml group them.
PACKAGES = {
    "torch": "core",
    "numpy": "core",
    "scipy": "core",
    "jinja2": "core",
    "pillow": "core",
    "safetensors": "core",
    "tyro": "core",
    "triton": "Triton kernels",
    "simplejpeg": "[fast]",
    "opencv-python-headless": "[fast]",
    "matplotlib": "[eval]",
    "h5py": "[eval]",
    "onnx": "[onnx]",
    "onnxruntime": "[onnx]",
    "onnxruntime-gpu": "[gpu]",
    "tensorrt-cu13": "[trt]",
    "tensorrt-rtx-cu13": "[rtx]",
}


@dataclass(frozen=True)
class EnvConfig:
    """Nothing to set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; return the exit code."""
    return cli.run(report, EnvConfig, prog="python -m fastsimgan.env", description=DESCRIPTION, argv=argv)


def report(config: EnvConfig) -> None:
    """Print it all."""
    import torch

    print("versions")
    print(f"  {'fastsimgan':<24}{__version__}")
    print(f"  {'python':<24}{platform.python_version()} on {platform.platform()}")
    for package, need in PACKAGES.items():
        print(f"  {package:<24}{_version(package)}  ({need})")

    print("devices")
    waits = ", ".join(f"{name}={os.environ[name]}" for name in openmp.SETTINGS if name in os.environ)
    print(f"  cpu: {torch.get_num_threads()} threads, {waits or 'whose waiting is left to OpenMP'}")
    if not torch.cuda.is_available():
        built = f"was built with CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        print(f"  cuda: none; torch {built}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        print(f"  cuda:{index}: {properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}")

    print("fastsimgan._C")
    from fastsimgan.ops import _extension

    if _extension.BUILD_INFO is None:
        print(f"  {_extension.NOT_LOADED}")
        print(f"  build it with torch installed: {REBUILD}")
    else:
        for name, value in _extension.BUILD_INFO.items():
            print(f"  {name:<24}{value if value != '' else '-'}")
        if torch.version.cuda and not _extension.BUILD_INFO["cuda"]:
            print(f"  for its CUDA kernels, with nvcc of CUDA {torch.version.cuda}: {REBUILD}")

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for op in OPS:
        print(op)
        for name, state in importlib.import_module(f"fastsimgan.ops.{op}").DISPATCH.table(devices):
            print(f"  {name:<24}{state}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
