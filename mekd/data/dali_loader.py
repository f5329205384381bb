"""Images of class folders and shards by NVIDIA DALI: decoded, cropped and resized in threads, or on the GPU.

Which images a batch takes and how each is cropped is decided here and fed to the pipeline, so a place in the data is
a number: DALI keeps no state, a pipeline can be thrown away at any time, and no number of threads changes a pixel.
"""

import importlib
import importlib.util
import os
from collections import deque
from typing import Any

import numpy as np
import torch

from mekd.data import torchvision_loader
from mekd.data.arrays import DataError
from mekd.data.decode import decode
from mekd.data.listing import Listing, sample
from mekd.data.names import NATIVE
from mekd.data.stream import Plan, Running, Stream, mixed

TRIES = 10  # crops that are drawn until one fits into the image, as torchvision does
DRAWS = 2 * TRIES + 3
MOST_PIXELS = 178_956_970  # of an image: where Pillow stops as well


def check(listing: Listing) -> None:
    """Raises DataError where DALI is missing; it reads every kind of listing."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise DataError(
            "--data.loader dali needs DALI: pip install 'mekd[dali]'; or read folders with --data.loader torchvision"
        )


def open(plan: Plan) -> Stream:
    """The batches of a plan; its threads, at least 1, decode on the CPU. Raises DataError where DALI is missing."""
    check(plan.listing)
    if plan.threads < 1:
        raise ValueError(f"threads is {plan.threads}; DALI needs at least 1")
    return Stream("dali", plan, _running, faults)


def _library() -> tuple[Any, Any, Any]:
    """DALI's fn, math and types; they are made at run time, so there is nothing that a type checker could see."""
    return tuple(importlib.import_module(f"nvidia.dali.{name}") for name in ("fn", "math", "types"))  # type: ignore[return-value]


def _pipeline(batch: int, threads: int, device: torch.device, ahead: int) -> Any:
    """An empty pipeline; what it gives out stays valid as long as somebody holds it (the dynamic executor)."""
    from nvidia.dali import Pipeline

    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return Pipeline(batch, threads, index, prefetch_queue_depth=ahead, exec_dynamic=True)


def _how() -> dict[str, Any]:
    """The settings that make the CPU decoder agree with PIL's to the last bit; EXIF's rotation stays unheeded."""
    _, _, types = _library()

    return {
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
        "use_fast_idct": False,
    }


def _claimed(encoded: Any) -> tuple[Any, Any]:
    """Encoded images, and the height and width that each claims; nothing is left of one that claims too much memory.

    What is empty does not decode, and is then found by faults().
    """
    fn, _, types = _library()

    shape = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
    height, width = (fn.cast(shape[i], dtype=types.INT64) for i in range(2))
    kept = fn.cast(height * width <= MOST_PIXELS, dtype=types.INT32) * encoded.shape(dtype=types.INT32)[0]
    return encoded[:kept], shape


def _by_name(listing: Listing) -> bool:
    """Whether DALI itself reads the files, as it does where it decodes all of them."""
    return listing.spans is None and all(file.lower().endswith(NATIVE) for file in listing.files)


def _encoded(listing: Listing, row: int, by_name: bool) -> tuple[np.ndarray, int]:
    """The bytes of an image as DALI is to get them, and its label.

    What is no JPEG, PNG or WebP goes through Pillow and becomes a PPM: of the other formats DALI misreads some kinds
    without a word (a TIFF of grey with alpha, one of floats, a PGM of few levels) and does not know the rest.
    """
    content, label = sample(listing, row)
    head = bytes(content[:12])
    native = head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")
    if not (native or by_name):
        image = decode(content)
        content = b"P6 %d %d 255\n" % image.size + image.tobytes()
    return np.frombuffer(content, np.uint8), label


def faults(listing: Listing, rows: list[int]) -> dict[int, str]:
    """Which of the images cannot be decoded, one by one, and why not as far as Pillow can tell."""
    fn, _, _ = _library()

    found, pipe, by_name = {}, None, _by_name(listing)
    for row in rows:
        if pipe is None:
            pipe = _pipeline(1, 1, torch.device("cpu"), 1)
            with pipe:
                encoded, shape = _claimed(fn.external_source(name="encoded"))
                pipe.set_outputs(shape, fn.decoders.image(encoded, **_how()))
            pipe.build()
        try:
            content, _ = _encoded(listing, row, by_name)
            if not len(content):
                raise RuntimeError("it is empty")
            pipe.feed_input("encoded", [content])
            pipe.run()
        except DataError:
            raise
        except Exception:
            found[row], pipe = _reason(listing, row), None
    return found


def _reason(listing: Listing, row: int) -> str:
    unknown = "DALI does not decode it, whatever its ending is; convert it, or try --data.loader torchvision"
    try:
        return torchvision_loader.faults(listing, [row]).get(row, unknown)
    except DataError:  # without Pillow
        return unknown


def _running(plan: Plan, step: int, left_out: frozenset[int]) -> Running:
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    fn, _, types = _library()
    listing, steps, by_name = plan.listing, plan.steps(step, left_out), _by_name(plan.listing)
    ahead: deque[tuple[int, np.ndarray]] = deque()

    def fed() -> tuple[Any, ...]:
        """What the pipeline needs for the next batch."""
        at, epoch, rows = next(steps)
        if by_name:
            assert listing.labels is not None
            content = [np.frombuffer(os.fsencode(listing.files[row]), np.uint8) for row in rows]
            ahead.append((at, listing.labels[rows]))
        else:
            samples = [_encoded(listing, row, by_name) for row in rows.tolist()]
            content = [encoded for encoded, _ in samples]
            ahead.append((at, np.array([label for _, label in samples], np.int64)))
        if plan.crop == "once":
            return (content,)
        u = (mixed(plan.seed, epoch, rows, DRAWS) >> np.uint64(40)).astype(np.float32) / 2**24
        mirror = (u[:, 0] < 0.5).astype(np.int32) if plan.flip else np.zeros(len(rows), np.int32)
        if plan.crop == "centre":
            return content, mirror
        areas = 0.08 + 0.92 * u[:, 3 : 3 + TRIES]
        roots = np.exp((u[:, 3 + TRIES :] - 0.5) * np.log(np.float32(4 / 3)))  # of ratios of 3/4 to 4/3
        return content, mirror, np.sqrt(areas) * roots, np.sqrt(areas) / roots, np.ascontiguousarray(u[:, 1:3])

    pipe = _pipeline(plan.most, plan.threads, plan.device, 2)
    stage = "mixed" if plan.device.type == "cuda" else "cpu"
    with pipe:
        count = {"once": 1, "centre": 2, "random": 5}[plan.crop]
        kinds = [types.UINT8, types.INT32, types.FLOAT, types.FLOAT, types.FLOAT]
        content, *drawn = fn.external_source(source=fed, num_outputs=count, batch=True, dtype=kinds[:count])
        encoded, shape = _claimed(fn.io.file.read(content) if by_name else content)
        if plan.crop == "random":
            begin, extent = _random(shape, *drawn[1:])
            image = fn.decoders.image_slice(encoded, start=begin, shape=extent, axes=[0, 1], device=stage, **_how())
            image = fn.resize(image, size=[plan.size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
            where: dict[str, Any] = {}
        else:
            image = fn.decoders.image(encoded, device=stage, **_how())
            image, where = _centre(image, shape, plan)
        # Values are bytes up to here, as in PIL; the layout and the dtype are made in the pass that copies them.
        scale = 127.5 if plan.dtype == "float32" else None
        pipe.set_outputs(
            fn.crop_mirror_normalize(
                image,
                dtype=types.UINT8 if scale is None else types.FLOAT,
                mean=[scale or 0.0] * 3,
                std=[scale or 1.0] * 3,
                mirror=drawn[0] if drawn else 0,
                output_layout="HWC" if plan.channels_last else "CHW",
                **where,
            )
        )
    batches = DALIGenericIterator(pipe, ["images"], prepare_first_batch=False)
    for out in batches:
        images = out[0]["images"]
        at, labels = ahead.popleft()
        yield at, images.permute(0, 3, 1, 2) if plan.channels_last else images, torch.from_numpy(labels).to(plan.device)


def _random(shape: Any, wide: Any, high: Any, place: Any) -> tuple[Any, Any]:
    """Begin and extent (height, width) of the first of the drawn crops that fits; none: the largest in the middle."""
    fn, math, types = _library()

    height, width = fn.cast(shape[0], dtype=types.FLOAT), fn.cast(shape[1], dtype=types.FLOAT)
    side = math.sqrt(height * width)
    w, h = math.floor(wide * side + 0.5), math.floor(high * side + 0.5)
    turn = types.Constant(np.arange(TRIES, 0, -1, dtype=np.float32))
    fits = fn.cast((w <= width) & (h <= height) & (w > 0) & (h > 0), dtype=types.FLOAT) * turn
    first = fn.reductions.max(fits, axes=[0])
    some = math.min(first, 1.0)
    chosen = fn.cast((fits == first) & (fits > 0), dtype=types.FLOAT)
    most_w = math.min(width, math.floor(height * (4 / 3) + 0.5))
    most_h = math.min(height, math.floor(width * (4 / 3) + 0.5))
    w = fn.reductions.sum(chosen * w, axes=[0]) + (1 - some) * most_w
    h = fn.reductions.sum(chosen * h, axes=[0]) + (1 - some) * most_h
    place = some * place + (1 - some) * 0.4999
    top, left = math.floor(place[0] * (height - h + 1)), math.floor(place[1] * (width - w + 1))
    return fn.cast(fn.stack(top, left), dtype=types.INT32), fn.cast(fn.stack(h, w), dtype=types.INT32)


def _centre(image: Any, shape: Any, plan: Plan) -> tuple[Any, dict[str, Any]]:
    """The image resized as torchvision resizes it, and where to crop, in integers: rounding to even at the half.

    Within 1/255 of torchvision where the crop leaves out the resized image's border; there PIL leaves out what lies
    beyond the image and DALI repeats its edge, up to 7/255 on the outermost pixels where resize equals size.
    """
    fn, math, types = _library()

    shape = fn.cast(shape, dtype=types.INT64)
    resized = plan.shorter * shape // math.min(shape[0], shape[1])
    image = fn.resize(image, size=fn.cast(resized, dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True)
    rest = resized - plan.size
    half = rest // 2
    begin = half + (rest - 2 * half) * (half - half // 2 * 2)
    # The crop's place is given as a share of what is left, which DALI multiplies and rounds again.
    share = fn.cast(begin, dtype=types.FLOAT) / fn.cast(math.max(rest, 1), dtype=types.FLOAT)
    return image, {"crop": [plan.size] * 2, "crop_pos_y": share[0], "crop_pos_x": share[1]}
