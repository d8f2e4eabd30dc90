"""NumPy's ``.npy`` format, alone or as a member of an ``.npz``: headers, arrays, and images written as they come."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import IO

import numpy as np

_HEADER_READERS: dict[tuple[int, int], Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

_CHECKED = 1 << 24  # bytes of a mapped member at a time


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and the length in bytes of the header at the start of ``file``."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f".npy format must be 1.0 or 2.0, got {'.'.join(map(str, version))}")
    shape, _, dtype = _HEADER_READERS[version](file)
    return shape, dtype, file.tell()


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The array of a member, its checksum checked. Raises ValueError if it is longer than its header says."""
    with archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading to the end is what makes zipfile check the CRC
            raise ValueError(f"{name} is longer than its header says")
    return array


def map_member(archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """The array of an uncompressed member, mapped from the disk, its checksum checked; None if it is compressed.

    Raises ValueError if it is damaged: all of it is read once, faster than anything is refined.
    """
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or archive.filename is None:
        return None
    with open(archive.filename, "rb") as file:
        # The member's data follow a local header of 30 bytes, the name and an extra field of its own length.
        file.seek(info.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        start = file.tell()
        whole = np.memmap(file, np.uint8, "r", start, (info.file_size,))
        crc = 0
        for first in range(0, len(whole), _CHECKED):
            crc = zlib.crc32(whole[first : first + _CHECKED].data, crc)
        if crc != info.CRC:
            raise ValueError(f"bad CRC-32 of {name}")
        file.seek(start)
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = _HEADER_READERS[version](file)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def write_images(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray]) -> None:
    """An array of ``shape`` and ``dtype``, from consecutive ``pieces`` ``[n, H, W(, C)]`` that add up to it."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for piece in pieces:
        file.write(piece.astype(dtype, copy=False).tobytes())
