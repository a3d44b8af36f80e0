"""Images and captions as people have them."""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_subject
from PIL import Image, ImageCms

from zoodip.errors import InputError
from zoodip.prompts import build_prompts, load_tokenizer
from zoodip.subject import OBJECT_TEMPLATES, STYLE_TEMPLATES, find_images, load_captions, load_subject, open_image, to_square

# left to right, top to bottom: red, green / blue, white, each 4 x 2 pixels and so distinguishable in any orientation
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
UPRIGHT = Image.fromarray(COLOURS.repeat(2, 0).repeat(4, 1))  # 8 wide, 4 high


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(image: Image.Image, expected: Image.Image) -> int:
    assert image.mode == "RGB" and image.size == expected.size
    return np.abs(pixels(image) - pixels(expected)).max()


# --- open_image ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path, orientation, suffix):
    """Phones store pictures lying down; the token must not learn a sideways subject."""
    inverse = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = UPRIGHT.resize((80, 40), Image.Resampling.NEAREST)
    expected = stored
    if orientation in inverse:
        stored = stored.transpose(Image.Transpose[inverse[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": dict(quality=100, subsampling=0), "webp": dict(lossless=True)}.get(suffix, {})
    stored.save(tmp_path / f"x.{suffix}", exif=exif, **options)
    # JPEG: edges between saturated colours ring by some tens; a wrong orientation differs by 255
    assert difference(open_image(tmp_path / f"x.{suffix}"), expected) < (60 if suffix == "jpg" else 1)


def test_mpo_first_frame(tmp_path):
    """42 of the DreamBooth JPEG files are really MPO: two pictures in one file."""
    first, second = Image.new("RGB", (16, 8), (200, 30, 30)), Image.new("RGB", (16, 8), (0, 0, 255))
    first.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert difference(open_image(tmp_path / "x.jpg"), first) < 5  # a flat colour through JPEG


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """A picture whose left half is (almost) opaque red or grey and whose right half is transparent, and save options."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (0, 0, 4, 4))
    if mode in ("RGBA", "LA"):
        image = Image.new(mode[:-1], (8, 4), 100 if mode == "LA" else (255, 0, 0))
        image.putalpha(alpha)
        return image, {}
    if mode == "P":
        image = Image.new("P", (8, 4), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(1, (0, 0, 4, 4))
        return image, dict(transparency=0)
    image = Image.new(mode, (8, 4), 0 if mode == "L" else (0, 0, 0))  # colour-keyed
    image.paste(100 if mode == "L" else (255, 0, 0), (0, 0, 4, 4))
    return image, dict(transparency=0 if mode == "L" else (0, 0, 0))


def exchanged_primaries() -> bytes:
    """The ICC profile of a colour space whose red is sRGB's green, and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (profile.index(tag, 128) for tag in (b"rXYZ", b"gXYZ"))
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_colours_are_converted_to_srgb(tmp_path, suffix):
    """A phone's wide-gamut colours, read as they are, would be learned too dull."""
    options = {"jpg": dict(quality=100, subsampling=0), "webp": dict(lossless=True)}.get(suffix, {})
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    for profile, colour in (
        (exchanged_primaries(), (0, 255, 0)),
        (exchanged_primaries()[:200], (255, 0, 0)),
        (b"damaged", (255, 0, 0)),
        (None, (255, 0, 0)),
    ):
        red.save(tmp_path / f"x.{suffix}", icc_profile=profile, **options)
        assert difference(open_image(tmp_path / f"x.{suffix}"), Image.new("RGB", (16, 16), colour)) <= 4  # JPEG, rounding
    if suffix != "jpg":  # on a transparent ground, which becomes white
        cut_out = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        cut_out.paste((255, 0, 0, 255), (0, 0, 8, 16))
        cut_out.save(tmp_path / f"cut.{suffix}", icc_profile=exchanged_primaries(), **options)
        expected = Image.new("RGB", (16, 16), "white")
        expected.paste((0, 255, 0), (0, 0, 8, 16))
        assert difference(open_image(tmp_path / f"cut.{suffix}"), expected) <= 4
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    UPRIGHT.save(tmp_path / "x.png", icc_profile=srgb)
    assert difference(open_image(tmp_path / "x.png"), UPRIGHT) == 0


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("L", "png"), ("RGB", "png"),
                                              ("RGBA", "gif"), ("P", "gif"), ("RGBA", "webp")])  # fmt: skip
def test_transparency_becomes_white(tmp_path, mode, suffix):
    """Not black, and not the arbitrary colour stored under the transparent pixels."""
    image, options = transparent(mode)
    image.save(tmp_path / f"x.{suffix}", **options, **(dict(lossless=True) if suffix == "webp" else {}))
    expected = Image.new("RGB", (8, 4), "white")
    expected.paste((100,) * 3 if "L" in mode else (255, 0, 0), (0, 0, 4, 4))
    assert difference(open_image(tmp_path / f"x.{suffix}"), expected) == 0


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey(tmp_path, suffix):
    """Pillow's own conversion clips every value above 255 to white."""
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    opened = pixels(open_image(tmp_path / f"x.{suffix}"))
    assert np.abs(opened - (values / 257.0)[..., None]).max() <= 0.5  # 65535 / 257 = 255, rounded


def test_sixteen_bit_grey_in_the_dark(tmp_path):
    """A 16-bit picture with nothing above 255 of 65535 is black; it is not an 8-bit picture."""
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / "x.png")
    assert pixels(open_image(tmp_path / "x.png")).max() <= 1


@pytest.mark.parametrize(("mode", "suffix", "colour", "expected"), [
    ("L", "png", 77, (77,) * 3), ("L", "jpg", 77, (77,) * 3), ("1", "png", 1, (255,) * 3), ("1", "bmp", 0, (0,) * 3),
    ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)), ("CMYK", "tiff", (255, 0, 0, 0), (0, 255, 255)),
    ("RGB", "webp", (250, 128, 3), (250, 128, 3)), ("P", "gif", 3, None), ("RGB", "bmp", (1, 2, 3), (1, 2, 3)),
    ("YCbCr", "jpg", (76, 85, 255), (254, 0, 0)),
])  # fmt: skip
def test_modes(tmp_path, mode, suffix, colour, expected):
    """Every mode comes out as the RGB it shows."""
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette([9, 9, 9] * 3 + [10, 20, 30])
        expected = (10, 20, 30)
    image.save(tmp_path / f"x.{suffix}", **(dict(lossless=True) if suffix == "webp" else {}))
    # a flat colour through JPEG or the CMYK product
    assert difference(open_image(tmp_path / f"x.{suffix}"), Image.new("RGB", (16, 16), expected)) <= 3


@pytest.mark.parametrize("most", [1, 255, 65535, 1.02])
def test_floating_point_greys(tmp_path, most):
    """TIFF of floats come in the ranges [0, 1], [0, 255] and [0, 65535]; all show the same greys, an overshoot white."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(ramp * most).save(tmp_path / "x.tiff")
    shown = np.asarray(open_image(tmp_path / "x.tiff"), int)
    expected = np.arange(256) * (1.02 if most == 1.02 else 1)
    assert np.abs(shown - expected.clip(0, 255).reshape(16, 16, 1)).max() <= 1  # rounded once


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], duration=50)
    assert difference(open_image(tmp_path / f"x.{suffix}"), frames[0]) <= 5  # WebP is lossy


def test_one_pixel(tmp_path):
    """The smallest picture still becomes a training square."""
    Image.new("RGB", (1, 1), (255, 0, 127)).save(tmp_path / "x.png")
    for center_crop in (False, True):
        square = to_square(open_image(tmp_path / "x.png"), 16, center_crop)
        assert square.shape == (2, 3, 16, 16)
        expected = torch.tensor([1.0, -1.0, 127 / 127.5 - 1])[None, :, None, None].expand(2, 3, 16, 16)
        torch.testing.assert_close(square, expected, rtol=0, atol=1e-6)  # fp32


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"not an image", jpeg()[:-300], jpeg()[:100], jpeg()[:3],
                                     b"\x89PNG\r\n\x1a\n" + bytes(40)],
                         ids=["empty", "text", "truncated", "header-only", "magic-only", "zeros"])  # fmt: skip
def test_unreadable_image_is_named(tmp_path, content):
    """One line with the file's name, not Pillow's traceback."""
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"broken.jpg: cannot be read as an image .*remove it") as error:
        open_image(tmp_path / "broken.jpg")
    assert "\n" not in str(error.value)


def test_damaged_exif_is_no_traceback(tmp_path):
    """Metadata is often damaged by editors: such a file is read, or refused by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "description"
    whole, rng = exif.tobytes(), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(6, len(whole))] = rng.integers(256)
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about the damage
            UPRIGHT.save(buffer, "JPEG", exif=bytes(damaged[: rng.integers(7, len(whole) + 1)]))
            (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
            try:
                assert open_image(tmp_path / "x.jpg").mode == "RGB"
            except InputError as error:
                assert "x.jpg" in str(error)


@pytest.mark.parametrize("size", [(16385, 1), (1, 60000), (30000, 30000)])
def test_giant_header_is_refused_before_decoding(tmp_path, size):
    """A few bytes can promise gigabytes of pixels; this file has a header and no pixels at all."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))  # of the header chunk
    (tmp_path / "huge.png").write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"huge.png: .*(too large|exceeds)"):
        open_image(tmp_path / "huge.png")


# --- to_square ---


def test_square_without_crop_keeps_everything():
    """Without --center_crop the whole picture is squeezed into the square: all four corners are there."""
    square = to_square(UPRIGHT.resize((160, 80), Image.Resampling.NEAREST), 16, False)
    corners = square[0][:, [0, 0, -1, -1], [0, -1, 0, -1]].T
    assert torch.equal(corners, torch.from_numpy(COLOURS.reshape(4, 3) / 127.5 - 1).float())
    assert torch.equal(square[1], square[0].flip(-1))


@pytest.mark.parametrize("size", [(160, 80), (80, 160), (81, 160), (80, 80)])
def test_center_crop_takes_the_middle(size):
    """The middle square, undistorted."""
    wide, high = size
    image = Image.new("RGB", size, (255, 0, 0))
    side = min(size)
    left, top = (wide - side) // 2, (high - side) // 2
    image.paste((0, 0, 255), (left, top, left + side, top + side))
    assert torch.equal(to_square(image, 8, True)[0], torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 8, 8))
    assert wide == high or to_square(image, 8, False)[0, 0].max() > 0.9  # the margin is in the squeezed one


# --- find_images ---


def test_find_images(tmp_path, capsys):
    """Hidden files, texts and subfolders are skipped with one line; suffixes of any case count; order is by name."""
    folder = make_subject(tmp_path / "dog")
    (folder / "00.png").rename(folder / "Z.PNG")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "._01.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    (folder / "nested.jpg").mkdir()
    make_subject(folder / "more")
    expected = ["01.png", "02.png", "Z.PNG"]
    assert [path.name for path in find_images(folder)] == expected
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "skipped 5" in line and "notes.txt" in line and "HEIC" not in line
    assert [path.name for path in find_images(f"{folder}/")] == expected
    with pytest.raises(InputError, match="^--references: there is no folder 'nowhere'"):  # the flag that the user gave
        find_images("nowhere", "references")


# --- captions ---


def captions_case(tmp_path: Path, content) -> tuple[Path, Path, list[Path]]:
    folder = make_subject(tmp_path / "my dog", count=2)
    file = tmp_path / "captions.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file, folder, find_images(folder)


GOOD = {"00.png": "a photo of {} on grass", "01.png": "{} asleep"}


def test_captions_under_other_names_are_told(tmp_path):
    file, folder, images = captions_case(tmp_path, {"my dog": {"0.png": "a photo of {}"}})
    with pytest.raises(InputError, match="no caption for 2 of the 2 images .*though one for '0.png', which is not there"):
        load_captions(file, folder, images)


def test_captions_are_found(tmp_path):
    """By folder and file name, in the images' order, whatever the path looks like."""
    file, folder, images = captions_case(tmp_path, {"my dog": GOOD, "cat": {}})
    for path in (folder, f"{folder}/", f"{folder}/../my dog", folder / "."):
        assert load_captions(file, path, images) == list(GOOD.values())


@pytest.mark.parametrize(("content", "to_add"), [
    ({}, ["00.png", "01.png"]), ({"cat": GOOD}, ["00.png", "01.png"]), ([], ["00.png", "01.png"]),
    ({"my dog": []}, ["00.png", "01.png"]), ({"my dog": {"00.png": "{}"}}, ["01.png"]),
    ({"my dog": {**GOOD, "01.png": "no place"}}, ["01.png"]), ({"my dog": {**GOOD, "00.png": "{} and {}"}}, ["00.png"]),
    ({"my dog": {**GOOD, "00.png": None}}, ["00.png"]), ({"my dog": {**GOOD, "00.png": ["{}"]}}, ["00.png"]),
    ({"my dog": {**GOOD, "00.png": "{0}"}}, ["00.png"]),
])  # fmt: skip
def test_bad_captions_print_the_json_to_add(tmp_path, content, to_add):
    """The message holds JSON that, merged into the file, makes the run work."""
    file, folder, images = captions_case(tmp_path, content)
    with pytest.raises(InputError, match="captions.json") as error:
        load_captions(file, folder, images)
    message = str(error.value)
    assert "\n" not in message
    addition, _ = json.JSONDecoder().raw_decode(message[message.index('{"my dog"') :])
    assert sorted(addition["my dog"]) == to_add
    known = content.get("my dog", {}) if isinstance(content, dict) else {}
    file.write_text(json.dumps({"my dog": {**(known if isinstance(known, dict) else {}), **addition["my dog"]}}))
    assert len(load_captions(file, folder, images)) == 2


def test_caption_files_that_are_not_there(tmp_path, monkeypatch):
    """A file that was named must exist; without the default one, captions beside the pictures do."""
    file, folder, images = captions_case(tmp_path, {})
    with pytest.raises(InputError, match="--cc_file: there is no file 'typo.json'"):
        load_captions("typo.json", folder, images)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no cc.json here, and there is no caption for 2 of the 2 images"):
        load_captions("cc.json", folder, images)
    for image in images:
        image.with_suffix(".txt").write_text("a dog asleep")
    assert load_captions("cc.json", folder, images, "dog") == ["a {} asleep"] * 2


def test_captions_in_the_file_come_before_those_beside(tmp_path):
    """Tags for other programs, which name no subject, often lie beside photographs."""
    file, folder, images = captions_case(tmp_path, {"my dog": GOOD})
    for image in images:
        image.with_suffix(".txt").write_text("outdoors, grass")
    assert load_captions(file, folder, images, "dog") == list(GOOD.values())
    file.write_text(json.dumps({"my dog": {"00.png": GOOD["00.png"]}}))
    with pytest.raises(InputError, match="01.txt must have the word 'dog'"):
        load_captions(file, folder, images, "dog")


def test_a_caption_file_of_a_windows_program(tmp_path):
    file, folder, images = captions_case(tmp_path, {"my dog": GOOD})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte-order mark
    assert load_captions(file, folder, images) == list(GOOD.values())


def test_a_linked_folder_is_called_as_the_user_calls_it(tmp_path):
    file, folder, _ = captions_case(tmp_path, {"my link": GOOD})
    (tmp_path / "my link").symlink_to(folder)
    images = find_images(tmp_path / "my link")
    assert load_captions(file, tmp_path / "my link", images) == list(GOOD.values())
    file.write_text(json.dumps({folder.name: GOOD}))  # captions that were written before the link was made
    assert load_captions(file, tmp_path / "my link", images) == list(GOOD.values())


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """As root, tests can read every folder, so the system's refusal is simulated."""
    folder = make_subject(tmp_path / "dog")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="--train_data_dir: .*dog' cannot be read .Permission denied"):
        find_images(folder)


@pytest.mark.parametrize("content", ['{"my dog": ', "", b"\xff\xfe\x00".decode("latin-1")])
def test_broken_caption_file(tmp_path, content):
    """A forgotten comma is found by its line, not by a traceback."""
    file, folder, images = captions_case(tmp_path, content)
    with pytest.raises(InputError, match="captions.json: cannot be read as JSON") as error:
        load_captions(file, folder, images)
    assert "\n" not in str(error.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_captions(file, folder, images)


def test_braces_in_a_caption_stay_text(tmp_path, tiny_model):
    """str.format on text from a file could read attributes; only {} is replaced."""
    text = "{} by {0.__class__} {name} }{"
    file, folder, images = captions_case(tmp_path, {"my dog": {**GOOD, "00.png": text}})
    captions = load_captions(file, folder, images)
    assert captions[0] == text
    tokenizer = load_tokenizer(tiny_model, "<sks>", 1)
    prompts = build_prompts(tokenizer, tiny_model, None, captions, "<sks>", 1)
    expected = len(tokenizer(text.replace("{}", "<sks>")).input_ids)
    assert (prompts.ids[0] == len(prompts.rows)).sum() == 1  # one token, in the place of {}
    assert expected <= 77


def test_templates():
    """One {} in each, as the placeholder has to occur exactly once; the lists are those of textual inversion."""
    for templates, count, different in ((OBJECT_TEMPLATES, 27, 27), (STYLE_TEMPLATES, 19, 17)):  # two styles come twice
        assert (len(templates), len(set(templates))) == (count, different)
        assert all(text.count("{}") == 1 and text.count("{") == 1 and text == text.strip() for text in templates)
    assert all("style of {}" in text for text in STYLE_TEMPLATES)


def test_subject_fingerprint(tmp_path):
    """It must change with any pixel or caption, as a checkpoint continues only on the same data."""
    folder = make_subject(tmp_path / "dog")

    def fingerprint(learnable_property: str = "object") -> str:
        return load_subject(folder, None, learnable_property).fingerprint

    first = fingerprint()
    assert fingerprint() == first != fingerprint("style")
    image = Image.open(folder / "01.png").copy()
    image.putpixel((3, 3), tuple(255 - value for value in image.getpixel((3, 3))))
    image.save(folder / "01.png")
    assert fingerprint() != first


# --- the captions that come with the project ---

CLASSES = {
    "backpack": "backpack", "backpack_dog": "backpack", "bear_plushie": "stuffed animal", "berry_bowl": "bowl", "can": "can",
    "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock", "colorful_sneaker": "sneaker", "dog": "dog",
    "dog2": "dog", "dog3": "dog", "dog5": "dog", "dog6": "dog", "dog7": "dog", "dog8": "dog", "duck_toy": "toy",
    "fancy_boot": "boot", "grey_sloth_plushie": "stuffed animal", "monster_toy": "toy", "pink_sunglasses": "glasses",
    "poop_emoji": "toy", "rc_car": "toy", "red_cartoon": "cartoon", "robot_toy": "toy", "shiny_sneaker": "sneaker",
    "teapot": "teapot", "vase": "vase", "wolf_plushie": "stuffed animal",
}  # fmt: skip
COUNTS = {
    "duck_toy": 4,
    "red_cartoon": 4,
    **dict.fromkeys("backpack berry_bowl can clock dog2 dog3 fancy_boot pink_sunglasses shiny_sneaker vase".split(), 6),
}  # others: 5


def test_captions_of_dreambooth_are_complete():
    """All 30 subjects and 158 pictures of the paper's data set, by their file names."""
    captions = json.loads((ROOT / "cc.json").read_text(encoding="ascii"))
    assert set(CLASSES) <= set(captions) and len(set(captions) - set(CLASSES)) <= 1  # and the bundled subject
    for name in CLASSES:
        assert sorted(captions[name]) == [f"{i:02}.jpg" for i in range(COUNTS.get(name, 5))], name
    assert sum(len(captions[name]) for name in CLASSES) == 158


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_captions_of_dreambooth_have_the_form(name):
    """One {}, one line of ASCII, and no class word: {} takes the noun's place. No side, as half of the draws are mirrored,
    and no body part that only such a subject has."""
    for file, text in json.loads((ROOT / "cc.json").read_text())[name].items():
        assert text.count("{}") == 1 and text.count("{") == text.count("}") == 1, file
        assert text.isascii() and text.isprintable() and text == " ".join(text.split()), file
        assert not re.search(rf"\b({CLASSES[name]}(s|es)?|left|right|toes?|paws?|tongues?)\b", text, re.IGNORECASE), (file, text)
