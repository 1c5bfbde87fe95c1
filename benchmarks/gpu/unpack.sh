#!/usr/bin/env bash
# Add one bundle of benchmarks/gpu/pack.sh to SITE, and make ready what is whole with it.
#
#     benchmarks/gpu/unpack.sh BUNDLE [SITE=/tmp/site]        then:  . SITE/env.sh
#
# Checks the parts, joins and opens what is whole. Transformer Engine's torch extension is built with g++ and CUDA's
# headers unless one came along that this Python's torch loads (BUILD=no: never). Packages lie in SITE alone: nothing is
# installed into Python itself. PYTHON (python3) is the one with torch.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bundle=${1:?"usage: benchmarks/gpu/unpack.sh BUNDLE [SITE]"}
mkdir -p "${2:-/tmp/site}"
site=$(cd "${2:-/tmp/site}" && pwd)
python=${PYTHON:-python3}

say() { echo "[${SECONDS} s] $*"; }

if ! "$python" -c 'import importlib.util as u; raise SystemExit(not (u.find_spec("torch") and u.find_spec("numpy")))'; then
    echo "error: $python has no torch with numpy; PYTHON names the one that has" >&2
    exit 1
fi
"$python" -c 'import sys; raise SystemExit(sys.version_info[:2] != (3, 12))' || echo "warning: packed for Python 3.12" >&2

state=0
"$python" "$here/bundle.py" open "$bundle" "$site" || state=$?
if [ "$state" != 0 ] && [ "$state" != 3 ]; then
    exit "$state"
fi

cat > "$site/env.sh" << X
# . $site/env.sh [MEGATRON=0.19.2]     the packages of $site for $python
site=$site python=$python
export PYTHON=\$python
X
cat >> "$site/env.sh" << 'X'
export PYTHONPATH=$site/te:$site/megatron-core-${1:-0.19.2}:$site/dali:$site/base
export PATH=$site/base/bin:$PATH
for cuda in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-13*; do
    if [ -f "$cuda/include/cuda_runtime.h" ]; then
        export CUDA_HOME=$cuda NVTE_CUDA_INCLUDE_DIR=$cuda/include
        break
    fi
done
# CUDA's libraries come with torch's wheel, nvJPEG with DALI's.
nvidia=$("$python" -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("torch").origin).parents[1])')/nvidia
export LD_LIBRARY_PATH=$site/dali/nvidia/cu13/lib:$nvidia/cu13/lib:$nvidia/cudnn/lib:$nvidia/nccl/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
X
set --
# shellcheck disable=SC1091
. "$site/env.sh"

imports() { "$python" -c "import $1" > /dev/null 2>&1; }

build() { # Transformer Engine's torch extension, into site/te, and as a wheel into site/built
    local source libraries=$site/te/transformer_engine/wheel_lib log=$site/build.log
    rm -rf "$site/build"
    mkdir -p "$site/build" "$site/built" "$libraries"
    tar -xzf "$site"/te/source/transformer_engine_torch-*.tar.gz -C "$site/build"
    source=$(echo "$site"/build/transformer_engine_torch-*)
    if ! (
        cd "$source"
        export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS=${JOBS:-$(nproc)}
        export CPATH=$nvidia/cu13/include:$nvidia/cudnn/include:$nvidia/nccl/include:$CUDA_HOME/include
        "$python" setup.py -q bdist_wheel -d "$site/built"
    ) > "$log" 2>&1; then
        tail -n 20 "$log"
        echo "error: Transformer Engine's torch extension was not built; all of it: $log"
        return 1
    fi
    rm -f "$libraries"/transformer_engine_torch*.so
    "$python" "$here/bundle.py" stage "$site/built" "$site/build/stage"
    cp -r "$site"/build/stage/te/. "$site/te/"
}

if [ -d "$site/dali" ] && ! "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("nvidia.dali") is None)'; then
    # Another `nvidia` on the path is a package, which hides ours: make ours one that takes in the others.
    printf '__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n' > "$site/dali/nvidia/__init__.py"
fi
if [ -d "$site/te" ] && [ "${BUILD:-yes}" = yes ] && ! imports "transformer_engine.pytorch"; then
    say "building Transformer Engine's torch extension on $(nproc) cores"
    build && say "built: $(ls "$site"/built/*.whl)" || true
fi
[ "$state" = 0 ] && say "all is there" || say "other bundles are still to come"
say "use it: . $site/env.sh    ($(du -sm "$site" | cut -f1) MiB)"
