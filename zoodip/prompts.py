"""The token and the prompts that contain it: tokenizer, placeholder, text-encoder states, and the embedding file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from zoodip.arguments import is_embedding_file
from zoodip.errors import DamagedModel, InputError, damaged_model, notice
from zoodip.files import not_safetensors, serialize, why_unreadable, write_atomically
from zoodip.folder import config_number, find_weights
from zoodip.records import package_versions

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import CLIPTextModel, CLIPTokenizer


def load_tokenizer(folder: Path, placeholder_token: str | None = None, num_vectors: int = 1) -> CLIPTokenizer:
    """The model's CLIPTokenizer, with a placeholder added if one is given. Raises InputError if that is already a word."""
    from transformers import CLIPTokenizer

    with damaged_model(folder / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        tokenizer("a")  # a wrong value, such as a model_max_length that is no number, shows only when it is used
    if placeholder_token is None:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    names = [placeholder_token] + [f"{placeholder_token}_{i}" for i in range(1, num_vectors)]  # as diffusers names them
    taken = [word for name in names for word in (name, name + "</w>") if word in vocabulary]
    if taken:
        raise InputError(
            f"--placeholder_token: {taken[0]!r} is already a word of this tokenizer; choose another, for "
            f"example <my-{re.sub('[^a-z0-9]', '', placeholder_token.lower()) or 'token'}>"
        )
    tokenizer.add_tokens(placeholder_token)
    return tokenizer


def initializer_ids(tokenizer, initializer_token: str) -> list[int]:
    """Token ids of the initializer. Raises InputError if the tokenizer does not know it."""
    ids = tokenizer(initializer_token, add_special_tokens=False).input_ids
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if not ids or special & set(ids):
        raise InputError(
            f"--initializer_token: {initializer_token!r} is unknown to this tokenizer; use a plain word "
            "for the subject's class, for example dog"
        )
    return ids


def tokenize(
    tokenizer, text: str, placeholder_id: int, num_vectors: int, length: int, what: str = "the caption or prompt"
) -> list[int]:
    """`length` token ids; the placeholder's id becomes placeholder_id .. placeholder_id + num_vectors - 1.

    Raises InputError if the text is too long, rather than silently truncating the caption.
    """
    words = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = []
    for word in words:
        ids += range(placeholder_id, placeholder_id + num_vectors) if word == placeholder_id else [word]
    if len(ids) > length - 2:
        fewer = ", or give fewer --num_vectors" if num_vectors > 1 else ""
        raise InputError(
            f"{what} {text!r:.500} is {len(ids)} tokens long, but the text encoder takes {length - 2}; shorten it{fewer}"
        )
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def read_embedding_rows(folder: Path, variant: str | None, ids: Sequence[int]) -> torch.Tensor:
    """Rows `ids` of the token-embedding table, [len(ids), d] fp32, without reading the table (76 MB for SD v1.5).

    Raises InputError if tokenizer and weights are of different models, or the weights are damaged.
    """
    for path in find_weights(folder, "text_encoder", variant):
        try:
            with safe_open(path, framework="pt") as handle:
                names = [name for name in handle.keys() if name.endswith("token_embedding.weight")]
                if names:
                    return select_rows(handle.get_slice(names[0]), ids, f"{path}: {names[0]}", folder)
        except (SafetensorError, OSError) as error:
            raise not_safetensors(path, error) from error
    raise DamagedModel(folder / "text_encoder", "the weights lack embeddings.token_embedding.weight")


def select_rows(table, ids: Sequence[int], name: str, folder: Path) -> torch.Tensor:
    """Rows `ids` of an open safetensors slice [vocabulary size, d] -> [len(ids), d] fp32. Raises InputError."""
    shape = table.get_shape()
    if len(shape) != 2 or max(ids) >= shape[0]:
        raise InputError(
            f"{name} is {tuple(shape)}, but the tokenizer needs row {max(ids)}; tokenizer and weights belong to different models"
        )
    rows = torch.cat([table[i : i + 1] for i in ids])
    if not rows.is_floating_point() or not torch.isfinite(rows.float()).all():
        raise DamagedModel(folder / "text_encoder", f"{name} ({rows.dtype}) is not finite floating-point data")
    return rows.float()


@dataclass
class Prompts:
    """Tokenised texts over a table of just the embedding rows they use, followed by the placeholder's vectors."""

    ids: torch.Tensor  # [P, L] int64 row numbers; len(rows) + v is vector v of the placeholder
    rows: torch.Tensor  # [R, d] fp32


def build_prompts(
    tokenizer,
    folder: Path,
    variant: str | None,
    texts: list[str],
    placeholder_token: str | None,
    num_vectors: int,
    what: str = "the caption or prompt",
) -> Prompts:
    """Tokenise `texts` and read the rows they need. Raises InputError.

    With a placeholder, each text contains {} or it; without one (None, and 0 vectors), the texts are plain words.
    """
    if placeholder_token is None:
        placeholder_id = len(tokenizer)  # no word has this id
    else:
        placeholder_id = tokenizer.convert_tokens_to_ids(placeholder_token)
        texts = [text.replace("{}", placeholder_token) for text in texts]
    length = config_number(folder / "text_encoder" / "config.json", "max_position_embeddings", 77)
    ids = torch.tensor([tokenize(tokenizer, text, placeholder_id, num_vectors, length, what) for text in texts])
    ordinary = ids[ids < placeholder_id].unique()  # sorted
    vectors = torch.arange(num_vectors) + placeholder_id
    local_ids = torch.searchsorted(torch.cat([ordinary, vectors]), ids)
    return Prompts(local_ids, read_embedding_rows(folder, variant, ordinary.tolist()))


def starting_token(tokenizer, folder: Path, variant: str | None, initializer_token: str, num_vectors: int) -> torch.Tensor:
    """The initial theta [V, d]: the initializer's embeddings, one each or their mean, or those in an embedding file.

    An embedding file fixes the number of vectors: num_vectors must be that or 1. Raises InputError.
    """
    if not is_embedding_file(initializer_token):
        rows = read_embedding_rows(folder, variant, initializer_ids(tokenizer, initializer_token))
        if len(rows) not in (1, num_vectors) and len(initializer_token.split()) == 1:
            notice(
                f"--initializer_token {initializer_token}: is {len(rows)} tokens to this model, from whose mean the new word "
                "starts; the correct spelling, or a more common word, may be one token"
            )
        return initial_token(rows, num_vectors)
    if not Path(initializer_token).exists():
        raise InputError(f"--initializer_token: there is no file {initializer_token!r}; give an embedding file, or a word")
    theta, _ = read_embedding(Path(initializer_token), None)
    width = read_embedding_rows(folder, variant, [0]).shape[1]
    if theta.shape[1] != width:
        raise InputError(
            f"--initializer_token {initializer_token}: its vectors have {theta.shape[1]} numbers, but this model's words have "
            f"{width}; give an embedding for the same kind of model"
        )
    if num_vectors not in (1, len(theta)):
        raise InputError(f"--num_vectors {num_vectors}: {initializer_token} holds {len(theta)}; leave the flag out")
    return theta.float()


def initial_token(rows: torch.Tensor, num_vectors: int) -> torch.Tensor:
    """Embeddings of the initializer's tokens [tokens, d] -> theta [num_vectors, d]: one each, or their mean."""
    return rows.clone() if len(rows) == num_vectors else rows.mean(0, keepdim=True).repeat(num_vectors, 1)


def encode_prompts(text_encoder: CLIPTextModel, rows: torch.Tensor, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Text-encoder states of B prompts under each of C candidate tokens.

    rows [R, d], ids [B, L] as in `Prompts`, tokens [C, num_vectors, d] -> [C * B, L, d]. A pure function of `tokens`:
    no table is written, and gradients flow if required.
    """
    num_candidates, num_vectors, width = tokens.shape
    table = torch.cat([rows, tokens.reshape(-1, width)]).to(text_encoder.embeddings.position_embedding.weight.dtype)
    shift = num_vectors * torch.arange(num_candidates, device=ids.device)[:, None, None]
    ids = torch.where(ids >= len(rows), ids + shift, ids).flatten(0, 1)  # [C * B, L]
    override = {"embeddings.token_embedding.weight": table}
    return torch.func.functional_call(text_encoder, override, (ids,)).last_hidden_state


# ----------------------------------------------------------------------------------------------------- the embedding file


SHARED_KEY = "emb_params"  # key in the copy for other programs


def warn_of_an_ordinary_word(tokenizer, placeholder_token: str) -> None:
    """Warn if the copy's file name, which is the word in AUTOMATIC1111 and Forge, is an ordinary word."""
    stem = file_stem(placeholder_token)
    if f"{stem}</w>" in tokenizer.get_vocab() and stem != "sks":  # "sks" became customary because nobody writes it
        notice(
            f"--placeholder_token {placeholder_token}: in AUTOMATIC1111 and Forge the file name is the word, so "
            f"{stem}.safetensors would affect every prompt with the ordinary word {stem!r}; choose, for example, <my-{stem}>"
        )


def file_stem(token: str) -> str:
    """The token as a file name: AUTOMATIC1111 and ComfyUI use the file name as the word in prompts."""
    stem = re.sub(r"[^a-z0-9_-]", "", token.lower()) or "token"
    return f"token-{stem}" if stem.startswith(("checkpoint-", "learned_embeds")) else stem  # names of our own files


def embedding_metadata(settings: dict, step: int, prediction_type: str, width: int) -> dict[str, str]:
    """Header of the embedding file (ModelSpec 1.0.0 and our own keys). The same run gives the same header."""
    architecture = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "stable-diffusion-other")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/textual-inversion",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{settings['placeholder_token']} ({settings['initializer_token']})",
        "modelspec.trigger_phrase": settings["placeholder_token"],
        "modelspec.resolution": f"{settings['resolution']}x{settings['resolution']}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "zoodip.base_model": str(settings["pretrained_model_name_or_path"]),
        "zoodip.step": str(step),
        "zoodip.settings": json.dumps(settings, sort_keys=True),
        "zoodip.versions": json.dumps(package_versions(), sort_keys=True),
    }


def save_embedding(folder: Path, theta: torch.Tensor, settings: dict, prediction_type: str, step: int, final: bool) -> None:
    """Write theta [num_vectors, d] to `folder` as one fp32 tensor. Raises InputError.

    learned_embeds.safetensors has the placeholder token as its key, as in diffusers. The final copy, named after the token,
    has the key that kohya's scripts write: with it AUTOMATIC1111, Forge, ComfyUI and InvokeAI all find the width in the last
    dimension, whereas with any other key InvokeAI takes the first one, the number of vectors.
    """
    token = settings["placeholder_token"]
    metadata = embedding_metadata(settings, step, prediction_type, theta.shape[-1])
    name = "learned_embeds" if final else f"learned_embeds-steps-{step}"
    write_atomically(folder / f"{name}.safetensors", serialize({token: theta}, metadata))
    if final:
        write_atomically(folder / f"{file_stem(token)}.safetensors", serialize({SHARED_KEY: theta}, metadata))


def read_embedding(path: Path, placeholder_token: str | None) -> tuple[torch.Tensor, dict]:
    """(theta [V, d], the settings it was learned with, if recorded) from a learned_embeds.safetensors, or if the token is None
    from an embedding file of any program that holds one token. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as handle:
            settings = json.loads((handle.metadata() or {}).get("zoodip.settings", "{}"))
            names = list(handle.keys()) if placeholder_token is None else [placeholder_token]
            if len(names) != 1:
                raise ValueError(f"it holds {len(names)} tensors")
            theta = handle.get_tensor(names[0])
        if theta.dim() == 1:  # as other programs save a single vector
            theta = theta[None]
        if theta.dim() != 2 or not theta.numel() or not theta.is_floating_point() or not torch.isfinite(theta).all():
            raise ValueError(f"it is {tuple(theta.shape)} {theta.dtype}, or contains NaN or Inf")
    except (SafetensorError, OSError, ValueError) as error:
        reason = why_unreadable(path, error)
        raise InputError(
            f"{path}: does not hold {placeholder_token or 'one learned word'} ({reason}); give a "
            "learned_embeds.safetensors" + (", or its --placeholder_token" if placeholder_token else "")
        ) from error
    return theta, settings if isinstance(settings, dict) else {}
