"""Prior preservation: pictures of the class, drawn once by the untuned model; training on them preserves the class."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from zoodip.errors import DamagedModel, InputError
from zoodip.files import digest_of, read_json, serialize, write_atomically, write_image, write_json
from zoodip.pictures import Drawer
from zoodip.subject import is_image_name

STEPS, GUIDANCE, SCHEDULER = 50, 7.5, "dpmsolver++"  # per picture: more steps than for a preview, because they are trained on


class PriorPictures:
    """Pictures of a class in a folder, drawn if there are too few of them, and their latents (DreamBooth, Sec. 4.2).

    made_by: {what: value} that the pictures depend on. If some were drawn, class_pictures.json holds it and how they were
    drawn, and pictures of another model, prompt or number of steps are refused. The user's own photographs are taken as they are.
    """

    def __init__(self, folder: Path, count: int, made_by: dict[str, str]):
        """Raises InputError if the folder's pictures were drawn differently."""
        self.folder, self.count = folder, count
        self.made_by = made_by | dict(steps=str(STEPS), guidance=str(GUIDANCE), scheduler=SCHEDULER)
        self.record, self.encoded = folder / "class_pictures.json", folder / "class_latents.safetensors"
        if self.record.is_file():
            try:
                record = read_json(self.record)
            except DamagedModel as error:  # which advises a download
                raise InputError(
                    f"{self.record}: is damaged, so that it is unknown how the pictures beside it were drawn; remove it and the "
                    "folder's class-*.png, or choose another --class_data_dir"
                ) from error
            different = [f"{name} was {record[name]!r}, is {value!r}" if name in record else f"{name} is not recorded"
                         for name, value in self.made_by.items() if record.get(name) != value]  # fmt: skip
            if different:
                raise InputError(
                    f"--class_data_dir {str(folder)!r}: its pictures were drawn differently ({'; '.join(different)}); choose "
                    f"another folder, or remove {self.record.name} and the class-*.png from it"
                )

    def paths(self) -> list[Path]:
        """The existing pictures, in name order, at most `count`."""
        return sorted((path for path in self.folder.glob("*") if is_image_name(path)), key=lambda path: path.name)[: self.count]

    def digest(self) -> str:
        """SHA-256 of the existing pictures."""
        return digest_of(self.paths())

    def missing(self) -> int:
        return self.count - len(self.paths())

    def draw(self, model, folder: Path, variant: str | None, quantization: str, resolution: int, states: torch.Tensor) -> None:
        """Draw missing pictures from `states` [2, L, d] of the class and the empty prompt. If stopped, the next run continues.

        The untuned `model` is that of the model folder, whose decoder is loaded in the bits of `quantization`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--class_data_dir {str(self.folder)!r} cannot be created ({error.strerror}); choose another"
            ) from error
        write_json(self.record, self.made_by, indent=2)
        names = [f"class-{i:04}.png" for i in range(self.count)]
        wanted = [i for i, name in enumerate(names) if not (self.folder / name).exists()][: self.missing()]
        drawer = Drawer(model, folder, variant, quantization, resolution, STEPS, GUIDANCE, scheduler=SCHEDULER)
        pictures = drawer.draw_states(states, [(0, seed) for seed in wanted])
        for i, picture in zip(tqdm(wanted, desc="drawing the class", unit="picture"), pictures, strict=True):
            write_image(self.folder / names[i], picture)

    def latents(self, encode: Callable[[list[Path]], torch.Tensor]) -> torch.Tensor:
        """Latents [M, 2, 2, 4, h, w] as `encode_images` makes them, cached beside the pictures."""
        paths = self.paths()
        key = json.dumps([self.made_by, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]])
        try:
            with safe_open(self.encoded, framework="pt") as handle:
                if (handle.metadata() or {}).get("key") == key:
                    return handle.get_tensor("latents").clone()
        except (SafetensorError, OSError):
            pass  # none yet, or incomplete
        latents = encode(paths)
        with suppress(InputError):  # it is only a cache, and the user's pictures may be in a read-only folder
            write_atomically(self.encoded, serialize({"latents": latents}, {"format": "pt", "key": key}))
        return latents
