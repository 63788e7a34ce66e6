"""Text to training batches: corpus -> tokenizer -> packed tokens -> samples -> sampler -> collator.

Importing this package costs next to nothing and no torch; the loaders, which need it, are in
``shardwright.train.data.batches.loader``.
"""

from shardwright.train.data.prepare import Prepared, prepare
from shardwright.train.data.sources.corpus import check_corpus

__all__ = ["Prepared", "check_corpus", "prepare"]
