"""Builds the wheel: the version stands in the file VERSION at the top of the tree, the messages in proto/spurion.proto."""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # pip's isolated builds leave the folder of setup.py out
import build_messages  # noqa: E402


def version() -> str:
    for path in (HERE.parents[1] / "VERSION", HERE / "VERSION"):
        if path.is_file():
            return path.read_text(encoding="ascii").strip()
    raise SystemExit(f"setup.py: expected VERSION two folders above {HERE}, or a copy in it; found neither")


class BuildMessages(build_py):
    """build_py, and the module that protoc's output becomes."""

    def run(self):
        super().run()
        build_messages.write(Path(self.build_lib) / "spurion" / "_descriptor.py")


class WithCopies(sdist):
    """A source distribution stands alone: it carries the version and the messages."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        for path in (HERE.parents[1] / "VERSION", build_messages.find_proto()):
            if path.is_file():
                shutil.copy(path, base_dir)


setup(version=version(), cmdclass={"build_py": BuildMessages, "sdist": WithCopies})
