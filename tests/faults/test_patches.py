"""Tests that the faults of this folder do not rot: each patch still applies, and the tests that it names exist."""

import re

import pytest

from tests.faults import run

NAMES = sorted(path.stem for path in run.FOLDER.glob("*.patch"))


def function(path, name):
    """Return the lines of a test from its first decorator on, up to its body; "" if there is none."""
    text = (run.ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"^((?:@.*\n(?:[ )\]].*\n)*)*)def {name}\(", text, re.MULTILINE)
    return found[0] if found else ""


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_applies_and_its_tests_exist(name):
    (fault,) = run.faults([name])
    assert fault.hunks and all(path.startswith(run.MAY_CHANGE) for path in fault.paths)
    for path, text in fault.changed(run.ROOT).items():
        assert text != (run.ROOT / path).read_text(encoding="utf-8")
    for argument in fault.caught_by:
        path, _, test = argument.partition("::")
        found = function(path, test.partition("[")[0])
        assert found, f"{argument} does not exist"
        assert not re.search(r"^@pytest\.mark\.slow", found, re.MULTILINE), f"{argument} is slow"


def test_what_moved_is_told(tmp_path):
    """The runner must say so, and not pass over a patch whose lines are gone."""
    fault = run.faults(NAMES[:1])[0]
    with pytest.raises(run.FaultError, match="does not exist; rewrite the patch"):
        fault.changed(tmp_path)
    for path in fault.paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("something else\n")
    with pytest.raises(run.FaultError, match="rewrite the patch: the code has moved"):
        fault.changed(tmp_path)


def test_the_nearest_of_equal_places_is_changed(tmp_path):
    (tmp_path / "x.py").write_text("a\nb\nc\na\nb\n")
    hunk = run.Hunk("x.py", 4, ("a", "b"), ("a", "d"))
    assert run.Fault("x", "y", (), (hunk,)).changed(tmp_path) == {"x.py": "a\nb\nc\na\nd\n"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Fault: no tests.\n", "the first two lines"),
        (
            "Fault: cut off.\nCaught by: tests/x.py\n+++ b/mlip_jax/x.py\n@@ -1,2 +1,2 @@\n-a\n+b\n",
            "fewer lines",
        ),
    ],
)
def test_a_patch_of_another_form_is_an_error(tmp_path, text, message):
    (tmp_path / "x.patch").write_text(text)
    with pytest.raises(run.FaultError, match=message):
        run.read(tmp_path / "x.patch")
