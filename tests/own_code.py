"""A small causal model that brings its Python code along, as many on a hub do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIGURATION = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=384, width=32, layers=2, max_position_embeddings=64, **others):
        self.vocab_size = vocab_size
        self.width = self.hidden_size = width
        self.layers = self.num_hidden_layers = layers
        self.num_attention_heads = 1
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**others)
"""

BLOCKS = '''
import torch
from torch import nn


class OwnBlock(nn.Module):
    """Mixes each position with the mean of those before it."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x):
        h = self.norm(x)
        steps = torch.arange(1, h.shape[1] + 1, device=h.device, dtype=h.dtype)
        mean = h.cumsum(1) / steps[None, :, None]
        return x + self.scale * self.inner(torch.cat([h, mean], -1)).tanh()
'''

MODELING = """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .blocks_own import OwnBlock
from .configuration_own import OwnConfig


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["OwnBlock"]
    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(OwnBlock(config.width) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **others):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
"""

FILES = {
    "configuration_own.py": CONFIGURATION,
    "blocks_own.py": BLOCKS,
    "modeling_own.py": MODELING,
}
CLASSES = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
CONFIG = {
    "architectures": ["OwnForCausalLM"],
    "auto_map": CLASSES,
    "model_type": "own",
    "tie_word_embeddings": True,
    "vocab_size": 384,
}


def write(directory: Path) -> Path:
    """Write such a model with weights of its own; its tokenizer is left to the caller."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (directory / name).write_text(text)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 8

    tensors = {"embed.weight": drawn(384, 32)}
    for layer in ("layers.0", "layers.1"):
        tensors |= {
            f"{layer}.norm.weight": 1 + drawn(32),
            f"{layer}.norm.bias": drawn(32),
            f"{layer}.inner.weight": drawn(32, 64),
            f"{layer}.inner.bias": drawn(32),
            f"{layer}.scale": torch.full((1,), 0.75),
        }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
