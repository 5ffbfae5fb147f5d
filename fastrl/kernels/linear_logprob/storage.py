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

    Storing saves the fourth matmul and costs a pass over the stored logits, and for each chunk of rows one over the
    float32 gradient of the head. Time of 3 matmuls over that of 4, forward and backward, V = 49,152, two cores of a
    Zen 3 (AVX2), medians of interleaved calls:

        H = 576, rows      16    32    64    96   128   256   512  1024
        float32          0.86  0.77  0.85  0.88  0.88  0.85  0.89  0.88
        bfloat16         0.96  0.92  0.89  0.85  0.83  0.86  0.84  0.89
        256 rows, H        32    64   128   256  1024
        float32          1.07  1.00  0.77  0.87  0.84

    Chunks of fewer than FEWEST_ROWS would pay that pass too often. With instructions for bfloat16 a matmul costs less
    than the memory it saves, unless the rows fit one panel.
    """
    if dtype == torch.bfloat16 and isa in BFLOAT16_ISAS and rows > ONE_PANEL:
        return 0
    size = vocabulary * (8 if dtype == torch.float64 else 4)
    most = min(budget // size, max(LOGIT_BYTES // size, FEWEST_ROWS))
    return 0 if width < FEWEST_WIDTH or most < min(rows, FEWEST_ROWS) else most
