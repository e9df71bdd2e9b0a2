"""Selection methods beside AFS: static pruning by a criterion, FBS's dynamic gates, and narrower networks."""

from afdslib.pruning.budget import choose, fitting_width, lower_density, settle
from afdslib.pruning.criteria import CRITERIA, scores
from afdslib.pruning.fbs import boosted

__all__ = ["CRITERIA", "boosted", "choose", "fitting_width", "lower_density", "scores", "settle"]
