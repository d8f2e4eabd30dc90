"""Data sets as they lie on the disk, imported into packed arrays."""
