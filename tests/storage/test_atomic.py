"""What is written is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastsimgan.errors import InputError
from fastsimgan.storage.atomic import remove_unfinished, staged, write_atomically, writing


def test_a_file_is_replaced_at_once_and_what_fails_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, b"third")
        assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_flushed_whole_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    final, flushed = tmp_path / "folder", set()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        assert not final.exists() or descriptor_is(descriptor, tmp_path)
        fsync(descriptor)

    def descriptor_is(descriptor: int, path: Path) -> bool:
        return os.readlink(f"/proc/self/fd/{descriptor}") == str(path)

    monkeypatch.setattr(os, "fsync", watched)
    with writing(final) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner/file").write_text("x")
        assert not final.exists()
    assert flushed == {"", *(f"/.writing-folder{name}" for name in ("", "/inner", "/inner/file"))}
    assert (final / "inner/file").read_text() == "x" and list(tmp_path.iterdir()) == [final]


def test_what_a_kill_left_is_taken_over_and_can_be_removed(tmp_path: Path) -> None:
    for left in (".writing-a", ".removing-b", ".writing-c"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").touch()
    with writing(tmp_path / "a") as temporary:
        assert not temporary.exists()
        temporary.write_text("whole")
    (tmp_path / ".mine").touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "a"]


def test_staged_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged(tmp_path / "new" / "deep" / "out") as partial:
        partial.mkdir()
        (partial / "half").write_text("half")
        assert not (tmp_path / "new" / "deep" / "out").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_staged_never_replaces_what_appeared_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="output must not exist yet"), staged(out) as partial:
        partial.write_text("ours")
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


def test_staged_turns_a_full_disk_into_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out: cannot be written: No space left on device"), staged(tmp_path / "out"):
        raise OSError(28, "No space left on device")
