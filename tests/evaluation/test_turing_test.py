"""The visual Turing test: the paper's p values, hostile answers, and the page as a browser sees it."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from fastsimgan.errors import InputError
from fastsimgan.evaluation.turing_test import score
from fastsimgan.metrics.statistics import binomial_p
from fastsimgan.turing import main


def test_the_papers_p_values():
    assert binomial_p(517, 1000) == pytest.approx(0.148344675387, rel=1e-11)
    assert binomial_p(162, 200) == pytest.approx(9.92185044371e-20, rel=1e-11)
    assert binomial_p(0, 5) == 1 and binomial_p(5, 5) == 1 / 32


def sheet(person="a", test="t", real_right=3, refined_right=2, each=4):
    answers = [{"truth": "real", "answer": "real" if i < real_right else "refined"} for i in range(each)]
    answers += [{"truth": "refined", "answer": "refined" if i < refined_right else "real"} for i in range(each)]
    return {"format": "fastsimgan.turing/1", "test": test, "person": person, "answers": answers}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_score_adds_sheets_up(tmp_path, capsys):
    paths = [write(tmp_path / f"{name}.json", sheet(name)) for name in "ab"]
    result = score(paths)
    assert result.confusion == {"real": {"real": 6, "refined": 2}, "refined": {"real": 4, "refined": 4}}
    assert (result.right, result.answers, result.people) == (10, 16, 2)
    assert main(["score", *map(str, paths)]) == 0
    assert "10 of 16 right (62.5 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "must be an answer sheet"),
        (sheet(test=1), "test must be text"),
        (sheet(each=0), "at least one"),
        (sheet() | {"answers": [{"truth": ["real"], "answer": "real"}]}, "answer 0 must have"),
        (sheet() | {"answers": [{"truth": "real"}]}, "answer 0 must have"),
        (" " * ((1 << 20) + 1), "at most 1048576 bytes"),
    ],
)
def test_hostile_answers_are_one_line(content, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        score([write(tmp_path / "a.json", content)])
    assert "\n" not in str(caught.value)


def test_a_sheet_twice_or_of_another_page_is_refused(tmp_path):
    one, other = write(tmp_path / "1.json", sheet()), write(tmp_path / "2.json", sheet("b", test="u"))
    with pytest.raises(InputError, match="same sheet"):
        score([one, write(tmp_path / "copy.json", sheet())])
    with pytest.raises(InputError, match="must answer the page"):
        score([one, other])
    with pytest.raises(InputError, match="cannot be read"):
        score([tmp_path / "none.json"])


NAME = "<img src=x onerror=alert(1)></script><b>.npz"


@pytest.fixture
def page(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "d"
    for name in ("real", "refined"):
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{name}.npz", images=rng.integers(0, 256, (8, 35, 55), dtype=np.uint8))
    # "/" cannot be in a name: the markup is what is left without it
    hostile = folder / NAME.replace("/", "")
    (folder / "real.npz").rename(hostile)
    flags = ["make", "--real", str(hostile), "--refined", str(folder / "refined.npz"), "--count", "6"]
    assert main([*flags, "--at-a-time", "5", "--title", "<b>x</b>", "--out", str(tmp_path / "page.html")]) == 0
    return tmp_path / "page.html"


def test_the_page_needs_no_network_and_markup_stays_text(page):
    text = page.read_text()
    assert not re.search(r"https?://|//\w+\.|src=\"(?!data)", text)
    assert "<img" not in text and "<b>x" not in text and text.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text).group(1))
    assert data["key"].count("1") == 6 and len(set(data["images"])) == 12 and data["names"].startswith("<img src=x")


def test_make_refuses(page, tmp_path, capsys):
    both = ["--refined", str(tmp_path / "d" / "refined.npz"), "--real", str(tmp_path / "d" / "refined.npz")]
    assert main(["make", *both, "--out", str(page)]) == 2 and "ever overwritten" in capsys.readouterr().err
    assert main(["make", *both, "--out", str(tmp_path / "n.html"), "--count", "9"]) == 2
    assert "at least --count=9 images, got 8" in capsys.readouterr().err and not (tmp_path / "n.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CLICK = """<script>
const caught = []; const create = URL.createObjectURL;
URL.createObjectURL = blob => { blob.text().then(t => {
  const pre = document.createElement("pre"); pre.id = "sheet"; pre.textContent = t; document.body.append(pre); });
  return create(blob); };
for (let page = 0; page < 3; page++) {
  if (!next.disabled) throw new Error("next must wait for every answer");
  document.querySelectorAll(".card").forEach((card, i) => i % 2
    ? card.querySelectorAll("button")[1].click()
    : card.dispatchEvent(new KeyboardEvent("keydown", { key: "r" })));
  next.click();
}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_whole_run_in_a_real_browser(page, tmp_path):
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text().replace("</body>", CLICK + "</body>"))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", clicked.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'<pre id="sheet">(.*?)</pre>', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    answers = write(tmp_path / "answers.json", found.group(1))
    result = score([answers])
    assert result.answers == 12 and sum(result.confusion["real"].values()) == 6
    assert sum(row["real"] for row in result.confusion.values()) == 7  # every other one of 5, 5 and 2 images
    assert '<span id="names">&lt;img src=x' in done.stdout


def test_photos_of_any_size_are_shown_beside_refined_images(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder, sizes, channels in (("refined", [(40, 60)] * 4, 3), ("photos", [(80, 60), (50, 44), (38, 90)], 1)):
        (tmp_path / folder).mkdir()
        for i, (height, width) in enumerate(sizes):
            pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
            pixels = pixels[..., 0] if channels == 1 else pixels
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    out = tmp_path / "test.html"
    arguments = ["make", "--real", str(tmp_path / "photos"), "--refined", str(tmp_path / "refined"), "--out", str(out)]
    assert main([*arguments, "--count", "4"]) == 2
    assert "must hold at least --count=4 images, got 3" in capsys.readouterr().err
    assert main([*arguments, "--count", "3"]) == 0
    text = capsys.readouterr().out
    assert "shown: the middle 38x30 of each image" in text and "left out: " in text and "bad.png" in text
    pages = re.search(r'"images": \[(.*?)\]', out.read_text())
    shown = [Image.open(io.BytesIO(base64.b64decode(png))) for png in re.findall(r'"([^"]+)"', pages[1])]
    assert len(shown) == 6 and {(image.size, image.mode) for image in shown} == {((30, 38), "RGB")}
