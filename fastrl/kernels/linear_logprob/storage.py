"""How many matmuls the native head takes: whether logits are stored for the backward products or computed again."""

from __future__ import annotations

import torch

LOGIT_BYTES = 128 << 20  # of logits stored at a time, where the budget is larger
KEEP_BYTES = 64 << 20  # the same where 16-bit probabilities are kept, and no pass over d weight follows
FEWEST_ROWS = 96  # stored at a time
FEWEST_WIDTH = 64
ONE_PANEL = 64  # rows
BFLOAT16_ISAS = ("avx512_bf16", "amx", "amx_emulated")


def stored_rows(dtype: torch.dtype, isa: str, rows: int, width: int, vocabulary: int, budget: int) -> int:
    """Rows whose logits the native head stores at a time, in at most `budget` bytes; 0: it computes them twice.

    TODO
    """
    if dtype == torch.bfloat16 and isa in BFLOAT16_ISAS and rows > ONE_PANEL:
        return 0
    size = vocabulary * (8 if dtype == torch.float64 else 4)
    most = min(budget // size, max(LOGIT_BYTES // size, FEWEST_ROWS))
    return 0 if width < FEWEST_WIDTH or most < min(rows, FEWEST_ROWS) else most
