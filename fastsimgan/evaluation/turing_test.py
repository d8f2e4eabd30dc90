"""The visual Turing test (§3.1.2): a page that shows real and refined images, and the count of what people answered."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastsimgan.data.formats.open_images import matches, open_images, refuse_inside
from fastsimgan.data.ragged import crop_of
from fastsimgan.data.reading import Reading
from fastsimgan.data.resizing import Scale, resize
from fastsimgan.errors import InputError
from fastsimgan.metrics.statistics import binomial_p
from fastsimgan.reporting.templates import fill_in
from fastsimgan.storage.atomic import refuse_existing, staged
from fastsimgan.storage.names import printable

Array = NDArray[Any]

_PAGE = Path(__file__).with_name("turing_page.html")
_FORMAT = "fastsimgan.turing/1"
_LARGEST_ANSWER = 1 << 20  # bytes
_READING = Reading(any_size=True, links="inside", on_error="skip")


@dataclass(frozen=True)
class Score:
    """What people answered. ``confusion`` is ``{truth: {answer: count}}`` over "real" and "refined"."""

    people: int
    confusion: dict[str, dict[str, int]]
    right: int
    answers: int
    p: float
    """The one-sided exact binomial probability of at least so many right ones by guessing."""


def make(
    real: Path,
    refined: Path,
    out: Path,
    *,
    count: int = 50,
    at_a_time: int = 20,
    seed: int = 0,
    title: str = "Real or refined?",
    images: str | None = None,
    key: str | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Write a page that shows real and refined images in random order and needs no network.

    Args:
        real, refined: sets of images of any kind; the page's names are theirs.
        out: an .html that must not exist yet.
        count: images of each kind.
        at_a_time: images on the screen.
        seed: of the choice and the order.
        title: heading of the page.
        images: glob of the files that are images; among real ones it counts only if some name matches.
        key: name of the array, dataset or group that holds the images.
        log: called with each line of the report.

    Raises:
        InputError: the images are too few or unequal, a number is out of range, or the page is there.
    """
    refuse_existing(out)
    refuse_inside(out, "--out", real, refined)
    for name, value in (("count", count), ("at-a-time", at_a_time)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if seed < 0:
        raise InputError(f"--seed must be at least 0, got {seed}")
    rng = np.random.default_rng(seed)
    kinds = _both_kinds(real, refined, replace(_READING, images=images, key=key), count, rng, log)
    cards = [(kind, _png(image)) for kind, of_kind in kinds.items() for image in of_kind]
    cards = [cards[i] for i in rng.permutation(len(cards))]
    data = {
        "format": _FORMAT,
        "test": hashlib.sha256("".join(kind + png for kind, png in cards).encode()).hexdigest(),
        "names": f"{real.name} / {refined.name}",
        "page": at_a_time,
        "images": [png for _, png in cards],
        "key": "".join("1" if kind == "refined" else "0" for kind, _ in cards),
    }
    with staged(out) as partial:
        partial.write_text(fill_in(_PAGE, title=title, data=data), encoding="utf-8")
    log(f"{printable(out)}: {count} real and {count} refined images")


def _both_kinds(
    real: Path, refined: Path, reading: Reading, count: int, rng: np.random.Generator, log: Callable[[str], None]
) -> dict[str, list[Array]]:
    """The images that will be shown, real and refined, all of one size."""
    made = _chosen(refined, reading, count, rng, log)
    colour: Literal["grey", "rgb"] = "grey" if _channels(made[0]) == 1 else "rgb"
    height = int(np.median([image.shape[0] for image in made]))
    as_made = replace(reading, upright=True, colour=colour, scale=Scale(height=height))
    if as_made.images is not None and not matches(real, as_made):
        as_made = replace(as_made, images=None)
    photos = [Reading.coloured(image, colour) for image in _chosen(real, as_made, count, rng, log)]
    # another size would give the answer away
    sizes = {image.shape[:2] for image in (*photos, *made)}
    if len(sizes) > 1:
        sides = np.min(list(sizes), axis=0)
        size = int(sides[0]), int(sides[1])
        log(
            f"shown: the middle {size[0]}x{size[1]} of each image, as sizes would give the answer away; photos much "
            f"higher than {height} pixels, the refined images' median, are brought to that first"
        )
        photos, made = ([_middle(image, size) for image in of_kind] for of_kind in (photos, made))
    if photos[0].shape != made[0].shape:
        raise InputError(
            f"--refined images must have the real ones' channels, got {_channels(made[0])} for {_channels(photos[0])}"
        )
    return {"real": photos, "refined": made}


def _chosen(
    path: Path, reading: Reading, count: int, rng: np.random.Generator, log: Callable[[str], None]
) -> list[Array]:
    """``count`` images of one kind."""
    source = open_images(path, reading)
    images = source.load_set()
    for reason in source.left_out:
        log(f"left out: {reason}")
    if len(images) < count:
        raise InputError(f"{printable(path)}: must hold at least --count={count} images, got {len(images)}")
    chosen = rng.choice(len(images), count, replace=False)
    found = [images[int(i)] for i in chosen]
    return found if reading.scale is None else [resize(image, reading.scale.of(*image.shape[:2])) for image in found]


def _middle(image: Array, size: tuple[int, int]) -> Array:
    return crop_of(image, ((image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2), size)


def _channels(image: Array) -> int:
    return int(image.shape[2]) if image.ndim == 3 else 1


def score(paths: Sequence[Path]) -> Score:
    """Count the answers in ``paths``, JSON files of one page.

    Raises:
        InputError: no file, a file that is no answer sheet, answers to another page, or the same sheet twice.
    """
    if not paths:
        raise InputError("score needs at least one answer file, got none")
    confusion = {truth: {"real": 0, "refined": 0} for truth in ("real", "refined")}
    tests: dict[str, Path] = {}
    people: dict[str, Path] = {}
    for path in paths:
        sheet = _read(path)
        tests.setdefault(sheet["test"], path)
        if len(tests) > 1:
            first, second = tests.values()
            raise InputError(f"{printable(second)}: must answer the page that {printable(first)} does")
        if (twin := people.setdefault(sheet["person"], path)) is not path:
            raise InputError(f"{printable(path)}: is the same sheet as {printable(twin)}")
        for answer in sheet["answers"]:
            confusion[answer["truth"]][answer["answer"]] += 1
    right = confusion["real"]["real"] + confusion["refined"]["refined"]
    total = sum(sum(row.values()) for row in confusion.values())
    return Score(len(people), confusion, right, total, binomial_p(right, total))


def report(result: Score) -> str:
    """`score`'s result as text."""
    lines = [f"{'truth':<10}{'said real':>12}{'said refined':>14}"]
    for truth, row in result.confusion.items():
        lines.append(f"{truth:<10}{row['real']:>12}{row['refined']:>14}")
    share = 100 * result.right / result.answers
    lines.append(
        f"{result.right} of {result.answers} right ({share:.1f} %), {result.people} sheet(s); one-sided exact "
        f"binomial p = {result.p:.12g} (small: people tell them apart)"
    )
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_ANSWER:
            raise InputError(f"{printable(path)}: must be at most {_LARGEST_ANSWER} bytes, got {path.stat().st_size}")
        sheet = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{printable(path)}: must be JSON: {printable(str(error))}") from error

    def rule(holds: bool, text: str) -> None:
        if not holds:
            raise InputError(f"{printable(path)}: {text}")

    rule(isinstance(sheet, dict) and sheet.get("format") == _FORMAT, f"must be an answer sheet with format {_FORMAT}")
    for name in ("test", "person"):
        rule(isinstance(sheet.get(name), str), f"{name} must be text")
    answers = sheet.get("answers")
    rule(isinstance(answers, list) and len(answers) > 0, "answers must be a list with at least one")
    kinds = ("real", "refined")
    for number, answer in enumerate(answers):
        good = isinstance(answer, dict) and answer.get("truth") in kinds and answer.get("answer") in kinds
        rule(good, f"answer {number} must have truth and answer, each real or refined")
    return sheet


def _png(image: Any) -> str:
    """One stored image as base64 PNG, 8 bits a channel, nothing but pixels in it."""
    if image.dtype != np.uint8:
        white = 65535 if image.dtype == np.uint16 else 1
        image = np.rint(image.astype(np.float64) * (255 / white)).astype(np.uint8)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
