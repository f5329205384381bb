"""The addresses of a served classifier, who may ask it, and how a request ends."""

import asyncio
import base64
import contextlib
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from hmac import compare_digest
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mekd import __version__
from mekd.errors import MekdError
from mekd.oracle.session import one_line
from mekd.serve.batcher import Batcher, QueueFull
from mekd.serve.counts import Counts
from mekd.serve.faults import Broken, Bucket, Faults
from mekd.serve.model import Model
from mekd.serve.protocol import LENGTH_HEADER, RequestError, most_bytes, read_infer, write_infer

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration"]
_IMAGES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # how PNG and JPEG begin
#: Pictures that are decoded at once: one of a megabyte may be of 179 megapixels, which take 0.5 GB and more.
DECODES = 2
#: The words by which clients know that nothing was computed.
_FULL = "Exceeds maximum queue size"

Endpoint = Callable[[Request], Awaitable[Response]]
#: What answers a request of that body: a response, and the number of images that it answers.
Work = Callable[[Request, bytes], Awaitable[tuple[Response, int]]]


class Service:
    """A model behind its addresses.

    keys: one of them must come with a request, if there are any; rate: requests for an answer a second; max_batch:
    images of one request; max_body: bytes of one request; timeout: seconds in which the body of one must have come;
    threshold: scores below it are left out of a list of labels.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        batch: int = 64,
        wait: float = 0.001,
        queue: int = 256,
        max_batch: int = 256,
        max_body: int | None = None,
        timeout: float = 120.0,
        threshold: float = 0.0,
        keys: Sequence[str] = (),
        rate: float | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.model, self.name, self.max_batch, self.threshold = model, name, max_batch, threshold
        self.timeout = timeout
        self.max_body = most_bytes(model.takes, max_batch) if max_body is None else max_body
        self.keys = [key.encode() for key in keys]
        self.bucket = None if rate is None else Bucket(rate)
        self.faults = faults or Faults()
        self.batcher = Batcher(model.run, batch, wait, queue)
        self.decodes = asyncio.Semaphore(DECODES)
        self.counts = Counts()
        self.number = 0

    def app(self) -> Starlette:
        """The ASGI application."""
        model = "/v2/models/{name}"
        free: dict[str, Endpoint] = {
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            f"{model}/ready": self._model_ready,
            "/v2": self._server,
            model: self._metadata,
            f"{model}/config": self._config,
        }
        routes = [Route(path, self._keyed(endpoint), methods=["GET"]) for path, endpoint in free.items()]
        for path, work in ((f"{model}/infer", self._infer), ("/hf/{name}", self._hf)):
            routes.append(Route(path, self._counted(work), methods=["POST"]))
        routes.append(Route("/metrics", self._metrics, methods=["GET"]))
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _http_error})

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self.batcher.work())
        yield
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    # -- who may ask, and how it ends ----------------------------------------------------------------------

    def _unknown(self, request: Request) -> Response | None:
        """A 401 for a request without one of the keys."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = [request.headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        known = any(compare_digest(key, one.encode("latin-1")) for key in self.keys for one in given)
        if known or not self.keys:
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        return _json({"error": "a key is needed: Authorization: Bearer KEY, or X-Api-Key: KEY"}, 401, headers)

    def _keyed(self, endpoint: Endpoint) -> Endpoint:
        async def keyed(request: Request) -> Response:
            return self._unknown(request) or await endpoint(request)

        return keyed

    def _counted(self, work: Work) -> Endpoint:
        """An endpoint that answers, with its keys, limits, faults and counts."""

        async def counted(request: Request) -> Response:
            unknown = self._unknown(request)
            try:
                most = 0 if unknown else self.max_body  # a stranger's is not kept
                body, size = await asyncio.wait_for(self._body(request, most), self.timeout)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except asyncio.TimeoutError:
                self.counts.statuses[408] += 1
                text = f"the request has not come whole in {self.timeout:g} s"
                return _json({"error": text}, 408, {"Connection": "close"})  # else the rest would still be awaited
            self.counts.received += size
            response = unknown or (self._too_large(size) if body is None else await self._answer(request, body, work))
            self.counts.statuses[response.status_code] += 1
            self.counts.refused += response.status_code in (429, 503)
            self.counts.sent += len(response.left if isinstance(response, Broken) else response.body)
            return response

        return counted

    async def _body(self, request: Request, most: int) -> tuple[bytes | None, int]:
        """The body, None if it has more than most bytes, and its size."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            parts.append(part)
            if size > most:
                parts.clear()  # the rest is read too, and dropped: a client that still sends would not see the answer
        return None if size > most else b"".join(parts), size

    def _too_large(self, size: int) -> Response:
        text = f"the body has {size:,} bytes; {self.max_body:,} are allowed: send fewer images in a request"
        return _json({"error": text}, 413)

    async def _answer(self, request: Request, body: bytes, work: Work) -> Response:
        if self.bucket is not None and (left := self.bucket.wait()):
            return _json({"error": "too many requests"}, 429, {"Retry-After": str(math.ceil(left))})
        fate = self.faults.drawn(self.number)
        self.number += 1
        if fate == "refuse":
            return self._full()
        if self.faults.latency:
            await asyncio.sleep(self.faults.latency)
        try:
            response, images = await work(request, body)
        except RequestError as error:
            return _json({"error": str(error)}, error.status)
        except QueueFull:
            return self._full()
        except Exception as error:  # the model's: the server goes on
            return _json({"error": f"the model failed: {one_line(error)}"}, 500)
        if fate == "fail":
            return _json({"error": "failed after the answer was computed, as --fail_rate says"}, 500)
        if fate != "cut":
            self.counts.images_answered += images
        slow = self.faults.drip
        return Broken(response, fate == "cut", slow) if slow or fate == "cut" else response

    def _full(self) -> Response:
        text = json.dumps({"error": f"model {self.name}: {_FULL}"})
        return Response(text, 503, {"Content-Type": "text/plain"})

    # -- answers -------------------------------------------------------------------------------------------

    async def _asked(self, images: np.ndarray) -> np.ndarray:
        raw = await self.batcher.ask(images)
        self.counts.images_computed += len(images)
        return raw

    async def _infer(self, request: Request, body: bytes) -> tuple[Response, int]:
        self._known(request)
        length = request.headers.get(LENGTH_HEADER)
        asked = read_infer(body, length, self.model.takes, self.model.gives, self.max_batch)
        datatypes = {spec.name: spec.datatype for spec in self.model.gives}
        for wanted in asked.wanted:  # known before anything is computed
            if wanted.classification and not datatypes[wanted.name].startswith("FP"):
                raise RequestError(f"output {wanted.name} has no scores that a classification could be made of")
            if not wanted.classification and not wanted.binary and datatypes[wanted.name] == "FP16":
                raise RequestError(f"output {wanted.name} is FP16, which JSON cannot hold; ask for binary_data")
        tensors = self.model.tensors(await self._asked(asked.images))
        answered = [
            (wanted, "BYTES", self.model.classified(tensors, wanted.name, wanted.classification))
            if wanted.classification
            else (wanted, datatypes[wanted.name], tensors[wanted.name])
            for wanted in asked.wanted
        ]
        content, headers = write_infer(self.name, asked.id, answered, self.model.decimals)
        return Response(content, 200, headers), len(asked.images)

    async def _hf(self, request: Request, body: bytes) -> tuple[Response, int]:
        self._known(request)
        best = None
        if not body.startswith(_IMAGES):
            body, best = _from_json(body)
        async with self.decodes:
            pixels = await asyncio.to_thread(_pixels, body, self.model.image)
        raw = await self._asked(self.model.feed(pixels))
        return _json(self.model.pairs(raw, best, self.threshold)), 1

    # -- what costs nothing --------------------------------------------------------------------------------

    def _known(self, request: Request) -> None:
        name = request.path_params["name"]
        if name != self.name:
            raise RequestError(f"there is no model {name!r}; there is {self.name!r}", 404)

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        return _json({"ready": True})

    async def _server(self, request: Request) -> Response:
        return _json({"name": "mekd", "version": __version__, "extensions": EXTENSIONS})

    async def _model_ready(self, request: Request) -> Response:
        return self._about({"name": self.name, "ready": True}, request)

    async def _metadata(self, request: Request) -> Response:
        inputs, outputs = [self.model.takes.described()], [spec.described() for spec in self.model.gives]
        about = {"name": self.name, "versions": ["1"], "platform": "onnxruntime_onnx"}
        return self._about({**about, "inputs": inputs, "outputs": outputs}, request)

    async def _config(self, request: Request) -> Response:
        about = {"name": self.name, "platform": "onnxruntime_onnx", "max_batch_size": self.max_batch}
        return self._about(about, request)

    def _about(self, tree: dict[str, Any], request: Request) -> Response:
        try:
            self._known(request)
        except RequestError as error:
            return _json({"error": str(error)}, error.status)
        return _json(tree)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.counts.text(), 200, {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _json(tree: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of JSON, in which NaN may stand."""
    return Response(json.dumps(tree), status, {"Content-Type": "application/json", **(headers or {})})


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown path, or a method that it does not have."""
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code)


def _from_json(body: bytes) -> tuple[bytes, int | None]:
    """The image and top_k of {"inputs": base64, "parameters": {"top_k": k}}."""
    try:
        tree = json.loads(body)
        image = base64.b64decode(tree["inputs"], validate=True)
        best = (tree.get("parameters") or {}).get("top_k")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError("the body must be a PNG or a JPEG, or JSON with one as base64 in inputs") from error
    if best is not None and (not isinstance(best, int) or best < 1):
        raise RequestError(f"top_k is {best!r}; it must be a whole number of at least 1")
    return image, best


def _pixels(content: bytes, image: tuple[int, int, int]) -> np.ndarray:
    """An image's pixels (H, W, ch), converted and resized to what the model takes."""
    from mekd.data.decode import decode

    channels, height, width = image
    if channels not in (1, 3):
        raise RequestError(f"the model takes {channels} channels; an image has 1 or 3")
    if not content.startswith(_IMAGES):
        raise RequestError("the image is neither a PNG nor a JPEG")
    try:
        picture = decode(content)
    except MekdError:
        raise
    except Exception as error:  # a decoder raises anything for a broken file
        raise RequestError(f"the image cannot be read: {one_line(error)}") from error
    if channels == 1:
        picture = picture.convert("L")
    if picture.size != (width, height):
        from PIL import Image

        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(picture).reshape(height, width, channels)
