"""That freed memory stays: counted in page faults, in a process of its own."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import sys

import torch

from vllm_afbs.tuning.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_large_tensor_that_follows_another_faults_in_no_pages() -> None:
    by_way = {
        way: int(subprocess.check_output([sys.executable, "-c", SCRIPT, way], text=True))
        for way in ("keep", "give back")
    }
    assert by_way["keep"] < 100 < by_way["give back"]
