"""Several processes that train one network together: who is who, shared numbers, batch norm, and one writer.

`torchrun` or `fabric run` starts the processes. Each holds the whole network and computes an equal share of every
batch; Lightning Fabric averages the gradients (DistributedDataParallel). N processes take the steps that one would
take, up to rounding: the order of the images does not depend on N, and batch norm normalises by the whole batch.
(Random draws inside the network, as of dropout, are each process's own.)
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from afdslib import runs
from afdslib.base.cpu import keep_freed_memory
from afdslib.base.errors import AFDSError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

__all__ = [
    "Follower", "average", "average_gradients", "fabric", "get_or_run", "joined", "launched", "leads", "local_world",
    "rank", "share", "synchronised_norms", "total", "world",
]  # fmt: skip


def launched() -> int:
    """How many processes torchrun or `fabric run` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def local_world() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launched() > 1 else 1


def leads() -> bool:
    """Whether this process speaks for all, also before they have joined."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def world() -> int:
    """Processes that have joined; 1 for an ordinary program."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside the block the processes that a launcher started are one group. Nothing happens in an ordinary program."""
    if launched() > 1:
        fabric()
    try:
        yield
    finally:
        if launched() > 1 and dist.is_initialized():
            dist.destroy_process_group()


def fabric(precision: str = "32-true") -> Fabric:
    """Lightning Fabric on one device or, in a process that a launcher started, as a member of the group.

    `fabric run --accelerator` or the variable LT_ACCELERATOR (`cpu`, `gpu`) chooses the devices.

    Raises:
        AFDSError: the launcher's options cannot be met, for instance more processes than GPUs.
    """
    from lightning.fabric import Fabric  # seconds to import, and only training needs it

    keep_freed_memory()
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    kind: Any = precision
    if launched() == 1:
        return Fabric(accelerator="auto", devices=1, precision=kind)
    by_command = os.environ.get("LT_CLI_USED", "0") == "1"
    nodes, devices = (1, "auto") if by_command else (launched() // local_world(), local_world())
    try:
        member = Fabric(strategy="ddp", devices=devices, num_nodes=nodes, precision=kind)
        if not by_command:
            member.launch()
    except (ValueError, RuntimeError) as error:  # Fabric's MisconfigurationException is one
        raise AFDSError(
            f"{launched()} processes cannot train here ({' '.join(str(error).split())[:200]}): start one per GPU, or "
            "set LT_ACCELERATOR=cpu"
        ) from error
    return member


def total(values: Tensor) -> Tensor:
    """The sum over processes, on the device of `values`; the same tensor in an ordinary program."""
    if world() == 1:
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    summed = values.detach().to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def average(values: Tensor) -> Tensor:
    """The mean over processes; see `total`."""
    return values if world() == 1 else total(values) / world()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of parameters that Fabric's wrapper does not know, such as adapters of a loss."""
    if world() > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(average(parameter.grad))


def share(batch: Sequence[int]) -> list[int]:
    """This process's part of a batch: equal, contiguous shares in the order of the ranks.

    Raises:
        AFDSError: the batch cannot be divided equally, which would weigh its images differently.
    """
    if len(batch) % world():
        raise AFDSError(f"a batch of {len(batch)} images cannot be divided among {world()} processes; take a multiple")
    part = len(batch) // world()
    return list(batch[rank() * part : (rank() + 1) * part])


class _Average(torch.autograd.Function):
    """`average`, with its gradient: of what all processes make of the mean, each process's values get their part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return average(values).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return average(gradient)


def _synchronised(norm: _BatchNorm, x: Tensor) -> Tensor:
    """A batch norm's `forward` by the statistics of all processes' equal shares, in float32 or float64.

    torch's SyncBatchNorm does the same on GPUs and has no CPU version.
    """
    if not norm.training:
        return type(norm).forward(norm, x)
    over, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = _Average.apply(wide.mean(over))
    centred = wide - mean.view(shape)
    variance = _Average.apply(centred.square().mean(over))
    scale = (variance + norm.eps).rsqrt()
    out = centred * (scale if norm.weight is None else scale * norm.weight).view(shape)
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        count = x.numel() // x.shape[1] * world()
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum  # type: ignore[arg-type]
            norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
            norm.running_var.lerp_((variance * (count / max(1, count - 1))).to(norm.running_var), momentum)
    return (out if norm.bias is None else out + norm.bias.view(shape)).to(x.dtype)


@contextmanager
def synchronised_norms(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Inside the block every batch norm of the network that is in train mode normalises by all processes' images.

    Types, names and state of the modules stay as they are. Nothing happens in an ordinary program, or if not `on`.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)] if on and world() > 1 else []
    for norm in norms:
        vars(norm)["forward"] = functools.partial(_synchronised, norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


class Follower(runs.Run):
    """A run as every process but the first sees it: it reads the checkpoint and writes nothing."""

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...
    def log(self, row: dict[str, Any]) -> None: ...
    def truncate_log(self, step: int) -> None: ...

    def write_artifact(self, name: str, writer: Callable[[Path], object]) -> Path:
        return self.artifact(name)


def get_or_run(config: Any, *, store: str | Path | None = None, needs: Sequence[str] = ()) -> runs.Result:
    """`runs.get_or_run` for all processes at once: the first holds the lock and writes, the others compute with it.

    All must call it alike, and see one run store.

    Raises:
        AFDSError: as `runs.get_or_run`; or the store is not shared.
    """
    if world() == 1:
        return runs.get_or_run(config, store=store, needs=needs)
    if rank() == 0:
        began: list[Tensor] = []
        result = runs.get_or_run(config, store=store, needs=needs, started=lambda: began.append(total(torch.ones(1))))
        if not began:
            total(torch.zeros(1))
        dist.barrier()
        return result
    if total(torch.zeros(1)).item():
        id, folder = runs.run_id(config), runs.folder(store)
        config.execute(Follower(id, folder / id, folder))
    dist.barrier()
    found = runs.lookup(config, store=store, needs=needs)
    if found is None:
        raise AFDSError(f"process {rank()} does not see the run {runs.run_id(config)}; all must share one run store")
    return found
