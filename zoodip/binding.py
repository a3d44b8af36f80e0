"""Draw prompts in which every creature keeps its own attributes, with a frozen Stable Diffusion 1.x or 2.x.

    python -m zoodip.binding --model miniature/model --embedding results/demo/learned_embeds.safetensors \\
        --prompt "a [<sks>* wearing a red hat] and a [blue critter* wearing pink glasses] on the beach" --method phrase \\
        --width 128 --height 64 --seeds 0 1 --output results/binding

`phrase` is our own and needs forward passes only. `merge` and `full` are token merging, ToMe (Hu et al., NeurIPS 2024, arXiv
2411.07132), made for SDXL and adapted here; `published` follows its code as it stands, and `control` uses only its losses on
the latents. docs/binding.md describes each method and what has been measured. (Unrelated: ToMe by Bolya et al., for speed.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from zoodip.arguments import new_parser, parse, require
from zoodip.binding_settings import METHODS, PLAIN, Settings, check_settings
from zoodip.errors import InputError, notice, prepare_process, run_script
from zoodip.marks import MarkedPrompt, parse_marks
from zoodip.parsing import mark_prompt

# ----------------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Draw prompts whose creatures keep their own attributes.")
    add = parser.add_argument
    add("--model", required=True, help="Stable Diffusion 1.x or 2.x: folder in diffusers format, or hub name")
    add("--embedding", type=Path, nargs="*", default=[], help="learned_embeds.safetensors of each learned word")
    add("--prompt", nargs="+", required=True, help="prompts with [groups], and a * after each group's noun")
    add("--parse", default=None, choices=["spacy"], help="parser that marks the groups in prompts without marks; needs spaCy")
    add("--clean_prompt", nargs="+", default=None, help="for each prompt, text for its end tokens; default: groups' nouns only")
    add("--negative_prompt", default="", help="text that guidance steers away from")
    add("--method", nargs="+", default=["phrase"], choices=list(METHODS), help="one or more, to compare; see docs/binding.md")
    add("--quantization", default=None, choices=["nf4", "int8", "none"],
        help="storage of the model's weights; default: none, or as --save_quantized packed them")  # fmt: skip
    add("--width", type=int, default=None, help="width of the picture in pixels; default: the model's own")
    add("--height", type=int, default=None, help="height of the picture in pixels; default: the model's own")
    add("--seeds", type=int, nargs="+", default=[0], help="one picture of every prompt is drawn for each seed")
    add("--batch_size", type=int, default=1, help="pictures drawn at once; changes rounding and memory")
    add("--output", type=Path, default=Path("results/binding"), help="folder for pictures, sheet.png and binding.json")
    add("--sheet", type=Path, default=None, help="file for the sheet; default: sheet.png in --output")
    group = parser.add_argument_group("the method's settings (default: what --method sets)").add_argument
    for each in fields(Settings):
        group(
            f"--{each.name}", type=type(each.default), default=None, choices=each.metadata["choices"], help=each.metadata["help"]
        )
    return parser


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    for seed in flags["seeds"]:
        require(flags, "seeds", 0 <= seed < 2**63, "must be in [0, 2^63)")
    require(flags, "batch_size", flags["batch_size"] >= 1, "must be at least 1")
    if flags["clean_prompt"] is not None:
        count = len(flags["prompt"])
        require(flags, "clean_prompt", len(flags["clean_prompt"]) == count, f"must be given for each of the {count} prompts")
    for settings in settings_of_flags(flags).values():
        check_settings(settings)


def settings_of_flags(flags: dict) -> dict[str, Settings]:
    """The settings of each method, overridden by those given on the command line."""
    given = {each.name: flags[each.name] for each in fields(Settings) if flags[each.name] is not None}
    return {method: replace(METHODS[method], **given) for method in flags["method"]}


if __name__ == "__main__":
    ARGS = parse(build_parser(), check_flags)
    prepare_process(resumable=False)

import torch

from zoodip.binding_drawing import Picture, canvas, check_groups, draw_bound
from zoodip.binding_states import tokens_of
from zoodip.files import read_json, write_image, write_json

# ---------------------------------------------------------------------------------------------------------------- drawing


def read_words(paths: Sequence[Path]) -> dict[str, int]:
    """{learned word: number of its vectors} from embedding files. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    from zoodip.files import why_unreadable
    from zoodip.prompts import SHARED_KEY, read_embedding

    words = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"--embedding {path}: cannot be read ({why_unreadable(path, error)}); give a learned_embeds.safetensors"
            ) from None
        if len(names) != 1:
            raise InputError(f"--embedding {path}: holds {len(names)} tensors; give a file with one learned word")
        if names == [SHARED_KEY]:
            raise InputError(f"--embedding {path}: does not name its word; give the run's learned_embeds.safetensors")
        words[names[0]] = len(read_embedding(path, names[0])[0])
    return words


def checked_prompts(folder: Path, words: dict[str, int], flags: dict, methods: Iterable[Settings]) -> list[MarkedPrompt]:
    """The prompts, with their marks and lengths checked before a model is loaded. Raises InputError."""
    from zoodip.prompts import load_tokenizer

    tokenizer = load_tokenizer(folder)
    pieces = {word: [word, *(f"{word}_{i}" for i in range(1, count))] for word, count in words.items()}
    tokenizer.add_tokens([piece for names in pieces.values() for piece in names])

    def expand(text: str) -> str:
        for word, names in pieces.items():
            text = text.replace(word, " ".join(names))
        return text

    prompts = []
    for k, text in enumerate(flags["prompt"]):
        marked = mark_prompt(text, list(words)) if flags["parse"] else text
        if marked != text:
            notice(f"marked by {flags['parse']}: {marked}")
        prompt = parse_marks(marked, list(words), expand)
        for settings in methods:
            check_groups(prompt, settings, None)
        clean = expand(flags["clean_prompt"][k]) if flags["clean_prompt"] else prompt.clean
        for each in (prompt.prompt, clean, flags["negative_prompt"]):
            tokens_of(tokenizer, each)
        prompts.append(prompt)
    return prompts


def main(flags: dict) -> None:
    """Write pictures PROMPT-METHOD-SEED.png, a sheet and binding.json to --output. Raises InputError."""
    from zoodip.folder import packed_as, resolve_model
    from zoodip.model import load_pipeline
    from zoodip.pictures import picture_sheet
    from zoodip.records import environment, plain_arguments

    methods, output = settings_of_flags(flags), flags["output"]
    folder, variant = resolve_model(flags["model"])
    flags["quantization"] = flags["quantization"] or packed_as(folder, variant) or "none"
    vae_levels = len(read_json(folder / "vae" / "config.json").get("block_out_channels", [0] * 4))
    canvas(read_json(folder / "unet" / "config.json"), 2 ** (vae_levels - 1), flags["height"], flags["width"])
    prompts = checked_prompts(folder, read_words(flags["embedding"]), flags, methods.values())
    for path, what in ((output, "output"), ((flags["sheet"] or output / "sheet.png").parent, "sheet")):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--{what} {str(path)!r} cannot be created ({error.strerror}); choose another") from error
    set_aside(output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(flags["model"], flags["quantization"], device=device, variant=variant)
    for path in flags["embedding"]:
        pipeline.load_textual_inversion(str(path))
    how = {name: flags[name] for name in ("seeds", "height", "width", "negative_prompt", "batch_size")}
    records, rows = [], []
    for k, prompt in enumerate(prompts):
        clean = flags["clean_prompt"] and [flags["clean_prompt"][k]]
        for method, settings in methods.items():
            drawn = draw_bound(pipeline, [prompt.marked], settings=settings, clean_prompts=clean, **how)
            records += [write_picture(picture, k, method, output) for picture in drawn]  # at once: Ctrl-C keeps them
            rows.append(([picture.image for picture in drawn], f"{method}: {prompt.prompt}"))
    width, height = rows[0][0][0].size
    write_image(flags["sheet"] or output / "sheet.png", picture_sheet(rows, columns=len(methods), aspect=width / height))
    arguments = plain_arguments({name: value for name, value in flags.items() if name not in asdict(PLAIN)})
    used = {method: asdict(settings) for method, settings in methods.items()}
    record = dict(arguments=arguments, settings=used, pictures=records, **environment(device))
    write_json(output / "binding.json", record, indent=1)


def set_aside(output: Path) -> None:
    """Move what an earlier command left in `output` to previous-N. Raises InputError."""
    from zoodip.run import move_aside

    patterns = ("[0-9]*-*-[0-9]*.png", "sheet.png", "binding.json")
    move_aside(output, [path for pattern in patterns for path in sorted(output.glob(pattern))])


def write_picture(picture: Picture, k: int, method: str, output: Path) -> dict:
    """Write the picture of the k-th prompt as PROMPT-METHOD-SEED.png -> its record."""
    name = f"{k}-{method}-{picture.seed}.png"
    write_image(output / name, picture.image)
    costs = dict(forwards=picture.forwards, backwards=picture.backwards, seconds=round(picture.seconds, 3))
    return dict(file=name, prompt=picture.prompt, method=method, seed=picture.seed, **costs, steps=picture.steps)


if __name__ == "__main__":
    sys.exit(run_script(main, vars(ARGS)))
