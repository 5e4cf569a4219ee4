"""The pages about faults and threats say what the tests show, and nothing else."""

import re

from .catalogue import ELSEWHERE, IN_SOAK, ROWS, TESTS, defined, page, tried

DOCS = TESTS.parent / "docs"


def test_every_row_is_tried_and_every_trial_has_its_row():
    assert set(tried()) | set(IN_SOAK) == set(ROWS)
    assert {name for names in ELSEWHERE.values() for name in names} <= defined()


def test_the_page_about_faults_is_the_one_that_the_tests_give():
    assert (DOCS / "faults.rst").read_text() == page(), "cd tests && python -m faults.catalogue > ../docs/faults.rst"


def test_every_test_that_the_page_about_security_names_exists():
    named = set(re.findall(r"``(test_\w+)``", (DOCS / "security.rst").read_text()))
    assert named and named <= defined(), named - defined()


def test_every_threat_on_the_page_about_security_has_a_test():
    page = (DOCS / "security.rst").read_text()
    threats = re.split(r"(?m)^   \* - (T\d+)$", page)[1:]
    assert threats
    for number, row in zip(threats[::2], threats[1::2], strict=True):
        assert "``test_" in row.partition("\n\n")[0], number
