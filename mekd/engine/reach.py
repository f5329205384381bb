"""Reaching a teacher that is not a file: what it is, how its answers are read, and what the run keeps of both."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mekd import files
from mekd.engine import parallel
from mekd.errors import MekdError, UsageError
from mekd.fingerprint import default_name, images_a_call
from mekd.oracle.answers import Meaning
from mekd.oracle.base import about_scale
from mekd.oracle.function import Function, load
from mekd.oracle.hf import Pictures
from mekd.oracle.http import Denied, Line, Unreachable
from mekd.oracle.images import Encoding, pillow
from mekd.oracle.ledger import Ledger
from mekd.oracle.oip import Model, Oip, check_output, check_transport, describe
from mekd.oracle.remote import Pace, Rate, RemoteOracle, Service, pyrate_limiter
from mekd.settings import flatten, read_saved
from mekd.teacher_config import TeacherConfig

if TYPE_CHECKING:
    from mekd.engine.run import Run


class About(NamedTuple):
    """What is known of a remote teacher before it is asked: classes, sentences for people, and what it is known by."""

    classes: int
    notes: list[str]
    identity: str
    model: Model | None


def look(run: "Run") -> About:
    """What a remote teacher says of itself, and what was set by hand; a metadata request at most, which costs nothing.

    MekdError where the number of its classes is in neither, or both differ.
    """
    teacher, oracle = run.config.teacher, run.config.oracle
    model, notes = None, []
    if teacher.python is not None:
        load(teacher.python)
    elif teacher.protocol == "oip":
        model, note = _model(run)
        check_transport(model, oracle.transport)
        notes = [note, *about_scale(model.datatype.startswith("FP"), oracle.mean, oracle.std)]
    else:
        _line(run).check()
    by_hand = oracle.num_classes if run.class_names is None else len(run.class_names)
    told = None if model is None else model.classes
    if told == 1:
        raise UsageError(
            "the server's metadata say that the output which is read holds 1 value an image; a teacher has at least 2 "
            "classes: name another output with --oracle.output_name, or give a function that answers a share for each "
            "class with --teacher.python"
        )
    if by_hand is not None and told is not None and by_hand != told:
        raise UsageError(
            f"oracle.{'num_classes' if run.class_names is None else 'classes'} says {by_hand} classes, the server's "
            f"metadata {told}: set it to {told}, or name another output with --oracle.output_name"
        )
    classes = by_hand or told
    if classes is None:
        raise UsageError(
            "nothing says how many classes the teacher has, and that is the length of the code that G draws from: list "
            "their names, one a line, with --oracle.classes FILE, or say --oracle.num_classes N"
        )
    versions = () if model is None else model.versions
    kind = "python" if teacher.python is not None else teacher.protocol
    known_by = repr((kind, teacher.name, versions, classes))
    return About(classes, notes, hashlib.sha256(known_by.encode()).hexdigest()[:16], model)


def check(run: "Run") -> None:
    """Raise UsageError for what would keep the teacher from being asked later: a setting, or a missing package."""
    teacher, oracle, model = run.config.teacher, run.config.oracle, run.about_teacher.model
    pictures = oracle.encoding in ("png", "jpeg")
    if pictures and oracle.transport != "uint8":
        raise UsageError(
            f"oracle.encoding is {oracle.encoding!r}: pictures hold pixels, so oracle.transport must be uint8"
        )
    hf = teacher.url is not None and teacher.protocol == "hf"
    if pictures != hf:
        raise UsageError(
            f"oracle.encoding is {oracle.encoding!r}; it must be {'png or jpeg with protocol hf' if hf else 'raw here'}"
        )
    if pictures:
        pillow()
    if oracle.rate is not None or oracle.image_rate is not None:
        pyrate_limiter()
    if model is not None and model.datatype != "UINT8":
        check_channels(run.image[0], "oracle", oracle.mean, oracle.std)
    side(run)
    calls_of(run)
    if _kept(run, run.about_teacher) is None:  # what was asked already goes on as it began
        _check_response(run)


def check_channels(channels: int, section: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise UsageError unless mean and std of a section are one number, or one for each channel of the images."""
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) not in (1, channels):
            raise UsageError(
                f"{section}.{name} is {numbers}, and the images have {channels} channel{'s' if channels > 1 else ''}: "
                f"it must hold one number for all of them{'' if channels == 1 else f', or {channels}'}"
            )


def _check_response(run: "Run") -> None:
    """Raise UsageError where the answers could not be read as the run wants them, so far as nobody need be asked."""
    oracle, model = run.config.oracle, run.about_teacher.model
    label = oracle.response == "label"
    if oracle.output not in ("auto", "logits", "probs"):
        raise UsageError(f"oracle.output is {oracle.output!r}; it must be 'auto', 'logits' or 'probs'")
    if label and oracle.unknown == "rest":
        raise UsageError(
            "oracle.unknown is 'rest' and oracle.response 'label': an image whose best class is not listed would have "
            "no label. List every class with --oracle.classes FILE and say --oracle.unknown error, or take shares with "
            "--oracle.response topk"
        )
    if run.config.teacher.url is not None and run.config.teacher.protocol == "hf":
        if oracle.response == "logits":
            raise UsageError(
                "oracle.response is 'logits', and with protocol hf a teacher answers labels and their shares: say "
                "--oracle.response topk, or probs where it lists every class"
            )
        if oracle.output == "logits" and not label:
            raise UsageError(
                "oracle.output is 'logits', and a list of logits, as protocol hf has it, does not say what is left "
                "out: say --oracle.response label, which takes the best class of any scores"
            )
    if model is not None:
        names = run.class_names is not None
        check_output(model, oracle.response, listed=_listed(run, model), named=names)


def _listed(run: "Run", model: Model) -> bool:
    """Whether the best classes are asked for by the classification extension.

    Of logits a list says too little: the whole output is asked for, and what it is cut to is cut at home.
    """
    oracle = run.config.oracle
    return oracle.response == "topk" and oracle.output != "logits" and model.classification


def open_remote(run: "Run", account: Ledger) -> RemoteOracle:
    """The remote teacher with an account; the first call of a run holds one image, whose answer is read and said."""
    oracle, about = run.config.oracle, run.about_teacher
    encoding = Encoding(oracle.encoding, oracle.quality, side(run))
    batch = calls_of(run)
    share = max(1, (oracle.concurrency or 1) // parallel.world())
    rates: list[Pace] = []
    if oracle.rate is not None:
        calls = Rate(run.ledger, "rate", oracle.rate, log=run.log)
        rates.append(lambda images, stop: calls.wait(1, stop))
    if oracle.image_rate is not None:
        rates.append(Rate(run.ledger, "image-rate", oracle.image_rate, batch, run.log).wait)
    return RemoteOracle(
        run.service or _service(run, about),
        run.image,
        about.classes,
        oracle.response,
        encoding=encoding,
        batch=batch,
        concurrency=share,
        rates=rates,
        meaning=_kept(run, about),
        established=functools.partial(_establish, run, about),
        reading={"output": oracle.output, "classes": run.class_names or (), "unknown": oracle.unknown},
        stop=run.asked_to_stop,
        patience=oracle.patience,
        k=min(oracle.k, about.classes),
        decimals=oracle.decimals,
        transport=oracle.transport,
        ledger=account,
    )


def side(run: "Run") -> int | None:
    """The side in pixels of what goes up, None for the images' own; UsageError where the server wants another one."""
    wanted, model = run.config.oracle.size, run.about_teacher.model
    told = None if model is None else model.size
    if wanted is not None and told is not None and wanted != told:
        raise UsageError(
            f"oracle.size is {wanted}, but the server's model takes {told} pixels: set it to {told}, or null"
        )
    return wanted or told


def calls_of(run: "Run") -> int:
    """Images a call; UsageError where oracle.batch is more than the server takes."""
    model, asked = run.about_teacher.model, run.config.oracle.batch
    most = None if model is None else model.most
    if asked is not None and most is not None and asked > most:
        raise UsageError(f"oracle.batch is {asked}, but the teacher takes {most} images a call: set it to that at most")
    wanted = images_a_call(run.config)
    return wanted if most is None else min(wanted, most)


def _service(run: "Run", about: About) -> Service:
    teacher, oracle = run.config.teacher, run.config.oracle
    check(run)
    if teacher.python is not None:
        return Function(load(teacher.python))
    if about.model is None:
        return Pictures(_line(run), oracle.encoding, about.classes, oracle.base64)
    k = min(oracle.k, about.classes) if _listed(run, about.model) else None
    names = run.class_names or ()
    return Oip(_line(run), about.model, about.classes, mean=oracle.mean, std=oracle.std, k=k, names=names)


def _line(run: "Run") -> Line:
    url, oracle = run.config.teacher.url, run.config.oracle
    assert url is not None
    return Line(url, oracle.headers, oracle.timeout)


def keep(run: "Run") -> None:
    """Write teacher.json: what the server said of its model, if it was looked at, and of which address."""
    about: About | None = vars(run).get("about_teacher")
    if about is not None and about.model is not None:
        run.write_json("teacher.json", {"of": _of(_flat(run)), **dataclasses.asdict(about.model)})


def _model(run: "Run") -> tuple[Model, str]:
    """The server's metadata, and a note on them; those that the run keeps where it does not answer now."""
    oracle, line = run.config.oracle, _line(run)
    try:
        model = describe(
            line, run.image[0], input_name=oracle.input_name, output_name=oracle.output_name,
            transport=oracle.transport, binary=oracle.binary,
        )  # fmt: skip
        return model, model.note
    except (Unreachable, Denied) as error:
        # What was paid stays of use without a server; before that, nothing is to be trained for a wrong address.
        paid = bool(run.asked("deprivatize", "distill", "evaluate", "audit")["queries"])
        if isinstance(error, Denied) and not paid:
            raise
        try:
            kept = _kept_model(run, paid)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unreachable(f"{error} And {run.out / 'teacher.json'}, what it last said, is damaged") from None
        if kept is None:
            raise
        return kept, f"{kept.note}; so it was when it was last looked at, for now {error}"
    finally:
        line.close()


def _kept_model(run: "Run", paid: bool) -> Model | None:
    """What teacher.json has of the same address, read by the same settings; None where it has nothing of these.

    paid: another address will do, as there are answers, which say by themselves whose they are.
    """
    path: Path = run.out / "teacher.json"
    if not path.exists():
        return None
    kept = files.read_json(path)
    of = kept.pop("of", None) or _of(read_saved(run.out / "config.yaml"))  # earlier versions did not write it
    now = _of(_flat(run)) | ({"address": of["address"]} if paid else {})
    return Model(**kept | {"versions": tuple(kept["versions"])}) if of == now else None


def _of(flat: dict[str, Any]) -> dict[str, Any]:
    """What metadata are a result of: host and path, as a query may hold a key, and the settings they are read by."""
    names = [f"oracle.{name}" for name in ("input_name", "output_name", "transport", "binary")]
    return {"address": default_name(TeacherConfig(url=flat.get("teacher.url"))), **{n: flat.get(n) for n in names}}


def _flat(run: "Run") -> dict[str, Any]:
    return dict(flatten(dataclasses.asdict(run.config)))


def _kept(run: "Run", about: About) -> Meaning | None:
    """How the run reads its teacher, if it was asked before."""
    path: Path = run.out / "oracle.json"
    try:
        kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if kept.get("belongs") != _belongs(run, about):
            return None
        known: dict[str, Any] = kept["meaning"]
        return Meaning(**known, classes=tuple(run.class_names or ()), unknown=run.config.oracle.unknown)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{path} is damaged ({error}): delete it; the next answer is then read anew") from error


def _establish(run: "Run", about: About, meaning: Meaning) -> None:
    run.log(f"teacher: {meaning.note}")
    content = {"meaning": meaning.kept(), "belongs": _belongs(run, about)}
    if parallel.rank() == 0:
        files.write_text(run.out / "oracle.json", json.dumps(content, indent=1) + "\n")


def _belongs(run: "Run", about: About) -> dict[str, str]:
    oracle = run.config.oracle
    return {"teacher": about.identity, "response": oracle.response, "output": oracle.output}


class _Damaged(MekdError, ValueError):
    """A small file of the run cannot be read."""
