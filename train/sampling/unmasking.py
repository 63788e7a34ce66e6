"""Generate by masked diffusion: fill the masks of a text over several passes, the surest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURE = 0.7
LIKELIEST = 50
"""Tokens among which one is drawn."""

Forward = Callable[[torch.Tensor], torch.Tensor]
"""From the ids of one text (n,) to its logits (n, vocabulary)."""


def completed(
    prompt: str,
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    *,
    new_tokens: int,
    steps: int | None,
    seed: int,
) -> tuple[str, bool]:
    """Return a prompt's text with its masks filled, and False; or what continues it, and True.

    A prompt without a mask is continued by ``new_tokens`` tokens, fewer where the model's positions
    end. All masks are filled within ``steps`` passes, by default one for each of them.
    """
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    mask, text = str(tokenizer.mask_token), prompt
    continues = mask not in prompt
    if continues:
        used = len(tokenizer(prompt, verbose=False)["input_ids"])
        text += mask * min(new_tokens, tokenizer.model_max_length - used)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    assert isinstance(tokenizer.mask_token_id, int)
    found = filled(forward, ids, tokenizer.mask_token_id, sorted(ordinary), steps=steps, seed=seed)
    whole = str(tokenizer.decode(found, **options))
    if not continues:
        return whole, False
    before = str(tokenizer.decode(ids[ids != tokenizer.mask_token_id], **options))
    if whole.startswith(before):
        return whole[len(before) :], True
    return str(tokenizer.decode(found[ids == tokenizer.mask_token_id], **options)), True


def filled(
    forward: Forward,
    ids: torch.Tensor,
    mask: int,
    ordinary: Sequence[int],
    *,
    steps: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Return ``ids`` (n,) with each ``mask`` replaced by one of the ``ordinary`` ids.

    Each pass draws a token for every mask that is left, and keeps of them those that the model
    thinks the likeliest, as many in each pass; the others are masks again in the next (low-
    confidence remasking, arXiv 2502.09992).
    """
    ids, draws = ids.clone(), torch.Generator().manual_seed(seed)
    count = int(ids.eq(mask).sum())
    passes = count if steps is None else min(steps, count)
    allowed = torch.tensor(ordinary)
    for left in range(passes, 0, -1):
        places = ids.eq(mask).nonzero().squeeze(1)
        with torch.no_grad():
            logits = forward(ids)[places.to(ids.device)].float().cpu()
        log_p = logits[:, allowed].log_softmax(-1)
        best, which = log_p.topk(min(LIKELIEST, len(allowed)))
        drawn = torch.multinomial((best / TEMPERATURE).softmax(-1), 1, generator=draws)
        kept = best.gather(1, drawn).squeeze(1).topk(-(-len(places) // left)).indices
        tokens = allowed[which.gather(1, drawn).squeeze(1)]
        ids[places[kept]] = tokens[kept]
    return ids
