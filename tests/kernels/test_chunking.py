"""The chunk rule: bounds that must always hold, and the cases it was made for."""

import pytest
import torch

from selsft_kernels.chunking import chunk_cost, padded, scoring_tile, training_rows, waves

GPU = torch.device("cuda")  # only its name is looked at
SHAPES = [(576, 49152), (2048, 128256), (4096, 128256), (3584, 152064), (2304, 256000), (4096, 262144)]


def chunk(rows: int, hidden: int, vocab: int, trained: bool) -> int:
    return training_rows(rows, hidden, vocab, 2, GPU, trained_head=trained, sms=132)


@pytest.mark.parametrize(("hidden", "vocab"), SHAPES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 100, 2048, 4100, 8192, 32768, 40000])
def test_bounds(rows: int, hidden: int, vocab: int, trained: bool) -> None:
    c = chunk(rows, hidden, vocab, trained)
    assert 1 <= c <= rows
    assert c * padded(vocab) * 2 <= (1024 if trained else 512) * 2**20
    assert c >= min(rows, 527 if trained else 263), "too short to hide the head's traffic behind the arithmetic"


def test_the_narrow_product_fills_the_gpu() -> None:
    """H = 2048: 1024 rows are 64 tiles for 132 multiprocessors, 2048 rows are 128. The rule sees that."""
    assert waves(1024, 2048, 132) == waves(2048, 2048, 132) == 1
    assert chunk(8192, 2048, 128256, False) == 2048
    assert chunk(8192, 4096, 128256, False) == 1024


def test_a_short_last_chunk_is_avoided() -> None:
    """5000 rows in chunks of 1664 end with one of 8 rows; the rule takes a length whose chunks come out even."""
    c = chunk(5000, 4096, 128256, True)
    assert chunk_cost(8, 4096, 132, trained_head=True) > 0.5 * chunk_cost(1024, 4096, 132, trained_head=True)
    assert 5000 % c == 0 or 5000 % c > 1024


def test_the_cpu_is_bounded_by_memory() -> None:
    assert training_rows(10**6, 64, 49152, 4, torch.device("cpu"), trained_head=True) * 49152 * 4 <= 96 * 2**20
    assert training_rows(10, 64, 10**9, 4, torch.device("cpu"), trained_head=True) == 1


def test_chunks_on_the_cpu_are_even() -> None:
    """520 rows of 49152 do not fit 96 MiB: 260 twice, not 512 and a last 8 that read the whole head."""
    assert training_rows(520, 64, 49152, 4, torch.device("cpu"), trained_head=False) == 260


@pytest.mark.parametrize("rows", [1, 63, 4096, 32768])
@pytest.mark.parametrize(("hidden", "vocab"), SHAPES)
def test_scoring_tiles_stay_in_the_cache(rows: int, hidden: int, vocab: int) -> None:
    height, width = scoring_tile(rows, vocab, 2, GPU)
    assert 1 <= height <= rows and width % 64 == 0
    assert height * width * 2 <= 32 * 2**20


def test_padding() -> None:
    assert [padded(v) for v in (1, 64, 65, 50257)] == [64, 64, 128, 50304]
