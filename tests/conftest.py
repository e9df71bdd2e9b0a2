import torch
import torch.nn.functional as F

from afdslib import _onednn

# Tiny networks are slower on more threads, and numbers are compared bitwise.
torch.set_num_threads(1)

# The library guards its own training; tests also differentiate the narrowest networks themselves.
if _onednn.is_affected():
    F.conv2d = _onednn.conv2d
