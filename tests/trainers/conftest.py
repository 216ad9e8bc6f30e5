"""One daemon for the tests of a file."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
pytest.importorskip("numpy", reason="needs python3-numpy")
import demo  # noqa: E402


@pytest.fixture(scope="module")
def d(tmp_path_factory):
    daemon = demo.Demo(tmp_path_factory.mktemp("spurion")).start()
    yield daemon
    daemon.end()
