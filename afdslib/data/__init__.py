"""Data sets as ready-made splits: download, verification, extraction, decoding, augmentation."""

from afdslib.data.catalogue import NAMES, target_40
from afdslib.data.datasets import ArrayImages, FileImages, ImageDataset, collate, loader
from afdslib.data.images import MEAN, STD, CorruptImageError
from afdslib.data.load import Sealed, Splits, load, look, sealed
from afdslib.data.report import describe, detail, imbalance, prepare
from afdslib.data.sources import FILES, Remote

__all__ = [
    "FILES", "MEAN", "NAMES", "STD", "ArrayImages", "CorruptImageError", "FileImages", "ImageDataset", "Remote",
    "Sealed", "Splits", "collate", "describe", "detail", "imbalance", "load", "loader", "look", "prepare", "sealed",
    "target_40",
]  # fmt: skip
