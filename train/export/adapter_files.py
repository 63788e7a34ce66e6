"""An adapter by itself, as peft keeps and loads it, out of a checkpoint; peft need not be here."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCardData
from safetensors.torch import save_file

from shardwright.train.checkpoint.format.layout import AdapterEntry, read_manifest
from shardwright.train.checkpoint.format.lazy import PortableState
from shardwright.train.checkpoint.read import merged, portable
from shardwright.train.durable import write_text
from shardwright.train.export.card_text import MODEL_PLACEHOLDER, adapter_in_words
from shardwright.train.paths import is_hub_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
README = "README.md"


def write(directory: Path, checkpoint: Path) -> None:
    """Write the adapter of a checkpoint of a run into a directory that is not there yet."""
    adapter = read_manifest(checkpoint).adapter
    assert adapter is not None, "asked for where there is one"
    write_files(directory, adapter, portable.read(checkpoint))


def write_files(directory: Path, adapter: AdapterEntry, state: PortableState) -> None:
    """Write an adapter in fp32, its config and a card. All of it is in memory at once."""
    directory.mkdir(exist_ok=True)
    tensors = {name: t.whole().float() for name, t in merged.adapters_tensors(state).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    # Where local weights lay is nobody else's affair.
    base = adapter.base if _is_on_hub(adapter.base) else None
    described = {**adapter.config, "base_model_name_or_path": base}
    text = json.dumps(described, indent=2, sort_keys=True)
    write_text(directory / CONFIG, f"{text}\n")
    write_text(directory / README, _readme(adapter))


def _is_on_hub(base: str) -> bool:
    return is_hub_name(base) and not Path(base).exists()


def _readme(adapter: AdapterEntry) -> str:
    base = adapter.base
    on_hub = _is_on_hub(base)
    causal = adapter.config.get("task_type") == "CAUSAL_LM"
    loader = "AutoModelForCausalLM" if causal else "AutoModelForMaskedLM"
    metadata = ModelCardData(
        library_name="peft",
        base_model=base if on_hub else None,
        tags=["shardwright", str(adapter.config.get("peft_type")).lower()],
    ).to_yaml()
    shown = json.dumps(base) if on_hub else '"PATH_OF_THE_BASE"'
    of_it = f"of `{base}`" if on_hub else "of a model that its own card does not name"
    return f"""---
{metadata}
---

# Adapter

{adapter_in_words(adapter.config)}, trained with Shardwright beside the weights {of_it}.

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained({shown})
model = PeftModel.from_pretrained(base, "{MODEL_PLACEHOLDER}")
```
"""
