"""Tells torch's CUDA sanitizer which tensors Triton kernels read and write, which it does not see by itself.

The sanitizer (`TORCH_CUDA_SANITIZER=1`, or `torch.cuda._sanitizer.enable_cuda_sanitizer`) finds accesses to a tensor
from two streams that no event orders. It follows torch's own operations; a Triton kernel is launched past it. So each
kernel says beside its definition what it writes. While the sanitizer is off nobody looks at a launch.

Three things are not reported, since what orders them is no event between streams:

- Host memory, pinned or not: torch's sanitizer follows device memory alone. That covers the words that the host reads
  while the device works, and the driver's wait for one of them, whose stream touches nothing else.
- Words (`words`) through which the updater's thread hands a plan to the device while iterations are under way, and what
  it has published before it sets them: the device reads that only after it has seen the word.
- What the updater's thread copies, by calls of the driver: the sanitizer is on in the thread that has enabled it, and
  in no other. It writes only into cells that no committed plan names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Declaration", "attach", "declarations", "declares", "report"]


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a kernel does to its tensors: it reads those that are not in `writes`, and may read these too.

    Attributes:
        kernel: Triton's.
        writes: Names of the kernel's arguments.
        words: Names of arguments that are not reported.
        stacked: Names of arguments whose rows are tensors that other kernels use one by one: a tensor is known by its
            address, so that each row is reported.
    """

    kernel: Any
    writes: frozenset[str]
    words: frozenset[str]
    stacked: frozenset[str] = frozenset()

    def tensors(self, arguments: Sequence[object], named: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of the arguments of a launch that are tensors."""
        for name, value in (*zip(self.kernel.arg_names, arguments, strict=False), *named.items()):
            if isinstance(value, Tensor):
                yield name, value

    def launched(self, *arguments: object, **named: object) -> None:
        """Report a launch with these arguments."""
        given: list[tuple[str, Tensor]] = []
        for name, tensor in self.tensors(arguments, named):
            if name not in self.words:
                given += [(name, row) for row in (tensor.unbind() if name in self.stacked else [tensor])]
        report(self.kernel.__name__, given, self.writes)


_DECLARATIONS: list[Declaration] = []
_attached = 0
"""How many of them are told of launches."""


def declares(*, writes: Sequence[str], words: Sequence[str] = (), stacked: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Declare a kernel's accesses, see `Declaration`; put above `triton.jit`."""

    def declare(kernel: Any) -> Any:
        unknown = {*writes, *words, *stacked} - set(kernel.arg_names)
        if unknown:
            raise TypeError(f"{kernel.__name__} has no arguments {sorted(unknown)}")
        _DECLARATIONS.append(Declaration(kernel, frozenset(writes), frozenset(words), frozenset(stacked)))
        attach()
        return kernel

    return declare


def declarations() -> Sequence[Declaration]:
    """Of all kernels that have been imported."""
    return tuple(_DECLARATIONS)


def attach() -> None:
    """Follow launches from now on if the sanitizer is on, and leave kernels alone if it is not.

    Called where kernels are imported and where a device is made; whoever enables the sanitizer later calls it again.
    """
    global _attached
    if _sanitizer() is None:
        return
    for declaration in _DECLARATIONS[_attached:]:
        declaration.kernel.add_pre_run_hook(declaration.launched)
    _attached = len(_DECLARATIONS)


def report(operator: str, tensors: Sequence[tuple[str, Tensor]], writes: frozenset[str]) -> None:
    """Report work that is enqueued on the current stream by other means than torch's operations.

    Args:
        operator: What does it.
        tensors: By name, what it uses.
        writes: The names of those that it writes.

    Raises:
        CUDASanitizerErrors: Torch's, when no event orders it after earlier work on another stream.
    """
    sanitizer = _sanitizer()
    if sanitizer is None:
        return
    names: dict[int, list[str]] = {}
    written: set[int] = set()
    for name, tensor in tensors:
        if _followed(tensor):
            address = tensor.data_ptr() or id(tensor)  # as torch does: empty tensors are not one another's
            names.setdefault(address, []).append(name)
            written |= {address} if name in writes else set()
    handler = sanitizer.cuda_sanitizer.dispatch.event_handler
    errors = handler._handle_kernel_launch(_stream(), names.keys() - written, written, set(), operator, names)
    if errors:
        for error in errors:
            print(error, file=sys.stderr)
        raise sanitizer.CUDASanitizerErrors(errors)


def _sanitizer() -> Any:
    """Torch's module if it is on, else None; importing it would begin to trace."""
    module: Any = sys.modules.get("torch.cuda._sanitizer")
    return module if module is not None and module.cuda_sanitizer.enabled else None


def _followed(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
