"""Draw prompts in which every creature keeps its own attributes, with a frozen Stable Diffusion 1.x or 2.x.

    python -m zoodip.binding --pretrained_model_name_or_path miniature/model --method phrase \\
        --embedding results/demo/learned_embeds.safetensors --width 128 --height 64 --seeds 0 1 --output results/binding \\
        --prompt "a [<sks>* wearing a red hat] and a [blue critter* wearing pink glasses] on the beach"

`phrase` is our own and needs forward passes only. `merge` and `full` are token merging, ToMe (Hu et al., NeurIPS 2024, arXiv
2411.07132), made for SDXL and adapted here; `published` follows its constants and four of its faults, and `control` uses only
its losses on the latents. docs/binding.md describes each method and what has been measured. (Unrelated: ToMe by Bolya et al., for
speed.)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from zoodip.arguments import add_model_flags, new_parser, parse, require
from zoodip.binding_settings import METHODS, PLAIN, Settings, check_settings
from zoodip.errors import InputError, notice, prepare_process, run_script
from zoodip.marks import MarkedPrompt
from zoodip.parsing import mark_prompt

# ----------------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Draw prompts whose creatures keep their own attributes.")
    add_model_flags(parser, packing=False, compiling=False)(
        "--quantization", default=None, choices=["nf4", "int8", "none"],
        help="storage of the model's weights; default: none, or as --save_quantized packed them")  # fmt: skip
    add = parser.add_argument
    add("--embedding", nargs="*", default=[], metavar="FILE",
        help="learned_embeds.safetensors of each learned word; \"FILE=<word>\" calls it otherwise")  # fmt: skip
    add("--prompt", nargs="+", required=True, help="prompts with [groups], and a * after each group's noun")
    add("--parse", default=None, choices=["spacy"], help="parser that marks the groups in prompts without marks; needs spaCy")
    add("--clean_prompt", nargs="+", default=None, help="for each prompt, text for its end tokens; default: groups' nouns only")
    add("--negative_prompt", default="", help="text that guidance steers away from")
    add("--method", nargs="+", default=["phrase"], choices=list(METHODS), help="one or more, to compare; see docs/binding.md")
    add("--width", type=int, default=None, help="width of the picture in pixels; default: the model's own")
    add("--height", type=int, default=None, help="height of the picture in pixels; default: the model's own")
    add("--seeds", type=int, nargs="+", default=[0], help="one picture of every prompt is drawn for each seed")
    add("--batch_size", type=int, default=1, help="pictures drawn at once; changes rounding and memory")
    add("--output", type=Path, default=Path("results/binding"), help="folder for pictures, sheet.png and binding.json")
    add("--sheet", type=Path, default=None, help="file for the sheet, PNG or JPEG; default: sheet.png in --output")
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
    require(flags, "seeds", len(set(flags["seeds"])) == len(flags["seeds"]), "must differ from each other")
    require(flags, "batch_size", flags["batch_size"] >= 1, "must be at least 1")
    if flags["clean_prompt"] is not None:
        count = len(flags["prompt"])
        require(flags, "clean_prompt", len(flags["clean_prompt"]) == count, f"must be given for each of the {count} prompts")
    if (sheet := flags["sheet"]) and sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"--sheet must end in .png, .jpg or .jpeg, got {str(sheet)!r}")
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
from zoodip.binding_words import Embedding, add_words, expand, parse_prompts, read_embeddings
from zoodip.files import ensure_writable, lock_folder, read_json, write_image, write_json

# ---------------------------------------------------------------------------------------------------------------- drawing


def checked_prompts(tokenizer, embeddings: Sequence[Embedding], flags: dict, methods: Iterable[Settings]) -> list[MarkedPrompt]:
    """The prompts, with their marks, words and lengths checked before a model is loaded. Raises InputError."""
    words, marked = [each.word for each in embeddings], []
    for text in flags["prompt"]:
        marked.append(mark_prompt(text, words) if flags["parse"] else text)
        if marked[-1] != text:
            notice(f"marked by {flags['parse']}: {marked[-1]}")
    prompts, negative = parse_prompts(tokenizer, marked, flags["clean_prompt"]), expand(tokenizer, flags["negative_prompt"])
    for prompt in prompts:
        for settings in methods:
            check_groups(prompt, settings, None)
        for text in (prompt.prompt, prompt.clean, negative):
            tokens_of(tokenizer, text)
    texts = [*marked, *(flags["clean_prompt"] or []), flags["negative_prompt"]]
    for each in embeddings:
        if not any(each.word in text for text in texts):
            notice(f"--embedding {each.path}: no prompt contains its word {each.word}")
    return prompts


def main(flags: dict) -> None:
    """Write pictures PROMPT-METHOD-SEED.png, a sheet and binding.json to --output. Raises InputError."""
    from zoodip.folder import packed_as, refuse_model_folder, resolve_model, vae_scale_factor
    from zoodip.model import load_pipeline
    from zoodip.prompts import load_tokenizer, read_embedding_rows
    from zoodip.quantize import DTYPES, default_precision, warn_of_emulation

    methods, output = settings_of_flags(flags), flags["output"]
    sheet = flags["sheet"] or output / "sheet.png"
    embeddings = read_embeddings(flags["embedding"])
    folder, variant = resolve_model(
        flags["pretrained_model_name_or_path"], flags["revision"], flags["variant"], flags["model_config"]
    )
    device = torch.device("cuda" if torch.cuda.is_available() and not flags["cpu"] else "cpu")
    flags["quantization"] = flags["quantization"] or packed_as(folder, variant) or "none"
    flags["mixed_precision"] = flags["mixed_precision"] or default_precision(device)
    warn_of_emulation(flags["mixed_precision"], device.type)
    canvas(read_json(folder / "unet" / "config.json"), vae_scale_factor(folder), flags["height"], flags["width"])
    tokenizer = load_tokenizer(folder)
    add_words(tokenizer, embeddings, width=read_embedding_rows(folder, variant, [0]).shape[1])
    prompts = checked_prompts(tokenizer, embeddings, flags, methods.values())
    if sheet.exists() and sheet.parent.resolve() != output.resolve():  # in --output, an earlier sheet is moved aside
        raise InputError(f"--sheet {str(sheet)!r} exists; choose another name, or remove it")
    refuse_model_folder("output", output, folder)
    for path, flag in {sheet.parent: "sheet", output: "output"}.items():
        ensure_writable(path, flag, 0)
    lock = lock_folder(output, "output")  # another command would move these pictures aside
    try:
        pipeline = load_pipeline(str(folder), flags["quantization"], DTYPES[flags["mixed_precision"]], device, variant=variant)
        if embeddings:
            pipeline.load_textual_inversion([{each.word: each.vectors} for each in embeddings])
        draw(pipeline, prompts, methods, flags, sheet)
    finally:
        lock.release()


def draw(pipeline, prompts: list[MarkedPrompt], methods: dict[str, Settings], flags: dict, sheet: Path) -> None:
    """Draw every prompt with every method and write pictures, sheet and record, after moving an earlier command's aside."""
    from zoodip.pictures import picture_sheet
    from zoodip.records import environment, plain_arguments

    output = flags["output"]
    set_aside(output)
    how = {name: flags[name] for name in ("seeds", "height", "width", "negative_prompt", "batch_size")}
    records, rows = [], []
    for k, prompt in enumerate(prompts):
        clean = flags["clean_prompt"] and [flags["clean_prompt"][k]]
        for method, settings in methods.items():
            drawn = draw_bound(pipeline, [prompt.marked], settings=settings, clean_prompts=clean, **how)
            records += [write_picture(picture, k, method, output) for picture in drawn]  # at once: Ctrl-C keeps them
            rows.append(([picture.image for picture in drawn], f"{method}: {prompt.prompt}"))
    width, height = rows[0][0][0].size
    write_image(sheet, picture_sheet(rows, columns=len(methods), aspect=width / height))
    arguments = plain_arguments({name: value for name, value in flags.items() if name not in asdict(PLAIN)})
    used = {method: asdict(settings) for method, settings in methods.items()}
    record = dict(arguments=arguments, settings=used, pictures=records, **environment(pipeline.device))
    write_json(output / "binding.json", record, indent=1)
    print(f"{sheet}: {len(records)} pictures, each of which is a file in {output}")


def set_aside(output: Path) -> None:
    """Move what an earlier command left in `output` to previous-N. Raises InputError."""
    from zoodip.run import move_aside

    ours = re.compile(rf"\d+-({'|'.join(METHODS)})-\d+\.png|sheet\.png|binding\.json")
    move_aside(output, [path for path in sorted(output.iterdir()) if ours.fullmatch(path.name)])


def write_picture(picture: Picture, k: int, method: str, output: Path) -> dict:
    """Write the picture of the k-th prompt as PROMPT-METHOD-SEED.png -> its record."""
    name = f"{k}-{method}-{picture.seed}.png"
    write_image(output / name, picture.image)
    costs = dict(forwards=picture.forwards, backwards=picture.backwards, seconds=round(picture.seconds, 3))
    return dict(file=name, prompt=picture.prompt, method=method, seed=picture.seed, **costs, steps=picture.steps)


if __name__ == "__main__":
    sys.exit(run_script(main, vars(ARGS)))
