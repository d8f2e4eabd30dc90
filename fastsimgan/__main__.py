"""`python -m fastsimgan` lists the commands."""

import sys

from fastsimgan import cli

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
    """Print the list."""
    print("python -m fastsimgan.COMMAND --help\n")
    for name, what in COMMANDS.items():
        print(f"  {name:<12}{what}")


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
