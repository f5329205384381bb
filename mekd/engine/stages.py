"""The stages by name, in the order in which a run takes them."""

from collections.abc import Callable

from mekd.audit import audit
from mekd.engine.deprivatize import deprivatize
from mekd.engine.distill import distill
from mekd.engine.evaluate import evaluate
from mekd.engine.run import Run
from mekd.engine.teacher import export_teacher, train_teacher
from mekd.report import report

STAGES: dict[str, Callable[[Run], None]] = {
    "teacher": train_teacher,
    "export": export_teacher,
    "deprivatize": deprivatize,
    "distill": distill,
    "evaluate": evaluate,
    "audit": audit,
    "report": report,
}
