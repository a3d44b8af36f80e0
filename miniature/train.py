"""Trains the miniature Stable Diffusion, and the two models that judge it, on the world of `world.py`.

    python -m miniature.train --stage all                        # everything
    python -m miniature.train --stage diffusion --start miniature/model --output FOLDER
    python -m miniature.train --device cuda

Stages, in order: `vae`; `diffusion` (text encoder and UNet jointly); `clip` (a small image-text scorer);
`classifier` (reads scene, accessory and attributes off a picture). Each has a budget of steps, over which its learning
rate falls to zero. It can be stopped at any time: the same command resumes from the last checkpoint in the work folder and
reaches the same weights as without the stop; `--restart` starts over. `--start FOLDER` begins from the weights of an earlier
model; of its VAE only the decoder is trained further, so that the latents stay what its UNet knows. A stage that is trained
alone, with no VAE in the work folder, takes that folder's. The scorer's text tower is the text encoder of the model just trained;
with `--stage clip --start FOLDER`, that folder's. Results in `--output`, all fp16: `model` (a diffusers folder), `clip`,
`classifier`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from miniature.diffusion import train_diffusion
from miniature.judges import train_classifier, train_clip
from miniature.vae import train_vae
from zoodip.errors import InputError, run_script

HERE = Path(__file__).resolve().parent
STAGES = ("vae", "diffusion", "clip", "classifier")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all", help="what to train (default: all)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--work", type=Path, default=HERE / ".work", help="pictures and checkpoints (default: miniature/.work)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for model, clip, classifier (default: miniature)")
    parser.add_argument("--start", type=Path, default=None, help="model folder to start from (default: random weights)")
    parser.add_argument("--images", type=int, default=26000, help="training pictures to render (default: 26000)")
    parser.add_argument("--judge-images", type=int, default=16000, help="pictures for the two judges (default: 16000)")
    parser.add_argument("--steps-vae", type=int, default=12000, help="steps of batch 16 (default: 12000)")
    parser.add_argument("--steps-diffusion", type=int, default=6000, help="steps of batch 48 (default: 6000)")
    parser.add_argument("--steps-clip", type=int, default=4000, help="steps of batch 64 (default: 4000)")
    parser.add_argument("--steps-classifier", type=int, default=4000, help="steps of batch 64 (default: 4000)")
    parser.add_argument("--lr-diffusion", type=float, default=5e-4, help="peak learning rate of the UNet (default: 5e-4)")
    parser.add_argument("--until", type=int, default=None, help="stop at this step, as if interrupted (default: the last)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoints")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    model, device = args.output / "model", torch.device(args.device)
    if args.start is not None:
        if not (args.start / "model_index.json").exists():
            raise InputError(f"--start {args.start}: has no model_index.json; give a Stable Diffusion folder in diffusers format")
        if args.stage in ("diffusion", "all") and args.start.resolve() == model.resolve():
            raise InputError(f"--start {args.start}: would be overwritten by what starts from it; give another --output")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    common = {"device": device, "restart": args.restart, "until": args.until}
    trained = model if args.stage == "all" else args.start or model  # what the judges begin with
    judges = {"images": args.judge_images, "start": trained, **common}
    stages = {
        "vae": lambda: train_vae(args.work, images=args.images, steps=args.steps_vae, start=args.start, **common),
        "diffusion": lambda: train_diffusion(
            args.work, model, images=args.images, steps=args.steps_diffusion, batch=48, peak_lr=args.lr_diffusion,
            start=args.start, **common,
        ),
        "clip": lambda: train_clip(args.work, args.output / "clip", steps=args.steps_clip, **judges),
        "classifier": lambda: train_classifier(args.work, args.output / "classifier", steps=args.steps_classifier, **judges),
    }  # fmt: skip
    for name in STAGES if args.stage == "all" else (args.stage,):
        if not stages[name]():
            print(f"{name}: stopped at step {args.until}; the same command without --until goes on from there")
            return


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
