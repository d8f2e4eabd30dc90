"""What PNG, JPEG and TIFF files carry beside their pixels, cut out of one file and put into another, byte for byte.

PNG chunks, JPEG segments and TIFF tags describe the picture (text, colour, time, place, calibration) or how its pixels
are stored. The first kind still holds for a picture of the same size with other values, and travels. The second is the
new file's own. What fits neither (pictures behind the first, private chunks that must not outlive a change of the
pixels) is named in `Carried.lost`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_OWN = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # how the pixels are stored
_PNG_KNOWN = {b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"mDCV", b"cLLI", b"sBIT", b"bKGD", b"tIME"}
_PNG_OF_STORAGE = {b"sBIT", b"bKGD", b"hIST"}  # true only while colours are stored as they were

_JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # Huffman-coded: baseline, extended, progressive
_JPEG_TABLES = {0xC4, 0xDB, 0xDD}
_JPEG_PLAIN_APPS = {0xE0, 0xE1, 0xE2}

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TIFF_UNITS = _TIFF_SIZES | {5: 4, 10: 4}  # a rational is two numbers
_TIFF_FOLDERS = {34665, 34853, 40965}  # tags whose value is another table: EXIF, GPS, interoperability
_TIFF_OWN = {
    *range(254, 260), 262, 263, 264, 265, 266, 273, 277, 278, 279, 284, *range(288, 294), 317, *range(320, 328),
    *range(332, 340), 342, 347, *range(512, 522), *range(529, 533),
}  # fmt: skip
_TIFF_STALE = {280: "MinSampleValue", 281: "MaxSampleValue", 340: "SMinSampleValue", 341: "SMaxSampleValue"}
ORIENTATION, _TIFF_PROFILE = 274, 34675
_DEEPEST, _MOST_TAGS = 4, 4096

Tag = tuple[int, int, int, object]
"""Number, type, count, and the value's bytes in little-endian order or the tags of another table."""


@dataclass(frozen=True)
class Carried:
    """What travels from one file into another of the same format; `insert` puts it there."""

    before: bytes = b""
    """PNG chunks before the pixels, or JPEG segments."""
    after: bytes = b""
    """PNG chunks behind the pixels."""
    tags: tuple[Tag, ...] = ()
    """TIFF tags, in order."""
    lost: tuple[str, ...] = ()
    """What does not travel, in words."""
    orientation: int = 1
    """EXIF's, 1 to 8: how a viewer turns the picture. 1: not at all."""
    compression: str = ""
    """Of a TIFF, as Pillow calls it."""
    whole: bytes = b""
    """All of a file of arrays; its picture will be replaced."""
    key: str | None = None
    """Which array in it is the picture."""

    def without_colours(self) -> Carried:
        """The same for a picture whose colours are stored in another way: what describes the old way stays behind."""
        if self.tags:
            kept_tags = tuple(tag for tag in self.tags if tag[0] != _TIFF_PROFILE)
            lost = () if kept_tags == self.tags else ("colour profile",)
            return replace(self, tags=kept_tags, lost=(*self.lost, *lost))
        jpeg = self.before[:1] == b"\xff"
        pieces = _split_jpeg(self.before) if jpeg else _split_png(self.before)
        profiles = [piece for piece in pieces if (piece[4:15] == b"ICC_PROFILE" if jpeg else piece[4:8] == b"iCCP")]
        kept = [piece for piece in pieces if piece not in profiles and (jpeg or piece[4:8] not in _PNG_OF_STORAGE)]
        return replace(self, before=b"".join(kept), lost=(*self.lost, *(["colour profile"] if profiles else [])))


@dataclass(frozen=True)
class Scan:
    """A file's frame and what it carries, read from its structure alone; ``plain``: nothing in it is unusual."""

    height: int
    width: int
    bits: int
    colour: int  # PNG's colour type, or a JPEG's number of components
    carried: Carried
    plain: bool


def insert(format: str, encoded: bytes, carried: Carried) -> bytes:
    """``encoded``, a file of Pillow's or OpenCV's making, with what another file carried."""
    if format == "PNG" and (carried.before or carried.after):
        head = len(PNG_SIGNATURE) + 25  # IHDR: 13 bytes, and 12 around them
        tail = len(encoded) - 12  # IEND
        return encoded[:head] + carried.before + encoded[head:tail] + carried.after + encoded[tail:]
    if format == "JPEG" and carried.before:
        size = struct.unpack_from(">H", encoded, 4)[0] if encoded[2:4] == b"\xff\xe0" else -2
        jfif = encoded[2 : 4 + size]  # the encoder's own JFIF header; the file's takes its place
        return encoded[:2] + (b"" if carried.before[:2] == b"\xff\xe0" else jfif) + carried.before + encoded[4 + size :]
    return _insert_tiff(encoded, carried.tags) if format == "TIFF" and carried.tags else encoded


# --- PNG


def scan_png(data: bytes) -> Scan | None:
    """None where chunks are damaged or in no order."""
    if not data.startswith(PNG_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 57:
        return None
    position, kind, seen = len(PNG_SIGNATURE), b"", False
    before: list[bytes] = []
    after: list[bytes] = []
    lost: list[str] = []
    orientation, plain = 1, True
    while position + 12 <= len(data) and kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        if (position == 8) != (kind == b"IHDR") or end > len(data):
            return None
        if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return None
        seen |= kind == b"IDAT"
        if kind not in _PNG_OWN:
            if kind in _PNG_KNOWN or kind[3] & 32:  # the letter's case says whether a chunk may outlive the pixels
                (after if seen else before).append(data[position:end])
                if kind == b"eXIf":
                    orientation = exif_orientation(data[position + 8 : end - 4])
            elif kind != b"hIST":
                lost.append(f"PNG chunk {kind.decode('latin-1')}")
            plain &= kind in _PNG_KNOWN or kind in (b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"eXIf")
        plain &= kind not in (b"PLTE", b"tRNS")
        position = end
    if kind != b"IEND":
        return None
    if position != len(data):
        lost.append("bytes behind the picture")
        plain = False
    width, height, bits, colour, *rest = struct.unpack_from(">IIBBBBB", data, 16)
    carried = Carried(b"".join(before), b"".join(after), lost=tuple(dict.fromkeys(lost)), orientation=orientation)
    return Scan(height, width, bits, colour, carried, plain and not any(rest))


def _split_png(chunks: bytes) -> list[bytes]:
    found, position = [], 0
    while position < len(chunks):
        end = position + 12 + struct.unpack_from(">I", chunks, position)[0]
        found.append(chunks[position:end])
        position = end
    return found


# --- JPEG


def _split_jpeg(segments: bytes) -> list[bytes]:
    found, position = [], 0
    while position < len(segments):
        end = position + 2 + struct.unpack_from(">H", segments, position + 2)[0]
        found.append(segments[position:end])
        position = end
    return found


def scan_jpeg(data: bytes) -> Scan | None:
    """None where segments are damaged, or the frame is of a kind that is not read."""
    if not data.startswith(b"\xff\xd8"):
        return None
    position, frame, plain = 2, None, True
    kept: list[bytes] = []
    lost: list[str] = []
    orientation = 1
    while position + 4 <= len(data):
        mark, kind, size = struct.unpack_from(">BBH", data, position)
        if mark != 0xFF or size < 2:
            return None
        if kind == 0xFF:  # padding
            position, plain = position + 1, False
            continue
        body = data[position + 4 : position + 2 + size]
        if kind == 0xDA:  # the picture follows
            if frame is None:
                return None
            if not lost and not data.rstrip(b"\0").endswith(b"\xff\xd9"):
                lost.append("bytes behind the picture")
                plain = False
            # a JFIF header comes first
            kept.sort(key=lambda segment: segment[:2] != b"\xff\xe0")
            first = kept and kept[0][1] == 0xE0
            plain &= bool(first)
            carried = Carried(b"".join(kept), lost=tuple(dict.fromkeys(lost)), orientation=orientation)
            return Scan(*frame, carried, plain)
        if kind in _JPEG_FRAMES and frame is None and size >= 8:
            if position + 10 > len(data):
                return None
            bits, height, width, colours = struct.unpack_from(">BHHB", data, position + 4)
            if bits != 8 or not height or not width:
                return None
            frame = height, width, bits, colours
        elif 0xE0 <= kind <= 0xEF or kind == 0xFE:
            raw = data[position : position + 2 + size]
            if kind == 0xE2 and body.startswith(b"MPF\0"):
                lost.append("pictures behind the first")
                plain = False
            elif kind == 0xEE and body.startswith(b"Adobe"):
                plain = False  # how the colours are stored: the new file's are stored its own way
            elif kind == 0xE0 and not body.startswith(b"JFIF\0"):
                lost.append("JPEG segment APP0")
                plain = False
            else:
                kept.append(raw)
                plain &= kind in _JPEG_PLAIN_APPS or kind == 0xFE
                if kind == 0xE1 and body.startswith(b"Exif\0\0"):
                    orientation = exif_orientation(body[6:])
        elif kind not in _JPEG_TABLES:
            plain = False
        position += 2 + size
    return None


# --- TIFF


def scan_tiff(data: bytes) -> Carried:
    """What the first picture of a TIFF carries; nothing where the table is damaged."""
    order, wide, first = _tiff_head(data)
    if not order:
        return Carried()
    lost: list[str] = []
    tags = []
    for tag in _read_table(data, first, order, wide, lost, 0):
        if tag[0] in _TIFF_STALE:
            lost.append(_TIFF_STALE[tag[0]])
        elif tag[0] == 330:
            lost.append("smaller copies of the picture")
        elif tag[0] not in _TIFF_OWN:
            tags.append(tag)
    return Carried(tags=tuple(tags), lost=tuple(dict.fromkeys(lost)))


def exif_orientation(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or anything else."""
    order, wide, first = _tiff_head(exif.removeprefix(b"Exif\0\0"))
    if not order:
        return 1
    for tag, kind, count, value in _read_table(exif.removeprefix(b"Exif\0\0"), first, order, wide, [], _DEEPEST):
        if tag == ORIENTATION and kind == 3 and count == 1 and isinstance(value, bytes):
            found = int.from_bytes(value, "little")
            return found if 1 <= found <= 8 else 1
    return 1


def _tiff_head(data: bytes) -> tuple[str, bool, int]:
    """Byte order ("" if this is no TIFF), whether it is a BigTIFF, and where its first table is."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    if not order or len(data) < 16:
        return "", False, 0
    version = struct.unpack_from(order + "H", data, 2)[0]
    if version not in (42, 43):
        return "", False, 0
    wide = version == 43
    return order, wide, struct.unpack_from(order + ("Q" if wide else "I"), data, 8 if wide else 4)[0]


def _read_table(data: bytes, at: int, order: str, wide: bool, lost: list[str], depth: int) -> list[Tag]:
    """The tags of one table. What lies outside the file is left out and named."""
    size, head, entry = (8, "Q", 20) if wide else (2, "H", 12)
    if at + size > len(data):
        return []
    number = struct.unpack_from(order + head, data, at)[0]
    found: list[Tag] = []
    for i in range(min(number, _MOST_TAGS)):
        position = at + size + i * entry
        if position + entry > len(data):
            break
        tag, kind = struct.unpack_from(order + "HH", data, position)
        count = struct.unpack_from(order + ("Q" if wide else "I"), data, position + 4)[0]
        if kind not in _TIFF_SIZES:
            lost.append(f"TIFF tag {tag}")
            continue
        length, inline = _TIFF_SIZES[kind] * count, entry - (12 if wide else 8)
        value = position + entry - inline
        if length > inline:
            value = struct.unpack_from(order + ("Q" if wide else "I"), data, value)[0]
        if value + length > len(data):
            if tag not in _TIFF_OWN:
                lost.append(f"TIFF tag {tag}")
            continue
        raw = data[value : value + length]
        if tag in _TIFF_FOLDERS and count == 1 and length == 4:
            if depth < _DEEPEST:
                inner = _read_table(data, struct.unpack(order + "I", raw)[0], order, wide, lost, depth + 1)
                found.append((tag, 4, 1, tuple(inner)))
            continue
        unit = _TIFF_UNITS[kind]
        if order == ">" and unit > 1:
            raw = b"".join(raw[j : j + unit][::-1] for j in range(0, len(raw), unit))
        found.append((tag, kind, count, raw))
    return found


def _insert_tiff(encoded: bytes, tags: tuple[Tag, ...]) -> bytes:
    """A little-endian TIFF with further tags: its table is written anew, behind all that is there."""
    order, wide, first = _tiff_head(encoded)
    assert order == "<" and not wide
    own = [tag for tag in _read_table(encoded, first, order, wide, [], 0) if tag[0] in _TIFF_OWN]
    body = bytearray(encoded + bytes(len(encoded) % 2))
    at = _write_table(body, sorted([*own, *tags], key=lambda tag: tag[0]))
    struct.pack_into("<I", body, 4, at)
    return bytes(body)


def _write_table(body: bytearray, tags: list[Tag]) -> int:
    """Append a table and its values; returns where it begins."""
    rows = []
    for tag, kind, count, value in tags:
        if isinstance(value, tuple):
            raw = struct.pack("<I", _write_table(body, list(value)))
        else:
            assert isinstance(value, bytes)
            raw = value
        if len(raw) > 4:
            place = len(body)
            body += raw + bytes(len(raw) % 2)
            raw = struct.pack("<I", place)
        rows.append(struct.pack("<HHI", tag, kind, count) + raw.ljust(4, b"\0"))
    at = len(body)
    body += struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
    return at
