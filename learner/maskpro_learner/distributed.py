"""Learning in several processes: every one holds the model and all the logits, and runs its share of each minibatch.

``torchrun --nproc-per-node 4 -m maskpro_learner.cli --steps ...`` starts them. What they exchange in a step is one loss
for each block of text, and for ``first-order`` the gradient; the update is then computed by all of them alike. Numbers
travel on gloo, also between GPUs; tensors on their device's own backend (NCCL for CUDA).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from maskpro_learner.errors import LearnerError


@dataclass(frozen=True)
class World:
    """The processes of a run. A single one exchanges nothing.

    Attributes:
        rank: which this one is.
        size: how many there are.

    Raises:
        LearnerError: from every exchange, if another process has ended.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that logs, draws and writes files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The places, of ``count``, that this process works on; sizes differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gathered(self, values: Sequence[float], count: int) -> list[float]:
        """All ``count`` values, of which this process gives those of its share.

        The same bits everywhere and for every number of processes: each value is added to zeros only.
        """
        if self.size == 1:
            return list(values)
        places = self.share(count)
        everything = torch.zeros(count, dtype=torch.float64)
        everything[places.start : places.stop] = torch.tensor(values, dtype=torch.float64)
        return self.summed(everything).tolist()

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensor, in place; the same bits everywhere."""
        if self.size > 1:
            with _exchange():
                torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of everyone's numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        with _exchange():
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
        return int(numbers)

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, contiguous; written into ``tensor`` where that is contiguous itself."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        with _exchange():
            torch.distributed.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, src=0)
        return tensor

    def local_device(self, name: str) -> str:
        """The device for a name of the command line: each process of a machine gets a GPU of its own.

        Raises:
            LearnerError: this machine has no such device.
        """
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise LearnerError(f"--device {name}: expected cpu, cuda or cuda:NUMBER") from error
        if device.type == "cpu":
            return "cpu"
        if device.type != "cuda" or not torch.cuda.is_available():
            raise LearnerError(f"--device {name}: this machine and its PyTorch have no such device")
        index = int(os.environ["LOCAL_RANK"]) if self.size > 1 else device.index or 0
        if index >= torch.cuda.device_count():
            raise LearnerError(f"--device {name}: expected GPU {index}, found {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(index)
        return f"cuda:{index}"

    @contextlib.contextmanager
    def first_speaks(self) -> Iterator[None]:
        """Inside, only the first process writes to standard output and error."""
        if self.is_first:
            yield
            return
        with (
            open(os.devnull, "w") as nowhere,  # noqa: PTH123  (no path)
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield


ALONE = World()


def join() -> World:
    """The world that torchrun started this process in; else :data:`ALONE`.

    Raises:
        LearnerError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    try:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise LearnerError(f"the {size} processes of this run do not find each other: {error}") from error
    return World(torch.distributed.get_rank(), size)


def leave(world: World) -> None:
    """Ends what :func:`join` began, when nothing went wrong: one whose peers are gone cannot say goodbye."""
    if world.size > 1:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LearnerError("another process of this run has ended, or hangs; its own message says why") from error
