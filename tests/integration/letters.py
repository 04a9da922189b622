"""A tokenizer for the tiny models: one printable character a token, so that every id has a text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import VOCABULARY


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return it, without special tokens: those have no text."""
    vocabulary = {chr(33 + i) if i < 94 else chr(200 + i): i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
