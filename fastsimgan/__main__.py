"""`python -m fastsimgan` lists the commands."""

import difflib
import sys

from fastsimgan import cli
from fastsimgan.errors import InputError

COMMANDS = {
    "data": "`data import`: UnityEyes and MPIIGaze as they lie on the disk into packed arrays",
    "train": "two folders of images in, a refiner out",
    "refine": "refine a folder or an array of images, labels carried along",
    "evaluate": "does refined data train a better model than synthetic data?",
    "export": "a refiner as ONNX files that agree with PyTorch, and the way to TensorRT",
    "turing": "can people tell refined images from real ones? a page to ask them, and a count of their answers",
    "experiments": "the paper's experiments: train, refine, judge, one report",
    "demo": "all three on the built-in eyes",
    "env": "versions, devices, and which implementation of each op runs here",
}


def main() -> None:
    """Print the list. Raises InputError if the first argument is neither a command nor a flag."""
    name = next(iter(sys.argv[1:]), "--help")
    if not name.startswith("-") and name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        way_out = f"did you mean {nearest[0]}?" if nearest else "python -m fastsimgan lists them"
        raise InputError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}: {way_out}")
    print("python -m fastsimgan.COMMAND --help\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<12}{what}")


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
