#!/usr/bin/env bash
# Packages for a GPU machine that has Python 3.12, torch 2.11 for CUDA 13 with numpy, nvcc, and no network.
#
#     benchmarks/gpu/pack.sh DEST
#
# Writes DEST/bundle-1, bundle-2, …, each at most BUNDLE_MIB (58): parts with SHA-256 sums, for benchmarks/gpu/unpack.sh.
# Versions are those of constraints/gpu-cu13.txt. Device code of other architectures than ARCH (90: H100, H200) is dropped
# from Transformer Engine and DALI. Its torch extension is published as source alone: a wheel of it that unpack.sh has
# built before goes along when EXTENSION names it, else it is built on the GPU machine.
#
# Needs a Python with pip, setuptools, packaging, wheel and torch (any): PYTHON, or the project's .venv. With WHEELS=FOLDER
# nothing is downloaded and the wheels there are packed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
dest=${1:?"usage: benchmarks/gpu/pack.sh DEST"}
arch=${ARCH:-90}
python=${PYTHON:-$root/.venv/bin/python}
pins=$root/constraints/gpu-cu13.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "[${SECONDS} s] $*"; }

fetch() { # into the folder $1
    local tags=(--python-version 3.12 --implementation cp --only-binary=:all:) tag
    for tag in 2_{39..5}_x86_64 {2014,2010,1}_x86_64; do
        case $tag in 2_*) tags+=(--platform "manylinux_$tag") ;; *) tags+=(--platform "manylinux$tag") ;; esac
    done
    grep -E '^[a-z]' "$pins" | grep -vE '^(torch|transformer-engine-torch)==' > "$work/wheels.txt"
    "$python" -m pip download --quiet --no-deps "${tags[@]}" --dest "$1" --requirement "$work/wheels.txt"
    "$python" -m pip download --quiet --no-deps "${tags[@]}" --dest "$1" megatron-core==0.16.1
    if [ -n "${EXTENSION:-}" ]; then
        cp "$EXTENSION" "$1"
    fi
    # Its setup asks torch for the CUDA version even to be named; a torch for CPUs has none.
    mkdir "$work/cuda"
    printf 'import torch\n\ntorch.version.cuda = "13.0"\n' > "$work/cuda/sitecustomize.py"
    PYTHONPATH=$work/cuda "$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary=:all: \
        --dest "$1" "$(grep '^transformer-engine-torch==' "$pins")"
}

wheels=${WHEELS:-}
if [ -z "$wheels" ]; then
    wheels=$work/wheels
    mkdir "$wheels"
    say "downloading"
    fetch "$wheels" 2> >(grep -v "is ignored: it is neither" >&2)
fi
say "$(find "$wheels" -type f | wc -l) files, $(du -sm "$wheels" | cut -f1) MiB; opening"
"$python" "$here/bundle.py" stage "$wheels" "$work/stage"

# What the GPU machine never reads.
rm -rf "$work"/stage/te/transformer_engine/jax
if [ -d "$work/stage/dali/nvidia" ]; then
    cd "$work/stage/dali/nvidia"
    find . -name '*cpython-*' ! -name '*cpython-312-*' -delete
    rm -rf dali/include nvimgcodec/include nvimgcodec/tools cu13/include
    rm -f nvimgcodec/extensions/lib{nvjpeg2k,nvtiff}_ext*
    cd - > /dev/null
fi
say "dropping device code of other architectures than sm_$arch"
# nvimgcodec and nvjpeg stay as they are: their licence wants it so.
for folder in "$work/stage/te" "$work/stage/dali/nvidia/dali"; do
    [ -d "$folder" ] || continue
    find "$folder" -type f -name '*.so*' -size +1M -exec "$python" "$here/slim.py" "$arch" {} +
    find "$folder" -type f -name '*.so*' -exec strip --strip-unneeded {} + 2> /dev/null || true
done
say "compressing"
"$python" "$here/bundle.py" seal "$work/stage" "$dest"
say "done: $(du -sm "$dest" | cut -f1) MiB in $dest"
