"""What an audit found, for people: each figure beside its noise, and what it does and does not show."""

from typing import Any


def audited(found: dict[str, Any] | None) -> list[str]:
    """What audit.json holds, as lines of Markdown; nothing without one."""
    if found is None:
        return []
    function, near, codes = found["function"], found.get("nearness"), found["codes"]
    lines = ["## Audit", "", "| measured at home | here | what it would be by chance alone |", "|---|---|---|"]
    lines.append(f"| W(P_S, P_T), student's and teacher's answers | {function['w']:.4f} | {function['noise']:.4f} |")
    lines += [
        f"| W(mu', mu), drawn and private images, in {name} | {one['w']:.4f} | {one['noise']:.4f} |"
        for name, one in found.get("mapping", {}).items()
    ]
    if near:
        lines.append(
            f"| sent images that come nearer to a private one than any other private one does | "
            f"{_percent(near['nearest_share'])} | {_percent(near['noise'])} |"
        )
        lines.append(
            "| sent images that are near to one private image and to no second one, as 1 of 100 private images is | "
            f"{_percent(near['of_one'])} | 1.00% |"
        )
        alike = (_percent(near[name]) for name in ("alike", "alike_noise"))
        lines.append("| sent images that a perceptual hash takes for a private one | " + " | ".join(alike) + " |")
    if found["membership_auc"] is not None:
        low, high = found["membership_low"], found["membership_high"]
        lines.append(
            "| membership, AUC of the best of three attacks | "
            f"{found['membership_auc']:.3f} ({low:.3f} to {high:.3f}) | 0.5 |"
        )
    within = function["w"] <= function["noise_high"]
    said = [
        f"- **Function.** On {function['answers']:,} images ({function['images']}) the student's answers are "
        + ("as near to the teacher's as the teacher's are to themselves on other images" if within else
           f"farther from the teacher's ({function['w']:.4f}) than the teacher's are from themselves on other images "
           f"({function['noise']:.4f}, seldom above {function['noise_high']:.4f})")
        + f"; image by image they are {function['paired']:.4f} apart, half the L1 norm of two distributions. This is "
        "said of drawn images, and of real ones only where a simulation asked about them."
    ]  # fmt: skip
    if test := found.get("test"):
        said.append(f"- On {test['answers']:,} labelled test images: {test['w']:.4f}, by chance {test['noise']:.4f}.")
    if codes is not None:
        said.append(
            f"- **Code.** The teacher names the largest entry of the code in {_percent(codes['agreement'])} of drawn "
            f"images (always its most frequent class: {_percent(codes['chance'])}); the code tells "
            f"{codes['nats']:.2f} of {codes['nats_most']:.2f} nats of its class."
        )
    if near:
        said.append(
            f"- **Nearness.** {near['sent']:,} images that were sent were held against the private ones. Smooth "
            "pictures are near to all of them, so that the first share may be large; where the second is far above 1 % "
            "the generator repeats private images. Near chance they do not mean that no image resembles one: "
            "samples/nearest.png shows the ten nearest."
        )
    if found["membership_auc"] is None:
        said.append(
            "- **Membership.** Not known: it takes 300 private images or more that step 1 never saw "
            "(--audit.holdout 300 with another --out), and its discriminator."
        )
    else:
        told = "can be told" if found["membership_low"] > 0.5 else "could not be told by these attacks"
        by = ", ".join(
            f"{name} {one['auc']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            for name, one in found["membership"].items()
            if isinstance(one, dict)
        )
        said.append(
            f"- **Membership.** Which private images step 1 saw {told}: {by}. The discriminator stays at home; the "
            "distance to the nearest drawn image is what whoever gets enough of them can try. Stronger attacks may be "
            "there."
        )
    return [*lines, "", *said, ""]


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"
