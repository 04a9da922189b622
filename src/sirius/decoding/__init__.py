"""Pure control: rounds of draft and check over any `LanguageModel`; nothing here imports a model."""
