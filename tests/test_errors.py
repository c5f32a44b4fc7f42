import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from deploy import errors as deploy_errors
from edgereg import errors as edgereg_errors
from edgereg.errors import nearest

TREES = {
    deploy_errors: deploy_errors.DeployError,
    edgereg_errors: edgereg_errors.EdgeregError,
}
ALL = [
    value
    for module, root in TREES.items()
    for value in vars(module).values()
    if isinstance(value, type) and issubclass(value, root)
]


def fail(kind):
    raise kind("a rule, {and} %s", found="what 'was' found", remedy="a remedy\nin two lines")


@pytest.fixture(scope="module")
def other_process():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_crosses_a_process_boundary_whole(kind, other_process):
    with pytest.raises(kind, match="a rule") as caught:
        other_process.submit(fail, kind).result(timeout=60)
    with pytest.raises(kind) as raised_here:
        fail(kind)
    assert type(caught.value) is kind
    assert vars(caught.value).keys() >= {"rule", "found", "remedy"}
    for part in ("rule", "found", "remedy", "exit_code"):
        assert getattr(caught.value, part) == getattr(raised_here.value, part)
    assert str(caught.value) == str(raised_here.value)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_reads_rule_found_remedy(kind):
    with pytest.raises(kind, match=r"^a rule.*; found: what 'was' found; remedy: a remedy\nin two"):
        fail(kind)


@pytest.mark.parametrize("module", TREES, ids=lambda module: module.__name__)
def test_all_public_names_and_no_other_are_listed(module):
    defined = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
    }
    assert set(module.__all__) == defined and sorted(module.__all__) == list(module.__all__)


@pytest.mark.parametrize("module", TREES, ids=lambda module: module.__name__)
def test_the_docstring_draws_the_whole_tree(module):
    errors = [kind.__name__ for kind in ALL if kind.__module__ == module.__name__]
    assert len(errors) >= 4 and all(name in module.__doc__ for name in errors)


def test_a_failed_check_is_no_wrong_argument():
    codes = {kind.__name__: kind.exit_code for kind in ALL}
    assert {name for name, code in codes.items() if code == 1} == {
        "CheckFailedError",
        "CollapsedError",
        "TamperedBundleError",
        "TrainingError",
    }
    assert {name for name, code in codes.items() if code == 75} == {"StoppedError"}
    assert set(codes.values()) == {1, 2, 75}


def test_the_nearest_word_is_the_remedy_or_all_of_them_are():
    assert nearest("epoch", ["seed", "epochs"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["seed", "epochs"]) == "choose one of: epochs, seed"
