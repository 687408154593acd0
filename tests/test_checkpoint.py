import pytest
import torch
from safetensors import SafetensorError

from edgeprune.errors import CheckpointError
from edgeprune.training import checkpoint as module
from edgeprune.training.checkpoint import (
    Checkpoint,
    checkpoint_dir,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    save_checkpoint,
)


def make(step: int) -> Checkpoint:
    return Checkpoint(step, {"edge_log_alpha": torch.full((4,), float(step))}, {"a": torch.ones(2)})


def test_what_was_saved_is_loaded(tmp_path):
    for step in (5, 20):
        save_checkpoint(tmp_path, make(step))
    assert list_checkpoints(tmp_path) == [5, 20]
    loaded, damaged = load_latest(tmp_path)
    assert (loaded.step, damaged) == (20, [])
    assert loaded.masks["edge_log_alpha"].tolist() == [20] * 4
    assert loaded.optimizer["a"].tolist() == [1, 1]
    assert load_checkpoint(tmp_path, 5).step == 5
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it has: 5, 20"):
        load_checkpoint(tmp_path, 7)
    assert load_latest(tmp_path / "elsewhere") == (None, [])


@pytest.mark.parametrize("name", [module.MASKS, module.OPTIMIZER, module.CHECKPOINT_NOTE])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path, name, damage):
    for step in (5, 20):
        save_checkpoint(tmp_path, make(step))
    path = checkpoint_dir(tmp_path, 20) / name
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -9 if damage == "truncate" else 0])
    with pytest.raises(CheckpointError, match="step-00000020 is damaged"):
        load_checkpoint(tmp_path, 20)
    loaded, damaged = load_latest(tmp_path)
    assert loaded.step == 5
    assert len(damaged) == 1
    save_checkpoint(tmp_path, make(20))  # training again replaces it
    assert load_latest(tmp_path)[0].step == 20


def test_a_flipped_bit_is_noticed(tmp_path):
    save_checkpoint(tmp_path, make(5))
    path = checkpoint_dir(tmp_path, 5) / module.MASKS
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="was altered or cut"):
        load_checkpoint(tmp_path, 5)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, make(5))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Earlier checkpoints are intact"):
        save_checkpoint(tmp_path, make(20))
    assert list_checkpoints(tmp_path) == [5]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert load_latest(tmp_path)[0].step == 5


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(122, "Disk quota exceeded"), "free some space"),
        (SafetensorError("IoError(Os { ... }) No space left on device (os error 28)"), "free some"),
        (OSError(30, "Read-only file system"), "mend that and start again"),
        (SafetensorError("I/O error: File too large (os error 27)"), "mend that and start again"),
    ],
)
def test_space_is_asked_for_where_there_is_none(tmp_path, monkeypatch, error, wanted):
    def fail(tensors, path):
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(CheckpointError, match=wanted):
        save_checkpoint(tmp_path, make(20))


def test_what_a_crash_left_half_written_is_no_checkpoint_and_is_cleared(tmp_path):
    save_checkpoint(tmp_path, make(5))
    leftover = tmp_path / "checkpoints" / ".step-00000020.123.tmp"
    leftover.mkdir()
    assert list_checkpoints(tmp_path) == [5]
    save_checkpoint(tmp_path, make(20))
    assert not leftover.exists()
