"""The subject: its photographs and their captions, read and checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from zoodip.arguments import is_text
from zoodip.errors import InputError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # JPEG covers MPO. By content: EPS would go to Ghostscript
MAX_IMAGE_SIDE = 16384  # pixels; a header that promises more is refused before a byte of it is decoded
MAX_IMAGE_PIXELS = 128_000_000  # 0.4 GB as RGB; the largest ordinary photographs have 108 million

# The templates of the textual-inversion paper (Gal et al. 2022), used where no captions are given.
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


def find_images(folder: str | Path) -> list[Path]:
    """The image files of `folder` in name order; hidden, other and nested entries are skipped with one line.

    Raises InputError where the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"--train_data_dir: there is no folder {str(folder)!r}; give a folder of images (dataset/README.md "
            "says how to get the paper's)"
        )
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    images = [
        path for path in entries if path.is_file() and not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES
    ]
    skipped = [path.name for path in entries if path not in images]
    heic = any(name.lower().endswith((".heic", ".heif")) for name in skipped)
    hint = " (convert HEIC to JPEG to use it)" if heic else ""
    if skipped and images:
        print(
            f"{folder}: skipped {len(skipped)} that are not images: {', '.join(skipped[:5])}"
            f"{' ...' if len(skipped) > 5 else ''}{hint}",
            file=sys.stderr,
        )
    if not images:
        raise InputError(f"--train_data_dir: no images in {str(folder)!r}; put JPEG, PNG or WebP files there{hint}")
    return images


def open_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB: EXIF orientation applied, transparency on white, first frame of several.

    Raises InputError naming the file where it cannot be read or is absurdly large.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_IMAGE_SIDE or image.width * image.height > MAX_IMAGE_PIXELS:
                raise InputError(
                    f"{path}: {image.width} x {image.height} pixels is too large; make its longer side "
                    f"at most {MAX_IMAGE_SIDE} and the whole at most {MAX_IMAGE_PIXELS // 10**6} million pixels"
                )
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit greyscale: Pillow's convert() clips it
                values = np.asarray(image).astype(np.float64)
                if not np.isfinite(values).all():
                    raise ValueError("it holds NaN or Inf")
                scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
                image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # each decoder raises its own on a damaged file: struct.error, TypeError, MemoryError ...
        raise InputError(f"{path}: cannot be read as an image ({error}); remove it or save it anew") from error


def to_square(image: Image.Image, resolution: int, center_crop: bool) -> torch.Tensor:
    """RGB image -> [2, 3, resolution, resolution] in [-1, 1]: the picture and its mirror image."""
    if center_crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
    return torch.stack([pixels, pixels.flip(-1)])


def load_captions(cc_file: str | Path, folder: str | Path, images: list[Path]) -> list[str]:
    """The caption of each image from `cc_file`. Raises InputError that prints the JSON to add where one is missing."""
    name = Path(folder).resolve().name
    try:
        captions = json.loads(Path(cc_file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        captions = {}
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
        raise InputError(f"--cc_file {cc_file}: cannot be read as JSON ({error})") from error
    known = captions.get(name, {}) if isinstance(captions, dict) else {}
    known = known if isinstance(known, dict) else {}
    missing = [path.name for path in images if path.name not in known]
    if missing:
        example = json.dumps({name: {file: "a photo of {} ..." for file in missing}}, ensure_ascii=False)
        raise InputError(
            f"--use_cc: {cc_file} has no caption for {len(missing)} of the {len(images)} images of "
            f"{name!r}; add {example} with everything in each picture but the subject, or drop --use_cc"
        )
    for path in images:
        caption = known[path.name]
        if not isinstance(caption, str) or caption.count("{}") != 1 or not is_text(caption):
            example = json.dumps({name: {path.name: "a photo of {} ..."}}, ensure_ascii=False)
            raise InputError(
                f"--use_cc: the caption of {name}/{path.name} in {cc_file} must be a text with exactly "
                f"one {{}} for the subject, got {caption!r:.200}; write it like {example}"
            )
    return [known[path.name] for path in images]


@dataclass
class Subject:
    """What is known of the subject before any model is loaded."""

    paths: list[Path]
    captions: list[list[str]]  # per image, the texts (with one {}) to choose from
    fingerprint: str  # SHA-256 of pictures and captions


def load_subject(folder: str | Path, cc_file: str | Path | None, learnable_property: str = "object") -> Subject:
    """The images of `folder` with the captions of `cc_file`, or with the templates for an "object" or a "style".

    Raises InputError that names the file which cannot be used.
    """
    paths = find_images(folder)
    if cc_file is not None:
        captions = [[caption] for caption in load_captions(cc_file, folder, paths)]
    else:
        captions = [OBJECT_TEMPLATES if learnable_property == "object" else STYLE_TEMPLATES] * len(paths)
    digest = hashlib.sha256(json.dumps(captions).encode())
    for path in paths:  # decoded now to find a broken one early, and again when encoded: a photograph can be 100 MB
        digest.update(open_image(path).tobytes())
    return Subject(paths, captions, digest.hexdigest())
