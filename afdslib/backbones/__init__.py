"""Networks by name, their weights, and where their stages and classifiers are."""

from .registry import build, classifier_name, known_names, reset_classifier, stages
from .resnet import ResNet

__all__ = ["ResNet", "build", "classifier_name", "known_names", "reset_classifier", "stages"]
