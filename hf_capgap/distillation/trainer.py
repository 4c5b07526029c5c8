"""`DistillationTrainer`: a `transformers.Trainer` whose loss compares the student with a teacher."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from .. import lineage
from ..data import BlockCollator
from ..errors import ConfigError, DataError, NonFiniteError, TeacherError
from ..forwarding import run_inside
from ..labels import IGNORE_INDEX
from ..laws.records import FILE_NAME
from ..output import require_empty
from ..output_head import OutputHead, head_matches
from . import checks
from .config import DistillationConfig
from .fused import fused_token_losses
from .guards import TargetCounter
from .objective import STATISTICS, token_losses
from .record import describe_run
from .run_log import RunLogCallback
from .statistics import StatisticSums
from .teachers import HiddenSignal, LiveTeacher, LogitsSignal, load_teacher, model_inputs


class DistillationTrainer(Trainer):
    """Distil a frozen teacher into a student on text (see `objective` for what is minimised).

    Training, evaluation, checkpoints, resuming and distribution are the `Trainer`'s. Logged beside its loss: `ce`,
    `kl`, `teacher_entropy`, `agreement` (means over the tokens since the last log, on all ranks) and
    `num_tokens_seen`; `evaluate()` gives the same over the evaluation set, and `eval_perplexity`. `eval_loss` is the
    objective.

    Args:
        model: The student: a model, a PEFT model around one, or a path or Hub id (loaded in float32).
        teacher_model: The teacher: a model (frozen in place), or a path or Hub id (see `teacher_init_kwargs`). It must
            share the student's tokenizer; rows that only pad a vocabulary are ignored. None only with `alpha=0`.
        args: The options; `DistillationConfig()` defaults if None.
        data_collator: `BlockCollator` if None.
        train_dataset: Rows of `input_ids` and optionally `labels`, as `hf_capgap.data.pack` makes them.
        eval_dataset: Likewise.
        processing_class: The student's tokenizer: tells the real vocabulary, and is saved beside the student.
        teacher_processing_class: The teacher's tokenizer, to check that it is the same; looked up beside the teacher
            if None.
        kwargs: Everything else that `Trainer` takes.

    Raises:
        TeacherError, DataError, ConfigError: What cannot be trained is refused here, before anything is written.
    """

    # The loss is divided by the tokens of the whole optimizer step on all ranks; the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module | str | os.PathLike,
        teacher_model: PreTrainedModel | str | os.PathLike | None = None,
        args: DistillationConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else DistillationConfig()
        self._output_dir_was_used = os.path.isdir(args.output_dir) and any(
            path.name != FILE_NAME
            for path in Path(args.output_dir).iterdir()  # a run that saves nothing leaves that
        )
        if isinstance(model, (str, os.PathLike)):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} has no place here", fix="The objective never gives logits or another loss to it."
                )
        checks.check_adapter(model)
        student = causal_model(model)
        teacher_tokenizer = teacher_processing_class or _find_teacher_tokenizer(teacher_model)
        teacher = self._resolve_teacher(teacher_model, args)
        if teacher is not None:
            checks.check_sizes(model, teacher)
            if processing_class is not None and teacher_tokenizer is not None:
                checks.check_same_tokenizer(processing_class, teacher_tokenizer)
        for role, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
            checks.check_dataset(dataset, role, student, teacher or student)
        self._vocab_size = checks.real_vocab_size(student, teacher or student, processing_class)

        self._use_cache = getattr(student.config, "use_cache", True)  # the Trainer turns it off for training
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or BlockCollator(getattr(processing_class, "pad_token_id", None) or 0),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if args.n_gpu > 1:
            raise ConfigError(
                "nn.DataParallel is not supported", found=f"{args.n_gpu} GPUs", fix="Start with accelerate launch."
            )
        self._fused = args.fused and self._student_head_is_known()
        self._prepare_teacher(teacher)
        if args.torch_compile:
            for module in (student, teacher):
                if module is not None:
                    module.base_model.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self._labels_checked = False
        self._lineage = lineage.stages_of(student)  # now: the folder it came from may be written to later
        self._train_sums, self._eval_sums = StatisticSums(), StatisticSums()
        self._targets = TargetCounter(self.accelerator)
        self.add_callback(self._targets)
        if args.write_run_record:
            self.add_callback(RunLogCallback(self, teacher, self._vocab_size))

    @property
    def student(self) -> PreTrainedModel:
        """The student without any wrapper: what `AutoModelForCausalLM` would load."""
        return causal_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    @property
    def num_tokens_seen(self) -> int:
        """Targets trained on, on all ranks, up to the last log, checkpoint or end; a resumed run counts on."""
        return self._targets.last_read

    def count_tokens(self) -> int:
        """`num_tokens_seen` up to now. Every rank must call it."""
        return self._targets.read()

    # ---- the loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The micro-batches of an optimizer step, and their valid targets on all ranks.

        Counted here and not by the `Trainer`, which shifts labels only for model classes whose name it knows.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [(batch["labels"][:, 1:] != IGNORE_INDEX).sum().to(device) for batch in samples if "labels" in batch]
        total = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long, device=device)
        return samples, self.accelerator.reduce(total) // self.get_tp_size()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The objective of one micro-batch: its gradients add up over micro-batches and average over ranks."""
        loss, statistics, labels = self._token_losses(model, inputs, num_items_in_batch)
        num_targets = (labels != IGNORE_INDEX).sum()
        self._train_sums.add(statistics.sum((1, 2)), num_targets)
        self._targets.add(num_targets)
        if num_items_in_batch is not None:
            # DDP averages over ranks what has already been divided by the tokens of all ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # Once per optimizer step, before the weights change.
        if self.accelerator.sync_gradients and not self._train_sums.teacher_is_finite():
            raise _teacher_not_finite(f"optimizer step {self.state.global_step + 1}")
        return loss

    def _token_losses(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        num_items: torch.Tensor | int | None,
        with_teacher: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, statistics [len(STATISTICS), batch, length], labels [batch, length]); t predicts t + 1."""
        batch = model_inputs(inputs)
        if "labels" not in inputs:
            raise DataError(
                "A batch has no labels", found=list(inputs), fix="Use BlockCollator, or a collator that makes them."
            )
        checks.check_length(batch["input_ids"].shape[1], self.student, self._teacher_model or self.student)
        if not self._labels_checked:  # once, because it waits for the device
            checks.check_labels(inputs["labels"], self._vocab_size)
            self._labels_checked = True
        labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        needs_teacher = with_teacher and self.teacher is not None and (self.args.alpha > 0 or not model.training)
        with self.accelerator.autocast():
            signal = self.teacher.signal(batch) if needs_teacher else None
            student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
            compute = self._fused_losses if self._fused else self._dense_losses
            loss, statistics = run_inside(
                model,
                student,
                lambda **batch: compute(student, batch, labels, signal, num_items),
                **batch,
                use_cache=False,
            )
        return loss, statistics.unflatten(-1, labels.shape), labels

    def _fused_losses(
        self,
        model: torch.nn.Module,
        batch: dict[str, Any],
        labels: torch.Tensor,
        signal: HiddenSignal | None,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student = causal_model(model)
        hidden = student.base_model(**batch).last_hidden_state  # [batch, length, H_s]

        def losses(teacher_head: OutputHead | None) -> tuple[torch.Tensor, torch.Tensor]:
            return fused_token_losses(
                hidden.flatten(0, 1),
                OutputHead.of(student),
                None if signal is None else signal.hidden.flatten(0, 1),
                teacher_head,
                labels.flatten(),
                num_items=num_items,
                vocab_size=self._vocab_size,
                chunk_tokens=self.args.chunk_tokens,
                **self._objective(signal),
            )

        head = student.get_output_embeddings()
        return run_inside(head, head, lambda _: losses(None) if signal is None else signal.with_head(losses), hidden)

    def _dense_losses(
        self,
        model: torch.nn.Module,
        batch: dict[str, Any],
        labels: torch.Tensor,
        signal: LogitsSignal | None,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token_losses(
            model(**batch).logits.flatten(0, 1),
            None if signal is None else signal.logits.flatten(0, 1),
            labels.flatten(),
            num_items=num_items,
            vocab_size=self._vocab_size,
            **self._objective(signal),
        )

    def _objective(self, signal: HiddenSignal | LogitsSignal | None) -> dict[str, Any]:
        alpha = self.args.alpha if signal is not None else 0.0
        return {"alpha": alpha, "temperature": self.args.temperature, "divergence": self.args.divergence}

    # ---- evaluation and logs ----

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Adds the batch's statistics to those of the evaluation; no logits are returned."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, statistics, labels = self._token_losses(model, inputs, None)
        # Per row, so that the rows that only fill up the last batch on some ranks are left out.
        rows = torch.cat(
            [statistics.sum(-1), (labels != IGNORE_INDEX).sum(-1)[None].to(statistics)]
        ).T  # [batch, S + 1]
        rows = self.accelerator.gather_for_metrics(rows.contiguous()) / self.accelerator.num_processes
        self._eval_sums.add(rows[:, :-1].sum(0), rows[:, -1].sum())
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_sums = StatisticSums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update(self._evaluation_metrics(metric_key_prefix))
        return output

    def _evaluation_metrics(self, prefix: str) -> dict[str, float]:
        means = self._eval_sums.pop(self.accelerator)
        if not means:
            raise DataError("The evaluation had no target: its labels are all -100, or there was no row")
        if self.teacher is not None and not math.isfinite(means["teacher_entropy"]):
            raise _teacher_not_finite("evaluation")
        alpha = self.args.alpha if self.teacher is not None else 0.0
        values = {"loss": (1 - alpha) * means["ce"] + alpha * self.args.temperature**2 * means["kl"]}
        values |= {"ce": means["ce"], "perplexity": _exp(means["ce"]), "num_tokens": int(means["num_tokens"])}
        if self.teacher is not None:
            values |= {name: means[name] for name in STATISTICS[1:]}
        return {f"{prefix}_{name}": value for name, value in values.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log to the training logs."""
        if "loss" in logs:
            means = self._train_sums.pop(self.accelerator)
            means.pop("num_tokens", None)
            with_teacher = self.teacher is not None and self.args.alpha > 0
            logs.update({name: value for name, value in means.items() if name == "ce" or with_teacher})
            logs["num_tokens_seen"] = self._targets.read()
        super().log(logs, start_time)

    # ---- running and saving ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """`Trainer.train`, into an output folder that must be empty unless resuming or overwriting.

        Raises:
            OutputFolderError, DataError, NonFiniteError: See the class.
        """
        if self._output_dir_was_used and not resume_from_checkpoint and not self.args.overwrite_output_dir:
            require_empty(
                self.args.output_dir,
                fix="Name another one, resume_from_checkpoint=True, or set overwrite_output_dir=True.",
            )
        self._refuse_shared_weights()
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._targets.read()
        self._train_sums = StatisticSums()
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`Trainer.save_model`, and the lineage beside the student."""
        num_tokens = self._targets.read()
        if _internal_call:  # a checkpoint: a run that resumes from it counts on from here
            self.state.log_history.append({"num_tokens_seen": num_tokens, "step": self.state.global_step})
        use_cache, self.student.config.use_cache = self.student.config.use_cache, self._use_cache
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.student.config.use_cache = use_cache
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            lineage.write_stages(folder, [*self._lineage, describe_run(self, self._teacher_model)])
            if getattr(self.student, "kept", None) is not None:
                self.student.kept.save(folder)

    # ---- set-up ----

    def _refuse_shared_weights(self) -> None:
        """Evaluating a model against itself is fine; training it while it is frozen is not."""
        if self._teacher_model is None:
            return
        frozen = {id(parameter) for parameter in self._teacher_model.parameters()}
        if any(id(parameter) in frozen for parameter in self.model.parameters()):
            raise TeacherError("The teacher is (a part of) the student", fix="Load the teacher a second time.")

    def _resolve_teacher(
        self, teacher: PreTrainedModel | str | os.PathLike | None, args: DistillationConfig
    ) -> PreTrainedModel | None:
        if teacher is None:
            if args.alpha > 0:
                raise TeacherError("There is no teacher", fix="Pass teacher_model=, or alpha=0 to train without one.")
            return None
        if isinstance(teacher, (str, os.PathLike)):
            return load_teacher(teacher, args.teacher_init_kwargs)
        if args.teacher_init_kwargs:
            warnings.warn("teacher_init_kwargs has no effect: the teacher is already loaded", stacklevel=3)
        return teacher

    def _student_head_is_known(self) -> bool:
        if head_matches(self.student):
            return True
        warnings.warn(
            f"What {type(self.student).__name__} does to its logits is not known to the fused objective; "
            "using dense logits, which takes more memory.",
            stacklevel=3,
        )
        return False

    def _prepare_teacher(self, teacher: PreTrainedModel | None) -> None:
        self._teacher_model, self.teacher = teacher, None
        if teacher is None:
            return
        if not (getattr(teacher, "is_quantized", False) or hasattr(teacher, "hf_device_map")):
            teacher.to(self.args.device)
        self.teacher = LiveTeacher(teacher, dense=not self._fused)
        if self.teacher.dense and self._fused:
            warnings.warn("The teacher's head is not known to the fused objective; using dense logits.", stacklevel=3)
            self._fused = False


def causal_model(model: torch.nn.Module) -> PreTrainedModel:
    """The causal language model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find_teacher_tokenizer(teacher: PreTrainedModel | str | os.PathLike | None) -> PreTrainedTokenizerBase | None:
    if teacher is None:
        return None
    if isinstance(teacher, (str, os.PathLike)):
        return checks.teacher_tokenizer(os.fspath(teacher), required=True)
    return checks.teacher_tokenizer(teacher.name_or_path, required=False)


def _teacher_not_finite(where: str) -> NonFiniteError:
    return NonFiniteError(
        "The teacher's outputs are not finite",
        found=where,
        fix="Run it in float32 or bfloat16 (teacher_init_kwargs), and check its weights.",
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
