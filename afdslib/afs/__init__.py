"""AFS, attentive feature selection: gated convolutions, exact conversion, masks and MACs budgets."""

from afdslib.afs.convert import convert, layers, set_density
from afdslib.afs.graph import living_channels, streams
from afdslib.afs.importance import taylor_importance
from afdslib.afs.io import load, load_network, save
from afdslib.afs.layer import AFSConvBN, Gates
from afdslib.afs.masks import LayerStatistics, MaskReport, collect_statistics, update_masks

__all__ = [
    "AFSConvBN",
    "Gates",
    "LayerStatistics",
    "MaskReport",
    "collect_statistics",
    "convert",
    "layers",
    "living_channels",
    "load",
    "load_network",
    "save",
    "set_density",
    "streams",
    "taylor_importance",
    "update_masks",
]
