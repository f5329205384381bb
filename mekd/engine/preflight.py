"""What can be known before the first step, and before the first paid query: whether a run can come to its end."""

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mekd import files, track
from mekd.codes import resolve_code
from mekd.data import DataError
from mekd.engine import after, again, asked, dp, parallel, reach
from mekd.engine.account import accounts_of, same_answers
from mekd.engine.checkpoint import check_depends
from mekd.engine.result import architecture
from mekd.engine.run import ACCOUNTS, Run, StageError
from mekd.engine.teacher import check_exported, load_trained
from mekd.engine.train import computed_in
from mekd.errors import UsageError
from mekd.fingerprint import asks, differing, fingerprint, reserved_of_audit
from mekd.nets import build
from mekd.nets.check import check_network
from mekd.nets.features import last_linear
from mekd.nets.registry import is_users
from mekd.oracle import identity
from mekd.oracle.export import Classifier, ExportError, export
from mekd.oracle.ledger_file import pending, totals
from mekd.student import FILE, read


def preflight(run: Run, stages: Sequence[str], agree: Callable[[], None] = lambda: None) -> None:
    """Raise a MekdError for what would stop one of the stages later; then write the configuration. Nothing is asked.

    agree(): may refuse too, before anything is written.
    """
    config = run.config
    dp.check(config)
    track.check(config.engine.track)
    trains = "teacher" in stages and not (run.given_teacher or config.teacher.checkpoint)
    simulates = "evaluate" in stages and config.evaluate.enabled
    if run.device.type == "cuda":
        if parallel.world() > 1 and ":" in config.engine.device:
            raise UsageError(
                f"engine.device is {config.engine.device!r} with {parallel.world()} processes, of which each takes the "
                "card of its number: say --engine.device cuda, and choose the cards with CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(run.device)
    if config.engine.batch_norm == "synchronised" and parallel.world() > 1 and run.device.type != "cuda":
        raise StageError(
            "engine.batch_norm is 'synchronised', which PyTorch does on CUDA alone; on the CPU it must be 'local'"
        )
    for stage in ("teacher",) * trains + tuple(name for name in ("deprivatize", "distill") if name in stages):
        parallel.share(f"{stage}.batch", getattr(config, stage).batch)
    notes = []  # written when nothing speaks against the run
    private = {"deprivatize": "deprivatize" in stages and config.deprivatize.generator is None}
    private["distill"] = "distill" in stages and config.distill.pretrain > 0
    if trains or simulates or any(private.values()):
        with parallel.first_alone():  # photos are decoded by one process, which the others find done
            notes += [f"data: {note}" for note in run.data.notes()]
    if trains:  # it is tested too: a tree needs val for that
        run.data.count("test")
    if run.class_names is not None and config.oracle.num_classes not in (None, len(run.class_names)):
        raise UsageError(
            f"oracle.num_classes is {config.oracle.num_classes}, but oracle.classes lists {len(run.class_names)}"
        )
    if tuple(stages) != ("report",):
        check_exported(run, stages)
    if "distill" not in stages and {"evaluate", "audit", "report"} & set(stages):
        _check_finished(run)
    if not run.given_teacher and {"teacher", "export"} & set(stages) and not run.teacher_onnx.exists():
        classes = run.trained_classes
        if trains and classes != (own := len(run.data.classes)):
            name = "oracle.num_classes" if run.class_names is None else "oracle.classes"
            raise UsageError(
                f"{name} says {classes} classes, and a teacher that is trained here gets those of the data, {own}: "
                f"leave {name} out, or name {own}"
            )
        reach.check_channels(run.image[0], "teacher", config.teacher.mean, config.teacher.std)
        teacher = _built("teacher.arch", config.teacher.arch, classes, run.image[0])
        if config.teacher.checkpoint is not None:
            run.load_weights(teacher, "teacher.checkpoint", config.teacher.checkpoint)
        elif not trains and run.checkpoint("teacher").exists():
            load_trained(run, teacher)
    elif {"deprivatize", "distill", "evaluate"} & set(stages):
        if run.origin is None and (tuple(stages) != ("deprivatize",) or asks(config)):
            run.require_teacher()
        classes = run.num_classes
        if config.teacher.remote and run.origin is None:
            reach.check(run)
        notes += [f"teacher: {note}" for note in run.teacher_notes]
        if simulates and classes != len(run.data.classes):
            raise StageError(
                f"the teacher has {classes} classes, the data {len(run.data.classes)}: evaluate cannot compare them. "
                "Set evaluate.enabled false, or give the data of the teacher's classes"
            )
    else:
        classes = 0
    if classes == 1:  # of the data: nothing else may say so
        raise StageError(
            "the teacher has 1 class, as the data has, and a teacher has at least 2: give data of its classes, or say "
            "how many there are with --oracle.num_classes N or --oracle.classes FILE"
        )
    _check_batches(run, {"teacher": trains, **private})
    if {"deprivatize", "distill"} & set(stages):
        after.check(run)
    if "distill" in stages:
        _check_distill(run, classes)
    begins: list[Callable[[], None]] = []  # what is put aside when nothing speaks against the run
    anew = {"deprivatize", "distill"} & set(stages) and again.another_generator(run)
    if "distill" in stages:
        again.fit_store(run, bool(anew))
    _check_budgets(run, stages)
    if simulates:
        _check_simulation(run)
    if anew:
        begins.append(functools.partial(again.set_aside_generation, run))
    elif "audit" in stages:
        _check_audited(run)
    _check_sum(run, stages, bool(anew))
    for stage in stages:
        if not (anew and stage in ("deprivatize", "distill")):
            begins += _check_checkpoints(run, stage)
            for name in accounts_of(run, stage):
                same_answers(run, name)
    agree()
    for begin in begins:
        begin()
    if stages and tuple(stages) != ("report",):
        run.save_config()
    for note in notes:
        run.log(note)


def _check_distill(run: Run, classes: int) -> None:
    config = run.config.distill
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError("safetensors is missing, as which the student is written: pip install 'mekd[run]'")
    student = _check_student(run, classes)
    if config.pretrain:
        try:
            last_linear(student)
        except ValueError as error:
            raise UsageError(
                f"distill.pretrain is {config.pretrain}, and distill.student {config.student!r} cannot: {error}. Say "
                "--distill.pretrain 0"
            ) from error
    if config.checkpoint is not None:
        run.load_weights(student, "distill.checkpoint", config.checkpoint)
    if run.config.deprivatize.generator is not None:
        _check_reused(run, classes)
    if config.loss_options()["image"] > 0:
        response = run.config.oracle.response
        try:
            resolve_code(config.code, {"label": "labels"}.get(response, response), classes)
        except ValueError as error:
            raise UsageError(f"distill.code: {error}") from error


def _check_batches(run: Run, read: dict[str, bool]) -> None:
    """DataError where a tree has fewer images than a batch of a stage that reads it; no file is opened."""
    for stage in (stage for stage, reads in read.items() if reads):
        batch = getattr(run.config, stage).batch
        try:
            run.data.training(batch) if stage == "teacher" else run.data.local(batch)
        except DataError as error:
            raise DataError(f"{stage}.batch is {batch}: {error}") from error


def _check_finished(run: Run) -> None:
    """StageError where the student that lies there is another one than the settings describe."""
    if not (run.out / FILE).exists():
        return
    about = read(run.out / FILE)[1]
    now = {"distill.student": ("architecture", architecture(run)), "data.size": ("size", str(run.config.data.size))}
    differs = {name: (about.get(key, is_), is_) for name, (key, is_) in now.items() if about.get(key, is_) != is_}
    if differs:
        said = "; ".join(f"{name} was {was} and is {is_}" for name, (was, is_) in differs.items())
        raise StageError(
            f"{run.out / FILE} is a student of other settings: {said}. Set that back, or train this one with `mekd "
            "distill`"
        )


def _check_reused(run: Run, classes: int) -> None:
    """Hold another run's generator and answers against each other and against the teacher."""
    config, origin = run.config, run.origin
    drawn = files.load(run.checkpoint("deprivatize"))["depends"]["classes"]
    if drawn != classes:
        raise UsageError(
            f"deprivatize.generator is {config.deprivatize.generator!r}, made for {drawn} classes, and the teacher has "
            f"{classes}: give the generator of a run with this teacher, or none"
        )
    if origin is None:
        return
    if origin["generator"] != run.generator_digest:
        raise UsageError(
            f"deprivatize.generator is {config.deprivatize.generator!r}, another one than drew the images of "
            f"distill.store {config.distill.store!r}: leave deprivatize.generator out"
        )
    own = config.teacher.onnx is not None and identity.digest(Path(config.teacher.onnx))
    if own and own != origin["teacher"]:
        raise UsageError(
            f"teacher.onnx is {config.teacher.onnx!r}, and the answers in distill.store {config.distill.store!r} are "
            f"another teacher's, {origin['teacher_name']}: leave teacher.onnx out, or give that one"
        )
    if config.teacher.remote and config.teacher.name != origin["teacher_name"]:
        raise UsageError(
            f"the teacher is {config.teacher.name!r}, and the answers in distill.store {config.distill.store!r} are "
            f"those of {origin['teacher_name']!r}: leave the teacher out, or give it that --teacher.name"
        )


def _check_student(run: Run, classes: int) -> torch.nn.Module:
    """distill.student as it begins, which takes a batch, gives logits, has a gradient and can be written as ONNX."""
    name, transport = run.config.distill.student, run.config.oracle.transport
    student = _built("distill.student", name, classes, run.image[0])
    real = _is_real(name)
    if real:
        student = student.to(run.device)
    try:
        with computed_in(run.config.distill.precision, run.device):
            check_network(student, run.image, classes)
        if real and parallel.rank() == 0 and not run.checkpoint("distill").exists():
            with tempfile.TemporaryDirectory() as folder:
                export(Classifier(copy.deepcopy(student)), Path(folder) / "student.onnx", run.image, transport)
    except (UsageError, ExportError) as error:
        raise UsageError(f"distill.student is {name!r}: {error}") from error
    return student


def _is_real(name: str) -> bool:
    """Whether a network is looked at with weights: other people's code may do anything; the rest needs no memory."""
    return is_users(name) or name.startswith("timm:")


def _built(setting: str, name: str, classes: int, channels: int) -> torch.nn.Module:
    try:
        with torch.random.fork_rng([]), torch.device("cpu" if _is_real(name) else "meta"):
            return build(name, classes, channels)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{setting} is {name!r}: {error}") from error


def _check_budgets(run: Run, stages: Sequence[str]) -> None:
    step1, step2 = run.config.deprivatize, run.config.distill
    if "deprivatize" in stages and asks(run.config) and step1.budget is not None and step1.budget < step1.batch:
        raise UsageError(
            f"deprivatize.budget is {step1.budget}, less than the {step1.batch} queries of one step: raise it, or ask "
            "nothing in step 1 with --deprivatize.alpha 0"
        )
    budget, audit = run.config.oracle.budget, run.config.audit.budget
    least = step2.holdout + (step2.replay or step2.batch)
    stored = step2.store is None and step2.replay
    if "audit" in stages and budget is not None and stored and audit and budget < least + audit:
        raise UsageError(
            f"oracle.budget is {budget}; audit.budget asks {audit} of it beside the {step2.holdout} of the holdout "
            f"and the {step2.replay} of the store: it must be at least {least + audit}, or audit.budget smaller"
        )
    if "distill" in stages and budget is not None and budget < least:
        raise UsageError(
            f"oracle.budget is {budget}, but {step2.holdout} queries are held out (distill.holdout) and "
            f"{least - step2.holdout} asked {'for replay (distill.replay)' if step2.replay else 'in the first step'}: "
            f"it must be at least {least}"
        )
    if "distill" in stages and step2.budget is not None and step2.budget < least:
        raise UsageError(
            f"distill.budget is {step2.budget}, but {step2.holdout} queries are held out (distill.holdout) and "
            f"{least - step2.holdout} asked {'for replay (distill.replay)' if step2.replay else 'in the first step'}: "
            f"it must be at least {least}"
        )


def _check_simulation(run: Run) -> None:
    """Hold what evaluate asked against its teacher."""
    simulation = run.config.evaluate
    if run.given_teacher or run.teacher_onnx.exists():
        for name, asks_it in (("evaluate-test", simulation.ask_teacher), ("evaluate-private", simulation.baseline)):
            if asks_it:
                asked.check(run, name)


def _check_sum(run: Run, stages: Sequence[str], anew: bool) -> None:
    """Hold what evaluate and the audit will ask against what all the rest leaves of oracle.budget.

    anew: the stores that lie there become an earlier generation.
    """
    budget, step2 = run.config.oracle.budget, run.config.distill
    if budget is None or ("distill" in stages and step2.store is None and not step2.replay):
        return  # without a store step 2 asks in each step, and ends where the budget does
    rest = _still_asked(run, stages, anew)
    simulation = rest.pop("evaluate-test", 0) + rest.pop("evaluate-private", 0)
    audit = rest.pop("audit", 0)
    counts = run.asked(*ACCOUNTS)
    rest["spent"] = counts["queries"] + counts["uncertain"]
    total = sum(rest.values()) + simulation + audit
    if not simulation + audit or total <= budget:
        return
    said = [f"evaluate asks {simulation} (evaluate.ask_teacher, evaluate.baseline)"] if simulation else []
    said += [f"the audit asks {audit} (audit.budget)"] if audit else []
    named = {"deprivatize": "step 1", "holdout": "the holdout", "replay": "the store", "spent": "what is spent"}
    beside = ", ".join(f"{named[name]} ({count})" for name, count in rest.items() if count)
    size = f" with --distill.replay {step2.replay}" if step2.replay and step2.store is None else ""
    raise UsageError(
        f"oracle.budget is {budget}, of which {' and '.join(said)}, and {max(budget - sum(rest.values()), 0)} are left "
        f"beside {beside}: say --oracle.budget {total}{size}, or ask nothing there"
    )


def _still_asked(run: Run, stages: Sequence[str], anew: bool) -> dict[str, int]:
    """The queries that each account of some stages will yet pay, by name.

    anew: the stores that lie there become an earlier generation. The audit's reserve counts until anything is asked.
    """
    config, left = run.config, dict[str, int]()
    reserve = reserved_of_audit(config) if any(run.asked(*ACCOUNTS).values()) else 0
    for name in (name for stage in stages for name in accounts_of(run, stage)):
        paid = totals(run.ledger, name)["queries"] - totals(run.ledger, f"{name}@*")["queries"]
        if name in asked.PARTS:
            if not asked.shares(run, name):  # what was kept is asked about again only where that is said
                left[name] = run.data.count(asked.PARTS[name][0]) - pending(run.ledger, name)
        elif name == "deprivatize":
            planned, most = config.deprivatize.steps * config.deprivatize.batch, config.deprivatize.budget
            left[name] = (planned if most is None else min(planned, most)) - paid
        elif name == "audit":
            left[name] = config.audit.budget - reserve - paid
        elif name in ("holdout", "replay"):
            left[name] = (getattr(config.distill, name) or 0) - (0 if anew else paid)
    return {name: max(0, count) for name, count in left.items()}


def _check_checkpoints(run: Run, stage: str) -> list[Callable[[], None]]:
    """Hold the checkpoints that a stage would go on from against what they depend on now; returns what to put aside."""
    config = run.config
    if stage == "teacher" and (run.given_teacher or config.teacher.checkpoint):
        return []
    if stage == "deprivatize" and config.deprivatize.generator is not None:
        return []
    paid = [run.checkpoint(name) for name in ("holdout", "replay", "distill")]
    if stage in ("deprivatize", "distill") and (there := [path for path in paid if path.exists()]):
        _check_generator_stays(run, there[0])
    if stage != "teacher" and run.origin is None and not config.teacher.remote and not run.teacher_onnx.exists():
        return []
    names = {"distill": ("holdout", "replay", "distill"), "evaluate": ("baseline",)}.get(stage, (stage,))
    found = [name for name in names if run.checkpoint(name).exists() and (name != "replay" or config.distill.replay)]
    for name in found:
        content = files.load(run.checkpoint(name))
        saved, depends, stands = content["depends"], run.depends(name), content["step"]
        if name == "deprivatize" and stands > config.deprivatize.steps:
            raise StageError(
                f"{run.checkpoint(name)} stands at step {stands}, and deprivatize.steps is {config.deprivatize.steps}: "
                f"it takes no step back. Say --deprivatize.steps {stands}, or start anew with another --out"
            )
        why = again.another_student(saved, depends) if name in ("distill", "baseline") else None
        if why is None:
            check_depends(run, name, saved, depends)
        elif name == "distill":
            return [functools.partial(again.set_aside_student, run, saved, why)]
    return []


def _check_audited(run: Run) -> None:
    """Refuse an audit that takes other images for those that step 1 saw, and for those that were held from it."""
    path = run.checkpoint("deprivatize")
    if run.config.deprivatize.generator is not None or not path.exists():  # of another run's, membership is not told
        return
    saved, wanted = (
        {key: value for key, value in depends.items() if key in ("seed", "audit.holdout") or key.startswith("data.")}
        for depends in (files.load(path)["depends"], fingerprint(run.config, "deprivatize"))
    )
    differs = [f"{key} was {was} and is {now}" for key, (was, now) in differing(saved, wanted).items()]
    if differs:
        raise StageError(
            f"{path} learnt with other settings, by which the audit would take other images for those that step 1 saw: "
            f"{'; '.join(differs)}. Set that back. What step 1 has seen cannot be held out afterwards: membership "
            "needs a run that begins with --audit.holdout N, in another --out"
        )


def _check_generator_stays(run: Run, paid: Path) -> None:
    """Refuse what would change the generator whose images were asked about; paid: the checkpoint that says so."""
    path, steps = run.checkpoint("deprivatize"), run.config.deprivatize.steps
    if not path.exists():
        raise StageError(
            f"{path} is missing, the generator whose answers {paid} is of: put it back, or start anew with another "
            "--out"
        )
    if (stands := files.load(path)["step"]) != steps:
        raise StageError(
            f"{paid} is of the generator at step {stands}; with deprivatize.steps {steps} it becomes another one, "
            f"whose answers are paid for anew. Say --deprivatize.steps {stands}, or start anew with another --out"
        )
