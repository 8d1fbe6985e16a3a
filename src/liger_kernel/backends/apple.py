"""Apple's GPUs (MPS). Not run by us: the references compute; where it is requested, compiled by Inductor for Metal."""

from __future__ import annotations

import torch

from liger_kernel.backends.inductor import INDUCTOR
from liger_kernel.backends.records import Backend, DeviceFacts


def facts(device: torch.device) -> DeviceFacts:
    return DeviceFacts(name="Apple GPU", queues=True)


BACKEND = Backend("apple", ("mps",), facts, on_request=(INDUCTOR,))
