"""One Refiner interface over whatever runs the network."""

from fastsimgan.inference.refiner import Refiner, load_refiner
from fastsimgan.inference.refiner_file import save_refiner

__all__ = ["Refiner", "load_refiner", "save_refiner"]
