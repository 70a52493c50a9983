"""Programs that mean harm, or do it: each ends in time, is counted as failed, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maxlm.config import SamplingConfig, UserError
from maxlm.evaluation import confined, marking
from maxlm.evaluation.examining import Asking, examine
from maxlm.evaluation.exams import ProgramExam, ProgramQuestion, first_questions, human_eval, human_eval_file
from maxlm.evaluation.sandbox import Sandbox, SandboxLimits
from maxlm.evaluation.scoring import Likelihood, Pair

SECONDS = 5.0
"""Many times what a program here needs that does end."""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """Small, where this machine lets one be built."""
    try:
        return Sandbox(SandboxLimits(memory_mb=256, file_mb=1, disk_mb=4, processes=8))
    except UserError as error:
        if "machine" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, mount or folder of a sandbox outlives its program."""
    yield
    deadline = time.monotonic() + 5
    while (left := processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert "maxlm-sandbox-" not in Path("/proc/mounts").read_text()
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("maxlm-sandbox-*/*"))


def processes() -> list[bytes]:
    found = []
    for one in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = one.read_bytes()
        except OSError:
            continue
        if words.endswith(b"-I\0-B\0program.py\0"):
            found.append(words)
    return found


def test_a_program_that_ends_passes_and_one_that_raises_fails(sandbox: Sandbox) -> None:
    assert sandbox("import json, subprocess\nprint(json.dumps({1: 2}))\nassert 1 + 1 == 2", SECONDS) is None
    failure = sandbox("assert 1 + 1 == 3, 'sums'", SECONDS)
    assert failure is not None and failure.startswith("ended with code 1:") and failure.endswith("AssertionError: sums")
    for text in ("x = (", "\udcff", "a\0b", "'''", "if True:"):  # no Python, whatever follows
        assert sandbox(text, SECONDS) is not None


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        pytest.param("while True: pass", "took more than 1 s", id="endless loop"),
        pytest.param("import time\ntime.sleep(60)", "took more than 1 s", id="sleep"),
        pytest.param("import os\nwhile True: os.fork()", "", id="fork bomb"),
        pytest.param("import threading\nwhile True: threading.Thread(target=input).start()", "", id="threads"),
        pytest.param("x = [0] * 10**9", "MemoryError", id="memory bomb"),
        pytest.param("x = 9 ** 9 ** 9", "took more than 1 s", id="deep in C"),
        pytest.param("open('/usr/lib/x', 'w')", "Read-only file system", id="write outside"),
        pytest.param("open('/x', 'w')", "Read-only file system", id="write at the root"),
        pytest.param("with open('big', 'wb') as f:\n  while True: f.write(b'x' * 10**5)", "too large", id="a big file"),
        pytest.param(
            "i = 0\nwhile True:\n  i += 1\n  open(f'{i}', 'wb').write(b'x' * 10**6)", "No space left", id="many files"
        ),
        pytest.param("while True: print('x' * 10**6)", "took more than 1 s", id="endless output"),
        pytest.param("import sys\nwhile True: sys.stderr.write('x' * 10**6)", "", id="endless complaints"),
        pytest.param("import sys\nsys.exit(0)", "ended with code 0", id="leaves early"),
        pytest.param("import os\nos._exit(0)", "ended with code 0", id="leaves at once"),
        pytest.param("import os\nos.abort()", "ended with code", id="aborts"),
        pytest.param("import ctypes\nctypes.string_at(0)", "ended with code -11", id="crashes"),
        pytest.param("import os\nos.kill(os.getppid(), 9)\nassert 0", "code 1", id="kills its parent"),
        pytest.param(f"import os\nos.kill({os.getpid()}, 9)", "No such process", id="kills this test"),
        pytest.param("import os\nos.kill(-1, 9)\nassert 0", "", id="kills all"),
        pytest.param(
            "import os\nif os.fork() == 0:\n  os.setsid()\n  while True: pass\nassert 0", "code 1", id="leaves a child"
        ),
        pytest.param(
            "import ctypes, signal, os\nlibc = ctypes.CDLL(None)\nlibc.prctl(1, 0)\nos.setsid()\n"
            "[signal.signal(i, signal.SIG_IGN) for i in range(1, 32) if i not in (9, 19)]\nwhile True: pass",
            "took more than 1 s",
            id="wants to stay",
        ),
        pytest.param("import os\nos.setuid(0)", "not permitted", id="wants rights"),
        pytest.param(
            "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
            "AssertionError",
            id="wants its own space",
        ),
        pytest.param(
            "import os\nassert os.path.exists('/etc/passwd') or os.path.exists('/proc/1')", "", id="looks about"
        ),
        pytest.param("import os\nassert len(os.environ) > 3", "AssertionError", id="reads the environment"),
    ],
)
def test_what_ends_badly(program: str, reason: str, sandbox: Sandbox) -> None:
    began = time.monotonic()
    failure = sandbox(program, 1.0 if "took" in reason else SECONDS)
    assert failure is not None and reason in failure and len(failure) < 600
    assert time.monotonic() - began < 20  # some seconds, and a busy machine


def test_nothing_of_the_network_is_there(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it listens
        failure = sandbox(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)", SECONDS)
    assert failure is not None and "unreachable" in failure


def test_a_secret_of_the_user_is_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    tmp_path.chmod(0o755)
    for place in (tmp_path / "secret", Path(__file__), Path("/proc/self/environ")):
        failure = sandbox(f"open({str(place)!r})", SECONDS)
        assert failure is not None and "No such file" in failure


def test_where_no_sandbox_can_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no.py").write_text("import sys\nprint('unshare: not permitted', file=sys.stderr)\nsys.exit(3)")
    monkeypatch.setattr(confined, "__file__", str(tmp_path / "no.py"))
    with pytest.raises(UserError, match=r"does not let a sandbox be built \(unshare: not permitted\); it takes"):
        Sandbox()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="--allow_code needs Linux, this is darwin"):
        Sandbox()


class Writer:
    """Writes the n-th of its texts in the n-th round, and finds short ones likely."""

    def __init__(self, *rounds: Sequence[str]) -> None:
        self._rounds, self.asked = iter(rounds), list[dict[str, Any]]()

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return [0], [1] * len(continuation)

    def scores(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        return [Likelihood(np.full(len(text), -float(len(text))), False) for _, text in pairs]

    def texts(self, prompts: Sequence[str], **how: Any) -> list[str]:
        self.asked.append(how)
        return list(next(self._rounds))

    def embeddings(self, texts: Sequence[str]) -> Any:
        raise NotImplementedError


def test_marks_of_programs() -> None:
    questions = (
        ProgramQuestion(prompt="def f(x):\n", test="assert f(2) == 4"),
        ProgramQuestion(prompt="def g(x):\n", test="assert g(2) == 3"),
    )
    exam = ProgramExam(name="two", questions=questions)
    good, bad, worse = "    return x + 2", "    return x", "    return 17"
    model = Writer([good, bad], [worse, bad], [good, "    return x + 1"])

    def judge(program: str, seconds: float) -> str | None:
        assert seconds == 3.0 and program.startswith("def ") and program.count("\nassert ") == 1
        return None if ("def f" in program and good in program) or "return x + 1" in program else "no"

    found = examine(model, exam, Asking(samples=3, ks=(1, 2), seed=5, judge=judge))
    assert [record["failures"] for record in found.records] == [[None, "no", None], ["no", "no", None]]
    marks = {one.measure: one.value for one in found.measures}
    assert marks["pass@1"] == pytest.approx((2 / 3 + marking.pass_at_k(3, 1, 1)) / 2)
    assert marks["pass@2"] == pytest.approx((1 + marking.pass_at_k(3, 1, 2)) / 2)
    assert marks["1@3"] == 0  # the shortest are `bad` and `worse`
    assert [how["seed"] for how in model.asked] == [5, 6, 7] and model.asked[0]["sampling"].temperature == 0.8
    alone = Writer([good, bad])
    examine(alone, exam, Asking(judge=judge))
    assert alone.asked[0]["sampling"] == SamplingConfig(temperature=0.0)
    with pytest.raises(UserError, match="pass@10 needs as many samples; use --samples 10"):
        examine(Writer([good, bad]), exam, Asking(ks=(10,), judge=judge))


def test_problems_of_human_eval_with_their_own_solutions(sandbox: Sandbox) -> None:
    """The file has the solutions too, under a key that no exam shows."""
    import gzip
    import json

    lines = gzip.decompress(human_eval_file().read_bytes()).splitlines()[:4]
    exam = first_questions(human_eval(human_eval_file()), 4)
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    assert examine(Writer(solutions), exam, Asking(judge=sandbox)).measures[0].value == 1
    wrong = ["    return None\n"] * 4
    assert examine(Writer(wrong), exam, Asking(judge=sandbox)).measures[0].value == 0
