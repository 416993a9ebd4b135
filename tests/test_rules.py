"""The rules for tests hold: a costly test needs its mark, and a fast test starts no process."""

import pytest

from tests.support import rules, stopwatch

pytest_plugins = ["pytester"]

BUSY = """
    import time, pytest

    def burn():
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    @pytest.fixture(scope="session")
    def shared():
        burn()

    def test_costly():
        burn()

    @pytest.mark.slow
    def test_marked():
        burn()

    def test_waits_for_a_busy_machine():
        time.sleep(0.2)

    def test_uses_what_others_use_too(shared):
        pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Run test source in this process under the rules."""

    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makeini("[pytest]\nmarkers =\n  slow: s\n  process: p\n  trace: t\n  serving: v\n  tunes: u\n")
        pytester.makepyfile(source)
        plugins = ("-p", "tests.support.rules", "-p", "no:schemathesis", "-p", "no:langsmith_plugin")
        with monkeypatch.context() as patch:
            patch.setattr(rules, "LIMIT_S", 0.1)
            return pytester.runpytest_inprocess(*plugins, *options)

    return run


def test_only_a_test_that_is_costly_itself_needs_the_mark(run):
    result = run(BUSY)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*test_costly took *of CPU time*mark it `slow` with the reason*"])


def test_a_fast_run_leaves_marked_tests_out_and_refuses_unmarked_processes(run):
    source = """
        import subprocess, pytest

        @pytest.mark.process
        def test_marked():
            subprocess.run(["true"])

        def test_unmarked():
            subprocess.run(["true"])

        def test_uses_a_bundle(tiny_bundle):
            pass

        @pytest.mark.tunes
        def test_tunes():
            pass
    """
    run(source, "--fast", "--tunes").assert_outcomes(passed=1, failed=1, deselected=2)
    result = run(source, "--fast")
    result.assert_outcomes(failed=1, deselected=3)
    result.stdout.fnmatch_lines(["*this test starts a process*mark it `process`*"])


def test_a_skip_is_a_failure_where_nothing_may_be_missing(run):
    source = """
        import pytest

        @pytest.mark.skipif(True, reason="no GPU")
        def test_marked(): ...

        def test_calls():
            pytest.skip("no library")
    """
    run(source).assert_outcomes(skipped=2)
    result = run(source, "--fail-skipped")
    # Skipped by its mark, a test fails before it begins.
    result.assert_outcomes(failed=1, errors=1)
    result.stdout.fnmatch_lines(["*test_marked was skipped*no GPU*", "*test_calls was skipped*no library*"])


def test_work_that_others_share_is_not_counted():
    before = stopwatch.now()
    with stopwatch.shared_work(), stopwatch.shared_work():
        sum(range(2_000_000))
    assert (stopwatch.now() - before)[0] < 0.01
