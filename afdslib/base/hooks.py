"""Outputs and inputs of layers, kept by hooks that always go and that no in-place operation can reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["kept"]


@contextmanager
def kept(modules: Mapping[str, nn.Module], *, inputs: bool = False, graph: bool = False) -> Iterator[dict[str, Tensor]]:
    """Keeps a copy of what modules give in each forward pass inside the block; the last pass overwrites the others.

    Copies, since what follows a layer may work in place (torchvision's ReLU, and its residual add into the last batch
    norm's output): the kept tensor would be that of another layer.

    Args:
        modules: by the name under which each tensor is kept, in the order in which the layers are called.
        inputs: the first inputs instead of the outputs.
        graph: keep the output itself, so that gradients with respect to it can be asked for, and let the network go on
            with the copy.
    """
    tensors: dict[str, Tensor] = {}

    def output_hook(name: str):
        def record(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            tensors[name] = output if graph else output.clone()
            return output.clone() if graph else None

        return record

    def input_hook(name: str):
        def record(module: nn.Module, args: tuple) -> None:
            tensors[name] = args[0].clone()

        return record

    handles = []
    try:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if inputs else module.register_forward_hook
            handles.append(register((input_hook if inputs else output_hook)(name)))
        yield tensors
    finally:
        for handle in handles:
            handle.remove()
