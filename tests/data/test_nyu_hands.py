"""NYU Hand Pose, read from files written in exactly its format; damaged ones end in our error alone."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastsimgan.data.__main__ import main
from fastsimgan.data.datasets.nyu_hands import _dilated, import_nyu_hands, read_depth
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.errors import InputError

FRAMES = 3


def write_png(path, depth):
    pixels = np.zeros((*depth.shape, 3), np.uint8)
    pixels[..., 0] = 77  # red says nothing about depth
    pixels[..., 1], pixels[..., 2] = depth // 256, depth % 256
    Image.fromarray(pixels).save(path)


def frame(camera, number):
    """A rendered hand of 60 rows and 40 columns at a place and depth of its own, and the real one of it."""
    rendered = np.zeros((480, 640), np.int64)
    top, left = 100 + 10 * number, 200 + 20 * camera
    hand = 700 + 10 * camera + np.arange(60)[:, None] + np.zeros((60, 40), int)
    rendered[top : top + 60, left : left + 40] = hand
    real = np.full((480, 640), 1500)  # a wall
    real[top + 2 : top + 62, left : left + 40] = hand + 3  # a little off
    real[top + 20, left + 20] = 0  # a hole
    real[300:310, 10:20] = 720  # something else as near
    return rendered, real, (top, left)


@pytest.fixture
def train(tmp_path):
    savemat = pytest.importorskip("scipy.io", reason="SciPy ([eval]) is not installed").savemat
    folder = tmp_path / "train"
    folder.mkdir()
    uvd = np.zeros((3, FRAMES, 36, 3))
    for camera in (1, 2, 3):
        for number in range(1, FRAMES + 1):
            rendered, real, (top, left) = frame(camera, number)
            write_png(folder / f"synthdepth_{camera}_{number:07d}.png", rendered)
            write_png(folder / f"depth_{camera}_{number:07d}.png", real)
            uvd[camera - 1, number - 1, :, 0] = left + np.arange(36)  # along the hand's first row
            uvd[camera - 1, number - 1, :, 1] = top
            uvd[camera - 1, number - 1, :, 2] = 700 + 10 * camera
    savemat(folder / "joint_data.mat", {"joint_uvd": uvd, "joint_xyz": uvd}, do_compression=True)
    return folder


@pytest.mark.parametrize("rendered", [True, False])
def test_round_trip_keeps_every_millimetre_and_moves_joints_along(train, tmp_path, rendered):
    out = tmp_path / "out.npz"
    found = import_nyu_hands(train, out, rendered=rendered)
    assert found.images == 9 and not found.rejected and found.counts == {"frames": 9, "labelled frames": 3}
    with np.load(out, allow_pickle=False) as arrays:
        images, joints, depths = arrays["images"], arrays["joints"], arrays["depths"]
        assert arrays["camera"].tolist() == [1] * 3 + [2] * 3 + [3] * 3 and arrays["frame"].tolist() == [1, 2, 3] * 3
    assert images.shape == (9, 224, 224) and images.dtype == np.uint16 and joints.shape == (9, 36, 2)
    side = 66  # a tenth more than 60 rows; the hand lies in its middle, 13 columns and 3 rows from the edges
    for index in range(9):
        camera, number = index // 3 + 1, index % 3 + 1
        picture, real, (top, left) = frame(camera, number)
        picture = picture if rendered else real
        for row, column in ((5, 5), (30, 20), (59, 39), (20, 20)):
            at = round((row + 3 + 0.5) * 224 / side - 0.5), round((column + 13 + 0.5) * 224 / side - 0.5)
            depth = int(picture[top + row, left + column])
            assert images[index][at] == (32 * (2000 - depth) if depth else 0)  # the paper's depth - 2000, times -32
        # a joint on the hand's first row and column is there in the picture too
        x, y = joints[index, 0]
        assert (x, y) == (
            pytest.approx(13.5 * 224 / side - 0.5, abs=1e-4),
            pytest.approx(3.5 * 224 / side - 0.5, abs=1e-4),
        )
        first = 2 if not rendered else 0  # the real hand begins two rows lower
        assert images[index][round(y + first * 224 / side), round(x)] > 0 and images[index][round(y) - 4, round(x)] == 0
        np.testing.assert_allclose(np.diff(joints[index, :, 0]), 224 / side, atol=1e-4)
        assert depths[index] == pytest.approx(700 + 10 * camera - 2000)
        paper = images[index][images[index] > 0] / -32.0
        assert set(np.unique(paper)) <= set(range(-2000, 0))  # neither wall nor a depth between two millimetres


def test_the_command_packs_one_camera_and_says_what_it_rejected(train, tmp_path, capsys):
    (train / "synthdepth_2_0000002.png").write_bytes(b"\x89PNG damaged")
    (train / "depth_2_0000003.png").unlink()
    write_png(train / "synthdepth_2_0000009.png", frame(2, 1)[0])
    write_png(train / "synthdepth_2_0000001.png", np.zeros((480, 640), int))
    (train / "synthdepth_2_x.png").write_bytes(b"")
    out, report = tmp_path / "hands.npz", tmp_path / "report.json"
    given = ["import", "nyu-hands", "--input", str(train), "--output", str(out)]
    assert main([*given, "--cameras", "2", "--report", str(report)]) == 2
    printed = capsys.readouterr()
    assert "4 frames" in printed.out and "0 read, 4 rejected" in printed.out
    for reason in (
        "joint_data.mat has frames 1 to 3, got 9",
        "must show a hand nearer than 2000 mm",
        "depth_2_0000003",
    ):
        assert reason in printed.out
    assert "must hold at least one image of nyu-hands" in printed.err and not out.exists()
    assert (
        len(json.loads(report.read_text())["rejected"]) == 4
        and [p.name for p in tmp_path.iterdir() if "." == p.name[0]] == []
    )

    assert main([*given, "--cameras", "1", "3", "--size", "32", "32"]) == 0
    assert "6 images of 32x32, images, joints, depths, camera, frame" in capsys.readouterr().out
    source = open_images(out)
    assert source.load().shape == (6, 32, 32) and set(source.labels()) == {"joints", "depths", "camera", "frame"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--size", "32", "40"], "--size must be square for nyu-hands, got 32 40"),
        (["--size", "8", "8"], "size must be from 16 to 1024, got 8"),
        (["--cameras", "4"], "cameras must be among 1, 2 and 3, got 4"),
        (["--evaluation"], "--evaluation is for mpiigaze, got nyu-hands"),
    ],
)
def test_wrong_settings_are_one_line(train, tmp_path, capsys, extra, message):
    given = ["import", "nyu-hands", "--input", str(train), "--output", str(tmp_path / "out.npz")]
    assert main([*given, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "out.npz").exists()


def test_labels_that_are_none(train, tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    path = train / "joint_data.mat"
    good = path.read_bytes()
    for content, message in (
        ({"joint_uvd": np.zeros((3, 2, 14, 3))}, r"joint_uvd must be floats \[3, frames, 36, 3\], got float64"),
        ({"joint_xyz": np.zeros((3, 2, 36, 3))}, "joint_uvd must be floats .* got NoneType"),
    ):
        savemat(path, content)
        with pytest.raises(InputError, match=message):
            import_nyu_hands(train, tmp_path / "out.npz", rendered=True)
    rng = np.random.default_rng(0)
    for _ in range(60):  # damaged bytes: our error, or frames that are rejected or read
        damaged = bytearray(good)
        for at in rng.integers(0, len(good), 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(bytes(damaged[: rng.integers(1, len(good) + 1)] if rng.random() < 0.3 else damaged))
        try:
            import_nyu_hands(train, tmp_path / "out.npz", rendered=True, cameras=[1], size=16)
        except InputError:
            continue
        (tmp_path / "out.npz").unlink(missing_ok=True)
    path.unlink()
    with pytest.raises(InputError, match="joint_data.mat: cannot be read"):
        import_nyu_hands(train, tmp_path / "out.npz", rendered=True)


def test_depth_is_green_and_blue(tmp_path):
    write_png(tmp_path / "a.png", np.array([[0, 255, 256, 65535]]))
    assert read_depth(tmp_path / "a.png").tolist() == [[0, 255, 256, 65535]]
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png: must be an 8-bit RGB PNG, got uint8"):
        read_depth(tmp_path / "b.png")


def test_dilation_is_a_maximum_over_the_square():
    mask = np.random.default_rng(0).random((30, 41)) < 0.01
    for margin in (1, 8):
        filtered = Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * margin + 1))
        np.testing.assert_array_equal(_dilated(mask, margin), np.asarray(filtered) > 0)
