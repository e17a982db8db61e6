#!/usr/bin/env bash
# Stands for megaqad where only the launch scripts are on trial: a rank that behaves as its first argument says, and
# leaves what it has to tell in the folder of the second.
set -u
rank=$SLURM_PROCID
try=${SLURM_RESTART_COUNT:-0}
folder=${2:-}

stop() {
  ((rank == 0)) || exit 3
  sleep 2
  echo closed >>"$folder/rank0"
  exit 3
}

case $1 in
  rank_dies) # on the first try
    if ((try == 0)); then
      ((rank != 1)) || kill -KILL $$
      exec sleep 600
    fi
    ;;
  always_fails)
    ((rank != 1)) || exit 1
    exec sleep 600
    ;;
  refuses)
    ((rank == 0)) || exit 2
    sleep 1
    echo "megaqad: model is not set" >&2
    exit 2
    ;;
  stops_when_told) # on the first try; rank 0 needs two seconds longer than the others
    if ((try == 0)); then
      trap stop USR1 TERM
      echo ready >"$folder/ready.$rank"
      while :; do sleep 0.1; done
    fi
    ;;
  always_stops) exit 3 ;;
  tells_its_settings) printf '%s\n' "${@:2}" >"$PWD/task$SLURM_ARRAY_TASK_ID" ;;
  fails_at_once) exit 1 ;;
esac
