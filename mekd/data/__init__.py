"""Images: data sets that fit into memory, and trees of files that are read as they are needed."""

from mekd.data.arrays import DataError, Dataset, load, local_images
from mekd.data.names import read_names
from mekd.data.sources import TREES, Batches, Source, open_source

__all__ = ["TREES", "Batches", "DataError", "Dataset", "Source", "load", "local_images", "open_source", "read_names"]
