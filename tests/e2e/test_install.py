"""`cmake --install`: daemon, command line, library, headers, spurion.pc and the CMake package, used by a consumer outside the tree."""
import os
import pathlib
import shutil
import subprocess

import pytest

BUILD = pathlib.Path(os.environ["SPURION_BUILD"])
VERSION = (pathlib.Path(os.environ["SPURION_SOURCE"]) / "VERSION").read_text().strip()
PROGRAM = """
#include <stdio.h>
#include <spurion/client.h>

int main(void)
{
    spurion_client_options options = {.rpc = "ipc:///nonexistent/spurion.sock", .timeout_ms = 50};
    spurion_client *client;
    spurion_hello_reply reply;
    int code = spurion_client_open(&client, &options);

    if (code == SPURION_OK) {
        code = spurion_client_hello(client, &reply, 50);
    }
    printf("%s %s\\n", spurion_client_version(), spurion_code_name(code));
    spurion_client_close(client);
    return 0;
}
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    out = tmp_path_factory.mktemp("install")
    subprocess.run(["cmake", "--install", BUILD, "--prefix", out], check=True, capture_output=True)
    return out


def run(command, **more):
    done = subprocess.run(command, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def library_folder(prefix):
    return next(prefix.rglob("libspurion.so")).parent


def test_install_puts_programs_that_run(prefix):
    assert run([prefix / "bin" / "spuriond", "--version"]).endswith(VERSION)
    assert VERSION in run([prefix / "bin" / "spurion", "--version"])
    assert (prefix / "share" / "bash-completion" / "completions" / "spurion").exists()


def test_install_serves_pkg_config(prefix, tmp_path):
    source = tmp_path / "consumer.c"
    source.write_text(PROGRAM)
    env = dict(os.environ, PKG_CONFIG_PATH=str(library_folder(prefix) / "pkgconfig"))
    flags = run(["pkg-config", "--cflags", "--libs", "spurion"], env=env).replace(str(BUILD), str(BUILD)).split()
    assert run(["pkg-config", "--modversion", "spurion"], env=env) == VERSION
    flags = [f.replace("/usr/local/include", str(prefix / "include")).replace("/usr/local/lib", str(prefix / "lib")) for f in flags]
    run(["gcc", "-std=c17", "-Wall", "-Wextra", "-Werror", source, "-o", tmp_path / "consumer", *flags, f"-L{library_folder(prefix)}"])
    out = run([tmp_path / "consumer"], env=dict(os.environ, LD_LIBRARY_PATH=str(library_folder(prefix))))
    assert out == f"{VERSION} UNAVAILABLE"


def test_install_serves_find_package(prefix, tmp_path):
    (tmp_path / "consumer.c").write_text(PROGRAM)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(consumer C)\nfind_package(spurion REQUIRED)\n"
        "add_executable(consumer consumer.c)\ntarget_link_libraries(consumer spurion::spurion)\n")
    run(["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"])
    run(["cmake", "--build", tmp_path / "build"])
    assert run([tmp_path / "build" / "consumer"]) == f"{VERSION} UNAVAILABLE"


def test_install_keeps_nng_out_of_the_client(prefix):
    if not shutil.which("ldd"):
        pytest.skip("needs ldd")
    needed = run(["ldd", library_folder(prefix) / "libspurion.so"])
    assert "libprotobuf-c" in needed
    assert "nng" not in needed and "rocksdb" not in needed
