# shellcheck shell=bash
# For tests/gpu.sh and tests/bench/gpu.sh, which source it in the root of the tree: where the programs come from, and their libraries.
# gpu_setup BUILD PACK sets bin (absolute), python, and in the environment PATH, LD_LIBRARY_PATH, PYTHONPATH, SPURION_SHARED. PACK: what
# deploy/pack.sh made, a folder or its archive, which is unpacked into a folder of this run; "": BUILD/bin. Ends the script where a library is missing.

# Programs want cuBLASLt of one major version; a toolkit or PyTorch's own wheel has it.
find_cublaslt() {
    local name=$1 found
    for found in /usr/local/cuda/lib64 /usr/local/cuda/targets/x86_64-linux/lib \
        $("$python" -c 'import site, sys; print(*(f"{p}/nvidia/{d}/lib" for p in (*site.getsitepackages(), *sys.path) for d in ("cu13", "cublas")))' 2>/dev/null); do
        if [ -e "$found/$name" ]; then
            echo "$found/$name"
            return 0
        fi
    done
    ldconfig -p 2>/dev/null | awk -v n="$name" '$1 == n { print $NF; exit }'
}

gpu_setup() {
    local build=$1 pack=$2 missing path
    # shellcheck disable=SC2034 # read by the scripts
    python=${SPURION_PYTHON:-python3}
    gpu_scratch=$(mktemp -d)
    trap 'rm -rf "$gpu_scratch"' EXIT
    export PATH="$PATH:/usr/local/cuda/bin"
    if [ -n "$pack" ] && [ -f "$pack" ]; then
        "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$pack" "$gpu_scratch" 2>/dev/null ||
            { echo "expected an archive of deploy/pack.sh, found $pack, which does not unpack" >&2; exit 65; }
        pack=$gpu_scratch/pack
    fi
    bin=$(cd "${pack:-$build}/bin" 2>/dev/null && pwd) || { echo "expected programs in ${pack:-$build}/bin, found none" >&2; exit 66; }
    if [ -n "$pack" ] && [ -d "$pack/shared" ]; then
        SPURION_SHARED=$(cd "$pack/shared" && pwd)
    fi
    export SPURION_SHARED=${SPURION_SHARED:-$PWD/../shared}
    if [ -n "$pack" ] && [ -d "$pack/wheels" ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$gpu_scratch/site" "$pack"/wheels/*.whl || exit 65
        export PYTHONPATH=$gpu_scratch/site${PYTHONPATH:+:$PYTHONPATH}
    fi
    missing=$(ldd "$bin/spuriond" | awk '/not found/ { print $1 }')
    mkdir -p "$gpu_scratch/lib"
    for name in $missing; do
        case $name in
            libcublasLt.so.*) path=$(find_cublaslt "$name") ;;
            *) path="" ;;
        esac
        [ -n "$path" ] || { echo "$bin/spuriond: expected the library $name, found none" >&2; exit 65; }
        ln -s "$path" "$gpu_scratch/lib/$name" # alone in its folder: nobody else's libraries change
        export LD_LIBRARY_PATH=$gpu_scratch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    done
    "$bin/spuriond" --version || { echo "$bin/spuriond does not start here" >&2; exit 65; }
}
