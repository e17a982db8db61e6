#!/usr/bin/env bash
# Submit a sweep as one Slurm job array: every combination of the values given is one run in a folder of its own.
#
#   launch/sweep.sh [sbatch options] -- distill model=/models/x data=/data/chat.jsonl output_dir=/runs/lr \
#       train.lr=1e-5,3e-6,1e-6 seed=1,2
#
# Values are written as in a Hydra multirun (a,b or range(1,4) or choice(a,b)); here that gives six runs, /runs/lr/1 to
# /runs/lr/6. /runs/lr/sweep.txt lists them, one line of settings each: line N is array task N. A list written by hand
# does as well: SWEEP=my.txt sbatch --array=1-6 launch/slurm.sbatch distill model=... data=...

# ---- Variables: change them here, or set them in the environment; those of slurm.sbatch work too --------------------
# Runs at the same time.
MAX_PARALLEL=${MAX_PARALLEL:-8}
# A Python with hydra-core, to read the values. Default: the .venv of this folder, else the one on PATH.
PYTHON=${PYTHON:-}
# ---------------------------------------------------------------------------------------------------------------------

set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if (($# < 3)); then
  echo "usage: launch/sweep.sh [sbatch options] -- <command> output_dir=... key=value,value [key=value ...]" >&2
  exit 2
fi
shift
command=$1
shift
if [[ -z $PYTHON ]]; then
  PYTHON=python3
  [[ ! -x $PWD/.venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
fi

here=$(dirname "$(readlink -f "$0")")
list=$("$PYTHON" "$here/expand_sweep.py" "$@")
job=$(SWEEP=$list sbatch --parsable "--array=1-$(wc -l <"$list")%$MAX_PARALLEL" "--job-name=megaqad-sweep" \
  --output=%x-%A_%a.log "${options[@]}" "$here/slurm.sbatch" "$command")
echo "sweep ${job%%;*}: $(wc -l <"$list") runs, listed in $list"
