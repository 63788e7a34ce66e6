"""Generate with a trained model: fill masks or continue prompts, by the model's kind."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from safetensors import SafetensorError

from shardwright.train.checkpoint.format.layout import MANIFEST
from shardwright.train.console import progress, terminal
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.model import user_modules
from shardwright.train.process import exhausted
from shardwright.train.process.arguments import path as path_of
from shardwright.train.process.logs import quiet_libraries
from shardwright.train.run_directory import final
from shardwright.train.run_directory.names import FINAL, OBJECTIVE_KEY

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARDED_STRATEGIES = ("fsdp", "fsdp_offload", "zero3", "zero3_offload")
"""Presets that divide the weights, so that ranks sample together from what none could hold."""


def sample(
    model_dir: Path,
    prompts: Sequence[str],
    *,
    new_tokens: int = 40,
    top: int = 5,
    steps: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    sharded: tuple[PreTrainedModel, torch.device] | None = None,
) -> list[list[str]]:
    """Return completions of each prompt by the model in a Hugging Face directory.

    ``sharded`` is that very model, when ranks hold it together, and where its computation takes
    place. Collective then: every rank makes the same forward passes and draws the same tokens.

    A causal model gives one continuation of at most ``new_tokens`` tokens (fewer where the model's
    positions end), drawn with temperature 0.7 from the 50 likeliest; a masked one the ``top``
    likeliest fillings as "token (probability)". One of masked diffusion continues a prompt, drawn
    alike, or returns it with all masks filled, as `Whole`; within ``steps`` passes, by default one
    for each mask. One of span corruption returns it with all spans filled, as `Whole`, by at most
    ``new_tokens`` tokens in all, drawn alike.

    Raises UserError where a prompt does not suit the model, or the directory's model cannot be
    loaded; Python code that comes with one is run with ``trust_remote_code`` only.
    """
    quiet_libraries()
    from transformers import set_seed

    set_seed(seed)
    check_code(model_dir, trusts_code=trust_remote_code)
    # Not None, for which transformers would ask on the terminal and wait.
    source: dict[str, Any] = {"model": str(model_dir), "trust_remote_code": trust_remote_code}
    if sharded is not None:
        source |= {"model": sharded[0], "tokenizer": str(model_dir)}
    objective = objective_of(model_dir)
    _check_steps(steps, objective)
    if objective == "span_corruption":
        assert sharded is None, "refused before ranks are started"
        return [[text] for text in _filled(prompts, model_dir, source, new_tokens)]
    if objective != "clm":
        fill = _loaded("fill-mask", model_dir, source)
        assert fill.tokenizer is not None
        if sharded is not None:
            fill.device = sharded[1]
        check_prompts(prompts, fill.tokenizer, objective)
        if objective == "diffusion":
            return [[_unmasked(p, fill, new_tokens, steps, seed)] for p in prompts]
        return [_fillings(prompt, fill, top) for prompt in prompts]
    return _continued(prompts, model_dir, source, new_tokens, sharded)


def _continued(
    prompts: Sequence[str],
    model_dir: Path,
    source: dict[str, Any],
    new_tokens: int,
    sharded: tuple[PreTrainedModel, torch.device] | None,
) -> list[list[str]]:
    """Return what a causal model makes of each prompt."""
    generate = _loaded("text-generation", model_dir, source)
    assert generate.tokenizer is not None
    if sharded is not None:
        generate.device = sharded[1]  # offloaded weights are elsewhere
    check_prompts(prompts, generate.tokenizer, "clm")
    completions: list[list[str]] = []
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
            # All continue until all have ended, whatever rounding made of their tokens.
            **({} if sharded is None else {"synced_gpus": True}),
        )
        text = generated["generated_text"]
        completions.append([text if new_tokens <= room else Cut(text, room, new_tokens)])
    return completions


def _fillings(prompt: str, fill: Any, top: int) -> list[str]:
    return [
        f"{found['token_str'].strip() or repr(found['token_str'])} ({found['score']:.0%})"
        for found in fill(prompt, top_k=min(top, fill.model.config.vocab_size))
    ]


class Whole(str):
    """A text that takes the prompt's place, instead of continuing it."""


class Cut(str):
    """A continuation for which the model has positions for fewer tokens than were asked for."""

    room: int
    asked: int

    def __new__(cls, text: str, room: int, asked: int) -> Cut:
        made = super().__new__(cls, text)
        made.room, made.asked = room, asked
        return made


def _unmasked(prompt: str, fill: Any, new_tokens: int, steps: int | None, seed: int) -> str:
    """Return what masked diffusion makes of a prompt, given the pipeline of its model."""
    from shardwright.train.sampling import unmasking

    def forward(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = fill.model(input_ids=ids[None].to(fill.device)).logits[0]
        return found

    options: dict[str, Any] = {"new_tokens": new_tokens, "steps": steps, "seed": seed}
    text, continues = unmasking.completed(prompt, forward, fill.tokenizer, **options)
    room = fill.tokenizer.model_max_length - _length(prompt, fill.tokenizer)
    if continues and new_tokens > room:
        return Cut(text, room, new_tokens)
    return text if continues else Whole(text)


def _filled(
    prompts: Sequence[str],
    model_dir: Path,
    source: dict[str, Any],
    new_tokens: int,
) -> list[Whole]:
    """Return prompts with what an encoder-decoder writes in place of their spans."""
    from shardwright.train.sampling import spans

    model, tokenizer = _loaded(None, model_dir, source)
    check_prompts(prompts, tokenizer, "span_corruption")

    def generate(inputs: dict[str, Any]) -> list[int]:
        (written,) = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.7,
            top_k=50,
        )
        return list(map(int, written[1:]))  # behind what the decoder begins with

    return [Whole(spans.completed(prompt, tokenizer, generate)) for prompt in prompts]


def _encoder_decoder(source: dict[str, Any]) -> Any:
    """Return model and tokenizer, for which transformers 5 has no pipeline any more."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    trusted = {"trust_remote_code": source["trust_remote_code"]}
    tokenizer = AutoTokenizer.from_pretrained(source["model"], **trusted)
    return AutoModelForSeq2SeqLM.from_pretrained(source["model"], **trusted), tokenizer


def _check_steps(steps: int | None, objective: str) -> None:
    """Raise UserError where passes are asked for of a model that has one for each token."""
    if steps is not None and objective != "diffusion":
        raise UserError(
            f"--steps={steps} is for models of objective=diffusion, which fill masks over several "
            f"passes, and this one is of objective={objective}; leave it out"
        )


def _loaded(task: str | None, model_dir: Path, source: dict[str, Any]) -> Any:
    """Return transformers' pipeline of a model. Raises UserError where it cannot be loaded.

    Without a task, an encoder-decoder and its tokenizer.

    What can be seen without loading is looked for first: libraries take some of it for another
    thing, and say so.
    """
    from transformers import pipeline

    from shardwright.train.checkpoint.format import damage

    if problem := next(damage.problems(model_dir), None):
        raise UserError(problem)
    try:
        if task is None:
            return _encoder_decoder(source)
        return pipeline(task, **source)  # type: ignore[call-overload]
    except (OSError, ValueError, KeyError, ImportError, AttributeError, SafetensorError) as error:
        if exhausted.explained(error) is not None:
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{model_dir} comes with Python code of its own, which is not run by default; "
                "read it, then add --trust-remote-code, or choose another model"
            ) from None
        # `pipeline` tries several classes and raises what it printed of each.
        said = [f"{type(error).__name__}: {error}", *str(error).splitlines()]
        reason = next(line for line in said[::-1] if re.match(r"\w+Error: ", line))
        raise UserError(
            f"{model_dir} holds a model that cannot be loaded ({reason.splitlines()[0]}); "
            "give one that `shardwright train` or `shardwright recover` has made, or a whole "
            "Hugging Face model directory"
        ) from None


def check_code(model_dir: Path, *, trusts_code: bool) -> None:
    """Raise UserError where a model needs Python code of its own, which may not be run."""
    import transformers

    from shardwright.train.model import remote_code

    tree = _config_of(model_dir)
    name = str(tree["architectures"][0])
    if remote_code.classes(tree) and not trusts_code and not hasattr(transformers, name):
        raise UserError(
            f"{model_dir} holds {name}, a model with Python code of its own "
            f"({remote_code.names(tree)}), which is not run by default; read it, then add "
            f"{remote_code.FLAG}"
        )


def objective_of(model_dir: Path) -> str:
    """Return by which objective the model in a Hugging Face directory answers."""
    tree = _config_of(model_dir)
    own = tree.get("auto_map")
    is_own = isinstance(own, dict) and "AutoModelForSeq2SeqLM" in own
    # Not by its name: decoders that also see pictures are "ForConditionalGeneration" as well.
    if is_own or tree.get("is_encoder_decoder"):
        return "span_corruption"
    if not is_masked(model_dir):
        return "clm"
    return str(_config_of(model_dir).get(OBJECTIVE_KEY, "mlm"))


def is_masked(model_dir: Path) -> bool:
    """Return whether the model in a Hugging Face directory fills masks."""
    tree = _config_of(model_dir)
    own = tree.get("auto_map")
    if isinstance(own, dict) and ("AutoModelForMaskedLM" in own) != ("AutoModelForCausalLM" in own):
        return "AutoModelForMaskedLM" in own
    return str(tree["architectures"][0]).endswith("ForMaskedLM")


def _config_of(model_dir: Path) -> dict[str, Any]:
    """Return a directory's config.json, which names its architecture. Raises UserError."""
    path = model_dir / "config.json"
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        from shardwright.train.checkpoint.format import damage

        raise UserError(damage.problem(path) or f"{path} cannot be read ({error})") from None
    names = tree.get("architectures") if isinstance(tree, dict) else None
    if not (isinstance(names, list) and names):
        raise UserError(
            f'{path} names no architecture; add "architectures", such as ["GPT2LMHeadModel"]'
        )
    return tree


def check_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, objective: str
) -> None:
    """Raise UserError for a prompt that is too long, or for a masked model without one mask.

    Of diffusion it may have any number of masks, and is continued where it has none; of span
    corruption any number of spans.
    """
    for prompt in prompts:
        shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
        if objective == "mlm" and prompt.count(str(tokenizer.mask_token)) != 1:
            raise UserError(
                f"prompt {shown} has {prompt.count(str(tokenizer.mask_token))} masks; this model "
                f"fills exactly one {tokenizer.mask_token}"
            )
        if objective == "span_corruption":
            from shardwright.train.data.tokens import sentinels
            from shardwright.train.sampling import spans

            spans.check(prompt, shown, len(sentinels.ids(tokenizer)))
        masks = objective != "clm" and str(tokenizer.mask_token) in prompt
        continues = not masks and objective != "span_corruption"
        length, longest = _length(prompt, tokenizer), tokenizer.model_max_length - continues
        if length > longest:
            raise UserError(
                f"prompt {shown} has {length:,} tokens; this model takes at most {longest:,}, "
                "shorten it"
            )


def _length(prompt: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(prompt, verbose=False)["input_ids"])


def show(model_dir: Path, prompts: Sequence[str], out: TextIO, **options: Any) -> None:
    """Print what the model makes of each prompt."""
    with progress.phase(f"loading {model_dir}"):
        completions = sample(model_dir, prompts, **options)
    print_completions(prompts, completions, out)


def print_completions(
    prompts: Sequence[str], all_completions: Sequence[Sequence[str]], out: TextIO
) -> None:
    """Print what `sample` has returned."""
    for prompt, completions in zip(prompts, all_completions, strict=True):
        if len(completions) > 1 or isinstance(completions[0], Whole):
            indented = "\n    ".join(", ".join(completions).splitlines())
            print(f"\n  {prompt}\n    {indented}", file=out)
        else:
            text = f"{prompt}\u2502{completions[0]}".strip("\n")
            print("\n" + "\n".join(f"  {line}" for line in text.splitlines()), file=out)
        if isinstance(completion := completions[0], Cut):
            print(
                f"  (at most {completion.room:,} of {completion.asked:,} new tokens: the model has "
                "no more positions behind this prompt)",
                file=out,
            )
    out.flush()


def model_directory(path: Path) -> Path:
    """Return the model directory that ``path`` means: itself, or a run's final/.

    Raises UserError where neither holds a model, or a run has gone past the one that it had.
    """
    if (path / MANIFEST).is_file():  # beside the model's config.json
        run_dir = path.absolute().parent.parent
        raise UserError(
            f"{path} is a checkpoint, in the shards of the engine that trained it; give its run "
            f"directory {run_dir}, whose final/ is read once the training has ended, or "
            f"make a model directory with `shardwright recover {path} OUT`"
        )
    for candidate in (path, path / FINAL):
        if (candidate / "config.json").is_file():
            return candidate
    for run_dir in (path, path.parent) if path.name == FINAL else (path,):
        if earlier := final.earlier(run_dir):
            raise UserError(final.why_earlier(run_dir, earlier))
    raise UserError(
        f"{path} holds no model: neither {path / 'config.json'} nor {path / FINAL} is there; "
        "give a run directory whose training has ended, or a model directory"
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright sample`."""
    found = argparse.ArgumentParser(prog="shardwright sample", description=__doc__)
    found.add_argument(
        "run_dir",
        type=path_of,
        metavar="RUN_DIR",
        help="run directory, or a Hugging Face model directory",
    )
    found.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        required=True,
        help="may be given several times",
    )
    found.add_argument(
        "--new-tokens",
        type=_positive,
        metavar="N",
        default=40,
        help="of a continuation (default 40)",
    )
    found.add_argument(
        "--top", type=_positive, metavar="N", default=5, help="fillings of a mask (default 5)"
    )
    found.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="passes in which a model of diffusion fills its masks (default: one for each)",
    )
    found.add_argument("--seed", type=int, metavar="N", default=0)
    found.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; read it first",
    )
    user_modules.add_flag(found)
    found.add_argument(
        "--strategy",
        help=f"divide the weights among ranks: {', '.join(SHARDED_STRATEGIES)} (default: one "
        "process holds the whole model)",
    )
    found.add_argument(
        "--nproc-per-node",
        type=_positive,
        metavar="N",
        help="ranks under --strategy (default: one for each GPU, or 1 on a CPU)",
    )
    return found


def check_strategy(strategy: str | None, nproc_per_node: int | None) -> None:
    """Raise UserError for a strategy that does not divide the weights, or ranks without one."""
    choices = ", ".join(SHARDED_STRATEGIES)
    if strategy is None and nproc_per_node is not None:
        raise UserError(
            f"--nproc-per-node={nproc_per_node} is for several ranks that hold the model together; "
            f"add --strategy ({choices}), or leave it out"
        )
    if strategy is not None and strategy not in SHARDED_STRATEGIES:
        raise UserError(
            f"--strategy={strategy} does not divide the weights of a model that only generates; "
            f"choose one of {choices}, or leave it out"
        )


def check_can_be_divided(model_dir: Path, strategy: str) -> None:
    """Raise UserError where ranks cannot sample together from a model."""
    if objective_of(model_dir) == "span_corruption":
        raise UserError(
            f"--strategy={strategy} gathers weights for the forward pass of a whole model, and "
            f"who generates with an encoder-decoder, as {model_dir} holds one, calls its encoder "
            "by itself; leave --strategy out: one process holds the model then"
        )


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    assert options.strategy is None, "the launcher starts ranks for that"
    try:
        with progress.shown_on(sys.stderr):
            model_dir = model_directory(options.run_dir)
            user_modules.import_for(model_dir, options.imports)
            show(
                model_dir,
                options.prompt,
                sys.stdout,
                new_tokens=options.new_tokens,
                top=options.top,
                steps=options.steps,
                seed=options.seed,
                trust_remote_code=options.trust_remote_code,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (MemoryError, RuntimeError, OSError) as error:
        why = exhausted.explained(error, remedies=smaller(options.run_dir))
        if why is None:
            raise
        print(f"error: {why}", file=sys.stderr)
        return FAILED
    return 0


def smaller(place: Path) -> tuple[str, ...]:
    """Return what takes less memory of the model that a path means."""
    with suppress(UserError):
        if objective_of(model_directory(place)) == "span_corruption":
            return (_FEWER_TOKENS,)  # ranks cannot divide it
    return (
        "--strategy fsdp --nproc-per-node N, which divides the model among N ranks",
        _FEWER_TOKENS,
    )


_FEWER_TOKENS = "fewer --new-tokens"


if __name__ == "__main__":
    sys.exit(terminal.run(main))
