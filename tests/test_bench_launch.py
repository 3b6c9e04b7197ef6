"""What fastlora launches past Triton reaches the driver as what Triton launches, byte for byte.

``test_launch.py`` looks above Triton's C launcher and compiles nothing; here the kernels are
compiled for sm_90, and every parameter is compared behind that launcher, on a stub of libcuda.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import bench_launch
import fake_cuda
import pytest

KERNELS = {"shrink", "low_rank_gemm", "input_grad", "output_pass", "input_pass", "add_partials"}


@pytest.mark.skipif(fake_cuda.missing() is not None, reason=f"{fake_cuda.missing()}")
def test_every_kernel_is_launched_with_what_triton_launches_it_with(tmp_path):
    # In a process of its own: interpreted functions are not launched, and Triton has one driver.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, bench_launch.__file__, "--check"],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    same = [re.fullmatch(r"(\w+), \d: \d+ parameters, \d+ bytes the same", line) for line in lines]
    assert {match[1] for match in same if match} == KERNELS
    assert all(same), done.stdout
