"""Everything that can be set, in one tree of frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mekd.checks import SCALES, TOPK_RESTS, check_choice
from mekd.codes import CODES
from mekd.pixels import SIDES

#: What the convolutions of a step are computed in; auto is decided once, by a measurement.
PRECISIONS = ("auto", "float32", "bfloat16")
#: Hyper-parameters by name: ours, the paper's (Ma et al., 2024) and those of the authors' public code.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {"tau": 5.0, "kl_tau": 1.0, "beta": 1.0, "scale": "tau2", "reduction": "mean", "image": 20.0},
    "paper": {"tau": 5.0, "kl_tau": 1.0, "beta": 0.5, "scale": "one", "reduction": "batchmean", "image": 1.0},
    "authors": {"tau": 5.0, "kl_tau": 5.0, "beta": 1.0, "scale": "tau", "reduction": "mean", "image": 1.0},
}


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Args:
        name: digits, mnist, fashion_mnist, cifar10, cifar100; or a tree of files with train and val in it: folder
            (class folders of JPEGs), webdataset or tfrecord
        path: folder of the data set's own files (idx, CIFAR's python batches, a tree); digits need none
        size: side of an image in pixels: 16, 32, 64, 128 or 224
        local_fraction: share of the training images that are the user's private, unlabelled ones
        flip: whether mirrored images are images of the same class
        shift: whether D sees the private images shifted, by up to an eighth of the side, edges repeated; not of trees
        loader: what reads a tree: dali or torchvision
        workers: threads (dali) or processes (torchvision) of each process that read a tree
        resize: the shorter side in pixels before the centre of a tree's image is cropped; null for size * 256 / 224
        on_error: an image of a tree that cannot be read stops the run (raise) or is left out and counted (skip)
    """

    name: str = "digits"
    path: str | None = None
    size: int = 32
    local_fraction: float = 0.1
    flip: bool = False
    shift: bool = False
    loader: str = "dali"
    workers: int = 2
    resize: int | None = None
    on_error: str = "raise"

    def __post_init__(self) -> None:
        check_choice("data.size", self.size, SIDES)
        check_choice("data.loader", self.loader, ("dali", "torchvision"))
        check_choice("data.on_error", self.on_error, ("raise", "skip"))
        _between("data.local_fraction", self.local_fraction, 0, 1)
        if self.workers < 0 or (self.loader == "dali" and self.workers < 1):
            raise ValueError(f"data.workers is {self.workers}; it must be at least 1 (torchvision: 0)")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"data.resize is {self.resize}; it must be at least data.size, {self.size}")


@dataclass(frozen=True)
class TeacherConfig:
    """The black box: trained here for an experiment, or given.

    Args:
        onnx: your own classifier; the stages teacher and export are skipped, as with url and python
        url: the address of a classifier that answers; secrets in it are written {env:NAME} or {file:PATH}
        protocol: what it speaks: oip, the Open Inference Protocol 2 (http://HOST/v2/models/NAME), or hf, one picture a
            call and [{"label", "score"}, ...] back
        python: FILE.py:function, your own call of any service: uint8 images (m, H, W, ch) in, answers out
        name: by which a run knows it again at another address; null: host and path, or FILE:function
        checkpoint: a state_dict of arch, instead of training one
        arch: resnet8, 20, 32, 56, 110 or torchvision:NAME
        steps: SGD steps with a cosine learning rate
        batch: images a step
        lr: peak learning rate
        weight_decay: L2 penalty
        resize: side in pixels that arch wants, inside the exported graph; null for data.size
        mean: per channel, subtracted from pixels in [0, 1], inside the exported graph
        std: per channel, divides them, inside the exported graph
        precision: of the convolutions in a step: float32, bfloat16, or auto: bfloat16 where this machine is faster so
    """

    onnx: str | None = None
    url: str | None = None
    protocol: str = "oip"
    python: str | None = None
    name: str | None = None
    checkpoint: str | None = None
    arch: str = "resnet32"
    steps: int = 10000
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    resize: int | None = None
    mean: list[float] = field(default_factory=lambda: [0.5])
    std: list[float] = field(default_factory=lambda: [0.5])
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_choice("teacher.precision", self.precision, PRECISIONS)
        check_choice("teacher.protocol", self.protocol, ("oip", "hf"))
        given = [name for name in ("onnx", "url", "python") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"teacher.{' and teacher.'.join(given)} are given; one teacher is asked: give one of them")
        _positive("teacher", self, "batch", "lr")

    @property
    def remote(self) -> bool:
        """Whether it is asked by calls: it is no file."""
        return self.url is not None or self.python is not None


@dataclass(frozen=True)
class OracleConfig:
    """What the black box gives away, and how it is reached.

    Args:
        response: logits, probs, topk or label
        k: classes in a topk answer, at most
        decimals: what the API rounds its values to; null for not at all
        transport: images go up as uint8 or as float
        provider: auto, cpu, cuda or tensorrt
        batch: images that the teacher computes at once; null: measured once on blank images, and kept in oracle.json.
            Of a remote teacher: images a call at most (fewer where oracle.reserve could not hold two rounds of them);
            null: 1, and with oip 64 or what the server takes
        precision: the teacher computes in float32, or in float16 (cuda, tensorrt), which is then held against float32
        cuda_graph: the teacher's work is recorded once and replayed, each piece filled up to batch (cuda, tensorrt)
        output: what the ONNX file puts out: logits, probs or auto
        output_name: the output of the ONNX file that is read, where it has several; null: the one that can be meant
        num_classes: the teacher's classes, where its file does not say; null: what it says
        classes: a file of class names, one a line, for a teacher that answers names
        mean: subtracted from pixels in [0, 1] if the ONNX input is floating
        std: divides them
        price: what one query costs, for the ledger
        budget: queries of the whole run at most; null for no limit
        reserve: share of the budget that is left for calls whose fate is unknown, at least two rounds of calls
        concurrency: calls in flight, over all processes; null: 8 to an address, 1 to a function
        rate: calls a second, over all processes and restarts; null for no limit
        image_rate: images a second, likewise
        timeout: seconds for one attempt as a whole
        patience: seconds in which a call that is certainly refused is repeated
        headers: sent to teacher.url; secrets are written {env:NAME} or {file:PATH}
        input_name: the input of a model whose server does not say
        size: side in pixels of the images that the teacher takes; null: what its server says, or data.size
        binary: tensors travel as bytes (true) or JSON (false); null: as the server says
        encoding: raw, png or jpeg; auto: png with hf, else raw
        quality: of JPEG
        base64: with hf, the picture goes up in JSON
        unknown: a name that is not among the classes is an error, or its mass belongs to the rest
    """

    response: str = "probs"
    k: int = 5
    decimals: int | None = None
    transport: str = "uint8"
    provider: str = "auto"
    batch: int | None = None
    precision: str = "float32"
    cuda_graph: bool = False
    output: str = "auto"
    output_name: str | None = None
    num_classes: int | None = None
    classes: str | None = None
    mean: list[float] = field(default_factory=lambda: [0.0])
    std: list[float] = field(default_factory=lambda: [1.0])
    price: float | None = None
    budget: int | None = None
    reserve: float = 0.05
    concurrency: int | None = None
    rate: float | None = None
    image_rate: float | None = None
    timeout: float = 60.0
    patience: float = 300.0
    headers: dict[str, str] = field(default_factory=dict)
    input_name: str | None = None
    size: int | None = None
    binary: bool | None = None
    encoding: str = "auto"
    quality: int = 95
    base64: bool = False
    unknown: str = "error"

    def __post_init__(self) -> None:
        check_choice("oracle.response", self.response, ("logits", "probs", "topk", "label"))
        check_choice("oracle.transport", self.transport, ("uint8", "float"))
        check_choice("oracle.encoding", self.encoding, ("auto", "raw", "png", "jpeg"))
        check_choice("oracle.unknown", self.unknown, ("error", "rest"))
        for name in ("concurrency", "rate", "image_rate", "size"):
            if getattr(self, name) is not None:
                _positive("oracle", self, name)
        _positive("oracle", self, "timeout", "patience")
        _between("oracle.reserve", self.reserve, 0, 1)
        _between("oracle.quality", self.quality, 1, 100)
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"oracle.budget is {self.budget}; it must be at least 1 query, or null")
        check_choice("oracle.precision", self.precision, ("float32", "float16"))
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"oracle.batch is {self.batch}; it must be at least 1, or null")
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"oracle.num_classes is {self.num_classes}; it must be at least 2, or null")


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
        ema: decay of an average of G's weights, used in step 2; 0 for the last weights
        latents: D and G learn from the same images of a step (shared), or G from others of its own (fresh)
        budget: queries at most; null for no limit
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
    ema: float = 0.999
    budget: int | None = None

    def __post_init__(self) -> None:
        check_choice("deprivatize.latents", self.latents, ("shared", "fresh"))
        check_choice("deprivatize.precision", self.precision, PRECISIONS)
        _positive("deprivatize", self, "steps", "batch", "lr", "width", "d_width")
        if self.nuisance < 0:
            raise ValueError(f"deprivatize.nuisance is {self.nuisance}; it must be at least 0 entries")
        _between("deprivatize.dropout", self.dropout, 0, 1)
        _between("deprivatize.ema", self.ema, 0, 1)
        if self.alpha < 0:
            raise ValueError(f"deprivatize.alpha is {self.alpha}; it must be at least 0")


@dataclass(frozen=True)
class DistillConfig:
    """Step 2: the student learns.

    Args:
        student: resnet8, 20, 32, 56, 110 or torchvision:NAME
        checkpoint: a state_dict that the student begins with; null for random weights
        steps: SGD steps with a cosine learning rate
        batch: images a step
        lr: peak learning rate
        weight_decay: L2 penalty
        replay: ask this many queries once and reuse them every epoch; 0 for fresh ones every step; null: 0 for a file,
            and what oracle.budget reaches for with a remote teacher
        keep: what G draws from the replayed answers is drawn every step (none) or once, and kept as uint8 or bfloat16
        holdout: synthetic queries kept apart, by which the best student is chosen
        eval_every: steps between two looks at the holdout
        preset: default, paper or authors: what the settings below are where they are null
        tau: divides the code
        kl_tau: temperature of the KL
        beta: weight of the KL
        scale: the KL's factor: tau2, tau or one
        reduction: of the image distance: mean or batchmean
        image: weight of the image distance
        code: auto, logits, log_probs, onehot or standardized
        rest: what top-k answers leave out is, in the KL, spread, dropped (drop) or one class more (tail); in the code
            it is spread
        precision: of the convolutions in a step: float32, bfloat16, float16 (with a scaler), or auto, as in
            teacher.precision
        budget: queries at most, the holdout's included; null for no limit
    """

    student: str = "resnet8"
    checkpoint: str | None = None
    steps: int = 20000
    batch: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    replay: int | None = None
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

    def __post_init__(self) -> None:
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
                _positive("distill", self, name)
        weights = {name: self.loss_options()[name] for name in ("beta", "image")}
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"distill.{name} is {value}; it must be at least 0")
        if not any(weights.values()):
            raise ValueError("distill.beta and distill.image are 0; one must be above 0")
        _positive("distill", self, "steps", "batch", "lr", "holdout", "eval_every")
        if self.replay is not None and self.replay < 0:
            raise ValueError(f"distill.replay is {self.replay}; it must be at least 0")

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
        ask_teacher: send the labelled test images to the teacher, to compare its answers; null: only where it is a file
            without a price
        baseline: also train the plain baseline, a student of the teacher's answers to the private images, which are
            sent for it; null: as ask_teacher
        baseline_steps: its steps; null for as many as distill.steps
    """

    enabled: bool = False
    ask_teacher: bool | None = None
    baseline: bool | None = None
    baseline_steps: int | None = None


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
    """

    device: str = "auto"
    checkpoint_every: int = 500
    log_every: int = 100
    progress: bool = True
    profile: bool = False
    compile: str = "auto"
    batch_norm: str = "local"

    def __post_init__(self) -> None:
        check_choice("engine.batch_norm", self.batch_norm, ("local", "synchronised"))
        check_choice("engine.compile", self.compile, ("auto", "off", "default", "reduce-overhead"))
        _positive("engine", self, "checkpoint_every", "log_every")


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
        engine: how the work runs
    """

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    oracle: OracleConfig = field(default_factory=OracleConfig)
    deprivatize: DeprivatizeConfig = field(default_factory=DeprivatizeConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        step2 = self.distill
        replays = bool(step2.replay) or (step2.replay is None and self.teacher.remote)
        if step2.keep != "none" and not (replays and step2.loss_options()["image"]):
            raise ValueError(
                f"distill.keep is {step2.keep!r}, with nothing to keep: distill.replay and distill.image must be above "
                "0"
            )


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}; it must be above 0")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
