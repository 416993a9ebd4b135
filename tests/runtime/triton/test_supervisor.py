"""When the service restarts its server, how long it waits before, and what it does about killed deployments."""

import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirror_runtime.errors import ServerError
from mirror_runtime.serving_process import STOP_SIGNALS
from mirror_runtime.triton.server import server as server_module
from mirror_runtime.triton.server import supervisor as supervisor_module
from mirror_runtime.triton.server.deploy_lock import CANDIDATE_NAME, LOCK_FILE, REPLACED, clear_killed, deploying
from mirror_runtime.triton.server.supervisor import ServiceOptions, Supervisor, _signals


class Stopping:
    """An event that notes the pauses before restarts, and is set after some waits."""

    def __init__(self, waits: int = 10**6) -> None:
        self.pauses: list[float] = []
        self._waits = waits

    def wait(self, seconds: float) -> bool:
        self._waits -= 1
        self.pauses.append(seconds)
        return self._waits < 0

    def is_set(self) -> bool:
        return self._waits < 0


class Broken:
    """A server that breaks as soon as it serves, with starts that fail or succeed in turn; also its watchdog."""

    def __init__(self, starts: list[bool], repository: Path) -> None:
        self._starts, self.repository = iter(starts), repository

    def start(self) -> None:
        if not next(self._starts):
            raise ServerError("no start")

    def wait_ready(self, cancelled: object) -> None: ...

    def stop(self, grace_s: float) -> None: ...

    def watch(self, stopping: object) -> str:
        return "it died"

    def __enter__(self) -> "Broken":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("starts", "pauses"),
    [
        ([True] * 5, [0, 0, 0, 0, 0]),
        ([False] * 7, [0, 1, 2, 4, 8, 16, 30]),
        ([False, False, True, False], [0, 1, 2, 0]),
    ],
    ids=["served well", "never started", "served between"],
)
def test_pauses_grow_only_while_starts_fail(monkeypatch, tmp_path, starts, pauses):
    broken, stopping = Broken(starts, tmp_path), Stopping()
    monkeypatch.setattr(supervisor_module, "Watchdog", lambda *_: broken)
    options = ServiceOptions(max_restarts=len(starts))
    with pytest.raises(ServerError, match=f"gave up after {len(starts)} restarts"):
        Supervisor(broken, options, stopping, None, lambda line: None).run()  # type: ignore[arg-type]
    assert stopping.pauses == pauses


def killed_deployment(repository: Path, *, published: bool) -> None:
    """Leave what a deployment leaves that is killed before or after it has put the new model into place."""
    scratch = repository.with_name(f".{repository.name}.mirror-deploy")
    for folder in (repository / CANDIDATE_NAME, scratch / "trial"):
        folder.mkdir(parents=True)
    (repository / LOCK_FILE).touch()
    (scratch / REPLACED).mkdir()
    (scratch / REPLACED / "old").touch()
    if published:
        (repository / "embed").mkdir()
        (repository / "embed" / "new").touch()


@pytest.mark.parametrize(("published", "kept"), [(False, "old"), (True, "new")])
def test_a_restart_finds_a_model_whenever_a_deployment_was_killed(monkeypatch, tmp_path, published, kept):
    repository = tmp_path / "models"
    killed_deployment(repository, published=published)
    broken = Broken([True], repository)
    monkeypatch.setattr(supervisor_module, "Watchdog", lambda *_: broken)
    with pytest.raises(ServerError, match="gave up"):
        Supervisor(broken, ServiceOptions(max_restarts=1), Stopping(), None, lambda line: None).run()  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["models", "embed", LOCK_FILE, kept])


def test_only_killed_deployments_are_cleared_and_the_next_one_clears_them_too(tmp_path):
    repository = tmp_path / "models"
    repository.mkdir()
    with deploying(repository) as scratch:
        assert not clear_killed(repository), "it is under way"
        assert scratch.exists()
    assert not clear_killed(repository)
    killed_deployment(repository, published=True)
    with deploying(repository) as scratch:
        assert list(scratch.iterdir()) == []
        assert not (repository / CANDIDATE_NAME).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


@pytest.mark.parametrize(("each_s", "waits"), [([0.05, 0.03, 0.01], 3), ([0.05] * 100, 10)], ids=["replies", "retries"])
def test_a_drained_server_is_left_to_send_its_replies_for_a_while(monkeypatch, tmp_path, each_s, waits):
    """A clock that only sleeping moves; the server's processor time in each tenth of a second."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: round(sum(slept), 6), sleep=slept.append)
    monkeypatch.setattr(server_module, "time", clock)
    monkeypatch.setattr(
        server_module, "cpu_seconds", lambda _: sum(each_s[: len(slept) - 1])
    )  # the first is for requests
    monkeypatch.setattr(server_module, "runners", lambda *_: [])
    drained: Any = server_module.Server(tmp_path)
    drained._process, drained._workspace = SimpleNamespace(pid=1), SimpleNamespace(folder=tmp_path)
    assert drained.drain(30)
    assert len(slept) == 1 + waits


def test_too_few_descriptors_are_reported_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 64))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(server_module, "Workspace", None)
    with pytest.raises(ServerError, match=r"may open 64 files, and tritonserver needs 256.*: raise .* ulimit -n"):
        server_module.Server(tmp_path).start()


def test_the_first_and_the_second_signal_to_stop_are_events_and_an_ignored_one_stays_so(monkeypatch):
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else None)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with _signals() as (first, second):
        assert handlers.keys() == set(STOP_SIGNALS) - {signal.SIGHUP}
        handlers[signal.SIGQUIT](signal.SIGQUIT, None)
        assert first.wait(5)
        assert not second.is_set()
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert second.wait(5)
