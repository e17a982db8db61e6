#!/usr/bin/env bash
# Submit the journey as one Slurm job per stage, each waiting for the one before: quantize, distill, export, verify.
#
#   launch/chain.sh [sbatch options] -- model=/models/x data=/data/chat.jsonl output_dir=/runs/x parallel.tensor=8
#   launch/chain.sh --nodes=4 --partition=batch -- model=... data=... output_dir=...
#
# Prints one line per stage: its name and its job id. A stage that is interrupted queues again under the same id, so the
# next one waits for its real end; when a stage fails, the later ones are cancelled. `megaqad recover` does the same in
# one job: the chain is for stages that should be seen, repeated or queued on their own.

# ---- Variables: change them here, or set them in the environment; those of slurm.sbatch work too --------------------
# Stages in order. A shorter list takes a chain up again, e.g. STAGES="export verify".
STAGES=${STAGES:-quantize distill export verify}
# ---------------------------------------------------------------------------------------------------------------------

set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if (($# < 2)); then
  echo "usage: launch/chain.sh [sbatch options] -- model=... data=... output_dir=... [key=value ...]" >&2
  exit 2
fi
shift

script=$(dirname "$(readlink -f "$0")")/slurm.sbatch
before=
for stage in $STAGES; do
  dependency=()
  [[ -z $before ]] || dependency=("--dependency=afterok:$before" --kill-on-invalid-dep=yes)
  before=$(sbatch --parsable "--job-name=megaqad-$stage" "${options[@]}" "${dependency[@]}" "$script" "$stage" "$@")
  before=${before%%;*} # on a federation: id;cluster
  echo "$stage $before"
done
