"""A refiner as files that other runtimes read, and proof that they agree with PyTorch."""
