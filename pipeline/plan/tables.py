"""Tables of what common students and teachers need."""

from collections.abc import Iterator

from pydantic import BaseModel
from rich.table import Table

from logitcask.pipeline.models.shapes import GB, Amount, shape_of_size, student_memory
from logitcask.pipeline.plan.estimates import CPU, GPUS, Device, smallest_gpu, teacher_memory, teacher_seconds

STUDENTS, TEACHERS = ("100M", "350M", "1B", "7B"), ("7B", "13B", "34B")
BATCHES = ((8, 1024), (8, 2048), (32, 1024))  # examples and their length, in the table of students
TEACHER_BATCH = 8 * 1024  # tokens


class StudentNeeds(BaseModel):
    """Bytes of memory that a student needs in stage 2."""

    student: str
    mixed_precision: bool
    gradient_checkpointing: bool
    batch_size: int
    length: int
    optimizer: int
    total: int
    smallest_device: str | None


class TeacherNeeds(BaseModel):
    """Bytes of memory that a bfloat16 teacher needs in stage 1, and its speed on the GPUs that hold it."""

    teacher: str
    weights: int
    total: int
    smallest_device: str | None
    tokens_per_second: dict[str, float]


class Tables(BaseModel):
    """Devices, and what common models need."""

    devices: list[Device]
    students: list[StudentNeeds]
    teachers: list[TeacherNeeds]


def make_tables() -> Tables:
    """Return the needs of the students and teachers above, for every batch, precision and checkpointing."""
    return Tables(
        devices=[*GPUS, CPU],
        students=[
            _student_needs(size, mixed, checkpointing, *batch)
            for size in STUDENTS
            for mixed in (False, True)
            for checkpointing in (False, True)
            for batch in BATCHES
        ],
        teachers=[_teacher_needs(size) for size in TEACHERS],
    )


def _student_needs(size: str, mixed: bool, checkpointing: bool, batch: int, length: int) -> StudentNeeds:
    parts = student_memory(shape_of_size(size), batch * length, checkpointing=checkpointing, mixed=mixed)
    total = sum(parts.values())
    return StudentNeeds(
        student=size,
        mixed_precision=mixed,
        gradient_checkpointing=checkpointing,
        batch_size=batch,
        length=length,
        optimizer=round(parts["optimizer"]),
        total=round(total),
        smallest_device=smallest_gpu(total),
    )


def _teacher_needs(size: str) -> TeacherNeeds:
    shape, amount = shape_of_size(size), Amount(1_000, 1_024_000, 1_024_000)
    parts = teacher_memory(shape, TEACHER_BATCH, weight_bytes=2)
    total = sum(parts.values())
    return TeacherNeeds(
        teacher=size,
        weights=round(parts["weights"]),
        total=round(total),
        smallest_device=smallest_gpu(total),
        tokens_per_second={
            device.name: amount.tokens / teacher_seconds(shape, device, amount, TEACHER_BATCH)
            for device in GPUS
            if device.holds(total)
        },
    )


def render_tables(tables: Tables) -> Iterator[Table]:
    """Yield three tables: devices, students, teachers."""
    table = Table("device", "TFLOP/s", "GB/s", "GB", "utilisation", title="devices")
    for d in tables.devices:
        table.add_row(d.name, *(f"{x:g}" for x in (d.tflops, d.bandwidth, d.memory, d.utilisation)))
    yield table
    title = "stage 2: GB by batch x length, and the smallest GPU that holds it"
    table = Table("student", "precision", "checkpointing", "AdamW", *(f"{b} x {n}" for b, n in BATCHES), title=title)
    for first in range(0, len(tables.students), len(BATCHES)):
        row = tables.students[first : first + len(BATCHES)]
        kind = "bf16 mixed" if row[0].mixed_precision else "float32"
        words = [row[0].student, kind, "yes" if row[0].gradient_checkpointing else "no"]
        table.add_row(*words, f"{row[0].optimizer / GB:.1f}", *(_need(n.total, n.smallest_device) for n in row))
    yield table
    table = Table("teacher", "weights", "in all", "tokens/s", title="stage 1: GB in bfloat16, batch 8 x 1024")
    for t in tables.teachers:
        speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in t.tokens_per_second.items())
        table.add_row(t.teacher, f"{t.weights / GB:.1f}", _need(t.total, t.smallest_device), speeds)
    yield table


def _need(size: int, device: str | None) -> str:
    return f"{size / GB:.1f} {device or 'none'}"
