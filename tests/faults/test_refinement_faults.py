"""What happens to a run of refinement, and to its input, while nobody looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from builders import content, load_invert, make_folder, make_npz

from fastsimgan.errors import InputError
from fastsimgan.refine import main
from fastsimgan.refinement import worker_loop
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.session import open_session


class Killed(Exception):
    pass


@pytest.fixture
def begun(model: Path, tmp_path: Path, small_work_units: None, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A run of which all work units are committed, and which was killed before it was put together."""
    job = Job(model, make_folder(tmp_path / "in", 30), tmp_path / "out", batch_size=5)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(worker_loop, "_publish", killed)
        with pytest.raises(Killed):
            refine(job, loader=load_invert)
    return job


def edit(path: Path) -> None:
    """Another byte, of the same size, a moment later."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**6))


@pytest.mark.parametrize("name", ["d1/4.png", "d0/0.json", "README"])
def test_an_input_edited_between_kill_and_restart_is_named(name: str, begun: Job) -> None:
    edit(begun.input / name)
    with pytest.raises(InputError, match=f"in/{name}: must be as at the run's start, but was changed since"):
        refine(begun, loader=load_invert)
    assert not begun.output.exists()


def test_an_input_edited_after_the_end_is_not_complete_already(begun: Job, capsys) -> None:
    refine(begun, loader=load_invert)
    assert refine(begun, loader=load_invert).images == 30
    edit(begun.input / "d2" / "5.json")
    with pytest.raises(InputError, match="in/d2/5.json: must be as at the run's start"):
        refine(begun, loader=load_invert)


def test_an_input_edited_while_it_is_refined_is_not_published(
    model: Path, tmp_path: Path, small_work_units: None
) -> None:
    job = Job(model, make_folder(tmp_path / "in", 30), tmp_path / "out", batch_size=5)
    edited = []

    def progress(_: object) -> None:
        if not edited:
            edited.append(edit(job.input / "d0" / "3.json"))

    with pytest.raises(InputError, match="in/d0/3.json: must be as at the run's start"):
        refine(job, loader=load_invert, progress=progress)
    assert not job.output.exists()


def test_a_file_that_is_gone_is_said_to_be(begun: Job) -> None:
    (begun.input / "README").unlink()
    with pytest.raises(InputError, match=r"files must be those of the run's start"):
        refine(begun, loader=load_invert)


def test_an_untouched_input_goes_on(begun: Job, model: Path, tmp_path: Path) -> None:
    refine(begun, loader=load_invert)
    whole = Job(model, begun.input, tmp_path / "whole", batch_size=5)
    refine(whole, loader=load_invert)
    images = {name: found for name, found in content(begun.output).items() if not name.startswith(".fastsimgan")}
    assert images == {
        name: found for name, found in content(whole.output).items() if not name.startswith(".fastsimgan")
    }


@pytest.mark.parametrize("name", ["listing.jsonl", "listing.facts"])
def test_a_kept_listing_that_was_changed_is_refused(name: str, begun: Job) -> None:
    file = next(begun.output.parent.rglob(name))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: must have SHA-256"):
        open_session(begun)


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_workers_are_counted_before_anything_is_made(workers: str, model: Path, tmp_path: Path, capsys) -> None:
    source = make_npz(tmp_path / "in.npz", 4)
    flags = [
        "--refiner",
        str(model),
        "--input",
        str(source),
        "--output",
        str(tmp_path / "out.npz"),
        "--workers",
        workers,
    ]
    assert main(flags) == 2
    assert f"workers must be at least 1, got {workers}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "refiner.safetensors"]
