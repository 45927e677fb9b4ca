"""A pytest plugin (``-p benchmarks.jobs.stream_failures``) that prints each failure when it happens.

A group of tests that is killed at its time limit would take its tracebacks with it.
"""

from typing import Any

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Last, since pytest makes its own reporter in the same hook."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None, "pytest runs without its terminal reporter"
    config.pluginmanager.register(_FailurePrinter(reporter), "print_failures_at_once")


class _FailurePrinter:
    """Prints to where pytest's own progress goes."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Name and traceback of a test that failed just now."""
        if report.failed:
            self._reporter.write_line(f"\n{report.when} of {report.nodeid} failed:")
            self._reporter.write_line(report.longreprtext)
