"""Prints what CMakeLists.txt needs to know about this Python, its torch and the nvcc that fits it, as a CMake list.

Arguments: FASTSIMGAN_CUDA, and an nvcc that was asked for (or nothing).
"""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

import torch
from find_nvcc import Found, find_nvcc

wish, named = (*sys.argv[1:], "", "")[:2]
if wish == "off":
    found = Found(reason="FASTSIMGAN_CUDA=off")
elif not torch.version.cuda:
    found = Found(reason="that torch has no CUDA")
else:
    found = find_nvcc(torch.version.cuda, named)

root = Path(torch.__file__).parent
pybind11 = importlib.util.find_spec("pybind11")
print(
    sysconfig.get_path("include"),
    sysconfig.get_config_var("EXT_SUFFIX"),
    # torch carries pybind11's headers in its own include folder.
    Path(pybind11.origin).parent / "include" if pybind11 and pybind11.origin else root / "include",
    root,
    torch.__version__,
    torch.version.cuda or "none",
    found.nvcc or "none",
    " ".join(found.architectures) or "none",
    re.sub(r"[^\w .,:=+*/()'<>-]", "_", found.reason) or "none",  # it becomes a C++ string
    sep=";",
    end="",
)
