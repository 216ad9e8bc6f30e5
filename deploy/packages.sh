#!/bin/sh
# Installs what Spurion needs from Debian 12, where it is missing. Usage: deploy/packages.sh [build|test ...]; needs root only when
# something is missing. Prints nothing when all is there.
set -eu

build="cmake ninja-build gcc g++ pkg-config libc6-dev libnng-dev libprotobuf-c-dev protobuf-c-compiler librocksdb-dev libdnnl-dev
 libjansson-dev libonig-dev libutf8proc-dev libyaml-dev libmicrohttpd-dev libssl-dev zlib1g-dev"
test="clang llvm libclang-rt-14-dev libcmocka-dev python3 python3-venv python3-pytest python3-protobuf python3-numpy protobuf-compiler"

want=""
for set in "${@:-build}"; do
    case "$set" in
        build) want="$want $build" ;;
        test) want="$want $build $test" ;;
        *) echo "packages.sh: expected build or test, found $set" >&2; exit 64 ;;
    esac
done

missing=""
for p in $want; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q "ok installed" || missing="$missing $p"
done
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null 2>&1; then
        exec sudo "$0" "$@"
    fi
    echo "packages.sh: missing Debian packages, install them as root: apt-get install$missing" >&2
    exit 77
fi
echo "installing:$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
