"""Prints what CMakeLists.txt needs to know about this Python and its torch, as a CMake list."""

import importlib.util
import sysconfig
from pathlib import Path

import torch

root = Path(torch.__file__).parent
pybind11 = importlib.util.find_spec("pybind11")
print(
    sysconfig.get_path("include"),
    sysconfig.get_config_var("EXT_SUFFIX"),
    # torch carries pybind11's headers in its own include folder.
    Path(pybind11.origin).parent / "include" if pybind11 and pybind11.origin else root / "include",
    root,
    torch.__version__,
    1 if torch.version.cuda else 0,
    sep=";",
    end="",
)
