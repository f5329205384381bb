"""The count of what a server was asked and answered, in Prometheus' text format."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What was asked and answered so far: requests for an answer alone, not those for metadata."""

    statuses: Counter[int] = field(default_factory=Counter)
    images_answered: int = 0
    images_computed: int = 0
    refused: int = 0
    received: int = 0
    sent: int = 0

    def text(self) -> str:
        """All of them in Prometheus' text format."""
        lines = [
            "# HELP mekd_requests_total Requests for an answer, by the status that was sent.",
            "# TYPE mekd_requests_total counter",
            *(f'mekd_requests_total{{status="{code}"}} {count}' for code, count in sorted(self.statuses.items())),
        ]
        for name, says, count in (
            ("images_answered", "Images whose answer was sent whole.", self.images_answered),
            ("images_computed", "Images that the model was run on for a request.", self.images_computed),
            ("requests_refused", "Requests refused by the rate or the queue, with nothing computed.", self.refused),
            ("bytes_received", "Bytes of the bodies of requests for an answer.", self.received),
            ("bytes_sent", "Bytes of the bodies that they were answered with.", self.sent),
        ):
            full = f"mekd_{name}_total"
            lines += [f"# HELP {full} {says}", f"# TYPE {full} counter", f"{full} {count}"]
        return "\n".join(lines) + "\n"
