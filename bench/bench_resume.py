"""``python -m bench.bench_resume``: a run on CUDA that is killed and resumed, against one that is not, bit by bit.

Three processes for each of two settings: one whole run; one killed (SIGKILL) after more than half of its steps, between
checkpoints; and that one resumed. Compared are the refiner's weights and every step's metrics. With ``deterministic``
they must be equal to the bit, or the exit code is 1; without it nothing is promised, and how far they part is said.
``--device cpu`` shows that the comparison itself is right where resuming is exact.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from bench import limits

STEPS, KILLED_AFTER, EVERY = (12, 7, 4) if limits.SMALL else (300, 170, 50)
WAIT = 240  # seconds for a process, of which compiling is the most


def child(out: Path, resume: bool, deterministic: bool, device: str) -> None:
    """One run in this process."""
    from fastsimgan.config import TrainConfig
    from fastsimgan.training.loop import fit

    settings: dict[str, Any] = {"batch_size": 128, "hidden_channels": 64, "k_g": 2, "history": 2048}
    size = (35, 55)
    if limits.SMALL or device == "cpu":
        settings, size = {"batch_size": 4, "hidden_channels": 20, "blocks": 1, "k_g": 2, "history": 16}, (16, 20)
    if deterministic:
        settings["deterministic"] = True
    config = TrainConfig(
        out=out, resume=resume, device=device, steps=STEPS, checkpoint_every=EVERY, eval_every=100_000,
        pretrain_discriminator=2, warm_up=10, **settings,
    )  # fmt: skip
    random = np.random.default_rng(0)
    sides = [random.integers(0, 256, (count, *size), dtype=np.uint8) for count in (3000, 2000)]
    fit(sides[0], sides[1], config)


def start(out: Path, resume: bool, deterministic: bool, device: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.bench_resume", "--child", str(out), "--device", device]
    command += ["--resume"] * resume + ["--deterministic"] * deterministic
    return subprocess.Popen(command)


def whole(out: Path, *, resume: bool, deterministic: bool, device: str) -> None:
    code = start(out, resume, deterministic, device).wait(WAIT)
    if code:
        raise SystemExit(f"error: the {'resumed' if resume else 'whole'} run ended with exit code {code}")


def killed(out: Path, deterministic: bool, device: str) -> int:
    """A run killed after `KILLED_AFTER` steps; how far its metrics had come."""
    process = start(out, False, deterministic, device)
    begin = time.monotonic()
    while (done := len(steps_of(out))) < KILLED_AFTER:
        if process.poll() is not None or time.monotonic() - begin > WAIT:
            process.kill()
            raise SystemExit(f"error: the run to be killed had {done} of {STEPS} steps, exit code {process.wait()}")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(steps_of(out))


def steps_of(out: Path) -> list[dict[str, Any]]:
    """Metrics of Algorithm 1's iterations that are written, whole lines alone, without the time at which they were."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: row[name] for name in sorted(row.keys() - {"seconds"})} for row in rows if row["phase"] == "train"]


def weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "refiner.safetensors")


def sha256(out: Path) -> tuple[str, str]:
    """Of the refiner's weights (not of the file, whose header has the run's folder) and of the metrics."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(out).items()):
        digest.update(name.encode() + value.tobytes())
    return digest.hexdigest(), hashlib.sha256(json.dumps(steps_of(out)).encode()).hexdigest()


def compare(folder: Path, deterministic: bool, device: str) -> bool:
    """Run all three and say what came out; whether both hashes are equal."""
    one, other = folder / f"whole-{deterministic}", folder / f"killed-{deterministic}"
    begin = time.monotonic()
    whole(one, resume=False, deterministic=deterministic, device=device)
    died = killed(other, deterministic, device)
    whole(other, resume=True, deterministic=deterministic, device=device)
    seconds = time.monotonic() - begin
    (weights_one, metrics_one), (weights_other, metrics_other) = sha256(one), sha256(other)
    pairs = list(zip(steps_of(one), steps_of(other), strict=True))
    first = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), None)
    off = max(float(np.abs(a - weights(other)[name]).max()) for name, a in weights(one).items())
    equal = weights_one == weights_other and metrics_one == metrics_other
    title = f"resume, {device}, {'--deterministic' if deterministic else 'without --deterministic'}"
    lines = [f"{title}: {'equal to the bit' if equal else 'not equal'}, killed after {died} of {len(pairs)} steps"]
    if not equal:
        where = "never" if first is None else f"at step {first}"
        lines.append(f"  metrics part {where}; the refiner's weights are at most {off:.1e} apart")
    lines.append(
        f"  refiner {weights_one[:16]} and {weights_other[:16]}, metrics {metrics_one[:16]} and {metrics_other[:16]}"
    )
    lines.append(f"  three processes in {seconds:.0f} s")
    print("\n".join(lines), flush=True)
    limits.keep(
        title, lines, equal=equal, deterministic=deterministic, killed_after=died, first_other_step=first,
        largest_gap_of_weights=off, refiner_sha256=[weights_one, weights_other],
        metrics_sha256=[metrics_one, metrics_other],
    )  # fmt: skip
    return equal


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_resume", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child is not None:
        child(given.child, given.resume, given.deterministic, given.device)
        return 0
    from fastsimgan.config import TrainConfig

    promised = any(field.name == "deterministic" for field in dataclasses.fields(TrainConfig))
    with tempfile.TemporaryDirectory() as folder:
        # the promise first: it is what must hold
        held = compare(Path(folder), True, given.device) if promised else False
        if not promised:
            print("training has no --deterministic")
        compare(Path(folder), False, given.device)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
