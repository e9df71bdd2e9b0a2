"""Networks by name, their weights, and where their stages and classifiers are."""

from afdslib.backbones.importers import load_export
from afdslib.backbones.registry import build, classifier_name, known_names, reset_classifier, stages
from afdslib.backbones.resnet import ResNet

__all__ = ["ResNet", "build", "classifier_name", "known_names", "load_export", "reset_classifier", "stages"]
