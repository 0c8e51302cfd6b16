# SPDX-License-Identifier: MIT
"""Counts the samples of torch's own test material that pass, by operator and category."""

import collections

import pytest


class Tally:
    """Runs a check on samples; what fails is told at the end, with the first failures."""

    def __init__(self):
        self.passed, self.total, self.failures = 0, 0, []

    def run(self, check, sample, *args):
        self.total += 1
        try:
            check(sample, *args)
        except Exception as error:  # an assertion, or what an operator raises
            self.failures.append(f"{_short(sample)}: {type(error).__name__}: {str(error)[:500]}")
        else:
            self.passed += 1


def _short(sample):
    return (sample.summary() if hasattr(sample, "summary") else str(sample))[:300]


@pytest.fixture
def tally(record_property):
    found = Tally()
    yield found
    record_property("passed", found.passed)
    record_property("total", found.total)
    assert found.total, "no samples"
    assert not found.failures, f"{len(found.failures)} of {found.total} fail\n" + "\n".join(
        found.failures[:3]
    )


def pytest_terminal_summary(terminalreporter):
    counts = collections.defaultdict(lambda: [0, 0])
    for reports in terminalreporter.stats.values():
        for report in reports:
            properties = dict(getattr(report, "user_properties", ()))
            if "conformance" in report.nodeid and getattr(report, "when", "") == "teardown" and properties:
                name = report.nodeid.partition("::")[2].replace("[", " ").rstrip("]").removeprefix("test_")
                counts[name][0] += properties["passed"]
                counts[name][1] += properties["total"]
    if counts:
        terminalreporter.section("samples of torch's own tests: passed / total")
        for name, (passed, total) in sorted(counts.items()):
            terminalreporter.write_line(f"{passed:6} / {total:<6} {name}")
