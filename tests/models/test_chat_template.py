"""Templates and token order of M1.2."""

import pytest

from deepgen.errors import UserError
from deepgen.models.chat_template import check_tokenizer, render, tokenize
from tests.helpers.factories import make_tokenizer


def test_text_to_image_template():
    assert render("a red apple") == (
        "<|im_start|>user\nGenerate an image: a red apple<|im_end|>\n<|im_start|>assistant\n"
    )


def test_unconditional_keeps_the_prefix():
    assert render("") == "<|im_start|>user\nGenerate an image: <|im_end|>\n<|im_start|>assistant\n"


def test_editing_template_has_images_first_and_no_prefix():
    assert render("make it blue", [2, 1]) == (
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "\nmake it blue<|im_end|>\n<|im_start|>assistant\n"
    )


def test_padding_is_on_the_left_and_special_tokens_are_single():
    tokenizer = make_tokenizer()
    batch = tokenize(tokenizer, ["a", "a longer prompt"], [[3], []])
    assert batch.ids.shape == batch.mask.shape
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (batch.ids[0] == image_token).sum() == 3
    padding = batch.mask[0].logical_not().sum().item()
    assert padding > 0
    assert not batch.mask[0, :padding].any()
    assert batch.mask[0, padding:].all()
    assert batch.mask[1].all()
    assert (batch.ids[0, :padding] == tokenizer.pad_token_id).all()
    assert tokenizer.decode(batch.ids[1]) == render("a longer prompt")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>"])
def test_reserved_tokens_in_a_prompt_are_refused(token):
    with pytest.raises(UserError, match="reserved token"):
        tokenize(make_tokenizer(), [f"an apple {token}"], [[]])


def test_tokenizer_of_another_model_is_refused():
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer, 5, 300)
    with pytest.raises(UserError, match="image_token_id is 7"):
        check_tokenizer(tokenizer, 7, 300)
    with pytest.raises(UserError, match="vocabulary holds 100"):
        check_tokenizer(tokenizer, 5, 100)
