"""A network watched for a while: layers' outputs or inputs, kept by hooks that always go, and eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

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

    with ExitStack() as stack:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if inputs else module.register_forward_hook
            stack.enter_context(register((input_hook if inputs else output_hook)(name)))
        yield tensors
