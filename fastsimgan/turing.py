"""`python -m fastsimgan.turing`: the visual Turing test (§3.1.2). People say of each image whether it is real."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image

from fastsimgan import cli
from fastsimgan.data.formats.image_folder import FolderImages
from fastsimgan.data.formats.open_images import matches, open_images, refuse_inside
from fastsimgan.data.formats.webdataset import ShardImages
from fastsimgan.data.ragged import Images, crop_of
from fastsimgan.data.reading import Reading
from fastsimgan.data.resizing import Scale, resize
from fastsimgan.errors import InputError
from fastsimgan.storage.atomic import refuse_existing, staged
from fastsimgan.storage.names import printable

DESCRIPTION = """A visual Turing test: `make` writes one HTML page that needs no network and shows real and refined
images in random order; whoever answers downloads a JSON file; `score` counts these."""

_FORMAT = "fastsimgan.turing/1"
_LARGEST_ANSWER = 1 << 20  # bytes


@dataclass(frozen=True)
class Make:
    """Write the page."""

    real: Path
    """Real images: a folder, .npz or .npy."""
    refined: Path
    """Refined images (or any others to be told from real ones). Of images of several sizes the middle is shown."""
    out: Path
    """The page, an .html that must not exist yet."""
    count: int = 50
    """Images of each kind."""
    at_a_time: int = 20
    """Images on the screen."""
    seed: int = 0
    """Of the choice and the order."""
    title: str = "Real or refined?"
    """Heading of the page."""
    images: str | None = None
    """Glob of the files that are images ('rgb/*.png'), where masks or the like lie beside them; '*': all that have an
    image's suffix. Among real images it counts only if some name matches."""
    key: str | None = None
    """Name of the array, dataset or group that holds the images, where it is not `images` and there are others."""


@dataclass(frozen=True)
class Score:
    """Count answers."""

    answers: Annotated[tuple[Path, ...], cli.positional()]
    """The JSON files that people downloaded, all of one page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, make or score; return the exit code."""
    either = {"make": Make, "score": Score}
    return cli.run(_run, either, prog="python -m fastsimgan.turing", description=DESCRIPTION, argv=argv)


def _run(config: Make | Score) -> None:
    if isinstance(config, Make):
        make(config)
    else:
        print(report(score(config.answers)))


def make(config: Make) -> None:
    """Write the page of ``config``; InputError if the images are too few or unequal, or the page is there."""
    refuse_existing(config.out)
    refuse_inside(config.out, "--out", config.real, config.refined)
    for name in ("count", "at_a_time"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.seed < 0:
        raise InputError(f"--seed must be at least 0, got {config.seed}")
    rng = np.random.default_rng(config.seed)
    refined = _chosen(config, "refined", Reading(any_size=True), rng)
    colour: Literal["grey", "rgb"] = "grey" if _channels(refined[0]) == 1 else "rgb"
    height = int(np.median([image.shape[0] for image in refined]))
    as_refined = Reading(any_size=True, upright=True, colour=colour, scale=Scale(height=height))
    real = [Reading.coloured(image, colour) for image in _chosen(config, "real", as_refined, rng)]
    # another size would give the answer away
    sizes = {image.shape[:2] for image in (*real, *refined)}
    if len(sizes) > 1:
        sides = np.min(list(sizes), axis=0)
        size = int(sides[0]), int(sides[1])
        cli.LOG.info(
            f"shown: the middle {size[0]}x{size[1]} of each image, as sizes would give the answer away; photos much "
            f"higher than {height} pixels, the refined images' median, are brought to that first"
        )
        real, refined = ([_middle(image, size) for image in images] for images in (real, refined))
    if real[0].shape != refined[0].shape:
        raise InputError(
            f"--refined images must have the real ones' channels, got {_channels(refined[0])} for {_channels(real[0])}"
        )
    cards = [(kind, _png(image)) for kind, images in (("real", real), ("refined", refined)) for image in images]
    cards = [cards[i] for i in rng.permutation(len(cards))]
    test = hashlib.sha256("".join(kind + png for kind, png in cards).encode()).hexdigest()
    data = {
        "format": _FORMAT,
        "test": test,
        "names": f"{config.real.name} / {config.refined.name}",
        "page": config.at_a_time,
        "images": [png for _, png in cards],
        "key": "".join("1" if kind == "refined" else "0" for kind, _ in cards),
    }
    # "<" is the one character by which text inside a script element can end it
    page = _PAGE.replace("@TITLE@", html.escape(config.title)).replace(
        "@DATA@", json.dumps(data).replace("<", "\\u003c")
    )
    with staged(config.out) as partial:
        partial.write_text(page, encoding="utf-8")
    cli.LOG.info(f"{printable(config.out)}: {config.count} real and {config.count} refined images")


def _chosen(config: Make, kind: str, reading: Reading, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """The images of one kind that will be shown."""
    path: Path = getattr(config, kind)
    reading = replace(reading, images=config.images, key=config.key, links="inside", on_error="skip")
    if kind == "real" and config.images is not None and not matches(path, reading):
        reading = replace(reading, images=None)
    source = open_images(path, reading)
    images: Images = source.load_set() if isinstance(source, FolderImages | ShardImages) else source.load()
    for reason in getattr(source, "left_out", []):
        cli.LOG.info(f"left out: {reason}")
    if len(images) < config.count:
        raise InputError(f"{printable(path)}: must hold at least --count={config.count} images, got {len(images)}")
    chosen = rng.choice(len(images), config.count, replace=False)
    found = [images[int(i)] for i in chosen]
    return found if reading.scale is None else [resize(image, reading.scale.of(*image.shape[:2])) for image in found]


def _middle(image: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    return crop_of(image, ((image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2), size)


def _channels(image: np.ndarray[Any, Any]) -> int:
    return int(image.shape[2]) if image.ndim == 3 else 1


def score(paths: Sequence[Path]) -> dict[str, Any]:
    """Count the answers in ``paths``, JSON files of one page.

    Returns:
        ``people``; ``confusion``, ``{truth: {answer: count}}`` over "real" and "refined"; ``right`` and ``answers``;
        ``p``, the one-sided exact binomial probability of at least so many right ones by guessing.

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
    return {
        "people": len(people), "confusion": confusion, "right": right, "answers": total, "p": binomial_p(right, total)
    }  # fmt: skip


def binomial_p(right: int, total: int) -> float:
    """P(at least ``right`` of ``total``) by tossing a coin, exact: integers until the last division."""
    if not 0 <= right <= total or total < 1:
        raise InputError(f"right must be from 0 to total, and total at least 1, got {right} of {total}")
    ways = sum(math.comb(total, k) for k in range(right, total + 1))
    return ways / (1 << total)  # Python divides integers of any size with one correct rounding


def report(result: dict[str, Any]) -> str:
    """`score`'s result as text."""
    lines = [f"{'truth':<10}{'said real':>12}{'said refined':>14}"]
    for truth, row in result["confusion"].items():
        lines.append(f"{truth:<10}{row['real']:>12}{row['refined']:>14}")
    share = 100 * result["right"] / result["answers"]
    lines.append(
        f"{result['right']} of {result['answers']} right ({share:.1f} %), {result['people']} sheet(s); one-sided exact "
        f"binomial p = {result['p']:.12g} (small: people tell them apart)"
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


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 12px;
  color: #111; background: #fff }
#grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 10px }
.card { border: 3px solid #ccc; border-radius: 6px; padding: 6px }
.card:focus { outline: 3px solid #06c }
.card img { width: 100%; image-rendering: pixelated; display: block }
.card div { display: flex; gap: 6px; margin-top: 6px }
button { font: inherit; min-height: 44px; flex: 1; border: 1px solid #888; border-radius: 6px;
  background: #f4f4f4; color: #111 }
button[aria-pressed=true] { background: #06c; color: #fff }
#next { width: 100%; margin: 12px 0 } #next:disabled { color: #888 }
</style></head><body>
<h1>@TITLE@</h1>
<p>Some images are real, some are made by a computer. Say of each which it is: tap, or press <b>r</b> for real and
<b>f</b> for refined (made). <span id="names"></span></p>
<p id="progress" aria-live="polite"></p><div id="grid"></div><button id="next" disabled>Next</button>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const answers = new Array(data.images.length).fill(null), kinds = ["real", "refined"];
const grid = document.getElementById("grid"), next = document.getElementById("next");
let first = 0;
document.getElementById("names").textContent = data.names;
const last = () => Math.min(first + data.page, data.images.length);
function refresh() {
  const done = answers.filter(a => a !== null).length;
  document.getElementById("progress").textContent = done + " of " + data.images.length + " answered";
  next.disabled = answers.slice(first, last()).includes(null);
  next.textContent = last() === data.images.length ? "Download answers" : "Next";
}
function choose(card, index, kind) {
  answers[index] = kind;
  card.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(kinds[i] === kind)));
  refresh();
}
function show() {
  grid.replaceChildren();
  for (let i = first; i < last(); i++) {
    const card = document.createElement("div"), image = new Image(), row = document.createElement("div");
    card.className = "card"; card.tabIndex = 0;
    image.src = "data:image/png;base64," + data.images[i]; image.alt = "image " + (i + 1);
    for (const kind of kinds) {
      const button = document.createElement("button");
      button.textContent = kind; button.tabIndex = -1; button.setAttribute("aria-pressed", "false");
      button.onclick = () => choose(card, i, kind);
      row.append(button);
    }
    card.onkeydown = event => {
      const kind = { r: "real", f: "refined" }[event.key];
      if (!kind) return;
      choose(card, i, kind);
      (card.nextElementSibling || next).focus();
    };
    card.append(image, row); grid.append(card);
  }
  refresh(); window.scrollTo(0, 0); grid.firstChild.focus();
}
next.onclick = () => {
  if (last() < data.images.length) { first = last(); show(); return; }
  const person = Array.from(crypto.getRandomValues(new Uint8Array(8)), b => b.toString(16).padStart(2, "0")).join("");
  const sheet = { format: data.format, test: data.test, person,
    answers: answers.map((answer, i) => ({ truth: kinds[Number(data.key[i])], answer })) };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(sheet)], { type: "application/json" }));
  link.download = "answers-" + person + ".json";
  link.click();
  document.getElementById("progress").textContent = "Thank you: send " + link.download + " to whoever asked you.";
};
show();
</script></body></html>
"""

if __name__ == "__main__":
    sys.exit(main())
