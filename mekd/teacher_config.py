"""What can be set of the teacher: the black box, how it is reached, and what it gives away."""

import math
from dataclasses import dataclass, field
from typing import Any

from mekd.checks import check_choice

#: What the convolutions of a step are computed in; auto is decided once, by a measurement.
PRECISIONS = ("auto", "float32", "bfloat16")
#: Seconds of oracle.timeout at most: systems count its milliseconds in 31 bits.
LONGEST_S = 2_000_000


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
        arch: resnet8, 20, 32, 56, 110, torchvision:NAME, timm:NAME, FILE.py:function or package.module:function
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
        above_zero("teacher", self, "batch", "lr")
        at_least_0("teacher", self, "weight_decay")
        if self.resize is not None:
            above_zero("teacher", self, "resize")
        check_scale("teacher", self)

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
        output: what the teacher's scores are: logits, probs (of a service per cent too) or auto, as they look
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
                above_zero("oracle", self, name)
        above_zero("oracle", self, "timeout", "patience")
        within("oracle.timeout", self.timeout, 0, LONGEST_S)
        for name in ("rate", "image_rate"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"oracle.{name} is inf; it must be finite and above 0 a second, or null for no limit")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"oracle.price is {self.price}; it must be finite and at least 0, or null")
        within("oracle.reserve", self.reserve, 0, 1)
        within("oracle.quality", self.quality, 1, 100)
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"oracle.budget is {self.budget}; it must be at least 1 query, or null")
        check_choice("oracle.precision", self.precision, ("float32", "float16"))
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"oracle.batch is {self.batch}; it must be at least 1, or null")
        if self.decimals is not None:
            within("oracle.decimals", self.decimals, 0, 7)
        if self.response == "topk" and self.k < 1:
            raise ValueError(f"oracle.k is {self.k}; with oracle.response topk it must be at least 1 class")
        check_scale("oracle", self)
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"oracle.num_classes is {self.num_classes}; it must be at least 2, or null")


def above_zero(section: str, config: Any, *names: str) -> None:
    """Raise ValueError for a setting of a section that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}; it must be above 0")


def at_least_0(section: str, config: Any, *names: str) -> None:
    """Raise ValueError for a setting of a section that is below 0, or not finite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}; it must be finite and at least 0")


def check_scale(section: str, config: Any) -> None:
    """Raise ValueError unless mean and std of a section hold numbers that can be subtracted and divided by."""
    for name, above in (("mean", -math.inf), ("std", 0)):
        numbers = getattr(config, name)
        if not (numbers and all(math.isfinite(x) and x > above for x in numbers)):
            wanted = "numbers above 0" if name == "std" else "finite numbers"
            raise ValueError(
                f"{section}.{name} is {numbers}; it must hold {wanted}: one for all channels, or one for each"
            )


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless a setting lies between two values."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
