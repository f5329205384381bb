"""What a student is worth: accuracy, and agreement with the teacher, against the queries that were paid.

One image is one query. One teacher for a data set; one student network, and one recipe for every row. What rows have in
common is made once: the teacher, a generator for each recipe and seed, a store of answers that grows. A row that is in
the table is not measured again; the same command goes on where it was stopped, in the middle of a stage too.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bench import choices, curves, pools, tables
from bench.timing import processor
from mekd import cli, files
from mekd.config import Config
from mekd.engine import evaluate
from mekd.engine.checkpoint import Interrupted, asked_to_stop, stopped_by_signals
from mekd.engine.collect import collect
from mekd.engine.deprivatize import deprivatize
from mekd.engine.distill import train_student
from mekd.engine.result import STUDENT, write_student
from mekd.engine.run import Run
from mekd.engine.teacher import export_teacher, train_teacher
from mekd.errors import MekdError
from mekd.metrics import accuracy
from mekd.nets.frozen import freeze
from mekd.oracle.export import Classifier, export

COLUMNS = (
    "data", "private", "row", "response", "queries", "seed", "accuracy", "agreement", "steps", "seconds", "commit",
)  # fmt: skip
#: The experiment of each data set.
CONFIGS = {
    "digits": "configs/digits.yaml",
    "mnist": "configs/mnist.yaml",
    "fashion_mnist": "configs/fashion_mnist.yaml",
    "cifar10": "configs/cifar10.yaml",
    "tree": "configs/fashion_mnist_tree.yaml",
}
#: What D learns by where its privacy has a number: of large batches, as the noise is added once for each.
DP = (
    "--deprivatize.augment false --deprivatize.d_width 0.5 --deprivatize.batch 256 --deprivatize.steps 1500 "
    "--evaluate.baseline false"
)
#: What each row changes of the experiment's settings.
ROWS = {
    "mekd": "",
    # The recipe of the first release.
    "mekd-before": "--deprivatize.nuisance 0 --deprivatize.d_width 1 --deprivatize.dropout 0.25 "
    "--deprivatize.alpha 0.5 --deprivatize.augment false --data.shift false --distill.augment false --distill.image 5",
    "kl": "--distill.image 0",
    "l1": "--distill.beta 0",
    # One setting changed at a time.
    "no-augment": "--distill.augment false",
    "no-augment-d": "--deprivatize.augment false",
    "narrow-d": "--deprivatize.d_width 1",
    "image-20": "--distill.image 20",
    # As many steps on the private images at home as with answers (STEPS is those).
    "pretrain": "--distill.pretrain STEPS",
    "plain-pretrain": "--distill.pretrain STEPS",
    "dp-none": DP,
    **{f"dp-{epsilon}": f"{DP} --deprivatize.dp {epsilon}" for epsilon in (10, 3, 1)},
    # A quarter of the queries in a first round, the others in a second one, with a third of step 1's steps.
    "rounds": "",
    # A quarter of the queries at random, the others of images that a student of these chooses.
    **dict.fromkeys((*choices.RULES, choices.SEARCH), ""),
    "second": "",  # mekd's student is asked, which costs nothing: a second one, of its probabilities
    "plain": "",  # every private image is sent once
    "ceiling": "--data.local_fraction 1",  # every training image is sent once
    "pool": "",  # images of another set are sent, drawn at random
    "pool-uncertain": "",  # half of them at random, and those of which a student of these answers is least certain
}
#: Teachers of the table's rows that take an hour to train, by what their training depends on.
TEACHERS = Path(__file__).parent / "teachers"
#: Answers held out of a store, by which the best student is chosen; they are paid like the others.
HOLDOUT = 256
#: The queries of a first round where those of the second are unlimited.
FIRST_ROUND = 5000
#: What a student that is asked itself is called.
FIRST = "first.onnx"
#: A table is made of rows, good or bad: none is stopped because its answers name few classes.
QUIET = "--engine.progress false --distill.coverage 0"
QUICK = "--teacher.steps 150 --deprivatize.steps 100 --distill.steps 100 --distill.eval_every 50"


@dataclass(frozen=True)
class Job:
    """A row of the table, before it is measured. private is a fraction, queries a number, unlimited, private or all."""

    data: str
    private: str
    row: str
    response: str
    queries: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in COLUMNS[:6])


def main(arguments: Sequence[str]) -> int:
    """Measure what is not in the table yet; returns 0, or 3 where time or a signal stopped it."""
    parser = argparse.ArgumentParser(prog="python -m bench students", description=__doc__, epilog=(
        "Other options are settings of mekd for every row, such as --distill.steps 2500."))  # fmt: skip
    parser.add_argument("data", choices=CONFIGS)
    parser.add_argument("--path", help="folder of the data set's files, where it is not the configuration's")
    parser.add_argument("--private", nargs="+", default=["0.1"], help="shares of the training images")
    parser.add_argument("--rows", nargs="+", default=["mekd", "kl", "plain", "ceiling"], choices=ROWS)
    parser.add_argument("--response", nargs="+", default=["probs"], help="probs, label, logits or topk")
    parser.add_argument("--queries", nargs="+", help="numbers, or unlimited; 20000 unlimited without it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pool", metavar="NAME=FOLDER", help="images for the rows pool: a data set, or photos=FOLDER")
    parser.add_argument("--out", type=Path, help="where teachers, generators, stores are; runs/students without it")
    parser.add_argument("--results", type=Path, help="folder of students.csv; bench/results/PROCESSOR without it")
    parser.add_argument("--minutes", type=float, help="stop after so long, saved")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, apart from the real ones")
    options, words = parser.parse_known_args(arguments)
    said = " ".join(words)
    if options.path:
        words += ["--data.path", options.path]
    if options.quick:
        words = [*QUICK.split(), *words]
    options.queries = options.queries or ["1000" if options.quick else "20000", "unlimited"]
    for queries in options.queries:
        if queries != "unlimited" and not (queries.isdecimal() and int(queries) > HOLDOUT):
            parser.error(f"--queries {queries}: a number above {HOLDOUT}, which are held out of it, or unlimited")
    # Neither its teacher nor its rows may be taken for real ones.
    options.out = options.out or Path("runs/students-quick" if options.quick else "runs/students")
    results = options.results or (options.out if options.quick else Path("bench/results") / slug(processor()))
    table = results / "students.csv"
    place = options.out / options.data
    kept = tables.settings(results)
    for of in (f"{options.data} {private}" for private in options.private):
        if kept.get(of, said) != said:
            parser.error(
                f"the rows of {of} in {table} were made with the settings {kept[of] or '(none)'}, and these are "
                f"{said or '(none)'}: name another folder with --results"
            )
    done = {tuple(row[name] for name in COLUMNS[:6]) for row in tables.read(table)}
    left = [job for job in jobs(options) if job.key not in done]
    print(f"{len(left)} rows to measure, into {table}", flush=True)
    if options.minutes:
        timer = threading.Timer(60 * options.minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    try:
        with stopped_by_signals():
            for job in left:
                tables.append(table, measure(job, place, words, options.pool), COLUMNS)
                tables.keep_settings(results, f"{job.data} {job.private}", said)
    except MekdError as error:
        print(error)
        return 3 if isinstance(error, Interrupted) else error.status
    print("\n".join(curves.table(tables.read(table), options.data)))
    for picture in curves.draw(tables.read(table), options.data, results):
        print(f"drawn: {picture}")
    return 0


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """The rows that are asked for, a seed after the other."""
    for seed in options.seeds:
        for private in options.private:
            for response in options.response:
                for row in options.rows:
                    fixed = {"plain": ["private"], "plain-pretrain": ["private"], "ceiling": ["all"]}.get(row)
                    for queries in fixed or options.queries:
                        if not (row.startswith(("pool", "ask-")) and queries == "unlimited"):
                            yield Job(options.data, private, row, response, queries, seed)


def measure(job: Job, place: Path, words: list[str], pool: str | None) -> dict[str, Any]:
    """Make what the row needs, train its student, look at the test images; returns the row."""
    own = f"--data.local_fraction {job.private} --oracle.response {job.response} --seed {job.seed}"
    experiment = ["--config", CONFIGS[job.data], *QUIET.split(), *words, *own.split()]
    config = settings(*experiment, *ROWS[job.row].replace("STEPS", "1").split())
    if "STEPS" in ROWS[job.row]:
        config = replace(config, distill=replace(config.distill, pretrain=config.distill.steps))
    teacher = teacher_of(replace(settings(*experiment), seed=0), place)
    config = replace(config, teacher=replace(config.teacher, onnx=str(teacher.teacher_onnx)))
    without = replace(config, deprivatize=replace(config.deprivatize, generator=None))
    if job.row in ("plain", "plain-pretrain", "ceiling"):
        student, run = sent(without, place)
    elif job.row == "second":
        student, run = taught_again(config, place, job.queries)
    elif job.row == "rounds":
        student, run = in_two_rounds(config, place, job.queries)
    elif job.row.startswith("ask-"):
        student, run = chosen(config, place, int(job.queries), job.row)
    elif job.row.startswith("pool"):
        student, run = pooled(without, place, int(job.queries), job.row == "pool-uncertain", pool)
    else:
        student, run = distilled(config, place, job.queries)
    with locked(teacher.out):
        labels, answers = evaluate.ask_test(teacher)
    predicted = evaluate.predictions(student, run.data)
    measured = {
        "accuracy": f"{100 * accuracy(predicted, labels):.2f}",
        "agreement": f"{100 * accuracy(predicted, answers):.2f}",
        "steps": config.distill.steps,
        "seconds": round(seconds(run)),
        "commit": commit(),
    }
    row = dict(zip(COLUMNS[:6], job.key, strict=True)) | measured
    print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def settings(*words: str) -> Config:
    """The configuration of a command line."""
    parsed = cli.parse(list(words))
    assert parsed is not None
    return parsed[0]


def teacher_of(config: Config, place: Path) -> Run:
    """The data set's teacher, of seed 0, trained once."""
    fraction = replace(config.data, local_fraction=0.1)  # it knows no private images
    run = Run(replace(config, data=fraction, oracle=replace(config.oracle, response="probs")), place / "teacher")
    # Left to the machine, the precision is one like another: the kept ones were trained in bfloat16.
    auto = config.teacher.precision == "auto"
    as_kept = replace(run.config.teacher, precision="bfloat16") if auto else run.config.teacher
    kept = TEACHERS / f"{config.data.name}-{digest(Run(replace(run.config, teacher=as_kept), run.out), 'teacher')}.onnx"
    with locked(run.out):
        if not run.teacher_onnx.exists() and kept.exists():
            files.write(run.teacher_onnx, lambda file: file.write(kept.read_bytes()))
        if not run.teacher_onnx.exists():
            train_teacher(run)
            export_teacher(run)
    return run


def distilled(config: Config, place: Path, queries: str) -> tuple[nn.Module, Run]:
    """The student of mekd, with its generator and its store."""
    config = with_generator(config, place)
    if queries != "unlimited":
        _, config = stored(config, place, int(queries))
    return learned(named(config, place, "student", "distill"))


def learned(run: Run) -> tuple[nn.Module, Run]:
    """The best student of a run."""
    with locked(run.out):
        student, best, _ = train_student(run)
    student.load_state_dict(best["weights"])
    return student, run


def with_generator(config: Config, place: Path) -> Config:
    """The configuration with its generator, which is trained where it is not there."""
    if config.deprivatize.generator is not None:
        return config
    trained = named(config, place, "generator", "deprivatize", config.deprivatize.steps)
    with locked(trained.out):
        trained.save_config()
        deprivatize(trained)
    return replace(config, deprivatize=replace(config.deprivatize, generator=str(trained.out)))


def stored(config: Config, place: Path, queries: int) -> tuple[Run, Config]:
    """The run whose store has so many answers, and the configuration that learns from it."""
    config, replayed = with_generator(config, place), queries - HOLDOUT
    config = replace(config, distill=replace(config.distill, replay=replayed, holdout=HOLDOUT))
    asked = named(config, place, "answers", "replay", HOLDOUT)
    return asked, filled(asked, replayed)


def filled(run: Run, replayed: int) -> Config:
    """Ask for what is missing in a run's store; returns the configuration that learns from it."""
    exact = freeze(run.load_generator())
    with locked(run.out):
        kept = run.read_json("replay/replay.json")
        collect(run, "holdout", exact, HOLDOUT)
        collect(run, "replay", exact, max(replayed, kept["count"] if kept else 0))
    return replace(run.config, distill=replace(run.config.distill, store=str(run.out)))


def sent(config: Config, place: Path) -> tuple[nn.Module, Run]:
    """The student of the answers to real images, all private ones."""
    run = named(config, place, "plain", "baseline")
    with locked(run.out):
        return evaluate.train_baseline(run), run


def pooled(config: Config, place: Path, queries: int, uncertain: bool, pool: str | None) -> tuple[nn.Module, Run]:
    """The student of the answers to images of another set, all at random, or half by a first student's margin."""
    images = pools.load(pool, config.data.size, Run(config, place / "unnamed").image[0], config.seed)
    run = named(config, place, "pool", "baseline", {"pool": pool, "queries": queries, "uncertain": uncertain})
    with locked(run.out):
        return pools.train(run, images, queries, uncertain), run


def chosen(config: Config, place: Path, queries: int, rule: str) -> tuple[nn.Module, Run]:
    """The student of a store of which a first one, of a quarter of the queries, has chosen the images."""
    asked = max(2 * HOLDOUT, queries // 4)
    first, run = distilled(config, place, str(asked))
    other = None
    if rule == choices.OF_TWO:  # the other one learns by the KL alone
        other, _ = distilled(replace(config, distill=replace(config.distill, image=0.0)), place, str(asked))
    known = choices.Known(run, first, asked - HOLDOUT, other)
    config = replace(run.config, distill=replace(run.config.distill, replay=queries - HOLDOUT, store=None))
    asks = named(config, place, "chosen", "replay", HOLDOUT, rule, queries)
    config = filled(choices.Choosing(asks.config, asks.out, rule=rule, known=known), queries - HOLDOUT)
    return learned(named(config, place, "student", "distill", rule, queries))


def in_two_rounds(config: Config, place: Path, queries: str) -> tuple[nn.Module, Run]:
    """The student of a second round, which goes on from a first one's generator, student and answers."""
    asked = str(FIRST_ROUND if queries == "unlimited" else max(2 * HOLDOUT, int(queries) // 4))
    first, run = distilled(config, place, asked)
    with locked(run.out):
        if not (run.out / STUDENT[-1]).exists():
            run.save_config()
            write_student(run, first)
    step1 = replace(config.deprivatize, after=str(run.out), steps=config.deprivatize.steps // 3)
    left = queries if queries == "unlimited" else str(int(queries) - int(asked))
    return distilled(replace(config, deprivatize=step1), place, left)


def taught_again(config: Config, place: Path, queries: str) -> tuple[nn.Module, Run]:
    """The student of a student's probabilities for fresh images, as many as there are steps: they are not paid."""
    first, run = distilled(config, place, queries)
    file = run.out / FIRST
    with locked(run.out):
        if not file.exists():
            export(Classifier(first), file, run.image, run.config.oracle.transport)
    config = replace(
        run.config,
        teacher=replace(run.config.teacher, onnx=str(file)),
        oracle=replace(run.config.oracle, response="probs"),
        distill=replace(run.config.distill, store=None, replay=None, holdout=config.distill.holdout),
    )
    return distilled(config, place, "unlimited")


def seconds(run: Run) -> float:
    """How long a row's stages took: their checkpoints lie in its own folder, its generator's, store's and teacher's.

    Not in it: the first students of a row that chooses what is asked about.
    """
    config, own, asked = run.config, run.out, Path(run.config.distill.store or run.out)
    taken = [own / f"checkpoints/{stage}.pt" for stage in ("pretrain", "distill", "baseline")]
    taken += [asked / f"checkpoints/{stage}.pt" for stage in ("holdout", "replay")]
    if config.deprivatize.generator is not None:
        taken.append(run.checkpoint("deprivatize"))
    if Path(str(config.teacher.onnx)).name == FIRST:
        taken.append(Path(str(config.teacher.onnx)).parent / "checkpoints/distill.pt")
    before = 0.0
    if config.deprivatize.after is not None:
        first = settings("--config", f"{config.deprivatize.after}/config.yaml")
        before = seconds(Run(first, Path(config.deprivatize.after)))
    return before + sum(float(files.load(path)["seconds"]) for path in taken if path.exists())


def named(config: Config, place: Path, kind: str, stage: str, *more: Any) -> Run:
    """The run whose folder is called after what a stage of it depends on, and more that does not stand there."""
    return Run(config, place / f"{kind}-{digest(Run(config, place / 'unnamed'), stage, *more)}")


def digest(run: Run, stage: str, *more: Any) -> str:
    """What a stage depends on, and more, in ten letters."""
    return hashlib.sha256(json.dumps((run.depends(stage), *more), sort_keys=True).encode()).hexdigest()[:10]


def slug(name: str) -> str:
    """A processor's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The revision that measures."""
    words = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time makes what is in a folder; another one waits, and finds it made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if asked_to_stop():
                raise Interrupted(f"stopped while another process is in {folder}; the same command goes on")
            time.sleep(1)
        yield
