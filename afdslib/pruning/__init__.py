"""Selection methods beside AFS: static pruning by a criterion, FBS, narrower networks, and smaller images."""

from afdslib.pruning.budget import ROOM, choose, fitting_side, fitting_width, lower_density, network_macs, settle
from afdslib.pruning.criteria import CRITERIA, NORMALISATIONS, scores
from afdslib.pruning.fbs import boosted, gates_alone
from afdslib.pruning.norms import match_norms

__all__ = [
    "CRITERIA", "NORMALISATIONS", "ROOM", "boosted", "choose", "fitting_side", "fitting_width",
    "gates_alone", "lower_density", "match_norms", "network_macs", "scores", "settle",
]  # fmt: skip
