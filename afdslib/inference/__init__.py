"""Trained networks in use: export, prediction, dynamic execution, measured speed, attention maps."""
