"""`plan`: which teacher, how many tokens, at what price, and whether to distil at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..errors import LawError, PlanError
from .accounting import ModelSize
from .advice import command_line, explain_disagreement, give_verdict, nearest_to, recommend
from .book import Laws
from .candidates import Candidate, find_candidates
from .devices import device_named
from .knowledge import Knowledge, Wanted
from .memory import training_memory
from .planning import Curve, Interval, Plan, PlanSettings, TeacherRow
from .published import BUSBRIDGE_DATASET, CHINCHILLA_TOKENS_PER_PARAM
from .recipes import SCENARIOS
from .sizes import check_counts, format_size, outside, parse_size

_CURVE_SPAN = (0.3, 100.0)  # teacher sizes drawn, as multiples of the student's


def plan(
    student: str | float | os.PathLike,
    teachers: str | os.PathLike | Sequence[str | os.PathLike],
    num_tokens: str | float,
    *,
    laws: Laws | None = None,
    teacher_tokens: str | float | Mapping[str, str | float] | None = None,
    teacher_losses: Mapping[str, float] | None = None,
    settings: PlanSettings | None = None,
) -> Plan:
    """Rank candidate teachers of a student by both laws and price them, from their configs alone.

    Args:
        student: All parameters of the student ("3B"), cut out of its teacher in balance; or a model of its own, by Hub
            id or local folder.
        teachers: Hub ids, or local folders with a `config.json`; or one of them. Only configs are read, many at the
            same time. Those that cannot be used are in the plan's `rejected`, each with its reason.
        num_tokens: Tokens to distil on ("100B").
        laws: The laws to go by; the published ones if None.
        teacher_tokens: Tokens that the teachers were trained on: one number, or one by name. Where it is not known,
            the compute-optimal 20 per parameter are assumed, and the plan shows between what the losses may lie.
        teacher_losses: Teachers' measured losses by name, in nats per token on the laws' own data.
        settings: Device, utilisation, scenario and so on.

    Raises:
        PlanError: No teacher, none that can be used, or facts about a teacher that is not a candidate.
        LawError: Sizes or losses that cannot be.
    """
    laws, settings = laws or Laws(), settings or PlanSettings()
    teachers = [teachers] if isinstance(teachers, (str, os.PathLike)) else teachers
    names = [os.fspath(teacher) for teacher in teachers]
    if not names:
        raise PlanError("There is no candidate teacher", fix="Name Hub ids or folders with a config.json.")
    tokens = parse_size(num_tokens)
    wanted = Wanted.of(student)
    knowledge = Knowledge.of(names, teacher_tokens, teacher_losses)
    found, rejected = find_candidates(names)
    rows = []
    for candidate in found:
        try:
            rows.append(_assess(candidate, wanted, tokens, laws, settings, knowledge))
        except LawError as error:
            rejected[candidate.name] = str(error)
    if not rows:
        raise PlanError(
            "No candidate can be used", found="; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        )
    rows.sort(key=lambda row: row.student_loss.value)
    best_teacher = float(laws.capacity_gap.ratio * wanted.num_params)
    by_gap, chosen = nearest_to(rows, best_teacher), recommend(rows, best_teacher)
    return Plan(
        student=wanted.name,
        student_params=wanted.num_params,
        num_tokens=tokens,
        best_teacher_params=best_teacher,
        band=(best_teacher / laws.capacity_gap.band_factor, best_teacher * laws.capacity_gap.band_factor),
        rows=tuple(rows),
        rejected=rejected,
        recommended=chosen.name,
        best_by_capacity_gap=by_gap.name,
        best_by_distillation=rows[0].name,
        verdict=give_verdict(chosen, tokens, laws),
        disagreement=explain_disagreement(by_gap, rows[0], tokens),
        warnings=tuple(_warnings(rows, wanted, tokens, laws)),
        command=command_line(chosen, wanted.num_params, tokens, settings) if wanted.size is None else None,
        curve=_curve(chosen.student.non_embedding, tokens, laws),
        settings=settings,
        sources={
            "capacity_gap": laws.capacity_gap.source,
            "supervised": laws.supervised.source,
            "distillation": laws.distillation.source,
        },
    )


def _assess(
    candidate: Candidate, wanted: Wanted, num_tokens: float, laws: Laws, settings: PlanSettings, known: Knowledge
) -> TeacherRow:
    teacher, student = candidate.size, wanted.beside(candidate)
    scenario, context = SCENARIOS[settings.scenario], settings.block_size
    check_counts("The student's parameters outside the embeddings", student.non_embedding)
    teacher_loss, source = known.teacher_loss(candidate, laws)
    flops = {
        "student_training": student.training_flops(num_tokens, context),
        "teacher_inference": teacher.inference_flops(num_tokens, context),
        "teacher_pretraining": teacher.training_flops(known.teacher_tokens(candidate), context),
    }
    counted = (
        flops["student_training"]
        + scenario.teacher_inference * flops["teacher_inference"]
        + scenario.teacher_pretraining * flops["teacher_pretraining"]
    )
    supervised_tokens = counted / student.training_flops(1, context)
    hours = device_named(settings.device).hours(counted, settings.utilisation)
    memory = training_memory(
        student,
        teacher if scenario.teacher_inference else None,
        strategy=settings.strategy,
        num_devices=settings.num_devices,
        tokens_per_device=settings.block_size * settings.batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    ratio = teacher.total / student.total
    distance = ratio / laws.capacity_gap.ratio
    return TeacherRow(
        name=candidate.name,
        size=teacher,
        student=student,
        ratio=ratio,
        near_optimal=1 / laws.capacity_gap.band_factor <= distance <= laws.capacity_gap.band_factor,
        teacher_loss=teacher_loss,
        teacher_loss_source=source,
        student_loss=_student_loss(student, num_tokens, teacher_loss, laws),
        supervised_loss=float(laws.supervised.loss(student.non_embedding, num_tokens)),
        supervised_tokens=supervised_tokens,
        supervised_loss_same_compute=float(laws.supervised.loss(student.non_embedding, supervised_tokens)),
        flops=flops,
        counted_flops=counted,
        device_hours=hours,
        price=None if settings.price_per_hour is None else hours * settings.price_per_hour,
        memory=memory,
        cache_bytes=teacher.cache_bytes(num_tokens, settings.cache_codec, settings.cache_entries),
        notes=tuple(_notes(teacher, student, memory.total, settings)),
    )


def _student_loss(student: ModelSize, num_tokens: float, teacher: Interval, laws: Laws) -> Interval:
    """The law is not monotonic in the teacher's loss: its ends over an interval are searched, not computed.

    Of a mixture it is not known which parameters count, all or the active ones: the interval holds both.
    """
    counts = np.array([[student.non_embedding], [student.active_non_embedding]], dtype=float)
    losses = laws.distillation.loss(counts, num_tokens, np.linspace(teacher.low, teacher.high, 65))
    value = float(laws.distillation.loss(student.non_embedding, num_tokens, teacher.value))
    return Interval(value, float(min(losses.min(), value)), float(max(losses.max(), value)))


def _notes(teacher: ModelSize, student: ModelSize, memory_bytes: float, settings: PlanSettings) -> Iterable[str]:
    device = device_named(settings.device)
    if memory_bytes > device.memory_bytes:
        yield (
            f"needs {memory_bytes / 1e9:.0f} GB on each of {settings.num_devices} {device.name} of "
            f"{device.memory_bytes / 1e9:.0f} GB: more devices, gradient_checkpointing, or a cached teacher"
        )
    if teacher.has_experts:
        yield (
            f"mixture of experts, {format_size(teacher.active)} active: the laws were measured on dense models; all "
            "its parameters are taken as its size" + ("; the student is a mixture too" if student.has_experts else "")
        )
    elif student.has_experts:
        yield f"the student is a mixture of experts, {format_size(student.active)} active: the laws know dense models"
    if teacher.total < student.total:
        yield "smaller than the student: a weak teacher"
    if teacher.vocab != student.vocab:
        yield (
            f"its vocabulary has {teacher.vocab:,} entries, the student's {student.vocab:,}: distillation needs one "
            "tokenizer"
        )


def _warnings(rows: Sequence[TeacherRow], wanted: Wanted, num_tokens: float, laws: Laws) -> Iterable[str]:
    sizes = [row.student.non_embedding for row in rows]
    yield from outside("The capacity-gap law", laws.capacity_gap.ranges, num_params=wanted.num_params)
    yield from outside("The distillation law", laws.distillation.ranges, num_params=sizes, num_tokens=num_tokens)
    teachers = [row.size.non_embedding for row in rows if row.teacher_loss_source != "given"]
    if teachers:
        yield from outside("The supervised law (of the teachers)", laws.supervised.ranges, num_params=teachers)
    if laws.distillation == Laws().distillation:
        yield (
            f"The scaling laws are those of {BUSBRIDGE_DATASET}, of students trained from random weights: on other "
            "text and for a student cut out of its teacher the losses differ; trust their order more than their values"
        )
    if any("assumed" in row.teacher_loss_source for row in rows):
        yield (
            "What some teachers were trained on is not known: their losses lie in the ranges shown. "
            "Say it with teacher_tokens, or give measured teacher_losses"
        )


def _curve(student_params: float, num_tokens: float, laws: Laws) -> Curve:
    sizes = np.geomspace(*np.multiply(student_params, _CURVE_SPAN), 400)
    losses = laws.distillation.loss(
        student_params, num_tokens, laws.supervised.loss(sizes, CHINCHILLA_TOKENS_PER_PARAM * sizes)
    )
    return Curve(
        teacher_params=tuple(map(float, sizes)),
        student_loss=tuple(map(float, losses)),
        supervised_loss=float(laws.supervised.loss(student_params, num_tokens)),
        best_teacher_params=float(sizes[np.argmin(losses)]),
        tokens_per_param=CHINCHILLA_TOKENS_PER_PARAM,
    )
