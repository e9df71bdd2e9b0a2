import torch

# Tiny networks are slower on more threads, and numbers are compared bitwise.
torch.set_num_threads(1)
