"""One daemon for the tests of a file."""
import pytest

pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
pytest.importorskip("numpy", reason="needs python3-numpy")
import demo  # noqa: E402


@pytest.fixture(scope="module")
def d(tmp_path_factory):
    daemon = demo.Demo(tmp_path_factory.mktemp("spurion")).start()
    yield daemon
    daemon.end()
