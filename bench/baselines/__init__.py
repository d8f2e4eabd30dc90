"""Trainers that the benchmarks race against."""
