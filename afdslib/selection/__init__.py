"""Selection methods beside AFS: static pruning by a criterion, FBS's dynamic gates, and narrower networks."""

from afdslib.selection.budget import choose, lower_density, settle
from afdslib.selection.channels import matching
from afdslib.selection.criteria import CRITERIA, scores
from afdslib.selection.fbs import boosted
from afdslib.selection.groups import Cost, Group, Kept, Member, groups, shrink
from afdslib.selection.narrow import fitting_width

__all__ = [
    "CRITERIA",
    "Cost",
    "Group",
    "Kept",
    "Member",
    "boosted",
    "choose",
    "fitting_width",
    "groups",
    "lower_density",
    "matching",
    "scores",
    "settle",
    "shrink",
]
