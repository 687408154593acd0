"""A training step on a device other than the CPU that only computes shapes.

A tensor left on the CPU raises an error there, and so does anything that would wait for the device:
reading a tensor's value, or a shape that depends on one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("device_worker.py")


@pytest.mark.parametrize(
    ("family", "micro_batch_size", "method"),
    [("gpt2", "8", "lagrangian"), ("gpt2", "3", "every_size"), ("llama", "8", "every_size"),
     ("llama", "3", "lagrangian")],
)  # fmt: skip
def test_a_step_stays_on_its_device_and_does_not_wait_for_it(family, micro_batch_size, method):
    command = [sys.executable, "-W", "ignore", WORKER, family, micro_batch_size, method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
