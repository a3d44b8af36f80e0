"""Photographs and captions as people have them: from phones, in subfolders, with kohya-style captions beside them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments, make_subject, run_cli
from PIL import Image

from zoodip import subject as subject_module
from zoodip.errors import InputError
from zoodip.subject import find_images, load_subject, open_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


@pytest.fixture
def without_heif(monkeypatch):
    """As on a machine without pillow-heif."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    subject_module.reads_heic.cache_clear()
    yield
    subject_module.reads_heic.cache_clear()


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def test_avif_is_read(tmp_path):
    image = smooth((32, 32))
    image.save(tmp_path / "a.avif", quality=95)
    assert find_images(tmp_path) == [tmp_path / "a.avif"]
    read = np.asarray(open_image(tmp_path / "a.avif"), dtype=int)
    assert np.abs(read - np.asarray(image, dtype=int)).mean() < 3  # of 255: what the compression loses


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    from pillow_heif import register_heif_opener

    register_heif_opener()
    subject_module.reads_heic.cache_clear()
    image = smooth((64, 64))
    for name in ("a.heic", "b.jpg"):  # iPhones' files are often renamed
        image.save(tmp_path / name, format="HEIF", quality=95)
    assert [path.name for path in find_images(tmp_path)] == ["a.heic", "b.jpg"]
    for path in find_images(tmp_path):
        assert np.abs(np.asarray(open_image(path), dtype=int) - np.asarray(image, dtype=int)).mean() < 3


def test_heic_is_told_by_content(tmp_path, capsys, without_heif):
    """The hint is given for HEIC content, whatever the file's name, and for nothing else."""
    smooth((8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(HEIC)
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert "pip install pillow-heif" in capsys.readouterr().err
    (tmp_path / "only").mkdir()
    (tmp_path / "b.heic").rename(tmp_path / "only" / "b.HEIC")
    with pytest.raises(InputError, match="no images in .*pip install pillow-heif"):
        find_images(tmp_path / "only")
    (tmp_path / "b.heic").write_bytes(b"no picture at all")
    find_images(tmp_path)
    assert "heif" not in capsys.readouterr().err
    (tmp_path / "c.jpg").write_bytes(HEIC)
    with pytest.raises(InputError, match=r"c\.jpg: is HEIC; run pip install pillow-heif"):
        open_image(tmp_path / "c.jpg")


def test_a_folder_of_folders_says_where_the_images_are(tmp_path):
    for name, count in (("sub", 5), ("more", 1), ("empty", 0)):
        make_subject(tmp_path / name, count)
    with pytest.raises(InputError, match=r"there are 1 in more/, there are 5 in sub/"):
        find_images(tmp_path)


def test_a_photograph_of_108_megapixels_warns_nothing(tmp_path):
    Image.new("L", (12032, 9024), 100).save(tmp_path / "a.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.jpg").size == (12032, 9024)


def test_squeezed_photographs_are_spoken_of_once(tmp_path, capsys):
    for i, size in enumerate([(32, 32), (36, 32), (64, 32), (30, 45)]):
        smooth(size).save(tmp_path / f"{i}.png")
    load_subject(tmp_path, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 of 4" in line and "2.00" in line and "2.png" in line and "--center_crop" in line
    load_subject(tmp_path, None, center_crop=True)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------- captions beside the images


def captioned(folder: Path, **texts: str) -> Path:
    """A subject with captions beside its pictures, and next to its folder a none.json, which has none."""
    make_subject(folder, 3)
    for name, text in texts.items():
        (folder / f"{name[1:]}.txt").write_text(text, encoding="utf-8")
    (folder.parent / "none.json").write_text("{}")
    return folder


def test_captions_beside_the_images(tmp_path, capsys):
    """One {} stays; otherwise it replaces the class word, once; --cc_file wins; captions are not reported as skipped files."""
    folder = captioned(tmp_path / "mine", _00="a photo of a {} on grass", _01="A Dog, beside\nanother dog\n", _02="left to cc")
    cc_file = tmp_path / "cc.json"
    cc_file.write_text('{"mine": {"02.png": "a {} in snow"}}')
    (folder / "02.txt").write_text("a dog from the text file")
    captions = load_subject(folder, cc_file, class_word="dog").captions
    assert captions == [["a photo of a {} on grass"], ["A {}, beside another dog"], ["a {} in snow"]]
    assert capsys.readouterr().err == ""
    cc_file.write_text("{}")
    assert load_subject(folder, cc_file, class_word="dog").captions[2] == ["a {} from the text file"]


@pytest.mark.parametrize("text", ["a hotdog on grass", "{} and {}", ""])
def test_a_caption_without_the_subject_is_refused(tmp_path, text):
    folder = captioned(tmp_path / "mine", _00=text, _01="a dog", _02="a dog")
    with pytest.raises(InputError, match=r"00\.txt must have the word 'dog' or one \{\}"):
        load_subject(folder, tmp_path / "none.json", class_word="dog")


def test_captions_that_say_left_or_right(tmp_path, capsys):
    """Half of the draws are mirrored: one line names the files and their words. 'leftover' and templates do not count."""
    folder = captioned(tmp_path / "mine", _00="a dog facing left", _01="To the RIGHT of a {}", _02="a {} with leftovers, upright")
    load_subject(folder, tmp_path / "none.json", class_word="dog")
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line and "00.png (left), 01.png (RIGHT);" in line and "02.png" not in line and "mirrored" in line
    load_subject(make_subject(tmp_path / "plain"), None)
    assert capsys.readouterr().err == ""


def test_training_with_captions_beside_the_images(tiny_model, tmp_path, capsys):
    folder = captioned(tmp_path / "mine", _00="a photo of a dog in snow", _01="a dog on grass", _02="a {} in white")
    flags = dict(use_cc=True, cc_file=tmp_path / "none.json", max_train_steps=1, eval_steps=0)
    assert run_cli(arguments(tiny_model, folder, tmp_path / "out", **flags)) == 0
    (folder / "01.txt").unlink()
    assert run_cli(arguments(tiny_model, folder, tmp_path / "out", **flags)) == 2
    assert "01.txt" in capsys.readouterr().err  # where a caption could be written
