"""A training step on a device other than the CPU that only computes shapes.

A tensor left on the CPU raises an error there, and so does anything that would wait for the device:
reading a tensor's value, or a shape that depends on one.
"""

import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("device_worker.py")


CASES = ["gpt2:8:lagrangian", "gpt2:3:every_size", "llama:8:every_size", "llama:3:lagrangian"]


def test_steps_stay_on_their_device_and_do_not_wait_for_it():
    """With and without micro-batches, in one process."""
    command = [sys.executable, "-W", "ignore", WORKER, *CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == CASES
