"""Every setting of training, as one frozen dataclass, and the presets. Imports no torch, so that --help is quick."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastsimgan import cli
from fastsimgan.errors import InputError

#: What a resumed run may change and stay the same run: where it lies and runs, and when it looks and saves.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "dry_run", "device", "eval_every", "checkpoint_every", "keep", "data", "profile"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Where the paper gives no value, the default is ours and the help says so."""

    synthetic: Path | None = None
    """Synthetic images: a folder, an .npz with `images`, or an .npy. Left out with --real: the built-in eyes."""
    real: Path | None = None
    """Unlabelled real images, in any of the same forms."""
    out: Path = Path("runs/refiner")
    """Folder of the run. It must not exist, unless --resume."""
    preset: Literal["gaze", "quick", "paper", "hand"] | None = None
    """Defaults that other flags override: `gaze` (two folders on a small machine), `quick` (built-in eyes, minutes on
    two cores), `paper` (§3.1's schedule, batch 512: for a GPU), `hand` (§3.2). Without data: quick; with data: gaze."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out: as if it had never stopped, to the bit; on CUDA so with
    --deterministic only."""
    dry_run: bool = False
    """Read the data, build everything, run one iteration, write nothing."""

    steps: int = 700
    """Iterations of Algorithm 1 (T)."""
    batch_size: int = 32
    """Images in each half of D's batch and in R's batch (b, even)."""
    lam: Annotated[float, cli.flag("lambda")] = 0.2
    """Weight of self-regularisation, the paper's sum form (Eq. 4); it does not depend on the batch size."""
    psi: Literal["identity", "channel_mean", "gradients"] = "identity"
    """Feature in which refined and synthetic images are held together (Eq. 4)."""
    local: bool = True
    """Patch-wise adversarial loss (§2.2); --no-local is the global one."""
    accumulate: int = 1
    """Equal parts that each batch goes through the networks in: the same update in a part of the memory."""
    recompute: bool = False
    """Compute R's inner features again for backward instead of keeping them: less memory, a third more work, the same
    gradients."""
    k_g: int = 1
    """Updates of R in an iteration."""
    k_g_max: int = 0
    """Above --k-g: D's accuracy is kept in a band. K_g rises by one, to this at most, where D was right on more than
    85 % of the last 20 iterations' patches, and falls by one, to --k-g at least, where on less than 65 %. 0: fixed."""
    k_d: int = 1
    """Updates of D in an iteration."""
    history: int = 2048
    """Capacity of the history of refined images (§2.3), in images; 0 turns it off."""
    pretrain_refiner: int = 0
    """Steps of R alone on self-regularisation, before all else. One that computes the change starts at the identity
    already; the paper trains R there in 1,000 steps."""
    pretrain_discriminator: int = 100
    """Steps of D alone, before Algorithm 1."""

    learning_rate_refiner: float = 2e-4
    """Adam's learning rate for R."""
    learning_rate_discriminator: float = 6e-4
    """Adam's learning rate for D."""
    warm_up: int = 20
    """Iterations over which the learning rates rise to their full value, so that Adam's first steps, all of one size,
    do not throw R off the identity; 0 for none."""
    decay: bool = True
    """Hold the learning rates for half of the steps, then take them linearly to zero."""
    ema: float = 0.995
    """Decay of the moving average of R's weights, which is what is saved as the refiner; 0 turns it off."""

    network: Literal["gaze", "hand"] = "gaze"
    """Architecture of D, and of R's first layer (§3.1 or §3.2)."""
    hidden_channels: Annotated[int, cli.flag(also=("width",))] = 32
    """Feature maps in R. The paper has 64; 32 take a quarter of the time. (--width: as scripts of before call it.)"""
    blocks: int = 4
    """Residual blocks in R."""
    computes: Literal["change", "image"] = "change"
    """What R's network computes: the change, to which the image is added outside, so that R starts as the identity and
    16 bits are enough inside; or, as in the paper, the image itself."""

    crop: tuple[int, int] | None = None
    """Height and width of the random crops that training sees. auto: images whole where all have one size of at most
    65,536 pixels; else the largest crops that fit every image and 0.5 GiB a step (on CUDA 8 GiB)."""
    resize_real: Literal["auto", "none"] | float = "auto"
    """Bring real images to the synthetic ones' pixel scale, by an antialiased filter: by this factor; auto: those more
    than a quarter higher than the synthetic ones' median get that height; none: none."""

    histogram: Literal["auto", "keep", "equalise"] = "auto"
    """Equalise each grey image's histogram before refining; auto does so where the real images are equalised."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which the networks compute; weights stay float32. auto: bfloat16 where the device has it, else float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of both networks. auto: on CUDA; not on a CPU, where it gains nothing worth its seconds."""
    cuda_graph: bool = True
    """On CUDA, with the images on the device: an iteration as one CUDA graph. Elsewhere it does nothing."""
    deterministic: bool = False
    """On CUDA: cuDNN and torch.compile choose their kernels by rule, not by timing, so that a run that is stopped and
    resumed ends with the same bits as one that is not; slower. Without it --resume goes on with the same state, and the
    two part by rounding. On a CPU resuming is always exact, and this does nothing."""
    data: Literal["auto", "device", "host"] = "auto"
    """Where the images live: on the device as they are stored, or on the host (an .npy stays memory-mapped) and read
    ahead by a thread. auto: on the device if they take at most half of its free memory."""
    impl: Literal["auto", "reference"] = "auto"
    """Implementation of the fused losses and the history: the fastest that works here, or the plain reference."""
    seed: int = 0
    """Seed of the weights and of everything drawn."""
    profile: int = 0
    """Iterations to profile: after ten ordinary ones, a table of where the time goes is printed and profile.txt and
    trace.json.gz are written to --out. 0: none."""
    eval_every: Annotated[int, cli.flag(also=("picture-every",))] = 250
    """Iterations between contact sheets, lines of progress in a log, and looks at how real the refined images are (KID)
    and how far labels drifted; the best look is kept as best.safetensors."""
    max_drift: float = 0.0
    """Largest label drift, in pixels: the median that a look prints. Beyond it training stops, and the refiner is the
    best look before. 0: no limit."""
    checkpoint_every: int = 500
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints kept, the newest."""
    images: str | None = None
    """Glob of the files that are images ('rgb/*.png'), where masks or the like lie beside them; '*': all that have an
    image's suffix. In --real it counts only if some name matches."""
    real_images: str | None = None
    """The same for --real alone."""
    key: str | None = None
    """Name of the array, dataset or group that holds the images, where it is not `images` and there are others."""
    colour: Literal["auto", "grey", "rgb"] = "auto"
    """Make both sides grey or RGB. auto: the real images are made what the synthetic ones are."""
    range: tuple[float, float] | None = None
    """Least and largest value of float images on both sides, where that is not 0 and 1: depth in metres, for one. The
    refiner keeps it, and gives back the same units."""
    on_error: Literal["fail", "skip"] = "fail"
    """At images that cannot be read: stop, or leave them out and say so, if they are at most 1 % of a side."""
    follow_links: bool = False
    """Follow links in a folder wherever they lead; without it, only those that stay in the same folder."""

    def __post_init__(self) -> None:
        """A path may be given as text."""
        for name in ("synthetic", "real", "out"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))

    def validate(self) -> None:
        """Raise InputError on the first setting that breaks its rule."""
        _check_counts(self)
        _check_values(self)

    def to_json(self) -> str:
        """The settings as JSON, one key a line."""
        return _json(dataclasses.asdict(self))

    def decisive(self) -> dict[str, Any]:
        """The settings, as JSON has them, that a resumed run may not change: all but `FREE_ON_RESUME`, and the images'
        paths, since the images themselves are compared."""
        values: dict[str, Any] = json.loads(self.to_json())
        return {name: value for name, value in values.items() if name not in FREE_ON_RESUME | {"synthetic", "real"}}

    def to_header(self) -> str:
        """As `to_json`, for the header of a refiner's file."""
        return _json({_HEADER_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Settings from `to_json`; unknown names are an InputError."""
        values: dict[str, Any] = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        _bring_up(values)
        if unknown := sorted(set(values) - known):
            raise InputError(f"config has unknown settings: {', '.join(unknown)}")
        for name in ("synthetic", "real", "out"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        for name in ("crop", "range"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)


#: Refiner files keep the keys that they have had from the first for these settings, so that they keep their bytes.
_HEADER_KEYS = {"hidden_channels": "width", "eval_every": "picture_every"}


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, default=str) + "\n"


def _check_counts(config: TrainConfig) -> None:
    for name in (
        "steps",
        "batch_size",
        "accumulate",
        "k_g",
        "k_d",
        "hidden_channels",
        "eval_every",
        "checkpoint_every",
        "keep",
    ):
        if getattr(config, name) < 1:
            raise InputError(f"--{_flag(name)} must be at least 1, got {getattr(config, name)}")
    for name in ("blocks", "pretrain_refiner", "pretrain_discriminator", "history", "warm_up", "seed", "profile"):
        if getattr(config, name) < 0:
            raise InputError(f"--{_flag(name)} must be at least 0, got {getattr(config, name)}")
    if config.k_g_max and config.k_g_max < config.k_g:
        raise InputError(f"--k-g-max must be 0 or at least --k-g ({config.k_g}), got {config.k_g_max}")
    if config.batch_size % 2:
        raise InputError(f"--batch-size must be even (half of D's batch is history, §2.3), got {config.batch_size}")
    if 0 < config.history < config.batch_size // 2:
        raise InputError(
            f"--history must be 0 or at least half the batch size ({config.batch_size // 2}), got {config.history}"
        )


def _check_values(config: TrainConfig) -> None:
    for name in ("learning_rate_refiner", "learning_rate_discriminator"):
        if not 0 < getattr(config, name) < 1:
            raise InputError(f"--{_flag(name)} must be between 0 and 1, got {getattr(config, name)}")
    if not config.max_drift >= 0:
        raise InputError(f"--max-drift must be at least 0, got {config.max_drift}")
    if not config.lam >= 0:
        raise InputError(f"--lambda must be at least 0, got {config.lam}")
    if not 0 <= config.ema < 1:
        raise InputError(f"--ema must be at least 0 and below 1, got {config.ema}")
    if config.crop is not None and min(config.crop) < 1:
        raise InputError(f"--crop must be at least 1x1, got {config.crop[0]}x{config.crop[1]}")
    if config.range is not None and not -math.inf < config.range[0] < config.range[1] < math.inf:
        raise InputError(f"--range must be two numbers, the second larger, got {config.range[0]:g} {config.range[1]:g}")
    factor = config.resize_real
    if factor not in ("auto", "none") and (isinstance(factor, str) or not 0 < factor <= 4):
        raise InputError(f"--resize-real must be auto, none or a factor above 0 and up to 4, got {factor}")
    if (config.synthetic is None) != (config.real is None):
        given, missing = ("synthetic", "real") if config.real is None else ("real", "synthetic")
        raise InputError(f"--{given} needs --{missing} beside it (or give neither for the built-in eyes)")


def _bring_up(values: dict[str, Any]) -> None:
    """Give settings of before --computes what they mean today; InputError where this version cannot go on with them."""
    if "computes" in values:
        return
    if values.pop("identity_init", False):
        raise InputError(
            "config must be of a run begun by this version, or with --no-identity-init, got one whose R carries the "
            "image in its features: finish it with the version that began it"
        )
    values["computes"] = "image"


def _flag(name: str) -> str:
    return name.replace("_", "-")


# §3.1 and Algorithm 1 as printed; what the paper leaves out (optimiser, λ, capacity, T) keeps our values.
_PAPER: dict[str, Any] = {
    "steps": 10_000,
    "batch_size": 512,
    "hidden_channels": 64,
    "k_g": 2,
    "history": 51_200,
    "pretrain_refiner": 1000,
    "pretrain_discriminator": 200,
    "computes": "image",
    "learning_rate_refiner": 1e-3,
    "learning_rate_discriminator": 1e-3,
    "warm_up": 0,
    "decay": False,
    "ema": 0.0,
    "histogram": "keep",
}

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults themselves: chosen on the rendered and real eyes of the README, minutes on two cores.
    "gaze": {},
    # Minutes on two cores: the built-in eyes.
    "quick": {"steps": 300, "batch_size": 16},
    "paper": _PAPER,
    # §3.2: depth images of hands, 224x224.
    "hand": {**_PAPER, "history": 8_192, "pretrain_refiner": 500, "network": "hand", "blocks": 10},
}


def preset(name: str, **settings: Any) -> TrainConfig:
    """The settings of a preset, with ``settings`` over them."""
    return TrainConfig(**{**PRESETS[name], "preset": name, **settings})
