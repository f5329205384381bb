"""Everything that can be set, in one tree of frozen dataclasses."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mekd.checks import SCALES, TOPK_RESTS, check_choice
from mekd.codes import CODES
from mekd.pixels import SIDES
from mekd.teacher_config import PRECISIONS, OracleConfig, TeacherConfig, above_zero, at_least_0, within

#: Hyper-parameters by name: ours, the paper's (Ma et al., 2024) and those of the authors' public code.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {"tau": 5.0, "kl_tau": 1.0, "beta": 1.0, "scale": "tau2", "reduction": "mean", "image": 20.0},
    "paper": {"tau": 5.0, "kl_tau": 1.0, "beta": 0.5, "scale": "one", "reduction": "batchmean", "image": 1.0},
    "authors": {"tau": 5.0, "kl_tau": 5.0, "beta": 1.0, "scale": "tau", "reduction": "mean", "image": 1.0},
}

#: What engine.track may name.
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Args:
        name: photos, your own, unlabelled, of any format and in any folders; digits, mnist, fashion_mnist, cifar10,
            cifar100; or a tree of files with train in it, and val where evaluate is enabled: folder (class folders of
            images), webdataset, tfrecord or parquet (as Hugging Face has it; labels may be missing). null: photos,
            or folder where path holds the folder train, or parquet where path or its data holds train*.parquet
        path: folder of the photos, or of the data set's own files (idx, CIFAR's python batches, a tree); digits need
            none
        size: side of an image in pixels: 16, 32, 64, 128 or 224
        local_fraction: share of the training images that are the user's private, unlabelled ones; null: 1 for photos,
            else 0.1
        flip: whether mirrored images are as likely and of the same class: D sees the private ones mirrored at random,
            and the student the replayed ones; null: of photos, not of data sets
        shift: the same of images shifted by up to an eighth of the side, edges repeated; not of trees; null: of photos
        loader: what reads a tree: dali or torchvision
        workers: threads (dali) or processes (torchvision) of each process that read a tree
        resize: the shorter side in pixels before the centre of a tree's image is cropped; null for size * 256 / 224
        on_error: an image of a tree that cannot be read stops the run (raise) or is left out and counted (skip)
    """

    name: str | None = None
    path: str | None = None
    size: int = 32
    local_fraction: float | None = None
    flip: bool | None = None
    shift: bool | None = None
    loader: str = "dali"
    workers: int = 2
    resize: int | None = None
    on_error: str = "raise"

    def __post_init__(self) -> None:
        check_choice("data.size", self.size, SIDES)
        check_choice("data.loader", self.loader, ("dali", "torchvision"))
        check_choice("data.on_error", self.on_error, ("raise", "skip"))
        if self.local_fraction is not None:
            within("data.local_fraction", self.local_fraction, 0, 1)
        if self.workers < 0 or (self.loader == "dali" and self.workers < 1):
            raise ValueError(f"data.workers is {self.workers}; it must be at least 1 (torchvision: 0)")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"data.resize is {self.resize}; it must be at least data.size, {self.size}")

    def decided(self) -> "DataConfig":
        """With the settings as their null is meant; without a path the name stays open."""
        name, fraction = self.name, self.local_fraction
        if name is None and self.path is not None:
            # Path.is_dir would raise where a folder on the way may not be entered.
            name = "folder" if os.path.isdir(Path(self.path) / "train") else "photos"
            if os.path.isdir(self.path) and any(
                next(Path(self.path).glob(f"{one}*.parquet"), None) for one in ("train", "data/train", "train/")
            ):
                name = "parquet"
        if fraction is None:
            fraction = 1.0 if name == "photos" else 0.1
        flip, shift = self.flip, self.shift
        if name is not None:
            flip, shift = (name == "photos" if value is None else value for value in (flip, shift))
        return replace(self, name=name, local_fraction=fraction, flip=flip, shift=shift)


@dataclass(frozen=True)
class DeprivatizeConfig:
    """Step 1: the generator learns to invert the teacher.

    Args:
        steps: steps of the discriminator and of the generator
        batch: images a step
        lr: Adam's learning rate
        alpha: weight of the information term, 0.5 in the paper; 0 asks the teacher nothing
        minimax: G minimises log(1 - D) instead of -log D
        nuisance: entries of G's second input, drawn from N(0, I), so that one code has many images; 0: the paper
        width: multiplies the generator's channels
        d_width: multiplies the discriminator's channels
        precision: of the convolutions in a step: float32, bfloat16, or auto, as in teacher.precision
        dropout: share of the discriminator's channels that is left out; 0 where private images are many
        augment: D sees some of the private and of the drawn images shifted, and without a square of half the side: the
            more, the better it knows the private ones by heart; null: true, but as it was in a run that is there
        ema: decay of an average of G's weights, used in step 2; 0 for the last weights
        dp: epsilon: D learns by DP-SGD, so that G and whatever it draws are (epsilon, delta)-differentially private for
            each private image, delta = 1 / (10 images); null: without noise, and without such a number
        clip: the norm to which DP-SGD clips the gradient of each private image
        latents: D and G learn from the same images of a step (shared), or G from others of its own (fresh)
        budget: queries at most; null for no limit
        generator: the folder of another run, whose trained generator is used instead of training one
        after: the folder of a finished run, to be gone on from in a second round of so many steps: its student names
            the private images at home, and D judges an image together with its class, so that G learns to draw the
            class of a code's largest entry. The answers that it paid for and kept are learnt from as well
    """

    steps: int = 20000
    batch: int = 64
    lr: float = 2e-4
    latents: str = "shared"
    alpha: float = 0.0
    minimax: bool = False
    nuisance: int = 54
    width: float = 1.0
    d_width: float = 4.0
    precision: str = "auto"
    dropout: float = 0.25
    augment: bool | None = None
    ema: float = 0.999
    dp: float | None = None
    clip: float = 1.0
    budget: int | None = None
    generator: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        check_choice("deprivatize.latents", self.latents, ("shared", "fresh"))
        check_choice("deprivatize.precision", self.precision, PRECISIONS)
        above_zero("deprivatize", self, "steps", "batch", "lr", "width", "d_width", "clip")
        if self.dp is not None:
            above_zero("deprivatize", self, "dp")
        if self.budget is not None:
            at_least_0("deprivatize", self, "budget")
        if self.nuisance < 0:
            raise ValueError(f"deprivatize.nuisance is {self.nuisance}; it must be at least 0 entries")
        within("deprivatize.dropout", self.dropout, 0, 1)
        within("deprivatize.ema", self.ema, 0, 1)
        if self.alpha < 0:
            raise ValueError(f"deprivatize.alpha is {self.alpha}; it must be at least 0")


@dataclass(frozen=True)
class DistillConfig:
    """Step 2: the student learns.

    Args:
        student: resnet8, 20, 32, 56, 110, torchvision:NAME, timm:NAME, or your own: package.module:factory or
            FILE.py:factory, called with num_classes and channels
        checkpoint: a state_dict that the student begins with; null for random weights
        pretrain: steps in which the student first learns of the private images alone, at home, without an answer: two
            views of an image are nearer to each other than to other images (SimCLR); 0 for none
        steps: SGD steps with a cosine learning rate
        batch: images a step
        lr: peak learning rate
        weight_decay: L2 penalty
        replay: ask this many queries once and reuse them every epoch; 0 for fresh ones every step; null: what
            oracle.budget reaches for, and 0 for a file without a budget
        augment: the student sees replayed images mirrored and shifted at random, where data.flip and data.shift say so;
            the answer is that to the image as it was sent; null: true, but as it was in a run that is there
        keep: what G draws from the replayed answers is drawn every step (none) or once, and kept as uint8 or bfloat16
        holdout: synthetic queries kept apart, by which the best student is chosen
        eval_every: steps between two looks at the holdout
        preset: default, paper or authors: what the settings below are where they are null
        tau: divides the code
        kl_tau: temperature of the KL
        beta: weight of the KL
        scale: the KL's factor: tau2, tau or one
        reduction: of the image distance: mean or batchmean
        image: weight of the image distance; of label answers null is 4 in the default preset
        code: auto, logits, log_probs, onehot or standardized
        rest: what top-k answers leave out is, in the KL, spread, dropped (drop) or one class more (tail); in the code
            it is spread
        precision: of the convolutions in a step: float32, bfloat16, float16 (with a scaler), or auto, as in
            teacher.precision
        budget: queries at most, the holdout's included; null for no limit
        store: the folder of another run, whose answers are learnt from instead of asking for any: all of them, or the
            first distill.replay
        coverage: share of the classes (of those that as many answers could show) below which a run stops after its
            first answers, before more are paid; 0 to go on whatever they show
    """

    student: str = "resnet8"
    checkpoint: str | None = None
    pretrain: int = 0
    steps: int = 20000
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    replay: int | None = None
    augment: bool | None = None
    keep: str = "none"
    holdout: int = 512
    eval_every: int = 500
    preset: str = "default"
    tau: float | None = None
    kl_tau: float | None = None
    beta: float | None = None
    scale: str | None = None
    reduction: str | None = None
    image: float | None = None
    code: str = "auto"
    rest: str = "spread"
    precision: str = "auto"
    budget: int | None = None
    store: str | None = None
    coverage: float = 0.5

    def __post_init__(self) -> None:
        within("distill.coverage", self.coverage, 0, 1)
        check_choice("distill.preset", self.preset, tuple(PRESETS))
        check_choice("distill.code", self.code, CODES)
        check_choice("distill.rest", self.rest, TOPK_RESTS)
        check_choice("distill.precision", self.precision, (*PRECISIONS, "float16"))
        check_choice("distill.keep", self.keep, ("none", "uint8", "bfloat16"))
        if self.scale is not None:
            check_choice("distill.scale", self.scale, SCALES)
        if self.reduction is not None:
            check_choice("distill.reduction", self.reduction, ("mean", "batchmean"))
        for name in ("tau", "kl_tau"):
            if getattr(self, name) is not None:
                above_zero("distill", self, name)
        weights = {name: self.loss_options()[name] for name in ("beta", "image")}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"distill.{name} is {value}; it must be at least 0")
        if not any(weights.values()):
            raise ValueError("distill.beta and distill.image are 0; one must be above 0")
        above_zero("distill", self, "steps", "batch", "lr", "holdout", "eval_every")
        at_least_0("distill", self, "weight_decay")
        if self.budget is not None:
            at_least_0("distill", self, "budget")
        if self.replay is not None and self.replay < 0:
            raise ValueError(f"distill.replay is {self.replay}; it must be at least 0")
        if self.pretrain < 0:
            raise ValueError(f"distill.pretrain is {self.pretrain}; it must be at least 0 steps")
        if self.pretrain and self.checkpoint is not None:
            raise ValueError(
                f"distill.pretrain is {self.pretrain} and distill.checkpoint {self.checkpoint!r}: a student begins "
                "with one of them; leave out the other"
            )

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of MEKDLoss: the preset's, and what was set besides."""
        own = {name: getattr(self, name) for name in ("tau", "kl_tau", "beta", "scale", "reduction", "image")}
        chosen = {**PRESETS[self.preset], **{name: value for name, value in own.items() if value is not None}}
        return {**chosen, "code": self.code, "rest": self.rest}


@dataclass(frozen=True)
class EvaluateConfig:
    """A simulation for experiments: it needs labels, and it sends real images to its own oracle.

    Args:
        enabled: run it; off unless asked
        path: a folder of class folders with labelled images, for photos, or instead of a tree's val
        ask_teacher: send the labelled test images to the teacher, to compare its answers; null: only where it is a file
            without a price
        baseline: also train the plain baseline, a student of the teacher's answers to the private images, which are
            sent for it; null: as ask_teacher, and of a remote teacher no
        baseline_steps: its steps; null for as many as distill.steps
    """

    enabled: bool = False
    path: str | None = None
    ask_teacher: bool | None = None
    baseline: bool | None = None
    baseline_steps: int | None = None

    def __post_init__(self) -> None:
        if self.baseline_steps is not None:
            above_zero("evaluate", self, "baseline_steps")


@dataclass(frozen=True)
class AuditConfig:
    """What the run can say of equivalence and privacy, measured at home when it is done.

    Args:
        enabled: run it; null: where POT is installed, which measures distances
        holdout: private images kept away from step 1, and from everything but the audit: whether step 1 betrays which
            images it saw is known from 300 on; 0 for none
        budget: queries at most that the audit asks, for answers that chose no student; 0: it asks nothing
    """

    enabled: bool | None = None
    holdout: int = 0
    budget: int = 0

    def __post_init__(self) -> None:
        for name in ("holdout", "budget"):
            if getattr(self, name) < 0:
                raise ValueError(f"audit.{name} is {getattr(self, name)}; it must be at least 0")
        if 0 < self.budget < 50:
            raise ValueError(f"audit.budget is {self.budget}; it must be 0, or at least 50: fewer answers say nothing")


@dataclass(frozen=True)
class EngineConfig:
    """How the work runs: device, batch_norm and compile change a result by rounding and by what dropout draws.

    Args:
        device: auto, cpu, cuda or cuda:N
        checkpoint_every: steps between two checkpoints
        log_every: steps between two lines of the log
        progress: a progress bar, where the output is a terminal
        profile: write a trace of ten steps, and a table of where their time goes, to the folder profile
        compile: torch.compile for step 1: off, default, reduce-overhead (CUDA graphs), or auto: default on CUDA alone
        batch_norm: with several processes, the statistics of each one's part of a batch (local), or of the whole batch
            (synchronised, on CUDA)
        track: who is told the metrics and the pictures that show no private image: tensorboard, wandb, trackio, mlflow,
            each as it is set up on this machine
    """

    device: str = "auto"
    checkpoint_every: int = 500
    log_every: int = 100
    progress: bool = True
    profile: bool = False
    compile: str = "auto"
    batch_norm: str = "local"
    track: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.track:
            check_choice("engine.track", name, TRACKERS)
        check_choice("engine.batch_norm", self.batch_norm, ("local", "synchronised"))
        check_choice("engine.compile", self.compile, ("auto", "off", "default", "reduce-overhead"))
        above_zero("engine", self, "checkpoint_every", "log_every")


@dataclass(frozen=True)
class Config:
    """An experiment.

    Args:
        seed: of weights, latents, batches and of the choice of the private images
        data: the images
        teacher: the black box
        oracle: what it gives away
        deprivatize: step 1
        distill: step 2
        evaluate: the simulation
        audit: what can be said of equivalence and privacy
        engine: how the work runs
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    oracle: OracleConfig = field(default_factory=OracleConfig)
    deprivatize: DeprivatizeConfig = field(default_factory=DeprivatizeConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        within("seed", self.seed, -(2**62), 2**62)
        for section, config in vars(self).items():
            for name, value in vars(config).items() if section != "seed" else ():
                # A service may be waited for without an end.
                if isinstance(value, float) and not math.isfinite(value) and name != "patience":
                    raise ValueError(f"{section}.{name} is {value}; it must be finite")
        step2 = self.distill
        replays = bool(step2.replay) or (
            step2.replay is None and (self.teacher.remote or self.oracle.budget is not None)
        )
        if step2.keep != "none" and not (replays and step2.loss_options()["image"]):
            raise ValueError(
                f"distill.keep is {step2.keep!r}, with nothing to keep: distill.replay and distill.image must be above "
                "0"
            )
