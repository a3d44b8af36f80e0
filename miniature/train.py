"""Trains the miniature Stable Diffusion, and the two models that judge it, on the world of `world.py`.

    python -m miniature.train                                    # everything: about 2 hours on 2 CPU cores
    python -m miniature.train --stage diffusion --minutes-diffusion 240
    python -m miniature.train --device cuda

Stages, in order: `vae`; `diffusion` (text encoder and UNet jointly); `clip` (a small image-text scorer);
`classifier` (reads scene, accessory and attributes off a picture). Each has a budget of minutes, over which
its learning rate falls to zero, so that it is really finished when the time is up. An interrupted stage
goes on from its last checkpoint under `miniature/.work/`; `--restart` begins it anew. Results:
`miniature/model` (a diffusers folder), `miniature/clip`, `miniature/classifier`, all weights fp16.
"""

from __future__ import annotations

import argparse

import torch

from miniature.diffusion import train_diffusion
from miniature.judges import train_classifier, train_clip
from miniature.rendering import WORK
from miniature.vae import train_vae

STAGES = ("vae", "diffusion", "clip", "classifier")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to train (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--images", type=int, default=40000, help="training pictures rendered (default: 40000)")
    parser.add_argument("--minutes-vae", type=float, default=31, help="minutes for the VAE (default: 31)")
    parser.add_argument("--minutes-diffusion", type=float, default=58, help="minutes for UNet and text (default: 58)")
    parser.add_argument("--minutes-clip", type=float, default=7, help="minutes for the scorer (default: 7)")
    parser.add_argument("--minutes-classifier", type=float, default=5, help="minutes for the classifier (default: 5)")
    parser.add_argument("--judge-images", type=int, default=16000, help="pictures for the two judges (default: 16000)")
    parser.add_argument("--batch-diffusion", type=int, default=48, help="batch of the UNet (default: 48)")
    parser.add_argument("--lr-diffusion", type=float, default=7e-4, help="peak learning rate of the UNet (default: 7e-4)")
    parser.add_argument("--max-steps", type=int, default=None, help="stop each stage after this many steps (a test)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of training (default: 0)")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoints")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    WORK.mkdir(exist_ok=True)
    stages = {
        "vae": train_vae,
        "diffusion": train_diffusion,
        "clip": train_clip,
        "classifier": train_classifier,
    }
    for name in STAGES if args.stage == "all" else (args.stage,):
        stages[name](args)


if __name__ == "__main__":
    main(parse_args())
