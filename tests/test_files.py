"""Files and folders are replaced as a whole, or stay as they were."""

import pytest

from edgeprune.errors import ConfigError
from edgeprune.files import replace_folder, write_text

MARKER = ".made-by-report"


def contents(folder) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def build(folder, text: str) -> None:
    with replace_folder(folder, MARKER) as new:
        (new / "page").mkdir()
        (new / "page/a.txt").write_text(text)


@pytest.mark.parametrize("is_there", [False, True])
def test_an_absent_or_empty_folder_is_filled(tmp_path, is_there):
    folder = tmp_path / "out/report"
    if is_there:
        folder.mkdir(parents=True)
    build(folder, "new")
    assert contents(tmp_path).keys() == {f"out/report/{name}" for name in ("page/a.txt", MARKER)}


def test_an_earlier_result_is_replaced_as_a_whole(tmp_path):
    folder, link = tmp_path / "report", tmp_path / "link"
    build(folder, "old")
    (folder / "more.txt").write_text("of the old result")
    link.symlink_to(folder)
    build(link, "new")
    assert set(contents(folder)) == {"page/a.txt", MARKER}
    assert contents(folder)["page/a.txt"] == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"report", "link"}


def test_other_folders_and_files_are_refused_untouched(tmp_path):
    folder, file = tmp_path / "mine", tmp_path / "file"
    folder.mkdir()
    for path in (folder / "notes.txt", file):
        path.write_text("mine")
    for path in (folder, file):
        with pytest.raises(ConfigError, match="output="):
            build(path, "new")
    assert contents(tmp_path) == {"mine/notes.txt": "mine", "file": "mine"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path, error):
    folder = tmp_path / "report"
    build(folder, "old")
    before = contents(tmp_path)
    with pytest.raises(error), replace_folder(folder, MARKER) as new:
        (new / "half.txt").write_text("half")
        raise error
    assert contents(tmp_path) == before
    with pytest.raises(error), replace_folder(tmp_path / "absent", MARKER):
        raise error
    assert not (tmp_path / "absent").exists()


def test_a_link_to_a_file_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("target.txt")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"


def test_folders_devices_and_paths_below_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file/below.txt"):
        with pytest.raises(OSError, match=str(path)):
            write_text(path, "new")
    with pytest.raises(OSError, match="/dev/null"):
        write_text(type(tmp_path)("/dev/null"), "new")
    assert contents(tmp_path) == {"file": "mine"}
