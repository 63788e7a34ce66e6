"""The formats that are read, a line for each, in the order in which they are looked for."""

from __future__ import annotations

from shardwright.train.checkpoint.read import dcp, hf_shards, plain, universal, zero
from shardwright.train.checkpoint.read.reader import Reader

READERS: tuple[Reader, ...] = (
    dcp.READER,
    universal.READER,  # before DeepSpeed's own, whose files of the model lie beside it
    zero.READER,
    hf_shards.READER,
    plain.READER,  # the last one: it takes any file
)
