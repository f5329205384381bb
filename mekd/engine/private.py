"""What the private images are for at home: how near what will be sent comes to them, what a student says of them."""

from typing import Any

import torch
from torch import Tensor, nn

from mekd import plots
from mekd.config import Config
from mekd.data import TREES, Source
from mekd.distances import nearest
from mekd.engine.collect import BLOCK, draw_images
from mekd.engine.run import Run
from mekd.errors import MekdError
from mekd.nets.frozen import freeze
from mekd.pixels import to_float, to_uint8

#: Private images that are looked at, at most.
MOST = 5000
CAPTION = "What will be sent, beside the nearest of your images."
#: Images of the contact sheet.
PAIRS = 16


def private_images(run: Run, most: int = MOST) -> Tensor:
    """Private images (n, ch, S, S), uint8, in memory: all of a few, else most of them at most, none of them twice."""
    return images_of(run.data, run.config, "local", most)


def images_of(source: Source, config: Config, part: str, most: int) -> Tensor:
    """The same of the part "local", or "held", of a data set."""
    every = -(-source.count(part) // most)
    if every > 1 and part == "local" and config.data.name in TREES:  # not decoded whole: an epoch gives each once
        batches = source.local(250)
        return torch.cat([batches.take(step)[0].cpu() for step in range(most // 250)])
    kept, passed = [], 0
    for images, _ in source.once(part, 256):
        kept.append(images[-passed % every :: every].cpu())
        passed += len(images)
    return torch.cat(kept)


def show_what_is_sent(run: Run) -> dict[str, Any]:
    """Write samples/sent.png and sent.json: images that will be sent, each beside the nearest private one.

    A distance is as in distances.nearest. sent.json holds the medians of what will be sent to the nearest private
    image, and of private images to the nearest other one, and whose images they are.
    """
    mine = private_images(run)
    first, _ = draw_images(run, freeze(run.load_generator()), "holdout", 0, BLOCK, slice(None))
    sent = to_uint8(first.float()).cpu()
    apart, which = nearest(sent, mine)
    some = torch.arange(len(mine))[:: max(1, len(mine) // 256)]
    found: dict[str, Any] = {"private_images": len(mine), "sent_to_private": round(float(apart.median()), 3)}
    if len(mine) > 1:
        found["private_to_private"] = round(float(nearest(mine[some], mine, some)[0].median()), 3)
        if plots.there():
            rows = apart.argsort()[:: len(apart) // PAIRS][:PAIRS]  # the nearest ones too
            own = which[rows]
            among, _ = nearest(mine[own], mine, own)
            sheet = plots.contact_sheet(sent[rows], mine[own], apart[rows].tolist(), among.tolist(), CAPTION)
            plots.save(sheet, run.out / "samples" / "sent.png")
    found["generator"] = run.generator_digest
    run.write_json("sent.json", found)
    return found


def answers_at_home(run: Run, student: nn.Module) -> dict[str, Any]:
    """What a student says of the private images: classes named, share of the most frequent, mean confidence.

    Empty where the images are not there: a run may learn from what another one paid for.
    """
    try:
        images = private_images(run)
    except MekdError:
        return {}
    with torch.no_grad():
        probs = torch.cat([student(to_float(part.to(run.device))).softmax(1).cpu() for part in images.split(256)])
    confidence, named = probs.max(1)
    counts = named.bincount()
    return {
        "private_images": len(images),
        "private_classes": int((counts > 0).sum()),
        "private_majority_share": round(int(counts.max()) / len(named), 6),
        "private_confidence": round(float(confidence.mean()), 6),
    }
