"""Which scheduler and how many steps to draw the miniature's pictures with: accuracy of every attribute against seconds.

    python -m miniature.schedulers                 # writes miniature/schedulers.json; about 12 minutes on one CPU core

Every setting draws the same descriptions, which word all attributes, from the same noise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler

from miniature.classifier import load_classifier
from miniature.measures import generate, judge
from miniature.prompts import whole_description_prompts
from zoodip.folder import model_digest
from zoodip.records import environment, table, write_between

HERE = Path(__file__).resolve().parent
SCHEDULERS = {
    "PNDM": PNDMScheduler,
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
SETTINGS = (
    "PNDM 25",
    "PNDM 30",
    "PNDM 40",
    "PNDM 50",
    "DDIM 25",
    "DPM-Solver++ 10",
    "DPM-Solver++ 15",
    "DPM-Solver++ 20",
    "UniPC 12",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="Stable Diffusion folder (default: miniature/model)")
    parser.add_argument("--images", type=int, default=200, help="descriptions for each setting (default: 200)")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale (default: 5)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="settings such as 'DDIM 25' (default: nine)")
    parser.add_argument("--output", type=Path, default=HERE / "schedulers.json", help="file (default: miniature/schedulers.json)")
    return parser.parse_args(argv)


def earlier_settings(path: Path, arguments: dict) -> dict:
    """What a record already holds for the same arguments, including the model; further settings are added to it."""
    record = json.loads(path.read_text()) if path.exists() else {}
    return record["settings"] if record.get("arguments") == arguments else {}


def main(args: argparse.Namespace) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    classifier, prompts = load_classifier(HERE / "classifier"), whole_description_prompts(args.images)
    config = pipeline.scheduler.config
    arguments = {"images": args.images, "guidance": args.guidance, "bf16": True, "model": model_digest(args.model, None)}
    results = earlier_settings(args.output, arguments)
    for setting in [setting for setting in args.settings if setting not in results]:
        name, steps = setting.split()
        pipeline.scheduler = SCHEDULERS[name].from_config(config)
        started = time.process_time()
        images = generate(pipeline, prompts, steps=int(steps), guidance=args.guidance, batch=40, label=setting, bf16=True)
        # CPU time: other programs on the machine do not count.
        results[setting] = judge(classifier, images, prompts) | {
            "cpu_seconds_a_picture": round((time.process_time() - started) / len(prompts), 3)
        }
        print(setting, json.dumps(results[setting]), flush=True)
        record = {"settings": results, "arguments": arguments, "environment": environment()}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    columns = [name for name in next(iter(results.values())) if name != "cpu_seconds_a_picture"]
    rows = [
        [setting, *(f"{100 * result[name]:.0f}" for name in columns), f"{result['cpu_seconds_a_picture']:.2f}"]
        for setting, result in results.items()
    ]
    columns = [name.replace("_", " ") for name in columns]
    print(text := table(["", *columns, "CPU s"], rows))
    if args.output.parent == HERE:
        write_between(HERE / "README.md", "schedulers", text + "\n")


if __name__ == "__main__":
    main(parse_args())
