"""Builds the compiled ops with CMake, against the torch that is installed. All other metadata is in pyproject.toml.

FASTSIMGAN_CUDA=auto|on|off decides about the CUDA kernels: auto (the default) builds them if torch was built with
CUDA and there is an nvcc that fits it (csrc/find_nvcc.py), whether or not a GPU is present; it warns where only nvcc is
missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def tool(name: str) -> str:
    """A build tool from this Python's environment if it has one (pip's wheel), else from PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"error: building fastsimgan._C needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Runs CMakeLists.txt, which makes fastsimgan._C and, beside it, the library of the ops that it loads."""

    def copy_extensions_to_source(self) -> None:
        """Of an in-place or editable build: setuptools knows of the extension only."""
        super().copy_extensions_to_source()
        for library in Path(self.build_lib, "fastsimgan").glob("libfastsimgan_ops.*"):
            self.copy_file(str(library), "fastsimgan")

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            tool("cmake"),
            f"-S{Path(__file__).resolve().parent}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DFASTSIMGAN_PYTHON={sys.executable}",
            f"-DFASTSIMGAN_OUTPUT={library.parent}",
            f"-DFASTSIMGAN_CUDA={os.environ.get('FASTSIMGAN_CUDA', 'auto')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build)], check=True)


if importlib.util.find_spec("torch"):
    extensions = [Extension("fastsimgan._C", sources=[])]
elif os.environ.get("FASTSIMGAN_CUDA") == "on":
    sys.exit("error: FASTSIMGAN_CUDA=on needs torch at build time: install torch, then use --no-build-isolation")
else:
    print("fastsimgan: torch is not installed here, so the compiled ops are left out", file=sys.stderr)
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
