"""Make the tiny world's tokenizer: byte-level BPE with Qwen's special tokens; every capital letter is one token.

    python -m stages.base.train_tokenizer

Only words that the picture should show are in capitals, so the model can spell them letter by letter.
"""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepgen.data.records import Record
from deepgen.models.chat_template import SPECIAL_TOKENS, TEXT_END, TURN_END
from stages.base.training import MODEL, load_split

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>\n"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXTRA = [
    "user assistant Generate an image: ",
    "Does this image show ? Answer Yes or No. Yes No",
    "What does this image show? Answer in a few words.",
]


def make_tokenizer(records: list[Record], vocab_size: int = 1500) -> PreTrainedTokenizerFast:
    """Train the BPE on all prompts and answers of `records`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex('[A-Z](?=[A-Z"])|(?<=[A-Z])[A-Z]'), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([t for r in records for t in (r.prompt, r.answer)] + EXTRA * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=TEXT_END,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL / "tokenizer")
    args = parser.parse_args()
    tokenizer = make_tokenizer(load_split("train"))
    tokenizer.save_pretrained(args.out)
    for text in ('the word "CAT" in red', "Generate an image: a blue apple", "Yes", "No"):
        print(len(tokenizer), text, tokenizer.tokenize(text))


if __name__ == "__main__":
    main()
