"""The subject: its photographs and their captions, read and checked before a model is loaded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from zoodip.arguments import DEFAULT_CC_FILE, is_text
from zoodip.errors import InputError, notice

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
HEIC_SUFFIXES, HEIC_BRANDS = {".heic", ".heif", ".hif"}, (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # by content: EPS would go to Ghostscript. JPEG covers MPO
MAX_IMAGE_SIDE = 16384  # pixels; an image whose header says more is refused before anything is decoded
MAX_IMAGE_PIXELS = 128_000_000  # 0.4 GB as RGB; the largest ordinary photographs have 108 million
SQUEEZE = 1.2  # ratio of longer to shorter side from which squeezing a photograph into a square is reported

# The templates of the textual-inversion paper (Gal et al. 2022), used if no captions are given.
OBJECT_TEMPLATES = [
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
]  # fmt: skip
STYLE_TEMPLATES = [
    "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
    "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
    "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
    "a close-up painting in the style of {}", "a bright painting in the style of {}",
    "a cropped painting in the style of {}", "a good painting in the style of {}",
    "a close-up painting in the style of {}", "a rendition in the style of {}", "a nice painting in the style of {}",
    "a small painting in the style of {}", "a weird painting in the style of {}", "a large painting in the style of {}",
]  # fmt: skip


def find_images(folder: str | Path, flag: str = "train_data_dir") -> list[Path]:
    """The image files of `folder` in name order; hidden, nested and other entries are skipped with a one-line notice.

    Raises InputError if the folder is missing or holds no image.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"--{flag}: {str(folder)!r} is a file; give the folder that it is in")
    if not folder.is_dir():
        raise InputError(
            f"--{flag}: there is no folder {str(folder)!r}; give a folder of images (dataset/README.md "
            "says how to get the paper's)"
        )
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
        images = [path for path in entries if is_image_name(path)]
    except OSError as error:
        raise InputError(f"--{flag}: {str(folder)!r} cannot be read ({error.strerror}); change its permissions") from error
    captions = {path.with_suffix(".txt") for path in images}
    skipped = [path for path in entries if path not in images and path not in captions]
    heic = any(is_heic(path) for path in skipped)
    hint = " (HEIC is read once pillow-heif is installed: pip install pillow-heif)" if heic else ""
    if skipped and images:
        notice(
            f"{folder}: skipped {len(skipped)} that are not images: {', '.join(path.name for path in skipped[:5])}"
            f"{' ...' if len(skipped) > 5 else ''}{hint}"
        )
    if not images:
        counts = {path.name: count_images(path) for path in skipped if path.is_dir()}
        nested = ", ".join(f"there are {count} in {name}/" for name, count in counts.items() if count)
        remedy = f"{nested}: give that folder" if nested else f"put JPEG, PNG or WebP files there{hint}"
        raise InputError(f"--{flag}: no images in {str(folder)!r}; {remedy}")
    return images


def count_images(folder: Path) -> int:
    """The number of image files in a folder; 0 if it cannot be read."""
    try:
        return sum(map(is_image_name, folder.iterdir()))
    except OSError:
        return 0


def is_image_name(path: Path) -> bool:
    """Whether a path is a file that is not hidden and has the suffix of an image that can be read here."""
    known = path.suffix.lower() in (IMAGE_SUFFIXES | HEIC_SUFFIXES if reads_heic() else IMAGE_SUFFIXES)
    return known and not path.name.startswith(".") and path.is_file()


@cache
def reads_heic() -> bool:
    """Make Pillow read HEIC, the format of iPhones, if pillow-heif is installed -> whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_heic(path: Path) -> bool:
    """Whether a file is HEIC by its content; such files are often called .jpg."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:  # for example a folder
        return False
    return start[4:8] == b"ftyp" and b"avif" not in start and any(brand in start for brand in HEIC_BRANDS)


def open_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB: EXIF orientation applied, transparency on white, first frame if there are several.

    Raises an InputError that names the file if it cannot be read or is absurdly large.
    """
    try:
        formats = [*IMAGE_FORMATS, "HEIF"] if reads_heic() else IMAGE_FORMATS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limits are below
            opened = Image.open(path, formats=formats)
        with opened as image:
            if max(image.size) > MAX_IMAGE_SIDE or image.width * image.height > MAX_IMAGE_PIXELS:
                raise InputError(
                    f"{path}: {image.width} x {image.height} pixels is too large; make its longer side "
                    f"at most {MAX_IMAGE_SIDE} and its area at most {MAX_IMAGE_PIXELS // 10**6} million pixels"
                )
            profile = image.info.get("icc_profile")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit greyscale: Pillow's convert() clips it
                values = np.asarray(image).astype(np.float64)
                if not np.isfinite(values).all():
                    raise ValueError("it holds NaN or Inf")
                scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
                if image.mode == "F" and values.max() <= 2:  # of floats in [0, 1], which resampling may have thrown a little over
                    scale = 1 / 255
                image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return to_srgb(image.convert("RGB"), profile)
    except InputError:
        raise
    except Exception as error:  # each decoder raises its own types on a damaged file: struct.error, TypeError, MemoryError ...
        if is_heic(Path(path)) and not reads_heic():
            raise InputError(f"{path}: is HEIC; run pip install pillow-heif to read it, or save it as JPEG") from error
        raise InputError(f"{path}: cannot be read as an image ({error}); remove it or save it again") from error


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB image whose numbers are those of an ICC profile -> the same colours in sRGB, which the model was trained with.

    Without a profile, or with one that is damaged or of the CMYK that the image was before, the numbers stay. Photographs of
    phones are often in Display P3, whose numbers look dull if they are read as sRGB.
    """
    if not profile or profile[16:20] != b"RGB ":  # the header's field for the kind of colours
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(given).lower():
            return image  # a conversion would only round
        return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB")) or image
    except (ImageCms.PyCMSError, OSError):  # a damaged profile: most programs show such a picture without it
        return image


def to_square(image: Image.Image, resolution: int, center_crop: bool) -> torch.Tensor:
    """RGB image -> [2, 3, resolution, resolution] in [-1, 1]: the picture and its mirror image."""
    if center_crop:  # not ImageOps.fit, which lets pixels from outside the square into its edges
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
    return torch.stack([pixels, pixels.flip(-1)])


def load_captions(cc_file: str | Path, folder: str | Path, images: list[Path], class_word: str | None = None) -> list[str]:
    """The caption of each image, with one {}: from `cc_file`, or else from NAME.txt beside the image, where the class word may
    stand for {}. If one is missing, raises an InputError that prints the JSON to add."""
    name, place = Path(os.path.abspath(folder)).name, f"{cc_file} has"  # not resolve(): a link has the name that the user gave it
    try:
        captions = json.loads(Path(cc_file).read_text(encoding="utf-8-sig"))  # some Windows programs write a byte-order mark
    except FileNotFoundError:
        if str(cc_file) != DEFAULT_CC_FILE:
            raise InputError(f"--cc_file: there is no file {str(cc_file)!r}; give a JSON file of captions") from None
        captions, place = {}, f"there is no {cc_file} here, and there is"
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
        raise InputError(f"--cc_file {cc_file}: cannot be read as JSON ({error})") from error
    known = captions.get(name, captions.get(Path(folder).resolve().name, {})) if isinstance(captions, dict) else {}
    known = known if isinstance(known, dict) else {}
    known = {**text_captions([path for path in images if path.name not in known], class_word), **known}
    missing = [path.name for path in images if path.name not in known]
    if missing:
        example = json.dumps({name: {file: "a photo of {} ..." for file in missing}}, ensure_ascii=False)
        strange = sorted(known.keys() - {path.name for path in images})
        strange = f" (though one for {strange[0]!r}, which is not there)" if strange else ""
        raise InputError(
            f"--use_cc: {place} no caption for {len(missing)} of the {len(images)} images of {name!r}{strange}; add {example}, "
            f"describing everything in each picture but the subject, or write each caption to "
            f"{Path(missing[0]).with_suffix('.txt')} and so on, or give --no-use_cc"
        )
    for path in images:
        caption = known[path.name]
        if not isinstance(caption, str) or caption.count("{}") != 1 or not is_text(caption):
            example = json.dumps({name: {path.name: "a photo of {} ..."}}, ensure_ascii=False)
            raise InputError(
                f"--use_cc: the caption of {name}/{path.name} in {cc_file} must be text with exactly "
                f"one {{}} for the subject, got {caption!r:.200}; write it like {example}"
            )
    return [known[path.name] for path in images]


def text_captions(images: list[Path], class_word: str | None) -> dict[str, str]:
    """{file name: caption} from NAME.txt beside the images, as in kohya's scripts; {} replaces the class word if the text has
    no {}. Raises InputError if a text has neither."""
    captions = {}
    for path in images:
        file = path.with_suffix(".txt")
        if not file.is_file():
            continue
        try:
            caption = " ".join(file.read_text(encoding="utf-8-sig").split())
        except (OSError, ValueError) as error:
            raise InputError(f"--use_cc: {file}: cannot be read as UTF-8 text ({error})") from error
        if "{}" not in caption and class_word:
            caption = re.sub(rf"\b{re.escape(class_word)}\b", "{}", caption, count=1, flags=re.IGNORECASE)
        if caption.count("{}") != 1:
            wanted = f"the word {class_word!r} or one {{}}" if class_word else "one {}"
            raise InputError(f"--use_cc: {file} must have {wanted} in place of the subject, got {caption!r:.200}")
        captions[path.name] = caption
    return captions


def warn_of_sides(captions: dict[str, str], folder: str | Path) -> None:
    """Warn of captions {file name: text} that say left or right, because half of the draws mirror the photograph."""
    found = {name: re.findall(r"\b(left|right)\b", text, re.IGNORECASE) for name, text in captions.items()}
    named = [f"{name} ({words[0]})" for name, words in found.items() if words]
    if named:
        notice(
            f"{folder}: captions that say left or right: {', '.join(named[:5])}{' ...' if len(named) > 5 else ''}; half of the "
            "draws of a photograph are mirrored, so write 'to the side' or similar"
        )


@dataclass
class Subject:
    """What is known about the subject before any model is loaded."""

    paths: list[Path]
    captions: list[list[str]]  # per image, the texts (with one {}) to choose from
    fingerprint: str  # SHA-256 of pictures and captions


def load_subject(
    folder: str | Path,
    cc_file: str | Path | None,
    learnable_property: str = "object",
    class_word: str | None = None,
    center_crop: bool = False,
) -> Subject:
    """The images of `folder` with captions from `cc_file` or beside them, or with the templates for an "object" or a "style".

    Prints a notice about photographs that are far from square, and about captions that are false of a mirrored photograph.
    Raises an InputError that names the file at fault.
    """
    paths = find_images(folder)
    if cc_file is not None:
        captions = [[caption] for caption in load_captions(cc_file, folder, paths, class_word)]
        warn_of_sides({path.name: caption for path, (caption,) in zip(paths, captions, strict=True)}, folder)
    else:
        beside = sum(path.with_suffix(".txt").is_file() for path in paths)
        if beside:
            notice(f"{folder}: the {beside} captions beside the photographs have no effect without --use_cc")
        captions = [OBJECT_TEMPLATES if learnable_property == "object" else STYLE_TEMPLATES] * len(paths)
    digest = hashlib.sha256(json.dumps(captions).encode())
    squeezed = []
    for path in paths:  # decoded now to find broken files early, and again for encoding: a photograph can take 100 MB
        image = open_image(path)
        digest.update(image.tobytes())
        if max(image.size) >= SQUEEZE * min(image.size):
            squeezed.append((max(image.size) / min(image.size), path.name))
    if squeezed and not center_crop:
        notice(
            f"{folder}: {len(squeezed)} of {len(paths)} photographs are squeezed into a square, by up to {max(squeezed)[0]:.2f} "
            f"({max(squeezed)[1]}); --center_crop takes the middle square instead"
        )
    return Subject(paths, captions, digest.hexdigest())
