"""A CUDA device for machines without one: see README.md."""
