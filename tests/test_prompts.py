"""The token and its prompts: initializer, tokenizer, placeholder, and states equal to the stock encoder's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import seeded
from tiny import from_pretrained

from zoodip.errors import InputError
from zoodip.prompts import (
    encode_prompts,
    initial_token,
    initializer_ids,
    load_tokenizer,
    read_embedding_rows,
    starting_token,
    tokenize,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model, "<sks>", 3)


def test_placeholder_that_is_a_word_ending(tiny_model, refused):
    """A token that the vocabulary has only in its word-ending form is the same word to the tokenizer."""
    vocabulary = load_tokenizer(tiny_model, "<sks>", 1).get_vocab()
    assert "€</w>" not in vocabulary  # while byte symbols exist in both forms:
    assert "£</w>" in vocabulary
    assert "already a word" in refused(placeholder_token="£")


def test_a_tokenizer_that_loads_and_cannot_encode(tiny_model, tmp_path):
    """A wrong value in its configuration shows only at its first use: that use is at loading."""
    folder = shutil.copytree(tiny_model / "tokenizer", tmp_path / "tokenizer")
    configuration = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration | dict(model_max_length="x")))
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_initializer(tokenizer, tiny_model, capsys):
    """One vector starts from the mean of several pieces; as many vectors as pieces start from one each."""
    assert len(initializer_ids(tokenizer, "dog")) == 1
    ids = initializer_ids(tokenizer, "dog cat snow")
    rows = read_embedding_rows(tiny_model, None, ids)
    assert torch.equal(initial_token(rows, 3), rows)
    assert torch.equal(initial_token(rows, 1), rows.mean(0, keepdim=True))
    assert torch.equal(initial_token(rows, 2), rows.mean(0).expand(2, -1))
    assert len(initializer_ids(tokenizer, "zebra")) == 5  # not a word here: spelled out in bytes, which is fine
    capsys.readouterr()
    starting_token(tokenizer, tiny_model, None, "zebra", 1)
    assert "--initializer_token zebra: is 5 tokens to this model" in capsys.readouterr().err
    for word, vectors in (("dog", 1), ("dog", 2), ("dog cat", 1), ("zebra", 5)):
        starting_token(tokenizer, tiny_model, None, word, vectors)
    assert capsys.readouterr().err == ""
    again = initial_token(rows, 3)
    again += 1
    assert not torch.equal(again, rows)  # a tensor of its own


def test_tokenize_expands_the_placeholder(tokenizer):
    """Several vectors replace the one word; begin, end and padding are as in the stock tokenizer."""
    plain = tokenizer("a photo of <sks> on the grass", padding="max_length", max_length=77).input_ids
    placeholder = tokenizer.convert_tokens_to_ids("<sks>")
    assert plain.count(placeholder) == 1
    assert tokenize(tokenizer, "a photo of <sks> on the grass", placeholder, 1, 77) == plain
    at = plain.index(placeholder)
    expanded = [*plain[:at], placeholder, placeholder + 1, placeholder + 2, *plain[at + 1 :]][:77]
    assert tokenize(tokenizer, "a photo of <sks> on the grass", placeholder, 3, 77) == expanded
    for text in ("<sks>'s dog", "my<sks>dog", "<SKS>", "a <sks>."):  # however it is attached
        assert tokenize(tokenizer, text, placeholder, 1, 77).count(placeholder) == 1


def test_a_caption_that_is_too_long(tokenizer, refused, tmp_path, subject):
    """If the end of a caption were cut off silently, the token would learn what that should have named. 75 just fit."""
    placeholder = tokenizer.convert_tokens_to_ids("<sks>")
    assert len(tokenize(tokenizer, "<sks>" + " dog" * 74, placeholder, 1, 77)) == 77
    with pytest.raises(InputError, match="76 tokens long, .* takes 75"):
        tokenize(tokenizer, "<sks>" + " dog" * 75, placeholder, 1, 77)
    with pytest.raises(InputError, match="77 tokens long"):
        tokenize(tokenizer, "<sks>" + " dog" * 74, placeholder, 3, 77)
    captions = {"dog6": {f"0{i}.png": "{}" + " dog" * 75 for i in range(3)}}
    (tmp_path / "cc.json").write_text(str(captions).replace("'", '"'))
    line = refused(use_cc=True, cc_file=tmp_path / "cc.json")
    assert "shorten" in line and "dog dog" in line


def test_embedding_rows(tiny_model):
    """Rows in the order asked for, repeats included, without reading the table."""
    table = from_pretrained(tiny_model, "text_encoder").get_input_embeddings().weight
    ids = [7, 0, 7, len(table) - 1]
    assert torch.equal(read_embedding_rows(tiny_model, None, ids), table[ids])


# --- prompts under candidate tokens ---


def test_encode_prompts_equals_the_stock_encoder(tiny):
    """What is trained must be what a pipeline later computes with the token in its table."""
    tokens = tiny.tokens(2)
    states = encode_prompts(tiny.text_encoder, tiny.prompts.rows, tiny.prompts.ids, tokens)
    assert states.shape == (4, 77, tiny.width)
    for c in range(2):
        for p, text in enumerate(tiny.texts):
            # the same fp32 sums in another batch shape; states are of size 1
            torch.testing.assert_close(states[2 * c + p], tiny.stock_states(text, tokens[c]), rtol=0, atol=2e-5)


def test_every_vector_is_used_and_differentiable(tiny):
    """The authors' script trains only the first of several vectors."""
    batch, token = tiny.batch(1), tiny.tokens(1).requires_grad_()
    loss = tiny.losses(batch, token)[0]
    (gradient,) = torch.autograd.grad(loss, token)
    assert (gradient.norm(dim=-1) > 1e-7).all()
    for v in range(tiny.num_vectors):
        changed = token.detach().clone()
        changed[0, v] += torch.randn(tiny.width, generator=seeded(v))  # a constant would be lost in the layer norm
        assert abs(tiny.losses(batch, changed)[0] - loss) > 1e-6  # rounding of a loss near 1 is 1e-7
