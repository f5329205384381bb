"""The audit: how near a run came to what MEKD claims, and what its images and networks say of the private ones.

Definitions 1 and 2 of Ma et al. (2024) are distances, W(P_S, P_T) and W(mu', mu); they are measured here, each beside
what it would be of two parts of one set. Everything is computed at home; audit.budget alone asks the teacher.
"""

import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mekd import distances, files, plots
from mekd.data import open_source
from mekd.engine import after, asked, parallel
from mekd.engine.collect import BLOCK, collect
from mekd.engine.private import MOST, images_of
from mekd.engine.result import class_names, finished_student
from mekd.engine.run import Run, StageError
from mekd.errors import MekdError
from mekd.fingerprint import reserved_of_audit
from mekd.metrics import confusion, majority_share
from mekd.nets import Discriminator
from mekd.nets.features import Features
from mekd.nets.frozen import freeze
from mekd.oracle.replay import Replay
from mekd.oracle.response import Response
from mekd.pixels import as_float, to_uint8
from mekd.reference import fill_topk
from mekd.seeds import generator_at

#: Answers, and rows of each side, that are held against each other exactly; of more, so many at random.
ANSWERS, ROWS = 2000, 1000
#: Images that were sent, and images drawn at home, that are looked at at most, and the bytes of either.
SENT, DRAWN, BYTES = 100_000, 10_000, 500_000_000
#: Side in pixels of what is compared as pixels.
SIDE = 32
#: Private images that no network saw, below which nothing can be said of membership; and how many are rebuilt through
#: G, by so many steps.
LEAST, REBUILT, STEPS = 300, 300, 100
PAIRS = 10


def audit(run: Run) -> None:
    """Write audit.json and samples/nearest.png: function equivalence, inverse mapping, nearness, membership."""
    enabled, there = run.config.audit.enabled, importlib.util.find_spec("ot") is not None
    if enabled is False or (enabled is None and not there):
        why = "" if there else "; it takes POT: pip install 'mekd[audit]'"
        run.log(f"audit: off (--audit.enabled true measures what can be said of equivalence and privacy{why})")
        return
    if not there:
        raise StageError(
            "audit.enabled is true, and POT is missing, which measures distances: pip install 'mekd[audit]'"
        )
    if not (run.out / "student.pt").exists():
        raise StageError(f"{run.out / 'student.pt'} is missing: run `mekd distill` first")
    own = _asked_for_it(run)
    belongs: dict[str, Any] = {
        "student": files.digest(run.out / "student.pt"),
        "generator": run.generator_digest,
        "settings": [run.config.audit.holdout, run.config.audit.budget],
    }
    kept = run.read_json("audit.json")
    if parallel.rank() == 0 and (kept is None or kept["of"] != belongs):
        _measure(run, own, belongs)
    parallel.barrier()


def _measure(run: Run, own: Replay | None, belongs: dict[str, Any]) -> None:
    begun = time.perf_counter()
    student = finished_student(run)
    found = _function(run, student, own)
    private, held = _at_home(run)
    if len(private):
        draw = freeze(run.load_generator())
        sent = _sent(run, own)
        drawn = _drawn(run, draw, DRAWN if len(held) >= LEAST else 2 * ROWS)
        found |= _mapping(run, student, drawn, private)
        found |= _nearness(run, student, sent, private, held)
        found |= _membership(run, draw, torch.cat([sent, drawn]), private, held)
    found |= _codes(run)
    empty = dict.fromkeys(("w_images", "w_images_noise", "nearest_share", "membership_auc", "membership_low",
                           "membership_high"))  # fmt: skip
    seconds = round(time.perf_counter() - begun, 1)
    run.write_json("audit.json", {**empty, **found, "seconds": seconds, "of": belongs})
    run.log(f"audit: {seconds:.0f} s, {run.out / 'audit.json'}")


def _asked_for_it(run: Run) -> Replay | None:
    """Images drawn for the audit, and the answers to them, which chose no student: audit.budget pays them."""
    budget = run.config.audit.budget
    if budget == 0 or run.config.distill.store is not None:
        return None
    return collect(run, "audit", freeze(run.load_generator()), budget - reserved_of_audit(run.config))


def _at_home(run: Run) -> tuple[Tensor, Tensor]:
    """The private images that step 1 saw, and those that it did not; none where they are not at hand."""
    nobody = torch.empty(0, *run.image, dtype=torch.uint8)
    try:
        source = open_source(run.config, torch.device("cpu"), 0, 1, run.out / "photos")  # all of them, not a rank's
        private = images_of(source, run.config, "local", MOST)
        held = images_of(source, run.config, "held", MOST) if run.config.audit.holdout else nobody
        kept = run.read_json("held.json")  # an earlier version did not write it
        if len(held) and kept is not None and kept["held"] != [source.held_out()]:
            run.log(
                "audit: nothing is said of membership: files of data.path were added or removed since step 1 began, so "
                "that audit.holdout takes other images for those that it did not see"
                + ("; put them back as they were" if len(kept["held"]) == 1 else "")
            )
            held = nobody
    except MekdError as error:
        run.log(f"audit: nothing is said of private images: {error}")
        return nobody, nobody
    return private, held


# -- function equivalence ----------------------------------------------------------------------------------


def probabilities(answer: Response, classes: int) -> Tensor:
    """The answer as distributions (m, C): a label is one-hot, and what a top-k answer leaves out is spread."""
    ((kind, value),) = answer.target.items()
    if kind == "labels":
        return F.one_hot(value.clamp_min(0), classes).double()
    if kind == "topk":
        return fill_topk(value[0].double(), value[1], classes)
    probs = value.double().softmax(1) if kind == "logits" else value.double()
    return probs / probs.sum(1, keepdim=True)


def _function(run: Run, student: nn.Module, own: Replay | None) -> dict[str, Any]:
    """W(P_S, P_T) and what goes with it, on answers that are there."""
    store = own or Replay(run.store("holdout"), run.config.distill.holdout)
    images, answer, _ = store.read(slice(None))
    found = {"function": _compared(run, student, images, answer)}
    found["function"]["images"] = "drawn for the audit" if own else "held out, by which the best step was chosen"
    # In an experiment: the labelled test images, which the simulation asked about.
    if run.config.evaluate.enabled and (tested := asked.audited(run)):
        found["test"] = _compared(run, student, *tested) | {"images": "labelled test images"}
    flat = found["function"]
    return {"w_answers": flat["w"], "w_answers_noise": flat["noise"], **found}


def _compared(run: Run, student: nn.Module, images: Tensor, answer: Response) -> dict[str, Any]:
    rows = torch.arange(len(images))
    if len(rows) > ANSWERS:
        rows = torch.randperm(len(images), generator=generator_at(run.config.seed, "audit-answers"))[:ANSWERS]
        images, answer = images[rows], answer[rows]
    teacher = probabilities(answer, run.num_classes)
    ours = torch.cat([_on(student, part, run) for part in images.split(256)]).double().softmax(1)
    confidence, named = ours.max(1)
    labels = answer.kind == "label"
    mine = F.one_hot(named, run.num_classes).double() if labels else ours  # what the same API would say of it
    apart, noise = distances.answers_apart(mine, teacher, generator_at(run.config.seed, "audit-halves"))
    right = named == answer.labels
    paired = 0.5 * (mine - teacher).abs().sum(1)
    classes = class_names(run)
    by_class: list[dict[str, Any]] = [
        {
            "class": classes[c],
            "images": int(of.sum()),
            "apart": round(float(paired[of].mean()), 4),
            "agreement": round(float(right[of].double().mean()), 4),
        }
        for c in range(run.num_classes)
        if int((of := answer.labels == c).sum()) >= 5
    ]
    return {
        "w": round(apart.mean, 5),
        "noise": round(noise.mean, 5),
        "noise_high": round(noise.high, 5),
        "paired": round(float(paired.mean()), 5),
        "agreement": round(float(right.double().mean()), 5),
        "calibration": round(distances.calibration_error(confidence, right), 5),
        "confidence": round(float(confidence.mean()), 5),
        "teacher_confidence": None if labels else round(float(answer.confidence.mean()), 5),
        "answers": len(rows),
        "worst": sorted(by_class, key=lambda row: -row["apart"])[:5],
    }


# -- the inverse mapping ------------------------------------------------------------------------------------


def _mapping(run: Run, student: nn.Module, drawn: Tensor, private: Tensor) -> dict[str, Any]:
    """W(mu', mu) in pixels and in features, and precision and recall, density and coverage."""
    found: dict[str, Any] = {}
    if len(private) >= 20:
        for name, of in (("pixels", _pixels), ("features", lambda images: features(student, images, run))):
            theirs, ours = of(drawn[: 2 * ROWS]), of(private)
            if theirs is not None and ours is not None:
                random = generator_at(run.config.seed, "audit", name)
                found[name] = _rounded(distances.images_apart(theirs, ours, random, ROWS))
    flat = found.get("pixels", {"w": None, "noise": None})
    return {"w_images": flat["w"], "w_images_noise": flat["noise"], "mapping": found}


def _codes(run: Run) -> dict[str, Any]:
    """What a code means: how the teacher's answer to what G draws of z goes with z."""
    if run.config.distill.store is not None:  # the codes were another run's
        return {"codes": None}
    _, answer, _ = Replay(run.store("holdout"), run.config.distill.holdout).read(slice(None))
    blocks = range(-(-len(answer) // BLOCK))
    code = torch.cat([run.latents("holdout", i, BLOCK, slice(None)).code.cpu() for i in blocks])[: len(answer)]
    counts = confusion(code.argmax(1), answer.labels, run.num_classes)
    probs = probabilities(answer, run.num_classes)
    ranks = None if answer.kind == "label" or run.num_classes < 3 else distances.rank_correlation(code, probs)
    return {
        "codes": {
            "agreement": round(float((code.argmax(1) == answer.labels).double().mean()), 5),
            "chance": round(majority_share(answer.labels), 5),
            "rank_correlation": None if ranks is None else round(ranks, 5),
            "nats": round(distances.mutual_information(counts), 5),
            "nats_most": round(_entropy(counts.sum(0)), 5),
        }
    }


# -- nearness ------------------------------------------------------------------------------------------------


def _nearness(run: Run, student: nn.Module, sent: Tensor, private: Tensor, held: Tensor) -> dict[str, Any]:
    """Whether what was sent comes nearer to private images than those come to each other."""
    if len(private) < 3:
        return {}
    apart, which = distances.nearest(_pixels(sent), pixels := _pixels(private))
    half = torch.randperm(len(private), generator=generator_at(run.config.seed, "audit-near"))
    one, other = half[: len(half) // 2], half[len(half) // 2 :]
    found = {
        "sent": len(sent),
        "median": round(float(apart.median()), 4),
        "nearest_share": round(distances.share_nearer(_pixels(sent), pixels), 5),
        "noise": round(distances.share_nearer(pixels[one], pixels[other]), 5),
        "of_one": round(distances.share_of_one(_pixels(sent), pixels), 5),
        "alike": round(distances.share_alike(sent, private), 5),
        "alike_noise": round(distances.share_alike(private[one], private[other]), 5),
    }
    if len(held):
        found["held_out"] = round(distances.share_nearer(_pixels(held), pixels), 5)
    if (seen := features(student, sent, run)) is not None:
        theirs = features(student, private, run)
        assert theirs is not None
        found["features_share"] = round(distances.share_nearer(seen, theirs), 5)
        found["features_noise"] = round(distances.share_nearer(theirs[one], theirs[other]), 5)
    if plots.there():
        rows = apart.argsort()[:PAIRS]
        own = which[rows]
        among, _ = distances.nearest(pixels[own], pixels, own)
        sheet = plots.contact_sheet(
            to_uint8(as_float(sent[rows])), private[own], apart[rows].tolist(), among.tolist(),
            "The ten images that were sent which come nearest to one of yours, and that one.",
        )  # fmt: skip
        plots.save(sheet, run.out / "samples" / "nearest.png")
    return {"nearest_share": found["nearest_share"], "nearness": found}


# -- membership ----------------------------------------------------------------------------------------------


def _membership(run: Run, draw: nn.Module, drawn: Tensor, private: Tensor, held: Tensor) -> dict[str, Any]:
    """Attacks that tell private images which step 1 saw from those that it did not."""
    if run.config.deprivatize.generator is not None or len(held) < LEAST:
        return {}
    judge = load_discriminator(run)
    names = None if run.config.deprivatize.after is None else after.namer(run)  # D judges an image with its class

    @torch.no_grad()
    def judged(images: Tensor) -> Tensor:
        images = images.to(run.device)
        return judge(as_float(images), None if names is None else names(images)).float().cpu()

    members = private[torch.randperm(len(private), generator=generator_at(run.config.seed, "audit-members"))[:ROWS]]
    others = held[:ROWS]
    by: dict[str, Callable[[Tensor], Tensor]] = {
        "discriminator": lambda images: torch.cat([judged(part) for part in images.split(256)]),
        "nearest drawn": lambda images: -distances.nearest(_pixels(images), _pixels(drawn))[0],
        "rebuilt by G": lambda images: -rebuilding_error(draw, images[:REBUILT], run),
    }
    attacks = {name: distances.attack(of(members), of(others), len(by))._asdict() for name, of in by.items()}
    best = max(attacks.values(), key=lambda one: one["auc"])
    return {
        "membership_auc": round(best["auc"], 5),
        "membership_low": round(best["low"], 5),
        "membership_high": round(best["high"], 5),
        "membership": {**_rounded(attacks), "members": len(members), "others": len(others)},
    }


def load_discriminator(run: Run) -> Discriminator:
    """Step 1's discriminator as it was at the end, frozen; after a first round it knows of classes."""
    step1 = run.config.deprivatize
    known = 0 if step1.after is None else run.num_classes
    judge = Discriminator(run.config.data.size, run.image[0], step1.dropout, step1.d_width, known)
    judge.load_state_dict(files.load(run.checkpoint("deprivatize"))["state"]["discriminator"])
    return judge.to(run.device).eval().requires_grad_(False)


def rebuilding_error(draw: nn.Module, images: Tensor, run: Run) -> Tensor:
    """The mean square error (n,) of the nearest picture that gradients find for each image among what G draws."""
    sizes = (run.num_classes, run.config.deprivatize.nuisance)
    random = generator_at(run.config.seed, "audit-rebuilt", device=run.device)
    target = as_float(images.to(run.device))
    start = [0.1 * torch.randn(len(images), size, generator=random, device=run.device) for size in sizes]
    latents = [x.requires_grad_() for x in start if x.numel()]
    optimizer = torch.optim.Adam(latents, 0.1)
    best = torch.full((len(images),), math.inf)
    for _ in range(STEPS):
        drawn = draw(start[0], start[1])
        error = (drawn - target).square().flatten(1).mean(1)
        best = torch.minimum(best, error.detach().cpu())
        for x, grad in zip(latents, torch.autograd.grad(error.sum(), latents), strict=True):
            x.grad = grad
        optimizer.step()
    return best


# -- images and what a student sees in them --------------------------------------------------------------------


def _sent(run: Run, own: Replay | None) -> Tensor:
    """The images that went to the teacher and were kept, uint8 or float as they went; of very many every Nth."""
    stores = [Replay(run.store("holdout"), run.config.distill.holdout), *([] if own is None else [own])]
    stores += after.stores(run.config.deprivatize.after)
    if run.config.distill.replay:
        stores.append(Replay(run.store("replay"), run.config.distill.replay, part=True))
    every = -(-sum(map(len, stores)) // min(SENT, BYTES // math.prod(run.image)))
    return torch.cat([store.read(slice(None, None, every))[0] for store in stores])


@torch.no_grad()
def _drawn(run: Run, draw: nn.Module, most: int) -> Tensor:
    """Images that are drawn at home, uint8, and sent to nobody."""
    count = min(most, BYTES // (10 * math.prod(run.image)))
    blocks = (run.latents("audit-drawn", i, BLOCK, slice(None)) for i in range(-(-count // BLOCK)))
    return torch.cat([to_uint8(draw(*latents).float()).cpu() for latents in blocks])[:count]


def _pixels(images: Tensor) -> Tensor:
    """Images (n, ch, S, S) as rows (n, D) in [-1, 1], of SIDE pixels at most."""
    small = [F.adaptive_avg_pool2d(as_float(x), min(SIDE, x.shape[-1])).flatten(1) for x in images.split(2048)]
    return torch.cat(small)


@torch.no_grad()
def features(student: nn.Module, images: Tensor, run: Run) -> Tensor | None:
    """What the student's last linear layer reads (n, D); None of a network without one."""
    try:
        reading = Features(student)
    except ValueError:
        return None
    kept = []
    with reading as seen:
        for part in images.split(256):
            _on(student, part, run)
            kept.append(seen.value.float().cpu())
    return torch.cat(kept)


@torch.no_grad()
def _on(network: nn.Module, images: Tensor, run: Run) -> Tensor:
    """A network's output for images as they were sent, on the CPU."""
    return network(as_float(images.to(run.device)).contiguous(memory_format=torch.channels_last)).float().cpu()


def _entropy(counts: Tensor) -> float:
    p = counts.double() / counts.sum()
    return max(0.0, float(-(p[p > 0] * p[p > 0].log()).sum()))


def _rounded(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _rounded(value) if isinstance(value, dict) else round(value, 5) if isinstance(value, float) else value
        for key, value in tree.items()
    }
