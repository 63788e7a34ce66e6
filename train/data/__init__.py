"""Text to training batches: corpus -> tokenizer -> packed tokens -> samples -> sampler -> collator.

Importing this package costs next to nothing and no torch; the loaders, which need it, are in
``train.data.loader``.
"""

from train.data.prepare import Prepared, prepare
from train.data.sources.corpus import check_corpus

__all__ = ["Prepared", "check_corpus", "prepare"]
