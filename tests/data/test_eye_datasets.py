"""UnityEyes and MPIIGaze, read from files written in exactly their format; hostile ones end in our error alone."""

import io
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from properties import HealthCheck, given, settings, st

from fastsimgan.data.__main__ import main
from fastsimgan.data.datasets.matlab_v5 import read_matlab
from fastsimgan.data.datasets.mpiigaze import read_mpiigaze
from fastsimgan.data.datasets.unityeyes import crop_box, parse_label, read_unityeyes
from fastsimgan.data.formats.open_images import open_images
from fastsimgan.data.gaze_angles import gaze_vectors
from fastsimgan.errors import InputError

CASES = int(os.environ.get("FASTSIMGAN_JSON_CASES", "300"))  # CONTRIBUTING.md tells how 10,000 are run
LOOK = (-0.6, 0.48, -0.64)  # exact: 0.36 + 0.2304 + 0.4096 = 1


def point(x, y):
    return f"({x:.4f}, {y:.4f}, 9.4964)"


def label(centre=(300, 200), look=LOOK, half=100, **entries):
    """Corners at centre ± ``half`` (the inner one on the left), lids 40 pixels above and below, y from the bottom."""
    x, y = centre
    lid = [point(x - half + 2 * half * i / 8, y + (40 if i == 4 else 0)) for i in range(9)]
    lid += [point(x + half - 2 * half * i / 8, y - (40 if i == 4 else 0)) for i in range(1, 8)]
    return {
        "interior_margin_2d": lid,
        "caruncle_2d": [point(x - half, y + d) for d in (-3, -2, -1, 0, 1, 2, 3)],
        "iris_2d": [point(x, y)] * 32,
        "eye_details": {"look_vec": "({:.4f}, {:.4f}, {:.4f}, 0.0000)".format(*look), "pupil_size": "-0.0888"},
        "head_pose": "(342.4881, 172.6482, 0.0000)",
    } | entries


def write_eye(folder, number, pixels, **changes):
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    (folder / f"{number}.json").write_text(json.dumps(label(**changes), indent=2))


def test_unityeyes_crop_takes_the_right_rows_and_the_gaze_the_right_signs(tmp_path):
    pixels = np.full((480, 640, 3), 60, np.uint8)
    pixels[280 - 20 : 280 + 20, 300 - 10 : 300 + 10] = 200  # y = 200 from the bottom is row 280
    pixels[200:220, 460:470] = 255  # outside of a crop of 300x191 about that point
    write_eye(tmp_path / "in", 10, pixels)
    write_eye(tmp_path / "in", 9, np.full((480, 640, 3), 90, np.uint8))
    found = read_unityeyes(tmp_path / "in")
    assert not found.rejected and found.counts == {"jpg": 2, "json": 2}
    assert found.arrays["source"].tolist() == ["9.jpg", "10.jpg"]
    eye = found.arrays["images"][1]
    assert eye.shape == (35, 55) and eye.dtype == np.uint8
    bright = np.argwhere(eye > 130)
    np.testing.assert_allclose(bright.mean(0), [17, 27], atol=0.6)  # the middle
    np.testing.assert_allclose(np.ptp(bright, 0) + 1, [40 * 55 / 300, 20 * 55 / 300], atol=1.5)
    assert eye.max() < 215 and abs(int(eye[0, 0]) - 60) < 3
    x, y, z = LOOK
    np.testing.assert_allclose(gaze_vectors(found.arrays["pitch_yaw"]), [[x, -y, z]] * 2, atol=1e-3)
    assert (found.arrays["pitch_yaw"] > 0).all()  # looks up (positive pitch) and to the image's left (positive yaw)


def test_crop_box_by_hand():
    parsed = parse_label(json.dumps(label()).encode(), "a")
    assert crop_box(parsed, (480, 640), (35, 55)) == pytest.approx(
        (150, 280 - 150 * 35 / 55, 450, 280 + 150 * 35 / 55), abs=1e-9
    )
    assert crop_box(parsed, (600, 800), (35, 55))[1] == pytest.approx(400 - 150 * 35 / 55)  # by the image's own height
    with pytest.raises(InputError, match="crop must lie in the image"):
        crop_box(parsed, (480, 449), (35, 55))
    with pytest.raises(InputError, match="crop must be at least 201x301"):
        crop_box(parsed, (480, 640), (201, 301))


def test_colour_becomes_rec_601_luma(tmp_path):
    write_eye(tmp_path / "in", 1, np.full((480, 640, 3), (200, 100, 50), np.uint8))
    assert abs(int(read_unityeyes(tmp_path / "in").arrays["images"][0].mean()) - 124) <= 2


@pytest.mark.skipif("FASTSIMGAN_DATA" not in os.environ, reason="FASTSIMGAN_DATA is not set")
def test_a_genuine_json():
    path = Path(os.environ["FASTSIMGAN_DATA"]) / "unityeyes" / "100.json"
    if not path.exists():
        pytest.skip(f"no {path.name} in FASTSIMGAN_DATA")
    parsed = parse_label(path.read_bytes(), path.name)
    np.testing.assert_allclose(gaze_vectors(parsed.pitch_yaw[None]), [[-0.5557, -0.4563, -0.6950]], atol=1e-4)
    assert parsed.lid_margin[8].tolist() == [486.3961, 300.0677]
    iris = np.array([[float(n) for n in p[1:-1].split(",")[:2]] for p in json.loads(path.read_text())["iris_2d"]])
    left, top, right, bottom = crop_box(parsed, (480, 640), (35, 55))
    x, row = iris[:, 0].mean(), 480 - iris[:, 1].mean()
    assert left < iris[:, 0].min() and iris[:, 0].max() < right and top < row < bottom
    # the iris lies where the gaze goes: left of the lids' middle and above it
    assert x < (left + right) / 2 and row < (top + bottom) / 2


BAD = [
    (b"", "must be JSON"),
    (b"\xff\xfe", "must be JSON"),
    (b"[" * 200_000, "must be JSON"),
    (b"9" * 6_000, "must be JSON"),
    (b" " * ((1 << 20) + 1), "at most 1048576 bytes"),
    (b"[]", "must have the entry eye_details"),
    (b'{"a": 1, "a": 2}', "every entry once"),
    (label(eye_details={}), "entry look_vec"),
    (label(eye_details={"look_vec": "__import__('os').system('touch x')"}), "look_vec must be 4 numbers"),
    (label(eye_details={"look_vec": [1, 2, 3, 0]}), "look_vec must be 4 numbers"),
    (label(eye_details={"look_vec": "(nan, 0, -1, 0)"}), "look_vec must be 4 numbers"),
    (label(eye_details={"look_vec": "(1_0, 0, -1, 0)"}), "look_vec must be 4 numbers"),
    (label(eye_details={"look_vec": "(0, 0, -\u0661, 0)"}), "look_vec must be 4 numbers"),  # a digit, not of ASCII
    (label(eye_details={"look_vec": "(0, 0, -1, 0, 0)"}), "look_vec must be 4 numbers"),
    (label(eye_details={"look_vec": "(0, 0, -1e999, 0)"}), "numbers below 1e6"),
    (label(look=(0, 0, -0.5)), "unit vector .* got length 0.5"),
    (label(look=(0, 0, 1)), "towards the camera"),
    (label(interior_margin_2d=[point(1, 1)] * 15), "list of 16 points, got 15"),
    (label(caruncle_2d={"a": "\n"}), "list of 7 points"),
    (label(caruncle_2d=["(1, 2)"] * 7), "caruncle_2d must be 3 numbers"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=range(len(BAD)))
def test_hostile_json_is_one_line_that_names_the_file(content, message):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(InputError, match=message) as caught:
        parse_label(data, "bad\n.json")
    assert str(caught.value).startswith("bad\\n.json: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


NUMBERS = st.one_of(
    st.floats().map(str), st.integers().map(str), st.text(max_size=8), st.sampled_from(["1e999", "0x1", "1_0"])
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.floats(),
        st.integers(),
        st.text(),
        st.lists(NUMBERS, max_size=5).map(lambda parts: f"({', '.join(parts)})"),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=17), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=20,
)
ENTRIES = st.sampled_from(["interior_margin_2d", "caruncle_2d", "eye_details", "look_vec"])


@st.composite
def hostile(draw):
    """Any bytes; or a good label with one entry replaced, one point replaced, or its bytes cut or changed."""
    how = draw(st.sampled_from(["bytes", "value", "entry", "point", "cut", "byte"]))
    if how == "bytes":
        return draw(st.binary(max_size=200))
    document = label()
    if how == "value":
        document = draw(VALUES)
    if how == "entry":
        key = draw(ENTRIES)
        (document["eye_details"] if key == "look_vec" else document)[key] = draw(VALUES)
    if how == "point":
        key = draw(st.sampled_from(["interior_margin_2d", "caruncle_2d"]))
        document[key][draw(st.integers(0, 6))] = draw(VALUES)
    data = bytearray(json.dumps(document).encode())
    if how == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if how == "byte":
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES <= 300)
@given(hostile())
def test_any_json_is_read_or_refused_by_our_error(data):
    try:
        parsed = parse_label(data, "a.json")
        box = crop_box(parsed, (480, 640), (35, 55))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(parsed.pitch_yaw).all() and np.isfinite(box).all()
        assert 0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 480


def test_bad_pairs_are_rejected_by_name_and_the_rest_imported(tmp_path, capsys):
    folder, out, report = tmp_path / "in", tmp_path / "out.npz", tmp_path / "report.json"
    grey = np.full((480, 640, 3), 90, np.uint8)
    for number in (1, 2, 3, 4, 5):
        write_eye(folder, number, grey)
    (folder / "2.json").unlink()
    (folder / "3.jpg").unlink()
    (folder / "4.jpg").write_bytes((folder / "4.jpg").read_bytes()[:2000])
    write_eye(folder, 5, grey, centre=(100, 200))
    (folder / "notes.txt").write_text("not ours")
    os.mkfifo(folder / "6.json")  # would block whoever opens it
    argv = ["import", "unityeyes", "--input", str(folder), "--output", str(out), "--report", str(report)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "4 jpg, 4 json; 1 read, 4 rejected" in printed
    rejected = json.loads(report.read_text())["rejected"]
    assert {name: reason.split(": ", 1)[1].split(" ")[0] for name, reason in rejected.items()} == {
        "2.jpg": "must", "3.json": "must", "4.jpg": "cannot", "5.jpg": "crop"
    }  # fmt: skip
    packed = open_images(out)
    assert packed.load().shape == (1, 35, 55) and set(packed.labels()) == {"pitch_yaw", "source"}
    assert main(argv) == 2 and "must not exist yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unityeyes", "--input", "none", "--output", "o.npz"], "none: must be a folder"),
        (["unityeyes", "--input", ".", "--output", "o.npz"], "must hold at least one image of unityeyes, got none"),
        (["unityeyes", "--input", ".", "--output", "o.png"], "--output must end in .npz"),
        (["unityeyes", "--input", ".", "--output", "o.npz", "--evaluation"], "--evaluation is for mpiigaze"),
        (["unityeyes", "--input", ".", "--output", "o.npz", "--size", "0", "9"], "--size must be"),
        (["mpiigaze", "--input", ".", "--output", "o.npz"], "Normalized: must be a folder"),
        (["mpiigaze", "--input", ".", "--output", "o.npz", "--size", "37", "60"], "size must be from 1x1 to 36x60"),
    ],
)
def test_wrong_arguments_end_with_2_and_nothing_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_is_quick():
    code = "import sys, fastsimgan.data.__main__; assert not {'torch', 'scipy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# MPIIGaze


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_day(root, subject="p00", day="day01", count=3, seed=0, **changes):
    """One day's file as MPIIGaze has it: structs in a struct, and a column of cells. Returns what it holds."""
    savemat = pytest.importorskip("scipy.io", reason="SciPy ([eval]) is not installed").savemat
    rng = np.random.default_rng(seed)
    sides = {}
    for side in ("left", "right"):
        gaze = unit(rng.normal(size=(count, 3)) * [0.3, 0.3, 0.05] - [0, 0, 1])
        images = rng.integers(0, 256, (count, 36, 60), dtype=np.uint8)
        sides[side] = {"image": images, "gaze": gaze, "pose": rng.normal(size=(count, 3))}
    names = np.empty((count, 1), object)
    names[:, 0] = [f"{i + 1:04d}.jpg" for i in range(count)]
    path = root / "Data" / "Normalized" / subject / f"{day}.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"data": sides, "filenames": names} | changes, do_compression=True)
    return sides


def write_list(root, text, subject="p00"):
    folder = root / "Evaluation Subset" / "sample list for eye image"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{subject}.txt").write_text(text)


def test_mpiigaze_round_trip_mirrors_right_eyes(tmp_path):
    first, second = write_day(tmp_path), write_day(tmp_path, "p03", "day12", count=1, seed=1)
    found = read_mpiigaze(tmp_path, (36, 60))
    arrays = found.arrays
    assert found.counts == {"mat": 2} and not found.rejected
    assert arrays["source"].tolist()[:3] == ["p00/day01/0001.jpg left", "p00/day01/0001.jpg right",
                                             "p00/day01/0002.jpg left"]  # fmt: skip
    assert arrays["subject"].tolist() == [0] * 6 + [3] * 2
    assert arrays["mirrored"].tolist() == [False, True] * 4
    images = arrays["images"]
    np.testing.assert_array_equal(images[:6:2], first["left"]["image"])
    np.testing.assert_array_equal(images[1:6:2], first["right"]["image"][:, :, ::-1])
    np.testing.assert_array_equal(images[7], second["right"]["image"][0, :, ::-1])
    vectors = gaze_vectors(arrays["pitch_yaw"].astype(np.float64))
    np.testing.assert_allclose(vectors[:6:2], first["left"]["gaze"], atol=1e-6)
    np.testing.assert_allclose(vectors[1:6:2], first["right"]["gaze"] * [-1, 1, 1], atol=1e-6)
    middle = read_mpiigaze(tmp_path).arrays["images"]  # 35x55: one row less below, two and three columns at the sides
    np.testing.assert_array_equal(middle, images[:, :35, 2:57])


def test_mpiigaze_evaluation_list_chooses_and_orders(tmp_path, capsys):
    write_day(tmp_path)
    write_list(tmp_path, "day01/0003.jpg right\r\nday01/0001.jpg left\nday09/0001.jpg left\n")
    out = tmp_path / "out.npz"
    assert main(["import", "mpiigaze", "--input", str(tmp_path), "--output", str(out), "--evaluation"]) == 0
    printed = capsys.readouterr().out
    assert "1 mat, 3 listed; 2 read, 1 rejected" in printed and "p00/day09/0001.jpg left: must be in" in printed
    packed = open_images(out)
    assert packed.labels()["source"].tolist() == ["p00/day01/0003.jpg right", "p00/day01/0001.jpg left"]
    assert packed.labels()["pitch_yaw"].dtype == np.float32
    write_list(tmp_path, "day01/0003.jpg both\n", "p01")
    with pytest.raises(InputError, match=r"p01\.txt: line 1 must be like"):
        read_mpiigaze(tmp_path, evaluation=True)


@pytest.mark.parametrize("compressed", [True, False])
def test_matlab_values_are_those_that_scipy_wrote(compressed):
    savemat = pytest.importorskip("scipy.io", reason="SciPy ([eval]) is not installed").savemat
    rng = np.random.default_rng(0)
    numbers = {f"{kind}_": (rng.random((2, 3, 4)) * 100).astype(kind) for kind in
               ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")}  # fmt: skip
    cells = np.empty((2, 2), object)
    cells[:] = [["a", "bcdefgh"], [np.arange(3.0), "d"]]
    file = io.BytesIO()
    savemat(file, {"s": {"inner": numbers, "text": "abc"}, "cells": cells, "rows": ["ab", "cd"], "none": []},
            do_compression=compressed)  # fmt: skip
    found = read_matlab(file.getvalue())
    assert set(found) == {"s", "cells", "rows", "none"} and found["s"]["text"] == "abc"
    for name, array in numbers.items():
        read = found["s"]["inner"][name]
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
    assert found["cells"][0] == "a" and found["cells"][2:] == ["bcdefgh", "d"]
    assert found["cells"][1].tolist() == [[0, 1, 2]] and found["rows"] == ["ab", "cd"] and found["none"].shape == (0,)


def test_a_mat_whose_bytes_lie_is_refused_at_once():
    """SciPy would count to 2^31 on some of these, and crash on others."""
    savemat = pytest.importorskip("scipy.io", reason="SciPy ([eval]) is not installed").savemat
    file = io.BytesIO()
    savemat(file, {"data": {"left": {"image": np.zeros((1, 2, 2), np.uint8)}}, "filenames": np.array(["a"], object)})
    whole = file.getvalue()
    read_matlab(whole)
    sizes = np.array([1, 1], "<i4").tobytes()
    at = [i for i in range(128, len(whole) - 8) if whole[i : i + 8] == sizes]
    assert len(at) >= 2  # of data and of data.left
    for start in at:
        with pytest.raises(InputError, match="must have|must hold"):
            read_matlab(whole[:start] + np.array([2**31 - 1, 1], "<i4").tobytes() + whole[start + 8 :])
    refused = 0
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        data = bytearray(whole)
        for place in rng.integers(128, len(whole), 3):
            data[place] = rng.integers(256)
        try:
            read_matlab(bytes(data))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert CASES / 4 < refused < CASES
    for end in range(len(whole)):
        with suppress(InputError):  # cut between two variables it is whole
            read_matlab(whole[:end])


def test_mpiigaze_bad_days_and_gazes_are_rejected_by_name(tmp_path):
    good = write_day(tmp_path)
    gaze = good["left"]["gaze"].copy()
    gaze[1] = np.nan
    bad_gaze = {"left": good["left"] | {"gaze": gaze}, "right": good["right"]}
    write_day(tmp_path, day="day02", data=bad_gaze)
    write_day(tmp_path, day="day03", data={"left": good["left"]})
    write_day(tmp_path, day="day04", data={side: eye | {"image": eye["image"][:, :35]} for side, eye in good.items()})
    write_day(tmp_path, day="day05", filenames=np.array([["../../x"], ["b"], ["c"]], object))
    write_day(tmp_path, day="day06", data=np.arange(3.0))
    folder = tmp_path / "Data" / "Normalized" / "p00"
    whole = (folder / "day01.mat").read_bytes()
    (folder / "day07.mat").write_bytes(whole[: len(whole) // 2])
    (folder / "day08.mat").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    (folder / "day09.mat").write_bytes(b"")
    found = read_mpiigaze(tmp_path)
    assert len(found.arrays["images"]) == 6 + 5
    reasons = {name: reason.split(".mat: ", 1)[1] for name, reason in found.rejected.items()}
    for name, start in {
        "p00/day02/0002.jpg left": "0002.jpg left: gaze must be a unit vector",
        "p00/day03.mat": "must have data.right.image",
        "p00/day04.mat": "left.image must be uint8 [3, 36, 60], got uint8 [3, 35, 60]",
        "p00/day05.mat": "filenames must be like",
        "p00/day06.mat": "must have data.left.image",
        "p00/day07.mat": "an element must have",
        "p00/day08.mat": "must be a MATLAB v5 file",
        "p00/day09.mat": "must be a MATLAB v5 file",
    }.items():
        assert reasons.pop(name).startswith(start), found.rejected[name]
    assert not reasons and not any("\n" in reason for reason in found.rejected.values())
