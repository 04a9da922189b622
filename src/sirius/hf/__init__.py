"""The door of transformers: `model.generate(**inputs, custom_generate=sirius.decode)` decodes our way."""

from sirius.hf.door import SiriusOutput, decode, generate

__all__ = ["SiriusOutput", "decode", "generate"]
