"""The report's figures: one style, one look per method, tables and results in, a Figure out; no training."""

from afdslib.plots.attention import attention, attention_entropy, attention_width
from afdslib.plots.competitors import competitor_trials, competitors, paired
from afdslib.plots.curves import learning_curves, trials
from afdslib.plots.diagram import diagram
from afdslib.plots.gates import channel_states, gates_heatmap, gates_histogram
from afdslib.plots.latency import latency, speed
from afdslib.plots.samples import augmentations, samples
from afdslib.plots.style import METHODS, STYLE, Gallery, Look, Picture, look, save, sentence, stored
from afdslib.plots.sweep import accuracy_macs, confusion, density_and_masks, parameters_budget

__all__ = [
    "METHODS",
    "STYLE",
    "Gallery",
    "Look",
    "Picture",
    "accuracy_macs",
    "attention",
    "attention_entropy",
    "attention_width",
    "augmentations",
    "channel_states",
    "competitor_trials",
    "competitors",
    "confusion",
    "density_and_masks",
    "diagram",
    "gates_heatmap",
    "gates_histogram",
    "latency",
    "learning_curves",
    "look",
    "paired",
    "parameters_budget",
    "samples",
    "save",
    "sentence",
    "speed",
    "stored",
    "trials",
]
