"""mekd serve: a classifier behind an address, for a distilled student, and for tests of those that ask one.

It speaks the Open Inference Protocol v2, and answers images with labels and scores as Hugging Face's API does.
"""

import argparse
import importlib.util
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mekd import files
from mekd.errors import MekdError, UsageError
from mekd.options import Parser

if TYPE_CHECKING:
    import uvicorn

PACKAGES = ("starlette", "uvicorn")


def main(words: Sequence[str]) -> int:
    """Serve until interrupted or terminated; returns 0. Raises MekdError for what cannot be served."""
    return until_stopped(*prepare(words))


def until_stopped(server: "uvicorn.Server", listening: socket.socket, line: str) -> int:
    """Print the line and serve on the socket until interrupted or terminated; returns 0."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(line, flush=True)
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # the server passes its signal on after it has ended
    return 0


def prepare(words: Sequence[str]) -> "tuple[uvicorn.Server, socket.socket, str]":
    """A server that can run, the socket that it listens on, and a line that says what is served where."""
    options = _parser().parse_args(list(words))
    require_packages()
    import uvicorn

    from mekd.serve.app import Service
    from mekd.serve.defence import Defence
    from mekd.serve.faults import Faults
    from mekd.serve.model import Model
    from mekd.serve.patience import patient

    _check_rates(options)
    path = Path(options.file)
    name = path.stem if options.name is None else options.name
    if not name or "/" in name:
        raise UsageError(f"--name is {name!r}; it must be a word without /")
    model = Model(
        path,
        options.response,
        k=options.k,
        decimals=options.decimals,
        output=options.output,
        output_name=options.output_name,
        num_classes=options.num_classes,
        classes=None if options.classes is None else _names(options.classes),
        image=None if options.image is None else tuple(options.image),
        mean=options.mean,
        std=options.std,
        batch=options.batch,
        provider=options.provider,
        defence=Defence(options.noise, options.mislead, options.seed),
    )
    faults = Faults(
        options.refuse_rate, options.fail_rate, options.cut_rate, options.latency_ms / 1e3, options.drip_ms / 1e3,
        options.seed,
    )  # fmt: skip
    service = Service(
        model,
        name,
        batch=options.batch,
        wait=options.wait_ms / 1e3,
        queue=options.queue,
        max_batch=options.max_batch,
        max_body=options.max_body,
        timeout=options.timeout,
        threshold=options.threshold,
        keys=() if options.keys is None else _keys(options.keys),
        rate=options.rate,
        faults=faults,
    )
    # A client that keeps a connection should be the one to close it: what it sends meanwhile has no known fate.
    config = uvicorn.Config(
        service.app(), http=patient(options.timeout), log_config=None, log_level="warning", access_log=False, ws="none",
        lifespan="on", timeout_keep_alive=75, timeout_graceful_shutdown=3,
    )  # fmt: skip
    if options.cut_rate:
        logging.getLogger("uvicorn.error").addFilter(lambda record: "completing response" not in str(record.msg))
    listening = listen(options.host, options.port, f"--host {options.host} --port {options.port}")
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listening.getsockname()[1]}"
    line = f"serving {path.name} as {address}/v2/models/{quote(name)} and /hf/{quote(name)}"
    return uvicorn.Server(config), listening, line


def require_packages() -> None:
    """Raise MekdError where what serves is not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise MekdError(f"{' and '.join(missing)} cannot be imported: pip install 'mekd[serve]'")


# -- options -----------------------------------------------------------------------------------------------


def number(low: float, high: float = float("inf"), whole: bool = False) -> Callable[[str], Any]:
    """What reads an option's number, and says what it may be."""
    kind = "a whole number" if whole else "a number"
    limits = f"of at least {low}" if high == float("inf") else f"between {low} and {high}"

    def read(text: str) -> float:
        try:
            number = int(text) if whole else float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"it is {text!r}; it must be {kind} {limits}")
        return number

    return read


def _parser() -> argparse.ArgumentParser:
    count, share = number(1, whole=True), number(0, 1)
    parser = Parser(prog="mekd serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE.onnx", help="an image classifier")
    add = parser.add_argument
    add("--name", help="the model's name in its addresses; the file's without its ending, unless given")
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 for all of this machine's")
    add("--port", type=number(0, 65535, whole=True), default=8000, help="0 chooses a free one (%(default)s)")
    add("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="what ONNX Runtime computes on")

    reading = parser.add_argument_group("how the file is read")
    add = reading.add_argument
    add("--output", choices=("auto", "logits", "probs"), default="auto", help="what its scores are (auto)")
    add("--output_name", metavar="NAME", help="which of several outputs")
    add("--num_classes", type=number(2, whole=True), metavar="C", help="for a file that answers class indices")
    add("--classes", metavar="FILE", help="the classes' names, one a line; their numbers, unless given")
    add("--image", type=count, nargs=3, metavar=("CH", "H", "W"), help="for a file that leaves it open")
    add("--mean", type=number(float("-inf")), nargs="+", help="a floating input gets (pixels / 255 - mean) / std")
    add("--std", type=number(0), nargs="+", help="images of /hf alone; tensors are taken as they are")

    given = parser.add_argument_group("what is given away")
    add = given.add_argument
    add("--response", choices=("logits", "probs", "topk", "label"), help="the file's own output, unless given")
    add("--k", type=count, help="of topk (5, or all classes if there are fewer)")
    add("--decimals", type=number(0, 15, whole=True), help="what scores are rounded to")
    add("--threshold", type=share, default=0.0, help="/hf leaves out what is below it (0)")
    add("--noise", type=share, default=0.0, help="share of a random distribution in each answer; the best class stays")
    add("--mislead", type=share, default=0.0, help="answers less sure than this name another class, on purpose (0)")

    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--max_batch", type=count, default=256, help="images of one request; 400 above (%(default)s)")
    add("--max_body", type=count, metavar="BYTES", help="of one request; 413 above (max_batch images as JSON)")
    add("--timeout", type=number(1e-3), default=120.0, help="seconds in which a request must have come; 408 (120)")
    add("--keys", metavar="FILE", help="API keys, one a line; 401 without one of them")
    add("--rate", type=number(1e-3), help="requests for an answer a second; 429 above")
    add("--batch", type=count, default=64, help="images of one run of the model (%(default)s)")
    add("--wait_ms", type=number(0), default=1.0, help="how long a request waits for others (%(default)s)")
    add("--queue", type=count, default=256, help="requests that wait at most; 503 above (%(default)s)")

    tests = parser.add_argument_group("for tests: what goes wrong with requests for an answer")
    add = tests.add_argument
    add("--seed", type=number(0, whole=True), default=0, help="draws which requests, by their number; and --noise")
    add("--latency_ms", type=number(0), default=0.0, help="added to each of them")
    add("--fail_rate", type=share, default=0.0, help="computed, then 500")
    add("--cut_rate", type=share, default=0.0, help="computed, then the connection is cut in mid-body")
    add("--refuse_rate", type=share, default=0.0, help="503 as of a full queue, nothing computed")
    add("--drip_ms", type=number(0), default=0.0, help="between two bytes of an answer's body")
    return parser


def _check_rates(options: argparse.Namespace) -> None:
    total = options.fail_rate + options.cut_rate + options.refuse_rate
    if total > 1:
        raise UsageError(f"--fail_rate, --cut_rate and --refuse_rate sum to {total:g}; it must be at most 1: lower one")


def _names(path: str) -> list[str]:
    from mekd.data.names import read_names

    return read_names(path, "--classes")


def _keys(path: str) -> list[str]:
    """API keys, one a line."""
    if not Path(path).is_file():
        raise UsageError(f"--keys is {path!r}; no such file. It lists API keys, one a line")
    try:
        text = files.read_text(path)
    except (files.ReadError, OSError) as error:
        raise UsageError(f"--keys is {path!r}; it cannot be read as a list of API keys, one a line: {error}") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise UsageError(f"--keys is {path!r}; it is empty: write API keys into it, one a line")
    return keys


def listen(host: str, port: int, options: str) -> socket.socket:
    """A socket that listens there; UsageError names the options that said where."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Head and body of an answer go out in two writes; without this the second waits 40 ms for the client's ACK.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise UsageError(
            f"{options} cannot be listened on: {error.strerror or error}. Choose "
            + ("an address of this machine and " if "--host" in options else "")
            + "a port that is free; --port 0 finds one"
        ) from error
