"""The flags that trainers share, by group, each group with its checks. Imports neither torch nor any library built on it.

A script builds its parser from the groups and adds its method's flags. Its `argparse.Namespace` stays within the script; the
checks take its values as a dictionary (`vars(args)`).
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from zoodip.errors import InputError, notice

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_CC_FILE = "cc.json"
DEFAULT_WORD = "<sks>"
NUM_TRAIN_TIMESTEPS = 1000  # in every Stable Diffusion 1.x and 2.x

# Flags of the groups below that affect what is learned. Checkpoints record them, and resuming with different values is refused.
SHARED_SETTINGS = (
    "pretrained_model_name_or_path revision variant quantization mixed_precision placeholder_token initializer_token "
    "num_vectors learnable_property use_cc resolution center_crop train_batch_size seed"
).split()

OPTIONAL_SETTINGS = {"model_config": None}  # further such flags, recorded only if they differ from these values

CANDIDATES = "candidates per UNet forward; default: all at once. Fewer need less memory and change only rounding"

# Help texts about the pictures a run draws: for a run that learns a token, and for one that tunes weights.
TOKEN_PICTURES = dict(
    final_picture="at the end, draw before_after.png: the initial word above the learned one, from the same noise",
    validation_prompt="prompt for the pictures, with the new word (or {}); without it, before_after.png shows 'a photo of a {}', "
    "or 'a painting in the style of {}' for a style",
    validation_steps="steps between pictures of the prompt; 0: only at the end",
)
TUNING_PICTURES = dict(
    final_picture="draw validation-0.png before training and validation-N.png after all N steps, from the same noise; both are "
    "always drawn with --validation_prompt",
    validation_prompt="prompt for the pictures, with the identifier (or {} for identifier and class); default: 'a photo of {}'",
    validation_steps="steps between further pictures of the prompt; 0: only before training and at the end",
)

TUNING_SETTINGS = (
    "pretrained_model_name_or_path revision variant mixed_precision identifier class_word instance_prompt use_cc resolution "
    "center_crop prior_preservation prior_loss_weight num_class_images learning_rate train_batch_size seed timestep_sampling "
    "t_min t_max"
).split()


class OneLineArgumentParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False  # 0 is a default to be shown, and equals False
        return action.help if without else super()._get_help_string(action)


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser that reports errors in one line, with exit code 2, and takes no abbreviations: --mode is not --model_config."""
    return OneLineArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_model_flags(
    parser: argparse.ArgumentParser, packing: bool = True, compiling: bool = True
) -> Callable[..., argparse.Action]:
    """Add the model flags -> the group's `add_argument`, for further flags.

    `packing`: how weights are stored can be chosen; `compiling`: the UNet can be compiled. Only for methods without gradients:
    a compiled backward pass can return wrong ones (docs/trainers.md).
    """
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        default=DEFAULT_MODEL,
        metavar="PATH_OR_NAME",
        help="Stable Diffusion 1.x or 2.x: folder in diffusers format, hub name, or .safetensors file",
    )
    add(
        "--model_config",
        default=None,
        metavar="PATH_OR_NAME",
        help="for a .safetensors file: folder in diffusers format, or hub name, with its configurations and tokenizer; "
        "default: the published model of its kind",
    )
    add("--revision", default=None, help="branch, tag or commit of the hub repository")
    add(
        "--variant",
        default=None,
        help="weight file variant, for example fp16 for *.fp16.safetensors; default: fp16 for a hub model that has it "
        "and for a folder that has nothing else",
    )
    if packing:
        add(
            "--quantization",
            default=None,
            choices=["nf4", "int8", "none"],
            help="storage of every Linear and Conv2d weight: 4-bit NormalFloat, 8-bit rows, or 16/32-bit; default: nf4, or the "
            "format of a folder that --save_quantized wrote",
        )
    add(
        "--mixed_precision",
        default=None,
        choices=["fp16", "bf16", "fp32"],
        help="precision of activations; default: fp16 with CUDA, else fp32",
    )
    add("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    if compiling:
        add(
            "--compile",
            action="store_true",
            help="torch.compile the UNet: takes minutes at the start and needs a C++ compiler (CPU) or Triton (GPU)",
        )
    return add


def add_token_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("token").add_argument
    add("--placeholder_token", default=DEFAULT_WORD, help="the new word, in angle brackets and lower case")
    add(
        "--initializer_token",
        default=None,
        help="word(s) for the subject's class, whose embedding the token starts from; or an embedding file to continue from",
    )
    add(
        "--num_vectors",
        type=int,
        default=1,
        help="embedding vectors of the token, all of them trained; an embedding file sets its own number",
    )


def add_subject_flags(parser: argparse.ArgumentParser, templates: bool = True) -> None:
    """The photographs and their captions. `templates`: prompt templates can be used instead of captions."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", default=None, help="folder of images of the subject")
    add(
        "--use_cc",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="use a comprehensive caption of each photograph, from --cc_file or from NAME.txt beside it, instead of "
        + ("templates" if templates else "the instance prompt"),
    )
    add("--cc_file", default=DEFAULT_CC_FILE, help="JSON file of captions: {folder name: {file name: caption with one {}}}")
    if templates:
        add("--learnable_property", default="object", choices=["object", "style"], help="templates to use without --use_cc")
    add("--resolution", type=int, default=None, help="side of the training images in pixels; default: the model's own")
    add("--center_crop", action="store_true", help="crop the middle square instead of squeezing the image into one")


def add_word_flags(parser: argparse.ArgumentParser) -> None:
    """How a weight-tuning system names the subject: in words that the tokenizer already has."""
    add = parser.add_argument_group("words").add_argument
    add("--identifier", default="sks", help="rare word(s) that come to mean the subject; no token is added")
    add("--class_word", default=None, help="the subject's class, for example dog")
    add(
        "--instance_prompt",
        default="a photo of {}",
        help="prompt for every photograph without --use_cc; {} stands for identifier and class",
    )


def add_prior_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prior preservation").add_argument
    add(
        "--prior_preservation",
        action="store_true",
        help="also train on pictures of the class, so that the model does not forget it",
    )
    add("--prior_loss_weight", type=float, default=1.0, help="weight of the loss on pictures of the class")
    add(
        "--num_class_images",
        type=int,
        default=200,
        help="number of pictures of the class; the untuned model draws any that are missing",
    )
    add("--class_data_dir", default=None, help="folder for pictures of the class; default: class_images in the output folder")


def add_tuning_flags(
    parser: argparse.ArgumentParser, learning_rate: float | None, max_train_steps: int, rates: str = ""
) -> Callable[..., argparse.Action]:
    """All flags that weight-tuning systems share, with a system's own defaults -> `add_argument` of the group "method".

    `rates`: what the default learning rate depends on, if it is None.
    """
    add_model_flags(parser, packing=False, compiling=False)
    add_word_flags(parser)
    add_subject_flags(parser, templates=False)
    add_prior_flags(parser)
    add = parser.add_argument_group("method").add_argument
    add(
        "--learning_rate",
        type=float,
        default=learning_rate,
        help="constant learning rate of AdamW (betas .9, .999, weight decay .01)" + rates,
    )
    add("--max_train_steps", type=int, default=max_train_steps, help="steps of one forward and one backward pass")
    add_step_flags(add, candidates=None)
    add("--gradient_checkpointing", action="store_true", help="keep few activations and recompute the others: less memory")
    add_timestep_flags(add, "uniform")
    add_run_flags(parser, TUNING_PICTURES)
    return add


def add_step_flags(
    add: Callable[..., argparse.Action], images: str = "images per step", candidates: str | None = CANDIDATES
) -> None:
    """How a step is computed, and what it draws. `candidates` None: a step has no candidates."""
    add("--train_batch_size", type=int, default=1, help=images)
    if candidates is not None:
        add("--candidates_per_forward", type=int, default=None, help=candidates)
    add("--seed", type=int, default=0, help="seed of all random draws")


def add_base_flag(add: Callable[..., argparse.Action]) -> None:
    """How the frozen weights under trained updates are stored."""
    add("--base", default="nf4", choices=["nf4", "none"], help="storage of the frozen weights: 4-bit NormalFloat, or 16/32-bit")


def add_timestep_flags(add: Callable[..., argparse.Action], default: str) -> None:
    """Which timesteps a trainer draws and is evaluated at. `add`: the `add_argument` of the trainer's own group."""
    add("--t_min", type=int, default=500, help="smallest timestep drawn by puts and in the evaluation set (T_L)")
    add("--t_max", type=int, default=900, help="end (excluded) of the timesteps drawn by puts and in the evaluation set (T_U)")
    add(
        "--timestep_sampling",
        default=default,
        choices=["puts", "uniform", "snr"],
        help="puts: uniform over [t_min, t_max); uniform: over all timesteps; snr: more often where the SNR is lower (TextBoost)",
    )


def add_run_flags(parser: argparse.ArgumentParser, pictures: dict[str, str] = TOKEN_PICTURES) -> None:
    """Output, checkpoints, evaluation and pictures; `pictures` holds the help texts of the picture flags."""
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="results", help="folder for the result, checkpoints, curves and pictures")
    add("--save_steps", type=int, default=1000, help="steps between copies of the result, NAME-steps-N; 0: only at the end")
    add(
        "--checkpointing_steps",
        type=int,
        default=500,
        help="steps between checkpoints, and one at the end; 0: only when interrupted",
    )
    add("--checkpoints_total_limit", type=int, default=2, help="number of newest checkpoints to keep; 0: all")
    add("--resume_from_checkpoint", default=None, metavar="PATH_OR_latest", help="checkpoint file to continue from, or latest")
    add("--eval_steps", type=int, default=250, help="steps between evaluations on the fixed set; 0: never")
    add("--num_eval_samples", type=int, default=16, help="(image, timestep, noise) triples in the fixed evaluation set")
    add("--final_picture", action=argparse.BooleanOptionalAction, default=True, help=pictures["final_picture"])
    add("--validation_prompt", default=None, help=pictures["validation_prompt"])
    add("--validation_steps", type=int, default=0, help=pictures["validation_steps"])
    add("--num_validation_images", type=int, default=4, help="pictures per row")
    add("--validation_guidance", type=float, default=7.5, help="classifier-free guidance scale of the pictures")
    add("--report_to", default="none", choices=["none", "tensorboard", "wandb"], help="experiment tracker")


def given_flags(flags: dict, parser: argparse.ArgumentParser) -> set[str]:
    """The names of the flags whose value is not the parser's default."""
    return {name for name, value in flags.items() if value != parser.get_default(name)}


def without_effect(flags: dict, given: set[str], evaluated: bool | None = None) -> Iterator[str]:
    """A line for each `given` flag of the groups above that has no effect in this combination. Scripts add their own flags'.

    `evaluated`: whether the run uses the fixed evaluation set; default: if --eval_steps is not 0.
    """
    evaluated = flags["eval_steps"] > 0 if evaluated is None else evaluated
    prior = dict.fromkeys(("prior_loss_weight", "num_class_images", "class_data_dir"), "prior_preservation")
    for name, needed in {"cc_file": "use_cc", **prior}.items():
        if name in given and not flags[needed]:
            yield f"--{name} {flags[name]} has no effect without --{needed}"
    if "learnable_property" in given and flags["use_cc"] and (flags["validation_prompt"] or not flags["final_picture"]):
        yield f"--learnable_property {flags['learnable_property']} has no effect with --use_cc, which replaces the templates"
    sampling = flags.get("timestep_sampling", "puts")
    for name in ("t_min", "t_max"):
        if name in given and sampling != "puts":
            affects = "affects only the evaluation set" if evaluated else "has no effect without --eval_steps"
            yield f"--{name} {flags[name]} {affects}: --timestep_sampling is {sampling}"
    if "num_eval_samples" in given and not evaluated:
        yield f"--num_eval_samples {flags['num_eval_samples']} has no effect with --eval_steps 0"
    if flags["validation_prompt"] is None and not flags["final_picture"]:
        for name in ("num_validation_images", "validation_guidance"):
            if name in given:
                yield f"--{name} {flags[name]} has no effect: with --no-final_picture, only a --validation_prompt is drawn"
    model = Path(flags["pretrained_model_name_or_path"])
    if "revision" in given and model.exists():
        yield f"--revision {flags['revision']} has no effect: {model} is on this machine, not on the hub"
    if "variant" in given and model.is_file():
        yield f"--variant {flags['variant']} has no effect: {model} is a single file"
    if "model_config" in given and not model.is_file():
        yield f"--model_config {flags['model_config']} has no effect: it applies only to a model in a single .safetensors file"


def parse(
    parser: argparse.ArgumentParser,
    check: Callable[[dict], None],
    argv: list[str] | None = None,
    without_effect: Callable[[dict, set[str]], Iterator[str]] | None = None,
) -> argparse.Namespace:
    """Parse the command line (`sys.argv` if `argv` is None); if `check(flags)` raises InputError, exit with its one-line message.

    For `sys.argv`, also print `without_effect(flags, given)`: lines about flags that do nothing in this combination.
    """
    flags = parser.parse_args(argv)
    try:
        check(vars(flags))
    except InputError as error:
        parser.error(str(error))
    if argv is None and without_effect is not None:
        for line in without_effect(vars(flags), given_flags(vars(flags), parser)):
            notice(line)
    return flags


def require(flags: dict, name: str, condition: bool, rule: str) -> None:
    """Raise an InputError that names the flag, the `rule` it breaks and its value, unless `condition` holds."""
    if not condition:
        raise InputError(f"--{name} {rule}, got {flags[name]!r}")


PHOTOGRAPHS, CLASS_WORD = "a folder of photographs of the subject", "the word for the subject's class, for example dog"


def require_given(flags: dict, **wanted: str) -> None:
    """Raise an InputError that says what is `wanted`, unless every flag in it is given."""
    for name, what in wanted.items():
        if flags[name] is None:
            raise InputError(f"--{name} is required: {what}")


def require_at_least_one(flags: dict, *names: str) -> None:
    for name in names:
        require(flags, name, flags[name] >= 1, "must be at least 1")


def require_positive(flags: dict, name: str, example: str) -> None:
    require(flags, name, 0 < flags[name] < math.inf, f"must be a positive number, for example {example}")


def is_text(text: str) -> bool:
    """Whether a string consists of whole characters: JSON can hold lone surrogates, which no tokenizer accepts."""
    return not re.search("[\ud800-\udfff]", text)


def check_training_flags(flags: dict) -> None:
    """Check the shared groups for training, as far as possible without opening a file. Raises InputError."""
    require_given(flags, train_data_dir=PHOTOGRAPHS, initializer_token=CLASS_WORD)
    require_at_least_one(flags, "num_vectors")
    check_shared_flags(flags)
    check_token_flags(flags)
    check_run_flags(flags, flags["placeholder_token"])
    start = Path(flags["initializer_token"])
    moved = is_embedding_file(start.name) and start.resolve().parent == Path(flags["output_dir"]).resolve()
    rule = "must not be in --output_dir, where a new run moves and replaces files; copy it to another folder"
    require(flags, "initializer_token", not moved, rule)


def check_shared_flags(flags: dict) -> None:
    """Check the numbers that every trainer takes. Raises InputError."""
    require_at_least_one(flags, "train_batch_size", "max_train_steps", "num_eval_samples", "num_validation_images")
    if flags.get("candidates_per_forward") is not None:
        require_at_least_one(flags, "candidates_per_forward")
    check_timestep_range(flags)
    resolution = flags["resolution"]
    require(
        flags, "resolution", resolution is None or (resolution >= 8 and resolution % 8 == 0), "must be a positive multiple of 8"
    )
    if flags.get("learning_rate") is not None:  # not every trainer has one; the upper limit makes it fit fp32
        require(flags, "learning_rate", 0 < flags["learning_rate"] < 1e37, "must be a positive number, for example 5e-3")
    require(flags, "seed", 0 <= flags["seed"] < 2**63, "must be in [0, 2^63)")


def check_tuning_flags(flags: dict) -> None:
    """Check the groups of weight tuning, as far as possible without opening a file. Raises InputError."""
    require_given(flags, train_data_dir=PHOTOGRAPHS, class_word=CLASS_WORD)
    check_shared_flags(flags)
    for name in ("identifier", "class_word"):
        plain = flags[name].strip() != "" and not re.search(r"[{}]", flags[name])
        require(flags, name, plain and is_text(flags[name]), "must be plain words, for example sks and dog")
    word, prompt = flags["identifier"], flags["instance_prompt"]
    named = word in prompt or prompt.count("{}") == 1
    require(flags, "instance_prompt", named and is_text(prompt), f"must contain {word} or one {{}}")
    require_positive(flags, "prior_loss_weight", "1.0")
    require_at_least_one(flags, "num_class_images")
    check_run_flags(flags, word)
    if flags["class_data_dir"] is not None:
        for name in ("train_data_dir", "output_dir"):
            same = Path(flags["class_data_dir"]).resolve() == Path(flags[name]).resolve()
            require(flags, "class_data_dir", not same, f"must not be --{name}: pictures of subject and class would mix")


def check_timestep_range(flags: dict) -> None:
    """Check that [t_min, t_max) is a non-empty range of timesteps. Raises InputError."""
    require(flags, "t_min", 0 <= flags["t_min"] < NUM_TRAIN_TIMESTEPS, f"must be in [0, {NUM_TRAIN_TIMESTEPS})")
    require(flags, "t_max", flags["t_max"] <= NUM_TRAIN_TIMESTEPS, f"must be at most {NUM_TRAIN_TIMESTEPS}")
    require(flags, "t_min", flags["t_min"] < flags["t_max"], f"must be below --t_max {flags['t_max']}")


def check_token_flags(flags: dict) -> None:
    """Check that the tokenizer can find the placeholder in every prompt and the initializer is a word. Raises InputError."""
    token = flags["placeholder_token"]
    advice = f"choose a word in angle brackets, for example <{re.sub('[^a-z0-9]', '', token.lower()) or 'sks'}>"
    require(
        flags,
        "placeholder_token",
        len(token) > 0 and not re.search(r"[\s{}]", token),
        f"must be one word without spaces or braces ({advice})",
    )
    require(
        flags,
        "placeholder_token",
        not (token[0].isalnum() or token[-1].isalnum()),
        f"must not begin or end with a letter or digit, as it would match inside other words ({advice})",
    )
    require(
        flags,
        "placeholder_token",
        token == token.lower(),
        f"must be lower case, as the tokenizer lower-cases every prompt ({advice})",
    )
    word = flags["initializer_token"].strip()
    require(flags, "initializer_token", word not in ("", token), "must be a word that the model knows, for example dog")
    for name in ("placeholder_token", "initializer_token", "validation_prompt"):
        require(flags, name, is_text(flags[name] or ""), "must be valid UTF-8 text")


def check_run_flags(flags: dict, word: str) -> None:
    """Check the intervals and picture flags of a run that teaches `word`. Raises InputError."""
    same = Path(flags["output_dir"]).resolve() == Path(flags["train_data_dir"]).resolve()
    require(flags, "output_dir", not same, "must not be --train_data_dir: the run's pictures would become photographs")
    for name in ("save_steps", "checkpointing_steps", "checkpoints_total_limit", "eval_steps", "validation_steps"):
        require(flags, name, flags[name] >= 0, "must not be negative")
    require(flags, "validation_guidance", 1 <= flags["validation_guidance"] < math.inf, "must be at least 1 (1: no guidance)")
    prompt = flags["validation_prompt"]
    if prompt is not None:
        require(flags, "validation_prompt", word in prompt or "{}" in prompt, f"must contain {word} or {{}}")
    require(flags, "validation_steps", flags["validation_steps"] == 0 or prompt is not None, "needs a --validation_prompt")


def flags_for(function: Callable, flags: dict) -> dict:
    """The flags that `function` takes: the package's keyword-only parameters are named after the flags they correspond to."""
    names = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return {name: flags[name] for name in names if name in flags}


def is_embedding_file(initializer_token: str) -> bool:
    """Whether --initializer_token is a file rather than a word. How it is written decides, so that a missing file is noticed."""
    return initializer_token.lower().endswith((".safetensors", ".pt", ".bin")) or {"/", os.sep} & set(initializer_token) != set()


def settings_of(flags: dict, names: Iterable[str], optional: dict = OPTIONAL_SETTINGS) -> dict:
    """The flags to record: `names`, and those in `optional` that differ from the value given there. Of a local model or file,
    only the name is recorded, so that no path is given away."""
    settings = {name: flags[name] for name in names}
    settings |= {name: flags[name] for name, default in optional.items() if flags[name] != default}
    model = Path(flags["pretrained_model_name_or_path"])
    if model.exists():
        settings["pretrained_model_name_or_path"] = model.resolve().name if model.is_dir() else model.name
    if is_embedding_file(settings.get("initializer_token", "")):
        settings["initializer_token"] = Path(settings["initializer_token"]).name
    if "model_config" in settings and Path(settings["model_config"]).exists():
        settings["model_config"] = Path(settings["model_config"]).resolve().name
    return settings
