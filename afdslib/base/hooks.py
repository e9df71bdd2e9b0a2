"""A network watched for a while: layers' outputs or inputs, kept by hooks that always go, and eval mode."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["eval_mode", "kept"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def kept(modules: Mapping[str, nn.Module], *, inputs: bool = False, graph: bool = False) -> Iterator[dict[str, Tensor]]:
    """Keeps a copy of what modules give in each forward pass inside the block; the last pass overwrites the others.

    Copies, since what follows a layer may work in place, as torchvision's ReLU and residual add do.

    Args:
        modules: by the name under which each tensor is kept, in the order in which the layers are called.
        inputs: the first inputs instead of the outputs.
        graph: keep the output itself, so that gradients with respect to it can be asked for, and let the network go on
            with the copy.
    """
    tensors: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Any = None) -> Tensor | None:
        tensors[name] = output if graph else args[0].clone() if inputs else output.clone()
        return output.clone() if graph else None

    with ExitStack() as stack:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if inputs else module.register_forward_hook
            stack.enter_context(register(functools.partial(keep, name)))
        yield tensors
