"""Images of any sizes in training: packed sets, crops by position, one pixel scale, and runs that are resumed."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsimgan.config import TrainConfig
from fastsimgan.data import ragged
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.preprocess import equalised
from fastsimgan.data.ragged import CentreCrops, Packer, RaggedImages, pack
from fastsimgan.data.reading import Reading
from fastsimgan.data.resizing import Scale, rescale, resize
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError
from fastsimgan.models.discriminator import Discriminator, receptive_field
from fastsimgan.train import main
from fastsimgan.training import crops
from fastsimgan.training.batches import open_batches
from fastsimgan.training.crops import choose_crop, field, step_bytes
from fastsimgan.training.data_parallel import DataParallelGroup
from fastsimgan.training.image_store import HostImages, ResidentCrops
from fastsimgan.training.loop import fit
from fastsimgan.training.simgan import SimGAN

CPU = torch.device("cpu")
SMALL = TrainConfig(
    steps=4, batch_size=4, hidden_channels=20, blocks=1, history=8, pretrain_discriminator=1, eval_every=2,
    checkpoint_every=2, keep=9, device="cpu",
)  # fmt: skip


def quiet(_: str) -> None:
    pass


def several(count: int, seed: int, dtype: str = "uint8", channels: int = 1, least: int = 24) -> RaggedImages:
    """Images of noise, each of a size of its own."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(least, least + 20, (count, 2))
    made = []
    for height, width in sizes.tolist():
        values = draw.integers(0, 65536, (height, width, channels)[: 2 if channels == 1 else 3], dtype=np.uint16)
        made.append({"uint8": values >> 8, "uint16": values, "float32": values / 65535}[dtype].astype(dtype))
    found = pack(made)
    assert isinstance(found, RaggedImages)
    return found


# --- sets


def test_a_packed_set_gives_its_images_back_and_no_other_kind() -> None:
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((3, 4), (5, 2), (1, 7))]
    packed = pack(images)
    assert isinstance(packed, RaggedImages) and packed.channels == 3 and len(packed) == 3
    assert all(np.array_equal(packed[i], image) for i, image in enumerate(images))
    some = packed.only([2, 0])
    assert np.array_equal(some[0], images[2]) and np.array_equal(some[1], images[0]) and some.flat is packed.flat
    assert isinstance(pack([images[0], images[0]]), np.ndarray)
    array = draw.integers(0, 256, (4, 5, 6), dtype=np.uint8)
    assert all(np.array_equal(RaggedImages.of(array)[i], array[i]) for i in range(4))
    for other in (images[0][..., 0], images[0].astype(np.uint16)):
        with pytest.raises(InputError, match="one type and number of channels, number 0 is uint8.*number 1"):
            pack([images[0], other])


def test_centre_crops_are_the_middle() -> None:
    images = several(5, 0)
    centre = CentreCrops(images, (9, 12))
    assert centre.shape == (5, 9, 12)
    for i, crop in enumerate(centre[:]):
        top, left = (images.sizes[i] - (9, 12)) // 2
        assert np.array_equal(crop, images[i][top : top + 9, left : left + 12])
    assert np.array_equal(centre[np.array([4, 1])], centre[:][[4, 1]])
    assert np.array_equal(centre[::2], centre[:][::2])


@pytest.mark.parametrize("room", [1 << 40, 1000])
def test_a_packer_gives_the_same_set_from_memory_and_from_a_file(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "available_memory", lambda: room)
    images = several(9, 1, "uint16")
    packer, equal = Packer(Path("x")), Packer(Path("x"))
    for i in range(9):
        packer.add(np.array(images[i]))
        equal.add(np.array(images[0]))
    found = packer.finish()
    assert isinstance(found, RaggedImages) and found.mapped == (room == 1000)
    assert np.array_equal(found.flat, images.flat) and np.array_equal(found.sizes, images.sizes)
    array = equal.finish()
    assert isinstance(array, np.ndarray) and np.array_equal(array, np.stack([images[0]] * 9))


# --- one pixel scale


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_resizing_folds_no_detail_and_keeps_types(dtype: str, channels: int) -> None:
    white = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    stripes = np.zeros((60, 80, channels), dtype)
    stripes[::2] = white
    pixels = stripes[..., 0] if channels == 1 else stripes
    small = resize(pixels, (20, 30))
    assert small.dtype == pixels.dtype and small.shape == (20, 30, *pixels.shape[2:])
    # rows of black and white become grey; the nearest pixel would give either
    assert np.abs(small[3:-3].astype(float) / white - 0.5).max() < 0.02
    assert np.array_equal(resize(np.full_like(pixels, white), (20, 30)), np.full_like(small, white))
    assert resize(pixels, (60, 80)) is pixels


def test_16_bits_are_resized_in_16_bits() -> None:
    ramp = np.tile(np.arange(0, 60000, 100, dtype=np.uint16), (8, 1))
    small = resize(ramp, (4, 300))
    assert np.abs(small[2, 10:-10].astype(int) - (ramp[0, 20:-20:2].astype(int) + 50)).max() <= 1


def test_photos_much_larger_than_renders_get_their_height() -> None:
    scale = Scale(height=480)
    assert scale.of(1080, 1920) == (480, 853)
    assert scale.of(600, 800) == (600, 800)  # a quarter larger is left alone
    assert scale.of(100, 900) == (100, 900)
    assert Scale(factor=0.5).of(101, 10) == (50, 5)
    images = several(4, 0)
    assert rescale(images, Scale()) is images
    halved = rescale(images, Scale(factor=0.5))
    assert [tuple(size) for size in halved.sizes.tolist()] == [Scale(factor=0.5).of(*s) for s in images.sizes.tolist()]
    assert rescale(np.zeros((3, 40, 60), np.uint8), Scale(height=20)).shape == (3, 20, 30)


# --- which crop


def test_the_least_crop_is_what_the_networks_see() -> None:
    assert (receptive_field("gaze"), receptive_field("hand")) == (23, 71)
    for kind in ("gaze", "hand"):
        torch.manual_seed(0)
        network = Discriminator(1, kind=kind)
        images = torch.randn(1, 1, 321, 321, requires_grad=True)
        logits = network(images)
        middle = logits.shape[2] // 2
        logits[0, 0, middle, middle].backward()
        assert images.grad is not None
        seen = images.grad[0, 0].abs().nonzero()
        extent = seen.max(0).values - seen.min(0).values + 1
        assert int(extent.max()) <= receptive_field(kind)  # a max-pool passes some of its gradients on
        assert int(extent.max()) > receptive_field(kind) - 16
    assert field(TrainConfig()) == 23 and field(TrainConfig(blocks=10)) == 43
    assert field(TrainConfig(network="hand", blocks=10)) == 71


def test_crops_are_as_large_as_images_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "available_memory", lambda: 1 << 40)
    config = TrainConfig()

    def chosen(*shapes: tuple[int, int], config: TrainConfig = config) -> crops.Crop:
        flat = np.zeros(sum(h * w for h, w in shapes), np.uint8)
        made = RaggedImages(flat, np.array(shapes, np.int64), 1)
        return choose_crop({"synthetic": made, "real": made}, config, CPU)

    assert chosen((35, 55), (35, 55)) == crops.Crop((35, 55), True, "")
    assert chosen((224, 224)) == crops.Crop((224, 224), True, "")  # the hands, in whatever batches
    found = chosen((480, 640), (1080, 1920))
    pixels = found.size[0] * found.size[1]
    assert not found.whole and all(side % crops.STEP == 0 for side in found.size)
    assert 0.8 * crops.BUDGET["cpu"] < pixels * step_bytes(config, 1) <= crops.BUDGET["cpu"]
    assert "2 sizes from 480x640 to 1080x1920" in found.reason and "0.5 GiB" in found.reason
    wide = chosen((37, 4000), (40, 5000)).size  # all of the height, and what memory is left in the width
    assert wide[0] == 37 and wide[1] > found.size[1]
    high = chosen((4000, 37), (5000, 40)).size
    assert high[1] == 37 and high[0] > found.size[0]
    assert chosen((100, 31), (40, 55)).size == (40, 31)
    assert chosen((480, 640), config=dataclasses.replace(config, batch_size=2, history=0)).size[0] > found.size[0]
    monkeypatch.setattr(crops, "available_memory", lambda: 1 << 28)
    assert "0.12 GiB a step" in chosen((480, 640)).reason and chosen((480, 640)).size < found.size
    monkeypatch.setattr(crops, "available_memory", lambda: 1 << 22)
    assert chosen((480, 640)).size == (23, 23) and "a step takes about 0.036 GiB" in chosen((480, 640)).reason
    monkeypatch.setattr(crops, "available_memory", lambda: 1 << 40)
    # a run that says nothing of crops was on whole images
    assert chosen((480, 640), config=dataclasses.replace(config, resume=True)).whole


def test_ranks_agree_on_the_crop_and_share_its_batch() -> None:
    sets = {"synthetic": np.zeros((2, 480, 640), np.uint8), "real": np.zeros((2, 480, 640), np.uint8)}

    class Group(DataParallelGroup):
        """The other ranks have ``free`` bytes."""

        def __init__(self, size: int, free: int) -> None:
            super().__init__(0, size)
            self.free = free

        def largest(self, value: int) -> int:
            return max(value, -self.free)

    alone, both = (choose_crop(sets, TrainConfig(), CPU, Group(size, 1 << 29 - size)) for size in (1, 2))
    assert alone.size == both.size and "0.25 GiB a step" in alone.reason and "0.12 GiB a step" in both.reason


def test_a_crop_of_the_users_must_fit() -> None:
    sets = {"synthetic": several(4, 0, least=40), "real": several(5, 1, least=30)}

    def chosen(crop: tuple[int, int]) -> crops.Crop:
        return choose_crop(sets, dataclasses.replace(SMALL, crop=crop), CPU)

    assert chosen((24, 30)) == crops.Crop((24, 30), False, "24x30 at random places (--crop)")
    with pytest.raises(InputError, match="--crop must fit every image, got 50x30 and real image . of "):
        choose_crop({"real": sets["real"]}, dataclasses.replace(SMALL, crop=(50, 30)), CPU)
    with pytest.raises(InputError, match="--crop must be at least 23x23, .*got 22 wide"):
        chosen((24, 22))
    with pytest.raises(InputError, match="--crop must be at least 1x1"):
        dataclasses.replace(SMALL, crop=(0, 4)).validate()
    tiny = {"synthetic": np.zeros((3, 16, 20), np.uint8), "real": np.zeros((3, 16, 21), np.uint8)}
    with pytest.raises(InputError, match="synthetic images of several sizes must be at least 23x23.*16x20 .image 0"):
        choose_crop(tiny, SMALL, CPU)
    assert choose_crop(tiny, dataclasses.replace(SMALL, crop=(16, 20)), CPU).size == (16, 20)
    whole = {"synthetic": np.zeros((3, 16, 20), np.uint8), "real": np.zeros((3, 16, 20), np.uint8)}
    assert choose_crop(whole, dataclasses.replace(SMALL, crop=(16, 20)), CPU).whole


# --- drawing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_crops_are_parts_of_their_images_wherever_they_live(dtype: str, channels: int) -> None:
    images = several(7, 0, dtype, channels)
    size = (20, 17)
    device = ResidentCrops(images, Sampler(7, 5), CPU, size)
    host = HostImages(images, Sampler(7, 5), CPU, 6, size)
    drawn = torch.cat([device.draw(count) for count in (4, 6, 11)])
    assert torch.equal(drawn, torch.cat([host.draw(count) for count in (3, 9, 9)]))
    assert drawn.shape == (21, channels, *size)
    reference = Sampler(7, 5)
    indices, positions = reference.draw_at(21)
    assert positions.tolist() == list(range(21))
    free = torch.from_numpy(images.sizes[indices.numpy()] - size + 1)
    tops, lefts = reference.corners(positions, *free.unbind(1))
    for crop, index, top, left in zip(drawn, indices.tolist(), tops.tolist(), lefts.tolist(), strict=True):
        part = images[index][top : top + 20, left : left + 17]
        assert np.array_equal(crop.permute(1, 2, 0).numpy().reshape(part.shape), part)


def test_a_draw_is_a_function_of_its_position() -> None:
    images = several(7, 0)
    whole = ResidentCrops(images, Sampler(7, 5), CPU, (20, 17)).draw(40)
    late = ResidentCrops(images, Sampler(7, 5), CPU, (20, 17))
    late.sampler.restart(23, 0)
    assert torch.equal(late.draw(17), whole[23:])
    late.sampler.restart(0, 1)
    assert not torch.equal(late.draw(40), whole)
    late.sampler.restart(0, 0)
    assert torch.equal(late.draw(40), whole)
    ranks = [ResidentCrops(images, Sampler(7, 5, rank=rank, ranks=2), CPU, (20, 17)) for rank in (0, 1)]
    one, other = (pool.draw(20) for pool in ranks)
    assert torch.equal(one, whole[::2]) and torch.equal(other, whole[1::2])


def test_corners_are_everywhere_equally_often_and_unrelated() -> None:
    sampler = Sampler(3, 0)
    count = 40_000
    positions = torch.arange(count) + 2**33
    rows, columns = torch.full((count,), 10), torch.full((count,), 8)
    top, left = sampler.corners(positions, rows, columns)
    cells = torch.bincount(top * 8 + left, minlength=80)
    expected = count / 80
    assert float(((cells - expected) ** 2 / expected).sum()) < 140  # chi square with 79 degrees: 1 in 30,000
    following = torch.bincount(top[:-1] * 10 + top[1:], minlength=100)
    assert float(((following - (count - 1) / 100) ** 2 / ((count - 1) / 100)).sum()) < 170
    for others in (
        Sampler(3, 1).corners(positions, rows, columns),
        sampler.corners(positions + 2**32, rows, columns),
    ):
        assert not torch.equal(top, others[0])
    sampler.restart(0, 1)
    assert not torch.equal(top, sampler.corners(positions, rows, columns)[0])
    one = torch.ones(5, dtype=torch.int64)
    assert sampler.corners(torch.arange(5), one, one)[0].tolist() == [0] * 5


def test_the_same_sizes_draw_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "corners", lambda *_: pytest.fail("a corner was drawn"))
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 20), dtype=np.uint8)
    batches = open_batches(images, images, SMALL, CPU, pytest.fail)
    batches.draw_synthetic(4)
    batches.draw_real(4)
    assert batches.crop == (16, 20) and not batches.crop_chosen


def test_images_are_equalised_whole_before_they_are_cut() -> None:
    images = several(5, 0, least=60)
    batches = open_batches(
        images, several(4, 1, least=60), dataclasses.replace(SMALL, histogram="equalise"), CPU, quiet
    )
    assert (batches.histogram, batches.drawn_histogram) == ("equalise", "keep")
    whole = [equalised(torch.from_numpy(np.array(images[i]))[None, None], "equalise")[0, 0] for i in range(5)]
    middle = batches.some("synthetic", 5)
    for i, image in enumerate(whole):
        top, left = (int(free) // 2 for free in images.sizes[i] - batches.crop)
        part = image[top : top + batches.crop[0], left : left + batches.crop[1]]
        assert torch.equal(middle[i, 0], part)


def test_hashes_cover_values_and_sizes() -> None:
    images = several(4, 0, least=30)
    turned = RaggedImages(images.flat, np.ascontiguousarray(images.sizes[:, ::-1]), 1)
    other = RaggedImages(images.flat.copy(), images.sizes, 1)
    other.flat[-1] ^= 1
    hashes = {open_batches(each, images, SMALL, CPU, quiet).hashes["synthetic"] for each in (images, turned, other)}
    assert len(hashes) == 3


# --- whole runs


def files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "metrics.jsonl":
                rows = [json.loads(line) for line in data.splitlines()]
                data = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
            found[str(path.relative_to(folder))] = data
    return found


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_run_on_several_sizes_and_one_that_is_resumed_are_equal(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = several(12, 0, least=30), several(9, 1, least=26)
    config = dataclasses.replace(SMALL, data=where, out=Path("run"))
    said: list[str] = []
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    fit(*pair, config, log=said.append)
    assert any(line.startswith("crop: ") and "real 9 sizes from " in line for line in said)
    written = json.loads(Path("run/config.json").read_text())
    (tmp_path / "part").mkdir()
    monkeypatch.chdir(tmp_path / "part")
    record, left = SimGAN.advance, [4]

    def stopped(self: SimGAN, *draws: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return record(self, *draws)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SimGAN, "advance", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit(*pair, config, log=quiet)
    monkeypatch.setattr(crops, "BUDGET", {"cpu": 1})  # what is there now does not count
    fit(*pair, dataclasses.replace(config, resume=True), log=quiet)
    assert files(tmp_path / "whole") == files(tmp_path / "part")
    crop = min(int(each.sizes[:, 0].min()) for each in pair), min(int(each.sizes[:, 1].min()) for each in pair)
    assert tuple(written["crop"]) == crop
    with pytest.raises(InputError, match=f"--crop must stay {crop[0]}x{crop[1]} when resuming run, got 23x24"):
        fit(*pair, dataclasses.replace(config, resume=True, crop=(23, 24)), log=quiet)


def test_where_images_live_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = several(12, 0, least=30, channels=3), several(9, 1, least=26, channels=3)
    monkeypatch.setattr("fastsimgan.hardware.memory.available_memory", lambda: 0)  # so that room is a mapped file
    mapped = []
    for images in pair:
        filled = RaggedImages.empty([(h, w) for h, w in images.sizes.tolist()], 3, images.dtype, Path("x"))
        filled.flat[:] = images.flat
        assert filled.mapped
        mapped.append(filled)
    found = []
    for name, sets, where in (("a", pair, "auto"), ("b", pair, "host"), ("c", mapped, "device"), ("d", mapped, "host")):
        said: list[str] = []
        fit(*sets, dataclasses.replace(SMALL, out=tmp_path / name, data=where), log=said.append)
        found.append((tmp_path / name / "metrics.jsonl").read_text())
        assert any("memory-mapped" in line for line in said) == (name == "d")
    losses = [
        [[v for k, v in json.loads(row).items() if k != "seconds"] for row in text.splitlines()] for text in found
    ]
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_large_images_of_one_size_are_cropped_and_lists_are_taken(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 260, 270), dtype=np.uint8)
    said: list[str] = []
    config = dataclasses.replace(SMALL, out=tmp_path / "r", steps=1, eval_every=1, crop=(24, 32))
    fit(images, [images[0], images[1][:100], images[2]], config, log=said.append)
    assert any("24x32 at random places (--crop)" in line for line in said)
    sheet = Image.open(tmp_path / "r/contact_sheet.png")
    assert sheet.width < 6 * (32 * 4 + 2) + 80
    with pytest.raises(InputError, match="real images: images must be of one type"):
        fit(images, [images[0], images[1][:100].astype(np.uint16)], config, log=quiet)


# --- the command


def save(folder: Path, images: list[np.ndarray], suffix: str = "png", orientation: int = 1) -> Path:
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = orientation
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.{suffix}", exif=exif)
    return folder


QUICK = [
    "--steps", "1", "--batch-size", "4", "--history", "8", "--pretrain-discriminator", "0", "--blocks", "1",
    "--device", "cpu",
]  # fmt: skip


def test_renders_and_photos_of_many_sizes_train_with_no_flag(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    draw = np.random.default_rng(0)
    renders = save(tmp_path / "s", [draw.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(6)])
    sizes = [(108, 192), (100, 75), (50, 70), (96, 128), (300, 400)]
    photos = save(tmp_path / "r", [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes], "jpg", 6)
    command = ["--synthetic", str(renders), "--real", str(photos), *QUICK, "--out", str(tmp_path / "o")]
    assert main(command) == 0
    told = capsys.readouterr().out
    # turned upright first, so that 75x100 photos are high ones
    assert "real: 5 of 5 images brought to 48 pixels' height, the synthetic ones' median (--resize-real none" in told
    assert "hidden" not in told and "warning" not in told
    assert json.loads((tmp_path / "o/config.json").read_text())["hidden_channels"] == TrainConfig.hidden_channels
    assert main([*command, "--resume"]) == 0
    for change in (["--crop", "23", "23"], ["--resize-real", "none"], ["--resize-real", "0.5"]):
        assert main([*command, "--resume", *change]) == 2
        assert "must stay" in capsys.readouterr().err
    for extra, text in (
        (["--resize-real", "none", "--hidden-channels", "20", "--dry-run"], "nothing written"),
        (["--resize-real", "0.5", "--dry-run"], "real: 5 of 5 images resized by 0.5 (--resize-real)"),
        (["--crop", "24", "26", "--dry-run"], "crop: 24x26 at random places (--crop)"),
    ):
        assert main([*command[:-1], str(tmp_path / "p"), *extra]) == 0
        assert text in "".join(capsys.readouterr())
    assert main([*command[:-1], str(tmp_path / "p"), "--resize-real", "7"]) == 2
    assert "--resize-real must be auto, none or a factor above 0 and up to 4, got 7" in capsys.readouterr().err


def test_shards_of_many_sizes_are_the_folder(tmp_path: Path) -> None:
    images = several(6, 0, channels=3)
    folder = save(tmp_path / "r", [np.array(images[i]) for i in range(6)])
    with tarfile.open(tmp_path / "r.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            info = tarfile.TarInfo(path.name)
            info.size = path.stat().st_size
            tar.addfile(info, io.BytesIO(path.read_bytes()))
    for scale in (None, Scale(factor=0.7)):
        reading = Reading(any_size=True, scale=scale)
        one, other = (open_images(tmp_path / name, reading).load_set() for name in ("r", "r.tar"))
        assert np.array_equal(one.flat, other.flat) and np.array_equal(one.sizes, other.sizes)
        if scale is None:
            assert np.array_equal(one.flat, images.flat)
    with pytest.raises(InputError, match="must be of one size and kind"):
        open_images(tmp_path / "r.tar").load()


def test_a_bad_photo_is_left_out_of_many_sizes(tmp_path: Path) -> None:
    images = several(4, 0)
    folder = save(tmp_path / "r", [np.array(images[i]) for i in range(4)])
    data = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(data[:200] + bytes(60) + data[260:])
    source = open_images(folder, Reading(any_size=True, on_error="skip"))
    found = source.load_set()
    assert len(found) == 3 and len(source.left_out) == 1 and "001.png" in source.left_out[0]
    assert [np.array_equal(found[i], images[of]) for i, of in enumerate((0, 2, 3))] == [True] * 3
