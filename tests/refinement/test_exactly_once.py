"""Exactly once: whatever is killed, and however often, nothing is lost, doubled or different."""

from __future__ import annotations

import fcntl
import functools
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    CONVERSIONS,
    MAKERS,
    Invert,
    content,
    load_dying,
    load_invert,
    load_mortal,
    make_folder,
    make_npy,
    make_npz,
    make_shards,
)

from fastsimgan.errors import FastSimGANError, InputError
from fastsimgan.refinement import local_workers, run_paths, worker_loop
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.manifest import Counts
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.run_directory import RunDirectory
from fastsimgan.refinement.session import open_session
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.verification import verify

TESTS = str(Path(__file__).resolve().parents[1])
RNG = np.random.default_rng(0)
KILLS = int(os.environ.get("FASTSIMGAN_KILLS", "4"))  # `make kills` sets 300
SETS = int(os.environ.get("FASTSIMGAN_KILL_SETS", "2"))  # and 25


# --- one process


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_that_failed_goes_on_and_ends_with_the_same_bytes(
    kind: str, model: Path, tmp_path: Path, small_work_units: None
) -> None:
    make, suffix = MAKERS[kind]
    source = make(tmp_path / f"in{suffix}", 95, 0)
    whole = Job(model, source, tmp_path / f"whole{suffix}", batch_size=5)
    refine(whole, loader=load_invert)

    class Failing(Invert):
        calls = 0

        def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
            Failing.calls += 1
            if Failing.calls % 9 == 0:
                raise RuntimeError("struck")
            return super().__call__(images, batch_size)

    job = Job(model, source, tmp_path / f"out{suffix}", batch_size=5)
    strikes = 0
    while True:
        try:
            report = refine(job, loader=lambda *_: Failing())
            break
        except RuntimeError:
            strikes += 1
            assert not job.output.exists()
    assert strikes >= 2
    assert report.images == 95
    assert content(job.output) == content(whole.output)
    assert verify(job.output).images == 95
    assert not list(tmp_path.glob("*.partial"))


def test_a_complete_output_is_left_as_it_is(model: Path, tmp_path: Path) -> None:
    job = Job(model, make_folder(tmp_path / "in", 10), tmp_path / "out")
    refine(job, loader=load_invert)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    report = refine(job, loader=load_mortal)
    assert (report.images, report.now) == (10, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("state", ["complete", "unfinished"])
def test_another_inputs_output_is_refused_by_the_inputs_names(state: str, model: Path, tmp_path: Path) -> None:
    job = Job(model, make_folder(tmp_path / "in", 10), tmp_path / "out")
    refine(job, loader=load_invert) if state == "complete" else open_session(job)
    where = tmp_path / ("out" if state == "complete" else "out.partial")
    with pytest.raises(InputError) as caught:
        open_session(replace(job, input=make_folder(tmp_path / "other", 12)))
    assert str(caught.value) == (
        f"{where}: is another run's output: its input is {tmp_path}/in, here it is {tmp_path}/other"
    )


@pytest.mark.parametrize("state", ["complete", "unfinished"])
@pytest.mark.parametrize("change", ["model", "batch_size", "link", "names"])
def test_another_runs_output_is_refused(state: str, change: str, model: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", 10)
    job = Job(model, source, tmp_path / "out", batch_size=64)  # a GPU has another default
    if state == "complete":
        refine(job, loader=load_invert)
    else:
        open_session(job)
    if change == "model":
        model.write_bytes(b"others")
    elif change == "names":
        (source / "d0" / "new.png").write_bytes((source / "d0" / "0.png").read_bytes())
    other = Job(model, source, tmp_path / "out", batch_size=7 if change == "batch_size" else 64, link=change == "link")
    expected = {
        "model": "its refiner sha256 is",
        "batch_size": "its batch size is 64, here it is 7",
        "link": "its link is False, here it is True",
        "names": r"files must be those of the run's start \(10 images, 13 others\), got 11 images, 13 others",
    }
    with pytest.raises(InputError, match=expected[change]):
        refine(other, loader=load_mortal)


def test_a_touched_folder_with_the_same_names_goes_on(model: Path, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", 10)
    job = Job(model, source, tmp_path / "out")
    open_session(job)
    (source / "d0" / "x").touch()
    (source / "d0" / "x").unlink()
    assert refine(job, loader=load_invert).images == 10


def test_a_block_that_another_worker_holds_is_waited_for(model: Path, tmp_path: Path, small_work_units: None) -> None:
    job = Job(model, make_folder(tmp_path / "in", 30), tmp_path / "out", batch_size=5)
    run = open_session(job).run
    code = (
        "import fcntl, sys, time\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    lease = run.state / "claims" / "00000001"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lease)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert run.lease(1) is None

    import threading

    def release() -> None:
        while run.committed() != set(range(run.work_units)) - {1}:
            time.sleep(0.01)
        holder.kill()  # the system frees the lock of the dead

    thread = threading.Thread(target=release)
    thread.start()
    report = refine(job, loader=load_invert)
    thread.join()
    holder.wait()
    holder.stdout.close()
    assert report.images == 30
    verify(job.output)


def test_a_file_system_without_locks_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(model, make_folder(tmp_path / "in", 3), tmp_path / "out")
    run = open_session(job).run

    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(FastSimGANError, match=r"the file system must offer locks \(flock\), got No locks available"):
        run.lease(0)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_full_disk_is_one_line_and_what_is_committed_stays(
    kind: str, model: Path, tmp_path: Path, small_work_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, suffix = MAKERS[kind]
    job = Job(model, make(tmp_path / f"in{suffix}", 60, 0), tmp_path / f"out{suffix}", batch_size=5)
    commits = 0
    commit = RunDirectory.commit

    def full(run: RunDirectory, *arguments: Any) -> None:
        nonlocal commits
        commits += 1
        if commits == 3:
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        commit(run, *arguments)

    monkeypatch.setattr(RunDirectory, "commit", full)
    with pytest.raises(InputError) as caught:
        refine(job, loader=load_invert)
    assert str(caught.value) == (
        f"{job.output}: cannot be written: No space left on device; what is committed stays: start again to go on"
    )
    monkeypatch.undo()
    monkeypatch.setattr(unit_parts, "SAMPLES_PER_UNIT", 10)
    monkeypatch.setattr(unit_parts, "BYTES_PER_UNIT", 10 * 35)
    run = open_session(job).run
    assert len(run.committed()) == 2
    assert refine(job, loader=load_invert).images == 60
    verify(job.output)


# --- verify


def test_verify_finds_what_was_changed(model: Path, tmp_path: Path, small_work_units: None) -> None:
    source = make_folder(tmp_path / "in", 25)

    def output(name: str, **settings: Any) -> Path:
        job = Job(model, source, tmp_path / name, batch_size=5, **settings)
        refine(job, loader=load_invert)
        assert verify(job.output) == Counts(work_units=3, images=25, failed=0, others=30)
        return job.output

    cases: list[tuple[str, Callable[[Path], object], str]] = [
        ("image", lambda out: (out / "d0" / "0.png").write_bytes(b""), r"0\.png: file must have SHA-256"),
        ("label", lambda out: (out / "d0" / "0.json").write_text("{}"), r"0\.json: file must have SHA-256"),
        ("gone", lambda out: (out / "d1" / "1.png").unlink(), r"1\.png: cannot be read: No such file"),
        ("extra", lambda out: (out / "d1" / "more").touch(), r"must hold the 55 files of its manifests, got 56"),
        ("manifest", lambda out: (out / ".fastsimgan/blocks/00000001.jsonl").unlink(), "not a whole manifest"),
        ("line", lambda out: rewrite(out / ".fastsimgan/blocks/00000001.jsonl"), "it was changed"),
    ]
    for name, damage, message in cases:
        damage(output(name))
        with pytest.raises(InputError, match=message):
            verify(tmp_path / name)
    shards = output("shards", to="shards")
    (shards / "00000001.tar").write_bytes((shards / "00000002.tar").read_bytes())
    with pytest.raises(InputError, match=r"00000001\.tar: file must have SHA-256"):
        verify(shards)
    with pytest.raises(InputError, match=r"00000001\.tar: must have SHA-256 \w+, as we wrote, got"):
        refine(Job(model, shards, tmp_path / "again"), loader=load_invert)


def rewrite(manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes().replace(b'"name": "d', b'"name": "e'))


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_verify_of_arrays(suffix: str, model: Path, tmp_path: Path, small_work_units: None) -> None:
    make = {".npz": make_npz, ".npy": make_npy}[suffix]
    job = Job(model, make(tmp_path / f"in{suffix}", 95), tmp_path / f"out{suffix}", batch_size=5)
    refine(job, loader=load_invert)
    assert verify(job.output) == Counts(work_units=10, images=95, failed=0, others=0)
    with np.load(job.output) if suffix == ".npz" else io.BytesIO() as loaded:
        labels = {"gaze": loaded["gaze"] + 1} if suffix == ".npz" else {}
        images = np.array(loaded["images"] if suffix == ".npz" else np.load(job.output))
    if labels:
        np.savez(job.output, images=images, **labels)
        with pytest.raises(InputError, match="array gaze must have SHA-256"):
            verify(job.output)
    images[50] += 1
    np.savez(job.output, images=images) if labels else np.save(job.output, images)
    with pytest.raises(InputError, match="images 50 to 59 must have SHA-256"):
        verify(job.output)


# --- several processes


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_the_number_of_workers_never_matters(kind: str, model: Path, tmp_path: Path) -> None:
    make, suffix = MAKERS[kind]
    source = make(tmp_path / f"in{suffix}", 60, 0)
    outputs = []
    for count in (1, 3):
        job = Job(model, source, tmp_path / f"out{count}{suffix}", batch_size=5)
        assert refine(job, workers=count, loader=load_invert).images == 60
        outputs.append(content(job.output))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("kind", ["folder", "npz"])
@pytest.mark.parametrize("believes", ["all is left", "nothing"])
def test_a_worker_that_comes_late_finds_the_run_published(
    kind: str, believes: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, suffix = MAKERS[kind]
    job = Job(model, make(tmp_path / f"in{suffix}", 60, 0), tmp_path / f"out{suffix}", batch_size=5)
    late = open_session(job)  # has opened the run, and then sleeps while another does all of it
    refine(job, loader=load_invert)
    done = content(job.output)
    if believes == "all is left":
        looks, real = iter([set()]), late.run.committed
        monkeypatch.setattr(late.run, "committed", lambda: next(looks) if looks.__length_hint__() else real())
    worker_loop.work(late, load_invert, 1, 2, lambda progress: None)
    assert content(job.output) == done and not run_paths.partial_of(job.output).exists()


def test_a_worker_that_starts_during_publication_looks_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(model, MAKERS["folder"][0](tmp_path / "in", 60, 0), tmp_path / "out", batch_size=5)
    refine(job, loader=load_invert)
    done, looks, real = content(job.output), iter([False, False]), run_paths.is_published
    monkeypatch.setattr(run_paths, "is_published", lambda *run: next(looks, None) is None and real(*run))
    run = open_session(job).run
    assert run.complete and content(job.output) == done and not run_paths.partial_of(job.output).exists()


def test_a_dead_workers_block_is_redone(model: Path, tmp_path: Path) -> None:
    job = Job(model, make_shards(tmp_path / "in", 60), tmp_path / "out", batch_size=5)
    assert refine(job, workers=2, loader=load_dying).images == 60
    assert (tmp_path / "mark").exists()
    verify(job.output)


def test_workers_that_keep_dying_are_given_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_workers, "DEATHS", 1)
    job = Job(model, make_shards(tmp_path / "in", 60), tmp_path / "out")
    with pytest.raises(FastSimGANError, match=r"workers must not die: 2 in a row did, the last with exit code -9"):
        refine(job, workers=1 + 1, loader=load_mortal)
    assert not (tmp_path / "out").exists()


def test_a_workers_error_is_the_runs(model: Path, tmp_path: Path) -> None:
    source = make_shards(tmp_path / "in", 60)
    shard = source / "s00020.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"s00020\.tar: "):
        refine(Job(model, source, tmp_path / "out"), workers=2, loader=load_invert)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import builders
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine

if __name__ in ("__main__", "__mp_main__"):
    unit_parts.SAMPLES_PER_UNIT = 10
    unit_parts.BYTES_PER_UNIT = 10 * 35
if __name__ == "__main__":
    job = Job(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), batch_size=5, to=sys.argv[5])
    refine(job, workers=int(sys.argv[4]), loader=builders.load_inverts)
"""


@pytest.mark.slow
def test_kills(model: Path, tmp_path: Path, small_work_units: None) -> None:
    """Whole process groups are killed at random moments; with another number of workers at every start. Those that are
    killed refine in two threads, the run to compare with in one.
    """
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=TESTS))
    rng = random.Random(int(os.environ.get("FASTSIMGAN_KILL_SEED", "0")))
    mark = tmp_path / "mark"
    kills = kills_at_work = 0
    kinds = [(kind, "same") for kind in MAKERS] + [(kind, to) for kind, tos in CONVERSIONS.items() for to in tos]
    for number in range(SETS):
        kind, to = kinds[number % len(kinds)]
        make, suffix = MAKERS[kind]
        if to in ("npz", "hdf5"):
            make = functools.partial(make, sizes=1)
        source = make(tmp_path / str(number) / f"in{suffix}", 200, number)
        ending = {"same": suffix, "npz": ".npz", "hdf5": ".h5"}.get(to, "")
        whole = Job(model, source, tmp_path / str(number) / f"whole{ending}", batch_size=5, to=to)  # type: ignore[arg-type]
        refine(whole, loader=load_invert)
        job = replace(whole, output=tmp_path / str(number) / f"out{ending}")
        share = KILLS // SETS
        for kill in range(share + 1):
            command = [sys.executable, str(script), *map(str, (model, source, job.output)), str(rng.randint(1, 4)), to]
            # so slow that a start does about one share-th of the work
            delay = 0.0 if kill == share else max(0.05, 0.016 * share)
            environment = os.environ | {"DELAY": str(delay), "MARK": str(mark)}
            mark.unlink(missing_ok=True)
            process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE)
            if kill < share:
                # most while blocks are in work; the others at any moment, the starting of Python apart
                partial = job.output.with_name(job.output.name + ".partial")
                awaited = mark if rng.random() < 0.7 else partial
                deadline = time.monotonic() + 30
                while not awaited.exists() and process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(rng.random() * 0.6)
                if process.poll() is None:
                    kills_at_work += mark.exists()
                    victim = rng.choice(["group", "parent"])
                    os.killpg(process.pid, signal.SIGKILL) if victim == "group" else process.kill()
                    kills += 1
                process.communicate()
            else:
                _, errors = process.communicate(timeout=120)
                assert process.returncode == 0, errors.decode()
        assert content(job.output) == content(whole.output), (number, kind, to)
        assert verify(job.output).images == 200
        assert not job.output.with_name(job.output.name + ".partial").exists()
    print(f"{kills} kills over {SETS} datasets, {kills_at_work} of them after a worker had begun")
    assert kills_at_work
