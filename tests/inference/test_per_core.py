"""A batch a core: the bytes of the refiner itself, in whatever number of threads, and torch left as it was."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from refiners import trained

from fastsimgan.config import TrainConfig
from fastsimgan.inference import load_refiner, per_core, save_refiner
from fastsimgan.inference.per_core import CoreRefiner
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.loading import load
from fastsimgan.refinement.run import refine

IMAGES = np.random.default_rng(0).integers(0, 256, (22, 9, 11), dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "refiner.safetensors"
    save_refiner(path, trained(1, width=8, blocks=1), histogram="keep", training=TrainConfig(histogram="keep"))
    return path


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("large", [False, True])
def test_bytes_do_not_depend_on_threads(threads: int, large: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_core, "LARGE", 1 if large else per_core.LARGE)
    before = torch.get_num_threads()
    refiner = CoreRefiner(partial(load_refiner, path, device="cpu"), threads)
    with refiner.shared(), ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda first: refiner(IMAGES[first : first + 4], 4), range(0, 22, 4)))
    assert np.array_equal(np.concatenate(found), load_refiner(path, device="cpu")(IMAGES, 4))
    assert torch.get_num_threads() == before


def test_small_images_take_a_thread_each_and_large_ones_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    at_work = threading.Semaphore(1)

    class Spy:
        channels, span, device, backend = 1, (0.0, 1.0), torch.device("cpu"), SimpleNamespace(name="spy")

        def __call__(self, images: np.ndarray, batch_size: int) -> np.ndarray:
            if len(images[0]) > 9:
                assert at_work.acquire(blocking=False)  # nobody else
                at_work.release()
            seen.append((len(images[0]), torch.get_num_threads()))
            return images

    monkeypatch.setattr(per_core, "LARGE", 200)
    refiner = CoreRefiner(Spy, 3)  # type: ignore[arg-type]
    with refiner.shared(), ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda images: refiner(images, 4), [IMAGES[:4], np.zeros((1, 20, 20), np.uint8)] * 5))
    assert set(seen) == {(9, 1), (20, 3)}


def test_the_command_line_refines_in_a_thread_a_core(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsimgan.refinement.loading.cores", lambda workers: 3)
    np.save(tmp_path / "in.npy", IMAGES)
    job = Job(path, tmp_path / "in.npy", tmp_path / "out.npy", batch_size=4, device="cpu")
    assert isinstance(load(job), CoreRefiner)
    report = refine(job)
    assert report.threads == {"read": 1, "refine": 3, "write": 1, "commit": 1}
    assert np.array_equal(np.load(tmp_path / "out.npy"), load_refiner(path, device="cpu")(IMAGES, 4))


def test_settings_of_the_process_come_back(path: Path) -> None:
    refiner = CoreRefiner(partial(load_refiner, path, device="cpu"), 2)
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.allow_tf32
    with refiner.shared():
        cudnn.allow_tf32 = not before  # as two calls at a time may leave it
    assert cudnn.allow_tf32 == before
