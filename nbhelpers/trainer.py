"""What happens within one optimizer step, when is it not made, and what is kept of it?

One subclass of transformers.Trainer. Trainer gets the whole effective batch (accumulation 1); `training_step` splits it
into micro-batches, so that running out of memory costs a redone step and never another batch size. A step whose loss or
gradient is not finite ends with all gradients gone: AdamW leaves parameters without gradient alone, weight decay
included.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from nbhelpers import checkpoints, evaluate, losses, memory, packing, ranks, records
from nbhelpers.optimization import (
    adamw,
    bare_arguments,
    copied,
    copied_tree,
    data_order,
    put,
    schedule_factor,
    scored_tokens,
    set_torch_random_state,
    torch_random_state,
)
from nbhelpers.tracking import Diverged, Interrupted

logger = logging.getLogger(__name__)

GOOD_STATE_EVERY = 50  # steps between copies of a good state where there are no validations
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}  # relative: what another order of summation explains
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StopAsked(Exception):
    """should_stop() said so: the step under way is thrown away, the weights are those of the last whole step."""


class NothingLeft(Exception):
    """A checkpoint was resumed whose run had already ended by early stopping."""


class RowTooLarge(torch.OutOfMemoryError):
    """Not even one row fits into memory: nothing is left to halve."""


@dataclass
class StepRecord:
    """One step, as it is reported. loss and gradient_norm are None where the step was skipped."""

    learning_rate: float
    tokens: int
    label_tokens: int
    started: float
    loss: float | None = None
    gradient_norm: float | None = None


class FineTuner(Trainer):
    """Trainer with the policies of this project; `run` is its only entry. Parameters to train must be float32."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[dict],
        validation_rows: Sequence[dict],
        config: Any,  # training.TrainingConfig
        *,
        learning_rate: float,
        precision: str,
        scratch: str,
        folder: checkpoints.Folder,
        tracker: Any = None,
        progress: Callable[[dict], None] | None = None,
        sampler: Callable[[], str] | None = None,
        should_stop: Callable[[], bool] | None = None,
        after_update: Callable[[], Any] | None = None,  # before anything looks at the new weights
    ) -> None:
        self.after_update = after_update
        self.rows, self.validation_rows, self.config, self.folder = rows, validation_rows, config, folder
        self.tracker, self.report, self.sampler, self.should_stop = tracker, progress, sampler, should_stop
        self.news: list[dict] = []  # events since the last report
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        longest = max(len(row["input_ids"]) for row in rows)
        self.packing_off = packing.why_not(inner, longest) if config.packing else "not asked for"
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(model.parameters()).device
        self.precision = precision
        self.progress = checkpoints.TrainingState(micro_batch_size=config.micro_batch_size or config.batch_size)
        self.validation_batch = self.progress.micro_batch_size
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.best: dict[str, torch.Tensor] | None = None
        self.good: dict[str, Any] | None = None
        self.record: StepRecord | None = None
        self.random_state: dict | None = None
        self.saved_step: int | None = None
        self.earlier_seconds = 0.0  # of the attempts before this one
        paged = config.method == "qlora" and self.device.type == "cuda"
        optimizer = adamw(self.parameters, learning_rate, config.weight_decay, self.device, paged=paged)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_factor(config))
        super().__init__(
            model=model,
            args=bare_arguments(config, scratch, self.device),
            train_dataset=rows,
            data_collator=list,
            optimizers=(optimizer, schedule),
        )
        if ranks.count() > 1:
            model._is_accelerate_prepared = True  # gradients are added up in training_step: no DistributedDataParallel
        self.remove_callback(PrinterCallback)
        self.add_callback(_Follow(self))

    # What Trainer is told ---------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """All steps as one epoch of whole batches; a DataLoader draws from its own generator, not the global one."""
        order = data_order(len(self.rows), self.config.steps * self.config.batch_size, self.config.seed)
        size = self.config.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        return torch.utils.data.DataLoader(
            self.rows, batch_sampler=batches, collate_fn=list, generator=torch.Generator().manual_seed(self.config.seed)
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The model stays where it was put: Trainer would take any GPU for the first one."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer counts all parameters anew for it in every step; nobody reads it

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        return self.record.gradient_norm  # measured and clipped in training_step; Trainer would measure again

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: list[dict], num_items_in_batch: Any = None) -> torch.Tensor:
        """Leave clipped gradients of the effective batch's mean loss behind, or none at all if they are not finite."""
        self.record = StepRecord(
            learning_rate=self.optimizer.param_groups[0]["lr"],
            tokens=sum(len(row["input_ids"]) for row in inputs),
            label_tokens=sum(scored_tokens(row) for row in inputs),
            started=time.perf_counter(),
        )
        self.random_state = torch_random_state(self.device)
        self._raise_if_stop_asked()
        model.train()
        loss = self._backward_whole_batch(model, inputs)
        self._add_up_over_ranks(loss)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm or math.inf)
        scale = self.scaler.get_scale()
        self.scaler.update()
        loss_value, norm_value = float(loss), float(norm)
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            self.record.loss, self.record.gradient_norm = loss_value, norm_value
            self.progress.bad_in_a_row = 0
        else:
            self._skip_step(loss_value, norm_value, scale)
        return loss

    def _backward_whole_batch(self, model: nn.Module, rows: list[dict]) -> torch.Tensor:
        """Gradients and loss of the whole batch, or of this process's share of it. Out of memory: forget it all, halve
        the micro-batch, do it again."""
        mine = ranks.share(rows)
        sequences = [[row] for row in mine] if self.packing_off or not mine else packing.together(mine)
        while True:
            size = self.progress.micro_batch_size
            try:
                return self._accumulate(model, rows, sequences, size)
            except Exception as error:
                if not memory.is_oom(error):
                    raise
                if size == 1:
                    raise RowTooLarge(_too_large(rows, str(error))) from error
                message = str(error)  # the error itself would keep the tensors of the failed pass alive
            self._forget_gradients()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            set_torch_random_state(self.random_state, self.device)
            self.progress.micro_batch_size = max(1, min(size, len(sequences)) // 2)
            self._event(
                "oom",
                where="training",
                from_micro_batch_size=size,
                to_micro_batch_size=self.progress.micro_batch_size,
                batch_size=len(rows),
                message=message.splitlines()[0] if message else "",
            )

    def _accumulate(self, model: nn.Module, rows: list[dict], sequences: list, size: int) -> torch.Tensor:
        total = sum(scored_tokens(row) for row in rows)
        loss = torch.zeros((), device=self.device)
        for start in range(0, len(sequences), size):
            if start and ranks.count() == 1:
                self._raise_if_stop_asked()
            with self._autocast():
                part = losses.nll_sum(model, packing.collate(sequences[start : start + size], self.device)) / total
            self.scaler.scale(part).backward()
            loss += part.detach()
        return loss

    def _add_up_over_ranks(self, loss: torch.Tensor) -> None:
        """Every process has then the gradients and the loss of the whole batch, and makes the same step."""
        if ranks.count() == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([*(parameter.grad for parameter in self.parameters.values()), loss])

    def _skip_step(self, loss: float, norm: float, scale: float) -> None:
        """No optimizer step. Too often in a row: back to the last good state at half the learning rate, once."""
        self._forget_gradients()
        state, step = self.progress, self.progress.step + 1
        state.skipped_steps += 1
        if self.precision == "fp16" and math.isfinite(loss) and scale > 1:
            self._event("overflow", step=step, scale=scale)  # the scaler looks for its scale: part of fp16, not a fault
            return
        state.bad_in_a_row += 1
        self._event("non_finite", step=step, loss=str(loss), gradient_norm=str(norm), in_a_row=state.bad_in_a_row)
        if state.bad_in_a_row < self.config.max_bad_steps:
            return
        if state.restored:
            raise Diverged(
                f"training diverged: {state.bad_in_a_row} non-finite steps in a row up to step {step}, although the "
                f"last good state was restored and the learning rate halved (now {self.record.learning_rate:.3g}); "
                "lower learning_rate, raise warmup_share or use precision='fp32'"
            )
        self._restore_good_state(step)

    def _restore_good_state(self, step: int) -> None:
        put(self.parameters, self.good["parameters"])
        self.optimizer.load_state_dict(copy.deepcopy(self.good["optimizer"]))
        self.lr_scheduler.base_lrs = [rate / 2 for rate in self.lr_scheduler.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.base_lrs, strict=True):
            group["initial_lr"], group["lr"] = rate, self.record.learning_rate / 2
        self.progress.restored, self.progress.bad_in_a_row = True, 0
        self._event(
            "restored", step=step, from_step=self.good["step"], peak_learning_rate=self.lr_scheduler.base_lrs[0]
        )

    def _forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _autocast(self) -> Any:
        dtype = AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _raise_if_stop_asked(self) -> None:
        if ranks.any_of(self.should_stop is not None and self.should_stop(), self.device):
            raise StopAsked

    # Around the steps -------------------------------------------------------------------------------------------------

    def check_loss(self) -> dict[str, float]:
        """The loss of a few rows as it is trained on beside the model's own, before the first step."""
        if self.packing_off and self.config.packing:
            self._event("packing_off", reason=self.packing_off)
        with self._autocast():
            found = packing.loss_check(self.model, self.rows, not self.packing_off)
        return found | {"tolerance": LOSS_TOLERANCE[self.precision]}

    def run(self, checkpoint: Path | None, started: float) -> tuple[str, int]:
        """Train to the end or until asked to stop. Returns the status and the step whose weights the model now has.

        started: time.perf_counter() at which this attempt began; earlier attempts are added from the checkpoint.
        """
        self.started = started
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            status = "finished"
        except NothingLeft:
            status = "finished"
        except StopAsked:
            status = "stopped"
            self._forget_gradients()
            if self.random_state is not None:
                set_torch_random_state(self.random_state, self.device)
        except Exception as error:
            if memory.is_oom(error) and not isinstance(
                error, RowTooLarge
            ):  # in the optimizer or in a copy of the state
                raise RowTooLarge(_too_large(self.rows, str(error))) from error
            raise
        state = self.progress
        state.seconds = self._seconds()
        if status == "stopped":
            if self.config.checkpoint_every and self.saved_step != state.step:
                self._save()
            self._event("stopped", step=state.step)
            return status, state.step
        if self.config.keep_best and state.best_step is not None and state.best_step != state.step:
            put(self.parameters, self.best)
            self._event("best_restored", step=state.step, best_step=state.best_step)
            return status, state.best_step
        return status, state.step

    def close(self) -> None:
        """Let go of optimizer state, copies and model, so that the memory is there at once for what comes next."""
        self._forget_gradients()
        self.optimizer.state.clear()  # by hand: the optimizer stands in a reference cycle with the schedule
        self.optimizer.param_groups.clear()
        self.optimizer = self.lr_scheduler = self.accelerator = self.best = self.good = None
        self.model = self.model_wrapped = self.callback_handler = None
        self.parameters = {}

    def before_first_step(self) -> None:
        if self._validation_due() and self.progress.validated_step != self.progress.step:
            nll = self._validate()
            self._log(self.progress.step, val_loss=nll)
        if self.good is None:
            self._keep_good_state()
        if self.progress.stopped_early or self._out_of_patience():
            raise NothingLeft

    def after_step(self, control: Any) -> None:
        """Count, validate, report, save: everything that reads a finished step."""
        state, record = self.progress, self.record
        if self.after_update is not None:
            self.after_update()
        self.random_state = None  # from here on the step is whole
        step_seconds = time.perf_counter() - record.started
        state.step = self.state.global_step
        state.step_seconds += step_seconds
        state.tokens += record.tokens
        metrics = {
            "learning_rate": record.learning_rate,
            "tokens_per_sec": record.tokens / step_seconds,
            "iter_time_ms": 1000 * step_seconds,
        }
        if record.loss is None:
            metrics["skipped"] = 1
        else:
            state.train_losses.append([state.step, record.loss])
            state.label_tokens += record.label_tokens
            metrics |= {"train_loss": record.loss, "grad_norm": record.gradient_norm}
            if self.tracker is not None:
                self.tracker.increment_gradient_step()
        nll = None
        try:
            nll = self._validate() if self._validation_due() else None
        finally:  # a step is reported also where its validation was stopped
            state.seconds = self._seconds()
            metrics |= memory.in_use(self.device.type)
            self._log(state.step, **metrics, val_loss=nll)
            self._tell(record, nll, metrics)
        if not self.validation_rows and state.step % GOOD_STATE_EVERY == 0 and state.bad_in_a_row == 0:
            self._keep_good_state()
        if self._out_of_patience():
            control.should_training_stop = True
        every = self.config.checkpoint_every
        if every and (state.step % every == 0 or state.step == self.config.steps or state.stopped_early):
            self._save()

    def _out_of_patience(self) -> bool:
        state, patience = self.progress, self.config.early_stopping_patience
        if patience is None or state.validations_since_best < patience or state.step >= self.config.steps:
            return False
        state.stopped_early = True
        self._event("early_stop", step=state.step, best_step=state.best_step, patience=patience)
        return True

    def _validation_due(self) -> bool:
        step, every = self.progress.step, self.config.eval_every
        return bool(self.validation_rows) and (step % every == 0 or step == self.config.steps)

    def _validate(self) -> float | None:
        """nll of the validation rows (None if not finite); keeps copies of a good and of the best state."""
        state = self.progress
        nll = self._validation_nll()
        state.validated_step = state.step
        state.validations_since_best += 1
        if nll is None:
            return None
        state.validation_nlls.append([state.step, nll])
        if state.best_validation_nll is None or nll < state.best_validation_nll:
            state.best_step, state.best_validation_nll, state.validations_since_best = state.step, nll, 0
            if self.config.keep_best:
                self.best = copied(self.parameters, self.best)
        if state.bad_in_a_row == 0:
            self._keep_good_state()
        self._sample()
        return nll

    def _sample(self) -> None:
        """A text of the model as it is now, for people to read."""
        if self.sampler is not None:
            with self._autocast():
                self._event("sample", step=self.progress.step, text=self.sampler())

    def _validation_nll(self) -> float | None:
        try:
            nll, tokens = ranks.total(self._validation_sums(), self.device)
        except Interrupted as error:
            raise StopAsked from error
        if math.isfinite(nll):
            return nll / tokens
        self._event("non_finite", step=self.progress.step, where="validation", message="the validation loss")
        return None

    def _validation_sums(self) -> list[float]:
        """[nats, scored tokens] of this process's share of the validation rows; NaN where a loss is not finite."""
        rows = ranks.share(self.validation_rows)
        should_stop = self.should_stop if ranks.count() == 1 else None
        while rows:
            try:
                with self._autocast():
                    sums, counts = evaluate.row_losses(
                        self.model, rows, batch_size=self.validation_batch, should_stop=should_stop
                    )
                return [float(sums.sum()), int(counts.sum())]
            except FloatingPointError as error:
                logger.warning("validation: %s", error)
                return [math.nan, 0]
            except Exception as error:
                if not memory.is_oom(error) or self.validation_batch == 1:
                    raise
            gc.collect()
            size, self.validation_batch = self.validation_batch, self.validation_batch // 2
            self._event("oom", where="validation", from_batch_size=size, to_batch_size=self.validation_batch)
        return [0.0, 0]

    def _keep_good_state(self) -> None:
        if self.progress.restored:  # it is restored once only
            self.good = None
            return
        old = self.good or {"parameters": None, "optimizer": None}  # its memory is used again: no second copy at a time
        self.good = {
            "step": self.progress.step,
            "parameters": copied(self.parameters, old["parameters"]),
            "optimizer": copied_tree(self.optimizer.state_dict(), old["optimizer"]),
        }

    def _seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    # Telling others ---------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **facts: Any) -> None:
        logger.info("%s: %s", kind, facts)
        self.news.append({"kind": kind, "step": self.progress.step} | facts)
        if self.tracker is not None:
            self.tracker.event(kind, **facts)

    def _log(self, step: int, **metrics: Any) -> None:
        if self.tracker is not None:
            self.tracker.log_metrics(iteration=step, **{k: v for k, v in metrics.items() if v is not None})

    def _tell(self, record: StepRecord, nll: float | None, metrics: dict[str, Any]) -> None:
        state, news, self.news = self.progress, self.news, []
        if self.report is not None:
            self.report(
                {
                    "step": state.step,
                    "steps": self.config.steps,
                    "train_loss": record.loss,
                    "validation_nll": nll,
                    "learning_rate": record.learning_rate,
                    "gradient_norm": record.gradient_norm,
                    "tokens_per_second": metrics["tokens_per_sec"],
                    "resident_bytes": metrics["resident_bytes"],
                    "cuda_bytes": metrics.get("cuda_bytes"),
                    "seconds": state.seconds,
                    "micro_batch_size": state.micro_batch_size,
                    "skipped_steps": state.skipped_steps,
                    "best_step": state.best_step,
                    "best_validation_nll": state.best_validation_nll,
                    "sample": next((event["text"] for event in news if event["kind"] == "sample"), None),
                    "events": [event for event in news if event["kind"] not in ("sample", "checkpoint")],
                }
            )

    # Checkpoints: weights and state ours, optimizer, schedule and random state Trainer's ------------------------------

    def _save(self) -> None:
        if not ranks.is_first():
            return
        path = self.folder.save(self.progress.step, self._write_checkpoint)
        self.saved_step = self.progress.step
        self._event("checkpoint", step=self.progress.step, folder=path.name)

    def _write_checkpoint(self, folder: Path) -> None:
        checkpoints.save_tensors(self.parameters, folder / "trained.safetensors")
        if self.best is not None and self.progress.best_step != self.progress.step:
            checkpoints.save_tensors(self.best, folder / "best.safetensors")
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        records.write_json(folder / "state.json", {"state": asdict(self.progress), "scaler": self.scaler.state_dict()})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        put(self.parameters, checkpoints.load_tensors(folder / "trained.safetensors"))
        stored = records.read_json(folder / "state.json")
        size = self.progress.micro_batch_size
        self.progress = checkpoints.TrainingState(**stored["state"])
        self.progress.micro_batch_size = min(size, self.progress.micro_batch_size)
        self.saved_step, self.earlier_seconds = self.progress.step, self.progress.seconds
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(stored["scaler"])
        if self.config.keep_best and self.progress.best_step is not None:
            best = folder / "best.safetensors"
            self.best = checkpoints.load_tensors(best) if best.exists() else copied(self.parameters)
        self._event("resume", step=self.progress.step, folder=folder.name)


class _Follow(TrainerCallback):
    def __init__(self, tuner: FineTuner) -> None:
        self.tuner = tuner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tuner.before_first_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tuner.after_step(control)


def _too_large(rows: Sequence[dict], message: str) -> str:
    longest = max(len(row["input_ids"]) for row in rows)
    detail = message.splitlines()[0] if message else "no detail"
    return (
        f"out of memory with micro_batch_size 1 and rows of up to {longest} tokens: use shorter rows, "
        f"gradient_checkpointing=True, method='lora' or a smaller model ({detail})"
    )
