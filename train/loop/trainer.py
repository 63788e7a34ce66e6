"""The one training loop: transformers' Trainer with our data order, loss, evaluation and saves."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from shardwright.train.checkpoint.format.layout import TRAINER_STATE
from shardwright.train.config import MaskedFields, MlmObjective, Rhythm, Schedule, batch_sizes
from shardwright.train.console import progress
from shardwright.train.data.batches import first_batch
from shardwright.train.data.batches.collator import LABEL_WEIGHTS, PADDING, PREDICTABLE
from shardwright.train.errors import Diverged, UserError
from shardwright.train.loop import divergence, evaluation, lean, step_times
from shardwright.train.loop.ahead import Ahead, counted
from shardwright.train.loop.callbacks.averages import Averages
from shardwright.train.loop.callbacks.garbage import GarbageCollection
from shardwright.train.loop.callbacks.handler import Callbacks
from shardwright.train.loop.callbacks.own import OwnCallbacks
from shardwright.train.loop.callbacks.recurring import Recurring
from shardwright.train.loop.callbacks.schedule import EveryStepCounts
from shardwright.train.loop.noise_scale import NoiseScale
from shardwright.train.loop.numerics.watch import Watch
from shardwright.train.loop.profiling.profiler import Profiler
from shardwright.train.loop.saving.saver import Saver
from shardwright.train.loop.spikes.respond import respond
from shardwright.train.loop.spikes.rollback import RolledBack
from shardwright.train.loop.spikes.watch import WINDOW, SpikeWatch
from shardwright.train.model import build as models
from shardwright.train.model import host_checks, neftune
from shardwright.train.model.head_loss import HeadLoss
from shardwright.train.model.labelled_head import LabelledHead, positions_of
from shardwright.train.model.loss_terms import (
    EQUAL,
    IGNORED,
    NONE,
    LossTerms,
    Weighting,
    summed,
)
from shardwright.train.model.own_loss import OwnLoss
from shardwright.train.optimizer import build as optimizer
from shardwright.train.process import heartbeat, numerics, signals
from shardwright.train.process.agreement import check, from_all
from shardwright.train.process.doubles import device_of_sums, doubled
from shardwright.train.process.heartbeat import Phase
from shardwright.train.strategy import finite
from shardwright.train.strategy.loss_scale import (
    keep_beside_gradients,
    loss_scale_is_exhausted,
    loss_scale_state,
)
from shardwright.train.strategy.state.average import Average, Learned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from accelerate.utils import KwargsHandler

    from shardwright.train.loop.callbacks.publishing import Publishing
    from shardwright.train.loop.callbacks.tracking import Tracking
    from shardwright.train.loop.resuming import Resumed
    from shardwright.train.model.weights import InitialValues
    from shardwright.train.strategy.engine import Engine

METRICS = ("eval_loss", "eval_perplexity", "eval_masked_accuracy", "eval_own_loss")
"""What an evaluation measures, the third with masked models only, the last with an own loss."""
BATCHES_BETWEEN_CHECKS = 4
"""Of an evaluation, for a signal to stop."""
POSITIONS = "label_positions"
"""In a batch, the positions that are."""

lean.import_trainer()


class Trainer(transformers.Trainer):
    """Trains on batches whose labels are aligned with the logits."""

    model: transformers.PreTrainedModel
    model_wrapped: Any
    """The live engine: DDP's or DeepSpeed's wrapper, or the model itself."""
    before_clipping: Callable[[], object] | None = None
    """Called in each step once its gradients are reduced, where the engine leaves that to us."""
    see_local_gradients: Callable[[torch.Tensor], object] | None = None
    """Called with what a rank hands to be averaged, where the engine shows that."""
    tracking: Tracking | None = None
    """On rank 0, what hands metrics on."""
    publishing: Publishing | None = None
    """On rank 0, what pushes the run to a hub."""
    weights_of_step = 0
    """Where nothing is trained, the step of the weights that are evaluated."""
    _is_on_several_meshes = False
    _is_data_checked = False

    def __init__(
        self,
        engine: Engine,
        args: transformers.TrainingArguments,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        train_loader: DataLoader,
        eval_loader: DataLoader | None,
        values: InitialValues,
        schedule: Schedule,
        rhythm: Rhythm,
        resumed: Resumed | None = None,
    ) -> None:
        self.engine, self.config, self.layout = engine, engine.config, engine.layout
        self.schedule, self.rhythm = schedule, replace(rhythm, samples_at=self.samples_at)
        self.resumed = resumed
        """The checkpoint from which the run is resumed; None where it begins."""
        self.initial_values = values
        """The model's first values in fp32, until the engine is complete."""
        assert args.output_dir is not None
        self.run_dir = Path(args.output_dir)
        self._train_loader, self._eval_loader = train_loader, eval_loader
        self.saved_step = resumed.step if resumed else None
        """Step of the newest whole checkpoint of this training."""
        self.tokens_seen = resumed.tokens if resumed else 0
        """Tokens trained on by all ranks, padding left out."""
        super().__init__(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=train_loader.dataset,
            eval_dataset=eval_loader.dataset if eval_loader else None,
            compute_loss_func=self._step_loss,
        )
        if engine.places_model:
            where = next(model.parameters()).device
            keep_beside_gradients(self.accelerator.scaler, where)
        self._prepare_model(model)
        self.spikes = SpikeWatch.of(self, resumed, partial(respond, self))
        self.gate = finite.Gate(args.device, self.spikes)
        self.watch = Watch(self.config.trainer.debug, self.run_dir, args.process_index)
        self.profiler = Profiler(self.config.trainer, self.rhythm, self.run_dir, args)
        self._ahead: Ahead | None = None
        """The next step, where all ranks are being told of it."""
        self._next_micro_batches: tuple[Iterator, int] = iter(()), 0
        """Where the next step's come from, and how many it has."""
        self._parameters: list[torch.nn.Parameter] = []
        """Those of the live engine; to find them takes as long as a small step."""
        # The loss is ours: the model needs neither labels nor their number.
        self.model_accepts_loss_kwargs = False
        self._auxiliary_coefficient = models.auxiliary_coefficient(model)
        self.auxiliary_loss: torch.Tensor | None = None
        """This rank's part of the model's auxiliary losses since the last logged step, each the
        mean of a step; None where the model has none."""
        if self._auxiliary_coefficient:
            self.auxiliary_loss = torch.zeros((), device=args.device)
        self.held_out_batches_not_finite = 0, 0
        """How many batches of the last evaluation, over all ranks, were not finite; of how many."""
        self._label_loss: torch.Tensor | None = None
        """Of a micro-batch, without the auxiliary one."""
        self.average = self._average()
        """The average of the weights, where one is kept."""
        self.noise_scale = NoiseScale(self) if self.config.trainer.debug.noise_scale else None
        if self.noise_scale is not None and self.noise_scale.sees_buckets:
            self.see_local_gradients = self.noise_scale.add_local
        self._is_first_micro_batch = True
        self.garbage = GarbageCollection(self.config.trainer.collect_garbage_every_steps)
        self.saver = Saver(self)
        self._replace_callbacks()

    def _prepare_model(self, model: transformers.PreTrainedModel) -> None:
        """Have the model's head and embeddings do what the objective asks for."""
        self.labelled_head: LabelledHead | None = None
        objective, data = self.config.objective, self.config.data
        self._weighting = EQUAL
        """Of the batch that the model is given."""
        if isinstance(objective, MaskedFields) and objective.head_on_labels_only:
            self.labelled_head = LabelledHead(model)
        if objective.neftune_noise_alpha:
            sample_length = data.tokens_per_sample if data.is_unpadded else None
            neftune.enable(model, objective.neftune_noise_alpha, sample_length)
        host_checks.take_padding_as_known(model)
        fuses = self.config.trainer.fused_loss
        assert fuses != "auto", "decided by the model, `models.fitted`"
        self._terms, self._own_loss = LossTerms.of(objective), OwnLoss.of(objective)
        self.head_loss = HeadLoss(model, self._terms) if fuses else None

    def _average(self) -> Average | Learned | None:
        trainer, own = self.config.trainer, partial(self.engine.own_weights, self)
        if (learned := optimizer.KINDS[trainer.optimizer].learned) is not None:
            moments = partial(self.engine.own_moments, self, learned.moment)
            made_of = learned.of(trainer)
            return Learned(trainer.optimizer, own, moments, made_of)
        return None if trainer.average_weights is None else Average(trainer, own)

    def _replace_callbacks(self) -> None:
        self.step_times = step_times.StepTimes()
        before = self.callback_handler
        checkpoint = self.resumed.checkpoint if self.resumed else None
        self._own_callbacks = OwnCallbacks(self.config.trainer.callbacks, checkpoint)
        self.callback_handler: Callbacks = Callbacks(
            before.callbacks, self.model, self.processing_class, self.optimizer, self.lr_scheduler
        )
        self.callback_handler.name_of = self._own_callbacks.name_of
        self.remove_callback(transformers.PrinterCallback)
        # The schedule advances before what saves and logs.
        callbacks = (
            self.step_times,
            self.profiler,
            self.garbage,
            EveryStepCounts(self),
            Recurring(self.rhythm),
            *([Averages(self.average)] if self.average is not None else []),
            self.saver,
        )
        for callback in callbacks:
            self.add_callback(callback)

    def add_own_callbacks(self) -> None:
        """Add those of the user's own, which come after all others."""
        for callback in self._own_callbacks.made.values():
            self.add_callback(callback)
            self.callback_handler.tell(callback, "on_init_end", self.args, self.state, self.control)

    @property
    def samples_seen(self) -> int:
        """Samples trained on by all ranks: the position in the data."""
        return self.samples_at(self.state.global_step)

    def samples_at(self, step: int) -> int:
        """Return the position in the data after so many steps of the run."""
        first, samples = (self.resumed.step, self.resumed.samples) if self.resumed else (0, 0)
        return batch_sizes(self.config.trainer).after(samples, step - first)

    @property
    def masking_rate(self) -> float | None:
        """Share of tokens that were to be predicted in the last step; None where it is constant."""
        objective = self.config.objective
        if not isinstance(objective, MlmObjective) or objective.masking_rate_final is None:
            return None
        first = self.resumed.step if self.resumed is not None else 0
        done = self.schedule.progress_after(self.state.global_step - 1 - first)
        return objective.masking_rate_at(done)

    @property
    def batch_size(self) -> int:
        """Samples of the last step, over all ranks."""
        step, resumed = self.state.global_step, self.resumed
        if resumed is not None and step <= resumed.step and resumed.progress.batch_size:
            return round(resumed.progress.batch_size)
        return self.samples_at(step) - self.samples_at(step - 1)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Leave a model alone that its engine has placed.

        Offloaded DTensors would take the device of their mesh, and FSDP2 brings only their local
        part back: its first forward pass raises (torch 2.13, FSDPParam.reset_sharded_param).
        """
        if not self.engine.places_model:
            super()._move_model_to_device(model, device)

    # --- data: our loaders already give each rank its own part --------------------------------

    def get_train_dataloader(self) -> DataLoader:
        return self._train_loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        assert self._eval_loader is not None
        return self._eval_loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """Return one step's micro-batches and the number of labels in them, over all ranks.

        There are none where a run is resumed from its last step, as one does that was killed later.
        Raises, before anything of the step is done, Diverged where one before was not finite,
        Stop where a rank was told to and RolledBack where the run is to go back.
        """
        if self.control.should_training_stop:  # by the evaluation that a stop had cut short
            return [], None
        step = self.state.global_step + 1
        heartbeat.step_begins(step)
        self.profiler.step_begins(step)
        self.step_times.begin()
        self._next_micro_batches = epoch_iterator, num_batches
        ahead, self._ahead = self._ahead or self._look_ahead(step), None
        if not ahead.batches:
            return [], None
        agreed = ahead.agreed()
        if agreed.alarms:
            raise self._diverged(self.state.global_step)
        if agreed.losses_not_finite or agreed.norms_not_finite:
            assert ahead.judged is not None
            raise self._diverged(ahead.judged.step)
        if agreed.stops:
            raise signals.Stop
        if self.spikes is not None:
            self.spikes.begin(step)
        self.profiler.agreed(step, self.state.max_steps, is_asked=agreed.profiles > 0)
        self.step_times.agree(ahead.times)
        self.gate.begin()
        self._is_first_micro_batch = True
        self.tokens_seen += agreed.tokens
        batches = [self._with_positions(batch) for batch in ahead.batches]
        # Filled on the device, as a copy would make the host wait for what is computed there.
        return batches, torch.full((), max(agreed.labels, 1), dtype=torch.int64, device=device)

    def _look_ahead(self, step: int) -> Ahead:
        """Fetch the micro-batches of a step to come and begin to tell the other ranks of them."""
        iterator, count = self._next_micro_batches
        with self.step_times.waiting_for_data(), self.profiler.data():
            batches = list(itertools.islice(iterator, count))
        if batches and not self._is_data_checked:
            self._check_data(batches)
        labels, tokens = counted(batches, IGNORED)
        return Ahead(
            batches,
            labels=labels,
            tokens=tokens,
            stops=signals.asked() is not None,
            judged=self.gate.newest_known(),
            alarm=self.watch.finding is not None,
            profile=self.profiler.take_request(),
            times=self.step_times.take() if self.rhythm.is_logged(step) else (),
        )

    def _with_positions(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch with where its labels are, found while it is in host memory.

        Without what only its tokens are counted by.
        """
        batch = {name: value for name, value in batch.items() if name != PADDING}
        if self.labelled_head is None:
            return batch
        positions = positions_of(batch["labels"], IGNORED)
        if self.args.device.type == "cuda":
            positions = positions.pin_memory()  # as the loader has done with the rest
        return {**batch, POSITIONS: positions}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device, for which the host does not wait."""
        device = self.args.device
        return {name: _moved(value, device) for name, value in inputs.items()}

    def _check_data(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Raise UserError where the model cannot be trained on the first batches."""
        self._is_data_checked = True
        embedding: Any = self.model.get_input_embeddings()
        head: Any = self.model.get_output_embeddings()
        rows = embedding.num_embeddings
        sampler: Any = self._train_loader.batch_sampler
        length, stages = self.config.data.tokens_per_sample, sampler.stages
        if stages is not None:
            length = stages.lengths[stages.at(self.samples_seen)]
        first_batch.check(
            batches,
            sizes=[len(part) for part in sampler.parts(self.samples_seen)],
            sequence_length=length,
            embedding_rows=rows,
            logits=getattr(head, "out_features", rows),
            targets=self._targets(length),
        )

    def _targets(self, sequence_length: int) -> int | None:
        """Return how many tokens a decoder writes of a sample; None where there is one stack."""
        objective = self.config.objective
        written = objective.positions(sequence_length) - sequence_length
        return written if objective.is_encoder_decoder else None

    # --- whether the step was finite ----------------------------------------------------------

    def check_finite(self, *, weights: bool = False) -> None:
        """Raise Diverged, on all ranks alike, where this step was not finite. Collective.

        With ``weights`` also where they are not, or too large: an update can overflow on its own.
        Raises RolledBack where this step was a spike from which the run is to go back.
        """
        seen = self.gate.last()
        counts = [number for numbers in seen for number in numbers.not_finite]
        alarm = int(self.watch.finding is not None)
        verdict = torch.tensor([*counts, alarm, 0], device=self.args.device)
        if weights:
            verdict[-1] += ~self._weights_are_sound()
        *counts, alarms, damaged = self.accelerator.reduce(verdict, "sum").tolist()
        for index, numbers in enumerate(seen):
            if any(counts[2 * index : 2 * index + 2]):
                raise self._diverged(numbers.step)
        if alarms or damaged:
            raise self._diverged(self.state.global_step)
        if self.spikes is not None:
            self.spikes.settle()

    def _weights_are_sound(self) -> torch.Tensor:
        mine = self.engine.local_weights(self)
        largest = self.config.precision.computes_in.largest_weight
        return finite.are_sound(mine, self.args.device, largest)

    def _diverged(self, step: int) -> Diverged:
        """Return what is to be raised on all ranks of a step that was not finite. Collective."""
        # Closes the progress bar and the trackers, and waits for the checkpoint in flight.
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        seen = {numbers.step: numbers for numbers in self.gate.last()}
        numbers = seen.get(step, finite.Numbers(step, 0.0, 0.0))
        sound = bool(self._weights_are_sound())
        watched = self.watch.finding
        found = from_all(divergence.Found(numbers.loss, numbers.norm, sound, watched))
        text = divergence.message(
            self.run_dir,
            step,
            found,
            learning_rate=self.config.trainer.learning_rate,
            began_at=self.resumed.step if self.resumed else None,
        )
        return Diverged(text)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; raise UserError where an operation is met that cannot be what was asked for."""
        try:
            with self.garbage.in_force():
                trained = super().train(*args, **kwargs)
            if self._ahead is not None:  # a callback of the user's own has stopped it
                self._ahead.agreed()
            return trained
        except RuntimeError as error:
            if (problem := numerics.refused(error)) is None:
                raise
            raise UserError(problem) from error
        except (Diverged, RolledBack, signals.Stop):
            # All ranks come here alike; no collective is to be left when they leave the group.
            if self._ahead is not None:
                self._ahead.agreed()
            raise
        finally:
            # A loader's workers end when nothing holds its iterator. Where the garbage collector
            # finds that, their queues are closed before they are told (torch 2.13, dataloader.py),
            # and each of them is waited for in vain for 5 s.
            self._next_micro_batches = iter(()), 0

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Compute one micro-batch forward and backward, and return its part of the step's loss.

        As the Trainer's (transformers 5.23), without what of it no run of ours needs: it sets the
        mode of every module and divides the loss by 1 each time.
        """
        if not model.training:
            model.train()
        heartbeat.now(Phase.COMPUTE)
        inputs = self._prepare_inputs(inputs)
        with self.watch.micro_batch(self.state.global_step + 1, self._loss_scale()):
            with host_checks.batches_have_documents("position_ids" in inputs):
                loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            self.watch.saw_loss(loss)
            self.gate.add_loss(loss)  # before DeepSpeed updates by it
            if self.is_deepspeed_enabled:
                self.accelerator.backward(loss, scale_wrt_gas=False)
            elif self.accelerator.scaler is not None:
                self.accelerator.backward(loss)
            else:
                loss.backward()
                self.step_times.backward_ends()
        if self._is_first_micro_batch and self.noise_scale is not None:
            self._is_first_micro_batch = False
            if not self.noise_scale.sees_buckets:
                self.noise_scale.micro_batch_ends(self._parameters)
        loss = loss.detach()
        # What is logged can be compared with that of held-out samples, and from model to model.
        if self._label_loss is None:
            return loss
        # As the Trainer scales a loss whose gradients the engine averages over all ranks but those
        # that divide matrices (transformers 5.23, training_step).
        return self._label_loss * (self.layout.world_size // self.layout.tensor)

    def _loss_scale(self) -> float | None:
        """Return what losses are multiplied by, where somebody watches; None where none are."""
        return loss_scale_state(self).get("scale") if self.watch.is_needed else None

    # --- loss and evaluation ------------------------------------------------------------------

    @staticmethod
    def loss(
        outputs: Any,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | None = None,
        terms: LossTerms = NONE,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return summed cross entropy over ``num_items_in_batch`` labels of the whole step.

        With what ``terms`` add of each of them, times each one's own of ``weights``.

        Every rank divides by the same global number, so that neither accumulation nor the world
        size changes what a label weighs. ``logits`` (batch, sequence, vocabulary), ``labels``
        (batch, sequence); or both flat, and without what has no label; or in place of logits the
        sum itself, as `HeadLoss` gives it.
        """
        total: torch.Tensor = outputs.logits
        if total.dim() > 0:
            total = summed(total.flatten(0, -2), labels.flatten().to(total.device), terms, weights)
        count = labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    def _step_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        """Return what a micro-batch adds to the loss of the step, the model's auxiliary one too.

        That one is a mean over the tokens of the micro-batch, and so counts by its share of the
        step's labels, or of what these are weighted by: over all micro-batches and ranks the
        shares add up to 1.
        """
        self._check_head(outputs.logits, labels)
        weights, tokens = self._weighting
        if self._own_loss is None:
            loss = self.loss(outputs, labels, num_items_in_batch, self._terms, weights)
        else:
            own = self._own_loss.summed(outputs.logits, labels, weights)
            loss = own / num_items_in_batch
        if self.auxiliary_loss is not None:
            self._label_loss = loss.detach()
            counted = labels.ne(IGNORED).sum().to(loss.device) if tokens is None else tokens
            share = counted / num_items_in_batch
            if outputs.aux_loss is None:
                raise UserError(
                    f"{type(outputs).__name__} of this model returns no auxiliary loss, which "
                    "its config requires to balance the experts; set its coefficient to 0 in "
                    "config.json to train without, or choose another model"
                )
            auxiliary = torch.as_tensor(outputs.aux_loss, device=loss.device).float() * share
            self.auxiliary_loss += auxiliary.detach()
            loss = loss + self._auxiliary_coefficient * auxiliary
        return finite.poisoned(loss)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.auxiliary_loss is not None:
            inputs = {**inputs, models.ROUTER_LOGITS: True}
        with self._at_labels(inputs) as inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def _at_labels(
        self, batch: dict[str, Any], *, counts: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Have the head do in the block no more than it has to for a batch, and give that batch.

        Its labels, and what they count for, are those of what the head then sees, flat.
        """
        batch = dict(batch)
        batch["labels"] = batch["labels"].flatten()
        weights, tokens = batch.pop(LABEL_WEIGHTS, None), batch.pop(PREDICTABLE, None)
        weights = None if weights is None else weights.flatten()
        with ExitStack() as block:
            if self.labelled_head is not None:
                positions = batch.pop(POSITIONS)
                batch["labels"] = batch["labels"][positions]
                weights = None if weights is None else weights[positions]
                block.enter_context(self.labelled_head.at(positions))
            if self.head_loss is not None:
                asked = self.head_loss.of(batch["labels"], counts=counts, weights=weights)
                block.enter_context(asked)
            self._weighting = Weighting(weights, tokens)
            yield batch

    def _check_head(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Raise UserError where the model did not do in `_at_labels` what it was to do."""
        if self.head_loss is not None:
            self.head_loss.check(logits)
        elif self.labelled_head is not None:
            self.labelled_head.check(logits, labels)

    def _predicted(self, model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the summed loss of a batch, how many labels are predicted right, by how many
        tokens the loss is divided, how many samples have a label, and what a loss of the user's own
        sums up to, or 0."""
        batch = self._prepare_inputs(self._with_positions(batch))
        samples = batch["labels"].ne(IGNORED).any(-1).sum()
        with self._at_labels(batch, counts=True) as batch:
            labels = batch.pop("labels")
            kept, (weights, tokens) = labels.ne(IGNORED), self._weighting
            count = kept.sum() if tokens is None else torch.full_like(samples, tokens)
            logits = model(**batch).logits
            self._check_head(logits, labels)
            if self.head_loss is not None:
                right = self.head_loss.right
                return [logits, right, count, samples, torch.zeros_like(logits)]
        logits = logits.flatten(0, -2)
        loss = summed(logits, labels, weights=weights)
        own = torch.zeros_like(loss)
        if self._own_loss is not None:
            own = self._own_loss.summed(logits, labels, weights)
        right = (logits.argmax(-1).eq(labels) & kept).sum()
        return [loss, right, count, samples, own]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return loss and perplexity over all held-out labels, and accuracy for masked ones.

        Of each held-out set seven sums are kept and reduced, never logits. Every rank makes as many
        forward passes as the others, as sharded engines need. Raises Stop where a rank was told to.
        """
        dataset: Any = dataloader.dataset
        average = self.average if self.average is not None and self.average.taken else None
        replaced = average is not None and average.replaces_weights
        with self._average_shown() if replaced else nullcontext():
            reduced = self._held_out_sums(dataloader, "evaluating")
        whole = evaluation.total(dataset.sets, reduced)
        self.held_out_batches_not_finite = int(whole.not_finite), int(whole.batches)
        objective = self.config.objective
        kinds = {
            "masked": objective.kind == "mlm",
            "has_own_loss": objective.loss is not None,
            "is_code": not objective.is_encoder_decoder,
        }
        measured = dict(evaluation.metrics(dataset.sets, reduced, **kinds))
        if self.config.trainer.average_evaluated and average is not None:
            with self._average_shown():
                of_average = self._held_out_sums(dataloader, "evaluating the average of")
            found = evaluation.metrics(dataset.sets, of_average, **kinds)
            measured |= {f"average_{name}": value for name, value in found}
        return EvalLoopOutput(
            predictions=(),  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in measured.items()},
            num_samples=int(sum(row.samples for row in reduced)),
        )

    @contextmanager
    def _average_shown(self) -> Iterator[None]:
        """Have forward passes in the block take the average of the weights. Collective."""
        assert self.average is not None
        copies = [(n, start, v.detach().clone()) for n, start, v in self.engine.own_weights(self)]
        try:
            self.engine.show(self, list(self.average.own_weights()))
            yield
        finally:
            self.engine.show(self, copies)

    def _held_out_sums(self, dataloader: DataLoader, what: str) -> list[evaluation.Sums]:
        """Return what all ranks together find of each held-out set. Collective."""
        step = self.state.global_step or self.weights_of_step
        shown: dict[str, Any] = {
            "name": f"{what} step {step}" if step else what,
            "kind": "evaluating",
            "total": len(dataloader),
            "unit": "batch",
            "comes_again": True,
        }
        model = self.model_wrapped
        model.eval()
        dataset: Any = dataloader.dataset
        sampler: Any = dataloader.batch_sampler
        of_sets, sets = list(sampler.sets()), dataset.sets
        device = device_of_sums(self.args.device)
        sums = torch.zeros((len(sets), 7), dtype=torch.float64, device=device)
        try:
            with torch.no_grad(), heartbeat.at(Phase.EVALUATION):
                for number, batch in enumerate(progress.over(dataloader, **shown)):
                    heartbeat.moved()
                    if number % BATCHES_BETWEEN_CHECKS == 0:
                        check()
                    found = torch.stack([doubled(each) for each in self._predicted(model, batch)])
                    of_set = sums[of_sets[number]]
                    of_set[:4] += found[:4]
                    of_set[4] += ~found[0].isfinite()
                    of_set[5] += 1
                    of_set[6] += found[4]
        finally:
            model.train()
            self.engine.after_evaluation(self)
        return [evaluation.Sums(*row) for row in self.accelerator.reduce(sums, "sum").tolist()]

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        with self.garbage.left_to_python():
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        at_start = skip_scheduler
        step = self.state.global_step
        is_saved = step == self.state.max_steps or self.rhythm.is_due(self.rhythm.save, step)
        if at_start and step and is_saved:
            self.saver.save()  # a manifest carries what was evaluated at its step
        return metrics

    # --- resuming from a checkpoint -----------------------------------------------------------

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Begin at the checkpoint's step: our data begins there too, so nothing is skipped."""
        super()._init_training_state(*args, **kwargs)
        if self.resumed is not None:
            path = self.resumed.checkpoint / TRAINER_STATE
            before = transformers.TrainerState.load_from_json(str(path))
            for name in ("global_step", "epoch", "log_history", "best_metric", "best_global_step"):
                setattr(self.state, name, getattr(before, name))
        return 0, 0

    # --- engine -------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = optimizer.build(self.config, self.model, decayed, self.engine.adamw)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Have the learning rate follow our schedule; it may go by samples instead of steps."""
        if self.lr_scheduler is None:
            found = self.optimizer if optimizer is None else optimizer
            assert found is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(found, self.schedule)
            self._created_lr_scheduler = True
            if not self.is_deepspeed_enabled and self.accelerator.scaler is None:
                _step_directly(found)
        return self.lr_scheduler

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        self.step_times.watch(model)
        if not self.is_deepspeed_enabled:
            parameters = list(model.parameters())

            def zero_grad(set_to_none: bool = True) -> None:
                del set_to_none
                for parameter in parameters:
                    parameter.grad = None

            # A module looks for its parameters each time.
            model.zero_grad = zero_grad
            self._parameters = parameters
            meshes = {getattr(parameter, "device_mesh", None) for parameter in parameters}
            self._is_on_several_meshes = len(meshes) > 1
        return model, loader

    def forward_only(self) -> None:
        """Make forward passes of what the engine has placed, in place of a training. Collective."""
        self.initial_values = {}  # they may hold the whole model
        model = self.engine.forward_only(self.model)
        if not self.is_deepspeed_enabled:
            # With autocast, where a training has it, and without DDP.
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.model_wrapped = model

    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer behind accelerate's wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def innermost_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer that does the arithmetic, behind DeepSpeed's wrapper too."""
        optimizer: Any = self.torch_optimizer()
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        from accelerate.utils import DistributedDataParallelKwargs

        built = super()._build_accelerator_args(**kwargs)
        for handler in built.get("kwargs_handlers") or []:
            if isinstance(handler, DistributedDataParallelKwargs):
                # Of which TrainingArguments has no field.
                handler.gradient_as_bucket_view = True
        if self.args.fp16:
            from accelerate.utils import GradScalerKwargs

            handlers: list[KwargsHandler] = list(built.get("kwargs_handlers") or [])
            scaler = GradScalerKwargs(
                init_scale=self.config.precision.initial_loss_scale,
                growth_interval=self.config.precision.loss_scale_growth_steps,
            )
            built["kwargs_handlers"] = [*handlers, scaler]
        return built

    def _clip_grad_norm(self, model: Any) -> Any:
        return self._norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the reduced gradients, where it was computed; this ends the step.

        The numbers of the next one are on their way from here on, so that they are there when the
        optimizer is done.
        """
        heartbeat.now(Phase.OPTIMIZER)
        norm = self._norm(math.inf) if grad_norm is None else grad_norm
        if hasattr(norm, "full_tensor"):  # a DTensor holds only this rank's part
            norm = norm.full_tensor()
        self.gate.judge(norm, is_bad=loss_scale_is_exhausted(self))
        step = self.state.global_step + 1
        if self.noise_scale is not None:
            self.noise_scale.step_ends(norm, self.samples_at(step) - self.samples_at(step - 1))
        self.gate.conclude(step)
        if not self.rhythm.is_interrupted(step, self.state.max_steps):
            self._ahead = self._look_ahead(step + 1)
        return norm

    def _norm(self, largest: float) -> Any:
        """Return the gradients' norm, and have none larger than allowed; DeepSpeed has done so."""
        if self.is_deepspeed_enabled:
            return self.model_wrapped.get_global_grad_norm()
        if self.before_clipping is not None:
            self.before_clipping()
        if self.accelerator.scaler is None and not self._is_on_several_meshes:
            return torch.nn.utils.clip_grad_norm_(self._parameters, largest)
        return self.accelerator.clip_grad_norm_(self._parameters, largest)

    # What the Trainer counts of its own accord: nobody reads it, and each time it looks at every
    # module, and all ranks meet for it where they log.

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    def store_flos(self) -> None:
        pass

    # --- the end ------------------------------------------------------------------------------

    def own_files(self) -> dict[str, str]:
        window = {} if self.spikes is None else {WINDOW: self.spikes.window.to_json()}
        return window | self._own_callbacks.files()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.saver.save()

    def save_if_not_saved(self) -> None:
        """Write a checkpoint of the last step, where the cadence has not written it."""
        self.saver.save_last()

    def end_companions(self, outcome: str, **options: float) -> None:
        """Tell tracker and pushes, where there are any, that nothing comes any more."""
        if self.tracking is not None:
            self.tracking.close(outcome, **options)
        if self.publishing is not None:
            self.publishing.close(outcome)

    def last_evaluation(self) -> dict[str, float]:
        """Return the metrics of the last step; evaluate where the cadence has not done it."""
        if self._eval_loader is None:
            return {}
        found = self.evaluation_of_this_step()
        # One that is not finite has ended the run; a resumed one is not to end as if it were fine.
        return found if math.isfinite(found.get("eval_loss", math.nan)) else self.evaluate()

    def evaluation_of_this_step(self) -> dict[str, float]:
        """Return the metrics that were evaluated at this very step, none where it was not."""
        entry = self._evaluated_entry()
        return {name: entry[name] for name in METRICS if name in entry}

    def average_evaluation_of_this_step(self) -> dict[str, float]:
        """Return the same of the average of the weights."""
        entry = self._evaluated_entry()
        of_average = {name: name.replace("eval_", "eval_average_", 1) for name in METRICS}
        return {name: entry[theirs] for name, theirs in of_average.items() if theirs in entry}

    def _evaluated_entry(self) -> dict[str, float]:
        for entry in reversed(self.state.log_history):
            if "eval_loss" in entry and entry["step"] == self.state.global_step:
                return entry
        return {}


def _step_directly(prepared: Any) -> None:
    """Have an optimizer that accelerate has wrapped step by itself, where no loss is scaled.

    accelerate (1.15, AcceleratedOptimizer.step) looks twice a step on the disk whether a package is
    installed that it would make way for.
    """
    inner = getattr(prepared, "optimizer", None)
    if inner is None:
        return

    def step(closure: Any = None) -> None:
        prepared._opt_called = True  # as the scheduler's own wrapper notes
        inner.step(closure)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    prepared.step = step


def _moved(value: Any, device: torch.device) -> Any:
    """Return a part of a batch on a device: a tensor, several, or a number, which stays."""
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
