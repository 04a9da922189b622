"""Faster decoding of large language models by contextual sparsity, with a full model that corrects the sparse one."""

import lazy_loader

__version__ = "0.1.0"

# The public names are those of __init__.pyi. Each is imported at its first use, so `sirius --help` need not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
