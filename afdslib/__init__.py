"""AFDS, attentive feature distillation and selection: the library behind the report."""

__version__ = "0.1.0"
