"""WebDataset shards: read as they are, written in the same order, labels byte for byte; hostile tar files refused."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Invert
from PIL import Image

from fastsimgan.data.formats.open_images import open_arrays
from fastsimgan.data.formats.webdataset import read_samples, sample_key
from fastsimgan.errors import InputError
from fastsimgan.refinement.job import Job
from fastsimgan.refinement.run import refine
from fastsimgan.refinement.sources import unit_parts
from fastsimgan.refinement.sources.shards import ShardsSource
from fastsimgan.refinement.verification import verify

RNG = np.random.default_rng(0)


def run(model: Path, source: Path, output: Path, **settings: Any) -> Path:
    refine(Job(model, source, output, **settings), loader=lambda *_: Invert())
    verify(output)
    return output


def png(seed: int = 0, dtype: str = "uint8", height: int = 4) -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, np.iinfo(dtype).max + 1, (height, 7), dtype=dtype)).save(buffer, "PNG")
    return buffer.getvalue()


def inverted(data: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    return np.iinfo(pixels.dtype).max - pixels


def write(path: Path, members: list[tuple[str, bytes]], **facts: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in facts.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path, errors="surrogateescape") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]  # type: ignore[union-attr]


MEMBERS = [
    ("a/0.png", png(0)),
    ("a/0.json", b'{"gaze": 1}\r\n'),
    ("a/0.mask.png", png(9)),
    ("a/1.cls", b"3"),  # labels may come first
    ("a/1.png", png(1, height=5)),
    ("empty", b""),  # a sample of no image
    (os.fsdecode(b"new\nline \xff.png"), png(2, "uint16")),
    (os.fsdecode(b"new\nline \xff.npy"), os.urandom(700)),
]


def test_members_keep_names_order_and_bytes(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "x-000.tar", MEMBERS, mtime=12345, mode=0o600, uname="me")
    write(tmp_path / "in" / "x-001.tar", [("only.png", png(5))])
    output = run(model, tmp_path / "in", tmp_path / "out")
    new = read(output / "x-000.tar")
    assert [name for name, _ in new] == [name for name, _ in MEMBERS]
    for (name, old), (_, data) in zip(MEMBERS, new, strict=True):
        if name.endswith(".png") and "mask" not in name:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), inverted(old))
        else:
            assert data == old
    with tarfile.open(output / "x-000.tar") as tar:
        info = tar.next()
        assert info is not None and (info.mtime, info.mode, info.uname) == (12345, 0o600, "me")
    assert [name for name, _ in read(output / "x-001.tar")] == ["only.png"]


def test_one_shard_a_glob_and_our_own_output_are_inputs(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a1.tar", MEMBERS)
    write(tmp_path / "in" / "b1.tar", [("x.png", png(3))])
    assert {path.name for path in run(model, tmp_path / "in" / "a1.tar", tmp_path / "one").glob("*.tar")} == {"a1.tar"}
    assert {path.name for path in run(model, tmp_path / "in" / "b*.tar", tmp_path / "glob").glob("*.tar")} == {"b1.tar"}
    twice = run(model, tmp_path / "glob", tmp_path / "twice")  # inverted twice
    assert np.array_equal(inverted(read(twice / "b1.tar")[0][1]), inverted(png(3)))


def test_folder_to_shards_and_back(model: Path, tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / "in" / f"d{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"d{i % 2}" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "in" / f"d{i % 2}" / f"{i}.txt").write_text(str(i))
    (tmp_path / "in" / "classes.txt").write_text("of nobody")
    shards = run(model, tmp_path / "in", tmp_path / "shards", to="shards")
    assert (shards / "classes.txt").read_text() == "of nobody"
    names = [name for name, _ in read(shards / "00000000.tar")]
    assert names == [f"d{i % 2}/{i}.{kind}" for i in (0, 2, 4, 6, 1, 3, 5) for kind in ("png", "txt")]
    folder = run(model, shards, tmp_path / "folder", to="folder")
    for i in range(7):
        back = folder / "00000000" / f"d{i % 2}" / f"{i}.png"
        assert np.array_equal(np.asarray(Image.open(back)), np.asarray(Image.open(io.BytesIO(png(i)))))
        assert back.with_suffix(".txt").read_text() == str(i)


def test_names_that_webdataset_would_merge_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.1.png", "a.2.png"):
        (tmp_path / "in" / name).write_bytes(png())
    with pytest.raises(InputError, match="images must differ before the first dot of their names"):
        run(model, tmp_path / "in", tmp_path / "out", to="shards")


def test_images_chosen_by_glob(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [("0.left.png", png(0)), ("0.right.png", png(1))])
    output = run(model, tmp_path / "a.tar", tmp_path / "out", images="*.left.png")
    left, right = (data for _, data in read(output / "a.tar"))
    assert right == png(1)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(left))), inverted(png(0)))


def truncated(path: Path) -> None:
    write(path, MEMBERS)
    path.write_bytes(path.read_bytes()[:1700])


def cut_between_members(path: Path) -> None:
    write(path, [("0.txt", b"x" * 512), ("1.txt", b"y")])
    path.write_bytes(path.read_bytes()[:1024])


def link(kind: bytes) -> Callable[[Path], object]:
    return lambda path: write(path, [("0.png", b"")], type=kind, linkname="/etc/passwd")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a tar": (lambda path: path.write_bytes(b"hello" * 500), "cannot be read as tar"),
    "zero bytes": (lambda path: path.touch(), "cannot be read as tar"),
    "truncated": (truncated, "cannot be read as tar: unexpected end of data"),
    "cut between members": (cut_between_members, "must end with an end-of-archive mark, got a truncated tar"),
    "symbolic link": (link(tarfile.SYMTYPE), "members must be plain files and folders, 0.png is a link"),
    "hard link": (link(tarfile.LNKTYPE), "members must be plain files and folders, 0.png is a link"),
    "device": (link(tarfile.CHRTYPE), "members must be plain files and folders, 0.png is a link"),
    "two images": (
        lambda path: write(path, [("0.png", png()), ("0.jpg", b"")]),
        "a sample must hold one image, got 0.png and 0.jpg; --images 'GLOB' tells which",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tar_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    make(tmp_path / "a.tar")
    with pytest.raises(InputError) as caught:
        run(model, tmp_path / "a.tar", tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path}/a.tar: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "refiner.safetensors"]


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", ".fastsimgan/x.png"])
def test_names_that_lead_out_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a.tar", [(name, png()), ("0.png", png())])
    if not name.startswith(".fast"):
        run(model, tmp_path / "deep", tmp_path / "same")  # in a tar they harm nobody
    with pytest.raises(InputError, match="names must stay inside the output, got "):
        run(model, tmp_path / "deep", tmp_path / "deeper" / "out", to="folder")
    assert not list(tmp_path.rglob("x.png"))


def test_twins_in_a_shard_are_refused_in_a_folder(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1)), ("0.png", png(2))])
    with pytest.raises(InputError, match=r"a\.tar: members must differ in name, got 0\.png twice"):
        run(model, tmp_path / "a.tar", tmp_path / "out", to="folder")


@pytest.mark.parametrize(
    ("name", "key"), [("a.png", "a"), ("d.x/a.mask.png", "d.x/a"), ("d/.hidden", "d/"), ("a", "a")]
)
def test_keys(name: str, key: str) -> None:
    assert sample_key(name) == key


def test_samples_are_consecutive(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", MEMBERS)
    samples = list(read_samples(tmp_path / "a.tar"))
    assert [(len(sample.members), sample.image) for sample in samples] == [(3, 0), (2, 1), (1, None), (2, 0)]


def test_webdataset_reads_our_shards(model: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    write(
        tmp_path / "in" / "a.tar",
        [(f"{i}.{kind}", data) for i in range(5) for kind, data in (("png", png(i)), ("json", b'{"i": %d}' % i))],
    )
    output = run(model, tmp_path / "in", tmp_path / "out")
    samples = list(webdataset.WebDataset(str(output / "a.tar"), shardshuffle=False).decode("pil"))
    assert [sample["json"]["i"] for sample in samples] == list(range(5))
    for i, sample in enumerate(samples):
        assert np.array_equal(np.asarray(sample["png"].convert("L")), inverted(png(i)))


def test_datasets_reads_our_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    for i in range(6):
        path = tmp_path / "in" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (tmp_path / "in" / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "class{i % 2}/{i}.png", "gaze": {i}}}\n' for i in range(6))
    )
    output = run(model, tmp_path / "in", tmp_path / "out")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(output), cache_dir=str(tmp_path / "cache"))["train"]
    assert sorted(loaded["gaze"]) == list(range(6))
    for row in loaded:
        assert np.array_equal(np.asarray(row["image"].convert("L")), inverted(png(row["gaze"])))


def with_files_beside(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two shards at ``path`` and files beside them, more than a block; returns the files' bytes."""
    monkeypatch.setattr(unit_parts, "SAMPLES_PER_UNIT", 2)
    for number in range(2):
        members = [(f"d/{i}.png", png(i)) for i in range(3 * number, 3 * number + 3)]
        write(path / f"s{number}.tar", members + [(f"d/{3 * number}.cls", b"7")])
    rows = "".join(f'{{"file_name": "d/{i}.png", "gaze": {i}}}\n' for i in range(6))
    files = {"metadata.jsonl": rows.encode(), "new\nline": b"\0\xff", "deep/er/preview.png": png(9), "empty": b""}
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / ".fastsimgan").mkdir()  # records of a run that was not ours to finish
    (path / ".fastsimgan" / "old").write_bytes(b"bookkeeping")
    return files


def files_of(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if not name.endswith(".tar") and name.partition("/")[0] != ".fastsimgan"
    }


def test_files_beside_shards_go_along_with_shards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = with_files_beside(tmp_path / "in", monkeypatch)
    once = run(model, tmp_path / "in", tmp_path / "once")
    again = run(model, once, tmp_path / "again")
    assert files_of(once) == files_of(again) == files
    assert sorted(path.name for path in again.glob("*.tar")) == ["s0.tar", "s1.tar"]
    (again / "deep" / "er" / "preview.png").write_bytes(b"changed")
    with pytest.raises(InputError, match="preview.png: file must have SHA-256"):
        verify(again)
    (again / "deep" / "er" / "preview.png").unlink()
    with pytest.raises(InputError, match="preview.png: cannot be read"):
        verify(again)


def test_files_beside_shards_go_along_with_a_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = with_files_beside(tmp_path / "in", monkeypatch)
    found = files_of(run(model, tmp_path / "in", tmp_path / "out", to="folder"))
    assert {name: data for name, data in found.items() if not name.startswith(("s0/", "s1/"))} == files
    assert found["s0/d/0.cls"] == b"7" and len(found) == len(files) + 8


@pytest.mark.parametrize("to", ["npz", "hdf5"])
def test_files_beside_shards_go_along_with_a_packed_file(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("h5py", reason="h5py is not installed")
    files = with_files_beside(tmp_path / "in", monkeypatch)
    output = run(model, tmp_path / "in", tmp_path / f"out.{'npz' if to == 'npz' else 'h5'}", to=to)
    found = open_arrays(output)
    assert dict(found.files()) == files | {"s0/d/0.cls": b"7", "s1/d/3.cls": b"7"}
    labels = found.labels()  # a metadata.jsonl beside shards knows the members by their own names
    assert labels["gaze"].tolist() == [0, 1, 2, 3, 4, 5] and labels["name"][0] == "s0/d/0.png"


def test_members_of_one_name_have_no_label_of_a_file_beside(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_files_beside(tmp_path / "in", monkeypatch)
    write(tmp_path / "in" / "s1.tar", [("d/0.png", png())])
    output = run(model, tmp_path / "in", tmp_path / "out.npz", to="npz")
    assert open_arrays(output).labels().keys() == {"name"}


def test_files_beside_shards_are_told(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [])
    assert "along" not in ShardsSource(tmp_path).describe()
    for name in ("metadata.jsonl", "b.txt", "c\n.txt", "d.txt"):
        (tmp_path / name).write_text("")
    assert ShardsSource(tmp_path).describe().endswith("; carried along beside them: b.txt, c\\n.txt, d.txt and 1 more")
    assert "along" not in ShardsSource(tmp_path / "a.tar").describe()
    assert "along" not in ShardsSource(tmp_path / "*.tar").describe()
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "preview.png").write_text("")
    assert ShardsSource(tmp_path).describe().endswith("d.txt and 2 more (1 images, unrefined)")


def test_shards_below_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [])
    write(tmp_path / "val" / "b.tar", [])
    with pytest.raises(InputError, match=r"shards must lie in the folder itself.* got val/b.tar too"):
        ShardsSource(tmp_path)
    assert len(ShardsSource(tmp_path / "*.tar").shards) == 1


def test_links_beside_shards_stay_inside_but_shards_may_be_links(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.tar", [])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").symlink_to(tmp_path / "elsewhere" / "a.tar")
    assert ShardsSource(tmp_path / "in").beside == []
    (tmp_path / "secret").write_text("")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="links must stay inside the folder"):
        ShardsSource(tmp_path / "in")


def test_a_folder_with_a_tar_makes_no_shards(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "00000000.tar", [])
    (tmp_path / "in" / "0.png").write_bytes(png())
    with pytest.raises(InputError, match=r"00000000.tar: beside new shards must be no other .tar"):
        run(model, tmp_path / "in", tmp_path / "out", to="shards")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("to", ["folder", "npz"])
def test_a_file_beside_is_not_mixed_with_a_shards_members(to: str, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.tar", [("0.png", png())])
    (tmp_path / "in" / "a").mkdir()
    (tmp_path / "in" / "a" / "0.png").write_bytes(b"")
    output = tmp_path / ("out" if to == "folder" else "out.npz")
    with pytest.raises(InputError, match=r"got a/0.png beside a.tar"):
        run(model, tmp_path / "in", output, to=to)
    assert not list(tmp_path.glob("out*"))
    run(model, tmp_path / "in", tmp_path / "same")


def test_a_change_beside_shards_is_another_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_files_beside(tmp_path / "in", monkeypatch)
    run(model, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "more").write_text("")
    with pytest.raises(InputError, match="is another run's output: its files beside them is 4, here it is 5"):
        run(model, tmp_path / "in", tmp_path / "out")


def test_struck_again_and_again_files_beside_shards_come_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = with_files_beside(tmp_path / "in", monkeypatch)
    whole = run(model, tmp_path / "in", tmp_path / "whole")
    calls = 0
    rename = os.rename

    class Struck(BaseException):
        pass

    def strike(*arguments: Any, **settings: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise Struck
        rename(*arguments, **settings)

    monkeypatch.setattr(os, "rename", strike)
    for _ in range(100):
        try:
            refine(Job(model, tmp_path / "in", tmp_path / "out"), loader=lambda *_: Invert())
            break
        except Struck:
            pass
    monkeypatch.setattr(os, "rename", rename)
    assert calls > 12
    verify(tmp_path / "out")
    assert files_of(tmp_path / "out") == files
    for name in ("s0.tar", "s1.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
