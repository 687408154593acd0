import re

import pytest
import torch
from safetensors import SafetensorError

from edgeprune.errors import CheckpointError
from edgeprune.training import checkpoint as module
from edgeprune.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)


@pytest.fixture
def folder(tmp_path):
    """A folder with checkpoints of steps 5 and 20."""
    for step in (5, 20):
        save_checkpoint(tmp_path / "checkpoints", make(step))
    return tmp_path / "checkpoints"


def make(step: int) -> Checkpoint:
    half = torch.tensor([0.5, -2.0], dtype=torch.bfloat16)
    return Checkpoint(step, {"edge": torch.full((4,), float(step)), "edge/step": torch.tensor(3.0),
                             "half": half})  # fmt: skip


def test_loading_returns_what_was_saved(folder):
    assert list_checkpoints(folder) == [5, 20]
    for loaded, step in ((load_latest(folder), 20), (load_checkpoint(folder, 5), 5)):
        assert loaded.step == step
        expected = make(step).state
        assert loaded.state.keys() == expected.keys()
        assert all(torch.equal(loaded.state[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match="available: 5, 20"):
        load_checkpoint(folder, 7)
    assert load_latest(folder / "elsewhere") is None


def flip_a_bit(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", flip_a_bit])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(folder, damage, caplog):
    path = checkpoint_path(folder, 20)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder, 20)
    assert load_latest(folder).step == 5
    assert path.name in caplog.text
    save_checkpoint(folder, make(20))  # training again replaces it
    assert load_latest(folder).step == 20


def test_a_renamed_checkpoint_is_refused(folder):
    checkpoint_path(folder, 20).rename(checkpoint_path(folder, 30))
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(folder, 30)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("IoError(...)")]
)
def test_a_failed_save_leaves_the_earlier_checkpoints(folder, monkeypatch, error):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(CheckpointError, match=re.escape(str(error))):
        save_checkpoint(folder, make(30))
    assert sorted(folder.iterdir()) == [checkpoint_path(folder, step) for step in (5, 20)]
    assert load_latest(folder).step == 20
