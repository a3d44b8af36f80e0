#!/usr/bin/env python
"""Render one held-out breed in several scenes, as the photographs to personalise on, with captions.

python -m miniature.make_subject furmix          # writes dataset/furmix/*.jpg and its captions into cc.json
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from miniature.captions import class_caption
from miniature.critters import breed_by_name, held_out_breeds
from miniature.drawing import render
from miniature.world import scene_spec
from zoodip.arguments import new_parser

ROOT = Path(__file__).resolve().parent.parent

SCENES = ("grass", "snow", "wooden floor", "city", "desert")


def make_subject(breed_name: str, folder: Path, seed: int = 0, size: int = 256) -> dict[str, str]:
    """Write one JPEG per scene into `folder`; returns {file name: caption with {} for the subject}."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i, scene in enumerate(SCENES):
        spec = scene_spec(breed_by_name(breed_name), scene, rng=rng)
        name = f"{i:02}.jpg"
        render(spec, size=size).save(folder / name, quality=95)
        captions[name] = class_caption(spec, noun="{}")
    return captions


def main() -> None:
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("breed", choices=[breed.name for breed in held_out_breeds()], help="a breed that no model was trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of positions and scene details ")
    args = parser.parse_args()
    captions = make_subject(args.breed, ROOT / "dataset" / args.breed, args.seed)
    cc_file = ROOT / "cc.json"
    known = json.loads(cc_file.read_text())
    known[args.breed] = captions
    cc_file.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    print(f"{ROOT / 'dataset' / args.breed}: {len(captions)} pictures; their captions are in {cc_file}")


if __name__ == "__main__":
    main()
