"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from zoodip.errors import InputError
from zoodip.files import write_atomically


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
