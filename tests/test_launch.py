"""Launch: the first call is Triton's own, later ones the same launch without its search.

No GPU: a driver and a compiler that do nothing stand below Triton's real ``JITFunction.run``,
``CompiledKernel`` and, in Triton 3.7, launcher; what reaches the launcher is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastlora.kernels import launch as launching
from fastlora.kernels.launch import Launch, describe, form_of

# Triton remembers what a device has of shared memory: no number that a real one may have.
DEVICE, OTHER_DEVICE = 71, 72
STREAM = 4711
SINCE_3_7 = pytest.mark.skipif(not launching._HAS_C_LAUNCH, reason="the C launcher of Triton 3.7.1")


class Pair(NamedTuple):
    pointer: torch.Tensor | None
    stride: int


def _kernel(x, nothing, pairs, size, gain, BLOCK: tl.constexpr, MASK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), gain)


def _with_default(x, size, gain=2.0, BLOCK: tl.constexpr = 16):
    tl.store(x + tl.arange(0, BLOCK), gain)


GRID = (3, 2)
CONSTANTS = {"BLOCK": 16, "MASK": "none", "num_warps": 8}


def arguments() -> tuple[Any, ...]:
    """Return new arguments of ``_kernel``, of one specialisation."""
    pairs = (Pair(torch.zeros(16), 1), Pair(torch.zeros(16), 32))
    return torch.zeros(16), None, pairs, 48, 1.5


class Recorder:
    """A launcher class, in place of the driver's, that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, src: Any, metadata: Any) -> Any:
        return lambda *args: self.calls.append(args)


class FakeDriver:
    """What Triton asks of a driver to compile, load and launch."""

    def __init__(self, launcher_cls: Any) -> None:
        self.launcher_cls, self.device, self.stream = launcher_cls, DEVICE, STREAM
        self.launched: list[tuple[Any, ...]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (1, 2, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            launch=lambda *args: self.launched.append(args),
            build_signature_metadata=tuple,
            fill_tma_descriptor_tiled=self._map,
        )

    def _map(self, *args: Any) -> str:
        self.maps.append(args)
        return f"map of {args[0]}"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device


def _compile(src: Any, target: Any, options: Any, **others: Any) -> CompiledKernel:
    """Return a compiled kernel without compiling one."""
    compiled = CompiledKernel.__new__(CompiledKernel)
    types = [ty for ty in src.signature.values() if str(ty).startswith("tensordesc")]
    form = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [4, 4], "fp4_padded": False}
    sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "shared"), 0)
    aligns = dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1)
    flags = {"launch_cooperative_grid": False, "launch_pdl": False, "tmem_size": None}
    metadata = SimpleNamespace(
        num_warps=options["num_warps"], num_ctas=1, tensordesc_meta=[form] * len(types),
        **sizes, **aligns, **flags,
    )  # fmt: skip
    compiled.__dict__.update(
        src=src, metadata=metadata, name="kernel", hash="", kernel=b"", metadata_group={},
        module=None, function=None, packed_metadata=(metadata.num_warps, 1, 0),
    )  # fmt: skip
    compiled._run = None
    return compiled


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    before = dict(vars(driver))
    fake = FakeDriver(Recorder())
    driver.set_active(fake)
    monkeypatch.setattr(triton.compiler, "compile", _compile)
    # Hooks that another test, or a profiler, may have left behind.
    monkeypatch.setattr(knobs.runtime, "debug", False)
    yield fake
    vars(driver).clear()
    vars(driver).update(before)


class Counted(JITFunction):
    """A kernel that counts the launches that go through Triton's own path."""

    runs = 0

    def run(self, *args: Any, **options: Any) -> Any:
        self.runs += 1
        return super().run(*args, **options)


@pytest.fixture
def kernel(fake: FakeDriver) -> Counted:
    return Counted(_kernel)


def test_the_first_call_is_tritons_and_the_next_gets_to_its_launcher_alike(fake, kernel):
    first, second = arguments(), arguments()
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*first)
    launch(*second)
    assert kernel.runs == 1
    ordinary, direct = fake.launcher_cls.calls
    fixed = 6  # grid, stream, function and packed metadata
    assert direct[:fixed] == ordinary[:fixed] == (3, 2, 1, STREAM + DEVICE, 2, (8, 1, 0))
    assert direct[fixed : fixed + 3] == (None, None, None)  # no metadata for hooks, and no hooks
    for call, args in ((ordinary, first), (direct, second)):
        assert len(call) == fixed + 3 + 7
        assert all(got is given for got, given in zip(call[fixed + 3 :], args, strict=False))
        assert call[-2:] == (16, "none")


@pytest.mark.parametrize("grid", [(5,), (5, 6), (5, 6, 7)])
def test_a_grid_has_one_to_three_sizes(fake, kernel, grid):
    launch = Launch(kernel, grid, CONSTANTS)
    launch(*arguments())
    launch(*arguments())
    ordinary, direct = fake.launcher_cls.calls
    assert direct[:3] == ordinary[:3] == (*grid, 1, 1)[:3]


def test_the_stream_is_that_of_the_call(fake, kernel):
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*arguments())
    fake.stream = 99
    launch(*arguments())
    assert fake.launcher_cls.calls[-1][3] == 99 + DEVICE


def test_another_device_is_tritons(fake, kernel):
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*arguments())
    fake.device = OTHER_DEVICE
    launch(*arguments())
    assert kernel.runs == 2
    fake.device = DEVICE
    launch(*arguments())
    assert kernel.runs == 2


def _set_hook(monkeypatch: pytest.MonkeyPatch, name: str, hook: Any) -> None:
    chain = getattr(knobs.runtime, name)
    if hasattr(chain, "calls"):
        monkeypatch.setattr(chain, "calls", [hook])
    else:
        monkeypatch.setattr(knobs.runtime, name, hook)


def _stages(monkeypatch: pytest.MonkeyPatch, kernel: JITFunction) -> None:
    monkeypatch.setattr(
        knobs.runtime, "add_stages_inspection_hook", lambda *args: ("key", "hash"), raising=False
    )


WATCHERS = {
    "enter hook": lambda m, k: _set_hook(m, "launch_enter_hook", lambda metadata: None),
    "exit hook": lambda m, k: _set_hook(m, "launch_exit_hook", lambda metadata: None),
    "replaced hook": lambda m, k: m.setattr(knobs.runtime, "launch_enter_hook", print),
    "pre-run hook": lambda m, k: m.setattr(k, "pre_run_hooks", [lambda *args, **options: None]),
    "debug": lambda m, k: m.setattr(knobs.runtime, "debug", True),
    "stages": _stages,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_watched_launch_is_tritons(fake, kernel, monkeypatch, watcher):
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*arguments())
    with monkeypatch.context() as patch:
        WATCHERS[watcher](patch, kernel)
        launch(*arguments())
        launch(*arguments())
        assert kernel.runs == 3
    launch(*arguments())
    assert kernel.runs == 3
    assert len(fake.launcher_cls.calls) == 4


@pytest.mark.parametrize("watcher", WATCHERS)
def test_what_was_compiled_for_a_watcher_is_not_kept(fake, kernel, monkeypatch, watcher):
    launch = Launch(kernel, GRID, CONSTANTS)
    with monkeypatch.context() as patch:
        WATCHERS[watcher](patch, kernel)
        launch(*arguments())
    launch(*arguments())
    assert kernel.runs == 2
    launch(*arguments())
    assert kernel.runs == 2


class Double:
    """In place of a kernel: it counts, and returns what it is told to."""

    def __init__(self, result: Any) -> None:
        self.result, self.calls = result, []

    def __getitem__(self, grid: Any) -> Any:
        def call(*args: Any, **constants: Any) -> Any:
            self.calls.append((grid, args, constants))
            return self.result

        return call


@pytest.mark.parametrize("compiled", [False, True])
def test_a_double_is_called_each_time(compiled):
    result = CompiledKernel.__new__(CompiledKernel) if compiled else object()
    if compiled:
        result.module = 1  # as an autotuner returns one
    double = Double(result)
    launch = Launch(double, GRID, CONSTANTS)
    for _ in range(3):
        launch(1, 2)
    assert double.calls == [(GRID, (1, 2), CONSTANTS)] * 3


def test_an_interpreted_kernel_is_called_each_time():
    launch = Launch(InterpretedFunction(_kernel), (1,), CONSTANTS)
    for value in (1.5, 2.5):
        x = torch.zeros(16)
        launch(x, None, (), 48, value)
        assert x.tolist() == [value] * 16
    assert launch._direct is None


def test_what_was_only_compiled_is_not_launched(fake, kernel, monkeypatch):
    run = JITFunction.run
    monkeypatch.setattr(Counted, "run", lambda *a, **o: run(*a, **{**o, "warmup": True}))
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*arguments())
    launch(*arguments())
    assert not fake.launcher_cls.calls


def test_another_triton_is_left_alone(fake, kernel, monkeypatch):
    monkeypatch.setattr(launching, "_IS_KNOWN", False)
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*arguments())
    launch(*arguments())
    assert kernel.runs == 2


def test_an_argument_left_out_is_tritons(fake):
    kernel = Counted(_with_default)
    launch = Launch(kernel, (1,), {})
    launch(torch.zeros(16), 48)
    launch(torch.zeros(16), 48)
    assert kernel.runs == 2


# Triton 3.7's own launcher above a C function that records.


class Annotation(NamedTuple):
    nested_tuple: Any
    type: int


@pytest.fixture
def c_fake(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake.launcher_cls = nvidia.CudaLauncher
    monkeypatch.setattr(nvidia, "PyKernelArg", Annotation)
    for number, name in enumerate(("ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE")):
        monkeypatch.setattr(nvidia, name, number)
    return fake


def parameters(annotations: Any, args: Any) -> list[Any]:
    """Return what the C launcher takes of the arguments (``extractArgs`` in driver.c)."""
    found: list[Any] = []
    for annotation, place in zip(annotations, range(len(annotations)), strict=True):
        if annotation.type == nvidia.ARG_TUPLE:
            found += parameters(annotation.nested_tuple, args[place])
        elif annotation.type == nvidia.ARG_KERNEL:
            found.append(args[place])
    return found


def _copy(x, y, pairs, size, BLOCK: tl.constexpr):
    y.store([0, 0], x.load([0, 0]))


@SINCE_3_7
def test_c_gets_the_same_parameters(c_fake):
    kernel = Counted(_kernel)
    launch = Launch(kernel, GRID, CONSTANTS)
    args = arguments()
    launch(*args)
    launch(*args)
    ordinary, direct = c_fake.launched
    assert kernel.runs == 1
    names = "x y z stream function coop pdl packed metadata enter leave scratch profile"
    without = [
        n for n, name in enumerate(names.split()) if name not in ("metadata", "enter", "leave")
    ]
    assert [ordinary[n] for n in without] == [direct[n] for n in without]
    *_, annotations, signature, given = direct
    assert (annotations, signature) == ordinary[-3:-1]
    flat = parameters(annotations, given)
    assert len(flat) == len(signature) == 6
    expected = parameters(annotations, ordinary[-1])
    assert all(a is b for a, b in zip(flat, expected, strict=True))


@SINCE_3_7
def test_a_tensor_map_is_made_once_for_an_address(c_fake):
    kernel = Counted(_copy)
    launch = Launch(kernel, GRID, {"BLOCK": 4})
    form = form_of(8, 8, (8, 1), [4, 4])
    xs, y = [torch.zeros(8, 8) for _ in range(2)], torch.zeros(8, 8)
    pairs = (Pair(torch.zeros(16), 32),)
    calls = [(describe(x, form), describe(y, form), pairs, 48) for x in (*xs, xs[0], xs[0], xs[1])]
    for call in calls:
        launch(*call)
    assert kernel.runs == 1
    ordinary = Launch(Counted(_copy), GRID, {"BLOCK": 4})
    count = len(c_fake.launched)
    # Triton's own first launch makes two; the three of other addresses follow.
    expected = [tensor.data_ptr() for tensor in (xs[0], y, y, xs[1], xs[0])]
    assert [args[0] for args in c_fake.maps] == expected
    for call in calls:
        ordinary._direct = None
        ordinary(*call)
    for direct, own in zip(c_fake.launched[:count], c_fake.launched[count:], strict=True):
        got = parameters(direct[-3], direct[-1])
        assert got == parameters(own[-3], own[-1])
        assert len(got) == len(direct[-2]) == 2 * 5 + 3
    bound = launching._MAX_MAPS
    for _ in range(bound + 5):
        launch(describe(torch.zeros(8, 8), form), *calls[0][1:])
    launch(*calls[0])
    assert c_fake.launched[-1][-1][0] == f"map of {xs[0].data_ptr()}"


@SINCE_3_7
def test_a_wrong_number_of_arguments_does_not_reach_c(c_fake, kernel):
    launch = Launch(kernel, GRID, CONSTANTS)
    launch(*arguments())
    with pytest.raises(TypeError, match="4 arguments, 5 expected"):
        launch(*arguments()[:-1])
    assert len(c_fake.launched) == 1
