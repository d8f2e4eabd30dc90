"""Why an image file is not read, with its name before every reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Put a file's name before every reason not to read it: ours, the operating system's and the decoder's."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{printable(path)}: cannot be recognised as PNG, JPEG or TIFF{_something_else(path)}"
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{printable(path)}: must have fewer pixels: {error}") from None
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise almost anything (SyntaxError, IndexError, struct.error, ...).
        reason = getattr(error, "strerror", None) or printable(str(error)) or type(error).__name__
        raise InputError(f"{printable(path)}: cannot be decoded: {reason}") from error


_OTHERS = {
    b"RIFF": "WebP", b"GIF8": "GIF", b"BM": "BMP", b"\0\0\0": "HEIC or AVIF", b"<": "an HTML, XML or SVG page",
    b"version https://git-lfs": "a Git LFS pointer: git lfs pull fetches it", b"\x89HDF": "HDF5", b"PK": "a zip",
    b"\0\5\x16\7": "a resource fork of macOS", b"8BPS": "Photoshop",
}  # fmt: skip


def _something_else(path: Path) -> str:
    """What the file seems to be instead, in brackets; "" where that cannot be told."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:  # a member of a shard
        return ""
    found = (
        "an empty file" if not start else next((kind for mark, kind in _OTHERS.items() if start.startswith(mark)), "")
    )
    return f" ({found})" if found else ""
