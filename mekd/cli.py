"""The command line: mekd STAGE --config FILE --key.sub value."""

import contextlib
import functools
import itertools
import os
import re
import sys
from pathlib import Path

from mekd import system
from mekd.config import Config
from mekd.errors import MekdError, UsageError
from mekd.settings import check_text, dump_yaml, flatten, known_keys, must_be, nearest, read_yaml

USAGE = """usage: mekd STAGE [--config FILE] [--out DIR] [--key.sub value ...] [--profile] [--print_config]

stages, in the order in which `mekd run` takes them:
  teacher       train a classifier that plays the black box (an experiment; --teacher.onnx FILE gives yours)
  export        write it as teacher.onnx, preprocessing inside
  deprivatize   step 1: a generator learns to invert the teacher; private images stay here
  distill       step 2: the student learns from generated images
  evaluate      a simulation, off unless asked: test accuracy and the plain baseline
  audit         what can be said of equivalence and privacy, measured at home: audit.json (mekd[audit])
  report        curves, pictures and tables of the run: report.html, report.md, and README.md, the student's model card
  run           all of them; each resumes where it stopped

other commands:
  quote         what a run will ask of a remote teacher: queries, calls, bytes, price, time. Nothing is paid
  doctor        what this machine can run, and what is missing for the rest; with --config FILE also what each stage
                of it will need: memory and time an image, queries, bytes
  predict       what a student says of photos, in any folders: mekd predict student.onnx PHOTOS --out predictions.csv
  serve         FILE.onnx behind an address, by the Open Inference Protocol v2 and as Hugging Face's API has it: for a
                student, and for trying out how a teacher is asked there; mekd serve --help lists its options
  push          put the student of a run on the Hugging Face Hub: mekd push RUN OWNER/NAME; its generator and the paid
                answers only where asked, private images never (mekd[hub])
  pull          fetch it: mekd pull OWNER/NAME --out FOLDER
  watch         the page of a run, runs/digits say, while it goes on, in a browser of this machine: mekd watch RUN
                --port N
  selftest      every loss on this machine against float64, and its speed: a table for a bug report (--device, --impl)

mekd STAGE --help lists every setting. A run's folder is --out, or runs/NAME for configs/NAME.yaml. --profile writes
where the time of ten steps goes to its folder profile. --dry-run goes through all stages in a few steps, against a
made-up teacher in place of a remote one. --yes agrees to the quote of a remote teacher where nobody can be asked.
"""
#: Words of the command line that are no settings.
FLAGS = ("--yes", "--dry-run")
#: Stages that look at a run as it is: without --config they take the settings that it was saved with, and would else
#: write the defaults over them. Others decide anew what was not said, of a teacher or a budget that may be another one.
OF_A_RUN = ("audit", "report")
#: Commands that have no checkpoint: interrupted, they begin anew.
ANEW = ("predict", "push", "pull", "quote", "doctor", "selftest", "serve", "watch")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a mistake, 3 stopped and saved, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        return _dispatch(command, rest)
    except MekdError as error:
        system.say(f"mekd {command}: {error}", sys.stderr)
        return error.status
    except BrokenPipeError:
        if command not in ANEW:  # a run's own lines end nothing
            raise
        system.nowhere(sys.stdout)
        return 1
    except KeyboardInterrupt:
        goes_on = "" if command in ANEW else "; the same command goes on from the last checkpoint"
        system.say(f"\nmekd {command}: interrupted{goes_on}", sys.stderr)
        return 130
    finally:
        for stream in (sys.stdout, sys.stderr):
            system.settle(stream)


def _dispatch(command: str, words: list[str]) -> int:
    if command in ("", "-h", "--help"):
        system.say(USAGE.rstrip())
        return 0 if command else 2
    if command == "--version":
        from mekd import __version__

        system.say(f"mekd {__version__}")
        return 0
    if command == "doctor":
        from mekd.doctor import doctor

        status = doctor()
        return status if not words else forecast(words) or status
    if command == "selftest":
        from mekd.selftest import main as selftest

        return selftest(words)
    if command == "predict":
        from mekd.predict import main as predict

        return predict(words)
    if command == "serve":
        from mekd.serve import main as serve

        return serve(words)
    if command in ("push", "pull"):
        from mekd import hub

        return hub.push(words) if command == "push" else hub.pull(words)
    if command == "watch":
        from mekd.watch import main as watch

        return watch(words)
    from mekd.engine.stages import STAGES

    if command not in (*STAGES, "run", "quote"):
        raise UsageError(
            f"there is no such stage; there are {', '.join(STAGES)}, run, quote, doctor, predict, serve, watch, push, "
            "pull and selftest"
        )
    flags = [word for word in words if word in FLAGS]
    words = [word for word in words if word not in FLAGS]
    parsed = parse(with_saved(words) if command in OF_A_RUN else words)
    if parsed is None:
        return 0
    config, out = parsed
    from mekd.engine import parallel
    from mekd.engine.checkpoint import asked_to_stop, stopped_by_signals
    from mekd.engine.folder import alone
    from mekd.engine.preflight import preflight
    from mekd.engine.quote import confirm, confirm_images, dry_run, quote
    from mekd.engine.run import Run

    if command == "report" and not out.is_dir():
        raise UsageError(f"--out is {str(out)!r}; there is no run there")
    if command == "quote":
        about = Run(config, out)
        notes = about.about_teacher.notes if config.teacher.remote else []
        print("\n".join([*(f"teacher: {note}" for note in notes), *quote(about)]))
        return 0
    parallel.join(config.engine.device)
    agreed = "--yes" in flags
    stages = list(STAGES) if command == "run" else [command]
    dry = "--dry-run" in flags
    with contextlib.nullcontext() if dry else alone(out):
        send = functools.partial(confirm_images, agreed=agreed)
        run = Run(config, out, asked_to_stop=asked_to_stop, agree_to_send=send)
        if dry:
            dry_run(run, stages)
            return 0
        preflight(run, stages, lambda: confirm(run, stages, agreed))
        try:
            with stopped_by_signals():
                for stage in stages:
                    STAGES[stage](run)
        finally:
            run.tracks.close()
    parallel.leave()
    return 0


def with_saved(words: list[str]) -> list[str]:
    """The words, behind the settings of the run in --out where there is one and no --config is given."""
    out = _value_of(words, "--out")
    if out is None or _value_of(words, "--config") is not None or not (Path(out) / "config.yaml").is_file():
        return words
    return ["--config", str(Path(out) / "config.yaml"), *words]


def forecast(words: list[str]) -> int:
    """What a configuration needs on this machine; 0 if it fits."""
    parsed = parse(words)
    if parsed is None:
        return 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for memory alone
    from mekd.forecast import forecast as needs

    return needs(*parsed)


def parse(words: list[str]) -> tuple[Config, Path] | None:
    """The configuration and the run's folder; None if --print_config or --help printed what was asked.

    Settings come from the dataclasses, then --config FILE, then the words behind it. Raises ValueError naming the
    setting, what it was and what it may be.
    """
    from jsonargparse import ArgumentParser

    if "--profile" in words:
        words = [word for word in words if word != "--profile"] + ["--engine.profile", "true"]
    _check_words(words)
    parser = ArgumentParser(prog="mekd STAGE", exit_on_error=False, add_help=True)
    parser.add_argument("--config", type=str, default=None, metavar="FILE", help="YAML file of settings, or digits")
    parser.add_argument("--out", type=str, default=None, metavar="DIR", help="the run's folder")
    parser.add_class_arguments(Config, as_group=False)
    try:
        source = _value_of(words, "--config")
        if source is not None:
            tree = read_yaml(shipped(source) or source)
            try:
                parser.parse_object(tree)  # set_defaults takes text for any type
            except Exception as error:
                raise UsageError(f"{source}: {_plain(str(error))}") from error
            parser.set_defaults(dict(flatten(tree)))
        values = parser.instantiate(parser.parse_args([word for word in words if word != "--print_config"]))
        config = Config(**{name: values[name] for name in Config.__dataclass_fields__})
    except SystemExit:
        return None
    except MekdError:
        raise
    except Exception as error:  # the parser's, and those of the settings' own checks
        advice = "; a run's folder is --out FOLDER, and mekd STAGE --help lists the settings"
        stray = "unrecognized arguments" in str(error).lower()
        raise UsageError(_plain(str(error)) + (advice if stray else "")) from error
    if "--print_config" in words:
        system.say(dump_yaml(config).rstrip())
        return None
    if values["out"] == "":
        raise UsageError("--out is ''; give the run's folder, or leave it out for runs/NAME")
    out = values["out"] or f"runs/{Path(values['config']).stem if values['config'] else 'default'}"
    return config, Path(out)


def shipped(name: str) -> Path | None:
    """The file of a configuration that comes with mekd, by its name; None where that is a file, or no such name."""
    if Path(name).exists():
        return None
    package = Path(__file__).parent
    places = [folder / "configs" / f"{name}.yaml" for folder in (package, package.parent)]  # installed, or a checkout
    return next((place for place in places if place.is_file()), None)


def _check_words(words: list[str]) -> None:
    known = {*known_keys(), "config", "out", "print_config", "help"}
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise UsageError("--config is given more than once; a run has one file of settings: write them into one")
    for word, following in itertools.pairwise([*words, "--"]):
        key, given, value = word[2:].partition("=")
        if word.startswith("--") and key not in known:
            raise UsageError(f"there is no setting {word}; {nearest(key)}")
        if word.startswith("--") and "." in key:  # a setting, and not --out or --config
            check_text(key, value if given else following)


def _value_of(words: list[str], option: str) -> str | None:
    """What follows an option: of several the last, as for the parser."""
    for i, word in reversed(list(enumerate(words))):
        if word == option and i + 1 < len(words):
            return words[i + 1]
        if word.startswith(option + "="):
            return word.partition("=")[2]
    return None


def _plain(message: str) -> str:
    """The parser's message on one line; of a value of another type, which setting it is and what that may be."""
    message = " ".join(message.split())
    found = re.fullmatch(r'Parser key "([\w.]+)": .*?(?:Got|Given) value: (.*)', message)
    if found is None or found[1] not in known_keys():
        return message
    given = "cannot be read" if found[1] == "oracle.headers" else f"is {found[2]}"  # a key may stand in it
    return f"{found[1]} {given}; it must be {must_be(found[1])}"
