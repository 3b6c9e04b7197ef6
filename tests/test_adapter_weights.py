"""The file of an adapter's weights: what does not fit or is damaged is refused by name."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import saved_adapters
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved_adapters import (
    BF16,
    FP16,
    FP64,
    LINEARS,
    Q_PROJ,
    Q_PROJ_A,
    Q_PROJ_B,
    configure,
    refusal,
    reweigh,
)

from fastlora.adapters import files
from fastlora.adapters.checks import PREFIX
from fastlora.adapters.errors import AdapterError
from fastlora.adapters.files import CONFIG, WEIGHTS, read_adapter

saved = saved_adapters.saved
folder = saved_adapters.folder


# Tensors.


def put(key: str, value: torch.Tensor):
    return lambda tensors: tensors.update({key: value})


def other(suffix: str, shape: tuple[int, ...] = (4,)):
    return put(f"{PREFIX}model.layers.0.{suffix}", torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other("self_attn.q_proj.lora_magnitude_vector"), "DoRA"),
        (other("self_attn.q_proj.lora_B.bias"), "biases"),
        (other("self_attn.q_proj.base_layer.weight"), "no such weight to compare it with"),
        (other("embed_tokens.weight"), "save_embedding_layers=False"),
        (other("lm_head.modules_to_save.weight"), "trained whole"),
        (other("embed_tokens.lora_embedding_A", (4, 64)), "embedding"),
        (other("embed_tokens.token_adapter.trainable_tokens_delta"), "embedding"),
        (other("self_attn.q_proj.lora_C.weight"), "only lora_A.weight and lora_B.weight"),
        (other("self_attn.q_proj.lora_A.default.weight"), "only lora_A.weight and lora_B.weight"),
        (put("model.x.lora_A.weight", torch.zeros(4, 4)), f"does not begin with {PREFIX}"),
        (put("\x1b[31m", torch.zeros(4, 4)), r"'\x1b[31m'"),
        (lambda tensors: tensors.pop(Q_PROJ_A), f"tensor '{Q_PROJ_B}': there is no lora_A"),
        (lambda tensors: tensors.pop(Q_PROJ_B), f"tensor '{Q_PROJ_A}': there is no lora_B"),
        (lambda tensors: tensors.clear(), "it has no tensors"),
        (put(Q_PROJ_A, torch.zeros(4, 33)), "has shape [4, 33], and model.layers.0.self_attn."),
        (put(Q_PROJ_B, torch.zeros(64, 4)), "base model needs [32, r]"),
        (put(Q_PROJ_B, torch.zeros(32, 4, 1)), "has shape [32, 4, 1]"),
        (put(Q_PROJ_A, torch.zeros(5, 32)), "lora_A of rank 5 and lora_B of rank 4"),
        (
            lambda tensors: tensors.update(
                {Q_PROJ_A: torch.zeros(0, 32), Q_PROJ_B: torch.zeros(32, 0)}
            ),
            "lora_A of rank 0 and lora_B of rank 0",
        ),
        (
            lambda tensors: tensors.update(
                {Q_PROJ_A: torch.zeros(5, 32), Q_PROJ_B: torch.zeros(32, 5)}
            ),
            "has rank 5, and its config says 4 (r)",
        ),
        (put(Q_PROJ_A, torch.zeros(4, 32, dtype=FP64)), "is 'F64', only F32, F16, BF16"),
        (put(Q_PROJ_A, torch.zeros(4, 32, dtype=torch.int8)), "is 'I8', only F32, F16, BF16"),
        (put(Q_PROJ_A, torch.zeros(4, 32).to(torch.float8_e4m3fn)), "is 'F8_E4M3', only F32"),
        (lambda tensors: tensors[Q_PROJ_A].view(-1)[7:8].fill_(math.nan), "has NaN in it"),
        (lambda tensors: tensors[Q_PROJ_B].view(-1)[-1:].fill_(math.inf), "has infinity in it"),
        (lambda tensors: tensors[Q_PROJ_B].view(-1)[:1].fill_(-math.inf), "has infinity in it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, expected: str, folder: Path) -> None:
    reweigh(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{WEIGHTS}: ")
    assert expected in message
    assert message.isprintable()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_nan_is_found_in_half_precision(dtype: torch.dtype, folder: Path) -> None:
    def change(tensors):
        tensors[Q_PROJ_A] = tensors[Q_PROJ_A].to(dtype)
        tensors[Q_PROJ_A][2, 3] = math.nan

    reweigh(folder, change)
    assert f"tensor '{Q_PROJ_A}' has NaN in it" in refusal(folder)


def test_an_adapter_of_another_model_is_refused_with_what_is_alike(folder: Path) -> None:
    linears = {path.replace("model.", "model.language_model."): n for path, n in LINEARS.items()}
    message = refusal(folder, linears)
    assert "the base model has no linear 'model.layers." in message
    assert message.count(", model.language_model.layers.") == 1
    assert ", but model.language_model.layers." in message
    assert "another model" in message
    assert "the base model has no linear" in refusal(folder, {"something": (2, 2)})


def test_a_rank_beyond_the_largest_is_refused(folder: Path) -> None:
    assert "has rank 4, at most 3 is allowed" in refusal(folder, max_rank=3)
    assert read_adapter("emoji", folder, LINEARS, max_rank=4).rank == 4


def test_ranks_that_the_config_does_not_say_are_refused(folder: Path) -> None:
    configure(folder, rank_pattern={"q_proj": 2})
    message = refusal(folder)
    assert f"{Q_PROJ} has rank 4, and its config says 2 (the first key of rank_pattern" in message


def test_a_file_of_senseless_size_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_data", None)
    rank = 10**6
    entries = {}
    for key, shape in ((Q_PROJ_A, [rank, 32]), (Q_PROJ_B, [32, rank])):
        begin = len(entries) * rank * 64
        entries[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, begin + rank * 64]}
    text = json.dumps(entries).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + rank * 128)  # sparse: it takes no room
    configure(folder, r=rank)
    assert "has rank 1000000, at most 256 is allowed" in refusal(folder)


# Damaged files.


def parts_of(folder: Path) -> tuple[dict[str, object], bytes]:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def entry(**fields: object):
    def change(header):
        header[Q_PROJ_A] = {**header[Q_PROJ_A], **fields}

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (entry(shape=[4, 33]), "takes 528 bytes, but its data_offsets are"),
        (entry(shape=[-4, -32]), "shape is [-4, -32], not a short list of integers"),
        (entry(shape=[4.0, 32]), "not a short list of integers"),
        (entry(shape=[True, 32]), "not a short list of integers"),
        (entry(shape="432"), "not a short list of integers"),
        (entry(shape=[9] * 100_000), "not a short list of integers"),
        (entry(data_offsets=[512, 0]), "but its data_offsets are [512, 0]"),
        (entry(data_offsets=[0]), "but its data_offsets are [0]"),
        (entry(data_offsets=[3, 515]), "where the one before it ends at"),
        (entry(dtype=["F32"]), "is ['F32'], only F32"),
        (entry(more=1), "dtype, shape and data_offsets are needed"),
        (lambda header: header.update({Q_PROJ_A: 3}), "are needed, not 3"),
        (lambda header: header.update(__metadata__={"format": 1}), "not an object of strings"),
        (lambda header: header.update(__metadata__=[]), "not an object of strings"),
        (lambda header: header.pop(Q_PROJ_A), "of the data, where the one before it ends"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(
    change, expected: str, folder: Path
) -> None:
    header, data = parts_of(folder)
    change(header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    message = refusal(folder)
    assert message.startswith(f"{WEIGHTS}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "9223372036854775808"),
        (struct.pack("<Q", 3_000_000) + b"{" + b" " * 2_999_999, "of at most 1063936"),
        (struct.pack("<Q", 2) + b"[]", "not safetensors: its header begins with b'[]'"),
        (struct.pack("<Q", 2) + b"{}", "it has no tensors"),
        (struct.pack("<Q", 2) + b"{}x", "take 0 bytes, and 1 follow the header"),
        (struct.pack("<Q", 1) + b"{", "not JSON"),
        (struct.pack("<Q", 900_000) + b'{"a":' + b"[" * 899_995, "not JSON"),
        (b"PK\x03\x04" + bytes(100), "not safetensors"),
    ],
    ids=["empty", "huge", "large", "list", "none", "more", "open", "nested", "zip"],
)
def test_what_is_not_safetensors_is_refused(data: bytes, expected: str, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(data)
    message = refusal(folder)
    assert message.startswith(f"{WEIGHTS}: ")
    assert expected in message


def test_files_that_were_cut_off_are_refused(folder: Path) -> None:
    for name, word in ((WEIGHTS, "cut off"), (CONFIG, "not JSON")):
        data = (folder / name).read_bytes()
        step = max(1, len(data) // 150)
        for length in [*range(24), *range(24, len(data), step), len(data) - 1]:
            (folder / name).write_bytes(data[:length])
            message = refusal(folder)
            assert message.startswith(f"{name}: ")
            assert word in message
        (folder / name).write_bytes(data)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x")
    assert "too long" in refusal(folder)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_refused_or_give_the_same_shapes(data, saved: Path, tmp_path: Path):
    name = data.draw(st.sampled_from([WEIGHTS, WEIGHTS, CONFIG]))
    text = bytearray((saved / name).read_bytes())
    end = 8 + struct.unpack("<Q", text[:8])[0] if name == WEIGHTS else len(text)
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    for each in (CONFIG, WEIGHTS):
        (tmp_path / each).write_bytes(text if each == name else (saved / each).read_bytes())
    try:
        adapter = read_adapter("emoji", tmp_path, LINEARS)
    except AdapterError:
        return
    assert len(adapter.factors) == 14
    reference = safetensors.torch.load(bytes(text)) if name == WEIGHTS else None
    for path, factors in adapter.factors.items():
        n, k = LINEARS[path]
        assert (factors.lora_a.shape, factors.lora_b.shape) == ((4, k), (n, 4))
        if reference is not None:
            assert torch.equal(factors.lora_a, reference[f"{PREFIX}{path}.lora_A.weight"])


def test_a_file_that_is_written_to_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = files.read_data

    def meanwhile(*args):
        os.utime(folder / CONFIG, ns=(1, 1))
        return read(*args)

    monkeypatch.setattr(files, "read_data", meanwhile)
    assert "was written to while it was read" in refusal(folder)


def test_a_file_that_shrinks_meanwhile_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = files.check_tensors

    def meanwhile(*args):
        fits = check(*args)
        os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 64)
        return fits

    monkeypatch.setattr(files, "check_tensors", meanwhile)
    assert "cut off" in refusal(folder)
