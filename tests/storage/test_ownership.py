"""Only our own files are written, replaced, moved or removed; foreign files stay unchanged."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import snapshot

from deconvnet.storage import ownership
from deconvnet.storage.ownership import FolderLockedError, ForeignFileError


@pytest.fixture
def folder(tmp_path):
    return ownership.claim_folder(tmp_path / "results")


def test_a_file_of_ours_is_replaced_and_a_strangers_is_not(folder):
    ownership.write(folder / "a.png", b"one")
    ownership.write(folder / "a.png", b"two")
    assert (folder / "a.png").read_bytes() == b"two"
    (folder / "b.png").write_bytes(b"mine")
    before = snapshot(folder)
    with pytest.raises(ForeignFileError, match="b.png: already exists"):
        ownership.write(folder / "b.png", b"three")
    assert snapshot(folder) == before


def test_a_file_in_place_of_a_folder_is_named_and_stays(folder):
    (folder / "scan.png").write_bytes(b"mine")
    for place in ("scan.png", "scan.png/results"):
        with pytest.raises(ForeignFileError, match="must be a folder, but .*scan.png is a file"):
            ownership.claim_folder(folder / place)
    assert (folder / "scan.png").read_bytes() == b"mine"


def test_a_file_of_ours_that_somebody_has_edited_is_a_strangers(folder):
    path = folder / "a.png"
    ownership.write(path, b"one")
    path.write_bytes(b"edited")
    assert not ownership.is_ours(path)
    with pytest.raises(ForeignFileError):
        ownership.write(path, b"two")
    assert not ownership.remove(path)
    assert path.read_bytes() == b"edited"


def test_the_record_outlives_the_process_and_goes_with_the_folder(folder, tmp_path):
    ownership.write(folder / "in" / "a.png", b"one")
    ownership._signatures.clear()
    ownership._records.clear()
    assert ownership.is_ours(folder / "in" / "a.png")
    os.rename(folder, tmp_path / "moved")
    assert ownership.is_ours(tmp_path / "moved" / "in" / "a.png")
    assert ownership.own_files_in(tmp_path / "moved") == [tmp_path / "moved" / "in" / "a.png"]


@pytest.mark.parametrize("name", ["made", "lock", "writer", "pictures.lock", "pictures.writer"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_record_that_is_no_file_is_neither_followed_nor_waited_for(folder, tmp_path, name, kind):
    path, other = folder / ownership.RECORD_FOLDER / name, tmp_path / "thesis.txt"
    other.write_bytes(b"thesis")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    part = name.rpartition(".")[0]
    with pytest.raises(ForeignFileError, match=name), ownership.locked_folder(folder, part=part):
        pass
    if name == "made":
        with pytest.raises(ForeignFileError, match="made: is in the way"):
            ownership.write(folder / "a.png", b"picture")
    assert other.read_bytes() == b"thesis"


def test_a_folder_of_records_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ownership.RECORD_FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ForeignFileError, match=ownership.RECORD_FOLDER):
        ownership.write(tmp_path / "a.png", b"picture")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_record_of_nonsense_says_nothing(folder):
    record = folder / ownership.RECORD_FOLDER / ownership.RECORD_FILE
    record.write_text("[" * 100_000 + '\n["", "a\\u0000b"]\n[null, []]\n["", {}]\n[[], "a"]\n3\n')
    assert ownership.own_files_in(folder) == []
    os.truncate(record, ownership.MAX_RECORD + 1)
    with pytest.raises(ForeignFileError, match="too large for a record"):
        ownership.own_files_in(folder)


def test_the_record_of_somebody_elses_folder_above_is_not_needed(folder, monkeypatch):
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder / ownership.RECORD_FOLDER
    )
    path = folder / "mine" / "a.png"
    ownership.write(path, b"one")
    ownership.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert not (folder / ownership.RECORD_FOLDER / ownership.RECORD_FILE).exists()


def test_files_added_while_a_folder_is_rebuilt_are_not_replaced(folder):
    with ownership.rebuilt_folder(folder / "gallery") as new:
        fill(new, "index.html")
    with (
        pytest.raises(ForeignFileError, match="notes"),
        ownership.rebuilt_folder(folder / "gallery") as new,
    ):
        fill(new, "index.html")
        fill(folder / "gallery", "notes.txt")
    assert (folder / "gallery" / "notes.txt").exists()


def test_a_file_system_without_locks_stops_no_work(folder, monkeypatch, caplog):
    def refused(lock):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.filelock.FileLock, "acquire", refused)
    with ownership.locked_folder(folder):
        ownership.write(folder / "a.png", b"one")
    assert "has no locks" in caplog.text


@pytest.mark.parametrize("kind", ["link", "dangling", "looping", "folder", "pipe", "hard link"])
def test_foreign_files_are_neither_overwritten_nor_removed(folder, tmp_path, kind):
    path, other = folder / "a.png", tmp_path / "thesis.txt"
    other.write_bytes(b"thesis")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "looping":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.link(other, path)
    before = snapshot(tmp_path)
    with pytest.raises(ForeignFileError, match="a.png"):
        ownership.write(path, b"picture")
    assert not ownership.remove(path)
    with pytest.raises(ForeignFileError):
        ownership.check_writable(path)
    assert snapshot(tmp_path) == before


def test_a_link_in_the_place_of_a_file_of_ours_is_a_strangers(folder, tmp_path):
    path, other = folder / "a.png", tmp_path / "thesis.txt"
    ownership.write(path, b"one")
    other.write_bytes(b"one")
    path.unlink()
    path.symlink_to(other)
    with pytest.raises(ForeignFileError):
        ownership.write(path, b"two")
    assert not ownership.remove(path)
    assert other.read_bytes() == b"one"


def test_what_lies_behind_a_linked_folder_is_written_but_neither_removed_nor_moved(
    folder, tmp_path
):
    (tmp_path / "disk").mkdir()
    (folder / "pictures").symlink_to(tmp_path / "disk")
    path = folder / "pictures" / "a.png"
    ownership.write(path, b"one")
    ownership.write(path, b"two")
    assert (tmp_path / "disk" / "a.png").read_bytes() == b"two"
    assert not ownership.remove(path)
    assert not ownership.move(path, folder / "b.png")
    assert ownership.own_files_in(folder) == []
    ownership.prune(folder / "pictures")
    assert (tmp_path / "disk" / "a.png").exists()


def test_a_record_that_leads_out_of_its_folder_is_not_followed(folder, tmp_path):
    """A run folder may come from somebody else."""
    other = tmp_path / "thesis.txt"
    other.write_bytes(b"thesis")
    with open(folder / ownership.RECORD_FOLDER / ownership.RECORD_FILE, "a") as file:
        file.write(f'["", "../thesis.txt"]\n["", "{other}"]\n["", 3]\n[1, 2\nnothing\n')
    assert ownership.own_files_in(folder) == []
    with pytest.raises(ForeignFileError):
        ownership.write(other, b"picture")


def test_a_line_of_the_record_that_a_kill_cut_off_costs_nothing(folder):
    ownership.write(folder / "a.png", b"one")
    with open(folder / ownership.RECORD_FOLDER / ownership.RECORD_FILE, "ab") as file:
        file.write(b'["0123')
    ownership.write(folder / "b.png", b"two")
    ownership._records.clear()
    assert ownership.is_ours(folder / "a.png")
    assert ownership.is_ours(folder / "b.png")


def test_a_full_disk_leaves_the_old_file_no_temporary_one_and_an_error_with_the_path(
    folder, monkeypatch
):
    ownership.write(folder / "a.png", b"one")

    def full(path, data):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ownership, "_write_synced", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.png"):
        ownership.write(folder / "a.png", b"two")
    assert (folder / "a.png").read_bytes() == b"one"
    assert ownership.is_ours(folder / "a.png")
    assert list((folder / ownership.RECORD_FOLDER).glob("*.tmp")) == []


def test_a_log_grows_and_a_strangers_does_not(folder):
    ownership.append(folder / "metrics.jsonl", "1\n")
    ownership.append(folder / "metrics.jsonl", "2\n")
    assert (folder / "metrics.jsonl").read_text() == "1\n2\n"
    (folder / "train.log").write_text("mine\n")
    with pytest.raises(ForeignFileError, match="train.log"):
        ownership.append(folder / "train.log", "theirs\n")
    assert (folder / "train.log").read_text() == "mine\n"


def test_a_move_takes_the_record_along_and_covers_nothing(folder):
    ownership.write(folder / "a.png", b"one")
    old = ownership.claim_folder(folder / "previous-1")
    assert ownership.move(folder / "a.png", old / "a.png")
    assert ownership.is_ours(old / "a.png")
    ownership.write(folder / "a.png", b"two")
    with pytest.raises(ForeignFileError):
        ownership.move(folder / "a.png", old / "a.png")
    (folder / "mine.txt").write_text("mine")
    assert not ownership.move(folder / "mine.txt", old / "mine.txt")
    assert (folder / "mine.txt").exists()


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def test_a_folder_is_rebuilt_as_a_whole(folder):
    for names in (("index.html", "layers/1.png"), ("index.html", "layers/2.png")):
        with ownership.rebuilt_folder(folder / "gallery") as new:
            fill(new, *names)
    assert ownership.foreign_files_in(folder / "gallery") == []
    found = {path.name for path in (folder / "gallery").rglob("*") if path.is_file()}
    assert found == {"index.html", "2.png"}
    with pytest.raises(KeyError), ownership.rebuilt_folder(folder / "gallery") as new:
        fill(new, "index.html")
        raise KeyError
    assert (folder / "gallery" / "layers" / "2.png").exists()


@pytest.mark.parametrize("kind", ["file", "edited", "link", "deep", "is a file", "is a link"])
def test_a_folder_with_anything_of_a_strangers_is_not_rebuilt(folder, tmp_path, kind):
    gallery = folder / "gallery"
    if kind.startswith("is"):
        (tmp_path / "thesis").mkdir()
        fill(tmp_path / "thesis", "thesis.txt")
        gallery.symlink_to(tmp_path / "thesis") if "link" in kind else gallery.write_text("mine")
    else:
        with ownership.rebuilt_folder(gallery) as new:
            fill(new, "index.html", "layers/1.png")
        if kind == "link":
            (gallery / "mine").symlink_to(tmp_path)
        else:
            place = {"file": "notes.txt", "edited": "index.html", "deep": "layers/notes.txt"}[kind]
            (gallery / place).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ForeignFileError, match="gallery"), ownership.rebuilt_folder(gallery) as new:
        fill(new, "index.html")
    assert snapshot(tmp_path) == before


def test_a_kill_between_the_renamings_costs_no_folder(folder):
    with ownership.rebuilt_folder(folder / "gallery") as new:
        fill(new, "index.html")
    os.rename(folder / "gallery", folder / ownership.RECORD_FOLDER / "gallery.old")
    with pytest.raises(KeyError), ownership.rebuilt_folder(folder / "gallery"):
        raise KeyError
    assert (folder / "gallery" / "index.html").exists()


def test_an_input_is_not_written_over_by_whatever_path(tmp_path):
    photo = tmp_path / "a.png"
    photo.write_bytes(b"photo")
    (tmp_path / "link").symlink_to(tmp_path)
    os.link(photo, tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to(photo)
    paths = ("a.png", "link/a.png", "../" + tmp_path.name + "/a.png", "hard.png", "soft.png")
    for name in paths:
        with pytest.raises(ForeignFileError, match="is an input itself"):
            ownership.check_not_inputs([tmp_path / "new.png", tmp_path / name], [photo])
    ownership.check_not_inputs([tmp_path / "new.png"], [photo, tmp_path / "nothing.png"])


def test_one_process_has_the_lock(folder):
    code = (
        "import sys; from deconvnet.storage import ownership\n"
        f"with ownership.locked_folder({str(folder)!r}): print('in', flush=True); sys.stdin.read()"
    )
    left, new = (
        folder / ownership.RECORD_FOLDER / "7-7.tmp",
        folder / ownership.RECORD_FOLDER / "8-8.tmp",
    )
    for path in (left, new):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "in\n"
    # The new one may be what another command is writing in this moment.
    assert not left.exists() and new.exists()
    with (
        pytest.raises(FolderLockedError, match=f"process {other.pid} on .* is writing"),
        ownership.locked_folder(folder),
    ):
        pass
    other.kill()
    other.communicate()
    with ownership.locked_folder(folder):
        pass


def test_several_threads_write_side_by_side(folder):
    def work(n):
        for k in range(20):
            ownership.write(folder / f"{n}.png", f"{n} {k}".encode())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ownership._signatures.clear()
    ownership._records.clear()
    assert len(ownership.own_files_in(folder)) == 4


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            ownership.read_regular_file(path)
    with pytest.raises(OSError):
        ownership.read_regular_file(tmp_path)
