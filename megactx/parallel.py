"""Several processes as one run: who this process is, what it shares with the others, and how the model is spread.

`torchrun` starts the processes and tells each its place in environment variables; the work between them is PyTorch's:
DDP keeps a copy of the model in each, FSDP2's `fully_shard` a slice. Numbers that decide something (counts, stop
requests) travel between the CPUs by gloo, so that they never wait for a GPU; gradients and losses by the device's own
backend. A run of one process is a group of one, in which nothing is sent.
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megactx.errors import MegactxError, ProcessGroupError

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
# Long enough for rank 0 to write a checkpoint of a large model while the others wait, short enough to notice that one
# of them is gone. (A process that ends closes its connections, and the others hear of that at once.)
TIMEOUT = datetime.timedelta(minutes=15)
T = TypeVar("T")


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto`, `cpu`, `cuda` (the GPU numbered `local_rank`, where there is one) or `cuda:N`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MegactxError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise MegactxError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "cuda" and local_rank is not None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MegactxError(
            f"device: {str(device)!r} was asked for, but {torch.cuda.device_count()} CUDA devices are visible"
        )
    return device


class Group(AbstractContextManager["Group"]):
    """The processes of a run. Every method that is not marked "alone" must be called by all of them, in one order.

    As a context manager: an error in a group that was joined leaves it as a `ProcessGroupError`, which see.
    """

    def __init__(self, mode: str, rank: int, world_size: int, device: torch.device) -> None:
        self.mode, self.rank, self.world_size, self.device = mode, rank, world_size, device

    @classmethod
    def join(cls, mode: str | None, device_name: str) -> Group:
        """The group that torchrun's environment describes, or the group of one where it did not start this process.

        Raises:
            MegactxError: `mode` and the way the process was started do not fit together, or the device is not there.
        """
        launched = all(name in os.environ for name in ENVIRONMENT)
        world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
        mode = mode or ("ddp" if launched else "none")
        if mode == "none":
            if world_size > 1:
                raise MegactxError(f"parallel: expected ddp or fsdp for the {world_size} processes started, got 'none'")
            return cls("none", 0, 1, pick_device(device_name))
        if not launched:
            raise MegactxError(
                f"parallel: {mode!r} needs processes started by torchrun "
                "(torchrun --nproc-per-node N -m megactx.train ...), got one started without it"
            )
        if world_size > 1 and device_name.startswith("cuda:"):
            raise MegactxError(
                f"device: expected auto, cpu or cuda for {world_size} processes, of which each has its own GPU, got "
                f"{device_name!r}"
            )
        device = pick_device(device_name, int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise MegactxError(f"parallel: the processes cannot reach each other: {error}") from error
        return cls(mode, dist.get_rank(), dist.get_world_size(), device)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.mode == "none":
            return
        if error is None:
            dist.destroy_process_group()
            return
        # After an error the others may be in the middle of an exchange, and to take leave would wait for them. Nor may
        # this process clean up behind itself: where the traceback is freed DDP's reducer goes with it, and with that
        # gloo's, whose destructor waits for a thread of its own and holds the interpreter's lock meanwhile, which
        # that thread may be waiting for. So the process is to end as it stands; that closes its connections, and the
        # others hear of it.
        if self.world_size > 1 and _is_lost_connection(error):
            lost = MegactxError("the connection to another process is lost; the first error of those says why")
            lost.__cause__ = error
            error = lost
        raise ProcessGroupError(error, self.rank) from error

    @property
    def main(self) -> bool:
        """Alone: whether this process writes files and output."""
        return self.rank == 0

    # -- numbers -------------------------------------------------------------------------------------------------

    def highest(self, *values: int) -> list[int]:
        """The largest of what each process gave, entry by entry: a request of one becomes the decision of all."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place, where the tensor lives: a CPU tensor does not wait for the GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """What each process gave, by rank. CPU tensors of one shape."""
        if self.world_size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor)
        return found

    # -- what rank 0 alone does or knows -------------------------------------------------------------------------

    def on_main(self, action: Callable[[], T]) -> T | None:
        """`action()` on rank 0, None elsewhere, once it is done. Where it fails no process goes on: rank 0 raises the
        error, the others say where it was."""
        result, error = None, None
        if self.main:
            try:
                result = action()
            except Exception as failure:
                error = failure
        if self.highest(error is not None)[0]:
            raise error or MegactxError("leaving, for rank 0 failed")
        return result

    def share_json(self, value: Any) -> Any:
        """Rank 0's `value` in every process."""
        if self.world_size == 1:
            return value
        data = bytearray(json.dumps(value).encode()) if self.main else bytearray()
        size = self.highest(len(data))[0]
        content = torch.frombuffer(data, dtype=torch.uint8) if self.main else torch.empty(size, dtype=torch.uint8)
        dist.broadcast(content, 0)
        return json.loads(content.numpy().tobytes())

    def collect_json(self, value: Any) -> list[Any]:
        """What each process gave, by rank, in every process."""
        if self.world_size == 1:
            return [value]
        data = json.dumps(value).encode()
        padded = torch.full((self.highest(len(data))[0],), ord(" "), dtype=torch.uint8)  # JSON may end in spaces
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return [json.loads(found.numpy().tobytes()) for found in self.collect(padded)]

    def share_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Rank 0's tensors in every process, one at a time on the CPU. The others' argument is not looked at."""
        if self.world_size == 1:
            yield from tensors.items()
            return
        names = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        for name, shape, dtype in self.share_json(names):
            tensor = tensors[name].contiguous() if self.main else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, 0)
            yield name, tensor

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on rank 0, from the slices that the processes hold; an empty dict elsewhere."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            complete = whole(tensor)
            if self.main:  # off the device one by one: together they may not fit
                found[name] = tensor if complete is tensor else complete.cpu()
        return found

    # -- the model -----------------------------------------------------------------------------------------------

    def place(self, model: nn.Module, blocks: Sequence[nn.Module], *, compile_blocks: bool) -> None:
        """Moves the model to the device; for fsdp, splits it by `blocks`, in place."""
        if self.mode != "fsdp":
            model.to(self.device)
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.world_size,))
        # Weights are gathered in float32 and autocast lowers them where it does in one process: a `param_dtype` of
        # bfloat16 would halve that traffic, but also round the norms and the residual stream, which autocast keeps.
        # Gradients are summed in float32.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            if compile_blocks:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy)  # moves the block to the device, then keeps a slice of it
        fully_shard(model, mesh=mesh, mp_policy=policy)

    def wrap(self, model: nn.Module, *, compiled: bool) -> Callable[..., Any]:
        """What the training loop calls instead of the placed `model`."""
        forward: nn.Module = model
        if self.mode == "ddp":
            ddp = nn.parallel.DistributedDataParallel
            # The model's buffers are constants: nothing to send before each forward pass. PyTorch 2.13 renamed that.
            newer = "forward_sync_buffers" in inspect.signature(ddp).parameters
            options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
            options["device_ids"] = [self.device] if self.device.type == "cuda" else None
            forward = ddp(model, gradient_as_bucket_view=True, **options)
        # Under fsdp the blocks are compiled one by one (`place`): between them slices are gathered and let go.
        return torch.compile(forward) if compiled and self.mode != "fsdp" else forward

    def accumulating(self, forward: Callable[..., Any], *, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch. DDP exchanges gradients with the last one only. FSDP does with each: without that every
        process would hold the gradient of the whole model between them, which is what it was chosen to avoid."""
        return nullcontext() if self.mode != "ddp" or last else forward.no_sync()  # type: ignore[attr-defined]

    def settle(self, model: nn.Module) -> None:
        """Back to slices after forward passes without a backward one: FSDP keeps the root's weights whole for it."""
        if self.mode == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an exchange failed for what happened to another process. gloo has no type of its own for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clips the norm of the whole gradient to `limit`; returns it as it was before, float32, the same everywhere."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return whole(norm).float()


def whole(tensor: Any) -> Tensor:
    """A tensor of which every process holds a slice, complete; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed(value: Tensor, like: Any) -> Tensor:
    """`value`, which is whole in every process, on the device and in the slices of `like`; a tensor of its own."""
    if not hasattr(like, "placements") or value.shape != like.shape:
        return value.to(like.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()


def load_whole(state: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Puts whole tensors into the slices of a state dict, one by one.

    Raises:
        MegactxError: a tensor has no place there, another shape, or is missing.
    """
    missing = dict(state)
    for name, value in tensors:
        target = missing.pop(name, None)
        if target is None or target.shape != value.shape:
            place = "no place" if target is None else f"the shape {list(target.shape)}"
            raise MegactxError(f"checkpoint: {name!r} is {list(value.shape)}, and has {place} in this model")
        with torch.no_grad():
            target.copy_(placed(value, target))
    if missing:
        raise MegactxError(f"checkpoint: {next(iter(missing))!r} of this model is not in it")
