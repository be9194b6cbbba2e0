"""Between the host and a device, without waiting for what the device still has to do.

A plain copy from ordinary memory to a GPU waits until everything before it is computed. From page-
locked memory it takes its place in the order of the device's work, and the host goes on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The values on the device, in time for whatever it is given to do from now on."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    # The memory is the allocator's again when the device has read it, not before.
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A small tensor on its way to the host, beside whatever the device is given to do next."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._is_there: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            aside = _copying_stream(tensor.device)
            aside.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(aside):
                self._tensor.copy_(tensor, non_blocking=True)
                self._is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._is_there.record()
            # The memory is the allocator's again when it has been copied, not before.
            tensor.record_stream(aside)

    def wait(self) -> Tensor:
        """The tensor, as soon as it is there."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._tensor


@cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The order of copies to the host, which is nobody else's."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
