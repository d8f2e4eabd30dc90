"""README and docs/ hold what they say: code runs, flags exist, links lead somewhere, messages are the package's own."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastsimgan
from fastsimgan import cli
from fastsimgan.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
MOST_LINES = 120  # of README
LEAST = 25  # characters of a warning's own; shorter ones are frames ("warning: …") for texts that stand elsewhere

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
_MESSAGE = re.compile(r"\*\*`([^`]+)`\*\*")  # as troubleshooting quotes them
_SHELL = {"", "bash", "sh", "console"}

#: Flags that are other programs', where they stand in inline code; or stand for any flag.
_FOREIGN = {"--no-build-isolation", "--nproc-per-node", "--noTF32", "--some-name", "--no-some-name"}

#: Each way to ask for a command's help.
_HELPS = (
    ("train",),
    ("refine",),
    ("evaluate",),
    ("export",),
    ("demo",),
    ("env",),
    ("data",),
    ("turing", "make"),
    ("turing", "score"),
    ("experiments", "gaze"),
    ("experiments", "hand"),
    ("experiments", "ablation-local"),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of a page's fenced blocks."""
    return [(found[1], found[2]) for found in _FENCE.finditer(page.read_text())]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `python -m fastsimgan...` in a page's shell blocks, from the module's name on."""
    for language, code in blocks(page):
        if language not in _SHELL:
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words[:-1]):
                if word == "-m" and words[place + 1].partition(".")[0] == "fastsimgan":
                    yield words[place + 1 :]


def main_of(module: str) -> Callable[[Sequence[str]], int]:
    """What `python -m MODULE` calls with its arguments."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    main: Callable[[Sequence[str]], int] = found.main
    return main


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Commands are parsed, by the parser that they have, and not run; what was parsed."""
    pytest.importorskip("tyro")
    parsed: list[object] = []
    run = cli.run

    def parse(command: object, config: Any, **options: Any) -> int:
        return run(parsed.append, config, **options)

    monkeypatch.setattr(cli, "run", parse)
    return parsed


def test_readme_is_read_in_a_minute() -> None:
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r"^ +- (?:[^\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page != README)


def slug(heading: str) -> str:
    """The anchor of a heading, as MkDocs makes it."""
    plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), f"{name}: {link}"
        assert page == README or target.is_relative_to(DOCS), f"{name}: {link} is not among the built pages"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(target), re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{name}: {link}"


@pytest.mark.parametrize("name", [name for name in NAMES if any(commands(ROOT / name))])
def test_commands_are_ones_that_their_parsers_take(
    name: str, only_parsed: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.json").write_text(TrainConfig().to_json())  # for --resume
    for module, *arguments in commands(ROOT / name):
        before = len(only_parsed)
        try:
            code = main_of(module)(arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
        assert (code, len(only_parsed)) == (0, before + 1), f"{name}: {module} {shlex.join(arguments)}"


def test_a_flag_that_is_not_there_is_found(only_parsed: list[object]) -> None:
    with pytest.raises(SystemExit):
        main_of("fastsimgan.train")(["--no-such-flag", "1"])
    assert not only_parsed


def flags_of(command: str, *words: str) -> set[str]:
    """Every flag in a command's help."""
    arguments = [sys.executable, "-m", f"fastsimgan.{command}", *words, "--help"]
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z][\w-]*", done.stdout))


def test_every_command_is_among_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    page, seen = (DOCS / "api/flags.md").read_text(), []

    def see(command: object, config: Any, **_: object) -> int:
        seen.extend(config.values() if isinstance(config, Mapping) else [config])
        return 0

    monkeypatch.setattr(cli, "run", see)
    for command, *words in _HELPS:
        main_of(f"fastsimgan.{command}")(words)
    assert len(seen) >= len(_HELPS)
    for config in seen:
        if dataclasses.fields(config):
            assert f"::: {config.__module__}.{config.__name__}\n" in page


@pytest.mark.slow
def test_flags_in_the_prose_are_flags_of_some_command() -> None:
    pytest.importorskip("tyro")
    known = set.union(_FOREIGN, *(flags_of(*words) for words in _HELPS)) | {"--help"}
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", _MESSAGE.sub("", prose(page))):
            for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code):
                assert flag in known, f"{page.relative_to(ROOT)}: {flag}"


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        shell = "\n".join(code for language, code in blocks(page) if language in _SHELL)
        named = re.findall(r"`make ([a-z-]+)", prose(page)) + re.findall(r"^make ([a-z-]+)", shell, re.M)
        assert set(named) <= targets, page


@pytest.mark.parametrize("name", NAMES)
def test_what_the_api_shows_is_there_and_documented(name: str) -> None:
    for path in re.findall(r"^::: (\S+)$", (ROOT / name).read_text(), re.M):
        module, rest = path, []
        while importlib.util.find_spec(module.rpartition(".")[0]) and not _is_module(module):
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
        found = functools.reduce(getattr, rest, importlib.import_module(module))
        assert found.__doc__, path


def _is_module(name: str) -> bool:
    parent, _, last = name.rpartition(".")
    found = importlib.import_module(parent)
    return hasattr(found, "__path__") and importlib.util.find_spec(name) is not None


# Messages


_WARNS = re.compile(r"^(warnings\.)?warn$|\.warning$")


def texts() -> Iterator[tuple[str, bool]]:
    """Every text in the package's source, `…` in place of what it is formatted with; and whether it is a warning."""
    for file in sorted((ROOT / "fastsimgan").rglob("*.py")):
        tree = ast.parse(file.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        warned = {
            id(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and node.args and _WARNS.search(ast.unparse(node.func))
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
                yield "".join(parts), id(node) in warned or parts[0].startswith("warning: ")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield node.value, id(node) in warned or node.value.startswith("warning: ")


def says(text: str, message: str) -> bool:
    """Whether ``text`` holds the parts of ``message`` between each `…`, in their order."""
    place = 0
    for part in filter(str.strip, message.split("…")):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_messages_of_the_troubleshooting_are_the_packages_and_no_warning_is_missing() -> None:
    page = (DOCS / "guides/troubleshooting.md").read_text()
    messages = _MESSAGE.findall(page)
    said = list(texts())
    assert len(messages) > 80
    assert [each for each in messages if not any(says(text, each) for text, _ in said)] == []
    warnings = [text for text, warns in said if warns and len(text.replace("…", "")) > LEAST]
    assert len(warnings) > 5
    assert [text for text in warnings if not any(says(text, each) for each in messages)] == []


# Code that runs

_SMALL = {"steps": 2, "batch_size": 4, "pretrain_discriminator": 0, "history": 4, "device": "cpu"}
_SMALL_FLAGS = "--preset quick --steps 2 --batch-size 4 --pretrain-discriminator 0 --history 4 --device cpu".split()


def pictures(count: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def small(function: Callable[..., Any], *, config: bool = False, **settings: Any) -> Callable[..., Any]:
    """``function`` in seconds: with these settings, or with those of its TrainConfig replaced."""

    def call(*arguments: Any, **given: Any) -> Any:
        if config:
            *images, last = arguments
            return function(*images, dataclasses.replace(last, **settings), **given)
        return function(*arguments, **{**given, **settings})

    return call


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Runs code as a module in an empty folder, where the names that pages use are small arrays."""
    images, gaze = pictures(8, 36, 40), np.zeros((8, 2))
    names = {"synthetic": images, "real": images, "photos": images, "gaze": gaze, "true_gaze": gaze}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastsimgan, "fit", small(fastsimgan.fit, config=True, **_SMALL), raising=False)
    monkeypatch.setattr(fastsimgan, "load_refiner", small(fastsimgan.load_refiner, device="cpu"), raising=False)
    evaluate = small(fastsimgan.evaluate, seeds=1, steps=1, device="cpu")
    monkeypatch.setattr(fastsimgan, "evaluate", evaluate, raising=False)

    def run(code: str) -> Any:
        (tmp_path / "page.py").write_text(code)
        spec = spec_from_file_location("page", tmp_path / "page.py")
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        module.__dict__.update(names)
        spec.loader.exec_module(module)
        return module

    return run


def python_of(name: str) -> str:
    """A page's python blocks, one after the other, as one reads them."""
    return "\n".join(code for language, code in blocks(ROOT / name) if language == "python")


@pytest.mark.parametrize("name", [name for name in NAMES if python_of(name) and "exported/" not in python_of(name)])
def test_python_of_the_pages_runs(name: str, notebook: Callable[[str], Any], tmp_path: Path) -> None:
    page = notebook(python_of(name))
    assert page.refined.shape == page.synthetic.shape and page.refined.dtype == page.synthetic.dtype
    assert len(list(tmp_path.glob("runs/*/refiner.safetensors"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "exported/" in python_of(name)])
def test_python_with_exported_files_runs(name: str, notebook: Callable[[str], Any]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from fastsimgan.exporting.export import export

    fastsimgan.fit(pictures(8, 36, 40), pictures(8, 36, 40), TrainConfig(out=Path("runs/mine")))
    export(Path("runs/mine"), Path("exported"))
    page = notebook(python_of(name))
    assert page.refined.shape == page.synthetic.shape


@pytest.mark.slow
def test_the_two_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tyro")
    section = README.read_text().partition("## Your own images")[2]
    train, refine = (shlex.split(line)[2:] for line in section.partition("```\n")[2].partition("```")[0].splitlines())
    assert (train[0], refine[0]) == ("fastsimgan.train", "fastsimgan.refine")
    renders, photos = tmp_path / "renders/rgb", tmp_path / "photos"
    renders.mkdir(parents=True)
    photos.mkdir()
    for i, render in enumerate(pictures(6, 40, 52, 3)):
        Image.fromarray(render).save(renders / f"{i:04}.png")
        (renders / f"{i:04}.txt").write_text(f"{i} 0.5 0.5 0.2 0.2\n")
    for i in range(6):
        Image.fromarray(pictures(1, 48 + 7 * i, 90 - 5 * i, 3, seed=i)[0]).save(photos / f"IMG_{i}.jpg")
    monkeypatch.chdir(tmp_path)
    assert main_of(train[0])([*train[1:], *_SMALL_FLAGS]) == 0
    assert main_of(refine[0])([*refine[1:], "--device", "cpu"]) == 0

    refined = tmp_path / "refined"
    assert {each.name for each in renders.iterdir()} == {each.name for each in refined.glob("0*")}
    for render in renders.iterdir():
        if render.suffix == ".txt":
            assert (refined / render.name).read_bytes() == render.read_bytes()
        else:
            before, after = Image.open(render), Image.open(refined / render.name)
            assert (before.size, before.mode) == (after.size, after.mode)


# The site


@pytest.mark.slow
def test_pages_build_without_a_warning_and_ask_no_other_host(tmp_path: Path) -> None:
    python = ROOT / ".venv-docs/bin/python"
    if not python.exists():
        pytest.skip("no .venv-docs: make docs sets it up")
    for name in ("mkdocs.yml", "docs", "fastsimgan"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    arguments = [python, "-m", "mkdocs", "build", "--strict"]  # --quiet would keep warnings from --strict too
    done = subprocess.run(
        arguments,
        cwd=tmp_path,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) >= len(PAGES) - 1
    loads = (
        r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link(?![^>]+rel=\"?canonical)[^>]+href=\"?(?:https?:)?//"
    )
    for page in built:
        assert not re.search(loads, page.read_text()), page.name
