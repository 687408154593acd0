"""A training step on a device that is not the processor, of which only shapes are computed.

There a tensor left on the processor is an error, and so is whatever has to wait for the device: the
value of a tensor, or a shape that depends on one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("device_worker.py")


@pytest.mark.parametrize("micro_batch_size", ["8", "3"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_stays_on_its_device_and_does_not_wait_for_it(family, micro_batch_size):
    command = [sys.executable, "-W", "ignore", WORKER, family, micro_batch_size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
