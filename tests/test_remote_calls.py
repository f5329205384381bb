"""Calls to a service: in order whatever is in flight, each attempt booked, nothing paid twice, a hard budget."""

import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_service import CLASSES, IMAGE, Fake, connect, images, scores
from ledger_teacher import counts, rows
from mekd.oracle import remote
from mekd.oracle.answers import Meaning, Raw
from mekd.oracle.http import Lost, Refused, ServiceError
from mekd.oracle.ledger import BudgetSpent
from mekd.oracle.remote import Rate, RemoteOracle, ServiceGone, Stopped
from mekd.oracle.response import AnswerError


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that failed is repeated at once."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)


def lengths(service: Fake) -> list[int]:
    return [len(call) for call in service.calls]


@pytest.mark.parametrize("concurrency", [1, 2, 7, 16])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_pieces_come_in_order_whatever_is_in_flight(concurrency: int, batch: int) -> None:
    late = random.Random(0)
    service = Fake(pause=lambda call: late.random() / 200)
    asked = images(20)
    oracle = connect(service, batch=batch, concurrency=concurrency)
    answer = oracle.query(asked)
    oracle.close()
    assert answer.values is not None and answer.values.numpy().tobytes() == scores(asked).tobytes()
    assert sorted(lengths(service)) == sorted({1: [1] * 20, 3: [3] * 6 + [2], 64: [20]}[batch])  # the last is ragged
    assert oracle.ledger.counts["calls"] == len(service.calls) and oracle.ledger.counts["queries"] == 20
    assert service.most <= concurrency
    if batch == 1 and concurrency == 7:
        assert service.most > 1, "nothing was in flight together"


def test_the_first_call_holds_one_image_and_its_meaning_is_told_before_the_next() -> None:
    service, told = Fake(), []

    def established(meaning: Meaning) -> None:
        told.append((meaning.kind, lengths(service)))

    oracle = connect(service, batch=4, concurrency=3, meaning=None, established=established)
    assert oracle.query(images(9)).values is not None
    assert told == [("probs", [1])]
    assert lengths(service)[0] == 1 and sorted(lengths(service)[1:]) == [1, 3, 4]
    oracle.query(images(8, seed=1))
    assert len(told) == 1 and sorted(lengths(service)[4:]) == [4, 4]
    oracle.close()


def test_a_first_answer_that_cannot_be_used_means_nothing_yet() -> None:
    class Nan(Fake):
        def call(self, asked: "list[bytes] | torch.Tensor") -> tuple[Raw, int]:
            raw, down = super().call(asked)
            assert raw.scores is not None
            return Raw(scores=raw.scores * float("nan")), down

    told: list[Meaning] = []
    for output in ("auto", "logits"):
        service = Nan()
        oracle = connect(service, meaning=None, established=told.append, batch=4, reading={"output": output})
        with pytest.raises(AnswerError, match="NaN"):
            oracle.query(images(9))
        assert lengths(service) == [1] and not told
        oracle.close()


def test_empty_answers_mean_nothing_yet() -> None:
    """An API with a threshold names no class for a picture of noise; per cent is told from shares by another one."""

    class Thresholded(Fake):
        def call(self, asked: "list[bytes] | torch.Tensor") -> tuple[Raw, int]:
            empty = len(self.calls) < 2
            super().call(asked)
            return Raw(pairs=[[] if empty else [("1", 97.5)] for _ in asked]), 0

    service, told = Thresholded(), []
    oracle = connect(
        service, meaning=None, batch=4, concurrency=3, response="topk", k=2, reading={"output": "probs"},
        established=lambda meaning: told.append(meaning.scale),
    )  # fmt: skip
    answer = oracle.query(images(9))
    assert lengths(service)[:3] == [1, 1, 1] and told == [100.0]
    assert answer.indices is not None and answer.values is not None
    assert answer.indices[:, 0].tolist() == [-1, -1] + [1] * 7
    assert answer.values[2, 0].item() == pytest.approx(0.975)
    oracle.close()


def test_refused_is_free_and_repeated(tmp_path: Path) -> None:
    service = Fake([Refused("busy"), Refused("busy", after=0.3)])
    begun = time.monotonic()
    oracle = connect(service, tmp_path, batch=4)
    oracle.query(images(4))
    assert time.monotonic() - begun >= 0.3, "Retry-After was not obeyed"
    assert oracle.ledger.counts["uncertain"] == 0
    oracle.close()
    assert rows(tmp_path, "SELECT attempt, call, queries, bytes_down FROM calls") == [
        (1, 0, 0, 0), (2, 0, 0, 0), (3, 0, 4, 64),
    ]  # fmt: skip
    assert counts(tmp_path) == {"calls": 1, "queries": 4, "bytes_up": 24, "bytes_down": 64, "uncertain": 0}


def test_a_pause_of_the_rate_ends_when_somebody_asks_to_stop(tmp_path: Path) -> None:
    """A call every hundred seconds: eight threads wait for their turn, one of them for the clock."""
    service, stop = Fake(), threading.Event()
    rate = Rate(tmp_path / "rate", "rate", 0.01)
    oracle = connect(
        service, tmp_path / "books", budget=100, concurrency=8, stop=stop.is_set,
        rates=[lambda images, stop: rate.wait(1, stop)],
    )  # fmt: skip
    threading.Timer(0.5, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Stopped, match="the same command goes on"):
        oracle.query(images(8))
    assert 0.4 < time.monotonic() - begun < 3
    oracle.close()
    assert len(service.calls) == 1, "the first may go at once"
    assert counts(tmp_path / "books")["queries"] == 1 and counts(tmp_path / "books")["uncertain"] == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_does_not_stop_the_calls(
    restarted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    rate = Rate(tmp_path, "rate", 10, log=said.append)
    for _ in range(4):
        rate.wait(1)
    monkeypatch.setattr("pyrate_limiter.buckets.sqlite_bucket.time_ns", lambda: time.time_ns() - 3600 * 10**9)
    if restarted:
        rate = Rate(tmp_path, "rate", 10, log=said.append)
    begun = time.monotonic()
    for _ in range(4):
        rate.wait(1, lambda: time.monotonic() - begun > 20)
    assert 0.2 < time.monotonic() - begun < 10, "it waited for the clock, or kept no rate"
    assert len(said) == 1 and "oracle.rate is 10 a second: the clock was set back" in said[0]


def test_a_long_wait_for_the_rate_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's clock may be a little ahead: its calls count, and are waited for."""
    monkeypatch.setattr(remote, "LONG_S", 0.1)
    said: list[str] = []
    rate = Rate(tmp_path, "image-rate", 2, log=said.append)
    rate.wait(1)
    monkeypatch.setattr("pyrate_limiter.buckets.sqlite_bucket.time_ns", lambda: time.time_ns() - 9 * 10**8)
    begun = time.monotonic()
    rate.wait(1, lambda: time.monotonic() - begun > 20)
    assert 1 < time.monotonic() - begun < 10
    assert len(said) == 1 and "oracle.image_rate is 2 a second: a call has waited 1 s" in said[0]


def test_patience_ends_what_is_refused_again_and_again(tmp_path: Path) -> None:
    service = Fake([Refused("h answered 429: slow down")] * 1000)
    oracle = connect(service, tmp_path, patience=0.2)
    with pytest.raises(ServiceGone, match=r"h answered 429: slow down; so it went for 0 s \(oracle.patience\), at no"):
        oracle.query(images(1))
    oracle.close()
    assert ServiceGone("").status == 3
    assert 3 <= len(service.calls) < 1000
    assert counts(tmp_path)["uncertain"] == 0 and counts(tmp_path)["queries"] == 0
    assert rows(tmp_path, "SELECT count(*) FROM calls") == [(len(service.calls),)]


def test_a_server_that_asks_to_wait_beyond_patience_is_not_waited_for() -> None:
    oracle = connect(Fake([Refused("busy", after=99999.0)]), patience=10)
    begun = time.monotonic()
    with pytest.raises(ServiceGone):
        oracle.query(images(1))
    assert time.monotonic() - begun < 5
    oracle.close()


def test_three_lost_attempts_are_the_end(tmp_path: Path) -> None:
    service = Fake([Lost("no whole answer")] * 5)
    oracle = connect(service, tmp_path, budget=100, batch=4)
    with pytest.raises(ServiceGone, match=r"no whole answer\. That was the attempt 3 of one call whose fate is"):
        oracle.query(images(4))
    assert oracle.ledger.left == 100 - 12
    oracle.close()
    assert lengths(service) == [4, 4, 4]
    assert counts(tmp_path) == {"calls": 0, "queries": 0, "bytes_up": 0, "bytes_down": 0, "uncertain": 12}
    assert rows(tmp_path, "SELECT attempt, call, queries, answered FROM calls") == [(n, 0, 4, None) for n in (1, 2, 3)]


def test_what_is_lost_counts_against_the_budget(tmp_path: Path) -> None:
    oracle = connect(Fake([Lost("cut")] * 5), tmp_path, budget=9, batch=4)
    with pytest.raises(
        BudgetSpent, match=r"s\.budget is 9 queries, 8 are spent and the next call has 4; it was not sent"
    ):
        oracle.query(images(4))
    oracle.close()
    assert counts(tmp_path)["uncertain"] == 8


def test_a_call_that_fails_lets_those_in_flight_finish(tmp_path: Path) -> None:
    """Four are in flight, the second one fails at once: the others are answered and booked, no fifth is sent."""

    class Failing(Fake):
        def call(self, asked: "list[bytes] | torch.Tensor") -> tuple[Raw, int]:
            if torch.equal(asked, images(20)[2:4]):
                everybody.wait(10)
                raise ServiceError("the key is wrong")
            if len(self.calls) < 3:
                everybody.wait(10)
            return super().call(asked)

    everybody = threading.Barrier(4)
    service = Failing(pause=lambda call: 0.1)
    oracle = connect(service, tmp_path, batch=2, concurrency=4)
    with pytest.raises(ServiceError, match="the key is wrong"):
        oracle.query(images(20))
    oracle.close()
    assert service.answered == 6 and counts(tmp_path)["queries"] == 6 and counts(tmp_path)["uncertain"] == 2
    again = Fake()
    oracle = connect(again, tmp_path, batch=2, concurrency=4)
    answer = oracle.query(images(20))
    oracle.close()
    assert answer.values is not None and answer.values.numpy().tobytes() == scores(images(20)).tobytes()
    assert again.images == 14 and counts(tmp_path)["queries"] == 20 and counts(tmp_path)["uncertain"] == 2


def test_a_resumed_ledger_pays_only_what_is_missing_however_it_is_cut(tmp_path: Path) -> None:
    asked = images(50)
    late = iter([0.0, 0.02, 0.0, 0.01] * 100)
    for attempt, (batch, concurrency) in enumerate([(4, 1), (7, 5), (1, 16), (64, 2)]):
        service = Fake(pause=lambda call: next(late))
        sent: list[int] = []
        oracle = connect(
            service, tmp_path, batch=batch, concurrency=concurrency,
            stop=lambda sent=sent, attempt=attempt: attempt < 3 and (sent.append(1) or len(sent) > 3),
        )  # fmt: skip
        if attempt < 3:
            with pytest.raises(Stopped):
                oracle.query(asked)
        else:
            answer = oracle.query(asked)
            assert answer.values is not None and answer.values.numpy().tobytes() == scores(asked).tobytes()
        oracle.close()
        assert service.images > 0
    assert counts(tmp_path)["queries"] == 50 and counts(tmp_path)["uncertain"] == 0
    service = Fake()
    oracle = connect(service, tmp_path, batch=3)
    oracle.query(asked)
    oracle.close()
    assert not service.calls


def test_the_budget_is_hard_under_sixteen_threads(tmp_path: Path) -> None:
    service = Fake(pause=lambda call: 0.002)
    oracle = connect(service, tmp_path, budget=37, batch=3, concurrency=16)
    with pytest.raises(BudgetSpent, match=r"s\.budget is 37"):
        oracle.query(images(90))
    assert service.images <= 37 and service.images == oracle.ledger.counts["queries"]
    oracle.close()
    assert service.images == counts(tmp_path)["queries"] >= 36 - 16 * 3  # one that fails ends the others
    assert counts(tmp_path)["uncertain"] == 0


def test_it_ends_between_calls_when_asked_to_stop(tmp_path: Path) -> None:
    service = Fake()
    oracle = connect(service, tmp_path, batch=2, stop=lambda: len(service.calls) >= 3)
    with pytest.raises(Stopped, match="what was answered is kept, the same command goes on") as stopped:
        oracle.query(images(20))
    oracle.close()
    assert stopped.value.status == 130
    assert lengths(service) == [2, 2, 2] and counts(tmp_path)["queries"] == 6 and counts(tmp_path)["uncertain"] == 0


def test_a_stop_does_not_wait_for_what_the_server_asks(tmp_path: Path) -> None:
    """Ctrl-C while a server asks for a minute."""
    service = Fake([Refused("busy", after=60.0)])
    oracle = connect(service, tmp_path, stop=lambda: time.monotonic() - begun > 0.3)
    begun = time.monotonic()
    with pytest.raises(Stopped):
        oracle.query(images(1))
    assert time.monotonic() - begun < 10
    oracle.close()


def test_every_attempt_has_a_row(tmp_path: Path) -> None:
    chance = random.Random(1)
    faults = [chance.choice([Refused("busy"), None, None, None, Lost("cut")]) for _ in range(40)]
    service = Fake(faults)
    oracle = connect(service, tmp_path, batch=2, concurrency=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 100)
        oracle.query(images(60))
    oracle.close()
    refused, lost = (sum(isinstance(fault, kind) for fault in faults) for kind in (Refused, Lost))
    found = rows(tmp_path, "SELECT queries, answered IS NULL, count(*) FROM calls GROUP BY 1, 2 ORDER BY 1, 2")
    assert found == [(0, 0, refused), (2, 0, 30), (2, 1, lost)]
    assert len(service.calls) == 30 + refused + lost
    assert counts(tmp_path)["uncertain"] == 2 * lost


def test_too_few_answers_are_not_put_in_place(tmp_path: Path) -> None:
    class Short(Fake):
        def call(self, asked: "list[bytes] | torch.Tensor") -> tuple[Raw, int]:
            return super().call(asked[:-1])

    oracle = connect(Short(), tmp_path, batch=4)
    with pytest.raises(AnswerError, match="the teacher answered 3 of 4 images"):
        oracle.query(images(8))
    oracle.close()
    assert counts(tmp_path)["queries"] == 0 and counts(tmp_path)["uncertain"] == 4


def test_what_it_does_not_take_is_refused_before_anything_is_booked(tmp_path: Path) -> None:
    service = Fake()
    oracle = connect(service, tmp_path)
    with pytest.raises(TypeError, match="int64"):
        oracle.query(torch.full((1, *IMAGE), 300))  # it would wrap to 44
    with pytest.raises(ValueError, match="NaN"):
        oracle.query(torch.full((1, *IMAGE), float("nan")))
    oracle.close()
    assert not service.calls and rows(tmp_path, "SELECT count(*) FROM calls") == [(0,)]
    assert isinstance(oracle, RemoteOracle) and oracle.num_classes == CLASSES


@pytest.mark.parametrize("kept", [True, False])
def test_a_query_that_failed_is_not_paid_twice_when_it_is_repeated(kept: bool, tmp_path: Path) -> None:
    """In one's own loop, by the same process; in memory too."""
    service = Fake([None, None, None, ServiceError("gone")])
    oracle = connect(service, tmp_path if kept else None, meaning=None)
    asked = images(6)
    with pytest.raises(ServiceError, match="gone"):
        oracle.query(asked)
    answer = oracle.query(asked)
    assert answer.values is not None and answer.values.numpy().tobytes() == scores(asked).tobytes()
    assert oracle.ledger.counts["queries"] == 6 == service.answered
    oracle.query(images(2, seed=1))
    oracle.close()
    assert service.answered == 8


def test_after_a_query_that_failed_another_one_may_be_asked() -> None:
    service = Fake([None, None, ServiceError("no such picture")])
    oracle = connect(service)
    with pytest.raises(ServiceError):
        oracle.query(images(6))
    for seed in (1, 2):
        answer = oracle.query(images(6, seed))
        assert answer.values is not None and answer.values.numpy().tobytes() == scores(images(6, seed)).tobytes()
    oracle.close()
    assert service.answered == 2 + 12


def test_a_ledger_that_is_rewound_knows_what_its_process_asked(tmp_path: Path) -> None:
    service = Fake()
    oracle = connect(service, tmp_path, batch=2)
    for _ in range(2):
        oracle.ledger.rewind(0)
        for seed in range(3):
            oracle.query(images(4, seed))
    oracle.close()
    assert service.answered == 12 == counts(tmp_path)["queries"]


def test_ctrl_c_in_ones_own_loop_ends_the_paying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(calls: Iterable[Future[Any]]) -> None:
        while service.answered < 8:
            time.sleep(0.001)
        monkeypatch.setattr(remote, "wait", waiting)
        raise KeyboardInterrupt

    waiting = remote.wait
    monkeypatch.setattr(remote, "wait", interrupted)
    service = Fake(pause=lambda call: 0.005)
    oracle = connect(service, tmp_path, concurrency=4)
    with pytest.raises(KeyboardInterrupt):
        oracle.query(images(200))
    sent = service.answered
    assert 8 <= sent <= 20 and oracle.ledger.counts["queries"] == sent and oracle.ledger.counts["uncertain"] == 0
    oracle.query(images(200))
    oracle.close()
    assert service.answered == 200 == counts(tmp_path)["queries"]
