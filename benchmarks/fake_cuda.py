"""Triton's NVIDIA driver on a machine without a GPU: a libcuda whose calls succeed and do nothing.

What Triton does on the host for a launch is Python and C of its own, and a machine without a GPU
runs neither: its driver does not load. On this stub they run unchanged, the C compiled as on a GPU
host, so that they can be timed, and what reaches ``cuLaunchKernelEx`` compared.

Faked: libcuda, the current device and stream, and the device's limits, an H100's. A pointer's
attribute is the pointer, so that tensors of the CPU are good arguments.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

STREAM = 4711  # not the default one: a path that forgets the stream is seen

_SOURCE = r"""
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned sizes[7]; /* grid, block, shared memory */
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

char fake_record[1 << 16];
int fake_bytes, fake_launches, fake_count, fake_sizes[1024]; /* the last two: of the parameters */

static char *append(char *end, const void *from, size_t size) {
  memcpy(end, from, size);
  return end + size;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  fake_launches++;
  if (fake_count) {
    char *end = append(fake_record, config->sizes, sizeof config->sizes);
    end = append(end, &config->stream, sizeof config->stream);
    end = append(end, &config->attribute_count, sizeof config->attribute_count);
    end = append(end, &function, sizeof function);
    for (int i = 0; i < fake_count; i++) end = append(end, parameters[i], fake_sizes[i]);
    fake_bytes = end - fake_record;
  }
  return 0;
}

/* A map that tells addresses and forms apart, in the 128 bytes of a real one. */
int cuTensorMapEncodeTiled(uint64_t *map, int type, unsigned rank, void *address,
                           const uint64_t *sizes, const uint64_t *strides, const unsigned *box,
                           const unsigned *steps, int interleave, int swizzle, int l2, int fill) {
  uint64_t words[16] = {(uint64_t)address, type, rank, interleave, swizzle, l2, fill};
  for (unsigned i = 0; i < rank; i++) {
    words[7] = words[7] * 1000003 + sizes[i];
    words[8] = words[8] * 1000003 + (i + 1 < rank ? strides[i] : 0);
    words[9] = words[9] * 1000003 + box[i];
  }
  memcpy(map, words, sizeof words);
  return 0;
}

/* Every kernel is a function of its own. */
static uintptr_t handles = 4096;
int cuModuleLoadData(void **module, const void *image) {
  *module = (void *)(handles += 16);
  return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)(handles += 16);
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;      /* threads of a warp */
    case 16: *value = 132; break;     /* multiprocessors */
    case 81: *value = 233472; break;  /* shared memory of one */
    case 97: *value = 232448; break;  /* and of one block */
    default: *value = 65536;
  }
  return 0;
}

int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) {
  *data = pointer;
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* 0: the most threads of a block */
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuTensorMapEncodeIm2col() { return 0; }
int cuOccupancyMaxActiveClusters() { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the stub fails nothing"; return 0; }
"""


def compiler() -> str | None:
    """Return the C compiler that Triton would take, if there is one."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def missing() -> str | None:
    """Return what the machine lacks to build the stub and Triton's driver, or ``None``."""
    if compiler() is None:
        return "no C compiler: install gcc, or name another in CC"
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    return None if header.exists() else f"no {header}: install Python's headers"


class FakeDriver(CudaDriver):
    """Triton's driver for one sm_90 device, on the stub."""

    def __init__(self) -> None:
        # Until Triton 3.6 the folder is searched again for every new launcher: it lives on.
        self.folder = tempfile.TemporaryDirectory(prefix="fake-cuda-")
        self._stub = _load(Path(self.folder.name))
        super().__init__()
        self.get_current_device = _current_device
        self.get_current_stream = _current_stream

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return GPUTarget("cuda", 90, 32)

    def launched(self, call: Callable[[], Any], sizes: Sequence[int]) -> bytes:
        """Return what the one launch of a call hands to libcuda.

        That is the grid, block, shared memory and stream, the function, and every parameter.

        Args:
            call: launches once.
            sizes: bytes of each parameter.

        Raises:
            RuntimeError: there were more launches than one, or none.
        """
        names = ("fake_launches", "fake_count", "fake_bytes")
        launches, count, length = (ctypes.c_int.in_dll(self._stub, name) for name in names)
        (ctypes.c_int * 1024).in_dll(self._stub, "fake_sizes")[: len(sizes)] = sizes
        before, count.value = launches.value, len(sizes)
        try:
            call()
        finally:
            count.value = 0
        if launches.value != before + 1:
            raise RuntimeError(f"{launches.value - before} launches reached the stub, 1 expected")
        return (ctypes.c_char * length.value).in_dll(self._stub, "fake_record").raw


def install() -> FakeDriver:
    """Make the driver Triton's active one, for the rest of the process.

    Raises:
        RuntimeError: the machine lacks what it takes to build it; the message says what.
    """
    if (lack := missing()) is not None:
        raise RuntimeError(lack)
    fake = FakeDriver()
    driver.set_active(fake)
    return fake


def _load(folder: Path) -> ctypes.CDLL:
    """Build the stub, load it under libcuda's name, and tell Triton where to link against it."""
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text(_SOURCE)
    options = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run([str(compiler()), *options, "-o", library, source], check=True)
    (folder / "libcuda.so").symlink_to(library)  # what Triton links against until 3.5
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Its name is taken before Triton's module asks for it: a real libcuda is not loaded.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _current_device() -> int:
    return 0


def _current_stream(device: int) -> int:
    return STREAM
