"""Let a trained model speak: fill masks or continue prompts, by the model's kind."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from train.errors import BAD_INPUT, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample(
    model_dir: Path, prompts: Sequence[str], *, new_tokens: int = 40, top: int = 5, seed: int = 0
) -> list[list[str]]:
    """Return completions of each prompt by the model in a Hugging Face directory.

    A causal model gives one continuation of at most ``new_tokens`` tokens (fewer where the model's
    positions end), drawn with temperature 0.7 from the 50 likeliest; a masked one the ``top``
    likeliest fillings as "token (probability)".

    Raises UserError where a prompt does not suit the model.
    """
    from transformers import pipeline, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its advice is meant for who writes the calls
    set_seed(seed)
    architecture = json.loads((model_dir / "config.json").read_text())["architectures"][0]
    if architecture.endswith("ForMaskedLM"):
        fill = pipeline("fill-mask", model=str(model_dir))
        assert fill.tokenizer is not None
        check_prompts(prompts, fill.tokenizer, masked=True)
        top = min(top, fill.model.config.vocab_size)
        return [
            [
                f"{found['token_str'].strip() or repr(found['token_str'])} ({found['score']:.0%})"
                for found in fill(prompt, top_k=top)
            ]
            for prompt in prompts
        ]
    generate = pipeline("text-generation", model=str(model_dir))
    assert generate.tokenizer is not None
    check_prompts(prompts, generate.tokenizer, masked=False)
    completions = []
    for prompt in prompts:
        room = generate.tokenizer.model_max_length - _length(prompt, generate.tokenizer)
        (generated,) = generate(
            prompt,
            max_new_tokens=min(new_tokens, room),
            max_length=None,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            return_full_text=False,
        )
        completions.append([generated["generated_text"]])
    return completions


def check_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, masked: bool
) -> None:
    """Raise UserError for a prompt that is too long, or for a masked model without one mask."""
    for prompt in prompts:
        shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
        if masked and prompt.count(str(tokenizer.mask_token)) != 1:
            raise UserError(
                f"prompt {shown} has {prompt.count(str(tokenizer.mask_token))} masks; this model "
                f"fills exactly one {tokenizer.mask_token}"
            )
        length, longest = _length(prompt, tokenizer), tokenizer.model_max_length - (not masked)
        if length > longest:
            raise UserError(
                f"prompt {shown} has {length:,} tokens; this model takes at most {longest:,}, "
                "shorten it"
            )


def _length(prompt: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(prompt, verbose=False)["input_ids"])


def show(model_dir: Path, prompts: Sequence[str], out: TextIO, **options: int) -> None:
    """Print what the model makes of each prompt."""
    for prompt, completions in zip(prompts, sample(model_dir, prompts, **options), strict=True):
        if len(completions) > 1:
            print(f"\n  {prompt}\n    {', '.join(completions)}", file=out)
        else:
            text = f"{prompt}\u2502{completions[0]}".strip("\n")
            print("\n" + "\n".join(f"  {line}" for line in text.splitlines()), file=out)
    out.flush()


def model_directory(path: Path) -> Path:
    """Return the model directory that ``path`` means: itself, or a run's final/.

    Raises UserError where neither holds a model.
    """
    for candidate in (path, path / "final"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UserError(
        f"{path} holds no model: neither {path / 'config.json'} nor {path / 'final'} is there; "
        "give a run directory whose training has ended, or a model directory"
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="shardwright sample", description=__doc__)
    parser.add_argument(
        "run_dir", type=Path, help="run directory, or a Hugging Face model directory"
    )
    parser.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    parser.add_argument(
        "--new-tokens", type=_positive, default=40, help="of a continuation (default 40)"
    )
    parser.add_argument("--top", type=_positive, default=5, help="fillings of a mask (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        show(
            model_directory(options.run_dir),
            options.prompt,
            sys.stdout,
            new_tokens=options.new_tokens,
            top=options.top,
            seed=options.seed,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
