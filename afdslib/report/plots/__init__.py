"""The report's figures: one style, one look per method, tables and results in, a Figure out; no training."""

from afdslib.report.plots.curves import attention_entropy, learning_curves, student_curves, trials
from afdslib.report.plots.diagram import diagram
from afdslib.report.plots.gates import channel_states, confusion, gates_heatmap
from afdslib.report.plots.images import attention, attention_maps, augmentations, draw_maps, mistakes, samples
from afdslib.report.plots.methods import (
    accuracy_cost,
    accuracy_macs,
    attention_width,
    by_budget,
    competitor_trials,
    competitors,
    density_and_masks,
    paired,
    parameters_budget,
    student_accuracy,
)
from afdslib.report.plots.pictures import Gallery, Picture, save, sentence, stored
from afdslib.report.plots.speed import latency, speed
from afdslib.report.plots.style import METHODS, STUDENTS, STYLE, Look, look

__all__ = [
    "METHODS", "STUDENTS", "STYLE", "Gallery", "Look", "Picture", "accuracy_cost", "accuracy_macs", "attention",
    "attention_entropy", "attention_maps", "attention_width", "augmentations", "by_budget", "channel_states",
    "competitor_trials", "competitors", "confusion", "density_and_masks", "diagram", "draw_maps", "gates_heatmap",
    "latency", "learning_curves", "look", "mistakes", "paired", "parameters_budget", "samples", "save", "sentence",
    "speed", "stored", "student_accuracy", "student_curves", "trials",
]  # fmt: skip
