"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from zoodip.errors import InputError
from zoodip.files import copy_folder, write_atomically


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EIO, "another folder")])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, number, remedy):
    """A full disk at step 20000 must not cost the checkpoint of step 19500."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=rf"x.safetensors: cannot be written \(.*\).*{remedy}"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_copy_of_a_read_only_folder_can_be_removed(tmp_path):
    """A model that many people share is often read-only; a temporary copy that is too would stay behind."""
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "vocab.json").write_text("{}")
    (source / "vocab.json").chmod(0o444)
    source.chmod(0o555)
    copy_folder(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "vocab.json").read_text() == "{}"
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "copy", tmp_path / "copy" / "vocab.json"))
    source.chmod(0o755)
