"""What kinds of pictures a dataset holds: whether some of them are labels, and which files look like images unread.

A label that is a picture (a mask, a depth map) is destroyed by a refiner and teaches a discriminator nonsense. Nobody
can be sure from outside which pictures are labels, so wherever there are grounds to think so, the user is asked.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from fastsimgan.data.formats.listing import is_junk, looks_unread
from fastsimgan.data.formats.stored_image import ARRAY_FORMATS, StoredImage
from fastsimgan.errors import InputError
from fastsimgan.storage.names import printable

LOOKED_AT = 48  # pictures that are decoded, spread over the groups
MOST_GROUPS = 512  # patterns of names; further ones count as one group a folder
FEW = 32  # levels (or colours) of a label; photographs and renders have more
FLAT = 0.85  # share of pixels that equal their left neighbour, from which on a picture consists of areas
_PIXELS_A_LEVEL = 32  # a picture smaller than this many times its levels tells nothing
_PALETTE = 16  # colours used of a palette, up to which it is a label whatever else there is

_WORD = re.compile(
    r"(?:\w*(?:mask|depth|labels?|segmentation|segmap|instance)"
    r"|(?:seg|segm|semseg|semantic|panoptic|label|mask|depth|normal|normals|instance|annotation|annot|anno|disparity|"
    r"disp|matte|trimap|parsing|stencil|gt|groundtruth|ground_truth|classes|flow|class_?segmaps?)"
    r"(?:s|map|maps|id|ids|img|image|images|class|classes|object|trainids|png)?)"
)
_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_NUMBERS = re.compile(r"(?=[0-9a-f-]*\d)(?=[0-9a-f-]*[a-f])[0-9a-f]{8,}(?:-[0-9a-f]+)*|\d+")


@dataclass
class _Group:
    """Files of one pattern of names (``rgb/#.png``)."""

    word: str
    count: int = 0
    names: list[str] = field(default_factory=list)  # evenly spread, at most 2 * LOOKED_AT
    first: list[str] = field(default_factory=list)
    _stride: int = 1

    def add(self, name: str) -> None:
        if self.count % self._stride == 0:
            self.names.append(name)
            if len(self.names) >= 2 * LOOKED_AT:
                self.names = self.names[::2]
                self._stride *= 2
        if len(self.first) < LOOKED_AT:
            self.first.append(name)
        self.count += 1


@dataclass(frozen=True)
class _Seen:
    """What one picture turned out to be."""

    kind: str
    levels: int  # colours; 0 where it is too small to tell
    stored: str


class Census:
    """Is told every name of a dataset, images apart from other files; then `check` judges."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self.unread: Counter[str] = Counter()
        self.arrays = 0
        """Files of arrays that belong to no image."""
        self._unread_name = ""

    def image(self, name: str) -> None:
        """Count a file that is to be read as an image."""
        pattern = _NUMBERS.sub("#", name)
        if pattern not in self._groups:
            if len(self._groups) >= MOST_GROUPS:
                pattern = str(PurePosixPath(pattern).parent) + "/*"
            self._groups.setdefault(pattern, _Group(_label_word(pattern)))
        self._groups[pattern].add(name)

    def alone(self, name: str) -> None:
        """Count a file that is no image, and no image's sidecar."""
        self.arrays += PurePosixPath(name).suffix.lower() in ARRAY_FORMATS
        if looks_unread(name) and not is_junk(name) and not _label_word(name):
            self.unread[PurePosixPath(name).suffix.lower()] += 1
            self._unread_name = self._unread_name or name

    def unread_text(self) -> str:
        """What looks like images and is not read, or ""."""
        if not self.unread:
            return ""
        number = self.unread.total()
        listed = ", ".join(f"{count} {suffix}" for suffix, count in self.unread.most_common())
        some = f"{number} files look like images and are" if number > 1 else "1 file looks like an image and is"
        return f"{some} not read: {listed} (such as {printable(self._unread_name)})"

    def check(self, where: str, look: Callable[[str], StoredImage], flag: Callable[[str], str]) -> None:
        """Raise InputError if some of the pictures seem to be labels.

        Args:
            where: the dataset, for the message.
            look: decodes a picture by its name; `LOOKED_AT` of them are looked at, spread over the groups of names.
            flag: the way out, from a glob that tells which files are images.
        """
        if (reason := self._reason(look)) is None:
            return
        what, glob = reason
        raise InputError(f"{where}: {what}; {flag(glob)} tells which files are images, {flag('*')} that all are")

    def _reason(self, look: Callable[[str], StoredImage]) -> tuple[str, str] | None:
        labels = {pattern: group for pattern, group in self._groups.items() if group.word}
        images = {pattern: group for pattern, group in self._groups.items() if not group.word}
        if labels and images:
            word = next(iter(labels.values())).word
            return f"{_some(labels)} be labels by the name ({word}), {_some(images, short=True)}", _glob(images, labels)
        seen = self._look(look)
        if not seen:
            return None
        few = {pattern: share for pattern, each in seen.items() if (share := _few_share(each))}
        photos = any(_is_photo(one) for each in seen.values() for one in each)
        palettes = [one for each in seen.values() for one in each if one.stored == "palette" and one.levels]
        if few and (photos or (palettes and all(one.levels <= _PALETTE for one in palettes))):
            labels = {pattern: self._groups[pattern] for pattern in few}
            images = {pattern: group for pattern, group in self._groups.items() if pattern not in few}
            levels = [one.levels for pattern in few for one in seen[pattern] if _is_few(one)]
            stored = {one.stored for pattern in few for one in seen[pattern] if _is_few(one)} - {""}
            how = f"{' and '.join(sorted(stored))} files of " if stored else ""
            most = f"{how}{min(levels)} to {max(levels)} levels or colours" if len(set(levels)) > 1 else (
                f"{how}{levels[0]} levels or colours"
            )  # fmt: skip
            others = f", {_some(images, short=True)}" if images else ""
            return f"{_some(labels)} be labels by the values ({most}){others}", _glob(images, labels)
        kinds = {pattern: {one.kind for one in each} for pattern, each in seen.items() if each}
        uniform = {pattern: kind.pop() for pattern, kind in kinds.items() if len(kind) == 1}
        for first, one in uniform.items():
            for second, other in uniform.items():
                if first < second and one != other and self._share_names(first, second):
                    pair = self._groups[first].first[0], self._groups[second].first[0]
                    image, label = (first, second) if _likely(one) >= _likely(other) else (second, first)
                    return (
                        f"{printable(pair[0])} ({one}) and {printable(pair[1])} ({other}) share their names and differ "
                        "in kind: one of them may be a label",
                        _glob({image: self._groups[image]}, {label: self._groups[label]}),
                    )
        return None

    def _look(self, look: Callable[[str], StoredImage]) -> dict[str, list[_Seen]]:
        """Pictures of each group. One that cannot be read says nothing here; others will complain of it."""
        found: dict[str, list[_Seen]] = {}
        each = max(2, min(16, LOOKED_AT // max(1, len(self._groups))))
        for pattern, group in list(self._groups.items())[:LOOKED_AT]:
            step = max(1, len(group.names) // each)
            found[pattern] = []
            for name in group.names[::step][:each]:
                try:
                    found[pattern].append(_see(look(name)))
                except InputError:
                    continue
        return found

    def _share_names(self, first: str, second: str) -> bool:
        beside = first.rpartition("/")[0] == second.rpartition("/")[0]
        one, other = ({_identity(name, beside) for name in self._groups[pattern].first} for pattern in (first, second))
        return len(one & other) >= max(2, min(len(one), len(other)) / 2)


def _label_word(name: str) -> str:
    """The first word in a name by which people call labels, or ""."""
    whole, dot, _ = name.rpartition(".")  # the suffix says how a file is stored, not what it is
    for stem in (whole if dot else name).split("/"):
        pieces = [token.lower() for token in _TOKENS.findall(stem)]
        for word in (*pieces, re.sub(r"[^a-z]", "", stem.lower())):
            if _WORD.fullmatch(word):
                return word
    return ""


def _identity(name: str, beside: bool) -> str:
    """What a picture and its mask have in common.

    In one folder (``beside``) they differ in what follows the number (``a12_rgb``, ``a12_m``); in two, the number may
    be all that they share.
    """
    base = name.rpartition("/")[2].partition(".")[0]
    if beside:
        return re.sub(r"(?<=\d)[^0-9]+$", "", base)
    numbers = _NUMBERS.findall(base)
    return numbers[-1] if numbers else base


def _see(image: StoredImage) -> _Seen:
    header = image.header
    kind = f"{np.dtype(header.dtype).itemsize * 8}-bit {'grey' if len(header.shape) == 2 else 'RGB'}"
    pixels = image.pixels
    if pixels.size > 3 << 20:  # rows spread over a large picture tell as much
        pixels = pixels[:: pixels.size // (3 << 20) + 1]
    if pixels.ndim == 3:
        wide = pixels.astype(np.uint64)
        flat = (wide[..., 0] << np.uint64(32) | wide[..., 1] << np.uint64(16) | wide[..., 2]).reshape(-1)
    else:
        flat = pixels.reshape(-1)
    levels = len(np.unique(flat))
    if flat.size > 1 and np.mean(flat[1:] == flat[:-1]) >= FLAT:
        kind += " in flat areas"
    return _Seen(kind, levels if flat.size >= _PIXELS_A_LEVEL * min(levels, FEW) else 0, header.stored)


def _likely(kind: str) -> tuple[bool, bool, bool]:
    """Of two kinds of picture with shared names, the one that is rather the image has the larger."""
    return "RGB" in kind, "flat" not in kind, "8-bit" in kind


def _is_few(one: _Seen) -> bool:
    return 2 <= one.levels <= FEW


def _is_photo(one: _Seen) -> bool:
    return one.levels > FEW


def _few_share(each: list[_Seen]) -> float:
    """The share of a group that has few levels; 0 where they are so rare that they may be dark or empty pictures."""
    told = [one for one in each if one.levels > 1]  # an empty picture may be of either kind
    few = sum(map(_is_few, told))
    return few / len(told) if told and (few == len(told) or (few >= 2 and few >= 0.2 * len(told))) else 0.0


def _some(groups: dict[str, _Group], short: bool = False) -> str:
    """The first file of the groups, and how many there are."""
    count, first = sum(group.count for group in groups.values()), next(iter(groups.values())).first[0]
    if short:
        return f"among {count} such as {printable(first)}"
    return f"{count} pictures such as {printable(first)} may" if count > 1 else f"the picture {printable(first)} may"


def _glob(images: dict[str, _Group], labels: dict[str, _Group]) -> str:
    """A glob that takes the images and leaves the labels, if one pattern will do."""
    names = [name for group in images.values() for name in group.first]
    taken = [name for group in labels.values() for name in group.first]
    if not names:
        return "GLOB"
    for glob in _candidates(list(images), names):
        if all(fnmatch.fnmatchcase(name, glob) for name in names) and not any(
            fnmatch.fnmatchcase(name, glob) for name in taken
        ):
            return glob
    return "GLOB"


def _candidates(patterns: list[str], names: list[str]) -> Iterator[str]:
    """Globs that may take ``names``, the most telling first: by the only pattern, the folder, the ending, the
    beginning."""
    folders = [name.rpartition("/")[0] for name in names]
    if len(patterns) == 1:
        folder, slash, base = patterns[0].rpartition("/")
        if len(set(folders)) == 1:  # as it is called, its numbers too
            folder = _literal(folders[0])
        for pattern in (re.sub(r"#.*(?=\.)", "*", base), base.replace("#", "*"), base.replace("#", "*[0-9]")):
            yield folder.replace("#", "*") + slash + pattern
    ending = os.path.commonprefix([name[::-1] for name in names])[::-1]
    suffix = "." + ending.rpartition(".")[2] if "." in ending else ""
    common = os.path.commonprefix([folder.split("/") for folder in folders])
    for depth in range(1, len(common) + 1):
        if common[0]:
            yield _literal("/".join(common[:depth])) + "/*" + suffix
    ending = re.sub(r"^[0-9]+", "", ending.rpartition("/")[2])
    beginning = re.sub(r"[0-9]+$", "", os.path.commonprefix(names))
    for most in (suffix, ending):
        if most:
            yield "*" + _literal(most)
            yield "*[0-9]" + _literal(most)
    if beginning:
        yield _literal(beginning) + "*" + suffix
        yield _literal(beginning) + "*[0-9]" + suffix


def _literal(text: str) -> str:
    """A glob for exactly this text."""
    return re.sub(r"([*?[])", r"[\1]", text)
