"""The report's figures: one style, one look per method, tables and results in, a Figure out; no training."""

from afdslib.report.plots.attention import attention, attention_entropy, attention_width
from afdslib.report.plots.competitors import competitor_trials, competitors, paired
from afdslib.report.plots.curves import learning_curves, trials
from afdslib.report.plots.diagram import diagram
from afdslib.report.plots.gates import channel_states, gates_heatmap, gates_histogram
from afdslib.report.plots.latency import latency, speed
from afdslib.report.plots.samples import augmentations, samples
from afdslib.report.plots.style import METHODS, STYLE, Gallery, Look, Picture, look, save, sentence, stored
from afdslib.report.plots.sweep import accuracy_macs, confusion, density_and_masks, parameters_budget

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
