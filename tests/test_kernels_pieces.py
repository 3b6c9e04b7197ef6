"""What the kernels share: dropout bits, tiles, corners, partial sums, and the table of tiles."""

from __future__ import annotations

import json
import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, SMALL, P, randn, seed_of

from fastlora import dropout
from fastlora.kernels import shrink as shrink_module
from fastlora.kernels import tile_config
from fastlora.kernels.partial_sums import PartialSum, prepare_sums
from fastlora.kernels.philox import expand_bits, load_bits
from fastlora.kernels.shrink import shrink
from fastlora.kernels.tile_config import (
    DeviceLimits,
    TileConfig,
    default_tile,
    device_slug,
    forget_tiles,
    padded_rank,
    read_table,
    tile_config_for,
    tile_key,
    user_cache,
)
from fastlora.kernels.tile_order import grouped_tile, load_tile, sibling, store_tile

OPERATIONS = ["shrink", "low_rank_gemm", "input_grad", "output_pass", "input_pass"]

# A corner is this many elements from the start, and would be this many before it in 32 bits.
FAR = 2**31
FAR_ROW, FAR_STRIDE = 2**15, 2**16
# What a GPU has to have free for it; on a CPU untouched pages cost nothing.
FAR_BYTES = 2 * FAR + 2**20


@triton.jit
def _philox_kernel(seed_ptr, out_ptr, first_row, first_block, ROWS: tl.constexpr):
    rows, blocks = first_row + tl.arange(0, ROWS), first_block + tl.arange(0, ROWS)
    zeros = rows * 0
    words = tl.philox(tl.load(seed_ptr), rows, blocks, zeros, zeros, n_rounds=7)
    for lane in tl.static_range(4):
        tl.store(out_ptr + lane * ROWS + tl.arange(0, ROWS), words[lane].to(tl.int64))


@triton.jit
def _mask_kernel(
    mask_ptr, out_ptr, stride_mask, first_row, M, first_column, N, stream, threshold,
    FROM_SEED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    bits = load_bits(
        mask_ptr, stride_mask, first_row, M, first_column, N, stream, threshold, FROM_SEED,
        ROWS, COLUMNS,
    )  # fmt: skip
    keep = expand_bits(bits, ROWS, COLUMNS).to(tl.int8)
    store_tile(out_ptr, COLUMNS, 1, 0, ROWS, 0, COLUMNS, keep, ROWS, COLUMNS)


@triton.jit
def _copy_kernel(
    source_ptr, target_ptr, stride_source, stride_target, source_row, target_row, rows, columns,
    SIZE: tl.constexpr,
):  # fmt: skip
    tile = load_tile(
        source_ptr, stride_source, 1, source_row, source_row + rows, 0, columns, SIZE, SIZE
    )
    store_tile(
        target_ptr, stride_target, 1, target_row, target_row + SIZE, 0, SIZE, tile, SIZE, SIZE
    )


@triton.jit
def _copy_sibling_kernel(source_ptr, target_ptr, number, rows, columns, SIZE: tl.constexpr):
    tile = load_tile(sibling(source_ptr, number, rows, columns), columns, 1, 0, 4, 0, SIZE, 4, SIZE)
    store_tile(target_ptr, SIZE, 1, 0, 4, 0, SIZE, tile, 4, SIZE)


@triton.jit
def _order_kernel(order_ptr, row_blocks, column_blocks, GROUP_M: tl.constexpr):
    tile = tl.program_id(0)
    row, column = grouped_tile(tile, row_blocks, column_blocks, GROUP_M)
    tl.store(order_ptr + tile, row * column_blocks + column)


def mask_of(mask, first_row, first_column, rows, columns, p, of=None, stream=0):
    """Read a part of a mask the way the kernels do; ``of`` is the size of the whole mask."""
    m, n = of or (first_row + rows, first_column + columns)
    out = torch.full((rows, columns), -1, dtype=torch.int8, device=DEVICE)
    from_seed = mask.dtype != torch.uint8
    stride = 0 if from_seed else mask.stride(0)
    _mask_kernel[(1,)](
        mask, out, stride, first_row, m, first_column, n, stream, dropout.threshold(p),
        FROM_SEED=from_seed, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return out.bool()


@pytest.fixture
def far_buffer() -> torch.Tensor:
    """4 GiB of addresses: an offset of 2**31 from the middle that wraps around stays inside."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 2 * FAR_BYTES:
        pytest.skip("not enough free memory on the GPU")
    try:
        return torch.empty(FAR_BYTES, dtype=torch.uint8, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of addresses: {error}")


# Both words of the key, alone and together, and the ends of what draw_seed returns.
@pytest.mark.parametrize("seed", [0, 1, 2**32, 0x123456789ABCDEF, 2**63 - 2])
def test_philox_words_are_the_defined_ones(seed):
    first_row, first_block = 2**31 - 16, 2**20
    words = torch.zeros(4, 16, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](seed_of(seed), words, first_row, first_block, ROWS=16)
    counter = torch.arange(16)
    zero = torch.zeros(16, dtype=torch.int64)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    exact = dropout.philox_4x32((first_row + counter, first_block + counter, zero, zero), key)
    assert torch.equal(words.cpu(), torch.stack(exact))


@pytest.mark.parametrize("p", [0.0, 1e-5, P, 0.99999])
@pytest.mark.parametrize(
    ("first_row", "first_column"),
    [
        pytest.param(0, 0, id="first-tile"),
        pytest.param(5, 8, id="inside"),
        pytest.param(2**16 + 3, 0, id="row-beyond-16-bits"),
        pytest.param(3, 2**19 + 8, id="byte-beyond-16-bits"),
        pytest.param(2**24 + 1, 2**20, id="both"),
    ],
)
def test_drawn_mask_is_the_defined_one(first_row, first_column, p):
    seed = seed_of(0x123456789ABCDEF)
    keep = dropout.keep_mask(seed, 16, first_column + 32, p, first_row=first_row)
    drawn = mask_of(seed, first_row, first_column, 16, 32, p)
    assert torch.equal(drawn, keep[:, first_column:])


@pytest.mark.parametrize("stream", [1, 2, 3, 16])
def test_every_stream_draws_its_defined_mask(stream):
    seed = seed_of(0x123456789ABCDEF)
    keep = dropout.keep_mask(seed, 16, 40, P, first_row=5, stream=stream)
    assert torch.equal(mask_of(seed, 5, 8, 16, 32, P, stream=stream), keep[:, 8:])


def test_loaded_mask_is_the_drawn_one():
    seed, p = seed_of(9), 0.3
    bits = dropout.pack(dropout.keep_mask(seed, 40, 80, p))
    loaded = mask_of(bits, 16, 32, 16, 32, 0.0)
    assert torch.equal(loaded, mask_of(seed, 16, 32, 16, 32, p))


def test_loaded_mask_drops_what_lies_outside():
    bits = torch.full((5, 3), 0xFF, dtype=torch.uint8, device=DEVICE)
    loaded = mask_of(bits, 0, 0, 16, 32, 0.0, of=(5, 24))
    assert loaded[:5, :24].all()
    assert loaded.sum() == 5 * 24


def test_kernel_draws_the_mask_of_every_row_block():
    """Rows beyond 2**16 of a real launch, one column of bytes wide."""
    x, seed = torch.zeros(1, 8, device=DEVICE).expand(2**16 + 40, 8), seed_of(5)
    # Nine interpreted programs instead of 1,025; no GPU has the registers for such a tile.
    config = TileConfig(2**13 if DEVICE.type == "cpu" else 64, block_k=16)
    _, (bits,) = shrink(
        x, [randn(1, 8)], seed, dropout.threshold(P), rank_dtype=torch.float32,
        return_bits=True, config=config,
    )  # fmt: skip
    assert torch.equal(bits, dropout.pack(dropout.keep_mask(seed, *x.shape, P)))


def test_what_a_kernel_leaves_unwritten_is_poisoned(monkeypatch):
    """The other tests find gaps in a result only because this holds for the kernels' modules."""

    class Idle:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(shrink_module, "_shrink_kernel", Idle())
    h, bits = shrink(
        randn(5, 8), [randn(2, 8)], seed_of(1), rank_dtype=torch.float32, return_bits=True,
        config=SMALL,
    )  # fmt: skip
    assert h.isnan().all()
    assert (bits == 0xA5).all()


def test_corner_beyond_32_bits_is_loaded(far_buffer):
    middle, target = far_buffer[FAR:], torch.zeros(16, 16, dtype=torch.uint8, device=DEVICE)
    numbers = torch.arange(64, dtype=torch.uint8, device=DEVICE).view(4, 16)
    middle[FAR:].as_strided((4, 16), (FAR_STRIDE, 1)).copy_(numbers)
    _copy_kernel[(1,)](middle, target, FAR_STRIDE, 16, FAR_ROW, 0, 4, 16, SIZE=16)
    assert torch.equal(target[:4], numbers)
    assert not target[4:].any()


def test_corner_beyond_32_bits_is_stored(far_buffer):
    middle = far_buffer[FAR:]
    numbers = torch.arange(256, device=DEVICE).to(torch.uint8).view(16, 16)
    _copy_kernel[(1,)](numbers, middle, 16, FAR_STRIDE, 0, FAR_ROW, 16, 16, SIZE=16)
    assert torch.equal(middle[FAR:].as_strided((16, 16), (FAR_STRIDE, 1)), numbers)


def test_mask_byte_beyond_32_bits_is_loaded(far_buffer):
    middle = far_buffer[FAR:]
    bits = dropout.pack(dropout.keep_mask(seed_of(4), 16, 32, P))
    middle[FAR:].as_strided((16, 4), (FAR_STRIDE, 1)).copy_(bits)
    rows = middle.as_strided((FAR_ROW, 4), (FAR_STRIDE, 1))
    loaded = mask_of(rows, FAR_ROW, 0, 16, 32, 0.0)
    assert torch.equal(loaded, dropout.unpack(bits, 32))


def test_sibling_beyond_32_bits_is_found(far_buffer):
    middle, target = far_buffer[FAR:], torch.zeros(4, 16, dtype=torch.uint8, device=DEVICE)
    numbers = torch.arange(64, dtype=torch.uint8, device=DEVICE).view(4, 16)
    middle[FAR:].as_strided((4, 16), (2**15, 1)).copy_(numbers)
    _copy_sibling_kernel[(1,)](middle, target, 2, 2**15, 2**15, SIZE=16)
    assert torch.equal(target, numbers)


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 8), (5, 3, 2), (7, 4, 8), (8, 1, 3), (1, 9, 8)]
)
def test_grouped_tiles_are_walked_once_each(rows, columns, group):
    order = torch.full((rows * columns,), -1, dtype=torch.int32, device=DEVICE)
    _order_kernel[(rows * columns,)](order, rows, columns, GROUP_M=group)
    assert sorted(order.tolist()) == list(range(rows * columns))
    first_group = order[: min(group, rows)].tolist()
    assert first_group == [row * columns for row in range(len(first_group))]


def sum_in_order(scratch, first, shape, gain):
    """Return one sum of fp32 partial results, times its gain."""
    total = torch.zeros(shape[1:], device=DEVICE)
    for split in scratch[first:][: math.prod(shape)].view(shape):
        total = total + split
    return total * gain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_partial_sums_are_added_in_the_order_of_the_splits(dtype):
    """Several sums of one launch: one of more than a block, one transposed, one with one split."""
    shapes, gains = [(3, 5, 300), (7, 40, 16), (1, 1, 1)], [1.0, -1 / 3, 1.7]
    scratch = randn(3 * 5 * 300 + 7 * 40 * 16 + 1)
    outs = [torch.full(shape[1:], float("nan"), dtype=dtype, device=DEVICE) for shape in shapes]
    outs[1] = outs[1].t().contiguous().t()
    firsts = [0, 3 * 5 * 300, 3 * 5 * 300 + 7 * 40 * 16]
    add = prepare_sums(
        [
            PartialSum(gain, first, *shape, *out.stride())
            for out, gain, first, shape in zip(outs, gains, firsts, shapes, strict=True)
        ]
    )
    add(scratch, tuple(outs))
    for out, gain, first, shape in zip(outs, gains, firsts, shapes, strict=True):
        assert torch.equal(out, sum_in_order(scratch, first, shape, gain).to(dtype))


def test_partial_sums_may_share_a_result():
    """As the siblings' dh do: each begins at an element of its own, and leaves the rest alone."""
    shapes, firsts_of_out = [(3, 5, 16), (2, 5, 16)], [16, 16 + 5 * 16]
    scratch, out = randn(3 * 5 * 16 + 2 * 5 * 16), torch.full((12, 16), -1.0, device=DEVICE)
    firsts, gains = [0, 3 * 5 * 16], [1.7, -0.5]
    sums = [
        PartialSum(gain, first, *shape, 16, 1, first_of_out)
        for gain, first, shape, first_of_out in zip(
            gains, firsts, shapes, firsts_of_out, strict=True
        )
    ]
    prepare_sums(sums)(scratch, (out, out))
    expected = map(sum_in_order, [scratch] * 2, firsts, shapes, gains)
    assert torch.equal(out[1:-1], torch.cat(list(expected)))
    assert (out[[0, -1]] == -1).all()


def test_sums_prepared_once_take_any_scratch_and_results():
    shapes, firsts, gains = [(3, 5, 40), (2, 7, 16)], [0, 3 * 5 * 40], [1.7, -0.5]
    add = prepare_sums(
        [
            PartialSum(gain, first, *shape, shape[2], 1)
            for gain, first, shape in zip(gains, firsts, shapes, strict=True)
        ]
    )
    calls = [
        (
            randn(3 * 5 * 40 + 2 * 7 * 16),
            tuple(torch.full(shape[1:], float("nan"), device=DEVICE) for shape in shapes),
        )
        for _ in range(2)
    ]
    for call in calls:
        add(*call)
    for scratch, outs in calls:
        expected = map(sum_in_order, [scratch] * 2, firsts, shapes, gains)
        assert all(map(torch.equal, outs, expected))


# Tiles as data. Shared memory that one program may use, as the drivers give it.
DEVICES = [
    pytest.param(DeviceLimits("MI300X", 0, 65536, 304), id="gfx942"),
    pytest.param(DeviceLimits("A100", 80, 166912, 108), id="sm_80"),
    pytest.param(DeviceLimits("RTX 4090", 89, 101376, 128), id="sm_89"),
    pytest.param(DeviceLimits("H200", 90, 232448, 132), id="sm_90"),
    pytest.param(DeviceLimits("B200", 100, 232448, 148), id="sm_100"),
    pytest.param(DeviceLimits("RTX 5090", 120, 101376, 170), id="sm_120"),
]


def buffered_bytes(
    operation: str, tile: TileConfig, limits: DeviceLimits, dtype: torch.dtype, rank: int
) -> int:
    """Estimate the shared memory of the operands that a software pipeline keeps in flight.

    One step's operands for each stage, or for each but the last on AMD, whose last is in registers.
    Where the tensor memory accelerator stores the output of a GEMM, one part of it comes on top.
    """
    size, r = dtype.itemsize, padded_rank(rank)
    stages = tile.num_stages - (limits.capability == 0)
    if operation in ("low_rank_gemm", "input_grad"):
        step = (tile.block_m + tile.block_n) * tile.block_k
        staged = tile.block_m * tile.block_n // tile.parts if limits.capability >= 90 else 0
        return (stages * step + staged) * size
    step = {
        "shrink": (tile.block_m + r) * tile.block_k,
        "output_pass": (tile.block_m + r) * tile.block_n,
        "input_pass": (tile.block_n + r) * tile.block_m,
    }[operation]
    return stages * step * size


@pytest.mark.parametrize("rank", [1, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("limits", DEVICES)
def test_default_tiles_fit_every_device(limits, dtype, rank):
    # Above rank 64 the other kernels stand in for the pass over dy.
    operations = [op for op in OPERATIONS if op != "output_pass" or rank <= 64]
    used = {}
    for operation in operations:
        tile = default_tile(operation, limits, dtype, 1000, 4096, 4096, rank)
        used[operation] = buffered_bytes(operation, tile, limits, dtype, rank)
    too_large = {name: size for name, size in used.items() if size > limits.shared_bytes}
    assert not too_large, f"{too_large} bytes of {limits.shared_bytes}"


@pytest.mark.parametrize("m", [1, 64, 1000, 100_000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_default_splits_leave_no_part_shorter_than_512(operation, m):
    limits = DeviceLimits("H200", 90, 232448, 132)
    tile = default_tile(operation, limits, torch.float16, m, 4096, 4096, 16)
    length = {"shrink": 4096, "output_pass": 4096, "input_pass": m}.get(operation, 0)
    assert tile.splits == 1 or length // tile.splits >= 512


def test_unknown_operation_has_no_default_tile():
    with pytest.raises(ValueError, match="no such operation: 'expand'"):
        default_tile("expand", tile_config.INTERPRETER, torch.float16, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("m", "bucket"),
    [(0, 64), (1, 64), (64, 64), (65, 256), (1000, 1024), (16384, 16384), (10**6, 16384)],
)
def test_rows_are_rounded_up_to_a_bucket(m, bucket):
    assert tile_key("low_rank_gemm", torch.float16, m, 24, 40, 16).m == bucket


def test_keys_hold_what_the_operation_depends_on():
    keys = {op: tile_key(op, torch.bfloat16, 100, 24, 40, 5) for op in OPERATIONS}
    assert {op: (key.n, key.k) for op, key in keys.items()} == {
        "shrink": (0, 40),
        "low_rank_gemm": (24, 40),
        "input_grad": (24, 40),
        "output_pass": (24, 0),
        "input_pass": (0, 40),
    }
    assert {(key.dtype, key.r) for key in keys.values()} == {("bfloat16", 16)}


def test_keys_of_siblings_hold_one_rank_and_their_number():
    alone, three = (tile_key("shrink", torch.bfloat16, 100, 0, 40, 5, g) for g in (1, 3))
    assert (alone.r, alone.siblings) == (16, 1)
    assert (three.r, three.siblings) == (16, 3)
    assert tile_key("shrink", torch.bfloat16, 100, 0, 40, 5) == alone


def test_default_tiles_of_siblings_see_the_sum_of_their_ranks():
    limits = DeviceLimits("H200", 90, 232448, 132)
    for operation in ("shrink", "input_pass"):
        args = operation, limits, torch.float16, 1000, 0, 4096
        assert default_tile(*args, 16, siblings=3) == default_tile(*args, 64)
    # A program of the pass over dy, and a chunk of the GEMM, hold one sibling's rank.
    for operation in ("output_pass", "input_grad"):
        args = operation, limits, torch.float16, 1000, 4608, 4096
        assert default_tile(*args, 16, siblings=3) == default_tile(*args, 16)


@pytest.mark.parametrize("limits", DEVICES)
def test_low_rank_term_alone_has_a_tile_of_its_own(limits):
    half = torch.float16
    term = default_tile("low_rank_gemm", limits, half, 1000, 4096, 0, 16)
    assert term == default_tile("input_grad", limits, half, 1000, 0, 4096, 16)
    assert term.block_m * term.block_n <= 64 * 64


@pytest.mark.parametrize(
    ("rank", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256)]
)
def test_ranks_are_padded_to_powers_of_two(rank, padded):
    assert padded_rank(rank) == padded


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("AMD Instinct MI300X (gfx942)", "amd-instinct-mi300x-gfx942"),
    ],
)
def test_device_names_become_file_names(name, slug):
    assert device_slug(name) == slug


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Write a table of one tile to the committed folder or to the user's cache."""
    monkeypatch.setattr(tile_config, "TUNED", tmp_path / "committed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    limits = DeviceLimits("Some GPU", 90, 232448, 132)
    monkeypatch.setattr(tile_config, "device_limits", lambda device: limits)

    def write(folder, **rows):
        folder.mkdir(parents=True)
        entries = [
            {"key": vars(tile_key(operation, torch.float16, 100, 0, 40, 16)), "tile": tile}
            for operation, tile in rows.items()
        ]
        (folder / "some-gpu.json").write_text(json.dumps({"entries": entries}))
        forget_tiles()

    forget_tiles()
    yield write
    forget_tiles()


def look_up(operation, m=100):
    return tile_config_for(operation, DEVICE, torch.float16, m, k=40, r=16)


def test_without_a_table_the_default_tile_is_taken(tables):
    limits = tile_config.device_limits(DEVICE)
    assert look_up("shrink") == default_tile("shrink", limits, torch.float16, 100, 0, 40, 16)


def test_committed_table_wins_over_the_users_cache_and_both_over_the_default(tables):
    committed, cached = SMALL, TileConfig(32, 32, 64, splits=3)
    default = look_up("input_pass", m=300)
    tables(user_cache(), shrink=cached.as_dict(), input_pass=cached.as_dict())
    assert look_up("shrink") == look_up("input_pass") == cached
    tables(tile_config.TUNED, shrink=committed.as_dict())
    assert look_up("shrink") == committed
    assert look_up("input_pass") == cached
    assert look_up("input_pass", m=300) == default  # another bucket of rows


def test_table_that_does_not_know_siblings_is_of_single_projections(tables):
    default = tile_config_for("shrink", DEVICE, torch.float16, 100, k=40, r=16, siblings=3)
    tables(tile_config.TUNED, shrink=SMALL.as_dict())
    path = tile_config.TUNED / "some-gpu.json"
    table = json.loads(path.read_text())
    for row in table["entries"]:
        del row["key"]["siblings"]
    path.write_text(json.dumps(table))
    forget_tiles()
    assert look_up("shrink") == SMALL
    group = tile_config_for("shrink", DEVICE, torch.float16, 100, k=40, r=16, siblings=3)
    assert group == default


def test_entry_without_a_tile_leaves_the_default(tables):
    default = look_up("shrink")
    tables(tile_config.TUNED, shrink=None)
    assert look_up("shrink") == default


def test_caches_home_is_the_default_without_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "fastlora" / "tuned"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"entries": [{}]}', '{"entries": [{"key": {"rank": 1}}]}'],
    ids=["empty", "cut-off", "a-list", "no-entries", "no-key", "another-key"],
)
def test_unreadable_table_is_named(text, tmp_path):
    path = tmp_path / "some-gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some-gpu\.json is not a table of tuned tiles: .*delete"):
        read_table(path)
