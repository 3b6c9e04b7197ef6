"""A launch that is prepared once for a shape: everything is fixed but the tensors of a call.

Triton finds the compiled kernel anew at every launch, from the dtypes, divisors and Nones of all
its arguments: of a launch's 12 to 40 us of host time, 1 to 3 are the C launcher's (Triton 3.7.1).
Here it is found once, and a launch takes 2 to 5 (``benchmarks/bench_launch.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# In these, ``JITFunction.run`` hands the same arguments to the same launcher; it is no public
# interface, so that any other version is launched the ordinary way.
_KNOWN_VERSIONS = ("3.4", "3.5", "3.6", "3.7")
_IS_KNOWN = ".".join(triton.__version__.split(".")[:2]) in _KNOWN_VERSIONS
# The C function below that launcher was read and tried in this one alone.
_HAS_C_LAUNCH = triton.__version__ == "3.7.1"

_MAX_MAPS = 64  # kept of one operand: PyTorch's allocator hands out the same few addresses


class Launch:
    """One kernel with its grid and compile-time arguments, for arguments of one specialisation.

    Whoever owns it sees to it that no call differs from the first in anything that Triton compiles
    for: device, dtypes, integers (but those that the kernel does not specialise), what is None, and
    which pointers are multiples of 16; nor in strides or sizes of what a descriptor describes. The
    first call is Triton's own; later ones launch what it compiled, unless Triton would do more than
    launch (``_watched``). The compile-time arguments are the kernel's last.
    """

    __slots__ = ("_constants", "_direct", "_grid", "_kernel")

    # Whether later calls may go past Triton: ``plans.check_device`` found them wrong if not.
    may_be_direct = True

    def __init__(self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any]) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._direct: Callable[[tuple[Any, ...]], bool] | None = None

    def __call__(self, *args: Any) -> None:
        """Launch it on the current stream of the current device."""
        direct = self._direct
        if direct is None or not direct(args):
            compiled = self._kernel[self._grid](*args, **self._constants)
            may = self.may_be_direct and direct is None and _IS_KNOWN
            if may and isinstance(compiled, CompiledKernel):
                self._prepare(compiled, len(args))

    def _prepare(self, compiled: Any, given: int) -> None:
        """Keep the launch of a compiled kernel, if it is not for Triton alone to do.

        The launch returns whether it took place: not while somebody watches, nor on another device,
        which has a compiled kernel of its own.
        """
        kernel, constants = self._kernel, self._constants
        # An autotuner is no JITFunction; a kernel without a module was compiled, never launched.
        if not isinstance(kernel, JITFunction) or compiled.module is None or _watched(kernel):
            return
        names = kernel.arg_names[given:]
        if not all(name in constants for name in names):  # an argument has a default
            return
        # What is compiled in keeps its place among the arguments, and is not looked at.
        rest = tuple([constants[name] for name in names])
        x, y, z = (*self._grid, 1, 1)[:3]
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        device_of, stream_of = driver.active.get_current_device, driver.active.get_current_stream
        device = device_of()
        c_launch = _c_launch(compiled, given)

        def direct(args: tuple[Any, ...]) -> bool:
            if _watched(kernel) or device_of() != device:
                return False
            stream = stream_of(device)
            if c_launch is None:
                run(x, y, z, stream, function, packed, None, None, None, *args, *rest)
            else:
                c_launch(x, y, z, stream, args)
            return True

        self._direct = direct


def _watched(kernel: Any) -> bool:
    """Return whether a launch is more than that: a profiler's, a debugger's or a hook's.

    What is compiled meanwhile may be instrumented, and no good afterwards.
    """
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(  # since 3.5 a hook is a chain of them, which may be empty
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def _c_launch(compiled: Any, given: int) -> Callable[..., None] | None:
    """Return what Triton 3.7 does in Python around its C launcher for NVIDIA, done once.

    That is 1 us of each launch, and 1 us for each descriptor. A tensor map is a function of the
    address alone, since everything else that it says is fixed: it is made once for an address, and
    is right for whatever lies there later. Arguments behind the given ones are compiled in: C does
    not look for them.
    """
    run = compiled.run
    if not _HAS_C_LAUNCH or type(run).__module__ != "triton.backends.nvidia.driver":
        return None
    if run.global_scratch_size or run.profile_scratch_size:  # allocated for each launch
        return None
    types = list(compiled.src.signature.values())
    places = [i for i, ty in enumerate(types) if isinstance(ty, str) and ty[:10] == "tensordesc"]
    forms = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    if len(forms) != len(places) or None in forms:  # passed as pointers, strides and sizes
        return None
    # From the last one on, since each makes the list of arguments longer.
    maps: list[dict[int, list[Any]]] = [{} for _ in places]
    descriptors = list(zip(places, forms, maps, strict=True))[::-1]
    launch = driver.active.utils.launch
    expand = sys.modules[type(run).__module__].make_tensordesc_arg
    fixed = (run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata)
    fixed += (None, None, None, None, None, run.arg_annotations, run.kernel_signature)
    function = compiled.function

    def c_launch(x: int, y: int, z: int, stream: int, args: Sequence[Any]) -> None:
        if len(args) != given:  # C would read past the end
            raise TypeError(f"{len(args)} arguments, {given} expected")
        if descriptors:
            args = list(args)
            for i, form, made in descriptors:
                address = args[i].base.data_ptr()
                if (parts := made.get(address)) is None:
                    if len(made) >= _MAX_MAPS:
                        made.clear()
                    parts = made[address] = expand(args[i], form)
                args[i : i + 1] = parts
        launch(x, y, z, stream, function, *fixed, args)

    return c_launch


def describe(tensor: Tensor, form: dict[str, Any]) -> TensorDescriptor:
    """Return a descriptor of a tensor in a form that ``form_of`` made.

    Without the checks of ``TensorDescriptor``, which take 1.5 us of the host's time each where a
    forward has three; ``has_aligned_rows`` has made them.
    """
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.__dict__.update(form)
    descriptor.base = tensor
    return descriptor


def form_of(rows: int, columns: int, strides: Sequence[int], tile: list[int]) -> dict[str, Any]:
    """Return all of a descriptor but its tensor."""
    return {
        "shape": [rows, columns],
        "strides": list(strides),
        "block_shape": tile,
        "padding": "zero",
        "round_f32_to_tf32": False,
    }
