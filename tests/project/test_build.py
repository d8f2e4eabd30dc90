"""What is installed: a wheel built from the tracked files, unpacked elsewhere, with and without torch at build time.

And which nvcc builds the CUDA kernels: none, in an install that goes through, where torch has CUDA and no nvcc fits it.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "csrc"))  # find_nvcc.py is of the build and not of the package

from find_nvcc import find_nvcc  # noqa: E402


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


@pytest.mark.slow
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
    package = (ROOT / "fastsimgan").rglob("*")
    templates = {str(path.relative_to(ROOT)) for path in package if path.suffix in (".html", ".md")}
    assert len(templates) == 3 and templates <= {*names}
    libraries = sorted(name for name in names if name.endswith(".so"))
    assert len(libraries) == 2 and libraries[0].startswith("fastsimgan/_C.")
    assert libraries[1] == "fastsimgan/libfastsimgan_ops.so"


@pytest.mark.slow
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
    page = python(
        "-c", "from fastsimgan.reporting.html_report import Report; print(Report('A<B').html())", installed=installed
    )
    assert "<title>A&lt;B</title>" in page  # from a template file


@pytest.mark.slow
def test_libraries_hold_no_path_of_the_build_machine(wheel: Path, tmp_path: Path) -> None:
    for library in (unpack(wheel, tmp_path) / "fastsimgan").glob("*.so"):
        content = library.read_bytes()
        assert str(Path(sys.prefix)).encode() not in content and b"RUNPATH" not in content


@pytest.mark.slow
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


def configure(folder: Path, cuda: str, python: str = sys.executable, **environment: str) -> tuple[int, str]:
    """CMake's exit code and what it says, in one line, of FASTSIMGAN_CUDA=``cuda``."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("no cmake" if cmake is None else "no C++ compiler")
    command = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DFASTSIMGAN_PYTHON={python}", f"-DFASTSIMGAN_CUDA={cuda}"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return done.returncode, " ".join(done.stderr.split())


def test_cuda_on_is_refused_where_torch_has_no_cuda(tmp_path: Path) -> None:
    import torch

    if torch.version.cuda:
        pytest.skip("torch was built with CUDA")
    for value, message in [("on", "needs a torch built with CUDA"), ("yes", "must be auto, on or off, got 'yes'")]:
        code, said = configure(tmp_path, value)
        assert code != 0
        assert message in said


def pretend_nvcc(folder: Path, release: str = "13.0", architectures: str = "80 90 100", compiles: bool = True) -> str:
    """A script that answers what the build asks of nvcc."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.1';;\n"
        f"--list-gpu-arch) printf 'compute_%s\\n' {architectures};;\n"
        f"*) echo 'probe.cu(1): error: this host compiler is too new' >&2; exit {0 if compiles else 1};;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with none, whatever this one has: only folders that a test names are searched."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    which = shutil.which
    monkeypatch.setattr(
        "find_nvcc.shutil.which", lambda name, path=None: None if "/usr/local" in str(path) else which(name, path=path)
    )
    return monkeypatch


def test_nvcc_that_fits_is_found(no_nvcc: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_nvcc("13.0").reason == "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
    newer = pretend_nvcc(tmp_path / "on_path", "13.1")
    no_nvcc.setenv("PATH", str(tmp_path / "on_path"))
    assert find_nvcc("13.0") == (newer, ("80-real", "90-real", "100"), "")
    # CUDA_HOME goes before PATH, but an nvcc of another CUDA there is no reason to build without
    no_nvcc.setenv("CUDA_HOME", str(tmp_path / "home"))
    pretend_nvcc(tmp_path / "home" / "bin", "12.6", "80 90")
    assert find_nvcc("13.0").nvcc == newer
    assert find_nvcc("12.6").architectures == ("80-real", "90")
    # what was asked for by name counts alone
    no_nvcc.setenv("CUDACXX", str(tmp_path / "home" / "bin" / "nvcc"))
    assert "got nvcc 12.6" in find_nvcc("13.0").reason
    assert find_nvcc("13.0", newer).nvcc == newer


def test_nvcc_that_does_not_fit_says_why(no_nvcc: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for arguments, reason in [
        ({"release": "12.6"}, "nvcc must have the major version of torch's CUDA 13.0, got nvcc 12.6"),
        ({"architectures": "120"}, "nvcc 13.0 knows none of sm_80, sm_90, sm_100"),
        ({"compiles": False}, "nvcc 13.0 compiles nothing here: probe.cu(1): error: this host compiler is too new"),
    ]:
        no_nvcc.setenv("CUDACXX", pretend_nvcc(tmp_path, **arguments))
        assert find_nvcc("13.0").reason == reason
    no_nvcc.setenv("CUDACXX", "/no/nvcc")
    assert find_nvcc("13.0").reason == "nvcc --version does not run: FileNotFoundError"


def test_torch_with_cuda_and_no_nvcc_that_fits_builds_the_cpus_ops_and_warns_once(tmp_path: Path) -> None:
    """What `pip install torch` gives on Linux is built with CUDA, and most machines have no nvcc."""
    torch = tmp_path / "hidden" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("__version__ = '2.99.0+cu130'\nclass version:\n    cuda = '13.0'\n")
    environment = {"PYTHONPATH": str(torch.parent), "CUDACXX": pretend_nvcc(tmp_path, "12.4")}
    reason = "nvcc must have the major version of torch's CUDA 13.0, got nvcc 12.4"

    code, said = configure(tmp_path / "auto", "auto", **environment)
    assert code == 0, said
    assert said.count("CMake Warning") == 1 and reason in said and "CUDACXX=/path/to/nvcc" in said
    rules = "".join(path.read_text() for path in (tmp_path / "auto").rglob("flags.make"))
    rules += "".join(path.read_text() for path in (tmp_path / "auto").glob("build.ninja"))
    assert "FASTSIMGAN_WITH_CUDA=0" in rules and "FASTSIMGAN_WITH_CUDA=1" not in rules
    assert "got nvcc 12.4" in rules  # the extension knows why: env prints it

    code, said = configure(tmp_path / "on", "on", **environment)
    assert code != 0 and "needs an nvcc that fits torch 2.99.0+cu130" in said and reason in said
    code, said = configure(tmp_path / "off", "off", **environment)
    assert code == 0 and not said


def test_what_the_extension_takes_from_torch_is_in_the_oldest_one() -> None:
    """Each was looked up in the headers of torch 2.11. `make cuda-check` compiles against them where it can."""
    known = {
        *("STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX", "TORCH_ERROR_CODE_CHECK"),
        *("aoti_torch_get_current_cuda_stream", "torch::headeronly::MemoryFormat::ChannelsLast"),
        *("torch::headeronly::ScalarType", "torch::stable::Tensor", "torch::stable::accelerator::DeviceGuard"),
        *("torch::stable::empty", "torch::stable::empty_like", "torch::stable::new_empty"),
        "torch::stable::parallel_for",
        *("torch/csrc/stable/accelerator.h", "torch/csrc/stable/library.h", "torch/csrc/stable/ops.h"),
        *("torch/csrc/stable/tensor.h", "torch/headeronly/util/BFloat16.h", "torch/headeronly/util/Half.h"),
        "torch/headeronly/util/shim_utils.h",
    }
    pattern = r"\b(?:STABLE_|STD_)?TORCH_[A-Z_]+\b|\baoti_torch_\w+|\btorch::\w+(?:::\w+)+|<(torch/[\w/]+\.h)>"
    for path in [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.h")]:
        used = {match[1] or match[0] for match in re.finditer(pattern, path.read_text())}
        assert used <= known, f"{path.name}: look it up in the headers of the oldest torch"


def test_a_build_without_cuda_tells_it_once_where_cuda_tensors_come(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fastsimgan.ops import _extension, history_swap

    info = {"cuda": False, "torch": "2.99.0+cu130", "no_cuda": "no nvcc here"}
    monkeypatch.setattr(_extension, "BUILD_INFO", info)
    history_swap._say_once.cache_clear()
    reason = "fastsimgan._C was built without CUDA, against torch 2.99.0\\+cu130: no nvcc here"
    assert re.fullmatch(reason, str(history_swap.implementations()["cuda"]))
    with pytest.warns(UserWarning, match=reason) as caught:
        for _ in range(3):
            history_swap._choose("auto", torch.device("cuda"))
            history_swap._choose("auto", torch.device("cpu"))
    assert len(caught) == 1
    history_swap._say_once.cache_clear()
