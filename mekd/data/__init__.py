"""Image data sets that fit into memory."""

from mekd.data.arrays import Dataset, load, local_images

__all__ = ["Dataset", "load", "local_images"]
