"""How many rows to put through the head at a time.

Three things bound it. A chunk of logits must fit a memory budget. A chunk must be long enough that reading the head
(and, if it is trained, reading and writing its gradient) hides behind the arithmetic. And the narrow product, the
gradient of the hidden states [C, H], should fill the GPU's last wave of output tiles: with 128 x 256 tiles on 132
multiprocessors, H = 2048 and C = 1024 leave half of the GPU idle. `V / H`, as the ratio of the two buffers, is the
usual rule; it gives 256 rows at H = 4096, V = 128256, and then the head's traffic dominates.

Predictions, not measured on a GPU: see `kernels/README.md`.
"""

from functools import lru_cache

import torch

TILE_ROWS, TILE_COLUMNS = 128, 256  # the output tile of the usual cuBLAS kernels on Hopper
_DEFAULT_PROCESSORS = 132

# Rows whose arithmetic (2 V H a row, 790 TFLOP/s) takes as long as reading a 16-bit head (2 V H bytes, 3 TB/s), and as
# reading and writing its fp32 gradient (8 V H bytes).
_HIDES_READ, _HIDES_UPDATE = 263, 1053

# Least rows of a chunk, and the bytes that its logits may take.
_FROZEN_ROWS, _FROZEN_BYTES = 1024, 512 * 2**20
_TRAINED_ROWS, _TRAINED_BYTES = 2048, 1024 * 2**20
_CPU_BYTES, _CPU_TILE_BYTES = 96 * 2**20, 32 * 2**20

SCORING_ROWS = 4096
_SCORING_BYTES = 32 * 2**20  # stays in the L2 cache of a large GPU (H100: 50 MB) beside the operands


def padded(columns: int) -> int:
    """Row stride of a logits buffer: a multiple of 64 elements keeps odd vocabularies on the fast GEMM kernels."""
    return -(-columns // 64) * 64


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def waves(rows: int, columns: int, sms: int) -> int:
    """How many rounds of output tiles a [rows, columns] product takes."""
    return -(-(-(-rows // TILE_ROWS) * -(-columns // TILE_COLUMNS)) // sms)


def training_rows(
    rows: int,
    hidden: int,
    vocab: int,
    itemsize: int,
    device: torch.device,
    *,
    trained_head: bool,
    sms: int | None = None,
) -> int:
    """Rows of a chunk for `rows` rows in all; at least 1.

    Takes the chunk length with the least modelled time over *all* chunks, so that a short last chunk counts; the
    shortest on a tie.
    """
    if device.type == "cpu":
        most = max(1, _CPU_BYTES // (4 * padded(vocab)))
        # Chunks of about the same length: a short one reads the head for little.
        return max(1, -(-rows // -(-rows // most))) if rows else 1
    least, budget = (_TRAINED_ROWS, _TRAINED_BYTES) if trained_head else (_FROZEN_ROWS, _FROZEN_BYTES)
    most = max(TILE_ROWS, budget // (itemsize * padded(vocab)) // TILE_ROWS * TILE_ROWS)
    least = min(least, most)
    if rows <= least:
        return max(1, rows)
    sms = sms or processors(device)

    def total(chunk: int) -> float:
        full, rest = divmod(rows, chunk)
        cost = full * chunk_cost(chunk, hidden, sms, trained_head=trained_head)
        return cost + (chunk_cost(rest, hidden, sms, trained_head=trained_head) if rest else 0.0)

    return min(rows, min(range(least, most + 1, TILE_ROWS), key=lambda chunk: (total(chunk), chunk)))


def one_chunk(rows: int, hidden: int, itemsize: int) -> bool:
    """Whether a trained 16-bit head takes all rows at once, and writes its gradient once, in its own dtype.

    The logits of all rows (`rows V itemsize` bytes) are then no larger than the fp32 sum that several chunks would
    need (`4 V hidden`), which would also be read and written for every chunk, and rounded in a pass of its own.
    """
    return itemsize == 2 and rows * itemsize <= 4 * hidden


def chunk_cost(rows: int, hidden: int, sms: int, *, trained_head: bool) -> float:
    """Modelled time of a chunk, in rows of one [rows, V] product at full speed.

    Each product takes as long as its arithmetic or its traffic of the head, whichever is longer; the product for the
    hidden states, whole waves of output tiles.
    """
    whole_waves = waves(rows, hidden, sms) * sms * TILE_ROWS * TILE_COLUMNS / hidden
    update = max(rows, _HIDES_UPDATE) if trained_head else 0
    return max(rows, _HIDES_READ) + max(whole_waves, _HIDES_READ) + update


def scoring_tile(rows: int, vocab: int, itemsize: int, device: torch.device) -> tuple[int, int]:
    """`(rows, columns)` of a tile of logits when only log-probabilities are wanted."""
    if device.type == "cpu":
        columns = min(padded(vocab), 16384)
        return max(1, min(rows, _CPU_TILE_BYTES // (4 * columns))), columns
    tile_rows = max(1, min(rows, SCORING_ROWS))
    columns = _SCORING_BYTES // (itemsize * tile_rows) // TILE_COLUMNS * TILE_COLUMNS
    return tile_rows, min(max(columns, TILE_COLUMNS), padded(vocab))
