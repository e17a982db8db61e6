#!/usr/bin/env bash
# Run a megaqad command on plain nodes with torchrun, one rank per GPU, and restart it when a rank dies.
#
#   launch/torchrun.sh distill model=/models/x data=/data/chat.jsonl output_dir=/runs/x parallel.tensor=8
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh distill ...      on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 launch/torchrun.sh distill ...      on node1
#
# Ends with megaqad's code: 0 done, 2 a mistake in the settings, 3 stopped early with everything saved (the same command
# resumes), 1 failed more than MAX_RESTARTS times. SIGTERM, SIGINT and SIGUSR1 let the ranks save and stop; a second one
# ends them at once. output_dir must be shared by all nodes. On one node, megaqad starts its own ranks: this script adds
# several nodes and restarts.

# ---- Variables: change them here, or set them in the environment ----------------------------------------------------
# The Python that has megaqad. Default: the .venv of this folder, else the one on PATH.
PYTHON=${PYTHON:-}
# Nodes, and this node's number. Node 0 must be MASTER_ADDR.
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29400}
# Ranks on this node. Default: one per GPU, or one where there is none.
NPROC_PER_NODE=${NPROC_PER_NODE:-}
# Times the ranks are started again after one has died.
MAX_RESTARTS=${MAX_RESTARTS:-3}
# ---------------------------------------------------------------------------------------------------------------------

set -u

if [[ -z $PYTHON ]]; then
  PYTHON=python3
  [[ ! -x $PWD/.venv/bin/python ]] || PYTHON=$PWD/.venv/bin/python
fi
if [[ -z $NPROC_PER_NODE ]]; then
  NPROC_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  ((NPROC_PER_NODE > 0)) || NPROC_PER_NODE=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torchrun takes every code but 0 for a failure to be repaired by a restart. 2 and 3 are not: they are told to this
# script in a file instead. When a rank has died, torchrun ends the shells of the others, and a rank ends with its shell
# (pdeathsig): it could save nothing without the dead one, and waits for it in a collective.
MEGAQAD_OUTCOME=$(mktemp)
export MEGAQAD_OUTCOME
trap 'rm -f "$MEGAQAD_OUTCOME"' EXIT
# MEGAQAD_ATTEMPT keeps a restart from meeting the addresses of the ranks before, which torchrun's store still holds.
# shellcheck disable=SC2016
rank='export MEGAQAD_ATTEMPT=$TORCHELASTIC_RESTART_COUNT
setpriv --pdeathsig KILL "$@"
code=$?
case $code in
  2 | 3) echo "$code" >"$MEGAQAD_OUTCOME"; exit 0 ;;
esac
exit "$code"'

# In a session of its own, where a terminal's Ctrl-C does not reach it: torchrun would give the ranks no time to save.
setsid "$PYTHON" -m torch.distributed.run --no-python \
  --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$NPROC_PER_NODE" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts="$MAX_RESTARTS" \
  bash -c "$rank" rank "$PYTHON" -m megaqad "$@" &
torchrun=$!

# The first signal goes past torchrun to the ranks themselves, the children of the shells it started.
stopping=
# shellcheck disable=SC2317,SC2329
stop() {
  if [[ -n $stopping ]]; then
    echo "torchrun.sh: second signal, ending at once" >&2
    kill -TERM "$torchrun" 2>/dev/null
  else
    stopping=yes
    echo "torchrun.sh: the ranks save and stop; once more ends them at once" >&2
    for shell in $(pgrep --parent "$torchrun"); do pkill -USR1 --parent "$shell"; done
  fi
}
trap stop USR1 TERM INT

wait "$torchrun"
code=$?
while kill -0 "$torchrun" 2>/dev/null; do
  wait "$torchrun"
  code=$?
done
outcome=$(cat "$MEGAQAD_OUTCOME")
exit "${outcome:-$code}"
