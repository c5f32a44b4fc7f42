"""What the tests of the suite are given: made once, its errors said without a traceback."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from deploy.bundle.read import Bundle, open_bundle
from deploy.errors import ExplainedError
from deploy.measure.bench import BenchResult, bench
from deploy.measure.verify import VerifyReport, verify
from deploy.runtime.runner import Runner, open_runner

T = TypeVar("T")


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """The bundle of --bundle, each byte of which was checked."""
    return _made(lambda: open_bundle(request.config.getoption("bundle")))


@pytest.fixture(scope="session")
def runner(
    bundle: Bundle,
    request: pytest.FixtureRequest,
    record_testsuite_property: Callable[[str, object], None],
) -> Iterator[Runner]:
    """The variant of --precision, on --backend."""
    options = request.config.option
    opened = _made(
        lambda: open_runner(bundle, backend=options.backend, precision=options.precision)
    )
    for name, value in (
        ("bundle", bundle.path.name),
        ("backend", opened.name),
        ("precision", opened.precision),
    ):
        record_testsuite_property(name, value)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def verified(bundle: Bundle, runner: Runner) -> VerifyReport:
    """What `edgereg verify` finds."""
    return _made(lambda: verify(bundle, runner, with_holdout=True))


@pytest.fixture(scope="session")
def timed(bundle: Bundle, runner: Runner, request: pytest.FixtureRequest) -> BenchResult:
    """What `edgereg bench` finds."""
    seconds: float = request.config.getoption("timed_seconds")
    return _made(lambda: bench(bundle, runner, duration_s=seconds))


def _made(make: Callable[[], T]) -> T:
    try:
        return make()
    except ExplainedError as error:
        return pytest.fail(str(error), pytrace=False)
