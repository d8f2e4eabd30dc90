"""What is installed: a wheel built from the tracked files, unpacked elsewhere, with and without torch at build time."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(destination: Path, **environment: str) -> Path:
    """A wheel from a copy of the sources, so that nothing that was built in place gets into it."""
    source = destination / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(destination), str(source)]
    subprocess.run(command, check=True, env=os.environ | environment, cwd=destination)
    (wheel,) = destination.glob("fastsimgan-*.whl")
    return wheel


def unpack(wheel: Path, destination: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(destination)
    # An editable install would step in for whatever the wheel lacks.
    (destination / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in finder.__module__]\n"
    )
    return destination


def python(*arguments: str, installed: Path) -> str:
    """Run Python with ``installed`` first on its path, from a folder that is not the repository.

    Without the ``site`` module (-S), since an editable install's import hook, which it sets up, would find in the
    repository what ``installed`` lacks.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, cwd=installed.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.partition(".")[0]) < 77:
        pytest.skip(f"pyproject.toml asks for setuptools 77 or later, {setuptools} is installed")
    return build(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        links = [member.filename for member in archive.infolist() if member.external_attr >> 28 == 0xA]
    assert {name.split("/")[0] for name in names} == {"fastsimgan", "fastsimgan-0.1.0.dist-info"}
    assert not links
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {name.removeprefix("fastsimgan/kernels/") for name in names if "/kernels/" in name} == kernels
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastsimgan").rglob("*.py")}
    assert {name for name in names if name.startswith("fastsimgan/") and name.endswith(".py")} >= modules
    libraries = sorted(name for name in names if name.endswith(".so"))
    assert len(libraries) == 2 and libraries[0].startswith("fastsimgan/_C.")
    assert libraries[1] == "fastsimgan/libfastsimgan_ops.so"


def test_installed_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    installed = unpack(wheel, tmp_path / "site")
    code = (
        "import importlib.util, fastsimgan, fastsimgan._C, fastsimgan.kernels\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "print(fastsimgan.__file__, fastsimgan._C.__file__, fastsimgan.kernels.__file__, sep=chr(10))\n"
    )
    for path in python("-c", code, installed=installed).splitlines():
        assert Path(path).is_relative_to(installed)
    assert "--synthetic" in python("-m", "fastsimgan.train", "--help", installed=installed)
    report = python("-m", "fastsimgan.env", installed=installed)
    assert "on cpu                  cpp" in report


def test_libraries_hold_no_path_of_the_build_machine(wheel: Path, tmp_path: Path) -> None:
    for library in (unpack(wheel, tmp_path) / "fastsimgan").glob("*.so"):
        content = library.read_bytes()
        assert str(Path(sys.prefix)).encode() not in content and b"RUNPATH" not in content


def test_without_torch_the_package_installs_without_its_extension(tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    """A module that hides torch from the build stands in for an environment that has none."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    wheel = build(tmp_path, PYTHONPATH=str(hidden))
    installed = unpack(wheel, tmp_path / "site")
    assert not list(installed.rglob("*.so"))
    report = python("-m", "fastsimgan.env", installed=installed)
    assert "fastsimgan._C cannot be imported" in report
    assert "pip install --no-build-isolation" in report
    assert "on cpu                  reference" in report


def test_cuda_on_is_refused_where_torch_has_no_cuda(tmp_path: Path) -> None:
    import torch

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if torch.version.cuda or cmake is None:
        pytest.skip("torch was built with CUDA" if torch.version.cuda else "cmake is not installed")
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), f"-DFASTSIMGAN_PYTHON={sys.executable}"]
    for value, message in [("on", "needs a torch built with CUDA"), ("yes", "must be auto, on or off, got 'yes'")]:
        done = subprocess.run([*command, f"-DFASTSIMGAN_CUDA={value}"], capture_output=True, text=True)
        assert done.returncode != 0
        assert message in " ".join(done.stderr.split())
