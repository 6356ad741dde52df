"""Tests against published tables run where those are: they are other people's and no part of this repository. Where they are
missing, the summary of the tests says so (`tests.conftest`).

What needs none of them is checked by `keel fit --selftest`, which a test runs everywhere.
"""

from tests.cluster.laws.reference import FOLDER, TESTS

collect_ignore = [] if FOLDER.is_dir() else [TESTS.name]
