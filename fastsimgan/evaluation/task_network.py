"""What refined images are for: the same task network trained on either set and tested on real images (§3.1.3).

One training run of a small network proves little: on one and the same set of eyes its share within 7° wandered from
37 to 69 % with the seed. What is done about it, for every set alike: a learning rate that rises over the first steps
and falls to zero by a half cosine, a small random shift and zoom of each image (a network must not read gaze off where
in the frame the eye happens to be, nor off how large it is), an average over its answers for small shifts of each test
image, an average over the weights of the last steps, several seeds, and beside their mean and spread the prediction
averaged over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastsimgan.data.gaze_angles import gaze_vectors, pitch_yaw
from fastsimgan.data.pixel_values import as_images, to_float
from fastsimgan.data.sampler import Sampler
from fastsimgan.errors import InputError
from fastsimgan.evaluation.task_training import train_task_network
from fastsimgan.hardware.device import channels_last
from fastsimgan.metrics.gaze_error import gaze_summary
from fastsimgan.models.classifier import Classifier
from fastsimgan.models.gaze import GazeNetwork

MOST_CLASSES = 10_000
Task = Literal["gaze", "class"]
Array = NDArray[Any]


@dataclass(frozen=True)
class Labelled:
    """Images ``[N, H, W]`` or ``[N, H, W, C]`` with ``pitch_yaw`` ``[N, 2]`` (radians) or ``label`` ``[N]`` (classes:
    any integers or strings).
    """

    images: Array
    labels: Array
    task: Task

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array], name: str) -> Labelled:
        """Take ``images`` and whichever label is there; InputError naming ``name`` if it breaks a rule.

        Arrays, lists and tensors are taken alike (see `as_images`).
        """
        arrays = {key: np.asarray(array) if key != "images" else array for key, array in arrays.items()}
        images = as_images(arrays["images"], f"{name}: images")
        labels: Array
        if "pitch_yaw" in arrays:
            task: Task = "gaze"
            labels = arrays["pitch_yaw"]
            if labels.ndim != 2 or labels.shape[1] != 2 or not np.isfinite(labels).all():
                raise InputError(f"{name}: pitch_yaw must be finite radians [N, 2], got shape {list(labels.shape)}")
            if np.abs(labels).max() > math.pi:
                raise InputError(f"{name}: pitch_yaw must be radians within ±π, got {np.abs(labels).max():.3g}")
        elif "label" in arrays:
            task, labels = "class", arrays["label"]
            if labels.ndim != 1 or labels.dtype.kind not in "iubUS":
                raise InputError(
                    f"{name}: label must be integers or strings [N], got {labels.dtype} {list(labels.shape)}"
                )
        else:
            raise InputError(f"{name}: must hold pitch_yaw or label, got {', '.join(sorted(arrays))}")
        if len(labels) != len(images):
            raise InputError(f"{name}: must have one label an image, got {len(labels)} for {len(images)}")
        return cls(images, labels, task)


def number_classes(sets: dict[str, Labelled], real: Labelled) -> tuple[dict[str, Labelled], Labelled, list[Any]]:
    """The same sets with classes numbered from 0, in one order for all, and what they were called; none for gaze.

    Raises InputError if some labels are strings and others numbers, or if there are more than `MOST_CLASSES`.
    """
    if real.task == "gaze":
        return sets, real, []
    parts = {**sets, "real": real}
    kinds = {name: "text" if part.labels.dtype.kind in "US" else "numbers" for name, part in parts.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{kind} in {name}" for name, kind in kinds.items())
        raise InputError(f"label must be of one kind in all sets, got {listed}")
    names = np.unique(np.concatenate([np.unique(part.labels) for part in parts.values()]))
    if len(names) > MOST_CLASSES:
        raise InputError(f"label must have at most {MOST_CLASSES} different values, as classes do, got {len(names)}")
    numbered = {
        name: replace(part, labels=np.searchsorted(names, part.labels).astype(np.int64)) for name, part in parts.items()
    }
    return {name: numbered[name] for name in sets}, numbered["real"], names.tolist()


def unseen_classes(sets: dict[str, Labelled], real: Labelled) -> str:
    """Which classes only the real set has, so that no network can learn them, or ""."""
    if real.task == "gaze":
        return ""
    found = []
    for name, part in sets.items():
        unseen = np.setdiff1d(real.labels, part.labels)
        if len(unseen):
            images = int(np.isin(real.labels, unseen).sum())
            listed = ", ".join(f"class {value}" for value in unseen[:5].tolist()) + (", ..." if len(unseen) > 5 else "")
            found.append(f"{listed} of the real set ({images} of {len(real.labels)} images) not in the {name} one")
    return "; ".join(found)


@dataclass(frozen=True)
class Judge:
    """How a task network is trained; the same for every set that is compared.

    ``steps`` fixes the work, whatever the size of the set; ``ema_decay`` is that of the weights' moving average;
    each image is shifted by up to ``shift`` pixels each way and magnified by 1 / ``zoom`` to ``zoom``, the border
    repeated. A test image's answer is the mean over nine copies, shifted by ``test_shift`` pixels or not each way.
    """

    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-3
    ema_decay: float = 0.98
    shift: float = 3.0
    zoom: float = 1.1
    test_shift: int = 2


def train_and_predict(
    train: Labelled, test_images: Array, *, classes: int, seed: int, judge: Judge, device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Array:  # fmt: skip
    """Train a fresh task network on ``train`` (see `train_network`) and predict for ``test_images`` (stored values).

    Returns:
        Unit gaze vectors ``[N, 3]``, or class probabilities ``[N, classes]``.
    """
    network = train_network(train, classes=classes, seed=seed, judge=judge, device=device, progress=progress)
    answers = []
    for shifted in _shifted_copies(test_images, judge.test_shift):
        outputs = run_network(network, shifted, device)
        answers.append(F.normalize(outputs) if train.task == "gaze" else outputs.softmax(1))
    mean = torch.stack(answers).mean(0)
    return (F.normalize(mean) if train.task == "gaze" else mean).numpy()


def train_network(
    train: Labelled, *, classes: int, seed: int, judge: Judge, device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> GazeNetwork | Classifier:  # fmt: skip
    """Train a fresh task network.

    Args:
        classes: number of classes (ignored for gaze).
        seed: of the weights and the order; the same for two sets pairs them.
        progress: called after each step.

    Returns:
        The network with the average of its weights over the last steps.
    """
    torch.manual_seed(seed)
    height, width = train.images.shape[1:3]
    channels = 1 if train.images.ndim == 3 else train.images.shape[3]
    network: GazeNetwork | Classifier
    if train.task == "gaze":
        network, targets = GazeNetwork(height, width, channels), torch.from_numpy(gaze_vectors(train.labels)).float()
    else:
        network, targets = Classifier(classes, channels), torch.from_numpy(train.labels.astype(np.int64))
    network = channels_last(network, device)
    sampler, frames = Sampler(len(train.images), seed), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = sampler.draw(judge.batch_size)
        images = _reframe(_batch(train.images[chosen.numpy()], device), judge.shift, judge.zoom, frames)
        return _loss(train.task, network(images), targets[chosen].to(device))

    return train_task_network(
        network,
        loss,
        steps=judge.steps,
        learning_rate=judge.learning_rate,
        ema_decay=judge.ema_decay,
        progress=progress,
    )


def run_network(
    network: GazeNetwork | Classifier, images: Array, device: torch.device, *, hidden: bool = False
) -> Tensor:
    """A task network's raw outputs for stored ``images``, or with ``hidden`` what its last layer sees; on the host."""
    ask = network.hidden if hidden else network
    with torch.inference_mode():
        return torch.cat([ask(_batch(images[i : i + 256], device)).cpu() for i in range(0, len(images), 256)])


def _shifted_copies(images: Array, shift: int) -> Iterator[Array]:
    """``images`` shifted by -shift, 0 and shift pixels each way, the border repeated: nine sets, or one for 0."""
    height, width = images.shape[1:3]
    padded = np.pad(images, [(0, 0), (shift, shift), (shift, shift), (0, 0)][: images.ndim], mode="edge")
    for down in sorted({0, shift, 2 * shift}):
        for right in sorted({0, shift, 2 * shift}):
            yield padded[:, down : down + height, right : right + width]


def _batch(images: Array, device: torch.device) -> Tensor:
    floats: Tensor = torch.from_numpy(to_float(np.ascontiguousarray(images)))
    return floats.to(device).contiguous(memory_format=torch.channels_last)


def _reframe(images: Tensor, shift: float, zoom: float, generator: torch.Generator) -> Tensor:
    """Give each image of ``[B, C, H, W]`` its own shift in pixels and its own magnification, the border repeated."""
    count, _, height, width = images.shape
    down, right, log_scale = torch.rand(3, count, generator=generator) * 2 - 1
    grid = torch.zeros(count, 2, 3)  # in affine_grid's units an image is 2 wide and 2 high
    grid[:, 0, 0] = grid[:, 1, 1] = zoom**-log_scale
    grid[:, 0, 2], grid[:, 1, 2] = right * shift * 2 / width, down * shift * 2 / height
    where = F.affine_grid(grid.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, where, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


def _loss(task: Task, output: Tensor, target: Tensor) -> Tensor:
    """Euclidean loss on gaze vectors (§3.1), cross-entropy on classes."""
    if task == "gaze":
        return (output - target).square().sum(1).mean()
    return F.cross_entropy(output, target)


def summarise(task: Task, prediction: Array, labels: Array) -> dict[str, float]:
    """The reported numbers of one prediction, as `train_and_predict` gives it."""
    if task == "gaze":
        return gaze_summary(pitch_yaw(prediction), labels)
    return {"accuracy": float((prediction.argmax(1) == labels).mean() * 100)}


def constant_prediction(train: Labelled, count: int, classes: int) -> Array:
    """What the labels alone predict: the mean gaze of the training labels, or their most frequent class."""
    if train.task == "gaze":
        return np.repeat(gaze_vectors(train.labels.mean(0, keepdims=True)), count, 0)
    frequencies = np.bincount(train.labels, minlength=classes)
    return np.repeat((frequencies == frequencies.max())[None].astype(np.float64), count, 0)
