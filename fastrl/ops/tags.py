"""What torch.compile has to know of an operator besides its schema."""

from __future__ import annotations

from typing import Any

import torch

# Options of an operator that waits for the device, to learn how many rows its matmuls have. A CUDA graph cannot record
# it, so inductor leaves it between graphs. Torch before 2.9 has no such tag, and there `mode="reduce-overhead"` fails.
WAITS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
