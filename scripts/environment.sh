# Shared by the scripts of this folder: find or make a Python, check variables, start processes.
# Sourced, not run. Variables it reads:
#
#   PYTHON       interpreter to use. If it has PyTorch it is used as it is and nothing is installed.
#   TORCH_INDEX  index to take PyTorch from when .venv is made. On Linux the usual index gives the
#                CUDA build (gigabytes); the CPU build: https://download.pytorch.org/whl/cpu
#   NPROC        processes on this machine; by default one per GPU, one on the CPU without a GPU
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT      several machines, told by hand, or
#   NNODES, RDZV_ENDPOINT, RDZV_ID, RDZV_BACKEND     several machines that find each other

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

die() {
    echo "error: $*" >&2
    exit 2
}

# help_wanted "$@": for -h or --help print the calling script's header comment and leave. To be
# called before any cd: $0 may be relative.
help_wanted() {
    local argument
    for argument in "$@"; do
        if [ "$argument" = -h ] || [ "$argument" = --help ]; then
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit 0
        fi
    done
}

# need NAME MEANING ...: tell all the variables that are not set, not only the first.
need() {
    local missing=0
    while [ $# -gt 0 ]; do
        if [ -z "${!1:-}" ]; then
            echo "error: $1 is not set; expected $2" >&2
            missing=1
        fi
        shift 2
    done
    [ "$missing" = 0 ] || die "set it in front of the command; $0 --help shows an example"
}

has_torch() {
    "$1" - 2>/dev/null <<'PY'
from importlib.metadata import version
raise SystemExit(tuple(map(int, version("torch").split(".")[:2])) < (2, 10))
PY
}

has_packages() {
    has_torch "$1" && "$1" - 2>/dev/null <<'PY'
from importlib.metadata import version
for name in "numpy", "pillow", "safetensors", "scipy", "tqdm":
    version(name)
PY
}

# given_python: set $python to one that has what the commands need already; install nothing.
given_python() {
    local candidates=(python python3 "$root/.venv/bin/python")
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        if has_packages "$python"; then return; fi
    done
    die "no PyTorch 2.10 or newer with the packages of setup.py in ${candidates[*]}; activate the environment that has it, or" \
        "set PYTHON=/path/to/python, or make one here with: make dev"
}

# base_python: print an interpreter that can make .venv.
base_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                die "$candidate cannot make virtual environments (no ensurepip);" \
                    "on Debian and Ubuntu: apt install python3-venv"
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer among: ${candidates[*]}; install one or set PYTHON"
}

# own_python EXTRA: set $python to the one of .venv, made on first use, with this extra of setup.py.
own_python() {
    if [ -n "${PYTHON:-}" ] && has_torch "$PYTHON"; then
        python="$PYTHON"
        return
    fi
    python="$root/.venv/bin/python"
    local wanted base clear="" ready
    wanted="$(cat "$root"/setup.py "$root"/ebm_prior/_version.py "$root"/constraints/cpu.txt | cksum)"
    "$python" -c '' 2>/dev/null || clear=yes  # none there, or its interpreter is gone
    for ready in "$1" test; do  # the extra 'test' has all the others
        if [ -z "$clear" ] && [ "$(cat "$root/.venv/ready-$ready" 2>/dev/null)" = "$wanted" ]; then
            return
        fi
    done
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="$(base_python)" || exit
        echo "making .venv with $base" >&2
        "$base" -m venv ${clear:+--clear} "$root/.venv" || die "$base could not make .venv"
    fi
    local pip=("$python" -I -m pip install --quiet --disable-pip-version-check)
    # PyTorch first and pinned: as a mere dependency it would be resolved to the newest CUDA build.
    if ! has_torch "$python"; then
        echo "installing PyTorch into .venv" >&2
        "${pip[@]}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c "$root/constraints/cpu.txt" torch ||
            die "PyTorch was not installed; run this again"
    fi
    echo "installing the packages and the extra '$1' into .venv" >&2
    # A caller in an && list has no errexit: .venv must not be called ready when it is not.
    "${pip[@]}" -e "$root[$1]" || die "the packages were not installed; run this again"
    echo "$wanted" >"$root/.venv/ready-$1"
}

# launch MODULE ARGUMENTS: one process directly, several through torchrun.
launch() {
    local processes="${NPROC:-}" nodes="${NNODES:-1}" meet=(--standalone)
    if [ -z "$processes" ]; then
        processes="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
    fi
    if [ "$processes" = 1 ] && [ "$nodes" = 1 ]; then
        exec "$python" -m "$@"
    fi
    if [ -n "${RDZV_ENDPOINT:-}" ]; then
        meet=(--rdzv_backend "${RDZV_BACKEND:-c10d}" --rdzv_endpoint "$RDZV_ENDPOINT"
            --rdzv_id "${RDZV_ID:-ebm_prior}")
    elif [ "$nodes" != 1 ]; then
        need MASTER_ADDR "the address of node 0 (or set RDZV_ENDPOINT=host:port)" \
            NODE_RANK "the number of this node, 0 to NNODES-1"
        meet=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
            --master_port "${MASTER_PORT:-29500}")
    elif [ -n "${MASTER_PORT:-}" ]; then
        meet=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT")
    fi
    exec "$python" -m torch.distributed.run --nproc_per_node "$processes" --nnodes "$nodes" \
        "${meet[@]}" -m "$@"
}
