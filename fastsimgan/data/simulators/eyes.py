"""A procedural eye simulator: labelled grey eyes from geometry and a camera, in vectorised numpy, with no assets.

Each eye is a sphere of about 12 mm with a flat iris disc in it, both turned by the gaze and seen by an
orthographic camera; two lids hang in front, turn with the head, and open and close with the gaze. So the labels
are exact, and the position and the foreshortening of the iris tell the same gaze.

Two populations share one geometry and differ in gaze range and in appearance:

``synthetic``
    A clean render: flat bright skin, uniform bright sclera, hard edges, no noise, a wide range of gaze.
``stand_in_real``
    Another "camera": other skin with texture, strong lighting and lid shadows, darker sclera and iris, lens
    blur, sensor noise, then histogram equalisation; a narrower range of gaze. It *stands in* for photographs in
    tests and demonstrations. It is simulated too, and nothing measured on it is a claim about real eyes.

Conventions, for all labels. The camera looks along +z, with x to the right of the image and y down. The gaze of
(pitch p, yaw y) is the unit vector ``(-cos p sin y, -sin p, -cos p cos y)``, as in MPIIGaze: **positive pitch
looks up** and **positive yaw looks to the left of the image**. Pixel coordinates are (x, y), and (0, 0) is the
centre of the top left pixel. The inner corner of the eye (the caruncle) is always on the left.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fastsimgan.data.equalisation import equalise
from fastsimgan.errors import InputError

Population: TypeAlias = Literal["synthetic", "stand_in_real"]
Role: TypeAlias = Literal["synthetic", "real_unlabelled", "real_validation"]
Float: TypeAlias = NDArray[np.floating[Any]]  # float32 throughout

LID_POINTS = 16
"""Points of ``lid_margin``: 9 along the upper lid with both corners, then 7 back along the lower lid."""

_SMALLEST_SIDE = 8  # pixels; below this an iris is less than three pixels wide
_CHUNK_PIXELS = 1 << 16  # rendered at a time: the float32 temporaries stay in cache, and memory is bounded

# Every parameter is uniform in its range. Lengths in mm, angles in degrees, tones and strengths in [0, 1].
_GEOMETRY: Mapping[str, tuple[float, float]] = {
    "pixels_per_mm": (1.38, 1.62),  # at 35x55, as in MPIIGaze's normalised eyes; follows the image size
    "crop_x": (-0.8, 0.8),  # the eyeball's centre from the image's
    "crop_y": (-0.8, 0.8),
    "head_pitch": (-4, 4),
    "head_yaw": (-5, 5),
    "lid_tilt": (-0.04, 0.12),  # rise per mm from the inner to the outer corner, head roll included
    "eyeball_radius": (11.7, 12.4),
    "iris_radius": (5.6, 6.2),
    "pupil_radius": (1.7, 3.1),
    "half_fissure": (12.8, 14.6),  # half the distance between the corners
    "openness": (0.72, 1.05),
    "lid_skew": (-0.3, 0.15),  # negative: the upper lid peaks nearer to the inner corner
    "crease_height": (1.5, 3.6),  # above the upper lid
    "brow_height": (9.5, 16),
}
_POPULATIONS: Mapping[Population, Mapping[str, tuple[float, float]]] = {
    "synthetic": {
        **_GEOMETRY,
        "pitch": (-25, 14),
        "yaw": (-28, 28),
        "light_x": (-0.25, 0.25),  # the direction of the light, as offsets of a unit vector towards the camera
        "light_y": (-0.5, -0.1),
        "light_contrast": (0.12, 0.35),  # how much the skin's tone follows the light across the image
        "skin": (0.45, 0.75),
        "socket": (0.05, 0.2),  # darkness between the brow and the inner corner
        "brow": (0.05, 0.4),
        "crease": (0.1, 0.35),
        "lash": (0.2, 0.5),
        "lower_rim": (0.0, 0.12),
        "sclera": (0.85, 1.0),
        "sclera_falloff": (0.05, 0.25),  # how much darker the eyeball is at its silhouette
        "lid_shadow": (0.0, 0.15),
        "lid_shadow_depth": (0.8, 1.6),
        "caruncle": (0.5, 0.65),
        "iris": (0.2, 0.5),
        "pupil": (0.02, 0.05),
        "limbus_width": (0.1, 0.5),
        "glint": (0.0, 0.6),
        "glint_radius": (0.4, 0.7),
    },
    "stand_in_real": {
        **_GEOMETRY,
        "pitch": (-17, 3),
        "yaw": (-15, 15),
        "light_x": (-0.7, 0.7),
        "light_y": (-0.7, 0.1),
        "light_contrast": (0.4, 0.8),
        "skin": (0.25, 0.5),
        "socket": (0.2, 0.55),
        "brow": (0.2, 0.7),
        "crease": (0.2, 0.55),
        "lash": (0.5, 0.9),
        "lower_rim": (0.0, 0.1),
        "sclera": (0.28, 0.5),
        "sclera_falloff": (0.4, 0.8),
        "lid_shadow": (0.35, 0.75),
        "lid_shadow_depth": (1.2, 3.2),
        "caruncle": (0.3, 0.5),
        "iris": (0.04, 0.12),
        "pupil": (0.015, 0.035),
        "limbus_width": (0.5, 1.4),
        "glint": (0.0, 1.0),
        "glint_radius": (0.4, 1.0),
        "texture": (0.02, 0.12),
        "blur": (0.35, 0.8),
        "noise": (0.0015, 0.012),
    },
}


def simulate_eyes(
    count: int, seed: int, *, population: Population = "synthetic", height: int = 35, width: int = 55
) -> dict[str, NDArray[Any]]:
    """Draw ``count`` eyes of one population.

    The same arguments give the same bytes (on one machine and numpy version; elsewhere a grey level may differ
    by rounding), and eye i does not depend on ``count``: a longer set begins with the shorter one.

    Args:
        count: eyes to draw, at least 1.
        seed: any integer ≥ 0. Sets that are compared need different seeds: see :func:`population_seed`.
        population: ``"synthetic"`` or ``"stand_in_real"``. The two never share an eye, even for one seed.
        height, width: image size in pixels, each at least 8. The eye is scaled to fit.

    Returns:
        ``images`` uint8 [N, height, width];
        ``pitch_yaw`` float32 [N, 2], radians, of the gaze in camera space (head pose included);
        ``pupil_centre`` float32 [N, 2], (x, y) in pixels; lids may cover a part of the pupil;
        ``lid_margin`` float32 [N, 16, 2], (x, y) in pixels: a closed polygon that starts at the inner corner
        and runs along the upper lid to the outer corner and back along the lower. It may leave the image.

    Raises:
        InputError: an argument breaks its rule.
    """
    count = _integer("count", count, at_least=1)
    seed = _integer("seed", seed, at_least=0)
    height = _integer("height", height, at_least=_SMALLEST_SIDE)
    width = _integer("width", width, at_least=_SMALLEST_SIDE)
    _one_of("population", population, get_args(Population))

    # One stream a purpose, each read in the order of the images, so that neither count nor chunks change an eye.
    purpose = np.random.SeedSequence(seed, spawn_key=(get_args(Population).index(population),)).spawn(3)
    parameter_stream, texture_stream, noise_stream = (np.random.default_rng(sequence) for sequence in purpose)

    eyes: dict[str, NDArray[Any]] = {
        "images": np.empty((count, height, width), np.uint8),
        "pitch_yaw": np.empty((count, 2), np.float32),
        "pupil_centre": np.empty((count, 2), np.float32),
        "lid_margin": np.empty((count, LID_POINTS, 2), np.float32),
    }
    step = max(1, _CHUNK_PIXELS // (height * width))
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        eye = _Eye(_draw(_POPULATIONS[population], chunk.stop - chunk.start, parameter_stream), height, width)
        picture = eye.render()
        if population == "stand_in_real":
            photograph = _to_uint8(_photograph(picture, eye, texture_stream, noise_stream))
            eyes["images"][chunk] = equalise(torch.from_numpy(photograph)[:, None])[:, 0].numpy()
        else:
            eyes["images"][chunk] = _to_uint8(picture)
        eyes["pitch_yaw"][chunk] = eye.pitch_yaw
        eyes["pupil_centre"][chunk] = eye.pupil_centre
        eyes["lid_margin"][chunk] = eye.lid_margin()
    return eyes


def population_seed(base_seed: int, role: Role) -> int:
    """The seed of one role in an experiment: 64 bits, and independent of the other roles' and other bases'.

    Training and test sets drawn with these never share a seed, which ``base_seed + 1`` would not promise to an
    experiment that is itself repeated with the next base.

    Raises:
        InputError: ``base_seed`` is not an integer ≥ 0, or ``role`` is not one of the three.
    """
    base_seed = _integer("base_seed", base_seed, at_least=0)
    roles = get_args(Role)
    _one_of("role", role, roles)
    sequence = np.random.SeedSequence(base_seed, spawn_key=(roles.index(role),))
    return int(sequence.generate_state(1, np.uint64)[0])


class _Eye:
    """A chunk of n eyes on one pixel grid. All arrays broadcast to [n, H, W]; lengths are mm in the camera's frame
    with the origin at the centre of the eyeball, so that most of the lids and the light cost one row or column.
    """

    def __init__(self, parameters: Mapping[str, Float], height: int, width: int) -> None:
        self.parameters = p = parameters  # name -> [n, 1, 1]
        self.scale = p["pixels_per_mm"] * np.float32(min(height / 35, width / 55))
        self.centre_x = np.float32((width - 1) / 2) + p["crop_x"] * self.scale  # pixels
        self.centre_y = np.float32((height - 1) / 2) + p["crop_y"] * self.scale
        self.x = (np.arange(width, dtype=np.float32) - self.centre_x) / self.scale  # [n, 1, W]
        self.y = (np.arange(height, dtype=np.float32)[:, None] - self.centre_y) / self.scale  # [n, H, 1]

        pitch, yaw = np.deg2rad(p["pitch"]), np.deg2rad(p["yaw"])
        self.pitch_yaw = np.concatenate([pitch, yaw], axis=1)[..., 0]  # [n, 2]
        self.gaze = (-np.cos(pitch) * np.sin(yaw), -np.sin(pitch), -np.cos(pitch) * np.cos(yaw))
        # The iris is the flat disc on which the sphere is cut off; this far from the centre, along the gaze.
        self.iris_depth = np.sqrt(p["eyeball_radius"] ** 2 - p["iris_radius"] ** 2)
        self.pupil_centre = self._to_pixels(self.iris_depth * self.gaze[0], self.iris_depth * self.gaze[1])[:, 0]

        # The lids are a patch on the front of the eyeball that turns with the head about the eyeball's centre.
        head_pitch, head_yaw = np.deg2rad(p["head_pitch"]), np.deg2rad(p["head_yaw"])
        self.face_x = -p["eyeball_radius"] * np.sin(head_yaw)
        self.face_y = -p["eyeball_radius"] * np.sin(head_pitch)
        self.half_fissure = p["half_fissure"] * np.cos(head_yaw)
        # Lids follow the eye in the head: the upper lid most of the way, the lower lid less.
        raised = self.iris_depth * np.sin(pitch - head_pitch)
        self.upper_height = np.maximum(6.0 * p["openness"] + 0.75 * raised, 1.5)  # over the line between the corners
        self.lower_depth = np.maximum(4.4 * p["openness"] - 0.5 * raised, 1.5)

    def lid_margin(self) -> Float:
        """The polygon of the labels: [n, 16, 2] in pixels."""
        along = np.linspace(-1, 1, LID_POINTS // 2 + 1, dtype=np.float32)
        upper, lower = self._lids(along)[0], self._lids(along[-2:0:-1])[1]
        x = self.face_x + self.half_fissure * np.concatenate([along, along[-2:0:-1]])
        return self._to_pixels(x, np.concatenate([upper, lower], axis=-1))

    def render(self) -> Float:
        """The scene's brightness, [n, H, W], mostly in [0, 1]."""
        upper, lower = self._lids((self.x - self.face_x) / self.half_fissure)  # [n, 1, W]
        open_mm = np.minimum(self.y - upper, lower - self.y)  # [n, H, W] inside the lids > 0
        opening = np.clip(open_mm * self.scale + 0.5, 0, 1)
        picture = self._skin(upper, lower)
        picture += opening * (self._eyeball(upper) - picture)
        return picture

    def _lids(self, along: Float) -> tuple[Float, Float]:
        """Heights y of both lids where ``along`` runs from -1 at the inner corner to 1 at the outer.

        Outside that range the lids cross: the opening is then negative, which hides the eyeball by itself.
        """
        p = self.parameters
        line = self.face_y + 1.2 - p["lid_tilt"] * self.half_fissure * along  # the corners sit below the pupil
        arch = 1 - along**2
        arch *= 1.25 - 0.25 * arch  # fuller than a parabola near the corners
        return line - self.upper_height * arch * (1 + p["lid_skew"] * along), line + self.lower_depth * arch

    def _skin(self, upper: Float, lower: Float) -> Float:
        p, x, y = self.parameters, self.x, self.y
        lit = (p["light_x"] * x + p["light_y"] * y) * (p["light_contrast"] / 18)
        shade = p["skin"] * (1 + lit)
        # The socket between brow and nose, and the brow, which rises towards the temple.
        shade *= 1 - p["socket"] * _bump((x + 13) / 14) * _bump((y + 9) / 6)
        brow_edge = y + p["brow_height"] + 0.1 * x
        shade *= 1 - p["brow"] * np.clip(0.5 - brow_edge / 3, 0, 1)
        # The crease: a wider arch than the lid's. Then a faint fold under the eye.
        along = (x - self.face_x) / (1.15 * self.half_fissure)
        arch = 1 - along**2
        crease = self.face_y + 1.2 - p["lid_tilt"] * self.half_fissure * along
        crease = crease - (self.upper_height + p["crease_height"]) * arch
        shade *= 1 - p["crease"] * np.clip(arch * 3, 0, 1) * _bump((y - crease) / 0.8)
        shade *= 1 - 0.4 * p["crease"] * np.clip(arch * 2, 0, 1) * _bump((y - lower - 3) / 1.2)
        # Lashes darken the skin over the upper lid's edge; the lower lid's wet rim catches light.
        shade *= 1 - p["lash"] * np.clip(arch * 4, 0, 1) * _bump((upper - y) / 1.1)
        shade += p["lower_rim"] * np.clip(arch * 4, 0, 1) * _bump((y - lower - 0.6) / 0.6)
        return shade

    def _eyeball(self, upper: Float) -> Float:
        p, x, y = self.parameters, self.x, self.y
        from_axis = x * x + y * y
        facing = np.sqrt(np.maximum(1 - from_axis / p["eyeball_radius"] ** 2, 0))  # 1 in front, 0 at the silhouette
        sclera = p["sclera"] * (1 - p["sclera_falloff"] * (1 - facing))
        at_corner = np.clip((self.face_x - x) / self.half_fissure * 8 - 6.2, 0, 1)  # the last few mm on the left
        sclera += at_corner * (p["caruncle"] * p["sclera"] - sclera)

        # Each pixel's ray meets the plane of the iris at depth z; `radius` is its distance from the pupil's centre.
        gaze_x, gaze_y, gaze_z = self.gaze
        z = (self.iris_depth - gaze_x * x - gaze_y * y) / gaze_z
        radius = np.sqrt(np.maximum(from_axis + z * z - self.iris_depth**2, 0))
        pixel = 1 / self.scale
        iris = p["iris"] * (1.15 - 0.5 * (radius / p["iris_radius"]) ** 4)  # darker towards its rim
        iris += np.clip((p["pupil_radius"] - radius) / pixel + 0.5, 0, 1) * (p["pupil"] - iris)
        in_iris = np.clip((p["iris_radius"] - radius) / np.maximum(p["limbus_width"], pixel) + 0.5, 0, 1)
        eyeball: Float = sclera + in_iris * (iris - sclera)

        # Lid shadow and lashes fall on the eyeball; the cornea's reflection is over both.
        eyeball *= 1 - p["lid_shadow"] * np.exp(np.minimum(upper - y, 0) / p["lid_shadow_depth"])
        # The cornea is a sphere of 7.8 mm, centred 5 mm up the gaze; it mirrors a light where its normal halves
        # the angle between the light and the camera.
        glint_x, glint_y = 5 * gaze_x + 3.9 * p["light_x"], 5 * gaze_y + 3.9 * p["light_y"]
        eyeball += p["glint"] * _bump((x - glint_x) / p["glint_radius"]) * _bump((y - glint_y) / p["glint_radius"])
        return eyeball

    def _to_pixels(self, x: Float, y: Float) -> Float:
        """Points in mm, both [n, 1, k], to pixels, [n, k, 2]."""
        return np.stack([self.centre_x + self.scale * x, self.centre_y + self.scale * y], axis=-1)[:, 0]


def _photograph(
    scene: Float, eye: _Eye, texture_stream: np.random.Generator, noise_stream: np.random.Generator
) -> Float:
    """The stand-in's camera: the texture is on the skin, so the lens blurs it; the noise is the sensor's."""
    p = eye.parameters
    texture = texture_stream.standard_normal(scene.shape, dtype=np.float32)
    scene = scene * (1 + p["texture"] * texture)
    scene = _blur(scene, p["blur"] * eye.scale)
    return scene + p["noise"] * noise_stream.standard_normal(scene.shape, dtype=np.float32)


def _blur(images: Float, sigma: Float) -> Float:
    """Gaussian blur of [n, H, W], each image by its own ``sigma`` [n, 1, 1] in pixels; edges are repeated."""
    reach = int(np.ceil(2.5 * sigma.max()))
    offsets = range(-reach, reach + 1)
    weights = [_bump(offset / (np.float32(2**0.5) * sigma)) for offset in offsets]
    total = sum(weights)
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (reach, reach)
        padded = np.pad(images, pad, mode="edge")
        size = images.shape[axis]
        images = np.zeros_like(images)
        for start, weight in enumerate(weights):
            window = padded[:, start : start + size] if axis == 1 else padded[:, :, start : start + size]
            images += weight / total * window
    return images


def _bump(z: Float) -> Float:
    """A smooth hill: 1 at 0, e^-1 at ±1."""
    return np.exp(-z * z)


def _draw(ranges: Mapping[str, tuple[float, float]], count: int, stream: np.random.Generator) -> dict[str, Float]:
    """One uniform value a parameter and eye, [count, 1, 1] each; reads the stream eye by eye."""
    low, high = np.array(list(ranges.values()), np.float32).T
    values = low + (high - low) * stream.random((count, len(ranges)), dtype=np.float32)
    return {name: values[:, i, None, None] for i, name in enumerate(ranges)}


def _to_uint8(images: Float) -> NDArray[np.uint8]:
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _integer(name: str, value: object, *, at_least: int) -> int:
    rule = f"{name} must be an integer of at least {at_least}, got {value!r}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(rule) from None
    if isinstance(value, bool) or number < at_least:
        raise InputError(rule)
    return number


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
