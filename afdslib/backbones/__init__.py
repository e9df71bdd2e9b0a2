"""Networks by name, their weights, and where their stages and classifiers are."""

from .importers import load_export
from .registry import build, classifier_name, known_names, reset_classifier, stages
from .resnet import ResNet

__all__ = ["ResNet", "build", "classifier_name", "known_names", "load_export", "reset_classifier", "stages"]
