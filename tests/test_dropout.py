"""The dropout generator: known answers, rate, independence, packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora import dropout

ONES = 0xFFFFFFFF

# (rounds, counter and key words, result): the published known answers of Random123.
KNOWN_ANSWERS = [
    (7, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (10, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("rounds", "word", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(rounds, word, expected):
    word = torch.tensor(word)
    words = dropout.philox_4x32((word,) * 4, (word,) * 2, rounds)
    assert tuple(int(value) for value in words) == expected


@pytest.mark.parametrize("p", [0.0001, 0.05, 0.1, 0.5, 0.9])
def test_mask_drops_at_the_right_rate(p, device):
    keep = dropout.keep_mask(torch.tensor(1, device=device), 500, 2000, p)
    dropped = dropout.threshold(p) / dropout.LEVELS
    deviation = (dropped * (1 - dropped)) ** 0.5
    assert keep.device.type == device.type
    assert abs(1 - keep.double().mean().item() - dropped) < 5 * deviation / keep.numel() ** 0.5
    # Each of the eight 16-bit lanes, every row and every column alike.
    lanes = keep.double().view(500, -1, 8).mean((0, 1))
    assert ((1 - lanes - dropped).abs() < 5 * deviation / (keep.numel() / 8) ** 0.5).all()
    for dimension, size in ((0, 500), (1, 2000)):
        spread = (keep.double().mean(dimension) - (1 - dropped)).std().item()
        assert spread < 1.2 * deviation / size**0.5


def test_applied_probability_is_p_to_a_65536th():
    assert dropout.threshold(0.1) == 6554
    assert dropout.inverse_keep_probability(0.1) == 65536 / (65536 - 6554)
    assert dropout.threshold(0.0) == dropout.threshold(1e-6) == 0
    assert dropout.inverse_keep_probability(0.0) == 1.0


def test_p_close_to_one_keeps_a_finite_factor():
    p = 1 - 1e-9
    assert dropout.inverse_keep_probability(p) == dropout.LEVELS
    assert dropout.keep_mask(torch.tensor(3), 1000, 1000, p).sum() < 60  # 15 expected


@pytest.mark.parametrize("other", [1, 1 << 32, (1 << 63) - 1], ids=["next", "high-word", "largest"])
def test_masks_of_different_seeds_are_independent(other):
    p, shape = 0.5, (300, 800)
    one = dropout.keep_mask(torch.tensor(0), *shape, p)
    two = dropout.keep_mask(torch.tensor(other), *shape, p)
    agreement = (one == two).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / one.numel() ** 0.5


@pytest.mark.parametrize(("one", "two"), [(0, 1), (1, 2), (0, 3), (0, 1 << 31)])
def test_streams_of_one_seed_are_independent(one, two):
    p, shape, seed = 0.5, (300, 800), torch.tensor(5)
    masks = [dropout.keep_mask(seed, *shape, p, stream=stream) for stream in (one, two)]
    agreement = (masks[0] == masks[1]).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / masks[0].numel() ** 0.5


def test_stream_is_the_third_word_of_the_counter():
    seed, row, block, stream = (torch.tensor(number) for number in (7, 3, 2, 11))
    zero = torch.tensor(0)
    words = dropout.philox_4x32((row, block, stream, zero), (seed, zero))
    lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    keep = dropout.keep_mask(seed, 4, 24, 0.5, stream=11)[3, 16:]
    assert keep.tolist() == [bool(lane >= 1 << 15) for lane in lanes]


def test_neighbouring_rows_and_columns_are_independent():
    keep = dropout.keep_mask(torch.tensor(5), 600, 800, 0.5).double() - 0.5
    for shifted in (keep.roll(1, 0), keep.roll(1, 1), keep.roll(8, 1), keep.roll((1, 8), (0, 1))):
        assert abs((keep * shifted).mean().item()) < 5 * 0.25 / keep.numel() ** 0.5


def test_mask_in_pieces_is_the_whole_mask():
    seed = torch.tensor(7)
    whole = dropout.keep_mask(seed, 10, 37, 0.3)
    pieces = [dropout.keep_mask(seed, 5, 37, 0.3, first_row=first) for first in (0, 5)]
    assert torch.equal(torch.cat(pieces), whole)


def test_seed_comes_from_torchs_generator():
    cpu = torch.device("cpu")
    torch.manual_seed(11)
    first, second = dropout.draw_seed(cpu), dropout.draw_seed(cpu)
    torch.manual_seed(11)
    assert torch.equal(dropout.draw_seed(cpu), first)
    assert not torch.equal(first, second)
    assert first.shape == ()
    assert first.dtype == torch.int64


@given(rows=st.integers(0, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_packing_loses_nothing(rows, columns, seed):
    keep = dropout.keep_mask(torch.tensor(seed), rows, columns, 0.5)
    bits = dropout.pack(keep)
    assert bits.shape == (rows, (columns + 7) // 8)
    assert bits.dtype == torch.uint8
    assert torch.equal(dropout.unpack(bits, columns), keep)


def test_first_column_is_the_lowest_bit():
    keep = torch.zeros(1, 11, dtype=torch.bool)
    keep[0, [0, 2, 10]] = True
    assert dropout.pack(keep).tolist() == [[0b101, 0b100]]


def test_kept_rows_are_read_from_bits_or_drawn_from_the_seed():
    seed, p, part = torch.tensor(9), 0.25, slice(3, 7)
    keeps = [dropout.keep_mask(seed, 12, 21, p, stream=stream) for stream in range(3)]
    bits = torch.stack(list(map(dropout.pack, keeps)))
    for mask in (bits, seed):
        assert torch.equal(dropout.keep_rows(mask, part, 21, p), keeps[0][part])
        for stream, keep in enumerate(keeps):
            assert torch.equal(dropout.keep_rows(mask, part, 21, p, stream), keep[part])
