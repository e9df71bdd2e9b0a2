"""The training loop and what it minimises: one loop for every stage, one objective for every loss."""

from afdslib.training.loop import (
    Evaluation,
    Optimisation,
    autocast,
    batches_from,
    cores,
    device,
    evaluate,
    first,
    first_batches,
    fit,
    monitor_gates,
    processes,
    recalibrate,
)  # fmt: skip

__all__ = [
    "Evaluation", "Optimisation", "autocast", "batches_from", "cores", "device", "evaluate", "first", "first_batches",
    "fit", "monitor_gates", "processes", "recalibrate",
]  # fmt: skip
