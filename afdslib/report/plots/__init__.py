"""The report's figures: one style, one look per method, tables and results in, a Figure out; no training."""

from afdslib.report.plots.comparison import competitor_trials, paired, student_accuracy
from afdslib.report.plots.curves import attention_entropy, learning_curves, student_curves, trials
from afdslib.report.plots.diagram import diagram
from afdslib.report.plots.gates import channel_states, gates_heatmap, gates_histogram
from afdslib.report.plots.images import attention, attention_maps, augmentations, samples
from afdslib.report.plots.pictures import Gallery, Picture, save, sentence, stored
from afdslib.report.plots.speed import latency, speed
from afdslib.report.plots.style import METHODS, STUDENTS, STYLE, Look, look
from afdslib.report.plots.sweep import (
    accuracy_macs,
    attention_width,
    competitors,
    confusion,
    density_and_masks,
    parameters_budget,
)  # fmt: skip

__all__ = [
    "METHODS", "STUDENTS", "STYLE", "Gallery", "Look", "Picture", "accuracy_macs", "attention", "attention_entropy",
    "attention_maps", "attention_width", "augmentations", "channel_states", "competitor_trials", "competitors",
    "confusion", "density_and_masks", "diagram", "gates_heatmap", "gates_histogram", "latency", "learning_curves",
    "look", "paired", "parameters_budget", "samples", "save", "sentence", "speed", "stored", "student_accuracy",
    "student_curves", "trials"
]  # fmt: skip
