"""Prior preservation: pictures of the class that the untuned model draws once, so that training on them keeps the class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from zoodip.errors import InputError
from zoodip.files import read_json, serialize, write_atomically, write_image, write_json
from zoodip.pictures import Drawer
from zoodip.subject import is_image_name

STEPS, GUIDANCE, SCHEDULER = 50, 7.5, "dpmsolver++"  # of a picture: more steps than a preview's, as training is on it


class PriorPictures:
    """Pictures of a class in a folder, drawn where there are too few of them, and their latents (DreamBooth, Sec. 4.2).

    made_by: {what: value} that the pictures depend on. Where some were drawn, class_pictures.json holds it and how they were
    drawn, and pictures of another model, prompt or number of steps are refused. Photographs of the user's are taken as they are.
    """

    def __init__(self, folder: Path, count: int, made_by: dict[str, str]):
        """Raises InputError where the folder's pictures are of another model."""
        self.folder, self.count = folder, count
        self.made_by = made_by | dict(steps=str(STEPS), guidance=str(GUIDANCE), scheduler=SCHEDULER)
        self.record, self.encoded = folder / "class_pictures.json", folder / "class_latents.safetensors"
        if self.record.is_file():
            record = read_json(self.record)
            different = [f"{name} was {record[name]!r}, is {value!r}" if name in record else f"{name} is not recorded"
                         for name, value in self.made_by.items() if record.get(name) != value]  # fmt: skip
            if different:
                raise InputError(f"--class_data_dir {str(folder)!r}: its pictures were drawn otherwise ({'; '.join(different)}); "
                                 "choose another folder, or remove this one")  # fmt: skip

    def paths(self) -> list[Path]:
        """The pictures there are, in name order, at most `count`."""
        return sorted((path for path in self.folder.glob("*") if is_image_name(path)), key=lambda path: path.name)[: self.count]

    def digest(self) -> str:
        """SHA-256 of the pictures there are."""
        digest = hashlib.sha256()
        for path in self.paths():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def missing(self) -> int:
        return self.count - len(self.paths())

    def draw(self, drawer: Drawer, states: torch.Tensor) -> None:
        """Draw the missing ones from `states` [2, L, d], of the class and the empty prompt. Stopped, it goes on next time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--class_data_dir {str(self.folder)!r} cannot be made ({error.strerror}); choose another"
            ) from error
        write_json(self.record, self.made_by, indent=2)
        names = [f"class-{i:04}.png" for i in range(self.count)]
        wanted = [i for i, name in enumerate(names) if not (self.folder / name).exists()][: self.missing()]
        pictures = drawer.draw_states(states, [(0, seed) for seed in wanted])
        for i, picture in zip(tqdm(wanted, desc="drawing the class", unit="picture"), pictures, strict=True):
            write_image(self.folder / names[i], picture)

    def latents(self, encode: Callable[[list[Path]], torch.Tensor]) -> torch.Tensor:
        """[M, 2, 2, 4, h, w] as `encode_images` makes them, kept beside the pictures."""
        paths = self.paths()
        key = json.dumps([self.made_by, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]])
        try:
            with safe_open(self.encoded, framework="pt") as handle:
                if (handle.metadata() or {}).get("key") == key:
                    return handle.get_tensor("latents").clone()
        except (SafetensorError, OSError):
            pass  # none yet, or not whole
        latents = encode(paths)
        write_atomically(self.encoded, serialize({"latents": latents}, {"format": "pt", "key": key}))
        return latents
