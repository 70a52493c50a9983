"""The ranks of a run, as threads of one process: what they agree on, what ends them. tests/faults has real ones."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

from maxlm.config import LimitsConfig, UserError
from maxlm.processes import same, watchdog
from maxlm.processes.hub import Hub
from maxlm.processes.joining import launched
from maxlm.processes.ranks import RankError, Ranks
from maxlm.processes.spoke import Spoke
from maxlm.processes.wire import Wire

SIZE = 3


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(last words, exit code) of processes that would have ended."""
    seen: list[tuple[str, int]] = []

    def leave(text: str, code: int) -> NoReturn:
        seen.append((text, code))
        threading.Event().wait()  # the thread, which is a daemon, does no more
        raise AssertionError

    monkeypatch.setattr("maxlm.processes.ranks.leave", leave)
    monkeypatch.setattr("maxlm.processes.ranks._UNWIND_S", 3600.0)  # the process goes on
    return seen


def connected(port: int, rank: int, limits: LimitsConfig) -> Spoke:
    return Spoke(Wire(socket.create_connection(("localhost", port))), rank, SIZE, limits)


@contextlib.contextmanager
def together(limits: LimitsConfig = LimitsConfig()) -> Iterator[list[Ranks]]:
    """All ranks of a run, each of which has met the others."""
    listener = socket.create_server(("localhost", 0))
    port = listener.getsockname()[1]
    hub = Hub(listener, SIZE, limits)
    spokes = [connected(port, rank, limits) for rank in range(1, SIZE)]
    hub.wait_for_all(10, "here")
    hub.start(1234)
    assert [spoke.wait_for_start(10) for spoke in spokes] == [1234] * 2
    yield [hub, *spokes]


def on_each(ranks: list[Ranks], call: Callable[[Ranks], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


def wait_until(ready: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_all_get_what_rank_0_says_and_wait_for_the_last() -> None:
    came = []

    def one(rank: Ranks) -> Any:
        said = rank.say("think", {"from": rank.rank})
        time.sleep(0.2 * rank.rank)
        came.append(rank.rank)
        rank.meet("come")
        return said, len(came)

    with together() as ranks:
        for _ in range(2):
            came.clear()
            assert on_each(ranks, one) == [({"from": 0}, SIZE)] * SIZE


def test_waiting_has_a_limit_that_names_its_key() -> None:
    with together(LimitsConfig(prepare_s=0.5)) as ranks, pytest.raises(UserError) as caught:
        ranks[1].say("prepare the data")
    assert re.fullmatch(
        r"rank 0 \(host \S+\) did not prepare the data within 0.5 s; look there, or raise limits.prepare_s",
        str(caught.value),
    )


@pytest.mark.parametrize("ahead", [0, 1])
def test_all_stop_at_the_furthest_step(ahead: int) -> None:
    """One rank is asked; another has got further than the others."""
    steps = {0: 5, 1: 5 + ahead, 2: 5}

    def run(rank: Ranks) -> int:
        step = steps[rank.rank]
        while not rank.stops_after(step, asked=rank.rank == 2, last=100):
            time.sleep(0.01)
            step += 1
        return step

    with together() as ranks:
        stopped = on_each(ranks, run)
        assert len(set(stopped)) == 1 and stopped[0] >= 5 + ahead


def test_a_rank_in_its_last_step_is_not_waited_for() -> None:
    """It asks no more, so its connection answers for it, and all go on to the end."""
    with together() as ranks:
        assert [rank.stops_after(9, asked=False, last=10) for rank in ranks[:2]] == [False, False]
        assert ranks[2].stops_after(9, asked=True, last=10) is False  # all end with step 10 anyway


def test_a_stop_agreed_for_a_last_step_that_is_undone_does_not_wait_for_it() -> None:
    with together() as ranks:
        assert [rank.stops_after(9, asked=False, last=10) for rank in ranks] == [False] * SIZE

        def back(rank: Ranks) -> bool:
            rank.goes_back(10)
            return rank.went_back(5, asked=rank.rank == 2)

        assert on_each(ranks, back) == [True] * SIZE


def test_a_rank_that_goes_back_already_is_not_waited_for() -> None:
    """Rank 0 has come to where all go back, and waits there for the others, one of which is asked to stop before."""
    with together() as ranks:
        assert not ranks[0].stops_after(6, asked=False, last=100)
        assert not ranks[2].stops_after(4, asked=True, last=100)
        wait_until(lambda: all(vars(rank)["_hold"] for rank in ranks))
        there = threading.Barrier(SIZE)  # restoring

        def run(rank: Ranks) -> list[bool]:
            agreed = [] if rank.rank == 0 else [rank.stops_after(n, asked=False, last=100) for n in (5, 6)]
            rank.goes_back(6)
            there.wait(10)
            return [*agreed, rank.went_back(3, asked=False)]

        assert on_each(ranks, run) == [[True], [False, True, True], [False, True, True]]


def test_after_going_back_a_stop_is_agreed_as_ever() -> None:
    def run(rank: Ranks) -> int:
        rank.goes_back(50)
        assert not rank.went_back(5, asked=False)
        step = 6
        while not rank.stops_after(step, asked=rank.rank == 1 and step > 8, last=100):
            time.sleep(0.01)
            step += 1
        return step

    with together() as ranks:
        [stopped, *others] = on_each(ranks, run)
        assert others == [stopped] * 2 and 9 <= stopped < 50


def test_an_error_of_one_rank_ends_the_others_with_its_words(left: list[tuple[str, int]]) -> None:
    with together() as ranks:
        ranks[2].step = 7
        error = UserError("the disk is full\nand so is the other one")
        ranks[2].tell(error)
        words = str(error)
        assert re.fullmatch(r"(rank 2, host \S+, step 7: .*\n?){2}", words)
        wait_until(lambda: len(left) == 2)
        assert left == [(words, 2)] * 2


def test_what_breaks_by_itself_ends_with_1(left: list[tuple[str, int]]) -> None:
    with together() as ranks:
        with pytest.raises(RankError, match=r"rank 0, host .*, step 0: ZeroDivisionError: no") as caught:
            ranks[0].tell(ZeroDivisionError("no"))
        assert caught.value.exit_code == 1
        wait_until(lambda: len(left) == 2)
        assert left == [(str(caught.value), 1)] * 2


def test_a_closed_connection_is_a_lost_rank(left: list[tuple[str, int]]) -> None:
    with together() as ranks:
        ranks[1]._wire.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        wait_until(lambda: len(left) == SIZE)
        assert sum("rank 1, host" in words and "ended without a word" in words for words, _ in left) == 2
        assert {code for _, code in left} == {1}


def test_goodbye_is_no_loss(left: list[tuple[str, int]]) -> None:
    with together() as ranks:
        for rank in reversed(ranks):
            rank.at_exit()  # type: ignore[attr-defined]
        for rank in ranks[1:]:
            rank._wire.socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
        time.sleep(0.3)
        assert left == []


def test_a_silent_rank_is_given_up(left: list[tuple[str, int]]) -> None:
    """It has connected, and then stands still."""
    limits = LimitsConfig(silent_s=2)
    listener = socket.create_server(("localhost", 0))
    Hub(listener, 2, limits)
    with socket.create_connection(listener.getsockname()) as asleep:
        asleep.sendall(json.dumps({"hello": {"rank": 1, "size": 2, "host": "h", "pid": 3}}).encode() + b"\n")
        wait_until(lambda: left)
    assert left == [("rank 1, host h, step 0: gave no sign of life for 2 s (limits.silent_s)", 1)]


@pytest.mark.parametrize(
    ("rank", "size", "words"),
    [(1, 3, "two processes are rank 1: one on host"), (0, 3, "two processes are rank 0"), (2, 4, "counts 4 processes")],
)
def test_contradictions_between_ranks(rank: int, size: int, words: str, left: list[tuple[str, int]]) -> None:
    listener = socket.create_server(("localhost", 0))
    port = listener.getsockname()[1]
    Hub(listener, SIZE, LimitsConfig())
    connected(port, 1, LimitsConfig())
    time.sleep(0.2)
    Spoke(Wire(socket.create_connection(("localhost", port))), rank, size, LimitsConfig())
    wait_until(lambda: len(left) == 3)
    assert all(words in text and code == 2 for text, code in left)


@pytest.mark.parametrize("rank", [0, 1])
def test_another_run_at_the_same_port_is_sent_away(rank: int, left: list[tuple[str, int]]) -> None:
    with together() as ranks:
        Spoke(Wire(socket.create_connection(ranks[0]._listener.getsockname())), rank, 2, LimitsConfig())  # type: ignore[attr-defined]
        wait_until(lambda: left)
        assert on_each(ranks, lambda rank: rank.say("talk", rank.rank)) == [0] * SIZE
    ((words, code),) = left
    assert f"rank {rank}, host" in words and "another run is under way here" in words and code == 2


def test_who_is_missing_is_named() -> None:
    listener = socket.create_server(("localhost", 0))
    hub = Hub(listener, 4, LimitsConfig())
    Spoke(Wire(socket.create_connection(listener.getsockname())), 2, 4, LimitsConfig())
    with pytest.raises(UserError, match=r"^ranks 1, 3 of 4 did not come to here within 0.5 s.*limits.join_s"):
        hub.wait_for_all(0.5, "here")


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": 1}\n', b"[" * 10**5 + b"\n", b"\xff\n"]
)
def test_strangers_are_sent_away(noise: bytes, left: list[tuple[str, int]]) -> None:
    with together() as ranks:
        with socket.create_connection(ranks[0]._listener.getsockname()) as stranger:  # type: ignore[attr-defined]
            stranger.sendall(noise)
            time.sleep(0.1)
        assert on_each(ranks, lambda rank: rank.say("talk", rank.rank)) == [0] * SIZE
        assert left == []


# What must be the same


def test_different_facts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [{"a": 1, "b": "x"}, {"a": 1, "b": "x"}, {"a": 1, "b": "y", "c": None}]
    here = threading.local()
    monkeypatch.setattr(same, "ranks", lambda: here.ranks)

    def compare(rank: Ranks) -> str:
        here.ranks = rank
        try:
            same.require_same("settings", facts[rank.rank])
        except UserError as error:
            return str(error)
        return "same"

    with together(LimitsConfig(prepare_s=1.0)) as ranks:
        found = on_each(ranks, compare)
    assert found[2] == (
        "settings differ between ranks: b = 'y' here and 'x' on rank 0, c = None here and absent on rank 0; start "
        "every rank with the same command and files"
    )
    assert all("did not compare its settings within 1 s" in words for words in found[:2])


# What launchers say


JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "8192", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[017-018,020]",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "4097.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    for name in (*JAX, *SLURM, *MPI, "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)

    def be(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return be


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        (JAX, ("10.0.0.2", 8476, 4, 3, None)),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "[::1]:1"}, ("::1", 1, 4, 3, None)),
        (SLURM, ("gpu017", 61440, 4, 2, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "a,b", "JAX_COORDINATOR_PORT": "99"}, ("a", 99, 4, 2, [1])),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        (MPI, ("10.96.0.1", 61441, 2, 1, [0])),
    ],
)
def test_a_launcher_is_understood(
    values: dict[str, str], expected: Any, environment: Callable[[dict[str, str]], None]
) -> None:
    environment(values)
    assert launched() == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES is not"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "10.0.0.2"}, "must be HOST:PORT"),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "a:70000"}, "must be HOST:PORT"),
        (JAX | {"JAX_PROCESS_ID": "4"}, "must be less than JAX_NUM_PROCESSES = 4"),
        (JAX | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID = -1 must be a whole number"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "no srun started this process"),
        ({k: v for k, v in MPI.items() if "hnp" not in k}, "set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_a_contradictory_launcher_is_refused(
    values: dict[str, str], words: str, environment: Callable[[dict[str, str]], None]
) -> None:
    environment(values)
    with pytest.raises(UserError, match=words):
        launched()


def test_links_to_nothing_that_editors_leave_in_the_source_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same, "_ROOT", tmp_path)
    (tmp_path / "maxlm").mkdir()
    (tmp_path / "maxlm" / "a.py").write_text("pass")
    before = same.code_fingerprint.__wrapped__()
    (tmp_path / "maxlm" / ".#a.py").symlink_to("me@here.1234")
    assert same.code_fingerprint.__wrapped__() == before


# Watchdog


def test_a_step_that_takes_too_long_shows_its_stacks_once(
    left: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "ranks", Ranks)
    with watchdog.Watchdog(LimitsConfig(step_s=0.2)) as dog:
        dog.step(4)
        with dog.off_duty():
            time.sleep(0.5)
        assert capfd.readouterr().err == ""
        _a_place_to_be_stuck()
    err = capfd.readouterr().err
    assert err.count("warning: step 5: this step has taken more than 0.2 s (limits.step_s)") == 1
    assert "_a_place_to_be_stuck" in err and left == []


def _a_place_to_be_stuck() -> None:
    time.sleep(2.5)


def test_a_stuck_run_ends_where_that_is_asked_for(left: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ranks", Ranks)
    with watchdog.Watchdog(LimitsConfig(step_s=0.2, end_stuck_run=True)) as dog:
        dog.step(4)
        wait_until(lambda: left)
    ((words, code),) = left
    assert "limits.end_stuck_run" in words and code == 1


def test_what_comes_after_the_last_step_may_take_its_time(
    left: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "ranks", Ranks)
    with watchdog.Watchdog(LimitsConfig(step_s=0.2, end_stuck_run=True)) as dog:
        dog.step(4)
        with dog.off_duty():
            pass
        dog.rest()
        time.sleep(0.5)
    assert left == []


def test_a_single_process_knows_its_step() -> None:
    here = Ranks()
    assert not here.stops_after(4, asked=False, last=9)
    assert here.report(UserError("x"))["step"] == 4


def test_the_limit_follows_what_was_measured() -> None:
    dog = watchdog.Watchdog(LimitsConfig())
    assert dog.limit() == watchdog._FIRST_STEP_S
    dog._seconds.extend([10.0] * 4)
    assert dog.limit() == watchdog._FIRST_STEP_S
    dog._seconds.extend([12.0, 500.0])
    assert dog.limit() == 20 * 10.0
    dog._seconds.extend([0.01] * 60)
    assert dog.limit() == 60
